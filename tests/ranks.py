"""One rank of ``tests/test_engines.py``, started by torchrun: what it learns in each case after every stage, and how it ends.

torchrun --nproc_per_node 2 tests/ranks.py FOLDER CASE ...
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from conftest import PAPER, random_rows
from test_trainer import adapter, make_trainer
from test_two_tokenizers import make as make_pair
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_semalign.cache import examples as examples_module
from hf_semalign.cache import source_pass
from hf_semalign.cache.states import StateFolder
from hf_semalign.training.stages import whole

ROWS = random_rows([(3 + i % 3, 2 + i % 4) for i in range(46)], seed=1)
GLOBAL_BATCH = 16
CASES = {  # 35 rows: the last batch of an epoch has 3, all of them at the first rank
    "cached": {},
    "online": {"signals": "online"},
    "accumulated": {"gradient_accumulation_steps": 2},
    "accumulated online": {"gradient_accumulation_steps": 2, "signals": "online", "frontier": "cumulative"},
    "joint": {"frontier": "joint", "scale": "match", "learning_rate": 3e-3},
    "two tokenizers": {**PAPER, "save_strategy": "no"},  # 24 rows
}
EXTRAS = {"bf16": {"bf16": True}, "checkpointed": {"activation_checkpointing": True}}


class Note(TrainerCallback):
    """Keeps the adapter after each stage, the gradient of each step, and whether all ranks had the same."""

    def __init__(self):
        self.trainer, self.stages, self.gradients, self.agreed = None, [], [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        gradients = [whole(p.grad).flatten() for layer in self.trainer.lora_layers for p in layer if p.grad is not None]
        self.gradients.append(torch.cat(gradients))
        everywhere = gather_object(self.gradients[-1:])
        self.agreed.append(all(torch.equal(everywhere[0], other) for other in everywhere) and bool(everywhere[0].any()))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.trainer.schedule.boundaries:
            self.stages.append(adapter(self.trainer))


@contextmanager
def counted():
    """The shards that this process writes inside the block, and the parts of the source's pass that it asks for."""
    written, parts, write, in_parts = [], [], StateFolder.write, source_pass.in_parts

    def noted(self, number, states, places=None):
        written.extend(f"{column.name} {number}" for column in states)
        write(self, number, states, places)

    def asked(work, part):
        parts.append(part)
        in_parts(work, part)

    StateFolder.write, source_pass.in_parts = noted, asked
    try:
        yield written, parts
    finally:
        StateFolder.write, source_pass.in_parts = write, in_parts


@contextmanager
def small_shards():
    """Shards of some rows, so that there are some for every rank."""
    examples_module.SHARD_TOKENS, usual = 48, examples_module.SHARD_TOKENS
    try:
        yield
    finally:
        examples_module.SHARD_TOKENS = usual


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def make(folder: Path, case: str, ranks: int):
    """A trainer at equal global batch, whatever the number of ranks."""
    note, settings = Note(), dict((CASES | EXTRAS)[case])
    accumulated = settings.pop("gradient_accumulation_steps", 1)
    if accumulated > 1:  # the micro-batch stays, and fewer are needed
        settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": GLOBAL_BATCH // 4 // ranks}
    else:
        settings["per_device_train_batch_size"] = GLOBAL_BATCH // ranks
    if case == "two tokenizers":
        # They were saved before: each process would train other tokenizers, because training breaks ties by chance.
        models = [str(folder.parent / "models" / role) for role in ("target", "source")]
        trainer = make_pair(folder, models, max_steps=12, **settings)
        trainer.add_callback(note)
    else:
        trainer = make_trainer(folder, train=ROWS[:35], evaluation=ROWS[35:], callbacks=[note], max_steps=12, **settings)
    note.trainer = trainer
    return trainer, note


@small_shards()
def train(folder: Path, case: str, ranks: int):
    """One case from the start to the end."""
    with counted() as (written, parts):
        trainer, note = make(folder, case, ranks)
        trainer.evaluate()  # it prepares the model, after which accelerate would not wrap it for training
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "stage" in entry]
    history = [[entry[key] for key in ("loss", "relation", "kl", "grad_norm")] for entry in logged]
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / "saved"))
    ends = [metrics[f"eval_{key}"] for key in ("kl", "loss", "relation")]
    return {
        "stages": note.stages,
        "gradients": note.gradients,
        "agreed": note.agreed,
        "history": torch.tensor(history),
        "metrics": ends,
        "written": sorted(gather_object(written)),
        "own": all(gather_object([set(parts) <= {(trainer.accelerator.process_index, ranks)}])),
        "passes": sum(gather_object([len(parts)])),
        "held": sum(local(p).numel() for p in trainer.target_anatomy.layers.parameters()),
    }


class Trouble(TrainerCallback):
    """At some step, something happens to the last rank alone."""

    def __init__(self, step, happen):
        self.step, self.happen = step, happen

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            self.happen()


@small_shards()
def stopped(folder: Path, case: str, ranks: int):
    """One rank gets SIGTERM in step 5, amid an epoch and a stage: all end after it with a checkpoint, and go on to the end."""
    trainer, _ = make(folder, case, ranks)
    trainer.add_callback(Trouble(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    try:
        trainer.train()
    except SystemExit as end:
        code, step = end.code, trainer.state.global_step
    trainer, note = make(folder, case, ranks)
    trainer.train(resume_from_checkpoint=True)
    return {"code": code, "step": step, "agreed": note.agreed, "adapter": adapter(trainer)}


@small_shards()
def broken(folder: Path, case: str, ranks: int):
    """One rank's loss is not finite in step 5: all stop before anything is learnt from it, and say whose it was."""
    trainer, _ = make(folder, case, ranks)
    trainer.add_callback(Trouble(5, lambda: trainer.objective.target_head.weight.fill_(torch.inf)))
    try:
        trainer.train()
    except FloatingPointError as error:
        message, whole = str(error), bool(adapter(trainer).isfinite().all())
    ids = [one.tolist() for one in trainer._examples_in_batch]
    return {"messages": gather_object([message]), "whole": gather_object([whole]), "ids": gather_object(ids)}


def drifted(folder: Path, case: str, ranks: int):
    """One rank's adapter is changed in step 3, as if a gradient had not been averaged: all stop when the stage is over."""
    trainer, _ = make(folder, case, ranks)
    trainer.add_callback(Trouble(3, lambda: trainer.lora_layers[0][0].data.add_(1e-6)))
    try:
        trainer.train()
    except RuntimeError as error:
        return {"message": str(error)}


if __name__ == "__main__":
    into, ranks = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    found = {case: train(into / case, case, ranks) for case in sys.argv[2:]}
    found |= {fault.__name__: fault(into / fault.__name__, "cached", ranks) for fault in (stopped, broken, drifted)}
    if os.environ["RANK"] == "0":
        torch.save(found, into / "found.pt")
