"""Where a causal language model keeps its decoder layers, its head and its LoRA modules.

The one place that knows architectures. It asks transformers first (``get_decoder``, ``get_output_embeddings``) and looks
at structure before names; what it cannot find can be named by hand (:func:`name_parts`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)
CausalLM = PreTrainedModel | PeftModel
PARTS = ("decoder", "layers", "head")
HEAD_TOLERANCE = 0.02  # relative: bfloat16 gives two products of the same numbers some 1e-3 apart

# FFN and attention modules that carry LoRA (method, section 6): up, down, value and output, or what a family fuses them into.
LORA_TARGETS: tuple[str, ...] = (
    "up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "w3", "input_linear",
    "down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "output_linear",
    "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv",
    "o_proj", "out_proj", "dense",
    "in_proj", "in_proj_qkvz", "linear_x", "linear_y", "linear_out",  # of blocks without attention
)  # fmt: skip


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
        """The head of some tokens only; the same memory where that is all of them in order."""
        if len(ids) == len(self.weight):
            return self
        ids = ids.to(self.weight.device)
        return self._replace(weight=self.weight[ids], bias=None if self.bias is None else self.bias[ids])

    def to(self, device: torch.device | str) -> Head:
        """The head on a device."""
        return self._replace(weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` to ``[..., V]``, in float32 or better."""
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
        weight: torch.Tensor = self.head.get_parameter("weight")
        bias: torch.Tensor | None = getattr(self.head, "bias", None)
        if not weight.is_floating_point():
            weight = dequantize_module_weight(self.head)
        if self.logit_scale != 1.0:
            weight, bias = weight * self.logit_scale, None if bias is None else bias * self.logit_scale
        return Head(weight.detach(), None if bias is None else bias.detach(), self.softcap)

    def head_weight(self) -> torch.Tensor:
        """Weight of :meth:`output_head`, ``[V, D]``: what the map between two spaces is made of."""
        return self.output_head().weight


def base_model(model: CausalLM) -> PreTrainedModel:
    """The transformers model inside a peft model, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def embedding_rows(model: PreTrainedModel) -> int:
    """Number of tokens that a model has embeddings for."""
    return len(cast(nn.Embedding, model.get_input_embeddings()).weight)


def name_parts(config: PretrainedConfig, parts: Mapping[str, str] | None) -> None:
    """Say by hand where the models of a configuration keep their parts; :func:`dissect` follows it, also after saving.

    Args:
        config: the model's configuration; gets a key ``semalign_parts``.
        parts: module paths of some of ``decoder``, ``layers`` and ``head``, as ``named_modules`` gives them; nothing to do
            without.

    Raises:
        ValueError: another key.
    """
    if not parts:
        return
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"Unknown parts {unknown} of a model: name some of {PARTS} by their module paths.")
    config.semalign_parts = dict(parts)


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
        raise ValueError(
            f"{name} has no output embeddings: SemAlign needs a causal LM (AutoModelForCausalLM), or the path of its head "
            "(settings source_parts and target_parts)."
        )
    decoder = named.get("decoder") or model.get_decoder()
    layers = named.get("layers") or _layers(decoder, name, getattr(config, "num_hidden_layers", None))
    width = head.get_parameter("weight").shape[1]
    if head.get_parameter("weight").is_floating_point() and width != config.hidden_size:
        raise ValueError(
            f"{name} has layers of {config.hidden_size} channels and a head of {width}: the map between spaces needs the same."
        )
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    return Anatomy(
        name,
        decoder,
        cast(nn.ModuleList, layers),
        head,
        logit_scale=scale / (getattr(config, "logits_scaling", None) or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None),
    )


def _module(model: nn.Module, part: str, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = [place for place, _ in model.named_modules() if place and place.count(".") < 2]
        raise ValueError(
            f"{type(model).__name__} has no module {path!r}, which was named as its {part}. It has {known}."
        ) from None


def _layers(decoder: nn.Module, name: str, expected: int | None) -> nn.ModuleList:
    lists = {path: child for path, child in decoder.named_children() if isinstance(child, nn.ModuleList)}
    found = [child for child in lists.values() if len(child) == expected]
    if len(found) != 1:
        raise ValueError(
            f"Hidden layers of {name} not found: looked in {type(decoder).__name__} for one ModuleList of {expected} "
            f"layers (config.num_hidden_layers) and found { ({path: len(child) for path, child in lists.items()}) }. Name "
            "the path of its layers by hand (settings source_parts and target_parts)."
        )
    return found[0]


@torch.no_grad()
def check_head(model: CausalLM) -> None:
    """Compare the model's logits for some tokens, each alone, with those of its head on its decoder's output.

    Raises:
        ValueError: they differ: the family does something to its logits that :class:`Head` does not know.
    """
    model, anatomy = base_model(model), dissect(model)
    ids = torch.arange(min(8, embedding_rows(model)), device=anatomy.device).unsqueeze(1)
    finals: list[Any] = []
    handle = anatomy.decoder.register_forward_hook(lambda module, args, output: finals.append(output[0]))
    was_training = model.training
    model.eval()
    try:
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    finally:
        handle.remove()
        model.train(was_training)
    ours = anatomy.output_head().logits(finals[0])
    off = ((ours - theirs).norm() / theirs.norm()).item()
    if not off < HEAD_TOLERANCE:
        raise ValueError(
            f"The logits of {anatomy.name} are not those of its head on its decoder's output (relative difference {off:.2g}): "
            "the family scales, shifts or caps them in a way that is not known here, and the KL would be wrong."
        )


def lora_targets(layers: nn.ModuleList, wanted: list[str] | None = None) -> list[str]:
    """Module names that get LoRA, in every layer at least one of them.

    Experts get none: their weights are fused tensors and see few tokens each. Nor does what fused kernels of state-space
    mixers read past their modules, which is all but the input projection.

    Args:
        layers: decoder layers of the target.
        wanted: names to use; by default those of ``LORA_TARGETS`` that occur.

    Raises:
        ValueError: a wanted name does not occur, or a layer has none; the message names the candidates.
    """
    candidates = [_candidates(layer) for layer in layers]
    everywhere = set().union(*candidates)
    chosen = [name for name in wanted or LORA_TARGETS if name in everywhere]
    bare = [index for index, names in enumerate(candidates) if not names.intersection(chosen)]
    missing = sorted(set(wanted or ()) - everywhere)
    if missing or bare:
        what = f"{missing} occur in no layer" if missing else f"none of {wanted or 'the known names'} in layers {bare}"
        raise ValueError(
            f"LoRA modules not found: {what}. Candidates: {sorted(everywhere)}. Set lora_targets to some of them, at "
            "least one for every layer."
        )
    if any(part == "experts" for layer in layers for path, _ in layer.named_modules() for part in path.split(".")):
        logger.warning("The target is a mixture of experts: LoRA goes on %s, and its experts stay as they are.", chosen)
    return chosen


def _candidates(layer: nn.Module) -> set[str]:
    names = set()
    for path, module in layer.named_modules():
        parent, _, name = path.rpartition(".")
        if isinstance(module, (nn.Linear, Conv1D)) and "experts" not in path.split("."):
            mixer = hasattr(layer.get_submodule(parent), "A_log")
            if not mixer or name.startswith("in_proj"):
                names.add(name)
    return names


def outside_lora(model: PreTrainedModel, layers: nn.ModuleList, names: list[str]) -> list[str]:
    """Paths of modules that bear a LoRA module's name and must not get LoRA: in experts, or not in a decoder layer at all."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    return [
        path
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in names and (id(module) not in inside or "experts" in path.split("."))
    ]
