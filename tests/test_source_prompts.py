"""Prompts of the source's own: it sees more than the target does, and its distribution is taught on the same answer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CHAT_TEMPLATE, WORDS, json_lines, table, tiny_llama, word_tokenizer
from datasets import Dataset
from test_trainer import adapter
from test_two_tokenizers import ROWS, pair

from hf_semalign import SemAlignConfig, SemAlignTrainer
from hf_semalign.cli import main
from hf_semalign.experiments.answers import Sampling, answered, write_answers
from hf_semalign.experiments.baselines.laten import LaTenTrainer
from hf_semalign.experiments.plan import plan
from hf_semalign.experiments.recipe import load_recipe
from hf_semalign.experiments.run import run_recipe
from hf_semalign.hub.reading import read_record
from hf_semalign.method.alignment import TokenRow, align_prompts
from hf_semalign.method.losses import token_kl
from hf_semalign.models.hooks import capture
from hf_semalign.splits import taught_positions
from hf_semalign.tokenization import IGNORED, source_record
from hf_semalign.training.source_rows import has_source_columns

TOKENIZER = word_tokenizer(WORDS)
PLAIN = [{"prompt": f"w{i} w{i + 1}", "completion": "".join(f" w{i + 2 * k}" for k in range(2 + i % 3))} for i in range(40)]
HINTED = [{**row, "source_prompt": f"w60 w61 w62 {row['prompt']}"} for row in PLAIN]


def make(folder, rows=HINTED, trainer=SemAlignTrainer, tokenizer=TOKENIZER, evaluation=None, **settings):
    settings = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "relation_weight": 0.5} | settings
    args = SemAlignConfig(
        output_dir=str(folder), logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, **settings
    )
    models = tiny_llama(3, 16, len(tokenizer), seed=1), tiny_llama(5, 24, len(tokenizer), seed=2)
    return trainer(*models, args, rows[:24], rows[24:32] if evaluation is None else evaluation, rows[32:], tokenizer)


def test_the_targets_own_prompt_for_the_source_changes_nothing(tmp_path):
    plain = make(tmp_path / "plain", PLAIN)
    same = make(tmp_path / "same", [{**row, "source_prompt": row["prompt"]} for row in PLAIN])
    hinted = make(tmp_path / "hinted")
    for trainer in (plain, same, hinted):
        trainer.train()
    assert not plain.known.has_source_rows and plain.known.aligned == {}
    assert same.known.aligned == hinted.known.aligned == {"extract": 1.0, "align": 1.0, "eval": 1.0}
    torch.testing.assert_close(adapter(same), adapter(plain), rtol=1e-5, atol=1e-6)
    assert (adapter(hinted) - adapter(plain)).abs().max() > 1e-3
    ours, theirs = plain.evaluate(), same.evaluate()
    for name in ("eval_loss", "eval_kl", "eval_relation"):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5), name
    assert "eval_bits_per_byte" not in theirs


def test_the_source_is_read_after_its_own_prompt_at_the_same_answer_token(tmp_path):
    trainer = make(tmp_path)
    trainer.prepare()
    batch = trainer.data_collator(list(trainer.known.splits["eval"]))
    source, taught, said = trainer.source.model("cpu"), taught_positions(batch), trainer.signals(batch, [1])
    with torch.no_grad(), capture([source.model.layers[trainer.pairing.source_layers[1]]]) as (state,):
        for row, record in enumerate(HINTED[24:32]):
            answer = len(record["completion"].split()) + 1  # and EOS
            ids = TOKENIZER(f"{record['source_prompt']}{record['completion']} </s>", return_tensors="pt")["input_ids"]
            final = source.model(ids)[0][0, -answer - 1 : -1]
            own = (batch["labels"][row] != IGNORED).nonzero()[:, 0] - 1
            assert len(own) == answer and taught[row].nonzero()[:, 0].tolist() == own.tolist()
            start = int(taught[:row].sum())
            torch.testing.assert_close(said.final[start : start + answer], final)
            mapped = trainer.semantic_map(state.output[0, -answer - 1 : -1])
            torch.testing.assert_close(said.supervision[0][row, own], mapped)
        hidden = trainer.target_anatomy.decoder(batch["input_ids"], batch["attention_mask"])[0][taught]
        kl = token_kl(hidden, trainer.objective.target_head, said.final, trainer.objective.source_head).mean()
    trainer.compute_loss(trainer.model, batch)
    assert trainer.loss_terms()["kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(kl.item(), rel=1e-5)


def test_cached_online_and_resumed_runs_end_alike(tmp_path):
    settings = {"frontier": "single", "pairing": "attribution", "scale": "match", "max_steps": 18, "adam_epsilon": 1e-3}
    cached = make(tmp_path / "cached", save_strategy="steps", save_steps=7, **settings)
    online = make(tmp_path / "online", signals="online", **settings)
    resumed = make(tmp_path / "cached", save_strategy="steps", save_steps=7, **settings)
    for trainer, start in ((cached, None), (online, None), (resumed, str(tmp_path / "cached" / "checkpoint-7"))):
        trainer.train(resume_from_checkpoint=start)
    assert cached.pairing.source_layers == online.pairing.source_layers
    torch.testing.assert_close(adapter(cached), adapter(online), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter(resumed), adapter(cached), rtol=0, atol=0)
    for name, value in cached.evaluate().items():
        if name in ("eval_loss", "eval_kl", "eval_relation"):
            assert value == pytest.approx(online.evaluate()[name], rel=1e-4), name


def test_positions_belong_together_from_the_end_of_the_answer():
    """The first answer token may have merged with one of the prompts; what max_length cuts on one side is not aligned."""
    source = TokenRow([9, 9, 9, 9, 4, 5, 6], [IGNORED] * 4 + [4, 5, 6])
    target = TokenRow([9, 7, 5, 6], [IGNORED, 7, 5, 6])
    (found,) = align_prompts([source], [target], split="align")
    assert found.pairs.tolist() == [[1, 1], [2, 2]] and found.comparable.all()  # 5 and 6 are the second and third on both sides
    (cut,) = align_prompts([source], [target], split="align", max_length=6)
    assert cut.pairs.tolist() == [[1, 1]]
    turns = [9, 1, 2, 9, 3], [9, 9, 1, 2, 9, 9, 3]
    one, other = (TokenRow(ids, [IGNORED if token == 9 else token for token in ids]) for ids in turns)
    (several,) = align_prompts([one], [other], split="align")
    assert several.pairs.tolist() == [[0, 1], [1, 2], [2, 5]]
    odd = TokenRow([9, 1, 7, 9, 3], [IGNORED, 1, 7, IGNORED, 3])  # a turn that ends otherwise takes no other with it
    assert align_prompts([odd], [other], split="align")[0].pairs.tolist() == [[2, 5]]
    with pytest.raises(ValueError, match="do not read the same answer tokens"):
        align_prompts([source], [other], split="align")  # one answer, two answers


def test_rows_whose_answer_is_cut_off_are_named(tmp_path, caplog):
    rows = list(HINTED)
    rows[3] = {**rows[3], "source_prompt": " ".join(WORDS[:30])}
    known = make(tmp_path, rows, max_length=12).known
    assert len(known.splits["align"]) == len(known.source_splits["align"]) == 23
    assert "In 1 of 24 rows of the align split, source and target do not read the same answer tokens, or" in caplog.text
    assert "align[3]: 34 tokens of the source, 6 of the target" in caplog.text
    with pytest.raises(
        ValueError, match=r"At most 10% of the rows may be left out\. Raise max_length, or give the source a shorter"
    ):
        make(tmp_path, [{**row, "source_prompt": " ".join(WORDS[:30])} for row in rows], max_length=12)


def test_the_template_of_the_source_gets_its_own_arguments(tmp_path):
    tokenizer = word_tokenizer([*WORDS, "<user>", "<assistant>"], "{% if brief %}w90 {% endif %}" + CHAT_TEMPLATE)
    turns = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}
    rows = [
        {"messages": [{**turns[0], "content": f"w{i}"}, turns[1]], "source_chat_template_kwargs": {"brief": True}}
        for i in range(40)
    ]
    rows[1] = {
        "prompt": [turns[0]],
        "completion": [turns[1]],
        "source_prompt": [{"role": "user", "content": "w7 w8"}],
        "chat_template_kwargs": {"brief": True},
    }
    known = make(tmp_path, rows, tokenizer=tokenizer).known
    read = [[tokenizer.decode(row["input_ids"]) for row in side["align"]] for side in (known.source_splits, known.splits)]
    assert [texts[0] for texts in read] == [f"{brief}<user> w0 </s> <assistant> w2 w3 </s>" for brief in ("w90 ", "")]
    assert [texts[1] for texts in read] == [f"w90 <user> {asked} </s> <assistant> w2 w3 </s>" for asked in ("w7 w8", "w1")]
    assert known.aligned["align"] == 1


def test_columns_of_the_source_are_found_in_lists_and_data_sets():
    assert not has_source_columns([*PLAIN, {**PLAIN[0], "source_prompt": None}])
    assert has_source_columns([*PLAIN, HINTED[0]]) and has_source_columns(Dataset.from_list([HINTED[0], *PLAIN]))
    empty = Dataset.from_list([{**row, "source_prompt": None} for row in PLAIN])
    assert not has_source_columns(Dataset.from_list(PLAIN)) and not has_source_columns(empty)
    made = empty.with_transform(lambda batch: {**batch, "source_prompt": [f"w9 {text}" for text in batch["prompt"]]})
    assert has_source_columns(made)
    assert source_record({**HINTED[0], "source_chat_template_kwargs": None}) == {**PLAIN[0], "prompt": "w60 w61 w62 w0 w1"}


@table(
    "row, message",
    [
        (
            "messages for a text",
            {"source_prompt": [{"role": "user", "content": "w1"}]},
            "expected text beside a prompt of text",
        ),
        ("a number", {"source_prompt": 3}, r"align\[2\] has the source_prompt '3': expected text"),
        (
            "beside messages",
            {"messages": [{"role": "assistant", "content": "w1"}], "prompt": None, "completion": None, "source_prompt": "w2"},
            "Write a row with messages as prompt and completion",
        ),
        (
            "beside token ids",
            {"input_ids": [1, 5], "labels": [IGNORED, 5], "prompt": None, "completion": None, "source_prompt": "w2"},
            r"align\[2\] has source_prompt, but no text for it",
        ),
        (
            "no arguments",
            {"source_chat_template_kwargs": "brief"},
            r"\[2\] has source_chat_template_kwargs 'brief': expected",
        ),
    ],
)
def test_a_prompt_of_another_kind_is_refused(tmp_path, row, message):
    rows = [*HINTED[:2], {**PLAIN[2], **row}, *HINTED[3:]]
    with pytest.raises(ValueError, match=message):
        make(tmp_path, rows)


def test_what_reads_the_same_rows_in_both_models_is_refused(tmp_path):
    with pytest.raises(ValueError, match="LaTen does not support prompts of the source's own"):
        make(tmp_path, trainer=LaTenTrainer, **LaTenTrainer.settings)
    with pytest.raises(ValueError, match="rows of token ids, but the source has prompts of its own"):
        make(tmp_path, [{"input_ids": [1, 5, 6], "labels": [IGNORED, 5, 6], "source_prompt": "w1"}] * 40)
    trainer = make(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="The source has a tokenizer or prompts of its own, so evaluation is of the rows"):
        trainer.evaluate(PLAIN[:4])


@pytest.mark.parametrize("rows", [5, [], Dataset.from_list(HINTED).to_iterable_dataset()], ids=["a number", "none", "a stream"])
def test_other_splits_are_checked_before_their_columns_are_read(tmp_path, rows):
    with pytest.raises(ValueError, match=r"The eval split (is a|has no rows)"):
        make(tmp_path, HINTED, evaluation=rows)


def test_a_template_that_refuses_the_source_alone_is_told_so(tmp_path):
    template = "{% if brief %}{{ raise_exception('no brief') }}{% endif %}" + CHAT_TEMPLATE
    tokenizer = word_tokenizer([*WORDS, "<user>", "<assistant>"], template)
    turns = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
    rows = [{"prompt": [turns[0]], "completion": [turns[1]], "source_chat_template_kwargs": {"brief": True}}] * 40
    with pytest.raises(ValueError, match=r"extract\[0\] for the source cannot be encoded .*no brief"):
        make(tmp_path, rows, tokenizer=tokenizer)


def test_the_plan_counts_what_the_source_reads(tmp_path):
    short, long = (
        [{**row, "source_prompt": f"{' '.join(WORDS[:words])} {row['prompt']}"} for row in PLAIN] for words in (1, 40)
    )
    for settings, phases in (({}, ["signals"]), ({"signals": "online"}, ["training"])):
        plans = [
            plan(trainer.known, trainer.args, "semalign", "source")
            for trainer in (make(tmp_path, rows, **settings) for rows in (short, long))
        ]
        for phase in (*phases, "answers"):
            assert plans[1].cost[phase] > 2 * plans[0].cost[phase], phase
        assert plans[1].memory_bytes["source"] > plans[0].memory_bytes["source"]
        assert plans[1].memory_bytes["training"] == plans[0].memory_bytes["training"]


def test_two_tokenizers_and_a_prompt_of_its_own(tmp_path):
    models = pair(tmp_path)
    rows = [{**row, "source_prompt": f"Be brief. {row['prompt']}"} for row in ROWS]
    args = SemAlignConfig(output_dir=str(tmp_path / "run"), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = SemAlignTrainer(*models, args, rows[:24], rows[24:32], rows[32:])
    two = trainer.known.tokenizers
    own = two.source_tokenizer.decode(trainer.known.source_splits["align"][0]["input_ids"], skip_special_tokens=True)
    assert own == "Be brief. What is 0?\nThe sum of numbers is 0."
    plain = SemAlignTrainer(*models, args, ROWS[:24], ROWS[24:32], ROWS[32:])
    assert trainer.known.aligned == plain.known.aligned  # what is aligned depends on the answers
    trainer.train()
    assert np.isfinite(trainer.evaluate()["eval_kl_per_byte"])


@pytest.fixture
def recipe(good, tmp_path):
    """The good recipe on rows with prompts of the source's own."""
    content = yaml.safe_load((good / "recipe.yaml").read_text())
    for split, path in content["data"]["files"].items():
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        rows = [{**row, "source_prompt": f"w50 {row['prompt']}"} for row in rows]
        (tmp_path / f"{split}.jsonl").write_text(json_lines(rows))
        content["data"]["files"][split] = str(tmp_path / f"{split}.jsonl")
    for role in ("source", "target"):
        content[role] = shutil.copytree(good / role, tmp_path / role).as_posix()
        word_tokenizer([*WORDS[:-1], "a"]).save_pretrained(content[role])  # the plan fills in answers of this word
    content["output_dir"] = str(tmp_path / "run")
    content["training"] |= {"frontier": "joint", "pairing": "last"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("writer", ["dataset", "source", "target"])
def test_a_recipe_with_prompts_of_the_sources_own(recipe, tmp_path, writer, capsys):
    """The source answers its own prompt, the target its own; what is trained on are the target's prompts and these answers."""
    settings = [f"data.answers={writer}", "data.max_new_tokens=40", "data.temperature=1.0", "baselines=[kd]"]
    if writer != "dataset":  # prompts alone
        rows = [json.loads(line) for line in (tmp_path / "align.jsonl").read_text().splitlines()]
        (tmp_path / "align.jsonl").write_text(json_lines([{**row, "completion": None} for row in rows]))
    assert main(["train", "--config", str(recipe), "--dry-run", *settings]) == 0
    assert "answer tokens used" in capsys.readouterr().out
    run_recipe(load_recipe(recipe, settings))
    facts = read_record(tmp_path / "run")["data"]["align"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert facts["source_prompts"] == facts["rows"] > 0 and facts["aligned"] == 1
    assert f"In {facts['rows']} rows of the align split, the source reads a prompt of its own in place of the target's." in card
    if writer == "dataset":
        return
    (file,) = (tmp_path / "run").glob("answers-*.jsonl")
    asked = [json.loads(line)["prompt"].split()[0] for line in file.read_text().splitlines()]
    assert (set(asked) == {"w50"}) == (writer == "source")


def test_an_answer_that_one_of_the_models_cannot_read_is_left_out(recipe, tmp_path):
    """The target writes it, and the source would not read its end."""
    rows = [json.loads(line) for line in (tmp_path / "align.jsonl").read_text().splitlines()]
    rows[3]["source_prompt"] = " ".join(WORDS[:70])
    (tmp_path / "align.jsonl").write_text(json_lines(rows))
    settings = ["data.answers=target", "data.max_new_tokens=40", "data.temperature=1.0", "data.max_length=60"]
    run_recipe(load_recipe(recipe, [*settings, "baselines=[]"]))
    facts = read_record(tmp_path / "run")["data"]["align"]
    (file,) = (tmp_path / "run").glob("answers-*.jsonl")
    entries = {entry["row"]: entry for entry in map(json.loads, file.read_text().splitlines())}
    assert entries[3]["ended"] and entries[3]["prompt_tokens"] + entries[3]["tokens"] < 60
    assert facts["answers"]["cut"] == 1 + sum(not entry["ended"] for entry in entries.values())
    assert facts["aligned"] == 1


def test_answers_in_python(tmp_path):
    model, path = tiny_llama(2, 16, seed=3), tmp_path / "answers.jsonl"
    records = [{**HINTED[0], "messages": None}, {"prompt": "w1", "completion": "w2"}]
    given = [source_record(record) for record in records]
    entries = write_answers(given, TOKENIZER, lambda: model, path, Sampling(40, 1.0), progress=False)
    entries = [{**entry, "ended": True, "completion": " w3", "tokens": 2} for entry in entries]
    rows, _ = answered(entries, None, records)
    assert rows == [{**HINTED[0], "completion": " w3"}, {"prompt": "w1", "completion": " w3"}]

    def length_of(row):
        if "source_prompt" in row:
            raise ValueError("too odd")
        return 7

    rows, counts = answered(entries, None, records, length_of)
    assert (rows, counts["unusable"]) == ([{"prompt": "w1", "completion": " w3"}], 1)
    assert answered(entries[1:], 7, records, length_of)[1]["cut"] == 0
    with pytest.raises(ValueError, match="1 did not end within the limit"):
        answered(entries[1:], 6, records, length_of)
    with pytest.raises(ValueError, match="has answers to other prompts, for example in row 1"):
        changed = [given[0], {**given[1], "source_prompt": "w9"}]
        write_answers(changed, TOKENIZER, lambda: model, path, Sampling(40, 1.0), progress=False)
