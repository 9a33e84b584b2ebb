"""torch.library.opcheck of every operator: schema, fake, autograd registration and AOT dispatch agree, whatever the strides."""

import pytest
import torch
from support.chains import LANGUAGES
from torch import Tensor

from fused_resnet.ops.convolutions import OPERATORS
from fused_resnet.ops.library import NAMESPACE, overload

N, C, H, W, K = 2, 6, 5, 4, 4


class Tensors:
    """Random arguments. `layout` says how they lie in memory: "permuted", or "strided", as slices of something larger.

    Kernels take the vectors of a pending activation as an operator made them, without gaps; gamma and beta are the user's.
    """

    def __init__(self, layout: str, requires_grad: bool, gaps: bool = True):
        self.layout, self.requires_grad, self.gaps = layout, requires_grad, gaps

    def _given(self, t: Tensor, grad: bool = True) -> Tensor:
        return t.detach().requires_grad_(self.requires_grad and grad)

    def activation(self, c: int = C, h: int = H, w: int = W, grad: bool = True) -> Tensor:
        """channels_last: a permuted NHWC tensor, or a slice of a larger batch, which begins within its storage."""
        if self.layout == "permuted":
            return self._given(torch.randn(N, h, w, c).permute(0, 3, 1, 2), grad)
        return self._given(torch.randn(2 * N, h, w, c)[1 : N + 1].permute(0, 3, 1, 2), grad)

    def parameter(self, grad: bool = True) -> Tensor:
        """Of the norm of an output: [K], not zero."""
        return self._given((torch.rand(2 * K) + 0.5)[::2], grad)

    def vector(self, n: int = C, grad: bool = True) -> Tensor:
        """Of a pending activation: one value a channel, not zero."""
        return self._given((torch.rand(2 * n) + 0.5)[:: 2 if self.gaps else 1][:n], grad)

    def weight(self, size: int = 3) -> Tensor:
        """[K, C, size, size]."""
        if self.layout == "permuted":
            return self._given(torch.randn(size, size, C, K).permute(3, 2, 0, 1))
        return self._given(torch.randn(2 * K, C, size, 2 * size)[::2, :, :, ::2])

    def source(self, pending: bool, residual: str | None) -> list[Tensor | None]:
        """The arguments that stand for a source; `residual` is "none", "act", "raw", or None where the operator takes none."""
        args = [self.activation()]
        if pending:
            args += [self.vector(), self.vector(), self.vector(grad=False), self.vector(grad=False)]
        if residual is None:
            return args
        args.append(None if residual == "none" else self.activation())
        raw = [self.vector(), self.vector(), self.vector(grad=False), self.vector(grad=False)]
        return [*args, *(raw if residual == "raw" else [None] * 4)]

    def conv(self, training: bool) -> list:
        """The arguments that stand for a convolution and its norm."""
        running = [None, None] if training else [self.parameter(grad=False), self.parameter(grad=False)]
        return [self.weight(), self.parameter(), self.parameter(), *running, training, 1e-5, "", [1, 1], [1, 1], [1, 1], 1]

    def output(self, training: bool, used: bool = True) -> list:
        """The arguments that stand for an output and its gradients."""
        gradients = [self.activation(K), self.vector(K), self.vector(K)] if used else [None] * 3
        norm = [self.vector(K), self.vector(K), self.weight(), self.parameter()]
        return [*gradients, self.activation(K), *norm, training, [1, 1], [1, 1], [1, 1], 1, True, ""]


def mask(wanted: bool) -> Tensor:
    return torch.randint(256, (N, H, W, 1), dtype=torch.uint8) if wanted else torch.empty(0, dtype=torch.uint8)


def forward_arguments(name: str, residual: str | None, layout: str, training: bool = True, gaps: bool = True) -> list:
    """Those of a convolution operator, but for write_act and backend."""
    given, operator = Tensors(layout, requires_grad=True, gaps=gaps), OPERATORS[name]
    args = given.source(operator.pending, residual)
    for _ in range(operator.convs):
        args += given.conv(training)
    return args


def backward_arguments(name: str, residual: str | None, layout: str, training: bool = True, gaps: bool = True) -> list:
    """Those of its backward, but for need_dx and backend."""
    given, operator = Tensors(layout, requires_grad=False, gaps=gaps), OPERATORS[name]
    kept = given.source(operator.pending, residual)
    if residual == "act":  # saved as its mask alone
        kept[5] = None
    args = [*kept, given.activation(), mask(residual not in (None, "none"))]
    for i in range(operator.convs):
        args += given.output(training, used=i == 0 or layout != "strided")
    return [*args, given.activation() if operator.residual else None]


CASES = [
    (name, residual)
    for name, operator in OPERATORS.items()
    for residual in (["none", "act", "raw"] if operator.residual else [None])
]  # fmt: skip
LAYOUTS = ["permuted", "strided"]
QUICK = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "residual"), CASES)
def test_convolutions(name, residual, layout):
    tail = [layout == "permuted"] if OPERATORS[name].may_skip_act else []
    torch.library.opcheck(overload(name), (*forward_arguments(name, residual, layout, layout != "strided"), *tail, "eager"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "residual"), CASES)
def test_backwards_of_convolutions(name, residual, layout):
    args = backward_arguments(name, residual, layout, training=layout != "strided")
    # Of the four checks, the two that concern autograd have nothing to look at here: no gradient flows through a backward.
    torch.library.opcheck(overload(f"{name}_backward"), (*args, layout != "permuted", "eager"), test_utils=QUICK)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("backend", ["triton", *LANGUAGES])
@pytest.mark.parametrize("name", OPERATORS)
def test_fakes_say_what_kernels_give(name, backend):
    """Shapes and strides, of what a kernel writes and of what it leaves out."""
    residual = "raw" if OPERATORS[name].residual else None
    for tail in [[False], [True]] if OPERATORS[name].may_skip_act else [[]]:
        args = (*forward_arguments(name, residual, "permuted", gaps=False), *tail, backend)
        torch.library.opcheck(overload(name), args, test_utils=QUICK)
    args = (*backward_arguments(name, residual, "permuted", gaps=False), True, backend)
    torch.library.opcheck(overload(f"{name}_backward"), args, test_utils=QUICK)


def finishing(name: str, layout: str, residual: str, gaps: bool = True) -> tuple[list, list]:
    """Arguments of an operator that ends in no convolution, and of its backward."""
    given, kept = (Tensors(layout, requires_grad, gaps) for requires_grad in (True, False))
    if name == "norm_act_max_pool":
        index = torch.randint(9, (N, 3, 2, C), dtype=torch.uint8).permute(0, 3, 1, 2)
        return [*given.source(True, None), 3, 2, 1], [kept.activation(h=3, w=2), index, *kept.source(True, None), 3, 2, 1]
    saved = kept.source(True, residual)
    if residual == "act":
        saved[5] = None
    relu = [True] if name == "norm_add_act" else []
    dout = kept.activation() if name == "norm_add_act" else kept.activation(h=1, w=1)
    return [*given.source(True, residual), *relu], [dout, *saved, mask(residual != "none"), *relu]


FINISHING = [("norm_act_max_pool", "none"), *((n, r) for n in ("norm_add_act", "norm_add_act_avg_pool") for r in ("none", "act", "raw"))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "residual"), FINISHING)
def test_norms_and_pools(name, residual, layout):
    forward, backward = finishing(name, layout, residual)
    torch.library.opcheck(overload(name), (*forward, "eager"))
    torch.library.opcheck(overload(f"{name}_backward"), (*backward, "eager"))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("backend", LANGUAGES)
@pytest.mark.parametrize(("name", "residual"), FINISHING)
def test_fakes_say_what_passes_give(name, residual, backend):
    forward, backward = finishing(name, "permuted", residual, gaps=False)
    torch.library.opcheck(overload(name), (*forward, backend), test_utils=QUICK)
    torch.library.opcheck(overload(f"{name}_backward"), (*backward, backend), test_utils=QUICK)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_of_an_activation(layout, training):
    forward, backward = Tensors(layout, requires_grad=True), Tensors(layout, requires_grad=False)
    running = [None, None] if training else [forward.vector(grad=False), forward.vector(grad=False)]
    arguments = [forward.activation(), forward.vector(), forward.vector(), *running, training, 1e-5]
    torch.library.opcheck(overload("norm_act"), (*arguments, "eager"))
    saved = [backward.activation(), backward.activation(), *(backward.vector() for _ in range(5))]
    torch.library.opcheck(overload("norm_act_backward"), (*saved, training, "eager"))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics(momentum):
    """The one operator that writes into its arguments, as its schema says."""
    vectors = [[torch.rand(c) + 0.5 for c in (3, 5)] for _ in range(4)]
    vectors[0][0] = vectors[0][0].half()
    counts = [torch.tensor(2), torch.tensor(7)]
    torch.library.opcheck(overload("update_running_statistics"), (counts, *vectors, [12, 0], momentum))


def test_no_operator_is_left_out():
    checked = [*OPERATORS, *(name for name, _ in FINISHING), "norm_act"]
    there = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::")}
    assert there == {*checked, *(f"{name}_backward" for name in checked), "update_running_statistics"}


@pytest.mark.parametrize("fault", ["fake of another stride", "an argument that is written"])
def test_opcheck_catches_planted_faults(fault):
    if fault.startswith("fake") and torch.__version__ < "2.12":
        pytest.skip("opcheck of PyTorch 2.11 does not compare strides")
    with torch.library._scoped_library("opcheck_fault", "DEF") as library:
        library.define("f(Tensor x) -> Tensor")
        written = fault.startswith("an argument")
        library.impl("f", lambda x: x.mul_(2).clone() if written else x * 2, "CompositeExplicitAutograd")
        torch.library.register_fake("opcheck_fault::f", lambda x: torch.empty(x.shape) if not written else torch.empty_like(x), lib=library)
        with pytest.raises(torch.testing._internal.optests.OpCheckError):
            torch.library.opcheck(torch.ops.opcheck_fault.f.default, (Tensors("permuted", False).activation(),), test_utils=QUICK)
