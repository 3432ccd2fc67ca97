"""Swap the transposed convolutions of a model for dgrad's, and back."""

from __future__ import annotations

import torch

from .modules import ConvTranspose2d


def _swap(model: torch.nn.Module, old: type, new: type) -> list[str]:
    names = []
    for name, module in model.named_modules():
        if type(module) is old:
            # The two classes have the same attributes, so parameters, buffers, hooks, mode and
            # all references to the module stay as they are.
            module.__class__ = new
            names.append(name)
    return names


def convert(model: torch.nn.Module) -> list[str]:
    """Turn every :class:`torch.nn.ConvTranspose2d` of ``model`` into
    :class:`dgrad.ConvTranspose2d`, in place; subclasses are left alone.

    Returns:
        The qualified names of the layers that were turned ("" is the model itself).
    """
    return _swap(model, torch.nn.ConvTranspose2d, ConvTranspose2d)


def restore(model: torch.nn.Module) -> list[str]:
    """Undo :func:`convert`, in place; returns the names of the layers that were turned back."""
    return _swap(model, ConvTranspose2d, torch.nn.ConvTranspose2d)
