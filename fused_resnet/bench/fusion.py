"""Estimates the bytes that fusion could save in any network's traced step.

`designs` makes kernels of a trace in three ways:

- `eager`: each operator a kernel;
- `passes`: element-wise operators that follow one another are one pass, which reads what comes from outside and writes what is needed
  outside; a reduction joins the pass that makes its operand. The mask of a ReLU is a bit a value, or recomputed where the pass reads
  what it is made of;
- `fused`: such passes cost no trip of their own. One whose operand comes from a convolution, a product or a pool runs in its epilogue,
  one whose result goes into one runs in its prologue, in each of them if that moves fewer bytes than to write the result once.

The last is a bound for an arbitrary graph, no promise that such a kernel is written. For ResNets, tests hold all three to the
designs of `roofline`, which are counted by hand.
"""

from dataclasses import replace

from .trace import HEAVY, POINTWISE, REDUCTION, Op, Trace


def designs(trace: Trace) -> dict[str, list[Op]]:
    """The operators of a step as `eager`, `passes` and `fused` run them; the top of this module tells what these are."""
    passes = _group(trace)
    return {"eager": trace.ops, "passes": passes, "fused": _absorb(trace, passes)}


def _group(trace: Trace) -> list[Op]:
    """Element-wise operators that follow one another, as one operator each; heavy ones by themselves."""
    ops = trace.ops
    producer = {value: i for i, op in enumerate(ops) for value in op.writes}
    readers: dict[int, list[int]] = {}
    for i, op in enumerate(ops):
        for value in op.reads:
            readers.setdefault(value, []).append(i)

    # An operator's level is how many barriers, heavy operators and whole reductions, lie before it. Of one level, none waits for another.
    level = [0] * len(ops)
    for i, op in enumerate(ops):
        for value in op.reads:
            if (j := producer.get(value)) is not None and j < i:
                level[i] = max(level[i], level[j] + (op.kind == HEAVY or ops[j].kind != POINTWISE))
    for i in reversed(range(len(ops))):  # as late as its readers allow, so that a shortcut's norm meets its addition
        after = [j for value in ops[i].writes for j in readers.get(value, ())]
        if ops[i].kind == POINTWISE and after and all(ops[j].kind != HEAVY for j in after):
            level[i] = max(level[i], min(level[j] for j in after))

    root = list(range(len(ops)))

    def find(i: int) -> int:
        while root[i] != i:
            i = root[i]
        return i

    for i, op in enumerate(ops):
        for value in op.reads:
            j = producer.get(value)
            if j is None or op.kind == HEAVY or ops[j].kind != POINTWISE:
                continue
            if level[i] == level[j] and op.backward == ops[j].backward:
                root[find(j)] = find(i)
    members: dict[int, list[int]] = {}
    for i in range(len(ops)):
        members.setdefault(find(i), []).append(i)
    merged: list[Op] = []
    for group in sorted(members.values(), key=lambda group: group[-1]):
        merged.append(_merge(trace, group, readers, {value: op for op in merged for value in op.writes}))
    return merged


def _merge(trace: Trace, group: list[int], readers: dict[int, list[int]], makers: dict[int, Op]) -> Op:
    """What a pass over all operators of `group` reads from outside and writes for outside. `makers`: the passes so far, by value."""
    ops = [trace.ops[i] for i in group]
    if ops[0].kind == HEAVY:
        return _copy(ops[0])
    made = {value for op in ops for value in op.writes}
    reads = {value: size for op in ops for value, size in op.reads.items() if value not in made}
    writes = {
        value: size for op in ops for value, size in op.writes.items()
        if value not in readers or any(i not in group for i in readers[value])
    }  # fmt: skip
    for index, taps in trace.taps.items():
        for values in (reads, writes):
            if values.pop(index, None) is not None:
                values[taps] = trace.sizes[taps]
    for act, mask in trace.masks.items():
        size = trace.sizes[mask]
        if act in made and len(_large(reads, size)) > 1 and any(trace.ops[i].backward for i in readers[act]):
            writes[mask] = size
        if act in reads and all(op.work == "threshold_backward" for op in ops if act in op.reads):
            del reads[act]
            source = _large(makers[act].reads, size) if act in makers else []
            if len(source) != 1 or source[0] not in reads:
                reads[mask] = size
    kind = REDUCTION if all(op.kind == REDUCTION for op in ops) else POINTWISE
    work = ", ".join(dict.fromkeys(op.work for op in ops))
    return Op(ops[-1].layer, work, kind, ops[0].backward, 0, reads, writes, {value for op in ops for value in op.sums})


def _large(values: dict[int, int], mask: int) -> list[int]:
    """The values that are as large as an activation, whose mask has that many bytes."""
    return [value for value, size in values.items() if size > mask]


def _copy(op: Op) -> Op:
    return replace(op, reads=dict(op.reads), writes=dict(op.writes), sums=set(op.sums))


def _absorb(trace: Trace, passes: list[Op]) -> list[Op]:
    """The passes without those that run in the prologue or the epilogue of a heavy operator."""
    ops = [_copy(op) for op in passes]
    left = list(ops)
    for op in ops:
        if op.kind != HEAVY and (_into_epilogue(op, left, trace.covered) or _into_prologue(op, left)):
            left.remove(op)
    return left


def _into_epilogue(op: Op, ops: list[Op], covered: dict[int, int]) -> bool:
    """Move `op` into the epilogue of the last heavy operator that it waits for. Returns whether that is possible.

    Another gradient that is added there need not exist where it is zero, between the windows of a strided 1x1 convolution.
    """
    makers = [i for i, other in enumerate(ops) if other is not op and set(other.writes) & set(op.reads)]
    if not makers or ops[last := max(makers)].kind != HEAVY or ops[last].backward != op.backward:
        return False
    maker = ops[last]
    if maker.sums & set(op.reads):
        return False
    (result, *_) = set(maker.writes) & set(op.reads)
    for i in makers[:-1]:
        for value in set(ops[i].writes) & set(op.reads) & set(covered):
            ops[i].writes[value] = op.reads[value] = covered[value]
    maker.reads |= {value: size for value, size in op.reads.items() if value not in maker.writes}
    if not any(result in other.reads for other in ops if other is not op):
        del maker.writes[result]
    maker.writes |= op.writes
    maker.sums |= op.sums
    return True


def _into_prologue(op: Op, ops: list[Op]) -> bool:
    """Move `op` into the prologues of the heavy operators that read its result. Returns whether there is such an operator."""
    users = [other for other in ops if other.kind == HEAVY and set(other.reads) & set(op.writes)]
    others = [other for other in ops if other is not op and other.kind != HEAVY and set(other.reads) & set(op.writes)]
    if not users:
        return False
    results = {value for user in users for value in user.reads if value in op.writes}
    written = sum(op.writes.values()) + sum(user.reads[v] for user in users[1:] for v in results if v in user.reads)
    again = (len(users) - 1) * sum(op.reads.values())
    if len(op.writes) == 1 and not others and again <= written:
        readers = users
    else:
        readers, users[0].writes = users[:1], users[0].writes | op.writes
    for reader in readers:
        for value in results & set(reader.reads):
            del reader.reads[value]
        reader.reads |= op.reads
    return True
