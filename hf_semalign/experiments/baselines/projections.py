"""The roles of a decoder layer's projections, by module name, and their rows inside fused modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from hf_semalign.errors import InputError
from hf_semalign.models.lora import lora_candidates

# Ends of module paths by role. In an FFN without a gate, the first matrix is "up".
ROLES = {
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "output": ("o_proj", "attn.out_proj", "self_attn.out_proj", "dense", "attn.c_proj"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "dense_h_to_4h", "c_fc", "fc1", "fc_in", "w3"),
    "down": ("down_proj", "dense_4h_to_h", "mlp.c_proj", "fc2", "fc_out", "w2"),
}
QKV, GATE_UP = ("query", "key", "value"), ("gate", "up")
# Roles of fused modules by model type and name, and whether the roles alternate by head.
FUSED: dict[tuple[Any, str], tuple[tuple[str, ...], bool]] = {
    ("gpt2", "c_attn"): (QKV, False),
    ("phi3", "qkv_proj"): (QKV, False),
    ("phi3", "gate_up_proj"): (GATE_UP, False),
    ("gpt_neox", "query_key_value"): (QKV, True),
}


@dataclass(frozen=True)
class Projection:
    """The rows of a module that have one role.

    Attributes:
        role: a key of ``ROLES``.
        path: path of the module in its layer.
        rows: indices ``[h]`` of the module's output rows with this role, in order of heads and neurons.
        columns: number of inputs.
        groups: number of query heads that share one head of these rows. It is above 1 for keys and values under grouped-query
            attention.
        heads: number of heads.
    """

    role: str
    path: str
    rows: torch.Tensor
    columns: int
    groups: int
    heads: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.rows), self.columns

    def ungrouped(self) -> Projection:
        """The same projection without grouping: each head's rows are repeated for every query head that reads them."""
        rows = self.rows.view(self.heads, -1).repeat_interleave(self.groups, 0).flatten()
        return replace(self, rows=rows, groups=1, heads=self.heads * self.groups)


def oriented(module: nn.Module, matrix: torch.Tensor) -> torch.Tensor:
    """A view of a linear module's weight, or of a tensor of the same shape, as outputs by inputs ``[h, w]``.

    ``Conv1D`` (GPT-2) stores the transpose.
    """
    return matrix.T if isinstance(module, Conv1D) else matrix


def projections(layer: nn.Module, config: PretrainedConfig) -> dict[str, Projection]:
    """The projections of a decoder layer by role. Modules of unknown role are left out.

    Args:
        layer: a decoder layer, with or without weights.
        config: the text configuration of its model.

    Raises:
        ValueError: two modules have the same role.
    """
    found: dict[str, Projection] = {}
    for path, module in lora_candidates(layer).items():
        for one in _roles(path, module, config):
            if one.role in found:
                raise InputError(
                    f"{config.model_type} has two {one.role} projections in a layer, {found[one.role].path} and {path}, so its "
                    "projections cannot be matched with another model's: choose a model with one projection per role."
                )
            found[one.role] = one
    return found


def _roles(path: str, module: nn.Module, config: PretrainedConfig) -> Iterator[Projection]:
    places: Sequence[torch.Tensor]
    rows, columns = oriented(module, module.get_parameter("weight")).shape
    heads = getattr(config, "num_attention_heads", None) or 1
    shared = getattr(config, "num_key_value_heads", None) or heads
    roles, by_head = FUSED.get((config.model_type, path.rpartition(".")[2]), (None, False))
    if roles is None:
        roles = tuple(role for role, names in ROLES.items() if any(f".{path}".endswith(f".{name}") for name in names))
        places = [torch.arange(rows)] * len(roles)
    elif by_head:
        places = torch.arange(rows).view(heads, len(roles), -1).unbind(1)
    elif roles == GATE_UP:
        places = torch.arange(rows).chunk(2)
    else:
        width = rows // (heads + 2 * shared)
        places = torch.arange(rows).split([heads * width, shared * width, shared * width])
    for role, place in zip(roles, places, strict=True):
        groups, of_heads = (heads // shared, shared) if role in ("key", "value") else (1, heads)
        yield Projection(role, path, place.flatten(), columns, groups, of_heads)
