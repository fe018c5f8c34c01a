"""Writes masks as "CVAT for images 1.1" XML, and encodes masks as CVAT does. CVAT's own libraries are not needed."""

from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import numpy as np

from ..structures.tight_masks import TightMask
from .labelled_images import LabelledImage, LabelledImages


def mask_points(mask: TightMask) -> list[int]:
    """CVAT's `points` of a mask, equal to those of `cvat_sdk.masks.encode_mask`, which reads a bitmap of the whole image.

    Args:
        mask: not empty.

    Returns:
        Lengths of the runs of background and foreground in turn, beginning with background, in the tight box row by row; and then x and y
        of the first and of the last pixel of the box.
    """
    x0, y0, x1, y1 = mask.box
    # A background pixel before the first makes the first count 0 where the box begins with foreground.
    flat = np.concatenate([[False], mask.bitmap.ravel()])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return [*np.diff(changes, prepend=0, append=mask.bitmap.size).tolist(), x0, y0, x1 - 1, y1 - 1]


def cvat_annotations(content: LabelledImages, *, shape: str = "mask") -> bytes:
    """An XML file that CVAT imports as "CVAT 1.1" into a task or project whose images have the same names.

    Args:
        content: images with their masks.
        shape: "mask" (default); "polygon", where the parts of a mask form a group and holes are filled; or "box".

    Returns:
        The file. Masks of higher scores have a higher z_order, so that they lie above others.
    """
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    labels = ElementTree.SubElement(ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task"), "labels")
    for name in content.labels.values():
        label = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(label, "name").text = name
        ElementTree.SubElement(label, "attributes")
    for number, image in enumerate(content.images):
        _add_image(root, number, image, content.labels, shape)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _add_image(
    root: ElementTree.Element, number: int, image: LabelledImage, labels: Mapping[int, str], shape: str
) -> None:
    height, width = image.size
    element = ElementTree.SubElement(
        root, "image", {"id": str(number), "name": image.file_name, "width": str(width), "height": str(height)}
    )
    for rank, mask in enumerate(image.masks):
        common = {
            "label": labels[mask.category_id],
            "source": "auto",
            "occluded": "0",
            "z_order": str(len(image.masks) - 1 - rank),
        }
        tight = mask.tight()
        x0, y0, x1, y1 = tight.box
        if shape == "polygon":
            polygons = tight.polygons()
            group = {"group_id": str(rank + 1)} if len(polygons) > 1 else {}
            for polygon in polygons:
                points = ";".join(f"{x:.2f},{y:.2f}" for x, y in polygon)
                ElementTree.SubElement(element, "polygon", {**common, "points": points, **group})
        elif shape == "box":
            corners = dict(zip(("xtl", "ytl", "xbr", "ybr"), map(str, tight.box)))
            ElementTree.SubElement(element, "box", {**common, **corners})
        else:
            place = {"left": x0, "top": y0, "width": x1 - x0, "height": y1 - y0}
            runs = ", ".join(map(str, mask_points(tight)[:-4]))
            texts = {key: str(value) for key, value in place.items()}
            ElementTree.SubElement(element, "mask", {**common, "rle": runs, **texts})


def polygon_points(mask: TightMask) -> Sequence[list[float]]:
    """CVAT's `points` of the polygons of a mask: x0, y0, x1, y1, ... of each of its parts. Holes are filled."""
    return [polygon.ravel().tolist() for polygon in mask.polygons()]
