"""What comes from others is data: it neither runs nor leaves its folder nor becomes markup. What is private stays here."""

import ast
import json
import logging
import os
import pickle
import shutil
from contextlib import suppress
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import PAPER, random_rows, tiny_llama, word_tokenizer
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from rich.console import Console
from safetensors.torch import load_file

import hf_semalign
from hf_semalign import cli, load_transfer, push_transfer
from hf_semalign.cache.source import Source
from hf_semalign.config import SemAlignConfig
from hf_semalign.experiments.figures import draw_comparison
from hf_semalign.experiments.recipe import load_recipe, load_run, load_tokenizer
from hf_semalign.experiments.run import results_table
from hf_semalign.experiments.tasks import load_task
from hf_semalign.hub import loading
from hf_semalign.hub import push as hub
from hf_semalign.models.loading import find_tokenizer, load_model, skeleton
from hf_semalign.models.names import PAIR_FOLDER, public_name, resolve_model
from hf_semalign.splits import encode
from hf_semalign.trainer import SemAlignTrainer
from hf_semalign.training.checkpoints import seal

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart" / "semalign.yaml"
PACKAGE = Path(hf_semalign.__file__).parent
TREES = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
ROWS = random_rows([(4, 3)] * 24)
TOKEN = "hf_" + "A1b2C3d4" * 4


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """A path that exists once foreign code has run."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists()


def make_trainer(folder, **settings):
    settings = {
        "max_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **PAPER,
        "pairing": "last",
        **settings,
    }
    models = tiny_llama(3, 16, pad_token_id=0), tiny_llama(5, 24, seed=1, pad_token_id=0)
    return SemAlignTrainer(*models, SemAlignConfig(output_dir=str(folder), **settings), ROWS[:16])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder, of a trainer alone, with a checkpoint."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer = make_trainer(folder, save_steps=2)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def run_folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


# The code itself


def called(tree):
    """Calls of a file: name, or attribute with what it is taken from, and the call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", TREES, ids=str)
def test_nothing_is_unpickled_unpacked_or_executed(path):
    allowed = {"exec", "compile"} if path.name == "sandbox.py" else set()
    for name, _ in called(TREES[path]):
        assert name not in {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "yaml.load"} - allowed
    modules = {"pickle", "marshal", "shelve", "dill", "joblib", "tarfile", "zipfile", "runpy"}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            assert not modules & {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module not in modules


@pytest.mark.parametrize("path", TREES, ids=str)
def test_every_load_forbids_remote_code_and_pickles(path):
    for name, call in called(TREES[path]):
        if name.startswith("Auto") and name.endswith((".from_pretrained", ".from_config")):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given.get("trust_remote_code") == "False", ast.unparse(call)
            if name.startswith("AutoModel") and name.endswith("pretrained"):
                assert given.get("use_safetensors") == "True", ast.unparse(call)


# Pickles


def test_weights_that_are_pickled_are_refused(tmp_path, run_folder, marker):
    model = tiny_llama(3, 16, pad_token_id=0)
    model.save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    pickled = str(tmp_path / "pickled")
    load_transfer(run_folder, target=str(tmp_path / "base"))
    for load in (
        load_model,
        lambda name: load_transfer(run_folder, target=name),
        lambda name: Source(name).identity,
        lambda name: Source(name).head(),
        lambda name: Source(name).model("cpu"),
    ):
        with pytest.raises((OSError, ValueError), match="safetensors"):
            load(pickled)


def test_an_adapter_that_is_pickled_is_refused(tmp_path, run_folder):
    tiny_llama(3, 16, pad_token_id=0).save_pretrained(tmp_path / "base")
    torch.save(load_file(run_folder / "adapter_model.safetensors"), run_folder / "adapter_model.bin")
    load_transfer(run_folder, target=str(tmp_path / "base"))
    (run_folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks .*adapter_model\.safetensors"):
        load_transfer(run_folder, target=str(tmp_path / "base"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_cannot_run_code(run_folder, marker, name):
    checkpoint = run_folder / "checkpoint-2"
    assert (checkpoint / name).is_file()
    (checkpoint / name).write_bytes(pickle.dumps(Payload(marker)))
    seal(checkpoint)  # as who made it would
    with pytest.raises(pickle.UnpicklingError):
        make_trainer(run_folder).train(resume_from_checkpoint=str(checkpoint))


def test_no_pickle_is_written_beside_the_checkpoints_state(run_folder):
    kinds = (".bin", ".pt", ".pth", ".pkl")
    made = {str(path.relative_to(run_folder)) for path in run_folder.rglob("*") if path.suffix in kinds}
    states = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {Path(name).name for name in made} == states  # no training_args.bin
    assert all(name.startswith("checkpoint-") for name in made)
    assert not list(filter_repo_objects(made, allow_patterns=hub.PUBLISHED))


# Code


@pytest.fixture
def custom_model(tmp_path, marker, monkeypatch):
    """A folder whose files ask for code of their own; whoever is asked, agrees."""
    folder = shutil.copytree(PAIR_FOLDER / "target", tmp_path / "custom")
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokens", "own.Tokens"]}
    for name, changes in (("config.json", {"model_type": "own"}), ("tokenizer_config.json", {"tokenizer_class": "Tokens"})):
        content = json.loads((folder / name).read_text()) | changes | {"auto_map": names}
        (folder / name).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return str(folder)


LOADS = {
    "model": load_model,
    "skeleton": skeleton,
    "tokenizer": find_tokenizer,
    "source": Source,
    "recipe": lambda name: load_tokenizer(load_recipe(QUICKSTART, [f"target={name}"])),
    "analyze": lambda name: cli.main(["analyze", "pairing", str(QUICKSTART), f"source={name}", "--output", f"{name}-analysis"]),
}


@pytest.mark.parametrize("name", LOADS)
def test_code_of_a_model_does_not_run(custom_model, name):
    with suppress(ValueError):  # the tokenizer is logged as not found
        LOADS[name](custom_model)


def test_code_of_a_transfers_target_does_not_run(custom_model, run_folder):
    with pytest.raises(ValueError, match="custom code"):
        load_transfer(run_folder, target=custom_model)


def test_programs_of_a_data_set_do_not_run(tmp_path, marker):
    harm = f"import os\nos.mkdir({str(marker)!r})\n"
    rows = [
        {"task_id": k, "text": f"Text {k}.", "code": f"{harm}def f{k}(a):\n    return a\n", "test_list": [f"assert f{k}(1)"]}
        for k in (511, 512, 601, 602, 603)
    ]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_task("mbpp", extract=1, align=2, eval=2, files={"train": str(tmp_path / "mbpp.jsonl")})
    assert "os.mkdir" in data.align[0]["messages"][1]["content"]


def test_a_chat_template_reaches_nothing(marker):
    tokenizer = word_tokenizer(["a"], "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match="SecurityError"):
        encode([{"messages": messages}], tokenizer, split="align")


# Names of files and folders


@pytest.mark.parametrize("name", ["embedded:../../../evaluation", "embedded:..", "embedded:/tmp", "embedded:source/../.."])
def test_embedded_names_are_not_paths(name):
    with pytest.raises(ValueError, match="No embedded model"):
        resolve_model(name)


@pytest.mark.parametrize("target", ["../model", "/tmp/model", "embedded:../pair/target", "~/model", "a/b/c", r"C:\model", ".."])
def test_a_record_names_no_path(run_folder, target):
    record = json.loads((run_folder / "semalign.json").read_text())
    (run_folder / "semalign.json").write_text(json.dumps(record | {"target": target}))
    with pytest.raises(ValueError, match=r"No embedded model|is not a Hub id"):
        load_transfer(run_folder)


def test_of_a_repository_only_known_files_are_read(run_folder, tmp_path, monkeypatch):
    tiny_llama(3, 16, pad_token_id=0).save_pretrained(tmp_path / "base")
    asked = []

    def download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(run_folder)

    monkeypatch.setattr(loading, "snapshot_download", download)
    _, record = load_transfer("me/adapter", target=str(tmp_path / "base"))
    assert record == json.loads((run_folder / "semalign.json").read_text())
    assert asked == [("me/adapter", ["adapter_model.safetensors", "adapter_config.json", "semalign.json"])]


def test_a_run_folder_says_nothing_of_where_to_read_and_write(run_folder, tmp_path):
    path, results = run_folder / "semalign.json", run_folder / "results.json"
    record = json.loads(path.read_text())
    settings = record["settings"] | {"signals_dir": str(tmp_path), "logging_dir": str(tmp_path), "hub_token": TOKEN}
    split = {"rows": 4, "fingerprint": "", "files": {"eval": "/etc/passwd"}}
    data = {name: split for name in ("files", "extract", "align", "eval")}
    path.write_text(json.dumps(record | {"settings": settings, "data": data}))
    figures = {**{name: {} for name in ("seconds", "cost", "machine")}, "history": [], "figures": []}
    known = {"task": "symbols", "dataset": None, "steps": 3, "peak_memory_mb": None, "metrics": {record["method"]: {}}}
    results.write_text(json.dumps(figures | known))
    recipe = load_run(run_folder)
    assert recipe.output_dir == str(run_folder)
    assert recipe.data.files is None
    assert {"signals_dir", "logging_dir", "hub_token"}.isdisjoint(recipe.training)
    assert recipe.training["pairing"] == "last"


def test_links_out_of_a_run_folder_are_not_published(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("something was sent"))
    (tmp_path / "secret").write_text(TOKEN)
    (run_folder / "README.md").write_text("")
    (run_folder / "figures").mkdir()
    (run_folder / "figures" / "layers.png").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"layers\.png.* out of the folder"):
        push_transfer(run_folder, "me/adapter")
    (run_folder / "figures" / "layers.png").unlink()
    (run_folder / "figures").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "layers.png").write_text(TOKEN)
    (run_folder / "figures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"layers\.png.* out of the folder"):
        push_transfer(run_folder, "me/adapter")


# Markup: the card is in tests/test_card.py


HOSTILE = "[bold]a[/] [link=file:///etc]<script>alert(1)</script> $\\frac{1$ & | ]]> -- \x1b[31m"
RESULTS = {
    "task": "records",
    "steps": 3,
    "metrics": {method: {"kl": 0.1, "exact_match": {HOSTILE: 0.5, "[/x]": 0.1}} for method in ("target", "semalign")},
}


def test_the_terminal_shows_names_to_the_letter():
    shown = StringIO()
    Console(file=shown, width=400, force_terminal=True, color_system="truecolor").print(results_table(RESULTS))
    assert f"{HOSTILE[:-5]}\\x1b[31m %" in shown.getvalue()
    assert "[/x] %" in shown.getvalue()


def test_the_terminal_shows_folders_to_the_letter(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "[red]runs[/]"
    monkeypatch.setattr("hf_semalign.experiments.run.run_recipe", lambda _: RESULTS)
    monkeypatch.setattr("hf_semalign.experiments.run.run_signals", lambda *_: folder)
    monkeypatch.setattr("hf_semalign.experiments.studies.run_analysis", lambda *_: folder / "cka.png")
    for command in (["train", "--config"], ["signals", "--config"], ["analyze", "cka"]):
        assert cli.main([*command, str(QUICKSTART), f"output_dir={folder}"]) == 0
        assert "[red]runs[/]" in capsys.readouterr().out.replace("\n", "")


def test_figures_show_names_to_the_letter(tmp_path):
    name = HOSTILE.replace("\x1b", "")
    metrics = {method: {"kl": 0.1, "exact_match": {name: 0.5}} for method in ("target", "semalign")}
    draw_comparison(RESULTS | {"metrics": metrics}, tmp_path)
    elements = list(ElementTree.parse(tmp_path / "comparison.svg").iter())
    assert not [element for element in elements if str(element.tag).endswith(("script", "}a"))]
    assert name.split() in ["".join(element.itertext()).split() for element in elements]


# What is ours


def test_names_of_models_are_no_paths():
    for path in ("/nowhere/zoe/model", "../zoe/model", "~/zoe/model", r"C:\zoe\model", "zoe/deep/model/", "./model"):
        assert public_name(path) == "model"
    for name in ("gpt2", "org/model-1.5_b", "embedded:target"):
        assert public_name(name) == name


def test_a_run_tells_no_path_and_no_token(tmp_path, monkeypatch, capfd, caplog):
    """Not in what may be published, nor in all that is logged."""
    home = tmp_path / "zoe"
    for role in ("source", "target"):
        shutil.copytree(PAIR_FOLDER / role, home / role)
    (home / "source" / "tokenizer.json").unlink()  # which is logged
    (home / "source" / "tokenizer_config.json").unlink()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    settings = ["data.extract=8", "data.align=32", "data.eval=8", "training.save_strategy=steps", "training.save_steps=2"]
    settings += [f"training.hub_token={TOKEN}", "training.max_steps=4", "training.logging_steps=1", "training.frontier=single"]
    settings += [f"training.signals_dir={home}/signals", "baselines=[]"]
    arguments = ["train", "--config", str(QUICKSTART), f"source={home}/source", f"target={home}/target", "output_dir=run"]
    caplog.set_level(logging.INFO)
    assert cli.main([*arguments, *settings, "training.source_memory=stream"]) == 0
    run = tmp_path / "run"
    for damaged in (*run.glob("*.safetensors"), *home.glob("signals/*/*/*/*.safetensors"), *home.glob("signals/*/*.json")):
        if damaged.name not in ("adapter_model.safetensors", "source.json", "config.json"):
            damaged.write_bytes(damaged.read_bytes()[:-9] + b"x" * 9)  # the next run says so
    assert cli.main([*arguments, *settings]) == 0
    assert "is damaged" in caplog.text
    assert "cannot be read" in caplog.text
    assert "No tokenizer was found" in caplog.text
    files = {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file()}
    published = list(filter_repo_objects(files, allow_patterns=hub.PUBLISHED))
    told = {name: files[name].read_bytes().decode(errors="replace") for name in published}
    assert len(told) >= 13
    told |= {"log": caplog.text, "stdout and stderr": "".join(capfd.readouterr())}
    for path in (*run.glob("*.json"), *run.glob("checkpoint-*/*.json"), *home.glob("signals/**/*.json")):
        told[str(path)] = path.read_text()
    for name, text in told.items():
        for private in (TOKEN, str(tmp_path), "zoe", str(Path.home()) + "/"):
            assert private not in text, f"{private} in {name}: {text[max(0, text.find(private) - 200) :][:400]}"
