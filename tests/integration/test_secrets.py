"""A password in a tracking URI stays where it was given, and a run listens to its own machine only.

One run of two processes is logged to a server that records what it is sent, under an address that holds a
password and a token; all that the run writes, says and sends is then searched for them. While it runs, every
socket that one of its processes listens on is looked up in /proc.
"""

import base64
import contextlib
import ipaddress
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from petractl.cli.app import app
from petractl.processes.safe_path import safe_path

PASSWORD, TOKEN = "s3cr3t-p4ss", "t0k3n-v4lue"
SECRETS = (PASSWORD, TOKEN)
RECIPE = """
[model]
name = "revnet18"
width = 2
[data]
name = "fake"
batch_size = 4
fake_samples = 16
image_size = 8
steps_per_epoch = 2
[method]
name = "petra"
[partition]
stages = 2
[engine]
mode = "processes"
device = "cpu"
threads = 1
[training]
epochs = 2
[tracking]
uri = "http://me:{PASSWORD}@127.0.0.1:{PORT}/?token={TOKEN}"
"""
RUN = {
    "info": {
        "run_id": "abc",
        "run_uuid": "abc",
        "experiment_id": "1",
        "status": "RUNNING",
        "artifact_uri": "mlflow-artifacts:/1/abc",
        "lifecycle_stage": "active",
        "start_time": 0,
    },
    "data": {},
}
EXPERIMENT = {"experiment_id": "1", "name": "petractl", "lifecycle_stage": "active", "artifact_location": ""}


class Recorder(ThreadingHTTPServer):
    """A tracking server that takes everything, and keeps paths and bodies."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[str] = []
        self.authorizations: set[str] = set()

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class Handler(BaseHTTPRequestHandler):
    server: Recorder

    def _take(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.replace(TOKEN, "")  # it is part of the address
        self.server.bodies.append(f"{self.command} {path} {body.decode('latin1')}")
        self.server.authorizations.add(self.headers.get("Authorization", ""))
        answer = json.dumps({"run": RUN, "experiment": EXPERIMENT, "experiment_id": "1"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_PATCH = _take  # noqa: N815 (names that the library looks for)

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


@dataclass
class Ran:
    """What a run has said, sent and written, and the addresses it has listened on."""

    folder: Path
    stdout: str
    stderr: str
    exit_code: int
    sent: list[str]
    authorizations: set[str]
    listened: dict[str, set[str]] = field(default_factory=dict)  # by command line of the process


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("secrets")
    with Recorder() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        recipe = RECIPE.replace("{PORT}", str(server.port))
        recipe = recipe.replace("{PASSWORD}", PASSWORD).replace("{TOKEN}", TOKEN)
        (folder / "recipe.toml").write_text(recipe)
        for name in ("torch.py", "json.py"):  # what a stranger's folder may hold
            (folder / name).write_text("import os\nos.mkdir('executed')\n")
        # As the installed command does, -P leaves the folder out for this process, not for those it starts.
        command = [sys.executable, "-P", "-m", "petractl", "run", "recipe.toml", "--dir", "run"]
        environment = {**os.environ, "PYTHONPATH": safe_path()["PYTHONPATH"]}
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True
        ) as child:
            listened: dict[str, set[str]] = {}
            watcher = threading.Thread(target=_watch, args=(child, listened))
            watcher.start()
            stdout, stderr = child.communicate(timeout=120)
            watcher.join()
        server.shutdown()
        yield Ran(
            folder / "run", stdout, stderr, child.returncode, server.bodies, server.authorizations, listened
        )


def _watch(child: "subprocess.Popen[str]", listened: dict[str, set[str]]) -> None:
    while child.poll() is None:
        for pid in _family(child.pid):
            title = _title(pid)
            listened.setdefault(title, set()).update(_listening(pid))
        time.sleep(0.2)


def _family(pid: int) -> list[int]:
    """Return a process and all of its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread may end at any moment
            found += [each for child in task.read_text().split() for each in _family(int(child))]
    return found


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def _listening(pid: int) -> set[str]:
    """Return the addresses that a process listens on."""
    inodes = set()
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    except OSError:
        return set()
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            # 0A is LISTEN; a datagram socket has no such state, 07 is one that takes from anybody.
            if rest[5] in inodes and state == ("0A" if table.startswith("tcp") else "07"):
                found.add(_address(local.partition(":")[0]))
    return found


def _address(text: str) -> str:
    """Return an address from the kernel's words of four bytes, each in the machine's order."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_run_was_logged_with_the_password(ran: Ran) -> None:
    assert ran.exit_code == 0, ran.stderr
    expected = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    assert f"Basic {expected}" in ran.authorizations
    assert any("/runs/log-batch" in body and '"metrics"' in body for body in ran.sent)
    assert any("tracking.uri" in body for body in ran.sent)


@pytest.mark.parametrize("secret", SECRETS)
def test_no_secret_is_said_or_sent(ran: Ran, secret: str) -> None:
    assert secret not in ran.stdout
    assert secret not in ran.stderr
    assert [body for body in ran.sent if secret in body] == []


@pytest.mark.parametrize("secret", SECRETS)
def test_only_the_recipe_holds_a_secret_and_only_for_its_user(ran: Ran, secret: str) -> None:
    holding = [name for name, content in files_of(ran.folder).items() if secret.encode() in content]
    assert sorted(holding) == ["recipe.toml", "resolved.toml"]
    for name in holding:
        assert stat.S_IMODE((ran.folder / name).stat().st_mode) == 0o600


def test_no_process_has_a_secret_in_its_arguments(ran: Ran) -> None:
    assert len(ran.listened) >= 3
    assert not [title for title in ran.listened if any(secret in title for secret in SECRETS)]


def test_no_process_imports_what_lies_where_it_is_started(ran: Ran) -> None:
    assert (ran.folder.parent / "torch.py").exists()
    assert not (ran.folder.parent / "executed").exists()


def test_a_run_listens_to_its_own_machine_only(ran: Ran) -> None:
    listening = {title: found for title, found in ran.listened.items() if found}
    assert any("petractl.worker" in title for title in listening), ran.listened
    for title, found in listening.items():
        assert {each for each in found if not ipaddress.ip_address(each).is_loopback} == set(), title


@pytest.mark.parametrize("address", ["ftp://me:{}@host/x", "me:{}@host", "sqlite://me:{}@host"])
def test_an_address_that_is_refused_is_told_without_its_password(tmp_path: Path, address: str) -> None:
    (tmp_path / "recipe.toml").write_text('[model]\nname = "revnet18"\n[data]\n[method]\n')
    for key in ("tracking.uri={}", "tracking.url={}", "tracking={{ uri = '{}' }}", "tracking.uri=['{}']"):
        override = key.format(address.format(PASSWORD))
        done = CliRunner().invoke(app, ["run", str(tmp_path / "recipe.toml"), "--set", override])
        assert done.exit_code == 2, done.output
        if "://" in address:
            assert PASSWORD not in done.output, override


def test_a_recipe_that_is_no_toml_is_told_without_its_password(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(f'[tracking]\nuri = "https://me:{PASSWORD}@host\n')
    done = CliRunner().invoke(app, ["validate", str(tmp_path / "recipe.toml")])
    assert done.exit_code == 2
    assert "line 2" in done.output
    assert PASSWORD not in done.output


def test_the_command_line_is_kept_without_its_password() -> None:
    from petractl.tracking.environment import environment

    uri = f"https://me:{PASSWORD}@host/?token={TOKEN}"
    forms = (f"tracking.uri={uri}", f"tracking = {{ uri = '{uri}' }}", f'tracking.uri="{uri}"')
    for form in forms:
        kept = json.dumps(environment(arguments=["petractl", "run", "x", "--set", form]))
        assert not [secret for secret in SECRETS if secret in kept], form


@pytest.mark.parametrize("command", ["compare", "ls", "export", "eval"])
def test_what_is_read_later_tells_no_secret(ran: Ran, tmp_path: Path, command: str) -> None:
    shutil.copytree(ran.folder, tmp_path / "copy")
    arguments = {
        "compare": ["compare", str(ran.folder), str(tmp_path / "copy"), "--all-keys", "--json"],
        "ls": ["ls", "runs", "--directory", str(ran.folder.parent), "--json"],
        "export": ["export", str(ran.folder), "--out", str(tmp_path / "out.safetensors")],
        "eval": ["eval", str(ran.folder)],
    }[command]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert not [secret for secret in SECRETS if secret in done.output]
    if command == "export":
        content = (tmp_path / "out.safetensors").read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content]
