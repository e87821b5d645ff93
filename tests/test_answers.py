"""Answers that models write: what stands in their file, what is trained on, and runs that train on them."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import CHAT_TEMPLATE, WORDS, json_lines, table, tiny_llama, word_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_semalign.cli import main
from hf_semalign.experiments import answers
from hf_semalign.experiments.answers import Sampling, answered, question, write_answers
from hf_semalign.experiments.recipe import load_recipe, load_run
from hf_semalign.experiments.run import run_recipe
from hf_semalign.hub.reading import read_record
from hf_semalign.splits import encode
from hf_semalign.tokenization import prompt_ids
from hf_semalign.trainer import SemAlignTrainer

TOKENIZER = word_tokenizer(WORDS)
CHAT = word_tokenizer([*WORDS, "<user>", "<assistant>"], CHAT_TEMPLATE)
ROWS = [{"prompt": " ".join(f"w{i + j}" for j in range(1 + i % 3))} for i in range(10)]
DRAWN = Sampling(max_new_tokens=40, temperature=1.0)
TURNS = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]


def written(path, rows=ROWS, sampling=DRAWN, tokenizer=TOKENIZER, model=None):
    model = model or tiny_llama(2, 16, vocab=len(tokenizer), seed=3)
    return write_answers(rows, tokenizer, lambda: model, path, sampling, progress=False)


def no_model():
    pytest.fail("the model was asked for, although all answers are there")


def test_greedy_answers_are_those_of_generate(tmp_path):
    model = tiny_llama(2, 16, seed=3)
    model.generation_config.eos_token_id = [2, 7]  # as of a chat model, whose turns end otherwise than its texts
    entries = written(tmp_path / "answers.jsonl", sampling=Sampling(12), model=model)
    assert [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == sorted(
        entries, key=lambda entry: (-entry["prompt_tokens"], entry["row"])
    )
    for row, entry in zip(ROWS, entries, strict=True):
        ids = TOKENIZER(row["prompt"], return_tensors="pt")["input_ids"]
        new = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        ended = new[-1] in (2, 7)
        assert (entry["ended"], entry["tokens"], entry["prompt_tokens"]) == (ended, len(new), ids.shape[1])
        assert entry["completion"] == "".join(f" {word}" for word in TOKENIZER.decode(new[: len(new) - ended]).split())
    assert {entry["ended"] for entry in entries} == {True, False}, "or one of both was not tried"


def test_prompts_of_every_form_are_answered_in_their_form(tmp_path):
    rows = [{"messages": TURNS}, {"messages": TURNS[:1]}, {"prompt": TURNS[:1]}, {"prompt": "w1 w2", "completion": " w3"}]
    entries = written(tmp_path / "answers.jsonl", rows, Sampling(5), CHAT)
    assert [entry["prompt"] for entry in entries] == [TURNS[:1]] * 3 + ["w1 w2"]
    turns = [entry["completion"] for entry in entries[:3]]
    assert all(turn == turns[0] and turn[0]["role"] == "assistant" for turn in turns)
    assert isinstance(entries[3]["completion"], str)
    assert entries[0]["prompt_tokens"] == len(prompt_ids({"prompt": TURNS[:1]}, CHAT)) == 5  # <user> w1 w2 </s> <assistant>
    with pytest.raises(
        ValueError, match=r"Row 0 has the columns \['input_ids'\]: a model can only answer a row with prompt or messages"
    ):
        written(tmp_path / "more.jsonl", [{"input_ids": [1, 2]}])


def test_what_is_trained_on_is_what_was_written_and_its_end(tmp_path):
    entries = written(tmp_path / "answers.jsonl")
    rows, counts = answered(entries, max_length=None)
    used = [entry for entry in entries if entry["ended"] and entry["completion"].strip()]
    assert counts == {
        "rows": 10,
        "cut": sum(not entry["ended"] for entry in entries),
        "empty": 0,
        "unusable": 0,
        "retokenised": 0,
    }
    assert 0 < len(rows) == len(used) < 10
    for row, entry in zip(encode(rows, TOKENIZER, split="align"), used, strict=True):
        supervised = [label for label in row["labels"] if label != -100]
        assert len(supervised) == entry["tokens"] and supervised[-1] == TOKENIZER.eos_token_id
        assert TOKENIZER.decode(supervised[:-1]) == entry["completion"].strip()


def entry(completion="w3", ended=True, tokens=4, same=True):
    return {"row": 0, "prompt": "w1", "completion": completion, "ended": ended, "tokens": tokens, "prompt_tokens": 2} | {
        "same_tokens": same
    }


def test_answers_that_teach_no_end_are_counted_and_left_out(caplog):
    turn = [{"role": "assistant", "content": " "}]
    rows, counts = answered(
        [entry(), entry(ended=False), entry(tokens=9), entry(" "), entry(turn), entry(same=False), entry() | {"fault": "no"}],
        max_length=10,
    )
    assert rows == [{"prompt": "w1", "completion": "w3"}] * 2
    assert counts == {"rows": 7, "cut": 2, "empty": 2, "unusable": 1, "retokenised": 1}
    assert (
        "Left out 5 of 7 written answers: 2 did not end within the limit, 2 are empty, and the chat template refuses 1"
        in caplog.text
    )
    with pytest.raises(ValueError, match=r"None of 1 answers can be used: 1 did not end .* Raise data.max_new_tokens"):
        answered([entry(ended=False)], max_length=10)


def test_text_that_is_read_as_other_tokens_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(TOKENIZER.__class__, "decode", lambda self, ids, **_: " ".join("w1" for _ in ids))
    entries = written(tmp_path / "answers.jsonl")
    assert not any(entry["same_tokens"] for entry in entries)


def test_an_interrupted_call_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "rows_that_fit", lambda model, length: 4)
    before, whole = torch.get_rng_state(), tmp_path / "whole.jsonl"
    expected = written(whole)
    assert torch.equal(torch.get_rng_state(), before)
    text = whole.read_text()
    lines = text.splitlines(keepends=True)
    for left in ("".join(lines[:4]), "".join(lines[:6]), text[: len(text) - 9]):
        path, calls = tmp_path / "broken.jsonl", []
        path.write_text(left)
        model = tiny_llama(2, 16, seed=3)
        model.register_forward_pre_hook(
            lambda module, args, given, calls=calls: calls.append(len(given["input_ids"])), with_kwargs=True
        )
        assert written(path, model=model) == expected
        assert path.read_text() == text
        assert calls[0] == 4 if left.count("\n") < 8 else calls[0] == 2  # what was whole is not written again
    assert write_answers(ROWS, TOKENIZER, no_model, whole, DRAWN) == expected
    assert written(tmp_path / "other.jsonl", sampling=Sampling(40, 1.0, seed=7)) != expected


@table(
    "line, message",
    [
        ("no JSON", "garbage", r"Line 2 of .*kept.jsonl is damaged \(Expecting value.*delete the file"),
        ("no text", b"\xff", "Line 2 of .* is damaged"),
        ("a list", "[1]", r"is damaged \(it is \[1\]: expected names and values"),
        ("of another file", {"asked": "a", "answer": "b"}, r"is damaged \(it lacks \['row', 'prompt'"),
        ("tokens of words", {"tokens": "many"}, r"is damaged \(tokens of it is 'many': expected a whole number"),
        ("other prompts", {"prompt": "w50"}, "has answers to other prompts, for example in row 1: choose another file"),
    ],
)
def test_a_file_that_holds_something_else(tmp_path, line, message):
    path = tmp_path / "kept.jsonl"
    first, second = written(path, ROWS[:2], Sampling(3))
    if isinstance(line, dict):
        line = json.dumps(line if "asked" in line else {**second, **line})
    path.write_bytes(json.dumps(first).encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError, match=message):
        write_answers(ROWS[:2], TOKENIZER, no_model, str(path), Sampling(3))


def test_an_answer_that_the_template_refuses_ends_nothing(tmp_path):
    refusing = CHAT_TEMPLATE + "{% if messages|length > 1 %}{{ raise_exception('too long') }}{% endif %}"
    tokenizer = word_tokenizer([*WORDS, "<user>", "<assistant>"], refusing)
    (entry,) = written(tmp_path / "answers.jsonl", [{"prompt": TURNS[:1]}], Sampling(5), tokenizer)
    assert entry["fault"] == "TemplateError: too long" and not entry["same_tokens"]


# Runs


@pytest.fixture
def recipe(good, tmp_path):
    """The good recipe with prompts alone in its align split, in a folder of its own."""
    content = yaml.safe_load((good / "recipe.yaml").read_text())
    rows = [json.loads(line) for line in (good / "align.jsonl").read_text().splitlines()]
    (tmp_path / "align.jsonl").write_text(json_lines([{"prompt": row["prompt"]} for row in rows]))
    content["data"]["files"]["align"] = str(tmp_path / "align.jsonl")
    content["data"] |= {"answers": "source", "max_new_tokens": 40, "temperature": 1.0}
    content["output_dir"] = str(tmp_path / "run")
    content["training"] |= {"frontier": "joint", "pairing": "last", "save_steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def test_a_target_learns_from_what_the_source_writes(recipe, tmp_path, monkeypatch):
    results = run_recipe(load_recipe(recipe))
    (file,) = (tmp_path / "run").glob("answers-*.jsonl")
    facts = read_record(tmp_path / "run")["data"]["align"]
    assert facts["answers"]["by"] == "source" and facts["answers"]["rows"] == 24
    assert facts["rows"] == 24 - facts["answers"]["cut"] - facts["answers"]["empty"] > 0
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert facts["rows"] == sum(entry["ended"] and bool(entry["completion"].strip()) for entry in entries)
    assert results["seconds"]["answers"] > 0 and results["cost"]["answers"] > 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "written by the source (drawn at temperature 1, at most 40 tokens). Of 24 answers" in card
    assert load_run(tmp_path / "run").data.align == 24  # as the splits were drawn

    # Another run with the same signals finds them, and one on a machine without the source, too.
    monkeypatch.setattr(answers, "continue_prompts", lambda *_, **__: pytest.fail("answers were written again"))
    (kept,) = (path for path in (tmp_path / "run" / "_signals").iterdir() if (path / "source.json").is_file())
    for source in ([], [f"source={kept}"]):
        again = ["training.seed=5", f"output_dir={tmp_path / 'again'}", f"training.signals_dir={tmp_path / 'run' / '_signals'}"]
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        run_recipe(load_recipe(recipe, [*again, *source]))
        assert read_record(tmp_path / "again")["data"]["align"] == facts


def test_what_would_be_refused_is_refused_before_anything_is_written(refused, recipe, monkeypatch, good):
    monkeypatch.setattr(answers, "continue_prompts", lambda *_, **__: pytest.fail("answers were written"))
    refused("Overlapping splits", f"data.files.eval={good / 'align.jsonl'}", recipe=recipe)


def test_signals_holds_the_answers_as_well(recipe, tmp_path, monkeypatch):
    assert main(["signals", "--config", str(recipe)]) == 0
    monkeypatch.setattr(answers, "continue_prompts", lambda *_, **__: pytest.fail("answers were written again"))
    run_recipe(load_recipe(recipe))


def test_in_rounds_the_target_answers_as_it_has_become(recipe, tmp_path, monkeypatch):
    begun = []
    train = SemAlignTrainer.train

    def watched(trainer, *args, **settings):
        begun.append({name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name})
        return train(trainer, *args, **settings)

    monkeypatch.setattr("hf_semalign.trainer.SemAlignTrainer.train", watched)
    rounds = ["data.answers=target", "data.rounds=2", "training.max_steps=5", "training.logging_steps=1"]
    results = run_recipe(load_recipe(recipe, rounds))
    run = tmp_path / "run"
    first = load_file(run / "round-1" / "adapter_model.safetensors")
    assert len(begun) == 2 and len(first) == len(begun[0]) == len(begun[1])
    for name, start in begun[1].items():
        assert torch.equal(start, first[name.replace(".default", "")])
        assert "lora_B" not in name or (not begun[0][name].any() and start.any())
    assert results["steps"] == 5 and [entry["step"] for entry in results["history"]] == [1, 2, 3, 4, 5]
    assert read_record(run / "round-1")["stages"] == [0, 2] and read_record(run)["stages"] == [0, 3]
    assert "written by the target as it was at the beginning of each round" in (run / "README.md").read_text()

    # Two files, and the second was drawn from the target with the first round's adapter.
    files = {len(path.read_text()): path for path in run.glob("answers-*.jsonl")}
    assert len(files) == 2
    target = load_recipe(recipe).target
    rows = [{"prompt": json.loads(line)["prompt"]} for line in (tmp_path / "align.jsonl").read_text().splitlines()]
    drawn = []
    for adapter in (None, run / "round-1"):
        model = AutoModelForCausalLM.from_pretrained(target)
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        entries = written(tmp_path / f"{adapter is None}.jsonl", rows, DRAWN, model=model.eval())
        drawn.append((tmp_path / f"{adapter is None}.jsonl").read_text())
        assert len(entries) == 24
    assert sorted(drawn) == sorted(path.read_text() for path in files.values()) and drawn[0] != drawn[1]

    # A run that broke off in its second round goes on there, and ends in the same adapter.
    final = (run / "adapter_model.safetensors").read_bytes()
    for path in (*run.glob("checkpoint-[23]"), run / "adapter_model.safetensors", run / "results.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_recipe(load_recipe(recipe, rounds))
    assert (run / "adapter_model.safetensors").read_bytes() == final


@table(
    "message, changes",
    [
        ("no writer", "Unknown key 'oracle' in the answers of", ["data.answers=oracle"]),
        ("no rounds", "data.rounds .* is 0: expected a finite number of at least 1", ["data.rounds=0"]),
        ("colder than greedy", "data.temperature .* is -1: expected a finite number of at least 0", ["data.temperature=-1"]),
        ("rounds of the source", "data.rounds .* is 2: several rounds need data.answers=target", ["data.rounds=2"]),
        (
            "rounds of Seeking",
            "only semalign, kd, sft train in several rounds",
            ["data.rounds=2", "data.answers=target", "method=seeking"],
        ),
        ("too few steps", "data.rounds is 9 for 3 steps", ["data.rounds=9", "data.answers=target"]),
        ("never held whole", "set source_memory to 'resident'", ["training.source_memory=stream"]),
        ("answers wanted", r"Row 0 of .* has columns \['prompt'\]: expected prompt and completion", ["data.answers=dataset"]),
    ],
)
def test_what_cannot_be_written_is_refused(refused, recipe, no_weights, message, changes):
    refused(message, *changes, recipe=recipe)


def test_signals_cannot_judge_what_is_not_written_yet(refused, recipe, no_weights):
    refused(
        "data.answers is target, .* the source cannot read them before", "data.answers=target", command="signals", recipe=recipe
    )


def test_a_dry_run_counts_answers_that_are_not_there_yet(recipe, no_weights, capsys, caplog, good):
    caplog.set_level("INFO")
    assert main(["train", "--dry-run", "--config", str(recipe)]) == 0
    assert "each is assumed to have 40 tokens" in caplog.text and "answers" in capsys.readouterr().out
    assert main(["train", "--dry-run", "--config", str(recipe), f"data.files.align={good / 'align.jsonl'}"]) == 0
    assert "assumed to be as long as the data set's" in caplog.text


def test_a_question_is_what_comes_before_the_last_answer():
    assert question({"messages": [*TURNS, TURNS[0]]}) == {"prompt": [*TURNS, TURNS[0]]}
    assert question({"messages": [*TURNS, *TURNS], "tools": None}) == {"prompt": [*TURNS, TURNS[0]]}
    assert question({"prompt": "w1", "chat_template_kwargs": {"a": 1}}) == {"prompt": "w1", "chat_template_kwargs": {"a": 1}}
