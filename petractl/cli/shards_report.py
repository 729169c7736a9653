"""What `petractl shards` says: of a build, of a check, of a set."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from petractl.cli.report import show_warning, write_out
from petractl.cli.table import write_table
from petractl.errors import DataError, Problem

if TYPE_CHECKING:
    from petractl.data.writing.building import Built, PlannedBuild
    from petractl.data.writing.checking import CheckReport
    from petractl.data.writing.survey import ImageSizes, Survey

_MOST_SKIPPED_SHOWN = 10


def show_plan(planned: "PlannedBuild", *, as_json: bool) -> None:
    """Write which shards a build would make."""
    rows = [(shard.name, len(shard.rows)) for shard in planned.shards]
    if as_json:
        table = {
            "kind": planned.kind,
            "classes": planned.classes,
            "class_names": list(planned.class_names),
            "shards": [{"name": name, "samples": samples} for name, samples in rows],
        }
        write_out(json.dumps(table))
        return
    for source in planned.sources:
        own = [shard for shard in planned.shards if shard.source is source]
        of = f"{source.split}: " if source.split else ""
        sys.stderr.write(
            f"{of}{source.count} samples of {planned.classes} classes, from {planned.kind}, "
            f"would make {_shards(len(own))}\n"
        )
    write_table(("shard", "samples"), [(name, str(samples)) for name, samples in rows])


def show_built(built: "Built", folder: Path, *, as_json: bool) -> None:
    """Write what a build has made, and warn of what it left out."""
    if built.skipped:
        named = [f"{bad.place}: {bad.key}: {bad.reason}" for bad in built.skipped[:_MOST_SKIPPED_SHOWN]]
        more = len(built.skipped) - len(named)
        lines = "\n  ".join(named + ([f"and {more} more"] if more else []))
        show_warning(Problem("", f"{_samples(len(built.skipped))} left out\n  {lines}"))
    samples, size = sum(shard.samples for shard in built.shards), sum(shard.bytes for shard in built.shards)
    if as_json:
        table = {
            "folder": str(folder),
            "samples": samples,
            "bytes": size,
            "shards": [shard.name for shard in built.shards],
            "kept": built.kept,
            "skipped": [{"place": bad.place, "key": bad.key, "reason": bad.reason} for bad in built.skipped],
        }
        write_out(json.dumps(table))
        return
    kept = f" ({built.kept} of them from before)" if built.kept else ""
    write_out(f"{folder}: {_samples(samples)} in {_shards(len(built.shards))}{kept}, {in_bytes(size)}")


def in_bytes(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def _samples(count: int) -> str:
    return "1 sample" if count == 1 else f"{count} samples"


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"


def show_checked(report: "CheckReport", place: str, *, as_json: bool) -> None:
    """Write every fault; raises `DataError` where there is one."""
    if as_json:
        table = {
            "shards": report.shards,
            "samples": report.samples,
            "classes": report.classes or None,
            "problems": [
                {"shard": fault.shard, "key": fault.key, "reason": fault.reason} for fault in report.faults
            ],
        }
        write_out(json.dumps(table))
    elif report.faults:
        write_out("\n".join(map(str, report.faults)))
    checked = f"{_samples(report.samples)} in {_shards(report.shards)}"
    if not report.classes:
        what = "no index says how many classes there are, so labels are not compared with it"
        show_warning(Problem("", what, "say it with --classes"))
    if report.faults:
        count = len(report.faults)
        problems = "1 problem" if count == 1 else f"{count} problems"
        raise DataError(f"{problems} in {checked}", where=place, hint="each is a line on stdout")
    if not as_json:
        write_out(f"{place}: {checked}, nothing wrong")


def show_survey(survey: "Survey", place: str, *, as_json: bool) -> None:
    """Write what a set holds: a row per part, then a row per class."""
    for fault in survey.faults:
        show_warning(Problem("", str(fault)))
    if survey.faults:
        show_warning(Problem("", "not all of it is as it should be", f"see `petractl shards check {place}`"))
    if as_json:
        write_out(json.dumps(_survey_as_json(survey)))
        return
    rows = [
        (
            part.name,
            str(len(part.shards)),
            str(part.samples),
            in_bytes(part.bytes),
            str(sum(count > 0 for count in part.per_class)),
            _sizes(part.sizes),
        )
        for part in survey.parts
    ]
    write_table(("part", "shards", "samples", "bytes", "classes", "images"), rows)
    write_out("")
    names = [part.name for part in survey.parts]
    header = ("class", *names, *(["name"] if survey.class_names else []))
    write_table(header, _class_rows(survey))


def _class_rows(survey: "Survey") -> list[tuple[str, ...]]:
    most = max(survey.classes, *(len(part.per_class) for part in survey.parts))
    rows = []
    for label in range(most):
        counts = [part.per_class[label] if label < len(part.per_class) else 0 for part in survey.parts]
        # A label may lie beyond the classes: then it is damage, and has no name.
        names = [survey.class_names[label] if label < len(survey.class_names) else ""]
        rows.append((str(label), *map(str, counts), *(names if survey.class_names else [])))
    return rows


def _sizes(sizes: "ImageSizes | None") -> str:
    if sizes is None:
        return "none that can be read"
    smallest, median, largest = (
        f"{width}x{height}" for height, width in (sizes.smallest, sizes.median, sizes.largest)
    )
    of = f" ({sizes.looked_at} looked at)" if sizes.looked_at else ""
    return f"{smallest}{of}" if smallest == largest else f"{smallest} to {largest}, median {median}{of}"


def _survey_as_json(survey: "Survey") -> dict[str, object]:
    return {
        "classes": survey.classes or None,
        "class_names": list(survey.class_names),
        "parts": [
            {
                "name": part.name,
                "shards": list(part.shards),
                "samples": part.samples,
                "bytes": part.bytes,
                "image_sizes": part.sizes and asdict(part.sizes),
                "samples_per_class": list(part.per_class),
            }
            for part in survey.parts
        ],
        "problems": [
            {"shard": fault.shard, "key": fault.key, "reason": fault.reason} for fault in survey.faults
        ],
    }
