"""What linear modules of a layer are for: seen in what attention is given, and in models that compute the same."""

import pytest
import torch
from conftest import tiny_llama
from families import FAMILIES, build
from torch import nn
from torch.nn import functional

from hf_semalign.experiments.baselines.projections import oriented, projections
from hf_semalign.models.anatomy import dissect

TOKENS = torch.arange(3, 15).view(2, 6)


def of_layer(model, layer=0):
    return projections(dissect(model).layers[layer], model.config)


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "GPT2", "Phi3", "Qwen3"])
def test_rows_of_a_role_are_what_attention_takes_for_it(family, monkeypatch):
    """With the rows of one of query, key and value at zero, that one alone of all that attention is given is zero."""
    given = []
    attend = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda *args, **kw: given.append(args[:3]) or attend(*args, **kw)
    )
    for place, role in enumerate(("query", "key", "value")):
        model = build(family, layers=1)
        one = of_layer(model)[role]
        module = dissect(model).layers[0].get_submodule(one.path)
        with torch.no_grad():
            oriented(module, module.weight)[one.rows] = 0
            if module.bias is not None:
                module.bias[one.rows] = 0
            model(TOKENS)
        assert [bool(states.any()) for states in given.pop()] == [other != place for other in range(3)]


def test_the_halves_of_a_fused_gate():
    """Phi3's ``down_proj`` reads ``up * act(gate)``: the activation gets the gate's rows."""
    model = build("Phi3", layers=1)
    roles, layer = of_layer(model), dissect(model).layers[0]
    seen = {}
    layer.mlp.activation_fn.register_forward_hook(lambda module, args, output: seen.update(gate=args[0]))
    layer.mlp.gate_up_proj.register_forward_hook(lambda module, args, output: seen.update(both=output))
    model(TOKENS)
    assert torch.equal(seen["gate"], seen["both"][..., roles["gate"].rows])
    assert torch.equal(torch.cat([roles["gate"].rows, roles["up"].rows]), torch.arange(48))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_family_has_rows_for_two_things(family):
    model = build(family)
    for k, layer in enumerate(dissect(model).layers):
        taken = {}
        for role, one in of_layer(model, k).items():
            module = layer.get_submodule(one.path)
            assert one.columns == oriented(module, module.weight).shape[1]
            rows = taken.setdefault(one.path, set())
            assert not rows & set(one.rows.tolist()), role
            rows |= set(one.rows.tolist())
        for path, rows in taken.items():
            module = layer.get_submodule(path)
            assert rows == set(range(len(oriented(module, module.weight))))


def test_heads_that_are_shared_written_out_are_the_same_function():
    grouped = tiny_llama(2, 32, heads=4, num_key_value_heads=2)
    plain = tiny_llama(2, 32, heads=4, seed=1)
    state = grouped.state_dict()
    for k in range(2):
        for role in ("key", "value"):
            one = of_layer(grouped, k)[role]
            assert (one.groups, one.ungrouped().groups, len(one.rows), len(one.ungrouped().rows)) == (2, 1, 16, 32)
            name = f"model.layers.{k}.{one.path}.weight"
            state[name] = state[name][one.ungrouped().rows]
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(TOKENS).logits, grouped(TOKENS).logits)


def test_a_role_that_two_modules_have_is_refused():
    model = tiny_llama(1, 16)
    model.model.layers[0].extra = nn.ModuleDict({"up_proj": nn.Linear(16, 16)})
    with pytest.raises(ValueError, match=r"llama has two up projections in a layer, mlp\.up_proj and extra\.up_proj"):
        of_layer(model)
