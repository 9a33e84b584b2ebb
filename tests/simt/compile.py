"""Compiles CUDA sources for the host, with the SIMT shim of this folder, into a shared library. docs/simt.md tells the rest."""

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "simt"
#: Flags of each flavour, for compiling and linking. `race` instruments as ThreadSanitizer does, for callbacks of our own.
FLAVOURS = {
    "plain": ((), ()),
    "asan": (("-fsanitize=address",), ("-fsanitize=address",)),
    "ubsan": (("-fsanitize=undefined,bounds,alignment", "-fno-sanitize=vptr"), ("-fsanitize=undefined",)),
    "race": (("-fsanitize=thread",), ()),
}
COMMON = ("-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas")


def missing() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    return None if shutil.which("g++") else "g++ was not found, which compiles the kernels for the host"


def environment(flavour: str) -> dict[str, str]:
    """What a Python process needs in its environment to load a library of that flavour, and to fail at the first finding."""
    if flavour == "asan":
        # It has to be the first library of a process, and looks for the C++ library's throw before Python has loaded that. Python's
        # own memory is never all freed.
        names = ("libasan.so", "libstdc++.so.6")
        paths = [subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True, check=True).stdout.strip() for n in names]
        return {"LD_PRELOAD": ":".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}
    return {"UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"} if flavour == "ubsan" else {}


def library(sources: Sequence[Path], flavour: str = "plain", include: Sequence[Path] = (), flags: Sequence[str] = (), link: Sequence[str] = ()) -> Path:
    """The shared library of `sources` (.cu and .cpp) and the shim. Built once for the same inputs, whichever process asks first.

    Raises RuntimeError with the compiler's output where it fails.
    """
    shim = [HERE / "simt.cpp", *([HERE / "races.cpp"] if flavour == "race" else [])]
    compiling, linking = FLAVOURS[flavour]
    headers = [p for folder in (HERE, *include) for p in sorted(Path(folder).glob("*")) if p.suffix in (".h", ".cuh")]
    digest = hashlib.sha256(repr((flavour, COMMON, compiling, linking, list(flags), list(link))).encode())
    for path in (*sources, *shim, *headers):
        digest.update(path.name.encode() + path.read_bytes())
    folder = BUILD / f"{flavour}-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "library.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if result.exists():
            return result
        paths = [f"-I{p}" for p in (HERE, *include)]
        own = ("-DSIMT_RACES",) if flavour == "race" else compiling  # the detector does not watch itself

        def compiled(source: Path) -> Path:
            target = folder / f"{source.stem}{source.suffix}.o"
            run("g++", "-x", "c++", *COMMON, *(own if source in shim else compiling), *paths, *flags, "-c", source, "-o", target)
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, [*sources, *shim]))
        staged = folder / "library.so.new"
        run("g++", "-shared", *linking, *objects, *link, "-ldl", "-o", staged)
        staged.rename(result)
    return result


def run(*command: str | Path) -> None:
    """A step of the compilation. Raises RuntimeError with its output where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
