"""Triton kernels for what a decode step on a GPU does between its products: norms, attention, messages of ranks.

Each was faster than what the compiler makes of plain PyTorch, with the products of `gpu_products.py`, which says by how
much. Decisions to know:

- On Hopper and newer a kernel starts while the one before it ends (programmatic dependent launch) and waits for its
  results after fetching weights, which do not depend on them. So norms are here too, and RoPE, cache and attention are
  one operator: a kernel of the compiler's in between would break the chain.
- For the same reason the sum over ranks of tensor parallelism is in the norm's kernel. Of a single token the product
  before has told the other ranks its part already. So the norm's kernel, or a product that takes the norm, only hears.
- Attention reads the used slots only, split over programs, so that its cost grows with the context used (Dao et al.
  2023, "Flash-Decoding"). Whichever program ends last joins the parts.
- The k-th largest number, for top-k sampling, is found by counting digits, without a sort, in one kernel whose
  programs wait for one another. A second one takes the token.

`fast_model.py`, `tp.py` and `decode.py` have the plain twin of each.

Copy me: needs torch and triton.

Shapes: B batch, T tokens, D width of the model, S cache slots, H query heads, KV kv heads, C head dim, V vocabulary.
"""

import torch
import triton
import triton.language as tl


def runs_on(device: torch.device) -> bool:
    """Whether these kernels run there: NVIDIA GPUs of compute capability 8.0 (Ampere) or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def variants_built(module) -> int:
    """How many variants of a file's kernels the process has compiled, or loaded from Triton's cache, by now."""
    kernels = [kernel for kernel in vars(module).values() if isinstance(kernel, triton.runtime.JITFunction)]
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


def custom_operator(shapes):
    """Makes a function the operator torch.ops.gpt_twin.NAME of GPUs, which a graph takes as a whole. It runs on the GPU
    of its first argument. `shapes` gives empty results for its arguments.

    `torch.library.custom_op` does so too, but takes 50 us a call, and the first one loads the compiler.
    """

    def make(function):
        def run(x, *arguments):
            with torch.cuda.device_of(x):  # Triton's kernels start on the current device
                return function(x, *arguments)

        name = function.__name__
        if not hasattr(torch.ops.gpt_twin, name):  # a lifted copy may be loaded beside this file
            torch.library.define(f"gpt_twin::{name}", torch.library.infer_schema(function, mutates_args=()))
            torch.library.impl(f"gpt_twin::{name}", "cuda", run)
            torch.library.register_fake(f"gpt_twin::{name}", shapes)
        return getattr(torch.ops.gpt_twin, name).default

    return make


# --- How kernels start ------------------------------------------------------------------------------------------------


def launch_options(device: torch.device) -> dict:
    overlap = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if overlap else {"PDL": False}


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


# A kernel is compiled anew for each constant, and for integers that are 1 or multiples of 16. So the number of tokens,
# which changes from prompt to prompt, is an integer whose alignment does not count, and tiles have two sizes. Of long
# argument lists the first lines are tensors and numbers, and the last ones constants; hence `fmt: skip`.
jit_for_any_T = triton.jit(do_not_specialize_on_alignment=["T"])


# --- What ranks tell each other ---------------------------------------------------------------------------------------

# Each rank writes numbers into the memory of the others as words of a number and the round's count, which arrive
# together, so that nobody waits for more than the words (as NCCL's protocol LL). A program of a rank is at most one
# round ahead of the same one of another, so two places for each word are enough. Where every other round is in another
# inbox, one is: a rank tells an inbox again after it has heard the other one, which was told after all had been heard
# there. Words of numbers of 16 bits have 32, with the count's last 16: what is in a place is of this round or of the
# one before it there. An inbox is [places, ranks, SIZE] words of 64 or 32 bits, and then, behind what 64 would take,
# the counts of the programs' rounds.
#
# Triton has no volatile store, as NCCL uses; nothing here holds a plain one back, and on H100s all words came.


@triton.jit
def open_inboxes(peers_ptr, RANKS: tl.constexpr):
    """Every rank's inbox, if there are several. Addresses never change, so a kernel reads them before it waits."""
    inboxes = ()
    for rank in tl.static_range(RANKS if RANKS > 1 else 0):
        inboxes = inboxes + (tl.load(peers_ptr + rank).to(tl.pointer_type(tl.int64)),)
    return inboxes


@triton.jit
def words_of(inbox, dtype: tl.constexpr):
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
            tl.store(words_of(inboxes[rank], values.dtype) + place + RANK * SIZE, words, mask=inside)


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
def count_of_rows(inboxes, rows, N, RANK: tl.constexpr, RANKS: tl.constexpr):
    """The count of this round of each of these rows of N, for `tell_rows`."""
    count = 0
    if RANKS > 1:
        count = tl.load(inboxes[RANK] + RANKS * N + rows, mask=rows < N, other=0) + 1
    return count


@triton.jit
def tell_rows(y, rows, N, count, inboxes, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Tell all ranks, if there are several, these rows of N, for the norm that comes next."""
    if RANKS > 1:
        _tell(y, count, rows < N, rows, inboxes, N, RANK, RANKS)
        tl.debug_barrier()  # all warps have read the count
        tl.store(inboxes[RANK] + RANKS * N + rows, count, mask=rows < N)


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
    inboxes = open_inboxes(peers_ptr, RANKS)
    count_ptr = inboxes[RANK] + 2 * RANKS * MOST + program
    wait_for_inputs(PDL)
    count = tl.load(count_ptr) + 1
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    place = (count & 1) * RANKS * MOST + at
    _tell(x.to(tl.float32), count, inside, place, inboxes, MOST, RANK, RANKS)
    tl.store(y_ptr + RANK * n + at, x, mask=inside)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            theirs = _hear(words_of(inboxes[RANK], tl.float32) + place + rank * MOST, count, inside, tl.float32)
            tl.store(y_ptr + rank * n + at, theirs.to(y_ptr.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # all warps have read the count
    tl.store(count_ptr, count)


def gather_words(ranks: int) -> int:
    """Words of 8 bytes, zeros at first, that each rank has for what the others tell it in `gather`."""
    return MOST_GATHERED // GATHERED + 2 * ranks * MOST_GATHERED


@custom_operator(lambda x, peers, rank: x.new_empty(len(peers), *x.shape))
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
            words_ptr = words_of(inboxes[RANK], values.dtype) + place + rank * D
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
    inboxes = open_inboxes(peers_ptr, RANKS)
    wait_for_inputs(PDL)
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
    """The same of what `linear` and `sum_experts` tell, which take two such inboxes in turn. Each begins at a multiple
    of 16 bytes."""
    words = dim * (1 + ranks)
    return words + words % 2


@custom_operator(lambda x, *others: (x.new_empty(x.shape), x.new_empty(x.shape)))
def add_norm(
    x: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    post: torch.Tensor | None, eps: float, plus_one: bool = False, scale: float = 1.0,
    peers: torch.Tensor | None = None, rank: int = 0, told: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x [..., D] + scale * update and its norm: LayerNorm with a bias, RMS norm without, none without a weight. With
    `peers` the update is the sum of all ranks', up to MOST_ROWS rows of D. With `post` the update goes through an RMS
    norm of that weight before it is added. With `plus_one` weights are what is added to 1.

    `peers` [ranks] are the addresses of the ranks' inboxes (`inbox_words`, `tp.shared_memory`). An update of one row
    that the product before has `told` is in inboxes of `told_words`. All ranks make the same calls; who comes first
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


# --- Attention of a few new tokens to a cache -------------------------------------------------------------------------


@triton.jit
def _partners(c, C: tl.constexpr):
    """The number that each number c of a head is rotated with."""
    return tl.where(c < C // 2, c + C // 2, c - C // 2)


@triton.jit
def _fetch_heads(x_ptr, turn_ptr, c, inside, C: tl.constexpr, AXIS: tl.constexpr, ROPE: tl.constexpr):
    """Numbers c of heads, along AXIS, and with ROPE their partners and the angles' cosines and sines."""
    at, partner = tl.expand_dims(c, 1 - AXIS), tl.expand_dims(_partners(c, C), 1 - AXIS)
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    other, cos, sin = x, x, x
    if ROPE:
        other = tl.load(x_ptr + partner, mask=inside, other=0.0)
        cos = tl.load(turn_ptr + at % (C // 2), mask=inside, other=0.0)
        sin = tl.load(turn_ptr + at % (C // 2) + C // 2, mask=inside, other=0.0)
    return x, other, cos, sin


@triton.jit
def _load_head_norm(w_ptr, c, C: tl.constexpr, AXIS: tl.constexpr, PLUS_ONE: tl.constexpr):
    """The weights of numbers c, along AXIS, and of their partners, if there are such."""
    weights = (1.0, 1.0)
    if w_ptr is not None:
        inside, partner = tl.expand_dims(c < C, 1 - AXIS), tl.expand_dims(_partners(c, C), 1 - AXIS)
        weight = _load_norm(w_ptr, tl.expand_dims(c, 1 - AXIS), inside, PLUS_ONE)
        weights = (weight, _load_norm(w_ptr, partner, inside, PLUS_ONE))
    return weights


@triton.jit
def _norm_and_turn(
    fetched, weights, c, eps, C: tl.constexpr, AXIS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr
):  # fmt: skip
    """What `_fetch_heads` gave after the RMS norm of heads and the rotation, if there are such; each rounds."""
    x, other, cos, sin = fetched
    if NORM:
        x32 = x.to(tl.float32)
        inverse = tl.expand_dims(tl.rsqrt(tl.sum(x32 * x32, AXIS) / C + eps), AXIS)
        x = (x32 * inverse * weights[0]).to(x.dtype)
        other = (other.to(tl.float32) * inverse * weights[1]).to(x.dtype)
    if ROPE:
        at = tl.expand_dims(c, 1 - AXIS)
        other = tl.where(at < C // 2, -other.to(tl.float32), other.to(tl.float32))
        x = (x.to(tl.float32) * cos + other * sin).to(x.dtype)
    return x


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
    ONE: tl.constexpr = k.shape[1] == 1  # a tensor core takes 16 at least
    if ONE:
        score = tl.sum(q.to(tl.float32) * tl.trans(k).to(tl.float32), 1)[:, None] * scale
    else:
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
    if ONE:
        more = weight * v.to(tl.float32)
    else:  # in float16 weights times small scales would lose their bits
        dtype: tl.constexpr = tl.bfloat16 if SCALED and q.dtype == tl.float16 else q.dtype
        more = tl.dot(weight.to(dtype), v.to(dtype), input_precision="ieee")
    return higher, total, sums * fade[:, None] + more


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
    """The queries of one kv head against one part of its older slots: M rows are tokens times query heads. The first
    part has the new tokens too, and stores their keys and values. Whoever ends last joins the parts.

    Positions come from kernels that end before this one starts, older keys and values from earlier steps. While the
    next kernel's programs fetch weights, memory is slow to answer. So all that is new is asked for at once.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    b, kv = head // KV, head % KV
    R: tl.constexpr = H // KV
    m, c = tl.arange(0, M), tl.arange(0, CP)
    token = m // R
    live, in_c = token < T, c < C
    in_q = live[:, None] & in_c[None, :]
    k_cache_ptr += head.to(tl.int64) * S * C
    v_cache_ptr += head.to(tl.int64) * S * C
    k_scale_ptr += head.to(tl.int64) * S
    v_scale_ptr += head.to(tl.int64) * S
    caches, scale_caches = (k_cache_ptr, v_cache_ptr), (k_scale_ptr, v_scale_ptr)
    older = tl.minimum(tl.load(pos_ptr + b * T), S)
    pos = tl.load(pos_ptr + b * T + token, mask=live, other=-1)
    oldest = tl.maximum(0, older + 1 - window)
    per_part = tl.cdiv(tl.cdiv(older - oldest, SPLITS), BLOCK) * BLOCK
    parts = tl.maximum(1, tl.cdiv(older - oldest, tl.maximum(per_part, 1)))
    if split >= parts:  # all programs read the same position, so they agree on the number of parts
        return
    begin = oldest + split * per_part
    end = tl.minimum(begin + per_part, older)
    slot = begin + tl.arange(0, BLOCK)
    k, v = _load_slots(caches, slot, end, c, in_c, C)
    k_scale, v_scale = None, None
    if SCALED:
        k_scale, v_scale = _load_scales(scale_caches, slot, end)
    q_weights = _load_head_norm(q_norm_ptr, c, C, 1, PLUS_ONE)
    k_weights = _load_head_norm(k_norm_ptr, c, C, 0, PLUS_ONE)
    h = kv * R + m % R
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * 1.4426950408889634
    wait_for_inputs(PDL)
    q_ptr += (b * T + token)[:, None] * q_stride + h[:, None] * C
    q_turn_ptr = rope_ptr + (b * T + token)[:, None] * C if ROPE else None
    q_fetched = _fetch_heads(q_ptr, q_turn_ptr, c, in_q, C, 1, ROPE)
    t = tl.arange(0, NEW)
    in_new = (t < T)[None, :] & in_c[:, None] & (split == 0)  # [CP, NEW]
    k_at = k_ptr + (b * T + t)[None, :] * k_stride + kv * C
    v_at = v_ptr + (b * T + t)[None, :] * v_stride + kv * C
    k_turn_ptr = rope_ptr + (b * T + t)[None, :] * C if ROPE else None
    k_fetched = _fetch_heads(k_at, k_turn_ptr, c, in_new, C, 0, ROPE)
    v_new = tl.load(v_at + c[:, None], mask=in_new, other=0.0)
    at = tl.load(pos_ptr + b * T + t, mask=t < T, other=0)
    q = _norm_and_turn(q_fetched, q_weights, c, eps, C, 1, q_norm_ptr is not None, ROPE)
    top = tl.full([M], -1e30, tl.float32)  # not -inf, whose difference to itself is NaN
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, CP], tl.float32)
    if split == 0:
        k_new = _norm_and_turn(k_fetched, k_weights, c, eps, C, 0, k_norm_ptr is not None, ROPE)
        k_store, v_store, k_s, v_s = k_new, v_new, None, None
        if SCALED:
            k_store, k_s = _to_int8(k_new)
            v_store, v_s = _to_int8(v_new)
            tl.store(k_scale_ptr + at, k_s, mask=(t < T) & (at < S))
            tl.store(v_scale_ptr + at, v_s, mask=(t < T) & (at < S))
        slots, in_cache = at[None, :] * C + c[:, None], in_new & (at < S)[None, :]
        tl.store(k_cache_ptr + slots, k_store, mask=in_cache)
        tl.store(v_cache_ptr + slots, v_store, mask=in_cache)
        seen = (t < T)[None, :] & (at[None, :] <= pos[:, None]) & (at[None, :] > pos[:, None] - window)
        top, total, sums = _attend(q, k_store, tl.trans(v_store), k_s, v_s, seen, top, total, sums, scale, SCALED)
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
    ended = 0  # of the other parts
    if parts > 1:
        out = (head * SPLITS + split) * M + m
        tl.store(sums_ptr + out[:, None] * CP + c[None, :], sums, mask=in_q)
        tl.store(tops_ptr + 2 * out, top, mask=live)
        tl.store(tops_ptr + 2 * out + 1, total, mask=live)
        tl.debug_barrier()  # all warps have stored; the count then tells the other programs
        ended = tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel")
    if ended == parts - 1:
        if parts > 1:
            tl.store(arrived_ptr + head, 0)  # for the next step's
            for part in range(parts):
                if part != split:
                    at_part = (head * SPLITS + part) * M + m
                    top_there = tl.load(tops_ptr + 2 * at_part, mask=live, other=0.0, cache_modifier=".cg")
                    total_there = tl.load(tops_ptr + 2 * at_part + 1, mask=live, other=0.0, cache_modifier=".cg")
                    at_part = at_part[:, None] * CP + c[None, :]
                    there = tl.load(sums_ptr + at_part, mask=in_q, other=0.0, cache_modifier=".cg")
                    higher = tl.maximum(top, top_there)
                    fade, fade_there = tl.exp2(top - higher), tl.exp2(top_there - higher)
                    sums = sums * fade[:, None] + there * fade_there[:, None]
                    total = total * fade + total_there * fade_there
                    top = higher
        if sinks_ptr is not None:
            higher = tl.maximum(top, sink)
            fade = tl.exp2(top - higher)
            sums, total = sums * fade[:, None], total * fade + tl.exp2(sink - higher)
        y_at = (b * T + token) * H + h
        y = (sums / total[:, None]).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + y_at[:, None] * C + c[None, :], y, mask=in_q)


@custom_operator(lambda q, *others: q.new_empty(q.shape))
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
    no value. `arrived` [B KV] are zeros in int32, and are so again afterwards. `q_norm` and `k_norm` [C] are weights of
    an RMS norm of each head before the rotation, with `plus_one` what is added to 1.

    T H / KV is 64 at most, in float32 16. More would spill registers there, and exceed an RTX 4090's shared memory.

    It does not declare that it changes the caches, because a nested compile region refuses operators that do (torch
    2.13). So in a graph nothing else may read them after it, and its result has to be used: the compiler drops calls
    whose result is not, and takes two with equal arguments for one.
    """
    B, T, H, C = q.shape
    KV, S = k_cache.shape[1:3]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))  # views of one matrix stay views
    q, k, v = (t if t.stride()[1:] == (C, 1) else t.contiguous() for t in (q, k, v))
    input_pos = input_pos.contiguous()
    rope = None if rope is None else rope.contiguous()
    M = 16 if T * H // KV <= 16 else 64
    CP = max(16, triton.next_power_of_2(C))
    # About as many programs as multiprocessors. Those of an int8 cache are busy with conversions. On Hopper two share
    # one, with larger tiles, where registers suffice: after 32,768 tokens the 8B's step took an H200 5.25 ms, not 6.27.
    # Other GPUs have less shared memory, and were not measured.
    is_hopper = torch.cuda.get_device_capability(q.device)[0] == 9
    twice = 2 if k_scales is not None and M == 16 and q.element_size() == 2 and is_hopper else 1
    splits = min(128, max(1, 128 * twice // triton.next_power_of_2(B * KV)))  # the last to end joins them one by one
    sums = torch.empty(B * KV * splits * M * CP, dtype=torch.float32, device=q.device)
    tops = torch.empty(B * KV * splits * M * 2, dtype=torch.float32, device=q.device)
    y = torch.empty(B, T, H, C, dtype=q.dtype, device=q.device)
    # An int8 cache keeps 4 warps and the tensor core: otherwise a program takes too many registers.
    options = {"num_warps": 8 if k_scales is None else 4} | launch_options(q.device)
    new = 64 if T > 16 else 1 if T == 1 and k_scales is None else 16
    shape = {"H": H, "KV": KV, "C": C, "CP": CP, "M": M, "SPLITS": splits}
    block = twice * max(16, min(64, 16384 // (CP * q.element_size())))  # three tiles in 99 kB, an RTX 4090's
    if M * CP > 2**13 and not is_hopper:
        block = 16  # beside queries of 32 kB
    scales = (k_cache, v_cache) if k_scales is None else (k_scales, v_scales)  # none are read if there are none
    _attention_kernel[(B * KV, splits)](
        q, k, v, q_norm, k_norm, rope, input_pos, k_cache, v_cache, *scales, sums, tops, arrived, sinks, y,
        T, S, window, q.stride(0), k.stride(0), v.stride(0),
        scale=scale * 1.4426950408889634,  # for powers of 2 instead of e
        eps=eps, NEW=new, BLOCK=block, ROPE=rope is not None, SCALED=k_scales is not None, PLUS_ONE=plus_one,
        **shape, **options,
    )  # fmt: skip
    return y


# --- The k-th largest of many numbers ---------------------------------------------------------------------------------


@triton.jit
def _kth_kernel(
    x_ptr, state_ptr, y_ptr, V, k, parts,
    ROUNDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One part of a row: how often each digit comes among the numbers whose earlier digits are the k-th largest's.

    After each digit a program waits for the other parts of its row. Rows and parts are taken in the order in which
    programs start, and there are no more parts than multiprocessors, so nobody waits for a part that finds no room.
    """
    bins = tl.arange(0, 256)
    wait_for_inputs(PDL)
    ticket = tl.atomic_add(state_ptr, 1, sem="relaxed")
    row, at = ticket // parts, ticket % parts * BLOCK + tl.arange(0, BLOCK)
    arrived_ptr = state_ptr + 1 + row * ROUNDS * 257
    counts_ptr = arrived_ptr + ROUNDS
    bits = tl.load(x_ptr + row * V + at, mask=at < V, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    key = bits ^ (bits >> 31 | -(2**31))  # without sign in the order of the numbers
    inside, rank, found = at < V, k, 0
    for i in tl.static_range(ROUNDS):
        digit = key >> (24 - 8 * i) & 255
        counts = tl.histogram(digit, 256, mask=inside)
        tl.atomic_add(counts_ptr + i * 256 + bins, counts, mask=counts > 0, sem="relaxed")
        tl.debug_barrier()  # all warps have added
        tl.atomic_add(arrived_ptr + i, 1, sem="release")
        while tl.atomic_add(arrived_ptr + i, 0, sem="acquire") < parts:
            pass
        counts = tl.load(counts_ptr + i * 256 + bins, cache_modifier=".cg")
        from_here = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        chosen = tl.max(tl.where(from_here >= rank, bins, 0), 0)
        rank -= tl.sum(tl.where(bins > chosen, counts, 0), 0)
        inside &= digit == chosen
        found = found << 8 | chosen
    # The sign bit is set in the key of a positive number; one of a negative number ends in ones.
    found <<= 32 - 8 * ROUNDS
    bits = tl.where(found < 0, found ^ -(2**31), ~(found | ((1 << (32 - 8 * ROUNDS)) - 1)))
    tl.store(y_ptr + row, bits.to(tl.float32, bitcast=True))


@custom_operator(lambda x, k: x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
def kth_largest(x: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest number of each row of x [..., V], [..., 1] in float32: digit by digit, by counting (a radix
    select), two digits of bf16 or four of others. k is from 1 to V.

    One call at a time on a device: on a small one the programs of two could each wait for room that the other has.
    """
    x, V = x.contiguous(), x.shape[-1]
    rows, rounds = x.numel() // V, 2 if x.dtype == torch.bfloat16 else 4
    state = torch.zeros(1 + rows * rounds * 257, dtype=torch.int32, device=x.device)
    y = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    most = min(64, torch.cuda.get_device_properties(x.device).multi_processor_count)
    block = max(256, triton.next_power_of_2(triton.cdiv(V, most)))
    parts = triton.cdiv(V, block)
    options = {"ROUNDS": rounds, "BLOCK": block, "num_warps": 8} | launch_options(x.device)
    _kth_kernel[(rows * parts,)](x, state, y, V, k, parts, **options)
    return y


# --- The largest of many numbers --------------------------------------------------------------------------------------


@triton.jit
def _largest_kernel(
    x_ptr, noise_ptr, least_ptr, state_ptr, y_ptr, V, parts, scale,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One part of a row. What is largest so far, and where, is one number of 63 bits, of which all parts of the row
    take the maximum. Whoever ends last writes the answer."""
    row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    at = part * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    x = tl.load(x_ptr + row.to(tl.int64) * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
    score = x
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + row.to(tl.int64) * V + at, mask=at < V, other=1.0)
        score = x * scale - tl.log(noise)
    if least_ptr is not None:
        score = tl.where(x < tl.load(least_ptr + row), float("-inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    key = (bits ^ (bits >> 31 & 0x7FFFFFFF)).to(tl.int64) + 2**31  # from 0 on, in the order of the numbers
    key = tl.where(score != score, 2**32 - 1, key)
    best = tl.max(tl.where(at < V, key << 31 | (2**31 - 1 - at), 0), 0)  # of equal numbers the first
    tl.atomic_max(state_ptr + 2 * row, best, sem="release")
    if tl.atomic_add(state_ptr + 2 * row + 1, 1, sem="acq_rel") == parts - 1:
        best = tl.atomic_max(state_ptr + 2 * row, 0, sem="acquire")
        finite = (best >> 31 > 0x007FFFFF) & (best >> 31 < 0xFF800000)  # the keys of -inf and inf
        tl.store(y_ptr + row, tl.where(finite, 2**31 - 1 - (best & (2**31 - 1)), -1))


@custom_operator(lambda logits, *others: logits.new_empty(*logits.shape[:-1], 1, dtype=torch.int64))
def choose(
    logits: torch.Tensor, noise: torch.Tensor | None = None, least: torch.Tensor | None = None, scale: float = 1.0
) -> torch.Tensor:
    """Where the largest of each row of logits [..., V] is, [..., 1] in int64; -1 if that is no finite number, and a NaN
    is the largest of all.

    With Exp(1) `noise` [..., V] a token of the probabilities softmax(scale * logits), as the largest of
    scale * logits - log(noise): the Gumbel-max trick (Maddison et al. 2014, arXiv:1411.0030). Logits below `least`
    [..., 1] are left out.
    """
    logits, V = logits.contiguous(), logits.shape[-1]
    noise, least = (None if t is None else t.contiguous() for t in (noise, least))
    rows, block = logits.numel() // V, 2048
    parts = triton.cdiv(V, block)
    state = torch.zeros(2 * rows, dtype=torch.int64, device=logits.device)
    y = torch.empty(*logits.shape[:-1], 1, dtype=torch.int64, device=logits.device)
    options = {"BLOCK": block, "num_warps": 8} | launch_options(logits.device)
    _largest_kernel[(rows * parts,)](logits, noise, least, state, y, V, parts, scale, **options)
    return y


def tell_compiler() -> None:
    """Make the operator that stands late in a graph known to PyTorch's compiler. It finds out by itself, but before
    2.13 it first writes out all that comes before an operator it does not know: after 32 layers that takes minutes."""
    from torch._inductor.lowering import lowerings, make_fallback

    if gather not in lowerings:
        make_fallback(gather, warn=False)
