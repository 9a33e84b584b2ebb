"""Faults, planted in a backend that is otherwise the reference: what the gates of the benchmark and of the tuner must refuse."""

from collections import Counter

import torch

from fused_resnet.reference import Reference


def zeros(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else torch.zeros_like(t)


class ConvolutionGradientsAreZero(Reference):
    def convolve_backward(self, *args):
        sums, dws = super().convolve_backward(*args)
        return sums, [zeros(dw) for dw in dws]


class StageHasNoWeightGradient(Reference):
    """Of the convolutions with 128 filters."""

    def convolve_backward(self, source, act, mask, outputs, *args):
        sums, dws = super().convolve_backward(source, act, mask, outputs, *args)
        return sums, [zeros(dw) if o.weight.shape[0] == 128 else dw for dw, o in zip(dws, outputs, strict=True)]


class BlockHasNoInputGradient(Reference):
    """Of the convolutions that read 64 channels: those at the beginning of two blocks."""

    def _convolution_backward(self, act, output, need_dx):
        dx, dw = super()._convolution_backward(act, output, need_dx)
        return (zeros(dx) if output.weight.shape[1] == 64 else dx), dw


class ProjectionHasNoInputGradient(Reference):
    def convolve_backward(self, source, act, mask, outputs, dact, need_dx):
        given = [o if n == 0 else o._replace(weight=o.weight * 0) for n, o in enumerate(outputs)]
        sums, _ = super().convolve_backward(source, act, mask, given, dact, need_dx)
        return sums, super().convolve_backward(source, act, mask, outputs, dact, need_dx)[1]


class GammaIsForgotten(Reference):
    def with_norm(self, y, norm, parts=None):
        return super().with_norm(y, norm._replace(gamma=None), parts)

    def _dy(self, output):
        return super()._dy(output._replace(gamma=None))


class BetaIsForgotten(Reference):
    def with_norm(self, y, norm, parts=None):
        return super().with_norm(y, norm._replace(beta=None), parts)


class GammaAndBetaAreForgotten(GammaIsForgotten):
    def with_norm(self, y, norm, parts=None):
        return super().with_norm(y, norm._replace(beta=None), parts)


class GammaLosesItsSign(Reference):
    def with_norm(self, y, norm, parts=None):
        return super().with_norm(y, norm._replace(gamma=norm.gamma.abs()), parts)


class BackwardForgetsMean(Reference):
    def norm_backward_apply(self, dz, y, mean, invstd, gamma, s1, s2):
        return super().norm_backward_apply(dz, y, mean, invstd, gamma, s1 * 0, s2)


class BackwardForgetsVariance(Reference):
    def norm_backward_apply(self, dz, y, mean, invstd, gamma, s1, s2):
        return super().norm_backward_apply(dz, y, mean, invstd, gamma, s1, s2 * 0)


class BackwardForgetsMask(Reference):
    def norm_backward_reduce(self, d, dact, source, mask, relu):
        return super().norm_backward_reduce(d, dact, source, None, False)


class ResidualIsForgotten(Reference):
    def norm_add_act(self, source, *args, **kwargs):
        return super().norm_add_act(source._replace(residual=zeros(source.residual)), *args, **kwargs)


class StatisticsOfHalfTheBatch(Reference):
    def batch_stats(self, y, *args):
        return super().batch_stats(y[: len(y) // 2], *args)


class VarianceIsBiasedTwice(Reference):
    """What the running variance is made of lacks n/(n − 1), and a little more."""

    def with_norm(self, y, norm, parts=None):
        pending = super().with_norm(y, norm, parts)
        n = y.numel() // y.shape[1]
        return pending._replace(var=pending.var * (n - 1) / n) if norm.training else pending


class FoldedBiasIsForgotten(Reference):
    def conv_affine_act(self, x, weight, geometry, scale, bias, residual, relu):
        return super().conv_affine_act(x, weight, geometry, scale, bias * 0, residual, relu)


class FoldedResidualIsForgotten(Reference):
    def conv_affine_act(self, x, weight, geometry, scale, bias, residual, relu):
        return super().conv_affine_act(x, weight, geometry, scale, bias, None, relu)


class FoldedReluIsForgotten(Reference):
    def conv_affine_act(self, x, weight, geometry, scale, bias, residual, relu):
        return super().conv_affine_act(x, weight, geometry, scale, bias, residual, False)


class Remembering(Reference):
    """Knows how often it was asked about a weight, by its sum: autocast makes another tensor of it each time."""

    def __init__(self):
        self.asked, self.first = Counter(), {}

    def conv_affine_act(self, x, weight, *args):
        self.asked[key := (weight.float().sum().item(), "folded")] += 1
        return self.said(key, super().conv_affine_act(x, weight, *args))

    def _convolution(self, act, conv):
        self.asked[key := (conv.weight.float().sum().item(), "forward")] += 1
        pending = super()._convolution(act, conv)
        return pending._replace(y=self.said(key, pending.y))

    def _convolution_backward(self, act, output, need_dx):
        self.asked[key := (output.weight.float().sum().item(), "backward")] += 1
        dx, dw = super()._convolution_backward(act, output, need_dx)
        return dx, None if dw is None else self.said(key, dw)


class FirstAnswerIsReplayed(Remembering):
    def said(self, key, t):
        return self.first.setdefault((key, t.shape), t.detach().clone()).clone()


class ZerosFromTheThirdCall(Remembering):
    def said(self, key, t):
        return t if self.asked[key] < 3 else zeros(t)


class LateZeros(Remembering):
    """Right until after it was checked for the first time."""

    def said(self, key, t):
        return t if self.asked[key] < 5 else zeros(t)


BACKWARD = (
    ConvolutionGradientsAreZero, StageHasNoWeightGradient, BlockHasNoInputGradient, ProjectionHasNoInputGradient, BackwardForgetsMean,
    BackwardForgetsVariance, BackwardForgetsMask,
)  # fmt: skip
FORWARD = (
    GammaIsForgotten, BetaIsForgotten, GammaAndBetaAreForgotten, GammaLosesItsSign, ResidualIsForgotten, StatisticsOfHalfTheBatch,
    VarianceIsBiasedTwice,
)  # fmt: skip
LATER = (FirstAnswerIsReplayed, ZerosFromTheThirdCall, LateZeros)
FOLDED = (FoldedBiasIsForgotten, FoldedResidualIsForgotten, FoldedReluIsForgotten)
TRAINING = (*BACKWARD, *FORWARD, *LATER)
INFERENCE = (*FOLDED, *LATER)
