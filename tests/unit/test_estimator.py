"""The choices of a forward gradient: what contradicts what, and what they ask of the engine."""

import dataclasses
import itertools

import pytest

from petractl.estimator import (
    FROM_ABOVE,
    GUESSES,
    LOCAL,
    PROJECTIONS,
    RANDOM_GUESSES,
    SPACES,
    TARGETS,
    Estimator,
    contradictions,
    is_allowed,
)

GRID = [
    Estimator(target=target, guess=guess, space=space, projection=projection, coefficients=coefficients)
    for target, guess, space, projection in itertools.product(TARGETS, GUESSES, SPACES, PROJECTIONS)
    for coefficients in (("batch", "sample") if space == "activation" else ("batch",))
]


def keys(**choice: object) -> list[str]:
    return [problem.key for problem in contradictions(Estimator(**choice))]


def test_of_the_grid_a_span_of_one_guess_and_random_signs_of_noise_make_no_sense():
    for choice in GRID:
        one = choice.space == "batch-weight" or (
            choice.space == "activation" and choice.coefficients == "batch"
        )
        found = [problem.key for problem in contradictions(choice)]
        noise = choice.projection == "random-sign" and choice.has_random_guess
        assert found == (["method.projection"] if (choice.projection == "span" and one) or noise else []), (
            choice
        )
        assert is_allowed(choice) == (not found)


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        ({"directions": 2}, ["method.directions"]),
        ({"normalise_random": True}, ["method.normalise_random"]),
        ({"guess": "ntk", "directions": 3, "normalise_random": True}, ["directions", "normalise_random"]),
        ({"guess": "random-gaussian", "directions": 3, "normalise_random": True}, []),
        ({"granularity": "block"}, ["granularity"]),
        ({"granularity": "block", "space": "weight"}, []),
        ({"granularity": "net", "space": "batch-weight"}, ["granularity"]),
        ({"granularity": "net", "space": "batch-weight", "guess": "random-rademacher"}, []),
        ({"granularity": "net", "space": "weight", "guess": "random-gaussian"}, ["granularity"]),
        (
            {"granularity": "net", "space": "batch-weight", "guess": "random-gaussian", "target": "local"},
            ["granularity"],
        ),
        ({"projection": "span", "guess": "random-gaussian", "directions": 4}, []),
        ({"projection": "span", "coefficients": "sample"}, []),
        ({"statistics": "live", "coefficients": "sample", "derivative": "forward"}, ["statistics"]),
        ({"statistics": "live", "coefficients": "sample", "derivative": "reverse"}, []),
        ({"statistics": "live", "coefficients": "batch", "derivative": "forward"}, []),
        ({"statistics": "live", "space": "weight", "derivative": "forward"}, ["statistics"]),
        ({"guess": "above", "derivative": "forward", "tangents": "all"}, ["tangents"]),
        ({"guess": "above", "derivative": "forward"}, []),
        ({"guess": "global", "tangents": "all"}, []),
    ],
)
def test_contradictions(choice, found):
    assert [key.removeprefix("method.") for key in keys(**choice)] == [
        key.removeprefix("method.") for key in found
    ]


def test_every_contradiction_has_a_remedy_that_works():
    for problem in contradictions(
        Estimator(granularity="net", space="batch-weight", guess="local", tangents="one")
    ):
        assert problem.key == "method.granularity"
        assert problem.hint.startswith("set method.")


def test_forward_mode_where_it_is_cheap():
    assert Estimator().resolved_derivative == "forward"
    assert Estimator(space="batch-weight").resolved_derivative == "forward"
    assert Estimator(space="weight").resolved_derivative == "reverse"
    assert Estimator(projection="span", coefficients="sample").resolved_derivative == "reverse"
    for guess in FROM_ABOVE:
        assert Estimator(target="local", guess=guess).resolved_derivative == "reverse"
    assert Estimator(space="weight", derivative="forward").resolved_derivative == "forward"


def test_statistics_are_held_for_a_coefficient_per_sample():
    assert Estimator().resolved_statistics == "live"
    assert Estimator(coefficients="sample").resolved_statistics == "held"
    assert Estimator(space="weight").resolved_statistics == "live"
    assert Estimator(space="weight", derivative="forward").resolved_statistics == "held"
    assert Estimator(coefficients="sample", statistics="live").resolved_statistics == "live"


def test_a_coefficient_per_sample_in_forward_mode_is_never_live():
    for choice in GRID:
        forward = dataclasses.replace(choice, derivative="forward")
        if forward.per_sample:
            assert forward.resolved_statistics == "held", choice


def test_what_needs_something_from_above():
    assert LOCAL.is_local
    assert not LOCAL.measures
    assert Estimator(target="local", guess="random-gaussian").is_local
    assert Estimator(guess="local", projection="random-sign").is_local
    assert not Estimator(target="local", guess="above").is_local
    for target in FROM_ABOVE:
        assert not Estimator(target=target, guess="ntk").is_local


def test_a_block_probes_where_tangents_go_up_one_at_a_time():
    assert not Estimator().probes
    assert Estimator(tangents="one").probes
    assert not Estimator(tangents="one", target="local").probes
    assert not Estimator(tangents="one", derivative="reverse").probes
    assert Estimator(guess="above", derivative="forward").probes
    for choice in GRID:
        assert choice.sends_down == (not choice.is_local and not choice.probes)


def test_backprop_is_a_target_that_is_its_own_guess():
    choice = Estimator(target="global", guess="global")
    assert choice.is_identity
    assert not choice.measures
    assert choice.sends_down
    assert choice.losses == ("global",)
    assert not Estimator(target="global", guess="global", projection="sign").is_identity


def test_who_has_an_auxiliary_net():
    def wanted(**choice):
        return [Estimator(**choice).wants_auxiliary(block, num_blocks=4) for block in range(4)]

    assert wanted(target="global", guess="local") == [True, True, True, False]
    assert wanted(target="above", guess="random-gaussian") == [False, True, True, False]
    assert wanted(target="sum", guess="random-gaussian") == [True, True, True, False]
    assert wanted(target="global", guess="random-gaussian") == [False] * 4
    assert wanted(target="global", guess="ntk") == [False] * 4
    assert Estimator(guess="ntk").guessing_auxiliary
    assert not Estimator(guess="local").guessing_auxiliary
    assert wanted(target="local", guess="fixed-ntk") == [True, True, True, False]


def test_what_comes_down_in_reverse_mode():
    assert Estimator().kinds == ()
    assert Estimator(tangents="one").kinds == ()
    assert Estimator(target="local").kinds == ()
    assert Estimator(derivative="reverse").kinds == (("global", "live"),)
    assert Estimator(derivative="reverse", coefficients="sample").kinds == (("global", "held"),)
    assert Estimator(guess="global").kinds == (("global", "live"),)
    assert Estimator(guess="above").kinds == (("global", "live"), ("above", "live"))
    assert Estimator(target="local", guess="sum").kinds == (("above", "live"),)


def test_how_many_tangents_come_up():
    def entering(**choice):
        return Estimator(**choice).tangents_entering([5, 2, 3], samples=4)

    assert entering() == [0, 1, 2]
    assert entering(target="above") == [0, 1, 1]
    assert entering(space="batch-weight") == [0, 5, 7]
    assert entering(space="batch-weight", granularity="block") == [0, 1, 2]
    random = {"guess": "random-gaussian", "directions": 3}
    assert entering(**random) == [0, 3, 6]
    assert entering(**random, space="batch-weight", granularity="net") == [0, 3, 3]
    assert entering(projection="span", coefficients="sample", derivative="forward") == [0, 4, 8]
    assert entering(tangents="one") == entering(derivative="reverse") == [0, 0, 0]
    assert entering(target="local") == [0, 0, 0]


def test_random_guesses_are_the_guesses_by_that_name():
    assert set(RANDOM_GUESSES) == {guess for guess in GUESSES if guess.startswith("random-")}
    assert all(Estimator(guess=guess).has_random_guess for guess in RANDOM_GUESSES)
