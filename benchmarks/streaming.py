"""Peak memory of the source's pass against the number of its layers, whole and one layer at a time.

    OMP_NUM_THREADS=1 python benchmarks/streaming.py

Random weights in bfloat16 on the disk, in shards as Hub models have them; every measurement in a process of its own. Peak
memory is the process's largest resident memory (the kernel's ``VmRSS``, sampled every 5 ms) over what it held before: pages of
mapped files count, which is how transformers holds weights on a CPU. Prints a Markdown table, and writes it with
all numbers to ``benchmarks/results/streaming.{md,json}`` and a figure to ``docs/images/streaming.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "streaming.png"
WIDTH, HEADS, VOCABULARY, SEQUENCES, LENGTH = 1024, 16, 8192, 8, 48
DEPTHS = (4, 16, 64)


def resident_mb() -> float:
    """Resident memory of this process."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


@contextmanager
def peak_mb(peak: list[float]):
    """Append the largest resident memory inside the block to ``peak``."""
    running, largest = threading.Event(), [resident_mb()]

    def sample() -> None:
        while not running.wait(0.005):
            largest[0] = max(largest[0], resident_mb())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        running.set()
        thread.join()
        peak.append(largest[0])


def measure(folder: str, stream: bool) -> dict[str, Any]:
    """The pass of one source over the data, in this process."""
    import torch
    from safetensors.torch import load_file

    from hf_semalign import LayerPairing, SemanticMap, SourceSignals
    from hf_semalign.cache.source import Source
    from hf_semalign.splits import Collator, encode

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (SEQUENCES, LENGTH), generator=generator).tolist()
    data = encode([{"input_ids": row, "labels": [-100] * 32 + row[32:]} for row in ids], None, split="align")
    source = Source(folder)
    layers = tuple(source.num_layers * (k + 1) // 4 - 1 for k in range(4))
    target_head = load_file(Path(folder) / "target_head.safetensors")["head"]
    with tempfile.TemporaryDirectory() as root:
        semantic_map = SemanticMap.from_heads(source.head().weight, target_head).float()
        pairing = LayerPairing(layers, source.num_layers, "explicit")
        signals = SourceSignals(
            source, pairing, semantic_map, data, Path(root), Collator(0), batch_size=4, stream=stream, progress=False
        )
        before, peak = resident_mb(), []
        start = time.perf_counter()
        with peak_mb(peak):
            signals.prepare(range(4))
        return {"mb": peak[0] - before, "seconds": time.perf_counter() - start}


def make_source(depth: int, folder: Path) -> float:
    """Write a source of so many layers; returns the size of its weights in MB."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2816, num_hidden_layers=depth, num_attention_heads=HEADS,
        dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder, max_shard_size="200MB")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    save_file({"head": torch.randn(VOCABULARY, 256)}, folder / "target_head.safetensors")
    return size


def draw(rows: list[dict[str, Any]]) -> None:
    """Peak memory against layers."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from hf_semalign.experiments.figures import BASELINE_COLOURS, BLUE, STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.subplots()
        depths = [row["layers"] for row in rows]
        for key, label, colour, style in (
            ("whole", "whole in memory", BASELINE_COLOURS[0], "^-."), ("stream", "one layer at a time", BLUE, "o-"),
        ):  # fmt: skip
            axes.plot(depths, [row[key]["mb"] for row in rows], style, color=colour, label=label, clip_on=False)
        axes.set(xlabel="source layers", ylabel="peak memory of the pass (MB)", ylim=(0, None), xticks=depths)
        axes.legend()
        IMAGE.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(IMAGE, dpi=150)


def main() -> None:
    """Measure all depths, and write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker[0], options.worker[1] == "stream")))
        return
    rows = []
    for depth in DEPTHS:
        with tempfile.TemporaryDirectory() as folder:
            row: dict[str, Any] = {"layers": depth, "weights": make_source(depth, Path(folder))}
            for kind in ("whole", "stream"):
                command = [sys.executable, "-W", "ignore", __file__, "--worker", folder, kind]
                runs = [
                    json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
                    for _ in range(options.repeats)
                ]
                row[kind] = {key: statistics.median(run[key] for run in runs) for key in ("mb", "seconds")} | {"runs": runs}
            rows.append(row)
            print(depth, row["whole"]["mb"], row["stream"]["mb"], flush=True)
    head = "| source layers | weights, MB | whole: peak MB | seconds | one layer at a time: peak MB | seconds |"
    lines = [head, "|---" * 6 + "|"]
    for row in rows:
        cells = [f"{row[kind]['mb']:.0f} | {row[kind]['seconds']:.1f}" for kind in ("whole", "stream")]
        lines.append(f"| {row['layers']} | {row['weights']:.0f} | {' | '.join(cells)} |")
    table = "\n".join([*lines, "", f"Medians of {options.repeats} processes. {platform.platform()}, {os.cpu_count()} cores."])
    print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "streaming.md").write_text(table + "\n")
    (RESULTS / "streaming.json").write_text(json.dumps(rows, indent=1))
    draw(rows)


if __name__ == "__main__":
    main()
