"""Forward-gradient estimators: their choices, what makes sense together, what they ask of the engine.

An update is the projection of a *target* gradient t on a *guess* g, <t, g> / ||g||^2 g (Fournier et al., "Can
Forward Gradient Match Backpropagation?", ICML 2023). Target, guess, the space in which the two are compared
and the projection are independent keys; this module says which of them contradict each other. Pure, no torch:
the recipe's checks and the engine ask the same questions here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from petractl.errors import Problem

Target = Literal["global", "local", "above", "sum"]
Guess = Literal["random-gaussian", "random-rademacher", "local", "global", "above", "sum", "ntk", "fixed-ntk"]
Space = Literal["weight", "batch-weight", "activation"]
Projection = Literal["exact", "sign", "random-sign", "span"]
Granularity = Literal["tensor", "block", "net"]
Coefficients = Literal["batch", "sample"]
Statistics = Literal["live", "held"]
Derivative = Literal["forward", "reverse"]
Tangents = Literal["all", "one"]

TARGETS: tuple[Target, ...] = get_args(Target)
GUESSES: tuple[Guess, ...] = get_args(Guess)
SPACES: tuple[Space, ...] = get_args(Space)
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)

RANDOM_GUESSES = ("random-gaussian", "random-rademacher")
Kind = tuple[str, Statistics]
"""A gradient that comes down: of which loss ("global" or "above"), under which treatment of batch norm."""

FROM_ABOVE = ("global", "above", "sum")
"""Losses, for a target or a guess, that need more than the block's own auxiliary net."""


@dataclass(frozen=True, slots=True)
class Estimator:
    """A choice for every key of a forward gradient; the properties resolve "auto"."""

    target: Target = "global"
    guess: Guess = "local"
    space: Space = "activation"
    projection: Projection = "exact"
    directions: int = 1
    normalise_random: bool = False
    granularity: Granularity = "tensor"
    coefficients: Coefficients = "batch"
    statistics: Literal["auto", "live", "held"] = "auto"
    derivative: Literal["auto", "forward", "reverse"] = "auto"
    tangents: Literal["auto", "all", "one"] = "auto"

    def __str__(self) -> str:
        """Say it in words: "global along local in activation space, exact, per batch, by forward mode"."""
        several = f" x {self.directions}" if self.directions > 1 else ""
        words = [f"{self.target} along {self.guess}{several} in {self.space} space", self.projection]
        if self.is_identity:
            return f"{self.target}, which is its own guess, in {self.space} space"
        if self.space == "activation":
            words.append(f"per {self.coefficients}")
        elif self.granularity != "tensor":
            words.append(f"one coefficient per {self.granularity}")
        if self.measures:
            words.append(f"by {self.resolved_derivative} mode")
        if self.probes:
            words.append("one block's tangents at a time")
        return ", ".join(words)

    @property
    def has_random_guess(self) -> bool:
        """The guess is noise."""
        return self.guess in RANDOM_GUESSES

    @property
    def is_identity(self) -> bool:
        """Target and guess are one gradient, which its projection on itself leaves as it is."""
        return self.target == self.guess and self.projection in ("exact", "span")

    @property
    def uses_target(self) -> bool:
        """The estimate depends on the target at all."""
        return self.projection != "random-sign"

    @property
    def measures(self) -> bool:
        """Something has to be projected: a derivative of the target along the guess is needed."""
        return self.uses_target and not self.is_identity

    @property
    def losses(self) -> tuple[str, ...]:
        """The losses whose gradient or derivative is needed: of the target, then of the guess."""
        wanted = [self.target] if self.uses_target else []
        if self.guess in (*FROM_ABOVE, "local"):
            wanted.append(self.guess)  # type: ignore[arg-type]
        return tuple(dict.fromkeys(wanted))

    @property
    def is_local(self) -> bool:
        """A block learns from itself alone: nothing comes down."""
        return not any(loss in FROM_ABOVE for loss in self.losses)

    @property
    def per_sample(self) -> bool:
        """There is a coefficient for every sample."""
        return self.space == "weight" or (self.space == "activation" and self.coefficients == "sample")

    @property
    def resolved_derivative(self) -> Derivative:
        """Forward mode where one pass upwards gives all coefficients at a price that training can pay.

        Not for a guess that comes down from above, which brings the target's gradient with it, nor for a
        span, which needs a derivative for every sample of the batch.
        """
        if self.derivative != "auto":
            return self.derivative
        costly = self.space == "weight" or self.projection == "span"
        return "reverse" if costly or self.guess in FROM_ABOVE else "forward"

    @property
    def resolved_statistics(self) -> Statistics:
        """What the derivative of the target does with batch statistics: goes through them, or holds them."""
        if self.statistics != "auto":
            return self.statistics
        forward = self.resolved_derivative == "forward"
        return "held" if self.per_sample and (self.space == "activation" or forward) else "live"

    @property
    def carries_tangents(self) -> bool:
        """Tangents of the guesses go up to a loss above the block."""
        forward = self.resolved_derivative == "forward"
        return self.measures and forward and self.target in FROM_ABOVE

    @property
    def resolved_tangents(self) -> Tangents:
        """All tangents together, or one block's at a time where the guess takes a way back of its own."""
        if self.tangents != "auto":
            return self.tangents
        return "one" if self.guess in FROM_ABOVE else "all"

    @property
    def probes(self) -> bool:
        """Each block looks through the blocks above on its own, so that all has to be in one process."""
        return self.carries_tangents and self.resolved_tangents == "one"

    @property
    def sends_down(self) -> bool:
        """Coefficients or gradients travel downwards between the blocks."""
        return not self.is_local and not self.probes

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The gradients that come down to every block, in their order in a message."""
        if not self.sends_down or self.carries_tangents:
            return ()
        wanted: list[tuple[str, Statistics]] = []
        if self.measures and self.resolved_derivative == "reverse":
            wanted.append((self.target, self.resolved_statistics))
        wanted.append((self.guess, "live"))
        kinds: list[Kind] = [
            ("global" if loss == "global" else "above", statistics)
            for loss, statistics in wanted
            if loss in FROM_ABOVE
        ]
        return tuple(dict.fromkeys(kinds))

    def tangents_entering(self, tensors: Sequence[int], *, samples: int) -> list[int]:
        """Return how many tangents come up to every block; `tensors` are the parameters of each block."""
        if not self.sends_down or not self.carries_tangents:
            return [0] * len(tensors)
        if self.granularity == "net":
            return [self.directions * (block > 0) for block in range(len(tensors))]
        own = [self._tangents_of(count, samples=samples) for count in tensors]
        first = 0 if self.target == "global" else -1
        return [sum(own[:block][first:]) for block in range(len(tensors))]

    def _tangents_of(self, tensors: int, *, samples: int) -> int:
        coefficients = 1 if self.space == "activation" or self.granularity != "tensor" else tensors
        each = samples if self.projection == "span" and self.per_sample else 1
        return self.directions * coefficients * each

    @property
    def guessing_auxiliary(self) -> bool:
        """The guess has an auxiliary net of its own, frozen or initialised anew at every batch."""
        return self.guess in ("ntk", "fixed-ntk")

    def wants_auxiliary(self, block: int, *, num_blocks: int) -> bool:
        """Tell whether a block's learning auxiliary net is used; the last block has the loss itself."""
        if block == num_blocks - 1:
            return False
        own = any(loss in ("local", "sum") for loss in self.losses)
        below = block > 0 and any(loss in ("above", "sum") for loss in self.losses)
        return own or below


LOCAL = Estimator(target="local", guess="local")
"""Decoupled greedy learning: every block follows the gradient of its own auxiliary loss."""


def contradictions(choice: Estimator) -> Iterator[Problem]:
    """Yield what makes no sense together: key (`method.<field>`), why, and what to do."""
    yield from _guess_contradictions(choice)
    yield from _granularity_contradictions(choice)
    yield from _span_contradictions(choice)
    yield from _derivative_contradictions(choice)


def is_allowed(choice: Estimator) -> bool:
    """Tell whether nothing contradicts."""
    return next(contradictions(choice), None) is None


def _guess_contradictions(choice: Estimator) -> Iterator[Problem]:
    if choice.has_random_guess:
        if not choice.uses_target:
            what = f'"random-sign" of the guess "{choice.guess}" is noise, of which nothing can be learned'
            yield Problem("method.projection", what, 'set it to "exact" or "sign", or choose another guess')
        return
    hint = 'set method.guess = "random-gaussian" or "random-rademacher", or take it out'
    if choice.directions > 1:
        what = f'{choice.directions} draws are averaged, but the guess "{choice.guess}" is not drawn'
        yield Problem("method.directions", what, hint)
    if choice.normalise_random:
        what = f'true is for random guesses; "{choice.guess}" is always divided by its squared norm'
        yield Problem("method.normalise_random", what, hint)


def _granularity_contradictions(choice: Estimator) -> Iterator[Problem]:
    grain = choice.granularity
    if grain == "tensor":
        return
    if choice.space == "activation":
        what = f'"{grain}" says how parameters share a coefficient, but the space is "activation"'
        hint = 'take it out, or set method.space = "batch-weight"'
        yield Problem("method.granularity", what, hint)
        return
    if grain != "net":
        return
    wanted = {
        "space": ("batch-weight",),
        "target": ("global",),
        "guess": RANDOM_GUESSES,
        "projection": ("sign", "exact"),
        "derivative": ("auto", "forward"),
        "tangents": ("auto", "all"),
        "normalise_random": (False,),
    }
    for key, allowed in wanted.items():
        value = getattr(choice, key)
        if value not in allowed:
            what = (
                '"net" is one random direction of all parameters with one coefficient, carried to the loss:'
                f" it does not go with {key} = {_shown(value)}"
            )
            yield Problem("method.granularity", what, f"set method.{key} = {_shown(allowed[-1])}")


def _span_contradictions(choice: Estimator) -> Iterator[Problem]:
    if (
        choice.projection != "span"
        or choice.per_sample
        or choice.directions > 1
        or choice.granularity == "net"
    ):
        return
    what = '"span" projects on several guesses, but here a batch has one'
    if choice.space == "activation":
        yield Problem("method.projection", what, 'set method.coefficients = "sample", or "exact"')
    else:
        yield Problem("method.projection", what, 'set method.space = "weight", method.directions, or "exact"')


def _derivative_contradictions(choice: Estimator) -> Iterator[Problem]:
    forward = choice.derivative == "forward"
    if forward and choice.per_sample and choice.statistics == "live":
        what = (
            '"live" batch statistics couple the samples: a forward derivative then has the right sum over the'
            " batch, but no coefficient per sample"
        )
        yield Problem("method.statistics", what, 'set it to "held", or method.derivative = "reverse"')
    if choice.tangents == "all" and choice.carries_tangents and choice.guess in FROM_ABOVE:
        what = (
            f'"all" carries the guesses along with the forward pass, but the guess "{choice.guess}" is known'
            " only after it"
        )
        yield Problem("method.tangents", what, 'set it to "one", or method.derivative = "reverse"')


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
