"""What training minimises and evaluation reports, of captured states: equations 4 to 9 of the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_semalign.method.losses import (
    answer_cross_entropy,
    relation_sequences,
    sequence_relation_losses,
    token_fisher_losses,
    token_kl,
    token_kl_and_cross_entropy,
    token_steering_losses,
)
from hf_semalign.method.semantic_map import SemanticMap
from hf_semalign.models.anatomy import Head
from hf_semalign.models.hooks import Capture
from hf_semalign.splits import valid_positions


@dataclass(frozen=True)
class Objective:
    """``relation_weight`` x layer loss + ``kl_weight`` x output loss (equation 9).

    Attributes:
        layer_loss: ``relation``, ``steering`` or ``fisher``.
        output_loss: ``kl``, ``cosine`` or ``answers``.
        relation_weight: weight of the layer loss; at zero it is not computed.
        kl_weight: weight of the output loss, likewise.
        semantic_map: carries source states into the target's space.
        source_head: the source's head, rows of the shared tokens.
        target_head: the target's, likewise.
        own_head: the target's, all rows.
    """

    layer_loss: str
    output_loss: str
    relation_weight: float
    kl_weight: float
    semantic_map: SemanticMap
    source_head: Head
    target_head: Head
    own_head: Head

    def terms(
        self,
        states: Sequence[Capture],
        signals: BatchSignals | None,
        labels: torch.Tensor,
        tokens: torch.Tensor | int,
        sequences: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer loss and output loss of a batch, as shares of the global batch's means; zero where the weight is.

        Args:
            states: of the supervised target layers, and last of its decoder.
            signals: what the source says of them; ``None`` where neither loss asks for it.
            labels: ``[B, T]``.
            tokens: valid positions of the global batch.
            sequences: sequences of the global batch that carry a relation.
        """
        valid = valid_positions(labels)
        layer = output = torch.zeros((), device=valid.device)
        layers = [
            self._layer_loss(state, supervision, valid, tokens, sequences)
            for state, supervision in zip(states[:-1], signals.supervision if signals else (), strict=True)
        ]
        if layers:
            layer = torch.stack(layers).mean()
        if self.kl_weight:
            output = self._output_losses(states[-1].output[valid], signals, labels, valid).sum() / tokens
        return layer, output

    def total(self, layer: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The weighted sum of both terms."""
        return self.relation_weight * layer + self.kl_weight * output

    def _layer_loss(
        self,
        state: Capture,
        supervision: torch.Tensor,
        valid: torch.Tensor,
        tokens: torch.Tensor | int,
        sequences: torch.Tensor,
    ) -> torch.Tensor:
        if self.layer_loss == "steering":
            return token_steering_losses(state.output[valid], supervision[valid]).sum() / tokens
        output = state.output
        if state.input.requires_grad:
            # Of y = x + f(x) the loss is about f(x): through x it would train layers below for another one's residual.
            output = output + (state.input.detach() - state.input)
        if self.layer_loss == "fisher":
            return token_fisher_losses(output[valid], supervision[valid], self.target_head).sum() / tokens
        return sequence_relation_losses(state.input, output, supervision, valid).sum() / sequences.clamp_min(1)

    def _output_losses(
        self, hidden: torch.Tensor, signals: BatchSignals | None, labels: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """Of each valid position, ``[N]``."""
        if self.output_loss == "answers":
            return answer_cross_entropy(hidden, self.own_head, labels[:, 1:][valid[:, :-1]])
        assert signals is not None  # the other losses ask for it
        if self.output_loss == "kl":
            return token_kl(hidden, self.target_head, signals.final, self.source_head)
        return token_steering_losses(hidden, self.semantic_map(signals.final.float()))

    @torch.no_grad()
    def sums(self, states: Sequence[Capture], signals: BatchSignals, labels: torch.Tensor) -> torch.Tensor:
        """Of each example ``[B, 5]``: answer cross-entropy and KL, summed over its valid positions; their number; the relation
        loss, meaned over layers; whether it has one.
        """
        valid = valid_positions(labels)
        hidden, rows = states[-1].output[valid], valid.nonzero()[:, 0]
        sums = torch.zeros(len(valid), 5, device=valid.device)
        tokens = labels[:, 1:][valid[:, :-1]]
        heads = self.target_head, signals.final, self.source_head, self.own_head
        kl, cross_entropy = token_kl_and_cross_entropy(hidden, *heads, tokens)
        sums[:, 0].index_add_(0, rows, cross_entropy)
        sums[:, 1].index_add_(0, rows, kl)
        sums[:, 2] = valid.sum(1)
        sums[:, 3] = torch.stack(
            [
                sequence_relation_losses(state.input, state.output, supervision, valid)
                for state, supervision in zip(states[:-1], signals.supervision, strict=True)
            ]
        ).mean(0)
        sums[:, 4] = relation_sequences(valid)
        return sums


@dataclass(frozen=True)
class BatchSignals:
    """Source signals of one batch.

    Attributes:
        supervision: mapped states ``y~`` ``[B, T, D_tgt]``, one for each wanted target layer; what stands at positions that
            are not valid means nothing.
        final: the source's final hidden states at the valid positions, ``[N, D_src]``.
    """

    supervision: list[torch.Tensor]
    final: torch.Tensor
