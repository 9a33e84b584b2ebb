"""What the executor says of compiled kernels that one line was taken out of: each barrier, wait, fence and mask, one at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from . import cases
from .faults import mutations
from .launches import executing


@dataclass
class Mutants:
    """Of one kernel of a case."""

    kernel: str
    words: str
    architecture: int
    reported: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)  #: masks whose loads stay within the tensor: a comparison of values sees these
    silent: list[str] = field(default_factory=list)  #: all else that is not reported, and has other results: what must not be
    harmless: list[str] = field(default_factory=list)  #: not reported, and with the same bits


#: Kernels whose first launch is mutated.
CASES: dict[str, Callable[[int], cases.Case]] = {
    "fprop": lambda architecture: cases.forward("3x3", "materialised", "bfloat16", architecture),
    "fprop of a norm": lambda architecture: cases.forward("1x1", "residual", "bfloat16", architecture),
    "dgrad": lambda architecture: cases.backward("1x1", "norm", "nothing", "bfloat16", architecture),
    "wgrad": lambda architecture: cases.gradient_of_weight("3x3", "materialised", 1, "bfloat16", architecture),
    "statistics": lambda architecture: next(
        make() for make in cases.passes("bfloat16", (2, 72, 7, 5)) if make().kernel == "batch_stats"
    ),
}  # fmt: skip


def of_kernel(name: str, architecture: int) -> Mutants:
    """Run every mutant of the kernel that the first launch of a case runs."""
    torch.manual_seed(0)
    case, texts = CASES[name](architecture), []

    def kept(text: str) -> str:
        texts.append(text)
        return text

    def bits(found: tuple[torch.Tensor | None, ...]) -> list[bytes]:
        return [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in found if t is not None]

    with executing(architecture, edit=kept) as ran:
        right = bits(case.run())
    made = Mutants(ran[0].kernel, case.words, architecture)
    for what, text in mutations(texts[0]):
        with executing(architecture, raising=False, edit=lambda t, text=text: text if t == texts[0] else t) as ran:
            found = bits(case.run())
        faults = any(each.report.findings for each in ran)
        unseen = made.compared if what.startswith("mask") else made.silent
        (made.reported if faults else made.harmless if found == right else unseen).append(what)
    return made


def all_kernels(architecture: int) -> Iterator[Mutants]:
    """Of every case."""
    for name in CASES:
        yield of_kernel(name, architecture)
