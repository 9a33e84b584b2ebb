"""The native library: that it builds, what is in the binary, that it loads or says why not, and what its operators refuse.

That its kernels are right is the business of test_passes.py, on a GPU or by the SIMT shim.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.chains import DEVICE, LANGUAGES
from support.checkout import ROOT

from fused_resnet import native, native_kernels
from fused_resnet.backends import BACKENDS
from fused_resnet.cli import main
from fused_resnet.files import with_section
from fused_resnet.reference import Reference
from fused_resnet.values import Source


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


def compiled(folder: Path, *options: str) -> Path:
    """The library, built from CMakeLists.txt with warnings as errors."""
    nvcc, cmake, ninja = tool("nvcc"), tool("cmake"), tool("ninja")
    torch_home = Path(torch.__file__).parent
    output_of(
        cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DTORCH_INCLUDE_DIRS={torch_home / 'include'}", f"-DTORCH_LIBRARY_DIR={torch_home / 'lib'}", "-DFUSED_RESNET_WERROR=ON", *options,
    )  # fmt: skip
    output_of(cmake, "--build", folder)
    return folder / "libfused_resnet.so"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The installed library where it is as new as its sources, else one that is built now."""
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").iterdir()]
    if native.CUDA.path.exists() and native.CUDA.path.stat().st_mtime >= max(path.stat().st_mtime for path in sources):
        return native.CUDA.path
    return compiled(tmp_path_factory.mktemp("native"))


# ---- the binary ------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_compiles_without_a_warning(tmp_path):
    assert compiled(tmp_path, "-DCMAKE_CUDA_ARCHITECTURES=90a-real").exists()


def test_holds_machine_code_for_ampere_and_hopper_and_ptx(library):
    listing = output_of(tool("cuobjdump"), library)
    found = set(re.findall(r"Fatbin (elf|ptx) code:\n=+\narch = (\w+)", listing))
    assert found == {("elf", "sm_80"), ("elf", "sm_90a"), ("ptx", "sm_90")}


def test_no_kernel_spills_and_wide_variants_move_16_bytes(library, monkeypatch):
    monkeypatch.setattr(native.CUDA, "path", library)
    rows = [dict(zip(native_kernels.HEADER, row, strict=True)) for row in native_kernels.rows()]
    assert {row["sm"] for row in rows} == {"80", "90"}
    # dtypes x widths x options, and the two that merge partial results
    variants = {"batch_stats": 6, "merge_moments": 1, "norm_add_act": 48, "norm_backward_reduce": 90, "norm_backward_apply": 6,
                "merge_sums": 1, "norm_act_max_pool": 12, "norm_add_act_avg_pool": 18}  # fmt: skip
    found = [row["kernel"].removesuffix("_kernel") for row in rows if row["sm"] == "90"]
    assert {name: found.count(name) for name in found} == variants
    assert [row for row in rows if row["spilled"] != "0"] == []
    for row in rows:
        width = re.match(r"\w+, (\d+)", row["variant"])
        if width and width[1] != "1":  # a load of x, a store of the result; what is per channel is narrow
            assert int(row["16-byte"].partition("/")[0]) >= (1 if row["kernel"] == "batch_stats_kernel" else 2), row


#: What instructions in 16 bits may do: convert to float32, and make constants.
HARMLESS = re.compile(r"HADD2\.F32 R\d+, -RZ, [^,]+ ;|HFMA2\S* R\d+, -RZ, RZ, [^,]+, [^,]+ ;")


def test_arithmetic_is_in_float32(library):
    """In bfloat16 nvcc would round a product twice for sm_80 and once for sm_90: findings/nvcc_bfloat16_contraction.sh."""
    narrow = set(re.findall(r"\bH(?:FMA2|ADD2|MUL2|MNMX2)\S* [^;]+;", output_of(tool("cuobjdump"), "-sass", library)))
    assert narrow and [instruction for instruction in narrow if not HARMLESS.fullmatch(instruction)] == []
    assert not any(map(HARMLESS.fullmatch, ("HFMA2.BF16_V2 R5, R2, R3, R4 ;", "HADD2 R5, R2, R3 ;", "HMUL2.BF16_V2 R5, R2, R3 ;")))


def test_the_table_of_kernels_is_one_command(library, monkeypatch, capsys):
    monkeypatch.setattr(native.CUDA, "path", library)
    assert main(["kernels", "--language", "cuda", "--name", "max_pool", "--csv"]) == 0
    title, names, *rows = capsys.readouterr().out.splitlines()
    assert title == "# cuda kernels" and names.startswith("kernel,")
    assert len(rows) == 2 * 12 and all(row.startswith("norm_act_max_pool_kernel") for row in rows)
    assert main(["kernels", "--language", "cuda", "--name", "gemm"]) == 2
    assert "argument --name: expected a part of a kernel's name, batch_stats_kernel" in capsys.readouterr().err
    monkeypatch.setattr(native.CUDA, "path", Path("absent.so"))
    assert main(["kernels", "--language", "cuda"]) == 1
    assert "the native library is not built" in capsys.readouterr().err


def test_the_page_of_the_kernels_is_what_one_command_makes(library, monkeypatch, tmp_path, capsys):
    """Of the compiler that the page names; of another, the same kernels, and what they move and compute."""
    page = ROOT / "docs" / "kernels" / "cuda.md"
    monkeypatch.setattr(native.CUDA, "path", library)
    text = page.read_text(encoding="utf-8")
    copy = tmp_path / "cuda.md"
    copy.write_text(with_section(text, native_kernels.COMMAND, "what was there before"))
    assert main(["kernels", "--language", "cuda", "--page", str(copy)]) == 0
    made = copy.read_text(encoding="utf-8")
    if native_kernels.compiler() in text:
        assert made == text, "fused-resnet kernels --language cuda --page docs/kernels/cuda.md"
    heads = [[line.split(" | ")[:5] for line in t.splitlines() if line.startswith("| `") and line.count("|") == 10] for t in (made, text)]
    assert heads[0] == heads[1] and len(heads[0]) > 30
    assert "and without 16-byte loads: 0 bytes spilled" in made
    for arguments, words in (
        ([str(ROOT / "README.md")], "argument --page: "),
        ([str(copy), "--language", "triton"], "argument --page: expected --language cuda"),
    ):
        assert main(["kernels", "--language", "cuda", "--page", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_depends_on_libtorch_and_on_neither_python_nor_a_shared_cudart(library):
    dynamic = output_of(tool("readelf"), "--dynamic", "--wide", library)
    needed = set(re.findall(r"\(NEEDED\).*\[([^\]]+)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name or "cuda" in name]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    symbols = output_of(tool("readelf"), "--dyn-syms", "--wide", library)
    undefined = re.findall(r" UND (\w+)", symbols)
    assert "torch_library_impl" in undefined
    assert not [name for name in undefined if name.startswith(("Py", "_Py", "_ZN2at", "_ZN3c10"))]


# ---- loading ---------------------------------------------------------------------------------------------------------

LOAD = """
import sys
from pathlib import Path
from fused_resnet import native
if len(sys.argv) > 1:
    native.CUDA.path = Path(sys.argv[1])
print(native.CUDA.why_not())
assert native.CUDA.why_not() == native.CUDA.why_not()
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
    """What `native.CUDA.why_not()` gives in a process of its own, and what `then` prints after it."""
    return output_of(sys.executable, "-c", LOAD + then, *arguments).splitlines()


def test_loads_or_says_why_not():
    (answer,) = loaded()
    assert answer == "None" or answer.startswith(("not built: ", "does not load: "))
    if not native.CUDA.path.exists():
        assert answer.startswith("not built: ")


def test_the_reason_of_the_build_is_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(native.CUDA, "path", tmp_path / "absent.so")
    monkeypatch.setattr(native.CUDA, "absence", tmp_path / "absent.txt")
    with pytest.raises(native.LibraryError, match="--no-build-isolation"):
        native.CUDA.load()
    (tmp_path / "absent.txt").write_text("nvcc was not found\n")
    with pytest.raises(native.LibraryError, match=r"^not built: nvcc was not found$"):
        native.CUDA.load()


def test_loads_without_a_gpu_and_refuses_cpu_tensors_by_name(library):
    assert loaded(library, then=CALL_ON_CPU) == ["None", "norm_add_act: x: expected a CUDA tensor"]


@pytest.mark.parametrize("content", [b"", b"not a library at all\n", b"\x7fELF" + bytes(60)], ids=["empty", "text", "header"])
def test_a_file_that_is_no_library_gives_a_reason(tmp_path, content):
    (tmp_path / "lib.so").write_bytes(content)
    (answer,) = loaded(tmp_path / "lib.so")
    assert answer.startswith("does not load: ")
    assert len(answer) > len("does not load: ")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_truncated_library_gives_a_reason(library, tmp_path, keep):
    whole = library.read_bytes()
    (tmp_path / "lib.so").write_bytes(whole[: int(len(whole) * keep)])
    (answer,) = loaded(tmp_path / "lib.so")
    assert answer.startswith("does not load: ")


# ---- the operators ---------------------------------------------------------------------------------------------------


def nhwc(*shape, dtype=torch.float16):
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


def vectors(count, channels=16):
    return [torch.rand(channels, device=DEVICE) for _ in range(count)]


@pytest.fixture(params=[name for name in LANGUAGES if name != "passes_triton"])
def operators(request):
    """A native library's operators: on a CPU, those for CPUs, and of the CUDA kernels the build for the host, which has the same checks."""
    return BACKENDS[request.param].operators


def calls() -> dict[str, dict]:
    """Good arguments of each operator, by name."""
    x, statistics = nhwc(2, 16, 4, 4), dict(zip(("mean", "invstd", "scale", "bias"), vectors(4), strict=True))
    affine = {name: statistics[name] for name in ("scale", "bias")}
    raw = dict(zip(("residual_mean", "residual_invstd"), vectors(2), strict=True))
    mask = torch.zeros(2, 4, 4, 2, dtype=torch.uint8, device=DEVICE)
    window = {"kernel_size": 3, "stride": 2, "padding": 1}
    pooled = nhwc(2, 16, 2, 2)
    return {
        "batch_stats": {"y": x, "gamma": vectors(1)[0], "beta": None, "eps": 1e-5},
        "batch_moments": {"y": x},
        "merge_moments": {
            "counts": torch.ones(3, dtype=torch.int64, device=DEVICE), "means": torch.rand(3, 16, device=DEVICE),
            "m2s": torch.rand(3, 16, device=DEVICE), "gamma": None, "beta": None, "eps": 1e-5,
        },
        "norm_add_act": {
            "x": x, **affine, "residual": nhwc(*x.shape), "residual_scale": affine["scale"], "residual_bias": affine["bias"],
            "relu": True, "save_mask": True,
        },
        "norm_backward_reduce": {
            "d": nhwc(*x.shape), "dact": nhwc(*x.shape), "x": x, **statistics, "residual": nhwc(*x.shape), **raw, "mask": mask, "relu": True,
        },
        "norm_backward_apply": {
            "dz": nhwc(*x.shape), "y": x, "mean": statistics["mean"], "invstd": statistics["invstd"], "gamma": None,
            "s1": vectors(1)[0], "s2": vectors(1)[0],
        },
        "norm_act_max_pool": {"x": x, **affine, **window},
        "norm_act_max_pool_backward": {"dout": pooled, "index": pooled.to(torch.uint8), "x": x, **statistics, **window},
        "norm_add_act_avg_pool": {"x": x, **affine, "residual": nhwc(*x.shape), "residual_scale": None, "residual_bias": None},
        "norm_add_act_avg_pool_backward": {
            "dout": nhwc(2, 16, 1, 1), "x": x, **statistics, "residual": nhwc(*x.shape), **raw, "mask": mask,
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", calls())
def test_a_wrong_argument_is_named(operators, name):
    operator, good = getattr(operators, name), calls()[name]
    operator(**good)
    for argument, value in good.items():
        if not isinstance(value, torch.Tensor):
            continue
        wrong = [value[..., None], value.double(), value.to("meta")] if value.dim() != 4 else [value[0], value.double(), value.to("meta")]
        wrong += [value.contiguous()] if value.dim() == 4 and argument != "mask" and value.shape[2] > 1 else []
        wrong += [value[:1]] if len(good) > 1 and argument not in ("x", "y", "means") else []
        if value.dim() == 1 and value.dtype == torch.float32:
            wrong += [value.half(), value.repeat_interleave(2)[::2]]
        for bad in wrong:
            if bad.device.type == "meta":  # PyTorch itself finds no kernel for it, or ours says what it expected
                with pytest.raises((RuntimeError, NotImplementedError)):
                    operator(**{**good, argument: bad})
                continue
            with pytest.raises(RuntimeError, match=rf"^{name}: (\w+): expected") as caught:
                operator(**{**good, argument: bad})
            # An activation stands for the others' shape and dtype, so that one of those may be named in its place.
            named = re.match(rf"^{name}: (\w+):", str(caught.value))[1]
            assert named == argument or argument in ("x", "y", "means", "dout"), (argument, named)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("batch_stats", {"y": nhwc(0, 16, 4, 4)}, "y: expected at least one element"),
        ("batch_stats", {"y": nhwc(2, 16, 4, 4).to(torch.int32)}, "y: expected float32, float16 or bfloat16, got Int"),
        ("norm_add_act", {"residual": None}, "residual_scale: expected a residual with it"),
        ("norm_add_act", {"residual_scale": None}, "residual_scale: expected a tensor, since residual_bias is given"),
        ("norm_add_act", {"residual_bias": None}, "residual_bias: expected a tensor, since residual_scale is given"),
        ("norm_backward_reduce", {"mask": None}, "mask: expected a tensor, since relu and residual are given"),
        ("norm_backward_reduce", {"residual": None}, "residual: expected a tensor, since residual_mean is given"),
        ("norm_backward_reduce", {"residual_invstd": None}, "residual_invstd: expected a tensor, since residual is given"),
        ("norm_add_act_avg_pool_backward", {"mask": None}, "mask: expected a tensor, since residual is given"),
        ("norm_act_max_pool", {"kernel_size": 17}, "kernel_size: expected 1 to 16, got 17"),
        ("norm_act_max_pool", {"stride": 0}, "stride: expected at least 1, got 0"),
        ("norm_act_max_pool", {"padding": 2}, "padding: expected 0 to half of kernel_size, got 2"),
        ("norm_act_max_pool", {"kernel_size": 9, "padding": 0}, "x: expected a spatial size that a window of 9 fits into"),
    ],
)
def test_what_does_not_go_together_is_refused(operators, name, change, message):
    with pytest.raises(RuntimeError, match=f"^{name}: {re.escape(message)}"):
        getattr(operators, name)(**{**calls()[name], **change})


def test_unaligned_tensors_take_the_narrow_path(operators):
    x, (scale, bias) = nhwc(2, 64, 6, 6), vectors(2, 64)
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)
    shifted = flat[1:].view(2, 6, 6, 64).permute(0, 3, 1, 2).copy_(x)  # 2 bytes past a 16-byte boundary
    expected = Reference().norm_add_act(Source(x, scale=scale, bias=bias, residual=x), True, True)
    for given in (x, shifted):
        act, mask = operators.norm_add_act(given, scale, bias, given, None, None, True, True)
        assert torch.equal(act, expected[0]) and torch.equal(mask, expected[1])


@pytest.mark.gpu
def test_operators_run_on_the_current_stream(operators):
    x, (scale, bias) = nhwc(8, 64, 28, 28), vectors(2, 64)
    expected, _ = Reference().norm_add_act(Source(x, scale=scale, bias=bias), True, False)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(DEVICE)
    operators.norm_add_act(x, scale, bias, None, None, None, True, False)  # loads the kernel, which is not for a capture
    torch.cuda.synchronize(DEVICE)
    with torch.cuda.graph(graph, stream=stream):  # work on any other stream would break the capture
        act, _ = operators.norm_add_act(x, scale, bias, None, None, None, True, False)
    act.fill_(-1.0)
    graph.replay()
    torch.cuda.synchronize(DEVICE)
    assert torch.equal(act, expected)
