"""Ten minutes of random kills: every run of the embedded pair ends with the adapter of one that nothing happened to.

    make soak
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/soak.py --minutes 10 --seed 0

A run is `semalign train` as a user starts it, in a process group of its own, which gets SIGKILL, SIGTERM or SIGINT at a random
moment and is started again with the same command until it is done.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart" / "semalign.yaml"
SETTINGS = [
    "data.align=1024", "data.eval=40", "baselines=[]", "training.max_steps=240", "training.frontier=single",
    "training.pairing=attribution", "training.save_strategy=steps", "training.save_steps=10", "training.save_total_limit=2",
]  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PATIENCE = 300  # seconds that a run may take on a busy machine


def attempt(folder: Path, wait: float | None, sent: signal.Signals | None) -> int:
    """Start the run; after some seconds send a signal to its group, unless it is over. Its exit code."""
    command = [sys.executable, "-m", "hf_semalign.cli", "train", "--config", str(RECIPE), *SETTINGS, f"output_dir={folder}"]
    with folder.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            return process.wait(PATIENCE if wait is None else wait)
        except subprocess.TimeoutExpired:
            if sent is None:
                raise
            os.killpg(process.pid, sent)
            return process.wait(PATIENCE)


def main() -> int:
    """Kill and start again until the time is over; 0 when every run that ended has the adapter of the first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, counts, end = random.Random(options.seed), Counter(), time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        first, start = Path(scratch) / "undisturbed", time.monotonic()
        if attempt(first, None, None) != 0:
            print(first.with_suffix(".log").read_text()[-5000:])
            return 1
        whole, expected = time.monotonic() - start, (first / "adapter_model.safetensors").read_bytes()
        print(f"undisturbed: {whole:.0f} s", flush=True)
        for number in range(10**6):
            folder, code, killed = Path(scratch) / f"run-{number}", None, 0
            while code != 0:
                if time.monotonic() > end:
                    print(f"{counts['ended']} runs ended as the first, after {dict(counts)}", flush=True)
                    return 0 if counts["ended"] else 1
                sent = draw.choice(SIGNALS)
                code = attempt(folder, draw.uniform(0.1, 0.9) * whole, sent)
                if code not in (0, -sent, 128 + sent):
                    print(f"exit code {code} after {sent.name}\n{folder.with_suffix('.log').read_text()[-5000:]}")
                    return 1
                if code != 0:
                    counts[sent.name], killed = counts[sent.name] + 1, killed + 1
            if (folder / "adapter_model.safetensors").read_bytes() != expected:
                print(
                    f"run {number} ended with another adapter after {killed} signals\n{folder.with_suffix('.log').read_text()}"
                )
                return 1
            counts["ended"] += 1
            print(f"run {number}: the same adapter after {killed} signals", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
