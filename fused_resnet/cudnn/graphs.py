"""The graphs: what each computes, and how it is put together of cuDNN's nodes.

Activations are NHWC, vectors float32 but where a graph says otherwise; arithmetic between the nodes is in float32. A tensor has one
role, which is its name and fixes its number in a graph, so that a plan that comes back from a file knows its tensors.

cuDNN's own nodes for the norm's finalising (bn-finalize) and for the sums of its backward (dbn-weight) have no counterpart in
the Python package. The first is a kernel of ours (`kernels.sums`), which also mends what sums of squares lose; the second is
written out in plain nodes: a mask and two or three reductions behind dgrad.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..problem import ConvProblem
from .library import frontend

#: The tensors of all graphs. A role's place is its number: append only, or the plans in people's caches mean something else.
ROLES = (
    "x", "weight", "scale", "bias", "residual", "residual_scale", "residual_bias", "act", "mask", "zero", "y", "sum", "square_sum",
    "dy", "dact", "mean", "invstd", "residual_mean", "residual_invstd", "dz", "s1", "s2", "residual_s2", "dw",
    "dz_factor", "y_factor", "constant",
)  # fmt: skip
DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BFLOAT16"}
#: Of channels of a tensor: what cuDNN's fusing engines ask for, 16 bytes of float16.
CHANNELS = 8


@dataclass(frozen=True)
class GraphProblem:
    """A graph for given shapes. Raises ValueError, naming the field, for what there is no graph for."""

    graph: str  #: a key of `GRAPHS`
    conv: ConvProblem  #: of a graph without a convolution, n, c, h and w count
    dtype: str  #: of the activations: a key of `DTYPES`
    source: str = "act"  #: what the activation is made of: a source of `tuning.Task`
    dact: bool = False  #: dgrad adds another gradient of the same activation
    tf32: bool = False  #: products of float32 may be cut to TF32
    deterministic: bool = False  #: no plan that may give other bits when it runs again

    def __post_init__(self):
        for name, value, known in (("graph", self.graph, GRAPHS), ("dtype", self.dtype, DTYPES)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}")
        if self.source not in (sources := GRAPHS[self.graph].sources):
            raise ValueError(f"source: {self.graph} expected one of {', '.join(sources)}; got {self.source!r}")
        if self.dact and self.graph != "dgrad":
            raise ValueError(f"dact: expected nothing to be added in {self.graph}")

    def why_not(self) -> str | None:
        """What rules the graph out before cuDNN is asked; None where nothing does."""
        c = self.conv
        if c.groups > 1:
            return f"{self.graph} takes no grouped convolution"
        if c.c % CHANNELS or c.k % CHANNELS:
            return f"{self.graph} takes channels in multiples of {CHANNELS}; the convolution has {c.c} and {c.k}"
        if self.graph in HALF_COEFFICIENTS and self.dtype == "float32":
            return f"{self.graph} takes scale and bias in the dtype of the activations; it is written for 2-byte ones"
        if self.graph == "dgrad" and self.source == "act" and not self.dact:
            return "dgrad with nothing behind it is the framework's convolution"
        return None


class Nodes:
    """A graph that is being built: cuDNN's nodes, and its tensors by role."""

    def __init__(self, problem: GraphProblem, **options: Any):
        """`options` are those of `cudnn.pygraph`: handle, or nothing where no GPU is."""
        self.problem, types = problem, frontend().data_type
        self.dtype, self.float, self.bits = getattr(types, DTYPES[problem.dtype]), types.FLOAT, types.BOOLEAN
        self.graph = frontend().pygraph(
            name=problem.graph, io_data_type=self.dtype, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT, **options
        )

    @staticmethod
    def _layout(n: int, c: int, h: int, w: int) -> dict[str, list[int]]:
        return {"dim": [n, c, h, w], "stride": [c * h * w, 1, c * w, c]}

    def _tensor(self, role: str, layout: dict[str, list[int]], dtype: Any) -> Any:
        return self.graph.tensor(name=role, uid=ROLES.index(role) + 1, data_type=dtype, **layout)

    def input(self, role: str, dtype: Any = None) -> Any:
        """A tensor of the convolution's input, [n, c, h, w]."""
        c = self.problem.conv
        return self._tensor(role, self._layout(c.n, c.c, c.h, c.w), dtype or self.dtype)

    def output(self, role: str) -> Any:
        """A tensor of the convolution's output, [n, k, p, q], that is read."""
        c = self.problem.conv
        return self._tensor(role, self._layout(c.n, c.k, c.p, c.q), self.dtype)

    def weight(self) -> Any:
        """The filter, [k, c, r, s]."""
        c = self.problem.conv
        return self._tensor("weight", self._layout(c.k, c.c, c.r, c.s), self.dtype)

    def vector(self, role: str, dtype: Any = None, of_output: bool = False) -> Any:
        """A value for each channel of the input, or of the output."""
        channels = self.problem.conv.k if of_output else self.problem.conv.c
        return self._tensor(role, self._layout(1, channels, 1, 1), dtype or self.float)

    def written(self, tensor: Any, role: str, shape: tuple[int, int, int, int], dtype: Any = None) -> Any:
        """Name a node's result and have it written."""
        layout = self._layout(*shape)
        tensor.set_name(role).set_uid(ROLES.index(role) + 1).set_output(True).set_data_type(dtype or self.dtype)
        tensor.set_dim(layout["dim"]).set_stride(layout["stride"])
        return tensor

    def geometry(self) -> dict[str, list[int]]:
        """How the convolution moves, as cuDNN's nodes take it."""
        c = self.problem.conv
        return {"padding": list(c.padding), "stride": list(c.stride), "dilation": list(c.dilation)}

    def affine(self, x: Any, scale: Any, bias: Any) -> Any:
        """x·scale + bias."""
        return self.graph.add(self.graph.mul(x, scale), bias)

    def standardised(self, x: Any, mean: Any, invstd: Any) -> Any:
        """(x − mean)·invstd."""
        return self.graph.mul(self.graph.sub(x, mean), invstd)

    def summed(self, tensor: Any, role: str, of_output: bool = False) -> None:
        """Σ over n, h, w, for each channel of the input, or of the output."""
        total = self.graph.reduction(tensor, mode=frontend().reduction_mode.ADD)
        self.written(total, role, (1, self.problem.conv.k if of_output else self.problem.conv.c, 1, 1), self.float)

    def convolved(self, activation: Any) -> Any:
        """The convolution's output, written as y."""
        c = self.problem.conv
        y = self.graph.conv_fprop(image=activation, weight=self.weight(), **self.geometry())
        return self.written(y, "y", (c.n, c.k, c.p, c.q))

    def statistics(self, y: Any) -> None:
        """Σ y and Σ y², for each channel of the output."""
        for total, role in zip(self.graph.genstats(y), ("sum", "square_sum"), strict=True):
            self.written(total, role, (1, self.problem.conv.k, 1, 1), self.float)

    def rounded_activation(self) -> Any:
        """relu(x·scale + bias), with scale and bias in the dtype of x: cuDNN's prologue takes no other."""
        z = self.affine(self.input("x"), self.vector("scale", self.dtype), self.vector("bias", self.dtype))
        return self.graph.relu(z)


def conv_genstats(g: Nodes) -> None:
    """y = conv(x); Σ y, Σ y²."""
    g.statistics(g.convolved(g.input("x")))


def conv_sums(g: Nodes) -> None:
    """As conv_genstats, whose node cuDNN takes with float16 alone: the sums by plain reductions, with any dtype."""
    y = g.convolved(g.input("x"))
    g.summed(y, "sum", of_output=True)
    g.summed(g.graph.mul(y, y), "square_sum", of_output=True)


def scale_bias_relu_conv_genstats(g: Nodes) -> None:
    """y = conv(relu(x·scale + bias)); Σ y, Σ y². scale and bias are rounded to the dtype of x."""
    g.statistics(g.convolved(g.rounded_activation()))


def scale_bias_relu_wgrad(g: Nodes) -> None:
    """dw = wgrad(relu(x·scale + bias), dy). scale and bias are rounded to the dtype of x."""
    c = g.problem.conv
    dw = g.graph.conv_wgrad(image=g.rounded_activation(), loss=g.output("dy"), **g.geometry())
    g.written(dw, "dw", (c.k, c.c, c.r, c.s))


def dgrad(g: Nodes) -> None:
    """d = dgrad(dy, weight) + dact; of a pending input dz = d·mask, Σ dz, Σ dz·x̂, and Σ dz·x̂r of a raw residual.

    The mask is the saved bits where there is a residual; else it is recomputed from z = x·scale + bias in float32.
    """
    c, source = g.problem.conv, g.problem.source
    shape = (c.n, c.c, c.h, c.w)
    d = g.graph.conv_dgrad(loss=g.output("dy"), filter=g.weight(), **g.geometry())
    d.set_dim(g._layout(*shape)["dim"]).set_stride(g._layout(*shape)["stride"])
    if g.problem.dact:
        d = g.graph.add(d, g.input("dact"))
    if source == "act":
        g.written(d, "dz", shape)
        return
    x = g.input("x")
    if source == "norm":
        dz = g.graph.relu_backward(loss=d, input=g.affine(x, g.vector("scale"), g.vector("bias")))
    else:
        dz = g.graph.mul(d, g.input("mask", g.bits))
    g.written(dz, "dz", shape)
    g.summed(dz, "s1")
    g.summed(g.graph.mul(dz, g.standardised(x, g.vector("mean"), g.vector("invstd"))), "s2")
    if source == "norm_add_raw":
        xhat = g.standardised(g.input("residual"), g.vector("residual_mean"), g.vector("residual_invstd"))
        g.summed(g.graph.mul(dz, xhat), "residual_s2")


def scale_bias_add_relu(g: Nodes) -> None:
    """act = relu(x·scale + bias + residual) and its mask, one bit a value. The residual may be raw itself."""
    c = g.problem.conv
    shape = (c.n, c.c, c.h, c.w)
    residual = g.input("residual")
    if g.problem.source == "norm_add_raw":
        residual = g.affine(residual, g.vector("residual_scale"), g.vector("residual_bias"))
    act = g.graph.relu(g.graph.add(g.affine(g.input("x"), g.vector("scale"), g.vector("bias")), residual))
    g.written(g.graph.cmp_neq(act, g.vector("zero")), "mask", shape, g.bits)  # not z > 0: a NaN lets its gradient through
    g.written(act, "act", shape)


def dbn_apply(g: Nodes) -> None:
    """Batch norm's backward, dy = dz·dz_factor + y·y_factor + constant: the affine map that it is for each channel."""
    c = g.problem.conv
    of_dz = g.affine(g.input("dz"), g.vector("dz_factor"), g.vector("constant"))
    g.written(g.graph.add(of_dz, g.graph.mul(g.input("y"), g.vector("y_factor"))), "dy", (c.n, c.c, c.h, c.w))


def conv_scale_bias_add_relu(g: Nodes) -> None:
    """act = relu(conv(x)·scale + bias + residual), for inference; without a residual where `source` is "norm"."""
    c = g.problem.conv
    y = g.graph.conv_fprop(image=g.input("x"), weight=g.weight(), **g.geometry())
    z = g.affine(y, g.vector("scale", of_output=True), g.vector("bias", of_output=True))
    if g.problem.source == "norm_add":
        z = g.graph.add(z, g.output("residual"))
    g.written(g.graph.relu(z), "act", (c.n, c.k, c.p, c.q))


@dataclass(frozen=True)
class Graph:
    """A graph's builder and the sources that it is for."""

    build: Callable[[Nodes], None]
    sources: tuple[str, ...]


GRAPHS = {
    builder.__name__: Graph(builder, sources)
    for builder, sources in (
        (conv_genstats, ("act",)),
        (conv_sums, ("act",)),
        (scale_bias_relu_conv_genstats, ("norm",)),
        (scale_bias_relu_wgrad, ("norm",)),
        (dgrad, ("act", "norm", "norm_add", "norm_add_raw")),
        (scale_bias_add_relu, ("norm_add", "norm_add_raw")),
        (dbn_apply, ("norm",)),
        (conv_scale_bias_add_relu, ("norm", "norm_add")),
    )
}
#: Graphs whose scale and bias are rounded to the dtype of the activations.
HALF_COEFFICIENTS = (scale_bias_relu_conv_genstats.__name__, scale_bias_relu_wgrad.__name__)


def build(problem: GraphProblem, **options: Any) -> Any:
    """The graph of a problem, a `cudnn.pygraph` with its nodes and without a plan. `options` are those of `cudnn.pygraph`.

    Raises ImportError where the package is missing.
    """
    nodes = Nodes(problem, **options)
    GRAPHS[problem.graph].build(nodes)
    return nodes.graph
