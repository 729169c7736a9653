"""The keys of a recipe, their types, defaults and limits.

Every key has a one-line docstring: it is the help, the documentation and the comment that `petractl show`
writes, so it is kept in one place, here. Types are strict (`true` is not 1, "64" is not 64) and unknown keys
are errors. What concerns more than one key is in `checks`; the words of the error messages are in `problems`.

Names of models, data sets and methods are listed here as plain tuples, so that a mistyped name is found
without importing torch; a test compares them with the registries.
"""

import dataclasses
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue
from pydantic_core import PydanticCustomError

from petractl.estimator import (
    LOCAL,
    Coefficients,
    Derivative,
    Estimator,
    Granularity,
    Guess,
    Projection,
    Space,
    Statistics,
    Tangents,
    Target,
)
from petractl.recipe.interval import Interval, parse_interval

MODEL_NAMES = (
    "revnet18",
    "revnet34",
    "revnet50",
    "revnet101",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "revnet-iso",
    "resnet18-2b",
    "resnet18-8b",
    "resnet18-16b",
)
DATASET_NAMES = (
    "digits",
    "cifar10",
    "cifar100",
    "fashion-mnist",
    "imagenet32",
    "imagenet",
    "shards",
    "fake",
)
DATASETS_WITHOUT_FILES = ("digits", "fake")
PHOTOGRAPH_DATASETS = ("imagenet", "shards")  # read and decoded as they are needed, the others once
DOWNLOADABLE_DATASETS = ("cifar10", "cifar100", "fashion-mnist")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png")
METHOD_NAMES = ("petra", "delayed", "reversible", "backprop", "local", "forward-gradient")
LOCKED_METHODS = ("reversible", "backprop")
BLOCK_METHODS = ("local", "forward-gradient")  # every stage is a block, with a loss or a guess of its own
ESTIMATOR_KEYS = tuple(field.name for field in dataclasses.fields(Estimator))
AUXILIARY_NAMES = ("cnn", "mlp", "linear", "copy")
AUXILIARY_NAMES_WITH_WIDTH = ("cnn", "mlp")
OPTIMIZER_NAMES = ("sgd", "adamw", "lars")
EXACT_SCHEDULE_NAMES = ("gpipe", "1f1b", "interleaved-1f1b", "zero-bubble")
STAGES_PER_PROCESS = {"interleaved-1f1b": 2}  # every other schedule gives a stage a process of its own
SCHEDULE_NAMES = ("auto", "tight", "paper", "least", "sequential", *EXACT_SCHEDULE_NAMES)
STAGE_RULES = ("auto", "units")
MAX_WORKERS = 256

# Far above what is of use, far below where sizes multiplied with each other pass 64 bits.
MAX_WIDTH = 1_000_000
MAX_DEPTH = 10_000
MAX_CLASSES = 1_000_000_000
MAX_SAMPLES = 1_000_000_000
MAX_SIDE = 65_536

_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_DEVICE = re.compile(r"auto|cpu|cuda(:(0|[1-9]\d*))?")
_ONE_DEVICE = re.compile(r"cpu|cuda:(0|[1-9]\d*)")
_ENTRY = re.compile(r"[^\s./\\]+(\.[^\s./\\]+)*")


def _wrong(limit: str, *, choices: Sequence[str] = ()) -> PydanticCustomError:
    """Return the error of a value that breaks `limit` ("must be ..."); `choices` are for "did you mean"."""
    return PydanticCustomError("recipe_value", "{limit}", {"limit": limit, "choices": list(choices)})


def is_import_path(name: str) -> bool:
    """Return whether `name` has the form "package.module:name"."""
    return _IMPORT_PATH.fullmatch(name) is not None


def _known_name(name: str, *, known: Sequence[str], kind: str) -> str:
    """Check a name against the list; with `kind`, "package.module:kind" is taken too, by its form only."""
    if name in known or (kind and is_import_path(name)):
        return name
    if kind and ":" in name:
        raise _wrong(f'must have the form "package.module:{kind}"')
    user_made = f', or "package.module:{kind}"' if kind else ""
    raise _wrong(f"must be one of {', '.join(known)}{user_made}", choices=known)


def _model_name(name: str) -> str:
    return _known_name(name, known=MODEL_NAMES, kind="function")


def _dataset_name(name: str) -> str:
    return _known_name(name, known=DATASET_NAMES, kind="")


def _method_name(name: str) -> str:
    return _known_name(name, known=METHOD_NAMES, kind="")


def _auxiliary_name(name: str) -> str:
    return _known_name(name, known=AUXILIARY_NAMES, kind="function")


def _optimizer_name(name: str) -> str:
    return _known_name(name, known=OPTIMIZER_NAMES, kind="Class")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _source(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    raise _wrong("must be a path (string) or a list of paths")


def _entry(name: str) -> str:
    if _ENTRY.fullmatch(name) is None:
        raise _wrong('must be the end of a name in a shard without the first point, such as "cls"')
    return name.lower()


def _image_entries(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise _wrong("must name at least one ending")
    for name in names:
        if _entry(name).rpartition(".")[2] not in IMAGE_SUFFIXES:
            known = ", ".join(f'"{suffix}"' for suffix in IMAGE_SUFFIXES)
            raise _wrong(f'must hold names that end in {known}, and "{name}" does not')
    return tuple(name.lower() for name in names)


def _workers(value: Any) -> Any:
    if value == "auto" or (_is_whole(value) and 0 <= value <= MAX_WORKERS):
        return value
    raise _wrong(f'must be "auto" or a whole number from 0 to {MAX_WORKERS}', choices=("auto",))


def _stages(value: Any) -> Any:
    if (_is_whole(value) and value >= 1) or (isinstance(value, str) and value in STAGE_RULES):
        return value
    raise _wrong('must be a whole number of at least 1, "units" or "auto"', choices=STAGE_RULES)


def _cuts(cuts: tuple[int, ...]) -> tuple[int, ...]:
    if any(cut < 1 for cut in cuts) or any(b <= a for a, b in pairwise(cuts)):
        raise _wrong("must be unit numbers from 1 up, each larger than the one before")
    return cuts


def _schedule(value: Any) -> Any:
    if isinstance(value, str) and value in SCHEDULE_NAMES:
        return value
    if not isinstance(value, (list, tuple)):
        known = ", ".join(f'"{name}"' for name in SCHEDULE_NAMES)
        raise _wrong(
            f"must be one of {known}, or a list with one lookahead per stage", choices=SCHEDULE_NAMES
        )
    if not value or not all(_is_whole(item) and item >= 0 for item in value):
        raise _wrong("must hold one whole number of at least 0 per stage")
    if value[-1] != 0:
        raise _wrong("must end with 0: the last stage has nothing to run ahead of")
    if any(b > a for a, b in pairwise(value)):
        raise _wrong("must not increase from one stage to the next")
    return tuple(value)


def _lookahead(value: Any) -> Any:
    if not isinstance(value, (list, tuple)) or isinstance(value, str):
        raise _wrong("must be a list with one lookahead per stage, or empty")
    return _schedule(value) if value else ()


def _milestones(milestones: tuple[int, ...]) -> tuple[int, ...]:
    if any(epoch < 1 for epoch in milestones) or any(b <= a for a, b in pairwise(milestones)):
        raise _wrong("must be epochs from 1 up, each later than the one before")
    return milestones


def _device(value: str) -> str:
    if _DEVICE.fullmatch(value) is None:
        raise _wrong('must be "auto", "cpu", "cuda" or "cuda:N"', choices=("auto", "cpu", "cuda", "cuda:0"))
    return value


def _devices(devices: tuple[str, ...]) -> tuple[str, ...]:
    for device in devices:
        if _ONE_DEVICE.fullmatch(device) is None:
            raise _wrong(f'must hold "cpu" or "cuda:N" only, and "{device}" is neither')
    return devices


def _interval(value: Any) -> Any:
    try:
        parse_interval(value if isinstance(value, str) else "")
    except ValueError as error:
        raise _wrong(str(error)) from None
    return value


class _Section(BaseModel):
    model_config = ConfigDict(
        use_attribute_docstrings=True, extra="forbid", strict=True, frozen=True, allow_inf_nan=False
    )


class ModelSection(_Section):
    """The net."""

    name: Annotated[str, AfterValidator(_model_name)]
    """A name from `petractl ls models`, or "package.module:function" that returns a list of units."""
    width: int = Field(default=64, ge=1, le=MAX_WIDTH)
    """Channels of the stem per stream; later groups have 2, 4, 8 times as many (bottleneck: 4x those)."""
    classes: int = Field(default=0, ge=0, le=MAX_CLASSES)
    """Classes that the head tells apart; 0 = as many as the data have."""
    stem: Literal["auto", "cifar", "imagenet"] = "auto"
    """First layer: "cifar" (3x3), "imagenet" (7x7, stride 2, max-pool), "auto" (imagenet from side 96 on)."""
    depth: int = Field(default=8, ge=1, le=MAX_DEPTH)
    """Number of blocks; for revnet-iso."""
    weights: str = ""
    """Path of a safetensors file with starting weights; empty = random ones, from the seed."""
    memory_format: Literal["channels-last", "contiguous"] = "channels-last"
    """How image tensors lie in memory; "channels-last" is the faster one for convolutions."""
    arguments: dict[str, JsonValue] = {}
    """Table of keyword arguments for a "package.module:function" model."""


class DataSection(_Section):
    """The data."""

    name: Annotated[str, AfterValidator(_dataset_name)] = "digits"
    """A name from `petractl ls datasets`; "digits" needs no download, "shards" is any set in shards."""
    train: Annotated[str | tuple[str, ...], BeforeValidator(_source)] = ""
    """Training data: folder, path, brace pattern ("train-{00..04}.tar"), URL or list; empty = data/<name>."""
    val: Annotated[str | tuple[str, ...], BeforeValidator(_source)] = ""
    """Test data, given like `train`; empty = in the folder of `train`, or data/<name>."""
    download: bool = False
    """Download the set into data/<name> where it is missing: cifar10, cifar100, fashion-mnist."""
    batch_size: int = Field(default=64, ge=1, le=MAX_SAMPLES)
    """Samples per microbatch; an update averages batch_size x method.accumulation x replicas samples."""
    eval_batch_size: int = Field(default=0, ge=0, le=MAX_SAMPLES)
    """Samples per batch in evaluation; 0 = batch_size, but at least 256."""
    steps_per_epoch: int = Field(default=0, ge=0)
    """Microbatches per epoch and replica; 0 = one pass over the training data, shared by the replicas."""
    drop_last: bool = False
    """Leave out the last microbatch of an epoch where it is not full."""
    workers: Annotated[int | str, BeforeValidator(_workers)] = "auto"
    """Processes (sets in memory: threads) that prepare data; "auto" = as needed. The data stay the same."""
    resident: bool = False
    """Keep all images, decoded once, on the training device and augment them there; for sets that fit."""
    shuffle_buffer: int = Field(default=10_000, ge=0)
    """Places that shuffling moves a sample at most, in shards in random order; 0 = the whole set."""
    augment: bool = True
    """Augment training images: random crop and flip, as far as they suit the data."""
    crop: Literal["auto", "random-resized", "pad"] = "auto"
    """Random crop: of a random size, resized; or "pad" by 4, as CIFAR; "auto" = "pad" for images up to 64."""
    crop_scale: float = Field(default=0.08, gt=0, le=1)
    """Smallest share of a photograph's area that "random-resized" crops."""
    image_size: int = Field(default=0, ge=0, le=MAX_SIDE)
    """Side of a photograph after the crop, or of a fake image; 0 = 224, fake: 32."""
    resize: int = Field(default=0, ge=0, le=MAX_SIDE)
    """Length of a photograph's short side before the centre crop of evaluation; 0 = image_size x 256/224."""
    decoder: Literal["auto", "pillow", "torchvision"] = "auto"
    """What decodes photographs; "auto" = the one measured to be the fastest."""
    image_entries: Annotated[tuple[str, ...], AfterValidator(_image_entries)] = IMAGE_SUFFIXES
    """Endings of the images in shards; nothing else is decoded."""
    label_entry: Annotated[str, AfterValidator(_entry)] = "cls"
    """Ending of the labels in shards: whole numbers from 0, as text."""
    classes: int = Field(default=0, ge=0, le=MAX_CLASSES)
    """Number of classes of shards or fake data; 0 = as their index says, imagenet: 1000, fake: 10."""
    on_error: Literal["stop", "skip"] = "stop"
    """A sample that cannot be read stops the run, or is left out, counted and named ("skip")."""
    max_skipped: int = Field(default=100, ge=0)
    """Samples that a run may leave out before it stops all the same."""
    cache: str = ""
    """Folder of unpacked and downloaded shards; empty = petractl/shards in $XDG_CACHE_HOME or ~/.cache."""
    allow_pipe: bool = False
    """Run "pipe:command" places in a shell. Only with recipes that you trust: it runs any command."""
    channels: int = Field(default=0, ge=0, le=MAX_WIDTH)
    """Channels of fake images; 0 = 3."""
    fake_samples: int = Field(default=1024, ge=4, le=MAX_SAMPLES)
    """Number of fake training images."""


class MethodSection(_Section):
    """How gradients are computed: what a stage keeps between forward and backward."""

    name: Annotated[str, AfterValidator(_method_name)] = "petra"
    """A name from `petractl ls methods`, such as "petra", "backprop" or "forward-gradient"."""
    accumulation: int = Field(default=1, ge=1)
    """k: a stage updates its parameters after every k-th of its backwards, with the mean of k gradients."""
    keep: Literal["graph", "inputs+parameters", "inputs", "parameters"] = "graph"
    """What "delayed" keeps of a forward until its backward."""
    bn_statistics: Literal["backward", "forward"] = "backward"
    """The evaluation that updates batch norm's running statistics, where there are two of them."""
    target: Target = "global"
    """The gradient to estimate: of the net's loss, the block's own ("local"), the next one's, own + next."""
    guess: Guess = "local"
    """What the target is projected on: noise, a loss's gradient, or that of a net that does not learn."""
    space: Space = "activation"
    """Where the two are compared: block outputs, parameters per batch, or per sample ("weight")."""
    projection: Projection = "exact"
    """What is kept of the projection: all, its sign, a sign drawn at random; or onto the guesses' span."""
    directions: int = Field(default=1, ge=1)
    """Random guesses per microbatch; their estimates are averaged."""
    normalise_random: bool = False
    """Divide by a random guess's squared norm too: a shorter estimate, no longer unbiased."""
    granularity: Granularity = "tensor"
    """What has a coefficient of its own among parameters: a "tensor", a "block", or the whole "net"."""
    coefficients: Coefficients = "batch"
    """One coefficient per block output for the whole "batch", or one for every "sample"."""
    statistics: Literal["auto", Statistics] = "auto"
    """Batch statistics in the target's derivative: differentiated ("live"), or constants ("held")."""
    derivative: Literal["auto", Derivative] = "auto"
    """How the target is measured along the guess: in "forward" mode, or by a backward pass ("reverse")."""
    tangents: Literal["auto", Tangents] = "auto"
    """Forward mode carries the guesses of "all" blocks at once, or of "one" at a time, for less memory."""

    @property
    def estimator(self) -> Estimator | None:
        """The estimator of a method that trains block by block; None for the other methods."""
        if self.name == "local":
            return LOCAL
        if self.name != "forward-gradient":
            return None
        return Estimator(**{key: getattr(self, key) for key in ESTIMATOR_KEYS})


class AuxiliarySection(_Section):
    """The nets that give blocks a loss of their own, for "local" and "forward-gradient"."""

    name: Annotated[str, AfterValidator(_auxiliary_name)] = "cnn"
    """The net: "cnn", "mlp", "linear", "copy" (of the next block), or "package.module:function"."""
    width: int = Field(default=0, ge=0, le=MAX_WIDTH)
    """Width of the layers of "cnn" and "mlp"; 0 = the paper's: 32 and 1024, above 8 blocks 16 and 512."""
    arguments: dict[str, JsonValue] = {}
    """Table of keyword arguments for a "package.module:function" net."""


class PartitionSection(_Section):
    """How the net is cut into stages."""

    stages: Annotated[int | str, BeforeValidator(_stages)] = "auto"
    """Number of stages, "units" (one per unit, the finest), or "auto" (chosen for the devices)."""
    cuts: Annotated[tuple[int, ...], AfterValidator(_cuts)] = ()
    """The first unit of every stage but the first, instead of `stages`; units count from 0, the stem."""
    balance: Literal["flops", "time", "memory", "parameters", "uniform"] = "flops"
    """What is made even: FLOPs, measured "time", "memory", parameters, or the number of units ("uniform")."""


class EngineSection(_Section):
    """How and where the stages run."""

    mode: Literal["auto", "in-process", "processes"] = "auto"
    """Where stages live: all "in-process", or one process each ("processes"); "auto" = as the rest needs."""
    schedule: Annotated[str | tuple[int, ...], BeforeValidator(_schedule)] = "auto"
    """Forwards ahead: "auto", "tight", "paper", "least", "sequential", a list; exact: "gpipe", "1f1b" ..."""
    lookahead: Annotated[tuple[int, ...], BeforeValidator(_lookahead)] = ()
    """What "least" has chosen, written to resolved.toml for a resumed run to keep; empty = to be chosen."""
    slack: int = Field(default=0, ge=0)
    """Extra forwards ahead of "tight", to hide latency; every one of them adds staleness."""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """Device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"."""
    devices: Annotated[tuple[str, ...], AfterValidator(_devices)] = ()
    """A "cpu" or "cuda:N" per stage, or per stage of every replica in turn; empty = chosen from `device`."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the pipeline on disjoint data; the gradients of an update are averaged over them."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """What carries messages between processes: "gloo" (any device), "nccl" (a GPU per process), "auto"."""
    wire_dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    """Number format of messages between stages; "float32" sends them as they are, the others round."""
    wire_dtype_backward: Literal["", "float32", "bfloat16", "float16", "int8"] = ""
    """Number format of messages from a stage to the one before it; empty = as wire_dtype."""
    stall_timeout: float = Field(default=600.0, ge=0)
    """Seconds that a stage waits for a message before the run ends with a report; 0 = for ever."""
    max_restarts: int = Field(default=0, ge=0, le=1_000_000)
    """Times that all processes go on from the last checkpoint after one was killed or failed; 0 = never."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format: "float32", or "bfloat16" autocast with the streams' additions in float32."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads per process; 0 = OMP_NUM_THREADS if it is set, else cores / processes on this machine."""


class OptimizerSection(_Section):
    """How parameters are updated; every stage has its own optimizer."""

    name: Annotated[str, AfterValidator(_optimizer_name)] = "sgd"
    """The optimizer: "sgd", "adamw", "lars", or "package.module:Class"."""
    lr: float = Field(default=0.1, ge=0)
    """Learning rate after warm-up."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of sgd and lars."""
    nesterov: bool = True
    """Nesterov's form of momentum."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Weight decay (adamw's is decoupled from the gradient)."""
    decay_norm_and_bias: bool = False
    """Apply weight decay to the parameters of norms and to biases too."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        default=(0.9, 0.999), min_length=2, max_length=2
    )
    """Decay rates of adamw's two averages."""
    clip_norm: float = Field(default=0.0, ge=0)
    """Largest norm of a stage's gradient, larger ones are scaled down; 0 = no limit."""
    scale_lr: bool = False
    """Multiply lr by data.batch_size x method.accumulation x engine.replicas / 256."""
    arguments: dict[str, JsonValue] = {}
    """Table of further keyword arguments for the optimizer."""


class TrainingSection(_Section):
    """How long, and how the learning rate moves."""

    epochs: int = Field(default=10, ge=1)
    """Number of epochs."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs in which the learning rate rises linearly from 0."""
    lr_decay: Literal["multi-step", "cosine", "polynomial", "constant"] = "cosine"
    """How the rate falls: in steps at milestones, along a cosine or a polynomial to 0, or not at all."""
    milestones: Annotated[tuple[int, ...], AfterValidator(_milestones)] = ()
    """Epochs after which "multi-step" multiplies the rate by decay_factor."""
    decay_factor: float = Field(default=0.1, gt=0, le=1)
    """Factor of "multi-step"."""
    polynomial_power: float = Field(default=2.0, gt=0)
    """Power of "polynomial"."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target spread evenly over all classes."""
    non_finite: Literal["stop", "skip"] = "stop"
    """A number that is not finite stops the run ("stop"), or its update is left out and counted ("skip")."""
    evaluate_every: int = Field(default=1, ge=1)
    """Epochs from one evaluation to the next; the last epoch is always evaluated."""


class RunSection(_Section):
    """The run and its folder."""

    seed: int = Field(default=0, ge=0)
    """Seed of weights, data order, augmentation and dropout."""
    directory: str = Field(default="runs", min_length=1)
    """Folder in which run folders are made."""
    checkpoint_every: Annotated[str, BeforeValidator(_interval)] = "1 epoch"
    """Time between checkpoints: "1 epoch", "500 updates", "10 min"; training goes on meanwhile."""
    keep_last: int = Field(default=2, ge=1)
    """Number of last checkpoints that are kept; the best one is kept besides."""
    stop_deadline: float = Field(default=25.0, gt=0, le=86400)
    """Seconds in which a run that is told to stop saves where it is; the last checkpoint stands otherwise."""
    notice_file: str = ""
    """File whose coming tells that the machine will go: the run then saves and stops; empty = none."""

    @property
    def interval(self) -> Interval:
        """`checkpoint_every`, read."""
        return parse_interval(self.checkpoint_every)


class TrackingSection(_Section):
    """Where the run is logged besides its own journal."""

    mlflow: bool = True
    """Log parameters, metrics and plots to MLflow."""
    uri: str = ""
    """MLflow tracking server; empty = a SQLite store in run.directory."""
    experiment: str = Field(default="petractl", min_length=1)
    """MLflow experiment."""
    run_name: str = ""
    """MLflow run name; empty = the run folder's name."""


class DiagnosticsSection(_Section):
    """How good the gradients are that stages learn from."""

    every: int = Field(default=0, ge=0)
    """Microbatches from one comparison with backpropagation to the next; 0 = none. In-process only."""
    drift: float = Field(default=0.0, ge=0)
    """Relative error of rebuilt inputs that is warned of; 0 = 0.01, and 1 with "petra"."""
    drift_every: int = Field(default=100, ge=0)
    """Microbatches from one look at rebuilt inputs to the next, a few samples each; 0 = none."""


class Recipe(_Section):
    """A whole recipe; the first three sections must be there."""

    model: ModelSection
    data: DataSection
    method: MethodSection
    auxiliary: AuxiliarySection = AuxiliarySection()
    partition: PartitionSection = PartitionSection()
    engine: EngineSection = EngineSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    run: RunSection = RunSection()
    diagnostics: DiagnosticsSection = DiagnosticsSection()
    tracking: TrackingSection = TrackingSection()

    @property
    def drift_limit(self) -> float:
        """The error of rebuilt inputs that is warned of; with petra, updates come in between."""
        return self.diagnostics.drift or (1.0 if self.method.name == "petra" else 0.01)

    def with_cuts(self, cuts: Sequence[int]) -> "Recipe":
        """Return the recipe with the cuts that were chosen, in place of the rule that chose them."""
        # No cuts alone would leave the number of stages to the rule again.
        chosen = PartitionSection(cuts=tuple(cuts)) if cuts else PartitionSection(stages=1)
        return self.model_copy(update={"partition": chosen})

    def with_lookahead(self, lookahead: Sequence[int]) -> "Recipe":
        """Return the recipe with the lookaheads that "least" has chosen; () to have them chosen again."""
        return self.model_copy(
            update={"engine": self.engine.model_copy(update={"lookahead": tuple(lookahead)})}
        )

    def with_mode(self, mode: Literal["in-process", "processes"]) -> "Recipe":
        """Return the recipe with the mode that was chosen."""
        return self.model_copy(update={"engine": self.engine.model_copy(update={"mode": mode})})


SECTIONS: dict[str, type[BaseModel]] = {
    name: field.annotation
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
REQUIRED_SECTIONS = tuple(name for name, field in Recipe.model_fields.items() if field.is_required())
