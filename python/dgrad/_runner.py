"""Runs one problem: chooses with the planner, measures where it must, and goes on to the next
candidate where one fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING

import torch
from torch.profiler import record_function

from . import _kernels, _loader, config, log, store
from ._candidates import make_plan, other_precision, pass_operation
from ._for_graphs import ForGraphs, label_of, plan_for_graphs
from ._knowledge import Use, knowledge_of
from ._measuring import FAILURES, UNPLANNABLE, Measuring, timing_policy
from ._refusal import failed, nothing_usable, reason
from ._watch import note, observers, profiling, watchers
from .config import Policy
from .exceptions import CudnnError, CudnnNotInitializedError
from .planner import objection, plan_cache, preference, selection_of, source_of, untimed
from .selection import ADD, FUSED, Selection

if TYPE_CHECKING:
    from torch import Tensor

    from ._core import Plan, Problem, ReadyCall, ReadyGradients
    from ._measuring import Tensors


class Runner:
    """Runs one problem under one policy, on the thread that made it.

    The best usable candidate runs. One that fails, or whose workspace cannot be had, is noted
    with the reason for all threads, and the next one takes its place.
    """

    __slots__ = (
        "_bias",
        "_corrects",
        "_device",
        "_for_graphs",
        "_index",
        "_knowledge",
        "_label",
        "_plan",
        "_policy",
        "_problem",
        "_provisional",
        "_repeats",
        "_restored",
        "use",
    )

    def __init__(self, problem: Problem, policy: Policy) -> None:
        self._problem = problem
        self._policy = policy
        self._device = torch.device("cuda", problem.device)
        self._plan: Plan | None = None
        self._restored = False  # whether the plan is of kernels that were kept
        self.use: Use | None = None  # of what was announced, to count it
        self._provisional = False
        self._for_graphs: ForGraphs | None = None  # what a CUDA graph gets instead
        self._corrects = False  # whether what runs was withheld by the store
        # How often a pass for the bias wants it repeated: once for each image.
        self._repeats = problem.x[0] if pass_operation(problem) == "bias_rows" else 1

    def run(self, x: Tensor, w: Tensor, y: Tensor, bias: Tensor | None = None) -> None:
        """Queue the work on the current stream; the problem's device must be current.

        Args:
            x, w, y: dense in the problem's layout; the result of the direction is overwritten.
            bias: what x gets added if the problem has a bias.

        Raises:
            NotSupportedError: no candidate can run; OutOfMemoryError if memory is what lacks.
        """
        while True:
            if self._plan is None or self._provisional:
                self._choose((x, w, y, bias))
            assert self._plan is not None
            plan, how, label = self._plan, self._bias, self._label
            rehearsed = bool(watchers and observers())
            if plan.compiles or self._for_graphs is not None or rehearsed:
                if torch.cuda.is_current_stream_capturing():
                    if self._for_graphs is not None:
                        _, plan, how, label = self._for_graphs
                    if plan.compiles:
                        _loader.require().keep_for_graphs(plan)
                elif rehearsed:
                    self._prepare_for_graphs((x, w, y, bias))
            try:
                if profiling():
                    with record_function(label):
                        self._execute(plan, how, x, w, y, bias)
                else:
                    self._execute(plan, how, x, w, y, bias)
            except FAILURES as error:
                if isinstance(error, CudnnError) and torch.cuda.is_current_stream_capturing():
                    raise  # of the capture, perhaps, and not of the candidate
                if plan is not self._plan:
                    log.not_for_graphs(label, error)
                    self._for_graphs = None
                    continue
                candidate = self._knowledge.candidates[self._index]
                again = self._restored and _kernels.distrust(self._problem, candidate, error)
                if not again:
                    self._reject(self._index, error)
                self._plan = None
                continue
            if self.use is None:
                self.use = self._announce()
            if rehearsed:  # which does not count
                note(self.selection())
                self._knowledge.pack()
            else:
                self.use.runs += 1
            return

    def _prepare_for_graphs(self, tensors: Tensors) -> None:
        made = plan_for_graphs(
            self._knowledge,
            self._policy,
            self._index,
            self._for_graphs,
            execute=lambda plan, how: self._execute(plan, how, *tensors),
            note_workspace=self._note_workspace,
            reject=self._reject,
        )
        if made is not self._for_graphs:
            plan_cache.forget_ready()
            self._for_graphs = made

    def _execute(
        self,
        plan: Plan,
        how: str | None,
        x: Tensor,
        w: Tensor,
        y: Tensor,
        bias: Tensor | None,
    ) -> None:
        """Run a plan, and what is left of the bias; ``how`` is the candidate's."""
        size = plan.workspace_bytes
        # A storage and not a tensor, which deterministic algorithms would fill at each call.
        workspace = torch.UntypedStorage(size, device=self._device) if size else None
        rows = bias
        if bias is not None and how not in (FUSED, ADD) and self._repeats > 1:
            rows = bias.repeat(self._repeats)
        plan.execute(
            x.data_ptr(),
            w.data_ptr(),
            y.data_ptr(),
            0 if rows is None else rows.data_ptr(),
            0 if workspace is None else workspace.data_ptr(),
            torch._C._cuda_getCurrentRawStream(self._problem.device),
        )
        if how == ADD:
            assert bias is not None
            x.add_(bias.view(1, -1, 1, 1))

    def ready(
        self,
        make_out: Callable[[], Tensor],
        recipe: object,
        gradients: ReadyGradients | None = None,
    ) -> ReadyCall | None:
        """What native code needs to run this as it last ran, or None if that is not settled."""
        if self._plan is None or self._provisional or self.use is None:
            return None
        core, use, size = _loader.require(), self.use, self._plan.workspace_bytes
        by_cudnn = self._problem.bias and self._bias != ADD
        repeated = by_cudnn and self._bias != FUSED and self._repeats > 1
        may_differ = self._plan.compiles or self._for_graphs is not None  # in a capture
        call: ReadyCall = core.ReadyCall(
            plan=self._plan,
            direction=self._problem.direction,
            make_out=make_out,
            make_workspace=partial(torch.UntypedStorage, size, device=self._device)
            if size
            else None,
            enter_bias=methodcaller("repeat", self._repeats) if repeated else None,
            is_capturing=torch._C._cuda_isCurrentStreamCapturing if may_differ else None,
            plan_reads_bias=by_cudnn,
            pytorch_adds_bias=self._bias == ADD,
            python_captures=self._for_graphs is not None,
            uses=use.native_count(core.UseCount),
            recipe=recipe,
            gradients=gradients,
        )
        return call

    def _choose(self, tensors: Tensors) -> None:
        self._knowledge = knowledge = knowledge_of(self._problem)
        wanted = self._policy.wanted(self._problem.direction)
        may_ask, lacking = knowledge.doubted is None, knowledge.lacks(wanted)
        if not (may_ask and lacking) and self._settle(tensors):
            return
        asked = may_ask and knowledge.ask_again()
        if asked:
            self._corrects = not (lacking and knowledge.lacks(wanted))
        if (asked or (may_ask and lacking)) and self._settle(tensors):
            return
        self._corrects = False
        raise nothing_usable(knowledge, self._policy)

    def _settle(self, tensors: Tensors) -> bool:
        """Choose, measuring what is missing; whether there is something to run."""
        problem, policy, knowledge = self._problem, self._policy, self._knowledge
        missing, capturing = self._untimed(), torch.cuda.is_current_stream_capturing()
        self._provisional = bool(missing) and capturing
        if self._provisional and self._plan is not None:
            return True
        timed: dict[int, Plan] = {}
        if missing and not capturing:
            self._plan = None  # a capture's choice does not outlive an interrupt of this
            timed = self._complete(tensors)
        failed, outdated = None, False
        for index in preference(knowledge.candidates, problem.direction, policy):
            try:
                plan, restored = timed.get(index), False
                if plan is None:
                    plan, restored = _kernels.make_plan(problem, knowledge.candidates[index])
                    self._note_workspace(index, plan)
            except UNPLANNABLE as error:
                if capturing and isinstance(error, CudnnError):
                    failed = error  # of the capture, perhaps, and not of the candidate
                else:
                    self._reject(index, error)
                    outdated = knowledge.believed
                continue
            candidate = knowledge.candidates[index]
            if objection(candidate, problem.direction, policy) is not None:
                continue  # the plan knows a larger workspace than the heuristic did
            # An interrupt finds all of one choice: what may call Python comes first.
            label = label_of(problem, candidate)
            self._for_graphs = None
            self.use, self._label, self._restored = None, label, restored
            self._index, self._bias, self._plan = index, candidate.bias, plan
            if self._provisional:
                log.captured(problem)
            if outdated:  # so that no other process tries what is not to be had any more
                store.write(problem, knowledge.candidates)
            knowledge.pack()
            return True
        if failed is not None:
            raise failed
        return False

    def _complete(self, tensors: Tensors) -> dict[int, Plan]:
        """Measure what is missing, unless another thread or process does so first; the plans of
        what was timed."""
        problem, knowledge = self._problem, self._knowledge
        plans: dict[int, Plan] = {}
        with knowledge.measuring:
            if not self._untimed():
                return plans
            with store.claim(problem):
                knowledge.refresh()
                missing = self._untimed()
                if missing:
                    measuring = Measuring(
                        problem,
                        self._policy,
                        knowledge,
                        tensors,
                        make_plan=self._make_plan,
                        execute=self._execute,
                        reject=self._reject,
                    )
                    measuring.measure(missing)
                    plans = measuring.plans
            knowledge.forget(policy=self._policy)  # what ran in a capture is chosen anew
        strict = problem.dtype == "float32" and not problem.tf32
        if missing and strict and not config.tf32_overridden():
            self._complete_tf32(tensors)
        return plans

    def _complete_tf32(self, tensors: Tensors) -> None:
        """Measure what tf32 adds to a strict problem, so that allowing it measures nothing."""
        other = Runner(other_precision(self._problem), self._policy)
        try:
            other._knowledge = knowledge_of(other._problem)
            other._complete(tensors)
            other._knowledge.pack()
        except Exception as error:  # of what was not asked for: this call goes on
            log.not_measured(other._problem, error)

    def _untimed(self) -> list[int]:
        timing = timing_policy(self._policy)
        return untimed(self._knowledge.candidates, self._problem.direction, timing)

    def _make_plan(self, index: int) -> Plan:
        """A plan of nothing that was kept: what is measured is what this cuDNN compiles."""
        plan = make_plan(self._problem, self._knowledge.candidates[index])
        self._note_workspace(index, plan)
        return plan

    def _note_workspace(self, index: int, plan: Plan) -> None:
        """The heuristic's is an estimate."""
        if plan.workspace_bytes != self._knowledge.candidates[index].workspace_bytes:
            self._knowledge.update(index, workspace_bytes=plan.workspace_bytes)

    def _reject(self, index: int, error: Exception) -> None:
        """Note that a candidate does not run, for all threads."""
        if isinstance(error, CudnnNotInitializedError):
            raise error  # cuDNN does not start: no fault of the candidate
        text, out_of_memory = reason(self._knowledge.candidates[index], error)
        self._knowledge.forget(chosen=index)
        candidate = self._knowledge.reject(index, text, out_of_memory)
        log.rejected(self._problem, candidate)

    def failed(self, error: CudnnError) -> RuntimeError:
        """What to raise for an error of cuDNN's that is no candidate's."""
        return failed(error, self._problem, self._policy)

    def selection(self) -> Selection:
        """What this runner has chosen, and why."""
        return selection_of(self._knowledge, self._policy, self._index, self._source())

    def _source(self) -> str:
        return source_of(self._knowledge, self._policy, self._index)

    def _announce(self) -> Use:
        use, new = self._knowledge.has_run(self._policy, self._index, self._source())
        if new:
            log.selected(self.selection(), self._policy)
        if not self._restored and self._plan is not None:
            _kernels.keep(self._problem, self._knowledge.candidates[self._index], self._plan)
        entry = self._knowledge.doubted
        if self._corrects and entry is not None:
            store.correct(entry, self._problem, self._knowledge.candidates)
            self._corrects = False
        self._knowledge.pack()
        return use
