"""Triton kernels for matrix-vector products with weights in bf16, int8 or 4 bits on a GPU, experts' among them.

`gpu_products.py` chooses and starts them. Decisions to know:

- K and the group size are compile-time constants, and only the last tile of a row is masked.
- Converting an integer to a float is a quarter-rate instruction. So weights of 8 and 4 bits stay integers: in each
  block of 32 columns x becomes two bytes a number, 16 bits, or three if it is float32, and one instruction (dp4a) adds
  up four products of bytes. Words are as on disk. The nibbles of int4 meet the bytes of even and odd columns.
- The scales and zero points of int4 are bytes too, where `gpu_products.in_bytes` can make them so.
- Bytes are multiplied by as many programs as fit on the GPU. Each makes its x once, from the residual stream and its
  norm where that is asked for, and fetches its next rows ahead. The sum of experts has a program for every few rows,
  which fetches all experts' first tiles before it waits.
- On Hopper the copy engine (TMA) brings most matrices of 16 bits, of int8, or of int4 in groups of 32 to shared memory
  (`gpu_products.takes_streamed`). That holds more tiles than registers do, so the GPU's memory has work while programs
  wait and make x. Experts, and products that tell other ranks, do not come so. Its kernel is in Gluon, Triton's lower
  layer, where loads can be put before the wait.
- Of experts the kernels read the rows of those with the largest logits, which each program finds by itself, and one
  kernel sums their results. In 4 bits rows of up to 4,096 columns come in small tiles, so that one warp has a row and
  its sum.
- Kernels start early and wait, and tell other ranks their part of a sum: `gpu_kernels.py`.

`quantized_linear.py` and `fast_model.py` have the plain twin of each.

Copy me: needs torch, triton, and `gpu_kernels.py` beside it.

Shapes: T tokens, N output rows, K input columns, E experts, of which a token has USED. The scales of a row begin GROUPS
scales after those of the row before, and SHARE blocks of 32 columns have the same one.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from gpu_kernels import count_of_rows, jit_for_any_T, open_inboxes, tell_rows, wait_for_inputs, words_of

# --- Experts, activations, and rows of floats -------------------------------------------------------------------------


@triton.jit
def _wait_for_choice(PDL: tl.constexpr):
    """`wait_for_inputs` the other way round: the next kernel starts when those before this one have ended, and so may
    read, without waiting, which experts they chose."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _places(logits_ptr, E: tl.constexpr):
    """For each expert, how many of a token's E logits come before its own. Where there is no expert, or a logit is NaN,
    it is any number."""
    BLOCK: tl.constexpr = triton.next_power_of_2(E)
    PART: tl.constexpr = min(BLOCK, 32)
    expert = tl.arange(0, BLOCK)[:, None]
    logit = tl.load(logits_ptr + expert, mask=expert < E, other=float("-inf")).to(tl.float32)
    places = tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, PART):
        other = first + tl.arange(0, PART)[None, :]
        others = tl.load(logits_ptr + other, mask=other < E, other=float("-inf")).to(tl.float32)
        places += tl.sum(((others > logit) | ((others == logit) & (other < expert))).to(tl.int32), 1)
    return places


@triton.jit
def _expert_at(places, place, E: tl.constexpr):
    """The expert at this place, as int64; inside, whatever a NaN does."""
    expert = tl.arange(0, places.shape[0])
    return tl.minimum(tl.sum(tl.where(places == place, expert, 0), 0), E - 1).to(tl.int64)


@triton.jit
def _expert_of_pair(logits_ptr, pair, E: tl.constexpr, USED: tl.constexpr):
    """The expert of a pair of a token and one of its USED places."""
    return _expert_at(_places(logits_ptr + pair // USED * E, E), pair % USED, E)


@triton.jit
def _chosen_experts(logits_ptr, E: tl.constexpr, USED: tl.constexpr, NORM: tl.constexpr):
    """A token's USED experts, and the weights of their results: a softmax over all, or with NORM over these."""
    places = _places(logits_ptr, E)
    expert = tl.arange(0, places.shape[0])
    logits = tl.load(logits_ptr + expert, mask=expert < E, other=float("-inf")).to(tl.float32)
    shares = tl.exp(logits - tl.max(logits, 0))
    whole = tl.sum(tl.where(places < USED, shares, 0.0), 0) if NORM else tl.sum(shares, 0)
    chosen, weights = (), ()
    for i in tl.static_range(USED):
        share = tl.sum(tl.where(places == i, shares, 0.0), 0) / whole
        chosen = chosen + (_expert_at(places, i, E),)
        weights = weights + (share.to(logits_ptr.dtype.element_ty).to(tl.float32),)
    return chosen, weights


@triton.jit
def _row_dot(x_ptr, matrix, row, w, K: tl.constexpr, BLOCK: tl.constexpr):
    """A row of weights, of which the first tile `w` is there, times x, with its scale and its bias, if it has them."""
    w_ptr, s_ptr, b_ptr = matrix
    w_ptr += row * K
    at = tl.arange(0, BLOCK)
    WHOLE: tl.constexpr = K // BLOCK * BLOCK
    total = w.to(tl.float32) * tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
    for first in range(BLOCK, WHOLE, BLOCK):
        total += tl.load(w_ptr + first + at).to(tl.float32) * tl.load(x_ptr + first + at).to(tl.float32)
    if BLOCK <= WHOLE and WHOLE < K:
        w = tl.load(w_ptr + WHOLE + at, mask=WHOLE + at < K, other=0)
        total += w.to(tl.float32) * tl.load(x_ptr + WHOLE + at, mask=WHOLE + at < K, other=0.0).to(tl.float32)
    y = tl.sum(total, 0)
    if s_ptr is not None:
        y *= tl.load(s_ptr + row).to(tl.float32)
    if b_ptr is not None:
        y += tl.load(b_ptr + row).to(tl.float32)
    return y


@triton.jit
def activate(x, ACT: tl.constexpr, dtype: tl.constexpr):
    """One of `fast_model.ACTIVATIONS`, of x that is rounded first, as it is where it is stored in between."""
    x = x.to(dtype).to(tl.float32)
    if ACT == "silu":
        x *= tl.sigmoid(x)
    elif ACT == "gelu":
        x *= 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    elif ACT == "gelu_sigmoid":
        x *= tl.sigmoid(1.702 * x)
    elif ACT == "gelu_tanh":  # (1 + tanh(t)) / 2 is sigmoid(2 t)
        x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACT == "relu" or ACT == "relu2")
        x = tl.maximum(x, 0.0)
        if ACT == "relu2":
            x *= x
    return x


@triton.jit
def apply_gate(gate, up, ACT: tl.constexpr, CLAMP: tl.constexpr, dtype: tl.constexpr):
    """act(gate) * up, with a clamp as `GPTConfig.gate_clamp` says."""
    up = up.to(dtype).to(tl.float32)
    if CLAMP is not None:
        gate = tl.minimum(gate.to(dtype).to(tl.float32), CLAMP)
        up = tl.minimum(tl.maximum(up, -CLAMP), CLAMP) + 1
    return activate(gate, ACT, dtype) * up


@jit_for_any_T
def matvec_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, y_ptr, logits_ptr, peers_ptr, T, N,
    E: tl.constexpr, USED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    CLAMP: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of float or int8 weights [N, K] a program; GATED: that row of [2 N, K] as gate, and row N + it as up.
    A bias [N] or [2 N] is added before the activation, if there is one.

    Of experts, which stand one under the other, it is a row of the one that a token's E logits give to one of its USED
    places, for T pairs of a token and a place. The pairs come one after the other, so that equal choices find a row in
    the cache.
    """
    pair, row = tl.program_id(0) % T, tl.program_id(0) // T
    at = tl.arange(0, BLOCK)
    w_row = row.to(tl.int64)
    if logits_ptr is not None:
        _wait_for_choice(PDL)
        w_row += _expert_of_pair(logits_ptr, pair, E, USED) * (2 * N if GATED else N)
        x_ptr += pair // USED * K
        y_ptr += pair * N
    matrix = (w_ptr, s_ptr, b_ptr)
    w = tl.load(w_ptr + w_row * K + at, mask=at < K, other=0)
    if GATED:
        w_up = tl.load(w_ptr + (w_row + N) * K + at, mask=at < K, other=0)
    inboxes = open_inboxes(peers_ptr, RANKS)
    if logits_ptr is None:
        wait_for_inputs(PDL)
    count = count_of_rows(inboxes, row, N, RANK, RANKS)
    y = _row_dot(x_ptr, matrix, w_row, w, K, BLOCK)
    if GATED:
        up = _row_dot(x_ptr, matrix, w_row + N, w_up, K, BLOCK)
        y = apply_gate(y, up, ACT, CLAMP, y_ptr.dtype.element_ty)
    elif ACT is not None:
        y = activate(y, ACT, y_ptr.dtype.element_ty)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row, y)
    tell_rows(y, row, N, count, inboxes, RANK, RANKS)


@jit_for_any_T
def experts_sum_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, y_ptr, logits_ptr, peers_ptr, T, N,
    E: tl.constexpr, USED: tl.constexpr, NORM: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The sum over a token's experts of one row of each, [N, K], times its own x [K], times its weight."""
    token, row = tl.program_id(0) % T, tl.program_id(0) // T
    at = tl.arange(0, BLOCK)
    chosen, weights = _chosen_experts(logits_ptr + token * E, E, USED, NORM)
    w_row, matrix = chosen[0] * N + row, (w_ptr, s_ptr, b_ptr)
    w = tl.load(w_ptr + w_row * K + at, mask=at < K, other=0)
    inboxes = open_inboxes(peers_ptr, RANKS)
    wait_for_inputs(PDL)
    count = count_of_rows(inboxes, row, N, RANK, RANKS)
    total = 0.0
    for i in tl.static_range(USED):
        if i > 0:
            w_row = chosen[i] * N + row
            w = tl.load(w_ptr + w_row * K + at, mask=at < K, other=0)
        y = _row_dot(x_ptr + (token * USED + i) * K, matrix, w_row, w, K, BLOCK)
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        total += y * weights[i]
    y = total.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + token * N + row, y)
    tell_rows(y, row, N, count, inboxes, RANK, RANKS)


# --- Weights of 8 or 4 bits -------------------------------------------------------------------------------------------

# Weights are in words of 4 or 8 columns, as on disk. KIND is "int8"; "floats": a group has a scale and a zero point;
# "bytes": it has bytes of both, as `gpu_products.in_bytes` makes them; "fp4": MXFP4, whose scales are exponents.


@triton.jit
def _dot_bytes(a, b, total):
    """total and the products of the four signed bytes of a and b."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _pick_bytes(first, second, places):
    """Four of the 8 bytes of two words: the last four nibbles of `places` say which. Place p from 8 on gives the
    highest bit of byte p - 8, eight times."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [first, second, places], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _in_register(word):
    """The same word, or'ed with a zero that the assembler cannot know. It keeps constants in uniform registers, and
    would move one each time that `_pick_bytes` needs it."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 zero; mov.b32 zero, %laneid; mul.hi.u32 zero, zero, 16; or.b32 $0, zero, $1; }",
        "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def power_of_two(scale):
    """2^(scale - 127) of MXFP4's scales, exponents in a byte."""
    return (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _to_bytes(x):
    """Words [W] of the signed bytes nearest to x [W, 4], and what is left of x."""
    rounded = x + 12582912.0  # 1.5 * 2^23: the last byte of the sum is the integer
    even, odd = tl.split(tl.reshape(rounded.to(tl.int32, bitcast=True), [x.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    word = _pick_bytes(_pick_bytes(first, second, 0x40), _pick_bytes(third, fourth, 0x40), 0x5410)
    return word, x - (rounded - 12582912.0)


@triton.jit
def _columns(tile, BLOCKS: tl.constexpr):
    """The columns of a tile of BLOCKS blocks, 8 neighbours in a row."""
    return tile * BLOCKS * 32 + tl.arange(0, BLOCKS * 4)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _in_bytes(x, BLOCKS: tl.constexpr, KIND: tl.constexpr, THREE: tl.constexpr):
    """A tile of x as step * (254 * byte + second byte + third byte / 254, with THREE alone), in blocks of 32 columns.
    Two words for 8 columns' bytes, two for second ones, their sum [4 BLOCKS], the steps [BLOCKS], and words and sums of
    third ones. A NaN becomes the step of its block."""
    x = tl.reshape(x, [BLOCKS, 4, 8])
    top = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2), 1)  # of integers: NaN is the largest of these
    top = tl.maximum(top, 0x0DA24260).to(tl.float32, bitcast=True)  # 1e-30
    x *= (127 / top)[:, None, None]
    if KIND == "fp4" or KIND == "int8":  # four neighbours in a word, else every second column, as in the weights
        a, b = tl.split(tl.permute(tl.reshape(x, [BLOCKS * 4, 2, 4]), (0, 2, 1)))
    else:
        a, b = tl.split(tl.reshape(x, [BLOCKS * 4, 4, 2]))
    a_bytes, a = _to_bytes(a)
    b_bytes, b = _to_bytes(b)
    a_second, a = _to_bytes(a * 254)
    b_second, b = _to_bytes(b * 254)
    sums = _dot_bytes(b_bytes, 0x01010101, _dot_bytes(a_bytes, 0x01010101, 0)) * 254
    sums = _dot_bytes(b_second, 0x01010101, _dot_bytes(a_second, 0x01010101, sums))
    a_third, b_third, third_sums = a_second, b_second, sums
    if THREE:
        a_third, a = _to_bytes(a * 254)
        b_third, b = _to_bytes(b * 254)
        third_sums = _dot_bytes(b_third, 0x01010101, _dot_bytes(a_third, 0x01010101, 0))
    return a_bytes, b_bytes, a_second, b_second, sums, top * (1 / (127 * 254)), a_third, b_third, third_sums


@triton.jit
def _x_tile(x_ptr, tile, K: tl.constexpr, BLOCKS: tl.constexpr, MASKED: tl.constexpr, KIND: tl.constexpr):
    """A tile of x in bytes."""
    at = _columns(tile, BLOCKS)
    x = tl.load(x_ptr + at, mask=at < K, other=0.0) if MASKED else tl.load(x_ptr + at)
    return _in_bytes(x.to(tl.float32), BLOCKS, KIND, x_ptr.dtype.element_ty == tl.float32)


@triton.jit
def _x_tiles(x_ptr, K: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, KIND: tl.constexpr):
    """The first TILES tiles of x in bytes."""
    tiles = ()
    for i in tl.static_range(TILES):
        tiles = tiles + (_x_tile(x_ptr, i, K, BLOCKS, (i + 1) * BLOCKS * 32 > K, KIND),)
    return tiles


@triton.jit
def _load_norm_tiles(norm_ptr, K: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr):
    """The norm's weights of the first TILES tiles of x."""
    weights = ()
    for i in tl.static_range(TILES):
        at = _columns(i, BLOCKS)
        weights = weights + (tl.load(norm_ptr + at, mask=at < K, other=0.0).to(tl.float32),)
    return weights


@triton.jit
def _add_residual(x_ptr, residual_ptr, at, dtype: tl.constexpr, K: tl.constexpr):
    """residual + x at some columns, rounded to dtype, as float32."""
    x = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + at, mask=at < K, other=0.0).to(tl.float32)
    return (residual + x).to(dtype).to(tl.float32)


@triton.jit
def _normed_x_tiles(
    x_ptr, residual_ptr, total_ptr, norm, eps,
    K: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The RMS norm of residual + x in bytes, all of its TILES. The first program stores the sum."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    sums, squares, tiles = (), 0.0, ()
    for i in tl.static_range(TILES):
        sums = sums + (_add_residual(x_ptr, residual_ptr, _columns(i, BLOCKS), total_ptr.dtype.element_ty, K),)
        squares += tl.sum(sums[i] * sums[i])
    if tl.program_id(0) == 0:
        for i in tl.static_range(TILES):
            at = _columns(i, BLOCKS)
            tl.store(total_ptr + at, sums[i].to(total_ptr.dtype.element_ty), mask=at < K)
    factor = tl.rsqrt(squares / K + eps)
    for i in tl.static_range(TILES):
        x = (sums[i] * factor * norm[i]).to(dtype).to(tl.float32)
        tiles = tiles + (_in_bytes(x, BLOCKS, KIND, dtype == tl.float32),)
    return tiles


@triton.jit
def _fp4_in_bytes(plus, minus):
    """12 and twice the numbers of the last four nibbles of `plus`; `minus` has their signs the other way round. A place
    with its highest bit set gives the highest bit of a byte, which is 0 in all."""
    first, second = _in_register(0x0F0E0D0C), _in_register(0x090A0B0C)
    return _pick_bytes(first, 0x18141210, plus) | _pick_bytes(second, 0x00040608, minus)


@triton.jit
def _weights_in_bytes(words, ROWS: tl.constexpr, BLOCKS: tl.constexpr, KIND: tl.constexpr):
    """Two words of bytes for 8 columns: the numbers of int8, 12 and twice the numbers of MXFP4, or q from 0 to 15."""
    if KIND == "int8":
        first, second = tl.split(tl.reshape(words, [ROWS, BLOCKS * 4, 2]))
    elif KIND == "fp4":
        minus = words ^ (0x88888888 - 2**32)
        first, second = _fp4_in_bytes(words, minus), _fp4_in_bytes(words >> 16, minus >> 16)
    else:
        first, second = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F
    return first, second


@triton.jit
def _scale_and_zero(both):
    """The scale and the zero point, of which int16 `both` has a byte each. As the last byte of 2^23 in float32 a byte
    is added to it, without a conversion."""
    scale = (both.to(tl.int32) & 255) | 0x4B000000
    zero = ((both.to(tl.int32) >> 8 & 255) ^ 128) | 0x4B000000  # with its sign turned, which adds 128
    return scale.to(tl.float32, bitcast=True) - 8388608.0, zero.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _load_tile(
    matrix, rows, inside, tile,
    K: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, BLOCKS: tl.constexpr, MASKED: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """A tile of weights: words of [rows, BLOCKS] blocks of 32 columns, and what is stored of their scales and zeros."""
    w_ptr, s_ptr, z_ptr, b_ptr = matrix
    first = tile * BLOCKS
    WORDS: tl.constexpr = K // 4 if KIND == "int8" else K // 8
    WIDE: tl.constexpr = 8 if KIND == "int8" else 4
    at, block = first * WIDE + tl.arange(0, BLOCKS * WIDE)[None, :], first + tl.arange(0, BLOCKS)[None, :]
    w_at, group = w_ptr + rows * WORDS + at, rows * GROUPS + block // SHARE
    if BLOCKS <= 32:  # so that Triton loads one scale a thread, which has the words of one block
        group = tl.multiple_of(group, [1, 1])
    if MASKED:
        inside_groups = inside & (block < K // 32)
        words = tl.load(w_at, mask=inside & (at < WORDS), other=0)
        scale = words if KIND == "int8" else tl.load(s_ptr + group, mask=inside_groups, other=0)
        zero = tl.load(z_ptr + group, mask=inside_groups, other=0) if KIND == "floats" else scale
    else:
        words = tl.load(w_at, mask=inside)
        scale = words if KIND == "int8" else tl.load(s_ptr + group, mask=inside)
        zero = tl.load(z_ptr + group, mask=inside) if KIND == "floats" else scale
    return words, scale, zero


@triton.jit
def _load_tiles(
    matrix, rows, inside,
    K: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """The first TILES tiles of weights."""
    tiles = ()
    for i in tl.static_range(TILES):
        tiles = tiles + (
            _load_tile(matrix, rows, inside, i, K, GROUPS, SHARE, BLOCKS, (i + 1) * BLOCKS * 32 > K, KIND),
        )
    return tiles


@triton.jit
def _load_rows(s_ptr, z_ptr, b_ptr, rows, inside, KIND: tl.constexpr):
    """What each of some rows has once: of int8 its scale, of int4 what its scales and zero points count by, unless
    z_ptr is None; and its bias. What a kind has not is not used."""
    step, zero_step, bias = rows, rows, rows
    if KIND == "int8":
        step = tl.load(s_ptr + rows, mask=inside, other=0.0)
    elif KIND == "bytes" and z_ptr is not None:
        step = tl.load(z_ptr + 2 * rows, mask=inside, other=0.0)
        zero_step = tl.load(z_ptr + 2 * rows + 1, mask=inside, other=0.0)
    if b_ptr is not None:
        bias = tl.load(b_ptr + rows, mask=inside, other=0.0)
    return step, zero_step, bias


@triton.jit
def _tile_dot(tile, x, zero_step, ROWS: tl.constexpr, BLOCKS: tl.constexpr, KIND: tl.constexpr, THREE: tl.constexpr):
    """Products [ROWS, BLOCKS] of what `_load_tile` and `_in_bytes` gave, with two bytes of x or THREE."""
    words, scale, zero = tile
    a_bytes, b_bytes, a_second, b_second, sums, step, a_third, b_third, third_sums = x
    a, b = _weights_in_bytes(words, ROWS, BLOCKS, KIND)
    minus: tl.constexpr = 12 if KIND == "fp4" else 8  # q - 8
    dot = _dot_bytes(b, b_bytes[None, :], _dot_bytes(a, a_bytes[None, :], 0)) * 254
    if KIND != "int8":
        dot -= minus * sums[None, :]
    dot = _dot_bytes(b, b_second[None, :], _dot_bytes(a, a_second[None, :], dot))
    dot = tl.sum(tl.reshape(dot, [ROWS, BLOCKS, 4]), 2).to(tl.float32)
    x_sum = tl.sum(tl.reshape(sums, [BLOCKS, 4]), 1).to(tl.float32)[None, :]
    if THREE:
        third = _dot_bytes(b, b_third[None, :], _dot_bytes(a, a_third[None, :], 0))
        if KIND != "int8":
            third -= minus * third_sums[None, :]
        dot += tl.sum(tl.reshape(third, [ROWS, BLOCKS, 4]), 2).to(tl.float32) * (1 / 254)
        x_sum += tl.sum(tl.reshape(third_sums, [BLOCKS, 4]), 1).to(tl.float32)[None, :] * (1 / 254)
    if KIND == "fp4":
        dot *= power_of_two(scale) * 0.5
    elif KIND == "bytes":
        scale, zero = _scale_and_zero(scale)
        dot = scale * dot + zero * (zero_step * x_sum)
    elif KIND == "floats":
        dot = scale.to(tl.float32) * dot + zero.to(tl.float32) * x_sum
    return dot * step[None, :]


@triton.jit
def _rows_dot(
    x_ptr, x, matrix, tiles, of_rows, rows, inside,
    K: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    TILES: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Rows of weights times x, with the bias, if there is one; [ROWS, 1]. The first TILES of both are there."""
    WHOLE: tl.constexpr = K // 32 // BLOCKS
    THREE: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    w_ptr, s_ptr, z_ptr, b_ptr = matrix
    step, zero_step, bias = of_rows
    total = _tile_dot(tiles[0], x[0], zero_step, ROWS, BLOCKS, KIND, THREE)
    for i in tl.static_range(1, TILES):
        total += _tile_dot(tiles[i], x[i], zero_step, ROWS, BLOCKS, KIND, THREE)
    for i in range(TILES, WHOLE):
        later = _load_tile(matrix, rows, inside, i, K, GROUPS, SHARE, BLOCKS, False, KIND)
        total += _tile_dot(later, _x_tile(x_ptr, i, K, BLOCKS, False, KIND), zero_step, ROWS, BLOCKS, KIND, THREE)
    if TILES <= WHOLE and WHOLE * BLOCKS * 32 < K:
        last = _load_tile(matrix, rows, inside, WHOLE, K, GROUPS, SHARE, BLOCKS, True, KIND)
        total += _tile_dot(last, _x_tile(x_ptr, WHOLE, K, BLOCKS, True, KIND), zero_step, ROWS, BLOCKS, KIND, THREE)
    y = tl.sum(total, 1)[:, None]
    if KIND == "int8" or KIND == "bytes":
        y *= step.to(tl.float32)
    if b_ptr is not None:
        y += bias.to(tl.float32)
    return y


@jit_for_any_T
def bytes_matvec_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, b_ptr, y_ptr, logits_ptr, peers_ptr, T, N,
    residual_ptr, norm_ptr, total_ptr, eps,
    E: tl.constexpr, USED: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, CLAMP: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """ROWS of N rows at a time and all of T tokens a program, which fetches its next rows before it multiplies these;
    GATED: half as many as gate, and as many from row N on as up. With a residual stream x is added to it, and the norm
    of the sum is what is multiplied.

    Of experts a program takes one of T pairs of a token and a place. They and the bias are as for `matvec_kernel`.
    """
    DIFFERENT: tl.constexpr = ROWS // 2 if GATED else ROWS
    i = tl.arange(0, ROWS)[:, None]
    program, programs, tokens, first = tl.program_id(0), tl.num_programs(0), T, 0
    if logits_ptr is not None:
        pair, program, programs, tokens = program % T, program // T, programs // T, 1
        _wait_for_choice(PDL)
        first = _expert_of_pair(logits_ptr, pair, E, USED) * (2 * N if GATED else N)
        x_ptr += pair // USED * K
        y_ptr += pair * N
    matrix = (w_ptr, s_ptr, z_ptr, b_ptr)
    rows = first + i // DIFFERENT * N + i % DIFFERENT
    out = program * DIFFERENT + i % DIFFERENT
    tiles = _load_tiles(matrix, rows + program * DIFFERENT, out < N, K, GROUPS, SHARE, BLOCKS, TILES, KIND)
    of_rows = _load_rows(s_ptr, z_ptr, b_ptr, rows + program * DIFFERENT, out < N, KIND)
    inboxes = open_inboxes(peers_ptr, RANKS)
    if residual_ptr is not None:
        norm = _load_norm_tiles(norm_ptr, K, BLOCKS, TILES)
    if logits_ptr is None:
        wait_for_inputs(PDL)
    if residual_ptr is not None:
        x = _normed_x_tiles(x_ptr, residual_ptr, total_ptr, norm, eps, K, BLOCKS, TILES, KIND)
    else:
        x = _x_tiles(x_ptr, K, BLOCKS, TILES, KIND)
    for group in range(program, tl.cdiv(N, DIFFERENT), programs):
        out = group * DIFFERENT + i % DIFFERENT
        inside = group * DIFFERENT < N if EVEN else out < N
        following = group + programs
        more = following * DIFFERENT < N if EVEN else following * DIFFERENT + i % DIFFERENT < N
        next_tiles = _load_tiles(matrix, rows + following * DIFFERENT, more, K, GROUPS, SHARE, BLOCKS, TILES, KIND)
        next_of_rows = _load_rows(s_ptr, z_ptr, b_ptr, rows + following * DIFFERENT, more, KIND)
        count = count_of_rows(inboxes, out, N, RANK, RANKS)
        for token in range(tokens):
            x_at, y_at = x_ptr + token * K, y_ptr + token * N
            if T != 1 and logits_ptr is None:
                x = _x_tiles(x_at, K, BLOCKS, TILES, KIND)
            its_rows = rows + group * DIFFERENT
            y = _rows_dot(
                x_at, x, matrix, tiles, of_rows, its_rows, inside, K, GROUPS, SHARE, ROWS, BLOCKS, TILES, KIND
            )
            if GATED:
                gate, up = tl.split(tl.permute(tl.reshape(y, [2, DIFFERENT]), (1, 0)))
                y = apply_gate(gate, up, ACT, CLAMP, y_ptr.dtype.element_ty)
                at = group * DIFFERENT + tl.arange(0, DIFFERENT)
                tl.store(y_at + at, y.to(y_ptr.dtype.element_ty), mask=at < N)
            else:
                if ACT is not None:
                    y = activate(y, ACT, y_ptr.dtype.element_ty)
                y = y.to(y_ptr.dtype.element_ty)
                tl.store(y_at + out, y, mask=inside)
                tell_rows(y, out, N, count, inboxes, RANK, RANKS)  # several ranks have one token
        tiles, of_rows = next_tiles, next_of_rows


@jit_for_any_T
def bytes_experts_sum_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, b_ptr, y_ptr, logits_ptr, peers_ptr, T, N,
    E: tl.constexpr, USED: tl.constexpr, NORM: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr,
    SHARE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, EVEN: tl.constexpr,
    KIND: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS of N rows and one token a program, else as `experts_sum_kernel`."""
    token = tl.program_id(0) % T
    out = tl.program_id(0) // T * ROWS + tl.arange(0, ROWS)[:, None]
    matrix = (w_ptr, s_ptr, z_ptr, b_ptr)
    inside = tl.program_id(0) >= 0 if EVEN else out < N  # always, without a comparison for each row
    chosen, weights = _chosen_experts(logits_ptr + token * E, E, USED, NORM)
    tiles, of_rows = (), ()
    for i in tl.static_range(USED):
        tiles = tiles + (_load_tiles(matrix, chosen[i] * N + out, inside, K, GROUPS, SHARE, BLOCKS, TILES, KIND),)
        of_rows = of_rows + (_load_rows(s_ptr, z_ptr, b_ptr, chosen[i] * N + out, inside, KIND),)
    inboxes = open_inboxes(peers_ptr, RANKS)
    wait_for_inputs(PDL)
    count = count_of_rows(inboxes, out, N, RANK, RANKS)
    total = tl.zeros([ROWS, 1], tl.float32)
    for i in tl.static_range(USED):
        rows = chosen[i] * N + out
        x_at = x_ptr + (token * USED + i) * K
        x = _x_tiles(x_at, K, BLOCKS, TILES, KIND)
        y = _rows_dot(x_at, x, matrix, tiles[i], of_rows[i], rows, inside, K, GROUPS, SHARE, ROWS, BLOCKS, TILES, KIND)
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        total += y * weights[i]
    y = total.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + token * N + out, y, mask=out < N)
    tell_rows(y, out, N, count, inboxes, RANK, RANKS)


# --- Matrices by the copy engine --------------------------------------------------------------------------------------

# A ring of tiles in shared memory, which holds more than registers do, is filled before the wait, except its last tile
# if it has several. The loads of x come before that tile, because the memory answers in turn. Later tiles come while x
# is made. A tile is 2,048 bytes of 16 or 8 rows, and of int4 their scales and the rows' steps. It is multiplied in two
# halves. A thread has 8 columns of 16 bits, or units of four words, which are 16 columns of int8 or a block of 32 in
# 4 bits.


@gluon.jit
def _four(words):
    """Words [R, 4 U] as four of [R, U], where a thread has all words of a unit."""
    even, odd = words.reshape([words.shape[0], words.shape[1] // 4, 2, 2]).split()
    first, third = even.split()
    second, fourth = odd.split()
    return first, second, third, fourth


@gluon.jit
def _dot_four(a, b, total):
    """total and the products of the bytes of four words."""
    for i in gl.static_range(4):
        total = _dot_bytes(a[i], b[i], total)
    return total


@gluon.jit
def _fetch_tile(descs, rings, full, count, first, apart, groups, TILES: gl.constexpr):
    """Ask for the tile of this count. A program's groups of rows are `first`, `first + apart` and so on, of so many
    `groups`; each has TILES tiles. Each ring has its own barriers, else all threads would meet between the copies."""
    slot, tile, group = count % full[0].shape[0], count % TILES, first + count // TILES * apart
    more = group < groups
    for i in gl.static_range(len(descs)):
        hopper.mbarrier.expect(full[i].index(slot), descs[i].block_type.nbytes, more)
    for i in gl.static_range(len(descs)):
        column, rows = tile * descs[i].block_type.shape[2], descs[0].block_type.shape[1]
        at = [0, group * rows, column] if i < 2 else [0, group * (rows // 2), 0]
        hopper.tma.async_copy_global_to_shared(descs[i], at, full[i].index(slot), rings[i].index(slot), more)


@gluon.jit
def _share_x(x, KIND: gl.constexpr):
    """2,048 columns x [256, 8] in shared memory. For packed weights they are as `_in_bytes` makes them: words of bytes
    and of second bytes, and the steps of units. 4 bits have two words each, for even columns and for odd ones. Their
    units also have -8 times the sum of x's bytes, and that sum times the step."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    if KIND == "plain":
        words, units = (x.reshape([2048]),), ()
    else:
        x = x.to(gl.float32)
        a, b, a_second, b_second, sums, step, a_third, b_third, third_sums = _in_bytes(x, 64, KIND, False)
        if KIND == "int8":
            words = (gl.join(a, b).reshape([512]), gl.join(a_second, b_second).reshape([512]))
            units = (tl.broadcast_to(step[:, None], [64, 2]).reshape([128]),)
        else:
            sums = gl.convert_layout(gl.sum(sums.reshape([64, 4]), 1), step.type.layout)
            words = (a, a_second, b, b_second)
            units = (step, sums * -8, sums.to(gl.float32) * step)
    shared_words, shared_units = (), ()
    for i in gl.static_range(len(words)):
        shared_words = shared_words + (gl.allocate_shared_memory(words[i].dtype, words[i].shape, layout, words[i]),)
    for i in gl.static_range(len(units)):
        shared_units = shared_units + (gl.allocate_shared_memory(units[i].dtype, units[i].shape, layout, units[i]),)
    return shared_words, shared_units


@gluon.jit
def _load_shared_x(shared, part: gl.constexpr, KIND: gl.constexpr, words: gl.constexpr, units: gl.constexpr):
    """The part of what `_share_x` gave that half a tile meets: a quarter for 16 bits, a half for int8, or all."""
    shared_words, shared_units = shared
    WIDE: gl.constexpr = 512 if KIND == "plain" else 256
    x = ()
    for i in gl.static_range(len(shared_words)):
        its_words = shared_words[i].slice(part * WIDE, WIDE).load(gl.SliceLayout(0, words))[None, :]
        x = x + (its_words.to(gl.float32) if KIND == "plain" else _four(its_words),)
    for i in gl.static_range(len(shared_units)):
        x = x + (shared_units[i].slice(part * 64, 64).load(gl.SliceLayout(0, units))[None, :],)
    return x


@gluon.jit
def _add_half_tile(
    total, zeros, rings, slot, half: gl.constexpr, x, KIND: gl.constexpr, words: gl.constexpr, units: gl.constexpr
):
    """total [R, 64], or [R, 512] for weights of 16 bits, and the products of half a tile of R rows with what
    `_load_shared_x` gave. `zeros` [R, 64] gets what the zero points add, in their own steps."""
    R: gl.constexpr = total.shape[0]
    WIDE: gl.constexpr = 512 if KIND == "plain" else 256
    q = rings[0].index(slot).reshape([R, 2 * WIDE]).slice(half * WIDE, WIDE, dim=1).load(words)
    if KIND == "plain":
        total += q.to(gl.float32) * x[0]
    elif KIND == "int8":
        q, x_bytes, x_second, step = _four(q), x[0], x[1], x[2]
        total += _dot_four(q, x_second, _dot_four(q, x_bytes, 0) * 254).to(gl.float32) * step
    else:
        a_bytes, a_second, b_bytes, b_second, step, minus, x_sum = x
        a, b = _four(q & 0x0F0F0F0F), _four((q >> 4) & 0x0F0F0F0F)
        dot = _dot_four(b, b_bytes, _dot_four(a, a_bytes, 0)) * 254 + minus
        dot = _dot_four(b, b_second, _dot_four(a, a_second, dot)).to(gl.float32)
        both = rings[1].index(slot).reshape([R, 128]).slice(half * 64, 64, dim=1).load(units)
        scale, zero = _scale_and_zero(both)
        total += dot * scale * step
        zeros += zero * x_sum
    return total, zeros


@gluon.jit
def _load_told(told_ptr, column, K: gl.constexpr):
    """What a rank told of x, in chunks of 2,048."""
    told = ()
    for i in gl.static_range((K + 2047) // 2048):
        at = i * 2048 + column
        told = told + (gl.load(told_ptr + at, mask=at < K, other=0, volatile=True),)
    return told


@gluon.jit
def _are_missing(told, count, column, K: gl.constexpr):
    """Whether some of it is not of this round yet."""
    missing = column < 0
    for i in gl.static_range(len(told)):
        missing |= (i * 2048 + column < K) & ((told[i] >> 16).to(gl.int16) != count)
    return gl.max(gl.max(missing.to(gl.int32), 1), 0) > 0


@gluon.jit
def _hear_and_add(total, told_ptr, count, column, dtype: gl.constexpr, K: gl.constexpr):
    """The chunks of total plus what a rank tells in this round, when all of it has come."""
    told, sums = _load_told(told_ptr, column, K), ()
    while _are_missing(told, count, column, K):
        told = _load_told(told_ptr, column, K)
    for i in gl.static_range(len(total)):
        sums = sums + (total[i] + told[i].to(gl.uint16).to(dtype, bitcast=True).to(gl.float32),)
    return sums


@gluon.jit
def _add_over_ranks(x, inboxes, column, dtype: gl.constexpr, K: gl.constexpr, RANK: gl.constexpr, RANKS: gl.constexpr):
    """The chunks x of every rank, which the product before has told, added up as by `add_norm` of `gpu_kernels.py`."""
    told_ptr = words_of(inboxes[RANK], dtype)
    count = gl.load(inboxes[RANK] + RANKS * K, volatile=True).to(gl.int16)
    total, sums = (), ()
    for i in gl.static_range(len(x)):
        total = total + (gl.zeros_like(x[i], dtype=gl.float32),)
    for rank in range(RANK):
        total = _hear_and_add(total, told_ptr + rank * K, count, column, dtype, K)
    for i in gl.static_range(len(x)):
        sums = sums + (total[i] + x[i].to(gl.float32),)
    for rank in range(RANK + 1, RANKS):
        sums = _hear_and_add(sums, told_ptr + rank * K, count, column, dtype, K)
    return sums


@gluon.jit
def streamed_matvec_kernel(
    w_desc, scales_desc, steps_desc, s_ptr, b_ptr, x_ptr, y_ptr, N, residual_ptr, norm_ptr, total_ptr, eps, peers_ptr,
    RANK: gl.constexpr, RANKS: gl.constexpr, K: gl.constexpr, COLUMNS: gl.constexpr, KIND: gl.constexpr,
    STAGES: gl.constexpr, ACT: gl.constexpr, CLAMP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A single token's product as `bytes_matvec_kernel` makes it, without experts, of weights [1 or 2, N, K numbers or
    words] in tiles of COLUMNS, 16 rows at a time, or 8 of one part. KIND is "plain", of 16 bits, or "int8", or "bytes"
    with groups of 32 columns. Packed weights meet a norm that was not rounded to x's dtype. Of several ranks, a product
    with a norm hears their parts of x, and one without tells them its y."""
    PARTS: gl.constexpr = w_desc.block_type.shape[0]
    ROWS: gl.constexpr = w_desc.block_type.shape[1]
    R: gl.constexpr = PARTS * ROWS
    gl.static_assert(R == 16 or PARTS == 1)
    CHUNKS: gl.constexpr = (K + 2047) // 2048
    HALF: gl.constexpr = COLUMNS // 2
    HALVES: gl.constexpr = (K + HALF - 1) // HALF
    TILES: gl.constexpr = (HALVES + 1) // 2
    BEFORE_WAIT: gl.constexpr = max(STAGES - 1, 1)
    HEARS: gl.constexpr = RANKS > 1 and residual_ptr is not None
    TELLS: gl.constexpr = RANKS > 1 and residual_ptr is None
    HELD: gl.constexpr = K <= 4096 and KIND != "plain"  # then x stays in registers
    # Two warps have a row's half tile. One has the sums of two rows, 8 apart: a row of gate, and the same of up. Of 8
    # rows it has one.
    words: gl.constexpr = gl.BlockedLayout([1, 8 if KIND == "plain" else 4], [1, 32], [4, 2], [1, 0])
    of_four: gl.constexpr = gl.BlockedLayout([1, 1, 2, 2], [1, 32, 1, 1], [4, 2, 1, 1], [3, 2, 1, 0])
    units: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, of_four))
    of_steps: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [4, 0], [8, 0]] if R == 16 else [[0, 1], [4, 0]],
        [[0, 0], [0, 0], [0, 0], [0, 0], [0, 0]], [[0, 0], [1, 0], [2, 0]], [], [R, 2],
    )  # fmt: skip
    of_sums: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [8, 0]] if R == 16 else [[0, 1]],
        [[0, 2], [0, 4], [0, 8], [0, 16], [0, 32]], [[1, 0], [2, 0], [4, 0]], [], [R, 64],
    )  # fmt: skip
    of_x: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [8, 1], [1, 0])
    program, programs, groups = gl.program_id(0), gl.num_programs(0), gl.cdiv(N, ROWS)
    row = gl.arange(0, R, gl.SliceLayout(1, of_sums))
    column = gl.arange(0, 256, gl.SliceLayout(1, of_x))[:, None] * 8 + gl.arange(0, 8, gl.SliceLayout(0, of_x))[None, :]
    descs = (w_desc, scales_desc, steps_desc) if KIND == "bytes" else (w_desc,)
    rings, full, norm, x, residual, sums = (), (), (), (), (), ()
    for i in gl.static_range(len(descs)):
        tile = descs[i].block_type
        rings = rings + (gl.allocate_shared_memory(tile.element_ty, [STAGES] + tile.shape, descs[i].layout),)
        full = full + (gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout()),)
    for stage in gl.static_range(STAGES):
        for i in gl.static_range(len(descs)):
            hopper.mbarrier.init(full[i].index(stage), count=1)
    # Asked for before the tiles: the memory answers in turn.
    out = program * ROWS + row % ROWS
    of_rows = _load_rows(s_ptr, None, b_ptr, row // ROWS * N + out, out < N, KIND)
    if residual_ptr is not None:
        for i in gl.static_range(CHUNKS):
            at = i * 2048 + column
            norm = norm + (gl.load(norm_ptr + at, mask=at < K, other=0.0),)
    inboxes = open_inboxes(peers_ptr, RANKS)
    for stage in gl.static_range(BEFORE_WAIT):
        _fetch_tile(descs, rings, full, stage, program, programs, groups, TILES)
    wait_for_inputs(PDL)
    if TELLS:
        count_of_told = count_of_rows(inboxes, program * ROWS, N, RANK, RANKS)  # the other rows' is the same
    for i in gl.static_range(CHUNKS):
        at = i * 2048 + column
        if residual_ptr is None or HEARS:
            x = x + (gl.load(x_ptr + at, mask=at < K, other=0.0),)
            if HEARS:
                residual = residual + (gl.load(residual_ptr + at, mask=at < K, other=0.0),)
        else:
            sums = sums + (_add_residual(x_ptr, residual_ptr, at, total_ptr.dtype.element_ty, K),)
    for stage in gl.static_range(BEFORE_WAIT, STAGES):
        _fetch_tile(descs, rings, full, stage, program, programs, groups, TILES)
    if HEARS:
        updates = _add_over_ranks(x, inboxes, column, x_ptr.dtype.element_ty, K, RANK, RANKS)
        x = ()
        for i in gl.static_range(CHUNKS):
            sums = sums + ((residual[i].to(gl.float32) + updates[i]).to(total_ptr.dtype.element_ty).to(gl.float32),)
    if residual_ptr is not None:
        squares = gl.zeros([256, 8], gl.float32, of_x)
        for i in gl.static_range(CHUNKS):
            squares += sums[i] * sums[i]
        if program == 0:
            for i in gl.static_range(CHUNKS):
                at = i * 2048 + column
                gl.store(total_ptr + at, sums[i].to(total_ptr.dtype.element_ty), mask=at < K)
        factor = gl.rsqrt(gl.sum(gl.sum(squares, 1), 0) / K + eps)
        for i in gl.static_range(CHUNKS):
            normed = sums[i] * norm[i].to(gl.float32)
            if KIND == "plain":
                normed = (normed * factor).to(x_ptr.dtype.element_ty)
            x = x + (normed,)  # bytes do not wait for `factor`: the sums are multiplied by it
    shared, held = (), ()
    for i in gl.static_range(CHUNKS):
        shared = shared + (_share_x(x[i], KIND),)
    for i in gl.static_range(HALVES if HELD else 0):
        held = held + (_load_shared_x(shared[i * HALF // 2048], i % (2048 // HALF), KIND, words, units),)
    count = 0
    for group in range(program, groups, programs):
        out = group * ROWS + row % ROWS
        zeros = gl.zeros([R, 64], gl.float32, units)
        total = gl.zeros([R, 512], gl.float32, words) if KIND == "plain" else zeros
        for tile in gl.static_range(TILES):
            slot = count % STAGES
            for i in gl.static_range(len(descs)):
                hopper.mbarrier.wait(full[i].index(slot), count // STAGES & 1)
            for i in gl.static_range(2 * tile, min(2 * tile + 2, HALVES)):
                if HELD:
                    its_x = held[i]
                else:
                    its_x = _load_shared_x(shared[i * HALF // 2048], i % (2048 // HALF), KIND, words, units)
                total, zeros = _add_half_tile(total, zeros, rings, slot, i % 2, its_x, KIND, words, units)
            if KIND == "bytes":
                scale_step, zero_step = rings[2].index(slot).reshape([16, 2]).slice(0, R).load(of_steps).split()
            # The compiler makes all threads meet before these copies, so all have read the slot.
            _fetch_tile(descs, rings, full, count + STAGES, program, programs, groups, TILES)
            count += 1
        if KIND == "bytes":
            zero_step = gl.convert_layout(zero_step, gl.SliceLayout(1, units), assert_trivial=True)
            scale_step = gl.convert_layout(scale_step, gl.SliceLayout(1, units), assert_trivial=True)
            total = (total + zeros * zero_step[:, None]) * scale_step[:, None]
        if KIND == "plain":
            total = gl.sum(total.reshape([R, 64, 8]), 2)
        y = gl.sum(gl.convert_layout(total, of_sums), 1)
        if residual_ptr is not None and KIND != "plain":
            y *= factor
        if KIND == "int8":
            y *= of_rows[0].to(gl.float32)
        if b_ptr is not None:
            y += of_rows[2].to(gl.float32)
        next_out = out + programs * ROWS
        of_rows = _load_rows(s_ptr, None, b_ptr, row // ROWS * N + next_out, next_out < N, KIND)
        if PARTS == 2:
            gate, up = y.reshape([2, ROWS]).permute((1, 0)).split()
            gated = apply_gate(gate, up, ACT, CLAMP, y_ptr.dtype.element_ty)
            gated_out = group * ROWS + gl.arange(0, ROWS, gated.type.layout)
            gl.store(y_ptr + gated_out, gated.to(y_ptr.dtype.element_ty), mask=gated_out < N)
        else:
            if ACT is not None:
                y = activate(y, ACT, y_ptr.dtype.element_ty)
            y = y.to(y_ptr.dtype.element_ty)
            if TELLS:
                tell_rows(y, out, N, count_of_told, inboxes, RANK, RANKS)
            gl.store(y_ptr + out, y, mask=out < N)
