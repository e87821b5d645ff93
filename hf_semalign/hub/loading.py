"""Load transfers, from run folders or the Hub, with their records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from hf_semalign.errors import InputError, MissingFileError, brief
from hf_semalign.files import ADAPTER, RECORD_NAME
from hf_semalign.hub.reading import check_adapter, check_recorded, read_record
from hf_semalign.models.loading import load_weights
from hf_semalign.models.names import EMBEDDED, is_hub_id, resolve_model

LOADED = (*ADAPTER, RECORD_NAME)


def load_transfer(
    repo_id_or_folder: str | Path, *, target: str | Path | None = None, revision: str | None = None
) -> tuple[PeftModel, dict[str, Any]]:
    """Load an adapter and its record.

    Args:
        repo_id_or_folder: a run folder, or a Hub id.
        target: Hub id or folder of the target, if the record only has the name of a local folder.
        revision: tag, branch or commit of a Hub id.

    Returns:
        The target with its adapter in evaluation mode, and the content of ``semalign.json``.

    Raises:
        FileNotFoundError: the folder lacks ``semalign.json`` or an adapter in safetensors, or the Hub id cannot be reached.
        ValueError: a file is damaged, the target is not found, or the record has a path.
    """
    folder = find_folder(repo_id_or_folder, revision)
    record = read_record(folder)
    check_adapter(folder)
    check_recorded(folder, record)
    name = find_target(record, target)
    try:
        base = load_weights(name, dtype="auto")
    except ValueError as error:
        raise InputError(f"{error} The record has no local paths: pass the target's folder as target.") from error
    return adapted(base, folder, name), record


def find_folder(repo_id_or_folder: str | Path, revision: str | None = None) -> Path:
    """The given folder, or a local copy of a Hub repository's transfer files at a tag, branch or commit.

    Raises:
        FileNotFoundError: the name is neither a folder nor a repository, or the Hub cannot be reached.
        ValueError: a revision is given for a folder.
    """
    given = resolve_model(repo_id_or_folder)
    local = Path(given).is_dir()
    if local and revision is not None:
        raise InputError(f"revision is {revision!r}, but {given} is a folder: leave out revision.")
    try:
        return Path(given if local else snapshot_download(given, revision=revision, allow_patterns=list(LOADED)))
    except (OSError, HFValidationError) as error:
        raise MissingFileError(f"{given!r} is not a run folder, and was not found on the Hub. ({brief(error)})") from error


def find_target(record: dict[str, Any], target: str | Path | None = None) -> str:
    """The Hub id or folder of a record's target.

    Args:
        record: see :func:`hf_semalign.hub.reading.read_record`.
        target: Hub id or folder of the target, if the record only has the name of a local folder.

    Raises:
        ValueError: ``target`` is needed but missing.
    """
    name = str(target or record["target"])
    if target is None and not name.startswith(EMBEDDED) and not is_hub_id(name):
        raise InputError(f"The target {name!r} of the record is not a Hub id: pass it as target=.")
    return name


def adapted(base: Any, folder: Path, name: str) -> PeftModel:
    """Add the adapter of a folder to its target.

    Args:
        base: the target.
        folder: the run folder.
        name: name of the target in messages.

    Raises:
        ValueError: the adapter does not fit the target.
    """
    try:
        model = PeftModel.from_pretrained(base, folder)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"The adapter of {folder} does not fit {name}: {brief(error)}. Pass its own target.") from error
    with safe_open(folder / ADAPTER[0], framework="pt") as file:  # PEFT only warns about other names
        odd = set(file.keys()) ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if odd:
        raise InputError(
            f"The adapter of {folder} does not fit {name}: {len(odd)} weights are in only one of them, such as {min(odd)}. "
            "Pass its own target."
        )
    return model
