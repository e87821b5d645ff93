"""Hidden states of a data set on disk, and the pass of frozen layers that fills them (method, section 7).

Three things of a run are frozen and computed once: what the source says, the source's own stream where it is read one layer
at a time, and the target below the frontier. All three are columns of a :class:`StateFolder`, filled by :func:`layer_pass`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from datasets import Dataset
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from hf_semalign.errors import InputError, StorageError
from hf_semalign.method.semantic_map import checksum
from hf_semalign.models.anatomy import Anatomy
from hf_semalign.models.hooks import bypass, capture, stop_after
from hf_semalign.splits import IGNORED, column_chunks, valid_positions

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
SHARD_TOKENS = 2**14  # shards of every column are held in memory, and are what an interrupted pass can lose
SHARDS_HELD = 4  # at a time, one being made and the others written; fewer, but two, where they are more than
BYTES_HELD = 2**30
MAX_OPEN = 10_000  # shards of a folder that are mapped at a time; a process can map some 65,000 files
Collate = Callable[[list[dict]], dict[str, torch.Tensor]]


class Examples:
    """The distinct examples of a data set, longest first, so that a pass pads little and meets its largest batch at once.

    Args:
        dataset: rows of :func:`hf_semalign.splits.encode`; rows of one content count once.

    Attributes:
        ids: example ids ``[E]``.
        tokens: tokens of each example ``[E]``.
        answers: valid positions of each example ``[E]``.
        shards: slices of the examples, each of about ``SHARD_TOKENS`` tokens.
        starts: first example of each shard.
        offsets: positions of all examples before each, ``[E + 1]``; everywhere (``True``), or valid ones only.
    """

    def __init__(self, dataset: Dataset) -> None:
        tokens, answers = _counts(dataset)
        self._known, first = np.unique(
            np.concatenate([ids.to_numpy() for ids in column_chunks(dataset, "example_id")]), return_index=True
        )
        order = np.lexsort((self._known, -tokens[first]))
        self._places = np.argsort(order)  # of the known ids
        self.ids, self._rows = self._known[order], first[order]
        self.tokens, self.answers = tokens[self._rows], answers[self._rows]
        self.dataset = dataset
        self.shards = _cut(self.tokens)
        self.starts = np.array([shard.start for shard in self.shards])
        counts = {True: self.tokens, False: self.answers}
        self.offsets = {key: np.concatenate([[0], np.cumsum(values)]) for key, values in counts.items()}

    def __contains__(self, example_id: int) -> bool:
        return bool(self._known[self._known.searchsorted(example_id) % len(self._known)] == example_id)

    def places(self, example_ids: torch.Tensor) -> np.ndarray:
        """Places of some examples by their ids.

        Raises:
            KeyError: an example of another data set.
        """
        wanted = example_ids.cpu().numpy()
        found = self._known.searchsorted(wanted) % len(self._known)
        if (unknown := wanted[self._known[found] != wanted]).size:
            raise KeyError(int(unknown[0]))
        return self._places[found]

    @cached_property
    def digest(self) -> str:
        """Digest of what the examples are: ids, which stand for content, and counts."""
        return hashlib.sha256(np.stack([self.ids, self.tokens, self.answers]).tobytes()).hexdigest()[:32]

    def batches(self, shard: slice, size: int) -> Iterator[list[dict]]:
        """Rows of a shard, ``size`` at a time."""
        for start in range(shard.start, shard.stop, size):
            yield self.dataset.__getitems__(self._rows[start : min(start + size, shard.stop)].tolist())


def _counts(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and valid positions of each row, read as arrays: 100,000 rows as Python integers would take gigabytes."""
    tokens, answers = [], []
    for labels in column_chunks(dataset, "labels"):
        lengths = np.diff(labels.offsets.to_numpy())
        supervised = labels.flatten().to_numpy() != IGNORED
        supervised[np.cumsum(lengths) - lengths] = False  # nothing predicts a first token
        row = np.repeat(np.arange(len(lengths)), lengths)
        tokens.append(lengths)
        answers.append(np.bincount(row, weights=supervised, minlength=len(lengths)))
    return np.concatenate(tokens).astype(np.int64), np.concatenate(answers).astype(np.int64)


def _cut(tokens: np.ndarray) -> list[slice]:
    shards, start, size = [], 0, 0
    for place, count in enumerate(tokens):
        if size and size + count > SHARD_TOKENS:
            shards.append(slice(start, place))
            start, size = place, 0
        size += int(count)
    return [*shards, slice(start, len(tokens))]


@dataclass(frozen=True)
class Column:
    """One state a position.

    Attributes:
        name: of its folder.
        width: channels.
        dtype: on disk.
        everywhere: at all positions, or at the valid ones only.
    """

    name: str
    width: int
    dtype: torch.dtype
    everywhere: bool = False

    def positions(self, examples: Examples, number: int) -> int:
        """Positions of one shard."""
        shard, offsets = examples.shards[number], examples.offsets[self.everywhere]
        return int(offsets[shard.stop] - offsets[shard.start])

    def size(self, examples: Examples, numbers: Iterable[int] | None = None) -> int:
        """Bytes of some shards, or of all."""
        numbers = range(len(examples.shards)) if numbers is None else numbers
        return sum(self.positions(examples, number) for number in numbers) * self.width * self.dtype.itemsize


class StateFolder:
    """Columns of states of one data set, in memory-mapped safetensors shards.

    A shard appears whole, with a checksum in its header: an interrupted pass goes on after its last whole shard, and a
    shard that is truncated or altered is named in the log and computed again. Runs may share a folder: whoever writes holds
    its lock.

    Args:
        root: where the folder goes; its name is a digest of ``facts`` and of the examples, so that nothing stale is found.
        facts: all that the states depend on but for the examples, as plain JSON values; they stand in ``manifest.json``.
        examples: the data.
    """

    def __init__(self, root: Path, facts: dict[str, Any], examples: Examples) -> None:
        facts = {**facts, "examples": examples.digest, "shard_tokens": SHARD_TOKENS, "shards": len(examples.shards)}
        self.examples = examples
        self.path = root / digest(facts)[:16]
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = writing_lock(self.path)
        self._whole: dict[str, set[int]] = {}  # shards by column that were written or verified in this process
        self._mapped = lru_cache(MAX_OPEN)(lambda path: _open(path)[0])
        manifest, text = self.path / MANIFEST, json.dumps(facts, indent=1)
        known = manifest.read_bytes() if manifest.is_file() else None
        if known != text.encode():
            if known is not None:
                logger.warning("%s of %s is damaged, and is written again.", MANIFEST, self.path.name)
            with self.lock:
                write_text(manifest, text)

    def missing(self, column: Column) -> list[int]:
        """Numbers of the shards that a column lacks; every file is verified once a process."""
        whole = self._whole.setdefault(column.name, set())
        for number in set(range(len(self.examples.shards))) - whole:
            states = load_tensor(self._path(column, number))
            if states is not None and len(states) == column.positions(self.examples, number):
                whole.add(number)
        return sorted(set(range(len(self.examples.shards))) - whole)

    def lacking(self, columns: Sequence[Column]) -> dict[int, list[Column]]:
        """The columns that each shard lacks."""
        lacking: dict[int, list[Column]] = {}
        for column in columns:
            for number in self.missing(column):
                lacking.setdefault(number, []).append(column)
        return dict(sorted(lacking.items()))

    def bytes_missing(self, columns: Sequence[Column]) -> int:
        """Size of what some columns lack."""
        return sum(column.size(self.examples, self.missing(column)) for column in columns)

    @property
    def free(self) -> int:
        """Free bytes of the disk."""
        return shutil.disk_usage(self.path).free

    def check_space(self, needed: int, advice: str, reserve: int = 0) -> None:
        """Log how much is about to be written, and refuse a disk without room for it and for so much more.

        Raises:
            OSError: too little space, with both figures and an advice.
        """
        logger.info("%.1f MB of states go to %s (%.0f MB free)", needed / 1e6, Path(*self.path.parts[-2:]), self.free / 1e6)
        if needed + reserve > self.free:
            raise StorageError(
                f"The states need {needed / 1e9:.1f} GB in {self.path}, and {reserve / 1e9:.1f} GB are kept for the run; "
                f"{self.free / 1e9:.1f} GB are free: {advice}."
            )

    def write(self, number: int, states: Mapping[Column, torch.Tensor]) -> None:
        """Write one shard of some columns; call it under the lock, from any thread."""
        for column, tensor in states.items():
            path = self._path(column, number)
            path.parent.mkdir(exist_ok=True)
            save_tensor(tensor, path)
            self._whole.setdefault(column.name, set()).add(number)
        self._mapped.cache_clear()

    def let_go(self) -> None:
        """Unmap what was read."""
        self._mapped.cache_clear()

    def drop(self, column: Column) -> None:
        """Delete a column."""
        self._whole.pop(column.name, None)
        self._mapped.cache_clear()
        shutil.rmtree(self.path / column.name, ignore_errors=True)

    def read(self, column: Column, places: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """States of some examples, one after another, ``[N, width]``.

        Args:
            column: a whole column.
            places: places of the examples, see :meth:`Examples.places`.
            device: where they are wanted.
        """
        if not len(places):
            return torch.empty(0, column.width, dtype=column.dtype, device=device)
        places = np.asarray(places)
        shards = self.examples.starts.searchsorted(places, side="right") - 1
        offsets = self.examples.offsets[column.everywhere]
        before = offsets[self.examples.starts[shards]]
        spans = zip(shards.tolist(), (offsets[places] - before).tolist(), (offsets[places + 1] - before).tolist(), strict=True)
        mapped = {shard: self._mapped(self._path(column, shard)) for shard in set(shards.tolist())}
        states = [mapped[shard][first:last] for shard, first, last in spans]
        if torch.device(device).type != "cuda":
            return torch.cat(states).to(device)
        # torch keeps pinned memory for the next batch: fresh memory costs more than the copy, and a copy from it need not wait.
        pinned = torch.empty(sum(map(len, states)), column.width, dtype=column.dtype, pin_memory=True)
        return torch.cat(states, out=pinned).to(device, non_blocking=True)

    def _path(self, column: Column, number: int) -> Path:
        return self.path / column.name / f"{number:05d}.safetensors"


@dataclass(frozen=True)
class Output:
    """What a pass writes into a column.

    Attributes:
        column: where it goes.
        layer: the decoder layer whose output it is; ``None`` for the decoder's final hidden state.
        transform: applied to the states of a batch, ``[N, D]`` to ``[N, width]``.
    """

    column: Column
    layer: int | None
    transform: Callable[[torch.Tensor], torch.Tensor] = lambda states: states


class _ShardWriter:
    """Writes shards in the background while a pass makes the next ones, out of host memory that is used again: the system
    clears fresh memory page by page, which takes longer than to fill it.

    Args:
        folder: takes the shards; its lock is held.
        lacking: the columns of each shard that is going to be written.
        device: where the states come from.
    """

    def __init__(self, folder: StateFolder, lacking: Mapping[int, Sequence[Column]], device: torch.device) -> None:
        self._folder = folder
        self._rows: dict[Column, int] = {}
        for number, columns in lacking.items():
            for column in columns:
                self._rows[column] = max(self._rows.get(column, 0), column.positions(folder.examples, number))
        size = sum(rows * column.width * column.dtype.itemsize for column, rows in self._rows.items())
        self._ahead = min(SHARDS_HELD, max(2, BYTES_HELD // max(size, 1)))
        self._pinned = device.type == "cuda" and self._ahead * size <= BYTES_HELD  # which torch keeps for the next pass
        self._busy: deque[tuple[list[Future], dict[Column, torch.Tensor]]] = deque()
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        with self._pool:
            while self._busy and error[0] is None:
                self._wait()

    def memory(self) -> dict[Column, torch.Tensor]:
        """Host memory for the largest shard of each column, ``[N, width]``.

        Raises:
            OSError: an earlier shard could not be written.
        """
        if len(self._busy) == self._ahead:
            return self._wait()
        return {
            column: torch.empty(rows, column.width, dtype=column.dtype, pin_memory=self._pinned)
            for column, rows in self._rows.items()
        }

    def write(self, number: int, memory: dict[Column, torch.Tensor], rows: Mapping[Column, int]) -> None:
        """Begin to write so many rows of each column, after which the memory is free again."""
        columns = [{column: memory[column][:count]} for column, count in rows.items()]
        self._busy.append(([self._pool.submit(self._folder.write, number, states) for states in columns], memory))

    def _wait(self) -> dict[Column, torch.Tensor]:
        futures, memory = self._busy.popleft()
        for future in futures:
            future.result()
        return memory


def spread(states: torch.Tensor, mask: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """States ``[N, D]`` to ``[B, T, D]`` on the mask's device: one at each position of a mask ``[B, T]``, zero elsewhere.

    Args:
        states: as many as the mask has positions.
        mask: ``[B, T]`` bool.
        where: ``mask.flatten().nonzero()``, ``[N]``, where it is known: the host waits for a GPU to find it.
    """
    where = mask.flatten().nonzero().squeeze(1) if where is None else where
    padded = states.new_zeros(mask.numel(), states.shape[-1], device=mask.device)
    return padded.index_copy_(0, where, states.to(mask.device)).unflatten(0, mask.shape)


@torch.no_grad()
def layer_pass(
    anatomy: Anatomy,
    folder: StateFolder,
    outputs: Sequence[Output],
    collate: Collate,
    *,
    start: int = 0,
    entering: Callable[[Sequence[int]], torch.Tensor] | None = None,
    as_tuples: bool = False,
    batch_size: int,
    device: torch.device | str,
    progress: str | None = None,
) -> None:
    """Run frozen decoder layers over a data set once, and write what comes out.

    The pass begins at layer ``start`` and ends with the deepest output that is wanted; what the folder already has is left
    alone.

    Args:
        anatomy: the model's parts; only the layers from ``start`` on need weights, and the embeddings where ``start`` is 0.
        folder: takes the outputs.
        outputs: what to write.
        collate: rows to a batch.
        start: first layer that runs.
        entering: inputs of layer ``start`` ``[N, D]`` of the examples at some places; needed unless ``start`` is 0.
        as_tuples: whether the layers give tuples, see :func:`hf_semalign.models.hooks.gives_tuples`.
        batch_size: examples a forward.
        device: where the layers are.
        progress: label of a progress bar; none without.
    """
    with ExitStack() as held:
        held.enter_context(folder.lock)
        lacking = folder.lacking([output.column for output in outputs])
        writer = held.enter_context(_ShardWriter(folder, lacking, torch.device(device)))
        counts = {number: folder.examples.shards[number] for number in lacking}
        total = sum(shard.stop - shard.start for shard in counts.values())
        bar = tqdm(total=total, desc=progress, unit="ex", disable=not (progress and total))
        for number, columns in lacking.items():
            wanted = [output for output in outputs if output.column in columns]
            layers = sorted({output.layer for output in wanted if output.layer is not None})
            through = any(output.layer is None for output in wanted)
            memory, rows_made = writer.memory(), dict.fromkeys(columns, 0)
            place = counts[number].start
            for rows in folder.examples.batches(counts[number], batch_size):
                batch = {key: tensor.to(device) for key, tensor in collate(rows).items()}
                mask = batch["attention_mask"].bool()
                inputs: dict[str, torch.Tensor] = {"input_ids": batch["input_ids"]}
                with ExitStack() as stack:
                    if entering is not None:
                        below = spread(entering(range(place, place + len(rows))), mask)
                        inputs = {"inputs_embeds": torch.full_like(below, torch.nan)}  # nothing above may read them
                        stack.enter_context(bypass(anatomy.layers[:start], below, as_tuples=as_tuples))
                    captures = dict(zip(layers, stack.enter_context(capture([anatomy.layers[k] for k in layers])), strict=True))
                    if not through:
                        stack.enter_context(stop_after(anatomy.layers[layers[-1]]))
                    final = anatomy.decoder(**inputs, attention_mask=batch["attention_mask"], use_cache=False)[0]
                valid = valid_positions(batch["labels"])
                for output in wanted:
                    full = final if output.layer is None else captures[output.layer].output
                    chosen = full[mask if output.column.everywhere else valid]
                    if entering is not None and not chosen.isfinite().all():
                        raise InputError(
                            f"{anatomy.name} cannot be entered at layer {start}: what comes out is not finite, because its "
                            "layers read the embeddings themselves, or overflow. Set source_memory='resident'."
                        )
                    states, first = output.transform(chosen), rows_made[output.column]
                    rows_made[output.column] += len(states)
                    memory[output.column][first : rows_made[output.column]] = states
                place += len(rows)
                bar.update(len(rows))
            writer.write(number, memory, rows_made)
        bar.close()


def writing_lock(folder: Path) -> FileLock:
    """The lock of a folder that several processes share: whoever writes holds it, others wait, and find it written.

    Unlike a collective it may be waited for as long as the work takes, and machines without a common disk each do theirs.
    """
    return FileLock(folder / "writing.lock", is_singleton=True)  # reentrant


def digest(content: Any) -> str:
    """Digest of plain JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Checksum of a file's content."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            hasher.update(chunk)
    return hasher.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, which is what the Hub keeps of a large file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensor(tensor: torch.Tensor, path: Path) -> None:
    """Write a tensor to a safetensors file that appears whole or not at all, with a checksum of its content and name.

    Call it under the lock of its folder.
    """
    with _whole(path) as unfinished:
        save_file({"states": tensor.contiguous()}, unfinished, metadata={"checksum": digest([path.stem, checksum(tensor)])})


def keep_record(path: Path, record: Any) -> None:
    """Write plain JSON values with a checksum, whole or not at all."""
    write_text(path, json.dumps({"record": record, "checksum": digest(record)}, indent=1))


def recall_record(path: Path) -> Any | None:
    """What :func:`keep_record` wrote; ``None`` when there is no file or it is damaged, which is logged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["checksum"] == digest(content["record"]):
            return content["record"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    logger.warning("%s is damaged, and is made again.", path.name)
    return None


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all; call it under the lock of its folder."""
    with _whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write in the place of another, which it becomes when it is whole."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)  # on a full disk it would take room


def load_tensor(path: Path) -> torch.Tensor | None:
    """Memory-mapped, what :func:`save_tensor` wrote; ``None`` when there is no file or it is damaged, which is logged."""
    if not path.is_file():
        return None
    try:
        tensor, recorded = _open(path)
        if recorded == digest([path.stem, checksum(tensor)]):
            return tensor
    except SafetensorError:
        pass
    logger.warning("%s is damaged, and is computed again.", Path(*path.parts[-3:]))
    return None


def _open(path: Path) -> tuple[torch.Tensor, str | None]:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("states"), (file.metadata() or {}).get("checksum")
