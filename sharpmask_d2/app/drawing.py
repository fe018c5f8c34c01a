"""What the browser draws: outlines of masks, their colours, and the legend."""

from collections.abc import Sequence
from typing import Any, Optional

import cv2

from ..visualization.overlay import PALETTE
from .sessions import BOX, CHOICES, EVERYTHING, POINT, Mask, Prompt, Session

# Where the colours repeat, the outline is dashed, then dotted, and every mask has a number.
COLOURS = ["#{:02X}{:02X}{:02X}".format(*color) for color in PALETTE.astype(int).tolist()]
STYLES = ("solid", "dashed", "dotted")
# Longer side of the image, in pixels, up to which outlines are exact to half a pixel.
_EXACT = 1000


def outline(mask: Mask) -> str:
    """The outlines of a mask, holes included, as the path of an SVG picture in pixels of the image."""
    x, y = mask.box[:2]
    tolerance = 0.5 * max(1.0, max(mask.rle["size"]) / _EXACT)
    # OpenCV's outlines run through the centres of pixels; in an image twice as large, they run near the edges of the pixels.
    doubled = cv2.resize(mask.crop(), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    parts = []
    for contour in cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[0]:
        points = cv2.approxPolyDP(contour, 2 * tolerance, True)[:, 0] / 2 + 0.25
        if len(points) > 2:
            parts.append("M" + "L".join(f"{x + px:.1f} {y + py:.1f}" for px, py in points) + "Z")
    return "".join(parts)


def view(session: Session, masks: Sequence[Mask]) -> dict[str, Any]:
    """What the viewer of the page shows.

    Args:
        session: whose photograph is shown.
        masks: `Session.shown`.

    Returns:
        What viewer.js draws, fit for JSON.
    """
    if session.photograph is None:
        return {"picture": ""}
    height, width = session.photograph.pixels.shape[:2]
    prompt = session.prompt if session.mode != EVERYTHING else None
    return {
        "picture": f"photograph/{session.picture_id}.jpg",
        "name": session.photograph.name,
        "width": width,
        "height": height,
        "mode": session.mode,
        "masks": [_drawn(mask, number) for number, mask in enumerate(masks, start=1)],
        "chosen": len(masks) if prompt else None,
        "prompt": None if prompt is None else {"kind": prompt.kind, "values": list(prompt.values)},
        "message": _message(session, len(masks), prompt),
    }


def choices(prompt: Optional[Prompt]) -> list[tuple[str, int]]:
    """The masks of a prompt to choose from: label and number."""
    if prompt is None:
        return []
    names = ("box",) if prompt.kind == BOX else CHOICES
    return [(f"{name} (score {mask.score:.2f})", i) for i, (name, mask) in enumerate(zip(names, prompt.masks))]


def _drawn(mask: Mask, number: int) -> dict[str, Any]:
    x, y = mask.centre
    return {
        "number": number,
        "outline": outline(mask),
        "colour": COLOURS[(number - 1) % len(COLOURS)],
        "style": STYLES[(number - 1) // len(COLOURS) % len(STYLES)],
        "score": round(mask.score, 2),
        "area": mask.area,
        "x": round(x, 1),
        "y": round(y, 1),
    }


def _message(session: Session, count: int, prompt: Optional[Prompt]) -> str:
    if session.mode == EVERYTHING:
        return (
            f"{count} of {len(session.everything())} masks are shown."
            if count
            else "No mask has this score: lower the score."
        )
    what = "Click a point in the photograph" if session.mode == POINT else "Drag a box in the photograph"
    kept = f" {len(session.kept)} masks are kept." if session.kept else ""
    return (f"Mask of the {prompt.kind}." if prompt else f"{what}, or type its pixels.") + kept
