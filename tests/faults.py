"""The command line in a process of its own that notes what it does, and may be killed in the middle of it.

Every forward of a decoder layer, every optimizer step and every change of a file in the run folder is an event of the phase it
belongs to. A process can be told to kill itself, with SIGKILL, before the n-th event of a phase.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_semalign import trainer
from hf_semalign.cache import prefix, scores, signals
from hf_semalign.cli import main
from hf_semalign.experiments import figures
from hf_semalign.experiments import run as runs
from hf_semalign.method import semantic_map as semantics

PHASES = {  # what each calls its own; the innermost counts
    "attribution": (scores, "attribute_layers"),
    "map": (semantics.SemanticMap, "from_heads"),
    "signals": (signals, "prepare_signals"),
    "prefix": (prefix.TargetPrefix, "_run_layer"),
    "training": (trainer.SemAlignTrainer, "training_step"),
    "checkpoint": (trainer.SemAlignTrainer, "_save_checkpoint"),
    "export": (trainer.SemAlignTrainer, "save_model"),
    "results": (runs, "_write"),
}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


class Noted:
    """Counts events by phase, writes each to a file as it happens, and kills the process at one."""

    def __init__(self, folder: Path, log: Path, kill: tuple[str, int] | None) -> None:
        self.folder, self.kill = str(folder), kill
        self.phases, self.counts = ["start"], Counter()
        self.file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def event(self, what: str) -> None:
        phase = self.phases[-1]
        self.counts[phase] += 1
        os.write(self.file, f"{phase}: {what}\n".encode())
        if (phase, self.counts[phase]) == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, name: str, arguments: tuple) -> None:
        writes = name == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or name in CHANGES) and str(arguments[0]).startswith(self.folder) and "lock" not in str(arguments[0]):
            self.event(f"{name} {os.path.relpath(str(arguments[0]), self.folder)}")

    @contextmanager
    def phase(self, name: str):
        self.phases.append(name)
        try:
            yield
        finally:
            self.phases.pop()

    def watch(self, owner, name: str, phase: str) -> None:
        inner = getattr(owner, name)

        def outer(*args, **kwargs):
            baseline = owner is trainer.SemAlignTrainer and Path(args[0].args.output_dir).name == "kd"
            here = self.phases[-1] if phase == "export" and self.phases[-1].endswith("checkpoint") else phase
            with self.phase(f"kd {phase}" if baseline and here == phase else here):
                if phase == "training":
                    self.event(f"step {args[0].state.global_step + 1}")
                return inner(*args, **kwargs)

        setattr(owner, name, staticmethod(outer) if name == "from_heads" else outer)


def _touch(figure, folder: Path, name: str) -> Path:
    path = folder / f"{name}.png"
    path.touch()
    return path


def _run(folder: Path, arguments: list[str], log: Path, kill: tuple[str, int] | None) -> None:
    out = os.open(log.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    figures._save = _touch  # drawing takes longer than all else
    noted = Noted(folder, log, kill)
    for phase, (owner, name) in PHASES.items():
        noted.watch(owner, name, phase)
    torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: noted.event("forward") if isinstance(module, LlamaDecoderLayer) else None
    )
    sys.addaudithook(noted.audit)
    sys.exit(main(arguments))


def run(folder: Path, arguments: list[str], log: Path, kill: tuple[str, int] | None = None) -> tuple[int, list[str]]:
    """Run the command line in a process of its own; its exit code (-9 where it was killed) and events."""
    context = multiprocessing.get_context("forkserver")  # imports once
    context.set_forkserver_preload(["faults"])
    process = context.Process(target=_run, args=(folder, arguments, log, kill))
    process.start()
    process.join(300)
    return process.exitcode, log.read_text().splitlines()
