"""Attribution scores of a source, computed once with the whole source or one layer at a time, and saved with its signals."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_semalign.cache.examples import Collate, Examples
from hf_semalign.cache.layer_pass import Output, layer_pass, spread
from hf_semalign.cache.source import Source
from hf_semalign.cache.states import Column, StateFolder
from hf_semalign.files import digest
from hf_semalign.method.attribution import LayerScores, attribute_layers, example_scores, summarise
from hf_semalign.method.losses import answer_cross_entropy
from hf_semalign.models.anatomy import Anatomy
from hf_semalign.models.hooks import bypass, capture, stop_after, without_cudnn_attention
from hf_semalign.splits import fingerprint, valid_positions


def layer_scores(
    source: Source,
    extract: Dataset,
    collate: Collate,
    root: Path | None,
    *,
    precision: str = "no",
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    stream: bool = False,
    progress: bool = True,
) -> LayerScores:
    """Scores on the extract split, with ``dot``, see :func:`hf_semalign.method.attribution.attribute_layers`.

    Args:
        source: the source.
        extract: rows of :func:`hf_semalign.splits.encode`.
        collate: rows to a batch.
        root: the folder of all sources, where the scores are saved; ``None`` to not save them.
        precision: mixed precision of the run, which the scores depend on.
        device: where the source runs.
        batch_size: examples in a forward and backward pass; one if the source is streamed.
        stream: hold one layer of the source at a time, see :func:`attribute_streamed`. It needs ``root``.
        progress: show progress bars.
    """
    name = f"scores-{digest([fingerprint(extract), precision])[:16]}"
    known = None if root is None else source.recall(root, name)
    with nullcontext() if root is None or known else source.lock(root):
        known = known or (None if root is None else source.recall(root, name))  # another process may have saved them
        if known is not None:
            return LayerScores.from_dict(known)
        if stream and root is not None and source.num_layers > 1:
            scores = attribute_streamed(source, extract, collate, root, precision=precision, device=device, progress=progress)
        else:
            batches = DataLoader(cast(Any, extract), batch_size, collate_fn=collate)
            bar = tqdm(batches, desc="attribution", disable=not progress)
            scores = attribute_layers(source.model(device), bar)
        if root is not None:
            source.keep(root, name, asdict(scores))
    return scores


@without_cudnn_attention()
def attribute_streamed(
    source: Source,
    extract: Dataset,
    collate: Collate,
    root: Path,
    *,
    precision: str = "no",
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> LayerScores:
    """The same scores with one decoder layer of the source in memory at a time. Each weight is read twice.

    The forward pass writes the inputs of every layer to disk. The backward pass runs each layer again on its inputs, deepest
    first, and moves the gradient of each example's answer loss one layer down.

    Args:
        source: the source, of two layers or more.
        extract: rows of :func:`hf_semalign.splits.encode`. Rows with the same content count once.
        collate: rows to a batch.
        root: the folder of all sources. The inputs are there until the scores are computed.
        precision: mixed precision of the run, which the states depend on.
        device: where the layer is.
        progress: show progress bars.

    Raises:
        OSError: too little space on the disk.
    """
    examples, last = Examples(extract), source.num_layers - 1
    facts = {"source": source.identity, "precision": precision, "purpose": "attribution"}
    folder = StateFolder(source.folder(root), facts, examples)
    columns = [Column(f"hidden-{k:03d}", source.width, source.dtype, everywhere=True) for k in range(last + 1)]
    with folder.lock():
        lacking = [column.size(examples, places) for column in columns[1:] for places in folder.missing(column).values()]
        folder.check_space(sum(lacking), "set signals_dir to a larger disk, or name a pairing")
        as_tuples = source.as_tuples  # before a layer is on the device
        _write_inputs(source, folder, columns, collate, as_tuples, device, progress)
        batches = [collate(examples.rows(np.array([place]))) for place in range(len(examples.ids))]
        head = source.head(root).to(device)
        gradients: list[torch.Tensor] = []  # of each example's loss, at the outputs of the current layer
        scores: list[torch.Tensor] = [torch.empty(0)] * (last + 1)
        for k in range(last, 0, -1):
            rows, below, above, gradients = [], [], gradients, []
            with source.layer(k, device) as anatomy:
                for place, batch in enumerate(batches):
                    batch = {key: tensor.to(device) for key, tensor in batch.items()}
                    mask, valid = batch["attention_mask"].bool(), valid_positions(batch["labels"])
                    entering = spread(folder.read(columns[k], [place]), mask).requires_grad_()
                    output, final = _run_layer(anatomy, k, entering, mask, as_tuples)
                    if k == last:
                        loss = answer_cross_entropy(final[valid], head, batch["labels"][:, 1:][valid[:, :-1]]).mean()
                        at_output, at_input = torch.autograd.grad(loss, [output, entering])
                        rows.append(example_scores(at_output * output.detach(), valid))
                    else:
                        (at_input,) = torch.autograd.grad(output, entering, above[place].to(device))
                    below.append(example_scores(at_input * entering.detach(), valid))
                    gradients.append(at_input.cpu())
            if k == last:
                scores[last] = torch.cat(rows)
            scores[k - 1] = torch.cat(below)
        for column in columns[1:]:
            folder.drop(column)
    return summarise(torch.stack(scores, dim=1), "dot")


def _write_inputs(
    source: Source,
    folder: StateFolder,
    columns: list[Column],
    collate: Collate,
    as_tuples: bool,
    device: torch.device | str,
    progress: bool,
) -> None:
    """Write the inputs of every layer but the first, one layer after the other."""
    last = len(columns) - 1
    for k in range(last):
        with source.layer(k, device) as anatomy:
            layer_pass(
                anatomy,
                folder,
                [Output(columns[k + 1], k)],
                collate,
                start=k,
                entering=partial(folder.read, columns[k]) if k else None,
                as_tuples=as_tuples,
                batch_size=1,
                device=device,
                progress=f"attribution, source layer {k + 1}/{last + 1}" if progress else None,
            )


def _run_layer(
    anatomy: Anatomy, k: int, entering: torch.Tensor, mask: torch.Tensor, as_tuples: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run layer ``k`` alone, and return its outputs ``[B, T, D]`` and, of the last layer, the decoder's final states."""
    layers, final = anatomy.layers, entering  # the decoder returns nothing if it stops before its end
    with (
        capture([layers[k]]) as (state,),
        bypass(layers[:k], entering, as_tuples=as_tuples),
        stop_after(layers[k]) if k + 1 < len(layers) else nullcontext(),
    ):
        inputs = torch.full_like(entering, torch.nan)  # nothing reads them
        final = anatomy.decoder(inputs_embeds=inputs, attention_mask=mask.long(), use_cache=False)[0]
    return state.output, final
