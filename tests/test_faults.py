"""Runs that are killed, files that are damaged, disks that are full: the same command again gives the same adapter."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from faults import run
from safetensors.torch import load_file

from hf_semalign.guards import last_checkpoint

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
    adapters = [load_file(path / "adapter_model.safetensors") for path in (folder, folder / "kd" / f"checkpoint-{STEPS}")]
    return metrics, [{name: tensor.tolist() for name, tensor in adapter.items()} for adapter in adapters]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run leaves that nothing happens to, its folder, and how many events each phase has."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, events = run(folder / "run", command(folder / "run"), folder / "log")
    assert code == 0, (folder / "log.out").read_text()[-3000:]
    return outcome(folder / "run"), folder / "run", phases(events)


def phases(events):
    """Events by phase."""
    return Counter(event.partition(": ")[0] for event in events)


ORDER = [
    "start", "attribution", "map", "signals", "signals", "switch", "prefix", "training", "checkpoint", "switch", "training",
    "checkpoint", "export", "results", "kd training", "kd checkpoint", "results",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path, undisturbed, seed):
    """In every phase at a random moment; what was finished is not done again."""
    draw, folder, kills = random.Random(seed), tmp_path / "run", []
    done: set[str] = set()  # phases that were over
    expected, _, counts = undisturbed
    for number, phase in enumerate([*ORDER, None]):
        before = last_checkpoint(folder) if folder.is_dir() else None
        moment = None if phase is None else (phase, draw.randint(1, max(1, counts[phase] // 4)))
        code, events = run(folder, command(folder), tmp_path / f"{number}.log", moment)
        assert code == (KILLED if phase else 0), (moment, (tmp_path / f"{number}.out").read_text()[-2000:])
        kills.append(moment)
        ran = phases(events)
        steps = [event for event in events if event.startswith("training: step")]
        if steps:
            first = int(before.rpartition("-")[2]) + 1 if before else 1
            assert steps[0] == f"training: step {first}", (moment, before)
        assert not done & set(ran), (moment, done & set(ran))
        done |= {"attribution"} if "map" in ran else set()
        done |= {"map"} if "signals" in ran else set()
        done |= {"signals"} if "switch" in ran else set()
        done |= {"switch", "prefix", "training", "checkpoint"} if "export" in ran else set()
    assert outcome(folder) == expected
