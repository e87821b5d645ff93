"""The documentation: the site builds, links lead somewhere, and commands and code run, or are taken by what would run them."""

import ast
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import metadata
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import CHAT_TEMPLATE, tiny_llama, word_tokenizer
from markdown_it import MarkdownIt

from hf_semalign.cli import main, make_parser
from hf_semalign.config import SemAlignConfig
from hf_semalign.experiments.comparison import load_comparison
from hf_semalign.experiments.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "model_cards/README.md")), *sorted(ROOT.glob("docs/*.md"))]
LANGUAGES = {"python", "bash", "yaml", "text", "{eval-rst}", "{toctree}", "{include} ../CONTRIBUTING.md"}
HUB = "HuggingFaceTB/SmolLM2-{}-Instruct"
SMALL = ["training.max_steps=4", "data.extract=8", "data.align=32", "data.eval=8", "baselines=[]"]


def tokens(page):
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page, language=None):
    """Code blocks of a page, as language and text; or the texts of one language."""
    found = [(token.info.strip(), token.content) for token in tokens(page) if token.type in ("fence", "code_block")]
    return found if language is None else [text for name, text in found if name == language]


def by_page(language):
    pages = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.relative_to(ROOT).as_posix())


def test_every_block_says_what_it_is():
    assert {language for page in PAGES for language, _ in blocks(page)} <= LANGUAGES


# The site


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", ROOT / "docs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.glob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', page.read_text())
        assert not [address for pair in loaded for address in pair if "//" in address], page.name
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= {page.stem for page in tmp_path.glob("*.html")}


def slug(heading):
    """The anchor that GitHub and Sphinx give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page):
    found = tokens(page)
    texts = [after.content for token, after in pairwise(found) if token.type == "heading_open"]
    return {slug(re.sub(r"[`*]", "", text)) for text in texts}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_are_there(page):
    inline = [child for token in tokens(page) for child in token.children or ()]
    targets = [child.attrs.get("href") or child.attrs.get("src") for child in inline if child.type in ("link_open", "image")]
    for target in (target for target in targets if "://" not in target):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_paths_in_the_text_exist():
    """Files of the repository, as the text names them."""
    for page in PAGES:
        named = re.findall(r"`((?:recipes|benchmarks|tests|docs|model_cards)/[\w./-]+)`", page.read_text(encoding="utf-8"))
        assert [path for path in named if not (ROOT / path).exists()] == [], page.name


# What it says


def test_quoted_errors_are_those_of_the_code():
    """A dash stands for anything."""
    templates = []
    for path in (ROOT / "hf_semalign").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                templates.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                templates.append(re.sub(r"%\.?\d*[a-z]", "\0", node.value))
    quoted = re.findall(r'^\*\*"([^"]+)"\*\*', (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)
    assert len(quoted) > 12
    for message in quoted:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("—")), re.DOTALL)
        assert any(pattern.search(template) for template in templates), message


def test_settings_are_all_told():
    """Every field that SemAlignConfig adds to the Trainer's."""
    text = (ROOT / "docs" / "settings.md").read_text()
    assert [name for name in SemAlignConfig.__annotations__ if f"`{name}`" not in text] == []


def test_settings_have_the_defaults_that_the_table_names():
    table = re.findall(r"^\| (`.+?`) \| (.+?) \|", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE)
    defaults = {item.name: item.default for item in fields(SemAlignConfig)}
    compared = 0
    for names, cell in table:
        told = re.sub(r"(\d),(\d{3})", r"\1\2", cell).split(", ")
        for name, value in zip(re.findall(r"`(\w+)`", names), told, strict=False):
            if defaults[name] is not None:
                word = re.match(r"`?([\w.-]+)", value)[1]
                assert yaml.safe_load(word) == defaults[name] or float(word) == defaults[name], (name, value)
                compared += 1
    assert compared == 18


# What can be run


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder of its own, with the recipes as in a clone."""
    monkeypatch.chdir(tmp_path)
    for name in ("recipes", "hf_semalign"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@by_page("python")
def test_python_runs(page, elsewhere, capsys):
    """The blocks of a page one after another, on tiny models in place of the Hub's."""
    words = ["<user>", "<assistant>", *(f"w{i}" for i in range(92))]
    code = "\n".join(blocks(page, "python"))
    for size, model in (("135M", tiny_llama(3, 16)), ("360M", tiny_llama(4, 24))):
        model.save_pretrained(elsewhere / size)
        word_tokenizer(words, CHAT_TEMPLATE).save_pretrained(elsewhere / size)
        code = code.replace(HUB.format(size), str(elsewhere / size))
    rows = [{"prompt": f"w{i % 90} w{i // 90}", "completion": " w1 w2"} for i in range(140)]
    (elsewhere / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scope: dict = {}
    exec(code.replace("bf16=True", "bf16=True, use_cpu=True, report_to='none', disable_tqdm=True"), scope)
    if "SemAlignTrainer" in code:
        assert "eval_kl" in capsys.readouterr().out
        assert scope["model"].peft_config["default"].r == 16


@by_page("yaml")
def test_yaml_is_a_recipe_or_sections_of_one(page, tmp_path):
    rest = {
        "source": "a",
        "target": "b",
        "output_dir": str(tmp_path),
        "data": {"task": "gsm8k", "extract": 1, "align": 1, "eval": 1},
    }
    for text in blocks(page, "yaml"):
        shown = yaml.safe_load(text)
        content = {**rest, **shown}
        if "source" not in shown:  # sections, of which a page may show some keys
            content["data"] = {**rest["data"], **shown.get("data", {})}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        recipe = load_recipe(tmp_path / "recipe.yaml", ["training.use_cpu=true"])
        assert recipe.config(tmp_path).output_dir == str(tmp_path)


def commands(page):
    """Commands of a page's blocks as words, without comments, assignments of variables and the shell's own."""
    for text in blocks(page, "bash"):
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words and words[0] not in ("for", "done", "git", "cd"):
                yield words


def taken_by_semalign(arguments):
    """Look whether the command line takes these words, and recipe or comparison the changes."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    changes = [*getattr(options, "overrides", []), *rest]
    assert all("=" in change for change in changes), arguments
    given = [getattr(options, name, None) for name in ("config", "comparison", "origin")]
    for path in (path for path in given if path and path.startswith("recipes/")):
        (load_comparison if options.command == "compare" else load_recipe)(ROOT / path, changes)


@by_page("bash")
def test_commands_are_taken_by_what_they_call(page):
    for program, *arguments in commands(page):
        if program == "semalign":
            taken_by_semalign(arguments)
        elif program == "python":
            script = (ROOT / arguments[0]).read_text()
            assert [option for option in arguments[1:] if option.startswith("--") and option not in script] == []
        elif program == "accelerate":
            options = launch_command_parser().parse_args(arguments[1:])
            assert arguments[0] == "launch" and options.training_script == "recipes/train.py"
            assert options.config_file is None or (ROOT / options.config_file).is_file()
            taken_by_semalign(["train", *options.training_script_args])
        elif program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif program == "pip":
            extras = {extra for word in arguments for extra in re.findall(r"hf_semalign\[(\w+)\]", word)}
            assert arguments[0] == "install" and extras <= set(metadata("hf_semalign").get_all("Provides-Extra"))
        elif program == "pre-commit":
            assert arguments in (["install"], ["run", "--all-files"])
        else:
            pytest.fail(f"{program}: {arguments}")


def test_commands_on_the_embedded_pair_run(elsewhere):
    """All that are about it and publish nothing, in the order of the pages, with few steps."""
    assert main(["quickstart", *SMALL]) == 0
    run = []
    for arguments in (words[1:] for page in PAGES for words in commands(page) if words[0] == "semalign"):
        about = [word for word in arguments if word.startswith(("recipes/quickstart/", "runs/quickstart"))]
        whole = arguments[0] == "compare" and "--dry-run" not in arguments
        if not about or whole or arguments[0] == "push" or arguments in run:
            continue
        run.append(arguments)
        small = SMALL if "recipes/quickstart/semalign.yaml" in about else []
        assert main([*arguments, *small]) == 0, arguments
    assert {arguments[0] for arguments in run} >= {"train", "report", "inspect", "analyze"}
