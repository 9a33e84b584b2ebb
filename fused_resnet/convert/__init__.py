"""Networks that exist already, on the fused operators: `fuse`, `unfuse`, `report`."""

from .report import Report, Row, report
from .swap import fuse, unfuse

__all__ = ["Report", "Row", "fuse", "report", "unfuse"]
