"""Which values of a run a store holds, so that each is sent once.

A value that was sent but never confirmed (the answer came too late, the process was killed) may have arrived
or not; and a run that goes on after an interruption has a journal of which much was sent before. Some stores
keep one of two equal values, others both. So where a run may hold something, it is asked, one metric at a
time, before anything of that metric is sent.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from petractl.tracking.mlflow_metrics import MetricPoint

_Identity = tuple[int, int, float | str]


class HeldMetrics:
    """The values that a run holds in its store; `client` is an `MlflowClient`.

    A run that is `new` holds nothing, and is not asked.
    """

    def __init__(self, client: Any, run_id: str, *, new: bool) -> None:
        self._client = client
        self._run_id = run_id
        self._of_key: dict[str, set[_Identity]] = {}
        self._unknown: set[str] | None = set() if new else None  # keys to ask for; None: ask which there are

    def missing(self, points: Iterable[MetricPoint]) -> list[MetricPoint]:
        """Return the points that the run does not hold, each once."""
        found: dict[tuple[str, _Identity], MetricPoint] = {}
        for point in points:
            identity = _identity(point.step, point.time_ms, point.value)
            if identity not in self._held(point.key):
                found.setdefault((point.key, identity), point)
        return list(found.values())

    def add(self, points: Sequence[MetricPoint]) -> None:
        """Note that the store has confirmed these."""
        for point in points:
            self._held(point.key).add(_identity(point.step, point.time_ms, point.value))

    def doubt(self) -> None:
        """Ask again from here on: something may have arrived that was not confirmed."""
        self._of_key, self._unknown = {}, None

    def _held(self, key: str) -> set[_Identity]:
        if self._unknown is None:
            self._unknown = set(self._client.get_run(self._run_id).data.metrics)
        if key not in self._of_key:
            history = self._client.get_metric_history(self._run_id, key) if key in self._unknown else []
            self._of_key[key] = {_identity(m.step, m.timestamp, m.value) for m in history}
        return self._of_key[key]


def _identity(step: int, time_ms: int, value: float) -> _Identity:
    """Return what makes a value the same value; databases keep an infinity as the largest number."""
    if math.isnan(value):
        return step, time_ms, "NaN"
    return step, time_ms, max(-sys.float_info.max, min(sys.float_info.max, float(value)))
