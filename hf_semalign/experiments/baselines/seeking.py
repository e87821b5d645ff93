"""Seeking (PostPKT; Zhong et al., ICLR 2024): initialise the target's LoRA from weights of the source, then fine-tune it.

1. Compute the sensitivity of each weight of the source on the extract split: ``S = sum_j |theta * d loss_j / d theta|``,
   where ``loss_j`` is the mean cross-entropy of example ``j`` over its answer.
2. Select the source layers with the largest sums of ``S`` over all their parameters, one per target layer, in order of depth.
3. In each source matrix, select the contiguous window of the target's shape with the largest sum of ``S``.
4. Initialise LoRA with the window's best approximation of rank ``r``, ``B0 A0`` (:func:`.extraction.extract` does steps 1 to
   4). Replace the base weights by ``W - B0 A0``, so that training starts at the target's function.
5. Fine-tune on the answers of the align split. The published adapter is ``[B, -B0] [A; A0]`` of rank ``2 r``, for the
   unchanged target (:func:`fold`).

Modules of source and target are matched by role (:data:`hf_semalign.experiments.baselines.projections.ROLES`): query to query,
key to key, and so on. The parts of a fused projection are matched separately. In an FFN without a gate, the first matrix is
``up``. Each matrix has its own window. If a value or key projection of grouped-query attention has fewer rows than the
target's, each head is repeated for every query head that reads it, which computes the same function. Any other source matrix
that is smaller than the target's is an error.

Differences from the authors' code: LoRA modules, rank and dropout are the same as for all other methods here. The default
modules are value and output projections and FFN up and down. Dropout is 0 (theirs: 0.05). Embeddings and head, which their
list includes, never get LoRA; their other modules can be set with ``lora_targets``. Budget, batch size and learning rate come
from the recipe.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from hf_semalign.config import SemAlignConfig
from hf_semalign.errors import InputError
from hf_semalign.experiments.baselines.extraction import Needs, extract_once
from hf_semalign.experiments.baselines.projections import oriented
from hf_semalign.experiments.baselines.sft import SFTTrainer
from hf_semalign.files import checksum, digest
from hf_semalign.models.anatomy import Size, dissect
from hf_semalign.models.loading import is_quantised
from hf_semalign.training.engines import is_set
from hf_semalign.training.preparation import Counts, Preparation
from hf_semalign.transfer import signals_root, timed


def fold(
    down: torch.Tensor, up: torch.Tensor, first_down: torch.Tensor, first_up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write ``B A - B0 A0`` as one product ``B' A'``, with ``A' = [A; A0]`` ``[2 r, w]`` and ``B' = [B, -B0]`` ``[h, 2 r]``.

    Args:
        down: ``A`` ``[r, w]``.
        up: ``B`` ``[h, r]``.
        first_down: ``A0`` ``[r, w]``.
        first_up: ``B0`` ``[h, r]``.
    """
    return torch.cat((down, first_down.to(down))), torch.cat((up, -first_up.to(up)), dim=1)


def extraction_cost(known: Preparation, args: SemAlignConfig) -> dict[str, float]:
    """Cost of a forward and a backward pass of the source over the extract split. The backward pass costs two forwards."""
    extract = Counts.of(known.source_splits["extract"])
    return {"sensitivities": 3 * Size.of(dissect(known.source.shape)).forward(extract.tokens, extract.valid)}


class SeekingTrainer(SFTTrainer):
    """Fine-tune LoRA that is initialised from the source's weights. The module docstring describes the method.

    It takes the arguments of :class:`hf_semalign.trainer.SemAlignTrainer`. Sensitivities are computed on the extract split.

    The base weights of ``model`` are modified in place, even if you pass a model instead of a name. Checkpoints contain ``A``
    and ``B`` for the modified base. :meth:`save_model` writes an adapter for the unchanged target. In bfloat16 the two differ
    by the rounding of the modified base, which the record states.

    Attributes:
        extraction: the weights that were extracted from the source.

    Raises:
        ValueError: the method does not support the models. This is checked before weights are loaded.
    """

    method = "seeking"
    needs_extract = True

    @classmethod
    def check(cls, known: Preparation, args: SemAlignConfig) -> None:
        """Refuse settings and models that Seeking does not support. Needs only the shapes of the models."""
        if is_set("ACCELERATE_USE_FSDP") or is_set("ACCELERATE_USE_DEEPSPEED"):
            raise InputError("Seeking changes the target's weights, which is untested under FSDP and DeepSpeed: use DDP.")
        if args.source_memory == "stream":
            raise InputError("Seeking needs the gradients of the whole source: source_memory must be 'resident'.")
        target_config = cast(Any, known.target.decoder).config
        for name, quantised in ((known.source.name, known.source.quantised), (known.target_id, is_quantised(target_config))):
            if quantised:
                raise InputError(f"{name} is quantised: Seeking needs a source and a target that are not quantised.")
        Needs.of(dissect(known.source.shape), known.target, args.lora_targets)

    def _adapt(self, target: PreTrainedModel, args: SemAlignConfig) -> PeftModel:
        """Record the target's modules before LoRA is added."""
        self._needs = Needs.of(dissect(self.source.shape), dissect(target), args.lora_targets)
        return super()._adapt(target, args)

    def _ask_source(self) -> None:
        """Extract the initial weights from the source, and write them into LoRA and base."""
        args, known = self.args, self.known
        with timed("sensitivities", self.seconds):
            found = extract_once(
                self.source,
                self._needs,
                known.source_splits["extract"],
                known.source_collator,
                None if args.signals == "online" else signals_root(args),
                rank=args.lora_r,
                device=args.device,
                progress=not args.disable_tqdm,
            )
        (self.extraction,) = broadcast_object_list([found])  # kernels may differ in the last bits between ranks
        self._base_rounding = self._start()

    @torch.no_grad()
    def _start(self) -> float:
        """Set LoRA to ``A0`` and ``B0``, and subtract ``B0 A0`` from the base.

        Returns:
            The largest relative error of base weight plus LoRA, compared with the original weight.
        """
        errors = [0.0]
        for layer, factors in zip(self.target_anatomy.layers, self.extraction.factors, strict=True):
            for path, (first_down, first_up) in factors.items():
                module = cast(LoraLayer, layer.get_submodule(path))
                down, up = (side["default"].get_parameter("weight") for side in (module.lora_A, module.lora_B))
                down.copy_(first_down)
                up.copy_(first_up)
                base = module.get_base_layer()
                weight = oriented(base, base.get_parameter("weight"))
                added = module.scaling["default"] * up.float() @ down.float()
                before = weight.float().clone()
                weight.copy_(before - added)
                errors.append((torch.dist(weight.float() + added, before) / before.norm().clamp_min(1e-30)).item())
        return max(errors)

    def record(self) -> dict[str, Any]:
        """The record, with what was extracted from the source and how many passes that took."""
        self.prepare()
        found = self.extraction
        factors = [checksum(one) for layer in found.factors for pair in layer.values() for one in pair]
        return {
            **super().record(),
            "seeking": {
                "scores": found.scores,
                "source_layers": found.source_layers,
                "windows": found.windows,
                "extract": found.examples,
                "source_passes": {"forward": found.examples, "backward": found.examples},
                "adapter_rank": 2 * self.args.lora_r,
                "base_rounding": self._base_rounding,
                "start": digest(factors),
            },
        }

    def write_adapter(self, output_dir: str | None, *, checkpoint: bool) -> None:
        """Write the adapter of rank ``2 r`` for the unchanged target, or in a checkpoint ``A`` and ``B``."""
        if checkpoint:
            return super().write_adapter(output_dir, checkpoint=True)
        self.prepare()
        adapted = cast(PeftModel, self.accelerator.unwrap_model(self.model))
        names = {id(module): name for name, module in adapted.named_modules()}
        folded = {}
        for layer, factors in zip(self.target_anatomy.layers, self.extraction.factors, strict=True):
            for path, first in factors.items():
                module = cast(LoraLayer, layer.get_submodule(path))
                pair = (side["default"].get_parameter("weight").detach() for side in (module.lora_A, module.lora_B))
                for side, matrix in zip(("lora_A", "lora_B"), fold(*pair, *first), strict=True):
                    folded[f"{names[id(module)]}.{side}.default.weight"] = matrix.cpu()
        config = cast(LoraConfig, adapted.peft_config["default"])
        adapted.peft_config["default"] = wider = copy(config)
        wider.r, wider.lora_alpha = 2 * config.r, 2 * config.lora_alpha  # keeps the scale
        try:
            if self.args.should_save:
                self.save_weights(Path(str(output_dir or self.args.output_dir)), folded)
        finally:
            adapted.peft_config["default"] = config
