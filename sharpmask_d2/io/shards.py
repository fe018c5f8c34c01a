"""Divides a run over many images into shards, and merges their result files into the file of an undivided run.

The shard i of n has every n-th image of the run from the i-th on. Beside its result file lies a list of its images, `<file>.shard`, since
an image without results leaves no trace in the result file.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Optional, TypeVar, Union

from ..errors import UserError
from .fingerprint import changed_settings
from .outputs import write_output
from .proposal_files import Key, write_pickle, write_results

Item = TypeVar("Item")
PathLike = Union[str, os.PathLike]

# Suffix of the list of a shard's images.
LIST = ".shard"
# Maximum number of changed settings that a message names.
_NAMED = 4


class Shard(NamedTuple):
    """A part of a run: its number from 1, and the number of all parts."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def select(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of this part: every `count`-th."""
        return items[self.number - 1 :: self.count]


def parse_shard(text: str) -> Shard:
    """Reads a shard in the form "i/n".

    Raises:
        ValueError: the text has another form, or i is not in 1..n.
    """
    number, count = map(int, text.split("/"))
    if not 1 <= number <= count:
        raise ValueError(f"{text}: the number of a shard is in 1..{count}")
    return Shard(number, count)


class _ShardFile(NamedTuple):
    """What the list of a shard's images says."""

    path: Path  # of the result file
    shard: Shard
    total: int  # number of images of the whole run
    run: str  # digest of the ids and names of all images of the run
    settings: dict[str, Any]
    images: list[dict[str, Any]]  # image_id, name and number of results, None for an image that failed


def digest_images(images: Sequence[tuple[Key, str]]) -> str:
    """A digest of the (id, name) of the images of a run, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        digest.update(json.dumps(image).encode() + b"\n")
    return digest.hexdigest()


def write_list(
    output: PathLike,
    shard: Shard,
    images: Sequence[tuple[Key, str]],
    counts: dict[Key, int],
    settings: dict[str, Any],
) -> None:
    """Write the list of a shard's images, after its result file.

    Args:
        output: path of the result file.
        shard: the part of the run.
        images: (id, name) of all images of the run.
        counts: image id -> number of its results in the file, in the order of the file; an image that failed is not there.
        settings: nested dicts of everything but the images that the results depend on.

    Raises:
        OutputError: the file cannot be written.
    """
    entries = [{"image_id": id, "name": name, "results": counts.get(id)} for id, name in shard.select(images)]
    content = {
        "shard": list(shard),
        "total": len(images),
        "run": digest_images(images),
        "settings": settings,
        "images": entries,
    }
    write_output(f"{os.fspath(output)}{LIST}", json.dumps(content).encode())


def merge_shards(
    paths: Sequence[PathLike], output: PathLike, *, pickle_path: Optional[str] = None, pickle_masks: bool = False
) -> tuple[int, int, list[str]]:
    """Merge the result files of all shards of a run. Memory holds the results of one image.

    Args:
        paths: of the result files, in any order; beside each lies the list of its images.
        output: path of the file to write. It equals the file of a run that was not divided.
        pickle_path, pickle_masks: see `ProposalWriter.finish`.

    Returns:
        Number of images, number of results, and the images that failed: "image 5, name, of shard 1/2".

    Raises:
        FileNotFoundError: a file does not exist.
        UserError: a shard is missing or given twice, the files belong to different runs, or a file was changed after it was written. The
            message names the file and an image.
        OutputError: a file cannot be written.
    """
    shards = [_read_list(Path(path)) for path in paths]
    _check(shards)
    shards.sort(key=lambda shard: shard.shard.number)
    failed = [
        f"image {image['image_id']}, {image['name']}, of shard {shard.shard}"
        for shard in shards
        for image in shard.images
        if image["results"] is None
    ]
    num_images = sum(image["results"] is not None for shard in shards for image in shard.images)
    count = write_results(output, (texts for _, texts in _merged(shards)))
    if pickle_path:
        entries = ({"image_id": key, "results": [json.loads(text) for text in texts]} for key, texts in _merged(shards))
        write_pickle(entries, pickle_path, masks=pickle_masks)
    return num_images, count, failed


def _read_list(path: Path) -> _ShardFile:
    place = path.with_name(path.name + LIST)
    for needed in (path, place):
        if not needed.exists():
            raise FileNotFoundError(
                f"there is no {needed}: --shard writes a result file and, beside it, the list of its images"
            )
    try:
        content = json.loads(place.read_bytes())
        return _ShardFile(
            path,
            Shard(*content["shard"]),
            content["total"],
            content["run"],
            content["settings"],
            content["images"],
        )
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{place} is not the list of a shard's images: run the shard again") from None


def _check(shards: Sequence[_ShardFile]) -> None:
    """Refuse shards that are not all parts of one run, each once."""
    first = shards[0]
    known: dict[int, _ShardFile] = {}
    for shard in shards:
        if (shard.shard.count, shard.total, shard.run) != (first.shard.count, first.total, first.run):
            raise UserError(
                f"{first.path} and {shard.path} belong to runs over different images: one is shard {first.shard} of {first.total} "
                f"images, the other shard {shard.shard} of {shard.total}"
            )
        changes = changed_settings(first.settings, shard.settings)
        if changes:
            more = f", and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
            raise UserError(
                f"{first.path} and {shard.path} have different settings: {'; '.join(changes[:_NAMED])}{more}"
            )
        other = known.setdefault(shard.shard.number, shard)
        if other is not shard:
            example = f", for example image {_named(shard.images[0])}" if shard.images else ""
            raise UserError(
                f"{other.path} and {shard.path} are both shard {shard.shard}: their images are there twice{example}"
            )
    missing = [number for number in range(1, first.shard.count + 1) if number not in known]
    if missing:
        num_images = sum(len(range(number - 1, first.total, first.shard.count)) for number in missing)
        names = ", ".join(f"{number}/{first.shard.count}" for number in missing)
        raise UserError(f"{num_images} of {first.total} images are missing: no file is of shard {names}")


def _named(image: dict[str, Any]) -> str:
    return f"{image['image_id']}, {image['name']}"


def _merged(shards: Sequence[_ShardFile]) -> Iterator[tuple[Key, list[bytes]]]:
    """The id and the results, as JSON, of each image that did not fail, in the order of the undivided run."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(shard.path, "rb")) for shard in shards]
        for shard, file in zip(shards, files):
            if file.readline() != b"[\n":
                raise _changed(shard, "it does not begin as it was written")
        for position in range(shards[0].total):
            shard, file = shards[position % len(shards)], files[position % len(shards)]
            image = shard.images[position // len(shards)]
            if image["results"] is not None:
                yield image["image_id"], [_read_result(shard, file, image) for _ in range(image["results"])]
        for shard, file in zip(shards, files):
            # A file without results has an empty line.
            if file.read().strip() != b"]":
                raise _changed(shard, "it has more results than its images")


def _read_result(shard: _ShardFile, file: BinaryIO, image: dict[str, Any]) -> bytes:
    text = file.readline().rstrip(b",\n")
    # The id is the first entry of most results, which are then not decoded.
    if not text.startswith(b'{"image_id": %b,' % json.dumps(image["image_id"]).encode()):
        try:
            right = json.loads(text)["image_id"] == image["image_id"]
        except (ValueError, KeyError, TypeError):
            right = False
        if not right:
            raise _changed(shard, f"results of image {_named(image)} are missing")
    return text


def _changed(shard: _ShardFile, reason: str) -> UserError:
    return UserError(f"{shard.path} was changed after it was written: {reason}; run shard {shard.shard} again")
