"""The backend `passes_cpu`: the passes as C++ kernels for CPUs (csrc/cpu/), for the instruction set that the machine has."""

import platform

import torch
from torch import Tensor

from .. import environment, native
from ..reference import convolution_backward, like_weight
from ..values import Conv, ConvGeometry, ConvOutput, Pending, Source, nhwc, problem_of
from . import onednn, products
from .passes_native import PassesNative, float32_vector

#: Channels of a convolution that runs together with the passes around it are multiples of this; a 3x3 one may have 16 on both sides.
CHANNELS, NARROW_CHANNELS = 32, 16
#: A 3x3 convolution does while an image with its border of zeros takes at most so many bytes, in lines of at most so many pixels.
IMAGE_BYTES, LINE_PIXELS = 2**20, 256
#: And where there are so many images, since threads share them.
LEAST_IMAGES = 16
#: The dtypes with which it is faster so, by instruction set. The others run it for the tests.
DTYPES = {"avx512": (torch.float32,), "avx512_bf16": (torch.float32, torch.bfloat16), "amx": (torch.float32, torch.bfloat16)}
#: Settings of `torch.backends.mkldnn.conv.fp32_precision` that let oneDNN round float32 and be faster.
FASTER = ("bf16", "tf32")


class PassesCpu(PassesNative):
    """The passes on CPUs, by PyTorch's threads; and those convolutions as products of matrices that are faster so.

    In inference, a convolution and what follows it is one primitive of oneDNN's. With AVX-512, in training, 1x1 and 3x3 convolutions
    of float32 run together with the passes around them, part by part of their pixels, and so do those of bfloat16 where the processor
    multiplies it. Where oneDNN has no convolutions of a narrow dtype, those of float32 stand for them.
    """

    name = "passes_cpu"
    library = native.CPU
    device_type = "cpu"

    def _why_not_here(self, device, dtype):
        if reason := super()._why_not_here(device, dtype):
            return reason
        native.cpu_instruction_set()  # chosen before the first kernel runs
        return None

    def why_not_by_auto(self, device, dtype):
        # The compiler makes each fused multiplication and addition a call of a function there. docs/kernels/cpu.md has its time.
        exempt = environment.cpu_instruction_set() is not None or platform.machine() not in ("x86_64", "AMD64")
        if exempt or native.best_cpu_instruction_set() != "portable":
            return None
        return "this CPU has no AVX2 with FMA and F16C, without which it is slower; FUSED_RESNET_CPU_ISA=portable asks for it all the same"

    # Each as in `Reference`, where the docstrings are.

    def convolve(self, source, convs, write_act):
        first, *others = convs
        if not runs_with_passes(source.x, first.weight, first.geometry):
            return super().convolve(source, convs, write_act)
        pending, act, mask = self._with_passes(source, first)
        return [pending, *(self._convolution(act, conv) for conv in others)], act, mask

    def _convolution(self, act, conv):
        if runs_with_passes(act, conv.weight, conv.geometry):
            return self._with_passes(Source(act), conv)[0]
        return super()._convolution(act, conv)

    def conv2d(self, act, weight, geometry):
        dtype = onednn.computing_dtype(act.dtype)
        if dtype != act.dtype:
            with torch.autocast("cpu", enabled=False):  # which would cast them back
                return super().conv2d(act.to(dtype), weight.to(dtype), geometry).to(act.dtype)
        problem = problem_of(act, weight, geometry)
        if products.as_product("fprop", problem, act.dtype):
            return products.fprop(act, weight, problem)
        return super().conv2d(act, weight, geometry)

    def conv_affine_act(self, x, weight, geometry, scale, bias, residual, relu):
        act = onednn.conv_affine_act(x, weight, geometry, bias, residual, relu) if scale is None else None
        return super().conv_affine_act(x, weight, geometry, scale, bias, residual, relu) if act is None else act

    def conv_add_act_(self, x, weight, geometry, bias, residual, relu):
        act = onednn.conv_affine_act(x, weight, geometry, bias, residual, relu, in_place=True)
        return super().conv_affine_act(x, weight, geometry, None, bias, residual, relu) if act is None else act

    def _with_passes(self, source: Source, conv: Conv) -> tuple[Pending, Tensor, Tensor | None]:
        """(what a convolution makes, the activation that it reads, its mask where there is a residual)."""
        norm = conv.norm
        statistics = norm.training and not norm.group
        y, act, mask, *made = self.operators.conv_forward(
            source.x, source.scale, source.bias, source.residual, source.residual_scale, source.residual_bias,
            nhwc(conv.weight), statistics, float32_vector(norm.gamma), float32_vector(norm.beta), norm.eps,
        )  # fmt: skip
        pending = Pending(y, *made) if statistics else self.with_norm(y, norm)
        return pending, source.x if act is None else act, mask

    def convolution_again(self, source, conv, written):
        if runs_with_passes(source.x, conv.weight, conv.geometry):
            none = (None,) * 5
            return lambda read: self.operators.conv_forward(read.x, *none, nhwc(conv.weight), False, None, None, 0.0)[0]
        return super().convolution_again(source, conv, written)

    def convolve_backward(self, source, act, mask, outputs, dact, need_dx):
        first, *others = outputs
        if first.dz is None or not first.training or not runs_with_passes(source.x, first.weight, first.geometry):
            return super().convolve_backward(source, act, mask, outputs, dact, need_dx)
        pairs = [self._convolution_backward(act, output, need_dx) for output in others]
        added = [gradient for gradient in (dact, *(dx for dx, _ in pairs)) if gradient is not None] if need_dx else []
        gradients, dw = self._with_passes_backward(source, act, mask, first, sum(added[1:], added[0]) if added else None, need_dx)
        return gradients, [dw, *(dw for _, dw in pairs)]

    def _with_passes_backward(
        self, source: Source, act: Tensor, mask: Tensor | None, output: ConvOutput, dact: Tensor | None, need_dx: bool
    ) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """((dx, s1, s2, residual_s2), dw) of a convolution, of which dact are the gradients of the activation's other readers."""
        raw = source.residual_mean is not None
        *gradients, dw = self.operators.conv_backward(
            output.dz, output.y, output.mean, output.invstd, float32_vector(output.gamma), output.s1, output.s2,
            nhwc(output.weight), act, dact, source.x, source.mean, source.invstd, source.scale, source.bias,
            source.residual if raw else None, source.residual_mean, source.residual_invstd, mask, need_dx, output.need_dw,
        )  # fmt: skip
        return tuple(gradients), None if dw is None else like_weight(dw, output.weight)

    def _convolution_backward(self, act, output, need_dx):
        if output.dz is None:
            return None, None
        if output.training and runs_with_passes(act, output.weight, output.geometry):
            (dx, *_), dw = self._with_passes_backward(Source(act), act, None, output, None, need_dx)
            return dx, dw
        dy, weight = self._dy(output), output.weight
        dtype = onednn.computing_dtype(act.dtype)
        if dtype != act.dtype:
            found = convolution_backward(act.to(dtype), dy.to(dtype), output._replace(weight=weight.to(dtype)), need_dx, output.need_dw)
            dx, dw = (None if gradient is None else gradient.to(act.dtype) for gradient in found)
            return dx, None if dw is None else like_weight(dw, weight)
        problem, dx, dw = problem_of(act, weight, output.geometry), None, None
        if need_dx and products.as_product("dgrad", problem, act.dtype):
            dx = products.dgrad(dy, weight, problem)
        if output.need_dw and products.as_product("wgrad", problem, act.dtype):
            dw = like_weight(products.wgrad(act, dy, problem), weight)
        if (need_dx and dx is None) or (output.need_dw and dw is None):
            rest = convolution_backward(act, dy, output, need_dx and dx is None, output.need_dw and dw is None)
            dx, dw = (ours if ours is not None else theirs for ours, theirs in zip((dx, dw), rest, strict=True))
        return dx, dw


def runs_with_passes(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether the convolution of x by `weight` runs together with the passes around it."""
    k, c, *window = weight.shape
    pads = 0 if window == [1, 1] else 1
    return (
        window in ([1, 1], [3, 3])
        and x.dtype in DTYPES.get(native.cpu_instruction_set(), ())
        and (c % CHANNELS == k % CHANNELS == 0 or (pads and c == k == NARROW_CHANNELS))
        and geometry.groups == max(geometry.stride) == max(geometry.dilation) == 1
        and list(geometry.padding) == [pads, pads]
        and (_windows_pay(x) if pads else weight.stride()[:2] == (c, 1))
        and (x.dtype != torch.float32 or torch.backends.mkldnn.conv.fp32_precision not in FASTER)
    )


def _windows_pay(x: Tensor) -> bool:
    """Whether an image of x, with the border that a 3x3 convolution gives it, stays in a core's cache, and x has the images for threads."""
    n, c, h, w = x.shape
    return n >= LEAST_IMAGES and w <= LINE_PIXELS and (h + 2) * (w + 1) * c * x.element_size() <= IMAGE_BYTES
