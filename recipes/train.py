"""Run a recipe under accelerate; the same as ``semalign train`` with these arguments.

accelerate launch recipes/train.py --config recipes/quickstart/semalign.yaml training.seed=2
"""

import sys

from hf_semalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
