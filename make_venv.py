"""What `make` runs to set up its environment: `python make_venv.py .venv [--tests | --all-tests] [--constraints FILE] [-- flags of pip]`.

Of PyTorch it takes, in this order: the one that this Python has already, where it is new enough; on a machine without an NVIDIA GPU a
build for CPUs, where a configured index has one; else the default build, which on Linux brings CUDA's libraries. What it fetches it says
first. Then the package is built against that PyTorch, without a second copy in a build environment of its own.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
#: Oldest PyTorch that is supported; pyproject.toml has it, too.
OLDEST_TORCH = (2, 11)
#: Before the package, whose build needs them.
BUILD = ("setuptools>=77", "wheel", "ninja", "cmake")
#: Of PyTorch 2.14.1 for Linux and CUDA 13 with all that it asks for: measured.
CUDA_SIZE = "about 3.1 GB to fetch, 5.3 GB on disk"
#: Says which native libraries there are.
TOLD = """
from fused_resnet.native import CPU, CUDA
for library in (CUDA, CPU):
    print(f"native library {library.path.name}: {library.why_not() or 'built'}")
"""
#: Lines of pip's that ask nothing of anybody here.
NOISE = re.compile(r"WARNING: (Location '.*' is ignored|Running pip as the 'root' user|Cache entry deserialization failed)|\[notice\]")
#: Lines of pip's that show how far it is.
PROGRESS = re.compile(r"\s*(Downloading \S+ \(.*\)|Installing collected packages|Successfully installed|Building \w+ for)")


def shown(line: str) -> str | None:
    """What of a line of pip's a user should see."""
    if NOISE.search(line):
        return None
    if re.match(r"\s*(WARNING|ERROR|error|Traceback|DEPRECATION)", line):
        return line.rstrip()
    if not (found := PROGRESS.match(line)):
        return None
    text = found[1].replace(".metadata", "")
    return None if ".metadata" in line else "    " + (text if len(text) < 100 else text[:97] + "...")


def release(version: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def pinned_torch(constraints: str) -> str | None:
    """The version that a file of constraints pins PyTorch to."""
    found = re.search(r"^torch==([^\s;]+)", Path(constraints).read_text(), re.MULTILINE) if constraints else None
    return found and found[1]


def cpu_build(listing: str, pinned: str | None = None) -> str | None:
    """The newest build for CPUs in what `pip index versions torch` printed, None where there is none that is new enough, or `pinned`."""
    found = [version for version in re.findall(r"\b[\d.]+\+cpu\b", listing) if release(version) >= OLDEST_TORCH]
    return max((v for v in found if pinned in (None, v, v.partition("+")[0])), key=release, default=None)


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU."""
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def torch_here(pinned: str | None = None) -> str | None:
    """The version of this Python's PyTorch where it is new enough, or `pinned`, else None."""
    program = "import torch; print(torch.__version__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    version = done.stdout.strip()
    fits = done.returncode == 0 and release(version) >= OLDEST_TORCH and pinned in (None, version, version.partition("+")[0])
    return version if fits else None


class Pip:
    """The environment's pip."""

    def __init__(self, python: Path, constraints: str, flags: list[str]):
        self.command = [str(python), "-m", "pip", "--disable-pip-version-check"]
        self.flags, self.constraints = flags, ["-c", constraints] if constraints else []

    def install(self, *arguments: str, **environment: str) -> None:
        """Install, showing progress; `environment` is for builds. Raises SystemExit with pip's last lines where it fails."""
        command = [*self.command, "install", "--progress-bar", "off", *self.constraints, *self.flags, *arguments]
        lines, pipe, environment = [], subprocess.PIPE, {**os.environ, **environment}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout:
                lines.append(line)
                if text := shown(line):
                    print(text, flush=True)
        if process.returncode:
            tail = "".join(line for line in lines[-30:] if not NOISE.search(line))
            raise SystemExit(f"pip failed ({process.returncode}): {' '.join(command)}\n{tail}")

    def listing(self, package: str) -> str:
        """What the configured indices have of a package; "" where they can't be asked."""
        return subprocess.run([*self.command, "index", "versions", package, *self.flags], capture_output=True, text=True).stdout


def torch_requirement(pip: Pip, pinned: str | None) -> str:
    """What to ask pip for. Prints what that will fetch."""
    if has_gpu() or sys.platform != "linux":
        print("fetching PyTorch's default build" + f"; with CUDA's libraries that is {CUDA_SIZE}" * (sys.platform == "linux"), flush=True)
        return "torch>=" + ".".join(map(str, OLDEST_TORCH))
    if version := cpu_build(pip.listing("torch"), pinned):
        print(f"no NVIDIA GPU here: fetching PyTorch {version}, a build for CPUs, about 0.2 GB; Triton is 0.25 GB more", flush=True)
        return f"torch=={version}"
    print(
        f"fetching PyTorch's default build, which brings CUDA's libraries: {CUDA_SIZE}.\n"
        "This machine has no NVIDIA GPU, and the configured package index no build for CPUs, which has 0.2 GB. To take one, stop, and\n"
        "give pip the index of such builds that pytorch.org names: make demo PIP_FLAGS='--extra-index-url URL'. Or use a PyTorch that\n"
        "is there: make demo PYTHON=/path/to/its/python VENV=",
        flush=True,
    )
    return "torch>=" + ".".join(map(str, OLDEST_TORCH))


def create(folder: Path, shared: bool) -> None:
    """An environment, which sees this Python's packages where they are shared."""
    venv.create(folder, with_pip=True, system_site_packages=shared)
    if shared and sys.prefix != sys.base_prefix:  # this Python is itself an environment's, which a new one does not see
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "outer_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Set up an environment.", epilog="After -- stand flags of pip.")
    parser.add_argument("folder", type=Path, help="of the environment")
    tests = parser.add_mutually_exclusive_group()
    tests.add_argument("--tests", action="store_true", help="what the tests need, into an environment that is there")
    tests.add_argument("--all-tests", action="store_true", help="and the libraries that make test-all shows a fused network to")
    parser.add_argument("--constraints", default="", help="a file of pip's constraints")
    own = sys.argv[1:] if arguments is None else arguments
    end = own.index("--") if "--" in own else len(own)
    args, flags = parser.parse_args(own[:end]), own[end + 1 :]
    python = args.folder / "bin" / "python"
    pip = Pip(python.absolute(), args.constraints, flags)
    if args.tests or args.all_tests:
        if not python.exists():
            parser.error(f"folder: expected an environment, but there is no {python}; make it without --tests first")
        print(f"fetching what the tests need: about {0.4 if args.all_tests else 0.2} GB", flush=True)
        # The native libraries are built, which takes minutes: a package in place keeps what it has.
        pip.install("--no-build-isolation", "-e", ".[test-all]" if args.all_tests else ".[test]", FUSED_RESNET_NATIVE="0")
        # torchvision has no build that goes with every PyTorch; the tests need no more than its Python code. The others ask for it.
        pip.install("--no-deps", "torchvision", "timm", *(["grad-cam", "ttach"] if args.all_tests else []))
        return
    pinned = pinned_torch(args.constraints)
    if here := torch_here(pinned):
        print(f"using PyTorch {here} of {sys.executable}", flush=True)
    create(args.folder, shared=here is not None)
    pip.install(*BUILD, *([] if here else [torch_requirement(pip, pinned)]))
    print("building the package: minutes where nvcc compiles the native library", flush=True)
    pip.install("--no-build-isolation", "-e", ".")
    subprocess.run([str(python.absolute()), "-c", TOLD], check=True)


if __name__ == "__main__":
    main()
