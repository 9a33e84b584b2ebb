"""How a convolution's kernels are tiled, and who computes what: measured, or by rule of thumb."""

from .configuration import Configuration
from .table import Entry, Table
from .task import Task

__all__ = ["Configuration", "Entry", "Table", "Task"]
