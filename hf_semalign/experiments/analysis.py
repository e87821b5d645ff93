"""The paper's analyses: the vector nature of hidden states (figure 2) and the similarity of layers (figure 4).

Both are means over the valid positions of some batches, accumulated in float64. Memory does not grow with the split, and the
batch size does not change the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hf_semalign.errors import InputError
from hf_semalign.method.semantic_map import KINDS, SemanticMap, semantic_bases
from hf_semalign.models.anatomy import CausalLM, base_model, dissect, embedding_rows
from hf_semalign.models.hooks import capture
from hf_semalign.splits import tensors_of, valid_positions

Batch = Mapping[str, torch.Tensor]
RANDOM_STATES = 4096
MOMENTS = 4e9  # bytes of moments at a time; one source layer may need more


@torch.no_grad()
def layer_states(model: CausalLM, batch: Batch, layers: slice = slice(None)) -> torch.Tensor:
    """Outputs of decoder layers at the valid positions of a batch, ``[L, N, D]`` float64.

    Args:
        model: a causal LM in evaluation mode.
        batch: ``input_ids, attention_mask, labels`` ``[B, T]``.
        layers: which layers; all by default.

    Raises:
        ValueError: the batch does not have these tensors and shapes.
    """
    anatomy = dissect(model)
    ids, mask, labels = tensors_of(batch, embedding_rows(base_model(model)), anatomy.device)
    valid = valid_positions(labels)
    with capture(anatomy.layers[layers]) as captures:
        anatomy.decoder(input_ids=ids, attention_mask=mask, use_cache=False)
    return torch.stack([kept.output[valid].double() for kept in captures])


# Figure 2: decomposition and recomposition in one model


def vocabulary_bases(model: CausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """The bases to compare, by name, each ``[V, D]`` float64. Row ``i`` is the basis of token ``i``.

    They are made one at a time, because one of them may take gigabytes.

    - ``output``: semantic bases of the LM head, ``pinv(W^T)`` (equation 1).
    - ``head``: rows of the LM head ``W``. The ``output`` bases are their duals.
    - ``input``: rows of the embedding matrix. They equal ``head`` if embeddings are tied.
    - ``random``: Gaussian directions, each as long as its token's ``output`` basis.
    """
    bases = semantic_bases(dissect(model).head_weight().double())
    lengths = bases.norm(dim=-1, keepdim=True)
    yield "output", bases
    bases = dissect(model).head_weight().double()
    yield "head", bases
    bases = base_model(model).get_input_embeddings().get_parameter("weight").detach().double()
    yield "input", bases
    bases = _gaussian(*bases.shape, seed=0).to(lengths)
    yield "random", bases.mul_(lengths / bases.norm(dim=-1, keepdim=True))


def recomposition(bases: torch.Tensor, kind: str) -> torch.Tensor:
    """Matrix ``R`` ``[D, D]`` that decomposes ``h`` over bases ``B`` ``[V, D]`` and recomposes it: ``R h = B^T a``.

    - ``readout``: ``a = pinv(B^T) h``. ``R`` is the identity for any ``B`` of full rank.
    - ``projection``: ``a = B h``.
    - ``cosine``: ``a_i = <h, b_i> / |b_i|``. This is equation 2 without the factor ``1 / |h|``, which changes no direction.
    """
    if kind == "readout":
        return bases.T @ semantic_bases(bases)
    return bases.T @ (F.normalize(bases, dim=-1) if kind == "cosine" else bases)


def recomposition_cosines(model: CausalLM, batches: Iterable[Batch]) -> dict[str, Any]:
    """Cosine between each layer's output and its recomposition (the paper's figure 2).

    Args:
        model: a causal LM in evaluation mode.
        batches: dicts of ``input_ids, attention_mask, labels`` ``[B, T]``.

    Returns:
        ``positions`` is the number of valid positions, and ``tied`` is true if embeddings and head share one matrix.
        ``cosines`` maps a kind of decomposition (:func:`recomposition`) and the name of the bases
        (:func:`vocabulary_bases`) to two values: ``layers`` is the mean over positions for every layer, and
        ``random_states`` is the same for isotropic vectors instead of states.

    Raises:
        ValueError: the batches do not have these tensors and shapes, or have no valid position.
    """
    found = {name: {kind: recomposition(bases, kind) for kind in KINDS} for name, bases in vocabulary_bases(model)}
    names = [(kind, name) for kind in KINDS for name in found]
    maps = [found[name][kind] for kind, name in names]
    totals, positions = torch.zeros(len(maps), 1), 0
    for batch in batches:
        states = layer_states(model, batch)
        totals = totals.to(states) + _cosines(states, maps).sum(-1)
        positions += states.shape[1]
    if not positions:
        raise InputError("There are no valid positions in the batches: give rows with answers.")
    chance = _cosines(_gaussian(RANDOM_STATES, len(maps[0]), seed=1).to(maps[0].device), maps).mean(-1)
    cosines: dict[str, Any] = {kind: {} for kind in KINDS}
    for (kind, name), layers, random in zip(names, (totals / positions).tolist(), chance.tolist(), strict=True):
        cosines[kind][name] = {"layers": layers, "random_states": random}
    embeddings = base_model(model).get_input_embeddings()
    tied = embeddings.get_parameter("weight") is dissect(model).head.get_parameter("weight")
    return {"positions": positions, "tied": tied, "cosines": cosines}


def _gaussian(rows: int, width: int, *, seed: int) -> torch.Tensor:
    """Isotropic vectors ``[rows, width]`` float64. Use different seeds for states and bases, or they are the same vectors."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _cosines(states: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Cosine of states ``[..., N, D]`` before and after each of ``K`` maps ``[D, D]``, as ``[K, ..., N]``."""
    return torch.stack([F.cosine_similarity(states, states @ matrix.T, dim=-1) for matrix in maps])


# Figure 4: similarity of layers


class LinearCKA:
    """Debiased linear CKA between all layers of two models, computed from sums over positions.

    With Gram matrices ``K``, ``L`` over ``n`` positions, their diagonals set to zero, ``HSIC_1`` (Song et al. 2012, equation 5;
    Nguyen et al. 2021, equation 3) is::

        [tr(K L) + (1'K1)(1'L1) / ((n - 1)(n - 2)) - 2 (1'K L1) / (n - 2)] / (n (n - 3))

    and CKA is ``HSIC_1(K, L) / sqrt(HSIC_1(K, K) HSIC_1(L, L))``. With a linear kernel, sums over positions are enough. For
    ``a = |x|^2``, ``b = |y|^2``, ``C = sum x y'``, ``s = sum x`` and ``t = sum y``::

        tr(K L) = |C|^2 - sum ab        1'K1 = |s|^2 - sum a        1'K L1 = s'C t - s' sum b x - t' sum a y + sum ab

    These are the entries of one matrix per pair of layers, ``sum (x, a, 1) (y, b, 1)'``. The CKA of independent features is 0
    on average, so single values may be negative. The CKA of equal features is 1. Orthogonal maps, shifts and a common factor on
    all features do not change it. Other linear maps may.
    """

    def __init__(self) -> None:
        self._moments: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def update(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add the features of ``N`` positions: ``[A, N, D]`` and ``[B, N, E]`` float64."""
        left, right = _with_norms(left), _with_norms(right)
        (a, _, d), (b, _, e) = left.shape, right.shape
        if self._moments is None:
            self._moments = left.new_zeros(a, d, b, e), left.new_zeros(a, d, d), right.new_zeros(b, e, e)
        cross, own_left, own_right = self._moments
        cross.view(a * d, b * e).addmm_(left.mT.flatten(0, 1), right.transpose(0, 1).flatten(1))
        own_left.baddbmm_(left.mT, left)
        own_right.baddbmm_(right.mT, right)

    def values(self) -> torch.Tensor:
        """CKA of all pairs, ``[A, B]``.

        Raises:
            ValueError: there are fewer than four positions, so no unbiased estimate exists.
        """
        if self._moments is None or self._moments[1][0, -1, -1] < 4:
            raise InputError("The debiased CKA needs at least four valid positions: give more rows, or longer answers.")
        cross, left, right = self._moments
        rows = torch.stack([hsic(pairs.transpose(0, 1)) for pairs in cross])  # one source layer at a time saves memory
        return rows / (hsic(left)[:, None] * hsic(right)).sqrt()


def hsic(moments: torch.Tensor) -> torch.Tensor:
    """``HSIC_1`` from the moments of :class:`LinearCKA`, ``[..., D + 2, E + 2]`` to ``[...]``."""
    cross, sum_x, sum_y = moments[..., :-2, :-2], moments[..., :-2, -1], moments[..., -1, :-2]
    sum_bx, sum_ay, sum_ab = moments[..., :-2, -2], moments[..., -2, :-2], moments[..., -2, -2]
    sum_a, sum_b, n = moments[..., -2, -1], moments[..., -1, -2], moments[..., -1, -1]
    trace = torch.linalg.vector_norm(cross, dim=(-2, -1)).square() - sum_ab
    sums = (sum_x.square().sum(-1) - sum_a) * (sum_y.square().sum(-1) - sum_b)
    through = (sum_x * (cross @ sum_y[..., None])[..., 0]).sum(-1)
    product = through - (sum_x * sum_bx).sum(-1) - (sum_y * sum_ay).sum(-1) + sum_ab
    return (trace + sums / ((n - 1) * (n - 2)) - 2 * product / (n - 2)) / (n * (n - 3))


def _with_norms(features: torch.Tensor) -> torch.Tensor:
    """Rows ``x`` as ``(x, |x|^2, 1)``: ``[A, N, D]`` to ``[A, N, D + 2]``."""
    squared = features.square().sum(-1, keepdim=True)
    return torch.cat([features, squared, torch.ones_like(squared)], dim=-1)


def layer_cka(source: CausalLM, target: CausalLM, batches: Iterable[Batch], semantic_map: SemanticMap) -> dict[str, Any]:
    """CKA between the outputs of every source layer and every target layer (the paper's figure 4).

    It takes 8 bytes x source layers x target layers x target width x (source width + 2 target widths) of memory. Above
    ``MOMENTS`` bytes, it works on groups of source layers, and the models run once per group.

    Args:
        source: the source model, in evaluation mode.
        target: the target model, in evaluation mode, on the same device.
        batches: dicts of ``input_ids, attention_mask, labels`` ``[B, T]``, iterated once per group.
        semantic_map: the map, in float64.

    Returns:
        Three lists ``[L_src][L_tgt]``: ``unaligned`` uses the source states as they are, ``aligned`` maps them, and
        ``random_map`` maps them with a Gaussian matrix of the map's shape. ``positions`` is the number of valid positions.

    Raises:
        ValueError: the batches do not have these tensors and shapes, have fewer than four valid positions, or are an iterator
            although several groups are needed.
    """
    depth, width = len(dissect(source).layers), len(dissect(target).layers)
    rows, columns = semantic_map.matrix.shape
    group = max(1, int(MOMENTS / (8 * width * rows * (columns + 2 * rows))))
    if group < depth and isinstance(batches, Iterator):
        raise InputError("batches is an iterator, but the analysis iterates over it more than once: pass a list.")
    control = _gaussian(rows, columns, seed=0).to(semantic_map.matrix)
    values: dict[str, list[list[float]]] = {"unaligned": [], "aligned": [], "random_map": []}
    positions = 0
    for start in range(0, depth, group):
        sums, positions = {name: LinearCKA() for name in values}, 0
        for batch in batches:
            left, right = layer_states(source, batch, slice(start, start + group)), layer_states(target, batch)
            sums["unaligned"].update(left, right)
            sums["aligned"].update(semantic_map(left), right)
            sums["random_map"].update(left @ control.T, right)
            positions += left.shape[1]
        for name, found in sums.items():
            values[name] += found.values().tolist()
    return {"positions": positions, **values}
