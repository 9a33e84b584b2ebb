"""Convolution, bias, residual and ReLU as one primitive of oneDNN's: right, of the parameters as they are now, and of finite numbers alone.

The bound is that of tests/backends/test_conv_affine_act.py: at most twice eager's error, both against float64.
"""

import copy
import gc
import io
import math
import pickle
import threading

import pytest
import torch
from support.chains import DEVICE, RUNNABLE
from support.convolutions import nhwc
from support.epilogues import SHAPES, check, eager, operands
from support.small import SIZE, network
from torch import nn

import fused_resnet
from fused_resnet import derived as module
from fused_resnet.backends import onednn
from fused_resnet.derived import LIMIT, derived
from fused_resnet.nn import Block, Stage
from fused_resnet.values import ConvGeometry

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="for CPUs")

DTYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(bool(why := onednn.why_not(dtype)), reason=str(why)))
    for dtype in (torch.float32, torch.bfloat16)
]
#: Whole networks run it by the backend for CPUs, whose library has to be there.
needs_the_backend = pytest.mark.skipif(
    "passes_cpu" not in RUNNABLE or bool(onednn.why_not(torch.float32)), reason="needs passes_cpu and oneDNN"
)


def call(given: list, **options: bool) -> torch.Tensor | None:
    """The arguments of `conv_affine_act` without a scale."""
    x, weight, geometry, _, *rest = given
    with torch.no_grad():
        return onednn.conv_affine_act(x, weight, geometry, *rest, **options)


@pytest.fixture(autouse=True)
def nothing_refused(monkeypatch):
    monkeypatch.setattr(onednn, "_REFUSED", set())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", ["bias", "residual", "linear"])
@pytest.mark.parametrize("shape", [*SHAPES, "grey", "one pixel"])
def test_the_primitive_agrees(shape, epilogue, dtype):
    """Also where sizes of one leave the layout open."""
    given = operands({"grey": "3x3", "one pixel": "3x3"}.get(shape, shape), epilogue, dtype)
    if shape == "grey":
        given[0], given[1] = (t[:, :1].contiguous(memory_format=torch.channels_last) for t in given[:2])
    if shape == "one pixel":
        given[0] = given[0][:, :, :1, :1].contiguous(memory_format=torch.channels_last)
        given[2] = ConvGeometry([1, 1], [1, 1], [1, 1], 1)
        given[5] = None if given[5] is None else given[5][:, :, :1, :1].contiguous(memory_format=torch.channels_last)
    for _ in range(2):  # packed, and from what was kept
        act = call(given)
        if act is None:  # oneDNN adds no other tensor to a convolution with groups in bfloat16: the passes do
            assert (shape, epilogue, dtype) == ("3x3 grouped", "residual", torch.bfloat16) and len(onednn._REFUSED) == 1
        else:
            check(act, given)
    if epilogue == "residual":
        residual = given[5].clone()
        act = call([*given[:5], residual, True], in_place=True)
        assert act.data_ptr() == residual.data_ptr()
        check(act, given)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("in_place", [False, True])
def test_float32_stands_for_bfloat16_where_onednn_has_none(shape, in_place, monkeypatch):
    """Rounded once; the weight is cast once, and again after a write."""
    monkeypatch.setattr(onednn, "computing_dtype", lambda dtype: torch.float32)
    given = operands(shape, "residual", torch.bfloat16)
    for factor in (1, 1, 2):
        given[1].mul_(factor)
        arguments = [*given[:5], given[5].clone(), True]
        act = call(arguments, in_place=in_place)
        assert act.dtype == torch.bfloat16 and (act.data_ptr() == arguments[5].data_ptr()) == in_place
        check(act, given)


@pytest.mark.skipif(bool(onednn.why_not(torch.bfloat16)), reason="needs oneDNN's bfloat16")
def test_a_sum_rounds_once():
    """Eager rounds what it adds to: with a bias of 1024 it has lost what the residual brings back."""
    given = operands("1x1", "residual", torch.bfloat16)
    given[4] = given[4] * 0 + 1024.0
    given[5] = (given[5] * 0 - 1024.0).contiguous(memory_format=torch.channels_last)
    truth = eager(*(t.double() if torch.is_tensor(t) else t for t in given))
    error, allowed = ((act.double() - truth).norm() / truth.norm() for act in (call(given), eager(*given)))
    assert error < 0.1 * allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_left_to_the_passes(place, value, dtype):
    """oneDNN's ReLU makes 0 of NaN."""
    given = operands("3x3", "residual", dtype)
    position, at = {"x": (0, (1, 3, 2, 2)), "weight": (1, (3, 1, 0, 0)), "bias": (4, 3), "residual": (5, (1, 3, 2, 2))}[place]
    assert call(given) is not None
    given[position][at] = value  # a write that PyTorch counts
    assert call(given) is None
    assert call(given) is None  # not taken for finite by having been asked


@needs_the_backend
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("place", ["image", "weight", "in between"])
def test_a_network_keeps_nan(place, mode):
    folded, x = fused_resnet.fold(network(dtype=torch.float32).eval()), torch.randn(SIZE)
    with mode():
        assert folded(x).isfinite().all()
        if place == "image":
            x[1, 0, 3, 3] = math.nan
        elif place == "weight":
            folded.layer2[0].conv2.weight[0, 0, 0, 0] = math.nan
        else:  # the block's input is another tensor than the block before it made
            folded.layer1[0].register_forward_hook(lambda m, args, out: out.clone().index_fill_(0, torch.tensor(1), math.nan))
        out = folded(x)
        with fused_resnet.backend("off"):
            assert torch.equal(out.isnan(), folded(x).isnan()) and out.isnan().any()


@pytest.fixture
def counted(monkeypatch):
    """The operators of oneDNN's that were called, as (name, whether with a residual)."""
    calls = []

    class Spy:
        def __getattr__(self, name):
            operator = getattr(torch.ops.mkldnn, name)
            if "_pointwise" not in name:
                return lambda *args: calls.append(name) or operator(*args)

            class Overloads:
                def __call__(self, *args):
                    calls.append("conv")
                    return operator(*args)

                def binary(self, *args):
                    calls.append(f"{name} with a residual")
                    return operator.binary(*args)

            return Overloads()

    monkeypatch.setattr(onednn, "_OPERATORS", Spy())
    return calls


PACKED = "_reorder_convolution_weight"


#: Autocast has no float32.
AUTOCAST = [pytest.param(on, *d.values, marks=d.marks) for on in (False, True) for d in DTYPES if not (on and d.values == (torch.float32,))]


@needs_the_backend
@pytest.mark.parametrize(("autocast", "dtype"), AUTOCAST)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_folded_network_is_one_primitive_a_convolution(dtype, mode, autocast, counted):
    """Weights are packed at the first call, and under autocast too never again."""
    model = network(dtype=torch.float32).eval()
    folded, x = fused_resnet.fold(model), torch.randn(SIZE)
    expected = copy.deepcopy(model).double()(x.double()).detach()
    if not autocast:
        folded, x = folded.to(dtype), x.to(dtype)
    for forward in range(3):
        counted.clear()
        with mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = folded(x)
        blocks = sum(hasattr(m, "conv2") for m in folded.modules())
        convolutions = sum(isinstance(m, nn.Conv2d) for m in folded.modules())
        assert counted.count("_convolution_pointwise_ with a residual") == blocks  # in place: a block before or a projection made it
        assert counted.count("conv") == convolutions - blocks
        assert counted.count(PACKED) == (0 if forward else convolutions)
    error = (out.double() - expected).norm() / expected.norm()
    assert error <= 20 * torch.finfo(dtype).eps


@needs_the_backend
@pytest.mark.parametrize("at", ["layer1.0", "layer1", "layer2.0", "maxpool", "layer1.1"])
def test_what_others_see_is_not_written_over(at):
    """A block writes over its residual only where nobody has seen it."""
    folded, x, seen = fused_resnet.fold(network(dtype=torch.float32).eval()), torch.randn(SIZE), []
    block = folded.layer1[1]
    with torch.no_grad():
        expected = folded(x)
        folded.get_submodule(at).register_forward_hook(lambda m, args, out: seen.append((args[0], args[0].clone(), out, out.clone())))
        torch.testing.assert_close(folded(x), expected)
        given = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last) if block.conv1.in_channels == 8 else None
        for before, was, after, will in seen:
            assert torch.equal(before, was) and torch.equal(after, will)
        if given is not None:
            was = given.clone()
            block(given)
            assert torch.equal(given, was)
    assert len(seen) == 1


class OneConvolution(Block):
    """A block whose last convolution reads the block's input."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv, self.bn, self.relu, self.downsample = (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            None,
        )

    def branch(self):
        return [(self.conv, self.bn)]


@needs_the_backend
def test_a_convolution_does_not_write_over_what_it_reads():
    folded = fused_resnet.fold(Stage(*(OneConvolution(16) for _ in range(4))).eval())
    x = torch.randn(2, 16, 20, 20)
    with torch.no_grad():
        out = folded(x)
        with fused_resnet.backend("off"):
            torch.testing.assert_close(out, folded(x))


@needs_the_backend
@pytest.mark.parametrize("way", ["copy_", "in inference mode", "load_state_dict", "data = …", "to", "optimizer", "freed and made again"])
def test_a_parameter_that_changes_is_packed_anew(way):
    """And a bias is read anew."""
    folded, x = fused_resnet.fold(network(dtype=torch.float32).eval()), torch.randn(SIZE)
    other = fused_resnet.fold(network(dtype=torch.float32).eval())
    with torch.no_grad():
        before = folded(x)
        if way == "copy_":
            for p, q in zip(folded.parameters(), other.parameters(), strict=True):
                p.copy_(q)
        elif way == "in inference mode":
            with torch.inference_mode():
                for p, q in zip(folded.parameters(), other.parameters(), strict=True):
                    p.copy_(q)
        elif way == "load_state_dict":
            folded.load_state_dict(other.state_dict())
        elif way == "data = …":
            for p, q in zip(folded.parameters(), other.parameters(), strict=True):
                p.data = q.data.clone()
        elif way == "freed and made again":  # memory that was freed is taken again, at the same address, mostly
            for p, q in zip(folded.parameters(), other.parameters(), strict=True):
                p.data = torch.empty(0)
                p.data = q.data.clone()
        elif way == "to":
            folded.to(torch.bfloat16)(x.bfloat16())
            folded.to(torch.float32)
            other = copy.deepcopy(folded)
        else:
            optimizer = torch.optim.SGD(folded.parameters(), 0.1)
            for p in folded.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            other = copy.deepcopy(folded)
        out = folded(x)
        with fused_resnet.backend("off"):
            torch.testing.assert_close(out, other(x))
        assert not torch.equal(out, before)


@needs_the_backend
def test_nothing_of_it_is_saved():
    folded, x = fused_resnet.fold(network(dtype=torch.float32).eval()), torch.randn(SIZE)
    keys, size = list(folded.state_dict()), len(pickle.dumps(folded))
    with torch.no_grad():
        expected = folded(x)
        assert list(folded.state_dict()) == keys and len(pickle.dumps(folded)) == size
        buffer = io.BytesIO()
        torch.save(folded, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), torch.load(buffer, weights_only=False)):
            assert torch.equal(twin(x), expected)
            for p in twin.parameters():  # of its own
                p.zero_()
            assert torch.equal(folded(x), expected)


@needs_the_backend
def test_what_was_packed_goes_with_the_network():
    gc.collect()
    before = len(module._KEPT)
    folded, x = fused_resnet.fold(network(dtype=torch.float32).eval()), torch.randn(SIZE)
    with torch.no_grad():
        folded(x)
        assert len(module._KEPT) > before
        folded(x[:1])
    del folded
    gc.collect()
    assert len(module._KEPT) == before


@needs_the_backend
def test_threads_share_a_network():
    folded, results = fused_resnet.fold(network(dtype=torch.float32).eval()), {}
    inputs = [torch.randn(n, *SIZE[1:]) for n in range(1, 5)]
    with torch.no_grad(), fused_resnet.backend("off"):
        expected = [folded(x) for x in inputs]

    def run(number):
        with torch.no_grad():
            results[number] = [folded(inputs[number]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, outs in results.items():
        for out in outs:
            torch.testing.assert_close(out, expected[number])
    assert len(results) == 4


@pytest.mark.parametrize("missing", ["an operator", "an implementation", "a layout", "oneDNN"])
def test_where_it_can_not_be_had_the_passes_do_the_work(missing, monkeypatch):
    given = operands("3x3", "residual", torch.float32)

    def refuse(*args):
        raise RuntimeError("could not create a primitive descriptor")

    class Old:
        if missing != "an operator":
            _convolution_pointwise = (
                type("Overloads", (), {"binary": staticmethod(refuse)})
                if missing == "an implementation"
                else torch.ops.mkldnn._convolution_pointwise
            )
        _reorder_convolution_weight = staticmethod(refuse) if missing == "a layout" else torch.ops.mkldnn._reorder_convolution_weight

    onednn.why_not.cache_clear()
    try:
        with torch.backends.mkldnn.flags(enabled=missing != "oneDNN"):
            monkeypatch.setattr(onednn, "_OPERATORS", Old if missing != "oneDNN" else torch.ops.mkldnn)
            assert call(given) is None
            for name in {"eager", "passes_cpu"} & set(RUNNABLE):
                with fused_resnet.backend(name), torch.no_grad():
                    check(fused_resnet.ops.conv_affine_act(*given), given)
    finally:
        onednn.why_not.cache_clear()


def test_float16_is_left_to_the_passes():
    assert "float16" in onednn.why_not(torch.float16) and call(operands("1x1", "bias", torch.float16)) is None


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_what_is_derived_is_kept_until_the_source_changes():
    source, made = nn.Parameter(torch.ones(3)), []

    def make():
        made.append(source.detach() * 2)
        return made[-1]

    for _ in range(2):
        assert torch.equal(derived(source, "double", make), torch.full((3,), 2.0)) and len(made) == 1
    with torch.no_grad():
        source.add_(1)
    assert torch.equal(derived(source, "double", make), torch.full((3,), 4.0)) and len(made) == 2
    with torch.inference_mode():
        twice = derived(source, "again", make)
    assert not twice.is_inference()  # or what is derived of it would not be kept


def test_the_oldest_of_many_goes():
    source, made = torch.ones(3), []
    for key in [*range(LIMIT), 0, LIMIT, 0]:
        derived(source, key, lambda key=key: made.append(key) or key)
    assert made == [*range(LIMIT), LIMIT, 0]


def test_tensors_whose_writes_nobody_counts_are_not_kept():
    with torch.inference_mode():
        source = torch.ones(3)
        first = derived(source, "double", lambda: source * 2)
        source.add_(1)
        assert torch.equal(first + 2, derived(source, "double", lambda: source * 2))


def test_shapes_of_one_weight_are_packed_apart():
    """A batch of another size is right, too, and comes back to what was packed."""
    given = operands("3x3", "bias", torch.float32)
    whole = given[0]
    for n in (1, 2, 1):
        given[0] = nhwc(n, *whole.shape[1:], dtype=torch.float32)
        check(call(given), given)
