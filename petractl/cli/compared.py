"""`petractl simulate --compare RUN`: what the simulator says beside what the run measured."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from petractl.cli.report import write_out
from petractl.cli.table import write_table
from petractl.errors import DataError, UserError

if TYPE_CHECKING:
    from petractl.cli.recipe_pipeline import Source
    from petractl.planning.measured import MeasuredRun
    from petractl.planning.simulated import Simulated
    from petractl.planning.times import Link, StageTimes

_MOST_FORWARDS = 2_000_000  # of all stages: half a minute of simulation
_HEADER = ("stage", "ms", "idle simulated", "measured", "staleness simulated", "measured")


def write_comparison(
    run: Path,
    *,
    recipe: str | None,
    overrides: Sequence[str],
    link: "Link | None",
    source: "Source",
    as_json: bool,
) -> None:
    """Simulate the run's epochs and write both; times are a recipe's, or what the run's stages computed.

    Raises:
        UserError: the run measured nothing, or the recipe has other stages.
    """
    from petractl.cli.recipe_pipeline import recipe_pipeline
    from petractl.planning.measured import measured_run
    from petractl.planning.planned import refuse_unplanned
    from petractl.planning.simulation import simulate
    from petractl.planning.times import Link
    from petractl.tracking.journal import read_journal

    measured = measured_run(read_journal(run), where=str(run))
    hint = "compare a run of another method"
    refuse_unplanned(measured.method.partition(" ")[0], where=str(run), hint=hint)
    if measured.schedule == "interleaved-1f1b":
        raise UserError(
            "its processes hold several stages, whose times were not told apart",
            where=str(run),
            hint="compare a run with one stage per process",
        )
    _check_length(measured, where=str(run))
    times, said = measured.times(), "what each stage of the run computed"
    links: Link | tuple[Link, ...] = link or Link()
    if recipe is not None:
        pipeline = recipe_pipeline(recipe, overrides=overrides, source=source)
        _check_stages(pipeline.num_stages, recipe, measured=measured, where=str(run))
        times, links, said = pipeline.times(pipeline.own()), pipeline.links(link), pipeline.note
    try:
        simulated = simulate(
            measured.schedule_to_simulate,
            times,
            link=links,
            accumulation=measured.accumulation,
            num_microbatches=measured.num_microbatches,
        )
    except ValueError as error:  # a journal that is damaged
        raise DataError(f"the journal tells what cannot be: {error}", where=str(run)) from None
    assert simulated.seconds is not None
    images_per_s = measured.samples / simulated.seconds
    if as_json:
        document = {
            "times": said,
            "simulated": {"images_per_s": images_per_s, **asdict(simulated)},
            "measured": {"images_per_s": measured.images_per_s, **asdict(measured)},
        }
        write_out(json.dumps(document))
        return
    _write_tables(measured, simulated, times, images_per_s=images_per_s)
    what = "epoch" if measured.epochs == 1 else f"{measured.epochs} epochs"
    length = f"of {measured.num_microbatches} microbatches"
    sys.stderr.write(f"times: {said}; measured: the mean of {what} {length}\n")


def _check_length(measured: "MeasuredRun", *, where: str) -> None:
    forwards = measured.num_microbatches * len(measured.stages)
    if forwards > _MOST_FORWARDS:
        size = f"{measured.num_microbatches:,} microbatches x {len(measured.stages)} stages"
        raise UserError(
            f"{size} are too many to simulate",
            where=where,
            hint=f"compare a run of at most {_MOST_FORWARDS:,} forwards an epoch, all stages together",
        )


def _check_stages(num_stages: int, recipe: str, *, measured: "MeasuredRun", where: str) -> None:
    if num_stages != len(measured.stages):
        raise UserError(
            f"the run has {len(measured.stages)} stages and {recipe} {num_stages}",
            where=where,
            hint=f"give the run's own recipe, {where}/resolved.toml, or none",
        )


def _write_tables(
    measured: "MeasuredRun", simulated: "Simulated", times: "Sequence[StageTimes]", *, images_per_s: float
) -> None:
    rows = [
        (
            str(stage.index),
            f"{1e3 * time.busy_s:.3f}",
            f"{found.idle_percent:.1f} %",
            f"{stage.idle_percent:.1f} %",
            f"{found.staleness_updates:.3g}",
            "-" if stage.staleness_updates is None else f"{stage.staleness_updates:.3g}",
        )
        for stage, found, time in zip(measured.stages, simulated.stages, times, strict=True)
    ]
    write_table(_HEADER, rows)
    off = 100.0 * (images_per_s / measured.images_per_s - 1.0)
    write_out(
        f"images/s: {images_per_s:,.1f} simulated, {measured.images_per_s:,.1f} measured ({off:+.1f} %)"
    )
