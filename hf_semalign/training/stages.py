"""Training stages: which parameters train in each, and callbacks that move the frontier and report progress."""

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
    """Gather a sharded tensor. This is a collective operation: all processes must call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def lora_parameters(layers: Iterable[nn.Module]) -> list[list[nn.Parameter]]:
    """LoRA parameters by target layer. Call it again after sharding, which replaces them."""
    return [[p for name, p in layer.named_parameters() if "lora_" in name] for layer in layers]


def train_only(layers: Sequence[Sequence[nn.Parameter]], trained: range) -> None:
    """Make the parameters of some layers trainable; freeze all others and drop their gradients.

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
    """Mark only the LoRA of these layers as trainable inside the block. For use outside training steps; gradients are kept."""
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
    """Skip LoRA in the forward pass of layers above the deepest trained one while its ``B`` is zero, so it has no effect.

    Args:
        layers: target layers, shallow to deep.
        deepest: the deepest layer that trains; LoRA up to this layer stays on.
    """
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(module, LoraLayer):
                matrices = (b.get_parameter("weight") for b in module.lora_B.values())
                module.enable_adapters(index <= deepest or any(bool(whole(b).any()) for b in matrices))


class FrontierCallback(TrainerCallback):
    """Moves the frontier during training. In a custom training loop, call :func:`train_only` instead.

    The stage depends on ``state.global_step`` alone. ``on_train_begin`` runs after the optimizer has registered every LoRA
    parameter; ``on_step_end`` runs after the optimizer's step and ``zero_grad``.

    Args:
        frontier: which layers train in each stage.
        schedule: stage of each step.
        layers: LoRA parameters by target layer.
        entered: called with the number of each stage that begins, before other layers are frozen.
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
        """Freeze layers that other code has unfrozen, as peft's ``disable_adapter`` does when it ends."""
        if self.stage is not None:
            train_only(self.layers, self.frontier.trained(self.stage))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Move to the next stage if the next step belongs to it, unless training ends here."""
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
    """transformers' progress bar, labelled with the phase, the stage and the trained layers; layers count from 0."""

    def __init__(self, frontier: FrontierCallback) -> None:
        super().__init__()
        self.frontier = frontier

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Create the bar and label it."""
        super().on_train_begin(args, state, control, **kwargs)
        self._name()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Advance the bar and update its label."""
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
    """Writes the Trainer's logs to the log instead of standard output; used when there is no progress bar."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Log training losses, with the stage, and evaluation losses."""
        if state.is_world_process_zero and logs and not logs.keys().isdisjoint(("stage", "eval_loss")):
            told = {name: value for name, value in logs.items() if not name.endswith(("epoch", "time", "per_second"))}
            terms = ", ".join(f"{name} {value:.4g}" for name, value in told.items())
            where = f"step {state.global_step} of {state.max_steps}" if state.max_steps else "before training"
            logger.info("%s: %s", where, terms)
