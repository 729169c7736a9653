from pathlib import Path

import matplotlib.image

from petractl.tracking.throughput_plot import Curve, _figure, plot_throughput

CURVES = [
    Curve("tight", (2, 4, 8), (12.5, 12.5, 12.5)),
    Curve("paper", (2, 4, 8), (12.5, 12.5, 12.5)),
    Curve("plain", (2, 4, 8), (6.25, 3.125, 1.5625)),
]


def test_each_curve_is_named_and_names_keep_apart() -> None:
    axes = _figure(CURVES, title="", unit="microbatches/s", subtitle="").axes[0]
    assert [text.get_text() for text in axes.texts] == ["tight  12.5", "paper  12.5", "plain  1.56"]
    heights = [text.xyann[1] for text in axes.texts]  # type: ignore[attr-defined]
    assert heights[0] - heights[1] >= 0.04
    assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 3


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.png"
    plot_throughput(CURVES, path, title="x", subtitle="y")
    assert matplotlib.image.imread(path).shape[:2] == (700, 1200)
