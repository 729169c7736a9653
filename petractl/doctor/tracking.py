"""Whether MLflow can be reached where runs would be logged.

MLflow's own client asks, in a process of its own and within seconds: what it makes of addresses, of the
variables that hold passwords, and of the version of a database, is its own business. A store that does not
exist yet is left so. Nothing here stops a run, but for an address that none can be: a tracking server that is
down costs a run a warning.
"""

from pathlib import Path

from petractl.doctor.check import Check, failure, ok, warning
from petractl.doctor.child import NoAnswerError, ask
from petractl.doctor.disk import nearest_folder
from petractl.tracking.masking import mask_credentials
from petractl.tracking.mlflow_run import sqlite_path
from petractl.tracking.mlflow_tracker import tracking_problem, tracking_uri

TIMEOUT_S = 30.0
_NAME = "MLflow"
_LATER = "runs go on without it and keep all in their journals; `petractl sync RUN` sends it later"
_CLIENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}


def check_tracking(uri: str, *, directory: Path, timeout_s: float = TIMEOUT_S) -> Check:
    """Look for the tracking server at `uri`, or for the store in the folder of runs where it is empty."""
    shown = mask_credentials(uri)
    problem = tracking_problem(uri) if uri else ""
    if problem:
        return failure(_NAME, f"{shown}: {problem}", "give another tracking.uri, or leave it out")
    address = tracking_uri(uri, directory=directory)
    path = sqlite_path(address)
    shown = mask_credentials(address)
    if path is not None and not path.exists():
        if nearest_folder(path.parent) is None:
            return failure(_NAME, f"{shown}: {path.parent} is not a folder", "give another tracking.uri")
        return ok(_NAME, f"{shown} is made by the first run")
    try:
        answer = ask("petractl.doctor.ask_mlflow", {"uri": address}, timeout_s=timeout_s, environment=_CLIENT)
    except NoAnswerError as error:
        return warning(_NAME, f"{shown}: {mask_credentials(str(error))}", _LATER)
    if answer["error"]:
        return warning(_NAME, f"{shown}: {mask_credentials(answer['error'])}", _LATER)
    return ok(_NAME, f"{shown} answers in {answer['seconds']:.2f} s, MLflow {answer['version']}")
