"""A real `mlflow server` and a proxy before it that breaks it: slow, full of errors, dead, on a full disk.

The disk is full by a limit on the size of the files that the server's processes may write (RLIMIT_FSIZE): no
other process is touched by it, and it can be lifted again.
"""

import contextlib
import http.client
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SLOW_S = 30.0
_IDLE_S = 0.2  # of CPU time in a second: no more work than that is rest
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "OMP_NUM_THREADS": "1",
}
HOST = "127.0.0.1"


class MlflowServer:
    """The server as a process of its own, with its store in a folder."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **_ENVIRONMENT},
            )
        until_s = time.monotonic() + 90.0
        while not self._answers():
            assert time.monotonic() < until_s, "the server has not started"
            time.sleep(0.2)
        self._settle()

    def restart(self) -> None:
        """Kill it if it is there, and start it."""
        self.kill()
        self.start()

    @property
    def pid(self) -> int:
        """Its process id, which is that of its session."""
        return self._process.pid

    def kill(self) -> None:
        """Kill it outright, with all of its processes."""
        kill(self.pid)
        self._process.wait()

    def _settle(self) -> None:
        """Wait until it has nothing to do: it goes on loading after its first answer."""
        before = -1.0
        while (now := _cpu_s(self.pid)) > before + _IDLE_S:
            before = now
            time.sleep(1.0)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.port}/health", timeout=2.0) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


class Proxy:
    """Passes requests on; `fault` is "" (all is well), "slow" or "errors"."""

    def __init__(self, to_port: int, *, fault: str = "") -> None:
        self.fault = fault
        handler = type("Handler", (_Handler,), {"proxy": self, "to_port": to_port})
        self._server = ThreadingHTTPServer((HOST, 0), handler)
        self._server.daemon_threads = True
        self.uri = f"http://{HOST}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    to_port: int

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.proxy.fault == "slow":
            time.sleep(SLOW_S)
        if self.proxy.fault == "errors":
            return self._answer(500, b"{}")
        connection = http.client.HTTPConnection(HOST, self.to_port, timeout=60.0)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            return self._answer(answer.status, answer.read())
        except OSError:
            self.close_connection = True  # the server behind is dead
        finally:
            connection.close()
        return None

    do_GET = do_POST = do_PUT = do_PATCH = _pass_on  # noqa: N815 (http.server's names)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def kill(pid: int) -> None:
    """Kill a server outright, with all of its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def fill_disk(pid: int) -> None:
    """Let a server write nothing more."""
    _limit(pid, 1)


def free_disk(pid: int) -> None:
    """Let it write again."""
    _limit(pid, resource.RLIM_INFINITY)


def _limit(leader: int, size: int) -> None:
    for pid in _group(leader):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _cpu_s(leader: int) -> float:
    """Return the CPU time that the processes of a session have used, in seconds."""
    ticks = 0
    for pid in _group(leader):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _group(leader: int) -> list[int]:
    """Return the processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(path.name)) == leader:
                found.append(int(path.name))
        except ProcessLookupError:
            continue
    return found
