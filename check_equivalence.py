"""Proof that the fast paths compute what the reference does: a table, and exit code 1 if a row is out of tolerance.

Every row runs the same token ids another way and compares all logits with those of `model.py` in float32, each row of
the batch on its own. The ids are random ones followed by the greedy text of the reference, so that the first position
at which a row's argmax differs is the first at which its greedy text would. Without a checkpoint, small random models
of every family are checked. Decisions to know:

- In float32 a row may differ by rounding alone: 2e-5 of the largest logit. Leaving out a norm costs 10,000 times that.
- In a 16-bit dtype the reference's own loss is measured, and a row may lose twice as much. A mixture of experts jumps
  where rounding lets a token take another expert, so there it is the most of nine: its weights too are off by rounding.
- An int8 cache may lose twice what random errors of the size of its rounding change in the reference.
- Quantized rows must agree with a reference that carries the dequantized weights as tightly as plain ones do.
- A row within its tolerance d can differ in greedy text only where the reference's best two logits are within 2 d.
- Speculative rows are texts: the reference may have another token ahead of one by no more than twice the tolerance.
  The draft model is the model itself with noise in its weights, so that it is right at times.
- The gradients' row is of both twins in training: the loss of the next tokens, and each parameter's gradient through
  the surgery. Quantized models have none, and those above 2 billion numbers are left out for the memory.
- Compiled rows run under a stance in which a recompilation is an error.
- Under torchrun every rank computes the whole reference and holds it against its shard's logits, which all ranks share.

Copy me: needs torch, and `model.py`, `fast_model.py`, `quantize.py`, `tp.py`, `checkpoint.py`, `tokenizer.py` and
`generate.py` beside it.

Shapes: B batch, T tokens, V vocabulary.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import tp
from checkpoint import build_model, describe_quantization, quantize_model, read_checkpoint, shapes_of
from fast_model import to_reference
from generate import (
    DraftModel,
    PromptLookup,
    Sampling,
    check_device,
    compile_options,
    compiled_prefill,
    decode_step,
    default_device,
    draft_step,
    generate,
    verify,
)
from model import GPTConfig
from quantize import dequantize_weights

LONG = 1040  # tokens of the long prompt
SMALL = {"block_size": 1200, "vocab_size": 331, "n_layer": 2, "n_head": 6, "dim": 64, "hidden_dim": 96}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama-2": GPTConfig(**SMALL, n_kv_head=6, head_dim=16),
    "llama-3.1": GPTConfig(**SMALL, n_kv_head=2, head_dim=20, rope_base=500000.0, rope_scaling=LLAMA3_SCALING),
    "mistral": GPTConfig(**SMALL, n_kv_head=3, head_dim=16, sliding_window=24),
    "qwen2": GPTConfig(**SMALL, n_kv_head=2, head_dim=16, qkv_bias=True, tie_embeddings=True),
    "qwen3": GPTConfig(**SMALL, n_kv_head=3, head_dim=20, qk_norm=True, rope_base=1e6),
    "mixtral": GPTConfig(**SMALL, n_kv_head=2, head_dim=16, n_expert=5, n_expert_used=2),
    "qwen3-moe": GPTConfig(
        **SMALL | {"hidden_dim": 32},
        n_kv_head=3,
        head_dim=16,
        qk_norm=True,
        n_expert=12,
        n_expert_used=3,
        norm_topk_prob=False,
    ),
    "gpt-2": GPTConfig(
        **SMALL,
        n_kv_head=6,
        head_dim=16,
        norm="layer",
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        rope_base=None,
        tie_embeddings=True,
    ),
}


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
    difference: float  # largest of any logit
    divergence: float | None  # largest KL(reference, this way) of any position, nats; None of a text
    agreement: float | None  # share of positions with the same most likely token; None of gradients
    first_change: int | None  # tokens of greedy text before the first that differs
    tolerance: float  # of `difference`
    reason: str

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN


def compare(name, expected, logits, prompt_length, tolerance, reason) -> Row:
    """The row for logits [B, T, V] against the reference's, of which the first `prompt_length` tokens were given."""
    logits = logits.float()
    same = logits.argmax(-1) == expected.argmax(-1)  # [B, T]
    changed = (~same[:, prompt_length - 1 :]).any(0).nonzero()
    kl = torch.nn.functional.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none")
    return Row(
        name,
        difference=(logits - expected).abs().max().item(),
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
    """Prompts of different lengths, padded; each row goes on from its own end. Logits before that are `expected`'s."""
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
    forward = torch.compile(model, fullgraph=True, dynamic=False, options=compile_options(ids.device.type))
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


def speculative(model, speculation, expected, prompt, greedy, tolerance: float, decode_step, compiled: bool) -> Row:
    """The row of a greedy text [B, T] after the prompts [B, P]; `expected` is the reference."""
    B, length = prompt.shape
    count = greedy.shape[1]
    model.setup_caches(B, min(length + count + speculation.longest_round, model.config.block_size))
    run = partial(
        generate, model, prompt, count, Sampling(temperature=0), decode_step=decode_step, speculation=speculation
    )
    for _ in run() if compiled else ():
        pass
    with torch.compiler.set_stance("fail_on_recompile" if compiled else "default"):
        ids = torch.tensor(list(run()), device=prompt.device).T
    logits = expected(torch.cat([prompt, ids], dim=1))[:, length - 1 : -1]
    behind = logits.amax(-1) - logits.gather(-1, ids[..., None])[..., 0]  # [B, T]
    changed = (ids != greedy).any(0).nonzero()
    kind = "draft model" if isinstance(speculation, DraftModel) else "prompt lookup"
    return Row(
        f"{kind}, compiled" if compiled else kind,
        difference=behind.max().item(),
        divergence=None,
        agreement=(logits.argmax(-1) == ids).float().mean().item(),
        first_change=changed[0].item() if len(changed) else None,
        tolerance=tolerance,
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
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ValueError("--hf needs transformers: pip install transformers") from error
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def with_noise(state_dict: dict, quantized: dict) -> dict:
    """The plain weights, each off by a random amount of up to half a step of its quantized version."""
    generator, noisy = torch.Generator().manual_seed(0), {}
    for name in [name for name in quantized if not name.endswith((".scales", ".zeros"))]:
        weight = state_dict.get(name, state_dict["transformer.wte.weight"])  # a tied head
        noisy[name] = weight.float()
        if quantized[name].dtype in (torch.int8, torch.uint8):
            steps = quantized[f"{name.removesuffix('weight')}scales"].float()
            steps = steps.view(weight.shape[0], -1)  # [N, 1 or K/G]
            steps = steps.repeat_interleave(weight.shape[1] // steps.shape[1], 1)
            noisy[name] = noisy[name] + (torch.rand(weight.shape, generator=generator) - 0.5) * steps
    return noisy


def loss_to_noise(reference, ids, expected) -> float:
    """The most that any logit changes if keys and values are off by random amounts of up to half a step of the int8
    cache, in 8 draws: of a text that the model is unsure of, one draw changes three times as much as another.
    """
    generator, head_dim = torch.Generator().manual_seed(0), reference.config.head_dim

    def shake(module, inputs, y):
        heads = y.unflatten(-1, (-1, head_dim))
        noise = torch.rand(heads.shape, generator=generator).to(y.device) - 0.5
        return (heads + noise * heads.abs().amax(-1, keepdim=True) / 127).flatten(-2)

    projections = [m for name, m in reference.named_modules() if name.endswith(("k_proj", "v_proj"))]
    hooks = [projection.register_forward_hook(shake) for projection in projections]
    losses = [(reference(ids) - expected).abs().max().item() for _ in range(8)]
    for hook in hooks:
        hook.remove()
    return max(losses)


@torch.no_grad()
def check_model(config: GPTConfig, state_dict: dict, device="cpu", compiled=True, hf=None) -> Iterator[Row]:
    """Yield a row per way of running this model. `hf` is a directory for transformers to load the same model from."""
    rank, ranks = tp.rank_and_count()
    shard = tp.shard(state_dict, config, rank, ranks)
    reference = build_model(config, state_dict, device, torch.float32, reference=True)
    random = torch.Generator().manual_seed(0)
    length, batch = min(16, config.block_size // 2), 3
    prompt = torch.randint(config.vocab_size, (batch, length), generator=random).to(device)
    greedy = list(generate(reference, prompt, 24, Sampling(temperature=0)))
    ids = torch.cat([prompt, torch.tensor(greedy, device=device).T], dim=1)[:, : config.block_size]
    ids = tp.from_rank_0(ids, ranks)
    expected = torch.cat([reference(row[None]) for row in ids])
    exact = {"tolerance": 2e-5 * expected.abs().max().item(), "reason": "float32, sums in another order"}

    if hf:
        theirs = transformers_model(hf).to(device)
        if theirs.config.vocab_size != config.vocab_size:
            raise ValueError(f"{hf} has a vocabulary of {theirs.config.vocab_size}, the checkpoint {config.vocab_size}")
        yield compare("transformers", expected, theirs(ids).logits, length, **exact)
        del theirs

    plain = {name: tensor.float() for name, tensor in dequantize_weights(state_dict).items()}
    fast = build_model(config, shard, device, torch.float32, rank=rank, ranks=ranks)
    yield compare("without a cache", expected, without_cache(fast, ids), length, **exact)
    trainable = ranks == 1 and describe_quantization(state_dict) is None
    if trainable and sum(tensor.numel() for tensor in state_dict.values()) < 2e9:  # two more copies in float32
        yield compare_gradients(reference, fast, ids)
    yield compare("prefill at once", expected, at_once(fast, ids), length, **exact)
    yield compare("token by token", expected, in_chunks(fast, ids, 1), length, **exact)
    yield compare("in chunks of 7", expected, in_chunks(fast, ids, 7), length, **exact)
    yield compare("each row alone", expected, rows_alone(fast, ids), length, **exact)
    yield compare("different lengths", expected, different_lengths(fast, ids, expected), length, **exact)
    if compiled:
        torch.compiler.reset()  # models of other shapes are no recompilations of this one
        yield compare("compiled steps", expected, compiled_steps(fast, ids), length, **exact)
        torch.compiler.reset()
        yield compare("compiled prefill", expected, compiled_at_once(fast, ids), length, **exact)
        torch.compiler.reset()
        yield compare("compiled, one row", expected[:1], compiled_steps(fast, ids[:1]), length, **exact)

    shaken = {name: t + 0.03 * t.std() * torch.randn(t.shape, generator=random) for name, t in plain.items()}
    draft = build_model(config, shaken, device, torch.float32)
    text = ids[:, length:]
    for compiles in (False, True) if compiled else (False,):
        torch.compiler.reset()
        step, check, drafting = decode_step, verify, draft_step
        if compiles:
            options = {"fullgraph": True, "dynamic": False, "options": compile_options(prompt.device.type)}
            step, check, drafting = (torch.compile(function, **options) for function in (step, check, drafting))
        for speculation in (DraftModel(draft, 3, drafting, verify=check), PromptLookup(3, verify=check)):
            yield speculative(fast, speculation, reference, prompt, text, 2 * exact["tolerance"], step, compiles)
    del draft

    if config.block_size >= LONG:
        # The same text over and over: after 1,000 random tokens some logits of a trained model hang on the last bit
        # (SmolLM2's reference in float32 is 1.2e-3 from itself in float64 there).
        long = ids.flatten().repeat(LONG // ids.numel() + 1)[None, :LONG]
        expected_long = reference(long)
        yield compare(f"{LONG} tokens at once", expected_long, at_once(fast, long), LONG, **exact)
        yield compare(f"{LONG} tokens in 256s", expected_long, in_chunks(fast, long, 256), LONG, **exact)

    loss = loss_to_noise(reference, ids, expected)
    loose = {"tolerance": 2 * loss, "reason": "twice what random errors of up to half a step change"}
    fast.int8_cache = True
    yield compare("int8 cache", expected, in_chunks(fast, ids, 1), length, **loose)
    yield compare("int8 cache, chunks of 7", expected, in_chunks(fast, ids, 7), length, **loose)
    if compiled:
        torch.compiler.reset()
        yield compare("int8 cache, compiled", expected[:1], compiled_steps(fast, ids[:1]), length, **loose)

    del fast, reference
    stored = state_dict["transformer.wte.weight"].dtype
    dtype = torch.bfloat16 if stored == torch.float32 else stored
    name = str(dtype).removeprefix("torch.")
    rounded = build_model(config, state_dict, device, dtype, reference=True)
    losses = [(rounded(ids).float() - expected).abs().max().item()]
    for _ in range(8 if config.n_expert else 0):
        step = torch.finfo(dtype).eps
        off = {name: t * (1 + step * (torch.rand(t.shape, generator=random) - 0.5)) for name, t in plain.items()}
        rounded = build_model(config, off, device, dtype, reference=True)
        losses.append((rounded(ids).float() - expected).abs().max().item())
    loose = {"tolerance": 2 * max(losses), "reason": f"twice what the reference loses in {name}"}
    fast = build_model(config, shard, device, dtype, rank=rank, ranks=ranks)
    yield compare(f"{name} at once", expected, at_once(fast, ids), length, **loose)
    yield compare(f"{name} by token", expected, in_chunks(fast, ids, 1), length, **loose)
    yield compare(f"{name} rows alone", expected, rows_alone(fast, ids), length, **loose)

    for mode in ("int8", "int4") if describe_quantization(state_dict) is None else ():
        try:
            changed = quantize_model(config, state_dict, mode, group_size=32)
            shard = tp.shard(changed[1], changed[0], rank, ranks)
        except ValueError:  # a matrix that groups of 32 do not divide
            continue
        carrying = build_model(*changed, device, torch.float32, reference=True)(ids)
        fast = build_model(changed[0], shard, device, torch.float32, rank=rank, ranks=ranks)
        logits = in_chunks(fast, ids, 1)
        yield compare(f"{mode} by token", carrying, logits, length, **exact)
        shaken = build_model(changed[0], with_noise(state_dict, changed[1]), device, torch.float32, reference=True)(ids)
        loss = (shaken - expected).abs().max().item()
        loose = {"tolerance": 2 * loss, "reason": "twice what random errors of up to half a step change"}
        yield compare(f"{mode} against plain", expected, logits, length, **loose)


def print_table(title: str, rows: Iterator[Row]) -> bool:
    """Print the rows as they come; True if all of them passed."""
    tp.print0(f"\n{title}")
    tp.print0(f"  {'':24}{'max diff':>9} {'tolerance':>9} {'KL':>9} {'top-1':>7} {'greedy':>7}")
    passed = True
    for row in rows:
        divergence = "" if row.divergence is None else f"{row.divergence:.1e}"
        agreement = "" if row.agreement is None else f"{row.agreement:.2%}"
        change = row.first_change if row.first_change is not None else "same" if agreement else ""
        tp.print0(
            f"  {row.name:24}{row.difference:9.2e} {row.tolerance:9.2e} {divergence:>9} {agreement:>7} "
            f"{change:>7}  {'ok' if row.passed else 'FAILED'}  ({row.reason})",
            flush=True,
        )
        passed = passed and row.passed
    return passed


def main(checkpoint_path: Path | None, hf: Path | None, device: str, no_compile: bool) -> int:
    check_device(device)
    if hf and not checkpoint_path:
        raise ValueError("--hf needs --checkpoint_path, the model.pth that was made from it")
    if hf and not hf.is_dir():  # transformers would ask the Hub for a repository of this name
        raise ValueError(f"{hf} is not a folder")
    if checkpoint_path:
        config, state_dict = read_checkpoint(checkpoint_path)
        tp.check_agreement({"model": tp.fingerprint(config, state_dict)})
        models = {str(checkpoint_path): (config, state_dict)}
    else:
        models = {f"{name}, small random weights": (c, random_weights(c)) for name, c in FAMILIES.items()}
    ranks, passed = tp.rank_and_count()[1], []
    for title, (config, state_dict) in models.items():
        if not checkpoint_path:
            try:
                tp.shard_config(config, ranks)
            except ValueError as error:
                tp.print0(f"\n{title}: left out, {error}")
                continue
        rows = check_model(config, state_dict, device, not no_compile, hf)
        passed += tp.objects_of_ranks(print_table(title, rows))
    if not passed:
        raise ValueError(f"{ranks} ranks divide none of the small models; take another number, or give a checkpoint")
    agree = all(passed)
    tp.print0("\nAll rows are within their tolerance." if agree else "\nThe models DISAGREE: see the rows that FAILED.")
    return 0 if agree else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Hold every way of running a model against the reference.")
    parser.add_argument("--checkpoint_path", type=Path, help="model.pth; without it, small random models are checked")
    parser.add_argument(
        "--hf", type=Path, metavar="DIR", help="compare with transformers' model from this directory too"
    )
    parser.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1, mps")
    parser.add_argument("--no_compile", action="store_true", help="leave out the compiled rows")
    tp.run(main, parser.parse_args())
