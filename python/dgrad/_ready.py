"""What native code asks of the process at each call that it knows whole; see src/ready.hpp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad

from . import _loader, config
from ._watch import before_autograd, profiling, watchers

if TYPE_CHECKING:
    from ._core import ReadyCalls

_functorch = torch._C._functorch

# With what each gives while no transform, mode or observer wants to see the call.
GUARDS: tuple[tuple[Callable[[], object], object], ...] = (
    (torch._C._get_tracing_state, None),
    (lambda: forward_ad._current_level, -1),
    (_functorch.peek_interpreter_stack, None),
    (torch._C._len_torch_dispatch_stack, 0),
    (before_autograd, False),
    (watchers.__len__, 0),
    (profiling, False),
)


def ready_calls(exchange: object) -> ReadyCalls:
    """No calls yet; ValueError if ``exchange`` is of another version of DLPack."""
    calls: ReadyCalls = _loader.require().ReadyCalls(
        exchange=exchange,
        types=(torch.Tensor, torch.nn.Parameter),
        current_device=torch._C._cuda_getDevice,
        flags=config.current,
        switches=config.SWITCHES,
        guards=GUARDS,
        recording=torch.is_grad_enabled,
        is_asked=torch._C._will_engine_execute_node,
        is_odd=(
            _functorch.is_legacy_batchedtensor,
            _functorch.is_functorch_wrapped_tensor,
            torch.Tensor.is_neg,
        ),
    )
    return calls
