"""hf_semalign distils a large language model into a smaller one of different depth and width, with a drop-in ``Trainer``.

Public names are imported on first use, so ``import hf_semalign`` and ``semalign --help`` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_semalign.cache.signals import SourceSignals
    from hf_semalign.config import SemAlignConfig
    from hf_semalign.hub.loading import load_transfer
    from hf_semalign.hub.push import push_transfer
    from hf_semalign.method.attribution import LayerScores, attribute_layers
    from hf_semalign.method.frontier import FrontierSchedule
    from hf_semalign.method.losses import fisher_loss, output_kl, relation_loss, steering_loss
    from hf_semalign.method.pairing import LayerPairing, pair_layers
    from hf_semalign.method.semantic_map import SemanticMap, semantic_bases
    from hf_semalign.trainer import SemAlignTrainer
    from hf_semalign.training.stages import FrontierCallback

__all__ = [
    "FrontierCallback",
    "FrontierSchedule",
    "LayerPairing",
    "LayerScores",
    "SemAlignConfig",
    "SemAlignTrainer",
    "SemanticMap",
    "SourceSignals",
    "attribute_layers",
    "fisher_loss",
    "load_transfer",
    "output_kl",
    "pair_layers",
    "push_transfer",
    "relation_loss",
    "semantic_bases",
    "steering_loss",
]
_MODULES = {
    "method.attribution": ("LayerScores", "attribute_layers"),
    "config": ("SemAlignConfig",),
    "method.frontier": ("FrontierSchedule",),
    "hub.loading": ("load_transfer",),
    "hub.push": ("push_transfer",),
    "method.losses": ("fisher_loss", "output_kl", "relation_loss", "steering_loss"),
    "method.pairing": ("LayerPairing", "pair_layers"),
    "method.semantic_map": ("SemanticMap", "semantic_bases"),
    "cache.signals": ("SourceSignals",),
    "trainer": ("SemAlignTrainer",),
    "training.stages": ("FrontierCallback",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
