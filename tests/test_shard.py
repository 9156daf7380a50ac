"""finetune.py --shard: ranks that divide a model learn, save and continue what one process does.

Under torchrun this file is what the ranks compute: `torchrun ... tests/test_shard.py COMPILED FILE`.
"""

import os
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

sys.path.insert(0, str(Path(__file__).parent.parent))

import scripts.finetune as finetune  # noqa: E402
from check_equivalence import FAMILIES, random_weights  # noqa: E402
from checkpoint import load, read_checkpoint, save, whole, write_checkpoint
from runtime import rank_and_count, run_command

ROOT = Path(__file__).parent.parent
TEXT = "the quick brown fox jumps over the lazy dog. " * 60
STEPS = ["--steps", "6", "--every", "2", "--length", "24", "--learning_rate", "3e-3", "--device", "cpu"]
# One norm of a layer is taken by the next; windows, so that layers differ; layer norms and positions; experts.
EAGER = [("gemma-3", "fast"), ("gemma-3", "reference"), ("gpt-2", "fast"), ("qwen3-moe", "fast")]
COMPILED = [("gemma-3", "fast"), ("mixtral", "fast")]
IDS = torch.randint(331, (4, 41), generator=torch.Generator().manual_seed(0))


def trained(model, ids, compiled: bool = False, recompute: bool = False, scale: float = 1.0) -> tuple[float, dict]:
    """(the loss of rows, {name: its gradient}), over batches that are accumulated."""
    loss, total = finetune.make_loss(model, compiled, recompute), 0.0
    for batch in ids.split(1):
        value = loss(batch[:, :-1], batch[:, 1:]) * scale
        value.backward()
        total += value.item()
    return total, {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}


def compare(family: str, twin: str, lora: int, compiled: bool, folder: Path) -> None:
    """A model divided among the ranks against one that each has, of the same weights and on the same rows."""
    (rank, ranks), config = rank_and_count(), FAMILIES[family]
    weights = random_weights(config)
    args = {"model": twin, "lora_rank": lora, "lora_alpha": 8.0, "lora_targets": ["q_proj", "v_proj", "o_proj"]}
    alone, divided = (
        finetune.make_model(Namespace(**args, device="cpu", seed=1, shard=shard), config, weights)
        for shard in (False, True)
    )
    assert all(isinstance(layer, FSDPModule) for layer in finetune.layers_of(divided))
    held = sum(p.to_local().numel() for p in divided.parameters())
    assert held < 1.1 * sum(p.numel() for p in alone.parameters()) / ranks
    expected, gradients = trained(alone, IDS)
    rows = IDS.chunk(ranks)[rank]
    total, found = trained(divided, rows, compiled, recompute=lora > 0, scale=ranks)
    total = torch.tensor(total)
    dist.all_reduce(total)
    assert total.item() / ranks == pytest.approx(expected, rel=1e-5)
    assert found.keys() == gradients.keys()
    for name in gradients if rank == 0 else ():
        most = gradients[name].abs().max().item()
        torch.testing.assert_close(found[name], gradients[name], rtol=1e-5, atol=1e-5 * max(most, 1), msg=name)
    if lora:
        return
    save(divided, folder / "divided.pth")
    if rank == 0:
        write_checkpoint(folder / "plain.pth", config, weights)
        save(alone, folder / "alone.pth")
        assert (folder / "divided.pth").read_bytes() == (folder / "alone.pth").read_bytes()
    with torch.no_grad():
        for parameter in divided.parameters():
            parameter.zero_()
    dist.barrier()
    load(divided, folder / "plain.pth")
    loaded = finetune.weights_of(divided)
    assert rank > 0 or all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def main(args) -> None:
    folder = Path(args.file)
    for family, twin in COMPILED if args.compiled else EAGER:
        for lora in (0, 2):
            compare(family, twin, lora, args.compiled, folder)
            if rank_and_count()[0] == 0:
                with open(folder / "done", "a") as file:
                    print(family, twin, lora, file=file)


def ranks(count: int, *arguments, timeout: int = 120) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment, "timeout": timeout}
    return subprocess.run([*launcher, *map(str, arguments)], **options)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_divided_model_has_the_loss_gradients_and_file_of_a_whole_one(tmp_path, compiled):
    done = ranks(2, __file__, int(compiled), tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "done").read_text().splitlines()) == 2 * len(COMPILED if compiled else EAGER)


STOPPED = """
import sys, scripts.finetune as finetune
from runtime import objects_of_ranks, run_command

def save_model(*arguments):
    saved(*arguments)
    objects_of_ranks("saved")
    raise FloatingPointError("stopped")

saved, finetune.save_model = finetune.save_model, save_model
run_command(finetune.main, finetune.parse_arguments(), splits=True)
"""


def close(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def means_of(training: Path) -> dict:
    """Adam's means of the gradients: weights do not show it if all of these are too large by a factor."""
    states = torch.load(training, weights_only=True)["optimizer"]["state"]
    return {number: state["exp_avg"] for number, state in states.items()}


def losses(output: str) -> list[float]:
    return [float(line.split("loss ")[1]) for line in output.splitlines() if line.startswith("step ")]


@pytest.mark.parametrize(
    ("counts", "more"), [((2, 4), []), ((4,), ["--lora_rank", 2, "--model", "reference", "--clip", "inf"])]
)
def test_ranks_and_then_one_process_learn_what_one_does(tiny_checkpoint, tmp_path, monkeypatch, capsys, counts, more):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "stopped.py").write_text(STOPPED)

    def command(name, *batches):
        files = ["--checkpoint_path", tiny_checkpoint / "model.pth", "--data", tmp_path / "text.txt"]
        rest = ["--out_dir", tmp_path / name, "--precision", "float32", "--sample", "the quick", *STEPS, *more]
        return list(map(str, [*files, *rest, *batches]))

    def alone(name, *batches):
        monkeypatch.setattr(sys, "argv", ["finetune.py", *command(name, *batches)])
        finetune.main(finetune.parse_arguments())
        return capsys.readouterr().out

    expected, output = alone("alone", "--batch_size", 4), ""
    for count in counts:
        batches = ["--shard", "--batch_size", 1, "--accumulate", 4 // count, "--resume"]
        done = ranks(count, tmp_path / "stopped.py", *command("divided", *batches))
        assert done.stderr.count("error: stopped") == 1, done.stderr
        output += done.stdout
    samples = [line for line in output.splitlines() if "->" in line]
    assert samples == [line for line in expected.splitlines() if "->" in line][: len(samples)]
    output += alone("divided", "--batch_size", 2, "--accumulate", 2, "--resume")
    assert losses(output) == pytest.approx(losses(expected), abs=1e-4)
    found, weights = (read_checkpoint(tmp_path / name / "model.pth")[1] for name in ("divided", "alone"))
    close(found, weights)
    close(*(means_of(tmp_path / name / "training.pth") for name in ("divided", "alone")))


def test_an_error_of_ranks_that_divide_a_model_is_told_once(tiny_checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    files = ["--checkpoint_path", tiny_checkpoint / "model.pth", "--data", tmp_path / "text.txt"]
    more = ["--out_dir", tmp_path / "out", *STEPS, "--lora_rank", 2, "--lora_targets", "q_proj", "--shard"]
    (tmp_path / "out").mkdir()
    torch.save({"settings": {}}, tmp_path / "out" / "training.pth")
    done = ranks(2, "-m", "scripts.finetune", *files, *more, "--resume")
    assert "exitcode  : 2" in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "training.pth was written by an earlier version" in done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.compile = partial(torch.compile, backend="aot_eager")  # the graphs, run by PyTorch's own operators
    run_command(main, Namespace(compiled=sys.argv[1] == "1", file=sys.argv[2], device="cpu"), splits=True)
