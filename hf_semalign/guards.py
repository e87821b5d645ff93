"""What keeps a run whole: one at a time in a folder, a checkpoint before it ends on a signal, no step on a broken loss."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from transformers import TrainerCallback

logger = logging.getLogger(__name__)
LOCK = "_lock"  # Trainer.push_to_hub leaves out _*


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Hold a run folder for this process; inside, it may be claimed again.

    Raises:
        ValueError: another process holds it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / LOCK, is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"Another run is at work in {folder}: wait for its end, or choose another output_dir. Both would write there."
        ) from None
    try:
        yield
    finally:
        lock.release()


class CheckpointOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM the step in hand is finished and a checkpoint written, and training ends; a second signal is obeyed
    at once.

    Attributes:
        received: the signal, once there was one.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take the signals inside the block; elsewhere than in the main thread they cannot be taken, and are left alone."""
        self.received = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        usual: dict[signal.Signals, Any] = {}

        def note(number: int, frame: FrameType | None) -> None:
            self.received = signal.Signals(number)
            signal.signal(number, usual[self.received])
            logger.warning("%s: training ends with a checkpoint after this step.", self.received.name)

        for one in (signal.SIGINT, signal.SIGTERM):
            usual[one] = signal.signal(one, note)
        try:
            yield
        finally:
            for one, handler in usual.items():
                signal.signal(one, handler)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Have a checkpoint written, and end."""
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def leave(self) -> None:
        """End the process as the signal would have: Ctrl-C as ``KeyboardInterrupt``, SIGTERM with the code 143."""
        if self.received is signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)
