"""scripts/export_hf_checkpoint.py against transformers: what it writes computes the same, and converts back unchanged.

The models are those of test_convert_hf.py, and a few that never were a Hugging Face folder.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_convert_hf
import torch
import transformers
from conftest import experts_in_mxfp4
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_convert_hf import MODELS, converted, same

import convert_hf_checkpoint as convert_hf
from check_equivalence import FAMILIES, random_weights
from checkpoint import build_model, quantize_model, read_checkpoint, write_checkpoint
from model import GPTConfig
from scripts import export_hf_checkpoint
from scripts.export_hf_checkpoint import config_to_hf, export

ROOT = Path(__file__).parent.parent
IDS = torch.randint(101, (2, 24), generator=torch.Generator().manual_seed(7))  # more than any window
TINY = GPTConfig(
    block_size=64, vocab_size=101, n_layer=2, n_head=4, n_kv_head=2, head_dim=12, dim=32, hidden_dim=56, norm_eps=1e-6
)

saved = test_convert_hf.saved  # a fixture


@pytest.fixture
def model_pth(tmp_path):
    """model_pth(config, dtype): the path of a model.pth with random weights, in a folder of its own."""

    def write(config=TINY, dtype=torch.float32):
        path = tmp_path / "model" / "model.pth"
        write_checkpoint(path, config, {name: t.to(dtype) for name, t in random_weights(config).items()})
        return path

    return write


def loaded(folder):
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found  # no tensor is missing, left over or of another shape
    return model.eval()


def refused(path, out, *texts, error=ValueError):
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(error) as caught:
        export(path, out)
    assert all(text in str(caught.value) for text in texts) and "\n" not in str(caught.value)
    assert sorted(out.parent.rglob("*")) == before


def test_experts_in_mxfp4_are_written_as_they_were_read(tmp_path):
    fields = {"model_type": "gpt_oss", "vocab_size": 101, "hidden_size": 64, "intermediate_size": 32, "head_dim": 16}
    fields |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    config = convert_hf.config_from_hf(fields | {"num_experts_per_tok": 2})
    weights = experts_in_mxfp4(random_weights(config))
    write_checkpoint(tmp_path / "model.pth", config, weights)
    out = tmp_path / "out"
    export(tmp_path / "model.pth", out)
    assert load_file(out / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj_blocks"].shape == (
        3,
        64,
        2,
        16,
    )
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
    same((config, weights), converted(out))


# The promise.

EXPORTED = [name for name in MODELS if name != "olmo3 of two bases"]


@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_transformers_reads_the_same_model_and_it_converts_back(saved, tmp_path, name):
    model, folder = saved(name)
    before = converted(folder)
    out = tmp_path / "out"
    export(folder / "model.pth", out)
    assert (loaded(out)(IDS).logits - model(IDS).logits).abs().max() < 1e-4
    same(converted(out), before)


# Families that compute what an older one does.
EXPORTED_AS = {
    "mistral": "LlamaForCausalLM",  # without a window
    "phi3": "LlamaForCausalLM",
    "phi3 window": "MistralForCausalLM",
    "seed oss": "Qwen2ForCausalLM",
    "helium": "SeedOssForCausalLM",
    "helium tied": "LlamaForCausalLM",
    "mistral 3.1": "LlamaForCausalLM",
    "mistral 3 tied": "MistralForCausalLM",
    "ernie 4.5": "LlamaForCausalLM",
    "ernie 4.5 tied": "LlamaForCausalLM",
    "phi3 yarn": "MistralForCausalLM",
    "hyperclovax without post-norm": "GraniteForCausalLM",
    "glm rotary 0.8": "Phi3ForCausalLM",
    "gemma 3 multimodal": "Gemma3ForCausalLM",
    "gemma 3 multimodal untied": "Gemma3ForCausalLM",
    "glm rotary 1": "Qwen2ForCausalLM",  # what it is without its own field
}


def test_olmo3_of_two_bases_is_refused(saved, tmp_path):
    """transformers 4 has no place for the second one."""
    text = "Olmo3ForCausalLM, but not with rope_base = 500.0, rope_base_window = 300.0"
    refused(convert_hf.convert(saved("olmo3 of two bases")[1]), tmp_path / "out", text)


ONE_VALUE = {
    "olmo": {"clip_qkv": None},
    "olmo3": {"rope_theta": 500000.0},  # transformers 4 takes 10,000 without it
    "olmoe": {"clip_qkv": None},
    "phi": {"tie_word_embeddings": False, "qk_layernorm": False},
    "gptj": {"tie_word_embeddings": False},
    "falcon 7b": {"alibi": False, "parallel_attn": True, "multi_query": True, "new_decoder_architecture": True},
    "cohere": {"use_qk_norm": False},
}


@pytest.mark.parametrize("name", ONE_VALUE)
def test_fields_of_one_implemented_value_are_written_too(saved, name):
    fields = config_to_hf(*converted(saved(name)[1]))
    assert {field: fields.get(field, "absent") for field in ONE_VALUE[name]} == ONE_VALUE[name]


LN_2, LN_1_BIAS, LN_F_BIAS = "transformer.h.1.ln_2.weight", "transformer.h.0.ln_1.bias", "transformer.ln_f.bias"
TRAINED = [  # norms that are no longer what the family stores
    ("phi", [LN_2], "PhiForCausalLM, but not with transformer.h.1.ln_2.weight unlike transformer.h.1.ln_1.weight"),
    ("gptj", [LN_2], "GPTJForCausalLM, but not with transformer.h.1.ln_2.weight unlike transformer.h.1.ln_1.weight"),
    (
        "cohere",
        [LN_2],
        "CohereForCausalLM, but not with transformer.h.1.ln_2.weight unlike transformer.h.1.ln_1.weight",
    ),
    ("cohere", [LN_1_BIAS], "CohereForCausalLM, but not with transformer.h.0.ln_1.bias other than 0"),
    ("cohere2", [LN_F_BIAS], "Cohere2ForCausalLM, but not with transformer.ln_f.bias other than 0"),
    ("olmo", [LN_2], "OlmoForCausalLM, but not with transformer.h.1.ln_2.weight other than 1"),
    ("falcon 7b", [LN_2, LN_1_BIAS], ""),  # 40B's form has two norms
    ("falcon 11b", [LN_2], ""),
    ("gpt neox", [LN_2, LN_F_BIAS], ""),
]


@pytest.mark.parametrize(("name", "changed", "text"), TRAINED)
@torch.no_grad()
def test_norms_that_an_architecture_does_not_store(saved, tmp_path, name, changed, text):
    config, state_dict = converted(saved(name)[1])
    path, out = tmp_path / "model.pth", tmp_path / "out"
    write_checkpoint(path, config, state_dict | {key: state_dict[key] + 0.5 for key in changed})
    if text:
        return refused(path, out, f"no architecture of transformers computes this model; the nearest is {text}")
    export(path, out)
    reference = build_model(*read_checkpoint(path), "cpu", torch.float32, reference=True)
    assert (loaded(out)(IDS).logits - reference(IDS)).abs().max() < 1e-4
    same(converted(out), read_checkpoint(path))


@pytest.mark.parametrize("name", EXPORTED)
def test_the_architecture_is_found_and_every_field_is_written(saved, tmp_path, name):
    model, folder = saved(name)
    fields = config_to_hf(*converted(folder))
    architecture = EXPORTED_AS.get(name, type(model).__name__)
    assert fields["architectures"] == [architecture]
    known = convert_hf.DEFAULTS[fields["model_type"]].keys()
    assert known - fields.keys() <= {"rope_parameters"}  # of transformers 5, which reads rope_theta and rope_scaling
    before_4_53 = {"layer_types": None} if "Qwen" in architecture else {}  # which it does not know
    for older in ({}, before_4_53):
        assert convert_hf.config_from_hf(json.loads(json.dumps(fields | older))) == converted(folder)[0]


MOE = replace(TINY, n_expert=5, n_expert_used=2)
NEVER_THERE = {
    "llama gelu": (replace(TINY, activation="gelu_tanh", qkv_bias=True, o_bias=True), "Llama"),
    "heads that do not divide": (replace(TINY, dim=42), "Mistral"),
    "qwen2 with a head_dim": (replace(TINY, qkv_bias=True), "Qwen2"),
    "one bias": (replace(TINY, o_bias=True), "SeedOss"),
    "heads that do not divide, and a bias": (replace(TINY, dim=42, mlp_bias=True), "SeedOss"),
    "qwen3 window": (replace(TINY, qk_norm=True, sliding_window=7), "Qwen3"),
    "qwen3 moe window": (replace(MOE, qk_norm=True, sliding_window=7, norm_topk_prob=False), "Qwen3Moe"),
    "olmo2 heads": (replace(TINY, pre_norm=False, post_norm=True, qk_norm="all", dim=42), "Olmo2"),
    "falcon of one norm each": (replace(TINY, norm="layer", parallel=True, gated=False, head_dim=8), "Falcon"),
    "mixtral window": (replace(MOE, sliding_window=7, tie_embeddings=True), "Mixtral"),
}


@pytest.mark.parametrize("name", NEVER_THERE)
@torch.no_grad()
def test_models_that_never_were_a_hugging_face_folder(model_pth, tmp_path, name):
    config, family = NEVER_THERE[name]
    path = model_pth(config)
    export(path, tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert type(model).__name__ == f"{family}ForCausalLM"
    reference = build_model(*read_checkpoint(path), "cpu", torch.float32, reference=True)
    assert (model(IDS).logits - reference(IDS)).abs().max() < 1e-4
    # With its cache, and no end that the checkpoint does not name.
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=12)
    assert torch.equal(tokens[:, 24:], reference(tokens).argmax(-1)[:, 23:-1]) and tokens.shape[1] == 36
    same(converted(tmp_path / "out"), read_checkpoint(path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_named(model_pth, tmp_path, dtype):
    path = model_pth(dtype=dtype)
    export(path, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert loaded(tmp_path / "out").dtype == dtype
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1
    same(converted(tmp_path / "out"), read_checkpoint(path))


def test_transformers_loads_mixed_dtypes_without_loss(tmp_path):
    weights = {name: t if t.ndim == 1 else t.bfloat16() for name, t in random_weights(TINY).items()}
    write_checkpoint(tmp_path / "model.pth", TINY, weights)
    export(tmp_path / "model.pth", tmp_path / "out")
    assert loaded(tmp_path / "out").dtype == torch.float32
    same(converted(tmp_path / "out"), (TINY, weights))


@pytest.mark.parametrize("name", ["llama 3.1", "gpt2", "mixtral"])
def test_shards_have_an_index_and_convert_back(saved, tmp_path, monkeypatch, name):
    model, folder = saved(name)
    before = converted(folder)
    monkeypatch.setattr(export_hf_checkpoint, "MAX_FILE_SIZE", "20KB")
    out = tmp_path / "out"
    found = export(folder / "model.pth", out)
    files = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert len(files) > 2 and f"in {len(files)} files" in found
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in files.values() for t in tensors.values())
    for tensors in files.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
    same(converted(out), before)
    loaded(out)


def test_experts_are_written_one_by_one(saved, tmp_path):
    for name, expected in (("mixtral", "block_sparse_moe.experts.4.w2"), ("qwen3 moe", "mlp.experts.11.down_proj")):
        converted(saved(name)[1])
        export(saved(name)[1] / "model.pth", tmp_path / name)
        assert f"model.layers.1.{expected}.weight" in load_file(tmp_path / name / "model.safetensors")


def test_a_tied_head_is_not_written_and_weights_in_one_storage_are_both(tmp_path):
    weights = random_weights(TINY)
    for tied in (True, False):
        head = {} if tied else {"lm_head.weight": weights["transformer.wte.weight"]}
        path, config = tmp_path / f"{tied}.pth", replace(TINY, tie_embeddings=tied)
        write_checkpoint(path, config, {k: t for k, t in weights.items() if k != "lm_head.weight"} | head)
        export(path, tmp_path / f"{tied}")
        assert ("lm_head.weight" in load_file(tmp_path / f"{tied}" / "model.safetensors")) != tied
        same(converted(tmp_path / f"{tied}"), read_checkpoint(path))


# What lies beside the weights.


def test_the_tokenizer_comes_along_and_its_ids(tiny_checkpoint, tmp_path):
    found = export(tiny_checkpoint / "model.pth", tmp_path / "out")
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == copied | {"config.json", "model.safetensors"}
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (tiny_checkpoint / name).read_bytes() and name in found
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (None, [256])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("a tall tale").input_ids) == "a tall tale"


def test_the_original_config_gives_ids_too(model_pth, tmp_path):
    path = model_pth()
    (path.parent / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 5, "hidden_size": 7}))
    (path.parent / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    export(path, tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["hidden_size"]) == (1, [5, 6], 32)


# Refusals.


@pytest.mark.parametrize("ids", ["</s>", {"a": 1}, 1.5, True, [1, "2"], [[1]]])
def test_ids_that_are_none_are_refused(model_pth, tmp_path, ids):
    path = model_pth()
    (path.parent / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    refused(path, tmp_path / "out", str(path.parent), "eos_token_id = ", "it must be an id or a list of ids")
    (path.parent / "generation_config.json").write_text(json.dumps({"bos_token_id": [1]}))
    refused(path, tmp_path / "out", "bos_token_id = [1]; it must be an id")


@pytest.mark.parametrize("content", ["[]", "1", "{", "[" * 100_000])
def test_damaged_json_beside_it_is_refused(model_pth, tmp_path, content):
    path = model_pth()
    (path.parent / "generation_config.json").write_text(content)
    refused(path, tmp_path / "out", "generation_config.json", "JSON")


def test_a_place_that_cannot_be_written_is_refused(model_pth, tmp_path):
    path = model_pth()
    (tmp_path / "file").write_text("")
    refused(path, tmp_path / "file" / "out", str(tmp_path / "file"), error=OSError)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_checkpoint_is_refused(tmp_path, mode):
    path = tmp_path / "model.pth"
    config = FAMILIES["llama-2"]
    write_checkpoint(path, *quantize_model(config, random_weights(config), mode, 32))
    refused(path, tmp_path / "out", "is quantized", str(path))


def test_a_folder_with_something_in_it_is_refused(model_pth, tmp_path):
    path = model_pth()
    (tmp_path / "out").mkdir()
    export(path, tmp_path / "out")  # an empty one is not
    refused(path, tmp_path / "out", str(tmp_path / "out"), "empty")
    refused(path, path, "empty")  # a file


GPT2 = {"norm": "layer", "rope_base": None, "gated": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True}
NO_BIAS = {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "activation": "relu"}
GPTJ = {"norm": "layer", "parallel": True, "gated": False, "mlp_bias": True, "head_bias": True, "n_kv_head": 4}
FALCON = {"norm": "layer", "parallel": True, "gated": False}
COHERE2 = {"norm": "layer", "parallel": True, "sliding_window": 7, "full_layers": (1,), "nope_layers": (1,)}
PYTHIA = FALCON | {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "n_kv_head": 4}
GPT_NEO = GPT2 | {"qkv_bias": False, "n_kv_head": 4, "attention_scale": 1.0}
GEMMA3 = {"norm_plus_one": True, "qk_norm": True, "post_norm": True, "activation": "gelu_tanh", "attention_scale": 0.25}
CLOVA = {"post_norm": True, "mlp_bias": True, "attention_scale": 0.5}
OLMO2 = {"pre_norm": False, "post_norm": True, "qk_norm": "all"}
NOBODY = {
    "layer norm": (replace(TINY, norm="layer", activation="gelu"), ["Llama", "norm = 'layer'"]),
    "window and biases": (replace(TINY, sliding_window=7, qkv_bias=True, mlp_bias=True), ["mlp_bias = True"]),
    "biased mixture": (replace(MOE, qkv_bias=True), ["Mixtral", "qkv_bias = True"]),
    "grouped heads of GPT-2": (replace(TINY, **GPT2, head_dim=8), ["GPT2", "n_kv_head = 2"]),
    "epsilon of OPT": (replace(TINY, **GPT2 | NO_BIAS, head_dim=8, n_kv_head=4), ["OPT", "norm_eps = 1e-06"]),
    "heads of GPT-2": (replace(TINY, **GPT2, n_kv_head=4), ["GPT2", "head_dim = 12"]),
    "dim of GPT-2": (replace(TINY, **GPT2, n_kv_head=4, dim=42, head_dim=10), ["GPT2", "dim = 42"]),
    "dim of GPT-J": (replace(TINY, **GPTJ, dim=42, head_dim=10), ["GPTJ", "dim = 42"]),
    "base of GPT-J": (replace(TINY, **GPTJ, head_dim=8, rope_base=500.0), ["GPTNeoX", "head_bias = True"]),
    "dim of Falcon": (replace(TINY, **FALCON, dim=42, head_dim=10), ["Starcoder2", "parallel = True"]),
    "head_dim of Command R7B": (replace(TINY, **COHERE2), ["Cohere2", "head_dim = 12"]),
    "parallel RMSNorm": (replace(TINY, parallel=True), ["Llama", "parallel = True"]),
    "dim of Pythia": (replace(TINY, **PYTHIA, dim=42, head_dim=10), ["Starcoder2", "parallel = True"]),
    "dim of GPT-Neo": (replace(TINY, **GPT_NEO, dim=42, head_dim=10), ["GPTNeo", "dim = 42"]),
    "dim of Command R7B": (replace(TINY, **COHERE2, dim=42, head_dim=10), ["Cohere2", "dim = 42"]),
    "dim of Gemma 3": (replace(TINY, **GEMMA3, dim=42, embed_scale=42**0.5), ["Gemma3", "dim = 42"]),
    "dim of HyperCLOVA X": (replace(TINY, **CLOVA, dim=42), ["Granite", "post_norm = True"]),
    "heads of Pythia": (replace(TINY, **FALCON, head_dim=8, mlp_bias=True), ["GPTNeoX", "n_kv_head = 2"]),
    "Olmo 2 with a bias": (replace(TINY, **OLMO2, qkv_bias=True), ["Olmo2", "o_bias = False"]),
    "experts of GPT-2": (replace(MOE, rope_base=None), ["OPT", "n_expert = 5"]),
}


@pytest.mark.parametrize("name", NOBODY)
def test_what_no_architecture_computes_is_refused_by_name(model_pth, tmp_path, name):
    config, texts = NOBODY[name]
    refused(model_pth(config), tmp_path / "out", "no architecture", *texts)


def test_nothing_is_left_of_a_run_that_breaks(model_pth, tmp_path, monkeypatch):
    path = model_pth()
    (path.parent / "tokenizer.json").write_text("{}")

    def fail(error):
        def failing(*_, **__):
            raise error

        return failing

    monkeypatch.setattr(shutil, "copyfile", fail(OSError(28, "No space left on device")))
    refused(path, tmp_path / "out", "No space left", error=OSError)
    monkeypatch.setattr(export_hf_checkpoint, "save_file", fail(SafetensorError("io")))
    refused(path, tmp_path / "out", "disk full", error=OSError)
    monkeypatch.setattr(export_hf_checkpoint, "save_file", fail(ModuleNotFoundError("numpy")))
    refused(path, tmp_path / "out", "pip install -r scripts/requirements.txt")


# The command line.


def test_command_line(model_pth, tmp_path):
    path, out = model_pth(dtype=torch.bfloat16), tmp_path / "some" / "out"

    def run():
        command = [sys.executable, "-m", "scripts.export_hf_checkpoint", "--checkpoint_path", path, "--out_dir", out]
        return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)

    good = run()
    assert good.returncode == 0 and good.stderr == ""
    says = f"wrote {re.escape(str(out))}: LlamaForCausalLM in bfloat16, 21 tensors in 1 file, no tokenizer files\n"
    assert re.fullmatch(says, good.stdout)
    assert len(load_file(out / "model.safetensors")) == 21
    again = run()
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr == f"error: {out} exists and is not an empty folder; give a new one\n"
