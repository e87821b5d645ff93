"""Tokenize rows: choose the columns to read, check them, apply chat templates and mark the supervised tokens."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import compress, takewhile
from operator import index
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_semalign.errors import InputError

IGNORED = -100
OF_TEMPLATE = ("tools", "chat_template_kwargs")  # columns that are passed to the chat template
OF_SOURCE = {"source_prompt": "prompt", "source_chat_template_kwargs": "chat_template_kwargs"}  # what the source reads instead
REFUSED_COLUMNS = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio"), "only text is supported"),
    **dict.fromkeys(("chosen", "rejected"), "preference training is not supported; name the answer's column completion"),
    **dict.fromkeys(("completion_mask", "assistant_masks"), "set labels to -100 for tokens that are not supervised"),
    **dict.fromkeys(("position_ids", "seq_lengths"), "examples in a packed row would attend to each other; use a row for each"),
}
Record = Mapping[str, Any]


def form_of(record: Record) -> str:
    """Which columns of a row are read: ``prompt`` (with ``completion`` if present), ``messages`` or ``ids``.

    Columns with the value ``None`` are ignored, and so is a ``prompt`` without ``completion`` if the row has ``messages``.
    """
    present = {name for name, value in record.items() if value is not None}
    if {"prompt", "completion"} <= present:
        return "prompt"
    return next((form for name, form in (("messages",) * 2, ("input_ids", "ids"), ("prompt",) * 2) if name in present), "ids")


def source_record(record: Record) -> dict[str, Any]:
    """A row as the source reads it: with ``source_prompt`` in place of ``prompt``, and ``source_chat_template_kwargs`` in place
    of ``chat_template_kwargs``.
    """
    own = {name: record[column] for column, name in OF_SOURCE.items() if record.get(column) is not None}
    return {name: value for name, value in record.items() if name not in OF_SOURCE} | own


def check_text(record: Record, where: str) -> None:
    """Check that ``prompt`` and ``completion`` are texts or lists of messages, and that ``messages`` is such a list. A
    ``source_prompt`` must be of the kind of ``prompt``.

    Args:
        record: a row; rows of token ids always pass.
        where: name of the row, for the message.

    Raises:
        ValueError: the row has other values; the message shows them.
    """
    names = ("prompt", "completion", "messages")
    found = {name: record[name] for name in names if record.get(name) is not None}
    if len(found) == len(names):
        raise InputError(f"{where} has {', '.join(names)}: expected prompt and completion, or messages, but not both.")
    _check_columns(record, where)
    if "messages" in found:
        fine = _are_messages(found["messages"])
    else:
        fine = all(isinstance(value, str) for value in found.values()) or all(map(_are_messages, found.values()))
        fine &= "prompt" not in found or record.get("completion", "") is not None
    if not fine:
        shown = str({name: record[name] for name in names if name in record})[:120]
        raise InputError(
            f"{where} has {shown}: expected text in prompt and completion, or lists of messages with role and content. "
            "Correct or remove this row."
        )
    own, prompt = (record.get(name) for name in ("source_prompt", "prompt"))
    _check_kwargs(record, "source_chat_template_kwargs", where)
    if own is None:
        return
    if form_of(record) != "prompt" or not (isinstance(own, str) if isinstance(prompt, str) else _are_messages(own)):
        raise InputError(
            f"{where} has the source_prompt {str(own)[:60]!r}: expected text beside a prompt of text, or messages beside a "
            "prompt of messages. Write a row with messages as prompt and completion."
        )


def _check_columns(record: Record, where: str) -> None:
    for name, reason in REFUSED_COLUMNS.items():
        if record.get(name) is not None and not _are_plain_positions(name, record[name]):
            raise InputError(f"{where} has the column {name!r}: {reason}. Remove the column if it does not matter here.")


def _check_kwargs(record: Record, name: str, where: str) -> None:
    if not isinstance(record.get(name), Mapping | None):
        raise InputError(f"{where} has {name} {record[name]!r}: expected names and values.")


def _are_plain_positions(name: str, value: Any) -> bool:
    return name == "position_ids" and list(value) == list(range(len(value)))


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(
            isinstance(turn, Mapping)
            and "role" in turn
            and (isinstance(turn.get("content"), str) or bool(turn.get("tool_calls")))
            and turn.get("weight") in (None, 0, 1)
            for turn in value
        )
    )


def _token_ids(record: Record, where: str = "A row") -> tuple[list[int], list[int]]:
    """``input_ids`` and ``labels`` of a row as Python integers, without padding if the row has an ``attention_mask``."""
    if not {"input_ids", "labels"} <= record.keys():
        raise InputError(
            f"{where} has the columns {sorted(record)}: expected prompt and completion, or messages, or input_ids and labels."
        )
    try:
        ids, labels = ([index(value) for value in record[column]] for column in ("input_ids", "labels"))
    except TypeError as error:
        raise InputError(f"{where} has input_ids or labels that are not a list of whole numbers: {error}.") from error
    kept = [True] * len(ids) if record.get("attention_mask") is None else [bool(value) for value in record["attention_mask"]]
    if not len(ids) == len(labels) == len(kept):
        masked = "" if len(kept) == len(ids) else f" and an attention_mask of {len(kept)}"
        raise InputError(f"{where} has {len(ids)} input_ids but {len(labels)} labels{masked}; expected equal lengths.")
    if negative := [value for value in (*ids, *(label for label in labels if label != IGNORED)) if value < 0]:
        raise InputError(f"{where} has the token id {negative[0]}: expected ids from 0 up, and {IGNORED} for ignored labels.")
    return list(compress(ids, kept)), list(compress(labels, kept))


def prompt_of(record: Record) -> str:
    """Prompt of a row, for comparison: normalised text, or the ids before the first supervised one (all if there is none)."""
    form = form_of(record)
    if form == "ids":
        ids, labels = _token_ids(record)
        prompt_ids = [token for token, _ in takewhile(lambda pair: pair[1] == IGNORED, zip(ids, labels, strict=True))]
        return " ".join(map(str, prompt_ids or ids))
    prompt = record["prompt"] if form == "prompt" else before_answer(record["messages"])
    return normalise_prompt(prompt if isinstance(prompt, str) else "\n".join(turn.get("content") or "" for turn in prompt))


def normalise_prompt(text: str) -> str:
    """Normalise a prompt's Unicode form (NFKC), case and white space, so that equal prompts compare equal across splits."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def before_answer(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The turns before the final assistant turn; all turns if the last one is not by the assistant."""
    turns = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return [dict(turn) for turn in turns]


def tokenize(record: Record, tokenizer: PreTrainedTokenizerBase | None, where: str) -> tuple[list[int], list[int]]:
    """``input_ids`` and ``labels`` of a row, see :func:`hf_semalign.splits.encode`; errors name it by ``where``."""
    form = form_of(record)
    if form == "ids" or (form == "prompt" and "completion" not in record):
        _check_columns(record, where)
        if form == "ids" and (own := [name for name in OF_SOURCE if record.get(name) is not None]):
            raise InputError(f"{where} has {own[0]}, but no text for it: write the row as prompt and completion.")
        return _token_ids(record, where)
    check_text(record, where)
    if tokenizer is None:
        raise InputError(f"{where} holds text: pass its tokenizer as processing_class.")
    if form == "messages":
        return _tokenize_chat(record["messages"], 0, tokenizer, where, _for_template(record, where))
    prompt, completion = record["prompt"], record["completion"]
    if not isinstance(prompt, str):
        return _tokenize_chat([*prompt, *completion], len(prompt), tokenizer, where, _for_template(record, where))
    ids = _text_ids(prompt + completion, tokenizer)
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return ids, _mask_prompt(_text_ids(prompt, tokenizer), ids)


def prompt_ids(record: Record, tokenizer: PreTrainedTokenizerBase, where: str = "A row") -> list[int]:
    """Token ids of a row's ``prompt``, for generation. For messages, the template's generation prompt is added.

    Raises:
        ValueError: the prompt is a list of messages and the tokenizer has no chat template.
    """
    prompt = record["prompt"]
    if not isinstance(prompt, str):
        return _render(prompt, tokenizer, where, _for_template(record, where), opening=True)
    ids = _text_ids(prompt, tokenizer)
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text. BOS is kept once if the text starts with it and the tokenizer adds it too."""
    ids: list[int] = tokenizer(text)["input_ids"]
    twice = tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2
    return ids[1:] if twice and text.startswith(str(tokenizer.bos_token)) else ids


def _mask_prompt(prompt: Sequence[int], ids: Sequence[int]) -> list[int]:
    # A tokenizer may merge the end of the prompt and the start of the answer into one token, which then counts as answer.
    shared = 0
    while shared < min(len(prompt), len(ids)) and prompt[shared] == ids[shared]:
        shared += 1
    return [IGNORED] * shared + list(ids[shared:])


def _for_template(record: Record, where: str) -> dict[str, Any]:
    """Template arguments of a row: ``tools``, which may be JSON text, and ``chat_template_kwargs``."""
    tools, kwargs = (record.get(name) for name in OF_TEMPLATE)
    if isinstance(tools, str):
        tools = json.loads(tools)
    _check_kwargs(record, "chat_template_kwargs", where)
    return {**({} if tools is None else {"tools": tools}), **(kwargs or {})}


def _render(
    turns: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str, given: Mapping[str, Any], opening: bool
) -> list[int]:
    """Token ids of turns in the chat template; with ``opening``, the generation prompt is added."""
    if tokenizer.chat_template is None:
        raise InputError(
            f"{where}: the tokenizer {tokenizer.name_or_path!r} has no chat template for messages: use prompt and completion "
            "columns of plain text, or a tokenizer with a template."
        )
    plain = [{name: value for name, value in turn.items() if name != "weight"} for turn in turns]
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=opening, **given)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _tokenize_chat(
    messages: Sequence[Mapping[str, Any]],
    first_answer: int,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    given: Mapping[str, Any],
) -> tuple[list[int], list[int]]:
    """``input_ids`` and ``labels`` of a conversation. Assistant turns from ``first_answer`` on are supervised, unless their
    ``weight`` is 0.
    """
    render = partial(_render, tokenizer=tokenizer, where=where, given=given)
    ids = render(messages, opening=False)
    labels = [IGNORED] * len(ids)

    def shared(prefix: list[int]) -> int | None:
        count = _mask_prompt(prefix, ids).count(IGNORED)
        return None if count < len(prefix) - 1 else count  # the last token may have merged with the next text

    for turn, message in enumerate(messages):
        if turn < first_answer or message["role"] != "assistant" or message.get("weight") == 0:
            continue
        opened = render(messages[:turn], opening=True)
        start, end = shared(opened), shared(render(messages[: turn + 1], opening=False))
        if start is None and turn and shared(render(messages[:turn], opening=False)) is not None:
            opening = tokenizer.decode(opened[_mask_prompt(opened, ids).count(IGNORED) :])
            raise InputError(
                f"{where}: the chat template's generation prompt ends with {opening!r}, but this answer does not begin with "
                "it. Begin the answer with it, as the model will, or give the row chat_template_kwargs that remove it, such "
                "as {'enable_thinking': False}."
            )
        if start is None or end is None:
            raise InputError(
                f"{where}: the chat template changes earlier turns when later turns follow, so the answers' tokens cannot be "
                "located. Use single-turn messages, or prompt and completion."
            )
        labels[start:end] = ids[start:end]
    return ids, labels
