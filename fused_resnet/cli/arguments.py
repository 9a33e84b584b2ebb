"""How the command line reads its arguments, and how it refuses them: one line, exit code 2."""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import NoReturn

import torch

from .. import backends, fuse, models
from ..bench.load import OTHERS, LoadError, builder
from ..bench.trace import Trace, trace
from ..data import NAMES, SCHEME, DataSet, Description, FolderDataSet
from ..train import AUTOCAST
from ..train.checkpoint import one_line
from ..words import meant

COLOUR = 3  # channels


class UsageError(Exception):
    """An argument that can't be used, or an environment variable. The message names it and says what was expected."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"argument {name}: {reason}" if name.startswith("-") else f"{name}: {reason}")


class Unavailable(Exception):
    """A command can't run on this machine. The message says what is missing."""


@contextmanager
def blaming(name: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns these errors of the block into a `UsageError` about the argument `name`."""
    try:
        yield
    except errors as error:
        raise UsageError(name, str(error)) from error


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage, and whose help keeps its own line breaks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole_number(text: str) -> int:
    """The type of an argument: an integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number; got {text!r}") from None


def positive(text: str) -> int:
    """The type of an argument: a whole number of at least 1."""
    if (value := whole_number(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; got {text!r}")
    return value


def number(text: str) -> float:
    """The type of an argument: a real number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number; got {text!r}") from None


def numbers(text: str) -> tuple[float, ...]:
    """The type of an argument: real numbers with commas between them."""
    return tuple(number(each) for each in text.split(","))


def positive_number(text: str) -> float:
    """The type of an argument: a number above 0."""
    if not 0 < (value := number(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0; got {text!r}")
    return value


def one_of(*known: str):
    """The type of an argument: one of these words. Its error lists them all, and says which was meant."""

    def word(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}; got {text!r}{meant(text, known)}")
        return text

    return word


def model_name(text: str) -> str:
    """The type of an argument: the name of a network, this package's or another's (`bench.load.builder`)."""
    return text if ":" in text else one_of(*models.list_models(), *OTHERS)(text)


def names_code(model: str) -> bool:
    """Whether a network's name is MODULE:FUNCTION: code of the user's."""
    return ":" in model and model.partition(":")[0] not in ("torchvision", "timm")


def data_name(text: str) -> str:
    """The type of an argument: a data set, by its name or as a folder of images."""
    return text if text.startswith(SCHEME) else one_of(*NAMES, f"{SCHEME}PATH")(text)


def add_model(parser: argparse.ArgumentParser, default: str | list[str]) -> None:
    """Adds `--model`: one network, or several where the default is a list."""
    several = isinstance(default, list)
    shown = " ".join(default) if several else default
    parser.add_argument("--model", type=model_name, default=default, metavar="MODEL", **({"nargs": "+"} if several else {}),
                        help="a network of this package, torchvision:NAME, timm:NAME, or MODULE:FUNCTION of your own, which "
                             f"is copied and left as it is (default: {shown})")  # fmt: skip


def add_commit(parser: argparse.ArgumentParser) -> None:
    """Adds `--commit`."""
    parser.add_argument("--commit", metavar="HASH", help="written into the results (default: that of this package's own checkout, else "
                                                         "its version)")  # fmt: skip


def add_form(parser: argparse.ArgumentParser) -> None:
    """Adds `--csv` and `--json`, which `args.form` tells: what tables are printed as."""
    group = parser.add_mutually_exclusive_group()
    for form in ("csv", "json"):
        group.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=f"print tables as {form.upper()}")
    parser.set_defaults(form="table")


def device(name: str) -> torch.device:
    """The device for `--device auto|cpu|cuda`. Raises `UsageError` where PyTorch sees no GPU and one was asked for."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device", f"cuda was asked for, but PyTorch {torch.__version__} sees no GPU here; expected cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def build_model(name: str, data: DataSet | FolderDataSet | Description) -> torch.nn.Module:
    """An untrained network for the classes and channels of a data set; another library's, or a user's, is fused.

    Raises `UsageError` where there is none of that name, and where it does not make scores of such images.
    """
    if ":" not in name and data.channels != COLOUR:
        able = [known for known in models.list_models() if "in_channels" in signature(getattr(models, known)).parameters]
        if name not in able:
            expected = f"expected a network for {data.channels}-channel images, such as those of {data.name}"
            raise UsageError("--model", f"{expected}: {', '.join(able)}; got {name!r}, which takes {COLOUR} channels")
    with blaming("--model", LoadError):
        model = builder(name, len(data.classes), data.channels if data.channels != COLOUR else None)()
    return _checked(fuse(copy.deepcopy(model)), name, data) if ":" in name else model  # one that exists stays as it is


def _checked(model: torch.nn.Module, name: str, data: DataSet | FolderDataSet | Description) -> torch.nn.Module:
    """The network, once it has been seen to make scores of two images."""
    images = torch.zeros(2, *data.image_shape)
    try:
        with torch.no_grad():
            scores = model.eval()(images.contiguous(memory_format=torch.channels_last))
    except Exception as error:  # whatever another's network raises
        raise UsageError("--model", f"{name} can't take images of shape {list(images.shape)}: {one_line(error)}") from error
    expected = [2, len(data.classes)]
    if not (isinstance(scores, torch.Tensor) and list(scores.shape) == expected):
        found = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise UsageError("--model", f"expected scores of shape {expected} of 2 images of {data.name}; {name} makes {found}")
    return model.train()


def traced(make: Callable[[], torch.nn.Module], option: str, name: str, shape: Sequence[int], dtype: torch.dtype) -> Trace:
    """A training step of the network `name` on images of `shape`, [N, C, H, W], traced.

    Raises `UsageError` about the argument `option` where the network can't take such images, `LoadError` where it is none.
    """
    try:
        return trace(make, shape, dtype)
    except LoadError:
        raise
    except Exception as error:  # whatever a user's network raises
        first = next(iter(str(error).splitlines()), "")
        raise UsageError(option, f"{name} can't be traced on {list(shape)}: {type(error).__name__}: {first}") from error


def chosen_backend(where: torch.device, precision: str, option: str | None) -> str:
    """The backend that a run in that precision takes, with the choice in force.

    Raises `UsageError` where a forced one is unknown or can't run there; `option` is what `--backend` said, or None.
    """
    with blaming("FUSED_RESNET_BACKEND" if option is None else "--backend", RuntimeError, ValueError):
        return backends.resolve(where, AUTOCAST[precision] or torch.float32)


def slow_precision(where: torch.device, precision: str) -> str | None:
    """What is to be said where a CPU has no instructions for that precision; None elsewhere."""
    if where.type != "cpu" or precision == "fp32":
        return None
    # oneDNN's answer, which PyTorch itself asks for; a build without oneDNN has neither.
    if torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported")():
        return None
    of_ours = "fused convolutions run in fp32, at its speed"
    return f"This CPU has no instructions for {precision}: {of_ours}; PyTorch's own modules have a small part of it."
