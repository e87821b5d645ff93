"""Forward hooks and a torch setting that are active only inside a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Capture:
    """Input and output of a module in its last forward pass, ``[B, T, D]`` each; unset before the first pass."""

    input: torch.Tensor = field(init=False)
    output: torch.Tensor = field(init=False)

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook. Decoder layers return a tensor (a tuple in older releases); a whole decoder returns a model output."""
        if args or "hidden_states" in kwargs:  # a whole decoder gets its token ids as a keyword
            self.input = args[0] if args else kwargs["hidden_states"]
        self.output = output if isinstance(output, torch.Tensor) else output[0]


@contextmanager
def capture(modules: Iterable[nn.Module]) -> Iterator[list[Capture]]:
    """Record the hidden states that enter and leave some modules, with gradients.

    ``output_hidden_states`` would not do: its last entry is taken after the final norm, so the last layer's residual would be
    wrong.

    Args:
        modules: decoder layers, or a whole decoder.

    Yields:
        One :class:`Capture` per module, updated by each forward pass. The hooks are removed when the block ends, even on error.
    """
    modules = list(modules)
    captures = [Capture() for _ in modules]
    handles = [
        module.register_forward_hook(kept.record, with_kwargs=True) for module, kept in zip(modules, captures, strict=True)
    ]
    try:
        yield captures
    finally:
        for handle in handles:
            handle.remove()


class _Reached(Exception):
    """Raised to leave the model's forward pass early."""


@contextmanager
def stop_after(module: nn.Module) -> Iterator[None]:
    """End a forward pass inside the block as soon as ``module`` has returned its output."""

    def stop(*_: Any) -> None:
        raise _Reached

    handle = module.register_forward_hook(stop)
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()


@torch.no_grad()
def gives_tuples(decoder: nn.Module, first: nn.Module) -> bool:
    """Whether a decoder's layers return a tuple (older families) or a tensor. Runs the first layer on one token to find out."""
    outputs: list[Any] = []
    handle = first.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with stop_after(first):
            device = next(first.parameters()).device
            decoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    finally:
        handle.remove()
    return not isinstance(outputs[0], torch.Tensor)


@contextmanager
def bypass(layers: Iterable[nn.Module], states: torch.Tensor, *, as_tuples: bool) -> Iterator[None]:
    """Skip the lowest layers of a model: they compute nothing, and the layer above them gets ``states`` as its input.

    The states enter as the output of the last skipped layer, not through a hook on the next layer's input. This way activation
    checkpointing saves them and still has them when it recomputes that layer after the block.

    Args:
        layers: the decoder layers to skip, from layer 0 up.
        states: input of the layer above them, ``[B, T, D]``.
        as_tuples: whether layers return tuples, see :func:`gives_tuples`.
    """

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return (states, None) if as_tuples else states

    layers = list(layers)
    with _forwarding(layers, [stand_in] * len(layers)):
        yield


@contextmanager
def without_logits(head: nn.Module) -> Iterator[None]:
    """Inside the block, a model's head computes no logits: for states ``[B, T, D]`` it returns ``[B, T, 0]``.

    Training and evaluation compute the logits of valid positions themselves. ``logits_to_keep=1`` would keep one position per
    row in a non-contiguous slice, which some CPUs multiply 400 times more slowly. The result stays in the autograd graph, which
    DDP searches for the parameters used in a step.
    """
    with _forwarding([head], [lambda hidden, *args, **kwargs: hidden[..., :0]]):
        yield


@contextmanager
def contiguous_input(head: nn.Module) -> Iterator[None]:
    """For generation: inside the block, a head gets contiguous states. :func:`without_logits` says why this matters."""
    handle = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Disable torch's cuDNN attention backend inside the block; also works as a decorator.

    The backend's backward pass returns NaN on H100 and H200 for padded batches of 64, 192, 320, ... tokens (torch 2.11 to 2.13,
    https://github.com/pytorch/pytorch/issues/196678).
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


@contextmanager
def checkpointed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Checkpoint layers inside the block: they keep only their outputs and recompute their activations in the backward pass.

    A layer that returns a tuple returns its hidden states in every position of it, because captum refuses the ``None`` that
    some families put there. transformers' own checkpointing is not used because it works only in training mode, which would
    turn on dropout.
    """

    def lighter(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = checkpoint(forward, *args, use_reentrant=False, **kwargs)
            return output if isinstance(output, torch.Tensor) else output[:1] * len(output)

        return run

    layers = list(layers)
    with _forwarding(layers, [lighter(layer.forward) for layer in layers]):
        yield


@contextmanager
def _forwarding(layers: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward methods of some modules inside the block."""
    kept = [layer.__dict__.get("forward") for layer in layers]  # accelerate's patches are instance attributes too
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    try:
        yield
    finally:
        for layer, before in zip(layers, kept, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before
