"""Masks in the formats of labelling tools and of other libraries, one module for each; none of these libraries is needed to write files."""
