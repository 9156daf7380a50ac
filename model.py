"""The reference GPT: the specification that `fast_model.py` must agree with.

One decoder-only transformer covers Llama, Qwen, Gemma 3, GLM-4, Olmo, Pythia, GPT-2 and mixtures of experts; what
differs between them is a field of `GPTConfig`. There is no cache and no thought for a compiler here: every forward pass
sees the whole sequence. Decisions to know:

- Weights have one linear layer per projection, named as in `transformer.h.{i}.attn.q_proj.weight`; nothing is fused.
- Rotary embeddings rotate the two halves of a head (Hugging Face's order), not neighbouring pairs.
- Norms, rotary angles and softmax are computed in float32, whatever the dtype of the weights.
- With tied embeddings there is no `lm_head`: the logits are products with the token embedding itself.

Copy me: needs torch and nothing else.

Shapes: B batch, T tokens, D model dim, H query heads, K kv heads, C head dim, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class GPTConfig:
    """Everything that decides what a model computes. Raises ValueError if the fields contradict each other.

    `rope_base` None means learned positions (GPT-2). `rope_scaling` is None or a "rope_type" of ROPE_SCALINGS and its
    numbers, named as in `config.json`; without a type, as in older checkpoints, it is llama3.
    `sliding_window` is how many positions, its own included, a token attends to; None means all before it.
    With `n_expert` above 0 each feed-forward is that many of `hidden_dim`, of which a token takes `n_expert_used`.
    """

    block_size: int  # the longest sequence, in tokens
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    dim: int
    hidden_dim: int
    norm: str = "rms"  # or "layer", with a bias
    norm_eps: float = 1e-5
    pre_norm: bool = True  # a norm of what attention and feed-forward read
    post_norm: bool = False  # a norm of what they add (Olmo 2), or both
    norm_plus_one: bool = False  # RMSNorm's weights are stored as what is added to 1 (Gemma)
    qk_norm: bool | str = False  # RMSNorm of q and k before the rotation: of each head (Qwen3), or "all" heads at once
    parallel: bool = False  # attention and feed-forward read the same residual stream (Pythia)
    activation: str = "silu"  # or "gelu", "gelu_tanh", "gelu_sigmoid", "relu", "relu2" (its square)
    gated: bool = True  # down(act(gate(x)) * up(x)); without: down(act(up(x)))
    gate_clamp: float | None = None  # gate is at most this, up within plus and minus this, then 1 larger (gpt-oss)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    rope_base: float | None = 10000.0
    rope_scaling: dict | None = None
    rope_base_window: float | None = None  # the base of layers with a window, which then are not scaled; None: the same
    rotary_dim: int | None = None  # how many numbers of a head rotate, half of them from its middle on; None: all
    sliding_window: int | None = None
    full_layers: tuple = ()  # the layers, counted from 0, that see everything all the same
    nope_layers: tuple = ()  # the layers that do not rotate
    embed_scale: float = 1.0  # the embedding is multiplied by it, and it is rounded as the weights are
    attention_scale: float | None = None  # of the scores; None is 1 / sqrt(head_dim)
    sinks: bool = False  # each head's softmax sums one more score, which is learned and has no value (gpt-oss)
    residual_scale: float = 1.0  # what attention and feed-forward add is multiplied by it
    logit_scale: float = 1.0
    tie_embeddings: bool = False
    head_bias: bool = False
    n_expert: int = 0  # 0: one dense feed-forward
    n_expert_used: int = 0
    router_bias: bool = False
    norm_topk_prob: bool = True  # the chosen experts' weights sum to 1; without, they are probabilities among all

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "head_dim", "dim", "hidden_dim"):
            value = getattr(self, name)
            require(isinstance(value, int) and value > 0, f"{name} must be a whole number above 0, not {value!r}")
        scales = ("embed_scale", "attention_scale", "residual_scale", "logit_scale")
        for name in ("rope_base", "sliding_window", "rope_base_window", "gate_clamp", *scales):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be above 0, not {value!r}")
        for name in ("full_layers", "nope_layers"):
            layers = getattr(self, name)
            fits = isinstance(layers, tuple) and all(layer in range(self.n_layer) for layer in layers)
            require(fits, f"{name} must be a tuple of layers below {self.n_layer}, not {layers!r}")
        H, KV, C, R = self.n_head, self.n_kv_head, self.head_dim, self.rotary_dim
        require(H % KV == 0, f"n_head {H} is not a multiple of n_kv_head {KV}")
        require(self.rope_base is None or C % 2 == 0, f"rotary embeddings need an even head_dim, not {C}")
        fits = R is None or R in range(2, C + 1, 2)
        require(fits, f"rotary_dim must be even and at most head_dim {C}, not {R!r}")
        require(not self.rope_base_window or self.sliding_window, "rope_base_window needs a sliding_window, not None")
        if self.rope_scaling is not None:
            scaling = {"rope_type": "llama3"} | self.rope_scaling
            scaling |= {"truncate": scaling.get("truncate", True)} if scaling["rope_type"] == "yarn" else {}
            object.__setattr__(self, "rope_scaling", scaling)
            self.check_rope_scaling(**self.rope_scaling)
        require(self.norm in ("rms", "layer"), f"norm must be 'rms' or 'layer', not {self.norm!r}")
        is_plain = not (self.norm_plus_one or self.post_norm)
        require(self.norm == "rms" or is_plain, "norm_plus_one and post_norm need norm 'rms', not 'layer'")
        require(self.qk_norm in (False, True, "all"), f"qk_norm must be False, True or 'all', not {self.qk_norm!r}")
        require(not (self.parallel and self.post_norm), "parallel needs a post_norm of False, not True")
        require(not (self.head_bias and self.tie_embeddings), "head_bias needs a tie_embeddings of False, not True")
        names = ", ".join(ACTIVATIONS)
        require(self.activation in ACTIVATIONS, f"activation must be one of {names}, not {self.activation!r}")
        used, experts = self.n_expert_used, self.n_expert
        fits = used == experts == 0 or 1 <= used <= experts
        require(fits, f"n_expert_used {used} must be from 1 to n_expert {experts}, or both 0")
        require(self.gated or not (experts or self.gate_clamp), "experts and gate_clamp need gated True, not False")
        require(experts or not self.router_bias, "router_bias needs experts, not n_expert 0")

    def window_of(self, layer: int) -> int | None:
        return None if layer in self.full_layers else self.sliding_window

    def rotates(self, layer: int) -> bool:
        return self.rope_base is not None and layer not in self.nope_layers

    def check_rope_scaling(self, rope_type, **numbers):
        kinds, given = ", ".join(ROPE_SCALINGS), self.rope_scaling
        require(rope_type in ROPE_SCALINGS, f"rope_scaling must be of type {kinds}, not {rope_type!r}")
        names = ROPE_SCALINGS[rope_type]
        fits = numbers.keys() == set(names)
        require(fits, f"rope_scaling must have rope_type, {', '.join(names)}, not {given}")
        fits = rope_type != "llama3" or numbers["low_freq_factor"] < numbers["high_freq_factor"]
        require(fits, f"rope_scaling needs low_freq_factor below high_freq_factor, not {given}")
        pairs = (self.rotary_dim or self.head_dim) // 2
        fits = len(numbers.get("short_factor", range(pairs))) == pairs
        require(fits, f"rope_scaling needs {pairs} numbers as its short_factor, not {given}")


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


# Kinds of `rope_scaling`. Of longrope the short factors alone are here, which hold up to the original context.
ROPE_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings", "truncate"),
    "longrope": ("short_factor", "attention_factor"),
}
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_sigmoid": lambda x: x * torch.sigmoid(1.702 * x),  # Hendrycks and Gimpel 2016
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, config: GPTConfig):
        super().__init__()
        self.eps, self.plus_one = config.norm_eps, config.norm_plus_one
        self.weight = nn.Parameter(torch.zeros(size) if self.plus_one else torch.ones(size))

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        if self.plus_one:
            return (x32 * (1 + self.weight.float())).type_as(x)
        return x32.type_as(x) * self.weight


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(config.dim, eps=config.norm_eps)
    return RMSNorm(config.dim, config)


def rope_frequencies(config: GPTConfig, layer: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each of the C/2 pairs the radians per position, and what its length grows by, in float32 (Su et al. 2021).

    A scaling slows the waves. Those longer than the original context go at 1/factor, short ones are kept, others are
    between: by turns in that context with llama3 (Llama 3.1), by the pair's number with yarn (Peng et al. 2023).
    The pairs beyond `rotary_dim` R stand still.
    """
    R, base, scaling = config.rotary_dim or config.head_dim, config.rope_base, config.rope_scaling
    if config.rope_base_window is not None and config.window_of(layer) is not None:
        base, scaling = config.rope_base_window, None
    scaling = scaling or {"rope_type": None}
    frequencies = 1.0 / base ** (torch.arange(0, R, 2, device=device, dtype=torch.float32) / R)
    kept = torch.zeros_like(frequencies)
    context = scaling.get("original_max_position_embeddings")
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = context * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    elif scaling["rope_type"] == "yarn":
        turns = torch.tensor([scaling["beta_fast"], scaling["beta_slow"]], dtype=torch.float64)
        first, last = (R / 2 * (context / (2 * math.pi * turns)).log() / math.log(base)).tolist()
        if scaling["truncate"]:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, R - 1)  # pairs that make so many turns
        number = torch.arange(R // 2, device=device)
        kept = 1 - ((number - first) / (last - first or 0.001)).clamp(0, 1)
    elif scaling["rope_type"] == "longrope":
        frequencies = frequencies / torch.tensor(scaling["short_factor"], device=device)
    slowed = frequencies / scaling.get("factor", 1.0)
    growth = torch.full_like(frequencies, scaling.get("attention_factor", 1.0))
    still = (0, (config.head_dim - R) // 2)
    return F.pad(kept * frequencies + (1 - kept) * slowed, still), F.pad(growth, still, value=1.0)


def rotate(x, angles, growth):
    """Turn each pair (x[i], x[i + C/2]) of x [B, T, heads, C] by its angle, and stretch it; angles [T, C/2]."""
    cos, sin = ((growth * part).type_as(x)[:, None] for part in (angles.cos(), angles.sin()))  # [T, 1, C/2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        q_dim, kv_dim = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(q_dim if config.qk_norm == "all" else config.head_dim, config)
            self.k_norm = RMSNorm(kv_dim if config.qk_norm == "all" else config.head_dim, config)
        if config.sinks:
            self.sinks = nn.Parameter(torch.zeros(config.n_head))

    def forward(self, x):
        B, T, _ = x.shape
        cfg = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if cfg.qk_norm:
            q, k = (n(t.unflatten(-1, (-1, len(n.weight)))) for n, t in ((self.q_norm, q), (self.k_norm, k)))
        q, k, v = (t.reshape(B, T, -1, cfg.head_dim) for t in (q, k, v))
        position = torch.arange(T, device=x.device)
        if cfg.rotates(self.layer):
            frequencies, growth = rope_frequencies(cfg, self.layer, x.device)
            angles = position[:, None] * frequencies  # [T, C/2]
            q, k = rotate(q, angles, growth), rotate(k, angles, growth)

        # Each kv head serves n_head / n_kv_head query heads in a row.
        k, v = (t.repeat_interleave(cfg.n_head // cfg.n_kv_head, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, T, C]
        distance = position[:, None] - position  # [T, T], how far back the key is from the query
        visible, window = distance >= 0, cfg.window_of(self.layer)
        if window is not None:
            visible = visible & (distance < window)
        scale = cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale
        scores = q @ k.transpose(-2, -1) * scale  # [B, H, T, T]
        scores = scores.float().masked_fill(~visible, float("-inf"))
        if cfg.sinks:
            scores = torch.cat([scores, self.sinks.float()[:, None, None].expand(B, -1, T, 1)], dim=-1)
        y = scores.softmax(-1)[..., :T].type_as(v) @ v  # [B, H, T, C]
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation, self.gated, self.clamp = ACTIVATIONS[config.activation], config.gated, config.gate_clamp
        if self.gated:
            self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x):
        if not self.gated:
            return self.down_proj(self.activation(self.up_proj(x)))
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.clamp is not None:
            gate, up = gate.clamp(max=self.clamp), 1 + up.clamp(-self.clamp, self.clamp)
        return self.down_proj(self.activation(gate) * up)


class SparseMLP(nn.Module):
    """A mixture of experts: each token goes through the few that the router finds likeliest, weighted by how likely.

    The method is that of Shazeer et al. 2017, arXiv:1701.06538, as in Jiang et al. 2024, "Mixtral of Experts".
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.dim, config.n_expert, bias=config.router_bias)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.n_expert))

    def forward(self, x):
        weights, chosen = self.router(x).float().softmax(-1).topk(self.config.n_expert_used)  # [B, T, experts used]
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            is_chosen = chosen == number
            token = is_chosen.any(-1)  # [B, T]
            y[token] += weights[is_chosen].type_as(x)[:, None] * expert(x[token])
        return y


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.parallel, self.residual_scale = config.parallel, config.residual_scale
        self.ln_1 = make_norm(config) if config.pre_norm else nn.Identity()
        self.attn = Attention(config, layer)
        self.post_attn = make_norm(config) if config.post_norm else nn.Identity()
        self.ln_2 = make_norm(config) if config.pre_norm else nn.Identity()
        self.mlp = SparseMLP(config) if config.n_expert else MLP(config)
        self.post_mlp = make_norm(config) if config.post_norm else nn.Identity()

    def forward(self, x):
        after = x + self.residual_scale * self.post_attn(self.attn(self.ln_1(x)))
        read = x if self.parallel else after
        return after + self.residual_scale * self.post_mlp(self.mlp(self.ln_2(read)))


class Embedding(nn.Embedding):
    def reset_parameters(self):
        if not self.weight.is_meta:  # there random numbers load the compiler, which takes a second (torch 2.13)
            super().reset_parameters()


class GPT(nn.Module):
    """The readable model: token ids [B, T] to logits [B, T, V], and the mean cross-entropy if targets are given."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": Embedding(config.vocab_size, config.dim),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": make_norm(config),
            }
        )
        if config.rope_base is None:
            self.transformer["wpe"] = Embedding(config.block_size, config.dim)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=config.head_bias)

    def forward(self, idx, targets=None):
        """Logits [B, T, V] for ids [B, T]; with targets [B, T] (-100 is ignored) the pair (logits, loss)."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than the context of {self.config.block_size}")
        x = self.transformer.wte(idx)  # [B, T, D]
        x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype)
        if self.config.rope_base is None:
            x = x + self.transformer.wpe(torch.arange(T, device=idx.device))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        logits = F.linear(x, self.transformer.wte.weight) if self.config.tie_embeddings else self.lm_head(x)
        logits = logits * self.config.logit_scale
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
