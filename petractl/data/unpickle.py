"""Reading pickled NumPy arrays from strangers without running their code.

A pickle is a program: it may name any importable function and call it. The CIFAR sets are published as
pickles, so they are read by an unpickler that knows only the names by which NumPy arrays, dtypes and scalars
are pickled, and gives each a stand-in of this file in place of the real thing. No function of NumPy or of any
other module can be reached; the stand-ins only collect bytes, from which `array_of` then builds a plain
numeric array. The stand-ins have no `__dict__`, so a pickle cannot change them either.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petractl.errors import DataError

_NUMERIC = re.compile(r"[|<>=]?[biuf][1248]")


def read_pickle(path: Path) -> Any:
    """Return the pickled plain containers in `path`, byte strings of Python 2 as bytes; arrays need
    `array_of`.

    Raises `DataError` where the pickle names anything but numeric arrays and plain containers, or is damaged.
    """
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file, encoding="bytes").load()
    except _ForbiddenNameError as error:
        raise DataError(
            f"the pickle asks for {error}, which no data set needs: it was not run",
            where=str(path),
            hint="the file may be malicious; get the set again from its authors",
        ) from None
    # A damaged pickle raises nearly anything: it is a program with a typing error.
    except Exception as error:
        raise DataError(
            f"not a readable pickle of arrays: {type(error).__name__}: {error}",
            where=str(path),
            hint="the file may be truncated; get the set again from its authors",
        ) from error


def array_of(value: object) -> NDArray[Any]:
    """Return what `read_pickle` gave for an array, a list of integers or a list of scalars, as an array.

    Raises `ValueError` where it is none of these.
    """
    if isinstance(value, _Array):
        try:
            return value.build()
        except (AttributeError, TypeError) as error:
            raise ValueError(f"the pickled array is damaged: {error}") from error
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        return np.array(value, dtype=np.int64)
    raise ValueError(f"expected an array or a list of integers, found {type(value).__name__}")


class _ForbiddenNameError(Exception):
    pass


class _Dtype:
    """Stand-in for `numpy.dtype`: called with a type code, then given its byte order."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: str | bytes, *_flags: object) -> None:
        self._code = code.decode("ascii") if isinstance(code, bytes) else code
        self._order = ""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        self._order = order.decode("ascii") if isinstance(order, bytes) else order

    def build(self) -> np.dtype[Any]:
        code = self._order + self._code
        if not _NUMERIC.fullmatch(code):
            raise ValueError(f"dtype {code!r} is not a plain number")
        return np.dtype(code)


class _Array:
    """Stand-in for an array: its shape, dtype, order and bytes."""

    __slots__ = ("_bytes", "_dtype", "_fortran", "_shape")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, self._shape, self._dtype, self._fortran, self._bytes = state

    def build(self) -> NDArray[Any]:
        array = np.frombuffer(self._bytes, dtype=self._dtype.build())
        return array.reshape(self._shape, order="F" if self._fortran else "C")


class _NdarrayName:
    """Stand-in for the class `numpy.ndarray`, which pickles name but need not call."""

    __slots__ = ()


class _Reconstruct:
    """Stand-in for `_reconstruct`: an empty array whose state follows."""

    __slots__ = ()

    def __call__(self, _subtype: object, _shape: object, _code: object) -> _Array:
        return _Array()


class _FromBuffer:
    """Stand-in for `_frombuffer`, by which protocol 5 pickles an array in one go."""

    __slots__ = ()

    def __call__(self, buffer: Any, dtype: _Dtype, shape: Any, order: str, *_axes: object) -> _Array:
        array = _Array()
        array.__setstate__((1, shape, dtype, order == "F", bytes(buffer)))
        return array


class _Scalar:
    """Stand-in for `scalar`: a NumPy number becomes a Python one."""

    __slots__ = ()

    def __call__(self, dtype: _Dtype, buffer: bytes) -> Any:
        return np.frombuffer(buffer, dtype=dtype.build())[0].item()


class _Encode:
    """Stand-in for `_codecs.encode`, by which protocol 2 of Python 3 pickles bytes."""

    __slots__ = ()

    def __call__(self, text: str, _encoding: object) -> bytes:
        return text.encode("latin1")


_NAMES: dict[tuple[str, str], object] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _NdarrayName(),
    ("_codecs", "encode"): _Encode(),
}
# NumPy 2 renamed its inner package, and pickles hold the name of the version that wrote them.
for _package in ("numpy.core", "numpy._core"):
    _NAMES[_package + ".multiarray", "_reconstruct"] = _Reconstruct()
    _NAMES[_package + ".multiarray", "scalar"] = _Scalar()
    _NAMES[_package + ".numeric", "_frombuffer"] = _FromBuffer()


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _NAMES[module_name, global_name]
        except KeyError:
            raise _ForbiddenNameError(f"{module_name}.{global_name}") from None
