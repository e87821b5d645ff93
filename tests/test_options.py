"""Every option of ``TrainingArguments`` means here what it means in transformers, or is set right, or is refused."""

import copy
from dataclasses import fields

import pytest
import torch
from conftest import batches_of, random_rows, table, tiny_llama
from test_trainer import ROWS, SOURCE_LAYERS, TARGET_LAYERS, WIDTH, adapter, make_trainer
from transformers import TrainerCallback, TrainingArguments

from hf_semalign import SemAlignConfig, SemAlignTrainer
from hf_semalign.cache.source import Source
from hf_semalign.method.attribution import attribute_layers

# What the Trainer does with them does not depend on losses, layers or caches.
SAME = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm
bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
gradient_checkpointing_kwargs torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node
logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project
trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
per_device_eval_batch_size eval_on_start save_strategy save_steps save_on_each_node save_total_limit push_to_hub
hub_token hub_private_repo hub_model_id hub_revision load_best_model_at_end metric_for_best_model ignore_data_skip
restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu dataloader_num_workers
dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend ddp_timeout debug skip_memory_metrics resume_from_checkpoint
"""
# They are about predictions, which evaluation does not keep, or for scripts; or about columns that only encoded rows have.
WITHOUT_EFFECT = """
prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps do_train do_eval do_predict
local_rank remove_unused_columns length_column_name liger_kernel_config
"""
SET_RIGHT = """
greater_is_better dataloader_drop_last save_only_model train_sampling_strategy
"""
# By a value that is refused.
REFUSED = {
    "auto_find_batch_size": True,
    "average_tokens_across_devices": False,
    "batch_eval_metrics": True,
    "bf16_full_eval": True,
    "dataloader_in_order": False,
    "ddp_find_unused_parameters": False,  # off frontier: joint
    "ddp_static_graph": True,
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "enable_jit_checkpoint": True,
    "fp16_full_eval": True,
    "fsdp": "full_shard",
    "fsdp_config": {"min_num_params": 1},
    "hub_always_push": True,
    "hub_strategy": "checkpoint",
    "include_for_metrics": ["loss"],
    "label_names": ["answers"],
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "optim_target_modules": ["up_proj"],
    "parallelism_config": {"tp_size": 2},
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "use_cache": True,
    "use_liger_kernel": True,
    "accelerator_config": {"split_batches": True},
}


def test_every_option_is_known():
    """A newer transformers with an option that is not here fails by its name."""
    known = [*SAME.split(), *WITHOUT_EFFECT.split(), *SET_RIGHT.split(), *REFUSED]
    assert len(known) == len(set(known))
    assert {item.name for item in fields(TrainingArguments)} - set(known) == set()


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_is_refused_by_name(name, tmp_path):
    frontier = {"frontier": "single"} if name == "ddp_find_unused_parameters" else {}
    with pytest.raises(ValueError, match=name):
        SemAlignConfig(output_dir=str(tmp_path), use_cpu=True, **{name: REFUSED[name]}, **frontier)


def test_rebalanced_batches_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must not be 'batch_rebalance'"):
        SemAlignConfig(output_dir=str(tmp_path), use_cpu=True, train_sampling_strategy="batch_rebalance")


@table(
    "settings, greater",
    [
        ("KL", {"metric_for_best_model": "eval_kl"}, False),
        ("KL of one of several", {"metric_for_best_model": "eval_code_kl"}, False),
        ("relation loss", {"metric_for_best_model": "relation"}, False),
        ("answer loss", {"metric_for_best_model": "eval_loss"}, False),
        ("as the caller says", {"metric_for_best_model": "eval_kl", "greater_is_better": True}, True),
        ("a callback's own", {"metric_for_best_model": "eval_score"}, True),
    ],
)
def test_less_is_better_of_losses(settings, greater, tmp_path):
    assert SemAlignConfig(output_dir=str(tmp_path), use_cpu=True, **settings).greater_is_better is greater


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_kl",
    "learning_rate": 0.3,  # so that KL goes up again
    "frontier": "joint",
}


def test_the_best_weights_are_those_of_the_lowest_kl_also_when_started_again(tmp_path):
    trainer = make_trainer(tmp_path, **BEST)
    trainer.train()
    found = {entry["step"]: entry["eval_kl"] for entry in trainer.state.log_history if "eval_kl" in entry}
    best = min(found, key=found.__getitem__)
    assert best != max(found), "or the last weights would be the best"
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_kl"] == pytest.approx(found[best], rel=1e-6)
    again = make_trainer(tmp_path, **BEST)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(adapter(again), adapter(trainer))


class Stop(TrainerCallback):
    """Ends a run after some steps, as an interruption does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_checkpoint_without_an_optimizer_is_not_gone_on_from(tmp_path):
    settings = {"save_only_model": True, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, callbacks=[Stop(4)], **settings).train()
    with pytest.raises(ValueError, match=r"checkpoint-4 has no optimizer, as save_only_model leaves it"):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "other", **settings)
    whole.train()
    again = make_trainer(tmp_path / "other", **settings)
    again.train(resume_from_checkpoint=True)  # of a run that is over, which needs none
    assert torch.equal(adapter(again), adapter(whole))


def test_drop_last_is_about_training_rows_alone(tmp_path):
    expected = make_trainer(tmp_path, evaluation=ROWS[16:22], dataloader_drop_last=False).evaluate()["eval_loss"]
    dropping = make_trainer(tmp_path / "drop", evaluation=ROWS[16:22], dataloader_drop_last=True)
    assert dropping.evaluate()["eval_loss"] == expected
    assert dropping.predict(dropping.eval_dataset).metrics["test_loss"] == expected
    assert dropping.args.dataloader_drop_last
    with pytest.raises(ValueError, match="would drop all 3 training rows, which do not fill one batch of 4"):
        make_trainer(tmp_path / "few", train=ROWS[:3], dataloader_drop_last=True)


@pytest.mark.parametrize(
    "change", [{"data_seed": 7}, {"adam_beta2": 0.9}, {"lr_scheduler_kwargs": {"num_cycles": 0.3}}], ids=str
)
def test_another_order_of_the_data_or_optimizer_is_another_run(tmp_path, change):
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    make_trainer(tmp_path, callbacks=[Stop(4)], **settings).train()
    with pytest.raises(ValueError, match=f"was made with other {next(iter(change))}"):
        make_trainer(tmp_path, **settings, **change).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("settings", [{"train_sampling_strategy": "group_by_length"}, {}], ids=["by length", "dropout"])
def test_what_is_drawn_does_not_depend_on_what_was_cached(tmp_path, settings):
    def trained(name):
        args = SemAlignConfig(
            output_dir=str(tmp_path / name), signals_dir=str(tmp_path / "signals"), max_steps=4, learning_rate=1e-2,
            per_device_train_batch_size=4, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
            pairing="attribution", scale="match", **settings,
        )  # fmt: skip
        source = tiny_llama(SOURCE_LAYERS, 24, seed=2, pad_token_id=0)
        target = tiny_llama(TARGET_LAYERS, WIDTH, seed=1, pad_token_id=0, attention_dropout=0.2)
        trainer = SemAlignTrainer(target, source, args, ROWS[:16], extract_dataset=ROWS[27:33])
        torch.rand(len(name))  # whatever else draws between the constructor and training
        trainer.train()
        return adapter(trainer)

    assert torch.equal(trained("cold"), trained("warm, and with another name"))


class LooksAtTheBase(TrainerCallback):
    """What a callback does that compares the adapter with its base."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with model.disable_adapter():
            pass


def test_a_callback_that_switches_adapters_off_and_on_moves_no_other_layer(tmp_path):
    plain = make_trainer(tmp_path)
    plain.train()
    looked_at = make_trainer(tmp_path / "looked at", callbacks=[LooksAtTheBase()])
    looked_at.train()
    assert torch.equal(adapter(looked_at), adapter(plain))


def test_no_gradient_is_taken_through_attention_of_cudnn(tmp_path):
    """Whose backward pass gives NaN for padded batches of some lengths, on the GPUs that this library is for."""
    seen = []

    def batches(rows):
        for batch in batches_of(rows, 2):
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
            yield batch

    class Look(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())

    rows = random_rows([(3, 3)] * 4)
    attribute_layers(tiny_llama(2, 16), batches(rows))
    make_trainer(tmp_path, callbacks=[Look()], gradient_accumulation_steps=2, max_steps=3).train()
    assert len(seen) > 2 and not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()  # as everybody else finds it


@pytest.mark.parametrize("wrapped", [False, True])
def test_one_object_is_not_source_and_target(tmp_path, wrapped):
    model = tiny_llama(3, 16, pad_token_id=0)
    args = SemAlignConfig(output_dir=str(tmp_path), use_cpu=True, signals="online", max_steps=1)
    with pytest.raises(ValueError, match="Source and target are the same model object"):
        SemAlignTrainer(model, Source(model) if wrapped else model, args, random_rows([(3, 3)] * 8))


def test_a_map_of_ones_own_finds_no_states_of_another(tmp_path):
    def evaluated(name, semantic_map):
        args = SemAlignConfig(
            output_dir=str(tmp_path / name), signals_dir=str(tmp_path / "signals"), max_steps=1, report_to="none", use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        models = (
            tiny_llama(TARGET_LAYERS, WIDTH, seed=1, pad_token_id=0),
            tiny_llama(SOURCE_LAYERS, 24, seed=2, pad_token_id=0),
        )
        trainer = SemAlignTrainer(*models, args, ROWS[:16], eval_dataset=ROWS[16:27], semantic_map=semantic_map)
        return trainer.semantic_map, trainer.evaluate()["eval_relation"]

    built, first = evaluated("built", None)
    given = copy.deepcopy(built).to(torch.float64)
    same, second = evaluated("same", given)
    assert given.matrix.dtype == torch.float64, "the caller's map was changed in place"
    assert second == pytest.approx(first, rel=1e-5)
    given.matrix.copy_(torch.flip(given.matrix, [0]))
    other, third = evaluated("other", given)
    assert built.fingerprint == same.fingerprint != other.fingerprint
    assert third != pytest.approx(first, rel=1e-2)


def test_a_float16_source_whose_mapped_states_are_large(tmp_path):
    def evaluated(dtype):
        source = tiny_llama(SOURCE_LAYERS, 24, seed=2, pad_token_id=0).to(dtype)
        target = tiny_llama(TARGET_LAYERS, WIDTH, seed=1, pad_token_id=0)
        target.lm_head.weight.data *= 1e-6  # the map's are a million times larger for it
        args = SemAlignConfig(output_dir=str(tmp_path / str(dtype)), max_steps=1, report_to="none", use_cpu=True)
        trainer = SemAlignTrainer(target, source, args, ROWS[:16], eval_dataset=ROWS[16:27])
        return trainer.evaluate()["eval_relation"]

    assert evaluated(torch.float16) == pytest.approx(evaluated(torch.float32), rel=0.05)


def test_a_new_run_deletes_no_checkpoints_of_another(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, **settings).train()
    with pytest.raises(ValueError, match=r"has checkpoints of another run, such as .*checkpoint-2 \(different seed\)"):
        make_trainer(tmp_path, seed=7, **settings).train()
    make_trainer(tmp_path, **settings).train()  # its own may go
    for name in ("semalign.json", "checksums.json", "trainer_state.json"):  # one that was broken off goes as well
        (tmp_path / "run" / "checkpoint-6" / name).unlink()
    make_trainer(tmp_path, **settings).train()
    foreign = tmp_path / "run" / "checkpoint-5000"
    foreign.mkdir()
    (foreign / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint-5000 \(it has no semalign.json\)"):
        make_trainer(tmp_path, **settings).train()
    assert foreign.is_dir()


@pytest.mark.parametrize("role", ["source", "target"])
def test_the_folder_of_a_model_is_no_output_folder(refused, good, role):
    refused(f"output_dir is the {role}'s folder", f"output_dir={good / role}")
