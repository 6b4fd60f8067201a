"""Quantised weights in registers: words of 16 bits become pairs of bfloat16."""

import triton
import triton.language as tl

# A bfloat16 has 7 bits of mantissa: 0x4300 | c is 128 + c for any c below 128, and small integers
# are exact. Two neighbours share a register, so 8 codes of 4 bits cost 3 shifts, 4 LOP3 and 4
# HFMA2. Plain Triton takes every 16-bit word apart: twice the instructions, more than a
# multiprocessor has time for while it reads such weights at full speed.
# fma.rn.bf16x2 is there from sm_80 on; constants of packed types must lie in registers.
UNPACK_INT4 = tl.constexpr("""{
.reg .b32 word, pair, exponent, one, middle;
mov.b32 exponent, 0x43004300;
mov.b32 one, 0x3F803F80;
mov.b32 middle, 0xC308C308;
lop3.b32 pair, $4, 0x000F000F, exponent, 0xEA;
fma.rn.bf16x2 $0, pair, one, middle;
shr.u32 word, $4, 4;
lop3.b32 pair, word, 0x000F000F, exponent, 0xEA;
fma.rn.bf16x2 $1, pair, one, middle;
shr.u32 word, $4, 8;
lop3.b32 pair, word, 0x000F000F, exponent, 0xEA;
fma.rn.bf16x2 $2, pair, one, middle;
shr.u32 word, $4, 12;
lop3.b32 pair, word, 0x000F000F, exponent, 0xEA;
fma.rn.bf16x2 $3, pair, one, middle;
}""")

# 8 bits do not fit: 128 + (the low 7) - (128 if the high bit is set, else 256) is c - 128.
UNPACK_INT8 = tl.constexpr("""{
.reg .b32 word, low, high, exponent, minus;
mov.b32 exponent, 0x43004300;
mov.b32 minus, 0xBF80BF80;
lop3.b32 low, $2, 0x007F007F, exponent, 0xEA;
lop3.b32 high, $2, 0x00800080, exponent, 0xAE;
fma.rn.bf16x2 $0, high, minus, low;
shr.u32 word, $2, 8;
lop3.b32 low, word, 0x007F007F, exponent, 0xEA;
lop3.b32 high, word, 0x00800080, exponent, 0xAE;
fma.rn.bf16x2 $1, high, minus, low;
}""")


@triton.jit
def unpack(words, BITS: tl.constexpr):
    """The codes in each word, lowest bits first, less their middle (8 or 128), as bfloat16."""
    if BITS == 4:
        return tl.inline_asm_elementwise(
            UNPACK_INT4,
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            UNPACK_INT8,
            "=&r,=&r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
