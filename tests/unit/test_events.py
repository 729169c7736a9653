import json
import logging
import subprocess
import sys
import threading

import pytest

from petractl import events
from petractl.events import (
    Event,
    EventBus,
    PlanMade,
    RunFailed,
    StageCounted,
    StagePlan,
    StepsDone,
    WarningRaised,
    as_record,
)


class Recorder:
    def __init__(self, log, label=""):
        self.log, self.label = log, label

    def handle(self, event, record):
        self.log.append((self.label, event, record))

    def close(self):
        self.log.append((self.label, "closed", None))


class Broken(Recorder):
    def handle(self, event, record):
        super().handle(event, record)
        raise RuntimeError("no space left")


def all_events():
    return [
        cls
        for cls in vars(events).values()
        if isinstance(cls, type) and issubclass(cls, Event) and cls is not Event
    ]


def test_every_event_has_its_own_name():
    names = [cls.name for cls in all_events()]
    assert len(names) == 18
    assert len(set(names)) == len(names)
    assert "event" not in names


def test_events_are_frozen_and_slotted():
    event = RunFailed("out of memory")
    with pytest.raises(AttributeError):
        event.message = "other"
    assert not hasattr(event, "__dict__")


def test_record_starts_with_the_common_keys_and_is_null_where_they_mean_nothing():
    record = as_record(StageCounted(2, 1, 10, 10, 10, 5, 0), time=12.5)
    assert list(record)[:5] == ["event", "time", "epoch", "update", "stage"]
    assert record["event"] == "stage_counted"
    assert (record["time"], record["epoch"], record["update"], record["stage"]) == (12.5, 2, None, 1)
    assert record["updates"] == 5
    assert as_record(RunFailed("x"), time=0.0)["epoch"] is None
    assert as_record(StepsDone(1, 2, 3, 0.5, 50.0, 9.0, 0.1, 7), time=0.0)["update"] == 7


def test_record_of_a_plan_is_json_with_a_list_of_stages():
    stage = StagePlan(0, "stem, block1", 2, 10, 1e6, "nothing", 1, 0.5)
    plan = PlanMade((stage,), 64, 2, 128, 10, 5, 3, 640, 64, 10, "tight", "petra", "float32", "cpu", 1)
    decoded = json.loads(json.dumps(as_record(plan, time=1.0)))
    assert decoded["stages"][0]["units"] == "stem, block1"
    assert decoded["stages"][0]["staleness_updates"] == 0.5


def test_what_came_later_has_a_default_that_means_one_process():
    """A plan and counts of a run in one process need none of the fields that came with several."""
    stage = StagePlan(0, "stem", 1, 10, 1e6, "nothing", 0, 0.0)
    plan = PlanMade((stage,), 64, 2, 128, 10, 5, 3, 640, 64, 10, "tight", "petra", "float32", "cpu", 1)
    assert (stage.device, plan.replicas, plan.processes, plan.backend) == ("", 1, 1, "")
    assert StageCounted(2, 1, 10, 10, 10, 5, 0).replica == 0


def test_no_event_field_hides_a_common_key():
    for cls in all_events():
        assert not {"event", "time"} & set(cls.__dataclass_fields__), cls


def test_bus_delivers_in_order_of_subscription_with_its_clock():
    log = []
    bus = EventBus(clock=lambda: 42.0)
    bus.subscribe(Recorder(log, "a"))
    bus.subscribe(Recorder(log, "b"))
    bus.emit(RunFailed("x"))
    assert [label for label, _, _ in log] == ["a", "b"]
    assert log[0][2]["time"] == 42.0


def test_a_listener_that_raises_is_warned_about_once_and_detached(caplog):
    log, others = [], []
    bus = EventBus()
    bus.subscribe(Broken(log))
    bus.subscribe(Recorder(others))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            bus.emit(RunFailed("x"))
        bus.close()
    assert [entry[1] for entry in log] == [RunFailed("x"), "closed"]  # one event, then closed, nothing more
    assert len([entry for entry in others if entry[1] == RunFailed("x")]) == 3
    assert len(caplog.records) == 1
    assert "Broken" in caplog.text
    assert "no space left" in caplog.text


def test_a_listener_that_raises_in_close_does_not_keep_the_others_open(caplog):
    class BadClose(Recorder):
        def close(self):
            raise OSError("gone")

    log = []
    bus = EventBus()
    bus.subscribe(Recorder(log))
    bus.subscribe(BadClose([]))
    bus.close()
    bus.close()
    assert log == [("", "closed", None)]
    assert len(caplog.records) == 1


def test_keyboard_interrupt_is_not_swallowed():
    class Interrupted(Recorder):
        def handle(self, event, record):
            raise KeyboardInterrupt

    bus = EventBus()
    bus.subscribe(Interrupted([]))
    with pytest.raises(KeyboardInterrupt):
        bus.emit(RunFailed("x"))


def test_the_first_listener_hears_what_others_emit_while_they_close():
    class LastWords(Recorder):
        def close(self):
            worker = threading.Thread(target=lambda: bus.emit(WarningRaised("late")))
            worker.start()
            worker.join(timeout=5.0)
            assert not worker.is_alive()  # the bus does not hold its lock while a listener closes

    log = []
    bus = EventBus()
    bus.subscribe(Recorder(log))
    bus.subscribe(LastWords([]))
    bus.close()
    assert [entry[1] for entry in log] == [WarningRaised("late"), "closed"]


def test_a_listener_may_emit_while_it_handles():
    class Echo(Recorder):
        def handle(self, event, record):
            if isinstance(event, RunFailed):
                bus.emit(WarningRaised(event.message))

    log = []
    bus = EventBus()
    bus.subscribe(Recorder(log))
    bus.subscribe(Echo([]))
    bus.emit(RunFailed("x"))
    assert [entry[1] for entry in log] == [RunFailed("x"), WarningRaised("x")]


def test_events_and_listeners_import_neither_torch_nor_mlflow_nor_matplotlib():
    code = (
        "import sys, petractl.events, petractl.tracking.journal, petractl.tracking.console\n"
        "import petractl.tracking.plots, petractl.tracking.mlflow_tracker, petractl.tracking.environment\n"
        "import petractl.tracking.log_file\n"
        "print([m for m in ('torch', 'mlflow', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
