"""Semantic bases and the training-free map between two spaces (method, section 3; equations 1 to 3).

A hidden state is decomposed into the source's vocabulary semantics and recomposed in the target's space. Both steps are
linear, so together they are one matrix ``M`` ``[D_tgt, D_src]``. It is computed from Gram matrices that are accumulated in
float64 over chunks of the vocabulary, so no basis or pseudoinverse ``[V, D]`` is ever held in memory (docs/maps.md).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_semalign.errors import InputError, MissingFileError
from hf_semalign.files import checksum
from hf_semalign.kinds import check_kinds
from hf_semalign.method.vocabularies import differing, rows_by_bytes, shared_token_ids
from hf_semalign.models.anatomy import CausalLM, dissect
from hf_semalign.models.token_bytes import TokenBytes

logger = logging.getLogger(__name__)
KINDS = ("readout", "projection", "cosine")
CHUNK = 1024  # vocabulary rows in float64 at a time
BLOCK = 512  # columns of a Gram matrix at a time; blocks above the diagonal are skipped
TOLERANCE = 1e-10  # relative error of a pseudoinverse from one Gram matrix, above which a second Gram matrix is used
EPSILON = torch.finfo(torch.float64).eps


def semantic_bases(head_weight: torch.Tensor) -> torch.Tensor:
    """Compute the semantic bases ``S = pinv(W^T) = W G^-1`` of a head, for inspection (equation 1).

    Args:
        head_weight: ``W`` ``[V, D]``, with ``logits = h W^T``.

    Returns:
        ``[V, D]`` float64; row ``i`` is the basis of token ``i``, not normalised.
    """
    rows, dual, _ = _pseudoinverse(_Rows(head_weight))
    return torch.cat([chunk @ dual.T for chunk in rows])


class SemanticMap(nn.Module):
    """Maps source hidden states into the target's space, ``[..., D_src]`` to ``[..., D_tgt]``.

    Attributes:
        matrix: ``M`` ``[D_tgt, D_src]``; float64 as built.
        kind: ``readout``: ``pinv(W_tgt) W_src``, which gives the target state whose logits are closest to the source's in least
            squares, and is the identity if both heads are equal. ``projection``: ``S_tgt^T S_src``. ``cosine``: equation 2 as
            printed, ``S_tgt^T diag(1 / |s_i|) S_src``, with each state divided by ``|h|``.
        shared_tokens: number of vocabulary rows used.
        condition_number: condition number of the target head: ``sqrt(max / min)`` of its Gram matrix' eigenvalues.
        fingerprint: digest of both heads, the rows and the kind.
    """

    matrix: torch.Tensor

    def __init__(
        self, matrix: torch.Tensor, *, kind: str, shared_tokens: int, condition_number: float, fingerprint: str
    ) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.kind = kind
        self.shared_tokens = shared_tokens
        self.condition_number = condition_number
        self.fingerprint = fingerprint
        self._built = ""  # digest of the matrix as built from the fingerprint's heads, see _content

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map ``[..., D_src]`` to ``[..., D_tgt]``. Computes in the matrix' dtype and returns the input's dtype."""
        with torch.autocast(hidden.device.type, enabled=False):
            states = hidden.to(self.matrix.dtype)
            if self.kind == "cosine":
                states = F.normalize(states, dim=-1)
            return F.linear(states, self.matrix).to(hidden.dtype)

    def _content(self) -> str:
        return hashlib.sha256(f"{self.kind} {checksum(self.matrix.float())}".encode()).hexdigest()

    def by_content(self) -> SemanticMap:
        """Copy the map. If its matrix was set or changed by hand, the copy's fingerprint is a digest of the matrix."""
        matrix = self.matrix.detach().clone()
        content = self._content()
        copied = SemanticMap(
            matrix,
            kind=self.kind,
            shared_tokens=self.shared_tokens,
            condition_number=self.condition_number,
            fingerprint=self.fingerprint if content == self._built else content,
        )
        copied._built = self._built
        return copied

    @classmethod
    def from_heads(
        cls,
        source_weight: torch.Tensor,
        target_weight: torch.Tensor,
        *,
        rows: tuple[torch.Tensor, torch.Tensor] | None = None,
        kind: str = "readout",
        cache: str | Path | None = None,
    ) -> SemanticMap:
        """Build the map from two heads over one vocabulary, or over the tokens that two vocabularies share.

        Args:
            source_weight: ``[V, D_src]``.
            target_weight: ``[V, D_tgt]``; row ``i`` belongs to the same token as row ``i`` of ``source_weight``.
            rows: for two vocabularies, matching rows of both heads, see
                :func:`hf_semalign.method.vocabularies.rows_by_bytes`. The mean of these rows is then subtracted from each head:
                it does not affect the softmax, and it differs between tokenizers.
            kind: kind of map, see the class.
            cache: file that stores the map; it is reused while both heads are unchanged.

        Raises:
            ValueError: the kind is unknown, the heads have different numbers of rows, or a head is not ``[V, D]`` of finite
                real numbers.
        """
        if kind not in KINDS:
            raise InputError(f"map_kind is {kind!r}: expected one of {KINDS}.")
        counts = [len(one) for one in rows or (source_weight, target_weight)]
        if counts[0] != counts[1]:
            raise InputError(
                f"The heads have {counts[0]} and {counts[1]} rows: pass rows of shared tokens only, or use "
                "SemanticMap.from_models with both tokenizers."
            )
        for name, weight in (("source", source_weight), ("target", target_weight)):
            if weight.dim() != 2 or not len(weight) or weight.is_complex() or not weight.any() or not weight.isfinite().all():
                raise InputError(
                    f"The {name} head is {weight.dtype} of shape {tuple(weight.shape)}: expected [V, D] of finite real numbers "
                    "that are not all zero."
                )
        fingerprint = _fingerprint(kind, source_weight, target_weight, *(rows or ()))
        known = _recall(cache) if cache is not None else None
        if known is not None and known.fingerprint == fingerprint:
            return known.to(target_weight.device)
        heads = [_Rows(source_weight.to(target_weight.device)), _Rows(target_weight)]
        if rows is not None:
            heads = [_centred(head.weight, ids) for head, ids in zip(heads, rows, strict=True)]
        target, target_dual, condition = _pseudoinverse(heads[1])
        if kind == "readout":
            matrix = target_dual @ _cross_gram(target, heads[0])
        else:
            source, source_dual, _ = _pseudoinverse(heads[0])
            matrix = target_dual @ _cross_gram(target, source, source_dual if kind == "cosine" else None) @ source_dual.T
        built = cls(matrix, kind=kind, shared_tokens=counts[0], condition_number=condition, fingerprint=fingerprint)
        built._built = built._content()
        if cache is not None:
            built.save(cache)
        return built

    @classmethod
    def from_models(
        cls,
        source: CausalLM,
        target: CausalLM,
        source_tokenizer: PreTrainedTokenizerBase | None = None,
        target_tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        kind: str = "readout",
        cache: str | Path | None = None,
    ) -> SemanticMap:
        """Build the map from two models. Finds their heads, folds in logit scales and keeps the shared vocabulary.

        Args:
            source: the source model.
            target: the target model, bare or inside a peft model.
            source_tokenizer: tokenizer of the source. Without both tokenizers, the heads must have the same rows.
            target_tokenizer: tokenizer of the target. If the two split text differently, tokens are matched by their bytes.
            kind: kind of map, see the class.
            cache: see :meth:`from_heads`.

        Raises:
            ValueError: the vocabularies share too few tokens, heads without tokenizers have different numbers of rows, or as in
                :meth:`from_heads`.
        """
        ours, theirs = dissect(source).output_head(), dissect(target).output_head()
        counts = len(ours.weight), len(theirs.weight)
        if source_tokenizer is not None and target_tokenizer is not None and differing(source_tokenizer, target_tokenizer):
            tables = TokenBytes.of(source_tokenizer), TokenBytes.of(target_tokenizer)
            rows = rows_by_bytes(*tables, *counts, width=theirs.weight.shape[1])
            return cls.from_heads(ours.weight, theirs.weight, rows=rows, kind=kind, cache=cache)
        ids = shared_token_ids(source_tokenizer, target_tokenizer, *counts)
        return cls.from_heads(ours.rows(ids).weight, theirs.rows(ids).weight, kind=kind, cache=cache)

    def save(self, path: str | Path) -> None:
        """Write the map to a safetensors file, atomically."""
        record = {key: getattr(self, key) for key in ("kind", "shared_tokens", "condition_number")}
        record["fingerprint"] = self.by_content().fingerprint
        record["checksum"] = _record_checksum(self.matrix, record)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        save_file({"matrix": self.matrix.cpu()}, unfinished, metadata={"semantic_map": json.dumps(record)})
        unfinished.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> SemanticMap:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is damaged, or is not a semantic map.
        """
        if not Path(path).is_file():
            raise MissingFileError(f"There is no semantic map {path}: check the name.")
        try:
            with safe_open(path, framework="pt") as file:
                matrix, record = file.get_tensor("matrix"), json.loads((file.metadata() or {})["semantic_map"])
            check_kinds(record, Facts)
            if record.pop("checksum") != _record_checksum(matrix, record):
                raise InputError("its checksum does not match")
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path} is damaged or not a semantic map ({error}): copy it again, or rebuild it.") from error
        known = cls(matrix, **record)
        known._built = known._content()
        return known


class Facts(TypedDict):
    """Metadata of a map's file."""

    kind: Literal["readout", "projection", "cosine"]
    shared_tokens: int
    condition_number: float
    fingerprint: str
    checksum: str


def _recall(path: str | Path) -> SemanticMap | None:
    """Load a map from a file; ``None`` if the file is missing or damaged. Damage is logged."""
    with suppress(FileNotFoundError):
        try:
            return SemanticMap.load(path)
        except ValueError as error:
            logger.warning("The semantic map %s cannot be read (%s) and will be rebuilt.", Path(path).name, error.__cause__)
    return None


def _record_checksum(matrix: torch.Tensor, record: dict[str, Any]) -> str:
    return hashlib.sha256(f"{checksum(matrix)} {json.dumps(record, sort_keys=True)}".encode()).hexdigest()


@dataclass(frozen=True)
class _Rows:
    """Iterates over ``(W - m) B`` ``[V, rank]`` in float64, a chunk of rows at a time.

    Attributes:
        weight: ``W`` ``[V, D]``.
        ids: rows to use, in this order; ``None`` for all.
        mean: ``m`` ``[D]``, subtracted from each row; ``None`` for zero.
        basis: ``B`` ``[D, rank]``; ``None`` for the identity.
    """

    weight: torch.Tensor
    ids: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    basis: torch.Tensor | None = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        weight = self.weight.detach()
        for some in weight.split(CHUNK) if self.ids is None else (weight[ids] for ids in self.ids.split(CHUNK)):
            chunk = some.double() if self.mean is None else some.double() - self.mean
            yield chunk if self.basis is None else chunk @ self.basis

    @property
    def rank(self) -> int:
        return (self.weight if self.basis is None else self.basis).shape[1]


def _centred(weight: torch.Tensor, ids: torch.Tensor) -> _Rows:
    """Select rows of a head and subtract their mean."""
    rows = _Rows(weight, ids.to(weight.device))
    return replace(rows, mean=torch.stack([chunk.sum(0) for chunk in rows]).sum(0) / len(ids))


def _pseudoinverse(head: _Rows) -> tuple[_Rows, torch.Tensor, float]:
    """``W B``, ``K`` ``[D, rank]`` and the condition number of a head, with ``pinv(W) = K (W B)^T``.

    With ``K = G^-1`` and ``B`` the identity, the error is the rounding of ``G = W^T W`` times the condition number squared. If
    this is above ``TOLERANCE``, ``B`` holds the principal directions, each divided by its singular value. ``W B`` is then
    orthonormal up to the same error, and ``K`` corrects the rest with a second Gram matrix, that of ``W B`` (like CholeskyQR2
    for a QR decomposition). Directions below the numerical rank are dropped, with a warning.
    """
    values, vectors = torch.linalg.eigh(_gram(head))
    cutoff = values[-1] * len(values) * EPSILON
    condition = (values[-1] / values[0].clamp_min(cutoff)).sqrt().item()
    missing = int((values <= cutoff).sum())
    if missing:
        logger.warning(
            "A head of width %d has rank %d over the shared vocabulary: its pseudoinverse is used, and the map ignores the "
            "missing directions.", len(values), len(values) - missing,
        )  # fmt: skip
    basis = vectors[:, missing:].mul_(values[missing:].rsqrt())
    if condition**2 * EPSILON <= TOLERANCE:
        return head, basis @ basis.T, condition
    rows = replace(head, basis=basis)
    return rows, torch.cholesky_solve(basis.T, torch.linalg.cholesky(_gram(rows))).T, condition


def _gram(rows: _Rows) -> torch.Tensor:
    """Gram matrix ``[rank, rank]`` of rows; only the lower triangle is correct."""
    total = torch.zeros(rows.rank, rows.rank, dtype=torch.float64, device=rows.weight.device)
    for chunk in rows:
        for i in range(0, rows.rank, BLOCK):
            total[i:, i : i + BLOCK].addmm_(chunk[:, i:].T, chunk[:, i : i + BLOCK])
    return total


def _cross_gram(left: _Rows, right: _Rows, right_dual: torch.Tensor | None = None) -> torch.Tensor:
    """``left^T right``; with ``right_dual``, rows of ``right`` are divided by the norm of their token's basis, if nonzero."""
    total = torch.zeros(left.rank, right.rank, dtype=torch.float64, device=left.weight.device)
    for left_chunk, right_chunk in zip(left, right, strict=True):
        if right_dual is not None:
            norms = (right_chunk @ right_dual.T).norm(dim=-1, keepdim=True)
            right_chunk = right_chunk / torch.where(norms > 0, norms, 1.0)
        total.addmm_(left_chunk.T, right_chunk)
    return total


def _fingerprint(kind: str, *tensors: torch.Tensor) -> str:
    digest = hashlib.sha256(kind.encode())
    for tensor in tensors:
        digest.update(checksum(tensor).encode())
    return digest.hexdigest()
