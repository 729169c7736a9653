"""Curves of several runs over each other."""

import math
from pathlib import Path

import matplotlib.image
import pytest

from petractl.tracking.comparison import Comparison, compare_runs
from petractl.tracking.comparison_plot import _figure, _styles, drawable, plot_comparison
from petractl.tracking.comparison_run import METRICS, Curve, RunRecord


def make_run(name: str, values: tuple[float, ...], **keys: object) -> RunRecord:
    """A run of one epoch a minute, with the same values for every metric."""
    epochs = tuple(range(1, len(values) + 1))
    curve = Curve(epochs, tuple(60.0 * epoch for epoch in epochs), values)
    named = {key.replace("__", "."): value for key, value in keys.items()}
    return RunRecord(Path("/r") / name, name, "finished", named, dict.fromkeys(METRICS, curve))


def compared(*runs: RunRecord) -> Comparison:
    return compare_runs(runs, defaults={})


METHODS = compared(
    make_run("a", (50.0, 60.0, 70.0), model__name="revnet18", method__name="petra"),
    make_run("b", (80.0,), model__name="revnet18", method__name="backprop"),
)


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def looks(line) -> tuple[object, ...]:
    return line.get_color(), line.get_linestyle(), line.get_marker()


def test_a_metric_by_epoch_and_by_time() -> None:
    figure = _figure(METHODS, metric="top1")
    by_epoch, by_time = figure.axes
    assert figure.get_suptitle() == "Test top-1, revnet18"
    assert [list(line.get_xdata()) for line in by_epoch.lines] == [[1, 2, 3], [1]]
    assert [list(line.get_xdata()) for line in by_time.lines] == [[1.0, 2.0, 3.0], [1.0]]
    assert by_time.get_xlabel().endswith(", min")
    assert list(by_epoch.lines[0].get_ydata()) == [50.0, 60.0, 70.0]
    assert by_epoch.lines[1].get_marker() not in ("", "None"), "a single epoch is a point"


def test_the_legend_tells_what_differs_not_folders() -> None:
    figure = _figure(METHODS, metric="top1")
    assert legend(figure) == ["method    last", "petra     70.00", "backprop  80.00"]


def test_the_seeds_of_one_setting_share_all_but_the_marker() -> None:
    runs = [
        make_run(f"{name}{seed}", (1.0, 2.0), method__name=name, run__seed=seed)
        for name in ("petra", "backprop", "delayed")
        for seed in range(3)
    ]
    lines = [looks(line) for line in _figure(compared(*runs), metric="top1").axes[0].lines]
    assert len(set(lines)) == 9
    assert len({look[:2] for look in lines}) == 3
    assert lines[0][:2] == lines[1][:2] == lines[2][:2]


@pytest.mark.parametrize("num_runs", [11, 24, 45])
def test_many_runs_have_looks_of_their_own_and_a_legend_in_columns(num_runs: int) -> None:
    runs = [make_run(str(n), (1.0, 2.0), optimizer__lr=n) for n in range(num_runs)]
    assert len({(s["color"], s["linestyle"], s["marker"]) for s in _styles(compared(*runs))}) == num_runs
    figure = _figure(compared(*runs), metric="top1")
    columns = math.ceil(num_runs / 12)
    assert legend(figure).count(legend(figure)[0]) == columns
    assert len([text for text in legend(figure) if text]) == num_runs + columns


def test_many_epochs_have_some_markers_and_one_at_the_end() -> None:
    runs = [make_run(str(n), tuple(float(e) for e in range(300)), x__y=n) for n in range(2)]
    for line in _figure(compared(*runs), metric="top1").axes[0].lines:
        marked = line.get_markevery()
        assert 10 <= len(marked) <= 22
        assert marked[-1] == 299


def test_runs_without_the_metric_are_left_out() -> None:
    found = compared(
        make_run("a", (), x__y=0), make_run("b", (math.nan,), x__y=1), make_run("c", (1.0,), x__y=2)
    )
    assert drawable(found, metric="top5") == (2,)
    assert legend(_figure(found, metric="top5")) == ["y  last", "2  1.000"]


def test_values_that_are_no_numbers_leave_a_gap() -> None:
    found = compared(make_run("a", (1.0, math.nan, math.inf), x__y=0), make_run("b", (100.0, 0.01), x__y=1))
    figure = _figure(found, metric="loss")
    assert figure.axes[0].get_yscale() == "log"
    assert legend(figure)[1] == "0  inf"


def test_odd_values_are_drawn_as_they_are(tmp_path: Path) -> None:
    found = compared(make_run("a", (1.0,), x__y="_$x$ {"), make_run("b", (1.0,), x__y="$\\frac"))
    plot_comparison(found, tmp_path / "odd.png", metric="lr")
    assert [text.strip() for text in legend(_figure(found, metric="lr"))[1:]] == [
        "_$x$ {  1.000",
        "$\\frac  1.000",
    ]


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "compare.png"
    plot_comparison(METHODS, path, metric="images_per_s")
    assert matplotlib.image.imread(path).shape[1] == 1200
