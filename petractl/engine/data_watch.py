"""What the training data cost a run: how long it waited for them, and which samples were left out.

Data enter in one process of each replica; what is counted there is told at the end of an epoch, where the
replica that waited longest is the one that counts: the others waited for it.
"""

from collections.abc import Generator, Sequence
from typing import Protocol

from petractl.data.encoded import BadSample
from petractl.data.skips import too_many
from petractl.engine.evaluation import LabelledBatch
from petractl.events import SamplesSkipped, WarningRaised

WAIT_WARNING_PERCENT = 10.0
# A share of next to no time says nothing.
_WAIT_WARNING_S = 1.0
_EARLY_WARNING_S = 30.0
"""An epoch may take hours: one that has gone on for so long is warned of before its end."""
_NAMED_SAMPLES = 10


class TrainingData(Protocol):
    """A source of epochs; what it yields is a function of (epoch, index) alone."""

    @property
    def wait_s(self) -> float:
        """Seconds that were waited for it so far."""
        ...

    @property
    def start_s(self) -> float:
        """Seconds of them that were waited for the first microbatch of an epoch."""
        ...

    @property
    def skipped(self) -> Sequence[BadSample]:
        """Bad samples left out so far; it only grows."""
        ...

    @property
    def max_skipped(self) -> int:
        """How many different ones may be left out, by all replicas together."""
        ...

    @property
    def slow_hint(self) -> str:
        """What to change where the waiting is too long."""
        ...

    def epoch(self, epoch: int, *, start: int = 0) -> Generator[LabelledBatch, None, None]:
        """Yield the microbatches of an epoch, counted from 0; closing it ends what it has started."""
        ...


class DataWatch:
    """Watches the data of this process; None where none enter."""

    def __init__(self, data: TrainingData | None) -> None:
        self._data = data
        self._waited_before_s = 0.0
        self._start_before_s = 0.0
        self._told = 0
        self._different: set[str] = set()
        self._has_warned = False

    def begin(self) -> None:
        """Begin to count the waiting of an epoch."""
        if self._data:
            self._waited_before_s, self._start_before_s = self._data.wait_s, self._data.start_s

    def waited_s(self) -> float:
        """Return the seconds waited since the epoch began."""
        return self._data.wait_s - self._waited_before_s if self._data else 0.0

    def steady_s(self) -> float:
        """Return the seconds waited since the epoch began, but for its first microbatch."""
        return self.waited_s() - (self._data.start_s - self._start_before_s) if self._data else 0.0

    def wait_percent(self, seconds: float) -> float | None:
        """Return the share of `seconds`, the epoch so far; None where no data enter."""
        return 100.0 * self.waited_s() / seconds if self._data and seconds > 0 else None

    def newly_skipped(self) -> tuple[str, ...]:
        """Return "shard: key: reason" of the samples left out since this was last asked."""
        samples = self._data.skipped if self._data else ()
        new = tuple(str(bad) for bad in samples[self._told :])
        self._told += len(new)
        return new

    def require_few(self, skipped: Sequence[tuple[str, ...]]) -> None:
        """Raise `DataError` where the replicas together have left out more than they may; called on rank 0.

        Each replica counts its own as it meets them; here they meet, after each epoch and evaluation.
        """
        for sample in (sample for of_replica in skipped for sample in of_replica):
            self._different.add(sample)
            if self._data and len(skipped) > 1 and len(self._different) > self._data.max_skipped:
                count, limit = len(self._different), self._data.max_skipped
                raise too_many(count, limit=limit, last=sample, where="all replicas together")

    def early_warning(self, epoch: int, *, seconds: float) -> WarningRaised | None:
        """Return the warning of an epoch that has lasted for so many seconds, by what is known here."""
        if seconds < _EARLY_WARNING_S:
            return None
        return self.warning(epoch, waited_s=self.steady_s(), seconds=seconds, so_far=True)

    def warning(
        self, epoch: int, *, waited_s: float, seconds: float, so_far: bool = False
    ) -> WarningRaised | None:
        """Return a warning where an epoch waited too long, once in a run.

        `waited_s` leaves out the first microbatch: more workers would not start faster.
        """
        percent = 100.0 * waited_s / seconds if seconds > 0 else 0.0
        is_long = percent > WAIT_WARNING_PERCENT and waited_s >= _WAIT_WARNING_S
        if self._has_warned or not is_long:
            return None
        self._has_warned = True
        part = " so far" if so_far else ""
        message = f"{percent:.0f} % of epoch {epoch}{part} ({waited_s:.1f} s) was spent waiting for data"
        return WarningRaised(message=message, hint=self._data.slow_hint if self._data else "")


def samples_skipped(epoch: int, skipped: Sequence[tuple[str, ...]]) -> SamplesSkipped | None:
    """Return the event that tells what the replicas left out; None for nothing."""
    samples = [sample for of_replica in skipped for sample in of_replica]
    if not samples:
        return None
    different = tuple(dict.fromkeys(samples))
    return SamplesSkipped(epoch=epoch, count=len(samples), samples=different[:_NAMED_SAMPLES])
