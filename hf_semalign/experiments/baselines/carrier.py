"""Translation of neuron weights by hypernetworks, and LoRA that adds them to the target. Used by :mod:`.laten`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from hf_semalign.experiments.baselines.neurons import (
    Located,
    NeuronParts,
    neuron_parts,
)
from hf_semalign.models.anatomy import dissect

DEVIATION = 1e-5  # standard deviation of the hypernetworks' initial weights
BY_COLUMNS = ("down", "output")  # a neuron is a column of these, and a row of up and value
OF_FFN = ("up", "down")
NEURON_ROLES = ("up", "down", "value", "output")


class Hypernetworks(nn.Module):
    """Networks from the source's width to the target's, in float32: one per module type, shared by all layers and neurons."""

    def __init__(self, source_width: int, target_width: int) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(
            {
                role: nn.Sequential(
                    nn.Linear(source_width, source_width, bias=False),
                    nn.ReLU(),
                    nn.Linear(source_width, target_width, bias=False),
                )
                for role in NEURON_ROLES
            }
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=DEVIATION)

    def forward(self, knowledge: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Translate neuron weights ``[L, n, D_src]`` by role to Delta ``[L, n, D_tgt]``."""
        return {role: self.networks[role](weights) for role, weights in knowledge.items()}


@dataclass(frozen=True)
class Sites:
    """The positions of one role's neurons in a model.

    Attributes:
        layers: ``L`` layers.
        indices: rows or columns of the role's module in each layer, ``[L, n]``.
    """

    layers: list[int]
    indices: torch.Tensor


def sites(parts: Sequence[NeuronParts], located: Located, role: str) -> Sites:
    """The rows or columns of located neurons in the modules of one role. Two neurons may share a row of value."""
    if role in OF_FFN:
        return Sites(located.ffn_layers, located.ffn)
    layers = located.attention_layers
    if role == "output":
        return Sites(layers, located.attention)
    rows = [parts[k].value_rows[neurons] for k, neurons in zip(layers, located.attention, strict=True)]
    return Sites(layers, torch.stack(rows))


@torch.no_grad()
def knowledge_of(parts: Sequence[NeuronParts], located: Located) -> dict[str, torch.Tensor]:
    """The weights of located neurons by role, ``[L, n, D]`` in float32."""
    found = {}
    for role in NEURON_ROLES:
        where = sites(parts, located, role)
        weights = []
        for k, indices in zip(where.layers, where.indices, strict=True):
            weight = getattr(parts[k], role).get_parameter("weight")
            indices = indices.to(weight.device)
            weights.append((weight[:, indices].T if role in BY_COLUMNS else weight[indices]).float())
        found[role] = torch.stack(weights)
    return found


class Carrier:
    """LoRA whose product ``B A`` is exactly Delta. One factor is one-hot and selects rows or columns; the other holds Delta.

    Args:
        model: the target with LoRA on the modules of its neurons. Its rank is the number of located neurons, its scale 1.
    """

    def __init__(self, model: PeftModel) -> None:
        self._parts = neuron_parts(dissect(model))[1]

    def clear(self) -> None:
        """Reset the target to its original function."""
        with torch.no_grad():
            for part in self._parts:
                for role in NEURON_ROLES:
                    for factor in self._factors(part, role):
                        factor.zero_()

    def write(self, located: Located, deltas: Mapping[str, torch.Tensor]) -> list[nn.Parameter]:
        """Write Delta to the positions of the located neurons.

        Args:
            located: neurons of the target in all of its layers.
            deltas: ``[L, n, D]`` by role.

        Returns:
            The factors that hold Delta, by role and layer. Pass them to :meth:`gradients`.
        """
        held = []
        for role, delta in deltas.items():
            where = sites(self._parts, located, role)
            for k, indices, rows in zip(where.layers, where.indices, delta.detach(), strict=True):
                a, b = self._factors(self._parts[k], role)
                places, neurons = indices.to(a.device), torch.arange(len(indices), device=a.device)
                with torch.no_grad():
                    if role in BY_COLUMNS:
                        a.zero_()[neurons, places] = 1
                        b.copy_(rows.T)
                    else:
                        b.zero_()[places, neurons] = 1
                        a.copy_(rows)
                held.append(b if role in BY_COLUMNS else a)
        return held

    @staticmethod
    def gradients(held: Sequence[nn.Parameter], deltas: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Convert the gradients of the factors from :meth:`write` to gradients of the deltas."""
        found, factors = [], iter(held)
        for role, delta in deltas.items():
            arrived = [cast(torch.Tensor, next(factors).grad) for _ in delta]
            found.append(torch.stack([gradient.T if role in BY_COLUMNS else gradient for gradient in arrived]))
        return found

    @staticmethod
    def _factors(part: NeuronParts, role: str) -> tuple[nn.Parameter, nn.Parameter]:
        """``A`` ``[r, in]`` and ``B`` ``[out, r]`` of the module of one role."""
        module: Any = getattr(part, role)
        return module.lora_A["default"].weight, module.lora_B["default"].weight


def penalty(deltas: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The unweighted penalty: mean square of Delta, summed over the module types."""
    return torch.stack([delta.square().mean() for delta in deltas.values()]).sum()
