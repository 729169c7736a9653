"""What plans are compared with: backprop's pipelines, with backprop's memory and messages."""

from dataclasses import replace

import pytest
import torch

from petractl.methods.family import keepings, method_spec
from petractl.models.registry import BuiltModel, build_model
from petractl.models.units import is_reversible
from petractl.planning.costing import Clock, cost_net
from petractl.planning.devices import DeviceSpec
from petractl.planning.footprint import Footprint, trace_footprints
from petractl.planning.net import Net
from petractl.planning.plan import Setting
from petractl.planning.references import EXACT_MICROBATCHES, References, references_of

BATCH = 16


@pytest.fixture(scope="module")
def built() -> BuiltModel:
    with torch.device("meta"):
        return build_model("revnet18", classes=10, stem="cifar", width=16)


@pytest.fixture(scope="module")
def net(built: BuiltModel) -> Net:
    return costed(built, "petra")


@pytest.fixture(scope="module")
def plain(built: BuiltModel) -> tuple[Footprint, ...]:
    kept = keepings(method_spec("backprop"), [is_reversible(unit) for unit in built.units])
    return trace_footprints(built.units, kept, input_shape=(3, 32, 32), samples=BATCH)


def costed(built: BuiltModel, method: str) -> Net:
    return cost_net(
        built.units,
        built.names,
        method=method_spec(method),
        input_shape=(3, 32, 32),
        batch_size=BATCH,
        clock=Clock(),
    )


def setting(count: int, **given: object) -> Setting:
    return Setting(devices=(DeviceSpec("d", **given),) * count, speeds=(1.0,) * count)  # type: ignore[arg-type]


def test_they_are_the_same_whatever_the_method(
    built: BuiltModel, net: Net, plain: tuple[Footprint, ...]
) -> None:
    """PETRA sends streams down as well: its messages must not count, nor its memory."""
    own = costed(built, "backprop")
    for given in ({}, {"link_bytes_per_s": 1e6}, {"link_bytes_per_s": 1e7, "memory_bytes": 40 * 2**20}):
        asked = setting(4, **given)
        footprints = plain if "memory_bytes" in given else None
        found = references_of(net, asked, footprints=footprints)
        assert found == references_of(own, asked, footprints=footprints)
        assert found.exact is not None or "memory_bytes" in given


def test_less_memory_makes_it_slower_and_then_impossible(net: Net, plain: tuple[Footprint, ...]) -> None:
    def found(memory_bytes: int | None) -> References:
        asked = setting(4, memory_bytes=memory_bytes)
        return references_of(net, asked, footprints=None if memory_bytes is None else plain)

    free = found(None)
    assert free.exact is not None
    none = found(2**20)
    assert none.exact is None
    assert none.over_exact(1.0) is None
    assert none.exact_needs_bytes is not None
    # What it says is needed is enough, and no byte less.
    enough = found(none.exact_needs_bytes)
    assert enough.exact is not None
    assert enough.exact.schedule == "1f1b"
    assert enough.exact.images_per_s < free.exact.images_per_s
    assert found(none.exact_needs_bytes - 1).exact is None
    assert found(2**40) == free


def test_gpipe_needs_more_than_1f1b(net: Net, plain: tuple[Footprint, ...]) -> None:
    backprop = replace(net, footprints=plain, locked=True)
    model = backprop.memory(accumulation=4 * EXACT_MICROBATCHES)
    k = 4 * EXACT_MICROBATCHES
    cuts = (3, 5, 8)
    gpipe = model.stages(cuts, lookahead=(k - 1,) * 4)
    one = model.stages(cuts, lookahead=(3, 2, 1, 0))
    assert max(int(s.total) for s in gpipe) > 2 * max(int(s.total) for s in one)


def test_all_devices_count_and_those_beyond_the_units_stand_idle(net: Net) -> None:
    found = references_of(net, setting(8), footprints=None)
    assert found.num_stages == 8
    assert found.exact is not None
    assert found.exact.accumulation == 8 * EXACT_MICROBATCHES
    assert references_of(net, setting(40), footprints=None).num_stages == net.num_units
    # Of too many, the fastest work.
    devices = (DeviceSpec("slow"),) * 5 + (DeviceSpec("fast"),) * net.num_units
    speeds = (0.1,) * 5 + (1.0,) * net.num_units
    best = references_of(net, Setting(devices=devices, speeds=speeds), footprints=None)
    assert best == references_of(net, setting(net.num_units), footprints=None)


def test_one_device_is_as_fast_as_its_pipeline(net: Net) -> None:
    found = references_of(net, setting(1), footprints=None)
    assert found.exact is not None
    assert found.over_model_parallel(found.exact.images_per_s) == pytest.approx(1.0)
