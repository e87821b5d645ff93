"""Checks and helpers for distributed engines: FSDP2, which shards the target's weights, and ZeRO-2, which shards the
optimizer's states.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.optim import Optimizer
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_semalign.config import REFUSED, SemAlignConfig
from hf_semalign.errors import InputError
from hf_semalign.files import make_folder
from hf_semalign.models.loading import product_seconds

logger = logging.getLogger(__name__)


def check_sharding(args: SemAlignConfig) -> None:
    """Check the FSDP settings of the accelerate config; only tested settings are allowed.

    Raises:
        ValueError: a setting is not supported; the message says why and what to use instead.
    """
    plugin = FullyShardedDataParallelPlugin()  # reads the environment variables set by `accelerate launch`
    if plugin.fsdp_version != 2:
        raise InputError(
            "FSDP1 is not supported: all parameters that it flattens together must share one requires_grad, but the frontier "
            "freezes layer by layer. Set fsdp_version: 2 in the accelerate config, as in recipes/accelerate/fsdp2.yaml."
        )
    state_dict, policy = str(plugin.state_dict_type), getattr(plugin.auto_wrap_policy, "__name__", "none")
    refused = [
        ("FULL_STATE_DICT" not in state_dict, "fsdp_state_dict_type must be FULL_STATE_DICT: an adapter is saved whole"),
        (
            policy != "transformer_auto_wrap_policy",
            "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP: the frontier freezes and trains whole layers",
        ),
        (
            plugin.cpu_ram_efficient_loading,
            "fsdp_cpu_ram_efficient_loading must be false: every process reads the heads and the source itself",
        ),
        (
            not plugin.reshard_after_forward,
            "fsdp_reshard_after_forward must be true: LoRA left unsharded by an evaluation would not follow the frontier",
        ),
        (plugin.activation_checkpointing, "fsdp_activation_checkpointing must be false: set activation_checkpointing instead"),
        (plugin.ignored_modules is not None, "fsdp_ignored_modules must not be set: their gradients would not be averaged"),
        (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "fsdp_offload_params must be false: it is untested"),
        (
            args.parallelism_config is not None or os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true",
            "parallelism_config must not be set: the combination is untested",
        ),
        (args.fp16, "fp16 is untested with FSDP: use bf16"),
        (args.signals == "online", "signals 'online' would load the whole source in every process: use 'cached'"),
    ]
    if wrong := [reason for is_so, reason in refused if is_so]:
        raise InputError(f"Not supported with FSDP: {'; '.join(wrong)}.")
    if args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise InputError(
            "The accelerate config asks for FSDP, but accelerate does not use FSDP on CPUs or in a single process: use several "
            "GPUs, or another accelerate config."
        )


def check_zero(args: SemAlignConfig) -> None:
    """Check the DeepSpeed settings of the accelerate config; only tested settings are allowed.

    Raises:
        ValueError: a setting is not supported; the message says why and what to use instead.
    """
    plugin = DeepSpeedPlugin()  # reads the environment variables set by `accelerate launch`
    config = plugin.deepspeed_config
    if plugin.zero_stage not in (1, 2):
        raise InputError(
            f"DeepSpeed is supported with zero_stage 1 and 2, not {plugin.zero_stage}: under ZeRO-3, processes would wait for "
            "each other whenever one of them runs layers of the target alone. Use recipes/accelerate/fsdp2.yaml for a target "
            "that does not fit on one GPU, and zero2.yaml or ddp.yaml for others."
        )
    refused = [
        (
            plugin.offload_optimizer_device != "none",
            "offload_optimizer_device must be none: DeepSpeed would use another optimizer, which would train frozen layers",
        ),
        (
            any(name in config for name in ("optimizer", "scheduler")),
            "its config must not set an optimizer or a scheduler: the Trainer creates them, with a schedule for each stage",
        ),
        (
            config.get("gradient_clipping") not in ("auto", args.max_grad_norm),
            f"gradient_clipping must be auto or {args.max_grad_norm} (max_grad_norm): if it is not set, DeepSpeed clips to 1",
        ),
        (
            args.parallelism_config is not None or os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true",
            "parallelism_config must not be set: the combination is untested",
        ),
        (args.fp16, "fp16 is untested with DeepSpeed: use bf16"),
    ]
    if wrong := [reason for is_so, reason in refused if is_so]:
        raise InputError(f"Not supported with DeepSpeed: {'; '.join(wrong)}.")
    if args.distributed_state.backend is None:
        raise InputError("DeepSpeed needs a distributed backend: use GPUs, or set ddp_backend gloo on CPUs.")


def autocast_under_zero(config: dict[str, Any]) -> None:
    """Use autocast for bf16, as all other engines do. DeepSpeed would cast the weights and average gradients in bf16."""
    if config["bf16"]["enabled"]:
        config["bf16"]["enabled"] = False
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def part_by_layer(optimizer: Optimizer, layers: Sequence[Sequence[nn.Parameter]]) -> None:
    """Put each layer in its own parameter group, so that ZeRO's optimizer does not change frozen layers.

    ZeRO flattens a parameter group into one vector with one optimizer state, and fills in zero gradients for frozen parameters.
    With a single group, AdamW would move layers behind the frontier by their momentum and all other frozen layers by weight
    decay, and a new layer would start at the step count of the first one. With a group per layer, a hook removes the gradients
    of frozen groups before each step.

    Args:
        optimizer: a new optimizer over all layers.
        layers: LoRA parameters by target layer.
    """
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    optimizer.param_groups = [{**settings, "params": list(own), "layer": layer} for layer, own in enumerate(layers)]

    def leave_out(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            if not layers[group["layer"]][0].requires_grad:
                for vector in group["params"]:
                    vector.grad = None

    optimizer.register_step_pre_hook(leave_out)


def check_shards(layers: nn.ModuleList, processes: int) -> None:
    """Check that every process gets rows of every LoRA matrix. accelerate finds shards by address; an empty shard has none.

    Args:
        layers: target layers with LoRA, before sharding.
        processes: number of processes.

    Raises:
        ValueError: a LoRA matrix has too few rows for all processes.
    """
    rows = {len(p) for name, p in layers.named_parameters() if "lora_" in name}
    if scarce := sorted(count for count in rows if len(torch.empty(count, 0).chunk(processes)) < processes):
        raise InputError(
            f"FSDP shards LoRA by rows, and {scarce[0]} rows are too few for {processes} processes: set lora_r to a multiple "
            "of the number of processes, or use fewer processes."
        )


def check_sharded(layers: nn.ModuleList) -> None:
    """Check that accelerate has wrapped each decoder layer in its own FSDP module.

    Raises:
        ValueError: some layers are not wrapped; the message names them.
    """
    if bare := [k for k, layer in enumerate(layers) if not isinstance(layer, FSDPModule)]:
        raise InputError(
            f"FSDP has not wrapped the decoder layers {bare}: set fsdp_transformer_layer_cls_to_wrap to their class "
            f"({type(layers[bare[0]]).__name__}) in the accelerate config."
        )


SLOW = 1.5  # warn if bfloat16 takes this many times as long as float32


def check_engine(args: SemAlignConfig) -> None:
    """Check the settings' class, the distributed engine and the output folders.

    Raises:
        ValueError: ``args`` is not a :class:`SemAlignConfig`, an engine or reporting integration is not supported or not
            installed, or a folder is not writable.
    """
    if not isinstance(args, SemAlignConfig):
        raise InputError(f"args is a {type(args).__name__}: expected a SemAlignConfig.")
    available = get_available_reporting_integrations()
    named = args.report_to or ()  # TrainingArguments has converted it to a list
    if missing := [name for name in named if name in INTEGRATION_TO_CALLBACK and name not in available]:
        raise InputError(f"report_to names {missing}, which is not installed: install it with pip, or set report_to to none.")
    if args.n_gpu > 1:
        raise InputError(f"One process sees {args.n_gpu} GPUs: use `accelerate launch`, which starts one process per GPU.")
    if is_set(compiled := "ACCELERATE_DYNAMO_BACKEND"):
        name = "torch_compile"
        raise InputError(f"The accelerate config asks for {name} ({compiled}), which is not supported: {REFUSED[name]}.")
    if is_set("ACCELERATE_USE_DEEPSPEED"):
        check_zero(args)
    if is_set("ACCELERATE_USE_FSDP"):
        check_sharding(args)
    for name in ("output_dir", "signals_dir"):
        if args.should_save and getattr(args, name) is not None:
            make_folder(name, getattr(args, name))


def is_set(variable: str) -> bool:
    """Whether one of accelerate's environment variables is set to a true value."""
    return os.environ.get(variable, "no").lower() not in ("no", "false", "0", "")


def warn_of_slow_bf16(args: SemAlignConfig) -> None:
    """Log a warning if bf16 is on and this CPU multiplies bfloat16 much more slowly than float32."""
    if args.bf16 and args.device.type == "cpu":
        times = product_seconds(torch.bfloat16) / product_seconds(torch.float32)
        if times > SLOW:
            logger.warning("This CPU multiplies bfloat16 %.0f times more slowly than float32: consider bf16=False.", times)
