"""`petractl export`: a run's weights as one safetensors file."""

from pathlib import Path
from typing import Annotated

import typer

from petractl.cli.options import BestOption, RunArgument
from petractl.cli.report import show_warning, write_out


def command(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The safetensors file to write.")],
    best: BestOption = False,
) -> None:
    """Write a run's weights as plain tensors, named by unit.

    Equal weights give equal bytes; petractl is not needed to load them.
    """
    from petractl import results

    result = results.export(run, out=out, best=best, warn=show_warning)
    size = f"{result['tensors']:,} tensors, {result['parameters']:,} parameters, {result['bytes']:,} bytes"
    write_out(f"{result['path']}: {size}\nsha256 {result['sha256']}")
