"""Building shards: every shard is a job of its own, done by threads, finished once and for all.

What goes where is planned first (`plan`); a job reads its samples, writes its shard whole or not at all, and
says so in the journal. A build that is interrupted, killed or stopped by a damaged image keeps its finished
shards; the same command verifies them by their checksums and goes on. Same source, same settings and same
libraries give the same bytes. `index.json` comes last: shards with an index are complete.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event

from petractl.data.encoded import BadSample, OnError
from petractl.data.places import Split
from petractl.data.shard_index import ShardIndex
from petractl.data.writing.destination import (
    CACHE_NAME,
    Destination,
    check_apart,
    make_folder,
    open_destination,
    shard_prefix,
)
from petractl.data.writing.journal import SOURCE_FACTS, Journal, open_journal
from petractl.data.writing.plan import (
    ShardPlan,
    default_samples_per_shard,
    plan_shards,
    samples_within,
)
from petractl.data.writing.recoding import DEFAULT_QUALITY, Recoding
from petractl.data.writing.shard_file import Skipped, StoredSample, WrittenShard, sha256_of, write_shard
from petractl.data.writing.source_files import source_facts
from petractl.data.writing.sources import Kind, SourceSplit, Wanted, hints_of_build, kind_of, open_sources
from petractl.data.writing.watching import Unwatched, Watch
from petractl.errors import DataError, RunError, UserError

MOST_WORKERS = 32

_UNFIT = re.compile(r"[^A-Za-z0-9_-]+")
_NUMBERED = re.compile(r"^\d{8}_")
_KEY_LENGTH = 60


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How shards are made; 0 and None stand for what is usual, see `petractl shards build --help`.

    `seed` None keeps the source's order.
    """

    split: Split | None = None
    kind: Kind | None = None
    samples_per_shard: int = 0
    max_mb: float = 0
    resize: int = 0
    quality: int = DEFAULT_QUALITY
    name: str = ""
    seed: int | None = 0
    classes: int = 0
    on_error: OnError = "stop"


@dataclass(frozen=True, slots=True)
class PlannedBuild:
    """What will be built, and where to."""

    kind: Kind
    sources: tuple[SourceSplit, ...]
    shards: tuple[ShardPlan, ...]
    samples_per_shard: int
    destination: Destination

    @property
    def splits(self) -> tuple[Split | None, ...]:
        """The splits, None for a source that names none."""
        return tuple(source.split for source in self.sources)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, if known."""
        return self.sources[0].class_names

    @property
    def classes(self) -> int:
        """The number of classes, in which all splits agree."""
        return self.sources[0].samples.classes


@dataclass(frozen=True, slots=True)
class Built:
    """What was built: the index, the shards of this build, and how many had been finished before."""

    index: ShardIndex
    shards: tuple[WrittenShard, ...]
    kept: int

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The samples that were left out."""
        return tuple(skipped for shard in self.shards for skipped in shard.skipped)


def plan_build(source: str, folder: Path, options: BuildOptions) -> PlannedBuild:
    """Look at the source and decide what goes where; writes nothing but copies of compressed sources.

    Raises `UserError` for what is wrong with either, or with the options.
    """
    shard_prefix(options.name, options.split)
    check_apart(source, folder)
    destination = open_destination(folder)
    kind = options.kind or kind_of(source)
    index = destination.index
    wanted = Wanted(
        split=options.split,
        classes=options.classes,
        class_names=index.class_names if index else (),
        on_error=options.on_error,
        cache=str(folder / CACHE_NAME),
    )
    sources = open_sources(source, kind, wanted)
    _check_classes(sources, source)
    destination.check_classes(sources[0].samples.classes, sources[0].class_names)
    if folder.is_dir():
        destination.check_room([split.split for split in sources])
    recoding = Recoding(options.resize, options.quality)
    per_shard = options.samples_per_shard or (
        samples_within(int(options.max_mb * 1e6), sources, recoding, seed=options.seed)
        if options.max_mb
        else default_samples_per_shard(sources, recoding)
    )
    shards = plan_shards(sources, name=options.name, samples_per_shard=per_shard, seed=options.seed)
    return PlannedBuild(kind, tuple(sources), tuple(shards), per_shard, destination)


def preview_build(source: str, folder: Path, options: BuildOptions) -> PlannedBuild:
    """Return what `build_shards` would do, and leave no trace."""
    was_there, cached = folder.exists(), (folder / CACHE_NAME).exists()
    try:
        return plan_build(source, folder, options)
    finally:
        if not cached:
            shutil.rmtree(folder / CACHE_NAME, ignore_errors=True)
        if not was_there:
            with suppress(OSError):
                folder.rmdir()


def build_shards(
    source: str,
    folder: Path,
    options: BuildOptions | None = None,
    *,
    workers: int = 0,
    watch: Watch | None = None,
) -> Built:
    """Make shards of `source` in `folder`, or go on where a build was interrupted.

    Raises `UserError` for what is wrong with the source, the folder or the options, `RunError` where the
    shards cannot be written; finished shards stay.
    """
    options = options or BuildOptions()
    try:
        planned = plan_build(source, folder, options)
        make_folder(folder)
        with open_journal(folder, _description(source, planned, options)) as journal:
            planned.destination.remove_partial()
            work = _Work(planned, options, journal, watch or Unwatched())
            shards = work.run(workers or _usual_workers())
            index = planned.destination.write_index(
                shards,
                splits=planned.splits,
                classes=planned.classes,
                class_names=planned.class_names,
            )
            journal.remove()
        shutil.rmtree(folder / CACHE_NAME, ignore_errors=True)
    except OSError as error:
        raise RunError(
            f"the shards cannot be written: {error.strerror or error}",
            where=str(error.filename or folder),
            hint="finished shards are kept; the same command goes on with the others",
        ) from error
    return Built(index, tuple(shards), kept=work.kept)


class _StoppedError(Exception):
    """The build ends early: another job failed, or the user wants it."""


class _Work:
    """The jobs of one build."""

    def __init__(self, planned: PlannedBuild, options: BuildOptions, journal: Journal, watch: Watch) -> None:
        self._planned = planned
        self._folder = planned.destination.folder
        self._recoding = Recoding(options.resize, options.quality)
        self._on_error = options.on_error
        self._journal = journal
        self._watch = watch
        self._stop = Event()
        self._kept: list[str] = []

    @property
    def kept(self) -> int:
        """Shards that had been finished before."""
        return len(self._kept)

    def run(self, workers: int) -> list[WrittenShard]:
        """Write all shards that are not finished; return all of them, in order."""
        plans = self._planned.shards
        pool = ThreadPoolExecutor(workers, thread_name_prefix="shard")
        try:
            self._watch.begin("building", sum(len(plan.rows) for plan in plans))
            jobs = [pool.submit(self._shard, plan) for plan in plans]
            _first_failure(jobs)
            return [job.result() for job in jobs]
        finally:
            # After an error, or Ctrl-C: jobs end at their next sample, and take their file away.
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _shard(self, plan: ShardPlan) -> WrittenShard:
        finished = self._finished(plan)
        if finished is not None:
            self._kept.append(plan.name)
            self._watch.advance(len(plan.rows))
            return finished
        skipped: list[Skipped] = []
        shard = write_shard(self._folder / plan.name, self._samples(plan, skipped), skipped=skipped)
        self._journal.add(shard)
        return shard

    def _finished(self, plan: ShardPlan) -> WrittenShard | None:
        """Return a shard that the journal says is finished, if its file is still the one it was."""
        shard = self._journal.finished.get(plan.name)
        path = self._folder / plan.name
        if shard is None or not path.is_file() or path.stat().st_size != shard.bytes:
            return None
        if shard.skipped and self._on_error == "stop":
            return None
        return shard if sha256_of(path, stopped=self._check) == shard.sha256 else None

    def _samples(self, plan: ShardPlan, skipped: list[Skipped]) -> Iterator[StoredSample]:
        for row in plan.rows:
            self._check()
            try:
                yield self._sample(plan.source, int(row))
            except BadSample as bad:
                if self._on_error == "stop":
                    raise _bad_sample(bad) from bad
                skipped.append(Skipped(bad.place, bad.key, bad.reason))
            self._watch.advance(1)
        if len(skipped) == len(plan.rows):
            raise DataError(
                f"not one of its {len(skipped)} samples can be read; the first: {skipped[0].reason}",
                where=f"{skipped[0].place}: {skipped[0].key}",
                hint="see whether the source is what it should be",
            )

    @hints_of_build()
    def _sample(self, source: SourceSplit, row: int) -> StoredSample:
        encoded = source.samples.read(row)
        try:
            image = self._recoding(encoded.image)
        except ValueError as error:
            raise BadSample(encoded.place, encoded.key, str(error)) from error
        return StoredSample(sample_key(row, encoded.key), image, encoded.label)

    def _check(self) -> None:
        if self._stop.is_set():
            raise _StoppedError


def sample_key(row: int, key: str) -> str:
    """Return the key of a sample in its shard: its number in the source, and what it was called there.

    WebDataset parts a key from its entry at the first dot, so no dot may be left in it.
    """
    name = key.rpartition("/")[2]
    # A file's ending says what the entry's name will say.
    name = re.sub(r"\.(jpe?g|png)$", "", name, flags=re.IGNORECASE)
    name = _UNFIT.sub("_", _NUMBERED.sub("", name))[:_KEY_LENGTH].strip("_")
    return f"{row:08}_{name}" if name else f"{row:08}"


def _usual_workers() -> int:
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def _first_failure(jobs: Sequence[Future[WrittenShard]]) -> None:
    """Wait for all jobs, or raise the first error."""
    done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
    for job in done:
        error = job.exception()
        if error is not None and not isinstance(error, _StoppedError):
            raise error


def _description(source: str, planned: PlannedBuild, options: BuildOptions) -> dict[str, object]:
    path = Path(source).expanduser()
    settings = asdict(options)
    # A number chosen by size is a number; where there is an index the classes are in it; and finished shards
    # lack no sample that may not be left out.
    for name in ("max_mb", "split", "classes", "on_error"):
        del settings[name]
    return {
        "source": str(path.absolute()) if path.exists() else source,
        **settings,
        "kind": planned.kind,
        "samples_per_shard": planned.samples_per_shard,
        "classes": [planned.classes, *planned.class_names],
        "splits": list(planned.splits),
        SOURCE_FACTS: [source_facts(split) for split in planned.sources],
    }


def _check_classes(sources: Sequence[SourceSplit], source: str) -> None:
    said = {split.samples.classes for split in sources}
    if len(said) > 1:
        raise UserError(
            f"its splits have {' and '.join(map(str, sorted(said)))} classes",
            where=source,
            hint="use --split",
        )


def _bad_sample(bad: BadSample) -> DataError:
    return DataError(
        f"sample {bad.key!r}: {bad.reason}",
        where=bad.place,
        hint="with --on-error skip the same command leaves out such samples and goes on; mended or taken out "
        "it makes another source, of which shards are built anew, in another folder",
    )
