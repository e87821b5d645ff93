"""One pass of frozen layers over a data set, and what it writes on its way."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from hf_semalign.cache.examples import Collate
from hf_semalign.cache.states import Column, StateFolder
from hf_semalign.errors import InputError
from hf_semalign.models.anatomy import Anatomy
from hf_semalign.models.hooks import bypass, capture, stop_after
from hf_semalign.splits import valid_positions

SHARDS_HELD = 4  # at a time, one being made and the others written; fewer, but two, where they are more than
BYTES_HELD = 2**30


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
