"""int4-gptq: it changes a layer's outputs less than rounding to nearest does, and gives the same kind of file."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import quantize
import quantized_linear
from check_equivalence import FAMILIES, check_model, random_weights
from checkpoint import read_checkpoint, untie_head, write_checkpoint
from quantize import gptq, gptq_weights, output_error
from quantized_linear import Int4Linear, Int8Linear


def layer(rows=48, columns=256, tokens=2000):
    """A weight and the hessian of inputs that live near a space of few dimensions."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(tokens, columns // 8, generator=generator) @ torch.randn(
        columns // 8, columns, generator=generator
    )
    x = mixed + 0.3 * torch.randn(tokens, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x


@pytest.mark.parametrize("columns, group_size", [(256, 32), (256, 64), (320, 64), (96, 32), (512, 256)])
def test_outputs_change_less_than_by_rounding_to_nearest(columns, group_size):
    weight, hessian = layer(columns=columns)
    parts = gptq(weight, hessian, group_size)
    nearest = Int4Linear.quantize(weight, group_size)
    assert {name: (t.shape, t.dtype) for name, t in parts.items()} == {
        name: (t.shape, t.dtype) for name, t in nearest.items()
    }
    assert output_error(weight, parts, hessian) < 0.6 * output_error(weight, nearest, hessian)


def test_independent_inputs_are_rounded_to_nearest():
    weight, _ = layer()
    parts, nearest = gptq(weight, torch.eye(256) * 7, 64), Int4Linear.quantize(weight, 64)
    assert all(torch.equal(parts[name], nearest[name]) for name in nearest)


def test_columns_that_no_input_reaches_are_rounded_to_nearest():
    weight, hessian = layer()
    hessian[64:128], hessian[:, 64:128] = 0, 0
    parts, nearest = gptq(weight, hessian, 64), Int4Linear.quantize(weight, 64)
    assert torch.equal(parts["weight"][:, 32:64], nearest["weight"][:, 32:64])
    nothing = gptq(weight, torch.zeros(256, 256), 64)
    assert all(torch.equal(nothing[name], nearest[name]) for name in nearest)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    config = FAMILIES[family]
    config, state = untie_head(config, random_weights(config))
    before = {name: tensor.clone() for name, tensor in state.items()}
    ids = torch.randint(config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    if config.n_expert:
        with pytest.raises(ValueError, match="GPTQ of experts"):
            gptq_weights(config, state, 32, ids, "cpu")
        return
    if family in ("llama-3.1", "qwen3", "glm-4", "gemma-3"):  # 120 columns are not groups of 32
        with pytest.raises(ValueError, match="120 columns"):
            gptq_weights(config, state, 32, ids, "cpu")
        return
    quantized = gptq_weights(config, state, 32, ids, "cpu")
    assert all(torch.equal(state[name], before[name]) for name in before)  # a tied head is the embedding itself
    assert quantized.keys() == quantized_linear.quantize_weights(state, "int4", 32).keys()
    head = Int8Linear.quantize(state["lm_head.weight"])
    assert all(torch.equal(quantized[f"lm_head.{name}"], head[name]) for name in head)
    assert all(row.passed for row in check_model(config, quantized, compiled=False))


@pytest.fixture(scope="module")
def checkpoint_folder(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq")
    shutil.copytree(tiny_checkpoint, folder, dirs_exist_ok=True)
    config = replace(FAMILIES["llama-2"], block_size=64)  # the fixture's own columns are not groups of 32
    write_checkpoint(folder / "model.pth", config, random_weights(config))
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return folder


def run(*arguments):
    command = [sys.executable, "quantize.py", *map(str, arguments)]
    return subprocess.run(command, cwd=Path(quantize.__file__).parent, capture_output=True, text=True)


def test_the_command_writes_an_int4_file_that_says_how_it_was_made(checkpoint_folder):
    folder = checkpoint_folder
    plain = ("--checkpoint_path", folder / "model.pth", "--device", "cpu")
    done = run(*plain, "--mode", "int4-gptq", "--calibration", folder / "text.txt")
    assert done.returncode == 0, done.stderr
    assert "layer 1: error" in done.stdout
    out = folder / "model_int4-gptq_g32.pth"
    read_checkpoint(out)
    content = torch.load(out, weights_only=True)
    assert content["quantization"]["mode"] == "int4" and content["quantization_method"] == "gptq"


@pytest.mark.parametrize(
    "mode, calibration, message",
    [
        ("int4-gptq", None, "needs --calibration"),
        ("int4", "text.txt", "no other mode"),
        ("int4-gptq", "missing.txt", "missing.txt"),
        ("int4-gptq", b"\xff\xfe\xff", "not UTF-8"),
        ("int4-gptq", b"short", "at least 64"),
    ],
)
def test_refusals_are_one_sentence(checkpoint_folder, tmp_path, mode, calibration, message):
    if isinstance(calibration, bytes):
        (tmp_path / "text.txt").write_bytes(calibration)
        calibration = tmp_path / "text.txt"
    elif calibration:
        calibration = checkpoint_folder / calibration
    arguments = ["--checkpoint_path", checkpoint_folder / "model.pth", "--mode", mode, "--device", "cpu"]
    end = run(*arguments, *(["--calibration", calibration] if calibration else []))
    assert end.returncode == 2 and message in end.stderr
    assert end.stderr.startswith("error: ") and end.stderr.count("\n") == 1
