"""Static attribution of value neurons (Yu and Ananiadou 2024): how much each neuron adds to a token's log-probability.

A score is about one token ``t`` and the position before it. States are read out through the head with the final norm's scale
fixed to its value at that position, so the readout is affine in the state: the logits of ``h + m_j w_j`` are those of ``h``
plus ``m_j W_U (g w_j) rsqrt(ms + eps)``. One forward pass is enough for all neurons.
"""

from __future__ import annotations

import string
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_semalign.errors import InputError
from hf_semalign.models.anatomy import (
    HALF_TOLERANCE,
    HEAD_TOLERANCE,
    Anatomy,
    CausalLM,
    base_model,
    dissect,
    embedding_rows,
    final_norm,
)
from hf_semalign.models.hooks import capture
from hf_semalign.tokenization import IGNORED, Record

LOGITS_AT_ONCE = 2**24  # most logits in memory at a time
TRAILING = string.whitespace + '.")],'  # characters that LaTen's code strips from the end of an answer


@dataclass(frozen=True)
class Readout:
    """Logits as an affine function of the state, with the final norm's scale fixed to its value at one position.

    Attributes:
        weight: ``W_U diag(g)`` ``[V, D]``, where ``g`` is the gain of the final norm.
        bias: ``[V]``, from the biases of the norm and the head, if any.
        scale: the scale of the norm, a scalar.
        centred: whether the norm subtracts the mean over the channels (LayerNorm).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor
    centred: bool

    def linear(self, states: torch.Tensor) -> torch.Tensor:
        """The linear part: what states add to the logits, from ``[..., D]`` to ``[..., V]``."""
        if self.centred:
            states = states - states.mean(-1, keepdim=True)
        return (states * self.scale) @ self.weight.T

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of states, from ``[..., D]`` to ``[..., V]``."""
        logits = self.linear(states)
        return logits if self.bias is None else logits + self.bias


class Unembedding:
    """Head and final norm of a model in float32.

    Raises:
        ValueError: the norm or the head is not affine for a fixed scale.
    """

    def __init__(self, model: CausalLM) -> None:
        anatomy = dissect(model)
        norm = final_norm(anatomy)
        eps: Any = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        head = anatomy.output_head()
        if eps is None or head.softcap is not None:
            what = "its final norm has no epsilon" if eps is None else "its logits are capped"
            raise InputError(f"Neurons of {anatomy.name} cannot be scored: {what}. Expected RMSNorm or LayerNorm, and a head.")
        self.eps = float(eps)
        self.centred = isinstance(norm, nn.LayerNorm)
        unembed = head.weight.float()
        shift = getattr(norm, "bias", None)
        biases = [] if shift is None else [unembed @ shift.detach().float()]
        biases += [] if head.bias is None else [head.bias.float()]
        self.weight = unembed * norm.get_parameter("weight").detach().float()
        self.bias = torch.stack(biases).sum(0) if biases else None

    def at(self, final: torch.Tensor) -> Readout:
        """The readout at a position with the last layer's output ``final`` ``[D]``, or at ``B`` positions ``[B, D]``."""
        spread = final - final.mean(-1, keepdim=True) if self.centred else final
        scale = torch.rsqrt(spread.square().mean(-1, keepdim=True) + self.eps)
        return Readout(self.weight, self.bias, scale, self.centred)


@dataclass(frozen=True)
class Trace:
    """The states of a model at the last position of ``B`` inputs, in float32.

    Attributes:
        entering: inputs of the layers, ``[L, B, D]``.
        attention: outputs of their attention, ``[L, B, D]``.
        ffn: outputs of their FFN, ``[L, B, D]``.
        heads: attention neurons, ``[L, B, H d_h]``. For head ``h`` and dimension ``e``, this is the sum of ``alpha_p v_{p,e}``
            over key positions ``p``.
        activations: FFN neurons ``m``, ``[L, B, D_ff]``, times their gate if there is one.
        leaving: outputs of the layers, ``[L, B, D]``.
        normed: output of the final norm, ``[B, D]``.
    """

    entering: torch.Tensor
    attention: torch.Tensor
    ffn: torch.Tensor
    heads: torch.Tensor
    activations: torch.Tensor
    leaving: torch.Tensor
    normed: torch.Tensor


@torch.no_grad()
def trace(model: CausalLM, input_ids: torch.Tensor) -> Trace:
    """Run one forward pass over ``[B, T]`` token ids without padding, in the model's dtype, and record the states."""
    anatomy = dissect(model)
    _, parts = neuron_parts(anatomy)
    ids, depth = input_ids.to(anatomy.device), len(parts)
    modules = [*anatomy.layers, *(part.output for part in parts), *(part.down for part in parts)]
    with capture(modules) as found:
        normed = anatomy.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
    inputs = [state.input[:, -1].float() for state in found]
    outputs = [state.output[:, -1].float() for state in found]
    layers, attention, ffn = slice(depth), slice(depth, 2 * depth), slice(2 * depth, None)
    return Trace(
        entering=torch.stack(inputs[layers]),
        attention=torch.stack(outputs[attention]),
        ffn=torch.stack(outputs[ffn]),
        heads=torch.stack(inputs[attention]),
        activations=torch.stack(inputs[ffn]),
        leaving=torch.stack(outputs[layers]),
        normed=normed[:, -1].float(),
    )


def check_neurons(model: CausalLM) -> None:
    """Check on some single-token inputs that a model uses its neurons as this module assumes.

    With one key position, an attention neuron equals the output of its value row. A layer's output is its input plus the
    outputs of attention and FFN. The readout of the last layer's output gives the model's logits.

    Args:
        model: a causal LM. Its training mode is restored.

    Raises:
        ValueError: the module names are unknown, or an assumption does not hold.
    """
    anatomy = dissect(model)
    _, parts = neuron_parts(anatomy)
    unembedding = Unembedding(model)
    ids = torch.arange(min(8, embedding_rows(base_model(model)))).unsqueeze(1)
    was_training = model.training
    model.eval()
    with capture([part.value for part in parts]) as values:
        found = trace(model, ids)
    model.train(was_training)
    rows = [state.output[:, -1][:, part.value_rows].float() for state, part in zip(values, parts, strict=True)]
    pairs = {
        "attention is not the sum of its heads' values": (found.heads, torch.stack(rows)),
        "a layer does not add attention and FFN to its input": (
            found.entering + found.attention + found.ffn,
            found.leaving,
        ),
        "the logits are not those of head and norm": (
            unembedding.at(found.leaving[-1]).logits(found.leaving[-1]),
            anatomy.output_head().logits(found.normed),
        ),
    }
    full = anatomy.head.get_parameter("weight").dtype in (torch.float32, torch.float64)
    for what, (ours, theirs) in pairs.items():
        off = ((ours - theirs).norm() / theirs.norm()).item()
        if not off < (HEAD_TOLERANCE if full else HALF_TOLERANCE):
            raise InputError(
                f"Neurons of {anatomy.name} cannot be scored: {what} (relative difference {off:.2g}). Supported models: Llama, "
                "Mistral, Qwen2, Qwen3, GPT-NeoX."
            )


def addition_scores(readout: Readout, before: torch.Tensor, added: torch.Tensor, label: int) -> torch.Tensor:
    """``log p(t | before + added) - log p(t | before)`` of each layer, from two ``[L, D]`` to ``[L]``."""
    logits = readout.logits(torch.stack((before, before + added)))
    log_probability = logits[..., label] - logits.logsumexp(-1)
    return log_probability[1] - log_probability[0]


def neuron_scores(
    readout: Readout, before: torch.Tensor, values: torch.Tensor, columns: torch.Tensor, label: int, chunk: int = LOGITS_AT_ONCE
) -> torch.Tensor:
    """``log p(t | before + m_j w_j) - log p(t | before)`` of each neuron.

    Args:
        readout: see :class:`Readout`.
        before: ``[D]``.
        values: ``m`` ``[n]``.
        columns: ``w`` ``[D, n]``, the columns of an output weight.
        label: ``t``.
        chunk: most logits in memory at a time.

    Returns:
        ``[n]`` float32.
    """
    base = readout.logits(before)
    origin = base[label] - base.logsumexp(-1)
    rows = max(1, chunk // len(base))
    scores = []
    for some, weights in zip(values.split(rows), columns.split(rows, dim=1), strict=True):
        logits = base + readout.linear(weights.float().T * some.unsqueeze(1))
        scores.append(logits[:, label] - logits.logsumexp(-1) - origin)
    return torch.cat(scores)


class Located(NamedTuple):
    """The layers and neurons of one model that matter for one token.

    Attributes:
        attention_layers: ``L`` layers, ascending.
        ffn_layers: ``L`` layers, ascending.
        attention: indices ``[L, n]`` of attention neurons, best first, see :class:`NeuronParts`.
        ffn: indices ``[L, n]`` of FFN neurons, best first.
    """

    attention_layers: list[int]
    ffn_layers: list[int]
    attention: torch.Tensor
    ffn: torch.Tensor


@torch.no_grad()
def locate(
    model: CausalLM, unembedding: Unembedding, input_ids: torch.Tensor, label: int, *, layers: int, attention: int, ffn: int
) -> Located:
    """Find the layers that add most to a token's log-probability, and the neurons in them that add most.

    Attention is scored relative to the layer's input, and the FFN relative to the input plus attention. This also holds for
    models that compute both from the same input, so that the scores of all layers add up to the total log-probability added.

    Args:
        model: a causal LM in evaluation mode.
        unembedding: the model's unembedding.
        input_ids: ``[T]``, the tokens before the token.
        label: the token.
        layers: number of attention layers to keep, and of FFN layers.
        attention: attention neurons to keep per layer.
        ffn: FFN neurons to keep per layer.
    """
    _, parts = neuron_parts(dissect(model))
    found = trace(model, input_ids.unsqueeze(0))
    entering, middle = found.entering[:, 0], found.entering[:, 0] + found.attention[:, 0]
    readout = unembedding.at(found.leaving[-1, 0])
    attention_layers = top_layers(addition_scores(readout, entering, found.attention[:, 0], label), layers)
    ffn_layers = top_layers(addition_scores(readout, middle, found.ffn[:, 0], label), layers)
    heads = [
        neuron_scores(readout, entering[k], found.heads[k, 0], parts[k].output.get_parameter("weight"), label)
        for k in attention_layers
    ]
    activations = [
        neuron_scores(readout, middle[k], found.activations[k, 0], parts[k].down.get_parameter("weight"), label)
        for k in ffn_layers
    ]
    return Located(attention_layers, ffn_layers, top_neurons(heads, attention), top_neurons(activations, ffn))


def top_layers(scores: torch.Tensor, count: int) -> list[int]:
    """The layers with the highest scores, in ascending order of layers."""
    return sorted(scores.sort(descending=True, stable=True).indices[:count].tolist())


def top_neurons(scores: list[torch.Tensor], count: int) -> torch.Tensor:
    """The neurons with the highest scores in each layer, best first, as ``[L, count]`` on the CPU."""
    return torch.stack([some.sort(descending=True, stable=True).indices[:count] for some in scores]).cpu()


def answer_label(row: Record, tokenizer: PreTrainedTokenizerBase | None, specials: Collection[int]) -> int:
    """Position of the token for which neurons are located: the last label with content.

    Special tokens have no content. Nor do tokens of only white space and the punctuation that LaTen's code strips from the end
    of an answer (``TRAILING``). The tokens before the position are the input.

    Args:
        row: ``input_ids`` and ``labels``.
        tokenizer: decodes tokens. Without one, only special tokens are skipped.
        specials: ids of special tokens.

    Raises:
        ValueError: the row has no such token.
    """
    labels = list(row["labels"])
    for position in range(len(labels) - 1, 0, -1):
        token = labels[position]
        if token == IGNORED or token in specials:
            continue
        if tokenizer is None or str(tokenizer.decode([token])).strip(TRAILING):
            return position
    raise InputError(
        f"The answer of the row with input_ids {list(row['input_ids'])[:20]} has only special tokens and punctuation, so it "
        "cannot be used to locate neurons: remove this row from the extract split."
    )


# Names of attention's value and output and FFN's up and down. Their rows and columns are a layer's neurons.
NEURON_MODULES: tuple[tuple[str, str, str, str], ...] = (
    ("v_proj", "o_proj", "up_proj", "down_proj"),  # Llama, Mistral, Qwen2, Qwen3
    ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX
)


@dataclass(frozen=True)
class NeuronParts:
    """The modules with the neurons of one decoder layer.

    FFN neuron ``j`` is row ``j`` of ``up`` and column ``j`` of ``down``, with or without a gate. Attention neuron ``h d_h + e``
    (query head ``h``, dimension ``e`` of ``d_h``) is that column of ``output``, and row ``value_rows[h d_h + e]`` of ``value``.
    With grouped queries, the heads of a group share rows. In a fused query-key-value module, the index is that of the fused
    row.

    Attributes:
        value: ``[rows, D]``.
        output: ``[D, H d_h]``.
        up: ``[D_ff, D]``.
        down: ``[D, D_ff]``.
        value_rows: ``[H d_h]``.
    """

    value: nn.Module
    output: nn.Module
    up: nn.Module
    down: nn.Module
    value_rows: torch.Tensor


def neuron_parts(anatomy: Anatomy) -> tuple[tuple[str, str, str, str], list[NeuronParts]]:
    """Find the modules with a model's neurons by name and shape. :func:`check_neurons` checks what they compute.

    Args:
        anatomy: anatomy of a causal LM, with or without LoRA and weights.

    Returns:
        The names of the modules (value, output, up, down), and the modules of each layer.

    Raises:
        ValueError: for no row of ``NEURON_MODULES`` do all layers have exactly one module of each name.
    """
    heads = getattr(getattr(anatomy.decoder, "config", None), "num_attention_heads", None)
    for names in NEURON_MODULES:
        found = [
            [[module for path, module in layer.named_modules() if path.rpartition(".")[2] == name] for name in names]
            for layer in anatomy.layers
        ]
        if heads and all(len(modules) == 1 for layer in found for modules in layer):
            return names, [
                NeuronParts(value, output, up, down, _value_rows(anatomy.name, heads, value, output))
                for (value,), (output,), (up,), (down,) in found
            ]
    raise InputError(
        f"The neurons of {anatomy.name} are unknown: expected one module per layer of each name in "
        f"{' or in '.join(', '.join(names) for names in NEURON_MODULES)} (Llama, Mistral, Qwen2, Qwen3, GPT-NeoX)."
    )


def _value_rows(name: str, heads: int, value: Any, output: Any) -> torch.Tensor:
    """The row of the value module for each attention neuron, see :class:`NeuronParts`."""
    channels, rows = output.in_features, value.out_features
    size, neurons = channels // heads, torch.arange(channels)
    head, place = neurons // size, neurons % size
    if channels % heads == 0 and rows == 3 * channels:  # fused, head by head: query, key, value
        return (3 * head + 2) * size + place
    if channels % heads == 0 and rows % size == 0 and channels % rows == 0:
        return head // (channels // rows) * size + place
    raise InputError(f"The value module of {name} has {rows} rows for {heads} heads of {channels / heads:g} channels.")
