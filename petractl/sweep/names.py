"""Names of cells: what a cell sets, as a folder's name that a person can read and a shell needs not quote.

    target=global,guess=local,seed=0      method=backprop,seed=0      schedule=2-1-0

A name depends on the cell alone and on the keys of the grid, so that the same sweep finds its folders again.
"""

import hashlib
import re
from collections.abc import Sequence

from petractl.sweep.grid import SEED_KEY, Assignment, Setting
from petractl.tracking.masking import mask_credentials

_LONGEST = 120  # characters; file systems take 255 bytes
_DIGEST = 8


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return the last word of every key, the section's for `name`; the whole key where two would be equal."""
    short = {key: _last_word(key) for key in keys}
    words = list(short.values())
    return {key: word if words.count(word) == 1 else key for key, word in short.items()}


def setting_names(settings: Sequence[Setting], keys: Sequence[str]) -> list[str]:
    """Return a name for each setting, all different; "recipe" for one that sets nothing."""
    short = short_keys(keys)
    names = [",".join(f"{short[e.key]}={_word(e)}" for e in s.assignments) or "recipe" for s in settings]
    names = [_limited(name) for name in names]
    return [
        name if names.count(name) == 1 else f"{name}-{_digest(setting.identity)}"
        for name, setting in zip(names, settings, strict=True)
    ]


def cell_name(setting_name: str, seed: int | None) -> str:
    """Return the name of one run of a setting."""
    return setting_name if seed is None else f"{setting_name},{_last_word(SEED_KEY)}={seed}"


def _last_word(key: str) -> str:
    section, *rest = key.split(".")
    word = section if rest == ["name"] else rest[-1]
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", word) or section


def _word(assignment: Assignment) -> str:
    """Return a value in letters that mean nothing to a file system or a shell."""
    value = assignment.value
    text = mask_credentials(value if isinstance(value, str) else assignment.text)
    word = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)
    if not isinstance(value, str):
        return word.strip("-") if isinstance(value, (list, dict)) else word
    return word if word == text and text else f"{word.strip('-')}-{_digest(text)}".strip("-")


def _limited(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - _DIGEST - 1]}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]
