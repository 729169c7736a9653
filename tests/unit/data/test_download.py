"""Downloads, from a server of the test's own that has the files under the addresses torchvision knows."""

import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fashion_mnist_cases import write

from petractl.data import Samples, describe_data, open_data
from petractl.data.cifar_batches import CIFAR10
from petractl.errors import DataError

torchvision = pytest.importorskip("torchvision.datasets")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("server")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data" / "cifar10"


@pytest.fixture
def archive(
    server: tuple[Path, str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    write_cifar_batches: Callable[..., dict[str, Samples]],
) -> dict[str, Samples]:
    folder, address = server
    batches = tmp_path_factory.mktemp("batches") / CIFAR10.pickled_folder
    written = write_cifar_batches(batches, [*CIFAR10.train_files, *CIFAR10.val_files])
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        tar.add(batches, arcname=batches.name)
    (folder / "cifar.tar.gz").write_bytes(content.getvalue())
    monkeypatch.setattr(torchvision.CIFAR10, "url", f"{address}/cifar.tar.gz")
    monkeypatch.setattr(torchvision.CIFAR10, "filename", "cifar.tar.gz")
    monkeypatch.setattr(torchvision.CIFAR10, "tgz_md5", hashlib.md5(content.getvalue()).hexdigest())
    return written


def fetch(**keys: object) -> object:
    return open_data("cifar10", **{"train": "", "val": "", "seed": 0, "download": True, **keys})


def test_a_missing_set_is_downloaded_once(
    home: Path, archive: dict[str, Samples], capsys: pytest.CaptureFixture[str]
) -> None:
    described = describe_data("cifar10", train="", val="", download=True)
    assert (described.train_samples, described.val_samples) == (50_000, 10_000)
    assert not home.exists()
    assert fetch().info.train_samples == 5 * 4
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in home.iterdir()) == [CIFAR10.pickled_folder]
    assert sorted(path.name for path in home.parent.iterdir()) == [".cifar10.lock", "cifar10"]
    torchvision.CIFAR10.url = "http://127.0.0.1:1/gone"
    assert fetch().info.val_samples == 4
    assert describe_data("cifar10", train="", val="", download=True).val_samples == 4


def test_a_download_that_fails_leaves_nothing(home: Path, archive: dict[str, Samples]) -> None:
    torchvision.CIFAR10.tgz_md5 = "0" * 32
    with pytest.raises(DataError, match="cifar10 could not be downloaded") as caught:
        fetch()
    assert caught.value.where == "data.download"
    assert list(home.iterdir()) == []
    assert sorted(path.name for path in home.parent.iterdir()) == [".cifar10.lock", "cifar10"]


def test_no_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.CIFAR10, "url", "http://127.0.0.1:1/gone")
    with pytest.raises(DataError, match="could not be downloaded"):
        fetch()


def test_a_place_of_ones_own_is_never_downloaded_to(home: Path, archive: dict[str, Samples]) -> None:
    with pytest.raises(DataError, match="is not in"):
        fetch(train=str(home.parent.parent))
    with pytest.raises(DataError, match="is not in data/cifar10"):
        open_data("cifar10", train="", val="", seed=0)
    assert not home.exists()


def test_fashion_mnist(server: tuple[Path, str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, address = server
    write(folder)
    files = sorted(folder.glob("*.gz"))
    sums = [(file.name, hashlib.md5(file.read_bytes()).hexdigest()) for file in files]
    monkeypatch.setattr(torchvision.FashionMNIST, "mirrors", [f"{address}/"])
    monkeypatch.setattr(torchvision.FashionMNIST, "resources", sums)
    info = describe_data("fashion-mnist", train="", val="", download=True)
    assert (info.train_samples, info.val_samples) == (60_000, 10_000)
    data = open_data("fashion-mnist", train="", val="", seed=0, download=True)
    assert (data.info.train_samples, data.info.val_samples) == (12, 5)
