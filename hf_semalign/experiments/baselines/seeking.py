"""Seeking (PostPKT; Zhong et al., ICLR 2024): weights of the source as the start of the target's LoRA, then fine-tuning.

1. Sensitivity of each weight of the source on the extract split: ``S = sum_j |theta * d loss_j / d theta|``, ``loss_j`` the
   mean cross-entropy of example ``j`` over its answer.
2. The source layers with the largest sums of ``S`` over all their parameters, in order of depth, one for each target layer.
3. Of each source matrix the contiguous window of the target's shape with the largest sum of ``S``.
4. LoRA starts as the window's best approximation of rank ``r``, ``B0 A0`` (up to here :func:`.extraction.extract`), and the
   base as ``W - B0 A0``, so that the function at the first step is the target's.
5. Fine-tuning on the answers of the align split. What is published is ``[B, -B0] [A; A0]``, of rank ``2 r``, on the target as
   it was (:func:`fold`).

Which module of the source supplies which of the target is decided by role
(:data:`hf_semalign.experiments.baselines.projections.ROLES`): where names agree that is by name, and else query to query and
so on, with the rows of a fused projection taken for themselves, and the first matrix of an FFN without a gate for ``up``.
Each matrix has its window by itself, of its own shape. A value or key projection of grouped-query attention that has fewer
rows than the target's counts each head once for every query head that reads it, which is the same function; any other source
matrix that is smaller than the target's is refused.

Where this differs from the authors' code: LoRA, rank and dropout (theirs 0.05, ours 0) are those of every other method here,
by default value and output projections and FFN up and down, and never embeddings or head, which theirs has on its list;
``lora_targets`` gives their other modules. Budget, batch and learning rate are the recipe's.
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
    """``B A - B0 A0`` as one product ``B' A'``: ``A' = [A; A0]`` ``[2 r, w]`` and ``B' = [B, -B0]`` ``[h, 2 r]``.

    Args:
        down: ``A`` ``[r, w]``.
        up: ``B`` ``[h, r]``.
        first_down: ``A0`` ``[r, w]``.
        first_up: ``B0`` ``[h, r]``.
    """
    return torch.cat((down, first_down.to(down))), torch.cat((up, -first_up.to(up)), dim=1)


def extraction_cost(known: Preparation, args: SemAlignConfig) -> dict[str, float]:
    """The source forward over the extract split, and backward, which costs twice that: to states and to weights."""
    extract = Counts.of(known.source_splits["extract"])
    return {"sensitivities": 3 * Size.of(dissect(known.source.shape)).forward(extract.tokens, extract.valid)}


class SeekingTrainer(SFTTrainer):
    """Fine-tuning from a start that the source's weights give, see the top of this module.

    Arguments as of :class:`hf_semalign.trainer.SemAlignTrainer`; sensitivities are of the extract split. The base weights of
    ``model`` are changed, also of one that is given in memory. Checkpoints hold ``A`` and ``B``, which belong to the changed
    base; what :meth:`save_model` writes belongs to the target as it was. In bfloat16 they differ by the rounding of the changed
    base, which the record states.

    Attributes:
        extraction: what was taken out of the source.

    Raises:
        ValueError: models that the method cannot use, before any weight is loaded.
    """

    method = "seeking"
    needs_extract = True

    @classmethod
    def check(cls, known: Preparation, args: SemAlignConfig) -> None:
        """Refuse settings and models that Seeking cannot work with; of the models the shape is looked at."""
        if is_set("ACCELERATE_USE_FSDP") or is_set("ACCELERATE_USE_DEEPSPEED"):
            raise InputError("Seeking changes the target's weights, which was never tried under FSDP or DeepSpeed: use DDP.")
        if args.source_memory == "stream":
            raise InputError("Seeking needs the gradients of the whole source: source_memory must be 'resident'.")
        target_config = cast(Any, known.target.decoder).config
        for name, quantised in ((known.source.name, known.source.quantised), (known.target_id, is_quantised(target_config))):
            if quantised:
                raise InputError(f"{name} is quantised: Seeking needs plain weights of source and target.")
        Needs.of(dissect(known.source.shape), known.target, args.lora_targets)

    def _adapt(self, target: PreTrainedModel, args: SemAlignConfig) -> PeftModel:
        """Look at the target's modules while they are bare."""
        self._needs = Needs.of(dissect(self.source.shape), dissect(target), args.lora_targets)
        return super()._adapt(target, args)

    def _ask_source(self) -> None:
        """Take the start out of the source, and put it into LoRA and base."""
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
        """Set LoRA to ``A0`` and ``B0``, and take ``B0 A0`` off the base.

        Returns:
            The largest relative error of a base weight and its LoRA together against the weight that was there.
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
        """Also what was taken out of the source, and how often it ran for that."""
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
        """The adapter for the target as it was, of rank ``2 r``; in checkpoints ``A`` and ``B``."""
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
        wider.r, wider.lora_alpha = 2 * config.r, 2 * config.lora_alpha  # the scale stays
        try:
            if self.args.should_save:
                self.save_weights(Path(str(output_dir or self.args.output_dir)), folded)
        finally:
            adapted.peft_config["default"] = config
