from petractl.recipe.flatten import as_parameters, flattened
from petractl.recipe.load import load_recipe
from petractl.recipe.schema import SECTIONS


def test_every_key_is_there_as_text():
    overrides = ["partition.cuts=[2, 5]", "tracking.uri=http://bob:hunter2@host", "model.width=8"]
    recipe = load_recipe("digits_revnet18", overrides=overrides).recipe
    flat, texts = flattened(recipe), as_parameters(recipe)
    assert set(flat) == set(texts)
    assert set(flat) >= {f"{name}.{key}" for name, keys in SECTIONS.items() for key in keys.model_fields}
    assert (flat["model.width"], flat["partition.cuts"]) == (8, [2, 5])
    assert (texts["model.width"], texts["partition.cuts"]) == ("8", "[2, 5]")
    assert texts["data.name"] == "digits"
    assert texts["tracking.uri"] == "http://bob:hunter2@host"  # who sends it masks it
