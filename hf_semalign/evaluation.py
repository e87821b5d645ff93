"""Evaluation: answer loss, and exact match of real greedy generation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from hf_semalign.anatomy import CausalLM, dissect
from hf_semalign.losses import token_cross_entropy
from hf_semalign.splits import valid_positions


@torch.no_grad()
def answer_loss(model: CausalLM, batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
    """Mean cross-entropy of the answers in nats a token.

    Args:
        model: a causal LM; its mode is restored.
        batches: dicts of ``input_ids, attention_mask, labels`` ``[B, T]``.
    """
    anatomy = dissect(model)
    device, head = anatomy.device, anatomy.output_head()
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        labels = batch["labels"].to(device)
        valid = valid_positions(labels)
        hidden = anatomy.decoder(
            input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device), use_cache=False
        )[0]
        losses = token_cross_entropy(hidden[valid], head, labels[:, 1:][valid[:, :-1]])
        total, count = total + losses.sum().item(), count + len(losses)
    model.train(was_training)
    return total / count


@torch.no_grad()
def greedy_answers(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 100,
) -> list[str]:
    """Continue prompts by greedy decoding.

    Args:
        model: a causal LM, bare or inside a peft model; its mode is restored.
        tokenizer: its tokenizer; prompts are padded on the left.
        prompts: plain texts.
        max_new_tokens: longest answer, in tokens, its end token included.
        batch_size: prompts at a time.

    Returns:
        The decoded answers without special tokens, stripped.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        texts = list(prompts[start : start + batch_size])
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
        ids = cast(Any, model).generate(
            **inputs.to(device),
            do_sample=False,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            synced_gpus=isinstance(model, FSDPModule),  # where no process can go on without the others
        )
        new = ids[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    model.train(was_training)
    return answers


def exact_match(model: CausalLM, tokenizer: PreTrainedTokenizerBase, records: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Share of records whose greedy answer is the completion, token for token, by skill.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        records: rows with ``prompt``, ``completion`` and ``skill``.

    Returns:
        Share in 0 to 1 for each skill, in the order of first appearance.
    """
    longest = max(len(tokenizer(record["completion"])["input_ids"]) for record in records) + 1
    answers = greedy_answers(model, tokenizer, [record["prompt"] for record in records], max_new_tokens=longest)
    hits: dict[str, list[bool]] = defaultdict(list)
    for record, answer in zip(records, answers, strict=True):
        hits[record["skill"]].append(answer == record["completion"].strip())
    return {skill: sum(values) / len(values) for skill, values in hits.items()}
