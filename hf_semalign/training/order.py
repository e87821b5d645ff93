"""Which rows a run reads in which stage, known before it starts: signals that no step reads are not computed."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from accelerate.data_loader import SeedableRandomSampler

from hf_semalign.config import SemAlignConfig
from hf_semalign.method.frontier import FrontierSchedule


def rows_by_stage(args: SemAlignConfig, schedule: FrontierSchedule, rows: int) -> list[np.ndarray] | None:
    """Numbers of the rows that the steps of each stage read, sorted; ``None`` where the order depends on what is drawn later.

    The Trainer draws the order of an epoch from the seed and the epoch's number alone, and an optimizer step reads the rows of
    one global batch, in this order.

    Args:
        args: the settings.
        schedule: the stages in optimizer steps.
        rows: rows of the training split.
    """
    loading = cast(Any, args.accelerator_config)
    in_order = args.train_sampling_strategy == "sequential"
    if not (in_order or (args.train_sampling_strategy == "random" and loading.use_seedable_sampler)) or args.ignore_data_skip:
        return None
    sampler = SeedableRandomSampler(range(rows), data_seed=args.seed if args.data_seed is None else args.data_seed)
    micro = args.train_batch_size * args.world_size
    batch = micro * args.gradient_accumulation_steps
    read = rows // micro * micro if args.dataloader_drop_last else rows
    steps = -(-read // batch)  # of an epoch
    found: list[list[np.ndarray]] = [[] for _ in range(schedule.num_stages)]
    for begin in range(0, schedule.total_steps, steps):
        sampler.set_epoch(begin // steps)
        order = np.arange(rows) if in_order else np.fromiter(sampler, np.int64, rows)
        end = min(begin + steps, schedule.total_steps)
        for stage in range(schedule.stage(begin), schedule.stage(end - 1) + 1):
            first, last = max(schedule.boundaries[stage], begin), min(schedule.boundaries[stage + 1], end)
            found[stage].append(order[:read][(first - begin) * batch : (last - begin) * batch])
    return [np.unique(np.concatenate(parts)) for parts in found]
