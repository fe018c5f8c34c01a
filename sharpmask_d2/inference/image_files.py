"""Image files as inputs: listing them, and working on them one by one, so that a stopped run can be resumed."""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
from PIL import Image

from ..console import print_next, print_status, print_summary, progress
from ..data.coco import load_images
from ..data.failed_images import FailedImages
from ..data.images import read_image
from ..errors import UserError
from ..io.fingerprint import digest_file
from ..io.outputs import OutputError
from ..io.proposal_files import ProposalWriter
from ..io.shards import LIST, Shard, write_list
from .ranks import merge_ranks, shard_of_rank, shard_path
from .threads import WriterThread, read_ahead

# Suffixes of the files in folders that count as images. Pillow reads AVIF from version 11.3 on.
_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif", ".avif"}


class InputImage(NamedTuple):
    """An image to work on: id in the results, file, path within the folder it was found in, and more entries for each of its results."""

    image_id: Union[int, str]
    path: Path
    name: str
    extra: dict[str, Any]


# Makes the results of an image from its pixels, (H, W, 3) uint8 BGR.
Work = Callable[[InputImage, np.ndarray], list[dict[str, Any]]]


def find_images(
    input: Optional[Sequence[Union[str, Path]]], annotations: Optional[str], image_root: Optional[str]
) -> list[InputImage]:
    """Lists the images of `list_inputs`, or those of `list_annotated` if `input` is empty or None.

    Raises:
        TypeError: neither `input` nor both `annotations` and `image_root` are given.
        OSError, UserError: see `list_inputs` and `list_annotated`.
    """
    if input:
        return list_inputs(input)
    if annotations and image_root:
        return list_annotated(annotations, image_root)
    raise TypeError("give input, or annotations and image_root")


def list_inputs(paths: Sequence[Union[str, Path]]) -> list[InputImage]:
    """Lists images that are given as files and folders, and numbers them from 1 in the order of their names.

    Folders are searched with their sub-folders. Hidden files and folders are skipped. How many files are skipped because of their suffix
    is printed as a status line.

    Args:
        paths: files and folders.

    Raises:
        FileNotFoundError: a path does not exist, or a folder has no images.
    """
    files: dict[Path, Path] = {}
    others: Counter[str] = Counter()
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(_walk(path))
            suffixes = _SUFFIXES & Image.registered_extensions().keys()
            found = [p for p in inside if p.suffix.lower() in suffixes]
            if not found:
                raise FileNotFoundError(f"--input: the folder {path} has no images")
            others.update(p.suffix.lower() or "no suffix" for p in inside if p.suffix.lower() not in suffixes)
            for image in found:
                files.setdefault(image, path)
        elif path.exists():
            files.setdefault(path, path.parent)
        else:
            raise FileNotFoundError(f"--input: there is no {path}")
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        print_status(f"skipped in the folders because of their suffix: {kinds}")
    images = []
    for i, (path, folder) in enumerate(files.items(), start=1):
        name = path.relative_to(folder).as_posix()
        images.append(InputImage(i, path, name, {"file_name": name}))
    return images


def _walk(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yields the files of a folder and of its sub-folders except hidden ones. A link to a folder that is being searched is not followed."""
    folders = above | {os.path.realpath(folder)}
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif os.path.realpath(path) not in folders:
            yield from _walk(path, folders)


def list_annotated(annotations: str, image_root: str) -> list[InputImage]:
    """Lists the images of a COCO annotation file, with their ids.

    Args:
        annotations: COCO JSON.
        image_root: folder that its file names refer to.

    Raises:
        FileNotFoundError: the file or the folder does not exist.
        AnnotationError: see `data.coco.load_images`.
    """
    for path in (annotations, image_root):
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no {path}")
    images = load_images(annotations)
    return [InputImage(image.id, Path(image_root) / image.file_name, image.file_name, {}) for image in images]


def process_images(
    images: Sequence[InputImage],
    writer: ProposalWriter,
    work: Work,
    *,
    desc: str,
    draw: Optional[Callable[[np.ndarray, list[dict[str, Any]]], np.ndarray]] = None,
    pictures: Optional[Union[str, Path]] = None,
    more_input: Callable[[InputImage], str] = lambda image: "",
    shard: Optional[Shard] = None,
) -> tuple[list[tuple[str, dict[str, Any]]], FailedImages]:
    """Works on the images that `writer` does not have yet, and gives it the results. An image that fails is named and left out.

    Images are read, and results and pictures are written, in threads beside the work.

    A resumed run recognises an image by the content of its file, not by its path or time: images that were added, replaced or removed
    affect no other image, and one that was renamed or copied is not processed again. Reading the files takes about a hundredth of the
    time of the work.

    Args:
        images: from `list_inputs` or `list_annotated`.
        writer: receives the results of each image.
        work: makes the results of an image from its pixels, (H, W, 3) uint8 BGR.
        desc: label of the progress bar.
        draw: makes the picture of an image from its pixels and its results; needed with `pictures`.
        pictures: folder for the pictures; None writes none. A picture that an earlier run did not write is drawn from its results.
        more_input: a text for what the results of an image depend on besides its file, such as boxes; default: nothing.
        shard: the part of the images to work on. Pictures have the names that they have in a run over all images. Default: None, all.

    Returns:
        The finished images in their order, as `ProposalWriter.finish` takes them, and the images that failed.
    """
    failed = FailedImages()
    names: Sequence[Optional[str]] = [None] * len(images)
    if pictures and draw:
        # Only pictures need OpenCV.
        from ..visualization import name_pictures, write_picture

        names = name_pictures(images)
    if shard is not None:
        images, names = shard.select(images), shard.select(names)
    keys = _known_keys(images, writer, more_input)
    if keys:
        print_status(f"{len(keys)} of {len(images)} images are done already, in {writer.partial}")
    finished = []

    def read(i: int) -> Optional[np.ndarray]:
        """The pixels of an image that is not done yet; None for the others and for one that fails, which has no key afterwards."""
        image = images[i]
        if i not in keys:
            with failed.named(image.image_id, image.path):
                key = digest_file(image.path) + more_input(image)
                pixels = read_image(image.path)
                keys[i] = key
                return pixels
        return None

    def write(i: int, pixels: Optional[np.ndarray], results: Optional[list[dict[str, Any]]]) -> None:
        image, key, name = images[i], keys[i], names[i]
        if results is not None:
            try:
                writer.add(key, results)
            except OutputError as error:
                raise OutputError(f"image {image.image_id}, {image.path}: {error}") from error
        finished.append((key, {"image_id": image.image_id, **image.extra}))
        if not (pictures and draw and name):
            return
        if writer.has_picture(key, name) and (Path(pictures) / name).exists():
            return
        drawn = False
        with failed.named(image.image_id, image.path, consequence=f"it has no picture {name}"):
            pixels = read_image(image.path) if pixels is None else pixels
            write_picture(Path(pictures) / name, draw(pixels, writer.results(key)))
            drawn = True
        if drawn:
            writer.add_picture(key, name)

    numbers = range(len(images))
    with WriterThread() as thread:
        for i, pixels in zip(progress(numbers, desc=desc), read_ahead(numbers, read)):
            results = None
            if pixels is not None:
                with failed.named(images[i].image_id, images[i].path):
                    results = work(images[i], pixels)
                if results is None:
                    continue
            if i in keys:
                thread.call(write, i, pixels, results)
    return finished, failed


def run_images(
    images: Sequence[InputImage],
    output: Union[str, Path],
    settings: dict[str, Any],
    prepare: Callable[[], Work],
    *,
    desc: str,
    describe: Callable[[int, int], str],
    next_command: Sequence[str],
    draw: Optional[Callable[[np.ndarray, list[dict[str, Any]]], np.ndarray]] = None,
    pictures: Optional[Union[str, Path]] = None,
    more_input: Callable[[InputImage], str] = lambda image: "",
    shard: Optional[Shard] = None,
    dataset: Optional[dict[str, Any]] = None,
    **pickle: Any,
) -> int:
    """Works on images, writes a COCO file of their results, and prints what was written and the next command to try.

    In processes that torchrun has started, each works on a part of the images, and the one that ends last writes the file.

    Args:
        images: see `process_images`.
        output: path of the file to write.
        settings: see `ProposalWriter`.
        prepare: loads the model and returns the `work` of `process_images`. It is called after the settings of a run that is resumed were
            checked.
        desc, draw, pictures, more_input: see `process_images`.
        describe: makes the status line at the end from the number of results and the number of images.
        next_command: words of the command.
        shard: the part of the images to work on; beside the file, the list of its images is written. Default: None, all images.
        dataset: see `ProposalWriter.finish`; not for a part of the images.
        pickle: pickle_path and pickle_masks, see `ProposalWriter.finish`; not for a `shard`.

    Returns:
        Exit status: 1 if an image failed, else 0. Of several processes, only the one that writes the file returns 1, since torchrun stops
        all others when one fails.

    Raises:
        OutputError: see `ProposalWriter`.
        UserError: `shard` or `dataset` is given in processes that torchrun has started.
    """
    rank = shard_of_rank()
    if rank is not None and (shard is not None or dataset is not None):
        raise UserError(f"torchrun cannot divide {'a shard' if shard else 'a COCO dataset'}: start one process")
    part = rank or shard
    path = shard_path(output, rank) if rank else Path(output)
    if part is not None:
        path.with_name(path.name + LIST).unlink(missing_ok=True)
        desc = f"{desc}, shard {part}"
    with ProposalWriter(str(path), settings) as writer:
        finished, failed = process_images(
            images, writer, prepare(), desc=desc, draw=draw, pictures=pictures, more_input=more_input, shard=part
        )
        # The partial file lets a run after the images were repaired process only those, and a rank start again while others work.
        keep = len(failed) > 0 or rank is not None
        count = writer.finish(images=finished, keep_partial=keep, dataset=dataset, **({} if part else pickle))
    if part is not None:
        write_list(path, part, [(image.image_id, image.name) for image in images], writer.counts, settings)
    num_images, num_failed, status = len(finished), len(failed), failed.status()
    if rank is not None:
        merged = merge_ranks(output, rank.count, **pickle)
        if merged is None:
            print_status(f"shard {rank} is done; the process that ends last writes {output}")
            return 0
        num_images, count, num_failed = merged.num_images, merged.num_results, len(merged.failed)
        status = report_failed(merged.failed)
    if pictures:
        print_status(f"wrote pictures of them: {pictures}")
    print_status(describe(count, num_images))
    print_next(next_command)
    print_summary({"images": num_images, "failed": num_failed, "results": count, "output": str(output)})
    return status


def report_failed(failed: Sequence[str]) -> int:
    """Prints the images that merged files lack because they failed. Returns the exit status: 1 if there are any, else 0."""
    for image in failed:
        print(f"{image}, could not be processed; it is left out", file=sys.stderr)
    return int(bool(failed))


def report_command(
    output: str, images: Sequence[InputImage], annotations: Optional[str] = None, image_root: Optional[str] = None
) -> list[str]:
    """Makes the command that shows results: `sharpmask report`, or `export_command` if the images have no common folder.

    Args:
        output: path of the COCO result file.
        images: from `find_images`.
        annotations: path of the COCO file that lists the images; None: the results name them.
        image_root: path of the folder that the names in `annotations` refer to.

    Returns:
        The words of the command.
    """
    command = ["sharpmask", "report", output]
    if annotations and image_root:
        command += ["--annotations", annotations]
    else:
        roots = {str(image.path.parents[len(Path(image.name).parts) - 1]) for image in images}
        if len(roots) > 1:
            return export_command(output)
        image_root = roots.pop()
    return [*command, "--image-root", image_root, "--output", str(Path(output).with_suffix(".html"))]


def export_command(output: str) -> list[str]:
    """Makes the `sharpmask export` that writes a COCO file of masks for CVAT. Returns its words."""
    return ["sharpmask", "export", output, "--to", "cvat", "--output", str(Path(output).with_suffix(".xml"))]


def _known_keys(
    images: Sequence[InputImage], writer: ProposalWriter, more_input: Callable[[InputImage], str]
) -> dict[int, str]:
    """Index of an image -> its key, for the images that the writer has."""
    keys = {}
    # If there is no run to resume, files are read only when they are processed.
    for i, image in enumerate(images if writer.done else []):
        # A file that cannot be read is reported when it is processed.
        with contextlib.suppress(OSError):
            key = digest_file(image.path) + more_input(image)
            if key in writer.done:
                keys[i] = key
    return keys
