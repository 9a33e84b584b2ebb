"""A trained network as a file for other programs: weights, torch.export's program, ONNX. A file is run before it counts.

Each takes normalised images, float32 [N, C, H, W] with any N, and gives scores, float32 [N, classes]. The names of classes and the
normalisation go along (`METADATA`).
"""

import copy
import importlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import backend, models
from ..data import Description
from ..files import replace_file

#: The name of what goes along: an extra file of torch.export's, a metadata property of ONNX's. JSON, the fields of `data.Description`.
METADATA = "fused_resnet.json"
CHECKED_IMAGES = 3  # another number than the one that is traced
#: A program that adds in another order is no further from float64 than so many times PyTorch's own float32; a few roundings are free.
MARGIN, ROUNDINGS = 8, 16


class ExportError(RuntimeError):
    """A network can't be exported, or what was exported gives other scores. The message says why."""


@dataclass(frozen=True)
class Agreement:
    """How far scores are from those in float64, as the largest difference over some random images."""

    by: str  #: what ran the file
    difference: float
    own: float  #: that of PyTorch's modules in float32
    largest: float  #: the largest score, without its sign

    @property
    def holds(self) -> bool:
        """Whether the file is right. A NaN is no agreement."""
        return self.difference <= MARGIN * self.own + ROUNDINGS * torch.finfo(torch.float32).eps * self.largest


#: Makes a file's content of (network in eval mode, its images' description) -> (content, what runs it, None where nothing here can)
Maker = Callable[[nn.Module, Description], tuple[bytes, tuple[str, Callable[[Tensor], Tensor]] | None]]


def export(model: nn.Module, name: str, description: Description, path: Path) -> Agreement | None:
    """Writes the network `name` to `path`, in the format that its suffix stands for (`FORMATS`): whole and right, or not at all.

    The network goes to the CPU and into eval mode. Returns how well the file agrees with it; None for weights that no other library here
    takes. Raises `ExportError`, and OSError where the file can't be written.
    """
    model = model.cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(CHECKED_IMAGES, *description.image_shape, generator=generator)
    with backend("off"), torch.no_grad():
        content, other = FORMATS[path.suffix][1](name)(model, description)
        found = None if other is None else _agreement(model, images, *other)
    if found and not found.holds:
        told = f"scores differ from float64's by {found.difference:.1e}, PyTorch's own by {found.own:.1e}"
        raise ExportError(f"{path}: not written, since {found.by} gives other scores than the network: {told}")
    replace_file(path, lambda file: file.write(content))
    return found


def _agreement(model: nn.Module, images: Tensor, by: str, run: Callable[[Tensor], Tensor]) -> Agreement:
    truth = copy.deepcopy(model).double()(images.double())
    difference, own = ((scores.double() - truth).abs().max().item() for scores in (run(images), model(images)))
    return Agreement(by, difference, own, truth.abs().max().item())


def _metadata(description: Description) -> str:
    return json.dumps(asdict(description))


def _weights(name: str) -> Maker:
    """A state_dict. Where torchvision has the network, its network takes it."""

    def make(model, description):
        file = io.BytesIO()
        torch.save({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, file)
        other = _torchvision_peer(name, len(description.classes))
        if other is None:
            return file.getvalue(), None
        other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        return file.getvalue(), ("torchvision's network with these weights", other.eval())

    return make


def _torchvision_peer(name: str, classes: int) -> nn.Module | None:
    """torchvision's network of that name; None where it has none, or is not installed."""
    source, colon, function = name.rpartition(":")
    if (colon and source != "torchvision") or not (colon or name in models.list_models()):
        return None
    try:
        make = getattr(importlib.import_module("torchvision.models"), function, None)
    except (ImportError, RuntimeError):  # RuntimeError: its library was built for another PyTorch
        return None
    return make(num_classes=classes) if make else None


def _dynamic(model: nn.Module, description: Description) -> dict:
    """What both exporters take: an example of two images, and that there may be another number of them."""
    images = torch.zeros(2, *description.image_shape)
    return dict(mod=model, args=(images,), dynamic_shapes=({0: torch.export.Dim("images", min=1)},))


def _program(name: str) -> Maker:
    def make(model, description):
        file = io.BytesIO()
        torch.export.save(torch.export.export(**_dynamic(model, description)), file, extra_files={METADATA: _metadata(description)})
        return file.getvalue(), ("torch.export's program", torch.export.load(io.BytesIO(file.getvalue())).module())

    return make


def _onnx(name: str) -> Maker:
    def make(model, description):
        try:
            import onnxruntime
            import onnxscript  # noqa: F401  (PyTorch exports by it)
        except ImportError as error:
            raise ExportError(f"ONNX needs {error.name}: pip install 'fused-resnet[onnx]'") from None
        program = torch.onnx.export(
            torch.export.export(**_dynamic(model, description)), input_names=["images"], output_names=["scores"], dynamo=True, verbose=False
        )
        program.model.metadata_props[METADATA] = _metadata(description)
        content = program.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return content, ("ONNX Runtime", lambda images: torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0]))

    return make


#: Suffix -> (what it is, makes the maker for the network of that name).
FORMATS: dict[str, tuple[str, Callable[[str], Maker]]] = {
    ".pth": ("a state_dict of PyTorch's", _weights),
    ".pt2": ("torch.export's program", _program),
    ".onnx": ("ONNX", _onnx),
}
