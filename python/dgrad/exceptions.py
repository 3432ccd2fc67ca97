"""The errors that dgrad raises itself; bad arguments raise what PyTorch raises for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import OutOfMemoryError as TorchOutOfMemoryError
else:  # PyTorch 2.4 has it under torch.cuda only
    TorchOutOfMemoryError = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)

__all__ = [
    "CudnnBadParameterError",
    "CudnnError",
    "CudnnExecutionError",
    "CudnnInternalError",
    "CudnnNotInitializedError",
    "CudnnNotSupportedError",
    "NotSupportedError",
    "OutOfMemoryError",
    "TorchOutOfMemoryError",
]


# How reasons begin that may not last.
THIS_TIME = "it failed this time: "
NOT_ASKED = "cuDNN could not be asked this time: "  # and what it would name is not known


def first_line(error: Exception) -> str:
    """What an error says, in the one line that a table or a log has for it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason_of(error: Exception, passing: str = THIS_TIME) -> str:
    """Why a candidate does not run, in one line, which begins so if that may not last."""
    may_pass = isinstance(error, (CudnnInternalError, CudnnExecutionError))
    return passing * may_pass + first_line(error)


class CudnnError(RuntimeError):
    """A cuDNN call failed.

    Attributes:
        status: cuDNN's status code (``category * 1000 + n``), also where this version of
            dgrad does not know it.
        call: the cuDNN function that returned it.
        detail: the text of ``cudnnGetLastErrorString``, may be empty.
    """

    def __init__(self, text: str, status: int, call: str, detail: str) -> None:
        super().__init__(text)
        self.status = status
        self.call = call
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, int, str, str]]:
        return type(self), (str(self), self.status, self.call, self.detail)


class CudnnNotInitializedError(CudnnError):
    """Status 1xxx, or any of cudnnCreate: cuDNN could not start, for example because there is no
    GPU, or because a CUDA graph is captured."""


class CudnnBadParameterError(CudnnError):
    """Status 2xxx: cuDNN refused an argument."""


class CudnnNotSupportedError(CudnnError):
    """Status 3xxx: this version of cuDNN, or this GPU, cannot run what was asked."""


class CudnnInternalError(CudnnError):
    """Status 4xxx: cuDNN failed inside, for example while it allocated or compiled."""


class CudnnExecutionError(CudnnError):
    """Status 5xxx: a kernel could not be launched or failed."""


_BY_CATEGORY: dict[int, type[CudnnError]] = {
    1: CudnnNotInitializedError,
    2: CudnnBadParameterError,
    3: CudnnNotSupportedError,
    4: CudnnInternalError,
    5: CudnnExecutionError,
}


def cudnn_error(status: int, text: str, call: str, detail: str) -> CudnnError:
    """The exception for a cuDNN status; the native module calls this."""
    category = 1 if call == "cudnnCreate" else status // 1000
    return _BY_CATEGORY.get(category, CudnnError)(text, status, call, detail)


class NotSupportedError(RuntimeError):
    """No candidate can run the call: the text lists each with its reason."""


class OutOfMemoryError(NotSupportedError, TorchOutOfMemoryError):
    """No candidate can run the call, and for at least one only memory is missing; or there is none
    for cuDNN to start with."""
