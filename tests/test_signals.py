"""Cached source signals: equal to running the source, computed once, and never used when stale or damaged."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PAPER, random_rows, tiny_llama
from datasets import Dataset
from filelock import FileLock
from test_trainer import EVEN, ROWS, adapter, make_trainer

from hf_semalign import SemAlignConfig, SemAlignTrainer
from hf_semalign.cache import examples as examples_module
from hf_semalign.cache import source_pass
from hf_semalign.cache.signals import CachedSignals, OnlineSignals, Reading, SourceSignals, prepare_signals
from hf_semalign.cache.source import Source
from hf_semalign.cache.source_pass import run_part, run_source
from hf_semalign.files import writing_lock
from hf_semalign.method.pairing import pair_layers
from hf_semalign.method.semantic_map import SemanticMap
from hf_semalign.splits import Collator, encode, valid_positions

COLLATE = Collator(pad_token_id=0)
SCALES = (1.0, 0.5, 2.0)


@pytest.fixture
def online():
    source, target = tiny_llama(5, 24, seed=1), tiny_llama(3, 16, seed=2)
    return OnlineSignals(source, pair_layers(5, 3, [1, 2, 4]), SemanticMap.from_models(source, target), SCALES)


@pytest.fixture
def data():
    return encode(random_rows([(3 + i % 3, 1 + i % 5) for i in range(11)]), None, split="align")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(examples_module, "SHARD_TOKENS", 24)


def make_signals(online, data, root, *, source=None, **settings):
    source = source or Source(online.source)
    settings = {"scales": online.scales, "batch_size": 3, "progress": False, **settings}
    return SourceSignals(source, online.pairing, online.semantic_map, data, root, COLLATE, **settings)


def prepare(online, data, root, layers=range(3), **settings):
    signals = make_signals(online, data, root, **settings)
    signals.prepare(layers)
    return signals


@pytest.fixture
def passes(online):
    """Forward passes of the source, counted at its last layer; the check of its head, of one token, is none."""
    count = []
    online.source.model.layers[-1].register_forward_hook(lambda module, args, output: count.extend([1] * (output.shape[1] > 1)))
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


def assert_equal_signals(cached, online, batch, layers=range(3)):
    valid = valid_positions(batch["labels"])
    ours, theirs = cached(batch, layers), online(batch, layers)
    assert len(ours.supervision) == len(layers)
    torch.testing.assert_close(ours.final, theirs.final, rtol=1e-5, atol=1e-5)
    for left, right in zip(ours.supervision, theirs.supervision, strict=True):
        torch.testing.assert_close(left[valid], right[valid], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad", [COLLATE, left_padded], ids=["right", "left"])
@pytest.mark.parametrize("stream", [False, True], ids=["resident", "stream"])
def test_cached_signals_equal_the_sources_in_any_batch_and_order(online, data, tmp_path, pad, stream):
    cached = prepare(online, data, tmp_path, stream=stream)
    batch = pad([data[i] for i in (9, 0, 4, 10, 4)])
    for layers in (range(3), [1], []):
        assert_equal_signals(cached, online, batch, layers)


@pytest.mark.parametrize("stream", [False, True], ids=["resident", "stream"])
@pytest.mark.parametrize("made", ["in memory", "folder"])
def test_a_source_in_memory_or_in_a_folder(online, data, tmp_path, stream, made):
    source = None
    if made == "folder":
        online.source.save_pretrained(tmp_path / "source", max_shard_size="20KB")
        source = Source(str(tmp_path / "source"))
    cached = prepare(online, data, tmp_path, source=source, stream=stream)
    assert_equal_signals(cached, online, COLLATE(list(data)))
    assert {path.name for path in cached.folder.iterdir() if path.is_dir()} == {
        "final", *(f"layer-{k:03d}-{online.semantic_map.fingerprint[:16]}" for k in (1, 2, 4)),
    }  # fmt: skip
    if made == "folder":
        assert (source._model is None) == stream


def test_a_folders_identity_is_its_weights_and_its_configuration(tmp_path):
    model = tiny_llama(2, 24)
    model.save_pretrained(tmp_path / "a")
    model.config.rope_parameters["rope_theta"] = 77.0
    model.save_pretrained(tmp_path / "b")
    tiny_llama(2, 24, seed=5).save_pretrained(tmp_path / "c")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    identities = [Source(str(tmp_path / name)).identity for name in ("a", "b", "c", "copy")]
    assert len(set(identities)) == 3
    assert identities[0] == identities[3]
    (tmp_path / "copy" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no \*.safetensors files"):
        _ = Source(str(tmp_path / "copy")).identity


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_streaming_half_precision_and_tied_heads(data, tmp_path, tied, dtype):
    """Also where weights are read into another dtype than they have on the disk: float16 under bf16."""
    model, target = tiny_llama(4, 24, seed=1, tie_word_embeddings=tied).to(dtype), tiny_llama(3, 16, seed=2)
    model.save_pretrained(tmp_path / "source")
    source = Source(str(tmp_path / "source"), precision="bf16")
    assert source.dtype == torch.bfloat16
    whole = model.to(torch.bfloat16)
    torch.testing.assert_close(source.head(tmp_path).weight, whole.lm_head.weight.detach(), rtol=0, atol=0)
    online = OnlineSignals(whole, pair_layers(4, 3, "last"), SemanticMap.from_models(whole, target))
    cached = prepare(online, data, tmp_path, source=source, stream=True)
    assert source._model is None
    ours, theirs = cached(batch := COLLATE(list(data)), range(3)), online(batch, range(3))
    valid = valid_positions(batch["labels"])
    pairs = [
        (ours.final, theirs.final),
        *((a[valid], b[valid]) for a, b in zip(ours.supervision, theirs.supervision, strict=True)),
    ]
    for left, right in pairs:
        assert (left - right).float().norm() < 0.01 * right.float().norm()


def test_the_source_runs_once_for_each_distinct_example(online, data, tmp_path, passes):
    twice = Dataset.from_list([*data, *data])
    signals = prepare(online, twice, tmp_path)
    once = len(passes)
    assert once == sum(-(-(shard.stop - shard.start) // 3) for shard in signals.examples.shards)
    prepare(online, twice, tmp_path)
    prepare(online, data.select(range(10, -1, -1)), tmp_path)
    assert len(passes) == once


def test_other_pairs_scales_and_weights_share_what_they_have_in_common(online, data, tmp_path, passes):
    first = prepare(online, data, tmp_path)
    once = len(passes)
    assert prepare(online, data, tmp_path, layers=[]).folder == first.folder
    online.scales = (3.0, 4.0, 5.0)
    assert_equal_signals(prepare(online, data, tmp_path), online, COLLATE(list(data)))
    assert len(passes) == once + 1  # assert_equal_signals runs it online
    online.pairing = pair_layers(5, 3, [0, 2, 2])
    other = prepare(online, data, tmp_path)
    assert len(passes) == once + 1  # only the layers up to 0 ran
    assert_equal_signals(other, online, COLLATE(list(data)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_hold_valid_positions_only_in_the_dtype_of_the_source(online, data, tmp_path, dtype):
    online.source.to(dtype)
    signals = prepare(online, data, tmp_path)
    answers = sum(int(valid_positions(torch.tensor([row["labels"]])).sum()) for row in data)
    for column in (signals._final, signals._mapped(1)):
        states = signals._states.read(column, range(11))
        assert states.shape == (answers, column.width)
        assert states.dtype == dtype


CHANGES = {
    "config": lambda online: online.source.config.rope_parameters.update(rope_theta=77.0),
    "source": lambda online: online.source.model.layers[0].mlp.up_proj.weight.data.add_(1e-3),
    "map": lambda online: setattr(online.semantic_map, "fingerprint", "other"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_stale_signals_are_not_found(online, data, tmp_path, passes, change):
    prepare(online, data, tmp_path)
    once = len(passes)
    CHANGES[change](online)
    signals = make_signals(online, data, tmp_path)
    assert signals._states.missing(signals._mapped(4))
    signals.prepare(range(3))
    assert len(passes) == 2 * once


def test_other_data_and_precisions_get_folders_of_their_own(online, data, tmp_path):
    folders = [
        make_signals(online, data, tmp_path).folder,
        make_signals(online, data.select(range(10)), tmp_path).folder,
        make_signals(online, data, tmp_path, precision="bf16").folder,
        make_signals(online, data, tmp_path, tokenizer="another").folder,
    ]
    assert len(set(folders)) == 4


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        content[-5 if how == "flip" else 20] ^= 0xFF
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["delete", "truncate", "empty", "flip", "flip header"])
@pytest.mark.parametrize("stream", [False, True], ids=["resident", "stream"])
def test_a_damaged_shard_is_named_and_computed_again_alone(online, data, tmp_path, passes, caplog, how, stream):
    signals = prepare(online, data, tmp_path, stream=stream)
    path = signals.folder / "final" / "00001.safetensors"
    intact = path.read_bytes()
    damage(path, how)
    del passes[:]
    prepare(online, data, tmp_path, stream=stream)
    assert path.read_bytes() == intact
    assert len(passes) == (1 if not stream else len(passes))
    if how != "delete":
        assert f"{Path(*path.parts[-3:])} is damaged" in caplog.text


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stream", [False, True], ids=["resident", "stream"])
@pytest.mark.parametrize("moment", range(1, 16, 2))
def test_an_interrupted_pass_goes_on_after_its_last_whole_shard(online, data, tmp_path, stream, moment):
    """Interrupted at some layer of some batch; what was written before is not computed again."""
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == moment:
            raise Interrupted

    handles = [layer.register_forward_hook(stop) for layer in online.source.model.layers]
    with pytest.raises(Interrupted):
        prepare(online, data, tmp_path, stream=stream)
    for handle in handles:
        handle.remove()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors") if "hidden" not in str(path)}
    signals = prepare(online, data, tmp_path, stream=stream)
    assert_equal_signals(signals, online, COLLATE(list(data)))
    assert all(path.stat().st_mtime_ns == made for path, made in before.items())
    assert not [path for path in signals.folder.iterdir() if "hidden" in path.name]


def test_a_full_disk_is_refused_before_the_pass(online, data, tmp_path, passes, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match=r"The states need 0.0 GB in .* set signals_dir to a larger disk"):
        make_signals(online, data, tmp_path).prepare(range(3))
    assert not passes


def test_splits_are_told_apart_and_an_example_without_signals_is_an_error(online, data, tmp_path):
    parts = {"align": data.select(range(5)), "eval": data.select(range(5, 8))}
    cached = CachedSignals({name: make_signals(online, part, tmp_path) for name, part in parts.items()}, "align", range(3))
    cached.prepare([Reading([1])])
    for part in parts.values():
        assert_equal_signals(cached, online, COLLATE(list(part)), [1])
    with pytest.raises(ValueError, match="No source signals for example"):
        cached(COLLATE([data[9]]), [1])


def test_a_folder_of_signals_stands_for_its_source(online, data, tmp_path):
    """On a machine without the weights: what was computed is there, and what was not is refused."""
    online.source.save_pretrained(tmp_path / "source")
    source = Source(str(tmp_path / "source"))
    source.head(tmp_path / "signals")
    prepare(online, data, tmp_path / "signals", source=source)
    shutil.rmtree(tmp_path / "source")
    (folder,) = (tmp_path / "signals").iterdir()
    moved = shutil.move(folder, tmp_path / "elsewhere")
    away = Source(str(moved))
    assert (away.name, away.num_layers, away.width, away.head_rows) == ("source", 5, 24, 97)
    torch.testing.assert_close(away.head(tmp_path).weight, online.source.lm_head.weight.detach())
    signals = prepare(online, data, tmp_path / "nowhere", source=away)
    assert_equal_signals(signals, online, COLLATE(list(data)))
    with pytest.raises(ValueError, match="Run `semalign signals`"):
        prepare(online, data.select(range(3)), tmp_path / "nowhere", source=away)


def losses(trainer):
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry for key in ("loss", "relation", "kl")]


@pytest.mark.parametrize("frontier", ["single", "cumulative", "joint"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_on_cached_signals_equals_training_online(tmp_path, frontier, accumulation):
    """At every stage and step: with shuffling, several epochs, an odd last batch and accumulation."""
    settings = {"train": ROWS[:15], "max_steps": 12, "frontier": frontier, "scale": "match", **EVEN}
    settings |= {"gradient_accumulation_steps": accumulation}
    cached = make_trainer(tmp_path / "cached", signals="cached", **settings)
    online = make_trainer(tmp_path / "online", signals="online", **settings)
    before = cached.evaluate(), online.evaluate()
    for key in ("eval_kl", "eval_relation", "eval_loss"):
        assert before[0][key] == pytest.approx(before[1][key], rel=1e-5)
    cached.train()
    online.train()
    assert losses(cached) == pytest.approx(losses(online), rel=1e-5)
    torch.testing.assert_close(adapter(cached), adapter(online), rtol=1e-5, atol=1e-6)


def test_resuming_on_cached_signals_equals_training_online(tmp_path):
    settings = {"train": ROWS[:15], "save_strategy": "steps", "save_steps": 3, **EVEN}
    make_trainer(tmp_path, signals="cached", **settings).train()
    online = make_trainer(tmp_path / "online", signals="online", **settings)
    online.train()
    resumed = make_trainer(tmp_path, signals="cached", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    torch.testing.assert_close(adapter(resumed), adapter(online), rtol=1e-5, atol=1e-6)


def test_training_on_cached_signals_never_runs_the_source(tmp_path):
    trainer = make_trainer(tmp_path, signals="cached")
    trainer.prepare()

    def refuse(*_):
        raise AssertionError("the source ran")

    trainer.source_model.model.register_forward_hook(refuse)
    trainer.train()
    trainer.evaluate()
    assert trainer.state.global_step == 6


def test_two_runs_share_a_cache(tmp_path):
    first = make_trainer(tmp_path / "a", signals_dir=str(tmp_path / "shared"))
    second = make_trainer(tmp_path / "b", signals_dir=str(tmp_path / "shared"), relation_weight=0.0, frontier="joint")
    assert first.signals.training.folder == second.signals.training.folder


@pytest.mark.parametrize("pairing", ["attribution", "last"])
def test_a_streamed_source_gives_the_adapter_of_a_resident_one(tmp_path, pairing):
    """From a folder, and never loaded whole: attribution, scales and signals one layer at a time."""
    tiny_llama(5, 24, seed=2, pad_token_id=0).save_pretrained(tmp_path / "source", max_shard_size="20KB")
    trained = {}
    for memory in ("resident", "stream"):
        args = SemAlignConfig(
            output_dir=str(tmp_path / memory), max_steps=12, learning_rate=1e-2, per_device_train_batch_size=4,
            report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", scale="match",
            **{**PAPER, "pairing": pairing},
            source_memory=memory,
        )  # fmt: skip
        trainer = SemAlignTrainer(
            tiny_llama(3, 16, seed=1, pad_token_id=0), str(tmp_path / "source"), args, ROWS[:16], extract_dataset=ROWS[27:33]
        )
        assert trainer.source._model is None  # dropped, or never there
        trainer.train()
        trained[memory] = trainer
    assert trained["stream"].pairing.source_layers == trained["resident"].pairing.source_layers
    assert trained["stream"].scales == pytest.approx(trained["resident"].scales, rel=1e-5)
    torch.testing.assert_close(adapter(trained["stream"]), adapter(trained["resident"]), rtol=1e-5, atol=1e-5)


def test_locks_of_several_data_sets_are_taken_in_one_order(monkeypatch):
    """Two runs with the same data in other roles would wait for each other without end."""
    taken = []

    class Lock:
        def __init__(self, name):
            self.lock_file = name

        def acquire(self, blocking):
            taken.append(self.lock_file)
            return nullcontext()

    def job(name):
        folder = SimpleNamespace(lock=lambda part: Lock(name))
        return SimpleNamespace(folder=folder, lacks=lambda: True, drop_abandoned=lambda part: None, outputs=())

    monkeypatch.setattr(source_pass._Pass, "plan", lambda job, part: None)
    for names in ("xy", "yx"):
        run_source([job(name) for name in names])
    assert taken == ["x", "y", "x", "y"]


def some(data, *numbers):
    return torch.tensor(data["example_id"])[list(numbers)].numpy()


@pytest.mark.parametrize("stream", [False, True], ids=["resident", "stream"])
def test_some_examples_of_some_layers(online, data, tmp_path, stream):
    """And what is added later stands beside it."""
    signals = make_signals(online, data, tmp_path, stream=stream)
    prepare_signals({signals: [Reading([0], some(data, 1, 4, 7)), Reading([2], some(data, 4, 9)), Reading([], some(data, 0))]})
    assert_equal_signals(signals, online, COLLATE([data[k] for k in (7, 1, 4)]), [0])
    assert_equal_signals(signals, online, COLLATE([data[k] for k in (9, 4)]), [2])
    assert_equal_signals(signals, online, COLLATE([data[k] for k in (0, 1, 4, 7, 9)]), [])
    for layers, row in (([0], 9), ([2], 1), ([], 2)):
        with pytest.raises(FileNotFoundError):
            signals(COLLATE([data[row]]), layers)
    signals.prepare(range(3))
    assert_equal_signals(signals, online, COLLATE(list(data)))
    assert not [path for path in signals.folder.iterdir() if "hidden" in path.name]


def test_a_damaged_file_of_some_examples_is_made_again_and_does_not_stay(online, data, tmp_path, caplog):
    readings = [Reading([0], some(data, 1, 4, 7))]
    prepare_signals({make_signals(online, data, tmp_path): readings})
    (path,) = [path for path in tmp_path.rglob("layer-*/*-*.safetensors")][:1]
    content = path.read_bytes()
    path.write_bytes(content[:-5] + bytes(5))
    prepare_signals({make_signals(online, data, tmp_path): readings})
    assert path.read_bytes() == content and "is damaged" in caplog.text
    path.write_bytes(content[:-5] + bytes(5))
    signals = prepare(online, data, tmp_path)  # which wants other examples
    assert not path.exists()
    assert_equal_signals(signals, online, COLLATE(list(data)))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("stream", [False, True], ids=["resident", "stream"])
@pytest.mark.parametrize("count", [2, 3])
def test_parts_are_together_what_one_process_computes(online, data, tmp_path, passes, stream, count):
    """Bit for bit, each with its share of the work."""
    whole = prepare(online, data, tmp_path / "whole", stream=stream)
    once, ran = len(passes), []
    shards = len(whole.examples.shards)
    for part in range(count):
        del passes[:]
        run_part([make_signals(online, data, tmp_path / "parts", stream=stream).job([Reading(range(3))])], (part, count))
        ran.append(len(passes))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert sum(ran) == once and max(ran) <= -(-shards // count) * 2
    assert not list((tmp_path / "parts").rglob("hidden-*"))


def test_a_process_takes_over_what_another_has_left(online, data, tmp_path, passes):
    """And leaves alone what another is at work on until that is done."""
    signals = make_signals(online, data, tmp_path)
    readings = [Reading(range(3))]
    with FileLock(writing_lock(signals.folder, (1, 2)).lock_file):
        assert not run_part([signals.job(readings)], (1, 2), wait=False)
        assert run_part([signals.job(readings)], (0, 2), wait=False)
    assert set(signals._states.missing(signals._final)) == set(range(1, len(signals.examples.shards), 2))
    prepare_signals({signals: readings}, (0, 2))
    assert_equal_signals(signals, online, COLLATE(list(data)))


def test_what_an_abandoned_pass_in_parts_left_is_deleted(online, data, tmp_path):
    signals = make_signals(online, data, tmp_path, stream=True)
    left, busy = (signals.folder / f"hidden-002-{part}-of-4" for part in (0, 1))
    for folder in (left, busy):
        folder.mkdir()
    with FileLock(writing_lock(signals.folder, (1, 4)).lock_file):
        signals.prepare(range(3))
    assert not left.exists() and busy.exists()
