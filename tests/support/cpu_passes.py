"""What the passes for CPUs make of random tensors: for other threads, other instruction sets and other processors."""

import torch

from fused_resnet.backends import BACKENDS
from fused_resnet.values import Source

PASSES = BACKENDS["passes_cpu"]


def nhwc(shape, dtype, offset=0.0):
    """Uniform numbers: PyTorch draws normal ones by functions whose bits depend on the instruction set."""
    return (4 * torch.rand(shape) - 2 + offset).to(dtype).contiguous(memory_format=torch.channels_last)


def results(shape, dtype, seed) -> dict[str, tuple]:
    """What every pass makes of the same random tensors."""
    torch.manual_seed(seed)
    c = shape[1]
    x, residual, d, dact = (nhwc(shape, dtype, offset) for offset in (1.0, 0.0, 0.3, 0.0))
    gamma, beta = torch.rand(c) + 0.5, torch.rand(c)
    of_x = mean, invstd, _, *affine = PASSES.batch_stats(x, gamma, beta, 1e-5)
    of_residual = PASSES.batch_stats(residual, gamma, beta, 1e-5)
    plain = Source(x, mean, invstd, *affine)
    raw = Source(*plain[:5], residual, *of_residual[:2], *of_residual[3:])
    act, mask = PASSES.norm_add_act(raw, True, True)
    dz, s1, s2, _ = reduced = PASSES.norm_backward_reduce(d, dact, raw, mask, True)
    found = {
        "batch_stats": of_x,
        "batch_moments": PASSES.batch_moments(x),
        "merge_moments": PASSES.merge_moments(torch.tensor([3, 5]), torch.rand(2, c), torch.rand(2, c), gamma, beta, 1e-5),
        "norm_add_act": (act, mask),
        "norm_backward_reduce": reduced,
        "recomputed mask": PASSES.norm_backward_reduce(d, None, plain, None, True)[:3],
        "norm_backward_apply": (PASSES.norm_backward_apply(dz, x, mean, invstd, gamma, s1, s2),),
        "norm_add_act_avg_pool": PASSES.norm_add_act_avg_pool(raw),
        "norm_add_act_avg_pool_backward": PASSES.norm_add_act_avg_pool_backward(nhwc((*shape[:2], 1, 1), dtype), raw, mask),
    }
    if min(shape[2:]) > 1:
        out, index = found["norm_act_max_pool"] = PASSES.norm_act_max_pool(plain, 3, 2, 1)
        found["norm_act_max_pool_backward"] = PASSES.norm_act_max_pool_backward(nhwc(out.shape, dtype), index, plain, 3, 2, 1)
    return found
