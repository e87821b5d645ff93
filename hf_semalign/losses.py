"""The losses as pure tensor functions (method, sections 4 and 5; equations 4 to 8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

EPSILON = 1e-8
RELATION_ROWS = 512  # rows of a relation matrix at a time: peak memory O(rows x T)
LOGIT_ELEMENTS = 2**24  # logits of one model at a time


def relation_loss(inputs: torch.Tensor, outputs: torch.Tensor, supervision: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Residual relation loss of one layer (equations 4 to 7), averaged over sequences.

    Args:
        inputs: ``x`` ``[B, T, D]``, input of the target layer; carries no gradient.
        outputs: ``y`` ``[B, T, D]``, its output.
        supervision: ``y~`` ``[B, T, D]``, the mapped output of the paired source layer; carries no gradient.
        valid: ``[B, T]`` bool.

    Returns:
        Scalar: mean over the sequences with at least two valid positions; zero when there is none.
    """
    losses = sequence_relation_losses(inputs, outputs, supervision, valid)
    return losses.sum() / relation_sequences(valid).sum().clamp_min(1)


def relation_sequences(valid: torch.Tensor) -> torch.Tensor:
    """``[B]`` bool: the sequences that a relation exists for, those with at least two valid positions."""
    return valid.sum(-1) >= 2


def sequence_relation_losses(
    inputs: torch.Tensor, outputs: torch.Tensor, supervision: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """Residual relation loss of each sequence, ``[B]``; zero where fewer than two positions are valid.

    With the residuals ``d = y - x`` and ``d* = y~ - x``, centred over the valid positions and normalised a token at a time,
    ``K = d d^T``, ``K* = d* d*^T`` and ``w_ij = |K*_ij|`` over ``i != j``: ``sum w (K - K*)^2 / sum w``, in float32 or better.
    Arguments as in :func:`relation_loss`.
    """
    inputs = inputs.detach()
    directions = _directions(outputs, inputs, valid)
    wanted = _directions(supervision.detach(), inputs, valid)
    length = valid.shape[1]
    blocks = [slice(start, start + RELATION_ROWS) for start in range(0, length, RELATION_ROWS)]
    if len(blocks) == 1:
        error, weight = _relation_block(directions, wanted, valid, blocks[0])
    else:
        sums = [checkpoint(_relation_block, directions, wanted, valid, rows, use_reentrant=False) for rows in blocks]
        error, weight = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
    return error / weight.clamp_min(EPSILON)


def _directions(states: torch.Tensor, inputs: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Centred, normalised residuals ``[B, T, D]``, zero where not valid."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    mask = valid.unsqueeze(-1)
    residual = torch.where(mask, states.to(dtype) - inputs.to(dtype), 0)
    mean = residual.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    return F.normalize(torch.where(mask, residual - mean, 0), dim=-1, eps=EPSILON)


def _relation_block(
    directions: torch.Tensor, wanted: torch.Tensor, valid: torch.Tensor, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted squared error and weight ``[B]`` of some rows of the relation matrices."""
    relation = directions[:, rows] @ directions.transpose(1, 2)
    target_relation = wanted[:, rows] @ wanted.transpose(1, 2)
    positions = torch.arange(valid.shape[1], device=valid.device)
    pairs = valid[:, rows, None] & valid[:, None] & (positions[rows, None] != positions)
    weight = torch.where(pairs, target_relation.abs(), 0)
    return (weight * (relation - target_relation).square()).sum((1, 2)), weight.sum((1, 2))


def steering_loss(outputs: torch.Tensor, supervision: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Layer loss of version 1 of the paper: ``1 - cos(y, y~)``, mean over valid positions.

    Args:
        outputs: ``y`` ``[B, T, D]``.
        supervision: ``y~`` ``[B, T, D]``; carries no gradient.
        valid: ``[B, T]`` bool.
    """
    return token_steering_losses(outputs[valid], supervision[valid]).sum() / valid.sum().clamp_min(1)


def token_steering_losses(outputs: torch.Tensor, supervision: torch.Tensor) -> torch.Tensor:
    """``1 - cos(y, y~)`` of each token: ``[N, D]`` twice to ``[N]``, in float32 or better."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    return 1 - F.cosine_similarity(outputs.to(dtype), supervision.detach().to(dtype), dim=-1)


def output_kl(
    target_hidden: torch.Tensor, target_weight: torch.Tensor, source_hidden: torch.Tensor, source_weight: torch.Tensor
) -> torch.Tensor:
    """Output loss ``KL(p_src || p_tgt)``, mean over positions (equation 8); logits ``[N, V]`` are never built whole.

    Args:
        target_hidden: ``[N, D_tgt]`` final hidden states at the valid positions.
        target_weight: head ``[V, D_tgt]``, frozen: gets no gradient.
        source_hidden: ``[N, D_src]``; carries no gradient.
        source_weight: head ``[V, D_src]`` over the same tokens, frozen.
    """
    return token_kl(target_hidden, target_weight, source_hidden, source_weight).mean()


def token_kl(
    target_hidden: torch.Tensor, target_weight: torch.Tensor, source_hidden: torch.Tensor, source_weight: torch.Tensor
) -> torch.Tensor:
    """``KL(p_src || p_tgt)`` of each position, ``[N]``. Arguments as in :func:`output_kl`."""
    return _ChunkedKL.apply(target_hidden, target_weight.detach(), source_hidden.detach(), source_weight.detach())


def token_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each next token without gradient: ``[N, D]``, ``[V, D]``, ``[N]`` to ``[N]``, in row chunks."""
    with torch.no_grad():
        losses = [
            F.cross_entropy(_logits(hidden[rows], weight), tokens[rows], reduction="none")
            for rows in _row_chunks(len(hidden), len(weight))
        ]
    return torch.cat(losses) if losses else hidden.new_zeros(0)


class _ChunkedKL(torch.autograd.Function):
    """KL of each row and its gradient ``(p_tgt - p_src) W_tgt``, both made in the forward pass, a chunk of rows at a time."""

    @staticmethod
    def forward(ctx, target_hidden, target_weight, source_hidden, source_weight):
        losses, gradients = [], []
        for rows in _row_chunks(len(target_hidden), len(target_weight)):
            source_log = _logits(source_hidden[rows], source_weight).log_softmax(-1)
            target_log = _logits(target_hidden[rows], target_weight).log_softmax(-1)
            source_probability = source_log.exp()
            losses.append((source_probability * (source_log - target_log)).sum(-1))
            if ctx.needs_input_grad[0]:
                gradients.append((target_log.exp() - source_probability).to(target_weight.dtype) @ target_weight)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(target_hidden))
            ctx.dtype = target_hidden.dtype
        return torch.cat(losses) if losses else target_hidden.new_zeros(0)

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (upstream.unsqueeze(-1) * gradient).to(ctx.dtype), None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden.to(weight.dtype), weight)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _row_chunks(rows: int, vocabulary: int) -> list[slice]:
    step = max(1, LOGIT_ELEMENTS // vocabulary)
    return [slice(start, start + step) for start in range(0, rows, step)]
