"""What the source's pass writes and how long it takes: by schedule, and by the number of processes that share it.

    python benchmarks/signals.py [--repeats 3] [--smoke]

Random weights, float32, one thread a process; the pair of ``benchmarks/efficiency.py`` and its sequences of 160 tokens, 96 of
them answers. ``all rows`` is what ``semalign signals`` writes, and what every run wrote before 2026-11-27. Processes start
together, after the models are made, and share a folder; the time is that of the last. Prints Markdown tables, and writes them
with all numbers to ``benchmarks/results/signals.{md,json}``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAIR = {"source": (18, 448, 7), "target": (12, 320, 5), "vocabulary": 2048, "length": 160, "valid": 96, "batch": 8, "rows": 96}
TINY = {"source": (3, 64, 2), "target": (2, 32, 1), "vocabulary": 256, "length": 32, "valid": 16, "batch": 2, "rows": 16}
SCHEDULES = [("single", 1), ("single", 5), ("single", 20), ("cumulative", 5), ("joint", 5)]


def trainer_of(spec: dict[str, Any], folder: str, frontier: str, epochs: float) -> Any:
    """A trainer of random models that has not run its source yet."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_semalign import SemAlignConfig, SemAlignTrainer
    from hf_semalign.cache import examples

    examples.SHARD_TOKENS = spec["length"] * 2 * spec["batch"]  # 16 shards of a small data set, as a large one has hundreds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = [
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=spec["vocabulary"], hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                intermediate_size=round(2.75 * width / 16) * 16, max_position_embeddings=spec["length"], pad_token_id=0,
            )
        )
        for layers, width, heads in (spec["target"], spec["source"])
    ]  # fmt: skip
    draw, prompt = random.Random(0), spec["length"] - spec["valid"]
    ids = [[draw.randrange(3, spec["vocabulary"]) for _ in range(spec["length"])] for _ in range(spec["rows"])]
    rows = [{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in ids]
    args = SemAlignConfig(
        output_dir=folder, num_train_epochs=epochs, pairing="uniform", max_length=None, frontier=frontier, relation_weight=1.0,
        per_device_train_batch_size=spec["batch"], per_device_eval_batch_size=spec["batch"], use_cpu=True, disable_tqdm=True,
        log_level="error", report_to="none",
    )  # fmt: skip
    return SemAlignTrainer(*models, args, rows)


def written(folder: str) -> float:
    """MB of signals."""
    return sum(path.stat().st_size for path in Path(folder, "_signals").glob("*/*/*/*.safetensors")) / 1e6


def schedule(spec: dict[str, Any], frontier: str, epochs: float) -> dict[str, Any]:
    """What a run writes, and what all rows and layers would be."""
    found: dict[str, Any] = {"frontier": frontier, "epochs": epochs}
    for name in ("run", "all rows"):
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(spec, folder, frontier, epochs)
            _ = trainer.pairing, trainer.objective
            start = time.perf_counter()
            trainer.prepare() if name == "run" else trainer.write_signals()
            found[name] = {"mb": written(folder), "seconds": time.perf_counter() - start}
    return found


def part(spec: dict[str, Any], folder: str, number: int, count: int) -> dict[str, Any]:
    """One of several processes: it waits for the others, and then shares the pass with them."""
    from hf_semalign.cache.signals import Reading

    trainer = trainer_of(spec, str(Path(folder, f"run-{number}")), "joint", 1)
    trainer.args.signals_dir = str(Path(folder, "signals"))
    signals = trainer._cached_signals
    wrote, write = [0], type(signals.training._states).write

    def noted(self: Any, *args: Any) -> None:
        wrote[0] += 1
        write(self, *args)

    type(signals.training._states).write = noted
    Path(folder, f"ready-{number}").touch()
    while len(list(Path(folder).glob("ready-*"))) < count:
        time.sleep(0.01)
    start = time.perf_counter()
    signals.prepare([Reading(range(spec["target"][0]))], (number, count))
    return {"seconds": time.perf_counter() - start, "files": wrote[0]}


def processes(spec: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The pass shared by some processes."""
    with tempfile.TemporaryDirectory() as folder:
        commands = [
            [sys.executable, "-W", "ignore", __file__, "--part", json.dumps([spec, folder, k, count])] for k in range(count)
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = [subprocess.Popen(one, stdout=subprocess.PIPE, text=True, env=environment) for one in commands]
        outputs = [one.communicate()[0] for one in running]
        if any(one.returncode for one in running):
            raise SystemExit("a process failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def tables(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| frontier | epochs | MB of a run | MB of all rows | share | seconds of a run | of all rows |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found["schedules"]:
        run, whole = one["run"], one["all rows"]
        share = f"{run['mb'] / whole['mb']:.0%}"
        figures = f"{run['mb']:.1f} | {whole['mb']:.1f} | {share} | {run['seconds']:.1f} | {whole['seconds']:.1f}"
        lines.append(f"| {one['frontier']} | {one['epochs']} | {figures} |")
    lines += ["", "| processes | seconds of the pass, median (range) | times as fast | files of each |", "|---|---|---|---|"]
    alone = statistics.median(found["processes"]["1"]["seconds"])
    for count, one in found["processes"].items():
        seconds = one["seconds"]
        spread = f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        lines.append(f"| {count} | {spread} | {alone / statistics.median(seconds):.2f} | {', '.join(map(str, one['files']))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="next to nothing, to see that it runs")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(part(*json.loads(options.part))))
        return
    spec = TINY if options.smoke else PAIR
    shared: dict[str, Any] = {}
    for count in (1, 2, 4):
        runs = [processes(spec, count) for _ in range(options.repeats)]
        seconds = [max(one["seconds"] for one in run) for run in runs]
        shared[str(count)] = {"seconds": seconds, "files": [one["files"] for one in runs[-1]]}
    found = {
        "spec": spec, "schedules": [schedule(spec, *one) for one in SCHEDULES], "processes": shared,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch": version("torch")},
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    text = tables(found)
    print(text)
    output = Path("runs/signals-smoke") if options.smoke else RESULTS
    output.mkdir(parents=True, exist_ok=True)
    (output / "signals.md").write_text(text, encoding="utf-8")
    (output / "signals.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
