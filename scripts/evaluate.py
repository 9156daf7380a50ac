"""How good a checkpoint is: perplexity of a text, distance from another checkpoint, tasks of EleutherAI's harness.

    python -m scripts.evaluate --checkpoint_path checkpoints/NAME/model.pth --text FILE
    python -m scripts.evaluate --checkpoint_path checkpoints/NAME/model_int8.pth --text FILE --against OTHER/model.pth
    python -m scripts.evaluate --checkpoint_path checkpoints/NAME/model.pth --tasks hellaswag --limit 100

Decisions to know:

- A window of W tokens predicts the token after each of its own, and only tokens that no window before it predicted.
  So every token but the first is predicted once, after at least W - stride + 1 tokens except in the first window.
  Hugging Face's page on perplexity gives one token less, and with stride = W it skips a token per window.
- Perplexities of two tokenizers do not compare; bits per byte do. The bytes are those of the predicted tokens.
- KL(other || this) takes the other checkpoint, in float32, for the truth: nats lost by using this one instead.
- Models run eager and without a cache, but for --kv_cache, where each token sees keys and values as decoding does.
  Of their logits a few rows at a time become float32.
- Logits that are not finite end the command with a sentence. They are checked every CHECKED windows, because a check
  waits for the GPU.
- The harness's requests are encoded and cut as its own Hugging Face backend does it, one request at a time.

Copy me: needs torch and tqdm, and in the folder above `model.py`, `fast_model.py`, `quantized_linear.py`,
`cpu_kernels.py`, `tp.py`, `runtime.py`, `decode.py`, `speculate.py`, `checkpoint.py`, `tokenizer.py` and `generate.py`,
with its libraries; for `--tasks` lm_eval, for speed on a GPU `gpu_kernels.py`, `gpu_matvec.py` and `gpu_products.py`.

Shapes: R rows (positions of one window), V vocabulary.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import DTYPES, build_model, choose_dtype, read_checkpoint
from decode import Sampling, cache_slots, generate, why_not_finite
from generate import Answer
from runtime import check_device, check_target, default_device, positive, read_text, run_command, write_json
from tokenizer import check_vocabulary, find_tokenizer

ROWS = 128  # 25 MB in float32 for a vocabulary of 49,152; a whole window of 1,024 would be 201 MB, and several copies
CHECKED = 64


def windows(ids: list[int], window: int, stride: int, full: bool = False) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs (inputs, targets); the targets follow the last inputs. `full`: the last window begins early, to be full."""
    last = len(ids) - 1  # nothing follows the last token
    begin = done = 0
    while done < last:
        end = min(begin + window, last)
        yield ids[max(0, end - window) if full else begin : end], ids[done + 1 : end + 1]
        begin, done = begin + stride, end


def log_probabilities(model, inputs: list[int], count: int) -> Iterator[torch.Tensor]:
    """Log-probabilities [R, V] of the token after each of the last `count` inputs, at most ROWS rows at a time."""
    device = model.wte.weight.device
    if 0 < model.max_seq_length < len(inputs) or model.int8_cache:  # generate() left a cache, which a pass fills
        model.setup_caches(1, cache_slots(len(inputs), model.config))
    input_pos = torch.arange(len(inputs), device=device)[None] if model.int8_cache else None
    logits = model(torch.tensor([inputs], device=device), input_pos)[0, -count:]
    for rows in logits.split(ROWS):
        yield rows.float().log_softmax(-1)


def check_finite(model, values: torch.Tensor) -> None:
    """Raises FloatingPointError, which names a likely cause, if what was computed from the model's logits is not."""
    if not values.isfinite().all():
        raise FloatingPointError(why_not_finite(model))


def quantile(values: torch.Tensor, share: float) -> float:
    """As torch.quantile, which takes at most 16,777,216 values [N]: between two neighbours it is interpolated."""
    place = share * (len(values) - 1)
    below, above = (values.kthvalue(1 + at).values.item() for at in (math.floor(place), math.ceil(place)))
    return below + (above - below) * (place % 1)


def measure(model, ids: list[int], window: int, stride: int, other=None) -> dict:
    """Figures of the model on a text's ids, and with `other` of the distance between the two.

    Raises FloatingPointError if logits are not finite.
    """
    device = model.wte.weight.device
    # All at once: small tensors that stay, one after each group of rows, cut up the memory that the groups come from.
    losses, their_losses, kl = torch.zeros(3, len(ids) - 1, device=device)
    agreements, done = torch.empty(len(ids) - 1, dtype=torch.bool, device=device), 0
    for number, (inputs, targets) in enumerate(tqdm(list(windows(ids, window, stride)), unit="window", disable=None)):
        parts = torch.tensor(targets, device=device).split(ROWS)
        theirs = log_probabilities(other, inputs, len(targets)) if other else [None] * len(parts)
        for part, log_q, log_p in zip(parts, log_probabilities(model, inputs, len(targets)), theirs, strict=True):
            at = slice(done, done + len(part))
            losses[at] = -log_q.gather(1, part[:, None])[:, 0]
            if other:
                their_losses[at] = -log_p.gather(1, part[:, None])[:, 0]
                agreements[at] = log_p.argmax(-1) == log_q.argmax(-1)
                kl[at] = (log_p.exp() * (log_p - log_q)).sum(-1)
            done += len(part)
        if number % CHECKED == 0 or done == len(losses):
            check_finite(other, their_losses)
            check_finite(model, losses + kl)
    losses = losses.cpu().double()  # the sum of a million float32 loses digits; MPS has no float64
    figures = {"tokens": len(losses), "window": window, "stride": stride}
    figures |= {"nats_per_token": losses.mean().item(), "perplexity": losses.mean().exp().item()}
    if other:
        kl = kl.cpu().double()
        figures |= {"kl_mean": kl.mean().item(), "kl_99_percent": quantile(kl, 0.99)}
        figures["top_1_agreement"] = agreements.cpu().double().mean().item()
    return figures


# --- EleutherAI's harness ---------------------------------------------------------------------------------------------


def read_options(options: dict) -> tuple[list[str], int, Sampling]:
    """(stop strings, new tokens, sampling) of a task's generation_kwargs, with the harness's defaults.

    Raises ValueError if something is asked for that is not here.
    """
    rest = dict(options)
    stop = rest.pop("until", [])
    stop = [string for string in ([stop] if isinstance(stop, str) else stop) if string]
    lengths = [rest.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
    length = next((n for n in lengths if n is not None), 256)
    temperature = rest.pop("temperature", 1.0 if rest.get("do_sample") else 0.0)
    temperature = temperature if rest.pop("do_sample", True) else 0.0
    sampling = Sampling(temperature, rest.pop("top_k", 0), rest.pop("top_p", 1.0))
    if rest.pop("num_beams", 1) != 1 or rest:
        raise ValueError(f"a task asks for generation with {options}, which is more than generate() does")
    return stop, length, sampling


class Requests:
    """The model as the harness sees one, but for its base class, lm_eval.api.model.LM."""

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.tokenizer, self.context_size = model, tokenizer, model.config.block_size
        added, plain = tokenizer.encode("a"), tokenizer.encode("a", bos=False)
        # Often none; an EOS that some add at the end must not precede a continuation.
        self.bos = added[: added.index(plain[0])]
        named = [tokenizer.token_id(tokenizer.named_tokens.get(name, "")) for name in ("bos_token", "eos_token")]
        # Before a text with nothing before it, as in the harness.
        self.start = self.bos or [id for id in (*named, *sorted(tokenizer.eos_ids)) if id is not None][:1]
        if not self.start:
            raise ValueError("the tokenizer names neither BOS nor EOS, one of which the harness starts a text with")

    def encode(self, text: str) -> list[int]:
        return self.bos + self.tokenizer.encode(text, bos=False)

    def score(self, inputs: list[int], targets: list[int]) -> tuple[float, bool]:
        """(log-probability of the targets, whether each is the most likely token).

        Raises FloatingPointError if that is no finite number.
        """
        total, greedy = 0.0, True
        parts = torch.tensor(targets, device=self.model.wte.weight.device).split(ROWS)
        for part, log_q in zip(parts, log_probabilities(self.model, inputs, len(targets)), strict=True):
            found = log_q.gather(1, part[:, None])
            check_finite(self.model, found)
            total += found.sum().item()
            greedy = greedy and torch.equal(log_q.argmax(-1), part)
        return total, greedy

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        results = []
        for context, continuation in tqdm([request.args for request in requests], disable=None):
            # A space is part of the token after it, so the context is encoded without its last ones. What is
            # scored is the rest of the ids of the whole, even where the two merge: so the harness does it.
            prompt, whole = self.encode(context.rstrip()), self.encode(context + continuation)
            targets = whole[len(prompt) :]
            if not targets:  # merged into a token of the context; the harness's own backend crashes
                prompt, targets = whole[:-1], whole[-1:]
            inputs = ((prompt or self.start) + targets[:-1])[-self.context_size :]
            results.append(self.score(inputs, targets[-len(inputs) :]))
        return results

    def loglikelihood_rolling(self, requests) -> list[float]:
        results = []
        for (text,) in tqdm([request.args for request in requests], disable=None):
            ids = self.start + self.tokenizer.encode(text, bos=False)
            pairs = windows(ids, self.context_size, self.context_size, full=True)
            results.append(math.fsum(self.score(*pair)[0] for pair in pairs))
        return results

    def generate_until(self, requests) -> list[str]:
        texts, size, eos_ids = [], self.context_size, self.tokenizer.eos_ids
        for seed, request in enumerate(tqdm(requests, disable=None)):  # repeats of a request must not be the same
            context, options = request.args
            stop, length, sampling = read_options(options)
            # Of a prompt too long the end is kept, and room for the answer; if that never fits, half a context.
            kept = size - length if length < size else max(size // 2, 1)
            ids = (self.encode(context) or self.start)[-kept:]
            answer = Answer(ids, self.tokenizer, eos_ids, stop, continues=True)
            for (id,) in generate(self.model, [ids], length, sampling, eos_ids, seed):
                answer.push(id)
                if answer.stop_reason:
                    break
            answer.finish()
            texts.append(answer.text)
        return texts


def make_adapter(base: type, model, tokenizer):
    """Requests as an object of the harness's `base` class, which is given so that this file needs no lm_eval."""
    return type("Adapter", (Requests, base), {})(model, tokenizer)


def import_harness():
    try:
        import lm_eval.api.model
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as error:
        raise ValueError(f"--tasks needs EleutherAI's harness ({error}): pip install lm_eval") from error
    return lm_eval


# --- The command line -------------------------------------------------------------------------------------------------


def read_ids(file: Path, tokenizer, max_tokens: int | None) -> tuple[list[int], int]:
    """The first ids of a text and the bytes of those that are predicted. Raises ValueError if none are."""
    # The text is encoded once, with the BOS that the tokenizer itself adds or does not add, and then cut into windows.
    # No window but the first begins with a BOS, and the first token of the text is never predicted.
    text = read_text(file, newline="")
    size = len(text) if max_tokens is None else 16 * max_tokens
    while True:  # of a long text only the beginning; a cut changes no more than the last few ids
        ids = tokenizer.encode(text[:size])
        if size >= len(text) or len(ids) >= max_tokens + 100:
            break
        size *= 4
    ids = ids[:max_tokens]
    byte_count = sum(len(tokenizer.token_bytes(id)) for id in ids[1:])
    if not byte_count:  # special tokens have none
        raise ValueError(f"{file} has {len(ids)} tokens and no text after the first; at least 2 tokens are needed")
    return ids, byte_count


def load(path: Path, device: str, precision: str | None):
    config, state_dict = read_checkpoint(path)
    tokenizer = find_tokenizer(path.parent, config.vocab_size, needed=True)
    return build_model(config, state_dict, device, choose_dtype(path, state_dict, device, precision)), tokenizer


def load_other(args, model, tokenizer):
    """The model to compare with, in float32. Raises ValueError if an id is not the same token in both."""
    other, other_tokenizer = load(args.against, args.device, "float32")
    sizes = model.config.vocab_size, other.config.vocab_size
    if sizes[0] != sizes[1]:
        difference = f"{args.checkpoint_path} has {sizes[0]} tokens, {args.against} {sizes[1]}"
        raise ValueError(f"the vocabularies differ: {difference}; compare with one of the same tokenizer")
    check_vocabulary(tokenizer, other_tokenizer, name=str(args.against))
    return other


def run_tasks(args, harness, model, tokenizer) -> dict:
    """Print the harness's tables and return its results. Raises ValueError if it does not know a task."""
    manager = harness.tasks.TaskManager()
    unknown = [name for name in args.tasks if name not in manager.all_tasks and not Path(name).is_file()]
    if unknown:
        raise ValueError(f"lm_eval has no task {', '.join(unknown)}; `lm_eval ls tasks` lists them")
    adapter = make_adapter(harness.api.model.LM, model, tokenizer)
    results = harness.simple_evaluate(adapter, tasks=args.tasks, limit=args.limit, task_manager=manager)
    for column in ("results", "groups"):
        if results.get(column):
            print(harness.utils.make_table(results, column))
    return {"limit": args.limit, "results": results["results"]}


def choose_windows(args, context: int) -> tuple[int, int]:
    """(window, stride) in tokens. Raises ValueError if they do not fit."""
    window = args.window or min(1024, context)
    stride = args.stride or max(window // 2, 1)
    if window > context:
        raise ValueError(f"--window {window} is more than the context of {context} tokens")
    if stride > window:
        raise ValueError(f"--stride {stride} is more than the window of {window} tokens: it would skip tokens")
    return window, stride


def predict_text(args, model, tokenizer) -> dict:
    """Print and return the figures of a text."""
    other = load_other(args, model, tokenizer) if args.against else None
    window, stride = choose_windows(args, min(m.config.block_size for m in (model, other or model)))
    ids, byte_count = read_ids(args.text, tokenizer, args.max_tokens)
    start = time.perf_counter()
    figures = {"text": str(args.text), "against": args.against and str(args.against)}
    figures |= measure(model, ids, window, stride, other)
    figures["seconds"] = time.perf_counter() - start
    figures["bits_per_byte"] = figures["nats_per_token"] * figures["tokens"] / math.log(2) / byte_count
    print(f"tokens:      {figures['tokens']} predicted, in windows of {window} with stride {stride}")
    print(f"perplexity:  {figures['perplexity']:.4f}, {figures['bits_per_byte']:.4f} bits per byte")
    if other:
        print(f"KL:          {figures['kl_mean']:.3e} nats a token, 99% are below {figures['kl_99_percent']:.3e}")
        print(f"top-1:       {figures['top_1_agreement']:.2%} have the same most likely token")
    print(f"seconds:     {figures['seconds']:.1f}")
    return figures


def main(args) -> None:
    if args.tasks and args.against:
        raise ValueError("--against compares on a text; give --text instead of --tasks")
    for flag in ("window", "stride", "max_tokens") if args.tasks else ("limit",):
        if getattr(args, flag):
            raise ValueError(f"--{flag} is for {'--text' if args.tasks else '--tasks'}; leave it out")
    harness = import_harness() if args.tasks else None
    check_device(args.device)
    if args.json_path:
        check_target(args.json_path, args.checkpoint_path, args.text, args.against)
    model, tokenizer = load(args.checkpoint_path, args.device, args.precision)
    if args.kv_cache:
        model.setup_caches(1, 1, int8=True)  # the larger ones that follow are of the same kind
    figures = run_tasks(args, harness, model, tokenizer) if args.tasks else predict_text(args, model, tokenizer)
    if args.json_path:
        figures |= {"checkpoint_path": str(args.checkpoint_path), "device": args.device, "torch": torch.__version__}
        figures["precision"] = str(model.wte.weight.dtype).removeprefix("torch.")
        write_json(args.json_path, figures)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Perplexity, distance from another model, tasks.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, its tokenizer in the same folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to predict")
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks of lm_eval")
    add("--against", type=Path, metavar="OTHER", help="the model.pth whose distribution is taken for the truth")
    add("--window", type=positive, help="tokens; default: 1024, or the context if that is less")
    add("--stride", type=positive, help="tokens from a window's beginning to the next; default: half a window")
    add("--max_tokens", type=positive, help="only the first tokens of the text")
    add("--limit", type=positive, help="only the first documents of each task")
    add("--kv_cache", choices=("int8",), help="read keys and values from a cache of 8 bits")
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, mps")
    add("--precision", choices=DTYPES, help="default: the checkpoint's, on a CPU float32")
    add("--json", type=Path, dest="json_path", metavar="FILE", help="write the figures for other programs")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main, parse_arguments())
