"""Static attribution of value neurons (Yu and Ananiadou 2024): how much each adds to the log-probability of a token.

Everything is about one token ``t`` and the position before it, and is read through the head with the final norm's scale held
at what it is there, so that a readout is affine in the state: ``h + m_j w_j`` has the logits of ``h`` plus
``m_j W_U (g w_j) rsqrt(ms + eps)``, and no neuron needs a forward pass of its own.
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

CHUNK = 2**24  # logits that exist at a time
TRAILING = string.whitespace + '.")],'  # what LaTen's code takes off the end of an answer


@dataclass(frozen=True)
class Readout:
    """Logits of any state under the final norm's scale at one position: affine in the state.

    Attributes:
        weight: ``W_U diag(g)`` ``[V, D]``, with ``g`` the gain of the final norm.
        bias: ``[V]``, of the norm's bias and the head's, where there are any.
        scale: what the norm multiplies by, a scalar.
        centred: whether it first takes off the mean over the channels (LayerNorm).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor
    centred: bool

    def linear(self, states: torch.Tensor) -> torch.Tensor:
        """What states add to the logits, ``[..., D]`` to ``[..., V]``."""
        if self.centred:
            states = states - states.mean(-1, keepdim=True)
        return (states * self.scale) @ self.weight.T

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` to ``[..., V]``."""
        logits = self.linear(states)
        return logits if self.bias is None else logits + self.bias


class Unembedding:
    """Head and final norm of a model in float32.

    Raises:
        ValueError: a norm or a head that is not affine under a fixed scale.
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
        """The readout where the last layer gave ``final``, ``[D]``, or ``[B, D]`` for a scale each."""
        spread = final - final.mean(-1, keepdim=True) if self.centred else final
        scale = torch.rsqrt(spread.square().mean(-1, keepdim=True) + self.eps)
        return Readout(self.weight, self.bias, scale, self.centred)


@dataclass(frozen=True)
class Trace:
    """What passes through a model at the last position of ``B`` inputs, in float32.

    Attributes:
        entering: inputs of the layers, ``[L, B, D]``.
        attention: what their attention adds, ``[L, B, D]``.
        ffn: what their FFN adds, ``[L, B, D]``.
        heads: attention neurons, ``[L, B, H d_h]``: of head ``h`` and dimension ``e`` the sum over key positions ``p`` of
            ``alpha_p v_{p,e}``.
        activations: FFN neurons ``m``, ``[L, B, D_ff]``, times their gate where there is one.
        leaving: outputs of the layers, ``[L, B, D]``.
        normed: after the final norm, ``[B, D]``.
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
    """One forward pass over ``[B, T]`` token ids without padding, in the model's dtype."""
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
    """Look, on some tokens each alone, whether a model computes with its neurons what is said of them here.

    With one key position an attention neuron is its value row's output; a layer's output is its input plus what attention and
    FFN add; and the readout of the last layer's output is the model's.

    Args:
        model: a causal LM; its mode is restored.

    Raises:
        ValueError: names that are not known, or one of these does not hold.
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
                f"Neurons of {anatomy.name} cannot be scored: {what} (relative difference {off:.2g}). Known to work: Llama, "
                "Mistral, Qwen2, Qwen3, GPT-NeoX."
            )


def addition_scores(readout: Readout, before: torch.Tensor, added: torch.Tensor, label: int) -> torch.Tensor:
    """``log p(t | before + added) - log p(t | before)`` of each layer: ``[L, D]`` twice to ``[L]``."""
    logits = readout.logits(torch.stack((before, before + added)))
    log_probability = logits[..., label] - logits.logsumexp(-1)
    return log_probability[1] - log_probability[0]


def neuron_scores(
    readout: Readout, before: torch.Tensor, values: torch.Tensor, columns: torch.Tensor, label: int, chunk: int = CHUNK
) -> torch.Tensor:
    """``log p(t | before + m_j w_j) - log p(t | before)`` of each neuron.

    Args:
        readout: see :class:`Readout`.
        before: ``[D]``.
        values: ``m`` ``[n]``.
        columns: ``w`` ``[D, n]``, the columns of an output weight.
        label: ``t``.
        chunk: logits that exist at a time.

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
    """The layers and neurons of one model that matter for one token; of the neurons the best comes first.

    Attributes:
        attention_layers: ``L`` layers, ascending.
        ffn_layers: ``L`` layers, ascending.
        attention: indices ``[L, n]`` of attention neurons, see :class:`hf_semalign.experiments.baselines.neurons.NeuronParts`.
        ffn: indices ``[L, n]`` of FFN neurons.
    """

    attention_layers: list[int]
    ffn_layers: list[int]
    attention: torch.Tensor
    ffn: torch.Tensor


@torch.no_grad()
def locate(
    model: CausalLM, unembedding: Unembedding, input_ids: torch.Tensor, label: int, *, layers: int, attention: int, ffn: int
) -> Located:
    """The layers that add most to the log-probability of a token, and the neurons in them that do.

    Attention is scored on the layer's input and the FFN on that plus attention, also where a family computes both from the same
    input, so that the scores of all layers sum to the log-probability that they add together.

    Args:
        model: a causal LM in evaluation mode.
        unembedding: its own.
        input_ids: ``[T]``, what stands before the token.
        label: the token.
        layers: attention layers to keep, and FFN layers.
        attention: attention neurons to keep in each of the layers.
        ffn: FFN neurons, likewise.
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
    """The best-scored layers, ascending."""
    return sorted(scores.sort(descending=True, stable=True).indices[:count].tolist())


def top_neurons(scores: list[torch.Tensor], count: int) -> torch.Tensor:
    """The best-scored neurons of each layer, best first, ``[L, count]`` on the CPU."""
    return torch.stack([some.sort(descending=True, stable=True).indices[:count] for some in scores]).cpu()


def answer_label(row: Record, tokenizer: PreTrainedTokenizerBase | None, specials: Collection[int]) -> int:
    """Position of the token that an encoded row is located by: the last supervised one that says something.

    That is neither a special token nor one of nothing but white space and the punctuation that LaTen's code takes off the end
    of an answer (``TRAILING``). What stands before it is the input.

    Args:
        row: ``input_ids`` and ``labels``.
        tokenizer: tells what a token says; without one all but the specials count.
        specials: ids of special tokens.

    Raises:
        ValueError: a row without such a token.
    """
    labels = list(row["labels"])
    for position in range(len(labels) - 1, 0, -1):
        token = labels[position]
        if token == IGNORED or token in specials:
            continue
        if tokenizer is None or str(tokenizer.decode([token])).strip(TRAILING):
            return position
    raise InputError(
        f"The answer of the row with input_ids {list(row['input_ids'])[:20]} has no token but special ones and punctuation, so "
        "that no neuron can be located by it: take this row out of the extract split."
    )


# Attention's value and output, FFN's up and down: the modules whose rows and columns are a layer's neurons.
NEURON_MODULES: tuple[tuple[str, str, str, str], ...] = (
    ("v_proj", "o_proj", "up_proj", "down_proj"),  # Llama, Mistral, Qwen2, Qwen3
    ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX
)


@dataclass(frozen=True)
class NeuronParts:
    """Where the neurons of one decoder layer have their weights.

    FFN neuron ``j`` is row ``j`` of ``up`` and column ``j`` of ``down``, with a gate before it or without. Attention neuron
    ``h d_h + e`` (query head ``h``, dimension ``e`` of ``d_h``) is that column of ``output``, and row ``value_rows[h d_h + e]``
    of ``value``: with grouped queries the heads of a group share their rows, and where query, key and value are one module the
    row lies among the others.

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
    """The modules that a model's neurons lie in: their names (value, output, up, down), and they themselves by layer.

    Names and shapes alone are looked at: whether the layers compute with them what a family of these names does is for
    :func:`hf_semalign.experiments.baselines.neurons.check_neurons`.

    Args:
        anatomy: of a causal LM, also of one that has LoRA, or no weights.

    Raises:
        ValueError: a family whose layers do not have exactly one each of a row of ``NEURON_MODULES``.
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
        f"The neurons of {anatomy.name} are not known: expected layers with one each of "
        f"{' or of '.join(', '.join(names) for names in NEURON_MODULES)} (Llama, Mistral, Qwen2, Qwen3, GPT-NeoX)."
    )


def _value_rows(name: str, heads: int, value: Any, output: Any) -> torch.Tensor:
    """Row of the value module for each attention neuron, see :class:`NeuronParts`."""
    channels, rows = output.in_features, value.out_features
    size, neurons = channels // heads, torch.arange(channels)
    head, place = neurons // size, neurons % size
    if channels % heads == 0 and rows == 3 * channels:  # query, key and value of one head after those of the other
        return (3 * head + 2) * size + place
    if channels % heads == 0 and rows % size == 0 and channels % rows == 0:
        return head // (channels // rows) * size + place
    raise InputError(f"The value module of {name} has {rows} rows for {heads} heads of {channels / heads:g} channels.")
