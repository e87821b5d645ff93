"""The methods that recipes and comparisons can name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_semalign.config import SemAlignConfig
from hf_semalign.experiments.baselines.kd import KDTrainer
from hf_semalign.experiments.baselines.laten import LaTenTrainer, transfer_cost
from hf_semalign.experiments.baselines.seeking import SeekingTrainer, extraction_cost
from hf_semalign.experiments.baselines.sft import SFTTrainer
from hf_semalign.trainer import SemAlignTrainer
from hf_semalign.training.preparation import Preparation
from hf_semalign.transfer import TransferTrainer


def no_cost(known: Preparation, args: SemAlignConfig) -> dict[str, float]:
    """Cost of a method without phases of its own: none."""
    return {}


@dataclass(frozen=True)
class Method:
    """A transfer method.

    Attributes:
        trainer: the trainer class.
        own_cost: multiplications by phase. They add to or replace those of :func:`hf_semalign.experiments.plan.plan`.
        takes_steps: whether the cost grows with the optimizer steps.
    """

    trainer: type[TransferTrainer]
    own_cost: Callable[[Preparation, SemAlignConfig], dict[str, float]] = no_cost
    takes_steps: bool = True


METHODS = {
    method.trainer.method: method
    for method in (
        Method(SemAlignTrainer),
        Method(KDTrainer),
        Method(SFTTrainer),
        Method(SeekingTrainer, extraction_cost),
        Method(LaTenTrainer, transfer_cost, takes_steps=False),
    )
}
