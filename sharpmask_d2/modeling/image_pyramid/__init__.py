"""DeepMask and SharpMask of the papers: one network, run on every level of an image pyramid."""
