"""Execution of PTX in NumPy: one array element per thread, in lockstep, with all accesses checked.

Threads that diverge run one basic block after the other, the earliest in the text first. Lockstep
would hide a missing barrier, so shared memory and writable arrays remember who accessed each byte:
accesses of two threads, one of them a write, need a barrier between them. A write that changes
nothing is none: Triton has several threads store the same value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from support.ptx.arithmetic import (
    ALL_TYPED,
    COMPARISONS,
    OTHER_TYPES,
    REDUCTIONS,
    TYPES,
    Values,
    shuffle_source,
)
from support.ptx.memory import ALIGNMENT, UNWRITTEN, WARP, Array, Memory, PtxError
from support.ptx.program import Guard, Instruction, Program, UnknownInstructionError

MAX_THREADS = 1 << 13
"""How many threads run side by side: enough for NumPy, and not too many to keep in memory."""
MAX_BLOCK_EXECUTIONS = 1 << 20
REGION = 40
"""Arrays lie so many address bits apart: what is next to an array belongs to none."""
WARP_MISSED = "an instruction of a warp that not all its threads reach"
BARRIER_MISSED = "a barrier that not all threads of a block reach"


def run(
    program: Program,
    grid: tuple[int, int],
    num_threads: int,
    arguments: Sequence[int | Array | None],
    dynamic_shared: int = 0,
) -> int:
    """Run a kernel; write what it wrote into the arrays that are writable.

    Return how many instructions were issued: each counts 32 for every warp of which any thread is
    there, as warps are what a GPU issues instructions for.

    Parameters
    ----------
    arguments : sequence
        One per parameter of the program; None is a null pointer.
    dynamic_shared : int
        Bytes of shared memory that the launch adds.

    Raises
    ------
    PtxError
        An access outside of all arrays, a misaligned one, a write to what is read-only, two
        accesses without a barrier between them, or a barrier or an instruction of a warp that not
        all threads reach.
    UnknownInstructionError
        An instruction that the emulation does not know.
    """
    assert num_threads % WARP == 0
    if len(arguments) != len(program.parameters):
        raise PtxError(f"{len(arguments)} arguments for {len(program.parameters)} parameters")
    memories: list[Memory] = []
    parameters: dict[str, int] = {}
    for name, argument in zip(program.parameters, arguments, strict=True):
        value = argument
        if isinstance(argument, Array):
            data = argument.values.reshape(-1).view(np.uint8)
            # Aligned as it is on the host, no more.
            misalignment = argument.address % ALIGNMENT
            memory = Memory(
                argument.name,
                data,
                data.size,
                num_threads if argument.is_writable else None,
                misalignment=misalignment,
            )
            memories.append(memory)
            value = (len(memories) << REGION) + misalignment
        parameters[name] = value or 0
    issued = 0
    num_blocks = grid[0] * grid[1]
    step = max(1, MAX_THREADS // num_threads)
    for first in range(0, num_blocks, step):
        blocks = np.arange(first, min(first + step, num_blocks))
        shared_size = program.shared_size + dynamic_shared
        machine = _Machine(program, grid, blocks, num_threads, shared_size, parameters, memories)
        with np.errstate(over="ignore"):
            issued += machine.run()
    arrays = (a for a in arguments if isinstance(a, Array))
    for memory, array in zip(memories, arrays, strict=True):
        if array.is_writable and array.values.size:
            array.values.reshape(-1).view(np.uint8)[:] = memory.bytes()
    return issued


Step = Callable[[Values], None]


class _Machine:
    """All threads of some blocks. ``mask`` is where an instruction is executed, one per thread."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int],
        blocks: Values,
        num_threads: int,
        shared_size: int,
        parameters: dict[str, int],
        memories: list[Memory],
    ) -> None:
        self.program, self.parameters, self.memories = program, parameters, memories
        self.num_threads = num_threads
        total = blocks.size * num_threads
        index = np.arange(total)
        self.block, thread = np.divmod(index, num_threads)
        self.thread = blocks[self.block] * num_threads + thread
        self.lane = thread % WARP
        self.warp = index // WARP
        u32 = np.uint32
        self.special = {
            "%tid.x": thread.astype(u32),
            "%ntid.x": np.full(total, num_threads, u32),
            "%laneid": self.lane.astype(u32),
            "%ctaid.x": (blocks[self.block] % grid[0]).astype(u32),
            "%ctaid.y": (blocks[self.block] // grid[0]).astype(u32),
            "%nctaid.x": np.full(total, grid[0], u32),
            "%nctaid.y": np.full(total, grid[1], u32),
        } | dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.z"), np.zeros(total, u32))
        # Apart from each other by whole vectors of 16 bytes.
        self.shared_stride = -(-shared_size // 16) * 16
        self.shared = Memory(
            "shared memory",
            np.full(self.shared_stride * blocks.size, UNWRITTEN, np.uint8),
            shared_size,
            num_threads,
            traced_unit=1,
        )
        self.registers: dict[str, Values] = {}
        for name, type_name in program.registers.items():
            dtype = TYPES[type_name]
            garbage = np.frombuffer(bytes([UNWRITTEN] * dtype.itemsize), dtype)
            self.registers[name] = np.broadcast_to(garbage, total)
        # Number of barriers that each thread has passed.
        self.block_barriers = np.zeros(total, np.int64)
        self.warp_barriers = np.zeros(total, np.int64)
        self.next = np.zeros(total, np.int64)
        self.is_waiting = np.zeros(total, bool)
        self.steps: dict[int, list[Step]] = {}
        self._warp_sync_blocks = list(program.warp_sync_blocks)

    # ---------------------------------------------------------------- control flow

    def run(self) -> int:
        """Run to the end and return what `run` returns."""
        end, issued = len(self.program.blocks), 0
        for _ in range(MAX_BLOCK_EXECUTIONS):
            is_parked = self._waits_for_warp()
            ready = np.where(self.is_waiting | is_parked, end, self.next)
            current = int(ready.min())
            if current == end:
                if is_parked.any():
                    raise PtxError(WARP_MISSED)
                if self.is_waiting.any():
                    raise PtxError(BARRIER_MISSED)
                return issued
            mask = ready == current
            self.next[mask] = current + 1
            steps = self.steps.get(current)
            if steps is None:
                steps = [self._compile(each) for each in self.program.blocks[current]]
                self.steps[current] = steps
            for step in steps:
                step(mask)
            issued += len(steps) * WARP * int(mask.reshape(-1, WARP).any(1).sum())
        raise PtxError("the kernel does not end")

    def _waits_for_warp(self) -> Values:
        """Return which threads wait for others of their warp, before an instruction of a warp."""
        is_there = np.isin(self.next, self._warp_sync_blocks) & ~self.is_waiting
        if not is_there.any():
            return is_there
        end = len(self.program.blocks)
        places = self.next.reshape(-1, WARP)
        is_live = places < end
        first = np.where(is_live, places, end).min(1)
        last = np.where(is_live, places, -1).max(1)
        return is_there & (first != last)[self.warp]

    def _wait(self, mask: Values) -> None:
        """Let threads wait, and blocks go on of which every thread waits."""
        self.is_waiting |= mask
        complete = self.is_waiting.reshape(-1, self.num_threads).all(1)
        places = self.next.reshape(-1, self.num_threads)[complete]
        if np.ptp(places, axis=1).any():
            raise PtxError(BARRIER_MISSED)
        passes = complete[self.block]
        self.is_waiting &= ~passes
        self.block_barriers += passes

    def _compile(self, instruction: Instruction) -> Step:
        """Return what executes an instruction where a mask is true."""
        execute = self._operation(instruction)
        guard = instruction.guard

        def step(mask: Values) -> None:
            try:
                execute(mask if guard is None else mask & self._guard(guard))
            except PtxError as error:
                raise PtxError(f"{instruction}: {error}") from None

        return step

    def _guard(self, guard: Guard) -> Values:
        value = self.registers[guard.register]
        return ~value if guard.is_negated else value

    def _operation(self, instruction: Instruction) -> Step:
        opcode, operands = instruction.opcode, instruction.operands
        root = opcode.split(".")[0]
        if opcode in ("bra", "bra.uni"):
            target = self.program.labels[operands[0]]
            return lambda mask: self._go_to(mask, target)
        if opcode in ("ret", "exit"):
            return lambda mask: self._go_to(mask, len(self.program.blocks))
        if opcode in ("bar.sync", "barrier.sync") and operands == ("0",):
            return self._wait
        if opcode == "bar.warp.sync":
            read = self._reader(operands[0], "s32")
            return lambda mask: self._sync_warps(mask, read())
        handler = getattr(self, f"_compile_{root}", None)
        made = handler(instruction) if handler else self._compile_arithmetic(instruction)
        if made is None:
            raise UnknownInstructionError(str(instruction))
        return made

    def _go_to(self, mask: Values, target: int) -> None:
        self.next[mask] = target

    # ---------------------------------------------------------------- operands

    def _reader(self, operand: str, type_name: str) -> Callable[[], Values]:
        """Return a function of no arguments that reads an operand as a type."""
        dtype = TYPES[type_name]
        if operand.startswith("!"):
            name = operand[1:]
            return lambda: ~self.registers[name]
        if operand in self.special:
            values = self.special[operand].astype(dtype)
            return lambda: values
        if operand in self.registers:
            if self.registers[operand].dtype.itemsize == dtype.itemsize:
                return lambda: self.registers[operand].view(dtype)
            return lambda: self.registers[operand].astype(dtype)
        if operand in self.program.shared:
            value = self.program.shared[operand]
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            value = int(operand.rstrip("U"), 0)
        else:
            raise UnknownInstructionError(f"operand {operand}")
        if type_name == "pred":
            value = int(value != 0)
        bits = dtype.itemsize * 8
        constant = np.frombuffer((value % (1 << bits)).to_bytes(bits // 8, "little"), dtype)
        constant = np.broadcast_to(constant, self.thread.size)
        return lambda: constant

    def _write(self, register: str, values: Values, mask: Values) -> None:
        if register == "_":
            return
        old = self.registers[register]
        if values.dtype != old.dtype:
            # From a signed type, this extends the sign.
            values = values.astype(old.dtype)
        # A new array at every write: another register may refer to the old one.
        self.registers[register] = values if mask.all() else np.where(mask, values, old)

    # ---------------------------------------------------------------- arithmetic

    def _compile_arithmetic(self, instruction: Instruction) -> Step | None:
        name, _, type_name = instruction.opcode.rpartition(".")
        operation = ALL_TYPED.get(name)
        if operation is None or type_name not in TYPES:
            return None
        target, *operands = instruction.operands
        types = [OTHER_TYPES.get((name, i), type_name) for i in range(len(operands))]
        if name == "mad.wide":
            types[2] = f"{type_name[0]}{int(type_name[1:]) * 2}"
        readers = [self._reader(*pair) for pair in zip(operands, types, strict=True)]

        def execute(mask: Values) -> None:
            values = [read() for read in readers]
            if name in ("div", "rem"):
                if (mask & (values[1] == 0)).any():
                    raise PtxError("division by zero")
                values[1] = np.where(values[1] == 0, values[1].dtype.type(1), values[1])
            self._write(target, operation(*values), mask)

        return execute

    def _compile_mov(self, instruction: Instruction) -> Step | None:
        target, source = instruction.operands
        if "{" not in target + source:
            return self._compile_arithmetic(instruction)
        bits = int(instruction.opcode[5:])
        if source.startswith("{"):
            parts = _vector(source)
            part = TYPES[f"b{bits // len(parts)}"]
            readers = [self._reader(each, f"b{bits // len(parts)}") for each in parts]

            def pack(mask: Values) -> None:
                packed = np.stack([read().astype(part) for read in readers], 1)
                self._write(target, packed.view(f"u{bits // 8}")[:, 0], mask)

            return pack
        parts = _vector(target)
        read = self._reader(source, f"b{bits}")

        def unpack(mask: Values) -> None:
            columns = read().copy()[:, None].view(f"u{bits // 8 // len(parts)}")
            for i, register in enumerate(parts):
                self._write(register, columns[:, i].copy(), mask)

        return unpack

    def _compile_cvt(self, instruction: Instruction) -> Step | None:
        _, *types = instruction.opcode.split(".")
        if len(types) != 2 or not set(types) <= set(TYPES):
            return None
        target, source = instruction.operands
        read = self._reader(source, types[1])
        return lambda mask: self._write(target, read().astype(TYPES[types[0]]), mask)

    def _compile_setp(self, instruction: Instruction) -> Step | None:
        _, comparison, *joined, type_name = instruction.opcode.split(".")
        joins = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
        target, a, b, *other = instruction.operands
        if comparison not in COMPARISONS or type_name not in TYPES or "|" in target:
            return None
        if len(joined) > 1 or (joined and joined[0] not in joins):
            return None
        readers = self._reader(a, type_name), self._reader(b, type_name)
        read_other = self._reader(other[0], "pred") if joined else None

        def execute(mask: Values) -> None:
            result = COMPARISONS[comparison](*(read() for read in readers))
            if read_other is not None:
                result = joins[joined[0]](result, read_other())
            self._write(target, result, mask)

        return execute

    # ---------------------------------------------------------------- warps

    def _check_whole_warps(self, mask: Values, members: Values) -> None:
        if (mask.reshape(-1, WARP).sum(1) % WARP).any() or (members[mask] != -1).any():
            raise PtxError(WARP_MISSED)

    def _sync_warps(self, mask: Values, members: Values) -> None:
        self._check_whole_warps(mask, members)
        self.warp_barriers += mask

    def _compile_shfl(self, instruction: Instruction) -> Step | None:
        match = re.fullmatch(r"shfl\.sync\.(up|down|bfly|idx)\.b32", instruction.opcode)
        target, a, b, clamp, members = instruction.operands
        if match is None:
            return None
        register, _, predicate = target.partition("|")
        readers = [self._reader(each, "s32") for each in (a, b, clamp)]
        read_members = self._reader(members, "s32")

        def execute(mask: Values) -> None:
            self._check_whole_warps(mask, read_members())
            values, distance, segment = (read() for read in readers)
            lane = self.lane.astype(np.int32)
            source, inside = shuffle_source(match[1], lane, distance, segment)
            self._write(register, values[self.warp * WARP + source], mask)
            if predicate:
                self._write(predicate, inside, mask)

        return execute

    def _compile_vote(self, instruction: Instruction) -> Step | None:
        match = re.fullmatch(r"vote\.sync\.(any\.pred|all\.pred|ballot\.b32)", instruction.opcode)
        if match is None:
            return None
        target, source, members = instruction.operands
        read, read_members = self._reader(source, "pred"), self._reader(members, "s32")
        vote = {
            "any.pred": lambda votes: votes.any(1),
            "all.pred": lambda votes: votes.all(1),
            "ballot.b32": lambda votes: (votes << np.arange(WARP, dtype=np.uint64)).sum(1),
        }[match[1]]

        def execute(mask: Values) -> None:
            self._check_whole_warps(mask, read_members())
            self._write(target, np.repeat(vote(read().reshape(-1, WARP)), WARP), mask)

        return execute

    def _compile_redux(self, instruction: Instruction) -> Step | None:
        match = re.fullmatch(r"redux\.sync\.(\w+)\.([bus]32)", instruction.opcode)
        target, source, members = instruction.operands
        if match is None or match[1] not in REDUCTIONS:
            return None
        read, read_members = self._reader(source, match[2]), self._reader(members, "s32")
        reduction = REDUCTIONS[match[1]]

        def execute(mask: Values) -> None:
            self._check_whole_warps(mask, read_members())
            by_warp = reduction.reduce(read().reshape(-1, WARP), axis=1, dtype=TYPES[match[2]])
            self._write(target, np.repeat(by_warp, WARP), mask)

        return execute

    # ---------------------------------------------------------------- memory

    def _address(self, operand: str) -> Callable[[], Values]:
        """Return a function that reads an address, such as of ``[%rd1+8]``."""
        match = re.fullmatch(r"\[\s*([%\w$@]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if match is None:
            raise UnknownInstructionError(f"address {operand}")
        read = self._reader(match[1], "u64")
        offset = np.int64(match[2] or 0)
        return lambda: read().view(np.int64) + offset

    def _compile_ld(self, instruction: Instruction) -> Step | None:
        access = _Access.of(instruction.opcode)
        if access is None:
            return None
        target, source = instruction.operands
        if access.space == "param":
            # Where there is a vector or an offset, it is none of these names.
            value = self.parameters.get(source.strip("[] "))
            if value is None:
                return None
            read = self._reader(str(value), access.type_name)
            return lambda mask: self._write(target, read(), mask)
        registers = _vector(target)
        if len(registers) != access.count:
            return None
        address = self._address(source)
        dtype = access.dtype

        def execute(mask: Values) -> None:
            active = np.flatnonzero(mask)
            for memory, threads, at in self._places(access, address(), active):
                memory.trace_reads(self._stamps(threads), at, access.nbytes)
                for i, register in enumerate(registers):
                    loaded = np.zeros(mask.size, dtype)
                    loaded[threads] = memory.read(at + i * dtype.itemsize, dtype)
                    here = np.zeros(mask.size, bool)
                    here[threads] = True
                    self._write(register, loaded, here)

        return execute

    def _compile_st(self, instruction: Instruction) -> Step | None:
        access = _Access.of(instruction.opcode)
        if access is None or access.space == "param":
            return None
        target, source = instruction.operands
        readers = [self._reader(each, access.type_name) for each in _vector(source)]
        if len(readers) != access.count:
            return None
        address = self._address(target)
        width = access.dtype.itemsize

        def execute(mask: Values) -> None:
            active = np.flatnonzero(mask)
            for memory, threads, at in self._places(access, address(), active):
                if not memory.is_writable:
                    raise PtxError(f"a write to {memory.name}, which is read-only")
                for i, read in enumerate(readers):
                    self._store(memory, threads, at + i * width, read()[threads])

        return execute

    def _compile_stmatrix(self, instruction: Instruction) -> Step | None:
        match = _MATRICES.fullmatch(instruction.opcode)
        if match is None:
            return None
        target, source = instruction.operands
        holder, half = _matrix_holders(bool(match[2]))
        readers = [self._reader(each, "u32") for each in _vector(source)]
        assert len(readers) == int(match[1])
        address = self._address(target)

        def execute(mask: Values) -> None:
            for i, read in enumerate(readers):
                values = read()
                for first, memory, threads, at in self._matrix_rows(mask, address(), i):
                    words = values[first[:, None, None] + holder] >> half * 16
                    for column in range(8):
                        halves = words[:, :, column].ravel().astype(np.uint16)
                        self._store(memory, threads, at + 2 * column, halves)

        return execute

    def _compile_ldmatrix(self, instruction: Instruction) -> Step | None:
        match = _MATRICES.fullmatch(instruction.opcode)
        if match is None:
            return None
        target, source = instruction.operands
        holder, half = _matrix_holders(bool(match[2]))
        registers = _vector(target)
        assert len(registers) == int(match[1])
        address = self._address(source)

        def execute(mask: Values) -> None:
            # All are read before any is written: a register may be the address, too.
            addresses = address()
            for i, register in enumerate(registers):
                for first, memory, threads, at in self._matrix_rows(mask, addresses, i):
                    memory.trace_reads(self._stamps(threads), at, 16)
                    loaded = np.zeros(mask.size, np.uint32)
                    for column in range(8):
                        halves = memory.read(at + 2 * column, np.dtype(np.uint16)).reshape(-1, 8)
                        shifted = halves.astype(np.uint32) << half[:, column] * 16
                        # Transposed, two rows of a column are in one register.
                        np.bitwise_or.at(loaded, first[:, None] + holder[:, column], shifted)
                    self._write(register, loaded, mask)

        return execute

    def _matrix_rows(
        self, mask: Values, address: Values, matrix: int
    ) -> list[tuple[Values, Memory, Values, Values]]:
        """Return the first thread of active warps, and the rows whose addresses 8 of each have."""
        self._check_whole_warps(mask, np.full(mask.size, -1))
        first = np.flatnonzero(mask)[::WARP]
        owners = (first[:, None] + 8 * matrix + np.arange(8)).ravel()
        row = _Access("shared", 8, "b16")
        return [(first, *place) for place in self._places(row, address, owners)]

    def _store(self, memory: Memory, threads: Values, at: Values, values: Values) -> None:
        changes = memory.read(at, values.dtype) != values
        stamps = self._stamps(threads[changes])
        memory.trace_writes(stamps, at[changes], values.dtype.itemsize)
        memory.write(at, values)
        if (memory.read(at, values.dtype) != values).any():
            raise PtxError(f"two threads write different values to {memory.name}")

    def _stamps(self, threads: Values) -> Values:
        """Return rows as `Trace` has them."""
        columns = self.thread, self.warp_barriers, self.block_barriers
        return np.stack([column[threads] for column in columns], 1)

    def _places(
        self, access: _Access, address: Values, active: Values
    ) -> list[tuple[Memory, Values, Values]]:
        """Return the memories that active threads access: who, and where in the memory's bytes."""
        address = address[active]
        if (address % access.nbytes).any():
            raise PtxError(f"an address that is not a multiple of {access.nbytes}")
        if access.space == "shared":
            self._check_bounds(self.shared, address, access.nbytes)
            return [(self.shared, active, address + self.block[active] * self.shared_stride)]
        region = address >> REGION
        places = []
        for each in np.unique(region):
            if not 1 <= each <= len(self.memories):
                raise PtxError("an address of no array")
            memory, in_region = self.memories[each - 1], region == each
            at = address[in_region] - (int(each) << REGION) - memory.first
            self._check_bounds(memory, at, access.nbytes)
            places.append((memory, active[in_region], at))
        return places

    @staticmethod
    def _check_bounds(memory: Memory, at: Values, nbytes: int) -> None:
        outside = (at < 0) | (at + nbytes > memory.size)
        if outside.any():
            first = int(at[outside][0])
            raise PtxError(f"byte {first} of {memory.name}, which has {memory.size}")


class _Access(NamedTuple):
    space: str
    count: int
    type_name: str

    @classmethod
    def of(cls, opcode: str) -> _Access | None:
        """Return what a load or store accesses, or None where it is of a kind that is not known."""
        match = re.fullmatch(
            r"(?:ld|st)\.(global|shared|param)(?:\.nc)?"
            r"(?:\.L[12]::\w+)*(?:\.v([24]))?\.([bus](?:8|16|32|64))",
            opcode,
        )
        return cls(match[1], int(match[2] or 1), match[3]) if match else None

    @property
    def dtype(self) -> np.dtype[Any]:
        return TYPES[self.type_name]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * self.count


_MATRICES = re.compile(r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")


def _matrix_holders(is_transposed: bool) -> tuple[Values, Values]:
    """Return which thread, and half of its register, has each element of a matrix of 8 x 8."""
    row, column = np.indices((8, 8), dtype=np.uint32)
    if is_transposed:
        row, column = column, row
    return row * 4 + column // 2, column % 2


def _vector(operand: str) -> list[str]:
    return [each.strip() for each in operand.strip("{} ").split(",")]
