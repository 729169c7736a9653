"""`petractl simulate`: how fast schedules are on given stages, before there is a machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from petractl.cli.options import JsonOption, SetOption
from petractl.cli.simulation_report import Conditions, draw, show, show_sweep
from petractl.errors import UserError

_ACCUMULATION = 32


def command(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A recipe's pipeline; or give --stages and times.", show_default=False),
    ] = None,
    overrides: SetOption = None,
    stages: Annotated[int | None, typer.Option(min=1, max=16384, help="Number of stages.")] = None,
    forward_ms: Annotated[
        str | None,
        typer.Option(
            metavar="MS", help="Forward of one microbatch on a stage; one number, or one per stage."
        ),
    ] = None,
    backward_ms: Annotated[
        str | None,
        typer.Option(metavar="MS", help="Its backward, reconstruction included, as PETRA does it."),
    ] = None,
    plain_backward_ms: Annotated[
        str | None,
        typer.Option(metavar="MS", help="Its backward where the graph is kept; default: one forward less."),
    ] = None,
    update_ms: Annotated[float, typer.Option(min=0, help="One update of a stage.")] = 0.0,
    speeds: Annotated[
        str | None, typer.Option(metavar="LIST", help="Speed of each stage's device; 1 is as given.")
    ] = None,
    message_kib: Annotated[float, typer.Option(min=0, help="Size of a message, with --stages.")] = 0.0,
    latency_ms: Annotated[float, typer.Option(min=0, help="Time of a message on its way.")] = 0.0,
    bandwidth_gbps: Annotated[
        float, typer.Option(min=0, help="Gigabits per second of a link; 0 = unlimited.")
    ] = 0.0,
    jitter: Annotated[float, typer.Option(min=0, help="Relative standard deviation of times.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the jitter.")] = 0,
    microbatches: Annotated[
        int | None,
        typer.Option(min=1, help="An epoch of so many, filled and drained; default: the steady state."),
    ] = None,
    accumulation: Annotated[
        int | None,
        typer.Option(min=1, help=f"Microbatches per update, with --stages; default: {_ACCUMULATION}."),
    ] = None,
    schedules: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="tight,paper,slack=1,least,[2,1,0],delayed,plain,gpipe,1f1b and more."
        ),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="LIST", help="Numbers of equal stages: 2,4,...,4096.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Set what a run measured beside the prediction.")
    ] = None,
    as_json: JsonOption = False,
    gantt: Annotated[Path | None, typer.Option(metavar="F.png", help="Draw who does what when.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="F.json", help="Write it for chrome://tracing and Perfetto.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="F.png", help="Draw the sweep.")] = None,
) -> None:
    """Simulate how fast schedules are on a pipeline.

    Throughput, idle time and staleness, without running anything.

    The pipeline is a recipe's, or given in numbers: --stages 64 --forward-ms 20 --backward-ms 60.
    """
    for place, suffix in ((gantt, ".png"), (trace, ".json"), (plot, ".png")):
        _check_place(place, suffix)
    has_numbers = bool(update_ms or message_kib) or any(
        value is not None
        for value in (stages, forward_ms, backward_ms, plain_backward_ms, speeds, accumulation, sweep)
    )
    _check_together(
        {
            "recipe": recipe is not None,
            "numbers": has_numbers,
            "--set": bool(overrides),
            "--compare": compare is not None,
            "--sweep": sweep is not None,
            "--plot": plot is not None,
            "charts": bool(gantt or trace),
            "--microbatches": microbatches is not None,
            "--schedules": schedules is not None,
        }
    )
    from petractl.cli import pipelines
    from petractl.planning.entries import DEFAULT_ENTRIES, parse_entries
    from petractl.planning.times import Link

    link = Link(latency_ms / 1e3, bandwidth_gbps * 1e9 / 8 if bandwidth_gbps else float("inf"))
    if compare is not None:
        from petractl.cli.compared import write_comparison

        write_comparison(compare, recipe=recipe, overrides=overrides or [], link=link, as_json=as_json)
        return
    conditions = Conditions(link, microbatches, jitter, seed)
    entries = parse_entries(schedules or DEFAULT_ENTRIES)
    if recipe is not None:
        of_recipe = pipelines.recipe_pipeline(recipe, overrides=overrides or [])
        if not schedules:
            own = of_recipe.own()
            entries = (own, *(entry for entry in entries if not entry.is_like(own)))
        show(of_recipe, entries, conditions, as_json=as_json)
        draw(of_recipe, entries, conditions, gantt=gantt, trace=trace)
        return
    numbers = pipelines.numbers_pipeline(
        stages=stages,
        forward_ms=forward_ms,
        backward_ms=backward_ms,
        plain_backward_ms=plain_backward_ms,
        update_ms=update_ms,
        message_kib=message_kib,
        accumulation=accumulation or _ACCUMULATION,
        speeds=speeds,
    )
    if sweep is not None:
        show_sweep(numbers, entries, pipelines.parse_sweep(sweep), conditions, as_json=as_json, plot=plot)
        return
    show(numbers, entries, conditions, as_json=as_json)
    draw(numbers, entries, conditions, gantt=gantt, trace=trace)


def _check_together(given: Mapping[str, bool]) -> None:
    """Refuse options that do not go together: none is ever ignored."""
    own = "a recipe" if given["recipe"] else "--compare"
    clashes = (
        (
            given["numbers"] and (given["recipe"] or given["--compare"]),
            "petractl simulate",
            f"{own} has stages, times and accumulation of its own",
            "leave out the options that give them; a recipe is changed with --set",
        ),
        (
            not (given["numbers"] or given["recipe"] or given["--compare"]),
            "petractl simulate",
            "names no pipeline",
            "give a recipe, or --stages 8 --forward-ms 20 --backward-ms 60",
        ),
        (given["--set"] and not given["recipe"], "--set", "changes a recipe, and there is none", "name one"),
        (
            given["--plot"] and not given["--sweep"],
            "--plot",
            "draws a sweep, and there is none",
            "give --sweep 2,4,...,64, or --gantt F.png",
        ),
        (
            given["--sweep"] and (given["charts"] or given["--microbatches"]),
            "--sweep",
            "is of the steady state and has no timeline",
            "leave out --gantt, --trace and --microbatches",
        ),
        (
            given["--compare"] and (given["charts"] or given["--microbatches"] or given["--schedules"]),
            "--compare",
            "takes schedule and length from the run",
            "leave out --schedules, --microbatches, --gantt and --trace",
        ),
    )
    for is_wrong, where, what, hint in clashes:
        if is_wrong:
            raise UserError(what, where=where, hint=hint)


def _check_place(path: Path | None, suffix: str) -> None:
    """Find out before the simulation whether its results can be written."""
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise UserError(
            f"is not a {suffix[1:].upper()} file", where=str(path), hint=f"end its name with {suffix}"
        )
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UserError(what, where=str(path), hint="give a file in a folder that exists")
