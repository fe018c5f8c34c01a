"""SharpMask on a feature pyramid: the backbone runs once per image, and every level has windows."""
