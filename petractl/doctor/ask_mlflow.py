"""Asks a tracking server for one experiment: `python -m petractl.doctor.ask_mlflow`, run by `tracking`."""

import json
import sys
import time
from typing import Any

from petractl.tracking.mlflow_worker import reason


def asked(uri: str) -> dict[str, Any]:
    """Return how long the answer took, the client's version, and the error, "" if there is none."""
    import mlflow
    from mlflow import MlflowClient

    started, error = time.perf_counter(), ""
    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as raised:
        error = reason(raised)
    return {"error": error, "seconds": time.perf_counter() - started, "version": mlflow.__version__}


if __name__ == "__main__":
    answer = asked(json.loads(sys.stdin.read())["uri"])
    sys.stdout.write(json.dumps(answer) + "\n")
