"""Fused ResNet training for PyTorch: conv + batch norm + ReLU + residual in one pass, as autograd operators.

    import fused_resnet
    model = fused_resnet.models.resnet50().cuda()      # torchvision's resnet50, argument for argument and key for key
    with fused_resnet.backend("passes"):               # optional: force an implementation
        loss = criterion(model(images), labels)

Public: `models`, `functional`, `ops`, `nn`, `backend`, `fold`, `__version__`. The rest may change.
"""

from . import functional, models, nn, ops
from ._version import __version__
from .backends import backend
from .inference import fold

__all__ = ["__version__", "backend", "fold", "functional", "models", "nn", "ops"]
