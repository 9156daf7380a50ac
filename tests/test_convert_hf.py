"""convert_hf_checkpoint.py against transformers: small random models of every family, and everything it must refuse.

Each model is saved by transformers itself, converted, and loaded as both twins, which must give transformers' logits
and its greedy tokens. All parameters are random: a bias of zero or a norm of one would hide where it went.
"""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from argparse import Namespace
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import transformers  # noqa: E402
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: E402

import convert_hf_checkpoint as convert_hf  # noqa: E402
from checkpoint import build_model, describe_quantization, quantize_model, read_checkpoint
from model import GPTConfig  # noqa: E402

SCRIPT = Path(convert_hf.__file__)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 500.0}

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 60}
MSCALES = YARN | {"mscale": 0.7, "mscale_all_dim": 2.0}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 80}
LONGROPE |= {"short_factor": [1.0, 1.5, 2.0, 2.5, 7.0], "long_factor": [4.0] * 5}

ROTARY = {
    "vocab_size": 101,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
FULL, SLIDING = "full_attention", "sliding_attention"
SMOLLM3 = {"no_rope_layer_interval": 2, "pad_token_id": None, "use_sliding_window": True, "sliding_window": 7}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.15, "residual_multiplier": 0.6}
GRANITE |= {"logits_scaling": 3.0}
GEMMA3 = {"head_dim": 16, "sliding_window": 7, "layer_types": [SLIDING, FULL], "query_pre_attn_scalar": 9}
GEMMA3 |= {"tie_word_embeddings": False}
OF_EACH = {FULL: YARN | {"beta_fast": 4.0}, SLIDING: {"rope_type": "default", "rope_theta": 300.0}}
YARN_ALONE = {name: value for name, value in YARN.items() if name != "rope_theta"}
OLMO3 = {"hidden_size": 64, "num_hidden_layers": 5, "sliding_window": 7, "rope_parameters": OF_EACH}
EXAONE4 = {"num_hidden_layers": 5, "head_dim": 16, "sliding_window": 7, "rope_parameters": LLAMA3}
COHERE2 = {"num_hidden_layers": 5, "sliding_window": 7, "pad_token_id": 0}
LONG_PHI3 = LONGROPE | {"short_factor": [1.0, 1.5, 2.5], "long_factor": [4.0] * 3, "partial_rotary_factor": 0.6}
LONG_PHI3 = {"rope_parameters": LONG_PHI3, "original_max_position_embeddings": 80, "max_position_embeddings": 160}
OLDER = {"type": "yarn", "short_factor": [1.0, 1.5, 2.0, 2.5, 7.0], "long_factor": [4.0] * 5}
OLDER = {"rope_scaling": OLDER, "original_max_position_embeddings": 80, "max_position_embeddings": 240}
GLM = {"partial_rotary_factor": 0.8, "pad_token_id": None}
GPT2 = {"vocab_size": 101, "n_positions": 96, "n_embd": 40, "n_layer": 2, "n_head": 4}
PAD = {"pad_token_id": 0}  # where the default is not below 101
OPT = {"vocab_size": 101, "hidden_size": 40, "ffn_dim": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"max_position_embeddings": 96}
PARTIAL = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.6}
NEOX = {name: value for name, value in ROTARY.items() if name != "num_key_value_heads"}
OLMOE = {"num_experts": 12, "num_experts_per_tok": 4, "intermediate_size": 24}
GPT_NEO = {"vocab_size": 101, "hidden_size": 40, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 96}
GPT_NEO |= {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 7}
UNTIED_NEO = {"intermediate_size": 24, "tie_word_embeddings": False, "activation_function": "relu"}
GPTJ = GPT2 | {"rotary_dim": 6, "n_embd": 40}
FALCON = {name: value for name, value in NEOX.items() if name != "intermediate_size"} | {"ffn_hidden_size": 56}
FALCON_40B = FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}
EXPERTS = {"num_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "head_dim": 16}
GPT_OSS = {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 7, "swiglu_limit": 0.5}
OSS_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 60}
OSS_YARN |= {"truncate": False, "beta_fast": 2.5}
VISION = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14}
MISTRAL3 = {"vision_config": VISION, "image_token_index": 100, "vision_feature_layer": -1}
TEXT = ROTARY | {"model_type": "mistral", "head_dim": 16, "sliding_window": None}
MULTI = "Gemma3ForConditionalGeneration"
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SIGLIP |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
GEMMA3_4B = {"vision_config": SIGLIP, "image_token_index": 100, "mm_tokens_per_image": 1}
GEMMA3_TEXT = ROTARY | {"model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 16, "sliding_window": 7}
LINEAR_8 = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
MODELS = {
    "llama 3.1": ("Llama", ROTARY | {"head_dim": 16, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama 1": ("Llama", ROTARY | {"num_key_value_heads": None, "rope_parameters": {"rope_theta": 900.0}}),
    "llama biased": ("Llama", ROTARY | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama linear": ("Llama", ROTARY | {"rope_parameters": LINEAR}),
    "llama longrope": ("Llama", ROTARY | {"rope_parameters": LONGROPE, "max_position_embeddings": 160}),
    "qwen2 yarn": ("Qwen2", ROTARY | {"hidden_size": 64, "rope_parameters": YARN | {"beta_fast": 4.0}}),
    "qwen3 yarn": ("Qwen3", ROTARY | {"head_dim": 16, "rope_parameters": MSCALES}),
    "mistral": ("Mistral", ROTARY | {"head_dim": 16, "sliding_window": None}),
    "mistral window": ("Mistral", ROTARY | {"sliding_window": 7}),
    "qwen2": ("Qwen2", ROTARY | {"tie_word_embeddings": True, "sliding_window": 9}),
    "qwen2 window": ("Qwen2", ROTARY | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
    "qwen3 window": ("Qwen3", ROTARY | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "qwen3": ("Qwen3", ROTARY | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 biased": ("Qwen3", ROTARY | {"head_dim": 6, "attention_bias": True}),
    "qwen3 windows": ("Qwen3", ROTARY | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "gemma": ("Gemma", ROTARY | {"head_dim": 16, "tie_word_embeddings": False}),
    "gemma tied": ("Gemma", ROTARY | {"head_dim": 16, "rope_parameters": {"rope_theta": 300.0}}),
    "gemma 3": ("Gemma3", ROTARY | GEMMA3),
    "gemma 3 linear": ("Gemma3", ROTARY | GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "glm4": ("Glm4", ROTARY | {"head_dim": 16, "pad_token_id": None}),
    "granite": ("Granite", ROTARY | GRANITE),
    "granite biased": ("Granite", ROTARY | GRANITE | {"attention_bias": True, "mlp_bias": True}),
    "ministral": ("Ministral", ROTARY | {"head_dim": 16, "sliding_window": 7, "layer_types": [SLIDING, FULL]}),
    "smollm3 untied": (
        "SmolLM3",
        ROTARY | {"no_rope_layers": [0, 1], "pad_token_id": None, "tie_word_embeddings": False},
    ),
    "smollm3 windows": ("SmolLM3", ROTARY | SMOLLM3),
    "glm": ("Glm", ROTARY | {"head_dim": 16, "pad_token_id": None}),
    "glm rotary 0.8": ("Glm", ROTARY | GLM | {"head_dim": 10, "attention_bias": False}),
    "glm rotary 1": ("Glm", ROTARY | {"head_dim": 16, "partial_rotary_factor": 1.0, "pad_token_id": None}),
    "stablelm": ("StableLm", ROTARY | {"hidden_size": 64, "rope_parameters": YARN, "tie_word_embeddings": True}),
    "stablelm biased": ("StableLm", ROTARY | {"partial_rotary_factor": 0.6, "use_qkv_bias": True}),
    "mixtral": ("Mixtral", ROTARY | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral window": ("Mixtral", ROTARY | {"num_local_experts": 3, "sliding_window": 7}),
    "qwen3 moe": ("Qwen3Moe", ROTARY | EXPERTS | {"norm_topk_prob": True}),
    "qwen3 moe unnormalized": ("Qwen3Moe", ROTARY | EXPERTS | {"tie_word_embeddings": True}),
    "qwen3 moe window": ("Qwen3Moe", ROTARY | EXPERTS | {"use_sliding_window": True, "sliding_window": 7}),
    "phi3": ("Phi3", ROTARY | PAD | {"num_key_value_heads": None}),
    "phi3 window": ("Phi3", ROTARY | PAD | {"sliding_window": 7, "tie_word_embeddings": True}),
    "phi3 128k": ("Phi3", ROTARY | PAD | LONG_PHI3 | {"tie_word_embeddings": True}),
    "phi3 yarn": ("Phi3", ROTARY | PAD | OLDER | {"sliding_window": 200}),
    "phi3 partial": ("Phi3", ROTARY | PAD | {"rope_parameters": PARTIAL}),
    "olmo2": ("Olmo2", ROTARY | {"rope_parameters": {"rope_theta": 500.0}}),
    "olmo2 biased": ("Olmo2", ROTARY | {"num_key_value_heads": None, "attention_bias": True}),
    "olmo3": ("Olmo3", ROTARY | {"num_hidden_layers": 5, "sliding_window": 7}),
    "olmo3 yarn": ("Olmo3", ROTARY | OLMO3 | {"rope_parameters": None, "rope_scaling": YARN_ALONE}),
    "olmo3 of two bases": ("Olmo3", ROTARY | OLMO3 | {"layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING]}),
    "exaone 4 32b": ("Exaone4", ROTARY | EXAONE4),
    "exaone 4 of full layers": ("Exaone4", ROTARY | {"sliding_window": None, "layer_types": [FULL] * 2}),
    "cohere": ("Cohere", ROTARY | PAD | {"logit_scale": 0.4}),
    "cohere biased": ("Cohere", ROTARY | PAD | {"attention_bias": True, "tie_word_embeddings": False}),
    "cohere2": ("Cohere2", ROTARY | COHERE2 | {"logit_scale": 0.25}),
    "cohere2 biased": (
        "Cohere2",
        ROTARY | COHERE2 | {"layer_types": [FULL, SLIDING] * 2 + [FULL], "attention_bias": True},
    ),
    "hyperclovax": ("HyperCLOVAX", ROTARY | GRANITE | {"head_dim": 16, "logits_scaling": 0.5}),
    "hyperclovax without post-norm": (
        "HyperCLOVAX",
        ROTARY | {"use_post_norm": False, "logits_scaling": 0.25, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "olmoe": ("Olmoe", ROTARY | OLMOE),
    "olmoe normalized": ("Olmoe", ROTARY | OLMOE | {"norm_topk_prob": True, "num_key_value_heads": None}),
    "gpt neo": ("GPTNeo", GPT_NEO),
    "gpt neo untied": ("GPTNeo", GPT_NEO | {"attention_types": [[["local"], 1], [["global"], 2]]} | UNTIED_NEO),
    "gpt neox": ("GPTNeoX", NEOX | {"rotary_pct": 0.4, "rotary_emb_base": 300}),
    "gpt neox sequential": (
        "GPTNeoX",
        NEOX | {"use_parallel_residual": False, "rotary_pct": 0.6, "hidden_act": "gelu_fast"},
    ),
    "gpt neox tied": ("GPTNeoX", NEOX | {"attention_bias": False, "rotary_pct": 1.0, "tie_word_embeddings": True}),
    "phi": ("Phi", ROTARY | {"num_key_value_heads": None, "partial_rotary_factor": 0.4}),
    "phi grouped": ("Phi", ROTARY | {"rope_parameters": PARTIAL}),
    "gptj": ("GPTJ", GPTJ),
    "gptj full": ("GPTJ", GPTJ | {"rotary_dim": 10, "n_inner": 24, "activation_function": "gelu"}),
    "falcon 7b": ("Falcon", FALCON | {"rope_parameters": {"rope_theta": 300.0}}),
    "falcon 7b biased": ("Falcon", FALCON | {"bias": True, "tie_word_embeddings": False}),
    "falcon 40b": ("Falcon", FALCON_40B),
    "falcon 11b": ("Falcon", FALCON_40B | {"num_ln_in_parallel_attn": 1, "bias": True}),
    "ernie 4.5": ("Ernie4_5", ROTARY | {"head_dim": 6, "use_bias": True, "tie_word_embeddings": False}),
    "ernie 4.5 tied": ("Ernie4_5", ROTARY | {"head_dim": None}),
    "seed oss": ("SeedOss", ROTARY | {"head_dim": 16}),
    "seed oss biases": (
        "SeedOss",
        ROTARY | {"head_dim": 6, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    ),
    "olmo": ("Olmo", ROTARY | {"attention_bias": True, "rope_parameters": {"rope_theta": 500.0}}),
    "olmo tied": ("Olmo", ROTARY | {"num_key_value_heads": None, "tie_word_embeddings": True}),
    "arcee": ("Arcee", ROTARY | {"head_dim": 6, "mlp_bias": True}),
    "arcee tied": ("Arcee", ROTARY | {"attention_bias": True, "tie_word_embeddings": True}),
    "helium": ("Helium", ROTARY | {"head_dim": 10, "attention_bias": True, "mlp_bias": True}),
    "helium tied": ("Helium", ROTARY | {"head_dim": 10, "tie_word_embeddings": True}),
    "starcoder2 gelu": ("Starcoder2", ROTARY | {"tie_word_embeddings": False, "hidden_act": "gelu"}),
    "starcoder2 unbiased": ("Starcoder2", ROTARY | {"sliding_window": 7, "use_bias": False}),
    "gpt bigcode": ("GPTBigCode", GPT2),
    "gpt bigcode untied": ("GPTBigCode", GPT2 | {"n_inner": 24, "tie_word_embeddings": False}),
    "opt": ("OPT", OPT),
    "opt without biases": ("OPT", OPT | {"enable_bias": False, "tie_word_embeddings": False}),
    "mistral 3.1": ("Mistral3", MISTRAL3 | {"text_config": TEXT, "tie_word_embeddings": False}),
    "mistral 3 tied": (
        "Mistral3",
        MISTRAL3 | {"text_config": TEXT | {"sliding_window": 7}, "tie_word_embeddings": True},
    ),
    "gemma 3 multimodal": (MULTI, GEMMA3_4B | {"text_config": GEMMA3_TEXT}),
    "gemma 3 multimodal untied": (
        MULTI,
        GEMMA3_4B | {"text_config": GEMMA3_TEXT | LINEAR_8, "tie_word_embeddings": False},
    ),
    "gpt oss": ("GptOss", ROTARY | GPT_OSS),
    "gpt oss 32": ("GptOss", ROTARY | GPT_OSS | {"hidden_size": 64, "intermediate_size": 32}),
    "gpt oss wide": ("GptOss", ROTARY | GPT_OSS | {"layer_types": [FULL, SLIDING], "rope_parameters": OSS_YARN}),
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied": ("GPT2", GPT2 | {"n_inner": 24, "activation_function": "gelu", "tie_word_embeddings": False}),
}


def config_of(family):
    return getattr(transformers, {"Gemma3": "Gemma3TextConfig", MULTI: "Gemma3Config"}.get(family, f"{family}Config"))


def random_model(family, fields):
    """Transformers' model in float32, all its parameters random."""
    config = config_of(family)(**deepcopy(fields))
    others = {"GPT2": "GPT2LMHeadModel", "Mistral3": "Mistral3ForConditionalGeneration", MULTI: MULTI}
    architecture = others.get(family, f"{family}ForCausalLM")
    config._attn_implementation = "eager"
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            norm = parameter.ndim == 1 and key.endswith("weight")
            parameter.normal_(mean=float(norm), std=0.3)  # larger: float32's own noise nears 1e-4
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(name): (transformers' model in float32, the folder it was saved to), made once. Convert there, no more."""

    @cache
    def save(name):
        torch.manual_seed(len(name))
        model, folder = random_model(*MODELS[name]), tmp_path_factory.mktemp("saved")
        model.save_pretrained(folder)
        return model, folder

    return save


@pytest.fixture
def copy_of(saved, tmp_path):
    """copy_of(name, **fields): a folder of one's own with the model's files, its config.json changed by the fields."""

    def copy(name, **fields):
        folder = tmp_path / "model"
        shutil.copytree(saved(name)[1], folder, ignore=shutil.ignore_patterns("model.pth"))
        edit(folder, **fields)
        return folder

    return copy


def edit(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


def reweigh(folder, change):
    """Rewrite model.safetensors with change(its tensors)."""
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    path.unlink()
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)


def converted(folder):
    return read_checkpoint(convert_hf.convert(folder))


def refused(folder, *texts, error=ValueError):
    with pytest.raises(error) as caught:
        convert_hf.main(Namespace(checkpoint_dir=folder))
    for text in texts:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.iterdir() if path.name.endswith((".pth", ".tmp"))] == []


def same(left, right):
    assert left[0] == right[0]
    assert left[1].keys() == right[1].keys()
    for name, tensor in left[1].items():
        assert tensor.dtype == right[1][name].dtype and torch.equal(tensor, right[1][name]), name


# The promise: what transformers computes.


def greedy(logits_of, ids, steps):
    for _ in range(steps):
        ids = torch.cat([ids, logits_of(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


@torch.no_grad()
def compare(model, config, state_dict, steps=64):
    reference = build_model(config, state_dict, "cpu", torch.float32, reference=True)
    fast = build_model(config, state_dict, "cpu", torch.float32)
    fast.setup_caches(1, 80)
    prompt = torch.randint(101, (1, 8), generator=torch.Generator().manual_seed(7))
    seen = 0

    def fast_step(ids):
        nonlocal seen
        positions = torch.arange(seen, ids.shape[1])[None]
        seen = ids.shape[1]
        return fast(ids[:, positions[0]], positions)

    expected = greedy(lambda ids: model(ids, use_cache=False).logits, prompt, steps)
    assert len(expected[0, 8:].unique()) > steps // 8  # not the same token over and over
    assert torch.equal(greedy(reference, prompt, steps), expected)
    assert torch.equal(greedy(fast_step, prompt, steps), expected)
    logits = model(expected, use_cache=False).logits
    positions = torch.arange(expected.shape[1])[None]
    for twin in (reference(expected), fast(expected), fast(expected, positions)):
        assert (twin - logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_both_twins_are_the_transformers_model(saved, name):
    model, folder = saved(name)
    compare(model, *converted(folder))


@pytest.mark.parametrize("name", ["llama 3.1", "qwen3 biased", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(copy_of, saved, name, dtype):
    folder = copy_of(name)
    reweigh(folder, lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
    model = type(saved(name)[0])(saved(name)[0].config).eval()
    model.load_state_dict({key: tensor.to(dtype).float() for key, tensor in saved(name)[0].state_dict().items()})
    config, state_dict = converted(folder)
    assert {tensor.dtype for tensor in state_dict.values()} == {dtype}
    assert all(tensor.is_contiguous() for tensor in state_dict.values())
    compare(model, config, state_dict, steps=16)


# Every way that a family's config can name a window, and the layers that have it in transformers.
USE = {"use_sliding_window": True, "sliding_window": 7}
WINDOWS = [
    ("Llama", {"sliding_window": 7}, "refused"),
    ("GPT2", {"sliding_window": 7}, "refused"),
    ("Mistral", {"sliding_window": 7}, 7),
    ("Mistral", {"sliding_window": None}, None),
    ("Mistral", {"sliding_window": 7, "layer_types": [FULL] * 2}, "refused"),
    ("Mixtral", {"sliding_window": 7}, 7),
    ("Mixtral", {}, None),
    ("Phi3", {"sliding_window": 7}, 7),
    ("Phi3", {}, None),
    ("Starcoder2", {"sliding_window": 7}, 7),
    ("Starcoder2", {"tie_word_embeddings": False}, None),
    ("Qwen3Moe", USE, 7),
    ("Qwen3Moe", USE | {"max_window_layers": 28}, 7),
    ("Qwen3Moe", USE | {"max_window_layers": 1}, 7),
    ("Qwen3Moe", USE | {"layer_types": [SLIDING] * 2}, 7),
    ("Qwen3Moe", USE | {"layer_types": [FULL] * 2}, "refused"),
    ("Qwen3Moe", USE | {"sliding_window": None}, None),
    ("Qwen3Moe", {"sliding_window": 7, "max_window_layers": 0}, None),
]
for family in ("Olmo3", "Exaone4", "Cohere2"):
    every = {} if family == "Olmo3" else {"sliding_window_pattern": 2}
    WINDOWS += [
        (family, {"sliding_window": 7}, 7),  # two layers of four
        (family, {"sliding_window": 7, "layer_types": [FULL, SLIDING]}, (7, (0,))),
        (family, {"sliding_window": 7, "layer_types": [FULL] * 2}, None),
        (family, {"sliding_window": 7} | every, (7, (1,)) if every else 7),
    ]
for qwen in ("Qwen2", "Qwen3"):
    WINDOWS += [
        (qwen, USE, None),  # from layer 28 on
        (qwen, USE | {"max_window_layers": 0}, 7),
        (qwen, USE | {"max_window_layers": 1}, (7, (0,))),
        (qwen, USE | {"max_window_layers": 2}, None),
        (qwen, USE | {"layer_types": [SLIDING] * 2}, 7),
        (qwen, USE | {"layer_types": [SLIDING, FULL]}, (7, (1,))),
        (qwen, USE | {"layer_types": [FULL] * 2, "max_window_layers": 0}, None),
        (qwen, {"sliding_window": 7, "max_window_layers": 0}, None),
    ]


@pytest.mark.parametrize(("family", "fields", "window"), WINDOWS)
def test_every_window_that_transformers_saves(tmp_path, family, fields, window):
    torch.manual_seed(0)
    shape = {"GPT2": GPT2, "Qwen3Moe": ROTARY | EXPERTS, "Mixtral": ROTARY | {"num_local_experts": 3}}
    model = random_model(family, shape.get(family, ROTARY | PAD) | fields)
    model.save_pretrained(tmp_path)
    if window == "refused":
        return refused(tmp_path, "layer_types" if "layer_types" in fields else "window")
    config, state_dict = converted(tmp_path)
    window, full = window if isinstance(window, tuple) else (window, ())
    assert (config.sliding_window, config.full_layers) == (window, full)
    if family in ("Exaone4", "Cohere2"):  # do not rotate where they see everything
        assert config.nope_layers == (full if window else (0, 1))
        with pytest.raises(AssertionError):
            compare(model, replace(config, nope_layers=() if config.nope_layers else (0,)), state_dict, steps=24)
    compare(model, config, state_dict, steps=24)
    wrong = replace(config, sliding_window=None if window else 7, rope_base_window=None)
    with pytest.raises(AssertionError):  # the text is long enough to see it
        compare(model, wrong, state_dict, steps=24)


def test_norms_that_are_stored_nowhere_are_in_the_dtype_of_the_others(copy_of, capsys):
    folder = copy_of("olmo tied")
    reweigh(folder, lambda tensors: {key: tensor.bfloat16() for key, tensor in tensors.items()})
    _, state_dict = converted(folder)
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.bfloat16}
    assert all(torch.equal(state_dict[f"transformer.ln_f.{kind}"].unique(), torch.tensor([value]))
               for kind, value in (("weight", 1.0), ("bias", 0.0)))  # fmt: skip
    assert "15 tensors mapped, 0 dropped, 25 made" in capsys.readouterr().out


# Where the weights come from.


OLD = {"_use_new_zipfile_serialization": False}  # how torch wrote before 1.6


def as_bin(folder, **options):
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin", **options)
    path.unlink()


def as_bin_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        torch.save(half, folder / f"pytorch_model-{i}.bin")
    index = {"weight_map": {name: f"pytorch_model-{i}.bin" for i, half in enumerate(halves) for name in half}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def as_shards(model, folder, size="20KB"):
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=size)
    assert len(list(folder.glob("model-*.safetensors"))) > 2


FORMS = {
    "shards": lambda model, folder: as_shards(model, folder),
    "bin": lambda model, folder: as_bin(folder),
    "bin before torch 1.6": lambda model, folder: as_bin(folder, **OLD),
    "bin shards": lambda model, folder: as_bin_shards(folder),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama 3.1", "gpt2"])
def test_every_source_gives_the_same_checkpoint(saved, copy_of, name, form):
    model, folder = saved(name)
    other = copy_of(name)
    FORMS[form](model, other)
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    same(converted(folder), converted(other))
    assert {path.name: path.read_bytes() for path in other.iterdir() if path.name != "model.pth"} == before


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe unnormalized"])
def test_stacked_experts_give_the_same_checkpoint(saved, copy_of, name):
    model, folder = saved(name)
    stacked = copy_of(name)
    model.save_pretrained(stacked, save_original_format=False)
    tensors = load_file(stacked / "model.safetensors")
    assert tensors["model.layers.1.mlp.experts.gate_up_proj"].ndim == 3
    expected, state_dict = converted(folder)[1], converted(stacked)[1]
    assert state_dict.keys() == expected.keys()
    assert all(torch.equal(state_dict[name], tensor) for name, tensor in expected.items())
    (stacked / "model.pth").unlink()
    short = "model.layers.1.mlp.experts.down_proj"
    reweigh(stacked, lambda tensors: tensors | {short: tensors[short][:-1]})
    refused(stacked, "1.mlp.experts.down_proj", "with its experts one under the other")


def test_experts_in_mxfp4_stay_so_and_are_exact(copy_of, saved, capsys):
    """The published form of gpt-oss, against transformers' own dequantization of random bytes."""
    folder, random = copy_of("gpt oss 32"), torch.Generator().manual_seed(0)
    model = type(saved("gpt oss 32")[0])(saved("gpt oss 32")[0].config).eval()
    model.load_state_dict(saved("gpt oss 32")[0].state_dict())

    def pack(tensors):
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=random, dtype=torch.uint8)
            scales = torch.randint(122, 125, (experts, rows, columns // 32), generator=random, dtype=torch.uint8)
            with torch.no_grad():
                model.get_parameter(name).copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        return tensors

    reweigh(folder, pack)
    edit(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    config, state_dict = converted(folder)
    assert state_dict["transformer.h.0.mlp.experts.4.up_proj.weight"].dtype == torch.uint8
    assert describe_quantization(state_dict)["mode"] == "mxfp4"
    compare(model, config, state_dict)
    short = "model.layers.1.mlp.experts.down_proj_scales"
    (folder / "model.pth").unlink()
    reweigh(folder, lambda tensors: tensors | {short: tensors[short][:-1]})
    refused(folder, short, "with its experts one under the other")
    gate_up = "model.layers.1.mlp.experts.gate_up_proj_scales"
    reweigh(folder, lambda tensors: tensors | {gate_up: tensors[gate_up][:, 1:]})
    refused(folder, "_proj_scales", "where config.json asks for")
    for wrong in ({"quant_method": "gptq"}, "gptq", ["gptq"], {"gptq": 4}):
        edit(folder, quantization_config=wrong)
        refused(folder, "gptq", "mxfp4")


def test_the_best_source_wins(saved, copy_of):
    folder = copy_of("qwen2")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    (folder / "model.safetensors.index.json").write_text("not read")
    same(converted(saved("qwen2")[1]), converted(folder))


MASKS = ("bias", "masked_bias")
NEOX_MASKS = {"attention.bias": torch.ones(1, 1, 96, 96), "attention.masked_bias": torch.tensor(-1e4)}
NEOX_MASKS |= {"attention.rotary_emb.inv_freq": torch.ones(2)}
NEOX_MASKS = {f"gpt_neox.layers.{i}.{name}": tensor for i in range(2) for name, tensor in NEOX_MASKS.items()}


def masks(tensors):
    """What old GPT-2 repositories carry besides the weights."""
    layers = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 96, 96, dtype=torch.uint8).tril() for i in range(2)}
    return tensors | layers | {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}


def in_memory(name):
    """A multimodal model's tensor as transformers 5 names it, not as it is published."""
    name = name.removeprefix("language_model.").removeprefix("model.")
    if name.startswith("lm_head."):
        return name
    return f"model.{name}" if name.startswith(convert_hf.TOWERS) else f"model.language_model.{name}"


ANGLES = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
DISGUISES = {
    "gpt2 without transformer.": ("gpt2", lambda t: {k.removeprefix("transformer."): v for k, v in masks(t).items()}),
    "gpt2 with masks": ("gpt2", masks),
    "llama without model.": ("llama 3.1", lambda t: {k.removeprefix("model."): v for k, v in t.items()}),
    "compiled": ("gpt2", lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}),
    "distributed": ("llama 3.1", lambda t: {f"module._orig_mod.{k}": v for k, v in t.items()}),
    "rotary angles": ("llama 3.1", lambda t: t | ANGLES),
    "gpt neo with masks": (
        "gpt neo",
        lambda t: t | {f"transformer.h.{i}.attn.attention.{name}": torch.ones(1) for i in range(3) for name in MASKS},
    ),
    "gpt neox with masks": ("gpt neox", lambda t: t | NEOX_MASKS),
    "gpt neox without gpt_neox.": ("gpt neox", lambda t: {k.removeprefix("gpt_neox."): v for k, v in t.items()}),
    "gpt-j with masks": ("gptj", masks),
    "gemma 3 in transformers 5": ("gemma 3 multimodal", lambda t: {in_memory(k): v for k, v in t.items()}),
    "tied head of gpt neox": ("gpt neox tied", lambda t: t | {"embed_out.weight": t["gpt_neox.embed_in.weight"]}),
    "tied head of falcon": ("falcon 7b", lambda t: t | {"lm_head.weight": t["transformer.word_embeddings.weight"]}),
    "opt without model.": ("opt", lambda t: {k.removeprefix("model."): v for k, v in t.items()}),
    "multimodal in transformers 5": ("mistral 3.1", lambda t: {in_memory(k): v for k, v in t.items()}),
    "tied head": ("qwen3", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]}),
    "tied head of gpt2": ("gpt2", lambda t: t | {"lm_head.weight": t["transformer.wte.weight"]}),
}


def test_the_other_towers_are_dropped_and_counted(copy_of, capsys):
    folder = copy_of("mistral 3.1")
    names = load_file(folder / "model.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {"language_model", "vision_tower", "multi_modal_projector"}
    convert_hf.convert(folder)
    vision, projector = (sum(tower in name for name in names) for tower in ("vision_tower", "multi_modal_projector"))
    printed = capsys.readouterr().out
    assert f"21 tensors mapped, {vision + projector} dropped (" in printed and "21 made" in printed
    assert f"{vision} of vision_tower" in printed and f"{projector} of multi_modal_projector" in printed
    reweigh(folder, lambda tensors: tensors | {"audio_tower.weight": torch.ones(3)})
    (folder / "model.pth").unlink()
    refused(folder, "left over (1): audio_tower.weight")


def test_tied_embeddings_are_the_folders_before_the_text_models(saved):
    fields = json.loads((saved("mistral 3.1")[1] / "config.json").read_text())
    for outer, inner, expected in ((True, False, True), (False, True, False), (None, True, True), (None, None, False)):
        text = fields["text_config"] | {"tie_word_embeddings": inner}
        if inner is None:
            del text["tie_word_embeddings"]
        config = convert_hf.config_from_hf(fields | {"tie_word_embeddings": outer, "text_config": text})
        assert config.tie_embeddings == expected


@pytest.mark.parametrize("disguise", DISGUISES)
def test_names_in_disguise(saved, copy_of, disguise):
    name, change = DISGUISES[disguise]
    folder = copy_of(name)
    reweigh(folder, change)
    same(converted(saved(name)[1]), converted(folder))


# What config.json says.

PHI3_128K = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3"},
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [1.08] * 48, "short_factor": [1.05] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32064,
}
GROWTH = {"attention_factor": (1 + math.log(32) / math.log(4096)) ** 0.5}
EXAONE4_32B = {
    "architectures": ["Exaone4ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 361,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 27392,
    "layer_types": [*[SLIDING] * 3, FULL] * 16,
    "max_position_embeddings": 131072,
    "model_type": "exaone4",
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"rope_type": "llama3", "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
    | {"original_max_position_embeddings": 8192},
    "rope_theta": 1000000,
    "sliding_window": 4096,
    "sliding_window_pattern": "LLLG",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 102400,
}
FALCON_7B = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig", "AutoModel": "modeling_falcon.FalconModel"},
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "hidden_size": 4544,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 65024,
}
GEMMA3_4B_IT = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model", "patch_size": 14},
}
REAL = {  # as published, with one thing to find in the result
    "mixtral 8x7b": (
        {
            "architectures": ["MixtralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mixtral",
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.36.0.dev0",
            "use_cache": True,
            "vocab_size": 32000,
        },
        {"n_expert": 8, "n_expert_used": 2, "hidden_dim": 14336, "sliding_window": None},
    ),
    "qwen3 30b a3b": (
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "decoder_sparse_step": 1,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "output_router_logits": False,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"n_expert": 128, "n_expert_used": 8, "hidden_dim": 768, "norm_topk_prob": True},
    ),
    "llama 3.2": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0",
            "use_cache": True,
            "vocab_size": 128256,
        },
        {"rope_base": 500000.0, "n_kv_head": 8, "tie_embeddings": True},
    ),
    "smollm2": (
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 576,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
            "vocab_size": 49152,
        },
        {"rope_base": 100000.0, "head_dim": 64, "rope_scaling": None},
    ),
    "qwen2.5": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "model_type": "qwen2",
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
        {"sliding_window": None, "qkv_bias": True, "o_bias": False},
    ),
    "phi-3 mini 4k": (
        PHI3_128K | {"max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047},
        {"sliding_window": 2047, "head_dim": 96, "qkv_bias": False},
    ),
    "gpt-oss 20b": (
        {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": 200002,
            "experts_per_token": 4,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2880,
            "initial_context_length": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 2880,
            "layer_types": [SLIDING, FULL] * 12,
            "max_position_embeddings": 131072,
            "model_type": "gpt_oss",
            "num_attention_heads": 64,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "output_router_logits": False,
            "pad_token_id": 199999,
            "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": 201088,
        },
        {"sinks": True, "gate_clamp": 7.0, "full_layers": tuple(range(1, 24, 2)), "block_size": 131072, "n_expert": 32},
    ),
    "ernie 4.5 0.3b": (
        {
            "architectures": ["Ernie4_5ForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 131072,
            "model_type": "ernie4_5",
            "num_attention_heads": 16,
            "num_hidden_layers": 18,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_bias": False,
            "use_cache": False,
            "vocab_size": 103424,
        },
        {"rope_base": 500000.0, "head_dim": 128, "mlp_bias": False, "tie_embeddings": True},
    ),
    "mistral small 3.1": (
        {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "image_token_index": 10,
            "model_type": "mistral3",
            "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu",
            "spatial_merge_size": 2,
            "text_config": {
                "attention_dropout": 0.0,
                "head_dim": 128,
                "hidden_act": "silu",
                "hidden_size": 5120,
                "initializer_range": 0.02,
                "intermediate_size": 32768,
                "max_position_embeddings": 131072,
                "model_type": "mistral",
                "num_attention_heads": 32,
                "num_hidden_layers": 40,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05,
                "rope_theta": 1000000000.0,
                "sliding_window": None,
                "use_cache": True,
                "vocab_size": 131072,
            },
            "torch_dtype": "bfloat16",
            "vision_config": {"head_dim": 64, "hidden_size": 1024, "model_type": "pixtral", "rope_theta": 10000.0},
            "vision_feature_layer": -1,
        },
        {"rope_base": 1e9, "dim": 5120, "head_dim": 128, "tie_embeddings": False, "sliding_window": None},
    ),
    "starcoder2 7b": (
        {
            "activation_function": "gelu",
            "architectures": ["Starcoder2ForCausalLM"],
            "attention_dropout": 0.1,
            "attention_softmax_in_fp32": True,
            "bos_token_id": 0,
            "embedding_dropout": 0.1,
            "eos_token_id": 0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 4608,
            "initializer_range": 0.018042,
            "intermediate_size": 18432,
            "layer_norm_epsilon": 1e-05,
            "max_position_embeddings": 16384,
            "mlp_type": "default",
            "model_type": "starcoder2",
            "norm_epsilon": 1e-05,
            "norm_type": "layer_norm",
            "num_attention_heads": 36,
            "num_hidden_layers": 32,
            "num_key_value_heads": 4,
            "residual_dropout": 0.1,
            "rope_theta": 1000000,
            "scale_attention_softmax_in_fp32": True,
            "scale_attn_weights": True,
            "sliding_window": 4096,
            "torch_dtype": "bfloat16",
            "use_bias": True,
            "use_cache": True,
            "vocab_size": 49152,
        },
        {"activation": "gelu_tanh", "sliding_window": 4096, "rope_base": 1e6, "o_bias": True, "gated": False},
    ),
    "starcoder": (
        {
            "activation_function": "gelu",
            "architectures": ["GPTBigCodeForCausalLM"],
            "attention_softmax_in_fp32": True,
            "attn_pdrop": 0.1,
            "bos_token_id": 0,
            "embd_pdrop": 0.1,
            "eos_token_id": 0,
            "inference_runner": 0,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "max_batch_size": None,
            "max_sequence_length": None,
            "model_type": "gpt_bigcode",
            "multi_query": True,
            "n_embd": 6144,
            "n_head": 48,
            "n_inner": 24576,
            "n_layer": 40,
            "n_positions": 8192,
            "pad_key_length": True,
            "pre_allocate_kv_cache": False,
            "resid_pdrop": 0.1,
            "scale_attention_softmax_in_fp32": True,
            "scale_attn_weights": True,
            "summary_type": "cls_index",
            "torch_dtype": "float32",
            "use_cache": True,
            "validate_runner_input": True,
            "vocab_size": 49152,
        },
        {"n_kv_head": 1, "head_dim": 128, "activation": "gelu", "o_bias": True},
    ),
    "phi-3 mini 128k": (PHI3_128K, {"block_size": 4096, "sliding_window": 262144, "rotary_dim": None}),
    "phi-3 mini 128k, its first file": (
        PHI3_128K | {"rope_scaling": PHI3_128K["rope_scaling"] | {"type": "su"}},
        {"block_size": 4096, "rope_scaling": {"rope_type": "longrope", "short_factor": [1.05] * 48} | GROWTH},
    ),
    "phi-4 mini": (
        PHI3_128K
        | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}
        | {"num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75, "vocab_size": 200064}
        | {"tie_word_embeddings": True},
        {"rotary_dim": 96, "head_dim": 128, "block_size": 4096, "tie_embeddings": True},
    ),
    "olmo 2 7b": (
        {
            "architectures": ["Olmo2ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "eos_token_id": 100257,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "model_type": "olmo2",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "pad_token_id": 100277,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "use_cache": False,
            "vocab_size": 100352,
        },
        {"pre_norm": False, "post_norm": True, "qk_norm": "all", "rope_base": 500000.0},
    ),
    "olmo 3 7b": (
        {
            "architectures": ["Olmo3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "eos_token_id": 100257,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 11008,
            "layer_types": [*[SLIDING] * 3, FULL] * 8,
            "max_position_embeddings": 65536,
            "model_type": "olmo3",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "pad_token_id": 100277,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "attention_factor": 1.2079441541679836,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "yarn",
            },
            "rope_theta": 500000,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": False,
            "vocab_size": 100278,
        },
        {"full_layers": tuple(range(3, 32, 4)), "rope_base_window": 500000.0, "block_size": 65536, "nope_layers": ()},
    ),
    "exaone 4 32b": (
        EXAONE4_32B,
        {"full_layers": tuple(range(3, 64, 4)), "nope_layers": tuple(range(3, 64, 4)), "sliding_window": 4096},
    ),
    "exaone 4 1.2b": (
        EXAONE4_32B
        | {"sliding_window": None, "sliding_window_pattern": None, "layer_types": [FULL] * 30}
        | {"num_hidden_layers": 30, "hidden_size": 2048, "head_dim": 64, "tie_word_embeddings": True},
        {"nope_layers": (), "sliding_window": None, "qk_norm": True, "tie_embeddings": True},
    ),
    "pythia 6.9b": (
        {
            "architectures": ["GPTNeoXForCausalLM"],
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_act": "gelu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 16384,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048,
            "model_type": "gpt_neox",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_cache": True,
            "use_parallel_residual": True,
            "vocab_size": 50432,
        },
        {"rotary_dim": 32, "parallel": True, "qkv_bias": True, "mlp_bias": True, "head_bias": False},
    ),
    "gpt-neox 20b": (
        {
            "architectures": ["GPTNeoXForCausalLM"],
            "attention_probs_dropout_prob": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_act": "gelu_fast",
            "hidden_dropout_prob": 0,
            "hidden_size": 6144,
            "initializer_range": 0.02,
            "intermediate_size": 24576,
            "is_decoder": True,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048,
            "model_type": "gpt_neox",
            "num_attention_heads": 64,
            "num_hidden_layers": 44,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_cache": True,
            "vocab_size": 50432,
        },
        {"activation": "gelu_tanh", "rotary_dim": 24, "parallel": True},
    ),
    "phi-2": (
        {
            "architectures": ["PhiForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 50256,
            "embd_pdrop": 0.0,
            "eos_token_id": 50256,
            "hidden_act": "gelu_new",
            "hidden_size": 2560,
            "initializer_range": 0.02,
            "intermediate_size": 10240,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048,
            "model_type": "phi",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "partial_rotary_factor": 0.4,
            "qk_layernorm": False,
            "resid_pdrop": 0.1,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_cache": True,
            "vocab_size": 51200,
        },
        {"rotary_dim": 32, "head_dim": 80, "head_bias": True, "parallel": True, "activation": "gelu_tanh"},
    ),
    "gpt-j 6b": (
        {
            "activation_function": "gelu_new",
            "architectures": ["GPTJForCausalLM"],
            "attn_pdrop": 0.0,
            "bos_token_id": 50256,
            "embd_pdrop": 0.0,
            "eos_token_id": 50256,
            "gradient_checkpointing": False,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "model_type": "gptj",
            "n_embd": 4096,
            "n_head": 16,
            "n_inner": None,
            "n_layer": 28,
            "n_positions": 2048,
            "resid_pdrop": 0.0,
            "rotary": True,
            "rotary_dim": 64,
            "scale_attn_weights": True,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}},
            "tie_word_embeddings": False,
            "tokenizer_class": "GPT2Tokenizer",
            "use_cache": True,
            "vocab_size": 50400,
        },
        {"rotary_dim": 64, "head_dim": 256, "qkv_bias": False, "mlp_bias": True, "head_bias": True, "rope_base": 1e4},
    ),
    "falcon 7b": (
        FALCON_7B,
        {"n_kv_head": 1, "head_dim": 64, "hidden_dim": 18176, "tie_embeddings": True, "qkv_bias": False},
    ),
    "falcon 40b": (
        FALCON_7B
        | {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 128, "hidden_size": 8192},
        {"n_kv_head": 8, "head_dim": 64, "parallel": True},
    ),
    "falcon 2 11b": (
        FALCON_7B
        | {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 32, "hidden_size": 4096}
        | {"ff_factor": 4, "ffn_hidden_size": 16384, "num_ln_in_parallel_attn": 1, "rope_theta": 500042},
        {"n_kv_head": 8, "head_dim": 128, "rope_base": 500042.0},
    ),
    "gpt-neo 1.3b": (
        {
            "activation_function": "gelu_new",
            "architectures": ["GPTNeoForCausalLM"],
            "attention_dropout": 0,
            "attention_layers": ["global", "local"] * 12,
            "attention_types": [[["global", "local"], 12]],
            "bos_token_id": 50256,
            "embed_dropout": 0,
            "eos_token_id": 50256,
            "gradient_checkpointing": False,
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": None,
            "layer_norm_epsilon": 1e-05,
            "max_position_embeddings": 2048,
            "model_type": "gpt_neo",
            "num_heads": 16,
            "num_layers": 24,
            "resid_dropout": 0,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50, "temperature": 0.9}},
            "tokenizer_class": "GPT2Tokenizer",
            "use_cache": True,
            "vocab_size": 50257,
            "window_size": 256,
        },
        {"sliding_window": 256, "full_layers": tuple(range(0, 24, 2)), "attention_scale": 1.0, "hidden_dim": 8192},
    ),
    "olmoe 1b 7b": (
        {
            "architectures": ["OlmoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "clip_qkv": None,
            "eos_token_id": 50279,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 1024,
            "max_position_embeddings": 4096,
            "model_type": "olmoe",
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "output_router_logits": False,
            "pad_token_id": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "router_aux_loss_coef": 0.01,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": 50304,
        },
        {"qk_norm": "all", "n_expert": 64, "n_expert_used": 8, "hidden_dim": 1024, "norm_topk_prob": False},
    ),
    "command r": (
        {
            "architectures": ["CohereForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 5,
            "eos_token_id": 255001,
            "hidden_act": "silu",
            "hidden_size": 8192,
            "initializer_range": 0.02,
            "intermediate_size": 22528,
            "layer_norm_eps": 1e-05,
            "logit_scale": 0.0625,
            "max_position_embeddings": 8192,
            "model_max_length": 131072,
            "model_type": "cohere",
            "num_attention_heads": 64,
            "num_hidden_layers": 40,
            "num_key_value_heads": 64,
            "pad_token_id": 0,
            "rope_theta": 8000000.0,
            "torch_dtype": "float16",
            "use_cache": True,
            "use_qk_norm": False,
            "vocab_size": 256000,
        },
        {"logit_scale": 0.0625, "norm": "layer", "parallel": True, "tie_embeddings": True, "rope_base": 8e6},
    ),
    "command r7b": (
        {
            "architectures": ["Cohere2ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 5,
            "cache_implementation": "hybrid",
            "eos_token_id": 255001,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "layer_norm_eps": 1e-05,
            "layer_switch": 4,
            "logit_scale": 0.25,
            "max_position_embeddings": 8192,
            "model_type": "cohere2",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "order_of_interleaved_layers": "local_attn_first",
            "pad_token_id": 0,
            "position_embedding_type": "rope_gptj",
            "rope_scaling": None,
            "rope_theta": 50000,
            "rotary_pct": 1.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_embedding_sharing": True,
            "use_gated_activation": True,
            "use_parallel_block": True,
            "use_parallel_embedding": False,
            "use_qk_norm": False,
            "vocab_size": 256000,
        },
        {"full_layers": tuple(range(3, 32, 4)), "nope_layers": tuple(range(3, 32, 4)), "logit_scale": 0.25},
    ),
    "gemma 3 4b": (
        GEMMA3_4B_IT,
        {"n_head": 8, "n_kv_head": 4, "head_dim": 256, "vocab_size": 262208, "rope_base_window": 10000.0}
        | {"full_layers": tuple(range(5, 34, 6)), "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
        | {"attention_scale": 256**-0.5, "block_size": 131072, "tie_embeddings": True},
    ),
    "gemma 3 27b": (
        GEMMA3_4B_IT | {"text_config": GEMMA3_4B_IT["text_config"] | {"head_dim": 128, "query_pre_attn_scalar": 168}},
        {"head_dim": 128, "attention_scale": 168**-0.5},
    ),
    "opt 6.7b": (
        {
            "_name_or_path": "facebook/opt-6.7b",
            "_remove_final_layer_norm": False,
            "activation_dropout": 0.0,
            "activation_function": "relu",
            "architectures": ["OPTForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 2,
            "do_layer_norm_before": True,
            "dropout": 0.1,
            "eos_token_id": 2,
            "ffn_dim": 16384,
            "hidden_size": 4096,
            "init_std": 0.02,
            "layerdrop": 0.0,
            "max_position_embeddings": 2048,
            "model_type": "opt",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "pad_token_id": 1,
            "prefix": "</s>",
            "torch_dtype": "float16",
            "use_cache": True,
            "vocab_size": 50272,
            "word_embed_proj_dim": 4096,
        },
        {"activation": "relu", "block_size": 2048, "hidden_dim": 16384, "mlp_bias": True, "tie_embeddings": True},
    ),
    "gpt2": (
        {
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1,
            "bos_token_id": 50256,
            "embd_pdrop": 0.1,
            "eos_token_id": 50256,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": 1600,
            "n_head": 25,
            "n_layer": 48,
            "n_positions": 1024,
            "output_past": True,
            "resid_pdrop": 0.1,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
        {"rope_base": None, "hidden_dim": 6400, "tie_embeddings": True},
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_published_configs(name):
    fields, expected = REAL[name]
    config = convert_hf.config_from_hf(fields)
    assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize("family", sorted({family for family, _ in MODELS.values()} - {"Mistral3", MULTI}))
def test_absent_fields_are_what_transformers_takes(family):
    full = config_of(family)().to_dict()
    assert convert_hf.config_from_hf({"model_type": full["model_type"]}) == convert_hf.config_from_hf(full)


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_transformers_4_spells_rope_differently(saved, copy_of, kind):
    older = {kind if name == "rope_type" else name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    fields = {"rope_parameters": "absent", "rope_theta": 500.0, "rope_scaling": older, "dtype": "absent"}
    folder = copy_of("llama 3.1", **fields, torch_dtype="float32")
    same(converted(saved("llama 3.1")[1]), converted(folder))


def test_the_original_context_is_the_context_if_not_given(saved):
    fields = json.loads((saved("llama 3.1")[1] / "config.json").read_text())
    del fields["rope_parameters"]["original_max_position_embeddings"]
    assert convert_hf.config_from_hf(fields).rope_scaling["original_max_position_embeddings"] == 96


KIND = {"rope_type"}
SCALED = [
    "llama 3.1",
    "llama linear",
    "llama longrope",
    "qwen2 yarn",
    "phi3 128k",
    "olmo3 of two bases",
    "gpt oss wide",
]


@pytest.mark.parametrize("name", SCALED)
def test_scaling_matters_here(saved, name):
    """The twins' test would pass without the scaling, or one of its numbers, if the angles were the same."""
    model, folder = saved(name)
    config, state_dict = converted(folder)
    scaling = config.rope_scaling
    numbers = {
        field: [3.0] * len(scaling[field]) if field == "short_factor" else 3.5 * scaling[field]
        for field in scaling.keys() - KIND - {"truncate"}
    }
    if name == "gpt oss wide":
        numbers["truncate"] = True
    for wrong in (None, *(scaling | {field: number} for field, number in numbers.items())):
        with pytest.raises(AssertionError):
            compare(model, replace(config, rope_scaling=wrong), state_dict, steps=24)


def test_a_context_is_stretched_by_yarn_and_cut_for_longrope(copy_of, capsys):
    assert convert_hf.config_from_hf({"model_type": "qwen2", "rope_scaling": YARN}).block_size == 32768
    fields = {"model_type": "qwen2", "max_position_embeddings": 48, "rope_scaling": YARN}
    assert convert_hf.config_from_hf(fields).block_size == 240
    folder = copy_of("llama longrope")
    assert converted(folder)[0].block_size == 80
    assert "the context is 80 tokens, not 160" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["phi3 128k", "phi3 yarn"])
def test_the_context_of_phi3_is_the_original_one(saved, copy_of, capsys, name):
    """Its config.json has that outside of rope_scaling, and what is inside counts less."""
    folder = copy_of(name)
    inside = json.loads((folder / "config.json").read_text())["rope_parameters"] | {
        "original_max_position_embeddings": 9
    }
    edit(folder, rope_parameters=inside)
    same(converted(saved(name)[1]), converted(folder))
    assert "the context is 80 tokens, not " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["olmo3", "gpt neox", "exaone 4 of full layers", "phi3 partial"])
def test_older_files_have_no_rope_parameters(saved, copy_of, name):
    """What transformers 4 wrote: Olmo 3's base for all layers, GPT-NeoX's fields by its own names and by others."""
    older = {
        "olmo3": {"rope_theta": 500000.0},
        "gpt neox": {"rotary_pct": 0.4, "rotary_emb_base": 300, "rope_theta": 9.0, "partial_rotary_factor": 0.9},
        "exaone 4 of full layers": {"rope_theta": 10000, "sliding_window_pattern": None},
        "phi3 partial": {"rope_theta": 500.0, "partial_rotary_factor": 0.6},
    }
    folder = copy_of(name, rope_parameters="absent", **older[name])
    same(converted(saved(name)[1]), converted(folder))


def test_llama3_scaling_of_an_older_checkpoint_has_no_kind(saved):
    config = converted(saved("llama 3.1")[1])[0]
    older = {name: value for name, value in config.rope_scaling.items() if name != "rope_type"}
    assert replace(config, rope_scaling=older) == config


# Refusals. The model that the fields are added to, the fields, and what the sentence must name.
LLAMA, QWEN, GPT = "llama 3.1", "qwen2", "gpt2"
REFUSED = [
    (LLAMA, {"final_logit_softcapping": 30.0}, ["final_logit_softcapping", "30.0"]),
    (LLAMA, {"attention_multiplier": 0.5}, ["attention_multiplier"]),
    (LLAMA, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantization_config", "gptq"]),
    (LLAMA, {"something_new": "x"}, ["something_new"]),
    (LLAMA, {"sliding_window": 7}, ["sliding_window"]),
    (LLAMA, {"rope_interleaved": True}, ["rope_interleaved"]),
    (LLAMA, {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic"]),
    (LLAMA, {"rope_parameters": YARN | {"truncate": 3}}, ["truncate"]),
    (LLAMA, {"rope_parameters": YARN | {"factor": None}}, ["factor"]),
    (LLAMA, {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}, ["llama_4_scaling_beta"]),
    (LLAMA, {"rope_parameters": LONGROPE | {"short_factor": None}}, ["short_factor"]),
    (LLAMA, {"rope_parameters": LONGROPE | {"short_factor": [0.0] * 8}}, ["short_factor"]),
    (LLAMA, {"rope_parameters": {"rope_type": "default", "type": "mrope"}}, ["mrope"]),
    (LLAMA, {"rope_parameters": LLAMA3 | {"attention_factor": 0.9}}, ["attention_factor"]),
    (LLAMA, {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
    (LLAMA, {"rope_parameters": LLAMA3 | {"factor": None}}, ["factor"]),
    (LLAMA, {"rope_parameters": {"full_attention": LLAMA3}}, ["full_attention"]),
    (LLAMA, {"rope_scaling": {"rope_type": "default"}}, ["rope_scaling", "rope_parameters"]),
    (LLAMA, {"rope_parameters": ["llama3"]}, ["llama3"]),
    (LLAMA, {"partial_rotary_factor": 0.25}, ["partial_rotary_factor"]),
    (LLAMA, {"is_causal": False}, ["is_causal"]),
    (LLAMA, {"hidden_act": "mish"}, ["hidden_act", "mish"]),
    (LLAMA, {"architectures": ["GemmaForCausalLM"]}, ["GemmaForCausalLM"]),
    (LLAMA, {"architectures": ["PhimoeForCausalLM"], "model_type": "phimoe"}, ["PhimoeForCausalLM"]),
    (LLAMA, {"architectures": None, "model_type": "phimoe"}, ["phimoe"]),
    (LLAMA, {"architectures": None, "model_type": "absent"}, ["architectures", "model_type"]),
    (LLAMA, {"architectures": ["Qwen2ForCausalLM"]}, ["Qwen2ForCausalLM", "llama"]),
    (LLAMA, {"num_attention_heads": 0}, ["num_attention_heads", "0"]),
    (LLAMA, {"hidden_size": "40"}, ["hidden_size", "'40'"]),
    (LLAMA, {"hidden_size": None}, ["hidden_size"]),
    (LLAMA, {"rms_norm_eps": None}, ["rms_norm_eps"]),
    ("glm", {"rope_parameters": {"partial_rotary_factor": 0.2}}, ["partial_rotary_factor = 0.2", "3 of 16 numbers"]),
    ("stablelm", {"use_parallel_residual": True}, ["use_parallel_residual"]),
    ("stablelm", {"qk_layernorm": True}, ["qk_layernorm"]),
    ("mistral", {"attention_bias": True}, ["attention_bias"]),
    ("mistral", {"sliding_window": 0}, ["sliding_window"]),
    ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.75}}, ["partial_rotary_factor = 0.75", "7 of 10"]),
    ("phi3", {"rope_parameters": LINEAR}, ["linear", "implemented are default, longrope"]),
    ("phi3", {"full_attn_mod": 2}, ["full_attn_mod = 2"]),
    ("phi3 128k", {"original_max_position_embeddings": "80"}, ["original_max_position_embeddings", "'80'"]),
    ("phi3", {"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, ["short_factor"]),
    (
        "phi3",
        {"rope_parameters": None, "rope_scaling": {"type": "su", "long_factor": [1.5] * 5}},
        ["short_factor = None"],
    ),
    ("qwen2", {"rope_parameters": None, "rope_scaling": {"type": "su"}}, ["su"]),
    ("phi3", {"attention_bias": True}, ["attention_bias"]),
    ("llama 1", {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, ["auto_map"]),
    ("ernie 4.5", {"attention_bias": True}, ["attention_bias"]),
    ("seed oss", {"attention_out_bias": "yes"}, ["attention_out_bias", "yes"]),
    ("seed oss", {"sliding_window": 7}, ["sliding_window"]),
    ("olmo", {"clip_qkv": 8.0}, ["clip_qkv", "8.0"]),
    ("olmo2", {"clip_qkv": 8.0}, ["clip_qkv", "8.0"]),
    ("olmo2", {"sliding_window": 7}, ["sliding_window"]),
    ("olmo3", {"rope_theta": 10000.0}, ["rope_theta = 10000.0", "500000.0"]),
    ("olmo3", {"sliding_window_pattern": 3}, ["sliding_window_pattern"]),
    ("olmo3", {"sliding_window": None, "layer_types": None}, ["sliding_window = None"]),
    ("olmo3 yarn", {"rope_parameters": {SLIDING: YARN}}, ["sliding_attention", "yarn", "of type default"]),
    ("olmo3", {"rope_parameters": YARN}, ["rope_parameters", "yarn", "full_attention and sliding_attention"]),
    ("exaone 4 32b", {"layer_types": None, "sliding_window_pattern": "LLLG"}, ["sliding_window_pattern = 'LLLG'"]),
    ("exaone 4 of full layers", {"layer_types": [FULL, SLIDING]}, ["layer_types", "sliding_window = None"]),
    ("cohere", {"use_qk_norm": True}, ["use_qk_norm"]),
    ("cohere", {"logit_scale": None}, ["logit_scale"]),
    ("cohere2", {"use_qk_norm": True}, ["use_qk_norm"]),
    ("cohere2", {"use_parallel_block": False}, ["use_parallel_block"]),
    ("cohere2", {"position_embedding_type": "rope_neox"}, ["position_embedding_type = 'rope_neox'"]),
    ("cohere2", {"rotary_pct": 0.5}, ["rotary_pct = 0.5"]),
    ("cohere2", {"sliding_window": None, "layer_types": None}, ["sliding_window = None"]),
    ("gpt neox", {"use_parallel_residual": "yes"}, ["use_parallel_residual"]),
    ("gpt neox", {"rope_parameters": None, "rotary_pct": 0}, ["rotary_pct = 0"]),
    ("hyperclovax", {"use_post_norm": "yes"}, ["use_post_norm"]),
    ("olmoe", {"clip_qkv": 8.0}, ["clip_qkv"]),
    ("olmoe", {"head_dim": 16}, ["head_dim"]),
    ("gpt neo", {"attention_types": [["global", "local"], 1]}, ["attention_types"]),
    ("gpt neo", {"attention_types": [[["global", "banded"], 1]]}, ["attention_types", "banded"]),
    ("gpt neo", {"attention_types": [[["global", "local"], 1]]}, ["attention_types", "3 layers"]),
    ("gpt neo", {"attention_types": [[["global"], 10**9]]}, ["attention_types", "3 layers"]),
    ("gpt neo", {"window_size": 0}, ["window_size = 0"]),
    ("phi", {"qk_layernorm": True}, ["qk_layernorm"]),
    ("phi", {"tie_word_embeddings": True}, ["tie_word_embeddings = True"]),
    ("gptj", {"tie_word_embeddings": True}, ["tie_word_embeddings = True"]),
    ("gptj", {"rotary_dim": None}, ["rotary_dim = None"]),
    ("gptj", {"rotary": False}, ["rotary = False"]),
    ("gptj", {"rope_theta": 500.0}, ["rope_theta"]),
    ("falcon 7b", {"alibi": True}, ["alibi"]),
    ("falcon 7b", {"parallel_attn": False}, ["parallel_attn = False"]),
    ("falcon 7b", {"multi_query": False}, ["multi_query = False"]),
    ("falcon 7b", {"num_ln_in_parallel_attn": 2}, ["num_ln_in_parallel_attn = 2", "new_decoder_architecture"]),
    ("falcon 40b", {"num_ln_in_parallel_attn": 3}, ["num_ln_in_parallel_attn = 3"]),
    ("gemma 3 multimodal", {"text_config": GEMMA3_TEXT | {"model_type": "mistral"}}, ["mistral", "gemma3_text"]),
    ("gemma 3 multimodal", {"text_config": GEMMA3_TEXT | {"final_logit_softcapping": 30.0}}, ["final_logit_softcap"]),
    ("arcee", {"hidden_act": "xielu"}, ["hidden_act", "xielu"]),
    ("helium", {"sliding_window": 7}, ["sliding_window"]),
    ("mistral 3.1", {"text_config": TEXT | {"model_type": "ministral3"}}, ["ministral3", "mistral"]),
    ("mistral 3.1", {"text_config": TEXT | {"attention_bias": True}}, ["attention_bias"]),
    ("mistral 3.1", {"text_config": None}, ["text_config = None"]),
    ("mistral 3.1", {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config"]),
    ("mistral 3.1", {"audio_config": {"hidden_size": 8}}, ["audio_config"]),
    ("starcoder2 gelu", {"norm_type": "rms_norm"}, ["norm_type", "rms_norm"]),
    ("starcoder2 gelu", {"mlp_type": "gated"}, ["mlp_type", "gated"]),
    ("starcoder2 gelu", {"norm_epsilon": 0}, ["norm_epsilon"]),
    ("gpt bigcode", {"multi_query": False}, ["multi_query"]),
    ("gpt bigcode", {"scale_attn_weights": False}, ["scale_attn_weights"]),
    ("opt", {"do_layer_norm_before": False}, ["do_layer_norm_before"]),
    ("opt", {"word_embed_proj_dim": 32}, ["word_embed_proj_dim", "32"]),
    ("opt", {"layer_norm_elementwise_affine": False}, ["layer_norm_elementwise_affine"]),
    ("opt", {"_remove_final_layer_norm": True}, ["_remove_final_layer_norm"]),
    ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise"]),
    ("qwen3 moe", {"mlp_only_layers": [0]}, ["mlp_only_layers"]),
    ("qwen3 moe", {"decoder_sparse_step": 2}, ["decoder_sparse_step"]),
    ("qwen3 moe", {"shared_expert_intermediate_size": 16}, ["shared_expert_intermediate_size"]),
    (QWEN, {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
    (QWEN, {"layer_types": ["linear_attention"] * 2}, ["layer_types", "linear_attention"]),
    (QWEN, {"layer_types": ["sliding_attention"] * 2}, ["layer_types", "use_sliding_window"]),
    ("smollm3 windows", {"no_rope_layers": [1]}, ["no_rope_layers = [1]"]),
    ("smollm3 windows", {"no_rope_layers": [1, 2]}, ["no_rope_layers = [1, 2]"]),
    ("smollm3 windows", {"num_hidden_layers": 10**9}, ["num_hidden_layers = 1000000000"]),
    ("ministral", {"sliding_window": None}, ["layer_types", "sliding_window = None"]),
    (QWEN, {"layer_types": ["full_attention"] * 3}, ["layer_types"]),
    (LLAMA, {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 10**400}}, ["original_max"]),
    (GPT, {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
    (GPT, {"reorder_and_upcast_attn": True}, ["reorder_and_upcast_attn"]),
    (GPT, {"scale_attn_weights": False}, ["scale_attn_weights"]),
    (GPT, {"add_cross_attention": True}, ["add_cross_attention"]),
    (GPT, {"activation_function": "mish"}, ["activation_function", "mish"]),
    (GPT, {"n_inner": -1}, ["n_inner"]),
]


@pytest.mark.parametrize(("name", "fields", "texts"), REFUSED, ids=lambda value: str(value)[:60])
def test_config_is_refused_by_name(copy_of, name, fields, texts):
    refused(copy_of(name, **fields), "config.json", *texts)


CONTRADICTIONS = [
    (
        "phi3 128k",
        {"rope_parameters": LONGROPE | {"partial_rotary_factor": 0.6}},
        "needs 3 numbers as its short_factor",
    ),
    ("gptj", {"rotary_dim": 12}, "rotary_dim must be even and at most head_dim 10, not 12"),
    ("falcon 40b", {"num_kv_heads": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
]


@pytest.mark.parametrize(("name", "fields", "text"), CONTRADICTIONS)
def test_contradictions_are_refused(copy_of, name, fields, text):
    refused(copy_of(name, **fields), text)


TOO_LARGE = [
    (LLAMA, {"num_hidden_layers": 10**9}, "at least"),
    (LLAMA, {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 4}, "far more"),
    (LLAMA, {"intermediate_size": 10**9}, "at least"),
    ("mixtral", {"num_local_experts": 10**9}, "at least"),
    (GPT, {"n_positions": 10**9}, "at least"),
]


@pytest.mark.parametrize(("name", "fields", "said"), TOO_LARGE)
def test_a_config_of_more_than_the_files_have_is_not_built(copy_of, name, fields, said):
    folder = copy_of(name, **fields)
    refused(folder, f"the weights in {folder}", f"numbers, where its config asks for {said}")


# Values that JSON can have, for every field that is read.
DEEP = json.loads("[" * 500 + "]" * 500)
ODD = [
    "28",
    "",
    "silu\n",
    ["silu"],
    [[1]],
    [],
    {"a": 1},
    {},
    True,
    False,
    None,
    0,
    -1,
    1,
    7,
    1.5,
    10**30,
    10**400,
    1e308,
]
ODD += [float("nan"), float("inf"), 2**31, 1e-320, "x" * 10_000, [{}] * 10_000, DEEP]


@pytest.mark.parametrize("model_type", convert_hf.DEFAULTS)
def test_odd_values_give_a_config_or_one_sentence(model_type):
    def is_answered(fields):
        fields = {"model_type": model_type} | json.loads(json.dumps(fields))
        try:
            assert isinstance(convert_hf.config_from_hf(fields), GPTConfig)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, fields  # 26 architectures

    window = {"use_sliding_window": True} if "use_sliding_window" in convert_hf.DEFAULTS[model_type] else {}
    for value in ODD:
        for name in {*convert_hf.DEFAULTS[model_type], *convert_hf.FIXED, "architectures", "model_type", "new"}:
            is_answered(window | {name: value})
        for scaling in (LLAMA3, YARN, LINEAR, LONGROPE) if "rope_theta" in convert_hf.DEFAULTS[model_type] else ():
            for name in {*scaling, "mscale", "mscale_all_dim", "attention_factor"}:
                is_answered({"rope_parameters": scaling | {name: value}})
                is_answered({"rope_scaling": {"type": scaling["rope_type"]} | scaling | {name: value}})


JSON_FORMS = [
    ({"architectures": {"a": 1}}, "a list of names"),
    ({"architectures": "LlamaForCausalLM"}, "a list of names"),
    ({"architectures": [["LlamaForCausalLM"]]}, "a list of names"),
    ({"model_type": "llama", "architectures": None, "hidden_act": ["silu"]}, "hidden_act = ['silu']"),
    ({"model_type": ["llama"]}, "model_type = ['llama']"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": ["llama3"]}}, "rope_type = ['llama3']"),
    ({"model_type": "llama", "attention_bias": "false"}, "attention_bias = 'false'"),
    ({"model_type": "llama", "num_hidden_layers": 10**30}, "num_hidden_layers = 1000000"),
    ({"model_type": "llama", "rms_norm_eps": float("inf")}, "rms_norm_eps = inf"),
    ({"model_type": "llama", "rope_theta": 10**400}, "rope_theta = 1000"),
    ({"model_type": "qwen2", "layer_types": 1}, "layer_types = 1"),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "28"}, "max_window_layers = '28'"),
    ({"model_type": "qwen2", "use_sliding_window": "true"}, "use_sliding_window = 'true'"),
]


@pytest.mark.parametrize(("fields", "text"), JSON_FORMS)
def test_odd_types_are_named(fields, text):
    with pytest.raises(ValueError) as caught:
        convert_hf.config_from_hf(fields)
    assert text in str(caught.value)


def without(*keys):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in keys}


WPE = "model.decoder.embed_positions.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
OUT_BIAS = "model.layers.1.self_attn.o_proj.bias"
FUSED, FUSED_QKV = "model.layers.1.mlp.gate_up_proj.weight", "transformer.h.1.self_attention.query_key_value.weight"
INPUT, TWO_NORMS = (f"model.layers.1.{name}_layernorm.weight" for name in ("input", "post_attention"))
DOWN, ATTN = "model.layers.1.mlp.down_proj.weight", "transformer.h.1.attn.c_attn.weight"
UNFIT = [
    (LLAMA, without(DOWN), [f"missing (1): {DOWN}"]),
    (LLAMA, lambda t: {k: v for k, v in t.items() if ".1." not in k}, ["missing (9)", "layers.1", "..."]),
    (LLAMA, lambda t: t | {"model.layers.2.mlp.down_proj.weight": t[DOWN]}, ["left over (1): model.layers.2.mlp.down"]),
    (LLAMA, lambda t: t | {"extra.weight": t[DOWN]}, ["left over (1): extra.weight"]),
    (LLAMA, without("lm_head.weight"), ["missing (1): lm_head.weight"]),
    (LLAMA, lambda t: t | {DOWN: t[DOWN].T}, [DOWN, "[56, 40]", "[40, 56]"]),
    (LLAMA, lambda t: t | {f"module.{DOWN}": t[DOWN]}, [DOWN]),
    (QWEN, without("model.layers.0.self_attn.k_proj.bias"), ["missing (1): model.layers.0.self_attn.k_proj.bias"]),
    (QWEN, lambda t: t | {"model.layers.0.self_attn.o_proj.bias": torch.ones(40)}, ["o_proj.bias"]),
    (QWEN, lambda t: t | {"lm_head.weight": torch.ones(101, 40)}, ["lm_head.weight", "tie_word_embeddings"]),
    ("phi3", lambda t: t | {FUSED: t[FUSED][1:]}, [FUSED, "[111, 40]", "[112, 40]"]),
    ("phi3", lambda t: t | {DOWN.replace("down", "up"): t[DOWN].T}, ["left over (1): model.layers.1.mlp.up_proj"]),
    ("opt", lambda t: t | {WPE: t[WPE][2:]}, [WPE, "[94, 40] without its first two rows", "[96, 40]"]),
    ("gpt bigcode", lambda t: t | {ATTN: t[ATTN].T}, [ATTN, "[40, 60]", "[60, 40]"]),
    ("phi", without("lm_head.bias"), ["missing (1): lm_head.bias"]),
    ("phi", lambda t: t | {TWO_NORMS: t[INPUT]}, [f"left over (1): {TWO_NORMS}"]),
    ("cohere", lambda t: t | {INPUT.replace("weight", "bias"): torch.ones(40)}, ["left over (1)", "layernorm.bias"]),
    ("cohere", lambda t: t | {INPUT: torch.ones(80)}, [INPUT, "[80]", "[40]"]),
    ("gpt neox", without("embed_out.weight"), ["missing (1): embed_out.weight"]),
    ("falcon 7b", without("transformer.h.1.input_layernorm.bias"), ["missing (1)", "1.input_layernorm.bias"]),
    ("falcon 40b", lambda t: t | {FUSED_QKV: t[FUSED_QKV][10:]}, [FUSED_QKV, "[70, 40]", "[80, 40]"]),
    ("ernie 4.5", lambda t: t | {QUERY: t[QUERY][:-1]}, [QUERY, "[23, 40]", "[24, 40]"]),
    ("seed oss", lambda t: t | {OUT_BIAS: torch.ones(40)}, [f"left over (1): {OUT_BIAS}"]),
    ("olmo", lambda t: t | {"model.norm.weight": torch.ones(40)}, ["left over (1): model.norm.weight"]),
    (GPT, lambda t: t | {ATTN: t[ATTN].T}, [ATTN, "[40, 120]", "[120, 40]"]),
    (GPT, lambda t: t | {ATTN: t[ATTN][0]}, [ATTN, "[120]"]),
    (GPT, lambda t: t | {"wte.weight": t["transformer.wte.weight"]}, ["wte.weight", "twice"]),
]


@pytest.mark.parametrize(("name", "change", "texts"), UNFIT)
def test_weights_that_do_not_fit_are_named(copy_of, name, change, texts):
    folder = copy_of(name)
    reweigh(folder, change)
    refused(folder, *texts)


def with_numbers(change):
    """The folder's weights as a .bin in which one of them is changed."""

    def damage(folder):
        as_bin(folder)
        tensors = torch.load(folder / "pytorch_model.bin")
        torch.save(tensors | {DOWN: change(tensors[DOWN])}, folder / "pytorch_model.bin")

    return damage


NO_NUMBERS = {  # of bfloat16, float32 and float64 there are models; what the sentence says
    "int8": (lambda t: t.to(torch.int8), "is int8"),
    "bool": (lambda t: t > 0, "is bool"),
    "complex": (lambda t: t.to(torch.complex64), "is complex64"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "is float8_e4m3fn"),
    "meta": (lambda t: t.to("meta"), "is float32 without values (on the device meta)"),
    "coo": (lambda t: t.to_sparse(), "is sparse_coo float32"),
    "csr": (lambda t: t.to_sparse_csr(), "is sparse_csr float32"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "is qint8"),
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), "is nested float32"),
}


@pytest.mark.filterwarnings("ignore")  # torch's, of prototypes
@pytest.mark.parametrize("form", NO_NUMBERS)
def test_tensors_that_are_no_plain_numbers_are_named(copy_of, form):
    change, said = NO_NUMBERS[form]
    folder = copy_of("llama 1")
    with_numbers(change)(folder)
    refused(folder, f"{DOWN} in {folder / 'pytorch_model.bin'} {said}; it must be float32 or bfloat16 or ")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", NO_NUMBERS)
def test_a_checkpoint_with_them_is_refused_too(tiny_checkpoint, tmp_path, form):
    change, said = NO_NUMBERS[form]
    content, name = torch.load(tiny_checkpoint / "model.pth"), "transformer.h.1.mlp.down_proj.weight"
    content["state_dict"][name] = change(content["state_dict"][name])
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError) as caught:
        read_checkpoint(tmp_path / "model.pth")
    assert f"{name} in {tmp_path / 'model.pth'} {said}; it must be float32 or" in str(caught.value)


def test_a_checkpoint_of_too_few_numbers_or_other_integers_is_refused(tiny_checkpoint, tmp_path):
    content, path = torch.load(tiny_checkpoint / "model.pth"), tmp_path / "model.pth"
    config, state_dict = quantize_model(*read_checkpoint(tiny_checkpoint / "model.pth"), "int8", 4)
    name = "transformer.h.1.mlp.down_proj.weight"
    wrong = [
        ({"config": content["config"] | {"n_layer": 10**9}}, "numbers, where its config asks for at least"),
        ({"state_dict": {1: torch.ones(1)}}, "not one of tensors"),
        (
            {"config": vars(config), "state_dict": state_dict | {name: state_dict[name].short()}},
            f"{name} in {path} is int16; it must be int8",
        ),
    ]
    for entries, said in wrong:
        torch.save(content | entries, path)
        with pytest.raises(ValueError) as caught:
            read_checkpoint(path)
        assert said in str(caught.value)


def test_a_tied_head_and_all_weights_are_looked_at(copy_of):
    folder = copy_of("qwen3")
    reweigh(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].to(torch.float8_e4m3fn)})
    refused(folder, "lm_head.weight", "float8_e4m3fn")
    reweigh(folder, lambda t: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in t.items()})
    refused(folder, "embed_tokens.weight", "float8_e4m3fn")


def test_a_dtype_that_torch_does_not_have(copy_of):
    folder = copy_of("llama 1")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    size = 40 * 56 * 6 // 8
    header = json.dumps({DOWN: {"dtype": "F6_E2M3", "shape": [40, 56], "data_offsets": [0, size]}}).encode()
    (folder / "b.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    tensors = load_file(folder / "a.safetensors")
    save_file(without(DOWN)(tensors), folder / "a.safetensors")
    files = dict.fromkeys(tensors, "a.safetensors") | {DOWN: "b.safetensors"}
    (folder / SHARDS).write_text(json.dumps({"weight_map": files}))
    refused(folder, DOWN, "b.safetensors", "F6_E2M3")


def as_arrays(folder, **options):
    as_bin(folder)
    arrays = {name: tensor.numpy() for name, tensor in torch.load(folder / "pytorch_model.bin").items()}
    torch.save(arrays, folder / "pytorch_model.bin", **options)


def rewrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name):
    return lambda folder: os.truncate(folder / name, os.path.getsize(folder / name) - 5)


def shard(number):
    return lambda folder: sorted(folder.glob("*-of-*"))[number]


SHARDS = "model.safetensors.index.json"


def as_adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


DAMAGED = [
    (False, lambda f: (f / "config.json").unlink(), FileNotFoundError, ["config.json"]),
    (False, rewrite("config.json", b'{"a": '), ValueError, ["config.json", "JSON"]),
    (False, rewrite("config.json", b"\xff\xfe\x00"), ValueError, ["config.json", "JSON"]),
    (False, rewrite("config.json", b"[]"), ValueError, ["config.json", "object"]),
    (False, lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, ["pytorch_model.bin"]),
    (False, truncate("model.safetensors"), ValueError, ["model.safetensors"]),
    (False, rewrite("model.safetensors", b"version https://git-lfs"), ValueError, ["model.safetensors"]),
    (False, lambda f: (as_bin(f), truncate("pytorch_model.bin")(f)), ValueError, ["pytorch_model.bin"]),
    (False, lambda f: (as_bin(f, **OLD), truncate("pytorch_model.bin")(f)), ValueError, ["pytorch_model.bin"]),
    (False, lambda f: (as_bin(f, **OLD), os.truncate(f / "pytorch_model.bin", 300)), ValueError, ["pytorch_model.bin"]),
    (False, lambda f: (as_bin(f), rewrite("pytorch_model.bin", b"")(f)), ValueError, ["pytorch_model.bin"]),
    (False, lambda f: (as_bin(f), torch.save([1], f / "pytorch_model.bin")), ValueError, ["named tensors"]),
    (False, as_arrays, ValueError, ["pytorch_model.bin", "numpy", "only tensors"]),
    (False, lambda f: as_arrays(f, **OLD), ValueError, ["pytorch_model.bin", "numpy", "only tensors"]),
    (False, lambda f: (as_bin(f), torch.save({1: torch.ones(1)}, f / "pytorch_model.bin")), ValueError, ["named"]),
    (False, rewrite("config.json", b"[" * 100_000), ValueError, ["config.json", "JSON"]),
    (False, as_adapter, FileNotFoundError, ["has an adapter alone; merge it with its model by peft's"]),
    (True, lambda f: shard(1)(f).unlink(), FileNotFoundError, ["model-00002-of", SHARDS]),
    (True, lambda f: os.truncate(shard(1)(f), 200), ValueError, ["model-00002-of"]),
    (True, lambda f: shutil.copy(shard(0)(f), shard(1)(f)), ValueError, ["model-00001-of", "model-00002-of", "twice"]),
    (True, rewrite(SHARDS, b"{"), ValueError, [SHARDS, "JSON"]),
    (True, rewrite(SHARDS, b"{}"), ValueError, [SHARDS, "weight_map"]),
    (True, rewrite(SHARDS, b"[]"), ValueError, [SHARDS, "object"]),
    (True, rewrite(SHARDS, b'{"weight_map": []}'), ValueError, [SHARDS, "weight_map"]),
    (True, rewrite(SHARDS, b'{"weight_map": {"a": ["b"]}}'), ValueError, [SHARDS, "weight_map"]),
    (True, rewrite(SHARDS, b'{"weight_map": {"a": "a\\u0000b"}}'), FileNotFoundError, [SHARDS, "does not exist"]),
    (True, rewrite(SHARDS, b'{"weight_map": {"a": ""}}'), FileNotFoundError, [SHARDS, "does not exist"]),
    (True, rewrite(SHARDS, b'{"weight_map": {"a": "config.json"}}'), ValueError, ["config.json", "weights"]),
    (True, rewrite(SHARDS, b'{"weight_map": {}}'), ValueError, ["the weights in", "are 0 numbers"]),
]


@pytest.mark.parametrize(("sharded", "damage", "error", "texts"), DAMAGED)
def test_damaged_folders_get_one_sentence(saved, copy_of, sharded, damage, error, texts):
    folder = copy_of("llama 1")
    if sharded:
        as_shards(saved("llama 1")[0], folder)
    damage(folder)
    refused(folder, *texts, error=error)


def test_a_place_that_cannot_be_written_is_told_first(copy_of, monkeypatch):
    folder = copy_of("gpt2")
    (folder / "model.pth").mkdir()
    monkeypatch.setattr(convert_hf, "open_weights", None)
    with pytest.raises(IsADirectoryError, match="model.pth is a folder"):
        convert_hf.convert(folder)


def test_an_unbalanced_weight_map_is_caught(copy_of, monkeypatch):
    folder = copy_of(LLAMA)
    rows = convert_hf.LLAMA_WEIGHTS
    norms = (("model.layers.{}.input_layernorm", ["transformer.h.{}.ln_2"], convert_hf.AS_IS), *rows[2:])
    for wrong in (rows[:-2] + rows[-1:], rows[:1] + norms):
        monkeypatch.setattr(convert_hf, "LLAMA_WEIGHTS", wrong)
        refused(folder, "not made exactly once")


# The command line.


def run(folder):
    command = [sys.executable, str(SCRIPT), "--checkpoint_dir", str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_line(copy_of):
    folder = copy_of("gpt2")
    reweigh(folder, masks)
    good = run(folder)
    assert good.returncode == 0 and good.stderr == ""
    assert "28 tensors mapped, 4 dropped, 36 made" in good.stdout
    assert str(folder / "model.pth") in good.stdout

    edit(folder, scale_attn_weights=False)
    bad = run(folder)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1 and "scale_attn_weights" in bad.stderr


def test_variables_of_a_job_with_several_processes_change_nothing(tmp_path):
    """A machine that starts torchrun may set them for every command."""
    command = [sys.executable, "convert_hf_checkpoint.py", "--checkpoint_dir", tmp_path]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(
        command, cwd=Path(convert_hf.__file__).parent, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_file_of_weights_that_may_not_be_read_is_not_said_to_be_missing(copy_of, monkeypatch):
    def closed(file, mode):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(convert_hf, "open", closed, raising=False)
    with pytest.raises(PermissionError, match="Permission denied.*model.safetensors"):
        convert_hf.open_weights(copy_of("gpt2") / "model.safetensors")
