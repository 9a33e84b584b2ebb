"""What the experiment on degradation runs: networks, seeds and settings, written down before the first step."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from .. import models
from ..data import DataSet
from ..files import replace_file
from ..train import SettingError, TrainConfig
from ..train.checkpoint import one_line

PLAN, FORMAT, VERSION = "plan.json", "fused_resnet.degradation", 1
#: Depths of which there is a plain and a residual network: for 32×32 images, whose width can be chosen, and the ImageNet ones.
SMALL, LARGE = (20, 32, 44, 56), (18, 34)
FAMILIES = ("plain", "resnet")
WIDTH = 16  # channels of the first stage: the paper's, of the small networks
NARROWER = (8, 4)
#: Fewer epochs show little of a curve: before that, networks become narrower.
LEAST_EPOCHS = 10
#: Where not even the narrowest network has them, a wider one is worth so many times fewer epochs than the most that any has.
WORTH = 2
PAPER_STEPS = 64_000  # He et al. 2015, section 4.2


class PlanError(ValueError):
    """A folder holds no plan, or one that can't be used. The message names it."""


@dataclass(frozen=True)
class Run:
    """One training: a network and a seed."""

    network: str
    seed: int

    @property
    def folder(self) -> str:
        """Its folder's name, in the experiment's."""
        return f"{self.network}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """Plain and residual networks of some depths, each from several seeds. Raises `SettingError` for what can't be run."""

    settings: TrainConfig  #: of every run, but for `model` and `seed`
    depths: tuple[int, ...] = (20, 56)
    seeds: int = 3  #: each network is trained from seeds 0 to seeds - 1
    width: int = WIDTH  #: channels of the first stage; the ImageNet networks have one width, and this says nothing of them
    picked: str | None = None  #: how epochs and width were picked, where a time was asked for
    command: str | None = None  #: which began the experiment

    def __post_init__(self):
        depths = tuple(sorted(set(self.depths)))
        if len(depths) < 2 or not (set(depths) <= set(SMALL) or set(depths) <= set(LARGE)):
            known = " or ".join(" ".join(map(str, family)) for family in (SMALL, LARGE))
            raise SettingError("depths", f"expected two or more of {known}; got {' '.join(map(str, self.depths))}")
        if self.seeds < 1:
            raise SettingError("seeds", f"expected a whole number of at least 1; got {self.seeds}")
        if self.width < 2 or self.width % 2:
            raise SettingError("width", f"expected an even number of at least 2; got {self.width}")
        if self.width != WIDTH and not self.has_width:
            raise SettingError("width", f"expected none, since only the networks of depths {' '.join(map(str, SMALL))} have one to choose")
        object.__setattr__(self, "depths", depths)

    @property
    def has_width(self) -> bool:
        """Whether these networks' width can be chosen."""
        return set(self.depths) <= set(SMALL)

    @property
    def networks(self) -> list[str]:
        """plain20, resnet20, plain56, resnet56, …"""
        return [f"{family}{depth}" for depth in self.depths for family in FAMILIES]

    @property
    def runs(self) -> list[Run]:
        """All trainings in their order: a seed after the other, so that each network has one early."""
        return [Run(network, seed) for seed in range(self.seeds) for network in self.networks]

    @property
    def moments(self) -> dict[str, int]:
        """Epochs after which a network is looked at: start, middle, end."""
        epochs = self.settings.epochs
        return {"start": 0, "middle": epochs // 2, "end": epochs} if epochs > 1 else {"start": 0, "end": epochs}

    def config(self, run: Run) -> TrainConfig:
        """The settings of a run."""
        return replace(self.settings, model=run.network, seed=run.seed)

    def build(self, network: str, data: DataSet) -> nn.Module:
        """One of `networks`, untrained, for the classes and channels of a data set. Raises `SettingError` where there is none."""
        options = {"num_classes": len(data.classes)}
        if self.has_width:
            return models.get_model(network, in_channels=data.channels, width=self.width, **options)
        if data.channels != 3:
            expected = f"expected some of {' '.join(map(str, SMALL))} for the {data.channels}-channel images of {data.name}"
            raise SettingError("depths", f"{expected}; got {' '.join(map(str, self.depths))}, whose networks take colour alone")
        return models.get_model(network, **options)

    def write(self, folder: Path) -> None:
        """Writes `plan.json` there."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        replace_file(folder / PLAN, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_plan(folder: Path) -> Plan:
    """The plan in an experiment's folder. Raises `PlanError`."""
    path = folder / PLAN
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PlanError(f"{path}: no such file; expected the folder of an experiment") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path}: it can't be read: {one_line(error)}") from error
    if not isinstance(content, dict) or (content.pop("format", None), content.pop("version", None)) != (FORMAT, VERSION):
        raise PlanError(f"{path}: expected version {VERSION} of the plan of an experiment")
    try:
        settings = TrainConfig(**content.pop("settings"))
        return Plan(settings, tuple(content.pop("depths")), **content)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{path}: its settings can't be used ({one_line(error)})") from error


def fitted(plan: Plan, minutes: float, steps: int, seconds: Callable[[Plan], float]) -> Plan:
    """The plan with as many epochs as fit into that time, and where few do, with narrower networks.

    steps: of an epoch. seconds: that an epoch of all runs takes here, by what was measured. `picked` says what was done.
    """
    most = math.ceil(PAPER_STEPS / steps)
    tried: list[tuple[Plan, float, float]] = []  # narrower and narrower: what an epoch takes, how many fit
    for width in (plan.width, *(width for width in NARROWER if plan.has_width and width < plan.width)):
        candidate = replace(plan, width=width)
        needed = seconds(candidate)
        tried.append((candidate, needed, min(most, 60 * minutes / needed)))
        if tried[-1][-1] >= LEAST_EPOCHS:
            break
    longest = max(epochs for *_, epochs in tried)
    enough = LEAST_EPOCHS if longest >= LEAST_EPOCHS else longest / WORTH
    candidate, needed, fit = next(one for one in tried if one[-1] >= enough)
    epochs = max(1, int(fit))
    words = f"{minutes:g} minutes were asked for. An epoch of all {len(plan.runs)} runs took {_told(needed)} by what a few steps took"
    words += f", so there are {epochs} epochs" + (f", the paper's {PAPER_STEPS:,} steps" if epochs == most else "")
    if candidate.width != plan.width:
        words += f"; with {plan.width} channels in the first stage there would be {int(tried[0][-1])}, so there are {candidate.width}"
    if epochs * needed > 60 * minutes:
        words += f"; that is {_told(epochs * needed)}, longer than was asked for: fewer --seeds or a --limit-train would take less"
    settings = replace(plan.settings, epochs=epochs, warmup_epochs=warmup(epochs))
    return replace(candidate, settings=settings, picked=f"{words}.")


def warmup(epochs: int) -> float:
    """Epochs of warm-up: one, and less in a short run, which then still comes down from its highest rate."""
    return min(1.0, epochs / 4)


def _told(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
