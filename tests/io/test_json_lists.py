"""Lists of JSON are read entry by entry, with the place of each in the file."""

import json

import pytest
from sharpmask_d2.errors import UserError
from sharpmask_d2.io import json_lists
from sharpmask_d2.io.json_lists import iterate_list

ENTRIES = [{"name": "Straße 日本.jpg", "n": [1, 2.5, -3e-7]}, {}, {"text": 'a "quoted" ] } \\'}, [1, [2]], {"score": 1}]


@pytest.mark.parametrize("block", [1, 2, 7, 2**20])
@pytest.mark.parametrize("form", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_entries_and_places_equal_those_of_the_whole_file(tmp_path, monkeypatch, block, form):
    monkeypatch.setattr(json_lists, "_CHUNK", block)
    path = tmp_path / "list.json"
    path.write_bytes(b"\xef\xbb\xbf" + (" " + json.dumps(ENTRIES, **form) + "\n").encode())
    found = list(iterate_list(path))
    assert [entry.value for entry in found] == ENTRIES
    content = path.read_bytes()
    assert [json.loads(content[e.offset : e.offset + e.length]) for e in found] == ENTRIES


def test_an_empty_list_has_no_entries(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("\n[ ]")
    assert list(iterate_list(path)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"[{", "is not JSON: .* at byte 2"),
        (b'[{"a": 1}', "is not JSON: a comma or the end of the list is expected at byte 9"),
        (b'[{"a": 1} {"a": 2}]', "a comma or the end of the list is expected at byte 10"),
        (b'[{"a": 1},]', "is not JSON"),
        (b'[{"a": 1}] x', "extra data at byte 11"),
        (b'[{"a": "\xff"}]', "is not JSON"),
        (b'{"a": [', "is not JSON"),
        (b'{"a": 1}', "is not a COCO result file: a list of dicts is expected"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_list_is_named(tmp_path, content, message):
    path = tmp_path / "list.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"list.json.*{message}"):
        list(iterate_list(path))
