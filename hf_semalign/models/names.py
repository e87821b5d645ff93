"""Names of models: Hub ids, folders and the embedded pair."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_semalign.errors import InputError

EMBEDDED = "embedded:"
PAIR_FOLDER = Path(__file__).parents[1] / "data" / "pair"


def resolve_model(name: str | Path) -> str:
    """Folder of an embedded model (``embedded:source``, ``embedded:target``); other names, Hub ids and folders, as given.

    Whatever reads files of a model by its name calls this itself; everybody else passes names on.

    Raises:
        ValueError: an embedded model that does not exist.
    """
    name = str(name)
    prefix, _, role = name.partition(EMBEDDED)
    if prefix or not role:
        return name
    if role not in ("source", "target"):
        raise InputError(f"No embedded model {name!r}: use embedded:source or embedded:target.")
    return str(PAIR_FOLDER / role)


def is_hub_id(name: str) -> bool:
    """Whether a name is of the form ``owner/name`` or ``name``."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def public_name(name_or_path: str) -> str:
    """A model's name for records and cards: never a local path, of a folder, here or elsewhere, only its own name."""
    if not name_or_path:
        return "unnamed"  # a model made in memory
    path = Path(name_or_path)
    if path.parent == PAIR_FOLDER:
        return EMBEDDED + path.name
    if path.exists():
        return path.resolve().name
    return name_or_path if is_hub_id(name_or_path) else re.split(r"[/\\]", name_or_path.rstrip("/\\"))[-1]
