"""Source signals: what the frozen source tells the target about a batch (method, section 7).

A signal is the mapped state of each wanted pair and the source's final hidden state at the valid positions; the source's
head is applied at training time, which is exact and far smaller than logits. The source is frozen and the data are fixed, so
its signals are computed once (:class:`SourceSignals`); :class:`OnlineSignals` runs the source on every batch instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from filelock import Timeout
from transformers import PreTrainedModel

from hf_semalign.cache.examples import Collate, Examples
from hf_semalign.cache.layer_pass import Output, layer_pass, spread, work_of
from hf_semalign.cache.source import Source
from hf_semalign.cache.states import Column, Places, StateFolder
from hf_semalign.errors import InputError
from hf_semalign.files import WHOLE, Part, in_parts
from hf_semalign.method.objective import BatchSignals
from hf_semalign.method.pairing import LayerPairing
from hf_semalign.method.semantic_map import SemanticMap
from hf_semalign.models.anatomy import Anatomy, CausalLM, dissect
from hf_semalign.models.hooks import capture
from hf_semalign.splits import taught_positions, valid_positions

logger = logging.getLogger(__name__)
Batch = Mapping[str, torch.Tensor]


def example_ids(batch: Batch) -> torch.Tensor:
    """By which the source knows the rows of a batch ``[B]``: with two tokenizers it has ids of its own."""
    return batch.get("source_id", batch["example_id"])


def aligned_rows(ranks: torch.Tensor, taught: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Which of the source's states belong to the taught positions of the target, ``[N]``.

    Args:
        ranks: for each position of the target, which of its row's states it is, ``[B, T]``.
        taught: ``[B, T]`` bool.
        counts: ``[B]``, how many states the source has of each row, one row after the other.
    """
    before = counts.cumsum(0) - counts
    return (ranks + before.unsqueeze(1))[taught]


class Reading(NamedTuple):
    """Signals that are going to be read: the final states of some examples, and their supervision at some target layers.

    Attributes:
        target_layers: whose supervision is read.
        examples: example ids, as :func:`example_ids` gives them; ``None`` for all of the data set.
    """

    target_layers: Sequence[int]
    examples: np.ndarray | None = None


class OnlineSignals:
    """Runs the source on every batch.

    Args:
        source: the source model; put into evaluation mode, without gradients.
        pairing: which source layer goes with which target layer.
        semantic_map: map between the spaces.
        scales: one factor on the mapped states for each pair; all 1 by default.
        own_rows: with two tokenizers, gives the source's batch for some example ids of its own.
    """

    def __init__(
        self,
        source: PreTrainedModel,
        pairing: LayerPairing,
        semantic_map: SemanticMap,
        scales: Sequence[float] | None = None,
        own_rows: Callable[[torch.Tensor], Batch] | None = None,
    ) -> None:
        self.source = source.eval().requires_grad_(False)
        self.pairing = pairing
        self.semantic_map = semantic_map
        self.scales = scales or (1.0,) * len(pairing.source_layers)
        self._own_rows = own_rows

    @torch.no_grad()
    def __call__(self, batch: Batch, target_layers: Sequence[int]) -> BatchSignals:
        """Signals of a batch.

        Args:
            batch: ``input_ids, attention_mask, labels`` ``[B, T]`` on the source's device.
            target_layers: target layers whose supervision is wanted.
        """
        anatomy, taught = dissect(self.source), taught_positions(batch)
        own = batch
        if self._own_rows is not None:
            own = {name: tensor.to(taught.device) for name, tensor in self._own_rows(batch["source_id"]).items()}
        with capture([anatomy.layers[self.pairing.source_layers[k]] for k in target_layers]) as states:
            final = anatomy.decoder(input_ids=own["input_ids"], attention_mask=own["attention_mask"], use_cache=False)[0]
        valid = valid_positions(own["labels"])
        if self._own_rows is None:  # one tokenizer: position by position
            final, mapped = final[valid], [self.semantic_map(state.output.float()) for state in states]
        else:
            chosen = aligned_rows(batch["source_rank"], taught, valid.sum(1))
            final = final[valid][chosen]
            mapped = [spread(self.semantic_map(state.output[valid][chosen].float()), taught) for state in states]
        return BatchSignals(taught, [states * self.scales[k] for k, states in zip(target_layers, mapped, strict=True)], final)

    def find(self, batch: Batch) -> Callable[[Sequence[int]], BatchSignals]:
        """See :meth:`SourceSignals.find`; here nothing is known before the source has run."""
        return partial(self, batch)


class SourceSignals:
    """Source signals of one data set on disk, found by example id; reading them needs no source.

    One column of states (:class:`hf_semalign.cache.states.StateFolder`) for each paired source layer, mapped but not scaled, so
    that runs with other pairs, scales or weights share what they have in common, and one for the final state. All are in the
    dtype of the source's weights, which is that of its states: rounding them further would show in training. Mapped states of a
    float16 source are in float32.

    Args:
        source: the source; it is loaded by :meth:`prepare` alone, and only when something is missing.
        pairing: which source layer goes with which target layer.
        semantic_map: map between the spaces, on the device that the source runs on.
        dataset: rows of :func:`hf_semalign.splits.encode`; rows of one content are computed once.
        root: the folder of all sources, see :meth:`Source.folder`.
        collate: rows to a batch.
        scales: one factor on the mapped states for each pair; all 1 by default.
        tokenizer: fingerprint of the tokenizer that made the ids, for the record and for telling folders apart.
        precision: mixed precision that the source runs in, which the signals depend on; the caller holds its autocast context.
        device: where the source runs.
        batch_size: examples a forward pass.
        stream: hold one decoder layer of the source at a time, and roll the states of all examples through it; each weight
            is read once, and the size of the source does not matter.
        progress: show progress bars.

    Attributes:
        reserve: bytes of the disk that a pass leaves free.
    """

    def __init__(
        self,
        source: Source,
        pairing: LayerPairing,
        semantic_map: SemanticMap,
        dataset: Dataset,
        root: Path,
        collate: Collate,
        *,
        scales: Sequence[float] | None = None,
        tokenizer: str | None = None,
        precision: str = "no",
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        stream: bool = False,
        progress: bool = True,
    ) -> None:
        self.source = source
        self.pairing = pairing
        self.semantic_map = semantic_map
        self.scales = scales or (1.0,) * len(pairing.source_layers)
        self._collate, self._device, self._batch_size, self._stream = collate, device, batch_size, stream
        self._progress = progress
        self.reserve = 0
        facts = {
            "source": source.identity,
            "tokenizer": tokenizer,
            "dtype": str(source.dtype),
            "precision": precision,
            "hf_semalign": version("hf_semalign"),
        }
        self._states = StateFolder(source.folder(root), facts, Examples(dataset))
        self.folder = self._states.path
        self._final = Column("final", source.width, source.dtype)

    @property
    def examples(self) -> Examples:
        """The distinct examples."""
        return self._states.examples

    def __contains__(self, example_id: int) -> bool:
        return example_id in self.examples

    def __call__(self, batch: Batch, target_layers: Sequence[int]) -> BatchSignals:
        """Signals of a batch, on the device of its labels.

        Args:
            batch: ``labels`` ``[B, T]`` and ``example_id`` ``[B]``.
            target_layers: target layers whose supervision is wanted.

        Raises:
            KeyError: an example of another data set.
        """
        return self.find(batch)(target_layers)

    def find(self, batch: Batch) -> Callable[[Sequence[int]], BatchSignals]:
        """Where the signals of a batch lie: what reads them does not wait for a GPU that was given work meanwhile.

        Raises:
            KeyError: an example of another data set.
        """
        taught = taught_positions(batch)
        some = taught.any(1)
        where, places = taught.flatten().nonzero().squeeze(1), self.examples.places(example_ids(batch)[some])
        chosen: torch.Tensor | slice = slice(None)
        if "source_rank" in batch:
            counts = torch.from_numpy(self.examples.answers[places]).to(taught.device)
            chosen = aligned_rows(batch["source_rank"][some], taught[some], counts)

        def states(column: Column) -> torch.Tensor:
            return self._states.read(column, places, taught.device)[chosen]

        def read(target_layers: Sequence[int]) -> BatchSignals:
            supervision = [
                spread(states(self._mapped(self.pairing.source_layers[k])), taught, where).float() * self.scales[k]
                for k in target_layers
            ]
            return BatchSignals(taught, supervision, states(self._final))

        return read

    def prepare(self, target_layers: Sequence[int]) -> None:
        """Have the final states and those of some target layers on disk, of all examples; see :func:`prepare_signals`."""
        prepare_signals({self: [Reading(target_layers)]})

    def _lacks(self, readings: Sequence[Reading], part: Part = WHOLE) -> bool:
        return any(self._states.missing(output.column, output.places, part) for output in self._outputs(readings))

    def _plan_pass(self, readings: Sequence[Reading], part: Part) -> _SourcePass | None:
        """The pass of the source that makes what is missing of a part of the shards; ``None`` where all is there.

        Raises:
            OSError: too little space on the disk.
        """
        examples, last = self._states.examples, self.source.num_layers - 1
        outputs, size = [], 0
        for output in self._outputs(readings):
            if lacking := self._states.missing(output.column, output.places, part):
                outputs.append(output)
                size += sum(output.column.size(examples, places) for places in lacking.values())
        if not outputs:
            return None
        among = self._places(readings)
        depths = [last if output.layer is None else output.layer for output in outputs]
        one_pass = _SourcePass(self, outputs, 0, max(depths), among, part)
        if self._stream:
            work = work_of(self._states, outputs, self._batch_size, among, part)
            running = np.concatenate([places for shard in work.values() for places in shard.batches])
            kept = [k for k in range(1, last + 1) if (self.folder / self._hidden(k, part).name).is_dir()]
            whole = [k for k in kept if k <= min(depths) and not self._states.missing(self._hidden(k, part), running, part)]
            one_pass = replace(one_pass, start=max(whole, default=0), running=running)
            size += (2 - bool(kept)) * self._hidden(0, part).size(examples, running)  # one is read while one is written
        self._states.check_space(size, "set signals_dir to a larger disk, or signals='online'", self.reserve)
        return one_pass

    def _places(self, readings: Sequence[Reading]) -> Places:
        """Places of the examples of some readings."""
        some = [reading.examples for reading in readings if reading.examples is not None]
        if len(some) < len(readings):
            return None
        places = np.unique(self.examples.places(torch.from_numpy(np.concatenate(some))))
        return None if len(places) == len(self.examples.ids) else places

    def _outputs(self, readings: Sequence[Reading]) -> list[Output]:
        """What the source has to give for some readings: mapped states of each paired source layer, and the final ones."""
        by_layer: dict[int, list[Reading]] = {}  # several target layers may be paired with one source layer
        for reading in readings:
            for source_layer in {self.pairing.source_layers[k] for k in reading.target_layers}:
                by_layer.setdefault(source_layer, []).append(reading)
        mapped = [
            Output(self._mapped(layer), layer, lambda states: self.semantic_map(states.float()), self._places(some))
            for layer, some in by_layer.items()
        ]
        return [*mapped, Output(self._final, None, places=self._places(readings))]

    def _mapped(self, source_layer: int) -> Column:
        name = f"layer-{source_layer:03d}-{self.semantic_map.fingerprint[:16]}"
        half = self.source.dtype == torch.float16  # whose range a mapped state may leave
        dtype = torch.float32 if half else self.source.dtype
        return Column(f"{name}-float32" if half else name, self.semantic_map.matrix.shape[0], dtype)

    def _drop_abandoned(self, part: Part) -> None:
        """Delete the source's own states that passes in other parts have left, where nobody is at work on them."""
        for path in self.folder.glob("hidden-*"):
            _, layer, *of = path.name.replace("-of-", "-").split("-")
            other = (int(of[0]), int(of[1])) if of else WHOLE
            if other != part:
                with suppress(Timeout), self._states.lock(other).acquire(blocking=False):
                    self._states.drop(self._hidden(int(layer), other))

    def _hidden(self, layer: int, part: Part) -> Column:
        """Inputs of a source layer at all positions, in the dtype that they have there; each part of a pass has its own."""
        name = f"hidden-{layer:03d}" if part == WHOLE else f"hidden-{layer:03d}-{part[0]}-of-{part[1]}"
        return Column(name, self.source.width, self.source.dtype, everywhere=True)


class CachedSignals:
    """Source signals of all splits of a run.

    Args:
        splits: signals by split.
        training: the split that training reads, layer by layer.
        target_layers: the target layers that the other splits are read at.
    """

    def __init__(self, splits: dict[str, SourceSignals], training: str, target_layers: Sequence[int]) -> None:
        self.splits = splits
        self.training = splits[training]
        self._target_layers = target_layers

    @property
    def scales(self) -> Sequence[float]:
        """One factor on the mapped states for each pair."""
        return self.training.scales

    @scales.setter
    def scales(self, scales: Sequence[float]) -> None:
        for signals in self.splits.values():
            signals.scales = scales

    def prepare(self, readings: Sequence[Reading], part: Part = WHOLE) -> None:
        """Have on disk what is going to be read of the training split, and everything of the other splits.

        Args:
            readings: of the training split.
            part: of this process, see :func:`prepare_signals`.
        """
        prepare_signals(self._wanted(readings), part)

    def write(self, readings: Sequence[Reading], part: Part) -> None:
        """One part of that, see :func:`prepare_part`."""
        prepare_part(self._wanted(readings), part)

    def _wanted(self, readings: Sequence[Reading]) -> dict[SourceSignals, Sequence[Reading]]:
        others = [Reading(self._target_layers)]
        wanted = {signals: readings if signals is self.training else others for signals in self.splits.values()}
        return {signals: some for signals, some in wanted.items() if some}

    def __call__(self, batch: Batch, target_layers: Sequence[int]) -> BatchSignals:
        """Signals of a batch of one split.

        Raises:
            ValueError: an example whose signals were not computed.
        """
        return self.find(batch)(target_layers)

    def find(self, batch: Batch) -> Callable[[Sequence[int]], BatchSignals]:
        """See :meth:`SourceSignals.find`."""
        example = int(example_ids(batch)[0])
        found = [signals.find(batch) for signals in self.splits.values() if example in signals]

        def read(target_layers: Sequence[int]) -> BatchSignals:
            lacking = None
            for one in found:
                try:
                    return one(target_layers)
                except FileNotFoundError as error:  # the training split has what training reads, and no more
                    lacking = error
            raise InputError(
                f"No source signals for example {example}: they cover the evaluation data that the trainer was made with, and "
                "of the training data what training reads. Make it with these data as eval_dataset, or set signals='online'."
            ) from lacking

        return read


@dataclass(frozen=True)
class _SourcePass:
    """A pass of the source over a part of one data set, and what it writes.

    Attributes:
        signals: of the data set.
        outputs: what is written.
        start: first layer that runs.
        depth: the last one.
        among: the examples that batches are made of.
        part: of the shards.
        running: places of the examples that run, where layers run one at a time.
    """

    signals: SourceSignals
    outputs: list[Output]
    start: int
    depth: int
    among: Places
    part: Part
    running: Places = None

    def run(self, anatomy: Anatomy, as_tuples: bool) -> None:
        """All layers."""
        self._pass(anatomy, self.outputs, 0, as_tuples, "source signals")

    def run_layer(self, k: int, anatomy: Anatomy, as_tuples: bool) -> None:
        """One layer: the outputs that it gives, and the inputs of the next. Its own inputs are deleted after."""
        if not self.start <= k <= self.depth:
            return
        last = self.signals.source.num_layers - 1
        outputs = [one for one in self.outputs if one.layer == k or (one.layer is None and k == last)]
        if k < self.depth:
            outputs.append(Output(self.signals._hidden(k + 1, self.part), k, places=self.running))
        self._pass(anatomy, outputs, k, as_tuples, f"source signals, layer {k}/{last}")
        self.tidy(kept=k + 1)

    def tidy(self, kept: int | None = None) -> None:
        """Delete the source's own states of this part, but for the inputs of one layer."""
        for k in range(1, self.signals.source.num_layers):
            if k != kept:
                self.signals._states.drop(self.signals._hidden(k, self.part))

    def _pass(self, anatomy: Anatomy, outputs: Sequence[Output], start: int, as_tuples: bool, label: str) -> None:
        signals = self.signals
        hidden = signals._hidden(start, self.part)
        layer_pass(
            anatomy,
            signals._states,
            outputs,
            signals._collate,
            start=start,
            entering=partial(signals._states.read, hidden, device=signals._device) if start else None,
            as_tuples=as_tuples,
            batch_size=signals._batch_size,
            device=signals._device,
            among=self.among,
            part=self.part,
            progress=label if signals._progress else None,
        )


def prepare_signals(wanted: Mapping[SourceSignals, Sequence[Reading]], part: Part = WHOLE) -> None:
    """Have signals of one source for several data sets on disk; the source runs over what is missing, and only then is loaded.

    Whole, or with one layer at a time and all data sets through it, so that each weight is read once.

    Several processes that share the folders share the work, see :func:`hf_semalign.files.in_parts`.

    Args:
        wanted: what is going to be read, by data set.
        part: of this process, and how many processes there are.

    Raises:
        OSError: too little space on a disk, before the source runs.
        ValueError: the source has no weights, see :class:`Source`.
    """
    if not any(signals._lacks(readings) for signals, readings in wanted.items()):
        return  # and wait for no other run's lock
    in_parts(partial(prepare_part, wanted), part)


def prepare_part(wanted: Mapping[SourceSignals, Sequence[Reading]], part: Part, *, wait: bool = True) -> bool:
    """One part of :func:`prepare_signals`.

    Args:
        wanted: what is going to be read, by data set.
        part: of the shards.
        wait: for a process that is at work on it.

    Returns:
        False where another process is at work on it.
    """
    with ExitStack() as stack:
        # In one order for all runs, lest two that share folders wait for each other.
        for lock in sorted((signals._states.lock(part) for signals in wanted), key=lambda lock: str(lock.lock_file)):
            try:
                stack.enter_context(lock.acquire(blocking=wait))
            except Timeout:
                return False
        for signals in wanted:
            signals._drop_abandoned(part)
        passes = [one for signals, readings in wanted.items() if (one := signals._plan_pass(readings, part))]
        if not passes:
            return True
        first = passes[0].signals
        source, as_tuples = first.source, first.source.as_tuples  # before a layer is on the device
        if first._stream:
            for k in range(min(one.start for one in passes), max(one.depth for one in passes) + 1):
                with source.layer(k, first._device) as anatomy:
                    for one in passes:
                        one.run_layer(k, anatomy, as_tuples)
        else:
            anatomy = dissect(source.model(first._device))
            for one in passes:
                one.run(anatomy, as_tuples)
        for one in passes:
            one.tidy()
    return True


@torch.no_grad()
def match_scales(
    signals: OnlineSignals | SourceSignals | CachedSignals, target: CausalLM, batches: Iterable[dict[str, torch.Tensor]]
) -> tuple[float, ...]:
    """``scale: match``: one factor a pair that gives the mapped states the mean norm of the target layer's outputs.

    Args:
        signals: signals of the extract split, not scaled.
        target: the target model before training; its mode is restored.
        batches: dicts of ``input_ids, attention_mask, labels`` ``[B, T]`` and ``example_id`` ``[B]`` of the extract split.
    """
    anatomy, was_training = dissect(target), target.training
    target.eval()
    norms = torch.zeros(2, len(anatomy.layers), dtype=torch.float64)  # of the target's outputs, of the mapped states
    for batch in batches:
        batch = {key: tensor.to(anatomy.device) for key, tensor in batch.items()}
        with capture(anatomy.layers) as states:
            anatomy.decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        said = signals(batch, range(len(states)))
        for k, (state, mapped) in enumerate(zip(states, said.supervision, strict=True)):
            norms[0, k] += state.output[said.taught].float().norm(dim=-1).sum().cpu()
            norms[1, k] += mapped[said.taught].norm(dim=-1).sum().cpu()
    target.train(was_training)
    if not norms[1].all():
        raise InputError(f"scale 'match' needs mapped states to measure, got mean norms {norms[1].tolist()}.")
    return tuple((norms[0] / norms[1]).tolist())
