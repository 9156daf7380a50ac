"""What several ranks compute for test_tp.py and test_gpu.py: `torchrun ... tests/ranks.py MODE FILE`. No test."""

import sys
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import tp  # noqa: E402
from check_equivalence import FAMILIES, in_chunks, random_weights  # noqa: E402
from checkpoint import build_model, quantize_model
from decode import Sampling, Steps, decode_step, generate
from model import GPTConfig  # noqa: E402
from quantized_linear import MODES
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
            torch.testing.assert_close(y, torch.nn.functional.rms_norm(expected, (size,), weights[0], 1e-5))


def main(args) -> None:
    rank, ranks = rank_and_count()
    if args.mode == "norms":
        return check_norms(args.device, rank, ranks)
    if args.mode == "fail" and rank == 1:
        raise ValueError("this rank has had enough")
    if args.mode == "results":
        found = objects_of_ranks(results(rank, ranks, compiled=ranks == 2))
        if rank == 0:
            torch.save(found, args.file)
    else:
        tp.all_reduce(torch.ones(2), ranks)  # which waits for the other rank


if __name__ == "__main__":
    torch.set_num_threads(1)
    device = "cuda" if sys.argv[1] == "norms" else "cpu"
    run_command(main, Namespace(mode=sys.argv[1], file=sys.argv[2], device=device), splits=True)
