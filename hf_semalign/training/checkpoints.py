"""Checkpoints: checksums that detect damage, rotation, and a checkpoint when a signal ends the run."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_semalign.config import SemAlignConfig
from hf_semalign.errors import InputError
from hf_semalign.files import RECORD_NAME, file_digest, write_text

logger = logging.getLogger(__name__)
CHECKSUMS = "checksums.json"


def seal(checkpoint: Path) -> None:
    """Write the checksums of a checkpoint's files. This must come last: a checkpoint without them counts as unfinished."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    write_text(
        checkpoint / CHECKSUMS,
        json.dumps({path.relative_to(checkpoint).as_posix(): file_digest(path) for path in files}, indent=1),
    )


def damage(checkpoint: Path) -> str | None:
    """Describe what is wrong with a checkpoint; ``None`` if its files match the checksums of :func:`seal`."""
    if not checkpoint.is_dir():
        return "the folder does not exist"
    if not (checkpoint / CHECKSUMS).is_file():
        return f"it was never finished: {CHECKSUMS} is missing"
    try:
        known = dict(json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8")).items())
    except (ValueError, AttributeError):
        return f"{CHECKSUMS} is damaged"
    missing = [name for name in known if not (checkpoint / name).is_file()]
    altered = [name for name in known if name not in missing and file_digest(checkpoint / name) != known[name]]
    found = [f"{what} {', '.join(names)}" for what, names in (("missing", missing), ("altered", altered)) if names]
    return "; ".join(found) or None


def checkpoints_of(folder: str | Path | None) -> list[Path]:
    """Checkpoints of a run folder, oldest first. Other names, such as a user's copy ``checkpoint-2-keep``, are ignored."""
    found = [path for path in Path(str(folder)).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 for a folder with any other name."""
    step = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(step) if step.isdecimal() else -1


def rotate(folder: str | Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond ``save_total_limit``, but never the newest or the best."""
    found = checkpoints_of(folder)
    if not limit or len(found) <= limit:
        return
    protected = {found[-1].resolve(), *([Path(best).resolve()] if best else [])}
    spare = [path for path in found if path.resolve() not in protected]
    for path in spare[: len(found) - max(limit, len(protected))]:
        shutil.rmtree(path)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest intact checkpoint of a run. Logs what is wrong with newer ones."""
    for checkpoint in reversed(checkpoints_of(folder)):
        wrong = damage(checkpoint)
        if wrong is None:
            return str(checkpoint)
        logger.warning("%s is not used: %s.", checkpoint, wrong)
    return None


def foreign_checkpoint(folder: str | Path | None, record: dict[str, Any]) -> str | None:
    """Find a checkpoint of a different run in a run folder and describe how it differs; ``None`` if there is none.

    Args:
        folder: the run folder.
        record: record of this run.
    """
    for path in checkpoints_of(folder):
        if not (path / TRAINER_STATE_NAME).is_file():
            continue  # unfinished
        if not (path / RECORD_NAME).is_file():
            return f"{path} (it has no {RECORD_NAME})"
        if damage(path) is None and (different := differences(path, record)):
            return f"{path} (different {', '.join(different)})"
    return None


def differences(checkpoint: Path, record: dict[str, Any]) -> list[str]:
    """Names of what differs between a checkpoint's run and the run of ``record``."""
    saved = json.loads((checkpoint / RECORD_NAME).read_text(encoding="utf-8"))
    record = json.loads(json.dumps(record))
    compared = [
        *((key, record[key], saved[key]) for key in ("method", "source", "target", "data", "stages")),
        ("number of processes", record["processes"], saved.get("processes", record["processes"])),
        ("source layers", record["pairing"]["source_layers"], saved["pairing"]["source_layers"]),
        ("map", record["map"]["fingerprint"], saved["map"]["fingerprint"]),
        ("start of the adapter", *(one.get(record["method"], {}).get("start") for one in (record, saved))),
    ]
    return [name for name, here, there in compared if here != there] + differing_settings(checkpoint, record["settings"])


def differing_settings(checkpoint: Path, settings: dict[str, Any]) -> list[str]:
    """Names of the settings that differ between a checkpoint's run and ``settings``."""
    saved = json.loads((checkpoint / RECORD_NAME).read_text(encoding="utf-8"))["settings"]
    defaults = {one.name: one.default for one in fields(SemAlignConfig)}  # for settings that an older checkpoint lacks
    return [name for name, value in json.loads(json.dumps(settings)).items() if saved.get(name, defaults.get(name)) != value]


def check_run(checkpoint: Path, different: Sequence[str]) -> None:
    """Refuse a checkpoint of a run that differs.

    Args:
        checkpoint: its folder.
        different: names of what differs.

    Raises:
        ValueError: anything differs.
    """
    if different:
        raise InputError(
            f"The checkpoint {checkpoint} was made with other {', '.join(different)}: resume with the same models, data and "
            "settings, or start anew in another output_dir."
        )


class CheckpointOnInterrupt(TrainerCallback):
    """On SIGINT or SIGTERM, finishes the current step, saves a checkpoint and ends training. A second signal acts at once.

    Attributes:
        received: the signal that was received; ``None`` before.
        agreed: whether any rank had received a signal when the step's gradient was ready, so that all ranks end after the
            same step.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.agreed = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handle the signals inside the block. Outside the main thread Python allows no handlers, and nothing happens."""
        self.received, self.agreed = None, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        usual: dict[signal.Signals, Any] = {}

        def note(number: int, frame: FrameType | None) -> None:
            self.received = signal.Signals(number)
            signal.signal(number, usual[self.received])
            logger.warning("%s received: training will save a checkpoint after this step and end.", self.received.name)

        for one in (signal.SIGINT, signal.SIGTERM):
            usual[one] = signal.signal(one, note)
        try:
            yield
        finally:
            for one, handler in usual.items():
                signal.signal(one, handler)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Save a checkpoint and end training if a signal was received."""
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def leave(self) -> None:
        """End the process as the signal would: ``KeyboardInterrupt`` for Ctrl-C, exit code 143 for SIGTERM on any rank."""
        if self.received is signal.SIGINT:
            raise KeyboardInterrupt
        if self.agreed:
            raise SystemExit(128 + signal.SIGTERM)
