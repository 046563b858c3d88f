"""The instructions of a kernel's inner loop, read from nvdisasm's text."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

_KERNEL = re.compile(r"^\s*\.section\s+\.text\.(\w+),", re.MULTILINE)
_LABEL = re.compile(r"^(\.L_x_\d+):")
_FUNCTION = re.compile(r"^\$\w+\$(\w+):")  # a function that the kernel calls; it comes after the kernel
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")

MATH = ("ffma", "hmma", "fp64")  # the useful instructions in loops of products


@dataclass(frozen=True)
class Instruction:
    name: str  # with its modifiers: LDS.128
    target: str = ""  # of a branch: a label


@dataclass
class Code:
    """A kernel: its instructions, and the index of each label."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    functions: dict[str, int] = field(default_factory=dict)  # the start of each called function

    def of_functions(self, name: str) -> Code:
        """Only the functions whose symbols contain `name`. Empty if there are none."""
        part = Code()
        starts = sorted(self.functions.values())
        for first in sorted(at for symbol, at in self.functions.items() if name in symbol):
            end = next((at for at in starts if at > first), len(self.instructions))
            shift = len(part.instructions) - first
            part.labels |= {label: at + shift for label, at in self.labels.items() if first <= at < end}
            part.instructions += self.instructions[first:end]
        return part


@dataclass(frozen=True)
class Loop:
    first: int
    last: int  # the branch back


def parse(text: str) -> dict[str, Code]:
    """nvdisasm -c: the code of each kernel by symbol."""
    kernels = {}
    starts = list(_KERNEL.finditer(text))
    for match, end in zip(starts, [*(m.start() for m in starts[1:]), len(text)]):
        code = Code()
        for line in text[match.end() : end].splitlines():
            if label := _LABEL.match(line):
                code.labels[label[1]] = len(code.instructions)
            elif function := _FUNCTION.match(line):
                code.functions[function[1]] = len(code.instructions)
            elif found := _INSTRUCTION.match(line):
                target = re.search(r"`\((\.L_x_\d+)\)", found[2])
                code.instructions.append(Instruction(found[1], target[1] if target else ""))
        kernels[match[1]] = code
    return kernels


def loops(code: Code) -> list[Loop]:
    """The loops, found by backward branches. Branches to the same place are one loop."""
    ends: dict[int, int] = {}
    for i, instruction in enumerate(code.instructions):
        if instruction.name.startswith("BRA") and instruction.target in code.labels:
            first = code.labels[instruction.target]
            if first < i:
                ends[first] = max(i, ends.get(first, 0))
    return [Loop(first, last) for first, last in sorted(ends.items())]


def kind(name: str) -> str:
    """The kind of an instruction: ffma, hmma, fp64, fp32 (other arithmetic), special, convert, sync, branch or integer.

    Memory accesses come with their width: lds, sts, ldg, stg, ldgsts; ld and st may access any memory.
    """
    base, *modifiers = name.split(".")
    width = next((m for m in modifiers if m in ("64", "128")), "32")
    if base in ("LD", "ST", "LDS", "STS", "LDG", "STG", "LDGSTS", "LDSM", "LDL", "STL"):
        return f"{base.lower()}.{width}"
    if base == "FFMA":
        return "ffma"
    if base in ("HMMA", "IMMA", "DMMA"):
        return "hmma"
    if base in ("DFMA", "DADD", "DMUL", "DSETP"):
        return "fp64"
    if base in ("FADD", "FMUL", "FSETP", "FSEL", "FMNMX", "FCHK"):
        return "fp32"
    if base == "MUFU":
        return "special"
    if base in ("F2F", "F2FP", "I2F", "F2I", "FRND"):
        return "convert"
    if base in ("BAR", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "SHFL", "BSYNC", "BSSY", "NOP", "YIELD"):
        return "sync"
    if base in ("BRA", "EXIT", "RET", "CALL", "BREAK"):
        return "branch"
    return "integer"


@dataclass(frozen=True)
class Mix:
    """The instructions, by kind, of a kernel's hot loop, without inner loops."""

    counts: dict[str, int]
    loop: bool  # False: the kernel has no loop, and this is the whole kernel
    nested: int  # loops inside that are not counted

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def math(self) -> int:
        return sum(self.counts.get(name, 0) for name in MATH)

    @property
    def share(self) -> float:
        """The share of MATH among all instructions."""
        return self.math / self.total if self.total else 0.0

    def text(self) -> str:
        """The kinds, most frequent first: "512 ffma, 64 lds.128, ..."."""
        return ", ".join(f"{n} {name}" for name, n in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])))


def hot_loop(code: Code, shortest: bool = False) -> Mix:
    """The loop with the most own multiply-adds, or with the most memory accesses if there are no multiply-adds.

    Loops inside it belong to slow paths (element-wise copies) or to edges. shortest: of several equivalent loops, take the
    one with the fewest instructions, which is the fast path.
    """
    found = loops(code)

    def own(loop: Loop) -> tuple[Counter[str], int]:
        inner = [other for other in found if other != loop and loop.first <= other.first and other.last <= loop.last]
        skipped = {i for other in inner for i in range(other.first, other.last + 1)}
        body = [code.instructions[i] for i in range(loop.first, loop.last + 1) if i not in skipped]
        return Counter(kind(instruction.name) for instruction in body), len(inner)

    def worth(counts: Counter[str]) -> tuple[int, int]:
        memory = sum(n for name, n in counts.items() if name[:2] in ("ld", "st"))
        return sum(counts[name] for name in MATH), memory

    def rank(counts: Counter[str]) -> tuple[int, int]:
        math, memory = worth(counts)
        return math, -counts.total() if shortest else memory

    candidates = [own(loop) for loop in found]
    candidates = [(counts, inner) for counts, inner in candidates if any(worth(counts))]
    if not candidates:
        return Mix(dict(Counter(kind(i.name) for i in code.instructions if i.name != "NOP")), False, len(found))
    counts, inner = max(candidates, key=lambda candidate: rank(candidate[0]))
    return Mix(dict(counts), True, inner)
