"""The command: text from a checkpoint.

    python generate.py --checkpoint_path checkpoints/NAME/model.pth --prompt "Hello, my name is" --compile

It reads the arguments, makes a `Session`, answers, and reports. Decisions to know:

- Text goes to stdout, the figures of the run to stderr. `--json` has both.
- All compiling happens at the start. An answer in which something was compiled after all gets no figures.
- After Ctrl-C or an error `--json` still gets what there is, under torchrun only if all ranks have the error.
- Under torchrun every rank does all of this with its part of the model, and takes rank 0's tokens. Rank 0 prints.

Copy me: needs torch, and `model.py`, `fast_model.py`, `quantized_linear.py`, `cpu_kernels.py`, `tp.py`, `runtime.py`,
`decode.py`, `speculate.py`, `checkpoint.py` and `tokenizer.py` beside it, with its libraries; for speed on a GPU
`gpu_kernels.py`, `gpu_matvec.py` and `gpu_products.py`.

Shapes: B batch rows, T prompt tokens.
"""

import argparse
import signal
import statistics
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import cpu_kernels
import tp
from checkpoint import DTYPES, build_model, choose_dtype, default_dtype, fingerprint, quantize_model, read_checkpoint
from decode import (
    Recorded,
    Sampling,
    Steps,
    Text,
    by_gpu_kernels,
    cache_slots,
    check_length,
    compiled_prefill,
    compiled_step,
    decode_step,
    generate,
    has_cache,
    prefill,
)
from fast_model import bytes_per_step
from quantized_linear import GROUP_SIZES, MODES
from runtime import (
    Stopwatch,
    check_agreement,
    check_device,
    check_target,
    default_device,
    objects_of_ranks,
    peak_memory,
    positive,
    print0,
    rank_and_count,
    read_bandwidth,
    read_text,
    run_command,
    say,
    seed_number,
    synchronize,
    write_json,
    written_in_place,
)
from speculate import (
    Auto,
    DraftModel,
    Fixed,
    PromptLookup,
    Speculation,
    compiled_drafts,
    draft_tokens,
    round_costs,
    verify,
)
from tokenizer import check_vocabulary, find_tokenizer

try:
    import gpu_kernels
    import gpu_products
except ImportError:  # no Triton, so no GPU of NVIDIA's
    gpu_kernels = gpu_products = None

INTERACTIVE_SLOTS = 2048


# --- Answers ----------------------------------------------------------------------------------------------------------


class Answer:
    """One row's ids and text as they grow; text that may turn out to begin a stop string is held back.

    `stop_reason` is None, then "eos", "stop" (a stop string) or "length" (max_new_tokens, or the context is full). A
    stop string that is a special token, which no text shows, stops at its id. With `aloud`, what can be shown has the
    model's reasoning too.
    """

    def __init__(self, prompt_ids, tokenizer, eos_ids, stop, continues: bool, aloud: bool = False):
        self.prompt_ids, self.token_ids, self.stop_reason = prompt_ids, [], None
        self.stop_ids = {
            id for string in stop if tokenizer and (id := tokenizer.token_id(string)) in tokenizer.special_ids
        }
        self.stream, self.text = None, "" if tokenizer else None
        if tokenizer:
            self.stream = tokenizer.stream() if continues else tokenizer.answer_stream(prompt_ids)
        for id in prompt_ids if self.stream and continues else ():
            self.stream.push(id)  # a text that continues keeps its first space; a chat's answer begins without
        self.eos_ids, self.stop, self.shown, self.aloud = eos_ids, stop, 0, aloud

    def push(self, id: int) -> str:
        """Take the next id; returns the text that can be shown now."""
        self.token_ids.append(id)
        aside = ""
        if id in self.eos_ids:
            self.stop_reason = "eos"
        elif id in self.stop_ids:
            self.stop_reason = "stop"
        elif self.stream:
            self.text += self.stream.push(id)
            aside = self.stream.aside if self.aloud else ""
        return aside + self._show()

    @property
    def unanswered(self) -> bool:
        """Whether it ended in the model's reasoning."""
        return self.stop_reason == "length" and self.stream is not None and not self.stream.final

    def finish(self) -> str:
        """No id follows; returns the rest of the text."""
        if self.stream and (self.stop_reason != "stop" or self.token_ids[-1] in self.stop_ids):
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


@dataclass
class Session:
    """What was made of a command's arguments at the start, and what came of it."""

    args: argparse.Namespace
    model: torch.nn.Module
    tokenizer: object  # None if the prompts are random tokens and there is none
    sampling: Sampling
    bandwidth: float  # bytes per second
    stopwatch: Stopwatch
    steps: Steps = Steps()
    recorded: list[Recorded] = field(default_factory=list)  # those of the steps that are CUDA graphs
    slots: int = 0
    context: int = 0  # tokens that the model, and one that drafts, can have
    draft_bytes: int = 0  # that a step of the draft model reads
    figures: dict = field(default_factory=dict)
    samples: list[Answer] = field(default_factory=list)
    runs: list[dict] = field(default_factory=list)
    in_cache: list[int] = field(default_factory=list)
    eos_ids: frozenset = frozenset()

    def encode(self, messages: list[dict]) -> list[int]:
        """The ids of the last message, or in a chat of all. Raises ValueError if it is no text."""
        if self.args.chat:
            return self.tokenizer.encode(self.tokenizer.render_chat(messages), bos=False)
        return self.tokenizer.encode(messages[-1]["content"])

    def check_room(self, tokens: int, name: str) -> None:
        """Raises ValueError if a prompt of so many tokens is empty, or has no room."""
        check_length(tokens, self.context, name)
        if tokens > self.slots:
            sizes = f"{tokens} tokens, the cache {self.slots} slots"
            raise ValueError(f"{name} has {sizes}; give a larger --max_seq_length")

    def new_answers(self, rows: list[list[int]]) -> list[Answer]:
        kind = {"continues": not self.args.chat, "aloud": self.args.show_reasoning}
        return [Answer(ids, self.tokenizer, self.eos_ids, self.args.stop, **kind) for ids in rows]


# --- The start --------------------------------------------------------------------------------------------------------

REFERENCE = "--reference runs model.py, which"
OWN_PROMPTS = "--prompt_file gives every row its prompt; leave out --prompt, --interactive and --batch_size"
ONE_PLACE = "drafts come from one place; leave out --prompt_lookup or --draft_checkpoint_path"
NO_DRAFTS = "--speculate_k and --compare need drafts; add --prompt_lookup or --draft_checkpoint_path"
# Arguments that do not go together, and why. Those with a space, "ranks" and "drafts" stand for what others mean.
CONTRADICTIONS = (
    ("reference", "ranks", f"{REFERENCE} is not split among ranks; start it without torchrun"),
    ("reference", "compile", f"{REFERENCE} is not compiled; leave out --compile"),
    ("reference", "compile_prefill", f"{REFERENCE} is not compiled; leave out --compile"),
    ("reference", "kv_cache", f"{REFERENCE} has no cache; leave out --kv_cache"),
    ("reference", "drafts", f"{REFERENCE} has no cache for drafts; leave out the drafts"),
    ("interactive", "batch_size", "--interactive holds one conversation; leave out --batch_size"),
    ("interactive", "num_samples", "--interactive gives one answer a line; leave out --num_samples"),
    ("interactive", "prompt", "--interactive reads its prompts from the terminal; leave out --prompt"),
    ("prompt_file", "prompt", OWN_PROMPTS),
    ("prompt_file", "interactive", OWN_PROMPTS),
    ("prompt_file", "batch_size", OWN_PROMPTS),
    ("prompt_lookup", "draft_checkpoint_path", ONE_PLACE),
    ("no drafts", "speculate_k", NO_DRAFTS),
    ("no drafts", "compare", NO_DRAFTS),
    ("no lookup", "ngram", "--ngram is for --prompt_lookup; add that, or leave it out"),
    ("no int4", "group_size", "--group_size is for --quantize int4; add that, or leave it out"),
    ("no chat", "show_reasoning", "--show_reasoning is for a chat; add --chat"),
    ("compare", "interactive", "--compare answers a prompt twice, which is no conversation; leave out --interactive"),
)


def check_flags(args) -> None:
    """Raises ValueError or OSError for arguments that cannot be, before anything is loaded."""
    given = {name for name, value in vars(args).items() if value not in (None, False)}
    given -= {name for name in ("batch_size", "num_samples") if getattr(args, name) == 1}
    given |= {"drafts"} if speculates(args) else {"no drafts"}
    others = {"ranks": rank_and_count()[1] > 1, "no chat": not args.chat, "no lookup": not args.prompt_lookup}
    given |= {name for name, holds in (others | {"no int4": args.quantize != "int4"}).items() if holds}
    for one, other, sentence in CONTRADICTIONS:
        if {one, other} <= given:
            raise ValueError(sentence)
    if "" in args.stop:
        raise ValueError("--stop needs strings of at least one character")
    inputs = (args.checkpoint_path, args.draft_checkpoint_path, args.prompt_file)
    for file, other in ((args.json_path, args.profile), (args.profile, args.json_path)):
        if file:
            check_target(file, other, *inputs)
    check_device(args.device)


def make_kernels(device: str) -> None:
    """Compile the CPU's kernels if that has not been done on this machine, and say so if it cannot be."""
    if device == "cpu" and cpu_kernels.instruction_sets() and not cpu_kernels.available():
        say("no C++ compiler makes the kernels for this processor, so plain PyTorch runs; install g++ for more speed")


def load_model(args, config, state_dict):
    """The model, or this rank's part of it, on its device. A float32 one that is computed in bfloat16 is said to be."""
    rank, ranks = rank_and_count()
    if ranks > 1:
        check_agreement({"model": fingerprint(config, state_dict)})
    if args.quantize:
        config, state_dict = quantize_model(config, state_dict, args.quantize, args.group_size or 32, rank, ranks)
    else:
        state_dict = tp.shard(state_dict, config, rank, ranks)
    dtype = choose_dtype(args.checkpoint_path, state_dict, args.device, args.precision)
    model = build_model(config, state_dict, args.device, dtype, args.reference, rank, ranks, keep_16_bits=True)
    synchronize(args.device)
    return model


def load_draft(args, tokenizer, vocab_size: int):
    """A model to draft with, in its checkpoint's own precision. Raises ValueError if it speaks of other tokens."""
    path = args.draft_checkpoint_path
    config, state_dict = read_checkpoint(path)
    if tokenizer:
        check_vocabulary(tokenizer, find_tokenizer(path.parent, config.vocab_size, needed=True))
    elif config.vocab_size != vocab_size:
        sizes = f"{config.vocab_size} tokens, the model {vocab_size}"
        raise ValueError(f"the draft model has {sizes}; without tokenizers to compare, the numbers have to be the same")
    dtype = default_dtype(args.device, state_dict)
    draft = build_model(config, state_dict, args.device, dtype, keep_16_bits=True)
    if args.kv_cache:
        draft.setup_caches(1, 1, int8=True)  # of this kind is the one that its first prompt makes, too
    return draft


def check_stop(stop: list[str], tokenizer) -> None:
    """Raises ValueError for a stop string with a special token inside, which the shown text never has."""
    for name in map(tokenizer.piece, tokenizer.special_ids):
        if inside := [string for string in stop if name in string and name != string]:
            raise ValueError(
                f"--stop {inside[0]!r} holds {name!r}, a special token, which no text shows; give it alone"
            )


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
    lines = read_text(file).split("\n")  # splitlines() also splits at U+2028 and form feeds
    prompts = {f"line {number} of {file}": line for number, line in enumerate(lines, 1) if line.strip()}
    if not prompts:
        raise ValueError(f"{file} has no prompt; write one a line")
    return prompts


def first_rows(args, session: Session, prompts: dict[str, str]) -> list[list[int]]:
    """The ids of each row's prompt; for an interactive session those to warm up with."""
    vocab_size = session.model.config.vocab_size
    if args.interactive:
        return [synthetic_prompt(8, vocab_size, args.seed)]
    if is_synthetic(args):
        check_length(int(args.prompt), session.model.config.block_size)
        return [synthetic_prompt(int(args.prompt), vocab_size, args.seed)] * args.batch_size
    return [session.encode([{"role": "user", "content": text}]) for text in prompts.values()] * args.batch_size


def is_synthetic(args) -> bool:
    """Whether the prompt is a number of random tokens."""
    return (args.prompt or "").isdecimal() and not args.interactive and not args.prompt_file


def make_session(args, prompts: dict[str, str]) -> tuple[Session, list[list[int]]]:
    """A session that is ready to answer, and the first rows."""
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    checkpoint = read_checkpoint(args.checkpoint_path)
    make_kernels(args.device)
    bandwidth, start = read_bandwidth(args.device), time.perf_counter()
    model = load_model(args, *checkpoint)
    seconds = time.perf_counter() - start
    vocab_size = model.config.vocab_size
    tokenizer = find_tokenizer(args.checkpoint_path.parent, vocab_size, needed=not is_synthetic(args))
    if tokenizer:
        check_stop(args.stop, tokenizer)
        if args.chat:
            tokenizer.chat_template()  # raises ValueError if there is none, before a session begins
    session = Session(args, model, tokenizer, sampling, bandwidth, Stopwatch(args.device))
    if tokenizer and not args.ignore_eos:
        session.eos_ids = tokenizer.eos_ids
    session.figures["load_seconds"] = seconds
    rows = objects_of_ranks(first_rows(args, session, prompts))[0]  # a template may ask for the time
    longest = most_drafts(args) if speculates(args) else 0
    needed = INTERACTIVE_SLOTS if args.interactive else max(map(len, rows)) + args.max_new_tokens - 1 + longest
    session.slots = cache_slots(args.max_seq_length or needed, model.config)
    draft = load_draft(args, tokenizer, vocab_size) if args.draft_checkpoint_path else None
    session.context = min(m.config.block_size for m in (model, draft) if m)
    if rank_and_count()[1] > 1:  # what decides where a rank ends
        pieces = tokenizer and [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]
        same = {"tokenizer": pieces, "set of end tokens": sorted(session.eos_ids)}
        check_agreement(same | {"draft model": draft and draft.config})
    for name, ids in zip(prompts, rows, strict=False):  # with --batch_size the rows are alike
        session.check_room(len(ids), name)
    prepare_steps(args, session, draft, len(rows))
    warm_up(args, session, rows)
    return session, rows


def most_drafts(args) -> int:
    """Drafts of the longest round."""
    return Auto.longest if args.speculate_k == "auto" else args.speculate_k or 5


def speculates(args) -> bool:
    return args.prompt_lookup or args.draft_checkpoint_path is not None


def prepare_steps(args, session: Session, draft, batch: int) -> None:
    """Give the session its caches and steps, compiled ones if that was asked for."""
    model = session.model

    def compiled(function):
        if not args.compile:
            return function
        step = compiled_drafts(args.device) if function is draft_tokens else compiled_step(function, args.device)
        session.recorded += [step] if isinstance(step, Recorded) else []
        return step

    def new_prefill():
        return compiled_prefill() if args.compile_prefill else prefill

    if has_cache(model):
        model.setup_caches(batch, session.slots, int8=args.kv_cache == "int8")
    speculation = None
    if speculates(args):
        if draft:
            drafts = DraftModel(draft, session.stopwatch.watch("draft", compiled(draft_tokens)), new_prefill())
        else:
            drafts = PromptLookup(longest=args.ngram or 3)
        check = session.stopwatch.watch("verify", compiled(verify))
        speculation = Speculation(model, session.sampling, drafts, Fixed(most_drafts(args)), check)
    session.steps = Steps(new_prefill(), compiled(decode_step), speculation)
    session.figures["bytes_per_step"] = bytes_per_step(model)
    session.draft_bytes = bytes_per_step(draft) if draft else 0


def compiler_count(group: str, name: str) -> int:
    """One of the compiler's counts, of which there is none while it is not loaded, which takes a second."""
    return torch._dynamo.utils.counters[group][name] if "torch._dynamo" in sys.modules else 0


def compiler_cache_hits() -> int:
    return compiler_count("inductor", "fxgraph_cache_hit") + compiler_count("aot_autograd", "autograd_cache_hit")


def compiled_graphs() -> int:
    return compiler_count("stats", "unique_graphs")


def compilations(session: Session) -> int:
    """Graphs and kernels that this process has built by now."""
    kernels = 0
    if gpu_kernels is not None:
        kernels = gpu_kernels.variants_built(gpu_kernels) + gpu_kernels.variants_built(gpu_products)
    return compiled_graphs() + sum(step.count for step in session.recorded) + kernels


@torch.no_grad()
def warm_prefill(prefill, model, compiled: bool) -> None:
    """Prefill as many tokens as each variant of a kernel is for, at the cache's beginning and after other tokens."""
    device, batch, config = model.wte.weight.device, model.max_batch_size, model.config
    lengths = [1, 2, 12, 40, 70]
    if config.n_expert and by_gpu_kernels(device):  # more than 64 tokens an expert, see gpu_products.many_experts
        lengths.append(64 * config.n_expert // config.n_expert_used + 1)
    if config.sliding_window and compiled:
        lengths.append(config.sliding_window + 1)
    for length in lengths:
        if length < model.max_seq_length:
            ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
            prefill(model, ids, None, ids[:, 0])
            prefill(model, ids, torch.arange(1, length + 1, device=device).expand(batch, -1), ids[:, 0])


def warm_up(args, session: Session, rows: list[list[int]]) -> None:
    """Take the first steps, so that no figure of an answer contains compilation or lazy loading.

    A speculation that adapts gets the costs of its rounds. One new token comes from the prefill alone, so that no step
    is there to compile.
    """
    model, steps, speculation = session.model, session.steps, session.steps.speculation
    compiles = args.compile_prefill or (args.compile and (session.args.max_new_tokens > 1 or speculation is not None))
    if args.compile and not compiles:
        say("--compile compiles nothing, because one new token comes from the prefill; see --compile_prefill")
    recording = bool(session.recorded) and not args.compile_prefill
    if compiles and recording:
        say("recording steps as CUDA graphs; kernels that are new to this machine are compiled first")
    elif compiles:
        say("compiling the model into kernels for this machine; the next run finds them in the compiler's cache")
    start, hits, graphs = time.perf_counter(), compiler_cache_hits(), compiled_graphs()
    if args.interactive and has_cache(model) and (args.device != "cpu" or args.compile_prefill):
        warm_prefill(steps.prefill, model, args.compile_prefill)
    plain = replace(steps, speculation=None)
    for _ in generate(model, rows, min(session.args.max_new_tokens, 3), session.sampling, steps=plain):
        pass
    if speculation:
        session.steps = replace(steps, speculation=measured(args, session, rows))
    seconds = time.perf_counter() - start
    kind = "from cache" if compiler_cache_hits() > hits else "cold" if compiled_graphs() > graphs else "recorded"
    if compiles:
        say(f"recorded in {seconds:.1f} s" if recording else f"compiled in {seconds:.1f} s ({kind})")
        session.figures |= {"compile_seconds": seconds, "compile_kind": kind}
    if speculation:
        costs = session.figures["round_seconds"]
        rounds = [f"{costs[k] / costs[0]:.2f} for {k} drafts" for k in costs if k]
        say(f"a round's cost in plain steps: {', '.join(rounds)}")


def measured(args, session: Session, rows: list[list[int]]) -> Speculation:
    """The session's speculation after its first rounds; one that adapts knows what they cost."""
    speculation, auto = session.steps.speculation, args.speculate_k == "auto"
    text = Text(session.model, rows, session.args.max_new_tokens, session.sampling, (), session.args.seed)
    choices = Auto.CHOICES if auto else (speculation.count.longest,)
    costs = round_costs(speculation, text, session.steps.decode_step, choices)
    for draft in speculation.drafts.models if args.interactive or auto else ():
        warm_prefill(speculation.drafts.prefill, draft, args.compile_prefill)
    catch_up = speculation.drafts.catch_up_seconds() if auto else 0.0
    costs, catch_up = objects_of_ranks((costs, catch_up))[0]  # what `auto` decides, all ranks decide
    session.figures["round_seconds"] = costs
    if not auto:
        return speculation
    session.figures["catch_up_seconds"] = catch_up
    return replace(speculation, count=Auto(costs, catch_up))


# --- Answering --------------------------------------------------------------------------------------------------------


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def answer_once(session: Session, answers: list[Answer], steps: Steps, show) -> dict:
    """Fill the answers, one a batch row, and return the figures. `show` gets the first row's text as it comes."""
    rows, model = [answer.prompt_ids for answer in answers], session.model
    cached = common_prefix(session.in_cache, rows[0][:-1]) if has_cache(model) else 0
    new = session.args.max_new_tokens
    if session.slots < model.config.block_size:  # else generate() ends each row at its own last slot
        new = min(new, session.slots - max(map(len, rows)) + 1)
    seed = session.args.seed + len(session.samples) - len(rows)  # of the first row; these are among the samples already
    times, built, start = [], compilations(session), time.perf_counter()
    for ids in generate(model, rows, new, session.sampling, session.eos_ids, seed, cached, steps):
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
    seconds, tokens = times[-1] - times[0], sum(map(len, rows))
    taken = len(steps.speculation.history) if steps.speculation else len(times) - 1
    decoded = sum(len(answer.token_ids) for answer in answers) - len(rows)  # each row's first belongs to the prefill
    built = compilations(session) - built
    measured = taken and not built
    return {
        "prompt_tokens": tokens,
        "cached_tokens": cached,
        "time_to_first_token_seconds": times[0],
        "prefill_tokens_per_second": None if built else (tokens - cached * len(rows)) / times[0],
        "decode_steps": taken,
        "decode_steps_per_second": taken / seconds if measured else None,
        "decode_tokens_per_second": decoded / seconds if measured else None,
        "compilations": built,  # inside the answer, where there should be none
    }


def answer_rows(session: Session, rows: list[list[int]], show) -> dict:
    """Answers to the rows join the session's samples, and the figures, which are returned, its runs."""
    answers = session.new_answers(rows)
    session.samples += answers
    session.stopwatch.read()
    figures = answer_once(session, answers, session.steps, show)
    if session.steps.speculation:
        figures |= session.steps.speculation.figures(session.stopwatch.read())
    show("\n")
    if any(answer.unanswered for answer in answers):
        say("an answer ended while the model was reasoning; give a larger --max_new_tokens")
    session.runs.append(figures)
    return figures


def compare_with_plain(session: Session, answers: list[Answer], run: dict) -> None:
    """Answer the same again without drafts; the figures of that join those of the `run`."""
    again = session.new_answers([answer.prompt_ids for answer in answers])
    plain = answer_once(session, again, replace(session.steps, speculation=None), lambda text: None)
    run["plain_tokens_per_second"] = plain["decode_tokens_per_second"]
    same = [a.token_ids for a in again] == [a.token_ids for a in answers]
    run["plain_text_is_the_same"] = same if session.sampling.greedy else None


def sample_loop(args, session: Session, rows: list[list[int]], prompts: dict[str, str]) -> None:
    """Answer the same rows --num_samples times."""

    def show(text: str) -> None:
        if not args.prompt_file:  # whose rows are all printed at the end
            print0(text, end="", flush=True)

    for _ in range(args.num_samples):
        if not args.chat and not is_synthetic(args):
            show(next(iter(prompts.values())))
        run = answer_rows(session, rows, show)
        answers = session.samples[-len(rows) :]
        texts = prompts.values() if args.prompt_file and not args.chat else [""] * len(rows)
        for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            if row > 0 or args.prompt_file:
                print0(f"[row {row}] {text}{answer.text}")
        if args.compare:
            compare_with_plain(session, answers, run)
        report(run, session)


def read_line() -> str | None:
    """What rank 0's user types, on every rank; None at the end."""
    line, handlers = None, {}
    if rank_and_count()[0] == 0 and sys.stdin is not None:
        if sys.stdin.isatty():  # input() puts the terminal back if a signal raises, not if it ends the process
            raising = signal.default_int_handler
            handlers = {number: signal.signal(number, raising) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with suppress(EOFError):
                line = input("> ")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return objects_of_ranks(line)[0]


def interactive_loop(session: Session) -> None:
    """Answer each line; in a chat with what was said before, until /reset."""
    prepare_stdin()
    messages = []
    while (line := read_line()) is not None:
        if session.args.chat and line.strip() == "/reset":
            messages.clear()
            say("a new conversation begins")
            continue
        messages.append({"role": "user", "content": line})
        try:
            ids = objects_of_ranks(session.encode(messages))[0]  # a template may ask for the time
            if session.args.chat and len(messages) > 1 and len(ids) > min(session.slots, session.context):
                sizes = f"{len(ids)} tokens, the cache {min(session.slots, session.context)} slots"
                raise ValueError(f"the conversation has {sizes}; /reset begins anew")
            session.check_room(len(ids), "the prompt")
        except ValueError as error:  # the session continues
            say(f"error: {error}")
            messages.pop()
            continue
        run = answer_rows(session, [ids], lambda text: print0(text, end="", flush=True))
        report(run, session)
        answer = session.samples[-1]
        session.in_cache = ids + answer.token_ids[:-1]  # the last token was never fed
        messages.append({"role": "assistant", "content": answer.text})


# --- The report -------------------------------------------------------------------------------------------------------


def report(run: dict, session: Session) -> None:
    """Print the figures of one run. The README says what each one means."""
    step_bytes, bandwidth = session.figures["bytes_per_step"], session.bandwidth
    if run["compilations"]:
        say(
            f"not measured: {run['compilations']} graphs or kernels were built inside this answer, so its figures "
            "would be false; please report this with the command"
        )
        return
    milliseconds = run["time_to_first_token_seconds"] * 1e3
    fresh = run["prompt_tokens"] - run["cached_tokens"]
    say(f"prefill: {fresh} tokens, {run['prefill_tokens_per_second']:.1f} tokens/s, {milliseconds:.0f} ms to the first")
    if run["decode_steps"]:
        step_bytes += session.draft_bytes * run.get("draft_steps", 0) / run["decode_steps"]
        used = step_bytes * run["decode_steps_per_second"]
        ranks = rank_and_count()[1]
        say(
            f"decode:  {run['decode_steps']} steps, {run['decode_tokens_per_second']:.2f} tokens/s, "
            f"{step_bytes / 1e6:.0f} MB read a step{' by each rank' * (ranks > 1)}: {used / 1e9:.1f} GB/s, "
            f"{used / bandwidth:.0%} of the {bandwidth / 1e9:.1f} GB/s measured here"
        )
    if "rounds" in run:
        say(f"drafts:  {run['rounds']} of these steps were rounds with drafts, {run['plain_steps']} plain ones")
    if run.get("rounds"):
        say(
            f"         {run['acceptance']:.0%} of the checked drafts accepted, {run['kept_per_round']:.2f} a round; "
            f"rounds with 0, 1, ... accepted: {' '.join(map(str, run['histogram']))}"
        )
        drafting, verifying = run["draft_seconds_per_round"] * 1e3, run["verify_seconds_per_round"] * 1e3
        say(f"         a round took {drafting:.2f} ms for drafts, {verifying:.2f} for the verification")
    if run.get("plain_tokens_per_second"):
        times = run["decode_tokens_per_second"] / run["plain_tokens_per_second"]
        same = {True: ", the same text", False: ", another text", None: ""}[run["plain_text_is_the_same"]]
        say(
            f"plain:   {run['plain_tokens_per_second']:.2f} tokens/s without drafts, so {times:.2f} times as fast{same}"
        )


def write_results(args, session: Session, finished: bool) -> None:
    """--json, after Ctrl-C or an error too, with the figures and texts that there are; the last figures are printed."""
    rank, ranks = rank_and_count()
    memory = max(objects_of_ranks(peak_memory(args.device))) if finished else peak_memory(args.device)
    figures = session.figures | {"peak_memory_bytes": memory, "ranks": ranks}
    figures |= {"read_bandwidth_bytes_per_second": session.bandwidth}
    if args.json_path and rank == 0 and (session.samples or finished):
        norm = next(weight for weight in session.model.parameters() if weight.dim() == 1)
        precision = str(norm.dtype).removeprefix("torch.")  # the activations'; matrices may be in another
        setting = {"device": args.device, "precision": precision, "torch": torch.__version__}
        names = ("prompt_ids", "token_ids", "text", "stop_reason")
        entries = [{name: getattr(answer, name) for name in names} for answer in session.samples]
        write_json(args.json_path, {"samples": entries, "runs": session.runs, **figures, **setting})
    if finished:
        on_a_rank = " on a rank" * (ranks > 1)
        say(f"memory:  {memory / 1e9:.2f} GB at most{on_a_rank}, loaded in {session.figures['load_seconds']:.1f} s")
        rates = [run["decode_tokens_per_second"] for run in session.runs if run["decode_tokens_per_second"]]
        if len(rates) > 1:
            say(f"median:  {statistics.median(rates):.2f} tokens/s, from {min(rates):.2f} to {max(rates):.2f}")


def answer(args, prompts: dict[str, str]) -> None:
    """Make a session, answer, and write what came of it."""
    session, rows = make_session(args, prompts)
    finished = False
    try:
        with torch.profiler.profile() if args.profile else nullcontext() as profiler:
            if args.interactive:
                interactive_loop(session)
            else:
                sample_loop(args, session, rows, prompts)
        finished = True
    finally:
        write_results(args, session, finished)
    if args.profile and rank_and_count()[0] == 0:
        with written_in_place(args.profile) as temporary:  # the profiler only logs what it could not write
            profiler.export_chrome_trace(str(temporary))


def main(args) -> None:
    check_flags(args)
    if args.prompt_file:
        prompts = read_prompts(args.prompt_file) if rank_and_count()[0] == 0 else None
        prompts = objects_of_ranks(prompts)[0]  # a pipe can be read once
    else:
        args.prompt = "Hello, my name is" if args.prompt is None else args.prompt
        prompts = {"the prompt": args.prompt}
    compiles = args.compile_prefill or (args.compile and not by_gpu_kernels(torch.device(args.device)))
    # 8 by default, of all models and lengths that one function is given
    with torch._dynamo.config.patch(recompile_limit=32) if compiles else nullcontext():
        answer(args, prompts)


def draft_count(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Generate text from a checkpoint.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, its tokenizer in the same folder")
    add("--prompt", help="text, or a whole number for that many random tokens; default: Hello, my name is")
    add("--prompt_file", type=Path, metavar="FILE", help="UTF-8, one prompt a line, all in one batch")
    add("--interactive", action="store_true", help="read prompts from the terminal, one a line; /reset: a new chat")
    add("--chat", action="store_true", help="put the prompt into the model's own chat template")
    add("--show_reasoning", action="store_true", help="with --chat: what gpt-oss thinks before its answer, too")
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
    add("--ignore_eos", action="store_true", help="continue after an end-of-sequence token")
    add("--compile", action="store_true", help="compile the decode step; on NVIDIA GPUs, record it as a CUDA graph")
    add("--compile_prefill", action="store_true", help="compile the prefill too")
    add("--reference", action="store_true", help="run the readable model of model.py, without a cache")
    add("--kv_cache", choices=("int8",), help="keys and values in 8 bits; default: the precision's")
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, mps")
    add(
        "--precision",
        choices=DTYPES,
        help="default: the checkpoint's; float32 on a CPU, and bfloat16 instead of float32 on an NVIDIA GPU",
    )
    add("--quantize", choices=MODES, help="quantize the weights while loading, without a second file")
    add("--group_size", type=int, choices=GROUP_SIZES, help="columns in a group of --quantize int4; default: 32")
    add("--draft_checkpoint_path", type=Path, help="a smaller model with the same tokenizer, whose drafts are verified")
    add("--prompt_lookup", action="store_true", help="drafts are what followed the last tokens earlier in the text")
    add("--speculate_k", type=draft_count, metavar="K", help="drafts in a round, or auto; default: 5")
    add("--ngram", type=positive, help="tokens that --prompt_lookup looks for, at most; default: 3")
    add("--compare", action="store_true", help="generate once more without drafts, for the speed")
    add("--profile", type=Path, metavar="FILE", help="write a Chrome trace")
    add("--json", type=Path, dest="json_path", metavar="FILE", help="write samples and figures for other programs")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main, parse_arguments(), splits=True)
