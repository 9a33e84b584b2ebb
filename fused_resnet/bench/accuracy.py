"""The rule by which the suite `kernels` and the tuner call a result wrong.

Right implementations differ in where they round, and in the order in which they add. So a result may be off by what rounding its terms
costs, wherever that is done:

- An element of a tensor is as far off as a few roundings, of the largest value of the tensor. On the root of the mean square the roundings,
  which are independent, come to a third of that of the tensor: so a fault that is small everywhere is seen as well.
- What is nothing but zeros is wrong where something else is expected.
- A sum over a channel is off by the roundings of its n terms, each at most u·|t|, with the unit roundoff u of the dtype in which they were
  stored. These are independent, so the sum of them is about u·‖t‖₂, however small the sum itself: terms of both signs cancel, their
  roundings do not. Adding up in float32 costs 2⁻²⁴·‖t‖₁ times what grows like the root of the additions in a row (Higham & Mary 2019).

      |error| ≤ T·‖t‖₂ + 64·2⁻²⁴·‖t‖₁        T of `TOLERANCES`: 8 to 10 u

  A mean's terms are y/n; those of 1/√(var + eps), to first order, are what a rounding of y moves it by, invstd³·(y − mean)·y/n.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import allow_tf32
from ..values import Source, accumulate_dtype

#: The largest error, over the scale, of a result whose terms or elements were stored in that dtype. Products of float32 lose more to their
#: order than to being stored.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
#: What adding up may cost, in roundings of ‖t‖₁.
ADDITIONS = 64
#: Of `TOLERANCES`: the largest error of a whole tensor, as root of the mean square over that of what is expected.
SPREAD = 1 / 3
PIXELS = (0, 2, 3)


class Terms(NamedTuple):
    """The terms of the sums that a channel's result is made of, [C] each."""

    norm: Tensor  #: ‖t‖₂
    total: Tensor  #: ‖t‖₁
    precision: torch.dtype  #: of what they were made of

    @classmethod
    def of(cls, terms: Tensor, precision: torch.dtype) -> "Terms":
        """Of a tensor of terms [N, C, H, W]."""
        norm, total = (torch.linalg.vector_norm(terms, order, PIXELS) for order in (2, 1))
        return cls(norm, total, precision)

    def scale(self, truth: Tensor) -> Tensor:
        """The scale of a result's error, [C]; `TOLERANCES` are in units of it."""
        roundoff = torch.finfo(accumulate_dtype(truth.dtype)).eps / 2
        return self.norm + ADDITIONS * roundoff / TOLERANCES[self.precision] * torch.maximum(self.total, truth.abs())


def convolved_precision(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype whose roundings a convolution of `dtype` makes: float16 stands for TF32, which has as many digits."""
    return torch.float16 if dtype == torch.float32 and device.type == "cuda" and allow_tf32() else dtype


def of_statistics(y: Tensor, mean: Tensor, invstd: Tensor, precision: torch.dtype) -> list[Terms]:
    """The terms of y's mean and invstd."""
    wide, count = _wide(y), y.numel() // y.shape[1]
    centred = wide - mean[:, None, None]
    return [Terms.of(wide / count, precision), Terms.of(centred.mul_(wide).mul_((invstd**3 / count)[:, None, None]), precision)]


def of_sums(dz: Tensor, precision: torch.dtype, source: Source | None = None) -> list[Terms]:
    """The terms of Σ dz, and, of a source, of Σ dz·x̂ and of the same of a raw residual."""
    wide, pairs = _wide(dz), []
    if source is not None:
        pairs.append((source.x, source.mean, source.invstd))
        if source.residual_mean is not None:
            pairs.append((source.residual, source.residual_mean, source.residual_invstd))
    products = [(_wide(x) - mean[:, None, None]).mul_(invstd[:, None, None]).mul_(wide) for x, mean, invstd in pairs]
    return [Terms.of(t, precision) for t in (wide, *products)]


def _wide(t: Tensor) -> Tensor:
    return t.to(accumulate_dtype(t.dtype))


def error(
    results: Sequence[Tensor],
    expected: Sequence[Tensor],
    terms: Sequence[Terms | None] = (),
    precision: torch.dtype | None = None,
) -> tuple[float, str | None]:
    """(the largest error of all results, over its scale; "wrong: …" where one is beyond its tolerance). A NaN counts as infinite.

    `terms`: of each result that is a channel's sum, None for the others; a sum whose terms all implementations see as they are needs none.
    `precision`: in which tensors were made, where it is not their own dtype. There may be more of what is expected than of results.
    """
    worst, status = 0.0, None
    for number, (result, truth) in enumerate(zip(results, expected, strict=False)):
        of = terms[number] if terms else None
        if result.shape != truth.shape:
            return float("inf"), f"wrong: result {number} is {list(result.shape)}, expected {list(truth.shape)}"
        wide = truth.double()
        scale, words = (of.scale(truth), "the norm of its terms") if of else (wide.abs().max(), "its largest value")
        tolerance = TOLERANCES[of.precision if of else precision if precision and result.dim() == 4 else result.dtype]
        difference = ((result.double() - wide).abs() / scale.clamp_min(1e-30)).max().item()
        difference = float("inf") if difference != difference else difference
        worst = max(worst, difference)
        if difference <= tolerance and not of and result.numel() > 1:
            spread = ((result.double() - wide).norm() / wide.norm().clamp_min(1e-30)).item()
            if spread > SPREAD * tolerance:
                status = f"wrong: result {number} differs by {spread:.1e} of its norm; tolerance {SPREAD * tolerance:.0e}"
        if difference <= tolerance and not result.any() and wide.any():
            status = f"wrong: result {number} is nothing but zeros"
        if difference > tolerance:
            status = f"wrong: result {number} differs by {difference:.1e} of {words}; tolerance {tolerance:.0e}"
    return worst, status
