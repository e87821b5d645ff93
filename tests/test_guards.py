"""Runs that end early: refused beside another one, stopped by a signal with a checkpoint, or by a loss that is not finite."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from test_trainer import adapter, make_trainer
from transformers import TrainerCallback

from hf_semalign.files import claimed
from hf_semalign.training.checkpoints import CheckpointOnInterrupt, checkpoints_of, damage, last_checkpoint, rotate, seal

HOLD = """
import sys
from hf_semalign.files import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def another_run(tmp_path):
    """Another process that holds the run folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.communicate()


def test_a_second_run_in_one_folder_is_refused_until_the_first_is_over(tmp_path, another_run):
    trainer = make_trainer(tmp_path)
    before = adapter(trainer)
    with pytest.raises(ValueError, match=f"Another run is using {tmp_path / 'run'}, .*: wait until it ends, or choose another"):
        trainer.train()
    assert torch.equal(adapter(trainer), before)
    another_run.communicate()
    trainer.train()
    assert trainer.state.global_step == 6


def test_a_run_that_was_killed_holds_nothing(tmp_path, another_run):
    another_run.kill()
    another_run.wait()
    with claimed(tmp_path / "run"), claimed(tmp_path / "run"):
        pass


class SignalAt(TrainerCallback):
    """A signal to the own process in the middle of some step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_training_with_a_checkpoint_that_goes_on_to_the_same_adapter(tmp_path, number, ends):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stopped = make_trainer(tmp_path, callbacks=[SignalAt(3, number)])
    with pytest.raises(ends) as error:
        stopped.train()
    assert ends is KeyboardInterrupt or error.value.code == 143
    assert stopped.state.global_step == 3 and (tmp_path / "run" / "checkpoint-3").is_dir()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    again = make_trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    torch.testing.assert_close(adapter(again), adapter(whole), rtol=0, atol=0)


def test_a_signal_in_the_last_step_of_a_stage_moves_no_frontier_first(tmp_path):
    """The next stage's passes would take the time that there is for a checkpoint."""
    trainer = make_trainer(tmp_path, callbacks=[SignalAt(2, signal.SIGTERM)])
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.schedule.stage(2) == 1 and trainer._frontier_callback.stage == 0
    assert (tmp_path / "run" / "checkpoint-2" / "checksums.json").is_file()


def test_a_signal_in_the_last_step_ends_nothing_early(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[SignalAt(6, signal.SIGTERM)])
    trainer.train()
    assert trainer.state.global_step == 6


def test_a_second_signal_is_obeyed_at_once():
    guard, usual = CheckpointOnInterrupt(), signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist has another
    try:
        with guard.watching(), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            assert guard.received is signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, usual)


def test_signals_are_left_alone_outside_the_main_thread():
    seen = []

    def elsewhere():
        with CheckpointOnInterrupt().watching():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


class Break(TrainerCallback):
    """The target's head gives infinities from some step on."""

    def __init__(self, step):
        self.step, self.trainer, self.before = step, None, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.before = adapter(self.trainer)
            self.trainer.objective.target_head.weight.fill_(torch.inf)


def test_a_loss_that_is_not_finite_stops_before_anything_is_learnt_from_it(tmp_path):
    broken = Break(4)
    trainer = make_trainer(tmp_path, callbacks=[broken], save_strategy="steps", save_steps=1)
    broken.trainer = trainer
    pattern = (
        r"Not finite at step 4 of 6 \(stage 2\): the loss of the examples \[\d+(, \d+){3}\] is \(relation 0\.\d+, kl nan\)\. "
        r"Nothing was learnt from this step; the last checkpoint: .*checkpoint-3\. Lower"
    )
    with pytest.raises(FloatingPointError, match=pattern) as error:
        trainer.train()
    assert torch.equal(adapter(trainer), broken.before)
    known = {row["example_id"] for row in trainer.train_dataset}
    named = str(error.value).partition("examples [")[2].partition("]")[0]
    assert {int(one) for one in named.split(", ")} <= known
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [f"checkpoint-{k}" for k in (1, 2, 3)]


def test_a_gradient_that_is_not_finite_is_not_taken(tmp_path):
    trainer = make_trainer(tmp_path)
    before, (first, *_) = adapter(trainer), trainer.lora_layers[0]
    first.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(
        FloatingPointError, match=r"step 1 of 6 \(stage 1\): the gradient of the examples \[.*\] is, of a finite loss \(rel"
    ):
        trainer.train()
    assert torch.equal(adapter(trainer), before)


def test_a_checkpoint_that_is_damaged_is_named_and_passed_over(tmp_path, caplog):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    run = tmp_path / "run"
    assert last_checkpoint(run) == str(run / "checkpoint-6")
    weights = bytearray((run / "checkpoint-6" / "adapter_model.safetensors").read_bytes())
    weights[-5] ^= 1
    (run / "checkpoint-6" / "adapter_model.safetensors").write_bytes(weights)
    (run / "checkpoint-4" / "checksums.json").unlink()
    assert last_checkpoint(run) == str(run / "checkpoint-2")
    assert "checkpoint-6 is not used: altered adapter_model.safetensors" in caplog.text
    assert "checkpoint-4 is not used: it was never finished: checksums.json is missing" in caplog.text
    with pytest.raises(ValueError, match=r"cannot resume from .*checkpoint-6: altered adapter_model.safetensors. Name another"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(run / "checkpoint-6"))
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    assert damage(run / "checkpoint-2") == "missing optimizer.pt"
    with pytest.raises(ValueError, match=r"cannot resume from a checkpoint: none in .* is whole"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_older_checkpoints_go_when_a_new_one_is_whole(tmp_path, monkeypatch):
    there = []

    def watched(checkpoint):
        there.append(sorted(path.name for path in checkpoint.parent.glob("checkpoint-*")))
        seal(checkpoint)

    monkeypatch.setattr("hf_semalign.training.layerwise.seal", watched)
    make_trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1).train()
    assert there == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


def test_checkpoints_of_a_course_that_was_left_go(tmp_path):
    """Lest a run that starts anew, or from before an unfinished one, goes on from them when it is interrupted."""
    make_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    run = tmp_path / "run"
    (run / "checkpoint-6" / "checksums.json").unlink()
    anew = make_trainer(
        tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1, callbacks=[SignalAt(3, signal.SIGTERM)]
    )
    with pytest.raises(SystemExit):
        anew.train(resume_from_checkpoint=False)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"]
    assert last_checkpoint(run) == str(run / "checkpoint-3")


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    record = json.loads((checkpoint / "semalign.json").read_text())
    (checkpoint / "semalign.json").write_text(json.dumps(record | {"processes": 2}))
    seal(checkpoint)
    with pytest.raises(ValueError, match="made with other number of processes"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_rotation_counts_no_copies_and_spares_the_best(tmp_path):
    for name in ("checkpoint-2", "checkpoint-2-keep", "checkpoint-4", "checkpoint-6", "checkpoint-10"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints_of(tmp_path)] == [f"checkpoint-{step}" for step in (2, 4, 6, 10)]
    rotate(tmp_path, 2, str(tmp_path / "checkpoint-4"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2-keep", "checkpoint-4", "checkpoint-10"}
    rotate(tmp_path, None, None)
    rotate(tmp_path, 1, None)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2-keep", "checkpoint-10"}
