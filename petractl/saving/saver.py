"""Saves a run: at cuts in the middle of an epoch, at the end of one, and before it stops.

Every process of a run has a saver. In the training thread it takes snapshots of its stages (`snapshot`); in
a thread of its own it writes them and announces them in the draft's folder. On rank 0 that thread then waits
for what the others announce, and commits. The others never wait for anybody.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from petractl.build import Built
from petractl.checkpoint import PIPELINE, Draft, Moment, prune_checkpoints
from petractl.engine.cut import STOP, StageCut, StageRecord
from petractl.engine.sentinel import require_finite
from petractl.engine.trainer import TrainingState
from petractl.errors import RunError
from petractl.events import CheckpointSaved
from petractl.saving.identity import PipelineIdentity
from petractl.saving.policy import CutPolicy, StopRequests
from petractl.saving.snapshot import MODEL, ROWS, Photographer, Snapshot, on_host
from petractl.saving.writer import BackgroundWriter

_POLL_S = 0.02
_STOPPED_KEY = "stopped"


@dataclass(frozen=True, slots=True)
class Keeping:
    """Where checkpoints lie, how often epochs are saved (0: by updates or time), and how many stay."""

    folder: Path
    every_epochs: int
    keep_last: int


class Saver:
    """Saves the run from this process; see the module's docstring. It is the pipeline's `Cutter`.

    `token` is the same in all processes of this start, and in no other. `wait_s` bounds rank 0's waiting for
    the others' files (0: no limit). `saved(event)` is called, in another thread, when a checkpoint is whole.
    """

    def __init__(
        self,
        built: Built,
        *,
        keeping: Keeping,
        pipeline: PipelineIdentity,
        policy: CutPolicy,
        stops: StopRequests,
        photographer: Photographer,
        token: str,
        wait_s: float,
        saved: Callable[[CheckpointSaved], None],
    ) -> None:
        self._world = built.world
        self._stages = built.pipeline.stages
        self._rows = built.length.rows
        self._processes = built.world.seat.num_places * built.world.seat.num_replicas
        self._keeping = keeping
        self._pipeline = pipeline
        self._policy = policy
        self._stops = stops
        self._photographer = photographer
        self._token = token
        self._wait_s = wait_s
        self._saved = saved
        self._writer = BackgroundWriter("save")
        self._state = TrainingState()
        self._taken: dict[int, list[Snapshot]] = {}
        self._handed_over: Moment | None = None
        self.saved_state: TrainingState | None = None
        """Where the newest checkpoint stands that rank 0 has committed in this session."""
        self.saved_path: Path | None = None

    # In the training thread.

    def begin(self, state: TrainingState) -> None:
        """Begin an epoch, or the rest of it."""
        self._state = state
        self._policy.begin(state.epochs_done)

    def poll(self) -> None:
        """Look after the writer, and tell the others of a stop; called after each microbatch.

        Raises:
            RunError: a checkpoint could not be written.
        """
        self._writer.check()
        self._stops.look()

    def decide(self, microbatch: int) -> int:
        """Return the flags of a cut after this microbatch."""
        return self._policy.decide(microbatch)

    def before_update(self, microbatch: int) -> None:
        """Pass on."""
        self._policy.before_update(microbatch)

    def after_update(self, microbatch: int) -> None:
        """Pass on."""
        self._policy.after_update(microbatch)

    def take(self, stage: StageRecord, cut: StageCut) -> None:
        """Take a stage at a cut; with the last one of this process, write them all."""
        started = time.perf_counter()
        taken = self._taken.setdefault(cut.microbatch, [])
        taken.append(self._photographer.take(stage, cut))
        if len(taken) == len(self._stages):
            state = replace(self._state, microbatches_done=cut.microbatch + 1, is_drained=False)
            self._write(self._taken.pop(cut.microbatch), state, started=started)

    def is_due(self) -> bool:
        """Tell at the end of an epoch whether it is to be saved, as far as this process knows."""
        return self._policy.is_due()

    def save_epoch(self, state: TrainingState, *, is_best: bool, is_last: bool, is_due: bool) -> None:
        """Save the end of an epoch if it is due, the best so far, or the last."""
        every = self._keeping.every_epochs
        if is_best or is_last or is_due or (every and state.epochs_done % every == 0):
            started = time.perf_counter()
            snapshots = [self._photographer.take(stage) for stage in self._stages]
            self._write(snapshots, state, started=started, is_best=is_best)

    def save_trained(self, state: TrainingState) -> None:
        """Save a run that stops between an epoch's last update and its evaluation."""
        started = time.perf_counter()
        snapshots = [
            self._photographer.take(
                stage, StageCut(stage.index, state.microbatches_done - 1, STOP, (), stage.suspended())
            )
            for stage in self._stages
        ]
        self._write(snapshots, state, started=started)

    def is_stopping(self) -> bool:
        """Tell whether the run is to stop, as far as this process knows."""
        return self._stops.look()

    @property
    def stop_cause(self) -> str:
        """What asked for the stop, in words; "" where nothing did."""
        return self._stops.look_again()

    @property
    def stop_is_own(self) -> bool:
        """Tell whether that came to this process, and not to another one."""
        return self._stops.is_own

    def finish(self) -> None:
        """Wait until what was handed over is written, on rank 0 also by the others, and committed.

        Raises:
            RunError: it could not be.
        """
        self._writer.wait()

    def part_stopped(self) -> None:
        """Wait for the others before this process ends, so that none finds its neighbour gone.

        Rank 0 has committed then, or given up.
        """
        if self._world.seat.rank == 0:
            try:
                self.finish()
            finally:
                self._world.tell(_STOPPED_KEY, self._token)
            return
        self.finish()
        while self._world.ask(_STOPPED_KEY) != self._token:
            time.sleep(_POLL_S)

    # In the writer's thread.

    def _write(
        self, snapshots: Sequence[Snapshot], state: TrainingState, *, started: float, is_best: bool = False
    ) -> None:
        moment = Moment(state.epochs_done, state.microbatches_done)
        if moment == self._handed_over and not is_best:
            return  # the same stages with the same bits: a stop, right after a checkpoint
        self._handed_over = moment
        draft = Draft(self._keeping.folder, moment=moment, token=self._token)
        self._writer.submit(lambda: self._write_and_commit(draft, snapshots, state, started, is_best))

    def _write_and_commit(
        self,
        draft: Draft,
        snapshots: Sequence[Snapshot],
        state: TrainingState,
        started: float,
        is_best: bool,
    ) -> None:
        rank = self._world.seat.rank
        try:
            draft.announce(rank, self._written(draft, [on_host(snapshot) for snapshot in snapshots]))
            if rank == 0:
                path = self._commit(draft, self._announced(draft), state)
                seconds = time.perf_counter() - started
                self.saved_state, self.saved_path = state, path
                self._saved(
                    CheckpointSaved(
                        epoch=state.epochs_done + bool(state.microbatches_done),
                        microbatch=state.microbatches_done or None,
                        path=str(path),
                        best=is_best,
                        seconds=seconds,
                    )
                )
        except BaseException:
            if rank == 0:
                draft.discard()
            raise

    def _written(self, draft: Draft, snapshots: Sequence[Snapshot]) -> dict[str, Any]:
        """Write what lives here, and return what there is to tell of it."""
        seat = self._world.seat
        groups: dict[str, dict[str, Any]] = {}
        sums: dict[str, str] = {}
        for snapshot in snapshots:
            for group, tensors in snapshot.groups.items():
                groups.setdefault(group, {}).update(tensors)
            if snapshot.own:
                sums |= draft.write({PIPELINE: snapshot.own}, part=snapshot.part)
        model = groups.get(MODEL, {}).items()
        require_finite((name, x) for name, x in model if self._photographer.must_be_finite(name))
        sums |= draft.write(groups, part=f"stage-{seat.place:02d}" if seat.num_places > 1 else "")
        return {
            "sums": sums,
            "numbers": {name: n for snapshot in snapshots for name, n in snapshot.numbers.items()},
            "stages": {s.part: s.description for s in snapshots if s.description},
            "counters": snapshots[0].counters,
        }

    def _announced(self, draft: Draft) -> list[dict[str, Any]]:
        began = time.monotonic()
        while (parts := draft.announced(self._processes)) is None:
            if self._wait_s and time.monotonic() - began > self._wait_s:
                raise RunError(
                    f"the other processes have not written their parts within {self._wait_s:g} s",
                    where=str(draft.target),
                    hint="engine.stall_timeout is the limit; all machines must share the run folder",
                )
            time.sleep(_POLL_S)
        return parts

    def _commit(self, draft: Draft, parts: Sequence[Mapping[str, Any]], state: TrainingState) -> Path:
        stages = {name: told for part in parts for name, told in part["stages"].items()}
        is_drained = not any(told["stage"]["flights"] or told["sent"] for told in stages.values())
        content: dict[str, Any] = {
            "training": asdict(replace(state, is_drained=is_drained)),
            "optimizer_numbers": {name: n for part in parts for name, n in part["numbers"].items()},
            "pipeline": {**asdict(self._pipeline), "stages": stages},
            ROWS: self._rows,
        }
        if not stages:
            # Every stage has done the same by the end of an epoch: named by none of them.
            content["counters"] = parts[0]["counters"]
        sums = {name: total for part in parts for name, total in part["sums"].items()}
        path = draft.commit(sums, state=content)
        prune_checkpoints(
            self._keeping.folder,
            newest=Moment(state.epochs_done, state.microbatches_done),
            keep_last=self._keeping.keep_last,
            best_epoch=state.best_epoch,
        )
        return path
