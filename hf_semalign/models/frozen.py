"""A frozen model, loaded whole or streamed from its files one decoder layer at a time."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_semalign.models.anatomy import Anatomy, Head, Parts, check_head, dissect, embedding_rows, name_parts
from hf_semalign.models.hooks import bypass, gives_tuples
from hf_semalign.models.loading import find_tokenizer, is_quantised, load_dtype, load_model, load_weights, quietly, skeleton
from hf_semalign.models.names import public_name, resolve_model

logger = logging.getLogger(__name__)


class FrozenModel:
    """A frozen model for inference. Weights are loaded when :meth:`model`, :meth:`layer` or :meth:`read_head` needs them.

    Args:
        model: a causal LM, a Hub id, a local folder or an embedded model.
        precision: precision of the run, see :func:`hf_semalign.models.loading.load_dtype`.
        parts: see :func:`hf_semalign.models.anatomy.name_parts`.
        weights: whether a folder must contain weights.

    Attributes:
        shape: the model on the meta device, or the model object that was given.
        name: Hub id, or the name of a folder.
        num_layers: number of decoder layers.
        width: channels of a hidden state.
        head_rows: rows of the head.
        embedding_rows: rows of the token embeddings.
        quantised: whether the weights are quantised; a quantised model cannot be streamed.
        dtype: dtype of the weights.

    Raises:
        ValueError: the method cannot use this model. Raised before any weight is loaded.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        precision: str | None = None,
        parts: Parts = None,
        weights: bool = True,
    ) -> None:
        model = resolve_model(model) if isinstance(model, (str, Path)) else model
        self._given = model
        self._precision = precision
        self._named = parts
        self._checked = False
        self._offloaded: tuple[str, PreTrainedModel, tempfile.TemporaryDirectory] | None = None
        shape = skeleton(model, parts, weights=weights) if isinstance(model, str) else load_model(model, parts=parts)
        self.shape = shape
        self.quantised = is_quantised(shape.config)
        self.embedding_rows = embedding_rows(shape)
        self.name = public_name(str(shape.name_or_path))
        anatomy = dissect(shape)
        self.num_layers = len(anatomy.layers)
        self.head_rows, self.width = anatomy.head_weight().shape
        self.dtype = load_dtype(model, precision) if isinstance(model, str) else shape.dtype
        self._model = None if isinstance(model, str) else shape

    @property
    def origin(self) -> str:
        """Folder or Hub id that the model was loaded from; empty if there is none."""
        return self._given if isinstance(self._given, str) else str(self._given.name_or_path)

    def model(self, device: torch.device | str) -> PreTrainedModel:
        """The whole model on a device, frozen and in evaluation mode. The first call loads it.

        Raises:
            ValueError: the source is a folder of signals, which has no weights.
        """
        self._need_weights()
        if self._model is None:
            logger.info("Loading the source %s", self.name)
            self._model = load_model(self._given, precision=self._precision, parts=self._named)
        self._move(device)
        self._check()
        return self._model.eval().requires_grad_(False)

    def rest(self) -> None:
        """Move the model to the CPU."""
        if self._model is not None:
            self._move("cpu")

    def _check(self) -> None:
        if self._model is not None and not self._checked:
            check_head(self._model)
            self._checked = True

    def _move(self, device: torch.device | str) -> None:
        if self._model is not None and not self.quantised:  # quantised weights stay on the device they were loaded to
            self._model.to(device)  # type: ignore[arg-type]

    def release(self) -> None:
        """Free a model that was loaded by name; move one that the caller passed in to the CPU."""
        if isinstance(self._given, str):
            self._model = self._offloaded = None
        self.rest()

    def read_head(self) -> Head:
        """The head on the CPU."""
        if self.quantised:
            self.model("cpu")  # packed weights cannot be read in parts
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

    @contextmanager
    def layer(self, index: int, device: torch.device | str) -> Iterator[Anatomy]:
        """Put one decoder layer on a device, together with the decoder's small modules and, for layer 0, the embeddings.

        For a folder or Hub id, weights are read from its safetensors files, each of them once in a pass over all layers. If
        transformers converts a checkpoint while loading, as for mixtures of experts, all of it is read for every layer. For a
        model in memory, the layer is moved to the device and back.
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
        """The tokenizer stored with the model, see :func:`hf_semalign.models.loading.find_tokenizer`."""
        return find_tokenizer(self._given if isinstance(self._given, str) else str(self._given.name_or_path))

    @cached_property
    def as_tuples(self) -> bool:
        """Whether its layers return tuples, see :func:`hf_semalign.models.hooks.gives_tuples`."""
        if self.quantised:
            self.model("cpu")
        if self._model is not None:
            anatomy = dissect(self._model)
            return gives_tuples(anatomy.decoder, anatomy.layers[0])
        with self.layer(0, "cpu") as anatomy:
            return gives_tuples(anatomy.decoder, anatomy.layers[0])

    @contextmanager
    def _partly_loaded(self, layer: int | None, device: torch.device | str) -> Iterator[PreTrainedModel]:
        """Load the weights of one layer, or of the head if ``layer`` is ``None``; all other large modules stay on disk."""
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
            for module, hook in hooks:  # accelerate's hooks would read the weights again in every forward pass
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
        """The model with its weights offloaded to disk, except for the decoder's small modules. Built once per device."""
        self._need_weights()
        if self._offloaded is not None and self._offloaded[0] == str(device):
            return self._offloaded[1]
        shape, anatomy = self.shape, dissect(self.shape)
        places = {id(module): path for path, module in shape.named_modules()}
        inner = places[id(anatomy.decoder)]
        homes: dict[str, str] = {  # modules outside the decoder, such as a vision tower
            path: "disk"
            for path, module in shape.named_modules()
            if not f"{path}.".startswith(f"{inner}.") and next(module.parameters(recurse=False), None) is not None
        }
        homes |= {f"{places[id(anatomy.layers)]}.{k}": "disk" for k in range(self.num_layers)}
        homes |= {
            f"{inner}.{name}": str(device) for name, part in anatomy.decoder.named_children() if part is not anatomy.layers
        }
        homes |= {places[id(part)]: "disk" for part in (shape.get_input_embeddings(), anatomy.head)}
        scratch = tempfile.TemporaryDirectory()  # holds weights that transformers converts while loading
        with quietly():
            own = load_dtype(str(self._given))  # with any other dtype, all weights would be read and cast
            model = load_weights(str(self._given), dtype=own, device_map=homes, offload_folder=scratch.name)
        name_parts(model.config, self._named)
        for parameter in model.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(self.dtype)
        self._offloaded = str(device), model.eval().requires_grad_(False), scratch
        return self._offloaded[1]

    def _need_weights(self) -> None:
        """Hook for subclasses: raise an error if there are no weights to load."""
