"""The typed events of a run, and the bus that delivers them.

Everything that watches a run (console, journal, MLflow, plots) must neither slow it nor stop it, and must
not be known to the engine. So the engine emits small frozen values on a bus; a listener that raises is
warned about once, detached and closed, and the run goes on. `as_record` gives the journal's flat form of an
event: `event`, `time`, `epoch`, `update` and `stage` (null where they have no meaning), then the event's
own fields.

Units throughout: times in seconds, accuracies in percent, losses in nats per sample, sizes in bytes; epochs
count from 1, stages from 0, and `update` is the number of updates that the last stage has made since the
run began.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar, Protocol

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run; `name` is what the journal calls it."""

    name: ClassVar[str] = "event"


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """A run, or the rest of a resumed one, begins."""

    name: ClassVar[str] = "run_started"
    run_dir: str
    recipe_name: str
    method: str
    model: str
    dataset: str
    resumed_from_epoch: int | None = None  # the last whole epoch that the checkpoint holds; None: not resumed
    resumed_from_microbatch: int | None = None  # of the epoch after that, as many are done; None: none


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of the plan: what is in it, what it costs, what it keeps."""

    index: int
    units: str  # names, e.g. "stem, block1"
    num_units: int
    parameters: int
    flops: float  # of one forward pass, per sample
    keeps: str  # what it keeps between forward and backward, e.g. "nothing" or "inputs of 1 unit"
    lookahead: int  # W: forwards ahead of the backward, in microbatches
    staleness_updates: float  # W / k: updates between the forward and the backward of one microbatch
    device: str = ""  # where it runs, e.g. "cuda:1"; of several replicas "cuda:1, cuda:3"; "" where unknown
    auxiliary_percent: float | None = None  # FLOPs of its auxiliary net's forward, in percent of its own


@dataclass(frozen=True, slots=True)
class PlanMade(Event):
    """What will be done, known before the first step."""

    name: ClassVar[str] = "plan_made"
    stages: tuple[StagePlan, ...]
    microbatch_size: int  # samples
    accumulation: int  # k: microbatches per update
    samples_per_update: int  # of all replicas together
    steps_per_epoch: int  # microbatches per replica
    updates_per_epoch: int
    epochs: int
    train_samples: int
    val_samples: int
    parameters: int
    schedule: str
    method: str
    precision: str
    device: str
    threads: int  # per process
    replicas: int = 1  # copies of the pipeline
    processes: int = 1  # of all replicas together
    backend: str = ""  # what carries messages between processes, e.g. "gloo"; "" with a single process


@dataclass(frozen=True, slots=True)
class EpochStarted(Event):
    """The first microbatch of an epoch is about to enter."""

    name: ClassVar[str] = "epoch_started"
    epoch: int


@dataclass(frozen=True, slots=True)
class StepsDone(Event):
    """Progress within an epoch; at most about two a second."""

    name: ClassVar[str] = "steps_done"
    epoch: int
    microbatches: int  # through the last stage in this epoch so far
    of: int  # microbatches in this epoch
    loss: float  # training loss, mean over the epoch so far
    top1: float  # training accuracy over the epoch so far, percent
    images_per_s: float
    lr: float  # of the last stage
    update: int
    data_wait_percent: float | None = None  # share of the epoch so far that the first replica waited for data


@dataclass(frozen=True, slots=True)
class EpochTrained(Event):
    """All microbatches of an epoch have had their backward on every stage."""

    name: ClassVar[str] = "epoch_trained"
    epoch: int
    loss: float  # training loss, mean over the epoch
    top1: float  # training accuracy over the epoch, percent
    samples: int
    images_per_s: float | None  # None where a resumed run had nothing left to train in the epoch
    seconds: float  # training only, without evaluation, in this session
    lr: float  # of the last stage, at the end of the epoch
    update: int
    data_wait_percent: float | None = None  # share of the seconds spent waiting for data; the worst replica's


@dataclass(frozen=True, slots=True)
class SamplesSkipped(Event):
    """Bad samples were left out, in training or evaluation, since the last such event."""

    name: ClassVar[str] = "samples_skipped"
    epoch: int
    count: int  # one that was met twice counts twice
    samples: tuple[str, ...]  # the first ten different ones: "shard: key: reason"


@dataclass(frozen=True, slots=True)
class StageCounted(Event):
    """What one stage did in one epoch: the proof that nothing was dropped."""

    name: ClassVar[str] = "stage_counted"
    epoch: int
    stage: int
    microbatches: int  # that entered the stage
    forwards: int
    backwards: int
    updates: int
    partial_groups: int  # updates made from fewer than k microbatches
    replica: int = 0


@dataclass(frozen=True, slots=True)
class StageMeasured(Event):
    """How one stage spent the training time of one epoch, and what it sent; None where it was not measured.

    Percent are of `seconds`. A stage is idle while it does not compute: it waits for a message from the stage
    before it (forward) or behind it (backward), or for something else (data, replicas, the other stages
    at the end of the epoch).
    """

    name: ClassVar[str] = "stage_measured"
    epoch: int
    stage: int
    replica: int
    rank: int  # of the process that holds the stage
    seconds: float  # training only, without evaluation
    compute_percent: float | None
    wait_forward_percent: float | None
    wait_backward_percent: float | None
    idle_percent: float | None  # 100 - compute
    bytes_sent_forward: int | None  # to the stage behind it
    bytes_sent_backward: int | None  # to the stage before it
    staleness_updates: float | None  # updates between forward and backward of a microbatch, mean of the epoch
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class GradientsDiagnosed(Event):
    """What one stage learned from at one microbatch, compared with backpropagation; None where undefined.

    Cosine and ratio of norms (estimate / end-to-end gradient) are over all parameters of the stage. There are
    two end-to-end gradients: at the parameters of the stages' backwards, the current ones, and at those of
    their forwards. The second is what plain delayed gradients would learn from: `delayed_...` compare it with
    the first. `update` is what the last stage had made at its backward.
    """

    name: ClassVar[str] = "gradients_diagnosed"
    epoch: int
    update: int
    stage: int
    microbatch: int  # since the start of training, from 0
    delay_updates: int  # made by this stage between its forward and its backward
    cosine: float | None  # against the current parameters' gradient
    norm_ratio: float | None
    cosine_forward: float | None  # against the forward-time parameters' gradient
    norm_ratio_forward: float | None
    delayed_cosine: (
        float | None
    )  # of a plain delayed gradient, at the forwards' parameters, against the current
    delayed_norm_ratio: float | None
    guess_cosine: float | None = None  # of a block's guess against its target
    guess_norm_ratio: float | None = None
    reconstruction_error: float | None = None  # the largest relative error of a rebuilt input
    reconstruction_errors: tuple[float | None, ...] = ()  # of each unit; None where nothing is rebuilt


@dataclass(frozen=True, slots=True)
class UpdatesSkipped(Event):
    """A stage has left updates out in an epoch: something was not finite (`training.non_finite = "skip"`).

    What was not, and where, is of the first of them; None where only a replica beside this one saw it.
    """

    name: ClassVar[str] = "updates_skipped"
    epoch: int
    stage: int
    replica: int
    count: int
    kind: str | None  # "activation", "loss", "gradient", "parameter gradient", or a "received ..." one
    unit: int | None  # its place in the net; None for the loss and what was received
    unit_name: str
    microbatch: int | None  # since the start of training, from 0


@dataclass(frozen=True, slots=True)
class ReconstructionChecked(Event):
    """How far the inputs that a stage's reversible units rebuilt were from the true ones: the worst one's."""

    name: ClassVar[str] = "reconstruction_checked"
    epoch: int
    stage: int
    replica: int
    unit: int  # its place in the net
    unit_name: str
    microbatch: int  # since the start of training, from 0
    error: float  # |rebuilt - true| / |true|, over a few samples
    checks: int  # microbatches looked at in the epoch


@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    """The model was evaluated on every sample of a split."""

    name: ClassVar[str] = "evaluated"
    epoch: int
    loss: float
    top1: float  # percent
    top5: float  # percent
    samples: int
    seconds: float
    split: str = "test"


@dataclass(frozen=True, slots=True)
class CheckpointSaved(Event):
    """A checkpoint lies on disk, complete."""

    name: ClassVar[str] = "checkpoint_saved"
    epoch: int  # the last one done, or the one it was made in
    path: str
    best: bool  # the best top-1 so far
    seconds: float  # from when the first stage stood there until all was on disk; training goes on meanwhile
    microbatch: int | None = None  # microbatches of that epoch that are done; None at the end of an epoch


@dataclass(frozen=True, slots=True)
class WarningRaised(Event):
    """Something the user should know that does not stop the run."""

    name: ClassVar[str] = "warning_raised"
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """The last epoch is done. Accuracies and losses are the evaluation's; None where there was none."""

    name: ClassVar[str] = "run_finished"
    epochs: int
    seconds: float
    best_top1: float | None  # percent
    best_epoch: int | None
    final_loss: float | None
    final_top1: float | None  # percent
    final_top5: float | None  # percent
    images_per_s: float | None  # training, mean over the run; None where it is not known
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class RunInterrupted(Event):
    """The run was told to stop: it saved where it was, or its last checkpoint stands."""

    name: ClassVar[str] = "run_interrupted"
    epoch: int  # in which it goes on
    resume_command: str
    microbatch: int | None = None  # after so many of that epoch's microbatches; None: from its start
    cause: str = ""  # what told it to stop


@dataclass(frozen=True, slots=True)
class RunRestarted(Event):
    """All processes of a run start again, without a person, after one of them was killed or failed."""

    name: ClassVar[str] = "run_restarted"
    restart: int  # 1 for the first one of a launch
    of: int  # that may be: engine.max_restarts, or torchrun's --max-restarts
    reason: str
    epoch: int  # it goes on in
    microbatch: int  # microbatches of that epoch that are done; 0: it starts from its beginning


@dataclass(frozen=True, slots=True)
class RunFailed(Event):
    """The run ended by an error."""

    name: ClassVar[str] = "run_failed"
    message: str


def as_record(event: Event, *, time: float) -> dict[str, object]:
    """Return the journal's flat object for an event.

    `time` is in seconds since the epoch (1970). The keys `event`, `time`, `epoch`, `update` and `stage` are
    always there; `PlanMade.stages` becomes a list of objects.
    """
    record: dict[str, object] = {"event": event.name, "time": time}
    record |= dict.fromkeys(("epoch", "update", "stage"))
    own = asdict(event)
    return record | {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}


class Listener(Protocol):
    """What watches a run. Both methods must return quickly; an exception detaches the listener."""

    def handle(self, event: Event, record: dict[str, object]) -> None:
        """Take one event; `record` is its journal form, shared by all listeners: do not change it."""

    def close(self) -> None:
        """Finish; called once, after the last event."""


class EventBus:
    """Delivers events to the listeners in the order of subscription; safe to call from several threads."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._listeners: list[Listener] = []
        self._lock = threading.RLock()

    def subscribe(self, listener: Listener) -> None:
        """Add a listener; it gets the events emitted from now on."""
        with self._lock:
            self._listeners.append(listener)

    def emit(self, event: Event) -> None:
        """Deliver an event. Never raises because of a listener."""
        with self._lock:
            record = as_record(event, time=self._clock())
            for listener in tuple(self._listeners):
                try:
                    listener.handle(event, record)
                except Exception as error:
                    self._detach(listener, error)

    def close(self) -> None:
        """Close the listeners, the last subscribed first: the journal, the first, hears their last words.

        A listener may emit while it closes; those still attached get the event. Closing twice does nothing.
        """
        while True:
            with self._lock:
                if not self._listeners:
                    return
                listener = self._listeners.pop()
            # Outside the lock: a listener that waits here for a thread of its own must let that emit.
            try:
                listener.close()
            except Exception as error:
                _warn(listener, error)

    def _detach(self, listener: Listener, error: Exception) -> None:
        self._listeners = [other for other in self._listeners if other is not listener]
        _warn(listener, error)
        try:
            listener.close()
        except Exception:
            _logger.debug("a detached listener failed again while closing", exc_info=True)


def _warn(listener: Listener, error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}"
    _logger.warning("%s failed and is switched off; the run goes on (%s)", type(listener).__name__, reason)
    _logger.debug("the failure in full", exc_info=error)
