"""Model families that the tests build small, from their real configuration classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

COMMON = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
LLAMA_ROW = ["up_proj", "down_proj", "v_proj", "o_proj"]
NEOX_ROW = ["dense_h_to_4h", "dense_4h_to_h", "query_key_value", "dense"]
ATTENTION_ROW = ["v_proj", "o_proj"]


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        lora: modules that get LoRA by default.
        settings: of the configuration, beside the sizes.
        names: what the family calls layers, width and heads.
        scale: factor on its logits.
        model: name of the class in transformers, less ``ForCausalLM``; by default that of the family.
        config: the same of its configuration.
    """

    lora: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, str, str] = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    scale: float = 1.0
    model: str | None = None
    config: str | None = None


GROUPED = {"num_key_value_heads": 2, "intermediate_size": 24}
HEADS_OF_4 = {**GROUPED, "head_dim": 4}
SSM = {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
GPT = ("n_layer", "n_embd", "n_head")

FAMILIES: dict[str, Family] = {
    "Llama": Family(LLAMA_ROW, GROUPED),
    "Mistral": Family(LLAMA_ROW, {**HEADS_OF_4, "sliding_window": 4}),
    "Qwen2": Family(LLAMA_ROW, GROUPED),
    "Qwen3": Family(LLAMA_ROW, HEADS_OF_4),
    "Gemma": Family(LLAMA_ROW, HEADS_OF_4),
    "Gemma2": Family(LLAMA_ROW, {**HEADS_OF_4, "sliding_window": 4, "final_logit_softcapping": 2.0}),
    "Gemma3": Family(LLAMA_ROW, {**HEADS_OF_4, "sliding_window": 4, "sliding_window_pattern": 2}, config="Gemma3Text"),
    "Phi": Family(["fc1", "fc2", "v_proj", "dense"], {"intermediate_size": 24}),  # a head with a bias
    "Phi3": Family(["gate_up_proj", "down_proj", "qkv_proj", "o_proj"], GROUPED),
    "GPT2": Family(
        ["c_fc", "c_proj", "c_attn"], {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, GPT, model="GPT2LMHead"
    ),
    "GPTNeoX": Family(NEOX_ROW, {"intermediate_size": 24}),
    "OPT": Family(["fc1", "fc2", "v_proj", "out_proj"], {"ffn_dim": 24, "init_std": 0.2, "dropout": 0.0}),
    "Starcoder2": Family(["c_fc", "c_proj", "v_proj", "o_proj"], GROUPED),
    "Cohere": Family(LLAMA_ROW, {**GROUPED, "logit_scale": 0.25}, scale=0.25),
    "Granite": Family(LLAMA_ROW, {**GROUPED, "logits_scaling": 8.0}, scale=0.125),
    "Bloom": Family(NEOX_ROW, names=("n_layer", "hidden_size", "n_head")),  # its layers give tuples
    "Mixtral": Family(ATTENTION_ROW, {**GROUPED, "num_local_experts": 4}),
    "Qwen3Moe": Family(ATTENTION_ROW, {**HEADS_OF_4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
    "Mamba": Family(["in_proj"], {"state_size": 4}),
    "Mamba2": Family(["in_proj"], {"state_size": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}),
    "FalconH1": Family(  # attention and state space side by side
        [*LLAMA_ROW, "in_proj"],
        {**GROUPED, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8, "lm_head_multiplier": 0.5},
        scale=0.5,
    ),
    "Bamba": Family([*LLAMA_ROW, "in_proj"], {**GROUPED, **SSM, "attn_layer_indices": [1]}),  # and one after the other
    "Lfm2": Family(  # short convolutions and attention
        ["w3", "w2", "v_proj", "out_proj", "in_proj"], {**GROUPED, "block_multiple_of": 8, "full_attn_idxs": [1]}
    ),
    "RecurrentGemma": Family(
        [*LLAMA_ROW, "linear_x", "linear_y", "linear_out"],
        {**HEADS_OF_4, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
}  # fmt: skip

# Another setting that goes with the width, and its share of it.
WIDTHS = {
    "OPT": ("word_embed_proj_dim", 1),
    "Mamba2": ("num_heads", 1 / 4),
    "Bamba": ("mamba_n_heads", 1 / 4),
    "RecurrentGemma": ("lru_width", 1),
}


def build(name: str, layers: int = 3, width: int = 16, vocab: int = 50, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of a family with random weights, in evaluation mode."""
    family = FAMILIES[name]
    sizes = dict(zip(family.names, (layers, width, 4), strict=True))
    if name in WIDTHS:
        key, share = WIDTHS[name]
        sizes[key] = int(share * width)
    settings = {**COMMON, "vocab_size": vocab, **family.settings, **sizes, **changes}
    config = getattr(transformers, f"{family.config or name}Config")(**settings)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family.model}Model" if family.model else f"{name}ForCausalLM")
    return model(config).eval()
