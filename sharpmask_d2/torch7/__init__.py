"""Reads and converts the models and proposals that FAIR published as Torch7 files."""
