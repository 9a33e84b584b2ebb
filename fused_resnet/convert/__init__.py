"""Puts networks that exist on the fused operators: `fuse`, `unfuse`, `report`, `recompute`."""

from .recompute import recompute
from .report import Report, Row, report
from .swap import fuse, unfuse

__all__ = ["Report", "Row", "fuse", "recompute", "report", "unfuse"]
