"""FSDP2, where each process holds a part of the target's weights, put together as its layers run; ZeRO-2, a part of the
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
    """Refuse what is not known to work of the FSDP that the accelerate config asks for.

    Raises:
        ValueError: what, why, and what to take instead.
    """
    plugin = FullyShardedDataParallelPlugin()  # of the environment that `accelerate launch` has made
    if plugin.fsdp_version != 2:
        raise InputError(
            "FSDP1 is not supported: it wants one requires_grad for all that it flattens together, and the frontier freezes "
            "layer by layer. Set fsdp_version: 2 in the accelerate config, as in recipes/accelerate/fsdp2.yaml."
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
            "fsdp_reshard_after_forward must be true: LoRA that an evaluation leaves unsharded would miss the frontier's move",
        ),
        (plugin.activation_checkpointing, "fsdp_activation_checkpointing must be false: set activation_checkpointing instead"),
        (plugin.ignored_modules is not None, "fsdp_ignored_modules must not be set: no gradient of theirs would be averaged"),
        (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "fsdp_offload_params must be false: it was never tried"),
        (
            args.parallelism_config is not None or os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true",
            "a parallelism_config beside it was never tried",
        ),
        (args.fp16, "fp16 was never tried with FSDP: use bf16"),
        (args.signals == "online", "signals 'online' would hold a whole source in every process: use 'cached'"),
    ]
    if wrong := [reason for is_so, reason in refused if is_so]:
        raise InputError(f"Not supported with FSDP: {'; '.join(wrong)}.")
    if args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise InputError(
            "The accelerate config asks for FSDP, which accelerate leaves out on CPUs and in a single process: use several "
            "GPUs, or another accelerate config."
        )


def check_zero(args: SemAlignConfig) -> None:
    """Refuse what is not known to work of the DeepSpeed that the accelerate config asks for.

    Raises:
        ValueError: what, why, and what to take instead.
    """
    plugin = DeepSpeedPlugin()  # of the environment that `accelerate launch` has made
    config = plugin.deepspeed_config
    if plugin.zero_stage not in (1, 2):
        raise InputError(
            f"DeepSpeed is supported with zero_stage 1 and 2, not {plugin.zero_stage}: under ZeRO-3 processes wait for each "
            "other where one runs layers of the target alone. Take recipes/accelerate/fsdp2.yaml for a target that no GPU "
            "holds, zero2.yaml or ddp.yaml for others."
        )
    refused = [
        (
            plugin.offload_optimizer_device != "none",
            "offload_optimizer_device must be none: DeepSpeed would take another optimizer, which trains what is frozen",
        ),
        (
            any(name in config for name in ("optimizer", "scheduler")),
            "its config must name no optimizer and no scheduler: they are the Trainer's, and a stage's",
        ),
        (
            config.get("gradient_clipping") not in ("auto", args.max_grad_norm),
            f"gradient_clipping must be auto, or max_grad_norm, {args.max_grad_norm}: without it DeepSpeed clips to 1",
        ),
        (
            args.parallelism_config is not None or os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true",
            "a parallelism_config beside it was never tried",
        ),
        (args.fp16, "fp16 was never tried with it: use bf16"),
    ]
    if wrong := [reason for is_so, reason in refused if is_so]:
        raise InputError(f"Not supported with DeepSpeed: {'; '.join(wrong)}.")
    if args.distributed_state.backend is None:
        raise InputError("DeepSpeed wants processes that accelerate counts: use GPUs, or on CPUs ddp_backend gloo.")


def autocast_under_zero(config: dict[str, Any]) -> None:
    """Let bf16 be autocast, as with every other engine: DeepSpeed would cast the weights, and average gradients in bf16."""
    if config["bf16"]["enabled"]:
        config["bf16"]["enabled"] = False
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def part_by_layer(optimizer: Optimizer, layers: Sequence[Sequence[nn.Parameter]]) -> None:
    """Make an optimizer that ZeRO is going to flatten leave alone what the frontier has frozen.

    ZeRO makes one vector of a parameter group, with one state and zeros for the gradients of what is frozen: AdamW would move
    layers behind the frontier by their momentum, all others by decay, and begin a layer with the step count of the first.
    So each layer is a group of its own here, and those that are frozen have no gradient when the optimizer steps.

    Args:
        optimizer: a new one of all layers.
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
    """Refuse LoRA of which some process would hold no row: accelerate knows a part by its address, and an empty one has none.

    Args:
        layers: target layers with their LoRA, before they are sharded.
        processes: how many there are.

    Raises:
        ValueError: fewer rows of some LoRA matrix than all processes can share.
    """
    rows = {len(p) for name, p in layers.named_parameters() if "lora_" in name}
    if scarce := sorted(count for count in rows if len(torch.empty(count, 0).chunk(processes)) < processes):
        raise InputError(
            f"FSDP deals out LoRA by rows, and {processes} processes cannot each have one of {scarce[0]}: choose lora_r as a "
            "multiple of the number of processes, or use fewer processes."
        )


def check_sharded(layers: nn.ModuleList) -> None:
    """Refuse a model of which accelerate has not sharded every layer by itself.

    Raises:
        ValueError: names the others.
    """
    if bare := [k for k, layer in enumerate(layers) if not isinstance(layer, FSDPModule)]:
        raise InputError(
            f"FSDP has not wrapped the decoder layers {bare}: name their class ({type(layers[bare[0]]).__name__}) as "
            "fsdp_transformer_layer_cls_to_wrap in the accelerate config."
        )


SLOW = 1.5  # times as long as in float32: bfloat16 is worth a warning


def check_engine(args: SemAlignConfig) -> None:
    """Refuse other settings than a :class:`SemAlignConfig`, engines that are not supported, however they are asked for, and
    folders that cannot be written to.
    """
    if not isinstance(args, SemAlignConfig):
        raise InputError(f"args is a {type(args).__name__}: expected a SemAlignConfig.")
    available = get_available_reporting_integrations()
    named = args.report_to or ()  # a list, after the Trainer's own checks
    if missing := [name for name in named if name in INTEGRATION_TO_CALLBACK and name not in available]:
        raise InputError(f"report_to names {missing}, which is not installed: install it with pip, or set report_to to none.")
    if args.n_gpu > 1:
        raise InputError(f"One process sees {args.n_gpu} GPUs: start with `accelerate launch`, which gives each one its own.")
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
    """Whether an environment variable of accelerate's asks for something."""
    return os.environ.get(variable, "no").lower() not in ("no", "false", "0", "")


def warn_of_slow_bf16(args: SemAlignConfig) -> None:
    """Say so where this CPU has no instructions for bfloat16."""
    if args.bf16 and args.device.type == "cpu":
        times = product_seconds(torch.bfloat16) / product_seconds(torch.float32)
        if times > SLOW:
            logger.warning("This CPU multiplies bfloat16 %.0f times more slowly than float32: set bf16 to false.", times)
