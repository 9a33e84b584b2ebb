"""Frozen descriptions of a convolution, of a norm and of a launch: shapes, FLOPs, bytes. Plain numbers; nothing here needs PyTorch.

A FLOP is one addition or one multiplication, so a multiply-add counts two. Bytes are those of a tensor moved once.
"""

from dataclasses import dataclass
from functools import cached_property


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """The extent of a convolution's or a pool's output along one axis; below 1 where the window does not fit."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _touched(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many of the `size` positions along one axis lie under some tap of some window."""
    windows = range(output_size(size, kernel, stride, padding, dilation))
    positions = {i * stride - padding + t * dilation for i in windows for t in range(kernel)}
    return sum(0 <= position < size for position in positions)


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}; got {value!r}")


@dataclass(frozen=True)
class ConvProblem:
    """A convolution of [n, c, h, w] with [k, c/groups, r, s] into [n, k, p, q], without bias.

    `stride`, `padding` and `dilation` are (vertical, horizontal). Raises ValueError, naming the field, for what is no convolution.
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        _check_at_least(1, n=self.n, c=self.c, h=self.h, w=self.w, k=self.k, r=self.r, s=self.s, groups=self.groups)
        for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
            pair = getattr(self, name)
            if not isinstance(pair, tuple) or len(pair) != 2 or any(not isinstance(v, int) or v < least for v in pair):
                raise ValueError(f"{name}: expected two whole numbers of at least {least}; got {pair!r}")
        if self.c % self.groups or self.k % self.groups:
            raise ValueError(f"groups: expected a divisor of c = {self.c} and k = {self.k}; got {self.groups}")
        if self.p < 1 or self.q < 1:
            raise ValueError(
                f"h, w: expected a size that a {self.r}x{self.s} window fits into; got {self.h}x{self.w} with "
                f"padding {self.padding} and dilation {self.dilation}"
            )

    @cached_property
    def pointwise(self) -> bool:
        """Whether output pixels are input pixels, so that each is read once: 1x1, stride 1, no padding."""
        return self.reads_pixels and self.stride == (1, 1)

    @cached_property
    def reads_pixels(self) -> bool:
        """Whether each output pixel is made of one input pixel: 1x1 without padding."""
        return self.r * self.s == 1 and self.padding == (0, 0)

    @cached_property
    def p(self) -> int:
        """Height of the output."""
        return output_size(self.h, self.r, self.stride[0], self.padding[0], self.dilation[0])

    @cached_property
    def q(self) -> int:
        """Width of the output."""
        return output_size(self.w, self.s, self.stride[1], self.padding[1], self.dilation[1])

    @property
    def weight_elements(self) -> int:
        """k · c/groups · r · s."""
        return self.k * (self.c // self.groups) * self.r * self.s

    @property
    def flops(self) -> int:
        """FLOPs of fprop, and as many of dgrad, and of wgrad. Taps on padding count, as is the custom."""
        return 2 * self.n * self.p * self.q * self.weight_elements

    def input_bytes(self, itemsize: int) -> int:
        """The whole input tensor, of `itemsize` bytes an element. What dgrad writes."""
        return self.n * self.c * self.h * self.w * itemsize

    def touched_input_bytes(self, itemsize: int) -> int:
        """The part of the input that some window covers: a quarter of it for 1x1 with stride 2. What fprop and wgrad read."""
        rows = _touched(self.h, self.r, self.stride[0], self.padding[0], self.dilation[0])
        columns = _touched(self.w, self.s, self.stride[1], self.padding[1], self.dilation[1])
        return self.n * self.c * rows * columns * itemsize

    def weight_bytes(self, itemsize: int) -> int:
        """The weight, or its gradient."""
        return self.weight_elements * itemsize

    def output_bytes(self, itemsize: int) -> int:
        """The output, or its gradient."""
        return self.n * self.k * self.p * self.q * itemsize

    @property
    def output_norm(self) -> "NormProblem":
        """The norm of the output."""
        return NormProblem(self.n, self.k, self.p, self.q)


@dataclass(frozen=True)
class NormProblem:
    """A batch norm over [n, c, h, w], of n·h·w values per channel."""

    n: int
    c: int
    h: int
    w: int

    def __post_init__(self) -> None:
        _check_at_least(1, n=self.n, c=self.c, h=self.h, w=self.w)

    @property
    def count(self) -> int:
        """Values per channel, n·h·w: what the statistics are taken over."""
        return self.n * self.h * self.w

    @property
    def elements(self) -> int:
        """n·c·h·w."""
        return self.count * self.c

    def tensor_bytes(self, itemsize: int) -> int:
        """One trip over the tensor."""
        return self.elements * itemsize

    @property
    def mask_bytes(self) -> int:
        """The packed ReLU mask: a bit a value, each pixel's channels padded to whole bytes."""
        return self.count * ceil_div(self.c, 8)


@dataclass(frozen=True)
class Kernel:
    """A launch: `layer`.`work`, with what it computes and moves for the whole batch."""

    layer: str
    work: str
    flops: int
    bytes: int

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The time that it can't beat at those rates."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)
