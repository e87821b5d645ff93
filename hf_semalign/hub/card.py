"""The model card of a run: record and results to the text of ``README.md``, a pure function.

What a card says about a run is computed from its numbers. Text that comes from data is escaped, and a model that is not on
the Hub is shown by its name, never by a path.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from hf_semalign.models.names import EMBEDDED, is_hub_id

#: What readers call the methods; the order of the baselines is that of the run.
METHOD_NAMES = {
    "target": "Target before", "kd": "Distillation (KL only)", "sft": "Fine-tuning", "seeking": "Seeking", "laten": "LaTen",
    "semalign": "SemAlign", "source": "Source",
}  # fmt: skip
KL_LABEL = "KL(source ‖ target)"
TAGS = ("lora", "transformers", "hf-semalign", "knowledge-transfer")
SPLIT_USES = {"align": "training", "eval": "evaluation"}
EXTRACT_USES = {"semalign": "layer attribution", "seeking": "sensitivities of weights", "laten": "neuron attribution"}
FRONTIER_TEXTS = {
    "single": "one target layer at a time, from shallow to deep",
    "cumulative": "from shallow to deep, with one more target layer at each stage",
    "joint": "in all target layers at once",
}
LOSS_TEXTS = {
    "relation": "relation loss (a layer's update of the residual stream takes on the geometry of its source layer's)",
    "fisher": "Fisher loss (the logits of a layer's states take on those of its source layer's, to the second order)",
    "steering": "steering loss (a layer's states take on the direction of its source layer's)",
}
OUTPUT_TEXTS = {
    "kl": f"{KL_LABEL} of the output distributions",
    "cosine": "cosine loss of the final state (it takes on the direction of the source's)",
    "answers": "cross-entropy of the answers",
}
METHOD_TEXTS = {
    "semalign": "No weights are copied: SemAlign decomposes hidden states of the source into vocabulary semantics, recomposes "
    "them in the target's space and trains on them, {frontier}. The loss is the {loss}.",
    "kd": "It was trained by ordinary distillation, {frontier}, as a baseline of SemAlign. The loss is the {loss}.",
    "sft": "It was trained on the answers alone, {frontier}, as a baseline of SemAlign: the source was only measured beside "
    "it. The loss is the {loss}.",
    "seeking": "It was made by Seeking, a baseline of SemAlign: windows of the source's weights, chosen by sensitivity, are "
    "where LoRA starts from; it was then trained on the answers, {frontier}. The loss is the {loss}.",
    "laten": "It was made by LaTen, a baseline of SemAlign: weights of the source's neurons, chosen by attribution, were "
    "translated by hypernetworks and added to the target's. Nothing was trained after that.",
}
# Benchmarks whose results the Hub shows from ``.eval_results``: dataset, task, rows of the whole test set.
REGISTERED = {"gsm8k": ("openai/gsm8k", "gsm8k", 1319)}
OTHERS = "forbids to use its outputs or results to improve any other large language model than {} and its derivatives (1.b.v)"
NAMED = (
    "asks of a model that was trained or improved with it or its outputs, and is distributed, that its name begins with "
    "“Llama”, and of who distributes it to display “Built with Llama” (1.b.i)"
)
# What the licence of a source says of models that learn from it, where it says anything that binds; sections of the licences.
RESTRICTIONS = {
    "llama2": OTHERS.format("Llama 2"),
    "llama3": OTHERS.format("Llama 3"),
    **dict.fromkeys(("llama3.1", "llama3.2", "llama3.3"), NAMED),
    "gemma": "counts a model that was made by transfer of patterns of its weights or outputs, distillation among them, as a "
    "Model Derivative, to which its terms and use restrictions apply (1.1)",
    **dict.fromkeys(("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"), "allows no commercial use"),
}
OWN_FAMILY = ("llama2", "llama3")  # which may improve what is under the same licence
OF_STATES = ("pairing", "map_kind", "scale", "layer_loss", "stage_budget", "source_parts")  # say nothing of other methods
CITATION = """```bibtex
@article{gu2025semalign,
  title={Beyond Neural Incompatibility: Cross-Scale Knowledge Transfer in Language Models through Latent Semantic Alignment},
  author={Gu, Jian and Aleti, Aldeida and Chen, Chunyang and Zhang, Hongyu},
  journal={arXiv preprint arXiv:2510.24208},
  year={2025}
}
```"""


@dataclass(frozen=True)
class _Measure:
    """One number of every method."""

    metric: str  # id for the model-index
    label: str  # what readers call it
    values: dict[str, float]  # by method, where measured
    percent: bool = False  # a share, where more is better; otherwise less is
    headline: bool = False  # goes into the summary

    def shown(self, method: str, unit: bool = True) -> str:
        """The value as readers see it; a dash where there is none."""
        value = self.values.get(method)
        if value is None:
            return "-"
        if self.percent:
            return f"{100 * value:.1f}" + " %" * unit
        return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.3f}"

    def behind(self, method: str, other: str) -> bool:
        """Does ``method`` do visibly worse than ``other``? A diverged value always does."""
        mine, theirs = self.values.get(method), self.values.get(other)
        if mine is None or theirs is None or self.shown(method) == self.shown(other):
            return False
        return math.isnan(mine) or (mine < theirs if self.percent else mine > theirs)

    def cell(self, method: str, contenders: Sequence[str]) -> str:
        """The value for the table, bold if no contender is ahead."""
        shown = self.shown(method, unit=False)
        best = method in contenders and method in self.values and not any(self.behind(method, c) for c in contenders)
        return f"**{shown}**" if best else shown


def render_card(record: dict[str, Any], results: dict[str, Any]) -> str:
    """Write the model card of a run: YAML metadata and text; what has no data is left out.

    Args:
        record: content of ``semalign.json``.
        results: content of ``results.json``.

    Returns:
        The content of ``README.md``.
    """
    measures = _measures(results["metrics"])
    sections = {
        "Use": _use(record),
        "Results": _results(record, results, measures) if measures else "",
        "Forgetting": _forgetting(record, results),
        "Figures": _figures(record, results),
        "Data": _data(record, results) if record["data"] else "",
        "Settings": _settings(record),
        "Cost": _cost(results),
        "Licence": _licence(record) if "licences" in record else "",
        "Versions": ", ".join(f"{escaped(name)} {escaped(version)}" for name, version in record["versions"].items()),
        "Limits": _limits(record, results, measures),
        "Citation": CITATION,
    }
    blocks = [
        f"---\n{_metadata(record, results, measures).to_yaml()}\n---",
        f"# {escaped(_own(record))}: {escaped(_public(record['source']))} → {escaped(_public(record['target']))}",
        _summary(record, results, measures),
        *(f"## {heading}\n\n{body}" for heading, body in sections.items() if body),
    ]
    return "\n\n".join(blocks) + "\n"


def _own(record: dict[str, Any]) -> str:
    """What readers call the run's own method."""
    return METHOD_NAMES.get(record["method"], record["method"])


def _measures(metrics: dict[str, dict[str, Any]]) -> list[_Measure]:
    """Exact match by skill and its mean, held-out KL, answer loss: those that were measured."""
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


def _forgetting(record: dict[str, Any], results: dict[str, Any]) -> str:
    """What became of tasks that were not transferred."""
    kept = {method: numbers["forgetting"] for method, numbers in results["metrics"].items() if numbers.get("forgetting")}
    if not kept:
        return ""
    table = [["Task", "Method", "KL(before ‖ after)", "answer loss", "token accuracy (%)", "exact match (%)"]]
    for name in kept["target"]:
        for method in method_order(kept):
            found = kept[method][name]
            exact = found.get("exact_match")
            share = f"{100 * sum(exact.values()) / len(exact):.1f}" if exact else "-"
            shown = [f"{found['kl']:.3f}", f"{found['loss']:.3f}", f"{100 * found['accuracy']:.1f}", share]
            table.append([escaped(name), escaped(METHOD_NAMES.get(method, method)), *shown])
    return (
        f"{pipe_table(table, '--:')}\n\nTasks that were not transferred: what training did to them. KL from the target before "
        "to the target after, and the answer loss, in nats per token."
    )


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
        model_name=f"{_own(record)}: {source} to {target}" if found else None,
        eval_results=found or None,
    )


def _summary(record: dict[str, Any], results: dict[str, Any], measures: Sequence[_Measure]) -> str:
    settings, task, method = record["settings"], escaped(_public(results["task"])), record["method"]
    losses = [LOSS_TEXTS[settings["layer_loss"]]] * bool(settings["relation_weight"])
    losses += [OUTPUT_TEXTS[settings["output_loss"]]] * bool(settings["kl_weight"])
    changes = [
        f"{measure.label} from {measure.shown('target')} to {measure.shown(method)}"
        + (f" (source: {measure.shown('source')})" if measure.percent and "source" in measure.values else "")
        for measure in measures
        if measure.headline and {"target", method} <= measure.values.keys()
    ]
    return (
        f"A LoRA adapter that transfers what {_link(record['source'])}, the source, knows about {task} into "
        f"{_link(record['target'])}, the target. "
        + METHOD_TEXTS[method].format(frontier=FRONTIER_TEXTS[settings["frontier"]], loss=" plus ".join(losses))
    ) + (f"\n\nOn held-out rows this took the target's {' and its '.join(changes)}." if changes else "")


def _use(record: dict[str, Any]) -> str:
    target = _public(record["target"])
    name = json.dumps(target, ensure_ascii=False)
    base, extra = (name, "") if _on_hub(target) else (f"{name}  # or the folder that holds it", "")
    if target.startswith(EMBEDDED):
        base, extra = f"resolve_model({name})", "from hf_semalign.models.names import resolve_model\n"
    return f"""In the folder of this card (from elsewhere, put the folder or its Hub id for the dot):

```python
{extra}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base}
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ".")
```"""


def _results(record: dict[str, Any], results: dict[str, Any], measures: Sequence[_Measure]) -> str:
    methods, data = method_order(results["metrics"]), record["data"]
    rows = f"{data['eval']['rows']:,} held-out rows" if "eval" in data else "held-out rows"
    contenders = [method for method in methods if method != "source"]
    table = [["Method", *(escaped(measure.label) + " (%)" * measure.percent for measure in measures)]]
    table += [[escaped(METHOD_NAMES.get(m, m)), *(measure.cell(m, contenders) for measure in measures)] for m in methods]
    use = _use_of_extract(record)
    seen = f"seen neither in training nor for {use}" if use else "not seen in training"
    text = f"Measured on {rows}, {seen}. Bold: the best but for the source."
    if any(numbers.get("exact_match") for numbers in results["metrics"].values()):
        text += " Exact match: the greedily decoded answer equals the reference."
    for one in {
        score["task"]: score for numbers in results["metrics"].values() for score in benchmark_scores(numbers)
    }.values():
        chat = "with" if one["chat_template"] else "without"
        how = f"lm-eval {escaped(one['harness'])}, zero-shot, greedy, {chat} chat template"
        text += f" {escaped(one['task'])}: {how}, {one['rows']:,} test rows from {escaped(one['data'])}."
    text += f" {KL_LABEL} and answer loss: nats per token of the reference answers, the lower the better."
    if len(contenders) > 2:
        who = "All methods but LaTen, which has a protocol of its own," if "laten" in contenders else "All methods"
        text += f" {who} took equal steps: {results['steps']:,} optimizer steps on the same rows."
    return f"{pipe_table(table, '--:')}\n\n{text}"


def _figures(record: dict[str, Any], results: dict[str, Any]) -> str:
    scores = "Attribution scores of the source layers, and the" if record["pairing"]["scores"] else "The"
    captions = {
        "layers.png": f"{scores} source layer that supervises each target layer.",
        "losses.png": "Training losses over the optimizer steps." if results["history"] else "",
        "comparison.png": "Held-out results of all methods.",
    }
    drawn = [name for name, caption in captions.items() if caption and name in results["figures"]]
    return "\n\n".join(f"![{captions[name]}](figures/{name})\n\n*{captions[name]}*" for name in drawn)


def _data(record: dict[str, Any], results: dict[str, Any]) -> str:
    origin = f", from {_link(results['dataset'], 'datasets/')}" if results["dataset"] else ""
    table = [["Split", "Used for", "Rows", "Fingerprint"]]
    uses = SPLIT_USES | {"extract": _use_of_extract(record) or "nothing"}
    for split, facts in record["data"].items():
        table.append([escaped(split), uses.get(split, ""), f"{facts['rows']:,}", escaped(facts["fingerprint"])])
    text = f"Task: {escaped(_public(results['task']))}{origin}. No prompt is in two splits."
    if written := record["data"].get("align", {}).get("answers"):
        how = f"drawn at temperature {written['temperature']:g}" if written["temperature"] else "greedy"
        who = {"source": "the source", "target": "the target as it was at the beginning of each round"}[written["by"]]
        text += (
            f" The answers of the align split were written by {who} ({how}, at most {written['max_new_tokens']:,} tokens). Of "
            f"{written['rows']:,} answers {written['cut']:,} did not end in time, {written['empty']:,} were empty and "
            f"{written['unusable']:,} unusable; these are left out."
        )
    if shared := results.get("overlap"):
        text += (
            f" Compared with the {shared['test_rows']:,} test rows of its benchmark: none of these rows asks what one of them "
            f"asks, and {100 * shared['share']:.1f} % of them share 13 words in a row with one."
        )
    return f"{text}\n\n{pipe_table(table)}"


def _use_of_extract(record: dict[str, Any]) -> str:
    """What the extract split was used for; nothing by methods that take nothing out of the source."""
    idle = record["method"] == "semalign" and not record["pairing"]["scores"] and record["settings"]["scale"] == "none"
    return "" if idle else EXTRACT_USES.get(record["method"], "")


def _settings(record: dict[str, Any]) -> str:
    pairs, used, settings = record["pairing"]["source_layers"], record["map"], dict(record["settings"])
    if record["method"] != "semalign":
        facts = {name: value for name, value in record.get(record["method"], {}).items() if _is_short(value)}
        return _setting_table({name: value for name, value in settings.items() if name not in OF_STATES} | facts)
    text = (
        f"Layer pairs (source → target, counted from 0): {', '.join(f'{layer} → {k}' for k, layer in enumerate(pairs))}.\n\n"
        f"Map between the spaces: {used['shape'][1]} → {used['shape'][0]} dimensions, from {used['shared_tokens']:,} shared "
        f"tokens, condition number {used['condition_number']:.3g}."
    )
    if settings["scale"] != "none":
        text += f" Factors on the mapped states, by pair: {', '.join(f'{scale:.3g}' for scale in used['scales'])}."
    return f"{text}\n\n{_setting_table(settings)}"


def _is_short(value: Any) -> bool:
    """A number, or a list of whole numbers."""
    return isinstance(value, int | float) or (isinstance(value, list | tuple) and all(isinstance(one, int) for one in value))


def _setting_table(settings: dict[str, Any]) -> str:
    idle = "num_train_epochs" if settings["max_steps"] > 0 else "max_steps"  # the one without effect
    rows = [[escaped(name), escaped(value)] for name, value in settings.items() if name != idle and value is not None]
    return pipe_table([["Setting", "Value"], *rows])


def _cost(results: dict[str, Any]) -> str:
    """Seconds and operations by phase, memory, and on what."""
    seconds, forwards = results["seconds"], {**results.get("cost", {})}
    if "signals" in forwards:
        forwards["source signals"] = forwards.pop("signals")
    phases = [*(phase for phase in seconds if phase != "total"), *(phase for phase in forwards if phase not in seconds)]
    table = [["Phase", "Seconds", *["Target forwards"] * bool(forwards)]]
    for phase in [*phases, *["total"] * ("total" in seconds)]:
        spent = sum(forwards.values()) if phase == "total" else forwards.get(phase)
        cells = [f"{seconds[phase]:,.1f}" if phase in seconds else "in training", f"{spent:,.0f}" if spent else ""]
        table.append([escaped(phase), *cells[: 1 + bool(forwards)]])
    machine, memory = dict(results["machine"]), results["peak_memory_mb"]
    cores = f", {escaped(machine.pop('cpus'))} CPU cores" if "cpus" in machine else ""
    texts = [
        pipe_table(table, "--:") if phases else "",
        "A target forward is one forward of the whole target over a training example of mean length, and what operations are "
        "counted in; evaluation is not counted."
        if forwards
        else "",
        f"On {', '.join(map(escaped, machine.values()))}{cores}." if machine else "",
        f"Peak memory {memory:,.0f} MB{', of the process' if machine.get('device') == 'cpu' else ''}." if memory else "",
    ]
    return "\n\n".join(filter(None, [texts[0], " ".join(filter(None, texts[1:]))]))


def _licence(record: dict[str, Any]) -> str:
    """What the cards of both models say."""
    known = {role: (record["licences"].get(role) or {}).get("license") for role in ("target", "source")}
    texts = [
        f"The adapter goes by the licence of the target, {escaped(known['target'])}, whose weights it changes."
        if known["target"]
        else "No licence of the target is known, which is the one that the adapter goes by: look it up.",
        f"Licence of the source: {escaped(known['source'])}." if known["source"] else "No licence of the source is known.",
    ]
    if warning := restriction(record):
        texts.append(f"**{warning}**")
    named = [role for role in known if known[role]]
    said = {0: "This", 1: f"So says the card of the {''.join(named)}; this", 2: "So say the models' cards; this"}[len(named)]
    return " ".join([*texts, f"{said} is no legal advice."])


def restriction(record: dict[str, Any]) -> str | None:
    """What the licence of a run's source asks of models that learn from it; ``None`` where nothing is known to."""
    known = {role: (licence or {}).get("license") for role, licence in (record.get("licences") or {}).items()}
    source = known.get("source")
    if source not in RESTRICTIONS or (source in OWN_FAMILY and known.get("target") == source):
        return None
    return f"The source's licence ({source}) {RESTRICTIONS[source]}."


def benchmark_entries(results: dict[str, Any], method: str) -> dict[str, list[dict[str, Any]]]:
    """Content of a run's ``.eval_results`` files by name: what its method reached on the whole test set of a benchmark that the
    Hub shows results of.

    Args:
        results: content of ``results.json``.
        method: the run's own.
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
    """What lm-eval said of a model, by benchmark; results of earlier versions hold one benchmark under another name."""
    return metrics.get("benchmarks") or ([metrics["benchmark"]] if "benchmark" in metrics else [])


def _limits(record: dict[str, Any], results: dict[str, Any], measures: Sequence[_Measure]) -> str:
    """Where the numbers speak against the method, and what they do not show."""
    method, own = record["method"], escaped(_own(record))
    shared, widest, seed = record["map"]["shared_tokens"], max(record["map"]["shape"]), record["settings"]["seed"]
    others = [name for name in method_order(results["metrics"]) if name not in (method, "source")]
    items = []
    for other in others:
        worse = [measure for measure in measures if measure.behind(method, other)]
        told = ", ".join(f"{escaped(m.label)} ({m.shown(method)} against {m.shown(other)})" for m in worse)
        name = escaped(METHOD_NAMES.get(other, other))
        items.append(f"{own} against {name}: worse in {told or 'none of the numbers above'}.")
    if not set(others) - {"target"}:
        items.append(f"No other method was run: nothing here tells what {own} is worth beside ordinary fine-tuning.")
    rows, skills = record["data"].get("eval", {}).get("rows"), sum(m.percent and not m.headline for m in measures) or 1
    if rows and any(numbers.get("exact_match") for numbers in results["metrics"].values()):
        error = f"one standard error of an exact match is up to {50 * math.sqrt(skills / rows):.1f} points"
        items.append(f"With about {rows / skills:.0f} rows a skill, {error}.")
    items.append(f"One run, with seed {escaped(seed)}: the spread over seeds is not known.")
    task = f"abilities other than {escaped(_public(results['task']))}" if measures else "the target's abilities"
    if not any(numbers.get("forgetting") for numbers in results["metrics"].values()):
        items.append(f"What the transfer does to {task} was not measured.")
    if method == "semalign" and shared < widest:
        items.append(f"The map rests on {shared:,} shared tokens, fewer than the {widest:,} dimensions of the wider model.")
    return "\n".join(f"- {item}" for item in items)


def _link(name: str, kind: str = "") -> str:
    name = _public(name)
    return f"[{escaped(name)}](https://huggingface.co/{kind}{name})" if _on_hub(name) else escaped(name)


def _on_hub(name: str | None) -> bool:
    """Is this of the form ``owner/name``?"""
    return name is not None and is_hub_id(name) and name.count("/") == 1


def _public(name: str) -> str:
    """A Hub id as it is; of anything that may be a path, the last part."""
    name = _line(name)
    return name if _on_hub(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _line(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_line, value))
    value = value.value if isinstance(value, Enum) else value
    return f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())


def escaped(value: Any) -> str:
    """Data as Markdown that shows it to the letter, also within a table."""
    return re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", html.escape(_line(value), quote=False))


def pipe_table(rows: Sequence[Sequence[str]], align: str = "---") -> str:
    """Rows, the first of them the heading, as a Markdown table."""
    lines = [rows[0], ["---", *[align] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


#: What readers call the methods; the order of the baselines is that of the run.


def method_order(methods: Iterable[str]) -> list[str]:
    """Order methods for readers: target, baselines as they come, SemAlign, source."""
    place = {"target": 0, "semalign": 2, "source": 3}
    return sorted(methods, key=lambda method: place.get(method, 1))
