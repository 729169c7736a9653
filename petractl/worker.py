"""One process of a run in several: `python -m petractl.worker`, as `petractl run` starts it.

What the launcher knows it hands over as JSON in the environment. Under torchrun there is no launcher of ours:
rank 0 then does its work (recipe, run folder), and hands the same over to the others through their store.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petractl.processes import die_with_parent, end_process, redirect_output, reported
from petractl.run_folder import RESOLVED, RunFolder

if TYPE_CHECKING:
    from petractl.engine.world import Launch

START_VARIABLE = "PETRACTL_START"
LOGS = "logs"


@dataclass(frozen=True, slots=True)
class Start:
    """What every process of a run must know before it reads the recipe in the run folder.

    `info` describes the data, which need not lie on every machine. `checkpoint` is what a resumed run goes on
    from, "" for none; `is_new` says that the folder was made for this start. `resolved` is the file in it
    that holds the recipe: until all have restored what they go on from, a resumed run keeps what it has.
    """

    run_dir: str
    recipe_name: str
    num_places: int
    num_replicas: int
    info: dict[str, Any]
    warnings: list[list[str]]
    checkpoint: str = ""
    is_new: bool = False
    trace: bool = False
    drain: bool = False
    resolved: str = RESOLVED

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Start":
        """Return what `to_json` wrote."""
        return cls(**json.loads(text))

    def title(self, rank: int) -> str:
        """Return what messages for people call a process."""
        replica, place = divmod(rank, self.num_places)
        return f"stage {place}" + (f" of replica {replica}" if self.num_replicas > 1 else "")

    @property
    def titles(self) -> list[str]:
        """The titles of all processes, by rank."""
        return [self.title(rank) for rank in range(self.num_places * self.num_replicas)]


def main() -> None:
    """Run the process that the environment describes."""
    die_with_parent()
    start = Start.from_json(os.environ[START_VARIABLE])
    rank = int(os.environ["RANK"])
    with reported(start.title(rank), rank):
        redirect_output(Path(start.run_dir) / LOGS, rank, start.title(rank))
        from petractl.engine.world import Launch, connect

        launch = Launch.from_environment()
        assert launch is not None, "RANK and WORLD_SIZE are set"
        code = train(start, launch, connect(launch))
        if code:
            sys.exit(code)
    end_process(0)


def train(start: Start, launch: "Launch", store: Any) -> int:
    """Train as one process of a run whose folder is ready; returns the exit code.

    Raises:
        UserError: the recipe, the data or the devices are wrong.
        RunError: the run failed.
    """
    from petractl import build
    from petractl.data import DataInfo
    from petractl.engine.trainer import TrainingState
    from petractl.engine.world import join
    from petractl.errors import Problem
    from petractl.interrupts import Interrupts
    from petractl.recipe.load import load_recipe
    from petractl.saving.restore import load_own
    from petractl.session import Session, prepare_process, state_of

    with Interrupts(announce=launch.rank == 0).handled() as interrupts:
        folder = RunFolder(Path(start.run_dir))
        loaded = load_recipe(folder.path / start.resolved)
        info = DataInfo(**start.info)
        plan = build.check(loaded, starting_weights=not start.checkpoint, launch=launch, info=info)
        prepare_process(plan, processes=launch.local_world_size)
        engine = plan.recipe.engine
        world = join(
            launch,
            plan.layout.seat(launch.rank),
            store=store,
            device=build.process_device(plan, launch),
            backend=engine.backend,
            timeout_s=engine.stall_timeout,
        )
        built = build.build(plan, starting_weights=not start.checkpoint, world=world)
        session = Session(
            folder, plan, built, interrupts=interrupts, recipe_name=start.recipe_name, trace=start.trace
        )
        session.warn([Problem(*texts) for texts in start.warnings])
        state = TrainingState()
        if start.checkpoint:
            saved = load_own(Path(start.checkpoint), built)
            session.restore(saved)
            state = state_of(saved)
        if start.resolved != RESOLVED:
            world.barrier()
            if launch.rank == 0:
                folder.adopt_resolved()
        world.begin()
        if start.drain:
            session.drain(state)
            world.close()
            return 0
        code = session.train(state)
        if code == 0:
            world.close()  # who was interrupted goes: the others may stand anywhere
        return code


if __name__ == "__main__":
    main()
