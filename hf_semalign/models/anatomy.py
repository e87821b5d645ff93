"""Find the decoder, the layers and the head of a causal language model.

All knowledge of architectures is in this file. It uses transformers' ``get_decoder`` and ``get_output_embeddings`` first, and
prefers structure to names. If detection fails, users can name the parts (:func:`name_parts`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_semalign.errors import InputError
from hf_semalign.kinds import check_kinds

logger = logging.getLogger(__name__)
CausalLM = PreTrainedModel | PeftModel
Parts = Mapping[str, str] | str | None  # module path by part; a command line gives it as JSON
PARTS = ("decoder", "layers", "head")
HEAD_TOLERANCE = 1e-3  # relative error of the logits allowed for rounding in float32
HALF_TOLERANCE = 0.02  # the same in half precision and for quantised heads

POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|embed_position)$")  # learned position embeddings


class Head(NamedTuple):
    """Output head. Logits of a final hidden state are ``z = h W^T + b``, then ``c tanh(z / c)`` in families with a soft cap.

    Attributes:
        weight: ``W`` ``[V, D]``, with the family's logit scale folded in (Cohere, Granite, Falcon-H1).
        bias: ``b`` ``[V]`` (Phi, GPT-J), with the same scale.
        softcap: ``c`` (Gemma).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None

    def rows(self, ids: torch.Tensor) -> Head:
        """Select the rows of some tokens, given ascending ids. If these are all or the first rows, memory is shared."""
        count = len(ids)
        if count == len(self.weight):
            return self
        # Padded rows come last, so a slice leaves them out without copying the rest of the head.
        chosen: Any = slice(count) if torch.equal(ids, torch.arange(count, device=ids.device)) else ids.to(self.weight.device)
        return self._replace(weight=self.weight[chosen], bias=None if self.bias is None else self.bias[chosen])

    def begins(self, other: Head) -> bool:
        """Whether this head is a view of the first rows of another one."""
        return self.weight.data_ptr() == other.weight.data_ptr() and self.weight.stride() == other.weight.stride()

    def to(self, device: torch.device | str) -> Head:
        """The head on a device."""
        return self._replace(weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits, ``[..., D]`` to ``[..., V]``: the product in the states' dtype, the rest in float32 or better."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = F.linear(hidden, self.weight.to(hidden.dtype), bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model.

    Attributes:
        name: name of the model's class, for messages.
        decoder: the model without its head; the first item of its output is the final hidden state, after the last
            norm, ``[B, T, D]``.
        layers: decoder layers, shallow to deep.
        head: output embeddings, ``weight`` ``[V, D]``.
        logit_scale: factor on the logits; 1 in most families.
        softcap: soft cap of the logits, if the family has one.
    """

    name: str
    decoder: nn.Module
    layers: nn.ModuleList
    head: nn.Module
    logit_scale: float
    softcap: float | None

    @property
    def device(self) -> torch.device:
        """Device of the head, and so of the token ids."""
        return self.head.get_parameter("weight").device

    def output_head(self) -> Head:
        """The head as detached tensors, dequantised if necessary, with the logit scale folded in."""
        weight: torch.Tensor = dequantize_module_weight(self.head)
        bias: torch.Tensor | None = getattr(self.head, "bias", None)
        if self.logit_scale != 1.0:
            weight, bias = weight * self.logit_scale, None if bias is None else bias * self.logit_scale
        return Head(weight.detach(), None if bias is None else bias.detach(), self.softcap)

    def head_weight(self) -> torch.Tensor:
        """Weight of :meth:`output_head`, ``[V, D]``; the semantic map is built from it."""
        return self.output_head().weight


@dataclass(frozen=True)
class Size:
    """Number of weights that a forward pass uses.

    Attributes:
        layers: number of decoder layers.
        layer: mean number of weights in a layer; of the experts, only the share that a token is routed to counts.
        head: number of weights in the head.
        width: channels of a hidden state.
        parameters: number of all weights.
        outputs: mean number of output channels of all weight matrices of a layer; experts count as above.
        bytes: bytes per weight as stored.
    """

    layers: int
    layer: float
    head: int
    width: int
    parameters: int
    outputs: float
    bytes: int

    @staticmethod
    def of(anatomy: Anatomy) -> Size:
        """Size of a model. The model may be on the meta device."""
        config: Any = getattr(anatomy.decoder, "config", None)
        experts = _setting(config, "num_local_experts", "num_experts") or 1
        share = (_setting(config, "num_experts_per_tok") or experts) / experts
        used = [(p, share if "experts" in path.split(".") else 1) for path, p in anatomy.layers.named_parameters()]
        layers = sum(p.numel() * part for p, part in used)
        outputs = sum(p.numel() / p.shape[-1] * part for p, part in used if p.dim() > 1)
        weight = anatomy.head.get_parameter("weight")
        everything = {id(p): p.numel() for p in (*anatomy.decoder.parameters(), *anatomy.head.parameters())}
        depth, (rows, width) = len(anatomy.layers), anatomy.head_weight().shape
        return Size(
            depth, layers / depth, rows * width, width, sum(everything.values()), outputs / depth, weight.element_size()
        )

    def forward(self, tokens: float, valid: float = 0, layers: float | None = None) -> float:
        """Multiplications of a forward pass.

        Args:
            tokens: tokens that go through the layers.
            valid: tokens that go through the head.
            layers: layers to count; all by default.
        """
        return tokens * self.layer * (self.layers if layers is None else layers) + valid * self.head


def base_model(model: CausalLM) -> PreTrainedModel:
    """The transformers model inside a peft model, or the model itself.

    Raises:
        ValueError: ``model`` is neither.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise InputError(f"The model is a {type(model).__name__}: expected a transformers causal LM, or its name.")
    return base


def embedding_rows(model: PreTrainedModel) -> int:
    """Number of rows of a model's token embeddings."""
    return len(cast(nn.Embedding, model.get_input_embeddings()).weight)


def position_limit(model: PreTrainedModel) -> int | None:
    """Number of positions that a model has learned embeddings for; ``None`` for other kinds of position encoding."""
    given = model.get_input_embeddings()
    tables = [
        module
        for name, module in dissect(model).decoder.named_modules()
        if isinstance(module, nn.Embedding) and module is not given and POSITIONS.search(name)
    ]
    return min((table.num_embeddings - getattr(table, "offset", 0) for table in tables), default=None)


def name_parts(config: PretrainedConfig, parts: Parts) -> None:
    """Name a model's parts by hand. :func:`dissect` reads the names from the config, also after the model has been saved.

    Args:
        config: the model's configuration; a key ``semalign_parts`` is added to it.
        parts: module paths of some of ``decoder``, ``layers`` and ``head``, as in ``named_modules``; if empty, nothing happens.

    Raises:
        ValueError: a key is unknown, or ``parts`` is not a mapping.
    """
    if not parts:
        return
    try:
        parts = json.loads(parts) if isinstance(parts, str) else dict(parts)
        check_kinds(parts, dict[str, str])
    except (TypeError, ValueError) as error:
        raise InputError(f"The parts {parts!r} are not a mapping: expected module paths for {PARTS}.") from error
    if unknown := sorted(set(parts) - set(PARTS)):
        raise InputError(f"Unknown parts {unknown} of a model: give module paths for some of {PARTS}.")
    config.semalign_parts = parts


def dissect(model: CausalLM) -> Anatomy:
    """Find the parts of a causal language model.

    Args:
        model: a transformers causal LM, bare or inside a peft model.

    Raises:
        ValueError: there is no head, no list of ``num_hidden_layers`` decoder layers, or a part named by hand does not exist,
            or head and layers differ in width.
    """
    model = base_model(model)
    name, config = type(model).__name__, model.config.get_text_config()
    named = {part: _module(model, part, path) for part, path in (getattr(model.config, "semalign_parts", None) or {}).items()}
    head = named.get("head") or model.get_output_embeddings()
    if head is None:
        raise InputError(
            f"{name} has no output embeddings: SemAlign needs a causal LM (AutoModelForCausalLM), or the path of its head in "
            "source_parts or target_parts."
        )
    decoder = named.get("decoder") or model.get_decoder()
    if decoder is model:
        raise InputError(
            f"The decoder of {name} was not found: set its path (the module that ends with the final norm) and the path of its "
            "layers in source_parts or target_parts."
        )
    layers = named["layers"] if "layers" in named else _layers(decoder, name, getattr(config, "num_hidden_layers", None))
    if not isinstance(layers, nn.ModuleList) or all(layers is not part for part in decoder.modules()):
        raise InputError(
            f"The layers of {name} are a {type(layers).__name__}: expected a ModuleList inside its {type(decoder).__name__}. "
            "Set its path in source_parts or target_parts."
        )
    if len(getattr(getattr(head, "weight", None), "shape", ())) != 2:
        raise InputError(
            f"The head of {name} is a {type(head).__name__}: expected a linear layer with a weight [V, D]. Set its path in "
            "source_parts or target_parts."
        )
    scale = _setting(config, "logit_scale", "lm_head_multiplier") or 1.0
    scale /= _setting(config, "logits_scaling") or 1.0
    softcap = _setting(config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    width = getattr(head, "in_features", None) or head.get_parameter("weight").shape[1]  # packed weights have another shape
    if width != config.hidden_size:
        raise InputError(
            f"{name} has layers of {config.hidden_size} channels and a head of {width}: the semantic map needs equal widths."
        )
    return Anatomy(name, decoder, cast(nn.ModuleList, layers), head, scale, softcap)


def _setting(config: PretrainedConfig, *names: str) -> float | None:
    """Value of the first of these settings that a configuration has."""
    return next((getattr(config, name) for name in names if getattr(config, name, None)), None)


def _module(model: nn.Module, part: str, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = [place for place, _ in model.named_modules() if place and place.count(".") < 2]
        raise InputError(
            f"{type(model).__name__} has no module {path!r}, which was given as its {part}. It has {known}."
        ) from None


def _layers(decoder: nn.Module, name: str, expected: int | None) -> nn.ModuleList:
    lists = {path: child for path, child in decoder.named_children() if isinstance(child, nn.ModuleList)}
    found = [child for child in lists.values() if len(child) == expected]
    if len(found) != 1:
        raise InputError(
            f"Hidden layers of {name} not found: looked in {type(decoder).__name__} for one ModuleList of {expected} "
            f"layers (config.num_hidden_layers) and found { ({path: len(child) for path, child in lists.items()}) }. Set "
            "the path of its layers in source_parts or target_parts."
        )
    return found[0]


@torch.no_grad()
def check_head(model: CausalLM, embeds: torch.Tensor | None = None) -> None:
    """Check that :class:`Head` reproduces the model's logits, on a few sequences of one token.

    Args:
        model: a causal LM; its training mode is restored.
        embeds: input embeddings ``[B, 1, D]``; by default, the first tokens of the vocabulary are used.

    Raises:
        ValueError: the logits differ, because the family changes them in a way that :class:`Head` does not know; or they are
            not finite; or the layers' states do not have ``hidden_size`` channels.
    """
    model, anatomy = base_model(model), dissect(model)
    given = torch.arange(min(8, embedding_rows(model)), device=anatomy.device).unsqueeze(1) if embeds is None else embeds
    mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
    inputs = {"input_ids" if embeds is None else "inputs_embeds": given, "attention_mask": mask}
    finals: list[Any] = []
    watched = (anatomy.layers[0], anatomy.decoder)
    handles = [part.register_forward_hook(lambda module, args, output: finals.append(output)) for part in watched]
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(given.device.type, enabled=False):  # autocast would round the two sides differently
            theirs = model(**inputs, use_cache=False).logits.float()
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    states, final = (output if isinstance(output, torch.Tensor) else output[0] for output in (finals[0], finals[-1]))
    if states.shape != (*mask.shape, model.config.get_text_config().hidden_size):
        raise InputError(
            f"The layers of {anatomy.name} return states of shape {tuple(states.shape)} for {tuple(mask.shape)} tokens: "
            "expected [B, T, hidden_size]."
        )
    if not theirs.isfinite().all():
        raise InputError(
            f"The logits of {anatomy.name} {model.name_or_path!r} are not finite: its weights contain nan or inf, or overflow "
            f"in {model.dtype}. Copy or download them again, or load them in another dtype."
        )
    with torch.autocast(given.device.type, enabled=False):
        off = ((anatomy.output_head().logits(final) - theirs).norm() / theirs.norm()).item()
    full = anatomy.head.get_parameter("weight").dtype in (torch.float32, torch.float64)
    if not off < (HEAD_TOLERANCE if full else HALF_TOLERANCE):
        raise InputError(
            f"The logits of {anatomy.name} differ from its head applied to its decoder's output (relative difference "
            f"{off:.2g}): this family scales, shifts or caps them in an unknown way, and the KL would be wrong."
        )


def final_norm(anatomy: Anatomy) -> nn.Module:
    """The norm between the last layer and the head: the last child of the decoder with one weight per channel.

    Raises:
        ValueError: the decoder has no such child.
    """
    width = anatomy.head.get_parameter("weight").shape[-1]
    shapes = {part: getattr(getattr(part, "weight", None), "shape", None) for part in anatomy.decoder.children()}
    norms = [part for part, shape in shapes.items() if shape == (width,)]
    if not norms:
        raise InputError(f"The final norm of {anatomy.name} was not found: expected a decoder module with {width} weights.")
    return norms[-1]
