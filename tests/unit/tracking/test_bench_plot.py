import matplotlib.image
import numpy as np
import pytest

from petractl.tracking.bench_plot import Bar, plot_bench

GIB = 2**30
BARS = [
    Bar("petra", (100.0, 110.0, 90.0), 1.0, (GIB, 2 * GIB)),
    Bar("delayed:graph/paper", (150.0, 151.0, 152.0), 1.5, (3 * GIB, GIB)),
    Bar("backprop", (1.0, 1.1, 1.2), 0.01, (GIB // 1000,)),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "bars",
    [
        BARS,
        BARS[:1],
        [Bar("petra", (5.0,), 1.0, (0,))],
        [Bar(f"delayed:{n}", (n + 0.5,), 2.0, (n,)) for n in range(20)],
    ],
)
def test_a_comparison_is_a_picture(tmp_path, bars):
    path = tmp_path / "bench.png"
    plot_bench(bars, path, title="a recipe", subtitle="microbatches of 8, cpu")
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] == 1200
    assert picture.shape[0] == pytest.approx(200 + 62 * len(bars), abs=1)
    assert np.unique(picture.reshape(-1, picture.shape[2]), axis=0).shape[0] > 50
