"""Oracle 6: one process per stage gives the bits of one process.

One launch per number of stages runs all cases; parameters, running statistics, optimiser state, training
losses and scores are compared to the bit. The reference runs here.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from oracle_6_cases import CASES, load, run_case
from safetensors.torch import load_file
from torch import Tensor

from petractl.processes import run_workers

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=[2, 3, 4], ids=lambda j: f"{j}-stages")
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Run every case in J processes, once."""
    folder = tmp_path_factory.mktemp("oracle-6")
    load(folder, [])
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = run_workers(
        [sys.executable, str(HERE / "oracle_6_cases.py"), str(folder)],
        titles=[f"stage {j}" for j in range(request.param)],
        log_dir=folder / "logs",
        environment={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert code == 0
    return request.param, folder


@pytest.mark.parametrize("name", list(CASES))
def test_processes_give_the_bits_of_one_process(launched: tuple[int, Path], name: str) -> None:
    num_stages, folder = launched
    expected = run_case(
        load(folder, [*CASES[name], f"partition.stages={num_stages}", "engine.mode=in-process"]),
        launch=None,
        world=None,
    )
    found = gathered(folder, list(CASES).index(name), num_stages)
    assert set(found) == set(expected)
    different = [key for key, tensor in expected.items() if not equal(found[key], tensor)]
    assert not different
    assert {f"epoch {n} {what}" for n in (0, 1) for what in ("loss", "correct", "scores")} <= set(found)


def test_another_case_is_seen_to_differ(launched: tuple[int, Path]) -> None:
    """What the comparison would say of a wrong engine: k = 3 instead of k = 1."""
    num_stages, folder = launched
    names = list(CASES)
    one, three = (gathered(folder, names.index(f"petra, k = {k}"), num_stages) for k in (1, 3))
    shared = [key for key in one if key.endswith("weight")]
    assert shared
    assert all(not equal(one[key], three[key]) for key in shared)


def gathered(folder: Path, case: int, num_stages: int) -> dict[str, Tensor]:
    """Return what all ranks have; what several have must be the same."""
    found: dict[str, Tensor] = {}
    for rank in range(num_stages):
        for key, tensor in load_file(folder / f"case-{case}-rank-{rank}.safetensors").items():
            assert key not in found or equal(found[key], tensor), key
            found[key] = tensor
    return found


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
