"""check_equivalence.py: it passes what agrees and, as important, fails whatever was broken on purpose."""

import os
import subprocess
import sys
import types
from argparse import Namespace
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import transformers  # noqa: E402
from conftest import experts_in_mxfp4  # noqa: E402

import check_equivalence  # noqa: E402
import checkpoint  # noqa: E402
import convert_hf_checkpoint  # noqa: E402
import fast_model  # noqa: E402
import model  # noqa: E402
import speculate  # noqa: E402
from check_equivalence import (  # noqa: E402
    COMPILED,
    FAMILIES,
    check_family,
    check_model,
    compare,
    main,
    print_table,
    random_weights,
)

SCRIPT = Path(check_equivalence.__file__)
SHORT = {name: replace(config, block_size=64) for name, config in FAMILIES.items()}  # leaves the long prompt out


def failures(config, state_dict=None, **options):
    rows = list(check_model(config, state_dict or random_weights(config), **options))
    assert len(rows) > 6
    return [row for row in rows if not row.passed]


def run(*arguments):
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    command = [sys.executable, SCRIPT, "--device", "cpu", "--no_compile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


# What agrees.


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_running_agrees(family):
    """The fields of a compiled one are many of the others' too; minutes."""
    assert failures(FAMILIES[family], compiled=family in ("llama-3.1", "gemma-3", "granite", "gpt-2")) == []


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_small_models_pass_from_the_command_line(processes, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", processes)
    finished = run()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert all(f"{family}, small random weights" in finished.stdout for family in FAMILIES)
    assert "FAILED" not in finished.stdout and finished.stdout.endswith("within their tolerance.\n")


def test_the_families_cover_what_the_config_can_say():
    """Each field with a default has another value among those that are compiled, each without one two values."""
    assert list(FAMILIES)[: len(COMPILED)] == list(COMPILED)  # they come first
    same_everywhere = {"n_layer", "dim", "vocab_size", "block_size"}
    for field in fields(model.GPTConfig):
        compiled, found = ([getattr(FAMILIES[name], field.name) for name in names] for names in (COMPILED, FAMILIES))
        if field.default is MISSING:
            assert (len(set(found)) == 1) == (field.name in same_everywhere), field.name
        else:
            assert any(value != field.default for value in compiled), field.name
    assert any(config.head_dim * config.n_head != config.dim for config in FAMILIES.values())


def test_a_field_that_no_family_sets_is_an_error(monkeypatch):
    others = {name: replace(config, logit_scale=1.0) for name, config in FAMILIES.items()}
    monkeypatch.setattr(check_equivalence, "FAMILIES", others)
    with pytest.raises(ValueError, match="no small model sets logit_scale"):
        next(check_equivalence.check_families("cpu", compiled=False))


@pytest.mark.parametrize(("family", "compiled"), (("llama-3.1", True), ("gemma-3", True), ("llama-2", False)))
def test_which_small_models_are_compiled(family, compiled, monkeypatch):
    given = []
    monkeypatch.setattr(check_equivalence, "check_model", lambda *arguments, **more: given.append(arguments[3]) or [])
    for device, wanted in (("cpu", True), ("cuda", True), ("cpu", False)):
        check_family(family, device, wanted)
    assert given == [compiled, True, False]


def test_experts_in_mxfp4_agree_in_every_way():
    config = FAMILIES["gpt-oss"]
    assert failures(config, experts_in_mxfp4(random_weights(config))) == []


def test_a_context_shorter_than_prompt_and_text_is_checked_too():
    config = replace(FAMILIES["llama-2"], block_size=32)
    assert failures(config, compiled=False) == []


# What was broken on purpose: a line of fast_model.py or model.py, what replaces it, and the family that shows it.

BROKEN = {
    "rope base": ("fast_model", "/ base **", "/ (1.01 * base) **", "llama-2"),
    "rope of neighbouring pairs": (
        "model",
        "first, second = x.chunk(2, dim=-1)",
        "first, second = x[..., ::2], x[..., 1::2]",
        "llama-2",
    ),
    "rope the other way round": ("model", "second * cos + first * sin", "second * cos - first * sin", "llama-2"),
    "llama 3 scaling ignored": ("fast_model", "    if scaling is not None:", "    if False:", "llama-3.1"),
    "a full layer with a window": ("fast_model", "config.window_of(layer)", "config.sliding_window", "smollm3"),
    "a full layer with a mask of its own": (
        "fast_model",
        "(mask, rope) if attn.window is None",
        "(in_window, rope) if True",
        "smollm3",
    ),
    "all layers rotated": ("fast_model", "config.rotates(layer)", "True", "smollm3"),
    "attention_scale ignored": ("fast_model", "config.attention_scale or", "None or", "granite"),
    "embed_scale ignored": ("fast_model", "self.config.embed_scale != 1", "False", "granite"),
    "residual_scale for attention alone": (
        "fast_model",
        "return residual, self.mlp(x, (self.mlp_peers, self.rank))",
        "return residual, self.mlp(x, (self.mlp_peers, self.rank)) / self.norm_2.scale",
        "granite",
    ),
    "residual_scale for the embedding too": ("fast_model", "or self.config.residual_scale != 1", "", "granite"),
    "logit_scale ignored": ("fast_model", "self.config.logit_scale != 1", "False", "granite"),
    "norms without the one": ("fast_model", "weight.float() + 1", "weight.float()", "gemma-3"),
    "post_norm left out": ("fast_model", "update if post is None else", "update if True else", "glm-4"),
    "post_norm of the layer's own": (
        "fast_model",
        "update, post, turned if",
        "update, layer.post_mlp and layer.post_mlp.weight, turned if",
        "glm-4",
    ),
    "pre_norm all the same": ("model", "self.attn(self.ln_1(x))", "self.attn(F.rms_norm(x, x.shape[-1:]))", "olmo-2"),
    "qk_norm of each head": (
        "fast_model",
        "x = x.unflatten(-1, (-1, len(self.weight)))",
        "x = x.unflatten(-1, (1, -1)) * 1.1",
        "olmo-2",
    ),
    "parallel ignored": (
        "fast_model",
        "self.parallel, self.rank = config.parallel, rank",
        "self.parallel, self.rank = False, rank",
        "pythia",
    ),
    "parallel with one norm": (
        "fast_model",
        "_, x = self.norm_2(residual)",
        "x = self.norm_1.norm(residual, self.norm_1.weight)",
        "pythia",
    ),
    "sinks ignored": ("fast_model", "if sinks is not None:", "if False:", "gpt-oss"),
    "sinks with a value": ("fast_model", "F.pad(v, (0, 1, 1, 0))", "F.pad(v, (0, 1, 1, 0), value=1.0)", "gpt-oss"),
    "gate not clamped": ("fast_model", "gate.clamp(max=self.clamp), up", "gate, up", "gpt-oss"),
    "up not 1 larger": ("model", "1 + up.clamp(-self.clamp", "up.clamp(-self.clamp", "gpt-oss"),
    "router's bias dropped": ("model", "self.router(x).float()", "F.linear(x, self.router.weight).float()", "gpt-oss"),
    "biases of the experts' last matrix": (
        "fast_model",
        "out = self.with_bias(multiply(hidden, down, ends), self.experts_down, expert)",
        "out = multiply(hidden, down, ends)",
        "gpt-oss",
    ),
    "the sigmoid of another gelu": ("model", "torch.sigmoid(1.702 * x)", "torch.sigmoid(1.6 * x)", "gpt-oss"),
    "yarn between whole pairs": ("fast_model", 'if scaling["truncate"]:', "if True:", "gpt-oss"),
    "head_bias dropped": ("model", "else self.lm_head(x)", "else F.linear(x, self.lm_head.weight)", "pythia"),
    "the base of all layers": ("fast_model", "(in_window, rope_window)", "(in_window, rope)", "gemma-3"),
    "all of a head rotated": ("fast_model", "half = (config.rotary_dim or", "half = (None or", "glm-4"),
    "partners a rotary_dim apart": (
        "model",
        "F.pad(kept * frequencies + (1 - kept) * slowed, still)",
        "F.pad(kept * frequencies + (1 - kept) * slowed, still[::-1])",
        "glm-4",
    ),
    "yarn scaling ignored": ("fast_model", "    if scaling is not None:", "    if False:", "qwen2"),
    "yarn's factor ignored": ("model", "growth * part", "part", "qwen2"),
    "yarn between other turns": ("fast_model", 'pair_of(scaling["beta_fast"]),', "pair_of(1.0),", "qwen2"),
    "learned positions from 0": (
        "fast_model",
        "F.embedding(positions,",
        "F.embedding(torch.arange(T, device=idx.device)[None],",
        "gpt-2",
    ),
    "a norm left out": (
        "fast_model",
        "return residual, self.mlp(x,",
        "return residual, self.mlp(self.mlp.project(residual),",
        "llama-2",
    ),
    "the last norm left out": (
        "fast_model",
        "_, x = self.norm_f(residual, update, post,",
        "x, _ = self.norm_f(residual, update, post,",
        "qwen2",
    ),
    "qk norm left out": ("fast_model", "q, k = self.q_norm(q), self.k_norm(k)", "pass", "qwen3"),
    "another norm_eps": (
        "fast_model",
        "self.scale = config.norm_eps,",
        "self.scale = 1e-6,",
        "llama-2",
    ),
    "another scale of the scores": ("model", "cfg.head_dim**-0.5", "(cfg.dim // cfg.n_head) ** -0.5", "qwen2"),
    "one slot too many seen": ("fast_model", "mask = slots <= positions", "mask = slots - 1 <= positions", "llama-2"),
    "own slot not seen": ("fast_model", "mask = slots <= positions", "mask = slots < positions", "llama-2"),
    "no causal mask": ("fast_model", "is_causal=mask is None", "is_causal=False", "llama-2"),
    "sliding window ignored": ("fast_model", "window = self.config.sliding_window", "window = None", "mistral"),
    "sliding window off by one": (
        "model",
        "distance < window",
        "distance <= window",
        "mistral",
    ),
    "kv heads in another order": (
        "model",
        "t.repeat_interleave(cfg.n_head // cfg.n_kv_head, dim=2)",
        "t.repeat(1, 1, cfg.n_head // cfg.n_kv_head, 1)",
        "mistral",
    ),
    "k and v exchanged by the surgery": ("fast_model", 'for name in "qkv"', 'for name in "qvk"', "qwen2"),
    "biases dropped": ("fast_model", "linear(x, self.weight, self.bias)", "linear(x, self.weight)", "gpt-2"),
    "activation swapped": ("fast_model", '"silu": nn.SiLU,', '"silu": nn.GELU,', "llama-2"),
    "gelu without tanh": ("fast_model", 'partial(nn.GELU, "tanh")', "nn.GELU", "gpt-2"),
    "experts' weights not normalized": (
        "fast_model",
        "if self.norm_topk_prob",
        "if not self.norm_topk_prob",
        "mixtral",
    ),
    "gate and up exchanged": (
        "fast_model",
        "gate, up = x.chunk(2, dim=-1)",
        "up, gate = x.chunk(2, dim=-1)",
        "llama-2",
    ),
    "written one slot too far": (
        "fast_model",
        "(row, head, input_pos[:, None])",
        "(row, head, (input_pos[:, None] + 1) % cache.shape[2])",
        "llama-2",
    ),
    "prompt not cached": ("fast_model", "cache[:B].index_copy_(", "cache[:B].clone().index_copy_(", "llama-2"),
    "the last logits of each row": ("fast_model", "t[rows, last]", "t[rows, -1]", "llama-2"),
    "all rows in one": ("fast_model", "row = torch.arange(B,", "row = 0 * torch.arange(B,", "llama-2"),
    "a single token": ("fast_model", "return torch.mv(weight, x)", "return 2 * torch.mv(weight, x)", "qwen2"),
}


def break_line(monkeypatch, file, line, replacement):
    """Let checkpoint.py build from a copy of the module in which the line is another."""
    source = Path({"model": model, "fast_model": fast_model}[file].__file__).read_text()
    assert source.count(line) == 1, f"{file}.py has changed: what breaks it now?"
    broken = types.ModuleType(f"broken_{file}")
    monkeypatch.setitem(sys.modules, broken.__name__, broken)  # dataclasses look their module up
    exec(compile(source.replace(line, replacement), broken.__name__, "exec"), vars(broken))
    for name in {"model": ["GPT"], "fast_model": ["FastGPT", "fuse"]}[file]:
        monkeypatch.setattr(checkpoint, name, getattr(broken, name))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_fails(plain_twins, monkeypatch, capsys, name):
    file, line, replacement, family = BROKEN[name]
    break_line(monkeypatch, file, line, replacement)
    rows = failures(SHORT[family], compiled=False)
    assert "float32" in {row.reason.split(",")[0] for row in rows}
    assert not print_table(name, rows)
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_that_are_not_broken_pass(monkeypatch, family):
    for file in ("model", "fast_model"):
        break_line(monkeypatch, file, "import torch\n", "import torch  # no other\n")
    assert failures(SHORT[family], compiled=False) == []


# What was broken on purpose for one kind of row: how it is planted, in which family, and exactly the rows that fail.

CACHED = {"token by token", "in chunks of 7", "each row alone", "different lengths"}
FLOAT32 = {"without a cache", "gradients", "prefill at once"} | CACHED
DRAFTS, CACHE = {"draft model", "prompt lookup"}, {"int8 cache", "int8 cache, chunks of 7"}
BF16 = {"bfloat16 at once", "bfloat16 by token", "bfloat16 rows alone"}
QUANTIZED, AGAINST_PLAIN = {"int8 by token", "int4 by token"}, {"int8 against plain", "int4 against plain"}


def line(line, replacement):
    return lambda monkeypatch: break_line(monkeypatch, "fast_model", line, replacement)


def built(spoil):
    """Each FastGPT as `spoil` changes it. float32 weights are the reference's own: it puts others in their place."""

    def plant(monkeypatch):
        def build(*arguments, reference=False, **options):
            model = checkpoint.build_model(*arguments, reference=reference, **options)
            if not reference:
                spoil(model)
            return model

        monkeypatch.setattr(check_equivalence, "build_model", build)

    return plant


def fp8_layer(model):
    for weight in model.layers[1].parameters() if model.wte.weight.dtype == torch.bfloat16 else ():
        weight.data = weight.to(torch.float8_e4m3fn).bfloat16()


def scales_of_a_layer(model):
    layer = model.layers[1].mlp.down
    if hasattr(layer, "scales"):
        layer.scales = 1.1 * layer.scales


def swapped(zeros):
    zeros[5, :2] = zeros[5, :2].flip(0)
    return zeros


def swapped_zeros(model):
    layer = model.layers[0].attn.qkv
    if hasattr(layer, "zeros"):
        layer.zeros = swapped(layer.zeros.clone())


def a_norm(model):
    model.layers[1].norm_2.weight.data = 1.05 * model.layers[1].norm_2.weight


def a_bias(model):
    model.layers[0].attn.out.bias = None


def quantized(name, spoil):
    """The quantized tensor of that name, as `spoil` changes it."""

    def plant(monkeypatch):
        def quantize(*arguments, **options):
            config, state = checkpoint.quantize_model(*arguments, **options)
            return config, state | ({name: spoil(state[name].clone())} if name in state else {})

        monkeypatch.setattr(check_equivalence, "quantize_model", quantize)

    return plant


DOWN = "transformer.h.1.mlp.down_proj."


def another_step(weight):
    weight[5, 7] ^= 1  # of one number the lowest bit
    return weight


def a_gradient(monkeypatch):
    name, found = "layers.1.norm_2.weight", check_equivalence.to_reference
    larger = lambda state, config: found(state | {name: 1.1 * state[name]}, config)  # noqa: E731
    monkeypatch.setattr(check_equivalence, "to_reference", larger)


def all_accepted(monkeypatch):
    def accept(logits, drafts, *more):
        count = torch.full_like(drafts[:, :1], drafts.shape[1])
        return count, logits.argmax(-1).gather(1, count)

    monkeypatch.setattr(speculate, "accept", accept)


def one_too_many(monkeypatch):
    accept = speculate.accept

    def generous(logits, drafts, *more):
        count, following = accept(logits, drafts, *more)
        return (count + 1).clamp(max=drafts.shape[1]), following

    monkeypatch.setattr(speculate, "accept", generous)


POSITIONS = "torch.arange(T, device=idx.device)[None] if input_pos is None else input_pos"
INT8_SCALES = "(x.abs().amax(-1).clamp(min=1e-8) / 127)"
ONE_FOR_ALL_HEADS = "(x.abs().amax(-1).amin(1, keepdim=True).expand(x.shape[:-1]) / 127)"
NUMBERS = "numbers, new_scales = quantize_heads(values)"
LOW_BITS_LOST = f"{NUMBERS}\n        numbers[:, :1] &= -2"
STORED, IN_BF16 = "values.to(cache.dtype)", "values.bfloat16().to(cache.dtype)"
IN_FP8 = "values.to(torch.float8_e5m2 if cache.dtype == torch.bfloat16 and cache.ndim == 4 else cache.dtype)"
ROPE = "rope = rope_window = table[positions]"
POSITIONS_IN_BF16 = "rope = rope_window = table[positions.to(update.dtype).long().clamp(max=len(table) - 1)]"
MV = "torch.mv(weight, x)"
MV_IN_FP8 = "torch.mv(weight, x if x.dtype == torch.float32 else x.to(torch.float8_e4m3fn).to(x.dtype))"
NO_CACHE = "if cache is None:\n        return values"
ATTENTION = "self.attn(x, rope, mask, input_pos, (self.attn_peers, self.rank))"
FAULTS = {
    "a norm's weight, 5%": (built(a_norm), "llama-2", FLOAT32 | CACHE | BF16 | QUANTIZED | DRAFTS),
    "a bias": (built(a_bias), "gpt-2", FLOAT32 | CACHE | BF16 | QUANTIZED | DRAFTS),
    "rows mixed without a cache": (line(NO_CACHE, f"{NO_CACHE}.flip(0)"), "llama-2", {"without a cache", "gradients"}),
    "a gradient, 10%": (a_gradient, "llama-2", {"gradients"}),
    "a gradient cut off": (line(ATTENTION, f"{ATTENTION}.detach()"), "qwen2", {"gradients"}),
    "another token's logits": (line("t[rows, last][", "t[rows, last - 1]["), "llama-2", {"different lengths"} | DRAFTS),
    "a chunk that sees all of itself": (
        line("slots <= positions[", "slots <= positions.amax(1, keepdim=True)["),
        "llama-2",
        {"in chunks of 7", "int8 cache, chunks of 7"} | DRAFTS,
    ),
    "a prompt's positions end at 1,023": (
        line(POSITIONS, POSITIONS.replace("[None]", "[None].clamp(max=1023)")),
        "llama-2",
        {"1040 tokens at once"},
    ),
    "a cache's positions end at 1,023": (
        line(POSITIONS, f"{POSITIONS}.clamp(max=1023)"),
        "llama-2",
        {"1040 tokens in 256s"},
    ),
    "a float32 cache in bf16": (line(STORED, IN_BF16), "llama-2", CACHED | QUANTIZED),
    "one row's product": (line(MV, f"1.001 * {MV}"), "qwen2", {"each row alone"}),
    "all drafts kept": (all_accepted, "llama-2", DRAFTS),
    "one draft too many": (one_too_many, "llama-2", DRAFTS),
    "one int8 scale for all heads": (line(INT8_SCALES, ONE_FOR_ALL_HEADS), "llama-2", CACHE),
    "int8 scales of the slot before": (line("scales[:B, ...,", "scales[:B].roll(1, 2)[...,"), "llama-2", CACHE),
    "int8 scales of the token before": (
        line("store(scales, new_scales,", "store(scales, new_scales.roll(1, 2),"),
        "llama-2",
        {"int8 cache, chunks of 7"},
    ),
    "int8 scales of 128 steps": (line(INT8_SCALES, INT8_SCALES.replace("127", "128")), "llama-2", CACHE),
    "int8 numbers cut, not rounded": (line(".round().clamp(-127", ".trunc().clamp(-127"), "llama-2", CACHE),
    "a head in 7 bits": (line(NUMBERS, LOW_BITS_LOST), "llama-2", CACHE),
    "a layer in fp8": (built(fp8_layer), "llama-2", BF16),
    "experts in fp8": (built(fp8_layer), "mixtral", BF16),
    "a bf16 cache in fp8": (line(STORED, f"{IN_FP8}.to(cache.dtype)"), "llama-2", BF16 - {"bfloat16 at once"}),
    "positions counted in bf16": (line(ROPE, POSITIONS_IN_BF16), "llama-2", {"bfloat16 at once"}),
    "one row's product in fp8": (line(MV, MV_IN_FP8), "llama-2", {"bfloat16 rows alone"}),
    "a layer's scales, 10%, when built": (built(scales_of_a_layer), "llama-2", QUANTIZED),
    "two zero points swapped when built": (built(swapped_zeros), "llama-2", {"int4 by token"}),
    "a layer's scales, 10%": (quantized(f"{DOWN}scales", lambda scales: 1.1 * scales), "llama-2", AGAINST_PLAIN),
    "two zero points swapped": (quantized(f"{DOWN}zeros", swapped), "llama-2", {"int4 against plain"}),
    "one number of a matrix": (quantized(f"{DOWN}weight", another_step), "llama-2", AGAINST_PLAIN),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails_the_rows_of_its_kind(plain_twins, monkeypatch, name):
    plant, family, expected = FAULTS[name]
    plant(monkeypatch)
    config = (FAMILIES if "position" in name else SHORT)[family]  # some errors begin in a long text
    assert {row.name for row in failures(config, compiled=False)} == expected


def test_what_the_compiler_alone_breaks_fails_the_compiled_rows(monkeypatch):
    end = "[..., : self.config.vocab_size]"
    break_line(monkeypatch, "fast_model", end, f"{end}.roll(int(torch.compiler.is_compiling()), -1)")
    names = {"compiled steps", "compiled prefill", "compiled, one row", "int8 cache, compiled"}
    assert {row.name for row in failures(SHORT["qwen2"])} == names | {f"{kind}, compiled" for kind in DRAFTS}


# NaN, and the rows themselves.


def test_nan_in_the_weights_is_named():
    config = SHORT["llama-2"]
    weights = random_weights(config)
    weights["transformer.h.1.mlp.down_proj.weight"][0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite, first in transformer.h.1.mlp.down_proj.weight"):
        list(check_model(config, weights, compiled=False))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoiled", [["expected"], ["logits"], ["expected", "logits"]])
def test_a_logit_that_is_no_number_fails(value, spoiled):
    tensors = {
        name: torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)) for name in ("expected", "logits")
    }
    for name in spoiled:
        tensors[name][1, 3, 2] = value
    assert not compare("row", **tensors, prompt_length=2, tolerance=1e30, reason="").passed


def test_a_row_says_where_the_greedy_text_changes():
    expected = torch.eye(8).repeat(2, 1, 1)
    logits = expected.clone()
    logits[1, 5] = logits[1, 4]
    logits[0, 1] = logits[0, 0]  # inside the prompt, whose logits make no text
    row = compare("row", expected, logits, prompt_length=4, tolerance=0.5, reason="")
    assert (row.first_change, row.agreement, row.difference, row.passed) == (2, 14 / 16, 1.0, False)
    assert compare("row", expected, expected, 4, 0.0, "").first_change is None


# A checkpoint, and transformers.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two converted Llamas with the same config.json and other weights."""
    made = []
    fields = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    for seed in range(2):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("llama")
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(folder)
        convert_hf_checkpoint.convert(folder)
        made.append(folder)
    return made


def arguments(checkpoint_path, hf) -> Namespace:
    return Namespace(checkpoint_path=checkpoint_path, hf=hf, device="cpu", no_compile=True)


def test_a_checkpoint_agrees_with_the_transformers_model_it_was_made_from(folders, capsys):
    assert main(arguments(folders[0] / "model.pth", folders[0])) == 0
    out = capsys.readouterr().out
    assert str(folders[0] / "model.pth") in out and "  transformers  " in out


@pytest.mark.parametrize("alone", [True, False])
def test_hf_needs_a_checkpoint_and_a_folder(folders, tmp_path, alone):
    checkpoint_path, hf = (None, folders[0]) if alone else (folders[0] / "model.pth", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--checkpoint_path" if alone else "nowhere"):
        main(arguments(checkpoint_path, hf))


def test_other_weights_fail_with_exit_code_1(folders):
    finished = run("--checkpoint_path", folders[0] / "model.pth", "--hf", folders[1])
    assert finished.returncode == 1
    failed = [line.split()[0] for line in finished.stdout.splitlines() if "FAILED  (" in line]
    assert failed == ["transformers"]
    assert "DISAGREE" in finished.stdout and "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--checkpoint_path", "nowhere/model.pth"],
        ["--checkpoint_path", "."],
        ["--device", "abacus"],
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments):
    finished = run(*arguments)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
    assert arguments[1].removesuffix("/model.pth") in finished.stderr and finished.stdout == ""
