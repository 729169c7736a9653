import hashlib
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from petractl.data.writing.recoding import Recoding
from petractl.data.writing.shard_file import StoredSample, sha256_of, write_shard


@pytest.fixture
def samples(picture: Callable[..., bytes]) -> list[StoredSample]:
    return [StoredSample(f"{row:08}_x", Recoding()(picture(row)), label=row % 3) for row in range(5)]


def test_a_shard_is_a_plain_tar(tmp_path: Path, samples: list[StoredSample]) -> None:
    shard = write_shard(tmp_path / "a.tar", samples, skipped=[])
    content = (tmp_path / "a.tar").read_bytes()
    assert (shard.name, shard.samples, shard.bytes) == ("a.tar", 5, len(content))
    assert shard.sha256 == hashlib.sha256(content).hexdigest() == sha256_of(tmp_path / "a.tar")
    assert shard.image_size == (24, 32)
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = archive.getmembers()
        assert [member.name for member in members[:4]] == [
            "00000000_x.cls",
            "00000000_x.jpg",
            "00000001_x.cls",
            "00000001_x.jpg",
        ]
        assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "")}
        file = archive.extractfile(members[3])
        assert file is not None
        assert file.read() == samples[1].image.content


def test_images_of_several_sizes(tmp_path: Path, samples: list[StoredSample], picture) -> None:
    samples.append(StoredSample("z", Recoding()(picture(9, size=(10, 20))), label=0))
    assert write_shard(tmp_path / "a.tar", samples, skipped=[]).image_size is None


def test_the_bytes_are_those_of_webdataset(tmp_path: Path, samples: list[StoredSample]) -> None:
    from webdataset import TarWriter

    write_shard(tmp_path / "a.tar", samples, skipped=[])
    with TarWriter(str(tmp_path / "b.tar"), encoder=False, mtime=0, user="", group="") as archive:
        for sample in samples:
            entries = {sample.image.entry: sample.image.content, "cls": str(sample.label).encode()}
            archive.write({"__key__": sample.key, **entries})
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_same_samples_same_bytes(tmp_path: Path, samples: list[StoredSample]) -> None:
    first = write_shard(tmp_path / "a.tar", samples, skipped=[])
    assert write_shard(tmp_path / "b.tar", samples, skipped=[]).sha256 == first.sha256


def test_all_or_nothing(tmp_path: Path, samples: list[StoredSample]) -> None:
    def broken() -> Iterator[StoredSample]:
        yield from samples
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", broken(), skipped=[])
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_replaced_in_one_step(tmp_path: Path, samples: list[StoredSample]) -> None:
    (tmp_path / "a.tar").write_text("old")

    def watched() -> Iterator[StoredSample]:
        for sample in samples:
            assert (tmp_path / "a.tar").read_text() == "old"
            yield sample

    assert write_shard(tmp_path / "a.tar", watched(), skipped=[]).samples == 5
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
