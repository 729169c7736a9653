"""`petractl bench`: how fast several methods and schedules train one recipe."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petractl.cli.options import JsonOption, RecipeArgument, SetOption
from petractl.cli.report import show_warning, write_out
from petractl.cli.table import write_table
from petractl.errors import UserError

if TYPE_CHECKING:
    from petractl.bench.comparison import Checked, Options
    from petractl.bench.summary import Measurement

_HEADER = ("variant", "schedule", "stages", "images/s", "min - max", "ratio", "idle", "memory", "sent")
_RESULT, _PLOT = "bench.json", "bench.png"
_MIB = 2**20


def command(
    recipe: RecipeArgument,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="LIST",
            help="What to compare, parted by commas: NAME, NAME:KEEP, NAME/SCHEDULE or NAME:KEEP/SCHEDULE.",
        ),
    ],
    overrides: SetOption = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each, in turn.")] = 5,
    microbatches: Annotated[
        int, typer.Option(min=1, help="Microbatches timed per repeat, rounded up to whole updates.")
    ] = 24,
    warmup: Annotated[
        int, typer.Option(min=1, help="Untimed microbatches before them, with the pipeline full.")
    ] = 4,
    as_json: JsonOption = False,
    plot: Annotated[Path | None, typer.Option(metavar="F.png", help="Draw a bar chart.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New folder for bench.json and bench.png.")
    ] = None,
) -> None:
    """Measure how fast several methods train a recipe.

    Each is the recipe with its method and schedule changed. They train in turn, on a few microbatches held
    in memory; images/s, and its ratio to the first, are of the steady state.
    """
    from petractl.bench.variants import parse_variants
    from petractl.recipe import load_recipe

    _check_places(plot, out)
    variants = parse_variants(methods)
    loaded = load_recipe(recipe, overrides=overrides or [])
    from petractl.bench.comparison import Options, check_variants
    from petractl.bench.launching import compare, is_speaker, launch

    options = Options(repeats=repeats, microbatches=microbatches, warmup=warmup)
    checked = check_variants(loaded, variants, launch=launch())
    if is_speaker():
        _show_warnings(checked)
    again = _arguments(recipe, methods, overrides or [], options, as_json=as_json, plot=plot, out=out)
    measured = compare(checked, options=options, tell=_tell, arguments=again)
    if not measured:
        return  # the process of rank 0 writes
    _warn_of_divergence(measured)
    _write_files(measured, options, recipe=loaded.name, plot=plot, out=out)
    if as_json:
        write_out(json.dumps([each.as_json() for each in measured]))
    else:
        write_table(_HEADER, [_row(each) for each in measured])


def _arguments(
    recipe: str,
    methods: str,
    overrides: Sequence[str],
    options: "Options",
    *,
    as_json: bool,
    plot: Path | None,
    out: Path | None,
) -> list[str]:
    """Return the command line that says the same once more, for processes of its own."""
    words = [recipe, "--methods", methods, "--repeats", str(options.repeats)]
    words += ["--microbatches", str(options.microbatches), "--warmup", str(options.warmup)]
    words += [word for text in overrides for word in ("--set", text)]
    words += ["--json"] if as_json else []
    words += ["--plot", str(plot)] if plot is not None else []
    words += ["--out", str(out)] if out is not None else []
    return words


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _check_places(plot: Path | None, out: Path | None) -> None:
    """Find out before the measurement whether its results can be written."""
    if plot is not None and plot.suffix.lower() != ".png":
        raise UserError("is not a PNG file", where=str(plot), hint="give --plot a name that ends with .png")
    if plot is not None and (plot.is_dir() or not plot.parent.is_dir()):
        what = "is a folder" if plot.is_dir() else f"there is no folder {plot.parent}"
        raise UserError(what, where=str(plot), hint="give --plot a file in a folder that exists")
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        occupied = any(out.iterdir())
    except OSError as error:
        raise UserError(f"cannot be made: {error.strerror or error}", where=str(out)) from None
    if occupied:
        raise UserError("the folder is not empty", where=str(out), hint="give --out a new one")


def _show_warnings(checked: "Sequence[Checked]") -> None:
    for warning in dict.fromkeys(warning for each in checked for warning in each.warnings):
        show_warning(warning)


def _warn_of_divergence(measured: "Sequence[Measurement]") -> None:
    from petractl.errors import Problem

    names = [each.variant for each in measured if each.has_diverged]
    if names:
        what = f"the loss of {', '.join(names)} stopped being a number: the speed may be another one"
        show_warning(Problem("", what, "lower optimizer.lr"))


def _write_files(
    measured: "Sequence[Measurement]", options: "Options", *, recipe: str, plot: Path | None, out: Path | None
) -> None:
    import dataclasses

    from petractl.tracking.environment import environment

    if out is not None:
        result = {
            "recipe": recipe,
            "options": dataclasses.asdict(options),
            "environment": environment(),
            "methods": [each.as_json() for each in measured],
        }
        (out / _RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for path in (plot, out / _PLOT if out is not None else None):
        if path is not None:
            _draw(measured, path, recipe=recipe)


def _draw(measured: "Sequence[Measurement]", path: Path, *, recipe: str) -> None:
    from petractl.tracking.bench_plot import Bar, plot_bench

    first = measured[0].plan
    facts = [
        f"microbatches of {first.microbatch_size}",
        f"k = {first.accumulation}",
        first.precision,
        first.device,
        f"{first.threads} {'thread' if first.threads == 1 else 'threads'}",
    ]
    if first.processes > 1:
        facts.append(f"{first.processes} processes")
    bars = [
        Bar(each.variant, each.images_per_s.all, each.ratio.median, each.peak_memory_bytes)
        for each in measured
    ]
    plot_bench(bars, path, title=recipe, subtitle=", ".join(facts))


def _row(measured: "Measurement") -> tuple[str, ...]:
    rate, ratio, plan = measured.images_per_s, measured.ratio, measured.plan
    return (
        measured.variant,
        plan.schedule,
        str(len(plan.stages)),
        f"{rate.median:,.1f}",
        f"{rate.min:,.1f} - {rate.max:,.1f}",
        f"{ratio.median:.3f} ({ratio.min:.3f} - {ratio.max:.3f})",
        _range([f"{value:.0f}" for value in measured.idle], unit="%"),
        _range([f"{value / _MIB:,.0f}" for value in measured.peak_memory_bytes], unit="MiB"),
        "-" if measured.bytes_sent is None else f"{measured.bytes_sent / _MIB:,.2f} MiB",
    )


def _range(values: Sequence[str], *, unit: str) -> str:
    """Return least to most of values that are written as numbers, "-" for none."""
    if not values:
        return "-"
    ordered = sorted(values, key=lambda text: float(text.replace(",", "")))
    ends = dict.fromkeys((ordered[0], ordered[-1]))
    return f"{' to '.join(ends)} {unit}"
