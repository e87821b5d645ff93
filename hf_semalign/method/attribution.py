"""Layer attribution: which source layers matter for the task (method, section 1).

Scores are captum's Layer Gradient x Activation of the answer loss at the output of every source layer, from one backward pass.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from captum.attr import LayerGradientXActivation
from transformers import PreTrainedModel

from hf_semalign.errors import InputError
from hf_semalign.files import read_json
from hf_semalign.kinds import check_kinds
from hf_semalign.method.losses import answer_cross_entropy
from hf_semalign.models.anatomy import dissect, embedding_rows
from hf_semalign.models.hooks import checkpointed, without_cudnn_attention
from hf_semalign.splits import tensors_of, valid_positions

logger = logging.getLogger(__name__)
Aggregate = Literal["dot", "signed", "l1", "l2"]
AGGREGATES = {
    "dot": lambda product: product.sum(-1).abs(),
    "signed": lambda product: product.sum(-1),
    "l1": lambda product: product.abs().sum(-1),
    "l2": lambda product: product.norm(dim=-1),
}


@dataclass(frozen=True)
class LayerScores:
    """Attribution scores of the source layers.

    Attributes:
        values: one score per source layer, shallow to deep.
        deviations: standard deviation of each score across examples.
        num_examples: number of examples.
        aggregate: how channels were aggregated, see :func:`attribute_layers`.
    """

    values: tuple[float, ...]
    deviations: tuple[float, ...]
    num_examples: int
    aggregate: str

    def __post_init__(self) -> None:
        if not self.values or len(self.values) != len(self.deviations):
            raise InputError(
                f"There are {len(self.values)} scores and {len(self.deviations)} deviations: expected one of each per layer."
            )

    @property
    def flat(self) -> bool:
        """Whether scores differ less between layers than between examples; a ranking of the layers then says little."""
        return max(self.values) - min(self.values) < sum(self.deviations) / len(self.deviations)

    def to_json(self, path: str | Path) -> None:
        """Write the scores to a JSON file."""
        Path(path).write_text(json.dumps(asdict(self), indent=2))

    @classmethod
    def from_json(cls, path: str | Path) -> LayerScores:
        """Read what :meth:`to_json` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is damaged, or contains something else.
        """
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, record: dict, where: str = "the scores") -> LayerScores:
        """Rebuild from plain values, such as those read from JSON.

        Raises:
            ValueError: the values do not describe scores; the message uses ``where`` to name them.
        """
        check_kinds(record, cls, where)
        return cls(tuple(record["values"]), tuple(record["deviations"]), record["num_examples"], record["aggregate"])


@without_cudnn_attention()
def attribute_layers(
    source: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]], *, aggregate: Aggregate = "dot"
) -> LayerScores:
    """Score every source layer by gradient x activation.

    ``score_l`` is the mean of ``|<dL/dh_l, h_l>|`` over each example's valid positions and then over examples. ``h_l`` is the
    layer's output and ``L`` the example's mean answer cross-entropy. The batch size does not change the scores. Memory holds
    the outputs of all layers, and the inner activations of one layer at a time.

    With a final RMSNorm or LayerNorm, the loss does not depend on the length of the last state. Therefore ``dot`` and
    ``signed`` always give the last layer zero; ``l1`` and ``l2`` do not.

    Args:
        source: the source model; no gradients of its weights are computed.
        batches: dicts of ``input_ids, attention_mask, labels``, ``[B, T]`` each.
        aggregate: ``dot`` (as above), ``signed`` (without the absolute value), or the ``l1`` or ``l2`` norm over channels.

    Raises:
        ValueError: the aggregate is unknown, there are no batches, or an example has no valid position.
    """
    if aggregate not in AGGREGATES:
        raise InputError(f"aggregate is {aggregate!r}: expected one of {sorted(AGGREGATES)}.")
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise InputError(f"batches is a {type(batches).__name__}: expected an iterable of batches, such as a list.")
    anatomy = dissect(source)
    device, head = anatomy.device, anatomy.output_head()

    def answer_losses(embeds: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = anatomy.decoder(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False)[0]
        valid = valid_positions(labels)
        losses = answer_cross_entropy(hidden[valid], head, labels[:, 1:][valid[:, :-1]])
        row = valid.nonzero()[:, 0]
        return torch.zeros(len(labels), device=device).index_add(0, row, losses) / valid.sum(1)

    captum = LayerGradientXActivation(answer_losses, list(anatomy.layers))
    embed = source.get_input_embeddings()
    was_training, needed_gradient = source.training, [p.requires_grad for p in source.parameters()]
    source.eval().requires_grad_(False)
    rows: list[torch.Tensor] = []
    try:
        for batch in batches:
            ids, mask, labels = tensors_of(batch, embedding_rows(source), device)
            valid = valid_positions(labels)
            if not valid.any(1).all():
                raise InputError("No valid positions in an example of the extract split: every example needs an answer.")
            embeds = embed(ids).detach().requires_grad_()
            with checkpointed(anatomy.layers):
                products = captum.attribute(embeds, additional_forward_args=(mask, labels))
            tensors = [product if isinstance(product, torch.Tensor) else product[0] for product in products]
            rows.append(torch.stack([example_scores(tensor.detach(), valid, aggregate) for tensor in tensors], dim=1))
    finally:
        source.train(was_training)
        for parameter, needed in zip(source.parameters(), needed_gradient, strict=True):
            parameter.requires_grad_(needed)
    if not rows:
        raise InputError("Layer attribution got no batches: the extract split is empty.")
    return summarise(torch.cat(rows), aggregate)


def example_scores(product: torch.Tensor, valid: torch.Tensor, aggregate: Aggregate = "dot") -> torch.Tensor:
    """Score of each example at one layer: gradient x activation ``[B, T, D]`` and ``valid`` ``[B, T]`` to ``[B]`` float64."""
    return ((AGGREGATES[aggregate](product.float()) * valid).sum(1) / valid.sum(1)).cpu().double()


def summarise(table: torch.Tensor, aggregate: Aggregate) -> LayerScores:
    """Average the scores of all examples, ``[E, L_src]``; logs a warning if the result is flat."""
    scores = LayerScores(
        values=tuple(table.mean(0).tolist()),
        deviations=tuple(table.std(0, unbiased=False).tolist()),
        num_examples=len(table),
        aggregate=aggregate,
    )
    if scores.flat:
        logger.warning(
            "Layer scores are flat: they range from %.3g to %.3g across layers, and one layer's score deviates by %.3g between "
            "examples, so their ranking says little. The pairing strategy `banded` limits the effect of a bad ranking.",
            min(scores.values), max(scores.values), sum(scores.deviations) / len(scores.deviations),
        )  # fmt: skip
    return scores
