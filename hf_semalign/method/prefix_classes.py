"""Token classes for comparing the predictions of two models with different tokenizers.

Each token is mapped to a text that is a token in both vocabularies. If its own text is not, the other tokenizer splits the text
and its first token is tried next, and so on with ever shorter texts. So "201" counts as "2" if one tokenizer splits digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from hf_semalign.models.token_bytes import TokenBytes

END = "the end of an answer"
Key = bytes | str | None  # a token's bytes; the name of a special token; None for a token without a counterpart


@dataclass(frozen=True)
class PrefixClasses:
    """Class of each token in two vocabularies.

    Attributes:
        source: ``[V_src]`` int64, class of each source token; ``count`` for tokens that are left out.
        target: ``[V_tgt]`` int64, class of each target token.
        count: number of classes; each of them has target tokens.
    """

    source: torch.Tensor
    target: torch.Tensor
    count: int

    def to(self, device: torch.device | str) -> PrefixClasses:
        """Move the classes to a device."""
        return PrefixClasses(self.source.to(device), self.target.to(device), self.count)


def prefix_classes(source: TokenBytes, target: TokenBytes, source_rows: int, target_rows: int) -> PrefixClasses:
    """Build the classes of two vocabularies.

    Tokens that spell the same bytes form a class, and so do special tokens with the same name. All tokens that end an answer
    form one class, unless both tokenizers use the same ones. All tokens without a counterpart form the last class; if only the
    source has such tokens, no target token can match them, and they are left out.

    Args:
        source: bytes of the source's tokens.
        target: bytes of the target's tokens.
        source_rows: rows of the source's head.
        target_rows: rows of the target's head.

    Returns:
        Classes of the first rows of both heads; padded rows after the vocabulary have no class.
    """
    rows = min(source_rows, len(source.spelled)), min(target_rows, len(target.spelled))
    alike = {source.names[token] for token in source.ends} == {target.names[token] for token in target.ends}
    ours, theirs = (_keys(side, count, not alike) for side, count in zip((source, target), rows, strict=True))
    shared = set(ours) & set(theirs) - {None}
    ours, theirs = _led_to(ours, target, source, shared), _led_to(theirs, source, target, shared)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(key for key in theirs if key is not None))}
    other = len(numbers)
    classes = [torch.tensor([other if key is None else numbers[key] for key in keys]) for keys in (ours, theirs)]
    return PrefixClasses(classes[0], classes[1], other + (None in theirs))


def _keys(side: TokenBytes, count: int, merged: bool) -> list[Key]:
    """Matching key of each of the first ``count`` tokens; with ``merged``, all tokens that end an answer get one key."""
    return [
        END if merged and token in side.ends else side.names[token] if side.spelled[token] is None else side.spelled[token]
        for token in range(count)
    ]


def _led_to(keys: Sequence[Key], other: TokenBytes, own: TokenBytes, shared: set[Key]) -> list[Key]:
    """The shared key that each key is mapped to. Both tokenizers split the text in turn, ``other`` first."""

    @cache
    def lead(text: bytes, turn: int) -> Key:
        if text in shared:
            return text
        first = (other, own)[turn].first(text)
        if first is None or len(first) >= len(text):  # the tokenizer has no token for these bytes, or changes them
            return None
        return lead(first, 1 - turn)

    return [lead(key, 0) if isinstance(key, bytes) else key if key in shared else None for key in keys]
