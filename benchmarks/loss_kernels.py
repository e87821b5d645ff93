"""Loss kernels: seconds and memory of the output KL and the relation loss, and of what could stand in their place.

    OMP_NUM_THREADS=1 python benchmarks/loss_kernels.py [--smoke]

Forward and backward of each case in a process of its own, on CUDA where there is a GPU. Prints Markdown tables, and writes
them and all numbers to ``benchmarks/results/kernels.{md,json}`` (not with ``--smoke``). trl and Liger are measured where
they are installed, Liger's Triton kernel on CUDA alone; the package needs neither. Ten minutes on one CPU core.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hf_semalign.method import losses

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KL_KERNELS = ("ours", "trl", "liger", *(["liger triton"] if DEVICE == "cuda" else []), "whole logits")
RELATION_KERNELS = ("ours", "ours compiled", "whole matrices", "whole matrices compiled")
Case = dict[str, Any]  # what to measure; then, with its results, a row of a table


def kl_kernel(name: str) -> Callable:
    """Sum over positions of ``KL(source || target)`` of hidden states and heads, target first."""
    if name == "ours":
        return lambda *tensors: losses.token_kl(*tensors).sum()
    if name == "trl":
        trl = import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction.apply
        return lambda h, w, g, v: trl(h, w, None, g, v, None, 0.0)[0].sum()
    if name == "liger":  # torch operations, to be compiled; always makes the gradient of the target's head
        module = import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
        liger = module(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=DEVICE == "cuda")
        return lambda h, w, g, v: len(h) * liger(h, w, g, v, torch.zeros(len(h), dtype=torch.long, device=h.device))
    if name == "liger triton":
        fused = import_module("liger_kernel.ops.fused_linear_jsd").LigerFusedLinearJSDFunction.apply
        return lambda h, w, g, v: len(h) * fused(h, w, g, v, None, 0.0)

    def whole(h, w, g, v):
        dtype = torch.promote_types(h.dtype, torch.float32)
        target_log, source_log = ((h @ w.T).log_softmax(-1, dtype=dtype), (g @ v.T).log_softmax(-1, dtype=dtype))
        return F.kl_div(target_log, source_log, reduction="sum", log_target=True)

    return whole


def kl_inputs(case: Case) -> list[torch.Tensor]:
    """Target states, target head, source states, source head; logits have a standard deviation of 2."""
    kind = {"device": DEVICE, "dtype": getattr(torch, case["dtype"])}
    tensors = [torch.randn(rows, width, **kind) for width in case["widths"] for rows in (case["N"], case["V"])]
    for head in tensors[1::2]:
        head.mul_(2 * head.shape[1] ** -0.5)
    return tensors


def kl_errors(kernel: Callable, tensors: list[torch.Tensor]) -> Case:
    """Relative errors of loss and gradient at 16 positions against whole logits in float64."""
    few = [tensors[0][:16], tensors[1], tensors[2][:16], tensors[3]]
    values = []
    for function, (hidden, *rest) in ((kernel, few), (kl_kernel("whole logits"), [tensor.double() for tensor in few])):
        loss = function(hidden.requires_grad_(), *rest)
        values.append([loss.detach().double(), torch.autograd.grad(loss, hidden)[0].double()])
    loss_error, gradient_error = (float((value - exact).norm() / exact.norm()) for value, exact in zip(*values, strict=True))
    return {"loss error": loss_error, "gradient error": gradient_error}


def relation_kernel(name: str) -> Callable:
    """Relation loss: ours, or of whole matrices by autograd; either of them compiled."""

    def whole(inputs, outputs, supervision, valid):
        mask = valid.unsqueeze(-1)
        residuals = (torch.where(mask, states - inputs, 0) for states in (outputs, supervision))
        centred = (torch.where(mask, r - r.sum(1, keepdim=True) / mask.sum(1, keepdim=True), 0) for r in residuals)
        d, wanted = (F.normalize(c, dim=-1, eps=losses.EPSILON) for c in centred)
        target = wanted @ wanted.mT
        weight = target.abs() * ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
        error = (weight * (d @ d.mT - target).square()).sum((1, 2))
        return (error / weight.sum((1, 2)).clamp_min(losses.EPSILON)).mean()

    function = losses.relation_loss if name.startswith("ours") else whole
    return torch.compile(function) if name.endswith("compiled") else function


def relation_inputs(case: Case) -> list[torch.Tensor]:
    """Inputs, outputs, supervision, and the mask, in which the last ``valid`` positions are valid."""
    states = torch.randn(3, case["B"], case["T"], 320, device=DEVICE)
    valid = torch.arange(case["T"], device=DEVICE) >= case["T"] - case["valid"]
    return [*states, valid.expand(case["B"], -1)]


def measure(case: Case) -> Case:
    """Seconds of the first call, median and range of the next, and peak memory in MB beyond the inputs."""
    torch.manual_seed(0)
    losses.LOGIT_ROWS = case.get("rows", losses.LOGIT_ROWS)
    losses.RELATION_ROWS = case.get("rows", losses.RELATION_ROWS)
    is_kl = "V" in case
    function = (kl_kernel if is_kl else relation_kernel)(case["kernel"])
    inputs = (kl_inputs if is_kl else relation_inputs)(case)
    leaf = inputs[0 if is_kl else 1].requires_grad_()
    before, seconds = peak_memory(), []
    for _ in range(1 + case["runs"]):
        leaf.grad = None
        start = time.perf_counter()
        function(*inputs).backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    result = {"first": seconds[0], "seconds": seconds[1:] or seconds, "MB": peak_memory() - before}
    if is_kl and case["V"] < 100_000:
        result |= kl_errors(function, [tensor.detach() for tensor in inputs])
    return case | result


def peak_memory() -> float:
    """Peak memory of this process in MB: what torch allocated on the GPU, or what was resident."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts in KiB


def measured(cases: Sequence[Case]) -> list[Case]:
    """Each case in a fresh process; one that cannot run says why."""
    rows = []
    for case in cases:
        done = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], capture_output=True, text=True)
        failed = case | {"failed": (done.stderr or "killed").strip().splitlines()[-1]}
        rows.append(failed if done.returncode else json.loads(done.stdout.splitlines()[-1]))
    return rows


def markdown(rows: Sequence[Case], keys: Sequence[str]) -> str:
    """Markdown: what was measured, seconds and memory, and errors where they were taken."""
    errors = [key for key in ("loss error", "gradient error") if any(key in row for row in rows)]
    heads = [*keys, "first call s", "s, median (range)", "peak MB", *errors]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        figures = [row.get("failed", ""), *[""] * (2 + len(errors))]
        if "failed" not in row:
            median, low, high = (f(row["seconds"]) for f in (statistics.median, min, max))
            figures = [f"{row['first']:.3f}", f"{median:.4f} ({low:.4f} to {high:.4f})", f"{row['MB']:.0f}"]
            figures += [f"{row[key]:.0e}" if key in row else "" for key in errors]
        lines.append("| " + " | ".join([*(str(row[key]) for key in keys), *figures]) + " |")
    return "\n".join(lines)


def tables() -> dict[str, tuple[tuple[str, ...], list[Case]]]:
    """Columns and cases of each table by its title."""
    kl, relation = ("N", "V", "dtype", "kernel"), ("B", "T", "valid", "kernel")
    small = {"N": 768, "V": 2048, "widths": (320, 448), "dtype": "float32", "runs": 5}
    medium, half = small | {"V": 32000}, {"dtype": "bfloat16"}
    large = small | {"V": 151936, "widths": (896, 1024), "runs": 5 if DEVICE == "cuda" else 2}
    shapes = [small, medium, medium | half | {"N": 256}, large, *([large | half] if DEVICE == "cuda" else [])]
    lengths = ((8, 160, 96), (8, 160, 160), (2, 1024, 1024), (2, 4096, 4096))
    batches = [{"B": b, "T": t, "valid": valid, "runs": 5} for b, t, valid in lengths]
    counts = [medium | {"N": n, "runs": 0} for n in (256, 1024, 4096)]
    chunks = [s | {"rows": 2**n} for s in (shapes[1:] if DEVICE == "cuda" else [medium]) for n in range(6, 11)]
    blocks = [b | {"rows": 2**n} for b in batches[2:] for n in range(7, 13) if 2**n <= b["T"]]
    return {
        "Output KL": (kl, [shape | {"kernel": kernel} for shape in shapes for kernel in KL_KERNELS]),
        "Output KL, memory": (kl, [count | {"kernel": kernel} for kernel in KL_KERNELS for count in counts]),
        "Output KL, LOGIT_ROWS": ((*kl, "rows"), [chunk | {"kernel": "ours"} for chunk in chunks]),
        "Relation loss": (relation, [shape | {"kernel": kernel} for shape in batches for kernel in RELATION_KERNELS]),
        "Relation loss, RELATION_ROWS": ((*relation, "rows"), [block | {"kernel": "ours"} for block in blocks]),
    }


def main() -> None:
    """Measure all cases, with ``--smoke`` the first of each table, or a single one for :func:`measured`."""
    if "--case" in sys.argv:
        print(json.dumps(measure(json.loads(sys.argv[-1]))))
        return
    smoke = "--smoke" in sys.argv
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # a first call compiles
    numbers = {title: measured(cases[:1] if smoke else cases) for title, (_, cases) in tables().items()}
    parts = [f"{title}\n\n{markdown(numbers[title], keys)}" for title, (keys, _) in tables().items()]
    processor = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    packages = [f"{d.name} {d.version}" for d in distributions() if d.name in ("torch", "trl", "liger_kernel", "triton")]
    text = "\n\n".join([*parts, f"Forward and backward; {', '.join([processor, *packages])}."])
    print(text)
    if not smoke:
        (RESULTS / "kernels.md").write_text(text + "\n")
        (RESULTS / "kernels.json").write_text(json.dumps({"machine": [processor, *packages], **numbers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
