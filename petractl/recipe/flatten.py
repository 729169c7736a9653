"""A recipe without its sections, key by key: what two recipes are compared by, and what a tracker keeps."""

import json
from typing import Any

from petractl.recipe.schema import Recipe


def flattened(recipe: Recipe) -> dict[str, Any]:
    """Return every key as `section.key`, with its value as JSON has it."""
    values = recipe.model_dump(mode="json")
    return {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()}


def as_parameters(recipe: Recipe) -> dict[str, str]:
    """Return every key as `section.key`, with its value as text; credentials are not hidden."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in flattened(recipe).items()
    }
