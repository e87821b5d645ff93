"""Hidden states of a data set on disk, and the pass of frozen layers that fills them (method, section 7).

Three things of a run are frozen and computed once: what the source says, the source's own stream where it is read one layer
at a time, and the target below the frontier. All three are columns of a :class:`StateFolder`, filled by :func:`layer_pass`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_semalign.cache.examples import Examples
from hf_semalign.errors import StorageError
from hf_semalign.files import digest, load_tensor, open_tensor, save_tensor, write_text, writing_lock

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
MAX_OPEN = 10_000  # shards of a folder that are mapped at a time; a process can map some 65,000 files


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
        facts = {**facts, "examples": examples.digest, "shard_tokens": examples.shard_tokens, "shards": len(examples.shards)}
        self.examples = examples
        self.path = root / digest(facts)[:16]
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = writing_lock(self.path)
        self._whole: dict[str, set[int]] = {}  # shards by column that were written or verified in this process
        self._mapped = lru_cache(MAX_OPEN)(lambda path: open_tensor(path)[0])
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
