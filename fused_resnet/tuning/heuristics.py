"""The rule of thumb for each kind of task, and what the tuner tries around it."""

from dataclasses import replace

from . import heuristic_dgrad, heuristic_fprop, heuristic_wgrad
from .configuration import Configuration
from .task import Task

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


def configuration(task: Task, capability: tuple[int, int]) -> Configuration:
    """The rule of thumb, on a GPU of that compute capability."""
    itemsize = ITEMSIZE[task.dtype]
    if task.kind == "dgrad":
        return heuristic_dgrad.configuration(task.conv, itemsize, capability)
    rule = heuristic_fprop if task.kind == "fprop" else heuristic_wgrad
    return rule.configuration(task.conv, itemsize, capability, prologue=task.source != "act")


def candidates(task: Task, capability: tuple[int, int]) -> list[Configuration]:
    """What the tuner tries: the rule of thumb first, then what differs from it in one thing, then in two.

    Not all of them run on every GPU: one that asks for too much shared memory fails when it is tried, and is passed over.
    """
    rule = configuration(task, capability)
    found = {rule: None}
    if task.kind == "wgrad":  # how far to split is what a rule of thumb knows least of
        found |= {replace(rule, splits=splits): None for splits in (2, 4, 8)}
    for start in (rule, *_near(rule)):
        found |= dict.fromkeys(_near(start))
    return list(found)


def _near(c: Configuration) -> list[Configuration]:
    """Configurations one step away. The order is a guess of what matters most: tiles, then depth, then threads."""
    steps = [
        {"block_m": c.block_m // 2}, {"block_n": c.block_n * 2}, {"block_n": c.block_n // 2}, {"block_m": c.block_m * 2},
        {"stages": c.stages + 1}, {"stages": c.stages - 1}, {"warps": c.warps // 2}, {"warps": c.warps * 2},
        {"block_k": c.block_k // 2}, {"block_k": c.block_k * 2},
    ]  # fmt: skip
    if c.splits > 1:
        steps[2:2] = [{"splits": c.splits * 2}, {"splits": c.splits // 2}]
    return [replace(c, **step) for step in steps if _possible({**vars(c), **step})]


def _possible(values: dict[str, int]) -> bool:
    blocks = values["block_m"], values["block_n"], values["block_k"]
    threads_fit = blocks[0] * blocks[1] <= 32 * 128 * values["warps"]  # at most 128 accumulators a thread
    return min(blocks) >= 16 and max(blocks) <= 256 and 4 <= values["warps"] <= 8 and 2 <= values["stages"] <= 5 and threads_fit
