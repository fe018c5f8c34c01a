"""Lists of images of a bulk run: a table with the columns image_id, uri and file_name, one row per image."""

from collections.abc import Iterator, Sequence
from typing import Any, Optional

from ..data.images import ImageError, read_image
from ..errors import UserError
from ..inference.image_files import list_inputs
from .storage import open_folder, pa, pq, resolve

_COLUMNS = ("image_id", "uri")


def list_files(paths: Sequence[str]) -> Any:
    """Lists images that are given as local files and folders, with the ids and names that `sharpmask propose --input` gives them.

    Args:
        paths: files and folders, see `list_inputs`.

    Raises:
        FileNotFoundError: a path does not exist, or a folder has no images.
    """
    images = list_inputs(paths)
    return pa.table(
        {
            "image_id": pa.array([image.image_id for image in images], pa.int64()),
            "uri": [str(image.path.absolute()) for image in images],
            "file_name": [image.name for image in images],
        }
    )


def read_list(path: str) -> Any:
    """Reads a list of images from Parquet.

    Args:
        path: local path or URI of a Parquet file, or of a folder of them, with the columns image_id (whole numbers or text, each once) and
            uri (local path, or URI such as s3://bucket/image.jpg).

    Returns:
        The table, with an empty column file_name.

    Raises:
        UserError: there is no Parquet file, a column is missing, or an id is missing or there twice; the message names it.
    """
    filesystem, inside = resolve(path)
    files = (
        [inside] if filesystem.get_file_info(inside).is_file else open_folder(path).files(".parquet", recursive=True)
    )
    if not files:
        raise UserError(f"{path}: there is no Parquet file")
    parts = []
    for file in files:
        schema = pq.read_schema(file, filesystem=filesystem)
        if missing := [name for name in _COLUMNS if name not in schema.names]:
            raise UserError(f"{file}: there is no column {', '.join(missing)}; it has {', '.join(schema.names)}")
        parts.append(pq.read_table(file, columns=list(_COLUMNS), filesystem=filesystem, partitioning=None))
    table = pa.concat_tables(parts, promote_options="permissive")
    ids = table["image_id"]
    if not (pa.types.is_integer(ids.type) or pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
        raise UserError(f"{path}: image_id is of type {ids.type}: whole numbers or text are needed")
    if ids.null_count or table["uri"].null_count:
        raise UserError(f"{path}: an image_id or a uri is missing in {ids.null_count or table['uri'].null_count} rows")
    counts = ids.value_counts().flatten()
    if len(counts[0]) < len(ids):
        first = next(key for key, count in zip(*counts) if count.as_py() > 1)
        raise UserError(f"{path}: image_id {first} is there more than once")
    ids = ids.cast(pa.int64() if pa.types.is_integer(ids.type) else pa.string())
    return pa.table(
        {"image_id": ids, "uri": table["uri"].cast(pa.string()), "file_name": pa.nulls(len(ids), pa.string())}
    )


def check_extends(old: Any, new: Any, folder: str) -> None:
    """Checks that a list of images has every image of an earlier one, with the id that it had.

    Args:
        old, new: tables.
        folder: of the run, for the message.

    Raises:
        UserError: an image is missing or has another id.
    """
    uris = dict(rows(new))
    for image_id, uri in rows(old):
        if uris.get(image_id) != uri:
            raise UserError(
                f"{folder} has results of image {image_id}, {uri}, which is {uris.get(image_id, 'missing')} now: give the images of that "
                "run, or choose another output"
            )


def rows(table: Any) -> Iterator[tuple[Any, str]]:
    """Pairs of image_id and uri."""
    return zip(table["image_id"].to_pylist(), table["uri"].to_pylist())


def read_uri(uri: str) -> Any:
    """Reads an image by its local path or URI.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        ImageError: see `read_image`.
        OSError, UserError: the file cannot be reached.
    """
    if "://" not in uri:
        return read_image(uri)
    filesystem, path = resolve(uri)
    content: Optional[bytes] = None
    try:
        with filesystem.open_input_stream(path) as file:
            content = file.read()
    except FileNotFoundError:
        raise ImageError("there is no such file", uri) from None
    return read_image(uri, content=content)
