"""A report on proposals as one HTML file that opens offline: a gallery of masks, and recall, missed objects and the worst images."""

from .report import write_report

__all__ = ["write_report"]
