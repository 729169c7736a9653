"""The process that sends to MLflow, as its parent sees it: a pipe of commands and a pipe of reports."""

import contextlib
import json
import os
import select
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from petractl.tracking.mlflow_run import TrackingSettings

LOG_NAME = "logs/mlflow.log"
RUN_WORKER = "petractl.tracking.mlflow_worker"

# What the user has set in these wins over what is set here.
_PREFERRED_ENVIRONMENT = {
    # Seconds; 120 otherwise. Long enough for a server that answers slowly: what is given up may have arrived.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    # The process tries again by itself, and looks first what has arrived; a client's own retry does not.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
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


class WorkerProcess:
    """The other process, its command pipe and its reports.

    Raises:
        OSError: its log cannot be written, or the process cannot be started.
    """

    def __init__(self, settings: TrackingSettings, module: str = RUN_WORKER) -> None:
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
