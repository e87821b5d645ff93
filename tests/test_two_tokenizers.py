"""Transfer between models whose tokenizers cut text differently, from rows to adapter."""

import json

import pytest
import torch
from conftest import tiny_llama
from test_trainer import adapter
from two_tokenizers import byte_level, sentencepiece_bpe, unigram, wordpiece

from hf_semalign import SemAlignConfig, SemAlignTrainer
from hf_semalign.cli import main
from hf_semalign.experiments.baselines.laten import LaTenTrainer
from hf_semalign.experiments.baselines.sft import SFTTrainer
from hf_semalign.method.losses import token_class_kl
from hf_semalign.models.hooks import capture
from hf_semalign.splits import taught_positions
from hf_semalign.tokenization import IGNORED

ANSWERS = ("The sum of numbers is {}.", "été {} 😀 faces", "def f_{}(x):\n        return x", "thirteen foxes, {}.5")
ROWS = [{"prompt": f"What is {i}?\n", "completion": ANSWERS[i % len(ANSWERS)].format(i * 137 % 2030)} for i in range(40)]


def saved(folder, tokenizer, layers, width, seed):
    model = tiny_llama(layers, width, len(tokenizer), seed=seed, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def pair(tmp_path, source=byte_level, target=sentencepiece_bpe):
    """A source of 5 layers and a target of 3, each with a tokenizer of its own."""
    return (
        saved(tmp_path / "target", target(), 3, 16, seed=1),
        saved(tmp_path / "source", source(), 5, 24, seed=2),
    )


def make(tmp_path, models, name="run", trainer=SemAlignTrainer, rows=ROWS, **settings):
    settings = {"max_steps": 8, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "relation_weight": 0.5} | settings
    args = SemAlignConfig(
        output_dir=str(tmp_path / name), logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, **settings
    )
    return trainer(*models, args, rows[:24], rows[24:32], rows[32:])


def test_one_tokenizer_taken_for_two_gives_the_same_adapter(tmp_path, monkeypatch):
    """Every position is aligned, each class is one token, and the map is the same but for the mean row."""
    models = pair(tmp_path, byte_level, byte_level)
    one = make(tmp_path, models, "one")
    one.train()
    monkeypatch.setattr("hf_semalign.training.preparation.differing", lambda *_: "They are taken for two")
    two = make(tmp_path, models, "two")
    assert two.known.tokenizers is not None
    assert two.known.aligned == {"align": 1.0, "eval": 1.0, "extract": 1.0}
    two._given_map = one.semantic_map  # whose heads are not less their mean row
    two.train()
    torch.testing.assert_close(adapter(two), adapter(one), rtol=1e-5, atol=1e-6)
    ours, theirs = one.evaluate(), two.evaluate()
    for name in ("eval_loss", "eval_kl", "eval_relation"):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5), name
    text = sum(len(row["completion"].encode()) for row in ROWS[24:32])
    tokens = sum(label != IGNORED for row in one.known.splits["eval"] for label in row["labels"][1:])
    assert theirs["eval_kl_per_byte"] * text == pytest.approx(ours["eval_kl"] * tokens, rel=1e-5)


def test_the_share_that_is_said_is_the_share_that_is_used(tmp_path, caplog):
    caplog.set_level("INFO")
    known = make(tmp_path, pair(tmp_path, byte_level, sentencepiece_bpe), "run").known
    rows = known.splits["align"]
    used = sum(rank >= 0 for ranks in rows["source_rank"] for rank in ranks)
    share = used / sum(label != IGNORED for labels in rows["labels"] for label in labels[1:])
    assert known.aligned["align"] == share
    assert f"{100 * share:.1f} % of the target's answer tokens in the align split are used: aligned" in caplog.text


@pytest.mark.parametrize("frontier", ["joint", "single"])
@pytest.mark.parametrize(("source", "target"), [(byte_level, sentencepiece_bpe), (unigram, byte_level)])
def test_cached_and_online_give_the_same_adapter(tmp_path, source, target, frontier):
    models = pair(tmp_path, source, target)
    # Three epochs, for a prefix; with a small epsilon a gradient that is rounding alone would make a step.
    settings = {"frontier": frontier, "pairing": "attribution", "scale": "match", "max_steps": 18, "adam_epsilon": 1e-3}
    cached = make(tmp_path, models, "cached", **settings)
    online = make(tmp_path, models, "online", signals="online", **settings)
    for trainer in (cached, online):
        trainer.train()
    assert 0.3 < cached.known.aligned["align"] < 1
    assert cached.pairing.source_layers == online.pairing.source_layers
    torch.testing.assert_close(adapter(cached), adapter(online), rtol=1e-4, atol=1e-5)
    ours, theirs = cached.evaluate(), online.evaluate()
    for name in ("eval_loss", "eval_kl", "eval_relation", "eval_bits_per_byte", "eval_kl_per_byte"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_what_is_read_for_a_position_is_the_source_state_at_the_same_byte(tmp_path):
    """Rows and positions found by hand: as many bytes of the answer are still to come on both sides."""
    models = pair(tmp_path)
    trainer = make(tmp_path, models)
    trainer.prepare()
    split, own = trainer.known.splits["eval"], trainer.known.source_splits["eval"]
    batch = trainer.data_collator(list(split))
    taught, said = taught_positions(batch), trainer.signals(batch, [1])
    with torch.no_grad(), capture([trainer.source.model("cpu").model.layers[trainer.pairing.source_layers[1]]]) as (state,):
        source_batch = trainer.known.source_collator(list(own))
        final = trainer.source.model("cpu").model(source_batch["input_ids"], source_batch["attention_mask"])[0]
    mapped, count = trainer.semantic_map(state.output), 0
    tables = trainer.known.tokenizers

    def rest(row, table, position):
        """Bytes of the answer behind a position."""
        return sum(len(table.spelled[label] or b"") for label in row["labels"][position + 1 :] if label != IGNORED)

    for row in range(len(split)):
        positions = [k for k, label in enumerate(own[row]["labels"][1:]) if label != IGNORED]
        by_rest = {rest(own[row], tables.source, k): k for k in positions}
        for position in taught[row].nonzero()[:, 0].tolist():
            there = by_rest[rest(split[row], tables.target, position)]
            torch.testing.assert_close(said.supervision[0][row, position], mapped[row, there])
            torch.testing.assert_close(said.final[count], final[row, there])
            count += 1
    assert count == len(said.final) == taught.sum() > 50


def test_the_output_loss_is_the_kl_of_classes_at_aligned_positions(tmp_path):
    trainer = make(tmp_path, pair(tmp_path), relation_weight=0.0)
    trainer.prepare()
    batch, objective = trainer.data_collator(list(trainer.known.splits["eval"])), trainer.objective
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    with torch.no_grad():
        hidden = trainer.target_anatomy.decoder(batch["input_ids"], batch["attention_mask"])[0][taught_positions(batch)]
        said = trainer.signals(batch, [])
        kl = token_class_kl(hidden, objective.target_head, said.final, objective.source_head, objective.classes)
    torch.testing.assert_close(loss, kl.mean())
    assert trainer.evaluate()["eval_kl"] == pytest.approx(kl.mean().item(), rel=1e-5)


def test_a_streamed_source_gives_the_adapter_of_a_resident_one(tmp_path):
    models, settings = pair(tmp_path), {"pairing": "attribution", "adam_epsilon": 1e-3}
    whole, streamed = (make(tmp_path, models, memory, source_memory=memory, **settings) for memory in ("resident", "stream"))
    for trainer in (whole, streamed):
        trainer.train()
    assert whole.pairing.source_layers == streamed.pairing.source_layers
    torch.testing.assert_close(adapter(streamed), adapter(whole), rtol=1e-5, atol=1e-5)


def test_the_best_checkpoint_may_be_chosen_by_bytes(tmp_path):
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4, "save_steps": 4}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_bits_per_byte"}
    trainer = make(tmp_path, pair(tmp_path), **settings)
    assert trainer.args.greater_is_better is False
    trainer.train()
    found = [entry["eval_bits_per_byte"] for entry in trainer.state.log_history if "eval_bits_per_byte" in entry]
    assert trainer.state.best_metric == min(found)


def test_rows_that_are_cut_are_told(tmp_path, caplog):
    trainer = make(tmp_path, pair(tmp_path), max_length=25)
    assert max(map(len, trainer.known.splits["align"]["input_ids"])) == 25
    assert "rows of the align split are truncated at max_length 25 for the target" in caplog.text


def test_accumulation_and_resuming_change_nothing(tmp_path):
    models = pair(tmp_path)
    whole = make(tmp_path, models, "whole", adam_epsilon=1e-3)  # else a gradient that is rounding alone makes a step
    whole.train()
    parts = make(tmp_path, models, "parts", adam_epsilon=1e-3, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    parts.train()
    torch.testing.assert_close(adapter(parts), adapter(whole), rtol=1e-4, atol=1e-5)
    stopped = make(tmp_path, models, "stopped", save_strategy="steps", save_steps=3)
    stopped.train()
    resumed = make(tmp_path, models, "stopped", save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
    torch.testing.assert_close(adapter(resumed), adapter(stopped), rtol=0, atol=0)


def test_the_record_says_what_is_shared(tmp_path):
    trainer = make(tmp_path, pair(tmp_path))
    record = json.loads(json.dumps(trainer.record()))
    assert record["tokenizers"]["aligned"].keys() == {"align", "eval", "extract"}
    assert record["map"]["shared_tokens"] == trainer.known.shared_tokens > 4 * 16
    assert record["data"]["align"]["source_fingerprint"] != record["data"]["align"]["fingerprint"]
    assert record["data"]["align"].keys() == {"rows", "fingerprint", "source_fingerprint"}  # those of earlier versions resume


REFUSED = [
    ("token ids", [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 40, {}, "rows of token ids, but source and target have"),
    (
        "other bytes",
        [{**row, "completion": f"{row['completion']}<s> x"} for row in ROWS],
        {},
        "do not give the same bytes for the answer",
    ),
]


@pytest.mark.parametrize(("rows", "settings", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_rows_that_cannot_be_aligned_are_refused(tmp_path, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, pair(tmp_path), rows=rows, **settings)


def test_models_that_cannot_be_aligned_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the bytes of its tokens cannot be determined"):
        make(tmp_path, pair(tmp_path / "a", source=wordpiece))
    target = saved(tmp_path / "wide", sentencepiece_bpe(), 2, 512, seed=1)
    source = saved(tmp_path / "source", byte_level(), 3, 24, seed=2)
    with pytest.raises(ValueError, match=r"tokens spell the same bytes in both tokenizers, of .* the map needs 2048"):
        make(tmp_path, (target, source))
    with pytest.raises(ValueError, match="LaTen does not support two tokenizers"):
        make(tmp_path, pair(tmp_path / "b"), trainer=LaTenTrainer, **LaTenTrainer.settings)


def test_fine_tuning_trains_on_all_positions(tmp_path):
    """Its loss asks nothing of the source, so that no position is left out."""
    trainer = make(tmp_path, pair(tmp_path), trainer=SFTTrainer, **SFTTrainer.settings)
    batch = trainer.data_collator(list(trainer.known.splits["eval"]))
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch).item()
    assert loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    trainer.train()


@pytest.fixture
def recipe(tmp_path):
    """A recipe of two models, whose file is JSON, and so YAML."""
    target, source = pair(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        json.dumps(
            {
                "source": source,
                "target": target,
                "output_dir": str(tmp_path / "run"),
                "data": {
                    "task": "records",
                    "files": {"train": str(tmp_path / "rows.jsonl")},
                    "extract": 4,
                    "align": 24,
                    "eval": 8,
                },
                "baselines": ["kd", "seeking"],
                "training": {"max_steps": 6, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"},
            }
        )
    )
    return path


def test_a_recipe_runs_with_its_baselines(tmp_path, recipe, capsys):
    assert main(["train", "--config", str(recipe), "--dry-run"]) == 0
    assert "answer tokens used" in capsys.readouterr().out
    assert main(["train", "--config", str(recipe)]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"kl", "bits_per_byte", "kl_per_byte"} <= results["metrics"]["semalign"].keys()
    assert results["metrics"]["kd"]["kl"] < results["metrics"]["target"]["kl"]
    assert "classes of tokens, in nats per aligned position" in (tmp_path / "run" / "README.md").read_text()
    assert main(["inspect", str(tmp_path / "run")]) == 0


def test_attribution_alone_scores_what_a_run_scores(tmp_path, recipe, monkeypatch):
    """The source reads its own tokens, and the run finds the scores."""
    assert main(["attribute", "--config", str(recipe), "training.pairing=attribution"]) == 0
    monkeypatch.setattr("hf_semalign.cache.scores.attribute_layers", lambda *_, **__: pytest.fail("computed again"))
    assert main(["train", "--config", str(recipe), "training.pairing=attribution", "baselines=[]"]) == 0


def test_analyses_of_positions_need_one_tokenizer(recipe, caplog):
    assert main(["analyze", "cka", str(recipe)]) == 2
    assert "the analyses compare states position by position, so both models need one tokenizer" in caplog.text


def test_prompts_that_the_source_is_going_to_answer_are_planned(tmp_path, recipe, capsys):
    align = tmp_path / "prompts.jsonl"
    align.write_text("".join(f"{json.dumps({'prompt': row['prompt']})}\n" for row in ROWS[:24]))
    files = f"data.files={{align: {align}, eval: {tmp_path / 'eval.jsonl'}, extract: {tmp_path / 'rows.jsonl'}}}"
    rows = ["data.extract=4", "data.align=24", "data.eval=8", "data.answers=source", "data.max_new_tokens=7"]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS[32:36]))
    (tmp_path / "eval.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS[24:32]))
    assert main(["train", "--config", str(recipe), "--dry-run", files, *rows]) == 0
    assert "24 rows" in capsys.readouterr().out
