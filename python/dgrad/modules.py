"""ConvTranspose2d as a module."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: F401  (for TorchScript, see the end)
from torch import Tensor

from ._words import shown
from .config import Flags
from .exceptions import first_line
from .functional import conv_transpose2d

_INIT = torch.nn.ConvTranspose2d.__init__
_TOLD = (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError)
_OUTPUT_PADDING = torch.nn.ConvTranspose2d._output_padding


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` run by cuDNN's data gradient.

    Constructor, parameters, initial values (from the same random numbers), state_dict and repr
    are those of :class:`torch.nn.ConvTranspose2d`; it takes any input that class takes.

    Shape:
        - Input: (N, C_in, H, W) or (C_in, H, W)
        - Output: (N, C_out, H_out, W_out) or (C_out, H_out, W_out) with
          ``H_out = (H - 1) * stride[0] - 2 * padding[0] + dilation[0] * (kernel_size[0] - 1)
          + output_padding[0] + 1``, and the same for W
        - weight: (C_in, C_out / groups, kernel_size[0], kernel_size[1]); bias: (C_out,)

    Attributes:
        flags (dgrad.Flags or None): flags for this layer and its gradients over those of the
            process, for example ``layer.flags = dgrad.Flags(selection="exhaustive")``.

    Raises:
        ValueError, TypeError: an ``output_size`` that the layer cannot give, or that is none; a
            ``padding_mode`` that is not "zeros".
        Others as :func:`dgrad.conv_transpose2d`.
    """

    flags: Flags | None = None
    __jit_ignored_attributes__ = ("flags",)

    if not TYPE_CHECKING:  # for which the constructor is PyTorch's

        @functools.wraps(_INIT)
        def __init__(self, *arguments: Any, **options: Any) -> None:
            try:
                super().__init__(*arguments, **options)
            except (ValueError, TypeError, RuntimeError) as error:
                given = _given(self, *arguments, **options)
                if given is None or type(error) not in _TOLD:  # the allocator's, for example
                    raise
                told = f"{first_line(error)}, in ConvTranspose2d({given})"
                raise type(error)(told) from error

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The transposed convolution of ``input``.

        Args:
            input: shape (N, C_in, H, W) or (C_in, H, W).
            output_size: wanted (H_out, W_out), with or without the leading sizes; it takes the
                place of the layer's output_padding. Default None.
        """
        if self.padding_mode != "zeros":  # it was set since the layer was made
            raise ValueError("Only `zeros` padding mode is supported for ConvTranspose2d")
        # A subclass may find its weight or its output_padding in a way of its own.
        plain = type(self) is ConvTranspose2d
        output_padding = self.output_padding
        if output_size is not None or not (plain or type(self)._output_padding is _OUTPUT_PADDING):
            recorded = _recorded(self, input, output_size)
            if recorded is not None:
                return recorded  # type: ignore[no-any-return]
            output_padding = self._chosen_padding(input, output_size)
        weight: Tensor | None
        bias: Tensor | None
        own, values = self._parameters, self.__dict__
        if (  # self.weight comes to the same, after a look everywhere else
            plain
            and "weight" in own
            and "bias" in own
            and "weight" not in values
            and "bias" not in values
        ):
            weight, bias = own["weight"], own["bias"]
        else:  # an older weight_norm, for example, keeps its weight elsewhere
            weight, bias = self.weight, self.bias
        return conv_transpose2d(
            input,
            weight,  # type: ignore[arg-type]
            bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            output_padding,
            self.groups,
            self.dilation,
            flags=self.flags,
        )

    def _chosen_padding(self, input: Tensor, output_size: list[int] | None) -> tuple[int, ...]:
        """The output_padding for a wanted size, or a subclass's own."""
        try:
            chosen = tuple(
                self._output_padding(
                    input,
                    output_size,
                    self.stride,  # type: ignore[arg-type]
                    self.padding,  # type: ignore[arg-type]
                    self.kernel_size,  # type: ignore[arg-type]
                    2,
                    self.dilation,  # type: ignore[arg-type]
                )
            )
        except _TOLD as error:
            replaced = type(self)._output_padding is not _OUTPUT_PADDING  # by a subclass
            if output_size is None or replaced or type(error) not in _TOLD:  # torch.fx has its own
                raise
            raise type(error)(_wrong_size(input, output_size, error)) from error
        if output_size is not None and any(isinstance(each, float) for each in chosen):
            raise TypeError(_wrong_size(input, output_size))
        return chosen


def _recorded(layer: ConvTranspose2d, input: object, output_size: object) -> Any:
    """The call of a layer in a graph of torch.fx, where PyTorch's layer stands as a whole too.

    None where torch.fx is not at work, or traces the layer itself; and where hooks or a subclass's
    forward are in the graph already, as a whole layer would run them again.
    """
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if type(layer).forward is not ConvTranspose2d.forward:
        return None
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size,)
    for value in (input, *sizes):
        if isinstance(value, torch.fx.Proxy) and isinstance(value.tracer, torch.fx.Tracer):
            path = value.tracer.path_of_module(layer)
            call = value.tracer.create_proxy
            return call("call_module", path, (input, output_size), {}) if path else None
    return None


def _given(*arguments: object, **options: object) -> str | None:
    """The constructor's arguments in words, None where they do not fit it."""
    try:
        given = inspect.signature(_INIT).bind(*arguments, **options).arguments
    except TypeError:
        return None
    return ", ".join(f"{name}={shown(value)}" for name, value in given.items() if name != "self")


def _wrong_size(input: object, output_size: object, error: Exception | None = None) -> str:
    """What is wrong with the arguments of a layer that finds no output_padding for a size."""
    if not isinstance(input, Tensor):
        return f"input is of type {type(input).__name__}, expected a Tensor"
    if input.dim() not in (3, 4):
        return (
            f"input has shape {tuple(input.shape)}, expected 3 dimensions (C_in, H, W) "
            "or 4 dimensions (N, C_in, H, W)"
        )
    if type(error) is ValueError:
        return f"output_size is {shown(output_size)}: {error}"
    return (
        f"output_size is {shown(output_size)}, expected two integers, (H_out, W_out), "
        "alone or after the leading sizes"
    )


# torch.jit.script compiles the source of what a function wraps, with the names of this module. Here
# that is PyTorch's forward: its operator runs, as what dgrad does cannot be said in TorchScript.
ConvTranspose2d.forward.__wrapped__ = torch.nn.ConvTranspose2d.forward  # type: ignore[attr-defined]
