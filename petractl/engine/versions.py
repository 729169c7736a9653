"""Versions of a stage's parameters: what microbatches in flight have used, while the stage updates its own.

A version shares the parameters' memory until an update is about to change it: so there are never more copies
than versions in flight.
"""

from collections.abc import Iterable, Sequence

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

    def protect(self, in_use: Iterable[Sequence[Parameters]]) -> None:
        """Prepare for an update: if a version in use is the current one, it keeps the old memory."""
        if any(version is self._now for version in in_use):
            for evaluator, stash in zip(self._evaluators, self._stashes, strict=True):
                if stash:
                    for p in evaluator.parameters:
                        p.data = p.data.clone()
        self._now = None
