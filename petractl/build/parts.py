"""The parts that a recipe names, each from its own keys: net, data, optimiser, formats, threads."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from petractl.data import DataInfo
from petractl.data.request import Asked
from petractl.data.worker_processes import automatic_workers
from petractl.engine.schedule import num_updates
from petractl.engine.update import Updater
from petractl.models.registry import BuiltModel, build_model
from petractl.optim import LearningRate, build_optimizer, clip_norm_
from petractl.recipe.checks import idle_keys
from petractl.recipe.schema import Recipe

IMAGENET_STEM_FROM_SIDE = 96
MIN_EVAL_BATCH = 256
_ASKED_KEYS = tuple(Asked.__annotations__)


def num_threads(recipe: Recipe, *, processes: int = 1) -> int:
    """Return the CPU threads of a process: the recipe's, else OMP_NUM_THREADS, else its share of the cores.

    `processes` run on this machine.
    """
    if recipe.engine.threads:
        return recipe.engine.threads
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, len(os.sched_getaffinity(0)) // processes)


def data_request(recipe: Recipe) -> dict[str, Any]:
    """Return what the data set is asked for, as keyword arguments."""
    data = recipe.data
    idle = {idle.key for idle in idle_keys(recipe)}
    asked = {key: getattr(data, key) for key in _ASKED_KEYS if f"data.{key}" not in idle}
    return {"train": data.train, "val": data.val, **asked}


def num_workers(recipe: Recipe, *, decodes: bool, device: torch.device, processes: int = 1) -> int:
    """Return how many workers prepare data; `processes` of the run are on this machine.

    "auto" has workers only where images are decoded as they are read and the CPU has nothing else to do.
    """
    if isinstance(recipe.data.workers, int):
        return recipe.data.workers
    if not decodes:
        return 0
    return automatic_workers(on_cpu=device.type == "cpu", processes=processes)


def stem_of(recipe: Recipe, info: DataInfo) -> str:
    """Return the kind of the first layer."""
    if recipe.model.stem != "auto":
        return recipe.model.stem
    return "imagenet" if max(info.height, info.width) >= IMAGENET_STEM_FROM_SIDE else "cifar"


def build_units(recipe: Recipe, *, classes: int, stem: str, channels: int) -> BuiltModel:
    """Build the units."""
    return build_model(
        recipe.model.name,
        width=recipe.model.width,
        classes=classes,
        in_channels=channels,
        stem=stem,
        depth=recipe.model.depth,
        arguments=recipe.model.arguments,
    )


def make_optimizer(recipe: Recipe, parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Build the optimiser of a stage."""
    choice = recipe.optimizer
    return build_optimizer(
        choice.name,
        parameters,
        lr=choice.lr,
        momentum=choice.momentum,
        nesterov=choice.nesterov,
        weight_decay=choice.weight_decay,
        decay_norm_and_bias=choice.decay_norm_and_bias,
        betas=(choice.betas[0], choice.betas[1]),
        arguments=choice.arguments,
    )


def make_updater(recipe: Recipe, steps_per_epoch: int, parameters: list[tuple[str, nn.Parameter]]) -> Updater:
    """Build the updater of a stage."""
    training, k = recipe.training, recipe.method.accumulation
    scale = recipe.data.batch_size * k * recipe.engine.replicas / 256 if recipe.optimizer.scale_lr else 1.0
    rate = LearningRate(
        base_lr=recipe.optimizer.lr * scale,
        updates_per_epoch=num_updates(num_microbatches=steps_per_epoch, accumulation=k),
        epochs=training.epochs,
        warmup_epochs=training.warmup_epochs,
        decay=training.lr_decay,
        milestones=training.milestones,
        factor=training.decay_factor,
        power=training.polynomial_power,
    )
    clip: Callable[..., torch.Tensor] | None = None
    if recipe.optimizer.clip_norm:
        clip = partial(clip_norm_, max_norm=recipe.optimizer.clip_norm)
    return Updater(make_optimizer(recipe, parameters), learning_rate=rate, clip=clip)


def memory_format(recipe: Recipe) -> torch.memory_format:
    """Return how images lie in memory."""
    return torch.channels_last if recipe.model.memory_format == "channels-last" else torch.contiguous_format


def autocast_dtype(recipe: Recipe) -> torch.dtype | None:
    """Return the lower precision, or None."""
    return torch.bfloat16 if recipe.engine.precision == "bfloat16" else None


def eval_batch_size(recipe: Recipe) -> int:
    """Return the samples of a batch in evaluation."""
    return recipe.data.eval_batch_size or max(recipe.data.batch_size, MIN_EVAL_BATCH)


def wire_formats(recipe: Recipe) -> tuple[str, str]:
    """Return the number formats of messages upwards and downwards."""
    upwards = recipe.engine.wire_dtype
    choice = recipe.method.estimator
    if choice is not None and choice.carries_tangents:
        # A few numbers, of blocks of very different scales: rounded together, the small ones would be 0.
        return upwards, "float32"
    return upwards, recipe.engine.wire_dtype_backward or upwards
