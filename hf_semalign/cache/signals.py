"""Source signals: what the frozen source tells the target about a batch (method, section 7).

The signals of a batch are the mapped states of each wanted pair and the source's final hidden states at the valid positions.
Training applies the source's head to the final states, which is exact and takes far less space than logits. The source and the
data do not change, so :class:`SourceSignals` computes its signals once. :class:`OnlineSignals` runs the source on every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from hf_semalign.cache.examples import Collate, Examples
from hf_semalign.cache.layer_pass import Output, spread
from hf_semalign.cache.source import Source
from hf_semalign.cache.source_pass import Job, run_part, run_source
from hf_semalign.cache.states import Column, Places, StateFolder
from hf_semalign.errors import InputError
from hf_semalign.files import WHOLE, Part
from hf_semalign.method.objective import BatchSignals
from hf_semalign.method.pairing import LayerPairing
from hf_semalign.method.semantic_map import SemanticMap
from hf_semalign.models.anatomy import CausalLM, dissect
from hf_semalign.models.hooks import capture
from hf_semalign.splits import taught_positions, valid_positions

Batch = Mapping[str, torch.Tensor]


def example_ids(batch: Batch) -> torch.Tensor:
    """The ids ``[B]`` of the rows that the source reads for a batch."""
    return batch.get("source_id", batch["example_id"])


def aligned_rows(ranks: torch.Tensor, taught: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Indices of the source states that belong to the taught positions of the target, ``[N]``.

    Args:
        ranks: for each position of the target, the index of its state within its row, ``[B, T]``.
        taught: ``[B, T]`` bool.
        counts: ``[B]``, number of source states of each row. The rows follow one another.
    """
    before = counts.cumsum(0) - counts
    return (ranks + before.unsqueeze(1))[taught]


class Reading(NamedTuple):
    """Signals that are going to be read: the final states of some examples, and their supervision at some target layers.

    Attributes:
        target_layers: the layers whose supervision is read.
        examples: example ids, as :func:`example_ids` gives them; ``None`` for all of the data set.
    """

    target_layers: Sequence[int]
    examples: np.ndarray | None = None


class OnlineSignals:
    """Source signals that are computed anew for every batch.

    Args:
        source: the source model. It is put into evaluation mode, without gradients.
        pairing: the source layer of each target layer.
        semantic_map: the map between the spaces.
        scales: one factor on the mapped states for each pair; all 1 by default.
        own_rows: gives the source's batch for some example ids of its own, if it reads rows of its own.
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
            target_layers: the target layers whose supervision is wanted.
        """
        anatomy, taught = dissect(self.source), taught_positions(batch)
        own = batch
        if self._own_rows is not None:
            own = {name: tensor.to(taught.device) for name, tensor in self._own_rows(batch["source_id"]).items()}
        with capture([anatomy.layers[self.pairing.source_layers[k]] for k in target_layers]) as states:
            final = anatomy.decoder(input_ids=own["input_ids"], attention_mask=own["attention_mask"], use_cache=False)[0]
        valid = valid_positions(own["labels"])
        if self._own_rows is None:  # both read the same rows: position by position
            final, mapped = final[valid], [self.semantic_map(state.output.float()) for state in states]
        else:
            chosen = aligned_rows(batch["source_rank"], taught, valid.sum(1))
            final = final[valid][chosen]
            mapped = [spread(self.semantic_map(state.output[valid][chosen].float()), taught) for state in states]
        return BatchSignals(taught, [states * self.scales[k] for k, states in zip(target_layers, mapped, strict=True)], final)

    def find(self, batch: Batch) -> Callable[[Sequence[int]], BatchSignals]:
        """See :meth:`SourceSignals.find`. Here nothing is known before the source has run."""
        return partial(self, batch)


class SourceSignals:
    """Source signals of one data set on disk, found by example id. Reading them needs no source.

    There is one column of states (:class:`hf_semalign.cache.states.StateFolder`) for each paired source layer and one for the
    final state. Mapped states are not scaled, so that runs with other pairs, scales or weights share what they have in common.
    All are in the dtype of the source's weights, which is that of its states: more rounding would show in training. Mapped
    states of a float16 source are in float32.

    Args:
        source: the source. :meth:`prepare` loads it, and only if something is missing.
        pairing: the source layer of each target layer.
        semantic_map: the map between the spaces, on the device that the source runs on.
        dataset: rows of :func:`hf_semalign.splits.encode`. Rows with the same content are computed once.
        root: the folder of all sources, see :meth:`Source.folder`.
        collate: rows to a batch.
        scales: one factor on the mapped states for each pair; all 1 by default.
        tokenizer: fingerprint of the tokenizer that made the ids. It is part of the folder's name and record.
        precision: mixed precision that the source runs in, which the signals depend on. The caller holds its autocast context.
        device: where the source runs.
        batch_size: examples in a forward pass.
        stream: hold one decoder layer of the source at a time and run all examples through it. Each weight is read once, and
            the size of the source does not matter.
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

    # Reading

    def __call__(self, batch: Batch, target_layers: Sequence[int]) -> BatchSignals:
        """Signals of a batch, on the device of its labels.

        Args:
            batch: ``labels`` ``[B, T]`` and ``example_id`` ``[B]``.
            target_layers: the target layers whose supervision is wanted.

        Raises:
            KeyError: an example of another data set.
        """
        return self.find(batch)(target_layers)

    def find(self, batch: Batch) -> Callable[[Sequence[int]], BatchSignals]:
        """Find the signals of a batch before the GPU gets work, so that reading them later does not wait for it.

        Returns:
            A function of the target layers that reads the signals.

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

    # Writing

    def prepare(self, target_layers: Sequence[int]) -> None:
        """Have the final states and those of some target layers on disk, for all examples; see :func:`prepare_signals`."""
        prepare_signals({self: [Reading(target_layers)]})

    def job(self, readings: Sequence[Reading]) -> Job:
        """What the source has to write for some readings: mapped states of each paired layer, and the final states."""
        by_layer: dict[int, list[Reading]] = {}  # several target layers may be paired with one source layer
        for reading in readings:
            for source_layer in {self.pairing.source_layers[k] for k in reading.target_layers}:
                by_layer.setdefault(source_layer, []).append(reading)
        outputs = [
            Output(self._mapped(layer), layer, lambda states: self.semantic_map(states.float()), self._places(some))
            for layer, some in by_layer.items()
        ]
        among = self._places(readings)
        return Job(
            self.source,
            self._states,
            [*outputs, Output(self._final, None, places=among)],
            among,
            self._collate,
            self._batch_size,
            self._device,
            self._stream,
            self._progress,
            self.reserve,
        )

    def _places(self, readings: Sequence[Reading]) -> Places:
        """Places of the examples of some readings."""
        some = [reading.examples for reading in readings if reading.examples is not None]
        if len(some) < len(readings):
            return None
        places = np.unique(self.examples.places(torch.from_numpy(np.concatenate(some))))
        return None if len(places) == len(self.examples.ids) else places

    def _mapped(self, source_layer: int) -> Column:
        name = f"layer-{source_layer:03d}-{self.semantic_map.fingerprint[:16]}"
        half = self.source.dtype == torch.float16  # a mapped state may leave its range
        dtype = torch.float32 if half else self.source.dtype
        return Column(f"{name}-float32" if half else name, self.semantic_map.matrix.shape[0], dtype)


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
        """Have on disk what will be read of the training split, and everything of the other splits.

        Args:
            readings: of the training split.
            part: of this process, see :func:`prepare_signals`.
        """
        prepare_signals(self._wanted(readings), part)

    def write(self, readings: Sequence[Reading], part: Part) -> None:
        """Write one part of that, and no other."""
        run_part([signals.job(some) for signals, some in self._wanted(readings).items()], part)

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
                except FileNotFoundError as error:  # the training split has only what training reads
                    lacking = error
            raise InputError(
                f"No source signals for example {example}: they cover the evaluation data that the trainer was made with, and "
                "of the training data what training reads. Pass these data as eval_dataset, or set signals='online'."
            ) from lacking

        return read


def prepare_signals(wanted: Mapping[SourceSignals, Sequence[Reading]], part: Part = WHOLE) -> None:
    """Have signals of one source for several data sets on disk, see :func:`hf_semalign.cache.source_pass.run_source`.

    Args:
        wanted: what is going to be read, by data set.
        part: of this process, and the number of processes.

    Raises:
        OSError: too little space on a disk, before the source runs.
        ValueError: the source has no weights, see :class:`Source`.
    """
    run_source([signals.job(readings) for signals, readings in wanted.items()], part)


@torch.no_grad()
def match_scales(
    signals: OnlineSignals | SourceSignals | CachedSignals, target: CausalLM, batches: Iterable[dict[str, torch.Tensor]]
) -> tuple[float, ...]:
    """``scale: match``: one factor a pair that gives the mapped states the mean norm of the target layer's outputs.

    Args:
        signals: signals of the extract split, not scaled.
        target: the target model before training. Its mode is restored.
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
