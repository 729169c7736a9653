"""A tracking server in memory that can fail in every way a real one does, and forgives nothing.

It speaks the part of MLflow's REST interface that a run uses. Unlike MLflow's own databases it keeps a value
that is sent twice twice. `fault` is asked before each request is handled: it may return "refuse" (500,
nothing done), "lose" (done, but the answer never comes) or "" (all is well).
"""

import json
import re
import threading
import uuid
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class FakeMlflow:
    """The server; what it holds survives `stop` and `start`."""

    def __init__(self):
        self.experiments, self.runs, self.files = {}, {}, {}
        self.requests = []
        self.fault = lambda name: ""
        self._lock = threading.Lock()
        self._server, self.port = None, 0

    def start(self):
        handler = type("Handler", (_Handler,), {"mlflow": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    @property
    def uri(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def run(self):
        """The only run."""
        (run,) = self.runs.values()
        return run

    def counts(self, run=None):
        """How often each value of a run is there."""
        metrics = (run or self.run)["metrics"]
        return Counter((m["key"], m["step"], m["timestamp"], str(m["value"])) for m in metrics)

    def handle(self, name, body):
        with self._lock:
            return getattr(self, "do_" + re.sub(r"\W", "_", name))(body)

    def do_experiments_get_by_name(self, body):
        found = self.experiments.get(body["experiment_name"])
        return {"experiment": found} if found else None

    def do_experiments_create(self, body):
        number = str(len(self.experiments) + 1)
        self.experiments[body["name"]] = {
            "experiment_id": number,
            "name": body["name"],
            "lifecycle_stage": "active",
        }
        return {"experiment_id": number}

    def do_runs_create(self, body):
        run_id = uuid.uuid4().hex
        info = {
            "run_id": run_id,
            "experiment_id": body["experiment_id"],
            "run_name": body["run_name"],
            "status": "RUNNING",
            "start_time": body["start_time"],
            "lifecycle_stage": "active",
            "artifact_uri": f"mlflow-artifacts:/1/{run_id}/artifacts",
        }
        self.runs[run_id] = {
            "info": info,
            "metrics": [],
            "params": {},
            "tags": {tag["key"]: tag["value"] for tag in body["tags"]},
        }
        return {"run": self._shown(run_id)}

    def do_runs_get(self, body):
        return {"run": self._shown(body["run_id"])} if body["run_id"] in self.runs else None

    def do_runs_update(self, body):
        info = self.runs[body["run_id"]]["info"]
        info |= {key: body[key] for key in ("status", "end_time") if body.get(key)}
        return {"run_info": info}

    def do_runs_search(self, body):
        key, value = re.fullmatch(r"tags\.`([^`]+)` = '(\w+)'", body["filter"]).groups()
        return {"runs": [self._shown(n) for n, run in self.runs.items() if run["tags"].get(key) == value]}

    def do_runs_log_batch(self, body):
        run = self.runs[body["run_id"]]
        run["metrics"] += body.get("metrics", [])
        run["params"] |= {item["key"]: item["value"] for item in body.get("params", [])}
        run["tags"] |= {item["key"]: item["value"] for item in body.get("tags", [])}
        return {}

    def do_metrics_get_history(self, body):
        metrics = self.runs[body["run_id"]]["metrics"]
        return {"metrics": [m for m in metrics if m["key"] == body["metric_key"]]}

    def _shown(self, run_id):
        run = self.runs[run_id]
        latest = {m["key"]: m for m in run["metrics"]}
        pairs = {
            name: [{"key": key, "value": value} for key, value in run[name].items()]
            for name in ("params", "tags")
        }
        return {"info": run["info"], "data": {"metrics": list(latest.values()), **pairs}}


class _Handler(BaseHTTPRequestHandler):
    mlflow: FakeMlflow

    def do_GET(self):
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        self._serve(query)

    def do_POST(self):
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def do_PUT(self):
        self._serve(self.rfile.read(int(self.headers["Content-Length"])))

    def _serve(self, body):
        path = urlsplit(self.path).path
        name = path.partition("/mlflow/")[2] or path.partition("/mlflow-artifacts/")[2]
        if not name:
            return self._answer(404, {})
        self.mlflow.requests.append(name)
        fault = self.mlflow.fault(name)
        if fault == "refuse":
            return self._answer(500, {"error_code": "INTERNAL_ERROR", "message": "disk full at http://a:b@c"})
        if isinstance(body, bytes):
            self.mlflow.files[name] = body
            answer = {}
        elif hasattr(self.mlflow, "do_" + re.sub(r"\W", "_", name)):
            answer = self.mlflow.handle(name, body)
        else:
            return self._answer(404, {})
        if fault == "lose":
            self.close_connection = True
            return None
        gone = {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "there is none"}
        return self._answer(404, gone) if answer is None else self._answer(200, answer)

    def _answer(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
