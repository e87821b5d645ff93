"""The losses as pure tensor functions (method, sections 4 and 5; equations 4 to 8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hf_semalign.errors import InputError
from hf_semalign.method.prefix_classes import PrefixClasses
from hf_semalign.models.anatomy import Head

EPSILON = 1e-8
RELATION_ROWS = 512  # rows of a relation matrix computed at a time: peak memory O(rows x T)
LOGIT_ROWS = 128  # positions whose logits are computed at a time: peak memory O(rows x V)
LOG_FLOOR = -80.0  # smallest log-probability in class masses; float32 can hold it, and no class mass becomes zero


def relation_loss(inputs: torch.Tensor, outputs: torch.Tensor, supervision: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Residual relation loss of one layer (equations 4 to 7), averaged over sequences.

    Matches the pairwise cosines of the layer's residual updates ``y - x`` to those of the updates ``y~ - x``, which would reach
    the mapped source states.

    Args:
        inputs: ``x`` ``[B, T, D]``, input of the target layer; gets no gradient.
        outputs: ``y`` ``[B, T, D]``, output of the target layer.
        supervision: ``y~`` ``[B, T, D]``, mapped output of the paired source layer; gets no gradient.
        valid: ``[B, T]`` bool.

    Returns:
        Scalar: mean over the sequences with at least two valid positions; zero if there is none.

    Raises:
        ValueError: the states or the mask have the wrong shape, or the mask is not bool.
    """
    _check_states(valid, inputs=inputs, outputs=outputs, supervision=supervision)
    losses = sequence_relation_losses(inputs, outputs, supervision, valid)
    return losses.sum() / relation_sequences(valid).sum().clamp_min(1)


def _check_states(valid: torch.Tensor, **states: torch.Tensor) -> None:
    """Check that all states are ``[B, T, D]`` and the mask is ``[B, T]`` bool; torch would silently broadcast or index."""
    (first, shape), *_ = ((name, tuple(one.shape)) for name, one in states.items())
    if len(shape) != 3 or any(tuple(one.shape) != shape for one in states.values()):
        shown = ", ".join(f"{name} {tuple(one.shape)}" for name, one in states.items())
        raise InputError(f"The states have the shapes {shown}: expected [B, T, D] for all of them.")
    if valid.dtype != torch.bool or tuple(valid.shape) != shape[:2]:
        raise InputError(
            f"valid is {valid.dtype} of shape {tuple(valid.shape)}: expected bool of shape {shape[:2]}, like the first two "
            f"dimensions of {first}. Convert a mask of 0 and 1 with mask.bool()."
        )


def relation_sequences(valid: torch.Tensor) -> torch.Tensor:
    """``[B]`` bool: which sequences have a relation loss, i.e. at least two valid positions."""
    return valid.sum(-1) >= 2


def sequence_relation_losses(
    inputs: torch.Tensor, outputs: torch.Tensor, supervision: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """Residual relation loss of each sequence, ``[B]``; zero if fewer than two positions are valid.

    The residuals ``d = y - x`` and ``d* = y~ - x`` are centred over the valid positions, and each token's is normalised. With
    ``K = d d^T``, ``K* = d* d*^T`` and ``w_ij = |K*_ij|`` for ``i != j``, the loss is ``sum w (K - K*)^2 / sum w``, computed in
    float32 or better. Arguments as in :func:`relation_loss`.
    """
    rows, valid = _valid_first(valid)
    inputs, outputs, supervision = (
        states.flatten(0, 1).index_select(0, rows).unflatten(0, valid.shape)
        for states in (inputs.detach(), outputs, supervision.detach())
    )
    with torch.autocast(outputs.device.type, enabled=False):  # a caller's autocast would multiply in half precision
        return _RelationError.apply(outputs, inputs, supervision, valid)


def _valid_first(valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row indices into the flattened batch that put valid positions first, cut to the longest sequence; and their mask."""
    batch, length = valid.shape
    order = valid.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(valid.sum(1).max())]
    rows = order + length * torch.arange(batch, device=valid.device).unsqueeze(1)
    return rows.flatten(), valid.take_along_dim(order, 1)


def _directions(states: torch.Tensor, inputs: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centred, normalised residuals ``[B, T, D]``, zero at invalid positions; and their former lengths ``[B, T, 1]``."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    residuals = _centre_(states.to(dtype) - inputs.to(dtype), valid)
    lengths = torch.linalg.vector_norm(residuals, dim=-1, keepdim=True).clamp_min(EPSILON)
    return residuals.div_(lengths), lengths


def _centre_(vectors: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Subtract the mean over valid positions, in place, and set all others to zero. The map is symmetric, so gradients use it
    too.
    """
    elsewhere = ~valid.unsqueeze(-1)
    vectors.masked_fill_(elsewhere, 0)
    vectors -= vectors.sum(1, keepdim=True) / valid.sum(1).clamp_min(1)[:, None, None]
    return vectors.masked_fill_(elsewhere, 0)


class _GradientInForward(torch.autograd.Function):
    """Loss of each row. The forward pass also computes the gradient with respect to the first argument and saves it."""

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        scaled = upstream.reshape(-1, *[1] * (gradient.dim() - 1)) * gradient
        return scaled.to(ctx.dtype), *[None] * (len(ctx.needs_input_grad) - 1)


class _RelationError(_GradientInForward):
    """``sum w (K - K*)^2 / sum w`` of each sequence. The forward pass computes loss and gradient, a block of rows at a time.

    The matrices are symmetric, so the gradient with respect to ``d_i`` is ``4 sum_j w_ij (K - K*)_ij d_j / sum w``. Invalid
    positions have zero directions and so no weight.
    """

    @staticmethod
    def forward(ctx, outputs, inputs, supervision, valid):
        directions, lengths = _directions(outputs, inputs, valid)
        wanted, _ = _directions(supervision, inputs, valid)
        error, weight = directions.new_zeros(2, len(directions))
        gradient = torch.empty_like(directions)
        for start in range(0, directions.shape[1], RELATION_ROWS):
            rows = slice(start, start + RELATION_ROWS)
            difference = directions[:, rows] @ directions.mT
            weights = wanted[:, rows] @ wanted.mT
            difference -= weights
            weights.abs_().diagonal(start, dim1=1, dim2=2).zero_()
            weight += weights.sum((1, 2))
            weights *= difference
            if ctx.needs_input_grad[0]:
                gradient[:, rows] = weights @ directions
            error += weights.mul_(difference).sum((1, 2))
            del difference, weights  # frees them before the next block is computed
        weight.clamp_min_(EPSILON)
        if ctx.needs_input_grad[0]:
            along = (gradient * directions).sum(-1, keepdim=True)
            gradient.addcmul_(directions, along, value=-1).mul_(4 / (weight[:, None, None] * lengths))
            ctx.save_for_backward(_centre_(gradient, valid))
            ctx.dtype = outputs.dtype
        return error / weight


def steering_loss(outputs: torch.Tensor, supervision: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Layer loss of version 1 of the paper: ``1 - cos(y, y~)``, mean over valid positions.

    Args:
        outputs: ``y`` ``[B, T, D]``.
        supervision: ``y~`` ``[B, T, D]``; gets no gradient.
        valid: ``[B, T]`` bool.

    Raises:
        ValueError: the states or the mask have the wrong shape, or the mask is not bool.
    """
    _check_states(valid, outputs=outputs, supervision=supervision)
    return token_steering_losses(outputs[valid], supervision[valid]).sum() / valid.sum().clamp_min(1)


def token_steering_losses(outputs: torch.Tensor, supervision: torch.Tensor) -> torch.Tensor:
    """``1 - cos(y, y~)`` of each token, from ``[N, D]`` each to ``[N]``, in float32 or better."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    return 1 - F.cosine_similarity(outputs.to(dtype), supervision.detach().to(dtype), dim=-1)


def fisher_loss(
    outputs: torch.Tensor, supervision: torch.Tensor, target_weight: torch.Tensor | Head, valid: torch.Tensor
) -> torch.Tensor:
    """Layer loss of the published version of the paper, as we read it: mean over valid positions of the second-order
    approximation of the KL between the logits of ``y~`` and ``y``. See :func:`token_fisher_losses`.

    Args:
        outputs: ``y`` ``[B, T, D]``.
        supervision: ``y~`` ``[B, T, D]``, mapped output of the paired source layer; gets no gradient.
        target_weight: head ``[V, D]``, or a :class:`hf_semalign.models.anatomy.Head`; frozen, gets no gradient.
        valid: ``[B, T]`` bool.

    Raises:
        ValueError: the states or the mask have the wrong shape, or the mask is not bool.
    """
    _check_states(valid, outputs=outputs, supervision=supervision)
    return token_fisher_losses(outputs[valid], supervision[valid], target_weight).sum() / valid.sum().clamp_min(1)


def token_fisher_losses(outputs: torch.Tensor, supervision: torch.Tensor, target_weight: torch.Tensor | Head) -> torch.Tensor:
    """``1/2 (E_p[u^2] - E_p[u]^2)`` of each token, with ``u = W (y - y~)`` and ``p`` the softmax of the logits of ``y~``.

    The Fisher information of a softmax is the covariance under ``p``. Half of its quadratic form in ``u`` is the second-order
    approximation of ``KL(p || softmax(z~ + u))``. We did not have the text of the published version (2026.findings-acl.1101):
    this is our reading of "a Fisher-weighted quadratic surrogate on target-space aligned logits".

    Args:
        outputs: ``y`` ``[N, D]``.
        supervision: ``y~`` ``[N, D]``; gets no gradient.
        target_weight: head ``[V, D]``, or a :class:`hf_semalign.models.anatomy.Head`, whose bias and soft cap only enter ``p``.

    Returns:
        ``[N]``, in float32 or better; logits ``[N, V]`` are never built whole.
    """
    with torch.autocast(outputs.device.type, enabled=False):  # a caller's autocast would multiply in half precision
        return _ChunkedFisher.apply(outputs, supervision.detach(), _as_head(target_weight))


def output_kl(
    target_hidden: torch.Tensor,
    target_weight: torch.Tensor | Head,
    source_hidden: torch.Tensor,
    source_weight: torch.Tensor | Head,
) -> torch.Tensor:
    """Output loss ``KL(p_src || p_tgt)``, mean over positions (equation 8); logits ``[N, V]`` are never built whole.

    Args:
        target_hidden: ``[N, D_tgt]`` final hidden states at the valid positions.
        target_weight: head ``[V, D_tgt]``, or a :class:`hf_semalign.models.anatomy.Head` with bias or soft cap; frozen, gets no
            gradient.
        source_hidden: ``[N, D_src]``; gets no gradient.
        source_weight: head ``[V, D_src]`` over the same tokens, or a ``Head``; gets no gradient.

    Raises:
        ValueError: there are no positions, the states differ in their number of positions, or the heads do not match the states
            or each other.
    """
    heads = _as_head(target_weight).weight, _as_head(source_weight).weight
    shapes = [tuple(one.shape) for one in (target_hidden, heads[0], source_hidden, heads[1])]
    fit = [len(shape) == 2 for shape in shapes] == [True] * 4 and shapes[0][0] == shapes[2][0] > 0
    if not fit or shapes[1] != (shapes[3][0], shapes[0][1]) or shapes[3][1] != shapes[2][1] or any(w.is_meta for w in heads):
        raise InputError(
            f"The shapes are {shapes[0]} (target states), {shapes[1]} (target head), {shapes[2]} (source states) and "
            f"{shapes[3]} (source head): expected [N, D_tgt], [V, D_tgt], [N, D_src] and [V, D_src], with N at least 1, and no "
            "head on the meta device."
        )
    return token_kl(target_hidden, target_weight, source_hidden, source_weight).mean()


def token_kl(
    target_hidden: torch.Tensor,
    target_weight: torch.Tensor | Head,
    source_hidden: torch.Tensor,
    source_weight: torch.Tensor | Head,
) -> torch.Tensor:
    """``KL(p_src || p_tgt)`` at each position, ``[N]``. Arguments as in :func:`output_kl`."""
    with torch.autocast(target_hidden.device.type, enabled=False):  # a caller's autocast would multiply in half precision
        return _ChunkedKL.apply(target_hidden, _as_head(target_weight), source_hidden.detach(), _as_head(source_weight))


def token_class_kl(
    target_hidden: torch.Tensor,
    target_weight: torch.Tensor | Head,
    source_hidden: torch.Tensor,
    source_weight: torch.Tensor | Head,
    classes: PrefixClasses,
) -> torch.Tensor:
    """Output loss (equation 8) for two tokenizers: ``sum_c P(c) log(P(c) / Q(c))`` at each position, ``[N]``.

    ``P(c)`` and ``Q(c)`` are the total probabilities that source and target give to the tokens of class ``c``. With one token
    per class, the result equals :func:`token_kl`; coarser classes never give more. Probability that the source gives to tokens
    outside all classes is removed from ``P``, which is then renormalised.

    Args:
        target_hidden: ``[N, D_tgt]`` final hidden states of the target at the aligned positions.
        target_weight: head ``[V_tgt, D_tgt]``, or a :class:`hf_semalign.models.anatomy.Head`; frozen, gets no gradient.
        source_hidden: ``[N, D_src]`` final hidden states of the source; gets no gradient.
        source_weight: head ``[V_src, D_src]``, or a ``Head``; gets no gradient.
        classes: classes of both heads' tokens, on the same device.

    Raises:
        ValueError: a head has a different number of rows than its side of the classes.
    """
    target_head, source_head = _as_head(target_weight), _as_head(source_weight)
    rows, tokens = ([len(one) for one in pair] for pair in ((source_head[0], target_head[0]), (classes.source, classes.target)))
    if rows != tokens:
        raise InputError(
            f"The heads have {rows[0]} (source) and {rows[1]} (target) rows, but the classes cover {tokens[0]} and "
            f"{tokens[1]} tokens: pass the heads' numbers of rows to prefix_classes, and use head.rows to keep as many of each "
            "head's first rows as there are classes for."
        )
    with torch.autocast(target_hidden.device.type, enabled=False):  # a caller's autocast would multiply in half precision
        return _ChunkedClassKL.apply(target_hidden, target_head, source_hidden.detach(), source_head, classes)


def token_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor | Head, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each next token, without gradient and in chunks of rows: ``[N, D]``, a head and ``[N]`` to ``[N]``."""
    head = _as_head(weight)
    with torch.no_grad():
        loss = hidden.new_empty(len(hidden), dtype=torch.promote_types(head.weight.dtype, torch.float32))
        chunk = loss.new_empty(min(LOGIT_ROWS, len(hidden)), len(head.weight))
        for rows in _row_chunks(hidden):
            logits = _logits(hidden[rows], head, chunk[: len(loss[rows])])
            loss[rows] = F.cross_entropy(logits, tokens[rows], reduction="none")
    return loss


@torch.no_grad()
def token_kl_and_cross_entropy(
    hidden: torch.Tensor,
    target_head: Head,
    source_hidden: torch.Tensor,
    source_head: Head,
    own_head: Head,
    tokens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`token_kl` and :func:`token_cross_entropy` without gradient; the target's logits are computed once for both.

    Args:
        hidden: ``[N, D_tgt]`` final hidden states of the target.
        target_head: the target's head, restricted to the tokens of the KL.
        source_hidden: ``[N, D_src]`` final hidden states of the source.
        source_head: the source's head, restricted to the same tokens.
        own_head: the target's whole head, for the cross-entropy.
        tokens: ``[N]`` next tokens.

    Returns:
        KL and cross-entropy, ``[N]`` each.
    """
    if not target_head.begins(own_head):
        kl = token_kl(hidden, target_head, source_hidden, source_head)
        return kl, token_cross_entropy(hidden, own_head, tokens)
    dtype = torch.promote_types(own_head.weight.dtype, torch.float32)
    kl, cross_entropy = hidden.new_empty(2, len(hidden), dtype=dtype)
    own = hidden.new_empty(min(LOGIT_ROWS, len(hidden)), len(own_head.weight), dtype=dtype)
    shared = hidden.new_empty(2, len(own), len(target_head.weight), dtype=dtype)
    for rows in _row_chunks(hidden):
        logits, theirs, source_log = (memory[: len(kl[rows])] for memory in (own, *shared))
        _logits(hidden[rows], own_head, logits)
        cross_entropy[rows] = F.cross_entropy(logits, tokens[rows], reduction="none")
        torch.log_softmax(_logits(source_hidden[rows], source_head, theirs), -1, out=source_log)
        torch.log_softmax(logits[:, : theirs.shape[1]], -1, out=theirs)
        kl[rows] = torch.sub(source_log, theirs, out=theirs).mul_(source_log.exp_()).sum(-1)
    return kl, cross_entropy


def token_hits(hidden: torch.Tensor, weight: torch.Tensor | Head, tokens: torch.Tensor) -> torch.Tensor:
    """Whether each next token is the most likely one, in chunks of rows: ``[N, D]``, a head and ``[N]`` to ``[N]`` bool."""
    head = _as_head(weight)
    with torch.no_grad():
        hits = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        chunk = hidden.new_empty(
            min(LOGIT_ROWS, len(hidden)), len(head.weight), dtype=torch.promote_types(head.weight.dtype, torch.float32)
        )
        for rows in _row_chunks(hidden):
            hits[rows] = _logits(hidden[rows], head, chunk[: len(hits[rows])]).argmax(-1) == tokens[rows]
    return hits


def answer_cross_entropy(hidden: torch.Tensor, head: Head, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each next token, differentiable: the backward pass recomputes the logits of each chunk of rows."""

    def chunk(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head.logits(states), wanted, reduction="none")

    pairs = zip(hidden.split(LOGIT_ROWS), tokens.split(LOGIT_ROWS), strict=True)
    return torch.cat([checkpoint(chunk, *pair, use_reentrant=False) for pair in pairs])


class _ChunkedKL(_GradientInForward):
    """KL of each row and its gradient ``(p_tgt - p_src) W_tgt``, both computed in the forward pass, a chunk of rows at a time.

    If the target has a soft cap ``c``, its slope ``1 - (z / c)^2`` multiplies the first factor; ``z`` are the capped logits.
    """

    @staticmethod
    def forward(ctx, target_hidden, target_head, source_hidden, source_head):
        weight, cap = target_head.weight, target_head.softcap
        loss = target_hidden.new_empty(len(target_hidden), dtype=torch.promote_types(weight.dtype, torch.float32))
        gradient = torch.empty_like(target_hidden, dtype=weight.dtype)
        # New tensors for each chunk would cost page faults and fragment memory.
        chunks = loss.new_empty(3 if cap is None else 4, min(LOGIT_ROWS, len(loss)), len(weight))
        for rows in _row_chunks(target_hidden):
            logits, source_log, target_log, *slope = chunks[:, : len(loss[rows])]
            torch.log_softmax(_logits(source_hidden[rows], source_head, logits), -1, out=source_log)
            torch.log_softmax(_logits(target_hidden[rows], target_head, logits), -1, out=target_log)
            if cap is not None:
                torch.div(logits, cap, out=slope[0]).square_().neg_().add_(1)
            source_probability = torch.exp(source_log, out=logits)
            loss[rows] = source_log.sub_(target_log).mul_(source_probability).sum(-1)
            if ctx.needs_input_grad[0]:
                difference = target_log.exp_().sub_(source_probability)
                if cap is not None:
                    difference.mul_(slope[0])
                torch.mm(difference.to(weight.dtype), weight, out=gradient[rows])
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(gradient)
            ctx.dtype = target_hidden.dtype
        return loss


class _ChunkedClassKL(_GradientInForward):
    """KL over classes of each row and its gradient, both computed in the forward pass, a chunk of rows at a time.

    The gradient at the target logit of token ``t`` in class ``c`` is ``p(t) (1 - P(c) / Q(c))``, times the slope of a soft cap.
    """

    @staticmethod
    def forward(ctx, target_hidden, target_head, source_hidden, source_head, classes):
        weight, cap = target_head.weight, target_head.softcap
        loss = target_hidden.new_empty(len(target_hidden), dtype=torch.promote_types(weight.dtype, torch.float32))
        gradient = torch.empty_like(target_hidden, dtype=weight.dtype)
        chunk = min(LOGIT_ROWS, len(loss))
        memory = loss.new_empty(2, chunk * max(len(weight), len(source_head.weight)))
        masses = loss.new_empty(3, chunk, classes.count + 1)
        for rows in _row_chunks(target_hidden):
            source_mass, target_mass, log_ratio = masses[:, : len(loss[rows])]
            _class_masses(source_hidden[rows], source_head, classes.source, memory, source_mass)
            logits, probability = _class_masses(target_hidden[rows], target_head, classes.target, memory, target_mass)
            source_mass, target_mass, log_ratio = source_mass[:, :-1], target_mass[:, :-1], log_ratio[:, :-1]
            source_mass /= source_mass.sum(-1, keepdim=True)  # the sum is below 1 if tokens are left out
            ratio = torch.div(source_mass, target_mass, out=target_mass)
            # A class without source tokens must give 0 log 0 = 0. torch.xlogy does the same but takes four times as long.
            torch.log(torch.clamp(ratio, min=torch.finfo(ratio.dtype).tiny, out=log_ratio), out=log_ratio)
            loss[rows] = source_mass.mul_(log_ratio).sum(-1)
            if ctx.needs_input_grad[0]:
                if cap is not None:
                    probability.mul_(logits.div_(cap).square_().neg_().add_(1))
                torch.gather(ratio.neg_().add_(1), 1, classes.target.expand(len(ratio), -1), out=logits)
                torch.mm(probability.mul_(logits).to(weight.dtype), weight, out=gradient[rows])
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(gradient)
            ctx.dtype = target_hidden.dtype
        return loss


def _class_masses(
    hidden: torch.Tensor, head: Head, classes: torch.Tensor, memory: torch.Tensor, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write each class's total probability to ``out``. Returns logits and probabilities ``[N, V]``, views into ``memory``."""
    logits, probability = (part[: len(hidden) * len(classes)].view(len(hidden), -1) for part in memory)
    torch.log_softmax(_logits(hidden, head, logits), -1, out=probability)
    probability.clamp_(min=LOG_FLOOR).exp_()
    out.zero_().scatter_add_(1, classes.expand(len(hidden), -1), probability)
    return logits, probability


class _ChunkedFisher(_GradientInForward):
    """Loss of each row and its gradient ``W^T (p * (u - E_p[u]))``, computed in the forward pass, a chunk of rows at a time."""

    @staticmethod
    def forward(ctx, outputs, supervision, head):
        weight = head.weight
        plain = Head(weight)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        loss = outputs.new_empty(len(outputs), dtype=dtype)
        gradient = torch.empty_like(outputs, dtype=weight.dtype)
        chunks = loss.new_empty(2, min(LOGIT_ROWS, len(loss)), len(weight))
        for rows in _row_chunks(outputs):
            shares, moved = chunks[:, : len(loss[rows])]
            _logits(supervision[rows], head, moved)
            torch.softmax(moved, -1, out=shares)
            _logits(outputs[rows].to(dtype) - supervision[rows].to(dtype), plain, moved)
            moved -= (shares * moved).sum(-1, keepdim=True)  # centred, for the variance of u and for its gradient
            loss[rows] = (shares * moved.square()).sum(-1) / 2
            if ctx.needs_input_grad[0]:
                torch.mm(shares.mul_(moved).to(weight.dtype), weight, out=gradient[rows])
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(gradient)
            ctx.dtype = outputs.dtype
        return loss


def _as_head(weight: torch.Tensor | Head) -> Head:
    return weight if isinstance(weight, Head) else Head(weight.detach())


def _logits(hidden: torch.Tensor, head: Head, out: torch.Tensor) -> torch.Tensor:
    """Write logits to ``out``, in float32 or better, and return it."""
    weight = head.weight
    if weight.dtype == out.dtype:
        torch.mm(hidden.to(weight.dtype), weight.T, out=out)
    else:
        out.copy_(hidden.to(weight.dtype) @ weight.T)
    if head.bias is not None:
        out += head.bias
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out


def _row_chunks(hidden: torch.Tensor) -> list[slice]:
    return [slice(start, start + LOGIT_ROWS) for start in range(0, len(hidden), LOGIT_ROWS)]
