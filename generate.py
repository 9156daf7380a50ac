"""Text from a checkpoint: sampling, the `generate()` loop, and below them the command line.

Decisions to know:

- `generate()` yields token ids and does nothing else: no tokenizer, no clock, no printing. Both models fit it.
- Random numbers come from one torch.Generator a row and enter the decode step as a tensor: the same seed draws the
  same numbers eager and compiled, a row of a batch draws those it draws alone, no global random state is touched.
- Prompts of different lengths are padded on the right. No token sees the padding: each attends to slots up to its own
  position, and a row's new tokens overwrite the padded slots before they come into view.
- The compiled decode step is a value that is passed along. Prefill is eager unless `--compile_prefill`.
- On a GPU the host runs ahead of the device by a few tokens and reads them in groups, so that no step waits for it.
- Text goes to stdout, the figures of the run to stderr.

Copy me: needs torch, and `model.py`, `fast_model.py`, `quantize.py`, `checkpoint.py` and `tokenizer.py` beside it, with
its libraries; for speed on a GPU `gpu_kernels.py` too.

Shapes: B batch rows, T prompt tokens, V vocabulary.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch

from checkpoint import DTYPES, build_model, describe_quantization, quantize_model, read_checkpoint, written_in_place
from quantize import GROUP_SIZES
from tokenizer import load_tokenizer

# --- Sampling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token. Raises ValueError outside these ranges."""

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:  # `not` because of NaN
            raise ValueError(f"temperature and top_k must be 0 or more and top_p above 0 and at most 1, not {self}")


def to_probabilities(logits, sampling: Sampling):
    """Probabilities [B, V] in float32 after temperature, then top-k, then top-p (Holtzman et al. 2020)."""
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        descending = probabilities.sort(-1, descending=True).values
        before = descending.cumsum(-1) - descending  # mass of all likelier tokens; the first has none, so it stays
        smallest = descending.masked_fill(before >= sampling.top_p, float("inf")).amin(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < smallest, 0)
    return probabilities  # not normalized after top-p: nothing below depends on their sum


def sample(logits, noise, sampling: Sampling):
    """One id per row, [B, 1], of logits [B, V]. `noise` [B, V] is Exp(1): argmax(p / noise) has distribution p."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return (to_probabilities(logits, sampling) / noise).argmax(-1, keepdim=True)


# --- Generation -------------------------------------------------------------------------------------------------------


def prefill(model, prompt, input_pos, last):
    """Logits [B, V] that follow the tokens at the indices `last` [B] of the prompt [B, T]; fills the cache."""
    return model(prompt, input_pos, last)[:, 0]


def decode_step(model, token, input_pos, noise, sampling: Sampling):
    """The token [B, 1] after `token` [B, 1], which stands at `input_pos` [B, 1], and its own position."""
    logits = model(token, input_pos)[:, -1]
    following = (input_pos + 1).clamp(max=model.max_seq_length - 1)  # a row that has ended is computed with the others
    return sample(logits, noise, sampling), following


def compile_options(device: str) -> dict:
    """Options of torch.compile for a decode step; on a GPU it is tuned for reading speed and replayed as CUDA graph.

    On a CPU the compiler would compute a norm again for each row of the weights after it (SmolLM2 in bfloat16: 56
    tokens/s instead of 71, benchmarks/log.md).
    """
    if device.startswith("cuda"):
        return {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    return {"realize_opcount_threshold": 6}


def compiled_prefill(prefill=prefill):
    """`prefill` as one compiled graph for prompts of any length; a single token gets a graph of its own."""
    compiled = torch.compile(prefill, fullgraph=True)

    def run(model, prompt, input_pos, last):
        for ids in (prompt, input_pos):  # not dynamic=True: it would make numbers such as norm_eps dynamic too
            if ids is not None and ids.shape[1] > 1:
                torch._dynamo.mark_dynamic(ids, 1)
        return compiled(model, prompt, input_pos, last)

    return run


def _tokens_of_reference(model, prompt, lengths, new_noise, sampling):
    (B, T), context = prompt.shape, model.config.block_size
    row = torch.arange(B, device=prompt.device)
    ids = torch.nn.functional.pad(prompt, (0, context - T))
    for end in count(T):
        token = sample(model(ids[:, : min(end, context)])[row, lengths - 1], new_noise(), sampling)
        yield token
        ids[row, lengths.clamp(max=context - 1)] = token[:, 0]
        lengths = (lengths + 1).clamp(max=context)


def _tokens_of_fast(model, prompt, lengths, new_noise, sampling, cached, prefill, decode_step):
    B, T = prompt.shape
    input_pos = torch.arange(cached, T, device=prompt.device).expand(B, -1) if cached else None
    token = sample(prefill(model, prompt[:, cached:], input_pos, lengths - cached - 1), new_noise(), sampling)
    yield token
    input_pos = lengths[:, None].clamp(max=model.max_seq_length - 1)
    while True:
        token, input_pos = decode_step(model, token, input_pos, new_noise(), sampling)
        token, input_pos = token.clone(), input_pos.clone()  # the next replay of a CUDA graph overwrites its outputs
        yield token


def _to_host(tokens, on_gpu: bool):
    """The ids of each tensor [B, 1], as lists. On a GPU they are copied in groups, while the next group is queued."""
    group = list(islice(tokens, 1))  # the first one alone: somebody is waiting for it
    while group:
        ids = torch.cat(group, dim=1).T.to("cpu", non_blocking=True)  # [group, B]
        following = []
        if on_gpu:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(group[0].device))  # of cuda:1, too
            following = list(islice(tokens, 8)) if len(group) > 1 else []
            copied.synchronize()
        yield from ids.tolist()
        group = following or list(islice(tokens, 8 if on_gpu else 1))


def check_length(tokens: int, context: int, name: str = "the prompt") -> None:
    if tokens == 0:
        raise ValueError(f"{name} is empty; give at least one token")
    if tokens > context:
        raise ValueError(f"{name} has {tokens} tokens, more than the context of {context}; shorten it")


def cache_slots(tokens: int, config) -> int:
    """Slots for so many tokens, rounded up to a multiple of 256: kernels are compiled for a number of slots."""
    return min(-(-tokens // 256) * 256, config.block_size)


@torch.no_grad()
def generate(
    model,
    prompt: torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eos_ids=(),
    seed: int = 0,
    cached: int = 0,
    prefill=prefill,
    decode_step=decode_step,
    lengths: list[int] | None = None,
) -> Iterator[list[int | None]]:
    """Continue the ids `prompt` [B, T]; yields the next id of each row, as a list of B.

    Row r is the first `lengths[r]` of its ids, by default all T; what follows is not seen. It draws from the seed
    `seed` + r, as it would alone with it. It ends with the first of `eos_ids`, which is yielded, or when its context
    is full, and is None from then on; the iteration ends when all rows have. `cached` leading tokens of each row are
    taken to be in the model's cache already. `model` is a FastGPT or a GPT; `prefill` and `decode_step` may be
    compiled versions. Raises ValueError, at the first token, if the prompt is empty, too long, or not of this
    vocabulary.
    """
    B, T = prompt.shape
    config, device = model.config, prompt.device
    check_length(T, config.block_size)
    lengths = [T] * B if lengths is None else lengths
    if len(lengths) != B or not 1 <= min(lengths) <= max(lengths) <= T:
        raise ValueError(f"the lengths {lengths} do not fit {B} prompts of up to {T} tokens; give one of 1 to {T} each")
    if not 0 <= cached < min(lengths):
        shortest = min(lengths)
        raise ValueError(f"{cached} tokens cannot be cached of a prompt of {shortest}; the last one has to be computed")
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        raise ValueError(f"the prompt has ids outside the vocabulary of {config.vocab_size}; use its own tokenizer")
    # The last token needs no slot: nothing comes after it.
    new = [min(max_new_tokens, config.block_size - length + 1) for length in lengths]
    generators = [torch.Generator(device).manual_seed(seed + row) for row in range(B)]

    def new_noise():
        if sampling.temperature == 0:
            return None
        noise = torch.empty(B, config.vocab_size, device=device)
        for row, generator in zip(noise, generators, strict=True):
            row.exponential_(generator=generator)
        return noise

    ends = torch.tensor(lengths, device=device)
    if hasattr(model, "setup_caches"):
        slots = min(T + max_new_tokens - 1, config.block_size)
        if slots > model.max_seq_length or B > model.max_batch_size:
            model.setup_caches(B, cache_slots(slots, config))
            cached = 0  # the new cache is empty
        tokens = _tokens_of_fast(model, prompt, ends, new_noise, sampling, cached, prefill, decode_step)
    else:
        tokens = _tokens_of_reference(model, prompt, ends, new_noise, sampling)

    running = [True] * B
    for done, ids in enumerate(_to_host(islice(tokens, max(new)), on_gpu=device.type == "cuda"), start=1):
        yield [id if run else None for id, run in zip(ids, running, strict=True)]
        running = [run and id not in eos_ids and done < n for id, run, n in zip(ids, running, new, strict=True)]
        if not any(running):
            return


# --- The command line -------------------------------------------------------------------------------------------------


class Answer:
    """One row's ids and text as they grow; text that may turn out to begin a stop string is held back.

    `stop_reason` is None, then "eos", "stop" (a stop string) or "length" (max_new_tokens, or the context is full).
    """

    def __init__(self, prompt_ids, tokenizer, eos_ids, stop, goes_on: bool):
        self.prompt_ids, self.token_ids, self.stop_reason = prompt_ids, [], None
        self.stream, self.text = (tokenizer.stream(), "") if tokenizer else (None, None)
        for id in prompt_ids if self.stream and goes_on else ():
            self.stream.push(id)  # a text that goes on keeps its first space; a chat's answer begins without
        self.eos_ids, self.stop, self.shown = eos_ids, stop, 0

    def push(self, id: int) -> str:
        """Take the next id; returns the text that can be shown now."""
        self.token_ids.append(id)
        if id in self.eos_ids:
            self.stop_reason = "eos"
        elif self.stream:
            self.text += self.stream.push(id)
        return self._show()

    def finish(self) -> str:
        """No id follows; returns the rest of the text."""
        if self.stream and self.stop_reason != "stop":
            self.text += self.stream.finish()
        self.stop_reason = self.stop_reason or "length"
        return self._show()

    def _show(self) -> str:
        if self.text is None:
            return ""
        found = [at for at in (self.text.find(s, max(0, self.shown - len(s))) for s in self.stop) if at >= 0]
        if found:
            self.text, self.stop_reason = self.text[: min(found)], "stop"
        end = len(self.text)
        if self.stop_reason is None:
            held = [n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n])]
            end -= max(held, default=0)
        piece, self.shown = self.text[self.shown : end], max(self.shown, end)
        return piece


INTERACTIVE_SLOTS = 2048


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def default_dtype(device: str, state_dict: dict) -> torch.dtype:
    """The checkpoint's own; on a CPU float32, which agrees with the reference to the last digits (bfloat16 is faster).

    With int4 weights it is bfloat16 on a CPU: PyTorch has its fast product for that dtype alone.
    """
    if device != "cpu":
        return state_dict["transformer.wte.weight"].dtype
    quantization = describe_quantization(state_dict)
    return torch.bfloat16 if quantization and quantization["mode"] == "int4" else torch.float32


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raises ValueError if this machine has no such device."""
    try:
        torch.empty(1, device=device).item()  # of "meta" there is nothing to read
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise ValueError(f"there is no device {device!r} on this machine; the default is {default_device()}") from error


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def read_bandwidth(device: str) -> float:
    """Bytes per second at which this device reads its memory: the best of some sums over 256 MB, on a GPU 4 GB."""
    on_gpu = device.startswith("cuda")
    data = torch.ones(min(2**30, torch.cuda.mem_get_info(device)[0] // 8) if on_gpu else 2**26, device=device)
    seconds = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        data.sum()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    size = data.nbytes
    if on_gpu:  # none of this belongs to the model's peak
        del data
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return size / min(seconds)


def bytes_per_step(model) -> int:
    """Bytes a decode step reads: the weights, of an embedding that is only looked up nothing, and the whole cache."""
    config = model.config
    looked_up = {"wpe.weight"} if config.tie_embeddings else {"wte.weight", "wpe.weight"}
    weights = sum(
        tensor.nbytes
        for name, tensor in model.state_dict().items()
        if name.removeprefix("transformer.") not in looked_up
    )
    return weights + sum(b.nbytes for name, b in model.named_buffers() if name.endswith("_cache"))


def peak_memory(device: str) -> int:
    """Bytes: of the allocator on an NVIDIA GPU, of this process on a CPU; on Apple's what is allocated now."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if device == "mps":
        return torch.mps.driver_allocated_memory()
    import resource  # not on Windows

    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else rss * 1024


def compiler_cache_hits() -> int:
    counters = torch._dynamo.utils.counters
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def pad(rows: list[list[int]], device: str) -> tuple[torch.Tensor, list[int]]:
    """The rows' ids [B, T], padded on the right with 0, and the length of each."""
    prompt = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return prompt.to(device), [len(row) for row in rows]


def warm_up(model, rows, max_new_tokens: int, sampling, steps: dict, device: str) -> dict:
    """Take the first steps, so that no figure of the run contains compilation or lazy loading; their time and kind."""
    if steps:
        say("compiling the model into kernels for this machine; the next run finds them in the compiler's cache")
    start, hits = time.perf_counter(), compiler_cache_hits()
    prompt, lengths = pad(rows, device)
    for _ in generate(model, prompt, min(max_new_tokens, 3), sampling, **steps, lengths=lengths):
        pass
    seconds, kind = time.perf_counter() - start, "from cache" if compiler_cache_hits() > hits else "cold"
    if steps:
        say(f"compiled in {seconds:.1f} s ({kind})")
        return {"compile_seconds": seconds, "compile_kind": kind}
    return {}


def find_tokenizer(folder: Path, vocab_size: int, needed: bool):
    """The folder's tokenizer, or None if there is none and none is needed. Raises ValueError if it does not fit."""
    try:
        tokenizer = load_tokenizer(folder)
    except FileNotFoundError:
        if needed:
            raise
        return None
    if tokenizer.vocab_size > vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, the model {vocab_size}"
        raise ValueError(f"the tokenizer in {folder} has {sizes}; put the model's own tokenizer there")
    return tokenizer


def synthetic_prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def read_prompts(file: Path) -> dict[str, str]:
    """The lines that are not blank, by their names in messages. Raises ValueError if there is none, or no UTF-8."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    lines = text.split("\n")  # splitlines() would also split at U+2028 and form feeds
    prompts = {f"line {number} of {file}": line for number, line in enumerate(lines, 1) if line.strip()}
    if not prompts:
        raise ValueError(f"{file} has no prompt; write one a line")
    return prompts


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def run_once(model, answers, cached, max_new_tokens, sampling, seed, steps, device, show) -> dict:
    """Fill the answers, one a batch row, and return the figures. `show` gets the first row's text as it comes."""
    prompt, lengths = pad([answer.prompt_ids for answer in answers], device)
    eos_ids = answers[0].eos_ids
    times = []
    start = time.perf_counter()
    for ids in generate(model, prompt, max_new_tokens, sampling, eos_ids, seed, cached, **steps, lengths=lengths):
        times.append(time.perf_counter() - start)
        for answer, id in zip(answers, ids, strict=True):
            if answer.stop_reason is None and id is not None:
                piece = answer.push(id)
                if answer is answers[0]:
                    show(piece)
        if all(answer.stop_reason or id is None for answer, id in zip(answers, ids, strict=True)):
            break
    for answer in answers:
        rest = answer.finish()
        if answer is answers[0]:
            show(rest)
    rows, steps_taken, seconds = len(answers), len(times) - 1, times[-1] - times[0]
    decoded = sum(len(answer.token_ids) for answer in answers) - rows  # the first of each row belongs to the prefill
    return {
        "prompt_tokens": sum(lengths),
        "cached_tokens": cached,
        "time_to_first_token_seconds": times[0],
        "prefill_tokens_per_second": (sum(lengths) - cached * rows) / times[0],
        "decode_steps": steps_taken,
        "decode_steps_per_second": steps_taken / seconds if steps_taken else None,
        "decode_tokens_per_second": decoded / seconds if steps_taken else None,
    }


def report(run: dict, step_bytes: int, bandwidth: float) -> None:
    """Print the figures of one run. The README says what each one means."""
    milliseconds = run["time_to_first_token_seconds"] * 1e3
    fresh = run["prompt_tokens"] - run["cached_tokens"]
    say(f"prefill: {fresh} tokens, {run['prefill_tokens_per_second']:.1f} tokens/s, {milliseconds:.0f} ms to the first")
    if run["decode_steps"]:
        used = step_bytes * run["decode_steps_per_second"]
        say(
            f"decode:  {run['decode_steps']} steps, {run['decode_tokens_per_second']:.2f} tokens/s, "
            f"{step_bytes / 1e6:.0f} MB read a step: {used / 1e9:.1f} GB/s, "
            f"{used / bandwidth:.0%} of the {bandwidth / 1e9:.1f} GB/s measured here"
        )


def main(
    checkpoint_path: Path,
    prompt: str | None,
    prompt_file: Path | None,
    interactive: bool,
    chat: bool,
    num_samples: int,
    max_new_tokens: int,
    batch_size: int,
    max_seq_length: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop: list[str],
    ignore_eos: bool,
    compile: bool,
    compile_prefill: bool,
    reference: bool,
    kv_cache: str | None,
    device: str,
    precision: str | None,
    quantize: str | None,
    group_size: int,
    profile: Path | None,
    json_path: Path | None,
) -> None:
    sampling = Sampling(temperature, top_k, top_p)
    if reference and (compile or compile_prefill):
        raise ValueError("--reference runs model.py, which is not compiled; leave out --compile")
    if reference and kv_cache:
        raise ValueError("--reference runs model.py, which has no cache; leave out --kv_cache")
    if interactive and batch_size > 1:
        raise ValueError("--interactive holds one conversation; leave out --batch_size")
    if prompt_file and (prompt is not None or interactive or batch_size > 1):
        raise ValueError("--prompt_file gives every row its prompt; leave out --prompt, --interactive and --batch_size")
    if "" in stop:
        raise ValueError("--stop needs strings of at least one character")
    check_device(device)
    prompt = "Hello, my name is" if prompt is None else prompt
    prompts = read_prompts(prompt_file) if prompt_file else {"the prompt": prompt}
    config, state_dict = read_checkpoint(checkpoint_path)
    bandwidth = read_bandwidth(device)
    start = time.perf_counter()
    if quantize:
        config, state_dict = quantize_model(config, state_dict, quantize, group_size)
    dtype = DTYPES[precision] if precision else default_dtype(device, state_dict)
    model = build_model(config, state_dict, device, dtype, reference)
    synchronize(device)
    load_seconds = time.perf_counter() - start

    synthetic = prompt.isdecimal() and not interactive and not prompt_file
    tokenizer = find_tokenizer(checkpoint_path.parent, config.vocab_size, needed=not synthetic)
    eos_ids = tokenizer.eos_ids if tokenizer and not ignore_eos else frozenset()

    def encode(messages: list[dict]) -> list[int]:
        try:
            messages[-1]["content"].encode()
        except UnicodeEncodeError as error:  # bytes from the terminal that are no UTF-8
            raise ValueError(f"the prompt is not UTF-8: {error}") from error
        if chat:
            return tokenizer.encode(tokenizer.render_chat(messages), bos=False)
        return tokenizer.encode(messages[-1]["content"])

    if chat and tokenizer:
        tokenizer.chat_template()  # raises ValueError if there is none, before a session begins

    def check_room(tokens: int, name: str) -> None:
        check_length(tokens, config.block_size, name)
        if tokens > slots:
            raise ValueError(f"{name} has {tokens} tokens, the cache {slots} slots; give a larger --max_seq_length")

    if interactive:
        rows = [synthetic_prompt(8, config.vocab_size, seed)]  # to warm up with
    elif synthetic:
        check_length(int(prompt), config.block_size)
        rows = [synthetic_prompt(int(prompt), config.vocab_size, seed)] * batch_size
    else:
        rows = [encode([{"role": "user", "content": text}]) for text in prompts.values()] * batch_size
    slots = max_seq_length or (INTERACTIVE_SLOTS if interactive else max(map(len, rows)) + max_new_tokens - 1)
    slots = cache_slots(slots, config)
    for name, ids in zip(prompts, rows, strict=False):  # with --batch_size the rows are alike
        check_room(len(ids), name)

    warnings.filterwarnings("ignore", message="\\s*Online softmax")  # a remark of the compiler's about top-k sampling
    figures = {"load_seconds": load_seconds}
    steps = {}
    if compile:
        steps["decode_step"] = torch.compile(
            decode_step, fullgraph=True, dynamic=False, options=compile_options(device)
        )
    if compile_prefill:
        steps["prefill"] = compiled_prefill()
    if not reference:
        model.int8_cache = kv_cache == "int8"
        model.setup_caches(len(rows), slots)
    figures |= warm_up(model, rows, max_new_tokens, sampling, steps, device)
    step_bytes = bytes_per_step(model)

    def show(text: str) -> None:
        if not prompt_file:  # whose rows are all printed at the end
            print(text, end="", flush=True)

    messages, samples, runs, in_cache = [], [], [], []
    with torch.profiler.profile() if profile else nullcontext() as profiler:
        while interactive or len(runs) < num_samples:
            if interactive:
                try:
                    messages.append({"role": "user", "content": input("> ")})
                except EOFError:
                    break
                try:
                    rows = [encode(messages)]
                    check_room(len(rows[0]), "the prompt")
                except ValueError as error:  # the session goes on
                    say(f"error: {error}")
                    messages.pop()
                    continue
            elif not chat and not synthetic:
                show(prompt)
            cached = 0 if reference else common_prefix(in_cache, rows[0][:-1])
            answers = [Answer(ids, tokenizer, eos_ids, stop, goes_on=not chat) for ids in rows]
            new = max_new_tokens
            if slots < config.block_size:  # else generate() ends each row at its own last slot
                new = min(new, slots - max(map(len, rows)) + 1)
            first_seed = seed + len(rows) * len(runs)  # row r has the seed first_seed + r
            runs.append(run_once(model, answers, cached, new, sampling, first_seed, steps, device, show))
            show("\n")
            texts = prompts.values() if prompt_file and not chat else [""] * len(rows)
            for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
                if row > 0 or prompt_file:
                    print(f"[row {row}] {text}{answer.text}")
            report(runs[-1], step_bytes, bandwidth)
            samples += answers
            if interactive:  # what the cache holds now; the last token was never fed
                in_cache = rows[0] + answers[0].token_ids[:-1]
                messages.append({"role": "assistant", "content": answers[0].text})

    if profile:
        with written_in_place(profile) as temporary:  # the profiler only logs what it could not write
            profiler.export_chrome_trace(str(temporary))
    figures |= {"peak_memory_bytes": peak_memory(device), "bytes_per_step": step_bytes}
    figures |= {"read_bandwidth_bytes_per_second": bandwidth}
    say(f"memory:  {figures['peak_memory_bytes'] / 1e9:.2f} GB at most, loaded in {load_seconds:.1f} s")
    rates = [run["decode_tokens_per_second"] for run in runs if run["decode_tokens_per_second"]]
    if len(rates) > 1:
        say(f"median:  {statistics.median(rates):.2f} tokens/s, from {min(rates):.2f} to {max(rates):.2f}")
    if json_path:
        setting = {"device": device, "precision": str(dtype).removeprefix("torch."), "torch": torch.__version__}
        names = ("prompt_ids", "token_ids", "text", "stop_reason")
        entries = [{name: getattr(answer, name) for name in names} for answer in samples]
        with written_in_place(json_path) as temporary:
            temporary.write_text(json.dumps({"samples": entries, "runs": runs, **figures, **setting}, indent=1))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Generate text from a checkpoint.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, its tokenizer in the same folder")
    add("--prompt", help="text, or a whole number for that many random tokens; default: Hello, my name is")
    add("--prompt_file", type=Path, metavar="FILE", help="UTF-8, one prompt a line, all in one batch")
    add("--interactive", action="store_true", help="read prompts from the terminal, one a line")
    add("--chat", action="store_true", help="put the prompt into the model's own chat template")
    add("--num_samples", type=positive, default=1, help="answers one after the other, each with the next seed")
    add("--max_new_tokens", type=positive, default=200, help="tokens")
    add("--batch_size", type=positive, default=1, help="answers at the same time")
    add(
        "--max_seq_length",
        type=positive,
        help=f"cache slots, in steps of 256; what the run needs, or {INTERACTIVE_SLOTS} in an interactive session",
    )
    add("--temperature", type=float, default=Sampling.temperature, help="0 is greedy")
    add("--top_k", type=int, default=Sampling.top_k, help="sample from the k likeliest tokens; 0 is all")
    add(
        "--top_p", type=float, default=Sampling.top_p, help="sample from the likeliest tokens of this total probability"
    )
    add("--seed", type=int, default=1234)
    add("--stop", nargs="+", default=[], metavar="STRING", help="end before any of these strings")
    add("--ignore_eos", action="store_true", help="go on after an end-of-sequence token")
    add("--compile", action="store_true", help="compile the decode step")
    add("--compile_prefill", action="store_true", help="compile the prefill too")
    add("--reference", action="store_true", help="run the readable model of model.py, without a cache")
    add("--kv_cache", choices=("int8",), help="keys and values in 8 bits; default: the precision's")
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, mps")
    add("--precision", choices=DTYPES, help="default: the checkpoint's, on a CPU float32")
    add("--quantize", choices=("int8", "int4"), help="quantize the weights while loading, without a second file")
    add("--group_size", type=int, choices=GROUP_SIZES, default=32, help="columns in a group of --quantize int4")
    add("--profile", type=Path, metavar="FILE", help="write a Chrome trace")
    add("--json", type=Path, dest="json_path", metavar="FILE", help="write samples and figures for other programs")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(**vars(parse_arguments()))
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
