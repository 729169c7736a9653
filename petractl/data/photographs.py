"""Batches of photographs: read by index, decoded, cropped and flipped as they are needed.

A set of photographs does not fit in memory, so a batch is made from the encoded images of its samples. What
is drawn for a sample is a function of (seed, pass, sample), so the batch is one of its pick. An object of
this class goes to worker processes by pickle; it holds no open file and no image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from petractl.data.encoded import BadSample, Encoded, EncodedSamples, OnError
from petractl.data.normalisation import Normalisation
from petractl.data.order import Pick
from petractl.data.preparation import augment
from petractl.data.randomness import Purpose, stream_key
from petractl.data.values import Batch
from petractl.errors import DataError

if TYPE_CHECKING:
    from petractl.data.pixels import Pixels

Crop = Literal["random-resized", "pad"]


class Photographs:
    """Prepares uint8 batches (n, 3, size, size) of encoded samples.

    In training with `augment`, `crop` says how: "random-resized" cuts a random part of the photograph and
    scales it, "pad" is a crop of the evaluation's pixels with `pad` pixels of black around them; both flip
    half of them. `on_error` says whether a bad sample is an error or left out.
    """

    def __init__(
        self,
        encoded: EncodedSamples,
        *,
        pixels: Pixels,
        normalisation: Normalisation,
        crop: Crop = "random-resized",
        pad: int = 4,
        training: bool,
        augment: bool = True,
        seed: int = 0,
        on_error: OnError = "stop",
    ) -> None:
        self._encoded = encoded
        self._pixels = pixels
        self._normalisation = normalisation
        self._crop = crop
        self._pad = pad
        self._training = training
        self._augment = augment and training
        self._seed = seed
        self._on_error = on_error

    def prepare(self, pick: Pick) -> Batch:
        """Return the batch, its bad samples left out and named in it.

        Raises `DataError` for a bad sample where that is to stop the run, and for a set that cannot be read;
        in training also for a batch with nothing left, or one sample of several, on which batch norm cannot
        train. In evaluation a batch may be left with none.
        """
        import torch

        key = stream_key(Purpose.AUGMENTATION, self._seed, pick.pass_number)
        size, count = self._pixels.size, len(pick.samples)
        images = np.empty((count, 3, size, size), dtype=np.uint8)
        labels = np.empty(count, dtype=np.int64)
        good: list[int] = []
        bad: list[BadSample] = []
        for sample in pick.samples.tolist():
            try:
                encoded = self._encoded.read(sample)
                images[len(good)] = self._image(encoded, key=key, sample=sample)
                labels[len(good)] = encoded.label
                good.append(sample)
            except BadSample as error:
                if self._on_error == "stop":
                    raise error.error() from None
                # Anew: the one that was raised holds on to this frame, and so to the images.
                bad.append(BadSample(error.place, error.key, error.reason))
        self._require_enough(good, bad)
        images = images[: len(good)]
        if self._augment and self._crop == "pad":
            images = augment(
                images, key=key, samples=np.array(good, dtype=np.int64), pad=self._pad, flip=True
            )
        return Batch(
            images=torch.from_numpy(images),
            labels=torch.from_numpy(labels[: len(good)]),
            index=pick.index,
            normalisation=self._normalisation,
            skipped=tuple(bad),
        )

    def _image(self, encoded: Encoded, *, key: int, sample: int) -> NDArray[np.uint8]:
        try:
            if self._augment and self._crop == "random-resized":
                return self._pixels.train(encoded.image, key=key, sample=sample)
            return self._pixels.eval(encoded.image)
        except ValueError as error:
            raise BadSample(encoded.place, encoded.key, str(error)) from error

    def _require_enough(self, good: list[int], bad: list[BadSample]) -> None:
        if not self._training or not bad or len(good) > 1:
            return
        first = bad[0]
        raise DataError(
            f"{len(bad)} of the {len(good) + len(bad)} samples of a microbatch are bad, which leaves "
            f"{len(good) or 'none'}: {first.key!r}: {first.reason}",
            where=first.place,
            hint="take the bad samples out (`petractl shards check` lists them), or set a larger "
            "data.batch_size, data.shuffle_buffer = 0 (it spreads a damaged shard over the epoch), or "
            "data.drop_last = true (for a small last microbatch)",
        )
