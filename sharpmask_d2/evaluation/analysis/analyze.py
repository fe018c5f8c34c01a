"""Runs all analyses of proposals in one pass over the images."""

from collections.abc import Iterable
from typing import Optional

from .image_proposals import ImageProposals
from .masks_given_boxes import MasksGivenBoxes
from .masks_given_clicks import MasksGivenClicks
from .missed_objects import MissedObjects, WindowRule
from .ranking_oracle import RankingOracle
from .repetition import Repetition
from .straight_edges import StraightEdges
from .tables import Table


def analyze(
    images: Iterable[ImageProposals],
    *,
    rule: Optional[WindowRule] = None,
    given_boxes: bool = False,
    given_clicks: bool = False,
) -> list[Table]:
    """Run every analysis for which the images have the data.

    Args:
        images: all annotated images, including those without proposals, whose objects count as missed.
        rule: decides which windows are near an object. If it is given, the table of missed objects is made, and every image needs
            `windows`. Default: None, no such table.
        given_boxes: make the table of masks given boxes; every image then needs `masks_given_boxes`. Default: False.
        given_clicks: make the table of masks given one click; every image then needs `masks_given_clicks`. Default: False.

    Returns:
        The tables of straight edges, repetition and ranking, then those of missed objects and of masks given boxes and clicks if requested.
    """
    analyses = [StraightEdges(), Repetition(), RankingOracle()]
    if rule is not None:
        analyses.append(MissedObjects(rule))
    if given_boxes:
        analyses.append(MasksGivenBoxes())
    if given_clicks:
        analyses.append(MasksGivenClicks())
    for image in images:
        for analysis in analyses:
            analysis.add(image)
    return [table for analysis in analyses for table in analysis.tables()]
