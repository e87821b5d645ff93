"""Models and tokenizers by name, or as they are given: loaded, or refused with a clear error.

A name is a Hub id, a folder or an embedded model (``embedded:source``, ``embedded:target``).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError, StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from yaml import YAMLError

from hf_semalign.errors import InputError, brief
from hf_semalign.files import check_header
from hf_semalign.models.anatomy import Parts, base_model, name_parts
from hf_semalign.models.names import public_name, resolve_model

logger = logging.getLogger(__name__)
HALVES = (torch.bfloat16, torch.float16)


def device_name(device: torch.device) -> str:
    """What a device is: the product's name of a GPU by CUDA or ROCm, the type of any other."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def licence_of(origin: str) -> dict[str, str] | None:
    """What the card of a model names as its licence: ``license``, and ``license_name`` and ``license_link`` where it has them.

    Args:
        origin: folder, Hub id or embedded model; empty for one that was made in memory.

    Returns:
        ``None`` where there is no card, it names none, or it cannot be had now: no run fails for it.
    """
    if not origin:  # a model made in memory
        return None
    place = resolve_model(origin)
    card = Path(place) / "README.md"
    if Path(place).is_dir() and not card.is_file():
        return None
    try:
        data = ModelCard.load(card if card.is_file() else place, ignore_metadata_errors=True).data
    except (OSError, ValueError, HTTPError, YAMLError) as error:
        logger.info("The card of %s, which names its licence, was not read: %s", public_name(origin), brief(error))
        return None
    named = {name: getattr(data, name) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in named.items() if isinstance(value, str)} if isinstance(data.license, str) else None


@contextmanager
def _readable(name_or_path: str) -> Iterator[None]:
    """What a library cannot read of a model is told in one sentence, with what to do."""
    try:
        yield
    except (OSError, ValueError, StrictDataclassError, SafetensorError) as error:
        raise InputError(
            f"The model {name_or_path!r} cannot be read: name a Hub id, or a folder that save_pretrained has written for a "
            f"whole causal language model. ({brief(error)})"
        ) from error


def find_config(name_or_path: str) -> PretrainedConfig:
    """The configuration of a model by name.

    Raises:
        ValueError: there is none, or it is broken.
    """
    place = resolve_model(name_or_path)
    with _readable(name_or_path):
        return AutoConfig.from_pretrained(place, trust_remote_code=False)


def find_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies with a model; ``None``, which is logged, for a model made in memory or a folder without one.

    Raises:
        ValueError: its files are broken.
    """
    name, place = public_name(name_or_path), resolve_model(name_or_path)
    try:
        if place:
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        reason = "it was made in memory"
    except json.JSONDecodeError as error:
        raise InputError(f"The tokenizer of {name_or_path!r} is damaged ({error}): copy or save it again.") from error
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0].replace(place, name)
    logger.warning("No tokenizer was found with the model %r, so that its vocabulary is not checked: %s", name, reason)
    return None


@contextmanager
def unknown_words_explained() -> Iterator[None]:
    """Say what is wrong where a tokenizer meets a word that it does not know, and has no token for such.

    Raises:
        ValueError: in the place of the error of tokenizers, which has no type of its own.
    """
    try:
        yield
    except Exception as error:
        if not any(words in str(error) for words in ("[UNK]", "`unk_id`")):
            raise
        raise InputError(
            f"The tokenizer does not know a word of the text, and has no token for unknown ones ({error}): choose a model "
            "whose tokenizer cuts any text, or texts of its words."
        ) from error


def load_dtype(name_or_path: str, precision: str | None = None) -> torch.dtype:
    """The dtype to load a model in.

    Args:
        name_or_path: its name.
        precision: of the run. Under ``bf16`` float16 weights are loaded in bfloat16, lest layers give out float32. ``no`` is
            training in 32 bits, as transformers says of ``bf16=False``: half-precision weights are loaded in float32. Otherwise
            weights keep their own dtype.
    """
    own: Any = find_config(name_or_path).dtype or torch.float32
    if precision == "no" and own in HALVES and not is_quantised(find_config(name_or_path)):
        return torch.float32
    return torch.bfloat16 if precision == "bf16" and own == torch.float16 else own


def product_seconds(dtype: torch.dtype, size: int = 1024) -> float:
    """The least time that this CPU takes, of five tries, for a product of 64 states with a square weight."""
    states, weight, seconds = torch.ones(64, size, dtype=dtype), torch.ones(size, size, dtype=dtype), []
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(states, weight)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


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
        raise InputError(
            f"Weights quantised by {facts.get('quant_method')} are not supported: use bitsandbytes, or plain weights."
        )
    return True


def keep_layout(model: PreTrainedModel) -> None:
    """Have bitsandbytes leave 4-bit weights as they are stored.

    On CPUs with AVX512-BF16 it would pack them anew at the first forward in evaluation mode, for a kernel of its own that wants
    rows by 32, and neither dequantising nor training reads that layout.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes.nn.Linear4bit
            cast(Any, module).support_avx512bf16_for_cpu = False


def skeleton(name_or_path: str, parts: Parts = None, *, weights: bool = True) -> PreTrainedModel:
    """A model by name without its weights: its shape alone, so that much can be refused before loading.

    Args:
        name_or_path: its name.
        parts: see :func:`hf_semalign.models.anatomy.name_parts`.
        weights: whether a folder has to hold weights; of those in safetensors the headers are read.

    Raises:
        ValueError: no causal language model, or weights that are missing, damaged or quantised in a way that is not supported.
    """
    config = find_config(name_or_path)
    name_parts(config, parts)
    is_quantised(config)
    if weights and (folder := Path(resolve_model(name_or_path))).is_dir():
        files = list(folder.glob("model*.safetensors"))
        if not files:
            raise InputError(f"{name_or_path} has no *.safetensors files: name a folder of save_pretrained, or a Hub id.")
        for file in files:
            check_header(file)
    with torch.device("meta"), _readable(name_or_path):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_weights(name_or_path: str, **settings: Any) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_pretrained`` by name, with all weights from safetensors files, none as it was drawn.

    Nothing is unpickled, and no code of a repository is run.

    Raises:
        ValueError: weights that cannot be read, are missing or have another shape than the configuration says.
    """
    place = resolve_model(name_or_path)
    with _readable(name_or_path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, **settings, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    model, report = loaded
    unfit = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if unfit:
        raise InputError(
            f"The weights of {name_or_path} do not fit its config.json: {len(unfit)} of them are missing or of another shape, "
            f"such as {unfit[:3]}. Copy or download both again."
        )
    keep_layout(model)
    return model


def load_model(model: PreTrainedModel | str | Path, *, precision: str | None = None, parts: Parts = None) -> PreTrainedModel:
    """The model of a name, see :func:`load_dtype`; a model that was made elsewhere is checked.

    Args:
        model: a model, or its name.
        precision: of the run, see :func:`load_dtype`.
        parts: see :func:`hf_semalign.models.anatomy.name_parts`.

    Raises:
        ValueError: no causal LM, a model that carries LoRA already, or weights that do not fit, or that are quantised in a way
            that is not supported.
    """
    if isinstance(model, (str, Path)):
        model = load_weights(str(model), dtype=load_dtype(str(model), precision))
    elif isinstance(model, PeftModel) or any("lora_" in name for name, _ in base_model(model).named_parameters()):
        raise InputError("The model carries LoRA already: pass a base model; SemAlignTrainer adds LoRA of its own.")
    is_quantised(model.config)
    keep_layout(model)
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
        raise InputError("No tokenizer was given and the model's config has no pad token: set model.config.pad_token_id.")
    return pad if pad < rows else 0


@contextmanager
def quietly() -> Iterator[None]:
    """Without the loading bar and the warnings of transformers."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    offloading = logging.getLogger("accelerate.big_modeling")
    offloading_level = offloading.level
    offloading.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        offloading.setLevel(offloading_level)
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
