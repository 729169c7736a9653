"""What a broken tracking server costs a run, and what `petractl sync` brings afterwards.

    python benchmarks/trackers/bench_trackers.py --rounds 5 --work W     measure; may be called again for more
    python benchmarks/trackers/bench_trackers.py --sync --work W         send what is missing; write the table

A round trains once with each fault and once without MLflow, in an order that changes from round to round.
Each run is `petractl run` in a process of its own, forked where everything is imported already. Speeds
are of the epochs after the first; each is compared with the median of the run without MLflow of its round.
`--through CMD` has rounds run by another command, such as `taskset` or `nice`, two at a time.
"""

import argparse
import json
import os
import shlex
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from faulty_server import HOST, MlflowServer, Proxy, fill_disk, free_disk, kill

from petractl.events import WarningRaised
from petractl.tracking.journal import read_journal
from petractl.tracking.mlflow_metrics import metric_points

NONE, KILLED = "without MLflow", "killed in the middle"
ROUNDS_PER_CALL = 2
LOADING = 3  # epochs after the first in which MLflow is still being imported
STORE, VICTIM = "store", "store-of-the-killed"
WORDS = {
    "absent": "absent from the start",
    "slow": "30 s for each request",
    "errors": "every answer a 500",
    "full": "its disk full",
    KILLED: KILLED,
}
OVERRIDES = (
    "engine.mode=in-process",
    "engine.threads=1",
    "data.steps_per_epoch=12",
    "run.checkpoint_every=1000 epochs",
    "training.evaluate_every=1000",
    "training.warmup_epochs=0",
)


def main() -> None:
    """Measure, or send and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--through", default="")
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--servers", type=json.loads, help=argparse.SUPPRESS)  # a round's own process
    options = parser.parse_args()
    work = options.work.absolute()
    if options.servers:
        store, *victims = options.servers
        for victim in victims:
            measure_round(work, {STORE: store, VICTIM: victim}, options.epochs)
        return
    server = MlflowServer(work / STORE, _free_port())
    victims = [MlflowServer(work / f"{VICTIM}-{n}", _free_port()) for n in range(ROUNDS_PER_CALL)]
    try:
        for _ in range(0, options.rounds, ROUNDS_PER_CALL):
            for victim in victims:
                victim.restart()
            servers = [[one.pid, one.port] for one in (server, *victims)]
            command = [*shlex.split(options.through), sys.executable, __file__, "--work", str(work)]
            command += ["--epochs", str(options.epochs), "--servers", json.dumps(servers)]
            subprocess.run(command, check=True)
        if options.sync:
            for victim in victims:
                victim.restart()
            write_table(work, server, victims)
    finally:
        for one in (server, *victims):
            one.kill()


def measure_round(work: Path, servers: dict[str, list[int]], epochs: int) -> None:
    """Train once in every way; add what was measured to `rounds.jsonl`."""
    path = work / "rounds.jsonl"
    number = len(path.read_text().splitlines()) if path.exists() else 0
    ways = [NONE, *WORDS]
    shift = number % len(ways)
    rows = {
        way: measure(way, run_folder(work, number, way), servers, epochs)
        for way in [*ways[shift:], *ways[:shift]]
    }
    with path.open("a") as file:
        file.write(json.dumps(rows) + "\n")


def run_folder(work: Path, number: int, way: str) -> Path:
    """Return the folder of one run."""
    return work / "runs" / f"{number}-{way.split()[0]}"


def measure(way: str, folder: Path, servers: dict[str, list[int]], epochs: int) -> dict[str, Any]:
    """Return images/s, the seconds from the last event of training to the end, and the warnings."""
    pid, port = servers[VICTIM if way == KILLED else STORE]
    proxy = Proxy(port, fault=way if way in ("slow", "errors") else "")
    uri = f"http://{HOST}:{_free_port()}" if way == "absent" else proxy.uri
    if way == "full":
        fill_disk(pid)
    tracking = ["tracking.mlflow=false"] if way == NONE else [f"tracking.uri={uri}"]
    killer = threading.Thread(target=_kill_halfway, args=(pid, folder, epochs))
    child = _forked_run(folder, [*OVERRIDES, f"training.epochs={epochs}", *tracking])
    if way == KILLED:
        killer.start()
    _, status = os.waitpid(child, 0)
    ended = time.time()
    assert status == 0, (folder.with_suffix(".txt")).read_text()
    if way == KILLED:
        killer.join()
    if way == "full":
        free_disk(pid)
    records = read_journal(folder)
    (finished,) = [r for r in records if r["event"] == "run_finished"]
    return {
        "images_per_s": [float(str(r["images_per_s"])) for r in records if r["event"] == "epoch_trained"][1:],
        "end_s": ended - float(str(finished["time"])),
        "warnings": sum(record["event"] == WarningRaised.name for record in records),
    }


def _forked_run(folder: Path, overrides: list[str]) -> int:
    """Start `petractl run` in a process that need not import anything; return its id."""
    from petractl import launch

    folder.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    output = os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        code = launch.run("digits_revnet18", directory=folder, overrides=overrides)
    finally:
        os._exit(code)


def _kill_halfway(pid: int, folder: Path, epochs: int) -> None:
    journal = folder / "metrics.jsonl"
    while not journal.exists() or journal.read_text().count('"epoch_trained"') < epochs // 2:
        time.sleep(0.05)
    kill(pid)


def write_table(work: Path, server: MlflowServer, victims: list[MlflowServer]) -> None:
    """Sync every run twice, count what is missing before and after, and print the table."""
    rounds = [json.loads(line) for line in (work / "rounds.jsonl").read_text().splitlines()]
    print(f"{len(rounds)} rounds, {len(rounds[0][NONE]['images_per_s'])} epochs each\n")
    print("| server | images/s without | with | ratio, median (range) | from the start ", end="")
    print("| more warnings | end of the run ", end="")
    print("| values | missing before `sync` | after | sent by a second `sync` |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for way, words in WORDS.items():
        folders = [run_folder(work, number, way) for number in range(len(rounds))]
        stores = [victims[n % len(victims)] if way == KILLED else server for n in range(len(rounds))]
        before = sum(missing(folder, store) for folder, store in zip(folders, stores, strict=True))
        first, second = (
            [_sync(folder, store) for folder, store in zip(folders, stores, strict=True)] for _ in range(2)
        )
        after = sum(missing(folder, store) for folder, store in zip(folders, stores, strict=True))
        without = [speed for row in rounds for speed in row[NONE]["images_per_s"][LOADING:]]
        speeds = [speed for row in rounds for speed in row[way]["images_per_s"][LOADING:]]
        ratios: list[float] = []
        whole: list[float] = []
        for row in rounds:
            alone = statistics.median(row[NONE]["images_per_s"][LOADING:])
            ratios += [speed / alone for speed in row[way]["images_per_s"][LOADING:]]
            whole.append(_mean_speed(row[way]["images_per_s"]) / _mean_speed(row[NONE]["images_per_s"]))
        ends = [row[way]["end_s"] - row[NONE]["end_s"] for row in rounds]
        cells = (
            words,
            f"{statistics.median(without):,.0f}",
            f"{statistics.median(speeds):,.0f}",
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
            " and ".join(f"{ratio:.3f}" for ratio in whole),
            " or ".join(sorted({str(row[way]["warnings"] - row[NONE]["warnings"]) for row in rounds})),
            f"+{statistics.median(ends):.1f} s (at most {max(ends):.1f})",
            f"{sum(line['values'] for line in first):,}",
            f"{before:,}",
            f"{after:,}",
            f"{sum(line['sent'] for line in second):,}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def _mean_speed(speeds: list[float]) -> float:
    """Return the speed over epochs of one size."""
    return statistics.harmonic_mean(speeds)


def _sync(folder: Path, server: MlflowServer) -> dict[str, Any]:
    uri = f"http://{HOST}:{server.port}"
    command = [sys.executable, "-m", "petractl", "sync", str(folder), "--uri", uri, "--json"]
    (line,) = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return dict(line)


def missing(folder: Path, server: MlflowServer) -> int:
    """Return how many values of a run's journal its store does not hold, or holds more than once."""
    expected = {(p.key, p.step, p.time_ms, p.value) for r in read_journal(folder) for p in metric_points(r)}
    query = (
        "select m.key, m.step, m.timestamp, m.value from metrics m join tags t on t.run_uuid = m.run_uuid "
        "where t.key = 'petractl.run_dir' and t.value = ?"
    )
    with sqlite3.connect(server.folder / "mlflow.db") as database:
        rows = list(database.execute(query, (str(folder),)))
    return len(expected - set(rows)) + len(rows) - len(set(rows))


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


if __name__ == "__main__":
    main()
