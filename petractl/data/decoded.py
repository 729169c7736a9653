"""Decoding a whole set of photographs once, into memory: for sets that fit and nets that see little."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from petractl.data.encoded import EncodedSamples
from petractl.data.loader import EvalLoader, Preparer
from petractl.data.skips import Skips
from petractl.data.values import Samples
from petractl.data.worker_processes import automatic_workers, prepared_by_processes
from petractl.errors import DataError

_BATCH = 64
_WORKERS_FROM = 2000
"""A set of fewer images is decoded before processes would have started."""


def decoded(
    encoded: EncodedSamples | None,
    *,
    prepare: Callable[[EncodedSamples], Preparer],
    size: int,
    workers: int | None,
    skips: Skips,
) -> Samples:
    """Return the samples that `prepare` makes of the encoded ones, images uint8 (n, 3, size, size).

    Bad ones that it leaves out are missing. No encoded samples (None) give none. Raises `DataError` where
    they would not fit in this machine's memory.
    """
    count = sum(encoded.sizes) if encoded is not None else 0
    _require_memory(count * 3 * size * size)
    images = np.empty((count, 3, size, size), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)
    filled = 0
    if encoded is not None:
        if workers is None:
            workers = automatic_workers(on_cpu=count < _WORKERS_FROM, processes=1)
        loader = EvalLoader(
            prepare(encoded),
            samples=count,
            batch_size=_BATCH,
            workers=workers,
            ahead=prepared_by_processes,
            skips=skips,
        )
        for batch in loader:
            rows = slice(filled, filled + len(batch.labels))
            images[rows], labels[rows] = batch.images.numpy(), batch.labels.numpy()
            filled = rows.stop
    return Samples(images=images[:filled], labels=labels[:filled])


def _require_memory(size: int) -> None:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return
    if size > memory:
        raise DataError(
            f"the decoded set would take {size / 2**30:.1f} GiB, and this machine has {memory / 2**30:.1f}",
            where="data.resident",
            hint="set data.resident = false, or a smaller data.image_size",
        )
