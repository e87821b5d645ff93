"""Run the analyses on the models and data of a recipe or a run folder, and write figures and numbers."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from rich.table import Table
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel

from hf_semalign.cache.scores import layer_scores
from hf_semalign.cache.source import Source
from hf_semalign.errors import InputError, brief
from hf_semalign.experiments.analysis import layer_cka, recomposition_cosines
from hf_semalign.experiments.figures import draw_cka, draw_layers, draw_vectors
from hf_semalign.experiments.recipe import Recipe, load_recipe, load_run, load_tokenizer
from hf_semalign.files import make_folder
from hf_semalign.hub.loading import load_transfer
from hf_semalign.hub.reading import read_record
from hf_semalign.method.attribution import LayerScores
from hf_semalign.method.pairing import LayerPairing, pair_layers
from hf_semalign.method.semantic_map import SemanticMap
from hf_semalign.method.vocabularies import differing
from hf_semalign.models.anatomy import CausalLM, base_model, dissect, embedding_rows, name_parts
from hf_semalign.models.loading import find_config, load_model, skeleton
from hf_semalign.models.names import public_name
from hf_semalign.splits import Collator, check_token_ids, encode, fingerprint
from hf_semalign.training.preparation import encode_splits
from hf_semalign.transfer import signals_root

logger = logging.getLogger(__name__)
COLLATOR = Collator(pad_token_id=0)  # any id works, because padding is masked


@dataclass(frozen=True)
class Pair:
    """Two models in evaluation mode on one device, the map between them, and the eval split in batches."""

    source: PreTrainedModel
    target: CausalLM
    semantic_map: SemanticMap
    batches: DataLoader
    facts: dict[str, Any]


def run_analysis(analysis: str, origin: str, overrides: Sequence[str] = (), output: str | None = None) -> Path:
    """Run one analysis, and write ``<analysis>.png`` and ``.svg``, and all numbers to ``<analysis>.json``.

    Args:
        analysis: ``vectors``, ``cka`` or ``pairing``.
        origin: a recipe or a run folder. A recipe's models are analysed before training, a run's target with its adapter.
        overrides: see :func:`hf_semalign.experiments.recipe.load_recipe` and :func:`hf_semalign.experiments.recipe.load_run`.
        output: folder for the files, by default ``analysis`` in the run folder.

    Returns:
        Path of the PNG.

    Raises:
        FileNotFoundError: ``origin`` is neither a recipe nor a run folder.
        ValueError: keys, models or data cannot be used.
    """
    run = Path(origin) if Path(origin).is_dir() else None
    if run is not None and analysis == "pairing":
        if overrides:
            raise InputError(
                f"The pairing of {origin} comes from its record, which {list(overrides)} cannot change: pass a recipe."
            )
        recipe, home = None, run
    else:
        recipe = load_recipe(origin, overrides) if run is None else load_run(run, overrides)
        home = Path(recipe.output_dir)
    folder = Path(output) if output else home / "analysis"
    make_folder("output", folder)
    if recipe is None:
        record = {"pairing": read_record(home)["pairing"]}
    else:
        record = _pairing(recipe) if analysis == "pairing" else _states(analysis, load_pair(recipe, run))
    (folder / f"{analysis}.json").write_text(json.dumps(record, indent=1))
    if analysis == "pairing":
        return draw_layers(record, folder, analysis)
    return (draw_cka if analysis == "cka" else draw_vectors)(record, folder)


def attribute_recipe(recipe: Recipe) -> tuple[LayerScores, LayerPairing]:
    """Score the source's layers on the extract split, and pair the layers with the recipe's strategy.

    The scores are cached for the recipe's run, except with ``signals: online``.

    Raises:
        ValueError: a model is not found, or data or settings cannot be used.
    """
    args = recipe.config(Path(recipe.output_dir))
    source = Source(_find(recipe, "source"), precision=args.mixed_precision, parts=args.source_parts)
    target, tokenizer = _find(recipe, "target"), load_tokenizer(recipe)
    shape = skeleton(target, args.target_parts)
    rows = encode_splits({"extract": recipe.data.load().extract}, source, shape, tokenizer, recipe.data.max_length)
    scores = layer_scores(
        source,
        rows.source["extract"],
        rows.source_collator,
        None if args.signals == "online" else signals_root(args),
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        device=args.device,
        batch_size=args.per_device_eval_batch_size,
        stream=args.source_memory == "stream",
        progress=not args.disable_tqdm,
    )
    return scores, pair_layers(scores, len(dissect(shape).layers), args.pairing).named(source.name, public_name(target))


def scores_table(scores: LayerScores, pairing: LayerPairing) -> Table:
    """A table for the terminal: the score of each source layer (from 0), and the target layers paired with it."""
    title = f"{pairing.source_id} to {pairing.target_id}, pairing {pairing.strategy}"
    table = Table("source layer", "score", "± between examples", "target layers", title=title)
    for layer, (score, deviation) in enumerate(zip(scores.values, scores.deviations, strict=True)):
        paired = [str(k) for k, chosen in enumerate(pairing.source_layers) if chosen == layer]
        table.add_row(str(layer), f"{score:.4g}", f"{deviation:.4g}", ", ".join(paired))
    return table


def _pairing(recipe: Recipe) -> dict[str, Any]:
    scores, pairing = attribute_recipe(recipe)
    return {"pairing": {**pairing.to_dict(), "scores": scores.values}, "attribution": asdict(scores)}


def _states(analysis: str, pair: Pair) -> dict[str, Any]:
    """Analyse the hidden states of both models at the valid positions of the eval split."""
    if analysis == "cka":
        found = layer_cka(pair.source, pair.target, pair.batches, pair.semantic_map)
    else:
        models = {"source": pair.source, "target": pair.target}
        found = {role: recomposition_cosines(model, pair.batches) for role, model in models.items()}
    return {**pair.facts, **found}


def load_pair(recipe: Recipe, run: Path | None = None) -> Pair:
    """Load the models and the eval split of a recipe. For a run, the target is loaded with its adapter.

    Args:
        recipe: the recipe.
        run: the run folder, if there is one.

    Raises:
        ValueError: a model is not found, or the tokenizers differ.
    """
    args = recipe.config(Path(recipe.output_dir))
    source = Source(_find(recipe, "source"), precision=args.mixed_precision, parts=args.source_parts)
    target_name = _find(recipe, "target")
    tokenizer = load_tokenizer(recipe) if run is None else AutoTokenizer.from_pretrained(run, trust_remote_code=False)
    if source.tokenizer is not None and (difference := differing(source.tokenizer, tokenizer)):
        raise InputError(f"{difference}: the analyses compare states position by position, so both models need one tokenizer.")
    rows = encode(recipe.data.load().eval, tokenizer, split="eval", max_length=recipe.data.max_length)
    if run is not None and fingerprint(rows) != read_record(run)["data"]["eval"]["fingerprint"]:
        logger.warning("The eval split differs from the run's: pass the run's data.seed, data.files and data.max_length.")
    target: CausalLM
    target = (
        load_model(target_name, precision=args.mixed_precision) if run is None else load_transfer(run, target=target_name)[0]
    )
    name_parts(base_model(target).config, args.target_parts)
    target = cast(CausalLM, target.to(args.device).eval())  # type: ignore[arg-type]
    embedded = {"source": source.embedding_rows, "target": embedding_rows(base_model(target))}
    check_token_ids({"eval": rows}, embedded, tokenizer)
    model = source.model(args.device)
    semantic_map = SemanticMap.from_models(model, target, source.tokenizer, tokenizer, kind=args.map_kind)
    facts = {
        "models": {"source": source.name, "target": public_name(target_name)},
        "trained": run is not None,
        "map": {"kind": semantic_map.kind, "shared_tokens": semantic_map.shared_tokens},
        "eval": {"rows": len(rows), "fingerprint": fingerprint(rows)},
    }
    batches = DataLoader(cast(Any, rows), args.per_device_eval_batch_size, collate_fn=COLLATOR)
    return Pair(model, target, semantic_map, batches, facts)


def _find(recipe: Recipe, role: str) -> str:
    """The folder or Hub id of a recipe's model. Checks that it exists without loading weights."""
    name = getattr(recipe, role)
    try:
        find_config(name)
    except ValueError as error:
        raise InputError(
            f"The {role} {name!r} was not found: set {role}=... to a folder or Hub id. A run's record has no local paths, so "
            f"you have to pass local models again. ({brief(error.__cause__ or error)})"
        ) from error
    return name
