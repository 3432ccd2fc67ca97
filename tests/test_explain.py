"""explain and warm_up say what would run, and leave the model as it was."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import dgrad
from dgrad import _fallback, log
from dgrad._autograd import convolution
from dgrad._geometry import Geometry


class Counting(torch.nn.Module):
    """Buffers that are replaced, written to, expanded and saved by the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up = dgrad.ConvTranspose2d(2, 2, 2)
        self.norm = torch.nn.BatchNorm2d(2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("wide", torch.ones(1).expand(2))
        self.register_buffer("scale", torch.full((1,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.norm(self.up(x)) * self.scale


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_of_the_model_changes(backward: bool) -> None:
    model, x = Counting(), torch.randn(1, 2, 3, 3)
    output = model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    dgrad.explain(model, x, backward=backward)
    dgrad.warm_up(model, x, backward=backward)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    output.sum().backward()  # a graph made before is still whole


MODEL = Counting()


class Owner:
    def __init__(self, model: Counting) -> None:
        self.model, self.me = model, partial(self.step)  # a circle

    def step(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_nothing_changes_of_the_modules_that_a_call_names() -> None:
    model, x = Counting(), torch.randn(1, 2, 3, 3)
    calls: list[Callable[[Tensor], Tensor]] = [
        model.forward,
        partial(model),
        partial(lambda model, x: model(x), model),
        lambda x: model(x) if x is not None else unset,
        lambda x: MODEL(x),
        lambda x: [MODEL(each) for each in [x]],
        lambda x, m=model: m(x),  # type: ignore[misc]
        torch.no_grad()(lambda x: model(x)),
        Owner(model).step,
    ]
    for call in calls:
        dgrad.explain(call, x, backward=True)
    assert int(model.calls) == int(MODEL.calls) == 0
    assert not model.norm.running_mean.any()
    assert not MODEL.norm.running_mean.any()
    unset = x  # until now a cell without a value
    assert unset is x


def test_a_model_made_for_inference_is_explained_too() -> None:
    with torch.inference_mode():
        model = Counting()
        dgrad.explain(model, torch.randn(1, 2, 3, 3))
        assert float(model.calls) == 0


def test_where_pytorch_runs_the_reason_is_said() -> None:
    explanation = dgrad.explain(dgrad.ConvTranspose2d(2, 2, 2), torch.randn(1, 2, 3, 3))
    assert explanation.selections == []
    (note,) = explanation.notes
    assert "PyTorch's own operator runs: input is on cpu" in note
    assert str(explanation) == note
    assert explanation.to_dict() == {"selections": [], "notes": [note]}


def test_a_call_without_transposed_convolutions_says_so() -> None:
    assert str(dgrad.explain(torch.nn.ReLU(), torch.ones(1))) == "no transposed convolution ran"


def test_warm_up_prints_nothing_where_there_is_no_terminal() -> None:
    code = (
        "import torch, dgrad; "
        "dgrad.warm_up(dgrad.ConvTranspose2d(2, 2, 2), torch.randn(1, 2, 3, 3))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- the gradients ------------------------------------------------------------------------------


@pytest.fixture
def directions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directions that run, in order."""
    ran: list[str] = []
    real = _fallback.run

    def run(direction: str, *arguments: Any) -> Tensor:
        ran.append(direction)
        return real(direction, *arguments)

    monkeypatch.setattr(_fallback, "run", run)
    monkeypatch.setattr(log, "_warned", {})
    return ran


@dataclass(slots=True)
class Slotted:
    y: Tensor
    name: str = "y"


class Holder:
    def __init__(self, y: Tensor, model: torch.nn.Module) -> None:
        self.itself, self.model, self.parts = self, model, [{"y": Slotted(y)}]


class Up(torch.nn.Module):
    """A transposed convolution by dgrad's own functions, also on a CPU."""

    def __init__(self, wrap: Callable[[Tensor, torch.nn.Module], object]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(2, 2, 2, 2))
        self._wrap = wrap

    def forward(self, x: Tensor) -> object:
        geometry = Geometry((0, 0), (1, 1), (1, 1), 1)
        size = (x.shape[2] + 1, x.shape[3] + 1)
        return self._wrap(convolution("dgrad", x, self.weight, geometry, size), self)


X = torch.randn(1, 2, 3, 3)
WRAPS: dict[str, Callable[[Tensor, torch.nn.Module], object]] = {
    "tensor": lambda y, _: y,
    "nest": lambda y, _: {"y": ([y], None)},
    "dataclass": lambda y, _: Slotted(y),
    "object": Holder,
}


@pytest.mark.parametrize("name", WRAPS)
def test_gradients_are_taken_of_tensors_wherever_the_output_has_them(
    directions: list[str], name: str
) -> None:
    dgrad.warm_up(Up(WRAPS[name]), X)
    assert directions == ["dgrad", "wgrad"]
    assert log._warned == {}


def test_gradients_are_taken_for_what_a_function_does_not_tell(directions: list[str]) -> None:
    up = Up(WRAPS["dataclass"])
    dgrad.warm_up(lambda x: up(x), X)
    assert directions == ["dgrad", "wgrad"]
    assert up.weight.grad is None
    assert log._warned == {}


@pytest.mark.parametrize("as_argument", [True, False])
def test_gradients_end_where_the_call_began(directions: list[str], as_argument: bool) -> None:
    first, second = Up(WRAPS["tensor"]), Up(WRAPS["tensor"])
    features: Any = first(X)
    if as_argument:
        dgrad.warm_up(second, features)
    else:
        dgrad.warm_up(lambda: second(features))
    assert directions == ["dgrad", "dgrad", "fprop", "wgrad"]
    features.sum().backward()  # the graph that was there is still whole
    assert first.weight.grad is not None
    assert second.weight.grad is None


@pytest.mark.parametrize(
    ("wrap", "grad", "words"),
    [
        (WRAPS["tensor"], False, "no tensor of its output requires one; let parameters or inputs"),
        (lambda y, _: y.detach(), True, "no tensor of its output requires one; let parameters"),
        (lambda y, _: "text", True, "no tensor was found in its output, a str; let it return"),
    ],
)
def test_a_warning_says_that_no_gradient_could_be_taken(
    directions: list[str], caplog: pytest.LogCaptureFixture, wrap: Any, grad: bool, words: str
) -> None:
    up = Up(wrap).requires_grad_(grad)
    dgrad.warm_up(up, X, backward=False)
    assert caplog.messages == []
    dgrad.warm_up(up, X)
    [message] = caplog.messages
    assert caplog.records[0].levelname == "WARNING"
    assert message.startswith(f"the gradients of Up are not selected: {words}")
    assert message.endswith(", or pass backward=False")
    assert directions == ["dgrad", "dgrad"]


def test_gradients_are_taken_that_other_threads_made_ready(directions: list[str]) -> None:
    up = Up(WRAPS["tensor"])

    class Threaded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = up

        def forward(self, x: Tensor) -> Tensor:
            outputs: list[Any] = []
            thread = threading.Thread(target=lambda: outputs.append(self.up(x)))
            thread.start()
            thread.join()
            return torch.cat(outputs)

    X.clone().requires_grad_().sum()  # so that this thread has made more than the other will
    dgrad.warm_up(Threaded(), X)
    assert directions == ["dgrad", "wgrad"]


@pytest.mark.parametrize("returned", ["the loss", "nothing"])
def test_a_step_of_training_is_left_with_its_own_backward_pass(
    directions: list[str], returned: str
) -> None:
    up = Up(WRAPS["tensor"])

    def step(x: Tensor) -> Tensor | None:
        loss: Any = up(x)
        loss = loss.square().sum()
        loss.backward()
        return loss if returned == "the loss" else None

    dgrad.warm_up(step, X)
    assert directions == ["dgrad", "wgrad"]
    assert log._warned == {}


def test_gradients_are_taken_for_what_lies_deep_in_a_function(directions: list[str]) -> None:
    up: Any = Up(WRAPS["tensor"])
    dgrad.warm_up(lambda x: up(x).relu().square(), X)
    assert directions == ["dgrad", "wgrad"]
    assert log._warned == {}
