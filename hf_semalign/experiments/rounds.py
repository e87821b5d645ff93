"""Train a recipe in one round, or in several. Before each of several rounds, the target answers the prompts again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from hf_semalign.cache.source import Source
from hf_semalign.config import SemAlignConfig
from hf_semalign.errors import InputError
from hf_semalign.experiments.answers import answered, question, write_answers
from hf_semalign.experiments.methods import METHODS
from hf_semalign.experiments.plan import Material, plan, plans_of
from hf_semalign.experiments.recipe import Recipe
from hf_semalign.experiments.tasks import TaskData
from hf_semalign.files import digest, file_digest, writing_lock
from hf_semalign.hub.card import restriction
from hf_semalign.hub.record import recorded_settings
from hf_semalign.method.vocabularies import differing
from hf_semalign.models.anatomy import CausalLM
from hf_semalign.models.loading import load_model
from hf_semalign.tokenization import Record, source_record, tokenize
from hf_semalign.training.checkpoints import check_run, damage, differing_settings, last_checkpoint
from hf_semalign.transfer import TransferTrainer, signals_root, timed

logger = logging.getLogger(__name__)


def train_recipe(
    recipe: Recipe,
    folder: Path,
    args: SemAlignConfig,
    source: Source,
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    measure_before: Callable[[TransferTrainer], None],
    seconds: dict[str, float],
) -> tuple[TransferTrainer, TaskData, dict[str, Any]]:
    """Train in one or several rounds, and save the adapter of each.

    ``measure_before`` is called with the first trainer before it trains. The wall time of each phase is added to ``seconds``.

    Returns:
        The last trainer, the data it trained on, and ``steps``, ``history`` and ``cost`` over all rounds.
    """
    trainer: Any = None
    learnt: Path | None = None
    steps, history = 0, []
    cost: dict[str, float] = {}
    if recipe.data.answers != "dataset":
        plans_of(recipe, Material(recipe, data, tokenizer))  # report errors before hours of writing answers
    for settings in recipe.rounds(args, len(data.align)):
        trainer = None  # free the last target before the next one is loaded
        checkpoint = start_of(settings, args.resume_from_checkpoint)
        rows, written = with_answers(recipe, data, source, args, tokenizer, folder, seconds, learnt)
        trainer = make_trainer(recipe, recipe.method, source, settings, rows, tokenizer)
        trainer.prepare()
        add(seconds, trainer.seconds)
        if written is not None:
            trainer.data_record["align"]["answers"] = written
        if learnt is not None:
            if settings.signals == "cached":
                source.release()
            _begin_at(trainer, learnt)
        else:
            if trainer.is_world_process_zero() and (warning := restriction(trainer.record())):
                logger.warning("%s The card will state this.", warning)
            with timed("evaluation before", seconds):
                measure_before(trainer)
        learnt = Path(str(settings.output_dir))
        with timed("training", seconds):
            trainer.train(resume_from_checkpoint=checkpoint)
            if trainer.is_world_process_zero():
                (learnt / "results.json").unlink(missing_ok=True)  # may belong to an earlier adapter
            trainer.save_model()
            trainer.accelerator.wait_for_everyone()  # the other processes read it
        history += [{**entry, "step": entry["step"] + steps} for entry in trainer.state.log_history if "stage" in entry]
        steps += trainer.state.global_step
        spent = plan(trainer.known, settings, recipe.method, recipe.data.answers).cost
        add(cost, {phase: amount for phase, amount in spent.items() if phase != "attribution" or phase not in cost})
    return trainer, rows, {"steps": steps, "history": history, "cost": cost}


def add(sums: dict[str, float], values: dict[str, float]) -> None:
    """Add values to sums by name, in place."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def with_answers(
    recipe: Recipe,
    data: TaskData,
    source: Source,
    args: SemAlignConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    seconds: dict[str, float],
    learnt: Path | None = None,
) -> tuple[TaskData, dict[str, Any] | None]:
    """Replace the align split's answers with those of the model that the recipe names.

    Answers of the source are saved with its signals, so other runs and machines can reuse them. Answers of the target are saved
    in the run folder. All processes train on the answers of the main process.

    Args:
        recipe: the recipe.
        data: the data of the recipe.
        source: the source of the recipe.
        args: the training settings.
        tokenizer: the target's tokenizer.
        folder: the run folder.
        seconds: the wall time is added here.
        learnt: folder of the target's current adapter.

    Returns:
        The data, and the facts about written answers for the record. They are ``None`` if the data set's answers are used.

    Raises:
        ValueError: see :func:`hf_semalign.experiments.answers.write_answers`, or the source is streamed.
    """
    settings = recipe.data
    if settings.answers == "dataset":
        return data, None
    if settings.answers == "source":
        if args.source_memory == "stream":
            raise InputError("data.answers is source, but a streamed source cannot write: set source_memory to 'resident'.")
        place, writer = source.folder(signals_root(args)), [source.identity]
        model: Callable[[], CausalLM] = partial(source.model, args.device)
    else:
        target = Source(recipe.target, precision=args.mixed_precision, parts=args.target_parts)
        place, writer = folder, [target.identity]
        writer += [] if learnt is None else [file_digest(learnt / SAFETENSORS_WEIGHTS_NAME)]
        model = partial(_target, recipe, args, learnt)
        place.mkdir(parents=True, exist_ok=True)
    sampling, source_tokenizer = settings.sampling, tokenizer_of_source(source, tokenizer)
    asked, own = [question(record) for record in data.align], tokenizer
    if settings.answers == "source":
        asked, own = list(map(source_record, asked)), source_tokenizer
    facts = [writer, asked, asdict(sampling), digest(own.get_vocab()), own.chat_template, version("hf_semalign")]
    path = place / f"answers-{digest(facts)[:16]}.jsonl"
    with timed("answers", seconds), writing_lock(place):
        entries = write_answers(asked, own, model, path, sampling, progress=not args.disable_tqdm)
    (entries,) = broadcast_object_list([entries])
    source.rest()

    def length_of(row: Record) -> int:
        both = (row, tokenizer), (source_record(row), source_tokenizer)
        return max(len(tokenize(one, reader, "An answer")[0]) for one, reader in both)

    rows, counts = answered(entries, settings.max_length, data.align, length_of)
    if args.should_save and place != folder:
        shutil.copyfile(path, folder / path.name)
    return replace(data, align=rows), {"by": settings.answers, **asdict(sampling), **counts}


def tokenizer_of_source(source: Source, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The source's own tokenizer if it tokenises text differently, and otherwise the target's."""
    own = source.tokenizer
    if own is None or not differing(own, tokenizer):
        return tokenizer
    if own.pad_token_id is None:
        own.pad_token = own.eos_token
    return own


def _target(recipe: Recipe, args: SemAlignConfig, learnt: Path | None) -> CausalLM:
    """Load the target with its current adapter on the run's device."""
    target = load_model(recipe.target, precision=args.mixed_precision, parts=args.target_parts)
    model: Any = target if learnt is None else PeftModel.from_pretrained(target, learnt)
    return model.to(args.device)


def _begin_at(trainer: TransferTrainer, learnt: Path) -> None:
    """Start training from an adapter with the same modules and rank."""
    found: Any = set_peft_model_state_dict(trainer.model, load_file(learnt / SAFETENSORS_WEIGHTS_NAME))
    if found.unexpected_keys or any("lora_" in name for name in found.missing_keys):
        raise InputError(f"The adapter in {learnt} does not have this run's modules and rank: delete the folder and restart.")


def start_of(args: SemAlignConfig, wanted: str | bool | None) -> str | bool | None:
    """The checkpoint to resume from: the named one, or the last one in the run folder. ``False`` starts from scratch.

    Raises:
        ValueError: the named checkpoint is damaged, or was made with other settings.
    """
    if wanted is None or wanted is True:
        wanted = last_checkpoint(str(args.output_dir))
    elif wanted and (found := damage(Path(wanted))):
        raise InputError(f"Cannot resume from {wanted}: {found}. Name another checkpoint, or none to start from scratch.")
    if wanted:  # before models are loaded and data are encoded
        settings = recorded_settings(args)
        if args.lora_targets is None:  # found by the trainer
            del settings["lora_targets"]
        check_run(Path(wanted), differing_settings(Path(wanted), settings))
    return wanted


def make_trainer(
    recipe: Recipe,
    method: str,
    source: Source,
    args: SemAlignConfig,
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    like: TransferTrainer | None = None,
) -> TransferTrainer:
    """Create a method's trainer for the recipe. A baseline reuses pairs and map of the main run's trainer (``like``)."""
    return METHODS[method].trainer(
        recipe.target,
        source,
        args,
        data.align,
        eval_dataset=data.eval,
        extract_dataset=data.extract,
        processing_class=tokenizer,
        pairing=None if like is None else like.pairing,
        semantic_map=None if like is None else like.semantic_map,
    )
