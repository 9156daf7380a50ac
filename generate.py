"""Text from a checkpoint: sampling, the `generate()` loop, and below them the command line.

Decisions to know:

- `generate()` yields token ids and does nothing else: no tokenizer, no clock, no printing. Both models fit it.
- Random numbers come from one torch.Generator a row and enter the decode step as a tensor: the same seed draws the
  same numbers eager and compiled, a row of a batch draws those it draws alone, no global random state is touched.
- Prompts of different lengths are padded on the right. No token sees the padding: each attends to slots up to its own
  position, and a row's new tokens overwrite the padded slots before they come into view.
- The compiled decode step is a value that is passed along. Prefill is eager unless `--compile_prefill`.
- On a GPU the host runs ahead of the device by a few tokens and reads them in groups, so that no step waits for it.
- Speculation goes in rounds: k drafts, of a smaller model or of the text itself, then one pass of the model over all of
  them. The host reads one tensor a round. A refused draft's cache slot is overwritten before it comes into view.
- Under torchrun every rank does all of this with its part of the model, and takes rank 0's tokens. Rank 0 prints.
- Text goes to stdout, the figures of the run to stderr.

Copy me: needs torch, and `model.py`, `fast_model.py`, `quantize.py`, `tp.py`, `checkpoint.py` and `tokenizer.py` beside
it, with its libraries; for speed on a GPU `gpu_kernels.py` too.

Shapes: B batch rows, T prompt tokens, V vocabulary.
"""

import argparse
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch

import tp
from checkpoint import (
    DTYPES,
    build_model,
    check_target,
    describe_quantization,
    quantize_model,
    read_checkpoint,
    write_json,
    written_in_place,
)
from fast_model import bytes_per_step
from quantize import GROUP_SIZES
from tokenizer import check_vocabulary, find_tokenizer

try:
    import gpu_kernels
except ImportError:  # no Triton, so no GPU of NVIDIA's
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


def to_probabilities(logits, sampling: Sampling):
    """Probabilities [..., V] in float32 after temperature, then top-k, then top-p (Holtzman et al. 2020)."""
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
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def unless_nan(token, values):
    """token [B, 1], or -1 where its entry in values [B, V] is not finite. A NaN anywhere in a row wins its argmax."""
    return torch.where(values.gather(-1, token).isfinite(), token, -1)


def sample(logits, noise, sampling: Sampling):
    """One id per row, [B, 1], of logits [B, V]; -1 where they are not finite.

    `noise` [B, V] is Exp(1): argmax(p / noise) has distribution p.
    """
    if sampling.greedy:
        return unless_nan(logits.argmax(-1, keepdim=True), logits)
    probabilities = to_probabilities(logits, sampling)
    return unless_nan((probabilities / noise).argmax(-1, keepdim=True), probabilities)


def why_not_finite(*models) -> str:
    """The likely cause of logits that are not finite, and what to do, in one sentence."""
    tensors = [(name, tensor) for model in models for name, tensor in model.state_dict().items()]
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"the weights hold numbers that are not finite, first in {name}; convert the model again"
    if any(tensor.dtype == torch.float16 for _, tensor in tensors):
        too_large = "the logits are not finite, because numbers of this model are too large for float16"
        return f"{too_large}; give --precision bfloat16 or float32"
    return "the logits are not finite, although the weights are; try --precision float32"


# --- Generation -------------------------------------------------------------------------------------------------------


def prefill(model, prompt, input_pos, last):
    """Logits [B, V] that follow the tokens at the indices `last` [B] of the prompt [B, T]; fills the cache."""
    return model(prompt, input_pos, last)[:, 0]


def decode_step(model, token, input_pos, noise, sampling: Sampling):
    """The token [B, 1] after `token` [B, 1], which stands at `input_pos` [B, 1], and its own position."""
    logits = model(token.clamp(min=0), input_pos)[:, -1]  # -1: see sample()
    following = (input_pos + 1).clamp(max=model.max_seq_length - 1)  # a row that has ended is computed with the others
    return tp.from_rank_0(sample(logits, noise, sampling), model.ranks), following


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


def copied(x):
    """A contiguous copy: a CUDA graph's next replay overwrites its outputs, and a graph is made for certain strides."""
    return x.clone(memory_format=torch.contiguous_format)


def _tokens_of_reference(model, prompt, lengths, new_noise, sampling):
    (B, T), context = prompt.shape, model.config.block_size
    row = torch.arange(B, device=prompt.device)
    ids = torch.nn.functional.pad(prompt, (0, context - T))
    for end in count(T):
        token = sample(model(ids[:, : min(end, context)])[row, lengths - 1], new_noise(), sampling)
        yield token
        ids[row, lengths.clamp(max=context - 1)] = token[:, 0].clamp(min=0)
        lengths = (lengths + 1).clamp(max=context)


def _tokens_of_fast(model, prompt, lengths, new_noise, sampling, cached, prefill, decode_step):
    B, T = prompt.shape
    input_pos = torch.arange(cached, T, device=prompt.device).expand(B, -1) if cached else None
    token = sample(prefill(model, prompt[:, cached:], input_pos, lengths - cached - 1), new_noise(), sampling)
    token = tp.from_rank_0(token, model.ranks)
    yield token
    input_pos = lengths[:, None].clamp(max=model.max_seq_length - 1)
    while True:
        token, input_pos = decode_step(model, token, input_pos, new_noise(), sampling)
        token, input_pos = copied(token), copied(input_pos)
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


# --- Speculation ------------------------------------------------------------------------------------------------------


def draft_step(draft, token, input_pos, noise, sampling: Sampling, vocab_size: int):
    """What a draft proposes after the tokens `token` [B, n], which stand at `input_pos` [B, n].

    Returns a token [B, 1], the probabilities [B, V] it came from, of the model's `vocab_size` tokens, None if greedy,
    and its position [B, 1].
    """
    known = draft.config.vocab_size  # embeddings that are padded differently have the same tokens
    logits = draft(token.clamp(0, known - 1), input_pos)[:, -1, :vocab_size]
    logits = torch.nn.functional.pad(logits, (0, max(0, vocab_size - known)), value=float("-inf"))
    following = (input_pos[:, -1:] + 1).clamp(max=draft.max_seq_length - 1)
    if sampling.greedy:
        return logits.argmax(-1, keepdim=True), None, following
    probabilities = to_probabilities(logits, sampling)
    return (probabilities / noise).argmax(-1, keepdim=True), probabilities, following


def accept(logits, drafts, proposed, uniform, noise, sampling: Sampling):
    """How many of the `drafts` [B, k] are kept, [B, 1], and the token [B, 1] that follows those.

    `logits` [B, k + 1, V] are the model's before, between and after the drafts; `proposed` [B, k, V] are the
    probabilities from which the drafts came, None if they were certain; `uniform` [B, k] and the Exp(1) `noise` [B, V]
    are random. Draft d is kept with probability min(1, p(d) / q(d)); in place of the first that is not kept comes one
    from max(0, p - q), normalized, so that the tokens have the distribution p (Leviathan et al. 2023,
    arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318). If all are kept, p alone gives the one after them. The token
    is -1 where p or q is not finite.
    """
    if sampling.greedy:
        best = unless_nan(logits.argmax(-1, keepdim=True), logits)[..., 0]  # [B, k + 1]
        count = (drafts == best[:, :-1]).cumprod(1).sum(1, keepdim=True)
        return count, best.gather(1, count)
    p = to_probabilities(logits, sampling)
    if proposed is None:
        proposed = torch.nn.functional.one_hot(drafts, p.shape[-1]).float()
    p_of_draft, q_of_draft = (t.gather(2, drafts[..., None])[..., 0] for t in (p[:, :-1], proposed))  # [B, k]
    count = (uniform * q_of_draft < p_of_draft).cumprod(1).sum(1, keepdim=True)
    q = torch.nn.functional.pad(proposed, (0, 0, 0, 1))  # nothing was proposed for the last place
    p, q = (t.gather(1, count[..., None].expand(-1, -1, t.shape[-1]))[:, 0] for t in (p, q))  # [B, V]
    rest = (p - q).clamp(min=0)
    rest = torch.where(rest.any(-1, keepdim=True), rest, p)  # rounding can leave nothing where p and q are equal
    return count, unless_nan((rest / noise).argmax(-1, keepdim=True), rest)


def verify(model, tokens, input_pos, proposed, uniform, noise, sampling: Sampling):
    """One pass over `tokens` [B, k + 1], the last of the text and k drafts, from the position `input_pos` [B, 1] on.

    Returns the next round's first token [B, 1], its position, the token before it, and for the host [B, k + 2]: the new
    ids, of which the first n + 1 are of use, and n, the number of drafts kept.
    """
    k = tokens.shape[1] - 1
    tokens = tp.from_rank_0(tokens, model.ranks).clamp(min=0)  # each rank has a draft model of its own
    input_pos = input_pos.clamp(max=model.max_seq_length - 1 - k)  # a row that has ended is computed with the others
    logits = model(tokens, input_pos + torch.arange(k + 1, device=tokens.device))
    drafts = tokens[:, 1:]
    accepted = torch.cat(accept(logits, drafts, proposed, uniform, noise, sampling), dim=1)
    count, following = tp.from_rank_0(accepted, model.ranks).split(1, dim=1)
    ids = torch.cat([drafts, following], dim=1).scatter(1, count, following)
    return following, input_pos + count + 1, tokens.gather(1, count), torch.cat([ids, count], dim=1)


class Speculation:
    """A way to draft tokens that one pass of the model then verifies, and what came of it.

    A round has `k` drafts. With k None it has 0 (a plain step), 2, 5 or 10, what the running acceptance promises most
    of; `costs` are then the seconds, in any unit, of a round of each k, as `round_costs` measures them. `verify` may be
    a compiled version. `rounds` lists, of the last text, k and the number of drafts kept in each row that still ran.
    """

    CHOICES = (2, 5, 10)
    certain = False  # whether drafts come without probabilities
    models = ()  # that draft

    def __init__(self, k: int | None, verify=verify, costs: dict[int, float] | None = None):
        if k is None and costs is None:
            raise ValueError("speculation that adapts k needs the costs of its rounds; see round_costs()")
        self.k, self.verify, self.costs = k, verify, costs
        self.rounds = []

    @property
    def longest_round(self) -> int:
        return self.CHOICES[-1] if self.k is None else self.k

    def reset(self) -> None:
        self.rounds = []
        self.kept, self.tried = 1.6, 2.0  # of the drafts that were looked at; fades with each round
        self.rest, self.pauses, self.probes = 0, 0, 0

    def choose(self) -> int:
        """The next round's k."""
        if self.k is not None:
            return self.k
        if all(k + 1 <= cost / self.costs[0] for k, cost in self.costs.items() if k):
            return 0  # not even if every draft were kept
        if self.rest:
            self.rest -= 1
            self.probes = 2
            return 0
        rate = self.kept / self.tried
        speed = {k: sum(rate**i for i in range(k + 1)) / cost for k, cost in self.costs.items()}
        best = max(speed, key=speed.get)
        if best:
            self.pauses = 0
        elif self.probes:
            self.probes -= 1
            best = self.CHOICES[0]
        else:  # it does not pay: plain steps for 50 times as long as a round, beside which two tries are little
            round_in_steps = self.costs[self.CHOICES[0]] / self.costs[0]
            self.rest = round(50 * round_in_steps * 2 ** min(self.pauses, 3)) - 1
            self.pauses += 1
            self.kept, self.tried = 2 * rate, 2.0  # so that the next try counts
        return best

    def record(self, k: int, kept: list[int]) -> None:
        """A round has ended in which each row that still ran kept so many drafts."""
        self.rounds.append((k, kept))
        if k:
            self.kept = 0.9 * self.kept + sum(kept)
            self.tried = 0.9 * self.tried + sum(min(n + 1, k) for n in kept)


class DraftModel(Speculation):
    """Drafts of a smaller model, a FastGPT with the same tokens. `step` and `prefill` may be compiled versions."""

    def __init__(self, model, k: int | None, step=draft_step, prefill=prefill, **options):
        super().__init__(k, **options)
        self.model, self.models, self.step, self.prefill = model, (model,), step, prefill
        self.seen = 0  # leading tokens that are in its cache

    def start(self, prompt, lengths: list[int], cached: int, slots: int, rows) -> int:
        """Fill the draft's cache with the prompts [B, T]; returns how many slots it has.

        Raises ValueError if a prompt is longer than its context.
        """
        self.reset()
        draft, (B, T) = self.model, prompt.shape
        check_length(T, draft.config.block_size, "for the draft model the prompt")
        slots = min(slots, draft.config.block_size)
        if slots > draft.max_seq_length or B > draft.max_batch_size:
            draft.setup_caches(B, slots)
            self.seen = 0
        cached = min(cached, self.seen)
        self._fill(prompt[:, cached:], torch.full_like(prompt[:, :1], cached) if cached else None)
        self.missed, self.seen = prompt[:, :0], min(lengths)  # [B, n], the last tokens that it has not seen
        return draft.max_seq_length

    def _fill(self, ids, first) -> None:
        input_pos = None if first is None else first + torch.arange(ids.shape[1], device=ids.device)
        self.prefill(self.model, ids.clamp(0, self.model.config.vocab_size - 1), input_pos, torch.zeros_like(ids[:, 0]))

    def propose(self, token, input_pos, position, running, k, noise, sampling, vocab_size):
        """Drafts [B, k] after `token` and their probabilities [B, k, V], None if greedy."""
        input_pos = input_pos.clamp(max=self.model.max_seq_length - 1)  # of a row that has ended
        step = partial(self.step, self.model, sampling=sampling, vocab_size=vocab_size)
        missed = self.missed.shape[1]
        if missed > 1:
            self._fill(self.missed[:, :-1], input_pos - missed)
        if missed:  # two tokens in one step cost little more than one
            token, input_pos = torch.cat([self.missed[:, -1:], token], 1), torch.cat([input_pos - 1, input_pos], 1)
        drafts, probabilities = [], []
        for i in range(k):
            token, q, input_pos = step(token, input_pos, noise[i])
            token, input_pos = copied(token), copied(input_pos)
            drafts.append(token)
            probabilities.append(q if q is None else q.clone())
        self.seen = 1 + min(at for at, run in zip(position, running, strict=True) if run)
        return torch.cat(drafts, dim=1), None if sampling.greedy else torch.stack(probabilities, dim=1)

    def advance(self, k, kept, before, new_ids) -> None:
        """A round has ended: `before` [B, 1] is the text's last token but one, `new_ids` are new in each row."""
        if k == 0:
            self.missed = torch.cat([self.missed, before], dim=1)
        else:  # the last draft of all was never fed
            self.missed = before if k in kept else before[:, :0]


class PromptLookup(Speculation):
    """Drafts are what followed when prompt or answer had the last n tokens before; n from `longest` down to 1.

    The method is Saxena's "Prompt Lookup Decoding" (2023); copying from a reference is due to Yang et al. 2023,
    arXiv:2304.04487.
    """

    certain = True

    def __init__(self, k: int | None, longest: int = 3, **options):
        super().__init__(k, **options)
        self.longest = longest

    def start(self, prompt, lengths, cached, slots: int, rows: list[list[int]]) -> int:
        """Begin with the text of each row; returns `slots`, since it needs none of its own."""
        self.reset()
        self.rows, self.found = [[] for _ in rows], [{} for _ in rows]
        self.extend(rows)
        return slots

    def extend(self, more: list[list[int]]) -> None:
        """Add ids to each row, and note where the latest continuation of each n-gram begins."""
        for row, found, ids in zip(self.rows, self.found, more, strict=True):
            for id in ids:
                row.append(id)
                for n in range(1, min(self.longest, len(row) - 1) + 1):
                    found[tuple(row[-n - 1 : -1])] = len(row) - 1

    def continuation(self, row: int, k: int) -> list[int]:
        """k ids, or none. One that reaches the end of the text goes on from its own beginning."""
        ids, found = self.rows[row], self.found[row]
        for n in range(min(self.longest, len(ids)), 0, -1):
            first = found.get(tuple(ids[-n:]))
            if first is not None:
                return [ids[first + i % (len(ids) - first)] for i in range(k)]
        return []

    def propose(self, token, input_pos, position, running, k, noise, sampling, vocab_size):
        """Drafts [B, k] and None, or None if no row that still runs has any."""
        drafts = [self.continuation(row, k) if run else [] for row, run in enumerate(running)]
        if not any(drafts):
            return None
        filled = torch.tensor([ids or [0] * k for ids in drafts])
        return filled.to(token.device, non_blocking=True), None

    def advance(self, k, kept, before, new_ids) -> None:
        self.extend(new_ids)


def _rounds(model, speculation, prompt, lengths, new, sampling, eos_ids, cached, draw, prefill, decode_step):
    """Yield, after each round, the new ids of each row, and which rows still run; the arguments are generate()'s.

    `draw(n, uniforms)` gives noise, n tensors [B, V], and numbers [B, uniforms] from 0 to 1.
    """
    B, T = prompt.shape
    device, vocab_size = prompt.device, model.config.vocab_size
    ends = torch.tensor(lengths, device=device)
    input_pos = torch.arange(cached, T, device=device).expand(B, -1) if cached else None
    token = sample(prefill(model, prompt[:, cached:], input_pos, ends - cached - 1), draw(1)[0][0], sampling)
    token = tp.from_rank_0(token, model.ranks)
    input_pos = ends[:, None]
    new_ids = token.tolist()
    rows = [ids[:length] + more for ids, length, more in zip(prompt.tolist(), lengths, new_ids, strict=True)]
    room = min(model.max_seq_length, speculation.start(prompt, lengths, cached, model.max_seq_length, rows))
    position = [length - 1 for length in lengths]  # of each row's last token
    done, running = [0] * B, [True] * B

    def launch():
        """Queue a round; k, the next one's first token, its position, the token before it, what the host is to read."""
        k, drafts = speculation.choose(), None
        noise, uniform = draw(1 if speculation.certain else k + 1, k)
        if k and k < room - max(at for at, run in zip(position, running, strict=True) if run):
            drafts = speculation.propose(token, input_pos, position, running, k, noise, sampling, vocab_size)
        if drafts is None:
            at = input_pos.clamp(max=model.max_seq_length - 1)
            following, at = decode_step(model, token, at, noise[-1], sampling)
            return 0, copied(following), copied(at), token, following
        ids, proposed = torch.cat([token, drafts[0]], dim=1), drafts[1]
        following, at, before, read = speculation.verify(model, ids, input_pos, proposed, uniform, noise[-1], sampling)
        return k, copied(following), copied(at), copied(before), read

    while True:
        for row in range(B):
            ids = new_ids[row][: new[row] - done[row]] if running[row] else []
            end = next((i for i, id in enumerate(ids, 1) if id in eos_ids), None)
            new_ids[row] = ids[:end]
            done[row] += len(new_ids[row])
            position[row] += len(new_ids[row])
            running[row] = running[row] and end is None and done[row] < new[row]
        queued = launch() if device.type == "cuda" and any(running) else None  # before somebody reads the ids
        yield new_ids, list(running)
        if not any(running):
            return
        k, token, input_pos, before, read = queued or launch()
        read = read.tolist()  # the host waits for the device here and nowhere else
        kept = [ids[-1] if k else 0 for ids in read]
        new_ids = [ids[: n + 1] for ids, n in zip(read, kept, strict=True)]
        kept = [n for n, run in zip(kept, running, strict=True) if run]
        speculation.record(k, kept)
        speculation.advance(k, kept, before, new_ids)


# --- generate() -------------------------------------------------------------------------------------------------------


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
    speculation: Speculation | None = None,
) -> Iterator[list[int | None]]:
    """Continue the ids `prompt` [B, T]; yields the next id of each row, as a list of B.

    Row r is the first `lengths[r]` of its ids, by default all T; what follows is not seen. It draws from the seed
    `seed` + r, as it would alone with it. It ends with the first of `eos_ids`, which is yielded, or when its context
    is full, and is None from then on; the iteration ends when all rows have. `cached` leading tokens of each row are
    taken to be in the model's cache already. `model` is a FastGPT or a GPT; `prefill` and `decode_step` may be
    compiled versions. With `speculation` a row takes several tokens at a time, of the same distribution; its text
    then depends on the rows beside it too. Raises ValueError, at the first token, if the prompt is empty, too long, or
    not of this vocabulary, and FloatingPointError at a token whose logits are not finite.
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

    def draw(n, uniforms=0):
        """n tensors [B, V] of Exp(1), of None if greedy, and numbers [B, uniforms] from 0 to 1."""
        if sampling.greedy:
            return [None] * n, None
        shape = (n, config.vocab_size)
        noise = [torch.empty(shape, device=device).exponential_(generator=generator) for generator in generators]
        uniform = [torch.rand(uniforms, generator=generator, device=device) for generator in generators]
        return torch.stack(noise, dim=1), torch.stack(uniform)

    def new_noise():
        return draw(1)[0][0]

    ends = torch.tensor(lengths, device=device)
    if hasattr(model, "setup_caches"):
        slots = min(T + max_new_tokens - 1, config.block_size)
        if slots > model.max_seq_length or B > model.max_batch_size:
            drafts = speculation.longest_round if speculation else 0
            model.setup_caches(B, cache_slots(slots + drafts, config))
            cached = 0  # the new cache is empty
        tokens = _tokens_of_fast(model, prompt, ends, new_noise, sampling, cached, prefill, decode_step)
    else:
        tokens = _tokens_of_reference(model, prompt, ends, new_noise, sampling)

    if speculation:
        if not hasattr(model, "setup_caches"):
            raise ValueError("speculation needs a model with a cache; the reference has none")
        waiting = [deque() for _ in range(B)]  # ids that a row has before the others
        rounds = _rounds(
            model, speculation, prompt, lengths, new, sampling, eos_ids, cached, draw, prefill, decode_step
        )
        for new_ids, running in rounds:
            if any(-1 in ids for ids in new_ids):
                raise FloatingPointError(why_not_finite(model, *speculation.models))
            for queue, ids in zip(waiting, new_ids, strict=True):
                queue.extend(ids)
            while any(waiting) and all(queue or not run for queue, run in zip(waiting, running, strict=True)):
                yield [queue.popleft() if queue else None for queue in waiting]
        return

    running = [True] * B
    for done, ids in enumerate(_to_host(islice(tokens, max(new)), on_gpu=device.type == "cuda"), start=1):
        if any(run and id < 0 for id, run in zip(ids, running, strict=True)):
            raise FloatingPointError(why_not_finite(model))
        yield [id if run else None for id, run in zip(ids, running, strict=True)]
        running = [run and id not in eos_ids and done < n for id, run, n in zip(ids, running, new, strict=True)]
        if not any(running):
            return


# --- The command line -------------------------------------------------------------------------------------------------


class Answer:
    """One row's ids and text as they grow; text that may turn out to begin a stop string is held back.

    `stop_reason` is None, then "eos", "stop" (a stop string) or "length" (max_new_tokens, or the context is full). A
    stop string that is a special token, which no text shows, stops at its id.
    """

    def __init__(self, prompt_ids, tokenizer, eos_ids, stop, goes_on: bool):
        self.prompt_ids, self.token_ids, self.stop_reason = prompt_ids, [], None
        self.stop_ids = {
            id for string in stop if tokenizer and (id := tokenizer.token_id(string)) in tokenizer.special_ids
        }
        self.stream, self.text = (tokenizer.stream(), "") if tokenizer else (None, None)
        for id in prompt_ids if self.stream and goes_on else ():
            self.stream.push(id)  # a text that goes on keeps its first space; a chat's answer begins without
        self.eos_ids, self.stop, self.shown = eos_ids, stop, 0

    def push(self, id: int) -> str:
        """Take the next id; returns the text that can be shown now."""
        self.token_ids.append(id)
        if id in self.eos_ids:
            self.stop_reason = "eos"
        elif id in self.stop_ids:
            self.stop_reason = "stop"
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
    tp.print0(*words, file=sys.stderr, flush=True)


def default_dtype(device: str, state_dict: dict) -> torch.dtype:
    """The checkpoint's own, on an NVIDIA GPU bfloat16 for a float32 one, which is twice as fast there.

    On a CPU it is float32, which agrees with the reference to the last digits (bfloat16 is faster). With int4 weights
    it is bfloat16 on a CPU: PyTorch has its fast product for that dtype alone.
    """
    if device != "cpu":
        stored = state_dict["transformer.wte.weight"].dtype
        halves = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if stored == torch.float32 and halves else stored
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


def compilations() -> int:
    """Graphs and kernels that this process has built by now."""
    kernels = 0 if gpu_kernels is None else gpu_kernels.variants_built()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] + kernels


def pad(rows: list[list[int]], device: str) -> tuple[torch.Tensor, list[int]]:
    """The rows' ids [B, T], padded on the right with 0, and the length of each."""
    prompt = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return prompt.to(device), [len(row) for row in rows]


@torch.no_grad()
def warm_prefill(prefill, model, compiled: bool) -> None:
    """Prefill as many tokens as each variant of a kernel is for, at the cache's beginning and after other tokens."""
    device, batch, window = model.wte.weight.device, model.max_batch_size, model.config.sliding_window
    for length in (1, 2, 12, 40, 70, *([window + 1] if window and compiled else [])):
        if length < model.max_seq_length:
            ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
            prefill(model, ids, None, ids[:, 0])
            prefill(model, ids, torch.arange(1, length + 1, device=device).expand(batch, -1), ids[:, 0])


def warm_up(
    model, rows, max_new_tokens, sampling, steps: dict, device: str, speculation=None, any_length=False
) -> dict:
    """Take the first steps, so that no figure of the run contains compilation or lazy loading; their time and kind.

    A speculation that adapts gets the costs of its rounds. With `any_length` prompts of other lengths will follow.
    """
    if steps:
        say("compiling the model into kernels for this machine; the next run finds them in the compiler's cache")
    start, hits = time.perf_counter(), compiler_cache_hits()
    prompt, lengths = pad(rows, device)
    with torch._dynamo.config.patch(recompile_limit=32):  # 8 by default, for all models that one function is given
        if any_length and (device != "cpu" or "prefill" in steps) and hasattr(model, "setup_caches"):
            warm_prefill(steps.get("prefill", prefill), model, "prefill" in steps)
        for _ in generate(model, prompt, min(max_new_tokens, 3), sampling, **steps, lengths=lengths):
            pass
        if speculation:
            step = steps.get("decode_step", decode_step)
            costs = round_costs(model, speculation, prompt, lengths, sampling, step, device)
            for draft in speculation.models if any_length or speculation.k is None else ():
                warm_prefill(speculation.prefill, draft, "prefill" in steps)
    seconds, kind = time.perf_counter() - start, "from cache" if compiler_cache_hits() > hits else "cold"
    figures = {}
    if steps:
        say(f"compiled in {seconds:.1f} s ({kind})")
        figures |= {"compile_seconds": seconds, "compile_kind": kind}
    if speculation:
        costs = tp.objects_of_ranks(costs)[0]  # what `auto` decides, all ranks decide
        speculation.costs = costs
        say(
            "a round's cost in plain steps: "
            + ", ".join(f"{costs[k] / costs[0]:.2f} for {k} drafts" for k in costs if k)
        )
        figures["round_seconds"] = costs
    return figures


@torch.no_grad()
def round_costs(model, speculation, prompt, lengths, sampling, decode_step, device: str, samples: int = 5) -> dict:
    """{k: seconds} of a round of k drafts after the prompts [B, T], which are in the caches; of k = 0, a plain step.

    The median of some samples. What does not fit into the context is left out.
    """
    B, vocab_size = len(lengths), model.config.vocab_size
    room = speculation.start(prompt, lengths, 0, model.max_seq_length, [[0, 0]] * B)  # of these there is a continuation
    token, input_pos = copied(prompt[:, -1:]), torch.tensor(lengths, device=prompt.device)[:, None]
    ones = None if sampling.greedy else torch.ones(B, vocab_size, device=prompt.device)

    def play(k, all_kept):
        if k == 0:
            return decode_step(model, token, input_pos, ones, sampling)
        speculation.advance(k, [k * all_kept], token, [[]] * B)
        drafts, proposed = speculation.propose(
            token, input_pos, lengths, [True] * B, k, [ones] * k, sampling, vocab_size
        )
        uniform = None if ones is None else copied(ones[:, :k])
        return speculation.verify(model, torch.cat([token, drafts], 1), input_pos, proposed, uniform, ones, sampling)

    choices = speculation.CHOICES if speculation.k is None else (speculation.k,)
    seconds = {k: [] for k in (0, *choices) if max(lengths) + k < room}
    for i in range(samples + 3):  # the first ones compile, or record; and in turn, since a machine may slow down
        for k in seconds:
            plays = 1 if k else 4  # the host waits for each round, and not for each plain step
            synchronize(device)
            start = time.perf_counter()
            for _ in range(plays):
                play(k, all_kept=i != 1)  # then the draft model has one token more to see
            synchronize(device)
            seconds[k].append((time.perf_counter() - start) / plays)
    return {k: statistics.median(times[3:]) for k, times in seconds.items()}


class Stopwatch:
    """The seconds that calls of functions take on a device, whether the host waits for them or not."""

    def __init__(self, device: str):
        self.device, self.spans = device, {}

    def mark(self):
        if self.device.startswith("cuda"):
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        synchronize(self.device)
        return time.perf_counter()

    def watch(self, name: str, function):
        """The same function; each call's time counts for `name`."""

        def watched(*args, **kwargs):
            start = self.mark()
            result = function(*args, **kwargs)
            self.spans.setdefault(name, []).append((start, self.mark()))
            return result

        return watched

    def read(self) -> dict[str, list[float]]:
        """{name: the seconds of each call} since the last reading."""
        spans, self.spans = self.spans, {}
        if not self.device.startswith("cuda"):
            return {name: [end - start for start, end in pairs] for name, pairs in spans.items()}
        synchronize(self.device)
        return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in spans.items()}


def load_draft(checkpoint_path: Path, tokenizer, vocab_size: int, device: str, int8_cache: bool):
    """A model to draft with, in its checkpoint's own precision. Raises ValueError if it speaks of other tokens."""
    config, state_dict = read_checkpoint(checkpoint_path)
    if tokenizer:
        check_vocabulary(tokenizer, find_tokenizer(checkpoint_path.parent, config.vocab_size, needed=True))
    elif config.vocab_size != vocab_size:
        sizes = f"{config.vocab_size} tokens, the model {vocab_size}"
        raise ValueError(f"the draft model has {sizes}; without tokenizers to compare, the numbers have to be the same")
    draft = build_model(config, state_dict, device, default_dtype(device, state_dict))
    if int8_cache:
        draft.setup_caches(1, 1, int8=True)  # of this kind is the one that its first prompt makes, too
    return draft


def prepare_stdin() -> None:
    """Lines of any length, edited with the cursor keys, where a terminal is typed into; other bytes than UTF-8 stay."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  input() uses it once it is imported
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")


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


def run_once(model, answers, cached, max_new_tokens, sampling, seed, steps, device, show, speculation=None) -> dict:
    """Fill the answers, one a batch row, and return the figures. `show` gets the first row's text as it comes."""
    prompt, lengths = pad([answer.prompt_ids for answer in answers], device)
    eos_ids = answers[0].eos_ids
    times, built = [], compilations()
    start = time.perf_counter()
    for ids in generate(
        model,
        prompt,
        max_new_tokens,
        sampling,
        eos_ids,
        seed,
        cached,
        **steps,
        lengths=lengths,
        speculation=speculation,
    ):
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
    rows, seconds = len(answers), times[-1] - times[0]
    steps_taken = len(speculation.rounds) if speculation else len(times) - 1
    decoded = sum(len(answer.token_ids) for answer in answers) - rows  # the first of each row belongs to the prefill
    built = compilations() - built
    measured = steps_taken and not built
    return {
        "prompt_tokens": sum(lengths),
        "cached_tokens": cached,
        "time_to_first_token_seconds": times[0],
        "prefill_tokens_per_second": None if built else (sum(lengths) - cached * rows) / times[0],
        "decode_steps": steps_taken,
        "decode_steps_per_second": steps_taken / seconds if measured else None,
        "decode_tokens_per_second": decoded / seconds if measured else None,
        "compilations": built,  # inside the answer, where there should be none
    }


def speculation_figures(speculation, calls: dict[str, list[float]]) -> dict:
    """What came of the drafts; `calls` are the seconds of each draft step and verification."""
    rounds = [(k, kept) for k, kept in speculation.rounds if k]
    kept = [n for _, of_rows in rounds for n in of_rows]
    looked_at = sum(min(n + 1, k) for k, of_rows in rounds for n in of_rows)  # up to the first that was not kept
    return {
        "rounds": len(rounds),
        "plain_steps": len(speculation.rounds) - len(rounds),
        "draft_steps": len(calls.get("draft", ())),
        "acceptance": sum(kept) / looked_at if rounds else None,
        "kept_per_round": statistics.mean(kept) if rounds else None,
        "histogram": [kept.count(n) for n in range(max(kept, default=0) + 1)],
        "draft_seconds_per_round": sum(calls.get("draft", ())) / len(rounds) if rounds else None,
        "verify_seconds_per_round": sum(calls.get("verify", ())) / len(rounds) if rounds else None,
    }


def report(run: dict, step_bytes: int, draft_bytes: int, bandwidth: float) -> None:
    """Print the figures of one run. The README says what each one means."""
    if run["compilations"]:
        say(
            f"not measured: the compiler ran {run['compilations']} times inside this answer, so its figures would be "
            "false; please report this with the command"
        )
        return
    milliseconds = run["time_to_first_token_seconds"] * 1e3
    fresh = run["prompt_tokens"] - run["cached_tokens"]
    say(f"prefill: {fresh} tokens, {run['prefill_tokens_per_second']:.1f} tokens/s, {milliseconds:.0f} ms to the first")
    if run["decode_steps"]:
        step_bytes += draft_bytes * run.get("draft_steps", 0) / run["decode_steps"]
        used = step_bytes * run["decode_steps_per_second"]
        ranks = tp.rank_and_count()[1]
        say(
            f"decode:  {run['decode_steps']} steps, {run['decode_tokens_per_second']:.2f} tokens/s, "
            f"{step_bytes / 1e6:.0f} MB read a step{' by each rank' * (ranks > 1)}: {used / 1e9:.1f} GB/s, "
            f"{used / bandwidth:.0%} of the {bandwidth / 1e9:.1f} GB/s measured here"
        )
    if "rounds" in run:
        say(f"drafts:  {run['rounds']} of these steps were rounds with drafts, {run['plain_steps']} plain ones")
    if run.get("rounds"):
        say(
            f"         {run['acceptance']:.0%} of the drafts looked at were kept, {run['kept_per_round']:.2f} a round; "
            f"rounds that kept 0, 1, ...: {' '.join(map(str, run['histogram']))}"
        )
        drafting, verifying = run["draft_seconds_per_round"] * 1e3, run["verify_seconds_per_round"] * 1e3
        say(f"         a round took {drafting:.2f} ms for drafts, {verifying:.2f} for the verification")
    if run.get("plain_tokens_per_second"):
        times = run["decode_tokens_per_second"] / run["plain_tokens_per_second"]
        same = {True: ", the same text", False: ", another text", None: ""}[run["plain_text_is_the_same"]]
        say(
            f"plain:   {run['plain_tokens_per_second']:.2f} tokens/s without drafts, so {times:.2f} times as fast{same}"
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
    draft_checkpoint_path: Path | None,
    prompt_lookup: bool,
    speculate_k: int | str | None,
    ngram: int,
    compare: bool,
    profile: Path | None,
    json_path: Path | None,
) -> None:
    sampling = Sampling(temperature, top_k, top_p)
    rank, ranks = tp.rank_and_count()
    if reference and ranks > 1:
        raise ValueError("--reference runs model.py, which is not split among ranks; start it without torchrun")
    if reference and (compile or compile_prefill):
        raise ValueError("--reference runs model.py, which is not compiled; leave out --compile")
    if reference and kv_cache:
        raise ValueError("--reference runs model.py, which has no cache; leave out --kv_cache")
    if interactive and batch_size > 1:
        raise ValueError("--interactive holds one conversation; leave out --batch_size")
    if prompt_file and (prompt is not None or interactive or batch_size > 1):
        raise ValueError("--prompt_file gives every row its prompt; leave out --prompt, --interactive and --batch_size")
    speculates = prompt_lookup or draft_checkpoint_path is not None
    if prompt_lookup and draft_checkpoint_path:
        raise ValueError("drafts come from one place; leave out --prompt_lookup or --draft_checkpoint_path")
    if (speculate_k or compare) and not speculates:
        raise ValueError("--speculate_k and --compare need drafts; add --prompt_lookup or --draft_checkpoint_path")
    if reference and speculates:
        raise ValueError("--reference runs model.py, which has no cache for drafts; leave out the drafts")
    if compare and interactive:
        raise ValueError("--compare answers a prompt twice, which is no conversation; leave out --interactive")
    if "" in stop:
        raise ValueError("--stop needs strings of at least one character")
    for file in filter(None, (json_path, profile)):
        check_target(file)
    check_device(device)
    prompt = "Hello, my name is" if prompt is None else prompt
    prompts = read_prompts(prompt_file) if prompt_file else {"the prompt": prompt}
    config, state_dict = read_checkpoint(checkpoint_path)
    bandwidth = read_bandwidth(device)
    start = time.perf_counter()
    if ranks > 1:
        tp.check_agreement({"model": tp.fingerprint(config, state_dict)})
    if quantize:
        config, state_dict = quantize_model(config, state_dict, quantize, group_size, rank, ranks)
    else:
        state_dict = tp.shard(state_dict, config, rank, ranks)
    dtype = DTYPES[precision] if precision else default_dtype(device, state_dict)
    if device != "cpu" and not precision and dtype != state_dict["transformer.wte.weight"].dtype:
        say(f"{checkpoint_path} is in float32 and is computed in bfloat16 here; --precision float32 keeps it")
    model = build_model(config, state_dict, device, dtype, reference, rank, ranks)
    synchronize(device)
    load_seconds = time.perf_counter() - start

    synthetic = prompt.isdecimal() and not interactive and not prompt_file
    tokenizer = find_tokenizer(checkpoint_path.parent, config.vocab_size, needed=not synthetic)
    if draft_checkpoint_path:
        draft = load_draft(draft_checkpoint_path, tokenizer, config.vocab_size, device, kv_cache == "int8")
    eos_ids = tokenizer.eos_ids if tokenizer and not ignore_eos else frozenset()
    for name in map(tokenizer.piece, tokenizer.special_ids) if tokenizer else ():
        if inside := [string for string in stop if name in string and name != string]:
            raise ValueError(
                f"--stop {inside[0]!r} holds {name!r}, a special token, which no text shows; give it alone"
            )

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
        if chat and len(messages) > 1 and tokens > slots:
            raise ValueError(f"the conversation has {tokens} tokens, the cache {slots} slots; /reset begins anew")
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
    longest_round = 0 if not speculates else Speculation.CHOICES[-1] if speculate_k == "auto" else speculate_k or 5
    slots = max_seq_length or (
        INTERACTIVE_SLOTS if interactive else max(map(len, rows)) + max_new_tokens - 1 + longest_round
    )
    slots = cache_slots(slots, config)
    if ranks > 1:  # what decides where a rank ends
        pieces = tokenizer and [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]
        draft_config = draft.config if draft_checkpoint_path else None
        same = {"prompt": rows, "tokenizer": pieces, "set of end tokens": sorted(eos_ids), "draft model": draft_config}
        tp.check_agreement(same)
    messages, samples, runs, in_cache = [], [], [], []
    for name, ids in zip(prompts, rows, strict=False):  # with --batch_size the rows are alike
        check_room(len(ids), name)

    figures = {"load_seconds": load_seconds}
    steps = {}
    if compile:
        steps["decode_step"] = torch.compile(
            decode_step, fullgraph=True, dynamic=False, options=compile_options(device)
        )
    if compile_prefill:
        steps["prefill"] = compiled_prefill()
    if not reference:
        model.setup_caches(len(rows), slots, int8=kv_cache == "int8")
    speculation, stopwatch, draft_bytes = None, Stopwatch(device), 0
    if speculates:
        k = None if speculate_k == "auto" else speculate_k or 5
        settings = {"fullgraph": True, "dynamic": False, "options": compile_options(device)}
        verify_step, step = (torch.compile(f, **settings) if compile else f for f in (verify, draft_step))
        options = {"verify": stopwatch.watch("verify", verify_step), "costs": {}}
        if prompt_lookup:
            speculation = PromptLookup(k, ngram, **options)
        else:
            options |= {
                "step": stopwatch.watch("draft", step),
                "prefill": compiled_prefill() if compile_prefill else prefill,
            }
            speculation = DraftModel(draft, k, **options)
    figures |= warm_up(model, rows, max_new_tokens, sampling, steps, device, speculation, any_length=interactive)
    step_bytes = bytes_per_step(model)
    if draft_checkpoint_path:
        draft_bytes = bytes_per_step(draft)

    def show(text: str) -> None:
        if not prompt_file:  # whose rows are all printed at the end
            tp.print0(text, end="", flush=True)

    if interactive:
        prepare_stdin()

    def read_line() -> str | None:
        """What rank 0's user types, on every rank; None at the end."""
        line = None
        if rank == 0:
            with suppress(EOFError):
                line = input("> ")
        return tp.objects_of_ranks(line)[0]

    finished = False
    try:
        with torch.profiler.profile() if profile else nullcontext() as profiler:
            while interactive or len(runs) < num_samples:
                if interactive:
                    line = read_line()
                    if line is None:
                        break
                    if line.strip() == "/reset":
                        messages.clear()
                        continue
                    messages.append({"role": "user", "content": line})
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
                samples += answers
                new = max_new_tokens
                if slots < config.block_size:  # else generate() ends each row at its own last slot
                    new = min(new, slots - max(map(len, rows)) + 1)
                first = seed + len(rows) * len(runs)  # row r has the seed first + r
                stopwatch.read()
                runs.append(run_once(model, answers, cached, new, sampling, first, steps, device, show, speculation))
                if speculation:
                    runs[-1] |= speculation_figures(speculation, stopwatch.read())
                show("\n")
                texts = prompts.values() if prompt_file and not chat else [""] * len(rows)
                for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
                    if row > 0 or prompt_file:
                        tp.print0(f"[row {row}] {text}{answer.text}")
                if compare:
                    again = [Answer(ids, tokenizer, eos_ids, stop, goes_on=not chat) for ids in rows]
                    plain = run_once(model, again, cached, new, sampling, first, steps, device, lambda text: None)
                    runs[-1]["plain_tokens_per_second"] = plain["decode_tokens_per_second"]
                    same = [a.token_ids for a in again] == [a.token_ids for a in answers]
                    runs[-1]["plain_text_is_the_same"] = same if sampling.greedy else None
                report(runs[-1], step_bytes, draft_bytes, bandwidth)
                if interactive:  # what the cache holds now; the last token was never fed
                    in_cache = rows[0] + answers[0].token_ids[:-1]
                    messages.append({"role": "assistant", "content": answers[0].text})
        finished = True
    finally:  # after Ctrl-C or an error too, the figures and texts that there are
        memory = max(tp.objects_of_ranks(peak_memory(device))) if finished else peak_memory(device)
        figures |= {"peak_memory_bytes": memory, "bytes_per_step": step_bytes, "ranks": ranks}
        figures |= {"read_bandwidth_bytes_per_second": bandwidth}
        if json_path and rank == 0 and (samples or finished):
            setting = {"device": device, "precision": str(dtype).removeprefix("torch."), "torch": torch.__version__}
            names = ("prompt_ids", "token_ids", "text", "stop_reason")
            entries = [{name: getattr(answer, name) for name in names} for answer in samples]
            write_json(json_path, {"samples": entries, "runs": runs, **figures, **setting})
    say(f"memory:  {memory / 1e9:.2f} GB at most{' on a rank' * (ranks > 1)}, loaded in {load_seconds:.1f} s")
    rates = [run["decode_tokens_per_second"] for run in runs if run["decode_tokens_per_second"]]
    if len(rates) > 1:
        say(f"median:  {statistics.median(rates):.2f} tokens/s, from {min(rates):.2f} to {max(rates):.2f}")
    if profile and rank == 0:
        with written_in_place(profile) as temporary:  # the profiler only logs what it could not write
            profiler.export_chrome_trace(str(temporary))


def positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:20]) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0 and below 2**31")
    return int(text)


def seed_number(text: str) -> int:
    """A seed, so that as many rows and answers as anybody makes can count on from it in 64 bits."""
    if not text.removeprefix("-").isdecimal() or not -(2**62) <= int(text[:30]) <= 2**62:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from -2**62 to 2**62")
    return int(text)


def draft_count(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Generate text from a checkpoint.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, its tokenizer in the same folder")
    add("--prompt", help="text, or a whole number for that many random tokens; default: Hello, my name is")
    add("--prompt_file", type=Path, metavar="FILE", help="UTF-8, one prompt a line, all in one batch")
    add("--interactive", action="store_true", help="read prompts from the terminal, one a line; /reset ends a chat")
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
    add("--seed", type=seed_number, default=1234, help="of the first answer; each row and sample takes the next")
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
    add("--draft_checkpoint_path", type=Path, help="a smaller model with the same tokenizer, whose drafts are verified")
    add("--prompt_lookup", action="store_true", help="drafts are what followed the last tokens earlier in the text")
    add("--speculate_k", type=draft_count, metavar="K", help="drafts in a round, or auto; default: 5")
    add("--ngram", type=positive, default=3, help="tokens that --prompt_lookup looks for, at most")
    add("--compare", action="store_true", help="generate once more without drafts, for the speed")
    add("--profile", type=Path, metavar="FILE", help="write a Chrome trace")
    add("--json", type=Path, dest="json_path", metavar="FILE", help="write samples and figures for other programs")
    return parser.parse_args()


if __name__ == "__main__":
    tp.run(main, parse_arguments())
