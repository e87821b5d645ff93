"""What training minimises and evaluation reports, of captured states: equations 4 to 9 of the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_semalign.method.losses import (
    answer_cross_entropy,
    relation_sequences,
    sequence_relation_losses,
    token_class_kl,
    token_cross_entropy,
    token_fisher_losses,
    token_kl,
    token_kl_and_cross_entropy,
    token_steering_losses,
)
from hf_semalign.method.prefix_classes import PrefixClasses
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
        classes: with two tokenizers, those of the tokens of both heads that the output KL compares.
    """

    layer_loss: str
    output_loss: str
    relation_weight: float
    kl_weight: float
    semantic_map: SemanticMap
    source_head: Head
    target_head: Head
    own_head: Head
    classes: PrefixClasses | None

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
            tokens: positions of the global batch that the output loss is of.
            sequences: sequences of the global batch that carry a relation.
        """
        layer = output = torch.zeros((), device=labels.device)
        if signals is not None and signals.supervision:
            layers = [
                self._layer_loss(state, supervision, signals.taught, tokens, sequences)
                for state, supervision in zip(states[:-1], signals.supervision, strict=True)
            ]
            layer = torch.stack(layers).mean()
        if self.kl_weight:
            output = self._output_losses(states[-1].output, signals, labels).sum() / tokens
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

    def _output_losses(self, final: torch.Tensor, signals: BatchSignals | None, labels: torch.Tensor) -> torch.Tensor:
        """Of each position ``[N]``: of the answers all valid ones, else those that the source says something about."""
        if self.output_loss == "answers":
            valid = valid_positions(labels)
            return answer_cross_entropy(final[valid], self.own_head, labels[:, 1:][valid[:, :-1]])
        assert signals is not None  # the other losses ask for it
        hidden = final[signals.taught]
        if self.output_loss == "cosine":
            return token_steering_losses(hidden, self.semantic_map(signals.final.float()))
        return self._kl(hidden, signals.final)

    def _kl(self, hidden: torch.Tensor, source_hidden: torch.Tensor) -> torch.Tensor:
        """KL to the source of each position ``[N]``, over tokens or over the classes of two tokenizers."""
        if self.classes is None:
            return token_kl(hidden, self.target_head, source_hidden, self.source_head)
        return token_class_kl(hidden, self.target_head, source_hidden, self.source_head, self.classes)

    @torch.no_grad()
    def sums(self, states: Sequence[Capture], signals: BatchSignals, labels: torch.Tensor) -> torch.Tensor:
        """Of each example ``[B, 6]``: answer cross-entropy, summed over its valid positions, and their number; KL, summed over
        those that the source says something about, and their number; the relation loss, meaned over layers; whether it has one.
        """
        valid, taught, final = valid_positions(labels), signals.taught, states[-1].output
        tokens = labels[:, 1:][valid[:, :-1]]
        if self.classes is None:
            heads = self.target_head, signals.final, self.source_head, self.own_head
            kl, cross_entropy = token_kl_and_cross_entropy(final[valid], *heads, tokens)
        else:
            kl = self._kl(final[taught], signals.final)
            cross_entropy = token_cross_entropy(final[valid], self.own_head, tokens)
        sums = torch.zeros(len(valid), 6, device=valid.device)
        for column, losses, positions in ((0, cross_entropy, valid), (2, kl, taught)):
            sums[:, column].index_add_(0, positions.nonzero()[:, 0], losses)
            sums[:, column + 1] = positions.sum(1)
        sums[:, 4] = torch.stack(
            [
                sequence_relation_losses(state.input, state.output, supervision, taught)
                for state, supervision in zip(states[:-1], signals.supervision, strict=True)
            ]
        ).mean(0)
        sums[:, 5] = relation_sequences(taught)
        return sums


@dataclass(frozen=True)
class BatchSignals:
    """Source signals of one batch.

    Attributes:
        taught: positions of the target that the source says something about, ``[B, T]`` bool: the valid ones, or with two
            tokenizers those of them that are aligned.
        supervision: mapped states ``y~`` ``[B, T, D_tgt]``, one for each wanted target layer; what stands at other positions
            means nothing.
        final: the source's final hidden states at these positions, ``[N, D_src]``.
    """

    taught: torch.Tensor
    supervision: list[torch.Tensor]
    final: torch.Tensor
