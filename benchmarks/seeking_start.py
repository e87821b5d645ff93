"""Why Seeking is ahead on the embedded pair: its start without the source's weights, and its start under SemAlign's loss.

    OMP_NUM_THREADS=1 python benchmarks/seeking_start.py

Each trial is recipes/quickstart/two_skills.yaml with one thing done otherwise, over seeds 1, 2 and 3:

- ``Seeking``: LoRA starts from windows of the source's weights, fine-tuning on the answers;
- ``random start``: the same singular values with random directions in their place, so that nothing of the source is in it;
- ``SemAlign``, and the same from either start.

Prints a Markdown table and writes it with all numbers to ``benchmarks/results/seeking_start.{md,json}``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from hf_semalign import SemAlignTrainer
from hf_semalign.experiments.baselines.seeking import SeekingTrainer
from hf_semalign.experiments.baselines.sft import SFTTrainer
from hf_semalign.experiments.evaluation import exact_match
from hf_semalign.experiments.recipe import load_recipe, load_tokenizer
from hf_semalign.models.names import resolve_model

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart" / "two_skills.yaml"
RESULTS = Path(__file__).parent / "results"


class RandomStart(SeekingTrainer):
    """Seeking with random directions: ``B0 = U S`` and ``A0 = V^T`` of the window's ``S`` and orthonormal ``U`` and ``V``."""

    def _start(self) -> float:
        generator = torch.Generator().manual_seed(self.args.seed)
        for factors in self.extraction.factors:
            for path, (down, up) in factors.items():
                left, right = (torch.linalg.qr(torch.randn(one.shape, generator=generator))[0] for one in (up, down.T))
                factors[path] = (right.T.contiguous(), left * up.norm(dim=0))
        return super()._start()


class SemAlignFromSeeking(SeekingTrainer):
    """SemAlign's losses from Seeking's start."""

    settings = {}


class SemAlignFromRandom(RandomStart):
    """SemAlign's losses from the random start."""

    settings = {}


TRIALS: dict[str, type[SemAlignTrainer]] = {
    "Fine-tuning": SFTTrainer,
    "Seeking": SeekingTrainer,
    "Seeking, random start": RandomStart,
    "SemAlign": SemAlignTrainer,
    "SemAlign from Seeking's start": SemAlignFromSeeking,
    "SemAlign from the random start": SemAlignFromRandom,
}


def run(trainer_class: type[SemAlignTrainer], seed: int, folder: Path, overrides: list[str]) -> dict[str, float]:
    """One run: KL, answer loss and exact match on the held-out rows."""
    recipe = load_recipe(RECIPE, overrides)
    settings = {**recipe.training, "seed": seed, "signals_dir": str(folder / "_signals"), "disable_tqdm": True}
    args = recipe.config(folder / f"{trainer_class.__name__}-{seed}", **{**settings, **trainer_class.settings})
    data, tokenizer = recipe.data.load(), load_tokenizer(recipe)
    trainer = trainer_class(
        resolve_model(recipe.target),
        resolve_model(recipe.source),
        args,
        data.align,
        eval_dataset=data.eval,
        extract_dataset=data.extract,
        processing_class=tokenizer,
    )
    trainer.train()
    found, right = trainer.evaluate(), exact_match(trainer.model, tokenizer, data.eval)
    return {"kl": found["eval_kl"], "loss": found["eval_loss"], "score": statistics.mean(right.values())}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Means and standard deviations, as Markdown."""
    lines = ["| | score % | KL | answer loss |", "|---|--:|--:|--:|"]
    for name, runs in results.items():
        cells = []
        for key, factor, decimals in (("score", 100, 1), ("kl", 1, 3), ("loss", 1, 3)):
            values = [factor * one[key] for one in runs]
            spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{decimals}f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run all trials."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one seed and next to no training, into runs/seeking_start-smoke")
    options = parser.parse_args()
    folder = Path("runs/seeking_start-smoke" if options.smoke else "runs/seeking_start")
    home = folder if options.smoke else RESULTS
    overrides = ["training.max_steps=4", "data.align=64", "data.eval=8", "data.extract=4"] if options.smoke else []
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in TRIALS}
    for seed in (1,) if options.smoke else (1, 2, 3):
        for name, trainer_class in TRIALS.items():
            results[name].append(run(trainer_class, seed, folder, overrides))
        print(f"{table(results)}\n", flush=True)
    facts = {"recipe": RECIPE.name, "platform": platform.platform(), "results": results}
    (home / "seeking_start.json").write_text(json.dumps(facts, indent=1))
    (home / "seeking_start.md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
