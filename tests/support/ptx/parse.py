"""PTX text -> a `Program`: basic blocks of instructions, each with the source line that it comes from."""

import re
from dataclasses import dataclass, field

from .report import UnknownInstruction

#: The block after the last: where a thread that has ended is.
END = 1 << 30


@dataclass(frozen=True)
class Instruction:
    """`@predicate opcode operands;`"""

    opcode: str  #: "ld.global.v4.b32"
    operands: list[str]  #: as written: "%r1", "{%r1, %r2}", "[%rd4+16]", "0f3F800000"
    predicate: tuple[str, bool] | None  #: (register, whether negated)
    line: str  #: file:line of the kernel's source

    @property
    def name(self) -> str:
        """The part before the first dot."""
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        """The parts after the first dot."""
        return self.opcode.split(".")[1:]

    def __str__(self) -> str:
        return f"{self.opcode} {', '.join(self.operands)} ({self.line})"

    def unknown(self, why: object = "nothing here runs it") -> UnknownInstruction:
        """An error that names the instruction."""
        return UnknownInstruction(f"{self}: {why}")


@dataclass
class Program:
    """A kernel's code."""

    name: str
    parameters: list[str]  #: PTX types, in order
    threads: int  #: of a CTA
    shared: int  #: bytes of a CTA
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)  #: -> number of a block


def split(text: str) -> list[str]:
    """Operands, separated by commas outside brackets and braces."""
    return [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", text) if part.strip()]


def vector(operand: str) -> list[str]:
    """The registers of "{%r1, %r2}", or the one of "%r1"."""
    return split(operand.strip()[1:-1]) if operand.startswith("{") else [operand]


def _statements(body: str, files: dict[str, str]) -> list[tuple[str, str]]:
    """(label or instruction, source line) of a kernel's body, in order. One that was inlined has the line that it was inlined at."""
    found, where, begun = [], "?", ""
    for line in body.split("\n"):
        line = re.sub(r"//.*", "", line).strip()
        if location := re.match(r"\.loc\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+)\s+(\d+))?", line):
            file, number = (location[3], location[4]) if location[3] else (location[1], location[2])
            where = f"{files.get(file, file).rpartition('/')[2]}:{number}"
        elif label := re.fullmatch(r"(\$\w+):", line):
            found.append((label[1] + ":", where))
        elif line and not line.startswith((".reg", ".pragma")):
            *whole, begun = f"{begun} {line}".split(";")
            found += [(part.strip().lstrip("{} "), where) for part in whole if part.strip().lstrip("{} ")]
            begun = "" if begun.strip() in ("", "{", "}") else begun
    if begun:
        raise UnknownInstruction(f"PTX that does not end: {begun.strip()!r}")
    return found


def parse(text: str, shared: int) -> Program:
    """The only kernel of a PTX text, whose launch has `shared` bytes of shared memory.

    Raises UnknownInstruction for what is no instruction.
    """
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    head = re.search(r"\.entry\s+([\w$]+)\((.*?)\)(.*?)\n\{", text, re.S)
    threads = head and re.search(r"\.reqntid\s+(\d+)", head[3])
    if not threads:
        raise UnknownInstruction("PTX without a kernel of a known number of threads")
    parameters = re.findall(r"\.param\s+\.(\w+)[^,\n]*", head[2])
    program = Program(head[1], parameters, int(threads[1]), shared)
    statements = _statements(text[head.end() : text.index("\n}", head.end())], files)
    targets = {name for part, _ in statements if "bra" in part for name in re.findall(r"\$\w+", part)}
    for part, where in statements:
        if part.endswith(":"):
            if part[:-1] in targets:
                if program.blocks[-1]:
                    program.blocks.append([])
                program.labels[part[:-1]] = len(program.blocks) - 1
            continue
        found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", part, re.S)
        if not found:
            raise UnknownInstruction(f"{part!r} ({where})")
        predicate = (found[2], found[1] == "!") if found[2] else None
        instruction = Instruction(found[3], split(found[4]), predicate, where)
        program.blocks[-1].append(instruction)
        if instruction.name in ("bra", "ret"):
            program.blocks.append([])
    if not program.blocks[-1] and len(program.blocks) - 1 not in program.labels.values():
        program.blocks.pop()
    return program
