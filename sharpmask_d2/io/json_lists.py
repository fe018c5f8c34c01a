"""Reads the entries of a JSON list one by one, so that a file of several gigabytes does not have to fit into memory."""

import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, Union

from ..errors import UserError

# Bytes that are read at a time.
_CHUNK = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPACE = " \t\n\r"


class ListEntry(NamedTuple):
    """An entry of a JSON list and its place in the file."""

    value: Any
    # Position of its first byte.
    offset: int
    # Number of its bytes.
    length: int


def iterate_list(path: Union[str, os.PathLike]) -> Iterator[ListEntry]:
    """Read the entries of a file whose content is one JSON list.

    The entries should be objects or lists: a number could be cut where a block of the file ends.

    Args:
        path: path of the file, in UTF-8.

    Yields:
        The entries in their order.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: the file is not JSON, is nested too deeply, or contains no list; the message names it.
    """
    name = os.fspath(path)
    decoder = json.JSONDecoder()
    with open(path, "rb") as file:
        if file.read(len(_BYTE_ORDER_MARK)) != _BYTE_ORDER_MARK:
            file.seek(0)
        # Each byte becomes one character, so that positions in the text are positions in the file. UTF-8 uses no ASCII byte for others.
        base, text, at = file.tell(), file.read(_CHUNK).decode("latin-1"), 0
        size = _CHUNK

        def skip() -> str:
            """The next character that is not a space, which `at` then points to; "" at the end of the file."""
            nonlocal base, text, at
            while True:
                while at < len(text) and text[at] in _SPACE:
                    at += 1
                if at < len(text):
                    return text[at]
                base, at, text = base + len(text), 0, file.read(_CHUNK).decode("latin-1")
                if not text:
                    return ""

        if skip() != "[":
            raise UserError(_not_a_list(name))
        at += 1
        first = True
        while (character := skip()) != "]":
            if not first:
                if character != ",":
                    raise UserError(
                        f"{name} is not JSON: a comma or the end of the list is expected at byte {base + at}"
                    )
                at += 1
                skip()
            first = False
            while True:
                try:
                    value, end = decoder.raw_decode(text, at)
                    break
                except RecursionError:
                    raise UserError(f"{name} cannot be read: its JSON is nested too deeply") from None
                except ValueError as error:
                    # The entry is either cut at the end of the block or wrong. Blocks double, so that a wrong one is not parsed often.
                    more = file.read(size).decode("latin-1")
                    if not more:
                        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                        place = base + getattr(error, "pos", at)
                        raise UserError(f"{name} is not JSON: {reason}, at byte {place}") from None
                    base, text, at, size = base + at, text[at:] + more, 0, 2 * size
            size = _CHUNK
            if not text[at:end].isascii():
                value = _decode(text[at:end], name)
            yield ListEntry(value, base + at, end - at)
            at = end
        at += 1
        if skip():
            raise UserError(f"{name} is not JSON: extra data at byte {base + at}")


def _decode(text: str, name: str) -> Any:
    try:
        return json.loads(text.encode("latin-1"))
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}") from None


def _not_a_list(name: str) -> str:
    """The message for a file without a list: whether it is JSON at all."""
    try:
        with open(name, encoding="utf-8-sig") as file:
            json.load(file)
    except RecursionError:
        return f"{name} cannot be read: its JSON is nested too deeply"
    except ValueError as error:
        return f"{name} is not JSON: {error}"
    return f"{name} is not a COCO result file: a list of dicts is expected"
