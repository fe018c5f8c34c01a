"""Shards of a run: their files merge into that of an undivided run, and what is missing or there twice is named."""

import json
import pickle

import pytest
from sharpmask_d2.errors import UserError
from sharpmask_d2.io.proposal_files import ProposalWriter
from sharpmask_d2.io.shards import LIST, Shard, merge_shards, parse_shard, write_list

IMAGES = [(id, f"{id}.jpg") for id in (4, 9, 2, 7, 5)]
# Image 2 has no results.
NUM_RESULTS = {4: 2, 9: 1, 2: 0, 7: 3, 5: 1}


def _results(image_id: int) -> list:
    # In the second result of image 7, the id is not the first entry.
    results = [
        {"image_id": image_id, "bbox": [0, i, 2, 3], "score": 0.1 + 0.2 * i} for i in range(NUM_RESULTS[image_id])
    ]
    if image_id == 7:
        results[1] = dict(reversed(results[1].items()))
    return results


def _write(path, images, failed=()):
    with ProposalWriter(str(path), {}) as writer:
        for image_id, _ in images:
            if image_id not in failed:
                writer.add(image_id, _results(image_id))
        writer.finish()
    return writer.counts


def _write_shards(folder, count, *, settings=None, failed=(), images=IMAGES):
    paths = []
    for number in range(1, count + 1):
        shard, path = Shard(number, count), folder / f"{number}-{count}.json"
        counts = _write(path, shard.select(images), failed)
        write_list(path, shard, images, counts, settings or {"a": 1})
        paths.append(path)
    return paths


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_merged_shards_equal_the_file_of_an_undivided_run(tmp_path, count):
    _write(tmp_path / "whole.json", IMAGES)
    paths = _write_shards(tmp_path, count)[::-1]
    assert merge_shards(paths, tmp_path / "merged.json", pickle_path=str(tmp_path / "merged.pkl")) == (5, 7, [])
    assert (tmp_path / "merged.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    content = pickle.loads((tmp_path / "merged.pkl").read_bytes())
    assert content["ids"] == [4, 9, 2, 7, 5]
    assert [len(boxes) for boxes in content["boxes"]] == [2, 1, 0, 3, 1]


def test_an_image_that_failed_is_named_and_left_out(tmp_path):
    paths = _write_shards(tmp_path, 2, failed=[9])
    assert merge_shards(paths, tmp_path / "m.json") == (4, 6, ["image 9, 9.jpg, of shard 2/2"])
    assert [r["image_id"] for r in json.loads((tmp_path / "m.json").read_text())] == [4, 4, 7, 7, 7, 5]


def test_shards_that_are_missing_twice_or_of_other_runs_are_named(tmp_path):
    first, second, third = _write_shards(tmp_path, 3)
    (tmp_path / "other").mkdir()
    changed = _write_shards(tmp_path / "other", 3, settings={"a": 2})[1]
    output = tmp_path / "m.json"
    with pytest.raises(UserError, match="3 of 5 images are missing: no file is of shard 2/3, 3/3"):
        merge_shards([first], output)
    with pytest.raises(UserError, match=r"are both shard 1/3: .* twice, for example image 4, 4\.jpg"):
        merge_shards([first, second, first], output)
    with pytest.raises(UserError, match=r"1-3\.json and .*2-3\.json have different settings: a was 1 and is 2"):
        merge_shards([first, changed, third], output)
    changed = _write_shards(tmp_path / "other", 3, images=[*IMAGES[:4], (5, "renamed.jpg")])[1]
    with pytest.raises(UserError, match="belong to runs over different images"):
        merge_shards([first, changed, third], output)
    third.with_name(third.name + LIST).unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*3-3\.json\.shard"):
        merge_shards([first, second, third], output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"image_id": 7', b'"image_id": 8', "results of image 7, 7.jpg are missing"),
        (b"\n]\n", b',\n{"image_id": 1}\n]\n', "more results"),
        (b"[\n", b"[", "does not begin"),
    ],
)
def test_a_shard_that_was_changed_is_refused(tmp_path, old, new, message):
    paths = _write_shards(tmp_path, 2)
    paths[1].write_bytes(paths[1].read_bytes().replace(old, new, 1))
    with pytest.raises(UserError, match=rf"2-2\.json was changed .*{message}.*run shard 2/2 again"):
        merge_shards(paths, tmp_path / "m.json")
    assert not (tmp_path / "m.json").exists()


def test_the_number_of_a_shard_is_checked():
    assert parse_shard("2/3") == (2, 3)
    for text in ("0/3", "4/3", "3", "a/b", "1/2/3"):
        with pytest.raises(ValueError, match=r".+"):
            parse_shard(text)
