"""The source's pass: the frozen source runs over data sets once and writes the states that are missing (method, section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from filelock import Timeout

from hf_semalign.cache.examples import Collate
from hf_semalign.cache.layer_pass import Output, layer_pass, work_of
from hf_semalign.cache.source import Source
from hf_semalign.cache.states import Column, Places, StateFolder
from hf_semalign.files import WHOLE, Part, in_parts
from hf_semalign.models.anatomy import Anatomy, dissect


@dataclass(frozen=True, eq=False)
class Job:
    """What the source has to write about one data set.

    Attributes:
        source: the source. It is loaded only if something is missing.
        folder: takes the states.
        outputs: all that is wanted. What the folder already has is left alone.
        among: the examples that batches are made of.
        collate: rows to a batch.
        batch_size: examples in a forward pass.
        device: where the source runs.
        stream: hold one decoder layer of the source at a time and write the inputs of the next.
        progress: show progress bars.
        reserve: bytes of the disk that stay free.
    """

    source: Source
    folder: StateFolder
    outputs: Sequence[Output]
    among: Places
    collate: Collate
    batch_size: int
    device: torch.device | str
    stream: bool
    progress: bool
    reserve: int

    def lacks(self, part: Part = WHOLE) -> bool:
        """Whether the folder lacks any output of a part of the shards."""
        return any(self.folder.missing(output.column, output.places, part) for output in self.outputs)

    def hidden(self, layer: int, part: Part) -> Column:
        """The inputs of a source layer at all positions, in the source's dtype. Each part of a pass has its own."""
        name = f"hidden-{layer:03d}" if part == WHOLE else f"hidden-{layer:03d}-{part[0]}-of-{part[1]}"
        return Column(name, self.source.width, self.source.dtype, everywhere=True)

    def drop_abandoned(self, part: Part) -> None:
        """Delete the hidden states that passes in other parts left behind, unless another process still works on them."""
        for path in self.folder.path.glob("hidden-*"):
            _, layer, *of = path.name.replace("-of-", "-").split("-")
            other = (int(of[0]), int(of[1])) if of else WHOLE
            if other != part:
                with suppress(Timeout), self.folder.lock(other).acquire(blocking=False):
                    self.folder.drop(self.hidden(int(layer), other))


@dataclass(frozen=True)
class _Pass:
    """A pass of the source over a part of one data set.

    Attributes:
        job: what is wanted of the data set.
        part: of the shards.
        outputs: those of the job that are missing.
        depth: the last layer that runs.
        start: the first one. It is above 0 if a streamed pass was interrupted there.
        running: places of the examples that run, if layers run one at a time.
    """

    job: Job
    part: Part
    outputs: list[Output]
    depth: int
    start: int = 0
    running: Places = None

    @classmethod
    def plan(cls, job: Job, part: Part) -> _Pass | None:
        """The pass that computes what is missing; ``None`` if nothing is.

        Raises:
            OSError: too little space on the disk.
        """
        examples, last = job.folder.examples, job.source.num_layers - 1
        outputs, size = [], 0
        for output in job.outputs:
            if lacking := job.folder.missing(output.column, output.places, part):
                outputs.append(output)
                size += sum(output.column.size(examples, places) for places in lacking.values())
        if not outputs:
            return None
        depths = [last if output.layer is None else output.layer for output in outputs]
        start, running = 0, None
        if job.stream:
            work = work_of(job.folder, outputs, job.batch_size, job.among, part)
            running = np.concatenate([places for shard in work.values() for places in shard.batches])
            kept = [k for k in range(1, last + 1) if (job.folder.path / job.hidden(k, part).name).is_dir()]
            whole = [k for k in kept if k <= min(depths) and not job.folder.missing(job.hidden(k, part), running, part)]
            start = max(whole, default=0)
            size += (2 - bool(kept)) * job.hidden(0, part).size(examples, running)  # one is read while one is written
        job.folder.check_space(size, "set signals_dir to a larger disk, or signals='online'", job.reserve)
        return cls(job, part, outputs, max(depths), start, running)

    def run(self, anatomy: Anatomy, as_tuples: bool) -> None:
        """Run all layers."""
        self._run(anatomy, self.outputs, 0, as_tuples, "source signals")

    def run_layer(self, k: int, anatomy: Anatomy, as_tuples: bool) -> None:
        """Run one layer: write its outputs and the inputs of the next layer, then delete its own inputs."""
        if not self.start <= k <= self.depth:
            return
        last = self.job.source.num_layers - 1
        outputs = [one for one in self.outputs if one.layer == k or (one.layer is None and k == last)]
        if k < self.depth:
            outputs.append(Output(self.job.hidden(k + 1, self.part), k, places=self.running))
        self._run(anatomy, outputs, k, as_tuples, f"source signals, layer {k}/{last}")
        self.tidy(kept=k + 1)

    def tidy(self, kept: int | None = None) -> None:
        """Delete the hidden states of this part, except the inputs of one layer."""
        for k in range(1, self.job.source.num_layers):
            if k != kept:
                self.job.folder.drop(self.job.hidden(k, self.part))

    def _run(self, anatomy: Anatomy, outputs: Sequence[Output], start: int, as_tuples: bool, label: str) -> None:
        job, below = self.job, self.job.hidden(start, self.part)
        layer_pass(
            anatomy,
            job.folder,
            outputs,
            job.collate,
            start=start,
            entering=partial(job.folder.read, below, device=job.device) if start else None,
            as_tuples=as_tuples,
            batch_size=job.batch_size,
            device=job.device,
            among=job.among,
            part=self.part,
            progress=label if job.progress else None,
        )


def run_source(jobs: Sequence[Job], part: Part = WHOLE) -> None:
    """Have the outputs of all jobs on disk. The source runs over what is missing, and is loaded only if something is.

    A resident source runs over one data set after the other. A streamed source runs one layer at a time over all data sets,
    so that each weight is read once. Several processes that share the folders share the work, see
    :func:`hf_semalign.files.in_parts`.

    Args:
        jobs: of one source.
        part: of this process, and the number of processes.

    Raises:
        OSError: too little space on a disk, before the source runs.
        ValueError: the source has no weights, see :class:`Source`.
    """
    if any(job.lacks() for job in jobs):  # otherwise no lock is waited for
        in_parts(partial(run_part, jobs), part)


def run_part(jobs: Sequence[Job], part: Part, *, wait: bool = True) -> bool:
    """Run one part of :func:`run_source`.

    Args:
        jobs: of one source.
        part: of the shards.
        wait: for a process that already works on this part.

    Returns:
        False if another process works on it and ``wait`` is False.
    """
    with ExitStack() as stack:
        # All runs take the locks in one order, so that two runs that share folders do not wait for each other.
        for lock in sorted((job.folder.lock(part) for job in jobs), key=lambda lock: str(lock.lock_file)):
            try:
                stack.enter_context(lock.acquire(blocking=wait))
            except Timeout:
                return False
        for job in jobs:
            job.drop_abandoned(part)
        passes = [one for job in jobs if (one := _Pass.plan(job, part))]
        if not passes:
            return True
        job = passes[0].job
        source, as_tuples = job.source, job.source.as_tuples  # before a layer is on the device
        if job.stream:
            for k in range(min(one.start for one in passes), max(one.depth for one in passes) + 1):
                with source.layer(k, job.device) as anatomy:
                    for one in passes:
                        one.run_layer(k, anatomy, as_tuples)
        else:
            anatomy = dissect(source.model(job.device))
            for one in passes:
                one.run(anatomy, as_tuples)
        for one in passes:
            one.tidy()
    return True
