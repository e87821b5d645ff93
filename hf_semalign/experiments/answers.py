"""Answers that a model writes to prompts, for the target to train on. They are saved as JSON lines batch by batch."""

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
from hf_semalign.tokenization import (
    OF_SOURCE,
    OF_TEMPLATE,
    Record,
    before_answer,
    check_text,
    form_of,
    prompt_ids,
    tokenize,
)

logger = logging.getLogger(__name__)
WRITERS = ("dataset", "source", "target")
ANSWERS_ON_CPU = 32  # prompts per batch if memory allows; sampled answers depend on it
ANSWERS_ON_GPU = 256  # the same on a GPU
Entry = dict[str, Any]


class Answer(TypedDict):
    """A line of the file that :func:`write_answers` writes."""

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
        max_new_tokens: length limit of an answer, including its end token.
        temperature: 0 decodes greedily.
        seed: random seed of the sampling.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 42


def question(record: Record, where: str = "A row") -> dict[str, Any]:
    """Reduce a row to its ``prompt``, the extra arguments of the chat template, and what only the source reads.

    For a row with ``messages``, the prompt is every message before the last answer. The row need not have an answer.

    Raises:
        ValueError: the row holds token ids, or something other than text.
    """
    form = form_of(record)
    if form == "ids":
        raise InputError(f"{where} has the columns {sorted(record)}: a model can only answer a row with prompt or messages.")
    check_text({name: value for name, value in record.items() if value is not None}, where)
    prompt = record["prompt"] if form == "prompt" else before_answer(record["messages"])
    given = {name: record[name] for name in (*OF_TEMPLATE, *OF_SOURCE) if record.get(name) is not None}
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
    """Let a model answer the prompts of some rows.

    Each batch of answers is appended to a file. An interrupted call resumes from that file. Use one file per model and set of
    rows.

    Args:
        records: rows with ``prompt`` or ``messages``. Existing answers are ignored.
        tokenizer: the model's tokenizer.
        model: returns the model. It is called only if an answer is missing.
        path: a JSON-lines file. Each line is a row to train on, with ``row``, ``prompt`` and ``completion``; the lengths
            ``prompt_tokens`` and ``tokens`` (including the end token); ``ended``, false if the answer hit
            ``max_new_tokens``; ``same_tokens``, true if the text is tokenised to the tokens that were generated; and ``seed``.
        sampling: how to generate.
        progress: show a progress bar.

    Returns:
        The entries of the file, one per row, in the order of the rows.

    Raises:
        ValueError: a row has no text prompt, the tokenizer has no EOS token, or the file is damaged or answers other prompts.
    """
    path = Path(path)
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer has no EOS token to end answers with: set its eos_token.")
    questions = [question(record, f"Row {row}") for row, record in enumerate(records)]
    prompts = [prompt_ids(one, tokenizer, f"Row {row}") for row, one in enumerate(questions)]
    known = {entry["row"]: entry for entry in read_entries(path, Answer)}
    if other := [row for row, one in enumerate(questions) if row in known and _asked(known[row]) != _asked(one)]:
        raise InputError(f"{path} has answers to other prompts, for example in row {other[0]}: choose another file.")
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
    """Answer every batch with a missing entry, longest prompts first, and append the entries to the file."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    most = ANSWERS_ON_CPU if model.device.type == "cpu" else ANSWERS_ON_GPU
    size = min(most, rows_that_fit(model, sampling.max_new_tokens))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    missing = [rows for rows in batches if not known.keys() >= set(rows)]
    again = {row for rows in missing for row in rows}
    write_text(path, _lines(entry for row, entry in known.items() if row not in again))
    logger.info("Writing %d of %d answers to %s", len(again), len(prompts), path)
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
            seed = sampling.seed + rows[0]  # one seed per batch, so that a resumed call draws the same answers
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
    """The file's entry for an answer. Padding after its tokens is ignored."""
    length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    text, ended = _text(prompt, tokens[:length], tokenizer), length < len(tokens)
    in_chat = not isinstance(asked["prompt"], str)
    row = {**asked, "completion": [{"role": "assistant", "content": text}] if in_chat else text}
    written = prompt + tokens[:length]
    counts = {"prompt_tokens": len(prompt), "tokens": length + ended, "ended": ended}
    try:
        same = tokenize(row, tokenizer, "An answer")[0][: len(written)] == written
    except Exception as error:  # a chat template may raise anything; only this answer is left out
        return {**row, **counts, "same_tokens": False, "fault": f"{type(error).__name__}: {error}"}
    return {**row, **counts, "same_tokens": same}


def _asked(entry: Record) -> dict[str, Any]:
    """What a row or an entry of the file asks: its prompt, and the columns for template and source."""
    return {name: entry[name] for name in ("prompt", *OF_TEMPLATE, *OF_SOURCE) if name in entry}


def _lines(entries: Iterable[Entry]) -> str:
    return "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries)


def _text(prompt: list[int], answer: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an answer after its prompt. Many tokenizers drop the leading space when they decode the answer alone."""
    before, both, alone = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (prompt, [*prompt, *answer], answer))
    return both[len(before) :] if both.startswith(before) else alone


def read_entries(path: Path, hint: Any) -> list[Entry]:
    """Read the entries of a JSON-lines file. An incomplete last line, left by a killed process, is ignored.

    Args:
        path: the file. A missing file has no entries.
        hint: type of an entry, see :func:`hf_semalign.kinds.check_kinds`.

    Raises:
        ValueError: a line is damaged or of another type.
    """
    entries = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), start=1):
        try:
            entries.append(json.loads(line))
            check_kinds(entries[-1], hint, "it")
        except ValueError as error:
            raise InputError(
                f"Line {number} of {path} is damaged ({error}): delete the file to write its content again."
            ) from error
    return entries


def answered(
    entries: Sequence[Entry],
    max_length: int | None,
    records: Sequence[Record] | None = None,
    length_of: Callable[[Record], int] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Select the rows to train on, and count the answers that are left out.

    - ``cut``: the answer did not end, or is longer than ``max_length`` together with its prompt. It would not teach the target
      to stop.
    - ``empty``: the answer has no text.
    - ``unusable``: the chat template raises an error.
    - ``retokenised``: the answer is used, but its text is tokenised to other tokens than the model generated.

    Args:
        entries: what :func:`write_answers` returns.
        max_length: longest row in tokens.
        records: rows whose prompts replace those that were answered, one per entry. They differ if the source has answered its
            ``source_prompt``.
        length_of: returns the number of tokens of a row, the larger one if source and target read it differently. If it raises
            an error, the answer is unusable. By default only the writer's tokens are counted.

    Raises:
        ValueError: no answer is left.
    """
    rows, counts = [], {"rows": len(entries), "cut": 0, "empty": 0, "unusable": 0, "retokenised": 0}
    fault = ""
    for entry in entries:
        completion = entry["completion"]
        text = completion if isinstance(completion, str) else completion[0]["content"]
        asked = entry if records is None else question(records[entry["row"]])
        row = {**_asked(asked), "completion": completion}
        length, reason = entry["prompt_tokens"] + entry["tokens"], entry.get("fault")
        try:
            length = length if length_of is None or reason else max(length, length_of(row))
        except Exception as error:  # a chat template may raise anything; only this answer is left out
            reason = f"{type(error).__name__}: {error}"
        if not entry["ended"] or (max_length is not None and length > max_length):
            counts["cut"] += 1
        elif not text.strip():
            counts["empty"] += 1
        elif reason:
            counts["unusable"], fault = counts["unusable"] + 1, f" ({reason})"
        else:
            counts["retokenised"] += not entry["same_tokens"]
            rows.append(row)
    reasons = (
        f"{counts['cut']} did not end within the limit, {counts['empty']} are empty, and the chat template refuses "
        f"{counts['unusable']}{fault}"
    )
    if not rows:
        raise InputError(
            f"None of {len(entries)} answers can be used: {reasons}. Raise data.max_new_tokens and data.max_length (now "
            f"{max_length}), or check that the model can answer such prompts."
        )
    if left := len(entries) - len(rows):
        logger.warning("Left out %d of %d written answers: %s.", left, len(entries), reasons)
    return rows, counts
