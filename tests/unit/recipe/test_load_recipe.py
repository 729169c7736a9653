import subprocess
import sys

import pytest

from petractl.errors import RecipeError, UserError
from petractl.recipe import load_recipe

BASE = {"model": 'name = "revnet18"', "data": "", "method": ""}


def write(tmp_path, **sections: str):
    path = tmp_path / "small.toml"
    path.write_text("\n".join(f"[{name}]\n{body}" for name, body in (BASE | sections).items()))
    return path


def problems(tmp_path, **sections: str) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, **sections))
    return {problem.key: f"{problem.what}\n{problem.hint}" for problem in caught.value.problems}


def warnings(tmp_path, **sections: str) -> dict[str, str]:
    return {problem.key: problem.what for problem in load_recipe(write(tmp_path, **sections)).warnings}


def test_three_sections_are_enough(tmp_path) -> None:
    path = write(tmp_path)
    loaded = load_recipe(path)
    assert (loaded.name, loaded.path, loaded.text) == ("small", path, path.read_text())
    assert (loaded.recipe.method.name, loaded.recipe.data.name) == ("petra", "digits")
    assert loaded.recipe.engine.schedule == "auto"
    assert loaded.warnings == ()


def test_a_byte_order_mark_is_no_syntax_error(tmp_path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert load_recipe(path).recipe.model.name == "revnet18"


def test_a_whole_number_is_a_number_and_a_list_keeps_its_order(tmp_path) -> None:
    recipe = load_recipe(write(tmp_path, training="warmup_epochs = 1", engine="schedule = [3, 3, 0]")).recipe
    assert recipe.training.warmup_epochs == 1.0
    assert recipe.engine.schedule == (3, 3, 0)


def test_data_are_a_path_or_a_list(tmp_path) -> None:
    data = 'name = "cifar10"\ntrain = ["a.tar", "b.tar"]\nval = "val"'
    recipe = load_recipe(write(tmp_path, data=data)).recipe
    assert (recipe.data.train, recipe.data.val) == (("a.tar", "b.tar"), "val")


def test_the_checkpoint_interval_is_a_number_of_epochs(tmp_path) -> None:
    for text, epochs in (("1 epoch", 1), ("12 epochs", 12)):
        recipe = load_recipe(write(tmp_path, run=f'checkpoint_every = "{text}"')).recipe
        assert recipe.run.interval.epochs == epochs


def test_a_wrong_key_does_not_hide_a_contradiction_of_others(tmp_path) -> None:
    found = problems(
        tmp_path,
        model='nme = "revnet18"\nwidth = 0',
        method='name = "petra"\nkeep = "inputs"',
        partition="stages = 2\ncuts = [3]",
        surprise="",
    )
    assert set(found) == {
        "model.name",
        "model.nme",
        "model.width",
        "method.keep",
        "partition.cuts",
        "surprise",
    }


def test_a_wrong_key_gives_no_second_problem_of_its_own_making(tmp_path) -> None:
    # Were the name unknown *and* judged to be another method than delayed, there would be two.
    assert set(problems(tmp_path, method='name = "delayd"\nkeep = "inputs"')) == {"method.name"}
    assert set(problems(tmp_path, model="name = 2024-01-01")) == {"model.name"}


def test_lookaheads_must_match_the_stages(tmp_path) -> None:
    assert (
        "makes 3 stages"
        in problems(tmp_path, engine="schedule = [1, 0]", partition="stages = 3")["engine.schedule"]
    )
    assert (
        "makes 3 stages"
        in problems(tmp_path, engine="schedule = [1, 0]", partition="cuts = [2, 4]")["engine.schedule"]
    )
    load_recipe(write(tmp_path, engine="schedule = [1, 1, 0]", partition="stages = 3"))


@pytest.mark.parametrize(
    ("section", "body", "key"),
    [
        ("model", 'name = "revnet18"\ndepth = 3', "model.depth"),
        ("data", "fake_samples = 64", "data.fake_samples"),
        ("data", "image_size = 8", "data.image_size"),
        ("data", 'name = "fake"\naugment = true', "data.augment"),
        ("data", 'name = "cifar10"\ncrop = "pad"', "data.crop"),
        ("data", 'name = "imagenet32"\ndownload = true', "data.download"),
        ("data", 'name = "cifar10"\ntrain = "x"\ndownload = true', "data.download"),
        ("data", 'name = "shards"\ncrop = "pad"\ncrop_scale = 0.5', "data.crop_scale"),
        ("data", 'name = "shards"\nresident = true\nshuffle_buffer = 9', "data.shuffle_buffer"),
        ("data", 'name = "shards"\naugment = false\ncrop = "pad"', "data.crop"),
        ("data", 'name = "imagenet"\nmax_skipped = 9', "data.max_skipped"),
        ("method", 'name = "backprop"\nbn_statistics = "forward"', "method.bn_statistics"),
        ("method", 'name = "delayed"\nbn_statistics = "forward"', "method.bn_statistics"),
        ("partition", 'cuts = [3]\nbalance = "uniform"', "partition.balance"),
        ("partition", 'stages = "units"\nbalance = "uniform"', "partition.balance"),
        ("engine", 'schedule = "paper"\nslack = 0', "engine.slack"),
        ("engine", 'mode = "in-process"\nbackend = "gloo"', "engine.backend"),
        ("engine", 'mode = "in-process"\nstall_timeout = 5', "engine.stall_timeout"),
        ("engine", 'devices = ["cpu"]\ndevice = "cpu"', "engine.device"),
        ("optimizer", "betas = [0.9, 0.99]", "optimizer.betas"),
        ("optimizer", 'name = "adamw"\nmomentum = 0.9', "optimizer.momentum"),
        ("optimizer", 'name = "adamw"\nnesterov = false', "optimizer.nesterov"),
        ("optimizer", "momentum = 0.0\nnesterov = true", "optimizer.nesterov"),
        ("optimizer", "weight_decay = 0.0\ndecay_norm_and_bias = true", "optimizer.decay_norm_and_bias"),
        ("training", "milestones = [3]", "training.milestones"),
        ("training", 'lr_decay = "cosine"\npolynomial_power = 3.0', "training.polynomial_power"),
        ("training", 'lr_decay = "polynomial"\ndecay_factor = 0.2', "training.decay_factor"),
        ("training", 'lr_decay = "multi-step"', "training.lr_decay"),
        ("training", 'lr_decay = "multi-step"\nmilestones = [3, 10]', "training.milestones"),
        ("training", "warmup_epochs = 10.5", "training.warmup_epochs"),
        ("tracking", 'mlflow = false\nrun_name = "x"', "tracking.run_name"),
    ],
)
def test_a_setting_that_does_nothing_gives_one_warning_that_names_it(tmp_path, section, body, key) -> None:
    assert list(warnings(tmp_path, **{section: body})) == [key]


def test_settings_that_matter_give_no_warning(tmp_path) -> None:
    assert not warnings(
        tmp_path,
        model='name = "revnet-iso"\ndepth = 3',
        data='name = "fake"\nimage_size = 8\nfake_samples = 64\nclasses = 4',
        method='name = "delayed"\nkeep = "inputs"\nbn_statistics = "forward"',
        partition='stages = 3\nbalance = "parameters"',
        engine='schedule = "tight"\nslack = 1',
        optimizer='name = "my.optim:Class"\nbetas = [0.9, 0.99]\nmomentum = 0.5\narguments = { eps = 1e-8 }',
        training='lr_decay = "multi-step"\nmilestones = [3, 9]\ndecay_factor = 0.2\nwarmup_epochs = 10',
    )


def test_keys_of_photographs_give_no_warning(tmp_path) -> None:
    keys = [
        'name = "shards"',
        "classes = 7",
        "image_size = 64",
        "resize = 80",
        "crop_scale = 0.3",
        "workers = 2",
    ]
    keys += [
        'on_error = "skip"',
        "max_skipped = 9",
        "allow_pipe = true",
        'cache = "here"',
        "shuffle_buffer = 0",
    ]
    keys += ['image_entries = ["JPG"]', 'label_entry = "cls"', 'decoder = "pillow"', 'train = ["a", "b"]']
    assert not warnings(tmp_path, data="\n".join(keys))
    assert not warnings(tmp_path, data='name = "fashion-mnist"\ndownload = true\nresident = true')


def test_slack_does_nothing_for_a_locked_method(tmp_path) -> None:
    found = warnings(tmp_path, method='name = "backprop"', engine="slack = 2")
    assert found == {"engine.slack": 'has no effect with method.name = "backprop"'}


EXACT = ("gpipe", "1f1b", "interleaved-1f1b", "zero-bubble")


@pytest.mark.parametrize("schedule", EXACT)
def test_an_exact_pipeline_is_backprop_in_groups(tmp_path, schedule) -> None:
    engine = f'schedule = "{schedule}"'
    assert not warnings(tmp_path, method='name = "backprop"\naccumulation = 4', engine=engine)
    alone = warnings(tmp_path, method='name = "backprop"', engine=engine)
    assert list(alone) == ["method.accumulation"]
    assert "plain model parallelism" in alone["method.accumulation"]
    for method in ("petra", "delayed", "reversible"):
        assert (
            "an exact pipeline" in problems(tmp_path, method=f'name = "{method}"', engine=engine).popitem()[1]
        )


def test_an_exact_pipeline_sends_what_it_computes(tmp_path) -> None:
    method, engine = 'name = "backprop"\naccumulation = 2', 'schedule = "gpipe"\nwire_dtype = "int8"'
    assert list(warnings(tmp_path, method=method, engine=engine)) == ["engine.wire_dtype"]
    # In one process the messages are rounded all the same, so that the bits are those of several.
    assert not warnings(
        tmp_path, engine='mode = "in-process"\nwire_dtype = "int8"\nwire_dtype_backward = "float16"'
    )


@pytest.mark.parametrize(
    ("devices", "engine", "stages", "fits"),
    [
        (3, "", "stages = 3", True),
        (2, "", "stages = 3", False),
        (3, "replicas = 2", "stages = 3", True),  # every replica on the same ones
        (6, "replicas = 2", "stages = 3", True),
        (5, "replicas = 2", "stages = 3", False),
        (2, "", "cuts = [4]", True),
        (9, "", 'stages = "units"', True),  # the net is not known yet
    ],
)
def test_there_is_a_device_for_every_stage(tmp_path, devices, engine, stages, fits) -> None:
    listed = ", ".join(['"cuda:0"'] * devices)
    recipe = write(tmp_path, engine=f"devices = [{listed}]\n{engine}", partition=stages)
    if fits:
        assert len(load_recipe(recipe).recipe.engine.devices) == devices
    else:
        with pytest.raises(RecipeError, match=f"but {devices} devices are given"):
            load_recipe(recipe)


def test_an_interleaved_pipeline_has_two_stages_on_a_device(tmp_path) -> None:
    keys = {"method": 'name = "backprop"\naccumulation = 4', "partition": "stages = 4"}
    engine = 'schedule = "interleaved-1f1b"\ndevices = ["cpu", "cpu"]'
    assert not warnings(tmp_path, engine=engine, **keys)
    found = problems(tmp_path, engine=engine.replace("]", ', "cpu"]'), **keys)
    assert "stages(4) / 2 per process = 2 processes, but 3 devices" in found["engine.devices"]


def test_a_wrong_mode_hides_what_hangs_on_it(tmp_path) -> None:
    assert set(problems(tmp_path, engine='mode = "in_process"\nreplicas = 2')) == {"engine.mode"}


def test_a_file_that_is_not_text_is_told(tmp_path) -> None:
    path = tmp_path / "weights.toml"
    path.write_bytes(b"\x00\xff\xfe")
    with pytest.raises(UserError, match="not a text file"):
        load_recipe(path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "x = " + "[" * 100_000, "x = " + "9" * 10_000, "\0", "x = {" * 5000]
)
def test_hostile_text_is_an_error_like_any_other(tmp_path, text) -> None:
    path = tmp_path / "hostile.toml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(path)


@pytest.mark.parametrize("depth", [40, 150, 250])
def test_deep_values_are_an_error_like_any_other(tmp_path, depth) -> None:
    nested = "[" * depth + "]" * depth
    found = problems(tmp_path, optimizer=f"arguments = {{ x = {nested} }}")
    assert "nested too deeply" in found["optimizer.arguments"]


def test_loading_a_recipe_imports_no_torch() -> None:
    code = (
        "import sys; from petractl.recipe import load_recipe, render\n"
        "render(load_recipe('digits_revnet18').recipe); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
