"""Sends what MLflow has missed of a run, when the run has ended.

It is the work of the process that follows a run (`mlflow_worker`), told at once that the run is over: it
reads the whole journal, finds the run in the store, or makes it, asks which values it holds, and sends the
others. So a partial run is completed, a run that never arrived is sent whole, and sending twice changes
nothing. Here nobody trains, so a slow server is given time.
"""

import json
import time
from collections.abc import Callable

from petractl.errors import RunError
from petractl.tracking.masking import mask_credentials
from petractl.tracking.mlflow_process import LOG_NAME, WorkerProcess
from petractl.tracking.mlflow_run import TrackingSettings
from petractl.tracking.mlflow_worker import Sent


def send_late(
    settings: TrackingSettings,
    *,
    stall_s: float = 180.0,
    on_progress: Callable[[], None] = lambda: None,
) -> Sent:
    """Send what is missing; gives up after `stall_s` seconds in which nothing has moved.

    Raises:
        RunError: the store cannot be reached, or has refused something. What has arrived stays.
    """
    try:
        worker = WorkerProcess(settings)
    except OSError as error:
        raise RunError(
            f"cannot be written: {error.strerror or error}", where=f"{settings.run_dir}/{LOG_NAME}"
        ) from None
    try:
        worker.ask_to_close()
        return _await(worker, settings, stall_s, on_progress)
    finally:
        worker.end()


def _await(
    worker: WorkerProcess, settings: TrackingSettings, stall_s: float, on_progress: Callable[[], None]
) -> Sent:
    last_s = time.monotonic()
    reason, sent = "", None
    while not worker.ended and time.monotonic() < last_s + stall_s:
        for report in worker.reports(last_s + stall_s - time.monotonic()):
            last_s = time.monotonic()
            on_progress()
            if report["kind"] == "warning":
                reason = report["message"]
            elif report["kind"] == "sent":
                sent = Sent(**json.loads(report["message"]))
    if sent is not None:
        return sent
    ended = "its process ended early" if worker.ended else f"it has not answered for {stall_s:.0f} s"
    raise RunError(
        f"MLflow at {mask_credentials(settings.uri)}: {reason or ended}",
        where=settings.run_dir,
        hint=f"what has arrived stays; run the same command again later; {LOG_NAME} says more",
    )
