"""Random operands of a pass, and how its results are held against the reference's."""

import torch

from fused_resnet.reference import Reference
from fused_resnet.values import Source
from support.chains import DEVICE

REFERENCE = Reference()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("none", "materialised", "raw")  # of a residual
OPTIONS = ((True, True), (True, False), (False, False))  # relu, save_mask


def nhwc(shape, dtype, offset=0.0):
    return (torch.randn(shape, device=DEVICE) + offset).to(dtype).contiguous(memory_format=torch.channels_last)


class Case:
    """A backend, and random tensors of a shape for it."""

    def __init__(self, passes, shape, dtype):
        self.passes, self.shape, self.dtype = passes, shape, dtype
        self.x, self.residual, self.d, self.dact = (nhwc(shape, dtype, offset) for offset in (1.0, 0.0, 0.3, 0.0))
        c = shape[1]
        self.gamma, self.beta = torch.rand(c, device=DEVICE) + 0.5, torch.randn(c, device=DEVICE)
        self.mean, self.invstd, _, self.scale, self.bias = REFERENCE.batch_stats(self.x, self.gamma, self.beta, 1e-5)
        stats = REFERENCE.batch_stats(self.residual, self.gamma, self.beta, 1e-5)
        self.of_residual = (*stats[:2], *stats[3:])

    def source(self, kind="none", x=None):
        """What a pass reads, with a residual of one of `KINDS`."""
        residuals = {"none": (), "materialised": (self.residual,), "raw": (self.residual, *self.of_residual)}
        return Source(self.x if x is None else x, self.mean, self.invstd, self.scale, self.bias, *residuals[kind])


def agree(ours, expected, flips=0.0):
    """Equal to rounding: norms to float32's, elements to a few last bits. `flips`: the part of a mask or index that may differ."""
    assert len(ours) == len(expected)
    for position, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert (a is None) == (b is None), position
        if a is None:
            continue
        assert a.shape == b.shape and a.dtype == b.dtype, position
        assert a.ndim == 1 or a.is_contiguous() or a.is_contiguous(memory_format=torch.channels_last), position
        if a.dtype == torch.uint8:
            assert (a != b).double().mean() <= flips, position
            continue
        eps = torch.finfo(a.dtype).eps
        scale = b[b.isfinite()].double().abs().mean().item()
        torch.testing.assert_close(a.double(), b.double(), rtol=2 * eps, atol=max(2 * eps, 1e-5) * scale, equal_nan=True)
