"""Runs that are killed, files that are damaged, disks that are full: the same command again gives the same adapter."""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from faults import run
from safetensors.torch import load_file

from hf_semalign.training.checkpoints import last_checkpoint

STEPS = 12  # three of each stage
ARGUMENTS = [
    "train", "--config", str(Path(__file__).parents[1] / "recipes" / "quickstart" / "semalign.yaml"),
    "data.extract=16", "data.align=48", "data.eval=8", "training.frontier=single", "training.pairing=attribution",
    f"training.max_steps={STEPS}", "training.per_device_train_batch_size=16", "training.per_device_eval_batch_size=16",
    "training.save_strategy=steps", "training.save_steps=2", "training.save_total_limit=2", "training.logging_steps=1",
]  # fmt: skip
KILLED = -9


def command(folder):
    return [*ARGUMENTS, f"output_dir={folder}"]


def outcome(folder):
    """What a run leaves: its adapter, the baseline's, and the figures of both."""
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    return metrics, [learnt(folder), learnt(folder / "kd" / f"checkpoint-{STEPS}")]


def learnt(folder):
    """The adapter of a folder."""
    return {name: tensor.tolist() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run leaves that nothing happens to, how many events each phase has, and the events."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, events = run(folder / "run", command(folder / "run"), folder / "log")
    assert code == 0, (folder / "log.out").read_text()[-3000:]
    return outcome(folder / "run"), phases(events), events


def phases(events):
    """Events by phase."""
    return Counter(event.partition(": ")[0] for event in events)


ORDER = [
    "start", "attribution", "map", "signals", "signals", "prefix", "training", "checkpoint", "prefix", "training", "checkpoint",
    "export", "results", "kd training", "kd checkpoint", "results",
]  # fmt: skip


SOME = ["signals", "prefix", "training", "checkpoint", "export"]


@pytest.mark.parametrize(("seed", "order"), [(0, SOME), pytest.param(1, ORDER, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path, undisturbed, seed, order):
    """At a random moment of some phases, in the slow tests of all. What was finished is not done again."""
    draw, folder, kills = random.Random(seed), tmp_path / "run", []
    done: set[str] = set()  # phases that were over
    expected, counts, everything = undisturbed
    first = next(place for place, event in enumerate(everything) if event.startswith("attribution: "))
    counts = {**counts, "start": 4 * first}  # what comes before anything is finished
    for number, phase in enumerate([*order, None]):
        before = last_checkpoint(folder) if folder.is_dir() else None
        moment = None if phase is None else (phase, draw.randint(1, max(1, counts[phase] // 4)))
        code, events = run(folder, command(folder), tmp_path / f"{number}.log", moment)
        assert code == (KILLED if phase else 0), (moment, (tmp_path / f"{number}.out").read_text()[-2000:])
        kills.append(moment)
        ran = phases(events)
        steps = [event for event in events if event.startswith("training: step")]
        if steps:
            following = int(before.rpartition("-")[2]) + 1 if before else 1
            assert steps[0] == f"training: step {following}", (moment, before)
        assert not done & set(ran), (moment, done & set(ran))
        done |= {"attribution"} if "map" in ran else set()
        done |= {"map"} if "signals" in ran else set()
        done |= {"signals"} if "prefix" in ran else set()
        done |= {"prefix", "training", "checkpoint"} if "export" in ran else set()
    assert outcome(folder) == expected


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, undisturbed):
    """A run folder that was killed in the step before the last, with files of every kind in it."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    training = [event for event in undisturbed[2] if event.startswith("training: ")]
    moment = ("training", training.index(f"training: step {STEPS - 1}") + 1)
    assert run(folder, command(folder), folder.with_name("log"), moment)[0] == KILLED
    return folder


def files(folder):
    """All that is kept there but for locks."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "lock" not in path.name)


def damage(path, draw):
    """Flip a bit, cut the file short or delete it."""
    how, content = draw.choice(("flip", "truncate", "delete")), bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    else:
        place = draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content if how == "flip" else content[:place])
    return how


ROUNDS, AT_ONCE = 10, 10


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed > 1)) for seed in range(ROUNDS)])
def test_damaged_files_are_named_and_made_again(tmp_path, undisturbed, interrupted, seed):
    """A hundred random damages, ten at once, eighty of them in the slow tests; the adapter is that of an undisturbed run."""
    draw, folder = random.Random(seed), tmp_path / "run"
    shutil.copytree(interrupted, folder)
    damaged = {path: damage(folder / path, draw) for path in draw.sample(files(folder), AT_ONCE)}
    code, _ = run(folder, [*command(folder), "baselines=[]"], tmp_path / "log")
    said = (tmp_path / "log.out").read_text()
    assert code == 0, (damaged, said[-3000:])
    assert learnt(folder) == undisturbed[0][1][0], damaged
    passed_over = f"checkpoint-{STEPS - 4}"  # an older one, that nobody had to look at
    for path, how in damaged.items():
        named = path.name in said or f"{path.parts[0]} is not used" in said
        assert named or how == "delete" or path.parts[0] == passed_over, (path, how)


def test_there_are_files_of_every_kind_to_damage(interrupted):
    names = {str(path) for path in files(interrupted)}
    kinds = [
        "semantic_map.safetensors", "checkpoint-8/optimizer.pt", "checkpoint-10/adapter_model.safetensors", "source.json",
        "checkpoint-10/checksums.json", "checkpoint-10/trainer_state.json", "config.json", "head.safetensors", "scores-",
        "evaluation-", "manifest.json", "final/00000.safetensors", "layer-",
    ]  # fmt: skip
    assert all(any(kind in name for name in names) for kind in kinds)


def limited(arguments, size):
    """The command line where no file may grow beyond some bytes, as on a disk that is full."""
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}));"
        "from hf_semalign.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("size", "finished"), [(20_000, ["head.safetensors", "scores-"]), (130_000, ["layer-", "checkpoint-4/checksums.json"])]
)
def test_a_full_disk_is_a_clear_error_and_what_was_finished_is_used(tmp_path, undisturbed, size, finished):
    """While the source's signals are written, and while a checkpoint is."""
    folder = tmp_path / "run"
    done = limited(command(folder), size)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "could not be written; the disk may be full" in done.stderr and "re-run the command to resume" in done.stderr
    names = [str(path) for path in files(folder)]
    assert all(any(part in name for name in names) for part in finished), names
    assert not any("unfinished" in name for name in names)
    code, events = run(folder, command(folder), tmp_path / "log")
    assert code == 0
    assert outcome(folder) == undisturbed[0]
    ran = set(phases(events))
    assert "attribution" not in ran and ("signals" in ran) is (size == 20_000)
    assert ("training: step 1" in events) is (size == 20_000)
