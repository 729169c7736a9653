"""Which pipeline a checkpoint belongs to: what is in flight is its stages' alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from petractl.build import CheckedPlan
from petractl.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class PipelineIdentity:
    """The cuts (first units of stages 1, 2, ...), each stage's lookahead, the method, and the replicas."""

    cuts: tuple[int, ...]
    lookahead: tuple[int, ...]
    method: str
    replicas: int

    @classmethod
    def of(cls, plan: CheckedPlan) -> "PipelineIdentity":
        """Return that of a plan."""
        method = f"{plan.method.name} {plan.method.keep}".strip()
        return cls(tuple(plan.cuts), tuple(plan.lookahead), method, plan.layout.num_replicas)

    @classmethod
    def of_saved(cls, state: Mapping[str, Any]) -> "PipelineIdentity":
        """Return that of a checkpoint's state.

        Raises:
            KeyError, TypeError: it has none.
        """
        told = state["pipeline"]
        return cls(tuple(told["cuts"]), tuple(told["lookahead"]), told["method"], told["replicas"])


def why_drained_first(saved: Checkpoint | None, plan: CheckedPlan) -> str:
    """Return in words why a checkpoint must be drained before this plan can go on from it, "" if it need not.

    Raises:
        KeyError, TypeError: the checkpoint does not say whose it is.
    """
    if saved is None or not saved.microbatches or saved.state["training"]["is_drained"]:
        return ""
    old, new = PipelineIdentity.of_saved(saved.state), PipelineIdentity.of(plan)
    if old == new:
        return ""
    if old.cuts != new.cuts:
        return f"{_stages(old)} before, {_stages(new)} now"
    return f"lookaheads {list(old.lookahead)} before, {list(new.lookahead)} now"


def _stages(identity: PipelineIdentity) -> str:
    count = len(identity.cuts) + 1
    return f"{count} stage{'s' if count > 1 else ''} (cuts {list(identity.cuts)})"
