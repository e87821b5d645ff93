"""Model names: Hub ids, folders and the embedded pair."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_semalign.errors import InputError

EMBEDDED = "embedded:"
PAIR_FOLDER = Path(__file__).parents[1] / "data" / "pair"


def resolve_model(name: str | Path) -> str:
    """Folder of an embedded model (``embedded:source``, ``embedded:target``). Hub ids and folders are returned unchanged.

    Functions that read a model's files call this themselves; all others pass names on unresolved.

    Raises:
        ValueError: there is no such embedded model.
    """
    name = str(name)
    prefix, _, role = name.partition(EMBEDDED)
    if prefix or not role:
        return name
    if role not in ("source", "target"):
        raise InputError(f"No embedded model {name!r}: use embedded:source or embedded:target.")
    return str(PAIR_FOLDER / role)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ``owner/name`` or ``name``."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def public_name(name_or_path: str) -> str:
    """A model's name for records and cards. It never shows a local path: for a folder, only the folder's own name is used."""
    if not name_or_path:
        return "unnamed"  # a model created in memory
    path = Path(name_or_path)
    if path.parent == PAIR_FOLDER:
        return EMBEDDED + path.name
    if path.exists():
        return path.resolve().name
    return name_or_path if is_hub_id(name_or_path) else re.split(r"[/\\]", name_or_path.rstrip("/\\"))[-1]
