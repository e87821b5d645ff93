"""Extract the initial LoRA weights of a target from a source, for :mod:`hf_semalign.experiments.baselines.seeking`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_semalign.cache.examples import Collate
from hf_semalign.cache.source import Source
from hf_semalign.errors import InputError
from hf_semalign.experiments.baselines.projections import ROLES, Projection, oriented, projections
from hf_semalign.files import digest, load_tensor, save_tensor
from hf_semalign.method.losses import answer_cross_entropy
from hf_semalign.method.pairing import pair_layers
from hf_semalign.models.anatomy import Anatomy, dissect
from hf_semalign.models.hooks import without_cudnn_attention
from hf_semalign.models.lora import lora_candidates, lora_targets
from hf_semalign.splits import fingerprint, valid_positions


@without_cudnn_attention()
def sensitivities(
    source: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]], wanted: Sequence[Iterable[str]]
) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Sensitivity of a source's layers and weights: ``sum_j |theta * d loss_j / d theta|``.

    Each gradient is freed once it is counted. Sums are on the CPU, in float32 or better.

    Args:
        source: the source. Its training mode and ``requires_grad`` flags are restored.
        batches: dicts of ``input_ids, attention_mask, labels``, each ``[1, T]`` (one example per batch).
        wanted: by layer, the paths of the linear modules to compute weight sensitivities for.

    Returns:
        The sum of each layer over all its parameters, including norms and biases. For each layer and wanted module, the
        sensitivity of every weight ``[h, w]``.

    Raises:
        ValueError: a batch has several examples, or there is no batch.
    """
    anatomy = dissect(source)
    head, scores = anatomy.output_head(), [0.0] * len(anatomy.layers)
    kept: list[dict[str, torch.Tensor]] = []

    def counted(layer: int, total: torch.Tensor | None) -> Callable[[torch.Tensor], None]:
        def count(parameter: torch.Tensor) -> None:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            product = (parameter.detach().to(wide) * cast(torch.Tensor, parameter.grad).to(wide)).abs_()
            parameter.grad = None
            scores[layer] += product.sum(dtype=torch.float64).item()
            if total is not None:
                total.add_(product.to(total.device))

        return count

    was_training, needed_gradient = source.training, [p.requires_grad for p in source.parameters()]
    source.eval().requires_grad_(False)
    handles, examples = [], 0
    try:
        for k, layer in enumerate(anatomy.layers):
            totals: dict[int, torch.Tensor] = {}
            kept.append({})
            for path in wanted[k]:
                module = layer.get_submodule(path)
                weight = module.get_parameter("weight")
                wide = torch.promote_types(weight.dtype, torch.float32)
                totals[id(weight)] = torch.zeros(weight.shape, dtype=wide)
                kept[k][path] = oriented(module, totals[id(weight)])
            for parameter in layer.parameters():
                parameter.requires_grad_()
                handles.append(parameter.register_post_accumulate_grad_hook(counted(k, totals.get(id(parameter)))))
        for batch in batches:
            if len(batch["labels"]) != 1:
                raise InputError(f"Got a batch of {len(batch['labels'])} examples: sensitivities need one example per batch.")
            ids, mask, labels = (batch[key].to(anatomy.device) for key in ("input_ids", "attention_mask", "labels"))
            hidden = anatomy.decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            valid = valid_positions(labels)
            losses = answer_cross_entropy(hidden[valid], head, labels[:, 1:][valid[:, :-1]])
            losses.mean().backward()
            examples += 1
    finally:
        for handle in handles:
            handle.remove()
        source.train(was_training)
        for parameter, needed in zip(source.parameters(), needed_gradient, strict=True):
            parameter.requires_grad_(needed)
    if not examples:
        raise InputError("Sensitivities got no batches: the extract split is empty.")
    return scores, kept


def best_window(sensitivity: torch.Tensor, shape: tuple[int, int]) -> tuple[int, int]:
    """First row and column of the window with the largest sum. Of equal windows, the first in row order is taken.

    Args:
        sensitivity: ``[R, C]``, not negative.
        shape: ``(h, w)`` of the window, at most ``(R, C)``.
    """
    height, width = shape
    table = np.zeros((sensitivity.shape[0] + 1, sensitivity.shape[1] + 1))
    table[1:, 1:] = sensitivity.cpu().double().numpy().cumsum(0).cumsum(1)
    sums = table[height:, width:] - table[:-height, width:] - table[height:, :-width] + table[:-height, :-width]
    row, column = np.unravel_index(sums.argmax(), sums.shape)
    return int(row), int(column)


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation ``B0 A0`` of rank ``r`` of a matrix ``[h, w]``.

    Returns:
        ``A0 = V_r^T`` ``[r, w]`` and ``B0 = U_r S_r`` ``[h, r]``, zero beyond the matrix's own rank.
    """
    matrix = matrix.float()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    down, up = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], rank)
    count = min(rank, len(values))
    down[:count], up[:, :count] = right[:count], left[:, :count] * values[:count]
    return down, up


@dataclass(frozen=True)
class Needs:
    """The target modules that get LoRA, and the source projections that can initialise them.

    :meth:`of` creates it, and checks that the source has every projection that the target needs.

    Attributes:
        modules: the roles of each target module, by layer and path.
        suppliers: the source's projections, by layer and role.
    """

    modules: list[dict[str, list[Projection]]]
    suppliers: list[dict[str, Projection]]

    @classmethod
    def of(cls, theirs: Anatomy, ours: Anatomy, names: list[str] | None = None) -> Needs:
        """Compare the shapes of both models, which need no weights.

        Args:
            theirs: anatomy of the source.
            ours: anatomy of the target, without LoRA.
            names: see :func:`hf_semalign.models.lora.lora_targets`.

        Raises:
            ValueError: the source has fewer layers than the target, the role of a target module is unknown, or a source layer
                lacks a role or has a smaller matrix for it.
        """
        of_theirs, of_ours = (cast(Any, one.decoder).config.get_text_config() for one in (theirs, ours))
        pair_layers([0.0] * len(theirs.layers), len(ours.layers), "attribution")
        suppliers = [projections(layer, of_theirs) for layer in theirs.layers]
        names, modules = lora_targets(ours.layers, names), list[dict[str, list[Projection]]]()
        for layer in ours.layers:
            roles = projections(layer, of_ours).values()
            paths = [path for path in lora_candidates(layer) if path.rpartition(".")[2] in names]
            modules.append({path: [role for role in roles if role.path == path] for path in paths})
            if unknown := [path for path, found in modules[-1].items() if not found]:
                raise InputError(
                    f"The role of the modules {unknown} of {ours.name} is unknown, so they cannot be matched with the source: "
                    f"set lora_targets to separate modules for {', '.join(ROLES)}."
                )
        every = (one for layer in modules for roles in layer.values() for one in roles)
        for wanted in {(one.path, one.role, one.shape): one for one in every}.values():
            for k, there in enumerate(suppliers):
                if _supplier(there, wanted) is None:
                    have = ", ".join(f"{role} {one.path} {one.shape}" for role, one in there.items())
                    raise InputError(
                        f"{wanted.path} of the target {ours.name} needs a projection with the role {wanted.role} and the shape "
                        f"{wanted.shape} or larger in the source {theirs.name}, but its layer {k} has "
                        f"{have or 'no known projection'}. Choose a larger source, or remove this module from lora_targets."
                    )
        return cls(modules, suppliers)


def _supplier(layer: dict[str, Projection], wanted: Projection) -> Projection | None:
    """The projection of a source layer that is large enough for a window of the wanted shape, if there is one."""
    found = layer.get(wanted.role)
    if found is not None and found.shape[0] < wanted.shape[0] and found.groups > 1:
        found = found.ungrouped()
    return found if found is not None and found.shape[0] >= wanted.shape[0] and found.columns >= wanted.columns else None


def _shape(parts: list[Projection]) -> tuple[int, int]:
    """Shape of the module that these projections make up."""
    return sum(len(one.rows) for one in parts), parts[0].columns


@dataclass(frozen=True)
class Extraction:
    """The result of :func:`extract`.

    Attributes:
        scores: sensitivity of each source layer.
        source_layers: the source layer that initialises each target layer.
        windows: by target layer, module and role: the source module, and the first row and column of the window. Rows are
            counted within the role. If the source's matrix had too few rows, each head counts once per query head that
            reads it.
        examples: number of examples in the extract split. The source ran forward and backward once over each.
        factors: ``A0`` ``[r, w]`` and ``B0`` ``[h, r]`` by target layer and module, in float32 on the CPU.
    """

    scores: list[float]
    source_layers: list[int]
    windows: list[dict[str, dict[str, list[Any]]]]
    examples: int
    factors: list[dict[str, tuple[torch.Tensor, torch.Tensor]]]


def extract(source: PreTrainedModel, batches: Collection[Mapping[str, torch.Tensor]], needs: Needs, rank: int) -> Extraction:
    """Compute the initial LoRA weights (steps 1 to 4 of the method).

    Args:
        source: the source.
        batches: see :func:`sensitivities`.
        needs: see :class:`Needs`.
        rank: LoRA rank.
    """
    roles = {one.role for layer in needs.modules for found in layer.values() for one in found}
    wanted = [{layer[role].path for role in roles} for layer in needs.suppliers]
    scores, sums = sensitivities(source, batches, wanted)
    chosen = list(pair_layers(scores, len(needs.modules), "attribution").source_layers)
    found = Extraction(scores, chosen, [{} for _ in chosen], len(batches), [{} for _ in chosen])
    layers = dissect(source).layers
    for target_layer, (k, modules) in enumerate(zip(chosen, needs.modules, strict=True)):
        for path, parts in modules.items():
            matrix = torch.zeros(_shape(parts), device=next(layers[k].parameters()).device)
            for part in parts:
                supplier = cast(Projection, _supplier(needs.suppliers[k], part))
                module = layers[k].get_submodule(supplier.path)
                weight = oriented(module, module.get_parameter("weight").detach())
                row, column = best_window(sums[k][supplier.path][supplier.rows], part.shape)
                rows, columns = supplier.rows[row : row + part.shape[0]], slice(column, column + part.columns)
                matrix[part.rows.to(weight.device)] = weight[rows.to(weight.device), columns].float()
                found.windows[target_layer].setdefault(path, {})[part.role] = [supplier.path, row, column]
            down, up = low_rank(matrix, rank)
            found.factors[target_layer][path] = down.cpu(), up.cpu()
    return found


def extract_once(
    source: Source,
    needs: Needs,
    extract_split: Dataset,
    collate: Collate,
    root: Path | None,
    *,
    rank: int,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Extraction:
    """Run :func:`extract` once, and cache the result with the source's signals for later runs.

    Args:
        source: the source.
        needs: see :class:`Needs`.
        extract_split: rows of :func:`hf_semalign.splits.encode`.
        collate: converts rows to a batch.
        root: folder of the signals of all sources. ``None`` turns off caching.
        rank: LoRA rank.
        device: device for the source.
        progress: show a progress bar.
    """

    def make() -> Extraction:
        batches = [collate([row]) for row in extract_split]
        return extract(source.model(device), tqdm(batches, desc="sensitivities", disable=not progress), needs, rank)

    if root is None:
        return make()
    wants = [
        {path: [[one.role, one.rows.tolist(), one.columns] for one in parts] for path, parts in layer.items()}
        for layer in needs.modules
    ]
    name = f"seeking-{digest([fingerprint(extract_split), wants, rank])[:16]}"
    known = _recall(source, root, name, needs, rank)
    with nullcontext() if known else source.lock(root):
        known = known or _recall(source, root, name, needs, rank)  # another process may have written it
        if known is None:
            known = make()
            record = {key: value for key, value in vars(known).items() if key != "factors"}
            flat = [one.flatten() for layer in known.factors for pair in layer.values() for one in pair]
            save_tensor(torch.cat(flat), source.folder(root) / f"{name}.safetensors")
            source.keep(root, name, record)
    return known


def _recall(source: Source, root: Path, name: str, needs: Needs, rank: int) -> Extraction | None:
    """Load what :func:`extract_once` cached. ``None`` if it is missing or incomplete."""
    record, flat = source.recall(root, name), load_tensor(source.folder(root) / f"{name}.safetensors")
    if record is None or flat is None:
        return None
    shapes = [{path: _shape(parts) for path, parts in layer.items()} for layer in needs.modules]
    sizes = [size for layer in shapes for height, width in layer.values() for size in (rank * width, height * rank)]
    pieces = iter(flat.split(sizes))
    factors = [
        {path: (next(pieces).view(rank, width), next(pieces).view(height, rank)) for path, (height, width) in layer.items()}
        for layer in shapes
    ]
    return Extraction(**record, factors=factors)
