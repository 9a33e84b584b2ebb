"""Run every pass of every backend that can run on small shapes, and compare it with the reference.

Made for compute-sanitizer: inputs are made and results are compared on the CPU, so that on the GPU next to nothing runs but this
package's kernels, and what they leave unwritten is copied back and seen by initcheck. Without a GPU it runs in Triton's interpreter.
"""

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fused_resnet.backends import BACKENDS
from fused_resnet.bench.accuracy import error
from fused_resnet.bench.kernels import LANGUAGES
from fused_resnet.reference import Reference
from fused_resnet.values import Source, nhwc

REFERENCE = Reference()
#: [N, C, H, W]: one tile; no vector load and a part of a mask's byte; so many rows that partial results are merged; many channels
#: and one pixel.
SHAPES = [(2, 24, 5, 7), (3, 13, 4, 3), (3, 72, 21, 19), (6, 264, 1, 1)]
WINDOW = (3, 2, 1)


def calls(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(name of a pass, its arguments on the CPU): every pass, and every option that changes what a kernel reads or writes."""
    x, residual, d, dact = (nhwc((torch.randn(shape) + offset).to(dtype)) for offset in (1.0, 0.0, 0.3, 0.0))
    gamma, beta = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    mean, invstd, _, scale, bias = REFERENCE.batch_stats(x, gamma, beta, 1e-5)
    of_residual = REFERENCE.batch_stats(residual, gamma, beta, 1e-5)
    plain = Source(x, mean, invstd, scale, bias)
    added = plain._replace(residual=residual)
    raw = Source(*plain[:5], residual, *of_residual[:2], *of_residual[3:])
    for vectors in ((gamma, beta), (None, None)):
        yield "batch_stats", (x, *vectors, 1e-5)
        parts = [REFERENCE.batch_moments(image) for image in x.split(1)]
        counts = torch.full((len(parts),), shape[2] * shape[3])
        yield "merge_moments", (counts, *(torch.stack(p) for p in zip(*parts, strict=True)), *vectors, 1e-5)
    yield "batch_moments", (x,)
    for source in (plain, added, raw):
        for relu, save_mask in ((True, True), (True, False), (False, False)):
            if source.residual is not None or not save_mask:
                yield "norm_add_act", (source, relu, save_mask)
        yield "norm_add_act_avg_pool", (source,)
    mask = REFERENCE.norm_add_act(added, True, True)[1]
    for source, bits in ((plain, None), (plain, mask), (raw, mask)):
        yield "norm_backward_reduce", (d, None, source, bits, True)
        yield "norm_backward_reduce", (d, dact, source, bits, True)
        yield "norm_backward_reduce", (d, dact, source, None, False)
        dout = nhwc(d[:, :, :1, :1])
        yield "norm_add_act_avg_pool_backward", (dout, source, bits)
    for weight in (gamma, None):
        yield "norm_backward_apply", (d, x, mean, invstd, weight, beta, gamma)
    if min(shape[2:]) + 2 * WINDOW[2] >= WINDOW[0]:
        out, index = REFERENCE.norm_act_max_pool(plain, *WINDOW)
        yield "norm_act_max_pool", (plain, *WINDOW)
        yield "norm_act_max_pool_backward", (out, index, plain, *WINDOW)


def run(call: Callable, arguments: tuple, device: torch.device) -> list[Tensor | None]:
    """The results of `call` on `device`, on the CPU."""
    results = call(*torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), arguments))
    return [None if r is None else r.cpu() for r in ([results] if isinstance(results, Tensor) else results)]


def compare(call: Callable, name: str, arguments: tuple, device: torch.device) -> str | None:
    """What is wrong with the results of `call`, or None."""
    ours, expected = (run(c, arguments, where) for c, where in ((call, device), (getattr(REFERENCE, name), torch.device("cpu"))))
    if [r is None for r in ours] != [r is None for r in expected]:
        return "wrong: another number of results"
    numbers = [(a, b) for a, b in zip(ours, expected, strict=True) if a is not None and a.dtype != torch.uint8]
    flags = [(a, b) for a, b in zip(ours, expected, strict=True) if a is not None and a.dtype == torch.uint8]
    if any((a != b).double().mean() > 1e-2 for a, b in flags):  # a pre-activation within rounding of zero may turn a bit
        return "wrong: a mask or an index"
    return error([a for a, _ in numbers], [b for _, b in numbers])[1]


def main() -> int:
    """The program; gives its exit status, 1 where a result is wrong or nothing was run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    count, bad = 0, 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for implementation in LANGUAGES.values():
            if reason := BACKENDS[implementation].why_not(device, dtype):
                print(f"{implementation}, {dtype}: {reason}", flush=True)
                continue
            for shape in SHAPES:
                for name, arguments in calls(shape, dtype):
                    count += 1
                    if status := compare(getattr(BACKENDS[implementation], name), name, arguments, device):
                        bad += 1
                        print(f"{implementation} {name} {shape} {dtype}: {status}", flush=True)
    print(f"{device}: {count} calls, {bad} wrong")
    return int(bad > 0 or count == 0)


if __name__ == "__main__":
    sys.exit(main())
