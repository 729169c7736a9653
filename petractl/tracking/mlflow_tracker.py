"""Sends a run to MLflow without letting MLflow touch the run.

MLflow takes a second or more to import and seconds to create its store, and a server may be slow, down or
full. In a thread of the training process that work holds Python's lock and halves the speed of training
while it lasts, so a process of its own does it (`mlflow_worker`): it reads the journal, which holds
everything anyway and so is the queue in between. This listener only starts that process, passes on its
warning (one, whatever goes wrong) and, at the end, waits for it as long as it gets on, within limits.
"""

import logging
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from petractl.events import Event, RunInterrupted
from petractl.tracking.journal import JOURNAL_NAME
from petractl.tracking.masking import mask_credentials
from petractl.tracking.mlflow_process import LOG_NAME, RUN_WORKER, WorkerProcess
from petractl.tracking.mlflow_run import TrackingSettings, sqlite_path

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_SERVERS = ("http", "https", "databricks")
_QUIET_S = 1.0  # of waiting at the end, before a word about it

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
    if scheme in ("http", "https") and not _has_host(uri):
        return f"no host: use {scheme}://host:port"
    if path is not None and "?" in str(path):
        return "an SQLite address cannot hold a '?' in its path"
    return ""


def _has_host(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a broken IPv6 address, a port that is no number
        return False


def how_to_look(uri: str) -> str:
    """Return the line that tells a person how to see the runs of a store."""
    if uri.partition(":")[0].split("+")[0] in _DATABASES:
        return f"mlflow ui --backend-store-uri {shlex.quote(mask_credentials(uri))}"
    return mask_credentials(uri)


def tracking_settings(
    run_dir: Path,
    *,
    uri: str,
    experiment: str,
    run_name: str,
    parameters: Mapping[str, str],
    is_live: bool = True,
) -> TrackingSettings:
    """Return where a run goes; `uri` is what `tracking_uri` gave. Files lie beside a database."""
    path = sqlite_path(uri)
    is_database = uri.partition(":")[0].split("+")[0] in _DATABASES
    beside = path.parent if path is not None else run_dir.parent
    return TrackingSettings(
        run_dir=str(run_dir.absolute()),
        uri=uri,
        artifact_root=str((beside / "mlartifacts").absolute()) if is_database else "",
        experiment=experiment,
        run_name=run_name,
        parameters=dict(parameters),
        is_live=is_live,
    )


def _warn(message: str, hint: str) -> None:
    _logger.warning("%s (hint: %s)", message, hint)


def _tell(line: str) -> None:
    _logger.info("%s", line)


class MlflowTracker:
    """The listener that has a run sent to MLflow by a process of its own.

    `uri` is what `tracking_uri` gave; `parameters` is the resolved recipe, flattened. `on_warning(message,
    hint)` is called at most once; it may emit on the bus. `on_notice(line)` is told that the end of the run
    waits, and what was left. `close` waits for what is still to be sent while the process gets on: for
    `close_wait_s` seconds in all (`interrupted_wait_s` where the machine may soon be gone) and, on a server,
    for no more than `stall_s` seconds without progress. `worker` is the module that the process runs; a sweep
    has one of its own.
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
        on_notice: Callable[[str], None] = _tell,
        close_wait_s: float = 30.0,
        interrupted_wait_s: float = 10.0,
        stall_s: float = 5.0,
        worker: str = RUN_WORKER,
    ) -> None:
        self._settings = tracking_settings(
            run_dir, uri=uri, experiment=experiment, run_name=run_name, parameters=parameters or {}
        )
        self._on_warning = on_warning
        self._on_notice = on_notice
        self._close_wait_s = close_wait_s
        self._interrupted_wait_s = interrupted_wait_s
        # A file does not hang; making a store is one long step, and must not be given up in the middle.
        self._stall_s = stall_s if sqlite_path(uri) is None else close_wait_s
        self._module = worker
        self._worker: WorkerProcess | None = None
        self._warned = False
        self._switched_off = False
        self._done = False

    def how_to_look(self) -> str:
        """Return how to see the run; once closed with something left, how that is sent."""
        if self._switched_off and not self._done:
            return f"not everything is there; send it with: {self._later()}"
        return how_to_look(self._settings.uri)

    def handle(self, event: Event, record: dict[str, object]) -> None:
        """Start the process at the first event; pass on its warning, if it has one."""
        if isinstance(event, RunInterrupted):
            self._close_wait_s = min(self._close_wait_s, self._interrupted_wait_s)
        self.look()

    def look(self) -> None:
        """Start the process if there is none yet; pass on its warning, if it has one."""
        if self._switched_off:
            return
        if self._worker is None:
            self._start()
        if self._worker is not None:
            self._take_reports(self._worker.reports(0.0))

    def _start(self) -> None:
        problem = tracking_problem(self._settings.uri)
        try:
            if not problem:
                self._worker = WorkerProcess(self._settings, self._module)
        except OSError as error:  # a full disk, no more processes
            problem = f"its process cannot be started: {error.strerror or error}"
        if problem:
            self._switched_off = True
            self._warn_once(problem)

    def close(self) -> None:
        """Wait, within limits, until everything is sent; then end the process."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        self._switched_off = True  # a warning told from here on is an event too
        start_s = time.monotonic()
        try:
            worker.ask_to_close()
            self._wait(worker, start_s)
        finally:
            worker.end()
        if not self._done:
            waited = f"not everything was sent within {time.monotonic() - start_s:.1f} s of the end"
            self._tell_left("not everything could be sent" if worker.ended else waited)

    def _wait(self, worker: WorkerProcess, start_s: float) -> None:
        last_s, told = start_s, False
        while not worker.ended:
            now_s = time.monotonic()
            limit_s = min(start_s + self._close_wait_s, last_s + self._stall_s)
            if now_s >= limit_s:
                return
            if not told and now_s >= start_s + _QUIET_S:
                told = True
                self._on_notice(f"waiting for MLflow, {self._close_wait_s:.0f} s at most")
            if self._take_reports(
                worker.reports(limit_s - now_s if told else min(limit_s - now_s, _QUIET_S))
            ):
                last_s = time.monotonic()

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

    def _tell_left(self, reason: str) -> None:
        """Tell that something was left, in one warning; where there was one before, in a line."""
        if self._warned:
            self._on_notice(f"MLflow: {reason}; later: {self._later()}")
        self._warn_once(reason)

    def _warn_once(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            journal = Path(self._settings.run_dir) / JOURNAL_NAME
            self._on_warning(
                f"MLflow at {mask_credentials(self._settings.uri)}: {reason}",
                f"the run is not affected; {journal} holds everything, {LOG_NAME} says more; "
                f"what is missing in the end is sent by: {self._later()}",
            )

    def _later(self) -> str:
        return f"petractl sync {shlex.quote(self._settings.run_dir)}"
