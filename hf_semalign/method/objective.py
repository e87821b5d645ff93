"""Losses of captured states, for training and evaluation (method, equations 4 to 9)."""

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
        kl_weight: weight of the output loss; at zero it is not computed.
        semantic_map: maps source states into the target's space.
        source_head: the source's head, restricted to the shared tokens.
        target_head: the target's head, restricted to the shared tokens.
        own_head: the target's whole head.
        classes: token classes that the output KL compares; only with two tokenizers.
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
        """Layer loss and output loss of a batch. Each is zero if its weight is zero.

        Sums over this batch are divided by counts over the global batch, so that adding up the shares of all batches in a step
        gives the global means.

        Args:
            states: captured states of the supervised target layers, then of the target's decoder.
            signals: source signals of the batch; ``None`` if neither loss needs them.
            labels: ``[B, T]``.
            tokens: number of positions in the global batch that the output loss covers.
            sequences: number of sequences in the global batch with at least two such positions.
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
            # The loss of y = x + f(x) is about f(x). A gradient through x would train lower layers for this layer's residual.
            output = output + (state.input.detach() - state.input)
        if self.layer_loss == "fisher":
            return token_fisher_losses(output[valid], supervision[valid], self.target_head).sum() / tokens
        return sequence_relation_losses(state.input, output, supervision, valid).sum() / sequences.clamp_min(1)

    def _output_losses(self, final: torch.Tensor, signals: BatchSignals | None, labels: torch.Tensor) -> torch.Tensor:
        """Output loss of each position ``[N]``: all valid positions for ``answers``, the supervised ones otherwise."""
        if self.output_loss == "answers":
            valid = valid_positions(labels)
            return answer_cross_entropy(final[valid], self.own_head, labels[:, 1:][valid[:, :-1]])
        assert signals is not None  # the other losses need them
        hidden = final[signals.taught]
        if self.output_loss == "cosine":
            return token_steering_losses(hidden, self.semantic_map(signals.final.float()))
        return self._kl(hidden, signals.final)

    def _kl(self, hidden: torch.Tensor, source_hidden: torch.Tensor) -> torch.Tensor:
        """KL to the source at each position ``[N]``, over tokens or, with two tokenizers, over token classes."""
        if self.classes is None:
            return token_kl(hidden, self.target_head, source_hidden, self.source_head)
        return token_class_kl(hidden, self.target_head, source_hidden, self.source_head, self.classes)

    @torch.no_grad()
    def sums(self, states: Sequence[Capture], signals: BatchSignals, labels: torch.Tensor) -> torch.Tensor:
        """Metrics of each example for evaluation, ``[B, 6]``.

        The columns are: answer cross-entropy, summed over the valid positions; number of these positions; KL, summed over the
        positions with source signals; number of these positions; relation loss, averaged over the layers with supervision; 1 if
        the example has a relation loss, else 0.
        """
        valid, taught, final = valid_positions(labels), signals.taught, states[-1].output
        tokens = labels[:, 1:][valid[:, :-1]]
        if self.classes is None and len(signals.final) == len(tokens):  # every valid position is taught
            heads = self.target_head, signals.final, self.source_head, self.own_head
            kl, cross_entropy = token_kl_and_cross_entropy(final[valid], *heads, tokens)
        else:
            kl = self._kl(final[taught], signals.final)
            cross_entropy = token_cross_entropy(final[valid], self.own_head, tokens)
        sums = torch.zeros(len(valid), 6, device=valid.device)
        for column, losses, positions in ((0, cross_entropy, valid), (2, kl, taught)):
            sums[:, column].index_add_(0, positions.nonzero()[:, 0], losses)
            sums[:, column + 1] = positions.sum(1)
        if signals.supervision:
            layers = zip(states[:-1], signals.supervision, strict=True)
            by_layer = [sequence_relation_losses(state.input, state.output, mapped, taught) for state, mapped in layers]
            sums[:, 4], sums[:, 5] = torch.stack(by_layer).mean(0), relation_sequences(taught)
        return sums


@dataclass(frozen=True)
class BatchSignals:
    """Source signals of one batch.

    Attributes:
        taught: ``[B, T]`` bool, target positions that have source signals: the valid positions, or the aligned positions among
            them if the source reads rows of its own.
        supervision: mapped states ``y~`` ``[B, T, D_tgt]``, one tensor per requested target layer; values at other positions
            are meaningless.
        final: the source's final hidden states at the ``taught`` positions, ``[N, D_src]``.
    """

    taught: torch.Tensor
    supervision: list[torch.Tensor]
    final: torch.Tensor
