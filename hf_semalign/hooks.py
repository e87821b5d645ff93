"""Forward hooks that exist only inside a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


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
