"""Stages of training: what trains in each, and the callbacks that move the frontier and report it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import ProgressCallback, TrainerCallback

from hf_semalign.method.frontier import Frontier, FrontierSchedule

logger = logging.getLogger(__name__)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of one that is sharded; all processes have to call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def lora_parameters(layers: Iterable[nn.Module]) -> list[list[nn.Parameter]]:
    """LoRA parameters by target layer, as they are now: sharding a model replaces them."""
    return [[p for name, p in layer.named_parameters() if "lora_" in name] for layer in layers]


def train_only(layers: Sequence[Sequence[nn.Parameter]], trained: range) -> None:
    """Make the given layers' parameters trainable, and freeze all others and drop their gradients.

    Args:
        layers: LoRA parameters by target layer.
        trained: layers to train.
    """
    for layer, parameters in enumerate(layers):
        for parameter in parameters:
            parameter.requires_grad_(layer in trained)
            if layer not in trained:
                parameter.grad = None


@contextmanager
def trainable(layers: Sequence[Sequence[nn.Parameter]], wanted: range) -> Iterator[None]:
    """Inside the block, which is no step, the LoRA of these layers counts as trainable and no other."""
    flags = [[p.requires_grad for p in parameters] for parameters in layers]
    try:
        for layer, parameters in enumerate(layers):
            for parameter in parameters:
                parameter.requires_grad_(layer in wanted)
        yield
    finally:
        for parameters, before in zip(layers, flags, strict=True):
            for parameter, flag in zip(parameters, before, strict=True):
                parameter.requires_grad_(flag)


def skip_untouched(layers: Iterable[nn.Module], deepest: int) -> None:
    """Take LoRA out of the forward of layers above the deepest that trains, where its ``B`` is still zero and it adds nothing.

    Args:
        layers: target layers, shallow to deep.
        deepest: the deepest layer that trains; LoRA up to there is in the forward.
    """
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(module, LoraLayer):
                matrices = (b.get_parameter("weight") for b in module.lora_B.values())
                module.enable_adapters(index <= deepest or any(bool(whole(b).any()) for b in matrices))


class FrontierCallback(TrainerCallback):
    """Moves the frontier: a thin wrapper that a Trainer calls; a loop of one's own calls :func:`train_only`.

    The stage follows from ``state.global_step`` alone. ``on_train_begin`` comes after the optimizer has seen every LoRA
    parameter, ``on_step_end`` after its step and ``zero_grad``.

    Args:
        frontier: which layers train.
        schedule: gives the stage.
        layers: LoRA parameters by target layer.
        entered: called with the stage when one begins, before the others are frozen.
    """

    def __init__(
        self,
        frontier: Frontier,
        schedule: FrontierSchedule,
        layers: Sequence[Sequence[nn.Parameter]],
        entered: Callable[[int], None] | None = None,
    ) -> None:
        self.frontier = frontier
        self.schedule = schedule
        self.layers = layers
        self.entered = entered
        self.stage: int | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Freeze everything but the current stage."""
        self.stage = None
        self._move(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Freeze again what another callback has set free, as peft's ``disable_adapter`` does when it ends."""
        if self.stage is not None:
            train_only(self.layers, self.frontier.trained(self.stage))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Move on when the next step belongs to another stage, and there is one."""
        if not control.should_training_stop:
            self._move(state.global_step)

    def _move(self, step: int) -> None:
        stage = self.schedule.stage(step)
        if stage != self.stage:
            if self.entered is not None:
                self.entered(stage)
            train_only(self.layers, self.frontier.trained(stage))
            self.stage = stage


class StageProgress(ProgressCallback):
    """transformers' progress bar with phase, stage and the layers that train in front; layers count from 0."""

    def __init__(self, frontier: FrontierCallback) -> None:
        super().__init__()
        self.frontier = frontier

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Make the bar, and say where training begins."""
        super().on_train_begin(args, state, control, **kwargs)
        self._name()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Advance the bar, and say where training is."""
        super().on_step_end(args, state, control, **kwargs)
        self._name()

    def _name(self) -> None:
        stage, layers = self.frontier.stage, self.frontier.frontier
        if self.training_bar is not None and stage is not None:
            trained = layers.trained(stage)
            which = f"layer {trained[0]}" if len(trained) == 1 else f"layers {trained[0]} to {trained[-1]}"
            name = f"training, stage {stage + 1}/{layers.num_stages}, {which}"
            if self.training_bar.desc != f"{name}: ":
                self.training_bar.set_description(name)


class StageLog(TrainerCallback):
    """Where there is no bar: what the Trainer logs, as lines of the log and not on standard output."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Tell the losses of training, with the stage, and those of evaluation."""
        if state.is_world_process_zero and logs and not logs.keys().isdisjoint(("stage", "eval_loss")):
            told = {name: value for name, value in logs.items() if not name.endswith(("epoch", "time", "per_second"))}
            terms = ", ".join(f"{name} {value:.4g}" for name, value in told.items())
            where = f"step {state.global_step} of {state.max_steps}" if state.max_steps else "before training"
            logger.info("%s: %s", where, terms)
