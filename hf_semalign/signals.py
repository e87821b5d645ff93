"""Source signals: what the frozen source tells the target about a batch (method, section 7).

A signal is the mapped state of each wanted pair and the source's final hidden state at the valid positions; the source's
head is applied at training time, which is exact and far smaller than logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_semalign.anatomy import dissect
from hf_semalign.hooks import capture
from hf_semalign.pairing import LayerPairing
from hf_semalign.semantics import SemanticMap
from hf_semalign.splits import valid_positions


@dataclass(frozen=True)
class BatchSignals:
    """Source signals of one batch.

    Attributes:
        supervision: mapped states ``y~`` ``[B, T, D_tgt]``, one for each wanted target layer.
        final: the source's final hidden states at the valid positions, ``[N, D_src]``.
    """

    supervision: list[torch.Tensor]
    final: torch.Tensor


class OnlineSignals:
    """Runs the source on every batch.

    Args:
        source: the source model; put into evaluation mode, without gradients.
        pairing: which source layer goes with which target layer.
        semantic_map: map between the spaces.
        scales: one factor on the mapped states for each pair.
    """

    def __init__(
        self,
        source: PreTrainedModel,
        pairing: LayerPairing,
        semantic_map: SemanticMap,
        scales: Sequence[float],
    ) -> None:
        self.source = source.eval().requires_grad_(False)
        self.pairing = pairing
        self.semantic_map = semantic_map
        self.scales = scales

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, torch.Tensor], target_layers: Sequence[int]) -> BatchSignals:
        """Signals of a batch.

        Args:
            batch: ``input_ids, attention_mask, labels`` ``[B, T]`` on the source's device.
            target_layers: target layers whose supervision is wanted.
        """
        anatomy = dissect(self.source)
        with capture([anatomy.layers[self.pairing.source_layers[k]] for k in target_layers]) as states:
            final = anatomy.decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
        supervision = [
            self.semantic_map(state.output.float()) * self.scales[k] for k, state in zip(target_layers, states, strict=True)
        ]
        return BatchSignals(supervision, final[valid_positions(batch["labels"])])
