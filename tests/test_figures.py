"""Figures: the files, the labels in them, and that what is drawn is what was given."""

import math
import random

import pytest
from matplotlib import colors, rcParams
from PIL import Image

from hf_semalign.experiments.figures import (
    BLACK,
    BLUE,
    GREY,
    _cka_figure,
    _comparison_figure,
    _layers_figure,
    _losses_figure,
    _vectors_figure,
    draw_cka,
    draw_comparison,
    draw_layers,
    draw_losses,
    draw_vectors,
)
from hf_semalign.hub.card import METHOD_NAMES, method_order

SKILLS = ("copy", "sort")


def make_record(source_layers=(0, 2, 3, 5), depth=6, scores=True, steps=1600, layer_loss="relation", stages=None):
    stages = stages or len(source_layers)
    return {
        "pairing": {
            "source_layers": list(source_layers),
            "num_source_layers": depth,
            "scores": [0.1 + layer * 0.01 for layer in range(depth)] if scores else None,
        },
        "stages": [k * steps // stages for k in range(stages + 1)],
        "settings": {"layer_loss": layer_loss},
    }


def make_results(methods=("target", "source", "semalign", "kd"), skills=SKILLS):
    metrics = {}
    for place, method in enumerate(methods):
        metrics[method] = {"kl": 0.4 / (place + 1), "loss": 0.1}
        if skills:
            metrics[method]["exact_match"] = {skill: 0.1 * place + 0.05 * k for k, skill in enumerate(skills)}
    history = [
        {"step": step, "stage": 1 + (step - 1) // 400, "loss": 1.0, "relation": 1 / step, "kl": 10 / step}
        for step in range(50, 1601, 50)
    ]
    return {"metrics": metrics, "history": history}


DEEP = {"source_layers": [k * 80 // 32 for k in range(32)], "depth": 80, "steps": 1600}


@pytest.mark.parametrize(
    ("record", "results"),
    [
        (make_record(), make_results()),
        (make_record(**DEEP), make_results(skills=())),
        (make_record(scores=False, stages=1), make_results(METHOD_NAMES, ["a$b$c", "<x> & |y|", "skill " * 9])),
        (make_record([0], 1), make_results(["target", "semalign"])),
        (make_record(range(4), 4), make_results(["target", "semalign", "mine"])),
    ],
)
@pytest.mark.filterwarnings("error")
def test_files_are_images_of_a_plausible_size(tmp_path, record, results):
    before = dict(rcParams)
    paths = [draw_layers(record, tmp_path), draw_losses(results, record, tmp_path), draw_comparison(results, tmp_path)]
    assert [path.name for path in paths] == ["layers.png", "losses.png", "comparison.png"]
    assert {path.name for path in tmp_path.iterdir()} == {f"{path.stem}{end}" for path in paths for end in (".png", ".svg")}
    for path in paths:
        with Image.open(path) as image:
            image.verify()
            width, height = image.size
        assert 500 <= width <= 2500
        assert 300 <= height <= 1000
        assert path.stat().st_size > 2000
    assert dict(rcParams) == before


def test_svg_holds_the_labels_as_text_and_repeats(tmp_path):
    record, results = make_record(), make_results(skills=("copy", "a$b$c"))
    texts = []
    for _ in range(2):
        draw_layers(record, tmp_path)
        draw_losses(results, record, tmp_path)
        draw_comparison(results, tmp_path)
        texts.append([(tmp_path / f"{name}.svg").read_text() for name in ("layers", "losses", "comparison")])
    assert texts[0] == texts[1]
    layers, losses, comparison = texts[0]
    for label in ("attribution score (nats)", "source layer (from 0)", "6 layers", "4 layers", "paired", "not paired"):
        assert f">{label}<" in layers
    for label in ("KL(source ‖ target)", "(nats per token)", "relation loss", "optimizer step", "stage"):
        assert f">{label}<" in losses
    for label in ("exact match (%)", "held-out KL(source ‖ target)", "Target before", "Distillation (KL only)", "a$b$c"):
        assert f">{label}<" in comparison


def test_method_order():
    assert method_order(["target", "source", "semalign", "sft", "kd"]) == ["target", "sft", "kd", "semalign", "source"]


@pytest.mark.parametrize("record", [make_record(), make_record(**DEEP)])
def test_layers_shows_every_score_and_highlights_the_chosen(record):
    pairing = record["pairing"]
    left = _layers_figure(record).axes[0]
    bars = {round(bar.get_y() + bar.get_height() / 2): bar for bar in left.patches}
    assert [bars[layer].get_width() for layer in range(pairing["num_source_layers"])] == pairing["scores"]
    for layer, bar in bars.items():
        assert colors.to_hex(bar.get_facecolor()).upper() == (BLUE if layer in pairing["source_layers"] else GREY)
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["paired", "not paired"]
    assert left.get_legend().get_window_extent().y0 >= left.get_window_extent().y1 - 1  # above the data


@pytest.mark.parametrize("record", [make_record(), make_record(**DEEP), make_record([0, 0, 1], 2, scores=False)])
def test_layers_draws_every_pair_shallow_at_the_bottom(record):
    chosen, depth = record["pairing"]["source_layers"], record["pairing"]["num_source_layers"]
    axes = _layers_figure(record).axes[-1]
    pairs = [line.get_ydata() for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    assert [pair[0] for pair in pairs] == chosen
    assert [pair[1] for pair in pairs] == pytest.approx([k * (depth - 1) / (len(chosen) - 1) for k in range(len(chosen))])
    bottom, top = axes.get_ylim()
    assert bottom < 0 < depth - 1 < top
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        f"source\n{depth} layers",
        f"target\n{len(chosen)} layers",
    ]
    assert len(axes.get_yticks()) <= 12
    assert list(axes.get_yticks())[-1] == depth - 1


def test_small_scores_keep_short_ticks():
    record = make_record()
    record["pairing"]["scores"] = [1e-4, 8e-5, 6e-5, 5e-5, 3e-5, 1e-11]
    figure = _layers_figure(record)
    figure.draw_without_rendering()
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert "5e\N{MINUS SIGN}05" in ticks
    assert max(map(len, ticks)) <= 7
    assert not figure.axes[0].xaxis.get_offset_text().get_text()


def test_layers_without_scores_has_one_panel():
    assert len(_layers_figure(make_record(scores=False)).axes) == 1
    assert len(_layers_figure(make_record()).axes) == 2


def test_losses_are_the_history_and_stages_do_not_touch():
    record, results = make_record(), make_results()
    kl, relation = _losses_figure(results, record).axes
    steps = [entry["step"] for entry in results["history"]]
    (line,) = kl.lines
    assert list(line.get_xdata()) == steps
    assert list(line.get_ydata()) == [entry["kl"] for entry in results["history"]]
    assert len(relation.lines) == 4
    assert [list(line.get_xdata())[-1] for line in relation.lines] == record["stages"][1:]
    assert [y for line in relation.lines for y in line.get_ydata()] == [entry["relation"] for entry in results["history"]]
    assert [(patch.get_x(), patch.get_width()) for patch in kl.patches] == [(400, 400), (1200, 400)]
    assert kl.get_ylim()[0] == relation.get_ylim()[0] == 0
    assert relation.get_xlabel() == "optimizer step"
    assert relation.get_xlim() == (0, 1600)


def test_stage_numbers_thin_out():
    for record, expected in [(make_record(), [1, 2, 3, 4]), (make_record(**DEEP), [1, 6, 11, 16, 21, 26, 32])]:
        (top,) = _losses_figure(make_results(), record).axes[0].child_axes
        assert [int(label.get_text()) for label in top.get_xticklabels()] == expected
        middles = [sum(record["stages"][number - 1 : number + 1]) / 2 for number in expected]
        assert list(top.get_xticks()) == middles


def test_losses_leave_out_what_was_not_logged():
    record, results = make_record(layer_loss="steering", stages=1), make_results()
    for entry in results["history"]:
        del entry["relation"]
    (kl,) = _losses_figure(results, record).axes
    assert "KL" in kl.get_ylabel()
    assert not kl.patches and not kl.child_axes  # one stage: nothing to tell apart
    for entry in results["history"]:
        entry["steering"] = entry.pop("kl")
    (steering,) = _losses_figure(results, record).axes
    assert steering.get_ylabel().startswith("steering loss")
    (empty,) = _losses_figure({**results, "history": []}, record).axes
    assert empty.get_title() == "no losses were logged"


def test_comparison_bars_are_the_metrics():
    results = make_results()
    order = ["target", "kd", "semalign", "source"]
    left, right = _comparison_figure(results).axes
    assert [container.get_label() for container in left.containers] == [METHOD_NAMES[method] for method in order]
    for method, container in zip(order, left.containers, strict=True):
        shares = results["metrics"][method]["exact_match"]
        assert [bar.get_height() for bar in container] == pytest.approx([100 * shares[skill] for skill in SKILLS])
    assert [label.get_text() for label in left.get_xticklabels()] == list(SKILLS)
    assert left.get_ylim() == (0, 100)
    middles = [bar.get_x() + bar.get_width() / 2 for container in left.containers for bar in list(container)[:1]]
    assert middles == sorted(middles)
    assert sum(middles) == pytest.approx(0)
    assert [bar.get_width() for bar in right.patches] == [results["metrics"][method]["kl"] for method in order[:3]]
    assert [text.get_text() for text in right.texts] == ["0.40", "0.10", "0.13"]
    assert right.get_ylim()[0] > right.get_ylim()[1]  # the first on top
    drawn = [colors.to_hex(container[0].get_facecolor()).upper() for container in left.containers]
    assert drawn[0] == GREY
    assert drawn[2:] == [BLUE, BLACK]
    assert len(set(drawn)) == 4
    assert drawn[:3] == [colors.to_hex(bar.get_facecolor()).upper() for bar in right.patches]


def test_comparison_without_exact_match_names_its_bars():
    (axes,) = _comparison_figure(make_results(skills=())).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["Target before", "Distillation (KL only)", "SemAlign"]


def test_comparison_of_a_diverged_run(tmp_path):
    results = make_results()
    results["metrics"]["semalign"] |= {"kl": math.nan, "exact_match": {"copy": 0.0}}
    left, right = _comparison_figure(results).axes
    assert [bar.get_height() for bar in left.containers[2]] == pytest.approx([0, math.nan], nan_ok=True)
    assert [text.get_text() for text in right.texts] == ["0.40", "0.10", ""]
    assert draw_comparison(results, tmp_path).is_file()


def make_cosines(depth, tied=False):
    values = {
        name: {"layers": [start + k / (4 * depth) for k in range(depth)], "random_states": start}
        for name, start in (("output", 0.2), ("head", 0.3), ("input", 0.4), ("random", 0.7))
    }
    return {"tied": tied, "positions": 100, "cosines": {"cosine": values}}


def make_cka(depth, width):
    draw = random.Random(0)
    names = ("unaligned", "aligned")
    return {"positions": 100, **{name: [[draw.uniform(-0.1, 1) for _ in range(width)] for _ in range(depth)] for name in names}}


@pytest.mark.parametrize(("depth", "width"), [(6, 4), (40, 32), (1, 1)])
@pytest.mark.filterwarnings("error")
def test_files_of_the_analyses(tmp_path, depth, width):
    vectors = draw_vectors({"source": make_cosines(depth), "target": make_cosines(width, tied=True)}, tmp_path)
    cka = draw_cka(make_cka(depth, width), tmp_path)
    pairing = draw_layers(make_record(range(width), depth), tmp_path, "pairing")
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{end}" for name in ("vectors", "cka", "pairing") for end in ("png", "svg")
    }
    for path in (vectors, cka, pairing):
        with Image.open(path) as image:
            image.verify()
            assert 500 <= image.size[0] <= 1100
    labels = vectors.with_suffix(".svg").read_text() + cka.with_suffix(".svg").read_text()
    for label in ("output-side bases", "random states in the same bases", "target, tied embeddings", "cosine before and after"):
        assert f">{label}<" in labels
    for label in ("without alignment", "with alignment", "source layer (from 0)", "linear CKA, debiased"):
        assert f">{label}<" in labels


def test_vectors_draws_a_curve_and_a_level_for_each_of_the_bases():
    record = {"source": make_cosines(6), "target": make_cosines(4)}
    for axes, role in zip(_vectors_figure(record).axes, ("source", "target"), strict=True):
        curves, levels = axes.lines[::2], axes.lines[1::2]
        for curve, level, values in zip(curves, levels, record[role]["cosines"]["cosine"].values(), strict=True):
            assert list(curve.get_ydata()) == values["layers"]
            assert list(level.get_ydata()) == [values["random_states"]] * 2
            assert curve.get_color() == level.get_color()
        assert len({curve.get_color() for curve in curves}) == 4


def test_cka_shows_the_matrices_shallow_layers_first_on_one_scale():
    record = make_cka(6, 4)
    for axes, name in zip(_cka_figure(record).axes[:2], ("unaligned", "aligned"), strict=True):
        (image,) = axes.images
        assert image.get_array().tolist() == record[name]
        assert image.get_clim() == (0, 1)
        assert image.get_cmap().name == "viridis"
        bottom, top = axes.get_ylim()
        assert bottom < top
