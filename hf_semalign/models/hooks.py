"""Forward hooks, and a setting of torch, that hold only inside a ``with`` block."""

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
    """What a module took in and gave out in its last forward: ``[B, T, D]`` each; unset before the first."""

    input: torch.Tensor = field(init=False)
    output: torch.Tensor = field(init=False)

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The forward hook. Decoder layers return a tensor, a tuple in older releases, a model output at the top."""
        if args or "hidden_states" in kwargs:  # a whole decoder is called with token ids by name
            self.input = args[0] if args else kwargs["hidden_states"]
        self.output = output if isinstance(output, torch.Tensor) else output[0]


@contextmanager
def capture(modules: Iterable[nn.Module]) -> Iterator[list[Capture]]:
    """Keep the hidden states that pass through some modules, gradients included.

    Layer hooks and not ``output_hidden_states``, whose last entry is after the final norm, so that a last layer's
    residual taken from it is wrong.

    Args:
        modules: decoder layers, or a whole decoder.

    Yields:
        One :class:`Capture` a module, filled by each forward; the hooks come off with the block, whatever happens.
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
    """Carries a forward pass out of the model once it has gone far enough."""


@contextmanager
def stop_after(module: nn.Module) -> Iterator[None]:
    """End a forward pass inside the block as soon as a module has given its output."""

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
    """Whether a decoder's layers give a tuple (older families) or a tensor: seen on the first layer, with one token."""
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
    """Take some lower layers out of a model's forward: they do nothing, and the next layer's input is ``states``.

    The states come in as the last layer's output and not by a hook on the next layer's input, so that activation
    checkpointing keeps them, and finds them again when it recomputes that layer after the block.

    Args:
        layers: the first decoder layers, down to the bottom.
        states: input of the layer above them, ``[B, T, D]``.
        as_tuples: see :func:`gives_tuples`.
    """

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return (states, None) if as_tuples else states

    layers = list(layers)
    with _forwarding(layers, [stand_in] * len(layers)):
        yield


@contextmanager
def without_logits(head: nn.Module) -> Iterator[None]:
    """Inside the block, a model's head makes no logits: of states ``[B, T, D]`` it returns ``[B, T, 0]``.

    Training and evaluation make the logits of valid positions themselves. ``logits_to_keep=1`` would leave one position a row,
    in a slice that is not contiguous, which some CPUs multiply 400 times more slowly. The result stays connected to the graph,
    where DDP looks for the parameters that take part in a step.
    """
    with _forwarding([head], [lambda hidden, *args, **kwargs: hidden[..., :0]]):
        yield


@contextmanager
def contiguous_input(head: nn.Module) -> Iterator[None]:
    """Inside the block, a head gets its states in one piece of memory, see :func:`without_logits`: for generation."""
    handle = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Inside the block, or in a function that it decorates, attention is computed by any of torch's backends but cuDNN's.

    Its backward pass gives NaN on H100 and H200 for padded batches of 64, 192, 320, ... tokens (torch 2.11 to 2.13,
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
    """Inside the block, layers keep their outputs alone, and run again on their way back for what is in them.

    A layer that gives a tuple gives its hidden states in every place of it, because captum refuses the ``None`` that some
    families have there. Not transformers' own checkpointing, which works in training mode alone, with the dropout that comes
    with it.
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
    """Other forwards for some modules inside the block."""
    kept = [layer.__dict__.get("forward") for layer in layers]  # accelerate's own patches are instance attributes as well
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
