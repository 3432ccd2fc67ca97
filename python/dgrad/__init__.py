"""PyTorch's ConvTranspose2d, run on cuDNN's data gradient."""

# PyTorch first: the native module binds to the cuDNN that PyTorch has mapped.
import torch  # noqa: F401  isort: skip

from importlib.metadata import PackageNotFoundError, version

from . import _loader, _ops, store  # noqa: F401 (_ops defines torch.ops.dgrad)
from ._loader import is_available, unavailable_reason
from .config import Flags, flags, set_flags
from .convert import convert, restore
from .exceptions import (
    CudnnBadParameterError,
    CudnnError,
    CudnnExecutionError,
    CudnnInternalError,
    CudnnNotInitializedError,
    CudnnNotSupportedError,
    NotSupportedError,
    OutOfMemoryError,
)
from .explain import Explanation, explain, warm_up
from .functional import conv_transpose2d
from .modules import ConvTranspose2d
from .planner import plan_cache, selections
from .selection import Candidate, Selection

try:
    __version__ = version("dgrad")
except PackageNotFoundError:  # run from a build tree that was not installed
    __version__ = getattr(_loader.load()[0], "__version__", "0+unknown")

__all__ = [
    "Candidate",
    "ConvTranspose2d",
    "CudnnBadParameterError",
    "CudnnError",
    "CudnnExecutionError",
    "CudnnInternalError",
    "CudnnNotInitializedError",
    "CudnnNotSupportedError",
    "Explanation",
    "Flags",
    "NotSupportedError",
    "OutOfMemoryError",
    "Selection",
    "__version__",
    "conv_transpose2d",
    "convert",
    "explain",
    "flags",
    "is_available",
    "plan_cache",
    "restore",
    "selections",
    "set_flags",
    "store",
    "unavailable_reason",
    "warm_up",
]
