"""Under load: what is held in memory does not grow with the data, and nothing is done once for every pair of layers."""

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_rows, tiny_llama
from datasets import Dataset
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_semalign import SemanticMap, SourceSignals
from hf_semalign.cache import examples as examples_module
from hf_semalign.cache import states as states_module
from hf_semalign.cache.examples import Examples
from hf_semalign.cache.prefix import TargetPrefix
from hf_semalign.cache.scores import attribute_streamed
from hf_semalign.cache.source import Source
from hf_semalign.cache.states import Column, StateFolder
from hf_semalign.method.losses import answer_cross_entropy
from hf_semalign.method.pairing import pair_layers
from hf_semalign.models import frozen as source_module
from hf_semalign.models.anatomy import Head
from hf_semalign.splits import Collator, check_disjoint, check_token_ids, encode, hold_out

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import load

COLLATE = Collator(pad_token_id=0)
WIDTH, LENGTH, VALID = 96, 12, 6
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Rows:
    """Rows of token ids that are made when they are asked for."""

    def __init__(self, count: int, length: int, valid: int, vocab: int = 30_000) -> None:
        self.count, self.length, self.valid, self.vocab = count, length, valid, vocab

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict:
        if row >= self.count:
            raise IndexError(row)
        ids = np.random.default_rng(row).integers(3, self.vocab, self.length).tolist()
        return {"input_ids": ids, "labels": [-100] * (self.length - self.valid) + ids[self.length - self.valid :]}


@pytest.fixture(autouse=True)
def freed_memory_goes_back():
    """At once: glibc otherwise keeps by chance up to 10 MB of what was freed, more the larger it was."""
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**17)  # M_MMAP_THRESHOLD, which then no longer grows


def growth(work) -> tuple:
    """MB of anonymous memory that some work takes at its largest, and what it returns."""
    phases = {}
    with load.phase("work", phases):
        kept = work()
    return phases["work"]["anon_mb"], kept


@linux
def test_splits_hold_no_rows_in_memory():
    """Their ids and labels are 26 MB as integers of eight bytes, and some 70 as Python's."""

    def work():
        encoded = encode(rows, None, split="align")
        check_disjoint({"align": rows, "eval": Rows(1, 5, 2)})
        check_token_ids({"align": encoded}, {"target": 30_000}, None)
        return Examples(encoded)

    rows = Rows(200, 400, 200)
    work()  # what libraries take once
    rows = Rows(4_000, 400, 200)
    taken, examples = growth(work)
    assert taken < 13
    assert examples.tokens.sum() == 1_600_000


@linux
def test_signals_hold_no_states_in_memory_and_the_prefix_holds_one_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(examples_module, "SHARD_TOKENS", 2**12)
    source, target = tiny_llama(2, WIDTH, vocab=97, seed=1), tiny_llama(3, WIDTH, vocab=97, seed=2)
    semantic_map = SemanticMap.from_models(source, target).float()
    held = []

    def work(count, folder):
        data = encode(Rows(count, LENGTH, VALID, 97), None, split="align")
        signals = SourceSignals(
            Source(source), pair_layers(2, 3, [0, 1, 1]), semantic_map, data, folder / "signals", COLLATE, batch_size=200,
            progress=False,
        )  # fmt: skip
        signals.prepare(range(3))
        examples = signals.examples
        prefix = TargetPrefix(target, examples, COLLATE, batch_size=200, progress=False)
        prefix.move(2)
        held.append(prefix._states.nbytes / 1e6)
        for places in np.random.default_rng(0).permutation(count).reshape(-1, 100):
            signals._states.read(signals._final, places)
        return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6

    work(400, tmp_path / "small")
    taken, on_disk = growth(lambda: work(6_000, tmp_path / "large"))
    assert on_disk > 35
    assert held[-1] > 25
    assert taken < held[-1] + 20  # one state a position, and some shards of 0.8 to 1.6 MB a column


def test_a_shard_holds_no_more_of_a_large_data_set(monkeypatch):
    monkeypatch.setattr(examples_module, "SHARD_TOKENS", 24)
    examples = Examples(encode(random_rows([(3, 9)] * 3_000), None, split="align"))
    assert len(examples.shards) == 1_500
    assert max(examples.tokens[shard].sum() for shard in examples.shards) == 24


@linux
def test_a_limited_number_of_shards_is_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(examples_module, "SHARD_TOKENS", 24)
    monkeypatch.setattr(states_module, "MAX_OPEN", 5)
    examples = Examples(encode(random_rows([(3, 9)] * 60), None, split="align"))
    folder, columns = StateFolder(tmp_path, {}, examples), [Column(name, 2, torch.float32) for name in "ab"]
    for number, shard in enumerate(examples.shards):
        rows = torch.arange(shard.start, shard.stop).repeat_interleave(9).float()
        folder.write(number, {column: rows[:, None].expand(-1, 2) + 1_000 * k for k, column in enumerate(columns)})
    assert not any(folder.missing(column) for column in columns)
    for place in np.random.default_rng(0).permutation(60):
        for k, column in enumerate(columns):
            assert folder.read(column, [place]).tolist() == [[place + 1_000.0 * k] * 2] * 9
    assert Path("/proc/self/maps").read_text().count(str(tmp_path)) <= 5


def test_examples_are_found_by_id_and_those_of_another_data_set_are_not():
    data = encode(random_rows([(1 + i % 4, 2 + i % 3) for i in range(50)]), None, split="align")
    examples = Examples(data)
    ids = torch.tensor(data["example_id"])
    assert torch.equal(torch.from_numpy(examples.ids[examples.places(ids)]), ids)
    other = [0, 2**62, int(ids.max()) + 1, int(ids.min()) - 1]
    assert all(int(key) in examples for key in ids) and not any(key in examples for key in other)
    for key in other:
        with pytest.raises(KeyError, match=str(key)):
            examples.places(torch.tensor([int(ids[0]), key]))


def test_rows_of_a_data_set_are_held_out_where_they_lie():
    records = [{"prompt": f"p{i % 90}", "completion": "x"} for i in range(100)]
    parts = hold_out(Dataset.from_list(records))
    assert all(isinstance(part, Dataset) for part in parts)
    assert [list(part) for part in parts] == list(hold_out(records))
    assert len(parts[1]) == 30  # twenty, and the ten that share their prompts


def test_the_look_at_a_target_and_its_moves_are_linear_in_layers():
    data = Examples(encode(random_rows([(3, 3)] * 4), None, split="align"))
    ran = {}
    for layers in (8, 16):
        model, count = tiny_llama(layers, 8, heads=2), []
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda *_, count=count: count.append(1))
        prefix = TargetPrefix(model, data, COLLATE, progress=False)
        ran[layers] = len(count)
        for k in range(1, layers):
            prefix.move(k)
        assert len(count) == ran[layers] + layers - 1
    assert ran == {8: 3 * 8, 16: 3 * 16}  # twice whole, and every layer once alone


def test_a_streamed_source_is_opened_once_and_its_layers_leave_no_weights(tmp_path, monkeypatch):
    tiny_llama(6, 16).save_pretrained(tmp_path / "source")
    loads, load_weights = [], source_module.load_weights
    monkeypatch.setattr(source_module, "load_weights", lambda *args, **kw: (loads.append(1), load_weights(*args, **kw))[1])
    source, data = Source(str(tmp_path / "source")), encode(random_rows([(3, 3)] * 4), None, split="align")
    ran, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, states: (ran.append(1), forward(self, states))[1])
    attribute_streamed(source, data, COLLATE, tmp_path / "signals", progress=False)
    assert len(ran) - 1 == 2 * 5 * 4  # five layers forward and five backward, each alone, for each example
    semantic_map = SemanticMap.from_heads(source.head().weight, torch.randn(97, 8)).float()
    pairing = pair_layers(6, 3, "uniform")
    SourceSignals(
        source, pairing, semantic_map, data, tmp_path / "signals", COLLATE, stream=True, progress=False
    ).prepare(range(3))  # fmt: skip
    assert len(loads) == 1
    for k in (0, 3):
        with source.layer(k, "cpu") as anatomy:
            there = [not next(layer.parameters()).is_meta for layer in anatomy.layers]
            assert there == [layer == k for layer in range(6)]
        assert all(parameter.is_meta for layer in anatomy.layers for parameter in layer.parameters())


def test_attribution_makes_the_logits_of_some_positions_at_a_time(monkeypatch):
    torch.manual_seed(0)
    hidden, tokens = torch.randn(300, 8, dtype=torch.float64, requires_grad=True), torch.randint(97, (300,))
    head, rows, logits = Head(torch.randn(97, 8, dtype=torch.float64), torch.randn(97), 5.0), [], Head.logits
    whole = F.cross_entropy(head.logits(hidden), tokens, reduction="none")
    monkeypatch.setattr(Head, "logits", lambda self, states: (rows.append(len(states)), logits(self, states))[1])
    ours = answer_cross_entropy(hidden, head, tokens)
    torch.testing.assert_close(ours, whole)
    weights = torch.rand(300)
    gradients = [torch.autograd.grad((losses * weights).sum(), hidden)[0] for losses in (ours, whole)]
    torch.testing.assert_close(*gradients)
    assert max(rows) == 128 and sum(rows) == 600  # forward, and once more on the way back


@linux
@pytest.mark.slow
def test_a_hundred_thousand_examples_take_no_more_memory_than_ten_thousand():
    few, many = (load.run("examples", {**load.SHORT, "examples": count}, apart=True) for count in (10_000, 100_000))
    for name in ("encode", "check", "signals", "reading", "prefix", "trainer", "training"):
        assert many[name]["anon_mb"] < few[name]["anon_mb"] + 40, name  # places and ids are some 100 bytes an example
    assert many["signals"]["disk_mb"] > 150
