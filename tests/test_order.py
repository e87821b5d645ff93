"""The rows of each stage are known before training, and signals are computed for these rows alone."""

import pytest
import torch
from test_trainer import EVEN, ROWS, adapter, make_trainer

from hf_semalign import SemAlignTrainer
from hf_semalign.splits import valid_positions


class Seen:
    """The examples that each stage reads."""

    def __init__(self, trainer):
        self.by_stage = {}
        take = trainer.get_batch_samples

        def noted(*args):
            samples, count = take(*args)
            stage = trainer.schedule.stage(trainer.state.global_step)
            for batch in samples:
                kept = valid_positions(batch["labels"]).any(1)
                self.by_stage.setdefault(stage, set()).update(batch["example_id"][kept].tolist())
            return samples, count

        trainer.get_batch_samples = noted


ORDERS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_steps": 6},
    "dropped": {"dataloader_drop_last": True, "max_steps": 11},
    "epochs": {"max_steps": -1, "num_train_epochs": 2.5},
    "data seed": {"data_seed": 7},
    "sequential": {"train_sampling_strategy": "sequential"},
    "each stage": {"stage_budget": "per_stage", "max_steps": 2},
}


@pytest.mark.parametrize("case", ORDERS)
def test_the_rows_of_each_stage_are_known_before_training(tmp_path, case):
    trainer = make_trainer(tmp_path, train=ROWS[:15], **{"max_steps": 9, **ORDERS[case]})
    ids = torch.tensor(trainer.train_dataset["example_id"])
    planned = [set(ids[rows].tolist()) for rows in trainer.rows_by_stage()]
    seen = Seen(trainer)
    trainer.train()
    assert [seen.by_stage[stage] for stage in range(3)] == planned
    assert any(len(stage) < 15 for stage in planned)


def test_where_the_order_is_not_known_everything_is_computed(tmp_path):
    class Own(SemAlignTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(train_dataset)

    trainer = make_trainer(tmp_path, train_sampling_strategy="group_by_length")
    assert trainer.rows_by_stage() is None
    trainer.prepare()
    (align,) = [signals for split, signals in trainer.signals.splits.items() if split == "align"]
    assert all(not align._states.missing(align._mapped(k)) for k in trainer.pairing.source_layers)
    trainer = make_trainer(tmp_path / "own")
    trainer.__class__ = Own
    assert trainer.rows_by_stage() is None


def states_on_disk(signals):
    """Examples whose states are there, by column."""
    columns = {path.name for path in signals.folder.iterdir() if path.is_dir()}
    found = {}
    for name in columns:
        shards = signals._states._found.get(name) or {}
        places = [
            signals.examples.within(n) if some is None else some for n, files in shards.items() for some in files.values()
        ]
        found[name] = sum(map(len, places))
    return found


@pytest.mark.parametrize("frontier", ["single", "cumulative", "joint"])
def test_a_run_writes_what_its_steps_read_and_no_more(tmp_path, frontier):
    settings = {"train": ROWS[:16], "max_steps": 6, "frontier": frontier, **EVEN}
    trainer = make_trainer(tmp_path, **settings)
    trainer.prepare()
    rows, signals = trainer.rows_by_stage(), trainer.signals.training
    wanted = {signals._mapped(layer).name: set() for layer in trainer.pairing.source_layers}
    for stage, numbers in enumerate(rows):
        for k in trainer.frontier.supervised(stage):
            wanted[signals._mapped(trainer.pairing.source_layers[k]).name].update(numbers.tolist())
    wanted["final"] = set().union(*map(set, map(list, rows)))
    assert states_on_disk(signals) == {name: len(numbers) for name, numbers in wanted.items()}
    assert (frontier == "joint") == all(len(numbers) == 16 for numbers in wanted.values())
    trainer.train()
    online = make_trainer(tmp_path / "online", signals="online", **settings)
    online.train()
    torch.testing.assert_close(adapter(trainer), adapter(online), rtol=1e-5, atol=1e-6)


def test_another_seed_computes_what_is_missing_and_no_more(tmp_path):
    settings = {"train": ROWS[:16], "signals_dir": str(tmp_path / "signals"), "eval_strategy": "no", **EVEN}
    first = make_trainer(tmp_path / "1", seed=1, **settings)
    first.prepare()
    signals = first.signals.training
    before = states_on_disk(signals)
    other = make_trainer(tmp_path / "2", seed=2, **settings)
    lacked = [signals._states.missing(output.column, output.places) for output in signals.job(other._readings()).outputs]
    added = sum(len(places) for shards in lacked for places in shards.values())
    other.prepare()
    after = states_on_disk(other.signals.training)
    assert 0 < added == sum(after.values()) - sum(before.values()) < sum(before.values())
    alone = make_trainer(tmp_path / "alone", seed=2, **{**settings, "signals_dir": None})
    for trainer in (other, alone):
        trainer.train()
    torch.testing.assert_close(adapter(other), adapter(alone), rtol=1e-5, atol=1e-6)
    again, ran = make_trainer(tmp_path / "again", seed=2, **settings), []
    again.source_model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    again.prepare()
    assert not ran
