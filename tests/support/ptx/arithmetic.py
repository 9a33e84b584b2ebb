"""Instructions that compute one value of others, as Python expressions over arrays. What is not here word for word is not run."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .parse import Instruction

#: NumPy's types of PTX's; 16-bit floats are their bits, and pairs of 16 bits the 32 that hold them.
DTYPES = {
    "s8": "i1", "u8": "u1", "b8": "u1", "s16": "i2", "u16": "u2", "b16": "u2", "s32": "i4", "u32": "u4", "b32": "i4", "s64": "i8", "u64": "u8",
    "b64": "i8", "f32": "f4", "f64": "f8", "pred": "?", "f16": "u2", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4", "s16x2": "u4", "u16x2": "u4",
    "tf32": "i4",
}  # fmt: skip
HALVES = ("f16", "bf16", "f16x2", "bf16x2")
PAIRS = ("s16x2", "u16x2")
FLOATS = ("f16", "bf16", "f32", "f64")
WIDER = {"i2": "i4", "u2": "u4", "i4": "i8", "u4": "u8"}
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
ROUNDINGS = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}
#: What may stand between a name and its types. `full` and `approx` are computed exactly here; a GPU is off by up to two last bits.
FORMS: dict[str, set[str]] = {
    "add": {"rn"}, "sub": {"rn"}, "mul": {"rn", "lo", "hi", "wide"}, "mad": {"lo", "hi", "wide"}, "fma": {"rn"}, "div": {"rn", "full"},
    "rem": set(), "sqrt": {"rn", "approx"}, "rsqrt": {"approx"}, "rcp": {"rn", "approx"}, "min": {"NaN"}, "max": {"NaN"}, "neg": set(),
    "abs": set(), "and": set(), "or": set(), "xor": set(), "not": set(), "shl": set(), "shr": set(), "bfe": set(), "prmt": set(), "selp": set(),
    "mov": set(), "cvt": {"rn", "rna", *ROUNDINGS},
    "setp": {"and", "or", "xor", "nan", "num", *COMPARISONS, *(f"{name}u" for name in ("eq", "ne", "lt", "le", "gt", "ge"))},
}  # fmt: skip


class Reader(Protocol):
    """What knows where values are."""

    def read(self, operand: str, dtype: str) -> str:
        """The expression of an operand as an array of `dtype`."""

    def constant(self, value: float, dtype: str) -> str:
        """The expression of an array of one number."""


def value(reader: Reader, instruction: Instruction) -> tuple[str, str] | None:
    """(dtype, expression) of what an instruction computes; None where that is no value. Raises UnknownInstruction for a form unknown."""
    name = instruction.name
    if name not in FORMS or any(operand.startswith("{") for operand in instruction.operands[:2]):
        return None
    types = [m for m in instruction.modifiers if m in DTYPES]
    if not types or any(m not in FORMS[name] for m in instruction.modifiers if m not in DTYPES):
        raise instruction.unknown()
    if name == "cvt":
        return _converted(reader, instruction, *types)
    if name == "setp":
        return None if "|" in instruction.operands[0] else _compared(reader, instruction, types[-1])
    found = _computed(reader, instruction, types[-1])
    if found is None or len(types) != 1:
        raise instruction.unknown()
    return found


def widened(expression: str, type: str) -> str:
    """The expression of a 16-bit float as float32; of any other type as it is."""
    return {"f16": f"from_float16({expression})", "bf16": f"from_bfloat16({expression})"}.get(type, expression)


def _computed(reader: Reader, i: Instruction, type: str) -> tuple[str, str] | None:
    name, dtype = i.name, DTYPES[type]
    floating, bits = dtype in ("f4", "f8"), 8 * np.dtype(dtype).itemsize
    x, *others = (lambda as_dtype=None, a=a: reader.read(a, as_dtype or dtype) for a in i.operands[1:])
    y = others[0] if others else None
    if name == "mov":
        return dtype, x()
    if name == "selp":
        return dtype, f"np.where({reader.read(i.operands[3], '?')}, {x()}, {y()})"
    if name in ("and", "or", "xor"):
        return dtype, f"{x()} {OPERATORS[name]} {y()}"
    if name == "not":
        return dtype, f"~{x()}"
    if name == "prmt":
        return "u4", f"permute({x('u4')}, {y('u4')}, {others[1]('u4')})"
    if name == "bfe":
        return dtype, f"bit_field({x()}, {y('i4')}, {others[1]('i4')})"
    if name in ("shl", "shr"):
        as_dtype = dtype if type[0] == "s" else f"u{bits // 8}"
        return as_dtype, f"shift('{name}', {x(as_dtype)}, {y('u4')}, {bits})"
    if type in HALVES:
        if name not in ("add", "sub", "mul", "fma", "min", "max"):
            return None
        operation = f"np.{name}imum" if "NaN" in i.modifiers else {"min": "np.fmin", "max": "np.fmax"}.get(name, f"'{name}'")
        return dtype, f"halves({operation}, '{type}', {x()}, {y()}, {others[1]() if name == 'fma' else None})"
    if type in PAIRS:
        ok = name in ("add", "sub", "min", "max")
        return (dtype, f"integer_pairs('{name}', {x()}, {y()}, '{type[0].replace('s', 'i')}2')") if ok else None
    if name == "neg":
        return dtype, f"-{x()}"
    if name == "abs":
        return dtype, f"np.abs({x()})"
    if name in ("add", "sub") or (name == "mul" and floating):
        return dtype, f"{x()} {OPERATORS[name]} {y()}"
    if name in ("min", "max"):
        function = f"np.f{name}" if floating and "NaN" not in i.modifiers else f"np.{name}imum"
        return dtype, f"{function}({x()}, {y()})"
    if floating:
        simple = {"div": lambda: f"{x()} / {y()}", "sqrt": lambda: f"np.sqrt({x()})", "rcp": lambda: f"1 / {x()}",
                  "rsqrt": lambda: f"rsqrt({x()})"}  # fmt: skip
        if name == "fma":
            return (dtype, f"fma({x()}, {y()}, {others[1]()})") if dtype == "f4" else None
        return (dtype, simple[name]()) if name in simple else None
    if name in ("div", "rem"):
        return dtype, f"{'truncated_division' if name == 'div' else 'remainder'}({x()}, {y()})"
    return _product(i, dtype, bits, x, y, others) if name in ("mul", "mad") else None


def _product(i: Instruction, dtype: str, bits: int, x, y, others) -> tuple[str, str] | None:
    """mul and mad of integers."""
    wide = WIDER.get(dtype)
    if "lo" in i.modifiers:
        out, product = dtype, f"{x()} * {y()}"
    elif "wide" in i.modifiers and wide:
        out, product = wide, f"{x()}.astype('{wide}') * {y()}.astype('{wide}')"
    elif "hi" in i.modifiers and wide:
        out, product = dtype, f"(({x()}.astype('{wide}') * {y()}.astype('{wide}')) >> {bits}).astype('{dtype}')"
    elif "hi" in i.modifiers and dtype in ("i8", "u8"):
        out, product = dtype, f"high_product({x()}, {y()})"
    else:
        return None
    return out, product if i.name == "mul" else f"{product} + {others[1](out)}"


def _compared(reader: Reader, i: Instruction, type: str) -> tuple[str, str]:
    """setp of one predicate, which may be combined with another."""
    found = comparison(i, *(reader.read(a, DTYPES[type]) for a in i.operands[1:3]), type)
    if combined := [m for m in i.modifiers if m in OPERATORS]:
        found = f"({found} {OPERATORS[combined[0]]} {reader.read(i.operands[3], '?')})"
    return "?", found


def comparison(i: Instruction, x: str, y: str, type: str) -> str:
    """The expression of a comparison of two others. One with NaN is false, but where its name ends with u."""
    if type not in DTYPES or type.endswith("x2"):
        raise i.unknown()
    name, x, y = i.modifiers[0], widened(x, type), widened(y, type)
    either = f"(np.isnan({x}) | np.isnan({y}))"
    if type not in FLOATS:
        if name not in COMPARISONS:
            raise i.unknown()
        return f"({x} {COMPARISONS[name]} {y})"
    if name in ("nan", "num"):
        return either if name == "nan" else f"~{either}"
    if name == "ne":  # ordered, which Python's is not
        return f"(({x} < {y}) | ({x} > {y}))"
    return f"({x} {COMPARISONS[name]} {y})" if name in COMPARISONS else f"(({x} {COMPARISONS[name[:-1]]} {y}) | {either})"


def _converted(reader: Reader, i: Instruction, to: str, source: str) -> tuple[str, str]:
    how = [m for m in i.modifiers if m not in DTYPES]
    x = reader.read(i.operands[1], DTYPES[source])
    narrow = {"bf16": "bfloat16", "f16": "float16"}
    if to in ("bf16x2", "f16x2") and source == "f32" and how == ["rn"]:
        high, low = (f"{narrow[to[:-2]]}({reader.read(a, 'f4')})" for a in i.operands[1:3])
        return "u4", f"({high}.astype('u4') << 16) | {low}"
    if to in narrow and source == "f32" and how == ["rn"]:
        return "u2", f"{narrow[to]}({x})"
    if to == "f32" and source in narrow and not how:
        return "f4", widened(x, source)
    if to == "tf32" and source == "f32" and how == ["rna"]:
        return "f4", f"tf32({x})"
    if {to, source} & {*HALVES, *PAIRS, "tf32"}:
        raise i.unknown()
    floats = [type in ("f32", "f64") for type in (to, source)]
    if floats == [False, True] and len(how) == 1 and how[0] in ROUNDINGS:
        return DTYPES[to], f"to_integer({ROUNDINGS[how[0]]}({x}), '{DTYPES[to]}')"
    # A float of an integer or of a wider float is rounded to nearest; an integer of an integer is cut off, or extended by its own sign.
    wants_rounding = floats == [True, False] or (to, source) == ("f32", "f64")
    if floats == [False, True] or how != (["rn"] if wants_rounding else []):
        raise i.unknown()
    return DTYPES[to], f"{x}.astype('{DTYPES[to]}')"
