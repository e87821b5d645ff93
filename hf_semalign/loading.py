"""Engines, models and tokenizers that a trainer is given: loaded, or refused with a clear error."""

from __future__ import annotations

import logging
import os

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_semalign.config import REFUSED, SemAlignConfig
from hf_semalign.semantics import shared_token_ids

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


def check_tokenizers(tokenizer: PreTrainedTokenizerBase, source_model: PreTrainedModel | str) -> None:
    """Refuse a tokenizer without padding, and a source of another vocabulary, before weights are loaded."""
    if tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no pad token: set one, for example tokenizer.pad_token = tokenizer.unk_token.")
    theirs = find_tokenizer(source_model) if isinstance(source_model, str) else None
    if theirs is not None:
        shared_token_ids(theirs, tokenizer, len(theirs), len(tokenizer))


def find_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies with a model; ``None``, which is logged, for a model made in memory or a folder without one."""
    try:
        if name_or_path:
            return AutoTokenizer.from_pretrained(name_or_path)
        reason = "it was made in memory"
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
    logger.warning("No tokenizer was found with the model %r, so that its vocabulary is not checked: %s", name_or_path, reason)
    return None


def load_model(model: PreTrainedModel | str, args: SemAlignConfig) -> PreTrainedModel:
    """The model of an id or folder, in its own dtype; of float16 weights under bf16 in bfloat16, lest layers give out float32.

    Raises:
        ValueError: a model that carries LoRA already, or quantised weights.
    """
    if isinstance(model, str):
        half = args.bf16 and AutoConfig.from_pretrained(model).dtype == torch.float16
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if half else "auto")
    if isinstance(model, PeftModel) or any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("The model carries LoRA already: pass a base model; SemAlignTrainer adds LoRA of its own.")
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{type(model).__name__} is quantised, which is not supported yet: load it in bfloat16.")
    return model


def pad_token_id(tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel) -> int:
    """Id to pad with: the tokenizer's, or without one the model's."""
    pad = tokenizer.pad_token_id if tokenizer is not None else model.config.get_text_config().pad_token_id
    if pad is None:
        raise ValueError("No tokenizer was given and the model's config has no pad token: set model.config.pad_token_id.")
    return pad
