"""Evaluation: answer loss, forgetting, and exact match of greedy generation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from hf_semalign.errors import InputError
from hf_semalign.experiments.generation import continue_prompts, generating
from hf_semalign.method.losses import token_cross_entropy, token_hits, token_kl
from hf_semalign.models.anatomy import CausalLM, base_model, dissect, embedding_rows
from hf_semalign.splits import tensors_of, valid_positions

Batches = Iterable[Mapping[str, torch.Tensor]]


@torch.no_grad()
def final_states(model: CausalLM, batches: Batches) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the final hidden states at the valid positions of each batch, ``[N, D]``, and the next tokens, ``[N]``.

    Args:
        model: a causal LM. Its training mode is restored at the end.
        batches: dicts of ``input_ids, attention_mask, labels`` ``[B, T]``.

    Raises:
        ValueError: the batches do not have these tensors and shapes, or have no valid position.
    """
    anatomy, was_training, positions = dissect(model), model.training, 0
    model.eval()
    for batch in batches:
        ids, mask, labels = tensors_of(batch, embedding_rows(base_model(model)), anatomy.device)
        valid = valid_positions(labels)
        positions += int(valid.sum())
        hidden = anatomy.decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        yield hidden[valid], labels[:, 1:][valid[:, :-1]]
    model.train(was_training)
    if not positions:
        raise InputError("There are no valid positions in the batches: give rows with answers.")


def answer_loss(model: CausalLM, batches: Batches) -> float:
    """Mean cross-entropy of the answers in nats per token. Takes the arguments of :func:`final_states`."""
    head, total, count = dissect(model).output_head(), 0.0, 0
    for hidden, tokens in final_states(model, batches):
        total, count = total + token_cross_entropy(hidden, head, tokens).sum().item(), count + len(tokens)
    return total / count


def drift(model: CausalLM, batches: Batches, before: Sequence[torch.Tensor]) -> dict[str, float]:
    """Measure how training changed a model on data that it was not trained on.

    Args:
        model: the model after training. Its head must be unchanged.
        batches: see :func:`final_states`.
        before: the model's final states on the same batches before training, ``[N, D]`` each, on any device.

    Returns:
        ``kl`` is KL(before || after) and ``loss`` the cross-entropy of the answers, both in nats per token. ``accuracy`` is
        the share of answer tokens that the model ranks first.
    """
    head, count = dissect(model).output_head(), 0
    sums = dict.fromkeys(("kl", "loss", "accuracy"), 0.0)
    for (hidden, tokens), earlier in zip(final_states(model, batches), before, strict=True):
        with torch.no_grad():
            sums["kl"] += token_kl(hidden, head, earlier.to(hidden.device), head).sum().item()
        sums["loss"] += token_cross_entropy(hidden, head, tokens).sum().item()
        sums["accuracy"] += token_hits(hidden, head, tokens).sum().item()
        count += len(tokens)
    return {name: value / count for name, value in sums.items()}


@torch.no_grad()
def greedy_answers(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 100,
) -> list[str]:
    """Continue prompts by greedy decoding, see :mod:`hf_semalign.experiments.generation`.

    Args:
        model: a causal LM, with or without a PEFT adapter. Its training mode is restored.
        tokenizer: the model's tokenizer. Prompts are padded on the left.
        prompts: plain texts.
        max_new_tokens: length limit of an answer in tokens, including its end token.
        batch_size: prompts per batch.

    Returns:
        The decoded answers without special tokens, stripped.
    """
    device = next(model.parameters()).device
    answers: list[str] = []
    with generating(model):
        for start in range(0, len(prompts), batch_size):
            texts = list(prompts[start : start + batch_size])
            inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
            new = continue_prompts(
                model,
                **inputs.to(device),
                max_new_tokens=max_new_tokens,
                eos_token_ids=[tokenizer.eos_token_id],
                pad_token_id=tokenizer.pad_token_id,
            )
            answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def exact_match(model: CausalLM, tokenizer: PreTrainedTokenizerBase, records: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Share of records whose greedy answer equals the completion, by skill.

    Args:
        model: a causal LM.
        tokenizer: the model's tokenizer.
        records: rows with ``prompt``, ``completion`` and ``skill``.

    Returns:
        A share from 0 to 1 per skill, in order of first appearance.
    """
    longest = max(len(tokenizer(record["completion"])["input_ids"]) for record in records) + 1
    answers = greedy_answers(model, tokenizer, [record["prompt"] for record in records], max_new_tokens=longest)
    hits: dict[str, list[bool]] = defaultdict(list)
    for record, answer in zip(records, answers, strict=True):
        hits[record["skill"]].append(answer == record["completion"].strip())
    return {skill: sum(values) / len(values) for skill, values in hits.items()}
