"""The native module: cuDNN's calls, sizes and device pointers as integers."""

from collections.abc import Callable, Sequence
from typing import Any, final

from torch import Tensor, UntypedStorage

__version__: str
compiled_cudnn_version: int

def cudnn_version() -> int: ...
def status_name(status: int) -> str: ...

@final
class Problem:
    def __init__(
        self,
        *,
        direction: str,
        dtype: str,
        tf32: bool,
        layout: str,
        x: tuple[int, int, int, int],
        w: tuple[int, int, int, int],
        y: tuple[int, int, int, int],
        padding: tuple[int, int],
        stride: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        bias: bool,
        alignment: int,
        device: int,
    ) -> None: ...
    @property
    def direction(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def tf32(self) -> bool: ...
    @property
    def layout(self) -> str: ...
    @property
    def x(self) -> list[int]: ...
    @property
    def w(self) -> list[int]: ...
    @property
    def y(self) -> list[int]: ...
    @property
    def padding(self) -> list[int]: ...
    @property
    def stride(self) -> list[int]: ...
    @property
    def dilation(self) -> list[int]: ...
    @property
    def groups(self) -> int: ...
    @property
    def bias(self) -> bool: ...
    @property
    def alignment(self) -> int: ...
    @property
    def device(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Plan:
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def notes(self) -> list[str]: ...
    @property
    def compiled(self) -> list[bytes]: ...
    @property
    def compiles(self) -> bool: ...
    def execute(self, x: int, w: int, y: int, bias: int, workspace: int, stream: int) -> None: ...

@final
class UseCount:
    def __init__(self) -> None: ...
    @property
    def count(self) -> int: ...

@final
class ReadyGradients:
    def __init__(
        self,
        *,
        of: Sequence[tuple[int, int, tuple[object, ...]]],
        flags: object,
        a_strides: Sequence[int],
        grad_strides: Sequence[int],
        sum_bias: Callable[[Tensor], Tensor] | None,
    ) -> None: ...

@final
class ReadyCall:
    def __init__(
        self,
        *,
        plan: Plan,
        direction: str,
        make_out: Callable[[], Tensor],
        make_workspace: Callable[[], UntypedStorage] | None,
        enter_bias: Callable[[Tensor], Tensor] | None,
        is_capturing: Callable[[], bool] | None,
        plan_reads_bias: bool,
        pytorch_adds_bias: bool,
        python_captures: bool,
        uses: UseCount,
        recipe: object,
        gradients: ReadyGradients | None,
    ) -> None: ...
    @property
    def recipe(self) -> Any: ...

@final
class ReadyCalls:
    def __init__(
        self,
        *,
        exchange: object,
        types: tuple[type, ...],
        current_device: Callable[[], int],
        flags: Callable[[], object],
        switches: tuple[Callable[[], object], ...],
        guards: tuple[tuple[Callable[[], object], object], ...],
        recording: Callable[[], bool],
        is_asked: Callable[[Any], bool],
        is_odd: tuple[Callable[[Tensor], bool], ...],
    ) -> None: ...
    def run(
        self, a: object, b: object, bias: object, state: tuple[object, ...]
    ) -> Tensor | None: ...
    def call(
        self, a: object, b: object, bias: object, own: tuple[object, ...], flags: object, /
    ) -> Tensor | ReadyCall | None: ...
    def execute(
        self, call: ReadyCall, a: Tensor, b: Tensor, bias: Tensor | None, /
    ) -> Tensor | None: ...
    def backward(
        self, context: Any, call: ReadyCall, saved: tuple[Tensor | None, ...], grad: Tensor, /
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None] | None: ...
    def put(
        self, a: Tensor, b: Tensor, bias: Tensor | None, state: tuple[object, ...], call: ReadyCall
    ) -> None: ...
    def clear(self) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def hits(self) -> int: ...

def sequence(first: Plan, second: Plan) -> Plan: ...
def keep_for_graphs(plan: Plan) -> None: ...

@final
class HeuristicResult:
    @property
    def algorithm(self) -> str: ...
    @property
    def math_type(self) -> str: ...
    @property
    def deterministic(self) -> bool: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def rejected(self) -> str: ...

@final
class Engine:
    @property
    def name(self) -> str: ...
    @property
    def notes(self) -> list[str]: ...

def graph_heuristic(problem: Problem, operation: str) -> tuple[list[Engine], list[str]]: ...
def graph_plan(problem: Problem, operation: str, engine: str) -> Plan: ...
def restored_plan(device: int, compiled: bytes) -> Plan: ...
def legacy_algorithms(direction: str) -> list[str]: ...
def legacy_heuristic(problem: Problem) -> list[HeuristicResult]: ...
def legacy_plan(problem: Problem, algorithm: str, math_type: str) -> Plan: ...
def legacy_forward_output_size(problem: Problem) -> list[int]: ...
