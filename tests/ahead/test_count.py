"""Tests of the SASS interpreter, on listings with known results; of recorded launches; of instruction budgets."""

import os
import re
import struct

import numpy as np
import pytest
import torch

from attnkern import _ops

if _ops.TRITON_INTERPRETS:
    pytest.skip("the interpreter of Triton replaces its compiler in this process", allow_module_level=True)

from benchmarks.cases import GPU_CASES, Case
from benchmarks.count import choice, code, counting, estimate, launches, page, rows
from benchmarks.count.machine import Machine
from benchmarks.count.sass import WARP, Region, SassError, parse

BASE = 1 << 40  # address of the tensor that is the first parameter
POINTER = struct.pack("<Q", BASE)


def function(text):
    """Parses a kernel from these lines. Each label is on a line of its own."""
    lines = [".text.kernel:"]
    for line in filter(None, map(str.strip, text.splitlines())):
        lines.append(line if line.endswith(":") else f"/*0000*/ {line} ;")
    return parse("\n".join(lines))["kernel"]


def machine(text, parameters=b"", **options):
    """Runs these lines and returns the machine."""
    options = {"grid": (1,), "threads": WARP, "shared": 4096} | options
    ran = Machine(function(text), parameters, **options)
    ran.counts = ran.run()
    return ran


# --- control ---------------------------------------------------------------------------------------------------------


def test_loop_counts_every_iteration():
    ran = machine("""
        MOV R0, 0x5
        .L_0:
        IADD3 R0, R0, -0x1, RZ
        ISETP.NE.AND P0, PT, R0, RZ, PT
        @P0 BRA `(.L_0)
        EXIT
    """)
    assert ran.counts.instructions == {"IADD3": 5, "ISETP": 5, "BRA": 5, "MOV": 1, "EXIT": 1}
    assert ran.counts.warps == [17]


#: Lanes 16 to 31 take another branch; all threads reconverge at .L_1.
PARTING = """
    S2R R0, SR_TID.X
    BSSY B0, `(.L_1)
    ISETP.GE.AND P0, PT, R0, 0x10, PT
    @P0 BRA `(.L_2)
    MOV R1, 0x1
    BRA `(.L_0)
    .L_2:
    MOV R1, 0x2
    .L_0:
    BSYNC B0
    .L_1:
    SHFL.BFLY PT, R2, R1, 0x10, 0x1f
    EXIT
"""


def test_divergent_threads_reconverge():
    ran = machine(PARTING)
    assert ran.R[2].tolist() == [2] * 16 + [1] * 16
    assert ran.counts.instructions["MOV"] == 2  # once for each branch
    assert ran.counts.instructions["SHFL"] == 1  # once, after reconvergence


def test_reconvergence_after_a_branch_behind_exit():
    """The compiler puts cold branches after EXIT; the other threads wait at BSYNC until they jump back."""
    ran = machine("""
        S2R R0, SR_TID.X
        BSSY B0, `(.L_1)
        ISETP.GE.AND P0, PT, R0, 0x10, PT
        @P0 BRA `(.L_2)
        .L_0:
        BSYNC B0
        .L_1:
        SHFL.IDX PT, R2, R1, 0x1f, 0x1f
        EXIT
        .L_2:
        MOV R1, 0x7
        BRA `(.L_0)
    """)
    assert ran.R[2].tolist() == [7] * 32
    assert ran.counts.instructions["SHFL"] == 1


def test_call_and_return():
    ran = machine("""
        MOV R10, 0x20
        CALL.REL.NOINC `(far)
        MOV R2, R1
        EXIT
        far:
        MOV R1, 0x9
        RET.REL.NODEC R10 `(kernel)
    """)
    assert (ran.R[2] == 9).all()


def test_predicated_off_instruction_is_counted_without_access():
    ran = machine(
        """
        ULDC.64 UR4, c[0x0][0x210]
        IMAD.U32 R2, RZ, RZ, UR4
        IMAD.U32 R3, RZ, RZ, UR5
        @!PT LDG.E R0, desc[UR8][R2.64]
        EXIT
        """,
        POINTER,
    )
    assert ran.counts.instructions["LDG"] == 1
    assert not ran.counts.loads


def test_deadlock_is_an_error():
    with pytest.raises(SassError, match="wait for each other"):
        machine("BAR.SYNC.DEFER_BLOCKING 0x0, 0x40\nEXIT")


@pytest.mark.parametrize("text", ["FROBNICATE R0, R1", "LDC R0, c[0x0][R1", "S2R R0, SR_NOBODY"])
def test_error_names_the_unknown_instruction(text):
    with pytest.raises(SassError, match=text.split()[0]):
        machine(f"{text}\nEXIT")


# --- arithmetic ------------------------------------------------------------------------------------------------------


def words(seed, count=6):
    random = np.random.default_rng(seed)
    interesting = np.array([0, 1, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF], np.uint32)
    drawn = random.integers(0, 1 << 32, (count, WARP), dtype=np.uint32)
    drawn[:, :5] = random.permuted(np.tile(interesting, (count, 1)), axis=1)
    return drawn


def signed(value, bits=32):
    return value - (1 << bits) if value >> bits - 1 else value


def after(text, registers):
    """Runs the instructions with these values in R0, R1, ... and returns the machine."""
    made = Machine(function(f"{text}\nEXIT"), b"", (1,), WARP)
    made.R[: len(registers)] = registers
    made.run()
    return made


M = 0xFFFFFFFF
ARITHMETIC = {
    "IADD3 R8, R0, -R1, R2": lambda a, b, c, d: a - b + c,
    "IMAD R8, R0, R1, R2": lambda a, b, c, d: a * b + c,
    "IMAD.HI.U32 R8, R0, R1, RZ": lambda a, b, c, d: a * b >> 32,
    "LEA R8, R0, R1, 0x4": lambda a, b, c, d: (a << 4) + b,
    "LEA.HI R8, R0, R1, R2, 0x3": lambda a, b, c, d: ((c << 32 | a) << 3 >> 32) + b,
    "LEA.HI.SX32 R8, R0, R1, 0x5": lambda a, b, c, d: (signed(a) << 5 >> 32) + b,
    "LOP3.LUT R8, R0, R1, R2, 0xe8, !PT": lambda a, b, c, d: a & b | a & c | b & c,
    "LOP3.LUT R8, R0, R1, R2, 0x96, !PT": lambda a, b, c, d: a ^ b ^ c,
    "SHF.L.U32 R8, R0, 0x7, RZ": lambda a, b, c, d: a << 7,
    "SHF.R.U32.HI R8, RZ, 0x7, R0": lambda a, b, c, d: a >> 7,
    "SHF.R.S32.HI R8, RZ, 0x1f, R0": lambda a, b, c, d: signed(a) >> 31,
    "SHF.L.U64.HI R8, R0, 0x3, R1": lambda a, b, c, d: (b << 32 | a) << 3 >> 32,
    "SHF.L.W.U32.HI R8, R0, 0x1e, R1": lambda a, b, c, d: (b << 32 | a) << 30 >> 32,
    "PRMT R8, R0, 0x7632, R1": lambda a, b, c, d: a >> 16 | b >> 16 << 16,
    "PRMT R8, R0, 0x9910, RZ": lambda a, b, c, d: signed(a & 0xFFFF, 16),
    "SGXT R8, R0, 0x8": lambda a, b, c, d: signed(a & 0xFF, 8),
    "IABS R8, R0": lambda a, b, c, d: abs(signed(a)),
    "POPC R8, R0": lambda a, b, c, d: bin(a).count("1"),
    "FLO.U32 R8, R0": lambda a, b, c, d: a.bit_length() - 1,
    "VIMNMX R8, R0, R1, PT": lambda a, b, c, d: min(signed(a), signed(b)),
    "VIMNMX.U32 R8, R0, R1, !PT": lambda a, b, c, d: max(a, b),
    "VIADDMNMX R8, R0, R1, R2, PT": lambda a, b, c, d: min(signed(a + b & M), signed(c)),
    "BREV R8, R0": lambda a, b, c, d: int(f"{a:032b}"[::-1], 2),
}


@pytest.mark.parametrize("text", ARITHMETIC)
def test_arithmetic(text):
    given = words(1)
    found = after(text, given).R[8].tolist()
    assert found == [ARITHMETIC[text](*map(int, column[:4])) & M for column in given.T]


WIDE = {
    "IMAD.WIDE R8, R0, R1, R2": lambda a, b, c: signed(a) * signed(b) + c,
    "IMAD.WIDE.U32 R8, R0, R1, R2": lambda a, b, c: a * b + c,
    "IADD3 R8, P0, R0, R2, RZ\nIADD3.X R9, R1, R3, RZ, P0, !PT": lambda a, b, c: (b << 32 | a) + c,
    "IADD3 R8, P0, R2, -R0, RZ\nIMAD.X R9, R3, 0x1, ~R1, P0": lambda a, b, c: c - (b << 32 | a),
    "LEA R8, P0, R0, R2, 0x2\nLEA.HI.X R9, R0, R3, R1, 0x2, P0": lambda a, b, c: ((b << 32 | a) << 2) + c,
}


@pytest.mark.parametrize("text", WIDE)
def test_arithmetic_of_64_bits(text):
    given = words(2)
    ran = after(text, given)
    for low, high, column in zip(ran.R[8].tolist(), ran.R[9].tolist(), given.T, strict=True):
        a, b, c = int(column[0]), int(column[1]), int(column[3]) << 32 | int(column[2])
        assert high << 32 | low == WIDE[text](a, b, c) & (1 << 64) - 1


@pytest.mark.parametrize("compare", ["LT", "LE", "GT", "GE", "EQ", "NE"])
def test_comparison_of_64_bits(compare):
    given = words(3)
    given[2:4, ::3] = given[0:2, ::3]
    low = f"ISETP.{compare}.U32.AND P0, PT, R0, R2, PT"
    ran = after(f"{low}\nISETP.{compare}.AND.EX P1, PT, R1, R3, PT, P0", given)
    for found, column in zip(ran.P[1], given.T, strict=True):
        a, b = (signed(int(column[i + 1]) << 32 | int(column[i]), 64) for i in (0, 2))
        assert found == {"LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b, "EQ": a == b, "NE": a != b}[compare]


def test_predicates_in_a_register():
    """R2P and P2R with a mask; the bits outside of it do not change."""
    given = words(5)
    ran = after("R2P PR, R0, 0x7f\nP2R R8, PR, R1, 0x55", given)
    for i in range(7):
        assert np.array_equal(ran.P[i], given[0] >> i & 1 == 1)
    assert np.array_equal(ran.R[8], given[0] & 0x55 | given[1] & ~np.uint32(0x55))


def test_floating_point():
    random = np.random.default_rng(4)
    given = random.normal(size=(3, WARP)).astype(np.float32)
    a, b, c = given
    bits = given.view(np.uint32)
    assert np.array_equal(after("FFMA R8, R0, R1, -R2", bits).R[8].view(np.float32), a * b - c)
    assert np.array_equal(after("FMNMX R8, |R0|, R1, !PT", bits).R[8].view(np.float32), np.maximum(abs(a), b))
    packed = after("F2FP.BF16.F32.PACK_AB R8, R0, R1", bits).R[8]
    halves = torch.from_numpy(np.stack([b, a], 1)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(packed, halves.copy().view(np.uint32)[:, 0])
    doubles = after("F2F.F64.F32 R8, R0\nDMUL R8, R8, R8\nF2F.F32.F64 R10, R8", bits).R[10]
    assert np.array_equal(doubles.view(np.float32), (a.astype(float) ** 2).astype(np.float32))


# --- warps and blocks ------------------------------------------------------------------------------------------------


def test_shuffles():
    lanes = np.arange(WARP, dtype=np.uint32)[None]
    assert after("SHFL.BFLY PT, R8, R0, 0x4, 0x1f", lanes).R[8].tolist() == [i ^ 4 for i in range(32)]
    assert after("SHFL.IDX PT, R8, R0, RZ, 0x181f", lanes).R[8].tolist() == [
        i // 8 * 8 for i in range(32)
    ]  # segments of 8 lanes
    down = after("SHFL.DOWN P0, R8, R0, 0x8, 0x1f", lanes)
    assert down.R[8].tolist() == [i + 8 if i < 24 else i for i in range(32)]
    assert down.P[0].tolist() == [i < 24 for i in range(32)]


def test_votes_and_reductions_of_a_warp():
    given = np.arange(WARP, dtype=np.uint32)[None]
    ran = after("ISETP.GE.AND P0, PT, R0, 0x1e, PT\nVOTE.ANY R8, PT, P0\nREDUX.SUM.S32 UR4, R0", given)
    assert (ran.R[8] == 0xC0000000).all()
    assert (ran.UR[4] == sum(range(32))).all()


def test_votes_of_a_block():
    ran = machine(
        """
        S2R R0, SR_TID.X
        ISETP.GE.AND P0, PT, R0, 0x3d, PT
        BAR.RED.POPC.DEFER_BLOCKING 0x0, P0
        B2R.RESULT R1
        EXIT
        """,
        threads=64,
    )
    assert (ran.R[1] == 3).all()


def test_shared_memory_of_a_cluster():
    """Each block stores its rank in the next block's memory; the upper byte of the address selects the block."""
    ran = machine(
        """
        S2UR UR4, SR_CgaCtaId
        UIADD3 UR5, UR4, 0x1, URZ
        ULOP3.LUT UR5, UR5, 0x3, URZ, 0xc0, !UPT
        UMOV UR6, 0x400
        UPRMT UR7, UR5, 0x654, UR6
        S2UR UR8, SR_SWINHI
        MOV R2, UR7
        MOV R3, UR8
        MOV R1, UR4
        ST.E desc[UR12][R2.64], R1
        UCGABAR_ARV
        UCGABAR_WAIT
        ULEA UR9, UR4, UR6, 0x18
        LDS R4, [UR9]
        EXIT
        """,
        grid=(8,),
        blocks=range(4, 8),
    )
    assert ran.R[4].reshape(4, WARP)[:, 0].tolist() == [3, 0, 1, 2]
    assert ran.counts.shared == {"LDS.32": 1, "STS.32": 1}  # per block


# --- memory ----------------------------------------------------------------------------------------------------------

#: Each thread loads and stores one element; the stride is in bytes.
STRIDED = """
    S2R R0, SR_TID.X
    LDC.64 R2, c[0x0][0x210]
    IMAD.WIDE.U32 R2, R0, {stride}, R2
    LDG.E{width} R4, desc[UR4][R2.64]
    STG.E{width} desc[UR4][R2.64], R4
    EXIT
"""


@pytest.mark.parametrize(
    "width, stride, sectors",
    [("", 4, 4), ("", 128, 32), (".U16", 2, 2), (".128", 16, 16), (".64", 8, 8), (".128", 0, 1)],
)
def test_sectors(width, stride, sectors):
    counts = machine(STRIDED.format(width=width, stride=hex(stride)), POINTER).counts
    bits = {"": "32", ".U16": "16", ".64": "64", ".128": "128"}[width]
    assert counts.loads == counts.stores == {bits: 1}
    assert counts.load_sectors == counts.store_sectors == {bits: sectors}


def test_bytes_by_tensor():
    region = Region(BASE, 1 << 20, "float32")
    counts = machine(STRIDED.format(width=".128", stride=hex(16)), POINTER, regions=[region], threads=128).counts
    assert counts.read == counts.written == {0: 128 * 16}


def test_loads_return_values_of_the_dtype():
    regions = [Region(BASE, 1 << 12, "int64")]
    ran = machine(STRIDED.format(width=".64", stride=hex(8)), POINTER, regions=regions)
    assert (ran.R[4] < 7).all()
    assert (ran.R[5] == 0).all()


@pytest.mark.parametrize(
    "width, stride, cycles",
    [("", 4, 1), ("", 8, 2), ("", 128, 32), ("", 0, 1), (".128", 16, 4), (".128", 32, 8), (".64", 8, 2)],
)
def test_bank_conflicts(width, stride, cycles):
    text = f"S2R R0, SR_TID.X\nIMAD R1, R0, {stride:#x}, RZ\nLDS{width} R4, [R1+0x400]\nEXIT"
    counts = machine(text).counts
    (found,) = counts.shared_cycles.values()
    assert found == cycles


def test_shared_memory_store_and_load():
    ran = machine(
        """
        S2R R0, SR_TID.X
        LEA R1, R0, 0x400, 0x2
        STS [R1], R0
        BAR.SYNC.DEFER_BLOCKING 0x0
        LOP3.LUT R2, R1, 0x7c, RZ, 0x3c, !PT
        LDS R3, [R2]
        EXIT
        """,
        threads=64,
    )
    assert ran.R[3].tolist() == [i ^ 31 for i in range(64)]


def test_matrix_store_and_load():
    """LDSM reads back the rows that STSM stored; with MT88, it transposes them."""
    rows_of = "S2R R0, SR_LANEID\nLOP3.LUT R1, R0, 0x7, RZ, 0xc0, !PT\nLEA R1, R1, 0x400, 0x4\n"
    straight = machine(f"{rows_of}STSM.16.M88 [R1], R0\nLDSM.16.M88 R3, [R1]\nEXIT")
    assert straight.R[3].tolist() == list(range(32))
    turned = machine(f"{rows_of}STSM.16.M88 [R1], R0\nLDSM.16.MT88 R3, [R1]\nEXIT")
    numbers = np.zeros((8, 8), int)
    numbers[:, ::2] = np.arange(32).reshape(8, 4)  # each word holds the lane in its lower half and zero above
    assert turned.R[3].tolist() == [
        int(numbers.T[lane // 4, 2 * (lane % 4)] | numbers.T[lane // 4, 2 * (lane % 4) + 1] << 16) for lane in range(32)
    ]


def test_matrix_products_count_cycles_of_tensor_cores():
    """A warp's 16x8x16 products in bfloat16 or 16x8x8 in TF32 take 4 cycles at 63 %; those of four warps all of it."""
    for text in ("HMMA.16816.F32.BF16 R4, R8, R12, RZ", "HMMA.1688.F32.TF32 R4, R8, R12, RZ"):
        ran = machine(f"MOV R5, 0x1\n{text}\nEXIT")
        assert ran.counts.tensor_cycles == pytest.approx(4 / 0.63)
        assert not ran.R[5].any()
    four = machine("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0\nEXIT", threads=4 * WARP)
    assert four.counts.tensor_cycles == 4 * 32


def test_waits_for_overlapping_and_sequential_loads():
    """Two loads from a large tensor cost one wait if they overlap, and two if the first is used in between."""
    load = "LDC.64 R2, c[0x0][0x210]\nLDG.E R4, desc[UR4][R2.64]\n"
    regions = [Region(BASE, 1 << 30, "float32")]
    first = f"{load}LDG.E R5, desc[UR4][R2.64+0x1000]\nFADD R6, R4, R5\nEXIT"
    second = f"{load}FADD R4, R4, R4\nLDG.E R5, desc[UR4][R2.64+0x1000]\nFADD R6, R4, R5\nEXIT"
    waits = [machine(text, POINTER, regions=regions).counts.waits for text in (first, second)]
    assert waits == pytest.approx([1, 2], abs=0.01)


def test_copies_to_shared_memory():
    """LDGSTS copies for each thread; UBLKCP copies in bulk and signals a barrier in shared memory."""
    ran = machine(
        """
        S2R R0, SR_TID.X
        LDC.64 R2, c[0x0][0x210]
        IMAD.WIDE.U32 R2, R0, 0x10, R2
        LEA R1, R0, 0x400, 0x4
        LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]
        LDGDEPBAR
        DEPBAR.LE SB0, 0x0
        ULDC.64 UR8, c[0x0][0x210]
        UMOV UR4, 0x400
        UMOV UR6, 0x10
        ELECT P0, URZ, PT
        @P0 UBLKCP.S.G [UR4], [UR8], UR6
        SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R0
        EXIT
        """,
        POINTER,
    )
    assert ran.counts.loads == {"128": 1, "bulk": 2}
    assert ran.counts.load_sectors == {"128": 16, "bulk": 8}
    assert ran.P[1].all()


def test_atomics_count_as_stores():
    ran = machine("LDC.64 R2, c[0x0][0x210]\nATOMG.E.ADD.STRONG.GPU PT, R4, desc[UR4][R2.64], R5\nEXIT", POINTER)
    assert ran.counts.stores == {"32": 1}
    assert (ran.R[4] == 0).all()


# --- launches --------------------------------------------------------------------------------------------------------


def test_launch_is_recorded_instead_of_run(tmp_path, monkeypatch):
    from cuda_on_host import load

    operators = load()
    monkeypatch.setenv("ATTNKERN_HOST_RECORD", str(tmp_path / "launches"))
    x = torch.ones(64)
    result = operators.faulty_sum(x, 7)
    offset, blocks, threads, shared, cluster, parameters, *pointers = (
        (tmp_path / "launches").read_text(encoding="utf-8").split()
    )
    assert launches._symbols()[int(offset)] == "faulty_sum_kernel"
    assert (blocks, threads, shared, cluster) == ("1", "64", "0", "1")
    assert struct.unpack("<QQi", bytes.fromhex(parameters)) == (x.data_ptr(), result.data_ptr(), 7)
    assert pointers == ["0", "8"]
    packed, regions = launches._canonical(bytes.fromhex(parameters), [0, 8], [x])
    assert struct.unpack("<QQi", packed)[2] == 7
    assert regions[0][1:] == (256, "float32", False)
    assert regions[1].scratch  # an address outside of the known tensors is scratch


def test_resident_blocks():
    assert counting.blocks_per_multiprocessor(registers=128, threads=256, shared=0) == 2
    assert counting.blocks_per_multiprocessor(registers=32, threads=256, shared=0) == 8
    assert counting.blocks_per_multiprocessor(registers=32, threads=64, shared=100 << 10) == 2


def counted(**changes):
    launch = {
        "grid": 13200, "resident": 8, "waits": 0.0, "longest_warp": 0, "instructions": 0, "bytes": 0,
        "l2_sectors": 0, "load_sectors_by": {}, "store_sectors_by": {}, "shared_cycles_by": {},
    }  # fmt: skip
    return launch | changes


def test_estimates():
    """The resource that takes the longest determines a kernel's estimated time."""
    memory = estimate.kernel(counted(bytes=4.3e9), "H200")
    assert memory.limit == "memory"
    assert memory.seconds == pytest.approx(1e-3 / 0.93, rel=0.01)
    assert estimate.kernel(counted(bytes=4.3e9), "H100").seconds == pytest.approx(memory.seconds * 4.3 / 3, rel=0.01)
    issue = estimate.kernel(counted(instructions=4 * 0.8 * 1.755e9 * 1e-5), "H200")  # 10 µs of a multiprocessor
    assert issue.limit == "issue"
    assert issue.seconds == pytest.approx(100 * 10e-6, rel=0.03)
    assert estimate.kernel(counted(waits=10.0), "H200").limit == "chain"


def test_bytes_of_a_real_kernel():
    """The window kernel, compiled ahead of time, reads and writes each element once, in vectors."""
    pytest.importorskip("triton")
    case = Case("window_attention", (8, 64, 32, 32))
    found = {row["pass"]: row for row in rows.rows(case, "triton")}
    main = found["forward"]["launches"][-1]
    features = 8 * 64 * 32 * 32 * 4
    assert main["bytes"] == pytest.approx(2 * features, rel=0.05)
    assert main["loads_by"]["128"] * main["grid"] * WARP * 16 == features
    assert main["stores_by"]["128"] * main["grid"] * WARP * 16 == features
    assert sum(main["opcodes"].values()) == main["instructions"]


def test_torch_compile_is_counted():
    """The kernels that Inductor generates for the literal formula read and write the features."""
    pytest.importorskip("triton")
    case = Case("window_attention", (8, 16, 32, 32))
    found = {row["pass"]: row for row in rows.rows(case, "compile")}
    assert all(launch["kernel"].startswith("triton_") for row in found.values() for launch in row["launches"])
    for row in found.values():
        assert sum(launch["bytes"] for launch in row["launches"]) >= rows.floor_bytes(row)


# --- the rule that chooses a backend ---------------------------------------------------------------------------------


def row_of(shape, backend, microseconds, op="window_attention", layout="contiguous", which="forward"):
    """A row with one launch whose bytes take ``microseconds`` at the bandwidth of an H200."""
    launch = counted(bytes=microseconds * 1e-6 * 4.3e12 * 0.93)
    return {
        "op": op, "shape": shape, "dtype": "float32", "layout": layout, "anchors": 20, "pass": which,
        "backend": backend, "others": [], "launches": [launch],
    }  # fmt: skip


def test_the_simplest_rule():
    sizes = [(8, 16, side, side) for side in (4, 8, 16, 32)]

    def rows_where(triton_wins):
        return [
            row_of(shape, backend, 10 if (backend == "triton") == triton_wins(shape) else 30)
            for shape in sizes
            for backend in ("native", "triton")
        ]

    always = choice.rules(rows_where(lambda shape: True))["window_attention"]
    assert (str(always), always.mean, always.worst) == ("Triton", 1, 1)
    assert str(choice.rules(rows_where(lambda shape: False))["window_attention"]) == "native"
    large = choice.rules(rows_where(lambda shape: shape[2] >= 16))["window_attention"]
    assert str(large) == "Triton where positions ≥ 256, else native"
    assert large.mean == 1
    native = choice.always_native(rows_where(lambda shape: shape[2] >= 16))  # slower in two of the four calls
    assert native.worst > 2
    assert native.mean == pytest.approx(native.worst**0.5)


def test_choice_adds_the_times_of_both_passes():
    shape = (8, 16, 8, 8)
    found = [row_of(shape, "native", 10), row_of(shape, "triton", 15)]
    found += [row_of(shape, "native", 40, which="backward"), row_of(shape, "triton", 20, which="backward")]
    (call,) = choice.calls(found, "H200")
    assert call.seconds["native"] > call.seconds["triton"]
    assert str(choice.rules(found)["window_attention"]) == "Triton"


# --- the committed counts --------------------------------------------------------------------------------------------

#: Rows that the tests count again, for both backends.
BUDGETED = [
    "window_attention 32x512x14x14 bfloat16 contiguous",
    "window_attention 32x256x56x56 bfloat16 channels_last",
    "compatibility_pool 32x256x56x56 bfloat16 contiguous",
    "compatibility_pool 32x2048x7x7 float32 contiguous",
    "anchor_attention 32x512x14x14 float32 contiguous",
    "anchor_quantize 128x1x16x16 float32 contiguous",
]
CASES = {str(case): case for case in GPU_CASES}


@pytest.fixture(scope="module")
def committed():
    return {(str(rows.case_of(row)), row["pass"], row["backend"]): row for row in page.load()["rows"]}


@pytest.mark.parametrize("backend", choice.OURS)
@pytest.mark.parametrize("name", BUDGETED)
def test_no_more_than_the_committed_counts(name, backend, committed):
    """At most 5 % more instructions, no more launches or stack, no narrower vectors. `make count` updates them."""
    if backend == "native" and code.built_library() is None and os.environ.get("ATTNKERN_TEST_CUDA_LIBRARY") != "1":
        pytest.skip("attnkern/_C_cuda is not built; make test-all builds it")
    if backend == "triton":
        pytest.importorskip("triton")
    for row in rows.rows(CASES[name], backend):
        budget = committed[name, row["pass"], backend]
        where = f"{name} {row['pass']} {backend}"
        assert rows.per_element(row) <= 1.05 * rows.per_element(budget), where
        assert len(row["launches"]) <= len(budget["launches"]), where
        main, before = rows.main_launch(row), rows.main_launch(budget)
        assert main["stack"] <= before["stack"], where
        assert main["resident"] >= before["resident"], where
        for kind in ("loads", "stores"):
            assert page.wide_share(row, kind) >= page.wide_share(budget, kind) - 0.05, (where, kind)


def test_page_matches_the_committed_counts():
    assert page.PAGE.read_text(encoding="utf-8") == page.text(page.load()), "run `python -m benchmarks.count --page`"


def test_page_names_slower_rows():
    """The page names each row that is slower than torch.compile or misses its goal."""
    shape = (32, 256, 56, 56)
    found = [row_of(shape, backend, t) for backend, t in (("native", 100), ("triton", 200), ("compile", 50))]
    for row in found:
        row["launches"][0] |= {
            "loads_by": {"16": 8.0}, "stores_by": {"128": 1.0}, "stack": 48, "registers": 32, "kernel": "k",
        }  # fmt: skip
    text = page.text({"rows": found, "versions": {}})
    assert "reached in 0 of 1 rows" in text
    assert f"not counted: {2 * len(GPU_CASES) - 1} of" in text
    assert "window_attention 32x256x56x56 float32 NCHW forward, native: 0.51 × as fast as torch.compile" in text
    assert "loads 16 (100%) bit, 8 bytes of stack" in text


def test_readme_matches_the_page():
    """README.md quotes the native kernels' speedup over torch.compile on an H200, the page's fourth column."""
    table = dict(
        re.findall(r"^\| (\w+ \w+, \w+ maps) +\| (.+) \|$", page.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    )
    quoted = re.findall(
        r"^\| `(\w+)` \| (.+, worst .+) \|$", (code.ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(quoted) == 3
    passes = [f"{which}, {size} maps" for size in ("large", "small") for which in ("forward", "backward")]
    for op, cells in quoted:
        for which, cell in zip(passes, cells.split(" | "), strict=True):
            mean, worst = re.fullmatch(r"(\S+) \((\S+)\)", table[f"{op} {which}"].split("|")[3].strip()).groups()
            assert cell == f"{mean}, worst {worst}", (op, which)
