"""Which releases of Triton the kernels were compiled and tested with, and what to say of a newer one."""

import importlib.metadata

#: (major, minor) of the oldest release that is supported, and of the newest that the tests were run with. CI compiles with both.
OLDEST_TRITON, NEWEST_TRITON = (3, 6), (3, 9)


def installed(package: str) -> tuple[int, ...] | None:
    """(major, minor) of an installed distribution; None where it is not installed. Imports nothing."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in version.split(".")[:2])


def untested_triton() -> str | None:
    """A warning where the installed Triton is newer than every tested one; None where it is not."""
    found = installed("triton")
    if found is None or found <= NEWEST_TRITON:
        return None
    major, minor = NEWEST_TRITON
    return (
        f"Triton {'.'.join(map(str, found))} is newer than the newest that fused_resnet was tested with, {major}.{minor}: "
        f"its compiler may spill registers or round otherwise (pip install 'triton<{major}.{minor + 1}' brings a tested one)"
    )
