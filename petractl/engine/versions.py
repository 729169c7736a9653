"""Versions of a stage's parameters: what microbatches in flight have used, while the stage updates its own.

A version shares the parameters' memory until an update is about to change it: so there are never more copies
than versions in flight.
"""

from collections.abc import Iterable, Sequence

from petractl.engine.tensor_tree import Tree
from petractl.methods.evaluation import Evaluator, Parameters


class Versions:
    """The parameters of a row of units as they are now, to be kept by whoever uses them.

    `stashes[n]` is true where unit n's backward uses its forward's parameters; the others' are always the
    current ones (None).
    """

    def __init__(self, evaluators: Sequence[Evaluator], *, stashes: Sequence[bool]) -> None:
        assert len(evaluators) == len(stashes)
        self._evaluators = evaluators
        self._stashes = stashes
        self._now: list[Parameters] | None = None

    def current(self) -> list[Parameters]:
        """Return what each unit's forward uses: None for the current parameters, or tensors that will stay.

        `.data` because a `detach()` would share the counter of in-place changes.
        """
        if self._now is None:
            self._now = [
                [p.data.requires_grad_() for p in evaluator.parameters] if stash else None
                for evaluator, stash in zip(self._evaluators, self._stashes, strict=True)
            ]
        return self._now

    def suspended(self, in_use: Sequence[Sequence[Parameters]]) -> tuple[list[Tree], list[int]]:
        """Return the versions in use that are no longer the current one, and for each use its version.

        -1 stands for the current one.
        """
        old: dict[int, Sequence[Parameters]] = {
            id(version): version for version in in_use if version is not self._now
        }
        places = {key: n for n, key in enumerate(old)}
        return [list(version) for version in old.values()], [places.get(id(used), -1) for used in in_use]

    def resumed(self, versions: Sequence[Tree], numbers: Sequence[int]) -> list[list[Parameters]]:
        """Return the version of each use again, from what `suspended` returned."""
        old: list[list[Parameters]] = [
            [None if unit is None else [p.requires_grad_() for p in unit] for unit in version]
            for version in versions
        ]
        return [self.current() if n < 0 else old[n] for n in numbers]

    def protect(self, in_use: Iterable[Sequence[Parameters]]) -> None:
        """Prepare for an update: if a version in use is the current one, it keeps the old memory."""
        if any(version is self._now for version in in_use):
            for evaluator, stash in zip(self._evaluators, self._stashes, strict=True):
                if stash:
                    for p in evaluator.parameters:
                        p.data = p.data.clone()
        self._now = None
