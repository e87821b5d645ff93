"""Several processes give the adapter that one gives, stage by stage: DDP, FSDP2 and ZeRO-2 over gloo, on CPUs."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from peft import PeftModel
from ranks import CASES, make, train
from safetensors.torch import load_file
from test_two_tokenizers import pair

from hf_semalign.cli import main

LAUNCH = [sys.executable, "-m", "torch.distributed.run"]


def run(arguments, timeout=400, **variables):
    """Start a program; its output, if it fails, is the failure."""
    environment = {**os.environ, **variables}
    command = [str(one) for one in arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process learns, by case."""
    folder = tmp_path_factory.mktemp("alone")
    pair(folder / "models")
    return {case: train(folder / case, case, 1) for case in CASES}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    """What several learn, and how many they are."""
    folder = tmp_path_factory.mktemp("ranks")
    pair(folder / "models")
    run([*LAUNCH, "--standalone", "--nproc_per_node", request.param, Path(__file__).with_name("ranks.py"), folder, *CASES])
    return torch.load(folder / "found.pt", weights_only=True), request.param


def distance(one, other):
    """Relative to the first."""
    return ((one - other).norm() / one.norm()).item()


def same_course(expected, found, case):
    """At equal global batch, after every stage; with a last batch that leaves all ranks but the first without rows."""
    same_ends(expected, found, case)
    for step, (one, other) in enumerate(zip(expected["gradients"], found["gradients"], strict=True)):
        assert distance(one, other) < 1e-4, step
    assert found["agreed"] == [True] * 12  # bit for bit


def same_ends(expected, found, case):
    """The same without the gradients themselves."""
    assert len(found["stages"]) == len(expected["stages"]) == (1 if case == "joint" else 3)
    for stage, (one, other) in enumerate(zip(expected["stages"], found["stages"], strict=True)):
        assert distance(one, other) < 1e-5, stage
    torch.testing.assert_close(found["history"], expected["history"], rtol=1e-4, atol=1e-6)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_ranks_learn_what_one_process_learns(alone, ranks, case):
    same_course(alone[case], ranks[0][case], case)


@pytest.mark.parametrize("case", CASES)
def test_signals_are_written_once_for_all_ranks(alone, ranks, case):
    found, number = ranks
    assert found[case]["written"] == alone[case]["written"]
    assert bool(alone[case]["written"]) is ("online" not in case)
    # Every rank asks for its own part first. Which of them writes it depends on who comes late.
    assert found[case]["own"]
    assert (0 < found[case]["passes"] <= number) is ("online" not in case)


def test_a_signal_to_one_rank_ends_all_after_one_step(alone, ranks):
    found = ranks[0]["stopped"]
    assert (found["code"], found["step"]) == (143, 5)
    assert found["agreed"] == [True] * 7
    assert distance(alone["cached"]["stages"][-1], found["adapter"]) < 1e-5


def test_a_loss_that_is_not_finite_at_one_rank_stops_all(ranks):
    found, number = ranks
    found = found["broken"]
    assert len(set(found["messages"])) == 1 and len(found["messages"]) == number
    last = found["ids"][-1]
    assert f"Not finite at step 5 of 12 (stage 2): the loss of the examples {last} is (relation" in found["messages"][0]
    assert found["whole"] == [True] * number


def test_ranks_that_drift_apart_stop(ranks):
    assert ranks[0]["drifted"]["message"].startswith("The ranks' adapters differ after step 4: ['")


RECIPE = ["--config", "recipes/quickstart/semalign.yaml"]
SETTINGS = [
    "training.max_steps=8", "training.frontier=single", "training.pairing=attribution", "training.save_strategy=steps",
    "training.save_steps=2", "data.align=60", "data.eval=16", "baselines=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe_alone(tmp_path_factory):
    """The run folder of a recipe in one process."""
    folder = tmp_path_factory.mktemp("recipe")
    assert main(["train", *RECIPE, *SETTINGS, f"output_dir={folder}"]) == 0
    return folder


def same_adapters(one, other):
    """After every stage, and at the end."""
    names = [*(f"checkpoint-{step}" for step in (2, 4, 6, 8)), "."]
    for name in names:
        expected, found = (load_file(folder / name / "adapter_model.safetensors") for folder in (one, other))
        flat = [torch.cat([tensors[key].flatten() for key in sorted(expected)]) for tensors in (expected, found)]
        assert distance(*flat) < 1e-5, name


def accelerate(config, *arguments, folder, script=("recipes/train.py",)):
    """`accelerate launch` of the recipe's script."""
    settings = [*SETTINGS, "training.per_device_train_batch_size=16", f"output_dir={folder}"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"recipes/accelerate/{config}.yaml"]
    return [*launch, "--num_processes", "2", *arguments, *script, *RECIPE, *settings]


def test_a_recipe_under_ddp(tmp_path, recipe_alone):
    """What the source says is written once, and the others find it."""
    done = run(accelerate("ddp", folder=tmp_path))
    same_adapters(recipe_alone, tmp_path)
    assert len(list(tmp_path.rglob("_signals/*/*/manifest.json"))) == done.stderr.count("MB of states go to") == 3


def test_a_recipe_on_two_machines_without_a_common_disk(tmp_path, recipe_alone):
    """Each has signals of its own; the first keeps the adapter."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    with ThreadPoolExecutor(2) as pool:
        machines = [
            pool.submit(run, accelerate("machines", *place, "--machine_rank", rank, folder=tmp_path / str(rank)))
            for rank in range(2)
        ]
        for machine in machines:
            assert machine.result().stderr.count("Loading the source") == 1
    same_adapters(recipe_alone, tmp_path / "0")
    assert not (tmp_path / "1" / "adapter_model.safetensors").exists()
    assert all(len(list((tmp_path / str(rank)).rglob("_signals/*/*/manifest.json"))) == 3 for rank in range(2))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """What two processes learn under FSDP2, and their folder."""
    folder = tmp_path_factory.mktemp("shards")
    run(accelerate("fsdp2", folder=folder / "recipe", script=[Path(__file__).with_name("shards.py"), folder]))
    return torch.load(folder / "found.pt", weights_only=True), folder


WHOLE = ("cached", "accumulated online", "joint")


@pytest.mark.parametrize("case", WHOLE)
def test_shards_learn_what_one_process_learns(alone, shards, case):
    """Through accelerate's own FSDP2."""
    found = shards[0][case]
    same_course(alone[case], found, case)
    assert found["held"] == alone[case]["held"] / 2


def test_shards_in_bfloat16(tmp_path, shards):
    """As near as its rounding lets them come: 0.02 lie between one batch and its halves in one process."""
    expected, found = train(tmp_path, "bf16", 1), shards[0]["bf16"]
    torch.testing.assert_close(found["history"][:, :3], expected["history"][:, :3], rtol=2e-2, atol=1e-3)
    assert distance(expected["stages"][0], found["stages"][0]) < 0.05


def test_shards_under_activation_checkpointing(alone, shards):
    same_course(alone["cached"], shards[0]["checkpointed"], "cached")


def test_shards_end_on_a_signal_and_go_on_to_the_very_same_adapter(shards):
    found = shards[0]["stopped"]
    assert (found["code"], found["step"]) == (143, 5)
    assert torch.equal(found["adapter"], shards[0]["cached"]["stages"][-1])


def test_shards_stop_on_a_loss_that_is_not_finite(shards):
    found = shards[0]["broken"]
    assert len(set(found["messages"])) == 1 and "Not finite at step 5 of 12 (stage 2)" in found["messages"][0]
    assert found["whole"] == [True] * 2


@pytest.mark.parametrize("case", WHOLE)
def test_the_adapter_of_shards_is_whole(shards, case):
    """For plain peft, all layers of it."""
    found, folder = shards
    loaded = PeftModel.from_pretrained(tiny_llama(3, 16, seed=1, pad_token_id=0), folder / case / "saved")
    flat = torch.cat([p.flatten() for name, p in loaded.named_parameters() if "lora_" in name])
    assert torch.equal(flat, found[case]["stages"][-1])


def test_a_recipe_under_fsdp2(shards, recipe_alone):
    """Evaluation and generation before and after, and a checkpoint in every stage."""
    same_adapters(recipe_alone, shards[1] / "recipe")


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    """What two processes learn under ZeRO-2, and their folder."""
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: it is no dependency of ours")
    folder = tmp_path_factory.mktemp("zero")
    command = accelerate("zero2", folder=folder / "recipe", script=[Path(__file__).with_name("zero.py"), folder])
    run([*command, "training.ddp_backend=gloo"], DS_ACCELERATOR="cpu")
    return torch.load(folder / "found.pt", weights_only=True), folder


@pytest.mark.parametrize("case", [*CASES, "checkpointed"])
def test_zero_learns_what_one_process_learns(alone, zero, case):
    """With layers that were frozen before, and are afterwards: neither their momentum nor decay moves them."""
    expected = alone["cached" if case == "checkpointed" else case]
    same_ends(expected, zero[0][case], case)
    assert zero[0][case]["written"] == expected["written"]


def test_zero_in_bfloat16(tmp_path, zero):
    expected, found = train(tmp_path, "bf16", 1), zero[0]["bf16"]
    torch.testing.assert_close(found["history"][:, :3], expected["history"][:, :3], rtol=2e-2, atol=1e-3)
    assert distance(expected["stages"][0], found["stages"][0]) < 0.05


def test_zero_ends_on_a_signal_and_goes_on_to_the_very_same_adapter(zero):
    found = zero[0]["stopped"]
    assert (found["code"], found["step"]) == (143, 5)
    assert torch.equal(found["adapter"], zero[0]["cached"]["stages"][-1])


def test_zero_stops_on_a_loss_that_is_not_finite(zero):
    found = zero[0]["broken"]
    assert len(set(found["messages"])) == 1 and "Not finite at step 5 of 12 (stage 2)" in found["messages"][0]
    assert found["whole"] == [True] * 2


def test_zero_trains_twice_in_one_process(tmp_path, zero):
    trainer, note = make(tmp_path, "cached", 1)
    trainer.train()
    trainer.optimizer = None  # as under DeepSpeed, where every training has its own
    trainer.train()
    for one, other in zip(note.stages, zero[0]["twice"]["stages"], strict=True):
        assert distance(one, other) < 1e-5


def test_the_adapter_of_zero_is_whole(zero):
    loaded = PeftModel.from_pretrained(tiny_llama(3, 16, seed=1, pad_token_id=0), zero[1] / "cached" / "saved")
    flat = torch.cat([p.flatten() for name, p in loaded.named_parameters() if "lora_" in name])
    assert torch.equal(flat, zero[0]["cached"]["stages"][-1])


def test_a_checkpoint_of_zero_is_refused_elsewhere(tmp_path, zero):
    """One process would go on without the optimizer's states."""
    checkpoint = zero[1] / "stopped" / "run" / "checkpoint-5"
    with pytest.raises(ValueError, match="was made under DeepSpeed: resume with the accelerate config of its run"):
        make(tmp_path, "cached", 1)[0].train(resume_from_checkpoint=str(checkpoint))


def test_a_recipe_under_zero(zero, recipe_alone):
    """Evaluation and generation before and after, and a checkpoint in every stage."""
    same_adapters(recipe_alone, zero[1] / "recipe")
