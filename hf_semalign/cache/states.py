"""Hidden states of a data set on disk (method, section 7).

Two kinds of states are kept in a :class:`StateFolder`: the source's signals, and while a source is streamed or attributed the
inputs of its layers. :func:`hf_semalign.cache.layer_pass.layer_pass` writes both.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock

from hf_semalign.cache.examples import Examples
from hf_semalign.errors import MissingFileError, StorageError
from hf_semalign.files import WHOLE, Part, digest, load_tensors, open_tensors, save_tensor, write_text, writing_lock

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
MAX_OPEN = 10_000  # files of a folder that are mapped at a time. A process can map about 65,000
Places = np.ndarray | None  # of examples, sorted; None for all


@dataclass(frozen=True)
class Column:
    """States of one kind, one per position.

    Attributes:
        name: name of its folder.
        width: channels of a state.
        dtype: dtype on disk.
        everywhere: at all positions; otherwise only at the valid ones.
    """

    name: str
    width: int
    dtype: torch.dtype
    everywhere: bool = False

    def positions(self, examples: Examples, places: Places = None) -> int:
        """Number of positions of some examples."""
        return examples.positions(places, everywhere=self.everywhere)

    def size(self, examples: Examples, places: Places = None) -> int:
        """Bytes of the states of some examples."""
        return self.positions(examples, places) * self.width * self.dtype.itemsize


class _Piece(NamedTuple):
    """A memory-mapped file with the states of some examples of a shard, one example after another.

    Attributes:
        states: ``[N, width]``.
        places: of the examples, sorted.
        ends: position in ``states`` at which each example ends.
    """

    states: torch.Tensor
    places: np.ndarray
    ends: np.ndarray

    def of(self, place: int) -> torch.Tensor | None:
        """States of one example; ``None`` if they are not in this file."""
        k = int(self.places.searchsorted(place))
        if k == len(self.places) or self.places[k] != place:
            return None
        return self.states[self.ends[k - 1] if k else 0 : self.ends[k]]


class StateFolder:
    """Columns of states of one data set, in memory-mapped safetensors files.

    A file has the states of a shard, ``00012.safetensors``, or of some of its examples, ``00012-3fb0c1d2.safetensors``. In the
    second case it also has their places. Files are written atomically, with a checksum in the header. So an interrupted pass
    resumes after its last file, and a file that is truncated or altered is named in the log and computed again. Runs may share
    a folder: a process holds the lock of the part of the shards that it writes.

    Args:
        root: the folder that contains this one. The name is a digest of ``facts`` and the examples, so stale states are never
            found.
        facts: all that the states depend on besides the examples, as plain JSON values. They are saved in ``manifest.json``.
        examples: the data.
    """

    def __init__(self, root: Path, facts: dict[str, Any], examples: Examples) -> None:
        facts = {**facts, "examples": examples.digest, "shard_tokens": examples.shard_tokens, "shards": len(examples.shards)}
        self.examples = examples
        self.path = root / digest(facts)[:16]
        self.path.mkdir(parents=True, exist_ok=True)
        self._found: dict[str, dict[int, dict[Path, Places]]] = {}  # places by column, shard and file, of verified files
        self._damaged: set[Path] = set()
        self._open = lru_cache(MAX_OPEN)(self._piece)
        manifest, text = self.path / MANIFEST, json.dumps(facts, indent=1)
        known = manifest.read_bytes() if manifest.is_file() else None
        if known != text.encode():
            if known is not None:
                logger.warning("%s of %s is damaged and is written again.", MANIFEST, self.path.name)
            with self.lock():
                write_text(manifest, text)

    def lock(self, part: Part = WHOLE) -> FileLock:
        """The lock to hold while writing a part of the shards, see :func:`hf_semalign.files.writing_lock`."""
        return writing_lock(self.path, part)

    def missing(self, column: Column, places: Places = None, part: Part = WHOLE) -> dict[int, np.ndarray]:
        """Places of the examples that a column lacks, by shard. Each process verifies every file once.

        Args:
            column: the column.
            places: the examples that are wanted.
            part: the shards to look at: with ``(i, n)`` every n-th from the i-th on.
        """
        found, lacking = self._verified(column), {}
        for number in range(part[0], len(self.examples.shards), part[1]):
            wanted = self.examples.within(number, places)
            for there in found.get(number, {}).values():
                wanted = wanted[:0] if there is None else np.setdiff1d(wanted, there, assume_unique=True)
            if len(wanted):
                lacking[number] = wanted
        return lacking

    def _verified(self, column: Column) -> dict[int, dict[Path, Places]]:
        """The undamaged files of a column by shard, with the places of their examples, or ``None`` for the whole shard."""
        found = self._found.setdefault(column.name, {})
        for path in sorted((self.path / column.name).glob("*.safetensors")):
            number = _number(path)
            if path in found.get(number, {}):
                continue
            if (tensors := load_tensors(path)) is None:
                self._damaged.add(path)
                continue
            places = tensors["places"].numpy() if "places" in tensors else None
            inside = self.examples.within(number) if places is None else places
            if len(tensors["states"]) == column.positions(self.examples, inside):
                found.setdefault(number, {})[path] = places
        return found

    @property
    def free(self) -> int:
        """Free bytes on the disk."""
        return shutil.disk_usage(self.path).free

    def check_space(self, needed: int, advice: str, reserve: int = 0) -> None:
        """Log how many bytes will be written, and refuse if the disk lacks the space for them and for ``reserve`` more.

        Raises:
            OSError: too little space. The message has both figures and ``advice``.
        """
        logger.info("%.1f MB of states go to %s (%.0f MB free)", needed / 1e6, Path(*self.path.parts[-2:]), self.free / 1e6)
        if needed + reserve > self.free:
            raise StorageError(
                f"The states need {needed / 1e9:.1f} GB in {self.path}, and the run needs {reserve / 1e9:.1f} GB more; "
                f"{self.free / 1e9:.1f} GB are free: {advice}."
            )

    def write(self, number: int, states: Mapping[Column, torch.Tensor], places: Places = None) -> None:
        """Write states of one shard, or of some of its examples. Hold the lock while calling it, from any thread."""
        if places is not None and len(places) == len(self.examples.within(number)):
            places = None
        name = f"{number:05d}" if places is None else f"{number:05d}-{digest(places.tolist())[:8]}"
        for column, tensor in states.items():
            path = self.path / column.name / f"{name}.safetensors"
            path.parent.mkdir(exist_ok=True)
            save_tensor(tensor, path, **({} if places is None else {"places": torch.from_numpy(places)}))
            self._found.setdefault(column.name, {}).setdefault(number, {})[path] = places
            self._damaged.discard(path)
            for other in [other for other in self._damaged if other.parent == path.parent and _number(other) == number]:
                other.unlink(missing_ok=True)
                self._damaged.discard(other)
        self._open.cache_clear()

    def drop(self, column: Column) -> None:
        """Delete a column."""
        self._found.pop(column.name, None)
        self._open.cache_clear()
        shutil.rmtree(self.path / column.name, ignore_errors=True)

    def read(self, column: Column, places: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """States of some examples, one after another, ``[N, width]``.

        Args:
            column: the column.
            places: places of the examples, see :meth:`Examples.places`.
            device: the device to put them on.

        Raises:
            FileNotFoundError: the column lacks an example.
        """
        if not len(places):
            return torch.empty(0, column.width, dtype=column.dtype, device=device)
        found = self._found.get(column.name) or self._verified(column)
        shards = self.examples.starts.searchsorted(places, side="right") - 1
        pieces = {shard: [self._open(column, path) for path in found.get(shard, ())] for shard in set(shards.tolist())}
        states = [_states(pieces[shard], place) for shard, place in zip(shards.tolist(), places, strict=True)]
        return join(states, device)

    def _piece(self, column: Column, path: Path) -> _Piece:
        places = self._found[column.name][_number(path)][path]
        places = self.examples.within(_number(path)) if places is None else places
        counts = self.examples.tokens if column.everywhere else self.examples.answers
        return _Piece(open_tensors(path)[0]["states"], places, counts[places].cumsum())


def join(states: Sequence[torch.Tensor], device: torch.device | str) -> torch.Tensor:
    """States ``[N_i, width]`` one after another on a device, ``[N, width]``."""
    if torch.device(device).type != "cuda" or states[0].is_cuda:
        return torch.cat(list(states)).to(device)
    # torch keeps pinned memory for the next batch. Fresh memory costs more than the copy, and a copy from it need not wait.
    pinned = torch.empty(sum(map(len, states)), states[0].shape[1], dtype=states[0].dtype, pin_memory=True)
    return torch.cat(list(states), out=pinned).to(device, non_blocking=True)


def _number(path: Path) -> int:
    """The number of a file's shard."""
    return int(path.stem.partition("-")[0])


def _states(pieces: Sequence[_Piece], place: int) -> torch.Tensor:
    """States of one example, from the first file that has it."""
    for piece in pieces:
        if (states := piece.of(place)) is not None:
            return states
    raise MissingFileError(f"There are no states of the example at {place}.")
