"""Prompts of the kind that HumanEval has, from Python's standard library: signature and docstring of a function to complete.

    python benchmarks/stdlib_prompts.py PROMPTS.jsonl [--mbpp MBPP.jsonl] [--humaneval HumanEval.jsonl.gz]

Every line is a row without an answer, for ``data.answers: source`` or ``target``. Functions count that have a
signature of their own, a docstring of a sentence at least, and no more than ``--lines`` lines of code. Names that begin with an
underscore, tests, and functions whose name is that of a benchmark's function are left out; how many words in a row the prompts
share with the test rows is printed. What comes out depends on the Python that runs it.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from hf_semalign.experiments.rows import HUMANEVAL, MBPP, Item, Row, Table, overlap

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip", "__phello__", "pydoc_data"}
SHORTEST_DOC = 40  # characters
METHOD = ("self", "cls")  # methods say little without their class
TASK = "Complete the following python function.\n\n```python\n{}\n```"


def functions(path: Path, lines: int) -> Iterator[tuple[str, str]]:
    """Name, and source of signature and docstring, of the functions of a module that make a prompt."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.decorator_list:
            continue
        if node.args.args and node.args.args[0].arg in METHOD:
            continue
        doc = ast.get_docstring(node)
        if doc is None or len(doc) < SHORTEST_DOC or not node.body[1:] or node.end_lineno - node.body[1].lineno >= lines:
            continue
        node.body = node.body[:1]
        yield node.name, ast.unparse(node)


def names(row: Row) -> set[str]:
    """Names of the functions that a test row asks for."""
    code = row.get("code", "")  # MBPP's; HumanEval names its function
    return {node.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)} | {row.get("entry_point", "")}


def main() -> None:
    """Write the prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--mbpp", type=Path)
    parser.add_argument("--humaneval", type=Path)
    parser.add_argument("--lines", type=int, default=25)
    options = parser.parse_args()
    tables: list[tuple[Table, Path | None]] = [(MBPP, options.mbpp), (HUMANEVAL, options.humaneval)]
    rows = [(table, row) for table, path in tables if path for row in table.load("test", str(path))]
    tests, taken = [table.item(row) for table, row in rows], set().union(*(names(row) for _, row in rows))
    found: dict[str, str] = {}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED & set(path.relative_to(root).parts):
            found |= {source: name for name, source in functions(path, options.lines) if name not in taken}
    prompts = [TASK.format(source) for source in found]
    with options.output.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": [{"role": "user", "content": prompt}]}) + "\n" for prompt in prompts)
    print(f"{len(prompts)} prompts of Python {sys.version.split()[0]}")
    if tests:
        shared = overlap([Item(number, prompt, prompt) for number, prompt in enumerate(prompts)], tests)
        print(f"{shared.share:.2%} share 13 words in a row with one of {shared.test_rows} test rows; worst: {shared.worst}")


if __name__ == "__main__":
    main()
