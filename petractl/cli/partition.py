"""`petractl partition`: where to cut a net, what every stage takes and holds, and how fast it will be."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petractl.cli.options import JsonOption
from petractl.cli.partition_report import plan_as_json, show_plan
from petractl.cli.report import show_warning, write_out
from petractl.errors import Problem, UserError

if TYPE_CHECKING:
    from petractl.planning.choices import ReplicaChoice
    from petractl.planning.net import Net
    from petractl.planning.plan import Setting

_GIB = 2**30


def command(
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="A model of `petractl ls models`.")],
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", help="Number of devices.")],
    method: Annotated[str, typer.Option("--method", help="A method of `petractl ls methods`.")] = "petra",
    keep: Annotated[str, typer.Option("--keep", help='What "delayed" keeps.')] = "",
    schedule: Annotated[
        str, typer.Option("--schedule", help="Schedule, or lookaheads such as 3,2,1,0.")
    ] = "auto",
    accumulation: Annotated[
        int, typer.Option("--accumulation", "-k", min=1, help="Microbatches per update.")
    ] = 1,
    batch: Annotated[int, typer.Option("--batch", min=2, help="Samples per microbatch.")] = 64,
    image_size: Annotated[int, typer.Option("--image-size", min=1, help="Side of the images.")] = 224,
    classes: Annotated[int, typer.Option("--classes", min=1, help="Number of classes.")] = 1000,
    width: Annotated[int, typer.Option("--width", min=1, help="Channels of the stem per stream.")] = 64,
    depth: Annotated[int, typer.Option("--depth", min=1, help="Blocks of revnet-iso.")] = 8,
    stem: Annotated[str, typer.Option("--stem", help='"auto", "cifar" or "imagenet".')] = "auto",
    balance: Annotated[
        str, typer.Option("--balance", help="What is made even: time, flops, memory, parameters, uniform.")
    ] = "time",
    cuts: Annotated[str, typer.Option("--cuts", metavar="A,B", help="Cuts to look at, not to choose.")] = "",
    replicas: Annotated[
        str, typer.Option("--replicas", metavar="R|auto", help="Copies of the pipeline.")
    ] = "1",
    flops: Annotated[bool, typer.Option("--flops", help="Plan from FLOPs; measure nothing.")] = False,
    device_spec: Annotated[
        str, typer.Option("--device-spec", metavar="FILE|NAME", help="Devices that are not here.")
    ] = "",
    memory_gib: Annotated[
        float, typer.Option("--memory-gib", min=0.0, help="Memory per device; 0 = the device's.")
    ] = 0.0,
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd, adamw or lars.")] = "sgd",
    device: Annotated[str, typer.Option("--device", help="Where to measure.")] = "auto",
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0 = as torch.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again, whatever is cached.")] = False,
    as_json: JsonOption = False,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="RECIPE", help="Put the cuts into this recipe.")
    ] = None,
) -> None:
    """Cut a net into stages, one per device.

    Says what each stage takes and holds, and how fast the whole will be. Times are measured here, on the
    device at hand; with --flops, or a --device-spec that gives TFLOP/s, they follow from FLOPs.
    """
    _check_numbers(gpus, balance, optimizer)
    if write is not None:
        _check_recipe(write, model)
    setting, by_flops = _setting(
        gpus,
        schedule=schedule,
        accumulation=accumulation,
        balance=balance,
        cuts=cuts,
        device_spec=device_spec,
        memory_gib=memory_gib,
        flops=flops,
        device=device,
    )
    net = _net(
        model,
        method=method,
        keep=keep,
        batch=batch,
        image_size=image_size,
        classes=classes,
        width=width,
        depth=depth,
        stem=stem,
        by_flops=by_flops or balance == "flops",
        device=device,
        threads=threads,
        fresh=fresh,
        optimizer=optimizer,
        host_buffers=setting.devices[0].name == "cpu",
    )
    if by_flops and device_spec:
        net = replace(net, clock="FLOPs at the TFLOP/s given for the devices, as if a net reached them")
    _check_stages(gpus, replicas, net.num_units)
    from petractl.planning.choices import choose_replicas, device_counts, plan_or_refuse

    if replicas == "1":
        plan = plan_or_refuse(net, setting)
        choices: list[ReplicaChoice] = []
        copies, rate = 1, plan.forecast.images_per_s
    else:
        choices = choose_replicas(net, setting, replicas=_replicas(replicas))
        assert choices[0].plan is not None
        plan, copies, rate = choices[0].plan, choices[0].replicas, choices[0].images_per_s
    counts = device_counts(net, plan.setting)
    if write is not None:
        from petractl.recipe.edit import write_cuts

        write_cuts(write, plan.cuts)
        sys.stderr.write(f"{write}: cuts = {list(plan.cuts)}\n")
    if as_json:
        write_out(json.dumps(plan_as_json(net, plan, choices, counts, model=model, copies=copies, rate=rate)))
    else:
        show_plan(net, plan, choices, counts, copies=copies, rate=rate)


def _check_numbers(gpus: int, balance: str, optimizer: str) -> None:
    if gpus < 1:
        raise UserError(f"{gpus} GPUs; there is at least 1", where="--gpus", hint="give 1 or more")
    known = ("time", "flops", "memory", "parameters", "uniform")
    if balance not in known:
        raise UserError(
            f'"{balance}" cannot be balanced', where="--balance", hint=f"one of {', '.join(known)}"
        )
    if optimizer not in ("sgd", "adamw", "lars"):
        raise UserError(f'"{optimizer}" is not known', where="--optimizer", hint="one of sgd, adamw, lars")


def _check_recipe(path: Path, model: str) -> None:
    from petractl.recipe import load_recipe

    if not path.is_file():
        raise UserError("there is no such recipe to write to", where=str(path), hint="give a file")
    named = load_recipe(path).recipe.model.name
    if named != model:
        raise UserError(
            f'its model is "{named}", and the cuts are for "{model}"',
            where=str(path),
            hint=f"plan with --model {named}",
        )


def _check_stages(gpus: int, replicas: str, units: int) -> None:
    """Refuse more stages than units; the nearest replicas that would work are named."""
    count = int(replicas) if replicas.isdigit() else gpus
    if replicas == "auto" or count < 1 or gpus <= units * count:
        return
    fitting = [r for r in range(count + 1, gpus + 1) if gpus % r == 0 and gpus // r <= units]
    raise UserError(
        f"{gpus} GPUs make {gpus // count} stages, but the model has {units} units to share among them",
        where="--gpus",
        hint=f"give at most {units * count} GPUs, or --replicas {fitting[0]}",
    )


def _replicas(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit():
        raise UserError(f'"{text}" is no number of replicas', where="--replicas", hint='a number, or "auto"')
    return int(text)


def _setting(
    gpus: int,
    *,
    schedule: str,
    accumulation: int,
    balance: str,
    cuts: str,
    device_spec: str,
    memory_gib: float,
    flops: bool,
    device: str,
) -> "tuple[Setting, bool]":
    """Return the devices and schedule, and whether times follow from FLOPs."""
    from petractl.planning.devices import NOMINAL, DeviceSpec, devices_of
    from petractl.planning.plan import Setting

    by_flops = flops
    if device_spec:
        devices = devices_of(device_spec, count=gpus)
        by_flops = flops or any(spec.tflops is not None for spec in devices)
    elif flops:
        devices = (DeviceSpec(NOMINAL),) * gpus
    else:
        devices = (_device_here(device),) * gpus
    if memory_gib:
        devices = tuple(replace(spec, memory_bytes=int(memory_gib * _GIB)) for spec in devices)
    unknown = [spec.name for spec in devices if spec.tflops is None]
    if by_flops and unknown and len(unknown) < len(devices):
        raise UserError(f"no TFLOP/s are known of {unknown[0]}", where="--device-spec", hint="give tflops")
    speeds = tuple((spec.tflops or 1.0) if by_flops else 1.0 for spec in devices)
    numbers = schedule.replace(" ", "").split(",")
    is_list = all(part.isdigit() for part in numbers)
    return (
        Setting(
            devices=devices,
            speeds=speeds,
            schedule=tuple(map(int, numbers)) if is_list else schedule,
            accumulation=accumulation,
            balance=balance,
            cuts=_cuts(cuts) if cuts else None,
        ),
        by_flops,
    )


def _cuts(text: str) -> tuple[int, ...]:
    parts = text.replace(" ", "").strip("[]").split(",")
    numbers = tuple(int(part) for part in parts if part.isdigit())
    rising = all(a < b for a, b in zip((0, *numbers), numbers, strict=False))
    if len(numbers) != len(parts) or not rising:
        raise UserError(
            f'"{text}" are no cuts', where="--cuts", hint="give unit numbers from 1 up, such as 4,8,14"
        )
    return numbers


def _device_here(name: str) -> Any:
    import torch

    from petractl.planning.devices import DeviceSpec
    from petractl.planning.profile import device_name

    device = _torch_device(name)
    if device.type != "cuda":
        return DeviceSpec("cpu")
    memory = torch.cuda.get_device_properties(device).total_memory
    return DeviceSpec(device_name(device), memory_bytes=int(memory))


def _torch_device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f'"{name}" is no device', where="--device", hint='"auto", "cpu" or "cuda"')
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no usable GPU", where="--device", hint='use "cpu", or --flops')
    return torch.device(name)


def _net(
    model: str,
    *,
    method: str,
    keep: str,
    batch: int,
    image_size: int,
    classes: int,
    width: int,
    depth: int,
    stem: str,
    by_flops: bool,
    device: str,
    threads: int,
    fresh: bool,
    optimizer: str,
    host_buffers: bool,
) -> "Net":
    import torch

    from petractl.methods.family import method_spec
    from petractl.models.registry import build_model
    from petractl.models.units import is_reversible
    from petractl.planning.costing import Clock, cost_net

    try:
        spec = method_spec(method, keep=keep)
    except ValueError as error:
        raise UserError(str(error), where="--method") from None
    if stem == "auto":
        stem = "imagenet" if image_size >= 96 else "cifar"
    with torch.device("meta"):
        built = build_model(model, width=width, classes=classes, stem=stem, depth=depth)
    if not any(is_reversible(unit) for unit in built.units[:-1]):
        if spec.needs_reversible:
            raise UserError(f"{model} has no reversible unit, and {method} needs one", where="--method")
        if spec.name == "petra":
            what = f"{model} has no reversible unit: petra becomes delayed gradients with inputs kept"
            show_warning(Problem("--method", what, "choose a RevNet to keep nothing"))
    if threads:
        torch.set_num_threads(threads)
    clock = Clock() if by_flops else Clock(_torch_device(device), use_cache=not fresh)
    if clock.device is not None:
        sys.stderr.write("measuring ...\n")
    return cost_net(
        built.units,
        built.names,
        method=spec,
        input_shape=(3, image_size, image_size),
        batch_size=batch,
        clock=clock,
        optimizer=optimizer,
        host_buffers=host_buffers,
    )
