"""The package is a list: a module imports only from modules above it."""

import ast
from pathlib import Path

import pytest

import hf_semalign

ORDER = (
    "errors", "symbols", "anatomy", "projections", "splits", "hooks", "rows", "tasks", "losses", "attribution", "pairing",
    "semantics", "frontier", "states", "guards", "config", "sharding", "loading", "source", "scores", "signals", "prefix",
    "preparation", "objective", "layerwise", "figures", "card", "hub", "inspection", "trainer", "analysis", "sandbox",
    "generation", "answers", "evaluation", "problems", "harness", "baselines", "recipe", "plan", "rounds", "runs", "tables",
    "paired", "compare", "studies", "report", "cli",
)  # fmt: skip
PACKAGE = Path(hf_semalign.__file__).parent
FILES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


def imported(tree):
    """Modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write `from hf_semalign...`"
            names = [f"{node.module}.{name.name}" for name in node.names]
        else:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".")[1] for name in names if name.startswith("hf_semalign."))


def test_every_module_has_its_place():
    assert {path.with_suffix("").parts[0] for path in FILES} <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_module_imports_only_from_those_above_it(path):
    module = path.with_suffix("").parts[0]
    above = set(ORDER[: ORDER.index(module)]) | ({module} if len(path.parts) > 1 else set())
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
