"""SharpMask on a feature pyramid: one pass of the backbone, windows on every level."""
