"""Broken recipes through the real command line: exit code 2, the key, the remedy, and never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from petractl.cli.app import app

GOOD = {
    "model": 'name = "revnet18"\nwidth = 4',
    "data": 'name = "digits"',
    "method": 'name = "petra"',
    "partition": 'stages = "units"',
    "optimizer": "lr = 0.1",
    "training": "epochs = 2",
}

USER_MODELS = """
from torch import nn


def not_a_list():
    return nn.Linear(1, 1)


def list_of_strings():
    return ["conv", "head"]


def fails():
    raise RuntimeError("out of cheese")


def fine(width, classes):
    return [nn.Flatten(), nn.Linear(64, width), nn.Linear(width, classes)]


number = 3
"""


def toml(**sections: str | None) -> str:
    """The good recipe with sections replaced, or left out where None."""
    kept = {name: body for name, body in (GOOD | sections).items() if body is not None}
    return "\n".join(f"[{name}]\n{body}\n" for name, body in kept.items())


def petra(body: str) -> str:
    return toml(method=f'name = "petra"\n{body}')


def model(body: str) -> str:
    return toml(model=f'name = "revnet18"\n{body}')


# What loading alone finds, without torch: text, and the words that its message must hold.
BROKEN: dict[str, tuple[str, list[str]]] = {
    # The file.
    "syntax-no-equals": ('[model]\nname "revnet18"\n', ["line 2", "not valid TOML", 'name "revnet18"']),
    "syntax-open-string": ('[model]\nname = "revnet18\n', ["line 2", "not valid TOML"]),
    "syntax-open-table": ("[model\n", ["line 1", "not valid TOML"]),
    "syntax-open-list": ("[model]\nname = [1,\n", ["not valid TOML"]),
    "syntax-key-twice": ('[model]\nname = "a"\nname = "b"\n', ["line 3", "not valid TOML"]),
    "syntax-bare-word": ("[model]\nname = revnet18\n", ["line 2", "not valid TOML"]),
    "empty": (
        "",
        ["model: this section is missing", "data: this", "method: this", "add [model] with name ="],
    ),
    "json": ('{"model": {"name": "revnet18"}}', ["line 1", "not valid TOML"]),
    # Sections.
    "no-model": (toml(model=None), ["model: this section is missing", 'name = "revnet18"']),
    "no-data": (toml(data=None), ["data: this section is missing", "[data]"]),
    "no-method": (toml(method=None), ["method: this section is missing", "[method]"]),
    "no-model-name": (toml(model="width = 4"), ["model.name: this key is missing", 'name = "revnet18"']),
    "unknown-section": (
        toml(optimiser="lr = 0.1"),
        ["optimiser: there is no such section", "did you mean optimizer?"],
    ),
    "unknown-section-far": (toml(zzz="x = 1"), ["zzz", "the sections are model, data, method"]),
    "section-is-a-value": (
        'model = "revnet18"\n' + toml(model=None),
        ["model: must be a section", "write [model]"],
    ),
    "section-is-an-array": (toml(model=None) + '[[model]]\nname = "revnet18"\n', ["model", "write [model]"]),
    "key-outside": (
        "batch_size = 3\n" + toml(),
        ["batch_size: stands outside", "did you mean data.batch_size?"],
    ),
    # Keys.
    "unknown-key": (model("widht = 3"), ["model.widht: there is no such key", "did you mean model.width?"]),
    "unknown-key-far": (petra("zzz = 3"), ["method.zzz", "the keys of [method] are name, accumulation"]),
    "key-of-another-section": (toml(training="momentum = 0.9"), ["training.momentum", "optimizer.momentum?"]),
    "nested-key": (toml(optimizer="sgd.lr = 0.1"), ["optimizer.sgd: there is no such key"]),
    # Types.
    "string-for-number": (model('width = "64"'), ["model.width", 'not "64"', "without quotes: width = 64"]),
    "true-for-number": (model("width = true"), ["model.width: must be a whole number, not true"]),
    "fraction-for-whole": (
        toml(training="epochs = 2.5"),
        ["training.epochs: must be a whole number, not 2.5"],
    ),
    "number-for-bool": (
        toml(data="augment = 1"),
        ["data.augment: must be true or false, not 1", "write true"],
    ),
    "string-for-bool": (toml(data='augment = "True"'), ["data.augment", "write true, in lower case"]),
    "number-for-string": (
        toml(model="name = 18"),
        ["model.name: must be a string, not 18", 'in quotes: "18"'],
    ),
    "number-for-list": (toml(training="milestones = 3"), ["training.milestones: must be a list", "[3]"]),
    "list-for-number": (toml(optimizer="lr = [0.1]"), ["optimizer.lr: must be a number, not [0.1]"]),
    "string-in-list": (toml(partition='cuts = ["3"]'), ["partition.cuts[0]: must be a whole number"]),
    "list-for-table": (toml(optimizer="arguments = [1]"), ["optimizer.arguments: must be a table"]),
    "number-for-paths": (
        toml(data='name = "cifar10"\ntrain = 3'),
        ["data.train: must be a path (string) or a list"],
    ),
    "date": (toml(run="seed = 2024-01-01"), ["run.seed: is a date", 'in quotes: "2024-01-01"']),
    "time-in-table": (
        toml(optimizer="arguments = { t = 12:00:00 }"),
        ["optimizer.arguments.t: is a date or time"],
    ),
    "nan": (toml(optimizer="lr = nan"), ["optimizer.lr: must be a finite number, not nan"]),
    "inf": (toml(optimizer="clip_norm = inf"), ["optimizer.clip_norm: must be a finite number, not inf"]),
    "huge": (
        toml(run=f"seed = {2**70}"),
        ["run.seed: is too large: whole numbers end at 9,223,372,036"],
    ),
    # Values.
    "unknown-model": (
        toml(model='name = "revnet81"'),
        ["model.name", 'not "revnet81"', "did you mean revnet18?"],
    ),
    "model-import-form": (toml(model='name = "nets.py:f"\nwidth = 4\nx = 1'), ["model.x"]),
    "model-import-form-2": (toml(model='name = "my nets:f"'), ["model.name", '"package.module:function"']),
    "unknown-data": (toml(data='name = "digit"'), ["data.name", "did you mean digits?"]),
    "unknown-method": (toml(method='name = "back-prop"'), ["method.name", "did you mean backprop?"]),
    "unknown-optimizer": (toml(optimizer='name = "adam"'), ["optimizer.name", "did you mean adamw?"]),
    "unknown-decay": (
        toml(training='lr_decay = "multistep"'),
        ["training.lr_decay", "did you mean multi-step?"],
    ),
    "unknown-schedule": (toml(engine='schedule = "papers"'), ["engine.schedule", "did you mean paper?"]),
    "unknown-device": (toml(engine='device = "gpu"'), ["engine.device", '"cuda:N"']),
    "unknown-precision": (toml(engine='precision = "float16"'), ["engine.precision", '"bfloat16"']),
    "unknown-mode": (toml(engine='mode = "process"'), ["engine.mode", "did you mean processes?"]),
    "devices-word": (toml(engine='devices = ["cpu", "cuda"]'), ["engine.devices", '"cuda:N"', '"cuda" is']),
    "devices-string": (toml(engine='devices = "cpu"'), ["engine.devices: must be a list", '["cpu"]']),
    "replicas-0": (toml(engine="replicas = 0"), ["engine.replicas: must be at least 1, not 0"]),
    "unknown-backend": (toml(engine='backend = "mpi"'), ["engine.backend", '"gloo"']),
    "unknown-wire": (toml(engine='wire_dtype = "int4"'), ["engine.wire_dtype", "did you mean int8?"]),
    "stall-negative": (toml(engine="stall_timeout = -1"), ["engine.stall_timeout: must be at least 0"]),
    "unknown-keep": (
        toml(method='name = "delayed"\nkeep = "input"'),
        ["method.keep", "did you mean inputs?"],
    ),
    "k-0": (petra("accumulation = 0"), ["method.accumulation: must be at least 1, not 0"]),
    "stages-0": (toml(partition="stages = 0"), ["partition.stages", "at least 1", '"units"', "not 0"]),
    "stages-word": (toml(partition='stages = "unit"'), ["partition.stages", "did you mean units?"]),
    "cuts-backwards": (toml(partition="cuts = [5, 3]"), ["partition.cuts", "larger than the one before"]),
    "cuts-0": (toml(partition="cuts = [0, 3]"), ["partition.cuts", "from 1 up"]),
    "width-0": (model("width = 0"), ["model.width: must be at least 1, not 0"]),
    "batch-negative": (toml(data="batch_size = -1"), ["data.batch_size: must be at least 1, not -1"]),
    "lr-negative": (toml(optimizer="lr = -0.1"), ["optimizer.lr: must be at least 0, not -0.1"]),
    "momentum-1": (toml(optimizer="momentum = 1"), ["optimizer.momentum: must be less than 1, not 1"]),
    "betas-three": (toml(optimizer="betas = [0.9, 0.9, 0.9]"), ["optimizer.betas: must have 2 entries"]),
    "smoothing-1": (
        toml(training="label_smoothing = 1.0"),
        ["training.label_smoothing: must be less than 1"],
    ),
    "milestones-backwards": (
        toml(training="milestones = [3, 2]"),
        ["training.milestones", "later than the one"],
    ),
    "tracking-address": (toml(tracking='uri = "ftp://x"'), ["tracking.uri", "not a tracking server"]),
    "checkpoint-unit": (
        toml(run='checkpoint_every = "500 steps"'),
        ["run.checkpoint_every", '"500 updates"', '"10 min"'],
    ),
    "checkpoint-0": (toml(run='checkpoint_every = "0 epochs"'), ["run.checkpoint_every", '"1 epoch"']),
    "directory-empty": (toml(run='directory = ""'), ["run.directory: must not be empty"]),
    "paths-empty": (toml(data='name = "cifar10"\ntrain = []'), ["data.train", "a list of paths"]),
    "workers-word": (toml(data='workers = "many"'), ["data.workers", '"auto" or a whole number from 0']),
    "workers-negative": (toml(data="workers = -1"), ["data.workers", "from 0 to 256, not -1"]),
    "image-entries-unknown": (toml(data='image_entries = ["gif"]'), ["data.image_entries", '"png"', '"gif"']),
    "image-entries-empty": (toml(data="image_entries = []"), ["data.image_entries", "at least one"]),
    "label-entry-dot": (toml(data='label_entry = ".cls"'), ["data.label_entry", "without the first point"]),
    "unknown-crop": (toml(data='crop = "random"'), ["data.crop", '"random-resized"', '"pad"']),
    "crop-scale-0": (toml(data="crop_scale = 0"), ["data.crop_scale: must be more than 0, not 0"]),
    "unknown-decoder": (toml(data='decoder = "pilow"'), ["data.decoder", "did you mean pillow?"]),
    "on-error-unknown": (toml(data='on_error = "ignore"'), ["data.on_error", '"stop" or "skip"']),
    "max-skipped-negative": (toml(data="max_skipped = -1"), ["data.max_skipped: must be at least 0"]),
    "lookaheads-increase": (toml(engine="schedule = [1, 2, 0]"), ["engine.schedule", "must not increase"]),
    "lookaheads-end": (toml(engine="schedule = [2, 1]"), ["engine.schedule", "must end with 0"]),
    "lookaheads-negative": (toml(engine="schedule = [-1, 0]"), ["engine.schedule", "at least 0"]),
    # Keys together.
    "cuts-and-stages": (toml(partition="stages = 2\ncuts = [3]"), ["partition.cuts", "partition.stages = 2"]),
    "keep-with-petra": (petra('keep = "inputs"'), ["method.keep", '"delayed"', '"petra"']),
    "locked-schedule": (
        toml(method='name = "backprop"', engine='schedule = "tight"'),
        ["engine.schedule", '"backprop"', 'not "tight"', '"auto"'],
    ),
    "locked-list": (
        toml(method='name = "reversible"', engine="schedule = [1, 0]"),
        ["engine.schedule", '"reversible"', "[1, 0]"],
    ),
    "slack-with-paper": (
        toml(engine='schedule = "paper"\nslack = 1'),
        ["engine.slack", '"tight"', '"paper"'],
    ),
    "exact-with-petra": (
        toml(engine='schedule = "gpipe"'),
        ["engine.schedule", '"gpipe", an exact pipeline', '"petra"', 'method.name = "backprop"'],
    ),
    "exact-with-slack": (
        toml(method='name = "backprop"', engine='schedule = "1f1b"\nslack = 1'),
        ["engine.slack", '"1f1b"'],
    ),
    "exact-in-process": (
        toml(method='name = "backprop"', engine='schedule = "zero-bubble"\nmode = "in-process"'),
        ["engine.schedule", '"zero-bubble"', 'engine.mode is "in-process"', 'engine.mode = "auto"'],
    ),
    "replicas-in-process": (
        toml(engine='replicas = 2\nmode = "in-process"'),
        ["engine.replicas: 2 replicas", 'engine.mode is "in-process"'],
    ),
    "devices-in-process": (
        toml(engine='devices = ["cpu"]\nmode = "in-process"'),
        ["engine.devices", 'engine.mode is "in-process"', "take engine.devices out"],
    ),
    "devices-and-stages": (
        toml(engine='devices = ["cpu", "cpu"]', partition="stages = 4"),
        ["engine.devices", "stages(4) = 4 processes, but 2 devices are given", "give 4"],
    ),
    "devices-and-replicas": (
        toml(engine='devices = ["cuda:0", "cuda:1", "cuda:2"]\nreplicas = 2', partition="cuts = [3]"),
        ["engine.devices", "stages(2) x replicas(2) = 4 processes, but 3 devices", "give 2 (the same"],
    ),
    "nccl-on-the-cpu": (
        toml(engine='backend = "nccl"\ndevice = "cpu"'),
        ["engine.backend", '"nccl" needs a GPU', "engine.device has"],
    ),
    "lookaheads-and-stages": (
        toml(engine="schedule = [1, 0]", partition="stages = 3"),
        ["engine.schedule", "it has 2", "partition.stages makes 3 stages"],
    ),
    "arguments-for-the-zoo": (model("arguments = { x = 1 }"), ["model.arguments", "package.module:function"]),
    "resize-below-image-size": (
        toml(data='name = "shards"\nimage_size = 64\nresize = 48'),
        ["data.resize", "48", "64 (data.image_size)"],
    ),
    "resident-random-resized": (
        toml(data='name = "shards"\nresident = true\ncrop = "random-resized"'),
        ["data.crop", "data.resident = true", '"pad"'],
    ),
    "paths-for-digits": (toml(data='name = "digits"\ntrain = "here"'), ["data.train", "reads no files"]),
}

# What only building the model, or looking at the data, can find.
BROKEN_WHEN_BUILT: dict[str, tuple[str, list[str]]] = {
    "more-stages-than-units": (toml(partition="stages = 11"), ["partition.stages", "11", "10"]),
    "cut-out-of-range": (toml(partition="cuts = [3, 10]"), ["partition.cuts", "10"]),
    "lookaheads-for-units": (toml(engine="schedule = [1, 0]"), ["engine.schedule", "2", "10"]),
    "reversible-resnet": (
        toml(model='name = "resnet18"\nwidth = 4', method='name = "reversible"'),
        ["method.name", "resnet18", "reversible"],
    ),
    "stashed-parameters-resnet": (
        toml(model='name = "resnet18"\nwidth = 4', method='name = "delayed"\nkeep = "parameters"'),
        ["method", "parameters", "resnet18", "reversible"],
    ),
    "no-data-folder": (toml(data='name = "cifar10"\ntrain = "nowhere"\nval = "nowhere"'), ["nowhere"]),
    "no-default-data-folder": (toml(data='name = "cifar10"'), ["data/cifar10"]),
    "no-imagenet": (
        toml(data='name = "imagenet"'),
        ["data.train", "ILSVRC2012_img_train.tar"],
    ),
    "no-imagenet32": (toml(data='name = "imagenet32"'), ["data.train", "Imagenet32_train.zip"]),
    "no-fashion-mnist": (
        toml(data='name = "fashion-mnist"'),
        ["zalandoresearch/fashion-mnist"],
    ),
    "no-place-of-shards": (
        toml(data='name = "shards"'),
        ["data/shards", "petractl shards build"],
    ),
    "pipe-refused": (
        toml(data='name = "shards"\nclasses = 2\ntrain = "pipe:cat a.tar"\nval = "pipe:cat b.tar"'),
        ["data.train", "allow_pipe"],
    ),
    "no-shards": (toml(data='name = "cifar10"\ntrain = "t-{00..02}.tar"\nval = "v.tar"'), ["t-00.tar"]),
    "no-weights-file": (
        model('width = 4\nweights = "nowhere.safetensors"'),
        ["model.weights", "nowhere.safetensors"],
    ),
    "weights-are-text": (model('width = 4\nweights = "user_models.py"'), ["user_models.py"]),
    "no-such-module": (toml(model='name = "no_such_module:net"'), ["model.name", "no_such_module"]),
    "no-such-function": (toml(model='name = "user_models:fin"'), ["model.name", "fin", "did you mean"]),
    "not-a-function": (toml(model='name = "user_models:number"'), ["model.name", "not a function"]),
    "not-a-list": (toml(model='name = "user_models:not_a_list"'), ["model.name", "list"]),
    "not-modules": (toml(model='name = "user_models:list_of_strings"'), ["model.name", "str"]),
    "function-raises": (toml(model='name = "user_models:fails"'), ["model.name", "out of cheese"]),
    "arguments-not-taken": (
        toml(model='name = "user_models:fine"\narguments = { hight = 1 }'),
        ["model.arguments", "hight"],
    ),
    "no-such-optimizer": (toml(optimizer='name = "torch.optim:Addam"'), ["optimizer.name", "Addam"]),
    "optimizer-arguments": (
        toml(optimizer="arguments = { no_such = 1 }"),
        ["optimizer.arguments", "no_such"],
    ),
    "no-such-gpu": (toml(engine='device = "cuda:99"'), ["engine.device"]),
    "too-few-classes": (model("width = 4\nclasses = 5"), ["model.classes", "5", "10"]),
    "batch-larger-than-data": (toml(data="batch_size = 5000\ndrop_last = true"), ["data.batch_size", "5000"]),
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of the user's, with a module of models of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "user_models.py").write_text(USER_MODELS)
    yield tmp_path
    sys.modules.pop("user_models", None)


def validate(text: str, *arguments: str) -> Result:
    Path("broken.toml").write_text(text)
    return CliRunner().invoke(app, ["validate", "broken.toml", *arguments])


def check(result: Result, words: list[str]) -> None:
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(("text", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_recipe_is_told(folder, text: str, words: list[str]) -> None:
    result = validate(text)
    check(result, ["broken.toml: ", *words])


@pytest.mark.parametrize(("text", "words"), BROKEN_WHEN_BUILT.values(), ids=BROKEN_WHEN_BUILT.keys())
def test_a_recipe_that_cannot_be_built_is_told(folder, text: str, words: list[str]) -> None:
    check(validate(text), words)


def test_there_are_enough_of_them() -> None:
    assert len(BROKEN) + len(BROKEN_WHEN_BUILT) >= 40


def test_one_mistake_gives_one_message(folder) -> None:
    several = {"empty", "model-import-form", "stages-0", "betas-three"}
    for name, (text, _) in BROKEN.items():
        if name not in several:
            assert "1 problem in the recipe" in validate(text).stderr, name


def test_several_mistakes_are_told_together(folder) -> None:
    text = toml(
        model='name = "revnet81"\nwidht = 3', data="batch_size = 0", engine='schedule = "paper"\nslack = 1'
    )
    result = validate(text, "--set", "training.epochs=none", "--set", "nonsense")
    check(result, ["6 problems", "model.name", "model.widht", "data.batch_size", "engine.slack"])
    check(result, ['training.epochs: must be a whole number, not "none" (from --set)', "--set nonsense"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.accumulation=0", ["method.accumulation: must be at least 1, not 0 (from --set)"]),
        ("partition.stages=many", ["partition.stages", '"many" (from --set)']),
        ("model.widht=3", ["did you mean model.width?"]),
        ("epochs=3", ["--set epochs=3", "section.key=value"]),
        ("tracking.run_name=5", ["--set 'tracking.run_name=\"5\"'"]),
        ("run.seed=2024-01-01", ["run.seed: is a date"]),
    ],
)
def test_a_broken_override_is_told(folder, override: str, words: list[str]) -> None:
    check(validate(toml(), "--set", override), words)


def test_every_broken_recipe_of_several_is_told(folder) -> None:
    Path("a.toml").write_text(BROKEN["k-0"][0])
    Path("b.toml").write_text(BROKEN["width-0"][0])
    result = CliRunner().invoke(app, ["validate", "a.toml", "b.toml", "c.toml"])
    check(
        result,
        ["a.toml: 1 problem", "method.accumulation", "b.toml: 1 problem", "model.width", "c.toml: no such"],
    )


@pytest.mark.parametrize("command", ["run", "show", "validate"])
def test_commands_that_read_a_recipe_say_the_same(folder, command: str) -> None:
    Path("broken.toml").write_text(BROKEN["unknown-key"][0])
    check(CliRunner().invoke(app, [command, "broken.toml"]), BROKEN["unknown-key"][1])
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == [
        "broken.toml",
        "user_models.py",
    ]


@pytest.mark.parametrize("name", ["syntax-no-equals", "k-0", "unknown-key"])
def test_a_real_process_says_the_same(folder, name: str) -> None:
    text, words = BROKEN[name]
    Path("broken.toml").write_text(text)
    command = [sys.executable, "-m", "petractl", "validate", "broken.toml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == validate(text).stderr
    assert all(word in done.stderr for word in words)
