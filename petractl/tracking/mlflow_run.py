"""One run as MLflow stores it: what is sent, and how a store is opened.

Everything sent comes from the run folder: metrics from the journal, the recipe and the curves from their
files. So what a server missed can be sent later, and a resumed run continues its MLflow run: the one whose id
lies in the run folder or, where that could not be written or the server's answer never came, the one that
has the journal's first line as its tag. What may have arrived is asked for before anything is sent again.
mlflow is imported when a run is opened: it takes more than a second.
"""

import contextlib
import hashlib
import os
import re
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petractl import __version__
from petractl.events import PlanMade
from petractl.tracking.journal import JOURNAL_NAME
from petractl.tracking.masking import mask_credentials
from petractl.tracking.mlflow_held import HeldMetrics
from petractl.tracking.mlflow_metrics import (
    MetricPoint,
    metric_points,
    mlflow_name,
    plan_parameters,
    record_time_ms,
)

RUN_ID_NAME = "mlflow_run_id"
IDENTITY_TAG = "petractl.run"

_TEXT_ARTIFACTS = ("recipe.toml", "resolved.toml", "environment.json")
_PARENT_TAG = "mlflow.parentRunId"
_METRICS_PER_REQUEST = 1000  # MLflow's limits
_LONGEST = 6000  # characters of a parameter's value that MLflow keeps
_ITEMS_PER_REQUEST = 100
_FIRST_LINE_BYTES = 65536
_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True, slots=True)
class TrackingSettings:
    """Where a run goes in MLflow, as plain strings so that it can be handed to another process.

    `artifact_root` is the folder for files when `uri` is a database; a server decides for itself. `is_live`
    is false for a run that has ended and is sent late.
    """

    run_dir: str
    uri: str
    artifact_root: str
    experiment: str
    run_name: str
    parameters: dict[str, str]
    is_live: bool = True


class MlflowRun:
    """The MLflow run of a run folder. A method may raise what MLflow raises, and may be called again then."""

    def __init__(self, settings: TrackingSettings, *, progress: Callable[[], None] = lambda: None) -> None:
        self._settings = settings
        self._run_dir = Path(settings.run_dir)
        self._progress = progress
        self._client: Any = None
        self._run_id = ""
        self._identity = ""
        self._known: dict[str, str] = {}  # the parameters that the run has
        self._held: HeldMetrics | None = None
        self.num_sent = 0
        """Values that the store has confirmed."""

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; "" while it is not open."""
        return self._run_id

    def open(self, *, start_ms: int | None = None) -> None:
        """Find or create experiment and run, and log the parameters. Does nothing when it is already open."""
        if self._run_id:
            return
        if self._client is None:
            from mlflow import MlflowClient

            self._progress()
            create_sqlite_store(self._settings.uri)
            self._client = MlflowClient(tracking_uri=self._settings.uri)
        # Kept over failures: a run whose making was not confirmed is found again by it.
        self._identity = self._identity or run_identity(self._run_dir) or uuid.uuid4().hex
        run_id = self._continued_run() or self._new_run(start_ms)
        self._progress()
        with contextlib.suppress(OSError):  # on a full disk; it is found by its tag then
            (self._run_dir / RUN_ID_NAME).write_text(run_id + "\n", encoding="ascii")
        self._log_parameters(run_id, self._settings.parameters)
        self._run_id = run_id

    def send(self, records: Sequence[dict[str, object]]) -> None:
        """Send what MLflow should know of the journal's records, and does not hold yet."""
        self.open(start_ms=record_time_ms(records[0]) if records else None)
        for record in records:
            if record.get("event") == PlanMade.name:
                self._log_parameters(self._run_id, plan_parameters(record))
        assert self._held is not None, "an open run has it"
        points = self._held.missing(point for record in records for point in metric_points(record))
        for chunk in _chunks(points, _METRICS_PER_REQUEST):
            self._send_points(chunk)

    def _send_points(self, points: Sequence[MetricPoint]) -> None:
        from mlflow.entities import Metric

        assert self._held is not None, "an open run has it"
        try:
            self._client.log_batch(
                self._run_id, metrics=[Metric(p.key, p.value, p.time_ms, p.step) for p in points]
            )
        except Exception:
            self._held.doubt()
            raise
        self._held.add(points)
        self.num_sent += len(points)
        self._progress()

    def finish(self, status: str, *, end_ms: int | None = None) -> None:
        """Send recipe, environment and plots, then set the status: FINISHED, FAILED or KILLED."""
        self.open()
        for name in _TEXT_ARTIFACTS:
            path = self._run_dir / name
            if path.is_file():
                text = mask_credentials(path.read_text(encoding="utf-8", errors="replace"))
                self._client.log_text(self._run_id, text, name)
                self._progress()
        for path in sorted((self._run_dir / "plots").glob("*.png")):
            self._client.log_artifact(self._run_id, str(path), "plots")
            self._progress()
        self._client.set_terminated(self._run_id, status=status, end_time=end_ms)

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
        """Return the id of the run that this folder has so far, running again; "" if there is none."""
        run = self._named_run() or self._tagged_run()
        if run is None:
            return ""
        run_id = str(run.info.run_id)
        self._known = dict(run.data.params)
        self._held = HeldMetrics(self._client, run_id, new=False)
        if self._settings.is_live:
            self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _named_run(self) -> Any:
        """Return the run whose id lies in the run folder; None if it is not in this store, or was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            text = (self._run_dir / RUN_ID_NAME).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        if not re.fullmatch(r"\w{1,64}", text):
            return None  # cut short
        try:
            run = self._client.get_run(text)
        except MlflowException as error:
            if error.error_code in _GONE:
                return None  # the folder was tracked elsewhere before
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _tagged_run(self) -> Any:
        """Return the run that was made for this folder although nobody heard of it; None if there is none."""
        experiment = self._client.get_experiment_by_name(self._settings.experiment)
        if experiment is None or not self._identity:
            return None
        found = self._client.search_runs(
            [experiment.experiment_id],
            filter_string=f"tags.`{IDENTITY_TAG}` = '{self._identity}'",
            max_results=1,
        )
        return found[0] if found else None

    def _new_run(self, start_ms: int | None) -> str:
        tags = {
            "mlflow.source.name": "petractl",
            "petractl.version": __version__,
            "petractl.run_dir": str(self._run_dir),
            IDENTITY_TAG: self._identity,
        }
        name = self._settings.run_name or self._run_dir.name
        run = self._client.create_run(
            self._experiment_id(), start_time=start_ms or round(1000 * time.time()), run_name=name, tags=tags
        )
        run_id = str(run.info.run_id)
        self._known = {}
        self._held = HeldMetrics(self._client, run_id, new=True)
        return run_id

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


def run_identity(run_dir: Path) -> str:
    """Return what tells a run from all others: a digest of its journal's first line; "" if there is none."""
    try:
        with (run_dir / JOURNAL_NAME).open("rb") as file:
            line = file.readline(_FIRST_LINE_BYTES)
    except OSError:
        return ""
    return hashlib.sha256(line).hexdigest()[:32] if line.endswith(b"\n") else ""


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
        try:
            _copy_database(made, complete)
            _put_in_place(complete, path)
        finally:
            complete.unlink(missing_ok=True)  # of a full disk too


def _put_in_place(complete: Path, path: Path) -> None:
    try:
        os.link(complete, path)  # unlike a rename it fails where another run was faster
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            complete.rename(path)


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
