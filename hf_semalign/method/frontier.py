"""The frontier schedule: which layers train, and which are supervised, at each step (method, section 6)."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import SchedulerType, get_scheduler

from hf_semalign.errors import InputError, brief

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
        """Target layers whose LoRA trains in a stage."""
        return range(0 if self.kind != "single" else stage, self.num_layers if self.kind == "joint" else stage + 1)

    def supervised(self, stage: int) -> range:
        """Target layers that have a layer loss in a stage."""
        return range(self.num_layers) if self.kind == "joint" else range(stage, stage + 1)


class FrontierSchedule:
    """Divides optimizer steps among stages. The stage depends on the global step alone, so resuming needs no saved state.

    Args:
        num_stages: number of stages.
        total_steps: optimizer steps of the whole run (``split``; stages differ by at most one step) or of each stage
            (``per_stage``).
        budget: ``split`` or ``per_stage``.

    Raises:
        ValueError: there are fewer steps than stages, or the budget is unknown.
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
        #: First step of each stage, then the total: stage ``k`` has the steps ``boundaries[k] <= step < boundaries[k + 1]``.
        self.boundaries: tuple[int, ...] = tuple(k * self.total_steps // num_stages for k in range(num_stages + 1))

    def stage(self, step: int) -> int:
        """Stage, from 0, of the optimizer step that starts at ``global_step == step``; after the end, the last stage."""
        return min(bisect_right(self.boundaries, step) - 1, self.num_stages - 1)

    def steps(self, stage: int) -> int:
        """Number of optimizer steps in a stage."""
        return self.boundaries[stage + 1] - self.boundaries[stage]


def stage_learning_rate(
    schedule: FrontierSchedule,
    name: str,
    learning_rate: float,
    warmup_steps: Callable[[int], int],
    specific: dict[str, Any] | None = None,
) -> Callable[[int], float]:
    """Learning-rate factor by global step. The transformers schedule, with warmup and decay, restarts in every stage.

    Args:
        schedule: the stages.
        name: a transformers ``lr_scheduler_type``.
        learning_rate: peak learning rate; floors such as ``min_lr`` are relative to it.
        warmup_steps: gives the warmup steps of a stage from its number of steps.
        specific: ``lr_scheduler_kwargs``.

    Returns:
        A function from the global step to the factor.

    Raises:
        ValueError: the schedule is not a function of the step, such as ``reduce_lr_on_plateau``, or it does not accept
            ``specific``.
    """
    factors: dict[int, Callable[[int], float]] = {}
    for length in {schedule.steps(stage) for stage in range(schedule.num_stages)}:
        throwaway = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
        try:
            within = get_scheduler(name, throwaway, warmup_steps(length), length, scheduler_specific_kwargs=specific)
            if isinstance(within, torch.optim.lr_scheduler.LambdaLR):
                within.lr_lambdas[0](length - 1)  # a step after the warmup, so that the settings are used
        except (TypeError, ValueError) as error:
            kind = SchedulerType(name).value
            raise InputError(
                f"lr_scheduler_type {kind!r} does not accept lr_scheduler_kwargs {specific}: {brief(error)}"
            ) from error
        if not isinstance(within, torch.optim.lr_scheduler.LambdaLR):
            raise InputError(f"lr_scheduler_type {name!r} cannot restart with each stage: use linear, cosine or constant.")
        factors[length] = within.lr_lambdas[0]

    def factor(step: int) -> float:
        stage = schedule.stage(step)
        return factors[schedule.steps(stage)](step - schedule.boundaries[stage])

    return factor
