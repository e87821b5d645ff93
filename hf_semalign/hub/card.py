"""Render the model card of a run from its record and results. ``card.md.jinja`` is the template.

All statements about a run are computed from its numbers. Text from data is escaped. A model that is not on the Hub is shown by
name, never by path.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hf_semalign.models.names import EMBEDDED, is_hub_id

#: Display names of the methods.
METHOD_NAMES = {
    "target": "Target before", "kd": "Distillation (KL only)", "sft": "Fine-tuning", "seeking": "Seeking", "laten": "LaTen",
    "semalign": "SemAlign", "source": "Source",
}  # fmt: skip
KL_LABEL = "KL(source ‖ target)"
TAGS = ("lora", "transformers", "hf-semalign", "knowledge-transfer")
SPLIT_USES = {"align": "training", "eval": "evaluation"}
EXTRACT_USES = {"semalign": "layer attribution", "seeking": "sensitivities of weights", "laten": "neuron attribution"}
FIGURES = ("layers.png", "losses.png", "comparison.png")
# Benchmarks for which the Hub shows results from ``.eval_results``: dataset, task, rows of the whole test set.
REGISTERED = {"gsm8k": ("openai/gsm8k", "gsm8k", 1319)}
OTHERS = (
    "forbids using the source's outputs or results to improve any large language model other than {} and its derivatives "
    "(1.b.v)"
)
NAMED = (
    "asks two things of a distributed model that was trained or improved with Llama or its outputs: its name begins with "
    "“Llama”, and its distributor displays “Built with Llama” (1.b.i)"
)
# Restrictions that the licence of a source puts on models trained with it, with sections of the licence.
RESTRICTIONS = {
    "llama2": OTHERS.format("Llama 2"),
    "llama3": OTHERS.format("Llama 3"),
    **dict.fromkeys(("llama3.1", "llama3.2", "llama3.3"), NAMED),
    "gemma": "counts a model that was made by transferring patterns of the source's weights or outputs, for example by "
    "distillation, as a Model Derivative, to which its terms and use restrictions apply (1.1)",
    **dict.fromkeys(("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"), "allows no commercial use"),
}
OWN_FAMILY = ("llama2", "llama3")  # may be used to improve models under the same licence
OF_STATES = ("pairing", "map_kind", "scale", "layer_loss", "stage_budget", "source_parts")  # no effect on other methods


@dataclass(frozen=True)
class _Measure:
    """One metric for all methods."""

    metric: str  # id in the model-index
    label: str  # display name
    values: dict[str, float]  # by method, if measured
    percent: bool = False  # a share, higher is better; otherwise lower is better
    headline: bool = False  # shown in the summary

    def shown(self, method: str, unit: bool = True) -> str:
        """The formatted value, or a dash if it was not measured."""
        value = self.values.get(method)
        if value is None:
            return "-"
        if self.percent:
            return f"{100 * value:.1f} %" if unit else f"{100 * value:.1f}"
        return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.3f}"

    def behind(self, method: str, other: str) -> bool:
        """Whether ``method`` is visibly worse than ``other``. A diverged value always is."""
        mine, theirs = self.values.get(method), self.values.get(other)
        if mine is None or theirs is None or self.shown(method) == self.shown(other):
            return False
        return math.isnan(mine) or (mine < theirs if self.percent else mine > theirs)

    def cell(self, method: str) -> Markup:
        """The value for the table, in bold if no method except the source is better."""
        shown, others = self.shown(method, unit=False), self.values.keys() - {"source"}
        best = method in others and not any(self.behind(method, other) for other in others)
        return Markup(f"**{shown}**" if best else shown)


def render_card(record: dict[str, Any], results: dict[str, Any]) -> str:
    """Render the model card of a run: YAML metadata and text. Sections without data are left out.

    Args:
        record: content of ``semalign.json``.
        results: content of ``results.json``.

    Returns:
        The content of ``README.md``.
    """
    method, metrics, settings, data = record["method"], results["metrics"], record["settings"], record["data"]
    measures, methods = _measures(metrics), method_order(metrics)
    losses = {settings["layer_loss"]: settings["relation_weight"], settings["output_loss"]: settings["kl_weight"]}
    decoded = any(numbers.get("exact_match") for numbers in metrics.values())
    return _TEMPLATES.get_template("card.md.jinja").render(
        metadata=Markup(_metadata(record, results, measures).to_yaml()),
        method=method,
        own=METHOD_NAMES[method],
        source=_model(record["source"]),
        target=_model(record["target"]),
        task=_public(results["task"]),
        origin=_link(results["dataset"], "datasets/") if results["dataset"] else None,
        frontier=settings["frontier"],
        losses=[loss for loss, weight in losses.items() if weight],
        measures=measures,
        changes=[measure for measure in measures if measure.headline and {"target", method} <= measure.values.keys()],
        methods=methods,
        decoded=decoded,
        benchmarks={score["task"]: score for numbers in metrics.values() for score in benchmark_scores(numbers)}.values(),
        has_baselines=len(metrics.keys() - {"source"}) > 2,
        steps=results["steps"],
        eval_rows=data["eval"]["rows"] if "eval" in data else None,
        forgetting=_forgetting(metrics),
        figures=[name for name in FIGURES if name in results["figures"] and (results["history"] or name != "losses.png")],
        scored=bool(record["pairing"]["scores"]),
        splits=_splits(record),
        extract_use=_use_of_extract(record),
        tokenizers=record.get("tokenizers"),
        answers=data.get("align", {}).get("answers"),
        source_prompts=data.get("align", {}).get("source_prompts"),
        aligned=data.get("align", {}).get("aligned", 1.0),
        overlap=results.get("overlap"),
        source_layers=record["pairing"]["source_layers"] if uses_pairs(record) else [],
        map=record["map"],
        settings=_settings(record),
        cost=_cost(results),
        licences=_licences(record) if "licences" in record else None,
        restriction=restriction(record),
        versions=[f"{name} {version}" for name, version in record["versions"].items()],
        limits=_limits(record, measures, methods, decoded),
    )


def _model(name: str) -> dict[str, Any]:
    """The public name of a model as text, as a link and as a Python string."""
    public = _public(name)
    literal = Markup(json.dumps(public, ensure_ascii=False))
    embedded = public.startswith(EMBEDDED)
    return {"name": public, "link": _link(name), "literal": literal, "embedded": embedded, "on_hub": _on_hub(public)}


def _measures(metrics: dict[str, dict[str, Any]]) -> list[_Measure]:
    """The metrics that were measured: benchmarks, exact match by skill and its mean, held-out KL, and answer loss."""
    scores = [(method, score) for method, numbers in metrics.items() for score in benchmark_scores(numbers)]
    shares = {method: numbers["exact_match"] for method, numbers in metrics.items() if numbers.get("exact_match")}
    skills = list(dict.fromkeys(skill for by_skill in shares.values() for skill in by_skill))
    measures = []
    for task, metric in dict.fromkeys((score["task"], score["metric"].partition(",")[0]) for _, score in scores):
        values = {method: score["value"] for method, score in scores if score["task"] == task}
        measures.append(_Measure(metric, _line(f"{task}, {metric}"), values, percent=True, headline=True))
    for skill in skills if len(skills) > 1 else ():
        values = {method: by_skill[skill] for method, by_skill in shares.items() if skill in by_skill}
        measures.append(_Measure("exact_match", _line(skill), values, percent=True))
    if skills:
        values = {method: sum(by_skill.values()) / len(by_skill) for method, by_skill in shares.items()}
        measures.append(_Measure("exact_match", "mean exact match", values, percent=True, headline=True))
    for metric, key, label in (("kl_divergence", "kl", KL_LABEL), ("cross_entropy", "loss", "answer loss")):
        if values := {method: numbers[key] for method, numbers in metrics.items() if key in numbers}:
            measures.append(_Measure(metric, label, values, headline=key == "kl"))
    return measures


def _metadata(record: dict[str, Any], results: dict[str, Any], measures: Sequence[_Measure]) -> ModelCardData:
    source, target, task = _public(record["source"]), _public(record["target"]), _public(results["task"])
    dataset = results["dataset"] if _on_hub(results["dataset"]) else None
    rows, adapted = record["data"].get("eval", {}).get("rows"), _on_hub(target)
    data: dict[str, Any] = {"dataset_type": dataset or task, "dataset_name": f"{task} ({rows} held-out rows)" if rows else task}
    found = [
        EvalResult("text-generation", **data, metric_type=measure.metric, metric_name=measure.label, metric_value=value)
        for measure in measures
        if math.isfinite(value := round(measure.values.get(record["method"], math.nan), 6))
    ]
    return ModelCardData(
        library_name="peft",
        base_model=target if adapted else None,
        base_model_relation="adapter" if adapted else None,
        pipeline_tag="text-generation",
        datasets=[dataset] if dataset else None,
        language=["en"] if dataset else None,  # of the four benchmarks
        **((record.get("licences") or {}).get("target") or {}),
        metrics=["exact_match"] if any(measure.percent for measure in measures) else None,
        tags=[*TAGS, *([f"base_model:adapter:{target}"] if adapted else [])],
        model_name=f"{METHOD_NAMES[record['method']]}: {source} to {target}" if found else None,
        eval_results=found or None,
    )


def _forgetting(metrics: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Results on tasks that were not transferred, by task and method."""
    kept = {method: numbers["forgetting"] for method, numbers in metrics.items() if numbers.get("forgetting")}
    rows = []
    for task, method in product(kept["target"] if kept else (), method_order(kept)):
        found = kept[method][task]
        exact = (found.get("exact_match") or {}).values()
        share = f"{100 * sum(exact) / len(exact):.1f}" if exact else "-"
        numbers = {"kl": f"{found['kl']:.3f}", "loss": f"{found['loss']:.3f}", "accuracy": f"{100 * found['accuracy']:.1f}"}
        rows.append({"task": task, "method": method, **numbers, "exact_match": share})
    return rows


def uses_pairs(record: dict[str, Any]) -> bool:
    """Whether the layer pairs had an effect: only SemAlign uses them, and only if the layer loss has a weight."""
    return record["method"] == "semalign" and record["settings"]["relation_weight"] > 0


def _use_of_extract(record: dict[str, Any]) -> str:
    """What the extract split was used for, or an empty string if it was not used."""
    used = uses_pairs(record) and (record["pairing"]["scores"] or record["settings"]["scale"] != "none")
    idle = record["method"] == "semalign" and not used
    return "" if idle else EXTRACT_USES.get(record["method"], "")


def _splits(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, use, rows and fingerprint of each split."""
    uses = SPLIT_USES | {"extract": _use_of_extract(record) or "not used with these settings"}
    return [{"name": split, "use": uses.get(split, ""), **facts} for split, facts in record["data"].items()]


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """The settings that had an effect. For a baseline, they include its own numbers."""
    settings, method = record["settings"], record["method"]
    idle = {"num_train_epochs" if settings["max_steps"] > 0 else "max_steps"}
    if method == "semalign" and not uses_pairs(record):
        idle |= {"pairing", "scale", "layer_loss"}
    if method != "semalign":
        idle |= {*OF_STATES}
        settings = settings | {name: value for name, value in record.get(method, {}).items() if _is_short(value)}
    return {name: value for name, value in settings.items() if name not in idle and value is not None}


def _is_short(value: Any) -> bool:
    """Whether a value is a number or a list of whole numbers."""
    return isinstance(value, int | float) or (isinstance(value, list | tuple) and all(isinstance(one, int) for one in value))


def _cost(results: dict[str, Any]) -> dict[str, Any] | None:
    """Seconds and operations by phase, memory and machine."""
    seconds, forwards = results["seconds"], {**results.get("cost", {})}
    if "signals" in forwards:
        forwards["source signals"] = forwards.pop("signals")
    phases = [phase for phase in dict.fromkeys((*seconds, *forwards)) if phase != "total"]
    if "total" in seconds:
        phases.append("total")
    counted = {**forwards, "total": sum(forwards.values())}
    machine, memory = dict(results["machine"]), results["peak_memory_mb"]
    if "cpus" in machine:
        machine["cpus"] = f"{machine.pop('cpus')} CPU cores"  # moved to the end
    times = {phase: f"{seconds[phase]:,.1f}" if phase in seconds else "in training" for phase in phases}
    facts = {
        "phases": [(phase, times[phase], f"{counted[phase]:,.0f}" if counted.get(phase) else "") for phase in phases],
        "counted": bool(forwards),
        "machine": list(machine.values()),
        "memory": f"{memory:,.0f}" if memory else None,
    }
    return {**facts, "of_process": machine.get("device") == "cpu"} if any(facts.values()) else None


def _licences(record: dict[str, Any]) -> dict[str, str | None]:
    """The licence that each model's card names."""
    return {role: (record["licences"].get(role) or {}).get("license") for role in ("target", "source")}


def _limits(record: dict[str, Any], measures: Sequence[_Measure], methods: Sequence[str], decoded: bool) -> dict[str, Any]:
    """Numbers in which the method is worse than others, and facts about what the results do not show."""
    method = record["method"]
    others = [other for other in methods if other not in (method, "source")]
    skills = sum(measure.percent and not measure.headline for measure in measures) or 1
    rows = record["data"].get("eval", {}).get("rows") if decoded else None
    return {
        "worse": {other: [measure for measure in measures if measure.behind(method, other)] for other in others},
        "alone": not set(others) - {"target"},
        "rows_a_skill": f"{rows / skills:.0f}" if rows else None,
        "standard_error": f"{50 * math.sqrt(skills / rows):.1f}" if rows else None,  # for a share of one half, in points
        "seed": record["settings"]["seed"],
    }


def restriction(record: dict[str, Any]) -> str | None:
    """The restriction that the source's licence puts on a run's adapter, or ``None`` if none is known."""
    known = {role: (licence or {}).get("license") for role, licence in (record.get("licences") or {}).items()}
    source = known.get("source")
    if source not in RESTRICTIONS or (source in OWN_FAMILY and known.get("target") == source):
        return None
    return f"The source's licence ({source}) {RESTRICTIONS[source]}."


def benchmark_entries(results: dict[str, Any], method: str) -> dict[str, list[dict[str, Any]]]:
    """Content of a run's ``.eval_results`` files, by file name.

    Only scores on the whole test set of a benchmark in ``REGISTERED`` are included.

    Args:
        results: content of ``results.json``.
        method: the run's method.
    """
    found = {}
    for score in benchmark_scores(results["metrics"].get(method, {})):
        dataset, task, rows = REGISTERED.get(score["task"], ("", "", None))
        if score["rows"] == rows:
            chat = "with" if score["chat_template"] else "without"
            notes = f"zero-shot, greedy, lm-eval {score['harness']}, {chat} chat template"
            entry = EvalResultEntry(dataset, task, round(100 * score["value"], 2), date=results["date"], notes=notes)
            found[f"{score['task']}.yaml"] = eval_result_entries_to_yaml([entry])
    return found


def benchmark_scores(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The lm-eval scores of a model, one per benchmark. Earlier versions stored a single one under another key."""
    return metrics.get("benchmarks") or ([metrics["benchmark"]] if "benchmark" in metrics else [])


def _link(name: str, kind: str = "") -> Markup:
    name = _public(name)
    return Markup(f"[{escaped(name)}](https://huggingface.co/{kind}{name})" if _on_hub(name) else escaped(name))


def _on_hub(name: str | None) -> bool:
    """Whether the name has the form ``owner/name``."""
    return name is not None and is_hub_id(name) and name.count("/") == 1


def _public(name: str) -> str:
    """The name without local paths: a Hub id as it is, and only the last part of anything else."""
    name = _line(name)
    return name if _on_hub(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _line(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_line, value))
    value = value.value if isinstance(value, Enum) else value
    return f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())


def escaped(value: Any) -> str:
    """Escape data for Markdown, including tables."""
    return re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", html.escape(_line(value), quote=False))


def pipe_table(rows: Sequence[Sequence[str]], align: str = "---") -> str:
    """Rows as a Markdown table. The first row is the heading."""
    lines = [rows[0], ["---", *[align] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def method_order(methods: Iterable[str]) -> list[str]:
    """Order methods for display: target, baselines in the given order, SemAlign, source."""
    place = {"target": 0, "semalign": 2, "source": 3}
    return sorted(methods, key=lambda method: place.get(method, 1))


def _printed(value: Any) -> Markup:
    """Escape a value that the template prints, unless it is Markdown from this module."""
    return value if isinstance(value, Markup) else Markup(escaped(value))


def _paragraph(text: str) -> str:
    """Join lines of the template into one line, so that data cannot start a heading or a list."""
    return " ".join(text.split()) + "\n"


# Autoescape is meant for HTML. Here it distinguishes Markdown (Markup) from data, which _printed escapes.
_TEMPLATES = Environment(
    loader=PackageLoader("hf_semalign", "hub"), undefined=StrictUndefined, autoescape=True, finalize=_printed,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
_TEMPLATES.filters["paragraph"] = _paragraph
_TEMPLATES.filters["called"] = lambda method: METHOD_NAMES.get(method, method)
_TEMPLATES.filters["thousands"] = lambda number: f"{number:,}"
