"""The family of methods as one table: what does a stage keep between a unit's forward and its backward?

Graph, input or nothing, with the parameters of the forward or without them: every method is a row, and PETRA
is the row that keeps nothing. The schedule is the other half: locked methods run no forward ahead,
asynchronous ones do. Methods that train block by block have no backward pass through the stages: a block has
a loss or a guess of its own (`petractl.estimator`), and keeps the graph of itself alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Keep(StrEnum):
    """What is kept of one unit's forward until its backward."""

    GRAPH = "graph"
    INPUT = "input"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Keeping:
    """What a method keeps of one unit; `parameters`: the backward uses the forward's."""

    keep: Keep
    parameters: bool = False


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A row of the table, for plain units and for reversible ones.

    `locked`: every microbatch goes all the way up and down before the next one enters. `needs_reversible`:
    without a reversible unit the method cannot do what it says. `blocks`: every stage is trained by an
    estimate of its gradient, made in the stage.
    """

    name: str
    keep: str
    locked: bool
    plain: Keeping
    reversible: Keeping
    needs_reversible: bool
    summary: str
    blocks: bool = False

    @property
    def default_schedule(self) -> str:
        """What `engine.schedule = "auto"` is."""
        return "sequential" if self.locked or self.blocks else "tight"


_INPUT = Keeping(Keep.INPUT)
_NOTHING = Keeping(Keep.NOTHING)
_GRAPH = Keeping(Keep.GRAPH, parameters=True)
_OWN_GRAPH = Keeping(Keep.GRAPH)  # forward and backward are one operation

METHODS: tuple[MethodSpec, ...] = (
    MethodSpec(
        name="petra",
        keep="",
        locked=False,
        plain=_INPUT,
        reversible=_NOTHING,
        needs_reversible=False,
        summary="PETRA: rebuilds inputs with the current parameters; no buffers, no stashing",
    ),
    MethodSpec(
        name="delayed",
        keep="graph",
        locked=False,
        plain=_GRAPH,
        reversible=_GRAPH,
        needs_reversible=False,
        summary="delayed gradients (DDG, ADL): the graph is kept, exact at the stale parameters",
    ),
    MethodSpec(
        name="delayed",
        keep="inputs+parameters",
        locked=False,
        plain=Keeping(Keep.INPUT, parameters=True),
        reversible=Keeping(Keep.INPUT, parameters=True),
        needs_reversible=False,
        summary="PipeDream's weight stashing with recomputation, exact at the stale parameters",
    ),
    MethodSpec(
        name="delayed",
        keep="inputs",
        locked=False,
        plain=_INPUT,
        reversible=_INPUT,
        needs_reversible=False,
        summary="DSP, PipeMare: recomputes from the kept input with the current parameters",
    ),
    MethodSpec(
        name="delayed",
        keep="parameters",
        locked=False,
        plain=Keeping(Keep.INPUT, parameters=True),
        reversible=Keeping(Keep.NOTHING, parameters=True),
        needs_reversible=True,
        summary="reversible with stashed parameters: inverts and differentiates with the forward's",
    ),
    MethodSpec(
        name="reversible",
        keep="",
        locked=True,
        plain=_INPUT,
        reversible=_NOTHING,
        needs_reversible=True,
        summary="reversible backprop: locked, exact, keeps nothing of reversible units",
    ),
    MethodSpec(
        name="backprop",
        keep="",
        locked=True,
        plain=_GRAPH,
        reversible=_GRAPH,
        needs_reversible=False,
        summary="backpropagation: locked, exact, keeps the whole graph",
    ),
    MethodSpec(
        name="local",
        keep="",
        locked=False,
        plain=_OWN_GRAPH,
        reversible=_OWN_GRAPH,
        needs_reversible=False,
        summary="local learning (DGL): every block by the loss of its own auxiliary net; nothing comes down",
        blocks=True,
    ),
    MethodSpec(
        name="forward-gradient",
        keep="",
        locked=False,
        plain=_GRAPH,
        reversible=_GRAPH,
        needs_reversible=False,
        summary="forward gradients: every block by a target projected on a guess (see method.target)",
        blocks=True,
    ),
)


def method_spec(name: str, *, keep: str = "") -> MethodSpec:
    """Return the row of a method; `keep` chooses among the rows of `delayed` ("graph" where it is empty).

    Raises:
        ValueError: no such row.
    """
    rows = [spec for spec in METHODS if spec.name == name]
    if not rows:
        raise ValueError(f'unknown method "{name}" (known: {", ".join(method_names())})')
    if len(rows) == 1:
        return rows[0]
    wanted = keep or "graph"
    for spec in rows:
        if spec.keep == wanted:
            return spec
    raise ValueError(f'unknown keep "{keep}" (known: {", ".join(spec.keep for spec in rows)})')


def method_names() -> tuple[str, ...]:
    """Return the names, each once, in the table's order."""
    return tuple(dict.fromkeys(spec.name for spec in METHODS))


def keepings(spec: MethodSpec, reversible: Sequence[bool]) -> tuple[Keeping, ...]:
    """Return what is kept of each unit of a net, given which of its units are reversible.

    The last unit holds the loss: its forward and backward are one operation, so it always keeps its graph.
    """
    body = [spec.reversible if flag else spec.plain for flag in reversible[:-1]]
    return (*body, _OWN_GRAPH)
