"""The world of a run in several processes: who this process is, and how it reaches the others.

    rank = replica * P + place        P processes hold one pipeline, R replicas of it the world

Three process groups over all ranks: messages upwards, messages downwards (on one communicator the two
directions can wait for each other for ever), and gloo for control: the small things at the end of an epoch.
Replicas of one place have a group of their own. Rank 0 owns the run folder.
"""

import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous as find_each_other

from petractl.engine.links import Place, reason_of
from petractl.errors import PeerLost, RunError, Stalled, UserError

T = TypeVar("T")

_FOREVER_S = 10 * 365 * 86400.0
_JOIN_TIMEOUT_S = 600.0
_CLOCK_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a process sits: its place in a pipeline of `num_places`, in one of `num_replicas`."""

    place: int = 0
    num_places: int = 1
    replica: int = 0
    num_replicas: int = 1

    @property
    def rank(self) -> int:
        """The global rank."""
        return self.replica * self.num_places + self.place

    @property
    def is_first(self) -> bool:
        """Tell whether images enter here."""
        return self.place == 0

    @property
    def is_last(self) -> bool:
        """Tell whether the loss is here."""
        return self.place == self.num_places - 1

    @property
    def title(self) -> str:
        """Its name in messages for people."""
        return place_title(self.place, replica=self.replica, num_replicas=self.num_replicas)

    @classmethod
    def of_rank(cls, rank: int, *, num_places: int, num_replicas: int) -> "Seat":
        """Return the seat of a global rank."""
        replica, place = divmod(rank, num_places)
        return cls(place, num_places, replica, num_replicas)


def place_title(place: int, *, replica: int, num_replicas: int) -> str:
    """Return what messages for people call a process."""
    return f"stage {place}" + (f" of replica {replica}" if num_replicas > 1 else "")


@dataclass(frozen=True, slots=True)
class Launch:
    """What torchrun, or our own launcher, told this process by the environment."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> "Launch | None":
        """Return None where this process was started alone."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return None
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", rank))
        return cls(rank, size, local, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


class Alone:
    """The world of one process: nobody to talk to."""

    seat = Seat()

    def gather(self, value: T) -> list[T]:
        """Return the value in a list."""
        return [value]

    def gather_all(self, value: T) -> list[T]:
        """Return the value in a list."""
        return [value]

    def share(self, value: T) -> T:
        """Return the value."""
        return value

    def barrier(self) -> None:
        """Do nothing."""

    def clock_offset(self) -> float:
        """Return 0."""
        return 0.0

    def agree(self, number: int) -> Callable[[], int]:
        """Return the number."""
        return lambda: number

    def tell(self, key: str, value: str) -> None:
        """Do nothing: there is nobody to ask for it."""

    def tell_later_starts(self, key: str, value: str) -> None:
        """Do nothing: nobody is started in its place."""

    def ask(self, key: str) -> str | None:
        """Return None."""
        return None


class World:
    """The processes of a run, seen from one of them; see the module's docstring."""

    def __init__(
        self,
        seat: Seat,
        *,
        store: Any,
        device: torch.device,
        control: dist.ProcessGroup,
        forward: dist.ProcessGroup,
        backward: dist.ProcessGroup,
        pipeline: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        backend: str,
        firsts: dist.ProcessGroup | None = None,
        forward_headers: dist.ProcessGroup | None = None,
        backward_headers: dist.ProcessGroup | None = None,
    ) -> None:
        self.seat = seat
        self.device = device
        self.control = control
        self._starting = True
        self.forward = forward
        self.backward = backward
        self.pipeline = pipeline
        """The ranks of this replica, in the order of their places; for exact pipelines."""
        self.replicas = replicas
        self.firsts = firsts
        """The ranks where images enter, one for each replica, by gloo; None for one replica."""
        self.forward_headers = forward_headers
        self.backward_headers = backward_headers
        self.backend = backend
        self._store = store

    def neighbour(self, place: int) -> Place:
        """Return a process of this replica's pipeline by its place."""
        seat = Seat(place, self.seat.num_places, self.seat.replica, self.seat.num_replicas)
        return Place(seat.title, seat.rank)

    def rank_of(self, place: int) -> int:
        """Return the global rank of a place in this replica's pipeline."""
        return self.seat.replica * self.seat.num_places + place

    @property
    def me(self) -> Place:
        """The process itself, as messages for people name it."""
        return self.neighbour(self.seat.place)

    def begin(self) -> None:
        """End the start: until now, others were waited for as long as opening data may take."""
        self._starting = False

    @property
    def _meeting(self) -> dist.ProcessGroup:
        """The group in which all meet."""
        world = dist.group.WORLD
        return world if self._starting and world is not None else self.control

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order, on rank 0; an empty list elsewhere."""
        found: list[Any] | None = [None] * dist.get_world_size() if self.seat.rank == 0 else None
        with _named_errors(self.me, self._starting):
            dist.gather_object(value, found, dst=0, group=self._meeting)
        return found or []

    def gather_all(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order, everywhere."""
        found: list[Any] = [None] * dist.get_world_size()
        with _named_errors(self.me, self._starting):
            dist.all_gather_object(found, value, group=self._meeting)
        return found

    def share(self, value: T) -> T:
        """Return rank 0's value, everywhere."""
        box: list[Any] = [value]
        with _named_errors(self.me, self._starting):
            dist.broadcast_object_list(box, src=0, group=self._meeting)
        return box[0]  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather_all(None)

    def clock_offset(self) -> float:
        """Return the seconds to add to this process's `perf_counter` to have rank 0's; all must call this.

        Each process asks rank 0 for its time a few times; the quickest answer is off by no more than half of
        what it took.
        """
        size, rank, offset = dist.get_world_size(self.control), self.seat.rank, 0.0
        now, answer = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        with _named_errors(self.me):
            for peer in range(1, size):
                best = math.inf
                for _ in range(_CLOCK_ROUNDS):
                    if rank == 0:
                        dist.recv(now, peer, group=self.control)
                        answer.fill_(time.perf_counter())
                        dist.send(answer, peer, group=self.control)
                    elif rank == peer:
                        asked = time.perf_counter()
                        dist.send(now, 0, group=self.control)
                        dist.recv(answer, 0, group=self.control)
                        took = time.perf_counter() - asked
                        if took < best:
                            best, offset = took, float(answer) - asked - took / 2
        return offset

    def agree(self, number: int) -> Callable[[], int]:
        """Begin to find the greatest number of the replicas' first places; what is returned waits for it.

        Processes meet in it, whatever their devices are at.
        """
        box = torch.tensor([number])
        work = dist.all_reduce(box, dist.ReduceOp.MAX, group=self.firsts, async_op=True)
        assert work is not None, "called at a first place"

        def agreed() -> int:
            with _named_errors(self.me, when="in an update"):
                work.wait()
            return int(box)

        return agreed

    def close(self) -> None:
        """Part from the others, when all are done."""
        self.barrier()
        dist.destroy_process_group()

    def tell(self, key: str, value: str) -> None:
        """Leave a short text: whoever asks for it from now on finds it; nobody waits."""
        self._store.set(key, value)
        # A set is sent and not answered; a question on the same connection is answered after it is done.
        self._store.check([key])

    def tell_later_starts(self, key: str, value: str) -> None:
        """Leave a text for the processes that torchrun may start in place of these."""
        if is_kept_by_torchrun():
            tell_later_starts(self._store.underlying_store, key, value)

    def ask(self, key: str) -> str | None:
        """Return what was told last under `key`, None if nothing was; does not wait."""
        if not self._store.check([key]):
            return None
        text: bytes = self._store.get(key)
        return text.decode()


class _named_errors:  # noqa: N801 (a context manager)
    """Turn a broken connection, or a silent one, into the error that says so."""

    def __init__(self, me: Place, starting: bool = False, when: str = "between two epochs") -> None:
        self._me = me
        self._starting = starting
        self._when = when
        self._started = time.monotonic()

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, RuntimeError):
            return
        if "timed out" in str(error).lower():
            waited = time.monotonic() - self._started
            when = "to start" if self._starting else self._when
            limit = "" if self._starting else "engine.stall_timeout is the limit; "
            raise Stalled(
                f"{self._me} has waited {waited:.0f} s for the other processes {when}",
                hint=f"{limit}the logs of the stages tell more",
            ) from error
        raise PeerLost(f"{self._me} lost the other processes ({reason_of(error)})") from error


def connect(launch: Launch, *, timeout_s: float = _JOIN_TIMEOUT_S) -> Any:
    """Return the store in which the processes of a launch find each other.

    Raises:
        RunError: the first process cannot be reached.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    try:
        rendezvous = find_each_other(
            "env://", rank=launch.rank, world_size=launch.world_size, timeout=timedelta(seconds=timeout_s)
        )
        store, _, _ = next(rendezvous)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '?')}"
        raise RunError(
            f"rank {launch.rank} cannot reach the first process at {address}: {str(error).splitlines()[0]}",
            hint="check MASTER_ADDR and MASTER_PORT, and that all nodes were started",
        ) from error
    store.set_timeout(timedelta(seconds=timeout_s))
    # torchrun keeps its store when it starts all processes again, and what they have left in it.
    return PrefixStore(f"petractl/start-{restarts_of_torchrun()[0]}", store)


def restarts_of_torchrun() -> tuple[int, int]:
    """Return how often torchrun has started these processes again, and how often it may; 0 without it."""
    names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
    done, most = (int(os.environ.get(name, "0") or "0") for name in names)
    return done, most


def is_kept_by_torchrun() -> bool:
    """Tell whether the store is torchrun's, and so outlives the processes of a start."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def tell_later_starts(store: Any, key: str, value: str) -> None:
    """Leave a text for the processes that torchrun may start in place of these; `store` is `connect`'s."""
    store.underlying_store.set(f"petractl/{key}", value)


def told_by_earlier_start(store: Any, key: str) -> str:
    """Return what the processes before these have left under `key`, "" if nothing."""
    kept = store.underlying_store
    if not is_kept_by_torchrun() or not kept.check([f"petractl/{key}"]):
        return ""
    text: bytes = kept.get(f"petractl/{key}")
    return text.decode()


def check_world_size(world_size: int, *, num_places: int, num_replicas: int) -> None:
    """Raise where a world of another size was started than the recipe needs, with the product spelled out.

    Raises:
        UserError: it does not fit.
    """
    needed = num_places * num_replicas
    if needed == world_size:
        return
    product = f"stages({num_places}) x replicas({num_replicas}) = {needed}"
    fits = f"partition.stages = {world_size // num_replicas}" if world_size % num_replicas == 0 else ""
    raise UserError(
        f"{product}, but {world_size} process{'es' if world_size > 1 else ''} were started",
        where="engine.replicas" if num_replicas > 1 else "partition.stages",
        hint=f"start {needed} processes" + (f", or set {fits}" if fits else ""),
    )


def join(
    launch: Launch,
    seat: Seat,
    *,
    store: Any,
    device: torch.device,
    backend: str = "auto",
    timeout_s: float = 0.0,
) -> World:
    """Connect this process with the others, and agree on how messages travel.

    `backend`: "gloo", "nccl", or "auto" (NCCL where every process has a GPU of its own). `timeout_s` bounds
    collective operations; 0 is no limit.

    Raises:
        RunError: a process is missing, or NCCL is asked for where it cannot be.
    """
    # Waits for messages are timed by their inboxes; the time between two of them is nobody's fault.
    forever, bounded = timedelta(seconds=_FOREVER_S), timedelta(seconds=timeout_s or _FOREVER_S)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo",
        store=PrefixStore("petractl/world", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=_JOIN_TIMEOUT_S),
    )
    places: list[Any] = [None] * launch.world_size
    dist.all_gather_object(places, _identity(device))
    kind = _choose_backend(backend, places)
    everyone = list(range(launch.world_size))
    control = _group(everyone, "gloo", bounded)
    forward, backward = (_group(everyone, kind, forever) for _ in range(2))
    headers: list[dist.ProcessGroup | None] = [None, None]
    if kind == "nccl":
        headers = [_group(everyone, "gloo", forever) for _ in range(2)]
    by_replica = [
        [replica * seat.num_places + place for place in range(seat.num_places)]
        for replica in range(seat.num_replicas)
    ]
    pipelines = [_group(ranks, kind, bounded) for ranks in by_replica]
    replicas: dist.ProcessGroup | None = None
    firsts: dist.ProcessGroup | None = None
    if seat.num_replicas > 1:
        firsts = _group([ranks[0] for ranks in by_replica], "gloo", bounded)
        copies = [_group(ranks, kind, bounded) for ranks in zip(*by_replica, strict=True)]
        replicas = copies[seat.place]
    world = World(
        seat,
        store=PrefixStore("petractl/told", store),
        device=device,
        control=control,
        forward=forward,
        backward=backward,
        pipeline=pipelines[seat.replica],
        replicas=replicas,
        backend=kind,
        firsts=firsts,
        forward_headers=headers[0],
        backward_headers=headers[1],
    )
    if kind == "nccl":
        _open_connections(world)
    return world


def _open_connections(world: World) -> None:
    """Send one number over every link, from the lowest place up: NCCL connects two processes at first use.

    So it happens here, in one thread, and what is wrong with it shows before the first step.
    """
    token = torch.zeros(1, device=world.device)
    for group, step in ((world.forward, 1), (world.backward, -1)):
        for low in range(world.seat.num_places - 1):
            sender, receiver = (low, low + 1) if step > 0 else (low + 1, low)
            if world.seat.place == sender:
                dist.send(token, world.rank_of(receiver), group=group)
            elif world.seat.place == receiver:
                dist.recv(token, world.rank_of(sender), group=group)
    torch.cuda.synchronize(world.device)


def _identity(device: torch.device) -> tuple[str, str]:
    """Return what tells a device from all others: a GPU's own number, since every container counts from 0."""
    if device.type != "cuda":
        return socket.gethostname(), str(device)
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", socket.gethostname())), str(device)


def _group(ranks: Sequence[int], backend: str, timeout: timedelta) -> dist.ProcessGroup:
    """Make a group; every rank of the world must call this, in the same order."""
    return cast(dist.ProcessGroup, dist.new_group(list(ranks), backend=backend, timeout=timeout))


def _choose_backend(backend: str, places: Sequence[tuple[str, str]]) -> str:
    on_gpus = all(device.startswith("cuda") for _, device in places)
    own_gpus = on_gpus and len(set(places)) == len(places)
    usable = own_gpus and dist.is_nccl_available()
    if backend == "nccl" and not usable:
        why = "stages share a GPU" if on_gpus and not own_gpus else "a stage is on a CPU"
        if not dist.is_nccl_available():
            why = "this build of torch has no NCCL"
        raise UserError(
            f'"nccl" needs a GPU for every process, but {why}',
            where="engine.backend",
            hint='set engine.backend = "auto"',
        )
    return "nccl" if usable and backend != "gloo" else "gloo"


def agree(world: World, facts: dict[str, str]) -> None:
    """Check that every process sees the same facts: versions, sizes of messages.

    Raises:
        RunError: two processes differ; says in what.
    """
    seen = world.gather_all(facts)
    for rank, other in enumerate(seen):
        for key, value in seen[0].items():
            if other.get(key) != value:
                raise RunError(
                    f"{key} is {other.get(key)} on rank {rank}, but {value} on rank 0",
                    hint="install the same versions on every machine",
                )


def wait_for_told(store: Any, key: str, *, timeout_s: float = _JOIN_TIMEOUT_S) -> str:
    """Return what rank 0 leaves in the store under `key`, as soon as it is there; answers signals.

    Raises:
        PeerLost: it did not come.
    """
    deadline = time.monotonic() + timeout_s
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise PeerLost(f"rank 0 has not started the run within {timeout_s:g} s")
        time.sleep(0.05)
    text: bytes = store.get(key)
    return text.decode()
