"""Puts a checkpoint back into the stages of this process: at the end of an epoch, or in the middle of one.

In the middle there are two cases. The pipeline is the one that was saved: every stage gets back what it had
in flight, and the run goes on with the same bits, whatever the number of processes. Or it is another one:
then the checkpoint must have been drained first, nothing is in flight, and the open averages of an incomplete
group are found by the names of their parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petractl.build import Built
from petractl.checkpoint import Checkpoint, load_checkpoint
from petractl.engine.cut import StageCut, StageRecord, restore_recorded
from petractl.engine.messages import Activation
from petractl.engine.stage import Counters
from petractl.engine.tensor_tree import put_together
from petractl.engine.trainer import TrainingState
from petractl.errors import Problem, RunError, UserError, lack_of_memory
from petractl.optim import load_optimizer_state
from petractl.saving.snapshot import (
    AUXILIARY,
    BUFFER,
    GRADIENT,
    MODEL,
    OPTIMIZER,
    ROWS,
    Photographer,
    part_name,
)


class Restorer:
    """Puts a checkpoint back; `state` is where it stood."""

    def __init__(
        self, saved: Checkpoint, state: TrainingState, built: Built, photographer: Photographer
    ) -> None:
        self._saved = saved
        self._state = state
        self._built = built
        self._photographer = photographer
        self._replica = built.world.seat.replica
        self._device = built.placement.device
        self.skipped: dict[int, dict[str, Any]] = {}
        """What the stages had left out in the epoch so far."""

    def restore(self) -> list[Problem]:
        """Put all of it back; returns what the user should know.

        An auxiliary net that the checkpoint does not have, since its block is a new one, begins anew.

        Raises:
            RunError: the checkpoint is not one of this run.
        """
        try:
            return self._restore()
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
            if lack_of_memory(error):
                raise
            raise RunError(
                f"it does not fit this run ({type(error).__name__}: {str(error).splitlines()[0]})",
                where=str(self._saved.path),
                hint="the folder's recipe, or the code of its units, is not the one that the run began with",
            ) from error

    def _restore(self) -> list[Problem]:
        longer = self._check_length()
        self._built.network.load_state_dict(self._saved.tensors[MODEL])
        new, notes = self._restore_auxiliary()
        notes += longer
        for stage in self._built.pipeline.stages:
            load_optimizer_state(
                stage.updater.optimizer,
                [(n, p) for n, p in self._photographer.named_parameters(stage) if not n.startswith(new)],
                self._saved.tensors[OPTIMIZER],
                self._saved.state["optimizer_numbers"],
            )
        if not self._saved.microbatches:
            counters = Counters(**self._saved.state["counters"])
            for stage in self._built.pipeline.stages:
                stage.counters = replace(counters)
        elif self._state.is_drained:
            self._restore_drained()
        else:
            self._restore_in_flight()
        return notes

    def _check_length(self) -> list[Problem]:
        """Compare the epochs' length with that of before; returns what the user should know.

        Raises:
            UserError: it is another one, and the checkpoint lies within an epoch.
        """
        now, before = self._built.length.rows, self._saved.state.get(ROWS)
        if before is None or before == now:
            return []
        what = f"an epoch has {now:,} microbatch{'es' if now > 1 else ''} with these data, and had {before:,}"
        if self._saved.microbatches:
            raise UserError(
                f"{what}: it cannot go on in the middle of one",
                where=str(self._saved.path),
                hint="give the data that the run began with, or delete this checkpoint to go on from an "
                "earlier one",
            )
        return [Problem("data", what, "the learning rate goes on by the number of updates made")]

    def _restore_auxiliary(self) -> tuple[tuple[str, ...], list[Problem]]:
        """Put the auxiliary nets back that are the same; return what the names of the others begin with."""
        if self._built.auxiliary is None:
            return (), []
        found = self._saved.tensors.get(AUXILIARY, {})
        own = self._built.auxiliary.state_dict()
        of_net: dict[str, list[str]] = {}
        for name in own:
            of_net.setdefault(".".join(name.split(".")[:2]) + ".", []).append(name)
        new = tuple(
            net
            for net, names in of_net.items()
            if any(name not in found or found[name].shape != own[name].shape for name in names)
        )
        kept = {name: found[name] for net, names in of_net.items() if net not in new for name in names}
        self._built.auxiliary.load_state_dict({**own, **kept})
        if not new:
            return (), []
        units = ", ".join(net.split(".")[1] for net in new)
        what = f"the auxiliary nets of the blocks that end with units {units} begin anew"
        return new, [Problem("partition", what, "these blocks are not those of the checkpoint")]

    def _restore_in_flight(self) -> None:
        """Give every stage back what it had, its messages too."""
        cuts = []
        for stage in self._built.pipeline.stages:
            part = part_name(stage.index, self._replica)
            tensors = self._saved.pipelines.get(part, {})
            described = self._saved.state["pipeline"]["stages"][part]
            tree = put_together(described, tensors, device=self._device)
            self._restore_recorded(stage, tree["recorded"])
            self._restore_open(stage, [tensors])
            if tree["skipped"] is not None:
                self.skipped[stage.index] = tree["skipped"]
            sent = tuple(
                Activation(message["microbatch"], tuple(message["streams"]), message["labels"])
                for message in tree["sent"]
            )
            cuts.append(StageCut(stage.index, self._saved.microbatches - 1, 0, sent, tree["stage"]))
        self._built.pipeline.resume(cuts, offset=self._offset)

    def _restore_drained(self) -> None:
        """Give every stage what all had done alike, and the averages by the names of parameters."""
        told = self._saved.state["pipeline"]["stages"]
        parts = sorted((name for name in told if _replica_of(name) == self._replica), key=_stage_of)
        tables = [self._saved.pipelines.get(name, {}) for name in parts]
        cuts = []
        for stage in self._built.pipeline.stages:
            # The last one has the loss; in all else they are alike.
            tree = put_together(told[parts[-1]], tables[-1], device=self._device)
            self._restore_recorded(stage, tree["recorded"])
            if stage.index < len(self._built.plan.stages) - 1:
                stage.totals.reset()
            self._restore_open(stage, tables)
            state = {"versions": [], "flights": {}, "group": tree["stage"]["group"]}
            cuts.append(StageCut(stage.index, self._saved.microbatches - 1, 0, (), state))
        self._built.pipeline.resume(cuts, offset=self._offset)

    def _restore_recorded(self, stage: StageRecord, recorded: Mapping[str, Any]) -> None:
        restore_recorded(stage, recorded)
        updates = stage.counters.updates
        stage.updater.rate = stage.updater.learning_rate(updates - 1) if updates else 0.0

    def _restore_open(self, stage: StageRecord, tables: Sequence[Mapping[str, Tensor]]) -> None:
        """Put back the averages of an incomplete group, and this replica's own buffers."""
        for name, parameter in self._photographer.named_parameters(stage):
            for table in tables:
                if GRADIENT + name in table:
                    parameter.grad = torch.empty_like(parameter).copy_(table[GRADIENT + name])
        modules: list[nn.Module] = [self._built.network]
        modules += [] if self._built.auxiliary is None else [self._built.auxiliary]
        for module in modules:
            for name, buffer in module.named_buffers():
                for table in tables:
                    if BUFFER + name in table:
                        buffer.copy_(table[BUFFER + name])

    @property
    def _offset(self) -> int:
        return self._state.epochs_done * self._built.length.rows


def load_own(path: Path, built: Built) -> Checkpoint:
    """Read what this process needs of a checkpoint: its tensors, and its replica's parts in mid-epoch.

    Raises:
        RunError: a file is missing or damaged.
    """
    names, replica = built.tensor_names(), built.world.seat.replica
    return load_checkpoint(
        path,
        wanted=lambda name: name.partition("/")[0] in names,
        pipeline=lambda part: _replica_of(part) == replica,
    )


def _replica_of(part: str) -> int:
    return int(part.partition(".replica-")[2] or 0)


def _stage_of(part: str) -> int:
    return int(part.partition(".")[0].removeprefix("stage-"))
