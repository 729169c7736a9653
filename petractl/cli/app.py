"""The `petractl` command: what it offers, and nothing that any one command needs.

Command modules import torch, pydantic and the rest only in their bodies, so `petractl --help` stays far below
0.3 s.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer

from petractl.cli import (
    bench,
    compare,
    doctor,
    export,
    ls,
    partition,
    resume,
    run,
    shards,
    show,
    simulate,
    sweep,
    sync,
    validate,
)
from petractl.cli import eval as eval_
from petractl.cli.report import guarded

_TRAIN = "Train"
_LOOK = "Look"
_DATA = "Data"


@dataclass(frozen=True, slots=True)
class Command:
    """A command's name, what it does, and the heading it stands under in the help."""

    name: str
    body: Callable[..., None]
    heading: str


COMMANDS = (
    Command("run", run.command, _TRAIN),
    Command("resume", resume.command, _TRAIN),
    Command("eval", eval_.command, _TRAIN),
    Command("export", export.command, _TRAIN),
    Command("sweep", sweep.command, _TRAIN),
    Command("sync", sync.command, _TRAIN),
    Command("bench", bench.command, _LOOK),
    Command("compare", compare.command, _LOOK),
    Command("partition", partition.command, _LOOK),
    Command("simulate", simulate.command, _LOOK),
    Command("validate", validate.command, _LOOK),
    Command("show", show.command, _LOOK),
    Command("ls", ls.command, _LOOK),
    Command("doctor", doctor.command, _LOOK),
)


@dataclass(frozen=True, slots=True)
class Group:
    """Commands under one name; `help` says what they are for."""

    name: str
    help: str
    heading: str
    commands: tuple[Command, ...]


GROUPS = (
    Group(
        "shards",
        "Make sets of shards, check them, look into them.",
        _DATA,
        (
            Command("build", shards.build, _DATA),
            Command("check", shards.check, _DATA),
            Command("info", shards.info, _DATA),
        ),
    ),
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from petractl import __version__

        sys.stdout.write(f"petractl {__version__}\n")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Train deep nets by PETRA and its relatives: decoupled, reversible, without activation buffers.

    Try it: petractl run digits_revnet18
    """


def make_app() -> typer.Typer:
    """Return the command line; its help is drawn on a terminal and plain text anywhere else."""
    app = typer.Typer(
        name="petractl",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_root)
    for command in COMMANDS:
        app.command(command.name, rich_help_panel=command.heading, no_args_is_help=False)(
            guarded(command.body)
        )
    for group in GROUPS:
        app.add_typer(_make_group(group), name=group.name, help=group.help, rich_help_panel=group.heading)
    return app


def _make_group(group: Group) -> typer.Typer:
    made = typer.Typer(no_args_is_help=True, add_completion=False)
    for command in group.commands:
        made.command(command.name, no_args_is_help=False)(guarded(command.body))
    return made


app = make_app()


def main() -> None:
    """Run the command line."""
    app(prog_name="petractl")
