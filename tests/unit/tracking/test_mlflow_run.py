import hashlib
import sqlite3
import threading

import pytest

from petractl.tracking import mlflow_run
from petractl.tracking.mlflow_run import create_sqlite_store, run_identity, sqlite_path


def test_sqlite_path():
    assert str(sqlite_path("sqlite:////a b/c%d.db")) == "/a b/c%d.db"
    assert str(sqlite_path("sqlite:///x.db")) == "x.db"
    assert sqlite_path("sqlite:///") is None
    assert sqlite_path("http://host/sqlite:///x") is None


def test_a_store_appears_complete_or_not_at_all(tmp_path, monkeypatch):
    """Several runs that create one store at once: one wins, none fails, nothing is left over."""
    import mlflow

    class Client:
        """Makes a database in two steps, with time in between for others to look."""

        def __init__(self, tracking_uri):
            self.path = sqlite_path(tracking_uri)

        def search_experiments(self, **_):
            with sqlite3.connect(self.path) as connection:
                connection.execute("create table a (x)")
                assert not store.exists()
                ready.wait(timeout=10.0)
                connection.execute("create table b (x)")

    store = tmp_path / "runs" / "mlflow.db"
    ready = threading.Barrier(2)
    monkeypatch.setattr(mlflow, "MlflowClient", Client)
    threads = [threading.Thread(target=create_sqlite_store, args=(f"sqlite:///{store}",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with sqlite3.connect(store) as connection:
        assert {name for (name,) in connection.execute("select name from sqlite_master")} == {"a", "b"}
    assert [path.name for path in store.parent.iterdir()] == ["mlflow.db"]
    create_sqlite_store(f"sqlite:///{store}")  # it is there: nothing to do
    create_sqlite_store("http://127.0.0.1:1")


def test_a_store_for_which_there_is_no_room_leaves_nothing_behind(tmp_path, monkeypatch):
    import mlflow

    class Client:
        def __init__(self, tracking_uri):
            pass

        def search_experiments(self, **_):
            pass

    def half(source, target):
        target.write_bytes(b"x" * 100)
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(mlflow, "MlflowClient", Client)
    monkeypatch.setattr(mlflow_run, "_copy_database", half)
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError):
            create_sqlite_store(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_store_appears_also_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(mlflow_run.os, "link", refuse)
    for content in (b"new", b"newer"):
        (tmp_path / "complete").write_bytes(content)
        mlflow_run._put_in_place(tmp_path / "complete", tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").read_bytes() == b"new"


def test_a_run_is_known_by_the_first_line_of_its_journal(tmp_path):
    assert run_identity(tmp_path) == ""
    journal = tmp_path / "metrics.jsonl"
    journal.write_bytes(b'{"event":"run_st')
    assert run_identity(tmp_path) == ""
    for rest in (b"", b"more\n"):
        journal.write_bytes(b"first\n" + rest)
        assert run_identity(tmp_path) == hashlib.sha256(b"first\n").hexdigest()[:32]
