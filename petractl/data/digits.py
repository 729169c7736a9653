"""The embedded set: 1,797 real handwritten digits, 8 x 8, that come with scikit-learn.

They are the test set of Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI repository,
1998. The split is fixed, whatever the run's seed, so that accuracies can be compared: 1,437 to train, 360 to
validate, every class in both in proportion.
"""

import numpy as np
from numpy.typing import NDArray

from petractl.data.dataset import Data, Source
from petractl.data.preparation import Preparation
from petractl.data.randomness import Purpose, random_words, stream_key
from petractl.data.registry import register_dataset
from petractl.data.request import Request, require_fixed_shape, require_no_places
from petractl.data.values import DataInfo, Samples

_SPLIT_SEED = 0
_VAL_SAMPLES = 360
_INFO = DataInfo(
    name="digits", classes=10, channels=1, height=8, width=8, train_samples=1437, val_samples=_VAL_SAMPLES
)


@register_dataset
def digits(request: Request) -> Source:
    """1,797 real handwritten digits, 8x8, 10 classes, embedded (scikit-learn): 1,437 train, 360 val."""
    require_no_places(request, _INFO.name)
    require_fixed_shape(request, _INFO)
    return Source(describe=lambda: _INFO, load=lambda: _load(request))


def _load(request: Request) -> Data:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    chosen = _stratified_choice(labels, count=_VAL_SAMPLES)
    train = Samples(images=grey[~chosen], labels=labels[~chosen])
    pixels = train.images / 255.0
    # A flipped digit is another sign or none; a shift by a pixel is what a hand does.
    preparation = Preparation(mean=(float(pixels.mean()),), std=(float(pixels.std()),), pad=1)
    val = Samples(images=grey[chosen], labels=labels[chosen])
    return Data(
        info=_INFO,
        train=train,
        val=val,
        preparation=preparation,
        seed=request.seed,
        resident=request.resident,
    )


def _stratified_choice(labels: NDArray[np.int64], *, count: int) -> NDArray[np.bool_]:
    """Return a mask (n,) of exactly `count` samples, each class within one of its share.

    Samples stand in a row, class by class and at random within a class; the chosen ones are spread evenly
    over it.
    """
    words = random_words(stream_key(Purpose.SPLIT, _SPLIT_SEED), np.arange(len(labels)))
    row = np.lexsort((words, labels))
    quota = np.arange(len(labels) + 1) * count // len(labels)
    mask = np.zeros(len(labels), dtype=np.bool_)
    mask[row] = np.diff(quota) > 0
    return mask
