"""Trials of the ablation that are not in the library: SemAlign's trainer with one thing done otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_semalign import SemAlignConfig, SemAlignTrainer
from hf_semalign.anatomy import dissect
from hf_semalign.frontier import FrontierSchedule, stage_learning_rate
from hf_semalign.pairing import pair_layers
from hf_semalign.scores import layer_scores
from hf_semalign.semantics import SemanticMap
from hf_semalign.source import Source
from hf_semalign.splits import Collator

REBALANCED = 25  # steps between two looks at the gradients


class OneSchedule(SemAlignTrainer):
    """One warmup and one decay over the whole run: later stages start at the learning rate that the last one ended at."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _restart(self, FrontierSchedule(1, self.schedule.total_steps))


class DealtByScore(SemAlignTrainer):
    """A stage's share of the steps is the attribution score of its source layer among those of all pairs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _deal(self, [self.pairing.scores[layer] for layer in self.pairing.source_layers])


class HalfToLast(SemAlignTrainer):
    """The last stage has half of the steps, the others share the rest."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _deal(self, [1.0] * (self.schedule.num_stages - 1) + [self.schedule.num_stages - 1.0])


def _deal(trainer: SemAlignTrainer, shares: Sequence[float]) -> None:
    """Stages as long as their shares, each with a warmup and a decay."""
    schedule = trainer.schedule
    schedule.boundaries = (0, *(round(schedule.total_steps * share / sum(shares)) for share in accumulate(shares)))
    _restart(trainer, schedule)


def _restart(trainer: SemAlignTrainer, schedule: FrontierSchedule) -> None:
    """A learning rate that warms up and decays in each stage of a schedule."""
    args = trainer.args
    factor = stage_learning_rate(schedule, args.lr_scheduler_type, args.learning_rate, args.get_warmup_steps)
    trainer._learning_rate_factor = factor


class Balanced(SemAlignTrainer):
    """``relation_weight`` is the length of the layer loss's gradient in that of the KL, measured every few steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._share = self.args.relation_weight

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The layer loss weighted anew where it is time, and then the loss as ever."""
        if model.training and self.state.global_step % REBALANCED == 0:
            lengths = []
            for self.args.relation_weight, self.args.kl_weight in ((1.0, 0.0), (0.0, 1.0)):
                loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
                trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
                gradients = torch.autograd.grad(loss, trained, allow_unused=True)
                lengths.append(torch.stack([g.norm() for g in gradients if g is not None]).norm().item())
            self.args.relation_weight, self.args.kl_weight = self._share * lengths[1] / lengths[0], 1.0
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Annealed(SemAlignTrainer):
    """The weight of the layer loss falls to zero over the run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first = self.args.relation_weight

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss under the weight of this step."""
        self.args.relation_weight = self._first * (1 - self.state.global_step / self.schedule.total_steps)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class EndsAtLast(SemAlignTrainer):
    """The last target layer goes with the last source layer; the others with the best-scored of the rest."""

    def __init__(self, model: PreTrainedModel, source_model: Source, args: SemAlignConfig, *rest: Any, **given: Any) -> None:
        collator = Collator(given["processing_class"].pad_token_id)
        scores = layer_scores(source_model, given["extract_dataset"], collator, Path(str(args.signals_dir)), progress=False)
        chosen = pair_layers(scores.values[:-1], len(dissect(model).layers) - 1, "attribution").source_layers
        pairing = pair_layers(source_model.num_layers, len(chosen) + 1, [*chosen, source_model.num_layers - 1])
        super().__init__(model, source_model, args, *rest, **given, pairing=pairing)


class EvenMap(SemAlignTrainer):
    """The map with all of its singular values alike: its directions without their stretching (docs/analyses.md)."""

    def __init__(self, model: PreTrainedModel, source_model: Source, *rest: Any, **given: Any) -> None:
        known = SemanticMap.from_models(source_model.model("cpu"), model)
        left, _, right = torch.linalg.svd(known.matrix, full_matrices=False)
        super().__init__(model, source_model, *rest, **given, semantic_map=_replaced(known, left @ right, "even"))


class RandomMap(SemAlignTrainer):
    """Random orthonormal rows, the same for all seeds of a run: a control that knows nothing of the vocabulary."""

    def __init__(self, model: PreTrainedModel, source_model: Source, *rest: Any, **given: Any) -> None:
        known = SemanticMap.from_models(source_model.model("cpu"), model)
        columns = torch.randn(known.matrix.T.shape, generator=torch.Generator().manual_seed(0), dtype=known.matrix.dtype)
        rows = torch.linalg.qr(columns)[0].T
        super().__init__(model, source_model, *rest, **given, semantic_map=_replaced(known, rows, "random"))


def _replaced(known: SemanticMap, matrix: torch.Tensor, name: str) -> SemanticMap:
    """Another matrix with the norm of a map in its place."""
    return SemanticMap(
        matrix * (known.matrix.norm() / matrix.norm()),
        kind=known.kind,
        shared_tokens=known.shared_tokens,
        condition_number=known.condition_number,
        fingerprint=name + known.fingerprint,
    )


TRIALS: dict[str, type[SemAlignTrainer]] = {
    "semalign": SemAlignTrainer,
    "one schedule": OneSchedule,
    "dealt by score": DealtByScore,
    "half to last": HalfToLast,
    "balanced": Balanced,
    "annealed": Annealed,
    "even map": EvenMap,
    "random map": RandomMap,
    "ends at last": EndsAtLast,
}
