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
