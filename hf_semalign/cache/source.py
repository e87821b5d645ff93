"""The source: a frozen model whose results are saved, so that it runs once."""

from __future__ import annotations

import json
import logging
import re
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch
from filelock import FileLock
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from hf_semalign.errors import InputError
from hf_semalign.files import (
    checksum,
    digest,
    file_digest,
    keep_record,
    load_tensor,
    read_json,
    recall_record,
    save_tensor,
    write_text,
    writing_lock,
)
from hf_semalign.models.anatomy import Head, Parts, dissect
from hf_semalign.models.frozen import FrozenModel
from hf_semalign.models.loading import find_config
from hf_semalign.models.names import resolve_model

logger = logging.getLogger(__name__)
FACTS = "source.json"


class Facts(TypedDict):
    """The content of ``source.json``: the source that the folder belongs to, and checksums of the other files by name."""

    name: str
    identity: str
    files: dict[str, str]
    checksum: str


class Source(FrozenModel):
    """The source model of a transfer, and the saved results of running it.

    The results are in a folder of the source under ``signals_dir``. A second run finds them there and does not load the source.
    On a machine without the weights, this folder may be given in place of the source.

    Args:
        model: a causal LM, a Hub id, a local folder, an embedded model, or a folder with the results of another run.
        precision: of the run, see :func:`hf_semalign.models.loading.load_dtype`.
        parts: see :func:`hf_semalign.models.anatomy.name_parts`.

    Raises:
        ValueError: the method cannot use the model. No weight is loaded before this.
    """

    def __init__(self, model: PreTrainedModel | str | Path, *, precision: str | None = None, parts: Parts = None) -> None:
        model = resolve_model(model) if isinstance(model, (str, Path)) else model  # the identity needs its files
        is_kept = isinstance(model, str) and (Path(model) / FACTS).is_file()
        self._facts = _read_facts(Path(str(model))) if is_kept else None
        self._whole: set[Path] = set()  # folders that were checked, or made
        super().__init__(model, precision=precision, parts=parts, weights=not is_kept)
        if self._facts is not None:
            self.name = self._facts["name"]

    @cached_property
    def identity(self) -> str:
        """What identifies the model: the commit of a Hub id, or the configuration with checksums of files or tensors; and
        the paths of its parts.
        """
        if self._facts is not None:
            return self._facts["identity"]
        anatomy = dissect(self.shape)
        paths = {id(module): path for path, module in self.shape.named_modules()}
        parts = [paths[id(part)] for part in (anatomy.decoder, anatomy.layers, anatomy.head)]
        if isinstance(self._given, PreTrainedModel):
            tensors = {name: checksum(tensor) for name, tensor in self._given.state_dict().items()}
            return digest([tensors, config_facts(self._given.config), parts])
        return digest([*weights_identity(self._given), str(self.dtype), parts])

    def folder(self, root: Path) -> Path:
        """The folder of the source's results. It is made if it does not exist.

        At first it has ``source.json``, the configuration and the tokenizer; later also head, attribution scores and signals.
        """
        if self._facts is not None:
            return Path(str(self._given))
        readable = re.sub(r"[^\w.-]+", "--", self.name) or "source"
        folder = root / f"{readable}-{self.identity[:16]}"
        if folder not in self._whole:
            try:
                _read_facts(folder)
            except FileNotFoundError:
                self._describe(folder)
            except ValueError as error:
                logger.warning("%s On this machine, it is written again.", error)
                self._describe(folder)
            self._whole.add(folder)
        return folder

    def _describe(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with writing_lock(folder):
            with suppress(FileNotFoundError, ValueError):
                _read_facts(folder)  # another process has written it meanwhile
                return
            self.shape.config.save_pretrained(folder)
            names = [CONFIG_NAME]
            if isinstance(self._given, str) and self.tokenizer is not None:
                names += [Path(path).name for path in self.tokenizer.save_pretrained(folder)]
            files = {name: file_digest(folder / name) for name in names if (folder / name).is_file()}
            facts = {"name": self.name, "identity": self.identity, "hf_semalign": version("hf_semalign"), "files": files}
            write_text(folder / FACTS, json.dumps({**facts, "checksum": digest(facts)}, indent=1))

    def lock(self, root: Path) -> FileLock:
        """The lock to hold while results are computed and saved, see :func:`hf_semalign.files.writing_lock`."""
        return writing_lock(self.folder(root))

    def head(self, root: Path | None = None) -> Head:
        """The head on the CPU. With ``root`` it is saved there, with a bias as one more column of the weight."""
        if root is None:
            return self.read_head()
        path = self.folder(root) / "head.safetensors"
        if (known := self._known_head(path)) is not None:
            return known
        with self.lock(root):
            if (known := self._known_head(path)) is not None:
                return known
            head = self.read_head()
            save_tensor(head.weight if head.bias is None else torch.column_stack((head.weight, head.bias)), path)
        return head

    def _known_head(self, path: Path) -> Head | None:
        known = load_tensor(path)
        if known is None:
            return None
        bias = known[:, self.width] if known.shape[1] > self.width else None
        return Head(known[:, : self.width].contiguous(), bias, dissect(self.shape).softcap)

    def recall(self, root: Path, name: str) -> dict[str, Any] | None:
        """A record that :meth:`keep` saved; ``None`` if there is none or it is damaged. Damage is logged."""
        return recall_record(self.folder(root) / f"{name}.json")

    def keep(self, root: Path, name: str, record: dict[str, Any]) -> None:
        """Save a record of plain JSON values. Hold :meth:`lock` while calling it."""
        keep_record(self.folder(root) / f"{name}.json", record)

    def _need_weights(self) -> None:
        if self._facts is not None:
            raise InputError(
                f"{self._given} has hidden states of {self.name} on some data, not its weights, and this run needs more. "
                "Run `semalign signals` with the same recipe where the source is, or give the source itself."
            )


def _read_facts(folder: Path) -> dict[str, Any]:
    """Read ``source.json``, and check it and the files that it names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged.
    """
    facts = read_json(folder / FACTS, Facts)
    damaged = [FACTS] if facts.pop("checksum") != digest(facts) else []
    if not damaged:
        damaged = [name for name, known in facts["files"].items() if not _is(folder / name, known)]
    if damaged:
        raise InputError(f"In {folder.name}, damaged or missing: {', '.join(damaged)}. Copy the folder again.")
    return facts


def _is(path: Path, known: str) -> bool:
    return path.is_file() and file_digest(path) == known


def weights_identity(name: str) -> list[Any]:
    """Facts that identify weights: the commit of a Hub id, or a folder's configuration and the checksums of its files."""
    config = find_config(name)
    if getattr(config, "_commit_hash", None) is not None:
        return [name, config._commit_hash]
    files = sorted(Path(name).glob("*.safetensors"))
    return [[[file.name, file_digest(file)] for file in files], config_facts(config)]


def config_facts(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration as plain values, without names, versions and dtype, which do not change the computation."""
    content = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in content.items() if key not in ("_name_or_path", "transformers_version", "dtype")}
