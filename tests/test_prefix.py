"""The target prefix: a step that enters at the frontier is the step of the whole target, and nothing below it runs."""

import shutil
from functools import partial
from itertools import combinations

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
from hf_semalign.trainer import PREFIX

SETTINGS = {"max_steps": 15, "train": ROWS[:15], "scale": "match", "relation_weight": 0.5}  # four epochs, odd last batches


@pytest.fixture
def data():
    return encode(random_rows([(3 + i % 3, 1 + i % 5) for i in range(11)]), None, split="align")


def make_prefix(model, data, root, lora=None, **settings):
    layers = len(model.get_decoder().layers)
    return TargetPrefix(model, lora or [[] for _ in range(layers)], Examples(data), COLLATE, root, progress=False, **settings)


def losses(trainer):
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry for key in ("loss", "relation", "kl")]


@pytest.mark.parametrize("pad", [COLLATE, left_padded], ids=["right", "left"])
def test_entering_gives_what_the_whole_target_gives(data, tmp_path, pad):
    model = tiny_llama(5, 16)
    prefix = make_prefix(model, data, tmp_path, batch_size=3)
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


def test_moving_runs_one_layer_over_the_split_once(data, tmp_path):
    model = tiny_llama(5, 16)
    prefix = make_prefix(model, data, tmp_path, batch_size=100)
    ran = []
    for k, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, k=k: ran.append(k))
    for k in range(1, 5):
        del ran[:]
        prefix.move(k)
        assert ran == [k - 1]
        assert len(list(tmp_path.glob("*/"))) <= 2
    prefix.move(4)
    assert ran == [3]


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
    assert not (tmp_path / "cached" / "run" / PREFIX).exists()


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


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupted_run_goes_on_from_the_generation_on_disk(tmp_path, damaged, caplog):
    """Interrupted in the last stage: its inputs are there and are not computed again, unless they are damaged."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 12:
                raise Interrupted

    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 11}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    broken = make_trainer(tmp_path / "broken", **settings, callbacks=[Stop()])
    with pytest.raises(Interrupted):
        broken.train()
    folder = tmp_path / "broken" / "run" / PREFIX
    assert len(list(folder.glob("*/"))) == 2
    if damaged:
        for path in folder.rglob("*.safetensors"):
            content = bytearray(path.read_bytes())
            content[-3] ^= 0xFF
            path.write_bytes(content)
    resumed = make_trainer(tmp_path / "broken", **settings)
    advanced = []
    run = prefix_module.layer_pass
    prefix_module.layer_pass = lambda *args, **kwargs: (advanced.append(kwargs["start"]), run(*args, **kwargs))
    try:
        resumed.train(resume_from_checkpoint=True)
    finally:
        prefix_module.layer_pass = run
    assert advanced == ([0] if damaged else [])
    assert ("is damaged" in caplog.text) == damaged
    torch.testing.assert_close(adapter(resumed), adapter(whole), rtol=0, atol=0)


@pytest.mark.parametrize("moment", [1, 2, 4, 6])
def test_an_interrupted_advance_leaves_a_generation_to_go_on_from(data, tmp_path, monkeypatch, moment):
    monkeypatch.setattr("hf_semalign.cache.examples.SHARD_TOKENS", 24)
    model = tiny_llama(4, 16)
    whole = make_prefix(model, data, tmp_path / "whole", batch_size=2)
    whole.move(3)
    prefix = make_prefix(model, data, tmp_path / "run", batch_size=2)
    prefix.move(2)
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == moment:
            raise Interrupted

    handle = model.model.layers[2].mlp.register_forward_hook(stop)
    with pytest.raises(Interrupted):
        prefix.move(3)
    handle.remove()
    again, ran = make_prefix(model, data, tmp_path / "run", batch_size=2), []
    handles = [layer.mlp.register_forward_hook(lambda *_, k=k: ran.append(k)) for k, layer in enumerate(model.model.layers)]
    again.move(3)
    assert set(ran) == {2}
    for handle in handles:
        handle.remove()
    places = range(len(data))
    torch.testing.assert_close(again._folder.read(again._column, places), whole._folder.read(whole._column, places))


def test_other_weights_below_the_frontier_have_inputs_of_their_own(data, tmp_path):
    model = tiny_llama(3, 16)
    lora = [[torch.nn.Parameter(torch.ones(2))] for _ in range(3)]
    prefix = make_prefix(model, data, tmp_path, lora)
    prefix.move(2)
    first = prefix._folder.path
    lora[2][0].data += 1  # above: nothing depends on it
    prefix.move(2)
    assert prefix._folder.path == first
    lora[1][0].data += 1
    prefix.move(2)
    assert prefix._folder.path != first


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"attention_dropout": 0.5}, "two forwards of one batch differ, as under dropout"), ({}, None)],
    ids=["dropout", "none"],
)
def test_dropout_turns_the_prefix_off_with_a_clear_word(data, tmp_path, config, reason):
    model = tiny_llama(3, 16, **config).train()
    if reason is None:
        make_prefix(model, data, tmp_path)
        return
    with pytest.raises(PrefixUnavailable, match=reason):
        make_prefix(model, data, tmp_path)


def test_a_layer_that_reads_an_earlier_layers_state_turns_it_off(data, tmp_path):
    model = tiny_llama(4, 16)
    seen = {}
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.update(state=output))
    model.model.layers[2].register_forward_hook(lambda module, args, output: output + seen.pop("state", 0))
    with pytest.raises(PrefixUnavailable, match="layer 2 depends on more than the states below it"):
        make_prefix(model, data, tmp_path)


def test_a_full_disk_turns_it_off(data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(PrefixUnavailable, match=r"it needs 0.0 GB in .* which has 0.0 GB free"):
        make_prefix(tiny_llama(3, 16), data, tmp_path)


def test_what_an_interrupted_run_left_counts_as_room(data, tmp_path, monkeypatch):
    prefix = make_prefix(tiny_llama(4, 16), data, tmp_path)
    prefix.move(1)
    prefix.move(2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 10))
    make_prefix(tiny_llama(4, 16), data, tmp_path)
    with pytest.raises(PrefixUnavailable):
        make_prefix(tiny_llama(4, 32), data, tmp_path)
    assert not tmp_path.exists()


def test_a_disk_that_fills_up_later_turns_it_off_and_loses_nothing(tmp_path, monkeypatch, caplog):
    whole = make_trainer(tmp_path / "whole", **SETTINGS, **EVEN, signals="online")
    whole.train()
    monkeypatch.setattr("hf_semalign.cache.states.StateFolder.free", 0)
    monkeypatch.setattr("hf_semalign.cache.states.StateFolder.check_space", lambda *_: None)
    trainer = make_trainer(tmp_path / "run", **SETTINGS, **EVEN)
    trainer.train()
    assert "From here on the target runs whole at every step, without its prefix: layer 1 needs" in caplog.text
    torch.testing.assert_close(adapter(trainer), adapter(whole), rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "run" / "run" / PREFIX).exists()


@pytest.mark.parametrize("settings", [{"max_steps": 6}, {"frontier": "cumulative"}, {"signals": "online"}], ids=str)
def test_where_it_cannot_help_the_target_runs_whole(tmp_path, settings):
    layers = Layers()
    trainer = make_trainer(tmp_path, **{**SETTINGS, **settings}, callbacks=[layers])
    layers.watch(trainer)
    trainer.train()
    assert layers.steps == [set(range(TARGET_LAYERS))] * len(layers.steps)
    assert not (tmp_path / "run" / PREFIX).exists()


def test_a_target_with_dropout_trains_without_it(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(test_trainer, "tiny_llama", partial(tiny_llama, attention_dropout=0.1))
    trainer = make_trainer(tmp_path, **SETTINGS)
    trainer.train()
    assert "The target runs whole at every step, without its prefix: two forwards of one batch differ" in caplog.text
    assert trainer.state.global_step == SETTINGS["max_steps"]
