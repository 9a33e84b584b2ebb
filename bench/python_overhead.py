"""What a training step costs the host when every kernel is a no-op: Python, dispatcher, autograd.

    python bench/python_overhead.py [--model resnet50] [--rounds 30] [--profile]

Eager's kernels are replaced by C++ functions that allocate their results (noop_kernels.cpp, compiled on the first run), ours by a
backend that does the same. Both step on CPU tensors, in turn, in one thread; the figure is the least CPU time of that thread.
"""

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fused_resnet
from fused_resnet.backends import BACKENDS
from fused_resnet.ops.library import empty_nhwc
from fused_resnet.problem import output_size
from fused_resnet.reference import Reference
from fused_resnet.values import Pending, accumulate_dtype

HERE = Path(__file__).resolve().parent


def packed(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return torch.empty((n, h, w, (c + 7) // 8), dtype=torch.uint8, device=x.device)


class NoKernels(Reference):
    """Every pass and convolution allocates its results, and computes nothing."""

    name = "no kernels"

    def batch_stats(self, y, gamma, beta, eps):
        return tuple(y.new_empty(5, y.shape[1], dtype=accumulate_dtype(y.dtype)).unbind())

    def _convolution(self, act, conv):
        weight, norm, (stride, padding, dilation, _) = conv
        (n, _, h, w), (k, _, r, s) = act.shape, weight.shape
        p, q = output_size(h, r, stride[0], padding[0], dilation[0]), output_size(w, s, stride[1], padding[1], dilation[1])
        y = empty_nhwc(act, (n, k, p, q))
        return Pending(y, *self.batch_stats(y, norm.gamma, norm.beta, norm.eps))

    def _convolution_backward(self, act, output, need_dx):
        if output.dz is None:
            return None, None
        self._dy(output)
        return torch.empty_like(act) if need_dx else None, torch.empty_like(output.weight) if output.need_dw else None

    def norm_add_act(self, source, relu, save_mask):
        return torch.empty_like(source.x), packed(source.x) if save_mask else None

    def norm_backward_reduce(self, d, dact, source, mask, relu):
        x, mean, *_ = source
        residual_s2 = None if source.residual_mean is None else torch.empty_like(mean)
        return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean), residual_s2

    def norm_backward_apply(self, dz, y, mean, invstd, gamma, s1, s2):
        return torch.empty_like(y)

    def norm_act_max_pool(self, source, kernel_size, stride, padding):
        x = source.x
        shape = (*x.shape[:2], *((size + 2 * padding - kernel_size) // stride + 1 for size in x.shape[2:]))
        return empty_nhwc(x, shape), empty_nhwc(x, shape, torch.uint8)

    def norm_act_max_pool_backward(self, dout, index, source, *_):
        return self.norm_backward_reduce(None, None, source, None, True)[:3]

    def norm_add_act_avg_pool(self, source):
        x = source.x
        return empty_nhwc(x, (*x.shape[:2], 1, 1)), None if source.residual is None else packed(x)

    def norm_add_act_avg_pool_backward(self, dout, source, mask):
        return self.norm_backward_reduce(None, None, source, None, True)


def step(model: torch.nn.Module, x: Tensor, dy: Tensor) -> tuple[float, float]:
    """The CPU seconds of one forward and of one backward."""
    model.zero_grad(set_to_none=True)
    start = time.thread_time()
    out = model(x)
    middle = time.thread_time()
    out.backward(dy)
    return middle - start, time.thread_time() - middle


def builder(name: str) -> Callable[[], torch.nn.Module]:
    """torchvision's network of that name; ours, for CIFAR, where torchvision has none."""
    import torchvision

    return getattr(torchvision.models, name, None) or getattr(fused_resnet.models, name)


def measure(rounds: int, network: str = "resnet50") -> dict[str, tuple[float, float]]:
    """{"eager", "fused", "recompute"} -> the least seconds of a forward and of a backward; the last is fused, with `recompute`."""
    build = builder(network)
    models = {"eager": build(), "fused": fused_resnet.fuse(build()), "recompute": fused_resnet.recompute(fused_resnet.fuse(build()))}
    x = torch.zeros(8, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    models["eager"].to(memory_format=torch.channels_last)
    times = {name: [] for name in models}
    with fused_resnet.backend(NoKernels.name), torch.no_grad():
        dy = torch.zeros_like(models["fused"](x))
    for _ in range(rounds):
        for name, model in models.items():
            with fused_resnet.backend("off" if name == "eager" else NoKernels.name):
                times[name].append(step(model, x, dy))
    return {name: (min(t[0] for t in pairs), min(t[1] for t in pairs)) for name, pairs in times.items()}


def load_kernels() -> None:
    """Replace ATen's kernels in this process."""
    from torch.utils.cpp_extension import load

    build = HERE.parent / "build" / "noop_kernels"
    build.mkdir(parents=True, exist_ok=True)
    load("noop_kernels", [str(HERE / "noop_kernels.cpp")], build_directory=str(build), is_python_module=False, extra_cflags=["-O2"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--model", default="resnet50", help="a builder of torchvision.models or fused_resnet.models")
    parser.add_argument("--profile", action="store_true", help="where the fused step's time goes, too")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent / "tests"))
    import conftest  # noqa: F401  (torchvision, where only its Python code loads)

    torch.set_num_threads(1)
    BACKENDS[NoKernels.name] = NoKernels()
    load_kernels()
    found = measure(options.rounds, options.model)
    for name, (forward, backward) in found.items():
        print(f"{name}: forward {forward * 1e3:.2f} ms, backward {backward * 1e3:.2f} ms, together {(forward + backward) * 1e3:.2f} ms")
    totals = {name: sum(pair) for name, pair in found.items()}
    print(
        json.dumps(
            {"python_overhead": {"model": options.model, **totals, "ratio": totals["fused"] / totals["eager"], "torch": torch.__version__}}
        )
    )
    if options.profile:
        profile = cProfile.Profile()
        profile.runcall(measure, options.rounds, options.model)
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
