"""Dropout and similar noise, switched off for the whole run."""

from typing import Any

from torch import nn


def disable_dropout(model: nn.Module) -> None:
    """Switch dropout off for good: the ratio has to compare two passes through the same network."""
    module: Any
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # Some architectures keep the rate on the module or read it from the config, and call F.dropout themselves.
        for owner in (module, getattr(module, "config", None)):
            for name, value in vars(owner).items() if owner is not None else ():
                if isinstance(value, float) and ("drop" in name or "jitter" in name):
                    setattr(owner, name, 0.0)
