"""The frontier: steps dealt out evenly, the stage from the step alone, and only the stage's layers trainable."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerControl, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from hf_semalign.method.frontier import Frontier, FrontierSchedule, stage_learning_rate
from hf_semalign.training.stages import FrontierCallback, train_only


def parameters(layers=4, each=2):
    return [[nn.Parameter(torch.ones(3)) for _ in range(each)] for _ in range(layers)]


def trainable(layers):
    """Indices of the layers that train; a layer must be of one mind."""
    modes = [{parameter.requires_grad for parameter in layer} for layer in layers]
    assert all(len(mode) == 1 for mode in modes)
    return [index for index, mode in enumerate(modes) if True in mode]


# Schedule


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 12, 32])
@pytest.mark.parametrize("extra", [0, 1, 2, 7, 31, 100, 1000])
def test_every_stage_gets_its_share_of_steps(stages, extra):
    total = stages + extra
    schedule = FrontierSchedule(stages, total)
    counts = [schedule.steps(stage) for stage in range(stages)]
    assert sum(counts) == total == schedule.total_steps
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1
    assert schedule.boundaries[0] == 0 and schedule.boundaries[-1] == total and len(schedule.boundaries) == stages + 1
    dealt = [stage for stage in range(stages) for _ in range(counts[stage])]
    assert [schedule.stage(step) for step in range(total)] == dealt
    for stage in range(stages):
        assert schedule.stage(schedule.boundaries[stage]) == stage == schedule.stage(schedule.boundaries[stage + 1] - 1)


def test_steps_after_the_end_belong_to_the_last_stage():
    schedule = FrontierSchedule(3, 10)
    assert [schedule.stage(step) for step in (9, 10, 11, 1000)] == [2, 2, 2, 2]


@pytest.mark.parametrize(("stages", "steps"), [(1, 1), (4, 1), (4, 7)])
def test_per_stage_budget_gives_every_stage_all_steps(stages, steps):
    schedule = FrontierSchedule(stages, steps, budget="per_stage")
    assert schedule.total_steps == stages * steps and {schedule.steps(stage) for stage in range(stages)} == {steps}


@pytest.mark.parametrize(("stages", "steps"), [(2, 1), (12, 11), (5, 0)])
def test_fewer_steps_than_stages_are_refused_with_the_smallest_budget(stages, steps):
    with pytest.raises(ValueError, match=rf"^{steps} optimizer steps for {stages} stages.*smallest budget is {stages} steps"):
        FrontierSchedule(stages, steps)


def test_an_unknown_budget_is_refused():
    with pytest.raises(ValueError, match=r"stage_budget is 'whole': expected one of \('split', 'per_stage'\)"):
        FrontierSchedule(2, 4, budget="whole")


# Frontier


@pytest.mark.parametrize(
    ("kind", "stages", "trained", "supervised"),
    [
        ("single", 3, [[0], [1], [2]], [[0], [1], [2]]),
        ("cumulative", 3, [[0], [0, 1], [0, 1, 2]], [[0], [1], [2]]),
        ("joint", 1, [[0, 1, 2]], [[0, 1, 2]]),
    ],
)
def test_layers_that_each_stage_trains_and_supervises(kind, stages, trained, supervised):
    frontier = Frontier(kind, 3)
    assert frontier.num_stages == stages
    assert [list(frontier.trained(stage)) for stage in range(stages)] == trained
    assert [list(frontier.supervised(stage)) for stage in range(stages)] == supervised


# Learning rate


@pytest.mark.parametrize("warmup", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "transformers_schedule"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_learning_rate_is_the_transformers_schedule_anew_in_each_stage(name, transformers_schedule, warmup):
    schedule = FrontierSchedule(3, 20)  # 6, 7 and 7 steps
    factor = stage_learning_rate(schedule, name, 1.0, lambda steps: warmup)
    expected = []
    for stage in range(3):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        within = transformers_schedule(optimizer, warmup, schedule.steps(stage))
        for _ in range(schedule.steps(stage)):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            within.step()
    assert [factor(step) for step in range(20)] == pytest.approx(expected, abs=1e-12)
    assert factor(20) == pytest.approx(0, abs=1e-12)


def test_warmup_is_asked_for_the_steps_of_a_stage():
    factor = stage_learning_rate(FrontierSchedule(3, 20), "constant_with_warmup", 1.0, lambda steps: steps // 2)
    assert [factor(step) for step in range(20)] == pytest.approx(
        [*(0, 1 / 3, 2 / 3, 1, 1, 1), *(0, 1 / 3, 2 / 3, 1, 1, 1, 1), *(0, 1 / 3, 2 / 3, 1, 1, 1, 1)]
    )


def test_schedule_arguments_reach_the_schedule():
    factor = stage_learning_rate(FrontierSchedule(2, 8), "polynomial", 1.0, lambda steps: 0, {"power": 2.0, "lr_end": 0.0})
    assert [factor(step) for step in range(8)] == pytest.approx([1, 9 / 16, 1 / 4, 1 / 16] * 2)


def test_floors_refer_to_the_learning_rate():
    factor = stage_learning_rate(FrontierSchedule(2, 40), "cosine_with_min_lr", 1e-2, lambda steps: 0, {"min_lr": 5e-3})
    assert 1e-2 * factor(0) == pytest.approx(1e-2)
    assert min(1e-2 * factor(step) for step in range(40)) == pytest.approx(5e-3, rel=0.02)


def test_a_schedule_that_is_no_function_of_the_step_is_refused():
    with pytest.raises(ValueError, match="'reduce_lr_on_plateau' cannot restart with each stage"):
        stage_learning_rate(FrontierSchedule(2, 4), "reduce_lr_on_plateau", 1.0, lambda steps: 0)


# Freezing


def test_train_only_freezes_the_others_and_drops_their_gradients():
    layers = parameters()
    for layer in layers:
        for parameter in layer:
            parameter.grad = torch.ones(3)
    train_only(layers, range(1, 3))
    assert trainable(layers) == [1, 2]
    assert [layer[0].grad is not None for layer in layers] == [False, True, True, False]
    train_only(layers, range(3, 4))
    assert trainable(layers) == [3] and all(parameter.grad is None for layer in layers for parameter in layer)


def test_adamw_leaves_frozen_layers_alone_in_spite_of_their_moments_and_decay():
    layers = parameters(layers=2)
    optimizer = torch.optim.AdamW([p for layer in layers for p in layer], lr=0.1, weight_decay=0.5)
    for stage in range(2):
        train_only(layers, range(stage, stage + 1))
        before = [layer[0].detach().clone() for layer in layers]
        for _ in range(2):
            sum(p.square().sum() for layer in layers for p in layer if p.requires_grad).backward()
            optimizer.step()
        moved = [not torch.equal(layer[0], start) for layer, start in zip(layers, before, strict=True)]
        assert moved == [stage == 0, stage == 1]


@pytest.mark.parametrize("start", [0, 1, 4, 9])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("single", {0: [0], 1: [1], 2: [2]}),
        ("cumulative", {0: [0], 1: [0, 1], 2: [0, 1, 2]}),
        ("joint", {0: [0, 1, 2]}),
    ],
)
def test_callback_derives_the_stage_from_the_global_step_alone(kind, expected, start):
    layers, frontier = parameters(layers=3), Frontier(kind, 3)
    schedule = FrontierSchedule(frontier.num_stages, 10)
    callback = FrontierCallback(frontier, schedule, layers)
    state = SimpleNamespace(global_step=start)
    callback.on_train_begin(None, state, None)
    for step in range(start, 10):
        assert trainable(layers) == expected[schedule.stage(step)] and callback.stage == schedule.stage(step)
        state.global_step = step + 1
        callback.on_step_end(None, state, TrainerControl())
    assert trainable(layers) == expected[frontier.num_stages - 1]


def test_callback_freezes_again_after_something_else_unfroze():
    # Loading an adapter makes all of LoRA trainable; a second run of one trainer begins at its first stage.
    layers = parameters(layers=3)
    callback = FrontierCallback(Frontier("single", 3), FrontierSchedule(3, 9), layers)
    for step in (4, 4, 0):
        train_only(layers, range(3))
        callback.on_train_begin(None, SimpleNamespace(global_step=step), None)
        assert trainable(layers) == [step // 3]
