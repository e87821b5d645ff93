"""Settings of a transfer: transformers' ``TrainingArguments`` and the method's own."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field, fields
from inspect import signature
from numbers import Integral
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_xla_available

from hf_semalign.errors import InputError, brief
from hf_semalign.kinds import check_kinds
from hf_semalign.method.frontier import BUDGETS, FRONTIERS
from hf_semalign.method.pairing import STRATEGIES
from hf_semalign.method.semantic_map import KINDS

CHOICES = {
    "map_kind": KINDS,
    "scale": ("none", "match"),
    "layer_loss": ("relation", "steering", "fisher"),
    "output_loss": ("kl", "cosine", "answers"),
    "stage_budget": BUDGETS,
    "frontier": FRONTIERS,
    "signals": ("cached", "online"),
    "source_memory": ("resident", "stream"),
    "prefix_memory": ("auto", "device", "host", "none"),
}
WIDER: dict[str, Any] = {  # types that are wider than the annotations of TrainingArguments
    "resume_from_checkpoint": str | bool | None, "debug": str | list | None, "accelerator_config": Any, "pairing": Any,
}  # fmt: skip
LEAST = {
    "learning_rate": 0, "num_train_epochs": 0, "relation_weight": 0, "kl_weight": 0, "seed": 0, "max_length": 1,
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1, "lora_r": 1,
    "lora_alpha": 1, "weight_decay": 0, "adam_beta1": 0, "adam_beta2": 0, "adam_epsilon": 0, "dataloader_num_workers": 0,
}  # fmt: skip
MOST_SEED = 2**32 - 1
REFUSED = {
    "hub_always_push": "a run is published once, when it is finished",
    "auto_find_batch_size": "a different batch size would move the stage boundaries; set per_device_train_batch_size",
    "bf16_full_eval": "the target must keep one dtype throughout training; load it in bfloat16, or use bf16",
    "fp16_full_eval": "the target must keep one dtype throughout training; load it in float16, or use fp16",
    "torch_compile": "compiled frames would be reused after the frontier moves",
    "torch_compile_backend": "compiled frames would be reused after the frontier moves",
    "torch_compile_mode": "compiled frames would be reused after the frontier moves",
    "use_liger_kernel": "its fused loss would never be called, and the losses here never build the full logits either",
    "neftune_noise_alpha": "cached states would not contain the noise",
    "use_cache": "training keeps no keys and values",
    "optim_target_modules": "only LoRA trains; use lora_targets to choose its modules",
    "batch_eval_metrics": "evaluate() measures KL and losses, and takes no compute_metrics",
    "include_for_metrics": "evaluate() measures KL and losses, and takes no compute_metrics",
    "enable_jit_checkpoint": "SIGTERM already saves a checkpoint at the end of the step",
    "parallelism_config": "choose DDP, FSDP2 or ZeRO-2 in an accelerate config, as in recipes/accelerate",
    "ddp_static_graph": "the layers that have a gradient change with the frontier",
    "fsdp_config": "choose FSDP2 in an accelerate config, as in recipes/accelerate/fsdp2.yaml",
    "fsdp": "choose FSDP2 in an accelerate config, as in recipes/accelerate/fsdp2.yaml",
    "deepspeed": "choose ZeRO-2 in an accelerate config, as in recipes/accelerate/zero2.yaml",
}


@dataclass
class SemAlignConfig(TrainingArguments):
    """``TrainingArguments`` plus the settings of SemAlign.

    In our measurements, the defaults are within the spread of the best settings. The paper uses ``frontier="single"``,
    ``pairing="attribution"`` and ``relation_weight=1.0``, and otherwise the defaults.

    ``num_train_epochs`` or ``max_steps`` sets the budget of the whole run, or of every stage under
    ``stage_budget="per_stage"``. The learning-rate schedule restarts with each stage.

    Raises:
        ValueError: a value is outside its choices or range, or a Trainer setting is not supported.
    """

    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate of every stage."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Budget in epochs, divided among the stages."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Examples per device and forward pass."})
    pairing: str = field(
        default="last",
        metadata={"help": f"Strategy ({', '.join(STRATEGIES)}), or a list with the 0-based source layer of each target layer."},
    )
    map_kind: str = field(default="readout", metadata={"help": f"Map between the spaces: {', '.join(KINDS)}."})
    scale: str = field(
        default="none",
        metadata={"help": "none (the paper), or match: scale mapped states to the mean norm of the target layer's outputs."},
    )
    relation_weight: float = field(default=0.1, metadata={"help": "Weight of the layer loss."})
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of the output loss."})
    layer_loss: str = field(
        default="relation",
        metadata={
            "help": "relation: cosines of residual updates (equations 4 to 7); steering: cosine of the states (version 1 of "
            "the paper); fisher: second-order KL of the logits (published version)."
        },
    )
    output_loss: str = field(
        default="kl",
        metadata={
            "help": "kl: KL(source || target); cosine: 1 - cos of the final state and the mapped one (version 1); answers: "
            "cross-entropy of the answers, which does not use the source."
        },
    )
    stage_budget: str = field(
        default="split", metadata={"help": "Whether the budget is for the whole run (split) or for every stage (per_stage)."}
    )
    frontier: str = field(
        default="joint", metadata={"help": "joint (all layers), single (the paper) or cumulative (layers up to k train)."}
    )
    signals: str = field(
        default="cached",
        metadata={"help": "cached: run the source once and keep its states on disk; online: run it on every batch."},
    )
    signals_dir: str | None = field(
        default=None, metadata={"help": "Folder of cached signals, which runs can share; by default output_dir/_signals."}
    )
    source_memory: str = field(
        default="resident",
        metadata={"help": "resident: load the whole source; stream: load one of its layers at a time."},
    )
    prefix_memory: str = field(
        default="auto",
        metadata={
            "help": "Where the target prefix of frontier='single' is held: device, host, none, or auto: on the device if a "
            "quarter of its free memory is enough, otherwise on the host."
        },
    )
    source_parts: dict | str | None = field(
        default=None,
        metadata={"help": "Module paths of the source's decoder, layers and head; override when auto-detection fails."},
    )
    target_parts: dict | str | None = field(default=None, metadata={"help": "The same for the target."})
    max_length: int | None = field(default=1024, metadata={"help": "Longer sequences are truncated at the end."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha."})
    lora_targets: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that get LoRA; by default FFN up and down projections, attention value and output."},
    )

    def __post_init__(self) -> None:
        """Check the values and complete the Trainer's."""
        self._check_values()
        self._read_pairing()
        if self.lora_targets == []:
            raise InputError("lora_targets is []: expected a list of module names.")
        if self.signals_dir is not None:
            self.signals_dir = str(Path(self.signals_dir).expanduser())
        if self.source_memory == "stream" and self.signals == "online":
            raise InputError("source_memory 'stream' needs cached signals: with signals='online' the source must be resident.")
        self._refuse_unsupported()
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith(("kl", "relation", "per_byte")):
            self.greater_is_better = False  # transformers assumes this only for names that end in "loss"
        if self.bf16 and not torch.accelerator.is_available() and not is_torch_xla_available():
            self.use_cpu = True  # without an accelerator, transformers refuses bf16 unless this is set
        super().__post_init__()
        self._check_completed()

    def _check_values(self) -> None:
        """Check types, choices and ranges."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}: expected one of {choices}.")
        for item in fields(TrainingArguments):
            value, known = getattr(self, item.name), item.metadata.get("choices")
            if known is not None and value not in (item.default, *known):
                raise InputError(f"{item.name} is {value!r}: expected one of {', '.join(map(str, known))}.")
        for name, hint in (get_type_hints(SemAlignConfig) | WIDER).items():
            if name not in REFUSED:
                check_kinds(getattr(self, name), hint, name)
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise InputError(f"{name} is {value}: expected a finite number of at least {least}.")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name} is {value}: expected a finite number.")
        if (largest := max(self.adam_beta1, self.adam_beta2)) >= 1:
            raise InputError(f"adam_beta1 or adam_beta2 is {largest}: expected a number below 1.")
        if self.seed > MOST_SEED:
            raise InputError(f"seed is {self.seed}: expected at most {MOST_SEED}, the largest seed that numpy accepts.")
        if self.max_steps < 1 and self.max_steps != -1:
            raise InputError(f"max_steps is {self.max_steps}: expected at least 1, or -1 to use num_train_epochs.")
        if self.relation_weight + self.kl_weight == 0:
            raise InputError("relation_weight and kl_weight are both 0: expected at least one loss to train on.")

    def _read_pairing(self) -> None:
        """Read a list that a command line gave as text, and check the pairing."""
        with suppress(TypeError, json.JSONDecodeError):
            self.pairing = json.loads(self.pairing)
        pairing: Any = self.pairing
        listed = isinstance(pairing, (list, tuple)) and all(isinstance(layer, Integral) for layer in pairing)
        if not listed and pairing not in STRATEGIES:
            raise InputError(f"pairing is {pairing!r}: expected one of {STRATEGIES} or a list of source layers, as numbers.")

    def _refuse_unsupported(self) -> None:
        """Refuse Trainer settings that the method cannot honour."""
        if self.label_smoothing_factor != 0:
            raise InputError("label_smoothing_factor must be 0: the output loss is a KL to the source and uses no labels.")
        for name, reason in REFUSED.items():
            if getattr(self, name):
                raise InputError(f"{name} is not supported: {reason}.")
        if self.label_names not in (None, ["labels"]):
            raise InputError(f"label_names is {self.label_names!r}: expected ['labels'], the only label column of the rows.")
        if self.train_sampling_strategy == "batch_rebalance" or not self.dataloader_in_order:
            raise InputError(
                "train_sampling_strategy must not be 'batch_rebalance', and dataloader_in_order must not be False: a run can "
                "only resume within an epoch if the batches keep their order, with the partial one last."
            )
        if self.ddp_find_unused_parameters is False and self.frontier != "joint":
            raise InputError("ddp_find_unused_parameters must not be False: layers outside the frontier have no gradient.")
        if not self.average_tokens_across_devices:
            raise InputError("average_tokens_across_devices must be True: losses are means over the global batch.")

    def _check_completed(self) -> None:
        """Check the settings that ``TrainingArguments`` has parsed."""
        for name, value in vars(self).items():
            if name.endswith("_kwargs") and value is not None and not isinstance(value, dict):
                raise InputError(f"{name} is {value!r}: expected names and values.")
        get_reporting_integration_callbacks(self.report_to)  # raises an error for an unknown name
        try:
            Trainer.get_optimizer_cls_and_kwargs(self)
        except (ImportError, ValueError) as error:
            name = OptimizerNames(self.optim).value
            raise InputError(f"optim {name!r} with optim_args {self.optim_args!r} cannot be used: {brief(error)}") from error
        if self.hub_strategy not in ("every_save", "end"):
            raise InputError(f"hub_strategy is {self.hub_strategy!r}: expected 'end', because a run is published at its end.")
        loading: Any = self.accelerator_config
        if not loading.even_batches or loading.split_batches or loading.dispatch_batches:
            raise InputError(
                "accelerator_config must keep even_batches True, and split_batches and dispatch_batches False. Otherwise the "
                "filler rows of an epoch's last batch would be trained on, or ranks would wait for one with fewer batches."
            )
        kwargs: Any = self.activation_checkpointing_kwargs or {}
        if unknown := sorted(kwargs.keys() - signature(checkpoint).parameters.keys()):
            raise InputError(f"activation_checkpointing_kwargs has {unknown}, which torch.utils.checkpoint does not accept.")
        if self.activation_checkpointing and kwargs.get("use_reentrant"):
            raise InputError("use_reentrant must be False: reentrant checkpointing detaches the layer losses from the graph.")

    @property
    def uses_pairs(self) -> bool:
        """Whether paired layers matter: with ``relation_weight=0`` nothing is scored, mapped or scaled."""
        return self.relation_weight > 0

    @property
    def matches_scales(self) -> bool:
        """Whether mapped states are scaled, see ``scale``."""
        return self.uses_pairs and self.scale == "match"

    @property
    def learns_from_source(self) -> bool:
        """Whether training uses the source's signals."""
        return self.uses_pairs or self.output_loss != "answers"

    def planned_steps(self, num_examples: int) -> int:
        """Optimizer steps of the run, or of each stage under ``per_stage``.

        Args:
            num_examples: training examples. They matter only if ``max_steps`` is not set; ``num_train_epochs`` then counts.

        Raises:
            ValueError: ``dataloader_drop_last`` is set and there are fewer examples than fill one batch.
        """
        rounded = math.floor if self.dataloader_drop_last else math.ceil
        batches = rounded(num_examples / (self.train_batch_size * self.world_size))
        if batches == 0:
            raise InputError(
                f"dataloader_drop_last would drop all {num_examples} training rows, which do not fill one batch of "
                f"{self.train_batch_size * self.world_size}: leave it out, or lower per_device_train_batch_size."
            )
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.num_train_epochs * max(1, math.ceil(batches / self.gradient_accumulation_steps)))
