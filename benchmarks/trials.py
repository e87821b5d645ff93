"""Trials of the ablation that are not in the library: SemAlign's trainer with one thing done otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hf_semalign import SemAlignConfig, SemAlignTrainer
from hf_semalign.cache.scores import layer_scores
from hf_semalign.cache.source import Source
from hf_semalign.method.frontier import FrontierSchedule, stage_learning_rate
from hf_semalign.method.objective import BatchSignals, Objective
from hf_semalign.method.pairing import pair_layers
from hf_semalign.method.semantic_map import SemanticMap
from hf_semalign.models.anatomy import dissect, final_norm
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

    def _weigh(self, layer: float, output: float) -> None:
        self.objective = replace(self.objective, relation_weight=layer, kl_weight=output)
        self.args.relation_weight = layer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The layer loss weighted anew where it is time, and then the loss as ever."""
        if model.training and self.state.global_step % REBALANCED == 0:
            lengths = []
            for weights in ((1.0, 0.0), (0.0, 1.0)):
                self._weigh(*weights)
                loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
                trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
                gradients = torch.autograd.grad(loss, trained, allow_unused=True)
                lengths.append(torch.stack([g.norm() for g in gradients if g is not None]).norm().item())
            self._weigh(self._share * lengths[1] / lengths[0], 1.0)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Annealed(SemAlignTrainer):
    """The weight of the layer loss falls to zero over the run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first = self.args.relation_weight

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss under the weight of this step."""
        weight = self._first * (1 - self.state.global_step / self.schedule.total_steps)
        self.objective, self.args.relation_weight = replace(self.objective, relation_weight=weight), weight
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
        super().__init__(model, source_model, *rest, **given, semantic_map=_random(known))


def _replaced(known: SemanticMap, matrix: torch.Tensor, name: str) -> SemanticMap:
    """Another matrix with the norm of a map in its place."""
    return SemanticMap(
        matrix * (known.matrix.norm() / matrix.norm()),
        kind=known.kind,
        shared_tokens=known.shared_tokens,
        condition_number=known.condition_number,
        fingerprint=name + known.fingerprint,
    )


class WithObjective(SemAlignTrainer):
    """Another objective in the place of the library's, made of it by ``kind``."""

    def __init__(self, *args: Any, kind: Callable[[SemAlignTrainer, Objective], Objective], **given: Any) -> None:
        self._kind = kind
        super().__init__(*args, **given)

    @cached_property
    def objective(self) -> Objective:
        """The one that ``kind`` makes of the library's."""
        return self._kind(self, super().objective)


def _parts(objective: Objective) -> dict[str, Any]:
    return {item.name: getattr(objective, item.name) for item in fields(Objective)}


@dataclass(frozen=True)
class FisherObjective(Objective):
    """``1/2 (E_p[u^2] - E_p[u]^2)``, ``u = W (y - y~)``, ``p = softmax(W y~)``: the second order of the KL between the logits
    of the mapped state and of the layer's output; ``norm`` stands before the head. Our reading of the published version.
    """

    norm: Callable[[torch.Tensor], torch.Tensor]

    def _layer_loss(self, state, supervision, valid, tokens, sequences):
        output = state.output
        if state.input.requires_grad:
            output = output + (state.input.detach() - state.input)
        wanted, weight = self.norm(supervision[valid]).detach(), self.target_head.weight
        shares = (wanted @ weight.T).softmax(-1)
        moved = (self.norm(output[valid]) - wanted) @ weight.T
        return ((shares * moved**2).sum(-1) - (shares * moved).sum(-1) ** 2).sum() / (2 * tokens)


@dataclass(frozen=True)
class ContributionObjective(Objective):
    """The relation loss of ``y - x`` against what the source adds between two paired layers, mapped; from the second on."""

    def terms(self, states, signals, labels, tokens, sequences):
        """Those of the library, with contributions for supervision."""
        if not signals.supervision:
            return super().terms(states, signals, labels, tokens, sequences)
        added = [after - before for before, after in pairwise(signals.supervision)]
        wanted = [state.input.detach() + more for state, more in zip(states[1:-1], added, strict=True)]
        return super().terms(states[1:], BatchSignals(signals.taught, wanted, signals.final), labels, tokens, sequences)


@dataclass(frozen=True)
class OwnSpaceObjective(ContributionObjective):
    """The same with the geometry of the source's contributions in its own space, which needs no map."""

    def terms(self, states, signals, labels, tokens, sequences):
        """Those of the library, with contributions for supervision."""
        if not signals.supervision:
            return super(ContributionObjective, self).terms(states, signals, labels, tokens, sequences)
        added = [after - before for before, after in pairwise(signals.supervision)]
        more = BatchSignals(signals.taught, added, signals.final)
        return super(ContributionObjective, self).terms(states[1:], more, labels, tokens, sequences)

    def _layer_loss(self, state, supervision, valid, tokens, sequences):
        output = state.output
        if state.input.requires_grad:
            output = output + (state.input.detach() - state.input)
        total = output.new_zeros(())
        for own, wanted, kept in zip(output - state.input.detach(), supervision, valid, strict=True):
            if kept.sum() < 2:
                continue
            mine, theirs = (F.normalize(rows[kept] - rows[kept].mean(0), dim=-1) for rows in (own, wanted))
            mine, theirs = mine @ mine.T, theirs @ theirs.T
            weights = theirs.abs().fill_diagonal_(0)
            total = total + (weights * (mine - theirs) ** 2).sum() / weights.sum()
        return total / sequences.clamp_min(1)


@dataclass(frozen=True)
class DivergenceObjective(Objective):
    """Another divergence from the source's output: ``KL(target || source)`` (``reverse``), the generalised Jensen-Shannon one
    of GKD (``share``), or the KL with a weighted cross-entropy of the answers (``answers``).
    """

    reverse: bool = False
    share: float | None = None
    answers: float = 0.0

    def _output_losses(self, final, signals, labels):
        hidden, tokens = final[signals.taught], labels[:, 1:][signals.taught[:, :-1]]
        theirs = self.source_head.logits(signals.final).log_softmax(-1)
        logits = self.target_head.logits(hidden)
        own = logits.log_softmax(-1)
        if self.reverse:
            return (own.exp() * (own - theirs)).sum(-1)
        if self.share is not None:
            parts = torch.stack([theirs + math.log(self.share), own + math.log(1 - self.share)])
            mixed = parts.logsumexp(0)
            kls = [(one.exp() * (one - mixed)).sum(-1) for one in (theirs, own)]
            return self.share * kls[0] + (1 - self.share) * kls[1]
        kl = (theirs.exp() * (theirs - own)).sum(-1)
        return kl + self.answers * F.cross_entropy(logits, tokens, reduction="none")


def _fisher(trainer: SemAlignTrainer, objective: Objective, normed: bool = False, random: bool = False) -> FisherObjective:
    parts = _parts(objective)
    if random:
        parts["semantic_map"] = _random(objective.semantic_map)
    return FisherObjective(**parts, norm=final_norm(trainer.target_anatomy) if normed else nn.Identity())


def _contribution(trainer: SemAlignTrainer, objective: Objective) -> ContributionObjective:
    return ContributionObjective(**_parts(objective))


def _own_space(trainer: SemAlignTrainer, objective: Objective) -> OwnSpaceObjective:
    known, width = objective.semantic_map, objective.source_head.weight.shape[1]
    same = SemanticMap(
        torch.eye(width),
        kind=known.kind,
        shared_tokens=known.shared_tokens,
        condition_number=1.0,
        fingerprint="identity" + known.fingerprint,
    )
    return OwnSpaceObjective(**_parts(objective) | {"semantic_map": same})


def _divergence(trainer: SemAlignTrainer, objective: Objective, **how: Any) -> DivergenceObjective:
    return DivergenceObjective(**_parts(objective), **how)


def _random(known: SemanticMap) -> SemanticMap:
    columns = torch.randn(known.matrix.T.shape, generator=torch.Generator().manual_seed(0), dtype=known.matrix.dtype)
    return _replaced(known, torch.linalg.qr(columns)[0].T.to(known.matrix.device), "random")


TRIALS: dict[str, Callable[..., SemAlignTrainer]] = {
    "semalign": SemAlignTrainer,
    "one schedule": OneSchedule,
    "dealt by score": DealtByScore,
    "half to last": HalfToLast,
    "balanced": Balanced,
    "annealed": Annealed,
    "even map": EvenMap,
    "random map": RandomMap,
    "ends at last": EndsAtLast,
    "fisher": partial(WithObjective, kind=_fisher),
    "fisher, normed": partial(WithObjective, kind=partial(_fisher, normed=True)),
    "fisher, random map": partial(WithObjective, kind=partial(_fisher, random=True)),
    "contribution": partial(WithObjective, kind=_contribution),
    "contribution, own space": partial(WithObjective, kind=_own_space),
    "reverse KL": partial(WithObjective, kind=partial(_divergence, reverse=True)),
    "JSD 0.5": partial(WithObjective, kind=partial(_divergence, share=0.5)),
    "JSD 0.9": partial(WithObjective, kind=partial(_divergence, share=0.9)),
    "KL and 0.3 answers": partial(WithObjective, kind=partial(_divergence, answers=0.3)),
    "KL and 1 answers": partial(WithObjective, kind=partial(_divergence, answers=1.0)),
}
