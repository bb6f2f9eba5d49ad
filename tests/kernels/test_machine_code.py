"""Loops and pipelines are found in listings as nvdisasm and Triton write them."""

from __future__ import annotations

from lowvram_kernels.machine_code import Loop, Pipeline, inner_loop, matrix_opcodes, pipeline

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R4, [R3] ;
        /*0030*/                   IMMA.16832.S8.S8.SAT R8, R4.ROW, R6.COL, R8 ;
        /*0040*/                   STL [R1], R8 ;
        /*0050*/              @!P0 BRA `(.L_x_3) ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0080*/               @P2 BRA `(.L_x_2) ;
.L_x_4:
        /*0090*/                   BRA `(.L_x_4);
"""


def test_the_inner_loop_is_the_shortest_that_multiplies():
    assert inner_loop(SASS) == Loop(instructions=5, matrix=1, spills=1)
    assert inner_loop(SASS.replace("@P1 BRA", "NOP")) == Loop(instructions=8, matrix=2, spills=1)
    assert inner_loop(SASS.replace("MMA", "ADD")) is None


def test_opcodes_without_saturation():
    assert matrix_opcodes(SASS) == ("HMMA.16816.F32.BF16", "IMMA.16832.S8.S8")
    assert matrix_opcodes("QGMMA.64x256x32.F32.E4M3.E4M3 R24, gdesc[UR8]") == ("QGMMA.64x256x32.F32.E4M3.E4M3",)


def test_pipeline():
    ttgir = """
    %22 = ttg.local_alloc : () -> !ttg.memdesc<4x128x64xi8, #shared, #smem, mutable> loc(#loc42)
    %23 = ttg.local_alloc %q : (tensor<128x64xi8>) -> !ttg.memdesc<128x64xi8, #shared, #smem> loc(#loc42)
    %24 = ttg.local_alloc : () -> !ttg.memdesc<2x64xf32, #shared2, #smem, mutable> loc(#loc42)
    %49 = ttg.async_wait %arg17, %arg20 {num = 4 : i32} loc(#loc42)
    %51:3 = ttng.warp_group_dot_wait %50, %22, %23 {pendings = 1 : i32} : tensor<128x256xi32, #mma>
    %52 = ttg.async_wait {num = 0 : i32} loc(#loc152)
    """
    assert pipeline(ttgir) == Pipeline(waits=(4, 0), buffers=(4,), pendings=(1,))
    assert pipeline("") == Pipeline(waits=(), buffers=(), pendings=())


def test_conversions_and_maxima_of_a_loop_are_told_apart():
    lines = ["I2FP.F32.S32 R1, R1", "F2I.S8 R2, R2", "FMNMX.NAN R1, R2, R3, !PT", "FMNMX3.NAN R1, R2, R3, R4, !PT"]
    lines += ["FMNMX R1, R2, R3, !PT", "IMMA.16832.S8.S8 R4, R8, R12, R4", "FFMA R1, R1, R2, R3", "BRA `(.L_x_1)"]
    sass = ".L_x_1:\n" + "\n".join(f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines))
    found = Loop(instructions=8, matrix=1, spills=0, conversions=2, nan_maxima=2, plain_maxima=1)
    assert inner_loop(sass) == found
