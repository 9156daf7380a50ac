"""Logits to tokens: sampling, the decode step, and the `generate()` loop.

Decisions to know:

- `generate()` yields token ids and does nothing else: no tokenizer, no clock, no printing. Both models fit it.
- Random numbers come from one torch.Generator a row and enter the decode step as a tensor: the same seed draws the
  same numbers eager and compiled, a row of a batch draws those it draws alone, no global random state is touched.
- Prompts of different lengths are padded on the right. No token sees the padding: each attends to slots up to its own
  position, and a row's new tokens overwrite the padded slots before they come into view.
- The compiled decode step is a value that is passed along. Prefill is eager unless it is given compiled.
- On a GPU a step becomes a CUDA graph as it is, of the kernels that it starts; the compiler is for what has none there.
- On a GPU the host runs ahead of the device by a few tokens and reads them in groups, so that no step waits for it.
- Logits that are not finite become the token -1, which costs no wait, and end the loop where the host reads it.

Copy me: needs torch, and for speed on a GPU `gpu_kernels.py` beside it.

Shapes: B batch rows, T prompt tokens, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F

try:
    import gpu_kernels
except ImportError:  # no Triton, or the file was left behind
    gpu_kernels = None

# --- Sampling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token. Raises ValueError outside these ranges.

    A temperature below 1e-6 is greedy too: it would tell apart logits that float32 does not.
    """

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:  # `not` because of NaN
            raise ValueError(f"temperature and top_k must be 0 or more and top_p above 0 and at most 1, not {self}")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6


def by_gpu_kernels(device: torch.device) -> bool:
    return gpu_kernels is not None and gpu_kernels.runs_on(device)


def to_probabilities(logits, sampling: Sampling):
    """Probabilities [..., V] in float32 after temperature, then top-k, then top-p (Holtzman et al. 2020)."""
    logits, given = logits.float() / sampling.temperature, logits
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(given < kth_largest(given, sampling.top_k), float("-inf"))
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        descending = probabilities.sort(-1, descending=True).values
        before = descending.cumsum(-1) - descending  # mass of all likelier tokens; the first has none, so it stays
        smallest = descending.masked_fill(before >= sampling.top_p, float("inf")).amin(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < smallest, 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def kth_largest(values, k: int):
    """The k-th largest number [..., 1] of each row of values [..., V]."""
    if by_gpu_kernels(values.device):
        return gpu_kernels.kth_largest(values, k)
    return values.topk(k, sorted=False).values.amin(-1, keepdim=True)


def likeliest(values):
    """The index [..., 1] of the largest number of each row of values [..., V], -1 where that is not finite. A NaN is
    the largest of all.

    In 128 parts, because the compiler gives a row to one program of a GPU: without `gpu_kernels.py` 262,208 logits took
    143 us.
    """
    if by_gpu_kernels(values.device):
        return gpu_kernels.choose(values)
    V = values.shape[-1]
    parts = F.pad(values, (0, -V % 128), value=float("-inf")).unflatten(-1, (128, -1))
    top, index = parts.max(-1)  # [..., 128]
    part = top.argmax(-1, keepdim=True)
    token = (part * parts.shape[-1] + index.gather(-1, part)).clamp(max=V - 1)
    return torch.where(values.gather(-1, token).isfinite(), token, -1)


def draw(weights, noise):
    """An index [..., 1] by chance, in proportion to the weights [..., V]; -1 if they are not finite.

    `noise` [..., V] is Exp(1): argmax(p / noise) has distribution p.
    """
    return likeliest(weights / noise.clamp(min=1e-20))  # some devices draw 0


def sample(logits, noise, sampling: Sampling):
    """One id per row, [B, 1], of logits [B, V], with the Exp(1) `noise` [B, V]; -1 where they are not finite."""
    if sampling.greedy:
        return likeliest(logits)
    if sampling.top_p == 1 and by_gpu_kernels(logits.device):
        least = kth_largest(logits, sampling.top_k) if 0 < sampling.top_k < logits.shape[-1] else None
        return gpu_kernels.choose(logits, noise, least, 1 / sampling.temperature)
    return draw(to_probabilities(logits, sampling), noise)


def why_not_finite(*models) -> str:
    """The likely cause of logits that are not finite, and what to do, in one sentence. All ranks of a model call it."""
    tensors = [(name, tensor) for model in models for name, tensor in model.state_dict().items()]
    bad = [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]
    if any(getattr(model, "ranks", 1) > 1 for model in models):
        of_ranks = [None] * dist.get_world_size()  # each has its own part of the weights
        dist.all_gather_object(of_ranks, bad)
        bad = sum(of_ranks, [])
    if bad:
        return f"the weights hold numbers that are not finite, first in {bad[0]}; convert the model again"
    if any(tensor.dtype == torch.float16 for _, tensor in tensors):
        too_large = "the logits are not finite, because numbers of this model are too large for float16"
        return f"{too_large}; give --precision bfloat16 or float32"
    return "the logits are not finite, although the weights are; convert the model again, or try --precision float32"


# --- One step ---------------------------------------------------------------------------------------------------------


def prefill(model, prompt, input_pos, last):
    """Logits [B, V] that follow the tokens at the indices `last` [B] of the prompt [B, T]; fills the cache."""
    return model(prompt, input_pos, last)[:, 0]


def decode_step(model, token, input_pos, noise, sampling: Sampling):
    """The token [B, 1] after `token` [B, 1], which stands at `input_pos` [B, 1], and its own position."""
    logits = model(token.clamp(min=0), input_pos)[:, -1]  # -1: see sample()
    following = (input_pos + 1).clamp(max=model.max_seq_length - 1)  # a row that has ended is computed with the others
    return model.from_rank_0(sample(logits, noise, sampling)), following


class Recorded:
    """A step as CUDA graphs, one for each model and kind of input, recorded when it is first asked for.

    The model is the first argument. Tensors among the others are copied to where a graph reads them, and the next call
    overwrites the results. There are no gradients. Of one model 32 graphs are kept.

    A graph knows addresses. So whatever moves a model's weights, caches or tables has to put another object into its
    attribute `memory`, at which all its graphs are dropped. FastGPT does so in `setup_caches`, `load_state_dict` and
    `.to()`, but not where one of its modules is replaced.
    """

    def __init__(self, function):
        self.function, self.count = function, 0  # graphs that were recorded
        self.of_models = WeakKeyDictionary()  # model: (its memory, {kind of input: (graph, own inputs, results)})
        self.streams = {}  # one of each device to record on, because cuBLAS keeps 32 MB for a stream

    @torch.no_grad()
    def __call__(self, model, *inputs, **settings):
        memory, graphs = self.of_models.get(model, (self, {}))
        if memory is not model.memory:
            graphs = {}
            self.of_models[model] = model.memory, graphs
        kind = (*((x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in inputs), *settings.values())
        with torch.cuda.device(inputs[0].device):
            if kind not in graphs:
                if len(graphs) == 32:
                    del graphs[next(iter(graphs))]
                graphs[kind] = self._record(model, inputs, settings)
            graph, own_inputs, results = graphs[kind]
            for own, given in zip(own_inputs, inputs, strict=True):
                if isinstance(given, torch.Tensor):
                    own.copy_(given)
            graph.replay()
        return results

    def _record(self, model, inputs, settings):
        own = [copied(x) if isinstance(x, torch.Tensor) else x for x in inputs]
        self.function(model, *own, **settings)  # builds its kernels
        graph, device = torch.cuda.CUDAGraph(), own[0].device
        stream = self.streams[device] = self.streams.get(device) or torch.cuda.Stream(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # NCCL's thread asks for events
            results = self.function(model, *own, **settings)
        self.count += 1
        return graph, own, results


def compiled_step(function, device: str):
    """A step that takes the host little time. On NVIDIA GPUs it is `Recorded`, without `gpu_kernels.py` with the
    compiler's kernels. Elsewhere it is one compiled graph.

    On a CPU the compiler would compute a norm again for each row of the weights after it (SmolLM2 in bfloat16: 56
    tokens/s instead of 71, benchmarks/log.md). Its 1,400 assertions a step take 0.3 ms of 6 there.
    """
    if not device.startswith("cuda"):
        options = {"realize_opcount_threshold": 6, "size_asserts": False, "alignment_asserts": False}
        return torch.compile(function, fullgraph=True, dynamic=False, options=options)
    if by_gpu_kernels(torch.device(device)):
        return Recorded(function)
    options = {"coordinate_descent_tuning": True}
    return Recorded(torch.compile(function, fullgraph=True, dynamic=False, options=options))


def compiled_prefill(prefill=prefill):
    """`prefill` as one compiled graph for prompts of any length; a single token gets a graph of its own."""
    if gpu_kernels is not None and torch.__version__ < "2.13":
        gpu_kernels.tell_compiler()
    compiled = torch.compile(prefill, fullgraph=True)

    def run(model, prompt, input_pos, last):
        # A part of a longer tensor has that one's strides, for which a graph would be made anew.
        prompt, input_pos, last = (x if x is None else copied(x) for x in (prompt, input_pos, last))
        for ids in (prompt, input_pos):  # not dynamic=True: it would make numbers such as norm_eps dynamic too
            if ids is not None and ids.shape[1] > 1:
                torch._dynamo.mark_dynamic(ids, 1)
        return compiled(model, prompt, input_pos, last)

    return run


def copied(x):
    """A contiguous copy: a CUDA graph's next replay overwrites its outputs, and compiled steps expect such strides."""
    return x.clone(memory_format=torch.contiguous_format)


def check_length(tokens: int, context: int, name: str = "the prompt") -> None:
    if tokens == 0:
        raise ValueError(f"{name} is empty; give at least one token")
    if tokens > context:
        raise ValueError(f"{name} has {tokens} tokens, more than the context of {context}; shorten it")


def cache_slots(tokens: int, config) -> int:
    """Slots for so many tokens, rounded up to a multiple of 256: kernels are compiled for a number of slots."""
    return min(-(-tokens // 256) * 256, config.block_size)


# --- The loop ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """What takes the steps: each function may be a compiled version, and `speculation` one of `speculate.py`'s."""

    prefill: Callable = prefill
    decode_step: Callable = decode_step
    speculation: object = None


class Text:
    """Prompts [B, T], padded with 0, and what their continuation draws from. See `generate` for the arguments.

    `lengths` are those of the prompts, `new` how many tokens each row may get. The first `cached` tokens of each row
    are in the cache.
    """

    def __init__(self, model, rows: list[list[int]], max_new_tokens: int, sampling: Sampling, eos_ids, seed: int):
        self.lengths, self.eos_ids, self.sampling, self.cached = [len(row) for row in rows], eos_ids, sampling, 0
        block_size, self.vocab_size = model.config.block_size, model.config.vocab_size
        self.device = next(model.parameters()).device
        check_length(min(self.lengths, default=0), block_size)
        check_length(max(self.lengths), block_size)
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        if padded.min() < 0 or padded.max() >= self.vocab_size:
            raise ValueError(f"the prompt has ids outside the vocabulary of {self.vocab_size}; use its own tokenizer")
        self.prompt, self.ends = padded.to(self.device), torch.tensor(self.lengths, device=self.device)
        # The last token needs no slot: nothing comes after it.
        self.new = [min(max_new_tokens, block_size - length + 1) for length in self.lengths]
        self.generators = [torch.Generator(self.device).manual_seed(seed + row) for row in range(len(rows))]

    def draw(self, n: int = 1, uniforms: int = 0):
        """n tensors [B, V] of Exp(1), of None if greedy, and numbers [B, uniforms] from 0 to 1."""
        if self.sampling.greedy:
            return [None] * n, None
        shape = (n, self.vocab_size)
        noise = [torch.empty(shape, device=self.device).exponential_(generator=own) for own in self.generators]
        uniform = [torch.rand(uniforms, generator=own, device=self.device) for own in self.generators]
        return torch.stack(noise, dim=1), torch.stack(uniform)


def first_token(model, text: Text, prefill):
    """The token [B, 1] after each row's prompt, which is in the cache then."""
    B, T = text.prompt.shape
    cached = text.cached
    input_pos = torch.arange(cached, T, device=text.device).expand(B, -1) if cached else None
    logits = prefill(model, text.prompt[:, cached:], input_pos, text.ends - cached - 1)
    return model.from_rank_0(sample(logits, text.draw()[0][0], text.sampling))


def _tokens_of_reference(model, text: Text):
    (B, T), context = text.prompt.shape, model.config.block_size
    row, lengths = torch.arange(B, device=text.device), text.ends
    ids = torch.nn.functional.pad(text.prompt, (0, context - T))
    for end in count(T):
        logits = model(ids[:, : min(end, context)])[row, lengths - 1]
        token = sample(logits, text.draw()[0][0], text.sampling)
        yield token
        ids[row, lengths.clamp(max=context - 1)] = token[:, 0].clamp(min=0)
        lengths = (lengths + 1).clamp(max=context)


def _tokens_of_fast(model, text: Text, steps: Steps):
    token = first_token(model, text, steps.prefill)
    yield token
    input_pos = text.ends[:, None].clamp(max=model.max_seq_length - 1)
    while True:
        token, input_pos = map(copied, steps.decode_step(model, token, input_pos, text.draw()[0][0], text.sampling))
        yield token


def _to_host(tokens, on_gpu: bool):
    """The ids of each tensor [B, 1], as lists. On a GPU they are copied in groups, while the next group is queued."""
    group = list(islice(tokens, 1))  # the first one alone: somebody is waiting for it
    while group:
        ids = torch.cat(group, dim=1).T.to("cpu", non_blocking=True)  # [group, B]
        following = []
        if on_gpu:
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(group[0].device))  # of cuda:1, too
            following = list(islice(tokens, 8)) if len(group) > 1 else []
            arrived.synchronize()
        yield from ids.tolist()
        group = following or list(islice(tokens, 8 if on_gpu else 1))


def _one_by_one(model, text: Text, steps: Steps):
    """The next id of each row, None of one that has ended."""
    tokens = _tokens_of_fast(model, text, steps) if has_cache(model) else _tokens_of_reference(model, text)
    running = [True] * len(text.new)
    for done, ids in enumerate(_to_host(islice(tokens, max(text.new)), text.device.type == "cuda"), start=1):
        if any(run and id < 0 for id, run in zip(ids, running, strict=True)):
            raise FloatingPointError(why_not_finite(model))
        yield [id if run else None for id, run in zip(ids, running, strict=True)]
        running = [
            run and id not in text.eos_ids and done < new for id, run, new in zip(ids, running, text.new, strict=True)
        ]
        if not any(running):
            return


def _in_step(rounds):
    """The ids of rounds, in which a row gets several, as the next id of each row."""
    waiting = None  # ids that a row has before the others
    for new_ids, running in rounds:
        waiting = waiting or [deque() for _ in running]
        for queue, ids in zip(waiting, new_ids, strict=True):
            queue.extend(ids)
        while any(waiting) and all(queue or not run for queue, run in zip(waiting, running, strict=True)):
            yield [queue.popleft() if queue else None for queue in waiting]


def has_cache(model) -> bool:
    return hasattr(model, "setup_caches")


@torch.no_grad()
def generate(
    model,
    prompt,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eos_ids=(),
    seed: int = 0,
    cached: int = 0,
    steps: Steps = Steps(),
) -> Iterator[list[int | None]]:
    """Continue a prompt, ids [B, T] or a list of B rows of ids; yields the next id of each row, as a list of B.

    Row r draws from the seed `seed` + r, as it would alone with it. It ends with the first of `eos_ids`, which is
    yielded, or when its context is full, and is None from then on; the iteration ends when all rows have. `cached`
    leading tokens of each row are taken to be in the model's cache already. `model` is a FastGPT or a GPT. With a
    speculation among its steps a row takes several tokens at a time, of the same distribution; its text then depends on
    the rows beside it too.

    Raises ValueError, at the first token, if the prompt is empty, too long, or not of this vocabulary, and
    FloatingPointError at a token whose logits are not finite.
    """
    rows = prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt
    text = Text(model, rows, max_new_tokens, sampling, eos_ids, seed)
    (B, T), shortest, speculation = text.prompt.shape, min(text.lengths), steps.speculation
    if not 0 <= cached < shortest:
        raise ValueError(f"{cached} tokens cannot be cached of a prompt of {shortest}; the last one has to be computed")
    if speculation and not has_cache(model):
        raise ValueError("speculation needs a model with a cache; the reference has none")
    if speculation and (speculation.model is not model or speculation.sampling != sampling):
        raise ValueError("the speculation is of another model or sampling; make one with these")
    if has_cache(model):
        text.cached = cached
        slots = min(T + max_new_tokens - 1, model.config.block_size)
        if slots > model.max_seq_length or B > model.max_batch_size:
            longest = speculation.longest_round if speculation else 0
            model.setup_caches(B, cache_slots(slots + longest, model.config))
            text.cached = 0  # the new cache is empty
    yield from _in_step(speculation.rounds(text, steps)) if speculation else _one_by_one(model, text, steps)
