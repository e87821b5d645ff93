"""Batched generation that drops a sequence from the batch once it has ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import psutil
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from hf_semalign.models.anatomy import CausalLM, base_model, dissect
from hf_semalign.models.hooks import contiguous_input
from hf_semalign.models.loading import HALVES, is_quantised, product_seconds

logger = logging.getLogger(__name__)
SEGMENT = 8  # tokens between two checks for ended sequences
MOST_ROWS_ON_CPU = 64  # prompts per batch; more are no faster on two cores
MOST_ROWS = 256  # the same on a GPU
PROMPT_TOKENS = 512  # prompt length that the memory estimate assumes


@contextmanager
def generating(model: CausalLM) -> Iterator[None]:
    """Inside the block, turn off dropout and ignore the model's own generation settings except its end tokens.

    Some models, such as Qwen2.5, come with a repetition penalty. With it, greedy decoding is not greedy.
    """
    base, was_training = base_model(model), model.training
    settings: Any = base.generation_config
    base.generation_config = GenerationConfig(bos_token_id=settings.bos_token_id, eos_token_id=settings.eos_token_id)
    model.eval()
    try:
        with contiguous_input(dissect(model).head):
            yield
    finally:
        base.generation_config = settings
        model.train(was_training)


def end_tokens(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's EOS and the model's own end tokens, such as the end of a turn."""
    settings: Any = base_model(model).generation_config
    ends = settings.eos_token_id
    found = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return sorted(token for token in found if token is not None)


@torch.no_grad()
def continue_prompts(
    model: CausalLM,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    temperature: float = 0.0,
    has_ended: Callable[[list[int]], bool] = lambda tokens: False,
    on_end: Callable[[int], Any] = lambda count: None,
) -> torch.Tensor:
    """Continue a batch of prompts, greedily or by sampling. Call it inside :func:`generating`.

    After every ``SEGMENT`` tokens, ended sequences leave the batch and the cache, so one long answer does not slow down its
    whole batch. Models with a recurrent state, such as Mamba, generate the whole batch to the end.

    Args:
        model: a causal LM, with or without a PEFT adapter.
        input_ids: ``[B, T]``, padded on the left.
        attention_mask: ``[B, T]``.
        max_new_tokens: length limit of an answer in tokens, including its end token.
        eos_token_ids: tokens that end an answer.
        pad_token_id: fills up the shorter answers.
        temperature: 0 takes the likeliest token. Above 0, tokens are drawn from the whole vocabulary with torch's generator.
        has_ended: whether an answer with these tokens has ended, for example at a stop string.
        on_end: called with the number of answers that have just ended.

    Returns:
        The new tokens ``[B, N]``, ``N`` at most ``max_new_tokens``.
    """
    eos, width = set(eos_token_ids), input_ids.shape[1]
    settings: dict[str, Any] = {"eos_token_id": list(eos), "pad_token_id": pad_token_id, "use_cache": True}
    settings |= {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    settings["synced_gpus"] = isinstance(model, FSDPModule)  # under FSDP2 every process takes part in each forward
    generate = partial(cast(Any, model).generate, **settings, return_dict_in_generate=True)

    answers: list[list[int]] = [[] for _ in input_ids]
    rows = list(range(len(input_ids)))
    cached: dict[str, Cache] = {}
    while rows and input_ids.shape[1] < width + max_new_tokens:
        count = min(SEGMENT, width + max_new_tokens - input_ids.shape[1])
        output = generate(input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=count, **cached)
        ids, cache = output.sequences, output.past_key_values
        if not _is_of_keys(cache):  # a recurrent state cannot be resumed
            on_end(len(rows))
            whole = generate(input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens)
            return whole.sequences[:, width:]
        for row, tokens in zip(rows, ids[:, input_ids.shape[1] :].tolist(), strict=True):
            answers[row] += tokens
        going = [place for place, row in enumerate(rows) if not eos & set(answers[row]) and not has_ended(answers[row])]
        on_end(len(rows) - len(going))
        rows = [rows[place] for place in going]
        kept = torch.tensor(going, dtype=torch.long, device=ids.device)
        attention_mask = torch.cat((attention_mask, attention_mask.new_ones(len(ids), ids.shape[1] - input_ids.shape[1])), 1)
        input_ids, attention_mask, cached = ids[kept], attention_mask[kept], {"past_key_values": cache}
        if len(going) < len(ids):
            cache.reorder_cache(kept)
    on_end(len(rows))
    longest = max(map(len, answers), default=0)
    padded = [tokens + [pad_token_id] * (longest - len(tokens)) for tokens in answers]
    return torch.tensor(padded, dtype=torch.long, device=input_ids.device).reshape(len(answers), longest)


def _is_of_keys(cache: Any) -> bool:
    return isinstance(cache, Cache) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)


def rows_that_fit(model: CausalLM, new_tokens: int) -> int:
    """Batch size for which keys and values fit into half of the free memory, up to a limit per device."""
    config: Any = base_model(model).config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    channels = (getattr(config, "num_key_value_heads", None) or heads) * width
    row = 2 * config.num_hidden_layers * channels * model.dtype.itemsize * (PROMPT_TOKENS + new_tokens)
    most = MOST_ROWS_ON_CPU if model.device.type == "cpu" else MOST_ROWS
    return max(1, min(most, _free_memory(model.device) // 2 // row))


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def fastest_dtype(model: CausalLM) -> torch.dtype:
    """The dtype in which a model generates fastest on this machine.

    This is the model's own dtype, except for half-precision weights on a CPU without half-precision instructions. There
    float32 is several times faster, and is chosen if memory allows a copy of the weights.
    """
    own = cast(torch.dtype, model.dtype)
    if model.device.type != "cpu" or own not in HALVES or is_quantised(cast(Any, base_model(model)).config):
        return own
    if product_seconds(own) <= product_seconds(torch.float32):
        return own
    copy = 4 * sum(p.numel() for p in model.parameters())
    if copy > _free_memory(model.device):
        logger.warning("Generating in %s. float32 would be faster here, but memory does not allow a copy of the weights.", own)
        return own
    return torch.float32


@contextmanager
def computing_in(model: CausalLM, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, cast half-precision weights to another dtype. The original tensors are restored afterwards."""
    halves = [p for p in model.parameters() if p.dtype in HALVES and p.dtype != dtype]
    kept = [p.data for p in halves]
    try:
        for parameter in halves:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in zip(halves, kept, strict=True):
            parameter.data = data
