"""Where a causal language model keeps its decoder layers, its head and its LoRA modules.

The one place that knows architectures. It asks transformers first (``get_decoder``, ``get_output_embeddings``) and looks
at structure before names, so that a family needs an entry here only when its module names are new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

CausalLM = PreTrainedModel | PeftModel

# Attention and FFN modules that carry LoRA (method, section 6): the first row whose names all occur in a layer is taken.
LORA_TARGETS: tuple[tuple[str, ...], ...] = (
    ("up_proj", "down_proj", "v_proj", "o_proj"),  # Llama, Mistral, Qwen, Gemma
    ("gate_up_proj", "down_proj", "qkv_proj", "o_proj"),  # Phi-3: fused projections
    ("c_fc", "c_proj", "v_proj", "o_proj"),  # Starcoder2
    ("c_fc", "c_proj", "c_attn"),  # GPT-2
    ("dense_h_to_4h", "dense_4h_to_h", "query_key_value", "dense"),  # GPT-NeoX
    ("fc1", "fc2", "v_proj", "out_proj"),  # OPT
)


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model.

    Attributes:
        decoder: the model without its head; the first item of its output is the final hidden state, after the last
            norm, ``[B, T, D]``.
        layers: decoder layers, shallow to deep.
        head: output embeddings, ``weight`` ``[V, D]``.
        logit_scale: factor on the logits (Cohere, Granite, Falcon-H1); 1 elsewhere.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    head: nn.Module
    logit_scale: float

    @property
    def device(self) -> torch.device:
        """Where the head is, and so where token ids go."""
        return self.head.get_parameter("weight").device

    def head_weight(self) -> torch.Tensor:
        """Head weight with the logit scale folded in, detached, ``[V, D]``: ``logits = h W^T``."""
        weight = self.head.get_parameter("weight").detach()
        return weight if self.logit_scale == 1.0 else weight * self.logit_scale


def base_model(model: CausalLM) -> PreTrainedModel:
    """The transformers model inside a peft model, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def num_layers(config: PretrainedConfig) -> int:
    """Number of decoder layers that a model configuration announces."""
    return config.get_text_config().num_hidden_layers


def dissect(model: CausalLM) -> Anatomy:
    """Find the parts of a causal language model.

    Args:
        model: a transformers causal LM, bare or inside a peft model.

    Raises:
        ValueError: no head, no list of decoder layers of the announced length, or a head that the method cannot use yet
            (a bias, soft-capped logits, another width than the layers).
    """
    model = base_model(model)
    name = type(model).__name__
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{name} has no output embeddings: SemAlign needs a causal LM (AutoModelForCausalLM).")
    decoder = model.get_decoder()
    expected = num_layers(model.config)
    lists = {path: child for path, child in decoder.named_children() if isinstance(child, nn.ModuleList)}
    found = [child for child in lists.values() if len(child) == expected]
    if len(found) != 1:
        raise ValueError(
            f"Hidden layers of {name} not found: looked in {type(decoder).__name__} for one ModuleList of {expected} "
            f"layers (config.num_hidden_layers) and found { ({path: len(child) for path, child in lists.items()}) }."
        )
    config = model.config.get_text_config()
    if getattr(head, "bias", None) is not None or getattr(config, "final_logit_softcapping", None) is not None:
        raise ValueError(f"The head of {name} has a bias or soft-capped logits, which are not supported yet.")
    width = head.get_parameter("weight").shape[1]
    if width != config.hidden_size:
        raise ValueError(
            f"{name} has layers of {config.hidden_size} channels and a head of {width}: the map between spaces needs the same."
        )
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    return Anatomy(decoder, found[0], head, logit_scale=scale / (getattr(config, "logits_scaling", None) or 1.0))


def lora_targets(layers: nn.ModuleList, wanted: list[str] | None = None) -> list[str]:
    """Module names that get LoRA, checked against every layer.

    Args:
        layers: decoder layers of the target.
        wanted: names to use; by default the first row of ``LORA_TARGETS`` that fits.

    Raises:
        ValueError: a name does not occur in every layer, or no row fits; the message names the candidates.
    """
    present = [
        {path.rpartition(".")[2] for path, module in layer.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
        for layer in layers
    ]
    common = set.intersection(*present)
    rows = [tuple(wanted)] if wanted else LORA_TARGETS
    for row in rows:
        if common.issuperset(row):
            return list(row)
    missing = f"{sorted(set(wanted) - common)} do not occur" if wanted else "no known set of names occurs"
    raise ValueError(
        f"LoRA modules not found: {missing} in every layer. Candidates: {sorted(common)}. Set lora_targets to some of them."
    )
