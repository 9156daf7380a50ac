"""What model.py and fast_model.py promise. That they agree in full is the matter of test_check_equivalence.py."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fast_model
from check_equivalence import FAMILIES, LLAMA3_SCALING, random_weights
from checkpoint import build_model
from fast_model import FastGPT, fuse, rope_table, to_fast, to_reference
from model import GPT, GPTConfig, rope_frequencies, rotate

TINY = {name: replace(config, block_size=48) for name, config in FAMILIES.items()}
LLAMA, MISTRAL = TINY["llama-3.1"], TINY["mistral"]
TWINS = {"reference": True, "fast": False}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_twin = pytest.mark.parametrize("reference", TWINS.values(), ids=TWINS)


def build(config, reference=False, dtype=torch.float32, **weights):
    return build_model(config, random_weights(config) | weights, "cpu", dtype, reference)


def random_ids(rows, length, seed=0):
    return torch.randint(LLAMA.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def positions(start, stop, rows=1):
    return torch.arange(start, stop).expand(rows, -1)


def by_token(forward, ids):
    """Logits [B, T, V], one token at a time."""
    return torch.cat([forward(ids[:, i : i + 1], positions(i, i + 1, len(ids))) for i in range(ids.shape[1])], dim=1)


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-4, atol=2e-5)


def test_no_mask_of_a_new_prompt_grows_with_its_square(monkeypatch):
    sizes, attention = [], F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **more):
        sizes.append(0 if attn_mask is None else attn_mask.numel())
        return attention(q, k, v, attn_mask=attn_mask, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for config in FAMILIES.values():
        build(config)(random_ids(1, 1000))
    window = FAMILIES["mistral"].sliding_window
    assert max(sizes) == window * (2 * window + 1)  # of gpt-oss with a column for its sinks


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "gpt-oss"])
def test_a_prompt_of_a_token_more_than_the_window_is_traced_for_any_length(family):
    torch.compiler.reset()
    model, forward = build(FAMILIES[family]), FastGPT.forward
    traced = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for tokens in (1, 30):
        ids = random_ids(1, FAMILIES[family].sliding_window + tokens)
        expected = forward(model, ids)
        torch._dynamo.mark_dynamic(ids, 1)
        close(traced(model, ids), expected)


@pytest.mark.parametrize("window", [None, 1, 7, 50])
def test_sinks_beside_flash_attention_are_those_of_the_softmax(monkeypatch, window):
    """PyTorch's kernel, which runs on GPUs alone, written out."""

    def flash(q, k, v, _, __, max_q, max_k, dropout, causal, debug, scale, window_size_left, window_size_right):
        assert (max_q, max_k, dropout, causal, debug) == (30, 30, 0.0, True, False)
        distance = torch.arange(30)[:, None] - torch.arange(30)
        seen = (distance >= 0) & (distance <= (30 if window_size_left is None else window_size_left))
        k, v = (t.repeat_interleave(2, dim=2) for t in (k, v))
        scores = torch.einsum("bthc,bshc->bhts", q, k).mul(scale).masked_fill(~seen, float("-inf"))
        return torch.einsum("bhts,bshc->bthc", scores.softmax(-1), v), scores.logsumexp(-1), None, None, None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 30, heads, 16, generator=random) for heads in (4, 2, 2))
    sinks = torch.tensor([-50.0, 0.0, 3.0, 50.0])
    y = fast_model.flash_attention_with_sinks(q, k, v, window, 0.25, sinks)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if window is None or window >= 30:
        expected = fast_model.attention(q, k, v, None, 0.25, sinks)
    else:
        expected = fast_model.sliding_attention(q, k, v, window, 0.25, sinks)
    close(y, expected.transpose(1, 2))


# Both twins, by properties that need neither of them to be right.


@each_twin
@each_family
def test_a_later_token_changes_no_earlier_logit(family, reference):
    model = build(TINY[family], reference)
    ids = random_ids(2, 20)
    changed = ids.clone()
    changed[:, 12] = (ids[:, 12] + 1) % LLAMA.vocab_size
    before, after = model(ids), model(changed)
    rounding = 1e-5 if TINY[family].n_expert else 0  # an expert then multiplies another number of tokens
    assert (before[:, :12] - after[:, :12]).abs().max() <= rounding
    assert (before[:, 12] - after[:, 12]).abs().min(0).values.max() > 0.01


@each_twin
@pytest.mark.parametrize("layers", [1, 2])
def test_a_token_reaches_one_window_further_with_each_layer(layers, reference):
    window = 5
    model = build(replace(MISTRAL, n_layer=layers, sliding_window=window), reference)
    ids = random_ids(1, 20)
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] + 1) % LLAMA.vocab_size
    moved = (model(ids) != model(changed)).any(-1)[0].nonzero().flatten()
    assert moved.tolist() == list(range(2, 2 + layers * (window - 1) + 1))


@each_twin
def test_a_kv_head_serves_its_query_heads_in_a_row(reference):
    grouped = MISTRAL
    every = grouped.n_head // grouped.n_kv_head

    def repeat(name, tensor):
        if not name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor
        return tensor.unflatten(0, (-1, grouped.head_dim)).repeat_interleave(every, dim=0).flatten(0, 1)

    weights = {name: repeat(name, tensor) for name, tensor in random_weights(grouped).items()}
    ids = random_ids(1, 30)
    close(build(grouped, reference)(ids), build(replace(grouped, n_kv_head=grouped.n_head), reference, **weights)(ids))


def test_rotated_heads_see_distances_only():
    q, k = torch.randn(2, 1, 1, 1, LLAMA.head_dim, generator=torch.Generator().manual_seed(0)).double()
    frequencies, growth = (t.double() for t in rope_frequencies(replace(LLAMA, rope_scaling=None), 0, "cpu"))

    def score(query_at, key_at):
        turned = (rotate(x, at * frequencies[None], growth) for x, at in ((q, query_at), (k, key_at)))
        return torch.mul(*turned).sum().item()

    assert score(7, 3) == pytest.approx(score(107, 103))
    assert score(7, 3) != pytest.approx(score(7, 4), rel=1e-3)


def test_llama3_scaling_keeps_short_waves_and_divides_long_ones():
    plain = [LLAMA.rope_base ** (-2 * i / LLAMA.head_dim) for i in range(LLAMA.head_dim // 2)]
    turns = [LLAMA3_SCALING["original_max_position_embeddings"] * w / (2 * math.pi) for w in plain]
    scaled = rope_frequencies(LLAMA, 0, "cpu")[0].tolist()
    first = rope_table(LLAMA, 2, "cpu")[1]  # of position 1: its angles are the frequencies
    kinds = []
    for i, (old, new, turn) in enumerate(zip(plain, scaled, turns, strict=True)):
        assert first[:, i].tolist() == pytest.approx([math.cos(new), math.sin(new)], rel=1e-6)
        if turn > LLAMA3_SCALING["high_freq_factor"]:
            kinds.append("kept")
            assert new == pytest.approx(old)
        elif turn < LLAMA3_SCALING["low_freq_factor"]:
            kinds.append("divided")
            assert new == pytest.approx(old / LLAMA3_SCALING["factor"])
        else:
            kinds.append("between")
            assert old / LLAMA3_SCALING["factor"] < new < old
    assert kinds == sorted(kinds, key=["kept", "between", "divided"].index) and len(set(kinds)) == 3


def test_the_loss_is_the_mean_over_targets_that_are_not_ignored():
    model = build(LLAMA, reference=True)
    ids, targets = random_ids(2, 9), random_ids(2, 9, seed=1)
    targets[0, :5] = targets[1, 3] = -100
    logits, loss = model(ids, targets)
    assert torch.equal(logits, model(ids))
    kept = [(row, i) for row in range(2) for i in range(9) if targets[row, i] != -100]
    assert len(kept) == 12
    surprises = [logits[row, i].double().exp().sum().log() - logits[row, i, targets[row, i]] for row, i in kept]
    assert loss.item() == pytest.approx(sum(surprises).item() / 12, rel=1e-5)


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"n_layer": 0}, "n_layer"),
        ({"dim": 64.0}, "dim"),
        ({"n_kv_head": 4}, "n_kv_head"),
        ({"head_dim": 15}, "head_dim"),
        ({"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1.0}}, "rope_scaling"),
        ({"norm": "batch"}, "norm"),
        ({"activation": "mish"}, "activation"),
        # A window of 0 makes every logit NaN; a scaling without a field ends in a bare KeyError.
        ({"sliding_window": 0}, "sliding_window"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 8.0}}, "rope_scaling"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 9, "attention_factor": 1.0}},
            "rope_scaling",
        ),
        ({"rope_base": -1.0}, "rope_base"),
        ({"rotary_dim": 7}, "rotary_dim"),
        ({"embed_scale": 0.0}, "embed_scale"),
        ({"attention_scale": -1.0}, "attention_scale"),
        ({"full_layers": (2,)}, "full_layers"),
        ({"nope_layers": [1]}, "nope_layers"),
        ({"rotary_dim": 22}, "rotary_dim"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused_by_name(fields, name):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        replace(LLAMA, **fields)


def test_an_odd_head_dim_needs_learned_positions():
    assert isinstance(replace(LLAMA, head_dim=15, rope_base=None, rope_scaling=None), GPTConfig)


@each_family
def test_more_tokens_than_the_context_are_refused(family):
    with pytest.raises(ValueError, match="49 tokens .* 48"):
        build(TINY[family], reference=True)(random_ids(1, 49))


# The surgery.


@each_family
def test_the_surgery_is_exact_both_ways(family):
    config = TINY[family]
    weights = random_weights(config)
    modules = {name.rpartition(".")[0]: tensor.shape[0] for name, tensor in weights.items()}
    more = {f"{name}.scales": torch.randn(rows, 3) for name, rows in modules.items()}
    more |= {f"{name}.bias": torch.randn(rows) for name, rows in modules.items()}
    reference = weights | more
    fast = to_fast(reference, config)
    assert len(fast) < len(reference)
    back = to_reference(fast, config)
    again = to_fast(back, config)
    assert back.keys() == reference.keys() and all(torch.equal(back[name], reference[name]) for name in reference)
    assert again.keys() == fast.keys() and all(torch.equal(again[name], fast[name]) for name in fast)


@each_family
def test_the_surgery_makes_exactly_fastgpts_names(family):
    assert to_fast(random_weights(TINY[family]), TINY[family]).keys() == FastGPT(TINY[family]).state_dict().keys()
    assert (
        to_reference(FastGPT(TINY[family]).state_dict(), TINY[family]).keys() == GPT(TINY[family]).state_dict().keys()
    )


@pytest.mark.parametrize(
    "lost", ["attn.k_proj.weight", "attn.v_proj.bias", "mlp.gate_proj.weight", "mlp.up_proj.weight"]
)
def test_a_fused_matrix_with_a_part_missing_is_refused(lost):
    config = TINY["qwen2"]
    weights = random_weights(config)
    del weights[f"transformer.h.1.{lost}"]
    with pytest.raises(ValueError, match=r"layers\.1\..* needs .*" + lost.rpartition(".")[0]):
        to_fast(weights, config)


def test_fusing_reads_a_tensor_when_its_turn_comes():
    asked = []

    class Asked(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    fused = fuse(Asked(random_weights(TINY["gpt-2"])), TINY["gpt-2"])
    assert next(fused)[0] == "wte.weight"
    assert asked == ["transformer.wte.weight"]


@pytest.mark.parametrize("surgery, state_dict", [(to_fast, random_weights), (to_reference, None)])
@pytest.mark.parametrize("extra", ["transformer.h.2.attn.q_proj.weight", "layers.2.attn.qkv.weight", "nonsense"])
def test_a_name_that_is_left_over_is_refused(surgery, state_dict, extra):
    state_dict = state_dict(LLAMA) if state_dict else to_fast(random_weights(LLAMA), LLAMA)
    with pytest.raises(ValueError, match=f"no place for {extra.rpartition('.')[0]}"):
        surgery(state_dict | {extra: torch.zeros(1)}, LLAMA)


# FastGPT's cache.


@each_family
def test_rows_at_different_positions_are_each_what_they_are_alone(family):
    model = build(TINY[family])
    ids, lengths = random_ids(3, 40), [5, 30, 11]
    alone = []
    for row, length in zip(ids, lengths, strict=True):
        model.setup_caches(1, 48)
        model(row[None, :length])
        alone.append(model(row[None, length : length + 4], positions(length, length + 4)))
    model.setup_caches(3, 48)
    own = torch.arange(40) < torch.tensor(lengths)[:, None]
    model(torch.where(own, ids, random_ids(3, 40, seed=1)))  # slots past a row's length hold something else
    start = torch.tensor(lengths)[:, None] + torch.arange(4)
    together = model(ids.gather(1, start), start)
    close(together, torch.cat(alone))


@each_family
def test_a_used_cache_is_as_good_as_a_new_one(family):
    model = build(TINY[family])
    model.setup_caches(2, 48)
    ids = random_ids(2, 20)
    new = by_token(model, ids)
    model(random_ids(2, 48, seed=1))
    assert torch.equal(by_token(model, ids), new)


def test_one_tokens_logits_a_row_are_those_of_all():
    model = build(LLAMA)
    ids = random_ids(2, 9)
    logits = model(ids)
    close(model(ids, last=torch.tensor([3, 8])), torch.stack([logits[0, 3:4], logits[1, 8:9]]))


@each_family
def test_no_more_slots_than_the_context(family):
    model = build(TINY[family])
    with pytest.raises(ValueError, match="49 cache slots .* 48"):
        model.setup_caches(1, 49)


@each_family
def test_a_position_past_the_slots_is_an_error(family):
    model = build(TINY[family])
    model.setup_caches(1, 16)
    for gradients in (True, False):  # without them kernels run
        with torch.set_grad_enabled(gradients), pytest.raises(IndexError):
            model(random_ids(1, 1), positions(16, 17))


def test_positions_are_of_any_integers_but_one_for_each_token():
    model = build(LLAMA)
    model.setup_caches(3, 16)
    ids = random_ids(3, 2)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            close(model(ids, positions(0, 2, rows=3).int()), model(ids))
            with pytest.raises(ValueError, match=r"input_pos is \[1, 2\]; it must be \[3, 2\]"):
                model(ids, positions(0, 2))


def test_a_row_is_alone_in_a_cache_of_more():
    model = build(LLAMA)
    model.setup_caches(3, 16)
    ids = random_ids(1, 9)
    expected = model(ids)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            model(random_ids(3, 16, seed=1))
            close(by_token(model, ids), expected)


def test_the_scales_of_a_cache_stay_bfloat16():
    model = build(LLAMA)
    model.setup_caches(1, 16, int8=True)
    model.double()
    attn = model.layers[1].attn
    assert attn.k_scale_cache.dtype == attn.v_scale_cache.dtype == torch.bfloat16
    assert attn.k_cache.dtype == torch.int8 and model.lm_head.weight.dtype == torch.float64


def test_a_cache_is_of_the_kind_of_the_one_before_if_none_is_named():
    model, names = build(LLAMA, dtype=torch.bfloat16), list(build(LLAMA).state_dict())
    for int8, expected in ((None, False), (True, True), (None, True), (False, False), (None, False)):
        model.setup_caches(1, 16, int8=int8)
        kinds = {name.rpartition(".")[2]: buffer.dtype for name, buffer in model.layers[1].attn.named_buffers()}
        assert kinds.pop("k_cache") == kinds.pop("v_cache") == (torch.int8 if expected else torch.bfloat16)
        assert kinds == (dict.fromkeys(("k_scale_cache", "v_scale_cache"), torch.bfloat16) if expected else {})
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("family", ["mixtral", "gpt-2", "qwen2"])
@each_twin
def test_a_step_reads_the_weights_the_chosen_experts_and_the_cache(family, reference):
    config = TINY[family]
    model, sizes = build(config, reference), {name: t.nbytes for name, t in random_weights(config).items()}
    assert any(".experts." in name for name in sizes) == (family == "mixtral")
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    unread = 0 if reference or not experts else experts * (1 - config.n_expert_used / config.n_expert)
    looked_up = sizes.get("transformer.wpe.weight", 0)
    looked_up += 0 if config.tie_embeddings else sizes["transformer.wte.weight"]
    expected = sum(sizes.values()) - unread - looked_up
    assert fast_model.bytes_per_step(model) == expected
    if not reference:
        model.setup_caches(2, 16)
        numbers = 2 * config.n_layer * 2 * config.n_kv_head * 16 * config.head_dim
        assert fast_model.bytes_per_step(model) == expected + 4 * numbers
        model.setup_caches(2, 16, int8=True)
        assert fast_model.bytes_per_step(model) == expected + numbers + 2 * numbers // config.head_dim


def test_the_rope_table_stays_float32_whatever_the_weights_are():
    model = build(LLAMA, dtype=torch.bfloat16)
    model.setup_caches(1, 48)
    assert model.layers[0].attn.k_cache.dtype == torch.bfloat16
    assert model.rope.dtype == torch.float32
    assert torch.equal(model.rope, rope_table(LLAMA, 48, "cpu"))


def test_the_rope_table_stays_float32_when_the_weights_are_cast_later():
    model = build(LLAMA)
    model.setup_caches(1, 48)
    model.to(torch.bfloat16)
    assert torch.equal(model.rope, rope_table(LLAMA, 48, "cpu"))


def test_positions_without_a_cache_are_refused_in_words():
    with pytest.raises(ValueError, match="setup_caches"):
        build(LLAMA)(random_ids(1, 1), positions(0, 1))


# A single token, and the compiler.


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("backend", ["none", "aot_eager"])
def test_a_single_token_is_multiplied_as_f_linear_does(biased, dtype, tolerance, backend):
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=random).to(dtype) for s in [(1, 1, 64), (96, 64), (96,)])
    bias = bias if biased else None
    linear = fast_model.linear if backend == "none" else torch.compile(fast_model.linear, backend=backend)
    y, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=8 * tolerance)  # sums of 64 products, about 8


def test_only_a_single_token_takes_the_matrix_vector_path(monkeypatch):
    model = build(LLAMA)
    model.setup_caches(2, 48)

    def general(*args):
        raise AssertionError("a general matrix product")

    monkeypatch.setattr(fast_model.F, "linear", general)
    model(random_ids(1, 1), positions(3, 4))
    for rows, length in [(1, 2), (2, 1)]:
        with pytest.raises(AssertionError, match="general"):
            model(random_ids(rows, length), positions(3, 3 + length, rows))


@pytest.mark.parametrize(
    "tokens, joined, calls", [(1, True, 4), (1, False, 6), (2, True, 6), (64, True, 6), (65, True, 0)]
)
def test_few_tokens_are_multiplied_gated_and_added_by_kernels(tokens, joined, calls, monkeypatch):
    """With made-up ones, which compute plainly: every product and norm of 64 tokens, and none of 65. Of one token the
    products after a norm take it with them, if they are `joined`."""
    config = replace(LLAMA, block_size=65)
    model, ids, rows = build(config), random_ids(1, tokens), []

    def linear(x, weight, bias=None, activation=None, gated=False, clamp=None):
        rows.append(len(x))
        assert (bias, clamp) == (None, None)
        y = F.linear(x, weight)
        return F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1] if gated and activation == "silu" else y

    def add_norm(x, update, weight, bias, post, eps, plus_one, scale, peers, rank, told):
        rows.append(x.numel() // x.shape[-1])
        assert (bias, post, plus_one, scale, peers, told) == (None, None, False, 1, None, False)
        x = x if update is None else x + update
        return x, F.rms_norm(x, weight.shape, weight, eps)

    def norm_linear(x, residual, norm, eps, weight, *, peers, rank, **more):
        assert peers is None
        total = residual + x.view(residual.shape)
        return total, linear(F.rms_norm(total, norm.shape, norm, eps).flatten(0, -2), weight, **more)

    with torch.no_grad():
        expected = model(ids)
        more = {"takes_few_tokens": lambda x, weight: True, "takes_norm": lambda x, gated, ranks, *weights: joined}
        kernels = SimpleNamespace(linear=linear, add_norm=add_norm, norm_linear=norm_linear, **more)
        monkeypatch.setattr(fast_model, "gpu_kernels", kernels)
        monkeypatch.setattr(fast_model, "gpu_products", kernels)
        monkeypatch.setattr(fast_model, "cpu_kernels", None)
        monkeypatch.setattr(fast_model, "on_gpu_kernels", lambda x: True)
        close(model(ids), expected)
    assert rows == [tokens] * (calls * config.n_layer + (2 if calls else 0))


@pytest.mark.parametrize("tokens, takes, calls", [(1, True, 1), (1, False, 0), (2, True, 0)])
def test_a_router_takes_the_norm_of_a_single_token(tokens, takes, calls, monkeypatch):
    model, ids, called = build(TINY["mixtral"]), random_ids(1, tokens), []

    def add_norm(x, update, weight, bias, post, eps, *more):
        x = x if update is None else x + update
        return x, F.rms_norm(x, weight.shape, weight, eps)

    def norm_router(x, residual, norm, eps, weight, bias):
        called.append(x.shape)
        total = residual + x.view(residual.shape)
        x = F.rms_norm(total, norm.shape, norm, eps)
        return total, x, F.linear(x.flatten(0, -2), weight, bias)

    with torch.no_grad():
        expected = model(ids)
        more = {"takes_few_tokens": lambda x, weight: False, "takes_norm": lambda x, gated, ranks, *weights: False}
        more |= {"takes_router": lambda weight: takes, "linear": lambda x, weight, **more: F.linear(x, weight)}
        kernels = SimpleNamespace(add_norm=add_norm, norm_router=norm_router, **more)
        monkeypatch.setattr(fast_model, "gpu_kernels", kernels)
        monkeypatch.setattr(fast_model, "gpu_products", kernels)
        monkeypatch.setattr(fast_model, "cpu_kernels", None)
        monkeypatch.setattr(fast_model, "on_gpu_kernels", lambda x: True)
        for layer in model.layers:
            monkeypatch.setattr(layer.mlp.experts_gate_up, "gpu_weights", lambda: None)
        close(model(ids), expected)
    assert called == [(1, model.config.dim)] * (model.config.n_layer * calls)


@torch.no_grad()
@pytest.mark.parametrize("dtype, most", [(torch.float32, 16), (torch.bfloat16, 64), (torch.float16, 64)])
@pytest.mark.parametrize("family", ["llama-3.1", "mistral"])
def test_tokens_that_the_attention_kernel_does_not_take_get_a_mask(family, dtype, most, monkeypatch):
    config = replace(TINY[family], block_size=80, n_head=8, n_kv_head=1)
    model, tokens = build(config, dtype=dtype), most // 8
    model.setup_caches(1, 80)
    by_kernel, masks = [], []

    def kernel(q, *more):
        by_kernel.append(q.shape[1])
        return torch.zeros_like(q)

    def plain_attention(q, k, v, mask, *more):
        masks.append(None if mask is None else tuple(mask.shape))
        return torch.zeros_like(q)

    kernels = SimpleNamespace(add_norm=lambda x, *more: (x, x), attention=kernel, takes_few_tokens=lambda *more: False)
    monkeypatch.setattr(fast_model, "gpu_kernels", kernels)
    monkeypatch.setattr(fast_model, "gpu_products", kernels)
    monkeypatch.setattr(fast_model, "cpu_kernels", None)
    monkeypatch.setattr(fast_model, "on_gpu_kernels", lambda x: True)
    monkeypatch.setattr(fast_model, "attention", plain_attention)
    model(random_ids(1, tokens), positions(0, tokens))
    assert (by_kernel, masks) == ([tokens] * config.n_layer, [])
    model(random_ids(1, tokens + 1), positions(0, tokens + 1))
    assert (len(by_kernel), masks) == (config.n_layer, [(1, 1, tokens + 1, 80)] * config.n_layer)


def test_whether_the_attention_kernel_takes_tokens_is_no_guard_on_a_dynamic_number(monkeypatch):
    attn = build(replace(LLAMA, n_head=8, n_kv_head=1)).layers[0].attn
    monkeypatch.setattr(fast_model, "on_gpu_kernels", lambda x: True)

    def taken(x):
        return x + (1 if attn.by_gpu_kernel(x, x) else 0)

    x = torch.zeros(1, 2, 4)  # 16 rows, and all of dynamic sizes are more
    assert taken(x).all()
    torch._dynamo.mark_dynamic(x, 1)
    assert not torch.compile(taken, backend="eager", fullgraph=True)(x).any()


@torch.no_grad()
def test_decoding_is_one_graph_of_matrix_vector_products_as_positions_move():
    torch.compiler.reset()
    graphs = []

    def collect(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = build(LLAMA)
    model.setup_caches(1, 48)
    ids = random_ids(1, 48)
    step = torch.compile(model, backend=collect, fullgraph=True, dynamic=False)
    step(ids[:, :1], positions(0, 1))
    with torch.compiler.set_stance("fail_on_recompile"):
        by_token(step, ids)
    assert len(graphs) == 1
    regions = [node.args[0].target for node in graphs[0].graph.nodes if "invoke_subgraph" in str(node.target)]
    assert len(regions) == LLAMA.n_layer > len(set(regions)) == 1  # one region is compiled for all layers
    nodes = [node for part in graphs[0].modules() for node in getattr(getattr(part, "graph", None), "nodes", ())]
    assert torch.nn.functional.scaled_dot_product_attention not in {node.target for node in nodes}
    assert F.linear not in {node.target for node in nodes}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama-3.1", "qwen2"])  # without and with biases, with and without an lm_head
def test_compiled_decoding_of_one_row_gives_the_eager_logits(family):
    torch.compiler.reset()
    model = build(TINY[family])
    model.setup_caches(1, 48)
    ids = random_ids(1, 48)
    expected = by_token(model, ids)
    model.setup_caches(1, 48)
    close(by_token(torch.compile(model, fullgraph=True, dynamic=False), ids), expected)


# Gradients.


def test_a_compiled_graph_of_several_layers_has_the_eager_gradients():
    """Of three nested regions and more torch 2.13 makes other ones, so that with gradients there is none."""
    torch.compiler.reset()
    config, ids = replace(LLAMA, n_layer=3), random_ids(2, 30)
    found = []
    for compiled in (False, True):
        model = build(config).train().requires_grad_(True)
        forward = torch.compile(model, fullgraph=True) if compiled else model
        F.cross_entropy(forward(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-6)


@each_family
def test_both_twins_have_the_same_loss_and_gradients(family):
    config = TINY[family]
    reference, fast = (build(config, twin).train().requires_grad_(True) for twin in TWINS.values())
    ids, targets = random_ids(2, 30), random_ids(2, 30, seed=1)
    targets[0, :7] = -100
    _, loss = reference(ids, targets)
    fast_loss = F.cross_entropy(fast(ids).flatten(0, 1), targets.flatten())
    assert fast_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    fast_loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    found = to_reference({name: parameter.grad for name, parameter in fast.named_parameters()}, config)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        # Without rotation a bias of k moves all scores of a query alike: its gradient is rounding alone.
        assert largest > 1e-6 or (config.rope_base is None and name.endswith("k_proj.bias")), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-7 + 2e-5 * largest)
