"""An interpreter of SASS that counts what a kernel executes.

It runs every thread of one block, or of one cluster of blocks, with the parameters of a launch. It models registers,
predicates, shared memory, barriers, shuffles and divergence. Loads from global memory return made-up values of the
tensor's dtype, so that control flow that depends on data is typical; stores to global memory are not read back.

It counts:

- executed warp instructions by opcode, including those whose predicate is off in every lane;
- global loads and stores by width, and the 32-byte sectors that they access;
- cycles of shared memory, including bank conflicts;
- waits for global loads, reduced by the instructions issued since the load.
"""

import bisect
import collections
import functools
import math
import re
from typing import NamedTuple

import numpy as np

from benchmarks.count.opcodes import NOTHING, OPCODES
from benchmarks.count.sass import (
    F32,
    F64,
    I32,
    I64,
    IN_L2,
    L1_LATENCY,
    L2_LATENCY,
    LIMIT,
    MEMORY_LATENCY,
    PARAMETERS,
    REGISTER,
    SECTOR,
    SHARED_RESERVED,
    STACK,
    STACK_TOP,
    U32,
    U64,
    WARP,
    Counts,
    SassError,
    any_of_warp,
    instruction,
)

_32, _LOW = U64(32), U64(0xFFFFFFFF)

# --- data -----------------------------------------------------------------------------------------------------------

_WORDS = 4096


@functools.cache
def _pool(dtype: str) -> np.ndarray:
    """The 32-bit words that are repeated to fill memory of a dtype."""
    random = np.random.default_rng(1)
    if dtype in ("float16", "bfloat16", "float32", "float64"):
        numbers = random.uniform(0.0625, 1, 2 * _WORDS) * random.choice((-1, 1), 2 * _WORDS)
        if dtype == "float16":
            return numbers.astype(np.float16).view(U32)[:_WORDS].copy()
        if dtype == "bfloat16":
            return (numbers.astype(F32).view(U32) >> 16).astype(np.uint16).view(U32)[:_WORDS].copy()
        return numbers.astype(F32 if dtype == "float32" else F64).view(U32)[:_WORDS].copy()
    integers = random.integers(0, 7, _WORDS)
    if dtype == "int64":
        return integers.astype(I64).view(U32)[:_WORDS].copy()
    if dtype == "int32":
        return integers.astype(U32)
    return np.zeros(_WORDS, U32)


# --- the machine -----------------------------------------------------------------------------------------------------


def _warp_sectors(first, last, warps):
    """The number of distinct (warp, sector) pairs of these byte addresses, and the distinct sectors."""
    sectors = first // SECTOR
    if (last // SECTOR != sectors).any():
        sectors, warps = np.concatenate([sectors, last // SECTOR]), np.concatenate([warps, warps])
    return len(np.unique(sectors | warps << U64(52))), np.unique(sectors)


class Machine:
    """Runs a cluster of blocks with the indices ``blocks`` and ``shared`` bytes of shared memory per block."""

    def __init__(self, function, parameters, grid, threads, blocks=(0,), shared=0, regions=()):
        self.function, self.threads, self.blocks = function, threads, list(blocks)
        if threads % WARP or len(parameters) > 0x1000:
            raise SassError(f"a launch of whole warps and at most 4 KiB of parameters, not {threads} threads")
        n = self.n = threads * len(self.blocks)
        self.R, self.UR = np.zeros((257, n), U32), np.zeros((65, n), U32)
        self.P, self.UP = np.zeros((8, n), bool), np.zeros((8, n), bool)
        self.P[7] = self.UP[7] = True
        self.constants = bytearray(PARAMETERS + 0x1000 + 16)
        self.grid = (*grid, 1, 1)[:3]
        sizes = dict(zip((0xC, 0x10, 0x14), self.grid, strict=True))
        for at, value in {0x0: threads, 0x4: 1, 0x8: 1, 0x28: STACK_TOP, **sizes}.items():
            self.constants[at : at + 4] = value.to_bytes(4, "little")
        self.constants[PARAMETERS : PARAMETERS + len(parameters)] = parameters
        self.constant_bytes = np.frombuffer(bytes(self.constants), np.uint8)
        self.block_of = np.repeat(np.arange(len(self.blocks)), threads)
        self.warp_of = np.arange(n, dtype=U64) // U64(WARP)
        self.lane = np.tile(np.arange(WARP, dtype=U32), n // WARP)
        self.tid = np.tile(np.arange(threads, dtype=U32), len(self.blocks))
        self.block_bytes = (SHARED_RESERVED + shared + 1023) // 1024 * 1024
        self.shared = np.zeros(self.block_bytes * len(self.blocks), np.uint8)
        self.shared_words = self.shared.view(U32)
        self.local = np.zeros((STACK // 4, n), U32)
        self.regions = sorted(regions)
        self.bases = [region.base for region in self.regions]

        self.alive = np.ones(n, bool)
        self.everybody = np.ones(n, bool)
        self.groups = {0: self.everybody.copy()}  # runnable threads, by the index of their next instruction
        self.waiting = collections.defaultdict(dict)  # event -> {index of the next instruction: waiting threads}
        self.barriers = np.zeros((16, n), bool)  # the participating threads of each convergence barrier
        self.votes, self.vote_result = np.zeros(n, bool), np.zeros(n, U32)
        self.decoded, self.pending, self.counting = {}, {}, Counts()
        self.issued, self.seen = 0, set()
        self.executed = collections.Counter()  # warp instructions by index
        self.warp_counts = np.zeros(n // WARP, np.int64)
        self.uncounted = 0  # instructions executed by all warps, to be added to warp_counts
        self.touched = {"read": collections.defaultdict(list), "written": collections.defaultdict(list)}

    # --- operands: functions that return one value per thread, or one value for all threads ---

    def row(self, name):
        """The array of a register."""
        if name[0] == "U":
            return self.UR[64 if name == "URZ" else int(name[2:])]
        return self.R[256 if name == "RZ" else int(name[1:])]

    def next_row(self, name, by=1):
        if name in ("RZ", "URZ"):
            return self.row(name)
        return self.UR[int(name[2:]) + by] if name[0] == "U" else self.R[int(name[1:]) + by]

    def constant(self, bank, offset, size=4):
        if bank != 0:
            return 0  # other banks hold tables for range reduction of huge angles
        return int.from_bytes(self.constants[offset : offset + size], "little")

    def integer(self, operand):
        """Returns a reader of an operand as 32 bits."""
        if operand[0] in "-~" and not re.match(r"-\d", operand):
            inner = self.integer(operand[1:])
            return (lambda: ~inner()) if operand[0] == "~" else (lambda: ~inner() + U32(1))
        if operand[0] == "|":
            inner = self.integer(operand.strip("|"))
            return lambda: np.abs(inner().view(I32)).view(U32)
        if found := re.match(r"(U?R\w+)\.(B[0-3]|H[01])$", operand):
            inner, half, which = self.integer(found[1]), found[2][0] == "H", int(found[2][1])
            shift, mask = U32(which * (16 if half else 8)), U32(0xFFFF if half else 0xFF)
            return lambda: (inner() >> shift) & mask
        if REGISTER.match(operand):
            row = self.row(operand)
            return lambda: row
        if operand == "SRZ":
            return lambda: U32(0)
        if operand.startswith("c["):
            return self.constant_operand(operand)
        value = U32(int(operand, 0) & 0xFFFFFFFF)
        return lambda: value

    def constant_operand(self, operand, size=4):
        bank, address = re.match(r"cx?\[(\w+)\]\[(.+)\]$", operand).groups()
        if not bank.startswith("0x"):
            raise SassError(f"bindless constants are unknown: {operand}")
        if re.fullmatch(r"0x[0-9a-f]+", address):
            value = self.constant(int(bank, 16), int(address, 16), size)
            value = U64(value) if size == 8 else U32(value)
            return lambda: value
        where = self.address(address)

        def gather():
            at = (where() & _LOW).astype(I64)
            if (at + size > len(self.constant_bytes)).any():
                raise SassError(f"a constant beyond the parameters: {operand}")
            total = np.zeros(self.n, U64)
            for i in range(size):
                total |= self.constant_bytes[at + i].astype(U64) << U64(8 * i)
            return total if size == 8 else total.astype(U32)

        return gather

    def long(self, operand):
        """Returns a reader of an operand as 64 bits; a register is the first of a pair."""
        if operand[0] in "-~" and not re.match(r"-\d", operand):
            inner = self.long(operand[1:])
            return (lambda: ~inner()) if operand[0] == "~" else (lambda: ~inner() + U64(1))
        if REGISTER.match(operand):
            low, high = self.row(operand), self.next_row(operand)
            return lambda: low.astype(U64) | high.astype(U64) << _32
        if operand.startswith("c["):
            return self.constant_operand(operand, 8)
        value = U64(int(operand, 0) & (1 << 64) - 1)
        return lambda: value

    def float(self, operand):
        """Returns a reader in single precision, of a register or of the half that the operand selects."""
        return self._signed(operand, self._single)

    def double(self, operand):
        return self._signed(operand, self._double)

    @staticmethod
    def _signed(operand, read):
        """Reads an operand with ``read``, and applies its sign and its magnitude bars."""
        value = read(operand.lstrip("-").strip("|"))
        negative, magnitude = operand.startswith("-"), "|" in operand
        if negative:
            return (lambda: -np.abs(value())) if magnitude else (lambda: -value())
        return (lambda: np.abs(value())) if magnitude else value

    def _single(self, text):
        if found := re.match(r"(U?R\w+)\.H([01])_H[01]$", text):
            row, shift = self.row(found[1]), U32(16 * int(found[2]))
            return lambda: (row >> shift).astype(np.uint16).view(np.float16).astype(F32)
        if REGISTER.match(text) or text.startswith("c["):
            bits = self.integer(text)
            return lambda: bits().view(F32)
        value = F32(_number(text))
        return lambda: value

    def _double(self, text):
        if REGISTER.match(text) or text.startswith("c["):
            bits = self.long(text)
            return lambda: bits().view(F64)
        value = F64(_number(text))
        return lambda: value

    def predicate(self, operand):
        if operand[0] == "!":
            inner = self.predicate(operand[1:])
            return lambda: ~inner()
        row = (self.UP if operand[0] == "U" else self.P)[7 if operand.endswith("T") else int(operand.lstrip("UP"))]
        return lambda: row

    def address(self, expression):
        """Returns a reader of a bracketed address expression as 64 bits."""
        terms = []
        for sign, term in re.findall(r"([+-]?)([^+-]+)", expression):
            if term.endswith(".64"):
                get = self.long(term[:-3])
            elif found := re.match(r"(U?R\w+)\.X(\d+)$", term):
                get = functools.partial(
                    lambda inner, by: inner().astype(U64) * by, self.integer(found[1]), U64(found[2])
                )
            elif re.match(r"U?R", term):
                get = functools.partial(lambda inner: inner().astype(U64), self.integer(term.removesuffix(".U32")))
            else:
                value = U64(int(sign + term, 0) & (1 << 64) - 1)
                terms.append(functools.partial(lambda value: value, value))
                continue
            if sign == "-":
                get = functools.partial(lambda inner: ~inner() + U64(1), get)
            terms.append(get)
        if len(terms) == 1:
            return terms[0]

        def total():
            value = terms[0]()
            for term in terms[1:]:
                value = value + term()
            return value

        return total

    # --- results; ``mask`` is None if all threads are active ---

    def put(self, name, value, mask):
        if name in ("RZ", "URZ"):
            return
        self.put_row(self.row(name), value, mask)

    def put_next(self, name, value, mask, by=1):
        if name not in ("RZ", "URZ"):
            self.put_row(self.next_row(name, by), value, mask)

    def put_row(self, row, value, mask):
        if value.dtype != U32:
            value = value.astype(U32) if value.dtype in (U64, I64, bool) else value.view(U32)
        if mask is None:
            row[:] = value
        else:
            np.copyto(row, value, where=mask)

    def put_long(self, name, value, mask):
        if value.dtype != U64:
            value = value.view(U64)
        self.put(name, value & _LOW, mask)
        self.put_next(name, value >> _32, mask)

    def put_predicate(self, name, value, mask):
        if name in ("PT", "UPT"):
            return
        row = (self.UP if name[0] == "U" else self.P)[int(name.lstrip("UP"))]
        if mask is None:
            row[:] = value
        else:
            np.copyto(row, value, where=mask)

    # --- running ---

    def run(self) -> Counts:
        with np.errstate(all="ignore"):
            while self.groups:
                index = min(self.groups)
                self.run_group(index, self.groups.pop(index))
        if self.alive.any():
            raise SassError(f"{self.function.name}: threads wait for each other and none can go on")
        return self.result()

    def run_group(self, index, active):
        """Run a group of threads until they branch, wait or end; merge with groups that are reached on the way."""
        code, groups, decoded = self.function.code, self.groups, self.decoded
        whole = None if active.all() else active
        warps = Warps.of(active)
        while True:
            if index in groups:
                active = active | groups.pop(index)
                whole = None if active.all() else active
                warps = Warps.of(active)
            step = decoded.get(index)
            if step is None:
                if index >= len(code):
                    raise SassError(f"{self.function.name}: runs past its end")
                step = decoded[index] = self.decode(index)
            run, guard, negated, sources = step
            self.issued += warps.count
            if self.issued > LIMIT:
                raise SassError(f"{self.function.name}: does not end, at {code[index]}")
            self.executed[index] += warps.count
            if warps.all:
                self.uncounted += 1
            else:
                self.warp_counts[warps.active] += 1
            if self.pending and not sources.isdisjoint(self.pending):
                self.wait(sources)
            mask = whole
            if guard is not None:
                mask = ~guard if negated else guard
                if whole is not None:
                    mask = mask & whole
                if mask.all():
                    mask = None
                elif not mask.any():
                    index += 1
                    continue
            self.index, self.active_threads = index, active if mask is None else mask
            try:
                jump = run(mask)
            except SassError as error:
                raise SassError(f"{self.function.name}: {code[index]}: {error}") from None
            if jump is None:
                index += 1
                continue
            # A list of (next index, threads); threads that wait or have ended are not in it.
            gone = self.everybody if mask is None else mask
            rest = active & ~gone
            if rest.any():
                self.join(index + 1, rest)
            for target, threads in jump:
                self.join(target, threads)
            return

    def join(self, index, threads):
        if index in self.groups:
            self.groups[index] = self.groups[index] | threads
        else:
            self.groups[index] = threads.copy()

    # Time is measured in warp instructions per block: instructions issued plus waits so far.

    def now(self):
        return self.issued / len(self.blocks) + self.counting.waits * MEMORY_LATENCY

    def loaded(self, first, width):
        """Note that a load from global memory into registers has started."""
        if first not in ("RZ", "URZ"):
            stem, number = first.rstrip("0123456789"), int(first.lstrip("UR"))
            for i in range(max(1, width // 4)):
                self.pending[f"{stem}{number + i}"] = self.now() + self.latency

    def copied(self):
        """Note that a copy to shared memory has started."""
        self.pending["copy"] = self.now() + self.latency

    def wait(self, sources):
        """Wait until the last of the pending loads into ``sources`` has completed."""
        ready = max(self.pending.pop(register) for register in list(self.pending) if register in sources)
        self.counting.waits += max(0.0, ready - self.now()) / MEMORY_LATENCY

    def wait_for_copies(self):
        if "copy" in self.pending:
            self.wait(("copy",))

    def decode(self, index):
        ins = instruction(self.function.code[index])
        sources = frozenset(_sources(ins))
        guard, negated = None, False
        if ins.guard not in (None, "PT", "UPT"):
            negated = ins.guard[0] == "!"
            name = ins.guard.lstrip("!")
            guard = (self.UP if name[0] == "U" else self.P)[7 if name.endswith("T") else int(name.lstrip("UP"))]
        if ins.name in ("DEPBAR", "SYNCS"):
            sources = sources | {"copy"}
        if ins.name in NOTHING:
            return (lambda mask: None), guard, negated, sources
        name = ins.name
        if name not in OPCODES and name[0] == "U" and name[1:] in OPCODES:
            name = name[1:]
        if name not in OPCODES:
            raise SassError(f"{self.function.name}: unknown instruction {ins.text}")
        try:
            run = OPCODES[name](self, ins)
        except SassError as error:
            raise SassError(f"{self.function.name}: {ins.text}: {error}") from None
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            raise SassError(f"{self.function.name}: cannot read {ins.text}: {error}") from error
        if ins.name != "BRA" and ins.operands and ins.operands[0].startswith(("UR", "UP")):
            run = functools.partial(self.uniformly, run)  # uniform registers are shared by the warp
        return run, guard, negated, sources

    def uniformly(self, run, mask):
        return run(None if mask is None else any_of_warp(mask))

    def here(self, mask):
        return self.everybody if mask is None else mask

    # --- waiting ---

    def release(self):
        """Resume waiting threads once all threads they wait for have arrived or ended."""
        for key, groups in list(self.waiting.items()):
            arrived = np.logical_or.reduce(list(groups.values()))
            kind = key[0]
            if kind == "convergence":
                partners = self.barriers[key[1]] & self.alive
                free = arrived & ~any_of_warp(partners & ~arrived & any_of_warp(arrived))
            elif kind == "warp":
                free = arrived & ~any_of_warp(self.alive & ~arrived & any_of_warp(arrived))
            elif kind == "cluster":
                free = arrived & ~(self.alive & ~arrived).any()
            else:
                free = self.whole_blocks(arrived, key[2])
                if kind == "vote" and free.any():
                    self.count_votes(free)
            if not free.any():
                continue
            for index, threads in list(groups.items()):
                go = threads & free
                if go.any():
                    self.join(index, go)
                    groups[index] = threads & ~free
                    if not groups[index].any():
                        del groups[index]
            if not groups:
                del self.waiting[key]

    def whole_blocks(self, arrived, count):
        """Threads of the blocks where ``count`` threads, or all that have not ended, have reached the barrier."""
        blocks = len(self.blocks)
        there = arrived.reshape(blocks, -1)
        needed = self.alive.reshape(blocks, -1).sum(1) if count is None else np.full(blocks, count)
        return (there & (there.sum(1) >= needed)[:, None]).reshape(-1)

    def count_votes(self, threads):
        blocks = len(self.blocks)
        votes = (self.votes & threads).reshape(blocks, -1)
        result = {"OR": votes.any(1), "AND": votes.sum(1) == threads.reshape(blocks, -1).sum(1), "POPC": votes.sum(1)}
        np.copyto(self.vote_result, np.repeat(result[self.vote_kind].astype(U32), self.threads), where=threads)

    def wait_for(self, key, index, mask):
        groups = self.waiting[key]
        arrived = self.here(mask)
        groups[index] = groups[index] | arrived if index in groups else arrived.copy()
        self.release()
        return []

    # --- memory ---

    def global_access(self, kind, addresses, width, mask):
        """Count one request to global memory per warp."""
        if mask is not None:
            addresses, warps = addresses[mask], self.warp_of[mask]
        else:
            warps = self.warp_of
        if (addresses % U64(width)).any():
            raise SassError("an address that is not aligned")
        requests = len(np.unique(warps))
        sectors, distinct = _warp_sectors(addresses, addresses + U64(width - 1), warps)
        counts, touched = self.counting, self.touched["read" if kind == "loads" else "written"]
        of, in_sectors = getattr(counts, kind), getattr(counts, kind[:-1] + "_sectors")
        key = str(8 * width)
        of[key] = of.get(key, 0) + requests
        in_sectors[key] = in_sectors.get(key, 0) + sectors
        region = self.region_of(addresses[0])
        touched[region].append(distinct)
        if kind == "loads":
            self.latency = self.read_sectors(region, distinct)
        else:
            counts.l2_sectors += sectors
            self.latency = MEMORY_LATENCY

    def bulk(self, kind, addresses, size):
        """Count a bulk copy of ``size`` bytes as requests of 128 bytes."""
        sectors = np.unique(addresses // U64(SECTOR))
        of, in_sectors = getattr(self.counting, kind), getattr(self.counting, kind[:-1] + "_sectors")
        of["bulk"] = of.get("bulk", 0) + size / 128
        in_sectors["bulk"] = in_sectors.get("bulk", 0) + len(sectors)
        self.touched["read" if kind == "loads" else "written"][self.region_of(addresses[0])].append(sectors)
        self.counting.l2_sectors += len(sectors)
        self.latency = MEMORY_LATENCY

    def read_sectors(self, region, sectors):
        """The latency of a load. Sectors that the block has read before are in the first-level cache."""
        new = set(sectors.tolist()) - self.seen
        if not new:
            return L1_LATENCY
        self.seen |= new
        self.counting.l2_sectors += len(new)
        cached = region >= 0 and (self.regions[region].scratch or self.regions[region].size <= IN_L2)
        return L2_LATENCY if cached else MEMORY_LATENCY

    def region_of(self, address):
        return bisect.bisect_right(self.bases, int(address)) - 1

    def made_up(self, addresses, width, mask):
        """The words that a load from global memory returns."""
        first = addresses if mask is None else addresses[mask]
        region = self.region_of(first[0])
        pool = _pool(self.regions[region].dtype if region >= 0 else "float32")
        at = (addresses >> U64(2)).astype(I64)
        words = [pool[(at + i) % _WORDS] for i in range(max(1, width // 4))]
        if width < 4:
            shift = ((addresses % U64(4)) * U64(8)).astype(U32)
            words = [(words[0] >> shift) & U32((1 << 8 * width) - 1)]
        return words

    def shared_index(self, addresses, width, mask):
        """Byte index into ``self.shared``; the upper byte of an address is the block's rank in its cluster."""
        rank = (addresses >> U64(24)).astype(I64) & 0xFF
        offset = (addresses & U64(0xFFFFFF)).astype(I64)
        wrong = (offset + width > self.block_bytes) | (rank >= len(self.blocks)) | (offset % width != 0)
        if (wrong if mask is None else wrong & mask).any():
            raise SassError("an address that is not aligned, or outside of shared memory")
        return np.where(wrong, 0, rank * self.block_bytes + offset)

    def shared_access(self, name, index, width, mask):
        """Count the cycles of a request.

        Memory has 32 banks of 32 bits and serves 128 bytes at a time. Lanes that read the same word share one access.
        """
        lanes = 128 // max(4, width)  # lanes that are served in the same phase
        phase = np.arange(self.n) // lanes
        if mask is not None:
            index, phase = index[mask], phase[mask]
        words = np.unique(np.concatenate([(phase << 32) | (index // 4 + i) for i in range(max(1, width // 4))]))
        banks = np.bincount((words >> 32) * 32 + words % 32, minlength=32 * (phase.max() + 1)).reshape(-1, 32)
        key = f"{name}.{width * 8}"
        counts = self.counting
        requests = len(np.unique(phase // (WARP // lanes)))
        counts.shared[key] = counts.shared.get(key, 0) + requests
        counts.shared_cycles[key] = counts.shared_cycles.get(key, 0) + int(banks.max(1).sum())

    def load_shared(self, index, width):
        if width < 4:
            value = self.shared[index].astype(U32)
            return [value | self.shared[index + 1].astype(U32) << U32(8) if width == 2 else value]
        return [self.shared_words[index // 4 + i] for i in range(width // 4)]

    def store_shared(self, index, width, words, mask):
        if mask is not None:
            index, words = index[mask], [np.broadcast_to(word, self.n)[mask] for word in words]
        if width < 4:
            for i in range(width):
                self.shared[index + i] = (words[0] >> U32(8 * i)).astype(np.uint8)
        else:
            for i, word in enumerate(words):
                self.shared_words[index // 4 + i] = word

    def local_index(self, addresses, mask):
        at = ((addresses & U64(0xFFFFFF)).astype(I64) - (STACK_TOP - STACK)) // 4
        wrong = (at < 0) | (at >= len(self.local))
        if (wrong if mask is None else wrong & mask).any():
            raise SassError("an address outside of the stack")
        return np.where(wrong, 0, at)

    # --- result ---

    def result(self) -> Counts:
        counts, blocks = self.counting, len(self.blocks)
        by_name = collections.Counter()
        for index, times in self.executed.items():
            by_name[instruction(self.function.code[index]).name] += times
        per_warp = (self.warp_counts + self.uncounted).reshape(blocks, -1)
        counts.instructions = {name: times / blocks for name, times in by_name.most_common()}
        counts.l2_sectors /= blocks
        counts.warps = [int(count) for count in per_warp[0]]
        for attribute in ("loads", "stores", "load_sectors", "store_sectors", "shared", "shared_cycles"):
            setattr(counts, attribute, {key: n / blocks for key, n in sorted(getattr(counts, attribute).items())})
        for attribute, touched in self.touched.items():
            sizes = {region: len(np.unique(np.concatenate(parts))) * SECTOR for region, parts in touched.items()}
            setattr(counts, attribute, {region: size / blocks for region, size in sorted(sizes.items())})
        return counts


class Warps(NamedTuple):
    """The warps that contain a set of threads."""

    active: np.ndarray
    count: int
    all: bool

    @staticmethod
    def of(threads):
        active = threads.reshape(-1, WARP).any(1)
        count = int(active.sum())
        return Warps(active, count, count == len(active))


def _number(text):
    known = {"+INF": math.inf, "INF": math.inf, "+QNAN": math.nan, "QNAN": math.nan, "+SNAN": math.nan}
    if text in known:
        return known[text]
    if text.startswith("0x"):
        return np.array(int(text, 16), U32).view(F32)[()]
    return float(text)


def _sources(ins):
    """The registers that an instruction reads, in addresses and in operands of one, two or four registers."""
    wide = 4 if ins.has("128") else 2 if ins.name[0] == "D" or ins.has("64", "WIDE", "S64", "U64", "F64") else 1
    stores = ins.name in ("STG", "ST", "STS", "STL", "STSM", "ATOM", "ATOMG", "ATOMS", "RED", "REDG", "LDGSTS", "BAR")
    for place, operand in enumerate(ins.operands):
        if place == 0 and not stores and REGISTER.match(operand):
            continue
        for name in re.findall(r"\bU?R\d+", operand):
            stem, number = name.rstrip("0123456789"), int(name.lstrip("UR"))
            pair = 2 if f"{name}.64" in operand else 1
            for i in range(pair if "[" in operand else wide):
                yield f"{stem}{number + i}"


def run(function, parameters, *, grid=(1,), threads=32, block=None, cluster=1, shared=0, regions=()) -> Counts:
    """Run one block of a launch and its cluster, by default in the middle of the grid, and return the counts."""
    block = math.prod(grid) // 2 if block is None else block
    first = block - block % cluster
    return Machine(function, parameters, grid, threads, range(first, first + cluster), shared, regions).run()
