"""What the benchmark of two tokenizers computes in another way than TRL does gives what TRL gives."""

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("trl")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load_benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_of_two_tokenizers", BENCHMARKS / "two_tokenizers.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
        spec.loader.exec_module(module)
    return module


two_tokenizers = load_benchmark()


class Words:
    def __init__(self, count):
        self.count = count

    def get_vocab(self):
        return {f"word {token}": token for token in range(self.count)}


@pytest.mark.parametrize("name", list(two_tokenizers.TRLS))
def test_the_losses_of_trl_are_what_trl_makes_them(name, tmp_path):
    torch.manual_seed(0)
    config = two_tokenizers.GOLDConfig(str(tmp_path), use_uld_loss=True, use_cpu=True, bf16=False, **two_tokenizers.TRLS[name])
    loss = two_tokenizers.ULDLoss(config, Words(40), Words(60))
    ends = [[1, 2, 4, 7, 8, 9, 10], [1, 3, 4, 5, 6, 8, 9, 10]]  # of tokens in bytes: spans of one and several
    offsets = [torch.tensor([[(0, 0)] * 3 + [(0, end) for end in side]]) for side in ends]
    ids = [torch.randint(40, (1, side.shape[1])) for side in offsets]
    labels = [torch.cat((torch.full((1, 3), -100), side[:, 3:]), 1) for side in ids]
    logits = [torch.randn(1, side.shape[1], size, requires_grad=size == 40) for side, size in zip(ids, (40, 60), strict=True)]

    def gradient():
        value = loss(*logits, *labels, *ids, *offsets)
        return value.detach(), *torch.autograd.grad(value, logits[0])

    expected = gradient()
    with (
        mock.patch.object(torch.Tensor, "sort", two_tokenizers.sort),
        mock.patch.object(two_tokenizers.ULDLoss, two_tokenizers.MERGING, two_tokenizers.merge),
    ):
        torch.testing.assert_close(gradient(), expected)
