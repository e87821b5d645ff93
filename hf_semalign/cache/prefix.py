"""Target prefix: what the frozen target layers below the frontier give, computed once for every example (method, section 7)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import psutil
import torch
from accelerate.utils import broadcast
from rich.filesize import decimal
from tqdm.auto import tqdm

from hf_semalign.cache.examples import Collate, Examples
from hf_semalign.cache.layer_pass import run_layers, spread
from hf_semalign.cache.states import join
from hf_semalign.config import SemAlignConfig
from hf_semalign.files import WHOLE, Part
from hf_semalign.method.frontier import Frontier
from hf_semalign.models.anatomy import CausalLM, dissect
from hf_semalign.models.hooks import bypass, capture, gives_tuples, stop_after

logger = logging.getLogger(__name__)
LEAST_EPOCHS = 2
LARGEST_SHARE = {"device": 0.25, "host": 0.5}  # of the free memory; steps need the rest of the device
TOLERANCE = 1e-3  # relative; if a target can be entered at all, the numbers are exactly the same


def prefix_pays(args: SemAlignConfig, frontier: Frontier, steps: int, rows: int) -> bool:
    """Whether a run uses a prefix: the layers below its frontier are frozen, and it sees its rows more than twice.

    A prefix costs one forward of the target over the rows. It saves half a forward at every step.

    Args:
        args: the settings.
        frontier: which layers train when.
        steps: optimizer steps of the run.
        rows: distinct rows of the align split.
    """
    if args.prefix_memory == "none" or args.signals != "cached":
        return False
    batch = min(args.train_batch_size * args.gradient_accumulation_steps * args.world_size, rows)
    return frontier.kind == "single" and frontier.num_layers > 1 and steps * batch > LEAST_EPOCHS * rows


class PrefixUnavailable(ValueError):
    """The target prefix would not be exact, or does not fit in memory. The message says why."""


class TargetPrefix:
    """The inputs ``x_k`` of the frontier's layer ``k`` for every training example, in memory.

    A step enters the target at layer ``k`` with these inputs, and the layers below do not run. When the frontier moves up,
    layer ``k`` runs over all examples once, and its outputs replace its inputs. A run that resumes repeats the moves up to its
    layer, which costs at most one forward of the target over the examples and gives the same bits.

    Several processes share each move: every process runs its shards and sends them to the others.

    Args:
        model: the target with its LoRA, in training mode.
        examples: the training examples.
        collate: rows to a batch.
        batch_size: examples in a forward.
        device: where the target is.
        memory: ``device``, ``host``, or ``auto``: on the device if a quarter of its free memory is enough, otherwise on the
            host if half of its free memory is enough.
        part: of the shards that this process runs: ``(i, n)`` for every n-th from the i-th on.
        progress: show a progress bar.

    Attributes:
        layer: the layer that steps enter at. At 0, the whole target runs.

    Raises:
        PrefixUnavailable: entering at a layer does not give what the whole target gives (dropout, or layers that read more than
            their input), or the states do not fit in memory.
    """

    def __init__(
        self,
        model: CausalLM,
        examples: Examples,
        collate: Collate,
        *,
        batch_size: int = 16,
        device: torch.device | str = "cpu",
        memory: str = "auto",
        part: Part = WHOLE,
        progress: bool = True,
    ) -> None:
        self.layer = 0
        self._anatomy = dissect(model)
        self._examples, self._starts = examples, examples.offsets[True]
        self._collate, self._batch_size, self._progress = collate, batch_size, progress
        self._device, self._part = torch.device(device), part
        self._as_tuples = gives_tuples(self._anatomy.decoder, self._anatomy.layers[0])
        width, dtype = self._probe()
        self._states = _allocate((int(self._starts[-1]), width), dtype, self._device, memory)

    def move(self, layer: int) -> None:
        """Hold the inputs of a layer. Layers run one at a time, from the one that steps enter at now.

        With several processes, all of them call it.
        """
        while self.layer < layer:
            self._run_layer(self.layer)
            self._share()
            self.layer += 1

    @torch.no_grad()
    def _run_layer(self, k: int) -> None:
        """Replace the inputs of layer ``k`` by its outputs, for the shards of this process."""
        batches = [
            places
            for number in range(self._part[0], len(self._examples.shards), self._part[1])
            for places in self._examples.batches(number, self._batch_size)
        ]
        bar = tqdm(batches, desc=f"target prefix, layer {k + 1}", unit="batch", disable=not self._progress)
        for places in bar:
            batch = self._collate(self._examples.rows(places))
            states = self._states[self._starts[places[0]] : self._starts[places[-1] + 1]]  # a batch's places follow one another
            below = states.to(self._device) if k else None
            outcome = run_layers(self._anatomy, batch, [k], k, below, self._as_tuples, self._device)[k]
            where = batch["attention_mask"].flatten().nonzero().squeeze(1)
            states.copy_(outcome.flatten(0, 1).index_select(0, where.to(self._device)))

    def _share(self) -> None:
        """Send every shard from the process that ran it to all others."""
        count = self._part[1]
        for number, shard in enumerate(self._examples.shards if count > 1 else ()):
            states = self._states[self._starts[shard.start] : self._starts[shard.stop]].view(torch.uint8)
            sent = states.to(self._device)  # NCCL reads the device's memory only
            broadcast(sent, from_process=number % count)
            states.copy_(sent)

    @contextmanager
    def entered(self, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside the block, a forward of the target on this batch begins at :attr:`layer`.

        Args:
            batch: ``attention_mask`` ``[B, T]`` and ``example_id`` ``[B]``.
        """
        if not self.layer:
            yield
            return
        places, mask = self._examples.places(batch["example_id"]).tolist(), batch["attention_mask"].bool()
        states = join([self._states[self._starts[place] : self._starts[place + 1]] for place in places], mask.device)
        with bypass(self._anatomy.layers[: self.layer], spread(states, mask), as_tuples=self._as_tuples):
            yield

    @torch.no_grad()
    def _probe(self) -> tuple[int, torch.dtype]:
        """Width and dtype of the states, after checking that entering at every layer gives what the whole target gives."""
        batch = self._collate(self._examples.rows(self._examples.batches(len(self._examples.shards) - 1, 2)[0]))
        inputs = {key: batch[key].to(self._device) for key in ("input_ids", "attention_mask")}
        mask, layers = inputs["attention_mask"].bool(), self._anatomy.layers

        def forward(**given: torch.Tensor) -> torch.Tensor:
            return self._anatomy.decoder(**given, attention_mask=inputs["attention_mask"], use_cache=False)[0][mask].float()

        with torch.random.fork_rng():
            with capture(layers) as states:
                whole = forward(input_ids=inputs["input_ids"])
            if _differ(whole, forward(input_ids=inputs["input_ids"])):
                raise PrefixUnavailable("two forwards of one batch differ, as under dropout in the target's config")
            for k, layer in enumerate(layers[1:], start=1):
                entering = states[k].input
                if entering.shape[:-1] != mask.shape:
                    raise PrefixUnavailable(f"layer {k} takes states of shape {tuple(entering.shape)}, not [B, T, D]")
                padded, final = spread(entering[mask], mask), whole
                # One layer each time, and after the last the rest: all above would cost the square of their number.
                end = stop_after(layer) if k + 1 < len(layers) else nullcontext()
                with bypass(layers[:k], padded, as_tuples=self._as_tuples), capture([layer]) as (state,), end:
                    final = forward(inputs_embeds=torch.full_like(padded, torch.nan))
                if _differ(states[k].output[mask].float(), state.output[mask].float()) or _differ(whole, final):
                    raise PrefixUnavailable(f"layer {k} depends on more than the states below it")
        return states[1].input.shape[-1], states[1].input.dtype


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not bool((one - other).norm() <= TOLERANCE * one.norm())  # also if it is NaN


def _allocate(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, memory: str) -> torch.Tensor:
    """Memory for states of a shape.

    Raises:
        PrefixUnavailable: they do not fit where they may go.
    """
    needed = shape[0] * shape[1] * dtype.itemsize
    free = {"host": psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))}
    if device.type == "cuda":
        free = {"device": torch.cuda.mem_get_info(device)[0], **free}
    for place, size in free.items():
        share = LARGEST_SHARE[place] if memory == "auto" else 1.0
        if memory in ("auto", place) and needed <= share * size:
            logger.info("The target prefix takes %s of the memory of the %s.", decimal(needed), place)
            return torch.empty(shape, dtype=dtype, device=device if place == "device" else "cpu")
    found = " and ".join(f"{decimal(size)} free on the {place}" for place, size in free.items())
    raise PrefixUnavailable(f"it needs {decimal(needed)} with prefix_memory={memory!r}; there are {found}")
