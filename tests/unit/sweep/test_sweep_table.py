import csv
import io
import json
from pathlib import Path

import pytest

from petractl.sweep.grid import parse_grid
from petractl.sweep.plot import plot_sweep
from petractl.sweep.table import Row, Run, as_csv, as_document, as_markdown, cells_of, headings, write_table

KEYS = ("method.name", "optimizer.lr")


def run(seed: int = 0, *, state: str = "finished", top1: float | None = 90.0, **rest) -> Run:
    facts = {"best_top1": 95.0, "images_per_s": 1234.5, "peak_memory_bytes": 2**20 * (seed + 1)}
    return Run(f"c,seed={seed}", f"d/c{seed}", seed, state, top1=top1, **{**facts, **rest})


def row(*runs: Run, why: str = "", **rest) -> Row:
    return Row("method=petra", {"method.name": "petra", "optimizer.lr": "0.1"}, runs, why, **rest)


def test_seeds_are_one_row() -> None:
    found = cells_of(row(run(0, top1=90.0), run(1, top1=92.0), run(2, top1=94.0)), KEYS)
    assert headings(KEYS) == ["method", "lr", "top-1, %", "best, %", "images/s", "memory", "state"]
    assert found == ["petra", "0.1", "92.00 ± 2.00 (3)", "95.00 ± 0.00", "1,234", "3 MiB", "finished"]


def test_a_run_that_has_diverged_is_told() -> None:
    assert row(run(diverged=True)).state == "finished, diverged"
    assert row(run(0), run(1, diverged=True), run(2)).state == "finished, 1 diverged"


def test_only_finished_runs_count() -> None:
    failed = run(1, state="failed", top1=10.0, failure="boom")
    found = cells_of(row(run(0), failed, run(2, state="running", top1=50.0)), KEYS)
    assert found[2] == "90.00"
    assert found[-1] == "1 finished, 1 running, 1 failed; boom"


@pytest.mark.parametrize(
    ("runs", "why", "state"),
    [
        ((run(state="failed", failure="boom"),), "", "failed: boom"),
        ((run(state="running", epochs_done=2, epochs=5),), "", "running, 2 of 5 epochs done"),
        ((run(state="interrupted", epochs_done=0, epochs=5),), "", "interrupted, 0 of 5 epochs done"),
        ((run(state="not started"),), "", "not started"),
        ((), "a.b: is wrong", "not allowed: a.b: is wrong"),
    ],
)
def test_a_row_says_how_it_stands(runs: tuple[Run, ...], why: str, state: str) -> None:
    found = row(*runs, why=why)
    assert found.state == state
    assert cells_of(found, KEYS)[2:6] == ["-"] * 4


def test_what_is_unknown_is_left_out() -> None:
    found = row(
        run(top1=None, best_top1=None, images_per_s=None, peak_memory_bytes=None), run(1, top1=float("nan"))
    )
    assert found.mean("top1") is None
    assert found.std("top1") is None
    assert found.peak_memory_bytes == 2 * 2**20


def test_csv_has_every_number() -> None:
    rows = [row(run(0, top1=90.0), run(1, top1=91.0)), row(why="it says: a, b")]
    first, second = csv.DictReader(io.StringIO(as_csv(rows, KEYS)))
    assert (first["method.name"], first["runs"], first["finished"]) == ("petra", "2", "2")
    assert (float(first["top1_mean"]), float(first["top1_std"])) == (90.5, pytest.approx(0.707107))
    assert first["peak_memory_bytes"] == str(2 * 2**20)
    assert second["top1_mean"] == second["images_per_s"] == ""
    assert second["state"] == "not allowed: it says: a, b"


def test_markdown_keeps_its_columns() -> None:
    text = as_markdown([row(why="a | b\nc")], KEYS, title="Sweep of x")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert text.startswith("# Sweep of x\n")
    assert lines[2].endswith("| not allowed: a \\| b c |")
    assert {line.replace("\\|", "").count("|") for line in lines} == {8}


def test_the_files_are_written(tmp_path: Path) -> None:
    rows = [row(run())]
    write_table(rows, KEYS, tmp_path, facts={"recipe": "x", "status": "running"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.csv", "sweep.json", "sweep.md"]
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert document == json.loads(json.dumps(as_document(rows, facts={"recipe": "x", "status": "running"})))
    assert document["rows"][0]["runs"][0]["top1"] == 90.0
    assert document["rows"][0]["top1_std"] is None


@pytest.mark.parametrize(
    ("grids", "cells"),
    [
        (["method.name=petra,backprop", "optimizer.lr=0.1,0.2,0.3"], ["method.name=reversible"]),
        (["method.name=petra,backprop", "model.name+model.width=revnet18+4,resnet18+5"], []),
        (["optimizer.lr=0.1,0.2"], ["method.name=backprop"]),
        (["optimizer.lr=0.1,0.2", "method.name=petra,backprop", "model.width=4,5"], []),
        ([], ["method.name=backprop"]),
    ],
)
def test_the_picture_is_drawn_whatever_is_there(tmp_path: Path, grids: list[str], cells: list[str]) -> None:
    grid = parse_grid(grids, cells=cells, seeds="0,1")
    first_extra = len(grid.settings) - grid.num_extra
    kinds = [row(run(0), run(1, top1=94.0)), row(why="no"), row(run(state="failed", failure="x")), row(run())]
    for used in (kinds, [row()], [row(run())]):
        rows = [
            Row(f"n{n}", {}, used[n % len(used)].runs, used[n % len(used)].why, is_extra=n >= first_extra)
            for n in range(len(grid.settings))
        ]
        plot_sweep(rows, grid, tmp_path / "sweep.png", title="t", subtitle="s")
        assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.png"]
