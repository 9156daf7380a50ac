"""Speculation: drafts of several tokens, verified by one pass of the model, so that the text keeps its distribution.

A `Speculation` is what `generate()` asks for tokens, as `Steps(speculation=...)`. Decisions to know:

- It goes in rounds: k drafts, of a smaller model or of the text itself, then one pass of the model over all of them.
- The host reads one tensor a round, and on a GPU one for up to eight plain steps. All drafts of a round are one CUDA
  graph there.
- A rejected draft's cache slot is overwritten before it comes into view.
- `Auto` takes the k that the running acceptance promises most of, and plain steps where no k pays.
- Drafts come from one class each. `start` begins a text; then in each round `propose`, if it has drafts, and `advance`.

Copy me: needs torch, and `decode.py` and `runtime.py` beside it.

Shapes: B batch rows, k drafts of a round, V vocabulary.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from decode import (
    Recorded,
    Sampling,
    Text,
    check_length,
    compiled_step,
    copied,
    draw,
    first_token,
    likeliest,
    prefill,
    sample,
    to_probabilities,
    why_not_finite,
)
from runtime import synchronize

# --- One round --------------------------------------------------------------------------------------------------------


def draft_step(draft, token, input_pos, noise, sampling: Sampling, vocab_size: int):
    """What a draft proposes after the tokens `token` [B, n], which stand at `input_pos` [B, n].

    Returns a token [B, 1], the logits [B, V] it came from, of the model's `vocab_size` tokens, None if greedy, and its
    position [B, 1].
    """
    known = draft.config.vocab_size  # embeddings that are padded differently have the same tokens
    logits = draft(token.clamp(0, known - 1), input_pos)[:, -1, :vocab_size]
    logits = torch.nn.functional.pad(logits, (0, max(0, vocab_size - known)), value=float("-inf"))
    following = (input_pos[:, -1:] + 1).clamp(max=draft.max_seq_length - 1)
    return sample(logits, noise, sampling), None if sampling.greedy else logits, following


def draft_tokens(draft, token, input_pos, noise, k: int, sampling: Sampling, vocab_size: int, step=draft_step):
    """k drafts [B, k], one `step` after another, from `token` [B, 1 or 2] on.

    The last token is at `input_pos` [B, 1]. Two tokens in one step cost little more than one. Returns the drafts and
    the logits [B, k, V] they came from, None if greedy. `noise` [k or more, B, V] is Exp(1), None if greedy.
    """
    input_pos = input_pos.clamp(max=draft.max_seq_length - 1)  # of a row that has ended
    if token.shape[1] == 2:
        input_pos = torch.cat([input_pos - 1, input_pos], dim=1)
    drafts, logits = [], []
    for i in range(k):
        of_step = None if noise is None else noise[i]
        token, its_logits, input_pos = step(draft, token, input_pos, of_step, sampling, vocab_size)
        drafts.append(token)
        logits.append(its_logits)
    return torch.cat(drafts, dim=1), None if sampling.greedy else torch.stack(logits, dim=1)


def compiled_drafts(device: str):
    """`draft_tokens` whose steps take the host little time; where one is a CUDA graph, all of a round are one graph."""
    step = compiled_step(draft_step, device)
    if isinstance(step, Recorded):
        return Recorded(partial(draft_tokens, step=step.function))
    return partial(draft_tokens, step=step)


def accept(logits, drafts, proposed, uniform, noise, sampling: Sampling):
    """How many of the `drafts` [B, k] are accepted, [B, 1], and the token [B, 1] that follows those.

    `logits` [B, k + 1, V] are the model's before, between and after the drafts; `proposed` [B, k, V] are the
    probabilities from which the drafts came, None if they were certain; `uniform` [B, k] and the Exp(1) `noise` [B, V]
    are random. Draft d is accepted with probability min(1, p(d) / q(d)). In place of the first that is rejected comes
    one from max(0, p - q), normalized, so that the tokens have the distribution p (Leviathan et al. 2023,
    arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318). If all are accepted, p alone gives the one after them. The
    token is -1 where p or q is not finite.
    """
    if sampling.greedy:
        best = likeliest(logits)[..., 0]  # [B, k + 1]
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
    return count, draw(rest, noise)


def verify(model, tokens, input_pos, proposed, uniform, noise, sampling: Sampling):
    """One pass over `tokens` [B, k + 1], the last of the text and k drafts, from the position `input_pos` [B, 1] on.

    `proposed` [B, k, V] are the logits from which the drafts came, None if they were certain.

    Returns the next round's first token [B, 1], its position, the token before it, and for the host [B, k + 2]: the new
    ids, of which the first n + 1 are of use, and n, the number of accepted drafts.
    """
    k = tokens.shape[1] - 1
    tokens = model.from_rank_0(tokens).clamp(min=0)  # each rank has a draft model of its own
    input_pos = input_pos.clamp(max=model.max_seq_length - 1 - k)  # a row that has ended is computed with the others
    logits = model(tokens, input_pos + torch.arange(k + 1, device=tokens.device))
    drafts = tokens[:, 1:]
    q = None if proposed is None else to_probabilities(proposed, sampling)
    accepted = torch.cat(accept(logits, drafts, q, uniform, noise, sampling), dim=1)
    count, following = model.from_rank_0(accepted).split(1, dim=1)
    ids = torch.cat([drafts, following], dim=1).scatter(1, count, following)
    return following, input_pos + count + 1, tokens.gather(1, count), torch.cat([ids, count], dim=1)


# --- How many drafts --------------------------------------------------------------------------------------------------


class Fixed:
    """The same number of drafts in every round."""

    def __init__(self, k: int):
        self.k = self.longest = k

    def start(self) -> None:
        pass

    def choose(self, most: int) -> tuple[int, int]:
        return self.k, 1

    def record(self, k: int, accepted: list[int]) -> None:
        pass


class Auto:
    """0 drafts (a plain step), 2, 5 or 10: as many as the running acceptance promises most of.

    `costs` are the seconds, in any unit, of a round of each k, as `round_costs` measures them. `catch_up` are those in
    which a draft model sees 256 tokens that it has missed; after a longer pause it may need more.
    """

    CHOICES = (2, 5, 10)
    longest = CHOICES[-1]

    def __init__(self, costs: dict[int, float], catch_up: float = 0.0):
        self.costs, self.catch_up = costs, catch_up
        self.start()

    def start(self) -> None:
        """A new text begins, of which nothing is known."""
        self.accepted, self.checked = 1.6, 2.0  # drafts; both fade with each round
        self.rest, self.pauses, self.probes, self.trying = 0, 0, 2, False

    def choose(self, most: int) -> tuple[int, int]:
        """The next round's k, and how many such rounds are certain by now: up to `most`, if they are plain steps."""
        self.trying = False
        if all(k + 1 <= cost / self.costs[0] for k, cost in self.costs.items() if k):
            return 0, most  # not even if every draft were accepted
        if self.rest:
            steps = min(self.rest, most)
            self.rest -= steps
            self.probes = 2
            return 0, steps
        rate = self.accepted / self.checked
        speed = {k: sum(rate**i for i in range(k + 1)) / cost for k, cost in self.costs.items()}
        best = max(speed, key=speed.get)
        if best:
            self.pauses = 0
        elif self.probes:
            best, self.trying = self.CHOICES[0], True
        else:  # it does not pay: plain steps for 50 times as long as a try, so that two tries are little
            try_in_steps = (self.costs[self.CHOICES[0]] + self.catch_up) / self.costs[0]
            self.rest = round(50 * try_in_steps * 2 ** min(self.pauses, 3)) - 1
            self.pauses += 1
            self.accepted, self.checked = 2 * rate, 2.0  # so that the next try counts
        return best, 1

    def record(self, k: int, accepted: list[int]) -> None:
        """A round of k drafts has ended in which each row that still ran accepted so many."""
        if k:
            self.probes -= self.trying  # a lookup that found nothing was no try
            self.accepted = 0.9 * self.accepted + sum(accepted)
            self.checked = 0.9 * self.checked + sum(min(n + 1, k) for n in accepted)


# --- Where drafts come from -------------------------------------------------------------------------------------------


class DraftModel:
    """Drafts of a smaller model, a FastGPT with the same tokens. Both functions may be compiled versions."""

    certain = False  # the drafts come with logits

    def __init__(self, model, draft_tokens=draft_tokens, prefill=prefill):
        self.model, self.draft_tokens, self.prefill = model, draft_tokens, prefill
        self.seen = 0  # leading tokens that are in its cache
        self.missed = None  # [B, n], the last tokens that it has not seen

    @property
    def models(self) -> tuple:
        return (self.model,)

    def start(self, text: Text, slots: int, rows) -> int:
        """Fill the draft's cache with the prompts; returns how many slots it has.

        Raises ValueError if a prompt is longer than its context.
        """
        draft, prompt, (B, T) = self.model, text.prompt, text.prompt.shape
        check_length(T, draft.config.block_size, "for the draft model the prompt")
        slots = min(slots, draft.config.block_size)
        if slots > draft.max_seq_length or B > draft.max_batch_size:
            draft.setup_caches(B, slots)
            self.seen = 0
        cached = min(text.cached, self.seen)
        self._fill(prompt[:, cached:], torch.full_like(prompt[:, :1], cached) if cached else None)
        self.missed, self.seen = prompt[:, :0], min(text.lengths)
        return draft.max_seq_length

    def _fill(self, ids, first) -> None:
        input_pos = None if first is None else first + torch.arange(ids.shape[1], device=ids.device)
        ids = ids.clamp(0, self.model.config.vocab_size - 1)
        self.prefill(self.model, ids, input_pos, torch.zeros_like(ids[:, 0]))

    @torch.no_grad()
    def catch_up_seconds(self, samples: int = 3) -> float:
        """How long it takes to see 256 tokens that it has missed: the least. What its cache held is lost."""
        device, times = next(self.model.parameters()).device, []
        shape = (self.model.max_batch_size, min(256, self.model.max_seq_length))
        for _ in range(1 + samples):  # the first one builds kernels
            start = time.perf_counter()
            self._fill(torch.zeros(shape, dtype=torch.int64, device=device), None)
            synchronize(str(device))
            times.append(time.perf_counter() - start)
        self.seen = 0
        return min(times[1:])

    def propose(self, token, input_pos, progress, k, noise, sampling, vocab_size):
        """Drafts [B, k] after `token` [B, 1] at `input_pos`, and their logits [B, k, V], None if greedy."""
        missed = self.missed.shape[1]
        if missed > 1:
            self._fill(self.missed[:, :-1], input_pos.clamp(max=self.model.max_seq_length - 1) - missed)
        if missed:
            token = torch.cat([self.missed[:, -1:], token], dim=1)
        self.seen = 1 + progress.shortest
        noise = None if sampling.greedy else noise
        return self.draft_tokens(self.model, token, input_pos, noise, k, sampling, vocab_size)

    def advance(self, k, accepted, before, new_ids) -> None:
        """A round has ended: `before` [B, n] end with the text's last token but one, `new_ids` are new in each row."""
        if k == 0:
            self.missed = torch.cat([self.missed, before], dim=1)
        else:  # the last draft of all was never fed
            self.missed = before if k in accepted else before[:, :0]


class PromptLookup:
    """Drafts are what followed when prompt or answer had the last n tokens before; n from `longest` down to 1.

    The method is Saxena's "Prompt Lookup Decoding" (2023); copying from a reference is due to Yang et al. 2023,
    arXiv:2304.04487.
    """

    certain = True  # the drafts come without logits
    models = ()

    def __init__(self, *, longest: int = 3):
        self.longest = longest
        self.rows, self.found = [], []  # each row's ids, and where the latest continuation of each n-gram begins

    def catch_up_seconds(self) -> float:
        return 0.0

    def start(self, text: Text, slots: int, rows: list[list[int]]) -> int:
        """Begin with the ids of each row; returns `slots`, since it needs none of its own."""
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
        """k ids, or none. One that reaches the end of the text continues from its own beginning."""
        ids, found = self.rows[row], self.found[row]
        for n in range(min(self.longest, len(ids)), 0, -1):
            first = found.get(tuple(ids[-n:]))
            if first is not None:
                return [ids[first + i % (len(ids) - first)] for i in range(k)]
        return []

    def propose(self, token, input_pos, progress, k, noise, sampling, vocab_size):
        """Drafts [B, k] and None, or None if no row that still runs has any."""
        drafts = [self.continuation(row, k) if run else [] for row, run in enumerate(progress.running)]
        if not any(drafts):
            return None
        filled = torch.tensor([ids or [0] * k for ids in drafts])
        return filled.to(token.device, non_blocking=True), None

    def advance(self, k, accepted, before, new_ids) -> None:
        self.extend(new_ids)


# --- The rounds of a text ---------------------------------------------------------------------------------------------


class Progress:
    """Where each row of a text is: `position` is that of its last token."""

    def __init__(self, text: Text):
        self.text = text
        self.position = [length - 1 for length in text.lengths]
        self.done, self.running = [0] * len(text.new), [True] * len(text.new)

    @property
    def shortest(self) -> int:
        return min(at for at, run in zip(self.position, self.running, strict=True) if run)

    @property
    def most_new(self) -> int:
        """How many more tokens a row that runs may get."""
        rows = zip(self.text.new, self.done, self.running, strict=True)
        return max(new - done for new, done, run in rows if run)

    @property
    def longest(self) -> int:
        return max(at for at, run in zip(self.position, self.running, strict=True) if run)

    def take(self, new_ids: list[list[int]]) -> list[list[int]]:
        """The new ids of each row up to its end, which it may have come to."""
        taken = []
        for row, ids in enumerate(new_ids):
            ids = ids[: self.text.new[row] - self.done[row]] if self.running[row] else []
            end = next((i for i, id in enumerate(ids, 1) if id in self.text.eos_ids), None)
            taken.append(ids[:end])
            self.done[row] += len(taken[row])
            self.position[row] += len(taken[row])
            self.running[row] = self.running[row] and end is None and self.done[row] < self.text.new[row]
        return taken


@dataclass
class Speculation:
    """How a model takes several tokens at a time: `drafts` of DraftModel or PromptLookup, `count` a Fixed or an Auto.

    `verify` may be a compiled version. `history` lists, of the last text, k of each round and the number of drafts that
    each row which still ran accepted.
    """

    model: object
    sampling: Sampling
    drafts: DraftModel | PromptLookup
    count: Fixed | Auto
    verify: Callable = verify
    history: list = field(default_factory=list)

    @property
    def longest_round(self) -> int:
        return self.count.longest

    def rounds(self, text: Text, steps):
        """Yield, after each round, the new ids of each row, and which rows still run."""
        model = self.model
        token, input_pos = first_token(model, text, steps.prefill), text.ends[:, None]
        new_ids = token.tolist()
        rows = [row[:n] + ids for row, n, ids in zip(text.prompt.tolist(), text.lengths, new_ids, strict=True)]
        room = min(model.max_seq_length, self.drafts.start(text, model.max_seq_length, rows))
        progress = Progress(text)
        self.history, ahead = [], {}
        self.count.start()
        while True:
            new_ids = progress.take(new_ids)
            if any(-1 in ids for ids in new_ids):
                raise FloatingPointError(why_not_finite(model, *self.drafts.models))
            queued = None
            if text.device.type == "cuda" and any(progress.running):  # before somebody reads the ids
                queued = self._round(token, input_pos, progress, room, steps.decode_step, ahead)
            yield new_ids, list(progress.running)
            if not any(progress.running):
                return
            queued = queued or self._round(token, input_pos, progress, room, steps.decode_step, ahead)
            k, token, input_pos, before, read = queued
            new_ids = read.tolist()  # the host waits for the device here and nowhere else
            accepted, passes = [0] * len(new_ids), len(new_ids[0])
            if k:
                accepted, passes = [ids[-1] for ids in new_ids], 1
                new_ids = [ids[: n + 1] for ids, n in zip(new_ids, accepted, strict=True)]
            accepted = [n for n, run in zip(accepted, progress.running, strict=True) if run]
            self.history += [(k, accepted)] * passes
            self.count.record(k, accepted)
            self.drafts.advance(k, accepted, before, new_ids)

    def _round(self, token, input_pos, progress: Progress, room: int, decode_step, ahead: dict):
        """Queue a round, or some plain steps. On a GPU draw what the next one of the same k needs, while nobody waits.

        Returns k, the next round's first token, its position, the tokens before it that no draft model has seen, and
        what the host is to read.
        """
        model, sampling, text = self.model, self.sampling, progress.text
        most = min(8, progress.most_new) if token.is_cuda else 1  # plain steps that the host looks at together
        (k, steps), drafts = self.count.choose(most), None
        if k >= room - progress.longest:
            k, steps = 0, most
        draw = partial(text.draw, 1 if self.drafts.certain else k + 1, k)
        noise, uniform = ahead.pop(k, None) or draw()
        if k:
            drafts = self.drafts.propose(token, input_pos, progress, k, noise, sampling, text.vocab_size)
        if drafts is None:
            tokens, at = [token], input_pos.clamp(max=model.max_seq_length - 1)
            for step in range(steps):
                noise = text.draw()[0] if step else noise
                token, at = map(copied, decode_step(model, token, at, noise[-1], sampling))
                tokens.append(token)
            queued = 0, token, at, torch.cat(tokens[:-1], dim=1), torch.cat(tokens[1:], dim=1)
        else:
            ids = torch.cat([token, drafts[0]], dim=1)
            following, at, before, read = self.verify(model, ids, input_pos, drafts[1], uniform, noise[-1], sampling)
            queued = k, copied(following), copied(at), copied(before), read
        ahead.clear()
        if token.is_cuda:
            ahead[k] = draw()
        return queued

    def figures(self, calls: dict[str, list[float]]) -> dict:
        """What came of the drafts of the last text; `calls` are the seconds of each round's drafts and verification."""
        rounds = [(k, accepted) for k, accepted in self.history if k]
        accepted = [n for _, of_rows in rounds for n in of_rows]
        checked = sum(min(n + 1, k) for k, of_rows in rounds for n in of_rows)  # up to the first that was rejected
        return {
            "rounds": len(rounds),
            "plain_steps": len(self.history) - len(rounds),
            "draft_steps": 0 if self.drafts.certain else sum(k for k, _ in rounds),
            "acceptance": sum(accepted) / checked if rounds else None,
            "kept_per_round": statistics.mean(accepted) if rounds else None,
            "histogram": [accepted.count(n) for n in range(max(accepted, default=0) + 1)],
            "draft_seconds_per_round": sum(calls.get("draft", ())) / len(rounds) if rounds else None,
            "verify_seconds_per_round": sum(calls.get("verify", ())) / len(rounds) if rounds else None,
        }


@torch.no_grad()
def round_costs(speculation: Speculation, text: Text, decode_step, choices=Auto.CHOICES, samples: int = 5) -> dict:
    """{k: seconds} of a round of each k of the `choices` after the prompts, which are in the caches; k = 0 is a plain
    step.

    The median of some samples. What does not fit into the context is left out.
    """
    model, sampling, drafts, vocab_size = speculation.model, speculation.sampling, speculation.drafts, text.vocab_size
    B, device = len(text.lengths), str(text.device)
    room = drafts.start(text, model.max_seq_length, [[0, 0]] * B)  # of these there is a continuation
    token, input_pos, progress = copied(text.prompt[:, -1:]), text.ends[:, None], Progress(text)
    ones = None if sampling.greedy else torch.ones(B, vocab_size, device=text.device)

    def play(k, all_accepted):
        if k == 0:
            return decode_step(model, token, input_pos, ones, sampling)
        drafts.advance(k, [k * all_accepted], token, [[]] * B)
        noise = None if ones is None else ones.expand(k + 1, -1, -1)
        ids, proposed = drafts.propose(token, input_pos, progress, k, noise, sampling, vocab_size)
        uniform = None if ones is None else copied(ones[:, :k])
        return speculation.verify(model, torch.cat([token, ids], 1), input_pos, proposed, uniform, ones, sampling)

    seconds = {k: [] for k in (0, *choices) if max(text.lengths) + k < room}
    for i in range(samples + 3):  # the first ones compile, or record; and in turn, since a machine may slow down
        for k in seconds:
            plays = 1 if k else 4  # the host waits for each round, and not for each plain step
            synchronize(device)
            start = time.perf_counter()
            for _ in range(plays):
                play(k, all_accepted=i != 1)  # then the draft model has one token more to see
            synchronize(device)
            seconds[k].append((time.perf_counter() - start) / plays)
    return {k: statistics.median(times[3:]) for k, times in seconds.items()}
