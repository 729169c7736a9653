import re

from petractl.sweep.grid import parse_grid
from petractl.sweep.names import cell_name, setting_names, short_keys


def names(*grids: str, **options) -> list[str]:
    grid = parse_grid(grids, **options)
    return setting_names(grid.settings, grid.keys)


def test_names_say_what_is_set() -> None:
    assert names("method.name=petra", "optimizer.lr=0.1,1e-3") == [
        "method=petra,lr=0.1",
        "method=petra,lr=1e-3",
    ]
    assert names("engine.schedule=[2, 1, 0],tight") == ["schedule=2-1-0", "schedule=tight"]
    assert cell_name("lr=0.1", 3) == "lr=0.1,seed=3"
    assert cell_name("lr=0.1", None) == "lr=0.1"
    assert names(seeds="0") == ["recipe"]


def test_keys_are_short_where_that_is_clear() -> None:
    assert short_keys(["method.name", "optimizer.lr"]) == {"method.name": "method", "optimizer.lr": "lr"}
    both = ["model.arguments.depth", "optimizer.arguments.depth"]
    assert short_keys(both) == {key: key for key in both}


def test_no_name_leaves_the_folder() -> None:
    hard = ["data.train=../../etc,/root,..", 'tracking.run_name="a b","a/b",a-b,"",ü']
    found = names(*hard)
    assert len(set(found)) == len(found) == 15
    for name in found:
        assert re.fullmatch(r"[A-Za-z0-9_.+=,-]+", name)
        assert not name.startswith(".")


def test_long_names_are_cut_and_stay_different() -> None:
    found = names(f"data.train={'a' * 300},{'a' * 301}")
    assert len(set(found)) == 2
    assert max(map(len, found)) <= 120


def test_a_name_does_not_depend_on_the_other_values() -> None:
    assert names('tracking.run_name="a b"')[0] == names('tracking.run_name=c,"a b"')[1]


def test_equal_words_of_different_values_are_told_apart() -> None:
    found = names("data.train=[1-0],1-0".replace("1-0", "'1-0'"))
    assert len(set(found)) == 2
    assert all(name.startswith("train=1-0") for name in found)
