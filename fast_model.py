"""FastGPT: the reference of `model.py` in the shape that torch.compile likes, and the surgery between the two layouts.

It computes the same function from the same `GPTConfig` and shares no arithmetic with the reference, so that
`check_equivalence.py` compares two independent statements of it. Decisions to know:

- Keys and values live in a static cache, allocated by `setup_caches` and written in place at `input_pos`, so that
  decoding is one graph with no break and no recompilation as positions move. Plain attention reads every slot under a
  mask; the GPU's kernel, where it takes the tokens, reads the used ones. There a step's cost grows with the context
  used.
- An int8 cache holds them rounded to 8 bits. A prompt without positions sees its own exact ones all the same.
- Without `input_pos` the tokens start a sequence at position 0 and see only each other: no mask, and no cache needed.
- q, k and v are one matrix, gate and up another. `to_fast` renames and fuses, `to_reference` undoes it bit for bit.
  Both act on rows only, whatever comes after the module's name: weights, biases, per-row or per-group scales.
- The matrices of a layer's experts stand one under the other in one tall matrix. A step over a few tokens
  reads the chosen experts' rows alone; many tokens are sorted by expert, and each expert is multiplied by its own.
- Attention and feed-forward say which product comes first in them, their projection, so that `AddNorm` can leave the
  norm to that product's kernel. So `AddNorm` calls it, and their `forward`, with its hooks, comes after it.
- A layer is a nested compile region: the compiler works on one and reuses it for all. With gradients it is not.
- Of a model that is split among ranks (see tp.py) a rank holds some heads and hidden units, and computes parts of
  updates. `AddNorm` sums those of all ranks, twice a layer; with one rank there is nothing to sum.

Copy me: needs torch, `model.py` beside it for GPTConfig, `tp.py`, and for speed `gpu_kernels.py`, `gpu_matvec.py` and
`gpu_products.py` on a GPU, `cpu_kernels.py` on a CPU.

Shapes: B batch, T new tokens, S cache slots, D model dim, H query heads, K kv heads, C head dim, V vocabulary.
"""

import math
from functools import partial
from itertools import product

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Embedding, GPTConfig
from tp import all_gather, all_reduce, from_rank_0, is_certain, shard_config, shared_memory, vocab_rows

try:
    import gpu_kernels
    import gpu_products
except ImportError:  # no Triton, so no GPU of NVIDIA's, or the file was left behind
    gpu_kernels = gpu_products = None
try:
    import cpu_kernels
except ImportError:  # the file was left behind
    cpu_kernels = None


def rope_table(config: GPTConfig, length: int, device, windowed: bool = False) -> torch.Tensor:
    """cos and sin of every position's angles, [length, 2, C/2], float32 whatever the dtype of the weights.

    bf16 cannot count past 256; float64 is no better, because the weights were trained with float32's rounded angles:
    at position 1,000 of SmolLM2 the exact ones are 2 to 4 times as far from the reference's logits.
    """
    base, scaling = config.rope_base, config.rope_scaling
    if windowed:  # the layers that have a window
        base, scaling = config.rope_base_window, None
    half = (config.rotary_dim or config.head_dim) // 2
    inv_freq = 1.0 / base ** (torch.arange(half, dtype=torch.float32, device=device) / half)
    if scaling is not None:
        inv_freq = scaled_rope(inv_freq, base, **scaling)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inv_freq)
    table = torch.stack([angles.cos(), angles.sin()], dim=1)
    table = table * (scaling or {}).get("attention_factor", 1.0)
    still = torch.tensor([1.0, 0.0], device=device).view(1, 2, 1)  # pairs that no position turns
    return torch.cat([table, still.expand(length, 2, config.head_dim // 2 - half)], dim=2)


def scaled_rope(inv_freq, base: float, rope_type: str, **scaling):
    """The frequencies [C/2] of a model whose waves were stretched for a longer context."""
    if rope_type == "longrope":
        return inv_freq / torch.tensor(scaling["short_factor"], device=inv_freq.device)
    factor = scaling["factor"]
    if rope_type == "linear":
        return inv_freq / factor
    context, wavelength = scaling["original_max_position_embeddings"], 2 * math.pi / inv_freq
    if rope_type == "yarn":
        half = len(inv_freq)

        def pair_of(turns):  # within the original context, as a fraction
            return half * math.log(context / (2 * math.pi * turns), base)

        low, high = pair_of(scaling["beta_fast"]), pair_of(scaling["beta_slow"])
        if scaling["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        ramp = (torch.arange(half, device=inv_freq.device) - low) / (0.001 if low == high else high - low)
        return torch.lerp(inv_freq, inv_freq / factor, ramp.clamp(0, 1))
    longest, shortest = context / scaling["low_freq_factor"], context / scaling["high_freq_factor"]  # llama3
    smooth = (context / wavelength - scaling["low_freq_factor"]) / (context / shortest - context / longest)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    stretched = torch.where(wavelength > longest, inv_freq / factor, between)
    return torch.where(wavelength < shortest, inv_freq, stretched)


def apply_rope(x, rope):
    """Rotate x [B, T, heads, C] by rope [B or 1, T, 1, 2, C/2]; in float32, rounded once."""
    x1, x2 = x.float().unflatten(-1, (2, -1)).unbind(-2)
    cos, sin = rope.unbind(-2)
    return torch.stack([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-2).flatten(-2).to(x.dtype)


def on_gpu_kernels(x) -> bool:
    """Whether to take the kernels for GPUs, which have no gradients."""
    return gpu_kernels is not None and gpu_kernels.runs_on(x.device) and not torch.is_grad_enabled()


def on_cpu_kernels(x) -> bool:
    """The same for `cpu_kernels.py`."""
    return cpu_kernels is not None and cpu_kernels.runs_on(x)


def is_single_token(x) -> bool:
    return x.numel() == x.shape[-1]


def takes_few_tokens(x, weight) -> bool:
    """Whether `gpu_products.linear` takes x, on such a GPU: one token, or up to 64 where it is quicker than PyTorch."""
    few = is_certain(x.numel() <= 64 * x.shape[-1])  # of a dynamic T this is False, and no guard
    return is_single_token(x) or (few and gpu_products.takes_few_tokens(x, weight))


def matvec(x, weight):
    """weight @ x for x [D]: a reading of the weights, at which a CPU's general product has a third of the speed."""
    if x.is_cuda:
        return F.linear(x[None], weight)[0]
    if torch.compiler.is_compiling():  # one fused loop; eager, the product would be as large as the weights
        return (weight * x).sum(-1)
    return torch.mv(weight, x)


def compiles_for_few_tokens(x) -> bool:
    """Whether a graph for a CPU is being made in which x [..., D] is of 16 tokens or less, and always as many."""
    few = is_certain(x.numel() <= 16 * x.shape[-1])  # of a dynamic T this is False, and no guard
    return x.device.type == "cpu" and torch.compiler.is_compiling() and few


def linear(x, weight, bias=None):
    if cpu_kernels is not None and cpu_kernels.takes(rows := x.flatten(0, -2), weight):
        y = cpu_kernels.linear(rows, weight).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    weight = weight.to(x.dtype)  # see `checkpoint.build_model`, which may keep 16 bits
    if on_gpu_kernels(x) and takes_few_tokens(x, weight):
        return gpu_products.linear(x.flatten(0, -2), weight, bias=bias).view(*x.shape[:-1], -1)
    if is_single_token(x):
        y = matvec(x.flatten(), weight).view(*x.shape[:-1], -1)
    elif x.dtype == torch.float32 and compiles_for_few_tokens(x):
        # One loop reads the weights once for all tokens. A pass of SmolLM2 over 6 takes 33 ms, with the general product
        # 70, over one 20. In bf16 that has instructions of its own.
        y = torch.stack([(weight * row).sum(-1) for row in x.flatten(0, -2)]).view(*x.shape[:-1], -1)
    else:
        y = F.linear(x, weight)  # the bias by itself: addmm in a nested region makes a dynamic T constant (torch 2.13)
    return y if bias is None else y + bias


def quantize_heads(x):
    """x [..., C] as int8 and bf16 scales [...], which the int8 cache holds; the largest of each head becomes 127."""
    x = x.float()
    # Rounded by their bits: a compiled graph leaves out the way to bf16 and back, so it would divide by other scales
    # than it stores, and numbers be off by 0.85 steps.
    bits = (x.abs().amax(-1).clamp(min=1e-8) / 127).view(torch.int32)
    scales = ((bits + 0x7FFF + (bits >> 16 & 1)) & -0x10000).view(torch.float32)  # to nearest, ties to even
    return (x / scales[..., None]).round().clamp(-127, 127).to(torch.int8), scales.bfloat16()


def store(cache, values, input_pos):
    """Write values [B, K, T, ...] into their slots of a cache [B, K, S, ...]; without positions, from the first on."""
    (B, K, T), values = values.shape[:3], values.to(cache.dtype)  # `.to(float16)` changes scales too
    if input_pos is None:  # a slice would make a dynamic T constant where it equals S
        cache[:B].index_copy_(2, torch.arange(T, device=values.device), values)
    else:
        row = torch.arange(B, device=values.device)[:, None, None]
        head = torch.arange(K, device=values.device)[:, None]
        cache.index_put_((row, head, input_pos[:, None]), values)  # indices broadcast to [B, K, T]


def through_cache(cache, scales, values, input_pos):
    """Store values [B, K, T, C] of new tokens, if there is a cache; with positions, return all there is [B, K, S, C].

    An int8 cache has scales [B, K, S].
    """
    if cache is None:
        return values
    if scales is None:
        store(cache, values, input_pos)
    else:
        numbers, new_scales = quantize_heads(values)
        store(cache, numbers, input_pos)
        store(scales, new_scales, input_pos)
    if input_pos is None:
        return values
    B = len(values)
    return cache[:B] if scales is None else (cache[:B].float() * scales[:B, ..., None].float()).to(values.dtype)


def attention(q, k, v, mask, scale: float, sinks=None):
    """softmax(scale q k^T) v for q [B, H, T, C] and k, v [B, K, S, C]; mask [B, 1, T, S], or None for causal.

    `sinks` [H] are one more score of each head, whose value is zero.
    """
    if sinks is not None:
        return attention_with_sinks(q, k, v, mask, scale, sinks)
    if mask is None or not compiles_for_few_tokens(q.transpose(1, 2).flatten(2)):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    # Few tokens on a CPU: fused loops, which read 16-bit caches as fast as 32-bit ones. SDPA takes 84 us a layer in
    # float32 and 213 in bf16 on two Zen 4 cores for one token, these 35 for two (SmolLM2, 256 slots).
    groups = q.unflatten(1, (k.shape[1], -1))[..., None, :]  # [B, K, H/K, T, 1, C]
    scores = (groups.float() * k[:, :, None, None].float()).sum(-1) * scale  # [B, K, H/K, T, S]
    weights = scores.masked_fill(~mask[:, :, None], float("-inf")).softmax(-1)
    return (weights[..., None] * v[:, :, None, None].float()).sum(-2).flatten(1, 2).to(v.dtype)


def attention_with_sinks(q, k, v, mask, scale: float, sinks):
    """A slot in front, whose key is 1 where every query has its head's sink and the other keys have 0.

    So any product of attention serves. A query in front stands for that slot's own, to keep the mask causal.
    """
    (B, H, T, C), dtype = q.shape, q.dtype
    q = torch.cat([q, (sinks / scale).to(dtype).view(1, H, 1, 1).expand(B, H, T, 1)], dim=-1)
    first = F.one_hot(torch.full((1, 1), C, device=k.device), C + 1).to(dtype).expand(*k.shape[:2], 1, C + 1)
    k, v = torch.cat([first, F.pad(k, (0, 1))], dim=2), F.pad(v, (0, 1, 1, 0))
    if mask is None:
        return attention(F.pad(q, (0, 0, 1, 0)), k, v, None, scale)[:, :, 1:, :C]
    return attention(q, k, v, F.pad(mask, (1, 0), value=True), scale)[..., :C]


def flash_attention_with_sinks(q, k, v, window: int | None, scale: float, sinks):
    """The same of a new prompt by PyTorch's kernel, which knows windows; q [B, T, H, C] and k, v [B, T, K, C].

    It knows no sinks, but tells the logarithm of each softmax's sum. So the result is scaled by the share of the sum
    with the sink in it: sum / (sum + exp(sink)). That logarithm has no gradients.
    """
    T, sides = q.shape[1], (None, None) if window is None else (window - 1, 0)
    more = {"scale": scale, "window_size_left": sides[0], "window_size_right": sides[1]}
    y, log_sums = torch.ops.aten._flash_attention_forward(q, k, v, None, None, T, T, 0.0, True, False, **more)[:2]
    shares = torch.sigmoid(log_sums - sinks.float()[:, None])  # [B, H, T]
    return (y.float() * shares.transpose(1, 2)[..., None]).to(y.dtype)


def sliding_attention(q, k, v, window: int, scale: float, sinks=None):
    """Causal attention in which each token sees `window` ones, itself the last; shapes as for `attention`, T = S.

    Blocks of `window` queries see their own block and the one before, so no mask is larger than window x 2 window
    (Beltagy et al. 2020, "Longformer", section 3.2).
    """
    B, H, T, C = q.shape
    k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))  # a fused kernel takes a mask or groups
    first = attention(*(t[:, :, :window] for t in (q, k, v)), None, scale, sinks)
    padding = -T % window
    q, k, v = (F.pad(t, (0, 0, 0, padding)).unflatten(2, (-1, window)).transpose(1, 2) for t in (q, k, v))
    k, v = (torch.cat([t[:, :-1], t[:, 1:]], dim=3).flatten(0, 1) for t in (k, v))  # [B (blocks - 1), H, 2 window, C]
    slot = torch.arange(2 * window, device=q.device)
    query = slot[window:, None]
    y = attention(q[:, 1:].flatten(0, 1), k, v, ((slot <= query) & (slot > query - window))[None, None], scale, sinks)
    y = y.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)  # [B, H, (blocks - 1) window, C]
    return torch.cat([first, y], dim=2)[:, :, :T]  # T - window tokens may be one, which would fix T if compiled


class Linear(nn.Linear):
    def gpu_weights(self):
        """What `gpu_products.linear` takes after x."""
        return (self.weight,)

    def cpu_weights(self, x):
        """What `cpu_kernels.linear` takes after x [T, K]; None if it takes no such x."""
        return (self.weight,) if cpu_kernels is not None and cpu_kernels.takes(x, self.weight) else None

    def plain_weight(self, dtype):
        """The weight as it multiplies, [N, K]."""
        return self.weight

    def rows(self, expert, experts: int):
        """Each expert's rows [n, N/experts, K] of a matrix of so many, `expert` [n], as it multiplies."""
        return self.weight.unflatten(0, (experts, -1))[expert]

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class HeadNorm(nn.RMSNorm):
    """Of q or k [..., heads C]: of each head, or of all of them, which is `size` numbers at once."""

    def __init__(self, config: GPTConfig, size: int):
        super().__init__(size, eps=config.norm_eps)
        self.plus_one = config.norm_plus_one

    def forward(self, x):
        x = x.unflatten(-1, (-1, len(self.weight)))
        x = plus_one_norm(x, self.weight, self.eps) if self.plus_one else super().forward(x)
        return x.flatten(-2)


def plus_one_norm(x, weight, eps: float):
    """The RMS norm of weights that are stored as what is added to 1, rounded once."""
    return F.rms_norm(x.float(), weight.shape, weight.float() + 1, eps).to(x.dtype)


def tells(x, peers) -> bool:
    """Whether a product's kernel tells other ranks its part of the update of x, so that the next norm's only hears."""
    return peers is not None and is_single_token(x) and on_gpu_kernels(x)


ALONE = (None, 0)  # whom a product tells its part of an update, and as which rank: nobody


def part_of_sum(matrix, x, to):
    """matrix(x), of which each rank has a part, told to all of them if it can be."""
    if not tells(x, to[0]):
        return matrix(x)
    more = {"bias": matrix.bias, "peers": to[0], "rank": to[1]}
    return gpu_products.linear(x.flatten(0, -2), *matrix.gpu_weights(), **more).view(*x.shape[:-1], -1)


class AddNorm(nn.Module):
    """The residual sum and the norm after it. An update is what this rank computed; those of all ranks are summed."""

    def __init__(self, config: GPTConfig, rank: int, ranks: int, pre_norm: bool = True):
        super().__init__()
        self.rank, self.ranks, self.is_rms, self.pre_norm = rank, ranks, config.norm == "rms", pre_norm
        self.eps, self.plus_one, self.scale = config.norm_eps, config.norm_plus_one, config.residual_scale
        self.weight = nn.Parameter(torch.ones(config.dim)) if pre_norm else None
        self.bias = nn.Parameter(torch.zeros(config.dim)) if pre_norm and not self.is_rms else None
        self.register_buffer("peers", None, persistent=False)  # addresses [ranks], see FastGPT.connect_ranks
        self.register_buffer("told_peers", None, persistent=False)  # those that the product before has told its part

    def forward(self, residual, update=None, post=None, told=True, module=None):
        """The sum, and its norm, of residual and update [..., D], or what a `module` projects the norm to. `post` [D]
        are weights of a norm of the update. A row that was one of several when it was computed, so that nobody has told
        it, is not `told`."""
        if module is not None and (joined := self.joined(module, residual, update, post, told)):
            return joined
        residual, x = self.add(residual, update, post, told)
        return residual, x if module is None else module.project(x)

    def joined(self, module, residual, update, post, told):
        """The same by one kernel, or None: of a single token a GPU's product takes the norm by itself, if it can."""
        (matrix, activation), of_experts = module.projection(), isinstance(module, SparseMLP)
        if update is None or not self.is_plain(post):
            return None
        if self.ranks > 1 and (of_experts or not (told and tells(residual, self.told_peers))):
            return None  # a router hears others' parts no faster than a norm's kernel does
        weights = matrix.gpu_weights() if is_single_token(residual) and on_gpu_kernels(residual) else None
        if weights is None:
            return None
        update, norm, more = update.flatten(0, -2), (self.weight, self.eps), {"bias": matrix.bias, **activation}
        if of_experts:
            if not gpu_products.takes_router(weights[0]):
                return None
            residual, *projected = gpu_products.norm_router(update, residual, *norm, *weights, **more)
            return residual, projected
        if not gpu_products.takes_norm(update, activation.get("gated", False), self.ranks, *weights):
            return None
        more |= {"peers": self.told_peers, "rank": self.rank}
        residual, y = gpu_products.norm_linear(update, residual, *norm, *weights, **more)
        return residual, y.view(*residual.shape[:-1], -1)

    def add(self, residual, update, post, told):
        if self.ranks == 1 or update is None:
            few = is_certain(residual.numel() <= 64 * residual.shape[-1])
        else:
            few = self.peers is not None
            few = few and is_certain(residual.numel() <= gpu_kernels.MOST_ROWS * residual.shape[-1])
        if few and on_gpu_kernels(residual):
            told = told and update is not None and tells(residual, self.told_peers)
            peers = None if update is None else self.told_peers if told else self.peers
            norms = (self.weight, self.bias, post, self.eps, self.plus_one)
            return gpu_kernels.add_norm(residual, update, *norms, self.scale, peers, self.rank, told)
        if self.ranks == 1 and self.is_plain(post) and update is not None and on_cpu_kernels(residual):
            return cpu_kernels.add_norm(residual, update, self.weight, self.eps)
        if update is not None:
            update = all_reduce(update, self.ranks)
            update = update if post is None else self.norm(update, post)
            residual = residual + (update if self.scale == 1 else update * self.scale)
        return residual, self.norm(residual, self.weight) if self.pre_norm else residual

    def is_plain(self, post) -> bool:
        """Whether it is an RMS norm of residual + update."""
        return self.is_rms and self.pre_norm and post is None and not self.plus_one and self.scale == 1

    def norm(self, x, weight):
        if self.plus_one:
            return plus_one_norm(x, weight, self.eps)
        if self.is_rms:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias, self.eps)


class Attention(nn.Module):
    """The heads of one rank: `config` is that of `tp.shard_config`, as in MLP."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.sizes = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        self.head_dim, self.window, self.rotates = config.head_dim, config.window_of(layer), config.rotates(layer)
        self.scale = config.attention_scale or config.head_dim**-0.5
        self.queries_per_kv = config.n_head // config.n_kv_head
        self.qkv = Linear(config.dim, sum(self.sizes), bias=config.qkv_bias)
        self.out = Linear(self.sizes[0], config.dim, bias=config.o_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            size_q, size_k = self.sizes[:2] if config.qk_norm == "all" else [config.head_dim] * 2
            self.q_norm, self.k_norm = HeadNorm(config, size_q), HeadNorm(config, size_k)
        self.sinks = nn.Parameter(torch.zeros(config.n_head)) if config.sinks else None
        for name in ("k_cache", "v_cache", "k_scale_cache", "v_scale_cache"):  # a module's own buffers are its cache
            self.register_buffer(name, None, persistent=False)
        self.register_buffer("arrived", None, persistent=False)  # of the GPU's kernel, which counts its programs

    def setup_cache(self, shape, dtype, device):
        """Empty caches [B, K, S, C]; those of int8 have a scale for each head of each token."""
        for name in "kv":
            setattr(self, f"{name}_cache", torch.zeros(shape, dtype=dtype, device=device))
            scales = torch.zeros(shape[:3], dtype=torch.bfloat16, device=device) if dtype == torch.int8 else None
            setattr(self, f"{name}_scale_cache", scales)
        if gpu_kernels is not None and gpu_kernels.runs_on(device):
            self.arrived = torch.zeros(shape[0] * shape[1], dtype=torch.int32, device=device)

    def by_gpu_kernel(self, x, input_pos) -> bool:
        """Whether a GPU's kernel, which needs no mask, takes tokens x [B, T, ...] at these positions."""
        most = 16 if x.dtype == torch.float32 else 64  # rows, see `gpu_kernels.attention`
        few = is_certain(x.shape[1] * self.queries_per_kv <= most)  # of a dynamic T this is False, and no guard
        return input_pos is not None and on_gpu_kernels(x) and few

    def projection(self):
        """The matrix that comes first, and what `gpu_products.linear` takes for what follows it."""
        return self.qkv, {}

    def project(self, x):
        return self.qkv(x)

    def forward(self, qkv, rope, mask, input_pos, to=ALONE):
        """The update of this rank [B, T, D], of what `project` gave: queries, keys and values [B, T, (H + 2 K) C]."""
        y = self.attend(qkv, rope, mask, input_pos)
        return part_of_sum(self.out, y.reshape(*qkv.shape[:2], -1), to)

    def attend(self, qkv, rope, mask, input_pos):
        """The heads' results [B, T, H, C]."""
        B, T, _ = qkv.shape
        q, k, v = qkv.split(self.sizes, dim=-1)
        by_gpu_kernel = self.by_gpu_kernel(qkv, input_pos)
        norms_there = by_gpu_kernel and self.qk_norm is True
        if self.qk_norm and not norms_there:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(B, T, -1, self.head_dim) for t in (q, k, v))
        caches = (self.k_cache, self.v_cache, self.k_scale_cache, self.v_scale_cache)
        window = self.window or (0 if input_pos is None else self.k_cache.shape[2])
        if by_gpu_kernel:
            norms = ()
            if norms_there:
                norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, self.q_norm.plus_one)
            more = (window, self.scale, self.arrived, self.sinks, *norms)
            return gpu_kernels.attention(q, k, v, rope, input_pos, *caches, *more)
        if input_pos is not None and cpu_kernels is not None and cpu_kernels.attention_takes(q, self.k_cache):
            return cpu_kernels.attention((q, k, v), rope, input_pos, caches, window, self.scale, self.sinks)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        k = through_cache(self.k_cache, self.k_scale_cache, k.transpose(1, 2), input_pos)
        v = through_cache(self.v_cache, self.v_scale_cache, v.transpose(1, 2), input_pos)
        new_with_sinks = self.sinks is not None and input_pos is None
        flash_takes_it = q.dtype != torch.float32 and self.head_dim in range(8, 257, 8)
        if new_with_sinks and flash_takes_it and on_gpu_kernels(q):
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            return flash_attention_with_sinks(q, k, v, self.window, self.scale, self.sinks)
        if input_pos is None and self.window is not None and T > self.window:
            y = sliding_attention(q.transpose(1, 2), k, v, self.window, self.scale, self.sinks)
        else:
            y = attention(q.transpose(1, 2), k, v, mask, self.scale, self.sinks)
        return y.transpose(1, 2)


class SigmoidGELU(nn.Module):
    def forward(self, x):
        return F.silu(1.702 * x) / 1.702


class SquaredReLU(nn.Module):
    def forward(self, x):
        return x * F.relu(x)


ACTIVATIONS = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, "tanh"),
    "gelu_sigmoid": SigmoidGELU,
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
}


class Gate(nn.Module):
    """act(gate) * up of the two halves of x; with a clamp as GPTConfig says."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.act, self.clamp = ACTIVATIONS[config.activation](), config.gate_clamp
        self.is_silu = config.activation == "silu" and self.clamp is None

    def forward(self, x):
        gate, up = x.chunk(2, dim=-1)
        if self.clamp is not None:
            gate, up = gate.clamp(max=self.clamp), up.clamp(min=-self.clamp, max=self.clamp) + 1
        return self.act(gate) * up


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gated, self.activation = config.gated, config.activation
        self.act = Gate(config) if config.gated else ACTIVATIONS[config.activation]()
        self.silu_gated = config.gated and self.act.is_silu and not config.mlp_bias
        self.clamp = config.gate_clamp
        width = config.hidden_dim * (2 if config.gated else 1)
        self.gate_up = Linear(config.dim, width, bias=config.mlp_bias)  # without a gate, up alone
        self.down = Linear(config.hidden_dim, config.dim, bias=config.mlp_bias)

    def projection(self):
        return self.gate_up, {"activation": self.activation, "gated": self.gated, "clamp": self.clamp}

    def project(self, x):
        weights = self.gate_up.gpu_weights() if on_gpu_kernels(x) else None
        if weights and takes_few_tokens(x, weights[0]):
            matrix, activation = self.projection()
            y = gpu_products.linear(x.flatten(0, -2), *weights, bias=matrix.bias, **activation)
            return y.view(*x.shape[:-1], -1)
        if self.silu_gated and self.gate_up.cpu_weights(rows := x.flatten(0, -2)):
            return cpu_kernels.linear(rows, *self.gate_up.cpu_weights(rows), gated=True).view(*x.shape[:-1], -1)
        return self.act(self.gate_up(x))

    def forward(self, hidden, to=ALONE):
        """The update of this rank [..., D], of what `project` gave: hidden units [..., F]."""
        return part_of_sum(self.down, hidden, to)


def multiply_by_experts(x, weight, ends):
    """x [N, K], sorted by expert, times each row's own matrix of weight [E, M, K]; `ends` [E] are where experts end."""
    # In a CUDA graph the host cannot know the ends. PyTorch's grouped product asks it, but on Hopper and 10.x.
    in_graph = x.is_cuda and torch.cuda.is_current_stream_capturing()
    asks_nobody = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
    if x.is_cuda and x.dtype == torch.bfloat16 and (asks_nobody or not in_graph):
        return torch._grouped_mm(x, weight.transpose(1, 2), offs=ends.int())
    if in_graph:
        expert = torch.bucketize(torch.arange(len(x), device=x.device), ends, right=True)
        y = x.new_zeros(len(x), weight.shape[1])
        for i, matrix in enumerate(weight):
            y = torch.where((expert == i)[:, None], x @ matrix.T, y)
        return y
    starts = [0, *ends.tolist()]
    return torch.cat([x[starts[i] : starts[i + 1]] @ matrix.T for i, matrix in enumerate(weight)])


def experts_weight_gradients(gradient, x, ends):
    """[E, M, K] of `multiply_by_experts`, for the gradient [N, M] of its result."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        return torch._grouped_mm(gradient.T, x, offs=ends.int())
    starts = [0, *ends.tolist()]
    return torch.stack([gradient[i:end].T @ x[i:end] for i, end in zip(starts, starts[1:], strict=False)])


def _experts_backward(ctx, gradient):
    x, weight, ends = ctx.saved_tensors
    gradient = gradient.contiguous()
    of_x = torch.ops.gpt_twin.multiply_by_experts(gradient, weight.transpose(1, 2), ends)
    return of_x, torch.ops.gpt_twin.experts_weight_gradients(gradient, x, ends), None


# Operators of their own, because torch._grouped_mm is compiled for bf16 alone and computes on a CPU only eager (2.13).
if not hasattr(torch.ops.gpt_twin, "multiply_by_experts"):
    torch.library.define("gpt_twin::multiply_by_experts", "(Tensor x, Tensor weight, Tensor ends) -> Tensor")
    torch.library.impl("gpt_twin::multiply_by_experts", "CompositeExplicitAutograd", multiply_by_experts)
    torch.library.register_fake(
        "gpt_twin::multiply_by_experts", lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[1])
    )
    torch.library.define("gpt_twin::experts_weight_gradients", "(Tensor gradient, Tensor x, Tensor ends) -> Tensor")
    torch.library.impl("gpt_twin::experts_weight_gradients", "CompositeExplicitAutograd", experts_weight_gradients)
    torch.library.register_fake(
        "gpt_twin::experts_weight_gradients",
        lambda gradient, x, ends: x.new_empty(ends.shape[0], gradient.shape[1], x.shape[1]),
    )
    torch.library.register_autograd(
        "gpt_twin::multiply_by_experts",
        _experts_backward,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )


class SparseMLP(nn.Module):
    """A mixture of experts, one rank's part of each."""

    def __init__(self, config: GPTConfig, rank: int, ranks: int):
        super().__init__()
        self.rank, self.ranks, self.n_expert, self.used = rank, ranks, config.n_expert, config.n_expert_used
        self.norm_topk_prob = config.norm_topk_prob
        self.gated, bias = Gate(config), config.mlp_bias
        self.activation = config.activation
        self.router = Linear(config.dim, config.n_expert, bias=config.router_bias)
        self.experts_gate_up = Linear(config.dim, config.n_expert * 2 * config.hidden_dim, bias=bias)
        self.experts_down = Linear(config.hidden_dim, config.n_expert * config.dim, bias=bias)
        self.register_buffer("peers", None, persistent=False)  # addresses [ranks], see FastGPT.connect_ranks

    def projection(self):
        return self.router, {}

    def project(self, x):
        """x, which the experts take too, and the router's logits [N, experts]."""
        return x, self.router(x.flatten(0, -2))

    def forward(self, projected, to=ALONE):
        """The update of this rank [..., D], of what `project` gave."""
        x, logits = projected
        rows = x.flatten(0, -2)  # [N, D]
        by_kernels = on_gpu_kernels(x) and self.experts_gate_up.gpu_weights()
        most = 64 if by_kernels else 32  # pairs of a token and an expert
        few = not torch.is_grad_enabled() and is_certain(rows.shape[0] * self.used <= most)
        told = tells(x, to[0])
        if not told:  # so that the choice is every rank's; of a single token all ranks computed the same by kernels
            logits = from_rank_0(logits, self.ranks, self.peers, self.rank)
        if few and by_kernels:
            y = self.of_few_by_kernels(rows, logits, to if told else ALONE)
        else:
            weights, chosen = logits.float().softmax(-1).topk(self.used)  # [N, used]
            if self.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            of_few = few and torch.compiler.is_compiling()
            y = (self.of_few if of_few else self.of_many)(rows, weights.to(x.dtype), chosen)
        return y.view(x.shape)

    def of_few_by_kernels(self, x, logits, to):
        gate_up, down = self.experts_gate_up, self.experts_down
        kind = (self.activation, self.gated.clamp)
        hidden = gpu_products.gated_experts(x, logits, self.used, *kind, *gate_up.gpu_weights(), bias=gate_up.bias)
        more = {"bias": down.bias, "peers": to[0], "rank": to[1]}
        return gpu_products.sum_experts(hidden, logits, self.used, self.norm_topk_prob, *down.gpu_weights(), **more)

    def with_bias(self, y, matrix, expert):
        """y [n, N/experts], each row with the bias of its expert's part [N/experts] of a matrix of all."""
        return y if matrix.bias is None else y + matrix.bias.unflatten(0, (self.n_expert, -1))[expert].to(y.dtype)

    def of_few(self, x, weights, chosen):
        """Products with the gathered rows, which the compiler does not gather but reads where they are."""
        y = torch.zeros_like(x)
        for place in range(self.used):
            expert = chosen[:, place]
            hidden = (self.experts_gate_up.rows(expert, self.n_expert) * x[:, None]).sum(-1).to(x.dtype)  # [N, 2 F]
            hidden = self.gated(self.with_bias(hidden, self.experts_gate_up, expert))
            out = (self.experts_down.rows(expert, self.n_expert) * hidden[:, None]).sum(-1).to(x.dtype)  # [N, D]
            y = y + weights[:, place, None] * self.with_bias(out, self.experts_down, expert)
        return y

    def of_many(self, x, weights, chosen):
        expert = chosen.flatten()
        order = expert.argsort(stable=True)  # [N used]
        ends = (expert[:, None] == torch.arange(self.n_expert, device=x.device)).sum(0).cumsum(0)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # which does not know the grouped product
            x, weights = (t.to(torch.get_autocast_dtype(kind)) for t in (x, weights))
        matrices = self.experts_gate_up, self.experts_down
        packed = [m.gpu_weights() for m in matrices] if on_gpu_kernels(x) else [None]
        if all(packed) and all(gpu_products.takes_sorted(x, weight) for weight, *_ in packed):
            gate_up, down = ([*parts, None][:3] + [matrix.bias] for parts, matrix in zip(packed, matrices, strict=True))
            kind = (self.activation, self.gated.clamp)
            y = gpu_products.many_experts(x, order, ends, weights.flatten(), *kind, gate_up, down)
            return y.unflatten(0, (-1, self.used)).sum(1)
        gate_up, down = (m.plain_weight(x.dtype).to(x.dtype).unflatten(0, (self.n_expert, -1)) for m in matrices)
        multiply, expert, token = torch.ops.gpt_twin.multiply_by_experts, expert[order], order // self.used
        hidden = self.gated(self.with_bias(multiply(x[token], gate_up, ends), self.experts_gate_up, expert))
        out = self.with_bias(multiply(hidden, down, ends), self.experts_down, expert)  # [N used, D]
        return torch.zeros_like(x).index_add(0, token, out * weights.flatten()[order, None])


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, rank: int, ranks: int):
        super().__init__()
        self.parallel, self.rank = config.parallel, rank
        self.register_buffer("attn_peers", None, persistent=False)  # addresses [ranks], see FastGPT.connect_ranks
        self.register_buffer("mlp_peers", None, persistent=False)
        self.norm_1 = AddNorm(config, rank, ranks, config.pre_norm)
        self.attn = Attention(config, layer)
        self.norm_2 = AddNorm(config, rank, ranks, config.pre_norm)
        self.mlp = SparseMLP(config, rank, ranks) if config.n_expert else MLP(config)
        # Norms of updates, whose weights are for the AddNorm that adds those.
        self.post_attn = nn.RMSNorm(config.dim) if config.post_norm else None
        self.post_mlp = nn.RMSNorm(config.dim) if config.post_norm else None

    def forward(self, *inputs):
        """The residual stream, and what the next norm adds to it, so that sum and norm can be one kernel.

        The inputs are those of `compute`, where `post` is the weight of the norm that the update goes through first, if
        there is one. In a graph with gradients each layer is written out: of three regions and more torch 2.13 gets
        the gradients wrong, by their own size and without a word.
        """
        return self.compute(*inputs) if torch.is_grad_enabled() else self.compute_in_region(*inputs)

    def compute(self, residual, update, post, rope, mask, input_pos):
        residual, x = self.norm_1(residual, update, post, module=self.attn)
        update = self.attn(x, rope, mask, input_pos, (self.attn_peers, self.rank))
        if self.parallel:
            _, x = self.norm_2(residual)
            return residual, update + self.mlp(self.mlp.project(x))
        residual, x = self.norm_2(residual, update, self.post_attn and self.post_attn.weight, module=self.mlp)
        return residual, self.mlp(x, (self.mlp_peers, self.rank))

    compute_in_region = torch.compiler.nested_compile_region(compute)


class FastGPT(nn.Module):
    """Token ids to logits, with a static cache. See `forward` and, before giving it positions, `setup_caches`.

    Of `ranks` processes this one, number `rank`, holds its shard of a model of this config.
    """

    def __init__(self, config: GPTConfig, rank: int = 0, ranks: int = 1):
        super().__init__()
        self.config, self.rank, self.ranks = config, rank, ranks
        local, rows = shard_config(config, ranks), vocab_rows(config, ranks)
        self.n_kv_head = local.n_kv_head
        self.wte = Embedding(rows, config.dim)
        self.wpe = Embedding(config.block_size, config.dim) if config.rope_base is None else None
        self.layers = nn.ModuleList(Block(local, layer, rank, ranks) for layer in range(config.n_layer))
        self.norm_f = AddNorm(config, rank, ranks)
        self.lm_head = None if config.tie_embeddings else Linear(config.dim, rows, bias=config.head_bias)
        self.register_buffer("rope", None, persistent=False)  # [S, 2, C/2]
        self.register_buffer("rope_window", None, persistent=False)  # of layers with a base of their own
        self.inbox = None  # this rank's memory for what the others tell it; no buffer, because it must stay where it is
        self.register_buffer("peers", None, persistent=False)  # addresses [ranks] of all of them
        self.max_batch_size = self.max_seq_length = 0
        self.int8_cache = False
        self.memory = object()  # another one whenever weights, caches or tables have moved, see `decode.Recorded`

    def setup_caches(self, max_batch_size: int, max_seq_length: int, int8: bool | None = None):
        """Allocate S = max_seq_length slots for each of max_batch_size rows, empty, in the norms' dtype.

        With `int8`, keys and values are int8, with a bf16 scale for each head of each token; None takes the kind that
        was there. All ranks of a split model call this together. Raises ValueError if the slots are more than the
        context.
        """
        config, weight = self.config, self.norm_f.weight  # in the dtype of activations
        if max_seq_length > config.block_size:
            raise ValueError(f"{max_seq_length} cache slots are more than the context of {config.block_size} tokens")
        self.int8_cache = self.int8_cache if int8 is None else int8
        shape = (max_batch_size, self.n_kv_head, max_seq_length, config.head_dim)
        for layer in self.layers:
            layer.attn.setup_cache(shape, torch.int8 if self.int8_cache else weight.dtype, weight.device)
        self.max_batch_size, self.max_seq_length = max_batch_size, max_seq_length
        self.make_tables()
        if self.ranks > 1 and self.inbox is None:
            self.connect_ranks()

    def make_tables(self):
        """Those of the rotary angles, for the slots of the cache."""
        config, device, self.memory = self.config, self.wte.weight.device, object()
        if config.rope_base is not None:
            self.rope = rope_table(config, self.max_seq_length, device)
        if config.rope_base_window is not None:
            self.rope_window = rope_table(config, self.max_seq_length, device, windowed=True)

    def connect_ranks(self):
        """Give the kernels, on GPUs that reach each other's memory, some of it for their messages."""
        device = self.wte.weight.device
        if gpu_kernels is None or not gpu_kernels.runs_on(device):
            return
        shape = (self.ranks, self.config.dim)
        told = gpu_kernels.told_words(*shape)
        sizes = (gpu_kernels.gather_words(self.ranks), gpu_kernels.inbox_words(*shape), told, told)
        self.inbox, peers = shared_memory(sum(sizes), device)
        if peers is None:
            return
        self.peers, of_norms, of_attn, of_mlp = (peers + 8 * sum(sizes[:i]) for i in range(4))
        for module in self.modules():
            if isinstance(module, AddNorm):
                module.peers = of_norms
            elif isinstance(module, SparseMLP):
                module.peers = self.peers
        # The two updates of a parallel block are one sum, and the first update of all is the embedding.
        following = [*(layer.norm_1 for layer in self.layers[1:]), self.norm_f]
        for layer, norm in zip(self.layers, following, strict=True):
            if not layer.parallel:
                layer.attn_peers = layer.norm_2.told_peers = of_attn
                layer.mlp_peers = norm.told_peers = of_mlp

    def from_rank_0(self, x):
        """Rank 0's x, of integers up to 2^24, on every rank."""
        return from_rank_0(x, self.ranks, self.peers, self.rank)

    def load_state_dict(self, *args, **more):
        self.memory = object()
        return super().load_state_dict(*args, **more)

    def _apply(self, fn, recurse=True):
        """`.to(dtype)` comes through here; the table of angles stays float32, scales of an int8 cache bf16."""
        super()._apply(fn, recurse)
        for attn in (layer.attn for layer in self.layers if layer.attn.k_scale_cache is not None):
            attn.k_scale_cache, attn.v_scale_cache = attn.k_scale_cache.bfloat16(), attn.v_scale_cache.bfloat16()
        if self.max_seq_length:
            self.make_tables()
        return self

    def embed(self, idx):
        """This rank's part of the embedding [B, T, D]: zeros of a token that another rank has."""
        if self.ranks == 1:
            return self.wte(idx)
        row = idx - self.rank * self.wte.num_embeddings
        ours = (row >= 0) & (row < self.wte.num_embeddings)
        return torch.where(ours[..., None], self.wte(torch.where(ours, row, 0)), 0)

    def forward(self, idx, input_pos=None, last=None):
        """Logits [B, T, V] for ids [B, T], or [B, 1, V] of one token of each row, whose indices in T are `last` [B].

        `input_pos` [B, T] are the tokens' positions, each row its own and counting up by one; each token attends to all
        cached slots up to its own. Positions must be below `max_seq_length`, or there is an index error. None means a
        sequence from position 0 on, which fills the cache if there is one. Raises ValueError for other shapes, and for
        more tokens or rows than there is room for.
        """
        B, T = idx.shape
        if input_pos is not None and input_pos.shape != idx.shape:
            raise ValueError(f"input_pos is {list(input_pos.shape)}; it must be {[B, T]}, as the ids are")
        if input_pos is not None and not self.max_seq_length:
            raise ValueError("input_pos needs a cache: call setup_caches first")
        room = self.max_seq_length or self.config.block_size
        if T > room:
            raise ValueError(f"{T} tokens are more than there is room for, {room}")
        if self.max_batch_size and B > self.max_batch_size:
            raise ValueError(f"{B} rows are more than the cache's {self.max_batch_size}: call setup_caches again")
        window = self.config.sliding_window
        positions = torch.arange(T, device=idx.device)[None] if input_pos is None else input_pos
        update = self.embed(idx).to(self.norm_f.weight.dtype)
        mask = in_window = None  # without positions a token sees those before it
        if input_pos is not None and not self.layers[0].attn.by_gpu_kernel(update, input_pos):
            slots = torch.arange(self.max_seq_length, device=idx.device)
            mask = slots <= positions[:, None, :, None]  # [B, 1, T, S]
            if window is not None:
                in_window = mask & (slots > positions[:, None, :, None] - window)

        if self.config.embed_scale != 1:
            update = update * torch.full((), self.config.embed_scale, dtype=update.dtype, device=update.device)
        residual, rope, rope_window = torch.zeros_like(update), None, None
        if self.config.post_norm or self.config.residual_scale != 1:  # for layers' updates, not for this one
            residual, update = all_reduce(update, self.ranks, self.peers, self.rank), residual
        if self.wpe is not None:
            residual = residual + F.embedding(positions, self.wpe.weight[:room])
        else:
            table = rope_table(self.config, T, idx.device) if self.rope is None else self.rope
            rope = rope_window = table[positions].unsqueeze(2)  # [B or 1, T, 1, 2, C/2]
            if self.config.rope_base_window is not None:
                table = self.rope_window
                table = rope_table(self.config, T, idx.device, windowed=True) if table is None else table
                rope_window = table[positions].unsqueeze(2)
        post = self.layers[0].post_mlp and self.layers[0].post_mlp.weight  # any will do: a norm of zeros is zeros
        for layer in self.layers:
            attn = layer.attn
            seen, turned = (mask, rope) if attn.window is None else (in_window, rope_window)
            residual, update = layer(residual, update, post, turned if attn.rotates else None, seen, input_pos)
            post = layer.post_mlp and layer.post_mlp.weight
        if last is not None:
            rows = torch.arange(B, device=idx.device)
            residual, update = (t[rows, last][:, None] for t in (residual, update))  # [B, 1, D]
        _, x = self.norm_f(residual, update, post, told=idx.numel() == 1)
        logits = linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x)
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        return all_gather(logits, self.ranks, self.peers, self.rank)[..., : self.config.vocab_size]


def expert_matrices(model) -> set:
    """The linear layers that hold all experts of a layer; a token reads the rows of some."""
    layers = [module for module in model.modules() if isinstance(module, SparseMLP)]
    return {matrix for mlp in layers for matrix in (mlp.experts_gate_up, mlp.experts_down)}


def cache_bytes(model) -> int:
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    return sum(cache.nbytes for attention in layers for cache in attention.buffers(recurse=False))


def bytes_per_step(model) -> int:
    """Bytes that a decode step of one row reads: the weights and the whole cache.

    An embedding counts if it is the head too; of FastGPT's experts the chosen ones count. It takes either twin.
    """
    config = model.config
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]  # the first is of tokens
    skipped = sum(embedding.weight.nbytes for embedding in embeddings[config.tie_embeddings :])
    for matrix in expert_matrices(model):
        size = sum(tensor.nbytes for tensor in matrix.state_dict().values())
        skipped += size // config.n_expert * (config.n_expert - config.n_expert_used)
    return sum(tensor.nbytes for tensor in model.state_dict().values()) - skipped + cache_bytes(model)


# The surgery: modules of the reference, and the FastGPT module that holds their rows in this order; * is each expert.
SURGERY = (
    (["transformer.wte"], "wte"),
    (["transformer.wpe"], "wpe"),
    (["transformer.h.{}.ln_1"], "layers.{}.norm_1"),
    ([f"transformer.h.{{}}.attn.{name}_proj" for name in "qkv"], "layers.{}.attn.qkv"),
    (["transformer.h.{}.attn.q_norm"], "layers.{}.attn.q_norm"),
    (["transformer.h.{}.attn.k_norm"], "layers.{}.attn.k_norm"),
    (["transformer.h.{}.attn"], "layers.{}.attn"),
    (["transformer.h.{}.attn.o_proj"], "layers.{}.attn.out"),
    (["transformer.h.{}.post_attn"], "layers.{}.post_attn"),
    (["transformer.h.{}.ln_2"], "layers.{}.norm_2"),
    (["transformer.h.{}.post_mlp"], "layers.{}.post_mlp"),
    (["transformer.h.{}.mlp.gate_proj", "transformer.h.{}.mlp.up_proj"], "layers.{}.mlp.gate_up"),
    (["transformer.h.{}.mlp.down_proj"], "layers.{}.mlp.down"),
    (["transformer.h.{}.mlp.router"], "layers.{}.mlp.router"),
    ([f"transformer.h.{{}}.mlp.experts.*.{name}_proj" for name in ("gate", "up")], "layers.{}.mlp.experts_gate_up"),
    (["transformer.h.{}.mlp.experts.*.down_proj"], "layers.{}.mlp.experts_down"),
    (["transformer.ln_f"], "norm_f"),
    (["lm_head"], "lm_head"),
)


def _module_pairs(config: GPTConfig):
    """The table, written out for every layer of one model. Layer by layer, so that the parts of a fused matrix, once
    freed, leave room for the next layer's.
    """
    for layer, (sources, target) in product(range(config.n_layer), SURGERY):
        if layer > 0 and "{}" not in target:
            continue
        if not config.gated:
            sources = [name for name in sources if not name.endswith("gate_proj")]
        if "*" in sources[0]:
            sources = [name.replace("*", str(expert)) for expert in range(config.n_expert) for name in sources]
        yield [name.format(layer) for name in sources], target.format(layer)


def _by_module(names) -> dict:
    """["a.b.weight"] to {"a.b": {"weight": "a.b.weight"}}."""
    modules = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        modules.setdefault(module, {})[kind] = name
    return modules


def fuse(state_dict: dict, config: GPTConfig, place=lambda tensor: tensor):
    """(name, tensor) for FastGPT of a reference state dict, read, placed where they are to be, and fused as they are
    asked for, so that only those are held that are kept. Raises ValueError if a name is missing or left over."""
    modules = _by_module(state_dict)
    for sources, target in _module_pairs(config):
        parts = [modules.pop(name) for name in sources if name in modules]
        if parts and (len(parts) < len(sources) or any(part.keys() != parts[0].keys() for part in parts)):
            raise ValueError(f"{target} needs the same tensors from each of {', '.join(sources)}")
        for kind in parts[0] if parts else ():
            tensors = [place(state_dict[part[kind]]) for part in parts]
            yield f"{target}.{kind}", torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    if modules:
        raise ValueError(f"FastGPT has no place for {', '.join(modules)}")


def to_fast(state_dict: dict, config: GPTConfig) -> dict:
    """A reference state dict renamed and fused for FastGPT; errors are those of `fuse`."""
    return dict(fuse(state_dict, config))


def to_reference(state_dict: dict, config: GPTConfig) -> dict:
    """The inverse of `to_fast`; the pieces are views of the fused tensors. Raises ValueError if a name is left over."""
    rows = {"q": config.n_head * config.head_dim, "k": config.n_kv_head * config.head_dim}
    rows |= {"v": rows["k"], "gate": config.hidden_dim, "up": config.hidden_dim, "down": config.dim}
    modules, reference = _by_module(state_dict), {}
    for names, target in _module_pairs(config):
        for kind, fused in modules.pop(target, {}).items():
            pieces = [state_dict[fused]]
            if len(names) > 1:
                pieces = pieces[0].split([rows[name.rpartition(".")[2].removesuffix("_proj")] for name in names])
            reference |= {f"{name}.{kind}": piece for name, piece in zip(names, pieces, strict=True)}
    if modules:
        raise ValueError(f"the reference has no place for {', '.join(modules)}")
    return reference
