"""Writes a report on result files: collects what the page shows, and reads one image at a time while the page is written."""

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
from pycocotools.coco import COCO

from ..console import print_next, print_status, progress
from ..data.coco import image_size, load_annotations
from ..data.failed_images import FailedImages
from ..data.images import read_image
from ..errors import UserError
from ..evaluation.ground_truth import encode_segmentations
from ..evaluation.proposal_evaluation import without_nan
from ..evaluation.recall import AREA_RANGES, PROPOSAL_COUNTS
from ..evaluation.result_file import ResultFile
from ..extras import REPORT, import_extra
from ..io.outputs import check_outputs, open_output
from .curves import axes_of_curves, curves
from .file_evaluation import MISS_COUNTS, OVERLAP_COUNT, FileEvaluation, evaluate_file
from .misses import Miss, category_name, find_misses, object_annotations
from .page import render
from .plots import SERIES_COLORS, draw_svg, plot_rows, write_plots
from .views import View, picture, sample_mask, view_around, whole_view

PathLike = Union[str, Path]

# Maximum number of worst images.
_NUM_WORST = 24
# Larger side of the pictures of missed objects in pixels.
_CROP = 200
# Size of an image that is unknown because the image cannot be read and the results have no masks.
_UNKNOWN = (3, 4)


class _Source(NamedTuple):
    """A result file, its name in the page, and its evaluation if there are annotated objects."""

    file: ResultFile
    name: str
    evaluation: Optional[FileEvaluation]


def write_report(
    proposals: Sequence[PathLike],
    output: PathLike,
    *,
    image_root: Optional[PathLike] = None,
    annotations: Optional[PathLike] = None,
    names: Optional[Sequence[str]] = None,
    plots: Optional[PathLike] = None,
    max_images: int = 1000,
    max_masks: int = 20,
    max_misses: int = 100,
    thumbnail_size: int = 384,
) -> int:
    """Write a report as one HTML file.

    The gallery shows the images with the masks of highest score. With annotated objects, the page also has the recall of each file, the
    objects that are missed, and the worst images. Memory holds one image, the place of each result in its file, and the ranks that recall
    needs. What the page leaves out because of a limit is said in the page; recall always counts all images.

    Args:
        proposals: paths of one to six COCO result files with segmentations.
        output: path of the HTML file to write.
        image_root: path of the folder of the images. None: masks are shown without pictures.
        annotations: path of a COCO annotation file, which lists the images. None: the results name the images (file_name), which need
            `image_root`.
        names: names of the files in the page, one per file and all different. Default: the names of the files without suffix.
        plots: folder in which the plots of recall are written as PNG and SVG. Default: None, no files.
        max_images: maximum number of images in the gallery, the first ones. Default: 1000.
        max_masks: maximum number of masks per image and file in the gallery, those of highest score. Default: 20.
        max_misses: maximum number of pictures of missed objects for each number of proposals. Default: 100.
        thumbnail_size: maximum side of the pictures in pixels. Default: 384.

    Returns:
        Exit status: 1 if an image could not be read, which the page shows without a picture, else 0.

    Raises:
        OSError: a file does not exist or cannot be read.
        UserError: a file has another format, or a library of the extra `report` is missing; the message names it.
    """
    import_extra("jinja2", requirement=REPORT)
    names = _names(proposals, names)
    if annotations is None and image_root is None:
        raise UserError("give --image-root, the folder of the images, or --annotations")
    if annotations is None and plots is not None:
        raise UserError("--plots needs --annotations, with which recall is measured")
    if image_root is not None and not Path(image_root).is_dir():
        raise UserError(f"--image-root: there is no folder {image_root}")
    coco = None if annotations is None else load_annotations(annotations)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(ResultFile(path, coco)) for path in proposals]
        for file in files:
            if not file.has_masks and any(map(file.count, file.image_ids())):
                raise UserError(f"{file.path}: its results have no segmentation, which a report shows")
        coco = coco or _merge_images(files)
        paths = _paths(coco, image_root)
        check_outputs(
            {"--output": output},
            inputs=[*proposals, annotations, *paths.values()],
            folders={"--plots": plots},
            images=paths.values() if plots is not None else [],
        )
        evaluated = any(not annotation.get("iscrowd") for image in coco.imgs for annotation in coco.imgToAnns[image])
        if plots is not None and not evaluated:
            raise UserError(f"--plots: {annotations} has no objects, with which recall is measured")
        if evaluated:
            import_extra("matplotlib", requirement=REPORT)
        sources = []
        for file, name in zip(files, names):
            evaluation = evaluate_file(coco, file, name) if evaluated else None
            if not evaluated:
                # The results are checked before anything is written.
                for _ in progress(file.images(), total=len(file.image_ids()), desc=f"reading {name}"):
                    pass
            sources.append(_Source(file, name, evaluation))
        failed = FailedImages()
        page = _Page(coco, sources, paths, failed, max_masks, thumbnail_size)
        with open_output(output) as stream:
            for text in page.text(max_images, max_misses):
                stream.write(text.encode())
        if plots is not None:
            rows = plot_rows([without_nan(curves(source.evaluation.recall)) for source in sources if source.evaluation])
            for path in write_plots(rows, names, Path(plots)):
                print_status(f"wrote {path}")
        print_status(f"wrote a report, {Path(output).stat().st_size / 1e6:.1f} MB: {output}")
        print_next(["python", "-m", "webbrowser", Path(output).resolve().as_uri()])
        return failed.status()


def _names(proposals: Sequence[PathLike], names: Optional[Sequence[str]]) -> list[str]:
    if len(proposals) > len(SERIES_COLORS):
        raise UserError(f"a report compares at most {len(SERIES_COLORS)} result files, and {len(proposals)} are given")
    if names and len(names) != len(proposals):
        raise UserError(f"--name is given {len(names)} times for {len(proposals)} result files: give one name per file")
    found = list(names or [Path(path).stem for path in proposals])
    for name in found:
        if found.count(name) > 1:
            raise UserError(f"two result files have the name {name!r}: give each of them a --name")
    return found


def _merge_images(files: Sequence[ResultFile]) -> COCO:
    """The images that the results of files without annotations name."""
    coco = COCO()
    coco.imgs = {}
    for file in files:
        for image_id, image in file.coco.imgs.items():
            name = image["file_name"]
            if not isinstance(name, str) or not name:
                raise UserError(
                    f"{file.path}: the results of image {image_id} have no file_name: give --annotations, which lists the images"
                )
            other = coco.imgs.setdefault(image_id, dict(image))["file_name"]
            if other != name:
                raise UserError(
                    f"image {image_id} is {other} in {files[0].path} but {name} in {file.path}: they belong to different images"
                )
    return coco


def _paths(coco: COCO, image_root: Optional[PathLike]) -> dict[Hashable, Path]:
    """Image id -> path of its file; empty without a folder of images."""
    if image_root is None:
        return {}
    for image_id, image in coco.imgs.items():
        if not isinstance(image.get("file_name"), str):
            raise UserError(
                f"image {image_id} has no file_name in the annotations, which its picture needs; or leave out --image-root"
            )
    return {image_id: Path(image_root) / image["file_name"] for image_id, image in coco.imgs.items()}


class _Page:
    """The parts of the page. The pictures are iterators, so that one of them is in memory at a time."""

    def __init__(
        self,
        coco: COCO,
        sources: Sequence[_Source],
        paths: dict[Hashable, Path],
        failed: FailedImages,
        max_masks: int,
        thumbnail_size: int,
    ) -> None:
        self.coco, self.sources, self.paths, self.failed = coco, sources, paths, failed
        self.max_masks, self.thumbnail_size = max_masks, thumbnail_size
        self._unreadable: set[Hashable] = set()

    def text(self, max_images: int, max_misses: int) -> Iterator[str]:
        """The page in pieces."""
        gallery = list(self.coco.imgs)[:max_images]
        worst: list[Hashable] = []
        misses: list[Miss] = []
        evaluations = [source.evaluation for source in self.sources if source.evaluation]
        context: dict[str, Any] = {"evaluation": None, "plots": []}
        figures: dict[str, Any] = {}
        if evaluations:
            worst = self._worst(evaluations)
            misses, rows = find_misses(self.coco, evaluations, max_misses)
            figures = self._figures(evaluations)
            context["plots"] = self._plots(figures)
            context["evaluation"] = {
                "num_objects": rows[0]["objects"]["all"],
                "areas": list(AREA_RANGES),
                "miss_rows": rows,
                "miss_note": _miss_note(misses, rows, max_misses),
                "worst_note": _worst_note(len(worst), len(evaluations[0].overlaps), len(evaluations)),
            }
        lists = {
            "gallery": self._gallery_list(gallery),
            "worst": [self._worst_entry(image_id) for image_id in worst],
            "misses": [self._miss_entry(miss) for miss in misses],
        }
        context.update(
            files=[self._file_entry(i, figures) for i in range(len(self.sources))],
            names=[source.name for source in self.sources],
            num_images=len(self.coco.imgs),
            columns=_COLUMNS,
            gallery_note=self._gallery_note(len(gallery)),
            failed=self.failed,
            report={
                "names": [source.name for source in self.sources],
                "missCounts": list(MISS_COUNTS),
                "figures": figures,
                **lists,
            },
            pictures=[
                ("worst", map(self._worst_picture, worst)),
                ("misses", map(self._miss_picture, misses)),
                ("gallery", map(self._gallery_picture, progress(gallery, desc="drawing"))),
            ],
        )
        return render(context)

    # Figures

    def _figures(self, evaluations: Sequence[FileEvaluation]) -> dict[str, Any]:
        files = [
            {"name": source.name, "metrics": evaluation.metrics, "curves": curves(evaluation.recall)}
            for source, evaluation in zip(self.sources, evaluations)
        ]
        return without_nan({"axes": axes_of_curves(), "files": files})

    def _plots(self, figures: dict[str, Any]) -> list[dict[str, Any]]:
        rows = plot_rows([file["curves"] for file in figures["files"]])
        return [{"title": row.title, "svgs": [draw_svg(row, area) for area in AREA_RANGES]} for row in rows]

    def _file_entry(self, index: int, figures: dict[str, Any]) -> dict[str, Any]:
        source = self.sources[index]
        counts = [source.file.count(image_id) for image_id in self.coco.imgs]
        entry = {"name": source.name, "num_results": sum(counts), "num_images": sum(count > 0 for count in counts)}
        if figures:
            entry["metrics"] = figures["files"][index]["metrics"]
            entry["highest"] = {
                kind: [key for key in _COLUMNS if _is_highest(figures["files"], index, kind, key)]
                for kind in entry["metrics"]
            }
        return entry

    # Lists

    def _name(self, image_id: Hashable) -> str:
        return str(self.coco.imgs[image_id].get("file_name") or f"image {image_id}")

    def _gallery_list(self, gallery: Sequence[Hashable]) -> dict[str, Any]:
        scores = [[source.file.scores(image_id)[:1].tolist() for image_id in gallery] for source in self.sources]
        shown = [source.file.scores(i)[: self.max_masks] for source in self.sources for i in gallery]
        values = np.concatenate([np.empty(0), *shown])
        overlaps = None
        if all(source.evaluation for source in self.sources):
            overlaps = [[self._overlap(source, image_id) for image_id in gallery] for source in self.sources]
        return {
            "names": [self._name(image_id) for image_id in gallery],
            "counts": [[source.file.count(image_id) for image_id in gallery] for source in self.sources],
            "best": [[_rounded(score[0]) if score else None for score in row] for row in scores],
            "overlaps": overlaps,
            "range": [_rounded(values.min()), _rounded(values.max())] if len(values) else [0, 0],
            "masks": max((len(one) for one in shown), default=0),
        }

    def _overlap(self, source: _Source, image_id: Hashable) -> Optional[float]:
        overlap = source.evaluation.overlaps.get(image_id) if source.evaluation else None
        return None if overlap is None else _rounded(overlap)

    def _worst(self, evaluations: Sequence[FileEvaluation]) -> list[Hashable]:
        """The images with the lowest overlap, in the mean over the files."""
        mean = {i: np.mean([evaluation.overlaps[i] for evaluation in evaluations]) for i in evaluations[0].overlaps}
        return sorted(mean, key=lambda image_id: mean[image_id])[:_NUM_WORST]

    def _worst_entry(self, image_id: Hashable) -> dict[str, Any]:
        return {
            "name": self._name(image_id),
            "objects": len(object_annotations(self.coco, image_id)),
            "overlaps": [self._overlap(source, image_id) for source in self.sources],
        }

    def _miss_entry(self, miss: Miss) -> dict[str, Any]:
        annotation = object_annotations(self.coco, miss.image_id)[miss.number]
        found = [source.evaluation.objects[miss.image_id] for source in self.sources if source.evaluation]
        _, _, width, height = annotation["bbox"]
        return {
            "category": category_name(self.coco, annotation) or "object",
            "image": self._name(miss.image_id),
            "size": f"{round(width)} x {round(height)} pixels",
            "sizes": [a for a, (low, high) in AREA_RANGES.items() if a != "all" and low <= miss.area <= high],
            "missedBy": miss.missed_by,
            "ious": [[_rounded(f.ious[i, miss.number]) for f in found] for i in range(len(MISS_COUNTS))],
            "ranks": [[int(f.best[i, miss.number]) for f in found] for i in range(len(MISS_COUNTS))],
        }

    # Pictures

    def _pixels(self, image_id: Hashable) -> Optional[np.ndarray]:
        """The image, or None if there is no folder of images or it cannot be read, which is reported once."""
        if image_id not in self.paths or image_id in self._unreadable:
            return None
        pixels = None
        with self.failed.named(image_id, self.paths[image_id], consequence="it is shown without a picture"):
            pixels = read_image(self.paths[image_id])
            size = self._size(image_id, None)
            if size is not None and size != pixels.shape[:2]:
                shape, pixels = pixels.shape[:2], None
                raise UserError(
                    f"it is of {shape[1]} x {shape[0]} pixels, its masks are of {size[1]} x {size[0]}: is --image-root right?"
                )
        if pixels is None:
            self._unreadable.add(image_id)
        return pixels

    def _size(self, image_id: Hashable, pixels: Optional[np.ndarray]) -> Optional[tuple[int, int]]:
        """(height, width) of an image from the annotations, from its first mask, or from its pixels."""
        size = image_size(self.coco, image_id)
        for source in self.sources if size is None else ():
            for result in source.file.read(image_id, [0] if source.file.count(image_id) else []):
                if isinstance(result["segmentation"], dict):
                    size = tuple(result["segmentation"]["size"])
        return size or (None if pixels is None else pixels.shape[:2])

    def _masks(self, source: _Source, image_id: Hashable, ranks: Sequence[int], size: tuple[int, int]) -> list[dict]:
        """Masks of a file by rank as RLE of a size."""
        coco = COCO()
        coco.imgs = {image_id: {"height": size[0], "width": size[1]}}
        rles = encode_segmentations(coco, image_id, source.file.read(image_id, ranks), "a result")
        for rle in rles:
            if tuple(rle["size"]) != size:
                raise UserError(
                    f"{source.file.path}: masks of image {image_id} have the sizes (height, width) {size} and {tuple(rle['size'])}"
                )
        return rles

    def _objects(self, image_id: Hashable) -> list[dict]:
        return encode_segmentations(self.coco, image_id, object_annotations(self.coco, image_id), "annotation")

    def _picture(self, pixels: Optional[np.ndarray], view: View, sets: list, objects: list[dict]) -> dict[str, Any]:
        sampled = [sample_mask(rle, view) for rle in objects]
        return {
            "p": None if pixels is None else picture(pixels, view),
            "w": view.size[1],
            "h": view.size[0],
            "sets": sets,
            "objects": [counts for counts in sampled if counts],
        }

    def _whole(self, image_id: Hashable) -> tuple[Optional[np.ndarray], tuple[int, int], View]:
        pixels = self._pixels(image_id)
        size = self._size(image_id, pixels) or _UNKNOWN
        return pixels, size, whole_view(size, self.thumbnail_size)

    def _gallery_picture(self, image_id: Hashable) -> dict[str, Any]:
        pixels, size, view = self._whole(image_id)
        sets = []
        for source in self.sources:
            scores = source.file.scores(image_id)[: self.max_masks].tolist()
            masks = self._masks(source, image_id, range(len(scores)), size)
            sets.append([[_rounded(score), sample_mask(mask, view)] for score, mask in zip(scores, masks)])
        evaluated = all(source.evaluation for source in self.sources)
        return self._picture(pixels, view, sets, self._objects(image_id) if evaluated else [])

    def _worst_picture(self, image_id: Hashable) -> dict[str, Any]:
        pixels, size, view = self._whole(image_id)
        sets = []
        for source in self.sources:
            found = source.evaluation.objects[image_id] if source.evaluation else None
            counts = self._best_masks(source, image_id, found.best[0].tolist(), size, view)
            sets.append([[_rounded(iou), mask] for iou, mask in zip(found.ious[0], counts)])
        return self._picture(pixels, view, sets, self._objects(image_id))

    def _miss_picture(self, miss: Miss) -> dict[str, Any]:
        pixels = self._pixels(miss.image_id)
        size = self._size(miss.image_id, pixels)
        annotation = object_annotations(self.coco, miss.image_id)[miss.number]
        view = view_around(annotation["bbox"], size, _CROP)
        sets = []
        for i in range(len(MISS_COUNTS)):
            row = []
            for source in self.sources:
                rank = int(source.evaluation.objects[miss.image_id].best[i, miss.number])
                row += self._best_masks(source, miss.image_id, [rank], size, view)
            sets.append(row)
        return self._picture(pixels, view, sets, [self._objects(miss.image_id)[miss.number]])

    def _best_masks(
        self, source: _Source, image_id: Hashable, ranks: Sequence[int], size: tuple[int, int], view: View
    ) -> list[Optional[str]]:
        """Sampled masks by rank; None for rank -1."""
        masks = iter(self._masks(source, image_id, [rank for rank in ranks if rank >= 0], size))
        return [sample_mask(next(masks), view) if rank >= 0 else None for rank in ranks]

    # Sentences

    def _gallery_note(self, num_shown: int) -> str:
        total = len(self.coco.imgs)
        note = "Point at a card, or focus it with the Tab key, to see its masks; open it to see them one by one."
        if num_shown < total:
            note += f" The gallery shows the first {num_shown:,} of {total:,} images (--max-images)."
        most = max(
            (source.file.count(i) for source in self.sources for i in list(self.coco.imgs)[:num_shown]), default=0
        )
        if most > self.max_masks:
            note += f" Of each image it has the {self.max_masks:,} masks of highest score; the others are left out (--max-masks)."
        return note


# Columns of the tables of AR.
_COLUMNS = [f"AR@{count}" for count in PROPOSAL_COUNTS] + ["AUC"]
_COLUMNS += [f"AR@{OVERLAP_COUNT}-{area}" for area in AREA_RANGES if area != "all"]


def _rounded(value: float) -> float:
    return round(float(value), 4)


def _is_highest(files: Sequence[dict[str, Any]], index: int, kind: str, key: str) -> bool:
    """Whether a file has the highest figure of several that differ in the digits that are shown."""
    values = [file["metrics"][kind][key] for file in files]
    known = [round(value, 1) for value in values if value is not None]
    return len(set(known)) > 1 and values[index] is not None and round(values[index], 1) == max(known)


def _miss_note(misses: Sequence[Miss], rows: Sequence[dict[str, Any]], limit: int) -> str:
    note = (
        "The dashed outline shows the object, and the coloured mask is the proposal with the highest IoU. Objects that are missed although "
        "this IoU is 0.5 or more are those whose best mask is matched to another object."
    )
    listed = len(misses)
    cut = any(
        max(row["missed"]["all"] for row in rows if row["count"] == count)
        > sum(bool(miss.missed_by[i]) for miss in misses)
        for i, count in enumerate(MISS_COUNTS)
    )
    if cut:
        note += (
            f" Pictures of {listed:,} missed objects follow: for each number of proposals the {limit:,} that most files miss, and of these "
            "the largest ones (--max-misses). The table counts all."
        )
    return note


def _worst_note(num_shown: int, total: int, num_files: int) -> str:
    mean = " (mean over the files)" if num_files > 1 else ""
    return (
        f"The overlap of an image is the mean over its objects of the highest IoU with one of the first {OVERLAP_COUNT} proposals. "
        f"Of {total:,} images with objects, the {num_shown} with the lowest overlap{mean} follow; the worst is first. "
        "Dashed outlines show the objects, and coloured masks the best proposal of each object."
    )
