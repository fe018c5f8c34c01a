"""Why proposals miss objects, and what their masks are like: what tools/analyze_proposals.py prints."""

from collections.abc import Iterable
from typing import Optional

from .given_boxes import GivenBoxes
from .missed_objects import MissedObjects, WindowRule
from .proposed_image import ProposedImage
from .ranking_oracle import RankingOracle
from .repetition import Repetition
from .straight_edges import StraightEdges


def analyze(images: Iterable[ProposedImage], *, rule: Optional[WindowRule] = None, given_boxes: bool = False) -> list:
    """All analyses of proposals, in one pass over the images.

    Args:
        images: all that are annotated, so that objects of images without proposals count.
        rule: which windows are near to an object, to find out why objects are missed; the proposals then need their windows.
        given_boxes: the images have masks of given boxes, which are rated.

    Returns:
        list[Table].
    """
    analyses = [StraightEdges(), Repetition(), RankingOracle()]
    if rule is not None:
        analyses.append(MissedObjects(rule))
    if given_boxes:
        analyses.append(GivenBoxes())
    for image in images:
        for analysis in analyses:
            analysis.add(image)
    return [table for analysis in analyses for table in analysis.tables()]
