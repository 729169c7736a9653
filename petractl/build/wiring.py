"""How the processes of a run are wired: links between neighbours, and what both ends must agree on."""

import torch

import petractl
from petractl.build.parts import eval_batch_size, wire_formats
from petractl.build.plan import CheckedPlan
from petractl.engine import wire
from petractl.engine.assembly import stage_bounds
from petractl.engine.carriers import Carrier, HostCarrier, MessageSize, NcclCarrier, Route, StagedCarrier
from petractl.engine.evaluation import Neighbours
from petractl.engine.links import Inbox, Outbox
from petractl.engine.messages import Activation, Gradient
from petractl.engine.process_pipeline import Links
from petractl.engine.world import World, agree
from petractl.methods.family import Keep

Described = tuple[tuple[int, ...], torch.dtype]
"""A tensor's shape and dtype."""

_AHEAD = 4  # batches on their way to a slower stage


class Wiring:
    """The links of a process with its neighbours, for training and for evaluation."""

    def __init__(self, plan: CheckedPlan, world: World, *, tag: int = 0) -> None:
        self._plan = plan
        self._world = world
        self._tag = tag
        self._formats = wire_formats(plan.recipe)

    def agree(self) -> None:
        """Check that all processes have the same versions and expect messages of the same sizes."""
        facts = {"torch": torch.__version__, "petractl": petractl.__version__}
        comes_down = self._plan.choice is None or self._plan.choice.sends_down
        for place in range(1, self._world.seat.num_places):
            for upwards in (True, False) if comes_down else (True,):
                way = f"{place - 1} to {place}" if upwards else f"{place} to {place - 1}"
                facts[f"the size of a message from stage {way}"] = str(self._size(place, upwards=upwards))
        agree(self._world, facts)

    def training_links(self) -> Links:
        """Return the links of training."""
        place, last = self._world.seat.place, self._world.seat.num_places - 1
        me, tag = self._world.me, self._tag
        below, above = place - 1, place + 1
        comes_down = self._plan.choice is None or self._plan.choice.sends_down
        from_below: Inbox[Activation] | None = None
        to_below: Outbox[Gradient] | None = None
        to_above: Outbox[Activation] | None = None
        from_above: Inbox[Gradient] | None = None
        if place > 0:
            peer = self._world.neighbour(below)
            from_below = Inbox(self._carrier(below, upwards=True, tag=tag), owner=me, peer=peer)
            if comes_down:
                to_below = Outbox(self._carrier(below, upwards=False, tag=tag), owner=me, peer=peer)
        if place < last:
            peer = self._world.neighbour(above)
            # Where nothing comes back, nothing else would hold a fast stage.
            limit = 0 if comes_down else _AHEAD
            carrier = self._carrier(above, upwards=True, tag=tag)
            to_above = Outbox(carrier, owner=me, peer=peer, limit=limit)
            if comes_down:
                from_above = Inbox(self._carrier(above, upwards=False, tag=tag), owner=me, peer=peer)
        return Links(from_below, to_below, to_above, from_above)

    def evaluation_links(self, stage: int, number: int) -> Neighbours:
        """Return the links of a stage in evaluation, the `number`-th of this process."""
        places, me = self._world.seat.num_places, self._world.me
        tag = self._tag + 1 + number
        inbox: Inbox[Activation] | None = None
        outbox: Outbox[Activation] | None = None
        if stage > 0:
            below = (stage - 1) % places
            wrapped = tag - 1 if below > self._world.seat.place else tag
            inbox = Inbox(
                self._evaluation_carrier(below, stage, tag=wrapped),
                owner=me,
                peer=self._world.neighbour(below),
            )
        if stage < self._plan.num_stages - 1:
            above = (stage + 1) % places
            outbox = Outbox(
                self._evaluation_carrier(above, stage + 1, tag=tag),
                owner=me,
                peer=self._world.neighbour(above),
                limit=_AHEAD,
            )
        return inbox, outbox

    def _evaluation_carrier(self, place: int, stage: int, *, tag: int) -> Carrier:
        # Exact, whatever the recipe's format: an accuracy is that of the net, not of the network.
        size = self._size(
            stage, upwards=True, samples=eval_batch_size(self._plan.recipe), number_format="float32"
        )
        if self._world.backend == "nccl" and self._plan.layout.stages_per_process > 1:
            # Two links of one direction between the same processes: NCCL knows no tags to tell them apart.
            route = Route(self._world.rank_of(place), self._world.control, tag)
            return StagedCarrier(route, size, upwards=True, device=self._world.device)
        return self._make(place, size, upwards=True, tag=tag)

    def _carrier(self, place: int, *, upwards: bool, tag: int) -> Carrier:
        stage = max(place, self._world.seat.place)
        return self._make(place, self._size(stage, upwards=upwards), upwards=upwards, tag=tag)

    def _make(self, place: int, size: MessageSize, *, upwards: bool, tag: int) -> Carrier:
        world = self._world
        group = world.forward if upwards else world.backward
        device = world.device
        if world.backend == "nccl":
            headers = world.forward_headers if upwards else world.backward_headers
            route = Route(world.rank_of(place), group, tag, headers)
            return NcclCarrier(route, size, upwards=upwards, device=device)
        route = Route(world.rank_of(place), group, tag)
        if device.type == "cuda":
            return StagedCarrier(route, size, upwards=upwards, device=device)
        return HostCarrier(route, size, upwards=upwards)

    def _size(self, stage: int, *, upwards: bool, samples: int = 0, number_format: str = "") -> MessageSize:
        """Return the size of a message over the cut below `stage`."""
        plan = self._plan
        samples = samples or plan.recipe.data.batch_size
        unit = plan.cuts[stage - 1] - 1
        cost = plan.costs[unit]
        streams = [
            ((samples, *shape), dtype)
            for shape, dtype in zip(cost.output_shapes, cost.output_dtypes, strict=True)
        ]
        tensors = self._upwards(stage, streams) if upwards else self._downwards(stage, streams)
        if number_format:  # evaluation, in which nothing but activations travels
            tensors = streams
        if upwards:
            tensors = [*tensors, ((samples,), torch.int64)]
        number_format = number_format or self._formats[0 if upwards else 1]
        payload = wire.payload_bytes(tensors, number_format=number_format)
        return MessageSize(8 * wire.header_words(len(tensors)), payload, number_format)

    def _upwards(self, stage: int, streams: list[Described]) -> list[Described]:
        return streams * (1 + self._tangents(stage))

    def _downwards(self, stage: int, streams: list[Described]) -> list[Described]:
        """Return what comes down to the stage below: gradients, rebuilt streams, or derivatives."""
        plan = self._plan
        if plan.choice is None:
            rebuilt = plan.keepings[plan.cuts[stage - 1] - 1].keep is Keep.NOTHING
            return [*streams, *streams] if rebuilt else streams
        if plan.choice.carries_tangents:
            rows = plan.recipe.data.batch_size if plan.choice.per_sample else 1
            return [((self._tangents(stage), rows), torch.float32)]
        return streams * len(plan.choice.kinds)

    def _tangents(self, stage: int) -> int:
        """Return how many tangents come up to a stage."""
        plan = self._plan
        if plan.choice is None:
            return 0
        bounds = stage_bounds(plan.cuts, num_units=len(plan.costs))
        tensors = [sum(cost.trained_tensors for cost in plan.costs[first:end]) for first, end in bounds]
        return plan.choice.tangents_entering(tensors, samples=plan.recipe.data.batch_size)[stage]
