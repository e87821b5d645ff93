"""The Hub: publishing a run folder, and loading a transfer back with the record of how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError
from peft import PeftModel

from hf_semalign.loading import ADAPTER, brief, check_adapter, load_weights, read_json
from hf_semalign.symbols import resolve_model
from hf_semalign.trainer import RECORD_NAME

NEEDED = (*ADAPTER, RECORD_NAME, "README.md")
KEYS = ("source", "target", "pairing", "settings", "data")  # of a record, that others read
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
    """
    missing = [name for name in NEEDED if not (Path(folder) / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {missing}: push the folder of a finished `semalign train`.")
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
        FileNotFoundError: a folder without ``semalign.json`` or adapter, or an id that cannot be reached.
        ValueError: one of these is damaged, or the target is not found.
    """
    name = str(repo_id_or_folder)
    try:
        folder = Path(name) if Path(name).is_dir() else Path(hf_hub_download(name, RECORD_NAME)).parent
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(f"{name!r} is no run folder, and was not found on the Hub. ({brief(error)})") from error
    record = read_record(folder)
    if Path(name).is_dir():
        check_adapter(folder)
    try:
        base = load_weights(resolve_model(target or record["target"]), dtype="auto")
    except ValueError as error:
        raise ValueError(f"{error} The record has no local paths: pass the folder of its target as target.") from error
    return PeftModel.from_pretrained(base, name), record


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a run folder's ``semalign.json``.

    Raises:
        FileNotFoundError: a folder without it.
        ValueError: it is damaged.
    """
    if not (folder / RECORD_NAME).is_file():
        raise FileNotFoundError(f"{folder} has no {RECORD_NAME}: it is not a run folder of hf_semalign.")
    return read_json(folder / RECORD_NAME, *KEYS)
