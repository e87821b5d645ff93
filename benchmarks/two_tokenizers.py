"""What a pair with two tokenizers learns: our methods beside TRL's GOLD and ULD, on the same rows, all by one evaluation.

    python benchmarks/two_tokenizers.py RECIPE FOLDER [CELL ...] [--set key=value ...]

``RECIPE`` names two models with different tokenizers. A cell whose ``FOLDER/CELL/cell.json`` exists is not run again; of a run
of `semalign train` in ``FOLDER/CELL`` its figures are taken, and an adapter that stands there is only evaluated.
``FOLDER/table.md`` and ``FOLDER/table.json`` get all cells that are there. The cells:

``target``        the target before training.
``sft``           fine-tuning on the answers of the data set.
``kd``            distillation, KL over classes of tokens.
``semalign``      the recipe as it stands.
``equal``         ``kd`` with classes of exactly equal tokens: what has no equal in the other vocabulary is one class of the
                  rest, where ``kd`` counts it as its beginning. Positions are used by these classes, too.
``gold``          TRL's GOLD, ``use_uld_loss=True`` and all else by default. It aligns spans by bytes, sorts the probabilities
                  of both sides, and takes the L1 distance. ``uld_token_merge_strategy="observed"`` reads the logits behind
                  each token, one position late: what stands before an answer's first token is never compared, and a span of
                  several tokens stands for what follows its first one, which is another place on each side.
``gold-corrected``
                  The same with ``uld_token_merge_strategy="bayesian"``, which reads the logits before each token, and with
                  what TRL's page on GOLD recommends: ``uld_use_hybrid_loss=True``, ``uld_hybrid_matched_weight=0.6``
                  (generalised JSD of equal tokens, ``beta`` 0.5), ``uld_hybrid_unmatched_weight=0.4`` (others, sorted).
``gold-hybrid``   That hybrid loss, and the logits still one position late.
``uld``           ULD: ``use_uld_loss=True``, ``use_extended_uld=False``. The k-th token of the one side stands for the k-th of
                  the other, sorted, L1.
``sft-source``    fine-tuning on answers that the source writes to the same prompts.

GOLD and ULD are off-policy here (``lmbda=0``) and have no term for the answers (``uld_crossentropy_weight=0``, the default).
They get LoRA, optimizer and learning rates of our trainers, and the same rows in the same batches. What is TRL's own stays: the
source reads the chat template of the target, white space after the end of an answer counts, means are over rows and then over
micro-batches. What would cost a CPU most is computed in another way, with the same result: the source runs once a row, and its
head gives the logits of later visits; probabilities are sorted by numpy; spans are merged all at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import rivals  # first: it silences TRL
import torch
from datasets import Dataset
from peft.utils import SAFETENSORS_WEIGHTS_NAME, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.modeling_outputs import CausalLMOutput
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.gold.gold_trainer import ULDLoss

from hf_semalign.cache.source import Source
from hf_semalign.experiments.recipe import Recipe, load_recipe, load_tokenizer
from hf_semalign.experiments.rounds import make_trainer, start_of, with_answers
from hf_semalign.experiments.tasks import TaskData
from hf_semalign.method import prefix_classes
from hf_semalign.models.loading import device_name, load_model
from hf_semalign.models.names import resolve_model
from hf_semalign.transfer import TransferTrainer, signals_root, timed

OURS = {"sft": "sft", "kd": "kd", "semalign": "semalign", "equal": "kd", "sft-source": "sft"}
HYBRID = {"uld_use_hybrid_loss": True, "uld_hybrid_matched_weight": 0.6, "uld_hybrid_unmatched_weight": 0.4}
TRLS: dict[str, dict[str, Any]] = {
    "gold": {},
    "gold-corrected": {"uld_token_merge_strategy": "bayesian", **HYBRID},
    "gold-hybrid": HYBRID,
    "uld": {"use_extended_uld": False},
}
ROWS = 2  # of a micro-batch of TRL's, whose full logits take memory; it averages them, so that their number changes nothing
MERGING = "_merge_probabilities_with_alignment_groups"
CELLS = ("target", "sft", "kd", "semalign", "gold", "gold-corrected", "uld", "equal", "gold-hybrid", "sft-source")
FIGURES = {
    "kl": "KL per position",
    "kl_per_byte": "KL per byte",
    "loss": "answer loss per token",
    "bits_per_byte": "bits per byte",
}
Cell = dict[str, Any]


class Run:
    """A recipe with its rows: trainers for its cells, in folders below one."""

    def __init__(self, path: str, overrides: list[str], root: Path) -> None:
        self.path, self.overrides, self.root = path, overrides, root
        self.recipe, self.tokenizer, self.data = self._read()

    def _read(self, *changes: str) -> tuple[Recipe, Any, TaskData]:
        recipe = load_recipe(self.path, [*self.overrides, f"output_dir={self.root}", *changes])
        return recipe, load_tokenizer(recipe), recipe.data.load()

    def trainer(self, method: str, folder: Path, recipe: Recipe | None = None, data: TaskData | None = None) -> TransferTrainer:
        """One of our trainers; all of them find the source's signals in one place."""
        recipe, data = recipe or self.recipe, data or self.data
        args = recipe.config(folder, method, signals_dir=str(signals_root(recipe.config(self.root))), save_strategy="no")
        source = Source(recipe.source, precision=args.mixed_precision, parts=args.source_parts)
        if recipe.data.answers != "dataset":
            (args,) = recipe.rounds(args, len(data.align))
            data, _ = with_answers(recipe, data, source, args, self.tokenizer, folder, {})
        return make_trainer(recipe, method, source, args, data, self.tokenizer)

    def train(self, name: str, folder: Path) -> Cell:
        """One of our methods."""
        if name == "sft-source":
            recipe, _, data = self._read("data.answers=source", "method=sft")
            trainer = self.trainer("sft", folder, recipe, data)
        else:
            trainer = self.trainer(OURS[name], folder)
        trainer.train(resume_from_checkpoint=start_of(trainer.args, None))
        trainer.save_model()
        state = trainer.state
        return {"steps": state.global_step, "used": trainer.known.aligned, "history": state.log_history}

    def train_by_trl(self, name: str, folder: Path) -> Cell:
        """One of TRL's."""
        model = self.trainer("kd", folder)
        args, rows = model.args, batch_order(model)
        encoded, asked = model.known.splits["align"], self.data.align
        if len(encoded) != len(asked):
            raise ValueError(f"{len(asked) - len(encoded)} rows cannot be aligned: TRL would train on other rows than we do.")
        del model
        target = load_model(resolve_model(self.recipe.target), precision=args.mixed_precision)
        source = load_model(resolve_model(self.recipe.source), precision=args.mixed_precision)
        settings = rivals._settings(args) | {"num_train_epochs": 1, "save_strategy": "no", "report_to": []}
        small = math.gcd(ROWS, args.per_device_train_batch_size)
        settings["gradient_accumulation_steps"] = args.per_device_train_batch_size * args.gradient_accumulation_steps // small
        settings["per_device_train_batch_size"] = small
        trainer = InOrder(
            model=target,
            teacher_model=Remembering(source, self.root / "_source_states.pt"),
            args=GOLDConfig(
                **settings,
                max_length=args.max_length,
                lmbda=0.0,
                use_uld_loss=True,
                **TRLS[name],
            ),
            train_dataset=Dataset.from_list([dict(asked[row]) for row in rows]),
            processing_class=self.tokenizer,
            peft_config=rivals._lora(target, args),
        )
        if trainer.train_dataset["input_ids"] != [encoded[row]["input_ids"] for row in rows]:
            raise ValueError("TRL reads the rows as other tokens than we do.")
        with mock.patch.object(torch.Tensor, "sort", sort), mock.patch.object(ULDLoss, MERGING, merge):
            trainer.train()
        trainer.save_model(str(folder))
        trainer.teacher_model.keep()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {"steps": trainer.state.global_step, "options": TRLS[name], "history": history}

    def measure(self, folder: Path | None) -> Cell:
        """The figures of an adapter, or of the target."""
        trainer = self.trainer("kd", self.root / "_evaluation")
        if folder is not None:
            found: Any = set_peft_model_state_dict(trainer.model, load_file(folder / SAFETENSORS_WEIGHTS_NAME))
            if found.unexpected_keys or any("lora_" in key for key in found.missing_keys):
                raise ValueError(f"The adapter in {folder} has other modules than ours.")
        metrics = trainer.evaluate()
        return {key: metrics[f"eval_{key}"] for key in FIGURES}

    def cell(self, name: str) -> Cell:
        """Train what is not there yet, and measure."""
        folder, seconds = self.root / name, {}
        folder.mkdir(parents=True, exist_ok=True)
        where = {"date": date.today().isoformat(), "device": device_name(torch.device("cpu"))}
        runs = sorted(self.root.glob("*/results.json")) if name == "target" else [folder / "results.json"]
        if runs and runs[0].is_file():
            results = json.loads(runs[0].read_text())
            figures = {key: results["metrics"][OURS.get(name, name)][key] for key in FIGURES}
            facts = {} if name == "target" else {key: results[key] for key in ("steps", "history", "seconds")}
            return {**figures, **facts, **where, "date": results["date"]}
        facts = {}
        if name != "target" and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            with timed("training", seconds), equal_classes(name == "equal"):
                facts = self.train(name, folder) if name in OURS else self.train_by_trl(name, folder)
        gc.collect()
        with timed("evaluation", seconds):
            figures = self.measure(None if name == "target" else folder)
        return {**figures, **facts, "seconds": seconds, **where}


class InOrder(GOLDTrainer):
    """GOLD on rows as they come, and a micro-batch as long as its own longest row."""

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        sampler.shuffle = False
        return sampler

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        first = int(inputs["attention_mask"].any(0).int().argmax())  # rows are padded on the left
        long = ("input_ids", "attention_mask", "labels", "byte_offsets")
        return {name: value[:, first:] if name in long else value for name, value in inputs.items()}

    def compute_loss(self, model, inputs, *args, **kwargs):
        """TRL's, and the source makes no logits of what all prompts begin with."""
        prompts = self.teacher_tokenizer(inputs["original_prompt_text"])["input_ids"]
        self.teacher_model.unread = min(map(len, prompts)) - 1
        return super().compute_loss(model, inputs, *args, **kwargs)


class Remembering(nn.Module):
    """A source that runs over each row once: later its final states are read, and its head gives the logits.

    Args:
        model: the source.
        place: a file for the states of all rows.
    """

    def __init__(self, model: PreTrainedModel, place: Path) -> None:
        super().__init__()
        self.model, self.config, self.place = model, model.config, place
        self.known: dict[tuple[int, ...], torch.Tensor] = torch.load(place, weights_only=True) if place.is_file() else {}
        self.begun_with, self.unread = len(self.known), 0

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> CausalLMOutput:
        """Logits of rows that are padded on the right; none at the first positions, ``unread``, before all answers."""
        keys = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        if any(key not in self.known for key in keys):
            states = self.model.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
            self.known |= {key: row[: len(key)].clone() for key, row in zip(keys, states, strict=True)}
        states = nn.utils.rnn.pad_sequence([self.known[key] for key in keys], batch_first=True)
        head = self.model.get_output_embeddings()
        logits = states.new_zeros(*states.shape[:2], len(head.weight))
        logits[:, self.unread :] = head(states[:, self.unread :])
        return CausalLMOutput(logits=logits)

    def keep(self) -> None:
        """Write what is known for the cells to come."""
        if len(self.known) > self.begun_with:
            torch.save(self.known, self.place)


def sort(values: torch.Tensor, dim: int = -1, descending: bool = True) -> Any:
    """``Tensor.sort`` of probabilities along their last axis, the largest first; positive floats sort as their bits do."""
    assert dim == -1 and descending and values.dtype == torch.float32
    known = values.detach().contiguous().numpy()
    if not values.requires_grad:
        return SimpleNamespace(values=torch.from_numpy(np.sort(known, axis=-1)).flip(-1))
    return SimpleNamespace(values=values.gather(-1, torch.from_numpy(np.argsort(known.view(np.int32), axis=-1)).flip(-1)))


def merge(loss: ULDLoss, probs: torch.Tensor, groups: list[list[int]], token_ids: list[int]) -> torch.Tensor:
    """What TRL's method gives: of each span a distribution, times the probabilities of its other tokens."""
    last = loss.token_merge_strategy == "bayesian"
    own = probs[range(len(token_ids)), token_ids].clamp_min(1e-8)
    factors = [own[group[:-1] if last else group[1:]].prod() for group in groups]
    return probs[[group[-1 if last else 0] for group in groups]] * torch.stack(factors)[:, None]


def batch_order(trainer: TransferTrainer) -> list[int]:
    """Numbers of the rows that a trainer learns from, step after step, those of a step by length."""
    rows = trainer.known.splits["align"]
    numbers, lengths = {example: row for row, example in enumerate(rows["example_id"])}, [len(ids) for ids in rows["input_ids"]]
    set_seed(trainer.args.seed)  # as train() does
    loader, order = trainer.get_train_dataloader(), []
    for epoch in range(int(trainer.args.num_train_epochs)):
        loader.set_epoch(epoch)
        order += [numbers[example] for batch in loader for example in batch["example_id"].tolist()]
    size = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    return [row for step in range(0, len(order), size) for row in sorted(order[step : step + size], key=lengths.__getitem__)]


def equal_classes(wanted: bool) -> Any:
    """Inside it classes of tokens are of equal tokens alone, if wanted."""
    if not wanted:
        return nullcontext()
    return mock.patch.object(
        prefix_classes, "_led_to", lambda keys, other, own, shared: [k if k in shared else None for k in keys]
    )


def table(cells: dict[str, Cell]) -> str:
    """Markdown, a line a cell."""
    lines = [f"| | {' | '.join(FIGURES.values())} |", "|---" * (1 + len(FIGURES)) + "|"]
    for name in sorted(cells, key=CELLS.index):
        lines.append(f"| {name} | {' | '.join(f'{cells[name][key]:.3f}' for key in FIGURES)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the cells, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("cells", nargs="*", choices=[[], *CELLS], default=[], help="by default all")
    parser.add_argument("--set", nargs="*", default=[], help="changes to the recipe")
    options = parser.parse_args()
    run: Run | None = None
    for name in options.cells or CELLS:
        path = options.folder / name / "cell.json"
        if not path.is_file():
            run = run or Run(options.recipe, options.set, options.folder)
            start = time.perf_counter()
            found = run.cell(name)
            path.write_text(json.dumps(found | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}, indent=1))
            print(name, f"{time.perf_counter() - start:.0f} s", flush=True)
    paths = {name: options.folder / name / "cell.json" for name in CELLS}
    cells = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    recipe = load_recipe(options.recipe, options.set)
    training = {name: value for name, value in recipe.training.items() if name != "signals_dir"}
    pair = {"source": Path(recipe.source).name, "target": Path(recipe.target).name, "training": training}
    (options.folder / "table.json").write_text(json.dumps({**pair, "cells": cells}, indent=1) + "\n")
    (options.folder / "table.md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
