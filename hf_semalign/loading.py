"""Engines, models and tokenizers that a trainer is given: loaded, or refused with a clear error."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_semalign.anatomy import Parts, name_parts
from hf_semalign.config import REFUSED, SemAlignConfig
from hf_semalign.symbols import public_name

logger = logging.getLogger(__name__)


def check_engine(args: SemAlignConfig) -> None:
    """Refuse other settings than a :class:`SemAlignConfig`, and engines that are not supported, however they are asked for."""
    if not isinstance(args, SemAlignConfig):
        raise ValueError(f"args is a {type(args).__name__}: expected a SemAlignConfig.")
    if args.n_gpu > 1:
        raise ValueError(f"One process sees {args.n_gpu} GPUs: start with `accelerate launch`, which gives each one its own.")
    wanted = {
        "ACCELERATE_USE_FSDP": "fsdp",
        "ACCELERATE_USE_DEEPSPEED": "deepspeed",
        "ACCELERATE_DYNAMO_BACKEND": "torch_compile",
    }
    for variable, name in wanted.items():
        if os.environ.get(variable, "no").lower() not in ("no", "false", "0", ""):
            raise ValueError(f"The accelerate config asks for {name} ({variable}): {REFUSED[name]}.")


def find_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies with a model; ``None``, which is logged, for a model made in memory or a folder without one."""
    name = public_name(name_or_path)
    try:
        if name_or_path:
            return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        reason = "it was made in memory"
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0].replace(name_or_path, name)
    logger.warning("No tokenizer was found with the model %r, so that its vocabulary is not checked: %s", name, reason)
    return None


def load_dtype(name_or_path: str, bf16: bool) -> torch.dtype:
    """The dtype to load a model in: its own; of float16 weights under bf16 bfloat16, lest layers give out float32."""
    own = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False).dtype or torch.float32
    return torch.bfloat16 if bf16 and own == torch.float16 else own


def is_quantised(config: PretrainedConfig) -> bool:
    """Whether a model's weights are quantised.

    Raises:
        ValueError: by another method than bitsandbytes: none was tried.
    """
    quantisation: Any = getattr(config, "quantization_config", None)
    if quantisation is None:
        return False
    facts = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    if facts.get("quant_method") != "bitsandbytes":
        raise ValueError(
            f"Weights quantised by {facts.get('quant_method')} are not supported: use bitsandbytes, or plain weights."
        )
    return True


def skeleton(name_or_path: str, parts: Parts = None) -> PreTrainedModel:
    """A model of a Hub id or folder without its weights: its shape alone, so that much can be refused before loading."""
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    name_parts(config, parts)
    is_quantised(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_model(model: PreTrainedModel | str, *, bf16: bool = False, parts: Parts = None) -> PreTrainedModel:
    """The model of an id or folder, see :func:`load_dtype`; a model that was made elsewhere is checked.

    Args:
        model: a model, an id or a folder.
        bf16: whether training is in bfloat16.
        parts: see :func:`hf_semalign.anatomy.name_parts`.

    Raises:
        ValueError: a model that carries LoRA already, or weights quantised in a way that is not supported.
    """
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(
            model, dtype=load_dtype(model, bf16), trust_remote_code=False, use_safetensors=True
        )
    elif isinstance(model, PeftModel) or any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("The model carries LoRA already: pass a base model; SemAlignTrainer adds LoRA of its own.")
    is_quantised(model.config)
    name_parts(model.config, parts)
    return model


def pad_token_id(tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel, rows: int) -> int:
    """Id to pad with: the tokenizer's, or without one the model's; 0 where one of the models has no embedding for it.

    Args:
        tokenizer: the target's.
        model: the target.
        rows: embeddings that both models have; padding is masked, so that any of them will do.
    """
    pad = tokenizer.pad_token_id if tokenizer is not None else model.config.get_text_config().pad_token_id
    if pad is None:
        raise ValueError("No tokenizer was given and the model's config has no pad token: set model.config.pad_token_id.")
    return pad if pad < rows else 0
