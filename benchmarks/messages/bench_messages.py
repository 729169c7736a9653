"""What messages cost: bytes, copies and waiting of a step in two processes, itemised.

RevNet-18 is cut into two stages on fake CIFAR-10 images and trained by PETRA, one thread per process, each
process on a core of its own where the machine has two. Every copy into and out of a message and every wait is
timed where it happens, in a real run of the engine:

    copies    packing and unpacking in the training thread
    on the wire   the part of a wait in which the message had been sent already
    neighbour     the rest of a wait: the neighbour was still computing (balance, not messages)
    threads   processor time of link and gloo threads, beside the training thread

The overhead of messages is (copies + on the wire) / step. Run it as `python bench_messages.py --out DIR`; it
starts its two processes itself.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

RECIPE = """
[model]
name = "revnet18"
width = {width}
[data]
name = "fake"
batch_size = {batch}
[method]
name = "petra"
accumulation = 2
[partition]
stages = 2
[engine]
mode = "processes"
schedule = "{schedule}"
precision = "{precision}"
threads = 1
[tracking]
mlflow = false
"""


def main() -> None:
    options = arguments()
    if "RANK" in os.environ:
        work(options)
        return
    from petractl.processes import run_workers

    with tempfile.TemporaryDirectory() as folder:
        text = RECIPE.format(
            width=options.width, batch=options.batch, schedule=options.schedule, precision=options.precision
        )
        Path(folder, "recipe.toml").write_text(text)
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder]
        code = run_workers(command, titles=["stage 0", "stage 1"], log_dir=Path(folder, "logs"))
        if code:
            sys.exit(code)
        ranks = [json.loads(Path(folder, f"rank-{rank}.json").read_text()) for rank in range(2)]
    show(options, ranks)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--schedule", default="tight")
    parser.add_argument("--microbatches", type=int, default=6, help="timed, in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the results as JSON")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


class Watch:
    """Times the engine's messages in this process."""

    def __init__(self) -> None:
        self.copies: dict[str, float] = defaultdict(float)
        self.sent: dict[str, float] = {}
        self.waits: dict[str, tuple[float, float]] = {}

    def install(self) -> None:
        """Wrap the methods that copy and wait."""
        from petractl.engine import links
        from petractl.engine.carriers import HostCarrier
        from petractl.engine.messages import Activation

        watch = self

        def timed_pack(method):
            @functools.wraps(method)
            def pack(carrier, message):
                started = time.perf_counter()
                parcel = method(carrier, message)
                ended = time.perf_counter()
                watch.copies["pack"] += ended - started
                kind = "up" if isinstance(message, Activation) else "down"
                watch.sent[f"{kind} {message.microbatch}"] = ended
                return parcel

            return pack

        def timed_unpack(method):
            @functools.wraps(method)
            def unpack(carrier, parcel):
                started = time.perf_counter()
                message = method(carrier, parcel)
                watch.copies["unpack"] += time.perf_counter() - started
                return message

            return unpack

        def timed_receive(method):
            @functools.wraps(method)
            def receive(inbox, microbatch, **options):
                started = time.perf_counter()
                message = method(inbox, microbatch, **options)
                kind = "up" if isinstance(message, Activation) else "down"
                watch.waits[f"{kind} {microbatch}"] = (started, time.perf_counter())
                return message

            return receive

        HostCarrier.pack = timed_pack(HostCarrier.pack)
        HostCarrier.unpack = timed_unpack(HostCarrier.unpack)
        links.Inbox.receive = timed_receive(links.Inbox.receive)

    def reset(self) -> None:
        """Forget everything."""
        self.copies.clear()
        self.sent.clear()
        self.waits.clear()


def work(options: argparse.Namespace) -> None:
    """Run one stage and write what was measured."""
    import torch

    from petractl import build
    from petractl.engine.world import Launch, connect, join
    from petractl.recipe.load import load_recipe
    from petractl.session import prepare_process

    watch = Watch()
    watch.install()
    launch = Launch.from_environment()
    assert launch is not None
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= 2:
        os.sched_setaffinity(0, {cores[launch.rank]})
    plan = build.check(load_recipe(str(Path(options.folder, "recipe.toml"))), launch=launch)
    prepare_process(plan, processes=2)
    store = connect(launch)
    world = join(launch, plan.layout.seat(launch.rank), store=store, device=torch.device("cpu"))
    built = build.build(plan, world=world)
    batch = None
    if built.training_data is not None:
        first = next(built.training_data.epoch(0))
        batch = (built.placement.images(first), first.labels)
    count = 2 * options.microbatches
    results = []
    for repeat in range(options.repeats + 1):
        world.barrier()
        watch.reset()
        before = (time.perf_counter(), time.process_time(), time.thread_time())
        source = None if batch is None else iter([batch] * count)
        built.pipeline.train(source, num_microbatches=count, offset=repeat * count)
        after = (time.perf_counter(), time.process_time(), time.thread_time())
        wall, cpu, own_cpu = (b - a for a, b in zip(before, after, strict=True))
        measures = built.pipeline.stage_measures()[0]
        if repeat:  # the first one warms up
            results.append(
                {
                    "steps": count,
                    "wall_s": wall,
                    "threads_cpu_s": cpu - own_cpu,
                    "copies_s": dict(watch.copies),
                    "sent": dict(watch.sent),
                    "waits": dict(watch.waits),
                    "bytes_up": measures.bytes_sent_forward,
                    "bytes_down": measures.bytes_sent_backward,
                }
            )
    Path(options.folder, f"rank-{launch.rank}.json").write_text(json.dumps(results))
    world.close()


def itemise(own: dict, other: dict) -> dict[str, float]:
    """Return milliseconds per step of one process; the clock is the machine's, the same for both."""
    steps = own["steps"]
    on_wire = waited = 0.0
    for key, (started, ended) in own["waits"].items():
        waited += ended - started
        on_wire += max(0.0, ended - max(started, other["sent"][key]))
    # The copy out of a message is counted as a copy.
    on_wire = max(0.0, on_wire - own["copies_s"].get("unpack", 0.0))
    waited = max(on_wire, waited - own["copies_s"].get("unpack", 0.0))
    copies = sum(own["copies_s"].values())
    return {
        "step_ms": 1000 * own["wall_s"] / steps,
        "pack_ms": 1000 * own["copies_s"].get("pack", 0.0) / steps,
        "unpack_ms": 1000 * own["copies_s"].get("unpack", 0.0) / steps,
        "on_wire_ms": 1000 * on_wire / steps,
        "neighbour_ms": 1000 * (waited - on_wire) / steps,
        "threads_cpu_ms": 1000 * own["threads_cpu_s"] / steps,
        "sent_mib": (own["bytes_up"] + own["bytes_down"]) / steps / 2**20,
        "overhead_percent": 100 * (copies + on_wire) / own["wall_s"],
    }


def show(options: argparse.Namespace, ranks: list[list[dict]]) -> None:
    """Print the medians over the repeats, and write all of it."""
    rows = []
    for rank, own in enumerate(ranks):
        repeats = [itemise(a, b) for a, b in zip(own, ranks[1 - rank], strict=True)]
        rows.append(repeats)
    print(
        f"RevNet-18, width {options.width}, batch {options.batch}, {options.precision}, {options.schedule}:"
    )
    print("| process | step | pack | unpack | on the wire | neighbour | threads' CPU | sent | overhead |")
    print("|---|---|---|---|---|---|---|---|---|")
    for rank, repeats in enumerate(rows):
        median = {key: statistics.median(r[key] for r in repeats) for key in repeats[0]}
        low, high = (f(r["overhead_percent"] for r in repeats) for f in (min, max))
        print(
            f"| stage {rank} | {median['step_ms']:,.0f} ms | {median['pack_ms']:.2f} ms | "
            f"{median['unpack_ms']:.2f} ms | {median['on_wire_ms']:.2f} ms | "
            f"{median['neighbour_ms']:,.0f} ms | "
            f"{median['threads_cpu_ms']:.1f} ms | {median['sent_mib']:.1f} MiB | "
            f"{median['overhead_percent']:.2f} % ({low:.2f} to {high:.2f}) |"
        )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"width-{options.width}-{options.precision}-{options.schedule}.json"
        (options.out / name).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
