import pytest

from petractl.sweep.grid import Grid, GridError, parse_grid, split_values


def told(*grids: str, **options) -> str:
    with pytest.raises(GridError) as caught:
        parse_grid(grids, **options)
    return caught.value.what


def settings(grid: Grid) -> list[tuple[str, ...]]:
    return [setting.overrides for setting in grid.settings]


def test_the_product_is_in_the_order_given() -> None:
    grid = parse_grid(["method.name=petra,backprop", "optimizer.lr=0.1,0.05"], seeds="0,7")
    assert settings(grid) == [
        ("method.name=petra", "optimizer.lr=0.1"),
        ("method.name=petra", "optimizer.lr=0.05"),
        ("method.name=backprop", "optimizer.lr=0.1"),
        ("method.name=backprop", "optimizer.lr=0.05"),
    ]
    assert grid.seeds == (0, 7)
    assert grid.keys == ("method.name", "optimizer.lr")


def test_values_are_toml_and_anything_else_is_a_string() -> None:
    grid = parse_grid(['engine.schedule=[2, 1, 0],tight,"paper"', "data.drop_last=true,false"])
    values = {(s.assignments[0].text, repr(s.assignments[0].value)) for s in grid.settings}
    assert values == {("[2, 1, 0]", "[2, 1, 0]"), ("tight", "'tight'"), ('"paper"', "'paper'")}
    assert [s.assignments[1].value for s in grid.settings[:2]] == [True, False]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a,b", ["a", "b"]),
        ("[2,1,0], tight", ["[2,1,0]", "tight"]),
        ('"a,b",c', ['"a,b"', "c"]),
        (r'"a\",b",c', [r'"a\",b"', "c"]),
        (r"'a\',b", [r"'a\'", "b"]),
        ('{a=[1,2],b="]"},3', ['{a=[1,2],b="]"}', "3"]),
        ("a,,b", ["a", "", "b"]),
        ("a],b", ["a]", "b"]),
        ("", [""]),
    ],
)
def test_values_are_parted_at_commas_outside_of_brackets_and_quotes(text: str, parts: list[str]) -> None:
    assert split_values(text) == parts


def test_keys_can_vary_together() -> None:
    grid = parse_grid(["model.name+model.width=revnet18+16,resnet18+23", "optimizer.lr=0.1,0.2"])
    assert len(grid.settings) == 4
    assert grid.settings[2].overrides == ("model.name=resnet18", "model.width=23", "optimizer.lr=0.1")
    keeps = parse_grid(['method.name+method.keep=delayed+"inputs+parameters",delayed+inputs'])
    assert keeps.settings[0].assignments[1].value == "inputs+parameters"
    assert (
        parse_grid(["method.keep=inputs+parameters"]).settings[0].assignments[0].value == "inputs+parameters"
    )


def test_cells_of_their_own_come_last() -> None:
    grid = parse_grid(["optimizer.lr=0.1,0.2"], cells=["method.name=backprop, optimizer.lr=0.05"])
    assert settings(grid)[-1] == ("method.name=backprop", "optimizer.lr=0.05")
    assert grid.num_extra == 1
    assert grid.keys == ("optimizer.lr", "method.name")
    assert settings(parse_grid([], cells=["method.name=backprop"])) == [("method.name=backprop",)]


def test_seeds_alone_repeat_the_recipe() -> None:
    grid = parse_grid([], seeds="0, 1")
    assert settings(grid) == [()]
    assert grid.settings[0].text == "the recipe"


def test_a_cell_may_set_again_what_all_others_take_from_set() -> None:
    grid = parse_grid(["optimizer.lr=0.1"], cells=["model.width=8"], overrides=["model.width=4"])
    assert len(grid.settings) == 2


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("optimizer.lrr=1", ("there is no such key in [optimizer]", "did you mean optimizer.lr?")),
        ("optimiser.lr=1", ("there is no such section", "did you mean optimizer?")),
        ("lr=1", ("is not of the form section.key=value", "--grid lr")),
        ("optimizer.lr", ("is not of the form section.key=value",)),
        ("optimizer.lr=", ("has an empty value",)),
        ("optimizer.lr=0.1,,0.2", ("has an empty value",)),
        ("optimizer.lr=0.1,1e-1", ("has 1e-1 twice",)),
        ("optimizer.lr=fast,0.1", ("optimizer.lr: must be a number",)),
        ("method.name=petra,petrra", ("did you mean petra?",)),
        ("data.batch_size=0", ("must be at least 1",)),
        ("data.train=1979-05-27", ("is a date or time",)),
        ("model.name+model.width=revnet18", ('"revnet18" has 1 values for 2 keys', "write value+value")),
    ],
)
def test_what_is_wrong_with_a_grid_by_itself_is_told(grid: str, words: tuple[str, ...]) -> None:
    message = told(grid)
    for word in words:
        assert word in message


def test_everything_wrong_is_told_at_once() -> None:
    message = told("optimizer.lrr=1", "optimizer.lr=", cells=["method.name", "method.name=x"], seeds="a")
    assert "5 problems in the grid" in message


@pytest.mark.parametrize(
    ("grids", "options", "words"),
    [
        ([], {}, "nothing varies"),
        (["optimizer.lr=1", "optimizer.lr=2"], {}, "in two places of the grid"),
        (["optimizer.lr=1"], {"overrides": ["optimizer.lr=2"]}, "is set by --set too"),
        (["run.seed=1,2"], {"seeds": "0"}, "is given besides --seeds"),
        ([], {"seeds": "0", "overrides": ["run.seed=3"]}, "is given besides --seeds"),
        ([], {"seeds": "1,1"}, "has 1 twice"),
        ([], {"seeds": "-1"}, "is no whole number"),
        ([], {"seeds": str(2**63)}, "is no whole number"),
        (["optimizer.lr=1"], {"cells": ["optimizer.lr=1.0"]}, "is given twice"),
        ([], {"cells": ["optimizer.lr=1,optimizer.lr=2"]}, "stands twice in --cell"),
        ([], {"cells": [""]}, "is not section.key=value"),
    ],
)
def test_contradictions_are_told(grids: list[str], options: dict, words: str) -> None:
    assert words in told(*grids, **options)
