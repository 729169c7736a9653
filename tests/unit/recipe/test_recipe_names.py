"""The names that a recipe may use without importing torch are those that the registries have."""

from petractl.data.registry import list_datasets
from petractl.methods.family import METHODS, method_names
from petractl.models.registry import STEMS, list_models
from petractl.optim import DECAYS, OPTIMIZERS
from petractl.recipe import schema


def options(section: str, key: str) -> set[str]:
    return set(schema.SECTIONS[section].model_fields[key].annotation.__args__)


def test_models() -> None:
    assert set(schema.MODEL_NAMES) == set(list_models())
    assert options("model", "stem") == {"auto", *STEMS}


def test_datasets() -> None:
    assert set(schema.DATASET_NAMES) == set(list_datasets())


def test_methods() -> None:
    assert set(schema.METHOD_NAMES) == set(method_names())
    assert set(schema.LOCKED_METHODS) == {spec.name for spec in METHODS if spec.locked}
    assert options("method", "keep") == {spec.keep for spec in METHODS if spec.keep}


def test_optimizers_and_decays() -> None:
    assert set(schema.OPTIMIZER_NAMES) == set(OPTIMIZERS)
    assert options("training", "lr_decay") == set(DECAYS)
