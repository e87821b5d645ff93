"""The embedded pair at equal wall time: SemAlign, TRL's GKD (lmbda 0) and TRL's SFT, over three seeds.

    OMP_NUM_THREADS=1 python benchmarks/wall_time.py [--seconds 60]

Every method gets the seconds that training may take, from the trainer's construction (SemAlign's attribution, map and signals
in it) to the end of ``train()``; loading and evaluation are not counted. A schedule needs its length beforehand: a short run
gives seconds a step, a rehearsal at the length that follows corrects them, and only then the counted runs begin. Learning
rate, warmup, batches, LoRA and optimizer are the quickstart's for all. Prints a Markdown table, and writes it with all numbers
to ``benchmarks/results/wall_time.{md,json}`` after each seed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ablation import RECIPE, RESULTS, SEEDS, spread
from datasets import Dataset
from rivals import gkd_trainer, sft_trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from transformers.utils.logging import disable_progress_bar

from hf_semalign import SemAlignTrainer
from hf_semalign.experiments.evaluation import exact_match
from hf_semalign.experiments.recipe import Recipe, load_recipe
from hf_semalign.experiments.tasks import TaskData
from hf_semalign.method.losses import token_kl
from hf_semalign.models.anatomy import CausalLM, dissect
from hf_semalign.models.names import resolve_model
from hf_semalign.splits import Collator, encode, valid_positions

METHODS: dict[str, dict[str, Any]] = {  # what differs from the recipe's settings
    "SemAlign, quickstart (joint)": {},
    "SemAlign, the paper's frontier (single)": {"frontier": "single"},
    "GKD, lmbda 0": {},
    "SFT": {},
}
SHORT = 60


@dataclass
class Bench:
    """What all runs share.

    Attributes:
        recipe: the quickstart's.
        data: its records.
        tokenizer: that of both models.
        rows: the records of each split as token ids.
        source: the source, for evaluation.
    """

    recipe: Recipe
    data: TaskData
    tokenizer: PreTrainedTokenizerBase
    rows: dict[str, Dataset]
    source: PreTrainedModel

    @classmethod
    def load(cls, recipe: Recipe) -> Bench:
        """Data, tokenizer and source of a recipe."""
        data = recipe.data.load()
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(recipe.target))
        splits = {"extract": data.extract, "align": data.align, "eval": data.eval}
        rows = {name: encode(split, tokenizer, split=name) for name, split in splits.items()}
        return cls(recipe, data, tokenizer, rows, _load(recipe.source))

    def train(self, method: str, steps: int, seed: int) -> tuple[Any, float, float]:
        """Train the target with one method.

        Returns:
            The trained model, and the seconds of construction and of training.
        """
        source, target = _load(self.recipe.source), _load(self.recipe.target)
        collator = Collator(self.tokenizer.pad_token_id)
        changes = {"max_steps": steps, "seed": seed, "disable_tqdm": True, "logging_strategy": "no", "log_level": "error"}
        with tempfile.TemporaryDirectory() as folder:
            args = self.recipe.config(Path(folder), **{**changes, **METHODS[method]})
            start = time.perf_counter()
            trainer: Any
            if method.startswith("GKD"):
                trainer = gkd_trainer(target, source, self.rows["align"], collator, args, self.tokenizer)
            elif method == "SFT":
                trainer = sft_trainer(target, self.rows["align"], collator, args, self.tokenizer)
            else:
                extract = self.rows["extract"]
                trainer = SemAlignTrainer(
                    target, source, args, self.rows["align"], extract_dataset=extract, processing_class=self.tokenizer
                )
                trainer.prepare()
            trainer.remove_callback(PrinterCallback)
            made = time.perf_counter()
            trainer.train()
            return trainer.model, made - start, time.perf_counter() - made

    def fitting_steps(self, method: str, seconds: float) -> int:
        """Optimizer steps that take so long, by a short run and then a rehearsal of the whole."""
        steps = SHORT
        for _ in range(2):
            _, construction, training = self.train(method, steps, SEEDS[0])
            print(f"{method}: {steps} steps in {construction:.1f} + {training:.1f} s", flush=True)
            steps = max(10, int(steps * (seconds - construction) / training))
        return steps

    def evaluate(self, model: CausalLM) -> dict[str, Any]:
        """KL(source || model) in nats a token, and exact match by skill, on the eval split."""
        batches = DataLoader(self.rows["eval"], 100, collate_fn=Collator(self.tokenizer.pad_token_id))
        return {
            "kl": mean_kl(model, self.source, batches),
            "exact_match": exact_match(model, self.tokenizer, self.data.eval),
        }


@torch.no_grad()
def mean_kl(model: CausalLM, source: CausalLM, batches: DataLoader) -> float:
    """KL(source || model), mean over all valid positions; both models over one vocabulary."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        valid = valid_positions(batch["labels"])
        states = []
        for anatomy in (dissect(model), dissect(source)):
            hidden = anatomy.decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
            states += [hidden[valid], anatomy.head_weight()]
        losses = token_kl(*states)
        total, count = total + losses.sum().item(), count + len(losses)
    return total / count


def _load(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(resolve_model(name)).eval()


def table(ends: dict[str, dict[str, Any]], runs: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown; mean and standard deviation over seeds.

    Args:
        ends: metrics of the target before, and of the source.
        runs: by method, one entry a seed.
    """
    skills = list(ends["Source"]["exact_match"])
    head = ["", "steps", "seconds", "KL", *(f"{skill} %" for skill in skills)]
    rows = [head, ["---"] * len(head)]
    for name, members in {"Target before": [ends["Target before"]], **runs, "Source": [ends["Source"]]}.items():
        show = spread if len(members) > 1 else lambda values, digits: f"{values[0]:.{digits}f}"
        shares = [show([100 * run["exact_match"][skill] for run in members], 1) for skill in skills]
        work = [f"{members[0]['steps']:,}", show([run["seconds"] for run in members], 1)] if name in runs else ["", ""]
        rows.append([name, *work, show([run["kl"] for run in members], 3), *shares])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Find each method's steps, run all seeds, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--smoke", action="store_true", help="few rows, no calibration, into runs/wall_time-smoke")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    disable_progress_bar()
    small = ["data.align=128", "data.eval=80", "data.extract=8"] if options.smoke else []
    bench = Bench.load(load_recipe(RECIPE, small))
    folder = Path("runs/wall_time-smoke") if options.smoke else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    ends = {"Target before": bench.evaluate(_load(bench.recipe.target)), "Source": bench.evaluate(bench.source)}
    if options.smoke:
        steps = dict.fromkeys(METHODS, 8)
    else:
        bench.train("SFT", 10, SEEDS[0])  # the first run of a process is slower
        steps = {method: bench.fitting_steps(method, options.seconds) for method in METHODS}
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    for turn, seed in enumerate(options.seeds):
        order = list(METHODS)[turn % len(METHODS) :] + list(METHODS)[: turn % len(METHODS)]
        for method in order:
            model, construction, training = bench.train(method, steps[method], seed)
            run = {"seed": seed, "steps": steps[method], "construction": construction, "seconds": construction + training}
            runs[method].append(run | bench.evaluate(model))
            print(f"seed {seed}, {method}: {run['seconds']:.1f} s, KL {runs[method][-1]['kl']:.4f}", flush=True)
        (folder / "wall_time.md").write_text(table(ends, runs) + "\n")
        numbers = {"budget": options.seconds, "machine": machine, "ends": ends, "runs": runs}
        (folder / "wall_time.json").write_text(json.dumps(numbers, indent=1))
    print(table(ends, runs))


if __name__ == "__main__":
    main()
