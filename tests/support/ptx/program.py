"""Parse the PTX of one kernel into basic blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

WARP_SYNC = re.compile(
    r"(shfl|redux|vote|match|bar\.warp)\.(\w+\.)*sync|bar\.warp\.sync|(ld|st)matrix\.sync"
)
"""Instructions that all threads of a warp execute together."""
ENDS_BLOCK = ("bra", "ret", "exit", "bar", "barrier")
# Of lines and of how many threads there may be.
IGNORED = (".loc", ".file", ".pragma", ".maxntid", ".reqntid", ".minnctapersm")


class UnknownInstructionError(NotImplementedError):
    """PTX that the emulation does not know."""


class Guard(NamedTuple):
    register: str
    is_negated: bool


class Instruction(NamedTuple):
    """One instruction; ``opcode`` has its suffixes, ``line`` counts from the start of the text."""

    opcode: str
    operands: tuple[str, ...]
    guard: Guard | None
    line: int

    def __str__(self) -> str:
        return f"line {self.line}: {self.opcode} {', '.join(self.operands)}"


@dataclass
class Program:
    """A kernel: ``blocks`` of instructions, of which only the last may branch or wait.

    Attributes
    ----------
    parameters : dict of str to str
        Type of each parameter by name, in order.
    registers : dict of str to str
        Type by name.
    shared : dict of str to int
        Address of each array in shared memory.
    shared_size : int
        Number of bytes of the arrays whose size the text gives.
    labels : dict of str to int
        Index of the block that a label starts.
    """

    name: str
    parameters: dict[str, str] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_size: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    blocks: list[list[Instruction]] = field(default_factory=list)
    warp_sync_blocks: set[int] = field(default_factory=set)

    @classmethod
    def parse(cls, text: str) -> Program:
        # Comments become blanks, so that lines keep their numbers.
        text = re.sub(r"//[^\n]*", "", text)
        entry = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text)
        if entry is None or text.count(".entry") != 1:
            raise UnknownInstructionError("expected the PTX of one kernel")
        program = cls(entry[1])
        for parameter in filter(None, map(str.strip, entry[2].split(","))):
            words = parameter.split()
            program.parameters[words[-1]] = words[1].lstrip(".")
        program._declare_shared(text)
        _BodyParser(program, text, entry.end()).parse()
        return program

    def _declare_shared(self, text: str) -> None:
        pattern = r"\.shared\s+\.align\s+(\d+)\s+\.[bus](\d+)\s+([\w$]+)\s*(\[\d*\])?\s*;"
        declared = re.findall(pattern, text)
        if len(declared) != len(re.findall(r"\.shared\s+\.align", text)):
            raise UnknownInstructionError("shared memory of an unknown type")
        # Arrays without a size get what a launch adds, after all others.
        for alignment, bits, name, length in sorted(declared, key=lambda array: array[3] == "[]"):
            self.shared_size = -(-self.shared_size // int(alignment)) * int(alignment)
            self.shared[name] = self.shared_size
            self.shared_size += int(bits) // 8 * int(length.strip("[]") or length != "[]")


class _BodyParser:
    """Registers declared in an inner scope, as in inline assembly, get names of their own."""

    def __init__(self, program: Program, text: str, start: int) -> None:
        self._program, self._text, self._at = program, text, start
        self._scopes: list[dict[str, str]] = [{}]
        self._num_scopes = 0

    def parse(self) -> None:
        program = self._program
        program.blocks.append([])
        while self._scopes:
            self._skip_blanks()
            if self._take(r"\{"):
                self._num_scopes += 1
                self._scopes.append({})
            elif self._take(r"\}"):
                self._scopes.pop()
            elif label := self._take(r"([\w$]+)\s*:(?!:)"):
                if program.blocks[-1]:
                    program.blocks.append([])
                program.labels[label[1]] = len(program.blocks) - 1
            else:
                line = self._text.count("\n", 0, self._at) + 1
                statement = self._take(r"([^;]*);")
                if statement is None:
                    raise UnknownInstructionError(f"line {line}: no end of the kernel")
                self._add(" ".join(statement[1].split()), line)

    def _skip_blanks(self) -> None:
        names = "|".join(re.escape(name) for name in IGNORED)
        while self._take(rf"\s+|(?:{names})\b[^\n;]*(?:;|(?=\n))|;"):
            pass

    def _take(self, pattern: str) -> re.Match[str] | None:
        match = re.compile(pattern).match(self._text, self._at)
        if match:
            self._at = match.end()
        return match

    def _add(self, statement: str, line: int) -> None:
        if statement.startswith(".shared"):
            return
        if statement.startswith(".reg"):
            self._declare(statement, line)
            return
        match = re.fullmatch(r"(?:@(!?)(\S+) )?([a-z][\w.:]*)(?: (.*))?", statement)
        if match is None:
            raise UnknownInstructionError(f"line {line}: {statement}")
        negated, guard, opcode, operands = match.groups()
        instruction = Instruction(
            opcode,
            tuple(map(self._resolve, _split(operands or ""))),
            Guard(self._resolve(guard), bool(negated)) if guard else None,
            line,
        )
        if WARP_SYNC.match(opcode):
            # Threads of a warp that come by different ways wait for each other before it.
            if self._program.blocks[-1]:
                self._program.blocks.append([])
            self._program.warp_sync_blocks.add(len(self._program.blocks) - 1)
        self._program.blocks[-1].append(instruction)
        if opcode.split(".")[0] in ENDS_BLOCK:
            self._program.blocks.append([])

    def _declare(self, statement: str, line: int) -> None:
        match = re.fullmatch(r"\.reg \.(\w+) (.*)", statement)
        if match is None:
            raise UnknownInstructionError(f"line {line}: {statement}")
        for name in match[2].split(","):
            several = re.fullmatch(r"(.+)<(\d+)>", name.strip())
            if several:
                names = [f"{several[1]}{i}" for i in range(int(several[2]))]
            else:
                names = [name.strip()]
            for each in names:
                own = each if len(self._scopes) == 1 else f"{each}@{self._num_scopes}"
                self._scopes[-1][each] = own
                self._program.registers[own] = match[1]

    def _resolve(self, operand: str) -> str:
        if len(self._scopes) == 1:
            return operand

        def rename(match: re.Match[str]) -> str:
            for scope in reversed(self._scopes):
                if match[0] in scope:
                    return scope[match[0]]
            return match[0]

        return re.sub(r"[%\w$.]+", rename, operand)


def _split(operands: str) -> list[str]:
    """Return the operands between the commas that are not in brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands)
    return [part.strip() for part in parts]
