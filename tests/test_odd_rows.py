"""Rows as users' data have them: what the chat template gets, what is supervised, and errors that name the row."""

import json

import pytest
from conftest import CHAT_TEMPLATE, WORDS, json_lines, table, tiny_llama, tiny_model, word_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from hf_semalign import SemAlignConfig, SemAlignTrainer
from hf_semalign.experiments.tasks import load_task
from hf_semalign.models.anatomy import position_limit
from hf_semalign.splits import encode
from hf_semalign.tokenization import form_of, prompt_of

MORE = [*WORDS, "<system>", "<user>", "<assistant>", "<tools>", "<think>", "tide", "brief"]
USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", "w1"), ("assistant", "w2"), ("assistant", "w3")))


def chat(template=CHAT_TEMPLATE):
    return word_tokenizer(MORE, template)


def supervised(rows, tokenizer):
    return [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in rows]


def test_the_template_gets_tools_and_arguments_of_a_row():
    tokenizer = chat("{% if tools %}<tools> {{ tools[0].name }} {% endif %}{% if brief %}brief {% endif %}" + CHAT_TEMPLATE)
    tool = {"name": "tide"}
    rows = [
        {"messages": [USER, GOOD], "tools": [tool]},
        {"messages": [USER, GOOD], "tools": json.dumps([tool]), "chat_template_kwargs": {"brief": True}},
        {"prompt": [USER], "completion": [GOOD], "tools": None, "chat_template_kwargs": None},
    ]
    read = [tokenizer.decode(row["input_ids"]) for row in encode(rows, tokenizer, split="align")]
    turns = "<user> w1 </s> <assistant> w2 </s>"
    assert read == [f"<tools> tide {turns}", f"<tools> tide brief {turns}", turns]


def test_a_turn_of_weight_0_is_read_and_not_supervised():
    tokenizer = chat()
    turns = [USER, {**BAD, "weight": 0}, USER, {**GOOD, "weight": 1}]
    rows = encode([{"messages": turns}], tokenizer, split="align")
    assert supervised(rows, tokenizer) == ["w2 </s>"] and "w3" in tokenizer.decode(rows[0]["input_ids"])


@table(
    "record, message",
    [
        ("an image", {"prompt": "w1", "completion": "w2", "images": ["a.png"]}, "has the column 'images': only text"),
        ("preferences", {"prompt": "w1", "completion": "w2", "rejected": "w3"}, "'rejected': preference training is not"),
        ("a mask", {"messages": [USER, GOOD], "assistant_masks": [0, 1]}, "'assistant_masks': set labels to -100"),
        (
            "packed rows",
            {"input_ids": [3, 4, 5, 6], "labels": [-100, 4, -100, 6], "position_ids": [0, 1, 0, 1]},
            "'position_ids': examples in a packed row would attend to each other",
        ),
        ("two forms", {"prompt": "w1", "completion": "w2", "messages": [USER, GOOD]}, "expected prompt and completion, or"),
        ("half a weight", {"messages": [USER, {**GOOD, "weight": 0.5}]}, "has .*weight.*: expected text"),
        ("no arguments", {"messages": [USER, GOOD], "chat_template_kwargs": "brief"}, "chat_template_kwargs 'brief': expected"),
    ],
)
def test_what_would_be_dropped_is_refused(record, message):
    with pytest.raises(ValueError, match=rf"align\[1\] .*{message}"):
        encode([{"prompt": "w1", "completion": " w2"}, record], chat(), split="align")


def test_positions_that_are_as_usual_are_no_packing():
    rows = [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "position_ids": [0, 1, 2]}]
    assert encode(rows, None, split="align")[0]["input_ids"] == [3, 4, 5]


def test_a_rendered_prompt_has_bos_once():
    tokenizer = chat()
    rows = [{"prompt": "<s> w1", "completion": " w2"}, {"prompt": "w1", "completion": " w2"}]
    first, second = encode(rows, tokenizer, split="align")
    assert first["input_ids"] == second["input_ids"] and first["labels"] == second["labels"]
    assert first["input_ids"].count(tokenizer.bos_token_id) == 1


def test_a_template_without_eos_is_told(caplog):
    encode([{"messages": [USER, GOOD]}], chat(CHAT_TEMPLATE.replace(" </s>", "")), split="align")
    assert "No row of the align split has a supervised '</s>'" in caplog.text
    caplog.clear()
    encode([{"messages": [USER, GOOD]}], chat(), split="align")
    assert not caplog.text


def test_a_template_with_todays_date_is_told(caplog):
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('w9') %}{% endif %}{{ date_string }} "
    tokenizer, row = chat(dated + CHAT_TEMPLATE), {"messages": [USER, GOOD]}
    encode([row], tokenizer, split="align")
    assert "writes today's date, so the rows of the align split will be different data tomorrow" in caplog.text
    caplog.clear()
    (fixed,) = encode([{**row, "chat_template_kwargs": {"date_string": "w8"}}], tokenizer, split="align")
    assert tokenizer.decode(fixed["input_ids"]).startswith("w8 <user>")
    encode([row], chat(dated.replace("strftime_now('w9')", "'w9'") + CHAT_TEMPLATE), split="align")  # a constant
    assert not caplog.text


def test_words_that_run_into_each_other_are_told(caplog):
    words = word_tokenizer([*WORDS, "w1w2"])
    encode([{"prompt": "w1", "completion": "w2"}] * 3 + [{"prompt": "w1", "completion": " w2"}], words, split="align")
    assert "In 3 of 4 rows of the align split, the prompt ends and the completion begins" in caplog.text
    caplog.clear()
    encode([{"prompt": "w1", "completion": " w2"}, {"prompt": "w1 ", "completion": "w2"}], words, split="align")
    assert not caplog.text


def test_an_opened_think_block_has_advice_that_can_be_followed():
    think = "{% if think is not defined or think %}<think> tide {% endif %}"
    opening = f"{{% if add_generation_prompt %}}<assistant> {think}{{% endif %}}"
    tokenizer = chat(CHAT_TEMPLATE.partition("{% if add_generation_prompt")[0] + opening)
    with pytest.raises(ValueError, match=r"align\[0\]: the chat .* with '<think> tide', .*enable_thinking"):
        encode([{"messages": [USER, GOOD]}], tokenizer, split="align")
    thinks = {"role": "assistant", "content": "<think> tide w2"}
    rows = [{"messages": [USER, thinks]}, {"messages": [USER, GOOD], "chat_template_kwargs": {"think": False}}]
    assert supervised(encode(rows, tokenizer, split="align"), tokenizer) == ["w2 </s>"] * 2


@table(
    "record, message",
    [
        (
            "a template's refusal",
            {"messages": [{"role": "system", "content": "w1"}, USER, GOOD]},
            "TemplateError: no system turns",
        ),
        ("half an emoji", {"prompt": "w1 \ud83d", "completion": " w2"}, "(TypeError|UnicodeEncodeError): "),
        ("tools that are no JSON", {"messages": [USER, GOOD], "tools": "[{"}, "JSONDecodeError: "),
    ],
)
def test_errors_of_libraries_name_the_row(record, message):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHAT_TEMPLATE
    with pytest.raises(ValueError, match=rf"align\[1\] cannot be encoded \({message}.*Correct or remove this row"):
        encode([{"prompt": "w1", "completion": " w2"}, record], chat(template), split="align")


def test_a_prompt_column_beside_messages_is_somebodys_own():
    row = {"messages": [USER, GOOD], "prompt": "id 7"}
    assert form_of(row) == "messages" and prompt_of(row) == "w1"
    assert form_of({**row, "prompt": None, "completion": None}) == "messages"
    assert form_of({"prompt": "w1", "completion": "w2", "messages": None}) == "prompt"
    assert form_of({"prompt": "id 7", "input_ids": [1], "labels": [1]}) == "ids"
    tokenizer = chat()
    bare, beside = ([{key: row[key] for key in keys}] for keys in (("messages",), ("messages", "prompt")))
    assert encode(bare, tokenizer, split="a")[0] == encode(beside, tokenizer, split="a")[0]


@pytest.mark.parametrize("role", ["source", "target"])
def test_rows_beyond_learned_positions_are_refused(tmp_path, role):
    learned = tiny_model(
        GPT2LMHeadModel, GPT2Config, n_embd=16, n_layer=2, n_head=2, vocab_size=97, n_positions=20, pad_token_id=0
    )
    other = tiny_llama(2, 16, pad_token_id=0)
    assert (position_limit(learned), position_limit(other)) == (20, None)
    models = (other, learned) if role == "source" else (learned, other)
    args = SemAlignConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1)
    rows = [{"input_ids": list(range(3, 3 + length)), "labels": list(range(3, 3 + length))} for length in (5, 6, 7, 21)]
    with pytest.raises(ValueError, match=f"row of the align split has 21 tokens, but the {role} has learned 20 positions"):
        SemAlignTrainer(*models, args, rows)


# Files of one's own


def test_cells_of_a_csv_file_are_texts(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion,images\nNA,007,\nw1 1e3,null,\n1,2,\n")
    files = dict.fromkeys(("extract", "align", "eval"), str(tmp_path / "rows.csv"))
    rows = load_task("records", extract=3, align=3, eval=3, files=files).align
    assert rows == [
        {"prompt": "NA", "completion": "007", "images": None},
        {"prompt": "w1 1e3", "completion": "null", "images": None},
        {"prompt": "1", "completion": "2", "images": None},
    ]


def test_an_empty_cell_is_no_answer(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\nw1,w2\nw3,\n")
    with pytest.raises(ValueError, match=r"Row 1 of .*rows.csv has .*'completion': None"):
        load_task(
            "records", extract=1, align=1, eval=1, files=dict.fromkeys(("extract", "align", "eval"), str(tmp_path / "rows.csv"))
        )


def test_one_file_is_drawn_from_for_all_splits(tmp_path):
    rows = [{"prompt": f"w{i % 12}", "completion": f" w{i}"} for i in range(15)]  # 12 prompts
    (tmp_path / "rows.jsonl").write_text(json_lines(rows))
    counts, files = {"extract": 2, "align": 6, "eval": 4}, {"train": str(tmp_path / "rows.jsonl")}
    data = load_task("records", **counts, files=files)
    drawn = [*data.extract, *data.align, *data.eval]
    assert [len(data.extract), len(data.align), len(data.eval)] == [2, 6, 4]
    assert sorted(drawn, key=str) == sorted(rows[:12], key=str)  # the first row of each prompt
    assert load_task("records", **counts, files=files) == data != load_task("records", **counts, files=files, seed=7)
    unanswered = [{"messages": [{"role": "user", "content": f"w{i}"}]} for i in range(12)]
    assert len({prompt_of(row) for row in unanswered}) == 12
    (tmp_path / "asked.jsonl").write_text(json_lines(unanswered))
    with pytest.raises(ValueError, match=r"Row 0 of .*asked.jsonl has no assistant message"):
        load_task("records", **counts, files={"train": str(tmp_path / "asked.jsonl")}, prompts_only=True)
    with pytest.raises(ValueError, match="has 12 distinct prompts, but 13 were requested"):
        load_task("records", **{**counts, "eval": 5}, files=files)
