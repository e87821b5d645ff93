"""The frontier schedule: which layers train and are supervised at which step (method, section 6)."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import ProgressCallback, TrainerCallback, get_scheduler

from hf_semalign.errors import InputError

logger = logging.getLogger(__name__)
FRONTIERS = ("single", "cumulative", "joint")
BUDGETS = ("split", "per_stage")


@dataclass(frozen=True)
class Frontier:
    """Which target layers each stage trains and supervises; stages and layers count from 0.

    Attributes:
        kind: ``single`` (the paper: stage ``k`` trains layer ``k``), ``cumulative`` (stage ``k`` trains layers ``0..k``, the
            layer loss still at ``k``) or ``joint`` (one stage, all layers, the layer losses averaged).
        num_layers: layers of the target.
    """

    kind: str
    num_layers: int

    def __post_init__(self) -> None:
        if self.kind not in FRONTIERS:
            raise InputError(f"frontier is {self.kind!r}: expected one of {FRONTIERS}.")

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return 1 if self.kind == "joint" else self.num_layers

    def trained(self, stage: int) -> range:
        """Target layers whose LoRA trains."""
        return range(0 if self.kind != "single" else stage, self.num_layers if self.kind == "joint" else stage + 1)

    def supervised(self, stage: int) -> range:
        """Target layers with a layer loss."""
        return range(self.num_layers) if self.kind == "joint" else range(stage, stage + 1)


class FrontierSchedule:
    """Deals optimizer steps to stages: a pure function of the global step, so that resuming needs no state.

    Args:
        num_stages: number of stages.
        total_steps: optimizer steps of the whole run (``split``: no two stages differ by more than one) or of each stage
            (``per_stage``).
        budget: ``split`` or ``per_stage``.

    Raises:
        ValueError: fewer steps than stages, or an unknown budget.
    """

    def __init__(self, num_stages: int, total_steps: int, budget: str = "split") -> None:
        if budget not in BUDGETS:
            raise InputError(f"stage_budget is {budget!r}: expected one of {BUDGETS}.")
        if not (isinstance(num_stages, int) and isinstance(total_steps, int) and num_stages > 0):
            raise InputError(
                f"{total_steps!r} steps for {num_stages!r} stages: expected whole numbers, and at least one stage."
            )
        self.total_steps = total_steps * num_stages if budget == "per_stage" else total_steps
        if self.total_steps < num_stages:
            smallest = 1 if budget == "per_stage" else num_stages
            raise InputError(
                f"{self.total_steps} optimizer steps for {num_stages} stages: every stage needs at least one. The smallest "
                f"budget is {smallest} steps: raise num_train_epochs or max_steps, or lower the batch size."
            )
        self.num_stages = num_stages
        #: First step of each stage, and last the total: stage ``k`` is ``boundaries[k] <= step < boundaries[k + 1]``.
        self.boundaries: tuple[int, ...] = tuple(k * self.total_steps // num_stages for k in range(num_stages + 1))

    def stage(self, step: int) -> int:
        """Stage of the optimizer step that starts at ``global_step == step``, from 0; the last one after the end."""
        return min(bisect_right(self.boundaries, step) - 1, self.num_stages - 1)

    def steps(self, stage: int) -> int:
        """Optimizer steps of a stage."""
        return self.boundaries[stage + 1] - self.boundaries[stage]


def stage_learning_rate(
    schedule: FrontierSchedule,
    name: str,
    learning_rate: float,
    warmup_steps: Callable[[int], int],
    specific: dict[str, Any] | None = None,
) -> Callable[[int], float]:
    """Learning-rate factor by global step: the named transformers schedule, warmup and decay, anew in every stage.

    Args:
        schedule: the stages.
        name: a transformers ``lr_scheduler_type``.
        learning_rate: peak learning rate, which floors such as ``min_lr`` refer to.
        warmup_steps: warmup steps of a stage of so many steps.
        specific: ``lr_scheduler_kwargs``.

    Raises:
        ValueError: a schedule that is no function of the step, such as ``reduce_lr_on_plateau``.
    """
    factors: dict[int, Callable[[int], float]] = {}
    for length in {schedule.steps(stage) for stage in range(schedule.num_stages)}:
        throwaway = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
        within = get_scheduler(name, throwaway, warmup_steps(length), length, scheduler_specific_kwargs=specific)
        if not isinstance(within, torch.optim.lr_scheduler.LambdaLR):
            raise InputError(f"lr_scheduler_type {name!r} cannot restart with each stage: use linear, cosine or constant.")
        factors[length] = within.lr_lambdas[0]

    def factor(step: int) -> float:
        stage = schedule.stage(step)
        return factors[schedule.steps(stage)](step - schedule.boundaries[stage])

    return factor


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
