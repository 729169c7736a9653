"""Models: units, the zoo of nets cut into units, models of the user's own, and weights on disk."""

# Importing a module of the zoo registers its models.
from petractl.models import iso, resnet, revnet

__all__ = ["iso", "resnet", "revnet"]
