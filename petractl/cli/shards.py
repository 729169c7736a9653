"""`petractl shards`: make a set of shards, check one, and say what is in one."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petractl.cli.options import JsonOption
from petractl.errors import UserError

if TYPE_CHECKING:
    from petractl.data.writing.building import BuildOptions

_KINDS = ("auto", "folder", "cifar", "imagenet32", "shards")

PlaceArgument = Annotated[
    str, typer.Argument(metavar="DST", help="Folder of shards; or a pattern, an index.json, a URL.")
]
WorkersOption = Annotated[
    int, typer.Option("--workers", min=0, help="Threads; 0 = one per core, at most 32.", show_default=False)
]
ClassesOption = Annotated[
    int,
    typer.Option("--classes", min=0, metavar="C", help="Number of classes, where no index says it."),
]


def build(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder of classes, CIFAR or ImageNet32 batches, or shards.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder for the shards.")],
    split: Annotated[
        str, typer.Option("--split", metavar="train|val", help="Take one split, or say which SRC is.")
    ] = "",
    kind: Annotated[str, typer.Option("--kind", help=f"What SRC is: {', '.join(_KINDS)}.")] = "auto",
    samples_per_shard: Annotated[
        int,
        typer.Option(
            "--samples-per-shard",
            min=0,
            metavar="N",
            help="At most so many in a shard; 0 = 1000, of images up to 96 pixels 10000.",
        ),
    ] = 0,
    max_mb: Annotated[
        float, typer.Option("--max-mb", min=0.0, metavar="MB", help="Instead: so many that a shard has less.")
    ] = 0.0,
    resize: Annotated[
        int,
        typer.Option("--resize", min=0, metavar="S", help="Make short sides above S pixels S; 0 = leave."),
    ] = 0,
    quality: Annotated[
        int | None,
        typer.Option("--quality", min=1, max=100, help="Of JPEGs that are resized.  [default: 90]"),
    ] = None,
    name: Annotated[str, typer.Option("--name", metavar="PREFIX", help="How the shards' names begin.")] = "",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order of the samples.")] = 0,
    no_shuffle: Annotated[bool, typer.Option("--no-shuffle", help="Keep the order of SRC.")] = False,
    classes: ClassesOption = 0,
    on_error: Annotated[
        str, typer.Option("--on-error", metavar="stop|skip", help="What a damaged sample does.")
    ] = "stop",
    workers: WorkersOption = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make shards, and their index, of a set of images.

    Images stay the bytes that they are, unless --resize. Interrupted, the same command goes on where it
    stopped. A DST that holds one split can be given the other.
    """
    options = _options(
        split=split,
        kind=kind,
        samples_per_shard=samples_per_shard,
        max_mb=max_mb,
        resize=resize,
        quality=quality,
        name=name,
        seed=None if no_shuffle else seed,
        classes=classes,
        on_error=on_error,
    )
    from petractl.cli.shards_report import show_built, show_plan

    if dry_run:
        from petractl.data.writing.building import preview_build

        show_plan(preview_build(source, destination, options), as_json=as_json)
        return
    from petractl.cli.progress import shown_progress
    from petractl.data.writing.building import build_shards
    from petractl.interrupts import Interrupts

    try:
        with Interrupts().handled(), shown_progress() as watch:
            built = build_shards(source, destination, options, workers=workers, watch=watch)
    except KeyboardInterrupt:
        sys.stderr.write("finished shards are kept; the same command goes on with the others\n")
        raise
    show_built(built, destination, as_json=as_json)


def _options(
    *,
    split: str,
    kind: str,
    samples_per_shard: int,
    max_mb: float,
    resize: int,
    quality: int | None,
    name: str,
    seed: int | None,
    classes: int,
    on_error: str,
) -> "BuildOptions":
    _one_of("--split", split, ("", "train", "val"))
    _one_of("--kind", kind, _KINDS)
    _one_of("--on-error", on_error, ("stop", "skip"))
    if samples_per_shard and max_mb:
        raise UserError("goes without --samples-per-shard", where="--max-mb", hint="give one of the two")
    if quality is not None and not resize:
        raise UserError(
            "without --resize no image is compressed anew",
            where="--quality",
            hint="give --resize, or leave it",
        )
    from petractl.data.writing.building import BuildOptions
    from petractl.data.writing.recoding import DEFAULT_QUALITY

    return BuildOptions(
        split=split or None,  # type: ignore[arg-type]
        kind=None if kind == "auto" else kind,  # type: ignore[arg-type]
        samples_per_shard=samples_per_shard,
        max_mb=max_mb,
        resize=resize,
        quality=DEFAULT_QUALITY if quality is None else quality,
        name=name,
        seed=seed,
        classes=classes,
        on_error=on_error,  # type: ignore[arg-type]
    )


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        names = ", ".join(filter(None, known))
        raise UserError(f'"{value}" is not known', where=option, hint=f"one of {names}")


def check(
    place: PlaceArgument,
    classes: ClassesOption = 0,
    workers: WorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Read and decode every sample, and compare all with the index.

    Every problem is a line. Exit code 0: nothing is wrong; 2: something is.
    """
    from petractl.cli.progress import shown_progress
    from petractl.cli.shards_report import show_checked
    from petractl.data.writing.checking import check_shards

    with shown_progress() as watch:
        report = check_shards(place, classes=classes, workers=workers, watch=watch)
    show_checked(report, place, as_json=as_json)


def info(
    place: PlaceArgument,
    workers: WorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Say what shards hold: samples, bytes, image sizes, samples of each class.

    Nothing is decoded; `check` does that.
    """
    from petractl.cli.progress import shown_progress
    from petractl.cli.shards_report import show_survey
    from petractl.data.writing.survey import survey_shards

    with shown_progress() as watch:
        survey = survey_shards(place, workers=workers, watch=watch)
    show_survey(survey, place, as_json=as_json)
