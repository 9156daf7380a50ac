"""Products of few tokens with weights in bf16, int8 or 4 bits on a GPU, and of experts: operators and Triton kernels.

One H200, torch 2.11, Llama-2-7B shape in bf16, batch 1, tokens/s compiled without `gpu_kernels.py`, `gpu_matvec.py` and
this file and with them: 245 and 297, the ladder of benchmarks/README.md. Decisions to know:

- `linear` is one operator for all kinds of weights. A single token reads them as a matrix-vector product, by the
  kernels of `gpu_matvec.py`. On Hopper 2 to 64 go through a tensor core's product, if x has 16 bits. The copy engine
  (TMA) fetches the weights. Its kernel is in Gluon, Triton's lower layer, where loads can be put before the wait. int8
  weights meet x there as two int8 numbers, 15 bits, so that no weight is converted. 4-bit ones become numbers of x's
  dtype in the registers that are the product's operand: a thread has one of a block's four words, and x is put into the
  order of its numbers.
- Elsewhere up to 6 tokens read 4-bit weights one by one, up to 64 convert int8 ones inside the product. Otherwise
  weights are unpacked, then cuBLAS.
- The router's kernel takes the norm before it.
- Many tokens of experts are sorted by expert and meet 4-bit weights as up to 64 do. A program unpacks the next columns
  while the tensor core multiplies these.
- Kernels start early and wait, and a single token's products tell other ranks their part of a sum: `gpu_kernels.py`.

`quantized_linear.py` and `fast_model.py` have the plain twin of each.

Copy me: needs torch, triton, and `gpu_kernels.py` and `gpu_matvec.py` beside it.

Shapes: T tokens, N output rows, K input columns, G columns in a group.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gpu_kernels import custom_operator, jit_for_any_T, launch_options, wait_for_inputs
from gpu_matvec import (
    activate,
    apply_gate,
    bytes_experts_sum_kernel,
    bytes_matvec_kernel,
    experts_sum_kernel,
    matvec_kernel,
    power_of_two,
    streamed_matvec_kernel,
)

# --- Kernels for a few tokens -----------------------------------------------------------------------------------------


@triton.jit
def _two_int8_kernel(x_ptr, q_ptr, s_ptr, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """A token's x [K] as (q1 + q2 / 254) times a scale, two rows of int8: 15 bits of the largest number."""
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    x = tl.load(x_ptr + token * K + at, mask=at < K, other=0.0).to(tl.float32)
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)  # of integers, because NaN is the largest of these
    scale = tl.maximum(top, 0x0DA24260).to(tl.float32, bitcast=True) / 127  # at least 1e-30
    x /= scale
    high = x + 12582912.0  # the nearest integer stands in the last bits
    low = (x - (high - 12582912.0)) * 254 + 12582912.0
    q_ptr += token * 2 * K + at
    tl.store(q_ptr, high.to(tl.int32, bitcast=True).to(tl.int8), mask=at < K)
    tl.store(q_ptr + K, low.to(tl.int32, bitcast=True).to(tl.int8), mask=at < K)
    tl.store(s_ptr + token, scale)


@triton.jit
def _in_word_order_kernel(x_ptr, order_ptr, y_ptr, K, USED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Some of a token's x [K] in the order in which `_unpack` gives the numbers of words. With the `order` of pairs of
    a token and one of its USED experts, a pair's."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    token = row if order_ptr is None else tl.load(order_ptr + row) // USED
    column = at // 32 * 32 + at // 2 % 4 * 8 + at // 16 % 2 * 2 + at // 8 % 2 + at % 2 * 4
    tl.store(y_ptr + row * K + at, tl.load(x_ptr + token * K + column, mask=at < K, other=0.0), mask=at < K)


def unpack_code(kind: str, dtype: torch.dtype) -> str:
    """PTX that makes the 8 numbers of a word, times a scale and plus a zero point, as number i and number i + 4 of 4
    pairs. Nibbles in the two halves of a register become two numbers of `dtype`, bf16 or float16, by one instruction: q
    stands in the last bits of 128 or 1,024, of which 136 or 1,032 is taken. MXFP4's exponent and mantissa stand at the
    end of the larger exponent, so the number is 2^126 or 2^14 too small. Scales must be numbers of `dtype`.
    """
    half = dtype == torch.float16
    name, bits, offset, factor = ("f16x2", 9, 0x64086408, 0x74007400) if half else ("bf16x2", 6, 0x43084308, 0x7E807E80)
    lines = [".reg .b32 t, u, s, z;", "mov.b32 s, {$9, $9};", "mov.b32 z, {$10, $10};"]
    for i in range(4):
        if kind == "fp4":
            by = bits - 4 * i
            lines += [
                f"sh{'l' if by > 0 else 'r'}.b32 t, $8, {abs(by)};",
                f"and.b32 t, t, {0x00070007 << bits};",
                f"shl.b32 u, $8, {12 - 4 * i};",
                f"lop3.b32 t, u, {0x80008000}, t, 0xEA;",  # (u & mask) | t
                f"mov.b32 u, {factor};",
                f"mul.rn.{name} t, t, u;",
                f"mul.rn.{name} t, t, s;",
            ]
        else:
            lines += [
                f"shr.b32 t, $8, {4 * i};",
                f"lop3.b32 t, t, {0x000F000F}, {offset - 0x00080008}, 0xEA;",  # (t & mask) | 128 or 1,024
                f"mov.b32 u, {offset};",
                f"sub.rn.{name} t, t, u;",
                f"fma.rn.{name} t, t, s, z;",
            ]
        lines += [f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, t;"]
    return "{ " + " ".join(lines) + " }"


@gluon.jit
def _load_scales(s_ptr, z_ptr, rows, inside, group, GROUPS: gl.constexpr, KIND: gl.constexpr):
    """Scales, and zero points if there are any, of some of the GROUPS of rows, as they are on disk."""
    inside = inside & (group < GROUPS)
    scale = gl.load(s_ptr + rows * GROUPS + group, mask=inside, other=0)
    zero = gl.load(z_ptr + rows * GROUPS + group, mask=inside, other=0) if KIND == "floats" else scale
    return scale, zero


@gluon.jit
def _unpack(words, scale, zero, steps, KIND: gl.constexpr, CODE: gl.constexpr, dtype: gl.constexpr):
    """The numbers [M, 32 W] of words [M, W, 4], a block of 4 words of which has a scale and a zero point."""
    if KIND == "bytes":
        step, zero_step = steps
        zero = (zero >> 8).to(gl.float32) * zero_step
        scale = (scale & 255).to(gl.float32) * step
    elif KIND == "fp4":
        scale = power_of_two(scale)
    scale, zero = scale.to(dtype)[:, :, None], zero.to(dtype)[:, :, None]
    n = gl.inline_asm_elementwise(
        CODE, "=h,=h,=h,=h,=h,=h,=h,=h,r,h,h", [words, scale, zero],
        dtype=(scale.dtype,) * 8, is_pure=True, pack=1,
    )  # fmt: skip
    first = gl.join(gl.join(n[0], n[1]), gl.join(n[2], n[3]))
    second = gl.join(gl.join(n[4], n[5]), gl.join(n[6], n[7]))
    return gl.join(first, second).permute((0, 1, 5, 4, 2, 3)).reshape([words.shape[0], 32 * words.shape[1]])


@gluon.jit(do_not_specialize_on_alignment=["T"])
def _few_tokens_kernel(
    w_desc, x_desc, x_scale_ptr, s_ptr, z_ptr, b_ptr, y_ptr, T, N, K,
    GROUPS: gl.constexpr, SHARE: gl.constexpr, KIND: gl.constexpr, CODE: gl.constexpr, STAGES: gl.constexpr,
    ACT: gl.constexpr, CLAMP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Some of N rows of weights [1 or 2, N, K] times all of T tokens, as columns of a tensor core's product; of 2 parts
    the first is gate, the other up. The first tiles of weights are on their way before the wait for x. int8 weights
    take x as `_two_int8_kernel` makes it, 4-bit ones, which are words, as `_in_word_order_kernel` does. Of those CODE
    is `unpack_code`'s, a row has GROUPS scales, and SHARE blocks of 32 columns have the same.
    """
    PARTS: gl.constexpr = w_desc.block_type.shape[0]
    ROWS: gl.constexpr = w_desc.block_type.shape[1]
    COLS: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK: gl.constexpr = x_desc.block_type.shape[1]
    SIZE: gl.constexpr = x_desc.dtype.primitive_bitwidth // 8
    W_BLOCK: gl.constexpr = w_desc.block_type.shape[2]
    BYTES: gl.constexpr = PARTS * ROWS * W_BLOCK * w_desc.dtype.primitive_bitwidth // 8 + COLS * BLOCK * SIZE
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLS, 32 // SIZE])
    w = gl.allocate_shared_memory(w_desc.dtype, [STAGES, PARTS, ROWS, W_BLOCK], w_desc.layout)
    x = gl.allocate_shared_memory(x_desc.dtype, [STAGES, COLS, BLOCK], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    row = gl.program_id(0) * ROWS
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(i), count=1)
        hopper.mbarrier.expect(full.index(i), BYTES)
        hopper.tma.async_copy_global_to_shared(w_desc, [0, row, i * W_BLOCK], full.index(i), w.index(i))
    if KIND is not None:  # a thread has one of a block's four words, as a product's operand asks
        words: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1, 0], [0, 2, 0], [0, 4, 0], [8, 0, 0]] + ([[64, 0, 0]] if PARTS == 2 else []),
            [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
            [[16, 0, 0], [32, 0, 0]],
            [],
            [PARTS * ROWS, BLOCK // 32, 4],
        )
        by_block: gl.constexpr = gl.SliceLayout(2, words)
        at = gl.arange(0, PARTS * ROWS, gl.SliceLayout(1, by_block))[:, None]
        inside, at = row + at % ROWS < N, at // ROWS * N + row + at % ROWS
        block = gl.arange(0, BLOCK // 32, gl.SliceLayout(0, by_block))[None, :]
        steps_of_row = (0.0, 0.0)
        if KIND == "bytes":
            step_of_row = gl.load(z_ptr + 2 * at, mask=inside, other=0.0)
            steps_of_row = (step_of_row, gl.load(z_ptr + 2 * at + 1, mask=inside, other=0.0) * step_of_row)
        scale, zero = _load_scales(s_ptr, z_ptr, at, inside, block // SHARE, GROUPS, KIND)
    wait_for_inputs(PDL)
    for i in gl.static_range(STAGES):
        hopper.tma.async_copy_global_to_shared(x_desc, [0, i * BLOCK], full.index(i), x.index(i))
    y = gl.zeros([PARTS * ROWS, COLS], gl.int32 if SIZE == 1 else gl.float32, mma)
    steps = gl.cdiv(K, BLOCK)  # beyond K all are zeros
    for step in range(steps):
        slot = step % STAGES
        hopper.mbarrier.wait(full.index(slot), step // STAGES & 1)
        rows = w.index(slot).reshape([PARTS * ROWS, W_BLOCK])
        if KIND is not None:
            next_block = (step + 1) * (BLOCK // 32) + block
            next_scale, next_zero = _load_scales(s_ptr, z_ptr, at, inside, next_block // SHARE, GROUPS, KIND)
            rows = rows.reshape([PARTS * ROWS, BLOCK // 32, 4]).load(words)
            rows = _unpack(rows, scale, zero, steps_of_row, KIND, CODE, x_desc.dtype)
            rows = gl.convert_layout(rows, gl.DotOperandLayout(0, mma, 2))
            scale, zero = next_scale, next_zero
        y = hopper.warpgroup_mma(rows, x.index(slot).permute((1, 0)), y)
        more, later = step + STAGES < steps, step + STAGES
        hopper.mbarrier.expect(full.index(slot), BYTES, more)
        hopper.tma.async_copy_global_to_shared(w_desc, [0, row, later * W_BLOCK], full.index(slot), w.index(slot), more)
        hopper.tma.async_copy_global_to_shared(x_desc, [0, later * BLOCK], full.index(slot), x.index(slot), more)
    if SIZE == 1:
        high, low = y.reshape([PARTS * ROWS, COLS // 2, 2]).split()
        y = high.to(gl.float32) + low.to(gl.float32) / 254
    at = gl.arange(0, PARTS * ROWS, gl.SliceLayout(1, y.type.layout))
    token = gl.arange(0, y.shape[1], gl.SliceLayout(0, y.type.layout))
    at, inside = at // ROWS * N + row + at % ROWS, row + at % ROWS < N
    if SIZE == 1:
        y *= gl.load(s_ptr + at, mask=inside, other=0.0).to(gl.float32)[:, None]
        y *= gl.load(x_scale_ptr + token, mask=token < T, other=0.0)[None, :]
    if b_ptr is not None:
        y += gl.load(b_ptr + at, mask=inside, other=0.0).to(gl.float32)[:, None]
    if PARTS == 2:
        gate, up = y.reshape([2, ROWS, y.shape[1]]).permute((1, 2, 0)).split()
        y = apply_gate(gate, up, ACT, CLAMP, y_ptr.dtype.element_ty)
    elif ACT is not None:
        y = activate(y, ACT, y_ptr.dtype.element_ty)
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, y.type.layout))[:, None]
    token = gl.arange(0, y.shape[1], gl.SliceLayout(0, y.type.layout))[None, :]
    gl.store(y_ptr + token * N + rows, y.to(y_ptr.dtype.element_ty), mask=(token < T) & (rows < N))


@jit_for_any_T
def _int8_matmul_kernel(x_ptr, w_ptr, s_ptr, y_ptr, T, N, K, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BT + tl.arange(0, BT)
    in_rows, in_tokens = (rows < N)[:, None], (tokens < T)[None, :]
    total = tl.zeros([BN, BT], tl.float32)
    for first in range(0, K, BK):
        at = first + tl.arange(0, BK)
        x = tl.load(x_ptr + tokens[None, :] * K + at[:, None], mask=in_tokens & (at < K)[:, None], other=0.0)
        w = tl.load(w_ptr + rows[:, None].to(tl.int64) * K + at, mask=in_rows & (at < K), other=0)
        total = tl.dot(w.to(x.dtype), x, total, input_precision="ieee")
    y = total * tl.load(s_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + tokens[None, :] * N + rows[:, None], y.to(y_ptr.dtype.element_ty), mask=in_rows & in_tokens)


# --- Formats of weights -----------------------------------------------------------------------------------------------


@triton.jit
def _int8_dequantize_kernel(w_ptr, s_ptr, out_ptr, total, K, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + at, mask=at < total, other=0).to(tl.float32)
    scale = tl.load(s_ptr + at // K, mask=at < total, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (w * scale).to(out_ptr.dtype.element_ty), mask=at < total)


@triton.jit
def _fp4(nibble):
    """MXFP4's number 2^126 too small: exponent and mantissa stand at the end of float32's exponent, so that 0.5, which
    has neither, is the denormal number that it is here too."""
    return ((nibble & 7) << 22 | (nibble & 8) << 28).to(tl.float32, bitcast=True)


@triton.jit
def _int4_dequantize_kernel(w_ptr, s_ptr, z_ptr, out_ptr, total, G: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    q = (tl.load(w_ptr + at // 8, mask=at < total, other=0) >> (at % 8 * 4).to(tl.int32)) & 15
    scale = tl.load(s_ptr + at // G, mask=at < total, other=0)
    if z_ptr is None:  # MXFP4
        y = _fp4(q) * 8.507059173023462e37 * power_of_two(scale)  # 2^126 first
    else:
        zero = tl.load(z_ptr + at // G, mask=at < total, other=0.0).to(tl.float32)
        y = (q.to(tl.float32) - 8) * scale.to(tl.float32) + zero
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=at < total)


def in_bytes(scales: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int16 [N, K/G], float32 [N, 2]) of int4's scales and zeros [N, K/G], if these are such numbers as
    `quantized_linear.Int4Linear.quantize` makes, which bytes hold; else themselves.

    A scale is the low byte, a zero point the high one. What a row's bytes count by is first the step of its scales,
    then how many of those a step of its zeros is. Rows of more than 64 begin at multiples of 16 bytes.
    """
    steps = [torch.ldexp(torch.ones(len(t), 1, device=t.device), t.float().abs().amax(1, True).frexp()[1] - bits)
             for t, bits in ((scales, 8), (zeros, 7))]  # fmt: skip
    scale, zero = (t.float() / step for t, step in zip((scales, zeros), steps, strict=True))
    if not ((scale == scale.round()) & (zero == zero.round()) & (scale >= 0)).all():
        return scales, zeros
    both, groups = (zero.int() << 8 | scale.int()).to(torch.int16), scales.shape[1]
    if groups > 64:  # the copy engine fetches rows that are whole 16 bytes apart
        both = F.pad(both, (0, -groups % 8))[:, :groups]
    return both, torch.cat([steps[0], steps[1] / steps[0]], dim=1)


def from_bytes(both: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros in float32 of what `in_bytes` gave; of other scales and zeros, themselves."""
    if both.dtype != torch.int16:
        return both, steps
    return (both & 255) * steps[:, :1], (both >> 8) * (steps[:, 1:] * steps[:, :1])


def columns(weight: torch.Tensor) -> int:
    """K of a weight as for `linear`; a byte of packed ones is two numbers."""
    return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)


@custom_operator(lambda weight, scales, zeros, dtype: weight.new_empty(weight.shape[0], columns(weight), dtype=dtype))
def dequantize(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Weights [N, K] in one pass over packed ones."""
    N, K = weight.shape[0], columns(weight)
    out = torch.empty(N, K, dtype=dtype, device=weight.device)
    grid = (triton.cdiv(out.numel(), 4096),)
    if weight.dtype == torch.int8:
        _int8_dequantize_kernel[grid](weight, scales, out, out.numel(), K, BLOCK=4096)
    else:
        words, group = weight.view(torch.int32), K // scales.shape[1]
        scales, zeros = from_bytes(scales, zeros)
        _int4_dequantize_kernel[grid](words, scales, zeros, out, out.numel(), G=group, BLOCK=4096)
    return out


# --- Which kernel multiplies, and how it starts -----------------------------------------------------------------------


def takes_bytes(weight: torch.Tensor) -> bool:
    """Whether a weight is for the kernels that multiply bytes: whole blocks of 32 columns."""
    return weight.dtype == torch.uint8 or weight.dtype == torch.int8 and weight.shape[1] % 32 == 0


def kind_of(scales: torch.Tensor) -> str:
    """KIND of packed weights with such scales, as `gpu_matvec.py` explains it."""
    return {torch.uint8: "fp4", torch.int16: "bytes"}.get(scales.dtype, "floats")


def groups_of(weight, scales) -> tuple[int, int]:
    """GROUPS and SHARE of 4-bit weights with such scales, as `gpu_matvec.py` explains them."""
    return scales.stride(0), columns(weight) // scales.shape[1] // 32


def bytes_options(N: int, weight, scales, rows: int, apart: int, blocks: int = 128) -> dict:
    """Constants of the kernels that multiply bytes, `rows` at a time, which are `apart` outputs, in tiles of up to
    `blocks`. Of a row of up to 4,096 columns all tiles are fetched first.
    """
    K, groups, share, kind = columns(weight), 0, 1, "int8"
    if weight.dtype == torch.uint8:
        (groups, share), kind = groups_of(weight, scales), kind_of(scales)
    blocks = min(blocks, triton.next_power_of_2(K // 32))
    tiles = triton.cdiv(K, 32 * blocks) if K <= 4096 else 1
    more = {"EVEN": N % apart == 0, "KIND": kind}
    return {"K": K, "GROUPS": groups, "SHARE": share, "ROWS": rows, "BLOCKS": blocks, "TILES": tiles, **more}


def row_tile(K: int) -> tuple[int, int]:
    """Columns and warps of a tile of a row of floats, as they were fastest on an H100 of K = 2,048 to 11,008."""
    if 1024 < K <= 4096:
        return (4096, 8) if K == 4096 else (2048, 4)
    return (2048, 8) if K % 2048 == 0 else (1024, 4)


def takes_streamed(x, weight, scales, N: int, tells: bool = False) -> bool:
    """Whether `launch_streamed` takes a weight with N outputs, which it `tells` other ranks, for x [1, K] of 16 bits.

    It needs Hopper, and rows whose x leaves room for two tiles. Rows of 16 bits have whole 16 bytes, and gained
    nothing if they had more than 14,336 columns. 4 bits need a scale for each block, rows of them that begin at
    multiples of 16 bytes, and rows in pairs. Packed weights were slower so if their columns, or rows that are not
    gated, are 2,048 to 4,096, but no multiple of 128, as the 2,880 of gpt-oss. Its output product in 16 bits, told to
    other ranks, was slower so too.
    """
    K = columns(weight)
    of_int4 = (
        weight.dtype == torch.uint8
        and kind_of(scales) == "bytes"
        and K == 32 * scales.shape[1]
        and scales.stride(0) % 8 == 0
        and N % 2 == 0
    )
    of_int8 = weight.dtype == torch.int8 and K % 32 == 0
    gated = N < len(weight)
    slower = any(2048 < n < 4096 and n % 128 for n in ((K,) if gated else (N, K)))
    packed = (of_int8 or of_int4) and not slower
    # 2,048 gained nothing on one GPU in int4: its x is dear, and the other kernel's tiles fit.
    least = (2048 if tells else 2304) if of_int4 else 512
    most = 30720 if packed and not gated else 14336  # gate and up have 16 rows a tile
    return (
        torch.cuda.get_device_capability(x.device)[0] == 9
        and len(x) == 1
        and x.dtype in (torch.bfloat16, torch.float16)
        and N >= (4096 if tells else least)
        and least <= K <= most
        and (packed or weight.dtype == x.dtype and K % 8 == 0)
    )


def takes_norm(x, gated: bool, ranks: int, weight, scales=None, *others) -> bool:
    """Whether `norm_linear` takes such x [1, K], a part of a sum of so many ranks, and weights, `gated` as they are."""
    K, N = columns(weight), len(weight) // (2 if gated else 1)
    streamed = takes_streamed(x, weight, scales, N) and K <= 8192
    if ranks > 1:  # every program reads what all ranks told: small products, and those of 4 bits, lost by that
        return streamed and len(weight) >= 4096 and weight.dtype != torch.uint8
    return streamed or takes_bytes(weight) and K <= 4096


def describe(tensor: torch.Tensor, block: list[int], swizzle: int = 128) -> TensorDescriptor:
    """What the copy engine needs to bring blocks of a tensor to shared memory, swizzled in lines of so many bytes."""
    layout = gl.NVMMASharedLayout(swizzle, 8 * tensor.element_size(), len(block))
    return TensorDescriptor.from_tensor(tensor, block, layout)


def launch_streamed(x, weights, y, act: tuple, norm: tuple, to: tuple) -> None:
    """As `launch_matvec`, for what `takes_streamed` allows. Two programs share a multiprocessor and its memory."""
    (weight, scales, zeros, bias), (activation, gated, clamp), (peers, rank) = weights, act, to
    N, K, parts = y.shape[1], x.shape[1], 2 if gated else 1
    plain, of_int4 = weight.dtype == x.dtype, weight.dtype == torch.uint8
    kind, wide = ("plain", 1024) if plain else ("bytes", 4096) if of_int4 else ("int8", 2048)
    # 8 rows of a small matrix, so that more programs share it. For 4 bits more programs cost more, as each makes x.
    # Beside x of long rows there is no room for two tiles of 16.
    of_all = 8 if K > 14336 or N < 4096 and not gated and not of_int4 else 16
    rows, stage = of_all // parts, of_all * (2048 + 256 + 8 if of_int4 else 2048)
    words = weight if plain else weight.view(torch.int32)
    w_desc = describe(words.view(parts, N, -1), [parts, rows, 1024 if plain else 512])
    scales_desc, steps_desc = None, None
    if of_int4:
        scales_desc = describe(scales.view(parts, N, -1), [parts, rows, 128])
        # Two rows are in 16 bytes. 8 rows bring the steps of 16, because a copy begins at a multiple of 128 bytes.
        steps_desc = describe(zeros.float().view(parts, N // 2, 4), [parts, 8 // parts, 4], 0)
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    groups = triton.cdiv(N, rows)
    programs = min(groups, 2 * multiprocessors)
    room = 110_000 - triton.cdiv(K, 2048) * 4864  # x takes no more for 2,048 columns
    stages = min(room // stage, triton.cdiv(groups, programs) * triton.cdiv(K, wide))
    streamed_matvec_kernel[(programs,)](
        w_desc, scales_desc, steps_desc, scales, bias, x, y, N, *norm, peers,
        RANK=rank, RANKS=1 if peers is None else len(peers), K=K, COLUMNS=wide, KIND=kind, STAGES=stages,
        ACT=activation, CLAMP=clamp, num_warps=8, maxnreg=128, **launch_options(x.device),
    )  # fmt: skip


def launch_matvec(x, weights, y, act: tuple, logits=None, used=1, to=(None, 0), norm=(None,) * 4) -> None:
    """Fill y [T, N] for x [T, K], or, with `logits` [T/used, E], for x [T/used, K].

    `weights` are the weight, scales, zeros and bias of `linear`, `act` its activation, gated and clamp, `to` its peers
    and rank, `norm` what `norm_linear` adds x to, the norm's weight, where the sum goes, and eps. With a norm the peers
    told x. Without `logits`, T above 1 is for packed weights.
    """
    (T, N), K = y.shape, x.shape[1]
    weight, scales, zeros, bias = weights
    (activation, gated, clamp), (peers, rank) = act, to
    tells = peers is not None and norm[0] is None
    if logits is None and takes_streamed(x, weight, scales, N, tells):
        launch_streamed(x, weights, y, act, norm, to)
        return
    assert tells or peers is None, "the other kernels hear nobody"
    options = {"E": 0 if logits is None else logits.shape[1], "USED": used, **launch_options(x.device)}
    options |= {"GATED": gated, "ACT": activation, "CLAMP": clamp}
    options |= {"RANK": rank, "RANKS": 1 if peers is None else len(peers)}
    if not takes_bytes(weight):
        assert norm[0] is None, "this kernel takes no norm"
        block, warps = row_tile(K) if logits is None else (1024, 4)
        matvec_kernel[(N * T,)](
            x, weight, scales, bias, y, logits, peers, T, N,
            K=K, BLOCK=block, num_warps=warps, **options,
        )  # fmt: skip
        return
    # Rows, warps and programs of a multiprocessor, chosen on an H100, for experts on an H200: benchmarks/log.md.
    if weight.dtype == torch.int8:
        rows, warps, several = (8, 8, 3) if K <= 4096 else (8, 4, 4)
    else:
        rows, warps, several = (16, 8, 2) if logits is None else (8, 4, 4 if K <= 3072 else 3)
    apart, pairs = rows // 2 if gated else rows, 1 if logits is None else T
    resident = several * torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = min(triton.cdiv(N, apart), triton.cdiv(resident, pairs))
    small = weight.dtype == torch.uint8 and logits is not None and K <= 4096  # so that a row belongs to one warp
    options |= bytes_options(N, weight, scales, rows, apart, 32 if small else 128)
    arguments = (x, weight.view(torch.int32), scales, zeros, bias, y, logits, peers, T, N, *norm)
    # Two programs of 4 bits fit so, although scales of the next rows are fetched ahead.
    registers = 128 if weight.dtype == torch.uint8 and logits is None and K <= 4096 else None
    bytes_matvec_kernel[(programs * pairs,)](*arguments, num_warps=warps, maxnreg=registers, **options)


def takes_few_tokens(x, weight: torch.Tensor) -> bool:
    """Whether `linear` takes 2 to 64 tokens of such x by `_few_tokens_kernel`: Hopper, rows of whole 16 bytes."""
    return (
        torch.cuda.get_device_capability(x.device)[0] == 9
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype in (x.dtype, torch.int8, torch.uint8)
        and weight.shape[1] * weight.element_size() % 16 == 0
    )


def launch_few_tokens(x, weights, y, act: tuple) -> None:
    """As `launch_matvec`, for T up to 64 and weights that `takes_few_tokens`."""
    (T, N), K = y.shape, x.shape[1]
    (weight, scales, zeros, bias), (activation, gated, clamp) = weights, act
    options, x_scales, kind, code, groups, share = launch_options(x.device), None, None, "", 0, 1
    cols = 64 if T > 16 else 16 if T > 8 or scales is None else 8  # 16-bit weights gained nothing by 8
    if weight.dtype == torch.uint8:
        kind, (groups, share) = kind_of(scales), groups_of(weight, scales)
        ordered, code = torch.empty_like(x), unpack_code(kind, x.dtype)
        _in_word_order_kernel[(T, triton.cdiv(K, 1024))](x, None, ordered, K, USED=1, BLOCK=1024, **options)
        x, weight = ordered, weight.view(torch.int32)
    elif scales is not None:
        q, x_scales = x.new_empty(T * 2, K, dtype=torch.int8), x.new_empty(T, dtype=torch.float32)
        _two_int8_kernel[(T,)](x, q, x_scales, K=K, BLOCK=triton.next_power_of_2(K), num_warps=8, **options)
        x, cols = q, 2 * cols
    parts, block = 2 if gated else 1, 256 if kind else 256 // x.element_size()
    w_block, x_block = [parts, 64, block // 8 if kind else block], [cols, block]
    # A program takes most of a multiprocessor's shared memory; of quantized weights and up to 16 tokens half of it, if
    # there are more programs than multiprocessors. benchmarks/log.md has what other shares gave.
    programs, most = triton.cdiv(N, 64), 6 if scales is None else 16 if kind else 8
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    room = 110_000 if scales is not None and T <= 16 and programs > multiprocessors else 200_000
    stage = 64 * parts * (128 if kind else 256) + cols * block * x.element_size()
    _few_tokens_kernel[(programs,)](
        describe(weight.view(parts, N, -1), w_block), describe(x, x_block), x_scales, scales, zeros, bias, y, T, N, K,
        GROUPS=groups, SHARE=share, KIND=kind, CODE=code,
        STAGES=min(most, triton.cdiv(K, block), room // stage), ACT=activation, CLAMP=clamp, num_warps=4, **options,
    )  # fmt: skip


@custom_operator(
    lambda x, weight, scales=None, zeros=None, bias=None, activation=None, gated=False, *others: x.new_empty(
        x.shape[0], weight.shape[0] // (2 if gated else 1)
    )
)
def linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None = None, zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, activation: str | None = None, gated: bool = False, clamp: float | None = None,
    peers: torch.Tensor | None = None, rank: int = 0,
) -> torch.Tensor:  # fmt: skip
    """y [T, N] for x [T, K]; weight [N, K], or int8 and scales [N], or packed as in `Int4Linear`, uint8 [N, K/2], with
    scales and zeros [N, K/G] or what `in_bytes` makes of them; or packed MXFP4, and scales [N, K/32] in uint8. Each
    begins at a multiple of 16 bytes, as PyTorch allocates it.

    For T = 1, and where `takes_few_tokens`, there may be an `activation` (of `fast_model.ACTIVATIONS`) of the result
    with its bias [N], and if it is `gated`, y [T, N/2] is activation(first half) * second half, with a clamp as
    `GPTConfig.gate_clamp` says. With `peers`, addresses of inboxes of `told_words`, y is told to all ranks for the
    `add_norm` or `norm_linear` that comes next. It has T = 1 then and is not gated.
    """
    x = x.contiguous()
    (T, K), N = x.shape, weight.shape[0]
    few = 1 < T <= 64 and takes_few_tokens(x, weight)
    packed = weight.dtype == torch.uint8
    if scales is not None and T > (6 if packed and not few else 64):
        weight, scales = dequantize(weight, scales, zeros, x.dtype), None
    assert T == 1 or few or activation is None
    assert peers is None or (T == 1 and not gated)
    if T > 1 and scales is None and not few:
        return F.linear(x, weight, bias)
    y = torch.empty(T, N // 2 if gated else N, dtype=x.dtype, device=x.device)
    if T > 1 and not few and not packed:
        BT, BN, BK = (16, 32, 256) if T <= 16 else (64, 64, 128 if x.element_size() == 2 else 64)
        grid = (triton.cdiv(N, BN), triton.cdiv(T, BT))
        _int8_matmul_kernel[grid](x, weight, scales, y, T, N, K, BT=BT, BN=BN, BK=BK, num_warps=4, num_stages=3)
        return y if bias is None else y + bias
    if few:
        launch_few_tokens(x, (weight, scales, zeros, bias), y, (activation, gated, clamp))
    else:
        launch_matvec(x, (weight, scales, zeros, bias), y, (activation, gated, clamp), to=(peers, rank))
    return y


@custom_operator(
    lambda x, residual, norm, eps, weight, scales=None, zeros=None, bias=None, activation=None, gated=False, *others: (
        residual.new_empty(residual.shape),
        x.new_empty(1, weight.shape[0] // (2 if gated else 1)),
    )
)
def norm_linear(
    x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor,
    scales: torch.Tensor | None = None, zeros: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    activation: str | None = None, gated: bool = False, clamp: float | None = None,
    peers: torch.Tensor | None = None, rank: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """residual + x [1, K], and y as of `linear` for the RMS norm of that, by weights `norm` [K].

    Each program of the product takes the norm by itself. On an H100 a step of Llama-2-7B in int8 takes 2.73 ms so, with
    a kernel before it 2.84; gpt-oss-20b, whose qkv alone is such a product, gained nothing (benchmarks/log.md). The
    weight is one that `takes_norm` allows. With `peers`, x is this rank's part of a sum, which `linear` has told all
    ranks by the same inboxes.
    """
    x, residual, N = x.contiguous(), residual.contiguous(), weight.shape[0]
    total, y = torch.empty_like(residual), x.new_empty(1, N // 2 if gated else N)
    act, norm = (activation, gated, clamp), (residual, norm, total, eps)
    launch_matvec(x, (weight, scales, zeros, bias), y, act, norm=norm, to=(peers, rank))
    return total, y


# --- Experts of a few tokens ------------------------------------------------------------------------------------------


@triton.jit
def _norm_router_kernel(
    x_ptr, residual_ptr, norm_ptr, w_ptr, b_ptr, total_ptr, normed_ptr, y_ptr, eps,
    K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program takes the norm of residual + x, and one expert's logit. The first one stores sum and norm."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    inside = at < K
    w = tl.load(w_ptr + row * K + at, mask=inside, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + at, mask=inside, other=0.0).to(tl.float32)
    bias = 0.0
    if b_ptr is not None:
        bias = tl.load(b_ptr + row).to(tl.float32)
    wait_for_inputs(PDL)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32) + x
    total = total.to(total_ptr.dtype.element_ty)
    x = total.to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / K + eps) * norm).to(normed_ptr.dtype.element_ty)
    y = tl.sum(normed.to(tl.float32) * w, 0) + bias
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty))
    if row == 0:
        tl.store(total_ptr + at, total, mask=inside)
        tl.store(normed_ptr + at, normed, mask=inside)


def takes_router(weight: torch.Tensor) -> bool:
    """Whether `norm_router` takes such a weight: each of its programs holds a row."""
    return weight.is_floating_point() and weight.shape[1] <= 4096


@custom_operator(
    lambda x, residual, norm, eps, weight, bias=None: (
        residual.new_empty(residual.shape),
        residual.new_empty(residual.shape),
        x.new_empty(1, weight.shape[0]),
    )
)
def norm_router(
    x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """residual + x [1, K], the RMS norm of that by weights `norm` [K], and the logits [1, E] of E experts from it.

    The router's weight [E, K] is one that `takes_router` allows.
    """
    x, residual, (E, K) = x.contiguous(), residual.contiguous(), weight.shape
    total, normed, y = torch.empty_like(residual), torch.empty_like(residual), x.new_empty(1, E)
    _norm_router_kernel[(E,)](
        x, residual, norm, weight, bias, total, normed, y, eps,
        K=K, BLOCK=triton.next_power_of_2(K), num_warps=8, **launch_options(x.device),
    )  # fmt: skip
    return total, normed, y


@custom_operator(
    lambda x, logits, used, activation, clamp, weight, *others: x.new_empty(
        len(x) * used, weight.shape[0] // logits.shape[1] // 2
    )
)
def gated_experts(
    x: torch.Tensor, logits: torch.Tensor, used: int, activation: str, clamp: float | None, weight: torch.Tensor,
    scales: torch.Tensor | None = None, zeros: torch.Tensor | None = None, bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """activation(gate) * up [T used, F] of x [T, K] by each of the `used` experts of the largest logits [T, E].

    So many experts' matrices, F rows of gate and F of up, stand one under the other in a weight as for `linear`, and
    so do their biases.
    """
    x, logits = x.contiguous(), logits.contiguous()
    y = x.new_empty(len(x) * used, weight.shape[0] // logits.shape[1] // 2)
    launch_matvec(x, (weight, scales, zeros, bias), y, (activation, True, clamp), logits, used)
    return y


@custom_operator(
    lambda x, logits, used, norm, weight, *others: x.new_empty(len(logits), weight.shape[0] // logits.shape[1])
)
def sum_experts(
    x: torch.Tensor, logits: torch.Tensor, used: int, norm: bool, weight: torch.Tensor,
    scales: torch.Tensor | None = None, zeros: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    peers: torch.Tensor | None = None, rank: int = 0,
) -> torch.Tensor:  # fmt: skip
    """y [T, N], the products of x [T used, K] with the matrices of the `used` experts of the largest logits [T, E],
    summed by their softmax, with `norm` by that of these alone. With `peers`, y is told as by `linear`.

    The logits are those of the `gated_experts` before it: on Hopper this kernel reads them before that one has ended.
    """
    x, logits, (T, E) = x.contiguous(), logits.contiguous(), logits.shape
    K, N = x.shape[1], weight.shape[0] // E
    y = x.new_empty(T, N)
    assert T == 1 or peers is None
    options = {"E": E, "USED": used, "NORM": norm, **launch_options(x.device)}
    options |= {"RANK": rank, "RANKS": 1 if peers is None else len(peers)}
    if not takes_bytes(weight):
        arguments = (x, weight, scales, bias, y, logits, peers, T, N)
        experts_sum_kernel[(N * T,)](*arguments, K=K, BLOCK=1024, **options)
    else:
        rows, blocks, warps, registers = 4, 128, 4, None
        if weight.dtype == torch.uint8:  # so that 12 or 16 warps fit on a multiprocessor
            rows, blocks, warps, registers = (8, 32, 4, 168) if K <= 4096 else (16, 64, 8, 128)
        options |= bytes_options(N, weight, scales, rows, rows, blocks)
        arguments = (x, weight.view(torch.int32), scales, zeros, bias, y, logits, peers, T, N)
        grid = (triton.cdiv(N, rows) * T,)
        bytes_experts_sum_kernel[grid](*arguments, num_warps=warps, maxnreg=registers, **options)
    return y


# --- Experts of many tokens -------------------------------------------------------------------------------------------


@triton.jit
def _tiles_of_experts_kernel(ends_ptr, tiles_ptr, E: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr):
    """A tile of up to COLS pairs of a token and one of E experts, sorted, an expert's up to its end in `ends` [E]: the
    tile's expert, first pair and end, int32 [tiles, 3]. Behind the last tile the expert is -1."""
    tile, expert = tl.program_id(0), tl.arange(0, triton.next_power_of_2(E))
    wait_for_inputs(PDL)
    end = tl.load(ends_ptr + expert, mask=expert < E, other=0).to(tl.int32)
    start = tl.load(ends_ptr + expert - 1, mask=(expert > 0) & (expert < E), other=0).to(tl.int32)
    tiles = tl.cdiv(end - start, COLS)
    place = tile - (tl.cumsum(tiles, 0) - tiles)  # among the expert's tiles
    its = (place >= 0) & (place < tiles)
    first = tl.sum(tl.where(its, start + place * COLS, 0), 0)
    tl.store(tiles_ptr + 3 * tile, tl.max(tl.where(its, expert, -1), 0))
    tl.store(tiles_ptr + 3 * tile + 1, first)
    tl.store(tiles_ptr + 3 * tile + 2, tl.minimum(first + COLS, tl.sum(tl.where(its, end, 0), 0)))


@gluon.jit
def _sorted_tokens_kernel(
    w_desc, x_desc, tiles_ptr, s_ptr, z_ptr, b_ptr, order_ptr, share_ptr, y_ptr, N,
    GROUPS: gl.constexpr, SHARE: gl.constexpr, KIND: gl.constexpr, CODE: gl.constexpr, CHUNK: gl.constexpr,
    STAGES: gl.constexpr, ACT: gl.constexpr, CLAMP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Some of N rows of an expert's weights, of all experts' [1 or 2 E, N, K/8] in words, times a tile of its pairs,
    which are columns of a tensor core's product. What is multiplied beyond them belongs to others and is not stored.

    Of 2 parts the first is gate, the other up, and the result comes in the order in which `_unpack` gives the numbers
    of words. Of 1 a pair's row has its share, and comes back to its place in the `order`. While the tensor core
    multiplies CHUNK columns of weights, those that come next are unpacked. What is not said here is as for
    `_few_tokens_kernel`.
    """
    PARTS: gl.constexpr = w_desc.block_type.shape[0]
    ROWS: gl.constexpr = w_desc.block_type.shape[1]
    COLS: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK: gl.constexpr = x_desc.block_type.shape[1]
    BYTES: gl.constexpr = PARTS * ROWS * BLOCK // 2 + COLS * BLOCK * 2
    STEPS: gl.constexpr = (GROUPS * SHARE * 32 + BLOCK - 1) // BLOCK  # a constant, so that ptxas sees that it is not 0
    gl.static_assert(BLOCK >= 2 * CHUNK, "a chunk's registers would be written again while they are multiplied")
    gl.static_assert(PARTS * ROWS == 128 and gl.num_warps() == 4)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    words: gl.constexpr = gl.DistributedLinearLayout(
        ([[0, 1, 0]] if CHUNK > 32 else []) + [[8, 0, 0], [64, 0, 0]],
        [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [128, CHUNK // 32, 4],
    )
    by_block: gl.constexpr = gl.SliceLayout(2, words)
    wait_for_inputs(PDL)
    tile, row = gl.program_id(0) // gl.cdiv(N, ROWS), gl.program_id(0) % gl.cdiv(N, ROWS) * ROWS
    expert = gl.load(tiles_ptr + 3 * tile)
    if expert < 0:
        return
    first, end = gl.load(tiles_ptr + 3 * tile + 1), gl.load(tiles_ptr + 3 * tile + 2)
    part = expert * PARTS
    w = gl.allocate_shared_memory(w_desc.dtype, [STAGES, PARTS, ROWS, BLOCK // 8], w_desc.layout)
    x = gl.allocate_shared_memory(x_desc.dtype, [STAGES, COLS, BLOCK], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(i), count=1)
        hopper.mbarrier.expect(full.index(i), BYTES)
        hopper.tma.async_copy_global_to_shared(w_desc, [part, row, i * BLOCK // 8], full.index(i), w.index(i))
        hopper.tma.async_copy_global_to_shared(x_desc, [first, i * BLOCK], full.index(i), x.index(i))
    at = gl.arange(0, 128, gl.SliceLayout(1, by_block))[:, None]
    inside, at = row + at % ROWS < N, (part + at // ROWS) * N + row + at % ROWS
    block = gl.arange(0, CHUNK // 32, gl.SliceLayout(0, by_block))[None, :]
    steps_of_row = (0.0, 0.0)
    if KIND == "bytes":
        step_of_row = gl.load(z_ptr + 2 * at, mask=inside, other=0.0)
        steps_of_row = (step_of_row, gl.load(z_ptr + 2 * at + 1, mask=inside, other=0.0) * step_of_row)
    scale, zero = _load_scales(s_ptr, z_ptr, at, inside, block // SHARE, GROUPS, KIND)
    y = gl.zeros([128, COLS], gl.float32, mma)
    for step in range(STEPS):
        slot = step % STAGES
        hopper.mbarrier.wait(full.index(slot), step // STAGES & 1)
        for i in gl.static_range(BLOCK // CHUNK):
            block += CHUNK // 32
            next_scale, next_zero = _load_scales(s_ptr, z_ptr, at, inside, block // SHARE, GROUPS, KIND)
            rows = w.index(slot).reshape([128, BLOCK // 8]).reshape([128, BLOCK // 32, 4])
            rows = rows.slice(i * CHUNK // 32, CHUNK // 32, dim=1).load(words)
            rows = _unpack(rows, scale, zero, steps_of_row, KIND, CODE, x_desc.dtype)
            rows = gl.convert_layout(rows, gl.DotOperandLayout(0, mma, 2))
            columns = x.index(slot).slice(i * CHUNK, CHUNK, dim=1).permute((1, 0))
            y = hopper.warpgroup_mma(rows, columns, y, is_async=True)
            y = hopper.warpgroup_mma_wait(1, deps=[y])  # for the chunk before this one
            scale, zero = next_scale, next_zero
            if i == 0:
                later = step - 1 + STAGES  # takes the place of the step before this one
                more = (step > 0) & (later < STEPS)
                slot = later % STAGES
                tl.debug_barrier()  # all warps have done with it
                hopper.mbarrier.expect(full.index(slot), BYTES, more)
                hopper.tma.async_copy_global_to_shared(
                    w_desc, [part, row, later * BLOCK // 8], full.index(slot), w.index(slot), more
                )
                hopper.tma.async_copy_global_to_shared(
                    x_desc, [first, later * BLOCK], full.index(slot), x.index(slot), more
                )
                slot = step % STAGES
    y = hopper.warpgroup_mma_wait(0, deps=[y])
    if b_ptr is not None:
        at = gl.arange(0, 128, gl.SliceLayout(1, mma))
        bias = gl.load(b_ptr + (part + at // ROWS) * N + row + at % ROWS, mask=row + at % ROWS < N, other=0.0)
        y += bias.to(gl.float32)[:, None]
    if PARTS == 2:
        gate, up = y.reshape([2, ROWS, COLS]).permute((1, 2, 0)).split()
        y = apply_gate(gate, up, ACT, CLAMP, y_ptr.dtype.element_ty)
        y = y.reshape([ROWS // 32, 2, 2, 2, 2, 2, COLS]).permute((0, 4, 5, 1, 2, 3, 6)).reshape([ROWS, COLS])
    # Through shared memory, so that a thread stores 8 neighbours of a pair's.
    by_pair: gl.constexpr = gl.BlockedLayout([8, 1], [ROWS // 8, 256 // ROWS], [1, 4], [0, 1])
    y = gl.convert_layout(y.to(y_ptr.dtype.element_ty), by_pair)
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, by_pair))[:, None]
    pair = first + gl.arange(0, COLS, gl.SliceLayout(0, by_pair))[None, :]
    live = pair < end
    pair = pair.to(gl.int64)
    if PARTS == 1:
        pair = gl.load(order_ptr + pair, mask=live, other=0)
        share = gl.load(share_ptr + pair, mask=live, other=0.0).to(gl.float32)
        y = (y.to(gl.float32) * share).to(y_ptr.dtype.element_ty)
    gl.store(y_ptr + pair * N + rows, y, mask=live & (rows < N))


def takes_sorted(x, weight: torch.Tensor) -> bool:
    """Whether `many_experts` takes such x and weights."""
    return weight.dtype == torch.uint8 and takes_few_tokens(x, weight)


def launch_sorted(x, weights, tiles, y, cols: int, act=(None, None), order=None, shares=None) -> None:
    """Fill y for x [n, K] in the order of words, sorted by expert.

    The experts' matrices stand one under the other in the first of the `weights` of `linear`. With an activation and a
    clamp y is [n, N] as `_sorted_tokens_kernel` says of 2 parts, else of 1.
    """
    (weight, scales, zeros, bias), N = weights, y.shape[1]
    groups, share = groups_of(weight, scales)
    K, kind, parts, block = x.shape[1], kind_of(scales), 1 if act[0] is None else 2, 128
    stage = 128 * block // 2 + cols * block * 2
    words = weight.view(torch.int32).view(-1, N, K // 8)
    w_desc, x_desc = describe(words, [parts, 128 // parts, block // 8], block // 2), describe(x, [cols, block])
    _sorted_tokens_kernel[(len(tiles) * triton.cdiv(N, 128 // parts),)](
        w_desc, x_desc, tiles, scales, zeros, bias, order, shares, y, N, GROUPS=groups, SHARE=share,
        KIND=kind, CODE=unpack_code(kind, x.dtype), CHUNK=64 if kind == "fp4" else 32,  # so that registers suffice
        STAGES=min(110_000 // stage, triton.cdiv(K, block)), ACT=act[0], CLAMP=act[1], num_warps=4,
        **launch_options(x.device),
    )  # fmt: skip


@custom_operator(lambda x, order, *others: x.new_empty(order.shape[0], x.shape[1]))
def many_experts(
    x: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, shares: torch.Tensor, activation: str,
    clamp: float | None, gate_up: list[torch.Tensor | None], down: list[torch.Tensor | None],
) -> torch.Tensor:  # fmt: skip
    """What each pair of a token of x [T, D] and one of its experts adds, [n, D], in the order of the pairs.

    `order` [n] sorts the pairs by expert, and an expert's end at `ends` [E], which the host does not know. A pair's
    result is multiplied by its share, of `shares` [n]. `gate_up` and `down` are weights, scales, zeros and bias as for
    `gated_experts`, of 4 bits.
    """
    x, E, n, options = x.contiguous(), len(ends), len(order), launch_options(x.device)
    D, F = x.shape[1], len(gate_up[0]) // E // 2
    cols = 64 if n <= 64 * E else 128  # generate.warm_prefill knows the 64
    tiles = torch.empty(n // cols + E, 3, dtype=torch.int32, device=x.device)
    ordered, hidden, y = x.new_empty(n, D), x.new_empty(n, F), x.new_empty(n, D)
    _tiles_of_experts_kernel[(len(tiles),)](ends, tiles, E=E, COLS=cols, num_warps=1, **options)
    _in_word_order_kernel[(n, triton.cdiv(D, 1024))](x, order, ordered, D, USED=n // len(x), BLOCK=1024, **options)
    launch_sorted(ordered, gate_up, tiles, hidden, cols, (activation, clamp))
    launch_sorted(hidden, down, tiles, y, cols, order=order, shares=shares.contiguous())
    return y
