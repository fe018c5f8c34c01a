"""Reports images that cannot be processed: each is named with the cause and left out, and the run continues with the others."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Union

from tqdm import tqdm

from .images import ImageError


class FailedImages:
    """Reports and counts the images that cannot be processed.

    failed = FailedImages()
    for image in images:
        with failed.named(image.image_id, image.path):
            ...
    return failed.status()
    """

    def __init__(self):
        self._paths: set[str] = set()

    @contextlib.contextmanager
    def named(
        self, image_id: Union[int, str], path: Union[str, Path], *, consequence: str = "it is left out"
    ) -> Iterator[None]:
        """Context manager in which any exception is reported as a failure of this image.

        MemoryError and KeyboardInterrupt are not caught.

        Args:
            image_id: of the image.
            path: of the image's file.
            consequence: what the report says about the results of the image.
        """
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            self._paths.add(str(path))
            tqdm.write(f"cannot process image {image_id}, {path}: {describe(error)}; {consequence}", file=sys.stderr)
            logging.getLogger(__name__).debug("image %s", image_id, exc_info=error)

    def __len__(self) -> int:
        return len(self._paths)

    def status(self) -> int:
        """Print how many images could not be processed. Returns the exit status: 1 if there are any, else 0."""
        if self._paths:
            print(f"{len(self)} image{'s'[: len(self) > 1]} could not be processed, see above", file=sys.stderr)
        return int(bool(self._paths))


def describe(error: Exception) -> str:
    """The cause of a failure in one line, without the name of the image's file, which the report has already."""
    if isinstance(error, ImageError):
        return error.reason
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    line = next(iter(text.strip().splitlines()), "")
    # Errors that are not about the file itself are shown with their type.
    return line if isinstance(error, (OSError, ValueError)) and line else f"{type(error).__name__}: {line}"
