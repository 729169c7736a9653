"""How much memory is left, by the tightest of the limits."""

import resource

import pytest
import torch

from petractl.engine import memory_left as module
from petractl.engine.memory_left import MemoryLeft, memory_left

CPU = torch.device("cpu")
NO_LIMIT = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine of files: /proc, a cgroup, no resource limits."""
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    (tmp_path / "self" / "status").write_text("Name: python\nVmSize: 3000 kB\nVmData: 1000 kB\n")
    monkeypatch.setattr(module, "_PROC", tmp_path)
    monkeypatch.setattr(module, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: NO_LIMIT)
    return tmp_path


def test_the_machine_says_what_is_available(system) -> None:
    assert memory_left(CPU) == MemoryLeft(4000 * 1024, shared=True)


def test_a_cgroup_may_leave_less(system) -> None:
    group = system / "cgroup"
    group.mkdir()
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.current").write_text("2500000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    assert memory_left(CPU) == MemoryLeft(600_000, shared=True)
    (group / "memory.max").write_text("max\n")
    assert memory_left(CPU) == MemoryLeft(4000 * 1024, shared=True)


def test_a_limit_of_the_process_is_its_own(system, monkeypatch) -> None:
    limits = {resource.RLIMIT_AS: (3500 * 1024, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.get(kind, NO_LIMIT))
    assert memory_left(CPU) == MemoryLeft(500 * 1024, shared=False)
    limits[resource.RLIMIT_DATA] = (900 * 1024, resource.RLIM_INFINITY)
    assert memory_left(CPU) == MemoryLeft(0, shared=False)


def test_a_system_that_does_not_tell_leaves_it_open(system) -> None:
    (system / "meminfo").unlink()
    assert memory_left(CPU) is None


def test_here_there_is_some() -> None:
    left = memory_left(CPU)
    assert left is not None
    assert left.bytes > 1_000_000
