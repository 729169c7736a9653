"""The options of `petractl partition`."""

from pathlib import Path
from typing import Annotated

import typer

MAX_GPUS = 16384
MAX_AHEAD = 65536

Model = Annotated[str, typer.Option("--model", metavar="NAME", help="A model of `petractl ls models`.")]
Gpus = Annotated[int, typer.Option("--gpus", metavar="N", help="Number of devices.")]
Method = Annotated[str, typer.Option("--method", help="A method of `petractl ls methods`.")]
Keep = Annotated[str, typer.Option("--keep", help='What "delayed" keeps.')]
Schedule = Annotated[str, typer.Option("--schedule", help="Schedule, or lookaheads such as 3,2,1,0.")]
Accumulation = Annotated[
    int, typer.Option("--accumulation", "-k", min=1, max=65536, help="Microbatches per update.")
]
Batch = Annotated[int, typer.Option("--batch", min=2, max=2**20, help="Samples per microbatch.")]
ImageSize = Annotated[int, typer.Option("--image-size", min=1, max=2**14, help="Side of the images.")]
Classes = Annotated[int, typer.Option("--classes", min=1, max=2**24, help="Number of classes.")]
Width = Annotated[int, typer.Option("--width", min=1, max=2**14, help="Channels of the stem per stream.")]
Depth = Annotated[int, typer.Option("--depth", min=1, max=4096, help="Blocks of revnet-iso.")]
Stem = Annotated[str, typer.Option("--stem", help='"auto", "cifar" or "imagenet".')]
Balance = Annotated[
    str, typer.Option("--balance", help="What is made even: time, flops, memory, parameters, uniform.")
]
Cuts = Annotated[str, typer.Option("--cuts", metavar="A,B", help="Cuts to look at, not to choose.")]
Replicas = Annotated[str, typer.Option("--replicas", metavar="R|auto", help="Copies of the pipeline.")]
Flops = Annotated[bool, typer.Option("--flops", help="Plan from FLOPs; measure nothing.")]
DeviceSpecs = Annotated[
    str, typer.Option("--device-spec", metavar="FILE|NAME", help="Devices that are not here.")
]
MemoryGib = Annotated[
    float, typer.Option("--memory-gib", min=0.0, help="Memory per device; 0 = the device's.")
]
Optimizer = Annotated[str, typer.Option("--optimizer", help="sgd, adamw or lars.")]
Device = Annotated[str, typer.Option("--device", help="Where to measure.")]
Threads = Annotated[
    int, typer.Option("--threads", min=0, max=4096, help="CPU threads per process; 0 = as in `run`.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again, whatever is cached.")]
Write = Annotated[
    Path | None, typer.Option("--write", metavar="RECIPE", help="Put the cuts into this recipe.")
]
