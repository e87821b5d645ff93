"""Source signals: what the frozen source tells the target about a batch (method, section 7).

A signal is the mapped state of each wanted pair and the source's final hidden state at the valid positions; the source's
head is applied at training time, which is exact and far smaller than logits. The source is frozen and the data are fixed, so
its signals are computed once (:class:`SourceSignals`); :class:`OnlineSignals` runs the source on every batch instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from hf_semalign.cache.examples import Collate, Examples
from hf_semalign.cache.layer_pass import Output, layer_pass, spread
from hf_semalign.cache.source import Source
from hf_semalign.cache.states import Column, StateFolder
from hf_semalign.errors import InputError
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
                spread(states(self._mapped(layer)), taught, where).float() * self.scales[layer] for layer in target_layers
            ]
            return BatchSignals(taught, supervision, states(self._final))

        return read

    def prepare(self, target_layers: Sequence[int]) -> None:
        """Have the final states and those of some target layers on disk, see :func:`prepare_signals`."""
        prepare_signals({self: target_layers})

    def _lacks(self, target_layers: Sequence[int]) -> bool:
        columns = [self._final, *(self._mapped(k) for k in target_layers)]
        return any(self._states.missing(column) for column in columns)

    def _plan_pass(self, target_layers: Sequence[int]) -> _SourcePass | None:
        """The pass of the source that makes what is missing; ``None`` where all is there.

        Raises:
            OSError: too little space on the disk.
        """
        if not self._lacks(target_layers):
            return None
        states, last = self._states, self.source.num_layers - 1
        states.check_space(self._size(target_layers), "set signals_dir to a larger disk, or signals='online'", self.reserve)
        outputs = [output for output in self._outputs(target_layers) if states.missing(output.column)]
        depths = [last if output.layer is None else output.layer for output in outputs]
        start = max((k for k in range(1, min(depths) + 1) if self._is_kept(k)), default=0)
        return _SourcePass(self, outputs, start, max(depths))

    def _tidy(self, kept: int | None = None) -> None:
        """Delete the source's own states, but for the inputs of one layer."""
        for path in self.folder.glob("hidden-*"):
            if (k := int(path.name.removeprefix("hidden-"))) != kept:
                self._states.drop(self._hidden(k))

    def _pass(self, anatomy: Anatomy, outputs: Sequence[Output], start: int, as_tuples: bool, label: str) -> None:
        layer_pass(
            anatomy,
            self._states,
            outputs,
            self._collate,
            start=start,
            entering=partial(self._states.read, self._hidden(start), device=self._device) if start else None,
            as_tuples=as_tuples,
            batch_size=self._batch_size,
            device=self._device,
            progress=label if self._progress else None,
        )

    def _outputs(self, target_layers: Sequence[int]) -> list[Output]:
        mapped = {self._mapped(k): self.pairing.source_layers[k] for k in target_layers}
        return [
            *(Output(column, layer, lambda states: self.semantic_map(states.float())) for column, layer in mapped.items()),
            Output(self._final, None),
        ]

    def _size(self, target_layers: Sequence[int]) -> int:
        """Bytes that a pass would add at its largest: what is missing, and generations of the source's own states."""
        missing = self._states.bytes_missing([output.column for output in self._outputs(target_layers)])
        if not (missing and self._stream):
            return missing
        kept = any((self.folder / self._hidden(k).name).is_dir() for k in range(1, self.source.num_layers))
        return missing + (2 - kept) * self._hidden(0).size(self._states.examples)  # one is read while one is written

    def _mapped(self, target_layer: int) -> Column:
        name = f"layer-{self.pairing.source_layers[target_layer]:03d}-{self.semantic_map.fingerprint[:16]}"
        half = self.source.dtype == torch.float16  # whose range a mapped state may leave
        dtype = torch.float32 if half else self.source.dtype
        return Column(f"{name}-float32" if half else name, self.semantic_map.matrix.shape[0], dtype)

    def _hidden(self, layer: int) -> Column:
        """Inputs of a source layer at all positions, in the dtype that they have there."""
        return Column(f"hidden-{layer:03d}", self.source.width, self.source.dtype, everywhere=True)

    def _is_kept(self, layer: int) -> bool:
        column = self._hidden(layer)
        return (self.folder / column.name).is_dir() and not self._states.missing(column)


class CachedSignals:
    """Source signals of all splits of a run.

    Args:
        splits: signals by split.
        training: the split that training reads, layer by layer; the others are read at all layers.
    """

    def __init__(self, splits: dict[str, SourceSignals], training: str) -> None:
        self.splits = splits
        self.training = splits[training]

    @property
    def scales(self) -> Sequence[float]:
        """One factor on the mapped states for each pair."""
        return self.training.scales

    @scales.setter
    def scales(self, scales: Sequence[float]) -> None:
        for signals in self.splits.values():
            signals.scales = scales

    def prepare(self, target_layers: Sequence[int] | None) -> None:
        """Have these layers of the training split on disk, nothing of it without any, and everything of the other splits."""
        everything = range(len(self.scales))
        wanted: dict[SourceSignals, Sequence[int]] = {
            signals: everything for signals in self.splits.values() if signals is not self.training
        }
        if target_layers is not None:
            wanted[self.training] = target_layers
        prepare_signals(wanted)

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
    """A pass of the source over one data set, from layer ``start`` to ``depth``, and what it writes."""

    signals: SourceSignals
    outputs: list[Output]
    start: int
    depth: int

    def of_layer(self, k: int, last: int) -> list[Output]:
        """What one layer gives: wanted outputs, and the inputs of the next."""
        here = [output for output in self.outputs if output.layer == k or (output.layer is None and k == last)]
        if k < self.depth:
            here.append(Output(self.signals._hidden(k + 1), k))
        return here


def prepare_signals(wanted: Mapping[SourceSignals, Sequence[int]]) -> None:
    """Have signals of one source for several data sets on disk; the source runs over what is missing, and only then is loaded.

    Whole, or with one layer at a time and all data sets through it, so that each weight is read once.

    Args:
        wanted: the target layers whose supervision is needed, by data set.

    Raises:
        OSError: too little space on a disk, before the source runs.
        ValueError: the source has no weights, see :class:`Source`.
    """
    if not any(signals._lacks(layers) for signals, layers in wanted.items()):
        return  # and wait for no other run's lock
    with ExitStack() as stack:
        # In one order for all runs, lest two that share folders wait for each other.
        for lock in sorted((signals._states.lock for signals in wanted), key=lambda lock: str(lock.lock_file)):
            stack.enter_context(lock)
        passes = [one for signals, layers in wanted.items() if (one := signals._plan_pass(layers))]
        if not passes:
            return
        first = passes[0].signals
        source, last = first.source, first.source.num_layers - 1
        if first._stream:
            as_tuples = source.as_tuples  # before a layer is on the device
            for k in range(min(one.start for one in passes), max(one.depth for one in passes) + 1):
                with source.layer(k, first._device) as anatomy:
                    for one in passes:
                        if one.start <= k <= one.depth:
                            label = f"source signals, layer {k}/{last}"
                            one.signals._pass(anatomy, one.of_layer(k, last), k, as_tuples, label)
                            one.signals._tidy(kept=k + 1)
        else:
            anatomy = dissect(source.model(first._device))
            for one in passes:
                one.signals._pass(anatomy, one.outputs, one.start, source.as_tuples, "source signals")
        for one in passes:
            one.signals._tidy()


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
