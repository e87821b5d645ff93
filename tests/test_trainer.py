"""The trainer against the losses it wires together, and against the traps of transformers, peft and accelerate."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import PAPER, random_rows, tiny_llama, word_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import HfArgumentParser, LlamaForCausalLM, TrainerCallback

from hf_semalign.config import SemAlignConfig
from hf_semalign.method.losses import fisher_loss, output_kl, relation_loss, steering_loss
from hf_semalign.method.pairing import pair_layers
from hf_semalign.models.hooks import capture
from hf_semalign.splits import valid_positions
from hf_semalign.trainer import SemAlignTrainer
from hf_semalign.training.checkpoints import seal
from hf_semalign.training.stages import whole

SOURCE_LAYERS, TARGET_LAYERS, WIDTH = 5, 3, 16
ROWS = random_rows([(3 + i % 3, 2 + i % 4) for i in range(40)])
# For runs that differ in rounding alone: Adam's 1e-8 makes steps of gradients that are zero but for it (docs/concepts.md).
EVEN = {"adam_epsilon": 1e-3}


def make_trainer(tmp_path, *, train=ROWS[:16], evaluation=ROWS[16:27], callbacks=None, **settings) -> SemAlignTrainer:
    settings = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **settings,
    }
    source = tiny_llama(SOURCE_LAYERS, 24, seed=2, pad_token_id=0)
    trainer = SemAlignTrainer(
        tiny_llama(TARGET_LAYERS, WIDTH, seed=1, pad_token_id=0),
        source,
        SemAlignConfig(output_dir=str(tmp_path / "run"), **{**PAPER, **settings}),
        train,
        eval_dataset=evaluation,
        extract_dataset=ROWS[27:33],
        callbacks=callbacks,
    )
    trainer.source_model = source  # for the tests alone: with cached signals the trainer needs it no more
    return trainer


@pytest.mark.parametrize("first", ["prepare", "train", "evaluate", "save_model"])
def test_the_source_runs_over_the_data_when_it_is_first_wanted(tmp_path, first):
    trainer, ran = make_trainer(tmp_path, pairing="attribution"), []
    assert not (tmp_path / "run" / "_signals").exists() and "pairing" not in vars(trainer)
    trainer.source_model.model.register_forward_hook(lambda *_: ran.append(1))
    getattr(trainer, first)()
    assert ran and trainer.pairing.strategy == "attribution"
    trainer.prepare()
    del ran[:]
    trainer.prepare()
    trainer.evaluate()
    assert not ran
    assert copy.deepcopy(trainer).evaluate()["eval_kl"] == trainer.evaluate()["eval_kl"]  # as callbacks and sweeps do


def lora_state(trainer) -> list[list[torch.Tensor]]:
    return [[p.detach().clone() for p in layer] for layer in trainer.lora_layers]


def adapter(trainer) -> torch.Tensor:
    return torch.cat([whole(p.detach()).flatten() for layer in trainer.lora_layers for p in layer])


class Watch(TrainerCallback):
    """Which layers' LoRA moved in each step."""

    def __init__(self):
        self.moved, self.trainer, self.before = [], None, None

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = lora_state(self.trainer)

    def on_step_end(self, args, state, control, **kwargs):
        after = lora_state(self.trainer)
        self.moved.append(
            {
                k
                for k, (old, new) in enumerate(zip(self.before, after, strict=True))
                if any(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
            }
        )


@pytest.mark.parametrize(
    ("frontier", "moved"),
    [
        ("single", [{0}, {0}, {1}, {1}, {2}, {2}]),
        ("cumulative", [{0}, {0}, {0, 1}, {0, 1}, {0, 1, 2}, {0, 1, 2}]),
        ("joint", [{0, 1, 2}] * 6),
    ],
)
def test_each_stage_moves_exactly_its_layers_and_never_the_base(tmp_path, frontier, moved):
    watch = Watch()
    trainer = make_trainer(tmp_path, frontier=frontier, callbacks=[watch], weight_decay=0.1)
    watch.trainer = trainer
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" not in name}
    trainer.train()
    assert watch.moved == moved
    for name, parameter in trainer.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name]), name


def test_training_twice_in_one_process_starts_again_at_the_first_stage(tmp_path):
    watch = Watch()
    trainer = make_trainer(tmp_path, callbacks=[watch], max_steps=3)
    watch.trainer = trainer
    trainer.train()
    trainer.train()
    assert watch.moved == [{0}, {1}, {2}] * 2


def expected_loss(trainer, batch, stage, layer_loss="relation"):
    """Equation 9 from full forwards of both models, without the trainer's own step."""
    source_layer = trainer.pairing.source_layers[stage]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with capture([trainer.source_model.model.layers[source_layer], trainer.source_model.model]) as (source_state, source_final):
        trainer.source_model(**inputs)
    target = trainer.model.get_base_model()
    with capture([target.model.layers[stage], target.model]) as (state, final):
        trainer.model(**inputs)
    valid = valid_positions(batch["labels"])
    supervision = trainer.semantic_map(source_state.output) * trainer.scales[stage]
    if layer_loss == "relation":
        layer_term = relation_loss(state.input, state.output, supervision, valid)
    elif layer_loss == "fisher":
        layer_term = fisher_loss(state.output, supervision, target.lm_head.weight, valid)
    else:
        layer_term = steering_loss(state.output, supervision, valid)
    weights = target.lm_head.weight, trainer.source_model.lm_head.weight
    return layer_term, output_kl(final.output[valid], weights[0], source_final.output[valid], weights[1])


@pytest.mark.parametrize("layer_loss", ["relation", "steering", "fisher"])
@pytest.mark.parametrize("stage", range(TARGET_LAYERS))
def test_loss_is_the_objective_of_equation_9(tmp_path, stage, layer_loss):
    settings = {"relation_weight": 0.3, "kl_weight": 0.7, "layer_loss": layer_loss, "scale": "match", "pairing": "uniform"}
    trainer = make_trainer(tmp_path, **settings)
    trainer.state.global_step = 2 * stage
    batch = trainer.data_collator([trainer.train_dataset[int(row)] for row in trainer.rows_by_stage()[stage][:5]])
    layer_term, kl = expected_loss(trainer, batch, stage, layer_loss)
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(loss, 0.3 * layer_term + 0.7 * kl)
    assert outputs.logits.shape == (*batch["labels"].shape, 0)


def test_joint_loss_averages_the_layers(tmp_path):
    trainer = make_trainer(tmp_path, frontier="joint", relation_weight=0.5)
    batch = trainer.data_collator(list(trainer.train_dataset)[:5])
    terms = [expected_loss(trainer, batch, stage) for stage in range(TARGET_LAYERS)]
    mean = sum(layer_term for layer_term, _ in terms) / TARGET_LAYERS
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), 0.5 * mean + terms[0][1])


def test_the_relation_loss_reaches_layers_below_through_the_residual_alone(tmp_path):
    """Under ``joint`` the gradient is that of ``d = y - x`` with both in it, which is what the layer adds to its input."""
    trainer = make_trainer(tmp_path, frontier="joint", kl_weight=0.0)
    for layer in trainer.lora_layers:
        for parameter in layer[1::2]:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = trainer.data_collator(list(trainer.train_dataset)[:5])
    inputs, valid = {key: batch[key] for key in ("input_ids", "attention_mask")}, valid_positions(batch["labels"])
    with capture(trainer.model.get_base_model().model.layers) as states:
        trainer.model(**inputs)
    supervision = trainer.signals(batch, range(TARGET_LAYERS)).supervision
    expected = sum(
        relation_loss(torch.zeros_like(state.input), state.output - state.input, wanted - state.input.detach(), valid)
        for state, wanted in zip(states, supervision, strict=True)
    )
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, expected / TARGET_LAYERS)
    trained = [p for layer in trainer.lora_layers for p in layer]
    ours, theirs = torch.autograd.grad(loss, trained), torch.autograd.grad(expected / TARGET_LAYERS, trained)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-7)
    assert ours[0].norm() > 1e-3


def test_version_1_of_the_paper_is_two_cosines(tmp_path):
    """Layer and final state, each along the source's, which the map carries into the target's space."""
    version_1 = {"pairing": "proportional", "map_kind": "cosine", "layer_loss": "steering", "output_loss": "cosine"}
    trainer = make_trainer(tmp_path, **version_1)
    assert trainer.pairing.source_layers == (1, 2, 4)
    batch = trainer.data_collator([trainer.train_dataset[int(row)] for row in trainer.rows_by_stage()[0][:5]])
    inputs, valid = {key: batch[key] for key in ("input_ids", "attention_mask")}, valid_positions(batch["labels"])
    target = trainer.model.get_base_model()
    with capture([target.model.layers[0], target.model]) as (state, final):
        trainer.model(**inputs)
    source = trainer.source_model.model
    with capture([source.layers[1], source]) as (source_state, source_final):
        trainer.source_model(**inputs)
    cosines = [
        F.cosine_similarity(ours.output[valid], trainer.semantic_map(theirs.output)[valid], dim=-1).mean()
        for ours, theirs in ((state, source_state), (final, source_final))
    ]
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), 2 - cosines[0] - cosines[1])
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "cosine" in entry]
    assert len(logs) == 6 and all("steering" in entry and "kl" not in entry for entry in logs)
    assert logs[-1]["cosine"] < logs[0]["cosine"]


class Gradients(TrainerCallback):
    """Gradients just before the optimizer's step."""

    def __init__(self):
        self.steps, self.trainer = [], None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        grads = [p.grad for layer in self.trainer.lora_layers for p in layer]
        self.steps.append(torch.cat([(torch.zeros(1) if g is None else g.detach().clone()).flatten() for g in grads]))


def gradients_with(tmp_path, **settings):
    gradients = Gradients()
    trainer = make_trainer(tmp_path, callbacks=[gradients], max_grad_norm=0, **settings)
    gradients.trainer = trainer
    trainer.train()
    return gradients.steps, trainer


def test_accumulated_micro_batches_give_the_gradient_and_logs_of_the_large_batch(tmp_path):
    large, one = gradients_with(tmp_path / "a", per_device_train_batch_size=16, max_steps=3)
    small, four = gradients_with(tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=3)
    assert len(large) == len(small) == 3
    for left, right in zip(large, small, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    for left, right in zip(one.state.log_history[:3], four.state.log_history[:3], strict=True):
        for key in ("loss", "kl", "relation"):
            assert left[key] == pytest.approx(right[key], rel=1e-4), key


def test_sequences_without_a_relation_leave_the_average_alone(tmp_path):
    short = random_rows([(4, 1)] * 2, seed=9)
    settings = {"kl_weight": 0.0, "max_steps": 3, "frontier": "single"}
    alone, _ = gradients_with(tmp_path / "a", train=ROWS[:4], per_device_train_batch_size=4, **settings)
    mixed, _ = gradients_with(tmp_path / "b", train=[*ROWS[:4], *short], per_device_train_batch_size=6, **settings)
    torch.testing.assert_close(alone[0], mixed[0], rtol=1e-4, atol=1e-7)


def test_logs_hold_both_terms_and_the_stage_and_add_up(tmp_path):
    trainer = make_trainer(tmp_path, relation_weight=0.5, logging_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["stage"] for entry in logs] == [1, 2, 3]
    for entry in logs:
        assert entry["loss"] == pytest.approx(0.5 * entry["relation"] + entry["kl"], rel=1e-4)


def test_learning_rate_restarts_with_each_stage(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=12, warmup_steps=2)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    stage = rates[:4]
    assert rates == pytest.approx(stage * 3)
    assert max(stage) == 1e-2
    assert stage[-1] < max(stage)


def test_per_stage_budget_gives_every_stage_the_whole_budget(tmp_path):
    trainer = make_trainer(tmp_path, stage_budget="per_stage", max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2 * TARGET_LAYERS
    assert trainer.schedule.boundaries == (0, 2, 4, 6)


def test_epochs_are_dealt_out_to_the_stages(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 8
    assert trainer.schedule.boundaries == (0, 2, 5, 8)


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path, stop, accumulation):
    settings = {"save_strategy": "steps", "save_steps": stop, "lr_scheduler_type": "cosine", "train": ROWS[:15]}
    settings |= {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 6
    torch.testing.assert_close(adapter(resumed), adapter(whole), rtol=0, atol=0)


def test_a_checkpoint_that_is_older_than_a_setting_can_be_resumed(tmp_path):
    """A setting that its record lacks had the value that is the default now."""
    make_trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    record = tmp_path / "run" / "checkpoint-3" / "semalign.json"
    saved = json.loads(record.read_text())
    del saved["settings"]["output_loss"]
    record.write_text(json.dumps(saved))
    seal(record.parent)
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(record.parent))
    assert resumed.state.global_step == 6
    with pytest.raises(ValueError, match="made with other output_loss"):
        make_trainer(tmp_path, output_loss="cosine").train(resume_from_checkpoint=str(record.parent))


@pytest.mark.parametrize("resume", [True, "path"])
def test_resuming_a_finished_run_changes_nothing(tmp_path, resume):
    settings = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    again = make_trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=resume if resume is True else str(tmp_path / "run" / "checkpoint-6"))
    assert again.state.global_step == 6
    assert torch.equal(adapter(again), adapter(whole))


@pytest.mark.parametrize("change", [{"relation_weight": 0.5}, {"pairing": "last"}, {"train": ROWS[1:16]}, {"max_steps": 7}])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, **change)
    with pytest.raises(ValueError, match="made with other"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_two_runs_are_equal(tmp_path):
    runs = [make_trainer(tmp_path / name) for name in "ab"]
    for run in runs:
        run.train()
    assert torch.equal(adapter(runs[0]), adapter(runs[1]))


def test_saved_adapter_loads_with_peft_and_gives_the_trained_logits(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    batch = trainer.data_collator(ROWS[:4])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    loaded = PeftModel.from_pretrained(tiny_llama(TARGET_LAYERS, WIDTH, seed=1, pad_token_id=0), tmp_path / "run")
    trainer.model.eval()
    with torch.no_grad():
        trained, again = trainer.model(**inputs).logits, loaded(**inputs).logits
        untouched = tiny_llama(TARGET_LAYERS, WIDTH, seed=1, pad_token_id=0)(**inputs).logits
    torch.testing.assert_close(again, trained, rtol=0, atol=0)
    assert not torch.allclose(trained, untouched, atol=1e-3)


def test_adapter_folder_holds_lora_alone_and_no_local_path(tmp_path):
    tiny_llama(TARGET_LAYERS, WIDTH, seed=1, pad_token_id=0).save_pretrained(tmp_path / "private" / "target")
    trainer = SemAlignTrainer(
        LlamaForCausalLM.from_pretrained(tmp_path / "private" / "target"),
        tiny_llama(SOURCE_LAYERS, 24, seed=2, pad_token_id=0),
        SemAlignConfig(
            output_dir=str(tmp_path / "run"), max_steps=3, report_to="none", use_cpu=True, **{**PAPER, "pairing": "last"}
        ),
        ROWS[:16],
    )
    trainer.save_model()
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "semalign.json",
        "semantic_map.safetensors",
        "_signals",
    }
    assert all("lora_" in name for name in load_file(tmp_path / "run" / "adapter_model.safetensors"))
    for name in ("adapter_config.json", "semalign.json"):
        assert str(tmp_path) not in (tmp_path / "run" / name).read_text()
    record = json.loads((tmp_path / "run" / "semalign.json").read_text())
    assert record["target"] == "target"
    assert record["pairing"]["source_layers"] == [2, 3, 4]
    assert record["data"]["align"]["rows"] == 16


def test_evaluation_is_exact_over_an_odd_split(tmp_path):
    trainer = make_trainer(tmp_path, pairing="last")
    metrics = trainer.evaluate()
    rows = list(trainer.eval_dataset)
    kl = loss = relation = tokens = 0.0
    for row in rows:
        batch = trainer.data_collator([row])
        count = valid_positions(batch["labels"]).sum()
        terms = [expected_loss(trainer, batch, stage) for stage in range(TARGET_LAYERS)]
        logits = trainer.model(input_ids=batch["input_ids"]).logits
        loss += torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:]).item() * count
        kl, tokens = kl + terms[0][1].item() * count, tokens + count
        relation += sum(term.item() for term, _ in terms) / TARGET_LAYERS
    assert metrics["eval_kl"] == pytest.approx(float(kl / tokens), rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(float(loss / tokens), rel=1e-4)
    assert metrics["eval_relation"] == pytest.approx(relation / len(rows), rel=1e-4)


def test_evaluation_during_training_does_not_disturb_it(tmp_path):
    plain = make_trainer(tmp_path / "a")
    watched = make_trainer(tmp_path / "b", eval_strategy="steps", eval_steps=2)
    plain.train()
    watched.train()
    assert torch.equal(adapter(plain), adapter(watched))
    assert [entry["step"] for entry in watched.state.log_history if "eval_kl" in entry] == [2, 4, 6]


def test_training_lowers_the_held_out_kl(tmp_path):
    rows = random_rows([(4, 6)] * 200, seed=3)
    trainer = make_trainer(tmp_path, max_steps=150, train=rows[:160], evaluation=rows[160:], per_device_train_batch_size=16)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.9 * before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_backward_stops_at_the_frontier(tmp_path, checkpointing, bf16):
    """Count the layers whose output gets a gradient: activation checkpointing would make it all of them."""
    reached: list[set[int]] = []

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            reached.append(set())

    trainer = make_trainer(
        tmp_path, max_steps=3, activation_checkpointing=checkpointing, bf16=bf16, relation_weight=0.5, callbacks=[Count()]
    )

    def watch(module, args, output, layer):
        if output.requires_grad:
            output.register_hook(lambda grad: reached[-1].add(layer))

    for layer, module in enumerate(trainer.target_anatomy.layers):
        module.register_forward_hook(lambda m, a, o, layer=layer: watch(m, a, o, layer))
    trainer.train()
    assert reached == [{0, 1, 2}, {1, 2}, {2}]
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("frontier", ["single", "cumulative", "joint"])
def test_lora_that_has_not_trained_yet_is_not_run(tmp_path, frontier):
    """It adds zero; in a second training it does not any more, and runs."""
    ran: list[set[int]] = []

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            ran.append(set())

    trainer = make_trainer(tmp_path, max_steps=3, frontier=frontier, callbacks=[Count()])
    for index, layer in enumerate(trainer.target_anatomy.layers):
        layer.mlp.up_proj.lora_A["default"].register_forward_hook(lambda *_, index=index: ran[-1].add(index))
    trainer.train()
    everything = set(range(TARGET_LAYERS))
    assert ran == ([everything] * 3 if frontier == "joint" else [{0}, {0, 1}, {0, 1, 2}])
    trainer.train()
    assert ran[3:] == [everything] * 3


@pytest.mark.parametrize("bf16", [False, True])
def test_leaving_it_out_changes_no_weight(tmp_path, monkeypatch, bf16):
    left_out = make_trainer(tmp_path / "a", bf16=bf16)
    left_out.train()
    monkeypatch.setattr("hf_semalign.training.layerwise.skip_untouched", lambda *_: None)
    run = make_trainer(tmp_path / "b", bf16=bf16)
    run.train()
    assert torch.equal(adapter(left_out), adapter(run))


def test_activation_checkpointing_changes_no_weight(tmp_path):
    plain, saving = make_trainer(tmp_path / "a"), make_trainer(tmp_path / "b", activation_checkpointing=True)
    plain.train()
    saving.train()
    torch.testing.assert_close(adapter(saving), adapter(plain), rtol=1e-5, atol=1e-6)


def test_training_and_evaluation_make_no_logits_of_the_target(tmp_path):
    trainer, made = make_trainer(tmp_path), []
    trainer.target_anatomy.head.register_forward_hook(lambda module, args, logits: made.append(logits.numel()))
    trainer.train()
    trainer.evaluate()
    assert len(made) > 6 and not any(made)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bf16", [False, True])
def test_weights_are_loaded_as_precision_says(tmp_path, stored, bf16):
    """Without bf16, training is in 32 bits, whatever the files hold; with it they keep their dtype."""
    for name, layers, width in (("target", TARGET_LAYERS, WIDTH), ("source", SOURCE_LAYERS, 24)):
        tiny_llama(layers, width, pad_token_id=0).to(stored).save_pretrained(tmp_path / name)
    args = SemAlignConfig(output_dir=str(tmp_path / "run"), max_steps=1, bf16=bf16, report_to="none", disable_tqdm=True)
    assert args.device.type == "cpu" or torch.accelerator.is_available()  # bf16 needs no use_cpu where there is no GPU
    trainer = SemAlignTrainer(str(tmp_path / "target"), str(tmp_path / "source"), args, ROWS[:16])
    trainer.train()
    weights = {p.dtype for name, p in trainer.model.named_parameters() if "lora_" not in name}
    expected = stored if bf16 else torch.float32
    assert weights == {expected} == {trainer.source.dtype} == {trainer.objective.source_head.weight.dtype}


def test_slow_bf16_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("hf_semalign.training.engines.product_seconds", lambda dtype: 6.0 if dtype == torch.bfloat16 else 1.0)
    make_trainer(tmp_path / "a", bf16=True)
    assert "multiplies bfloat16 6 times more slowly than float32: consider bf16=False" in caplog.text
    caplog.clear()
    make_trainer(tmp_path / "b")
    assert "more slowly" not in caplog.text


def test_bf16_stays_close_to_float32(tmp_path):
    full, half = make_trainer(tmp_path / "a"), make_trainer(tmp_path / "b", bf16=True)
    full.train()
    half.train()
    for left, right in zip(full.state.log_history[:6], half.state.log_history[:6], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=0.05)


def test_sample_ids_reach_the_step(tmp_path):
    seen = []
    trainer = make_trainer(tmp_path, max_steps=3)
    find = trainer.signals.find
    trainer.signals.find = lambda batch: (seen.append(batch["example_id"]), find(batch))[1]
    trainer.train()
    known = set(trainer.train_dataset["example_id"])
    assert len(seen) == 3
    assert {int(i) for ids in seen for i in ids} <= known


def test_progress_bar_names_the_stage(tmp_path, capfd):
    make_trainer(tmp_path, disable_tqdm=False, max_steps=60, logging_steps=100).train()
    shown = capfd.readouterr().err
    assert "training, stage 3/3, layer 2: 100%" in shown


def test_extract_rows_are_held_out_of_the_training_rows_when_none_are_given(tmp_path, caplog):
    args = SemAlignConfig(output_dir=str(tmp_path), max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True, **PAPER)
    models = tiny_llama(TARGET_LAYERS, WIDTH, pad_token_id=0), tiny_llama(SOURCE_LAYERS, 24)
    trainer = SemAlignTrainer(*models, args, ROWS[:20])
    assert trainer.data_record["extract"]["rows"] == 4
    assert trainer.data_record["align"]["rows"] == 16
    assert "4 of 20 training rows are held out" in caplog.text
    assert len(trainer.pairing.scores) == SOURCE_LAYERS


def test_given_pairing_and_map_are_used(tmp_path):
    first = make_trainer(tmp_path / "a")
    pairing = pair_layers(SOURCE_LAYERS, TARGET_LAYERS, [0, 0, 4])
    args = SemAlignConfig(
        output_dir=str(tmp_path / "b"), max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True, **PAPER
    )
    models = tiny_llama(TARGET_LAYERS, WIDTH, pad_token_id=0), tiny_llama(SOURCE_LAYERS, 24)
    trainer = SemAlignTrainer(*models, args, ROWS[:16], pairing=pairing, semantic_map=first.semantic_map)
    assert trainer.pairing.source_layers == (0, 0, 4)
    assert torch.equal(trainer.semantic_map.matrix, first.semantic_map.matrix)


def test_text_rows_and_model_folders_with_tokenizers(tmp_path):
    tokenizer = word_tokenizer([f"w{i}" for i in range(94)])
    for name, model in (("target", tiny_llama(TARGET_LAYERS, WIDTH)), ("source", tiny_llama(SOURCE_LAYERS, 24))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(12)]
    args = SemAlignConfig(
        output_dir=str(tmp_path / "run"), max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True, **PAPER
    )
    trainer = SemAlignTrainer(str(tmp_path / "target"), str(tmp_path / "source"), args, rows)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "run" / "tokenizer.json").is_file()
    assert trainer.semantic_map.shared_tokens == 97


@pytest.mark.parametrize("loaded", [True, False])
def test_padded_heads_of_one_tokenizer_share_its_rows(tmp_path, loaded):
    """As Qwen2.5 0.5B and 7B: 151,936 and 152,064 rows over one tokenizer."""
    tokenizer = word_tokenizer([f"w{i}" for i in range(94)])
    target, source = tiny_llama(TARGET_LAYERS, WIDTH, vocab=100), tiny_llama(SOURCE_LAYERS, 24, vocab=104)
    for name, model in (("target", target), ("source", source)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    models = [str(tmp_path / "target"), str(tmp_path / "source")]
    if not loaded:
        models = [LlamaForCausalLM.from_pretrained(model) for model in models]
    args = SemAlignConfig(
        output_dir=str(tmp_path / "run"), max_steps=3, report_to="none", use_cpu=True, **{**PAPER, "pairing": "last"}
    )
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(12)]
    trainer = SemAlignTrainer(*models, args, rows, processing_class=tokenizer)
    assert trainer.semantic_map.shared_tokens == 97
    expected = torch.linalg.pinv(target.lm_head.weight[:97].double()) @ source.lm_head.weight[:97].double()
    torch.testing.assert_close(trainer.semantic_map.matrix, expected.float())
    batch = trainer.data_collator(list(trainer.train_dataset)[:4])
    valid = valid_positions(batch["labels"])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    source_logits, target_logits = source(**inputs).logits[valid][:, :97], target(**inputs).logits[valid][:, :97]
    log_probabilities = target_logits.log_softmax(-1), source_logits.log_softmax(-1)
    kl = torch.nn.functional.kl_div(*log_probabilities, log_target=True, reduction="batchmean")
    trainer.args.relation_weight = 0.0
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), kl)


def test_report_integrations_get_both_terms_and_the_stage(tmp_path):
    logged = []

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(logs)

    make_trainer(tmp_path, max_steps=3, callbacks=[Report()]).train()
    assert [(logs["stage"], {"kl", "relation", "learning_rate"} <= logs.keys()) for logs in logged[:3]] == [
        (1, True), (2, True), (3, True),
    ]  # fmt: skip


def test_the_optimizer_knows_every_lora_parameter_and_nothing_else(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.train()
    known = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert known == {id(p) for layer in trainer.lora_layers for p in layer}
    assert {id(p) for name, p in trainer.model.named_parameters() if "lora_" in name} == known


def test_several_eval_sets_and_rows_of_text(tmp_path):
    tokenizer = word_tokenizer([f"w{i}" for i in range(94)])
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(20)]
    args = SemAlignConfig(
        output_dir=str(tmp_path), max_steps=3, report_to="none", use_cpu=True, signals="online", **{**PAPER, "pairing": "last"}
    )
    trainer = SemAlignTrainer(
        tiny_llama(TARGET_LAYERS, WIDTH),
        tiny_llama(SOURCE_LAYERS, 24),
        args,
        rows[:12],
        eval_dataset={"one": rows[12:15], "two": rows[15:]},
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    assert {"eval_one_kl", "eval_two_kl"} <= metrics.keys()
    assert trainer.evaluate(rows[15:])["eval_kl"] == pytest.approx(metrics["eval_two_kl"])


@pytest.mark.parametrize("given", ["folders", "models"])
def test_folders_without_a_tokenizer_serve_for_token_ids(tmp_path, given, caplog):
    for name, model in (
        ("target", tiny_llama(TARGET_LAYERS, WIDTH, pad_token_id=0)),
        ("source", tiny_llama(SOURCE_LAYERS, 24)),
    ):
        model.save_pretrained(tmp_path / name)
    models = [str(tmp_path / "target"), str(tmp_path / "source")]
    if given == "models":
        models = [LlamaForCausalLM.from_pretrained(model) for model in models]
    args = SemAlignConfig(
        output_dir=str(tmp_path / "run"), max_steps=3, report_to="none", use_cpu=True, **{**PAPER, "pairing": "last"}
    )
    tokenizer = None if given == "folders" else word_tokenizer([f"w{i}" for i in range(94)])
    trainer = SemAlignTrainer(*models, args, ROWS[:16], processing_class=tokenizer)
    trainer.train()
    assert trainer.semantic_map.shared_tokens == 97
    assert "No tokenizer was found with the model" in caplog.text


def test_saving_leaves_a_card_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    (tmp_path / "run" / "README.md").write_text("my own notes")
    trainer.save_model()
    assert (tmp_path / "run" / "README.md").read_text() == "my own notes"


def test_pairing_may_come_from_a_command_line(tmp_path):
    (args,) = HfArgumentParser(SemAlignConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--pairing", "[0, 2, 4]", "--frontier", "joint"]
    )
    assert args.pairing == [0, 2, 4]


def test_pushing_leaves_a_readme_of_ones_own_alone(tmp_path):
    """What is pushed, and how: tests/test_hub.py."""
    trainer = make_trainer(tmp_path)
    (tmp_path / "run" / "README.md").write_text("my own notes")
    with pytest.raises(ValueError, match=r"README\.md is not the card of a run: .*Move it away"):
        trainer.push_to_hub()
    assert (tmp_path / "run" / "README.md").read_text() == "my own notes"


@pytest.mark.parametrize(("source_rows", "target_rows"), [(97, 98), (98, 97), (104, 112), (97, 97)])
def test_unequal_heads_share_the_rows_of_the_tokens_that_both_know(tmp_path, source_rows, target_rows, caplog):
    """Added tokens (WizardCoder) on either side, and padded heads (Qwen2.5): map and KL are over the shared rows."""
    words = [f"w{i}" for i in range(94)]
    added = {98: ["<added>"]}
    tokenizers = {rows: word_tokenizer([*words, *added.get(rows, [])]) for rows in (source_rows, target_rows)}
    tiny_llama(SOURCE_LAYERS, 24, vocab=source_rows, seed=2).save_pretrained(tmp_path / "source")
    tokenizers[source_rows].save_pretrained(tmp_path / "source")
    tokenizer = tokenizers[target_rows]
    if target_rows == 98:
        tokenizer.pad_token = "<added>"  # an id that the source has no embedding for
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": " w3 w4" + " w5" * (i % 3)} for i in range(24)]
    trainer = SemAlignTrainer(
        tiny_llama(TARGET_LAYERS, WIDTH, vocab=target_rows, seed=1),
        str(tmp_path / "source"),
        SemAlignConfig(
            output_dir=str(tmp_path / "run"), max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True, **PAPER
        ),
        rows[:16],
        eval_dataset=rows[20:],
        extract_dataset=rows[16:20],
        processing_class=tokenizer,
    )
    assert trainer.semantic_map.shared_tokens == 97
    assert ("both distributions renormalised" in caplog.text) is (max(source_rows, target_rows) > 97)
    trainer.train()
    metrics = trainer.evaluate()
    source = LlamaForCausalLM.from_pretrained(tmp_path / "source")
    expected = []
    for row in trainer.eval_dataset:
        ids = torch.tensor([row["input_ids"]])
        valid = torch.tensor(row["labels"])[1:] != -100
        with torch.no_grad():
            ours, theirs = (model(input_ids=ids).logits[0, :-1, :97][valid] for model in (trainer.model, source))
        expected.append((theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1))
    assert metrics["eval_kl"] == pytest.approx(torch.cat(expected).mean().item(), rel=1e-4)


def test_losses_by_stage_go_where_report_to_says(tmp_path):
    """Both terms and the stage, live, as TensorBoard shows them."""
    trainer = make_trainer(tmp_path, report_to="tensorboard", max_steps=6, relation_weight=0.5)
    trainer.train()
    (events,) = (tmp_path / "run").rglob("events.out.tfevents*")
    shown = EventAccumulator(str(events.parent)).Reload()
    told = {
        name: [(event.step, event.value) for event in shown.Scalars(f"train/{name}")] for name in ("relation", "kl", "stage")
    }
    history = [entry for entry in trainer.state.log_history if "stage" in entry]
    assert [value for _, value in told["stage"]] == [1, 1, 2, 2, 3, 3]
    for name, values in told.items():
        assert values == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in history]


def test_a_package_that_report_to_names_and_nobody_has(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_semalign.training.engines.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=r"report_to names \['wandb'\], which is not installed"):
        make_trainer(tmp_path, report_to=["tensorboard", "wandb"])
