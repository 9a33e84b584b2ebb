#!/usr/bin/env bash
# Guess: under autocast a ResNet with frozen batch norms moves as many bytes as one with nn.BatchNorm2d in evaluation mode; its activations
#     are bfloat16, frozen norms being the cheaper of the two.
# Fact: torchvision's FrozenBatchNorm2d and timm's FrozenBatchNormAct2d multiply by float32 buffers, which autocast does not touch, and
#     type promotion makes every norm's output float32: all 49 ReLUs of ResNet-50 read and write 4 bytes a value, every residual is added
#     in 4, and each of the 53 convolutions casts its input down again. With nn.BatchNorm2d in evaluation mode all that is bfloat16.
# Matters: detection and segmentation backbones are trained in just this way. Activations take twice the memory traffic that the
#     word "autocast" suggests, and a feature pyramid is handed float32.
set -euo pipefail
source "$(dirname "$0")/fresh.bash"
fresh env torch==2.13.0 torchvision==0.28.0 timm==1.0.31 numpy==2.4.6

cat >"$folder/program.py" <<'PYTHON'
import collections
import sys

import torch
from torch import nn

try:
    import torchvision
except RuntimeError:  # its binary library is for another build of the same PyTorch; its Python code asks for two operators
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    import torchvision
import timm
from timm.layers import FrozenBatchNormAct2d
from torchvision.ops import FrozenBatchNorm2d

print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}; ResNet-50 under autocast to bfloat16")
short = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
outputs = {}
for norm in (FrozenBatchNorm2d, nn.BatchNorm2d):
    model, seen = torchvision.models.resnet50(norm_layer=norm).eval(), collections.Counter()

    def record(module, inputs, output, seen=seen):
        seen[f"{type(module).__name__} {short[inputs[0].dtype]} to {short[output.dtype]}"] += 1

    for module in model.modules():
        if isinstance(module, (norm, nn.Conv2d, nn.ReLU)):
            module.register_forward_hook(record)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 3, 64, 64))
    print(f"  {norm.__name__}: {dict(seen)}")
    outputs[norm] = seen
assert outputs[FrozenBatchNorm2d]["ReLU float32 to float32"] == 49 and outputs[FrozenBatchNorm2d]["Conv2d float32 to bfloat16"] == 53
assert outputs[nn.BatchNorm2d]["ReLU bfloat16 to bfloat16"] == 49 and outputs[nn.BatchNorm2d]["Conv2d float32 to bfloat16"] == 1
of_timm = FrozenBatchNormAct2d(4)(torch.randn(1, 4, 2, 2, dtype=torch.bfloat16)).dtype
print(f"  timm's FrozenBatchNormAct2d makes {short[of_timm]} of bfloat16")
assert of_timm == torch.float32
PYTHON
"$folder/env/bin/python" -W ignore "$folder/program.py"
