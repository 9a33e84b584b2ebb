"""The settings of a training run: what a checkpoint keeps."""

from dataclasses import dataclass, fields

from .. import backends
from ..data import CORRUPT, SCHEME

PRECISIONS = ("fp32", "bf16", "fp16")
#: What a resumed run may change: how it computes, how long, how images get to it, and what is written down.
CHANGEABLE = (
    "epochs", "backend", "recompute", "corrupt", "workers", "checkpoint_minutes", "keep", "target_accuracy", "tensorboard",
)  # fmt: skip
#: A type of a field -> what is said of it.
KINDS = {
    str: "text", str | None: "text or None", int: "a whole number", int | None: "a whole number or None", float: "a number",
    float | None: "a number or None", bool: "True or False",
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
    lr: float = 0.1  #: the highest learning rate, at the end of the warm-up
    warmup_epochs: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_norms: bool = True  #: whether weight decay also acts on norms and biases, as in He et al. 2015
    label_smoothing: float = 0.0
    precision: str = "fp32"  #: of convolutions and activations; parameters and statistics are fp32
    seed: int = 0
    limit_train: int | None = None  #: use only so many images of the training split
    limit_eval: int | None = None
    image_size: int | None = None  #: pixels; for synthetic data and folders only
    corrupt: str = "refuse"  #: what becomes of an image of a folder that can't be decoded; of `data.CORRUPT`
    workers: int | None = None  #: processes that decode a folder's images; None: one a processor, eight at most
    sync_bn: bool = False  #: whether the processes of a run share the statistics of batch norms
    backend: str | None = None  #: one of `backends.choices()`; None: the choice in force when the run goes on
    recompute: bool = False  #: whether blocks make again in backward what they would keep
    checkpoint_minutes: float = 10.0  #: from one checkpoint to the next within an epoch; 0: after every step; inf: none there
    keep: int = 0  #: of how many last epochs checkpoints are kept, besides the last and the best one
    target_accuracy: float | None = None  #: 0 to 1: the summary says when it was reached
    tensorboard: bool = False  #: whether TensorBoard's events are written

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), NUMBERS.get(field.type, field.type)
            if not isinstance(value, kind) or (isinstance(value, bool) and field.type is not bool):
                raise SettingError(field.name, f"expected {KINDS[field.type]}; got {value!r}")
        for name in ("epochs", "limit_train", "limit_eval", "image_size", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(name, f"expected a whole number of at least 1; got {value}")
        of_folder = self.data.startswith(SCHEME)
        if self.image_size is not None and self.data != "synthetic" and not of_folder:
            raise SettingError("image_size", f"expected none, since only synthetic images and folders have one to choose, not {self.data}")
        if self.corrupt not in CORRUPT:
            raise SettingError("corrupt", f"expected one of {', '.join(CORRUPT)}; got {self.corrupt!r}")
        if self.workers is not None and self.workers < 0:
            raise SettingError("workers", f"expected a whole number of at least 0; got {self.workers}")
        for name in ("corrupt", "workers"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default and not of_folder:
                raise SettingError(name, f"expected none, since only {SCHEME}PATH is decoded while it trains, not {self.data}")
        if not 0 < self.lr < float("inf"):
            raise SettingError("lr", f"expected a number above 0; got {self.lr}")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise SettingError("warmup_epochs", f"expected 0 to epochs = {self.epochs}; got {self.warmup_epochs}")
        if not 0 <= self.momentum < 1:
            raise SettingError("momentum", f"expected at least 0 and below 1; got {self.momentum}")
        if not 0 <= self.weight_decay < float("inf"):
            raise SettingError("weight_decay", f"expected at least 0; got {self.weight_decay}")
        if not 0 <= self.label_smoothing < 1:
            raise SettingError("label_smoothing", f"expected at least 0 and below 1; got {self.label_smoothing}")
        if self.precision not in PRECISIONS:
            raise SettingError("precision", f"expected one of {', '.join(PRECISIONS)}; got {self.precision!r}")
        if self.keep < 0:
            raise SettingError("keep", f"expected a whole number of at least 0; got {self.keep}")
        if not self.checkpoint_minutes >= 0:
            raise SettingError("checkpoint_minutes", f"expected at least 0; got {self.checkpoint_minutes}")
        if self.target_accuracy is not None and not 0 < self.target_accuracy <= 1:
            raise SettingError("target_accuracy", f"expected above 0, at most 1; got {self.target_accuracy}")
        if not 0 <= self.seed < 1 << 63:
            raise SettingError("seed", f"expected 0 to 2^63 - 1; got {self.seed}")
        if self.backend is not None and self.backend not in backends.choices():
            raise SettingError("backend", f"expected one of {', '.join(backends.choices())}; got {self.backend!r}")
