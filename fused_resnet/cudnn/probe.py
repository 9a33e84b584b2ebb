"""Tries each graph once on a small problem: whether cuDNN accepts it on this GPU, and whether its results are right.

Nothing is assumed of a dtype, a GPU or a version. A graph that is refused here, or wrong, is not used in this process.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..problem import ConvProblem
from ..reference import Reference, allow_tf32
from ..values import ConvGeometry, Source, nhwc
from . import work
from .graphs import GRAPHS, GraphProblem
from .library import frontend
from .plans import Refused, plans_of, proposed

#: Small, and with what a kernel may get wrong: an odd size, padding, more rows than a tile has.
PROBLEM = ConvProblem(3, 64, 13, 11, 72, 3, 3, (1, 1), (1, 1))
#: Largest difference over the largest value, by dtype: one rounding of a result, and of an operand in the middle.
TOLERANCES = {"float32": 2e-3, "float16": 4e-3, "bfloat16": 3e-2}
CASES = [(name, source) for name, graph in GRAPHS.items() for source in graph.sources]


def small_problem(graph: str, source: str, dtype: str) -> GraphProblem:
    """The small problem that a graph is tried on."""
    c, options = PROBLEM, {"tf32": allow_tf32(), "deterministic": work.deterministic()}
    if graph in work.POINTWISE:
        return work.pointwise_problem(graph, (c.n, c.c, c.h, c.w), dtype, source)
    return GraphProblem(graph, c, dtype, source, dact=graph == "dgrad", **options)


def acceptance(dtype: str, device_properties: str, capability: int) -> dict[str, str | None]:
    """cuDNN's answer for each graph on a GPU that is not here, of which cuDNN's own JSON of properties is given: None, or a refusal.

    Plans are proposed and checked, not built, and nothing runs: whether the results are right, only the GPU can tell.
    """
    answers = {}
    for graph, source in CASES:
        properties = frontend().create_device_properties(device_properties)
        problem = small_problem(graph, source, dtype)
        try:
            if reason := problem.why_not():
                raise Refused(reason)
            proposed(problem, device_property=properties, sm_version=capability)
            answers[f"{graph} {source}"] = None
        except Refused as refusal:
            answers[f"{graph} {source}"] = str(refusal)
    return answers


@cache
def why_not_graph(graph: str, source: str, dtype: str, device: torch.device) -> str | None:
    """Why a graph is not used for a dtype on a GPU: cuDNN's refusal, or that its results are wrong; None where it may be."""
    with torch.no_grad():
        found = plans_of(device).get(small_problem(graph, source, dtype))
        return found if isinstance(found, str) else _difference(graph, source, dtype, device)


def why_not_graphs(dtype: str, device: torch.device) -> dict[str, str | None]:
    """`why_not_graph` of every graph and source, by "graph source"."""
    return {f"{graph} {source}": why_not_graph(graph, source, dtype, device) for graph, source in CASES}


def _difference(graph: str, source: str, dtype: str, device: torch.device) -> str | None:
    """What is wrong with a graph's results, by float64; None where nothing is."""
    trial = Trial(dtype, device, source)
    made, expected = getattr(trial, graph)()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for name, result in made.items():
        truth = expected[name]
        if result.dtype == torch.uint8:
            if (wrong := (result != truth).double().mean().item()) > 1e-2:
                return f"wrong: {name} differs in {wrong:.0%} of its bytes"
            continue
        away = ((result.double() - truth.double()).abs().max() / truth.double().abs().max()).item()
        if not away <= TOLERANCES[dtype]:
            return f"wrong: {name} differs by {away:.1e} of its largest value"
    return None


Results = tuple[dict[str, Tensor], dict[str, Tensor]]


class Trial:
    """Random operands, and what each graph makes of them beside what `Reference` does. Seeded: the answer is the same in each run."""

    def __init__(self, dtype: str, device: torch.device, source: str):
        self.dtype, self.device, self.kind = getattr(torch, dtype), device, source
        self.random = torch.Generator().manual_seed(0)
        c = PROBLEM
        self.geometry = ConvGeometry(list(c.stride), list(c.padding), list(c.dilation), 1)
        self.weight = self._tensor(c.k, c.c, c.r, c.s) * 0.06
        self.x, self.residual = (self._tensor(c.n, c.c, c.h, c.w) for _ in range(2))
        self.source = self._source()

    def _tensor(self, *shape: int) -> Tensor:
        return nhwc((torch.randn(shape, generator=self.random) + 0.3).to(self.device, self.dtype))

    def _vector(self, channels: int) -> Tensor:
        return (torch.rand(channels, generator=self.random) + 0.5).to(self.device)

    def _source(self) -> Source:
        """As the graph reads it: with coefficients that its prologue's rounding leaves alone."""
        if self.kind == "act":
            return Source(self.x)
        mean, invstd, _, scale, bias = Reference().batch_stats(self.x, *(self._vector(PROBLEM.c) for _ in range(2)), 1e-5)
        source = Source(self.x, mean, invstd, scale, bias)
        source = work.as_cudnn_reads(source) if self.kind == "norm" else source
        if self.kind == "norm_add_raw":
            of_residual = Reference().batch_stats(self.residual, *(self._vector(PROBLEM.c) for _ in range(2)), 1e-5)
            return Source(*source[:5], self.residual, *of_residual[:2], *of_residual[3:])
        return source._replace(residual=self.residual) if self.kind == "norm_add" else source

    def _activation(self) -> tuple[Tensor, Tensor | None]:
        s = self.source
        if not s.pending:
            return s.x, None
        return Reference().norm_add_act(s, relu=True, save_mask=s.residual is not None)

    def _convolved(self) -> Tensor:
        return torch.conv2d(self._activation()[0].double(), self.weight.double(), None, *self.geometry)

    def _fprop(self) -> Results:
        y, total, squares = work.fprop(self.source, self.weight, self.geometry)
        truth = self._convolved()
        sums = {"sum": truth.sum((0, 2, 3)), "square_sum": (truth**2).sum((0, 2, 3))}
        return {"y": y, "sum": total, "square_sum": squares}, {"y": truth, **sums}

    conv_genstats = conv_sums = scale_bias_relu_conv_genstats = _fprop

    def _dy(self) -> Tensor:
        return self._tensor(PROBLEM.n, PROBLEM.k, PROBLEM.p, PROBLEM.q)

    def scale_bias_relu_wgrad(self) -> Results:
        """dw."""
        dy, act = self._dy(), self._activation()[0]
        truth = torch.nn.grad.conv2d_weight(act.double(), self.weight.shape, dy.double(), *self.geometry[:3])
        return {"dw": work.wgrad(self.source, dy, self.weight, self.geometry)}, {"dw": truth}

    def dgrad(self) -> Results:
        """dz and its sums."""
        dy, dact, (_, mask), s = self._dy(), self._tensor(*self.x.shape), self._activation(), self.source
        made = work.dgrad(s, mask, dy, self.weight, self.geometry, dact)
        d = torch.nn.grad.conv2d_input(self.x.shape, self.weight.double(), dy.double(), *self.geometry[:3])
        truth = (d + dact, None, None, None)
        if s.pending:
            truth = Reference().norm_backward_reduce(d, dact, s, mask, relu=True)
        names = ("dz", "s1", "s2", "residual_s2")
        both = [(name, a, b) for name, a, b in zip(names, made, truth, strict=True) if a is not None]
        return {name: a for name, a, _ in both}, {name: b for name, _, b in both}

    def scale_bias_add_relu(self) -> Results:
        """act and mask."""
        s, names = self.source, ("act", "mask")
        made = _made(work.norm_add_act(s, tried=True))
        return dict(zip(names, made, strict=True)), dict(zip(names, self._activation(), strict=True))

    def dbn_apply(self) -> Results:
        """dy."""
        dz, s = self._tensor(*self.x.shape), self.source
        _, s1, s2, _ = Reference._reduced(dz, Source(s.x, s.mean, s.invstd))
        arguments = dz, s.x, s.mean, s.invstd, self._vector(PROBLEM.c), s1, s2
        return {"dy": _made(work.norm_backward_apply(*arguments, tried=True))}, {"dy": Reference().norm_backward_apply(*arguments)}

    def conv_scale_bias_add_relu(self) -> Results:
        """act of inference."""
        scale, bias = self._vector(PROBLEM.k), self._vector(PROBLEM.k) - 1
        residual = self._dy() if self.kind == "norm_add" else None
        act = _made(work.conv_affine_act(self.x, self.weight, self.geometry, scale, bias, residual, tried=True))
        y = torch.conv2d(self.x.double(), self.weight.double(), None, *self.geometry)
        z = y * scale.double()[:, None, None] + bias.double()[:, None, None] + (0 if residual is None else residual)
        return {"act": act}, {"act": z.relu()}


def _made(result: Any) -> Any:
    """What a graph made, whose plan was found before."""
    assert result is not None
    return result
