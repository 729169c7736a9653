import json
from pathlib import Path

from petractl.planning.chrome_trace import write_trace
from petractl.planning.simulation import timeline
from petractl.planning.times import Span, StageTimes


def events(path: Path) -> list[dict[str, object]]:
    found = json.loads(path.read_text())["traceEvents"]
    assert isinstance(found, list)
    return found


def test_a_simulated_timeline(tmp_path: Path) -> None:
    spans = timeline("tight", [StageTimes(0.001, 0.002)] * 2, num_microbatches=3)
    path = tmp_path / "t.json"
    write_trace({"tight": spans}, path)
    found = events(path)
    names = [e["args"] for e in found if e["name"] in ("process_name", "thread_name")]
    assert names == [{"name": "tight"}, {"name": "stage 0"}, {"name": "stage 1"}]
    operations = [e for e in found if e["ph"] == "X" and e["name"] != "wait"]
    # Updates take no time and are left out.
    assert len(operations) == 3 * 2 + 3
    first = next(e for e in operations if e["name"] == "FB 0")
    assert first["ts"] == 1000
    assert first["dur"] == 3000
    assert first["tid"] == 1
    waits = [(e["tid"], e["args"]) for e in found if e["name"] == "wait"]
    assert waits[0] == (1, {"for": "forward", "before": "FB 0"})


def test_replicas_are_processes_of_their_own(tmp_path: Path) -> None:
    spans = [Span(0, r, "F", 0, 0.5 * r, 0.5 * r + 1.0, "other" if r else "", place=3) for r in (0, 1)]
    path = tmp_path / "t.json"
    write_trace({"run": spans, "more": spans[:1]}, path)
    found = events(path)
    assert [e["args"] for e in found if e["name"] == "process_name"] == [
        {"name": "run, replica 0"},
        {"name": "run, replica 1"},
        {"name": "more"},
    ]
    assert {e["tid"] for e in found if e["ph"] == "X"} == {3}
    assert [e["pid"] for e in found if e["name"] == "F 0"] == [0, 1, 2]
    (wait,) = (e for e in found if e["name"] == "wait")
    assert wait["dur"] == 500_000
