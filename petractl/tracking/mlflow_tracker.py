"""Sends a run to MLflow without letting MLflow touch the run.

MLflow takes a second or more to import and seconds to create its store, and a server may be slow, down or
full. In a thread of the training process that work holds Python's lock and halves the speed of training
while it lasts, so a process of its own does it (`mlflow_worker`): it reads the journal, which holds
everything anyway and so is the queue in between. This listener only starts that process, passes on its
warning (one, whatever goes wrong) and, at the end, waits for it as long as it gets on, within limits.
"""

import contextlib
import json
import logging
import os
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from petractl.events import Event
from petractl.tracking.journal import JOURNAL_NAME
from petractl.tracking.masking import mask_credentials
from petractl.tracking.mlflow_run import TrackingSettings, sqlite_path

LOG_NAME = "logs/mlflow.log"

_RUN_WORKER = "petractl.tracking.mlflow_worker"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_SERVERS = ("http", "https", "databricks")
# What the user has set in these wins over what is set here.
_PREFERRED_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; 120 otherwise
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the worker tries again by itself
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_ENVIRONMENT = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}

_logger = logging.getLogger(__name__)


def tracking_uri(uri: str, *, directory: Path) -> str:
    """Return the address of the tracking store: as given, else an SQLite file in the directory of the runs.

    The path of an SQLite file is made absolute, so that the address means the same from anywhere.
    """
    path = sqlite_path(uri) if uri else directory / "mlflow.db"
    return f"sqlite:///{path.absolute()}" if path is not None else uri


def tracking_problem(uri: str) -> str:
    """Return why MLflow cannot use this address, or "" if it seems right. Does not import mlflow."""
    scheme, separator, _ = uri.partition(":")
    if uri == "databricks":
        return ""
    if not separator or scheme.split("+")[0] not in (*_DATABASES, *_SERVERS):
        return "not a tracking server or database: use http://..., https://... or sqlite:///path/mlflow.db"
    path = sqlite_path(uri)
    if scheme == "sqlite" and path is None:
        return "no path: use sqlite:///path/mlflow.db"
    if path is not None and "?" in str(path):
        return "an SQLite address cannot hold a '?' in its path"
    return ""


def how_to_look(uri: str) -> str:
    """Return the line that tells a person how to see the runs of a store."""
    if uri.partition(":")[0].split("+")[0] in _DATABASES:
        return f"mlflow ui --backend-store-uri {shlex.quote(mask_credentials(uri))}"
    return mask_credentials(uri)


def _warn(message: str, hint: str) -> None:
    _logger.warning("%s (hint: %s)", message, hint)


class MlflowTracker:
    """The listener that has a run sent to MLflow by a process of its own.

    `uri` is what `tracking_uri` gave; `parameters` is the resolved recipe, flattened. `on_warning(message,
    hint)` is called at most once; it may emit on the bus. `close` waits for what is still to be sent while
    the process gets on: for `close_wait_s` seconds in all and, on a server, for no more than `stall_s`
    seconds without progress. `worker` is the module that the process runs; a sweep has one of its own.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        uri: str,
        experiment: str = "petractl",
        run_name: str = "",
        parameters: Mapping[str, str] | None = None,
        on_warning: Callable[[str, str], None] = _warn,
        close_wait_s: float = 30.0,
        stall_s: float = 5.0,
        worker: str = _RUN_WORKER,
    ) -> None:
        path = sqlite_path(uri)
        is_database = uri.partition(":")[0].split("+")[0] in _DATABASES
        beside = path.parent if path is not None else run_dir.parent
        self._settings = TrackingSettings(
            run_dir=str(run_dir.absolute()),
            uri=uri,
            artifact_root=str((beside / "mlartifacts").absolute()) if is_database else "",
            experiment=experiment,
            run_name=run_name,
            parameters=dict(parameters or {}),
        )
        self._on_warning = on_warning
        self._close_wait_s = close_wait_s
        # A file does not hang; making a store is one long step, and must not be given up in the middle.
        self._stall_s = stall_s if path is None else close_wait_s
        self._module = worker
        self._worker: _Worker | None = None
        self._warned = False
        self._done = False

    def handle(self, event: Event, record: dict[str, object]) -> None:
        """Start the process at the first event; pass on its warning, if it has one."""
        self.look()

    def look(self) -> None:
        """Start the process if there is none yet; pass on its warning, if it has one."""
        if self._worker is None:
            problem = tracking_problem(self._settings.uri)
            if problem:
                self._warn_once(problem)
                return
            self._worker = _Worker(self._settings, self._module)
        self._take_reports(self._worker.reports(0.0))

    def close(self) -> None:
        """Wait, within limits, until everything is sent; then end the process."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.ask_to_close()
        start_s = last_s = time.monotonic()
        while not worker.ended:
            limit_s = min(start_s + self._close_wait_s, last_s + self._stall_s)
            wait_s = limit_s - time.monotonic()
            if wait_s <= 0.0:
                break
            if self._take_reports(worker.reports(wait_s)):
                last_s = time.monotonic()
        worker.end()
        if not self._done:
            waited = f"not everything was sent within {time.monotonic() - start_s:.1f} s of the end"
            self._warn_once("its process ended early" if worker.ended else waited)

    def _take_reports(self, reports: list[dict[str, str]]) -> bool:
        """Return whether there was progress."""
        progress = False
        for report in reports:
            if report["kind"] == "warning":
                self._warn_once(report["message"])
            else:
                progress = True
                self._done = self._done or report["kind"] == "done"
        return progress

    def _warn_once(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            journal = Path(self._settings.run_dir) / JOURNAL_NAME
            self._on_warning(
                f"MLflow at {mask_credentials(self._settings.uri)}: {reason}",
                f"the run is not affected; {journal} holds everything, {LOG_NAME} says more",
            )


class _Worker:
    """The other process, its command pipe and its reports."""

    def __init__(self, settings: TrackingSettings, module: str) -> None:
        log = Path(settings.run_dir) / LOG_NAME
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_worker_environment(),
                start_new_session=True,  # Ctrl-C is for the run, which then closes this in order
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._commands, self._reports = self._process.stdin, self._process.stdout
        os.set_blocking(self._reports.fileno(), False)
        self._rest = b""
        self.ended = False
        self._command(json.dumps(asdict(settings)))

    def reports(self, wait_s: float) -> list[dict[str, str]]:
        """Return the reports that have come, waiting at most so long for the first."""
        if self.ended or (wait_s > 0.0 and not select.select([self._reports], [], [], wait_s)[0]):
            return []
        try:
            data = os.read(self._reports.fileno(), 65536)
        except BlockingIOError:
            return []
        self.ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def ask_to_close(self) -> None:
        """Say that the run is over. In words: a forked data worker may hold a copy of the pipe's end."""
        self._command("close")

    def end(self) -> None:
        """Make sure that the process is gone, and free what it used."""
        if not self.ended:
            self._process.kill()
        self._process.wait()
        self._reports.close()
        with contextlib.suppress(BrokenPipeError):
            self._commands.close()

    def _command(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is gone; its last report, or the lack of one, says so
            self._commands.write(line.encode() + b"\n")
            self._commands.flush()


def _worker_environment() -> dict[str, str]:
    # -P keeps the working directory off the path, so the package's own place has to be on it.
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(place for place in places if place)
    return _PREFERRED_ENVIRONMENT | os.environ | _ENVIRONMENT | {"PYTHONPATH": path}
