"""One evaluation of one unit, under the conditions that a method asks for.

The same unit is evaluated with or without a graph, with the current or with stashed parameters, with running
statistics that follow or stand still, always with the randomness of its microbatch. `Evaluator` holds what is
needed to switch between these conditions cheaply; nothing here knows a method or a schedule.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from petractl.errors import UserError
from petractl.estimator import Statistics
from petractl.methods.dual import Function, Row, Tangents, carry, lacks_forward_mode, one_by_one
from petractl.methods.dual_mode import NotCarriedError
from petractl.methods.protected_buffers import buffers_of, protected
from petractl.methods.randomness import derive_seed, seed_device
from petractl.models.units import Reconstruction, Reversible, Streams, as_streams, parts_begin_with

Parameters = Sequence[Tensor] | None
"""Tensors to use in the places of a unit's parameters; None for the current ones."""


@dataclass(frozen=True, slots=True)
class Linearization:
    """A unit's evaluation with its graph: leaf inputs, outputs, and the parameters it used."""

    inputs: Streams
    outputs: Streams
    parameters: Sequence[Tensor]

    def vjp(self, gradients: Streams, *, retain_graph: bool = False) -> tuple[Streams, list[Tensor | None]]:
        """Return the gradients of inputs and parameters; frees the graph unless it is retained.

        Where no input needs a gradient (images) there are none; beside others, one that cannot have one (an
        index, a mask) gets zeros.
        """
        wanted = [x for x in self.inputs if x.requires_grad]
        pairs = [(y, g) for y, g in zip(self.outputs, gradients, strict=True) if y.requires_grad]
        targets = [*wanted, *self.parameters]
        found: Sequence[Tensor | None] = [None] * len(targets)
        if pairs and targets:
            outputs, seeds = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, targets, seeds, allow_unused=True, retain_graph=retain_graph)
        of_inputs = {id(x): g for x, g in zip(wanted, found, strict=False)}
        gradients_in = [(x, of_inputs.get(id(x))) for x in self.inputs] if wanted else []
        filled = tuple(torch.zeros_like(x) if g is None else g for x, g in gradients_in)
        return filled, list(found[len(wanted) :])


class Evaluator:
    """Evaluates one unit under chosen conditions.

    `index` is the unit's place in the whole net, `autocast_dtype` the lower precision or None. Outputs in the
    lower precision are cast back to float32, so that the streams' additions and reconstructions are
    float32's.
    """

    def __init__(
        self,
        unit: nn.Module,
        *,
        index: int,
        name: str,
        seed: int,
        device: torch.device,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.unit = unit
        self.index = index
        self.name = name
        self.parameters: list[Tensor] = [p for p in unit.parameters() if p.requires_grad]
        self._seed = seed
        self._device = device
        self._autocast_dtype = autocast_dtype
        self._slots = _parameter_slots(unit, self.parameters)
        self._norms = [m for m in unit.modules() if isinstance(m, _NormBase) and m.track_running_stats]
        self._buffer_slots = _other_buffer_slots(unit, self._norms)
        self._protected: list[list[Tensor]] = []

    def protect_buffers(self) -> None:
        """From now on, put buffers back where an evaluation leaves in them what is not finite."""
        self._protected = buffers_of(self.unit)

    def plain(
        self, inputs: Streams, *, microbatch: int, live: bool, parameters: Sequence[Tensor] | None
    ) -> Streams:
        """Evaluate without a graph; `live` lets the running statistics follow."""
        with (
            torch.no_grad(),
            self._protection(live=live),
            self._conditions(microbatch, live=live, parameters=parameters),
        ):
            return self._evaluate(inputs)

    def linearize(
        self,
        inputs: Streams,
        *,
        microbatch: int,
        live: bool,
        parameters: Sequence[Tensor] | None,
        input_gradient: bool = True,
    ) -> Linearization:
        """Evaluate with a graph whose leaves are the inputs and the parameters."""
        leaves = tuple(_leaf(x, requires_grad=input_gradient) for x in inputs)
        with (
            torch.enable_grad(),
            self._protection(live=live),
            self._conditions(microbatch, live=live, parameters=parameters),
        ):
            outputs = self._evaluate(leaves)
        return Linearization(leaves, outputs, self.parameters if parameters is None else parameters)

    def embedded(
        self, inputs: Streams, *, microbatch: int, live: bool, parameters: Parameters = None
    ) -> Streams:
        """Evaluate as a part of a larger graph: gradients flow on to whatever made the inputs."""
        with (
            torch.enable_grad(),
            self._protection(live=live),
            self._conditions(microbatch, live=live, parameters=parameters),
        ):
            return self._evaluate(inputs)

    def push(
        self,
        inputs: Streams,
        tangents: Sequence[Row],
        *,
        microbatch: int,
        live: bool,
        parameters: Parameters = None,
        directions: Sequence[Row] = (),
        statistics: Statistics = "live",
    ) -> tuple[Streams, list[Tangents]]:
        """Evaluate once, without a graph, and carry tangents of the inputs and directions of the parameters.

        A direction has a tangent, or None, for each of the unit's parameters; a row of `tangents` has one for
        each input, and may go on with those of the parameters where one direction moves both. Returns the
        outputs and one tuple of their tangents per row, those of `tangents` first. `live` is as in `plain`:
        the running statistics follow once, whatever the number of rows.
        """
        used = self.parameters if parameters is None else parameters
        count = len(inputs)
        moves = bool(directions) or any(len(row) > count for row in tangents)
        primals = (*inputs, *used) if moves else inputs
        rows: list[Row] = [[*row, *[None] * (len(primals) - len(row))] for row in tangents]
        rows += [[*[None] * count, *direction] for direction in directions]

        def function(*, live: bool) -> Function:
            def evaluate(*values: Tensor) -> Streams:
                moved = values[count:] if moves else parameters
                with self._conditions(microbatch, live=live, parameters=moved):
                    return self._evaluate(values[:count])

            return evaluate

        kept = [(b, b.clone()) for b in self.unit.buffers()] if live and len(rows) > 1 else []
        with self._protection(live=live):
            try:
                return carry(function(live=live), primals, rows, statistics=statistics)
            except NotCarriedError:
                for buffer, value in kept:
                    buffer.copy_(value)
            except RuntimeError as error:
                if lacks_forward_mode(error):
                    raise self._has_no_forward_mode() from error
                raise
            return one_by_one(lambda k: function(live=live and k == 0), primals, rows, statistics=statistics)

    def reconstruct(
        self, outputs: Streams, *, microbatch: int, live: bool, parameters: Sequence[Tensor] | None
    ) -> Reconstruction:
        """Rebuild a reversible unit's inputs with the graph for its vector-Jacobian product."""
        unit = cast(Reversible, self.unit)
        with (
            torch.no_grad(),
            self._protection(live=live),
            self._conditions(microbatch, live=live, parameters=parameters),
        ):
            return unit.reconstruct(*outputs)

    def _evaluate(self, inputs: Streams) -> Streams:
        versions = [x._version for x in inputs]
        try:
            outputs = self._float32(as_streams(self.unit(*inputs)))
        except RuntimeError as error:
            if "leaf Variable that requires grad" in str(error):
                raise self._changes_its_input() from error
            error.add_note(f"in unit {self.index} ({self.name})")
            raise
        if versions != [x._version for x in inputs]:
            raise self._changes_its_input()
        return outputs

    def _changes_its_input(self) -> UserError:
        return UserError(
            "it changes its input in place, which its neighbour or its own backward still needs",
            where=f"unit {self.index} ({self.name})",
            hint="use the out-of-place form, for example ReLU(inplace=False)",
        )

    def _has_no_forward_mode(self) -> UserError:
        return UserError(
            "it has an operation that PyTorch cannot differentiate in forward mode",
            where=f"unit {self.index} ({self.name})",
            hint='give its autograd function a jvp, or set method.derivative = "reverse"',
        )

    @contextmanager
    def _conditions(
        self, microbatch: int, *, live: bool, parameters: Sequence[Tensor] | None
    ) -> Iterator[None]:
        def seed(*part: int) -> None:
            seed_device(derive_seed(self._seed, self.index, microbatch, *part), device=self._device)

        seed()
        with ExitStack() as stack:
            stack.enter_context(parts_begin_with(seed))
            if parameters is not None:
                stack.enter_context(self._substituted(parameters))
            if not live:
                stack.enter_context(self._frozen_statistics())
            stack.enter_context(self._autocast())
            yield

    def _protection(self, *, live: bool) -> AbstractContextManager[None]:
        return protected(self._protected) if live and self._protected else nullcontext()

    def _autocast(self) -> AbstractContextManager[object]:
        if self._autocast_dtype is None:
            return nullcontext()
        # No cache: a weight cast under no_grad would be found again, without a graph, by an evaluation with
        # one.
        return torch.autocast(self._device.type, dtype=self._autocast_dtype, cache_enabled=False)

    def _float32(self, streams: Streams) -> Streams:
        if self._autocast_dtype is None:
            return streams
        return tuple(x.float() if x.dtype is self._autocast_dtype else x for x in streams)

    @contextmanager
    def _substituted(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Let the unit read other tensors in the places of its parameters."""
        for table, key, position in self._slots:
            table[key] = parameters[position]
        try:
            yield
        finally:
            for table, key, position in self._slots:
                table[key] = self.parameters[position]

    @contextmanager
    def _frozen_statistics(self) -> Iterator[None]:
        """Normalise by batch statistics and leave every buffer as it is."""
        kept = [(table, key, table[key], _copy(table[key])) for table, key in self._buffer_slots]
        training = [norm for norm in self._norms if norm.training]
        for norm in training:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in training:
                norm.track_running_stats = True
            for table, key, buffer, copy in kept:
                table[key] = buffer
                # Only what was changed: a graph that uses the buffer would be invalid after a copy into it.
                if buffer is not None and copy is not None and buffer._version != copy[0]:
                    buffer.copy_(copy[1])


def _leaf(x: Tensor, *, requires_grad: bool) -> Tensor:
    x = x.detach()
    return x.requires_grad_() if requires_grad and x.is_floating_point() else x


def _parameter_slots(
    unit: nn.Module, parameters: Sequence[Tensor]
) -> list[tuple[dict[str, Tensor | None], str, int]]:
    """Return every place where a module holds one of the parameters (a shared one has several)."""
    position = {id(p): n for n, p in enumerate(parameters)}
    slots: list[tuple[dict[str, Tensor | None], str, int]] = []
    for module in unit.modules():
        table: dict[str, Tensor | None] = module._parameters  # type: ignore[assignment]
        slots += [(table, key, position[id(p)]) for key, p in table.items() if id(p) in position]
    return slots


def _other_buffer_slots(
    unit: nn.Module, norms: Sequence[nn.Module]
) -> list[tuple[dict[str, Tensor | None], str]]:
    """Return the places of the buffers that no batch norm owns: those are put back by hand."""
    owners = {id(norm) for norm in norms}
    return [(m._buffers, key) for m in unit.modules() if id(m) not in owners for key in m._buffers]


def _copy(buffer: Tensor | None) -> tuple[int, Tensor] | None:
    """Return a buffer's count of in-place changes and its value."""
    return None if buffer is None else (buffer._version, buffer.clone())
