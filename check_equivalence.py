"""Proof that the fast paths compute what the reference does: a table, and exit code 1 if a row is out of tolerance.

Every row runs the same token ids another way and compares all logits with those of `model.py` in float32, each row of
the batch on its own. The ids are random ones followed by the greedy text of the reference, so that the first position
at which a row's argmax differs is the first at which its greedy text would. Without a checkpoint, small random models
of every family are checked. On a CPU some are compiled, which have every field of the config. It is an error if no
family sets a field. Decisions to know:

- In float32 a row may differ by rounding alone: 2e-5 of the largest logit. Leaving out a norm costs 10,000 times that.
- In a 16-bit dtype each layer, given the fast path's own input, may be 1.6 times as far from the reference in float32
  as the reference in that dtype is: with the text's end alone, one layer's fault is lost among the others' rounding.
- With an int8 cache the reference sees the numbers of that cache, where they are what its own keys and values round to,
  and must agree as in float32. KL, top-1 and greedy show what the cache costs: they are of the reference without one.
- Quantized rows must agree with a reference that carries the dequantized weights as tightly as plain ones do. Each of
  these may be half a step from the plain one; KL, top-1 and greedy of that row show what the steps cost.
- A float32 row within its tolerance d can differ in greedy text only where the best two logits are within 2 d.
- Speculative rows are texts: the reference may have another token ahead of one by no more than twice the tolerance.
  The draft model is the model itself, but for half of the text's tokens, which it never drafts; the lookup drafts where
  it finds nothing, too. Some drafts of each are wrong, so accepting them shows.
- The gradients' row is of both twins: the loss of the next tokens, and each parameter's gradient through the surgery.
  Quantized models have none, and those above 2 billion parameters are left out for the memory.
- Compiled rows run under a stance in which a recompilation is an error.
- Under torchrun every rank computes the whole reference and holds it against its shard's logits, which all ranks share.

Copy me: needs torch, and `model.py`, `fast_model.py`, `quantized_linear.py`, `cpu_kernels.py`, `tp.py`, `runtime.py`,
`decode.py`, `speculate.py` and `checkpoint.py` beside it.

Shapes: B batch, T tokens, D model dim, K kv heads, C head dim, V vocabulary.
"""

import argparse
import math
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

import cpu_kernels
import tp
from checkpoint import (
    build_model,
    describe_quantization,
    fingerprint,
    quantize_model,
    read_checkpoint,
    shapes_of,
    untie_head,
)
from decode import Sampling, Steps, compiled_prefill, compiled_step, decode_step, generate
from fast_model import to_reference
from model import GPT, GPTConfig, rope_frequencies, rotate
from quantized_linear import Int4Linear, dequantize_weights
from runtime import check_agreement, check_device, default_device, objects_of_ranks, print0, rank_and_count, run_command
from speculate import DraftModel, Fixed, PromptLookup, Speculation, compiled_drafts, draft_tokens, verify

LONG = 1040  # tokens of the long prompt
MOST_ERRORS = 1.6  # of a layer in 16-bit, in those of the reference
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_SCALING = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "attention_factor": 1.2,
    "original_max_position_embeddings": 300,
}
BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}


def small(**fields) -> GPTConfig:
    sizes = {"block_size": 1200, "vocab_size": 331, "n_layer": 2, "n_head": 6, "n_kv_head": 2, "head_dim": 16}
    return GPTConfig(**sizes | {"dim": 64, "hidden_dim": 96} | fields)


FAMILIES = {
    "llama-3.1": small(head_dim=20, rope_base=500000.0, rope_scaling=LLAMA3_SCALING),
    "gpt-oss": small(
        hidden_dim=32,
        **BIASES,
        rope_scaling=YARN_SCALING | {"truncate": False},
        sliding_window=24,
        full_layers=(1,),
        sinks=True,
        activation="gelu_sigmoid",
        gate_clamp=1.0,
        n_expert=4,
        n_expert_used=2,
        router_bias=True,
    ),
    "gemma-3": small(
        n_kv_head=3,
        head_dim=20,
        norm_eps=1e-3,
        norm_plus_one=True,
        qk_norm=True,
        activation="gelu_tanh",
        embed_scale=8.0,
        tie_embeddings=True,
        sliding_window=24,
        full_layers=(1,),
        attention_scale=0.3,
        post_norm=True,
        rope_base=1e6,
        rope_base_window=1e3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "granite": small(
        hidden_dim=32,
        n_expert=12,
        n_expert_used=3,
        norm_topk_prob=False,
        nope_layers=(1,),
        embed_scale=7.0,
        attention_scale=0.4,
        residual_scale=0.3,
        logit_scale=0.2,
    ),
    "pythia": small(
        norm="layer",
        norm_eps=1e-3,
        parallel=True,
        rotary_dim=4,
        activation="gelu",
        gated=False,
        **BIASES,
        head_bias=True,
    ),
    "gpt-2": small(
        n_kv_head=6, norm="layer", activation="gelu_tanh", gated=False, **BIASES, rope_base=None, tie_embeddings=True
    ),
    "olmo-2": small(pre_norm=False, post_norm=True, qk_norm="all"),
    "llama-2": small(n_head=8, n_kv_head=8, head_dim=32, hidden_dim=256),  # groups of 32 on up to 8 ranks
    "mistral": small(n_kv_head=3, sliding_window=24),
    "qwen2": small(qkv_bias=True, tie_embeddings=True, rope_base=50.0, rope_scaling=YARN_SCALING),
    "qwen3": small(n_kv_head=3, head_dim=20, norm_eps=1e-3, qk_norm=True, rope_base=1e6),
    "glm-4": small(head_dim=20, qkv_bias=True, rotary_dim=8, post_norm=True),
    "smollm3": small(mlp_bias=True, tie_embeddings=True, sliding_window=24, full_layers=(0,), nope_layers=(1,)),
    "mixtral": small(n_head=8, n_kv_head=2, hidden_dim=128, n_expert=5, n_expert_used=2),
    "qwen3-moe": small(hidden_dim=32, n_kv_head=3, qk_norm=True, n_expert=12, n_expert_used=3, norm_topk_prob=False),
    "arcee": small(activation="relu2", gated=False),
    "starcoder2": small(norm="layer", activation="gelu_tanh", gated=False, **BIASES, sliding_window=24),
}
# Those that are compiled on a CPU, where one costs as much as 20 others. Each field has another value than its default
# among them. They come first, and share sizes, so that the compiler finds kernels that it has made before.
COMPILED = ("llama-3.1", "gpt-oss", "gemma-3", "granite", "pythia", "gpt-2", "olmo-2")


def random_weights(config: GPTConfig, seed: int = 0) -> dict:
    """A float32 state dict in which every tensor matters: biases are not zero, norms not one."""
    generator, state_dict = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes_of(config).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            state_dict[name] = values / shape[1] ** 0.5
        else:
            state_dict[name] = 0.2 * values + (0 if name.endswith("bias") else 1)
    return state_dict


@dataclass
class Row:
    """One way of computing, held against the reference."""

    name: str
    difference: float  # largest of any logit, or what `reason` says
    divergence: float | None  # largest KL(reference, this way) of any position, nats; None of a text
    agreement: float | None  # share of positions with the same most likely token; None of gradients
    first_change: int | None  # tokens of greedy text before the first that differs
    tolerance: float  # of `difference`
    reason: str

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance and not math.isnan(self.divergence or 0)  # False for NaN


def compare(name, expected, logits, prompt_length, tolerance, reason, difference=None) -> Row:
    """The row for logits [B, T, V] against the reference's, of which the first `prompt_length` tokens were given.

    `difference`, if not that of these logits, is what the tolerance is of.
    """
    logits = logits.float()
    same = logits.argmax(-1) == expected.argmax(-1)  # [B, T]
    changed = (~same[:, prompt_length - 1 :]).any(0).nonzero()
    kl = torch.nn.functional.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none")
    return Row(
        name,
        difference=(logits - expected).abs().max().item() if difference is None else difference,
        divergence=kl.sum(-1).max().item(),
        agreement=same.float().mean().item(),
        first_change=changed[0].item() if len(changed) else None,
        tolerance=tolerance,
        reason=reason,
    )


# --- The ways to run a FastGPT on ids [B, T], each to logits [B, T, V] ------------------------------------------------


def without_cache(model, ids):
    return model(ids)


def at_once(model, ids):
    model.setup_caches(*ids.shape)
    return model(ids)


def in_chunks(model, ids, size: int, forward=None):
    """The first chunk without positions, as a prompt begins; the rest, by `forward`, on top of the cache."""
    B, T = ids.shape
    forward = model if forward is None else forward
    model.setup_caches(B, T)
    positions = torch.arange(T, device=ids.device).expand(B, T)
    logits = [model(ids[:, :size])]
    for chunk, at in zip(ids[:, size:].split(size, 1), positions[:, size:].split(size, 1), strict=True):
        logits.append(forward(chunk, at).clone())  # a CUDA graph overwrites its outputs
    return torch.cat(logits, dim=1)


def rows_alone(model, ids):
    """Token by token: a single token is multiplied by other kernels than a batch of them."""
    return torch.cat([in_chunks(model, row[None], 1) for row in ids])


def different_lengths(model, ids, expected):
    """Prompts of different lengths, padded; each row continues from its end. Logits before that are `expected`'s."""
    B, T = ids.shape
    row = torch.arange(B, device=ids.device)
    last = row * (T // B)
    model.setup_caches(B, T)
    logits = expected.clone()
    padding = torch.arange(T, device=ids.device) > last[:, None]
    following = model(ids.masked_fill(padding, 0)[:, : last[-1] + 1], last=last)
    for _ in range(T):
        logits[row, last] = following[:, 0]
        last = (last + 1).clamp(max=T - 1)  # a row at its end says the same again
        following = model(ids[row, last][:, None], last[:, None])
    return logits


def compiled_steps(model, ids):
    forward = partial(compiled_step(lambda model, ids, input_pos: model(ids, input_pos), ids.device.type), model)
    in_chunks(model, ids, 1, forward)
    with torch.compiler.set_stance("fail_on_recompile"):
        return in_chunks(model, ids, 1, forward)


def compiled_at_once(model, ids):
    """The last logits alone are a prefill's; a second length must not compile again, nor one that fills the cache."""
    model.setup_caches(*ids.shape)
    forward = compiled_prefill(lambda model, ids, input_pos, last: model(ids, input_pos, last))
    forward(model, ids[:, :-2].contiguous(), None, None)
    with torch.compiler.set_stance("fail_on_recompile"):
        return forward(model, ids, None, None)


class RashLookup(PromptLookup):
    """It drafts where it finds nothing, too, and its last draft is not the token that it found."""

    def continuation(self, row: int, k: int) -> list[int]:
        ids = super().continuation(row, k) or [1] * k
        return [*ids[:-1], abs(ids[-1] - 1)]


def speculative(case, model, drafts, verify, decode_step, compiled: bool) -> Row:
    """The row of the greedy text [B, T] with drafts, 3 a round, behind the reference's own."""
    prompt, greedy = case.ids[:, : case.length], case.ids[:, case.length :]
    (B, length), count = prompt.shape, greedy.shape[1]
    model.setup_caches(B, min(length + count + 3, model.config.block_size))
    sampling = Sampling(temperature=0)
    steps = Steps(decode_step=decode_step, speculation=Speculation(model, sampling, drafts, Fixed(3), verify))
    run = partial(generate, model, prompt, count, sampling, steps=steps)
    for _ in run() if compiled else ():
        pass
    with torch.compiler.set_stance("fail_on_recompile" if compiled else "default"):
        ids = torch.tensor(list(run()), device=prompt.device).T
    logits = case.reference(torch.cat([prompt, ids], dim=1))[:, length - 1 : -1]
    behind = logits.amax(-1) - logits.gather(-1, ids[..., None])[..., 0]  # [B, T]
    changed = (ids != greedy).any(0).nonzero()
    kind = "draft model" if isinstance(drafts, DraftModel) else "prompt lookup"
    return Row(
        f"{kind}, compiled" if compiled else kind,
        difference=behind.max().item(),
        divergence=None,
        agreement=(logits.argmax(-1) == ids).float().mean().item(),
        first_change=changed[0].item() if len(changed) else None,
        tolerance=2 * case.exact["tolerance"],
        reason="greedy text, behind the reference's best",
    )


def gradients(model, ids) -> tuple[float, dict]:
    """(loss, {name: gradient}) of predicting the next tokens of ids [B, T]; nothing of it stays in the model."""
    with torch.enable_grad():
        model.requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.requires_grad_(False).zero_grad()
    return loss.item(), found


def compare_gradients(reference, fast, ids) -> Row:
    """The row whose difference is the largest of the loss and of any gradient, as shares of the loss and of the largest
    gradient of the same tensor, or of a thousandth of all tensors' largest: that of GPT-2's key bias is noise around 0.
    """
    expected_loss, expected = gradients(reference, ids)
    loss, found = gradients(fast, ids)
    least = 1e-3 * max(gradient.abs().max() for gradient in expected.values())
    differences = [torch.tensor(abs(loss - expected_loss) / expected_loss)]
    for name, gradient in to_reference(found, fast.config).items():
        largest = expected[name].abs().max().clamp(min=least)
        differences.append(((gradient - expected[name]).abs().max() / largest).cpu())
    worst = torch.stack(differences).max().item()  # of a NaN, NaN
    return Row(
        "gradients", worst, None, None, None, tolerance=1e-3, reason="of the loss and each tensor's largest gradient"
    )


# --- The check --------------------------------------------------------------------------------------------------------


def transformers_model(folder):
    try:
        import transformers
    except ImportError as error:
        raise ValueError("--hf needs transformers: pip install transformers") from error
    named = transformers.AutoConfig.from_pretrained(folder).architectures  # a multimodal one is no AutoModelForCausalLM
    family = getattr(transformers, named[0]) if named else transformers.AutoModelForCausalLM
    return family.from_pretrained(folder, dtype=torch.float32)


def as_stored(values, numbers, scales):
    """What an int8 cache that holds `numbers` and `scales` [B, T, K] of values [B, T, K, C] must give back for them.

    Where a value is so near the middle of two steps, or its scale of two bf16 numbers, that the last bits of a sum
    decide, the choice is the cache's; else it is made here, and a cache that made another differs from this.
    """
    wanted = values.abs().amax(-1) / 127
    near = (scales - wanted).abs() <= (2**-8 + 1e-4) * wanted
    scales = torch.where(near, scales, wanted.bfloat16().float())[..., None]
    steps = values / scales.clamp(min=1e-30)
    near = (numbers - steps).abs() <= 0.51
    return torch.where(near, numbers, steps.round().clamp(-127, 127)) * scales


def with_int8_cache(reference, fast, ids, first: int):
    """The reference's logits for ids [B, T] whose tokens from `first` on see keys and values of the fast model's cache.

    The cache is full of these ids. The tokens before `first` were a prompt, which sees its own exact keys and values.
    """
    config = reference.config

    def rope_of(layer):
        if not config.rotates(layer):
            return None
        frequencies, growth = rope_frequencies(config, layer, ids.device)
        return torch.arange(ids.shape[1], device=ids.device)[:, None] * frequencies, growth

    def of_all_ranks(cache):
        """[B, T, K, ...] of this rank's [B, its K, T, ...]. With more ranks than K, neighbours hold the same head."""
        gathered = tp.all_gather(cache.float().movedim(1, -1), fast.ranks).movedim(-1, 2)
        return gathered[:, :, :: gathered.shape[2] // config.n_kv_head]

    def store(_, inputs, heads, numbers, scales, rope):
        x = heads.reshape(numbers.shape)
        x = x if rope is None else rotate(x, *rope)  # keys are stored after the rotation
        x = as_stored(x, numbers, scales)
        return (x if rope is None else rotate(x, -rope[0], 1 / rope[1])).reshape(heads.shape)

    def attend_again(module, inputs, exact, own):
        keys = module.k_norm if config.qk_norm else module.k_proj
        caches = [of_all_ranks(t) for t in (own.k_cache, own.k_scale_cache, own.v_cache, own.v_scale_cache)]
        hooks = [
            keys.register_forward_hook(partial(store, numbers=caches[0], scales=caches[1], rope=rope_of(module.layer))),
            module.v_proj.register_forward_hook(partial(store, numbers=caches[2], scales=caches[3], rope=None)),
        ]
        rounded = module.forward(*inputs)
        for hook in hooks:
            hook.remove()
        return torch.cat([exact[:, :first], rounded[:, first:]], dim=1)

    hooks = [
        block.attn.register_forward_hook(partial(attend_again, own=layer.attn))
        for block, layer in zip(reference.transformer.h, fast.layers, strict=True)
    ]
    logits = reference(ids)
    for hook in hooks:
        hook.remove()
    return logits


def streams(model, ids, way) -> list:
    """The residual stream [B, T, D] before each layer of a FastGPT and after the last, then the logits of this way."""
    seen = [[] for _ in range(len(model.layers) + 1)]

    norms = [*(layer.norm_1 for layer in model.layers), model.norm_f]
    hooks = [
        norm.register_forward_hook(lambda _, inputs, outputs, place=place: seen[place].append(outputs[0]))
        for place, norm in enumerate(norms)
    ]
    logits = way(model, ids)
    for hook in hooks:
        hook.remove()
    return [torch.cat(pieces, dim=1).view(*ids.shape, -1) for pieces in seen] + [logits]


def steps_of(reference: GPT) -> list:
    """The reference as functions of the residual stream: its layers, then the logits."""
    parts = reference.transformer
    head = partial(torch.nn.functional.linear, weight=parts.wte.weight)
    head = head if reference.config.tie_embeddings else reference.lm_head
    return [*parts.h, lambda x: head(parts.ln_f(x)) * reference.config.logit_scale]


def errors_by_layer(reference, rounded, seen: list) -> float:
    """How many times as far from the reference the fast path is as `rounded`, the reference in 16 bits, in the layer
    where that is most. Each layer starts from `streams`. Of all tokens it is the median: some take other experts.
    """
    ratios = []
    for step, rounded_step, x, y in zip(steps_of(reference), steps_of(rounded), seen[:-1], seen[1:], strict=True):
        exact = step(x.float())
        errors = [(found.float() - exact).norm(dim=-1).median() for found in (y, rounded_step(x))]
        ratios.append(errors[0] / errors[1])
    return torch.stack(ratios).max().item()


def half_steps(plain, weight, scales, zeros=None) -> torch.Tensor:
    """The worst row of an int8 weight or group of an int4 one: its error in half steps of the plain [N, K] one's.

    A row has 127 steps up to its largest number, a group 15 from the smallest to the largest. int4 may cut the ends
    of a group off for less error in all. So the root of its mean squared error counts, and how far a weight is from
    the nearest of its group's numbers. Scales and zeros are bytes there: a scale is rounded up by at most a 125th of
    the row's largest. A zero is off by a 125th of its largest at most, of which the scale bears a seventh.
    """
    tensors = {"a.weight": weight, "a.scales": scales} | ({} if zeros is None else {"a.zeros": zeros})
    groups = plain.float().unflatten(1, (1 if zeros is None else scales.shape[1], -1))  # [N, K/G, G]
    error = dequantize_weights(tensors)["a.weight"].view(groups.shape) - groups
    if zeros is None:
        error, allowed = error.abs().amax(-1), groups.abs().amax(-1) / 127 / 2
    else:
        low, high = groups.aminmax(dim=-1)
        step = (high - low) / 15
        borne = ((low + high + step) / 2).abs().amax(1, True) / 125 / 7
        q = Int4Linear.unpack(weight).view(groups.shape)
        wrong = (q - Int4Linear.nearest(groups, scales[..., None], zeros[..., None])).abs().amax(-1) * step
        error = error.square().mean(-1).sqrt() + wrong
        allowed = (step + borne + (step + borne).amax(1, True) / 125) / 2
    return (error / allowed.clamp(min=1e-8)).max()


def largest_half_steps(state_dict: dict, quantized: dict) -> float:
    """`half_steps` of all quantized weights, some rows at a time for the memory."""
    largest = []
    for name in [name for name in quantized if f"{name.removesuffix('weight')}scales" in quantized]:
        plain = state_dict.get(name, state_dict["transformer.wte.weight"])  # a tied head
        kinds = [name.removesuffix("weight") + kind for kind in ("weight", "scales", "zeros")]
        tensors = [plain, *(quantized[kind] for kind in kinds if kind in quantized)]
        largest += map(half_steps, *(t.split(max(1, 2**22 // plain.shape[1])) for t in tensors))
    return torch.stack(largest).max().item()


@dataclass
class Case:
    """A model, a text of it, and what the reference says of that text."""

    config: GPTConfig
    state_dict: dict
    device: str
    compiled: bool
    drafting: bool  # whether a compiled row's draft steps are, too: text does not depend on them
    reference: GPT  # in float32
    length: int  # of the prompts
    ids: torch.Tensor  # [B, T], random prompts and the reference's greedy text
    expected: torch.Tensor  # [B, T, V]

    def exactness(self, state_dict) -> dict:
        """Tolerance and reason of rows in float32 of these weights."""
        tolerance, reason = 2e-5, "float32, sums in another order"
        if describe_quantization(state_dict) and self.device == "cpu" and cpu_kernels.available():
            tolerance, reason = 1e-3, "float32, rounded to 16 bits for products of integers"
        return {"tolerance": tolerance * self.expected.abs().max().item(), "reason": reason}

    @property
    def exact(self) -> dict:
        return self.exactness(self.state_dict)

    @property
    def long(self):
        """[1, LONG], None if the context is shorter: the same text over and over. After 1,000 random tokens some logits
        of a trained model hang on the last bit (SmolLM2's reference in float32 is 1.2e-3 from itself in float64).
        """
        if self.config.block_size < LONG:
            return None
        return self.ids.flatten().repeat(LONG // self.ids.numel() + 1)[None, :LONG]

    def fast(self, dtype, config=None, state_dict=None, **more):
        """The FastGPT of this rank, or of another model."""
        rank, ranks = rank_and_count()
        shard = tp.shard(state_dict or self.state_dict, config or self.config, rank, ranks)
        return build_model(config or self.config, shard, self.device, dtype, rank=rank, ranks=ranks, **more)


def make_case(config, state_dict, device, compiled, drafting) -> Case:
    reference = build_model(config, state_dict, device, torch.float32, reference=True)
    random = torch.Generator().manual_seed(0)
    length, batch = min(16, config.block_size // 2), 3
    prompt = torch.randint(config.vocab_size, (batch, length), generator=random).to(device)
    greedy = list(generate(reference, prompt, 24, Sampling(temperature=0)))
    ids = torch.cat([prompt, torch.tensor(greedy, device=device).T], dim=1)[:, : config.block_size]
    ids = tp.from_rank_0(ids, rank_and_count()[1])
    expected = torch.cat([reference(row[None]) for row in ids])
    return Case(config, state_dict, device, compiled, drafting, reference, length, ids, expected)


def transformers_row(case: Case, hf) -> Row:
    theirs, size = transformers_model(hf).to(case.device), case.config.vocab_size
    found = theirs.config.get_text_config().vocab_size  # of a multimodal model it is not in the config itself
    if found != size:
        raise ValueError(f"{hf} has a vocabulary of {found}, the checkpoint {size}")
    return compare("transformers", case.expected, theirs(case.ids).logits, case.length, **case.exact)


def float32_rows(case: Case, fast) -> Iterator[Row]:
    ids, expected = case.ids, case.expected
    row = partial(compare, prompt_length=case.length, **case.exact)
    yield row("without a cache", expected, without_cache(fast, ids))
    trainable = fast.ranks == 1 and describe_quantization(case.state_dict) is None
    if trainable and sum(t.numel() for t in case.state_dict.values()) < 2e9:  # two more copies in float32
        yield compare_gradients(case.reference, fast, ids)
    yield row("prefill at once", expected, at_once(fast, ids))
    yield row("token by token", expected, in_chunks(fast, ids, 1))
    yield row("in chunks of 7", expected, in_chunks(fast, ids, 7))
    yield row("each row alone", expected, rows_alone(fast, ids))
    yield row("different lengths", expected, different_lengths(fast, ids, expected))
    if case.compiled:
        torch.compiler.reset()  # models of other shapes are no recompilations of this one
        yield row("compiled steps", expected, compiled_steps(fast, ids))
        torch.compiler.reset()
        yield row("compiled prefill", expected, compiled_at_once(fast, ids))
        torch.compiler.reset()
        yield row("compiled, one row", expected[:1], compiled_steps(fast, ids[:1]))


def speculative_rows(case: Case, fast) -> Iterator[Row]:
    text = case.ids[:, case.length :]
    config, weights = untie_head(case.config, case.reference.state_dict())
    head = weights["lm_head.weight"].clone()
    head[text.unique()[::2]] *= -1  # of these tokens the likeliest becomes the least likely
    draft = build_model(config, weights | {"lm_head.weight": head}, case.device, torch.float32)
    for compiled in (False, True) if case.compiled else (False,):
        torch.compiler.reset()
        step, check, drafting = decode_step, verify, draft_tokens
        if compiled:
            step, check = (compiled_step(f, case.ids.device.type) for f in (step, check))
            drafting = compiled_drafts(case.ids.device.type) if case.drafting else drafting
        for drafts in (DraftModel(draft, drafting), RashLookup()):
            yield speculative(case, fast, drafts, check, step, compiled)


def long_rows(case: Case, fast) -> Iterator[Row]:
    if case.long is not None:
        expected = case.reference(case.long)
        yield compare(f"{LONG} tokens at once", expected, at_once(fast, case.long), LONG, **case.exact)
        yield compare(f"{LONG} tokens in 256s", expected, in_chunks(fast, case.long, 256), LONG, **case.exact)


def int8_cache_rows(case: Case, fast) -> Iterator[Row]:
    def row(name, expected, logits, first):
        stored = with_int8_cache(case.reference, fast, case.ids[: len(logits)], first)
        difference = (logits - stored).abs().max().item()
        reason = "against a reference that sees what is in the cache"
        return compare(name, expected, logits, case.length, case.exact["tolerance"], reason, difference)

    fast.setup_caches(1, 1, int8=True)  # the larger ones that follow are of the same kind
    yield row("int8 cache", case.expected, in_chunks(fast, case.ids, 1), 1)
    yield row("int8 cache, chunks of 7", case.expected, in_chunks(fast, case.ids, 7), 7)
    if case.compiled:
        torch.compiler.reset()
        yield row("int8 cache, compiled", case.expected[:1], compiled_steps(fast, case.ids[:1]), 1)


def kept_in_16_bits(case: Case, dtype, name: str) -> Row:
    """Weights that stay in 16 bits beside float32 activations, against the reference in float32 of the same weights."""
    state_dict = {key: tensor.to(dtype) for key, tensor in case.state_dict.items()}
    expected = build_model(case.config, state_dict, case.device, torch.float32, reference=True)(case.ids)
    logits = in_chunks(case.fast(torch.float32, state_dict=state_dict, keep_16_bits=True), case.ids, 1)
    return compare(f"weights in {name}", expected, logits, case.length, **case.exact)


def rows_in_16_bits(case: Case) -> Iterator[Row]:
    stored = case.state_dict["transformer.wte.weight"].dtype
    dtype = torch.bfloat16 if stored == torch.float32 else stored
    name = str(dtype).removeprefix("torch.")
    rounded = build_model(case.config, case.state_dict, case.device, dtype, reference=True)
    if case.device == "cpu" and cpu_kernels.available() and describe_quantization(case.state_dict) is None:
        yield kept_in_16_bits(case, dtype, name)
    fast = case.fast(dtype)
    ways = {"at once": at_once, "by token": partial(in_chunks, size=1), "rows alone": rows_alone}
    for kind, way in ways.items():
        long = kind == "at once" and case.long is not None  # bf16 cannot count past 256
        ids = case.long if long else case.ids
        expected, length = (case.reference(ids), LONG) if long else (case.expected, case.length)
        seen = streams(fast, ids, way)
        errors = errors_by_layer(case.reference, rounded, seen)
        reason = f"a layer's error, in those of the reference in {name}"
        yield compare(f"{name} {kind}", expected, seen[-1], length, MOST_ERRORS, reason, errors)


def quantized_rows(case: Case) -> Iterator[Row]:
    for mode in ("int8", "int4"):
        try:
            config, quantized = quantize_model(case.config, case.state_dict, mode, group_size=32)
            fast = case.fast(torch.float32, config, quantized)
        except ValueError:  # a matrix that groups of 32 do not divide
            continue
        logits = in_chunks(fast, case.ids, 1)
        carrying = build_model(config, quantized, case.device, torch.float32, reference=True)(case.ids)
        yield compare(f"{mode} by token", carrying, logits, case.length, **case.exactness(quantized))
        options = {"tolerance": 1 + 2**-8, "difference": largest_half_steps(case.state_dict, quantized)}
        reason = "half steps of a row or group; of a group the root mean square"
        yield compare(f"{mode} against plain", case.expected, logits, case.length, reason=reason, **options)


@torch.no_grad()
def check_model(config, state_dict: dict, device="cpu", compiled=True, drafting=True, hf=None) -> Iterator[Row]:
    """Yield a row per way of running this model. `hf` is a directory for transformers to load the same model from."""
    case = make_case(config, state_dict, device, compiled, drafting)
    if hf:
        yield transformers_row(case, hf)
    fast = case.fast(torch.float32)
    for rows in (float32_rows, speculative_rows, long_rows, int8_cache_rows):
        yield from rows(case, fast)
    del fast
    yield from rows_in_16_bits(case)
    case.reference = None  # its memory is the next one's
    if describe_quantization(state_dict) is None:
        yield from quantized_rows(case)


def print_table(title: str, rows: Iterator[Row]) -> bool:
    """Print the rows as they come; True if all of them passed."""
    print0(f"\n{title}")
    print0(f"  {'':24}{'off by':>9} {'tolerance':>9} {'KL':>9} {'top-1':>7} {'greedy':>7}")
    passed = True
    for row in rows:
        divergence = "" if row.divergence is None else f"{row.divergence:.1e}"
        agreement = "" if row.agreement is None else f"{row.agreement:.2%}"
        change = row.first_change if row.first_change is not None else "same" if agreement else ""
        print0(
            f"  {row.name:24}{row.difference:9.2e} {row.tolerance:9.2e} {divergence:>9} {agreement:>7} "
            f"{change:>7}  {'ok' if row.passed else 'FAILED'}  ({row.reason})",
            flush=True,
        )
        passed = passed and row.passed
    return passed


def check_family(name: str, device: str, compiled: bool) -> list[Row]:
    config, compiled = FAMILIES[name], compiled and (name in COMPILED or device != "cpu")
    return list(check_model(config, random_weights(config), device, compiled, drafting=name == "llama-3.1"))


def check_families(device: str, compiled: bool) -> Iterator[tuple[str, list[Row]]]:
    """(title, rows) of each small model that this number of ranks divides, on a CPU some models at a time."""
    ranks, names = rank_and_count()[1], []
    for field in fields(GPTConfig):
        if all(getattr(config, field.name) == field.default for config in FAMILIES.values()):
            raise ValueError(f"no small model sets {field.name}, so nothing checks it; set it in one of FAMILIES")
    for name, config in FAMILIES.items():
        try:
            tp.shard_config(config, ranks)
            names.append(name)
        except ValueError as error:
            print0(f"\n{name}: left out, {error}")
    if not names:
        raise ValueError(f"{ranks} ranks divide none of the small models; take another number, or give a checkpoint")
    titles = [f"{name}, small random weights" for name in names]
    check = partial(check_family, device=device, compiled=compiled)
    if device != "cpu" or ranks > 1:
        yield from zip(titles, map(check, names), strict=True)
        return
    # Threads make matrices this small slower, and processes that only compile take seconds to start.
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with ProcessPoolExecutor(min(4, torch.get_num_threads()), get_context("spawn")) as pool:
        yield from zip(titles, pool.map(check, names), strict=True)


def main(args) -> int:
    check_device(args.device)
    if args.hf and not args.checkpoint_path:
        raise ValueError("--hf needs --checkpoint_path, the model.pth that was made from it")
    if args.hf and not args.hf.is_dir():  # transformers would ask the Hub for a repository of this name
        raise ValueError(f"{args.hf} is not a folder")
    if args.checkpoint_path:
        config, state_dict = read_checkpoint(args.checkpoint_path)
        check_agreement({"model": fingerprint(config, state_dict)})
        rows = check_model(config, state_dict, args.device, not args.no_compile, hf=args.hf)
        tables = [(str(args.checkpoint_path), rows)]
    else:
        tables = check_families(args.device, not args.no_compile)
    passed = []
    for title, rows in tables:
        passed += objects_of_ranks(print_table(title, rows))
    agree = all(passed)
    print0("\nAll rows are within their tolerance." if agree else "\nThe models DISAGREE: see the rows that FAILED.")
    return 0 if agree else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Hold every way of running a model against the reference.")
    parser.add_argument("--checkpoint_path", type=Path, help="model.pth; without it, small random models are checked")
    parser.add_argument(
        "--hf", type=Path, metavar="DIR", help="compare with transformers' model from this directory too"
    )
    parser.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1, mps")
    parser.add_argument("--no_compile", action="store_true", help="leave out the compiled rows")
    run_command(main, parser.parse_args(), splits=True)
