"""Where a causal language model keeps its decoder layers, its head and its LoRA modules.

The one place that knows architectures. It asks transformers first (``get_decoder``, ``get_output_embeddings``) and looks
at structure before names; what it cannot find can be named by hand (:func:`name_parts`).
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
Parts = Mapping[str, str] | str | None  # module paths by part, as JSON from a command line
PARTS = ("decoder", "layers", "head")
HEAD_TOLERANCE = 1e-3  # relative error of logits that rounding makes in float32
HALF_TOLERANCE = 0.02  # and in half precisions, and from quantised heads

POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|embed_position)$")  # tables of learned positions


class Head(NamedTuple):
    """What makes logits of a final hidden state: ``z = h W^T + b``, then ``c tanh(z / c)`` where the family caps them.

    Attributes:
        weight: ``W`` ``[V, D]``, with the family's factor on the logits folded in (Cohere, Granite, Falcon-H1).
        bias: ``b`` ``[V]`` (Phi, GPT-J), with the same factor.
        softcap: ``c`` (Gemma).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None

    def rows(self, ids: torch.Tensor) -> Head:
        """The head of some tokens only, by ascending ids; the same memory where these are all or the first ones."""
        count = len(ids)
        if count == len(self.weight):
            return self
        # The rows behind a padded vocabulary come last, and a copy of all others would take as much memory as the head.
        chosen: Any = slice(count) if torch.equal(ids, torch.arange(count, device=ids.device)) else ids.to(self.weight.device)
        return self._replace(weight=self.weight[chosen], bias=None if self.bias is None else self.bias[chosen])

    def begins(self, other: Head) -> bool:
        """Whether these are the first rows of another head, in the same memory."""
        return self.weight.data_ptr() == other.weight.data_ptr() and self.weight.stride() == other.weight.stride()

    def to(self, device: torch.device | str) -> Head:
        """The head on a device."""
        return self._replace(weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` to ``[..., V]``: a product in the states' dtype, in float32 or better from there on."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = F.linear(hidden, self.weight.to(hidden.dtype), bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model.

    Attributes:
        name: of the model's class, for messages.
        decoder: the model without its head; the first item of its output is the final hidden state, after the last
            norm, ``[B, T, D]``.
        layers: decoder layers, shallow to deep.
        head: output embeddings, ``weight`` ``[V, D]``.
        logit_scale: factor on the logits; 1 in most families.
        softcap: bound of the logits, where the family has one.
    """

    name: str
    decoder: nn.Module
    layers: nn.ModuleList
    head: nn.Module
    logit_scale: float
    softcap: float | None

    @property
    def device(self) -> torch.device:
        """Where the head is, and so where token ids go."""
        return self.head.get_parameter("weight").device

    def output_head(self) -> Head:
        """The head as tensors, detached, dequantised where it has to be, with the logit scale folded in."""
        weight: torch.Tensor = dequantize_module_weight(self.head)
        bias: torch.Tensor | None = getattr(self.head, "bias", None)
        if self.logit_scale != 1.0:
            weight, bias = weight * self.logit_scale, None if bias is None else bias * self.logit_scale
        return Head(weight.detach(), None if bias is None else bias.detach(), self.softcap)

    def head_weight(self) -> torch.Tensor:
        """Weight of :meth:`output_head`, ``[V, D]``: what the map between two spaces is made of."""
        return self.output_head().weight


@dataclass(frozen=True)
class Size:
    """What a forward multiplies with.

    Attributes:
        layers: decoder layers.
        layer: weights of one of them, on average; of experts, those that a token is sent to.
        head: weights of the head.
        width: channels of a state.
        parameters: all weights of the model.
        outputs: channels that the weights of a layer give, all together; of experts, likewise.
        bytes: of one weight, as the model is stored.
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
        """The size of a model, with or without weights."""
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
        """Multiplications of a forward over some tokens through all layers, or so many, and through the head at valid ones."""
        return tokens * self.layer * (self.layers if layers is None else layers) + valid * self.head


def base_model(model: CausalLM) -> PreTrainedModel:
    """The transformers model inside a peft model, or the model itself.

    Raises:
        ValueError: neither.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise InputError(f"The model is a {type(model).__name__}: expected a causal LM of transformers, or its name.")
    return base


def embedding_rows(model: PreTrainedModel) -> int:
    """Number of tokens that a model has embeddings for."""
    return len(cast(nn.Embedding, model.get_input_embeddings()).weight)


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions a model has embeddings for; ``None`` where positions are not learned one by one."""
    given = model.get_input_embeddings()
    tables = [
        module
        for name, module in dissect(model).decoder.named_modules()
        if isinstance(module, nn.Embedding) and module is not given and POSITIONS.search(name)
    ]
    return min((table.num_embeddings - getattr(table, "offset", 0) for table in tables), default=None)


def name_parts(config: PretrainedConfig, parts: Parts) -> None:
    """Say by hand where the models of a configuration keep their parts; :func:`dissect` follows it, also after saving.

    Args:
        config: the model's configuration; gets a key ``semalign_parts``.
        parts: module paths of some of ``decoder``, ``layers`` and ``head``, as ``named_modules`` gives them; nothing to do
            without.

    Raises:
        ValueError: another key, or no keys.
    """
    if not parts:
        return
    try:
        parts = json.loads(parts) if isinstance(parts, str) else dict(parts)
        check_kinds(parts, dict[str, str])
    except (TypeError, ValueError) as error:
        raise InputError(f"The parts {parts!r} of a model are no keys and values: expected module paths by {PARTS}.") from error
    if unknown := sorted(set(parts) - set(PARTS)):
        raise InputError(f"Unknown parts {unknown} of a model: name some of {PARTS} by their module paths.")
    config.semalign_parts = parts


def dissect(model: CausalLM) -> Anatomy:
    """Find the parts of a causal language model.

    Args:
        model: a transformers causal LM, bare or inside a peft model.

    Raises:
        ValueError: no head, no list of decoder layers of the announced length, a part that was named by hand and does not
            exist, or a head of another width than the layers.
    """
    model = base_model(model)
    name, config = type(model).__name__, model.config.get_text_config()
    named = {part: _module(model, part, path) for part, path in (getattr(model.config, "semalign_parts", None) or {}).items()}
    head = named.get("head") or model.get_output_embeddings()
    if head is None:
        raise InputError(
            f"{name} has no output embeddings: SemAlign needs a causal LM (AutoModelForCausalLM), or the path of its head "
            "(settings source_parts and target_parts)."
        )
    decoder = named.get("decoder") or model.get_decoder()
    if decoder is model:
        raise InputError(
            f"The decoder of {name} is not found: name the path of the part that ends with its final norm, and that of its "
            "layers, by hand (settings source_parts and target_parts)."
        )
    layers = named["layers"] if "layers" in named else _layers(decoder, name, getattr(config, "num_hidden_layers", None))
    if not isinstance(layers, nn.ModuleList) or all(layers is not part for part in decoder.modules()):
        raise InputError(
            f"The layers of {name} are a {type(layers).__name__}: expected the ModuleList of its {type(decoder).__name__} "
            "(settings source_parts and target_parts)."
        )
    if len(getattr(getattr(head, "weight", None), "shape", ())) != 2:
        raise InputError(
            f"The head of {name} is a {type(head).__name__}: expected a linear layer, with a weight of [V, D] (settings "
            "source_parts and target_parts)."
        )
    scale = _setting(config, "logit_scale", "lm_head_multiplier") or 1.0
    scale /= _setting(config, "logits_scaling") or 1.0
    softcap = _setting(config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    width = getattr(head, "in_features", None) or head.get_parameter("weight").shape[1]  # packed weights have other shapes
    if width != config.hidden_size:
        raise InputError(
            f"{name} has layers of {config.hidden_size} channels and a head of {width}: the map between spaces needs the same."
        )
    return Anatomy(name, decoder, cast(nn.ModuleList, layers), head, scale, softcap)


def _setting(config: PretrainedConfig, *names: str) -> float | None:
    """The first of some settings that a configuration has."""
    return next((getattr(config, name) for name in names if getattr(config, name, None)), None)


def _module(model: nn.Module, part: str, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = [place for place, _ in model.named_modules() if place and place.count(".") < 2]
        raise InputError(
            f"{type(model).__name__} has no module {path!r}, which was named as its {part}. It has {known}."
        ) from None


def _layers(decoder: nn.Module, name: str, expected: int | None) -> nn.ModuleList:
    lists = {path: child for path, child in decoder.named_children() if isinstance(child, nn.ModuleList)}
    found = [child for child in lists.values() if len(child) == expected]
    if len(found) != 1:
        raise InputError(
            f"Hidden layers of {name} not found: looked in {type(decoder).__name__} for one ModuleList of {expected} "
            f"layers (config.num_hidden_layers) and found { ({path: len(child) for path, child in lists.items()}) }. Name "
            "the path of its layers by hand (settings source_parts and target_parts)."
        )
    return found[0]


@torch.no_grad()
def check_head(model: CausalLM, embeds: torch.Tensor | None = None) -> None:
    """Compare the model's logits for some tokens, each alone, with those of its head on its decoder's output.

    Args:
        model: a causal LM; its mode is restored.
        embeds: what to enter with instead of the first tokens of the vocabulary, ``[B, 1, D]``.

    Raises:
        ValueError: they differ: the family does something to its logits that :class:`Head` does not know; or its layers give
            no states of the announced width.
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
        with torch.autocast(given.device.type, enabled=False):  # it would round both, and not alike
            theirs = model(**inputs, use_cache=False).logits.float()
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    states, final = (output if isinstance(output, torch.Tensor) else output[0] for output in (finals[0], finals[-1]))
    if states.shape != (*mask.shape, model.config.get_text_config().hidden_size):
        raise InputError(
            f"The layers of {anatomy.name} give states of shape {tuple(states.shape)} for {tuple(mask.shape)} tokens: expected "
            "one stream of hidden_size channels."
        )
    if not theirs.isfinite().all():
        raise InputError(
            f"The logits of {anatomy.name} {model.name_or_path!r} are not finite: its weights hold nan or inf, or overflow in "
            f"{model.dtype}. Copy or download them again, or load them in another dtype."
        )
    with torch.autocast(given.device.type, enabled=False):
        off = ((anatomy.output_head().logits(final) - theirs).norm() / theirs.norm()).item()
    full = anatomy.head.get_parameter("weight").dtype in (torch.float32, torch.float64)
    if not off < (HEAD_TOLERANCE if full else HALF_TOLERANCE):
        raise InputError(
            f"The logits of {anatomy.name} are not those of its head on its decoder's output (relative difference {off:.2g}): "
            "the family scales, shifts or caps them in a way that is not known here, and the KL would be wrong."
        )


def final_norm(anatomy: Anatomy) -> nn.Module:
    """The norm between the last layer and the head: the last part of the decoder with one weight a channel.

    Raises:
        ValueError: there is none.
    """
    width = anatomy.head.get_parameter("weight").shape[-1]
    shapes = {part: getattr(getattr(part, "weight", None), "shape", None) for part in anatomy.decoder.children()}
    norms = [part for part, shape in shapes.items() if shape == (width,)]
    if not norms:
        raise InputError(f"The final norm of {anatomy.name} is not found: expected a part of its decoder of {width} weights.")
    return norms[-1]
