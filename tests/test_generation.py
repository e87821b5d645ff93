"""Generation in batches that shrink, against transformers' own."""

import pytest
import torch
from conftest import tiny_llama
from families import FAMILIES, build

from hf_semalign.experiments import generation
from hf_semalign.experiments.generation import computing_in, continue_prompts, fastest_dtype, generating, rows_that_fit

PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12], [13]]
IDS = torch.tensor([[0] * (5 - len(row)) + row for row in PROMPTS])
MASK = (IDS != 0).long()


def plain(model, length):
    given = {"do_sample": False, "max_new_tokens": length, "pad_token_id": 0, "eos_token_id": 2}
    return model.generate(input_ids=IDS, attention_mask=MASK, **given)[:, IDS.shape[1] :]


def ours(model, length, **settings):
    with generating(model):
        return continue_prompts(model, IDS, MASK, max_new_tokens=length, eos_token_ids=[2], pad_token_id=0, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_continues_as_transformers_does(family, monkeypatch):
    monkeypatch.setattr(generation, "SEGMENT", 3)
    model = build(family).eval()
    expected = plain(model, 8)
    assert ours(model, 8).tolist() == expected.tolist()
    # The second prompt leaves the batch early, and the others go on as if it had stayed.
    first = expected[1, :1].tolist()
    gone = ours(model, 8, has_ended=lambda tokens: tokens[:1] == first)
    kept = [row for row in range(4) if expected[row, :1].tolist() != first]
    assert kept and gone[kept].tolist() == expected[kept].tolist()


def test_what_has_ended_is_not_paid_for(monkeypatch):
    monkeypatch.setattr(generation, "SEGMENT", 2)
    model, sizes, ended = tiny_llama(2, 16, seed=4).eval(), [], []
    model.model.register_forward_pre_hook(lambda module, args, given: sizes.append(len(given["input_ids"])), with_kwargs=True)
    lengths = iter((2, 6, 4, 8))
    wanted = {}

    def has_ended(tokens):  # rows are told apart by their first tokens, which differ
        return len(tokens) >= wanted.setdefault(tuple(tokens[:2]), next(lengths, None))

    found = ours(model, 20, has_ended=has_ended, on_end=ended.append)
    assert len(wanted) == 4, "or the rows cannot be told apart"
    assert sizes == [4, 4, 3, 3, 2, 2, 1, 1]  # two tokens a segment
    assert sum(ended) == 4 and ended[:4] == [1, 1, 1, 1]
    assert [len([token for token in row if token != 0]) for row in found.tolist()] == [2, 6, 4, 8]


def test_an_end_token_ends_an_answer_within_a_segment():
    model = tiny_llama(2, 16, seed=4).eval()
    expected = plain(model, 6)
    end = int(expected[0, 1])
    with generating(model):
        found = continue_prompts(model, IDS, MASK, max_new_tokens=6, eos_token_ids=[2, end], pad_token_id=0)
    assert found[0, :2].tolist() == expected[0, :2].tolist() and not found[0, 2:].any()


def test_settings_of_the_model_are_set_aside_and_come_back():
    model = tiny_llama(2, 16, seed=4).train()
    expected = plain(model.eval(), 6)
    model.train()
    settings = model.generation_config
    settings.repetition_penalty, settings.do_sample, settings.temperature = 9.0, True, 3.0
    assert ours(model, 6).tolist() == expected.tolist()
    assert model.generation_config is settings and model.training and not model.lm_head._forward_pre_hooks


def test_the_head_gets_its_states_in_one_piece():
    model, pieces = tiny_llama(2, 16, seed=4), []
    with generating(model):
        model.lm_head.register_forward_pre_hook(lambda module, args: pieces.append(args[0].is_contiguous()))
        continue_prompts(model, IDS, MASK, max_new_tokens=3, eos_token_ids=[2], pad_token_id=0)
    assert pieces == [True] * 3


def test_half_precision_weights_are_computed_with_in_the_fastest_dtype_and_come_back(monkeypatch):
    model = tiny_llama(2, 16).to(torch.bfloat16)
    before = {name: p.data for name, p in model.named_parameters()}
    for seconds, expected in (({torch.bfloat16: 2.0, torch.float32: 1.0}, torch.float32), ({}, torch.bfloat16)):
        monkeypatch.setattr(generation, "product_seconds", lambda dtype, seconds=seconds: seconds.get(dtype, 0.0))
        assert fastest_dtype(model) == expected
    with computing_in(model, torch.float32):
        assert model(IDS).logits.dtype == model.dtype == torch.float32
    assert all(p.data is before[name] or p.data.data_ptr() == before[name].data_ptr() for name, p in model.named_parameters())
    assert model.dtype == torch.bfloat16
    assert fastest_dtype(tiny_llama(2, 16)) == torch.float32  # of its own dtype


def test_no_copy_without_memory(monkeypatch, caplog):
    monkeypatch.setattr(generation, "product_seconds", lambda dtype: float(dtype != torch.float32))
    monkeypatch.setattr(generation, "_free_memory", lambda device: 1000)
    assert fastest_dtype(tiny_llama(2, 16).to(torch.bfloat16)) == torch.bfloat16
    assert "memory does not allow a copy" in caplog.text


def test_rows_at_a_time_go_by_free_memory(monkeypatch):
    model = tiny_llama(2, 16)
    row = 2 * 2 * model.config.num_key_value_heads * model.config.head_dim * 4 * (generation.PROMPT_TOKENS + 100)
    for free, expected in ((20 * row, 10), (row, 1), (10**6 * row, generation.MOST_ROWS_ON_CPU)):
        monkeypatch.setattr(generation, "_free_memory", lambda device, free=free: free)
        assert rows_that_fit(model, 100) == expected
    assert rows_that_fit(model.to("meta"), 100) == generation.MOST_ROWS
