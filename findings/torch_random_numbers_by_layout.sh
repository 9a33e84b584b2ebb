#!/usr/bin/env bash
# Guess: with one seed nn.init.normal_ and kaiming_normal_ give a channels_last weight the numbers of a contiguous one, or at worst the
#     same numbers in the order of memory.
# Fact: on a CPU they are other numbers: sorted, they still differ. Contiguous tensors of 16 values and more take a generator that works
#     in blocks, all others one that draws value by value. uniform_, and tensors of fewer than 16 values, give the same numbers in the order
#     of memory.
# Matters: model.to(memory_format=torch.channels_last) before or after initialisation, and model.apply(init) on a network that is in
#     channels_last already, start two different networks from one seed; a comparison of layouts then compares initial values.
# Source: pytorch/pytorch#166856.
set -euo pipefail
source "$(dirname "$0")/fresh.bash"
fresh env torch==2.13.0 numpy==2.4.6

cat >"$folder/program.py" <<'PYTHON'
import torch
from torch import nn


def drawn(init, shape, layout):
    torch.manual_seed(0)
    return init(torch.empty(shape).to(memory_format=layout))


print("torch", torch.__version__, "- a channels_last weight beside a contiguous one of the same seed")
for init in (nn.init.normal_, nn.init.kaiming_normal_, nn.init.uniform_):
    for shape in ((64, 64, 3, 3), (1, 2, 3, 2)):
        contiguous, channels_last = (drawn(init, shape, layout) for layout in (torch.contiguous_format, torch.channels_last))
        equal = torch.equal(contiguous, channels_last)
        in_memory = torch.equal(contiguous.flatten(), channels_last.permute(0, 2, 3, 1).flatten())
        numbers = torch.equal(contiguous.flatten().sort().values, channels_last.flatten().sort().values)
        print(f"  {init.__name__:16} {shape!s:16} equal {equal!s:6} in the order of memory {in_memory!s:6} the same numbers at all {numbers}")
        assert not equal
        assert in_memory == numbers == (init is nn.init.uniform_ or shape[0] == 1), "the layouts draw in another way"
PYTHON
"$folder/env/bin/python" -W ignore "$folder/program.py"
