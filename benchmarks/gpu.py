"""The paper's pair on one GPU: random weights of Llama-2 13B and 7B in bf16, batches of 16 sequences of 512 tokens.

    python benchmarks/gpu.py [--parts schedule gkd stream map kernels] [--budget 560] [--source-layers 40] [--smoke]

``schedule``: a short schedule of all stages with cached signals, and steps of ``joint`` on the same signals. ``gkd``: TRL's
GKD (lmbda 0) on the same batches, in the largest micro-batch that fits. ``stream``: memory with the source read from disk a
layer at a time, with activation checkpointing and without. ``map``: the map between the heads, and ``torch.linalg.pinv`` of
both in float32. ``kernels``: ``loss_kernels.py``, in what is left of the budget. Every job has a process of its own; tables
and numbers go to ``benchmarks/results/gpu.{md,json}`` after each, and to ``$OUT`` where that is set. ``--smoke``: tiny models
on any device, all in one process, into ``runs/gpu-smoke``.

Model FLOPs of a step: 2 a token and weight of the linear layers, and causal attention; forward of the frontier's layer and of
those above it, backward there for activations alone, since base weights are frozen; LoRA of that layer; at the valid positions
the logits of both models and the gradient of the target's. Norms, softmax and the relation loss count nothing. Utilisation is
of the nominal dense peak, 989 TFLOP/s on H100 and H200 (``--peak-tflops``), on an unknown device of what a large product
reaches on it.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, TrainerCallback

from hf_semalign import SemAlignConfig, SemAlignTrainer, SemanticMap
from hf_semalign.cache.prefix import TargetPrefix
from hf_semalign.cache.signals import CachedSignals
from hf_semalign.splits import Collator, encode

Record = dict[str, Any]
HERE = Path(__file__).parent
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PEAKS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense bf16 TFLOP/s by the data sheets
PARTS = ("schedule", "gkd", "stream", "map", "kernels")
MAP_SECONDS = 150.0  # its pseudoinverses may have no more
RANK = 16
FULL: Record = {
    "source": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "target": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "vocab_size": 32000, "max_position_embeddings": 4096, "batch": 16, "length": 512, "valid": 307,
    "sequences": 128, "stage_steps": 3, "gkd_steps": 8, "streamed": 32, "product": 8192,
}  # fmt: skip
SMOKE: Record = {
    "source": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5, "num_attention_heads": 2},
    "target": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2},
    "vocab_size": 256, "max_position_embeddings": 64, "batch": 4, "length": 32, "valid": 19,
    "sequences": 16, "stage_steps": 3, "gkd_steps": 4, "streamed": 4, "product": 256,
}  # fmt: skip


def flops(spec: Record) -> tuple[list[float], float, float, float]:
    """Model FLOPs of a SemAlign step by stage and under ``joint``, of a GKD step, and of the source's pass over one batch."""
    (source, inner_source, deep_source), (width, inner, deep) = (list(spec[role].values())[:3] for role in ("source", "target"))
    tokens, valid = spec["batch"] * spec["length"], spec["batch"] * spec["valid"]

    def linear(width: int, inner: int, projections: int = 4) -> float:
        return 2.0 * tokens * (projections * width**2 + 3 * width * inner)

    attention = 2.0 * tokens * spec["length"] * width  # half of scores and values; backward twice as much
    lora = 2.0 * tokens * RANK * (2 * (width + inner) + 4 * width)  # up, down, value, output
    forward, backward = (linear(width, inner) + n * attention for n in (1, 2))
    own = forward + linear(width, inner, projections=1) + attention / 2 + 3 * lora  # no gradient goes below value and output
    logits = 2.0 * spec["vocab_size"] * (2 * width + source)
    stages = [above * (forward + backward) + own + valid * logits for above in reversed(range(deep))]
    of_source = deep_source * (linear(source, inner_source) + 2.0 * tokens * spec["length"] * source)
    of_target = deep * (forward + backward + 3 * lora)
    of_gkd = of_source + of_target + tokens * logits
    return stages, of_target + valid * logits, of_gkd, of_source + 2.0 * valid * deep * source * width


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def clear() -> None:
    """Free what nothing holds, and begin a new peak."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory() -> Record:
    """GB: peak of tensors, and all that the device has in use now, caches and CUDA context in it; without GPU the process'."""
    if not CUDA:
        return dict.fromkeys(("peak_gb", "device_gb"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
    free, total = torch.cuda.mem_get_info()
    return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9, "device_gb": (total - free) / 1e9}


def machine(size: int) -> Record:
    """Device, date, versions, and the bf16 TFLOP/s of a product of this size."""
    left, right = torch.randn(2, size, size, device=DEVICE, dtype=torch.bfloat16)
    for _ in range(2):  # the first to warm up
        start = now()
        for _ in range(10):
            left @ right
    reached = 20 * size**3 / (now() - start) / 1e12
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    peak = next((value for device, value in PEAKS.items() if device in name), reached)
    versions = {package: version(package) for package in ("torch", "transformers", "peft", "trl")}
    return {"device": name, "date": time.strftime("%Y-%m-%d"), **versions, "reached_tflops": reached, "peak_tflops": peak}


@contextmanager
def watching(owner: type, name: str) -> Iterator[list[float]]:
    """Inside the block, the seconds of every call of a method."""
    original, seconds = getattr(owner, name), []

    def watched(*args: Any, **kwargs: Any) -> None:
        start = now()
        original(*args, **kwargs)
        seconds.append(now() - start)

    with mock.patch.object(owner, name, watched):
        yield seconds


class Clock(TrainerCallback):
    """When each step ended; a trainer calls it before callbacks that it adds itself, such as what moves the frontier."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Keep the time."""
        self.ends.append(now())


def model(spec: Record, role: str) -> PreTrainedModel:
    """A Llama with random weights, made in bf16 on the device."""
    sizes = {name: spec[name] for name in ("vocab_size", "max_position_embeddings")}
    torch.manual_seed(0)
    with DEVICE:
        config = LlamaConfig(**spec[role], **sizes, rms_norm_eps=1e-5, pad_token_id=0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def rows(spec: Record, count: int) -> list[Record]:
    """Sequences of random ids; the last ``valid`` tokens of each are its answer."""
    generator, prompt = torch.Generator().manual_seed(0), spec["length"] - spec["valid"]
    ids = torch.randint(3, spec["vocab_size"], (count, spec["length"]), generator=generator).tolist()
    return [{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in ids]


def settings(spec: Record, folder: Path, **changes: Any) -> SemAlignConfig:
    """Settings of a run that logs and saves nothing."""
    common = {
        "output_dir": str(folder / "run"), "signals_dir": str(folder / "signals"), "pairing": "uniform", "lora_r": RANK,
        "frontier": "single", "relation_weight": 1.0,
        "per_device_train_batch_size": spec["batch"], "per_device_eval_batch_size": spec["batch"], "max_length": None,
        "bf16": True, "use_cpu": not CUDA, "disable_tqdm": True, "log_level": "error", "report_to": "none",
        "save_strategy": "no", "logging_strategy": "no",
    }  # fmt: skip
    return SemAlignConfig(**common | changes)


def transfer(spec: Record, folder: Path, keep: Callable, source: Any, steps: int, count: int, **changes: Any) -> None:
    """SemAlign through all stages, so many steps in each: seconds of pass, steps and prefix, and memory.

    A step lasts from the end of the one before it, so that reading is in it. A stage's first step does not count: it warms up,
    and the prefix comes before it.
    """
    target, clock, stages = model(spec, "target"), Clock(), spec["target"]["num_hidden_layers"]
    args = settings(spec, folder, max_steps=steps * stages, **changes)
    with watching(CachedSignals, "prepare") as prepared, watching(TargetPrefix, "move") as moved:
        clear()
        start = now()
        trainer = SemAlignTrainer(target, source, args, rows(spec, count), callbacks=[clock])
        trainer.prepare()
        made = now()
        keep(sequences=count, signals=prepared[0], phases=trainer.seconds, construction=made - start, before=memory())
        clear()
        trainer.train()
    by_stage = [(clock.ends[(k + 1) * steps - 1] - clock.ends[k * steps]) / (steps - 1) for k in range(stages)]
    # nothing lies below the first stage
    keep(first_step=clock.ends[0] - made, prefix=moved[1:], steps=by_stage, training=memory())


def schedule(spec: Record, folder: Path, keep: Callable) -> None:
    """The schedule, with a source that is on the device for its pass."""
    transfer(spec, folder, keep, model(spec, "source"), spec["stage_steps"], spec["sequences"])


def joint(spec: Record, folder: Path, keep: Callable) -> None:
    """Steps of all layers at once, on the signals that the schedule has left; the first two do not count."""
    source, clock = model(spec, "source"), Clock()
    args = settings(spec, folder, max_steps=spec["gkd_steps"], frontier="joint", relation_weight=0.1)
    trainer = SemAlignTrainer(model(spec, "target"), source, args, rows(spec, spec["sequences"]), callbacks=[clock])
    keep(phases=trainer.seconds)
    del source
    clear()
    trainer.train()
    keep(steps=(clock.ends[-1] - clock.ends[1]) / (len(clock.ends) - 2), training=memory())


def gkd(spec: Record, folder: Path, keep: Callable) -> None:
    """Steps of GKD in micro-batches; the first two do not count."""
    from rivals import gkd_trainer

    micro = spec.get("micro", spec["batch"])
    batches = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": spec["batch"] // micro}
    args, clock = settings(spec, folder, max_steps=spec["gkd_steps"], **batches), Clock()
    align = encode(rows(spec, spec["sequences"]), None, split="align")
    try:
        gkd_trainer(model(spec, "target"), model(spec, "source"), align, Collator(0), args, callbacks=[clock]).train()
    except RuntimeError as error:
        if "out of memory" not in str(error) and "ALLOC_FAILED" not in str(error):
            raise
        keep(micro=micro, out_of_memory=True)
    else:
        keep(micro=micro, steps=(clock.ends[-1] - clock.ends[1]) / (len(clock.ends) - 2), training=memory())


def stream(spec: Record, folder: Path, keep: Callable, checkpointing: bool = True) -> None:
    """The source from disk, a layer at a time; without checkpointing, signals that the run with it has left are used again."""
    layers, wanted, count = spec["source"]["num_hidden_layers"], spec["target"]["num_hidden_layers"], spec["streamed"]
    layers = min(layers, spec["source_layers"])
    if checkpointing:
        source = model(spec | {"source": spec["source"] | {"num_hidden_layers": layers}}, "source")
        size = sum(p.numel() * p.element_size() for p in source.parameters())
        needed = size + count * spec["length"] * (wanted + 8) * spec["source"]["hidden_size"] * 2  # states: no less than enough
        if needed > (free := shutil.disk_usage(folder).free):
            raise OSError(f"{needed / 1e9:.0f} GB needed, {free / 1e9:.0f} free: set --scratch or --source-layers")
        start = now()
        source.save_pretrained(folder / "source", max_shard_size="5GB")
        keep(source_gb=size / 1e9, writing=now() - start)
        del source
        clear()  # else the target would come to lie among what the source leaves
    changes = {"activation_checkpointing": checkpointing, "pairing": "uniform" if layers >= wanted else "proportional"}
    transfer(spec, folder, keep, str(folder / "source"), 2, count, source_memory="stream", **changes)


def build_map(spec: Record, folder: Path, keep: Callable) -> None:
    """The map between two heads, then their pseudoinverses in float32, the target's first, which the map stands for."""
    shapes = [(spec["vocab_size"], spec[role]["hidden_size"]) for role in ("source", "target")]
    source, target = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes)
    SemanticMap.from_heads(source[:256, :16], target[:256, :16])  # loads the libraries
    clear()
    start = now()
    ours = SemanticMap.from_heads(source, target).matrix
    keep(seconds=now() - start, **memory())
    source, target = source.float(), target.float()
    torch.linalg.pinv(target[:256, :16])
    for name, head in (("target", target), ("source", source)):
        clear()
        start = now()
        inverse = torch.linalg.pinv(head)
        keep(**{f"pinv of the {name}": {"seconds": now() - start, **memory()}})
        if name == "target":
            keep(difference=float(((inverse @ source).double() - ours).norm() / ours.norm()))
        del inverse


JOBS: dict[str, Callable] = {  # a part's begin with its name
    "schedule": schedule, "schedule, joint": joint, "gkd": gkd,
    "stream": stream, "stream, whole activations": partial(stream, checkpointing=False),
    "map": build_map,
}  # fmt: skip


def work(name: str, spec: Record, scratch: Path) -> None:
    """Run a job in this process; what it has found so far is in its file."""
    found: Record = {"machine": machine(spec["product"])}

    def keep(**more: Any) -> None:
        found.update(more)
        (scratch / f"{name}.json").write_text(json.dumps(found))

    clear()
    folder = scratch / name.partition(",")[0]
    folder.mkdir(exist_ok=True)
    for other in scratch.iterdir():  # the disk may not hold two parts' states
        if other.is_dir() and other != folder:
            shutil.rmtree(other)
    JOBS[name](spec, folder, keep)


def call(command: list[str], limit: float, log: Path) -> Record:
    """Run a script, and all that it starts, for so many seconds at most; ``failed`` says what went wrong, if anything."""
    environment = {"CUDA_VISIBLE_DEVICES": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    command = [sys.executable, "-W", "ignore", *command]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, process_group=0)
        try:
            code = process.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            return {"failed": f"stopped after {limit:.0f} s"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {"failed": f"return code {code}: {log.read_text(errors='replace').strip()[-2000:]}"} if code else {}


def compare(spec: Record, parts: Record, peak: float | None) -> Record:
    """Speed and utilisation of steps and pass, and seconds of 5 epochs over 1,000 sequences, as far as parts have been run."""
    stages, of_joint, of_gkd, of_pass = flops(spec)
    ours, theirs = (parts.get(name, {}) for name in ("schedule", "gkd"))
    speeds: Record = {}

    def add(name: str, part: Record, seconds: float, count: float) -> None:
        utilisation = count / seconds / 1e12 / (peak or part["machine"]["peak_tflops"])
        tokens = spec["batch"] * spec["length"] / seconds
        speeds[name] = {"seconds": seconds, "tokens_per_s": tokens, "tflop": count / 1e12, "utilisation": utilisation}

    if "steps" in ours:
        for k in (1, len(stages) // 2, len(stages)):
            add(f"SemAlign, stage {k}", ours, ours["steps"][k - 1], stages[k - 1])
        add("SemAlign, mean of all stages", ours, mean(ours["steps"]), mean(stages))
        add("the source's pass, a batch", ours, ours["signals"] * spec["batch"] / ours["sequences"], of_pass)
    if "steps" in (all_at_once := parts.get("schedule, joint", {})):
        add("SemAlign, joint", all_at_once, all_at_once["steps"], of_joint)
    if "steps" in theirs:
        add(f"GKD, micro-batches of {theirs['micro']}", theirs, theirs["steps"], of_gkd)
    if not ("steps" in ours and "steps" in theirs):
        return {"speeds": speeds}
    steps, share = 5 * math.ceil(1000 / spec["batch"]), 1000 / ours["sequences"]
    seconds = {"pass": share * ours["signals"], "prefix": share * sum(ours["prefix"]), "steps": steps * mean(ours["steps"])}
    seconds |= {"SemAlign": sum(seconds.values()), "GKD": steps * theirs["steps"]}
    return {"speeds": speeds, "schedule": seconds, "times_gkd": seconds["GKD"] / seconds["SemAlign"]}


def text(value: Any) -> str:
    """Figures in one line; of lists their mean, of long texts the last line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} ({text(item)})" for key, item in value.items() if key != "machine")
    value = mean(value) if value and isinstance(value, list) else value
    return f"{value:.4g}" if isinstance(value, float) else str(value).strip().rpartition("\n")[2]


def markdown(parts: Record, compared: Record) -> str:
    """The table of speeds, the comparison with its formula, and all figures."""
    lines = ["| | seconds | tokens/s | model TFLOP | utilisation |", "|---|---|---|---|---|"]
    for name, row in compared["speeds"].items():
        cells = f"{row['seconds']:.3g} | {row['tokens_per_s']:,.0f} | {row['tflop']:.4g} | {row['utilisation']:.1%}"
        lines.append(f"| {name} | {cells} |")
    if "schedule" in compared:
        seconds = {name: f"{value:.0f} s" for name, value in compared["schedule"].items()}
        lines += [
            f"\n5 epochs over 1,000 sequences by these figures: GKD {seconds['GKD']}, SemAlign {seconds['SemAlign']}: "
            f"{compared['times_gkd']:.2f} times as fast. GKD: steps x step. SemAlign: 1,000 x pass a sequence",
            f"({seconds['pass']}) + 1,000 x prefix a sequence, of all stages ({seconds['prefix']}) + steps x mean step "
            f"({seconds['steps']}). What each process does once (loading, checksums, the map) comes on top.",
        ]
    lines += ["", *(f"- {name}: {text(found)}" for name, found in parts.items())]
    machines = [found["machine"] for found in parts.values() if "machine" in found]
    return "\n".join([*lines, "", *{(one["device"], one["date"]): text(one) for one in machines}.values(), ""])


def main() -> None:
    """Run the parts within the budget, and write what each has found before the next begins."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="all by default; with --smoke all but kernels")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds in all")
    parser.add_argument("--source-layers", type=int, default=40, help="layers of the streamed source")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the device")
    parser.add_argument("--scratch", type=Path, default=Path("runs"), help="where temporary files of up to 40 GB go")
    parser.add_argument("--smoke", action="store_true", help="tiny models on any device, into runs/gpu-smoke")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        for name, spec in options.worker.items():
            work(name, spec, options.scratch)
        return
    end, spec = (
        time.perf_counter() + options.budget,
        (SMOKE if options.smoke else FULL) | {"source_layers": options.source_layers},
    )
    results = Path("runs/gpu-smoke") if options.smoke else HERE / "results"
    for path in (results, options.scratch):
        path.mkdir(parents=True, exist_ok=True)
    numbers, tables = results / "gpu.json", results / "gpu.md"
    parts: Record = json.loads(numbers.read_text())["parts"] if numbers.is_file() and not options.smoke else {}
    wanted = options.parts or PARTS[: -1 if options.smoke else None]

    def write(name: str, found: Record) -> None:
        parts[name] = found
        compared = compare(spec, parts, options.peak_tflops)
        numbers.write_text(json.dumps({"settings": spec, "compared": compared, "parts": parts}, indent=1))
        tables.write_text(markdown(parts, compared))
        if "OUT" in os.environ:
            for path in (numbers, tables):
                shutil.copy(path, os.environ["OUT"])
        print(f"{name}: {found.get('failed', 'done')}; {end - time.perf_counter():.0f} s left", flush=True)

    def run(names: list[str], scratch: Path, **changes: Any) -> None:
        jobs = dict.fromkeys(names, spec | changes)
        limit = min(end - time.perf_counter(), MAP_SECONDS if names == ["map"] else math.inf)
        failed = call([__file__, "--scratch", str(scratch), "--worker", json.dumps(jobs)], limit, scratch / "log")
        for name in names:
            result = scratch / f"{name}.json"
            write(name, (json.loads(result.read_text()) if result.is_file() else {}) | failed)
            if parts[name].get("out_of_memory") and (micro := parts[name]["micro"] // 2):
                run([name], scratch, micro=micro)

    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="gpu-") as folder:
        scratch = Path(folder)
        jobs = [name for name in JOBS if name.partition(",")[0] in wanted]
        for names in [jobs] if options.smoke and jobs else [[name] for name in jobs]:
            run(names, scratch)
        if "kernels" in wanted:
            command = [str(HERE / "loss_kernels.py"), *(["--smoke"] if options.smoke else [])]
            failed = call(command, end - time.perf_counter(), scratch / "log")
            write("kernels", failed or {"return code": 0, "output": (scratch / "log").read_text(errors="replace")})
    print(tables.read_text())
    if broken := [name for name, found in parts.items() if "failed" in found]:
        sys.exit(f"Failed: {', '.join(broken)}")


if __name__ == "__main__":
    main()
