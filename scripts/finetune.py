"""Train a model: from a checkpoint or from scratch, on text or on conversations, on either twin.

    python -m scripts.finetune --checkpoint_path checkpoints/NAME/model.pth --data FILE.txt --out_dir checkpoints/NEW
    python -m scripts.finetune --config DIR/config.json --data FILE.txt --out_dir checkpoints/NEW --compile
    torchrun --standalone --nproc_per_node=2 -m scripts.finetune --checkpoint_path ... --data ... --out_dir ... --shard

Decisions to know:

- A file that begins with {" or [{" is read as JSON, whatever its name: rows in lines (JSONL) or in an array. Any other
  is a plain text, and refused if its name promises rows (.json, .jsonl, .ndjson, .csv, .tsv). A plain text that begins
  like JSON goes into {"text": ...}.
- Rows {"text": ...}, or a plain text, are one long row of tokens, cut into windows. Rows {"messages": [...]} go through
  the model's chat template, a row for each answer, and only the answer counts for the loss.
- The rows of a step follow from the seed and the step's number alone, each row once an epoch. So a run continues after
  any interruption as if there had been none, and several ranks compute what one would with as many rows.
- training.pth has the trained weights, the optimizer and the step; model.pth beside it is for everything else. Both are
  renamed into place when they are whole.
- Weights and optimizer are float32. With bfloat16, matrices multiply in it (autocast).
- The first step whose loss or gradient norm is not finite is remembered on the device, and read with the loss every
  ten steps and before each save: a read in each step would wait for the GPU. Nothing that is not finite is saved.
- A run is resumed only with the contents and tokenizer files that it began with. Digests are of the files and not of
  the ids, because some chat templates (Llama 3.2's) write the day's date.
- The loss of a step is the mean over its tokens that count, whatever their spread over rows, accumulation and ranks.
- Ranks are DistributedDataParallel's: the whole model on each. With --shard they are those of `fully_shard` (FSDP2):
  each keeps a part of every weight, gradient and optimizer state, and gathers the weights of one layer at a time. That
  costs traffic, so it is asked for. What is saved is the same, and read by any number of ranks.
- LoRA (Hu et al. 2021, arXiv:2106.09685) trains two thin matrices beside each chosen projection, in a fused matrix
  beside that part of its rows; what is saved is the sum.

Copy me: needs torch, safetensors and tqdm, and in the folder above `model.py`, `fast_model.py`, `quantized_linear.py`,
`cpu_kernels.py`, `tp.py`, `runtime.py`, `decode.py`, `checkpoint.py`, `convert_hf_checkpoint.py` and `tokenizer.py`,
with its libraries; for speed on a GPU `gpu_kernels.py`, `gpu_matvec.py` and `gpu_products.py`.

Shapes: R rows of a step, T tokens of a row, N output rows and K input columns of a projection.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import cpu_kernels
from checkpoint import (
    DAMAGE,
    DTYPES,
    build_model,
    describe_quantization,
    fingerprint,
    put,
    read_checkpoint,
    reference_state,
    shapes_of,
    whole,
    write_checkpoint,
)
from convert_hf_checkpoint import config_from_hf, read_json
from decode import Sampling, check_length, generate
from fast_model import FastGPT, fuse, to_reference
from model import GPT, GPTConfig
from runtime import (
    check_agreement,
    check_device,
    check_target,
    default_device,
    objects_of_ranks,
    positive,
    print0,
    rank_and_count,
    read_text,
    run_command,
    say,
    written_in_place,
)
from tokenizer import FILES, find_tokenizer
from tp import from_rank_0

IGNORED = -100  # cross_entropy's mark of a target that does not count
GAP = re.compile(r"[\s\ufeff]*")  # files that begin with a byte order mark may have been joined
SURROGATE = re.compile("[\ud800-\udfff]")
BEGINS_AS_ROWS = re.compile(r'\s*(\[\s*)?\{\s*["}]')
NAMES_OF_ROWS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
FORM = '{"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'


# --- Data -------------------------------------------------------------------------------------------------------------


def check_characters(text: str, where: str) -> None:
    """Raises ValueError if a text has half of a surrogate pair, as JSON and the bytes of an argument may."""
    if SURROGATE.search(text):
        raise ValueError(f"{where} has half of a surrogate pair, which is no character; mend it or leave it out")


def read_row(value, where: str) -> dict:
    """{"text"} or {"messages"} of a row of JSON. Raises ValueError, which says where, if it has neither."""
    row = value if isinstance(value, dict) else {}
    if isinstance(row.get("messages"), list):
        kept = {"messages": row["messages"], "tools": row.get("tools")}
        texts = [m.get(name) if isinstance(m, dict) else None for m in row["messages"] for name in ("role", "content")]
    else:
        kept, texts = {"text": row.get("text")}, [row.get("text")]
    if not all(isinstance(text, str) for text in texts):
        names = list(row)
        for name in row:  # of lists of objects the inner names too, such as "from" and "value"
            inner = row[name][0] if isinstance(row[name], list) and row[name] else None
            names += [f"{name}[0].{key}" for key in inner] if isinstance(inner, dict) else []
        has = f"the names {', '.join(names[:8])}" if row else f"a JSON {type(value).__name__}"
        raise ValueError(
            f'{where} has no "text", nor "messages" of a "role" and a "content" in strings, but {has}; write {FORM}'
        )
    if "text" in kept:
        check_characters(kept["text"], where)
    return kept


def read_rows(text: str, file: Path) -> list[dict]:
    """Rows {"where", and "text" or "messages"} of JSON values, one after the other, or of the arrays among them.

    Raises ValueError that names a row of another form.
    """
    rows, line, at, decoder = [], 1, 0, json.JSONDecoder()
    while (begin := GAP.match(text, at).end()) < len(text):
        line += text.count("\n", at, begin)
        try:
            value, at = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            rule = 'a file that begins with {" must be; mend it, or put a plain text into {"text": "..."}'
            raise ValueError(f"line {line} of {file} is not JSON ({error}), and {rule}") from error
        for number, part in enumerate(value if isinstance(value, list) else [value], start=1):
            where = f"row {number} of the array in line {line}" if isinstance(value, list) else f"line {line}"
            rows.append({"where": where} | read_row(part, f"{where} of {file}"))
        line += text.count("\n", begin, at)
    return rows


def encode_long(text: str, tokenizer) -> torch.Tensor:
    """The ids of a text, int32, a million characters at a time, which takes a small part of the memory."""
    ids, start, size = [], 0, 2**20
    while start < len(text):
        end = len(text) if len(text) - start <= size else text.rfind("\n", start, start + size) + 1 or start + size
        ids.append(torch.tensor(tokenizer.encode(text[start:end], bos=start == 0), dtype=torch.int32))
        start = end
    return torch.cat([torch.empty(0, dtype=torch.int32), *ids])


def windows(ids: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, targets), each [R, T]: the windows of a long row, each target the next token."""
    count = (len(ids) - 1) // length
    row = ids[: count * length + 1]
    return row[:-1].view(count, length), row[1:].view(count, length)


def answers(messages: list[dict], tools: list | None, tokenizer) -> list[tuple[list[int], int]]:
    """For each answer in a conversation the ids up to the token that ends it, and how many of them the model is given.

    Each is rendered as the last one: templates leave things out of earlier answers.
    """
    found = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.render_chat(messages[:i], tools=tools)
        after = tokenizer.render_chat(messages[: i + 1], answer_next=False, tools=tools)
        check_characters(after, "the conversation")
        if not after.startswith(before):
            what = "an answer" if i else "a conversation that begins with an answer"
            raise ValueError(f"the chat template does not render {what} as it asks for one")
        given, ids = (tokenizer.encode(text, bos=False) for text in (before, after))
        if ids[: len(given)] != given:  # a token reaches from one into the other
            ids = given + tokenizer.encode(after[len(before) :], bos=False)
        answer = ids[len(given) :]
        end = next((place for place, id in enumerate(answer, 1) if id in tokenizer.eos_ids), len(answer))
        found.append((given + answer[:end], len(given)))
    return found


def chat_rows(rows: list[dict], file: Path, tokenizer, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, targets), each [R, T], of conversations, a row for each answer; what is left out is counted and printed.

    Raises ValueError that names a row which is not rendered, or if no answer is left.
    """
    found, left_out = [], {}
    for row in rows:
        where = row["where"]
        if "messages" not in row:
            raise ValueError(f"{where} of {file} is text among messages; make it two files")
        try:
            said = answers(row["messages"], row["tools"], tokenizer)
        except ValueError as error:
            raise ValueError(f"{where} of {file}: {error}") from error
        if not said:
            left_out.setdefault('conversations without the role "assistant"', []).append(where)
        for ids, given in said:
            given = max(given, 1)  # nothing predicts the first token
            if len(ids) <= given:
                left_out.setdefault("answers without a token", []).append(where)
            elif given > length:
                left_out.setdefault(f"answers that begin after --length {length}", []).append(where)
            else:
                found.append((ids, given))
    message = ", ".join(f"{len(places)} {what} (first in {places[0]})" for what, places in left_out.items())
    if not found:
        raise ValueError(f"{file} has no answer to train on; it has {message or 'no rows'}")
    if message:
        print0(f"left out of {file}: {message}")
    if not any(ids[-1] in tokenizer.eos_ids for ids, _ in found):
        ids, given = found[0]
        last = next((tokenizer.piece(id) for id in ids[: given - 1 : -1] if id in tokenizer.special_ids), None)
        advice = "let the chat template end them with eos_token"
        if last:
            advice = f"name {last!r} as eos_token in {tokenizer.directory / 'tokenizer_config.json'}"
        print0(f"no answer in {file} ends with a token that ends a text, so the model will not learn to stop; {advice}")
    return padded(found, length)


def padded(found: list[tuple[list[int], int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, targets), each [R, T], of ids and how many of them are given."""
    ids = torch.zeros(len(found), length, dtype=torch.int32)
    targets = torch.full_like(ids, IGNORED)
    for i, (row, given) in enumerate(found):
        row = row[: length + 1]
        ids[i, : len(row) - 1] = torch.tensor(row[:-1])
        targets[i, given - 1 : len(row) - 1] = torch.tensor(row[given:])
    return ids, targets


def read_data(file: Path, tokenizer, length: int) -> tuple[tuple[torch.Tensor, torch.Tensor], str]:
    """((ids, targets), each int32 [R, T], a digest of the contents) of a text, or of rows in JSON.

    Raises ValueError if it is neither, or does not fill a row.
    """
    text = objects_of_ranks(read_text(file) if rank_and_count()[0] == 0 else None)[0]  # a pipe can be read once
    if "\0" in text:
        raise ValueError(f"{file} holds zero bytes, so it is no text; give a text, or rows of JSON, in UTF-8")
    if not text or text.isspace():
        raise ValueError(f"{file} is empty; give a text, or rows {FORM}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    if BEGINS_AS_ROWS.match(text):
        rows = read_rows(text, file)
    elif file.suffix.lower() in NAMES_OF_ROWS:
        raise ValueError(f"{file} does not begin as rows of JSON do; write rows {FORM}, or name a plain text .txt")
    else:
        rows = [{"text": text}]
    if any("messages" in row for row in rows):
        return chat_rows(rows, file, tokenizer, length), digest
    end = torch.tensor(sorted(tokenizer.eos_ids)[:1], dtype=torch.int32)
    data = windows(torch.cat([part for row in rows for part in (encode_long(row["text"], tokenizer), end)]), length)
    if not len(data[0]):
        raise ValueError(f"{file} does not fill one row of {length} tokens; give more data or a smaller --length")
    return data, digest


def digest_of_tokenizer(folder: Path) -> str:
    files = [folder / name for name in FILES if (folder / name).is_file()]
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


def rows_of_step(step: int, count: int, rows: int, seed: int) -> torch.Tensor:
    """The numbers [count] of the rows that step `step` takes of so many, each once in an epoch."""
    place = torch.arange(step * count, (step + 1) * count)
    order = {
        epoch: torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch))
        for epoch in set((place // rows).tolist())
    }
    return torch.stack([order[at // rows][at % rows] for at in place.tolist()])


# --- The model --------------------------------------------------------------------------------------------------------


def new_weights(config: GPTConfig, seed: int) -> dict:
    """Weights to start from, as GPT-2's: normal with deviation 0.02, what is added to the residual stream with less for
    more layers (Radford et al. 2019)."""
    generator, state_dict = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes_of(config).items():
        if len(shape) == 1:
            state_dict[name] = torch.full(shape, float(name.endswith("weight")))
        else:
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            deviation = 0.02 / (2 * config.n_layer) ** 0.5 if adds else 0.02
            state_dict[name] = torch.empty(shape).normal_(0, deviation, generator=generator)
    return state_dict


PARTS = {"qkv": ("q_proj", "k_proj", "v_proj"), "out": ("o_proj",), "gate_up": ("gate_proj", "up_proj")}
PARTS |= {"down": ("down_proj",)}  # of the fused matrices; the reference's are their own
PROJECTIONS = tuple(name for names in PARTS.values() for name in names)


class LoRALinear(nn.Module):
    """A frozen linear layer plus scale * up(down(x)) for each part of its rows that is trained.

    `parts` are (rows, whether they are trained), from the first row on. up is zero at first.
    """

    def __init__(self, base: nn.Linear, parts: list[tuple[int, bool]], rank: int, alpha: float):
        super().__init__()
        self.base, self.parts, self.scale = base, parts, alpha / rank
        new = {"dtype": base.weight.dtype, "device": base.weight.device}
        sizes = [rows for rows, trained in parts if trained]
        self.down = nn.ParameterList(torch.empty(rank, base.in_features, **new) for _ in sizes)
        self.up = nn.ParameterList(torch.empty(rows, rank, **new) for rows in sizes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """The numbers to start from, drawn on the CPU, so that they are the same on any device and number of ranks."""
        for down, up in zip(self.down, self.up, strict=True):
            put(down, torch.randn(down.shape) * len(down) ** -0.5)
            up.zero_()

    def forward(self, x):
        deltas, pairs = [], zip(self.down, self.up, strict=True)
        for rows, trained in self.parts:
            if trained:
                down, up = next(pairs)
                deltas.append(F.linear(F.linear(x, down), up))
            else:
                deltas.append(x.new_zeros(*x.shape[:-1], rows))
        return self.base(x) + self.scale * torch.cat(deltas, dim=-1)

    def gpu_weights(self):
        """No kernel takes this layer."""

    def cpu_weights(self, x):
        """No kernel takes this layer."""

    def merged(self) -> torch.Tensor:
        """The weight [N, K] of one linear layer that does the same, as `whole` gathers it."""
        weight, pairs, first = whole(self.base.weight).clone(), zip(self.down, self.up, strict=True), 0
        for rows, trained in self.parts:
            if trained:
                down, up = map(whole, next(pairs))
                weight[first : first + rows] += self.scale * up @ down
            first += rows
        return weight


def add_lora(model: nn.Module, rank: int, alpha: float, targets: list[str]) -> None:
    """Freeze the model but for LoRA beside each of the `targets` in PROJECTIONS. Raises ValueError if it lacks one."""
    config = model.config
    rows = {"q_proj": config.n_head * config.head_dim, "o_proj": config.dim, "down_proj": config.dim}
    rows |= dict.fromkeys(("k_proj", "v_proj"), config.n_kv_head * config.head_dim)
    rows |= dict.fromkeys(("gate_proj", "up_proj"), config.hidden_dim)
    model.requires_grad_(False)
    found = set()
    for name, linear in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        names = PARTS.get(child, (child,)) if isinstance(model, FastGPT) else (child,)
        names = [part for part in names if part != "gate_proj" or config.gated]
        if not set(names) & set(targets) or ".experts" in name:
            continue
        found |= set(names) & set(targets)
        parts = [(rows[part], part in targets) for part in names]
        setattr(model.get_submodule(parent), child, LoRALinear(linear, parts, rank, alpha))
    if missing := sorted(set(targets) - found):
        raise ValueError(f"the model has no {', '.join(missing)} for LoRA to train; take others of {PROJECTIONS}")


@torch.no_grad()
def weights_of(model: nn.Module) -> dict:
    """The weights in the reference's layout, LoRA merged. All ranks call this; see `checkpoint.whole`."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not adapted:
        return reference_state(model)
    state_dict = {}
    for name, tensor in model.state_dict().items():
        module = next((module for module in adapted if name.startswith(f"{module}.")), None)
        if module is None:
            state_dict[name] = whole(tensor)
        elif name.startswith(f"{module}.base."):
            kind = name.rpartition(".")[2]
            state_dict[f"{module}.{kind}"] = adapted[module].merged() if kind == "weight" else whole(tensor)
    return to_reference(state_dict, model.config) if isinstance(model, FastGPT) else state_dict


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.layers if isinstance(model, FastGPT) else model.transformer.h


def shard_layers(model: nn.Module, device: str) -> None:
    """Divide a model among the ranks, each layer by itself, and the rest."""
    layers, mesh = layers_of(model), init_device_mesh(device.partition(":")[0], rank_and_count()[1:])
    # The layer after it takes the weight of FastGPT's post_mlp, so this one belongs to the rest.
    lent = nn.ModuleList(layer.post_mlp for layer in layers if isinstance(model, FastGPT) and layer.post_mlp)
    for layer in layers:
        norm = layer.post_mlp
        if len(lent):
            layer.post_mlp = None
        fully_shard(layer, mesh=mesh)
        layer.post_mlp = norm
    model.lent = lent
    fully_shard(model, mesh=mesh)
    del model.lent
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # a view of logits, which nobody changes in place


def build_sharded(config: GPTConfig, state_dict: dict, args) -> nn.Module:
    """The model that `build_model` and `add_lora` would make, divided; a rank reads one tensor after the other."""
    reference = args.model == "reference"
    with torch.device("meta"):
        model = (GPT if reference else FastGPT)(config)
    model.requires_grad_(True)
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_alpha, args.lora_targets)
    shard_layers(model, args.device)
    model.to_empty(device=args.device)
    own = {name.replace(".base.", "."): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, tensor in state_dict.items() if reference else fuse(state_dict, config):
            put(own[name], tensor)
    torch.manual_seed(args.seed)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.reset_parameters()
    return model


class Loss(nn.Module):
    """The sum of the next tokens' cross-entropy, in one piece for DistributedDataParallel."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.cross_entropy = model, summed_cross_entropy

    def forward(self, ids, targets):
        """A number, for ids and targets [R, T]."""
        return self.cross_entropy(self.model(ids), targets)


def summed_cross_entropy(logits, targets):
    """A number, for logits [R, T, V] and targets [R, T]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def make_loss(model: nn.Module, compiled: bool, recompute: bool) -> Loss:
    """The loss of a model, of which this changes the layers: compiled, and computed again in the backward pass.

    Each layer is compiled by itself: that makes two graphs, however many layers there are, and `fully_shard` and
    `checkpoint` need it.
    """
    loss = Loss(model)
    compile = partial(torch.compile, fullgraph=isinstance(model, FastGPT), dynamic=False)
    for layer in layers_of(model):
        if compiled:
            layer.forward = compile(layer.forward)
        if recompute:  # a layer keeps its input alone (Chen et al. 2016, arXiv:1604.06174)
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if compiled:
        loss.cross_entropy = compile(loss.cross_entropy)
    return loss


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float, device: str):
    """AdamW (Loshchilov and Hutter 2017), in one kernel on a GPU; norms and biases do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=device.startswith("cuda"))


def learning_rate_at(step: int, steps: int, most: float, warmup: float) -> float:
    """Linear up to `most` over the first `warmup` share of the steps, then half a cosine down to a tenth."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return most * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return most * (0.55 + 0.45 * math.cos(math.pi * done))


# --- The run ----------------------------------------------------------------------------------------------------------

# What to say of settings whose values mean nothing to a reader.
DIGESTS = {"start": "other weights to start from, or another config", "data_digest": "other contents of --data"}
DIGESTS |= {"val_data_digest": "other contents of --val_data", "tokenizer_digest": "other files of the tokenizer"}


@torch.no_grad()
def mean_loss(loss, data, batch_size: int, device: str, autocast) -> float:
    """The mean over all tokens of (ids, targets) that count; each rank takes some of the batches."""
    (rank, ranks), total = rank_and_count(), 0.0
    missing = -len(data[0]) % (batch_size * ranks)  # so that each rank has as many batches, and the compiler one shape
    padded = [F.pad(part, (0, 0, 0, missing), value=value) for part, value in zip(data, (0, IGNORED), strict=True)]
    for ids, targets in list(zip(*(part.split(batch_size) for part in padded), strict=True))[rank::ranks]:
        with autocast():
            total += loss(ids.to(device).long(), targets.to(device).long()).item()
    return sum(objects_of_ranks(total)) / (data[1] != IGNORED).sum().item()


class Together(nn.Module):
    """A sharded model as `generate` takes one without a cache. All ranks compute, and go on with rank 0's logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.config, self.model = model.config, model

    def forward(self, ids):
        return from_rank_0(self.model(ids), rank_and_count()[1])


def sample_text(run) -> str:
    """What the model makes of the prompt, 60 tokens at most; a new model, because one in training has no cache.

    All ranks of a sharded model call this.
    """
    model, eager = run.model, torch.compiler.set_stance("force_eager")
    if isinstance(model, FSDPModule):  # a new one may not fit
        model, context = Together(model), run.autocast()
    else:
        model, context = build_model(model.config, weights_of(model), run.device, run.dtype), nullcontext()
    prompt = torch.tensor([run.prompt], device=run.device)
    with eager, context:
        new = generate(model, prompt, 60, Sampling(), eos_ids=run.tokenizer.eos_ids)
        return run.tokenizer.decode([row[0] for row in new])


def save_training(path: Path, model: nn.Module, optimizer, step: int, settings: dict) -> None:
    """Gather and write what a run continues from. All ranks call this, and rank 0 writes."""
    trained = {name: whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    state = optimizer.state_dict()
    moments = {number: {key: whole(t) for key, t in of_one.items()} for number, of_one in state["state"].items()}
    content = {"settings": settings, "step": step, "trained": trained, "optimizer": state | {"state": moments}}
    if rank_and_count()[0] == 0:
        with written_in_place(path) as temporary:
            torch.save(content, temporary)


def load_training(path: Path, model: nn.Module, optimizer, settings: dict) -> int:
    """Put the trained weights and the optimizer's state back; the number of steps done. Raises ValueError if the run
    was another one."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        was = content["settings"]
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged or of something else; give another --out_dir") from error
    for name, value in settings.items():
        if name not in was:
            raise ValueError(f"{path} was written by an earlier version, without {name}; give another --out_dir")
        if was[name] != value:
            message = DIGESTS.get(name, f"{name} = {was[name]}, not {value}")
            raise ValueError(f"{path} is of a run with {message}; give the same, or another --out_dir")
    parameters = dict(model.named_parameters())
    numbered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with torch.no_grad():
        for name, tensor in content["trained"].items():
            put(parameters[name], tensor)
        for number, state in content["optimizer"]["state"].items():
            for key, tensor in state.items():
                state[key] = torch.empty_like(numbered[number] if tensor.dim() else tensor)  # the step is a number
                put(state[key], tensor)
    optimizer.load_state_dict(content["optimizer"])
    return content["step"]


def check_numbers(args) -> None:
    """Raises ValueError that names the first flag whose number, nan among them, is not allowed."""
    most = 1e18  # products of two are in float32's range
    for name, allowed, need in (
        ("clip", args.clip > 0, "a number above 0, or inf for none"),
        ("learning_rate", 0 < args.learning_rate < most, "a number above 0, below 1e18"),
        ("weight_decay", 0 <= args.weight_decay < most, "a number from 0 on, below 1e18"),
        ("lora_rank", args.lora_rank >= 0, "a number from 0 on"),
        ("lora_alpha", 0 < args.lora_alpha < most, "a number above 0, below 1e18"),
        ("warmup", 0 <= args.warmup <= 1, "a share from 0 to 1"),
        ("seed", -(2**63) <= args.seed < 2**64 - 2**32, "a whole number of 64 bits"),
    ):
        if not allowed:
            raise ValueError(f"--{name} {getattr(args, name)} is not {need}; correct it")


def check_flags(args) -> None:
    """Raises ValueError or OSError for arguments that cannot be, before anything is read; fills in those of LoRA."""
    if (args.checkpoint_path is None) == (args.config is None):
        raise ValueError("give either --checkpoint_path or, to start from scratch, --config")
    if args.config and not args.config.is_file():
        raise FileNotFoundError(f"--config {args.config} is no file; give a Hugging Face config.json")
    of_lora = args.lora_alpha is not None or args.lora_targets is not None
    args.lora_alpha = 16.0 if args.lora_alpha is None else args.lora_alpha
    args.lora_targets = args.lora_targets or ["q_proj", "v_proj"]
    check_numbers(args)
    if of_lora and not args.lora_rank:
        raise ValueError("--lora_alpha and --lora_targets are for LoRA; add --lora_rank, or leave them out")
    if args.shard and not os.environ.get("WORLD_SIZE"):
        raise ValueError("--shard divides the model among ranks; start them with torchrun, or leave it out")
    check_device(args.device)
    training, model = args.out_dir / "training.pth", args.out_dir / "model.pth"
    if training.exists() and not args.resume:
        raise ValueError(f"{training} is there; give --resume to continue that run, or another --out_dir")
    if model.exists() and not training.exists():
        raise ValueError(f"{model} is there, and of no run that could continue; give another --out_dir")
    check_target(training)


def read_start(args) -> tuple[GPTConfig, dict]:
    """(config, weights to start from)."""
    if not args.checkpoint_path:
        config = config_from_hf(read_json(args.config))
        return config, new_weights(config, args.seed)
    config, state_dict = read_checkpoint(args.checkpoint_path)
    if describe_quantization(state_dict):
        raise ValueError(f"{args.checkpoint_path} is quantized; train the model.pth that it was made from")
    return config, state_dict


def split_data(args, tokenizer, length: int):
    """(rows, held-out rows, digests of the files by their settings' names), rows as (ids, targets), each [R, T]."""
    rows, digest = read_data(args.data, tokenizer, length)
    if args.val_data:
        held_out, val_digest = read_data(args.val_data, tokenizer, length)
    else:  # a twentieth, but not so many that evaluating takes longer than training
        keep, val_digest = len(rows[0]) - max(1, min(len(rows[0]) // 20, 200)), None
        if not keep:
            needs = f"fills one row of {length} tokens, and the validation needs another"
            raise ValueError(f"{args.data} {needs}; see --val_data")
        rows, held_out = tuple(part[:keep] for part in rows), tuple(part[keep:] for part in rows)
    return rows, held_out, {"data_digest": digest, "val_data_digest": val_digest}


def encode_sample(text: str, tokenizer, chat: bool, context: int) -> list[int]:
    """The ids of a prompt. Raises ValueError if it is none for this model."""
    check_characters(text, "--sample")
    if chat:
        ids = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": text}]), bos=False)
    else:
        ids = tokenizer.encode(text)
    check_length(len(ids), context, "--sample")
    return ids


@dataclass
class Run:
    """What is trained, on what, and how."""

    config: GPTConfig
    tokenizer: object
    rows: tuple  # (ids, targets), each int32 [R, T]
    held_out: tuple
    prompt: list[int] | None  # of --sample
    settings: dict  # what decides the weights; a run continues with the same alone
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    parallel: nn.Module  # the loss, or what averages its gradients among ranks that each have the whole model
    device: str
    dtype: torch.dtype  # of the products

    def autocast(self):
        kind = self.device.partition(":")[0]
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(kind, self.dtype, cache_enabled=False)  # a cache would hold the whole model in bfloat16


# Arguments that decide what is learned.
DECISIVE = ("steps", "learning_rate", "warmup", "weight_decay", "clip", "seed", "model", "lora_rank", "lora_alpha")


def make_model(args, config: GPTConfig, state_dict: dict) -> nn.Module:
    """The model to train, its weights in float32."""
    if args.shard and rank_and_count()[1] > 1:
        return build_sharded(config, state_dict, args).train()
    model = build_model(config, state_dict, args.device, torch.float32, reference=args.model == "reference")
    model.train().requires_grad_(True)
    if args.lora_rank:
        torch.manual_seed(args.seed)
        add_lora(model, args.lora_rank, args.lora_alpha, args.lora_targets)
    return model


def make_run(args) -> Run:
    """Raises ValueError or OSError, before anything is written, if something is not as it has to be."""
    config, state_dict = read_start(args)
    folder = (args.checkpoint_path or args.config).parent
    tokenizer = find_tokenizer(folder, config.vocab_size, needed=True)
    length = args.length or min(1024, config.block_size)
    if length > config.block_size:
        raise ValueError(f"--length {length} is more than the context of {config.block_size}; give less")
    rows, held_out, digests = split_data(args, tokenizer, length)
    prompt = None
    if args.sample is not None:
        chat = any(IGNORED in part for part in (rows[1], held_out[1]))
        prompt = encode_sample(args.sample, tokenizer, chat, config.block_size)
    model = make_model(args, config, state_dict)
    loss, ranks = make_loss(model, args.compile, args.recompute), rank_and_count()[1]
    copied = ranks > 1 and not isinstance(model, FSDPModule)  # the whole model on each rank
    start = {"start": fingerprint(config, state_dict), "tokenizer_digest": digest_of_tokenizer(folder)}
    more = {"length": length, "lora_targets": args.lora_targets if args.lora_rank else []}
    more |= {"batch_size x accumulate x ranks": args.batch_size * args.accumulate * ranks}
    return Run(
        config=config,
        tokenizer=tokenizer,
        rows=rows,
        held_out=held_out,
        prompt=prompt,
        settings=start | digests | {name: getattr(args, name) for name in DECISIVE} | more,
        model=model,
        optimizer=make_optimizer(model, args.learning_rate, args.weight_decay, args.device),
        loss=loss,
        parallel=DistributedDataParallel(loss) if copied else loss,
        device=args.device,
        dtype=choose_precision(args.precision, args.device),
    )


def choose_precision(precision: str | None, device: str) -> torch.dtype:
    """The dtype of products: what was asked for, else bfloat16 where the device has instructions for it."""
    has_bf16 = device.startswith("cuda") or (device == "cpu" and cpu_kernels.has_bf16_instructions())
    if precision == "bfloat16" and device == "cpu" and not has_bf16:
        say("this processor has no instructions for bfloat16; --precision float32 is several times as fast")
    return DTYPES[precision or ("bfloat16" if has_bf16 else "float32")]


def prepare_folder(args) -> None:
    """Make --out_dir, without what a killed run left half-written, and with the tokenizer's files."""
    folder, out = (args.checkpoint_path or args.config).parent, args.out_dir
    out.mkdir(parents=True, exist_ok=True)
    if rank_and_count()[0] > 0:
        return
    for left in out.glob(".*.pth.*.tmp"):
        left.unlink()
    for name in FILES if out.resolve() != folder.resolve() else ():
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def diverged(what: str, args) -> FloatingPointError:
    kept = f"; {args.out_dir} keeps the last checkpoint" if (args.out_dir / "model.pth").exists() else ""
    remedy = f"start again with a --learning_rate below {args.learning_rate:g}, in another --out_dir"
    return FloatingPointError(f"{what} is not finite, so training has diverged; {remedy}{kept}")


def evaluate(args, run: Run, step: int) -> None:
    """Print the validation loss. Raises FloatingPointError, on all ranks, if it or a weight is not finite."""
    bad, when = None, f"after step {step}" if step else "before the first step"
    validation_loss = mean_loss(run.loss, run.held_out, args.batch_size, run.device, run.autocast)
    weights = weights_of(run.model)
    if rank_and_count()[0] == 0:
        if name := next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None):
            bad = f"{name} {when}"
        elif not math.isfinite(validation_loss):
            bad = f"the validation loss {when}"
    del weights
    bad = objects_of_ranks(bad)[0]
    if bad and not step:
        raise FloatingPointError(f"{bad} is not finite; convert the model again, or give --precision float32")
    if bad:
        raise diverged(bad, args)
    write0(f"step {step}: validation loss {validation_loss:.4f}")
    if run.prompt is not None and (isinstance(run.model, FSDPModule) or rank_and_count()[0] == 0):
        try:
            text = repr(sample_text(run))
        except FloatingPointError as error:  # in bfloat16, of weights that are worth saving
            text = str(error)
        write0(f"  {args.sample!r} -> {text}")


def write0(line: str) -> None:
    """Print a line above rank 0's progress bar."""
    if rank_and_count()[0] == 0:
        tqdm.write(line)


def take_step(args, run: Run, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(this rank's part of the loss, the norm of all gradients), numbers on the device."""
    (rank, ranks), rows, of_rank = rank_and_count(), run.rows, args.batch_size * args.accumulate
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate_at(step, args.steps, args.learning_rate, args.warmup)
    chosen = rows_of_step(step, of_rank * ranks, len(rows[0]), args.seed)
    counting = (rows[1][chosen] != IGNORED).sum().item()  # of all ranks
    total = torch.zeros((), device=run.device)
    batches = chosen[rank * of_rank : (rank + 1) * of_rank].split(args.batch_size)
    for i, batch in enumerate(batches):
        ids, targets = (part[batch].to(run.device).long() for part in rows)
        # Sharded gradients are summed after each batch: those of the whole model may not fit.
        copied = isinstance(run.parallel, DistributedDataParallel)
        waits = run.parallel.no_sync() if copied and i < len(batches) - 1 else nullcontext()
        with waits:
            with run.autocast():
                part = run.parallel(ids, targets) * (ranks / counting)  # the ranks' gradients are averaged
            part.backward()
        total += part.detach()
    norm = nn.utils.clip_grad_norm_((p for p in run.model.parameters() if p.requires_grad), args.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return total, norm.full_tensor() if isinstance(run.model, FSDPModule) else norm


def train(args, run: Run, first: int) -> None:
    """Take the steps from number `first` on, and evaluate and save after some of them."""
    (rank, ranks), steps = rank_and_count(), args.steps
    worst = torch.full((), steps, device=run.device)  # the first step whose loss or gradient norm is not finite
    with tqdm(total=steps, initial=first, unit="step", disable=None if rank == 0 else True) as bar:
        if first == 0:
            evaluate(args, run, 0)
        for step in range(first, steps):
            loss, norm = take_step(args, run, step)
            worst = torch.where(loss.isfinite() & norm.isfinite(), worst, worst.clamp(max=step))
            bar.update()
            saves = (step + 1) % args.every == 0 or step == steps - 1
            if saves or step % 10 == 9:
                losses, bad = zip(*objects_of_ranks((loss.item(), worst.item())), strict=True)
                if min(bad) < steps:
                    raise diverged(f"the loss or the gradient norm of step {min(bad) + 1}", args)
                bar.set_postfix(loss=f"{sum(losses) / ranks:.4f}")
            if saves:
                evaluate(args, run, step + 1)
                save_training(args.out_dir / "training.pth", run.model, run.optimizer, step + 1, run.settings)
                save_model(args.out_dir / "model.pth", run)


def save_model(path: Path, run: Run) -> None:
    """All ranks call this, and rank 0 writes."""
    weights = weights_of(run.model)
    if rank_and_count()[0] == 0:
        write_checkpoint(path, run.config, weights)


def main(args) -> None:
    check_flags(args)
    run, training, out = make_run(args), args.out_dir / "training.pth", args.out_dir / "model.pth"
    first = load_training(training, run.model, run.optimizer, run.settings) if training.exists() else 0
    check_agreement(run.settings | {"number of steps done": first})
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    count, length = run.rows[0].shape
    print0(f"{parameters:,} parameters to train, {count:,} rows of {length} tokens, {len(run.held_out[0]):,} held out")
    prepare_folder(args)
    train(args, run, first)
    if first == args.steps:  # it may have been killed in between
        save_model(out, run)
    print0(f"wrote {out}, trained for {args.steps} steps")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train a model on text or conversations.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, help="a model.pth that is not quantized, its tokenizer beside it")
    add("--config", type=Path, help="instead: a Hugging Face config.json, a tokenizer beside it, for new weights")
    add(
        "--data",
        type=Path,
        required=True,
        help='a text, or if it begins with {" or [{" rows of JSON: "text" or "messages"',
    )
    add("--val_data", type=Path, help="such a file, held out; default: the last rows, a twentieth, at most 200")
    add("--out_dir", type=Path, required=True, help="for model.pth, training.pth and the tokenizer's files")
    add("--model", choices=("reference", "fast"), default="fast", help="the twin that is trained")
    add("--compile", action="store_true", help="compile the step's forward and backward pass")
    add("--shard", action="store_true", help="divide weights, gradients and AdamW's states among torchrun's ranks")
    help = "keep the inputs of layers alone for the backward pass, and compute layers again: a third more work"
    add("--recompute", action="store_true", help=help)
    add("--steps", type=positive, default=1000)
    add("--batch_size", type=positive, default=8, help="rows at a time, on each rank")
    add("--accumulate", type=positive, default=1, help="batches of a step")
    add("--length", type=positive, help="tokens of a row; default: 1024 or the context")
    add("--learning_rate", type=float, default=3e-4, help="the highest, after the warm-up; a cosine to a tenth follows")
    add("--warmup", type=float, default=0.05, help="the share of the steps in which it rises")
    add("--weight_decay", type=float, default=0.1)
    add("--clip", type=float, default=1.0, help="the largest norm of all gradients; inf: any")
    add("--every", type=positive, default=100, help="steps between two evaluations, each of which saves")
    add("--sample", metavar="TEXT", help="a prompt that the model continues, or answers, at each evaluation")
    add("--lora_rank", type=int, default=0, help="0: all weights are trained")
    add("--lora_alpha", type=float, help="LoRA adds alpha / rank times its product; default: 16")
    add("--lora_targets", nargs="+", choices=PROJECTIONS, help="default: q_proj v_proj")
    help = "of the products; default: bfloat16 where the device has instructions for it, else float32"
    add("--precision", choices=("float32", "bfloat16"), help=help)
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, mps")
    add("--seed", type=int, default=1234)
    add("--resume", action="store_true", help="continue from what --out_dir has, if there is something")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main, parse_arguments(), splits=True)
