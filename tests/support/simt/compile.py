"""Compiles CUDA sources for the host, so that their kernels run on a CPU. docs/simt.md says what is modelled and what is not.

    python tests/support/simt/compile.py FLAVOUR SOURCE...
    python tests/support/simt/compile.py FLAVOUR -- COMMAND...

The first builds the sources, which define `extern "C" int main()`, and calls it in a process with the flavour's environment. The
second runs any command in that environment.
"""

import ctypes
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "simt"
#: What an `extern __shared__` array may have at most: the opt-in limit of compute capability 9.0.
DYNAMIC_SHARED_BYTES = 227 * 1024
COMPILERS_AT_ONCE = 2

COMMON = (
    "-std=c++17", "-O1", "-g", "-fPIC", "-ffp-contract=off", "-fno-omit-frame-pointer",
    "-fno-gnu-unique",  # two libraries with the same template keep two copies of its variables
    "-fno-extern-tls-init",  # a shared variable has no constructor
    "-fstack-clash-protection",  # a frame of any size meets the guard below the stack
)  # fmt: skip
KERNELS = {
    "plain": (),
    "asan": ("-fsanitize=address",),
    "ubsan": ("-fsanitize=undefined,bounds,alignment", "-fno-sanitize=vptr"),
    "race": ("-fsanitize=thread",),
}
_ENGINE = ("engine.cpp", "reports.cpp", "signals.cpp")
#: Sources of the engine, with their flags, and flags of the linker. The callbacks of ubsan and race are the engine's own.
ENGINE = {
    "plain": (_ENGINE, (), ()),
    "asan": (_ENGINE, ("-DSIMT_ASAN",), ("-fsanitize=address",)),
    "ubsan": ((*_ENGINE, "undefined.cpp"), (), ()),
    "race": ((*_ENGINE, "race.cpp"), ("-DSIMT_RACE", "-O2"), ("-Wl,--wrap=memcpy,--wrap=memmove,--wrap=memset",)),
}
FLAVOURS = tuple(KERNELS)
#: What a process that loads an asan library begins with. libstdc++ too, since AddressSanitizer looks for __cxa_throw at the start.
ASAN_RUNTIME = ("libasan.so", "libstdc++.so.6")


class CompileError(RuntimeError):
    """A compiler or linker failed; the message holds its command and its output."""


def _runtime(name: str) -> str:
    """The path of a library of the compiler; the name itself if there is none."""
    return _run(["g++", f"-print-file-name={name}"]).strip()


@functools.cache
def why_not() -> str | None:
    """None if `library` can work on this machine, else a sentence that says why not."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "the engine switches fibers on x86-64 Linux alone"
    absent = [tool for tool in ("g++", "readelf", "objcopy", "addr2line", "c++filt") if not shutil.which(tool)]
    if "g++" not in absent:
        absent += [name for name in ASAN_RUNTIME if not Path(_runtime(name)).is_absolute()]
    return f"{', '.join(absent)}: not found" if absent else None


def environment(flavour: str) -> dict[str, str]:
    """The environment in which a Python process can load a library of this flavour: this process's, and for asan its runtime."""
    values = dict(os.environ)
    if flavour == "asan":
        values["LD_PRELOAD"] = ":".join(map(_runtime, ASAN_RUNTIME))
        values["ASAN_OPTIONS"] = "detect_leaks=0"  # Python's own
    return values


def _run(command: Sequence[object]) -> str:
    """The standard output of a command; CompileError with all of its output if it fails."""
    words = [str(word) for word in command]
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # of `environment`: not for compilers
    result = subprocess.run(words, cwd=ROOT, env=clean, capture_output=True, text=True, errors="replace")
    if result.returncode:
        raise CompileError(f"{' '.join(words)}\nexit status {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]


def _stamp(path: str) -> list[int] | None:
    """What changes when a file is written; None if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_mtime_ns, status.st_size]


def _write(path: Path, text: str):
    """At once, for those who read without the lock."""
    staged = path.with_suffix(".new")
    staged.write_text(text)
    staged.replace(path)


class _Object:
    """A source, compiled with certain flags, in a folder that is named by both."""

    def __init__(self, source: Path, flags: Sequence[str]):
        # A .cu file is C++ here; CUDA's headers are the stand-ins of this folder.
        self.command = ["g++", *COMMON, f"-I{HERE}", *flags, "-x", "c++", "-c", str(source)]
        self.folder = BUILD / "objects" / _digest(self.command)
        self.path = self.folder / "object.o"

    def inputs(self) -> dict[str, list[int]] | None:
        """The stamps of all files that were read to compile it; None if it is not there, or one of them has changed."""
        try:
            inputs = json.loads((self.folder / "inputs.json").read_text())
        except OSError:
            return None
        return inputs if all(_stamp(path) == stamp for path, stamp in inputs.items()) else None

    def compile(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        inputs, rules = self.folder / "inputs.json", self.folder / "rules.d"
        inputs.unlink(missing_ok=True)
        begun = time.time_ns()
        _run([*self.command, "-MD", "-MF", rules, "-o", self.path])
        # Lists the kernels with bounds (see __launch_bounds__), which the engine finds without it, and refers to functions
        # that the linker drops as duplicates.
        _run(["objcopy", "--remove-section=__patchable_function_entries", self.path])
        names = rules.read_text().replace("\\\n", " ").partition(": ")[2].split()
        stamps = {name: _stamp(name) for name in names}
        if None in stamps.values() or max(stamps.values())[0] >= begun:
            raise CompileError(f"{self.command[-1]}: it, or a header of it, was changed while it was compiled")
        _write(inputs, json.dumps(stamps))

    def dynamic_shared(self) -> set[str]:
        """The names of its `extern __shared__` arrays: thread-local symbols that it does not define."""
        return set(re.findall(r"\bTLS\s+\w+\s+\w+\s+UND\s+(\S+)", _run(["readelf", "--symbols", "--wide", self.path])))


def _link(objects: Sequence[_Object], link: Sequence[str], library: Path):
    names = set().union(*(o.dynamic_shared() for o in objects)) | {"simt_dynamic_shared"}
    names.discard("simt_dynamic_shared_end")
    lines = ['.section .tbss, "awT", @nobits', ".balign 1024"]
    for name in sorted(names):
        lines += [f".globl {name}", f".hidden {name}", f".type {name}, @tls_object", f"{name}:"]
    end = "simt_dynamic_shared_end"
    lines += [f".zero {DYNAMIC_SHARED_BYTES}", f".globl {end}", f".hidden {end}", f".type {end}, @tls_object", f"{end}:"]
    lines += ['.section .note.GNU-stack, "", @progbits']
    library.parent.mkdir(parents=True, exist_ok=True)
    assembly = library.with_suffix(".s")
    assembly.write_text("\n".join(lines) + "\n")
    staged = library.with_suffix(".new")
    # -Bsymbolic: two libraries in one process don't take each other's functions for their own.
    _run(["g++", "-shared", "-Wl,-Bsymbolic,--no-undefined", *(o.path for o in objects), assembly, "-ldl", *link, "-o", staged])
    staged.replace(library)


def library(
    sources: Sequence[str | Path],
    flavour: str = "plain",
    include: Sequence[str | Path] = (),
    flags: Sequence[str] = (),
    link: Sequence[str] = (),
) -> Path:
    """A shared library of the sources (.cu, .cpp) and the engine, under build/simt; built only where an input has changed.

    `flavour` is one of FLAVOURS; `include` holds folders of headers, `flags` and `link` further arguments of the compiler and of
    the linker. A library of flavour asan is loaded in a process with `environment("asan")`. Safe to call from several processes at
    a time. Raises CompileError.
    """
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour: expected one of {', '.join(FLAVOURS)}, got {flavour!r}")
    engine, engine_flags, engine_link = ENGINE[flavour]
    flags = (*KERNELS[flavour], *(f"-I{Path(folder).resolve()}" for folder in include), *flags)
    objects = [_Object(Path(source).resolve(), flags) for source in sources]
    objects += [_Object(HERE / source, engine_flags) for source in engine]
    link = (*engine_link, *link)

    def path() -> Path | None:
        """Where the library of these very inputs is, or will be; None if an object has to be compiled before that is known."""
        inputs = [o.inputs() for o in objects]
        if None in inputs:
            return None
        return BUILD / _digest([inputs, [o.command for o in objects], link, DYNAMIC_SHARED_BYTES]) / "simt.so"

    if (found := path()) and found.exists():
        return found
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(COMPILERS_AT_ONCE) as pool:
            list(pool.map(_Object.compile, [o for o in objects if o.inputs() is None]))
        built = path()
        if built is None:
            raise CompileError("a source or header was changed while others were compiled")
        if not built.exists():
            _link(objects, link, built)
    return built


def load(path: Path) -> ctypes.CDLL:
    """The library, with the types of the engine's own functions declared."""
    loaded = ctypes.CDLL(str(path))
    loaded.simt_last_message.restype = ctypes.c_char_p
    loaded.simt_set_seed.argtypes = [ctypes.c_uint64]
    loaded.simt_set_multiprocessors.argtypes = [ctypes.c_int]
    return loaded


def main(flavour: str, words: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    if words[:1] == ["--"]:
        command = words[1:]
    else:
        program = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).main())"
        command = [sys.executable, "-c", program, str(library(words, flavour))]
    return subprocess.run(command, env=environment(flavour)).returncode


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in FLAVOURS:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
