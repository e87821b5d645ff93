"""Command line: ``semalign train --config recipes/quickstart/semalign.yaml``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="semalign", description="Knowledge transfer between language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="run a recipe",
        description="Run a recipe: two models to an adapter with card, figures and results.",
        epilog="Example: semalign train --config recipes/quickstart/semalign.yaml training.seed=2",
    )
    train.add_argument("--config", required=True, help="YAML file of the recipe")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as training.seed=2")
    options = parser.parse_args(arguments)
    return _train(options.config, options.overrides)


def _train(config: str, overrides: Sequence[str]) -> int:
    from accelerate import PartialState
    from rich.console import Console

    from hf_semalign.recipe import load_recipe, results_table, run_recipe

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_semalign").setLevel(logging.INFO)
    try:
        recipe = load_recipe(config, overrides)
        recipe.config(Path(recipe.output_dir))  # refuses bad settings
    except (ValueError, FileNotFoundError) as error:
        logging.getLogger("hf_semalign").error("error: %s", error)
        return 2
    results = run_recipe(recipe)
    if PartialState().is_main_process:
        console = Console()
        console.print(results_table(results))
        console.print(f"Run folder: {recipe.output_dir} (adapter, README.md as its card, figures, results.json)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
