"""Problems for cuDNN's graphs. A test file that imports it is skipped where nvidia-cudnn-frontend is missing."""

from dataclasses import replace

import pytest

from fused_resnet.cudnn import library
from fused_resnet.cudnn.graphs import GRAPHS, GraphProblem
from fused_resnet.problem import ConvProblem

if reason := library.why_not_package():
    pytest.skip(reason, allow_module_level=True)

CONV = ConvProblem(4, 64, 14, 12, 32, 3, 3, (2, 2), (1, 1))
CASES = [(name, source) for name, graph in GRAPHS.items() for source in graph.sources]


def problem(name: str, source: str, dtype: str = "float16", **changes) -> GraphProblem:
    return replace(GraphProblem(name, CONV, dtype, source, dact=name == "dgrad"), **changes)
