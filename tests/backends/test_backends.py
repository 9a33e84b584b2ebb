"""Choosing a backend, and what the operators say of arguments that they can't take."""

import pytest
import torch
from support.chains import TESTED

import fused_resnet
from fused_resnet import native, ops
from fused_resnet.backends import BACKENDS, PASSES, TUNED, choices, resolve
from fused_resnet.functional import conv_bn_act
from fused_resnet.tuning import Configuration
from fused_resnet.values import ConvGeometry, Source

CPU = torch.device("cpu")


def test_auto_is_pytorchs_own_for_float64_and_where_no_kernel_runs(answers):
    assert resolve(CPU, torch.float64) == "off"
    assert resolve(torch.device("cuda"), torch.float64) == "off"
    answers("passes_cpu", lambda device, dtype: "it rains")
    assert resolve(CPU, torch.float32) == "off"  # and not Triton's interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_auto_takes_the_passes_for_cpus_where_their_library_loads(dtype):
    reason = native.CPU.why_not()
    assert resolve(CPU, dtype) == ("passes_cpu" if reason is None else "off")


def test_a_choice_is_nested_and_undone(monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "eager")
    assert resolve(CPU, torch.float32) == "eager"
    with fused_resnet.backend("off"):
        assert resolve(CPU, torch.float32) == "off"
        with fused_resnet.backend("eager"):
            assert resolve(CPU, torch.float32) == "eager"
        assert resolve(CPU, torch.float32) == "off"
    with pytest.raises(KeyError), fused_resnet.backend("off"):
        raise KeyError
    assert resolve(CPU, torch.float32) == "eager"


def test_unknown_names_are_refused_with_the_known_ones(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'fast'; expected one of " + ", ".join(choices())), fused_resnet.backend("fast"):
        pass
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "quick")
    with pytest.raises(ValueError, match="FUSED_RESNET_BACKEND: unknown backend 'quick'"):
        resolve(CPU, torch.float32)


def test_a_forced_backend_that_cannot_run_says_why():
    model = fused_resnet.models.resnet20().double()
    with fused_resnet.backend("passes"), pytest.raises(RuntimeError, match="backend 'passes' was asked for and can't run here: .*float64"):
        model(torch.randn(2, 3, 8, 8, dtype=torch.float64))


def test_every_backend_is_asked_the_same_way():
    for name, backend in BACKENDS.items():
        assert backend.name == name
        assert backend.why_not(CPU, torch.int32)


def test_the_tests_know_every_backend():
    """Those of the tests alone, too: a list that was made before they were registered would leave their cases out unseen."""
    assert set(TESTED) == {name for name in BACKENDS if name not in TUNED} and "emulated" in TESTED


def test_both_languages_of_the_passes_run_where_the_tests_run(device):
    """On a GPU; on a CPU by Triton's interpreter and by the SIMT shim: the operator tests take only what can run."""
    gpu = device.type == "cuda"
    floats = [torch.float32, torch.float16, torch.bfloat16]
    runnable = {"passes_triton": floats if gpu else floats[:2], "passes_cuda" if gpu else "emulated": floats}
    for name, dtypes in runnable.items():
        assert {dtype: BACKENDS[name].why_not(device, dtype) for dtype in dtypes} == dict.fromkeys(dtypes), name


def test_a_backend_is_asked_once_for_each_device_and_dtype(answers):
    asked = []
    answers("passes_triton", lambda device, dtype: asked.append((device, dtype)))
    with fused_resnet.backend("passes_triton"):
        for dtype in (torch.float32, torch.float16, torch.float32):
            assert resolve(CPU, dtype) == "passes_triton"
    assert asked == [(CPU, torch.float32), (CPU, torch.float16)]
    answers("passes_triton", lambda device, dtype: "it rains")
    with fused_resnet.backend("passes_triton"), pytest.raises(RuntimeError, match="it rains"):
        resolve(CPU, torch.float32)


def test_a_launch_makes_no_constant(device, monkeypatch):
    """A compiler's memory pool, or a CUDA graph, may be what a first launch is in: what kernels read beside tensors was there before."""
    fprop = pytest.importorskip("fused_resnet.kernels.fprop")
    fprop.one.cache_clear()
    BACKENDS["triton"].why_not(device, torch.float32)
    x = torch.randn(1, 16, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    vectors = torch.rand(4, 16, device=device).unbind()
    tiles = Configuration(16, 16, 16, warps=4, stages=2)
    for maker in ("ones", "zeros", "full", "tensor", "arange"):
        monkeypatch.setattr(torch, maker, lambda *_, **__: pytest.fail("a constant was made by a launch"))
    fprop.fprop(Source(x, *vectors), weight, ConvGeometry([1, 1], [1, 1], [1, 1], 1), False, False, tiles, True)


def test_passes_is_the_first_language_that_runs(answers):
    assert PASSES == ("passes_cuda", "passes_cpu", "passes_triton")
    with fused_resnet.backend("passes"):
        for able in (PASSES, PASSES[1:], PASSES[2:]):
            for name in PASSES:
                answers(name, lambda device, dtype, name=name, able=able: None if name in able else "it rains")
            assert resolve(CPU, torch.float32) == able[0]
        answers(PASSES[2], lambda device, dtype: "it snows")
        with pytest.raises(RuntimeError, match="passes_cuda: it rains; passes_cpu: it rains; passes_triton: it snows"):
            resolve(CPU, torch.float32)


def test_passes_says_what_it_lacks(monkeypatch):
    cuda, cpu, triton = (BACKENDS[name] for name in PASSES)
    for backend in (cuda, cpu, triton):
        assert "not torch.float64" in backend.why_not(CPU, torch.float64)
        assert "'mps'" in backend.why_not(torch.device("mps"), torch.float32)
    assert "'cpu'" in cuda.why_not(CPU, torch.float32)
    assert "'cuda'" in cpu.why_not(torch.device("cuda"), torch.float32)
    monkeypatch.setattr("fused_resnet.native.CUDA.why_not", lambda: "not built: nvcc was not found")
    assert cuda.why_not(torch.device("cuda"), torch.float32) == "native library not built: nvcc was not found"
    monkeypatch.setattr("fused_resnet.native.CPU.why_not", lambda: "not built: no C++ compiler was found")
    assert cpu.why_not(CPU, torch.float32) == "native library not built: no C++ compiler was found"
    assert "bfloat16" in triton.why_not(CPU, torch.bfloat16) or torch.cuda.is_available()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert triton.why_not(CPU, torch.float32).endswith("set TRITON_INTERPRET=1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert triton.why_not(CPU, torch.float32).startswith("Triton is not installed")


def conv(k=4, c=3, size=3, dtype=torch.float32, norm=None, stride=1, padding=1, dilation=1, groups=1):
    vectors = (torch.ones(k), torch.zeros(k), None, None, True, 1e-5) if norm is None else norm
    geometry = ops.ConvGeometry([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    return ops.Conv(torch.randn(k, c, size, size, dtype=dtype), ops.Norm(*vectors), geometry)


def nhwc(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)


def pending():
    return ops.conv_stats(nhwc(2, 3, 6, 6), conv())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.conv_stats(torch.randn(3, 6, 6), conv()), ValueError, r"x: expected a tensor of rank 4"),
        (lambda: ops.conv_stats(torch.randn(2, 3, 6, 6), conv()), ValueError, "x: expected memory_format=torch.channels_last"),
        (lambda: ops.conv_stats(nhwc(2, 5, 6, 6), conv()), ValueError, r"x: expected 3 channels, as weight \[4, 3, 3, 3\] reads with groups = 1; got 5"),
        (lambda: ops.conv_stats(nhwc(2, 3, 0, 6), conv()), ValueError, "x: expected at least one value an image"),
        (lambda: ops.conv_stats(torch.ones(2, 3, 6, 6, dtype=torch.int32), conv()), TypeError, "x: expected float64, float32"),
        (lambda: ops.conv_stats(nhwc(2, 3, 6, 6), conv(dtype=torch.float16)), TypeError, "weight: expected torch.float32"),
        (lambda: ops.conv_stats(nhwc(2, 3, 6, 6, device="meta"), conv()), ValueError, "weight: expected a tensor on meta"),
        (lambda: ops.conv_stats(nhwc(2, 3, 6, 6), conv(stride=-1)), ValueError, "stride: expected two integers of at least 1; got"),
        (lambda: ops.conv_stats(nhwc(2, 3, 6, 6), conv(padding=-1)), ValueError, "padding: expected two integers of at least 0"),
        (lambda: ops.conv_stats(nhwc(2, 3, 6, 6), conv(dilation=0)), ValueError, "dilation: expected two integers"),
        (lambda: ops.conv_stats(nhwc(2, 3, 6, 6), conv(groups=3)), ValueError, "groups: expected a divisor"),
        (lambda: ops.conv_stats(nhwc(2, 3, 6, 6), conv(size=9, padding=0)), ValueError, "x: expected a spatial size"),
        (lambda: ops.conv_stats(nhwc(1, 3, 1, 1), conv()), ValueError, r"more than 1 value per channel when training, got input size torch.Size\(\[1, 4, 1, 1\]\)"),
        (lambda: ops.conv_stats(nhwc(2, 3, 6, 6), conv(norm=(torch.ones(5), None, None, None, True, 1e-5))), ValueError, r"gamma: expected shape \[4\]"),
        (lambda: ops.conv_stats(nhwc(2, 3, 6, 6), conv(norm=(None, torch.ones(4, dtype=torch.int32), None, None, True, 1e-5))), TypeError, "beta: expected a floating"),
        (lambda: ops.conv_stats(nhwc(2, 3, 6, 6), conv(norm=(None, None, None, None, False, 1e-5))), ValueError, "running_mean, running_var: expected tensors"),
        (lambda: ops.norm_add_act(pending(), nhwc(2, 4, 6, 5)), ValueError, r"residual: expected shape \[2, 4, 6, 6\]"),
        (lambda: ops.norm_add_act(pending(), torch.randn(2, 4, 6, 6)), ValueError, "residual: expected memory_format"),
        (lambda: ops.norm_add_act(pending(), nhwc(2, 4, 6, 6).half()), TypeError, "residual: expected torch.float32"),
        (lambda: ops.norm_add_act(pending()._replace(scale=torch.ones(3))), ValueError, r"scale: expected shape \[4\]"),
        (lambda: ops.norm_act_max_pool(pending(), 17), ValueError, "kernel_size: expected 1 to 16"),
        (lambda: ops.norm_act_max_pool(pending(), 3, 0), ValueError, "stride: expected at least 1"),
        (lambda: ops.norm_act_max_pool(pending(), 3, 2, 2), ValueError, "padding: expected 0 to 1"),
        (lambda: ops.norm_act_max_pool(pending(), 9, 1, 0), ValueError, "x: expected a spatial size"),
        (lambda: conv_bn_act(torch.randn(3, 6, 6), conv().weight, None, None, None, None), ValueError, "x: expected a tensor of rank 4"),
        (lambda: conv_bn_act(nhwc(2, 3, 6, 6), torch.randn(4, 3, 3), None, None, None, None), ValueError, "weight: expected a tensor of rank 4"),
        (lambda: conv_bn_act(nhwc(2, 3, 6, 6), conv().weight, None, None, torch.ones(3), torch.ones(4)), ValueError, r"running_mean: expected shape \[4\]"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_fakes_refuse_what_the_operators_refuse():
    """Under torch.compile the same words appear."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match="x: expected 3 channels, as weight"):
        ops.conv_stats(nhwc(2, 5, 6, 6), conv())
