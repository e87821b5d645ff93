"""``LayerwiseTrainer``: transformers' ``Trainer`` for LoRA that trains layer by layer, under every engine.

It knows nothing about the losses. It adds the stages of a frontier, FSDP2 and ZeRO-2, a comparison of the ranks, a check that
losses are finite, and checkpoints that are complete and belong to their run.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.constants import FSDP_MODEL_NAME
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, set_seed

from hf_semalign.config import SemAlignConfig
from hf_semalign.errors import InputError, NotFiniteError
from hf_semalign.files import checksum, claimed, digest, disk_errors_explained
from hf_semalign.method.frontier import Frontier, FrontierSchedule
from hf_semalign.models.anatomy import Anatomy, base_model
from hf_semalign.models.hooks import without_cudnn_attention
from hf_semalign.models.loading import is_quantised
from hf_semalign.splits import COLUMNS, Collator
from hf_semalign.tokenization import IGNORED
from hf_semalign.training.checkpoints import (
    CHECKSUMS,
    CheckpointOnInterrupt,
    check_run,
    checkpoints_of,
    damage,
    differences,
    foreign_checkpoint,
    last_checkpoint,
    rotate,
    seal,
    step_of,
)
from hf_semalign.training.engines import autocast_under_zero, check_sharded, check_shards, part_by_layer
from hf_semalign.training.order import rows_by_stage
from hf_semalign.training.stages import (
    FrontierCallback,
    StageLog,
    StageProgress,
    lora_parameters,
    skip_untouched,
    train_only,
    trainable,
    whole,
)

logger = logging.getLogger(__name__)


class LayerwiseTrainer(Trainer):
    """Train the LoRA of a model's decoder layers stage by stage.

    A subclass computes the losses (``compute_loss``), names their terms (:meth:`loss_terms`) and describes a run
    (:meth:`record`).

    Args:
        model: the target with LoRA in its decoder layers.
        args: a :class:`SemAlignConfig`.
        anatomy: the parts of the target.
        frontier: which layers train at which stage.
        schedule: the stages, in optimizer steps.
        learning_rate_factor: share of the peak learning rate at a step.
        callbacks: further callbacks.
        **given: other arguments of the Trainer.

    Attributes:
        target_anatomy: the parts of the target.
        lora_layers: LoRA parameters by target layer.

    Raises:
        ValueError: the engine does not support the target.
    """

    loss_is_scaled_for_ga = True
    args: SemAlignConfig

    def __init__(
        self,
        model: PeftModel,
        args: SemAlignConfig,
        *,
        anatomy: Anatomy,
        frontier: Frontier,
        schedule: FrontierSchedule,
        learning_rate_factor: Callable[[int], float],
        callbacks: list[TrainerCallback] | None,
        **given: Any,
    ) -> None:
        self.target_anatomy, self.frontier, self.schedule = anatomy, frontier, schedule
        self._learning_rate_factor = learning_rate_factor
        self.lora_layers = lora_parameters(anatomy.layers)
        super().__init__(model=model, args=args, callbacks=callbacks, **given)
        quantised = is_quantised(cast(Any, base_model(model)).config)
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and quantised:
            engine = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise InputError(f"The target is quantised, and {engine} is not known to work with that: use DDP.")
        if self.is_fsdp_enabled:
            check_shards(anatomy.layers, args.world_size)
        if self.is_deepspeed_enabled:
            autocast_under_zero(self.accelerator.state.deepspeed_plugin.deepspeed_config)
            model.to(args.device)  # the Trainer would leave it to DeepSpeed, which exists only while training
        self.model_accepts_loss_kwargs = True  # compute_loss takes num_items_in_batch, whatever the model takes
        self._loss_shifts_labels = True
        self._interrupt = CheckpointOnInterrupt()
        self.add_callback(self._interrupt)  # before the frontier moves
        self._frontier_callback = FrontierCallback(frontier, schedule, self.lora_layers, self.enter_stage)
        self.add_callback(self._frontier_callback)
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        self.add_callback(StageLog() if args.disable_tqdm else StageProgress(self._frontier_callback))
        self._parameters = model.num_parameters(exclude_embeddings=True)
        self._examples_in_batch: list[torch.Tensor] = []
        self._broken: list[str] = []  # what is not finite in the current step

    def loss_terms(self) -> dict[str, float]:
        """The terms of the last batch's loss by name, for error messages."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """The facts of a run, as plain values. A checkpoint whose facts differ is refused."""
        raise NotImplementedError

    def save_weights(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """Write the adapter into a folder, with ``weights`` by name if they are not the model's own."""
        raise NotImplementedError

    def begin_training(self) -> None:
        """Called before the first step, after optimizer and checkpoint are loaded."""

    def rows_by_stage(self) -> list[np.ndarray] | None:
        """Numbers of the rows that each stage reads; ``None`` if they are not known before training, for example in a subclass
        that samples rows in its own way.
        """
        order = ("get_train_dataloader", "_get_dataloader", "_get_train_sampler")
        if any(getattr(type(self), name) is not getattr(Trainer, name) for name in order):
            return None
        return rows_by_stage(self.args, self.schedule, len(cast(Dataset, self.train_dataset)))

    # Precision

    @property
    def _precision(self) -> str:
        """Precision of forward passes: ``no``, ``bf16`` or ``fp16``."""
        return "bf16" if self.is_deepspeed_enabled and self.args.bf16 else str(self.accelerator.mixed_precision)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Autocast, the same under every engine. accelerate leaves it to DeepSpeed, which exists only while training."""
        if self.is_deepspeed_enabled:
            return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)
        return self.accelerator.autocast()

    # Schedule and optimizer

    def set_initial_training_values(self, args, dataloader):
        """The Trainer's count of epochs and steps. With ``per_stage``, each stage has the whole budget."""
        if args.stage_budget == "per_stage":
            args = copy.copy(args)
            args.max_steps = self.schedule.total_steps
        return super().set_initial_training_values(args, dataloader)

    def create_optimizer(self, model=None):
        """Make all of LoRA trainable while the optimizer is made. ``FrontierCallback`` freezes layers afterwards."""
        train_only(self.lora_layers, range(len(self.lora_layers)))
        made, optimizer = self.optimizer is None, super().create_optimizer(model)
        if made and self.is_deepspeed_enabled:
            part_by_layer(optimizer, self.lora_layers)
        return optimizer

    def _shard(self) -> None:
        """Under FSDP, shard the model before its first forward. accelerate shards it only together with its optimizer."""
        if not self.is_fsdp_enabled or isinstance(self.model, FSDPModule):
            return
        self.accelerator.state.fsdp_plugin.mixed_precision_policy = None  # autocast, as under every other engine
        self.create_optimizer()
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.model_wrapped = self.model
        check_sharded(self.target_anatomy.layers)
        register_fsdp_forward_method(self.model, "generate")
        self.lora_layers = self._frontier_callback.layers = lora_parameters(self.target_anatomy.layers)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """A scheduler whose warmup and decay restart with each stage."""
        if num_training_steps != self.schedule.total_steps:
            raise InputError(
                f"The run has {num_training_steps} steps, but its stages were planned for {self.schedule.total_steps}: set the "
                "budget before the trainer is made."
            )
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or cast(Optimizer, self.optimizer), self._learning_rate_factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if self.model_wrapped is self.model and getattr(self.model, "_is_accelerate_prepared", False):
            # An evaluation before training prepared it without DDP. accelerate would leave it so, and not average gradients.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False
        if self.is_deepspeed_enabled:
            if self.deepspeed is not None:
                self.deepspeed.destroy()  # removes the hooks of an earlier training
            self.model_wrapped = self.model
            if resume_from_checkpoint is not None:
                self._check_run(resume_from_checkpoint)
        self._shard()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.args.activation_checkpointing:
            # Checkpointing makes the embeddings' output require a gradient, so backward would run through all layers.
            base_model(self.model).disable_input_require_grads()
        self._broken.clear()
        self.begin_training()
        return prepared

    # Batches and steps

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = list(COLUMNS)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The batches of a step, without the rows that accelerate repeats, and with rows of similar length together."""
        samples, num_items = super().get_batch_samples(map(self._without_repeats, epoch_iterator), num_batches, device)
        if len(samples) > 1:
            samples = cast(Collator, self.data_collator).by_length(samples)
        self._examples_in_batch = [batch["example_id"] for batch in samples]
        return samples, num_items

    def _without_repeats(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Ignore the rows with which accelerate fills the last global batch of an epoch, so that one process and several learn
        from the same rows.
        """
        args = self.args
        # Counted here, because accelerate loses count in an epoch that a resumed run starts in the middle.
        rest = len(cast(Dataset, self.train_dataset)) % (args.train_batch_size * args.world_size)
        if rest and self.accelerator.gradient_state.end_of_dataloader and not args.dataloader_drop_last:
            fresh = rest - len(batch["labels"]) * self.accelerator.process_index
            batch["labels"][max(fresh, 0) :] = IGNORED
        return batch

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run forward and backward of a batch, and check that its loss is finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            self._broken.append(f"the loss of the examples {inputs['example_id'].tolist()} is ({self._terms()})")
        return loss

    def floating_point_ops(self, inputs) -> int:
        """The Trainer's estimate. The parameters are counted only once."""
        return 6 * inputs["input_ids"].numel() * self._parameters

    def _clip_grad_norm(self, model):
        """Clip the gradients of the optimizer's parameters. Nothing else has a gradient."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._optimized(), self.args.max_grad_norm)

    def _optimized(self) -> list[nn.Parameter]:
        return [p for group in cast(Optimizer, self.optimizer).param_groups for p in group["params"]]

    def _terms(self) -> str:
        return ", ".join(f"{name} {term:.4g}" for name, term in self.loss_terms().items())

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm of a step's gradient. At this point all ranks agree whether the step may change anything.

        Raises:
            FloatingPointError: a loss or the gradient is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        fp16 = self.accelerator.scaler is not None  # the scaler skips such a step and lowers the scale
        odd = not fp16 and not torch.isfinite(torch.as_tensor(norm))
        news = torch.tensor([bool(self._broken), odd, self._interrupt.received is not None], device=self.args.device)
        loss, gradient, stopped = self.accelerator.reduce(news.int(), "sum").bool().tolist()
        if loss or gradient:
            if not loss:
                ids = torch.cat(self._examples_in_batch).tolist()
                self._broken.append(f"the gradient of the examples {ids} is, of a finite loss ({self._terms()})")
            step = self.state.global_step
            where = f"step {step + 1} of {self.schedule.total_steps} (stage {self.schedule.stage(step) + 1})"
            raise NotFiniteError(
                f"Not finite at {where}: {'; '.join(gather_object(self._broken))}. Nothing was learnt from this step; the last "
                f"checkpoint: {last_checkpoint(str(self.args.output_dir)) or 'none was written'}. Lower the learning rate, or "
                "look at these examples."
            )
        self._interrupt.agreed = stopped
        return norm

    def _check_weights(self) -> None:
        """Check that the adapter is finite. The optimizer can overflow although the gradient is finite.

        Raises:
            FloatingPointError: it is not. All ranks raise it, and nothing is saved.
        """
        finite = torch.stack([whole(p.detach()).isfinite().all() for layer in self.lora_layers for p in layer]).all()
        if self.accelerator.reduce((~finite).int(), "sum"):
            raise NotFiniteError(
                f"The adapter is not finite after step {self.state.global_step}, though the gradient was. It is not saved; the "
                f"last checkpoint: {last_checkpoint(str(self.args.output_dir)) or 'none was written'}. Lower the learning rate."
            )

    def enter_stage(self, stage: int) -> None:
        """Called before the first step of a stage."""
        self._compare_ranks()
        skip_untouched(self.target_anatomy.layers, self.frontier.trained(stage)[-1])

    def _compare_ranks(self) -> None:
        """Check that all ranks have the same adapter. They differ if gradients were not averaged.

        Raises:
            RuntimeError: they differ.
        """
        if self.is_fsdp_enabled:  # each number exists on one rank only
            return
        adapters = gather_object([digest([checksum(p) for layer in self.lora_layers for p in layer])])
        if len(set(adapters)) > 1:
            raise RuntimeError(f"The ranks' adapters differ after step {self.state.global_step}: {adapters}. Nothing is saved.")

    # Evaluation, saving and resuming

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate under every engine."""
        self._shard()
        enabled = self.is_deepspeed_enabled
        self.is_deepspeed_enabled = enabled and self.deepspeed is not None  # else the Trainer insists on ZeRO-3
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.is_deepspeed_enabled = enabled

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train. A run that resumes from its last step is finished, and takes no further step as it would in the Trainer.

        Raises:
            ValueError: another process trains in this ``output_dir``, or the checkpoint is damaged or belongs to another run.
            FloatingPointError: a loss or gradient is not finite (the step is not taken, and the last checkpoint stays), or the
                adapter is not finite (it is not saved).
            RuntimeError: the ranks' adapters differ.
            KeyboardInterrupt, SystemExit: SIGINT or SIGTERM was received. A checkpoint of the last step is written first.
        """
        path, folder = self._checkpoint(resume_from_checkpoint), str(self.args.output_dir)
        if path:
            state = TrainerState.load_from_json(str(Path(path) / TRAINER_STATE_NAME))
            if state.global_step >= self.schedule.total_steps:
                self._shard()
                self._load_from_checkpoint(self._best(state) or path)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled or (Path(path) / OPTIMIZER_NAME).is_file()):
                raise InputError(
                    f"{path} has no optimizer, as save_only_model leaves it: training would not go on as it began. Start anew "
                    "with resume_from_checkpoint=False, and leave save_only_model out of a run that may be interrupted."
                )
        if path is None or Path(path).resolve().parent != Path(folder).resolve():
            self._check_others()
        set_seed(self.args.seed)  # random numbers drawn so far depend on what was cached
        try:
            with (
                claimed(folder) if self.args.should_save else nullcontext(),
                self._interrupt.watching(),
                without_cudnn_attention(),
                disk_errors_explained(folder),
            ):
                output = super().train(path, *args, **kwargs)
        finally:
            skip_untouched(self.target_anatomy.layers, self.frontier.num_layers - 1)
        self._compare_ranks()
        self._check_weights()
        if self.state.global_step < self.schedule.total_steps:
            self._interrupt.leave()
        return output

    def _best(self, state: TrainerState) -> str | None:
        """The checkpoint with the best weights, if the run ends with these; otherwise ``None``."""
        if not self.args.load_best_model_at_end or state.best_global_step is None:
            return None
        best = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if found := damage(best):
            raise InputError(f"load_best_model_at_end needs the weights of {best}: {found}. Start anew, or set it to False.")
        return str(best)

    def _checkpoint(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to resume from, the same for all ranks. A damaged one is refused."""
        path = last_checkpoint(str(self.args.output_dir)) if wanted is True else wanted or None
        (path,) = broadcast_object_list([path])
        if path is None and wanted is not True:
            return None
        found = f"none in {self.args.output_dir} is whole" if path is None else damage(Path(path))
        if found:
            raise InputError(
                f"The run cannot resume from {path or 'a checkpoint'}: {found}. Name another one, or start anew with "
                "resume_from_checkpoint=False. Machines without a common disk need save_on_each_node."
            )
        return path

    def _save_checkpoint(self, model, trial) -> None:
        """Save a checkpoint with checksums, which are written last. Older checkpoints are deleted only then."""
        folder, limit = Path(str(self.args.output_dir)), self.args.save_total_limit
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._compare_ranks()
        self._check_weights()
        if self.args.should_save:
            (checkpoint / CHECKSUMS).unlink(missing_ok=True)
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(checkpoint)
            for other in checkpoints_of(folder):  # later ones belong to an earlier start of the run
                if step_of(other) > self.state.global_step:
                    shutil.rmtree(other, ignore_errors=True)
            rotate(folder, limit, self.state.best_model_checkpoint)

    def write_adapter(self, output_dir: str | None, *, checkpoint: bool) -> None:
        """Save the adapter as it is. Under FSDP and DeepSpeed only the adapter is gathered, not the base."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return super().save_model(output_dir, _internal_call=True)
        adapter = {
            name: whole(p.detach()).cpu() for name, p in cast(nn.Module, self.model).named_parameters() if "lora_" in name
        }
        self._save(output_dir, adapter)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Called by the Trainer to write a model."""
        if self.args.should_save:
            self.save_weights(Path(str(output_dir or self.args.output_dir)), state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: a checkpoint is unfinished and contains more than the Hub should get."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save all of LoRA. FSDP and DeepSpeed save what is trainable, for resuming."""
        with trainable(self.lora_layers, range(self.frontier.num_layers)):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the state of the layers that have trained. Under FSDP torch would give all trainable ones a state first."""
        begun = self.frontier.trained(self.schedule.stage(max(self.state.global_step - 1, 0)))[-1] + 1
        with trainable(self.lora_layers, range(begun)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Load the weights of a checkpoint of this run."""
        self._check_run(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _check_run(self, resume_from_checkpoint: str) -> None:
        """Refuse a checkpoint of another run, which had other pairs, settings or data."""
        marks = {"FSDP": f"{FSDP_MODEL_NAME}.bin", "DeepSpeed": "latest"}
        enabled = {"FSDP": self.is_fsdp_enabled, "DeepSpeed": self.is_deepspeed_enabled}
        for engine, mark in marks.items():
            if (Path(resume_from_checkpoint) / mark).is_file() != enabled[engine]:
                way = f"without {engine}, or with save_only_model" if enabled[engine] else f"under {engine}"
                raise InputError(
                    f"The checkpoint {resume_from_checkpoint} was made {way}: resume with the accelerate config of its run, or "
                    "start anew in another output_dir."
                )
        check_run(Path(resume_from_checkpoint), differences(Path(resume_from_checkpoint), self.record()))

    def _check_others(self) -> None:
        """Refuse to start anew in a folder with checkpoints of another run, because they would be deleted.

        Raises:
            ValueError: there are such checkpoints. The message names one and what differs.
        """
        (found,) = broadcast_object_list([foreign_checkpoint(self.args.output_dir, self.record())])
        if found:
            raise InputError(
                f"{self.args.output_dir} has checkpoints of another run, such as {found}, which this one would delete: choose "
                "another output_dir, or delete them first."
            )
