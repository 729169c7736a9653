"""Models: units, the zoo of nets cut into units, models of the user's own, and weights on disk."""

# Importing a module of the zoo registers its models.
from petractl.models import blocks, iso, resnet, revnet

__all__ = ["blocks", "iso", "resnet", "revnet"]
