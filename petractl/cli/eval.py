"""`petractl eval`: loss and accuracy of a run's weights on the test data."""

import json

from petractl.cli.options import BestOption, JsonOption, RunArgument
from petractl.cli.report import show_warning, write_out
from petractl.cli.table import write_table


def command(run: RunArgument, best: BestOption = False, as_json: JsonOption = False) -> None:
    """Evaluate a run's last (or best) checkpoint on its test data."""
    from petractl import results

    result = results.evaluate(run, best=best, warn=show_warning)
    if as_json:
        write_out(json.dumps({key: result[key] for key in ("loss", "top1", "top5", "samples")}))
        return
    row = (
        f"{result['loss']:.4f}",
        f"{result['top1']:.2f} %",
        f"{result['top5']:.2f} %",
        f"{result['samples']:,}",
    )
    write_table(("loss", "top-1", "top-5", "samples"), [row])
