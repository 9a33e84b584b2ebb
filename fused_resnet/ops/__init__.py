"""The operators, as Python calls on pending activations; each is one `torch.ops.fused_resnet` operator with autograd.

Activations are [N, C, H, W] in channels_last, of one dtype and device, weights of the same dtype; the vectors of a norm are
[C]. Every argument is checked, and an error names it. A `Pending` that is handed out must be consumed by another operator of
this module: the gradients that flow through its tensors follow the convention in docs/design.md and are not the derivatives
of y, mean and invstd by themselves.

The backend is resolved once per call, before the operator is entered, and handed to it, so that backward takes the same one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import BACKENDS, resolve
from ..reference import Reference, unpack_mask
from ..values import Conv, ConvGeometry, Norm, Pending, Source, values_per_channel
from . import norm as _norm  # noqa: F401  (registers the operators)
from . import norm_act as _norm_act  # noqa: F401
from .checks import check_conv, check_inference
from .convolutions import Convolved
from .library import call, is_plain, is_transformed
from .node import Layer, Layers
from .node import convolve as _convolve
from .node import source_of as source
from .running import update_running_statistics

__all__ = [
    "Conv",
    "ConvGeometry",
    "Convolved",
    "Layer",
    "Layers",
    "Norm",
    "Pending",
    "Source",
    "conv_affine_act",
    "conv_stats",
    "conv_stats_pair",
    "convolve",
    "convolve_blocks",
    "implementation",
    "inferring",
    "is_transformed",
    "norm_act",
    "norm_act_conv",
    "norm_act_max_pool",
    "norm_add_act",
    "norm_add_act_avg_pool",
    "norm_add_act_conv",
    "norm_add_act_conv_pair",
    "relu_mask",
    "running_affine",
    "source",
    "update_running_statistics",
    "values_per_channel",
]


def _backend(x: Tensor) -> str:
    """The backend for x. Where PyTorch's own modules are the choice, and for an empty batch, the operators themselves run on ATen."""
    choice = resolve(x.device, x.dtype)
    return "eager" if choice == "off" or x.shape[0] == 0 else choice


def implementation(x: Tensor) -> Reference:
    """What runs the operators on x."""
    return BACKENDS[_backend(x)]


def convolve_blocks(source: Source, blocks: Sequence[Sequence[Layer]], act_is_read: bool = True) -> list[list[Convolved]]:
    """Blocks one behind the other, one node of autograd -> what each layer of each makes.

    Each block is as of `convolve`. The next one reads relu(norm(y) + residual): y is the first output of the block's last layer, the
    residual the second output of its first layer, else the activation that this layer read, where `act_is_read`. Only what the last block
    makes has a gradient of its own.
    """
    return _convolve(source, blocks, _backend(source.x), act_is_read)


def convolve(source: Source, layers: Sequence[Layer], act_is_read: bool = True) -> list[Convolved]:
    """A run of convolutions, one node of autograd -> what each layer makes.

    The convolutions of the first layer read the activation that `source` stands for: x itself, or relu(norm(x) + residual), which is
    written and handed out where `act_is_read` by others, too, or a residual comes with it. Those of every other layer read relu(norm(y)) of
    the first output of the layer before; that output has no gradient of its own, and may be asked for its statistics alone.
    """
    (made,) = convolve_blocks(source, [layers], act_is_read)
    return made


def conv_stats(x: Tensor, conv: Conv) -> Pending:
    """The convolution of an activation x that exists, with the statistics of its output."""
    return convolve(Source(x), [[conv]])[0].pendings[0]


def conv_stats_pair(x: Tensor, conv: Conv, conv2: Conv) -> tuple[Pending, Pending]:
    """Two convolutions of one activation, conv1 and the projection of a block: one node, so that autograd never adds."""
    return tuple(convolve(Source(x), [[conv, conv2]])[0].pendings)


def norm_act_conv(x: Pending, conv: Conv) -> Pending:
    """The convolution of relu(norm(x)), which nobody else reads, with the statistics of its output."""
    return convolve(source(x), [[conv]], act_is_read=False)[0].pendings[0]


def norm_add_act_conv(x: Pending, residual: Pending | Tensor | None, conv: Conv) -> tuple[Pending, Tensor]:
    """act = relu(norm(x) + residual), written once, and its convolution -> (Pending, act)."""
    (((pending,), act, _),) = convolve(source(x, residual), [[conv]])
    return pending, act


def norm_add_act_conv_pair(x: Pending, residual: Pending | Tensor | None, conv: Conv, conv2: Conv) -> tuple[Pending, Pending, Tensor]:
    """act = relu(norm(x) + residual), written once, and two convolutions of it -> (Pending, Pending, act)."""
    ((pendings, act, _),) = convolve(source(x, residual), [[conv, conv2]])
    return *pendings, act


def norm_add_act(x: Pending, residual: Pending | Tensor | None = None, relu: bool = True) -> Tensor:
    """relu(norm(x) + residual) as a tensor, for whoever asks for one. Without `relu`, norm(x) + residual."""
    return call("norm_add_act")(*source(x, residual), relu, _backend(x.y))[0]


def norm_act(x: Tensor, norm: Norm) -> tuple[Tensor, Pending]:
    """act = relu(norm(x)) of a tensor x, with ordinary gradients -> (act, the statistics of x; their y is x itself)."""
    act, *vectors = call("norm_act")(x, *norm[:6], _backend(x))
    return act, Pending(x, *vectors)


def norm_act_max_pool(x: Pending, kernel_size: int = 3, stride: int = 2, padding: int = 1) -> Tensor:
    """The max pool of relu(norm(x)) -> [N, C, P, Q]. Compares rounded activations; the first of equals wins, as in PyTorch."""
    return call("norm_act_max_pool")(*source(x)[:5], kernel_size, stride, padding, _backend(x.y))[0]


def norm_add_act_avg_pool(x: Pending, residual: Pending | Tensor | None = None) -> Tensor:
    """The global average pool of relu(norm(x) + residual) -> [N, C, 1, 1]."""
    return call("norm_add_act_avg_pool")(*source(x, residual), _backend(x.y))[0]


def conv_affine_act(
    x: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    scale: Tensor | None,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = True,
    owned: bool = False,
) -> Tensor:
    """relu(conv(x)·scale + bias + residual): a convolution in inference, in one kernel where the backend has one. [N, K, P, Q].

    `scale`, None for one, and `bias` are [K]; `residual` [N, K, P, Q] is an activation, or None; where it is `owned`, nobody else reads it
    any more, and the result may be written over it. No operator of PyTorch's stands around
    it, so that nothing which looks for one sees it: call it only where `inferring` is true.
    """
    check_inference(x, weight, geometry, scale, bias, residual)
    scale, bias = None if scale is None else scale.contiguous(), bias.contiguous()  # the kernels read them without strides
    backend = implementation(x)
    if owned and scale is None and residual is not None:
        return backend.conv_add_act_(x, weight, geometry, bias, residual, relu)
    return backend.conv_affine_act(x, weight, geometry, scale, bias, residual, relu)


def running_affine(x: Tensor, conv: Conv) -> tuple[Tensor, Tensor]:
    """(scale, bias), [K], of the norm behind a convolution of x, by its running statistics."""
    check_conv(x, conv)
    return implementation(x).running_stats(conv.norm, x.dtype)[3:]


def inferring(x: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing but numbers is wanted of a computation on these: no gradient flows, and no compiler, mode or transform looks on."""
    return is_plain(x) and not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, *others))


def relu_mask(x: Pending, residual: Pending | Tensor | None = None, conv: Conv | None = None) -> Tensor:
    """The mask that backward applies to the gradient of relu(norm(x) + residual): bool [N, C, H, W]. For tests.

    `conv` is the convolution where `norm_act_conv` reads the activation, whose kernels may round the norm's coefficients.
    """
    given = source(x, residual)
    with torch.no_grad():
        backend = _backend(given.x)
        if conv is not None:
            implementation = BACKENDS[backend]
            given = implementation.as_read(given, [conv], implementation.keeps_act(given, [conv]))
        if residual is None:
            ones = torch.ones_like(given.x)
            return call("norm_add_act_backward")(ones, *given, ones.new_empty(0, dtype=torch.uint8), True, backend)[0] > 0
        packed = call("norm_add_act")(*given, True, backend)[1]
    return unpack_mask(packed, given.x.shape[1])
