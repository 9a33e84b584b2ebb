"""Builds the native libraries with CMake where the tools are at hand, and installs the package without one where they are not.

`FUSED_RESNET_NATIVE` decides: unset, a library is built if it can be; `1`, a library that can't be built is an error; `cpu`, the one for
CPUs has to be built, and the other is not; `0`, none is built. Everything else about the package stands in pyproject.toml, and about the
libraries in CMakeLists.txt and csrc/cpu/CMakeLists.txt.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
LOG_TAIL = 30


class Missing(Exception):
    """Something that the native build needs is not there; the message says what."""


def program(name: str, module: str | None = None) -> str:
    """The path of a build tool: on PATH, beside this Python, or in the pip package `module` that carries it."""
    if found := shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent)):
        return found
    if module and (spec := importlib.util.find_spec(module)) and spec.origin:
        packaged = Path(spec.origin).parent / "data" / "bin" / name
        if packaged.exists():
            return str(packaged)
    raise Missing(f"{name} was not found")


def cuda_compiler() -> str:
    """nvcc: what CUDACXX names, else in CUDA_HOME, on PATH, or in /usr/local/cuda."""
    if named := os.environ.get("CUDACXX"):
        if found := shutil.which(named):
            return found
        raise Missing(f"CUDACXX names {named}, which does not exist")
    home = os.environ.get("CUDA_HOME")
    for candidate in (home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"):
        if candidate and (found := shutil.which(candidate)):
            return found
    raise Missing("nvcc was not found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)")


def cxx_compiler() -> str:
    """A C++ compiler: what CXX names, else the first of c++, g++ and clang++ on PATH."""
    if named := os.environ.get("CXX"):
        if found := shutil.which(named):
            return found
        raise Missing(f"CXX names {named}, which does not exist")
    for candidate in ("c++", "g++", "clang++"):
        if found := shutil.which(candidate):
            return found
    raise Missing("no C++ compiler was found (CXX, or c++, g++, clang++ on PATH)")


def torch_directories() -> tuple[list[str], str]:
    """PyTorch's header directories and its library directory, from the PyTorch that this Python imports."""
    try:
        import torch
    except ImportError:
        raise Missing("PyTorch is not in the build environment (--no-build-isolation builds against the installed one)") from None
    oldest = ".".join(map(str, OLDEST_TORCH))
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise Missing(f"PyTorch {torch.__version__} is older than {oldest}")
    home = Path(torch.__file__).parent
    headers = home / "include"
    if not (headers / "torch/csrc/stable/library.h").exists():
        raise Missing(f"PyTorch's headers are not in {headers}")
    return [str(headers)], str(home / "lib")


def run(command: list[str]) -> str:
    """The output of a build step. A failure carries its last lines."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if result.returncode:
        tail = "\n".join(result.stdout.splitlines()[-LOG_TAIL:])
        raise subprocess.CalledProcessError(result.returncode, command, output=tail)
    return result.stdout


@dataclass(frozen=True)
class Library:
    """A native library: what it is for, where its CMakeLists.txt is, and its files beside the package."""

    device: str
    source: str  #: from the root
    file: str
    absence: str  #: instead of the library: why there is none. `fused_resnet.native` shows it.
    instead: str  #: what serves without it
    options: Callable[[], list[str]]  #: CMake's, beside what all have

    def build(self, folder: Path) -> Path:
        """Configure and compile in `folder`. Returns the library. Raises Missing, or CalledProcessError with the log's tail."""
        if not sys.platform.startswith("linux"):
            raise Missing(f"the native library is built on Linux, not on {sys.platform}")
        options, cmake, ninja = self.options(), program("cmake", "cmake"), program("ninja")
        includes, libraries = torch_directories()
        run([
            cmake, "-S", str(ROOT / self.source), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options,
            f"-DTORCH_INCLUDE_DIRS={';'.join(includes)}", f"-DTORCH_LIBRARY_DIR={libraries}",
        ])  # fmt: skip
        run([cmake, "--build", str(folder)])
        return folder / self.file


LIBRARIES = (
    Library(
        "GPUs", ".", "libfused_resnet.so", "native_absent.txt", "Triton",
        lambda: [f"-DCMAKE_CUDA_COMPILER={cuda_compiler()}"],
    ),
    Library(
        "CPUs", "csrc/cpu", "libfused_resnet_cpu.so", "native_cpu_absent.txt", "PyTorch's own modules",
        lambda: [f"-DCMAKE_CXX_COMPILER={cxx_compiler()}"],
    ),
)  # fmt: skip


class build_native(Command):  # named as setuptools names its commands
    """Build the native libraries into the package."""

    description = "build the native libraries (for CUDA GPUs and for CPUs)"
    user_options = [("build-lib=", "b", "where the package is assembled"), ("build-temp=", "t", "where CMake works")]  # noqa: RUF012

    def initialize_options(self):
        self.build_lib = self.build_temp = None
        self.editable_mode = False
        self.built = False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"), ("build_temp", "build_temp"))

    @property
    def package(self) -> Path:
        return ROOT / "fused_resnet" if self.editable_mode else Path(self.build_lib) / "fused_resnet"

    def run(self):
        choice = os.environ.get("FUSED_RESNET_NATIVE", "").strip()
        if choice not in ("", "0", "1", "cpu"):
            raise ExecError(f"FUSED_RESNET_NATIVE: expected 0, 1, cpu or nothing, got {choice!r}")
        for library in LIBRARIES:
            self.make(library, choice)

    def make(self, library: Library, choice: str):
        """Build and install one library, or say why there is none."""
        log, wanted = "", choice == "1" or (choice == "cpu" and library.device == "CPUs")
        try:
            if choice and not wanted:
                raise Missing(f"FUSED_RESNET_NATIVE={choice}")
            built = library.build(Path(self.build_temp).resolve() / library.device)
        except Missing as missing:
            reason = str(missing)
        except subprocess.CalledProcessError as failure:
            step = "compilation" if "--build" in failure.cmd else "CMake's configuration"
            reason, log = f"{step} failed with status {failure.returncode}", failure.output
        else:
            self.install(library, built)
            return
        name = f"native library for {library.device}"
        if wanted:
            raise ExecError(f"{log}\nfused_resnet: FUSED_RESNET_NATIVE={choice}, but the {name} was not built: {reason}")
        self.install_without(library, reason)
        if log:
            print(log, file=sys.stderr)
        print(f"fused_resnet: {name} not built: {reason}; {library.instead} will serve", file=sys.stderr, flush=True)

    def install(self, library: Library, built: Path):
        self.package.mkdir(parents=True, exist_ok=True)
        (self.package / library.absence).unlink(missing_ok=True)
        # Under another name first: a process may have the old library mapped.
        staged = self.package / (library.file + ".new")
        shutil.copyfile(built, staged)
        staged.replace(self.package / library.file)
        self.built = True

    def install_without(self, library: Library, reason: str):
        if self.editable_mode:  # the source tree keeps what it has
            return
        self.package.mkdir(parents=True, exist_ok=True)
        (self.package / library.file).unlink(missing_ok=True)  # of an earlier build in the same folder
        (self.package / library.absence).write_text(reason + "\n", encoding="utf-8")

    # What setuptools asks of a step of `build`.

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file())]

    def get_outputs(self) -> list[str]:
        names = [name for library in LIBRARIES for name in (library.file, library.absence)]
        return [str(p) for name in names if (p := Path(self.build_lib) / "fused_resnet" / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class native_build(build):
    """`build`, with the native libraries as its last step."""

    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012


class native_wheel(bdist_wheel):
    """A wheel for every Python 3, and for this platform alone if it holds a library. Asked after the build has run."""

    @property
    def native(self) -> bool:
        return self.get_finalized_command("build_native").built

    def get_tag(self) -> tuple[str, str, str]:
        if not self.native:
            return super().get_tag()
        return "py3", "none", self.plat_name.lower().replace("-", "_").replace(".", "_")

    def write_wheelfile(self, *args, **kwargs):
        self.root_is_pure = not self.native
        super().write_wheelfile(*args, **kwargs)


setup(cmdclass={"build": native_build, "build_native": build_native, "bdist_wheel": native_wheel})
