"""`petractl partition`: where to cut a net, what every stage takes and holds, and how fast it will be."""

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from petractl.cli import partition_options as given
from petractl.cli.machine import Machine, machine_of, side_by_side, threads_of, torch_device
from petractl.cli.options import JsonOption
from petractl.cli.partition_checks import check_request, check_stages, parse_cuts, parse_replicas, stem_of
from petractl.cli.partition_recipe import check_units, warn_of_differences, write_plan
from petractl.cli.partition_report import Answer, plan_as_json, show_plan
from petractl.cli.report import show_warning, write_out
from petractl.errors import Problem, UserError

if TYPE_CHECKING:
    from petractl.methods.family import MethodSpec
    from petractl.models.registry import BuiltModel
    from petractl.planning.footprint import Footprint
    from petractl.planning.net import Net
    from petractl.planning.plan import Setting


def command(
    model: given.Model,
    gpus: given.Gpus,
    method: given.Method = "petra",
    keep: given.Keep = "",
    schedule: given.Schedule = "auto",
    accumulation: given.Accumulation = 1,
    batch: given.Batch = 64,
    image_size: given.ImageSize = 224,
    classes: given.Classes = 1000,
    width: given.Width = 64,
    depth: given.Depth = 8,
    stem: given.Stem = "auto",
    balance: given.Balance = "time",
    cuts: given.Cuts = "",
    replicas: given.Replicas = "1",
    flops: given.Flops = False,
    device_spec: given.DeviceSpecs = "",
    memory_gib: given.MemoryGib = 0.0,
    optimizer: given.Optimizer = "sgd",
    device: given.Device = "auto",
    threads: given.Threads = 0,
    fresh: given.Fresh = False,
    as_json: JsonOption = False,
    write: given.Write = None,
) -> None:
    """Cut a net into stages, one per device.

    Says what each stage takes and holds, and how fast the whole will be. Times are measured here, on the
    device at hand; with --flops, or a --device-spec that gives TFLOP/s, they follow from FLOPs.
    """
    asked = dict(locals())
    check_request(asked)
    machine = machine_of(gpus, device_spec=device_spec, flops=flops, device=device, memory_gib=memory_gib)
    setting = _setting(asked, machine)
    spec, built = _built(asked)
    check_stages(gpus, replicas, len(built.units))
    if write is not None:
        check_units(write, asked, num_units=len(built.units))
        warn_of_differences(write, asked)
    net = _net(asked, machine, spec, built)
    answer = _answer(net, setting, built, asked)
    if write is not None:
        write_plan(write, answer.plan, replicas=replicas)
    if as_json:
        write_out(json.dumps(plan_as_json(answer)))
    else:
        show_plan(answer)


def _setting(asked: dict[str, Any], machine: Machine) -> "Setting":
    """Return how the net is to be run."""
    from petractl.planning.plan import Setting

    schedule = asked["schedule"]
    numbers = schedule.strip("[] ").replace(" ", "").split(",")
    is_list = all(part.isascii() and part.isdigit() for part in numbers)
    if is_list and max(map(int, numbers)) > given.MAX_AHEAD:
        raise UserError(
            f"{max(map(int, numbers)):,} microbatches ahead are too many",
            where="--schedule",
            hint=f"at most {given.MAX_AHEAD:,}",
        )
    return Setting(
        devices=machine.devices,
        speeds=machine.speeds,
        schedule=tuple(map(int, numbers)) if is_list else schedule,
        accumulation=asked["accumulation"],
        balance=asked["balance"],
        cuts=parse_cuts(asked["cuts"]) if asked["cuts"] else None,
    )


def _net(asked: dict[str, Any], machine: Machine, spec: "MethodSpec", built: "BuiltModel") -> "Net":
    """Return what each unit costs: measured, unless times follow from FLOPs."""
    import torch

    from petractl.planning.costing import Clock, cost_net

    clock = Clock()
    if not machine.by_flops and asked["balance"] != "flops":
        threads = asked["threads"] or threads_of(asked["gpus"])
        torch.set_num_threads(threads)
        clock = Clock(
            torch_device(asked["device"]),
            use_cache=not asked["fresh"],
            processes=side_by_side(asked["gpus"], threads=threads),
        )
        sys.stderr.write("measuring ...\n")
    side = asked["image_size"]
    net = cost_net(
        built.units,
        built.names,
        method=spec,
        input_shape=(3, side, side),
        batch_size=asked["batch"],
        clock=clock,
        optimizer=asked["optimizer"],
        host_buffers=machine.holds_messages,
    )
    return replace(net, clock=machine.clock(net.clock))


def _built(asked: dict[str, Any]) -> "tuple[MethodSpec, BuiltModel]":
    """Return the method and the model on the meta device, if the one can train the other."""
    import torch

    from petractl.methods.family import method_spec
    from petractl.models.registry import build_model
    from petractl.models.units import is_reversible

    spec, model = method_spec(asked["method"], keep=asked["keep"]), asked["model"]
    with torch.device("meta"):
        built = build_model(
            model,
            width=asked["width"],
            classes=asked["classes"],
            stem=stem_of(asked),
            depth=asked["depth"],
        )
    if any(is_reversible(unit) for unit in built.units[:-1]):
        return spec, built
    if spec.needs_reversible:
        raise UserError(
            f"{model} has no reversible unit, and {spec.name} needs one",
            where="--method",
            hint="choose a RevNet, or --method petra, delayed with --keep inputs, or backprop",
        )
    if spec.name == "petra":
        what = f"{model} has no reversible unit: petra becomes delayed gradients with inputs kept"
        show_warning(Problem("--method", what, "choose a RevNet to keep nothing"))
    return spec, built


def _answer(net: "Net", setting: "Setting", built: "BuiltModel", asked: dict[str, Any]) -> Answer:
    """Plan, with what the plan is compared with."""
    from petractl.planning.choices import choose_replicas, device_counts, plan_or_refuse
    from petractl.planning.references import references_of

    if asked["replicas"] == "1":
        plan, choices = plan_or_refuse(net, setting), []
    else:
        choices = choose_replicas(net, setting, replicas=parse_replicas(asked["replicas"]))
        assert choices[0].plan is not None
        plan = choices[0].plan
    references = references_of(
        net,
        setting,
        footprints=_footprints_of_backprop(net, setting, built, asked),
        cuts=plan.cuts if plan.setting.replicas == 1 else None,
    )
    counts = device_counts(net, setting)
    return Answer(asked["model"], net, plan, choices, counts, references, setting.num_stages)


def _footprints_of_backprop(
    net: "Net", setting: "Setting", built: "BuiltModel", asked: dict[str, Any]
) -> "tuple[Footprint, ...] | None":
    """Return the units' memory under backprop, None where no device's is known: then it limits nothing."""
    from petractl.methods.family import keepings, method_spec
    from petractl.models.units import is_reversible
    from petractl.planning.footprint import trace_footprints

    if all(device.memory_bytes is None for device in setting.devices):
        return None
    kept = keepings(method_spec("backprop"), [is_reversible(unit) for unit in built.units])
    if kept == net.kept:
        return net.footprints
    side = asked["image_size"]
    return trace_footprints(built.units, kept, input_shape=(3, side, side), samples=asked["batch"])
