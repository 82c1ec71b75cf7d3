"""Reads the machine code (SASS) that the compiler made of a kernel: loops, their instructions, matrix units and loads.

The text is nvdisasm's: labels, and one instruction a line. A loop is what lies between a label and a later branch back
to it. Instructions that a branch inside the loop can leave out (the mask of the last block of keys) are counted apart.
"""

import re
from typing import NamedTuple

LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<op>[A-Z][A-Za-z0-9_.]*)(?P<rest>[^;]*);")
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")
UNIFORM = re.compile(r"^\s*!?UP\d")  # the condition of BRA.U, Blackwell's branch of a whole warp
MATRIX = re.compile(r"^(?:UTC)?[A-Z]?(?:MMA|GMMA)\b|^UTC[A-Z]*MMA")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


class Instruction(NamedTuple):
    """One instruction: operation with its suffixes, whether it is conditional, and the index that a branch leads to."""

    op: str
    guarded: bool
    target: int | None


class Code(NamedTuple):
    """Numbers of a program. The loop is the innermost one with the most matrix instructions, else the longest; without
    a loop its fields are 0. `matrix` maps a matrix instruction to how often the loop has it; `loads` a width in bytes
    to how many plain loads (neither cp.async nor TMA) of that width are in the loop; `copies` the same of cp.async."""

    instructions: int
    loop_instructions: int
    optional_instructions: int
    loop_matrix: dict[str, int]
    matrix: list[str]
    loads: dict[str, int]
    copies: dict[str, int]
    bulk_copies: int
    barriers: int

    @staticmethod
    def nothing() -> "Code":
        """Of a kernel that did not compile."""
        return Code(0, 0, 0, {}, [], {}, {}, 0, 0)


def read_code(text: str) -> Code:
    """The numbers of nvdisasm's text of one kernel."""
    program = instructions(text)
    found = loops(program)
    body = program[slice(*found[0])] if found else []
    first, last = found[0] if found else (0, 0)
    matrix = [short(i.op) for i in body if MATRIX.match(i.op)]
    plain = [width(i.op) for i in body if i.op.startswith(("LDG.", "LD.E"))]
    copied = [width(i.op) for i in body if i.op.startswith("LDGSTS")]
    return Code(
        instructions=len(program),
        loop_instructions=len(body),
        optional_instructions=optional(program, first, last),
        loop_matrix={name: matrix.count(name) for name in sorted(set(matrix))},
        matrix=sorted({short(i.op) for i in program if MATRIX.match(i.op)}),
        loads={str(size): plain.count(size) for size in sorted(set(plain))},
        copies={str(size): copied.count(size) for size in sorted(set(copied))},
        bulk_copies=sum(i.op.startswith(("UTMALDG", "UBLKCP")) for i in body),
        barriers=sum(i.op.startswith(("BAR.", "WARPGROUP.DEPBAR", "SYNCS")) for i in body),
    )


def instructions(text: str) -> list[Instruction]:
    """The program in order, without the padding behind its last exit."""
    labels: dict[str, int] = {}
    found: list[tuple[str, bool, str | None]] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := LINE.match(line):
            target = TARGET.search(match["rest"]) if match["op"].startswith(("BRA", "BSSY", "@")) else None
            to = target[1] if target and match["op"].startswith("BRA") else None
            may_pass = match["guard"] is not None or (to is not None and UNIFORM.match(match["rest"]) is not None)
            found.append((match["op"], may_pass, to))
    program = [Instruction(op, guarded, labels.get(to) if to else None) for op, guarded, to in found]
    while program and (program[-1].op == "NOP" or program[-1].target == len(program) - 1):
        program.pop()
    return program


def loops(program: list[Instruction]) -> list[tuple[int, int]]:
    """(first, past the last) of every loop: most matrix instructions first, then the innermost, then the longest.

    A loop around one that has matrix instructions counts as one without: where groups of warps run loops of their own,
    what sends each group to its own is a loop around all.
    """
    found = [(i.target, at + 1) for at, i in enumerate(program) if i.target is not None and i.target < at]
    with_matrix = {span: sum(bool(MATRIX.match(i.op)) for i in program[slice(*span)]) for span in found}
    inner = [span for span in found if with_matrix[span]]
    for span in found:
        if any(span != other and span[0] <= other[0] and other[1] <= span[1] for other in inner):
            with_matrix[span] = 0
    return sorted(found, key=lambda s: (-with_matrix[s], (s[1] - s[0]) * (1 if with_matrix[s] else -1)))


def optional(program: list[Instruction], first: int, last: int) -> int:
    """Instructions of the loop that a conditional branch inside it jumps over."""
    skipped: set[int] = set()
    for at in range(first, last):
        to = program[at].target
        if to is not None and program[at].guarded and at < to < last:
            skipped |= set(range(at + 1, to))
    return len(skipped)


def width(op: str) -> int:
    """Bytes a thread moves with one load or copy."""
    return max((WIDTHS[part] for part in op.split(".") if part in WIDTHS), default=4)


def short(op: str) -> str:
    """A matrix instruction without what changes from compiler to compiler: IGMMA.64x64x32.S8.S8."""
    return ".".join(part for part in op.split(".") if part not in ("ROW", "COL", "gdesc"))
