"""Fused ResNet training for PyTorch: conv + batch norm + ReLU + residual in one pass, as autograd operators.

    import fused_resnet
    model = fused_resnet.fuse(model)                   # torchvision's or timm's ResNet, in place; or, from the start:
    model = fused_resnet.models.resnet50().cuda()      # torchvision's resnet50, argument for argument and key for key
    with fused_resnet.backend("passes"):               # optional: force an implementation
        loss = criterion(model(images), labels)

Public: `fuse`, `unfuse`, `report`, `recompute`, `fold`, `release_memory`, the modules `ConvBNAct2d`, `BasicBlock`, `Bottleneck`,
`PreActBlock`, and `models`, `functional`, `ops`, `nn`, `backend`, `__version__`. The rest may change.
"""

from .processors import wait_passively

wait_passively()  # before PyTorch is loaded

from . import functional, models, nn, ops  # noqa: E402
from ._version import __version__  # noqa: E402
from .backends import backend  # noqa: E402
from .convert import fuse, recompute, report, unfuse  # noqa: E402
from .inference import fold  # noqa: E402
from .models import BasicBlock, Bottleneck, ConvBNAct2d, PreActBlock  # noqa: E402
from .native import release_memory  # noqa: E402

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct2d",
    "PreActBlock",
    "__version__",
    "backend",
    "fold",
    "functional",
    "fuse",
    "models",
    "nn",
    "ops",
    "recompute",
    "release_memory",
    "report",
    "unfuse",
]
