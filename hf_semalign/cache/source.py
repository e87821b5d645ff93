"""The source: a frozen model whose answers are kept, so that it is asked once."""

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
    """What ``source.json`` holds: whose folder it is, and checksums of the files beside it, by name."""

    name: str
    identity: str
    files: dict[str, str]
    checksum: str


class Source(FrozenModel):
    """The source model of a transfer, and what it has once said.

    What the weights have said is kept in a folder of its own under ``signals_dir``: a second run finds it there and never
    loads the source. That folder may also stand for the source itself, on a machine that has no weights.

    Args:
        model: a causal LM, a Hub id, a local folder, an embedded model, or a folder that another run has left under its
            ``signals_dir``.
        precision: of the run, see :func:`hf_semalign.models.loading.load_dtype`.
        parts: see :func:`hf_semalign.models.anatomy.name_parts`.

    Raises:
        ValueError: a model that the method cannot use, before any weight is loaded.
    """

    def __init__(self, model: PreTrainedModel | str | Path, *, precision: str | None = None, parts: Parts = None) -> None:
        model = resolve_model(model) if isinstance(model, (str, Path)) else model  # its files have checksums
        is_kept = isinstance(model, str) and (Path(model) / FACTS).is_file()
        self._facts = _read_facts(Path(str(model))) if is_kept else None
        self._whole: set[Path] = set()  # folders that were found so, or made
        super().__init__(model, precision=precision, parts=parts, weights=not is_kept)
        if self._facts is not None:
            self.name = self._facts["name"]

    @cached_property
    def identity(self) -> str:
        """What stands for the model: the commit of a Hub id, or its configuration with a checksum of its files or tensors, and
        where its parts are.
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
        """The folder that keeps what the source says, made if it does not exist.

        It holds ``source.json``, the configuration and the tokenizer, later the head, attribution scores and signals.
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
                logger.warning("%s Here it is made again.", error)
                self._describe(folder)
            self._whole.add(folder)
        return folder

    def _describe(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with writing_lock(folder):
            with suppress(FileNotFoundError, ValueError):
                _read_facts(folder)  # written by another process meanwhile
                return
            self.shape.config.save_pretrained(folder)
            names = [CONFIG_NAME]
            if isinstance(self._given, str) and self.tokenizer is not None:
                names += [Path(path).name for path in self.tokenizer.save_pretrained(folder)]
            files = {name: file_digest(folder / name) for name in names if (folder / name).is_file()}
            facts = {"name": self.name, "identity": self.identity, "hf_semalign": version("hf_semalign"), "files": files}
            write_text(folder / FACTS, json.dumps({**facts, "checksum": digest(facts)}, indent=1))

    def lock(self, root: Path) -> FileLock:
        """Held while the source is asked for something that is kept, see :func:`hf_semalign.files.writing_lock`."""
        return writing_lock(self.folder(root))

    def head(self, root: Path | None = None) -> Head:
        """The head on the CPU; from ``root`` if it is kept there, a bias as one more column of the weight."""
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
        """A record that :meth:`keep` wrote; ``None`` when there is none or it is damaged, which is logged."""
        return recall_record(self.folder(root) / f"{name}.json")

    def keep(self, root: Path, name: str, record: dict[str, Any]) -> None:
        """Keep a record of plain JSON values with what the source says; call it under :meth:`lock`."""
        keep_record(self.folder(root) / f"{name}.json", record)

    def _need_weights(self) -> None:
        if self._facts is not None:
            raise InputError(
                f"{self._given} holds what {self.name} said about some data, and not its weights, and something more is "
                "needed of it. Run `semalign signals` with the same recipe where the source is, or name the source itself."
            )


def _read_facts(folder: Path) -> dict[str, Any]:
    """What ``source.json`` says, when it and the files beside it that it names are whole.

    Raises:
        FileNotFoundError: there is none.
        ValueError: something is damaged.
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
    """What stands for weights: of a Hub id its commit, of a folder checksums of its files and its configuration."""
    config = find_config(name)
    if getattr(config, "_commit_hash", None) is not None:
        return [name, config._commit_hash]
    files = sorted(Path(name).glob("*.safetensors"))
    return [[[file.name, file_digest(file)] for file in files], config_facts(config)]


def config_facts(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration as plain values, without what says nothing of the computation: names, versions and the dtype."""
    content = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in content.items() if key not in ("_name_or_path", "transformers_version", "dtype")}
