"""One process of ``tests/test_engines.py`` under DeepSpeed's ZeRO-2, started by ``accelerate launch``: what it learns.

``ddp_backend`` gloo makes accelerate count CPUs' processes; transformers allows bf16 on GPUs alone, of which it is told here.

DS_ACCELERATOR=cpu accelerate launch --config_file recipes/accelerate/zero2.yaml tests/zero.py FOLDER RECIPE'S ARGUMENTS
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ranks
import torch
import transformers.training_args
from ranks import CASES, EXTRAS, broken, make, stopped, train

from hf_semalign.cli import main

transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def twice(folder: Path, case: str):
    """A second training in one process begins with the adapter of the first; the optimizer anew."""
    trainer, note = make(folder, case, int(os.environ["WORLD_SIZE"]))
    trainer.train()
    trainer.train()
    return {"stages": note.stages}


if __name__ == "__main__":
    into = Path(sys.argv[1])
    ranks.Note.on_pre_optimizer_step = lambda self, *args, **kwargs: None  # DeepSpeed has made the step before
    for settings in (*CASES.values(), *EXTRAS.values()):
        settings |= {"use_cpu": False, "ddp_backend": "gloo"}
    found = {case: train(into / case, case, 2) for case in (*CASES, *EXTRAS)}
    found |= {fault.__name__: fault(into / fault.__name__, "cached", 2) for fault in (stopped, broken)}
    found["twice"] = twice(into / "twice", "cached")
    main(["train", *sys.argv[2:]])
    if os.environ["RANK"] == "0":
        torch.save(found, into / "found.pt")
