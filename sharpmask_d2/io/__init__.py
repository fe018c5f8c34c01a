"""Writes the files of a run (checked outputs, COCO results, precomputed proposals) so that a stopped run can be resumed."""
