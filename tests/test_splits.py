"""Splits: only answers are supervised, ids follow content, overlap and emptiness are named, padding is masked."""

import pytest
import torch
from conftest import CHAT_TEMPLATE, random_rows, word_tokenizer
from datasets import Dataset
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from hf_semalign.experiments.symbols import build_tokenizer, make_records
from hf_semalign.splits import Collator, check_disjoint, encode, valid_positions
from hf_semalign.tokenization import normalise_prompt, prompt_of

WORDS = ["a", "b", "c", "d", "e", "="]
PAIR = {"prompt": "a b =", "completion": " b a"}


def turn(role, content):
    return {"role": role, "content": content}


DIALOGUE = [turn("user", "hello"), turn("assistant", "hi"), turn("user", "how are you"), turn("assistant", "fine")]


@pytest.fixture
def tokenizer():
    """``<pad> <s> </s>`` are 0 to 2, ``a b c d e =`` 3 to 8."""
    return word_tokenizer(WORDS)


def encoded(record, tokenizer=None, **options):
    """Ids and labels of one record."""
    row = encode([record], tokenizer, split="align", **options)[0]
    return row["input_ids"], row["labels"]


def supervised(ids, labels, tokenizer):
    """Tokens, and whether each is supervised; a supervised label is the token itself."""
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [(token, label != -100) for token, label in zip(tokens, labels, strict=True)]


# Valid positions


def test_a_position_is_valid_when_the_next_token_is_supervised():
    labels = torch.tensor([[-100, -100, 5, 6], [7, 8, -100, 9], [4, -100, -100, -100], [-100, 0, -100, -100]])
    expected = [[0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    valid = valid_positions(labels)
    assert valid.dtype == torch.bool and valid.int().tolist() == expected


def test_a_sequence_of_one_token_has_no_valid_position():
    assert valid_positions(torch.tensor([[5], [-100]])).tolist() == [[False], [False]]


# Prompt and completion


def test_only_the_completion_is_supervised_and_ends_in_one_eos(tokenizer):
    ids, labels = encoded(PAIR, tokenizer)
    assert ids == [1, 3, 4, 8, 4, 3, 2]
    assert labels == [-100, -100, -100, -100, 4, 3, 2]


def test_a_completion_that_repeats_the_prompt_is_supervised_whole(tokenizer):
    ids, labels = encoded({"prompt": "a a", "completion": " a a"}, tokenizer)
    assert ids == [1, 3, 3, 3, 3, 2] and labels == [-100, -100, -100, 3, 3, 2]


def closing_tokenizer():
    """One that writes ``</s>`` at the end of every text itself."""
    tokenizer = word_tokenizer(WORDS)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("completion", "make"),
    [(" b a </s>", lambda: word_tokenizer(WORDS)), (" b a", closing_tokenizer)],
    ids=["written in the answer", "added by the tokenizer"],
)
def test_an_eos_that_is_there_is_not_doubled(completion, make):
    assert encoded({"prompt": "a b =", "completion": completion}, make()) == (
        [1, 3, 4, 8, 4, 3, 2],
        [-100, -100, -100, -100, 4, 3, 2],
    )


def test_a_tokenizer_without_eos_ends_with_the_answer(tokenizer):
    tokenizer.eos_token = None
    assert encoded(PAIR, tokenizer)[0] == [1, 3, 4, 8, 4, 3]


def test_a_token_merged_over_the_seam_belongs_to_the_answer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "x": 3, "a": 4, "b": 5, "y": 6, "ab": 7}
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b")])), eos_token="</s>")
    assert encoded({"prompt": "xa", "completion": "by"}, merging) == ([3, 7, 6, 2], [-100, 7, 6, 2])
    assert encoded({"prompt": "xa", "completion": "y"}, merging) == ([3, 4, 6, 2], [-100, -100, 6, 2])


def test_the_embedded_task_is_encoded_as_it_is_written():
    tokenizer, (record,) = build_tokenizer(), make_records(1, seed=0)
    ids, labels = encoded(record, tokenizer)
    assert tokenizer.decode(ids) == f"<s> {record['prompt']}{record['completion']} </s>"
    assert tokenizer.decode([label for label in labels if label != -100]) == f"{record['completion'].strip()} </s>"


# Conversations


def test_every_assistant_turn_of_messages_is_supervised_with_its_end(chat_tokenizer):
    result = supervised(*encoded({"messages": DIALOGUE}, chat_tokenizer), chat_tokenizer)
    text = " ".join(token for token, _ in result)
    assert text == "<user> hello </s> <assistant> hi </s> <user> how are you </s> <assistant> fine </s>"
    assert [index for index, (_, flag) in enumerate(result) if flag] == [4, 5, 12, 13]


def test_a_system_turn_and_a_last_question_are_not_supervised(chat_tokenizer):
    messages = [turn("system", "bye"), *DIALOGUE[:2], turn("user", "how")]
    result = supervised(*encoded({"messages": messages}, chat_tokenizer), chat_tokenizer)
    assert [token for token, flag in result if flag] == ["hi", "</s>"]
    assert [token for token, _ in result][-4:] == ["</s>", "<user>", "how", "</s>"]


def test_only_the_completion_of_a_conversation_is_supervised(chat_tokenizer):
    record = {"prompt": DIALOGUE[:3], "completion": DIALOGUE[3:]}
    ids, labels = encoded(record, chat_tokenizer)
    assert ids == encoded({"messages": DIALOGUE}, chat_tokenizer)[0]
    assert [token for token, flag in supervised(ids, labels, chat_tokenizer) if flag] == ["fine", "</s>"]


def test_a_template_without_generation_prompt_still_supervises_the_answer():
    template = CHAT_TEMPLATE.partition("{% if")[0]
    tokenizer = word_tokenizer(["<user>", "<assistant>", "hello", "hi"], template)
    result = supervised(*encoded({"messages": DIALOGUE[:2]}, tokenizer), tokenizer)
    assert [token for token, flag in result if flag][-2:] == ["hi", "</s>"] and [flag for _, flag in result[:3]] == [False] * 3


# Token ids


def test_token_ids_pass_through():
    assert encoded({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}) == ([5, 6, 7], [-100, 6, 7])


@pytest.mark.parametrize("mask", [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]], ids=str)
def test_padding_that_a_mask_marks_is_taken_off(mask):
    kept = iter([(5, -100), (6, 6), (7, 7)])
    ids, labels = zip(*[next(kept) if keep else (0, -100) for keep in mask], strict=True)
    assert encoded({"input_ids": ids, "labels": labels, "attention_mask": mask}) == ([5, 6, 7], [-100, 6, 7])


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param([-100, 6], id="fewer"),
        pytest.param([-100, 6, 7, 8], id="more"),
    ],
)
def test_ids_and_labels_of_different_lengths_are_refused(labels):
    rows = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [5, 6, 7], "labels": labels}]
    with pytest.raises(ValueError, match=rf"align\[1\] has 3 input_ids but {len(labels)} labels"):
        encode(rows, None, split="align")


@pytest.mark.parametrize("form", ["torch", "numpy"])
@pytest.mark.parametrize("mask", [{}, {"attention_mask": [1, 1, 1]}], ids=["bare", "with a mask"])
def test_formatted_data_sets_are_encoded_as_plain_lists_are(form, mask):
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    formatted = Dataset.from_list([row | mask]).with_format(form)
    assert encode(formatted, None, split="align")[0] == encode([row], None, split="align")[0]


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_formatted_data_sets_do_not_hide_a_shared_prompt(form):
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
    with pytest.raises(ValueError, match=r"align\[0\] = eval\[0\]"):
        check_disjoint({"align": rows, "eval": rows.with_format(form)})


# Truncation, identity


def test_long_sequences_are_cut_at_the_end(tokenizer):
    assert encoded(PAIR, tokenizer, max_length=5) == ([1, 3, 4, 8, 4], [-100, -100, -100, -100, 4])
    assert encoded(PAIR, tokenizer, max_length=7) == encoded(PAIR, tokenizer)


def test_example_ids_follow_content_alone(tokenizer):
    records = [PAIR, {"prompt": "a =", "completion": " b"}, {"prompt": "c =", "completion": " d e"}]
    ids = encode(records, tokenizer, split="align")["example_id"]
    turned = encode(Dataset.from_list(records[::-1]), tokenizer, split="eval")["example_id"]
    assert list(ids) == list(turned)[::-1] and len(set(ids)) == 3
    assert encode([PAIR, PAIR], tokenizer, split="align")["example_id"][:] == [ids[0]] * 2
    assert all(0 <= example < 2**63 for example in ids)


def test_example_ids_tell_labels_and_lengths_apart(tokenizer):
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]},
        {"input_ids": [1, 23], "labels": [-100, 23]},
        {"input_ids": [12, 3], "labels": [-100, 3]},
    ]
    assert len(set(encode(rows, None, split="align")["example_id"])) == 4
    cut = encode([PAIR], tokenizer, split="align", max_length=5)["example_id"]
    assert cut != encode([PAIR], tokenizer, split="align")["example_id"]


def test_example_ids_are_the_same_in_every_process():
    # Caches on disk are keyed by them: this is the value of the first release.
    assert encode([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}], None, split="a")["example_id"][0] == 3508651949580019415


# Errors


def test_a_split_without_rows_is_refused(tokenizer):
    with pytest.raises(ValueError, match="The extract split has no rows"):
        encode([], tokenizer, split="extract")


def test_rows_without_valid_positions_are_named(tokenizer):
    records = [PAIR, {"prompt": "a b c d e =", "completion": " a"}, PAIR, {"prompt": "a b c d e", "completion": " b"}]
    with pytest.raises(ValueError, match=r"2 of 4 rows of the eval split \(rows \[1, 3\]\).*max_length \(now 6\)"):
        encode(records, tokenizer, split="eval", max_length=6)
    with pytest.raises(ValueError, match=r"1 of 1 rows of the align split \(rows \[0\]\)"):
        encode([{"input_ids": [5, 6], "labels": [5, -100]}], None, split="align")


def test_rows_without_an_answer_are_named(tokenizer, chat_tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="No valid positions in 1 of 1 rows"):
        encode([{"prompt": "a b =", "completion": ""}], tokenizer, split="align")
    with pytest.raises(ValueError, match="No valid positions in 1 of 1 rows"):
        encode([{"messages": DIALOGUE[:1]}], chat_tokenizer, split="align")


def test_unknown_columns_are_named(tokenizer):
    with pytest.raises(
        ValueError, match=r"align\[0\] has the columns \['completion', 'text'\]: expected prompt and completion"
    ):
        encode([{"text": "a", "completion": "b"}], tokenizer, split="align")


@pytest.mark.parametrize("record", [PAIR, {"messages": DIALOGUE}])
def test_text_without_a_tokenizer_is_refused(record):
    with pytest.raises(ValueError, match=r"align\[0\] holds text: pass its tokenizer as processing_class"):
        encode([record], None, split="align")


@pytest.mark.parametrize("record", [{"messages": DIALOGUE}, {"prompt": DIALOGUE[:1], "completion": DIALOGUE[1:2]}])
def test_messages_without_a_chat_template_are_refused(record, tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        encode([record], tokenizer, split="align")


# Disjoint splits


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Sort A B", "sort a b"),
        (" sort\ta \n b ", "sort a b"),
        ("sort\u00a0a b", "sort a b"),
        ("\uff53\uff4f\uff52\uff54 a", "sort a"),
        ("caf\u00e9", "cafe\u0301"),
        ("STRASSE", "stra\u00dfe"),
    ],
)
def test_prompts_compare_without_case_white_space_and_unicode_form(left, right):
    assert normalise_prompt(left) == normalise_prompt(right)
    with pytest.raises(ValueError, match=r"align\[0\] = eval\[0\]"):
        check_disjoint({"align": [{"prompt": left}], "eval": [{"prompt": right}]})


def test_shared_rows_are_named_across_all_splits():
    splits = {
        "extract": [{"prompt": "one"}, {"prompt": "two"}],
        "align": [{"prompt": "three"}, {"prompt": "Two "}, {"prompt": "four"}],
        "eval": [{"prompt": "five"}, {"prompt": "six"}, {"prompt": "four"}],
    }
    with pytest.raises(ValueError) as error:
        check_disjoint(splits)
    assert "2 prompts" in str(error.value)
    assert "extract[1] = align[1]: 'two'" in str(error.value) and "align[2] = eval[2]: 'four'" in str(error.value)


def test_at_most_five_shared_rows_are_shown_and_all_are_counted():
    rows = [{"prompt": f"p{index}"} for index in range(7)]
    with pytest.raises(ValueError, match="7 prompts") as error:
        check_disjoint({"align": rows, "eval": rows})
    assert str(error.value).count(" = eval[") == 5


def test_disjoint_splits_pass_also_with_repeats_inside_one():
    check_disjoint({"align": [{"prompt": "a"}, {"prompt": "a"}], "eval": [{"prompt": "b"}], "extract": []})


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "How  ARE you", "completion": "fine"}, "how are you"),
        ({"prompt": [turn("system", "Hello"), turn("user", "How are you")], "completion": DIALOGUE[3:]}, "hello how are you"),
        ({"messages": DIALOGUE}, "hello hi how are you"),
        ({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, "5 6"),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}, "5"),
        ({"input_ids": [5, 6], "labels": [5, 6]}, "5 6"),
    ],
)
def test_the_prompt_is_what_the_answer_is_conditioned_on(record, prompt):
    assert prompt_of(record) == prompt


def test_records_of_different_forms_share_their_prompts():
    with pytest.raises(ValueError, match=r"align\[0\] = eval\[0\]"):
        check_disjoint({"align": [{"prompt": "Hello", "completion": "hi"}], "eval": [{"messages": DIALOGUE[:2]}]})


def test_padding_does_not_hide_a_shared_prompt():
    padded = {"input_ids": [0, 5, 6, 7], "labels": [-100, -100, -100, 7], "attention_mask": [0, 1, 1, 1]}
    with pytest.raises(ValueError, match=r"align\[0\] = eval\[0\]"):
        check_disjoint({"align": [{"input_ids": [5, 6, 8], "labels": [-100, -100, 8]}], "eval": [padded]})


def test_unknown_columns_are_named_by_the_overlap_check():
    with pytest.raises(ValueError, match=r"columns \['text'\]: expected prompt and completion"):
        check_disjoint({"align": [{"text": "a"}], "eval": [{"text": "b"}]})


# Batches


def test_collator_pads_on_the_right_and_masks_the_padding(tokenizer):
    rows = encode([PAIR, {"prompt": "a =", "completion": " b"}], tokenizer, split="align")
    batch = Collator(pad_token_id=9)(list(rows))
    assert batch["input_ids"].tolist() == [[1, 3, 4, 8, 4, 3, 2], [1, 3, 8, 4, 2, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 4, 3, 2], [-100, -100, -100, 4, 2, -100, -100]]
    assert batch["example_id"].tolist() == list(rows["example_id"])
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert set(batch) == {"input_ids", "attention_mask", "labels", "example_id"}


def test_padding_with_a_real_token_is_still_masked():
    rows = [
        {"input_ids": [2, 5, 2], "labels": [-100, 5, 2], "example_id": 1},
        {"input_ids": [5], "labels": [5], "example_id": 2},
    ]
    batch = Collator(pad_token_id=2)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert valid_positions(batch["labels"]).int().tolist() == [[1, 1, 0], [0, 0, 0]]


REWRITING_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> "
    "{% if message.role == 'assistant' and loop.last %}bye {% endif %}{{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_row(chat_tokenizer):
    """As Qwen3's, whose think block stands in the last turn only: the seam of the first answer cannot be found."""
    chat_tokenizer.chat_template = REWRITING_TEMPLATE
    single = encode([{"messages": DIALOGUE[:2]}], chat_tokenizer, split="align")[0]
    assert [token for token in single["labels"] if token != -100] == single["input_ids"][4:]
    with pytest.raises(ValueError, match=r"align\[1\]: the chat template changes earlier turns when later"):
        encode([{"messages": DIALOGUE[:2]}, {"messages": DIALOGUE}], chat_tokenizer, split="align")


def test_rows_cut_at_max_length_are_counted(tokenizer, caplog):
    encode([PAIR, {"prompt": "a =", "completion": " b"}], tokenizer, split="align", max_length=5)
    assert "1 of 2 rows of the align split are truncated at max_length 5" in caplog.text


def test_batches_of_a_step_are_dealt_out_by_length():
    rows = [
        row | {"example_id": place} for place, row in enumerate(random_rows([(1, 2), (6, 4), (3, 2), (2, 1), (5, 4), (1, 1)]))
    ]
    collate = Collator(0)
    batches = [collate(rows[:2]), collate(rows[2:5]), collate(rows[5:])]
    dealt = collate.by_length(batches)
    assert [batch["example_id"].tolist() for batch in dealt] == [[1, 4], [2, 0, 3], [5]]
    for batch in dealt:
        expected = collate([rows[place] for place in batch["example_id"]])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)
