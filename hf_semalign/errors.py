"""Errors that a user can act on: their messages say what was given, what was expected and what to do.

Each is also the built-in error that its name suggests, so that ``except ValueError`` catches an :class:`InputError`. The
command line prints the message and exits with code 2. Any other error is a bug of this package, and keeps its traceback.
"""

from __future__ import annotations

import textwrap


class SemAlignError(Exception):
    """What all of them are."""


class InputError(SemAlignError, ValueError):
    """Settings, data, models or folders that cannot be used."""


class MissingFileError(SemAlignError, FileNotFoundError):
    """A file or folder that is not there."""


class StorageError(SemAlignError, OSError):
    """A disk or a Hub that does not take what it is given."""


class NotFiniteError(SemAlignError, FloatingPointError):
    """A loss, a gradient or an adapter that is not finite, so that training cannot go on."""


class FailedRunsError(SemAlignError, ChildProcessError):
    """Runs of a comparison that failed."""


def brief(error: object) -> str:
    """A library's message on one line, without most of what it lists."""
    return textwrap.shorten(str(error), 200, placeholder=" ...")
