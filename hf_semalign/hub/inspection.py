"""Inspect an adapter without loading it: its pair of models, layers, size and checksums.

From a repository, only the record, PEFT's configuration and the header of the weights are downloaded. The checksum is the
Hub's. The content of these files is untrusted: it is checked, and escaped when shown.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import SafetensorsParsingError
from rich.table import Table
from rich.text import Text
from safetensors import safe_open

from hf_semalign.errors import InputError, MissingFileError, brief
from hf_semalign.files import ADAPTER, RECORD_NAME, file_digest, sha256
from hf_semalign.hub.card import uses_pairs
from hf_semalign.hub.push import hub_errors_explained
from hf_semalign.hub.reading import check_adapter, read_adapter_config, read_record
from hf_semalign.models.names import is_hub_id

LOSSES = {"layer_loss": "relation_weight", "output_loss": "kl_weight"}
MOST = 2**24  # most bytes to read of a record or configuration; real ones have a few kilobytes


@dataclass(frozen=True)
class Inspection:
    """An adapter and its record.

    Attributes:
        record: content of ``semalign.json``.
        config: content of ``adapter_config.json``.
        shapes: shape of each weight tensor, by name.
        size: size of the weights in bytes.
        commit: commit of the repository, ``None`` for a folder.
        checksums: whether each checksum equals the recorded one, by name. ``None`` if the record does not have it.
    """

    record: dict[str, Any]
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    size: int
    commit: str | None
    checksums: dict[str, bool | None]

    def check(self) -> None:
        """Check that the weights are the recorded ones.

        Raises:
            ValueError: a checksum differs.
        """
        if wrong := [name for name, same in self.checksums.items() if same is False]:
            raise InputError(
                f"{ADAPTER[0]} does not match {RECORD_NAME} ({', '.join(wrong)} differ): copy or download both again."
            )


def inspect_transfer(repo_id_or_folder: str | Path, revision: str | None = None) -> Inspection:
    """Inspect an adapter.

    Args:
        repo_id_or_folder: a run folder, or a Hub id.
        revision: tag, branch or commit of a Hub id.

    Raises:
        FileNotFoundError: the folder or repository is not a transfer.
        ValueError: the name is neither a folder nor a Hub id, a revision is given for a folder, or files are damaged.
        OSError: the Hub cannot be reached, or fails.
    """
    name = str(repo_id_or_folder)
    if Path(name).is_dir():
        if revision is not None:
            raise InputError(f"revision is {revision!r}, but {name} is a folder: leave out revision.")
        return _inspect_folder(Path(name))
    if not is_hub_id(name):
        raise InputError(f"{name!r} is neither a folder nor a Hub id: pass a run folder, or owner/name.")
    return _inspect_repo(name, revision)


def _inspect_folder(folder: Path) -> Inspection:
    record, weights = read_record(folder), folder / ADAPTER[0]
    check_adapter(folder)
    with safe_open(weights, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    checksums = _compare(record, {"adapter_checksum": file_digest(weights), "adapter_sha256": sha256(weights)})
    return Inspection(record, read_adapter_config(folder), shapes, weights.stat().st_size, None, checksums)


def _inspect_repo(repo_id: str, revision: str | None) -> Inspection:
    api, names = HfApi(library_name="hf_semalign"), (RECORD_NAME, ADAPTER[1])
    with hub_errors_explained(repo_id):
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    files, commit = {file.rfilename: file for file in info.siblings or ()}, info.sha
    if missing := [name for name in (*names, ADAPTER[0]) if name not in files]:
        raise MissingFileError(f"{repo_id} lacks {missing}: it is not a transfer of hf_semalign.")
    if large := [name for name in names if (files[name].size or 0) > MOST]:
        raise InputError(f"{large} of {repo_id} are larger than {MOST >> 20} MB: real ones have a few kilobytes.")
    with hub_errors_explained(repo_id):
        folder, _ = (Path(api.hf_hub_download(repo_id, name, revision=commit)).parent for name in names)
        try:
            header = api.parse_safetensors_file_metadata(repo_id, ADAPTER[0], revision=commit)
        except SafetensorsParsingError as error:
            raise InputError(f"{ADAPTER[0]} of {repo_id} is damaged: push it again. ({brief(error)})") from error
    record, weights = read_record(folder), files[ADAPTER[0]]
    shapes = {name: tuple(tensor.shape) for name, tensor in header.tensors.items()}
    checksums = _compare(record, {"adapter_sha256": weights.lfs.sha256} if weights.lfs is not None else {})
    return Inspection(record, read_adapter_config(folder), shapes, weights.size or 0, commit, checksums)


def _compare(record: dict[str, Any], found: dict[str, str]) -> dict[str, bool | None]:
    return {name: value == record[name] if name in record else None for name, value in found.items()}


def inspection_table(name: str, facts: Inspection) -> Table:
    """An inspection as a table for the terminal. Markup and control characters are shown literally."""
    table = Table(title=Text(printable(name)), show_header=False)
    for heading, value in _rows(facts).items():
        table.add_row(Text(heading, style="bold"), Text(printable(value)))
    return table


def _rows(facts: Inspection) -> dict[str, str]:
    record, config = facts.record, facts.config
    settings, pairing = record["settings"], record["pairing"]
    pairs = [f"{int(layer)} → {k}" for k, layer in enumerate(pairing["source_layers"])]
    layers = sorted({int(found[1]) for one in facts.shapes if (found := re.search(r"\.(\d+)\.", one))})
    modules = sorted({found[1] for one in facts.shapes if (found := re.search(r"([^.]+)\.lora_[A-Z]", one))})
    count = sum(math.prod(shape) for shape in facts.shapes.values())
    states = {True: "the recorded one", False: "NOT the recorded one", None: "not in the record"}
    rows = {
        "What": f"{config['peft_type']} adapter, {config['task_type']}, method {record['method']}",
        "Source → target": f"{record['source']} → {record['target']}",
        "Base model": str(config["base_model_name_or_path"]),
        "Layer pairs": f"{', '.join(pairs)} ({pairing['strategy']}; counted from 0)" if uses_pairs(record) else "",
        "Layers with LoRA": f"{len(layers)}: {', '.join(map(str, layers))}",
        "Modules": ", ".join(modules),
        "Rank, alpha": f"{int(config['r'])}, {float(config['lora_alpha']):g}",
        "Parameters": f"{count:,} in {len(facts.shapes)} tensors, {facts.size / 1e6:.2f} MB",
        "Losses": ", ".join(f"{float(settings[weight]):g} times {settings[loss]}" for loss, weight in LOSSES.items()),
        "Data": ", ".join(f"{split} {int(one['rows']):,} rows" for split, one in record["data"].items()),
        "Versions": ", ".join(f"{package} {number}" for package, number in record["versions"].items()),
        "Commit": facts.commit or "",
    }
    rows |= {name: states[same] for name, same in facts.checksums.items()}
    if not facts.checksums:
        rows["adapter_sha256"] = "not available: the file is not in LFS"
    return {heading: value for heading, value in rows.items() if value}


def printable(text: str) -> str:
    """Escape control characters in text from data, so that the terminal does not act on them."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
