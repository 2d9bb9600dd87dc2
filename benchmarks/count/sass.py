"""Machine code of compute capability 9.0 (SASS) as ``nvdisasm -c`` prints it, and its counts."""

import functools
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

WARP = 32
SECTOR = 32
#: Patterns of a register and of a predicate among the operands.
REGISTER, _PREDICATE = re.compile(r"U?R(Z|\d+)$"), re.compile(r"!?U?P(T|\d+)$")
#: How many warp instructions a multiprocessor issues during a load: 0.75 µs from memory, 0.16 µs from the
#: second-level cache (tensors of at most 4 MiB, which all blocks read, and scratch, which was just written), 35 cycles
#: from the first (sectors that the block has read before).
MEMORY_LATENCY, L2_LATENCY, L1_LATENCY = 4200, 900, 112
IN_L2 = 4 << 20
#: The upper halves of generic addresses of shared and of local memory.
SHARED_WINDOW, LOCAL_WINDOW = 0x7E00, 0x7D00
#: Static shared memory of kernels starts after the bytes that the system reserves.
SHARED_RESERVED = 1024
STACK_TOP, STACK = 0xFFFDC0, 1 << 14
PARAMETERS = 0x210
#: More steps than this mean an endless loop.
LIMIT = 5_000_000

U32, I32, U64, I64, F32, F64 = np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64


class SassError(Exception):
    """The interpreter does not know an instruction, or the kernel does something invalid."""


# --- machine code ----------------------------------------------------------------------------------------------------


class Function(NamedTuple):
    """The machine code of a kernel."""

    name: str  #: as in the symbol table
    code: list[str]  #: instructions
    labels: dict[str, int]  #: index of the instruction after each label

    @property
    def text(self) -> str:
        return "\n".join([*self.code, repr(self.labels)])


def parse(listing: str) -> dict[str, Function]:
    """The functions of ``nvdisasm -c``, by symbol."""
    functions, current = {}, None
    for line in listing.splitlines():
        stripped = line.strip()
        if found := re.match(r"\.text\.(\S+):$", stripped):
            current = functions.setdefault(found[1], Function(found[1], [], {}))
        elif stripped.startswith((".section", ".text")):
            current = None
        elif current is None:
            continue
        elif found := re.match(r"/\*[0-9a-f]+\*/\s+(.*?)\s*;", stripped):
            current.code.append(found[1])
        elif found := re.match(r"(\S+):$", stripped):
            current.labels[found[1]] = len(current.code)
    return functions


def _split(operands: str) -> list[str]:
    """Split at commas outside of brackets."""
    return [part.strip() for part in re.split(r",(?![^\[(]*[\])])", operands) if part.strip()]


class Instruction(NamedTuple):
    text: str
    guard: str | None  #: predicate, possibly with "!"
    name: str  #: opcode without modifiers
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]

    def has(self, *modifiers: str) -> bool:
        return any(modifier in self.modifiers for modifier in modifiers)


@functools.lru_cache(1 << 16)
def instruction(text: str) -> Instruction:
    body = text.replace(".reuse", "").strip("{} ")
    guard = None
    if found := re.match(r"@(!?U?P\w+)\s+", body):
        guard, body = found[1], body[found.end() :]
    opcode, _, operands = body.partition(" ")
    name, *modifiers = opcode.split(".")
    return Instruction(text, guard, name, tuple(modifiers), tuple(_split(operands)))


# --- what is counted -------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """Counts of one block, or the mean over the blocks of a cluster."""

    instructions: dict[str, float] = field(default_factory=dict)  #: executed warp instructions by opcode
    warps: list[int] = field(default_factory=list)  #: executed instructions of each warp
    loads: dict[str, float] = field(default_factory=dict)  #: warp requests to global memory by bits, or "bulk"
    stores: dict[str, float] = field(default_factory=dict)
    load_sectors: dict[str, float] = field(default_factory=dict)  #: sectors that these requests touch
    store_sectors: dict[str, float] = field(default_factory=dict)
    l2_sectors: float = 0.0  #: sectors from the second-level cache: those that the block has not read before
    read: dict[int, float] = field(default_factory=dict)  #: bytes in distinct sectors by region
    written: dict[int, float] = field(default_factory=dict)
    shared: dict[str, float] = field(default_factory=dict)  #: warp requests to shared memory by opcode and width
    shared_cycles: dict[str, float] = field(default_factory=dict)  #: cycles of these requests, conflicts included
    tensor_cycles: float = 0.0  #: cycles of a scheduler's tensor cores
    waits: float = 0.0  #: waits for loads that nothing hides within the block, in latencies of memory

    @property
    def total(self) -> float:
        return sum(self.instructions.values())


class Region(NamedTuple):
    """A tensor in global memory, so that loads find numbers of its dtype."""

    base: int
    size: int
    dtype: str  #: as PyTorch names it, without "torch."
    scratch: bool = False  #: neither an argument nor a result of the operator


def is_predicate(operand: str) -> bool:
    return _PREDICATE.match(operand) is not None


def any_of_warp(mask):
    """Whether any thread of each thread's warp is in the mask."""
    return np.repeat(mask.reshape(-1, WARP).any(1), WARP)


def first_of_warp(values, mask):
    """The number of the first thread in the mask, for all of its warp."""
    values = np.broadcast_to(values, mask.shape).reshape(-1, WARP)
    return np.repeat(values[np.arange(len(values)), mask.reshape(-1, WARP).argmax(1)], WARP)
