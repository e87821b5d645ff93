"""Time and memory under load: many examples, long sequences, a large vocabulary, deep models.

    OMP_NUM_THREADS=1 python benchmarks/load.py [--cases examples length vocabulary depth streaming] [--repeats 3]

Tiny models with random weights, float32, one thread. Every phase runs in a process of its own, which finds what came before it
on the disk; ``depth`` and ``streaming``, which are about time, run in one. Memory is the largest that the process held during a
phase, sampled every 5 ms, over what it held at the phase's start: the kernel's ``RssAnon``, which leaves out pages of mapped
files, and ``VmRSS``, which counts those that happen to be in memory. Times are the process's own CPU seconds, which others on
the machine disturb least; wall seconds stand in the numbers. Prints Markdown tables, and writes them with all numbers to
``benchmarks/results/load.{md,json}`` after each case.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Spec = dict[str, Any]
Phases = dict[str, dict[str, float]]
SHORT: Spec = {"source": (4, 24), "target": (3, 16), "vocabulary": 97, "length": 12, "valid": 6, "batch": 32, "steps": 90}
LONG: Spec = {"source": (3, 64), "target": (2, 32), "vocabulary": 512, "valid": 2048, "batch": 2, "steps": 12, "examples": 8}
WIDE: Spec = {"source": (3, 32), "target": (2, 16), "length": 64, "valid": 32, "batch": 4, "steps": 6, "examples": 12}
DEEP: Spec = {"vocabulary": 97, "length": 12, "valid": 6, "batch": 4, "examples": 32}
FRONTIERS = ("single", "cumulative", "joint")


def cases(smoke: bool) -> dict[str, list[Spec]]:
    """Measurements by case; ``x`` is what the case varies."""
    counts, lengths, vocabularies = (1_000, 10_000, 100_000), (256, 1024, 4096), (32_000, 256_000)
    depths, targets = (20, 40, 80), (8, 16, 32)
    if smoke:
        counts, lengths, vocabularies, depths, targets = (40, 80), (16, 32), (100, 200), (3, 4), (2, 3)
    pairs = [*((source, targets[0]) for source in depths), *((depths[-1], target) for target in targets[1:])]
    return {
        "examples": [{**SHORT, "x": n, "examples": n} for n in counts],
        "length": [{**LONG, "x": n, "length": n, "valid": n // 2} for n in lengths],
        "vocabulary": [{**WIDE, "x": n, "vocabulary": n} for n in vocabularies],
        "depth": [
            {**DEEP, "x": f"{s} to {t}, {kind}", "source": (s, 16), "target": (t, 16), "steps": 4 * t, "frontier": kind}
            for s, t in pairs
            for kind in FRONTIERS
        ],
        "streaming": [{**DEEP, "x": n, "source": (n, 16), "target": (targets[0], 16), "examples": 16} for n in depths],
    }


def resident() -> tuple[float, float]:
    """MB of this process: anonymous, and in all."""
    text = Path("/proc/self/status").read_text()
    anon, whole = (int(re.search(rf"{key}:\s+(\d+)", text)[1]) / 1024 for key in ("RssAnon", "VmRSS"))  # type: ignore[index]
    return anon, whole


@contextmanager
def phase(name: str, phases: Phases) -> Iterator[None]:
    """Keep wall time and largest memory of the block, over what the process held before."""
    before, done = resident(), threading.Event()
    largest = list(before)

    def sample() -> None:
        while True:
            largest[:] = map(max, largest, resident())
            if done.wait(0.005):
                return

    thread = threading.Thread(target=sample)
    thread.start()
    start, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - start}
        done.set()
        thread.join()
        largest[:] = map(max, largest, resident())
        anon, whole = (after - at_start for after, at_start in zip(largest, before, strict=True))
        phases[name] = {**seconds, "anon_mb": anon, "rss_mb": whole}


class Bench:
    """Models and data of a spec, and what is measured on them, in this process.

    Args:
        spec: sizes.
        folder: where the phases leave what the next ones find.
    """

    def __init__(self, spec: Spec, folder: Path) -> None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        torch.set_num_threads(1)
        disable_progress_bar()
        self.spec, self.folder, self.phases = spec, folder, Phases()

    def model(self, role: str) -> Any:
        """Source or target, the same in every process."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        layers, width = self.spec[role]
        config = LlamaConfig(
            vocab_size=self.spec["vocabulary"], hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=2, max_position_embeddings=self.spec["length"], pad_token_id=0,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()

    def rows(self) -> Any:
        """Rows of token ids, from the disk."""
        from datasets import load_from_disk

        return load_from_disk(str(self.folder / "rows"))

    def write_rows(self) -> None:
        """Put the rows on the disk, with no more than a few of them in memory."""
        from datasets import Dataset

        draw, prompt = random.Random(0), self.spec["length"] - self.spec["valid"]

        def rows(size: int) -> Iterator[dict[str, list[int]]]:
            for _ in range(size):
                ids = [draw.randrange(3, self.spec["vocabulary"]) for _ in range(self.spec["length"])]
                yield {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}

        for name, size in (("rows", self.spec["examples"]), ("eval", min(100, self.spec["examples"]))):
            made = Dataset.from_generator(rows, gen_kwargs={"size": size}, cache_dir=str(self.folder / "cache"))
            made.save_to_disk(str(self.folder / name))

    def encode(self) -> None:
        """Splits: rows to examples."""
        from hf_semalign.splits import encode

        with phase("encode", self.phases):
            encoded = encode(self.rows(), None, split="align")
        encoded.save_to_disk(str(self.folder / "encoded"))

    def check(self) -> None:
        """What is looked at before training: splits that share no prompt, ids in range, digests, the examples' order."""
        from datasets import load_from_disk

        from hf_semalign.cache.examples import Examples
        from hf_semalign.splits import check_disjoint, check_token_ids, fingerprint

        rows, encoded = self.rows(), self._encoded()
        held_out = load_from_disk(str(self.folder / "eval"))
        with phase("check", self.phases):
            check_disjoint({"align": rows, "eval": held_out})
            check_token_ids({"align": encoded}, {"target": self.spec["vocabulary"]}, None)
            fingerprint(encoded)
            _ = Examples(encoded).digest

    def _encoded(self) -> Any:
        from datasets import load_from_disk

        return load_from_disk(str(self.folder / "encoded"))

    def _signals(self, source: Any, stream: bool = False) -> Any:
        from hf_semalign import SemanticMap, SourceSignals
        from hf_semalign.method.pairing import pair_layers
        from hf_semalign.models.anatomy import dissect
        from hf_semalign.splits import Collator

        semantic_map = SemanticMap.from_heads(source.head().weight, dissect(self.model("target")).head_weight()).float()
        pairing = pair_layers(self.spec["source"][0], self.spec["target"][0], "uniform")
        return SourceSignals(
            source, pairing, semantic_map, self._encoded(), self.folder / "signals", Collator(0), stream=stream,
            batch_size=self.spec["batch"], progress=False,
        )  # fmt: skip

    def signals(self) -> None:
        """The pass of the source."""
        from hf_semalign.cache.source import Source

        source = Source(self.model("source"))
        with phase("signals", self.phases):
            signals = self._signals(source)
            signals.prepare(range(self.spec["target"][0]))
        self.phases["signals"]["disk_mb"] = _size(signals.folder)

    def reading(self) -> None:
        """Batches at random, of signals that are there, as an epoch of training would read them."""
        from hf_semalign.cache.source import Source
        from hf_semalign.splits import Collator

        signals, draw, layers = self._signals(Source(self.model("source"))), random.Random(0), range(self.spec["target"][0])
        rows, collate, count = signals.examples.dataset, Collator(0), min(10_000, self.spec["examples"])
        with phase("checking", self.phases):
            signals.prepare(layers)
        with phase("reading", self.phases):
            for _ in range(0, count, self.spec["batch"]):
                signals(collate(rows.__getitems__(draw.choices(range(len(rows)), k=self.spec["batch"]))), layers)
        self.phases["reading"]["examples"] = count

    def streaming(self) -> None:
        """Attribution and signals of a source in a folder, one of its layers in memory at a time."""
        from hf_semalign.cache.scores import attribute_streamed
        from hf_semalign.cache.source import Source
        from hf_semalign.splits import Collator

        self.model("source").save_pretrained(self.folder / "source")
        source = Source(str(self.folder / "source"))
        with phase("attribution", self.phases):
            attribute_streamed(source, self._encoded(), Collator(0), self.folder / "signals", progress=False)
        with phase("signals", self.phases):
            self._signals(source, stream=True).prepare(range(self.spec["target"][0]))

    def prefix(self) -> None:
        """The target's inputs, moved from layer to layer."""
        from hf_semalign.cache.examples import Examples
        from hf_semalign.cache.prefix import TargetPrefix
        from hf_semalign.splits import Collator

        model, moves = self.model("target"), self.spec["target"][0] - 1
        with phase("prefix", self.phases):
            prefix = TargetPrefix(model, Examples(self._encoded()), Collator(0), batch_size=self.spec["batch"], progress=False)
            prefix.move(moves)
        self.phases["prefix"] |= {"moves": moves}

    def training(self) -> None:
        """A trainer over all of the data, some steps of every stage, and an evaluation."""
        from datasets import load_from_disk
        from transformers import TrainerCallback

        from hf_semalign import SemAlignConfig, SemAlignTrainer
        from hf_semalign.cache import prefix

        class Clock(TrainerCallback):
            """When each step begins and ends, in CPU seconds."""

            def __init__(self) -> None:
                self.begins: list[float] = []
                self.ends: list[float] = []

            def on_step_begin(self, args, state, control, **kwargs) -> None:
                """Keep the time."""
                self.begins.append(time.process_time())

            def on_step_end(self, args, state, control, **kwargs) -> None:
                """Keep the time."""
                self.ends.append(time.process_time())

        prefix.LEAST_EPOCHS = 0  # so few steps would not get a prefix
        source, target, clock, batch = self.model("source"), self.model("target"), Clock(), self.spec["batch"]
        args = SemAlignConfig(
            output_dir=str(self.folder / "run"), max_steps=self.spec["steps"], pairing="uniform", max_length=None,
            frontier=self.spec.get("frontier", "single"), relation_weight=1.0, signals_dir=str(self.folder / "signals"),
            per_device_train_batch_size=batch, per_device_eval_batch_size=batch, use_cpu=True, disable_tqdm=True,
            log_level="error", report_to="none", save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        held_out = load_from_disk(str(self.folder / "eval"))
        with phase("trainer", self.phases):
            trainer = SemAlignTrainer(target, source, args, self.rows(), held_out, callbacks=[clock])
            trainer.prepare()
        with phase("training", self.phases):
            trainer.train()
        with phase("evaluation", self.phases):
            trainer.evaluate()
        steps = [end - begin for begin, end in zip(clock.begins, clock.ends, strict=True)]
        moves = [begin - end for end, begin in zip(clock.ends, clock.begins[1:], strict=False)]
        stages = trainer.schedule.boundaries
        self.phases["training"] |= {
            "step": statistics.median(steps),
            "stages": len(stages) - 1,
            "move": statistics.median(moves[first - 1] for first in stages[1:-1]) if len(stages) > 2 else 0.0,
        }

    def vocabulary(self) -> None:
        """Map, losses and attribution over a large vocabulary."""
        import torch

        from hf_semalign import SemanticMap
        from hf_semalign.method.attribution import attribute_layers
        from hf_semalign.method.losses import output_kl, token_cross_entropy

        size, positions = self.spec["vocabulary"], self.spec["batch"] * self.spec["valid"]
        heads = [torch.randn(size, self.spec[role][1]) for role in ("source", "target")]
        states = [torch.randn(positions, self.spec[role][1]) for role in ("source", "target")]
        with phase("map", self.phases):
            SemanticMap.from_heads(*heads)
        with phase("KL", self.phases):
            output_kl(states[1].requires_grad_(), heads[1], states[0], heads[0]).backward()
        with phase("cross entropy", self.phases):
            token_cross_entropy(states[1].detach(), heads[1], torch.randint(size, (positions,)))
        ids = torch.randint(size, (self.spec["batch"], self.spec["valid"] + 1))
        batch, source = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, self.model("source")
        with phase("attribution", self.phases):
            attribute_layers(source, [batch])


MEASURES: dict[str, tuple[str, ...]] = {
    "examples": ("encode", "check", "signals", "reading", "prefix", "training"),
    "length": ("encode", "signals", "prefix", "training"),
    "vocabulary": ("vocabulary", "encode", "training"),
    "depth": ("training",),
    "streaming": ("encode", "streaming"),
}


APART = ("examples", "length", "vocabulary")  # cases whose memory is told phase by phase
PER_EXAMPLE = ("encode", "check", "signals", "checking", "reading", "prefix", "trainer")


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6


def measure(names: list[str], spec: Spec, folder: Path) -> Phases:
    """Some measurements of one spec, one after another in this process."""
    bench = Bench(spec, folder)
    for name in names:
        getattr(bench, name)()
    return bench.phases


def in_process(name: str, spec: Spec, folder: Path) -> Phases:
    """One measurement in a fresh process."""
    command = [sys.executable, "-W", "ignore", __file__, "--worker", json.dumps([[name], spec, str(folder)])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def run(case: str, spec: Spec, apart: bool) -> Phases:
    """All phases of one spec, each in a process of its own if they are to be told apart."""
    names = ["write_rows", *MEASURES[case]]
    with tempfile.TemporaryDirectory() as folder:
        if not apart:
            return measure(names, spec, Path(folder))
        return {key: found for name in names for key, found in in_process(name, spec, Path(folder)).items()}


def table(case: str, runs: list[dict[str, Any]]) -> str:
    """Markdown: one row a phase and ``x``, medians over the repeats."""
    columns = [case, "phase", "CPU s", "anonymous MB", "resident MB", "on disk MB"]
    columns += {"examples": ["µs an example"], "depth": ["ms a step", "ms between stages"]}.get(case, [])
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    groups: dict[Any, list[Phases]] = {}
    for one in runs:
        groups.setdefault(one["spec"]["x"], []).append(one["phases"])
    for x, members in groups.items():
        for name in members[0]:
            found = {key: statistics.median(member[name][key] for member in members) for key in members[0][name]}
            cells = [f"{x:,}" if isinstance(x, int) else x, name, f"{found['cpu']:.2f}"]
            cells += [f"{found[key]:.1f}" if key in found else "" for key in ("anon_mb", "rss_mb", "disk_mb")]
            if case == "examples":
                cells.append(f"{1e6 * found['cpu'] / found.get('examples', x):.0f}" if name in PER_EXAMPLE else "")
            elif case == "depth":
                cells += [f"{1e3 * found[key]:.1f}" if key in found else "" for key in ("step", "move")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the cases, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="next to nothing in this process, into runs/load-smoke")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        names, spec, place = options.worker
        print("\n" + json.dumps(measure(names, spec, Path(place))))
        return
    folder = Path("runs/load-smoke") if options.smoke else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    numbers = folder / "load.json"
    results = json.loads(numbers.read_text()) if numbers.is_file() and not options.smoke else {}
    machine: dict[str, Any] = {"platform": platform.platform(), "cpus": os.cpu_count()}
    machine |= {name: version(name) for name in ("torch", "transformers", "datasets", "safetensors")}
    for case in options.cases:
        runs = []
        for _ in range(1 if options.smoke else options.repeats):
            for spec in cases(options.smoke)[case]:
                runs.append({"spec": spec, "phases": run(case, spec, apart=case in APART and not options.smoke)})
                print(case, spec["x"], runs[-1]["phases"], flush=True)
        results[case] = {"machine": machine, "repeats": 1 if options.smoke else options.repeats, "runs": runs}
        numbers.write_text(json.dumps(results, indent=1))
        tables = [
            f"## {name}, medians of {found['repeats']}\n\n{table(name, found['runs'])}" for name, found in results.items()
        ]
        (folder / "load.md").write_text("\n\n".join(tables) + "\n")
        print(f"\n{table(case, runs)}\n", flush=True)


if __name__ == "__main__":
    main()
