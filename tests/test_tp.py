"""Tensor parallelism on a CPU, with gloo: any number of ranks computes what one process does."""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from conftest import command
from ranks import CONFIGS, FOUR_RANKS, IDS, results

import fast_model
import generate
import tp
from check_equivalence import FAMILIES, random_weights
from checkpoint import build_model, fingerprint, quantize_model, read_checkpoint, write_checkpoint
from fast_model import to_fast
from quantized_linear import MODES, dequantize_weights

ROOT = Path(generate.__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(ranks: int, *arguments) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*start, *map(str, arguments)]


def finish(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)


# --- shard(): a pure function -----------------------------------------------------------------------------------------


def joined(shards: list[dict], whole: dict) -> dict:
    """The shards put together by the table, rows of replicated kv heads and of padding taken off."""
    state_dict = {}
    for name, tensor in whole.items():
        parts = [part[name] for part in shards]
        dim = next((dim for part, dim in tp.SHARDS.items() if f"{part}." in f"{name}."), None)
        if dim is None or (dim == 1 and tensor.dim() == 1):
            assert all(torch.equal(part, tensor) for part in parts) or name.endswith("bias")
            state_dict[name] = sum(parts[1:], parts[0]) if name.endswith("bias") and dim == 1 else parts[0]
        else:
            held_by = (
                len(parts) * parts[0].shape[dim] // tensor.shape[dim] if "k_proj" in name or "v_proj" in name else 1
            )
            state_dict[name] = torch.cat(parts[::held_by], dim).narrow(dim, 0, tensor.shape[dim])
    return state_dict


@pytest.mark.parametrize("ranks", (2, 4, 8))
@pytest.mark.parametrize("weights", ("float32", *MODES))
@pytest.mark.parametrize("family", CONFIGS)
def test_shards_are_the_whole_model_bit_for_bit(family, weights, ranks):
    config, state_dict = CONFIGS[family], random_weights(CONFIGS[family])
    if weights != "float32":
        config, state_dict = quantize_model(config, state_dict, weights, 32)
    if ranks == 8 and (weights == "int4" or (weights == "mxfp4" and not config.n_expert)):
        with pytest.raises(ValueError, match="4 groups of columns, which 8 ranks do not divide"):
            tp.shard(state_dict, config, 0, ranks)
        return
    shards = [tp.shard(state_dict, config, rank, ranks) for rank in range(ranks)]
    assert all(part.keys() == state_dict.keys() for part in shards)
    assert all(part[name].shape == shards[0][name].shape for part in shards for name in part)
    whole = joined(shards, state_dict)
    assert all(torch.equal(whole[name], tensor) for name, tensor in state_dict.items())


def test_every_matrix_is_split():
    config = CONFIGS["llama-2"]
    shard = tp.shard(random_weights(config), config, 1, 4)
    sizes = {name: tensor.numel() for name, tensor in random_weights(config).items() if tensor.dim() == 2}
    assert all(shard[name].numel() == -(-331 // 4) * 64 if "wte" in name or "lm_head" in name else size // 4
               for name, size in sizes.items())  # fmt: skip


def test_one_rank_gets_the_same_tensors():
    config, state_dict = CONFIGS["gpt-2"], random_weights(CONFIGS["gpt-2"])
    assert tp.shard(state_dict, config, 0, 1) is state_dict


WHYS = {
    None: None,
    "one host": "not all on one host",
    "reached": "the GPU of rank 0 does not reach the memory",
    "reached by others": "rank 1 says so",
    "shared": "rank 0 cannot share memory: no$",
    "shared by others": "rank 1 says so",
}


@pytest.fixture
def made_up_ranks(monkeypatch):
    """Rank 0 of 2, with PyTorch's symmetric memory and the other rank made up; what they are is what can change."""
    ranks = SimpleNamespace(missing=None, asked=0, wait=0, memories=torch.ones(2, 8, dtype=torch.int64))

    def rendezvous(own, group):
        time.sleep(ranks.wait)
        if ranks.missing == "shared":
            raise RuntimeError("no\nCUDA kernel errors might be reported late")
        return SimpleNamespace(get_remote_tensor=lambda rank, shape, dtype: ranks.memories[rank])

    def of_both(values, value):
        ranks.asked += 1
        says_so = ranks.missing == ("reached by others", "shared by others")[ranks.asked - 1]
        values[:] = [value, "rank 1 says so" if says_so else None]

    symmetric_memory = "torch.distributed._symmetric_memory"
    monkeypatch.setattr(f"{symmetric_memory}.empty", lambda words, dtype, device: ranks.memories[0])
    monkeypatch.setattr(f"{symmetric_memory}.rendezvous", rendezvous)
    monkeypatch.setattr("torch.distributed.group", SimpleNamespace(WORLD=SimpleNamespace(group_name="0")))
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda rank, other: ranks.missing != "reached")
    monkeypatch.setattr("torch.distributed.all_gather_object", of_both)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return ranks


@pytest.mark.parametrize("missing, why", WHYS.items())
def test_ranks_share_memory_where_all_of_them_can_and_say_why_not(missing, why, made_up_ranks, monkeypatch):
    made_up_ranks.missing = missing
    if missing == "one host":
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        own, addresses = tp.shared_memory(8, "cpu")
    if missing is None:
        assert not own.any() and not said
        assert addresses.tolist() == [memory.data_ptr() for memory in made_up_ranks.memories]
    else:
        assert own is None and addresses is None
        (warning,) = said
        assert re.search(f"^ranks add up by NCCL, .*{why}", str(warning.message))


def test_a_rank_that_waits_for_memory_without_end_ends_the_run(made_up_ranks, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    monkeypatch.setattr(tp, "PATIENCE", 0.1)
    tp.shared_memory(8, "cpu")
    time.sleep(0.3)
    assert codes == []
    made_up_ranks.wait, made_up_ranks.asked = 0.5, 0
    tp.shared_memory(8, "cpu")
    assert codes == [1] and "error: rank 0 has not got the memory of other ranks" in capsys.readouterr().err


def test_kernels_sum_what_there_is_room_for(monkeypatch):
    """Which sums go to the kernel, and when memory is asked for, with a made-up kernel."""
    taken, asked = [], []
    kernels = SimpleNamespace(
        MOST_ROWS=16,
        runs_on=lambda device: True,
        inbox_words=lambda ranks, dim: ranks * dim,
        told_words=lambda ranks, dim: dim,
        gather_words=lambda ranks: ranks,
        add_norm=lambda x, update, *norms: taken.append(norms[6:]) or (3 * x, x),  # peers, rank, told
    )

    def shared_memory(words, device):
        asked.append(words)
        return torch.zeros(words), torch.zeros(2)

    monkeypatch.setattr(fast_model, "gpu_kernels", kernels)
    monkeypatch.setattr(fast_model, "shared_memory", shared_memory)
    monkeypatch.setattr(fast_model, "all_reduce", lambda update, ranks: 2 * update)

    def by_kernel(rows, norm, told=True):
        taken.clear()
        x = torch.ones(1, rows, len(norm.weight))
        result = norm(x, x, told=told)
        assert torch.equal(result[0], 3 * x)
        told = told and rows == 1 and norm is not models[0].layers[0].norm_1
        assert not taken or taken[0][0] is (norm.told_peers if told else norm.peers)
        return [call[1:] for call in taken] == [(1, told)]

    models = [fast_model.FastGPT(CONFIGS[name], rank=1, ranks=2) for name in ("few kv heads", "gpt-2")]
    rms, other = (model.layers[1].norm_2 for model in models)
    with torch.no_grad():
        assert not by_kernel(1, rms)  # there is no memory yet
    for model in models:
        model.setup_caches(1, 8)
        model.setup_caches(2, 8)
    assert asked == [4 * CONFIGS[name].dim + 2 for name in ("few kv heads", "gpt-2")]  # once
    dim = CONFIGS["gpt-2"].dim  # the words of gathering come first, then those of sums
    kinds = (models[1].peers, other.peers, other.told_peers, models[1].norm_f.told_peers)
    assert [peers.tolist()[0] for peers in kinds] == [0, 8 * 2, 8 * (2 + 2 * dim), 8 * (2 + 3 * dim)]
    with torch.no_grad():
        norms = (rms, other, models[0].norm_f, models[0].layers[0].norm_1)
        assert all(by_kernel(rows, norm) for rows in (1, 16) for norm in norms)
        assert by_kernel(1, models[0].norm_f, told=False)
        assert not by_kernel(17, rms)
    assert not by_kernel(1, rms)


def empty_kernels(log):
    """Made-up kernels of rank 1 of 2 that compute nothing. They note each update that is told or heard, and its inbox,
    and what is gathered."""

    def linear(x, weight, *parts, gated=False, peers=None, rank=0, **more):
        assert rank == (0 if peers is None else 1)
        y = x.new_full((len(x), len(weight) // (2 if gated else 1)), float(len(log)))
        log.extend([("told", peers.tolist(), y)] if peers is not None else [])
        return y

    def add_norm(x, update, *norms):
        assert norms[7] == 1
        log.extend([("heard", norms[6].tolist(), update)] if norms[8] else [])
        return x, x

    def norm_linear(x, residual, norm, eps, weight, *parts, peers, rank, **more):
        assert rank == 1
        log.append(("heard", peers.tolist(), x))
        return residual, linear(x, weight, *parts, **more)

    def gather(x, peers, rank):
        assert rank == 1
        log.append(("gathered", x.shape[-1]))
        return torch.stack([x, x])

    def sum_experts(hidden, logits, used, norm, weight, *parts, bias=None, **to):
        return linear(logits, weight[: len(weight) // logits.shape[1]], **to)

    return SimpleNamespace(
        MOST_ROWS=16,
        MOST_GATHERED=2**18,
        inbox_words=lambda ranks, dim: 1,
        told_words=lambda ranks, dim: 1,
        gather_words=lambda ranks: 1,
        runs_on=lambda device: True,
        takes_few_tokens=lambda x, weight: False,
        takes_norm=lambda x, gated, ranks, *weights: ranks == 2,
        linear=linear,
        norm_linear=norm_linear,
        add_norm=add_norm,
        attention=lambda q, *more: torch.zeros_like(q),
        gather=gather,
        gated_experts=lambda x, logits, used, *more, **bias: x.new_zeros(len(x) * used, 1),
        sum_experts=sum_experts,
    )


@pytest.mark.parametrize("family", ["llama-2", "gemma-3", "pythia", "mixtral", "gpt-2", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_hears_what_a_product_has_told(family, dtype, monkeypatch):
    """Else a rank would wait without end, or add up numbers of another round."""
    log, config = [], CONFIGS[family]
    for file in ("fast_model.gpu_kernels", "fast_model.gpu_products", "tp.gpu_kernels"):
        monkeypatch.setattr(file, empty_kernels(log))
    monkeypatch.setattr(fast_model, "shared_memory", lambda words, device: (None, torch.zeros(2)))
    monkeypatch.setattr(fast_model, "all_reduce", lambda update, *ranks: update)
    monkeypatch.setattr(fast_model, "on_gpu_kernels", lambda x: not torch.is_grad_enabled())
    monkeypatch.setattr(fast_model, "flash_attention_with_sinks", lambda q, *more: torch.zeros_like(q))
    model = build_model(config, tp.shard(random_weights(config), config, 1, 2), "cpu", dtype, rank=1, ranks=2)
    model.setup_caches(2, 32)
    with torch.no_grad():
        for rows, tokens, last in ((1, 1, None), (1, 1, [0]), (1, 5, [3]), (1, 5, None), (2, 1, None), (2, 3, [0, 2])):
            for input_pos in (None, torch.arange(tokens).expand(rows, -1)):
                log.clear()
                model(IDS[:rows, :tokens], input_pos, last and torch.tensor(last))
                single = rows * tokens == 1
                choices = log.count(("gathered", config.n_expert))  # of experts, which all ranks need alike
                assert choices == (0 if single or not config.n_expert else config.n_layer)
                sums = [entry for entry in log if entry[0] != "gathered"]
                told, heard = sums[::2], sums[1::2]
                assert [kind for kind, *_ in sums] == ["told", "heard"] * (
                    2 * config.n_layer if single and not config.parallel else 0
                )
                for (_, to, update), (_, by, added) in zip(told, heard, strict=True):
                    assert to == by and torch.equal(update.flatten(), added.flatten())
                assert all(before != after for (_, before, _), (_, after, _) in zip(told, told[1:], strict=False))


def test_ranks_without_shared_memory_get_rank_0s_choice_of_experts(monkeypatch):
    log, sent, config = [], [], CONFIGS["mixtral"]
    for file in ("fast_model.gpu_kernels", "fast_model.gpu_products"):
        monkeypatch.setattr(file, empty_kernels(log))
    monkeypatch.setattr(fast_model, "shared_memory", lambda words, device: (None, None))
    monkeypatch.setattr(fast_model, "all_reduce", lambda update, *ranks: update)
    monkeypatch.setattr(fast_model, "all_gather", lambda x, *ranks: x)
    monkeypatch.setattr(fast_model, "from_rank_0", lambda x, *ranks: sent.append(x.shape[-1]) or x)
    monkeypatch.setattr(fast_model, "on_gpu_kernels", lambda x: not torch.is_grad_enabled())
    shard = tp.shard(random_weights(config), config, 1, 2)
    model = build_model(config, shard, "cpu", torch.float32, rank=1, ranks=2)
    model.setup_caches(1, 8)
    with torch.no_grad():
        model(IDS[:1, :1], torch.zeros(1, 1, dtype=torch.long))
    assert sent == [config.n_expert] * config.n_layer and log == []


def test_few_numbers_are_gathered_by_the_kernel(monkeypatch):
    """Rank 1 of 2, with a made-up kernel: in one layout and with the same numbers as by a collective."""
    collectives = SimpleNamespace(
        wait_tensor=lambda x: x,
        all_gather_into_tensor=lambda x, ranks, group: torch.cat([x + 100, x]),
        broadcast=lambda x, rank, group: x + 100,
        all_reduce=lambda x, kind, group: x + 100 + x,
    )
    asked = []

    def gather(x, peers, rank):
        asked.append((peers, rank, x.numel()))
        return torch.stack([x + 100, x])

    monkeypatch.setattr(tp, "gpu_kernels", SimpleNamespace(MOST_GATHERED=8, gather=gather))
    monkeypatch.setattr(tp, "ops", collectives)
    monkeypatch.setattr("torch.distributed.group", SimpleNamespace(WORLD=SimpleNamespace(group_name="0")))
    x = torch.arange(12.0).view(2, 2, 3)
    for given, kernel in ((x[:1], True), (x, False)):
        expected = torch.cat([given + 100, given], dim=-1)
        for peers in ("peers", None):
            with torch.no_grad():
                assert torch.equal(tp.all_gather(given, 2, peers, 1), expected)
                assert torch.equal(tp.from_rank_0(given, 2, peers, 1), given + 100)
                assert torch.equal(tp.all_reduce(given, 2, peers, 1), 2 * given + 100)
            assert asked == ([("peers", 1, 6)] * 3 if kernel and peers else [])
            asked.clear()
    tp.all_gather(x[:1], 2, "peers", 1)
    tp.from_rank_0(x[:1], 2, "peers", 1)
    assert asked == []  # the kernel has no gradients


def test_a_token_of_another_rank_is_zeros_whatever_this_one_holds():
    model = fast_model.FastGPT(CONFIGS["few kv heads"], rank=1, ranks=2)
    model.wte.weight.data.fill_(float("inf"))
    rows = model.wte.num_embeddings
    assert model.embed(torch.tensor([[0, rows - 1]])).eq(0).all() and model.embed(torch.tensor([[rows]])).isinf().all()


def test_the_bias_after_a_sum_is_added_once():
    config, state_dict = CONFIGS["gpt-2"], random_weights(CONFIGS["gpt-2"])
    name = "transformer.h.0.attn.o_proj.bias"
    first, second = (tp.shard(state_dict, config, rank, 2)[name] for rank in range(2))
    assert torch.equal(first, state_dict[name]) and not second.any()


def test_a_shard_of_a_mapped_file_copies_no_rows(tiny_checkpoint):
    config, state_dict = read_checkpoint(tiny_checkpoint / "model.pth")
    shard = tp.shard(state_dict, config, 1, 2)
    name = "transformer.h.1.mlp.up_proj.weight"
    assert shard[name].untyped_storage().data_ptr() == state_dict[name].untyped_storage().data_ptr()


def test_quantizing_while_loading_gives_shards_of_the_quantized_model():
    config, state_dict = CONFIGS["few kv heads"], random_weights(CONFIGS["few kv heads"])
    for mode in MODES:
        _, whole = quantize_model(config, state_dict, mode, 32)
        _, part = quantize_model(config, state_dict, mode, 32, 1, 2)
        expected = tp.shard(whole, config, 1, 2)
        assert part.keys() == expected.keys()
        assert all(torch.equal(part[name], tensor) for name, tensor in expected.items())
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in part.values())  # no views of whole matrices


@pytest.mark.parametrize("mode", MODES)
def test_a_shard_has_the_numbers_of_the_dequantized_whole(mode):
    config, state_dict = quantize_model(CONFIGS["few kv heads"], random_weights(CONFIGS["few kv heads"]), mode, 32)
    shard = dequantize_weights(tp.shard(state_dict, config, 1, 2))
    expected = tp.shard(dequantize_weights(state_dict), config, 1, 2)
    assert all(torch.equal(shard[name], tensor) for name, tensor in expected.items())


def test_the_surgery_works_on_shards():
    config = CONFIGS["llama-2"]
    fast = to_fast(tp.shard(random_weights(config), config, 0, 2), config)
    assert fast["layers.0.attn.qkv.weight"].shape == (3 * 4 * 16, 64)
    assert fast["layers.0.mlp.gate_up.weight"].shape == (2 * 128, 64)


@pytest.mark.parametrize(
    ("change", "ranks", "message"),
    (
        ({}, 3, "3 ranks do not divide 8 heads, 8 kv heads and 256 hidden units; these numbers of ranks do: 2, 4, 8"),
        ({"n_head": 6, "n_kv_head": 3}, 2, "2 ranks do not divide 6 heads, 3 kv heads"),
        ({"hidden_dim": 95}, 2, "these numbers of ranks do: none"),
        ({"qk_norm": "all"}, 2, "qk_norm 'all' .* run it on one rank"),
    ),
)
def test_what_does_not_divide_is_refused_with_a_sentence(change, ranks, message):
    config = replace(FAMILIES["llama-2"], **change)
    with pytest.raises(ValueError, match=message):
        tp.shard(random_weights(config), config, 0, ranks)


def test_other_weights_have_another_fingerprint():
    config = CONFIGS["llama-2"]
    one, again, other = (fingerprint(config, random_weights(config, seed)) for seed in (0, 0, 1))
    assert one == again != other
    assert one != fingerprint(replace(config, block_size=95), random_weights(config))


# --- Several processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    return results()


@pytest.fixture(scope="module", params=(2, 4))
def of_ranks(request, tmp_path_factory):
    """What each rank found."""
    file = tmp_path_factory.mktemp("ranks") / "results"
    done = finish(torchrun(request.param, ROOT / "tests/ranks.py", "results", file))
    assert done.returncode == 0, done.stderr
    found = torch.load(file, weights_only=True)
    assert len(found) == request.param
    return found


def test_logits_are_those_of_one_process(of_ranks, alone):
    cases = {name: logits for name, logits in of_ranks[0].items() if isinstance(logits, torch.Tensor)}
    assert len(cases) == 3 * len(CONFIGS if len(of_ranks) == 2 else FOUR_RANKS) + len(MODES)
    for name, logits in cases.items():
        assert (alone[name] - logits).abs().max() < (1e-3 if "int" in name else 1e-4), name


def test_texts_are_those_of_one_process(of_ranks, alone):
    texts = {name: ids for name, ids in of_ranks[0].items() if isinstance(ids, list)}
    texts.pop("few kv heads, compiled", None)
    assert len(texts) == 2 * len(CONFIGS if len(of_ranks) == 2 else FOUR_RANKS) + 4 + len(MODES)
    for name, ids in texts.items():
        assert alone[name] == ids, name


def test_every_rank_has_the_same_tokens(of_ranks):
    first, *others = of_ranks
    for other in others:
        assert all(other[name] == ids for name, ids in first.items() if isinstance(ids, list))


def test_a_compiled_step_gives_the_same_text(of_ranks, alone):
    if len(of_ranks) == 4:
        pytest.skip("compiled by two ranks")
    expected = [ids[:1] for ids in alone["few kv heads, greedy"]]
    assert of_ranks[0]["few kv heads, compiled"][0] == expected[0]
    assert of_ranks[0]["few kv heads, compiled"] == of_ranks[1]["few kv heads, compiled"]


def test_generate_under_torchrun_prints_the_plain_text_once(run, tiny_checkpoint, tmp_path):
    questions = tmp_path / "questions.txt"
    questions.write_text("The first question\nAnother\n")
    options = ["--prompt_file", questions, "--quantize", "int8", "--prompt_lookup", "--num_samples", 2]
    plain = run(*options)
    file, options[1] = tmp_path / "ranks.json", tmp_path / "pipe"
    os.mkfifo(options[1])
    Thread(target=options[1].write_text, args=[questions.read_text()], daemon=True).start()
    done = finish(torchrun(2, *command(tiny_checkpoint, *options, "--json", file)))
    assert done.returncode == 0, done.stderr
    assert done.stdout == plain.stdout
    assert done.stderr.count("prefill:") == 2 and "MB read a step by each rank" in done.stderr
    data = json.loads(file.read_text())
    assert data["samples"] == plain.samples
    assert data["ranks"] == 2 and data["bytes_per_step"] < 0.7 * plain.data["bytes_per_step"]


@pytest.mark.parametrize("name", ("few kv heads", "one kv head"))  # which both ranks hold
def test_check_equivalence_under_torchrun(name, tmp_path):
    write_checkpoint(tmp_path / "model.pth", CONFIGS[name], random_weights(CONFIGS[name]))
    options = ["--checkpoint_path", tmp_path / "model.pth", "--device", "cpu", "--no_compile"]
    done = finish(torchrun(2, ROOT / "check_equivalence.py", *options))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("All rows are within their tolerance.") == 1
    assert done.stdout.count("token by token") == done.stdout.count("int8 by token") == 1


@pytest.mark.parametrize("options", [[], ["--prompt_lookup"]])
def test_weights_that_are_not_finite_are_named_whoever_holds_them(tiny_checkpoint, tmp_path, options):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    config, state_dict = read_checkpoint(folder / "model.pth")
    name = "transformer.h.1.mlp.gate_proj.weight"
    state_dict[name] = state_dict[name].clone()
    state_dict[name][-1] = float("nan")  # of rank 1
    write_checkpoint(folder / "model.pth", config, state_dict)
    done = finish(torchrun(2, *command(folder, "--prompt", "abc", *options)))
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: the weights hold numbers that are not finite, first in layers.1.mlp")


def test_a_failing_rank_ends_the_run_with_its_own_error():
    start = time.perf_counter()
    done = finish(torchrun(2, ROOT / "tests/ranks.py", "fail", "-"))
    assert done.returncode != 0
    assert done.stderr.count("error: rank 1: this rank has had enough") == 1
    assert "Connection" not in done.stderr  # what rank 0 met
    assert time.perf_counter() - start < 30


def test_rank_0_alone_warns():
    done = finish(torchrun(2, ROOT / "tests/ranks.py", "warn", "-"))
    assert done.returncode == 0, done.stderr
    assert "a warning of rank 0" in done.stderr and "a line of rank 0" in done.stderr
    assert "rank 1" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (["--draft_checkpoint_path", "nowhere.pth"], "error: nowhere.pth does not exist"),
        (["--device", "cuda:1"], "error: under torchrun every rank takes a device of its own"),
    ),
)
def test_a_mistake_of_the_user_is_told_once(tiny_checkpoint, options, message):
    done = finish(torchrun(2, *command(tiny_checkpoint, *options)))
    assert done.returncode != 0
    assert done.stderr.count(message) == 1 and "rank 1:" not in done.stderr


def test_a_check_of_nothing_is_an_error():
    done = finish(torchrun(5, ROOT / "check_equivalence.py", "--device", "cpu"))
    assert done.returncode != 0
    assert "error: 5 ranks divide none of the small models" in done.stderr


@pytest.mark.parametrize("differs", ("seed", "checkpoint"))
def test_ranks_that_disagree_are_told_at_the_start(differs, folder, tiny_checkpoint):
    """Two ranks started by hand, as torchrun does on two nodes, each in a folder of its own."""
    if differs == "checkpoint":
        config, _ = read_checkpoint(folder / "model.pth")
        write_checkpoint(folder / "model.pth", config, random_weights(config, seed=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = []
    for rank, own in enumerate((tiny_checkpoint, folder)):
        options = ["--checkpoint_path", "model.pth", "--device", "cpu"]
        options += ["--seed", str(rank)] if differs == "seed" else []
        environment = ENVIRONMENT | place | {"RANK": str(rank), "LOCAL_RANK": "0"}
        arguments = [sys.executable, str(ROOT / "generate.py"), *options]
        ranks.append(subprocess.Popen(arguments, cwd=own, env=environment, stderr=subprocess.PIPE, text=True))
    message = {"seed": "rank 1 has seed 1, where rank 0 has 0", "checkpoint": "rank 1 has another model than rank 0"}
    for process in ranks:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 2
        assert message[differs] in error


def test_ctrl_c_ends_every_rank(tiny_checkpoint):
    arguments = torchrun(2, *command(tiny_checkpoint, "--interactive"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(arguments, cwd=ROOT, env=ENVIRONMENT, **pipes)
    assert process.stdout.read(2) == b"> "  # the ranks are up, and rank 1 waits for what rank 0 reads
    start = time.perf_counter()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.perf_counter() - start < 10


def test_ctrl_c_at_the_prompt_of_ranks_leaves_the_terminal_as_it_was(tiny_checkpoint):
    terminal, inside = pty.openpty()
    before, shown = termios.tcgetattr(inside), b""
    arguments = torchrun(2, *command(tiny_checkpoint, "--interactive"))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), inside)
    own = partial(fcntl.ioctl, inside, termios.TIOCSCTTY, 0)  # so that the key sends the signal
    environment = ENVIRONMENT | {"TERM": "xterm"}
    with subprocess.Popen(
        arguments, cwd=ROOT, env=environment, start_new_session=True, preexec_fn=own, **streams
    ) as process:
        while not shown.endswith(b"> "):
            shown += os.read(terminal, 4096)
        time.sleep(1)  # CPython's input() misses a signal that comes between its prompt and its read
        os.write(terminal, b"\x03")
        process.wait(timeout=60)
    assert process.returncode != 0
    assert termios.tcgetattr(inside) == before
    os.close(terminal)
    os.close(inside)


def test_a_chat_template_with_a_clock_is_rendered_by_rank_0(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    settings = folder / "tokenizer_config.json"
    template = "{{ strftime_now('%H:%M:%S.%f') }}{{ messages[0].content }}"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    done = finish(torchrun(2, *command(folder, "--chat", "--prompt", "hi", "--max_new_tokens", 3)))
    assert done.returncode == 0, done.stderr
