"""Load and check models and tokenizers.

A model name is a Hub id, a folder or an embedded model (``embedded:source``, ``embedded:target``).
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
    """Product name of a CUDA or ROCm GPU; the device type otherwise."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def licence_of(origin: str) -> dict[str, str] | None:
    """Read a model's licence from its card: ``license``, and ``license_name`` and ``license_link`` if the card has them.

    Args:
        origin: folder, Hub id or embedded model; empty for a model created in memory.

    Returns:
        ``None`` if there is no card, it names no licence, or it cannot be read now. This never fails a run.
    """
    if not origin:  # a model created in memory
        return None
    place = resolve_model(origin)
    card = Path(place) / "README.md"
    if Path(place).is_dir() and not card.is_file():
        return None
    try:
        data = ModelCard.load(card if card.is_file() else place, ignore_metadata_errors=True).data
    except (OSError, ValueError, HTTPError, YAMLError) as error:
        logger.info("The licence of %s is unknown because its card could not be read: %s", public_name(origin), brief(error))
        return None
    named = {name: getattr(data, name) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in named.items() if isinstance(value, str)} if isinstance(data.license, str) else None


@contextmanager
def _readable(name_or_path: str) -> Iterator[None]:
    """Replace a library's error about a model that it cannot read with one sentence that says what to do."""
    try:
        yield
    except (OSError, ValueError, StrictDataclassError, SafetensorError) as error:
        raise InputError(
            f"The model {name_or_path!r} cannot be read: give a Hub id, or a folder in which save_pretrained has saved a "
            f"complete causal language model. ({brief(error)})"
        ) from error


def find_config(name_or_path: str) -> PretrainedConfig:
    """Load a model's configuration by name.

    Raises:
        ValueError: it is missing or damaged.
    """
    place = resolve_model(name_or_path)
    with _readable(name_or_path):
        return AutoConfig.from_pretrained(place, trust_remote_code=False)


def find_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer stored with a model. Returns ``None``, with a warning, if there is none.

    Raises:
        ValueError: its files are damaged.
    """
    name, place = public_name(name_or_path), resolve_model(name_or_path)
    try:
        if place:
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        reason = "it was created in memory"
    except json.JSONDecodeError as error:
        raise InputError(f"The tokenizer of {name_or_path!r} is damaged ({error}): copy or save it again.") from error
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0].replace(place, name)
    logger.warning("No tokenizer was found with the model %r, so its vocabulary is not checked: %s", name, reason)
    return None


@contextmanager
def unknown_words_explained() -> Iterator[None]:
    """Explain the error of a tokenizer that meets an unknown word and has no token for it.

    Raises:
        ValueError: replaces the error of the tokenizers library, which has no type of its own.
    """
    try:
        yield
    except Exception as error:
        if not any(words in str(error) for words in ("[UNK]", "`unk_id`")):
            raise
        raise InputError(
            f"The tokenizer does not know a word of the text and has no token for unknown words ({error}): choose a model "
            "whose tokenizer accepts any text, or use only texts with words that it knows."
        ) from error


def load_dtype(name_or_path: str, precision: str | None = None) -> torch.dtype:
    """Dtype to load a model in.

    Args:
        name_or_path: name of the model.
        precision: precision of the run. Under ``bf16``, float16 weights are loaded in bfloat16; otherwise the layers would
            return float32. Under ``no``, half-precision weights are loaded in float32, because transformers documents
            ``bf16=False`` as training in 32 bits. In all other cases, weights keep their own dtype.
    """
    own: Any = find_config(name_or_path).dtype or torch.float32
    if precision == "no" and own in HALVES and not is_quantised(find_config(name_or_path)):
        return torch.float32
    return torch.bfloat16 if precision == "bf16" and own == torch.float16 else own


def product_seconds(dtype: torch.dtype, size: int = 1024) -> float:
    """Seconds that this CPU takes to multiply 64 states with a ``[size, size]`` weight; the best of five tries."""
    states, weight, seconds = torch.ones(64, size, dtype=dtype), torch.ones(size, size, dtype=dtype), []
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(states, weight)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def is_quantised(config: PretrainedConfig) -> bool:
    """Whether a model's weights are quantised.

    Raises:
        ValueError: they are quantised with anything but bitsandbytes; other methods are untested.
    """
    quantisation: Any = getattr(config, "quantization_config", None)
    if quantisation is None:
        return False
    facts = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    if facts.get("quant_method") != "bitsandbytes":
        raise InputError(
            f"Weights quantised with {facts.get('quant_method')} are not supported: use bitsandbytes, or unquantised weights."
        )
    return True


def keep_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights.

    On CPUs with AVX512-BF16, it repacks them at the first forward pass in evaluation mode, for a kernel that needs a multiple
    of 32 rows. Dequantising and training cannot read that layout.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes.nn.Linear4bit
            cast(Any, module).support_avx512bf16_for_cpu = False


def skeleton(name_or_path: str, parts: Parts = None, *, weights: bool = True) -> PreTrainedModel:
    """Build a model by name on the meta device, so that problems are found before its weights are loaded.

    Args:
        name_or_path: name of the model.
        parts: see :func:`hf_semalign.models.anatomy.name_parts`.
        weights: whether a folder must contain weights; if so, the headers of its safetensors files are checked.

    Raises:
        ValueError: it is not a causal language model, or its weights are missing, damaged, or quantised in an unsupported way.
    """
    config = find_config(name_or_path)
    name_parts(config, parts)
    is_quantised(config)
    if weights and (folder := Path(resolve_model(name_or_path))).is_dir():
        files = list(folder.glob("model*.safetensors"))
        if not files:
            raise InputError(f"{name_or_path} has no *.safetensors files: give a folder saved by save_pretrained, or a Hub id.")
        for file in files:
            check_header(file)
    with torch.device("meta"), _readable(name_or_path):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_weights(name_or_path: str, **settings: Any) -> PreTrainedModel:
    """Call ``AutoModelForCausalLM.from_pretrained`` and check that every weight was read, so none keeps its random values.

    Only safetensors files are read: nothing is unpickled, and no code from a repository is run.

    Raises:
        ValueError: weights cannot be read, are missing, or do not have the shape that the configuration says.
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
            f"The weights of {name_or_path} do not match its config.json: {len(unfit)} of them are missing or have a different "
            f"shape, such as {unfit[:3]}. Copy or download both again."
        )
    keep_layout(model)
    return model


def load_model(model: PreTrainedModel | str | Path, *, precision: str | None = None, parts: Parts = None) -> PreTrainedModel:
    """Load a model by name, in the dtype of :func:`load_dtype`; or check a model that was loaded elsewhere.

    Args:
        model: a model, or its name.
        precision: precision of the run, see :func:`load_dtype`.
        parts: see :func:`hf_semalign.models.anatomy.name_parts`.

    Raises:
        ValueError: it is not a causal LM, it already has LoRA, its weights do not match its configuration, or they are
            quantised in an unsupported way.
    """
    if isinstance(model, (str, Path)):
        model = load_weights(str(model), dtype=load_dtype(str(model), precision))
    elif isinstance(model, PeftModel) or any("lora_" in name for name, _ in base_model(model).named_parameters()):
        raise InputError("The model already has LoRA: pass a base model; SemAlignTrainer adds its own LoRA.")
    is_quantised(model.config)
    keep_layout(model)
    name_parts(model.config, parts)
    return model


def pad_token_id(tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel, rows: int) -> int:
    """Padding token id: from the tokenizer, or without a tokenizer from the model; 0 if a model has no embedding for it.

    Args:
        tokenizer: the target's tokenizer.
        model: the target.
        rows: number of embeddings that both models have. Padding is masked, so any id below it will do.

    Raises:
        ValueError: there is no tokenizer, and the model's config has no pad token.
    """
    pad = tokenizer.pad_token_id if tokenizer is not None else model.config.get_text_config().pad_token_id
    if pad is None:
        raise InputError("No tokenizer was given and the model's config has no pad token: set model.config.pad_token_id.")
    return pad if pad < rows else 0


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the loading bar and the warnings of transformers and accelerate inside the block."""
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
