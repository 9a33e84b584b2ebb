"""The convolutions of the suite `kernels`: where they are, what they must cost, that the peers do the same, and that faults are seen."""

import dataclasses

import pytest
import torch
from torch.nn.functional import batch_norm

from fused_resnet.backends import BACKENDS
from fused_resnet.bench import accuracy, convolutions, passes
from fused_resnet.bench.convolutions import FORWARD, NAMES, Place
from fused_resnet.bench.kernels import Kernels, peers
from fused_resnet.bench.machine import Ceilings
from fused_resnet.bench.passes import EPS
from fused_resnet.bench.timing import Times
from fused_resnet.problem import ConvProblem
from fused_resnet.reference import Reference, unpack_mask
from fused_resnet.roofline import DESIGNS, resnet, training_step
from fused_resnet.values import Source

CPU = torch.device("cpu")
MS = Times(1.0, 1.0, 1.0)


def place(name: str, n: int = 4, c: int = 16, size: int = 4, k: int = 24, window: int = 1, stride: int = 1) -> Place:
    operator = name.removesuffix("_backward")
    convs = [ConvProblem(n, c, size, size, k, window, window, (stride,) * 2, (window // 2,) * 2)]
    if operator.endswith("pair"):
        convs.append(ConvProblem(n, c, size, size, 2 * k, 1, 1, (stride,) * 2))
    return Place(operator, tuple(convs))


def made(name: str, dtype: torch.dtype = torch.float16, seed: int = 0, **shape) -> passes.Case:
    torch.manual_seed(seed)
    return convolutions.make(name, place(name, **shape), dtype, CPU)


def verdict(case: passes.Case, results) -> str | None:
    expected = case.ours(Reference())
    return accuracy.error(results, expected, case.terms(expected), case.precision)[1]


# ---- where they are, and what they must cost --------------------------------------------------------------------------


def test_every_convolution_of_a_network_is_in_the_plan():
    for model, count in (("resnet18", 13), ("resnet50", 24)):
        network = resnet(model, 4)
        planned = list(convolutions.plan([network, network]))
        assert len(planned) == 2 * count == len(set(planned))
        assert {conv for _, at in planned for conv in at.convs} == {layer.conv for layer in network.layers}
    assert {name for name, _ in convolutions.plan([resnet("resnet18", 4), resnet("resnet50", 4)])} == set(NAMES)
    assert [name for name, _ in convolutions.plan([resnet("resnet50", 4)], ["conv_stats_pair_backward"])] == ["conv_stats_pair_backward"]


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_floors_are_those_of_the_design_with_everything_fused(model):
    """Kernel by kernel. The last block is left out, whose gradient that design keeps on the pool's grid, and of the stem, whose pool's it
    does; a weight's gradient is float32 there, and here in the weight's dtype. Of a first block without a projection that design adds the
    shortcut's gradient, which here autograd does."""
    network = resnet(model, 8)
    left_out = {network.stem.name, *(layer.name for layer in network.blocks[-1].layers)}
    floors = {(k.layer, k.work): k for k in training_step(network, DESIGNS["+fold"])}
    names = [(network.stem.name,)]
    for block in network.blocks:
        names += [
            tuple(layer.name for layer in (block.branch[0], block.projection) if layer),
            *((layer.name,) for layer in block.branch[1:]),
        ]
    compared = 0
    for layers, at in zip(names, convolutions.places(network), strict=True):
        kernels = [*zip(layers, at.forward_kernels(2), strict=True)]
        backward = at.backward_kernels(2)
        reading = [layer for layer in reversed(layers) for _ in range(len(backward) // len(layers))]
        for layer, kernel in [*kernels, *zip(reading, backward, strict=True)]:
            if layer in left_out and kernel.work != "fprop":
                continue
            expected = floors[layer, kernel.work]
            narrow = 2 * next(conv for name, conv in zip(layers, at.convs, strict=True) if name == layer).weight_elements
            assert kernel.flops == expected.flops
            less = narrow if kernel.work == "wgrad" else 0
            if (at.operator, kernel.work) == ("conv_stats", "dgrad"):
                less = at.read.tensor_bytes(2)
            assert kernel.bytes == expected.bytes - less, (layer, kernel)
            compared += 1
    assert compared > 50


def test_what_a_call_reaches_is_told_by_the_floor():
    case = made("norm_act_conv_backward", torch.float32)
    ceilings = Ceilings(MS, 10**6, MS, 10**9)  # 10^9 bytes/s, 10^12 FLOP/s
    suite = Kernels(torch.device("cuda"), torch.float32, ceilings, ())
    floor = sum(max(k.flops / 1e12, k.bytes / 1e9) for k in case.kernels)
    rates = suite.rates(case, 2 * floor)
    assert rates["roofline_fraction"] == pytest.approx(0.5) and "copy_fraction" not in rates
    assert rates["tflops"] == pytest.approx(2 * 2 * 4 * 16 * 16 * 24 / (2 * floor) / 1e12)
    assert rates["gbytes_per_s"] == pytest.approx(case.bytes / (2 * floor) / 1e9)
    assert "roofline_fraction" not in dataclasses.replace(suite, device=CPU).rates(case, 1.0)


# ---- the peers do the same -------------------------------------------------------------------------------------------


class Autograd(Reference):
    """The backward by PyTorch's autograd, of PyTorch's batch norm in training, and of the convolutions."""

    def convolve_backward(self, source, act, mask, outputs, dact, need_dx):
        s, wanted = source, []

        def norm(x, mean, invstd, scale, bias):
            gamma, beta = (scale / invstd).requires_grad_(), (bias + mean * scale).requires_grad_()
            return batch_norm(x, None, None, gamma, beta, True, 0.0, EPS), gamma, beta

        a = act.clone().requires_grad_()
        if s.pending:
            z, gamma, beta = norm(s.x, s.mean, s.invstd, s.scale, s.bias)
            total, wanted = z, [z, beta, gamma]
            if s.residual_mean is not None:
                r, residual_gamma, _ = norm(s.residual, s.residual_mean, s.residual_invstd, s.residual_scale, s.residual_bias)
                total, wanted = z + r, [*wanted, residual_gamma]
            # An activation is no longer there to backward: the mask tells where it was made of z.
            a = total.relu() if mask is None else torch.where(unpack_mask(mask, s.x.shape[1]), total + (act - total).detach(), 0.0)
        elif need_dx:
            wanted = [a]
        weights, loss = [o.weight.clone().requires_grad_() for o in outputs], 0.0
        for weight, o in zip(weights, outputs, strict=True):
            y = torch.conv2d(a, weight, None, *o.geometry)
            loss = loss + (batch_norm(y, None, None, o.gamma, None, True, 0.0, EPS) * o.dz).sum()
        if dact is not None:
            loss = loss + (a * dact).sum()
        found = torch.autograd.grad(loss, [*wanted, *weights])
        gradients, dws = found[: len(wanted)], found[len(wanted) :]
        return (*gradients, *[None] * (4 - len(wanted))), list(dws)


@pytest.mark.parametrize("window, stride", [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_the_peer_is_what_autograd_does(name, window, stride):
    """In float32, whose error is a hundredth of what is allowed; forward it is the reference's."""
    case = made(name, torch.float32, window=window, stride=stride, size=6)
    expected = case.ours(Autograd() if name.endswith("_backward") else Reference())
    error, status = accuracy.error(case.eager(), expected, case.terms(expected))
    assert status is None and error < 2e-5
    assert len(case.eager()) == len(expected)


def test_images_have_no_gradient():
    stem = Place("conv_stats", (ConvProblem(2, 3, 9, 9, 16, 7, 7, (2, 2), (3, 3)),), images=True)
    case = convolutions.make("conv_stats_backward", stem, torch.float32, CPU)
    assert [kernel.work for kernel in case.kernels] == ["wgrad"]
    (dw,), (eager_dw,) = case.ours(Autograd()), case.eager()
    assert accuracy.error([eager_dw], [dw])[1] is None and accuracy.error([2 * eager_dw], [dw])[1] is not None


def test_what_aten_is_asked_for_on_a_gpu_is_the_case(monkeypatch):
    """With stand-ins for the two kernels of batch norm that only CUDA has, after PyTorch's SyncBatchNorm, which calls them."""

    def elemt(dz, y, mean, invstd, weight, sum_dz, sum_dz_centred, counts):
        n = counts.sum()
        assert counts.dtype == torch.int32 and n == y.numel() // y.shape[1]
        mean, invstd, weight, s1, s2 = (t[:, None, None] for t in (mean, invstd, weight, sum_dz / n, sum_dz_centred / n))
        return ((dz.float() - s1 - (y.float() - mean) * invstd**2 * s2) * invstd * weight).to(y.dtype)

    asked = []
    monkeypatch.setattr(passes, "has_halves", lambda t: True)
    monkeypatch.setattr(torch, "batch_norm_stats", lambda y, eps: asked.append(eps) or Reference().batch_stats(y, None, None, eps)[:2])
    monkeypatch.setattr(torch, "batch_norm_backward_elemt", lambda *args: asked.append(args) or elemt(*args))
    for name in ("norm_add_act_conv_pair", "norm_add_act_conv_pair_backward"):
        case = made(name)
        assert verdict(case, case.eager()) is None
    assert len(asked) == 4


def test_activations_are_channels_last():
    for name in NAMES:
        case = made(name, window=3)
        for t in case.eager()[: 1 if name.endswith("_backward") else None]:
            assert t.dim() == 1 or t.is_contiguous(memory_format=torch.channels_last), name


def test_a_gradient_passes_where_rounding_made_an_activation_zero(monkeypatch):
    """Eager tells its mask by the activation: 2e-8 is 0 in float16, and passes a gradient nevertheless."""
    monkeypatch.setattr(convolutions.ConvInputs, "coefficients", lambda self, x: tiny(self, x))

    def tiny(self, x):
        mean, invstd, var, scale, bias = Reference().batch_stats(x, self.gamma, self.beta, EPS)
        return mean, invstd, var, torch.full_like(scale, 6e-8), torch.zeros_like(bias)

    case = made("norm_act_conv_backward")
    assert verdict(case, case.eager()) is None
    assert verdict(case, (torch.zeros_like(case.eager()[0]), *case.eager()[1:])) is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_inductor_compiles_the_peer(name):
    case = made(name, torch.float32, window=3)
    call = peers(case, ("compile",), CPU, torch.float32)["compile"]
    assert verdict(case, call()) is None


# ---- what is wrong is seen, and what is right is not called wrong ----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_shapes_give_no_false_alarm(dtype):
    """Sums cancel there most. The peers round in other places than the reference."""
    for seed in range(60):
        for name in NAMES:
            case = made(name, dtype, seed, n=2 + 2 * (seed % 3), size=3 + seed % 2, c=8, k=8, window=1 + 2 * (seed % 2))
            assert verdict(case, case.eager()) is None, (name, seed)


class Faulty(Reference):
    """A reference with a fault in its passes."""

    def __init__(self, fault):
        self.fault = fault

    def norm_backward_apply(self, dz, y, mean, invstd, gamma, s1, s2):
        if self.fault == "no s1":
            s1 = torch.zeros_like(s1)
        if self.fault == "no s2":
            s2 = torch.zeros_like(s2)
        if self.fault == "a scale by 5% too large":
            gamma = gamma * 1.05
        return super().norm_backward_apply(dz, y, mean, invstd, gamma, s1, s2)

    def norm_backward_reduce(self, d, dact, source, mask, relu):
        dact = None if self.fault == "no second gradient" else dact
        if self.fault == "the mask of no bias":
            source, mask = source._replace(bias=source.bias * 0), None
        if self.fault == "no mask":
            relu = False
        results = list(super().norm_backward_reduce(d, dact, source, mask, relu))
        if self.fault == "sums without an image":
            part = Source(*(t if t is None or t.dim() < 4 else t[1:] for t in source))
            results[1:] = self._reduced(results[0][1:], part)[1:]
        if self.fault == "sums of raw x":
            results[2] = self._reduced(results[0], Source(source.x, source.mean * 0, source.invstd))[2]
        if self.fault == "a wrong tile of dz":
            results[0][-1, :8, -2:] *= 1.5
        return tuple(results)

    def norm_add_act(self, source, *rest, **options):
        source = source._replace(scale=source.scale * 1.05) if self.fault == "a wrong scale" else source
        return super().norm_add_act(source, *rest, **options)

    def with_norm(self, y, norm, parts=None):
        if self.fault == "a wrong tile of y":
            y[-1, :8, -2:] *= 1.5
        seen = y[1:] if self.fault == "statistics without an image" else y
        return super().with_norm(seen, norm, parts)._replace(y=y)


FAULTS = {
    "no s1": ["conv_stats_backward", "norm_act_conv_backward", "norm_add_act_conv_pair_backward"],
    "no s2": ["conv_stats_backward", "norm_act_conv_backward", "norm_add_act_conv_pair_backward"],
    "a scale by 5% too large": ["conv_stats_backward", "norm_add_act_conv_raw_backward"],
    "no second gradient": ["norm_add_act_conv_backward", "norm_add_act_conv_pair_backward"],
    "the mask of no bias": ["norm_act_conv_backward", "norm_add_act_conv_backward"],
    "no mask": ["norm_act_conv_backward", "norm_add_act_conv_raw_backward"],
    "sums without an image": ["norm_act_conv_backward", "norm_add_act_conv_raw_backward"],
    "sums of raw x": ["norm_act_conv_backward"],
    "a wrong tile of dz": ["norm_act_conv_backward", "norm_add_act_conv_pair_backward"],
    "a wrong scale": ["norm_act_conv", "norm_add_act_conv", "norm_add_act_conv_pair"],
    "a wrong tile of y": FORWARD,
    "statistics without an image": FORWARD,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [dict(n=4, size=4), dict(n=8, size=28, c=64, k=64)], ids=["small", "larger"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, shape, dtype):
    for name in FAULTS[fault]:
        case = made(name, dtype, **shape)
        assert verdict(case, case.ours(Faulty("none"))) is None
        assert (verdict(case, case.ours(Faulty(fault))) or "").startswith("wrong"), name


def test_terms_that_cancel_are_measured_by_their_norm():
    """Σ of values of both signs, rounded in other places: far off by its own size, and right. The same sum without one term is wrong."""
    torch.manual_seed(0)
    exact = torch.randn(2, 64, 3, 3, dtype=torch.float64)
    exact -= exact.mean(accuracy.PIXELS, keepdim=True)
    rounded, other = exact.half(), (exact * (1 + 1e-3 * torch.randn_like(exact))).half()
    (terms,) = accuracy.of_sums(rounded, torch.float16)
    truth, result = (t.float().sum(accuracy.PIXELS) for t in (rounded, other))
    assert ((result - truth).abs() / truth.abs()).max() > 0.1
    assert accuracy.error([result], [truth], [terms])[1] is None
    without = truth - rounded[0, :, 0, 0].float()
    assert "of the norm of its terms" in accuracy.error([without], [truth], [terms])[1]


def test_a_result_of_another_shape_is_wrong():
    assert accuracy.error([torch.ones(3)], [torch.ones(4)])[1] == "wrong: result 0 is [3], expected [4]"


def test_float32_is_allowed_what_tf32_costs(monkeypatch):
    gpu = torch.device("cuda")
    for allowed, dtype in ((True, torch.float16), (False, torch.float32)):
        monkeypatch.setattr(accuracy, "allow_tf32", lambda allowed=allowed: allowed)
        assert accuracy.convolved_precision(torch.float32, gpu) == dtype
        assert accuracy.convolved_precision(torch.bfloat16, gpu) == torch.bfloat16
        assert accuracy.convolved_precision(torch.float32, CPU) == torch.float32
    close = torch.ones(2, 2, 2, 2)
    close[0, 0, 0, 0] = 1.002  # one value, as roundings are not all of a sign
    assert accuracy.error([close], [torch.ones(2, 2, 2, 2)])[1] is not None
    assert accuracy.error([close], [torch.ones(2, 2, 2, 2)], precision=torch.float16)[1] is None


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_ours_is_the_backend_with_measured_choices(monkeypatch):
    ran = []

    class Spy(Reference):
        name = "tuned_triton"

        def convolve(self, *args):
            ran.append(self.name)
            return super().convolve(*args)

        def why_not(self, device, dtype):
            return None

    monkeypatch.setattr(type(BACKENDS["tuned_cuda"]), "why_not", lambda *args: "no native library")
    monkeypatch.setitem(BACKENDS, "tuned_triton", Spy())
    suite = Kernels(CPU, torch.float16, Ceilings(MS, 1, MS, 10**15), ("ours", "cudnn"), repeats=3)
    (row,) = suite.rows(lambda: made("norm_act_conv"))
    assert (row.impl, row.case, row.status, row.shape) == ("ours", "norm_act_conv 1x1 24", "ok", [16, 4, 4])
    assert len(ran) > 3 and row.max_rel_error == 0 and row.tflops > 0


class Late(Reference):
    """A backend that is right when it is asked for the first time."""

    name = "passes_triton"

    def __init__(self, fault):
        super().__init__()
        self.fault, self.asked, self.first = fault, 0, {}

    def why_not(self, device, dtype):
        return None

    def convolve_backward(self, *args):
        self.asked += 1
        sums, dws = super().convolve_backward(*args)
        if self.fault == "replays":
            return sums, [self.first.setdefault((n, dw.shape), dw) for n, dw in enumerate(dws)]
        return sums, [torch.zeros_like(dw) if self.asked >= 3 else dw for dw in dws]


@pytest.mark.parametrize("fault", ["replays", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_right_the_first_time_alone_gets_no_figure(fault, dtype, monkeypatch):
    monkeypatch.setitem(BACKENDS, "passes_triton", Late(fault))
    suite = Kernels(CPU, dtype, Ceilings(MS, 1, MS, 10**15), ("eager_nhwc", "ours:passes_triton"), repeats=3)
    peer, row = suite.rows(lambda: convolutions.make("norm_act_conv_backward", place("norm_act_conv_backward"), dtype, CPU))
    assert peer.status == "ok"
    assert row.status.startswith("wrong: result 3 ") and row.status.endswith("(after it was timed)") and row.median_ms is None


def test_what_takes_less_than_its_products_gets_no_figure():
    suite = Kernels(CPU, torch.float32, Ceilings(MS, 1, Times(1e6, 1e6, 1e6), 1), ("eager_nhwc",), repeats=3)
    (row,) = suite.rows(lambda: made("norm_act_conv", torch.float32))
    assert row.status.startswith("wrong: ") and "what must be done takes more than" in row.status


def test_a_fault_that_is_small_everywhere_and_a_result_of_zeros_are_seen():
    """The largest value of many is four times as large as the others: 2% of it, everywhere, is 9% of the tensor."""
    torch.manual_seed(0)
    truth = torch.randn(2, 8, 16, 16).bfloat16()
    off = (truth.float() + 0.025 * truth.float().abs().max() * torch.randn_like(truth, dtype=torch.float32).sign()).bfloat16()
    assert "of its norm" in accuracy.error([off], [truth])[1]
    assert accuracy.error([truth], [truth])[1] is None
    few = torch.tensor([1e-30, 0.0])
    scale = accuracy.Terms(torch.ones(2), torch.ones(2), torch.float32)
    assert accuracy.error([torch.zeros(2)], [few], [scale])[1] == "wrong: result 0 is nothing but zeros"
