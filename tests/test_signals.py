"""Cached source signals: equal to running the source, computed once, and never used when stale or damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_rows, tiny_llama
from datasets import Dataset
from test_trainer import ROWS, adapter, make_trainer

from hf_semalign import signals as signals_module
from hf_semalign.pairing import pair_layers
from hf_semalign.semantics import SemanticMap
from hf_semalign.signals import MANIFEST, OnlineSignals, SourceSignals
from hf_semalign.splits import Collator, encode, valid_positions

COLLATE = Collator(pad_token_id=0)


@pytest.fixture
def online():
    source, target = tiny_llama(4, 24, seed=1), tiny_llama(3, 16, seed=2)
    return OnlineSignals(source, pair_layers(4, 3, "last"), SemanticMap.from_models(source, target), (1.0, 0.5, 2.0))


@pytest.fixture
def data():
    return encode(random_rows([(3 + i % 3, 1 + i % 5) for i in range(11)]), None, split="align")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(signals_module, "SHARD_EXAMPLES", 4)


def prepare(online, data, root, **settings):
    return SourceSignals.prepare(online, data, COLLATE, root, progress=False, **{"batch_size": 3, **settings})


@pytest.fixture
def passes(online):
    """Forward passes of the source, counted."""
    count = []
    online.source.model.register_forward_hook(lambda *_: count.append(1))
    return count


def left_padded(rows):
    """The same rows padded on the left."""
    batch = COLLATE(rows)
    length = batch["input_ids"].shape[1]
    for row, record in enumerate(rows):
        shift = length - len(record["input_ids"])
        for key in ("input_ids", "attention_mask", "labels"):
            batch[key][row] = batch[key][row].roll(shift)
    return batch


@pytest.mark.parametrize("pad", [COLLATE, left_padded], ids=["right", "left"])
def test_cached_signals_equal_the_sources_in_any_batch_and_order(online, data, tmp_path, pad):
    cached = prepare(online, data, tmp_path)
    rows = [data[i] for i in (9, 0, 4, 10, 4)]
    batch = pad(rows)
    valid = valid_positions(batch["labels"])
    for layers in (range(3), [1], []):
        ours, theirs = cached(batch, layers), online(batch, layers)
        assert len(ours.supervision) == len(layers)
        torch.testing.assert_close(ours.final, theirs.final, rtol=1e-5, atol=1e-5)
        for left, right in zip(ours.supervision, theirs.supervision, strict=True):
            torch.testing.assert_close(left[valid], right[valid], rtol=1e-5, atol=1e-5)


def test_the_source_runs_once_for_each_distinct_example(online, data, tmp_path, passes):
    twice = Dataset.from_list([*data, *data])
    prepare(online, twice, tmp_path)
    assert len(passes) == 2 + 2 + 1  # shards of 4, 4 and 3 rows in batches of 3
    prepare(online, twice, tmp_path)
    prepare(online, data.select(range(10, -1, -1)).select(range(10, -1, -1)), tmp_path)
    assert len(passes) == 5


def test_shards_hold_valid_positions_only_in_the_dtype_asked_for(online, data, tmp_path):
    cached = prepare(online, data, tmp_path, dtype=torch.bfloat16)
    answers = sum(int(valid_positions(torch.tensor([row["labels"]])).sum()) for row in data)
    assert sum(len(shard["final"]) for shard in cached._shards) == answers
    for shard in cached._shards:
        assert shard["states"].shape == (3, len(shard["final"]), 16)
        assert shard["states"].dtype == shard["final"].dtype == torch.bfloat16


CHANGES = {
    "source": lambda online: online.source.model.layers[0].mlp.up_proj.weight.data.add_(1e-3),
    "pairs": lambda online: setattr(online, "pairing", pair_layers(4, 3, [0, 1, 2])),
    "scales": lambda online: setattr(online, "scales", (1.0, 1.0, 1.0)),
    "map": lambda online: setattr(online.semantic_map, "fingerprint", "other"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_stale_signals_are_not_found(online, data, tmp_path, passes, change):
    first = prepare(online, data, tmp_path)
    CHANGES[change](online)
    second = prepare(online, data, tmp_path)
    assert first.folder != second.folder
    assert len(passes) == 10


def test_other_data_get_signals_of_their_own(online, data, tmp_path):
    assert prepare(online, data, tmp_path).folder != prepare(online, data.select(range(10)), tmp_path).folder
    assert prepare(online, data, tmp_path).folder != prepare(online, data, tmp_path, dtype=torch.float16).folder


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[-5] ^= 0xFF
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["delete", "truncate", "flip"])
@pytest.mark.parametrize("shard", [0, 2])
def test_a_damaged_shard_is_named_and_computed_again_alone(online, data, tmp_path, passes, caplog, how, shard):
    folder = prepare(online, data, tmp_path).folder
    path = folder / f"shard-{shard:05d}.safetensors"
    intact = path.read_bytes()
    damage(path, how)
    del passes[:]
    prepare(online, data, tmp_path)
    assert path.read_bytes() == intact
    assert len(passes) == (2 if shard == 0 else 1)
    assert f"{path.name} is missing or damaged" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shards": 3}'])
def test_a_damaged_manifest_is_named_and_everything_computed_again(online, data, tmp_path, passes, caplog, content):
    folder = prepare(online, data, tmp_path).folder
    (folder / MANIFEST).write_text(content)
    prepare(online, data, tmp_path)
    assert len(passes) == 10
    assert "is damaged" in caplog.text


def test_an_interrupted_pass_goes_on_after_its_last_whole_shard(online, data, tmp_path, passes, monkeypatch):
    class Interrupted(Exception):
        pass

    def stop(*_):
        if len(passes) == 4:
            raise Interrupted

    handle = online.source.model.register_forward_hook(stop)
    with pytest.raises(Interrupted):
        prepare(online, data, tmp_path)
    handle.remove()
    (folder,) = tmp_path.iterdir()
    assert list(json.loads((folder / MANIFEST).read_text())["shards"]) == ["shard-00000.safetensors"]
    del passes[:]
    prepare(online, data, tmp_path)
    assert len(passes) == 3


def test_shards_are_cut_by_bytes(online, data, tmp_path, monkeypatch):
    monkeypatch.setattr(signals_module, "SHARD_BYTES", 4 * (3 * 16 + 24) * 6)  # six positions
    cached = prepare(online, data, tmp_path)
    assert all(len(shard["final"]) <= 6 for shard in cached._shards)
    batch = COLLATE([data[i] for i in range(11)])
    torch.testing.assert_close(cached(batch, []).final, online(batch, []).final, rtol=1e-5, atol=1e-5)


def test_a_full_disk_is_refused_before_the_pass(online, data, tmp_path, passes, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match=r"The source signals need 0.0 GB in .* set signals_dir to a larger disk"):
        prepare(online, data, tmp_path)
    assert not passes


def test_an_example_without_signals_is_an_error(online, data, tmp_path):
    cached = prepare(online, data.select(range(5)), tmp_path)
    with pytest.raises(ValueError, match="No source signals for example"):
        cached(COLLATE([data[7]]), [0])


def losses(trainer):
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry for key in ("loss", "relation", "kl")]


@pytest.mark.parametrize("frontier", ["single", "cumulative", "joint"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_on_cached_signals_equals_training_online(tmp_path, frontier, accumulation):
    """At every stage and step: with shuffling, several epochs, an odd last batch and accumulation."""
    settings = {"train": ROWS[:15], "max_steps": 12, "frontier": frontier, "scale": "match"}
    settings |= {"gradient_accumulation_steps": accumulation}
    cached = make_trainer(tmp_path / "cached", signals="cached", **settings)
    online = make_trainer(tmp_path / "online", signals="online", **settings)
    before = cached.evaluate(), online.evaluate()
    for key in ("eval_kl", "eval_relation", "eval_loss"):
        assert before[0][key] == pytest.approx(before[1][key], rel=1e-5)
    cached.train()
    online.train()
    assert losses(cached) == pytest.approx(losses(online), rel=1e-5)
    torch.testing.assert_close(adapter(cached), adapter(online), rtol=1e-5, atol=1e-5)


def test_resuming_on_cached_signals_equals_training_online(tmp_path):
    settings = {"train": ROWS[:15], "save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, signals="cached", **settings).train()
    online = make_trainer(tmp_path / "online", signals="online", **settings)
    online.train()
    resumed = make_trainer(tmp_path, signals="cached", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    torch.testing.assert_close(adapter(resumed), adapter(online), rtol=1e-5, atol=1e-5)


def test_training_on_cached_signals_never_runs_the_source(tmp_path):
    trainer = make_trainer(tmp_path, signals="cached")

    def refuse(*_):
        raise AssertionError("the source ran")

    trainer.source.model.register_forward_hook(refuse)
    trainer.train()
    trainer.evaluate()
    assert trainer.state.global_step == 6


def test_two_runs_share_a_cache(tmp_path):
    first = make_trainer(tmp_path / "a", signals_dir=str(tmp_path / "shared"))
    second = make_trainer(tmp_path / "b", signals_dir=str(tmp_path / "shared"), relation_weight=0.0, frontier="joint")
    assert first.signals.folder == second.signals.folder
