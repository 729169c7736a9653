"""Put cuts into a recipe's text, and leave every other line, comments too, as it is."""

import re
from pathlib import Path
from typing import Any

import tomli

from petractl.errors import UserError
from petractl.recipe.load import load_recipe

_HEADER = re.compile(r"\s*\[\s*partition\s*\]\s*(#.*)?")
_ANY_HEADER = re.compile(r"\s*\[")
_KEY = re.compile(r"\s*(stages|cuts|balance)\s*=")


def partition_stanza(cuts: tuple[int, ...]) -> str:
    """Return the section to paste."""
    return f"[partition]\n{_line(cuts)}\n"


def write_cuts(path: Path, cuts: tuple[int, ...]) -> None:
    """Set the cuts in the recipe at `path`; keys that contradict them go.

    Raises:
        UserError: it cannot be written, would not be a valid recipe, or says the partition in a form that is
            not understood here.
    """
    text = path.read_text(encoding="utf-8")
    new = with_cuts(text, cuts)
    wanted = _without_rule(tomli.loads(text))
    wanted["partition"] |= {"cuts": list(cuts)} if cuts else {"stages": 1}
    if _loads(new) != wanted:
        raise UserError(
            "its partition is not written as a [partition] section of plain lines",
            where=str(path),
            hint=f"paste this instead:\n{partition_stanza(cuts)}",
        )
    draft = path.with_name(f".{path.name}.new")
    try:
        draft.write_text(new, encoding="utf-8")
        try:
            load_recipe(draft)
        except UserError as error:
            raise UserError(
                error.what.replace(str(draft), str(path)), where=str(path), hint=error.hint
            ) from None
        draft.replace(path)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path)) from None
    finally:
        draft.unlink(missing_ok=True)


def with_cuts(text: str, cuts: tuple[int, ...]) -> str:
    """Return the recipe's text with these cuts in its [partition] section, added if there is none."""
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if _HEADER.fullmatch(line)), None)
    if start is None:
        gap = "" if not text or text.endswith("\n\n") else "\n" if text.endswith("\n") else "\n\n"
        return f"{text}{gap}{partition_stanza(cuts)}"
    end = next((n for n in range(start + 1, len(lines)) if _ANY_HEADER.match(lines[n])), len(lines))
    body = _without_keys(lines[start + 1 : end])
    return "\n".join([*lines[: start + 1], _line(cuts), *body, *lines[end:]]) + "\n"


def _loads(text: str) -> dict[str, Any] | None:
    try:
        return tomli.loads(text)
    except ValueError:
        return None


def _line(cuts: tuple[int, ...]) -> str:
    # No cuts at all would leave the number of stages to a rule.
    return f"cuts = [{', '.join(map(str, cuts))}]" if cuts else "stages = 1"


def _without_keys(lines: list[str]) -> list[str]:
    """Return the lines without the keys that choose the cuts, values over several lines included."""
    result, depth = [], 0
    for line in lines:
        bare = line.partition("#")[0]
        if depth > 0 or _KEY.match(line):
            depth += bare.count("[") - bare.count("]")
            continue
        result.append(line)
    return result


def _without_rule(data: dict[str, Any]) -> dict[str, Any]:
    section = data.setdefault("partition", {})
    for key in ("stages", "cuts", "balance"):
        section.pop(key, None)
    return data
