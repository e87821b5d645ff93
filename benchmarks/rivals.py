"""TRL's off-policy distillation (GKD) and fine-tuning (SFT) under the same conditions as SemAlign: helpers of benchmarks.

Both take the settings of a :class:`SemAlignConfig` (optimizer, learning rate, precision, batches, seed), LoRA in all layers
on the modules and with the rank that SemAlign would use, and rows of :func:`hf_semalign.splits.encode`. What is TRL's own
stays as it is: full logits at all positions, the source on every batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's trainers would report to the Hub when they are made
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from hf_semalign import SemAlignConfig
from hf_semalign.models.anatomy import dissect
from hf_semalign.models.lora import lora_targets

Collate = Callable[[Sequence[Any]], dict[str, torch.Tensor]]
MODEL_INPUTS = ("input_ids", "attention_mask", "labels", "prompts", "prompt_attention_mask")


def gkd_trainer(
    target: PreTrainedModel,
    source: PreTrainedModel,
    rows: Dataset,
    collator: Collate,
    args: SemAlignConfig,
    processing_class: PreTrainedTokenizerBase | None = None,
    callbacks: list[TrainerCallback] | None = None,
    max_new_tokens: int | None = None,
) -> GKDTrainer:
    """TRL's GKD: KL(source || target), mean over the valid positions of the global batch.

    Args:
        target: gets LoRA.
        source: TRL's ``teacher_model``.
        rows: encoded rows.
        collator: rows to a batch.
        args: settings; those of SemAlign's own method are ignored.
        processing_class: the tokenizer; TRL insists on one, so that without it a stand-in is made.
        callbacks: further callbacks.
        max_new_tokens: on-policy: the target answers each batch's prompts anew, at temperature 1, with so many tokens at most.
            By default the rows' own answers are taught.
    """
    # beta 0 is F.kl_div(log p_target, log p_source), which is KL(source || target); 1 would be the reverse.
    # lmbda: the share of batches that are replaced by the target's own answers. temperature is that of sampling alone.
    on_policy = {"lmbda": 0.0} if max_new_tokens is None else {"lmbda": 1.0, "max_new_tokens": max_new_tokens}
    settings = GKDConfig(**_settings(args), **on_policy, temperature=1.0, beta=0.0, seq_kd=False)
    if max_new_tokens is not None:
        collator = _with_prompts(collator)
    return GKDTrainer(teacher_model=source, args=settings, **_shared(target, rows, collator, args, processing_class, callbacks))


def sft_trainer(
    target: PreTrainedModel,
    rows: Dataset,
    collator: Collate,
    args: SemAlignConfig,
    processing_class: PreTrainedTokenizerBase | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> SFTTrainer:
    """TRL's SFT on the labels of the given rows: no source. Arguments as in :func:`gkd_trainer`."""
    settings = SFTConfig(**_settings(args), dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(args=settings, **_shared(target, rows, collator, args, processing_class, callbacks))


def _shared(
    target: PreTrainedModel,
    rows: Dataset,
    collator: Collate,
    args: SemAlignConfig,
    processing_class: PreTrainedTokenizerBase | None,
    callbacks: list[TrainerCallback] | None,
) -> dict[str, Any]:
    """What both of TRL's trainers take."""
    return {
        "model": target,
        "data_collator": _model_inputs(collator),
        "train_dataset": rows,
        "processing_class": processing_class or stand_in_tokenizer(target),
        "peft_config": _lora(target, args),
        "callbacks": callbacks,
    }


def stand_in_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerFast:
    """A tokenizer of one word with the model's pad id, for rows that hold token ids already."""
    pad = int(model.config.get_text_config().pad_token_id)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": pad})), pad_token="<pad>")


def _settings(args: SemAlignConfig) -> dict[str, Any]:
    """All of ``TrainingArguments``: TRL's other defaults (bf16, gradient checkpointing, learning rate) must not slip in."""
    settings = {item.name: getattr(args, item.name) for item in fields(TrainingArguments) if item.init}
    return settings | {"remove_unused_columns": False}  # the collator takes the rows as they are


def _lora(target: PreTrainedModel, args: SemAlignConfig) -> LoraConfig:
    """As SemAlign adds it; TRL, too, seeds torch with ``args.seed`` right before."""
    names = lora_targets(dissect(target).layers, args.lora_targets)
    return LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=names, task_type="CAUSAL_LM")


def _model_inputs(collator: Collate) -> Collate:
    """The collator's batches without ``example_id``, which TRL would hand on to the model."""

    def collate(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        batch = collator(rows)
        return {name: batch[name] for name in MODEL_INPUTS if name in batch}

    return collate


def _with_prompts(collator: Collate) -> Collate:
    """The collator's batches with what stands before each answer, padded on the left."""

    def collate(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        batch = collator(rows)
        begin = [int((torch.as_tensor(row["labels"]) != -100).int().argmax()) for row in rows]
        prompts = [torch.as_tensor(row["input_ids"])[:length] for row, length in zip(rows, begin, strict=True)]
        masks = [torch.ones_like(prompt) for prompt in prompts]
        batch["prompts"] = pad_sequence(prompts, batch_first=True, padding_side="left")
        batch["prompt_attention_mask"] = pad_sequence(masks, batch_first=True, padding_side="left")
        return batch

    return collate
