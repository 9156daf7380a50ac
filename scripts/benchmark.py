"""How fast this device runs a model, held against what the device can do: a suite of rows, a JSON file, a plot.

    python -m scripts.benchmark decode --shape llama-2-7b --weights bfloat16 int8 int4
    python -m scripts.benchmark decode --shape gpt-oss-20b --weights mxfp4 mxfp4-int8
    python -m scripts.benchmark ladder --shape llama-2-7b
    python -m scripts.benchmark decode --checkpoint_path checkpoints/NAME/model.pth --hf DIR --temperature 0
    python -m scripts.benchmark prefill --shape llama-3.1-8b --tokens 512 2048 8192
    python -m scripts.benchmark context --shape llama-3.1-8b --used 128 2048 8192 32768 --slots 131072
    python -m scripts.benchmark batch --shape llama-3.1-8b --sizes 1 4 16 64
    python -m scripts.benchmark forward --shape gpt-1.2b
    python -m scripts.benchmark train --shape gpt-124m --batch 16 --tokens 1024
    python -m scripts.benchmark speculate --shape llama-2-7b --acceptance 0.6 0.8 0.9
    torchrun --standalone --nproc_per_node=2 -m scripts.benchmark decode --shape llama-2-7b
    torchrun --standalone --nproc_per_node=2 -m scripts.benchmark train --shape llama-2-7b --shard --recompute
    python -m scripts.benchmark plot --json_path FILE --png FILE
    python -m scripts.benchmark plot --json_path ONE_GPU.json TWO_GPUS.json FOUR_GPUS.json --png FILE

Decisions to know:

- Weights are random and made on the device, unless --checkpoint_path gives real ones. Speed does not depend on them.
- mxfp4 of a mixture is its experts, as gpt-oss is published; in mxfp4-int8 the rest is int8. A mixture's experts are
  quantized one after the other, so that they need not fit in bf16.
- Before any row the device's own limits are measured: bytes read and bf16 (on a CPU float32) operations per second.
  A row's floor is the time in which its bytes can be read or its operations done, whichever is longer.
- A row counts if its logits are finite and its greedy tokens are those of the plain run: in `decode`, `context` and
  `batch` of the eager step on the same cache, in `prefill` of the eager prefill, in `forward` at every position those
  of `model.py`. Where one is not, the plain run's logits of the two tokens must lie within 5% of its largest, as two
  bf16 roundings of one number do after 32 layers (2.4% was seen in 128 tokens of an 8B model); else it is an error.
  After a prompt of a mixture the distance is only said, because rounding chooses other experts. Two bf16 runs of 24
  layers of random weights, which added up in another order, had the same greedy token at 42% of the positions.
- So a row's check is of what compiling changed. The kernels are held against plain PyTorch by tests/test_gpu.py.
- A sample in which something would be compiled is an error. Of `prefill` at most the first two lengths compile.
- `decode` takes the samples of all rows in turn, so that a machine that is slower for a minute is so for all of them;
  the other suites take them row by row.
- `decode`, `context` and `batch` say how long it takes until the greedy step is compiled or recorded, cold in an empty
  cache of its own, then warm. Triton kernels that the run has compiled before stay in the process.
- `context` and `batch` decode greedily.
- `ladder` adds one thing a row: the twin with its cache, the compiler, the kernels, fewer bits. The rows before the
  kernels run without those for GPUs. `model.py` computes the whole text again for each token, so its row is of the
  first FEW after the prompt. Rows in the first kind of weights must have the greedy tokens of `model.py`.
- `speculate` makes a draft of the first layers of its random model, in int4, and what the later layers add so small
  that the model accepts the wanted share of the drafts. Speed depends on that share alone.
- Under torchrun `decode` measures a model that is split among the ranks, each with random weights of its own; the
  figures are rank 0's, its share of the floor is that of all ranks' bandwidth, and memory and the seconds in which
  models are made, quantized and placed are those of the rank that has most.
- Under torchrun `train` takes the fast twin alone, --batch rows on each rank; tokens are those of all ranks. Without
  --shard each rank has the whole model (DistributedDataParallel).
- Memory is the run's, with all models on the device; in `forward` and `train`, on an NVIDIA GPU, each row's, which is
  alone there.
- `train` measures whole steps of `finetune.py`, forward, backward and AdamW, of weights in float32, with `--weights
  bfloat16` under autocast. The losses of the first three steps must be those of the first row.

Copy me: needs torch, safetensors and tqdm, `scripts/finetune.py` beside it, and in the folder above `model.py`,
`fast_model.py`, `quantized_linear.py`, `cpu_kernels.py`, `tp.py`, `runtime.py`, `decode.py`, `speculate.py`,
`checkpoint.py`, `tokenizer.py`, `convert_hf_checkpoint.py` and `check_equivalence.py`; for speed on a GPU
`gpu_kernels.py`, `gpu_matvec.py` and `gpu_products.py`, for a plot matplotlib, for `--hf` transformers.

Shapes: B batch, T tokens.
"""

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import ChainMap
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn.parallel import DistributedDataParallel

import scripts.finetune as finetune
import tp
from check_equivalence import LLAMA3_SCALING, transformers_model
from checkpoint import (
    DTYPES,
    build_model,
    default_dtype,
    describe_quantization,
    quantize_model,
    read_checkpoint,
    shapes_of,
)
from convert_hf_checkpoint import config_from_hf
from decode import (
    Recorded,
    Sampling,
    Steps,
    cache_slots,
    compiled_prefill,
    compiled_step,
    decode_step,
    generate,
    has_cache,
    prefill,
)
from fast_model import bytes_per_step, cache_bytes
from model import GPTConfig
from quantized_linear import GROUP_SIZES, MODES
from runtime import (
    Stopwatch,
    check_device,
    check_target,
    default_device,
    objects_of_ranks,
    peak_memory,
    positive,
    print0,
    rank_and_count,
    read_bandwidth,
    run_command,
    synchronize,
    write_json,
    written_in_place,
)
from speculate import DraftModel, Fixed, Speculation, compiled_drafts, verify

LLAMA = {"n_layer": 32, "n_head": 32, "head_dim": 128, "dim": 4096}
GPT_OSS = {
    "block_size": 131072,
    "vocab_size": 201088,
    "n_head": 64,
    "n_kv_head": 8,
    "head_dim": 64,
    "dim": 2880,
    "hidden_dim": 2880,
    "activation": "gelu_sigmoid",
    "gate_clamp": 7.0,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "router_bias": True,
    "rope_base": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1 + 0.1 * math.log(32),
        "original_max_position_embeddings": 4096.0,
        "truncate": False,
    },
    "sliding_window": 128,
    "sinks": True,
    "n_expert_used": 4,
}
GPT2 = {"block_size": 1024, "norm": "layer", "gated": False, "rope_base": None}
SHAPES = {
    "llama-2-7b": GPTConfig(**LLAMA, block_size=4096, vocab_size=32000, n_kv_head=32, hidden_dim=11008),
    "llama-3.1-8b": GPTConfig(
        **LLAMA,
        block_size=131072,
        vocab_size=128256,
        n_kv_head=8,
        hidden_dim=14336,
        rope_base=500000.0,
        rope_scaling=LLAMA3_SCALING | {"original_max_position_embeddings": 8192},
    ),
    "llama-2-70b": GPTConfig(
        block_size=4096,
        vocab_size=32000,
        n_layer=80,
        n_head=64,
        n_kv_head=8,
        head_dim=128,
        dim=8192,
        hidden_dim=28672,
    ),
    "mixtral-8x7b": GPTConfig(
        **LLAMA,
        block_size=32768,
        vocab_size=32000,
        n_kv_head=8,
        hidden_dim=14336,
        rope_base=1e6,
        n_expert=8,
        n_expert_used=2,
    ),
    "gpt-oss-20b": GPTConfig(**GPT_OSS, n_layer=24, full_layers=tuple(range(1, 24, 2)), n_expert=32),
    "gpt-oss-120b": GPTConfig(**GPT_OSS, n_layer=36, full_layers=tuple(range(1, 36, 2)), n_expert=128),
    "gpt-124m": GPTConfig(
        **GPT2,
        vocab_size=50257,
        n_layer=12,
        n_head=12,
        n_kv_head=12,
        head_dim=64,
        dim=768,
        hidden_dim=3072,
        activation="gelu_tanh",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
    ),
    "gpt-1.2b": GPTConfig(
        **GPT2,
        vocab_size=2562,
        n_layer=24,
        n_head=16,
        n_kv_head=16,
        head_dim=128,
        dim=2048,
        hidden_dim=8192,
        activation="gelu",
    ),
}
WEIGHTS = (*DTYPES, *MODES, "mxfp4-int8")
FEW = 16  # tokens that `ladder` has of model.py


# --- What is measured -------------------------------------------------------------------------------------------------


class RandomWeights(Mapping):
    """bf16 weights of a model whose activations stay near 1; with `ranks`, of the shard that `rank` has.

    Each is made when it is asked for, always the same, so that a model need not fit onto the device in bf16.
    """

    def __init__(self, config: GPTConfig, device: str, rank: int = 0, ranks: int = 1):
        local = tp.shard_config(config, ranks)
        self.shapes = shapes_of(replace(local, vocab_size=tp.vocab_rows(config, ranks)))
        self.seeds = {name: 2**20 * rank + i for i, name in enumerate(self.shapes)}
        self.device, self.ranks, self.norm = device, ranks, 0 if config.norm_plus_one else 1

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        values = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        if len(shape) == 1:
            return values.fill_(0 if name.endswith("bias") else self.norm)
        columns = shape[1] * (self.ranks if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
        generator = torch.Generator(self.device).manual_seed(self.seeds[name])
        return values.normal_(0, columns**-0.5, generator=generator)

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


class GivenAway(dict):
    """A state dict that keeps no tensor it was asked for, so that a device holds each once, as it was or fused."""

    __getitem__ = dict.pop


def make_model(config: GPTConfig, state_dict: dict, weights: str, group_size: int, device: str, reference=False):
    """A model with weights of one of WEIGHTS, or the `reference` with the same, dequantized. Quantized ones compute in
    bf16, on a CPU in what is the default there."""
    if weights in DTYPES:
        dtype = DTYPES[weights]
    else:
        if weights == "mxfp4-int8" and not config.n_expert:
            raise ValueError("mxfp4-int8 needs a mixture of experts, whose rest is int8; give mxfp4 or int8")
        in_mxfp4 = describe_quantization(state_dict) is not None  # a checkpoint as it is published
        for mode in weights.split("-"):
            if mode != "mxfp4" or not in_mxfp4:
                config, state_dict = quantize_model(config, state_dict, mode, group_size)
        dtype = default_dtype(device, state_dict) if device == "cpu" else torch.bfloat16
        state_dict = state_dict if reference else GivenAway(state_dict)
    rank, ranks = rank_and_count()
    return build_model(config, state_dict, device, dtype, reference, rank, ranks)


def make_trained(args, config: GPTConfig, state_dict: Mapping, reference: bool = False):
    """A model of `finetune.py`, its weights in float32."""
    twin = {"model": "reference" if reference else "fast", "lora_rank": 0, "seed": 0}
    return finetune.make_model(argparse.Namespace(**twin, shard=args.shard, device=args.device), config, state_dict)


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of the best of some products of square matrices."""
    size = 8192 if device.startswith("cuda") else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(timed(device, torch.mm, a, b) for _ in range(8))


def timed(device: str, action, *arguments, **more) -> float:
    """Seconds until it is done, on the device too."""
    synchronize(device)
    start = time.perf_counter()
    action(*arguments, **more)
    synchronize(device)
    return time.perf_counter() - start


def operations_per_token(model) -> int:
    """Two for each weight that multiplies; attention is not counted."""
    config = model.config
    attention = (2 * config.n_head + 2 * config.n_kv_head) * config.head_dim
    mlp = (3 if config.gated else 2) * config.hidden_dim * (config.n_expert_used or 1)
    router = config.n_expert
    return 2 * config.dim * (config.n_layer * (attention + mlp + router) + config.vocab_size)


def slot_bytes(model) -> int:
    """Bytes of the keys and values of one token."""
    return cache_bytes(model) // (model.max_batch_size * model.max_seq_length)


def greedy(model, prompt, count: int, step=decode_step) -> torch.Tensor:
    """ids [B, count]."""
    ids = generate(model, prompt, count, Sampling(temperature=0), steps=Steps(decode_step=step))
    return torch.tensor(list(ids), device=prompt.device).T


def check_tokens(ids, expected, name: str, within: float = 0.05) -> str:
    """How greedy `ids` [...] agree with the plain run's logits [..., V]. Raises ValueError if they do not, or if they
    lie further behind than `within` of the largest."""
    if not expected.isfinite().all():
        raise ValueError(f"{name}: a logit is not a finite number, so its speed means nothing")
    expected = expected.float()
    best = expected.amax(-1)
    behind = (best - expected.gather(-1, ids[..., None])[..., 0]).max().item()
    if behind > within * expected.abs().max().item():
        raise ValueError(f"{name}: a greedy token is not the plain run's, which has it {behind:.3g} behind its best")
    return "same" if behind == 0 else f"within {behind:.1e}"


def check_logits(logits, expected, name: str, within: float = 0.05) -> str:
    """The same for the tokens that `logits` [..., V] make likeliest; they have to be finite too."""
    if not logits.isfinite().all():
        raise ValueError(f"{name}: a logit is not a finite number, so its speed means nothing")
    return check_tokens(logits.argmax(-1), expected, name, within)


@torch.no_grad()
def check_steps(model, ids, start: int, name: str) -> str:
    """The same for the tokens of compiled steps, `ids` [B, N] of which the first stands at the position `start`.

    The compiled step's own logits stay inside it; its token for those that are not finite is -1.
    """
    if (ids < 0).any():
        raise ValueError(f"{name}: a logit is not a finite number, so its speed means nothing")
    positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand(*ids.shape)
    logits = [model(ids[:, i : i + 1], positions[:, i : i + 1])[:, -1] for i in range(ids.shape[1] - 1)]
    return check_tokens(ids[:, 1:], torch.stack(logits, dim=1), name)


def compile_step(device: str, folder: str, action, *arguments) -> tuple[float, object]:
    """(seconds, step): the first action with a decode step compiled now, the compiler's files in `folder`."""
    with patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder, TRITON_CACHE_DIR=f"{folder}/triton"):
        step = compiled_step(decode_step, device)
        return timed(device, action, *arguments, step=step), step


def compile_times(device: str, action, *arguments) -> tuple[float, float, object]:
    """(cold, warm, step): `compile_step` with an empty folder and a full one. Other compiled steps compile again."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            torch.compiler.reset()
            took, step = compile_step(device, folder, action, *arguments)
            seconds.append(took)
    return *seconds, step


@contextmanager
def nothing_built(*steps):
    """Inside, compiling is an error, and recording a CUDA graph of one of these steps is one at the end."""
    recorded = [step for step in steps if isinstance(step, Recorded)]
    before = [step.count for step in recorded]
    with torch.compiler.set_stance("fail_on_recompile"):
        yield
    if [step.count for step in recorded] != before:
        raise RuntimeError("a CUDA graph was recorded inside a sample, so its figure would be false")


def count_kernels(events) -> int:
    """Kernels among a profiler's events, which on the device's side has copies, fills and named ranges too."""
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset"))
        for event in events
    )


# --- The suites: each yields rows, dictionaries with `name` and what was measured -------------------------------------


def row_of(name: str, seconds: list[float], floor: float, **more) -> dict:
    """`seconds` of each sample of one unit of work (a step, a prompt, a pass)."""
    middle = statistics.median(seconds)
    return {
        "name": name,
        "seconds": middle,
        "fastest": min(seconds),
        "slowest": max(seconds),
        "floor_seconds": floor,
        "share_of_floor": floor / middle,
        **more,
    }


def print_row(row: dict) -> None:
    rate = f"{row['tokens'] / row['seconds']:10.2f} tokens/s" if "tokens" in row else ""
    spread = f"{row['fastest'] * 1e3:.2f} to {row['slowest'] * 1e3:.2f}"
    shown = {"first_token": "s to the first", "cold": "s cold", "warm": "s warm", "peak_memory": "GB"}
    rest = [f"{row[k] / (1e9 if k == 'peak_memory' else 1):.2f} {unit}" for k, unit in shown.items() if k in row]
    rest += [f"{row['kernels']} kernels"] if "kernels" in row else []
    if "round_seconds" in row:
        steps = row["round_seconds"] / row["plain_seconds"]
        rest += [
            f"{row['acceptance']:.0%} accepted",
            f"{row['times_plain']:.2f} times plain steps of {row['plain_seconds'] * 1e3:.2f} ms",
            f"a round {row['round_seconds'] * 1e3:.2f} ms or {steps:.2f} steps",
            f"drafts {row['draft_seconds'] * 1e3:.2f} and verification {row['verify_seconds'] * 1e3:.2f} ms of it",
        ]
    rest += [f"cache {row['cache_share']:.0%} of that floor"] if "cache_share" in row else []
    rest += [f"tokens {row['agrees']}"] if "agrees" in row else []
    rest += [f"losses within {row['losses_within']:.1e}"] if "losses_within" in row else []
    print0(
        f"{row['name']:34}{row['seconds'] * 1e3:9.2f} ms ({spread}){rate}  {row['share_of_floor']:4.0%} of the floor  "
        + ", ".join(rest),
        flush=True,
    )


def start_of_text(args, model) -> torch.Tensor:
    """A prompt [1, --prompt_tokens]. Raises ValueError if two steps do not fit behind it."""
    if args.prompt_tokens + 2 > model.config.block_size:
        context = f"the context has {model.config.block_size} tokens"
        raise ValueError(f"{context}, so two steps do not fit behind {args.prompt_tokens}; give fewer --prompt_tokens")
    return torch.arange(args.prompt_tokens, device=args.device)[None] % model.config.vocab_size


def prepare_decode(args, models: dict, prompt, sampling) -> dict:
    """{name: (model, compiled step, figures of its compilation and check)}."""
    prepared, cold = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            model.setup_caches(1, cache_slots(args.prompt_tokens + args.new_tokens, model.config))
            torch.compiler.reset()
            cold[name], _ = compile_step(args.device, f"{folder}/{name}", greedy, model, prompt, 3)
        torch.compiler.reset()  # not below: it would take away the steps of the models before
        for name, model in models.items():
            warm, step = compile_step(args.device, f"{folder}/{name}", greedy, model, prompt, 3)
            agrees = check_steps(model, greedy(model, prompt, 24, step), args.prompt_tokens, name)
            for _ in generate(model, prompt, 4, sampling, steps=Steps(decode_step=step)):  # compiles the sampling
                pass
            prepared[name] = model, step, {"cold": cold[name], "warm": warm, "agrees": agrees}
    return prepared


def decode(args, models: dict, limits: dict):
    """Decode steps of batch size 1, prefill and compilation apart."""
    sampling, prompt = Sampling(args.temperature), start_of_text(args, next(iter(models.values())))
    # Two steps for each model, greedy and sampling; 8 is the default for one function.
    with torch._dynamo.config.patch(recompile_limit=2 * len(WEIGHTS)):
        prepared = prepare_decode(args, models, prompt, sampling)
    times, first = {name: [] for name in models}, {name: [] for name in models}
    with nothing_built(*(step for _, step, _ in prepared.values())):
        for _ in range(args.samples):
            for name, (model, step, _) in prepared.items():
                start = time.perf_counter()
                steps = generate(model, prompt, args.new_tokens, sampling, steps=Steps(decode_step=step))
                marks = [time.perf_counter() - start for _ in steps]
                times[name].append((marks[-1] - marks[0]) / (len(marks) - 1))
                first[name].append(marks[0])
    for name, (model, _, more) in prepared.items():
        step_bytes = bytes_per_step(model)
        floor = step_bytes / limits["bytes_per_second"]
        more |= {"tokens": 1, "first_token": statistics.median(first[name]), "bytes_per_token": step_bytes}
        more |= {"operations_per_token": operations_per_token(model)}
        yield row_of(name, times[name], floor, **more)


def first_token(run, model, prompt, last) -> int:
    return run(model, prompt, None, last).argmax(-1).item()


@torch.no_grad()
def prefills(args, models: dict, limits: dict):
    """Time until the first token after prompts of several lengths is on the host, eager and compiled."""
    device = args.device
    for name, model in models.items():
        model.setup_caches(1, min(max(args.tokens), model.config.block_size))
        torch.compiler.reset()
        expected = {}
        for kind, run in (("eager", prefill), ("compiled", compiled_prefill())):
            for i, count in enumerate(args.tokens):
                title = f"{name} {kind}, {count} tokens"
                prompt = torch.arange(count, device=device)[None] % model.config.vocab_size
                last = torch.tensor([count - 1], device=device)
                # A single token and a prompt longer than the window have graphs of their own.
                may_compile = i < 2 or count == 1 or model.config.sliding_window
                with torch.compiler.set_stance("default" if may_compile else "fail_on_recompile"):
                    logits = run(model, prompt, None, last)
                with torch.compiler.set_stance("fail_on_recompile"):
                    seconds = [timed(device, first_token, run, model, prompt, last) for _ in range(args.samples)]
                within = math.inf if model.config.n_expert else 0.05
                agrees = check_logits(logits, expected.get(count, logits), title, within)
                more = {"agrees": agrees} if count in expected else {}  # the eager one is what others are compared with
                expected.setdefault(count, logits)
                head = 2 * model.config.dim * model.config.vocab_size  # of the last token alone
                operations = (operations_per_token(model) - head) * count + head
                floor = max(
                    operations / limits["operations_per_second"], bytes_per_step(model) / limits["bytes_per_second"]
                )
                yield row_of(title, seconds, floor, tokens=count, **more)


def noisy_caches(model, rows: int, slots: int) -> None:
    """Full caches, so that reads are real ones, and no two rows see the same."""
    model.setup_caches(rows, min(slots, model.config.block_size))
    for layer in model.layers:
        for cache, scales in (
            (layer.attn.k_cache, layer.attn.k_scale_cache),
            (layer.attn.v_cache, layer.attn.v_scale_cache),
        ):
            if scales is None:
                cache.normal_()
            else:
                cache.random_(-127, 128)
                scales.fill_(0.02)


def steps_at(model, used: int, batch: int, count: int, step) -> torch.Tensor:
    """ids [B, 1 + count]: a token at the position `used` of each row, and those of `count` greedy steps after it."""
    device = model.wte.weight.device
    ids = [torch.arange(batch, device=device)[:, None] % model.config.vocab_size]
    input_pos = torch.full((batch, 1), used, device=device)
    for _ in range(count):
        token, input_pos = (t.clone() for t in step(model, ids[-1], input_pos, None, Sampling(temperature=0)))
        ids.append(token)
    return torch.cat(ids, dim=1)


def sample_steps(args, model, used: int, batch: int, step, name: str) -> tuple[list[float], str]:
    """Seconds of a step in each sample, and how their tokens agree with the eager step's."""
    with nothing_built(step):
        ids = steps_at(model, used, batch, 8, step)
        seconds = [timed(args.device, steps_at, model, used, batch, 32, step) / 32 for _ in range(args.samples)]
    return seconds, check_steps(model, ids, used, name)


@torch.no_grad()
def contexts(args, models: dict, limits: dict):
    """Decode steps with so many tokens in a cache of so many slots."""
    for name, model in models.items():
        noisy_caches(model, 1, args.slots)
        cold, warm, step = compile_times(args.device, steps_at, model, 0, 1, 3)
        weights = bytes_per_step(model) - model.max_seq_length * slot_bytes(model)
        for count in args.used:
            count = min(count, model.max_seq_length - 34)
            title = f"{name}, {count} of {model.max_seq_length}"
            seconds, agrees = sample_steps(args, model, count, 1, step, title)
            cache = count * slot_bytes(model)
            floor = (weights + cache) / limits["bytes_per_second"]
            more = {"weights": name, "used": count, "slots": model.max_seq_length, "cold": cold, "warm": warm}
            more |= {"cache_share": cache / (weights + cache), "agrees": agrees}
            yield row_of(title, seconds, floor, tokens=1, **more)
        torch.compiler.reset()  # what is compiled may hold the cache
        model.setup_caches(1, 1)  # the next model needs its memory


@torch.no_grad()
def batches(args, models: dict, limits: dict):
    """Decode steps of several rows with 256 tokens each in the cache."""
    for name, model in models.items():
        for size in args.sizes:
            noisy_caches(model, size, 512)
            title = f"{name}, batch {size}"
            cold, warm, step = compile_times(args.device, steps_at, model, 0, size, 3)
            seconds, agrees = sample_steps(args, model, 256, size, step, title)
            weights = bytes_per_step(model) - size * model.max_seq_length * slot_bytes(model)
            floor = (weights + size * 256 * slot_bytes(model)) / limits["bytes_per_second"]
            yield row_of(title, seconds, floor, tokens=size, cold=cold, warm=warm, agrees=agrees)
            torch.compiler.reset()  # what is compiled may hold the cache
            model.setup_caches(1, 1)  # the next size or model needs its memory


def sample_alone(args, action, *arguments) -> tuple[list[float], dict]:
    """(seconds of each call, its peak memory if that can be said) of what is alone on the device."""
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(args.device)
    with torch.compiler.set_stance("fail_on_recompile"):
        seconds = [timed(args.device, action, *arguments) for _ in range(args.samples)]
    return seconds, {"peak_memory": peak_memory(args.device)} if on_gpu else {}


def clear_device() -> None:
    """Give back the memory of models that nobody holds any more."""
    torch.compiler.reset()
    gc.collect()  # what was compiled refers to itself
    torch.cuda.empty_cache()


@torch.no_grad()
def forwards(args, models: dict, limits: dict):
    """One pass over a batch: the reference, the fast model, and it compiled; latency, memory, kernels launched.

    `models` has one function that builds the model, so that each of the three is alone on the device.
    """
    ((name, build),) = models.items()
    device, expected = args.device, None
    for kind in ("model.py", "fast_model.py", "compiled"):
        title = f"{name} {kind}"
        model = build(reference=kind == "model.py")
        run = torch.compile(model, fullgraph=True, dynamic=False) if kind == "compiled" else model
        ids = torch.arange(args.batch * args.tokens[0], device=device).view(args.batch, -1) % model.config.vocab_size
        logits = run(ids).cpu()  # not on the device, where it would count as the next one's memory
        agrees = check_logits(logits, logits if expected is None else expected, title)
        more = {"tokens": ids.numel()} | ({} if expected is None else {"agrees": agrees})
        expected = logits if expected is None else expected
        seconds, memory = sample_alone(args, run, ids)
        more |= memory
        if device.startswith("cuda"):
            with torch.profiler.profile() as profiler:
                timed(device, run, ids)
            more["kernels"] = count_kernels(profiler.events())
        floor = operations_per_token(model) * ids.numel() / limits["operations_per_second"]
        del model, run
        clear_device()
        yield row_of(title, seconds, floor, **more)


def training_step(args, model, weights: str, compiled: bool):
    """A function that takes one step on a batch of random tokens, always the same, and returns the loss before it."""
    loss = finetune.make_loss(model, compiled, args.recompute)
    optimizer = finetune.make_optimizer(model, 1e-4, 0.1, args.device)
    rank, ranks = rank_and_count()
    parallel = DistributedDataParallel(loss) if ranks > 1 and not args.shard else loss
    size = args.batch * (args.tokens[0] + 1)
    ids = torch.randint(model.config.vocab_size, (size,), generator=torch.Generator().manual_seed(rank))
    ids, kind = ids.to(args.device).view(args.batch, -1), args.device.partition(":")[0]

    def step() -> torch.Tensor:
        with torch.autocast(kind, torch.bfloat16, enabled=weights == "bfloat16", cache_enabled=False):
            value = parallel(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def trainings(args, models: dict, limits: dict):
    """One training step on a batch: the reference, the fast model, and it compiled; `models` is as for `forwards`."""
    ((name, build),) = models.items()
    ranks, expected = rank_and_count()[1], None
    for kind in ("model.py", "fast_model.py", "compiled")[ranks > 1 :]:
        title = f"{name} {kind}"
        model = build(reference=kind == "model.py").train().requires_grad_(True)
        step = training_step(args, model, name, kind == "compiled")
        losses = torch.stack([step() for _ in range(3)])
        if not losses.isfinite().all():
            raise ValueError(f"{title}: a loss is not a finite number, so its speed means nothing")
        expected = losses if expected is None else expected
        off = ((losses - expected).abs().max() / expected.abs().max()).item()
        if not off < (1e-4 if name == "float32" else 1e-2):
            raise ValueError(f"{title}: its losses {losses.tolist()} are not the first row's, {expected.tolist()}")
        seconds, memory = sample_alone(args, step)
        more = {"tokens": args.batch * args.tokens[0] * ranks, "losses_within": off} | memory
        # Two passes more backwards than forwards; what is computed again, and AdamW's traffic, are not counted.
        floor = 3 * operations_per_token(model) * more["tokens"] / (limits["operations_per_second"] * ranks)
        del model, step
        clear_device()
        yield row_of(title, seconds, floor, **more)


def scale_outputs(layers, factor: float) -> None:
    """What these layers add to the residual stream, times a factor; weights are changed in place."""
    for layer in layers:
        for linear in (layer.attn.out, *(m for name, m in layer.mlp.named_children() if name.endswith("down"))):
            for name in ("scales", "zeros") if hasattr(linear, "scales") else ("weight",):
                if hasattr(linear, name):
                    getattr(linear, name).mul_(factor)


def time_text(model, prompt, steps: Steps, count: int, sampling, seed: int = 0):
    """Seconds of a token after the first, and the ids [1, count]."""
    start, marks, ids = time.perf_counter(), [], []
    for token in generate(model, prompt, count, sampling, seed=seed, steps=steps):
        marks.append(time.perf_counter() - start)
        ids.append(token[0])
    return (marks[-1] - marks[0]) / (len(marks) - 1), torch.tensor([ids], device=prompt.device)


def sample_rounds(args, text, plain: Steps, drafted: Steps, watch: Stopwatch) -> tuple[list[float], list[int], dict]:
    """(seconds a token and rounds of each sample with drafts, figures of these), plain steps in turn with them."""
    sampling, new = Sampling(args.temperature), args.new_tokens
    steps, fast, rates, rounds, calls = [], [], [], [], {"draft": 0.0, "verify": 0.0}
    for sample in range(args.samples):
        steps.append(text(plain, new, sampling, seed=sample)[0])
        watch.read()
        fast.append(text(drafted, new, sampling, seed=sample)[0])
        for kind, seconds in watch.read().items():
            calls[kind] += sum(seconds)
        rates.append(drafted.speculation.figures({})["acceptance"])
        rounds.append(len(drafted.speculation.history))
    per_round = [s * (new - 1) / n for s, n in zip(fast, rounds, strict=True)]
    plain_seconds = statistics.median(steps)
    figures = {"acceptance": statistics.mean(rates), "plain_seconds": plain_seconds}
    figures |= {"round_seconds": statistics.median(per_round), "times_plain": plain_seconds / statistics.median(fast)}
    figures |= {f"{kind}_seconds": total / sum(rounds) for kind, total in calls.items()}
    return fast, rounds, figures


@torch.no_grad()
def speculations(args, models: dict, limits: dict):
    """Decoding with a draft model at several shares of accepted drafts, against plain steps in turn with it.

    `models` has pairs, a model and a draft of its first layers.
    """
    sampling, greedy_sampling, new = Sampling(args.temperature), Sampling(temperature=0), args.new_tokens
    for name, (model, draft) in models.items():
        prompt = start_of_text(args, model)
        model.setup_caches(1, cache_slots(args.prompt_tokens + new + max(args.drafts), model.config))
        torch.compiler.reset()
        step, check = (compiled_step(f, args.device) for f in (decode_step, verify))
        drafting = compiled_drafts(args.device)
        watch, plain, text = Stopwatch(args.device), Steps(decode_step=step), partial(time_text, model, prompt)
        later, unscaled = model.layers[draft.config.n_layer :], 1.0
        text(plain, 4, sampling)
        for wanted, k in ((wanted, k) for wanted in args.acceptance for k in args.drafts):
            source, verified = DraftModel(draft, watch.watch("draft", drafting)), watch.watch("verify", check)
            sampled, greedily = (
                Steps(decode_step=step, speculation=Speculation(model, kind, source, Fixed(k), verified))
                for kind in (sampling, greedy_sampling)
            )
            low, high = 0.0, 4.0
            for _ in range(8):
                factor = (low + high) / 2
                scale_outputs(later, factor / unscaled)
                unscaled = factor
                text(sampled, new, sampling)
                accepted = sampled.speculation.figures({})["acceptance"]
                low, high = (factor, high) if accepted > wanted else (low, factor)
            text(greedily, 3 * (k + 1), greedy_sampling)  # compiles it
            text(sampled, 3 * (k + 1), sampling)
            _, greedy_ids = text(greedily, 24, greedy_sampling)
            agrees = check_steps(model, greedy_ids, args.prompt_tokens, f"{name}, {k} drafts")
            with nothing_built(step, check, drafting):
                seconds, rounds, figures = sample_rounds(args, text, plain, sampled, watch)
            round_bytes = bytes_per_step(model) + k * bytes_per_step(draft)
            floor = round_bytes / limits["bytes_per_second"] * statistics.median(rounds) / (new - 1)
            yield row_of(f"{name}, {k} drafts", seconds, floor, agrees=agrees, tokens=1, k=k, **figures)


@contextmanager
def no_gpu_kernels():
    """Models that are built, compiled and run inside are plain PyTorch."""
    fast, quantized, sampling = (f"{file}.gpu_kernels" for file in ("fast_model", "quantized_linear", "decode"))
    with patch(fast, None), patch(quantized, None), patch(sampling, None):
        yield


def rung(args, limits: dict, name: str, model, step, reference=None) -> dict:
    """A row of decode steps. Its greedy tokens must be the reference's, or without one those of the eager model."""
    prompt, count = start_of_text(args, model), args.new_tokens if has_cache(model) else FEW
    torch.compiler.reset()
    if has_cache(model):
        model.setup_caches(1, cache_slots(args.prompt_tokens + max(count, 24), model.config))
    text, sampling = partial(time_text, model, prompt, Steps(decode_step=step)), Sampling(args.temperature)
    ids = greedy(model, prompt, 24, step)
    text(4, sampling)  # compiles the sampling
    with nothing_built(step):
        seconds = [text(count, sampling, seed=sample)[0] for sample in range(args.samples)]
    if reference:
        logits = reference(torch.cat([prompt, ids[:, :-1]], dim=1))[:, args.prompt_tokens - 1 :]
        agrees = check_tokens(ids, logits, name)
    else:
        agrees = check_steps(model, ids, args.prompt_tokens, name)
    size = bytes_per_step(model)
    more = {"tokens": 1, "new_tokens": count, "bytes_per_token": size, "agrees": agrees}
    return row_of(name, seconds, size / limits["bytes_per_second"], **more)


@torch.no_grad()
def ladder(args, models: dict, limits: dict):
    """Decode steps of batch size 1, one thing added in each row. `models` has functions that build."""
    (kind, build), *fewer_bits = models.items()
    reference, model = build(reference=True), build()

    def compiled():
        return compiled_step(decode_step, args.device)

    yield rung(args, limits, f"{kind} model.py, eager", reference, decode_step, reference)
    with no_gpu_kernels():
        rows = [rung(args, limits, f"{kind} fast_model.py, eager", model, decode_step, reference)]
        rows.append(rung(args, limits, f"{kind} compiled", model, compiled(), reference))
    yield from rows
    yield rung(args, limits, f"{kind} with kernels", model, compiled(), reference)
    del model, reference
    for kind, build in fewer_bits:
        clear_device()
        yield rung(args, limits, f"{kind} with kernels", build(), compiled())


SUITES = {"decode": decode, "prefill": prefills, "context": contexts, "batch": batches, "forward": forwards}
SUITES |= {"train": trainings, "speculate": speculations, "ladder": ladder}
ALONE = ("forward", "train")  # suites of one kind of weights, whose rows are alone on the device


def transformers_row(args, limits: dict) -> dict:
    """The same decode steps by transformers, eager and in bf16."""
    model = transformers_model(args.hf).to(args.device, torch.bfloat16)
    prompt = torch.arange(args.prompt_tokens, device=args.device)[None]

    def run(count):
        return timed(args.device, model.generate, prompt, min_new_tokens=count, max_new_tokens=count, do_sample=False)

    run(4)
    seconds = [(run(args.new_tokens) - run(1)) / (args.new_tokens - 1) for _ in range(args.samples)]
    floor = sum(p.nbytes for p in model.parameters()) / limits["bytes_per_second"]
    return row_of("transformers, eager bfloat16", seconds, floor, tokens=1)


# --- The command line -------------------------------------------------------------------------------------------------


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{torch.get_num_threads()} threads of {name}, {torch.backends.cpu.get_cpu_capability()}"


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return []


def commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True
        )
    except OSError:
        return None
    return done.stdout.decode().strip() or None


def read_shape(shape: str) -> GPTConfig:
    """A name of SHAPES, or a Hugging Face config.json."""
    if shape in SHAPES:
        return SHAPES[shape]
    if not Path(shape).is_file():
        raise ValueError(f"{shape} is neither a config.json nor one of {', '.join(SHAPES)}")
    try:
        return config_from_hf(json.loads(Path(shape).read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{shape} is not JSON: {error}") from error


def draw_bars(axes, rows: list[dict]) -> None:
    """A bar for each row's time, and its floor in it."""
    names = [row["name"] for row in rows[::-1]]
    axes.barh(names, [row["seconds"] * 1e3 for row in rows[::-1]], color="tab:blue", label="measured, median")
    axes.barh(names, [row["floor_seconds"] * 1e3 for row in rows[::-1]], color="tab:orange", height=0.3, label="floor")
    axes.set_xlabel("milliseconds")
    axes.legend()


def draw_lines(axes, rows: list[dict]) -> None:
    """A line of time over used tokens for each kind of weights, and its floor."""
    for i, name in enumerate(dict.fromkeys(row["weights"] for row in rows)):
        own = sorted((row for row in rows if row["weights"] == name), key=lambda row: row["used"])
        used = [row["used"] for row in own]
        axes.plot(used, [row["seconds"] * 1e3 for row in own], f"C{i}o-", label=f"{name}, median")
        axes.plot(used, [row["floor_seconds"] * 1e3 for row in own], f"C{i}--", label=f"{name}, floor")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("milliseconds a token")
    axes.legend()


def draw_ladder(axes, rows: list[dict]) -> None:
    """A bar for each row's tokens a second, its number at the end, and a tick at the floor."""
    places = range(len(rows))
    rates, floors = ([1 / row[name] for row in rows] for name in ("seconds", "floor_seconds"))
    axes.barh(places, rates, color="tab:blue", height=0.68)
    axes.vlines(floors, [y - 0.42 for y in places], [y + 0.42 for y in places], color="black", linewidth=2)
    beside = {"textcoords": "offset points", "va": "center", "fontsize": 11}
    axes.annotate("floor: a token's bytes at the measured bandwidth", (floors[0], 0), (8, 0), **beside)
    for place, rate in zip(places, rates, strict=True):
        if rate > max(floors) / 10:  # there is room inside
            look = {"color": "white", "ha": "right", "xytext": (-6, 0)}
        else:
            look = {"color": "black", "ha": "left", "xytext": (6, 0)}
        axes.annotate(f"{rate:.0f}", (rate, place), weight="bold", **beside, **look)
    axes.set_yticks(places, [row["name"] for row in rows], fontsize=11)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.03 * max(floors))
    axes.set_xlabel("tokens a second, batch size 1; longer is better")
    axes.spines[["top", "right"]].set_visible(False)


def rows_by_ranks(contents: list[dict]) -> dict:
    """{model and weights: {ranks: (row, the file's content)}} of `decode` under several numbers of ranks."""
    found = {}
    for content in sorted(contents, key=lambda content: content["ranks"]):
        for row in content["rows"]:
            found.setdefault(f"{content['model']} {row['name']}", {})[content["ranks"]] = row, content
    return found


def tabulate_ranks(found: dict) -> list[str]:
    """Lines of a table; memory and loading are those of a file, with all its models."""
    lines = [
        "| | ranks | tokens/s | times one | of the floor | GB a rank | s to load |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of_ranks in found.items():
        for ranks, (row, content) in of_ranks.items():
            times = f"{of_ranks[1][0]['seconds'] / row['seconds']:.2f}" if 1 in of_ranks else ""
            rate, share, memory = 1 / row["seconds"], row["share_of_floor"], content["peak_memory"] / 1e9
            load = content["load_seconds"]
            lines.append(f"| {name} | {ranks} | {rate:.1f} | {times} | {share:.0%} | {memory:.1f} | {load:.0f} |")
    return lines


def draw_ranks(axes, found: dict) -> None:
    """A line of tokens a second over ranks for each model and kind of weights, and its floor."""
    for i, (name, of_ranks) in enumerate(found.items()):
        rows = [row for row, _ in of_ranks.values()]
        axes.plot(list(of_ranks), [1 / row["seconds"] for row in rows], f"C{i}o-", label=name)
        axes.plot(list(of_ranks), [1 / row["floor_seconds"] for row in rows], f"C{i}--", linewidth=1)
    ranks = sorted({ranks for of_ranks in found.values() for ranks in of_ranks})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ranks, [str(n) for n in ranks])
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("ranks; dashed: at the bandwidth of all")
    axes.set_ylabel("tokens a second, batch size 1")
    axes.legend()


def read_figures(path: Path) -> dict:
    """What a suite has written. Raises ValueError if it is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content | {name: content[name] for name in ("suite", "rows", "hardware", "torch")}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not what --json_path writes; give the file of a suite") from error


def plot(json_paths: list[Path], png: Path) -> None:
    """The rows of a suite against their floors; of several files those of `decode` over their ranks, and a table."""
    contents = [read_figures(path) for path in json_paths]
    suite, rows, several = contents[0]["suite"], contents[0]["rows"], len(contents) > 1
    if several and any(content["suite"] != "decode" for content in contents):
        raise ValueError("a plot of several files is of the suite decode under several numbers of ranks; give those")
    if several:
        found = rows_by_ranks(contents)
        print("\n".join(tabulate_ranks(found)))
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the plot needs matplotlib: pip install matplotlib") from error
    tall = several or suite == "context"
    figure = Figure(figsize=(9, 5 if tall else 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    if several:
        draw_ranks(axes, found)
    else:
        {"context": draw_lines, "ladder": draw_ladder}.get(suite, draw_bars)(axes, rows)
    model = "decode" if several else f"{suite} of {contents[0]['model']}"
    axes.set_title(f"{model}, {contents[0]['hardware']}, torch {contents[0]['torch']}", fontsize=10)
    with written_in_place(png) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def check_flags(args) -> None:
    """Raises ValueError or OSError for arguments that cannot be, before anything is loaded; fills in --weights."""
    suite, on_cpu = args.suite, args.device == "cpu"
    if len(args.json_path) > 1:
        raise ValueError(f"{suite} writes one --json_path, not {len(args.json_path)}; plot alone reads several")
    for path in args.json_path:
        check_target(path, args.shape, args.checkpoint_path)
    if rank_and_count()[1] > 1 and (suite not in ("decode", "train") or args.checkpoint_path or args.hf):
        raise ValueError("under torchrun there are the suites decode and train of a --shape; run others without it")
    if suite in ("decode", "ladder", "speculate") and args.new_tokens < 2:
        raise ValueError(f"{suite} times the tokens after the first one; give --new_tokens 2 or more")
    if suite != "train" and (args.shard or args.recompute):
        raise ValueError(f"--shard and --recompute are for the suite train; leave them out of {suite}")
    if (args.shape is None) == (args.checkpoint_path is None):
        raise ValueError("give either --shape or --checkpoint_path")
    if args.hf and suite != "decode":
        raise ValueError(f"--hf is a row of the suite decode; leave it out of {suite}")
    if suite in (*ALONE, "speculate"):
        args.weights = args.weights or ["float32" if on_cpu else "bfloat16"]
    if suite == "speculate" and any(kind.startswith("mxfp4") for kind in args.weights):
        raise ValueError("speculate scales its model's weights, which those in mxfp4 do not allow; give another kind")
    if suite in ALONE and len(args.weights) > 1:
        raise ValueError(f"{suite} takes one kind of weights, not {len(args.weights)}; run it once for each")
    if suite == "train" and args.weights[0] not in ("float32", "bfloat16"):
        raise ValueError(f"train takes the weights float32 or bfloat16, not {args.weights[0]}")
    plain = ["float32"] if on_cpu and suite != "ladder" else []
    args.weights = args.weights or [*plain, "bfloat16", "int8", "int4"]
    if suite == "ladder" and args.weights[0] not in DTYPES:
        raise ValueError(f"ladder begins with plain weights, not {args.weights[0]}; give bfloat16 first")
    check_device(args.device)


def read_weights(args) -> tuple[GPTConfig, Mapping]:
    """(config, state dict) of the --checkpoint_path, or random ones of the --shape."""
    if not args.checkpoint_path:
        config = read_shape(args.shape)
        return config, RandomWeights(config, args.device, *(() if args.suite == "train" else rank_and_count()))
    config, state_dict = read_checkpoint(args.checkpoint_path)
    quantized = describe_quantization(state_dict)
    as_published = quantized and quantized["mode"] == "mxfp4" and "int8" not in quantized
    if quantized and not (as_published and args.suite not in ("train", "speculate")):
        raise ValueError(f"{args.checkpoint_path} is quantized already; give the model.pth that it was made from")
    return config, state_dict


def measure_limits(device: str) -> dict:
    """What the device can do at most, which is printed."""
    rate_dtype = torch.float32 if device == "cpu" else torch.bfloat16
    limits = {"bytes_per_second": read_bandwidth(device), "operations_per_second": matrix_rate(device, rate_dtype)}
    print0(f"{hardware(device)}, torch {torch.__version__}, {rank_and_count()[1]} ranks")
    multiplies = limits["operations_per_second"] / 1e12
    print0(f"reads {limits['bytes_per_second'] / 1e9:.1f} GB/s, multiplies {multiplies:.2f} TFLOP/s")
    return limits


def make_models(args, config: GPTConfig, state_dict: Mapping, limits: dict) -> dict:
    """{kind of weights: the model, a function that builds it, or its pair with a draft}, as the suite takes it."""
    suite, make = args.suite, partial(make_model, group_size=args.group_size, device=args.device)
    if suite in ALONE and not args.shard:
        state_dict = {name: tensor.cpu() for name, tensor in state_dict.items()}  # no part of a row's memory
    if suite == "train":
        return {args.weights[0]: partial(make_trained, args, config, state_dict)}
    if suite in (*ALONE, "ladder"):
        return {kind: partial(make, config, state_dict, kind) for kind in args.weights}
    if suite == "speculate":  # a layer adds less than the embedding holds, or int4 alone would lose most drafts
        embedding = {"transformer.wte.weight": state_dict["transformer.wte.weight"] * 4 * config.dim**0.5}
        state_dict = ChainMap(embedding, state_dict)
    models = {kind: make(config, state_dict, kind) for kind in args.weights}
    for kind, model in models.items():
        if args.kv_cache:
            model.setup_caches(1, 1, int8=True)  # the larger ones that follow are of the same kind
        size, count = bytes_per_step(model), operations_per_token(model)
        most = 1 / max(size / limits["bytes_per_second"], count / limits["operations_per_second"])
        print0(f"  {kind}: {size / 1e9:.3f} GB, {count / 1e9:.2f} GFLOP a token, so {most:.0f} tokens/s at most")
    if suite != "speculate":
        return models
    small = replace(config, n_layer=max(1, config.n_layer // 8))
    draft = make(small, {name: state_dict[name] for name in shapes_of(small)}, args.draft_weights)
    print(f"  draft: {small.n_layer} layers in {args.draft_weights}, {bytes_per_step(draft) / 1e9:.3f} GB")
    return {kind: (model, draft) for kind, model in models.items()}


def measure_rows(args, models: dict, limits: dict) -> list[dict]:
    """The rows of the suite, which are printed as they come."""
    rows = [transformers_row(args, limits)] if args.hf else []
    for row in rows:
        print_row(row)
    for row in SUITES[args.suite](args, models, limits):
        print_row(row)
        rows.append(row)
    return rows


def main(args) -> None:
    if args.suite == "plot":
        if not args.json_path or not args.png:
            raise ValueError("plot needs --json_path, a file that a suite wrote, and --png, the file to write")
        check_target(args.png, *args.json_path)
        return plot(args.json_path, args.png)
    check_flags(args)
    config, state_dict = read_weights(args)
    limits = measure_limits(args.device)
    start = time.perf_counter()
    models = make_models(args, config, state_dict, limits)
    synchronize(args.device)
    load_seconds = time.perf_counter() - start
    del state_dict  # a copy beside the models would be in the way
    rows = measure_rows(args, models, limits)
    whole = {}  # of the whole run, by the rank that has most
    if args.suite not in (*ALONE, "ladder"):  # which load by row
        whole["load_seconds"] = max(objects_of_ranks(load_seconds))
    if args.suite not in ALONE:
        whole["peak_memory"] = max(objects_of_ranks(peak_memory(args.device)))
        print0(f"memory: {whole['peak_memory'] / 1e9:.2f} GB at most, of the whole run with all its models")
    rank, ranks = rank_and_count()
    started = "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"
    if args.json_path and rank == 0:
        content = {
            "suite": args.suite,
            "model": str(args.shape or args.checkpoint_path.name),
            "hardware": hardware(args.device),
            "torch": torch.__version__,
            "ranks": ranks,
            "commit": commit(),
        }
        content |= {
            "command": " ".join([started, "-m scripts.benchmark", *sys.argv[1:]]),
            "limits": limits,
            "rows": rows,
        } | whole
        write_json(args.json_path[0], content)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Measure a suite of rows, or plot one that was measured.")
    add = parser.add_argument
    add("suite", choices=(*SUITES, "plot"))
    add("--shape", help=f"{', '.join(SHAPES)}, or a Hugging Face config.json: random weights of this shape")
    add("--checkpoint_path", type=Path, help="a model.pth that is not quantized, instead of --shape")
    add(
        "--weights",
        nargs="+",
        choices=WEIGHTS,
        help="default: bfloat16, int8, int4, on a CPU float32; forward, train: one; ladder: plain rows in the first",
    )
    add("--group_size", type=int, choices=GROUP_SIZES, default=32, help="columns in a group of int4")
    add("--hf", type=Path, metavar="DIR", help="decode: a row of transformers with the model in this directory")
    add("--kv_cache", choices=("int8",), help="decode, context, batch: keys and values in 8 bits")
    add("--samples", type=positive, default=5, help="of each row")
    add("--prompt_tokens", type=positive, default=5, help="decode, ladder, speculate")
    add("--new_tokens", type=positive, default=200, help="decode, ladder, speculate")
    add(
        "--temperature",
        type=float,
        default=Sampling.temperature,
        help="decode, ladder, speculate; 0 is greedy, else top-k is 200",
    )
    add(
        "--tokens",
        type=positive,
        nargs="+",
        default=[512, 2048, 8192],
        help="prefill; forward and train take the first",
    )
    add("--used", type=positive, nargs="+", default=[128, 2048, 8192, 32768], help="context: tokens in the cache")
    add("--slots", type=positive, default=131072, help="context: cache slots")
    add("--sizes", type=positive, nargs="+", default=[1, 4, 16, 64], help="batch: rows")
    add("--batch", type=positive, default=32, help="forward, train: rows")
    add("--shard", action="store_true", help="train: divide the model among torchrun's ranks, as finetune.py does")
    add("--recompute", action="store_true", help="train: compute layers twice, as finetune.py does")
    add("--acceptance", type=float, nargs="+", default=[0.6, 0.8, 0.9], help="speculate: shares of drafts to accept")
    add("--drafts", type=positive, nargs="+", default=[5], help="speculate: drafts in a round")
    add("--draft_weights", choices=WEIGHTS, default="int4", help="speculate: of the draft, an eighth of the layers")
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, mps")
    add("--json_path", type=Path, nargs="+", default=[], metavar="FILE", help="write limits and rows; for plot, read")
    add("--png", type=Path, metavar="FILE", help="plot: the picture to write")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main, parse_arguments(), splits=True)
