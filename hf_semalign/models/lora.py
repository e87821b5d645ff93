"""LoRA on the decoder layers of a target: which modules get it, and adding it (method, section 6)."""

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
# Modules that carry LoRA (method, section 6): FFN up and down, attention value and output, or what a family fuses them into.
FFN_TARGETS: tuple[str, ...] = (
    "up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "w3", "input_linear",
    "down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "output_linear",
)  # fmt: skip
LORA_TARGETS: tuple[str, ...] = (
    *FFN_TARGETS,
    "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv",
    "o_proj", "out_proj", "dense",
    "in_proj", "in_proj_qkvz", "linear_x", "linear_y", "linear_out",  # of blocks without attention
)  # fmt: skip


def lora_targets(layers: nn.ModuleList, wanted: list[str] | None = None) -> list[str]:
    """Module names that get LoRA, in every layer at least one of them.

    In a mixture of experts the attention modules alone get it: experts see few tokens each, and peft takes FFN names there for
    theirs. Of state-space mixers the input projection gets it: fused kernels read the others past their modules.

    Args:
        layers: decoder layers of the target.
        wanted: names to use; by default those of ``LORA_TARGETS`` that occur.

    Raises:
        ValueError: a wanted name does not occur, or a layer has none; the message names the candidates.
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
        logger.warning("The target is a mixture of experts: LoRA goes on %s, and its FFNs stay as they are.", chosen)
    return chosen


def lora_candidates(layer: nn.Module) -> dict[str, nn.Module]:
    """Modules of a layer that may get LoRA, by path."""
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
    """A target with LoRA on the modules of :func:`lora_targets` in its decoder layers, and nowhere else.

    Args:
        target: the target.
        names: module names.
        rank: ``r``.
        alpha: ``lora_alpha``.
        ranks: other ranks by name, each with an ``alpha`` as large.

    Raises:
        ValueError: peft put LoRA elsewhere.
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
            f"peft put LoRA on other modules than those named in the decoder layers: on {sorted(carriers - wanted)[:5]} as "
            f"well, and not on {sorted(wanted - carriers)[:5]}. Set lora_targets to other names."
        )
    return adapted
