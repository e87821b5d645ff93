"""Errors that a user can act on. Their messages say what was given, what was expected and what to do.

Each class also derives from the matching built-in error, so ``except ValueError`` catches an :class:`InputError`. The command
line prints the message and exits with code 2. Any other exception is a bug in this package and keeps its traceback.
"""

from __future__ import annotations

import textwrap


class SemAlignError(Exception):
    """Base class of this package's errors."""


class InputError(SemAlignError, ValueError):
    """Raised when settings, data, models or folders cannot be used."""


class MissingFileError(SemAlignError, FileNotFoundError):
    """Raised when a file or folder does not exist."""


class StorageError(SemAlignError, OSError):
    """Raised when a disk or the Hub refuses a write."""


class NotFiniteError(SemAlignError, FloatingPointError):
    """Raised when a loss, a gradient or an adapter is not finite, so training cannot continue."""


class FailedRunsError(SemAlignError, ChildProcessError):
    """Raised when runs of a comparison failed."""


def brief(error: object) -> str:
    """Shorten a library's message to one line of at most 200 characters."""
    return textwrap.shorten(str(error), 200, placeholder=" ...")
