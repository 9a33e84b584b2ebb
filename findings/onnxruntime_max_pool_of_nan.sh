#!/usr/bin/env bash
# Guess: a NaN in an exported ResNet shows in ONNX Runtime as it does in PyTorch; MaxPool hands it on like Relu and Conv do.
# Fact: on x86-64 ONNX Runtime's MaxPool and GlobalMaxPool drop a NaN wherever the window holds a number, where PyTorch's max_pool2d returns
#     NaN. Relu and the average pools keep it. ONNX's text says nothing of NaN.
# Matters: the first pool of a ResNet comes right behind its stem. A stem that makes NaN at single pixels, or an input decoded to NaN, gives
#     finite and wrong logits when served, where the same input in PyTorch is seen to be bad.
set -euo pipefail
source "$(dirname "$0")/fresh.bash"
fresh env torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0

cat >"$folder/program.py" <<'PYTHON'
import math
import platform

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper


def by_onnxruntime(operator, x, **attributes):
    floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"], **attributes)], operator, floats[:1], floats[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]


print(f"onnxruntime {onnxruntime.__version__}, onnx {onnx.__version__}, torch {torch.__version__}, {platform.machine()}; NaN in the output")
stem = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
cases = {
    "MaxPool": (stem, lambda x: F.max_pool2d(x, 3, 2, 1)),
    "GlobalMaxPool": ({}, lambda x: x.amax((2, 3), keepdim=True)),
    "AveragePool": (stem, lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    "GlobalAveragePool": ({}, lambda x: x.mean((2, 3), keepdim=True)),
    "Relu": ({}, F.relu),
}
torch.manual_seed(0)
x = torch.randn(1, 4, 12, 12)
x[0, :, 4, 5] = math.nan
for operator, (attributes, by_torch) in cases.items():
    ours, theirs = by_onnxruntime(operator, x, **attributes), by_torch(x).numpy()
    print(f"  {operator:18} onnxruntime {np.isnan(ours).sum()}, torch {np.isnan(theirs).sum()}")
    assert np.isnan(theirs).any()
    assert np.isnan(ours).any() == ("Max" not in operator), "NaN is treated in another way"
    np.testing.assert_allclose(ours[~np.isnan(theirs)], theirs[~np.isnan(theirs)], rtol=1e-5, atol=1e-6)
PYTHON
"$folder/env/bin/python" -W ignore "$folder/program.py"
