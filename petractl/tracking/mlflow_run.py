"""One run as MLflow stores it: what is sent, under which names, and how a store is opened.

Everything sent comes from the run folder: metrics from the journal, the recipe and the curves from their
files. So sending is safe to repeat (MLflow keeps one of two equal metric values), a resumed run continues
its MLflow run, whose id lies in the run folder, and what a server missed can be sent later. mlflow is
imported when a run is opened: it takes more than a second.
"""

import os
import re
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petractl import __version__
from petractl.events import (
    EpochTrained,
    Evaluated,
    GradientsDiagnosed,
    PlanMade,
    RunFailed,
    RunFinished,
    RunInterrupted,
    RunStarted,
    SamplesSkipped,
    StageMeasured,
    StepsDone,
)
from petractl.tracking.masking import mask_credentials

RUN_ID_NAME = "mlflow_run_id"

_TEXT_ARTIFACTS = ("recipe.toml", "resolved.toml", "environment.json")
_PARENT_TAG = "mlflow.parentRunId"
_METRICS_PER_REQUEST = 1000  # MLflow's limits
_LONGEST = 6000  # characters of a parameter's value that MLflow keeps
_ITEMS_PER_REQUEST = 100
_PLAN_PARAMETERS = (
    "microbatch_size",
    "accumulation",
    "samples_per_update",
    "parameters",
    "schedule",
    "method",
    "precision",
    "device",
    "threads",
    "replicas",
    "processes",
    "backend",
)
_DIAGNOSED = (
    "cosine",
    "norm_ratio",
    "cosine_forward",
    "norm_ratio_forward",
    "delayed_cosine",
    "delayed_norm_ratio",
    "guess_cosine",
    "guess_norm_ratio",
    "reconstruction_error",
)
_STATUS = {RunFinished.name: "FINISHED", RunInterrupted.name: "KILLED"}


@dataclass(frozen=True, slots=True)
class TrackingSettings:
    """Where a run goes in MLflow, as plain strings so that it can be handed to another process.

    `artifact_root` is the folder for files when `uri` is a database; a server decides for itself.
    """

    run_dir: str
    uri: str
    artifact_root: str
    experiment: str
    run_name: str
    parameters: dict[str, str]


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """One value of one metric; `time_ms` is since 1970.

    `step` is the epoch; under "steps/" and "diagnosis/" it is the update.
    """

    key: str
    value: float
    step: int
    time_ms: int


class MlflowRun:
    """The MLflow run of a run folder. A method may raise what MLflow raises, and may be called again then."""

    def __init__(self, settings: TrackingSettings, *, progress: Callable[[], None] = lambda: None) -> None:
        self._settings = settings
        self._run_dir = Path(settings.run_dir)
        self._progress = progress
        self._client: Any = None
        self._run_id = ""
        self._known: dict[str, str] = {}  # the parameters that the run has

    def open(self) -> None:
        """Find or create experiment and run, and log the parameters. Does nothing when it is already open."""
        if self._run_id:
            return
        if self._client is None:
            from mlflow import MlflowClient

            self._progress()
            create_sqlite_store(self._settings.uri)
            self._client = MlflowClient(tracking_uri=self._settings.uri)
        run_id = self._continued_run() or self._new_run()
        self._progress()
        (self._run_dir / RUN_ID_NAME).write_text(run_id + "\n", encoding="ascii")
        self._log_parameters(run_id, self._settings.parameters)
        self._run_id = run_id

    def send(self, records: Sequence[dict[str, object]]) -> None:
        """Send what MLflow should know of the journal's records."""
        from mlflow.entities import Metric

        self.open()
        for record in records:
            if record["event"] == PlanMade.name:
                self._log_parameters(self._run_id, plan_parameters(record))
        points = [
            Metric(p.key, p.value, p.time_ms, p.step) for record in records for p in metric_points(record)
        ]
        for chunk in _chunks(points, _METRICS_PER_REQUEST):
            self._client.log_batch(self._run_id, metrics=chunk)
            self._progress()

    def finish(self, status: str) -> None:
        """Send recipe, environment and plots, then set the status: FINISHED, FAILED or KILLED."""
        self.open()
        for name in _TEXT_ARTIFACTS:
            path = self._run_dir / name
            if path.is_file():
                text = mask_credentials(path.read_text(encoding="utf-8"))
                self._client.log_text(self._run_id, text, name)
                self._progress()
        for path in sorted((self._run_dir / "plots").glob("*.png")):
            self._client.log_artifact(self._run_id, str(path), "plots")
            self._progress()
        self._client.set_terminated(self._run_id, status=status)

    def nest(self, run_id: str) -> None:
        """Show another run of the same store below this one; one that is not there is left out."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.set_tag(run_id, _PARENT_TAG, self._run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    def log(self, metrics: Mapping[str, float], files: Iterable[Path]) -> None:
        """Send final metrics and files."""
        from mlflow.entities import Metric

        now_ms = round(1000 * time.time())
        points = [Metric(mlflow_name(key), value, now_ms, 0) for key, value in metrics.items()]
        for chunk in _chunks(points, _METRICS_PER_REQUEST):
            self._client.log_batch(self._run_id, metrics=chunk)
            self._progress()
        for path in files:
            self._client.log_artifact(self._run_id, str(path))
            self._progress()

    def _continued_run(self) -> str:
        """Return the id of the run that this folder has so far, set to running again; "" if there is none."""
        from mlflow.exceptions import MlflowException

        path = self._run_dir / RUN_ID_NAME
        if not path.is_file():
            return ""
        try:
            run = self._client.get_run(path.read_text(encoding="ascii").strip())
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return ""  # the folder was tracked elsewhere before
            raise
        if run.info.lifecycle_stage != "active":
            return ""  # deleted by someone
        self._known = dict(run.data.params)
        self._client.update_run(run.info.run_id, status="RUNNING")
        return str(run.info.run_id)

    def _new_run(self) -> str:
        tags = {
            "mlflow.source.name": "petractl",
            "petractl.version": __version__,
            "petractl.run_dir": str(self._run_dir),
        }
        name = self._settings.run_name or self._run_dir.name
        run = self._client.create_run(self._experiment_id(), run_name=name, tags=tags)
        self._known = {}
        return str(run.info.run_id)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._settings.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            root = self._settings.artifact_root
            try:
                location = Path(root).as_uri() if root else None
                return str(self._client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self._client.get_experiment_by_name(name)  # another run was faster
        return str(experiment.experiment_id)

    def _log_parameters(self, run_id: str, parameters: Mapping[str, str]) -> None:
        """Log parameters; MLflow never changes one, so a value that a resume changed becomes a tag."""
        from mlflow.entities import Param, RunTag

        masked = {mlflow_name(key): mask_credentials(value)[:_LONGEST] for key, value in parameters.items()}
        new = {key: value for key, value in masked.items() if key not in self._known}
        changed = {key: value for key, value in masked.items() if self._known.get(key, value) != value}
        for chunk in _chunks([Param(key, value) for key, value in new.items()], _ITEMS_PER_REQUEST):
            self._client.log_batch(run_id, params=chunk)
            self._progress()
        tags = [RunTag(f"resumed.{key}", value) for key, value in changed.items()]
        for chunk in _chunks(tags, _ITEMS_PER_REQUEST):
            self._client.log_batch(run_id, tags=chunk)
        self._known |= new


def metric_points(record: dict[str, object]) -> list[MetricPoint]:
    """Return the metrics in one record of the journal; most records hold none."""
    step, values = _metrics(record)
    time_ms = round(1000 * _number(record["time"]))
    return [
        MetricPoint(mlflow_name(key), _number(value), step, time_ms)
        for key, value in values.items()
        if value is not None
    ]


def _metrics(record: dict[str, object]) -> tuple[int, dict[str, object]]:
    match record:
        case {"event": EpochTrained.name, "epoch": int(epoch)}:
            values = {f"train/{key}": record[key] for key in ("loss", "top1", "seconds")}
            others = ("images_per_s", "lr", "update", "data_wait_percent")
            return epoch, values | {key: record[key] for key in others}
        case {"event": StepsDone.name, "update": int(update)}:
            return update, {"steps/data_wait_percent": record.get("data_wait_percent")}
        case {"event": SamplesSkipped.name, "epoch": int(epoch)}:
            return epoch, {"samples_skipped": record["count"]}
        case {"event": Evaluated.name, "epoch": int(epoch)}:
            return epoch, {f"{record['split']}/{key}": record[key] for key in ("loss", "top1", "top5")}
        case {"event": StageMeasured.name, "epoch": int(epoch), "stage": int(), "replica": int()}:
            return epoch, _stage_metrics(record)
        case {"event": GradientsDiagnosed.name, "update": int(update), "stage": int(stage)}:
            return update, {f"diagnosis/{key}/stage_{stage:02d}": record[key] for key in _DIAGNOSED}
        case {"event": PlanMade.name, "stages": list(stages)}:
            return 0, {f"staleness_updates/stage_{s['index']:02d}": s["staleness_updates"] for s in stages}
        case {"event": RunFinished.name, "epochs": int(epochs)}:
            keys = ("best_top1", "best_epoch", "peak_memory_bytes")
            return epochs, {key: record[key] for key in keys} | {"run_seconds": record["seconds"]}
    return 0, {}


def _stage_metrics(record: dict[str, object]) -> dict[str, object]:
    stage = f"stage_{record['stage']:02d}" + (f"_replica_{record['replica']}" if record["replica"] else "")
    sent = [record[f"bytes_sent_{direction}"] for direction in ("forward", "backward")]
    known = [_number(count) for count in sent if count is not None]
    values = {key: record[key] for key in ("idle_percent", "wait_forward_percent", "wait_backward_percent")}
    values |= {
        "bytes_sent": sum(known) if known else None,
        "staleness_measured": record["staleness_updates"],
    }
    return {f"{key}/{stage}": value for key, value in values.items()}


def plan_parameters(record: dict[str, object]) -> dict[str, str]:
    """Return the parameters that the plan adds to the recipe's; an older journal's plan has fewer."""
    stages = record["stages"]
    count = len(stages) if isinstance(stages, list) else 0
    values = {f"plan.{key}": str(record[key]) for key in _PLAN_PARAMETERS if key in record}
    return values | {"plan.stages": str(count)}


def final_status(records: Iterable[dict[str, object]]) -> str:
    """Return MLflow's status for a run: FINISHED, KILLED or FAILED (also for one without an end)."""
    ends = (RunStarted.name, RunFinished.name, RunInterrupted.name, RunFailed.name)
    last = [record["event"] for record in records if record["event"] in ends][-1:]
    return _STATUS.get(str(last[0]), "FAILED") if last else "FAILED"


def mlflow_name(name: str) -> str:
    """Return a name that MLflow accepts: it refuses brackets and percent signs, among others."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def create_sqlite_store(uri: str) -> None:
    """Create the store if `uri` is an SQLite file that does not exist; all of it or nothing.

    MLflow builds a new store in some hundred steps, which take seconds; a process killed in between leaves
    a file that no later run can open. So the store is made elsewhere and put in place when it is complete.
    """
    path = sqlite_path(uri)
    if path is None or path.exists():
        return
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="petractl-mlflow-") as folder:
        made = Path(folder) / "mlflow.db"
        MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
        complete = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        _copy_database(made, complete)
    try:
        os.link(complete, path)  # unlike a rename it fails where another run was faster
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            shutil.copyfile(complete, path)
    finally:
        complete.unlink()


def sqlite_path(uri: str) -> Path | None:
    """Return the file of an SQLite address, or None if it is something else."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)) if uri.startswith(prefix) and len(uri) > len(prefix) else None


def _copy_database(source: Path, target: Path) -> None:
    read, write = sqlite3.connect(source), sqlite3.connect(target)
    try:
        read.backup(write)
    finally:
        read.close()
        write.close()


def _chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _number(value: object) -> float:
    return float(value) if isinstance(value, str | int | float) else float("nan")
