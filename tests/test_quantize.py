"""quantize.py: what it rounds to, what it refuses, and that every way to compute with it agrees."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantize
import quantized_linear
from check_equivalence import FAMILIES, check_model, in_chunks, random_weights
from checkpoint import build_model, describe_quantization, quantize_model, read_checkpoint, write_checkpoint
from fast_model import fuse, to_fast, to_reference
from quantized_linear import (
    MODES,
    Int4Linear,
    Int8Linear,
    Mxfp4Linear,
    dequantize_weights,
    quantize_weights,
    swap_linears,
)

SHAPES = [(1, 32), (16, 64), (17, 96), (48, 256)]


def weight(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [*SHAPES, (5, 7)])  # int8 takes an odd number of columns too
def test_int8_is_off_by_at_most_half_a_step(shape):
    plain = weight(shape)
    parts = Int8Linear.quantize(plain)
    off = (Int8Linear.dequantize(parts["weight"], parts["scales"].float()) - plain).abs()
    # The scale itself is rounded to bf16, so that the largest of a row may be cut off by 1/256 of itself.
    assert (off <= parts["scales"].float()[:, None] / 2 + plain.abs() / 256).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", quantized_linear.GROUP_SIZES)
def test_int4_is_off_by_at_most_half_a_step_and_cuts_ends_off_for_less_error(monkeypatch, shape, group_size):
    if shape[1] % group_size:
        pytest.skip("the groups do not divide this shape")
    plain = weight(shape)

    def errors():  # and the scales and zeros
        parts = Int4Linear.quantize(plain, group_size)
        scales, zeros = parts["scales"].float(), parts["zeros"].float()
        off = Int4Linear.dequantize(parts["weight"], scales, zeros) - plain
        return off.abs().unflatten(1, (-1, group_size)), scales, zeros

    least, _, _ = errors()
    monkeypatch.setattr(quantized_linear, "PARTS_CUT_OFF", (0,))
    off, scales, zeros = errors()
    slack = scales / 16 + zeros.abs() / 128  # scale and zero point are rounded to bytes
    assert (off <= (scales / 2 + slack)[..., None]).all()
    least, off = (error.square().sum(-1) for error in (least, off))
    assert (least <= off).all() and (least.sum() < 0.97 * off.sum() or least.numel() == 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_mxfp4_is_off_by_at_most_half_a_step(shape):
    plain = weight(shape) * torch.logspace(-20, 20, shape[0])[:, None]
    parts = Mxfp4Linear.quantize(plain)
    groups, rounded = (t.unflatten(1, (-1, 32)) for t in (plain, Mxfp4Linear.dequantize(**parts)))
    scales = (2.0 ** (parts["scales"].double() - 127))[..., None]
    largest = groups.abs().amax(-1, keepdim=True) / scales
    assert (3 < largest).all() and (largest <= 6).all()  # no smaller scale has room for it
    size = groups.abs() / scales
    steps = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    assert ((rounded - groups).abs() <= steps * scales / 2).all()


def test_mxfp4_takes_the_even_one_of_two_numbers_as_near():
    """Its eight numbers, what is half way between them, and what comes of that; 6 keeps the scale at 1."""
    halves = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4, 0.26: 0.5, 4.9: 4, 5.1: 6}
    given = torch.tensor([*range(5), 0.5, 1.5, 6, *halves])
    expected = torch.tensor([*range(5), 0.5, 1.5, 6, *halves.values()])
    row = torch.nn.functional.pad(torch.cat([given, -given[8:]]), (0, 4))[None]
    found = Mxfp4Linear.dequantize(**Mxfp4Linear.quantize(row))[0]
    assert found.tolist() == [*expected.tolist(), *(-expected[8:]).tolist(), 0, 0, 0, 0]


def test_what_mxfp4_holds_it_keeps():
    packed = torch.randint(256, (16, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scales = torch.randint(1, 255, (16, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    packed[0], packed[1] = 0, 0x88  # zeros and negative zeros
    numbers = Mxfp4Linear.dequantize(packed, scales)
    assert numbers.isfinite().all()
    assert torch.equal(Mxfp4Linear.dequantize(**Mxfp4Linear.quantize(numbers)), numbers)


def test_mxfp4_of_a_mixture_is_its_experts_and_int8_then_the_rest():
    config = FAMILIES["gpt-oss"]
    config, state = quantize_model(config, random_weights(config), "mxfp4", 32)
    packed = {name for name, tensor in state.items() if tensor.dtype == torch.uint8 and name.endswith("weight")}
    assert packed and packed == {name for name in state if ".experts." in name and name.endswith("_proj.weight")}
    assert describe_quantization(state)["mode"] == "mxfp4" and "int8" not in describe_quantization(state)
    config, both = quantize_model(config, state, "int8", 32)
    assert {name for name, tensor in both.items() if tensor.dtype == torch.uint8} >= packed
    assert all(torch.equal(both[name], state[name]) for name in packed)
    int8 = describe_quantization(both)["int8"]
    assert "lm_head.weight" in int8 and "transformer.h.0.attn.o_proj.weight" in int8
    assert not any(name.endswith("router.weight") for name in int8)
    assert all(row.passed for row in check_model(config, both, compiled=False))
    for mode in ("mxfp4", "int8"):
        with pytest.raises(ValueError, match="is quantized already"):
            quantize_model(config, both, mode, 32)


def test_int8_sums_are_not_too_large_for_float16():
    layer = Int8Linear(4096, 8, bias=False)
    layer.load_state_dict(Int8Linear.quantize(torch.full((8, 4096), 0.02)))
    y = layer.half()(torch.ones(1, 4096, dtype=torch.float16))
    assert ((y - 0.02 * 4096).abs() < 0.3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_of_another_model_is_swapped_in_its_dtype(mode, dtype):
    net = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(64, 48)}).to(dtype)
    quantized = quantize_weights(net.state_dict(), mode, 32)
    swap_linears(net, quantized)
    net.load_state_dict(quantized)
    x = weight((3, 64)).to(dtype)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            y = net["up_proj"](x)
        plain = dequantize_weights(quantized)["up_proj.weight"].to(dtype)
        expected = torch.nn.functional.linear(x, plain, quantized["up_proj.bias"])
        assert y.dtype == dtype
        assert (y - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("group_size", [-32, 0, 16, 48, 128])
def test_int4_refuses_groups_that_no_kernel_takes(group_size):
    with pytest.raises(ValueError, match=f"multiple of 32 columns, not {group_size}"):
        Int4Linear(64, 48, bias=False, group_size=group_size)


def test_constant_and_zero_weights_stay_what_they_are():
    for value in (0.0, 0.5, -2.0):
        plain = torch.full((4, 32), value)
        state = quantize_weights({"a_proj.weight": plain}, "int4", 32)
        assert torch.allclose(dequantize_weights(state)["a_proj.weight"], plain, atol=1e-6)
        state = quantize_weights({"a_proj.weight": plain}, "mxfp4", None)
        assert torch.equal(dequantize_weights(state)["a_proj.weight"], plain)
        state = quantize_weights({"a_proj.weight": plain}, "int8", None)
        assert torch.allclose(dequantize_weights(state)["a_proj.weight"], plain, rtol=1e-2, atol=1e-6)


def test_a_byte_holds_the_even_column_low_and_the_odd_one_high():
    q = Int4Linear.unpack(torch.tensor([[0x21, 0xF0]], dtype=torch.uint8))
    assert q.tolist() == [[1, 2, 0, 15]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_step_computes_with_the_same_numbers(mode, dtype):
    torch.compiler.reset()
    config = FAMILIES["qwen2"]
    config, state = quantize_model(config, random_weights(config), mode, 32)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = build_model(config, state, "cpu", torch.float32, reference=True)(ids)
        model = build_model(config, state, "cpu", dtype)
        logits = in_chunks(model, ids, 1, torch.compile(model, fullgraph=True, dynamic=False)).float()
    tolerance = 2e-4 if dtype == torch.float32 else 0.05  # cpu_kernels.py rounds to 16 bits
    assert (logits - expected).norm() < tolerance * expected.norm()


def swapped_nibbles(state):
    return {name: t >> 4 | t << 4 if t.dtype == torch.uint8 else t for name, t in state.items()}


def shifted_scales(state):
    return {name: t.roll(1, -1) if name.endswith("scales") else t for name, t in state.items()}


@pytest.mark.parametrize(
    "mode, spoil",
    [
        ("int4", swapped_nibbles),
        ("int4", shifted_scales),
        ("int8", shifted_scales),
        ("mxfp4", swapped_nibbles),
        ("mxfp4", shifted_scales),
    ],
)
def test_broken_packing_fails_the_check(monkeypatch, mode, spoil):
    config = FAMILIES["llama-2"]
    config, state = quantize_model(config, random_weights(config), mode, 32)
    assert all(row.passed for row in check_model(config, state, compiled=False))
    monkeypatch.setattr("checkpoint.fuse", lambda state, *more: fuse(spoil(state), *more))
    assert not all(row.passed for row in check_model(config, state, compiled=False))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_fusing_commutes_with_quantizing(family, mode):
    config = FAMILIES[family]
    if mode != "int8" and family in ("llama-3.1", "qwen3", "glm-4", "gemma-3"):
        pytest.skip("120 columns are not groups of 32")
    config, state = quantize_model(config, random_weights(config), mode, 32)
    back = to_reference(to_fast(state, config), config)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("mode", MODES)
def test_the_head_is_int8_in_every_mode(mode):
    plain = weight((8, 40))  # columns that groups of 32 do not divide
    state = quantize_weights({"lm_head.weight": plain, "a_proj.weight": weight((8, 64))}, mode, 32)
    nearest = Int8Linear.quantize(plain)
    assert {name for name in state if name.startswith("lm_head.")} == {f"lm_head.{name}" for name in nearest}
    assert all(torch.equal(state[f"lm_head.{name}"], nearest[name]) for name in nearest)
    assert ("a_proj.zeros" in state) == (mode == "int4")
    assert (state["a_proj.scales"].dtype == torch.uint8) == (mode == "mxfp4")


@pytest.mark.parametrize(
    "mode, group_size, int8",
    [("int8", None, None), ("int4", 32, ["lm_head.weight"]), ("mxfp4", 32, ["lm_head.weight"])],
)
def test_a_file_says_what_it_is(tmp_path, mode, group_size, int8):
    config = FAMILIES["gpt-2"]
    config, state = quantize_model(config, random_weights(config), mode, 32)
    write_checkpoint(tmp_path / "any name.pth", config, state)
    content = torch.load(tmp_path / "any name.pth", weights_only=True)
    said = content["quantization"]
    assert (said["mode"], said["group_size"], said.get("int8")) == (mode, group_size, int8)
    assert "transformer.wte.weight" in said["full_precision"] and "lm_head.weight" not in said["full_precision"]
    assert not content["config"]["tie_embeddings"]  # a tied head gets a quantized copy of its own
    read_config, read_state = read_checkpoint(tmp_path / "any name.pth")
    assert read_config == config and describe_quantization(read_state) == said


def test_a_file_from_when_the_head_was_int4_still_loads(tmp_path):
    config = FAMILIES["llama-2"]
    config, state = quantize_model(config, random_weights(config), "int4", 32)
    write_checkpoint(tmp_path / "model.pth", config, state)
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    parts = Int4Linear.quantize(weight((config.vocab_size, config.dim)), 32)
    content["state_dict"] |= {f"lm_head.{name}": part for name, part in parts.items()}
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="quantized in a way"):  # it says that the head is int8
        read_checkpoint(tmp_path / "model.pth")
    del content["quantization"]["int8"]
    torch.save(content, tmp_path / "model.pth")
    config, state = read_checkpoint(tmp_path / "model.pth")
    assert all(row.passed for row in check_model(config, state, compiled=False))


def run(*arguments):
    command = [sys.executable, "quantize.py", *map(str, arguments)]
    return subprocess.run(command, cwd=Path(quantize.__file__).parent, capture_output=True, text=True)


def test_the_command_writes_a_smaller_file_beside_and_refuses_to_do_it_twice(tiny_checkpoint):
    done = run("--checkpoint_path", tiny_checkpoint / "model.pth", "--mode", "int8")
    assert done.returncode == 0, done.stderr
    out = tiny_checkpoint / "model_int8.pth"
    assert describe_quantization(read_checkpoint(out)[1])["mode"] == "int8"
    assert out.stat().st_size < (tiny_checkpoint / "model.pth").stat().st_size
    again = run("--checkpoint_path", out, "--mode", "int8")
    assert again.returncode == 2 and "is quantized already" in again.stderr and "Traceback" not in again.stderr
    out.unlink()


def test_a_checkpoint_is_not_quantized_over_itself(tiny_checkpoint):
    file = tiny_checkpoint / "model.pth"
    done = run("--checkpoint_path", file, "--mode", "int8", "--out_path", file)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {file} would be written over")


def test_flags_of_another_mode_are_refused(tiny_checkpoint):
    for mode, flag in (("int8", "--group_size"), ("mxfp4", "--group_size"), ("int4", "--calibration_tokens")):
        end = run("--checkpoint_path", tiny_checkpoint / "model.pth", "--mode", mode, flag, "64")
        assert end.returncode == 2 and end.stderr.count("\n") == 1 and flag in end.stderr


def test_groups_that_do_not_divide_are_refused_by_name(tiny_checkpoint):
    end = run("--checkpoint_path", tiny_checkpoint / "model.pth", "--mode", "int4", "--group_size", "64")
    assert end.returncode == 2 and end.stderr.count("\n") == 1
    assert "transformer.h.0.attn.q_proj.weight has 32 columns" in end.stderr
    assert not list(tiny_checkpoint.glob("*int4*"))
