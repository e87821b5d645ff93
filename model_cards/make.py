"""Run the embedded recipes of the cards in this folder, and keep of each run what its card is made of: five minutes.

python model_cards/make.py
"""

import shutil
from pathlib import Path

from hf_semalign.cli import main

HERE = Path(__file__).parent
RUNS = {"quickstart": [], "seeking": ["method=seeking"]}
KEPT = ("README.md", "semalign.json", "results.json", "figures/*.png")

if __name__ == "__main__":
    for name, changes in RUNS.items():
        run = Path("runs/cards") / name
        if main(["quickstart", f"output_dir={run}", *changes]) != 0:
            raise SystemExit(f"{name} was refused")
        shutil.rmtree(HERE / name, ignore_errors=True)
        for path in (path for pattern in KEPT for path in run.glob(pattern)):
            place = HERE / name / path.relative_to(run)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
