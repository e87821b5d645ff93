"""Command line: ``semalign train --config recipes/quickstart/semalign.yaml``."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "train": (
        "run a recipe",
        "Run a recipe: two models to an adapter with card, figures and results.",
        "semalign train --config recipes/quickstart/semalign.yaml training.seed=2",
    ),
    "signals": (
        "let the source say what a recipe will need of it",
        "Run the source over a recipe's data and keep what it says, so that training, here or elsewhere, never loads it.",
        "semalign signals --config recipes/quickstart/semalign.yaml training.signals_dir=signals",
    ),
}
COMPARE = (
    "run methods x tasks x seeds into one table and one figure",
    "Run the cells of a comparison that are missing, and write compare.md, .json, .tex and .png into its folder.",
    "semalign compare recipes/quickstart/compare.yaml --jobs 2 seeds=[1]",
)
ANALYSES = {
    "vectors": "how well hidden states are rebuilt from vocabulary bases, layer by layer",
    "cka": "how alike source and target layers are, without and with the map",
    "pairing": "attribution scores and the pairs of layers",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="semalign", description="Knowledge transfer between language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (short, description, example) in COMMANDS.items():
        command = commands.add_parser(name, help=short, description=description, epilog=f"Example: {example}")
        command.add_argument("--config", required=True, help="YAML file of the recipe")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as training.seed=2")
        if name == "train":
            command.add_argument("--dry-run", action="store_true", help="print the plan and its cost; load no weights")
    short, description, example = COMPARE
    compare = commands.add_parser("compare", help=short, description=description, epilog=f"Example: {example}")
    compare.add_argument("comparison", metavar="FILE", help="YAML file of the comparison")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the comparison, or to all its recipes")
    compare.add_argument("--jobs", type=int, default=1, help="cells at a time (default: %(default)s)")
    compare.add_argument("--dry-run", action="store_true", help="print the cells and their cost; load no weights")
    analyze = commands.add_parser(
        "analyze",
        help="look into a pair of models: states as vectors, alikeness of layers, pairing",
        description="Draw one of the analyses of docs/analyses.md, as PNG and SVG, with all numbers as JSON.",
        epilog="Example: semalign analyze cka recipes/quickstart/semalign.yaml data.eval=200",
    )
    analyze.add_argument("analysis", choices=ANALYSES, help="; ".join(f"{name}: {what}" for name, what in ANALYSES.items()))
    analyze.add_argument("origin", metavar="RUN_OR_PAIR", help="a run folder, or the YAML file of a recipe")
    analyze.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as source=FOLDER")
    analyze.add_argument("--output", metavar="DIR", help="folder for the files; by default analysis/ in the run folder")
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a run or a model on MMLU, GSM8K, HumanEval or MBPP",
        description="Measure a run folder, an adapter on the Hub or a model by lm-eval: zero-shot, greedy, with BOS.",
        epilog="Example: semalign evaluate runs/smollm2-360m-to-135m/gsm8k --task gsm8k --task mmlu",
    )
    evaluate.add_argument("origin", metavar="RUN_OR_MODEL", help="a run folder, a Hub id, or a model's folder")
    evaluate.add_argument("--task", action="append", required=True, help="mmlu, gsm8k, humaneval or mbpp; may be repeated")
    evaluate.add_argument("--target", help="Hub id or folder of a run's target, where its record has only a folder's name")
    evaluate.add_argument("--files", metavar="DIR_OR_FILE", help="local test rows instead of the Hub's")
    evaluate.add_argument("--limit", type=int, metavar="N", help="first rows only; of MMLU of each subject")
    evaluate.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at a time (16)")
    evaluate.add_argument("--chat-template", action="store_true", help="prompts as a user's turn of the chat template")
    evaluate.add_argument("--backend", default="hf", help="hf, or vllm")
    evaluate.add_argument("--output", metavar="DIR", help="folder for benchmarks.json; by default the run folder")
    commands.choices["train"].add_argument(
        "--push-to-hub", action="store_true", help="publish the run folder at the end, as training.push_to_hub=true does"
    )
    push = commands.add_parser(
        "push",
        help="publish a run folder",
        description="Publish a run folder on the Hub in one commit, download it again, compare, and tag the commit. What is "
        "there already is not sent again. The token is HF_TOKEN, or the one of `hf auth login`.",
        epilog="Example: semalign push runs/quickstart owner/name --private",
    )
    push.add_argument("folder", metavar="RUN", help="a run folder")
    push.add_argument("repo_id", metavar="REPO_ID", help="owner/name, or name for a repository of your own")
    push.add_argument("--private", action="store_true", help="a new repository is private, and one that exists has to be")
    push.add_argument("--revision", metavar="BRANCH", help="branch, by default main; made if it does not exist")
    push.add_argument("--tag", help="name of the commit, by default of this package's version and the files")
    push.add_argument("--target", metavar="MODEL", help="folder or Hub id of the target, where the record has a bare name")
    inspect = commands.add_parser(
        "inspect",
        help="what an adapter is",
        description="Show which pair of models an adapter comes from, its layers, size and checksums. Of a repository only "
        "metadata are read. Exit code 2 where a checksum is not the recorded one.",
        epilog="Example: semalign inspect owner/name --revision v0.1.0-1a2b3c4d",
    )
    inspect.add_argument("origin", metavar="REPO_OR_FOLDER", help="a Hub id, or a run folder")
    inspect.add_argument("--revision", help="tag, branch or commit of a Hub id")
    options, rest = parser.parse_known_args(arguments)
    if wrong := [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:  # argparse takes positionals in one piece alone, and an option may stand between them
        options.overrides += rest
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_semalign").setLevel(logging.INFO)
    try:
        match options.command:
            case "analyze":
                _analyze(options.analysis, options.origin, options.overrides, options.output)
            case "evaluate":
                _evaluate(options)
            case "compare":
                _compare(options.comparison, options.overrides, options.jobs, options.dry_run)
            case "push":
                _push(options)
            case "inspect":
                _inspect(options.origin, options.revision)
            case "signals":
                _signals(options.config, options.overrides)
            case "train" if options.dry_run:
                _plan(options.config, options.overrides)
            case "train":
                _train(options.config, [*options.overrides, *["training.push_to_hub=true"] * options.push_to_hub])
    except (ValueError, OSError) as error:
        if not _refused(error):
            raise
        logging.getLogger("hf_semalign").error("error: %s", error)
        return 2
    return 0


def _refused(error: Exception) -> bool:
    """Whether a ``raise`` of this package made an error, which says what to do: any other is a bug, and keeps its traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(__file__).parent) and str(last.line).startswith("raise ")


def _analyze(analysis: str, origin: str, overrides: Sequence[str], output: str | None) -> None:
    from rich.console import Console

    from hf_semalign.studies import run_analysis

    path = run_analysis(analysis, origin, overrides, output)
    Console(soft_wrap=True, markup=False).print(f"{path} (with .svg), numbers in {path.parent / analysis}.json")


def _evaluate(options: argparse.Namespace) -> None:
    from rich.console import Console

    from hf_semalign.harness import RESULTS_NAME, benchmarks_table, evaluate_run

    settings = {name: value for name, value in vars(options).items() if name not in ("command", "origin", "task")}
    content = evaluate_run(options.origin, options.task, **settings)
    console = Console(soft_wrap=True, markup=False)
    console.print(benchmarks_table(content))
    console.print(f"All figures: {Path(options.output or options.origin) / RESULTS_NAME}")


def _push(options: argparse.Namespace) -> None:
    from rich.console import Console

    from hf_semalign.hub import push_transfer

    url = push_transfer(
        options.folder,
        options.repo_id,
        private=options.private or None,
        revision=options.revision,
        tag=options.tag,
        target=options.target,
    )
    Console(soft_wrap=True, markup=False).print(url)


def _inspect(origin: str, revision: str | None) -> None:
    from rich.console import Console

    from hf_semalign.inspection import inspect_transfer, inspection_table

    facts = inspect_transfer(origin, revision)
    Console(markup=False).print(inspection_table(origin, facts))
    facts.check()


def _compare(comparison: str, overrides: Sequence[str], jobs: int, dry_run: bool) -> None:
    from rich.console import Console

    from hf_semalign.compare import costs_table, load_comparison, run_comparison
    from hf_semalign.tables import markdown

    console, known = Console(soft_wrap=True, markup=False), load_comparison(comparison, overrides)
    if dry_run:
        console.print(costs_table(known))
        return
    console.print(markdown(run_comparison(known, jobs=jobs)))
    console.print(f"Tables and figure: {known.output_dir}")


def _plan(config: str, overrides: Sequence[str]) -> None:
    from rich.console import Console

    from hf_semalign.plan import plan_recipe, plan_table
    from hf_semalign.recipe import load_recipe

    Console(markup=False).print(plan_table(plan_recipe(load_recipe(config, overrides))))


def _train(config: str, overrides: Sequence[str]) -> None:
    from accelerate import PartialState
    from rich.console import Console

    from hf_semalign.recipe import load_recipe
    from hf_semalign.runs import results_table, run_recipe

    recipe = load_recipe(config, overrides)
    results = run_recipe(recipe)
    if PartialState().is_main_process:
        console = Console(markup=False)
        console.print(results_table(results))
        console.print(f"Run folder: {recipe.output_dir} (adapter, README.md as its card, figures, results.json)")


def _signals(config: str, overrides: Sequence[str]) -> None:
    from accelerate import PartialState
    from rich.console import Console

    from hf_semalign.recipe import load_recipe
    from hf_semalign.runs import run_signals

    folder = run_signals(load_recipe(config, overrides))
    if PartialState().is_main_process:
        Console(soft_wrap=True, markup=False).print(
            f"Signals: {folder} (copy it under another signals_dir, or name it as a recipe's source)"
        )


if __name__ == "__main__":
    sys.exit(main())
