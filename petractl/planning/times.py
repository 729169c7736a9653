"""What the simulator is told of a pipeline, and the shape of what happened in one; seconds and bytes.

Times are of one microbatch of one stage, links join neighbours. A `Span` is one operation that took place, in
a simulation or on a clock: the same values feed the Gantt chart and the trace of both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class StageTimes:
    """How long one stage computes per microbatch and what it sends.

    The last stage's forward and backward are one operation under an asynchronous schedule; it takes the sum.
    """

    forward_s: float
    backward_s: float
    """With all that belongs to it: reconstruction or recomputation, and both gradients."""
    update_s: float = 0.0
    """Of one update, every k-th microbatch."""
    message_up_bytes: int = 0
    """Of one microbatch, to the stage behind it (forward)."""
    message_down_bytes: int = 0
    """Of one microbatch, to the stage before it (backward)."""

    @property
    def busy_s(self) -> float:
        """T: forward and backward of one microbatch, without the update."""
        return self.forward_s + self.backward_s

    def on_device(self, speed: float) -> "StageTimes":
        """Return the times on a device that is `speed` times as fast."""
        return replace(
            self,
            forward_s=self.forward_s / speed,
            backward_s=self.backward_s / speed,
            update_s=self.update_s / speed,
        )


@dataclass(frozen=True, slots=True)
class Link:
    """The way between two neighbours, the same in both directions, each direction with a way of its own.

    It carries one message after another: each occupies it for its bytes / `bytes_per_s` and arrives
    `latency_s` after it has left.
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf

    def occupied_s(self, message_bytes: int) -> float:
        """Return how long one message keeps the next from leaving."""
        return message_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Span:
    """One operation that took place.

    `kind` is "F", "B", "FB", "W" (weight gradient) or "U"; an update has the last microbatch of its group.
    `waited_for` is what the stage stood still for before it: "" (it did not), "forward" (a message from the
    stage before it), "backward" (from the stage behind it), or "other" (data, replicas).
    """

    stage: int
    replica: int
    kind: str
    microbatch: int
    start_s: float
    end_s: float
    waited_for: str = ""
    place: int | None = None
    """The process, where it holds several stages; None: one stage each."""

    @property
    def row(self) -> int:
        """The process within its replica."""
        return self.stage if self.place is None else self.place


def links_between(link: Link | Sequence[Link], *, num_stages: int) -> tuple[Link, ...]:
    """Return the link behind each stage but the last; one for all, or one each.

    Raises:
        ValueError: another number of them.
    """
    links = (link,) * (num_stages - 1) if isinstance(link, Link) else tuple(link)
    if len(links) != num_stages - 1:
        raise ValueError(f"{len(links)} links for {num_stages} stages: give {num_stages - 1}")
    return links


def limit_per_s(times: Sequence[StageTimes], *, accumulation: int = 1) -> float:
    """Return the microbatches per second that no schedule can exceed: those of the slowest stage."""
    return 1.0 / max(time.busy_s + time.update_s / accumulation for time in times)
