"""What a choice is made for: one convolution kernel with what is fused to it."""

from dataclasses import dataclass

from ..problem import ConvProblem

KINDS = ("fprop", "dgrad", "wgrad")
#: What the convolution reads: an activation that exists, or one that is made of a raw tensor, with a residual or with a raw one.
SOURCES = ("act", "norm", "norm_add", "norm_add_raw")


@dataclass(frozen=True)
class Task:
    """A kernel's work. Raises ValueError, naming the field, for what there is no kernel for."""

    kind: str  #: one of `KINDS`
    conv: ConvProblem
    dtype: str  #: of the activations: "bfloat16"
    source: str  #: one of `SOURCES`; in dgrad it tells the epilogue
    dact: bool = False  #: dgrad adds another gradient of the same activation
    compact: int = 0  #: dgrad adds the gradient of a 1x1 projection of that stride, on its own grid; 0 where there is none
    compact_k: int = 0  #: that projection's filters

    def __post_init__(self):
        for name, value, known in (("kind", self.kind, KINDS), ("source", self.source, SOURCES)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}")
        if self.kind != "dgrad" and (self.dact or self.compact):
            raise ValueError(f"dact, compact: expected nothing to be added in {self.kind}; got {self.dact}, {self.compact}")
        if (self.compact > 0) != (self.compact_k > 0):
            raise ValueError(f"compact, compact_k: expected both or neither; got {self.compact}, {self.compact_k}")

    def of_projection(self) -> "Task":
        """The gradient that is added, made on the projection's own grid, where it is a 1x1 of stride 1. Raises ValueError for none."""
        if not self.compact:
            raise ValueError(f"compact: expected a projection; got {self}")
        h, w = (-(-extent // self.compact) for extent in (self.conv.h, self.conv.w))
        return Task("dgrad", ConvProblem(self.conv.n, self.conv.c, h, w, self.compact_k, 1, 1), self.dtype, "act")

    def __str__(self) -> str:
        c = self.conv
        words = [self.kind, f"{c.c}x{c.h}x{c.w}", f"{c.r}x{c.s}", str(c.k), self.source, *(["dact"] * self.dact)]
        words += [f"stride {c.stride[0]}"] * (max(c.stride) > 1) + [f"compact {self.compact} of {self.compact_k}"] * bool(self.compact)
        return f"{' '.join(words)}, batch {c.n}, {self.dtype}"
