"""The target below the frontier, which is frozen: what it gives for every example is computed once (method, section 7)."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from filelock import Timeout
from torch import nn

from hf_semalign.cache.examples import Collate, Examples
from hf_semalign.cache.layer_pass import Output, layer_pass, spread
from hf_semalign.cache.source import config_facts
from hf_semalign.cache.states import Column, StateFolder
from hf_semalign.config import SemAlignConfig
from hf_semalign.files import WHOLE, Part, checksum, digest, in_parts, writing_lock
from hf_semalign.method.frontier import Frontier
from hf_semalign.models.anatomy import CausalLM, base_model, dissect
from hf_semalign.models.hooks import bypass, capture, gives_tuples, stop_after

logger = logging.getLogger(__name__)
LEAST_EPOCHS = 2
TOLERANCE = 1e-3  # relative; where a target can be entered at all, the numbers are the very same


def prefix_pays(args: SemAlignConfig, frontier: Frontier, steps: int, rows: int) -> bool:
    """Whether a run gets a prefix: layers below its frontier are frozen, and it sees its rows more than twice.

    A prefix costs one pass of the target over the rows, and saves half a forward at every step.

    Args:
        args: the settings.
        frontier: which layers train when.
        steps: optimizer steps of the run.
        rows: distinct rows of the align split.
    """
    batch = min(args.train_batch_size * args.gradient_accumulation_steps * args.world_size, rows)
    strict = frontier.kind == "single" and frontier.num_layers > 1
    return strict and args.signals == "cached" and steps * batch > LEAST_EPOCHS * rows


class PrefixUnavailable(ValueError):
    """The target prefix would not be exact, or does not fit on the disk; the message says why."""


class TargetPrefix:
    """The inputs ``x_k`` of the frontier's layer ``k`` for every training example, on disk.

    A step enters the target at layer ``k`` with them, and the layers below do nothing. When the frontier moves, a pass of one
    layer over the split makes the next generation. The one before stays until then, so that a run that is interrupted at any
    moment finds a generation to go on from; each is known by a digest of every weight that it depends on.

    Args:
        model: the target with its LoRA, in training mode.
        lora_layers: LoRA parameters by target layer.
        examples: the training examples.
        collate: rows to a batch.
        root: the run's own folder for it.
        precision: mixed precision of the run, which the states depend on; the caller holds its autocast context.
        batch_size: examples a forward.
        device: where the target is.
        part: of a pass that this process runs first, see :func:`hf_semalign.files.in_parts`.
        progress: show a progress bar.

    Attributes:
        layer: the layer that steps enter at now; at 0, the bottom, nothing is bypassed.

    Raises:
        PrefixUnavailable: entering at a layer does not give what the whole target gives (dropout, layers that read more than
            the stream), or two generations do not fit on the disk.
    """

    def __init__(
        self,
        model: CausalLM,
        lora_layers: Sequence[Sequence[nn.Parameter]],
        examples: Examples,
        collate: Collate,
        root: Path,
        *,
        precision: str = "no",
        batch_size: int = 16,
        device: torch.device | str = "cpu",
        part: Part = WHOLE,
        progress: bool = True,
    ) -> None:
        self.layer = 0
        self._anatomy = dissect(model)
        self._lora_layers = lora_layers
        self._examples = examples
        self._collate, self._batch_size, self._device, self._progress = collate, batch_size, device, progress
        self._part = part
        self._root = root
        self._as_tuples = gives_tuples(self._anatomy.decoder, self._anatomy.layers[0])
        self._column = self._probe()
        root.mkdir(parents=True, exist_ok=True)
        needed = 2 * self._column.size(examples)
        with writing_lock(root):
            free = shutil.disk_usage(root).free + sum(path.stat().st_size for path in root.rglob("*.safetensors"))
        if needed > free:
            self.close()
            raise PrefixUnavailable(f"it needs {needed / 1e9:.1f} GB in {root.name}, which has {free / 1e9:.1f} GB free")
        frozen = {name: checksum(p) for name, p in base_model(model).named_parameters() if "lora_" not in name}
        self._facts = {"target": digest([frozen, config_facts(base_model(model).config)]), "precision": precision}
        self._folder: StateFolder | None = None

    def move(self, layer: int) -> None:
        """Have the inputs of a layer: from the deepest generation on disk below it, or from the bottom.

        Raises:
            PrefixUnavailable: too little space on the disk.
        """
        below = [[checksum(p) for p in parameters] for parameters in self._lora_layers[:layer]]
        latest, self._folder = self._folder, self._generation(below) if layer else None
        if self._folder is not None:
            in_parts(partial(self._advance, self._folder, latest, below), self._part)
        self.layer = layer

    def _advance(
        self, folder: StateFolder, latest: StateFolder | None, below: list[list[str]], part: Part, *, wait: bool
    ) -> bool:
        """Fill a part of a generation from the deepest one below it that is whole, and delete all others; False if another
        process is at work on it.
        """
        try:
            with writing_lock(self._root, part).acquire(blocking=wait):
                self._fill(folder, latest, below, part)
        except Timeout:
            return False
        return True

    def _fill(self, folder: StateFolder, latest: StateFolder | None, below: list[list[str]], part: Part) -> None:
        layer = len(below)
        if lacking := folder.missing(self._column, part=part):
            earlier = ((k, self._generation(below[:k], latest)) for k in range(layer - 1, 0, -1))
            start, before = next(((k, one) for k, one in earlier if not one.missing(self._column)), (0, None))
            for path in self._root.iterdir():
                if path.is_dir() and path not in (folder.path, None if before is None else before.path):
                    shutil.rmtree(path, ignore_errors=True)  # another process may be deleting it
            needed = sum(self._column.size(self._examples, places) for places in lacking.values())
            free = folder.free
            if needed > free:
                raise PrefixUnavailable(
                    f"layer {layer} needs {needed / 1e9:.1f} GB in {self._root.name}, with {free / 1e9:.1f} GB free"
                )
            layer_pass(
                self._anatomy,
                folder,
                [Output(self._column, layer - 1)],
                self._collate,
                start=start,
                entering=None if before is None else partial(before.read, self._column, device=self._device),
                as_tuples=self._as_tuples,
                batch_size=self._batch_size,
                device=self._device,
                part=part,
                progress=f"target prefix, layer {layer}" if self._progress else None,
            )

    @contextmanager
    def entered(self, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside the block, a forward of the target on this batch begins at :attr:`layer`.

        Args:
            batch: ``attention_mask`` ``[B, T]`` and ``example_id`` ``[B]``.
        """
        if self._folder is None:
            yield
            return
        places = self._examples.places(batch["example_id"])
        mask = batch["attention_mask"].bool()
        states = spread(self._folder.read(self._column, places, mask.device), mask)
        with bypass(self._anatomy.layers[: self.layer], states, as_tuples=self._as_tuples):
            yield

    def close(self) -> None:
        """Delete what is on the disk."""
        self.layer, self._folder = 0, None
        shutil.rmtree(self._root, ignore_errors=True)

    def _generation(self, below: Sequence[Sequence[str]], known: StateFolder | None = None) -> StateFolder:
        """The folder of the states above some layers, by the checksums of their LoRA; ``known`` where that is the one."""
        facts = {**self._facts, "layer": len(below), "lora": digest(below)}
        folder = StateFolder(self._root, facts, self._examples)
        return known if known is not None and known.path == folder.path else folder

    @torch.no_grad()
    def _probe(self) -> Column:
        """The column of the states, after a look at whether entering at every layer gives what the whole target gives."""
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
        return Column("states", states[1].input.shape[-1], states[1].input.dtype, everywhere=True)


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not bool((one - other).norm() <= TOLERANCE * one.norm())  # also where it is NaN
