"""The package is a list of files, room by room: a file imports only from those above it."""

import ast
from itertools import groupby
from pathlib import Path

import pytest

import hf_semalign

ORDER = (
    "errors", "kinds", "files",
    "models.names", "models.anatomy", "models.lora", "models.hooks", "models.loading", "models.frozen",
    "models.token_bytes",
    "tokenization", "splits",
    "method.prefix_classes", "method.alignment",
    "method.losses", "method.attribution", "method.pairing", "method.vocabularies", "method.semantic_map",
    "method.frontier", "method.objective",
    "config",
    "cache.examples", "cache.states", "cache.layer_pass", "cache.source", "cache.scores", "cache.source_pass", "cache.signals",
    "cache.prefix",
    "training.order", "training.stages", "training.checkpoints", "training.engines", "training.source_rows",
    "training.preparation", "training.layerwise",
    "hub.card", "hub.record", "hub.reading", "hub.loading", "hub.push", "hub.inspection",
    "transfer", "trainer",
    "experiments.symbols", "experiments.rows", "experiments.tasks", "experiments.generation", "experiments.answers",
    "experiments.evaluation", "experiments.analysis", "experiments.figures", "experiments.tables", "experiments.paired",
    "experiments.benchmarks.sandbox", "experiments.benchmarks.problems",
    "experiments.benchmarks.models", "experiments.benchmarks.harness",
    "experiments.baselines.projections", "experiments.baselines.neurons", "experiments.baselines.extraction",
    "experiments.baselines.kd", "experiments.baselines.sft", "experiments.baselines.seeking", "experiments.baselines.carrier",
    "experiments.baselines.laten",
    "experiments.methods", "experiments.recipe", "experiments.plan", "experiments.rounds", "experiments.run",
    "experiments.comparison", "experiments.compare", "experiments.studies", "experiments.report",
    "cli",
)  # fmt: skip
PACKAGE = Path(hf_semalign.__file__).parent
FILES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


def module_of(path):
    return ".".join(path.with_suffix("").parts)


def imported(tree):
    """Modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write `from hf_semalign...`"
            names = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        else:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        inside = {name.removeprefix("hf_semalign.") for name in names if name.startswith("hf_semalign.")}
        if inside:
            known = inside & set(ORDER)
            assert known, f"line {node.lineno}: {sorted(inside)} is no file of the package"
            yield from known


def test_every_file_has_its_place():
    assert sorted(map(module_of, FILES)) == sorted(ORDER)


def test_rooms_have_an_order_as_files_have():
    """All files of a room stand together, so that no two rooms import from each other."""
    rooms = [room for room, _ in groupby(name.partition(".")[0] for name in ORDER)]
    assert len(rooms) == len(set(rooms))
    assert rooms[-2:] == ["experiments", "cli"]  # whoever uses the trainer alone never reads them


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_from_those_above_it(path):
    above = set(ORDER[: ORDER.index(module_of(path))])
    assert set(imported(ast.parse((PACKAGE / path).read_text()))) <= above


@pytest.mark.parametrize("path", FILES, ids=str)
def test_what_a_user_can_act_on_is_an_error_of_our_own(path):
    """By which the command line tells it from a bug."""
    built_in = {"ValueError", "FileNotFoundError", "OSError", "FloatingPointError", "ChildProcessError"}
    tree = ast.parse((PACKAGE / path).read_text())
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    names = {ast.unparse(call.func) for call in raised}
    allowed = {"OSError"} if path.name == "sandbox.py" else set()  # in the process of the program, which imports nothing
    assert names & built_in <= allowed
