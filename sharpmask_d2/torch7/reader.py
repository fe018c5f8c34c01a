"""Reads Torch7's binary files (.t7) as plain objects. No code of a file is executed, and memory is bounded by the length of the file.

A file holds one object: nil, a number, a string, a boolean, a table, a tensor, a storage, a function, or an object of a class, which is the
table of its fields. Tables, tensors, storages and objects have numbers; a number that occurs again is a reference.

No maintained library reads these files: the last release of torchfile (2017) allocates whatever a length field says, descends into nested
objects by recursion, and raises arbitrary exceptions for broken files; OpenCV and PyTorch have removed their readers.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from ..errors import UserError

_NIL, _NUMBER, _STRING, _TABLE, _TORCH, _BOOLEAN, _FUNCTION, _OLD_RECURSIVE_FUNCTION, _RECURSIVE_FUNCTION = range(9)

_LONG = "long"
# Element types of Torch. The prefix "Cuda" names the device and does not change the format; "Cuda" alone is float.
_ELEMENTS = {
    "Byte": "u1",
    "Char": "i1",
    "Short": "<i2",
    "Int": "<i4",
    "Long": _LONG,
    "Half": "<f2",
    "Float": "<f4",
    "Double": "<f8",
}
_DTYPES = {**_ELEMENTS, "Cuda": "<f4", **{f"Cuda{name}": dtype for name, dtype in _ELEMENTS.items()}}

# The maximum of numpy 1.
_MAX_DIMS = 32
# Maximum number of nested readings, far beyond any network; a nested table takes two of them, an object four.
_MAX_DEPTH = 10_000
# The shortest entry of a table: a boolean as key (8 bytes) and nil as value (4 bytes).
_BYTES_PER_ENTRY = 12

# Stands for a tensor or storage while its content is being read.
_PENDING = object()


class Torch7Error(UserError):
    """The file is not a whole Torch7 binary file; the message names the file and the position of the fault."""


class Table(dict):
    """A Lua table. As in Lua, a table equals only itself, so that it can be a key. Numbers are floats: key 1 finds the entry of 1.0."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__
    __ne__ = object.__ne__

    def sequence(self) -> list[Any]:
        """The values of the keys 1, 2, ... before the first missing key."""
        values = []
        while len(values) + 1 in self:
            values.append(self[len(values) + 1])
        return values


class TorchObject:
    """An object of a Torch class.

    Attributes:
        class_name: of the object, such as "nn.Linear".
        fields: `Table` of the object's fields.
    """

    def __init__(self, class_name: str):
        self.class_name = class_name
        self.fields = Table()

    def __repr__(self) -> str:
        return f"TorchObject({self.class_name}, {sorted(map(str, self.fields))})"


class SkippedFunction:
    """Stands for a Lua function, whose code is not read."""


class _Header(NamedTuple):
    """What the name of a tensor or storage class says."""

    is_storage: bool  # a storage, not a tensor
    dtype: np.dtype  # of the elements


def read_torch7(path: Union[str, Path]) -> Any:
    """Read a file that Torch7's torch.save wrote in its default, binary format, with 64-bit or 32-bit longs.

    Args:
        path: of the file.

    Returns:
        The object of the file: None, float, str (bytes that are not UTF-8 become surrogates), bool, `Table`, `TorchObject`,
        `SkippedFunction`, or, for tensors and storages, a numpy array, which is a read-only view of the file (shape (0,) for an empty
        tensor).

    Raises:
        FileNotFoundError: the file does not exist.
        Torch7Error: the file is broken, truncated or of another kind.
    """
    with open(path, "rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise Torch7Error(f"{path} is empty") from None
    return parse_torch7(content, name=str(path))


def parse_torch7(content: Union[bytes, mmap.mmap], *, name: str = "the data") -> Any:
    """Read the content of a file.

    Args:
        content: of the whole file.
        name: what error messages call the file.

    Returns:
        The object of the file, see `read_torch7`.

    Raises:
        Torch7Error: the content is broken, truncated or of another kind.
    """
    if bytes(content[:2]) in (b"3\n", b"4\n"):
        raise Torch7Error(f"{name} is in Torch7's ASCII format: save it with torch.save(path, object, 'binary')")
    failures = []
    for long_size in (8, 4):
        parser = _Parser(content, long_size)
        try:
            return parser.parse()
        except _FormatError as error:
            failures.append((parser.position, str(error)))
    position, reason = max(failures, key=lambda failure: failure[0])
    raise Torch7Error(
        f"{name} is not a whole Torch7 file: at byte {position} of {len(content)}, {reason}; "
        "was it downloaded or copied completely?"
    )


class _FormatError(Exception):
    """A fault in the content; the message is the reason alone."""


class _Parser:
    """Reads one object from a content whose longs have `long_size` bytes."""

    def __init__(self, content: Union[bytes, mmap.mmap], long_size: int):
        self.content = content
        self.position = 0
        self.long = {8: "<q", 4: "<i"}[long_size]
        self.objects: dict[int, Any] = {}

    def parse(self) -> Any:
        """The object of the whole content."""
        # Generators on an explicit stack, because a hostile file nests deeper than Python's recursion limit.
        stack = [self._object()]
        value = None
        while stack:
            try:
                asked = stack[-1].send(value)
            except StopIteration as finished:
                stack.pop()
                value = finished.value
            else:
                if len(stack) == _MAX_DEPTH:
                    raise _FormatError("tables and objects are nested too deeply")
                stack.append(asked)
                value = None
        if self.position != len(self.content):
            raise _FormatError("the object ends, but not the file")
        return value

    # ------------------------------------------------------------------ plain values

    def _skip(self, size: int, what: str) -> int:
        """Move on by `size` bytes; returns the position at which they begin."""
        start = self.position
        if not 0 <= size <= len(self.content) - start:
            raise _FormatError(f"{what} of {size} bytes does not fit into the rest of the file")
        self.position += size
        return start

    def _number(self, layout: str, what: str):
        return struct.unpack_from(layout, self.content, self._skip(struct.calcsize(layout), what))[0]

    def _int(self, what: str) -> int:
        return self._number("<i", what)

    def _bytes(self, what: str) -> bytes:
        size = self._int(f"the length of {what}")
        start = self._skip(size, what)
        return self.content[start : start + size]

    def _text(self, what: str) -> str:
        return self._bytes(what).decode("utf-8", errors="surrogateescape")

    # ------------------------------------------------------------------ objects: each generator yields the objects that it needs first

    def _object(self):
        kind = self._int("the type of an object")
        if kind == _NIL:
            return None
        if kind == _NUMBER:
            return self._number("<d", "a number")
        if kind == _STRING:
            return self._text("a string")
        if kind == _BOOLEAN:
            return self._int("a boolean") != 0
        if kind == _FUNCTION:
            return (yield self._function(None))
        if kind not in (_TABLE, _TORCH, _OLD_RECURSIVE_FUNCTION, _RECURSIVE_FUNCTION):
            raise _FormatError(f"there is no type of object with number {kind}")
        index = self._int("the number of an object")
        if index in self.objects:
            if self.objects[index] is _PENDING:
                raise _FormatError("a tensor or storage refers to itself")
            return self.objects[index]
        if kind == _TABLE:
            return (yield self._table(index))
        if kind == _TORCH:
            return (yield self._torch_object(index))
        return (yield self._function(index))

    def _function(self, index):
        function = SkippedFunction()
        if index is not None:
            self.objects[index] = function
        self._bytes("a function")
        yield self._object()  # its upvalues
        return function

    def _table(self, index: int):
        table = self.objects[index] = Table()
        size = self._int("the size of a table")
        if not 0 <= size <= (len(self.content) - self.position) // _BYTES_PER_ENTRY:
            raise _FormatError(f"a table of {size} entries does not fit into the rest of the file")
        for _ in range(size):
            key = yield self._object()
            # Lua has no NaN as a key either. Before Python 3.10 all NaNs have the same hash, so that many of them take quadratic time.
            if isinstance(key, np.ndarray) or key is None or key != key:
                what = "a tensor or storage" if isinstance(key, np.ndarray) else "nil or NaN"
                raise _FormatError(f"a table has {what} as a key")
            # True and 1 are two keys in Lua but one in Python, where the second value would replace the first.
            if key in table:
                raise _FormatError("a table has a key twice, where true counts as 1 and false as 0")
            table[key] = yield self._object()
        return table

    def _torch_object(self, index: int):
        class_name = self._text("a version")
        # Old files have no version but the name of the class in its place.
        if class_name.startswith("V "):
            class_name = self._text("the name of a class")
        header = self._header(class_name)
        if header is not None:
            self.objects[index] = _PENDING
            array = yield (self._storage(header.dtype) if header.is_storage else self._tensor(class_name, header.dtype))
            self.objects[index] = array
            return array
        obj = self.objects[index] = TorchObject(class_name)
        fields = yield self._object()
        if not isinstance(fields, Table):
            raise _FormatError(f"class {class_name!r} is written in a form of its own, which is not known here")
        obj.fields = fields
        return obj

    def _header(self, class_name: str) -> Optional[_Header]:
        """The `_Header` of a tensor or storage class; None for other classes."""
        for suffix in ("Tensor", "Storage"):
            element = class_name[len("torch.") : -len(suffix)]
            if class_name == f"torch.{element}{suffix}" and element in _DTYPES:
                dtype = _DTYPES[element]
                return _Header(suffix == "Storage", np.dtype(self.long if dtype is _LONG else dtype))
        return None

    def _storage(self, dtype: np.dtype):
        length = self._number(self.long, "the length of a storage")
        start = self._skip(length * dtype.itemsize, "a storage")
        return np.frombuffer(self.content, dtype, length, start) if length else np.empty(0, dtype)
        yield  # makes this method a generator, as `_torch_object` expects

    def _tensor(self, class_name: str, dtype: np.dtype):
        dims = self._int("the dimensions of a tensor")
        if not 0 <= dims <= _MAX_DIMS:
            raise _FormatError(f"a tensor has {dims} dimensions")
        sizes = [self._number(self.long, "the sizes of a tensor") for _ in range(dims)]
        strides = [self._number(self.long, "the strides of a tensor") for _ in range(dims)]
        # Torch counts from 1; the offset of an empty tensor may be anything.
        offset = self._number(self.long, "the offset of a tensor") - 1
        storage = yield self._object()
        if min(sizes, default=0) < 0 or min(strides, default=0) < 0:
            raise _FormatError(f"a tensor has sizes {sizes} and strides {strides}")
        count = math.prod(sizes) if dims else 0
        if storage is not None and not (
            isinstance(storage, np.ndarray)
            and storage.ndim == 1
            and storage.flags.c_contiguous
            and storage.dtype == dtype
        ):
            raise _FormatError(f"a {class_name} has no storage of its type")
        if count == 0:
            return np.empty(0, dtype)
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides))
        # The last condition is for strides of 0: they make a huge tensor of a small storage, and a copy would allocate it.
        if storage is None or offset < 0 or last >= len(storage) or count > len(self.content):
            raise _FormatError(f"a tensor of sizes {sizes} and strides {strides} does not fit into its storage")
        # The stride of a single element is never used, and may be too large for numpy.
        byte_strides = [stride * dtype.itemsize if size > 1 else 0 for size, stride in zip(sizes, strides)]
        return np.lib.stride_tricks.as_strided(storage[offset:], sizes, byte_strides, writeable=False)
