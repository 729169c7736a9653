"""Put a plan into a recipe's text, and leave everything else, comments and line endings too, as it is."""

import shutil
from pathlib import Path
from typing import Any

import tomli
import tomlkit
from tomlkit.exceptions import TOMLKitError

from petractl.errors import UserError
from petractl.recipe.load import load_recipe

_RULE_KEYS = ("stages", "cuts", "balance")


def partition_stanza(cuts: tuple[int, ...], *, replicas: int = 1) -> str:
    """Return the sections to paste."""
    copies = f"\n[engine]\nreplicas = {replicas}\n" if replicas > 1 else ""
    return f"[partition]\n{_line(cuts)}\n{copies}"


def write_cuts(path: Path, cuts: tuple[int, ...], *, replicas: int | None = None) -> None:
    """Set the cuts in the recipe at `path`, and the replicas if given; keys that contradict the cuts go.

    Raises:
        UserError: it cannot be written, would not be a valid recipe, or says the partition in a form that is
            not understood here.
    """
    path = path.resolve()  # a link stays one
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path)) from None
    new = with_cuts(text, cuts, replicas=replicas)
    wanted = _wanted(text, cuts, replicas)
    if wanted is None or _loads(new) != wanted:
        raise UserError(
            "its partition is not written as a [partition] section of plain lines",
            where=str(path),
            hint=f"paste this instead:\n{partition_stanza(cuts, replicas=replicas or 1)}",
        )
    _replace(path, new)


def with_cuts(text: str, cuts: tuple[int, ...], *, replicas: int | None = None) -> str:
    """Return the recipe's text with these cuts in its [partition] section, added if there is none."""
    # The library ends new lines with "\n" whatever the others end with.
    windows = "\r\n" in text
    try:
        document = tomlkit.parse(text.replace("\r\n", "\n"))
        _set_cuts(_section(document, "partition"), cuts)
        if replicas is not None and (replicas > 1 or "replicas" in document.get("engine", {})):
            _section(document, "engine")["replicas"] = replicas
        new = tomlkit.dumps(document)
    except (TOMLKitError, AttributeError, TypeError):
        return text  # a form that is not understood: the caller sees that nothing has changed
    return new.replace("\n", "\r\n") if windows else new


def _section(document: tomlkit.TOMLDocument, name: str) -> Any:
    if name not in document:
        if document.as_string() and not document.as_string().endswith("\n\n"):
            document.add(tomlkit.nl())
            if not document.as_string().endswith("\n\n"):
                document.add(tomlkit.nl())
        document.add(name, tomlkit.table())
    return document[name]


def _set_cuts(section: Any, cuts: tuple[int, ...]) -> None:
    """Set the cuts and remove what chose them; what was said of a removed key is said of its successor."""
    # No cuts at all would leave the number of stages to a rule.
    key, value = ("cuts", list(cuts)) if cuts else ("stages", 1)
    said = []
    for old in _RULE_KEYS:
        if old in section and old != key:
            said.append(section.item(old).trivia.comment.lstrip("# "))
            section.remove(old)
    if key in section:
        said.insert(0, section.item(key).trivia.comment.lstrip("# "))
    section[key] = value
    words = "; ".join(text for text in said if text)
    if words:
        section.item(key).comment(words)


def _line(cuts: tuple[int, ...]) -> str:
    return f"cuts = [{', '.join(map(str, cuts))}]" if cuts else "stages = 1"


def _loads(text: str) -> dict[str, Any] | None:
    try:
        return tomli.loads(text)
    except ValueError:
        return None


def _wanted(text: str, cuts: tuple[int, ...], replicas: int | None) -> dict[str, Any] | None:
    data = _loads(text)
    section = None if data is None else data.setdefault("partition", {})
    if data is None or not isinstance(section, dict):
        return None
    for key in _RULE_KEYS:
        section.pop(key, None)
    section |= {"cuts": list(cuts)} if cuts else {"stages": 1}
    if replicas is not None and (replicas > 1 or "replicas" in data.get("engine", {})):
        data.setdefault("engine", {})["replicas"] = replicas
    return data


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.new")
    try:
        draft.write_bytes(text.encode("utf-8"))
        shutil.copymode(path, draft)
        try:
            load_recipe(draft)
        except UserError as error:
            what = error.what.replace(str(draft), str(path))
            raise UserError(what, where=str(path), hint=error.hint) from None
        draft.replace(path)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path)) from None
    finally:
        draft.unlink(missing_ok=True)
