"""The command line: every command with its help and example, exit codes, what starts fast, and what a pipe gets."""

import fcntl
import logging
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
from importlib.metadata import version

import pytest

import hf_semalign
from hf_semalign import cli
from hf_semalign.cache import examples as examples_module
from hf_semalign.cache.scores import layer_scores
from hf_semalign.cli import QUICKSTART, main, make_parser
from hf_semalign.errors import NotFiniteError
from hf_semalign.experiments.recipe import load_recipe

COMMANDS = make_parser()._subparsers._group_actions[0].choices
SMALL = ["training.max_steps=4", "data.extract=8", "data.align=32", "data.eval=8", "baselines=[]", "training.logging_steps=2"]


def test_the_commands():
    """Those of the public surface, and three more."""
    public = {"train", "attribute", "evaluate", "compare", "analyze", "push", "inspect"}
    assert set(COMMANDS) == public | {"quickstart", "signals", "report"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_it_takes(name):
    command = COMMANDS[name]
    program, *arguments = shlex.split(re.search(r"Example: (.*)", command.epilog)[1])
    options, rest = make_parser().parse_known_args(arguments)
    assert program == "semalign" and options.command == name
    assert all("=" in word for word in rest)
    assert command.description and callable(options.run)
    assert all(action.help for action in command._actions)


def test_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"semalign {version('hf_semalign')}\n"


def test_help_and_the_package_load_no_heavy_library():
    """What takes seconds to import: half a second is the goal for ``semalign --help``."""
    code = (
        "import sys, hf_semalign\nfrom hf_semalign.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'datasets', 'accelerate', 'peft', 'numpy', 'rich', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "130 Ctrl-C" in " ".join(done.stdout.split())


def test_public_names():
    assert sorted(hf_semalign.__all__) == hf_semalign.__all__ == dir(hf_semalign)
    assert all(getattr(hf_semalign, name) for name in hf_semalign.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_semalign.nothing


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130), (NotFiniteError("Lower it."), 2), (SystemExit(143), 143), (RuntimeError("a bug"), "a bug"),
        (ValueError("a bug"), "a bug"), (OSError("a bug"), "a bug"),
    ],
)  # fmt: skip
def test_exit_codes(monkeypatch, error, code):
    def fail(options):
        raise error

    monkeypatch.setattr(cli, "_train", fail)
    if code in (2, 130):
        assert main(["train", "--config", "x.yaml"]) == code
    else:
        with pytest.raises(type(error), match=str(code)):
            main(["train", "--config", "x.yaml"])


def test_attribution_is_kept_where_a_run_finds_it(tmp_path, capsys, monkeypatch):
    recipe = ["--config", str(QUICKSTART), *SMALL, f"output_dir={tmp_path}", "training.pairing=attribution"]
    assert main(["attribute", *recipe]) == 0
    shown = capsys.readouterr().out
    assert "source layer" in shown and "embedded:source to embedded:target, pairing attribution" in shown
    kept = []
    monkeypatch.setattr("hf_semalign.transfer.layer_scores", lambda *a, **k: kept.append(layer_scores(*a, **k)) or kept[-1])
    monkeypatch.setattr("hf_semalign.cache.scores.attribute_layers", lambda *a, **k: pytest.fail("computed again"))
    assert main(["train", *recipe]) == 0
    assert f"{kept[0].values[0]:.4g}" in shown


@pytest.fixture(scope="module")
def piped(tmp_path_factory):
    """A run whose output goes to pipes."""
    folder = tmp_path_factory.mktemp("cli")
    command = [sys.executable, "-m", "hf_semalign.cli", "quickstart", *SMALL, f"output_dir={folder / ('a' * 120)}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder), folder


def test_a_pipe_gets_no_bars_and_whole_lines(piped):
    """The table and the folder on standard output, and nothing else; the course of the run beside it."""
    done, folder = piped
    assert "\r" not in done.stderr and "it/s" not in done.stderr and "\x1b" not in done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == f"Run folder: {folder / ('a' * 120)} (adapter, README.md as its card, figures, results.json)"
    assert "{'loss'" not in done.stdout
    assert re.search(r"^step 2 of 4: loss [\d.]+, .*relation [\d.]+, kl [\d.]+, stage 1$", done.stderr, re.MULTILINE)


def test_the_quickstart_is_the_recipe_that_people_know():
    assert load_recipe("recipes/quickstart/semalign.yaml") == load_recipe(QUICKSTART)


def test_a_terminal_gets_bars_that_say_where_the_run_is(tmp_path):
    """Phase, stage and layer."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))  # rows and columns
    command = [sys.executable, "-m", "hf_semalign.cli", "quickstart", *SMALL, f"output_dir={tmp_path}"]
    command += ["training.frontier=single", "training.pairing=attribution"]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=tmp_path)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # Linux' way to say that the other side is closed
        pass
    assert process.wait() == 0
    text = shown.decode()
    for phase in ("attribution:", "source signals:", "training, stage 1/4, layer 0:", "training, stage 4/4, layer 3:"):
        assert phase in text, phase


def test_ctrl_c_ends_with_a_checkpoint_and_130(tmp_path):
    command = [sys.executable, "-m", "hf_semalign.cli", "quickstart", *SMALL, f"output_dir={tmp_path}"]
    process = subprocess.Popen([*command, "training.max_steps=100000"], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step 2 of"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 130
    assert list(tmp_path.glob("checkpoint-*/checksums.json"))
    assert "Interrupted: re-run the command to resume." in rest and "Traceback" not in rest


def test_a_kernel_that_is_never_used_is_not_missed(tmp_path):
    """Of 4-bit products, by bitsandbytes on some CPUs, when peft imports it."""
    assert main(["report", str(tmp_path)]) == 2
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_signals_in_parts_are_those_of_one_command(tmp_path, monkeypatch):
    """And training on them asks nothing of the source, whatever its seed."""
    monkeypatch.setattr(examples_module, "SHARD_TOKENS", 2**8)

    def command(name, folder, *more):
        settings = ["data.align=60", "data.eval=16", "training.max_steps=4", "baselines=[]", "training.frontier=single"]
        places = [f"output_dir={tmp_path / folder}", f"training.signals_dir={tmp_path / folder / 'signals'}"]
        return main([name, "--config", "recipes/quickstart/semalign.yaml", *settings, *places, *more])

    def states(folder):
        return {
            path.relative_to(tmp_path / folder): path.read_bytes() for path in (tmp_path / folder).rglob("*/0*.safetensors")
        }

    assert command("signals", "whole") == 0
    assert command("signals", "parts", "--part", "2/2") == 0
    assert 0 < len(states("parts")) < len(states("whole"))
    assert command("signals", "parts", "--part", "1/2") == 0
    assert states("parts") == states("whole")
    monkeypatch.setattr("hf_semalign.cache.source_pass.layer_pass", lambda *_, **__: pytest.fail("the source ran"))
    assert command("train", "parts", "training.seed=7") == 0


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_part_that_is_none_is_refused(part, capsys):
    with pytest.raises(SystemExit):
        main(["signals", "--config", "recipes/quickstart/semalign.yaml", "--part", part])
    assert f"{part!r} is no part: expected I/N with I from 1 to N, such as 1/4" in capsys.readouterr().err
