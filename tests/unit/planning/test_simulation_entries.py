import pytest

from petractl.errors import RecipeError
from petractl.planning.entries import DEFAULT_ENTRIES, make_entry, parse_entries


def test_every_form() -> None:
    text = "petra,tight,slack=2,[3,2, 1,0],delayed:inputs/least,delayed,plain"
    text += ",interleaved,backprop/gpipe,reversible"
    found = [
        (e.label, e.method.name, e.method.keep, e.schedule, e.slack, e.keeps_graph)
        for e in parse_entries(text)
    ]
    assert found == [
        ("petra", "petra", "", "tight", 0, False),
        ("tight", "petra", "", "tight", 0, False),
        ("slack=2", "petra", "", "tight", 2, False),
        ("[3,2, 1,0]", "petra", "", (3, 2, 1, 0), 0, False),
        ("delayed:inputs/least", "delayed", "inputs", "least", 0, False),
        ("delayed", "delayed", "graph", "tight", 0, True),
        ("plain", "backprop", "", "sequential", 0, True),
        ("interleaved", "backprop", "", "interleaved-1f1b", 0, True),
        ("backprop/gpipe", "backprop", "", "gpipe", 0, True),
        ("reversible", "reversible", "", "sequential", 0, False),
    ]


def test_the_default_is_valid() -> None:
    assert len(parse_entries(DEFAULT_ENTRIES)) == 9


def test_a_recipes_own() -> None:
    petra, tight = parse_entries("petra/paper,tight")
    assert make_entry("x", method=petra.method, schedule="auto").is_like(tight)
    assert not petra.is_like(tight)


def test_all_mistakes_are_told_at_once() -> None:
    text = "tigth,backprop/tight,petra/gpipe,[a],delayed:nothing,gpipe:inputs,,a/b/c"
    with pytest.raises(RecipeError) as caught:
        parse_entries(text)
    assert [problem.key for problem in caught.value.problems] == [
        "tigth",
        "backprop/tight",
        "petra/gpipe",
        "[a]",
        "delayed:nothing",
        "gpipe:inputs",
        "(empty)",
        "a/b/c",
    ]
    assert all(problem.what and problem.hint for problem in caught.value.problems)
