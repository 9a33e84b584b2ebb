"""A `Program` -> Python functions, one a basic block, over registers that are arrays over threads.

Each block has two: one that all threads run, and one that some do, under a mask. A function ends with (taken, target, following): where
`taken` (None: everywhere) its threads go to the block `target`, else to `following`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import values
from .arithmetic import DTYPES, comparison, value
from .matrix import SHAPES
from .parse import END, Instruction, Program, vector
from .values import Array

#: Bytes of a register by its class; a predicate is a bool.
WIDTHS = {"p": 1, "rs": 2, "r": 4, "rd": 8}
REGISTER = re.compile(r"%(p|rs|rd|r)\d+")
#: Special registers as the machine has them, int32; those of a launch in one dimension that are always 0.
SPECIAL = {"%tid.x": "M.tid", "%ctaid.x": "M.ctaid", "%nctaid.x": "M.nctaid", "%laneid": "M.laneid"}
ZERO = ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z", "global_smem")
#: What may be asked of caches: it changes no value.
HINTS = re.compile(r"L[12]::\w+")
#: Functions that the expressions call.
FUNCTIONS = (
    "fma", "truncated_division", "remainder", "shift", "bit_field", "permute", "bfloat16", "float16", "from_bfloat16", "from_float16", "halves",
    "integer_pairs", "pack", "high_product", "to_integer", "rsqrt", "tf32",
)  # fmt: skip


@dataclass(frozen=True)
class Code:
    """A program that can run."""

    program: Program
    registers: list[str]  #: the dtype that each is kept in
    constants: list[Array]
    grain: int  #: bytes of the narrowest access to shared memory, at most 4
    together: list[Callable]  #: of each block, for all threads
    apart: list[Callable]  #: of each block, for some


class Writer:
    """Writes the Python lines of one program's blocks."""

    def __init__(self, program: Program):
        self.program = program
        self.homes = _homes(program)
        self.index = {register: n for n, register in enumerate(self.homes)}
        self.constants: dict[tuple[str, bytes], Array] = {}
        self.lines: list[str] = []

    def constant(self, number: float, dtype: str) -> str:
        """The expression of an array of one number."""
        if dtype in ("f4", "f8"):
            array = np.array(number, dtype)
        elif dtype == "?":
            array = np.array(bool(number))
        else:
            width = np.dtype(dtype).itemsize
            array = np.array(int(number) & ((1 << 8 * width) - 1), f"u{width}").view(dtype)
        key = dtype, array.tobytes()
        self.constants.setdefault(key, array)
        return f"K[{list(self.constants).index(key)}]"

    def read(self, operand: str, dtype: str) -> str:
        """The expression of an operand as an array of `dtype`. Of a wider register it is the low part."""
        if operand in self.index:
            home, expression = self.homes[operand], f"R[{self.index[operand]}]"
            if home == dtype:
                return expression
            have, want = np.dtype(home).itemsize, np.dtype(dtype).itemsize
            if have == want:
                return f"{expression}.view('{dtype}')"
            if have < want or "?" in (home, dtype):
                raise ValueError(f"{operand} holds {home}, not {dtype}")
            return f"{expression}.view('u{have}').astype('u{want}').view('{dtype}')"
        if operand in SPECIAL:
            return SPECIAL[operand] + (f".view('{dtype}')" if dtype != "i4" else "")
        if operand in ZERO:
            return self.constant(0, dtype)
        for digits, bits in (("0f", "u4"), ("0d", "u8")):
            if operand.startswith(digits):
                number = np.array(int(operand[2:], 16), bits)
                return self.constant(number.view(dtype).item() if dtype in ("f4", "f8") else int(number), dtype)
        number = int(operand.removesuffix("U"), 0)  # or a ValueError
        return self.constant(float(number) if dtype in ("f4", "f8") else number, dtype)

    def write(self, register: str, expression: str, dtype: str, mask: str | None) -> None:
        """Set a register, where `mask` (None: everywhere). A narrower value is extended by its type's own sign."""
        if register == "_":
            return
        home = self.homes[register]
        have, got = np.dtype(home).itemsize, np.dtype(dtype).itemsize
        if got > have or ("?" in (home, dtype) and home != dtype):
            raise ValueError(f"{register} holds {home}, not {dtype}")
        if home != dtype:
            expression = f"({expression}).view('{home}')" if got == have else f"({expression}).astype('{home}')"
        target = f"R[{self.index[register]}]"
        self.lines.append(f"{target} = {expression}" if mask is None else f"{target} = np.where({mask}, {expression}, {target})")

    def address(self, operand: str) -> str:
        """The expression of "[%rd1+16]"."""
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not found:
            raise ValueError(f"{operand} is no address")
        base = self.read(found[1], self.homes.get(found[1], "i4"))
        return f"{base} + {found[2]}" if int(found[2] or 0) else base

    def registers(self, operand: str, dtype: str) -> str:
        """The expression of a list of a vector's registers."""
        return f"[{', '.join(self.read(register, dtype) for register in vector(operand))}]"

    def block(self, number: int, mask: str | None) -> str:
        """The function of a block."""
        self.lines = []
        for instruction in self.program.blocks[number]:
            self.instruction(instruction, number, mask)
        if not self.lines or not self.lines[-1].startswith("return"):
            self.lines.append(f"return None, {number + 1}, {END}")
        return f"def block_{number}(R, M, K, m):\n    " + "\n    ".join(self.lines) + "\n"

    def instruction(self, i: Instruction, number: int, mask: str | None) -> None:
        """The lines of an instruction of a block. Raises UnknownInstruction for one that nothing here runs."""
        try:
            predicate = None
            if i.predicate:
                predicate = ("~" if i.predicate[1] else "") + self.read(i.predicate[0], "?")
                mask = predicate if mask is None else f"(m & {predicate})"
            if i.name in ("bra", "ret"):
                if i.modifiers not in ([], ["uni"]):
                    raise i.unknown()
                target = self.program.labels[i.operands[0]] if i.name == "bra" else END
                self.lines.append(f"return {predicate}, {target}, {number + 1}")
            elif found := value(self, i):
                self.write(i.operands[0], found[1], found[0], mask)
            elif known := INSTRUCTIONS.get(i.name):
                known(self, i, mask)
            else:
                raise i.unknown()
        except (KeyError, ValueError, IndexError) as error:
            raise i.unknown(error) from error


def _homes(program: Program) -> dict[str, str]:
    """The dtype that each register is kept in: a float where most instructions take it for one."""
    votes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for i in (i for block in program.blocks for i in block):
        single = "mma" in i.opcode or ("f32" in i.modifiers and i.name != "cvt")
        kind = "f" if single else "d" if "f64" in i.modifiers else "i"
        for position, operand in enumerate(i.operands):
            for found in REGISTER.finditer(operand):
                votes[found[0]][kind] += 10**6 if i.name == "wgmma" and position == 0 else 1  # which the machine itself sets
    floats = {("r", "f"): "f4", ("rd", "d"): "f8"}
    integers = {"p": "?", "rs": "u2", "r": "i4", "rd": "i8"}
    kinds = {register: (REGISTER.match(register)[1], vote.most_common(1)[0][0]) for register, vote in votes.items()}
    return {register: floats.get(kind, integers[kind[0]]) for register, kind in kinds.items()}


# ---- instructions that are no value: each writes lines for `machine.Machine`, M ---------------------------------------------


def _move(w: Writer, i: Instruction, mask: str | None) -> None:
    """mov between one register and several narrower ones."""
    to, source = i.operands
    if source.startswith("{"):
        parts = vector(source)
        whole = np.dtype(w.homes[to]).itemsize
        width = whole // len(parts)
        w.write(to, f"pack([{', '.join(w.read(part, f'u{width}') for part in parts)}], 'u{whole}')", f"u{whole}", mask)
        return
    parts = vector(to)
    whole = np.dtype(w.homes[source]).itemsize
    width = whole // len(parts)
    for n, part in enumerate(parts):
        w.write(part, f"({w.read(source, f'u{whole}')} >> {8 * width * n}).astype('u{width}')", f"u{width}", mask)


def _accessed(i: Instruction) -> tuple[str, int, int, str]:
    """(unit, elements, bytes of one, dtype) of a load or store."""
    space, *rest, type = i.modifiers
    unit = {"global": "memory", "shared": "shared", "shared::cta": "shared"}[space]
    vectors = [m for m in rest if m in ("v2", "v4", "v8")]
    if len(vectors) > 1 or any(m not in ("v2", "v4", "v8") and not HINTS.fullmatch(m) for m in rest):
        raise i.unknown()
    return unit, int(vectors[0][1:]) if vectors else 1, np.dtype(DTYPES[type]).itemsize, DTYPES[type]


def _load(w: Writer, i: Instruction, mask: str | None) -> None:
    to, source = i.operands
    if i.modifiers[0] == "param":
        dtype = DTYPES[i.modifiers[-1]]
        number = int(re.fullmatch(r"\[\w+_param_(\d+)\]", source)[1])
        w.write(to, f"M.parameter({number}, '{dtype}')", dtype, mask)
        return
    unit, count, width, dtype = _accessed(i)
    w.lines.append(f"t = M.{unit}.load({w.address(source)}, {count}, {width}, {mask}, {i.line!r})")
    for n, register in enumerate(vector(to)):
        w.write(register, f"t[{n}].view('{dtype}')", dtype, mask)


def _store(w: Writer, i: Instruction, mask: str | None) -> None:
    to, source = i.operands
    unit, _, width, _ = _accessed(i)
    w.lines.append(f"M.{unit}.store({w.address(to)}, {w.registers(source, f'u{width}')}, {width}, {mask}, {i.line!r})")


def _copy(w: Writer, i: Instruction, mask: str | None) -> None:
    kind = ".".join(i.modifiers)
    if kind == "async.commit_group":
        w.lines.append(f"M.shared.commit({mask})")
    elif kind in ("async.wait_group", "async.wait_all"):
        w.lines.append(f"M.shared.wait({int(i.operands[0]) if i.operands else 0}, {mask})")
    elif re.fullmatch(r"async\.(ca|cg)\.shared(::cta)?\.global(\.L2::\w+)?", kind):
        to, source, size, *read = i.operands
        part = w.read(read[0], "i4") if read else None
        w.lines.append(f"M.shared.copy({w.address(to)}, {w.address(source)}, {int(size, 0)}, {part}, {mask}, {i.line!r})")
    else:
        raise i.unknown()


def _barrier(w: Writer, i: Instruction, mask: str | None) -> None:
    if i.modifiers == ["warp", "sync"]:
        w.lines.append(f"M.shared.warp_barrier({mask})")
    elif i.modifiers in (["sync"], ["cta", "sync"]) and [int(a, 0) for a in i.operands] == [0]:
        w.lines.append(f"M.shared.barrier({mask}, {i.line!r})")
    else:
        raise i.unknown()


def _shuffle(w: Writer, i: Instruction, mask: str | None) -> None:
    to, source, by, clamp, *_ = i.operands
    if i.modifiers[0] != "sync" or i.modifiers[2:] != ["b32"] or int(clamp, 0) != 31 or "|" in to:
        raise i.unknown()
    if i.modifiers[1] not in ("bfly", "idx"):
        raise i.unknown()
    w.write(to, f"M.shuffle('{i.modifiers[1]}', {w.read(source, 'u4')}, {w.read(by, 'i4')}, {mask}, {i.line!r})", "u4", mask)


def _load_matrix(w: Writer, i: Instruction, mask: str | None) -> None:
    _check_matrix(i)
    registers = vector(i.operands[0])
    w.lines.append(f"t = M.matrix.load({w.address(i.operands[1])}, {len(registers)}, {'trans' in i.modifiers}, {mask}, {i.line!r})")
    for n, register in enumerate(registers):
        w.write(register, f"t[{n}]", "u4", mask)


def _store_matrix(w: Writer, i: Instruction, mask: str | None) -> None:
    _check_matrix(i)
    to, source = i.operands
    w.lines.append(f"M.matrix.store({w.address(to)}, {w.registers(source, 'u4')}, {'trans' in i.modifiers}, {mask}, {i.line!r})")


def _check_matrix(i: Instruction) -> None:
    if not re.fullmatch(r"sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(::cta)?\.b16", ".".join(i.modifiers)):
        raise i.unknown()


def _multiply(w: Writer, i: Instruction, mask: str | None) -> None:
    sync, aligned, shape, *rest = i.modifiers
    kind = rest[3] if len(rest) == 6 else ""
    if (sync, aligned, *rest[:3], *rest[4:]) != ("sync", "aligned", "row", "col", "f32", kind, "f32") or shape not in SHAPES.get(kind, ()):
        raise i.unknown()
    to, a, b, c = i.operands
    w.lines.append(
        f"t = M.matrix.multiply('{kind}', {w.registers(a, 'u4')}, {w.registers(b, 'u4')}, {w.registers(c, 'f4')}, {mask}, {i.line!r})"
    )
    for n, register in enumerate(vector(to)):
        w.write(register, f"t[{n}]", "f4", mask)


def _warp_group(w: Writer, i: Instruction, mask: str | None) -> None:
    what = i.modifiers[0]
    if what == "fence":
        w.lines.append("pass")  # registers are written at once here
    elif what == "commit_group":
        w.lines.append(f"M.wgmma.commit({mask})")
    elif what == "wait_group":
        w.lines.append(f"M.wgmma.wait({int(i.operands[0])}, R, {mask})")
    elif found := re.fullmatch(r"mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.\3", ".".join(i.modifiers)):
        to, a, b, accumulate, *flags = i.operands
        from_registers = a.startswith("{")
        scale_a, scale_b, *transposed = (int(flag) for flag in flags)
        if (scale_a, scale_b) != (1, 1) or int(found[2]) != (8 if found[3] == "tf32" else 16):
            raise i.unknown()
        transposes = (0, *transposed, 0)[:2] if from_registers else (*transposed, 0, 0)[:2]
        out = [w.index[register] for register in vector(to)]
        left = w.registers(a, "u4") if from_registers else w.read(a, "i8")
        w.lines.append(
            f"M.wgmma.multiply('{found[3]}', {found[1]}, R, {out}, {left}, {w.read(b, 'i8')}, {w.read(accumulate, '?')}, "
            f"{tuple(map(bool, transposes))}, {mask}, {i.line!r})"
        )
    else:
        raise i.unknown()


def _fence(w: Writer, i: Instruction, mask: str | None) -> None:
    if i.modifiers not in (["proxy", "async"], ["proxy", "async", "shared::cta"]):
        raise i.unknown()
    w.lines.append(f"M.shared.fence({mask})")


def _compare_pairs(w: Writer, i: Instruction, mask: str | None) -> None:
    """setp of two 16-bit floats at once: "%p1|%p2"."""
    for n, register in enumerate(i.operands[0].split("|")):
        halves = (f"({w.read(a, 'u4')} >> {16 * n}).astype('u2')" for a in i.operands[1:3])
        w.write(register, comparison(i, *halves, i.modifiers[-1].removesuffix("x2")), "?", mask)


INSTRUCTIONS: dict[str, Callable[[Writer, Instruction, str | None], None]] = {
    "mov": _move, "ld": _load, "st": _store, "cp": _copy, "bar": _barrier, "barrier": _barrier, "shfl": _shuffle, "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix, "mma": _multiply, "wgmma": _warp_group, "fence": _fence, "setp": _compare_pairs,
}  # fmt: skip


def translate(program: Program) -> Code:
    """Python functions of a program. Raises UnknownInstruction for what nothing here runs."""
    writer = Writer(program)
    names = {"np": np, **{name: getattr(values, name) for name in FUNCTIONS}}
    blocks = {}
    for mask in (None, "m"):
        source = "\n".join(writer.block(n, mask) for n in range(len(program.blocks)))
        exec(compile(source, f"<{program.name}>", "exec"), names)
        blocks[mask] = [names[f"block_{n}"] for n in range(len(program.blocks))]
    widths = [
        _accessed(i)[1] * _accessed(i)[2] for block in program.blocks for i in block
        if i.name in ("ld", "st") and i.modifiers[0].startswith("shared")
    ]  # fmt: skip
    return Code(program, list(writer.homes.values()), list(writer.constants.values()), min([4, *widths]), blocks[None], blocks["m"])
