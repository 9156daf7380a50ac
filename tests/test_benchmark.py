"""scripts/benchmark.py: a suite measures, checks and writes; what does not count is refused."""

import importlib.util
import json
import os
import subprocess
import sys
import weakref
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
import torch
from conftest import experts_in_mxfp4

import decode
import fast_model
import quantized_linear
import scripts.benchmark as benchmark
import tp
from check_equivalence import FAMILIES, random_weights
from checkpoint import build_model, quantize_model, write_checkpoint
from model import GPT

ROOT = Path(__file__).parent.parent
LIMITS = {"bytes_per_second": 1e10, "operations_per_second": 1e11}


def run(*arguments):
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    command = [sys.executable, "-m", "scripts.benchmark", *map(str, arguments), "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.fixture
def config_json(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 300, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path / "config.json"


def test_a_suite_prints_limits_then_rows_and_writes_both(config_json, tmp_path):
    out = tmp_path / "rows.json"
    arguments = ("--shape", config_json, "--weights", "float32", "--samples", 2, "--new_tokens", 30)
    done = run("decode", *arguments, "--json_path", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("GB/s") < done.stdout.index("at most") < done.stdout.index("of the floor")
    content = json.loads(out.read_text())
    assert content["suite"] == "decode" and content["torch"] == torch.__version__ and content["hardware"]
    (row,) = content["rows"]
    assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"] and row["first_token"] > 0
    assert row["share_of_floor"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    assert row["floor_seconds"] == pytest.approx(row["bytes_per_token"] / content["limits"]["bytes_per_second"])
    assert row["cold"] > row["warm"] > 0 and row["agrees"].startswith(("same", "within"))
    assert content["peak_memory"] > 1e6 and "peak_memory" not in row
    assert done.stdout.splitlines()[-1].startswith(f"memory: {content['peak_memory'] / 1e9:.2f} GB at most")


@pytest.mark.parametrize("ranks, weights", [(1, "int8"), (2, "float32"), (4, "int4")])
def test_each_rank_makes_its_share_alone(ranks, weights):
    config = replace(FAMILIES["mixtral"], n_head=8, n_kv_head=4, hidden_dim=256)
    expected, state_dict = config, random_weights(config)
    if weights != "float32":
        expected, state_dict = quantize_model(config, state_dict, weights, 16)
    part = tp.shard(state_dict, expected, 1 % ranks, ranks)
    made = benchmark.RandomWeights(config, "cpu", 1 % ranks, ranks)
    if weights != "float32":
        _, made = quantize_model(config, made, weights, 16)
    assert {name: tensor.shape for name, tensor in made.items()} == {name: t.shape for name, t in part.items()}


def test_a_device_holds_a_quantized_model_once(monkeypatch):
    """Each tensor is let go of when it is fused."""
    config, held = replace(CONFIG, n_layer=3), []
    fuse = benchmark.GivenAway.__getitem__

    def count(self, name):
        held.append(sum(tensor.nbytes for tensor in self.values()))
        return fuse(self, name)

    monkeypatch.setattr(benchmark.GivenAway, "__getitem__", count)
    benchmark.make_model(config, random_weights(config), "int8", 32, "cpu")
    assert held[0] > 0 and held == sorted(held, reverse=True) and held[-1] < held[0] / 10


def test_a_model_of_four_ranks_is_measured_and_its_command_kept(config_json, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    config_json.write_text(json.dumps(json.loads(config_json.read_text()) | sizes))
    out = tmp_path / "rows.json"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    numbers = ["--samples", "1", "--new_tokens", "4", "--weights", "int4", "--temperature", "0"]
    command = ["-m", "scripts.benchmark", "decode", "--shape", str(config_json), *numbers]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*start, *command, "--device", "cpu", "--json_path", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("int4") == 2 and done.stdout.count("memory:") == 1  # one line before the row, and it
    content = json.loads(out.read_text())
    assert content["ranks"] == 4 and content["load_seconds"] > 0 and content["peak_memory"] > 1e6
    assert content["command"].startswith("torchrun --standalone --nproc_per_node=4 -m scripts.benchmark decode")
    assert content["rows"][0]["agrees"].startswith(("same", "within"))


CONFIG, OSS = FAMILIES["llama-2"], FAMILIES["gpt-oss"]


def tiny(dtype=torch.float32, seed=0):
    return build_model(CONFIG, random_weights(CONFIG, seed), "cpu", dtype)


def build_tiny(reference=False, seed=0):
    return benchmark.make_model(CONFIG, random_weights(CONFIG, seed), "float32", 32, "cpu", reference)


LAST_RUNGS = ("compiled", "with kernels")
NUMBERS = {"device": "cpu", "samples": 2, "prompt_tokens": 3, "new_tokens": 30, "temperature": 0.8, "batch": 2}
NUMBERS |= {"tokens": [20, 30, 40, 50], "used": [40, 100], "slots": 256, "sizes": [1, 3]}
NUMBERS |= {"acceptance": [0.5], "drafts": [3], "shard": False, "recompute": False}
STEPS = ("decode", "context", "batch", "ladder")
BUILDS = (*benchmark.ALONE, "ladder")  # suites that build their models themselves


def tiny_draft():
    """The first of the two layers of `tiny`."""
    config = replace(CONFIG, n_layer=1)
    weights = {name: tensor for name, tensor in random_weights(CONFIG).items() if name in benchmark.shapes_of(config)}
    return build_model(config, weights, "cpu", torch.float32)


def measure(suite, models=None, **numbers):
    models = models or {"float32": build_tiny if suite in BUILDS else tiny()}
    if suite == "speculate":
        models = {name: (model, tiny_draft()) for name, model in models.items()}
    return list(benchmark.SUITES[suite](Namespace(**NUMBERS | numbers), models, LIMITS))


@pytest.fixture
def no_kernels(monkeypatch):
    """torch.compile traces, guards and recompiles as ever, and then runs PyTorch's own operators: seconds less."""
    compile = torch.compile

    def traced(function, fullgraph, dynamic=None, options=None):
        return compile(function, fullgraph=fullgraph, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)


@pytest.mark.parametrize("suite", benchmark.SUITES)
def test_a_row_says_how_its_tokens_agree(suite, no_kernels, capsys):
    rows = measure(suite)
    names = {
        "decode": ["float32"],
        "prefill": [f"float32 {kind}, {n} tokens" for kind in ("eager", "compiled") for n in (20, 30, 40, 50)],
        "context": ["float32, 40 of 256", "float32, 100 of 256"],
        "batch": ["float32, batch 1", "float32, batch 3"],
        "forward": ["float32 model.py", "float32 fast_model.py", "float32 compiled"],
        "train": ["float32 model.py", "float32 fast_model.py", "float32 compiled"],
        "speculate": ["float32, 3 drafts"],
        "ladder": [f"float32 {name}" for name in ("model.py, eager", "fast_model.py, eager", *LAST_RUNGS)],
    }
    assert [row["name"] for row in rows] == names[suite]
    for row in rows:
        plain = row["name"].endswith("model.py") and "fast" not in row["name"] or "eager" in row["name"]
        # the plain row is what the others agree with
        assert plain or row.get("losses_within", 1) < 1e-4 or row["agrees"].startswith(("same", "within"))
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["share_of_floor"] == pytest.approx(row["floor_seconds"] / row["seconds"])
        assert not {"peak_memory", "kernels"} & row.keys()  # of one row on a CPU neither can be said
        benchmark.print_row(row)
        assert row["name"] in capsys.readouterr().out


def test_a_tokens_share_of_the_cache_grows_with_those_used(no_kernels, capsys):
    rows = measure("context")
    model = tiny()
    weights = benchmark.bytes_per_step(model)  # there is no cache yet
    model.setup_caches(1, 256)
    for row, used in zip(rows, (40, 100), strict=True):
        cache = used * benchmark.slot_bytes(model)
        assert row["cache_share"] == pytest.approx(cache / (weights + cache))
        assert row["floor_seconds"] == pytest.approx((weights + cache) / LIMITS["bytes_per_second"])
    benchmark.print_row(rows[1])
    assert f"cache {rows[1]['cache_share']:.0%} of that floor" in capsys.readouterr().out


@pytest.mark.parametrize("suite", STEPS)
def test_a_compiled_token_that_is_not_the_eager_models_does_not_count(suite, no_kernels, monkeypatch):
    def wrong_step(model, token, input_pos, noise, sampling):
        return model(token, input_pos)[:, -1].argmin(-1, keepdim=True), input_pos + 1

    monkeypatch.setattr(benchmark, "decode_step", wrong_step)
    with pytest.raises(ValueError, match="float32.*: a greedy token is not the plain run's"):
        measure(suite)


def test_speculation_that_says_something_else_does_not_count(no_kernels, monkeypatch):
    def wrong_verify(model, tokens, *arguments):
        following, *rest, read = benchmark_verify(model, tokens, *arguments)
        return (following + 1) % 300, *rest, (read + 1) % 300

    benchmark_verify = benchmark.verify
    monkeypatch.setattr(benchmark, "verify", wrong_verify)
    with pytest.raises(ValueError, match="float32, 3 drafts: a greedy token is not the plain run's"):
        measure("speculate")


def test_the_later_layers_decide_how_many_drafts_are_accepted(no_kernels):
    low, high = measure("speculate", acceptance=[0.3, 0.8], new_tokens=100)
    assert low["acceptance"] < 0.5 < 0.65 < high["acceptance"]
    for row in (low, high):
        assert row["times_plain"] == pytest.approx(row["plain_seconds"] / row["seconds"])
        assert 0 < row["verify_seconds"] + row["draft_seconds"] < row["round_seconds"]


def test_a_compiled_prefill_that_is_not_the_eager_one_does_not_count(no_kernels, monkeypatch):
    monkeypatch.setattr(benchmark, "compiled_prefill", lambda: lambda *arguments: -benchmark.prefill(*arguments))
    with pytest.raises(ValueError, match="float32 compiled, 20 tokens: a greedy token is not"):
        measure("prefill")


@pytest.mark.parametrize(
    "suite, message",
    [("forward", "a greedy token is not"), ("train", "its losses"), ("ladder", "a greedy token is not")],
)
def test_a_fast_model_that_is_not_the_reference_does_not_count(suite, message):
    with pytest.raises(ValueError, match=f"float32 fast_model.py(, eager)?: {message}"):
        measure(suite, {"float32": lambda reference=False: build_tiny(reference, seed=int(reference))})


@pytest.mark.parametrize("suite", benchmark.SUITES)
def test_a_logit_that_is_no_number_does_not_count(suite, no_kernels):
    def build(reference=False):
        model = build_tiny(reference)
        (model.transformer.ln_f if reference else model.norm_f).weight[0] = float("nan")
        return model

    with pytest.raises((ValueError, FloatingPointError), match="not a finite number|that are not finite"):
        measure(suite, {"float32": build if suite in BUILDS else build()})


def test_a_logit_of_the_compiled_run_alone_is_checked_too():
    expected = torch.tensor([[1.0, 2.0]])
    assert benchmark.check_logits(expected, expected, "row") == "same"
    with pytest.raises(ValueError, match="row: a logit is not a finite number"):
        benchmark.check_logits(torch.tensor([[float("-inf"), 2.0]]), expected, "row")


def test_the_samples_of_several_models_compile_nothing(no_kernels):
    state_dict = random_weights(OSS)
    models = {kind: benchmark.make_model(OSS, state_dict, kind, 32, "cpu") for kind in benchmark.WEIGHTS}
    rows = measure("decode", models, samples=1)  # or set_stance("fail_on_recompile") raises
    assert [row["name"] for row in rows] == list(benchmark.WEIGHTS)


def test_a_prefill_that_compiles_for_each_length_is_an_error(no_kernels, monkeypatch):
    static = torch.compile(benchmark.prefill, fullgraph=True, dynamic=False)
    monkeypatch.setattr(benchmark, "compiled_prefill", lambda: static)
    assert len(measure("prefill", tokens=[20, 30])) == 4
    with pytest.raises(RuntimeError, match="fail_on_recompile"):
        measure("prefill")


@pytest.mark.parametrize("suite", ("context", "batch"))
def test_a_step_that_compiles_in_a_sample_is_an_error(suite, no_kernels, monkeypatch):
    never_run = torch.compile(benchmark.decode_step, fullgraph=True, dynamic=False)
    monkeypatch.setattr(benchmark, "compile_times", lambda *_: (torch.compiler.reset(), 0, never_run))
    with pytest.raises(RuntimeError, match="fail_on_recompile"):
        measure(suite)


def test_kernels_come_with_their_rung(monkeypatch):
    def rung(*_):
        return [file.gpu_kernels for file in files]

    def build(reference=False):
        built.append(rung())
        return build_tiny(reference)

    files = (fast_model, quantized_linear, decode)
    built, kernels, none = [], [SimpleNamespace(runs_on=lambda device: False)] * 3, [None] * 3
    for file in files:
        monkeypatch.setattr(file, "gpu_kernels", kernels[0])
    monkeypatch.setattr(benchmark, "rung", rung)
    rows = measure("ladder", {"bfloat16": build, "int4": build})
    assert rows == [kernels, none, none, kernels, kernels] and built == [kernels] * 3


@pytest.mark.parametrize("suite", ("context", "batch"))
def test_caches_are_given_back_after_what_holds_them(suite, no_kernels, monkeypatch):
    model, done = tiny(), []
    setup_caches, reset = model.setup_caches, torch.compiler.reset
    monkeypatch.setattr(model, "setup_caches", lambda *sizes: (done.append(sizes), setup_caches(*sizes)))
    monkeypatch.setattr(torch.compiler, "reset", lambda: (done.append("reset"), reset()))
    measure(suite, {"float32": model})
    rows = {"context": [1], "batch": [1, 3]}[suite]
    slots = {"context": 256, "batch": 512}[suite]
    assert done == [step for n in rows for step in ((n, slots), "reset", "reset", "reset", (1, 1))]


def test_forward_has_one_model_at_a_time(no_kernels):
    alive = []

    def build(reference):
        assert not any(model() for model in alive)
        model = build_tiny(reference)
        alive.append(weakref.ref(model))
        return model

    assert len(measure("forward", {"float32": build})) == 3


@pytest.mark.parametrize("weights", ("bfloat16", "int8", "int4"))
def test_the_reference_carries_the_models_weights(weights):
    ids = torch.arange(40).view(2, 20)
    build = partial(benchmark.make_model, CONFIG, random_weights(CONFIG), weights, 32, "cpu")
    expected, logits = build(reference=True)(ids), build()(ids)
    assert type(build(reference=True)) is GPT and expected.dtype == logits.dtype
    assert (expected - logits).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("weights", ["mxfp4", "mxfp4-int8"])
def test_a_mixture_in_mxfp4_has_the_rest_in_bf16_or_int8(weights, published):
    """From plain weights, or from a checkpoint whose experts are in MXFP4 already."""
    state_dict = random_weights(OSS)
    plain = experts_in_mxfp4(state_dict) if published else state_dict
    model = benchmark.make_model(OSS, plain, weights, 32, "cpu")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    rest = "Linear" if weights == "mxfp4" else "Int8Linear"
    assert kinds["layers.0.mlp.experts_down"] == kinds["layers.1.mlp.experts_gate_up"] == "Mxfp4Linear"
    assert kinds["layers.0.attn.out"] == kinds["lm_head"] == rest and kinds["layers.0.mlp.router"] == "Linear"


def test_only_a_mixture_has_a_rest_beside_mxfp4():
    with pytest.raises(ValueError, match="mxfp4-int8 needs a mixture"):
        benchmark.make_model(CONFIG, random_weights(CONFIG), "mxfp4-int8", 32, "cpu")


@pytest.mark.parametrize("config, weights, part", [
    (OSS, "mxfp4", ".experts."), (replace(CONFIG, tie_embeddings=True), "int8", "_proj.")])  # fmt: skip
def test_random_weights_are_quantized_one_after_the_other(monkeypatch, config, weights, part):
    random, made = benchmark.RandomWeights(config, "cpu"), []
    get = benchmark.RandomWeights.__getitem__

    def watched(self, name):
        tensor = get(self, name)
        if part in name and name.endswith(".weight"):
            assert sum(weight() is not None for weight in made) <= 1, name  # the one before
            made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(benchmark.RandomWeights, "__getitem__", watched)
    benchmark.make_model(config, random, weights, 32, "cpu")
    assert len(made) == len([name for name in random if part in name and name.endswith(".weight")])


def test_a_step_of_gpt_oss_reads_four_experts_as_they_are_packed():
    """The whole 20B model without a number in it; its parts are counted by hand."""
    config = benchmark.SHAPES["gpt-oss-20b"]
    plain = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
             for name, shape in benchmark.shapes_of(config).items()}  # fmt: skip
    dim, layers, vocabulary = 2880, 24, 201088
    experts = 4 * layers * (3 * dim * dim * 17 / 32 + 2 * 3 * dim)  # 32 numbers in 16 bytes and a scale; biases
    attention, head = 2 * dim * 64 * (64 + 8 + 8 + 64) * layers, 2 * dim * vocabulary
    small = layers * 2 * (64 * (64 + 8 + 8) + 64 + dim + 32 * (dim + 1) + 2 * dim)  # biases, sinks, router, norms
    model = build_model(*quantize_model(config, plain, "mxfp4", 32), "meta", torch.bfloat16)
    assert benchmark.bytes_per_step(model) == experts + attention + head + small + 2 * dim
    assert 815 < 3.06e12 / benchmark.bytes_per_step(model) < 830  # tokens/s at most


def test_the_shapes_of_gpt_oss_are_the_published_ones():
    """transformers' defaults, which `config_from_hf` fills in, are those of the 120B model."""
    fields = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    assert benchmark.SHAPES["gpt-oss-120b"] == benchmark.config_from_hf(fields)
    fields |= {"num_hidden_layers": 24, "num_local_experts": 32}
    assert benchmark.SHAPES["gpt-oss-20b"] == benchmark.config_from_hf(fields)


def test_steps_in_mxfp4_are_measured(no_kernels):
    kinds = ("mxfp4", "mxfp4-int8")
    weights = benchmark.RandomWeights(OSS, "cpu")
    first, second = measure("decode", {kind: benchmark.make_model(OSS, weights, kind, 32, "cpu") for kind in kinds})
    assert (first["name"], second["name"]) == kinds and first["bytes_per_token"] > second["bytes_per_token"]


def test_kernels_are_neither_copies_nor_ranges():
    def event(name, device=torch.autograd.DeviceType.CUDA, is_user_annotation=False):
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=is_user_annotation)

    events = [event("gemm"), event("aten::mm", torch.autograd.DeviceType.CPU), event("Memset (Device)")]
    events += [event("Memcpy DtoD (Device -> Device)"), event("CompiledFxGraph", is_user_annotation=True)]
    assert benchmark.count_kernels(events) == 1


def test_the_compilers_folder_is_put_back_after_an_error(no_kernels, tmp_path):
    def action(step):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
        raise ZeroDivisionError

    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError):
        benchmark.compile_step("cpu", str(tmp_path), action)
    assert dict(os.environ) == before


def test_a_cached_token_has_the_bytes_that_the_cache_has():
    model = tiny(torch.bfloat16)
    numbers = 2 * model.config.n_layer * model.config.n_kv_head
    model.setup_caches(3, 256)
    assert benchmark.slot_bytes(model) == numbers * model.config.head_dim * 2
    model.setup_caches(3, 256, int8=True)
    assert benchmark.slot_bytes(model) == numbers * (model.config.head_dim + 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_two_for_each_weight_that_multiplies(family):
    config = FAMILIES[family]
    model = build_model(config, random_weights(config), "cpu", torch.float32)
    active = config.n_expert_used / config.n_expert if config.n_expert else 1
    matrices = {name: t for name, t in model.named_parameters() if t.dim() == 2 and not name.startswith("w")}
    weights = sum(t.numel() * (active if "experts_" in name else 1) for name, t in matrices.items())
    head = config.vocab_size * config.dim if config.tie_embeddings else 0
    assert benchmark.operations_per_token(model) == 2 * (weights + head)


def mistake(monkeypatch, *arguments):
    """What the command says before it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments), "--device", "cpu"])
    with pytest.raises(ValueError) as raised:
        benchmark.main(benchmark.parse_arguments())
    return str(raised.value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("decode",), "give either --shape or --checkpoint_path"),
        (("plot", "--png", "x.png"), "plot needs --json_path"),
        (("plot", "--png", "x.png", "--json_path", "./x.png"), "x.png would be written over"),
        (("decode", "--shape", "x.json", "--json_path", "x.json"), "x.json would be written over"),
        (("batch", "--shape", "x", "--hf", "y"), "--hf is a row of the suite decode; leave it out of batch"),
        (("forward", "--shape", "x", "--weights", "int8", "int4"), "forward takes one kind of weights, not 2"),
        (
            ("speculate", "--shape", "x", "--weights", "mxfp4"),
            "speculate scales its model's weights, which those in mxfp4",
        ),
        (("decode", "--shape", "x", "--new_tokens", 1), "decode times the tokens after the first one; give"),
        (("decode", "--shape", "gpt-124m", "--prompt_tokens", 1023), "the context has 1024 tokens, so two steps"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words, monkeypatch):
    assert words in mistake(monkeypatch, *arguments)


def test_a_quantized_checkpoint_is_refused(tmp_path, monkeypatch):
    config, state_dict = quantize_model(CONFIG, random_weights(CONFIG), "int8", 32)
    write_checkpoint(tmp_path / "model_int8.pth", config, state_dict)
    assert "model_int8.pth is quantized already; give" in mistake(
        monkeypatch, "decode", "--checkpoint_path", tmp_path / "model_int8.pth"
    )


def test_the_command_says_its_mistakes_and_exits_with_2():
    done = run("decode", "--shape", "llama-9")
    assert done.returncode == 2 and "llama-9 is neither a config.json nor one of llama-2-7b" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("decode", "--shape", "x", "--group_size", 48)
    assert done.returncode == 2 and "invalid choice: 48" in done.stderr


def test_forward_is_in_float32_on_a_cpu_and_says_nothing_of_the_runs_memory(
    config_json, tmp_path, no_kernels, monkeypatch, capsys
):
    for name in ("read_bandwidth", "matrix_rate"):
        monkeypatch.setattr(benchmark, name, lambda *_: 1e10)
    arguments = ["forward", "--shape", config_json, "--tokens", 20, "--batch", 2, "--json_path", tmp_path / "rows.json"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments), "--device", "cpu"])
    benchmark.main(benchmark.parse_arguments())
    content = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"].split()[0] for row in content["rows"]] == ["float32"] * 3
    assert "peak_memory" not in content and "memory" not in capsys.readouterr().out


def test_a_plot_is_drawn_or_says_what_it_needs(tmp_path):
    row = benchmark.row_of("bf16", [0.002, 0.003], 0.001)
    content = {"suite": "decode", "model": "a shape", "hardware": "a GPU", "torch": "2", "rows": [row]}
    (tmp_path / "rows.json").write_text(json.dumps(content))
    try:
        benchmark.plot([tmp_path / "rows.json"], tmp_path / "rows.png")
    except ValueError as error:
        assert "pip install matplotlib" in str(error) and importlib.util.find_spec("matplotlib") is None
    else:
        assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", "[1]", '{"suite": "decode"}'])
def test_a_plot_of_something_else_is_refused_by_name(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=r"rows\.json is not what --json_path writes"):
        benchmark.plot([tmp_path / "rows.json"], tmp_path / "rows.png")


def test_a_ladders_plot_is_tokens_a_second_with_a_tick_at_each_floor():
    axes = MagicMock()
    benchmark.draw_ladder(axes, [benchmark.row_of("eager", [0.5], 0.01), benchmark.row_of("int4", [0.02], 0.005)])
    assert axes.barh.call_args.args[1] == [2, 50] and axes.vlines.call_args.args[0] == [100, 200]
    assert axes.set_yticks.call_args.args[1] == ["eager", "int4"]
    assert [call.args[0] for call in axes.annotate.call_args_list[1:]] == ["2", "50"]


def test_files_of_several_ranks_are_a_table_and_lines():
    contents = [
        {"suite": "decode", "model": "7b", "ranks": ranks, "peak_memory": 8e9 / ranks, "load_seconds": 3.0}
        | {"rows": [benchmark.row_of(name, [seconds / ranks**0.5], 0.002 / ranks)]}
        for name, seconds in (("bf16", 0.004), ("int8", 0.003))
        for ranks in (4, 1)
        if (name, ranks) != ("int8", 1)
    ]
    found = benchmark.rows_by_ranks(contents)
    lines = benchmark.tabulate_ranks(found)
    assert lines[2:] == [
        "| 7b bf16 | 1 | 250.0 | 1.00 | 50% | 8.0 | 3 |",
        "| 7b bf16 | 4 | 500.0 | 2.00 | 25% | 2.0 | 3 |",
        "| 7b int8 | 4 | 666.7 |  | 33% | 2.0 | 3 |",
    ]
    axes = Mock()
    benchmark.draw_ranks(axes, found)
    assert [call.args[:2] for call in axes.plot.call_args_list[:2]] == [([1, 4], [250, 500]), ([1, 4], [500, 2000])]
    axes.set_xticks.assert_called_once_with([1, 4], ["1", "4"])


def test_a_contexts_plot_is_lines_over_the_tokens_used():
    rows = [
        benchmark.row_of(f"{name}, {used}", [used / 1e3], used / 2e3, weights=name, used=used)
        for name in ("bf16", "int8")
        for used in (8, 4)
    ]
    axes = Mock()
    benchmark.draw_lines(axes, rows)
    lines = {call.kwargs["label"]: call.args[:2] for call in axes.plot.call_args_list}
    assert lines["int8, median"] == ([4, 8], [4, 8]) and lines["bf16, floor"] == ([4, 8], [2, 4]) and len(lines) == 4
    axes.set_xscale.assert_called_once_with("log", base=2)
