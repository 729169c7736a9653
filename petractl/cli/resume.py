"""`petractl resume`: go on with a run."""

import typer

from petractl.cli.options import RunArgument, SetOption


def command(run: RunArgument, overrides: SetOption = None) -> None:
    """Continue a run from its last checkpoint.

    Ends with the same numbers as a run that was never stopped. Without a checkpoint it starts again; a
    finished run stays as it is. Keys that may change: stages, cuts, device, epochs, tracking.
    """
    from petractl import launch

    code = launch.resume(run, overrides=overrides or [])
    if code:
        raise typer.Exit(code)
