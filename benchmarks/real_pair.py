"""Speed on a pair of real models: optimizer steps of distillation and an evaluation, in seconds a row, and peak memory.

    python benchmarks/real_pair.py SOURCE TARGET MBPP.jsonl [--rows 16 --batch 4 --steps 1 --bf16]

SOURCE and TARGET are folders or Hub ids of models with one tokenizer. Run nothing beside it. The source's states are kept in
``runs/real-pair``, where the next run finds them; the table does not count their pass.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from hf_semalign import SemAlignConfig
from hf_semalign.experiments.baselines.kd import KDTrainer
from hf_semalign.experiments.tasks import load_task
from hf_semalign.models.loading import find_tokenizer

FOLDER = Path("runs/real-pair")
EVALUATED = 8


def measure(options: argparse.Namespace) -> dict[str, float | str]:
    """Train and evaluate once."""
    rows = load_task("mbpp", extract=1, align=options.rows * options.steps, eval=EVALUATED, files={"train": options.mbpp})
    args = SemAlignConfig(
        **KDTrainer.settings, output_dir=str(FOLDER / "run"), signals_dir=str(FOLDER / "signals"), max_steps=options.steps,
        per_device_train_batch_size=options.batch, gradient_accumulation_steps=options.rows // options.batch,
        per_device_eval_batch_size=EVALUATED, bf16=options.bf16, use_cpu=not torch.accelerator.is_available(),
        report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no", max_length=512,
    )  # fmt: skip
    trainer = KDTrainer(
        options.target,
        options.source,
        args,
        rows.align,
        eval_dataset=rows.eval,
        processing_class=find_tokenizer(options.target),
    )
    trainer.prepare()
    seconds = {}
    for name, work, count in (
        ("training", trainer.train, options.rows * options.steps),
        ("evaluation", trainer.evaluate, EVALUATED),
    ):
        start = time.perf_counter()
        work()
        seconds[f"{name}, s a row"] = round((time.perf_counter() - start) / count, 2)
    return {
        "dtype": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        "batch": options.batch,
        **seconds,
        "peak memory, MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
    }


def main() -> None:
    """Print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("mbpp", help="MBPP's rows, as their authors publish them")
    parser.add_argument("--rows", type=int, default=16, help="of an optimizer step")
    parser.add_argument("--batch", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    disable_progress_bar()
    found = measure(parser.parse_args())
    print(f"| {' | '.join(found)} |\n|{'---|' * len(found)}\n| {' | '.join(map(str, found.values()))} |\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
