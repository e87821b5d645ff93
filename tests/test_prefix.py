"""The target prefix: a step that enters at the frontier is the step of the whole target, and nothing below it runs."""

from functools import partial
from itertools import combinations
from types import SimpleNamespace

import pytest
import test_trainer
import torch
from conftest import random_rows, tiny_llama
from test_signals import COLLATE, left_padded
from test_trainer import EVEN, ROWS, TARGET_LAYERS, adapter, make_trainer
from transformers import TrainerCallback

from hf_semalign.cache import prefix as prefix_module
from hf_semalign.cache.examples import Examples
from hf_semalign.cache.prefix import PrefixUnavailable, TargetPrefix
from hf_semalign.models.hooks import capture
from hf_semalign.splits import encode

SETTINGS = {"max_steps": 15, "train": ROWS[:15], "scale": "match", "relation_weight": 0.5}  # four epochs, odd last batches


@pytest.fixture
def data():
    return encode(random_rows([(3 + i % 3, 1 + i % 5) for i in range(11)]), None, split="align")


def make_prefix(model, data, **settings):
    return TargetPrefix(model, Examples(data), COLLATE, progress=False, **settings)


def losses(trainer):
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry for key in ("loss", "relation", "kl")]


@pytest.mark.parametrize("pad", [COLLATE, left_padded], ids=["right", "left"])
def test_entering_gives_what_the_whole_target_gives(data, pad):
    model = tiny_llama(5, 16)
    prefix = make_prefix(model, data, batch_size=3)
    batch = pad([data[i] for i in (9, 0, 4, 10)])
    mask = batch["attention_mask"].bool()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad(), capture(model.model.layers) as states:
        whole = model(**inputs).logits
        kept = [(state.input, state.output) for state in states]
    ran = []
    for k, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, k=k: ran.append(k))
    for k in (1, 2, 4):
        prefix.move(k)
        del ran[:]
        with torch.no_grad(), capture(model.model.layers[k:]) as states, prefix.entered(batch):
            entered = model(**inputs).logits
        assert ran == list(range(k, 5))
        torch.testing.assert_close(entered[mask], whole[mask], rtol=1e-5, atol=1e-5)
        for state, (given, made) in zip(states, kept[k:], strict=True):
            torch.testing.assert_close(state.input[mask], given[mask], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(state.output[mask], made[mask], rtol=1e-5, atol=1e-5)
    del ran[:]
    model(**inputs)
    assert ran == list(range(5))  # nothing outlives the block


def test_moving_runs_one_layer_over_the_split_once(data):
    model = tiny_llama(5, 16)
    prefix = make_prefix(model, data, batch_size=100)
    ran = []
    for k, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, k=k: ran.append(k))
    memory = prefix._states.data_ptr()
    for k in range(1, 5):
        del ran[:]
        prefix.move(k)
        assert ran == [k - 1]
    prefix.move(4)
    assert ran == [3]
    assert prefix._states.data_ptr() == memory  # outputs replace inputs


def test_a_prefix_that_begins_higher_repeats_the_moves(data, monkeypatch):
    """Bit for bit: what a resumed run enters with is what the interrupted one entered with."""
    monkeypatch.setattr("hf_semalign.cache.examples.SHARD_TOKENS", 24)
    model = tiny_llama(5, 16)
    stepwise, at_once = make_prefix(model, data, batch_size=2), make_prefix(model, data, batch_size=2)
    for k in (1, 2, 3, 4):
        stepwise.move(k)
    at_once.move(4)
    assert torch.equal(stepwise._states, at_once._states)


def test_processes_run_every_batch_of_a_move_once(data, monkeypatch):
    """Each its own shards, which it sends to the others; together they hold what one process holds."""
    monkeypatch.setattr("hf_semalign.cache.examples.SHARD_TOKENS", 24)
    model, sent = tiny_llama(5, 16), {}
    whole = make_prefix(model, data, batch_size=2)
    whole.move(1)
    parts = [make_prefix(model, data, batch_size=2, part=(rank, 3)) for rank in range(3)]
    shards = len(whole._examples.shards)
    for rank, part in enumerate(parts):
        ran = []
        handle = model.model.layers[0].mlp.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        part._run_layer(0)
        handle.remove()
        own = [number for number in range(shards) if number % 3 == rank]
        assert len(ran) == sum(len(whole._examples.batches(number, 2)) for number in own) > 0
        numbers = iter(range(shards))
        monkeypatch.setattr(
            prefix_module,
            "broadcast",
            lambda states, from_process, rank=rank, numbers=numbers: (
                sent.setdefault(next(numbers), states.clone()) if from_process == rank else next(numbers)
            ),
        )
        part._share()
    assert sorted(sent) == list(range(shards))
    assert torch.equal(torch.cat([sent[number] for number in range(shards)]), whole._states.view(torch.uint8))


class Layers(TrainerCallback):
    """Which target layers run in each step."""

    def __init__(self):
        self.steps, self.inside = [], False

    def watch(self, trainer):
        for k, layer in enumerate(trainer.target_anatomy.layers):
            layer.mlp.register_forward_hook(lambda *_, k=k: self.steps[-1].add(k) if self.inside else None)

    def on_step_begin(self, args, state, control, **kwargs):
        self.inside = True
        self.steps.append(set())

    def on_step_end(self, args, state, control, **kwargs):
        self.inside = False


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_steps": 9},
        {"activation_checkpointing": True},
        {"layer_loss": "steering"},
        {"max_steps": -1, "num_train_epochs": 4, "dataloader_drop_last": True},
        {"eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_training_through_the_prefix_equals_training_online(tmp_path, settings):
    """At every step of every stage, over several epochs and with an odd last batch."""
    layers = Layers()
    settings = {**SETTINGS, **EVEN, **settings}
    cached = make_trainer(tmp_path / "cached", **settings, callbacks=[layers])
    online = make_trainer(tmp_path / "online", **settings, signals="online")
    layers.watch(cached)
    cached.train()
    online.train()
    stages = [cached.schedule.stage(step) for step in range(len(layers.steps))]
    assert layers.steps == [set(range(stage, TARGET_LAYERS)) for stage in stages]
    key = {"steering": "steering"}.get(settings.get("layer_loss"), "relation")
    for left, right in zip(cached.state.log_history, online.state.log_history, strict=True):
        for name in ("loss", "kl", key, "eval_kl", "eval_relation"):
            if name in left:
                assert left[name] == pytest.approx(right[name], rel=1e-5), (name, left["step"])
    distance = (adapter(cached) - adapter(online)).norm() / adapter(online).norm()
    assert distance < 1e-6
    assert cached._prefix is None  # its memory is free


def bf16_distances(tmp_path, **settings):
    """How far cached is from online, and how far online runs are from each other that differ in how a batch is cut into
    micro-batches, which only rounding can tell.
    """
    settings = {**SETTINGS, "train": ROWS[:16], "max_steps": 12, "bf16": True, **settings}
    cached = make_trainer(tmp_path / "cached", **settings)
    cached.train()
    online = []
    for size in (4, 2, 1):
        micro = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        online.append(make_trainer(tmp_path / str(size), signals="online", **{**settings, **micro}))
        online[-1].train()
    spread = max((adapter(one) - adapter(other)).norm() for one, other in combinations(online, 2))
    return (adapter(cached) - adapter(online[0])).norm(), spread


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_differs_from_online_by_less_than_two_online_runs_do(tmp_path, monkeypatch, weights):
    monkeypatch.setattr(test_trainer, "tiny_llama", partial(tiny_llama, dtype=weights))
    distance, spread = bf16_distances(tmp_path)
    assert distance < spread


@pytest.mark.parametrize("stop", [3, 5, 7, 10, 12])
def test_resuming_anywhere_equals_an_undisturbed_run(tmp_path, stop):
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": stop}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
    torch.testing.assert_close(adapter(resumed), adapter(whole), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"attention_dropout": 0.5}, "two forwards of one batch differ, as under dropout"), ({}, None)],
    ids=["dropout", "none"],
)
def test_dropout_turns_the_prefix_off_with_a_clear_word(data, config, reason):
    model = tiny_llama(3, 16, **config).train()
    if reason is None:
        make_prefix(model, data)
        return
    with pytest.raises(PrefixUnavailable, match=reason):
        make_prefix(model, data)


def test_a_layer_that_reads_an_earlier_layers_state_turns_it_off(data):
    model = tiny_llama(4, 16)
    seen = {}
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.update(state=output))
    model.model.layers[2].register_forward_hook(lambda module, args, output: output + seen.pop("state", 0))
    with pytest.raises(PrefixUnavailable, match="layer 2 depends on more than the states below it"):
        make_prefix(model, data)


@pytest.mark.parametrize(
    ("memory", "free", "fits"),
    [("auto", 2.1, True), ("auto", 1.9, False), ("host", 1.1, True), ("host", 0.9, False), ("device", 10, False)],
)
def test_what_does_not_fit_in_memory_is_not_made(data, monkeypatch, memory, free, fits):
    """``auto`` takes half of what is free on the host; there is no device here."""
    needed = sum(len(ids) for ids in data["input_ids"]) * 16 * 4
    monkeypatch.setattr(prefix_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(free * needed)))
    if fits:
        assert make_prefix(tiny_llama(3, 16), data, memory=memory)._states.nbytes == needed
        return
    with pytest.raises(PrefixUnavailable, match=f"it needs .* with prefix_memory='{memory}'; there are .* free on the host"):
        make_prefix(tiny_llama(3, 16), data, memory=memory)


def test_the_processes_of_a_machine_share_its_memory(data, monkeypatch):
    needed = sum(len(ids) for ids in data["input_ids"]) * 16 * 4
    monkeypatch.setattr(prefix_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=5 * needed))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    make_prefix(tiny_llama(3, 16), data)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(PrefixUnavailable):
        make_prefix(tiny_llama(3, 16), data)


def test_a_run_without_room_trains_without_it(tmp_path, monkeypatch, caplog):
    whole = make_trainer(tmp_path / "whole", **SETTINGS, **EVEN, signals="online")
    whole.train()
    monkeypatch.setattr(prefix_module, "LARGEST_SHARE", {"device": 0, "host": 0})
    trainer = make_trainer(tmp_path / "run", **SETTINGS, **EVEN)
    trainer.train()
    assert "The whole target runs at every step, without the target prefix: it needs" in caplog.text
    torch.testing.assert_close(adapter(trainer), adapter(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"max_steps": 6}, {"frontier": "cumulative"}, {"signals": "online"}, {"prefix_memory": "none"}], ids=str
)
def test_where_it_cannot_help_the_target_runs_whole(tmp_path, settings):
    layers = Layers()
    trainer = make_trainer(tmp_path, **{**SETTINGS, **settings}, callbacks=[layers])
    layers.watch(trainer)
    trainer.train()
    assert layers.steps == [set(range(TARGET_LAYERS))] * len(layers.steps)


def test_a_target_with_dropout_trains_without_it(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(test_trainer, "tiny_llama", partial(tiny_llama, attention_dropout=0.1))
    trainer = make_trainer(tmp_path, **SETTINGS)
    trainer.train()
    assert "The whole target runs at every step, without the target prefix: two forwards of one batch differ" in caplog.text
    assert trainer.state.global_step == SETTINGS["max_steps"]
