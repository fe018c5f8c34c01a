"""Results of a bulk run: Parquet files with one row per image, and their conversion into COCO result JSON.

Shape letters: N proposals of an image, H W height and width of an image in pixels.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Optional

from ..errors import UserError
from ..io.proposal_files import write_results
from .storage import Folder, open_folder, pa, pq

# In the folder of a run: the list of its images, the settings that its results depend on, and the folder of its results.
IMAGES, SETTINGS, RESULTS = "images.parquet", "settings.json", "proposals"
# Number of result files that the conversion keeps open.
_OPEN = 8


def result_schema(images: Any) -> Any:
    """The schema of the results of images.

    Args:
        images: table of images, whose id column decides the type of ids.

    Returns:
        The columns of the list, height and width in pixels, proposals (best first; score is a probability, bbox is x, y, width and height
        in pixels, counts is compressed COCO RLE of H x W), and error, which is null or one line.
    """
    proposal = [("score", pa.float64()), ("bbox", pa.list_(pa.float64())), ("counts", pa.string())]
    columns = [
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("proposals", pa.list_(pa.struct(proposal))),
        ("error", pa.string()),
    ]
    return pa.schema([*images.schema.remove_metadata(), *(pa.field(*column) for column in columns)])


def to_row(results: list[dict[str, Any]], size: tuple[int, int]) -> dict[str, Any]:
    """The columns of an image's row that its results decide.

    Args:
        results: N COCO results.
        size: (H, W).
    """
    proposals = [
        {"score": result["score"], "bbox": result["bbox"], "counts": result["segmentation"]["counts"]}
        for result in results
    ]
    return {"height": size[0], "width": size[1], "proposals": proposals, "error": None}


def finished_ids(folder: Folder) -> set:
    """Ids of the images that have a row. Files that a killed process did not complete are removed.

    Args:
        folder: of the run.
    """
    found: set = set()
    for path in folder.files(".parquet", below=RESULTS):
        try:
            table = pq.read_table(path, columns=["image_id"], filesystem=folder.filesystem)
        except (pa.ArrowInvalid, EOFError):
            # A Parquet file without its footer.
            folder.filesystem.delete_file(path)
            continue
        found.update(table["image_id"].to_pylist())
    return found


def read_errors(path: str) -> Iterator[tuple[Any, str, str]]:
    """The id, the URI and the error of each image of a run that could not be processed."""
    folder = open_folder(path)
    for file in folder.files(".parquet", below=RESULTS):
        table = pq.read_table(file, columns=["image_id", "uri", "error"], filesystem=folder.filesystem)
        for row in table.filter(table["error"].is_valid()).to_pylist():
            yield row["image_id"], row["uri"], row["error"]


def to_coco(path: str, output: str) -> int:
    """Writes the results of a finished run as COCO result JSON, equal to that of `sharpmask propose` for the same images.

    The images have the order of their list. Memory holds the results of a few files at a time.

    Args:
        path: local path or URI of the folder of the run.
        output: path of the JSON file to write.

    Returns:
        Number of proposals.

    Raises:
        UserError: the folder has no run, or images have no row; the message says how many.
        OutputError: the file cannot be written.
    """
    folder = open_folder(path)
    if not folder.filesystem.get_file_info(folder.file(IMAGES)).is_file:
        raise UserError(f"{path} has no results of `sharpmask bulk`: there is no {IMAGES}")
    images = pq.read_table(folder.file(IMAGES), filesystem=folder.filesystem)
    places = _places(folder)
    ids = images["image_id"].to_pylist()
    if missing := [image_id for image_id in ids if image_id not in places]:
        raise UserError(
            f"{path}: {len(missing)} of {len(ids)} images have no result, such as {missing[0]}: finish the run"
        )
    return write_results(output, _coco_results(folder, ids, places))


def _places(folder: Folder) -> dict[Any, tuple[str, int]]:
    """The file and the row of each image."""
    places = {}
    for path in folder.files(".parquet", below=RESULTS):
        ids = pq.read_table(path, columns=["image_id"], filesystem=folder.filesystem)["image_id"].to_pylist()
        places.update({image_id: (path, row) for row, image_id in enumerate(ids)})
    return places


def _coco_results(folder: Folder, ids: list, places: dict[Any, tuple[str, int]]) -> Iterator[list[bytes]]:
    """The results of each image as JSON."""
    tables: OrderedDict[str, Any] = OrderedDict()
    for image_id in ids:
        path, number = places[image_id]
        if path not in tables:
            tables[path] = pq.read_table(path, filesystem=folder.filesystem)
            if len(tables) > _OPEN:
                tables.popitem(last=False)
        tables.move_to_end(path)
        (row,) = tables[path].slice(number, 1).to_pylist()
        yield [json.dumps(result).encode() for result in _row_results(row)]


def _row_results(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    name: Optional[str] = row["file_name"]
    for proposal in row["proposals"] or []:
        yield {
            "image_id": row["image_id"],
            **({} if name is None else {"file_name": name}),
            "category_id": 1,
            "bbox": proposal["bbox"],
            "score": proposal["score"],
            "segmentation": {"size": [row["height"], row["width"]], "counts": proposal["counts"]},
        }
