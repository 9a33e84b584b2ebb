#!/usr/bin/env bash
# Guess: FlopCounterMode counts a convolution's backward as twice its forward, with groups as without: the gradients of input and weight are
#     each as many multiplications as the forward.
# Fact: the weight gradient is counted as if there were no groups. With 32 groups, as in ResNeXt, backward is 33 times forward, not 2; of
#     a depthwise convolution of 64 channels 65 times. Forward and the input's gradient are right.
# Matters: FLOPs of a training step, and the utilisation (MFU) that is made of them, are flattered for ResNeXt, RegNet, ConvNeXt,
#     MobileNet and EfficientNet: the fewer FLOPs a network really has, the more it seems to reach of the peak.
set -euo pipefail
source "$(dirname "$0")/fresh.bash"
fresh env torch==2.13.0 numpy==2.4.6

cat >"$folder/program.py" <<'PYTHON'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def counted(mask, y, x, conv):
    with FlopCounterMode(display=False) as counter:
        torch.ops.aten.convolution_backward(
            torch.ones_like(y), x, conv.weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], conv.groups, [*mask, False]
        )
    return counter.get_total_flops()


print("torch", torch.__version__, "- FLOPs over those of forward")
for groups in (1, 2, 32, 64):
    conv, x = nn.Conv2d(64, 64, 3, padding=1, groups=groups, bias=False), torch.randn(2, 64, 14, 14)
    with FlopCounterMode(display=False) as counter:
        y = conv(x)
    forward = counter.get_total_flops()
    assert forward == 2 * y.numel() * 64 // groups * 9  # two for each multiply and add
    of_input, of_weight = (counted(mask, y, x, conv) / forward for mask in ((True, False), (False, True)))
    print(f"  {groups:3} groups: gradient of the input {of_input:g}, of the weight {of_weight:g}")
    assert of_input == 1 and of_weight == groups, "grouped gradients are counted in another way"
PYTHON
"$folder/env/bin/python" -W ignore "$folder/program.py"
