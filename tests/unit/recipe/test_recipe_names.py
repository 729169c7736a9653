"""The names that a recipe may use without importing torch are those that the registries have."""

import dataclasses

from petractl.data.registry import list_datasets
from petractl.engine.exact_rules import EXACT_SCHEDULES, stages_per_process
from petractl.engine.wire import FORMATS
from petractl.estimator import GUESSES, PROJECTIONS, SPACES, TARGETS, Estimator
from petractl.methods.family import METHODS, method_names
from petractl.models.auxiliary import AUXILIARY_NETS
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
    assert set(schema.BLOCK_METHODS) == {spec.name for spec in METHODS if spec.blocks}
    assert options("method", "keep") == {spec.keep for spec in METHODS if spec.keep}


def test_auxiliary_nets() -> None:
    assert schema.AUXILIARY_NAMES == AUXILIARY_NETS


def test_keys_of_an_estimator_are_those_of_the_section() -> None:
    for field in dataclasses.fields(Estimator):
        key = schema.MethodSection.model_fields[field.name]
        assert key.default == field.default
    assert options("method", "target") == set(TARGETS)
    assert options("method", "guess") == set(GUESSES)
    assert options("method", "space") == set(SPACES)
    assert options("method", "projection") == set(PROJECTIONS)


def test_optimizers_and_decays() -> None:
    assert set(schema.OPTIMIZER_NAMES) == set(OPTIMIZERS)
    assert options("training", "lr_decay") == set(DECAYS)


def test_exact_schedules() -> None:
    assert schema.EXACT_SCHEDULE_NAMES == EXACT_SCHEDULES
    for name in EXACT_SCHEDULES:
        assert schema.STAGES_PER_PROCESS.get(name, 1) == stages_per_process(name)


def test_wire_formats() -> None:
    assert options("engine", "wire_dtype") == set(FORMATS)
    assert {"", *options("engine", "wire_dtype")} == options("engine", "wire_dtype_backward")
