"""The Hub: publishing a run folder, and loading a transfer back with the record of how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import PeftModel

from hf_semalign.loading import ADAPTER, brief, check_adapter, load_weights, read_json
from hf_semalign.states import file_digest
from hf_semalign.symbols import EMBEDDED, is_hub_id, resolve_model
from hf_semalign.trainer import RECORD_NAME

LOADED = (*ADAPTER, RECORD_NAME)
NEEDED = (*LOADED, "README.md")
KEYS = ("method", "source", "target", "pairing", "settings", "data", "adapter_checksum")  # of a record, that others read
PUBLISHED = [
    *NEEDED,
    "results.json",
    "figures/*.png",
    "figures/*.svg",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]


def push_transfer(folder: str | Path, repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Publish a run folder: adapter, record, card, results, figures and tokenizer, and nothing else that lies there.

    Args:
        folder: a run folder.
        repo_id: ``owner/name``; made if it does not exist.
        token: Hub token; by default the one that is logged in.
        private: of a new repository.

    Returns:
        URL of the commit.

    Raises:
        FileNotFoundError: a folder that lacks one of ``NEEDED``, before anything is sent.
        ValueError: a link to what lies elsewhere, likewise.
    """
    missing = [name for name in NEEDED if not (Path(folder) / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {missing}: push the folder of a finished `semalign train`.")
    found = [path for pattern in PUBLISHED for path in Path(folder).glob(pattern)]
    if outside := [path.name for path in found if not path.resolve().is_relative_to(Path(folder).resolve())]:
        raise ValueError(f"{outside} are links out of the folder {folder}: put the files themselves there.")
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, allow_patterns=PUBLISHED, commit_message="SemAlign transfer"
    )
    return str(commit.commit_url)


def load_transfer(repo_id_or_folder: str | Path, *, target: str | None = None) -> tuple[PeftModel, dict[str, Any]]:
    """Load an adapter and its record.

    Args:
        repo_id_or_folder: a run folder, or a Hub id.
        target: the target, where the record knows only a local folder's name: a Hub id or folder.

    Returns:
        The target with its adapter in evaluation mode, and the content of ``semalign.json``.

    Raises:
        FileNotFoundError: a folder without ``semalign.json`` or an adapter in safetensors, or an id that cannot be reached.
        ValueError: one of these is damaged, the target is not found, or the record names a path.
    """
    folder = find_folder(repo_id_or_folder)
    record = read_record(folder)
    check_adapter(folder)
    if file_digest(folder / ADAPTER[0]) != record["adapter_checksum"]:
        raise ValueError(
            f"{ADAPTER[0]} of {repo_id_or_folder} is not the one that {RECORD_NAME} is about: copy or download both again."
        )
    name = find_target(record, target)
    try:
        base = load_weights(name, dtype="auto")
    except ValueError as error:
        raise ValueError(f"{error} The record has no local paths: pass the folder of its target as target.") from error
    return PeftModel.from_pretrained(base, folder), record


def find_folder(repo_id_or_folder: str | Path) -> Path:
    """A folder, or the local copy of what a Hub repository has of a transfer.

    Raises:
        FileNotFoundError: it is neither, or cannot be reached.
    """
    given = str(repo_id_or_folder)
    try:
        return Path(given) if Path(given).is_dir() else Path(snapshot_download(given, allow_patterns=list(LOADED)))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(f"{given!r} is no run folder, and was not found on the Hub. ({brief(error)})") from error


def find_target(record: dict[str, Any], target: str | None = None) -> str:
    """Hub id or folder of a record's target.

    Args:
        record: see :func:`read_record`.
        target: the target, where the record knows only a local folder's name.

    Raises:
        ValueError: the record names a path.
    """
    name = target or record["target"]
    if target is None and not name.startswith(EMBEDDED) and not is_hub_id(name):
        raise ValueError(f"The target {name!r} of the record is no Hub id: name it by target=.")
    return resolve_model(name)


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a run folder's ``semalign.json``.

    Raises:
        FileNotFoundError: a folder without it.
        ValueError: it is damaged.
    """
    if not (folder / RECORD_NAME).is_file():
        raise FileNotFoundError(f"{folder} has no {RECORD_NAME}: it is not a run folder of hf_semalign.")
    return read_json(folder / RECORD_NAME, *KEYS)
