"""The benchmark's gate on a small network and a block of it, in three dtypes, and what it is asked about: tests/bench/test_gate.py, tests/faults.py."""

import torch

from fused_resnet.bench.gate import DRAWS, LATER_DRAWS, Gate
from fused_resnet.bench.networks import STEPS
from fused_resnet.bench.steps import Implementation, Subject
from support import planted
from support.small import SIZE, network

CPU = torch.device("cpu")
BATCH = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLANTED = Implementation("planted", True)


def whole():
    return network(dtype=torch.float32, width=4)


SUBJECTS = {
    "train": Subject("small", whole, SIZE[1:]),
    "inference": Subject("small", whole, SIZE[1:]),
    "blocks": Subject("small.layer2.0", lambda: whole().layer2[0], (64, 10, 8)),
}
GATES: dict[tuple[str, torch.dtype], Gate] = {}


def gate_of(suite: str, dtype: torch.dtype) -> Gate:
    if (suite, dtype) not in GATES:
        torch.manual_seed(7)
        made = Gate(STEPS[suite], SUBJECTS[suite], dtype, BATCH, CPU)
        made.prepare(None)
        GATES[suite, dtype] = made
    return GATES[suite, dtype]


def verdicts(made: Gate, how: Implementation | str, calls: int = 3) -> list[str | None]:
    """Before timing, and after."""
    step = made.step(how, made.dtype, BATCH)
    step()
    before = made.verdict(step, DRAWS, BATCH)[1]
    for _ in range(calls):
        step()
    return [before, made.verdict(step, LATER_DRAWS, BATCH)[1]]


FAULTS = [(suite, fault) for suite in STEPS for fault in (planted.INFERENCE if suite == "inference" else planted.TRAINING)]
