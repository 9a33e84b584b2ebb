"""How gradients change on their way through untrained networks: by depth, with batch norm and shortcuts and without."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..data import DataSet
from ..models import CifarResNet
from .degradation import probed
from .findings import Finding, Spread, passing
from .probe import Probe, probe

DEPTHS = (20, 56, 110)
#: He et al. 2015 ("Delving deep into rectifiers"), which keeps a ReLU network's forward signal, and the older one of Glorot and Bengio
#: 2010, under which every ReLU halves its square.
INITS = {"he": "He et al. 2015", "glorot": "Glorot and Bengio 2010"}


@dataclass(frozen=True)
class Case:
    """A kind of network for 32×32 images, untrained."""

    depth: int  #: 6n + 2
    shortcut: bool  #: the paper's option A; without, the network is plain
    norm: bool
    init: str  #: of `INITS`

    @property
    def words(self) -> str:
        """What the legend says."""
        return f"{'shortcuts' if self.shortcut else 'plain'}, {'batch norm' if self.norm else 'no norm'}"


@dataclass(frozen=True)
class Seen:
    """A probe of one network from one seed."""

    case: Case
    seed: int
    probe: Probe


def cases(depths: Sequence[int]) -> list[Case]:
    """All kinds of networks of these depths."""
    return [Case(depth, shortcut, norm, init) for init in INITS for depth in depths for norm in (True, False) for shortcut in (False, True)]


def look(chosen: Sequence[Case], seeds: int, data: DataSet, device: torch.device) -> Iterator[Seen]:
    """A probe of each case from each seed, on the first images of the training split."""
    images, labels = probed(data, device)
    for case in chosen:
        for seed in range(seeds):
            yield Seen(case, seed, probe(build(case, seed, data).to(device, memory_format=torch.channels_last), images, labels))


def build(case: Case, seed: int, data: DataSet) -> nn.Module:
    """The untrained network of a case. Raises ValueError for a depth that is not 6n + 2."""
    torch.manual_seed(seed)
    model = CifarResNet(case.depth, len(data.classes), "A" if case.shortcut else None, data.channels)
    if case.init == "glorot":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
    if not case.norm:
        # Untrained, a norm's γ and β do nothing: what is left of it is its normalising.
        for parent in list(model.modules()):
            for name, module in parent.named_children():
                if isinstance(module, nn.BatchNorm2d):
                    setattr(parent, name, nn.Identity())
    return model


def vanishing_findings(seen: Sequence[Seen]) -> list[Finding]:
    """What happens in the deepest networks of each kind, in words that follow from the figures."""
    depth = max(s.case.depth for s in seen)
    found = []
    for init, source in INITS.items():
        for case in (case for case in cases([depth]) if case.init == init):
            ratios = Spread(tuple(s.probe.passed for s in seen if s.case == case))
            answer = (
                f"The gradient {passing(ratios)}: {ratios.told('.2g')} times as large in the first layer's response as in the last one's."
            )
            found.append(Finding(f"{depth} layers, {case.words}, weights by {source}", answer))
    return found


def table(seen: Sequence[Seen]) -> tuple[list[str], list[list[str]]]:
    """(heads, lines): a line a kind and depth, means over the seeds."""
    heads = ["initial weights", "layers", "kind", "gradient, first over last response", "loss, nats"]
    lines = []
    for case in dict.fromkeys(s.case for s in seen):
        of_case = [s for s in seen if s.case == case]
        ratios = Spread(tuple(s.probe.passed for s in of_case))
        loss = statistics.fmean(s.probe.loss for s in of_case)
        lines.append([INITS[case.init], str(case.depth), case.words, ratios.told(".3g"), f"{loss:.3g}"])
    return heads, lines


def as_json(seen: Sequence[Seen]) -> list[dict[str, Any]]:
    """Plain values: depth, shortcut, norm, init, seed, and the fields of a `Probe`."""
    return [{**asdict(s.case), "seed": s.seed, **asdict(s.probe)} for s in seen]
