"""Why proposals miss objects, and what their masks are like: what tools/analyze_proposals.py does."""

from collections.abc import Iterable, Sequence

from .proposed_image import ProposedImage
from .ranking_oracle import RankingOracle
from .repetition import Repetition
from .straight_edges import StraightEdges


def analyze(images: Iterable[ProposedImage]) -> list:
    """All analyses of proposals, in one pass over the images.

    Args:
        images: all that are annotated, so that objects of images without proposals count.

    Returns:
        list[Table].
    """
    return collect(images, [StraightEdges(), Repetition(), RankingOracle()])


def collect(images: Iterable[ProposedImage], analyses: Sequence) -> list:
    """The tables of analyses, each with `add(image)` and `tables()`."""
    for image in images:
        for analysis in analyses:
            analysis.add(image)
    return [table for analysis in analyses for table in analysis.tables()]
