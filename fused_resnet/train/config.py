"""The settings of a training run: what a checkpoint keeps, and what a recipe names."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from .. import backends
from ..data import AUTO_AUGMENTS, CORRUPT, SCHEME

PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("sgd", "lars")
SCHEDULES = ("cosine", "step", "one-cycle")
#: What a resumed run may change: how it computes, how long, how images get to it, and what is written down.
CHANGEABLE = (
    "epochs", "backend", "recompute", "corrupt", "workers", "checkpoint_minutes", "keep", "target_accuracy", "tensorboard", "compile",
    "cuda_graph",
)  # fmt: skip
#: What belongs to images that are decoded while the run trains.
OF_FOLDERS = ("corrupt", "workers", "auto_augment", "repeats", "train_size", "shorter_side")
#: A type of a field -> what is said of it.
KINDS = {
    str: "text", str | None: "text or None", int: "a whole number", int | None: "a whole number or None", float: "a number",
    float | None: "a number or None", bool: "True or False", tuple: "a list of numbers",
}  # fmt: skip
#: A whole number is a number, too.
NUMBERS = {float: float | int, float | None: float | int | None}


class SettingError(ValueError):
    """A setting has a value that can't be used. `name` is the field's name, `reason` says what was expected."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`. Raises `SettingError` for a value of another type or out of range."""

    model: str = "resnet20"
    data: str = "fashion-mnist-mini"
    epochs: int = 10
    batch_size: int = 128  #: images a step, of all processes together
    accumulate: int = 1  #: parts of a batch that are trained one after the other, each with statistics of its own
    optimizer: str = "sgd"  #: one of `OPTIMIZERS`
    lr: float = 0.1  #: the highest learning rate, at the end of the warm-up
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_norms: bool = True  #: whether weight decay also acts on norms and biases, as in He et al. 2015
    clip_norm: float | None = None  #: gradients are scaled down to this norm, all of them together
    schedule: str = "cosine"  #: one of `SCHEDULES`
    warmup_epochs: float = 1.0
    milestones: tuple = ()  #: of the schedule "step": after so many epochs the rate is multiplied by `gamma`
    gamma: float = 0.1
    label_smoothing: float = 0.0
    mixup: float = 0.0  #: alpha of the Beta distribution by which images are mixed; 0: they are not
    cutmix: float = 0.0  #: that of the share that is cut out of another image
    erasing: float = 0.0  #: probability that a part of an image is erased
    auto_augment: str = "none"  #: of a folder's images: one of `data.AUTO_AUGMENTS`
    repeats: int = 1  #: of a folder's images an epoch sees this part of them, each so many times
    ema: float = 0.0  #: decay of the moving average of parameters and buffers, which is evaluated then; 0: there is none
    ema_every: int = 1  #: steps from one update of it to the next
    zero_gamma: bool = False  #: whether the last norm of each residual block begins with 0, so that the block begins as its shortcut
    precision: str = "fp32"  #: of convolutions and activations; parameters and statistics are fp32
    seed: int = 0
    limit_train: int | None = None  #: use only so many images of the training split
    limit_eval: int | None = None
    image_size: int | None = None  #: pixels; for synthetic data and folders only
    train_size: int | None = None  #: pixels of a folder's images in training; None: `image_size`
    shorter_side: int | None = None  #: pixels to which an evaluation resizes a folder's image before it cuts; None: 256/224 of `image_size`
    corrupt: str = "refuse"  #: what becomes of an image of a folder that can't be decoded; of `data.CORRUPT`
    workers: int | None = None  #: processes that decode a folder's images; None: one a processor, eight at most
    sync_bn: bool = False  #: whether the processes of a run share the statistics of batch norms
    backend: str | None = None  #: one of `backends.choices()`; None: the choice in force when the run goes on
    recompute: bool = False  #: whether blocks make again in backward what they would keep
    compile: bool = False  #: whether torch.compile makes the network's training
    cuda_graph: bool = False  #: whether a GPU is given a step's forward and backward as CUDA graphs
    checkpoint_minutes: float = 10.0  #: from one checkpoint to the next within an epoch; 0: after every step; inf: none there
    keep: int = 0  #: of how many last epochs checkpoints are kept, besides the last and the best one
    target_accuracy: float | None = None  #: 0 to 1: the summary says when it was reached
    tensorboard: bool = False  #: whether TensorBoard's events are written

    def __post_init__(self):
        if isinstance(self.milestones, list):  # as JSON and TOML have it
            object.__setattr__(self, "milestones", tuple(self.milestones))
        for field in fields(self):
            value, kind = getattr(self, field.name), NUMBERS.get(field.type, field.type)
            if not isinstance(value, kind) or (isinstance(value, bool) and field.type is not bool):
                raise SettingError(field.name, f"expected {KINDS[field.type]}; got {value!r}")
        for names, holds, expected in _RULES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise SettingError(name, f"expected {expected}; got {value!r}")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise SettingError("warmup_epochs", f"expected 0 to epochs = {self.epochs}; got {self.warmup_epochs}")
        if not all(type(each) in (int, float) and each > 0 for each in self.milestones):
            raise SettingError("milestones", f"expected numbers of epochs, above 0; got {list(self.milestones)}")
        if bool(self.milestones) != (self.schedule == "step"):
            raise SettingError(
                "milestones", f"expected numbers of epochs with the schedule step, and with no other; got {list(self.milestones)}"
            )
        if self.nesterov and not self.momentum:
            raise SettingError("nesterov", "expected a momentum above 0 beside it")
        if self.ema_every > 1 and not self.ema:
            raise SettingError("ema_every", f"expected ema above 0 beside it; got ema = {self.ema}")
        self._check_images()

    def _check_images(self) -> None:
        of_folder = self.data.startswith(SCHEME)
        if self.image_size is not None and self.data != "synthetic" and not of_folder:
            raise SettingError("image_size", f"expected none, since only synthetic images and folders have one to choose, not {self.data}")
        for name in OF_FOLDERS:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default and not of_folder:
                raise SettingError(name, f"expected none, since only {SCHEME}PATH is decoded while it trains, not {self.data}")


def _one_of(*words: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in words, f"one of {', '.join(words)}"


def _at_least(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value >= least, f"a whole number of at least {least}"


#: (fields, whether a value can be one, what is expected). None, where a field may be None, always can.
_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("epochs", "batch_size", "accumulate", "repeats", "ema_every", "limit_train", "limit_eval"), *_at_least(1)),
    (("image_size", "train_size", "shorter_side"), *_at_least(1)),
    (("workers", "keep"), *_at_least(0)),
    (("corrupt",), *_one_of(*CORRUPT)),
    (("auto_augment",), *_one_of(*AUTO_AUGMENTS)),
    (("precision",), *_one_of(*PRECISIONS)),
    (("optimizer",), *_one_of(*OPTIMIZERS)),
    (("schedule",), *_one_of(*SCHEDULES)),
    (("backend",), lambda value: value in backends.choices(), f"one of {', '.join(backends.choices())}"),
    (("lr", "clip_norm"), lambda value: 0 < value < float("inf"), "a number above 0"),
    (("momentum", "label_smoothing", "ema"), lambda value: 0 <= value < 1, "at least 0 and below 1"),
    (("weight_decay", "mixup", "cutmix"), lambda value: 0 <= value < float("inf"), "at least 0"),
    (("erasing",), lambda value: 0 <= value <= 1, "0 to 1"),
    (("gamma",), lambda value: 0 < value <= 1, "above 0, at most 1"),
    (("target_accuracy",), lambda value: 0 < value <= 1, "above 0, at most 1"),
    (("checkpoint_minutes",), lambda value: value >= 0, "at least 0"),
    (("seed",), lambda value: 0 <= value < 1 << 63, "0 to 2^63 - 1"),
)  # fmt: skip
