import getpass
import json
import os
import socket
import subprocess

from petractl import __version__
from petractl.tracking.environment import environment


def test_environment_tells_machine_and_versions_as_json():
    facts = json.loads(json.dumps(environment(arguments=["petractl", "run", "x"])))
    assert facts["petractl"] == __version__
    assert facts["cpu"]["cores"] == os.cpu_count()
    assert facts["memory_bytes"] > 2**28
    assert facts["torch"]["threads"] >= 1
    assert facts["packages"]["torch"]
    assert facts["command"] == ["petractl", "run", "x"]


def test_environment_holds_nothing_private(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_TOKEN", "a-value-that-must-not-be-told")
    given = ["petractl", "run", "x", "--set", "tracking.uri=https://bob:hunter2@host/", "--token", "hunter3"]
    text = json.dumps(environment(arguments=given, directory=tmp_path))
    for private in ("a-value-that-must-not-be-told", "SOME_TOKEN", "hunter2", "hunter3", "bob"):
        assert private not in text
    host, user = socket.gethostname(), getpass.getuser()
    assert f'"{host}"' not in text
    assert f'"{user}"' not in text


def git(directory, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(directory), *identity, *arguments], check=True, capture_output=True)


def test_the_commit_of_the_directory_is_told_and_whether_files_changed(tmp_path):
    assert environment(arguments=[], directory=tmp_path)["git"] is None
    git(tmp_path, "init")
    assert environment(arguments=[], directory=tmp_path)["git"] is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    told = environment(arguments=[], directory=tmp_path)["git"]
    assert len(told["commit"]) == 40
    assert told["changed"] is False
    (tmp_path / "a").write_text("2")
    assert environment(arguments=[], directory=tmp_path)["git"] == {**told, "changed": True}


def test_git_that_is_missing_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(arguments=[], directory=tmp_path)["git"] is None
