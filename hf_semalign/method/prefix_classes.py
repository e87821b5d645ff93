"""Classes of tokens over which the predictions of two models with different tokenizers can be compared.

Each token is led to a text that both vocabularies hold as a token: to its own, or else to the first token of the other
tokenizer's cut of it, and from there on in the same way, each text shorter than the one before. So "201" counts as "2" for a
tokenizer that cuts digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from hf_semalign.models.token_bytes import TokenBytes

END = "the end of an answer"
Key = bytes | str | None  # what a token spells; the name of a special one; None for what has no counterpart


@dataclass(frozen=True)
class PrefixClasses:
    """Which class each token of two vocabularies is in.

    Attributes:
        source: ``[V_src]`` int64, class of each token of the source, ``count`` for tokens that are left out.
        target: ``[V_tgt]`` int64, class of each token of the target.
        count: number of classes; each has tokens of the target.
    """

    source: torch.Tensor
    target: torch.Tensor
    count: int

    def to(self, device: torch.device | str) -> PrefixClasses:
        """The classes on a device."""
        return PrefixClasses(self.source.to(device), self.target.to(device), self.count)


def prefix_classes(source: TokenBytes, target: TokenBytes, source_rows: int, target_rows: int) -> PrefixClasses:
    """The classes of two vocabularies.

    Tokens that spell the same bytes are one class, and so are special tokens of one name. The tokens that end an answer are one
    class, unless both tokenizers end it by the same ones. All that has no counterpart is one last class; where only the source
    has such tokens, nothing of the target can match them, and they are left out.

    Args:
        source: what the source's tokens spell.
        target: what the target's tokens spell.
        source_rows: rows of the source's head.
        target_rows: rows of the target's head.

    Returns:
        Classes of the first rows of both heads; padded rows behind the vocabulary have none.
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
    """What each of the first tokens is matched by; with ``merged`` all that end an answer by one key."""
    return [
        END if merged and token in side.ends else side.names[token] if side.spelled[token] is None else side.spelled[token]
        for token in range(count)
    ]


def _led_to(keys: Sequence[Key], other: TokenBytes, own: TokenBytes, shared: set[Key]) -> list[Key]:
    """The shared key that each key leads to, by the cut of the other tokenizer first and then by each in turn."""

    @cache
    def lead(text: bytes, turn: int) -> Key:
        if text in shared:
            return text
        first = (other, own)[turn].first(text)
        if first is None or len(first) >= len(text):  # a tokenizer that has no token for some bytes, or changes them
            return None
        return lead(first, 1 - turn)

    return [lead(key, 0) if isinstance(key, bytes) else key if key in shared else None for key in keys]
