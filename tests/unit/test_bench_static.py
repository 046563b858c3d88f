# The parsers and formulas of bench/kernels, on recorded pieces of ptxas reports and SASS, and on made-up counts.
from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # bench is no installed package

from bench.cases import CASES  # noqa: E402
from bench.kernels import cubins, history, sass, static, workloads  # noqa: E402
from tests.kernel_launches import Launched  # noqa: E402

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3sumIfEvPT_' for 'sm_90'
ptxas info    : Function properties for _Z3sumIfEvPT_
    16 bytes stack frame, 60 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 16 bytes cumulative stack size, 16384 bytes smem
ptxas info    : Compile time = 508.651 ms
ptxas info    : Function properties for _Z6helperv
    0 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function '_Z4copyIfEvPT_' for 'sm_90'
ptxas info    : Function properties for _Z4copyIfEvPT_
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers, 544 bytes cmem[0]
"""


def test_report_of_ptxas():
    assert cubins.parse_report(REPORT) == {
        "_Z3sumIfEvPT_": cubins.Report(80, spill_bytes=92, stack_bytes=16, shared_bytes=16384, called_spill_bytes=16),
        "_Z4copyIfEvPT_": cubins.Report(registers=10, spill_bytes=0, stack_bytes=0, shared_bytes=0),
    }


def test_report_that_is_cut_off_is_an_error():
    with pytest.raises(ValueError, match="_Z4copyIfEvPT_ is not as expected"):
        cubins.parse_report(REPORT[: REPORT.rindex("ptxas info    : Used")])


# ---------------------------------------------------------------- SASS

# An outer loop with the multiply-adds, an element-wise loop inside it, a loop without arithmetic before it, and a branch forward.
PRODUCT = """\
\t.section\t.text._Z7productv,"ax",@progbits
\t.align\t128
_Z7productv:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDS.128 R8, [R2+0x10] ;
        /*0040*/                   LDS.64 R12, [R2+0x20] ;
        /*0050*/                   LDS R14, [R2+0x30] ;
        /*0060*/                   FFMA R20, R8, R12, R20 ;
        /*0070*/                   FFMA R21, R9, R12, R21 ;
        /*0080*/                   HMMA.1688.F32.TF32 R24, R8, R12, R24 ;
        /*0090*/               @P1 BRA `(.L_x_3) ;
.L_x_2:
        /*00a0*/                   LDGSTS.E [R3], desc[UR12][R14.64] ;
        /*00b0*/                   IMAD.WIDE R14, R6, 0x4, R14 ;
        /*00c0*/               @P2 BRA `(.L_x_2) ;
.L_x_3:
        /*00d0*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR12][R16.64], P3 ;
        /*00e0*/                   DFMA R30, R28, R26, R30 ;
        /*00f0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0100*/              @!P4 BRA `(.L_x_1) ;
        /*0110*/                   EXIT ;
\t.section\t.text._Z4copyv,"ax",@progbits
_Z4copyv:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   STG.E.64 desc[UR4][R6.64], R4 ;
        /*0020*/                   MUFU.RSQ R5, R5 ;
        /*0030*/                   EXIT ;
        /*0040*/                   NOP ;
"""


def test_sass_is_split_into_kernels_with_labels_and_predicates():
    kernels = sass.parse(PRODUCT)
    assert list(kernels) == ["_Z7productv", "_Z4copyv"]
    product = kernels["_Z7productv"]
    assert len(product.instructions) == 18
    assert product.instructions[2] == sass.Instruction("BRA", ".L_x_0")
    assert product.labels == {".L_x_0": 1, ".L_x_1": 3, ".L_x_2": 10, ".L_x_3": 13}


def test_loops_are_the_branches_back():
    assert sass.loops(sass.parse(PRODUCT)["_Z7productv"]) == [sass.Loop(1, 2), sass.Loop(3, 16), sass.Loop(10, 12)]


def test_hot_loop_is_that_with_the_products_without_the_loops_inside():
    mix = sass.hot_loop(sass.parse(PRODUCT)["_Z7productv"])
    assert mix.counts == {
        "lds.128": 1, "lds.64": 1, "lds.32": 1, "ffma": 2, "hmma": 1, "branch": 2, "ldgsts.128": 1, "fp64": 1, "sync": 1,
    }  # fmt: skip
    assert (mix.loop, mix.nested, mix.total, mix.math) == (True, 1, 11, 4)
    assert mix.share == 4 / 11


def test_kernel_without_a_loop_is_counted_as_a_whole():
    mix = sass.hot_loop(sass.parse(PRODUCT)["_Z4copyv"])
    assert mix.counts == {"ldg.128": 1, "stg.64": 1, "special": 1, "branch": 1}
    assert not mix.loop and mix.text() == "1 branch, 1 ldg.128, 1 special, 1 stg.64"


WITH_FUNCTIONS = """\
	.section	.text._Z4walkv,"ax",@progbits
        /*0000*/                   CALL.REL.NOINC `($_Z4walkv$_Z12product_stepv) ;
.L_x_1:
        /*0010*/                   FFMA R0, R0, R0, R0 ;
        /*0020*/                   FFMA R0, R0, R0, R0 ;
        /*0030*/                   BRA `(.L_x_1) ;
$_Z4walkv$_Z8map_stepv:
        /*0040*/                   FADD R0, R0, R0 ;
$_Z4walkv$_Z12product_stepv:
        /*0050*/                   LDS.128 R4, [R1] ;
.L_x_2:
        /*0060*/                   FFMA R0, R0, R0, R0 ;
        /*0070*/                   BRA `(.L_x_2) ;
"""


def test_functions_that_a_kernel_calls_can_be_read_alone():
    code = sass.parse(WITH_FUNCTIONS)["_Z4walkv"]
    assert sass.hot_loop(code).counts == {"ffma": 2, "branch": 1}
    assert sass.hot_loop(code.of_functions("product_step")).counts == {"ffma": 1, "branch": 1}
    assert code.of_functions("norm").instructions == []


@pytest.mark.parametrize(
    "name, kind",
    [
        ("LDS.U.128", "lds.128"),
        ("LDG.E", "ldg.32"),
        ("LD.E.128", "ld.128"),  # may be of shared memory
        ("STS.64", "sts.64"),
        ("LDGDEPBAR", "sync"),
        ("DEPBAR.LE", "sync"),
        ("HMMA.16816.F32.BF16", "hmma"),
        ("F2FP.BF16.F32.PACK_AB", "convert"),
        ("FSETP.GEU.AND", "fp32"),
        ("IMAD.MOV.U32", "integer"),
    ],
)
def test_kinds_of_instructions(name, kind):
    assert sass.kind(name) == kind


# ---------------------------------------------------------------- occupancy

H100, A100 = cubins.ARCHS["sm_90"], cubins.ARCHS["sm_80"]


@pytest.mark.parametrize(
    "machine, threads, registers, shared, blocks, warps, limit",
    [  # by NVIDIA's occupancy calculator
        (H100, 256, 32, 0, 8, 64, "registers"),
        (H100, 256, 33, 0, 6, 48, "registers"),  # 33 are given as 40
        (H100, 128, 128, 0, 4, 16, "registers"),
        (H100, 64, 16, 10 * 1024, 20, 40, "shared memory"),  # 11 KB each with what the system keeps
        (A100, 64, 16, 10 * 1024, 14, 28, "shared memory"),
        (H100, 1024, 32, 227 * 1024, 1, 32, "shared memory"),
        (H100, 32, 16, 0, 32, 32, "blocks"),
        (H100, 512, 20, 0, 4, 64, "warps"),
    ],
)
def test_occupancy(machine, threads, registers, shared, blocks, warps, limit):
    assert cubins.occupancy(machine, threads, registers, shared) == cubins.Occupancy(blocks, warps, limit)


@pytest.mark.parametrize("threads, registers, shared", [(1024, 80, 0), (256, 32, 228 * 1024)])
def test_block_that_does_not_fit(threads, registers, shared):
    with pytest.raises(ValueError, match="does not fit"):
        cubins.occupancy(H100, threads, registers, shared)


# ---------------------------------------------------------------- workloads

CASE = CASES["sinusoid-k1"]  # 25 tasks


DECLINES = {"declines": "it is too large", "declines_sm_80": ""}
RESIDENT = {
    "declines": "", "declines_sm_80": "", "kernel": "_Z8residentv", "blocks": 25, "threads": 64, "shared": 4096, "arena": 0,
    "arena_sm_80": 512, "steps": 30, "stages": 20, "code": 100, "compulsory": 300, "bytes": [800, 200],
}  # fmt: skip


def counts(requested=600, launches=1, resident=DECLINES):
    step = {
        "name": "linear_fwd ", "op": "linear_fwd", "times": 3, "flops": 1_000_000, "compulsory": 500,
        "launches": [{"kernel": "_Z1av", "blocks": 50, "threads": 64, "shared": 1024}] * launches,
        "bytes": {"_Z1av": [requested - 100, 100]},
    }  # fmt: skip
    sum_of_tasks = {
        "name": "tree_reduce", "op": "tree_reduce", "times": 1, "flops": 0, "compulsory": 335_000,
        "launches": [{"kernel": "_Z4treev", "blocks": 2, "threads": 256, "shared": 0}], "bytes": {"_Z4treev": [400_000, 35_000]},
    }  # fmt: skip
    return {
        "steps": 1,
        "memory": "low",
        "auto": True,
        "parameters": 7,
        "asked": [step, sum_of_tasks],
        "around": [],
        "resident": resident,
    }


def counted(requested=600, launches=1):
    return workloads.parse(CASE, "float32", counts(requested, launches))


def both_walks():
    layered = workloads.parse(CASE, "float32", counts(resident=RESIDENT))
    return [layered, workloads.parse_resident(layered, RESIDENT)]


def test_a_tasks_counts_are_multiplied_by_steps_and_tasks_and_the_sum_over_tasks_is_not():
    w = counted()
    assert w.launches == 3 + 1
    assert w.flops == 3 * 25 * 1_000_000
    assert w.requested == 3 * 25 * 600 + 435_000
    assert w.compulsory == 3 * 25 * 500 + 335_000


def test_roofline_adds_up_the_longer_of_memory_and_arithmetic():
    w = counted()
    assert w.seconds() == pytest.approx(75e6 / 67e12 + 335_000 / 3.35e12)
    assert w.seconds(requested=True) == pytest.approx(75e6 / 67e12 + 435_000 / 3.35e12)


def test_a_resident_walk_is_one_launch_and_the_sum_over_tasks():
    layered, resident = both_walks()
    assert (layered.launches, resident.launches) == (4, 2)
    assert resident.flops == layered.flops
    assert resident.requested == 25 * (800 + 200) + 435_000
    assert resident.compulsory == 25 * (300 + 100) + 335_000  # the encoded Steps are read, too


def test_a_resident_walk_has_the_arithmetic_of_a_multiprocessor_a_task_and_a_lane_a_thread():
    _, resident = both_walks()
    share = 25 / 132 * 64 / 128
    assert resident.resident.share(25) == pytest.approx(share)
    assert resident.resident.share(1000) == pytest.approx(64 / 128)
    assert resident.seconds() == pytest.approx(75e6 / (67e12 * share) + 335_000 / 3.35e12)


def test_the_walks_stand_side_by_side_or_the_sentence_says_why_not():
    *_, row = static.walks_table(both_walks())
    assert "| 4 / 2 |" in row and "| 0.5 / 0.5 |" in row and "20 stages" in row and "(sm_80: 512)" in row
    *_, row = static.walks_table([counted()])
    assert "| 4 |" in row and "declines: it is too large" in row


def test_largest_launches_know_the_tests_and_the_workloads():
    sizes = workloads.largest_launches({"_Z1av": Launched(9, 32, 2048), "_Z1bv": Launched(1, 32, 0)}, [counted()])
    assert sizes["_Z1av"] == (9, 64, 2048)
    assert sizes["_Z1bv"] == (1, 32, 0)


# ---------------------------------------------------------------- the page


def row(kernel, registers=32, instructions=100, math=50, kind="float32"):
    of_arch = {
        "registers": registers, "spill_bytes": 0, "stack_bytes": 0, "warps": 64, "occupancy": 1.0, "limit": "warps", "loop": True,
        "instructions": instructions, "math": math, "mix": {"ffma": math, "integer": instructions - math},
    }  # fmt: skip
    return {"kernel": kernel, "file": "a.cu", "type": kind, "threads": 64, "static_shared": 0, "dynamic_shared": 0,
            "sm_80": of_arch, "sm_90": of_arch}  # fmt: skip


def test_history_shows_what_changed_against_the_last_entry_that_had_it():
    described = {"date": "2026-11-25", "commit": "abc"}
    entries = [
        history.snapshot("first", [row("a"), row("same")], [counted()], described),
        history.snapshot("kernels alone", [row("a", registers=40), row("same")], [], described),
        history.snapshot("fewer bytes", [row("a", registers=40), row("same")], [counted(requested=500)], described),
    ]
    text = "\n".join(history.history_text(entries))
    first, second, third = text.split("### ")[1:]
    assert "|" not in first
    assert "32 registers" in second and "40 registers" in second and "`same`" not in second
    assert "4 launches, 0.5 MB" in third and "`a`" not in third


def test_history_shows_a_first_resident_walk_beside_the_layered_one():
    described = {"date": "2026-11-25", "commit": "abc"}
    layered, resident = both_walks()
    entries = [
        history.snapshot("layered", [], [layered], described),
        history.snapshot("resident", [], [resident], described),
    ]
    *_, last = [line for line in history.history_text(entries) if line]
    assert last == "| MLP 1-40-40-1, K = 1, resident | 4 launches, 0.5 MB, 1.2 us | 2 launches, 0.5 MB, 12.0 us |"


def test_page_names_spills_and_says_what_it_is():
    spilled = row("bad")
    spilled["sm_90"] = {**spilled["sm_90"], "spill_bytes": 92}
    described = {"date": "2026-11-25", "commit": "abc", "nvcc": "13.0"}
    text = static.page([row("good"), spilled, row("exact", kind="float64")], [counted()], [], described)
    assert "registers spill in bad." in text and "92 bytes spilled" in text
    assert "not yet timed on a GPU" in text
    assert "`exact`" not in text and "`good`" in text


def test_short_names():
    name = "product<fastmaml::cuda::Gemm<(fastmaml::cuda::Order)0, (fastmaml::cuda::Order)1>, false> >"
    assert static.short(name) == "product<Gemm<along_k, along_rows>, false>>"
    assert static.short("TensorProduct<(fastmaml::cuda::Numbers)2> >") == "TensorProduct<bf16x3>>"
    assert history.lasting("product<Tile<32, 64, 4, 8, 3>, TensorTile<128, 64, 32, 64>>") == (
        "product<Tile<32, 64, 4, 8>, TensorTile<128, 64, 32, 64>>"
    )


def test_missing_disassembler_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"purelib": str(tmp_path)})
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(cubins.Missing, match="no nvdisasm on the PATH, in CUDA_HOME or in an installed triton wheel"):
        cubins.nvdisasm()
    tool = tmp_path / "triton" / "backends" / "nvidia" / "bin" / "nvdisasm"
    tool.parent.mkdir(parents=True)
    tool.touch()
    assert cubins.nvdisasm() == str(tool)
