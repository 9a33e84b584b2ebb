"""A profile that was not measured."""

import dataclasses

from fused_resnet.bench.schema import Meta
from fused_resnet.profile.analysis import Part, Profile

META = Meta("NVIDIA H100", 132, "570.1", "13.0", "9.8.0", "2.13.0", "3.6.0", "0123456789abcdef", "2026-01-31T23:59:58Z", None)


def profile(**changes):
    parts = [Part("conv1", "forward", 1.0, 2, 10**9, 10**8, 0.5), Part("conv1", "backward", 2.0, 3, 2 * 10**9, 2 * 10**8, 0.7),
             Part("optimizer", "optimizer", 0.2, 1, 0, 10**6, 0.1)]  # fmt: skip
    given = Profile(
        META, "resnet18", "ours", "bfloat16", 8, [3, 64, 64], "kernel times by CUPTI", 4.0, 3.2, 0.3, 6, 8e14, 3e12, "passes",
        {"eager": 2.0, "passes": 1.5, "fused": 1.0}, parts, [["sgemm<int, float>", 3, 2.0], ["relu", 3, 1.2]],
        [[0.0, 1e6], [1.0, 5e6], [2.0, 1e6]], True,
    )  # fmt: skip
    return dataclasses.replace(given, **changes)


def event(category, name, start, us, thread=1, **arguments):
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": start, "dur": us, "args": arguments}


def gpu_trace():
    """What the profiler writes on a GPU: the host launches, kernels run later; backward in a thread of its own."""
    number = {"External id": 0}

    def op(name, start, us, thread=1, **arguments):
        number["External id"] += 1
        return event("cpu_op", name, start, us, thread, **{"External id": number["External id"]}, **arguments)

    return [
        event("user_annotation", "step: forward", 1000, 100), event("user_annotation", "step: backward", 1100, 100),
        event("user_annotation", "step: optimizer", 1200, 50),
        op("aten::conv2d", 1010, 30, **{"Sequence number": 7}), op("aten::cudnn_convolution", 1015, 10),
        op("aten::relu", 1050, 10, **{"Sequence number": 8}),
        op("ConvolutionBackward0", 1110, 50, 2, **{"Sequence number": 7, "Fwd thread id": 1}), op("aten::convolution_backward", 1120, 20, 2),
        op("aten::_fused_sgd_", 1210, 20),
        event("kernel", "sm90_fprop", 1500, 40, 7, **{"External id": 2}), event("kernel", "relu_kernel", 1545, 10, 7, **{"External id": 3}),
        event("kernel", "sm90_dgrad", 1555, 60, 7, **{"External id": 5}), event("gpu_memset", "Memset", 1620, 5, 7, **{"External id": 5}),
        event("kernel", "multi_tensor_apply", 1650, 15, 7, **{"External id": 6}), event("kernel", "of another step", 100, 9, 7, **{"External id": 99}),
    ]  # fmt: skip
