"""Generation in batches, in which a sequence that has ended is no longer paid for."""

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
SEGMENT = 8  # tokens between two looks at what has ended
MOST_ROWS_ON_CPU = 64  # prompts at a time: more are no faster on two cores
MOST_ROWS = 256  # the same on a GPU
PROMPT_TOKENS = 512  # a prompt's length that memory is planned for


@contextmanager
def generating(model: CausalLM) -> Iterator[None]:
    """Inside the block, a model generates without dropout, and its own generation settings are set aside, except end tokens.

    Some models come with a repetition penalty (Qwen2.5), and with that greedy decoding is not greedy.
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
    """Tokens that end an answer: the tokenizer's EOS, and those of the model's own settings, such as the end of a turn."""
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
    """Continue a batch of prompts, greedily or by sampling; call it inside :func:`generating`.

    After every ``SEGMENT`` tokens the sequences that have ended leave the batch and the cache, so that one long answer does not
    make its whole batch as expensive as itself. Families with a recurrent state, such as Mamba, generate whole batches.

    Args:
        model: a causal LM, bare or inside a peft model.
        input_ids: ``[B, T]``, padded on the left.
        attention_mask: ``[B, T]``.
        max_new_tokens: longest answer, in tokens, its end token included.
        eos_token_ids: tokens that end an answer.
        pad_token_id: stands behind an answer.
        temperature: 0 takes the likeliest token; above, tokens are drawn from the whole vocabulary by torch's generator.
        has_ended: tells of an answer's tokens whether it is over, as at a stop string.
        on_end: called with the number of answers that have just ended.

    Returns:
        The new tokens ``[B, N]``, ``N`` at most ``max_new_tokens``.
    """
    eos, width = set(eos_token_ids), input_ids.shape[1]
    settings: dict[str, Any] = {"eos_token_id": list(eos), "pad_token_id": pad_token_id, "use_cache": True}
    settings |= {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    settings["synced_gpus"] = isinstance(model, FSDPModule)  # where no process can go on without the others
    generate = partial(cast(Any, model).generate, **settings, return_dict_in_generate=True)

    answers: list[list[int]] = [[] for _ in input_ids]
    rows = list(range(len(input_ids)))
    cached: dict[str, Cache] = {}
    while rows and input_ids.shape[1] < width + max_new_tokens:
        count = min(SEGMENT, width + max_new_tokens - input_ids.shape[1])
        output = generate(input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=count, **cached)
        ids, cache = output.sequences, output.past_key_values
        if not _is_of_keys(cache):  # a recurrent state cannot be taken up again
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
    """Prompts at a time for which the keys and values take at most half of the memory that is free, up to a limit by device."""
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
    """The dtype that a model generates in fastest here: its own, or float32 for half-precision weights on a CPU that has no
    instructions for them, where it is several times faster, if there is memory for the copy.
    """
    own = cast(torch.dtype, model.dtype)
    if model.device.type != "cpu" or own not in HALVES or is_quantised(cast(Any, base_model(model)).config):
        return own
    if product_seconds(own) <= product_seconds(torch.float32):
        return own
    copy = 4 * sum(p.numel() for p in model.parameters())
    if copy > _free_memory(model.device):
        logger.warning("float32 would be faster here than %s, but there is no memory for a copy of the weights.", own)
        return own
    return torch.float32


@contextmanager
def computing_in(model: CausalLM, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, half-precision weights stand in another dtype; behind it they are the tensors that they were."""
    halves = [p for p in model.parameters() if p.dtype in HALVES and p.dtype != dtype]
    kept = [p.data for p in halves]
    try:
        for parameter in halves:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in zip(halves, kept, strict=True):
            parameter.data = data
