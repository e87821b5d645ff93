"""Loading a transfer back: the adapter on its target, with the record of how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_semalign.symbols import resolve_model
from hf_semalign.trainer import RECORD_NAME


def load_transfer(repo_id_or_folder: str | Path, *, target: str | None = None) -> tuple[PeftModel, dict[str, Any]]:
    """Load an adapter and its record.

    Args:
        repo_id_or_folder: a run folder, or a Hub id.
        target: the target, where the record knows only a local folder's name: a Hub id or folder.

    Returns:
        The target with its adapter in evaluation mode, and the content of ``semalign.json``.

    Raises:
        FileNotFoundError: a folder without ``semalign.json``.
    """
    name = str(repo_id_or_folder)
    folder = Path(name)
    if folder.is_dir():
        record_path = folder / RECORD_NAME
        if not record_path.is_file():
            raise FileNotFoundError(f"{name} has no {RECORD_NAME}: it is not a run folder of hf_semalign.")
    else:
        record_path = Path(hf_hub_download(name, RECORD_NAME))
    record = json.loads(record_path.read_text())
    base = AutoModelForCausalLM.from_pretrained(resolve_model(target or record["target"]), dtype="auto")
    return PeftModel.from_pretrained(base, name), record
