"""Tables that fit on narrow terminals."""

import sys

import pytest

from petractl.cli import columns
from petractl.cli.columns import figure, fit_columns

HEADER = ("name", "first", "second", "last")
ROWS = [("a" * 10, "1", "2", "a long last cell")]


def fit(
    monkeypatch: pytest.MonkeyPatch, width: int | None, **more: bool
) -> tuple[list[str], tuple[str, ...]]:
    monkeypatch.setattr(columns, "_terminal_width", lambda: width)
    header, rows, left_out = fit_columns(HEADER, ROWS, spare=("second", "first"), **more)
    assert [len(header)] == [len(row) for row in rows]
    return header, left_out


def test_what_fits_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(monkeypatch, 80) == (list(HEADER), ())
    assert fit(monkeypatch, None) == (list(HEADER), ())


def test_the_least_important_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(monkeypatch, 40) == (["name", "first", "last"], ("second",))
    assert fit(monkeypatch, 30) == (["name", "last"], ("second", "first"))
    assert fit(monkeypatch, 5) == (["name", "last"], ("second", "first"))


def test_a_last_column_below_the_row_needs_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(monkeypatch, 30, last_below=True) == (list(HEADER), ())


def test_off_a_terminal_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "5")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert fit_columns(HEADER, ROWS, spare=("first",))[2] == ()


def test_figures() -> None:
    assert [figure(value) for value in (205_512.3, 1000, 12.5, 0.01526, 0)] == [
        "205,512",
        "1,000",
        "12.5",
        "0.01526",
        "0",
    ]
