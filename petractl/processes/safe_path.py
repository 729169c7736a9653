"""Where the processes that petractl starts look for modules: not in the folder in which it was called.

`python -m` puts that folder first. It may be one that a stranger made, such as a downloaded run; a `torch.py`
in it would be run in place of torch. What a recipe names there ("nets:my_net") is found all the same: the
code that reads such names adds the folder, after everything of ours is imported.
"""

import os
from pathlib import Path


def safe_path() -> dict[str, str]:
    """Return the variables to start Python with; petractl itself is found wherever it lies."""
    places = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, places)))}
