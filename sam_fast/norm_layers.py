"""Perturbing normalization layers alone (SAM-ON, Mueller et al., https://arxiv.org/abs/2306.04226)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

NORM_LAYERS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
"""The classes of normalization layers, and of what is derived from them."""

NAMES = ("batchnorm", "instancenorm", "groupnorm", "layernorm", "rmsnorm")
"""A class whose name contains one of these in any case, as LlamaRMSNorm, T5LayerNorm or RmsNorm does, is one too."""


def is_norm_layer(module: nn.Module) -> bool:
    """Whether a module normalizes: by its class, or its class's name. One of that name that has matrices, as a
    LayerNormLinear, does more.
    """
    named = any(name in type(module).__name__.lower() for name in NAMES)
    return isinstance(module, NORM_LAYERS) or (
        named and all(p.numel() == max(p.shape, default=1) for p in module.parameters(recurse=False))
    )


def norm_layers_only(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Two parameter groups of a model for :class:`sam_fast.SAM`: the parameters of normalization layers, which are
    perturbed, and all others, if any, which are not (``perturb=False``) and need no backup.

    Inside ``first_pass(model)`` the others get no gradient. The paper takes about five times SAM's rho.

    Args:
        model: BatchNorm, InstanceNorm, GroupNorm, LayerNorm and RMSNorm layers are known by their class, libraries' own
            by their class's name.
        options: options of both groups, such as ``lr`` or ``rho``.

    Returns:
        The groups, as dictionaries.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is no normalization layer with weights, or ``perturb`` is among the options.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"norm_layers_only(model) needs a torch.nn.Module, got {type(model).__name__}")
    if "perturb" in options:
        raise ValueError("norm_layers_only sets perturb itself: leave it out")
    norms: dict[Tensor, None] = {}
    for module in model.modules():
        if is_norm_layer(module):
            norms |= dict.fromkeys(module.parameters(recurse=False))
    if not norms:
        raise ValueError("norm_layers_only(model): the model has no normalization layer with weights")
    others = [p for p in model.parameters() if p not in norms]
    groups = [{"params": list(norms), **options}, {"params": others, **options, "perturb": False}]
    return [group for group in groups if group["params"]]
