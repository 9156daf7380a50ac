"""Tensor parallelism: which part of each weight a rank holds, and the sums between ranks.

Decisions to know (the split is that of Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053):

- Heads and hidden units are divided among the ranks: rows of q, k, v, gate and up, columns of output and down. So the
  ranks add up their results once after attention and once after the feed-forward; see `AddNorm` in fast_model.py.
- Embedding and head are split over the vocabulary, with rows of zeros where it does not divide. The logits are
  gathered, so that sampling sees all of them, and the token that rank 0 samples is everybody's.
- Fewer kv heads than ranks are each held by several ranks. Heads that do not divide otherwise are refused.
- `shard` works on the unfused state dict before it is loaded, plain or quantized: of a mapped file a rank reads its own
  slices only. Quantized columns are cut between groups, so that a shard holds exactly the numbers of the whole.
- The sums are functional collectives, which torch.compile takes into its graph: NCCL on GPUs, gloo on CPUs. On GPUs
  that reach each other's memory, those of a few tokens are in the kernel of the next norm (`gpu_kernels.add_norm`), or
  of a product that takes it (`gpu_products.norm_linear`). Few logits and the token are gathered by a kernel too.

Copy me: needs torch, and for speed on GPUs `gpu_kernels.py`.

Shapes: N output rows, K input columns; heads H, kv heads KV, C head dim.
"""

import os
import sys
import warnings
from dataclasses import replace
from threading import Timer

import torch
import torch.distributed as dist

try:
    import gpu_kernels
except ImportError:  # no Triton, or the file was left behind
    gpu_kernels = None

# The dimension of each module's weight that is divided, of every expert's too: 0 its output rows, 1 its input columns.
# What is not here is whole on every rank. A bias is divided like rows; that of a module divided by columns is added
# once, by rank 0.
SHARDS = {
    "transformer.wte": 0,
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "sinks": 0,
    "o_proj": 1,
    "gate_proj": 0,
    "up_proj": 0,
    "down_proj": 1,
    "lm_head": 0,
}


def shard_config(config, ranks: int):
    """The config of one rank's layers. Raises ValueError if heads or hidden units cannot be divided so."""
    heads, kv_heads, hidden = config.n_head, config.n_kv_head, config.hidden_dim
    if config.qk_norm == "all" and ranks > 1:
        raise ValueError("qk_norm 'all' takes the norm over all heads, which ranks would divide; run it on one rank")
    if heads % ranks or hidden % ranks or max(kv_heads, ranks) % min(kv_heads, ranks):
        fits = [n for n in range(2, heads + 1) if not (heads % n or hidden % n or max(kv_heads, n) % min(kv_heads, n))]
        raise ValueError(
            f"{ranks} ranks do not divide {heads} heads, {kv_heads} kv heads and {hidden} hidden units; these numbers "
            f"of ranks do: {', '.join(map(str, fits)) or 'none'}"
        )
    return replace(config, n_head=heads // ranks, n_kv_head=max(1, kv_heads // ranks), hidden_dim=hidden // ranks)


def vocab_rows(config, ranks: int) -> int:
    """Rows of embedding and head that each rank holds."""
    return -(-config.vocab_size // ranks)


def shard(state_dict: dict, config, rank: int, ranks: int) -> dict:
    """Rank `rank`'s part, of `ranks`, of a state dict in the reference's layout, plain or quantized.

    The parts of rows are views. Raises ValueError if heads, hidden units or groups of 4-bit weights do not divide.
    """
    if ranks == 1:
        return state_dict
    shard_config(config, ranks)
    shards = {}
    for name, tensor in state_dict.items():
        module, _, kind = name.rpartition(".")
        dim = next((dim for part, dim in SHARDS.items() if module.endswith(part) or kind == part), None)
        if dim == 0 and module.endswith(("k_proj", "v_proj")) and config.n_kv_head < ranks:
            heads = tensor.unflatten(0, (config.n_kv_head, -1))  # several ranks hold the same one
            shards[name] = heads[rank * config.n_kv_head // ranks]
        elif dim == 0:
            rows = -(-len(tensor) // ranks)
            part = tensor[rank * rows : (rank + 1) * rows]
            missing = rows - len(part)  # of the vocabulary
            shards[name] = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
        elif dim == 1 and tensor.dim() == 2:  # weight [N, K], and of 4 bits weight [N, K/2], scales and zeros [N, K/G]
            if tensor.shape[1] % ranks:
                advice = "" if kind == "scales" and tensor.dtype == torch.uint8 else ", smaller groups or int8"  # MXFP4
                parts = f"{2 * tensor.shape[1]} columns" if kind == "weight" else f"{tensor.shape[1]} groups of columns"
                raise ValueError(f"{module} has {parts}, which {ranks} ranks do not divide; take fewer ranks{advice}")
            columns = tensor.shape[1] // ranks
            shards[name] = tensor[:, rank * columns : (rank + 1) * columns].contiguous()
        elif dim == 1 and kind == "bias" and rank > 0:
            shards[name] = torch.zeros_like(tensor)
        else:
            shards[name] = tensor
    return shards


# --- Between the ranks: PyTorch's functional collectives, inside a graph too. With one rank they do nothing. ----------

ops = torch.ops._c10d_functional


def is_certain(condition) -> bool:
    """Whether it holds, of a dynamic T whatever that is, and without a guard. Outside a graph nothing is imported,
    which would take half a second."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def by_kernel(x, peers) -> bool:
    """Whether x goes through the memory that ranks share, of which `peers` are the addresses, if there is some."""
    few = peers is not None and is_certain(x.numel() <= gpu_kernels.MOST_GATHERED)
    return few and not torch.is_grad_enabled()


def all_reduce(x, ranks: int, peers=None, rank: int = 0):
    """The sum of every rank's x."""
    if ranks == 1:
        return x
    if by_kernel(x, peers):
        return gpu_kernels.gather(x, peers, rank).sum(0)
    return ops.wait_tensor(ops.all_reduce(x, "sum", dist.group.WORLD.group_name))


def all_gather(x, ranks: int, peers=None, rank: int = 0):
    """Every rank's x [..., N] one after the other, [..., ranks N]."""
    if ranks == 1:
        return x
    if by_kernel(x, peers):
        parts = gpu_kernels.gather(x, peers, rank)
    else:
        parts = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), ranks, dist.group.WORLD.group_name))
        parts = parts.view(ranks, *x.shape)
    return parts.movedim(0, -2).flatten(-2)


def from_rank_0(x, ranks: int, peers=None, rank: int = 0):
    """Rank 0's x. Ranks compute alike but for a last bit here and there, and a token must be the same to the bit."""
    if ranks == 1:
        return x
    if by_kernel(x, peers):
        return gpu_kernels.gather(x, peers, rank)[0]  # the others' too: who only told would not be held back
    return ops.wait_tensor(ops.broadcast(x, 0, dist.group.WORLD.group_name))


PATIENCE = 60  # seconds for ranks to give each other their memory, which takes less than one


def shared_memory(words: int, device) -> tuple:
    """(zeros int64 [words], addresses int64 [ranks] of every rank's as this GPU sees them, valid as long as the first
    is held), or (None, None) with a warning if ranks cannot reach each other's memory. All ranks call this.

    PyTorch waits without end for a rank that has failed to give its memory, so a rank that waits for long ends its
    process, which ends the run.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def first_of_ranks(why: str | None) -> str | None:
        reasons = [None] * ranks
        dist.all_gather_object(reasons, why)
        return next(filter(None, reasons), None)

    def give_up():
        print(f"error: rank {rank} has not got the memory of other ranks in {PATIENCE} s", file=sys.stderr, flush=True)
        os._exit(1)

    why = own = addresses = None
    if int(os.environ.get("LOCAL_WORLD_SIZE", 0)) != ranks:
        why = "torchrun's LOCAL_WORLD_SIZE says that they are not all on one host"
    elif not all(torch.cuda.can_device_access_peer(rank, i) for i in range(ranks) if i != rank):
        why = f"the GPU of rank {rank} does not reach the memory of every other"
    why = first_of_ranks(why)
    if why is None:
        import torch.distributed._symmetric_memory as symmetric_memory  # private, so only where it is needed

        own = symmetric_memory.empty(words, dtype=torch.int64, device=device).zero_()
        torch.cuda.synchronize(device)
        timer = Timer(PATIENCE, give_up)
        timer.start()
        try:
            handle = symmetric_memory.rendezvous(own, dist.group.WORLD.group_name)
            addresses = [handle.get_remote_tensor(i, (words,), torch.int64).data_ptr() for i in range(ranks)]
        except RuntimeError as error:  # in a container, say, that does not let processes share memory
            why = f"rank {rank} cannot share memory: {str(error).partition(chr(10))[0]}"
        why = first_of_ranks(why)
        timer.cancel()
    if why is None:
        return own, torch.tensor(addresses, device=device)
    if rank == 0:
        warnings.warn(f"ranks add up by NCCL, which is slower than by kernels, because {why}", stacklevel=2)
    return None, None
