"""One process of ``tests/test_engines.py`` under FSDP2, started by ``accelerate launch``: what it learns in each case.

accelerate leaves FSDP out on CPUs after a look at its own state, which here says GPUs. All else is accelerate's and torch's
own: the plugin of the launched environment, ``prepare`` with ``fully_shard``, the optimizer's parameters, checkpoints.

accelerate launch --config_file recipes/accelerate/fsdp2.yaml tests/shards.py FOLDER RECIPE'S ARGUMENTS
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from ranks import CASES, EXTRAS, broken, stopped, train

from hf_semalign.cli import main

look = PartialState.__init__


def look_and_see_gpus(self, *args, **kwargs):
    look(self, *args, **kwargs)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = look_and_see_gpus

if __name__ == "__main__":
    into = Path(sys.argv[1])
    for settings in CASES.values():
        settings["signals"] = "cached"  # online is refused, and learns the same
    found = {case: train(into / case, case, 2) for case in ("cached", "accumulated online", "joint", *EXTRAS)}
    found |= {"stopped": stopped(into / "stopped", "cached", 2), "broken": broken(into / "broken", "cached", 2)}
    main(["train", *sys.argv[2:]])
    if os.environ["RANK"] == "0":
        torch.save(found, into / "found.pt")
