"""Compare two tokenizers, and match the rows of two heads that belong to the same token."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from itertools import zip_longest

import torch
from transformers import PreTrainedTokenizerBase

from hf_semalign.errors import InputError
from hf_semalign.models.loading import unknown_words_explained
from hf_semalign.models.token_bytes import TokenBytes

MIN_SHARED = 0.9  # share of the smaller vocabulary that two releases of one tokenizer must have in common
ROWS_PER_CHANNEL = 4  # shared tokens that a map between two tokenizers needs for each channel of the target
SAMPLE = "The 3 foxes' naïve re-run: 12.50 km -> 1,024 tests?\n\tdef f_1(x):\n        return x**2  # 東京 😀"


def differing(source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Describe how two tokenizers differ; ``None`` if they are the same up to added tokens."""
    source_vocabulary, target_vocabulary = source_tokenizer.get_vocab(), target_tokenizer.get_vocab()
    shared = source_vocabulary.keys() & target_vocabulary.keys()
    moved = [token for token in shared if source_vocabulary[token] != target_vocabulary[token]]
    smaller = min(len(source_vocabulary), len(target_vocabulary))
    parting = _first_difference(source_tokenizer, target_tokenizer, SAMPLE)
    if len(shared) >= MIN_SHARED * smaller and not moved and not parting:
        return None
    return (
        f"The tokenizers share {len(shared)} tokens of {len(source_vocabulary)} (source) and {len(target_vocabulary)} "
        f"(target), {len(moved)} of them under different ids, {parting or 'and split a sample text alike'}"
    )


def shared_token_ids(
    source_tokenizer: PreTrainedTokenizerBase | None,
    target_tokenizer: PreTrainedTokenizerBase | None,
    source_rows: int,
    target_rows: int,
) -> torch.Tensor:
    """Ids of the tokens that are in both vocabularies, matched by token string. Padded rows and added tokens are left out.

    Args:
        source_tokenizer: tokenizer of the source.
        target_tokenizer: tokenizer of the target. Without both tokenizers, the heads must have the same number of rows.
        source_rows: rows of the source's head.
        target_rows: rows of the target's head.

    Returns:
        ``[V_shared]`` ascending ids.

    Raises:
        ValueError: these are two different tokenizers: they share too few tokens, give shared tokens different ids, or split a
            sample text differently. For such a pair, use :func:`rows_by_bytes`.
    """
    if source_tokenizer is None or target_tokenizer is None:
        if source_rows != target_rows:
            raise InputError(
                f"The heads have {source_rows} (source) and {target_rows} (target) rows: pass both tokenizers so that shared "
                "tokens can be matched."
            )
        return torch.arange(source_rows)
    if difference := differing(source_tokenizer, target_tokenizer):
        raise InputError(
            f"{difference}: source and target need the same tokenizer (up to added tokens and padded rows). Choose a pair from "
            "one model family."
        )
    source_vocabulary, target_vocabulary = source_tokenizer.get_vocab(), target_tokenizer.get_vocab()
    shared, limit = source_vocabulary.keys() & target_vocabulary.keys(), min(source_rows, target_rows)
    return torch.tensor(sorted(index for token in shared if (index := source_vocabulary[token]) < limit))


def rows_by_bytes(
    source: TokenBytes, target: TokenBytes, source_rows: int, target_rows: int, *, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Match rows of two heads whose tokens spell the same bytes. Bytes that two tokens of one side spell are left out.

    Args:
        source: bytes of the source's tokens.
        target: bytes of the target's tokens.
        source_rows: rows of the source's head.
        target_rows: rows of the target's head.
        width: channels of the target.

    Returns:
        ``[V_shared]`` source ids and ``[V_shared]`` target ids, ordered by target id.

    Raises:
        ValueError: there are fewer than four matches per channel of the target.
    """
    ours, theirs = _token_of(source, source_rows), _token_of(target, target_rows)
    shared = [text for text in theirs if text in ours]
    if len(shared) < ROWS_PER_CHANNEL * width:
        raise InputError(
            f"Only {len(shared)} tokens spell the same bytes in both tokenizers, of {len(ours)} (source) and {len(theirs)} "
            f"(target): the map needs {ROWS_PER_CHANNEL * width}, {ROWS_PER_CHANNEL} for each of the target's {width} "
            "channels. Choose a pair whose vocabularies have more in common, or a narrower target."
        )
    return torch.tensor([ours[text] for text in shared]), torch.tensor([theirs[text] for text in shared])


def _token_of(side: TokenBytes, rows: int) -> dict[bytes, int]:
    """Token of each text that exactly one of the first rows spells."""
    spelled = side.spelled[:rows]
    count = Counter(spelled)
    return {text: token for token, text in enumerate(spelled) if text is not None and count[text] == 1}


def _first_difference(
    source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase, text: str
) -> str | None:
    """Describe where two tokenizers first split a text differently."""
    source, target = _cut(source_tokenizer, text), _cut(target_tokenizer, text)
    place = next((k for k, (ours, theirs) in enumerate(zip_longest(source, target)) if ours != theirs), None)
    if place is None:
        return None
    return (
        f"and differ at token {place} of {text!r}: after {source[max(0, place - 3) : place]} the source has "
        f"{source[place : place + 3]}, the target {target[place : place + 3]}"
    )


def _cut(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Tokens of a text; empty if the tokenizer meets an unknown word and has no token for it."""
    with suppress(InputError), unknown_words_explained():
        return list(tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return []
