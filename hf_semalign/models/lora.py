"""Choose the target's modules that get LoRA, and add it (method, section 6)."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_semalign.errors import InputError
from hf_semalign.models.anatomy import dissect

logger = logging.getLogger(__name__)
# Modules that get LoRA (method, section 6): FFN up and down, attention value and output, or the fused modules of a family.
FFN_TARGETS: tuple[str, ...] = (
    "up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "w3", "input_linear",
    "down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "output_linear",
)  # fmt: skip
LORA_TARGETS: tuple[str, ...] = (
    *FFN_TARGETS,
    "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv",
    "o_proj", "out_proj", "dense",
    "in_proj", "in_proj_qkvz", "linear_x", "linear_y", "linear_out",  # in blocks without attention
)  # fmt: skip


def lora_targets(layers: nn.ModuleList, wanted: list[str] | None = None) -> list[str]:
    """Names of the modules that get LoRA; every layer has at least one of them.

    In a mixture of experts, only attention modules get LoRA: each expert sees few tokens, and peft would match FFN names inside
    the experts. In state-space mixers, only the input projection gets it: fused kernels read the weights of the other
    projections directly and would bypass their LoRA.

    Args:
        layers: decoder layers of the target.
        wanted: names to use; by default, all names in ``LORA_TARGETS`` that occur.

    Raises:
        ValueError: a wanted name does not occur, or a layer has none of the names; the message lists the candidates.
    """
    experts = any("experts" in path.split(".") for layer in layers for path, _ in layer.named_modules())
    candidates = [{path.rpartition(".")[2] for path in lora_candidates(layer)} for layer in layers]
    if experts:
        candidates = [names.difference(FFN_TARGETS) for names in candidates]
    everywhere = set().union(*candidates)
    chosen = [name for name in wanted or LORA_TARGETS if name in everywhere]
    bare = [index for index, names in enumerate(candidates) if not names.intersection(chosen)]
    missing = sorted(set(wanted or ()) - everywhere)
    if missing or bare:
        what = f"{missing} occur in no layer" if missing else f"none of {wanted or 'the known names'} in layers {bare}"
        raise InputError(
            f"LoRA modules not found: {what}. Candidates: {sorted(everywhere)}. Set lora_targets to some of them, at "
            "least one for every layer."
        )
    if experts:
        logger.warning("The target is a mixture of experts: only %s get LoRA, and its FFNs do not change.", chosen)
    return chosen


def lora_candidates(layer: nn.Module) -> dict[str, nn.Module]:
    """Modules of a layer that can get LoRA, by path."""
    found: dict[str, nn.Module] = {}
    for path, module in layer.named_modules():
        parent, _, name = path.rpartition(".")
        if isinstance(module, (nn.Linear, Conv1D)) and "experts" not in path.split("."):
            mixer = hasattr(layer.get_submodule(parent), "A_log")
            if not mixer or name.startswith("in_proj"):
                found[path] = module
    return found


def add_lora(
    target: PreTrainedModel, names: list[str], *, rank: int, alpha: int, ranks: Mapping[str, int] | None = None
) -> PeftModel:
    """Add LoRA to modules of the target's decoder layers, and to no others.

    Args:
        target: the target.
        names: module names, as from :func:`lora_targets`.
        rank: LoRA rank ``r``.
        alpha: ``lora_alpha``.
        ranks: ranks that differ, by module name; their ``alpha`` equals the rank.

    Raises:
        ValueError: peft added LoRA to other modules.
    """
    layers = dissect(target).layers
    allowed = {id(module) for layer in layers for module in lora_candidates(layer).values()}
    named = {path: module for path, module in target.named_modules() if path.rpartition(".")[2] in names}
    excluded = [re.escape(path) for path, module in named.items() if id(module) not in allowed]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern=dict(ranks or {}),
        alpha_pattern=dict(ranks or {}),
        target_modules=names,
        exclude_modules="|".join(excluded) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in layers.modules()),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(target, config)
    carriers = {path for path, module in target.named_modules() if isinstance(module, LoraLayer)}
    if carriers != (wanted := {path for path, module in named.items() if id(module) in allowed}):
        raise InputError(
            f"peft did not add LoRA to exactly the named modules of the decoder layers: {sorted(carriers - wanted)[:5]} got it "
            f"too, and {sorted(wanted - carriers)[:5]} did not get it. Set lora_targets to other names."
        )
    return adapted
