"""What oneDNN ran in a step on a CPU, by the name of its implementation: whether a matrix unit was used, or a slow reference."""

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

#: Of a line of oneDNN's: what was run, before the sizes.
_DIRECTIONS = {
    "forward_training": "forward", "forward_inference": "forward", "forward": "forward", "backward_data": "backward of the input",
    "backward_weights": "backward of the weight",
}  # fmt: skip


def primitives(call: Callable[[], object]) -> list[list]:
    """[implementation, what it did, sizes, calls, ms] of all that oneDNN ran in `call()`, the longest first; none where there is no oneDNN.

    Times are oneDNN's own. Sizes are as oneDNN writes them: mb16_ic64oc256_ih56oh56kh1…, images, channels, heights, window.
    """
    if not torch.backends.mkldnn.is_available():
        return []
    with _standard_output() as lines, torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        call()
    return summed(lines)


def summed(lines: Iterable[str]) -> list[list]:
    """The same from what oneDNN writes: onednn_verbose,v1,primitive,exec,cpu,convolution,IMPLEMENTATION,DIRECTION,…,SIZES,MS."""
    found: dict[tuple[str, str, str], list] = {}
    for line in lines:
        fields = line.strip().split(",")
        if fields[0] != "onednn_verbose" or "exec" not in fields[:5]:
            continue
        try:
            kind, implementation, direction, *_, sizes, ms = fields[fields.index("exec") + 2 :]
            taken = float(ms)
        except ValueError:  # a line of another form
            continue
        what = f"{kind} {_DIRECTIONS[direction]}" if direction in _DIRECTIONS else kind
        entry = found.setdefault((implementation, what, sizes), [implementation, what, sizes, 0, 0.0])
        entry[3] += 1
        entry[4] += taken
    return sorted(found.values(), key=lambda entry: -entry[-1])


@contextmanager
def _standard_output() -> Iterator[list[str]]:
    """Within, what is written on standard output, by C as well, is kept back; behind, its lines of oneDNN's are in the list."""
    lines: list[str] = []
    c_library = ctypes.CDLL(None)
    sys.stdout.flush()
    c_library.fflush(None)
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield lines
        finally:
            sys.stdout.flush()
            c_library.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines(keepends=True):
                if line.startswith("onednn_verbose"):
                    lines.append(line)
                else:
                    os.write(1, line.encode())
