"""What is packaged, and that what tells of the project elsewhere agrees with it."""

import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import metadata, version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DATA = [
    "py.typed", "hub/card.md.jinja", "data/quickstart.yaml",
    *(f"data/pair/{role}/{name}" for role in ("source", "target") for name in (
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and a source distribution, of the files that git knows."""
    folder = tmp_path_factory.mktemp("packaging")
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in known:
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "tree"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def test_the_wheel_has_the_package_its_data_and_its_licence(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_semalign").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    tasks = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_semalign" / "data" / "tasks").iterdir()}
    assert {f"hf_semalign/{name}" for name in DATA} | tasks <= set(names)
    assert f"{info}/licenses/LICENSE" in names
    assert "semalign = hf_semalign.cli:main" in entry_points
    assert wheel.name == f"hf_semalign-{version('hf_semalign')}-py3-none-any.whl"


def test_the_source_distribution_builds_the_same_wheel(built):
    """The wheel above was built from it."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.cfg", "pyproject.toml", "LICENSE", "README.md", *(f"hf_semalign/{name}" for name in DATA)} <= names


def test_metadata():
    found = metadata("hf_semalign")
    assert found["Requires-Python"] == ">=3.11"
    assert found["License-Expression"] == "Apache-2.0"
    assert {"eval", "docs", "dev"} <= set(found.get_all("Provides-Extra"))
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)} <= set(found.get_all("Classifier"))


def test_the_citation_names_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version("hf_semalign")


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (job["timeout-minutes"], workflow["permissions"]) == (45, {"contents": "read"})
    python = next(step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert f">={python}" == metadata("hf_semalign")["Requires-Python"]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make test", "make quickstart"]


def test_pre_commit_runs_the_tools_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text()
    for hook in hooks:
        tool, *words = hook["entry"].removeprefix(".venv/bin/").split()
        assert f"$(BIN)/{tool} {words[0]}" in makefile
