"""`petractl resume`: go on with a run."""

import typer

from petractl.cli.options import RunArgument, SetOption
from petractl.interrupts import sigterm_obeyed


def command(run: RunArgument, overrides: SetOption = None) -> None:
    """Continue a run from its last checkpoint.

    Ends with the same numbers as a run that was never stopped. Without a checkpoint it starts again; a
    finished run stays as it is. --set may change what does not make it another run: stages and cuts, mode,
    schedule, devices and threads, epochs, checkpoints, tracking. So a run of several processes goes on in one
    (--set engine.mode=in-process), or in another number of them (--set partition.stages=4).
    """
    with sigterm_obeyed():
        from petractl import launch

        code = launch.resume(run, overrides=overrides or [])
    if code:
        raise typer.Exit(code)
