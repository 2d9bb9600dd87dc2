"""The implementation of each instruction.

A handler decodes an instruction for a machine and returns a function that executes it. The function takes the mask of
active threads (None for all of them). It returns None, or, after a jump, a list of (index of the next instruction,
threads).
"""

import operator

import numpy as np

from benchmarks.count.sass import (
    F32,
    F64,
    I32,
    I64,
    LOCAL_WINDOW,
    REGISTER,
    SHARED_WINDOW,
    U32,
    U64,
    WARP,
    SassError,
    any_of_warp,
    first_of_warp,
    is_predicate,
)

#: opcode -> handler; a uniform opcode (prefix U) without a handler uses the one without the prefix
OPCODES = {}

#: Ignored: hints, fences, ends of asynchronous groups, and waits for operations that complete immediately here.
NOTHING = {
    "NOP", "YIELD", "NANOSLEEP", "DEPBAR", "LDGDEPBAR", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "CCTLL", "FENCE",
    "ENDCOLLECTIVE", "ACQBULK", "PREEXIT", "UCGABAR_ARV", "UTMACMDFLUSH", "UTMACCTL", "UBLKPF", "PMTRIG", "BPT",
    "WARPGROUP",
}  # fmt: skip

_32, _LOW = U64(32), U64(0xFFFFFFFF)


def opcode(*names):
    def register(handler):
        for name in names:
            OPCODES[name] = handler
        return handler

    return register


def _split_destinations(ins, start=1):
    """The predicates that follow the destination, and the operands after them."""
    operands = list(ins.operands[start:])
    predicates = []
    while operands and is_predicate(operands[0]):
        predicates.append(operands.pop(0))
    return predicates, operands


# --- control ---------------------------------------------------------------------------------------------------------


def _label(m, ins):
    name = ins.operands[-1].split("`(")[-1].rstrip(")")
    if name not in m.function.labels:
        raise SassError("a jump to nowhere")
    return m.function.labels[name]


@opcode("BRA")
def branch(m, ins):
    if ins.has("DIV"):  # taken only if the warp has diverged unexpectedly
        return lambda mask: None
    target = _label(m, ins)
    if len(ins.operands) == 1:
        return lambda mask: [(target, m.here(mask))]
    condition = m.predicate(ins.operands[0])

    def run(mask):
        taken = m.here(mask) & condition()
        rest = m.here(mask) & ~taken
        return [(index, threads) for index, threads in ((target, taken), (m.index + 1, rest)) if threads.any()]

    return run


@opcode("EXIT")
def exit_(m, ins):
    condition = m.predicate(ins.operands[0]) if ins.operands else None
    if condition is not None:
        raise SassError("a condition of EXIT")

    def run(mask):
        m.alive &= ~m.here(mask)
        m.release()
        return []

    return run


@opcode("CALL")
def call(m, ins):
    target = _label(m, ins)
    return lambda mask: [(target, m.here(mask))]


@opcode("RET")
def ret(m, ins):
    where = m.integer(ins.operands[0].split()[0])

    def run(mask):
        here = m.here(mask)
        targets = np.broadcast_to(where(), m.n) // U32(16)
        return [(int(target), here & (targets == target)) for target in np.unique(targets[here])]

    return run


@opcode("BSSY")
def bssy(m, ins):
    row = m.barriers[int(ins.operands[0][1:])]

    def run(mask):
        here = m.here(mask)
        np.copyto(row, here, where=any_of_warp(here))

    return run


@opcode("BSYNC")
def bsync(m, ins):
    which = int(ins.operands[0][1:])
    row = m.barriers[which]

    def run(mask):
        here = m.here(mask)
        if mask is None or not (row & m.alive & ~here & any_of_warp(here)).any():
            return None
        return m.wait_for(("convergence", which), m.index + 1, mask)

    return run


@opcode("BREAK")
def break_(m, ins):
    row = m.barriers[int(ins.operands[-1][1:])]
    conditions = [m.predicate(operand) for operand in ins.operands[:-1]]

    def run(mask):
        here = m.here(mask)
        for condition in conditions:
            here = here & condition()
        row[here] = False
        m.release()

    return run


@opcode("BMOV")
def bmov(m, ins):
    if ins.has("CLEAR") and REGISTER.match(ins.operands[0]):
        row, saved = m.barriers[int(ins.operands[1][1:])], ins.operands[0]
        return lambda mask: m.put(saved, np.where(row, U32(1), U32(0)), mask)
    if REGISTER.match(ins.operands[1]):
        row, saved = m.barriers[int(ins.operands[0][1:])], m.integer(ins.operands[1])
        return lambda mask: np.copyto(row, saved() != 0, where=any_of_warp(m.here(mask)))
    if REGISTER.match(ins.operands[0]):
        row, saved = m.barriers[int(ins.operands[1][1:])], ins.operands[0]
        return lambda mask: m.put(saved, np.where(row, U32(1), U32(0)), mask)
    raise SassError("an unknown form")


@opcode("WARPSYNC")
def warpsync(m, ins):
    def run(mask):
        here = m.here(mask)
        if mask is None or not (m.alive & ~here & any_of_warp(here)).any():
            return None
        return m.wait_for(("warp",), m.index + 1, mask)

    # Without ALL, the mask names active threads, which have already converged.
    return run if ins.has("ALL") else lambda mask: None


@opcode("BAR")
def bar(m, ins):
    if ins.has("ARV"):
        raise SassError("a barrier that is only arrived at")
    vote = next((kind for kind in ("OR", "AND", "POPC") if ins.has("RED") and ins.has(kind)), None)
    operands = [operand for operand in ins.operands if not is_predicate(operand)]
    condition = m.predicate(ins.operands[-1]) if vote else None
    identity = m.integer(operands[0])
    count = m.integer(operands[1]) if len(operands) > 1 else None

    def run(mask):
        which = int(np.broadcast_to(identity(), m.n)[m.here(mask)][0])
        needed = None if count is None else int(np.broadcast_to(count(), m.n)[m.here(mask)][0])
        if vote:
            np.copyto(m.votes, condition(), where=m.here(mask))
            m.vote_kind = vote
        return m.wait_for(("vote" if vote else "block", which, needed), m.index + 1, mask)

    return run


@opcode("UCGABAR_WAIT")
def cluster_barrier(m, ins):
    return lambda mask: m.wait_for(("cluster",), m.index + 1, mask)


@opcode("B2R")
def b2r(m, ins):
    def run(mask):
        for operand in ins.operands:
            if is_predicate(operand):
                m.put_predicate(operand, m.vote_result != 0, mask)
            else:
                m.put(operand, m.vote_result, mask)

    return run


# --- moves -----------------------------------------------------------------------------------------------------------


@opcode("MOV")
def mov(m, ins):
    value = m.integer(ins.operands[1])
    return lambda mask: m.put(ins.operands[0], value(), mask)


@opcode("R2UR")
def r2ur(m, ins):
    to, value = ins.operands[0], m.integer(ins.operands[-1])

    def run(mask):  # the mask covers whole warps; each takes the value of its first active thread
        m.put(to, first_of_warp(value(), m.active_threads), mask)

    return run


@opcode("S2R", "S2UR", "CS2R")
def s2r(m, ins):
    to, what = ins.operands
    blocks, (width, height, _) = np.array(m.blocks)[m.block_of], m.grid
    known = {
        "SRZ": 0, "SR_TID.X": m.tid, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CTAID.X": blocks % width,
        "SR_CTAID.Y": blocks // width % height, "SR_CTAID.Z": blocks // width // height, "SR_LANEID": m.lane,
        "SR_CgaCtaId": m.block_of, "SR_SWINHI": SHARED_WINDOW,
        "SR_LWINHI": LOCAL_WINDOW, "SR_CLOCKLO": 0, "SR_CLOCKHI": 0, "SR_VIRTID": 0,
        "SR_LTMASK": (U32(1) << m.lane) - U32(1), "SR_EQMASK": U32(1) << m.lane,
    }  # fmt: skip
    if what not in known:
        raise SassError(f"an unknown special register {what}")
    value = np.asarray(known[what]).astype(U32)
    wide = ins.name == "CS2R" and not ins.has("32")

    def run(mask):
        m.put(to, value, mask)
        if wide:
            m.put_next(to, U32(0), mask)

    return run


@opcode("LDC")
def ldc(m, ins):
    to = ins.operands[0]
    size = next((size for name, size in (("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)) if ins.has(name)), 4)
    value = m.constant_operand(ins.operands[1], size)
    sign = {1: 0x80, 2: 0x8000}.get(size) if ins.has("S8", "S16") else None

    def run(mask):
        if size == 8:
            m.put_long(to, value(), mask)
        elif sign:
            m.put(to, (value() ^ U32(sign)) - U32(sign), mask)
        else:
            m.put(to, value(), mask)

    return run


@opcode("SEL")
def sel(m, ins):
    to, a, b, which = ins.operands
    a, b, which = m.integer(a), m.integer(b), m.predicate(which)
    return lambda mask: m.put(to, np.where(which(), a(), b()), mask)


@opcode("P2R", "UP2UR")
def p2r(m, ins):
    if ins.has("B1", "B2", "B3"):
        raise SassError("predicates in another byte")
    to, _, rest, which = ins.operands
    rest, which, predicates = m.integer(rest), m.integer(which), m.UP if ins.name[0] == "U" else m.P

    def run(mask):
        bits = np.zeros(m.n, U32)
        for i in range(7):
            bits |= predicates[i].astype(U32) << U32(i)
        m.put(to, (bits & which()) | (rest() & ~which()), mask)

    return run


@opcode("R2P", "UR2UP")
def r2p(m, ins):
    if ins.has("B1", "B2", "B3"):
        raise SassError("predicates in another byte")
    value, which, stem = m.integer(ins.operands[1]), int(ins.operands[2], 0), ins.operands[0][:-1]

    def run(mask):
        for i in range(7):
            if which >> i & 1:
                m.put_predicate(f"{stem}{i}", value() >> U32(i) & U32(1) != 0, mask)

    return run


# --- integers --------------------------------------------------------------------------------------------------------


def _wide_term(m, operand):
    """Widens 32 bits to 64; negates as ~x + 1, so that the carry is that of the hardware adder."""
    if operand.startswith("-") and not operand[1:].isdigit() and not operand.startswith("-0x"):
        inner = m.integer(operand[1:])
        return lambda: (~inner()).astype(U64) + U64(1)
    inner = m.integer(operand)
    return lambda: inner().astype(U64)


@opcode("IADD3", "VIADD", "IADD")
def iadd3(m, ins):
    to = ins.operands[0]
    carries, operands = _split_destinations(ins)
    carry_in = [m.predicate(operand) for operand in operands if is_predicate(operand)]
    operands = [operand for operand in operands if not is_predicate(operand)]
    extended = ins.has("X")
    if not [carry for carry in carries if not carry.endswith("PT")]:
        terms = [m.integer(operand) for operand in operands if operand not in ("RZ", "URZ")] or [m.integer("RZ")]

        def run(mask):
            total = terms[0]()
            for term in terms[1:]:
                total = total + term()
            if extended:
                for carry in carry_in:
                    total = total + carry().astype(U32)
            m.put(to, total, mask)

        return run
    terms = [_wide_term(m, operand) for operand in operands]

    def run(mask):
        total = terms[0]()
        for term in terms[1:]:
            total = total + term()
        if extended:
            for carry in carry_in:
                total = total + carry().astype(U64)
        high = total >> _32
        m.put(to, (total & _LOW).astype(U32), mask)
        for i, carry in enumerate(carries):
            m.put_predicate(carry, high > i, mask)

    return run


def _signed64(value):
    return value.view(I32).astype(I64).view(U64)


@opcode("IMAD")
def imad(m, ins):
    to = ins.operands[0]
    carries, (a, b, c, *carry_in) = _split_destinations(ins)
    carry_in = [m.predicate(operand) for operand in carry_in] if ins.has("X") else []
    x, y = m.integer(a), m.integer(b)
    if ins.has("WIDE", "HI"):
        extend = (lambda value: value.astype(U64)) if ins.has("U32") else _signed64
        z, high = m.long(c), ins.has("HI")

        def wide(mask):
            product = extend(x()) * extend(y())
            total = product + z()
            for carry in carry_in:
                total = total + carry().astype(U64)
            if high:
                m.put(to, total >> _32, mask)
            else:
                m.put_long(to, total, mask)
            for carry in carries[:1]:
                m.put_predicate(carry, total < product, mask)

        return wide
    if [carry for carry in carries if not carry.endswith("PT")]:
        z64 = _wide_term(m, c)

        def carrying(mask):
            total = (x() * y()).astype(U64) + z64()
            m.put(to, (total & _LOW).astype(U32), mask)
            m.put_predicate(carries[0], total >> _32 != 0, mask)

        return carrying
    z = m.integer(c)
    if a in ("RZ", "URZ"):  # most moves are written like this
        if not carry_in:
            return lambda mask: m.put(to, z(), mask)
    elif c in ("RZ", "URZ") and not carry_in:
        return lambda mask: m.put(to, x() * y(), mask)

    def run(mask):
        total = x() * y() + z()
        for carry in carry_in:
            total = total + carry().astype(U32)
        m.put(to, total, mask)

    return run


@opcode("LEA")
def lea(m, ins):
    to = ins.operands[0]
    carries, operands = _split_destinations(ins)
    carry_in = [m.predicate(operand) for operand in operands if is_predicate(operand)] if ins.has("X") else []
    operands = [operand for operand in operands if not is_predicate(operand)]
    a, b = m.integer(operands[0]), _wide_term(m, operands[1])
    shift = U64(int(operands[-1], 0))
    upper, extended = ins.has("HI"), ins.has("SX32")
    high = m.integer(operands[2]) if upper and not extended else None

    def shifted():
        if not upper:
            return (a().astype(U64) << shift) & _LOW
        if extended:
            return (_signed64(np.atleast_1d(a())) << shift) >> _32
        return ((high().astype(U64) << _32 | a().astype(U64)) << shift) >> _32

    def run(mask):
        total = shifted() + b()
        for carry in carry_in:
            total = total + carry().astype(U64)
        m.put(to, (total & _LOW).astype(U32), mask)
        for carry in carries[:1]:
            m.put_predicate(carry, total >> _32 != 0, mask)

    return run


@opcode("SHF", "SHL", "SHR")
def shf(m, ins):
    to, low, by, high = ins.operands
    low, by, high = m.integer(low), m.integer(by), m.integer(high)
    left, upper = ins.has("L"), ins.has("HI")
    wrap, kind = ins.has("W"), next((k for k in ("U32", "S32", "U64", "S64") if ins.has(k)), "U32")
    wide = kind.endswith("64")
    limit = U64(63 if wide else 32)

    def run(mask):
        shift = by().astype(U64)
        shift = shift & U64(63 if wide else 31) if wrap else np.minimum(shift, limit)
        both = high().astype(U64) << _32 | low().astype(U64)
        if left:
            if upper:
                value = (both << shift) >> _32
            else:
                value = low().astype(U64) << shift
        elif kind[0] == "S":
            signed = both.view(I64) if wide else (high().view(I32).astype(I64) << I64(32))
            value = (signed >> shift.astype(I64)).view(U64)
            value = value >> _32 if upper else value
        elif wide or not upper:
            value = both >> shift
            value = value >> _32 if upper else value
        else:
            value = high().astype(U64) >> shift
        m.put(to, (value & _LOW).astype(U32), mask)

    return run


#: the LOP3 functions that ignore the third operand; bit 2a + b of the index is the result for bits a and b
_BINARY = [
    lambda a, b: U32(0), lambda a, b: ~(a | b), lambda a, b: ~a & b, lambda a, b: ~a,
    lambda a, b: a & ~b, lambda a, b: ~b, lambda a, b: a ^ b, lambda a, b: ~(a & b),
    lambda a, b: a & b, lambda a, b: ~(a ^ b), lambda a, b: b, lambda a, b: ~a | b,
    lambda a, b: a, lambda a, b: a | ~b, lambda a, b: a | b, lambda a, b: U32(0xFFFFFFFF),
]  # fmt: skip


def _lookup(table):
    """The bitwise function of three words that this 8-bit truth table defines."""
    zero = _BINARY[sum((table >> 2 * i & 1) << i for i in range(4))]
    one = _BINARY[sum((table >> 2 * i + 1 & 1) << i for i in range(4))]
    if zero is one:
        return lambda a, b, c: zero(a, b)
    return lambda a, b, c: (c & one(a, b)) | (~c & zero(a, b))


@opcode("LOP3")
def lop3(m, ins):
    operands = list(ins.operands)
    predicate = operands.pop(0) if is_predicate(operands[0]) else None
    to, a, b, c, table = operands[:5]
    joined = m.predicate(operands[5]) if len(operands) > 5 and operands[5] not in ("!PT", "!UPT") else None
    a, b, c, function = m.integer(a), m.integer(b), m.integer(c), _lookup(int(table, 0))

    def run(mask):
        value = function(a(), b(), c())
        m.put(to, value, mask)
        if predicate:
            result = value != 0
            if joined is not None:
                result = result & joined() if ins.has("PAND") else result | joined()
            m.put_predicate(predicate, result, mask)

    return run


@opcode("PLOP3")
def plop3(m, ins):
    first, second, *inputs, table, other = ins.operands
    a, b, c = (m.predicate(operand) for operand in inputs)
    results = [(to, _predicate_table(int(text, 0))) for to, text in ((first, table), (second, other))]

    def run(mask):
        values = [(to, function(a(), b(), c())) for to, function in results if to not in ("PT", "UPT")]
        for to, value in values:
            m.put_predicate(to, value, mask)

    return run


def _predicate_table(table):
    bits = np.array([table >> i & 1 for i in range(8)], bool)
    return lambda a, b, c: bits[a * 4 + b * 2 + c * 1]


@opcode("PRMT")
def prmt(m, ins):
    if ins.modifiers:
        raise SassError("a mode")
    to, x, select, y = ins.operands
    x, select, y = m.integer(x), m.integer(select), m.integer(y)

    def run(mask):
        both = y().astype(U64) << _32 | x().astype(U64)
        which, value = select().astype(U64), U64(0)
        for i in range(4):
            digit = which >> U64(4 * i)
            byte = both >> ((digit & U64(7)) << U64(3)) & U64(0xFF)
            byte = np.where(digit & U64(8), np.where(byte & U64(0x80), U64(0xFF), U64(0)), byte)
            value = value | byte << U64(8 * i)
        m.put(to, value.astype(U32), mask)

    return run


@opcode("SGXT")
def sgxt(m, ins):
    to, value, bits = ins.operands
    value, bits = m.integer(value), m.integer(bits)
    unsigned = ins.has("U32")

    def run(mask):
        unused = U64(64) - np.minimum(bits(), U32(32)).astype(U64)
        shifted = value().astype(U64) << unused
        result = shifted >> unused if unsigned else (shifted.view(I64) >> unused.astype(I64)).view(U64)
        m.put(to, (result & _LOW).astype(U32), mask)

    return run


@opcode("BMSK")
def bmsk(m, ins):
    to, start, width = ins.operands
    start, width = m.integer(start), m.integer(width)

    def run(mask):
        ones = (U64(1) << np.minimum(width(), U32(32)).astype(U64)) - U64(1)
        m.put(to, (ones << (start() & U32(31)).astype(U64) & _LOW).astype(U32), mask)

    return run


@opcode("IABS")
def iabs(m, ins):
    value = m.integer(ins.operands[1])
    return lambda mask: m.put(ins.operands[0], np.abs(value().view(I32)).view(U32), mask)


@opcode("POPC")
def popc(m, ins):
    value = m.integer(ins.operands[1])
    return lambda mask: m.put(ins.operands[0], np.bitwise_count(value()).astype(U32), mask)


@opcode("FLO")
def flo(m, ins):
    value, shift = m.integer(ins.operands[1]), ins.has("SH")

    def run(mask):
        bits = value()
        highest = np.frexp(bits.astype(F64))[1].astype(I32) - I32(1)
        result = np.where(bits == 0, I32(-1), I32(31) - highest if shift else highest)
        m.put(ins.operands[0], result.astype(I32), mask)

    return run


@opcode("BREV")
def brev(m, ins):
    value = m.integer(ins.operands[1])

    def run(mask):
        bits = value()
        for by, ones in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
            bits = (bits >> U32(by) & U32(ones)) | (bits & U32(ones)) << U32(by)
        m.put(ins.operands[0], bits, mask)

    return run


@opcode("IMNMX", "VIMNMX", "VIMNMX3")
def imnmx(m, ins):
    to, *inputs, smaller = ins.operands
    inputs, smaller = [m.integer(operand) for operand in inputs], m.predicate(smaller)
    kind = U32 if ins.has("U32") else I32

    def run(mask):
        least = most = inputs[0]().view(kind)
        for get in inputs[1:]:
            least, most = np.minimum(least, get().view(kind)), np.maximum(most, get().view(kind))
        m.put(to, np.where(smaller(), least, most).astype(kind), mask)

    return run


@opcode("VIADDMNMX")
def viaddmnmx(m, ins):
    to, a, b, c, smaller = ins.operands
    a, b, c, smaller = m.integer(a), m.integer(b), m.integer(c), m.predicate(smaller)
    kind = U32 if ins.has("U32") else I32

    def run(mask):
        x, y = np.asarray(a() + b()).view(kind), c().view(kind)
        m.put(to, np.where(smaller(), np.minimum(x, y), np.maximum(x, y)).astype(kind), mask)

    return run


# --- comparisons -----------------------------------------------------------------------------------------------------

_COMPARE = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip


def _comparison(ins):
    """The comparison that the instruction's modifier names; NaNs are unordered."""
    for name in ins.modifiers:
        if name in _COMPARE:
            if name == "NE":
                return lambda x, y: (x < y) | (x > y)
            return _COMPARE[name]
        if name == "NAN":
            return lambda x, y: np.isnan(x) | np.isnan(y)
        if name == "NUM":
            return lambda x, y: ~(np.isnan(x) | np.isnan(y))
        if name.endswith("U") and name[:-1] in _COMPARE:
            inner = _COMPARE[name[:-1]]
            return lambda x, y: inner(x, y) | np.isnan(x) | np.isnan(y)
        if name in ("T", "F"):
            return lambda x, y: np.full(np.broadcast(x, y).shape, name == "T")
        if name in ("MIN", "MAX"):
            return (lambda x, y: ~(y < x)) if name == "MIN" else (lambda x, y: ~(y > x))
    raise SassError("an unknown comparison")


def _combine(m, ins, joined, value, mask):
    """Store a comparison and its opposite, each combined with a predicate."""
    if ins.has("AND"):
        join = np.logical_and
    elif ins.has("XOR"):
        join = np.logical_xor
    else:
        join = np.logical_or
    other = joined()
    results = join(value, other), join(np.logical_not(value), other)
    for to, result in zip(ins.operands[:2], results, strict=True):
        m.put_predicate(to, result, mask)


@opcode("ISETP")
def isetp(m, ins):
    a, b, joined = m.integer(ins.operands[2]), m.integer(ins.operands[3]), m.predicate(ins.operands[4])
    kind = U32 if ins.has("U32") else I32
    name = next((name for name in ins.modifiers if name in _COMPARE), None)
    low = m.predicate(ins.operands[5]) if ins.has("EX") else None
    if name is None:
        raise SassError("an unknown comparison")
    compare = _COMPARE[name]
    strict = {"GE": operator.gt, "LE": operator.lt}.get(name, compare)

    def run(mask):
        x, y = a().view(kind), b().view(kind)
        if low is None:
            value = compare(x, y)
        elif name == "NE":
            value = (x != y) | low()
        else:  # if the upper halves are equal, the lower halves decide
            value = (x == y) & low()
            if name != "EQ":
                value = value | strict(x, y)
        _combine(m, ins, joined, value, mask)

    return run


@opcode("FSETP", "DSETP")
def fsetp(m, ins):
    read = m.float if ins.name == "FSETP" else m.double
    a, b, joined, compare = read(ins.operands[2]), read(ins.operands[3]), m.predicate(ins.operands[4]), _comparison(ins)
    return lambda mask: _combine(m, ins, joined, compare(a(), b()), mask)


@opcode("FSET")
def fset(m, ins):
    to, a, b, joined = ins.operands
    a, b, joined, compare = m.float(a), m.float(b), m.predicate(joined), _comparison(ins)
    if not ins.has("BF") or not ins.has("AND"):
        raise SassError("an unknown form")
    return lambda mask: m.put(to, np.where(compare(a(), b()) & joined(), F32(1), F32(0)), mask)


@opcode("FSEL")
def fsel(m, ins):
    to, a, b, which = ins.operands
    a, b, which = m.float(a), m.float(b), m.predicate(which)
    return lambda mask: m.put(to, np.where(which(), a(), b()).astype(F32), mask)


@opcode("FMNMX")
def fmnmx(m, ins):
    to, a, b, smaller = ins.operands
    a, b, smaller = m.float(a), m.float(b), m.predicate(smaller)
    minimum, maximum = (np.minimum, np.maximum) if ins.has("NAN") else (np.fmin, np.fmax)
    return lambda mask: m.put(to, np.where(smaller(), minimum(a(), b()), maximum(a(), b())).astype(F32), mask)


@opcode("FCHK")
def fchk(m, ins):  # whether a division needs the slow path: never, for ordinary values
    return lambda mask: m.put_predicate(ins.operands[0], np.zeros(m.n, bool), mask)


# --- floating point --------------------------------------------------------------------------------------------------


def _rounded(ins, value):
    """Rounds double to single precision in the instruction's rounding mode."""
    single = value.astype(F32)
    if ins.has("RM", "RP", "RZ"):
        down = ins.has("RM") | (ins.has("RZ") & (value > 0))
        wrong = np.where(down, single > value, single < value)
        single = np.where(wrong, np.nextafter(single, np.where(down, F32(-np.inf), F32(np.inf))), single)
    if ins.has("SAT"):
        single = np.clip(np.nan_to_num(single), F32(0), F32(1))
    return np.asarray(single).astype(F32)


def _arithmetic(read, put, directed):
    def handler(m, ins):
        to = ins.operands[0]
        inputs = [read(m)(operand) for operand in ins.operands[1:] if not is_predicate(operand)]
        kind = next(kind for kind in ("FMA", "ADD", "MUL") if kind in ins.name)

        def run(mask):
            values = [get() for get in inputs]
            if directed(ins):
                values = [value.astype(F64) for value in values]
            if kind == "FMA":
                result = values[0] * values[1] + values[2]
            else:
                result = values[0] + values[1] if kind == "ADD" else values[0] * values[1]
            put(m)(to, _rounded(ins, result) if directed(ins) else result, mask)

        return run

    return handler


OPCODES |= dict.fromkeys(
    ("FADD", "FMUL", "FFMA", "FFMA32I", "FMUL32I", "FADD32I"),
    _arithmetic(lambda m: m.float, lambda m: m.put, lambda ins: ins.has("RM", "RP", "RZ", "SAT")),
)
OPCODES |= dict.fromkeys(
    ("DADD", "DMUL", "DFMA"), _arithmetic(lambda m: m.double, lambda m: m.put_long, lambda ins: False)
)

_FUNCTIONS = {
    "EX2": np.exp2,
    "LG2": np.log2,
    "RCP": lambda x: F32(1) / x,
    "RSQ": lambda x: F32(1) / np.sqrt(x),
    "SQRT": np.sqrt,
    "SIN": lambda x: np.sin(x * F32(2 * np.pi)),
    "COS": lambda x: np.cos(x * F32(2 * np.pi)),
    "TANH": np.tanh,
}


@opcode("MUFU")
def mufu(m, ins):
    to = ins.operands[0]
    if ins.has("RCP64H", "RSQ64H"):  # approximates a double from its upper half
        bits = m.integer(ins.operands[1])
        root = ins.has("RSQ64H")

        def half(mask):
            value = (bits().astype(U64) << _32).view(F64)
            m.put(to, np.asarray(1 / (np.sqrt(value) if root else value)).view(U64) >> _32, mask)

        return half
    name = next((name for name in ins.modifiers if name in _FUNCTIONS), None)
    if name is None:
        raise SassError("an unknown function")
    value, function = m.float(ins.operands[1]), _FUNCTIONS[name]
    return lambda mask: m.put(to, np.asarray(function(value())).astype(F32), mask)


@opcode("I2F", "I2FP")
def i2f(m, ins):
    to, source = ins.operands
    source = source.removesuffix(".B0").removesuffix(".H0")
    kind = next((k for k in ("S8", "U8", "S16", "U16", "S64", "U64", "U32", "S32") if k in ins.modifiers), "S32")
    read = m.long(source) if kind.endswith("64") else m.integer(source)
    types = {"S8": np.int8, "U8": np.uint8, "S16": np.int16, "U16": np.uint16, "S64": I64, "U64": U64, "U32": U32}
    number = types.get(kind, I32)
    up = ins.has("RP")

    def run(mask):
        value = read().astype(number)
        if ins.has("F64"):
            m.put_long(to, value.astype(F64), mask)
            return
        if ins.has("F16"):
            raise SassError("to half precision")
        single = value.astype(F32)
        if up:
            single = np.where(single.astype(F64) < value.astype(F64), np.nextafter(single, F32(np.inf)), single)
        m.put(to, np.asarray(single).astype(F32), mask)

    return run


@opcode("F2I", "F2IP")
def f2i(m, ins):
    to, source = ins.operands
    if ins.has("F16", "BF16", "U8", "S8", "U16", "S16"):
        raise SassError("an unknown type")
    value = m.double(source) if ins.has("F64") else m.float(source)
    rounding = next(
        (f for k, f in (("TRUNC", np.trunc), ("FLOOR", np.floor), ("CEIL", np.ceil)) if ins.has(k)), np.rint
    )
    kind = next((k for k in ("U64", "S64", "U32") if ins.has(k)), "S32")
    low, high = {"U64": (0, 2.0**64 - 2048), "S64": (-(2.0**63), 2.0**63 - 1024), "U32": (0, 2.0**32 - 1)}.get(
        kind, (-(2.0**31), 2.0**31 - 1)
    )

    def run(mask):
        number = np.clip(rounding(np.nan_to_num(value().astype(F64))), low, high)
        if kind == "U64":
            m.put_long(to, np.asarray(number).astype(U64), mask)
        elif kind == "S64":
            m.put_long(to, np.asarray(number).astype(I64), mask)
        else:
            m.put(to, np.asarray(number).astype(I64), mask)

    return run


@opcode("FRND")
def frnd(m, ins):
    value = m.float(ins.operands[1])
    rounding = next(
        (f for k, f in (("TRUNC", np.trunc), ("FLOOR", np.floor), ("CEIL", np.ceil)) if ins.has(k)), np.rint
    )
    return lambda mask: m.put(ins.operands[0], np.asarray(rounding(value())).astype(F32), mask)


def _bfloat16(single):
    """The bits of the nearest bfloat16, ties to even."""
    bits = np.asarray(single, F32).view(U32)
    rounded = (bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)
    return np.where(np.isnan(single), U32(0x7FC0), rounded)


def _float16(single):
    return np.asarray(single).astype(np.float16).view(np.uint16).astype(U32)


@opcode("F2F")
def f2f(m, ins):
    to, source = ins.operands
    goal, origin = [name for name in ins.modifiers if name in ("F16", "F32", "F64", "BF16")][:2]
    if origin == "F64":
        value = m.double(source)
    elif origin == "F32":
        value = m.float(source)
    else:
        halves = _halves(m, source, origin == "BF16")

        def value():
            return halves()[0]

    if goal == "F64":
        return lambda mask: m.put_long(to, np.asarray(value()).astype(F64), mask)
    if goal == "F32":
        return lambda mask: m.put(to, np.asarray(value()).astype(F32), mask)
    narrow = _bfloat16 if goal == "BF16" else _float16
    return lambda mask: m.put(to, narrow(value()), mask)


@opcode("F2FP")
def f2fp(m, ins):
    if not ins.has("PACK_AB"):
        raise SassError("an unknown form")
    to, a, b = ins.operands
    a, b, narrow = m.float(a), m.float(b), _bfloat16 if ins.has("BF16") else _float16
    return lambda mask: m.put(to, narrow(a()) << U32(16) | narrow(b()), mask)


def _halves(m, operand, bfloat):
    """The lower and the upper half of an operand, in single precision."""
    sign, magnitude = operand.startswith("-"), "|" in operand
    text = operand.lstrip("-").strip("|")
    text, _, which = text.partition(".") if not text.startswith("c[") else (text, "", "")
    bits = m.integer(text)

    def run():
        word = bits()
        if bfloat:
            low, high = (word << U32(16)).view(F32), (word & U32(0xFFFF0000)).view(F32)
        else:
            low, high = (
                (word >> U32(by) & U32(0xFFFF)).astype(np.uint16).view(np.float16).astype(F32) for by in (0, 16)
            )
        if which == "H0_H0":
            high = low
        elif which == "H1_H1":
            low = high
        if magnitude:
            low, high = np.abs(low), np.abs(high)
        return (-low, -high) if sign else (low, high)

    return run


def _half_inputs(m, operands, bfloat):
    """Readers of the halves of each operand; two immediates are the halves of one operand, the upper one first."""
    operands, inputs = [operand for operand in operands if not is_predicate(operand)], []
    while operands:
        operand = operands.pop(0)
        if "R" not in operand and not operand.startswith("c["):
            high = _half_number(operand)
            low = _half_number(operands.pop(0)) if operands else high
            inputs.append(lambda low=low, high=high: (low, high))
        else:
            inputs.append(_halves(m, operand, bfloat))
    return inputs


def _half_number(text):
    return F32(float(text.replace("QNAN", "nan").replace("INF", "inf")))


@opcode("HADD2", "HMUL2", "HFMA2", "HADD2_32", "HMNMX2")
def half_arithmetic(m, ins):
    to = ins.operands[0]
    if ins.has("F32"):  # one half, converted to single precision
        a, b = m.float(ins.operands[1]), m.float(ins.operands[2])
        return lambda mask: m.put(to, a() + b(), mask)
    bfloat = ins.has("BF16", "BF16_V2")
    narrow = _bfloat16 if bfloat else _float16
    inputs = _half_inputs(m, ins.operands[1:], bfloat)
    smaller = m.predicate(ins.operands[-1]) if ins.name == "HMNMX2" else None

    def run(mask):
        halves = []
        for values in zip(*(get() for get in inputs), strict=True):
            if smaller is not None:
                value = np.where(smaller(), np.fmin(*values), np.fmax(*values))
            elif "FMA" in ins.name:
                value = values[0] * values[1] + values[2]
            else:
                value = values[0] * values[1] if "MUL" in ins.name else values[0] + values[1]
            halves.append(narrow(value))
        m.put(to, np.asarray(halves[1] << U32(16) | halves[0]).astype(U32), mask)

    return run


@opcode("HSETP2")
def hsetp2(m, ins):
    a, b = _half_inputs(m, ins.operands[2:], ins.has("BF16", "BF16_V2"))
    joined = m.predicate(next(operand for operand in ins.operands[2:] if is_predicate(operand)))
    compare = _comparison(ins)

    def run(mask):
        for to, x, y in zip(ins.operands[:2], a(), b(), strict=True):
            value = compare(x, y)
            m.put_predicate(to, value & joined() if ins.has("AND") else value | joined(), mask)

    return run


# --- warp-level instructions -----------------------------------------------------------------------------------------


@opcode("SHFL")
def shfl(m, ins):
    valid, to, value, lane, clamp = ins.operands
    value, lane, clamp = m.integer(value), m.integer(lane), m.integer(clamp)
    kind = next(kind for kind in ("IDX", "UP", "DOWN", "BFLY") if ins.has(kind))
    warp = np.arange(m.n) // WARP * WARP
    own = m.lane.astype(I64)

    def run(mask):
        by, limits = lane().astype(I64) & 31, clamp().astype(I64)
        segment, most = limits >> 8 & 31, limits & 31
        last = (own & segment) | (most & ~segment)
        if kind == "IDX":
            source = (own & segment) | (by & ~segment)
        else:
            source = own ^ by if kind == "BFLY" else own + by if kind == "DOWN" else own - by
        inside = source >= last if kind == "UP" else source <= last
        source = np.where(inside, source, own)
        m.put(to, np.broadcast_to(value(), m.n)[warp + source], mask)
        m.put_predicate(valid, inside, mask)

    return run


@opcode("VOTE", "VOTEU")
def vote(m, ins):
    condition = m.predicate(ins.operands[-1])
    kind = next(kind for kind in ("ALL", "ANY", "EQ") if ins.has(kind))

    def run(mask):
        active = m.active_threads
        votes = (condition() & active).reshape(-1, WARP)
        there = active.reshape(-1, WARP)
        bits = (votes.astype(U32) << np.arange(WARP, dtype=U32)).sum(1, dtype=U32)
        everyone, anyone = (votes == there).all(1), votes.any(1)
        decided = {"ALL": everyone, "ANY": anyone, "EQ": everyone | ~anyone}[kind]
        for operand in ins.operands[:-1]:
            if is_predicate(operand):
                m.put_predicate(operand, np.repeat(decided, WARP), mask)
            else:
                m.put(operand, np.repeat(bits, WARP), mask)

    return run


@opcode("MATCH")
def match(m, ins):
    if not ins.has("ANY"):
        raise SassError(f"unknown instruction {ins.text}")
    to, value = ins.operands
    value = m.integer(value)

    def run(mask):
        values, there = np.broadcast_to(value(), m.n).reshape(-1, WARP), m.active_threads.reshape(-1, WARP)
        alike = (values[:, :, None] == values[:, None, :]) & there[:, None, :]
        bits = (alike.astype(U32) << np.arange(WARP, dtype=U32)).sum(2, dtype=U32)
        m.put(to, bits.reshape(-1), mask)

    return run


@opcode("ELECT")
def elect(m, ins):
    def run(mask):
        there = m.active_threads.reshape(-1, WARP)
        first = np.zeros_like(there)
        first[np.arange(len(there)), there.argmax(1)] = there.any(1)
        m.put_predicate(ins.operands[0], first.reshape(-1), mask)

    return run


@opcode("REDUX")
def redux(m, ins):
    to, value = ins.operands
    value, kind = m.integer(value), I32 if ins.has("S32") else U32
    name = next((name for name in ("SUM", "MAX", "MIN", "OR", "XOR", "AND") if ins.has(name)), "AND")
    function = {"SUM": np.add, "MAX": np.maximum, "MIN": np.minimum, "OR": np.bitwise_or, "XOR": np.bitwise_xor}.get(
        name, np.bitwise_and
    )
    neutral = {"MAX": np.iinfo(kind).min, "MIN": np.iinfo(kind).max, "AND": -1 if kind is I32 else 0xFFFFFFFF}.get(
        name, 0
    )

    def run(mask):
        values = np.where(m.active_threads, value().view(kind), kind(neutral)).reshape(-1, WARP)
        m.put(to, np.repeat(function.reduce(values, 1, dtype=kind), WARP), mask)

    return run


# --- memory ----------------------------------------------------------------------------------------------------------

_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}


def _width(ins):
    return next((_WIDTHS[name] for name in ins.modifiers if name in _WIDTHS), 4)


def _bracketed(m, operand):
    return m.address(operand[operand.rindex("[") + 1 : -1])


def _extended(ins, words, width):
    if width < 4 and ins.has("S8", "S16"):
        sign = U32(1 << 8 * width - 1)
        return [(word ^ sign) - sign for word in words]
    return words


def _put_words(m, to, words, mask):
    for i, word in enumerate(words):
        if i == 0:
            m.put(to, word, mask)
        else:
            m.put_next(to, word, mask, i)


def _registers(m, first, width):
    """The words of consecutive registers."""
    return [m.row(first) if i == 0 else m.next_row(first, i) for i in range(max(1, width // 4))]


def _spaces(m, addresses, mask):
    """Splits generic addresses by space: (the space, the threads whose address is in it)."""
    windows = addresses >> _32
    here = m.here(mask)
    for window, space in ((SHARED_WINDOW, "shared"), (LOCAL_WINDOW, "local"), (None, "global")):
        if window is None:
            threads = here & (windows != SHARED_WINDOW) & (windows != LOCAL_WINDOW)
        else:
            threads = here & (windows == window)
        if threads.any():
            yield space, None if threads.all() else threads


def _load(m, ins, space, addresses, width, to, mask):
    addresses = np.broadcast_to(addresses, m.n)
    if space == "global":
        m.global_access("loads", addresses, width, mask)
        words = m.made_up(addresses, width, mask)
        m.loaded(to, width)
    elif space == "shared":
        index = m.shared_index(addresses, width, mask)
        m.shared_access("LDS", index, width, mask)
        words = m.load_shared(index, width)
    else:
        at = m.local_index(addresses, mask)
        words = [m.local[at + i, np.arange(m.n)] for i in range(max(1, width // 4))]
    _put_words(m, to, _extended(ins, words, width), mask)


def _store(m, space, addresses, width, words, mask):
    addresses = np.broadcast_to(addresses, m.n)
    if space == "global":
        m.global_access("stores", addresses, width, mask)
    elif space == "shared":
        index = m.shared_index(addresses, width, mask)
        m.shared_access("STS", index, width, mask)
        m.store_shared(index, width, words, mask)
    else:
        at, threads = m.local_index(addresses, mask), m.here(mask)
        for i, word in enumerate(words):
            m.local[at[threads] + i, np.flatnonzero(threads)] = word[threads]


@opcode("LDG", "LDS", "LDL")
def load(m, ins):
    space = {"LDG": "global", "LDS": "shared", "LDL": "local"}[ins.name]
    where, width = _bracketed(m, ins.operands[-1]), _width(ins)
    to = next(operand for operand in ins.operands if REGISTER.match(operand))
    return lambda mask: _load(m, ins, space, where(), width, to, mask)


@opcode("LD")
def load_generic(m, ins):
    where, width = _bracketed(m, ins.operands[-1]), _width(ins)
    to = next(operand for operand in ins.operands if REGISTER.match(operand))

    def run(mask):
        addresses = np.broadcast_to(where(), m.n)
        for space, threads in list(_spaces(m, addresses, mask)):
            _load(m, ins, space, addresses, width, to, threads)

    return run


@opcode("STG", "STS", "STL")
def store(m, ins):
    space = {"STG": "global", "STS": "shared", "STL": "local"}[ins.name]
    where, width = _bracketed(m, ins.operands[0]), _width(ins)
    words = _registers(m, ins.operands[1], width)
    return lambda mask: _store(m, space, where(), width, words, mask)


@opcode("ST")
def store_generic(m, ins):
    where, width = _bracketed(m, ins.operands[0]), _width(ins)
    words = _registers(m, ins.operands[1], width)

    def run(mask):
        addresses = np.broadcast_to(where(), m.n)
        for space, threads in list(_spaces(m, addresses, mask)):
            _store(m, space, addresses, width, words, threads)

    return run


@opcode("ATOM", "ATOMG", "RED", "REDG", "ATOMS")
def atomic(m, ins):
    """Counted as a store. In global memory it returns zero: the kernels use atomics only to update counters."""
    brackets = [i for i, operand in enumerate(ins.operands) if operand.endswith("]")]
    where, width = _bracketed(m, ins.operands[brackets[0]]), _width(ins)
    to = next((operand for operand in ins.operands[: brackets[0]] if REGISTER.match(operand)), None)
    value = m.integer(ins.operands[brackets[0] + 1]) if ins.name == "ATOMS" and ins.has("ADD") else None

    def run(mask):
        addresses = np.broadcast_to(where(), m.n)
        if ins.name == "ATOMS":
            if value is None:
                raise SassError("an atomic other than an addition")
            index = m.shared_index(addresses, width, mask)
            m.shared_access("ATOMS", index, width, mask)
            old = m.shared_words[index // 4]
            threads = m.here(mask)
            np.add.at(m.shared_words, index[threads] // 4, np.broadcast_to(value(), m.n)[threads])
        else:
            m.global_access("stores", addresses, width, mask)
            old = U32(0)
            if to:
                m.loaded(to, width)
        if to:
            m.put(to, old, mask)

    return run


@opcode("LDGSTS")
def copy_to_shared(m, ins):
    """An asynchronous copy from global to shared memory, of zeros where the predicate at its end is false. The data
    arrive immediately; the wait is that of a load."""
    to, source = _bracketed(m, ins.operands[0]), _bracketed(m, ins.operands[1])
    width = _width(ins)
    exists = m.predicate(ins.operands[2]) if len(ins.operands) > 2 else None

    def run(mask):
        addresses, goal = np.broadcast_to(source(), m.n), np.broadcast_to(to(), m.n)
        index = m.shared_index(goal, width, mask)
        m.shared_access("STS", index, width, mask)
        loads = mask if exists is None else m.here(mask) & exists()
        words = [U32(0)] * max(1, width // 4)
        if loads is None or loads.any():
            m.global_access("loads", addresses, width, loads)
            words = m.made_up(addresses, width, loads)
        if exists is not None:
            words = [np.where(exists(), word, U32(0)) for word in words]
        m.store_shared(index, width, words, mask)
        m.copied()

    return run


@opcode("UBLKCP")
def bulk_copy(m, ins):
    """A bulk copy between global and shared memory, issued by one thread of the warp."""
    to, source, size = ins.operands
    to, source, size = _bracketed_pair(m, to), _bracketed_pair(m, source), m.integer(size)
    loads = ins.has("S") and ins.modifiers.index("S") < ins.modifiers.index("G")

    def run(mask):
        warps = m.active_threads.reshape(-1, WARP)
        for thread in np.flatnonzero(warps.any(1)) * WARP + warps.argmax(1)[warps.any(1)]:
            count = int(np.broadcast_to(size(), m.n)[thread] & U32(0xFFFF)) * 16
            address = np.broadcast_to(source() if loads else to(), m.n)[thread]
            addresses = address + np.arange(0, max(count, 16), 16, dtype=U64)
            m.bulk("loads" if loads else "stores", addresses, count)
        if loads:
            m.copied()

    return run


def _bracketed_pair(m, operand):
    """A uniform register in brackets. It holds a 64-bit global address, or a shared address in the lower 32 bits."""
    return m.long(operand.strip("[]"))


@opcode("SYNCS")
def syncs(m, ins):
    """Barriers in shared memory. The copies that they wait for have already completed here."""
    predicates = [operand for operand in ins.operands if is_predicate(operand)]

    def run(mask):
        for predicate in predicates:
            m.put_predicate(predicate, np.ones(m.n, bool), mask)
        if predicates:
            m.wait_for_copies()

    return run


@opcode("LDSM", "STSM")
def matrix(m, ins):
    """8 x 8 matrices of 16-bit elements in shared memory. 8 lanes give the row addresses; each lane holds two."""
    load = ins.name == "LDSM"
    register = ins.operands[0] if load else ins.operands[1]
    where = _bracketed(m, ins.operands[1] if load else ins.operands[0])
    count = 4 if ins.has("4") else 2 if ins.has("2") else 1
    transposed = ins.has("MT88")
    warp, lane = np.arange(m.n) // WARP * WARP, m.lane.astype(I64)
    rows = [2 * (lane % 4) + k for k in (0, 1)] if transposed else [lane // 4]
    columns = lane // 4 * 2 if transposed else lane % 4 * 4
    width = 4 // len(rows)

    def run(mask):
        addresses, words = np.broadcast_to(where(), m.n), []
        registers = _registers(m, register, 4 * count)
        for i in range(count):
            # The whole matrix is read at once, 16 bytes of each row.
            whole = m.shared_index(addresses[warp + 8 * i + lane // 4] + (lane % 4 * 4).astype(U64), 4, mask)
            m.shared_access(ins.name, whole, 4, mask)
            word = U32(0)
            for k, row in enumerate(rows):
                index = m.shared_index(addresses[warp + 8 * i + row] + columns.astype(U64), width, mask)
                if load:
                    word = word | m.load_shared(index, width)[0] << U32(16 * k)
                else:
                    m.store_shared(index, width, [registers[i] >> U32(16 * k)], mask)
            words.append(word)
        if load:
            _put_words(m, register, words, mask)

    return run


#: Products that the tensor cores of a scheduler make in a cycle, by the type of the factors.
_PRODUCTS = {"TF32": 256, "BF16": 512, "F16": 512}
#: Share of that which a warp's own instruction reaches. Those of four warps (HGMMA) reach all of it.
_OF_A_WARP = 0.63


@opcode("HMMA", "HGMMA")
def matrix_product(m, ins):
    """A product of matrices, by one warp or four. It is not computed, because no address depends on it: zeros."""
    warps = 4 if ins.name == "HGMMA" else 1
    if warps == 4:
        rows, columns, depth = map(int, next(part for part in ins.modifiers if "x" in part).split("x"))
    else:
        rows, columns, depth = {"16816": (16, 8, 16), "1688": (16, 8, 8)}[ins.modifiers[0]]
    kind = next((kind for kind in ("TF32", "BF16") if ins.has(kind)), "F16")
    cycles = rows * columns * depth / warps / _PRODUCTS[kind] / (1 if warps == 4 else _OF_A_WARP)
    to, zeros = ins.operands[0], [U32(0)] * (rows * columns // WARP // warps)

    def run(mask):
        m.counting.tensor_cycles += cycles * m.here(mask).reshape(-1, WARP).any(1).sum() / len(m.blocks)
        _put_words(m, to, zeros, mask)

    return run
