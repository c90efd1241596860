"""PTX taken apart: operands, blocks, scopes of labels, places in the kernel's source."""

from __future__ import annotations

import pytest

from benchmarks.emulator.ptx import Address, Guard, parse

TEXT = """
.version 8.8
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .f32 kernel_param_1
)
.reqntid 128
{
    .reg .pred %p<2>;
    .reg .b32 %r<3>;
    .reg .b64 %rd<2>;
    .loc 1 7 0 // first.py:7:0
$L__func_begin0:
    ld.param.b64 %rd1, [kernel_param_0];  // a comment; with a semicolon
    .loc 2 9 4, function_name $L__info, inlined_at 1 7 0
    @%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 16 ];
    { .reg .b32 low; mov.b64 {low, %r2}, %rd1; }
    {
    waitLoop: setp.eq.b32 %p1, %r1, 0f3F800000;
    @!%p1 bra.uni waitLoop;
    }
    {
    waitLoop: setp.eq.b32 %p1, %r1, -1;
    @%p1 bra waitLoop;
    }
    @%p1 bra $L__end;
    ret;
$L__end:
    mov.b32 %r1, 0x10;
    ret;
}
.file 1 "/somewhere/first.py"
.file 2 "/somewhere/second.py"
.section .debug_info { .b8 1 }
"""


def test_head_and_registers():
    program = parse(TEXT)
    assert program.name == "kernel"
    assert program.params == {"kernel_param_0": 64, "kernel_param_1": 32}
    assert program.threads == 128
    assert program.registers == {"%p0": 1, "%p1": 1, "%r0": 32, "%r1": 32, "%r2": 32, "%rd0": 64, "%rd1": 64, "low": 32}


def test_operands_and_places():
    first, *_ = [block for block in parse(TEXT).blocks if block.instructions]
    load, pair, split = first.instructions
    assert load.operands == ("%rd1", Address("kernel_param_0", 0))
    assert load.place == "first.py:7"
    assert pair.operands == (("%r1", "%r2"), Address("%rd1", 16))
    assert pair.guard == Guard("%p1", negated=False)
    assert (pair.op, pair.place) == ("ld.global.v2.b32", "second.py:9")
    assert split.operands == (("low", "%r2"), "%rd1")


def test_labels_belong_to_their_scope():
    blocks = parse(TEXT).blocks
    loops = [(i, b) for i, b in enumerate(blocks) if b.instructions and b.instructions[0].op == "setp.eq.b32"]
    assert [(b.target, b.falls) for _, b in loops] == [(i, True) for i, _ in loops]
    assert [b.guard.negated for _, b in loops if b.guard] == [True, False]
    assert [b.instructions[0].operands[2] for _, b in loops] == [0x3F800000, -1]


def test_ends():
    blocks = parse(TEXT).blocks
    to_the_end = next(b for b in blocks if b.target is not None and blocks[b.target].instructions[0].op == "mov.b32")
    assert to_the_end.falls
    after = blocks[blocks.index(to_the_end) + 1]
    assert after.ends
    assert not after.falls
    assert blocks[-1].ends


@pytest.mark.parametrize("text", ["", TEXT.replace("}\n.file", ".file"), TEXT.replace(".reqntid 128", "")])
def test_what_is_no_kernel_is_said(text: str):
    with pytest.raises(ValueError, match=r"no kernel|does not end|how many threads"):
        parse(text)
