"""scripts/benchmark.py: a suite measures, checks and writes; what does not count is refused."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from check_equivalence import FAMILIES, random_weights
from checkpoint import build_model

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("benchmark", ROOT / "scripts" / "benchmark.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

LIMITS = {"bytes_per_second": 1e10, "operations_per_second": 1e11}


def run(*arguments):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", *map(str, arguments), "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


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


def tiny(dtype=torch.float32):
    config = FAMILIES["llama-2"]
    return build_model(config, random_weights(config), "cpu", dtype)


def test_a_token_that_is_not_the_eager_models_does_not_count():
    model, prompt = tiny(), torch.tensor([[1, 2, 3]])
    ids = benchmark.greedy(model, prompt, 8)
    assert benchmark.check_tokens(model, prompt, ids, "row") == "same"
    ids[0, 5] = (ids[0, 5] + 1) % model.config.vocab_size
    with pytest.raises(ValueError, match="row: a greedy token is not the eager model's"):
        benchmark.check_tokens(model, prompt, ids, "row")


def test_a_logit_that_is_no_number_does_not_count():
    model, prompt = tiny(), torch.tensor([[1, 2, 3]])
    ids = benchmark.greedy(model, prompt, 3)
    model.norm_f.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not a finite number"):
        benchmark.check_tokens(model, prompt, ids, "row")


def test_a_cached_token_has_the_bytes_that_the_cache_has():
    model = tiny(torch.bfloat16)
    model.setup_caches(1, 256)
    caches = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("_cache"))
    assert 256 * benchmark.slot_bytes(model) == caches


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_two_for_each_weight_that_multiplies(family):
    config = FAMILIES[family]
    model = build_model(config, random_weights(config), "cpu", torch.float32)
    weights = sum(t.numel() for name, t in model.named_parameters() if t.dim() == 2 and not name.startswith("w"))
    head = config.vocab_size * config.dim if config.tie_embeddings else 0
    assert benchmark.operations_per_token(model) == 2 * (weights + head)


def test_prefill_and_forward_measure_each_way_of_running():
    numbers = {"device": "cpu", "samples": 2, "tokens": [20]}
    rows = list(benchmark.prefills({"float32": tiny()}, LIMITS, **numbers))
    assert [row["name"] for row in rows] == ["float32 eager, 20 tokens", "float32 compiled, 20 tokens"]
    rows += benchmark.forwards({"float32": tiny()}, LIMITS, batch=2, **numbers)
    assert all(row["seconds"] > 0 and 0 < row["share_of_floor"] for row in rows)
    assert [row["tokens"] for row in rows[2:]] == [40, 40, 40]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("decode",), "give either --shape or --checkpoint_path"),
        (("decode", "--shape", "llama-9"), "llama-9 is neither a config.json nor one of llama-2-7b"),
        (("plot", "--png", "x.png"), "plot needs --json_path"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_a_plot_is_drawn_or_says_what_it_needs(tmp_path):
    row = benchmark.row_of("bf16", [0.002, 0.003], 0.001)
    content = {"suite": "decode", "hardware": "a GPU", "torch": "2", "rows": [row]}
    (tmp_path / "rows.json").write_text(json.dumps(content))
    try:
        benchmark.plot(tmp_path / "rows.json", tmp_path / "rows.png")
    except ValueError as error:
        assert "pip install matplotlib" in str(error) and importlib.util.find_spec("matplotlib") is None
    else:
        assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
