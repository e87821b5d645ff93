"""A pass of frozen layers over a data set, which writes states to disk."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_semalign.cache.examples import Collate
from hf_semalign.cache.states import Column, Places, StateFolder
from hf_semalign.errors import InputError
from hf_semalign.files import WHOLE, Part
from hf_semalign.models.anatomy import Anatomy
from hf_semalign.models.hooks import bypass, capture, stop_after
from hf_semalign.splits import valid_positions

SHARDS_HELD = 4  # at a time: one is computed while the others are written
BYTES_HELD = 2**30  # if the shards exceed this, fewer of them are held, but at least two


@dataclass(frozen=True, eq=False)
class Output:
    """States that a pass writes.

    Attributes:
        column: the column that takes them.
        layer: the decoder layer whose output they are; ``None`` for the decoder's final hidden state.
        transform: applied to the states of a batch, ``[N, D]`` to ``[N, width]``.
        places: places of the examples that are wanted.
    """

    column: Column
    layer: int | None
    transform: Callable[[torch.Tensor], torch.Tensor] = lambda states: states
    places: Places = None


@dataclass(frozen=True)
class Work:
    """What a pass has to do for one shard.

    Attributes:
        lacking: places of the examples that each column lacks.
        batches: places of the batches that run, in which some column lacks an example.
    """

    lacking: dict[Column, np.ndarray]
    batches: list[np.ndarray]


def work_of(
    folder: StateFolder, outputs: Sequence[Output], batch_size: int, among: Places = None, part: Part = WHOLE
) -> dict[int, Work]:
    """What a pass has to do, by shard. The arguments are those of :func:`layer_pass`."""
    lacking: dict[int, dict[Column, np.ndarray]] = {}
    for output in outputs:
        for number, places in folder.missing(output.column, output.places, part).items():
            lacking.setdefault(number, {})[output.column] = places
    work = {}
    for number, columns in sorted(lacking.items()):
        wanted = np.unique(np.concatenate(list(columns.values())))
        batches = folder.examples.batches(number, batch_size, among)
        work[number] = Work(columns, [batch for batch in batches if np.isin(batch, wanted).any()])
    return work


class _ShardWriter:
    """Writes shards in the background while a pass computes the next ones.

    Its host memory is reused, because the system clears fresh memory page by page, which takes longer than filling it.

    Args:
        folder: takes the shards. Its lock is held.
        work: what will be written.
        device: where the states are computed.
    """

    def __init__(self, folder: StateFolder, work: Mapping[int, Work], device: torch.device) -> None:
        self._folder = folder
        self._rows: dict[Column, int] = {}
        for shard in work.values():
            for column, places in shard.lacking.items():
                self._rows[column] = max(self._rows.get(column, 0), column.positions(folder.examples, places))
        size = sum(rows * column.width * column.dtype.itemsize for column, rows in self._rows.items())
        self._ahead = min(SHARDS_HELD, max(2, BYTES_HELD // max(size, 1)))
        self._pinned = device.type == "cuda" and self._ahead * size <= BYTES_HELD  # torch keeps pinned memory for the next pass
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

    def write(self, number: int, memory: dict[Column, torch.Tensor], lacking: Mapping[Column, np.ndarray]) -> None:
        """Start writing the states of some examples of each column. Afterwards the memory is reused."""
        futures = []
        for column, places in lacking.items():
            states = {column: memory[column][: column.positions(self._folder.examples, places)]}
            futures.append(self._pool.submit(self._folder.write, number, states, places))
        self._busy.append((futures, memory))

    def _wait(self) -> dict[Column, torch.Tensor]:
        futures, memory = self._busy.popleft()
        for future in futures:
            future.result()
        return memory


def spread(states: torch.Tensor, mask: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """Put states ``[N, D]`` at the positions of a mask ``[B, T]``: ``[B, T, D]`` on its device, zero elsewhere.

    Args:
        states: one for each position of the mask.
        mask: ``[B, T]`` bool.
        where: ``mask.flatten().nonzero()``, ``[N]``, if it is known. Otherwise the host waits for a GPU to find it.
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
    entering: Callable[[np.ndarray], torch.Tensor] | None = None,
    as_tuples: bool = False,
    batch_size: int,
    device: torch.device | str,
    among: Places = None,
    part: Part = WHOLE,
    progress: str | None = None,
) -> None:
    """Run frozen decoder layers over a data set once, and write their outputs.

    The pass begins at layer ``start`` and ends with the deepest output that is wanted. What the folder already has is not
    computed again. Hold the lock of ``part`` while calling it.

    Args:
        anatomy: the model's parts. Only the layers from ``start`` on need weights, and the embeddings if ``start`` is 0.
        folder: takes the outputs.
        outputs: the states to write.
        collate: rows to a batch.
        start: first layer that runs.
        entering: gives the inputs of layer ``start`` ``[N, D]`` of the examples at some places; needed unless ``start`` is 0.
        as_tuples: whether the layers return tuples, see :func:`hf_semalign.models.hooks.gives_tuples`.
        batch_size: examples in a forward.
        device: where the layers are.
        among: the examples that batches are made of, which include all that are wanted. Only this decides which examples run
            together, so that states do not depend on what was there before.
        part: the shards to look at, see :meth:`StateFolder.missing`.
        progress: label of a progress bar; none without.
    """
    work = work_of(folder, outputs, batch_size, among, part)
    with _ShardWriter(folder, work, torch.device(device)) as writer:
        total = sum(len(places) for shard in work.values() for places in shard.batches)
        bar = tqdm(total=total, desc=progress, unit="ex", disable=not (progress and total))
        for number, shard in work.items():
            wanted = [output for output in outputs if output.column in shard.lacking]
            memory, made = writer.memory(), dict.fromkeys(shard.lacking, 0)
            finite = torch.ones((), dtype=torch.bool, device=device)
            for places in shard.batches:
                batch = collate(folder.examples.rows(places))
                # Positions are found on the host, because it would have to wait for a GPU to find them.
                positions = {True: batch["attention_mask"].bool(), False: valid_positions(batch["labels"])}
                below = None if entering is None else entering(places)
                outcome = run_layers(anatomy, batch, [output.layer for output in wanted], start, below, as_tuples, device)
                for output in wanted:
                    lacks = torch.from_numpy(np.isin(places, shard.lacking[output.column])).unsqueeze(1)
                    where = (positions[output.column.everywhere] & lacks).flatten().nonzero().squeeze(1)
                    chosen = outcome[output.layer].flatten(0, 1).index_select(0, where.to(device, non_blocking=True))
                    finite &= chosen.isfinite().all()
                    first, made[output.column] = made[output.column], made[output.column] + len(chosen)
                    memory[output.column][first : made[output.column]].copy_(output.transform(chosen), non_blocking=True)
                del batch, below, outcome, chosen  # two batches at a time would take more memory
                bar.update(len(places))
            if not finite and entering is not None:  # the host waits for the GPU here, once per shard
                raise InputError(
                    f"{anatomy.name} cannot be entered at layer {start}: its outputs are not finite. Either its layers read "
                    "the embeddings, or they overflow. Set source_memory='resident'."
                )
            writer.write(number, memory, shard.lacking)
        bar.close()


def run_layers(
    anatomy: Anatomy,
    batch: Mapping[str, torch.Tensor],
    wanted: Sequence[int | None],
    start: int,
    below: torch.Tensor | None,
    as_tuples: bool,
    device: torch.device | str,
) -> dict[int | None, torch.Tensor]:
    """Run a batch and return the outputs ``[B, T, D]`` of some layers, and under ``None`` the decoder's final states.

    Args:
        anatomy: the model's parts.
        batch: ``input_ids, attention_mask`` ``[B, T]`` on the host.
        wanted: layers, or ``None``. The forward ends with the deepest.
        start: first layer that runs.
        below: its inputs ``[N, D]``; ``None`` if ``start`` is 0.
        as_tuples: whether the layers return tuples.
        device: where the layers are.
    """
    layers = sorted({layer for layer in wanted if layer is not None})
    mask, outcome = batch["attention_mask"].to(device), dict[int | None, torch.Tensor]()
    with ExitStack() as stack:  # the forward leaves this block after its deepest layer
        if below is None:
            inputs = {"input_ids": batch["input_ids"].to(device)}
        else:
            where = batch["attention_mask"].flatten().nonzero().squeeze(1).to(device, non_blocking=True)
            padded = spread(below, mask, where)
            inputs = {"inputs_embeds": torch.full_like(padded, torch.nan)}  # nothing above may read them
            stack.enter_context(bypass(anatomy.layers[:start], padded, as_tuples=as_tuples))
        captures = stack.enter_context(capture([anatomy.layers[k] for k in layers]))
        if None not in wanted:
            stack.enter_context(stop_after(anatomy.layers[layers[-1]]))
        outcome[None] = anatomy.decoder(**inputs, attention_mask=mask, use_cache=False)[0]
    return outcome | {k: state.output for k, state in zip(layers, captures, strict=True)}
