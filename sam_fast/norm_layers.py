"""Perturbing normalization layers alone (SAM-ON, Mueller et al., https://arxiv.org/abs/2306.04226)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

NORM_LAYERS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
"""Classes of normalization layers. Subclasses count, too."""

NAMES = ("batchnorm", "instancenorm", "groupnorm", "layernorm", "rmsnorm")
"""A class whose name contains one of these, in any case, counts as well: LlamaRMSNorm, T5LayerNorm, RmsNorm."""


def own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """A module's own parameters, without those of its submodules, but with the ones from which a parametrization, such
    as weight_norm, computes its weights.
    """
    yield from module.parameters(recurse=False)
    if parametrize.is_parametrized(module):
        for computed in module.parametrizations.values():  # type: ignore[union-attr,operator]
            yield from computed.parameters(recurse=False)


def is_norm_layer(module: nn.Module) -> bool:
    """Whether a module is a normalization layer, by its class or by the name of its class. A class with such a name but
    with matrices, such as LayerNormLinear, is not one: it does more than normalize.
    """
    named = any(name in type(module).__name__.lower() for name in NAMES)
    return isinstance(module, NORM_LAYERS) or (
        named and all(p.numel() == max(p.shape, default=1) for p in own_parameters(module))
    )


def norm_layers_only(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Two parameter groups of a model for :class:`sam_fast.SAM`: the parameters of normalization layers, which are
    perturbed, and all others, if any, which are not (``perturb=False``) and need no backup.

    Inside ``first_pass(model)`` the others get no gradient. Warns if all parameters to perturb are frozen. The paper
    uses about five times SAM's rho.

    Args:
        model: the model. BatchNorm, InstanceNorm, GroupNorm, LayerNorm and RMSNorm layers are recognized by their
            class, those of other libraries by the name of their class.
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
            norms |= dict.fromkeys(own_parameters(module))
    if not norms:
        raise ValueError("norm_layers_only(model): the model has no normalization layer with weights")
    if not any(p.requires_grad for p in norms):
        warnings.warn(
            "norm_layers_only(model): the weights of all normalization layers are frozen, as with LoRA. Until one of "
            "them is trainable nothing is perturbed: this is the base optimizer without SAM",
            RuntimeWarning,
            stacklevel=2,
        )
    others = [p for p in model.parameters() if p not in norms]
    groups = [{"params": list(norms), **options}, {"params": others, **options, "perturb": False}]
    return [group for group in groups if group["params"]]
