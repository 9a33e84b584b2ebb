"""The native library: that it builds, what is in the binary, that it loads or says why not, and that its kernels are right.

Without a GPU the kernels run too: compiled for the host and called for every thread of a grid, one after the other.
"""

import ctypes
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_resnet import native
from fused_resnet.reference import Reference

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RESIDUALS = ("none", "materialised", "raw")


def tool(name: str) -> str:
    """The path of a build tool; the test is skipped without it."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if not found and name == "nvcc":
        found = shutil.which("/usr/local/cuda/bin/nvcc")
    if not found and name == "cuobjdump" and (spec := importlib.util.find_spec("triton")):
        found = shutil.which(str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return found or pytest.skip(f"{name} is not installed")


def output_of(*command) -> str:
    result = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> tuple[Path, str]:
    """The library, built from CMakeLists.txt with warnings as errors, and the log of its compilers."""
    nvcc, cmake, ninja = tool("nvcc"), tool("cmake"), tool("ninja")
    folder, torch_home = tmp_path_factory.mktemp("native"), Path(torch.__file__).parent
    output_of(
        cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DTORCH_INCLUDE_DIRS={torch_home / 'include'}", f"-DTORCH_LIBRARY_DIR={torch_home / 'lib'}",
        "-DFUSED_RESNET_PTXAS_VERBOSE=ON", "-DFUSED_RESNET_WERROR=ON",
    )  # fmt: skip
    log = output_of(cmake, "--build", folder)
    return folder / "libfused_resnet.so", log


# ---- the binary ------------------------------------------------------------------------------------------------------


def test_holds_machine_code_for_ampere_and_hopper_and_ptx(build):
    listing = output_of(tool("cuobjdump"), build[0])
    found = set(re.findall(r"Fatbin (elf|ptx) code:\n=+\narch = (\w+)", listing))
    assert found == {("elf", "sm_80"), ("elf", "sm_90a"), ("ptx", "sm_90")}


def test_no_kernel_spills(build):
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", build[1])
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", build[1])
    # dtypes x residuals x (relu, mask) x (wide, scalar) on each architecture
    assert len(kernels) == len(spills) == len(DTYPES) * len(RESIDUALS) * 4 * 2 * 2
    assert [kernel for kernel, spilled in zip(kernels, spills, strict=True) if spilled != ("0", "0")] == []


def test_depends_on_libtorch_and_on_neither_python_nor_a_shared_cudart(build):
    dynamic = output_of(tool("readelf"), "--dynamic", "--wide", build[0])
    needed = set(re.findall(r"\(NEEDED\).*\[([^\]]+)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name or "cuda" in name]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    symbols = output_of(tool("readelf"), "--dyn-syms", "--wide", build[0])
    undefined = re.findall(r" UND (\w+)", symbols)
    assert "torch_library_impl" in undefined
    assert not [name for name in undefined if name.startswith(("Py", "_Py", "_ZN2at", "_ZN3c10"))]


# ---- loading ---------------------------------------------------------------------------------------------------------

LOAD = """
import sys
from pathlib import Path
from fused_resnet import native
if len(sys.argv) > 1:
    native.LIBRARY = Path(sys.argv[1])
print(native.load())
assert native.load() == native.load()
"""
CALL_ON_CPU = """
import torch
x, v = torch.zeros(1, 8, 2, 2), torch.zeros(8)
try:
    torch.ops.fused_resnet_native.norm_add_act(x, v, v, None, None, None, True, False)
except RuntimeError as error:
    print(error)
"""


def loaded(*arguments: Path, then: str = "") -> list[str]:
    """What `native.load()` gives in a process of its own, and what `then` prints after it."""
    return output_of(sys.executable, "-c", LOAD + then, *arguments).splitlines()


def test_loads_or_says_why_not():
    (answer,) = loaded()
    assert answer == "None" or answer.startswith(("not built: ", "does not load: "))
    if not native.LIBRARY.exists():
        assert answer.startswith("not built: ")


def test_the_reason_of_the_build_is_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "absent.so")
    monkeypatch.setattr(native, "ABSENCE", tmp_path / "absent.txt")
    assert "--no-build-isolation" in native.load.__wrapped__()
    (tmp_path / "absent.txt").write_text("nvcc was not found\n")
    assert native.load.__wrapped__() == "not built: nvcc was not found"


def test_loads_without_a_gpu_and_refuses_cpu_tensors_by_name(build):
    assert loaded(build[0], then=CALL_ON_CPU) == ["None", "norm_add_act: x: expected a CUDA tensor"]


@pytest.mark.parametrize("content", [b"", b"not a library at all\n", b"\x7fELF" + bytes(60)], ids=["empty", "text", "header"])
def test_a_file_that_is_no_library_gives_a_reason(tmp_path, content):
    (tmp_path / "lib.so").write_bytes(content)
    (answer,) = loaded(tmp_path / "lib.so")
    assert answer.startswith("does not load: ")
    assert len(answer) > len("does not load: ")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_truncated_library_gives_a_reason(build, tmp_path, keep):
    whole = build[0].read_bytes()
    (tmp_path / "lib.so").write_bytes(whole[: int(len(whole) * keep)])
    (answer,) = loaded(tmp_path / "lib.so")
    assert answer.startswith("does not load: ")


# ---- the kernel ------------------------------------------------------------------------------------------------------


def problem(dtype, residual, shape, device="cpu"):
    """Arguments of `norm_add_act` up to residual_bias. Some elements are zero, infinite or NaN."""

    def tensor():
        t = torch.randn(shape, device=device)
        t[torch.rand(shape, device=device) < 0.05] = 0.0
        t[torch.rand(shape, device=device) < 0.02] = float("inf")
        t[torch.rand(shape, device=device) < 0.02] = float("nan")
        return t.to(dtype).contiguous(memory_format=torch.channels_last)

    def vector():
        return torch.randn(shape[1], device=device)

    x, scale, bias = tensor(), vector(), vector()
    bias[torch.rand(shape[1], device=device) < 0.2] = 0.0
    raw = residual == "raw"
    return x, scale, bias, None if residual == "none" else tensor(), vector() if raw else None, vector() if raw else None


def assert_same(got: torch.Tensor, expected: torch.Tensor):
    # Both are the correctly rounded value of one formula, so there is no tolerance.
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


# The dialect of CUDA that is C++: a thread is a call, since the threads of this kernel never meet.
HOST_KERNEL = """
#include <cuda_runtime.h>
#undef __launch_bounds__
#define __launch_bounds__(...)
#include <cmath>
struct Index { unsigned x; };
static Index blockIdx, threadIdx, gridDim;
#include "norm_add_act.cuh"
using namespace fused_resnet;

template <typename Body>
static void with_bool(bool value, Body body) {
  if (value) body(std::true_type{}); else body(std::false_type{});
}

template <typename T, Residual kResidual>
static void run(const NormAddActArguments<T>& arguments, bool relu, bool wide, int multiprocessors) {
  gridDim.x = norm_add_act_blocks(arguments.pixels, arguments.channels, multiprocessors);
  with_bool(wide, [&](auto wide_constant) {
    with_bool(relu, [&](auto relu_constant) {
      with_bool(arguments.mask, [&](auto mask_constant) {
        constexpr int kWidth = wide_constant ? 16 / sizeof(T) : 1;
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
          for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x)
            norm_add_act_kernel<T, kWidth, kResidual, relu_constant, mask_constant>(arguments);
      });
    });
  });
}

template <typename T>
static void typed(const void* x, const float* scale, const float* bias, const void* residual, const float* residual_scale,
                  const float* residual_bias, void* act, void* mask, int64_t pixels, int channels, bool relu, bool wide,
                  int multiprocessors) {
  const NormAddActArguments<T> arguments{(const T*)x, scale, bias, (const T*)residual, residual_scale, residual_bias,
                                         (T*)act, (uint8_t*)mask, pixels, channels};
  if (residual_scale) run<T, Residual::kRaw>(arguments, relu, wide, multiprocessors);
  else if (residual) run<T, Residual::kMaterialised>(arguments, relu, wide, multiprocessors);
  else run<T, Residual::kNone>(arguments, relu, wide, multiprocessors);
}

#define PARAMETERS const void* x, const float* s, const float* b, const void* r, const float* rs, const float* rb, \\
                   void* act, void* mask, int64_t pixels, int channels, int relu, int wide, int multiprocessors
#define ARGUMENTS x, s, b, r, rs, rb, act, mask, pixels, channels, relu, wide, multiprocessors
extern "C" void run_float32(PARAMETERS) { typed<float>(ARGUMENTS); }
extern "C" void run_float16(PARAMETERS) { typed<__half>(ARGUMENTS); }
extern "C" void run_bfloat16(PARAMETERS) { typed<__nv_bfloat16>(ARGUMENTS); }
"""


@pytest.fixture(scope="module")
def host_kernel(tmp_path_factory):
    """A function like `Reference.norm_add_act` that runs the CUDA kernel's code on the host."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "kernel.cpp").write_text(HOST_KERNEL)
    library = folder / "kernel.so"
    # nvcc compiles a .cpp file with the host compiler, and knows where the CUDA headers are.
    flags = ("-shared", "-O1", "-std=c++17", "-w", "-Xcompiler=-fPIC,-w,-ffp-contract=off", f"-I{ROOT / 'csrc'}")
    output_of(tool("nvcc"), *flags, folder / "kernel.cpp", "-o", library)
    functions = ctypes.CDLL(str(library))

    def address(tensor):
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    def call(x, scale, bias, residual, residual_scale, residual_bias, relu, save_mask, wide, multiprocessors):
        n, c, h, w = x.shape
        groups, poison = -(-c // 8), 16
        act = torch.full((x.numel() + poison,), -77.0, dtype=x.dtype)
        mask = torch.full((n * h * w * groups + poison,), 0xA5, dtype=torch.uint8) if save_mask else None
        getattr(functions, f"run_{str(x.dtype).removeprefix('torch.')}")(
            address(x), address(scale), address(bias), address(residual), address(residual_scale), address(residual_bias),
            address(act), address(mask), ctypes.c_int64(n * h * w), c, int(relu), int(wide), multiprocessors,
        )  # fmt: skip
        assert (act[-poison:] == -77.0).all()
        assert mask is None or (mask[-poison:] == 0xA5).all()
        bits = None if mask is None else mask[:-poison].view(n, h, w, groups)
        return act[:-poison].view(n, h, w, c).permute(0, 3, 1, 2), bits

    return call


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_on_the_host_equals_the_reference(host_kernel, dtype, residual):
    widths = 16 // dtype.itemsize
    checked = 0
    for channels, relu, save_mask in itertools.product((1, 3, 8, 12, 20, 64, 72, 200), (True, False), (True, False)):
        arguments = problem(dtype, residual, (2, channels, 5, 7))
        act, mask = Reference().norm_add_act(*arguments, relu, save_mask)
        for wide, multiprocessors in itertools.product({False, channels % widths == 0}, (1, 9)):
            got, bits = host_kernel(*arguments, relu, save_mask, wide, multiprocessors)
            assert_same(got, act)
            assert (bits is None and mask is None) or torch.equal(bits, mask)
            checked += 1
    assert checked >= 64


@pytest.mark.parametrize("channels", [16, 20, 24])  # 2 or 3 groups of eight, full ones and a partial one
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_on_the_host_takes_many_steps(host_kernel, dtype, channels):
    # One multiprocessor holds 3 x 256 threads, so a thread meets its channels 10 to 16 times, and the last step is partial.
    arguments = problem(dtype, "raw", (1, channels, 61, 67))
    act, mask = Reference().norm_add_act(*arguments, True, True)
    got, bits = host_kernel(*arguments, True, True, channels % (16 // dtype.itemsize) == 0, 1)
    assert_same(got, act)
    assert torch.equal(bits, mask)


@pytest.fixture(scope="module")
def operator(request):
    """torch.ops.fused_resnet_native.norm_add_act, of the installed library or of one that is built now."""
    if native.load() is not None:
        torch.ops.load_library(request.getfixturevalue("build")[0])
    return torch.ops.fused_resnet_native.norm_add_act


@pytest.mark.gpu
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_equals_the_reference(operator, device, dtype, residual):
    for shape in ((2, 1, 5, 7), (2, 3, 5, 7), (2, 20, 5, 7), (3, 64, 56, 56), (2, 200, 14, 14), (1, 2048, 7, 7), (64, 64, 56, 56)):
        for relu, save_mask in itertools.product((True, False), (True, False)):
            arguments = problem(dtype, residual, shape, device)
            act, mask = Reference().norm_add_act(*arguments, relu, save_mask)
            got, bits = operator(*arguments, relu, save_mask)
            assert_same(got, act)
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert (bits is None and mask is None) or torch.equal(bits, mask)


@pytest.mark.gpu
def test_operator_takes_unaligned_and_empty_tensors(operator, device):
    x, scale, bias, *_ = problem(torch.float16, "none", (2, 64, 6, 6), device)
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)
    shifted = flat[1:].view(2, 6, 6, 64).permute(0, 3, 1, 2).copy_(x)  # 2 bytes past a 16-byte boundary
    act, mask = Reference().norm_add_act(x, scale, bias, None, None, None, True, True)
    got, bits = operator(shifted, scale, bias, None, None, None, True, True)
    assert_same(got, act)
    assert torch.equal(bits, mask)
    got, bits = operator(x[:0], scale, bias, None, None, None, True, True)
    assert got.shape == (0, 64, 6, 6)
    assert bits.shape == (0, 6, 6, 8)


@pytest.mark.gpu
def test_operator_runs_on_the_current_stream(operator, device):
    arguments = problem(torch.bfloat16, "raw", (8, 64, 28, 28), device)
    act, _ = Reference().norm_add_act(*arguments, True, False)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    operator(*arguments, True, False)  # the kernel is loaded at its first launch, which is not for a capture
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph, stream=stream):  # work on any other stream would break the capture
        got, _ = operator(*arguments, True, False)
    got.fill_(-1.0)
    graph.replay()
    torch.cuda.synchronize(device)
    assert_same(got, act)


@pytest.mark.gpu
def test_operator_names_the_argument_that_is_wrong(operator, device):
    x, scale, bias, residual, residual_scale, residual_bias = problem(torch.float16, "raw", (2, 16, 4, 4), device)
    good = {
        "x": x, "scale": scale, "bias": bias, "residual": residual,
        "residual_scale": residual_scale, "residual_bias": residual_bias,
    }  # fmt: skip
    wrong = (
        ("x", {"x": x.contiguous()}),
        ("x", {"x": x.double()}),
        ("x", {"x": x[0]}),
        ("scale", {"scale": scale[:8]}),
        ("scale", {"scale": scale.half()}),
        ("scale", {"scale": scale.cpu()}),
        ("bias", {"bias": torch.zeros(32, device=device)[::2]}),
        ("residual", {"residual": residual[:1]}),
        ("residual", {"residual": residual.float()}),
        ("residual", {"residual": residual.contiguous()}),
        ("residual_scale", {"residual": None}),
        ("residual_scale", {"residual_scale": None}),
        ("residual_bias", {"residual_bias": None}),
        ("residual_bias", {"residual_bias": residual_bias[:1]}),
    )
    for name, change in wrong:
        with pytest.raises(RuntimeError, match=f"^norm_add_act: {name}: expected"):
            operator(*{**good, **change}.values(), True, False)
