"""The C++ kernels of each instruction set against plain PyTorch, how they are compiled, and what runs without them."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cpu_kernels
import fast_model
import quantized_linear
from check_equivalence import FAMILIES, check_model, random_weights
from checkpoint import build_model, quantize_model, write_checkpoint
from quantized_linear import Int4Linear, Int8Linear

HAS_COMPILER = cpu_kernels.available()
needs_kernels = pytest.mark.skipif(not HAS_COMPILER, reason="needs an x86 processor with AVX2, and a C++ compiler")


@pytest.fixture(params=cpu_kernels.FLAGS)
def kernels(request):
    """cpu_kernels with one instruction set's operators. Of a processor without it they are compiled, no more."""
    library = cpu_kernels.compile_library(request.param)
    if library is None and not HAS_COMPILER:
        pytest.skip("needs an x86 processor with AVX2, and a C++ compiler")
    assert library is not None
    if request.param not in cpu_kernels.instruction_sets():
        pytest.skip(f"this processor has no {request.param}; compiled only")
    ctypes.CDLL(str(library)).register_operators()
    with torch.no_grad():
        yield cpu_kernels
    best = cpu_kernels.compile_library(cpu_kernels.instruction_sets()[0])
    ctypes.CDLL(str(best)).register_operators()


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(kind, N, K):
    """What `linear` takes after x, and the numbers that they are, in float64."""
    plain = numbers(N, K, seed=1) / 20
    if kind == "int8":
        parts = Int8Linear.quantize(plain)
        args = parts["weight"], parts["scales"]
        return args, Int8Linear.dequantize(parts["weight"], parts["scales"].double())
    if kind.startswith("int4"):
        parts = Int4Linear.quantize(plain, int(kind.removeprefix("int4-")))
        args = parts["weight"], parts["scales"], parts["zeros"]
        return args, Int4Linear.dequantize(parts["weight"], parts["scales"].double(), parts["zeros"].double())
    plain = plain.to(getattr(torch, kind))
    return (plain,), plain.double()


def error(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


PRODUCTS = [
    ("float32", 50, 96), ("bfloat16", 50, 96), ("float16", 50, 96), ("int8", 50, 96), ("int8", 2, 32),
    ("int4-32", 50, 96), ("int4-32", 2, 32), ("int4-32", 18, 576), ("int4-64", 34, 1536), ("int4-128", 6, 384),
    ("int4-256", 20, 512),
]  # fmt: skip


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, N, K", PRODUCTS)
def test_products_are_those_of_the_plain_weights(kernels, threads, kind, N, K, dtype):
    args, plain = weights(kind, N, K)
    for T in (1, 2, 3, 4, 5, 6, 7, 8, 9, 40):
        x = numbers(T, K, seed=T, dtype=dtype)
        expected = x.double() @ plain.T
        tolerance = 1e-4 if dtype == torch.float32 else 5e-3
        y = kernels.linear(x, *args)
        assert y.shape == (T, N) and y.dtype == dtype and error(y, expected) < tolerance
        gate, up = expected.chunk(2, dim=-1)
        gated = kernels.linear(x, *args, gated=True)
        assert error(gated, torch.nn.functional.silu(gate) * up) < 2 * tolerance


def test_float32_scales_are_read_too(kernels):
    (weight, scales), plain = weights("int8", 8, 64)
    x = numbers(1, 64)
    assert torch.equal(kernels.linear(x, weight, scales), kernels.linear(x, weight, scales.float()))


def test_activations_with_an_outlier_keep_16_bits_in_their_group(kernels):
    args, plain = weights("int8", 64, 256)
    x = numbers(1, 256)
    x[0, 5] = 3000.0
    assert error(kernels.linear(x, *args), x.double() @ plain.T) < 1e-4
    x[0, 32:] *= 1e-6  # groups without it are not rounded to nothing
    x[0, :32] = 0
    assert error(kernels.linear(x, *args), x.double() @ plain.T) < 1e-4


@pytest.mark.parametrize("kind", ["float32", "int8", "int4-32"])
def test_tensors_that_are_not_contiguous_are_read_right(kernels, kind):
    args, plain = weights(kind, 40, 96)
    args = [t.T.contiguous().T if t.ndim == 2 else t.repeat_interleave(2)[::2] for t in args]  # GPTQ's scales are such
    x = numbers(96, 3).T
    assert not any(t.is_contiguous() for t in (x, *args))
    assert error(kernels.linear(x, *args), x.double() @ plain.T) < 1e-4


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4-32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(kernels, kind, value):
    args, _ = weights(kind, 40, 96)
    x = numbers(2, 96)
    x[1, 70] = value
    y = kernels.linear(x, *args)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("D", [576, 70])
def test_the_norm_of_a_sum(kernels, dtype, tolerance, D):
    x, update, weight = (numbers(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(2, 3, D), (2, 3, D), (D,)]))
    total, y = kernels.add_norm(x, update, weight, 1e-5)
    assert torch.equal(total, x + update)
    assert error(y, torch.nn.functional.rms_norm(total.double(), (D,), weight.double(), 1e-5)) < tolerance


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("dtype, cache", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.int8)])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("T, C", [(1, 64), (5, 64), (16, 24)])
def test_attention_is_that_of_plain_pytorch(kernels, monkeypatch, threads, dtype, cache, window, T, C):
    """Positions differ between rows; each way stores the same."""
    config = fast_model.GPTConfig(
        block_size=300, vocab_size=8, n_layer=1, n_head=6, n_kv_head=2, head_dim=C, dim=64, hidden_dim=64,
        sliding_window=window,
    )  # fmt: skip
    layer = fast_model.Attention(config, 0).to(dtype)
    first = torch.tensor([[0], [200]])
    positions = first + torch.arange(T)
    x = numbers(2, T, 64, dtype=dtype)
    rope = fast_model.rope_table(config, 300, "cpu")[positions].unsqueeze(2)
    slots = torch.arange(300)
    mask = slots <= positions[:, None, :, None]
    if window:
        mask = mask & (slots > positions[:, None, :, None] - window)
    results, calls, kernel = [], [], kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *args: calls.append(1) or kernel(*args))
    for module in (kernels, None):
        monkeypatch.setattr(fast_model, "cpu_kernels", module)  # None: the file was left behind
        layer.setup_cache((2, 2, 300, C), cache, "cpu")
        past = numbers(2, 2, 200, C, seed=5)
        for name in "kv":
            values, scales = getattr(layer, f"{name}_cache"), getattr(layer, f"{name}_scale_cache")
            if scales is None:
                values[:, :, :200] = past
            else:
                values[:, :, :200], scales[:, :, :200] = fast_model.quantize_heads(past)
        results.append(
            (layer(layer.project(x), rope, mask, positions), [cache.clone() for cache in layer.buffers(recurse=False)])
        )
    assert calls == [1]
    (y, stored), (expected, expected_stored) = results
    assert error(y, expected.double()) < (1e-5 if dtype == torch.float32 else 1e-2)
    for ours, plain in zip(stored, expected_stored, strict=True):
        assert (ours.float() - plain.float()).abs().max() <= (1 if cache == torch.int8 else 0.02)


@pytest.mark.parametrize("kind", ["float32", "int8", "int4-32"])
def test_other_inputs_than_a_product_takes_are_refused(kernels, kind):
    args, _ = weights(kind, 50, 96)
    for x in (numbers(2, 64), numbers(2, 192), numbers(2, 96).half(), numbers(2, 96).double()):
        with pytest.raises(ValueError, match="it must have 96 columns in float32 or bfloat16"):
            kernels.linear(x, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_in_float16_are_left_to_pytorch(kernels, dtype):
    layer = Int8Linear(96, 50, bias=False)
    (weight, scales), plain = weights("int8", 50, 96)
    layer.load_state_dict({"weight": weight, "scales": scales.half()}, assign=True)
    x = numbers(3, 96).to(dtype)
    assert error(layer(x), x.double() @ plain.T) < 1e-2


def test_a_position_outside_of_the_cache_writes_nowhere(kernels):
    q, k, v = (numbers(1, 1, heads, 32, seed=heads) for heads in (4, 2, 3))
    caches = torch.zeros(1, 2, 8, 32), torch.zeros(1, 2, 8, 32)
    kernels.attention((q, k, v[:, :, :2]), None, torch.tensor([[8]]), (*caches, None, None), 8, 0.2)
    assert not any(cache.any() for cache in caches)


# Kernels that are broken on purpose, one line each, and a row that has to fail.

FAULTS = {
    "zero points of another grid": ("- 8.0f * from_bf16(scales", "- 7.0f * from_bf16(scales", "int4 by token"),
    "scales of the group before": ("from_scales[i * groups + g]", "from_scales[i * groups]", "int8 by token"),
    "the own slot not seen": ("first + i > last ||", "first + i >= last ||", "token by token"),
    "all of a chunk seen": ("first + i > last ||", "", "in chunks of 7"),
    "a window one slot too small": ("<= last - window", "<= last - window + 1", "token by token"),
    "sinks left out": ("float total = sinks ? std::exp(sink - top) : 0;", "float total = 0;", "token by token"),
}


@needs_kernels
@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_kernel_fails_the_check(monkeypatch, tmp_path, name):
    line, broken, row = FAULTS[name]
    assert line in cpu_kernels.SOURCE, "cpu_kernels.py has changed: what breaks it now?"
    monkeypatch.setattr(cpu_kernels, "SOURCE", cpu_kernels.SOURCE.replace(line, broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    best = cpu_kernels.instruction_sets()[0]
    ctypes.CDLL(str(cpu_kernels.compile_library(best))).register_operators()
    config = FAMILIES["mistral" if "window" in name else "gpt-oss" if "sinks" in name else "llama-2"]
    failed = {row.name for row in check_model(config, random_weights(config), compiled=False) if not row.passed}
    monkeypatch.undo()
    ctypes.CDLL(str(cpu_kernels.compile_library(best))).register_operators()
    assert row in failed


# Weights in 16 bits.


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stay_in_16_bits_and_compute_the_same(dtype):
    config = FAMILIES["llama-2"]
    state = {name: tensor.to(dtype) for name, tensor in random_weights(config).items()}
    ids = torch.arange(20)[None]
    kept = build_model(config, state, "cpu", torch.float32, keep_16_bits=True)
    plain = build_model(config, state, "cpu", torch.float32)
    assert kept.wte.weight.dtype == kept.layers[0].mlp.down.weight.dtype == dtype
    assert kept.norm_f.weight.dtype == torch.float32 and plain.wte.weight.dtype == torch.float32
    for model in (kept, plain):
        model.setup_caches(1, 32)
        assert model.layers[0].attn.k_cache.dtype == torch.float32
    with torch.no_grad():
        for start, end in ((0, 18), (18, 19), (19, 20)):
            positions = torch.arange(start, end)[None]
            difference = kept(ids[:, start:end], positions) - plain(ids[:, start:end], positions)
            assert difference.abs().max() < 2e-5
    assert (kept(ids) - plain(ids)).abs().max() < 2e-5  # with gradients there are no kernels


# Compiling them.


def python(code, **environment):
    """What a fresh process prints, in this environment alone."""
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, cwd=Path(cpu_kernels.__file__).parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


AVAILABLE = "import cpu_kernels; print(cpu_kernels.available(), cpu_kernels.instruction_sets())"
PATH = "/usr/local/bin:/usr/bin:/bin"


@needs_kernels
def test_several_processes_compile_at_once_and_leave_one_library(tmp_path):
    running = [python(AVAILABLE, PATH=PATH, XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]
    printed = {process.communicate() for process in running}
    assert printed == {(f"True {cpu_kernels.instruction_sets()}\n", "")}
    assert [file.suffix for file in (tmp_path / "gpt_twin").iterdir()] == [".so"]


@pytest.mark.parametrize(
    "environment",
    [{"PATH": ""}, {"PATH": PATH, "CXX": "/bin/false"}, {"PATH": PATH, "ATEN_CPU_CAPABILITY": "default"}],
    ids=["no compiler", "one that fails", "no AVX2"],
)
def test_where_they_cannot_be_compiled_there_are_none(tmp_path, environment):
    out, err = python(AVAILABLE, XDG_CACHE_HOME=str(tmp_path), **environment).communicate()
    assert out.startswith("False ") and err == ""


@needs_kernels
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    out, err = python(AVAILABLE, PATH=PATH, XDG_CACHE_HOME=str(tmp_path / "file")).communicate()
    assert out.startswith("False ") and err == ""


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_weights_generate_without_a_compiler(tmp_path, tiny_checkpoint, mode):
    from conftest import command

    arguments = command(tiny_checkpoint, "--quantize", mode, "--prompt", "ab", "--temperature", 0)
    if mode == "int4":  # of groups of 32
        config = FAMILIES["llama-2"]
        write_checkpoint(tmp_path / "model.pth", config, random_weights(config))
        arguments = command(tmp_path, "--quantize", mode, "--prompt", 5, "--temperature", 0)
    code = f"import runpy, sys; sys.argv = {arguments}; runpy.run_path(sys.argv[0], run_name='__main__')"
    out, err = python(code, PATH="", XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path)).communicate()
    assert "decode:  11 steps" in err, err
    assert err.count("no C++ compiler") == bool(cpu_kernels.instruction_sets())
    assert mode == "int4" or len(out) > 3


# The plain twins.


@pytest.mark.parametrize("family", ["llama-2", "mixtral"])
def test_every_way_agrees_without_them(plain_twins, family):
    config = FAMILIES[family]
    rows = list(check_model(config, random_weights(config)))
    assert [row for row in rows if not row.passed] == []
    assert not any("rounded to 16 bits" in row.reason for row in rows)


@pytest.mark.parametrize("group_size", quantized_linear.GROUP_SIZES)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("rows", [32, 48, 33])  # 33: not a multiple of 16, which PyTorch's kernel wants
def test_pytorchs_layout_of_int4_is_that_of_dequantize(plain_twins, group_size, tokens, rows):
    parts = Int4Linear.quantize(numbers(rows, 512) / 20, group_size)
    layer = Int4Linear(512, rows, bias=True, group_size=group_size)
    layer.load_state_dict(parts | {"bias": numbers(rows, seed=1).bfloat16()}, assign=True)
    layer.prepare()
    layer.prepare()  # which it is already
    assert (layer.cpu_scales is not None) == (rows % 16 == 0)
    x = numbers(1, tokens, 512, seed=2).bfloat16()
    plain = Int4Linear.dequantize(*(parts[name].double() if name != "weight" else parts[name] for name in parts))
    assert error(layer(x), x.double() @ plain.T + layer.bias.double()) < 1e-2


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_int4_takes_bfloat16_where_only_pytorch_multiplies_it(plain_twins, mode):
    from checkpoint import default_dtype

    config = FAMILIES["llama-2"]
    _, state = quantize_model(config, random_weights(config), mode, 32)
    assert default_dtype("cpu", state) == (torch.bfloat16 if mode == "int4" else torch.float32)
