import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from petractl.data.unpickle import array_of, read_pickle
from petractl.errors import DataError

_ARRAYS = [
    np.arange(12, dtype=np.uint8).reshape(3, 4),
    np.asfortranarray(np.arange(12, dtype=np.uint8).reshape(3, 4)),
    np.arange(5, dtype=">i4"),
    np.array([1.5, -2.0]),
]


class _Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("array", _ARRAYS, ids=["c", "fortran", "big-endian", "float"])
def test_arrays_of_every_protocol(tmp_path: Path, protocol: int, array: NDArray[Any]) -> None:
    content = {"data": array, "labels": [1, 2], "names": ("a", None)}
    path = _written(tmp_path / "batch", pickle.dumps(content, protocol=protocol))
    table = read_pickle(path)
    result = array_of(table["data"])
    assert result.dtype == array.dtype
    assert np.array_equal(result, array)
    assert array_of(table["labels"]).tolist() == [1, 2]
    assert table["names"] == ("a", None)


def test_numpy_scalars_in_a_list(tmp_path: Path) -> None:
    path = _written(tmp_path / "batch", pickle.dumps([np.int64(3), np.uint8(4)], protocol=2))
    assert array_of(read_pickle(path)).tolist() == [3, 4]


def test_a_batch_as_python_2_wrote_it(tmp_path: Path) -> None:
    pixels = np.arange(6, dtype=np.uint8)
    content = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(K\x02K\x03tcnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", 6)
        + pixels.tobytes()
        + b"tbU\x06labels](K\x01K\x02eu."
    )
    table = read_pickle(_written(tmp_path / "batch", content))
    assert array_of(table[b"data"]).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert table[b"labels"] == [1, 2]


@pytest.mark.parametrize(
    "function",
    [os.system, eval, exec, getattr, np.load, np.fromfile, pickle.loads],
    ids=lambda function: str(function.__name__),
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_calls_anything_is_not_run(tmp_path: Path, function: Any, protocol: int) -> None:
    marker = tmp_path / "marker"
    harm = _Calls(function, f"touch {marker}")
    path = _written(tmp_path / "batch", pickle.dumps({"data": harm}, protocol=protocol))
    with pytest.raises(DataError, match=r"the pickle asks for .*: it was not run") as caught:
        read_pickle(path)
    assert caught.value.where == str(path)
    assert not marker.exists()


def test_the_test_before_can_fail(tmp_path: Path) -> None:
    # The same pickle does its harm where the plain unpickler reads it.
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(_Calls(os.system, f"touch {marker}")))
    assert marker.exists()


def test_a_dotted_name_reaches_nothing(tmp_path: Path) -> None:
    content = b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93."
    with pytest.raises(DataError, match=r"numpy\.ndarray\.__new__"):
        read_pickle(_written(tmp_path / "batch", content))


@pytest.mark.parametrize(
    "name",
    [
        b"c_codecs\nencode\n",
        b"cnumpy\nndarray\n",
        b"cnumpy\ndtype\n",
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"cnumpy._core.numeric\n_frombuffer\n",
    ],
)
def test_a_stand_in_cannot_be_changed(tmp_path: Path, name: bytes) -> None:
    content = b"\x80\x02" + name + b"N}U\x08__call__K\x01s\x86b."
    with pytest.raises(DataError, match="not a readable pickle"):
        read_pickle(_written(tmp_path / "batch", content))


def test_an_array_of_objects_is_refused(tmp_path: Path) -> None:
    path = _written(tmp_path / "batch", pickle.dumps(np.array([{}, []], dtype=object), protocol=2))
    value = read_pickle(path)
    with pytest.raises(ValueError, match="not a plain number"):
        array_of(value)


@pytest.mark.parametrize("value", [None, "text", {"a": 1}, [1.5], [[1]]])
def test_what_is_no_array_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected an array"):
        array_of(value)


def test_every_truncation_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    whole = pickle.dumps({"data": np.arange(9, dtype=np.uint8), "labels": [1, 2]}, protocol=2)
    for length in range(len(whole)):
        path = _written(tmp_path / "batch", whole[:length])
        with pytest.raises(DataError) as caught:
            read_pickle(path)
        assert caught.value.where == str(path)


def test_an_array_with_too_few_bytes_is_refused(tmp_path: Path) -> None:
    whole = pickle.dumps(np.arange(9, dtype=np.uint8), protocol=4)
    path = _written(tmp_path / "batch", whole.replace(b"K\t\x85", b"K\x0a\x85"))
    value = read_pickle(path)
    with pytest.raises(ValueError, match="cannot reshape"):
        array_of(value)
