"""What a network looks like from the inside, layer by layer: gradient norms, and the sizes of responses.

A probe is one forward and backward of a copy of the network, in training mode, in float32, by PyTorch's own modules, which hooks can watch.
The network, its statistics and the state of random numbers stay as they were.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import backend

IMAGES = 256  # of the training split, without augmentation


@dataclass(frozen=True)
class Probe:
    """One look at a network. Lists have an entry for each convolution of the main path, in the order of the forward."""

    layers: list[str]  #: names in the state_dict
    weights: list[float]  #: norm of the loss's gradient in the convolution's weight
    outputs: list[float]  #: norm of the loss's gradient in the response, of all images
    #: standard deviation of the response, which is the output behind the norm, before addition and ReLU: He et al. 2015, figure 7
    responses: list[float]
    loss: float  #: cross-entropy, nats an image

    @property
    def passed(self) -> float:
        """The norm of the gradient in the first response over that in the last one; NaN where none reached the last."""
        return self.outputs[0] / self.outputs[-1] if self.outputs[-1] else math.nan


def probe(model: nn.Module, images: Tensor, labels: Tensor) -> Probe:
    """A probe of a network of `fused_resnet.models` for normalised images [N, C, H, W] and labels int64 [N]."""
    model = copy.deepcopy(model).float().train()
    modules = dict(model.named_modules())
    # Of a shortcut's projection there is no depth.
    layers = [name for name, module in modules.items() if isinstance(module, nn.Conv2d) and "downsample" not in name]
    responses, outputs = (dict.fromkeys(layers, math.nan) for _ in range(2))

    def watch(name: str, response: Tensor) -> None:
        # At once: ReLU and addition write in its place. The gradient is that of the values before.
        responses[name] = response.detach().double().std().item()
        response.register_hook(lambda gradient: outputs.__setitem__(name, _norm(gradient)))

    for name in layers:
        modules[_norm_of(name)].register_forward_hook(lambda module, inputs, response, name=name: watch(name, response))
    with backend("off"):
        loss = nn.functional.cross_entropy(model(images.float()), labels)
        loss.backward()
    weights = [_norm(modules[name].weight.grad) for name in layers]
    return Probe(layers, weights, [outputs[name] for name in layers], [responses[name] for name in layers], loss.item())


def _norm_of(conv: str) -> str:
    """The name of a convolution's norm: bn2 of conv2."""
    before, _, number = conv.rpartition("conv")
    return f"{before}bn{number}"


def _norm(t: Tensor) -> float:
    """In float64: the squares of gradients that vanish are below the range of float32."""
    return torch.linalg.vector_norm(t.detach(), dtype=torch.float64).item()
