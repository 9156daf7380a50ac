"""Triton kernels for a decode step on a GPU, where each was faster than what the compiler makes of plain PyTorch.

One H100 80GB, torch 2.11, Llama-2-7B shape, batch 1, tokens/s compiled without this file and with it: bf16 181 and 208,
int8 206 and 343, int4 in groups of 32 (not run without) 418; benchmarks/README.md and log.md say from
which runs. Decisions to know:

- `linear` is one operator for bf16, int8 and int4 weights. A single token reads the weights as a matrix-vector product,
  up to 6 do so one by one in int4. On Hopper 2 to 64 go through a tensor core's product, for which the copy engine
  (TMA) fetches the weights; it is in Gluon, Triton's lower layer, where loads can be put before the wait. int8 weights
  meet x there as two int8 numbers, 15 bits, so that no weight is converted; elsewhere they are converted inside a
  product. Otherwise weights are unpacked, then cuBLAS.
- K and the group size are compile-time constants, and only the last tile of a row is masked.
- Converting an integer to a float is a quarter-rate instruction. int4 becomes a bf16 number by one three-input logic
  operation: 0x4300 is 128, and its last mantissa bits count by one.
- int4 has a layout of its own here, made by `int4_layout` at load: word a of the 4 words of 32 columns holds column
  4 i + a in nibble i, so that the activations of a nibble are 4 neighbours, and two nibbles that one
  operation turns into a pair of bf16 are 16 bits apart.
- Of experts the matrix-vector kernels read the rows of those that are chosen, and one kernel sums their results.
- Attention reads the used slots only, split over programs, so that its cost grows with the context used (Dao et al.
  2023, "Flash-Decoding").
- On Hopper and newer a kernel starts while the one before it ends (programmatic dependent launch) and waits for its
  results after fetching weights, which do not depend on them. So norms are here too, and RoPE, cache and attention are
  one operator: a kernel of the compiler's in between would break the chain. The ranks' sum of tensor parallelism is in
  the norm's kernel for the same reason.

`quantized_linear.py` and `fast_model.py` have the plain twin of each.

Copy me: needs torch and triton.

Shapes: B batch, T tokens, N output rows, K input columns, G columns in a group, S cache slots, H query heads, KV kv
heads, C head dim.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def runs_on(device: torch.device) -> bool:
    """Whether these kernels run there: NVIDIA GPUs of compute capability 8.0 (Ampere) or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def variants_built() -> int:
    """How many variants of this file's kernels the process has compiled, or loaded from Triton's cache, by now."""
    kernels = [kernel for kernel in globals().values() if isinstance(kernel, triton.runtime.JITFunction)]
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


def launch_options(device: torch.device) -> dict:
    overlap = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if overlap else {"PDL": False}


# --- What ranks tell each other ---------------------------------------------------------------------------------------

# Each rank writes numbers into the memory of the others as words of a number and the round's count, which arrive
# together, so that nobody waits for more than the words (as NCCL's protocol LL). A program of a rank is at most one
# round ahead of the same one of another, so two places for each word are enough, and one where every other round is in
# another inbox. Words of numbers of 16 bits have 32, with the count's last 16: what is in a place is of this round or
# of the one before it there. An inbox is [places, ranks, SIZE] words of 64 or 32 bits, and then, behind what 64 would
# take, the counts of the programs' rounds.
#
# Triton has no volatile store, as NCCL uses; nothing here holds a plain one back, and on H100s all words came.


@triton.jit
def _inboxes(peers_ptr, RANKS: tl.constexpr):
    """Every rank's inbox. Addresses never change, so that they are read before a kernel waits for its inputs."""
    inboxes = ()
    for rank in tl.static_range(RANKS):
        inboxes = inboxes + (tl.load(peers_ptr + rank).to(tl.pointer_type(tl.int64)),)
    return inboxes


@triton.jit
def _words(inbox, dtype: tl.constexpr):
    """The inbox as words for numbers of this kind."""
    WORD: tl.constexpr = tl.int32 if dtype.primitive_bitwidth == 16 else tl.int64
    return tl.multiple_of(inbox.to(tl.pointer_type(WORD), bitcast=True), 16)


@triton.jit
def _tell(values, count, inside, place, inboxes, SIZE, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Write values, float32 or of 16 bits, to their place at every other rank, which has SIZE words from each."""
    if values.dtype.primitive_bitwidth == 16:
        words = (count.to(tl.int32) << 16) | values.to(tl.uint16, bitcast=True).to(tl.int32)
    else:
        words = (count << 32) | values.to(tl.uint32, bitcast=True).to(tl.int64)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            tl.store(_words(inboxes[rank], values.dtype) + place + RANK * SIZE, words, mask=inside)


@triton.jit
def _hear(words_ptr, count, inside, dtype: tl.constexpr):
    """The values of this round at these places, when they have come."""
    SHORT: tl.constexpr = dtype.primitive_bitwidth == 16
    count = count.to(tl.int16 if SHORT else tl.int32)
    words = tl.load(words_ptr, mask=inside, other=0, volatile=True)
    while tl.max((inside & ((words >> (16 if SHORT else 32)).to(count.dtype) != count)).to(tl.int32), 0) > 0:
        words = tl.load(words_ptr, mask=inside, other=0, volatile=True)
    return words.to(tl.uint16 if SHORT else tl.uint32).to(dtype, bitcast=True)


@triton.jit
def _tell_rows(y, rows, N, count, inboxes, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Tell all ranks these rows of N, of which each has a count of its own, for the `add_norm` that comes next."""
    _tell(y, count, rows < N, rows, inboxes, N, RANK, RANKS)
    tl.debug_barrier()  # all warps have read the count
    tl.store(inboxes[RANK] + RANKS * N + rows, count, mask=rows < N)


# --- Matrix-vector products -------------------------------------------------------------------------------------------


@triton.jit
def _wait_for_inputs(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _wait_for_choice(PDL: tl.constexpr):
    """The other way round: the next kernel starts when those before this one have ended, and so may read, without
    waiting, which experts they chose."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _row_dot(x_ptr, w_ptr, w, K: tl.constexpr, BLOCK: tl.constexpr):
    """A row of weights, of which the first tile `w` is there, times x."""
    at = tl.arange(0, BLOCK)
    WHOLE: tl.constexpr = K // BLOCK * BLOCK
    total = w.to(tl.float32) * tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
    for first in range(BLOCK, WHOLE, BLOCK):
        total += tl.load(w_ptr + first + at).to(tl.float32) * tl.load(x_ptr + first + at).to(tl.float32)
    if BLOCK <= WHOLE and WHOLE < K:
        w = tl.load(w_ptr + WHOLE + at, mask=WHOLE + at < K, other=0)
        total += w.to(tl.float32) * tl.load(x_ptr + WHOLE + at, mask=WHOLE + at < K, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def _activate(x, ACT: tl.constexpr, dtype: tl.constexpr):
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
def _gate(gate, up, ACT: tl.constexpr, CLAMP: tl.constexpr, dtype: tl.constexpr):
    """act(gate) * up, with a clamp as `GPTConfig.gate_clamp` says."""
    up = up.to(dtype).to(tl.float32)
    if CLAMP is not None:
        gate = tl.minimum(gate.to(dtype).to(tl.float32), CLAMP)
        up = tl.minimum(tl.maximum(up, -CLAMP), CLAMP) + 1
    return _activate(gate, ACT, dtype) * up


# A kernel is compiled anew for each constant, and for integers that are 1 or multiples of 16. So the number of tokens,
# which changes from prompt to prompt, is an integer whose alignment does not count, and tiles have two sizes. Of long
# argument lists the first lines are tensors and numbers, and the last ones constants; hence `fmt: skip`.
jit_for_any_T = triton.jit(do_not_specialize_on_alignment=["T"])


@jit_for_any_T
def _matvec_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, y_ptr, chosen_ptr, peers_ptr, T, N,
    USED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, GATED: tl.constexpr,
    ACT: tl.constexpr, CLAMP: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of float or int8 weights [N, K] a program; GATED: that row of [2 N, K] as gate, and row N + it as up.
    A bias [N] or [2 N] is added before the activation, if there is one.

    Of experts, which stand one under the other, it is a row of the one that `chosen_ptr` has for each of T pairs of a
    token and one of its USED places. The pairs come one after the other, so that equal choices find a row in the cache.
    """
    pair, row = tl.program_id(0) % T, tl.program_id(0) // T
    at = tl.arange(0, BLOCK)
    w_row = row.to(tl.int64)
    if chosen_ptr is not None:
        _wait_for_choice(PDL)
        w_row += tl.load(chosen_ptr + pair) * (2 * N if GATED else N)
        x_ptr += pair // USED * K
        y_ptr += pair * N
    up_ptr = w_ptr + (w_row + N) * K
    w_ptr += w_row * K
    w = tl.load(w_ptr + at, mask=at < K, other=0)
    if GATED:
        w_up = tl.load(up_ptr + at, mask=at < K, other=0)
    if RANKS > 1:
        inboxes = _inboxes(peers_ptr, RANKS)
    if chosen_ptr is None:
        _wait_for_inputs(PDL)
    if RANKS > 1:
        count = tl.load(inboxes[RANK] + RANKS * N + row) + 1
    y = _row_dot(x_ptr, w_ptr, w, K, BLOCK)
    if SCALED:
        y *= tl.load(s_ptr + w_row).to(tl.float32)
    if b_ptr is not None:
        y += tl.load(b_ptr + w_row).to(tl.float32)
    if GATED:
        up = _row_dot(x_ptr, up_ptr, w_up, K, BLOCK)
        if SCALED:
            up *= tl.load(s_ptr + w_row + N).to(tl.float32)
        if b_ptr is not None:
            up += tl.load(b_ptr + w_row + N).to(tl.float32)
        y = _gate(y, up, ACT, CLAMP, y_ptr.dtype.element_ty)
    elif ACT is not None:
        y = _activate(y, ACT, y_ptr.dtype.element_ty)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row, y)
    if RANKS > 1:
        _tell_rows(y, row, N, count, inboxes, RANK, RANKS)


@jit_for_any_T
def _experts_sum_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, y_ptr, weights_ptr, chosen_ptr, peers_ptr, T, N,
    USED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The sum over a token's experts of one row of each, [N, K], times its own x [K], times its weight."""
    token, row = tl.program_id(0) % T, tl.program_id(0) // T
    at = tl.arange(0, BLOCK)
    chosen_ptr += token * USED
    first = w_ptr + (tl.load(chosen_ptr) * N + row) * K
    w = tl.load(first + at, mask=at < K, other=0)
    if RANKS > 1:
        inboxes = _inboxes(peers_ptr, RANKS)
    _wait_for_inputs(PDL)
    if RANKS > 1:
        count = tl.load(inboxes[RANK] + RANKS * N + row) + 1
    y = 0.0
    for i in tl.static_range(USED):
        w_row = tl.load(chosen_ptr + i) * N + row
        if i > 0:
            w = tl.load(w_ptr + w_row * K + at, mask=at < K, other=0)
        out = _row_dot(x_ptr + (token * USED + i) * K, w_ptr + w_row * K, w, K, BLOCK)
        if SCALED:
            out *= tl.load(s_ptr + w_row).to(tl.float32)
        if b_ptr is not None:
            out += tl.load(b_ptr + w_row).to(tl.float32)
        out = out.to(y_ptr.dtype.element_ty).to(tl.float32)
        y += out * tl.load(weights_ptr + token * USED + i).to(tl.float32)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + token * N + row, y)
    if RANKS > 1:
        _tell_rows(y, row, N, count, inboxes, RANK, RANKS)


# Weights of 4 bits, in words of 8 columns, as they are on disk. KIND is "floats": a group has a scale and a zero point;
# "bytes": it has bytes of both, as `in_bytes` makes them; "fp4": MXFP4, whose scales are exponents.


@triton.jit
def _dot_bytes(a, b, total):
    """total and the products of the four signed bytes of a and b."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _pick_bytes(first, second, places):
    """Of the 8 bytes of two words those at four places, the last four nibbles of `places`, which are below 8."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [first, second, places], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _to_bytes(x):
    """Words [W] of the signed bytes nearest to x [W, 4], and what is left of x."""
    rounded = x + 12582912.0  # 1.5 * 2^23: the last byte of the sum is the integer
    bits = (rounded.to(tl.int32, bitcast=True) & 255) << (tl.arange(0, 4) * 8)[None, :]
    return tl.sum(bits, 1), x - (rounded - 12582912.0)


@triton.jit
def _x_in_bytes(x_ptr, first, K: tl.constexpr, BLOCKS: tl.constexpr, MASKED: tl.constexpr, KIND: tl.constexpr):
    """x from block `first` on as step * (254 * byte + second byte + third byte / 254, of float32 alone), in blocks of
    32 columns. Two words for 8 columns' bytes, two for second ones, their sum [4 BLOCKS], the steps [BLOCKS], and
    words and sums of third ones. A NaN becomes the step of its block."""
    at = first * 32 + tl.arange(0, BLOCKS * 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    if MASKED:
        x = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
    else:
        x = tl.load(x_ptr + at).to(tl.float32)
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # of integers, because NaN is the largest of these
    top = tl.maximum(tl.max(tl.reshape(top, [BLOCKS, 4]), 1), 0x0DA24260).to(tl.float32, bitcast=True)  # 1e-30
    x *= tl.reshape(tl.broadcast_to((127 / top)[:, None], [BLOCKS, 4]), [BLOCKS * 4])[:, None]
    if KIND == "fp4":  # four neighbours in a word, else every second column, as `_weights_in_bytes` has them
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
    if x_ptr.dtype.element_ty == tl.float32:
        a_third, a = _to_bytes(a * 254)
        b_third, b = _to_bytes(b * 254)
        third_sums = _dot_bytes(b_third, 0x01010101, _dot_bytes(a_third, 0x01010101, 0))
    return a_bytes, b_bytes, a_second, b_second, sums, top * (1 / (127 * 254)), a_third, b_third, third_sums


@triton.jit
def _fp4_in_bytes(places, negative):
    """Twice the numbers of four nibbles: the places without their signs, and 1 where that is negative."""
    plus = _pick_bytes(0x03020100, 0x0C080604, places)
    minus = _pick_bytes(0xFDFEFF00 - 2**32, 0xF4F8FAFC - 2**32, places)
    sign = _pick_bytes(0xFF00, 0, negative)
    return (minus & sign) | (plus & ~sign)


@triton.jit
def _weights_in_bytes(words, KIND: tl.constexpr):
    """Two words of bytes: twice the numbers of MXFP4, or q from 0 to 15."""
    if KIND == "fp4":
        places, negative = words & 0x77777777, (words >> 3) & 0x11111111
        first, second = _fp4_in_bytes(places, negative), _fp4_in_bytes(places >> 16, negative >> 16)
    else:
        first, second = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F
    return first, second


@triton.jit
def _byte_to_float(byte):
    """A byte without sign, by its place in a float32 instead of a conversion."""
    return (byte | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _int4_load(
    weights, rows, inside, first,
    K: tl.constexpr, G: tl.constexpr, BLOCKS: tl.constexpr, MASKED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A tile of weights: words [rows, 4 BLOCKS], and what is stored of scales and zeros [rows, BLOCKS]."""
    w_ptr, s_ptr, z_ptr = weights
    at, block = first * 4 + tl.arange(0, BLOCKS * 4)[None, :], first + tl.arange(0, BLOCKS)[None, :]
    w_at, group = w_ptr + rows * (K // 8) + at, rows * (K // G) + block // (G // 32)
    if MASKED:
        inside_groups = inside & (block < K // 32)
        words = tl.load(w_at, mask=inside & (at < K // 8), other=0)
        scale = tl.load(s_ptr + group, mask=inside_groups, other=0)
        zero = tl.load(z_ptr + group, mask=inside_groups, other=0) if KIND == "floats" else scale
    else:
        words, scale = tl.load(w_at), tl.load(s_ptr + group)
        zero = tl.load(z_ptr + group) if KIND == "floats" else scale
    return words, scale, zero


@triton.jit
def _int4_dot(tile, x, zero_step, ROWS: tl.constexpr, BLOCKS: tl.constexpr, KIND: tl.constexpr, THREE: tl.constexpr):
    """Products [ROWS, BLOCKS] of what `_int4_load` and `_x_in_bytes` gave, with two bytes of x or THREE."""
    words, scale, zero = tile
    a_bytes, b_bytes, a_second, b_second, sums, step, a_third, b_third, third_sums = x
    a, b = _weights_in_bytes(words, KIND)
    minus: tl.constexpr = 0 if KIND == "fp4" else 8  # q - 8
    dot = _dot_bytes(b, b_bytes[None, :], _dot_bytes(a, a_bytes[None, :], 0)) * 254 - minus * sums[None, :]
    dot = _dot_bytes(b, b_second[None, :], _dot_bytes(a, a_second[None, :], dot))
    dot = tl.sum(tl.reshape(dot, [ROWS, BLOCKS, 4]), 2).to(tl.float32)
    x_sum = tl.sum(tl.reshape(sums, [BLOCKS, 4]), 1).to(tl.float32)[None, :]
    if THREE:
        third = _dot_bytes(b, b_third[None, :], _dot_bytes(a, a_third[None, :], -minus * third_sums[None, :]))
        dot += tl.sum(tl.reshape(third, [ROWS, BLOCKS, 4]), 2).to(tl.float32) * (1 / 254)
        x_sum += tl.sum(tl.reshape(third_sums, [BLOCKS, 4]), 1).to(tl.float32)[None, :] * (1 / 254)
    if KIND == "fp4":
        dot *= (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True) * 0.5
    elif KIND == "bytes":
        both = scale.to(tl.int32)
        zero = _byte_to_float((both >> 8 & 255) ^ 128) - 128.0
        dot = _byte_to_float(both & 255) * dot + zero * (zero_step * x_sum)
    else:
        dot = scale.to(tl.float32) * dot + zero.to(tl.float32) * x_sum
    return dot * step[None, :]


@triton.jit
def _int4_rows_dot(
    x_ptr, weights, tile, rows, inside,
    K: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Rows of weights, of which the first tile is there, times x; [ROWS, 1]."""
    WHOLE: tl.constexpr = K // 32 // BLOCKS * BLOCKS
    THREE: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    factor, zero_step = 1.0, 1.0
    if KIND == "bytes":
        factor = tl.load(weights[2] + 2 * rows, mask=inside, other=0.0)
        zero_step = tl.load(weights[2] + 2 * rows + 1, mask=inside, other=0.0)
    x = _x_in_bytes(x_ptr, 0, K, BLOCKS, BLOCKS > WHOLE, KIND)
    total = _int4_dot(tile, x, zero_step, ROWS, BLOCKS, KIND, THREE)
    for first in range(BLOCKS, WHOLE, BLOCKS):
        later = _int4_load(weights, rows, inside, first, K, G, BLOCKS, not EVEN, KIND)
        x = _x_in_bytes(x_ptr, first, K, BLOCKS, False, KIND)
        total += _int4_dot(later, x, zero_step, ROWS, BLOCKS, KIND, THREE)
    if BLOCKS <= WHOLE and WHOLE < K // 32:
        last = _int4_load(weights, rows, inside, WHOLE, K, G, BLOCKS, True, KIND)
        total += _int4_dot(last, _x_in_bytes(x_ptr, WHOLE, K, BLOCKS, True, KIND), zero_step, ROWS, BLOCKS, KIND, THREE)
    return tl.sum(total, 1)[:, None] * factor


@jit_for_any_T
def _int4_matvec_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, b_ptr, y_ptr, chosen_ptr, peers_ptr, T, N,
    USED: tl.constexpr, K: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    EVEN: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, CLAMP: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS of N rows and all of T tokens a program; GATED: half as many as gate, and as many from row N on as up.

    Of experts a program takes one of T pairs of a token and an expert. They and the bias are as for `_matvec_kernel`.
    """
    DIFFERENT: tl.constexpr = ROWS // 2 if GATED else ROWS
    i = tl.arange(0, ROWS)[:, None]
    program, tokens, first = tl.program_id(0), T, 0
    if chosen_ptr is not None:
        pair, program, tokens = program % T, program // T, 1
        _wait_for_choice(PDL)
        first = tl.load(chosen_ptr + pair) * (2 * N if GATED else N)
        x_ptr += pair // USED * K
        y_ptr += pair * N
    out = program * DIFFERENT + i % DIFFERENT
    rows, inside, weights = first + out + i // DIFFERENT * N, out < N, (w_ptr, s_ptr, z_ptr)
    tile = _int4_load(weights, rows, inside, 0, K, G, BLOCKS, not (EVEN and BLOCKS <= K // 32), KIND)
    if RANKS > 1:
        inboxes = _inboxes(peers_ptr, RANKS)
    if chosen_ptr is None:
        _wait_for_inputs(PDL)
    if RANKS > 1:
        count = tl.load(inboxes[RANK] + RANKS * N + out, mask=inside, other=0) + 1
    for _ in range(tokens):
        y = _int4_rows_dot(x_ptr, weights, tile, rows, inside, K, G, ROWS, BLOCKS, EVEN, KIND)
        if b_ptr is not None:
            y += tl.load(b_ptr + rows, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(y, [2, DIFFERENT]), (1, 0)))
            y = _gate(gate, up, ACT, CLAMP, y_ptr.dtype.element_ty)
            at = program * DIFFERENT + tl.arange(0, DIFFERENT)
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < N)
        else:
            if ACT is not None:
                y = _activate(y, ACT, y_ptr.dtype.element_ty)
            y = y.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + out, y, mask=inside)
            if RANKS > 1:  # of one token
                _tell_rows(y, out, N, count, inboxes, RANK, RANKS)
        x_ptr += K
        y_ptr += N


@jit_for_any_T
def _int4_experts_sum_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, b_ptr, y_ptr, weights_ptr, chosen_ptr, peers_ptr, T, N,
    USED: tl.constexpr, K: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    EVEN: tl.constexpr, KIND: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS of N rows and one token a program, else as `_experts_sum_kernel`."""
    token = tl.program_id(0) % T
    out = tl.program_id(0) // T * ROWS + tl.arange(0, ROWS)[:, None]
    inside, weights = out < N, (w_ptr, s_ptr, z_ptr)
    chosen_ptr += token * USED
    if RANKS > 1:
        inboxes = _inboxes(peers_ptr, RANKS)
    _wait_for_inputs(PDL)
    if RANKS > 1:
        count = tl.load(inboxes[RANK] + RANKS * N + out, mask=inside, other=0) + 1
    total = tl.zeros([ROWS, 1], tl.float32)
    for i in tl.static_range(USED):
        rows = tl.load(chosen_ptr + i) * N + out
        tile = _int4_load(weights, rows, inside, 0, K, G, BLOCKS, not (EVEN and BLOCKS <= K // 32), KIND)
        x_at = x_ptr + (token * USED + i) * K
        y = _int4_rows_dot(x_at, weights, tile, rows, inside, K, G, ROWS, BLOCKS, EVEN, KIND)
        if b_ptr is not None:
            y += tl.load(b_ptr + rows, mask=inside, other=0.0).to(tl.float32)
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        total += y * tl.load(weights_ptr + token * USED + i).to(tl.float32)
    y = total.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + token * N + out, y, mask=inside)
    if RANKS > 1:
        _tell_rows(y, out, N, count, inboxes, RANK, RANKS)


# --- More than one token ----------------------------------------------------------------------------------------------


@triton.jit
def _two_int8_kernel(x_ptr, q_ptr, s_ptr, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """A token's x [K] as (q1 + q2 / 254) times a scale, two rows of int8: 15 bits of the largest number."""
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    _wait_for_inputs(PDL)
    x = tl.load(x_ptr + token * K + at, mask=at < K, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-30) / 127
    x /= scale
    high = x + 12582912.0  # the nearest integer stands in the last bits
    low = (x - (high - 12582912.0)) * 254 + 12582912.0
    q_ptr += token * 2 * K + at
    tl.store(q_ptr, high.to(tl.int32, bitcast=True).to(tl.int8), mask=at < K)
    tl.store(q_ptr + K, low.to(tl.int32, bitcast=True).to(tl.int8), mask=at < K)
    tl.store(s_ptr + token, scale)


@gluon.jit(do_not_specialize_on_alignment=["T"])
def _few_tokens_kernel(
    w_desc, x_desc, x_scale_ptr, s_ptr, b_ptr, y_ptr, T, N, K,
    STAGES: gl.constexpr, ACT: gl.constexpr, CLAMP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Some of N rows of weights [1 or 2, N, K] times all of T tokens, as columns of a tensor core's product; of 2 parts
    the first is gate, the other up. The first tiles of weights are on their way before the wait for x. int8 weights
    take x as `_two_int8_kernel` makes it.
    """
    PARTS: gl.constexpr = w_desc.block_type.shape[0]
    ROWS: gl.constexpr = w_desc.block_type.shape[1]
    BLOCK: gl.constexpr = w_desc.block_type.shape[2]
    COLS: gl.constexpr = x_desc.block_type.shape[0]
    SIZE: gl.constexpr = w_desc.dtype.primitive_bitwidth // 8
    BYTES: gl.constexpr = (PARTS * ROWS + COLS) * BLOCK * SIZE
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLS, 32 // SIZE])
    w = gl.allocate_shared_memory(w_desc.dtype, [STAGES, PARTS, ROWS, BLOCK], w_desc.layout)
    x = gl.allocate_shared_memory(x_desc.dtype, [STAGES, COLS, BLOCK], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    row = gl.program_id(0) * ROWS
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(i), count=1)
        hopper.mbarrier.expect(full.index(i), BYTES)
        hopper.tma.async_copy_global_to_shared(w_desc, [0, row, i * BLOCK], full.index(i), w.index(i))
    _wait_for_inputs(PDL)
    for i in gl.static_range(STAGES):
        hopper.tma.async_copy_global_to_shared(x_desc, [0, i * BLOCK], full.index(i), x.index(i))
    y = gl.zeros([PARTS * ROWS, COLS], gl.int32 if SIZE == 1 else gl.float32, mma)
    steps = gl.maximum(gl.cdiv(K, BLOCK), STAGES)  # beyond K all are zeros
    for step in range(steps):
        slot = step % STAGES
        hopper.mbarrier.wait(full.index(slot), step // STAGES & 1)
        rows = w.index(slot).reshape([PARTS * ROWS, BLOCK])
        y = hopper.warpgroup_mma(rows, x.index(slot).permute((1, 0)), y)
        more, at = step + STAGES < steps, (step + STAGES) * BLOCK
        hopper.mbarrier.expect(full.index(slot), BYTES, more)
        hopper.tma.async_copy_global_to_shared(w_desc, [0, row, at], full.index(slot), w.index(slot), more)
        hopper.tma.async_copy_global_to_shared(x_desc, [0, at], full.index(slot), x.index(slot), more)
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
        y = _gate(gate, up, ACT, CLAMP, y_ptr.dtype.element_ty)
    elif ACT is not None:
        y = _activate(y, ACT, y_ptr.dtype.element_ty)
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
        y = _fp4(q) * ((scale.to(tl.int32) << 23).to(tl.float32, bitcast=True) * 8.507059173023462e37)
    else:
        zero = tl.load(z_ptr + at // G, mask=at < total, other=0.0).to(tl.float32)
        y = (q.to(tl.float32) - 8) * scale.to(tl.float32) + zero
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=at < total)


def in_bytes(scales: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int16 [N, K/G], float32 [N, 2]) of int4's scales and zeros [N, K/G], if these are such numbers as
    `quantized_linear.Int4Linear.quantize` makes, which bytes hold; else themselves.

    A scale is the low byte, a zero point the high one. What a row's bytes count by is first the step of its scales,
    then how many of those a step of its zeros is.
    """
    steps = [torch.ldexp(torch.ones(len(t), 1, device=t.device), t.float().abs().amax(1, True).frexp()[1] - bits)
             for t, bits in ((scales, 8), (zeros, 7))]  # fmt: skip
    scale, zero = (t.float() / step for t, step in zip((scales, zeros), steps, strict=True))
    if not ((scale == scale.round()) & (zero == zero.round()) & (scale >= 0)).all():
        return scales, zeros
    both = (zero.int() << 8 | scale.int()).to(torch.int16)
    return both, torch.cat([steps[0], steps[1] / steps[0]], dim=1)


def from_bytes(both: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros in float32 of what `in_bytes` gave; of other scales and zeros, themselves."""
    if both.dtype != torch.int16:
        return both, steps
    return (both & 255) * steps[:, :1], (both >> 8) * (steps[:, 1:] * steps[:, :1])


def columns(weight: torch.Tensor) -> int:
    """K of a weight as for `linear`; a byte of packed ones is two numbers."""
    return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)


@torch.library.custom_op("gpt_twin::dequantize", mutates_args=(), device_types="cuda")
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


@dequantize.register_fake
def _(weight, scales, zeros, dtype):
    return weight.new_empty(weight.shape[0], columns(weight), dtype=dtype)


def int4_options(N: int, K: int, scales, rows: int) -> dict:
    """Constants of the int4 kernels, which take ROWS rows a program, `rows` of them of one kind."""
    kind = {torch.uint8: "fp4", torch.int16: "bytes"}.get(scales.dtype, "floats")
    blocks = min(128, triton.next_power_of_2(K // 32))
    return {"K": K, "G": K // scales.shape[1], "ROWS": 16, "BLOCKS": blocks, "EVEN": N % rows == 0, "KIND": kind}


def launch_matvec(x, weights, y, act: tuple = (None, False, None), chosen=None, to=(None, 0)) -> None:
    """Fill y [T, N] for x [T, K], or, with `chosen` [T/used, used], for x [T/used, K].

    `weights` are the weight, scales, zeros and bias of `linear`, `act` its activation, gated and clamp, `to` its peers
    and rank. Without `chosen`, T above 1 is for packed ones.
    """
    (T, N), K = y.shape, x.shape[1]
    weight, scales, zeros, bias = weights
    used = 1 if chosen is None else chosen.shape[1]
    (activation, gated, clamp), (peers, rank) = act, to
    options = {"USED": used, "GATED": gated, "ACT": activation, "CLAMP": clamp} | launch_options(x.device)
    options |= {"RANK": rank, "RANKS": 1 if peers is None else len(peers)}
    if weight.dtype != torch.uint8:
        block, warps = (512, 2) if gated and scales is not None else (1024, 4)
        _matvec_kernel[(N * T,)](
            x, weight, scales, bias, y, chosen, peers, T, N,
            K=K, BLOCK=block, SCALED=scales is not None, num_warps=warps, **options,
        )  # fmt: skip
    else:
        rows = 8 if gated else 16
        options |= int4_options(N, K, scales, rows)
        grid = (triton.cdiv(N, rows) * (1 if chosen is None else T),)
        words = weight.view(torch.int32)
        _int4_matvec_kernel[grid](x, words, scales, zeros, bias, y, chosen, peers, T, N, num_warps=8, **options)


def takes_few_tokens(x, weight: torch.Tensor) -> bool:
    """Whether `linear` takes 2 to 64 tokens of such x by `_few_tokens_kernel`: Hopper, rows of whole 16 bytes."""
    return (
        torch.cuda.get_device_capability(x.device)[0] == 9
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype in (x.dtype, torch.int8)
        and weight.shape[1] * weight.element_size() % 16 == 0
    )


def launch_few_tokens(x, weights, y, act: tuple) -> None:
    """As `launch_matvec`, for T up to 64 and weights that `takes_few_tokens`."""
    (T, N), K = y.shape, x.shape[1]
    (weight, scales, _, bias), (activation, gated, clamp) = weights, act
    options, x_scales, columns = launch_options(x.device), None, 16 if T <= 16 else 64
    if scales is not None:
        q, x_scales = x.new_empty(T * 2, K, dtype=torch.int8), x.new_empty(T, dtype=torch.float32)
        _two_int8_kernel[(T,)](x, q, x_scales, K=K, BLOCK=triton.next_power_of_2(K), num_warps=8, **options)
        x, columns = q, 2 * columns
    bits, block = 8 * x.element_size(), 256 // x.element_size()
    weight = weight.view(2 if gated else 1, N, K)
    weight = TensorDescriptor.from_tensor(weight, [len(weight), 64, block], gl.NVMMASharedLayout(128, bits, 3))
    x = TensorDescriptor.from_tensor(x, [columns, block], gl.NVMMASharedLayout(128, bits, 2))
    # A block takes most of a multiprocessor's shared memory, of the faster int8 ones half. With room for three a layer
    # took 153 us instead of 144; early blocks may then crowd onto a few multiprocessors, which nobody has looked at.
    stage = 256 * (weight.block_shape[0] * 64 + columns)
    stages = min(6, (110_000 if scales is not None and T <= 16 else 200_000) // stage)
    _few_tokens_kernel[(triton.cdiv(N, 64),)](
        weight, x, x_scales, scales, bias, y, T, N, K,
        STAGES=stages, ACT=activation, CLAMP=clamp, num_warps=4, **options,
    )  # fmt: skip


@torch.library.custom_op("gpt_twin::linear", mutates_args=(), device_types="cuda")
def linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None = None, zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, activation: str | None = None, gated: bool = False, clamp: float | None = None,
    peers: torch.Tensor | None = None, rank: int = 0,
) -> torch.Tensor:  # fmt: skip
    """y [T, N] for x [T, K]; weight [N, K], or int8 and scales [N], or of `int4_layout`, scales and zeros [N, K/G]; or
    MXFP4 in that layout, and scales [N, K/32] in uint8.

    For T = 1, and where `takes_few_tokens`, there may be an `activation` (of `fast_model.ACTIVATIONS`) of the result
    with its bias [N], and if it is `gated`, y [T, N/2] is activation(first half) * second half, with a clamp as
    `GPTConfig.gate_clamp` says. With `peers`, addresses of inboxes of `told_words`, a y of T = 1 that is not gated is
    told to all ranks for the `add_norm` that comes next.
    """
    x = x.contiguous()
    (T, K), N = x.shape, weight.shape[0]
    few = 1 < T <= 64 and takes_few_tokens(x, weight)
    packed = weight.dtype == torch.uint8
    if scales is not None and T > (6 if packed else 64):
        weight, scales = dequantize(weight, scales, zeros, x.dtype), None
    assert T == 1 or few or activation is None
    assert peers is None or (T == 1 and not gated)
    if T > 1 and scales is None and not few:
        return F.linear(x, weight, bias)
    y = torch.empty(T, N // 2 if gated else N, dtype=x.dtype, device=x.device)
    if T > 1 and not few and not packed:
        BT, BN, BK = (16, 32, 256) if T <= 16 else (64, 64, 128)
        grid = (triton.cdiv(N, BN), triton.cdiv(T, BT))
        _int8_matmul_kernel[grid](x, weight, scales, y, T, N, K, BT=BT, BN=BN, BK=BK, num_warps=4, num_stages=3)
        return y if bias is None else y + bias
    if few:
        launch_few_tokens(x, (weight, scales, zeros, bias), y, (activation, gated, clamp))
    else:
        launch_matvec(x, (weight, scales, zeros, bias), y, (activation, gated, clamp), to=(peers, rank))
    return y


@linear.register_fake
def _(x, weight, scales=None, zeros=None, bias=None, activation=None, gated=False, clamp=None, peers=None, rank=0):
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if gated else weight.shape[0])


# --- Experts of a few tokens ------------------------------------------------------------------------------------------


@triton.jit
def _choose_experts_kernel(
    logits_ptr, weights_ptr, chosen_ptr,
    E: tl.constexpr, USED: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    expert, place = tl.arange(0, BLOCK), tl.arange(0, PLACES)
    _wait_for_inputs(PDL)
    logits = tl.load(logits_ptr + token * E + expert, mask=expert < E, other=float("-inf")).to(tl.float32)
    rest = tl.exp(logits - tl.max(logits, 0))
    rest = tl.where(expert < E, rest / tl.sum(rest, 0), -1.0)
    chosen, weights = tl.zeros([PLACES], tl.int64), tl.zeros([PLACES], tl.float32)
    for i in tl.static_range(USED):
        best = tl.minimum(tl.argmax(rest, 0), E - 1)  # inside, whatever a NaN does
        chosen = tl.where(place == i, best, chosen)
        weights = tl.where(place == i, tl.sum(tl.where(expert == best, rest, 0.0), 0), weights)
        rest = tl.where(expert == best, -1.0, rest)
    if NORM:
        weights /= tl.sum(weights, 0)
    tl.store(chosen_ptr + token * USED + place, chosen, mask=place < USED)
    tl.store(weights_ptr + token * USED + place, weights.to(weights_ptr.dtype.element_ty), mask=place < USED)


@torch.library.custom_op("gpt_twin::choose_experts", mutates_args=(), device_types="cuda")
def choose_experts(logits: torch.Tensor, used: int, norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, chosen), each [T, used], of router logits [T, E]; with `norm` the weights of a token sum to 1."""
    logits, (T, E) = logits.contiguous(), logits.shape
    weights, chosen = logits.new_empty(T, used), logits.new_empty(T, used, dtype=torch.int64)
    shape = {"E": E, "USED": used, "BLOCK": triton.next_power_of_2(E), "PLACES": triton.next_power_of_2(used)}
    _choose_experts_kernel[(T,)](
        logits, weights, chosen, **shape, NORM=norm, num_warps=1, **launch_options(logits.device)
    )
    return weights, chosen


@choose_experts.register_fake
def _(logits, used, norm):
    return logits.new_empty(len(logits), used), logits.new_empty(len(logits), used, dtype=torch.int64)


@torch.library.custom_op("gpt_twin::gated_experts", mutates_args=(), device_types="cuda")
def gated_experts(
    x: torch.Tensor, chosen: torch.Tensor, experts: int, activation: str, clamp: float | None, weight: torch.Tensor,
    scales: torch.Tensor | None = None, zeros: torch.Tensor | None = None, bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """activation(gate) * up [T used, F] of x [T, K] by each of a token's `chosen` [T, used].

    So many experts' matrices, F rows of gate and F of up, stand one under the other in a weight as for `linear`, and
    so do their biases.
    """
    x = x.contiguous()
    y = x.new_empty(chosen.numel(), weight.shape[0] // experts // 2)
    launch_matvec(x, (weight, scales, zeros, bias), y, (activation, True, clamp), chosen)
    return y


@gated_experts.register_fake
def _(x, chosen, experts, activation, clamp, weight, scales=None, zeros=None, bias=None):
    return x.new_empty(chosen.numel(), weight.shape[0] // experts // 2)


@torch.library.custom_op("gpt_twin::sum_experts", mutates_args=(), device_types="cuda")
def sum_experts(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, experts: int, weight: torch.Tensor,
    scales: torch.Tensor | None = None, zeros: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    peers: torch.Tensor | None = None, rank: int = 0,
) -> torch.Tensor:  # fmt: skip
    """y [T, N], the products of x [T used, K] with its `chosen` [T, used] experts' matrices, summed by `weights`.
    With `peers`, y is told as by `linear`.

    The `chosen` are those of the `gated_experts` before it: on Hopper this kernel reads them before that one has ended.
    """
    x, (T, used) = x.contiguous(), chosen.shape
    K, N = x.shape[1], weight.shape[0] // experts
    y = x.new_empty(T, N)
    assert T == 1 or peers is None
    options = {"USED": used, "RANK": rank, "RANKS": 1 if peers is None else len(peers)} | launch_options(x.device)
    if weight.dtype != torch.uint8:
        _experts_sum_kernel[(N * T,)](
            x,
            weight,
            scales,
            bias,
            y,
            weights,
            chosen,
            peers,
            T,
            N,
            K=K,
            BLOCK=1024,
            SCALED=scales is not None,
            **options,
        )
    else:
        options |= int4_options(N, K, scales, 16)
        grid = (triton.cdiv(N, 16) * T,)
        words = weight.view(torch.int32)
        arguments = (x, words, scales, zeros, bias, y, weights, chosen, peers, T, N)
        _int4_experts_sum_kernel[grid](*arguments, num_warps=8, **options)
    return y


@sum_experts.register_fake
def _(x, weights, chosen, experts, weight, scales=None, zeros=None, bias=None, peers=None, rank=0):
    return x.new_empty(len(chosen), weight.shape[0] // experts)


# --- Numbers of every rank --------------------------------------------------------------------------------------------


MOST_GATHERED = 2**18  # numbers of a rank, for which an inbox has room: 8 MB for two ranks
GATHERED = 512  # by a program


@triton.jit(do_not_specialize=["n"])
def _gather_kernel(
    x_ptr, y_ptr, peers_ptr, n,
    RANK: tl.constexpr, RANKS: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    inboxes = _inboxes(peers_ptr, RANKS)
    count_ptr = inboxes[RANK] + 2 * RANKS * MOST + program
    _wait_for_inputs(PDL)
    count = tl.load(count_ptr) + 1
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    place = (count & 1) * RANKS * MOST + at
    _tell(x.to(tl.float32), count, inside, place, inboxes, MOST, RANK, RANKS)
    tl.store(y_ptr + RANK * n + at, x, mask=inside)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            theirs = _hear(_words(inboxes[RANK], tl.float32) + place + rank * MOST, count, inside, tl.float32)
            tl.store(y_ptr + rank * n + at, theirs.to(y_ptr.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # all warps have read the count
    tl.store(count_ptr, count)


def gather_words(ranks: int) -> int:
    """Words of 8 bytes, zeros at first, that each rank has for what the others tell it in `gather`."""
    return MOST_GATHERED // GATHERED + 2 * ranks * MOST_GATHERED


@torch.library.custom_op("gpt_twin::gather", mutates_args=(), device_types="cuda")
def gather(x: torch.Tensor, peers: torch.Tensor, rank: int) -> torch.Tensor:
    """Every rank's x [...], as [ranks, ...]; of integers those that float32 holds, up to 2^24.

    `peers` [ranks] are the addresses of the ranks' inboxes (`gather_words`, `tp.shared_memory`). As of `add_norm`, all
    ranks make the same calls, which need one another in turn.
    """
    assert x.numel() <= MOST_GATHERED, "the inboxes have no room for so many numbers"
    y = x.new_empty(len(peers), *x.shape)
    _gather_kernel[(triton.cdiv(x.numel(), GATHERED),)](
        x.contiguous(), y, peers, x.numel(),
        RANK=rank, RANKS=len(peers), MOST=MOST_GATHERED, BLOCK=GATHERED, num_warps=4, **launch_options(x.device),
    )  # fmt: skip
    return y


@gather.register_fake
def _(x, peers, rank):
    return x.new_empty(len(peers), *x.shape)


# --- The residual sum and the norm after it ---------------------------------------------------------------------------


@triton.jit
def _sum_over_ranks(
    values, at, inside, row, inboxes,
    RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, TOLD: tl.constexpr,
):  # fmt: skip
    """The values of every rank, added up in float32 in the order of the ranks, so that all get the same sum."""
    if TOLD:  # by the product before, whose programs have counted already
        count, place = tl.load(inboxes[RANK] + RANKS * D), at
    else:
        count_ptr = inboxes[RANK] + 2 * ROWS * RANKS * D + row
        count = tl.load(count_ptr) + 1
        place = ((count & 1) * ROWS + row) * RANKS * D + at
        _tell(values, count, inside, place, inboxes, D, RANK, RANKS)
    total = tl.zeros(values.shape, tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            total += values.to(tl.float32)
        else:
            words_ptr = _words(inboxes[RANK], values.dtype) + place + rank * D
            total += _hear(words_ptr, count, inside, values.dtype).to(tl.float32)
    if not TOLD:
        tl.debug_barrier()  # all warps have read the count
        tl.store(count_ptr, count)
    return total


@triton.jit
def _load_norm(w_ptr, at, inside, PLUS_ONE: tl.constexpr):
    weight = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return weight + 1.0 if PLUS_ONE else weight


@triton.jit
def _add_norm_kernel(
    x_ptr, update_ptr, w_ptr, b_ptr, post_ptr, sum_ptr, y_ptr, peers_ptr, eps, scale,
    RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    TOLD: tl.constexpr, PLUS_ONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    inside, mine = at < D, tl.program_id(0) * D + at
    if w_ptr is not None:
        weight = _load_norm(w_ptr, at, inside, PLUS_ONE)
    if b_ptr is not None:
        bias = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if post_ptr is not None:
        post = _load_norm(post_ptr, at, inside, PLUS_ONE)
    if RANKS > 1:
        inboxes = _inboxes(peers_ptr, RANKS)
    _wait_for_inputs(PDL)
    x = tl.load(x_ptr + mine, mask=inside, other=0.0).to(tl.float32)
    if update_ptr is not None:
        update = tl.load(update_ptr + mine, mask=inside, other=0.0)
        if RANKS > 1:
            update = _sum_over_ranks(update, at, inside, row, inboxes, RANK, RANKS, ROWS, D, TOLD)
        update = update.to(tl.float32)
        if post_ptr is not None:
            update *= tl.rsqrt(tl.sum(update * update, 0) / D + eps) * post
        x += scale * update
    rounded = x.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + mine, rounded, mask=inside)
    x = rounded.to(tl.float32)
    if b_ptr is not None:
        x = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
    if w_ptr is not None:
        x *= tl.rsqrt(tl.sum(x * x, 0) / D + eps) * weight
    if b_ptr is not None:
        x += bias
    tl.store(y_ptr + mine, x.to(y_ptr.dtype.element_ty), mask=inside)


MOST_ROWS = 16  # of D numbers, for which an inbox has room: 2 MB for two ranks of 4,096. Up to 6 were timed.


def inbox_words(ranks: int, dim: int) -> int:
    """Words of 8 bytes, zeros at first, that each rank has for what the others tell it in `add_norm`."""
    return MOST_ROWS * (1 + 2 * ranks * dim)


def told_words(ranks: int, dim: int) -> int:
    """The same of what products tell in `linear`, which takes two such inboxes in turn."""
    return dim * (1 + ranks) + dim % 2


@torch.library.custom_op("gpt_twin::add_norm", mutates_args=(), device_types="cuda")
def add_norm(
    x: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    post: torch.Tensor | None, eps: float, plus_one: bool = False, scale: float = 1.0,
    peers: torch.Tensor | None = None, rank: int = 0, told: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x [..., D] + scale * update and its norm: LayerNorm with a bias, RMS norm without, none without a weight. With
    `peers` the update is the sum of all ranks', up to MOST_ROWS rows of D. With `post` the update goes through an RMS
    norm of that weight before it is added. With `plus_one` weights are what is added to 1.

    `peers` [ranks] are the addresses of the ranks' inboxes (`inbox_words`, `tp.shared_memory`). An update of one row
    that the `linear` before has `told` is in inboxes of `told_words`. All ranks make the same calls; who comes first
    waits. The compiler is told that this changes nothing: each sum needs the one before it, so none is dropped, joined
    or moved.
    """
    x, update, D = x.contiguous(), None if update is None else update.contiguous(), x.shape[-1]
    total, y = torch.empty_like(x), torch.empty_like(x)
    ranks = 1 if peers is None else len(peers)
    assert ranks == 1 or x.numel() <= (1 if told else MOST_ROWS) * D, "the inboxes have no room for so many rows"
    _add_norm_kernel[(x.numel() // D,)](
        x, update, weight, bias, post, total, y, peers, eps, scale,
        RANK=rank, RANKS=ranks, ROWS=MOST_ROWS, D=D, BLOCK=triton.next_power_of_2(D), TOLD=told, PLUS_ONE=plus_one,
        num_warps=8 if D <= 4096 else 16, **launch_options(x.device),
    )  # fmt: skip
    return total, y


@add_norm.register_fake
def _(x, update, weight, bias, post, eps, plus_one=False, scale=1.0, peers=None, rank=0, told=False):
    return x.new_empty(x.shape), x.new_empty(x.shape)


# --- Attention of a few new tokens to a cache -------------------------------------------------------------------------


@triton.jit
def _rotate(x, other, cos, sin, first_half):
    """RoPE of x, whose other half's partners are `other`; rounded once."""
    return (x.to(tl.float32) * cos + tl.where(first_half, -other.to(tl.float32), other.to(tl.float32)) * sin).to(
        x.dtype
    )


@triton.jit
def _norm_heads(x, other, w_ptr, c, other_half, in_c, eps, C: tl.constexpr, AXIS: tl.constexpr, PLUS_ONE: tl.constexpr):
    """The RMS norm of x over the axis of its numbers c, and of their partners; rounded."""
    x32 = x.to(tl.float32)
    inverse = tl.expand_dims(tl.rsqrt(tl.sum(x32 * x32, AXIS) / C + eps), AXIS)
    weight = tl.expand_dims(_load_norm(w_ptr, c, in_c, PLUS_ONE), 1 - AXIS)
    other_weight = tl.expand_dims(_load_norm(w_ptr, other_half, in_c, PLUS_ONE), 1 - AXIS)
    return (x32 * inverse * weight).to(x.dtype), (other.to(tl.float32) * inverse * other_weight).to(x.dtype)


@triton.jit
def _to_int8(x):
    """Numbers [C, N] to int8 and bf16 scales [N], as `fast_model.quantize_heads` does it."""
    x = x.to(tl.float32)
    scale = (tl.maximum(tl.max(tl.abs(x), 0), 1e-8) / 127).to(tl.bfloat16)
    q = x / scale.to(tl.float32)[None, :]
    q = (q + 12582912.0) - 12582912.0  # to the nearest integer, ties to even
    return tl.minimum(tl.maximum(q, -127.0), 127.0).to(tl.int8), scale


@triton.jit
def _attend(q, k, v, k_scale, v_scale, seen, top, total, sums, scale, SCALED: tl.constexpr):
    """Online softmax over one more tile of slots: k [CP, N], v [N, CP], scales [N] if SCALED, seen [M, N]."""
    score = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
    if SCALED:
        score *= k_scale.to(tl.float32)[None, :]
    score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - higher[:, None])
    fade = tl.exp2(top - higher)
    total = total * fade + tl.sum(weight, 1)
    if SCALED:
        weight *= v_scale.to(tl.float32)[None, :]
    # In float16 weights times small scales would lose their bits.
    dtype: tl.constexpr = tl.bfloat16 if SCALED and q.dtype == tl.float16 else q.dtype
    sums = sums * fade[:, None] + tl.dot(weight.to(dtype), v.to(dtype), input_precision="ieee")
    return higher, total, sums


@triton.jit
def _load_slots(caches, slot, end, c, in_c, C: tl.constexpr):
    """Keys [CP, N] and values [N, CP] of slots [N] before `end`."""
    inside = slot < end
    k = tl.load(caches[0] + slot[None, :] * C + c[:, None], mask=inside[None, :] & in_c[:, None], other=0)
    v = tl.load(caches[1] + slot[:, None] * C + c[None, :], mask=inside[:, None] & in_c[None, :], other=0)
    return k, v


@triton.jit
def _load_scales(scale_caches, slot, end):
    k_scale = tl.load(scale_caches[0] + slot, mask=slot < end, other=0.0)
    v_scale = tl.load(scale_caches[1] + slot, mask=slot < end, other=0.0)
    return k_scale, v_scale


@jit_for_any_T
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, rope_ptr, pos_ptr,
    k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, sums_ptr, tops_ptr, arrived_ptr, sinks_ptr, y_ptr,
    T, S, window, q_stride, k_stride, v_stride, scale, eps,
    H: tl.constexpr, KV: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, M: tl.constexpr, NEW: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, ROPE: tl.constexpr, SCALED: tl.constexpr, PLUS_ONE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The queries of one kv head against one part of its older slots: M rows are tokens times query heads. Whoever of
    the parts ends last joins them.

    The last part's program takes the new tokens too, and stores their keys and values. Positions and angles come from
    kernels of the compiler's, older keys and values from earlier steps: they are there before this kernel starts.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    b, kv = head // KV, head % KV
    R: tl.constexpr = H // KV
    m, c = tl.arange(0, M), tl.arange(0, CP)
    other_half = tl.where(c < C // 2, c + C // 2, c - C // 2)
    token = m // R
    live, in_c = token < T, c < C
    k_cache_ptr += head.to(tl.int64) * S * C
    v_cache_ptr += head.to(tl.int64) * S * C
    k_scale_ptr += head.to(tl.int64) * S
    v_scale_ptr += head.to(tl.int64) * S
    caches, scale_caches = (k_cache_ptr, v_cache_ptr), (k_scale_ptr, v_scale_ptr)
    pos = tl.load(pos_ptr + b * T + token, mask=live, other=-1)
    older = tl.minimum(tl.load(pos_ptr + b * T), S)
    oldest = tl.maximum(0, older + 1 - window)
    per_split = tl.cdiv(tl.cdiv(older - oldest, SPLITS), BLOCK) * BLOCK
    begin = oldest + split * per_split
    end = tl.minimum(begin + per_split, older)
    slot = begin + tl.arange(0, BLOCK)
    k, v = _load_slots(caches, slot, end, c, in_c, C)
    k_scale, v_scale = None, None
    if SCALED:
        k_scale, v_scale = _load_scales(scale_caches, slot, end)
    in_q = live[:, None] & in_c[None, :]
    if ROPE:
        angle = rope_ptr + (b * T + token)[:, None] * C + c[None, :] % (C // 2)
        cos, sin = tl.load(angle, mask=in_q, other=0.0), tl.load(angle + C // 2, mask=in_q, other=0.0)
    _wait_for_inputs(PDL)
    q_ptr += (b * T + token)[:, None] * q_stride + (kv * R + m % R)[:, None] * C
    q = tl.load(q_ptr + c[None, :], mask=in_q, other=0.0)
    q_other = tl.load(q_ptr + other_half[None, :], mask=in_q, other=0.0)
    if q_norm_ptr is not None:
        q, q_other = _norm_heads(q, q_other, q_norm_ptr, c, other_half, in_c, eps, C, 1, PLUS_ONE)
    if ROPE:
        q = _rotate(q, q_other, cos, sin, (c < C // 2)[None, :])
    top = tl.full([M], -1e30, tl.float32)  # not -inf, whose difference to itself is NaN
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, CP], tl.float32)
    if begin < end:
        seen = (slot < end)[None, :] & (slot[None, :] > pos[:, None] - window)
        top, total, sums = _attend(q, k, v, k_scale, v_scale, seen, top, total, sums, scale, SCALED)
    for first in range(begin + BLOCK, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        k, v = _load_slots(caches, slot, end, c, in_c, C)
        if SCALED:
            k_scale, v_scale = _load_scales(scale_caches, slot, end)
        seen = (slot < end)[None, :] & (slot[None, :] > pos[:, None] - window)
        top, total, sums = _attend(q, k, v, k_scale, v_scale, seen, top, total, sums, scale, SCALED)
    if split == SPLITS - 1:
        t = tl.arange(0, NEW)
        at = tl.load(pos_ptr + b * T + t, mask=t < T, other=0)
        in_new = (t < T)[None, :] & in_c[:, None]  # [CP, NEW]
        k_at = k_ptr + (b * T + t)[None, :] * k_stride + kv * C
        v_at = v_ptr + (b * T + t)[None, :] * v_stride + kv * C
        k_new = tl.load(k_at + c[:, None], mask=in_new, other=0.0)
        v_new = tl.load(v_at + c[:, None], mask=in_new, other=0.0)
        k_other = tl.load(k_at + other_half[:, None], mask=in_new, other=0.0)
        if k_norm_ptr is not None:
            k_new, k_other = _norm_heads(k_new, k_other, k_norm_ptr, c, other_half, in_c, eps, C, 0, PLUS_ONE)
        if ROPE:
            turn = rope_ptr + (b * T + t)[None, :] * C + c[:, None] % (C // 2)
            cos_new = tl.load(turn, mask=in_new, other=0.0)
            sin_new = tl.load(turn + C // 2, mask=in_new, other=0.0)
            k_new = _rotate(k_new, k_other, cos_new, sin_new, c[:, None] < C // 2)
        seen_new = (t < T)[None, :] & (at[None, :] <= pos[:, None]) & (at[None, :] > pos[:, None] - window)
        slots = at[None, :] * C + c[:, None]
        in_cache = in_new & (at < S)[None, :]
        if SCALED:
            k_int8, k_s = _to_int8(k_new)
            v_int8, v_s = _to_int8(v_new)
            tl.store(k_scale_ptr + at, k_s, mask=(t < T) & (at < S))
            tl.store(v_scale_ptr + at, v_s, mask=(t < T) & (at < S))
            tl.store(k_cache_ptr + slots, k_int8, mask=in_cache)
            tl.store(v_cache_ptr + slots, v_int8, mask=in_cache)
            top, total, sums = _attend(q, k_int8, tl.trans(v_int8), k_s, v_s, seen_new, top, total, sums, scale, SCALED)
        else:
            tl.store(k_cache_ptr + slots, k_new, mask=in_cache)
            tl.store(v_cache_ptr + slots, v_new, mask=in_cache)
            top, total, sums = _attend(q, k_new, tl.trans(v_new), None, None, seen_new, top, total, sums, scale, SCALED)
    out = (head * SPLITS + split) * M + m
    tl.store(sums_ptr + out[:, None] * CP + c[None, :], sums)
    tl.store(tops_ptr + 2 * out, top)
    tl.store(tops_ptr + 2 * out + 1, total)
    tl.debug_barrier()  # all warps have stored; the count then tells the other programs
    if tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(arrived_ptr + head, 0)  # for the next layer's
        # Parts of older slots, from the first on; the last one had the new tokens.
        parts = tl.minimum(tl.cdiv(older - oldest, tl.maximum(per_split, 1)), SPLITS - 1)
        for other in range(0, parts + 1):
            part = tl.where(other == parts, SPLITS - 1, other)
            if part != split:
                at_part = (head * SPLITS + part) * M + m
                top_there = tl.load(tops_ptr + 2 * at_part, cache_modifier=".cg")
                total_there = tl.load(tops_ptr + 2 * at_part + 1, cache_modifier=".cg")
                higher = tl.maximum(top, top_there)
                fade, fade_there = tl.exp2(top - higher), tl.exp2(top_there - higher)
                there = tl.load(sums_ptr + at_part[:, None] * CP + c[None, :], cache_modifier=".cg")
                sums = sums * fade[:, None] + there * fade_there[:, None]
                total = total * fade + total_there * fade_there
                top = higher
        h = kv * R + m % R
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + h).to(tl.float32) * 1.4426950408889634
            higher = tl.maximum(top, sink)
            fade = tl.exp2(top - higher)
            sums, total = sums * fade[:, None], total * fade + tl.exp2(sink - higher)
        y_at = (b * T + token) * H + h
        y = (sums / total[:, None]).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + y_at[:, None] * C + c[None, :], y, mask=in_q)


@torch.library.custom_op("gpt_twin::attention", mutates_args=(), device_types="cuda")
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: torch.Tensor | None, input_pos: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, k_scales: torch.Tensor | None, v_scales: torch.Tensor | None,
    window: int, scale: float, arrived: torch.Tensor, sinks: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None, eps: float = 0.0, plus_one: bool = False,
) -> torch.Tensor:  # fmt: skip
    """y [B, T, H, C] for q [B, T, H, C], k and v [B, T, KV, C], not yet rotated, at `input_pos` [B, T], which counts up
    by one in a row, and `rope` [B, T, 1, 2, C/2] (None: no rotation). Keys and values go into the caches
    [B, KV, S, C]; if those are int8, their scales into `k_scales` and `v_scales` [B, KV, S]. Each token sees the last
    `window` slots up to its own, and `scale` multiplies the scores, to which `sinks` [H] add one of each head that has
    no value. `arrived` [B KV] are zeros in int32, and are so again afterwards. T H / KV is 64 at most. `q_norm` and
    `k_norm` [C] are weights of an RMS norm of each head before the rotation, with `plus_one` what is added to 1.

    It does not declare that it changes the caches, because a nested compile region refuses operators that do (torch
    2.13). So in a graph nothing else may read them after it, and its result has to be used: the compiler drops calls
    whose result is not, and takes two with equal arguments for one.
    """
    B, T, H, C = q.shape
    KV, S = k_cache.shape[1:3]
    q, k, v = (t if t.stride()[2:] == (C, 1) and t.stride(0) == T * t.stride(1) else t.contiguous() for t in (q, k, v))
    input_pos = input_pos.contiguous()
    rope = None if rope is None else rope.contiguous()
    M = 16 if T * H // KV <= 16 else 64
    CP = max(16, triton.next_power_of_2(C))
    splits = max(1, 128 // triton.next_power_of_2(B * KV))  # about as many programs as multiprocessors
    sums = torch.empty(B * KV * splits * M * CP, dtype=torch.float32, device=q.device)
    tops = torch.empty(B * KV * splits * M * 2, dtype=torch.float32, device=q.device)
    y = torch.empty(B, T, H, C, dtype=q.dtype, device=q.device)
    options = {"num_warps": 4} | launch_options(q.device)
    shape = {"H": H, "KV": KV, "C": C, "CP": CP, "M": M, "SPLITS": splits}
    block = max(16, min(64, 16384 // (CP * q.element_size())))  # three tiles of it fit into 100 kB, an RTX 4090's
    scales = (k_cache, v_cache) if k_scales is None else (k_scales, v_scales)  # none are read if there are none
    _attention_kernel[(B * KV, splits)](
        q, k, v, q_norm, k_norm, rope, input_pos, k_cache, v_cache, *scales, sums, tops, arrived, sinks, y,
        T, S, window, q.stride(1), k.stride(1), v.stride(1),
        scale=scale * 1.4426950408889634,  # for powers of 2 instead of e
        eps=eps, NEW=16 if T <= 16 else 64, BLOCK=block, ROPE=rope is not None, SCALED=k_scales is not None,
        PLUS_ONE=plus_one, **shape, **options,
    )  # fmt: skip
    return y


@attention.register_fake
def _(q, k, v, rope, input_pos, k_cache, v_cache, k_scales, v_scales, window, scale, arrived,
      sinks=None, q_norm=None, k_norm=None, eps=0.0, plus_one=False):  # fmt: skip
    return q.new_empty(q.shape)


# --- The k-th largest of many numbers ---------------------------------------------------------------------------------


@triton.jit
def _digit(key, ROUND: tl.constexpr, SHORT: tl.constexpr):
    """Of a key's 32 bits the first 11, the next 11, the last 10; SHORT: of its first 16 bits 11, then 5."""
    if ROUND == 0:
        return (key >> 21).to(tl.int32)
    if ROUND == 1:
        return (key >> 16 & 31 if SHORT else key >> 10 & 2047).to(tl.int32)
    return (key & 1023).to(tl.int32)


@triton.jit
def _chosen_bin(counts_ptr, k, BINS: tl.constexpr):
    """The bin in which the k-th largest is, and which largest it is there."""
    bins = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + bins)
    from_here = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    chosen = tl.max(tl.where(from_here >= k, bins, 0), 0)
    return chosen, k - tl.sum(tl.where(bins > chosen, counts, 0), 0)


@triton.jit
def _count_digits_kernel(
    x_ptr, counts_ptr, V, k,
    ROUND: tl.constexpr, SHORT: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One part of a row: how often each digit comes among the numbers whose earlier digits are the k-th largest's."""
    row, at = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts_ptr += row * 3 * BINS
    _wait_for_inputs(PDL)
    bits = tl.load(x_ptr + row * V + at, mask=at < V, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    key = (bits ^ (bits >> 31 | -(2**31))).to(tl.uint32, bitcast=True)  # in the order of the numbers
    inside, rank = at < V, k
    for earlier in tl.static_range(ROUND):
        chosen, rank = _chosen_bin(counts_ptr + earlier * BINS, rank, BINS)
        inside &= _digit(key, earlier, SHORT) == chosen
    counts = tl.histogram(_digit(key, ROUND, SHORT), BINS, mask=inside)
    tl.atomic_add(counts_ptr + ROUND * BINS + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _kth_kernel(counts_ptr, y_ptr, k, SHORT: tl.constexpr, BINS: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0)
    counts_ptr += row * 3 * BINS
    _wait_for_inputs(PDL)
    first, rank = _chosen_bin(counts_ptr, k, BINS)
    second, rank = _chosen_bin(counts_ptr + BINS, rank, BINS)
    key = first << 21 | (second << 16 if SHORT else second << 10)
    if not SHORT:
        third, rank = _chosen_bin(counts_ptr + 2 * BINS, rank, BINS)
        key |= third
    # The sign bit is set in the key of a positive number; one of a negative number ends in ones.
    bits = tl.where(key < 0, key ^ -(2**31), ~(key | 0xFFFF if SHORT else key))
    tl.store(y_ptr + row, bits.to(tl.float32, bitcast=True))


@torch.library.custom_op("gpt_twin::kth_largest", mutates_args=(), device_types="cuda")
def kth_largest(x: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest number of each row of x [..., V], [..., 1] in float32: digit by digit, by counting (a radix
    select), in a pass over x for each of two digits of bf16 or three of float32. k is from 1 to V."""
    x, V = x.contiguous(), x.shape[-1]
    rows, bins = x.numel() // V, 2048
    counts = torch.zeros(rows, 3, bins, dtype=torch.int32, device=x.device)
    y = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    options = {"SHORT": x.dtype == torch.bfloat16, "BINS": bins} | launch_options(x.device)
    for digit in range(2 if x.dtype == torch.bfloat16 else 3):
        grid = (triton.cdiv(V, 2048), rows)
        _count_digits_kernel[grid](x, counts, V, k, ROUND=digit, BLOCK=2048, num_warps=8, **options)
    _kth_kernel[(rows,)](counts, y, k, num_warps=8, **options)
    return y


@kth_largest.register_fake
def _(x, k):
    return x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
