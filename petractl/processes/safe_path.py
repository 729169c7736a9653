"""Where the processes that petractl starts look for modules: not in the folder in which it was called.

`python -m` puts that folder first. It may be one that a stranger made, such as a downloaded run; a `torch.py`
in it would be run in place of torch. What a recipe names there ("nets:my_net") is found all the same: the
code that reads such names adds the folder, after everything of ours is imported.
"""

import os
from pathlib import Path


def safe_path(python_path: str | None = None) -> dict[str, str]:
    """Return the variables to start Python with; petractl itself is found wherever it lies.

    `python_path` is the PYTHONPATH that the process would have, None for this one's.
    """
    given = os.environ.get("PYTHONPATH", "") if python_path is None else python_path
    places = [str(Path(__file__).parents[2]), *given.split(os.pathsep)]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, places)))}
