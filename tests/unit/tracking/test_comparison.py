"""What differs between runs, and the words that tell them apart."""

from pathlib import Path

import pytest

from petractl.tracking.comparison import (
    Comparison,
    compare_runs,
    labels,
    masked,
    short_keys,
    short_texts,
    value_text,
)
from petractl.tracking.comparison_run import RunRecord

DEFAULTS = {"optimizer.lr": 0.1, "run.seed": 0, "partition.stages": "auto", "partition.cuts": ()}


def make_record(path: str, **keys: object) -> RunRecord:
    """A run with keys, "method__name" for "method.name"; None for a run of which none is known."""
    named = {key.replace("__", "."): value for key, value in keys.items()}
    return RunRecord(Path(path), "", "finished", named or None, {})


def compared(*runs: RunRecord, **more: bool) -> Comparison:
    return compare_runs(runs, defaults=DEFAULTS, **more)


def test_keys_differ_by_their_values() -> None:
    a = make_record("/r/a", method__name="petra", optimizer__lr=1, optimizer__betas=[0.9, 1.0])
    b = make_record("/r/b", method__name="backprop", optimizer__lr=1.0, optimizer__betas=(0.9, 1))
    found = compared(a, b)
    assert found.differing == {"method.name": ("petra", "backprop")}
    assert set(found.equal) == {"optimizer.lr", "optimizer.betas"}
    assert [run.name for run in found.runs] == ["a", "b"]


def test_true_is_not_one_and_a_key_that_one_run_lacks_differs() -> None:
    found = compared(make_record("a", x__a=True, x__b=1), make_record("b", x__a=1))
    assert found.differing == {"x.a": (True, 1), "x.b": (1, None)}


def test_a_run_without_keys_has_no_say() -> None:
    found = compared(make_record("a", x__a=1, x__b=1), make_record("b"), make_record("c", x__a=1, x__b=2))
    assert found.equal == {"x.a": 1}
    assert found.differing == {"x.b": (1, None, 2)}
    assert compared(make_record("a"), make_record("b")).equal == {}


def test_equal_keys_at_their_default() -> None:
    run = make_record("a", optimizer__lr=0.1, run__seed=3)
    assert compared(run, run).at_default == ("optimizer.lr",)


def test_where_runs_lie_is_no_difference_unless_asked() -> None:
    a = make_record("a", run__directory="runs", tracking__uri="", run__seed=0)
    b = make_record("b", run__directory="other", tracking__uri="sqlite:///x", run__seed=1)
    assert list(compared(a, b).differing) == ["run.seed"]
    assert list(compared(a, b, all_keys=True).differing) == ["run.directory", "tracking.uri", "run.seed"]


def test_cuts_and_lookahead_have_their_own_names() -> None:
    a = make_record("a", partition__stages="auto", partition__cuts=[2, 4], engine__lookahead=[2, 1, 0])
    b = make_record("b", partition__stages=1, partition__cuts=[], engine__lookahead=[])
    assert compared(a, b).differing == {"cuts": ([2, 4], []), "lookahead": ([2, 1, 0], [])}
    unplanned = make_record("c", partition__stages=5, partition__cuts=[], engine__lookahead=[])
    assert compared(b, unplanned).differing == {"cuts": ([], 5)}


def test_folders_of_one_name_are_told_apart_by_their_path() -> None:
    found = compared(*(make_record(f"/r/{path}") for path in ("x/1/a", "y/1/a", "b")))
    assert [run.name for run in found.runs] == ["x/1/a", "y/1/a", "b"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "?"),
        ("tight", "tight"),
        ("", '""'),
        ("a\tb\x1b[31m", '"a\\tb\\u001b[31m"'),
        ("http://me:secret@host", "http://***@host"),
        (True, "true"),
        (0.0005, "0.0005"),
        ((2, 1), "[2, 1]"),
        ({"pairs": 3, "kind": "a"}, "{pairs = 3, kind = a}"),
    ],
)
def test_values_as_text(value: object, text: str) -> None:
    assert value_text(value) == text


def test_short_texts_never_make_different_values_look_alike() -> None:
    assert short_texts("cuts", [[1, 2], [], "auto"]) == ["3 stages", "1 stage", "auto"]
    assert short_texts("cuts", [[1, 2], [1, 3]]) == ["[1, 2]", "[1, 3]"]
    long = "x" * 40
    assert short_texts("data.train", [long, "y"]) == ["x" * 21 + "...", "y"]
    assert short_texts("data.train", [f"{long}1", f"{long}2"]) == [f"...{'x' * 20}{n}" for n in (1, 2)]
    assert short_texts("data.train", [long, f"{long}x"]) == [long, f"{long}x"]


def test_short_keys_keep_their_section_where_they_must() -> None:
    keys = ["method.name", "data.classes", "model.classes", "training.epochs", "optimizer.lr"]
    assert list(short_keys(keys, taken=["epochs"]).values()) == [
        "method",
        "data.classes",
        "model.classes",
        "training.epochs",
        "lr",
    ]


def test_labels_tell_runs_apart() -> None:
    runs = [make_record(f"/r/{n}", method__name="petra", run__seed=n) for n in range(2)]
    assert labels(compared(*runs), room=80) == (["seed"], [["0"], ["1"]])
    twice = [make_record("/r/a", x__y=1), make_record("/r/b", x__y=1), make_record("/r/c", x__y=2)]
    assert labels(compared(*twice), room=80) == (["y", "run"], [["1", "a"], ["1", "b"], ["2", "c"]])
    assert labels(compared(*twice[:2]), room=80) == (["run"], [["a"], ["b"]])


def test_labels_leave_out_what_has_no_room() -> None:
    runs = [make_record(f"/r/{n}", a__x="v" * 10 + str(n), a__y="w" * 10 + str(n), a__z=n) for n in range(2)]
    header, rows = labels(compared(*runs), room=20)
    assert header == ["x", "z", "(and 1 more)"]
    assert rows[1] == ["v" * 10 + "1", "1", ""]


def test_masking() -> None:
    assert masked({"a": ["s3://key:secret@bucket", 1, None]}) == {"a": ["s3://***@bucket", 1, None]}
