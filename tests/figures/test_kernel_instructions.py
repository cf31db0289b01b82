"""The count of instructions per index."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from docs.figures import kernel_instructions

SASS = """
        /*0000*/   MOV R1, c[0x0][0x28] ;       /* 0x0 */
        /*0010*/   IADD3 R2, R2, 0x1, RZ ;      /* 0x0 */
        /*0020*/   @P0 BRA 0x10 ;               /* 0x0 */
        /*0030*/   IADD3 R3, R3, 0x1, RZ ;      /* 0x0 */
        /*0040*/   @P1 BRA 0x60 ;               /* 0x0 */
        /*0050*/   STG.E.64 [R2.64], R4 ;       /* 0x0 */
        /*0060*/   @!P0 BRA 0x40 ;              /* 0x0 */
        /*0070*/   @P2 BRA 0x30 ;               /* 0x0 */
        /*0080*/   EXIT ;                       /* 0x0 */
        /*0090*/   BRA 0x90;                    /* 0x0 */
        /*00a0*/   NOP;                         /* 0x0 */
"""


def test_of_machine_code_the_innermost_loop_with_a_store_counts():
    assert kernel_instructions._loop_that_stores(SASS) == 3
    # Without any, all but what fills up the end.
    assert kernel_instructions._loop_that_stores(SASS.replace("STG", "LDG")) == 10


@pytest.mark.slow("compiles both kernels")
def test_prints_a_line_for_each_kernel(capsys):
    if not find_spec("triton") or not find_spec("torch"):
        pytest.skip("torch or triton is not installed")
    kernel_instructions.main(["samples as they are"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines
    for line in lines:
        name, kernel, executed, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        assert (name, kernel in kernel_instructions.KERNELS) == ("samples as they are", True)
        assert 10 < float(executed) < 40


def test_a_kind_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        kernel_instructions.main(["plane"])
    assert "no kind of plan: plane" in capsys.readouterr().err
