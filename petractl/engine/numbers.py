"""What looks after the numbers of a run: sentinels and drift watches here, and what is told of them.

Every process has those of its own stages; at the end of an epoch the first one is given what all have found.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from petractl.engine.drift import Drift, DriftWatch, watch_drift
from petractl.engine.sentinel import Guarded, SkippedUpdates, guard, settle_all
from petractl.engine.stage import Stage
from petractl.errors import RunError
from petractl.events import Event, ReconstructionChecked, UpdatesSkipped, WarningRaised


@dataclass(frozen=True, slots=True)
class Findings:
    """What the stages of one process have found in an epoch."""

    replica: int
    skipped: tuple[SkippedUpdates, ...]
    drifts: tuple[Drift, ...]


class Numbers:
    """Looks after the stages of this process.

    `skips`: an update that is not finite is left out. Rebuilt inputs are compared every `drift_every`
    microbatches (0: never); an error above `drift_limit` is warned of once.
    """

    def __init__(
        self,
        stages: Sequence[object],
        *,
        device: torch.device,
        skips: bool,
        drift_every: int,
        drift_limit: float,
    ) -> None:
        guarded = [stage for stage in stages if isinstance(stage, Guarded)]
        self._sentinels = guard(guarded, device=device, skips=skips)
        rebuild = [stage for stage in stages if isinstance(stage, Stage) and stage.rebuilds]
        self._watches: list[DriftWatch] = watch_drift(rebuild, every=drift_every) if drift_every else []
        self._drift_limit = drift_limit
        self._has_warned_of_drift = False
        self._has_warned_of_skips = False

    def resume(self, skipped: Mapping[int, Mapping[str, Any]]) -> None:
        """Go on counting in the middle of an epoch; `skipped` is by stage."""
        for sentinel in self._sentinels:
            if sentinel.stage in skipped:
                sentinel.resume(skipped[sentinel.stage])

    def settle(self) -> None:
        """Make sure that the stages hold finite numbers; waits for the device.

        Raises:
            NonFinite, PeerLost: they do not.
        """
        settle_all(self._sentinels)

    def findings(self, *, replica: int) -> Findings:
        """Return what was found since the last time; waits for the device."""
        skipped = [sentinel.take_skipped() for sentinel in self._sentinels]
        drifts = [watch.take() for watch in self._watches]
        return Findings(
            replica,
            tuple(each for each in skipped if each is not None),
            tuple(each for each in drifts if each is not None),
        )

    def events(self, epoch: int, found: Sequence[Findings], *, updates: int) -> Iterator[Event]:
        """Yield what is told of an epoch in which every stage had `updates` to make.

        Raises:
            RunError: a stage has made none of them.
        """
        skipped = sorted(((f.replica, s) for f in found for s in f.skipped), key=lambda each: each[1].stage)
        for replica, each in skipped:
            yield _skipped_event(epoch, replica, each)
        for replica, drift in sorted(
            ((f.replica, d) for f in found for d in f.drifts), key=lambda each: each[1].stage
        ):
            yield _drift_event(epoch, replica, drift)
        yield from self._skip_warning(epoch, [each for _, each in skipped], updates)
        yield from self._drift_warning(epoch, [drift for f in found for drift in f.drifts])
        for _, each in skipped:
            if each.count >= updates:
                raise RunError(
                    f"stage {each.stage} has left out all {updates} updates of epoch {epoch}: {each.first}",
                    hint="skipping no longer helps: begin again with a lower optimizer.lr",
                )

    def _skip_warning(self, epoch: int, skipped: Sequence[SkippedUpdates], updates: int) -> Iterator[Event]:
        if not skipped or self._has_warned_of_skips:
            return
        self._has_warned_of_skips = True
        worst = max(skipped, key=lambda each: each.count)
        yield WarningRaised(
            message=f"stage {worst.stage} left out {worst.count} of {updates} updates in epoch {epoch}: "
            f"not finite was the {worst.first}",
            hint="lower optimizer.lr or set optimizer.clip_norm; the journal counts them (updates_skipped)",
        )

    def _drift_warning(self, epoch: int, drifts: Sequence[Drift]) -> Iterator[Event]:
        high = [drift for drift in drifts if drift.severity > self._drift_limit]
        if not high or self._has_warned_of_drift:
            return
        self._has_warned_of_drift = True
        worst = max(high, key=lambda drift: drift.severity)
        yield WarningRaised(
            message=f"unit {worst.unit} ({worst.name}, stage {worst.stage}) rebuilds inputs that are off by "
            f"{worst.error:.2g} of their size, at microbatch {worst.microbatch} in epoch {epoch} "
            f"(diagnostics.drift = {self._drift_limit:g})",
            hint="its gradients may be wrong: lower optimizer.lr, or keep inputs "
            '(method.name = "delayed", method.keep = "inputs")',
        )


def _skipped_event(epoch: int, replica: int, skipped: SkippedUpdates) -> UpdatesSkipped:
    first = skipped.first
    return UpdatesSkipped(
        epoch=epoch,
        stage=skipped.stage,
        replica=replica,
        count=skipped.count,
        kind=str(first.kind) if first else None,
        unit=first.unit if first else None,
        unit_name=first.name if first else "",
        microbatch=first.microbatch if first else None,
    )


def _drift_event(epoch: int, replica: int, drift: Drift) -> ReconstructionChecked:
    return ReconstructionChecked(
        epoch=epoch,
        stage=drift.stage,
        replica=replica,
        unit=drift.unit,
        unit_name=drift.name,
        microbatch=drift.microbatch,
        error=drift.error,
        checks=drift.checks,
    )
