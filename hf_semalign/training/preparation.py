"""Prepare a run without loading weights, and check all inputs before any long work starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_semalign.cache.examples import Examples
from hf_semalign.cache.source import Source
from hf_semalign.config import SemAlignConfig
from hf_semalign.errors import InputError
from hf_semalign.method.frontier import Frontier, FrontierSchedule, stage_learning_rate
from hf_semalign.method.pairing import NEEDS_SCORES, LayerPairing, pair_layers
from hf_semalign.method.semantic_map import SemanticMap
from hf_semalign.method.vocabularies import differing, shared_token_ids
from hf_semalign.models.anatomy import Anatomy, dissect, embedding_rows, position_limit
from hf_semalign.models.loading import find_tokenizer, load_dtype, load_model, pad_token_id, skeleton
from hf_semalign.models.lora import lora_targets
from hf_semalign.models.names import public_name
from hf_semalign.splits import Collator, check_disjoint, check_rows, check_token_ids, encode, hold_out
from hf_semalign.tokenization import Record
from hf_semalign.training.engines import check_engine
from hf_semalign.training.source_rows import PairedSplit, TokenizerPair, encode_paired, has_source_columns

logger = logging.getLogger(__name__)
Rows: TypeAlias = Dataset | Sequence[Record]


@dataclass(frozen=True)
class Counts:
    """Size of a split: distinct rows, their tokens, and their valid positions."""

    rows: int
    tokens: int
    valid: int

    @staticmethod
    def of(dataset: Dataset) -> Counts:
        """Count an encoded split."""
        examples = Examples(dataset)
        return Counts(len(examples.ids), int(examples.tokens.sum()), int(examples.answers.sum()))


@dataclass(frozen=True)
class Preparation:
    """Everything a run needs except weights.

    Attributes:
        source: the source.
        target: the parts of the target; on the meta device if the target was given by name.
        target_dtype: dtype of the target's weights in the run.
        target_id: the target's name, for records.
        tokenizer: the target's tokenizer, if any.
        splits: encoded rows by split: ``align``, and, if given, ``extract`` and ``eval`` (or ``eval_<name>`` for several).
        collator: collator of the target's rows.
        pairing: the layer pairing; ``None`` if attribution scores are needed first.
        token_ids: rows of both heads that map and KL use.
        frontier: which layers train in each stage.
        schedule: stage of each optimizer step.
        learning_rate_factor: learning rate at a step, as a share of the peak.
        lora_targets: names of the modules that get LoRA.
        source_splits: rows as the source reads them; the same as ``splits`` unless it has a tokenizer or prompts of its own.
        source_collator: collator of the source's rows.
        tokenizers: correspondence of two tokenizers; ``None`` for one tokenizer.
        pairs: the rows of both models, by split; empty if they read the same rows.
    """

    source: Source
    target: Anatomy
    target_dtype: torch.dtype
    target_id: str
    tokenizer: PreTrainedTokenizerBase | None
    splits: dict[str, Dataset]
    collator: Collator
    pairing: LayerPairing | None
    token_ids: torch.Tensor
    frontier: Frontier
    schedule: FrontierSchedule
    learning_rate_factor: Callable[[int], float]
    lora_targets: list[str]
    source_splits: dict[str, Dataset]
    source_collator: Collator
    tokenizers: TokenizerPair | None
    pairs: dict[str, PairedSplit]

    @property
    def has_source_rows(self) -> bool:
        """Whether the source reads rows of its own."""
        return bool(self.pairs)

    @property
    def aligned(self) -> dict[str, float]:
        """Share of the target's valid positions that are used, by split; empty if both models read the same rows."""
        return {name: pair.aligned for name, pair in self.pairs.items()}

    @property
    def shared_tokens(self) -> int:
        """Number of head rows that the map uses."""
        return len(self.token_ids if self.tokenizers is None else self.tokenizers.map_rows[0])


def prepare(
    model: PreTrainedModel | str,
    source_model: PreTrainedModel | str | Source,
    args: SemAlignConfig,
    train_dataset: Rows,
    eval_dataset: Rows | dict[str, Any] | None = None,
    extract_dataset: Rows | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    pairing: LayerPairing | None = None,
    semantic_map: SemanticMap | None = None,
    *,
    needs_extract: bool = False,
    encode: Callable[..., Encoded] | None = None,
) -> Preparation:
    """Check the arguments of :class:`hf_semalign.trainer.SemAlignTrainer` and prepare its run.

    With ``needs_extract`` the method needs an extract split whatever its settings. A caller that prepares several runs on the
    same rows may pass its own ``encode``, which stands for :func:`encode_splits`.

    Raises:
        ValueError: settings, data, models or tokenizers cannot be used.
    """
    check_engine(args)
    _check_arguments(model, source_model, args, processing_class, pairing, semantic_map)
    tokenizer = find_tokenizer(model) if processing_class is None and isinstance(model, str) else processing_class
    if tokenizer is not None and tokenizer.pad_token_id is None:
        raise InputError(
            "The tokenizer has no pad token: set tokenizer.pad_token, or pad_token in a recipe, to one of its tokens."
        )
    needs_extract |= args.matches_scales or (args.uses_pairs and pairing is None and args.pairing in NEEDS_SCORES)
    splits = _given_splits(train_dataset, eval_dataset, extract_dataset, needs_extract)
    source = source_model if isinstance(source_model, Source) else _source(source_model, args)
    _check_weights(model, source, args)
    shape = skeleton(model, args.target_parts) if isinstance(model, str) else load_model(model, parts=args.target_parts)
    target = dissect(shape)
    depths = source.num_layers, len(target.layers)
    _check_map(semantic_map, target.head_weight().shape[1], source.width)
    rows = (encode or encode_splits)(splits, source, shape, tokenizer, args.max_length)
    check_disjoint(splits)
    _check_lengths(rows.source, "source", source.shape)
    _check_lengths(rows.target, "target", shape)
    frontier = Frontier(args.frontier, depths[1])
    schedule = FrontierSchedule(frontier.num_stages, args.planned_steps(len(rows.target["align"])), args.stage_budget)
    return Preparation(
        source=source,
        target=target,
        target_dtype=load_dtype(model, args.mixed_precision) if isinstance(model, str) else shape.dtype,
        target_id=public_name(str(shape.name_or_path)),
        tokenizer=tokenizer,
        splits=rows.target,
        collator=rows.target_collator,
        pairing=_pairing(pairing, args.pairing if args.uses_pairs else "proportional", depths),
        token_ids=rows.token_ids,
        frontier=frontier,
        schedule=schedule,
        learning_rate_factor=_learning_rate_factor(schedule, args),
        lora_targets=lora_targets(target.layers, args.lora_targets),
        source_splits=rows.source,
        source_collator=rows.source_collator,
        tokenizers=rows.tokenizers,
        pairs=rows.pairs,
    )


def _learning_rate_factor(schedule: FrontierSchedule, args: SemAlignConfig) -> Callable[[int], float]:
    specific = cast(dict, args.lr_scheduler_kwargs)
    return stage_learning_rate(schedule, args.lr_scheduler_type, args.learning_rate, args.get_warmup_steps, specific)


def _check_arguments(
    model: PreTrainedModel | str,
    source_model: PreTrainedModel | str | Source,
    args: SemAlignConfig,
    processing_class: Any,
    pairing: Any,
    semantic_map: Any,
) -> None:
    """Check the types of the arguments, that source and target are two objects, and that output_dir is not a model's folder."""
    if not isinstance(model, str) and model is (source_model.shape if isinstance(source_model, Source) else source_model):
        raise InputError("Source and target are the same model object, so training would change both. Load it twice.")
    kinds = {
        "processing_class": (processing_class, PreTrainedTokenizerBase, "a transformers tokenizer"),
        "pairing": (pairing, LayerPairing, "a LayerPairing from pair_layers; the name of a strategy goes into args.pairing"),
        "semantic_map": (semantic_map, SemanticMap, "a SemanticMap; the name of a kind goes into args.map_kind"),
    }
    for name, (value, kind, words) in kinds.items():
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{name} is a {type(value).__name__}: expected {words}.")
    source_origin = source_model.origin if isinstance(source_model, Source) else source_model
    for role, origin in (("source", source_origin), ("target", model)):
        if isinstance(origin, str) and Path(origin).is_dir() and Path(origin).resolve() == Path(str(args.output_dir)).resolve():
            raise InputError(f"output_dir is the {role}'s folder, {origin}, and its files would be replaced: choose another.")


def _given_splits(
    train_dataset: Rows, eval_dataset: Rows | dict[str, Any] | None, extract_dataset: Rows | None, needs_extract: bool
) -> dict[str, Rows]:
    """The splits by name. If an extract split is needed but not given, it is split off the training rows."""
    check_rows(train_dataset, "align")
    if extract_dataset is None and needs_extract:
        train_dataset, extract_dataset = hold_out(train_dataset)
    evals = {f"eval_{name}": rows for name, rows in eval_dataset.items()} if isinstance(eval_dataset, dict) else {}
    if without := [name for name, rows in evals.items() if rows is None]:
        raise InputError(f"eval_dataset has None for {without}: leave these out.")
    given = {"extract": extract_dataset, "align": train_dataset, "eval": None if evals else eval_dataset, **evals}
    return {name: rows for name, rows in given.items() if rows is not None}


def _check_weights(model: PreTrainedModel | str, source: Source, args: SemAlignConfig) -> None:
    """Check that models in memory are not offloaded, and that a source to be streamed is not quantised."""
    for role, shape in (("source", source.shape), ("target", model)):
        if isinstance(shape, PreTrainedModel) and {"cpu", "disk"} & set(map(str, getattr(shape, "hf_device_map", {}).values())):
            raise InputError(
                f"The {role} was loaded with offloaded parts (device_map {shape.hf_device_map}): pass its name or folder "
                "instead, and set source_memory 'stream' if the source does not fit in memory."
            )
    if args.source_memory == "stream" and source.quantised:
        raise InputError(f"{source.name} is quantised, but source_memory 'stream' needs unquantised weights: use 'resident'.")


def _check_map(semantic_map: SemanticMap | None, target_width: int, source_width: int) -> None:
    """Check that a map has the right shape and finite values."""
    if semantic_map is None:
        return
    matrix, shape = semantic_map.matrix, (target_width, source_width)
    if tuple(matrix.shape) != shape:
        raise InputError(f"The map has the shape {tuple(matrix.shape)}; these models need {shape}.")
    if not (matrix.is_floating_point() and matrix.isfinite().all()):
        raise InputError(f"The map is {matrix.dtype} and has values that are not finite or not real: rebuild it.")


@dataclass(frozen=True)
class Encoded:
    """The splits in the tokens of both models, and their shared tokens; fields as in :class:`Preparation`."""

    target: dict[str, Dataset]
    source: dict[str, Dataset]
    target_collator: Collator
    source_collator: Collator
    token_ids: torch.Tensor
    tokenizers: TokenizerPair | None
    pairs: dict[str, PairedSplit]


def encode_splits(
    splits: dict[str, Rows],
    source: Source,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
) -> Encoded:
    """Encode the splits, once for both models, or for each of them if the source has a tokenizer or prompts of its own.

    Raises:
        ValueError: rows or tokenizers cannot be used.
    """
    for name, rows in splits.items():
        check_rows(rows, name)
    head_rows, width = dissect(target).head_weight().shape
    embedded = {"source": source.embedding_rows, "target": embedding_rows(target)}
    two = _tokenizer_pair(source, tokenizer, head_rows, width)
    if two is None:
        token_ids = _shared_tokens(source, tokenizer, head_rows)
        pad = pad_token_id(tokenizer, target, min(embedded.values()))
        reader, source_pad = tokenizer, pad
    else:
        token_ids = torch.arange(len(two.classes.target))
        pad = pad_token_id(tokenizer, target, embedded["target"])
        reader, source_pad = two.source_tokenizer, two.source_tokenizer.pad_token_id or 0
    if two is None and not any(map(has_source_columns, splits.values())):
        encoded = {name: encode(rows, tokenizer, split=name, max_length=max_length) for name, rows in splits.items()}
        check_token_ids(encoded, embedded, tokenizer)
        return Encoded(encoded, encoded, Collator(pad), Collator(pad), token_ids, None, {})
    pairs = {
        name: encode_paired(rows, reader, tokenizer, two, split=name, max_length=max_length) for name, rows in splits.items()
    }
    encoded, read = ({name: getattr(pair, side) for name, pair in pairs.items()} for side in ("target", "source"))
    check_token_ids(encoded, {"target": embedded["target"]}, tokenizer)
    check_token_ids(read, {"source": embedded["source"]}, reader)
    return Encoded(encoded, read, Collator(pad), Collator(source_pad), token_ids, two, pairs)


def _shared_tokens(source: Source, tokenizer: PreTrainedTokenizerBase | None, head_rows: int) -> torch.Tensor:
    """The rows of both heads that map and KL use, for models with one tokenizer."""
    token_ids = shared_token_ids(source.tokenizer if tokenizer is not None else None, tokenizer, source.head_rows, head_rows)
    if len(token_ids) < max(source.head_rows, head_rows):
        logger.warning(
            "The heads have %d (source) and %d (target) rows: map and KL use the %d tokens that are in both vocabularies, "
            "with both distributions renormalised.", source.head_rows, head_rows, len(token_ids),
        )  # fmt: skip
    return token_ids


def _tokenizer_pair(source: Source, tokenizer: PreTrainedTokenizerBase | None, rows: int, width: int) -> TokenizerPair | None:
    """Compare the tokenizers; ``None`` if source and target have the same one, or if one is unknown."""
    if tokenizer is None or source.tokenizer is None or not (difference := differing(source.tokenizer, tokenizer)):
        return None
    try:
        pair = TokenizerPair.of(source.tokenizer, tokenizer, source_rows=source.head_rows, target_rows=rows, width=width)
    except InputError as error:
        raise InputError(f"{difference}: these are two different tokenizers. {error}") from error
    logger.info("%s. Positions are aligned by the bytes of the answers.", difference)
    return pair


def _check_lengths(splits: dict[str, Dataset], role: str, model: PreTrainedModel) -> None:
    """Check that no row is longer than the model's learned position embeddings."""
    limit = position_limit(model)
    for split, rows in splits.items():
        longest = int(Examples(rows).tokens.max())
        if limit is not None and longest > limit:
            raise InputError(
                f"A row of the {split} split has {longest} tokens, but the {role} has learned {limit} positions: set "
                f"max_length (data.max_length in a recipe) to at most {limit}."
            )


def _source(model: PreTrainedModel | str, args: SemAlignConfig) -> Source:
    return Source(model, precision=args.mixed_precision, parts=args.source_parts)


def _pairing(given: LayerPairing | None, wanted: Any, depths: tuple[int, int]) -> LayerPairing | None:
    """The layer pairing, or ``None`` if it needs scores first. Raises an error if scores could not make it possible."""
    if given is None:
        if wanted not in NEEDS_SCORES:
            return pair_layers(*depths, wanted)
        pair_layers([0.0] * depths[0], depths[1], wanted)
    elif (given.num_source_layers, len(given.source_layers)) != depths:
        raise InputError(
            f"The pairing is for {given.num_source_layers} source and {len(given.source_layers)} target layers; these "
            f"models have {depths[0]} and {depths[1]}."
        )
    return given
