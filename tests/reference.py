"""The method's equations in float64 and plain loops, written from the specification and not from the package.

Slow on purpose: every sum is a loop over tokens, pairs or vocabulary, so that it can be read against the paper. What comes
out is differentiable by autograd, which gives the reference gradients. The map of ill-conditioned heads has a reference in 50
digits.
"""

import mpmath
import torch

EPSILON = 1e-8


def relation(x, y, y_tilde, valid):
    """Residual relation loss (equations 4 to 7): one value a sequence, averaged over those with two valid positions."""
    losses = []
    for b in range(len(valid)):
        tokens = [i for i in range(valid.shape[1]) if valid[b, i]]
        if len(tokens) < 2:
            continue
        d = unit_residuals([y[b, i].double() - x[b, i].double() for i in tokens])
        d_star = unit_residuals([y_tilde[b, i].double() - x[b, i].double() for i in tokens])
        error, weight = 0.0, 0.0
        for i in range(len(tokens)):
            for j in range(len(tokens)):
                if i != j:
                    k, k_star = d[i].dot(d[j]), d_star[i].dot(d_star[j])
                    error = error + k_star.abs() * (k - k_star) ** 2
                    weight = weight + k_star.abs()
        losses.append(error / weight)
    return sum(losses) / len(losses) if losses else torch.zeros((), dtype=torch.float64)


def unit_residuals(vectors):
    """Vectors less their mean, each divided by its length."""
    mean = sum(vectors) / len(vectors)
    return [(v - mean) / (v - mean).norm().clamp_min(EPSILON) for v in vectors]


def steering(y, y_tilde, valid):
    """``1 - cos(y, y~)``, mean over the valid positions of the batch."""
    losses = []
    for b, i in valid.nonzero().tolist():
        a, c = y[b, i].double(), y_tilde[b, i].double()
        losses.append(1 - a.dot(c) / (a.norm() * c.norm()))
    return sum(losses) / len(losses)


def kl(target_hidden, target_weight, source_hidden, source_weight):
    """``KL(p_src || p_tgt)``, mean over positions (equation 8)."""
    losses = []
    for h_target, h_source in zip(target_hidden.double(), source_hidden.double(), strict=True):
        p = torch.softmax(source_weight.double() @ h_source, dim=0)
        q = torch.softmax(target_weight.double() @ h_target, dim=0)
        losses.append(sum(p[v] * (p[v] / q[v]).log() for v in range(len(p)) if p[v] > 0))
    return sum(losses) / len(losses)


def bases(weight):
    """Semantic bases ``S = pinv(W^T)`` (equation 1)."""
    return torch.linalg.pinv(weight.double().T)


def map_state(kind, source_weight, target_weight, state):
    """Decompose one source state ``[D_src]`` over the vocabulary and recompose it in the target (equations 2 and 3)."""
    source_weight, state = source_weight.double(), state.double()
    source_bases, target_bases = bases(source_weight), bases(target_weight)
    recomposed = torch.zeros(target_weight.shape[1], dtype=torch.float64)
    for token in range(len(source_weight)):
        if kind == "readout":
            coefficient = source_weight[token].dot(state)
        elif kind == "projection":
            coefficient = source_bases[token].dot(state)
        else:
            coefficient = source_bases[token].dot(state) / (source_bases[token].norm() * state.norm())
        recomposed = recomposed + coefficient * target_bases[token]
    return recomposed


def exact_map(kind, source_head, target_head):
    """Matrix of the map, computed in 50 digits; each head ``L R`` is given as its factors ``[V, r]`` and ``[r, D]``."""
    with mpmath.workdps(50):
        source, target = (exact_bases(*factors) for factors in (source_head, target_head))
        if kind == "readout":
            source = exact(source_head[0]) * exact(source_head[1])
        if kind == "cosine":
            for i in range(source.rows):
                source[i, :] /= mpmath.norm(source[i, :])
        return torch.tensor((target.T * source).tolist(), dtype=torch.float64)


def exact_bases(left, right):
    """Semantic bases of ``L R``: the transposed ``pinv(R) pinv(L)``."""
    left, right = exact(left), exact(right)
    return left * (left.T * left) ** -1 * (right * right.T) ** -1 * right


def exact(tensor):
    """A tensor as a matrix of exact numbers."""
    return mpmath.matrix(tensor.double().tolist())


def gradient_times_activation(model, layers, rows, aggregate):
    """Layer scores ``[L]`` by hand: one unpadded example and one backward pass of the model's own loss at a time."""
    table = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        outputs = []

        def keep(module, args, output, outputs=outputs):
            output.retain_grad()
            outputs.append(output)

        hooks = [layer.register_forward_hook(keep) for layer in layers]
        model(input_ids=ids, labels=labels).loss.backward()
        for hook in hooks:
            hook.remove()
        model.zero_grad()
        positions = [i for i in range(ids.shape[1] - 1) if labels[0, i + 1] != -100]
        scores = []
        for h in outputs:
            tokens = [aggregate_channels(h.grad[0, i].double() * h.detach()[0, i].double(), aggregate) for i in positions]
            scores.append(sum(tokens) / len(tokens))
        table.append(scores)
    return torch.tensor(table, dtype=torch.float64).mean(0)


def aggregate_channels(product, aggregate):
    """One number from gradient x activation ``[D]`` of a token."""
    if aggregate == "dot":
        return abs(sum(product.tolist()))
    if aggregate == "signed":
        return sum(product.tolist())
    if aggregate == "l1":
        return sum(abs(value) for value in product.tolist())
    return sum(value**2 for value in product.tolist()) ** 0.5
