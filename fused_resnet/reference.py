"""Every pass and every operator in a few lines of ATen: the definition of right.

The other backends derive from `Reference` and override what they have faster; the tests compare them with this class, and
this class with PyTorch's own modules in float64. It is also a backend of its own, called "eager".

Conventions (docs/design.md):
- Activations are [N, C, H, W] in `channels_last`; per-channel vectors are [C] in the accumulate dtype, which is float64 for
  float64 tensors and float32 for all others.
- Formulas are evaluated in float64 and rounded where a kernel rounds, so a pass is the correctly rounded result that a
  kernel with float32 arithmetic approaches. In particular z = fma(x, scale, bias) has the sign that one fma in a kernel has.
- The gradients of a pending (y, mean, invstd) are (dz, s1, s2): z = norm(y), dz = dL/dz, s1 = Σ dz, s2 = Σ dz·x̂ with
  x̂ = (y − mean)·invstd, summed over N, H, W, of dz as rounded.
- A packed ReLU mask is uint8 [N, H, W, ceil(C/8)]: bit c % 8 of byte c // 8 tells whether channel c lets a gradient through.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .collectives import gather_moments
from .values import Conv, ConvGeometry, ConvOutput, Norm, Pending, Source, accumulate_dtype, nhwc, values_per_channel


def per_channel(vector: Tensor) -> Tensor:
    """[C] -> [1, C, 1, 1], in float64."""
    return vector.double()[None, :, None, None]


def affine(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """fma(x, scale, bias) per channel: rounded once, to the accumulate dtype. [N, C, H, W]."""
    # A product of two float32 is exact in float64, so this has the sign of a true fma.
    return (x.double() * per_channel(scale) + per_channel(bias)).to(accumulate_dtype(x.dtype))


def standardise(x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """x̂ = (x − mean)·invstd, float64."""
    return (x.double() - per_channel(mean)) * per_channel(invstd)


def passes_gradient(z: Tensor) -> Tensor:
    """The mask of ReLU's backward: where z > 0, and where z is NaN (as PyTorch's own threshold_backward)."""
    return ~(z <= 0)


def pack_mask(mask: Tensor) -> Tensor:
    """bool [N, C, H, W] -> uint8 [N, H, W, ceil(C/8)], channel c in bit c % 8 of byte c // 8."""
    bits = torch.nn.functional.pad(mask.permute(0, 2, 3, 1), (0, -mask.shape[1] % 8)).unflatten(-1, (-1, 8))
    return (bits * (2 ** torch.arange(8, device=mask.device))).sum(-1).to(torch.uint8)


def unpack_mask(packed: Tensor, channels: int) -> Tensor:
    """The inverse of `pack_mask`: bool [N, channels, H, W]."""
    bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten(-2)[..., :channels].bool().permute(0, 3, 1, 2)


def channel_sums(dz: Tensor, *standardised: Tensor) -> tuple[Tensor, ...]:
    """Σ dz, and Σ dz·x̂ for each x̂, over N, H, W. [C] in the accumulate dtype."""
    dtype, wide = accumulate_dtype(dz.dtype), dz.double()
    sums = [wide.sum((0, 2, 3)), *((wide * xhat).sum((0, 2, 3)) for xhat in standardised)]
    return tuple(s.to(dtype) for s in sums)


def allow_tf32() -> bool:
    """Whether products of float32 may be cut to TF32, as the framework's convolutions would."""
    # Not `cudnn.allow_tf32`, which raises an error where somebody has set this.
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def ones(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[channels] ones: a part of what is kept for good. A folded network asks for them at each convolution, and a CUDA graph may read them.

    Asked for when a backend is chosen for a device, so that none are made by what a compiler's memory pool or a CUDA graph may hold.
    """
    return _ones(max(MOST_CHANNELS, 1 << (channels - 1).bit_length()), dtype, device)[:channels]


#: More channels than a ResNet's widest layer has; for a wider one ones are made at its first call.
MOST_CHANNELS = 4096


@cache
def _ones(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with _disable_current_modes():
        return torch.ones(channels, dtype=dtype, device=device)


def _var_mean(y: Tensor) -> tuple[Tensor, Tensor]:
    """(biased variance, mean) of y [N, C, H, W], each [C] in float64; zeros of an empty batch, which has neither."""
    if y.shape[0] == 0:
        return tuple(torch.zeros((2, y.shape[1]), dtype=torch.float64, device=y.device).unbind())
    return torch.var_mean(y.double(), (0, 2, 3), correction=0)


def windows(t: Tensor, kernel_size: int, stride: int, padding: int, fill: float) -> Tensor:
    """The pooling windows of `t`: [N, C, P, Q, kernel_size²], taps in row-major order; padding holds `fill`."""
    padded = torch.nn.functional.pad(t, (padding,) * 4, value=fill)
    return padded.unfold(2, kernel_size, stride).unfold(3, kernel_size, stride).flatten(-2)


class Reference:
    """The passes, and the operators made of them and of the framework's convolution."""

    name = "eager"

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend can't take tensors of `dtype` on `device`; None where it can."""
        if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            return f"{self.name} takes float64, float32, float16 and bfloat16, not {dtype}"
        return None

    def why_not_by_auto(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the choice "auto" does not take this backend, though it can take such tensors; None where it does."""
        return None

    # ---- passes: one trip over memory each ---------------------------------------------------------------------------

    def batch_stats(self, y: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        """Statistics of y [N, C, H, W] as stored -> (mean, invstd, var, scale, bias), each [C]; var is the biased one."""
        var, mean = _var_mean(y)
        dtype = accumulate_dtype(y.dtype)
        return self._coefficients(mean.to(dtype), var.to(dtype), gamma, beta, eps)

    def batch_moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, M2) of y [N, C, H, W], each [C]; M2 = Σ (y − mean)². What devices that share a batch send each other."""
        var, mean = _var_mean(y)
        dtype = accumulate_dtype(y.dtype)
        return mean.to(dtype), (var * values_per_channel(y)).to(dtype)

    def merge_moments(
        self, counts: Tensor, means: Tensor, m2s: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        """As `batch_stats`, of the union of sets of rows: counts int64 [parts], means and m2s [parts, C], by `batch_moments`.

        Chan, Golub & LeVeque 1979: M2 = Σ M2ᵢ + nᵢ·(meanᵢ − mean)². M2 can't be added up, since each is about a mean of its own.
        """
        share = (counts.double() / counts.sum()).unsqueeze(1)
        mean = (share * means.double()).sum(0)
        var = (m2s.double() / counts.sum() + share * (means.double() - mean) ** 2).sum(0)
        return self._coefficients(mean.to(means.dtype), var.to(means.dtype), gamma, beta, eps)

    def running_stats(self, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """As `batch_stats`, from the running statistics: what a norm in eval mode uses."""
        mean, var = (t.to(accumulate_dtype(dtype), copy=True) for t in (norm.running_mean, norm.running_var))
        return self._coefficients(mean, var, norm.gamma, norm.beta, norm.eps)

    @staticmethod
    def _coefficients(mean, var, gamma, beta, eps):
        invstd = (var.double() + eps).rsqrt().to(var.dtype)
        scale = (invstd.double() * (1 if gamma is None else gamma)).to(var.dtype)
        bias = ((0 if beta is None else beta) - mean.double() * scale).to(var.dtype)
        return mean, invstd, var, scale, bias

    @staticmethod
    def _preactivation(source):
        z = affine(source.x, source.scale, source.bias)
        if source.residual_scale is not None:
            z = z + affine(source.residual, source.residual_scale, source.residual_bias)
        elif source.residual is not None:
            z = z + source.residual
        return z

    def norm_add_act(self, source: Source, relu: bool, save_mask: bool) -> tuple[Tensor, Tensor | None]:
        """act = relu(fma(x, scale, bias) + residual), rounded once, and its packed mask where `save_mask`.

        Of statistics only scale and bias are read. A mask is saved only with a ReLU and a residual, where backward can't tell it from `x`
        alone; else it raises ValueError.
        """
        if save_mask and not (relu and source.residual is not None):
            raise ValueError("save_mask: expected False without a ReLU and a residual")
        z = self._preactivation(source)
        act = nhwc((z.relu() if relu else z).to(source.x.dtype))
        return act, pack_mask(passes_gradient(z)) if save_mask else None

    def norm_backward_reduce(
        self, d: Tensor, dact: Tensor | None, source: Source, mask: Tensor | None, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dz = (d + dact)·mask, rounded once; s1 = Σ dz; s2 = Σ dz·x̂; and Σ dz·x̂ of a raw residual.

        `mask` is packed; where it is None, and `relu`, it is recomputed from z = fma(x, scale, bias). Only a raw residual is read.
        """
        dz = d.double() + (0 if dact is None else dact)
        if relu:
            dz = torch.where(self._passing(source, mask), dz, 0.0)
        return self._reduced(nhwc(dz.to(source.x.dtype)), source)

    @staticmethod
    def _passing(source, mask):
        return passes_gradient(affine(source.x, source.scale, source.bias)) if mask is None else unpack_mask(mask, source.x.shape[1])

    @staticmethod
    def _reduced(dz, source):
        x, mean, invstd, _, _, residual, residual_mean, residual_invstd, _, _ = source
        if residual_mean is None:
            return dz, *channel_sums(dz, standardise(x, mean, invstd)), None
        return dz, *channel_sums(dz, standardise(x, mean, invstd), standardise(residual, residual_mean, residual_invstd))

    def norm_backward_apply(
        self, dz: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor | None, s1: Tensor, s2: Tensor
    ) -> Tensor:
        """Batch norm's backward: dy = gamma·invstd·(dz − s1/n − x̂·s2/n), n = N·H·W. Ioffe & Szegedy 2015, section 3."""
        n = values_per_channel(y)
        dx = dz.double() - per_channel(s1) / n - standardise(y, mean, invstd) * (per_channel(s2) / n)
        return nhwc((per_channel(invstd if gamma is None else invstd.double() * gamma) * dx).to(y.dtype))

    def norm_act_max_pool(self, source: Source, kernel_size: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
        """Max pool of act = relu(fma(x, scale, bias)) as rounded -> (out, index), both [N, C, P, Q].

        `index` (uint8) is the tap r·kernel_size + s that won: the first of equals; a NaN wins.
        """
        act = affine(source.x, source.scale, source.bias).relu().to(source.x.dtype)
        taps = windows(act, kernel_size, stride, padding, float("-inf"))
        # argmax does not promise which of equals it takes, so the first is asked for by name. NaN equals nothing.
        best = taps.amax(-1, keepdim=True)
        index = ((taps == best) | taps.isnan()).to(torch.uint8).argmax(-1)
        return nhwc(best.squeeze(-1)), nhwc(index.to(torch.uint8))

    def norm_act_max_pool_backward(
        self, dout: Tensor, index: Tensor, source: Source, kernel_size: int, stride: int, padding: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of `norm_act_max_pool` as (dz, s1, s2): each pixel gathers from the windows that it won."""
        won = torch.nn.functional.one_hot(index.long(), kernel_size**2) * dout.double().unsqueeze(-1)  # [N, C, P, Q, taps]
        columns = won.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)
        d = torch.nn.functional.fold(columns, source.x.shape[2:], kernel_size, padding=padding, stride=stride)
        dz = torch.where(self._passing(source, None), d, 0.0)
        return self._reduced(nhwc(dz.to(source.x.dtype)), source)[:3]

    def norm_add_act_avg_pool(self, source: Source) -> tuple[Tensor, Tensor | None]:
        """The mean over H, W of relu(fma(x, scale, bias) + residual) as rounded -> [N, C, 1, 1]; a packed mask with a residual."""
        act, mask = self.norm_add_act(source, relu=True, save_mask=source.residual is not None)
        return act.double().mean((2, 3), keepdim=True).to(source.x.dtype), mask

    def norm_add_act_avg_pool_backward(
        self, dout: Tensor, source: Source, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The gradient of `norm_add_act_avg_pool`, as `norm_backward_reduce` gives it. dout: [N, C, 1, 1]."""
        x = source.x
        d = dout.double() / (x.shape[2] * x.shape[3])
        return self._reduced(nhwc(torch.where(self._passing(source, mask), d, 0.0).to(x.dtype)), source)

    # ---- operators: what a network is made of ------------------------------------------------------------------------

    def as_read(self, source: Source, convs: Sequence["Conv | ConvOutput"], kept: bool) -> Source:
        """`source` with the coefficients that a node of these convolutions reads, forward and backward.

        They are as given but where a backend's kernels round them. `kept` tells whether the activation is written.
        """
        return source

    def keeps_act(self, source: Source, convs: Sequence[Conv]) -> bool:
        """Whether an activation between two convolutions, which nobody else reads, is written and kept for backward.

        Else `convolve_backward` is given none, and recomputes what it needs. Looks at shapes and dtypes only.
        """
        return True

    def convolve(self, source: Source, convs: Sequence[Conv], write_act: bool) -> tuple[list[Pending], Tensor | None, Tensor | None]:
        """The convolutions of the activation that `source` stands for -> (a Pending for each, act, packed mask).

        act is relu(norm(x) + residual), or x itself where `source` is materialised; None where it is not asked for and was not
        written. There is a mask with a residual only: without one, backward recomputes it from x.
        """
        act, mask = source.x, None
        if source.scale is not None:
            act, mask = self.norm_add_act(source, True, source.residual is not None)
        return [self._convolution(act, conv) for conv in convs], act, mask

    def _convolution(self, act: Tensor, conv: Conv) -> Pending:
        return self.with_norm(self.conv2d(act, conv.weight, conv.geometry), conv.norm)

    def conv2d(self, act: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
        """The convolution alone: y [N, K, P, Q] in channels_last."""
        return nhwc(torch.conv2d(act, weight, None, *geometry))

    def convolution_again(self, source: Source, conv: Conv, written: bool) -> Callable[[Source], Tensor]:
        """What makes y of a convolution again, as `convolve` made it: by the same kernel, with the same bits, and without statistics.

        `source` is what `convolve` read, `written` whether it wrote the activation. What is returned reads that activation, as
        `Source(act)`, or, where none was written, `source` with its x made again. Of `source` only shapes and dtypes are looked at.
        """
        return lambda read: self.conv2d(read.x, conv.weight, conv.geometry)

    def with_norm(self, y: Tensor, norm: Norm, parts: tuple[Tensor, Tensor, Tensor] | None = None) -> Pending:
        """y [N, K, P, Q] with the statistics that `norm` asks for: running, of this batch, or of all that a group shares.

        `parts` are the moments of y by sets of rows, as `merge_moments` takes them, where the convolution has them already.
        """
        if not norm.training:
            return Pending(y, *self.running_stats(norm, y.dtype))
        vectors = norm.gamma, norm.beta, norm.eps
        if not norm.group:
            return Pending(y, *(self.batch_stats(y, *vectors) if parts is None else self.merge_moments(*parts, *vectors)))
        count = values_per_channel(y)
        if parts is None:
            mean, m2 = self.batch_moments(y)
        else:
            mean, _, var, *_ = self.merge_moments(*parts, *vectors)
            m2 = var * count
        counts, means, m2s = gather_moments(count, mean, m2, norm.group)
        mean, invstd, var, scale, bias = self.merge_moments(counts, means, m2s, *vectors)
        total = counts.sum().to(var.dtype)
        return Pending(y, mean, invstd, var * (total / (total - 1)), scale, bias)

    def conv_affine_act(
        self,
        x: Tensor,
        weight: Tensor,
        geometry: ConvGeometry,
        scale: Tensor | None,
        bias: Tensor,
        residual: Tensor | None,
        relu: bool,
    ) -> Tensor:
        """act = relu(conv(x)·scale + bias + residual), without a gradient: what inference asks for. [N, K, P, Q].

        x [N, C, H, W] and `residual`, of act's shape or None, are channels_last, with the weight [K, C/groups, R, S] of one dtype, act's;
        `scale`, None for one, and `bias` are [K], floating; without `relu` the sum itself is act. Arguments are not checked here, but in
        `ops`. A kernel rounds once. Here, as in every backend without one, the framework's convolution rounds as well, and one pass does
        the rest.
        """
        dtype = accumulate_dtype(x.dtype)
        y = self.conv2d(x, weight, geometry)
        scale = ones(y.shape[1], dtype, y.device) if scale is None else scale.to(dtype)
        return self.norm_add_act(Source(y, scale=scale, bias=bias.to(dtype), residual=residual), relu, save_mask=False)[0]

    def conv_add_act_(self, x: Tensor, weight: Tensor, geometry: ConvGeometry, bias: Tensor, residual: Tensor, relu: bool) -> Tensor:
        """`conv_affine_act` without a scale, which may write act over `residual`."""
        return self.conv_affine_act(x, weight, geometry, None, bias, residual, relu)

    def convolve_backward(
        self,
        source: Source,
        act: Tensor | None,
        mask: Tensor | None,
        outputs: Sequence[ConvOutput],
        dact: Tensor | None,
        need_dx: bool,
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        """The gradients of `convolve` -> ((dx, s1, s2, residual_s2), [dw of each convolution]); None for what is not needed.

        act is what `convolve` gave. Of the residual, `source` holds a raw one only.
        For a pending source dx is its dz, and that of its residual too; for a materialised one s1 and s2 are None.
        """
        gradients, dws = [], []
        for output in outputs:
            dx, dw = self._convolution_backward(act, output, need_dx)
            gradients.append(dx)
            dws.append(dw)
        gradients.append(dact)
        return self._source_gradients(source, mask, gradients) if need_dx else (None,) * 4, dws

    def _source_gradients(self, source: Source, mask: Tensor | None, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        """(dx, s1, s2, residual_s2) from the gradients of the activation, which all its readers hand back."""
        d, *more = [gradient for gradient in gradients if gradient is not None]
        pending = source.scale is not None
        while len(more) > pending:  # the reduction below adds two; a third is rare
            d = d + more.pop(0)
        return self.norm_backward_reduce(d, more[0] if more else None, source, mask, True) if pending else (d, None, None, None)

    def _convolution_backward(self, act: Tensor, output: ConvOutput, need_dx: bool) -> tuple[Tensor | None, Tensor | None]:
        """(dx, dw) of one convolution."""
        if output.dz is None:
            return None, None
        return convolution_backward(act, self._dy(output), output, need_dx, output.need_dw)

    def _dy(self, output: ConvOutput) -> Tensor:
        """The gradient of y. Its producer applies its norm's backward, by the gradient convention."""
        y, gamma = output.y, output.gamma
        if output.training:
            return self.norm_backward_apply(output.dz, y, output.mean, output.invstd, gamma, output.s1, output.s2)
        # Running statistics are constants, so the norm is an affine map and nothing else.
        scale = output.invstd if gamma is None else output.invstd * gamma
        return (output.dz * scale[:, None, None]).to(y.dtype)


def convolution_backward(act: Tensor, dy: Tensor, output: ConvOutput, need_dx: bool, need_dw: bool) -> tuple[Tensor | None, Tensor | None]:
    """(dx in channels_last, dw in the weight's strides), by the framework; None for what is not needed."""
    stride, padding, dilation, groups = output.geometry
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, act, output.weight, None, stride, padding, dilation, False, [0, 0], groups, [need_dx, need_dw, False]
    )
    return None if dx is None else nhwc(dx), None if dw is None else like_weight(dw, output.weight)


def like_weight(dw: Tensor, weight: Tensor) -> Tensor:
    """`dw` in the strides of `weight`: DistributedDataParallel's buckets are views that expect them.

    A weight that is no dense tensor, such as a slice, gets a dense gradient.
    """
    return dw if dw.stride() == weight.stride() else torch.empty_like(weight).copy_(dw)
