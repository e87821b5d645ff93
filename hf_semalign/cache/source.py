"""The frozen source: what is known of it without its weights, and its weights, whole or one layer at a time."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch
from filelock import FileLock
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME
from transformers.utils import logging as transformers_logging

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
from hf_semalign.models.anatomy import Anatomy, Head, Parts, check_head, dissect, embedding_rows, name_parts
from hf_semalign.models.hooks import bypass, gives_tuples
from hf_semalign.models.loading import find_config, find_tokenizer, is_quantised, load_dtype, load_model, load_weights, skeleton
from hf_semalign.models.names import public_name, resolve_model

logger = logging.getLogger(__name__)
FACTS = "source.json"


class Facts(TypedDict):
    """What ``source.json`` holds: whose folder it is, and checksums of the files beside it, by name."""

    name: str
    identity: str
    files: dict[str, str]
    checksum: str


class Source:
    """The source model of a transfer.

    Nothing is loaded before :meth:`model`, :meth:`layer` or :meth:`head` asks for weights, and what those have once said is
    kept in a folder of its own under ``signals_dir``: a second run finds it there and never loads the source. That folder may
    also stand for the source itself, on a machine that has no weights.

    Args:
        model: a causal LM, a Hub id, a local folder, an embedded model, or a folder that another run has left under its
            ``signals_dir``.
        precision: of the run, see :func:`hf_semalign.models.loading.load_dtype`.
        parts: see :func:`hf_semalign.models.anatomy.name_parts`.

    Attributes:
        name: Hub id, or the name of a folder.
        num_layers: decoder layers.
        width: channels of a hidden state.
        head_rows: rows of the head.
        embedding_rows: tokens that it has embeddings for.
        quantised: whether its weights are; then it cannot be streamed.
        dtype: of the weights.

    Raises:
        ValueError: a model that the method cannot use, before any weight is loaded.
    """

    def __init__(self, model: PreTrainedModel | str | Path, *, precision: str | None = None, parts: Parts = None) -> None:
        model = resolve_model(model) if isinstance(model, (str, Path)) else model  # its files have checksums
        self._given = model
        self._precision = precision
        self._named = parts
        self._checked = False
        self._whole: set[Path] = set()  # folders that were found so, or made
        self._offloaded: tuple[str, PreTrainedModel, tempfile.TemporaryDirectory] | None = None
        self._facts = None
        if isinstance(model, str) and (Path(model) / FACTS).is_file():
            self._facts = _read_facts(Path(model))
        shape = (
            skeleton(model, parts, weights=self._facts is None) if isinstance(model, str) else load_model(model, parts=parts)
        )
        anatomy = dissect(shape)
        self._shape = shape
        self.quantised = is_quantised(shape.config)
        self.embedding_rows = embedding_rows(shape)
        self.name = self._facts["name"] if self._facts else public_name(str(shape.name_or_path))
        self.num_layers = len(anatomy.layers)
        self.head_rows, self.width = anatomy.head_weight().shape
        self.dtype = load_dtype(model, precision) if isinstance(model, str) else shape.dtype
        self._model = None if isinstance(model, str) else shape

    @property
    def shape(self) -> PreTrainedModel:
        """The model without its weights, or the one that was given in memory."""
        return self._shape

    @cached_property
    def identity(self) -> str:
        """What stands for the model: the commit of a Hub id, or its configuration with a checksum of its files or tensors, and
        where its parts are.
        """
        if self._facts is not None:
            return self._facts["identity"]
        anatomy = dissect(self._shape)
        paths = {id(module): path for path, module in self._shape.named_modules()}
        parts = [paths[id(part)] for part in (anatomy.decoder, anatomy.layers, anatomy.head)]
        if isinstance(self._given, PreTrainedModel):
            tensors = {name: checksum(tensor) for name, tensor in self._given.state_dict().items()}
            return digest([tensors, config_facts(self._given.config), parts])
        config = find_config(self._given)
        if getattr(config, "_commit_hash", None) is not None:
            return digest([self._given, config._commit_hash, str(self.dtype), parts])
        files = sorted(Path(self._given).glob("*.safetensors"))
        return digest([[[file.name, file_digest(file)] for file in files], config_facts(config), str(self.dtype), parts])

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
            self._shape.config.save_pretrained(folder)
            names = [CONFIG_NAME]
            if isinstance(self._given, str) and self.tokenizer is not None:
                names += [Path(path).name for path in self.tokenizer.save_pretrained(folder)]
            files = {name: file_digest(folder / name) for name in names if (folder / name).is_file()}
            facts = {"name": self.name, "identity": self.identity, "hf_semalign": version("hf_semalign"), "files": files}
            write_text(folder / FACTS, json.dumps({**facts, "checksum": digest(facts)}, indent=1))

    def lock(self, root: Path) -> FileLock:
        """Held while the source is asked for something that is kept, see :func:`hf_semalign.files.writing_lock`."""
        return writing_lock(self.folder(root))

    @property
    def origin(self) -> str:
        """Folder or Hub id that it was given by, or that a model in memory was loaded from; empty where there is none."""
        return self._given if isinstance(self._given, str) else str(self._given.name_or_path)

    def model(self, device: torch.device | str) -> PreTrainedModel:
        """The whole model on a device, frozen, in evaluation mode; loaded at the first call.

        Raises:
            ValueError: a folder of signals, which has no weights.
        """
        self._need_weights()
        if self._model is None:
            logger.info("Loading the source %s", self.name)
            self._model = load_model(self._given, precision=self._precision, parts=self._named)
        self._move(device)
        self._check()
        return self._model.eval().requires_grad_(False)

    def rest(self) -> None:
        """Take the model off the accelerator."""
        if self._model is not None:
            self._move("cpu")

    def _check(self) -> None:
        if self._model is not None and not self._checked:
            check_head(self._model)
            self._checked = True

    def _move(self, device: torch.device | str) -> None:
        if self._model is not None and not self.quantised:  # quantised weights stay where they were loaded
            self._model.to(device)  # type: ignore[arg-type]

    def release(self) -> None:
        """Let a model that was loaded here go; one that the caller made goes to the CPU."""
        if isinstance(self._given, str):
            self._model = self._offloaded = None
        self.rest()

    def head(self, root: Path | None = None) -> Head:
        """The head on the CPU; from ``root`` if it is kept there, a bias as one more column of the weight."""
        if root is None:
            return self._read_head()
        path = self.folder(root) / "head.safetensors"
        if (known := self._known_head(path)) is not None:
            return known
        with self.lock(root):
            if (known := self._known_head(path)) is not None:
                return known
            head = self._read_head()
            save_tensor(head.weight if head.bias is None else torch.column_stack((head.weight, head.bias)), path)
        return head

    def _known_head(self, path: Path) -> Head | None:
        known = load_tensor(path)
        if known is None:
            return None
        bias = known[:, self.width] if known.shape[1] > self.width else None
        return Head(known[:, : self.width].contiguous(), bias, dissect(self._shape).softcap)

    def _read_head(self) -> Head:
        if self.quantised:
            self.model("cpu")  # whole, because its packed weights are not read in parts
        if self._model is not None:
            self._check()
            return dissect(self._model).output_head().to("cpu")
        as_tuples, states = self.as_tuples, torch.randn(8, 1, self.width, dtype=self.dtype)
        with self._partly_loaded(None, "cpu") as model:
            anatomy = dissect(model)
            with bypass(anatomy.layers, states, as_tuples=as_tuples):
                check_head(model, states)
            head = anatomy.output_head()
            return head._replace(weight=head.weight.clone(), bias=None if head.bias is None else head.bias.clone())

    def recall(self, root: Path, name: str) -> dict[str, Any] | None:
        """A record that :meth:`keep` wrote; ``None`` when there is none or it is damaged, which is logged."""
        return recall_record(self.folder(root) / f"{name}.json")

    def keep(self, root: Path, name: str, record: dict[str, Any]) -> None:
        """Keep a record of plain JSON values with what the source says; call it under :meth:`lock`."""
        keep_record(self.folder(root) / f"{name}.json", record)

    @contextmanager
    def layer(self, index: int, device: torch.device | str) -> Iterator[Anatomy]:
        """One decoder layer on a device, with the decoder's small parts around it, and the embeddings for layer 0.

        Weights of a folder or Hub id are read from its safetensors files, each once in a pass over all layers (families whose
        checkpoints transformers converts while loading, such as mixtures of experts, are read whole for every layer); a model
        in memory lends its layer to the device.
        """
        if self._model is None:
            with self._partly_loaded(index, device) as model:
                yield dissect(model)
            return
        anatomy = dissect(self._model.eval().requires_grad_(False))
        aside = {id(layer) for place, layer in enumerate(anatomy.layers) if place != index}
        if index > 0:
            aside.add(id(self._model.get_input_embeddings()))
        lent = [part for part in anatomy.decoder.children() if part is not anatomy.layers and id(part) not in aside]
        lent.append(anatomy.layers[index])
        home = anatomy.device
        try:
            for part in lent:
                part.to(device)
            yield anatomy
        finally:
            for part in lent:
                part.to(home)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that lies with the source, see :func:`hf_semalign.models.loading.find_tokenizer`."""
        return find_tokenizer(self._given if isinstance(self._given, str) else str(self._given.name_or_path))

    @cached_property
    def as_tuples(self) -> bool:
        """Whether its layers give tuples, see :func:`hf_semalign.models.hooks.gives_tuples`."""
        if self.quantised:
            self.model("cpu")
        if self._model is not None:
            anatomy = dissect(self._model)
            return gives_tuples(anatomy.decoder, anatomy.layers[0])
        with self.layer(0, "cpu") as anatomy:
            return gives_tuples(anatomy.decoder, anatomy.layers[0])

    @contextmanager
    def _partly_loaded(self, layer: int | None, device: torch.device | str) -> Iterator[PreTrainedModel]:
        """The model with one layer's weights, or with its head's, and the decoder's small parts; all else stays on the disk."""
        model = self._on_disk(device)
        anatomy = dissect(model)
        parts = [anatomy.head] if layer is None else [anatomy.layers[layer]]
        if layer == 0:
            parts.append(model.get_input_embeddings())
        modules = [module for part in parts for module in part.modules()]
        hooks: list[tuple[nn.Module, Any]] = [
            (module, module._hf_hook) for module in modules if getattr(getattr(module, "_hf_hook", None), "offload", False)
        ]
        try:
            for module, hook in hooks:  # accelerate's, which would read the weights anew in every forward
                hook.pre_forward(module)
                hook.offload = False
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(self.dtype)
            yield model
        finally:
            for module, hook in hooks:
                hook.offload = True
                hook.post_forward(module, None)

    def _on_disk(self, device: torch.device | str) -> PreTrainedModel:
        """The model with its weights on the disk, but for the decoder's small parts; made once, for it looks at every layer."""
        self._need_weights()
        if self._offloaded is not None and self._offloaded[0] == str(device):
            return self._offloaded[1]
        shape, anatomy = self._shape, dissect(self._shape)
        places = {id(module): path for path, module in shape.named_modules()}
        inner = places[id(anatomy.decoder)]
        homes: dict[str, str] = {  # what is not of the decoder, such as a vision tower
            path: "disk"
            for path, module in shape.named_modules()
            if not f"{path}.".startswith(f"{inner}.") and next(module.parameters(recurse=False), None) is not None
        }
        homes |= {f"{places[id(anatomy.layers)]}.{k}": "disk" for k in range(self.num_layers)}
        homes |= {
            f"{inner}.{name}": str(device) for name, part in anatomy.decoder.named_children() if part is not anatomy.layers
        }
        homes |= {places[id(part)]: "disk" for part in (shape.get_input_embeddings(), anatomy.head)}
        scratch = tempfile.TemporaryDirectory()  # for weights that transformers converts while loading
        with _quietly():
            own = load_dtype(str(self._given))  # another would have all weights read and cast
            model = load_weights(str(self._given), dtype=own, device_map=homes, offload_folder=scratch.name)
        name_parts(model.config, self._named)
        for parameter in model.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(self.dtype)
        self._offloaded = str(device), model.eval().requires_grad_(False), scratch
        return self._offloaded[1]

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


def config_facts(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration as plain values, without what says nothing of the computation: names, versions and the dtype."""
    content = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in content.items() if key not in ("_name_or_path", "transformers_version", "dtype")}


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the loading bar and warnings that transformers shows, here once a layer."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    offloading = logging.getLogger("accelerate.big_modeling")
    offloading_level = offloading.level
    offloading.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        offloading.setLevel(offloading_level)
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
