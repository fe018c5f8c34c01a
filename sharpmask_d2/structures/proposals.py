"""Proposals of an image as Instances."""

from typing import Optional

from detectron2.structures import Instances


def rescale_proposals(proposals: Instances, height: Optional[int], width: Optional[int]) -> Instances:
    """Proposals in the frame of the image resized to another size.

    Args:
        proposals: proposal_boxes, proposal_masks (WindowMasks) and objectness_logits.
        height, width: in pixels; None leaves the side as it is.

    Returns:
        Instances with tight proposal_boxes of the masks; without those whose mask has no pixel there.
    """
    old_height, old_width = proposals.image_size
    size = height or old_height, width or old_width
    if size == (old_height, old_width):
        return proposals
    masks = proposals.proposal_masks.scale(size[1] / old_width, size[0] / old_height, size)
    rescaled = Instances(size)
    rescaled.proposal_boxes = masks.boxes()
    rescaled.objectness_logits = proposals.objectness_logits
    rescaled.proposal_masks = masks
    return rescaled[rescaled.proposal_boxes.nonempty()]
