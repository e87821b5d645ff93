"""Hooks: what passes through a module, gradients included, and nothing that outlives the block."""

import pytest
import torch
from conftest import tiny_llama
from torch import nn

from hf_semalign.models.hooks import capture

IDS = torch.tensor([[1, 5, 9, 4], [1, 7, 3, 8]])


def hooks_on(model):
    return [
        module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    ]


@pytest.fixture
def model():
    return tiny_llama(3, 16)


def test_layers_chain_from_the_embeddings_to_before_the_final_norm(model):
    with torch.no_grad(), capture(model.model.layers) as states, capture([model.model]) as (whole,):
        outputs = model(input_ids=IDS, output_hidden_states=True)
    assert torch.equal(states[0].input, model.get_input_embeddings()(IDS))
    for before, after, hidden in zip(states, states[1:], outputs.hidden_states[1:], strict=False):
        assert torch.equal(after.input, before.output) and torch.equal(before.output, hidden)
    last = states[-1].output
    assert not torch.allclose(last, outputs.hidden_states[-1], atol=0.1)
    assert torch.equal(model.model.norm(last), outputs.hidden_states[-1]) and torch.equal(
        whole.output, outputs.hidden_states[-1]
    )


def test_each_forward_replaces_the_states_and_none_come_before_it(model):
    with capture(model.model.layers) as states:
        assert not any(isinstance(getattr(state, "output", None), torch.Tensor) for state in states)
        model(input_ids=IDS)
        first = states[1].output
        model(input_ids=IDS.flip(1))
    assert states[1].output is not first and not torch.equal(states[1].output, first)


def test_gradients_pass_through_what_is_captured(model):
    with capture(model.model.layers) as states:
        model(input_ids=IDS)
    (states[1].output - states[1].input).square().sum().backward()
    reached = [layer.mlp.up_proj.weight.grad is not None for layer in model.model.layers]
    assert reached == [True, True, False]


def test_hooks_come_off_with_the_block(model):
    with capture(model.model.layers):
        assert len(hooks_on(model)) == 3
    assert not hooks_on(model)


def test_hooks_come_off_after_an_exception_in_the_forward(model):
    def fail(*call):
        raise RuntimeError("broken layer")

    broken = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"), capture(model.model.layers):
        model(input_ids=IDS)
    broken.remove()
    assert not hooks_on(model)


def test_one_module_may_be_captured_twice_and_captures_may_nest(model):
    layer = model.model.layers[2]
    with capture([layer, layer]) as twice, torch.no_grad():
        with capture([layer]) as (inner,):
            model(input_ids=IDS)
        seen = inner.output
        model(input_ids=IDS.flip(1))
    assert twice[0].output is twice[1].output and inner.output is seen and twice[0].output is not seen


def test_modules_may_come_from_a_generator(model):
    with capture(layer for layer in model.model.layers) as states:
        model(input_ids=IDS)
    assert [state.output.shape for state in states] == [(2, 4, 16)] * 3


class Layer(nn.Module):
    """A decoder layer of an older release, or one called by keyword."""

    def __init__(self, as_tuple):
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden_states, attention_mask=None):
        return (hidden_states + 1, "attention") if self.as_tuple else hidden_states + 1


@pytest.mark.parametrize("as_tuple", [True, False])
@pytest.mark.parametrize("by_keyword", [True, False])
def test_tuples_and_keywords_are_understood(as_tuple, by_keyword):
    layer, hidden = Layer(as_tuple), torch.zeros(1, 2, 3)
    with capture([layer]) as (state,):
        layer(hidden_states=hidden) if by_keyword else layer(hidden)
    assert state.input is hidden and torch.equal(state.output, hidden + 1)
