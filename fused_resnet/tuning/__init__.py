"""How a convolution's kernels are tiled, and who computes what: measured, or by rule of thumb."""

from .configuration import CUDNN, Choice, Configuration
from .table import Entry, Table
from .task import Task

__all__ = ["CUDNN", "Choice", "Configuration", "Entry", "Table", "Task"]
