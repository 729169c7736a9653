"""The options of `petractl simulate`."""

from pathlib import Path
from typing import Annotated

import typer

MAX_STAGES = 16384
MAX_ACCUMULATION = 65536
MAX_MICROBATCHES = 1_000_000
MAX_MS = 1e9
MAX_KIB = 1e9
MAX_JITTER = 10.0
ACCUMULATION = 32
"""Microbatches per update where nothing says how many."""

RecipeOrNone = Annotated[
    str | None,
    typer.Argument(help="A recipe's pipeline; or give --stages and times.", show_default=False),
]
Stages = Annotated[int | None, typer.Option(min=1, max=MAX_STAGES, help="Number of stages.")]
ForwardMs = Annotated[
    str | None,
    typer.Option(metavar="MS", help="Forward of one microbatch on a stage; one number, or one per stage."),
]
BackwardMs = Annotated[
    str | None,
    typer.Option(metavar="MS", help="Its backward, reconstruction included, as PETRA does it."),
]
PlainBackwardMs = Annotated[
    str | None,
    typer.Option(metavar="MS", help="Its backward where the graph is kept; default: one forward less."),
]
UpdateMs = Annotated[float, typer.Option(min=0, max=MAX_MS, help="One update of a stage.")]
Speeds = Annotated[
    str | None, typer.Option(metavar="LIST", help="Speed of each stage's device; 1 is as given or measured.")
]
MessageKib = Annotated[float, typer.Option(min=0, max=MAX_KIB, help="Size of a message, with --stages.")]
Flops = Annotated[bool, typer.Option("--flops", help="A recipe's times from FLOPs; measure nothing.")]
DeviceSpecs = Annotated[
    str, typer.Option(metavar="FILE|NAME", help="A recipe's devices, as for `petractl partition`.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again, whatever is cached.")]
LatencyMs = Annotated[float | None, typer.Option(min=0, max=MAX_MS, help="Time of a message on its way.")]
BandwidthGbps = Annotated[
    float | None, typer.Option(min=0, help="Gigabits per second of a link; 0 = unlimited.")
]
Jitter = Annotated[float, typer.Option(min=0, max=MAX_JITTER, help="Relative standard deviation of times.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the jitter.")]
Microbatches = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_MICROBATCHES,
        help="An epoch of so many, filled and drained; default: the steady state.",
    ),
]
Accumulation = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_ACCUMULATION,
        help=f"Microbatches per update, with --stages; default: {ACCUMULATION}.",
    ),
]
Schedules = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="tight,paper,slack=1,least,[2,1,0],delayed,plain,gpipe,1f1b and more."),
]
Sweep = Annotated[str | None, typer.Option(metavar="LIST", help="Numbers of equal stages: 2,4,...,4096.")]
CompareRun = Annotated[
    Path | None, typer.Option(metavar="RUN", help="Set what a run measured beside the prediction.")
]
Gantt = Annotated[Path | None, typer.Option(metavar="F.png", help="Draw who does what when.")]
Trace = Annotated[
    Path | None, typer.Option(metavar="F.json", help="Write it for chrome://tracing and Perfetto.")
]
Plot = Annotated[Path | None, typer.Option(metavar="F.png", help="Draw the sweep.")]
