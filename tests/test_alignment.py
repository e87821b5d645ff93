"""Aligned positions equal brute force over bytes; turns, seams and white space of templates; rows left out, and refused."""

import logging
from itertools import product

import numpy as np
import pytest
from conftest import table
from tokenizers import normalizers
from two_tokenizers import KINDS, byte_level, sentencepiece_bpe, texts, unigram

from hf_semalign.method import alignment
from hf_semalign.method.alignment import TokenRow, align_row, align_rows
from hf_semalign.method.prefix_classes import prefix_classes
from hf_semalign.models.token_bytes import TokenBytes
from hf_semalign.tokenization import IGNORED, tokenize

ALL = 10**6  # rows of a head that is longer than the vocabulary
CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>BEFORE{{ message.content }}AFTER{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>OPENING{% endif %}"
)
ROLES = ["<|user|>", "<|assistant|>", "<|done|>"]


def chat(make, before="\n", after="<|done|>\n", opening=None, **options):
    """A tokenizer with a chat template; what stands before and after each content, and after the opening of an answer."""
    template = CHAT.replace("BEFORE", before).replace("AFTER", after)
    tokenizer = make(template=template.replace("OPENING", before if opening is None else opening), **options)
    tokenizer.add_special_tokens({"additional_special_tokens": ROLES})
    return tokenizer


def rows_of(records, tokenizer):
    return [TokenRow(*tokenize(record, tokenizer, "row")) for record in records]


def tables(*tokenizers):
    """What both tokenizers' tokens spell, and their classes."""
    both = [TokenBytes.of(tokenizer) for tokenizer in tokenizers]
    return *both, prefix_classes(*both, ALL, ALL)


def aligned(record, source, target):
    rows = (rows_of([record], tokenizer)[0] for tokenizer in (source, target))
    return align_row(*rows, *tables(source, target))


def next_texts(record, tokenizer, places):
    """What the tokens after some positions spell, in the tokenizer's own writing."""
    ids, _ = tokenize(record, tokenizer, "row")
    return [tokenizer.convert_ids_to_tokens(ids[place + 1]) for place in places]


def valid(record, tokenizer):
    _, labels = tokenize(record, tokenizer, "row")
    return [place for place in range(len(labels) - 1) if labels[place + 1] != IGNORED]


def by_brute_force(record, source, target):
    """All pairs of valid positions with as many bytes of the answer to come, and both positions that EOS follows."""
    sides = []
    for tokenizer in (source, target):
        spelled = TokenBytes.of(tokenizer).spelled
        ids, _ = tokenize(record, tokenizer, "row")
        assert ids[-1] == tokenizer.eos_token_id
        to_come = [len(b"".join(spelled[token] for token in ids[place + 1 : -1])) for place in valid(record, tokenizer)]
        sides.append(list(zip(to_come, valid(record, tokenizer), strict=True)))
    answer = len(record["completion"].encode())
    return [
        [rank, place]
        for (rank, (ours, _)), (theirs, place) in product(enumerate(sides[0]), sides[1])
        if ours == theirs and ours <= answer
    ]


def by_classes(record, source, target, pairs):
    """Whether the next tokens of pairs are of one class."""
    classes = tables(source, target)[2]
    places = np.array(valid(record, source))[pairs[:, 0]], pairs[:, 1]
    ids = [
        np.array(tokenize(record, tokenizer, "row")[0])[some + 1]
        for tokenizer, some in zip((source, target), places, strict=True)
    ]
    return (classes.source[ids[0]] == classes.target[ids[1]]).tolist()


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_pairs_equal_brute_force_over_bytes(source, target):
    source, target = KINDS[source](), KINDS[target](seed=1)
    prompts, completions = texts(16, seed=3), texts(16, seed=4)
    for prompt, completion in zip(prompts, completions, strict=True):
        record = {"prompt": prompt + "\n", "completion": completion}
        found = aligned(record, source, target)
        expected = by_brute_force(record, source, target)
        first = [0, valid(record, target)[0]]
        assert found.pairs.tolist() in (expected, [first, *expected])
        assert found.pairs.dtype == np.int32 and found.pairs[0].min() in (0, first[1])
        assert found.comparable.tolist() == by_classes(record, source, target, found.pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_one_tokenizer_aligns_every_position_with_itself(kind):
    tokenizer = KINDS[kind]()
    for prompt, completion in zip(texts(10, seed=5), texts(10, seed=6), strict=True):
        record = {"prompt": prompt, "completion": completion}
        found = aligned(record, tokenizer, tokenizer)
        places = valid(record, tokenizer)
        assert found.pairs.tolist() == [[rank, place] for rank, place in enumerate(places)] and found.comparable.all()


def meetings(record, source, target):
    """What comes next at aligned positions, as source and target write it; a star where that is not comparable."""
    found = aligned(record, source, target)
    places = np.array(valid(record, source))[found.pairs[:, 0]], found.pairs[:, 1]
    pairs = zip(next_texts(record, source, places[0]), next_texts(record, target, places[1]), found.comparable, strict=True)
    return [f"{ours} {theirs}{'' if comparable else ' *'}" for ours, theirs, comparable in pairs]


def test_a_pair_by_hand():
    """Digits are cut on one side: the boundaries within " 2" and "15" have no counterpart."""
    record = {"prompt": "The answer is", "completion": " 2015."}
    source, target = byte_level(), byte_level(digits=True)
    assert next_texts(record, source, valid(record, source)) == ["Ġ2", "0", "15", ".", "</s>"]
    assert next_texts(record, target, valid(record, target)) == ["Ġ", "2", "0", "1", "5", ".", "</s>"]
    assert meetings(record, source, target) == ["Ġ2 Ġ", "0 0", "15 1", ". .", "</s> </s>"]
    first = valid(record, target)[0]
    expected = [[0, first], [1, first + 2], [2, first + 3], [3, first + 5], [4, first + 6]]
    assert aligned(record, source, target).pairs.tolist() == expected


def test_nothing_predicts_the_first_token_of_a_row():
    record = {"prompt": "", "completion": " 2015."}
    found = meetings(record, byte_level(), byte_level(digits=True))
    assert found == ["0 0", "15 1", ". .", "</s> </s>"]
    one = byte_level(specials=("<unk>", "<pad>", "<s>", "."))
    assert align_row(TokenRow([7], [7]), TokenRow([7], [7]), *tables(one, one)) is None


# Turns

USER = {"role": "user", "content": "The sum?"}
ANSWERS = [{"role": "assistant", "content": text} for text in ("The sum is 2015.", " naïve 東京\n", "")]


@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe, unigram])
def test_turns_are_aligned_each_with_its_own(make):
    source, target = chat(make), chat(byte_level, before=":", after="<|done|>", digits=True, seed=2)
    found = meetings({"messages": [turn for answer in ANSWERS for turn in (USER, answer)]}, source, target)
    assert found == [pair for answer in ANSWERS for pair in meetings({"messages": [USER, answer]}, source, target)]
    assert found.count("<|done|> <|done|>") == 3 and found[-2:] == ["<|done|> <|done|>"] * 2


def test_turns_of_one_text_meet_in_their_own_place():
    twice = {"messages": [USER, ANSWERS[0], USER, ANSWERS[0]]}
    source, target = chat(byte_level), chat(byte_level, digits=True)
    found = aligned(twice, source, target).pairs
    once, places = len(found) // 2, valid(twice, target)
    assert (
        found[:once, 0].max() < found[once:, 0].min()
        and found[:once, 1].max() < places[len(places) // 2] <= found[once:, 1].min()
    )


def test_what_a_template_writes_after_the_end_is_no_answer():
    source, target = chat(byte_level, after="<|done|>\n"), chat(byte_level, after="<|done|>")
    record = {"messages": [USER, ANSWERS[0]]}
    found = meetings(record, source, target)
    assert len(found) == len(valid(record, target)) == len(valid(record, source)) - 1 and found[-1] == "<|done|> <|done|>"


# Where an answer begins and ends

REST = ["Ġ2 Ġ", "0 0", "15 1", ". .", "<|done|> <|done|>"]


@table(
    "before, after, start",
    [
        ("nothing", "", "", "is is"),
        ("a space in the first token", " ", "", "Ġis is *"),
        ("a space that merges with another", "\t ", "", "ĉ is *"),
        ("a line end of its own token", "\n", "", "is is"),
        ("a space before the end", "", " ", "is is"),
        ("line ends around", "\n", "\n", "is is"),
        ("spaces around", " ", " ", "Ġis is *"),
    ],
)
def test_white_space_that_one_template_writes_around_an_answer(before, after, start):
    """Mistral writes a space before an answer, Llama-2 around it, and Llama-3 trims it."""
    record = {"messages": [USER, {"role": "assistant", "content": "is 2015."}]}
    wide = chat(byte_level, before=before, after=after + "<|done|>", opening="")
    plain = chat(byte_level, before="", after="<|done|>", digits=True)
    assert meetings(record, wide, plain) == [start, *REST]
    turned = [" ".join(reversed(pair.removesuffix(" *").split())) + " *" * pair.endswith("*") for pair in (start, *REST)]
    assert meetings(record, plain, wide) == turned


@pytest.mark.parametrize("make", [sentencepiece_bpe, unigram])
def test_the_space_that_sentencepiece_puts_after_a_special_token_is_no_text(make):
    record = {"messages": [USER, {"role": "assistant", "content": "answer 2."}]}
    source = chat(make, before="", after="<|done|>", scheme="always")
    target = chat(byte_level, before="", after="<|done|>")
    found = meetings(record, source, target)
    assert found[0] == "▁answer an *" and found[-1] == "<|done|> <|done|>" and not any("*" in pair for pair in found[1:])


def test_a_token_across_the_seam_belongs_to_the_answer():
    record = {"prompt": "The ans", "completion": "wer is 7"}
    source, target = byte_level(), byte_level(size=290)
    rest = ["Ġis Ġis", "Ġ7 Ġ", "</s> </s>"]
    assert meetings(record, source, target) == ["Ġanswer wer *", *rest]
    assert meetings(record, target, source)[:2] == ["wer Ġanswer *", "Ġis Ġis"]


def test_a_row_without_eos_is_aligned_up_to_its_last_token():
    source, target = chat(byte_level, after=""), chat(byte_level, after="", digits=True)
    record = {"messages": [USER, {"role": "assistant", "content": "is 2015."}]}
    assert meetings(record, source, target) == ["is is", *REST[:-1]]


# Rows that are left out


def lower_case():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def special_x():
    return byte_level(specials=("<unk>", "<x>", "<s>", "</s>"))


def answers(completions):
    return [{"prompt": "?\n", "completion": completion} for completion in completions]


def align(records, source, target):
    rows = (rows_of(records, tokenizer) for tokenizer in (source, target))
    return align_rows(*rows, *tables(source, target), split="align")


@table(
    "make, completion, reason",
    [
        ("a normaliser", lower_case, "the Answer", r"the source reads b'the Answer' where the target reads b'the answer'"),
        ("a special token in the text", special_x, "a<x>b", "the target has the token '<x>' in the answer"),
    ],
)
def test_rows_that_spell_different_bytes_are_named_and_left_out(make, completion, reason, caplog):
    found = align(answers([*["fine"] * 12, completion]), byte_level(), make())
    assert found[-1] is None and None not in found[:-1]
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "In 1 of 13 rows of the align split" in message and "align[12]: " in message and "left out" in message
    with pytest.raises(ValueError, match=rf"In 2 of 13 rows .*\n  align\[3\]: .*{reason}"):
        align(answers([*["fine"] * 3, completion, completion, *["fine"] * 8]), byte_level(), make())


def test_a_special_token_that_both_have_in_an_answer_does_not_end_it():
    with pytest.raises(ValueError, match="the source has the token '<x>' in the answer"):
        align(answers(["a<x>b"]), special_x(), special_x())


def test_other_numbers_of_answers_are_named():
    tokenizer = byte_level()
    one, two = TokenRow([5, 6, 7], [-100, 6, 7]), TokenRow([5, 6, 7, 8], [-100, 6, -100, 8])
    with pytest.raises(ValueError, match="the source has 1 answers, the target 2"):
        align_rows([one], [two], *tables(tokenizer, tokenizer), split="align")


def test_a_message_names_few_rows_and_shows_little_of_them():
    completions = ["The" * 400] * 30
    with pytest.raises(ValueError, match="30 of 30") as caught:
        align(answers(completions), byte_level(), lower_case())
    assert str(caught.value).count("align[") == alignment.SHOWN and len(str(caught.value)) < 1200


def test_what_is_cut_at_the_maximal_length_of_either_side_drops_out():
    record = {"prompt": "The answer is", "completion": " 2015."}
    source, target = byte_level(), byte_level(digits=True)
    rows = [rows_of([record], tokenizer)[0] for tokenizer in (source, target)]
    both = tables(source, target)
    whole = align_row(*rows, *both).pairs
    for length in range(3, len(rows[1].ids) + 2):
        kept = [[rank, place] for rank, place in whole.tolist() if valid(record, source)[rank] + 1 < length > place + 1]
        found = align_row(*rows, *both, length)
        assert (found.pairs.tolist() if found else []) == kept
    with pytest.raises(ValueError, match="no answer position is left"):
        align_rows(rows[:1], rows[1:], *both, split="align", max_length=3)


def test_a_row_without_an_answer_is_not_aligned():
    tokenizer = byte_level()
    assert align_row(*[TokenRow([5, 6], [-100, -100])] * 2, *tables(tokenizer, tokenizer)) is None


def test_an_answer_is_not_aligned_with_an_empty_one():
    source, target = chat(byte_level), chat(byte_level)
    rows = [rows_of([{"messages": [USER, {"role": "assistant", "content": text}]}], source)[0] for text in ("", "The", " ")]
    both = tables(source, target)
    assert align_row(rows[0], rows[1], *both) is None
    assert len(align_row(rows[0], rows[2], *both).pairs) == 1
