"""The command line, ``semalign COMMAND``.

Each command is a function that imports its dependencies when it runs, so that ``semalign --help`` is fast.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_semalign.errors import SemAlignError

if TYPE_CHECKING:
    from rich.console import Console

Run = Callable[[argparse.Namespace], None]
QUICKSTART = Path(__file__).parent / "data" / "quickstart.yaml"
CODES = (
    "Exit codes: 0 success; 1 a bug, with its traceback; 2 an error whose message says what to do; 130 Ctrl-C; 143 SIGTERM. "
    "Training saves a checkpoint on Ctrl-C and SIGTERM. Re-run the command to resume."
)
BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
WIDE = 1000  # columns if stdout is not a terminal, so that lines in a pipe are not wrapped
logger = logging.getLogger("hf_semalign")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code (see ``semalign --help``)."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if wrong := [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:  # argparse does not accept positionals that are separated by options
        options.overrides += rest
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    # Hide two warnings that users cannot act on. One is about a call inside peft. The other is about a kernel that bitsandbytes
    # looks for on import, and that is not used here (hf_semalign.models.loading.keep_layout).
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.update(dict.fromkeys(BARS, "1"))
    try:
        options.run(options)
    except KeyboardInterrupt:
        logger.error("Interrupted: re-run the command to resume.")
        return 130
    except SemAlignError as error:
        logger.error("error: %s", error)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Build the parser, with an example for each command."""
    parser = argparse.ArgumentParser(
        prog="semalign",
        description="Distil a large language model into a smaller one of another depth and width.",
        epilog=CODES,
    )
    parser.add_argument("--version", action="version", version=f"semalign {version('hf_semalign')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Run, short: str, description: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=short, description=description, epilog=f"Example: {example}")
        command.set_defaults(run=run)
        return command

    _add_overrides(add(
        "quickstart", _quickstart, "distil between the two embedded models, in two minutes",
        "Run the embedded recipe on two small models that ship with the package, to an adapter, card, figures and results.",
        "semalign quickstart training.seed=2 output_dir=runs/seed-2",
    ))  # fmt: skip
    _add_train(add(
        "train", _train, "run a recipe", "Run a recipe to an adapter, card, figures and results. Re-run the command to resume.",
        "semalign train --config recipes/quickstart/semalign.yaml training.seed=2",
    ))  # fmt: skip
    _add_recipe(add(
        "attribute", _attribute, "show which source layers matter for a recipe's task, and pair the layers",
        "Score the source's layers on the extract split, and cache the scores in training.signals_dir for later runs.",
        "semalign attribute --config recipes/quickstart/semalign.yaml training.pairing=attribution",
    ))  # fmt: skip
    _add_signals(add(
        "signals", _signals, "precompute the source's hidden states for a recipe",
        "Run the source over a recipe's data and cache its hidden states. Training, here or elsewhere, then never loads it.",
        "semalign signals --config recipes/quickstart/semalign.yaml training.signals_dir=signals",
    ))  # fmt: skip
    _add_compare(add(
        "compare", _compare, "run methods x tasks x seeds, and write one table and one figure",
        "Run the missing cells of a comparison, and write compare.md, .json, .tex and .png into its folder.",
        "semalign compare recipes/quickstart/compare.yaml --jobs 2 seeds=[1]",
    ))  # fmt: skip
    _add_analyze(add(
        "analyze", _analyze, "analyse a pair of models: vocabulary bases, CKA between layers, pairing",
        "Draw one of the analyses of docs/analyses.md, as PNG and SVG, with all numbers as JSON.",
        "semalign analyze cka recipes/quickstart/semalign.yaml data.eval=200",
    ))  # fmt: skip
    _add_evaluate(add(
        "evaluate", _evaluate, "score a run or a model on MMLU, GSM8K, HumanEval or MBPP",
        "Score a run folder, an adapter on the Hub or a model with lm-eval: zero-shot, greedy, with BOS.",
        "semalign evaluate runs/smollm2-360m-to-135m/gsm8k --task gsm8k --task mmlu",
    ))  # fmt: skip
    _add_report(add(
        "report", _report, "write a run as one HTML page",
        "Write one page with the results, figures, pairs, settings and cost of a run. It needs no network.",
        "semalign report runs/quickstart --output quickstart.html",
    ))  # fmt: skip
    _add_push(add(
        "push", _push, "publish a run folder",
        "Publish a run folder on the Hub in one commit, download it again, compare, and tag the commit. Unchanged files are "
        "not sent again. The token is HF_TOKEN, or the one from `hf auth login`.",
        "semalign push runs/quickstart owner/name --private",
    ))  # fmt: skip
    _add_inspect(add(
        "inspect", _inspect, "show what an adapter is",
        "Show which pair of models an adapter comes from, its layers, size and checksums. Only the metadata of a repository is "
        "read. The exit code is 2 if a checksum differs from the recorded one.",
        "semalign inspect owner/name --revision v0.1.0-1a2b3c4d",
    ))  # fmt: skip
    return parser


def _add_overrides(command: argparse.ArgumentParser, what: str = "changes to the recipe, such as training.seed=2") -> None:
    command.add_argument("overrides", nargs="*", metavar="key=value", help=what)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, metavar="FILE", help="YAML file of the recipe")
    _add_overrides(command)


def _add_signals(command: argparse.ArgumentParser) -> None:
    _add_recipe(command)
    command.add_argument(
        "--part", type=_part, metavar="I/N", help="compute the I-th of N parts alone, as one job of an array: 1/4 to 4/4"
    )


def _add_train(command: argparse.ArgumentParser) -> None:
    _add_recipe(command)
    command.add_argument("--dry-run", action="store_true", help="print the plan and its cost; load no weights")
    command.add_argument(
        "--push-to-hub", action="store_true", help="publish the run folder at the end, as training.push_to_hub=true does"
    )


def _add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("comparison", metavar="FILE", help="YAML file of the comparison")
    _add_overrides(command, "changes to the comparison, or to all its recipes")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time (default: %(default)s)")
    command.add_argument("--dry-run", action="store_true", help="print the cells and their cost; load no weights")


def _part(text: str) -> tuple[int, int]:
    """``3/8`` as the third of eight parts, counted from 0."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: expected I/N with I from 1 to N, such as 1/4")
    return int(number) - 1, int(count)


def _add_analyze(command: argparse.ArgumentParser) -> None:
    analyses = {
        "vectors": "how well vocabulary bases reconstruct hidden states, layer by layer",
        "cka": "how similar source and target layers are, without and with the map",
        "pairing": "attribution scores and the pairs of layers",
    }
    command.add_argument("analysis", choices=analyses, help="; ".join(f"{name}: {what}" for name, what in analyses.items()))
    command.add_argument("origin", metavar="RUN_OR_PAIR", help="a run folder, or the YAML file of a recipe")
    _add_overrides(command, "changes to the recipe, such as source=FOLDER")
    command.add_argument("--output", metavar="DIR", help="folder for the files; by default analysis/ in the run folder")


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument("origin", metavar="RUN_OR_MODEL", help="a run folder, a Hub id, or a model's folder")
    command.add_argument("--task", action="append", required=True, help="mmlu, gsm8k, humaneval or mbpp; may be repeated")
    command.add_argument("--target", help="Hub id or folder of a run's target, if its record only has the name of a folder")
    command.add_argument("--files", metavar="DIR_OR_FILE", help="local test rows instead of the Hub's")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N rows; for MMLU, of each subject")
    command.add_argument("--batch-size", type=int, metavar="N", help="prompts per batch; by default as many as fit into memory")
    command.add_argument("--chat-template", action="store_true", help="send prompts as a user turn of the chat template")
    command.add_argument("--backend", default="hf", help="hf, or vllm (default: %(default)s)")
    command.add_argument("--output", metavar="DIR", help="folder for benchmarks.json; by default the run folder")


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="RUN", help="a run folder")
    command.add_argument("--output", metavar="FILE", help="the page; by default report.html in the run folder")


def _add_push(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="RUN", help="a run folder")
    command.add_argument("repo_id", metavar="REPO_ID", help="owner/name, or name for a repository of your own")
    command.add_argument(
        "--private", action="store_true", help="make a new repository private; an existing one has to be private already"
    )
    command.add_argument("--revision", metavar="BRANCH", help="branch (default: main); created if it does not exist")
    command.add_argument("--tag", help="tag of the commit; by default made from the version of this package and the files")
    command.add_argument("--target", metavar="MODEL", help="folder or Hub id of the target, if the record only has a name")


def _add_inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("origin", metavar="REPO_OR_FOLDER", help="a Hub id, or a run folder")
    command.add_argument("--revision", help="tag, branch or commit of a Hub id")


def _console() -> Console:
    from rich.console import Console

    return Console(soft_wrap=True, markup=False, highlight=False, width=None if sys.stdout.isatty() else WIDE)


def _main_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _quickstart(options: argparse.Namespace) -> None:
    _run(str(QUICKSTART), options.overrides)


def _train(options: argparse.Namespace) -> None:
    if options.dry_run:
        from hf_semalign.experiments.plan import plan_recipe, plan_table
        from hf_semalign.experiments.recipe import load_recipe

        _console().print(plan_table(plan_recipe(load_recipe(options.config, options.overrides))))
    else:
        published = ["training.push_to_hub=true"] if options.push_to_hub else []
        _run(options.config, [*options.overrides, *published])


def _run(config: str, overrides: Sequence[str]) -> None:
    from hf_semalign.experiments.recipe import load_recipe
    from hf_semalign.experiments.run import results_table, run_recipe

    recipe = load_recipe(config, overrides)
    results = run_recipe(recipe)
    if _main_process():
        console = _console()
        console.print(results_table(results))
        console.print(f"Run folder: {recipe.output_dir} (adapter, README.md as its card, figures, results.json)")


def _attribute(options: argparse.Namespace) -> None:
    from hf_semalign.experiments.recipe import load_recipe
    from hf_semalign.experiments.studies import attribute_recipe, scores_table

    scores, pairing = attribute_recipe(load_recipe(options.config, options.overrides))
    _console().print(scores_table(scores, pairing))


def _signals(options: argparse.Namespace) -> None:
    from hf_semalign.experiments.recipe import load_recipe
    from hf_semalign.experiments.run import run_signals

    folder = run_signals(load_recipe(options.config, options.overrides), options.part)
    if _main_process():
        _console().print(f"Signals: {folder} (copy it under another signals_dir, or name it as a recipe's source)")


def _compare(options: argparse.Namespace) -> None:
    from hf_semalign.experiments.compare import run_comparison
    from hf_semalign.experiments.comparison import costs_table, load_comparison
    from hf_semalign.experiments.tables import markdown

    console, known = _console(), load_comparison(options.comparison, options.overrides)
    if options.dry_run:
        console.print(costs_table(known))
        return
    console.print(markdown(run_comparison(known, jobs=options.jobs)))
    console.print(f"Tables and figure: {known.output_dir}")


def _analyze(options: argparse.Namespace) -> None:
    from hf_semalign.experiments.studies import run_analysis

    path = run_analysis(options.analysis, options.origin, options.overrides, options.output)
    _console().print(f"{path} (with .svg), numbers in {path.parent / options.analysis}.json")


def _evaluate(options: argparse.Namespace) -> None:
    from hf_semalign.experiments.benchmarks.harness import BENCHMARKS_NAME, benchmarks_table, evaluate_run

    names = ("target", "files", "limit", "batch_size", "chat_template", "backend", "output")
    settings: dict[str, Any] = {name: getattr(options, name) for name in names}
    content = evaluate_run(options.origin, options.task, **settings)
    console = _console()
    console.print(benchmarks_table(content))
    console.print(f"All figures: {Path(options.output or options.origin) / BENCHMARKS_NAME}")


def _report(options: argparse.Namespace) -> None:
    from hf_semalign.experiments.report import write_report

    _console().print(str(write_report(options.folder, options.output)))


def _push(options: argparse.Namespace) -> None:
    from hf_semalign.hub.push import push_transfer

    names = ("revision", "tag", "target")
    settings = {name: getattr(options, name) for name in names}
    _console().print(push_transfer(options.folder, options.repo_id, private=options.private or None, **settings))


def _inspect(options: argparse.Namespace) -> None:
    from hf_semalign.hub.inspection import inspect_transfer, inspection_table

    facts = inspect_transfer(options.origin, options.revision)
    _console().print(inspection_table(options.origin, facts))
    facts.check()


if __name__ == "__main__":
    sys.exit(main())
