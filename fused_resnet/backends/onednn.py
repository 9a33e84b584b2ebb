"""In inference, a convolution with its bias, residual and ReLU as one primitive of oneDNN's.

PyTorch has operators for it, which its compiler uses.

oneDNN's ReLU makes 0 of NaN, which PyTorch's and every backend's here keep. So the primitive is for finite numbers: an input that may
hold others is summed first, and parameters are once; where a sum is not finite, the passes do the work. What a primitive made of finite
numbers is not asked again: a network that overflows to infinity inside, and to NaN behind that, loses the NaN.
"""

import math
import threading
import weakref
from collections import deque
from functools import cache

import torch
from torch import Tensor

from ..derived import derived
from ..values import ConvGeometry, nhwc

_OPERATORS = torch.ops.mkldnn
#: How many tensors are remembered as finite: a block's input is a residual a few calls later.
RECENT = 8


#: What oneDNN has no implementation of, so that it is asked once.
_REFUSED: set[tuple] = set()


class _Known(threading.local):
    """The last tensors that were found to be finite, or made so, each with its count of writes."""

    def __init__(self):
        self.recent: deque[tuple[weakref.ref, int]] = deque(maxlen=RECENT)

    def add(self, t: Tensor) -> None:
        self.recent.append((weakref.ref(t), _writes(t)))

    def __contains__(self, t: Tensor) -> bool:
        for known, writes in reversed(self.recent):  # noqa: SIM110  (a generator costs the host as much as what it asks)
            if known() is t:
                return writes == _writes(t)
        return False


_finite = _Known()


def _writes(t: Tensor) -> int:
    """How often a tensor was written to. PyTorch does not count in inference mode."""
    return 0 if t.is_inference() else t._version


def _is_finite(t: Tensor) -> bool:
    """Whether every number of a tensor is finite, and their sum is."""
    if t in _finite:
        return True
    if finite := math.isfinite(t.sum().item()):
        _finite.add(t)
    return finite


def _added(bias: Tensor, dtype: torch.dtype) -> Tensor | bool:
    """The bias in `dtype`. True stands for the bias itself, which must not be kept; False says that it is not finite."""
    if not math.isfinite(bias.sum().item()):
        return False
    return True if bias.dtype == dtype else bias.to(dtype)


@cache
def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which convolutions of `dtype` run on this CPU: float32 where oneDNN has none of `dtype` here, as without AVX-512.

    PyTorch's own loops, which do it then, take ten times as long. A convolution in float32 of the same numbers is rounded once, too.
    """
    narrow = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in narrow or not torch.backends.mkldnn.is_available():
        return dtype
    supported = getattr(_OPERATORS, narrow[dtype], None)
    return dtype if supported is None or supported() else torch.float32


@cache
def why_not(dtype: torch.dtype) -> str | None:
    """Why no primitive takes convolutions of `dtype` here; None where one does."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    for name in ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight"):
        if not hasattr(_OPERATORS, name):
            return f"this PyTorch has no operator mkldnn::{name}"
    return None if dtype in (torch.float32, torch.bfloat16) else f"the primitive takes float32 and bfloat16 here, not {dtype}"


def _packed(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor | None:
    """The weight as the primitive reads it for x of this shape; None where it is not finite, or oneDNN has no such convolution."""
    if not math.isfinite(weight.sum().item()):
        return None
    stride, padding, dilation, groups = geometry
    try:
        return _OPERATORS._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(x.shape))
    except RuntimeError:
        return None


def conv_affine_act(
    x: Tensor, weight: Tensor, geometry: ConvGeometry, bias: Tensor, residual: Tensor | None, relu: bool, in_place: bool = False
) -> Tensor | None:
    """As `Reference.conv_affine_act` without a scale; None where oneDNN has no such convolution, or a number is not finite.

    `in_place`: act is written over the residual, which saves a trip over memory that is new: in float32, 9 of 64 ms of a ResNet-50.
    """
    if why_not(x.dtype) or not torch._C._get_mkldnn_enabled():
        return None
    if not (_is_finite(x) and (residual is None or _is_finite(residual))):
        return None
    stride, padding, dilation, groups = geometry
    key = x.shape, x.dtype, tuple(stride), tuple(padding), tuple(dilation), groups
    task = *key, weight.shape, residual is None, relu, in_place
    dtype = computing_dtype(x.dtype)
    packed = None if task in _REFUSED else derived(weight, key, lambda: _packed(x, weight.to(dtype), geometry))
    shift = derived(bias, dtype, lambda: _added(bias, dtype))
    if packed is None or shift is False:
        return None
    shift = bias if shift is True else shift
    after = "relu" if relu else None
    read, added = x.to(dtype), None if residual is None else residual.to(dtype)
    try:
        if added is None:
            act = _OPERATORS._convolution_pointwise(read, packed, shift, padding, stride, dilation, groups, after or "none", [], None)
        elif in_place or added is not residual:
            act = _OPERATORS._convolution_pointwise_.binary(
                added, read, packed, shift, padding, stride, dilation, groups, "add", None, after, [], None
            )
        else:
            act = _OPERATORS._convolution_pointwise.binary(
                read, added, packed, shift, padding, stride, dilation, groups, "add", None, after, [], None
            )
    except RuntimeError:
        _REFUSED.add(task)
        return None
    act = residual.copy_(act) if in_place and added is not residual else nhwc(act).to(x.dtype)
    _finite.add(act)  # its ReLU leaves no NaN, and without one sums of numbers are numbers
    return act
