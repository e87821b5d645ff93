"""Answers that a model writes: prompts to rows that the target trains on, kept as JSON lines while they come."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_semalign.errors import InputError
from hf_semalign.experiments.generation import (
    computing_in,
    continue_prompts,
    end_tokens,
    fastest_dtype,
    generating,
    rows_that_fit,
)
from hf_semalign.files import write_text
from hf_semalign.kinds import check_kinds
from hf_semalign.models.anatomy import CausalLM
from hf_semalign.tokenization import OF_TEMPLATE, Record, before_answer, check_text, form_of, prompt_ids, tokenize

logger = logging.getLogger(__name__)
WRITERS = ("dataset", "source", "target")
ROWS_ON_CPU = 32  # prompts at a time, where memory allows it: what is drawn depends on it
ROWS = 256  # the same on a GPU
Entry = dict[str, Any]


class Answer(TypedDict):
    """A line of the file that :func:`write_answers` keeps."""

    row: int
    prompt: str | list[dict[str, Any]]
    completion: str | list[dict[str, Any]]
    prompt_tokens: int
    tokens: int
    ended: bool
    same_tokens: bool


@dataclass(frozen=True)
class Sampling:
    """How answers are written.

    Attributes:
        max_new_tokens: longest answer, its end token included.
        temperature: 0 is greedy.
        seed: of the draws.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 42


def question(record: Record, where: str = "A row") -> dict[str, Any]:
    """A row with its ``prompt`` alone, its own or its messages up to the last answer, which it need not have; and what the
    chat template gets besides.

    Raises:
        ValueError: a row of token ids, or of something else than text.
    """
    form = form_of(record)
    if form == "ids":
        raise InputError(f"{where} has the columns {sorted(record)}: for an answer to be written it needs prompt or messages.")
    check_text({name: value for name, value in record.items() if value is not None}, where)
    prompt = record["prompt"] if form == "prompt" else before_answer(record["messages"])
    given = {name: record[name] for name in OF_TEMPLATE if record.get(name) is not None}
    return {"prompt": prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt], **given}


def write_answers(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    model: Callable[[], CausalLM],
    path: str | Path,
    sampling: Sampling = Sampling(),
    *,
    progress: bool = True,
) -> list[Entry]:
    """Have a model answer the prompts of some rows.

    Answers are appended to a file as soon as their batch is done. What stands there is not written again, so that an
    interrupted call resumes. The caller makes sure that another model or other rows have another file.

    Args:
        records: rows with ``prompt`` or ``messages``; their own answers are not looked at.
        tokenizer: the model's.
        model: gives the model; called if an answer is missing.
        path: a JSON-lines file, whose lines are rows to train on: ``row``, ``prompt``, ``completion``; ``prompt_tokens`` and
            ``tokens``, how many they are, the end token included; ``ended``, false where it met ``max_new_tokens``;
            ``same_tokens``, whether the tokenizer reads the text as the tokens that were written; ``seed``.
        sampling: how to write.
        progress: show a progress bar.

    Returns:
        The entries of the file, one for each row, in the order of the rows.

    Raises:
        ValueError: a row without a prompt in text, a tokenizer without EOS, or a file that is damaged or has the answers to
            other prompts.
    """
    path = Path(path)
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer has no EOS token, which answers end with: set its eos_token.")
    questions = [question(record, f"Row {row}") for row, record in enumerate(records)]
    prompts = [prompt_ids(one, tokenizer, f"Row {row}") for row, one in enumerate(questions)]
    known = {entry["row"]: entry for entry in read_entries(path, Answer)}
    if other := [row for row, one in enumerate(questions) if row in known and known[row]["prompt"] != one["prompt"]]:
        raise InputError(f"{path} has the answers to other prompts, as in row {other[0]}: name another file.")
    if any(row not in known for row in range(len(prompts))):
        known |= _write(known, questions, prompts, tokenizer, model(), path, sampling, progress)
    return [known[row] for row in range(len(prompts))]


def _write(
    known: dict[int, Entry],
    questions: Sequence[dict[str, Any]],
    prompts: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    model: CausalLM,
    path: Path,
    sampling: Sampling,
    progress: bool,
) -> dict[int, Entry]:
    """The entries of all batches that lack one, added to the file; the longest prompts come first."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    most = ROWS_ON_CPU if model.device.type == "cpu" else ROWS
    size = min(most, rows_that_fit(model, sampling.max_new_tokens))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    missing = [rows for rows in batches if not known.keys() >= set(rows)]
    again = {row for rows in missing for row in rows}
    write_text(path, _lines(entry for row, entry in known.items() if row not in again))
    logger.info("%d of %d answers are written to %s", len(again), len(prompts), path)
    ends = end_tokens(model, tokenizer)
    made: dict[int, Entry] = {}
    with (
        generating(model),
        computing_in(model, fastest_dtype(model)),
        torch.random.fork_rng([model.device] if model.device.type == "cuda" else []),
        path.open("a", encoding="utf-8") as file,
        tqdm(total=len(again), desc="answers", disable=not progress) as bar,
    ):
        for rows in missing:
            seed = sampling.seed + rows[0]  # its own for each batch, so that an interrupted call draws as one that was not
            torch.manual_seed(seed)
            ids = [torch.tensor(prompts[row], device=model.device) for row in rows]
            masks = [torch.ones_like(one) for one in ids]
            new = continue_prompts(
                model,
                pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id, padding_side="left"),
                pad_sequence(masks, batch_first=True, padding_side="left"),
                max_new_tokens=sampling.max_new_tokens,
                eos_token_ids=ends,
                pad_token_id=tokenizer.pad_token_id,
                temperature=sampling.temperature,
                on_end=bar.update,
            ).tolist()
            batch = {
                row: {"row": row, **_entry(questions[row], prompts[row], tokens, ends, tokenizer), "seed": seed}
                for row, tokens in zip(rows, new, strict=True)
            }
            file.write(_lines(batch.values()))
            file.flush()
            made |= batch
    return made


def _entry(asked: Any, prompt: list[int], tokens: list[int], ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Entry:
    """What the file says of an answer; its tokens may be followed by padding."""
    length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    text, ended = _text(prompt, tokens[:length], tokenizer), length < len(tokens)
    in_chat = not isinstance(asked["prompt"], str)
    row = {**asked, "completion": [{"role": "assistant", "content": text}] if in_chat else text}
    written = prompt + tokens[:length]
    counts = {"prompt_tokens": len(prompt), "tokens": length + ended, "ended": ended}
    try:
        same = tokenize(row, tokenizer, "An answer")[0][: len(written)] == written
    except Exception as error:  # whatever a chat template refuses: such an answer is left out, and the others are kept
        return {**row, **counts, "same_tokens": False, "fault": f"{type(error).__name__}: {error}"}
    return {**row, **counts, "same_tokens": same}


def _lines(entries: Iterable[Entry]) -> str:
    return "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries)


def _text(prompt: list[int], answer: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """An answer as it follows its prompt: decoded alone, many tokenizers would drop the space that it begins with."""
    before, both, alone = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (prompt, [*prompt, *answer], answer))
    return both[len(before) :] if both.startswith(before) else alone


def read_entries(path: Path, hint: Any) -> list[Entry]:
    """The entries of a file, which may end in the middle of one, where a process was killed.

    Args:
        path: the file, which need not be there.
        hint: what an entry holds, see :func:`hf_semalign.kinds.check_kinds`.

    Raises:
        ValueError: a line that is something else.
    """
    entries = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), start=1):
        try:
            entries.append(json.loads(line))
            check_kinds(entries[-1], hint, "it")
        except ValueError as error:
            raise InputError(
                f"Line {number} of {path} is damaged ({error}): take the file away, and what it held is written anew."
            ) from error
    return entries


def answered(entries: Sequence[Entry], max_length: int | None) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows to train on, and how many answers were not used for what reason.

    An answer is left out when it did not end, or is longer with its prompt than ``max_length`` (``cut``): nothing would teach
    the target to end there. So is an ``empty`` one, and one that is ``unusable``, because the chat template refuses it.
    ``retokenised`` counts answers that are used, but whose text the tokenizer cuts into other tokens than the model wrote.

    Raises:
        ValueError: no answer is left.
    """
    rows, counts = [], {"rows": len(entries), "cut": 0, "empty": 0, "unusable": 0, "retokenised": 0}
    fault = ""
    for entry in entries:
        length = entry["prompt_tokens"] + entry["tokens"]
        completion = entry["completion"]
        text = completion if isinstance(completion, str) else completion[0]["content"]
        if not entry["ended"] or (max_length is not None and length > max_length):
            counts["cut"] += 1
        elif not text.strip():
            counts["empty"] += 1
        elif "fault" in entry:
            counts["unusable"], fault = counts["unusable"] + 1, f" ({entry['fault']})"
        else:
            counts["retokenised"] += not entry["same_tokens"]
            rows.append({name: entry[name] for name in ("prompt", "completion", *OF_TEMPLATE) if name in entry})
    reasons = (
        f"{counts['cut']} did not end within the limit, {counts['empty']} are empty, {counts['unusable']} are refused by the "
        f"chat template{fault}"
    )
    if not rows:
        raise InputError(
            f"None of {len(entries)} answers can be used: {reasons}. Raise data.max_new_tokens and data.max_length (now "
            f"{max_length}), or look whether the model knows how to answer such prompts."
        )
    if left := len(entries) - len(rows):
        logger.warning("%d of %d written answers are left out: %s.", left, len(entries), reasons)
    return rows, counts
