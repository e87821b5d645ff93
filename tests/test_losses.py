"""Losses: equal to the float64 reference, blind to what is not valid, and never holding what they must not hold."""

from itertools import accumulate

import pytest
import reference
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from hf_semalign.method import losses
from hf_semalign.method.losses import (
    fisher_loss,
    output_kl,
    relation_loss,
    relation_sequences,
    sequence_relation_losses,
    steering_loss,
    token_class_kl,
    token_cross_entropy,
    token_fisher_losses,
    token_kl,
    token_steering_losses,
)
from hf_semalign.method.prefix_classes import PrefixClasses
from hf_semalign.models.anatomy import Head

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
SHAPES = [(1, 3, 4), (3, 7, 5), (4, 12, 8)]


def hidden_states(shape, seed=0, dtype=torch.float64):
    """``x, y, y~`` and a random mask of uneven numbers of valid positions, three at least in the first sequence."""
    generator = torch.Generator().manual_seed(seed)
    x, y, y_tilde = torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(dtype)
    valid = torch.rand(shape[:2], generator=generator) < 0.6
    valid[0, :3] = True
    return x, y, y_tilde, valid


def rotation(width, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]


def heads(positions=6, vocabulary=23, widths=(5, 7), seed=0, dtype=torch.float64):
    """``target_hidden, target_weight, source_hidden, source_weight``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(positions, widths[0]), (vocabulary, widths[0]), (positions, widths[1]), (vocabulary, widths[1])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


class LargestOutput(TorchDispatchMode):
    """Records the largest tensor that any operation gives, backward included."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def peak_elements(function):
    """Most float32 elements that a call held at one time beyond what there was before, by the allocator's account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes)) / 4


# Relation loss


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_relation_loss_equals_the_reference(shape, seed, dtype):
    x, y, y_tilde, valid = hidden_states(shape, seed, dtype)
    loss = relation_loss(x, y, y_tilde, valid)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(reference.relation(x, y, y_tilde, valid).item(), rel=TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES)
def test_relation_gradient_equals_autograd_of_the_reference(shape):
    x, y, y_tilde, valid = hidden_states(shape)
    ours, theirs = y.clone().requires_grad_(), y.clone().requires_grad_()
    relation_loss(x, ours, y_tilde, valid).backward()
    reference.relation(x, theirs, y_tilde, valid).backward()
    assert theirs.grad.abs().max() > 1e-3
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [3, 512])
def test_relation_gradient_passes_gradcheck(rows, monkeypatch):
    monkeypatch.setattr(losses, "RELATION_ROWS", rows)
    x, y, y_tilde, valid = hidden_states((2, 5, 3))
    assert torch.autograd.gradcheck(lambda y: relation_loss(x, y, y_tilde, valid), y.requires_grad_())


def test_relation_loss_is_zero_on_identical_geometry():
    x, y, _, valid = hidden_states((3, 8, 6))
    same_up_to_rotation_scale_and_shift = x + 2.5 * (y - x) @ rotation(6) + 7
    assert relation_loss(x, y, y, valid).item() == pytest.approx(0, abs=1e-20)
    assert relation_loss(x, y, same_up_to_rotation_scale_and_shift, valid).item() == pytest.approx(0, abs=1e-20)
    assert relation_loss(x, y, x - (y - x).flip(1), valid).item() > 0.01


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x, y, s: (x, y + 3, s), id="outputs shifted alike in all tokens"),
        pytest.param(lambda x, y, s: (x, y, s - 3), id="supervision shifted alike in all tokens"),
        pytest.param(lambda x, y, s: (x @ rotation(6), y @ rotation(6), s @ rotation(6)), id="space rotated"),
        pytest.param(lambda x, y, s: (x, y, x + (s - x) @ rotation(6)), id="supervision residual rotated alone"),
        pytest.param(lambda x, y, s: (x, x + (y - x) @ rotation(6), s), id="residual rotated alone"),
        pytest.param(lambda x, y, s: (x, x + 4 * (y - x), x + (s - x) / 4), id="residuals scaled"),
    ],
)
def test_relation_loss_does_not_change_with(change):
    x, y, supervision, valid = hidden_states((3, 8, 6))
    before = relation_loss(x, y, supervision, valid)
    assert before > 0.05
    torch.testing.assert_close(relation_loss(*change(x, y, supervision), valid), before, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x, y, s: (x, y @ rotation(6), s), id="output, not residual, rotated"),
        pytest.param(lambda x, y, s: (x, y, s @ rotation(6)), id="supervision, not residual, rotated"),
        pytest.param(lambda x, y, s: (x, -y, s), id="output turned around"),
        pytest.param(lambda x, y, s: (x + 2 * s, y, s), id="another input"),
    ],
)
def test_relation_loss_changes_with(change):
    x, y, supervision, valid = hidden_states((3, 8, 6))
    before = relation_loss(x, y, supervision, valid)
    assert (relation_loss(*change(x, y, supervision), valid) - before).abs() > 1e-3


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
def test_positions_that_are_not_valid_change_nothing(garbage):
    x, y, supervision, valid = hidden_states((3, 8, 6), dtype=torch.float32)
    filled = [torch.where(valid.unsqueeze(-1), states, garbage) for states in (x, y, supervision)]
    padded = [F.pad(states, (0, 0, 0, 4), value=garbage) for states in filled]
    longer = F.pad(valid, (0, 4), value=False)
    outputs = padded[1].requires_grad_()
    loss = relation_loss(padded[0], outputs, padded[2], longer)
    loss.backward()
    clean = y.clone().requires_grad_()
    expected = relation_loss(x, clean, supervision, valid)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(outputs.grad[:, :8][valid], clean.grad[valid], rtol=1e-4, atol=1e-7)
    assert torch.count_nonzero(outputs.grad[~longer]) == 0
    steering = steering_loss(padded[1], padded[2], longer)
    torch.testing.assert_close(steering, steering_loss(y, supervision, valid), rtol=1e-6, atol=0)


def test_sequences_with_fewer_than_two_valid_positions_add_nothing():
    x, y, supervision, valid = hidden_states((4, 7, 5))
    valid[0] = valid[2] = True
    valid[1], valid[3] = False, torch.arange(7) == 4
    outputs = y.clone().requires_grad_()
    loss = relation_loss(x, outputs, supervision, valid)
    loss.backward()
    kept = [0, 2]
    torch.testing.assert_close(loss, relation_loss(x[kept], y[kept], supervision[kept], valid[kept]), rtol=1e-12, atol=0)
    assert relation_sequences(valid).tolist() == [True, False, True, False]
    assert torch.count_nonzero(outputs.grad[[1, 3]]) == 0 and outputs.grad[kept].abs().max() > 0


@pytest.mark.parametrize("valid_positions", [0, 1])
def test_a_batch_without_relations_gives_zero_and_a_finite_gradient(valid_positions):
    x, y, supervision, _ = hidden_states((3, 6, 4), dtype=torch.float32)
    valid = torch.arange(6).expand(3, 6) < valid_positions
    loss = relation_loss(x, y.requires_grad_(), supervision, valid)
    loss.backward()
    assert loss.item() == 0 and torch.count_nonzero(y.grad) == 0


def test_sequences_weigh_alike_whatever_their_length():
    x, y, supervision, valid = hidden_states((3, 9, 5))
    valid[0], valid[1], valid[2] = torch.arange(9) < 9, torch.arange(9) < 3, torch.arange(9) > 4
    each = sequence_relation_losses(x, y, supervision, valid)
    alone = [relation_loss(*(part[b : b + 1] for part in (x, y, supervision, valid))) for b in range(3)]
    torch.testing.assert_close(each, torch.stack(alone), rtol=1e-12, atol=0)
    torch.testing.assert_close(relation_loss(x, y, supervision, valid), each.mean(), rtol=1e-12, atol=0)


def test_inputs_and_supervision_get_no_gradient():
    x, y, supervision, valid = hidden_states((2, 6, 4))
    x, y, supervision = (states.requires_grad_() for states in (x, y, supervision))
    (relation_loss(x, y, supervision, valid) + steering_loss(y, supervision, valid)).backward()
    assert x.grad is None and supervision.grad is None and y.grad.abs().max() > 0


@pytest.mark.parametrize("rows", [1, 3, 11, 12])
def test_row_blocks_change_neither_value_nor_gradient(rows, monkeypatch):
    x, y, supervision, valid = hidden_states((3, 12, 5))
    results = []
    for block in (512, rows):
        monkeypatch.setattr(losses, "RELATION_ROWS", block)
        outputs = y.clone().requires_grad_()
        each = sequence_relation_losses(x, outputs, supervision, valid)
        each.sum().backward()
        results.append((each.detach(), outputs.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("length", [128, 512])
def test_relation_matrices_are_never_whole(length, monkeypatch):
    monkeypatch.setattr(losses, "RELATION_ROWS", 32)
    x, y, supervision, _ = hidden_states((2, length, 1), dtype=torch.float32)
    everywhere = torch.ones(2, length, dtype=torch.bool)

    def both_ways():
        relation_loss(x, y.clone().requires_grad_(), supervision, everywhere).backward()

    with LargestOutput() as largest:
        both_ways()
    assert largest.numel == 2 * 32 * length
    assert peak_elements(both_ways) < 3 * 2 * 32 * length  # two blocks, and states of a thirtieth of a block each


def test_relations_are_taken_of_valid_positions_alone():
    x, y, supervision, _ = hidden_states((2, 64, 3))
    valid = torch.arange(64) % 3 == 1
    with LargestOutput() as largest:
        relation_loss(x, y.requires_grad_(), supervision, valid.expand(2, 64)).backward()
    assert largest.numel == 2 * int(valid.sum()) ** 2


def test_bf16_states_are_compared_in_float32():
    x, y, supervision, valid = hidden_states((3, 8, 6), dtype=torch.bfloat16)
    outputs = y.clone().requires_grad_()
    loss = relation_loss(x, outputs, supervision, valid)
    loss.backward()
    assert loss.dtype == torch.float32 and outputs.grad.dtype == torch.bfloat16 and outputs.grad.isfinite().all()
    upcast = [states.float() for states in (x, y, supervision)]
    torch.testing.assert_close(loss, relation_loss(*upcast, valid), rtol=1e-6, atol=0)
    torch.testing.assert_close(steering_loss(y, supervision, valid), steering_loss(*upcast[1:], valid), rtol=1e-6, atol=0)


# Steering


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_steering_loss_equals_the_reference(shape, dtype):
    _, y, y_tilde, valid = hidden_states(shape, dtype=dtype)
    expected = reference.steering(y, y_tilde, valid)
    assert steering_loss(y, y_tilde, valid).item() == pytest.approx(expected.item(), rel=TOLERANCE[dtype])
    assert token_steering_losses(y[valid], y_tilde[valid]).shape == (int(valid.sum()),)


def test_steering_loss_is_0_along_1_across_and_2_against():
    y = torch.eye(4, dtype=torch.float64)[None, :3]
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    for supervision, expected in ((5 * y, 0), (y.roll(1, dims=-1), 1), (-y, 2)):
        assert steering_loss(y, supervision, everywhere).item() == pytest.approx(expected, abs=1e-12)


def test_steering_gradient_passes_gradcheck():
    _, y, y_tilde, valid = hidden_states((2, 4, 3))
    assert torch.autograd.gradcheck(lambda y: steering_loss(y, y_tilde, valid), y.requires_grad_())


def test_steering_loss_without_valid_positions_is_zero_with_a_finite_gradient():
    _, y, supervision, valid = hidden_states((2, 4, 3))
    loss = steering_loss(y.requires_grad_(), supervision, torch.zeros_like(valid))
    loss.backward()
    assert loss.item() == 0 and torch.count_nonzero(y.grad) == 0


# Output KL


def full_kl(target_hidden, target_weight, source_hidden, source_weight):
    target_log = (target_hidden @ target_weight.T).log_softmax(-1)
    source_log = (source_hidden @ source_weight.T).log_softmax(-1)
    return F.kl_div(target_log, source_log, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 4, 256])
def test_output_kl_and_its_gradient_equal_those_through_full_logits(rows, dtype, monkeypatch):
    monkeypatch.setattr(losses, "LOGIT_ROWS", rows)
    target_hidden, *rest = heads(dtype=dtype)
    ours, theirs = target_hidden.clone().requires_grad_(), target_hidden.clone().requires_grad_()
    loss, expected = output_kl(ours, *rest), full_kl(theirs, *rest)
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE[dtype]) and loss > 0.1
    assert loss.item() == pytest.approx(reference.kl(target_hidden, *rest).item(), rel=TOLERANCE[dtype])
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=5 * TOLERANCE[dtype])


def test_output_kl_is_forward_from_source_to_target():
    target_hidden, target_weight, source_hidden, source_weight = heads(widths=(5, 5))
    forward = output_kl(target_hidden, target_weight, source_hidden, source_weight)
    backward = output_kl(source_hidden, source_weight, target_hidden, target_weight)
    expected = reference.kl(target_hidden, target_weight, source_hidden, source_weight)
    assert forward.item() == pytest.approx(expected.item(), rel=1e-10) and (forward - backward).abs() > 0.1


def test_output_kl_is_zero_for_equal_distributions():
    hidden, weight, *_ = heads()
    turn = rotation(5)
    hidden.requires_grad_()
    loss = output_kl(hidden, weight, hidden.detach() @ turn, weight @ turn)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-13) and hidden.grad.abs().max() < 1e-13


def test_token_kl_gradient_passes_gradcheck_and_reaches_the_target_states_alone():
    tensors = [tensor.requires_grad_() for tensor in heads(positions=3, vocabulary=6)]
    assert torch.autograd.gradcheck(lambda hidden: token_kl(hidden, *tensors[1:]), tensors[0])
    output_kl(*tensors).backward()
    assert tensors[0].grad is not None and all(tensor.grad is None for tensor in tensors[1:])


@pytest.mark.parametrize("positions", [20, 200])
def test_memory_of_the_output_kl_grows_with_chunk_and_vocabulary_alone(positions, monkeypatch):
    monkeypatch.setattr(losses, "LOGIT_ROWS", 4)
    vocabulary = 2000
    target_hidden, *rest = heads(positions, vocabulary, widths=(2, 3), dtype=torch.float32)
    target_hidden.requires_grad_()

    def all_losses():
        output_kl(target_hidden, *rest).backward()
        token_cross_entropy(target_hidden, rest[0], torch.zeros(positions, dtype=torch.long))

    with LargestOutput() as largest:
        all_losses()
    assert largest.numel == 3 * 4 * vocabulary
    assert peak_elements(all_losses) < 3.5 * 4 * vocabulary  # three chunks at a time, and gradients


def test_output_kl_of_bf16_is_finite_and_near_float32():
    tensors = heads(positions=8, dtype=torch.bfloat16)
    exact = [tensor.float() for tensor in tensors]
    tensors[0].requires_grad_()
    exact[0].requires_grad_()
    loss, expected = output_kl(*tensors), output_kl(*exact)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32 and tensors[0].grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    torch.testing.assert_close(tensors[0].grad.float(), exact[0].grad, rtol=0.05, atol=0.01)


def test_output_kl_survives_extreme_logits():
    target_hidden, target_weight, source_hidden, source_weight = heads(dtype=torch.float32)
    loss = output_kl((1e3 * target_hidden).requires_grad_(), target_weight, 1e3 * source_hidden, source_weight)
    assert loss.isfinite() and loss > 0


@pytest.mark.parametrize("rows", [1, 4, 256])
def test_token_cross_entropy_equals_that_of_full_logits_and_makes_no_graph(rows, monkeypatch):
    monkeypatch.setattr(losses, "LOGIT_ROWS", rows)
    hidden, weight, *_ = heads()
    tokens = torch.arange(6)
    each = token_cross_entropy(hidden.requires_grad_(), weight, tokens)
    torch.testing.assert_close(each, F.cross_entropy(hidden.detach() @ weight.T, tokens, reduction="none"))
    assert not each.requires_grad


def test_no_positions_give_no_values():
    target_hidden, target_weight, source_hidden, source_weight = heads(positions=0)
    target_hidden.requires_grad_()
    each = token_kl(target_hidden, target_weight, source_hidden, source_weight)
    each.sum().backward()
    assert each.shape == (0,) and target_hidden.grad.shape == (0, 5)
    assert token_cross_entropy(target_hidden, target_weight, torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 256])
def test_bias_and_soft_cap_of_both_heads_count_in_loss_and_gradient(rows, biased, cap, monkeypatch):
    monkeypatch.setattr(losses, "LOGIT_ROWS", rows)
    target_hidden, target_weight, source_hidden, source_weight = heads()
    biases = [2 * torch.randn(len(target_weight), dtype=torch.float64) if biased else None for _ in range(2)]
    target, source = (Head(w, b, cap) for w, b in zip((target_weight, source_weight), biases, strict=True))

    def logits(hidden, head):
        raw = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
        return raw if cap is None else cap * torch.tanh(raw / cap)

    ours, theirs = target_hidden.clone().requires_grad_(), target_hidden.clone().requires_grad_()
    target_log, source_log = logits(theirs, target).log_softmax(-1), logits(source_hidden, source).log_softmax(-1)
    expected = F.kl_div(target_log, source_log, reduction="batchmean", log_target=True)
    loss = output_kl(ours, target, source_hidden, source)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    plain = output_kl(target_hidden, target_weight, source_hidden, source_weight)
    assert (loss - plain).abs() > 1e-3 or not (biased or cap)
    tokens = torch.arange(len(target_hidden))
    each = token_cross_entropy(target_hidden, target, tokens)
    torch.testing.assert_close(each, F.cross_entropy(logits(target_hidden, target), tokens, reduction="none"))


@pytest.mark.parametrize("shared", [23, 17, "other"])
@pytest.mark.parametrize("cap", [None, 0.8])
def test_kl_and_cross_entropy_of_evaluation_are_those_of_each_alone(shared, cap, monkeypatch):
    monkeypatch.setattr(losses, "LOGIT_ROWS", 4)
    hidden, weight, source_hidden, source_weight = heads(positions=10)
    bias = torch.linspace(-1, 1, len(weight), dtype=weight.dtype)
    own, ids = Head(weight, bias, cap), torch.arange(23 if shared == "other" else shared)
    if shared == "other":
        ids = ids[1::2]
    target_head, source_head = own.rows(ids), Head(source_weight).rows(ids)
    assert target_head.begins(own) == (shared != "other")
    tokens = torch.arange(10) % 23
    kl, cross_entropy = losses.token_kl_and_cross_entropy(hidden, target_head, source_hidden, source_head, own, tokens)
    torch.testing.assert_close(kl, token_kl(hidden, target_head, source_hidden, source_head))
    torch.testing.assert_close(cross_entropy, losses.token_cross_entropy(hidden, own, tokens))
    assert not kl.requires_grad and not cross_entropy.requires_grad


# KL of class masses


def random_classes(source, target, count, seed=0, left_out=0):
    """Each class has tokens of both sides; the last tokens of the source are left out."""
    generator = torch.Generator().manual_seed(seed)

    def side(size):
        numbers = torch.cat([torch.arange(count), torch.randint(count, (size - count,), generator=generator)])
        return numbers[torch.randperm(size, generator=generator)]

    return PrefixClasses(torch.cat([side(source - left_out), torch.full((left_out,), count)]), side(target), count)


def two_heads(positions=6, rows=(19, 23), widths=(7, 5), seed=0, dtype=torch.float64):
    """``target_hidden, target_weight, source_hidden, source_weight`` of two vocabularies; sizes are the source's first."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(positions, widths[1]), (rows[1], widths[1]), (positions, widths[0]), (rows[0], widths[0])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def class_kl_by_definition(target_hidden, target, source_hidden, source, classes):
    """Loops over positions and classes."""
    target, source = (head if isinstance(head, Head) else Head(head) for head in (target, source))
    losses = []
    for h, g in zip(target_hidden, source_hidden, strict=True):
        q, p = target.logits(h[None])[0].softmax(-1), source.logits(g[None])[0].softmax(-1)
        p = p / p[classes.source < classes.count].sum()
        masses = [(p[classes.source == c].sum(), q[classes.target == c].sum()) for c in range(classes.count)]
        losses.append(sum(ours * (ours / theirs).log() for ours, theirs in masses if ours > 0))
    return torch.stack(losses)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("left_out", [0, 4])
@pytest.mark.parametrize("rows", [4, 256])
def test_class_kl_and_its_gradient_equal_their_definition(rows, left_out, biased, cap, monkeypatch):
    monkeypatch.setattr(losses, "LOGIT_ROWS", rows)
    target_hidden, target_weight, source_hidden, source_weight = two_heads()
    classes = random_classes(19, 23, 8, left_out=left_out)
    biases = [torch.linspace(-2, 2, size, dtype=torch.float64) if biased else None for size in (23, 19)]
    target, source = Head(target_weight, biases[0], cap), Head(source_weight, biases[1], cap)
    target_hidden.requires_grad_()
    found = token_class_kl(target_hidden, target, source_hidden, source, classes)
    expected = class_kl_by_definition(target_hidden, target, source_hidden, source, classes)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    upstream = torch.linspace(-1, 2, 6, dtype=torch.float64)
    gradients = [torch.autograd.grad(loss, target_hidden, upstream)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)
    assert found.min() > 0.01 and gradients[0].abs().max() > 0.01


@pytest.mark.parametrize("cap", [None, 2.0])
def test_class_kl_gradient_passes_gradcheck_and_reaches_the_target_states_alone(cap):
    tensors = [tensor.requires_grad_() for tensor in two_heads(positions=3)]
    classes = random_classes(19, 23, 8, left_out=3)

    def loss(hidden):
        return token_class_kl(hidden, Head(tensors[1], softcap=cap), tensors[2], tensors[3], classes)

    assert torch.autograd.gradcheck(loss, tensors[0])
    loss(tensors[0]).sum().backward()
    assert tensors[0].grad is not None and all(tensor.grad is None for tensor in tensors[1:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_class_kl_of_single_tokens_is_the_token_kl(shuffled, dtype, tolerance):
    target_hidden, target_weight, source_hidden, source_weight = heads(dtype=dtype)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1)) if shuffled else torch.arange(23)
    classes = PrefixClasses(order, torch.arange(23), 23)
    ours, theirs = target_hidden.clone().requires_grad_(), target_hidden.clone().requires_grad_()
    found = token_class_kl(ours, target_weight, source_hidden, source_weight[order], classes)
    expected = token_kl(theirs, target_weight, source_hidden, source_weight)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("seed", range(5))
def test_class_kl_is_never_above_the_token_kl_nor_below_that_of_coarser_classes(seed):
    """The data processing inequality."""
    tensors = heads(seed=seed)
    fine = random_classes(23, 23, 10, seed=seed).target
    coarse = fine // 3
    kl, of_fine, of_coarse = (
        token_kl(*tensors),
        token_class_kl(*tensors, PrefixClasses(fine, fine, 10)),
        token_class_kl(*tensors, PrefixClasses(coarse, coarse, 4)),
    )
    assert (kl > of_fine).all() and (of_fine > of_coarse).all() and (of_coarse > 0).all()
    one = torch.zeros_like(fine)
    assert token_class_kl(*tensors, PrefixClasses(one, one, 1)).abs().max() < 1e-14


def test_a_class_that_the_source_has_no_token_of_counts_for_the_target_alone():
    tensors = two_heads(rows=(4, 5))
    classes = PrefixClasses(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 2, 2, 0]), 3)
    found = token_class_kl(*tensors, classes)
    torch.testing.assert_close(found, class_kl_by_definition(*tensors, classes))
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_class_kl_survives_extreme_logits_and_still_pulls(dtype):
    target_hidden, target_weight, source_hidden, source_weight = two_heads(dtype=dtype)
    hidden = (1e3 * target_hidden).requires_grad_()
    classes = random_classes(19, 23, 8, left_out=2)
    found = token_class_kl(hidden, target_weight, 1e3 * source_hidden, source_weight, classes)
    found.sum().backward()
    assert found.dtype == torch.float32 and hidden.grad.dtype == dtype
    assert found.isfinite().all() and (found >= -1e-6).all() and found.max() > 10
    assert hidden.grad.isfinite().all() and (hidden.grad.abs().amax(1) > 0.01)[found > 10].all()


@pytest.mark.parametrize("positions", [20, 200])
def test_memory_of_the_class_kl_grows_with_chunk_and_vocabulary_alone(positions, monkeypatch):
    monkeypatch.setattr(losses, "LOGIT_ROWS", 4)
    rows, count = (1500, 2000), 500
    target_hidden, *rest = two_heads(positions, rows, widths=(3, 2), dtype=torch.float32)
    target_hidden.requires_grad_()
    classes = random_classes(*rows, count)

    def both_ways():
        token_class_kl(target_hidden, *rest, classes).sum().backward()

    with LargestOutput() as largest:
        both_ways()
    assert largest.numel == 2 * 4 * 2000
    assert peak_elements(both_ways) < 1.1 * 4 * (2 * 2000 + 3 * (count + 1))  # logits and probabilities, masses and their ratio


def test_class_kl_of_no_positions_gives_no_values():
    target_hidden, *rest = two_heads(positions=0)
    each = token_class_kl(target_hidden.requires_grad_(), *rest, random_classes(19, 23, 8))
    each.sum().backward()
    assert each.shape == (0,) and target_hidden.grad.shape == (0, 5)


def test_classes_of_other_heads_are_refused():
    with pytest.raises(ValueError, match=r"19 \(source\) and 23 \(target\) rows, but the classes cover 19 and 22 tokens"):
        token_class_kl(*two_heads(), random_classes(19, 22, 8))


# Fisher


def fisher_by_definition(outputs, supervision, head):
    """Through the whole Fisher matrix of the softmax, ``diag(p) - p p^T``."""
    losses = []
    for y, y_tilde in zip(outputs, supervision, strict=True):
        shares = head.logits(y_tilde[None]).softmax(-1)[0]
        u = head.weight @ (y - y_tilde)
        losses.append(u @ (torch.diag(shares) - torch.outer(shares, shares)) @ u / 2)
    return torch.stack(losses)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("biased", [False, True])
def test_fisher_loss_is_its_definition_and_so_is_its_gradient(softcap, biased, monkeypatch):
    monkeypatch.setattr(losses, "LOGIT_ROWS", 3)
    generator = torch.Generator().manual_seed(1)
    outputs, supervision = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(11, 5, generator=generator, dtype=torch.float64), torch.randn(11, generator=generator).double()
    head = Head(weight, bias if biased else None, softcap)
    outputs.requires_grad_()
    found, expected = token_fisher_losses(outputs, supervision, head), fisher_by_definition(outputs, supervision, head)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(7, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad(loss, outputs, upstream)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert torch.autograd.gradcheck(lambda y: token_fisher_losses(y, supervision, head), outputs)


def test_fisher_loss_is_the_second_order_of_the_kl():
    generator = torch.Generator().manual_seed(2)
    y_tilde, step = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    for size, tolerance in ((1e-2, 0.1), (1e-4, 1e-3)):
        y = y_tilde + size * step
        kl = token_kl(y, weight, y_tilde, weight)
        torch.testing.assert_close(token_fisher_losses(y, y_tilde, weight), kl, rtol=tolerance, atol=0)


def test_fisher_loss_is_a_mean_over_valid_positions_and_sees_no_others():
    _, y, y_tilde, valid = hidden_states((3, 7, 5))
    weight = torch.randn(11, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = fisher_by_definition(y[valid], y_tilde[valid], Head(weight)).mean()
    torch.testing.assert_close(fisher_loss(y, y_tilde, weight, valid), expected)
    y[~valid] = y_tilde[~valid] = float("nan")
    torch.testing.assert_close(fisher_loss(y, y_tilde, weight, valid), expected)
    assert fisher_loss(y, y_tilde, weight, torch.zeros_like(valid)) == 0


def test_a_callers_autocast_changes_no_loss():
    x, y, y_tilde, valid = hidden_states((3, 7, 5), dtype=torch.float32)
    weight = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))

    def found():
        kl = output_kl(y[valid], weight, y_tilde[valid], weight)
        of_classes = token_class_kl(y[valid], weight, y_tilde[valid], weight, random_classes(11, 11, 4)).sum()
        return torch.stack((relation_loss(x, y, y_tilde, valid), fisher_loss(y, y_tilde, weight, valid), kl, of_classes))

    plain = found()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found(), plain)
