"""What `pip` makes of a checkout: with the tools of the native build and without them."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.checkout import ROOT

LIBRARY = "fused_resnet/libfused_resnet.so"
CPU_LIBRARY = "fused_resnet/libfused_resnet_cpu.so"
#: The quickest to compile; what the library should hold is tested with the library.
PTX = "90-virtual"
#: The line that an install without a native library prints: for what, and why.
NOT_BUILT = re.compile(
    r"fused_resnet: native library for (\w+) not built: (.+); (?:Triton|PyTorch's own modules) will serve$", re.MULTILINE
)


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the checkout: tracked files, and new ones that git does not ignore."""
    git = shutil.which("git")
    if not git or subprocess.run([git, "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        [git, "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    copy = tmp_path / "source"
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture
def nvcc() -> str:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc") or pytest.skip("nvcc is not installed")


def run(*command, cwd: Path, **environment: str | None) -> subprocess.CompletedProcess:
    """Run a command; `environment` replaces variables, None removes one. stdout holds stderr too."""
    changed = {"FUSED_RESNET_NATIVE": None, "CUDA_HOME": None, "CUDACXX": None, "OMP_NUM_THREADS": "1", **environment}
    merged = {k: v for k, v in {**os.environ, **changed}.items() if v is not None}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=merged, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wheel(source: Path, **environment: str | None) -> tuple[Path, str]:
    """Build a wheel of `source` in this Python, without network. Returns it and what pip printed."""
    out = source.parent / "dist"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    done = run(*pip, "wheel", ".", "-v", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, cwd=source, **environment)
    assert done.returncode == 0, done.stdout[-4000:]
    (built,) = out.glob("*.whl")
    return built, done.stdout


def test_wheel_without_compilers_says_what_is_missing(source):
    for library in (LIBRARY, CPU_LIBRARY):
        (source / library).write_bytes(b"left over from another build")
    built, output = wheel(source, CUDACXX="/nonexistent/nvcc", CXX="/nonexistent/c++")
    reasons = [f"{variable} names /nonexistent/{name}, which does not exist" for variable, name in (("CUDACXX", "nvcc"), ("CXX", "c++"))]
    assert NOT_BUILT.findall(output) == list(zip(("GPUs", "CPUs"), reasons, strict=True))
    assert re.fullmatch(r"fused_resnet-[\d.]+-py3-none-any\.whl", built.name)

    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
        info = next(name.partition("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        absences = [archive.read(f"fused_resnet/{name}").decode() for name in ("native_absent.txt", "native_cpu_absent.txt")]

    assert [absence.strip() for absence in absences] == reasons
    assert not {LIBRARY, CPU_LIBRARY} & names
    assert f"{info}/licenses/LICENSE" in names
    assert "fused_resnet/py.typed" in names
    shipped = {p.relative_to(source).as_posix() for p in (source / "fused_resnet").rglob("*") if p.suffix != ".so" and p.is_file()}
    assert shipped - names == set()
    assert any(name.startswith("fused_resnet/data/fashion_mnist/") and name.endswith(".gz") for name in names)
    assert "fused_resnet/train/recipes/he2015-cifar10.toml" in names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "csrc/", "docs/"))]
    assert "fused-resnet = fused_resnet.cli:main" in entry_points

    version = re.search(r'__version__ = "(.+)"', (source / "fused_resnet/_version.py").read_text())[1]
    assert (metadata["Name"], metadata["Version"]) == ("fused-resnet", version)
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    for page in ("README.md", "CHANGELOG.md"):
        assert (source / page).read_text().strip() in metadata.get_payload(decode=True).decode()
    assert metadata["License-Expression"] == "MIT"
    required = {line.replace('"', "'") for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == {
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy",
        "rich",
        "matplotlib",
        "tomli; python_version < '3.11'",
    }
    extras = {line.partition(";")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" in line}
    assert extras == {
        "numpy<2.4", "nvidia-cudnn-frontend<1.29,>=1.27", "nvidia-cudnn-frontend>=1.27", "pytest", "pytest-benchmark", "pytest-timeout",
        "pytest-xdist", "hypothesis", "ruff", "mypy==2.4.1", "clang-format==23.1.*", "huggingface_hub", "safetensors", "pyyaml", "onnx", "onnxruntime", "onnxscript",
        "pytorch-lightning", "tensorboard", "timm", "torchvision", "fused_resnet[test]", "accelerate", "captum", "peft", "pytorch-ignite",
        "pytorch-metric-learning", "skorch", "torch-pruning", "tqdm", "opencv-python-headless", "scikit-learn",
    }  # fmt: skip


def test_the_library_for_cpus_needs_no_nvcc(source):
    done = run(
        sys.executable, "setup.py", "build_native", "--build-lib", ".", cwd=source, CUDACXX="/nonexistent/nvcc", FUSED_RESNET_NATIVE="cpu"
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert NOT_BUILT.findall(done.stdout) == [("GPUs", "FUSED_RESNET_NATIVE=cpu")]
    assert (source / CPU_LIBRARY).read_bytes().startswith(b"\x7fELF")


@pytest.mark.slow
def test_wheel_with_compilers_holds_the_libraries(source, nvcc):
    built, output = wheel(source, CUDACXX=nvcc, CUDAARCHS=PTX, FUSED_RESNET_NATIVE="1")
    assert NOT_BUILT.findall(output) == []
    assert re.fullmatch(r"fused_resnet-[\d.]+-py3-none-linux_\w+\.whl", built.name)
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
        assert all(archive.read(library).startswith(b"\x7fELF") for library in (LIBRARY, CPU_LIBRARY))
        wheel_file = email.message_from_bytes(archive.read(next(n for n in names if n.endswith(".dist-info/WHEEL"))))
    assert wheel_file["Root-Is-Purelib"] == "false"
    assert re.fullmatch(r"py3-none-linux_\w+", wheel_file["Tag"])
    assert "fused_resnet/__init__.py" in names
    assert not [name for name in names if name.endswith("absent.txt")]
    assert not (source / LIBRARY).exists()


@pytest.mark.slow
def test_editable_install_puts_the_library_in_the_package(source, nvcc):
    hook = "import sys; from setuptools import build_meta; print(build_meta.build_editable(sys.argv[1]))"
    environment = {"CUDACXX": nvcc, "CUDAARCHS": PTX, "FUSED_RESNET_NATIVE": "1"}
    done = run(sys.executable, "-c", hook, source.parent, cwd=source, **environment)
    assert done.returncode == 0, done.stdout[-4000:]
    assert (source / LIBRARY).read_bytes().startswith(b"\x7fELF")


def test_a_failing_compiler_is_an_error_only_when_forced(source, nvcc):
    for file in ("csrc/library.cpp", "csrc/norm_add_act.cu", "csrc/cpu/kernels.cpp"):
        (source / file).write_text('#error "this does not compile"\n')
    environment = {"CUDACXX": nvcc, "CUDAARCHS": PTX}
    build = (sys.executable, "setup.py", "build_native")
    tolerant = run(*build, cwd=source, **environment)
    assert tolerant.returncode == 0, tolerant.stdout[-4000:]
    assert NOT_BUILT.findall(tolerant.stdout) == [(device, "compilation failed with status 1") for device in ("GPUs", "CPUs")]
    assert "this does not compile" in tolerant.stdout
    forced = run(*build, cwd=source, FUSED_RESNET_NATIVE="1", **environment)
    assert forced.returncode != 0
    assert "this does not compile" in forced.stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FUSED_RESNET_NATIVE": "0"}, "FUSED_RESNET_NATIVE=0"),
        ({"PYTHONNOUSERSITE": "1", "CUDACXX": sys.executable, "PYTHONPATH": "without_torch"}, "PyTorch is not in the build"),
    ],
    ids=["switched-off", "isolated"],
)
def test_build_says_why_there_is_no_library(source, environment, reason):
    (source / "without_torch").mkdir()
    (source / "without_torch/torch.py").write_text("raise ImportError('hidden by a test')")
    done = run(sys.executable, "setup.py", "build_native", cwd=source, **environment)
    assert done.returncode == 0, done.stdout[-4000:]
    said = NOT_BUILT.findall(done.stdout)
    assert [device for device, _ in said] == ["GPUs", "CPUs"]
    assert all(why.startswith(reason) for _, why in said)


def test_forcing_without_nvcc_is_an_error(source):
    done = run(sys.executable, "setup.py", "build_native", cwd=source, CUDACXX="/nonexistent/nvcc", FUSED_RESNET_NATIVE="1")
    assert done.returncode != 0
    assert "CUDACXX names /nonexistent/nvcc" in done.stdout


def test_source_distribution_holds_what_the_native_build_needs(source):
    hook = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    done = run(sys.executable, "-c", hook, source.parent, cwd=source)
    assert done.returncode == 0, done.stdout[-4000:]
    (archive,) = source.parent.glob("fused_resnet-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {p.relative_to(source).as_posix() for p in (source / "csrc").rglob("*") if p.is_file()}
    needed = {"CMakeLists.txt", "setup.py", "LICENSE", "CHANGELOG.md"} | sources
    assert needed - names == set()
