"""What only a GPU shows: CUDA graphs, and the host that runs ahead. Skipped without one."""

import pytest
import torch

from check_equivalence import FAMILIES, check_model, random_weights
from checkpoint import build_model, quantize_model
from generate import Sampling, compile_options, decode_step, generate
from quantize import Int4Linear, Int8Linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_agrees(family):
    config = FAMILIES[family]
    rows = list(check_model(config, random_weights(config), "cuda"))
    assert [row for row in rows if not row.passed] == []


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=1.0, top_k=20, top_p=0.9)])
def test_compiled_text_is_the_eager_text(sampling):
    torch.compiler.reset()
    config = FAMILIES["llama-3.1"]
    model = build_model(config, random_weights(config), "cuda", torch.float32)
    step = torch.compile(decode_step, fullgraph=True, dynamic=False, options=compile_options("cuda"))
    prompt = torch.randint(config.vocab_size, (2, 9), device="cuda")
    expected = list(generate(model, prompt, 50, sampling, seed=3))
    assert list(generate(model, prompt, 50, sampling, seed=3, decode_step=step)) == expected


def test_running_ahead_stops_at_each_rows_end():
    config = FAMILIES["llama-2"]
    model = build_model(config, random_weights(config), "cuda", torch.float32)
    prompt = torch.randint(config.vocab_size, (2, 9), device="cuda")
    plain = list(generate(model, prompt, 40, Sampling(temperature=0)))
    ends = {plain[12][0], plain[23][1]}
    stopped = list(generate(model, prompt, 40, Sampling(temperature=0), eos_ids=ends))
    for row in range(2):
        ids = [ids[row] for ids in plain]
        until = next(i for i, id in enumerate(ids) if id in ends) + 1
        assert [ids[row] for ids in stopped] == ids[:until] + [None] * (len(stopped) - until)


def close(y, expected, dtype):
    return (y - expected).norm() <= (1e-5 if dtype == torch.float32 else 4e-3) * expected.norm()


@pytest.mark.parametrize("kind", ["plain", "int8", 32, 256])
@pytest.mark.parametrize("shape", [(33, 768), (96, 11008)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_kernels_give_what_the_plain_path_gives(kind, shape, dtype):
    import gpu_kernels

    weight = torch.randn(shape, device="cuda")
    if kind == "plain":
        parts = expected = (weight.to(dtype),)
    elif kind == "int8":
        parts = tuple(t.to(dtype) if t.is_floating_point() else t for t in Int8Linear.quantize(weight).values())
        expected = (Int8Linear.dequantize(parts[0], parts[1].double()),)
    else:
        parts = Int4Linear.quantize(weight, kind)
        scales, zeros = parts["scales"].to(dtype), parts["zeros"].to(dtype)
        expected = (Int4Linear.dequantize(parts["weight"], scales.double(), zeros.double()),)
        parts = (gpu_kernels.int4_layout(Int4Linear.unpack(parts["weight"])), scales, zeros)
    for tokens in (1, 2, 16, 17, 70):
        x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
        y = gpu_kernels.linear(x, *parts)
        assert close(y, x.double() @ expected[0].double().T, dtype), tokens


@pytest.mark.parametrize("heads, kv_heads, size", [(4, 4, 128), (8, 2, 64), (6, 3, 20)])
@pytest.mark.parametrize("batch, tokens", [(1, 1), (3, 1), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_kernel_gives_what_the_plain_path_gives(heads, kv_heads, size, batch, tokens, dtype):
    import gpu_kernels

    slots = 1000
    k, v = torch.randn(2, batch, kv_heads, slots, size, device="cuda", dtype=dtype)
    q = torch.randn(batch, tokens, heads, size, device="cuda", dtype=dtype)
    for first, window in ((0, slots), (70, slots), (70, 24), (slots - tokens, slots), (slots - tokens, 24)):
        start = torch.tensor([max(0, first - 40 * row) for row in range(batch)], device="cuda")
        input_pos = start[:, None] + torch.arange(tokens, device="cuda")
        y = gpu_kernels.attention(q, k, v, input_pos, window)
        seen = torch.arange(slots, device="cuda") <= input_pos[:, None, :, None]
        seen &= torch.arange(slots, device="cuda") > input_pos[:, None, :, None] - window
        wide = (t.double() for t in (q.transpose(1, 2), k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=seen, enable_gqa=True)
        assert close(y, expected.transpose(1, 2), dtype), (first, window)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_model_decodes_the_same_compiled(mode):
    torch.compiler.reset()
    config, state = quantize_model(FAMILIES["llama-2"], random_weights(FAMILIES["llama-2"]), mode, 32)
    assert [row for row in check_model(config, state, "cuda") if not row.passed] == []
