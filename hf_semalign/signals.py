"""Source signals: what the frozen source tells the target about a batch (method, section 7).

A signal is the mapped state of each wanted pair and the source's final hidden state at the valid positions; the source's
head is applied at training time, which is exact and far smaller than logits. The source is frozen and the data are fixed, so
its signals are computed once (:class:`SourceSignals`); :class:`OnlineSignals` runs the source on every batch instead.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_semalign.anatomy import dissect
from hf_semalign.hooks import capture
from hf_semalign.pairing import LayerPairing
from hf_semalign.semantics import SemanticMap, checksum
from hf_semalign.splits import valid_positions

logger = logging.getLogger(__name__)
Batch = Mapping[str, torch.Tensor]
MANIFEST = "manifest.json"
SHARD_EXAMPLES = 4096
SHARD_BYTES = 2**29  # a shard is held in memory while it is made, and is what an interrupted pass can lose


@dataclass(frozen=True)
class BatchSignals:
    """Source signals of one batch.

    Attributes:
        supervision: mapped states ``y~`` ``[B, T, D_tgt]``, one for each wanted target layer; what stands at positions that
            are not valid means nothing.
        final: the source's final hidden states at the valid positions, ``[N, D_src]``.
    """

    supervision: list[torch.Tensor]
    final: torch.Tensor


class OnlineSignals:
    """Runs the source on every batch.

    Args:
        source: the source model; put into evaluation mode, without gradients.
        pairing: which source layer goes with which target layer.
        semantic_map: map between the spaces.
        scales: one factor on the mapped states for each pair.
    """

    def __init__(
        self,
        source: PreTrainedModel,
        pairing: LayerPairing,
        semantic_map: SemanticMap,
        scales: Sequence[float],
    ) -> None:
        self.source = source.eval().requires_grad_(False)
        self.pairing = pairing
        self.semantic_map = semantic_map
        self.scales = scales

    @torch.no_grad()
    def __call__(self, batch: Batch, target_layers: Sequence[int]) -> BatchSignals:
        """Signals of a batch.

        Args:
            batch: ``input_ids, attention_mask, labels`` ``[B, T]`` on the source's device.
            target_layers: target layers whose supervision is wanted.
        """
        anatomy = dissect(self.source)
        with capture([anatomy.layers[self.pairing.source_layers[k]] for k in target_layers]) as states:
            final = anatomy.decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
        supervision = [
            self.semantic_map(state.output.float()) * self.scales[k] for k, state in zip(target_layers, states, strict=True)
        ]
        return BatchSignals(supervision, final[valid_positions(batch["labels"])])

    def fingerprint(self) -> dict[str, Any]:
        """All that the signals of an example depend on, but for the example: every weight of the source among it."""
        weights = hashlib.sha256()
        for name, tensor in self.source.state_dict().items():
            weights.update(f"{name} {checksum(tensor)}".encode())
        return {
            "source_weights": weights.hexdigest(),
            "source_layers": list(self.pairing.source_layers),
            "map": self.semantic_map.fingerprint,
            "scales": list(self.scales),
            "hf_semalign": version("hf_semalign"),
        }


class SourceSignals:
    """Source signals of a data set on disk, memory-mapped and found by example id; reading them needs no source.

    Args:
        folder: a folder that :meth:`prepare` has completed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = json.loads((folder / MANIFEST).read_text())
        self._shards: list[dict[str, torch.Tensor]] = []
        self._spans: dict[int, tuple[int, int, int]] = {}  # example id: shard, first and last valid position
        for index, name in enumerate(manifest["shards"]):
            with safe_open(folder / name, framework="pt") as file:
                shard = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            self._shards.append(shard)
            ids, offsets = shard["example_id"].tolist(), shard["offsets"].tolist()
            self._spans |= {key: (index, offsets[row], offsets[row + 1]) for row, key in enumerate(ids)}

    def __call__(self, batch: Batch, target_layers: Sequence[int]) -> BatchSignals:
        """Signals of a batch, on the device of its labels.

        Args:
            batch: ``labels`` ``[B, T]`` and ``example_id`` ``[B]``.
            target_layers: target layers whose supervision is wanted.

        Raises:
            ValueError: an example whose signals were not computed.
        """
        labels = batch["labels"]
        valid = valid_positions(labels)
        spans = [self._span(key) for key in batch["example_id"].tolist()]

        supervision = []
        for layer in target_layers:
            states = torch.cat([self._shards[shard]["states"][layer, first:last] for shard, first, last in spans])
            supervision.append(states.new_zeros(*labels.shape, states.shape[-1], device=labels.device))
            supervision[-1][valid] = states.to(labels.device)
        final = torch.cat([self._shards[shard]["final"][first:last] for shard, first, last in spans])
        return BatchSignals(supervision, final.to(labels.device))

    def _span(self, example_id: int) -> tuple[int, int, int]:
        if example_id not in self._spans:
            raise ValueError(
                f"No source signals for example {example_id} in {self.folder}: they cover the training and evaluation data "
                "that the trainer was made with. Make it with these data, or set signals='online'."
            )
        return self._spans[example_id]

    @classmethod
    def prepare(
        cls,
        online: OnlineSignals,
        dataset: Dataset,
        collate: Callable[[list[dict]], dict[str, torch.Tensor]],
        root: Path,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        dtype: torch.dtype = torch.float32,
        progress: bool = True,
    ) -> SourceSignals:
        """Open the signals of a data set, after one pass of the source over what is missing.

        The folder's name under ``root`` is a fingerprint of source weights, pairs, map, scales, data, dtype and library
        version, so that stale signals are never found. Shards appear whole, with a checksum in the manifest: an interrupted
        pass goes on after its last whole shard, and a damaged shard is computed again. Runs may share a root.

        Args:
            online: computes the signals.
            dataset: rows of :func:`hf_semalign.splits.encode`; rows of one content are computed once.
            collate: rows to a batch.
            root: where the folder goes.
            device: where the source is.
            batch_size: examples a forward pass.
            dtype: of the signals on disk.
            progress: show a progress bar.

        Raises:
            OSError: the disk has too little space, with both figures.
        """
        rows = list({row["example_id"]: row for row in dataset}.values())
        facts = {**online.fingerprint(), "dtype": str(dtype), "examples": _digest([row["example_id"] for row in rows])}
        folder = root / _digest(facts)[:16]
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "writing.lock"):
            shards = _whole_shards(folder)
            width = _bytes_per_position(online, dtype)
            names = {f"shard-{index:05d}.safetensors": members for index, members in enumerate(_cut(rows, width))}
            missing = {name: members for name, members in names.items() if name not in shards}
            if missing:
                _check_space(width * sum(_valid_count(row) for members in missing.values() for row in members), folder)
            bar = tqdm(
                total=sum(map(len, missing.values())), desc="source signals", unit="ex", disable=not (progress and missing)
            )
            for name, members in missing.items():
                tensors = _shard(_signals_of(online, members, collate, batch_size, device, dtype, bar), members)
                unfinished = folder / f"{name}.unfinished"
                save_file(tensors, unfinished)
                shards[name] = _file_digest(unfinished)
                unfinished.replace(folder / name)
                _write_manifest(folder, {"fingerprint": facts, "shards": dict(sorted(shards.items()))})
            bar.close()
        return cls(folder)


def _signals_of(
    online: OnlineSignals,
    rows: Sequence[dict],
    collate: Callable[[list[dict]], dict[str, torch.Tensor]],
    batch_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    bar: tqdm,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """States ``[L_tgt, N, D_tgt]`` and final states ``[N, D_src]`` of one batch after another, at valid positions."""
    for start in range(0, len(rows), batch_size):
        members = list(rows[start : start + batch_size])
        batch = {key: tensor.to(device) for key, tensor in collate(members).items()}
        signals = online(batch, range(len(online.pairing.source_layers)))
        valid = valid_positions(batch["labels"])
        states = torch.stack([state[valid] for state in signals.supervision])
        yield states.to("cpu", dtype), signals.final.to("cpu", dtype)
        bar.update(len(members))


def _shard(signals: Iterator[tuple[torch.Tensor, torch.Tensor]], rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    states, final = zip(*signals, strict=True)
    counts = torch.tensor([0, *(_valid_count(row) for row in rows)])
    return {
        "states": torch.cat(states, dim=1),
        "final": torch.cat(final),
        "example_id": torch.tensor([row["example_id"] for row in rows]),
        "offsets": counts.cumsum(0),
    }


def _valid_count(row: Mapping[str, Any]) -> int:
    return int(valid_positions(torch.tensor([row["labels"]])).sum())


def _whole_shards(folder: Path) -> dict[str, str]:
    """Digest by name of the shards that are as they were written; what is not is named and left out."""
    try:
        recorded = dict(json.loads((folder / MANIFEST).read_text())["shards"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%r): all source signals are computed again.", folder / MANIFEST, error)
        return {}
    whole = {}
    for name, digest in recorded.items():
        if (folder / name).is_file() and _file_digest(folder / name) == digest:
            whole[name] = digest
        else:
            logger.warning("%s is missing or damaged, and is computed again.", folder / name)
    return whole


def _bytes_per_position(online: OnlineSignals, dtype: torch.dtype) -> int:
    target_width, source_width = online.semantic_map.matrix.shape
    return (len(online.pairing.source_layers) * target_width + source_width) * dtype.itemsize


def _cut(rows: Sequence[dict], width: int) -> list[list[dict]]:
    """Rows by shard, at most ``SHARD_EXAMPLES`` and about ``SHARD_BYTES`` each."""
    shards: list[list[dict]] = []
    size = 0
    for row in rows:
        count = width * _valid_count(row)
        if not shards or len(shards[-1]) == SHARD_EXAMPLES or size + count > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += count
    return shards


def _check_space(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    logger.info("Source signals: %.1f MB in %s (%.0f MB free)", needed / 1e6, folder, free / 1e6)
    if needed > free:
        raise OSError(
            f"The source signals need {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free: set signals_dir "
            "to a larger disk, or signals='online'."
        )


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    unfinished = folder / f"{MANIFEST}.unfinished"
    unfinished.write_text(json.dumps(manifest, indent=1))
    unfinished.replace(folder / MANIFEST)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
