"""The backend `passes_cpu`: the passes as C++ kernels for CPUs (csrc/cpu/), for the instruction set that the machine has."""

from torch import Tensor

from .. import native
from ..reference import Conv, convolution, convolution_backward, like_weight
from . import onednn, products
from .passes_native import PassesNative


class PassesCpu(PassesNative):
    """The passes on CPUs, by PyTorch's threads; those convolutions as products of matrices that are faster so.

    In inference, a convolution and what follows it is one primitive of oneDNN's.
    """

    name = "passes_cpu"
    library = native.CPU
    device_type = "cpu"

    def _declines_here(self, device, dtype):
        if reason := super()._declines_here(device, dtype):
            return reason
        native.cpu_instruction_set()  # chosen before the first kernel runs
        return None

    # Each as in `Reference`, where the docstrings are.

    def _convolution(self, act, conv):
        return self.with_norm(_convolution(act, conv), conv.norm)

    def conv_affine_act(self, x, weight, geometry, scale, bias, residual, relu):
        act = onednn.conv_affine_act(x, weight, geometry, bias, residual, relu) if scale is None else None
        return super().conv_affine_act(x, weight, geometry, scale, bias, residual, relu) if act is None else act

    def conv_add_act_(self, x, weight, geometry, bias, residual, relu):
        act = onednn.conv_affine_act(x, weight, geometry, bias, residual, relu, in_place=True)
        return super().conv_affine_act(x, weight, geometry, None, bias, residual, relu) if act is None else act

    def convolution_again(self, source, conv, written):
        return lambda read: _convolution(read.x, conv)

    def _convolution_backward(self, act, output, need_dx):
        if output.dz is None:
            return None, None
        dy, weight = self._dy(output), output.weight
        problem, dx, dw = products.problem_of(act, weight, output.geometry), None, None
        if need_dx and products.as_product("dgrad", problem, act.dtype):
            dx = products.dgrad(dy, weight, problem)
        if output.need_dw and products.as_product("wgrad", problem, act.dtype):
            dw = like_weight(products.wgrad(act, dy, problem), weight)
        if (need_dx and dx is None) or (output.need_dw and dw is None):
            rest = convolution_backward(act, dy, output, need_dx and dx is None, output.need_dw and dw is None)
            dx, dw = (ours if ours is not None else theirs for ours, theirs in zip((dx, dw), rest, strict=True))
        return dx, dw


def _convolution(act: Tensor, conv: Conv) -> Tensor:
    """y in channels_last."""
    problem = products.problem_of(act, conv.weight, conv.geometry)
    if products.as_product("fprop", problem, act.dtype):
        return products.fprop(act, conv.weight, problem)
    return convolution(act, conv)
