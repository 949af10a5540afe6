"""Which implementation of norm, attention, matrix products, optimizer and entropy a run uses, as built.

megatron-core takes what it finds: Transformer Engine's or Apex's Adam, else torch's. So nothing here is read
from the options: it is the classes of the modules and of the optimizer, and the engine that the vocabulary
operation chooses for this rank's logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from siren_megatron.vocab_parallel import engine_name

_PACKAGES = {
    "transformer_engine": "Transformer Engine",
    "apex": "Apex",
    "megatron": "megatron-core",
    "siren_megatron": "siren_megatron",
    "torch": "torch",
}
"""Package of a class or of one that it is derived from -> its name, the most telling first."""


def find_implementations(chunks: Iterable[torch.nn.Module], optimizer: Any) -> dict[str, str]:
    """What this rank computes with: part -> class and package.

    Args:
        chunks: this rank's chunks of the model, from `build_model`.
        optimizer: from `get_megatron_optimizer`.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    attention = [module for module in modules if hasattr(module, "core_attention")]
    experts = [module.experts for module in modules if hasattr(module, "experts")]
    weight = next(p for module in modules for p in module.parameters())
    found = {
        "norm": _names(m for m in modules if _is_norm(m)),
        "attention": _names(module.core_attention for module in attention),
        "linear": _names(m for layer in attention for m in (layer.linear_qkv, layer.linear_proj)),
        # A grouped product has a class of its own; experts computed one by one have none here.
        "experts": _names(m for layer in experts for m in (layer, getattr(layer, "linear_fc1", layer))),
        "optimizer": _names(_adams(optimizer)),
        "entropy": engine_name(weight.device, weight.dtype),
    }
    return {part: name for part, name in found.items() if name}


def _is_norm(module: torch.nn.Module) -> bool:
    # Transformer Engine computes a norm together with the matrix behind it.
    return type(module).__name__.endswith("Norm") or hasattr(module, "layer_norm_weight")


def _adams(optimizer: Any) -> Iterator[Any]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:  # a rank without parameters of the part's kind
            yield part.optimizer


def _names(objects: Iterable[Any]) -> str:
    """Class and package of each object, once each, in order of appearance."""
    return ", ".join(dict.fromkeys(_name(type(thing)) for thing in objects))


def _name(cls: type) -> str:
    packages = {parent.__module__.partition(".")[0] for parent in cls.__mro__}
    return f"{cls.__name__} ({next((_PACKAGES[p] for p in _PACKAGES if p in packages), 'own')})"
