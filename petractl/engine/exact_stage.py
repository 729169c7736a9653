"""A stage as torch's pipeline schedules see it: one module, watched.

The schedules call a module with the streams that come from below and run autograd through it. Here is what
they do not know: the microbatch whose random numbers a unit draws, the counters, the time spent computing,
the layout of messages.

Before the first flush of each kind torch calls the module once on empty tensors to learn the shapes of the
messages (a *probe*). A probe changes nothing here: no counter, no running statistics.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from petractl.engine.recorder import Recorder
from petractl.engine.sentinel import Sentinel
from petractl.engine.stage import Counters, Totals
from petractl.engine.stopwatch import Stopwatch
from petractl.engine.tensor_tree import Tree
from petractl.engine.update import Updater
from petractl.errors import UserError
from petractl.methods.evaluation import Evaluator
from petractl.models.units import Streams


@dataclass(slots=True)
class ExactPart:
    """One stage of this process: its units, its optimiser, and what it has done."""

    index: int
    evaluators: Sequence[Evaluator]
    updater: Updater
    counters: Counters = field(default_factory=Counters)
    at_epoch_start: Counters = field(default_factory=Counters)
    totals: Totals = field(default_factory=Totals)
    offset: int = 0
    """Microbatches before the current epoch: in-unit randomness counts from the start of training."""
    replica: int = 0
    replicas: int = 1
    sentinel: Sentinel | None = None
    """Looks after the numbers."""
    bytes_sent_forward: int = 0
    bytes_sent_backward: int = 0

    def position(self, microbatch: int) -> int:
        """Return a microbatch's place in training, over all replicas: what in-unit randomness is drawn by."""
        return (self.offset + microbatch) * self.replicas + self.replica

    def suspended(self) -> dict[str, Tree]:
        """Return nothing: between two flushes, where a run is saved, nothing is in flight."""
        return {"versions": [], "flights": {}, "group": {"microbatches": 0, "samples": 0}}

    @property
    def guarded(self) -> Sequence[Evaluator]:
        """All that is evaluated here."""
        return self.evaluators

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained here, each once."""
        return list({id(p): p for e in self.evaluators for p in e.parameters}.values())


def _guard_unit(sentinel: Sentinel, unit: int, position: int, inputs: Streams, outputs: Streams) -> None:
    """Look at what a unit has made, and later at the gradients with respect to its inputs."""

    def look(gradient: Tensor) -> None:
        sentinel.gradients(unit, position, (), (gradient,), [])

    passed = [y for y in outputs if any(y is x for x in inputs)]
    made = tuple(y.detach() for y in outputs if not any(y is x for x in passed))
    sentinel.outputs(unit, position, tuple(x.detach() for x in inputs), made)
    for x in inputs:
        if x.requires_grad:
            x.register_hook(look)  # type: ignore[no-untyped-call]


class StageFailure(BaseException):
    """Carries an error of a unit or of the loss past the schedule.

    Not an `Exception`: on one of those, torch's runtime first waits for its pending sends, which the
    neighbours will never take, and hides the error in one of its own.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(str(error))


@contextmanager
def failures_escape() -> Iterator[None]:
    """Raise what goes wrong inside as a `StageFailure`, without the error that torch put around it."""
    try:
        yield
    except Exception as error:
        raise StageFailure(_cause(error)) from error


def _cause(error: Exception) -> Exception:
    inner = error.__cause__
    is_torchs = isinstance(error, RuntimeError) and "Failed to run stage backward" in str(error)
    return inner if is_torchs and isinstance(inner, Exception) else error


class Body(nn.Module):
    """The units of a stage as one module. `microbatch`: that of the epoch it works on, None in a probe.

    `splits_backward`: the schedule differentiates inputs and weights apart, and needs an input that has a
    gradient. `wire`: where messages lie, on the CPU for a backend that sends nothing else.
    """

    def __init__(
        self,
        part: ExactPart,
        *,
        is_first: bool,
        is_last: bool,
        splits_backward: bool,
        device: torch.device,
        wire: torch.device,
    ) -> None:
        super().__init__()
        self.units = nn.ModuleList(evaluator.unit for evaluator in part.evaluators)
        self.part = part
        self.is_first = is_first
        self.is_last = is_last
        self.splits_backward = splits_backward
        self.device = device
        self.wire = wire
        self.microbatch: int | None = None

    def forward(self, *streams: Tensor) -> Tensor | Streams:
        """Run the units; the last stage gives its first stream alone, for the loss."""
        with failures_escape():
            anchor = None if self.is_first else self._receive(streams)
            outputs = self._run(tuple(x.to(self.device) for x in streams))
            if self.is_last:
                return as_output(outputs[0], anchor=anchor)
            return tuple(as_output(_dense(y.to(self.wire)), anchor=anchor) for y in outputs)

    def _run(self, streams: Streams) -> Streams:
        is_probe = self.microbatch is None
        microbatch = self.part.position(self.microbatch or 0)
        sentinel = None if is_probe else self.part.sentinel
        if sentinel is not None:
            sentinel.received(microbatch, streams, upwards=True)
        for n, evaluator in enumerate(self.part.evaluators):
            inputs = streams
            streams = evaluator.embedded(inputs, microbatch=microbatch, live=not is_probe)
            if sentinel is not None:
                _guard_unit(sentinel, n, microbatch, inputs, streams)
        self.part.counters.forwards += not is_probe
        return streams

    def _receive(self, streams: Streams) -> Tensor | None:
        """Prepare what came from below, and return one stream that has a gradient."""
        tracked = [x for x in streams if x.requires_grad]
        for x in tracked:
            # Sent as plain memory, so it must have the strides that the receiver was told.
            x.register_hook(partial(_with_strides, strides=x.stride()))  # type: ignore[no-untyped-call]
        if self.microbatch is None:
            for x in streams:
                # A probe's memory is not initialised: an index in it could be out of range.
                with torch.no_grad():
                    x.zero_()
        if self.splits_backward and not tracked:
            raise UserError(
                "no stream that enters it has a gradient, as zero-bubble needs",
                where=f"stage {self.part.index}",
                hint='cut the net elsewhere (partition.cuts), or set engine.schedule = "1f1b"',
            )
        return tracked[0] if tracked else None


class WatchedStage(PipelineStage):
    """A stage that tells its module the microbatch, and counts and times what it does."""

    def __init__(
        self,
        body: Body,
        *,
        num_stages: int,
        group: dist.ProcessGroup,
        stopwatch: Stopwatch,
        on_backward: Callable[[int], None],
    ) -> None:
        super().__init__(body, body.part.index, num_stages, body.wire, group=group)
        self.first = 0
        """The microbatch of the epoch that is number 0 of the flush."""
        self.recorder: Recorder | None = None
        """Set to record when the stage did what."""
        self._body = body
        self._stopwatch = stopwatch
        self._on_backward = on_backward

    def rest(self) -> None:
        """End a flush: what the module is called for next may be a probe."""
        self._body.microbatch = None

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        """Run the module for a microbatch of the flush."""
        self._body.microbatch = self.first + fwd_chunk_id
        with self._watched("F", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: Any = False
    ) -> None:
        """Differentiate for a microbatch: all, or the inputs only if the weights come later."""
        with failures_escape(), self._watched("B", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if full_backward:
            self._done(bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: Any = False) -> None:
        """Differentiate with respect to the weights."""
        with failures_escape(), self._watched("W", bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self._done(bwd_chunk_id)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        """Return the receives of the activations."""
        return _in_plain_memory(super().get_fwd_recv_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Return the receives of the gradients."""
        return _in_plain_memory(super().get_bwd_recv_ops(bwd_chunk_id))

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        """Return the sends of the activations."""
        ops = _in_plain_memory(super().get_fwd_send_ops(fwd_chunk_id))
        self._body.part.bytes_sent_forward += sum(op.tensor.nbytes for op in ops)
        return ops

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Return the sends of the gradients."""
        ops = _in_plain_memory(super().get_bwd_send_ops(bwd_chunk_id))
        self._body.part.bytes_sent_backward += sum(op.tensor.nbytes for op in ops)
        return ops

    @contextmanager
    def _watched(self, kind: str, chunk: int) -> Iterator[None]:
        """Count the time of what happens inside, and record it."""
        with ExitStack() as stack:
            stack.enter_context(self._stopwatch.running())
            if self.recorder is not None:
                stack.enter_context(self.recorder.work(self._body.part.index, kind, self.first + chunk))
            yield

    def _done(self, chunk: int) -> None:
        self._body.part.counters.backwards += 1
        self._on_backward(self.first + chunk)


class _Output(torch.autograd.Function):
    """The same memory, as a tensor of its own in the graph that is no view and depends on a stage's input.

    Zero-bubble detaches what a stage gives in place before it differentiates the weights: refused for views,
    and ruinous for a last operation that has saved its output (a ReLU, a tanh). And it finds the weights
    where their way to the outputs meets an input's: without `anchor` a weight that reaches an output alone
    would get no gradient, in silence.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None) -> Tensor:
        return x.data

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def as_output(x: Tensor, *, anchor: Tensor | None = None) -> Tensor:
    """Return a tensor's memory and derivative as a stage's output; a gradient will come for it."""
    if not x.is_floating_point():
        return x
    result: Tensor = _Output.apply(x, anchor)
    return result if result.requires_grad else result.requires_grad_()


def _dense(x: Tensor) -> Tensor:
    """Return a stream in one piece of memory, in whatever order: its memory is what is sent."""
    return x if torch.empty_like(x, device="meta").stride() == x.stride() else x.contiguous()


def _in_plain_memory(ops: list[Any]) -> list[Any]:
    """Let sends and receives see flat memory: gloo takes no channels-last tensors."""
    for op in ops:
        op.tensor = op.tensor.as_strided((op.tensor.numel(),), (1,))
    return ops


def _with_strides(x: Tensor, *, strides: tuple[int, ...]) -> Tensor:
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
