from pathlib import Path

import matplotlib.image
import pytest

from petractl.planning.simulation import timeline
from petractl.planning.times import Span, StageTimes
from petractl.tracking.gantt_plot import MAX_ROWS, Timeline, _figure, plot_gantt, shown_rows

TIMES = [StageTimes(0.02, 0.06, 0.01)] * 3


def labels(timelines: list[Timeline]) -> list[str]:
    figure = _figure(timelines, title="a title", subtitle="")
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("tight", ["F  forward", "B  backward", "FB  forward and backward", "U  update", "idle"]),
        ("zero-bubble", ["F  forward", "B  backward", "W  weight gradient", "U  update", "idle"]),
    ],
)
def test_the_legend_names_what_is_drawn(schedule: str, expected: list[str]) -> None:
    spans = timeline(schedule, TIMES, num_microbatches=6, accumulation=2)
    assert labels([Timeline("x", spans)]) == expected


def test_every_kind_has_its_hatching() -> None:
    spans = timeline("zero-bubble", TIMES, num_microbatches=6, accumulation=2)
    figure = _figure([Timeline("x", spans)], title="", subtitle="")
    patches = figure.legends[0].get_patches()
    looks = {(patch.get_hatch(), patch.get_facecolor()) for patch in patches}
    assert len(looks) == len(patches) == 5
    assert len({patch.get_hatch() for patch in patches[:3]}) == 3


def test_many_stages_are_sampled() -> None:
    spans = [Span(stage, 0, "F", 0, stage, stage + 1.0) for stage in range(100)]
    rows = shown_rows(spans)
    assert len(rows) == MAX_ROWS
    assert (rows[0], rows[-1]) == (0, 99)
    assert rows == sorted(set(rows))
    figure = _figure([Timeline("deep", spans)], title="", subtitle="")
    assert "16 of 100 shown" in figure.axes[0].get_title(loc="left")


def test_a_file(tmp_path: Path) -> None:
    spans = timeline("interleaved-1f1b", TIMES, num_microbatches=6, accumulation=3)
    path = tmp_path / "gantt.png"
    plot_gantt([Timeline("a", spans), Timeline("b", spans)], path, title="two", subtitle="simulated")
    assert matplotlib.image.imread(path).shape[1] == 1500
