"""Check values from YAML, JSON or a caller against type hints.

``huggingface_hub.dataclasses`` validates too, but it refuses an int where a float is expected, and it refuses unknown keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from hf_semalign.errors import InputError, brief

KINDS: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: ((str, PathLike), "text"),
    list: ((list, tuple), "a list"),
    tuple: ((list, tuple), "a list"),
    dict: (Mapping, "names and values"),
}


def check_kinds(value: Any, hint: Any, where: str = "") -> None:
    """Raise an error if a value does not match a type hint.

    Args:
        value: the value.
        hint: the type. For a dataclass or ``TypedDict``, the value is a mapping, which may have extra keys.
        where: where the value comes from, such as a file; used in the message.

    Raises:
        ValueError: the value does not match; the message names the first part that differs and what was expected.
    """
    if fault := next(_faults(value, hint, "", where), None):
        raise InputError(fault)


def _faults(value: Any, hint: Any, name: str, where: str) -> Iterator[str]:
    """Yield a message for each part of a value that does not match; ``name`` is the part's path, as ``pairing.scores[2]``."""
    place = " of ".join(filter(None, (name, where)))
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kind = next((choice for choice in choices if _is(value, choice)), None)
    if kind is None:
        expected = " or ".join(_words(choice) for choice in choices if choice is not NoneType)
        yield f"{place} is {brief(repr(value))}: expected {expected}."
        return
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if _has_fields(origin):
        hints = get_type_hints(origin)
        if missing := [key for key in hints if key in _required(origin) and key not in value]:
            yield f"{place} lacks {missing}."
        for key in filter(value.__contains__, hints):
            yield from _faults(value[key], hints[key], f"{name}.{key}".lstrip("."), where)
    elif origin is dict and parts:
        for key, one in value.items():
            yield from _faults(key, parts[0], f"the name {key!r}", place)
            yield from _faults(one, parts[1], f"{name}.{key}".lstrip("."), where)
    elif origin in (list, tuple) and parts:
        for number, one in enumerate(value):
            yield from _faults(one, parts[0], f"{name}[{number}]", where)


def _is(value: Any, hint: Any) -> bool:
    """Whether a value has a hint's outer type; its items are not checked."""
    kind = get_origin(hint) or hint
    if kind is Any or kind is Literal:
        return kind is Any or value in get_args(hint)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, Mapping if _has_fields(kind) else KINDS.get(kind, (kind,))[0])


def _words(hint: Any) -> str:
    kind = get_origin(hint) or hint
    if kind is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    return KINDS.get(dict if _has_fields(kind) else kind, (kind, kind.__name__))[1]


def _has_fields(kind: Any) -> bool:
    return is_dataclass(kind) or is_typeddict(kind)


def _required(kind: Any) -> set[str]:
    if is_typeddict(kind):
        return set(kind.__required_keys__)
    return {item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING}
