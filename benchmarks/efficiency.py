"""What a step costs: SemAlign with cached and online signals beside TRL's GKD (lmbda 0), in tokens per second and peak memory.

    OMP_NUM_THREADS=2 python benchmarks/efficiency.py [--cases pair vocabulary32k depth length vocabulary] [--repeats 5]

Random weights, float32, two threads; every measurement in a process of its own, methods in turn. The clock runs from the
trainer's construction, with the pass of the source in it, to the end of ``train()``. Prints Markdown tables, and writes them
with all numbers to ``benchmarks/results/efficiency.{md,json}`` after each case, and the curves to
``docs/images/efficiency.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from efficiency_report import CASES, CURVES, IMAGE, METHODS, RESULTS, table, write

Spec = dict[str, Any]
PAIR: Spec = {  # models are layers, width, heads
    "source": (18, 448, 7), "target": (12, 320, 5), "vocabulary": 2048, "length": 160, "valid": 96, "batch": 8, "sequences": 64,
}  # fmt: skip
TINY: Spec = {
    "source": (3, 64, 2), "target": (2, 32, 1), "length": 32, "valid": 16, "batch": 2, "sequences": 2, "gkd_steps": 2,
    "threads": 1,
}  # fmt: skip


def cases(extrapolate: bool) -> dict[str, list[Spec]]:
    """Measurements by case, all over 5 epochs but for ``pair``'s 20; ``x`` is what the case varies.

    ``steps`` are optimizer steps; GKD's, which cost the same all along, may be fewer (``gkd_steps``).

    Args:
        extrapolate: GKD and online signals run over 5 epochs alone, and 20 follow from their steps.
    """
    short, long = {**PAIR, "x": 5, "steps": 40}, {**PAIR, "x": 20, "steps": 160}
    pair = [*_each([{**short, "extrapolate": 160}]), {**long, "method": "cached"}] if extrapolate else _each([short, long])
    large = {**PAIR, "x": 32768, "vocabulary": 32768, "sequences": 24, "steps": 15, "gkd_steps": 4}
    deep = {**PAIR, "batch": 4, "sequences": 32, "steps": 40, "gkd_steps": 8}
    long_rows = {**PAIR, "source": (6, 192, 3), "target": (4, 128, 2), "batch": 2, "sequences": 4, "steps": 10, "gkd_steps": 5}
    half = {**PAIR, "source": (9, 448, 7), "target": (6, 320, 5), "batch": 4, "sequences": 12, "steps": 15, "gkd_steps": 4}
    return {
        "pair": pair,
        "vocabulary32k": _each([large]),
        "depth": _each({**deep, "x": n, "source": (3 * n // 2, 192, 3), "target": (n, 128, 2)} for n in (8, 16, 32)),
        "length": _each({**long_rows, "x": n, "length": n, "valid": n * 6 // 10} for n in (256, 1024, 4096)),
        "vocabulary": _each({**half, "x": n, "vocabulary": n} for n in (2048, 32768, 151936)),
    }


def _each(specs: Iterable[Spec]) -> list[Spec]:
    return [{**spec, "method": method} for spec in specs for method in METHODS]


def smoke(spec: Spec) -> Spec:
    """The same measurement of next to nothing."""
    longer = {"extrapolate": 20} if "extrapolate" in spec else {}
    return {**spec, **TINY, "vocabulary": 256, "steps": 20 if spec["steps"] == 160 else 5, **longer}


def measure(spec: Spec) -> dict[str, Any]:
    """One schedule of one method, in this process.

    Returns:
        Seconds of the schedule, of the trainer's construction, of the source's pass in it, of each step, of their median by
        stage, and between steps; tokens seen; memory in MB.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from hf_semalign import FrontierSchedule, SemAlignConfig, SemAlignTrainer
    from hf_semalign.splits import Collator, encode

    class Clock(TrainerCallback):
        """When each optimizer step begins and ends; it stands before the callbacks that a trainer adds itself."""

        def __init__(self) -> None:
            self.begins: list[float] = []
            self.ends: list[float] = []

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            """Keep the time."""
            self.begins.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs) -> None:
            """Keep the time."""
            self.ends.append(time.perf_counter())

    def llama(layers: int, width: int, heads: int) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=spec["vocabulary"], hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=round(2.75 * width / 16) * 16, max_position_embeddings=spec["length"], pad_token_id=0,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    torch.set_num_threads(spec.get("threads", 2))
    torch.manual_seed(0)
    draw, prompt = random.Random(0), spec["length"] - spec["valid"]
    ids = [[draw.randrange(3, spec["vocabulary"]) for _ in range(spec["length"])] for _ in range(spec["sequences"])]
    rows = [{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in ids]
    source, target, clock = llama(*spec["source"]), llama(*spec["target"]), Clock()
    if gkd := spec["method"] == "gkd":
        from rivals import gkd_trainer

        encoded = encode(rows, None, split="align")
    stages = 1 if gkd else spec["target"][0]
    steps: int = spec["gkd_steps"] if gkd and "gkd_steps" in spec else spec["steps"]
    with tempfile.TemporaryDirectory() as folder:
        args = SemAlignConfig(
            output_dir=folder, num_train_epochs=steps * spec["batch"] / spec["sequences"], pairing="uniform", max_length=None,
            frontier="single", relation_weight=1.0,
            signals="online" if gkd else spec["method"], per_device_train_batch_size=spec["batch"],
            per_device_eval_batch_size=spec["batch"], use_cpu=True, disable_tqdm=True, log_level="error", report_to="none",
            save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        resident, start = _resident_mb(), time.perf_counter()
        if gkd:
            trainer: Any = gkd_trainer(target, source, encoded, Collator(0), args, callbacks=[clock])
        else:
            trainer = SemAlignTrainer(target, source, args, rows, callbacks=[clock])
            trainer.prepare()
        made = time.perf_counter()
        trainer.train()
        end = time.perf_counter()
    seconds = [after - before for before, after in zip(clock.begins, clock.ends, strict=True)]
    schedule, longer = FrontierSchedule(stages, steps), FrontierSchedule(stages, spec.get("extrapolate", steps))
    by_stage = [statistics.median(seconds[slice(*schedule.boundaries[k : k + 2])]) for k in range(stages)]
    further = sum((longer.steps(k) - schedule.steps(k)) * by_stage[k] for k in range(stages))
    return {
        "seconds": end - start, "extrapolated": end - start + further, "construction": made - start,
        "source_pass": getattr(trainer, "seconds", {}).get("source signals", 0.0), "steps": seconds, "by_stage": by_stage,
        "between": clock.ends[-1] - clock.begins[0] - sum(seconds), "tokens": steps * spec["batch"] * spec["length"],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "resident_before_mb": resident,
    }  # fmt: skip


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def in_process(specs: list[Spec]) -> list[dict[str, Any]]:
    """Measure one after another in a fresh process, whose peak memory is the largest so far."""
    command = [sys.executable, "-W", "ignore", __file__, "--worker", json.dumps(specs)]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", **os.environ},
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run the cases, and write tables and figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5, help="processes a method of pair and vocabulary32k")
    parser.add_argument("--curve-repeats", type=int, default=1, help="processes a point of the curves")
    parser.add_argument(
        "--extrapolate", action=argparse.BooleanOptionalAction, default=True, help="20 epochs of online and GKD"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny models in one process, into runs/efficiency-smoke")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print("\n" + json.dumps([measure(spec) for spec in options.worker]))
        return
    specs = {case: content for case, content in cases(options.extrapolate).items() if case in options.cases}
    folder, image = RESULTS, IMAGE
    if options.smoke:
        folder = Path("runs/efficiency-smoke")
        image = folder / IMAGE.name
        specs = {case: [smoke(spec) for spec in content] for case, content in specs.items()}
        measured = iter(in_process([spec for content in specs.values() for spec in content]))
    numbers = folder / "efficiency.json"
    results = json.loads(numbers.read_text()) if numbers.is_file() and not options.smoke else {}
    machine: dict[str, Any] = {"platform": platform.platform(), "cpus": os.cpu_count()}
    machine |= {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    for case, content in specs.items():
        runs = []
        for repeat in range(1 if options.smoke else options.curve_repeats if case in CURVES else options.repeats):
            first = repeat % len(content)
            for spec in content[first:] + content[:first]:
                runs.append({"spec": spec, "result": next(measured) if options.smoke else in_process([spec])[0]})
                seconds = runs[-1]["result"]["seconds"]
                print(f"{case} {repeat + 1}: {METHODS[spec['method']]}, {spec['x']:,}: {seconds:.1f} s", flush=True)
        results[case] = {"machine": machine, "runs": runs}
        write(results, folder, image)
        print(f"\n{table(case, runs)}\n", flush=True)


if __name__ == "__main__":
    main()
