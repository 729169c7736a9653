"""The measured timeline of a run: a trace of every epoch for a viewer, and a chart of an epoch's beginning.

Times count from the first operation of the epoch: clocks of processes count from the start of a machine,
which is of no use in a viewer. The chart is drawn after the first epoch and, of the last one, when the run
ends: drawing takes longer than an epoch of a small net. A timeline that cannot be written costs a run one
warning.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from petractl.engine.recorder import Record
from petractl.planning.chrome_trace import write_trace
from petractl.planning.times import Span
from petractl.tracking.gantt_plot import Timeline, plot_gantt

TRACES_FOLDER = "traces"


class TimelineFiles:
    """Writes `traces/epoch-NNNN.json` in `folder`, and the chart to `chart`.

    `num_places` is the number of processes of one replica; where each holds several stages, the rows are
    processes. `warn` is told, once, why something could not be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        chart: Path,
        name: str,
        num_stages: int,
        num_places: int,
        warn: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._chart = chart
        self._name = name
        self._num_stages = num_stages
        self._num_places = num_places
        self._warn: Callable[[str], None] | None = warn
        self._undrawn: tuple[int, list[Span]] | None = None
        self._has_chart = False

    def write(self, epoch: int, records: Sequence[tuple[int, Record]]) -> None:
        """Write what happened in an epoch, from (replica, record) pairs with times of one clock."""
        spans = list(self._spans(records))
        if not spans:
            return
        with self._harmless():
            path = self._folder / TRACES_FOLDER / f"epoch-{epoch:04d}.json"
            path.parent.mkdir(exist_ok=True)
            write_trace({self._name: spans}, path)
        beginning = 3 * self._num_stages + 4  # microbatches: the pipeline filled, and a few of steady work
        self._undrawn = epoch, [s for s in spans if s.microbatch < beginning and s.replica == 0]
        if not self._has_chart:
            self.draw()

    def draw(self) -> None:
        """Draw the chart of the last epoch written, if it is not drawn yet."""
        if self._undrawn is None:
            return
        (epoch, spans), self._undrawn = self._undrawn, None
        self._has_chart = True
        with self._harmless():
            self._chart.parent.mkdir(exist_ok=True)
            title = f"{self._name}: the beginning of epoch {epoch}, as measured"
            plot_gantt([Timeline("", spans)], self._chart, title=title)

    def _spans(self, records: Sequence[tuple[int, Record]]) -> Iterator[Span]:
        """Yield the operations in the order of their starts, the first of them at 0 s."""
        several = self._num_places < self._num_stages and self._num_places > 1
        first_s = min((r.start_s for _, r in records), default=0.0)
        for replica, r in sorted(records, key=lambda item: item[1].start_s):
            place = r.stage % self._num_places if several else None
            yield Span(
                r.stage,
                replica,
                r.kind,
                r.microbatch,
                r.start_s - first_s,
                r.end_s - first_s,
                r.waited_for,
                place,
            )

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Let a run go on without its timeline."""
        try:
            yield
        except Exception as error:
            if self._warn is not None:
                self._warn(f"the timeline could not be written: {type(error).__name__}: {error}")
            self._warn = None
