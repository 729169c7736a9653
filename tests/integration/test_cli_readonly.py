"""The command line where it trains nothing: help, show, ls, validate, and how every command ends."""

import json
import os
import pty
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tomli
from typer.testing import CliRunner, Result

import petractl
from petractl.cli.app import COMMANDS, GROUPS, app
from petractl.errors import RunError, UserError

PYTHON = [sys.executable, "-m", "petractl"]
SMALL = '[model]\nname = "revnet18"\n[data]\n[method]\n'


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    return subprocess.run([*PYTHON, *arguments], capture_output=True, text=True, env=environment, check=False)


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """Run petractl on a terminal of its own; return all that it writes there."""
    reader, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment}
    child = subprocess.Popen([*PYTHON, *arguments], stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    written = b""
    while True:
        try:
            chunk = os.read(reader, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not chunk:
            break
        written += chunk
    child.wait()
    os.close(reader)
    return written.decode().replace("\r\n", "\n")


@pytest.fixture
def small(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(SMALL)
    return "small.toml"


@pytest.fixture
def launch(monkeypatch) -> ModuleType:
    """A stand-in for the module that runs things."""
    module = ModuleType("petractl.launch")
    monkeypatch.setitem(sys.modules, "petractl.launch", module)
    monkeypatch.setattr(petractl, "launch", module, raising=False)
    return module


@pytest.fixture
def results(monkeypatch) -> ModuleType:
    """A stand-in for the module that runs things."""
    module = ModuleType("petractl.results")
    monkeypatch.setitem(sys.modules, "petractl.results", module)
    monkeypatch.setattr(petractl, "results", module, raising=False)
    return module


# Help


def test_help_lists_every_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for command in (*COMMANDS, *GROUPS):
        assert f"  {command.name} " in result.stdout
    assert "..." not in result.stdout.partition("Commands:")[2], "a summary is cut off"


@pytest.mark.parametrize("command", [command.name for command in (*COMMANDS, *GROUPS)])
def test_every_command_explains_itself(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"Usage: petractl {command}" in call(command, "--help").stdout.replace("root", "petractl")


def test_help_is_instant() -> None:
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time, not the clock's: what it takes on a machine that does nothing else.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3, seconds


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom petractl.cli.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'pydantic', 'numpy', 'mlflow', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_is_plain_text_off_a_terminal_and_drawn_on_one() -> None:
    plain, drawn = process("--help").stdout, on_a_terminal("--help")
    assert plain.isascii()
    assert "\033[" not in plain
    assert "\033[" in drawn
    assert "Train" in drawn


def test_version() -> None:
    assert call("--version").stdout == f"petractl {petractl.__version__}\n"


# How commands end


@pytest.mark.parametrize(
    "arguments",
    [["runn"], ["run"], ["run", "x", "--nonsense"], ["ls", "things"], ["export", "x"], ["show", "--set"]],
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert "Error: " in result.stderr


def raises(error: BaseException):
    def body(*_: object, **__: object) -> None:
        raise error

    return body


def test_a_failed_run_ends_with_1(launch) -> None:
    launch.run = raises(RunError("the loss is not a number", where="stage 3", hint="lower optimizer.lr"))
    result = call("run", "x")
    assert result.exit_code == 1
    assert result.stderr == "error: stage 3: the loss is not a number\nhint: lower optimizer.lr\n"


def test_a_user_error_ends_with_2(launch) -> None:
    launch.resume = raises(UserError("no run here", where="x"))
    result = call("resume", "x")
    assert (result.exit_code, result.stderr) == (2, "error: x: no run here\n")


def test_the_exit_code_of_a_run_is_passed_on(launch) -> None:
    for code in (0, 1, 130):
        launch.run = lambda recipe, *, directory, overrides, trace, goes_on, code=code: code
        assert call("run", "x").exit_code == code


def test_an_interrupt_ends_with_130(launch) -> None:
    launch.run = raises(KeyboardInterrupt())
    result = call("run", "x")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_a_bug_of_ours_keeps_its_traceback() -> None:
    code = (
        "import sys, types, petractl\n"
        "petractl.launch = types.SimpleNamespace(run=lambda *a, **k: 1 / 0)\n"
        "from petractl.cli.app import main\n"
        "sys.argv = ['petractl', 'run', 'x']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    child = subprocess.Popen(
        [*PYTHON, "show", "digits_revnet18"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    child.wait()
    assert child.stderr.read() == b""
    assert child.returncode == 141
    child.stderr.close()


def test_errors_are_coloured_on_a_terminal_only() -> None:
    assert process("show", "zzz").stderr.startswith("error: zzz: no such recipe\nhint: ")
    assert "\033[1;31merror:\033[0m zzz" in on_a_terminal("show", "zzz")
    assert on_a_terminal("show", "zzz", NO_COLOR="1").startswith("error: zzz: no such recipe\nhint: ")


# What run, resume, eval and export hand on


def test_run_and_resume_hand_on_what_they_are_given(launch) -> None:
    seen: list[object] = []

    def run(recipe, *, directory, overrides, trace, goes_on) -> int:
        seen.append((recipe, directory, overrides, trace, goes_on))
        return 0

    launch.run = run
    launch.resume = lambda run, *, overrides: seen.append((run, overrides)) or 0
    call("run", "digits", "--dir", "out", "--set", "run.seed=1", "--set", "model.width=8")
    call("run", "digits", "--trace")
    call("run", "digits", "--resume", "auto")
    call("resume", "runs/x", "--set", "training.epochs=9")
    assert seen == [
        ("digits", Path("out"), ["run.seed=1", "model.width=8"], False, False),
        ("digits", None, [], True, False),
        ("digits", None, [], False, True),
        (Path("runs/x"), ["training.epochs=9"]),
    ]


def test_eval_writes_a_table_or_json(results) -> None:
    results.evaluate = lambda run, *, best, warn: {
        "loss": 0.25,
        "top1": 97.5,
        "top5": 100.0,
        "samples": 1360,
        "best": best,
    }
    assert call("eval", "x").stdout == "loss\ttop-1\ttop-5\tsamples\n0.2500\t97.50 %\t100.00 %\t1,360\n"
    assert json.loads(call("eval", "x", "--best", "--json").stdout) == {
        "loss": 0.25,
        "top1": 97.5,
        "top5": 100.0,
        "samples": 1360,
    }


def test_export_says_what_it_wrote(results) -> None:
    facts = {"path": "w.safetensors", "tensors": 60, "parameters": 1234, "bytes": 5678, "sha256": "ab12"}
    results.export = lambda run, *, out, best, warn: facts
    result = call("export", "x", "--out", "w.safetensors")
    assert result.stdout == "w.safetensors: 60 tensors, 1,234 parameters, 5,678 bytes\nsha256 ab12\n"


# show


def test_show_writes_a_recipe_that_can_be_shown_again(small) -> None:
    first = call("show", small, "--set", "training.epochs=3")
    assert first.exit_code == 0
    assert first.stderr == ""
    Path("shown.toml").write_text(first.stdout)
    assert call("show", "shown.toml").stdout == first.stdout
    assert tomli.loads(first.stdout)["training"]["epochs"] == 3


def test_show_without_comments(small) -> None:
    plain, full = call("show", small, "--no-comments").stdout, call("show", small).stdout
    assert "#" not in plain
    assert tomli.loads(plain) == tomli.loads(full)


def test_show_warns_on_stderr_about_what_does_nothing(small) -> None:
    result = call("show", small, "--set", "optimizer.betas=[0.9, 0.99]")
    assert result.exit_code == 0
    assert result.stderr == (
        'warning: optimizer.betas: has no effect with optimizer.name = "sgd"\nhint: it is for "adamw"\n'
    )
    assert tomli.loads(result.stdout)["optimizer"]["betas"] == [0.9, 0.99]


# ls


def test_ls_lists_the_recipes() -> None:
    lines = call("ls").stdout.splitlines()
    assert lines[0] == "name\twhat"
    assert "digits_revnet18\tRevNet-18 by PETRA on scikit-learn's 1,797 handwritten digits" in lines
    assert call("ls", "recipes").stdout.splitlines() == lines


def test_ls_methods_shows_the_table_of_what_is_kept() -> None:
    rows = [line.split("\t") for line in call("ls", "methods").stdout.splitlines()]
    assert rows[0] == ["name", "keep", "keeps inputs", "keeps parameters", "schedule", "what"]
    assert [row[:5] for row in rows[1:]] == [
        ["petra", "-", "no", "no", "tight"],
        ["delayed", "graph", "graph", "yes", "tight"],
        ["delayed", "inputs+parameters", "yes", "yes", "tight"],
        ["delayed", "inputs", "yes", "no", "tight"],
        ["delayed", "parameters", "no", "yes", "tight"],
        ["reversible", "-", "no", "no", "sequential"],
        ["backprop", "-", "graph", "yes", "sequential"],
        ["local", "-", "graph", "no", "sequential"],
        ["forward-gradient", "-", "graph", "yes", "sequential"],
    ]


@pytest.mark.parametrize(
    ("what", "name"), [("models", "revnet50"), ("datasets", "digits"), ("methods", "petra")]
)
def test_ls_is_json_for_programs(what: str, name: str) -> None:
    rows = json.loads(call("ls", what, "--json").stdout)
    assert name in [row["name"] for row in rows]
    assert all(row["what"] for row in rows)
    assert len(call("ls", what).stdout.splitlines()) == len(rows) + 1


def test_ls_draws_its_table_on_a_terminal() -> None:
    wide, narrow = (on_a_terminal("ls", "methods", COLUMNS=columns) for columns in ("160", "80"))
    for text in (wide, narrow):
        assert "\t" not in text
        assert "delayed           inputs+parameters  yes           yes               tight" in text
        assert "PipeDream's weight stashing" in text
    assert max(map(len, narrow.splitlines())) <= 100
    assert set(re.findall(r"\033\[([\d;]*)m", on_a_terminal("ls", "methods", NO_COLOR="1"))) <= {
        "0",
        "1",
        "2",
    }


def journal(folder: Path, *records: dict[str, object], tail: str = "") -> None:
    folder.mkdir(parents=True)
    folder.joinpath("metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records) + tail
    )


def test_ls_runs_tells_how_far_each_run_is(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    start = {"event": "run_started", "recipe_name": "digits_revnet18", "method": "petra"}
    plan = {"event": "plan_made", "epochs": 3}
    epochs = [
        {"event": "epoch_trained", "epoch": 1},
        {"event": "evaluated", "epoch": 1, "top1": 91.123},
        {"event": "epoch_trained", "epoch": 2},
        {"event": "evaluated", "epoch": 2, "top1": 90.0},
    ]
    journal(Path("runs/1-done"), start, plan, *epochs, {"event": "run_finished"})
    journal(Path("runs/2-killed"), start, plan, *epochs[:2], tail='{"event": "epoch_tra')
    journal(Path("runs/3-stopped"), start, plan, epochs[0], {"event": "run_interrupted"})
    journal(Path("runs/4-again"), start, plan, epochs[0], {"event": "run_interrupted"}, start, plan)
    journal(Path("runs/5-failed"), start, {"event": "run_failed"}, tail="[1]\nnull\n")
    Path("runs/6-new").mkdir()
    Path("runs/6-new/resolved.toml").touch()
    Path("runs/plots").mkdir()
    result = call("ls", "runs")
    assert [line.split("\t") for line in result.stdout.splitlines()] == [
        ["name", "recipe", "method", "epochs done", "epochs", "best top1", "status"],
        ["1-done", "digits_revnet18", "petra", "2", "3", "91.12", "finished"],
        ["2-killed", "digits_revnet18", "petra", "1", "3", "91.12", "unfinished"],
        ["3-stopped", "digits_revnet18", "petra", "1", "3", "-", "interrupted"],
        ["4-again", "digits_revnet18", "petra", "1", "3", "-", "unfinished"],
        ["5-failed", "digits_revnet18", "petra", "0", "-", "-", "failed"],
        ["6-new", "-", "-", "0", "-", "-", "not started"],
    ]
    assert call("ls", "runs", "--directory", str(tmp_path / "runs")).stdout == result.stdout


def test_ls_runs_without_a_folder_says_where_it_looked(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("ls", "runs")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: runs: no such folder\nhint: ")


# validate


def test_validate_says_ok_once_per_recipe(small) -> None:
    result = call("validate", small, "digits_revnet18")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["ok small.toml", "ok digits_revnet18"]
    assert all(line.partition(": ")[2] for line in lines)


def test_validate_checks_the_others_after_a_broken_one(small) -> None:
    Path("broken.toml").write_text("[model]")
    result = call("validate", "broken.toml", small)
    assert result.exit_code == 2
    assert result.stdout.startswith("ok small.toml: ")
    assert result.stderr.startswith("error: broken.toml: 3 problems")


def test_validate_warns_and_passes(small) -> None:
    result = call("validate", small, "--set", "model.depth=3")
    assert result.exit_code == 0
    assert "warning: model.depth: has no effect" in result.stderr
    assert result.stdout.startswith("ok ")
