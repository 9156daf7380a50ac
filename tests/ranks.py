"""What several ranks compute for test_tp.py and test_gpu.py: `torchrun ... tests/ranks.py MODE FILE`. No test."""

import logging
import sys
import warnings
from argparse import Namespace
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import tp  # noqa: E402
from check_equivalence import FAMILIES, in_chunks, random_weights  # noqa: E402
from checkpoint import build_model, quantize_model
from decode import Sampling, Steps, decode_step, generate
from model import GPTConfig  # noqa: E402
from quantized_linear import MODES, Int4Linear, Int8Linear
from runtime import objects_of_ranks, rank_and_count, run_command
from speculate import DraftModel, Fixed, PromptLookup, Speculation

SMALL = {"block_size": 96, "n_layer": 2, "n_head": 8, "head_dim": 16, "hidden_dim": 256}
DIVIDED = {name: family for name, family in FAMILIES.items() if family.qk_norm != "all"}
CONFIGS = {name: GPTConfig(**vars(family) | SMALL | {"n_kv_head": 8}) for name, family in DIVIDED.items()}
CONFIGS["few kv heads"] = GPTConfig(**vars(FAMILIES["llama-2"]) | SMALL | {"n_kv_head": 2})
CONFIGS["one kv head"] = GPTConfig(**vars(FAMILIES["qwen2"]) | SMALL | {"n_kv_head": 1})
FOUR_RANKS = ("gpt-2", "qwen3-moe", "few kv heads", "one kv head")  # seconds: two ranks compute all
IDS = torch.randint(331, (3, 30), generator=torch.Generator().manual_seed(0))
NEW = 12  # tokens
KINDS = ("plain", "int8", "int4")  # of weights


def prepared(name: str, weights: str, rank: int = 0, ranks: int = 1):
    """A float32 model, or a rank's shard of it; with weights of one of MODES if so named."""
    config = CONFIGS[name]
    state_dict = random_weights(config)
    if weights == "float32":
        state_dict = tp.shard(state_dict, config, rank, ranks)
    else:
        config, state_dict = quantize_model(config, state_dict, weights, 32, rank, ranks)
    return build_model(config, state_dict, "cpu", torch.float32, rank=rank, ranks=ranks)


def rows_of(*lengths) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(IDS, lengths, strict=True)]


@torch.no_grad()
def results(rank: int = 0, ranks: int = 1, compiled: bool = False) -> dict:
    """{case: logits or ids} of everything that must not depend on the number of ranks."""
    found = {}
    for name in CONFIGS if ranks < 4 else FOUR_RANKS:
        model = prepared(name, "float32", rank, ranks)
        for rows in (1, 3):
            found[f"{name}, batch {rows}"] = in_chunks(model, IDS[:rows], 13)
        found[f"{name}, one by one"] = in_chunks(model, IDS[:1], 1)
        found[f"{name}, greedy"] = list(generate(model, rows_of(30, 23, 7), NEW, Sampling(0)))
        found[f"{name}, sampled"] = list(generate(model, IDS, NEW, Sampling(), seed=5))
    for weights in MODES:
        model = prepared("few kv heads", weights, rank, ranks)
        found[f"{weights}, batch 3"] = in_chunks(model, IDS, 13)
        found[f"{weights}, greedy"] = list(generate(model, IDS, NEW, Sampling(0)))
    model, draft = (prepared("few kv heads", "float32", *split) for split in ((rank, ranks), ()))
    for name, drafts, k in (("draft model", DraftModel(draft), 3), ("prompt lookup", PromptLookup(), 4)):
        for kind, sampling in (("greedy", Sampling(0)), ("sampled", Sampling())):
            steps = Steps(speculation=Speculation(model, sampling, drafts, Fixed(k)))
            found[f"{name}, {kind}"] = list(generate(model, IDS, NEW, sampling, seed=5, steps=steps))
    if compiled:
        steps = Steps(decode_step=torch.compile(decode_step, fullgraph=True, dynamic=False))
        found["few kv heads, compiled"] = list(generate(model, IDS[:1], NEW, Sampling(0), steps=steps))
    return found


def check_norms(device: str, rank: int, ranks: int) -> None:
    """The kernel of a norm with the sum of all ranks in it, against plain PyTorch."""
    import gpu_kernels

    size = 1000
    memory, peers = tp.shared_memory(gpu_kernels.inbox_words(ranks, size), device)
    assert peers is not None, "the GPUs share no memory"
    random = torch.Generator().manual_seed(0)
    for rows in (1, 16, 3, 1, 16) * 20:
        x, weights, *updates = torch.randn(2 + ranks, rows, size, generator=random).to(device)
        for post in (None, weights[-1]):
            norms = (weights[0], None, post, 1e-5)
            total, y = gpu_kernels.add_norm(x, updates[rank], *norms, scale=0.3, peers=peers, rank=rank)
            update = sum(updates)
            update = update if post is None else torch.nn.functional.rms_norm(update, (size,), post, 1e-5)
            expected = x + 0.3 * update
            torch.testing.assert_close(total, expected)
            bits = objects_of_ranks((total.tolist(), y.tolist()))
            assert bits == bits[:1] * ranks, "a rank has another last bit"
            torch.testing.assert_close(y, torch.nn.functional.rms_norm(expected, (size,), weights[0], 1e-5))


def packed(kind: str, weight) -> tuple[tuple, torch.Tensor]:
    """A weight [N, K] of this kind, as `gpu_products.linear` takes it, and the weight that it stands for."""
    import gpu_products

    if kind == "plain":
        return (weight,), weight
    if kind == "int8":
        parts = Int8Linear.quantize(weight)
        return (parts["weight"], parts["scales"]), Int8Linear.dequantize(parts["weight"], parts["scales"].float())
    parts = Int4Linear.quantize(weight, 32)
    scales, zeros = parts["scales"], parts["zeros"]
    stands_for = Int4Linear.dequantize(parts["weight"], scales.float(), zeros.float())
    return (parts["weight"], *gpu_products.in_bytes(scales, zeros)), stands_for


def check_products(device: str, rank: int, ranks: int) -> None:
    """Products whose kernel tells other ranks its part of the sum, and norms that hear it."""
    import gpu_kernels
    import gpu_products

    N, K, ones = 1000, 320, torch.ones(1000, device=device)
    words = gpu_kernels.told_words(ranks, N)
    memory, first = tp.shared_memory(2 * words, device)
    random = torch.Generator().manual_seed(0)
    for round, kind in enumerate(KINDS * 20):
        peers = first + 8 * words * (round % 2)
        weights = torch.randn(ranks, N, K, generator=random).to(device) / K**0.5
        hidden, x = (torch.randn(n, 1, width, generator=random).to(device) for n, width in ((ranks, K), (1, N)))
        every = [packed(kind, weight) for weight in weights]
        update = gpu_products.linear(hidden[rank], *every[rank][0], peers=peers, rank=rank)
        total, y = gpu_kernels.add_norm(x, update, ones, None, None, 1e-5, peers=peers, rank=rank, told=True)
        expected = x + sum(h @ weight.T for h, (_, weight) in zip(hidden, every, strict=True))
        torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(expected, (N,), ones, 1e-5), atol=1e-4, rtol=1e-4)
        bits = objects_of_ranks(total.tolist())
        assert bits == bits[:1] * ranks, "a rank has another last bit"


def check_streamed_products(device: str, rank: int, ranks: int) -> None:
    """Products that tell by the copy engine's kernel, and those that hear and take the norm themselves, against a
    norm's kernel. Which of both hears first alternates, and no rank waits for another in between."""
    import gpu_kernels
    import gpu_products

    if torch.cuda.get_device_capability() != (9, 0):
        return
    told, heard, rounds, memories = set(), set(), [], []
    for dim, dtype in ((2880, torch.bfloat16), (4096, torch.bfloat16), (5120, torch.float16)):
        words = gpu_kernels.told_words(ranks, dim)
        memory, first = tp.shared_memory(2 * words, device)
        memories.append(memory)  # which another rank may still write to
        random = torch.Generator().manual_seed(0)
        before, after, norm, residuals, hidden = (
            torch.randn(shape, generator=random).to(device, dtype)
            for shape in ((dim, 2048), (4096, dim), (dim,), (48, 1, dim), (48, ranks, 1, 2048))
        )
        every = [(kind, packed(kind, before / 2048**0.5), packed(kind, after)[0]) for kind in KINDS]
        inboxes = [first, first + 8 * words]
        for round, ((kind, (part, weight), following), gated) in enumerate([*product(every, (False, True))] * 8):
            to, x = {"peers": inboxes[round % 2], "rank": rank}, residuals[round]
            told |= {(kind, dim)} if gpu_products.takes_streamed(hidden[0, 0], *[*part, None][:2], dim, True) else set()
            update = gpu_products.linear(hidden[round, rank], *part, **to)
            more = {"activation": "silu", "gated": True} if gated else {}
            hears, found = gpu_products.takes_norm(update, gated, ranks, *following), []
            heard |= {(kind, dim, gated)} if hears else set()
            ways = ["norm", "product"] if hears else ["norm"]
            for way in ways[:: (-1) ** (round // 6)]:
                if way == "norm":
                    total, normed = gpu_kernels.add_norm(x, update, norm, None, None, 1e-5, **to, told=True)
                    y = gpu_products.linear(normed, *following, **more)
                else:
                    total, y = gpu_products.norm_linear(update, x, norm, 1e-5, *following, **more, **to)
                found.append((total, y))
            rounds.append((x.float() + (hidden[round].float() @ weight.float().T).sum(0), found))
    for expected, found in rounds:
        (total, y), (total_again, y_again) = found[0], found[-1]
        assert (total - expected).norm() < 0.01 * expected.norm()
        assert torch.equal(total, total_again) and (y - y_again).norm() < 0.01 * y.norm()
    bits = objects_of_ranks([found[0][0].tolist() for _, found in rounds])
    assert bits == bits[:1] * ranks, "a rank has another last bit"
    assert told == {*product(KINDS, (4096, 5120))}
    shapes = [("plain", 2880), *product(("plain", "int8"), (4096, 5120))]
    assert heard == {(*shape, gated) for shape in shapes for gated in (False, True)}


def check_gathering(device: str, rank: int, ranks: int) -> None:
    """The kernel that gathers, of many and few numbers in turn, against what every rank can compute by itself."""
    import gpu_kernels

    memory, peers = tp.shared_memory(gpu_kernels.gather_words(ranks), device)
    most = gpu_kernels.MOST_GATHERED
    for round, size in enumerate((1, most, 5, 1, 16001, 2, most, 1, 1) * 10):
        for dtype in (torch.bfloat16, torch.float32, torch.int64):
            random = torch.Generator().manual_seed(round)
            every = torch.randint(-1, 2**24, (ranks, 1, size), generator=random).to(device, dtype)
            with torch.no_grad():
                assert torch.equal(gpu_kernels.gather(every[rank], peers, rank), every)
                assert torch.equal(tp.all_gather(every[rank], ranks, peers, rank), every.flatten()[None])
                assert torch.equal(tp.from_rank_0(every[rank], ranks, peers, rank), every[0])


def main(args) -> None:
    rank, ranks = rank_and_count()
    if args.mode == "kernels":
        check_norms(args.device, rank, ranks)
        check_products(args.device, rank, ranks)
        check_streamed_products(args.device, rank, ranks)
        return check_gathering(args.device, rank, ranks)
    if args.mode == "fail in a kernel":
        import gpu_kernels

        memory, peers = tp.shared_memory(gpu_kernels.gather_words(ranks), args.device)
        if rank == 0:
            gpu_kernels.gather(torch.ones(1, device=args.device), peers, rank).tolist()
    if args.mode.startswith("fail") and rank == 1:
        raise ValueError("this rank has had enough")
    if args.mode == "warn":
        warnings.warn(f"a warning of rank {rank}", stacklevel=1)
        logging.getLogger("torch").warning("a line of rank %s", rank)
    if args.mode == "results":
        found = objects_of_ranks(results(rank, ranks, compiled=ranks == 2))
        if rank == 0:
            torch.save(found, args.file)
    else:
        tp.all_reduce(torch.ones(2), ranks)  # which waits for the other rank


if __name__ == "__main__":
    torch.set_num_threads(1)
    device = "cuda" if "kernel" in sys.argv[1] else "cpu"
    run_command(main, Namespace(mode=sys.argv[1], file=sys.argv[2], device=device), splits=True)
