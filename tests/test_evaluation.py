"""Evaluation against loops without cache, batching or padding."""

import pytest
import torch
from conftest import batches_of, random_rows, tiny_llama, word_tokenizer
from torch.nn.functional import cross_entropy

from hf_semalign.experiments.evaluation import answer_loss, drift, exact_match, final_states, greedy_answers

WORDS = [f"w{i}" for i in range(94)]
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w10 w11"]


def greedy_by_hand(model, tokenizer, prompt, steps):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    new = []
    for _ in range(steps):
        token = model(ids).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_batched_greedy_answers_equal_one_at_a_time(batch_size):
    model, tokenizer = tiny_llama(2, 16, seed=4), word_tokenizer(WORDS)
    expected = [greedy_by_hand(model, tokenizer, prompt, 6) for prompt in PROMPTS]
    assert greedy_answers(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=batch_size) == expected
    assert len(set(expected)) > 1


def test_exact_match_counts_by_skill():
    model, tokenizer = tiny_llama(2, 16, seed=4).train(), word_tokenizer(WORDS)
    answers = [greedy_by_hand(model.eval(), tokenizer, prompt, 4) for prompt in PROMPTS]
    completions = [answers[0], answers[1], answers[2].rsplit(" ", 1)[0] + " w93", "w1"]
    rows = zip(PROMPTS, completions, ["a", "b", "b", "b"], strict=True)
    records = [{"prompt": prompt, "completion": f" {answer}", "skill": skill} for prompt, answer, skill in rows]
    model.train()
    longest = max(len(answer.split()) for answer in completions)
    expected = [greedy_by_hand(model.eval(), tokenizer, p, longest + 2) == c for p, c in zip(PROMPTS, completions, strict=True)]
    model.train()
    assert exact_match(model, tokenizer, records) == {"a": float(expected[0]), "b": sum(expected[1:]) / 3}
    assert model.training


@pytest.mark.parametrize("size", [1, 3])
def test_answer_loss_is_the_mean_over_all_answer_tokens(size):
    model, rows = tiny_llama(2, 16).train(), random_rows([(3, 2), (4, 5), (2, 1)])
    total = 0.0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        total += cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum").item()
    assert answer_loss(model, batches_of(rows, size)) == pytest.approx(total / 8, rel=1e-5)
    assert model.training


@pytest.mark.parametrize("size", [1, 2])
def test_drift_is_kl_loss_and_accuracy_over_all_answer_tokens(size):
    before, after = tiny_llama(2, 16, seed=1), tiny_llama(2, 16, seed=2)
    after.lm_head.weight = before.lm_head.weight  # which no method trains
    rows = random_rows([(3, 2), (4, 5), (2, 1)])
    kl = loss = hits = 0.0
    for row in rows:
        labels = torch.tensor(row["labels"][1:])
        valid = labels != -100
        old, new = (model(torch.tensor([row["input_ids"]])).logits[0, :-1][valid].log_softmax(-1) for model in (before, after))
        kl += (old.exp() * (old - new)).sum().item()
        loss -= new.gather(1, labels[valid].unsqueeze(1)).sum().item()
        hits += (new.argmax(-1) == labels[valid]).sum().item()
    batches = batches_of(rows, size)
    states = [hidden for hidden, _ in final_states(before, batches)]
    found = drift(after, batches, states)
    assert found == pytest.approx({"kl": kl / 8, "loss": loss / 8, "accuracy": hits / 8}, rel=1e-5)
    assert drift(before, batches, states)["kl"] == pytest.approx(0, abs=1e-6)
    likeliest = [dict(row) for row in rows]
    for row in likeliest:
        row["labels"] = [-100, *after(torch.tensor([row["input_ids"]])).logits[0, :-1].argmax(-1).tolist()]
    batches = batches_of(likeliest, size)
    assert drift(after, batches, [hidden for hidden, _ in final_states(before, batches)])["accuracy"] == 1
