"""The reader of Torch7 files: what whole files hold, and that broken and hostile files end in Torch7Error at little cost."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import contextlib
import gzip
import itertools
import math
import re
import shutil
import struct
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharpmask_d2.torch7.reader import SkippedFunction, Table, Torch7Error, TorchObject, parse_torch7, read_torch7
from torch7_writer import Function, Object, Storage, Tensor, dumps, dumps_parts

TYPES = (type(None), float, str, bool, Table, TorchObject, SkippedFunction, np.ndarray)

each_long_size = pytest.mark.parametrize("long_size", [8, 4])


# ---------------------------------------------------------------------- files by hand


def ints(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}i", *numbers)


def longs(long_size: int, *numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}{'q' if long_size == 8 else 'i'}", *numbers)


def text(content: bytes) -> bytes:
    return ints(len(content)) + content


def torch_class(index: int, name: bytes) -> bytes:
    return ints(4, index) + text(b"V 1") + text(name)


def float_storage(long_size: int, index: int, values) -> bytes:
    header = torch_class(index, b"torch.FloatStorage") + longs(long_size, len(values))
    return header + struct.pack(f"<{len(values)}f", *values)


def float_tensor(long_size: int, sizes, strides, offset: int = 1, storage: bytes = b"", index: int = 1) -> bytes:
    """A tensor of the bytes of a storage, by default one of six numbers."""
    header = torch_class(index, b"torch.FloatTensor") + ints(len(sizes))
    return (
        header + longs(long_size, *sizes, *strides, offset) + (storage or float_storage(long_size, index + 1, range(6)))
    )


# ---------------------------------------------------------------------- what is checked of any result


def walk(value):
    """Everything that can be reached from a result, once."""
    seen, todo = {}, [value]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        yield item
        if isinstance(item, Table):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, TorchObject):
            todo.append(item.fields)


def byte_range(array: np.ndarray) -> tuple:
    """The addresses of the first byte and of the byte after the last."""
    first = array.__array_interface__["data"][0]
    reach = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides))
    return first, first + reach + array.itemsize


def check_sound(value, content: bytes) -> None:
    """A result has the promised types only, and every array lies within the file."""
    begin, end = byte_range(np.frombuffer(content, np.uint8))
    for item in walk(value):
        assert isinstance(item, TYPES)
        if isinstance(item, np.ndarray):
            assert item.size <= len(content)
            assert min(item.strides) >= 0
            first, last = byte_range(item)
            assert item.size == 0 or (begin <= first and last <= end)
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                float(np.nansum(item))


def refused(content: bytes, reason: str, long_size: int = 8) -> None:
    # A broken file with 32-bit longs may be read further with 64-bit ones, and the message is about the furthest reading.
    with pytest.raises(Torch7Error, match=reason if long_size == 8 else "not a whole Torch7 file"):
        parse_torch7(content)


# ---------------------------------------------------------------------- whole files


@each_long_size
@pytest.mark.parametrize("value", [None, 0.0, -2.5, 1e300, math.inf, True, False, "", "text", "λ", "a\0b\n"])
def test_a_plain_value_is_read_with_its_type(value, long_size):
    result = parse_torch7(dumps(value, long_size=long_size))
    assert type(result) is type(value)
    assert result == value


def test_a_file_written_by_hand_is_read():
    content = (
        ints(3, 1, 2)
        + (ints(2) + text(b"model"))
        + (torch_class(2, b"nn.Linear") + ints(3, 3, 1) + (ints(2) + text(b"weight")))
        + float_tensor(8, [2, 3], [3, 1], index=4)
        + (ints(1) + struct.pack("<d", 7.0))
        + ints(5, 1)
    )
    table = parse_torch7(content)
    assert sorted(map(str, table)) == ["7.0", "model"]
    assert table[7] is True
    assert table["model"].class_name == "nn.Linear"
    assert table["model"].fields["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_bytes_that_are_not_utf8_are_kept():
    content = bytes(range(256)) + "é".encode("latin-1") + b"\xed\xa0\x80"
    assert parse_torch7(dumps(content)).encode("utf-8", errors="surrogateescape") == content


@each_long_size
def test_tables_nest_and_have_keys_of_any_kind(long_size):
    value = {"a": {"b": {"c": 1}}, 2.5: "x", 3: [10, [20, 30]], False: "no", "nil": None}
    table = parse_torch7(dumps(value, long_size=long_size))
    assert type(table) is Table
    assert set(table) == set(value)
    assert table["a"]["b"]["c"] == 1
    assert table[3] is table[3.0]
    assert table[3][2].sequence() == [20, 30]
    assert (table[2.5], table[False], table["nil"]) == ("x", "no", None)
    # A sequence ends before the first missing key.
    assert parse_torch7(dumps({5: "e", 2: "b", "x": "y", 1: "a", 3: False, 0: "z"})).sequence() == ["a", "b", False]


def test_tables_and_objects_are_keys_by_identity():
    # By hand, because Python does not accept a dict as a key.
    table = parse_torch7(
        (ints(3, 1, 4) + ints(2) + text(b"key") + ints(3, 2, 0))
        + (ints(3, 2) + ints(2) + text(b"by key"))
        + (ints(3, 3, 0) + ints(2) + text(b"by twin"))
        + (torch_class(4, b"nn.Key") + ints(3, 5, 0) + ints(2) + text(b"by instance"))
    )
    assert table[table["key"]] == "by key"
    assert sorted(value for value in table.values() if isinstance(value, str)) == ["by instance", "by key", "by twin"]


@each_long_size
@pytest.mark.parametrize("versions", [True, False])
def test_objects_have_their_class_and_fields(long_size, versions):
    linear = Object("nn.Linear", weight=np.eye(3, dtype=np.float32))
    value = Object("nn.Sequential", modules=[linear, Object("nn.View")])
    first, last = parse_torch7(dumps([value, "after"], long_size=long_size, versions=versions)).sequence()
    assert (type(first), first.class_name, type(first.fields)) == (TorchObject, "nn.Sequential", Table)
    linear, view = first.fields["modules"].sequence()
    assert (linear.class_name, view.class_name) == ("nn.Linear", "nn.View")
    assert linear.fields["weight"].tolist() == np.eye(3).tolist()
    assert (len(view.fields), last) == (0, "after")
    assert repr(linear) == "TorchObject(nn.Linear, ['weight'])"


@each_long_size
@pytest.mark.parametrize("kind", [6, 7, 8])
def test_functions_are_skipped_and_nothing_after_them_is_lost(kind, long_size):
    inner, array = {"x": 1}, np.arange(3, dtype=np.float32)
    function = Function(dump=b"\x1bLJ\x00" + ints(3, 1), upvalues=[inner, {"name": "up", "value": array}], kind=kind)
    value = {"first": inner, "function": function, "inner": inner, "array": array, "last": "z"}
    for order in (
        "first function inner array last",
        "function array first inner last",
        "array last function first inner",
    ):
        table = parse_torch7(dumps({name: value[name] for name in order.split()}, long_size=long_size))
        assert type(table["function"]) is SkippedFunction
        assert table["first"] is table["inner"]
        assert table["inner"]["x"] == 1
        assert table["array"].tolist() == [0, 1, 2]
        assert table["last"] == "z"


@pytest.mark.parametrize("kind", [7, 8])
def test_a_function_that_is_referred_to_again_is_one_object(kind):
    function = Function(kind=kind)
    function.upvalues = {"itself": function}
    first, second, last = parse_torch7(dumps([function, function, "after"])).sequence()
    assert type(first) is SkippedFunction
    assert first is second
    assert last == "after"


def test_what_is_shared_in_the_file_is_one_object():
    table, instance, array, storage = {"x": 1}, Object("nn.View"), np.zeros(2), Storage(np.zeros(2))
    table["self"] = table
    result = parse_torch7(dumps([table, instance, array, storage] * 2)).sequence()
    assert len(result) == 8
    assert all(first is second for first, second in zip(result[:4], result[4:]))
    assert result[0]["self"] is result[0]
    twins = parse_torch7(dumps([{"x": 1}, {"x": 1}]))
    assert twins[1] is not twins[2]


# ---------------------------------------------------------------------- tensors

ELEMENTS = {
    "Byte": "u1",
    "Char": "i1",
    "Short": "<i2",
    "Int": "<i4",
    "Long": "<i8",
    "Half": "<f2",
    "Float": "<f4",
    "Double": "<f8",
}


@each_long_size
@pytest.mark.parametrize("versions", [True, False])
@pytest.mark.parametrize("element", [*ELEMENTS, "Cuda", *(f"Cuda{name}" for name in ELEMENTS if name != "Float")])
def test_every_element_type_is_read_as_tensor_and_as_storage(element, versions, long_size):
    dtype = np.dtype("<f4" if element == "Cuda" else ELEMENTS[element.replace("Cuda", "")])
    values = np.array([[0, 1, 100], [3, 4, 5]], dtype)
    if dtype.kind != "u":
        values[0, 2] *= -1
    storage = Storage(values, element)
    content = dumps([Tensor(storage, [2, 3]), storage, "after"], long_size=long_size, versions=versions)
    tensor, flat, last = parse_torch7(content).sequence()
    # A Lua long is as wide as on the machine that wrote the file.
    expected = np.dtype("<i4") if element.endswith("Long") and long_size == 4 else dtype
    assert tensor.dtype == flat.dtype == expected
    assert tensor.tolist() == values.tolist()
    assert flat.tolist() == values.ravel().tolist()
    assert last == "after"


@each_long_size
def test_tensors_of_one_storage_share_its_memory(long_size):
    storage = Storage(np.arange(12, dtype=np.float32))
    views = [Tensor(storage, [2, 3]), Tensor(storage, [3], offset=4), Tensor(storage, [6], offset=7), storage]
    first, second, apart, flat = parse_torch7(dumps(views, long_size=long_size)).sequence()
    assert first.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert second.tolist() == [3, 4, 5]
    assert apart.tolist() == [6, 7, 8, 9, 10, 11]
    assert np.shares_memory(first, second)
    assert all(np.shares_memory(flat, array) for array in (first, second, apart))


@each_long_size
@pytest.mark.parametrize(
    ("sizes", "strides", "offset", "expected"),
    [
        ([4, 3], [1, 4], 1, lambda flat: flat[:12].reshape(3, 4).T),
        ([3, 2], [8, 4], 2, lambda flat: flat.reshape(3, 8)[:, 1::4]),
        ([4, 3], [0, 1], 5, lambda flat: np.tile(flat[4:7], (4, 1))),
        # The stride of a single element is never used: it may be anything.
        ([2, 1, 3, 1, 2], [12, 2**31 - 1, 4, 0, 1], 1, lambda flat: flat.reshape(2, 3, 4)[:, None, :, None, :2]),
        ([24], [1], 1, lambda flat: flat),
        ([1] * 32, [7] * 32, 24, lambda flat: flat[23:].reshape([1] * 32)),
    ],
    ids=["transposed", "every fourth column", "expanded", "dimensions of one", "all", "last"],
)
def test_a_tensor_is_the_view_its_sizes_strides_and_offset_say(sizes, strides, offset, expected, long_size):
    flat = np.arange(24, dtype=np.int16)
    array = parse_torch7(dumps(Tensor(Storage(flat), sizes, strides, offset), long_size=long_size))
    assert array.shape == tuple(sizes)
    np.testing.assert_array_equal(array, expected(flat))


@each_long_size
@pytest.mark.parametrize("offset", [1, 0, -5])
@pytest.mark.parametrize(("sizes", "strides"), [([], []), ([0], [1]), ([3, 0, 2], [0, 2, 1])])
def test_an_empty_tensor_has_shape_zero_with_and_without_a_storage(sizes, strides, offset, long_size):
    for storage in (ints(0), float_storage(long_size, 2, []), float_storage(long_size, 2, [1, 2])):
        array = parse_torch7(ints(3, 9, 1, 5, 0) + float_tensor(long_size, sizes, strides, offset, storage))[False]
        assert (array.shape, array.dtype) == ((0,), np.float32)


def test_arrays_are_read_only_views_of_the_file(tmp_path):
    path = tmp_path / "large.t7"
    storage = Storage(np.arange(1_000_000, dtype=np.float64))
    path.write_bytes(dumps([Tensor(storage, [1000, 1000]), Tensor(storage, [1000, 1000], [1, 1000]), storage]))
    tracemalloc.start()
    arrays = read_torch7(path).sequence()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The storage alone has 8 MB.
    assert peak < 200_000
    assert arrays[1][2, 1] == 1002
    for array in arrays:
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True


# ---------------------------------------------------------------------- nesting


def nested_tables(depth: int) -> bytes:
    return b"".join(ints(3, number, 1, 5, 1) for number in range(depth - 1)) + ints(3, depth - 1, 0)


def nested_keys(depth: int) -> bytes:
    return b"".join(ints(3, number, 1) for number in range(depth)) + ints(5, 1) + ints(0) * depth


def nested_objects(depth: int) -> bytes:
    links = (torch_class(2 * number, b"nn.A") + ints(3, 2 * number + 1, 1, 5, 1) for number in range(depth))
    return b"".join(links) + ints(0)


def nested_functions(depth: int) -> bytes:
    return ints(6, 0) * depth + ints(0)


def nested_storages(depth: int) -> bytes:
    header = b"".join(torch_class(number, b"torch.FloatTensor") + ints(0) + longs(8, 1) for number in range(depth))
    return header + ints(0)


NESTINGS = [nested_tables, nested_keys, nested_objects, nested_functions]


@pytest.mark.parametrize("nested", NESTINGS)
def test_nesting_beyond_pythons_recursion_is_read_up_to_a_limit(nested):
    assert sys.getrecursionlimit() < 2000
    assert parse_torch7(nested(2000)) is not None
    refused(nested(20_000), "nested too deeply")


# ---------------------------------------------------------------------- broken files


def pickled(path, **options) -> None:
    torch.save({"weight": torch.ones(2, 2)}, path, **options)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"4\n1\n3\nV 1\n13\nnn.Sequential\n3\n2\n0\n"), "ASCII format.*'binary'"),
        (lambda path: path.write_bytes(b"3\n1\n0\n"), "ASCII format"),
        (lambda path: path.write_text("<!DOCTYPE html>\n<title>404</title>\n"), "no type of object"),
        (pickled, "no type of object"),
        (lambda path: pickled(path, _use_new_zipfile_serialization=False), "no type of object"),
        (lambda path: path.write_bytes(dumps(np.ones(100))[:-1]), "downloaded or copied completely"),
        (lambda path: path.write_bytes(b"\x03"), "at byte 0 of 1, the type of an object of 4 bytes does not fit"),
    ],
    ids=["empty", "ASCII", "ASCII table", "HTML", "zip", "pickle", "truncated", "one byte"],
)
def test_another_file_is_refused_by_name(write, reason, tmp_path):
    path = tmp_path / "model of mine.t7"
    write(path)
    with pytest.raises(Torch7Error, match=rf"^{re.escape(str(path))} .*{reason}"):
        read_torch7(path)


def test_a_missing_file_is_not_found_and_a_buffer_has_the_name_given(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("nowhere.t7")):
        read_torch7(tmp_path / "nowhere.t7")
    for content in (b"", b"4\n", ints(99)):
        with pytest.raises(Torch7Error, match=r"^archive\[3\] is"):
            parse_torch7(content, name="archive[3]")


@each_long_size
def test_a_file_that_is_cut_or_goes_on_is_refused(long_size):
    content = dumps(model(), long_size=long_size)
    assert type(parse_torch7(content)) is Table
    for length in [*range(0, len(content), 7), len(content) - 1]:
        refused(content[:length], "not a whole Torch7 file: at byte")
    for value in (None, 1.0, "text", model()):
        refused(dumps(value, long_size=long_size) + b"\0", "the object ends, but not the file")


def a_table(key: bytes, value: bytes = b"", count: int = 1) -> bytes:
    return ints(3, 1000, count) + key + value


STORAGE = torch_class(1, b"torch.FloatStorage")
CLASS = torch_class(1, b"tds.Hash")
BROKEN = {
    "unknown type of object": (a_table(ints(5, 1), ints(9) + bytes(100)), "at byte 24 of 124, there is no type .* 9;"),
    "negative type of object": (ints(-1) + bytes(100), "no type of object with number -1;"),
    "table that is too short": (ints(3, 1, 2, 5, 1, 0, 5, 1) + bytes(3), "a table of 2 entries does not fit"),
    "nil as key": (a_table(ints(0) + bytes(8), ints(5, 1)), "a table has nil or NaN as a key"),
    "NaN as key": (a_table(dumps(math.nan), ints(5, 1)), "a table has nil or NaN as a key"),
    "tensor as key": (a_table(dumps(np.ones(2)), ints(5, 1)), "a table has a tensor or storage as a key"),
    "storage as key": (a_table(dumps(Storage(np.ones(2))), ints(5, 1)), "a table has a tensor or storage as a key"),
    "key twice": (a_table(dumps("a") + dumps("x"), dumps("a") + dumps("y"), 2), "a table has a key twice"),
    "true and 1 as keys": (a_table(dumps(1.0) + dumps("x"), dumps(True) + dumps("y"), 2), "a table has a key twice"),
    "false and 0 as keys": (a_table(dumps(False) + dumps("x"), dumps(0.0) + dumps("y"), 2), "a table has a key twice"),
    "class written as a number": (CLASS + dumps(3.0), "class 'tds.Hash' is written in a form of its own"),
    "class written as nil": (CLASS + ints(0, 0, 0), "class 'tds.Hash' is written in a form of its own"),
    "class written as a function": (CLASS + ints(6, 0, 0), "class 'tds.Hash' is written in a form of its own"),
    **{
        f"storage of {n}": (STORAGE + longs(8, n) + bytes(15), f"a storage of {4 * n} bytes does not fit")
        for n in (-1, 40)
    },
    **{
        f"storage of {n}": (STORAGE + longs(8, n) + bytes(15), "bytes does not fit")
        for n in (-(2**63), 2**63 - 1, 2**62)
    },
    **{f"32-bit storage of {n}": (STORAGE + longs(4, n) + bytes(15), "bytes does not fit") for n in (-1, 2**31 - 1, 4)},
    **{
        f"{dims} dimensions": (torch_class(1, b"torch.FloatTensor") + ints(dims) + bytes(600), f"has {dims} dimensions")
        for dims in (33, -1, 2**31 - 1)
    },
    **{
        f"{what} of {length}": (header + ints(length) + bytes(60), f"{what} of {length} (bytes|entries) does not fit")
        for length in (-1, -(2**31), 2**31 - 1, 1000)
        for what, header in {
            "a string": ints(2),
            "a version": ints(4, 1),
            "the name of a class": ints(4, 1) + text(b"V 1"),
            "a function": ints(8, 1),
            "a table": ints(3, 1),
        }.items()
    },
}


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_object_is_refused_with_its_reason(content, reason):
    refused(content, reason)


OUTSIDE = "does not fit into its storage"
BROKEN_TENSORS = {
    "size below zero": ([-2, -3], [3, 1], 1, "sizes .* and strides"),
    "size below zero beside zero": ([0, -3], [3, 1], 1, "sizes .* and strides"),
    "stride below zero": ([3], [-1], 6, "sizes .* and strides"),
    "offset 0": ([3], [1], 0, OUTSIDE),
    "offset far below zero": ([1], [1], -(2**31), OUTSIDE),
    "offset beyond": ([1], [1], 7, OUTSIDE),
    "one too long": ([3], [1], 5, OUTSIDE),
    "one too wide": ([2, 3], [4, 1], 1, OUTSIDE),
    "strides too far": ([2], [2**31 - 1], 1, OUTSIDE),
    "huge": ([2**31 - 1, 2**31 - 1], [2**31 - 1, 1], 1, OUTSIDE),
    "huge without strides": ([1000], [0], 1, OUTSIDE),
    "2 ** 64 elements without strides": ([2**16] * 4, [0] * 4, 1, OUTSIDE),
}
BEYOND_64_BITS = {
    "stride": ([2], [2**62], 1, OUTSIDE),
    "sum of strides": ([5, 5], [2**62, 2**62], 1, OUTSIDE),
    "size": ([2**62, 4], [0, 0], 1, OUTSIDE),
    "offset": ([1], [1], 2**63 - 1, OUTSIDE),
}
TENSORS = [(8, *case) for case in (*BROKEN_TENSORS.values(), *BEYOND_64_BITS.values())]
TENSORS += [(4, *case) for case in BROKEN_TENSORS.values()]


@pytest.mark.parametrize(("long_size", "sizes", "strides", "offset", "reason"), TENSORS)
def test_a_tensor_outside_its_storage_is_refused(long_size, sizes, strides, offset, reason):
    refused(float_tensor(long_size, sizes, strides, offset), reason)


@each_long_size
def test_a_tensor_needs_a_storage_of_its_type(long_size):
    for storage in (ints(0), float_storage(long_size, 2, [])):
        refused(float_tensor(long_size, [1], [1], 1, storage), OUTSIDE, long_size)
    others = [1.0, "text", True, {}, Object("nn.View"), Function(), np.eye(6, dtype=np.float32)]
    others += [Storage(np.arange(6, dtype=kind)) for kind in ("u1", "i4", "f2", "f8", "i8")]
    contents = [dumps(other, long_size=long_size) for other in others]
    # A tensor with gaps or repetitions is no storage either; one of stride 0 looks longer than its memory is.
    contents += [float_tensor(long_size, [3], [stride], index=-3) for stride in (0, 2)]
    for content in contents:
        for sizes in ([2], [0], []):
            # The numbers of the other object's parts do not collide with this tensor's, -1.
            tensor = float_tensor(long_size, sizes, [1] * len(sizes), 1, content, index=-1)
            refused(tensor, "a torch.FloatTensor has no storage of its type", long_size)
    refused(float_tensor(long_size, [1], [1], 1, ints(4, 1)), "refers to itself")
    refused(float_tensor(long_size, [1], [1], 1, ints(3, 2, 1, 5, 1, 4, 1)), "refers to itself")


@pytest.mark.parametrize("name", [b"torch.Tensor", b"torch.FloatThing", b"xtorch.FloatTensor", b"torch.CudaCudaTensor"])
def test_only_the_names_of_tensors_are_tensors(name):
    result = parse_torch7(torch_class(1, name) + ints(3, 2, 0))
    assert type(result) is TorchObject
    assert result.class_name == name.decode()


# ---------------------------------------------------------------------- hostile files

HOSTILE_INTS = (-1, 0, 1, 3, 4, 8, 33, 1000, 2**16, 2**24, 2**31 - 1, -(2**31))
HOSTILE_LONGS = (-1, 0, 2, 2**31, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, -(2**63), 2**32 + 1)
HOSTILE_FIELDS = [ints(number) for number in HOSTILE_INTS] + [longs(8, number) for number in HOSTILE_LONGS]


def model() -> dict:
    """A small network: modules, weights in one storage, buffers, functions, lists of sizes, and a config beside it."""
    flat = Storage(np.linspace(-1, 1, 40, dtype=np.float32), "Cuda")
    shared = {"iSz": 160, "name": "deepmask", "gpu": True, "scales": [0.5, 1]}
    empty = Tensor(Storage(np.zeros(0, np.float32), "Cuda"), [])
    weight, bias = Tensor(flat, [2, 3, 2, 2]), Tensor(flat, [2], offset=25)
    convolution = Object("cudnn.SpatialConvolution", weight=weight, bias=bias, kW=2, output=empty)
    view = Object("nn.View", size=Storage(np.array([4, -1])), expanded=Tensor(flat, [3, 2], [0, 5], 30), output=empty)
    linear = Object("nn.Linear", weight=Tensor(flat, [3, 4], [1, 3], 29), indices=np.arange(3), config=shared)
    hook = Function(upvalues=[{"name": "shared", "value": shared}])
    root = Object("nn.DeepMask", modules=[convolution, view, linear], flat=Tensor(flat, [40]), hook=hook, train=False)
    return {"config": shared, "model": root, 7: Function(kind=6, upvalues=None), "half": np.ones(3, np.float16)}


PARTS = [dumps_parts(model(), long_size=long_size) for long_size in (8, 4)]
SEEDS = [b"".join(parts) for parts in PARTS]


def field_starts(parts: list) -> list:
    """Where the fields of a file begin: at most two numbers are written at a time."""
    starts = itertools.accumulate([0, *map(len, parts)])
    return sorted({start + step for part, start in zip(parts, starts) for step in range(0, len(part), 4)})


FIELDS = [field_starts(parts) for parts in PARTS]


@st.composite
def damaged_files(draw) -> bytes:
    """A file of which bytes are flipped, fields overwritten or parts moved, and which may be cut at last."""
    number = draw(st.integers(0, 1))
    content = bytearray(SEEDS[number])
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["flip", "overwrite", "splice"]))
        place = draw(st.sampled_from(FIELDS[number]))
        if kind == "flip":
            content[min(place + draw(st.integers(0, 3)), len(content) - 1)] ^= draw(st.integers(1, 255))
        elif kind == "overwrite":
            field = draw(st.sampled_from(HOSTILE_FIELDS))
            content[place : place + len(field)] = field
        else:
            begin, end = sorted(draw(st.sampled_from(FIELDS[number])) for _ in range(2))
            # Either overwrites as many bytes or is inserted.
            removed = end - begin if draw(st.booleans()) else 0
            content[place : place + removed] = content[begin:end]
    cut = draw(st.sampled_from([None, *FIELDS[number]])) if draw(st.booleans()) else None
    return bytes(content[:cut])


_class_names = [
    f"torch.{element}{kind}".encode() for element in ("Float", "CudaLong") for kind in ("Tensor", "Storage")
]
_tokens = st.one_of(
    st.builds(ints, st.integers(0, 8)),
    st.builds(ints, st.integers(3, 4), st.integers(1, 5)),
    st.builds(torch_class, st.integers(1, 9), st.sampled_from([*_class_names, b"nn.View"])),
    st.builds(text, st.sampled_from([b"", b"key", b"torch.FloatTensor"])),
    st.sampled_from(HOSTILE_FIELDS),
    st.builds(longs, st.just(8), st.integers(0, 3)),
    st.binary(max_size=20),
)
_sizes = st.one_of(st.integers(0, 6), st.sampled_from([1, 1, *HOSTILE_LONGS]))


@st.composite
def tensor_files(draw) -> bytes:
    """A tensor of any sizes, strides and offset in the right form."""
    long_size = draw(st.sampled_from([8, 4]))
    number = _sizes.map(lambda size: size if long_size == 8 else max(-(2**31), min(size, 2**31 - 1)))
    dims = draw(st.integers(0, 4))
    numbers = [draw(number) for _ in range(2 * dims + 1)]
    return float_tensor(long_size, numbers[:dims], numbers[dims:-1], numbers[-1])


FUZZ = {"damaged": damaged_files(), "tokens": st.lists(_tokens, max_size=40).map(b"".join), "tensors": tensor_files()}


@pytest.mark.parametrize("kind", FUZZ)
def test_a_damaged_file_gives_a_sound_result_or_is_refused(kind):
    @settings(derandomize=True, database=None, deadline=None, max_examples=300)
    @given(FUZZ[kind])
    def check(content):
        try:
            value = parse_torch7(content)
        except Torch7Error:
            return
        check_sound(value, content)

    check()


def check_cheap(content: bytes) -> None:
    """Reading takes memory and function calls, a measure of time that is the same on every machine, in proportion to the file's length."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += 1

    def parse():
        with contextlib.suppress(Torch7Error):
            parse_torch7(content)

    tracemalloc.start()
    parse()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    before = sys.getprofile()
    sys.setprofile(count)
    parse()
    sys.setprofile(before)
    assert peak < 1_000_000 + 200 * len(content)
    assert calls < 1000 + 20 * len(content)


def test_hostile_lengths_cost_no_more_than_the_file_is_long():
    for seed, fields in zip(SEEDS, FIELDS):
        for number, position in enumerate(fields[::2]):
            # By turns, so that neighbours get different ones.
            field = HOSTILE_FIELDS[number % len(HOSTILE_FIELDS)]
            check_cheap(seed[:position] + field + seed[position + len(field) :])


def table_of(count: int, entry) -> bytes:
    """A table of `count` entries, of which `entry` makes the bytes."""
    return ints(3, 1, count) + b"".join(map(entry, range(count)))


DENSE = {
    "tables": table_of(2000, lambda n: ints(1) + struct.pack("<d", n) + ints(3, n + 2, 0)),
    "functions": table_of(2000, lambda n: ints(6, 0, 0, 5, 0)),
    "objects": table_of(2000, lambda n: ints(4, 2 * n + 2, 0, 3, 2 * n + 3, 0, 0)),
    "tensors": table_of(
        1000,
        lambda n: ints(2) + text(b"%d" % n) + torch_class(n + 2, b"torch.IntTensor") + ints(0) + longs(4, 0) + ints(0),
    ),
    "strings": table_of(2000, lambda n: ints(2) + text(b"%d" % n) + ints(2, 0)),
    "long name": ints(4, 1) + text(b"\xff" * 100_000) + ints(0),
    "long string": ints(2) + text(b"\xff" * 100_000),
    "not numbers": table_of(2000, lambda n: ints(1) + struct.pack("<d", math.nan) + ints(0)),
    **{nested.__name__: nested(11_000) for nested in [*NESTINGS, nested_storages]},
}


@pytest.mark.parametrize("kind", DENSE)
def test_a_file_dense_with_objects_costs_no_more_than_it_is_long(kind):
    check_cheap(DENSE[kind])


def test_tables_that_hold_each_other_often_are_read_once():
    value = ["innermost"]
    for _ in range(200):
        value = [value] * 5
    content = dumps(value)
    check_cheap(content)
    assert sum(isinstance(item, Table) for item in walk(parse_torch7(content))) == 201


# ---------------------------------------------------------------------- a file of the original code


def test_a_model_of_the_original_code_is_read_without_copying_it(shared, tmp_path):
    path = tmp_path / "model.t7"
    with gzip.open(shared / "torch7" / "deepmask_model.t7.gz") as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file)
    tracemalloc.start()
    content = read_torch7(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 100_000_000
    assert peak < 10_000_000
    assert content["model"].class_name == "nn.DeepMask"
    assert content["config"]["iSz"] == 160
    padding, first, *_ = content["model"].fields["trunk"].fields["modules"][1].fields["modules"].sequence()
    assert (padding.class_name, first.class_name) == ("nn.SpatialSymmetricPadding", "cudnn.SpatialConvolution")
    assert first.fields["weight"].shape == (64, 3, 7, 7)
    assert np.isfinite(first.fields["weight"]).all()
