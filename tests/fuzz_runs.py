"""Runs to be damaged: small ones, trained once, copied for every case; and damage to what they hold."""

import atexit
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from fuzz_calls import call, sets
from fuzz_mutations import WILD_VALUES, damaged, injure_file
from hypothesis import strategies as st

from petractl.checkpoint import checkpoint_paths
from petractl.events import StageCounted, StageMeasured, as_record

EPOCHS = 3
TINY = (
    "model.name=revnet-iso",
    "model.depth=2",
    "model.width=2",
    "data.name=fake",
    "data.fake_samples=16",
    "data.image_size=8",
    "data.batch_size=8",
    "data.workers=0",
    "engine.mode=in-process",
    "training.warmup_epochs=0",
    "tracking.mlflow=false",
)
OF_TWO_PROCESSES = ("engine.mode=processes", "engine.threads=1", "partition.stages=2")
# What a damaged resolved.toml might otherwise make large: the call itself would still be right.
PINNED = ("data.workers=0", "engine.mode=in-process", "engine.threads=1", "tracking.mlflow=false")


@dataclass(frozen=True, slots=True)
class Template:
    """A run that was killed in the middle of its last epoch, and the checksums of what it can export."""

    folder: Path
    weights: frozenset[str]  # of the checkpoints that are there
    final: str  # of the run if it goes on to its end

    def copy(self, place: Path) -> Path:
        """Copy the run to a place that is empty but for its name."""
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.folder, place, symlinks=True)
        return place

    def intact(self, copy: Path) -> list[str]:
        """Return the checkpoints of a copy that are as they were, oldest first."""
        return [p.name for p in self.checkpoints() if _content(p) == _content(copy / "checkpoints" / p.name)]

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        return checkpoint_paths(self.folder / "checkpoints")


def _content(folder: Path) -> dict[str, bytes]:
    if folder.is_symlink() or not folder.is_dir():
        return {}
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()}


def train(folder: Path, *overrides: str) -> Path:
    """Train a small run."""
    given = (*TINY, f"training.epochs={EPOCHS}", "run.keep_last=9", *overrides)
    ended = call("run", "digits_revnet18", "--dir", str(folder), *sets(*given))
    assert ended.code == 0, ended.err
    return folder


def _place() -> Path:
    """Make a folder that goes with the process."""
    place = Path(mkdtemp(prefix="petractl-fuzz-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


@cache
def killed_run(*overrides: str) -> Template:
    """Train the run that is damaged; once per process of the tests."""
    place = _place()
    every = ("run.checkpoint_every=2 updates", "data.fake_samples=24")
    folder = train(place / "run", *every, *overrides)
    final = exported(folder)
    checkpoints = folder / "checkpoints"
    shutil.rmtree(checkpoints / f"epoch-{EPOCHS:04d}")
    journal = folder / "metrics.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"run_finished"' not in line))
    assert any("microbatch" in path.name for path in checkpoints.iterdir())
    return Template(folder, frozenset(_weights(folder)), final)


def _weights(folder: Path) -> Iterator[str]:
    """Give what each of a run's checkpoints exports, as if it were the only one."""
    alone = folder.parent / "alone"
    for path in (folder / "checkpoints").iterdir():
        shutil.copytree(folder, alone, ignore=shutil.ignore_patterns("epoch-*"))
        shutil.copytree(path, alone / "checkpoints" / path.name)
        yield exported(alone)
        shutil.rmtree(alone)


@cache
def finished_run() -> Path:
    """Train the run whose journal is damaged; it tells of its stages what runs in processes tell."""
    folder = train(_place() / "run")
    journal = folder / "metrics.jsonl"
    lines = []
    for line in journal.read_text().splitlines():
        lines.append(line)
        record = json.loads(line)
        if record["event"] == StageCounted.name:
            lines.append(
                json.dumps(as_record(_measured(record["epoch"], record["stage"]), time=record["time"]))
            )
    journal.write_text("\n".join(lines) + "\n")
    return folder


def _measured(epoch: int, stage: int) -> StageMeasured:
    return StageMeasured(
        epoch=epoch,
        stage=stage,
        replica=0,
        rank=stage,
        seconds=0.02,
        compute_percent=80.0,
        wait_forward_percent=10.0,
        wait_backward_percent=10.0,
        idle_percent=20.0,
        bytes_sent_forward=1024,
        bytes_sent_backward=1024,
        staleness_updates=2.0,
    )


def exported(folder: Path) -> str:
    """Return the checksum of a run's exported weights."""
    out = folder.parent / "exported.safetensors"
    ended = call("export", str(folder), "--out", str(out))
    assert ended.code == 0, ended.err
    return hashlib.sha256(out.read_bytes()).hexdigest()


def injure_run(draw: st.DrawFn, folder: Path, *, only: str = "") -> list[str]:
    """Damage one or two files of a run, or lose a whole folder of it; return what was damaged."""
    told = []
    for _ in range(draw(st.integers(1, 2))):
        paths = sorted(path for path in folder.rglob("*") if str(path.relative_to(folder)).startswith(only))
        files = [path for path in paths if path.is_file() and not path.is_symlink()]
        folders = [path for path in paths if path.is_dir()]
        if folders and draw(st.integers(0, 9)) == 0:
            path = draw(st.sampled_from(folders))
            shutil.rmtree(path)
            if draw(st.booleans()):
                path.touch()
        elif files:
            path = draw(st.sampled_from(files))
            injure_file(draw, path)
        else:
            break
        told.append(str(path.relative_to(folder)))
    return told


@st.composite
def damaged_journals(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a journal with bytes or with values damaged."""
    if draw(st.booleans()):
        return draw(damaged(content))
    records = [json.loads(line) for line in content.splitlines()]
    for _ in range(draw(st.integers(1, 4))):
        number = draw(st.integers(0, len(records) - 1))
        _injure_record(draw, records, number)
        if not records:
            return b""
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _injure_record(draw: st.DrawFn, records: list[Any], number: int) -> None:
    kind = draw(st.sampled_from(("value",) * 5 + ("inside", "key", "drop", "double", "move", "other")))
    record = records[number]
    if kind == "drop":
        del records[number]
    elif kind == "double":
        records.insert(draw(st.integers(0, len(records))), record)
    elif kind == "move":
        records.insert(draw(st.integers(0, len(records) - 1)), records.pop(number))
    elif kind == "other" or not isinstance(record, dict) or not record:
        records[number] = draw(WILD_VALUES)
    elif kind == "key":
        del record[draw(st.sampled_from(sorted(record)))]
    elif kind == "inside":
        _injure_inside(draw, record)
    else:
        record[draw(st.sampled_from(sorted(record)))] = draw(WILD_VALUES)


def _injure_inside(draw: st.DrawFn, record: dict[str, Any]) -> None:
    """Damage a record in a list of a record, such as a stage of a plan."""
    lists = [value for value in record.values() if isinstance(value, list) and value]
    if lists:
        rows = draw(st.sampled_from(lists))
        _injure_record(draw, rows, draw(st.integers(0, len(rows) - 1)))
