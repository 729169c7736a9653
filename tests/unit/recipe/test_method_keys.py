"""The keys of methods that train block by block: what they mean, contradict, and leave without effect."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from petractl.errors import RecipeError
from petractl.estimator import (
    GUESSES,
    LOCAL,
    PROJECTIONS,
    SPACES,
    TARGETS,
    Estimator,
    is_allowed,
)
from petractl.recipe import load_recipe, render
from petractl.recipe.checks import find_conflicts, idle_keys
from petractl.recipe.load import LoadedRecipe
from petractl.recipe.schema import ESTIMATOR_KEYS, AuxiliarySection, MethodSection

FORWARD_GRADIENT = "method.name=forward-gradient"
ONE = ("method.tangents=one",)
FG_RECIPES = {
    "cifar10_fg_global_global": Estimator(guess="global"),
    "cifar10_fg_global_local_activation": Estimator(coefficients="sample"),
    "cifar10_fg_global_local_batch_weight": Estimator(space="batch-weight"),
    "cifar10_fg_global_ntk_activation": Estimator(guess="ntk", coefficients="sample"),
    "cifar10_fg_global_random_activation": Estimator(guess="random-gaussian", coefficients="sample"),
    "cifar10_fg_global_random_weight_net": Estimator(
        guess="random-gaussian", space="batch-weight", granularity="net"
    ),
    "cifar10_local": LOCAL,
    "digits_fg": Estimator(),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text('[model]\nname = "resnet18-8b"\n[data]\n[method]\n')
    return path


def load(file: Path, *overrides: str) -> LoadedRecipe:
    return load_recipe(file, overrides=overrides)


def refused(file: Path, *overrides: str) -> dict[str, str]:
    """Return what is wrong with a recipe, key by key."""
    with pytest.raises(RecipeError) as caught:
        load(file, *overrides)
    return {problem.key: f"{problem.what}; {problem.hint}" for problem in caught.value.problems}


def warned(file: Path, *overrides: str) -> dict[str, str]:
    """Return the keys without effect, with the reason."""
    return {warning.key: warning.what for warning in load(file, *overrides).warnings}


def test_the_section_gives_the_estimator(file) -> None:
    assert load(file, FORWARD_GRADIENT).recipe.method.estimator == Estimator()
    chosen = load(file, FORWARD_GRADIENT, "method.guess=random-rademacher", "method.directions=3").recipe
    assert chosen.method.estimator == Estimator(guess="random-rademacher", directions=3)
    assert load(file, "method.name=local").recipe.method.estimator is LOCAL
    for name in ("petra", "delayed", "reversible", "backprop"):
        assert MethodSection(name=name).estimator is None


def test_a_mistyped_choice_gets_a_suggestion(file) -> None:
    found = refused(file, FORWARD_GRADIENT, "method.guess=random-gausian", "method.target=nothing")
    assert "did you mean random-gaussian?" in found["method.guess"]
    assert found["method.target"].startswith('must be "global", "local", "above" or "sum", not "nothing"')


@pytest.mark.parametrize("name", ["petra", "local"])
@pytest.mark.parametrize("key", ESTIMATOR_KEYS)
def test_the_keys_are_for_forward_gradients(file, name, key) -> None:
    default = next(field.default for field in dataclasses.fields(Estimator) if field.name == key)
    value = str(default).lower()
    found = refused(file, f"method.name={name}", f"method.{key}={value}")
    assert (
        f'is for method.name = "forward-gradient" only, but the method is "{name}"' in found[f"method.{key}"]
    )


def test_a_contradiction_of_choices_is_told_with_its_key(file) -> None:
    found = refused(file, FORWARD_GRADIENT, "method.directions=2", "method.granularity=block")
    assert set(found) == {"method.directions", "method.granularity"}
    assert '2 draws are averaged, but the guess "local" is not drawn' in found["method.directions"]
    found = refused(
        file,
        FORWARD_GRADIENT,
        "method.coefficients=sample",
        "method.statistics=live",
        "method.derivative=forward",
    )
    assert set(found) == {"method.statistics"}
    found = refused(file, FORWARD_GRADIENT, "method.projection=span")
    assert '"span" projects on several guesses' in found["method.projection"]
    found = refused(
        file, FORWARD_GRADIENT, "method.guess=sum", "method.derivative=forward", "method.tangents=all"
    )
    assert "known only after it" in found["method.tangents"]


def test_a_wrong_choice_hides_what_hangs_on_it(file) -> None:
    found = refused(file, FORWARD_GRADIENT, "method.guess=random", "method.directions=4")
    assert set(found) == {"method.guess"}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("engine.mode=processes", "engine.mode"),
        ("engine.replicas=2", "engine.replicas"),
        ('engine.devices=["cpu", "cpu"]', "engine.devices"),
        ("engine.backend=gloo", "engine.backend"),
    ],
)
def test_one_tangent_at_a_time_takes_one_process(file, override, key) -> None:
    found = refused(file, FORWARD_GRADIENT, *ONE, override)
    assert set(found) == {key}
    assert "each block looks through all blocks above it, which takes one process" in found[key]
    assert 'set method.tangents = "all", or take' in found[key]
    load(file, FORWARD_GRADIENT, override)
    load(file, FORWARD_GRADIENT, *ONE, "engine.mode=in-process")


def test_a_guess_from_above_in_forward_mode_takes_one_process(file) -> None:
    above = ("method.guess=above", "method.derivative=forward")
    found = refused(file, FORWARD_GRADIENT, *above, "engine.replicas=2")
    assert 'set method.derivative = "reverse"' in found["engine.replicas"]
    load(file, FORWARD_GRADIENT, "method.guess=above", "engine.replicas=2")


ALONE = [
    ("method.name=local",),
    (FORWARD_GRADIENT, "method.target=local"),
    (FORWARD_GRADIENT, "method.target=local", "method.guess=random-gaussian"),
    (FORWARD_GRADIENT, "method.projection=random-sign"),
    (FORWARD_GRADIENT, *ONE),
]


@pytest.mark.parametrize("choice", ALONE)
@pytest.mark.parametrize("schedule", ["sequential", "tight", "paper", "least", "[1, 0]"])
def test_where_nothing_comes_down_there_is_no_schedule(file, choice, schedule) -> None:
    found = refused(file, *choice, f"engine.schedule={schedule}")
    assert set(found) == {"engine.schedule"}
    assert 'must be "auto"' in found["engine.schedule"]
    assert "nothing comes down to a block" in found["engine.schedule"]


@pytest.mark.parametrize("choice", ALONE)
def test_where_nothing_comes_down_there_is_no_slack(file, choice) -> None:
    assert "must be 0" in refused(file, *choice, "engine.slack=1")["engine.slack"]
    assert "engine.slack" in warned(file, *choice, "engine.slack=0")
    assert "engine.wire_dtype_backward" in warned(file, *choice, "engine.wire_dtype_backward=int8")
    assert "engine.wire_dtype" not in warned(file, *choice, "engine.wire_dtype=int8")
    assert "method.accumulation" not in warned(file, *choice, "method.accumulation=4")


@pytest.mark.parametrize("choice", [(), ("method.guess=global",), ("method.derivative=reverse",)])
def test_what_comes_down_may_be_late(file, choice) -> None:
    for schedule in ("auto", "sequential", "tight", "paper", "[1, 0]"):
        loaded = load(file, FORWARD_GRADIENT, *choice, f"engine.schedule={schedule}")
        assert loaded.warnings == ()
    assert load(file, FORWARD_GRADIENT, *choice, "engine.schedule=tight", "engine.slack=1").warnings == ()
    found = refused(file, FORWARD_GRADIENT, *choice, "engine.schedule=least")
    assert "is not measured" in found["engine.schedule"]
    found = refused(file, FORWARD_GRADIENT, *choice, "engine.schedule=gpipe", "method.accumulation=4")
    assert 'is for method.name = "backprop" only' in found["engine.schedule"]


def test_slack_is_of_tight_alone(file) -> None:
    found = refused(file, FORWARD_GRADIENT, "engine.slack=1")
    assert set(found) == {"engine.slack"}
    assert 'the schedule is "auto", which is "sequential" for this method' in found["engine.slack"]
    found = refused(file, FORWARD_GRADIENT, "engine.slack=1", "engine.schedule=paper")
    assert set(found) == {"engine.slack"}


@pytest.mark.parametrize("name", ["local", "forward-gradient"])
@pytest.mark.parametrize("balance", ["time", "memory"])
def test_nothing_is_measured_to_cut_blocks(file, name, balance) -> None:
    for stages in ("auto", "4"):
        found = refused(
            file, f"method.name={name}", f"partition.balance={balance}", f"partition.stages={stages}"
        )
        assert set(found) == {"partition.balance"}
        assert "is planned for a backward pass" in found["partition.balance"]
    for units in ("partition.stages=units", "partition.cuts=[1, 2]"):
        keys = warned(file, f"method.name={name}", f"partition.balance={balance}", units)
        assert set(keys) == {"partition.balance"}
    assert warned(file, f"method.name={name}", "partition.balance=parameters", "partition.stages=4") == {}


@pytest.mark.parametrize("name", ["local", "forward-gradient"])
def test_keys_of_the_other_methods(file, name) -> None:
    assert (
        'is for method.name = "delayed" only'
        in refused(file, f"method.name={name}", "method.keep=graph")["method.keep"]
    )
    assert set(warned(file, f"method.name={name}", "method.bn_statistics=forward")) == {
        "method.bn_statistics"
    }


RANDOM = "method.guess=random-gaussian"


@pytest.mark.parametrize(
    ("choice", "idle"),
    [
        (("method.target=above", "method.projection=random-sign"), {"target"}),
        (("method.directions=1",), {"directions"}),
        (("method.normalise_random=false",), {"normalise_random"}),
        ((RANDOM, "method.directions=1", "method.normalise_random=false"), set()),
        ((RANDOM, "method.projection=span", "method.directions=2", "method.space=batch-weight"), set()),
        (
            (
                RANDOM,
                "method.projection=span",
                "method.directions=2",
                "method.space=batch-weight",
                "method.normalise_random=true",
            ),
            {"normalise_random"},
        ),
        (("method.granularity=tensor",), {"granularity"}),
        (("method.granularity=tensor", "method.space=weight"), set()),
        (("method.coefficients=sample",), set()),
        (("method.coefficients=sample", "method.space=weight"), {"coefficients"}),
        (("method.guess=global", "method.space=weight"), {"space"}),
        (("method.guess=global", "method.coefficients=sample"), {"coefficients"}),
        (("method.guess=global", "method.statistics=held"), {"statistics"}),
        (("method.guess=global", "method.derivative=reverse"), {"derivative"}),
        (("method.guess=global", "method.tangents=all"), {"tangents"}),
        (("method.guess=global", "method.projection=sign", "method.statistics=live"), set()),
        (("method.projection=random-sign", "method.statistics=live"), {"statistics"}),
        (("method.projection=random-sign", "method.derivative=forward"), {"derivative"}),
        (("method.derivative=reverse", "method.statistics=held"), set()),
        (("method.derivative=reverse", "method.tangents=one"), {"tangents"}),
        (("method.target=local", RANDOM, "method.derivative=forward"), set()),
        (("method.target=local", RANDOM, "method.tangents=all"), {"tangents"}),
        (("method.tangents=all",), set()),
    ],
)
def test_choices_that_change_nothing_are_warned_of(file, choice, idle) -> None:
    assert set(warned(file, FORWARD_GRADIENT, *choice)) == {f"method.{key}" for key in idle}


@pytest.mark.parametrize(
    ("choice", "override", "idle"),
    [
        (("method.name=petra",), "auxiliary.name=mlp", True),
        (("method.name=local",), "auxiliary.name=mlp", False),
        ((FORWARD_GRADIENT,), "auxiliary.name=mlp", False),
        ((FORWARD_GRADIENT, RANDOM), "auxiliary.name=mlp", True),
        ((FORWARD_GRADIENT, RANDOM, "method.target=sum"), "auxiliary.name=mlp", False),
        ((FORWARD_GRADIENT, "method.guess=ntk"), "auxiliary.width=8", False),
        ((FORWARD_GRADIENT, "method.guess=global"), "auxiliary.width=8", True),
        ((FORWARD_GRADIENT,), "auxiliary.arguments={}", True),
        (("method.name=local", "auxiliary.name=linear"), "auxiliary.width=0", True),
        (("method.name=local", "auxiliary.name=my.nets:small"), "auxiliary.arguments={a = 1}", False),
    ],
)
def test_auxiliary_nets_are_for_those_who_use_them(file, choice, override, idle) -> None:
    key = override.partition("=")[0]
    assert set(warned(file, *choice, override)) == ({key} if idle else set())


def test_auxiliary_nets_have_their_own_keys(file) -> None:
    assert "did you mean linear?" in refused(file, "auxiliary.name=linaer")["auxiliary.name"]
    assert '"package.module:function"' in refused(file, "auxiliary.name=a:b:c")["auxiliary.name"]
    local = "method.name=local"
    found = refused(file, local, "auxiliary.name=copy", "auxiliary.width=8", "auxiliary.arguments={a = 1}")
    assert '8 is for "cnn" and "mlp", but the net is "copy"; take it out' in found["auxiliary.width"]
    assert "are for a net of your own" in found["auxiliary.arguments"]
    found = refused(file, local, "auxiliary.name=my.nets:small", "auxiliary.width=8")
    assert "give it in auxiliary.arguments" in found["auxiliary.width"]
    assert "at least 0" in refused(file, "auxiliary.width=-1")["auxiliary.width"]


@pytest.mark.parametrize("name", ["petra", "local", "forward-gradient"])
@pytest.mark.parametrize("comments", [True, False])
def test_a_rendered_recipe_loads_back_without_a_warning(file, name, comments) -> None:
    loaded = load(file, f"method.name={name}")
    file.write_text(render(loaded.recipe, comments=comments))
    again = load(file)
    assert again.recipe == loaded.recipe
    assert again.warnings == ()


def test_a_recipe_allows_the_choices_that_the_estimator_allows() -> None:
    keys = {"target": TARGETS, "guess": GUESSES, "space": SPACES, "projection": PROJECTIONS}
    keys["derivative"] = ("auto", "forward")
    base = load_recipe("digits_fg").recipe
    for values in itertools.product(*keys.values()):
        choice = Estimator(**dict(zip(keys, values, strict=True)))
        method = MethodSection(name="forward-gradient", **dataclasses.asdict(choice))
        recipe = base.model_copy(update={"method": method})
        idle = {key.key for key in idle_keys(recipe)}
        assert "method.projection" not in idle
        assert "method.guess" not in idle
        assert is_allowed(choice) == (not list(find_conflicts(recipe)))


def test_a_key_without_effect_is_shown_as_a_comment(file) -> None:
    text = render(load(file, FORWARD_GRADIENT, "method.guess=global").recipe)
    assert '# space = "activation"   (no effect with one target and guess, "global")' in text
    assert '# name = "cnn"   (no effect with method.target = "global" and method.guess = "global")' in text
    text = render(load(file, "method.name=local").recipe)
    assert '# target = "global"   (no effect with method.name = "local")' in text
    assert '\nname = "cnn"\n' in text
    assert '# slack = 0   (no effect with method.name = "local")' in text


@pytest.mark.parametrize("name", FG_RECIPES)
def test_the_shipped_recipes_have_the_choices_of_their_names(name) -> None:
    recipe = load_recipe(name).recipe
    assert recipe.method.estimator == FG_RECIPES[name]
    assert recipe.model.name == "resnet18-8b"
    assert recipe.partition.stages == "units"
    assert recipe.auxiliary == AuxiliarySection()


@pytest.mark.parametrize("name", [name for name in FG_RECIPES if name.startswith("cifar10")])
def test_the_recipes_of_the_paper_have_its_setting(name) -> None:
    recipe = load_recipe(name).recipe
    optimizer, training = recipe.optimizer, recipe.training
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.05, 0.9, False)
    assert (optimizer.weight_decay, recipe.data.batch_size, training.epochs) == (5e-4, 128, 100)
    assert (training.lr_decay, training.milestones, training.decay_factor) == (
        "multi-step",
        (30, 60, 90),
        0.2,
    )


@pytest.mark.parametrize("name", [name for name in FG_RECIPES if "activation" in name])
def test_the_authors_own_target_is_two_keys_away(name) -> None:
    authors = ["method.statistics=live", "method.derivative=reverse"]
    assert load_recipe(name, overrides=authors).warnings == ()
    text = load_recipe(name).text
    assert all(f"--set {override}" in text for override in authors)
