"""The record of a transfer (``semalign.json``), and saving an adapter with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedTokenizerBase

from hf_semalign.config import SemAlignConfig
from hf_semalign.files import RECORD_NAME, file_digest, sha256, write_text
from hf_semalign.method.pairing import LayerPairing
from hf_semalign.method.semantic_map import SemanticMap

CARD = "README.md"
#: Settings in the record. A checkpoint with other values belongs to another run.
RECORDED_SETTINGS = (
    "pairing", "map_kind", "scale", "relation_weight", "kl_weight", "layer_loss", "output_loss", "stage_budget", "frontier",
    "lora_r", "lora_alpha", "lora_targets", "source_parts", "target_parts",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "num_train_epochs", "max_steps", "seed",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "optim", "bf16", "fp16",
    "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "lr_scheduler_kwargs", "data_seed", "train_sampling_strategy",
    "dataloader_drop_last",
)  # fmt: skip


def describe_run(
    args: SemAlignConfig,
    pairing: LayerPairing,
    semantic_map: SemanticMap,
    *,
    scales: Sequence[float],
    lora_targets: Sequence[str],
    stages: Sequence[int],
    data: dict[str, Any],
    **names: Any,
) -> dict[str, Any]:
    """The content of ``semalign.json``: versions, models, pairing, map, settings and data, without local paths.

    Args:
        args: the training settings.
        pairing: the layer pairing.
        semantic_map: the semantic map.
        scales: factor on the mapped states, one per pair.
        lora_targets: names of the modules with LoRA.
        stages: first step of each stage, and the last step.
        data: rows and fingerprint of each split.
        **names: ``method``, ``source``, ``target`` and ``licences`` of the models.
    """
    return {
        "versions": {name: version(name) for name in ("hf_semalign", "torch", "transformers", "peft", "accelerate")},
        **names,
        "pairing": pairing.to_dict(),
        "map": {
            "kind": semantic_map.kind,
            "shape": list(semantic_map.matrix.shape),
            "shared_tokens": semantic_map.shared_tokens,
            "condition_number": semantic_map.condition_number,
            "fingerprint": semantic_map.fingerprint,
            "scales": list(scales),
        },
        "stages": list(stages),
        "processes": args.world_size,
        "settings": recorded_settings(args) | {"lora_targets": list(lora_targets)},
        "data": data,
    }


def recorded_settings(args: SemAlignConfig) -> dict[str, Any]:
    """The settings that the record has."""
    settings = {name: getattr(args, name) for name in RECORDED_SETTINGS}
    return settings | {"lr_scheduler_kwargs": settings["lr_scheduler_kwargs"] or None}  # transformers replaces None by {}


def save_adapter(
    folder: Path,
    adapted: PeftModel,
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write adapter, tokenizer and record into a folder. An existing README is kept.

    Args:
        folder: the folder.
        adapted: the target with LoRA.
        record: see :func:`describe_run`. The checksums of the adapter are added.
        tokenizer: the target's tokenizer, if any.
        weights: adapter weights by name, by default those of ``adapted``.
    """
    adapted.peft_config["default"].base_model_name_or_path = record["target"]  # never a local path
    card = folder / CARD
    kept = card.read_bytes() if card.is_file() else None
    # "auto" would query the Hub for the base model, and save embeddings if vocabularies differ
    adapted.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    card.unlink(missing_ok=True)  # PEFT's placeholder card contains the local path
    if kept is not None:
        card.write_bytes(kept)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    sums = {"adapter_checksum": file_digest(file), "adapter_sha256": sha256(file)}  # the Hub computes SHA-256 too
    write_text(folder / RECORD_NAME, json.dumps({**record, **sums}, indent=2))
