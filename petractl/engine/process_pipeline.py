"""The engine of one process: one stage, the messages of its neighbours, and the stage's list of operations.

The list is the schedule's, the same as in one process, and the process blocks only on the message that its
next operation needs: so the result has the same bits, whatever the speed of the machines.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch

from petractl.engine.cut import STOP, Cutter, PendingCuts, StageCut
from petractl.engine.links import Inbox, Outbox
from petractl.engine.measures import Measures
from petractl.engine.messages import Activation, Gradient
from petractl.engine.pipeline import MicrobatchSource, StageLike, begin_stretch
from petractl.engine.recorder import Recorder
from petractl.engine.schedule import (
    WHOLE_EPOCH,
    Kind,
    Operation,
    Stretch,
    closes_group,
    group_size,
    stage_operations,
)
from petractl.engine.stopwatch import Stopwatch
from petractl.errors import PeerLost, RunError, Stalled, Stopped

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Links:
    """The four links of a stage; None where there is no neighbour."""

    from_below: Inbox[Activation] | None = None
    to_below: Outbox[Gradient] | None = None
    to_above: Outbox[Activation] | None = None
    from_above: Inbox[Gradient] | None = None

    def lost_ranks(self) -> list[int]:
        """Return the neighbours to whom the connection has broken."""
        links = (self.from_below, self.to_below, self.to_above, self.from_above)
        lost = [link.lost for link in links if link is not None]
        return sorted({rank for rank in lost if rank is not None})

    def close(self) -> None:
        """End the links' threads."""
        for link in (self.from_below, self.to_below, self.to_above, self.from_above):
            if link is not None:
                link.close()


class ProcessPipeline:
    """One stage of a pipeline, driven by its list of operations; see the module's docstring.

    `lookahead_above` is that of the stage above, None where there is none. `stall_timeout_s` is how long it
    waits for a message before it gives up (0: for ever).
    """

    def __init__(
        self,
        stage: StageLike,
        *,
        links: Links,
        lookahead: int,
        accumulation: int,
        lookahead_above: int | None = None,
        stall_timeout_s: float = 0.0,
        device: torch.device = _CPU,
        name: str = "",
    ) -> None:
        self.stages = (stage,)
        self.accumulation = accumulation
        self.measures = Measures()
        self._stage = stage
        self._links = links
        self._lookahead = lookahead
        self._lookahead_above = lookahead_above
        self._on_their_way: tuple[Activation, ...] = ()
        self._timeout_s = stall_timeout_s
        self._name = name
        self.recorder: Recorder | None = None
        """Set to record when the stage did what."""
        # A GPU works on while the host waits: only its own clock tells how long.
        self._stopwatch = Stopwatch(device) if device.type == "cuda" else None

    def train(
        self,
        source: MicrobatchSource | None,
        *,
        num_microbatches: int,
        num_rows: int | None = None,
        offset: int = 0,
        on_microbatch: Callable[[int], None] | None = None,
        stretch: Stretch = WHOLE_EPOCH,
        cutter: Cutter | None = None,
    ) -> None:
        """Train on the epoch's microbatches, or a stretch of them; all that enter get their backward.

        `source` is given to the first stage and to no other. `num_rows` is the largest number of microbatches
        among the replicas, `offset` the rows trained on before the epoch. `on_microbatch(i)` is called after
        this stage's backward of microbatch i.

        Raises:
            PeerLost: a neighbour is gone.
            Stalled: a message did not come.
            Stopped: a cut has said so.
        """
        stage, links = self._stage, self._links
        begin_stretch(self.stages, stretch, offset=offset)
        self.measures = measures = Measures()
        before = self.link_totals()
        started = time.perf_counter()
        self._expect(stretch, num_microbatches)
        self._send_again()
        cuts = PendingCuts(
            lookahead_above=self._lookahead_above,
            num_microbatches=num_microbatches,
            accumulation=self.accumulation,
        )
        operations = stage_operations(
            lookahead=self._lookahead,
            num_microbatches=num_microbatches,
            accumulation=self.accumulation,
            is_last=links.to_above is None or stage.is_alone,
            num_rows=num_rows,
            stretch=stretch,
        )
        for operation in operations:
            self._execute(operation, source, num_microbatches, cuts, cutter)
            if operation.kind in (Kind.BACKWARD, Kind.FORWARD_BACKWARD):
                measures.staleness_sum += stage.delay
                measures.backwards += 1
                if on_microbatch is not None:
                    on_microbatch(operation.microbatch)
            self._hand_over(operation, cuts, cutter)
        self._flush()
        assert stage.microbatches_in_flight() == 0
        measures.seconds = time.perf_counter() - started
        after = self.link_totals()
        measures.wait_forward_s, measures.wait_backward_s, measures.wait_replicas_s = (
            b - a for a, b in zip(before[:3], after[:3], strict=True)
        )
        if self._stopwatch is not None:
            measures.is_itemised = False
            measures.wait_other_s = max(0.0, measures.seconds - self._stopwatch.read())
            measures.wait_data_s = measures.wait_forward_s = 0.0
            measures.wait_backward_s = measures.wait_replicas_s = 0.0
        measures.bytes_sent_forward = int(after[3] - before[3])
        measures.bytes_sent_backward = int(after[4] - before[4])

    def resume(self, cuts: Sequence[StageCut], *, offset: int) -> None:
        """Put back what the stage held at a cut; the next `train` sends what was on its way."""
        (cut,) = cuts
        self._stage.offset = offset
        self._stage.resume(cut.state)
        self._on_their_way = cut.sent

    def entered(self, stretch: Stretch, *, num_microbatches: int) -> int:
        """Return how many of the epoch's microbatches have entered this stage before a stretch."""
        return stretch.entered(lookahead=self._lookahead, num_microbatches=num_microbatches)

    def stage_measures(self) -> tuple[Measures, ...]:
        """Return how the stage spent the last epoch."""
        return (self.measures,)

    def lost_ranks(self) -> list[int]:
        """Return the neighbours to whom the connection has broken."""
        return self._links.lost_ranks()

    def close(self) -> None:
        """End the links' threads."""
        self._links.close()

    def _expect(self, stretch: Stretch, num_microbatches: int) -> None:
        """Begin to receive the messages that a stretch needs."""
        links, end = self._links, stretch.end(num_microbatches)
        if links.from_below is not None:
            links.from_below.expect(end - self.entered(stretch, num_microbatches=num_microbatches))
        if links.from_above is not None:
            links.from_above.expect(end - min(stretch.done, end))

    def _send_again(self) -> None:
        """Send what was on its way up at the cut that this stage goes on from."""
        for message in self._on_their_way:
            assert self._links.to_above is not None
            self._links.to_above.send(message, timeout_s=self._timeout_s)
        self._on_their_way = ()

    def _hand_over(self, operation: Operation, cuts: PendingCuts, cutter: Cutter | None) -> None:
        """Hand the stage over if it stands at a cut.

        Raises:
            Stopped: the run ends here.
        """
        if cutter is None:
            return
        if operation.kind is Kind.UPDATE and self._links.from_below is None:
            cutter.after_update(operation.microbatch)
        reached = cuts.reached(operation)
        if reached is None:
            return
        m, flags, sent = reached
        cutter.take(self._stage, StageCut(self._stage.index, m, flags, sent, self._stage.suspended()))
        if flags & STOP:
            self._flush()
            raise Stopped

    def _flush(self) -> None:
        for link in (self._links.to_above, self._links.to_below):
            if link is not None:
                link.flush(timeout_s=self._timeout_s)

    def _execute(
        self,
        operation: Operation,
        source: MicrobatchSource | None,
        total: int,
        cuts: PendingCuts,
        cutter: Cutter | None,
    ) -> None:
        stage, links, i = self._stage, self._links, operation.microbatch
        size = group_size(i, num_microbatches=total, accumulation=self.accumulation)
        if cutter is not None and links.from_below is None and self._begins_update(operation, total, size):
            cutter.before_update(i)
        if operation.kind is Kind.UPDATE:
            with self._waits_named(operation), self._timed(operation):
                stage.update(partial=size < self.accumulation)
        elif operation.kind is Kind.BACKWARD:
            assert links.from_above is not None
            before = links.from_above.waited_s
            gradient = links.from_above.receive(i, operation=str(operation), timeout_s=self._timeout_s)
            with self._timed(operation, waited_s=links.from_above.waited_s - before):
                self._send_down(stage.backward(gradient, group_size=size))
        else:
            activation, waited_s = self._take(operation, source, cutter)
            cuts.hear(i, activation.cut)
            with self._timed(operation, waited_s=waited_s):
                answer: Activation | Gradient
                if operation.kind is Kind.FORWARD:
                    answer = stage.forward(activation)
                else:
                    answer = stage.forward_backward(activation, group_size=size)
                self._send(answer, cuts, activation.cut)

    def _begins_update(self, operation: Operation, total: int, size: int) -> bool:
        """Tell of the operation in which the first gradients leave that replicas wait for."""
        if operation.kind is Kind.UPDATE:
            return size == 0
        closes = closes_group(operation.microbatch, num_microbatches=total, accumulation=self.accumulation)
        return closes and operation.kind is not Kind.FORWARD

    def _timed(self, operation: Operation, *, waited_s: float = 0.0) -> AbstractContextManager[object]:
        if self.recorder is None:
            return nullcontext() if self._stopwatch is None else self._stopwatch.running()
        stack = ExitStack()
        if self._stopwatch is not None:
            stack.enter_context(self._stopwatch.running())
        stack.enter_context(self.recorder.operation(self._stage.index, operation, waited_s=waited_s))
        return stack

    @contextmanager
    def _waits_named(self, operation: Operation) -> Iterator[None]:
        """Say of a wait for the replicas who waited, and in what."""
        try:
            yield
        except Stalled as error:
            what = f"{self._name} has waited {self._timeout_s:g} s in {operation}: {error.what}"
            raise Stalled(what, hint=error.hint) from error
        except PeerLost as error:
            raise PeerLost(f"{self._name}, in {operation}: {error.what}") from error

    def _take(
        self, operation: Operation, source: MicrobatchSource | None, cutter: Cutter | None
    ) -> tuple[Activation, float]:
        """Return the next activation, and the seconds waited for it; where data enter, decide on a cut."""
        i, below = operation.microbatch, self._links.from_below
        if below is not None:
            before = below.waited_s
            message = below.receive(i, operation=str(operation), timeout_s=self._timeout_s)
            return message, below.waited_s - before
        assert source is not None, "the first stage needs data"
        started = time.perf_counter()
        microbatch = next(source, None)
        waited_s = time.perf_counter() - started
        self.measures.wait_data_s += waited_s
        if microbatch is None:
            raise RunError(f"the data ended after {i} microbatches", where="stage 0", hint="check the data")
        images, labels = microbatch
        flags = 0 if cutter is None else cutter.decide(i)
        return Activation(i, (images,), labels, flags), waited_s

    def _send(self, message: Activation | Gradient, cuts: PendingCuts, flags: int) -> None:
        """Send what a forward, or a whole microbatch, has given; a message upwards tells of a cut."""
        if isinstance(message, Gradient):
            self._send_down(message)
        else:
            assert self._links.to_above is not None
            cuts.sending(message)
            self._links.to_above.send(replace(message, cut=flags), timeout_s=self._timeout_s)

    def _send_down(self, message: Gradient) -> None:
        if self._links.to_below is not None:
            self._links.to_below.send(message)

    def link_totals(self) -> tuple[float, float, float, int, int]:
        """Return seconds waited for below, above and replicas, bytes sent up and down, since the start."""
        links = self._links
        reducer = getattr(self._stage, "reducer", None)
        return (
            links.from_below.waited_s if links.from_below else 0.0,
            links.from_above.waited_s if links.from_above else 0.0,
            reducer.wait_s if reducer is not None else 0.0,
            links.to_above.bytes_sent if links.to_above else 0,
            links.to_below.bytes_sent if links.to_below else 0,
        )
