"""Torch7's binary format, written for tests: the counterpart of sharpmask_d2/torch7/reader.py, made from the format alone."""

import struct

import numpy as np

_ELEMENTS = {
    "u1": "Byte",
    "i1": "Char",
    "i2": "Short",
    "i4": "Int",
    "i8": "Long",
    "f2": "Half",
    "f4": "Float",
    "f8": "Double",
}


class Object:
    """An object of a Torch class with its fields."""

    def __init__(self, class_name: str, **fields):
        self.class_name, self.fields = class_name, fields


class Storage:
    """A flat array; `element` is Float, Cuda, CudaHalf, Long ... and by default what the array's dtype says."""

    def __init__(self, array, element: str = ""):
        self.array = np.ascontiguousarray(array).ravel()
        self.element = element or _ELEMENTS[self.array.dtype.str[1:]]


class Tensor:
    """A tensor as a view of a storage; `offset` counts from 1."""

    def __init__(self, storage: Storage, sizes, strides=None, offset: int = 1):
        self.storage, self.sizes, self.offset = storage, list(sizes), offset
        self.strides = (
            list(strides) if strides is not None else [int(np.prod(sizes[i + 1 :])) for i in range(len(sizes))]
        )


class Function:
    """A Lua function: its dump and upvalues. `kind` is 6 (not numbered), 7 or 8 (numbered)."""

    def __init__(self, dump: bytes = b"\x1bLJ", upvalues=None, kind: int = 8):
        self.dump, self.upvalues, self.kind = dump, upvalues, kind


def dumps(value, *, long_size: int = 8, versions: bool = True) -> bytes:
    """The bytes of a file that holds `value`.

    Args:
        value: None, bool, number, str, bytes, dict, list (a table with keys from 1), numpy array (a tensor of its own storage), or one of
            the classes above. The same dict, list, array or instance met twice becomes a reference.
        long_size: 8 or 4 bytes.
        versions: False writes class names as files before version 1 had them.
    """
    return b"".join(dumps_parts(value, long_size=long_size, versions=versions))


def dumps_parts(value, *, long_size: int = 8, versions: bool = True) -> list:
    """The bytes of `dumps` in pieces that begin where a number or a text begins."""
    writer = _Writer({8: "<q", 4: "<i"}[long_size], versions)
    writer.write(value)
    return writer.parts


class _Writer:
    def __init__(self, long: str, versions: bool):
        self.long, self.versions = long, versions
        self.parts, self.numbers, self.alive = [], {}, []

    def pack(self, layout: str, *values) -> None:
        self.parts.append(struct.pack(layout, *values))

    def text(self, text) -> None:
        text = text.encode() if isinstance(text, str) else text
        self.pack("<i", len(text))
        self.parts.append(text)

    def numbered(self, kind: int, value) -> bool:
        """Writes type and number; returns whether the content has to follow."""
        new = id(value) not in self.numbers
        number = self.numbers.setdefault(id(value), len(self.numbers) + 1)
        self.alive.append(value)
        self.pack("<ii", kind, number)
        return new

    def class_name(self, name: str) -> None:
        if self.versions:
            self.text("V 1")
        self.text(name)

    def write(self, value) -> None:
        if value is None:
            self.pack("<i", 0)
        elif isinstance(value, bool):
            self.pack("<ii", 5, value)
        elif isinstance(value, (int, float)):
            self.pack("<id", 1, value)
        elif isinstance(value, (str, bytes)):
            self.pack("<i", 2)
            self.text(value)
        elif isinstance(value, (dict, list)):
            self.table(value)
        elif isinstance(value, Function):
            self.function(value)
        elif isinstance(value, np.ndarray):
            self.array(value)
        elif isinstance(value, Tensor):
            self.tensor(value)
        elif isinstance(value, Storage):
            self.storage(value)
        elif self.numbered(4, value):
            self.class_name(value.class_name)
            self.table(value.fields)

    def table(self, value) -> None:
        if self.numbered(3, value):
            items = list(value.items()) if isinstance(value, dict) else list(enumerate(value, start=1))
            self.pack("<i", len(items))
            for key, item in items:
                self.write(key)
                self.write(item)

    def function(self, value: Function) -> None:
        if value.kind == 6:
            self.pack("<i", 6)
        elif not self.numbered(value.kind, value):
            return
        self.text(value.dump)
        self.write(value.upvalues)

    def array(self, value: np.ndarray) -> None:
        self.tensor(Tensor(Storage(value), value.shape), of=value)

    def tensor(self, value: Tensor, of=None) -> None:
        if self.numbered(4, value if of is None else of):
            self.class_name(f"torch.{value.storage.element}Tensor")
            self.pack("<i", len(value.sizes))
            for number in (*value.sizes, *value.strides, value.offset):
                self.pack(self.long, number)
            self.storage(value.storage)

    def storage(self, value: Storage) -> None:
        if self.numbered(4, value):
            self.class_name(f"torch.{value.element}Storage")
            self.pack(self.long, len(value.array))
            wide = np.dtype(self.long) if value.array.dtype == np.int64 else value.array.dtype
            self.parts.append(value.array.astype(wide).tobytes())
