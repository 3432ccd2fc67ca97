"""One contestant of `compare` in a process of its own, see `_process.py`."""

from __future__ import annotations

import json
import logging
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import dgrad
from dgrad.bench import environment
from dgrad.bench._model_file import WorkerError, load, theirs, words_of
from dgrad.bench._outputs import Verdict, gradient_differences, judge, tensors
from dgrad.bench._process import Answer, serve
from dgrad.bench._share import share
from dgrad.bench.timing import Sampler


@dataclass(frozen=True, slots=True)
class Request:
    """What a worker is started for. `setting` is "pytorch", "pytorch_benchmark" or "dgrad"."""

    setting: str
    file: str | None
    device: str
    seed: int
    full_size: bool
    selection: str | None = None
    training: bool = False


class Contestant:
    """Makes the same model and inputs again and again, with PyTorch's layers or with dgrad's.

    Its methods raise WorkerError.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.device = torch.device(request.device)
        self.ours = request.setting == "dgrad"
        self.messages: list[str] = []
        self.layers = 0
        self.left: dict[str, str] = {}  # the layers that stay PyTorch's, and why
        self.reduced: str | None = None  # in words

    def prepare(self, benchmark: bool) -> Answer:
        """Make the model and warm it up under PyTorch's switch of that name; "run_s" of a run."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.load()
        # after the file was imported, which may have set it
        torch.backends.cudnn.benchmark = benchmark
        if self.ours:
            dgrad.set_flags(selection=self.request.selection)
            self.messages = _collect_messages()
        self.model, self.inputs = self.build(swap=self.ours)
        with torch.set_grad_enabled(self.request.training):
            self.sampler = Sampler(lambda: self.work(self.model, self.inputs), self.device)
        return {"run_s": self.sampler.run_s}

    def load(self) -> None:
        """Import the compared file; :meth:`build` needs it."""
        self.module = load(self.request.file)

    def sample(self, seconds: float) -> Answer:
        """The times of a forward pass, or of a step."""
        with torch.set_grad_enabled(self.request.training):
            return {"samples_ms": self.sampler.sample(seconds)}

    def finish(self) -> Answer:
        """The "share" of forward in the layers; from dgrad also what :meth:`report` says."""
        with torch.set_grad_enabled(self.request.training):
            part = share(self.model, lambda: self.forward(self.model, self.inputs), self.device)
        del self.sampler, self.model, self.inputs
        return {"share": part} | (self.report() if self.ours else {})

    def report(self) -> Answer:
        """Whether the outputs are PyTorch's, what was selected, and where."""
        torch.backends.cudnn.benchmark = False  # the outputs are held against PyTorch's default
        verdict = self.check()
        finite = verdict.max_abs_diff is not None and math.isfinite(verdict.max_abs_diff)
        return {
            "layers": self.layers,
            "dtype": verdict.dtype,
            "equal": verdict.equal,
            "max_abs_diff": verdict.max_abs_diff if finite else None,
            "tolerance": verdict.tolerance,
            "differences": verdict.differences,
            "float64_errors": None if verdict.equal else self.float64_errors(),
            "selected": list(dict.fromkeys(self.messages)),
            "notes": self.notes(verdict.equal),
            "device_name": environment.device_name(self.device),
            "versions": environment.versions(),
        }

    def build(self, swap: bool) -> tuple[nn.Module, list[Any]]:
        """A fresh model and fresh inputs, drawn as KernelBench does: seed, then construct.

        Leaves the random generators in the same state each time, for dropout and the like.
        """
        self._seed()
        with theirs("get_init_inputs() failed", self.module):
            init_inputs = self.module.get_init_inputs()
        self._expect_sequence("get_init_inputs()", init_inputs)
        self._seed()
        arguments = [_to(value, self.device) for value in init_inputs]
        with theirs("Model(*get_init_inputs()) failed", self.module):
            model = self.module.Model(*arguments)
        if not isinstance(model, nn.Module):
            raise WorkerError(f"Model is not a torch.nn.Module but a {type(model).__name__}")
        model = model.to(self.device)
        self._swap(model, swap)
        self._seed()
        with theirs("get_inputs() failed", self.module):
            inputs = self._inputs()
        self._expect_sequence("get_inputs()", inputs)
        if not any(True for _ in tensors(inputs)):
            raise WorkerError("get_inputs() returned no tensor")
        if self.device.type == "cpu" and not self.request.full_size:
            inputs = self._reduce(list(inputs))
        return model, [_to(value, self.device) for value in inputs]

    def forward(self, model: nn.Module, inputs: list[Any]) -> object:
        try:
            return model(*inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except BaseException as error:
            words = f"Model.forward failed{words_of(error, self.module)}"
            if self.ours and isinstance(error, Exception):  # and not sys.exit()
                raise WorkerError(words, "run") from error
            hint = f" ({self.reduced})" if self.reduced else ""
            raise WorkerError(words + hint) from error

    def step(self, model: nn.Module, inputs: list[Any]) -> object:
        """Forward, backward of the sum of squares of what comes out, SGD's update; the output."""
        # At a rate of zero it costs the same, and the numbers stay what they are.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.zero_grad()
        output = self.forward(model, inputs)
        # Not the mean, whose gradients half types round to zero.
        squares = [t.float().square().sum() for t in tensors(output) if t.requires_grad]
        if not squares:
            raise WorkerError("Model.forward returned no tensor that requires a gradient")
        try:
            (torch.stack(squares).sum() / len(squares)).backward()
        except torch.cuda.OutOfMemoryError:
            raise
        except BaseException as error:
            fault = "run" if isinstance(error, Exception) else "file"
            words = words_of(error, self.module)
            raise WorkerError(f"the backward pass failed{words}", fault) from error
        optimizer.step()
        return output

    def work(self, model: nn.Module, inputs: list[Any]) -> object:
        """What is timed, and whose outputs are compared."""
        return (self.step if self.request.training else self.forward)(model, inputs)

    def check(self) -> Verdict:
        """Compare the first outputs of two fresh models, PyTorch at its defaults; in training also
        the gradients of all parameters."""
        (output, gradients), (our_output, our_gradients) = (
            self.once(swap) for swap in (False, True)
        )
        try:
            with torch.no_grad():
                verdict = judge(output, our_output)
                if not any(True for _ in tensors(output)):
                    raise WorkerError("Model.forward returned no tensor")
                verdict.differences += gradient_differences(gradients, our_gradients)
                return verdict
        except torch.cuda.OutOfMemoryError:
            raise
        except (TypeError, RuntimeError) as error:  # a dtype that PyTorch cannot compare
            raise WorkerError(str(error)) from error

    def once(
        self, swap: bool, dtype: torch.dtype | None = None
    ) -> tuple[object, dict[str, torch.Tensor]]:
        """The output of a fresh model, which may be cast; in training the gradients too."""
        model, inputs = self.build(swap)
        if dtype is not None:
            model = model.to(dtype)
            inputs = [x.to(dtype) if _is_floating(x) else x for x in inputs]
            self._seed()
        with torch.set_grad_enabled(self.request.training):
            output = self.work(model, inputs)
        parameters = model.named_parameters()
        return output, {name: p.grad for name, p in parameters if p.grad is not None}

    def float64_errors(self) -> dict[str, float] | None:
        """How far both are from the model in float64, to tell whose fault it is: the relative norm
        of the output's difference, or if that is larger, of that of all gradients.

        None for a model that does not run in float64, or whose output is not one tensor.
        """
        try:
            exact, *found = (
                self.once(swap, dtype)
                for swap, dtype in ((False, torch.float64), (False, None), (True, None))
            )
            errors = [max(_errors(each, exact)) for each in found]
        except (WorkerError, RuntimeError, TypeError, ValueError, ZeroDivisionError):
            return None
        if not all(map(math.isfinite, errors)):
            return None
        return dict(zip(("pytorch", "dgrad"), errors, strict=True))

    def notes(self, equal: bool) -> list[str]:
        notes = [f"these layers stay PyTorch's: {self._left()}"] if self.left else []
        if self.device.type == "cpu":
            notes.append(
                "on the CPU PyTorch's own operator runs in dgrad's layers: expect a ratio near 1, "
                "or less where a run takes microseconds"
            )
        tf32 = any("/tf32 " in line and "TENSOR_OP_MATH" in line for line in self.messages)
        if tf32 and not equal:
            notes.append(
                "some of dgrad's choices multiply in tf32, as torch.backends.cudnn.allow_tf32 "
                "lets them: set it to False in the file to hold float32 against float32"
            )
        return notes + ([self.reduced] if self.reduced else [])

    def _left(self) -> str:
        return "; ".join(f"{name or 'the model'}: {reason}" for name, reason in self.left.items())

    def _seed(self) -> None:
        random.seed(self.request.seed)
        torch.manual_seed(self.request.seed)
        numpy = sys.modules.get("numpy")  # seeded only if someone uses it
        if numpy is not None:
            numpy.random.seed(self.request.seed)

    def _swap(self, model: nn.Module, swap: bool) -> None:
        turned = dgrad.convert(model)
        self.layers, self.left = len(turned), turned.left
        if not swap:
            dgrad.restore(model, only=lambda name, _: name in turned)
        if self.layers == 0:
            why = self._left() or "calls of torch.nn.functional are not swapped"
            raise WorkerError(f"Model has no torch.nn.ConvTranspose2d layer to swap ({why})")

    def _inputs(self) -> Any:
        built_in = self.request.file is None
        if built_in and self.device.type == "cpu" and not self.request.full_size:
            small, full = self.module.SMALL_SIZE, self.module.FULL_SIZE
            self.reduced = f"the input is {small} instead of {full}; --full-size keeps it"
            return self.module.get_small_inputs()
        return self.module.get_inputs()

    def _reduce(self, inputs: list[Any]) -> list[Any]:
        """Cut the batch to 1: the leading size of the first image, wherever it leads."""
        images = (x for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 4)
        batch = next((image.shape[0] for image in images), 1)
        if batch <= 1:
            return inputs
        self.reduced = "the input is cut to batch 1; --full-size keeps it"
        return [
            x[:1].clone() if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == batch else x
            for x in inputs
        ]

    @staticmethod
    def _expect_sequence(name: str, value: object) -> None:
        if not isinstance(value, (list, tuple)):
            raise WorkerError(f"{name} returned a {type(value).__name__}: expected a list")


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (list, tuple):
        return type(value)(_to(part, device) for part in value)
    if type(value) is dict:
        return {key: _to(part, device) for key, part in value.items()}
    return value


def _errors(
    found: tuple[object, dict[str, torch.Tensor]], exact: tuple[object, dict[str, torch.Tensor]]
) -> Iterator[float]:
    """The relative norms of the differences of the output, and of all gradients as one."""
    for kind in ([found[0]], [exact[0]]), (found[1].values(), exact[1].values()):
        pairs = list(zip(*kind, strict=True))
        if not all(isinstance(tensor, torch.Tensor) for pair in pairs for tensor in pair):
            raise TypeError("the output is not one tensor")
        if pairs:
            apart = [float(torch.linalg.vector_norm(a.double() - b)) for a, b in pairs]
            norms = [float(torch.linalg.vector_norm(b)) for _, b in pairs]
            yield math.hypot(*apart) / math.hypot(*norms)


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _collect_messages() -> list[str]:
    """What dgrad logs at INFO from now on: one line per selection."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("dgrad")
    logger.addHandler(Collector(logging.INFO))
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    return messages


def _answer(contestant: Contestant, request: dict[str, Any]) -> Answer:
    do = getattr(contestant, request.pop("do"))
    try:
        answer: Answer = do(**request)
    except WorkerError as error:
        answer = {"error": str(error), "fault": error.fault}
    except torch.cuda.OutOfMemoryError as error:
        answer = {"error": f"out of memory: {error}", "fault": "run"}
    except KeyboardInterrupt:  # nobody's Ctrl-C, which is ignored here
        answer = {"error": "the file raised KeyboardInterrupt", "fault": "file"}
    return answer


def main(argv: list[str]) -> int:
    serve(partial(_answer, Contestant(Request(**json.loads(argv[0])))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
