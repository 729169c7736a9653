"""Which methods can be planned and simulated: those that run a backward pass through the stages.

A method that trains block by block has auxiliary nets, tangents and guesses in its stages, whose times and
memory the planner does not know. It says so and gives no numbers. No torch.
"""

from petractl.errors import UserError
from petractl.methods.family import METHODS

_BLOCK_METHODS = frozenset(spec.name for spec in METHODS if spec.blocks)


def why_unplanned(method: str) -> str:
    """Return why a method cannot be planned, "" where it can."""
    if method not in _BLOCK_METHODS:
        return ""
    return f"{method} trains block by block: what auxiliary nets and tangents cost is not planned for"


def refuse_unplanned(method: str, *, where: str, hint: str) -> None:
    """Refuse a method that cannot be planned.

    Raises:
        UserError: with the reason.
    """
    reason = why_unplanned(method)
    if reason:
        raise UserError(reason, where=where, hint=hint)
