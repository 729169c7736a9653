"""Cuts: how a run is saved in the middle of an epoch without being drained.

The cut after microbatch m is where every stage has done m's backward, with the update if it closes a group,
and nothing after it. The lists of operations say what that is: stage j has had the forwards up to m + W_j,
and the activations of m + W_{j+1} + 1 ... m + W_j are on their way to the stage above. Nothing is on its way
down.

    stage 0      decides on a cut as it takes m from the data, up to W_0 microbatches ahead               (1)
    all stages   learn of it with m's activations (`Activation.cut`), before m's backward                 (2)
                 keep the messages they send that will be on their way at the cut                         (3)
                 hand over what they hold as they stand at the cut, and go on                             (4)

So no stage waits for another, and nobody has to be asked. What is handed over is referred to where nothing
changes it in place, and copied where training does.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from petractl.engine.messages import Activation
from petractl.engine.schedule import Kind, Operation, closes_group
from petractl.engine.stage import Counters, Totals
from petractl.engine.tensor_tree import Tree
from petractl.engine.update import Updater

SAVE = 1
STOP = 2
"""Flags of a cut: the run is saved; and it then ends."""


@dataclass(frozen=True, slots=True)
class StageCut:
    """A stage at a cut: what it holds besides parameters, buffers and the optimiser's state.

    `microbatch` is the last of the epoch whose backward it has done. `sent` are the activations on their way
    to the stage above; `state` is what the stage's `suspended` gave.
    """

    stage: int
    microbatch: int
    flags: int
    sent: tuple[Activation, ...]
    state: dict[str, Any]


class StageRecord(Protocol):
    """What everyone may know of a stage: who it is, what it has done, how it updates, what it holds."""

    index: int
    counters: Counters
    at_epoch_start: Counters
    totals: Totals
    updater: Updater

    def suspended(self) -> dict[str, Tree]:
        """Return what it holds besides parameters, buffers and the optimiser's state."""
        ...


class Cutter(Protocol):
    """Decides on cuts where microbatches enter, and takes what the stages hand over.

    With replicas all must cut at the same row: they agree on it with each update, for which they wait anyway.
    """

    def decide(self, microbatch: int) -> int:
        """Return the flags of a cut after this microbatch, 0 for none; asked before its first forward."""
        ...

    def before_update(self, microbatch: int) -> None:
        """Hear that the first stage is about to give gradients to the update after this microbatch."""
        ...

    def after_update(self, microbatch: int) -> None:
        """Hear that the first stage has updated."""
        ...

    def take(self, stage: StageRecord, cut: StageCut) -> None:
        """Take a stage that stands at a cut; it goes on when this returns."""
        ...


class PendingCuts:
    """The cuts that one stage has heard of and not yet come to.

    `lookahead_above` is that of the stage above, None on the last stage.
    """

    def __init__(self, *, lookahead_above: int | None, num_microbatches: int, accumulation: int) -> None:
        self._above = lookahead_above
        self._num_microbatches = num_microbatches
        self._accumulation = accumulation
        self._flags: dict[int, int] = {}
        self._sent: dict[int, list[Activation]] = {}

    def hear(self, microbatch: int, flags: int) -> None:
        """Note a cut, if there is one."""
        if flags:
            self._flags[microbatch] = flags
            self._sent[microbatch] = []

    def sending(self, message: Activation) -> None:
        """Keep a message that goes up, for the cuts at which it will be on its way."""
        if self._above is not None:
            for microbatch, kept in self._sent.items():
                if message.microbatch > microbatch + self._above:
                    kept.append(replace(message, cut=0))

    def reached(self, operation: Operation) -> tuple[int, int, tuple[Activation, ...]] | None:
        """Return (microbatch, flags, messages on their way) of a cut at which `operation` has ended."""
        m = operation.microbatch
        if m not in self._flags or operation.kind is Kind.FORWARD:
            return None
        updates = closes_group(m, num_microbatches=self._num_microbatches, accumulation=self._accumulation)
        if updates and operation.kind is not Kind.UPDATE:
            return None
        return m, self._flags.pop(m), tuple(self._sent.pop(m))


def recorded_state(stage: StageRecord) -> dict[str, Tree]:
    """Return what every stage counts, as a tree."""
    totals = stage.totals
    return {
        "counters": asdict(stage.counters),
        "at_epoch_start": asdict(stage.at_epoch_start),
        "totals": {"samples": totals.samples, "loss": totals.loss, "correct": totals.correct},
    }


def restore_recorded(stage: StageRecord, state: Mapping[str, Tree]) -> None:
    """Put back what `recorded_state` returned."""
    stage.counters = Counters(**state["counters"])
    stage.at_epoch_start = Counters(**state["at_epoch_start"])
    totals = state["totals"]
    stage.totals = Totals(**totals, carried=totals["samples"])
