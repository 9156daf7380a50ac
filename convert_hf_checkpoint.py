"""A Hugging Face model folder to `model.pth`, written beside its tokenizer.

    python convert_hf_checkpoint.py --checkpoint_dir checkpoints/ORG/NAME

The architectures of the table below, and whatever is published under their names.
Decisions to know:

- What the model computes is read from the folder's config.json and from nothing else. A field that is neither used
  here nor known to be harmless is an error that names it, unless it is switched off: null, false, 0 or empty.
- Weights move by literal tables, Llama's and the rows in which a family differs from it. They must balance: each tensor
  of the files is mapped or dropped on purpose, each parameter is made once. This is settled before any weight is read.
- A head of a query or key rotates as two halves, which is Hugging Face's order; of families that rotate neighbouring
  pairs, and of no others, the rows are permuted.
- Of a multimodal folder the text model is converted; the other towers' tensors are dropped by name, and counted.
- dtypes are kept. Weight files are mapped one at a time, so that memory holds the result and little more.

Copy me: needs torch, safetensors and tqdm, and `model.py`, `fast_model.py`, `quantized_linear.py`, `cpu_kernels.py`,
`tp.py`, `runtime.py` and `checkpoint.py` beside it.
"""

import argparse
import json
import math
import re
import reprlib
import zipfile
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from checkpoint import DAMAGE, FLOATS, check_dtype, check_size, is_state_dict, strip_prefixes, write_checkpoint
from model import GPT, GPTConfig
from runtime import check_target, run_command

# Architecture: model type, and what it says of GPTConfig without a field of config.json.
LEARNED_POSITIONS = {"norm": "layer", "gated": False, "rope_base": None}
ALL_BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
POST_NORM = {"pre_norm": False, "post_norm": True}
PARALLEL = {"norm": "layer", "parallel": True}
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("mistral", {}),
    "Qwen2ForCausalLM": ("qwen2", {"qkv_bias": True}),
    "Qwen3ForCausalLM": ("qwen3", {"qk_norm": True}),
    "MixtralForCausalLM": ("mixtral", {}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {"qk_norm": True}),
    "OlmoeForCausalLM": ("olmoe", {"qk_norm": "all"}),
    "GptOssForCausalLM": (
        "gpt_oss",
        {"sinks": True, "mlp_bias": True, "router_bias": True, "activation": "gelu_sigmoid"},
    ),
    "GemmaForCausalLM": ("gemma", {"norm_plus_one": True}),
    "Gemma3ForCausalLM": ("gemma3_text", {"norm_plus_one": True, "qk_norm": True, "post_norm": True}),
    "GraniteForCausalLM": ("granite", {}),
    "HyperCLOVAXForCausalLM": ("hyperclovax", {}),
    "MinistralForCausalLM": ("ministral", {}),
    "SmolLM3ForCausalLM": ("smollm3", {}),
    "GlmForCausalLM": ("glm", {"o_bias": False}),
    "Glm4ForCausalLM": ("glm4", {"o_bias": False, "post_norm": True}),
    "StableLmForCausalLM": ("stablelm", {"norm": "layer"}),
    "Phi3ForCausalLM": ("phi3", {}),
    "Ernie4_5ForCausalLM": ("ernie4_5", {}),
    "SeedOssForCausalLM": ("seed_oss", {}),
    "OlmoForCausalLM": ("olmo", {"norm": "layer", "norm_eps": 1e-5}),
    "Olmo2ForCausalLM": ("olmo2", POST_NORM | {"qk_norm": "all"}),
    "Olmo3ForCausalLM": ("olmo3", POST_NORM | {"qk_norm": "all"}),
    "Exaone4ForCausalLM": ("exaone4", POST_NORM | {"qk_norm": True}),
    "CohereForCausalLM": ("cohere", PARALLEL),
    "Cohere2ForCausalLM": ("cohere2", PARALLEL),
    "GPTNeoForCausalLM": ("gpt_neo", LEARNED_POSITIONS | {"o_bias": True, "mlp_bias": True, "attention_scale": 1.0}),
    "GPTNeoXForCausalLM": ("gpt_neox", {"norm": "layer", "gated": False, "mlp_bias": True}),
    "PhiForCausalLM": ("phi", PARALLEL | ALL_BIASES | {"gated": False, "head_bias": True}),
    "GPTJForCausalLM": ("gptj", PARALLEL | {"gated": False, "mlp_bias": True, "head_bias": True, "rope_base": 10000.0}),
    "FalconForCausalLM": ("falcon", PARALLEL | {"gated": False}),
    "ArceeForCausalLM": ("arcee", {"gated": False}),
    "HeliumForCausalLM": ("helium", {"o_bias": False}),
    "Starcoder2ForCausalLM": ("starcoder2", {"norm": "layer", "gated": False}),
    "GPT2LMHeadModel": ("gpt2", LEARNED_POSITIONS | ALL_BIASES),
    "GPTBigCodeForCausalLM": ("gpt_bigcode", LEARNED_POSITIONS | ALL_BIASES | {"n_kv_head": 1}),
    "OPTForCausalLM": ("opt", LEARNED_POSITIONS),
}

# Folders of several towers, of which the text model is converted: the architecture, what its text model may be.
MULTIMODAL = {
    "Mistral3ForConditionalGeneration": ("mistral",),
    "Gemma3ForConditionalGeneration": ("gemma3_text",),
}
TOWERS = ("vision_tower.", "multi_modal_projector.")  # the others' tensors
# Their fields in config.json, beside text_config.
TOWER_FIELDS = {"text_config", "vision_config", "image_token_index", "image_token_id", "tie_word_embeddings"}
TOWER_FIELDS |= {"projector_hidden_act", "multimodal_projector_bias", "spatial_merge_size", "vision_feature_layer"}
TOWER_FIELDS |= {"boi_token_index", "eoi_token_index", "mm_tokens_per_image"}

# The fields that are used, with what transformers 5.23 takes for one that config.json does not have.
LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,  # transformers 5: base, type and scaling in one
}
MISTRAL_SIZES = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
QWEN_SIZES = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
LAYER_NORM_DEFAULTS = {name: value for name, value in LLAMA_DEFAULTS.items() if name != "rms_norm_eps"}
FROM_DIM = {name: value for name, value in LAYER_NORM_DEFAULTS.items() if name != "head_dim"}  # dim / n_head always
OLMO2_DEFAULTS = LLAMA_DEFAULTS | {"vocab_size": 50304, "rms_norm_eps": 1e-5, "attention_bias": False}
COHERE_DEFAULTS = FROM_DIM | {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "logit_scale": 0.0625,
}
QWEN_DEFAULTS = LLAMA_DEFAULTS | QWEN_SIZES | {"max_position_embeddings": 32768} | QWEN_WINDOW
GPT2_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
GLM_DEFAULTS = (
    LLAMA_DEFAULTS
    | {"vocab_size": 151552, "intermediate_size": 13696, "num_hidden_layers": 40, "num_key_value_heads": 2}
    | {"head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 0.00000015625}
    | {"attention_bias": True, "partial_rotary_factor": 0.5}
)
DEFAULTS = {
    "llama": LLAMA_DEFAULTS | {"attention_bias": False, "mlp_bias": False},
    "mistral": LLAMA_DEFAULTS | MISTRAL_SIZES | {"sliding_window": 4096},
    "qwen2": QWEN_DEFAULTS,
    "qwen3": QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
    "mixtral": LLAMA_DEFAULTS
    | MISTRAL_SIZES
    | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None}
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": QWEN_DEFAULTS
    | {"hidden_size": 2048, "num_hidden_layers": 24, "num_key_value_heads": 4, "attention_bias": False}
    | {"moe_intermediate_size": 768, "num_local_experts": 128, "num_experts": None, "num_experts_per_tok": 8}
    | {"norm_topk_prob": False},
    "olmoe": {name: value for name, value in OLMO2_DEFAULTS.items() if name != "head_dim"}
    | {"hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16}
    | {"max_position_embeddings": 4096, "num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": False},
    "gpt_oss": LLAMA_DEFAULTS
    | {"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "head_dim": 64}
    | {"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    | {"rope_theta": 150000.0, "attention_bias": True, "num_local_experts": 128, "num_experts": None}
    | {"num_experts_per_tok": 4, "sliding_window": 128, "layer_types": None, "swiglu_limit": 7.0},
    "gemma": LLAMA_DEFAULTS
    | {"vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "head_dim": 256}
    | {"num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 8192}
    | {"tie_word_embeddings": True, "attention_bias": False, "hidden_act": "gelu_pytorch_tanh"},
    "gemma3_text": {name: value for name, value in LLAMA_DEFAULTS.items() if name != "hidden_act"}
    | {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072, "rope_theta": 1e6}
    | {"tie_word_embeddings": True, "attention_bias": False, "hidden_activation": "gelu_pytorch_tanh"}
    | {"query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None, "sliding_window_pattern": 6}
    | {"rope_local_base_freq": 10000.0},
    "granite": LLAMA_DEFAULTS
    | {"attention_bias": False, "mlp_bias": False, "embedding_multiplier": 1.0, "attention_multiplier": 1.0}
    | {"residual_multiplier": 1.0, "logits_scaling": 1.0},
    "hyperclovax": LLAMA_DEFAULTS
    | {"attention_bias": False, "mlp_bias": False, "embedding_multiplier": 1.0, "attention_multiplier": None}
    | {"residual_multiplier": 1.0, "logits_scaling": 1.0, "use_post_norm": True},
    "ministral": LLAMA_DEFAULTS | MISTRAL_SIZES | {"sliding_window": 4096, "layer_types": None},
    "smollm3": LLAMA_DEFAULTS
    | {"vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16}
    | {"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True, "rope_theta": 2e6}
    | {"attention_bias": False, "mlp_bias": False, "no_rope_layers": None, "no_rope_layer_interval": 4}
    | QWEN_WINDOW
    | {"sliding_window": None},
    "glm": GLM_DEFAULTS,
    "glm4": GLM_DEFAULTS,
    "stablelm": FROM_DIM
    | {"vocab_size": 50304, "intermediate_size": 6912, "hidden_size": 2560, "num_key_value_heads": 32}
    | {"max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "use_qkv_bias": False, "partial_rotary_factor": 0.25},
    "phi3": LLAMA_DEFAULTS
    | {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096}
    | {"rms_norm_eps": 1e-5, "sliding_window": None, "partial_rotary_factor": 1.0}
    | {"original_max_position_embeddings": 4096},
    "ernie4_5": LLAMA_DEFAULTS
    | {"vocab_size": 103424, "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 131072}
    | {"num_hidden_layers": 18, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128}
    | {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, "use_bias": False},
    "seed_oss": LLAMA_DEFAULTS
    | {"vocab_size": 155136, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 80}
    | {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288}
    | {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    "olmo": LAYER_NORM_DEFAULTS | {"vocab_size": 50304, "attention_bias": False},
    "olmo2": OLMO2_DEFAULTS,
    "olmo3": {name: value for name, value in OLMO2_DEFAULTS.items() if name != "rope_theta"}
    | {"sliding_window": 4096, "layer_types": None},
    "exaone4": LLAMA_DEFAULTS
    | {"vocab_size": 102400, "intermediate_size": 16384, "num_key_value_heads": 32, "rms_norm_eps": 1e-5}
    | {"sliding_window": 4096, "sliding_window_pattern": 4, "layer_types": None},
    "cohere": COHERE_DEFAULTS | {"head_dim": None, "rope_theta": 500000.0},
    "cohere2": COHERE_DEFAULTS | {"sliding_window": 4096, "sliding_window_pattern": 4, "layer_types": None},
    "gpt_neo": {
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
        "hidden_size": 2048,
        "num_layers": 24,
        "num_heads": 16,
        "intermediate_size": None,
        "attention_types": [[["global", "local"], 12]],
        "window_size": 256,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
        "rope_scaling": None,
        "rope_parameters": None,
    },
    "phi": {name: value for name, value in LAYER_NORM_DEFAULTS.items() if name != "tie_word_embeddings"}
    | {"vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
    | {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "gptj": {
        "vocab_size": 50400,
        "n_positions": 2048,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "n_inner": None,
        "rotary_dim": 64,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    },
    "falcon": {
        "vocab_size": 65024,
        "hidden_size": 4544,
        "ffn_hidden_size": None,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "num_kv_heads": None,
        "new_decoder_architecture": False,
        "num_ln_in_parallel_attn": None,
        "activation": "gelu",
        "bias": False,
        "max_position_embeddings": 2048,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": None,
    },
    "arcee": LLAMA_DEFAULTS
    | {"hidden_size": 2560, "intermediate_size": 18432, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    | {"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False},
    "helium": LLAMA_DEFAULTS
    | {"vocab_size": 48000, "hidden_size": 2560, "intermediate_size": 7040, "max_position_embeddings": 4096}
    | {"num_hidden_layers": 24, "num_attention_heads": 20, "num_key_value_heads": 20, "head_dim": 128}
    | {"rms_norm_eps": 1e-8, "rope_theta": 100000.0, "attention_bias": False, "mlp_bias": False},
    "starcoder2": LAYER_NORM_DEFAULTS
    | {"vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288, "max_position_embeddings": 4096}
    | {"num_hidden_layers": 30, "num_attention_heads": 24, "num_key_value_heads": 2}
    | {"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "tie_word_embeddings": True}
    | {"sliding_window": None, "use_bias": True},
    "gpt2": GPT2_DEFAULTS,
    "gpt_bigcode": GPT2_DEFAULTS | {"activation_function": "gelu_pytorch_tanh"},
    "opt": {
        "vocab_size": 50272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "enable_bias": True,
        "word_embed_proj_dim": None,
        "tie_word_embeddings": True,
    },
}

# GPTConfig's sizes, under their names in config.json.
SIZES = {
    "max_position_embeddings": "block_size",
    "n_positions": "block_size",
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "num_layers": "n_layer",
    "n_layer": "n_layer",
    "num_attention_heads": "n_head",
    "num_heads": "n_head",
    "n_head": "n_head",
    "num_key_value_heads": "n_kv_head",
    "num_kv_heads": "n_kv_head",
    "head_dim": "head_dim",
    "hidden_size": "dim",
    "n_embd": "dim",
    "intermediate_size": "hidden_dim",
    "moe_intermediate_size": "hidden_dim",  # of one expert
    "n_inner": "hidden_dim",
    "ffn_dim": "hidden_dim",
    "ffn_hidden_size": "hidden_dim",
    "num_local_experts": "n_expert",
    "num_experts": "n_expert",  # its older name
    "num_experts_per_tok": "n_expert_used",
}
# Where these are null, or another whose default is, they are worked out from the others.
DERIVED = ("num_key_value_heads", "num_kv_heads", "head_dim", "n_inner", "ffn_hidden_size", "num_experts")
ACTIVATION_NAMES = ("activation_function", "hidden_activation", "hidden_act", "activation")
ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_sigmoid",
    "relu": "relu",
    "relu2": "relu2",
}
# GPTConfig's switches, under their names in config.json; where two make one, the later counts.
SWITCHES = {
    "tie_word_embeddings": ("tie_embeddings",),
    "norm_topk_prob": ("norm_topk_prob",),
    "use_parallel_residual": ("parallel",),
    "use_post_norm": ("post_norm",),
    "attention_bias": ("qkv_bias", "o_bias"),
    "attention_out_bias": ("o_bias",),
    "use_qkv_bias": ("qkv_bias",),
    "mlp_bias": ("mlp_bias",),
    "use_bias": ("qkv_bias", "o_bias", "mlp_bias"),
    "enable_bias": ("qkv_bias", "o_bias", "mlp_bias"),
    "bias": ("qkv_bias", "o_bias", "mlp_bias"),
}
EPSILONS = ("rms_norm_eps", "norm_epsilon", "layer_norm_epsilon", "layer_norm_eps")

# The numbers that a kind of rotary embedding takes besides its base, and those that it can do without.
ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
}
ROPE_OPTIONS = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor"),
}

# Of gpt-oss, if config.json has none.
GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
GPT_OSS_ROPE |= {"original_max_position_embeddings": 4096}

# The models that rotate neighbouring numbers of a head; all others rotate two halves.
PAIRED = ("glm", "glm4", "ernie4_5", "helium", "cohere", "cohere2", "gptj")
# Those whose every fourth layer, or another by sliding_window_pattern, has no window; some do not rotate there.
EVERY_FOURTH_FULL, NOPE_WHERE_FULL = ("olmo3", "exaone4", "cohere2"), ("exaone4", "cohere2")

# GPTConfig's factors, under their names in config.json.
SCALES = {
    "embedding_multiplier": "embed_scale",
    "attention_multiplier": "attention_scale",
    "residual_multiplier": "residual_scale",
    "logit_scale": "logit_scale",
}
GEMMAS = ("gemma", "gemma3_text")  # whose embedding is multiplied by the root of its size
MOST_LAYERS = 10_000

# Fields that have one implemented value, and whose being off would change the model. A family may have more of them.
FIXED = {
    "is_causal": True,
    "partial_rotary_factor": 1,
    "scale_attn_weights": True,
    "multi_query": True,
    "decoder_sparse_step": 1,
    "norm_type": "layer_norm",
    "mlp_type": "default",
    "do_layer_norm_before": True,
    "layer_norm_elementwise_affine": True,
    "hidden_activation": "gelu_pytorch_tanh",  # of Gemma's first files
}
OWN_FIXED = {
    "phi3": {"full_attn_mod": 1, "interpolate_factor": 1},
    "olmo3": {"rope_theta": 500000.0},  # transformers 5 takes another one for full layers alone
    "cohere2": {"layer_switch": 4, "order_of_interleaved_layers": "local_attn_first", "rotary_pct": 1}
    | {"position_embedding_type": "rope_gptj", "use_embedding_sharing": True, "use_gated_activation": True}
    | {"use_parallel_block": True},
    "gptj": {"rotary": True},
    "falcon": {"parallel_attn": True},
    "gpt_oss": {"swiglu_alpha": 1.702},
}

# Fields that say nothing about the logits of a forward pass.
HARMLESS = set(
    """
    architectures model_type transformers_version torch_dtype dtype
    _name_or_path _commit_hash _num_labels _attn_implementation_autoset _flash_attn_2_enabled attn_implementation
    transformers.js_config unsloth_fixed unsloth_version is_llama_config pretraining_tp
    cache_implementation _sliding_window_pattern
    max_sequence_length model_max_length n_ctx n_special predict_special_tokens output_past
    initializer_range init_std dropout layerdrop activation_dropout
    attention_dropout attn_pdrop embd_pdrop resid_pdrop residual_dropout embedding_dropout gradient_checkpointing
    hidden_dropout classifier_dropout
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id tokenizer_class
    attention_softmax_in_fp32 scale_attention_softmax_in_fp32
    use_cache return_dict output_attentions output_hidden_states chunk_size_feed_forward
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    do_sample temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    output_router_logits router_aux_loss_coef
    max_length min_length max_new_tokens num_beams num_beam_groups num_return_sequences early_stopping
    """.split()
)

# More of them, of one model type.
IGNORED = {
    "phi3": {"auto_map"},  # code older than transformers' class
    "phi": {"auto_map"},
    "falcon": {"auto_map", "ff_factor"},  # ffn_hidden_size is read
    "cohere2": {"head_dim"},  # transformers itself works it out
    "hyperclovax": {"auto_map", "end_token_id"},
    # Older names; how the experts are stored shows in the files.
    "gpt_oss": {"experts_per_token", "initial_context_length", "quantization_config"},
    "gpt_neo": {"attention_layers", "embed_dropout", "resid_dropout"},  # attention_types are read
    "gpt_neox": {"rope_theta", "partial_rotary_factor", "is_decoder"},  # rotary_emb_base and rotary_pct are read
    "ernie4_5": {"auto_map"},
    "starcoder2": {"activation_function", "layer_norm_epsilon"},  # hidden_act and norm_epsilon are read instead
    "gpt_bigcode": {"num_key_value_heads", "validate_runner_input", "pad_key_length"},  # multi_query says how many
    "opt": {"prefix"},  # of a text
}

# The weight maps: a module in the files, the modules that its rows become, in this order, and how it is stored.
# What stands after the module's name, weight or bias, stays. The ways of storing are few:
# - transposed: a linear weight is [in, out] in the files.
# - stacked: one tensor [experts, rows, columns], whose name has nothing after it.
# - from row 2: a table of positions begins with two rows that no text uses.
# - pairs: in a head's rows those that rotate together are neighbours, not C/2 apart.
# - nowhere: a norm that has no parameters there has weights of one and biases of zero here.
# - copied: one norm for attention and feed-forward, each of which has a copy here.
# - copied weight: the same for a norm without a bias, which is 0 here; for the last norm too, of which one is made.
# - grouped: for each kv head the rows of its query heads, its key and its value follow one another.
# - alone: a parameter that is no weight or bias of a module; nothing is added to its name.
# - by turns: one tensor [experts, columns, rows], and of biases [experts, rows], in which gate and up take turns. MXFP4
#   has two of [experts, rows, groups, ...] instead, of numbers and of scales.
AS_IS, TRANSPOSED, STACKED, FROM_ROW_2 = "as is", "transposed", "stacked", "from row 2"
NOWHERE, COPIED, COPIED_WEIGHT, GROUPED = "nowhere", "copied", "copied weight", "grouped"
ALONE, BY_TURNS = "alone", "by turns"
# What stands after the name of a tensor of the last kind.
BY_TURNS_ENDS = {"weight": "", "bias": "_bias"}
MXFP4_ENDS = {"weight": "_blocks", "scales": "_scales", "bias": "_bias"}
COPIES = (COPIED, COPIED_WEIGHT)
LLAMA_WEIGHTS = (
    ("model.embed_tokens", ["transformer.wte"], AS_IS),
    ("model.layers.{}.input_layernorm", ["transformer.h.{}.ln_1"], AS_IS),
    ("model.layers.{}.self_attn.q_proj", ["transformer.h.{}.attn.q_proj"], AS_IS),
    ("model.layers.{}.self_attn.k_proj", ["transformer.h.{}.attn.k_proj"], AS_IS),
    ("model.layers.{}.self_attn.v_proj", ["transformer.h.{}.attn.v_proj"], AS_IS),
    ("model.layers.{}.self_attn.o_proj", ["transformer.h.{}.attn.o_proj"], AS_IS),
    ("model.layers.{}.self_attn.q_norm", ["transformer.h.{}.attn.q_norm"], AS_IS),
    ("model.layers.{}.self_attn.k_norm", ["transformer.h.{}.attn.k_norm"], AS_IS),
    ("model.layers.{}.post_attention_layernorm", ["transformer.h.{}.ln_2"], AS_IS),
    ("model.layers.{}.mlp.gate_proj", ["transformer.h.{}.mlp.gate_proj"], AS_IS),
    ("model.layers.{}.mlp.up_proj", ["transformer.h.{}.mlp.up_proj"], AS_IS),
    ("model.layers.{}.mlp.down_proj", ["transformer.h.{}.mlp.down_proj"], AS_IS),
    ("model.norm", ["transformer.ln_f"], AS_IS),
    ("lm_head", ["lm_head"], AS_IS),
)
# What follows are rows that stand in for those of LLAMA_WEIGHTS that make the same parameters.
QKV = ["transformer.h.{}.attn.q_proj", "transformer.h.{}.attn.k_proj", "transformer.h.{}.attn.v_proj"]
PHI3_WEIGHTS = (
    ("model.layers.{}.self_attn.qkv_proj", QKV, AS_IS),
    ("model.layers.{}.mlp.gate_up_proj", ["transformer.h.{}.mlp.gate_proj", "transformer.h.{}.mlp.up_proj"], AS_IS),
)
STARCODER2_WEIGHTS = (
    ("model.layers.{}.mlp.c_fc", ["transformer.h.{}.mlp.up_proj"], AS_IS),
    ("model.layers.{}.mlp.c_proj", ["transformer.h.{}.mlp.down_proj"], AS_IS),
)
OLMO_WEIGHTS = (
    ("transformer.h.{}.ln_1", ["transformer.h.{}.ln_1"], NOWHERE),
    ("transformer.h.{}.ln_2", ["transformer.h.{}.ln_2"], NOWHERE),
    ("transformer.ln_f", ["transformer.ln_f"], NOWHERE),
)
OLMO2_WEIGHTS = (
    ("model.layers.{}.post_attention_layernorm", ["transformer.h.{}.post_attn"], AS_IS),
    ("model.layers.{}.post_feedforward_layernorm", ["transformer.h.{}.post_mlp"], AS_IS),
)
HYPERCLOVAX_WEIGHTS = (
    ("model.layers.{}.post_norm1", ["transformer.h.{}.post_attn"], AS_IS),
    ("model.layers.{}.post_norm2", ["transformer.h.{}.post_mlp"], AS_IS),
)
ONE_NORM = ["transformer.h.{}.ln_1", "transformer.h.{}.ln_2"]
COHERE_WEIGHTS = (
    ("model.layers.{}.input_layernorm", ONE_NORM, COPIED_WEIGHT),
    ("model.norm", ["transformer.ln_f"], COPIED_WEIGHT),
)
# Feed-forwards of experts, * is each; in the files of Mixtral and, in those of Qwen3-MoE, under transformers' names.
MIXTRAL_MLP = (
    ("model.layers.{}.block_sparse_moe.gate", ["transformer.h.{}.mlp.router"], AS_IS),
    ("model.layers.{}.block_sparse_moe.experts.*.w1", ["transformer.h.{}.mlp.experts.*.gate_proj"], AS_IS),
    ("model.layers.{}.block_sparse_moe.experts.*.w3", ["transformer.h.{}.mlp.experts.*.up_proj"], AS_IS),
    ("model.layers.{}.block_sparse_moe.experts.*.w2", ["transformer.h.{}.mlp.experts.*.down_proj"], AS_IS),
)
QWEN3_MOE_MLP = (
    ("model.layers.{}.mlp.gate", ["transformer.h.{}.mlp.router"], AS_IS),
    ("model.layers.{}.mlp.experts.*.gate_proj", ["transformer.h.{}.mlp.experts.*.gate_proj"], AS_IS),
    ("model.layers.{}.mlp.experts.*.up_proj", ["transformer.h.{}.mlp.experts.*.up_proj"], AS_IS),
    ("model.layers.{}.mlp.experts.*.down_proj", ["transformer.h.{}.mlp.experts.*.down_proj"], AS_IS),
)
# The form in which transformers 5 holds both in memory, and writes them with save_original_format=False.
STACKED_MLP = (
    ("model.layers.{}.mlp.gate", ["transformer.h.{}.mlp.router"], AS_IS),
    (
        "model.layers.{}.mlp.experts.gate_up_proj",
        ["transformer.h.{}.mlp.experts.*.gate_proj", "transformer.h.{}.mlp.experts.*.up_proj"],
        STACKED,
    ),
    ("model.layers.{}.mlp.experts.down_proj", ["transformer.h.{}.mlp.experts.*.down_proj"], STACKED),
)
# Gate and up in one matrix.
GLM_WEIGHTS = (
    (
        "model.layers.{}.mlp.gate_up_proj",
        ["transformer.h.{}.mlp.gate_proj", "transformer.h.{}.mlp.up_proj"],
        AS_IS,
    ),
)
GLM4_WEIGHTS = (
    *GLM_WEIGHTS,
    ("model.layers.{}.post_self_attn_layernorm", ["transformer.h.{}.post_attn"], AS_IS),
    ("model.layers.{}.post_mlp_layernorm", ["transformer.h.{}.post_mlp"], AS_IS),
)
GEMMA3_WEIGHTS = (
    ("model.layers.{}.post_attention_layernorm", ["transformer.h.{}.post_attn"], AS_IS),
    ("model.layers.{}.pre_feedforward_layernorm", ["transformer.h.{}.ln_2"], AS_IS),
    ("model.layers.{}.post_feedforward_layernorm", ["transformer.h.{}.post_mlp"], AS_IS),
)
GPT_OSS_WEIGHTS = (
    ("model.layers.{}.self_attn.sinks", ["transformer.h.{}.attn.sinks"], ALONE),
    ("model.layers.{}.mlp.router", ["transformer.h.{}.mlp.router"], AS_IS),
    (
        "model.layers.{}.mlp.experts.gate_up_proj",
        ["transformer.h.{}.mlp.experts.*.gate_proj", "transformer.h.{}.mlp.experts.*.up_proj"],
        BY_TURNS,
    ),
    ("model.layers.{}.mlp.experts.down_proj", ["transformer.h.{}.mlp.experts.*.down_proj"], BY_TURNS),
)
GPT2_WEIGHTS = (
    ("transformer.wte", ["transformer.wte"], AS_IS),
    ("transformer.wpe", ["transformer.wpe"], AS_IS),
    ("transformer.h.{}.ln_1", ["transformer.h.{}.ln_1"], AS_IS),
    ("transformer.h.{}.attn.c_attn", QKV, TRANSPOSED),
    ("transformer.h.{}.attn.c_proj", ["transformer.h.{}.attn.o_proj"], TRANSPOSED),
    ("transformer.h.{}.ln_2", ["transformer.h.{}.ln_2"], AS_IS),
    ("transformer.h.{}.mlp.c_fc", ["transformer.h.{}.mlp.up_proj"], TRANSPOSED),
    ("transformer.h.{}.mlp.c_proj", ["transformer.h.{}.mlp.down_proj"], TRANSPOSED),
    ("transformer.ln_f", ["transformer.ln_f"], AS_IS),
)
GPT_BIGCODE_WEIGHTS = tuple((source, targets, AS_IS) for source, targets, _ in GPT2_WEIGHTS)
OPT_WEIGHTS = (
    ("model.decoder.embed_tokens", ["transformer.wte"], AS_IS),
    ("model.decoder.embed_positions", ["transformer.wpe"], FROM_ROW_2),
    ("model.decoder.layers.{}.self_attn_layer_norm", ["transformer.h.{}.ln_1"], AS_IS),
    ("model.decoder.layers.{}.self_attn.q_proj", ["transformer.h.{}.attn.q_proj"], AS_IS),
    ("model.decoder.layers.{}.self_attn.k_proj", ["transformer.h.{}.attn.k_proj"], AS_IS),
    ("model.decoder.layers.{}.self_attn.v_proj", ["transformer.h.{}.attn.v_proj"], AS_IS),
    ("model.decoder.layers.{}.self_attn.out_proj", ["transformer.h.{}.attn.o_proj"], AS_IS),
    ("model.decoder.layers.{}.final_layer_norm", ["transformer.h.{}.ln_2"], AS_IS),
    ("model.decoder.layers.{}.fc1", ["transformer.h.{}.mlp.up_proj"], AS_IS),
    ("model.decoder.layers.{}.fc2", ["transformer.h.{}.mlp.down_proj"], AS_IS),
    ("model.decoder.final_layer_norm", ["transformer.ln_f"], AS_IS),
)
GPT_NEO_WEIGHTS = (
    ("transformer.wte", ["transformer.wte"], AS_IS),
    ("transformer.wpe", ["transformer.wpe"], AS_IS),
    ("transformer.h.{}.ln_1", ["transformer.h.{}.ln_1"], AS_IS),
    ("transformer.h.{}.attn.attention.q_proj", ["transformer.h.{}.attn.q_proj"], AS_IS),
    ("transformer.h.{}.attn.attention.k_proj", ["transformer.h.{}.attn.k_proj"], AS_IS),
    ("transformer.h.{}.attn.attention.v_proj", ["transformer.h.{}.attn.v_proj"], AS_IS),
    ("transformer.h.{}.attn.attention.out_proj", ["transformer.h.{}.attn.o_proj"], AS_IS),
    ("transformer.h.{}.ln_2", ["transformer.h.{}.ln_2"], AS_IS),
    ("transformer.h.{}.mlp.c_fc", ["transformer.h.{}.mlp.up_proj"], AS_IS),
    ("transformer.h.{}.mlp.c_proj", ["transformer.h.{}.mlp.down_proj"], AS_IS),
    ("transformer.ln_f", ["transformer.ln_f"], AS_IS),
)
GPT_NEOX_WEIGHTS = (
    ("gpt_neox.embed_in", ["transformer.wte"], AS_IS),
    ("gpt_neox.layers.{}.input_layernorm", ["transformer.h.{}.ln_1"], AS_IS),
    ("gpt_neox.layers.{}.attention.query_key_value", QKV, GROUPED),
    ("gpt_neox.layers.{}.attention.dense", ["transformer.h.{}.attn.o_proj"], AS_IS),
    ("gpt_neox.layers.{}.post_attention_layernorm", ["transformer.h.{}.ln_2"], AS_IS),
    ("gpt_neox.layers.{}.mlp.dense_h_to_4h", ["transformer.h.{}.mlp.up_proj"], AS_IS),
    ("gpt_neox.layers.{}.mlp.dense_4h_to_h", ["transformer.h.{}.mlp.down_proj"], AS_IS),
    ("gpt_neox.final_layer_norm", ["transformer.ln_f"], AS_IS),
    ("embed_out", ["lm_head"], AS_IS),
)
PHI_WEIGHTS = (
    ("model.layers.{}.input_layernorm", ONE_NORM, COPIED),
    ("model.layers.{}.self_attn.dense", ["transformer.h.{}.attn.o_proj"], AS_IS),
    ("model.layers.{}.mlp.fc1", ["transformer.h.{}.mlp.up_proj"], AS_IS),
    ("model.layers.{}.mlp.fc2", ["transformer.h.{}.mlp.down_proj"], AS_IS),
    ("model.final_layernorm", ["transformer.ln_f"], AS_IS),
)
GPTJ_WEIGHTS = (
    ("transformer.wte", ["transformer.wte"], AS_IS),
    ("transformer.h.{}.ln_1", ONE_NORM, COPIED),
    ("transformer.h.{}.attn.q_proj", ["transformer.h.{}.attn.q_proj"], AS_IS),
    ("transformer.h.{}.attn.k_proj", ["transformer.h.{}.attn.k_proj"], AS_IS),
    ("transformer.h.{}.attn.v_proj", ["transformer.h.{}.attn.v_proj"], AS_IS),
    ("transformer.h.{}.attn.out_proj", ["transformer.h.{}.attn.o_proj"], AS_IS),
    ("transformer.h.{}.mlp.fc_in", ["transformer.h.{}.mlp.up_proj"], AS_IS),
    ("transformer.h.{}.mlp.fc_out", ["transformer.h.{}.mlp.down_proj"], AS_IS),
    ("transformer.ln_f", ["transformer.ln_f"], AS_IS),
)
FALCON_WEIGHTS = (
    ("transformer.word_embeddings", ["transformer.wte"], AS_IS),
    ("transformer.h.{}.ln_attn", ["transformer.h.{}.ln_1"], AS_IS),
    ("transformer.h.{}.self_attention.query_key_value", QKV, GROUPED),
    ("transformer.h.{}.self_attention.dense", ["transformer.h.{}.attn.o_proj"], AS_IS),
    ("transformer.h.{}.ln_mlp", ["transformer.h.{}.ln_2"], AS_IS),
    ("transformer.h.{}.mlp.dense_h_to_4h", ["transformer.h.{}.mlp.up_proj"], AS_IS),
    ("transformer.h.{}.mlp.dense_4h_to_h", ["transformer.h.{}.mlp.down_proj"], AS_IS),
    ("transformer.ln_f", ["transformer.ln_f"], AS_IS),
)
FALCON_ONE_NORM = (
    *(row for row in FALCON_WEIGHTS if not row[0].endswith(("ln_attn", "ln_mlp"))),
    ("transformer.h.{}.input_layernorm", ONE_NORM, COPIED),
)
OWN_WEIGHTS = {
    "mixtral": MIXTRAL_MLP,
    "qwen3_moe": QWEN3_MOE_MLP,
    "gpt_oss": GPT_OSS_WEIGHTS,
    "olmoe": QWEN3_MOE_MLP,
    "hyperclovax": HYPERCLOVAX_WEIGHTS,
    "phi3": PHI3_WEIGHTS,
    "olmo": OLMO_WEIGHTS,
    "starcoder2": STARCODER2_WEIGHTS,
    "gpt2": GPT2_WEIGHTS,
    "gpt_bigcode": GPT_BIGCODE_WEIGHTS,
    "opt": OPT_WEIGHTS,
    "glm": GLM_WEIGHTS,
    "glm4": GLM4_WEIGHTS,
    "gemma3_text": GEMMA3_WEIGHTS,
    "olmo2": OLMO2_WEIGHTS,
    "olmo3": OLMO2_WEIGHTS,
    "exaone4": OLMO2_WEIGHTS,
    "cohere": COHERE_WEIGHTS,
    "cohere2": COHERE_WEIGHTS,
    "gpt_neo": GPT_NEO_WEIGHTS,
    "gpt_neox": GPT_NEOX_WEIGHTS,
    "phi": PHI_WEIGHTS,
    "gptj": GPTJ_WEIGHTS,
    "falcon": FALCON_WEIGHTS,
    # What differs within a family.
    "stacked experts": STACKED_MLP,
    "falcon of one norm": FALCON_ONE_NORM,
}
# What names begin with; without a row here with "model."
PREFIXES = dict.fromkeys(("gpt2", "gpt_bigcode", "gpt_neo", "gptj", "falcon"), "transformer.") | {
    "gpt_neox": "gpt_neox."
}
HEADS = ("lm_head.", "embed_out.")
# Tensors dropped where the map has no use for them: rotary angles, causal masks, a head that is tied.
DROPPED = {
    "model.": ("model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "lm_head.weight"),
    "transformer.": (
        "transformer.h.{}.attn.bias",
        "transformer.h.{}.attn.masked_bias",
        "transformer.h.{}.attn.attention.bias",
        "transformer.h.{}.attn.attention.masked_bias",
        "lm_head.weight",
    ),
    "gpt_neox.": (
        "gpt_neox.layers.{}.attention.bias",
        "gpt_neox.layers.{}.attention.masked_bias",
        "gpt_neox.layers.{}.attention.rotary_emb.inv_freq",
        "embed_out.weight",
    ),
}


def positive(name: str, value, kind: type):
    """`value`, if it is a number above 0 that float32 has or, for `kind` int, a whole one that int32 has."""
    limit, what = (2**31, "whole number") if kind is int else (torch.finfo(torch.float32).max, "number")
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < limit:
        entry = f"{name} = {reprlib.repr(value)}"
        raise ValueError(f"config.json has {entry}; it must be a {what} above 0 and below {limit}")
    return value


def switch(name: str, value) -> bool:
    if value not in (None, False, True):
        raise ValueError(f"config.json has {name} = {reprlib.repr(value)}; it must be true or false")
    return bool(value)


def refuse_unknown(fields: dict, known, own_fixed=()) -> None:
    """Raises ValueError for a field that would change what the model computes, as far as this file knows."""
    advice = "choose a model without it, or delete the field if the model computes the same without it"
    fixed = FIXED | dict(own_fixed)
    for name, value in fields.items():
        if name in fixed and name not in known:
            if value is not None and value != fixed[name]:
                entry = f"{name} = {reprlib.repr(value)}"
                raise ValueError(f"config.json has {entry}, and only {fixed[name]} is implemented; {advice}")
        elif value and name not in known:
            entry = f"{name if name.isprintable() else reprlib.repr(name)} = {reprlib.repr(value)}"
            raise ValueError(f"config.json has {entry}, which is not implemented; {advice}")


def text_half(config: dict) -> dict:
    """The config of a multimodal folder's text model; of any other folder the config itself.

    Embeddings are tied if the folder's own field says so, which counts more than the text model's.
    """
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if architecture not in list(MULTIMODAL):  # whatever its type
        return config
    refuse_unknown(config, TOWER_FIELDS | HARMLESS)
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"config.json has text_config = {reprlib.repr(text)}; it must be an object")
    kinds = MULTIMODAL[architecture]
    if text.get("model_type") not in kinds:
        entry = f"a text_config of model_type = {reprlib.repr(text.get('model_type'))}"
        raise ValueError(f"config.json has {entry}; implemented in {architecture} is {', '.join(kinds)}")
    if config.get("tie_word_embeddings") is not None:
        text = text | {"tie_word_embeddings": config["tie_word_embeddings"]}
    return text | {"architectures": None}


def model_type_of(config: dict) -> str:
    named, given = config.get("architectures") or [], config.get("model_type")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"config.json has architectures = {reprlib.repr(named)}; it must be a list of names")
    found = ARCHITECTURES.get(named[0], [None])[0] if named else given
    if found not in list(DEFAULTS):  # whatever its type
        what = f"the architecture {named[0]}" if named else f"no architectures, and model_type = {reprlib.repr(given)}"
        raise ValueError(f"config.json has {what}; implemented are {', '.join([*ARCHITECTURES, *MULTIMODAL])}")
    if given not in (None, found):
        entry = f"the architecture {named[0]} but model_type = {reprlib.repr(given)}"
        raise ValueError(f"config.json has {entry}; correct one of them")
    return found


def yarn_of(numbers: dict, rope: dict) -> dict:
    """GPTConfig's rope_scaling; what is left out is as in transformers."""
    names = [name for name in ROPE_OPTIONS["yarn"] if rope.get(name) and name != "truncate"]
    options = {name: positive(name, rope[name], float) for name in names}
    options["truncate"] = switch("truncate", rope.get("truncate", True))
    mscales = [options.pop("mscale", 0), options.pop("mscale_all_dim", 0)]
    mscales = mscales if all(mscales) else [1, 0]
    growths = [1 + 0.1 * mscale * math.log(max(numbers["factor"], 1)) for mscale in mscales]
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": growths[0] / growths[1]}
    return {"rope_type": "yarn"} | numbers | defaults | options


def longrope_of(numbers: dict, rope: dict, context: int) -> dict:
    """GPTConfig's rope_scaling, without the factors for what is beyond the original context."""
    short, original = rope.get("short_factor"), numbers["original_max_position_embeddings"]
    if not isinstance(short, list):
        raise ValueError(f"config.json has short_factor = {reprlib.repr(short)}; it must be a list of numbers")
    factor = positive("factor", rope.get("factor") or context / original, float)
    growth = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return {
        "rope_type": "longrope",
        "short_factor": [float(positive("short_factor", value, float)) for value in short],
        "attention_factor": positive("attention_factor", rope.get("attention_factor") or growth, float),
    }


def local_rope_of(field: dict, model_type: str) -> dict:
    """GPTConfig's rope_base_window, of Gemma 3 and Olmo 3. Those of both kinds of layers may stand in rope_parameters:
    then the ones of full layers alone stay in `field`."""
    if model_type not in ("gemma3_text", "olmo3"):
        return {}
    of_each = field["rope_parameters"]
    local = {"rope_theta": field.get("rope_local_base_freq", OWN_FIXED["olmo3"]["rope_theta"])}
    if of_each is not None:
        if not isinstance(of_each, dict) or not of_each.keys() <= {"full_attention", "sliding_attention"}:
            entry = f"rope_parameters = {reprlib.repr(of_each)}"
            raise ValueError(f"config.json has {entry}; it must have full_attention and sliding_attention")
        field["rope_parameters"] = of_each.get("full_attention")
        given = of_each.get("sliding_attention") or {}
        if not isinstance(given, dict) or given.get("rope_type", "default") != "default":
            raise ValueError(f"config.json has sliding_attention = {reprlib.repr(given)}; it must be of type default")
        refuse_unknown(given, ("rope_theta", "rope_type"))
        local |= given
    return {"rope_base_window": float(positive("rope_theta", local["rope_theta"], float))}


def rope_kind(rope: dict, is_phi3: bool) -> str:
    """The kind of rotary embedding; of Phi-3 there are two, and older names of longrope in its first files."""
    given = [rope[name] for name in ("rope_type", "type") if rope.get(name)] or ["default"]  # "type" is the older name
    kinds = ["longrope" if is_phi3 and kind in ("su", "yarn") else kind for kind in given]
    implemented = ["default", "longrope"] if is_phi3 else [*ROPE_NUMBERS]
    if kinds[0] != kinds[-1] or kinds[0] not in implemented:
        entry = ", ".join(f"{name} = {reprlib.repr(rope[name])}" for name in ("rope_type", "type") if name in rope)
        raise ValueError(f"config.json has the rotary embedding {entry}; implemented are {', '.join(implemented)}")
    return kinds[0]


def rope_of(field: dict, head_dim: int) -> dict:
    """GPTConfig's rope_base, rope_scaling, rotary_dim and block_size, from the fields of either transformers 4 or 5."""
    if field["rope_scaling"] and field["rope_parameters"]:
        raise ValueError("config.json has rope_scaling and rope_parameters; delete the one that does not hold")
    rope = field["rope_scaling"] or field["rope_parameters"] or {}
    if not isinstance(rope, dict):
        entry = reprlib.repr(rope)
        raise ValueError(f"config.json has {entry} as its rope_scaling or rope_parameters; it must be an object")
    context = field["max_position_embeddings"]
    kind = rope_kind(rope, is_phi3="original_max_position_embeddings" in field)
    partial = {name: field[name] for name in ("partial_rotary_factor",) if name in field}
    known = ("rope_theta", "rope_type", "type", *partial, *ROPE_NUMBERS[kind], *ROPE_OPTIONS.get(kind, ()))
    refuse_unknown(rope, known)
    original = field.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings", context)
    rope = {"rope_theta": field["rope_theta"]} | partial | rope | {"original_max_position_embeddings": original}
    numbers = {name: positive(name, rope.get(name), float) for name in ROPE_NUMBERS[kind]}
    scaling = {"rope_type": kind} | numbers if numbers else None
    if kind == "yarn":
        scaling = yarn_of(numbers, rope)
        if original != context:  # which files name, too, that were made for a longer one later
            context = positive("factor * original_max_position_embeddings", int(scaling["factor"] * original), int)
            context = max(context, field["max_position_embeddings"])
    elif kind == "longrope":
        scaling, context = longrope_of(numbers, rope, context), int(min(context, original))
    base = float(positive("rope_theta", rope["rope_theta"], float))
    rotary = head_dim
    if partial:
        factor = positive("partial_rotary_factor", rope["partial_rotary_factor"], float)
        rotary = int(head_dim * min(factor, 1))
        if rotary % 2 or not rotary:
            entry = f"partial_rotary_factor = {factor}, by which {rotary} of {head_dim} numbers of a head rotate"
            raise ValueError(f"config.json has {entry}; it must be an even count above 0")
    of_head = {"rotary_dim": None if rotary == head_dim else rotary}
    return {"rope_base": base, "rope_scaling": scaling, "block_size": context} | of_head


def layer_count(field: dict) -> int:
    """The number of layers of a family in which they differ, and so are listed."""
    name = "num_layers" if "num_layers" in field else "num_hidden_layers"
    if field[name] > MOST_LAYERS:
        raise ValueError(f"config.json has {name} = {field[name]}; layers that differ must be {MOST_LAYERS} at most")
    return field[name]


def nope_layers_of(field: dict) -> tuple:
    """GPTConfig's nope_layers: SmolLM3 has a 0 for each, or every so many."""
    if "no_rope_layers" not in field:
        return ()
    layers, given = layer_count(field), field["no_rope_layers"]
    if given is None:
        interval = positive("no_rope_layer_interval", field["no_rope_layer_interval"], int)
        return tuple(range(interval - 1, layers, interval))
    if not isinstance(given, list) or len(given) < layers or not all(number in (0, 1) for number in given):
        entry = f"no_rope_layers = {reprlib.repr(given)}"
        raise ValueError(f"config.json has {entry}; it must be a list of 0 and 1 for {layers} layers")
    return tuple(layer for layer in range(layers) if not given[layer])


def windows_of(field: dict, model_type: str, nope_layers: tuple) -> dict:
    """GPTConfig's sliding_window, full_layers and nope_layers."""
    layers, of_each = field["num_hidden_layers"], field.get("layer_types") or None
    used = switch("use_sliding_window", field.get("use_sliding_window", True))
    window = field.get("sliding_window") if used else None
    full = range(layers if window is None else 0)
    if window is not None or model_type in ("olmo3", "cohere2"):
        window = positive("sliding_window", window, int)
    if window is not None and model_type in ("qwen2", "qwen3"):  # transformers' Qwen3-MoE has no such field
        first = field["max_window_layers"]
        full = range(min(first if first == 0 else positive("max_window_layers", first, int), layers))
    elif of_each is None and window is not None and model_type in (*EVERY_FOURTH_FULL, "gemma3_text"):
        every = positive("sliding_window_pattern", field.get("sliding_window_pattern", 4), int)
        full = range(every - 1, layer_count(field), every)
    elif of_each is None and window is not None and model_type == "gpt_oss":
        full = range(1, layer_count(field), 2)
    elif window is not None and model_type == "smollm3":
        full = [layer for layer in range(layer_count(field)) if layer not in nope_layers]
    if of_each is not None:  # it counts more; Qwen3-MoE does not have it either, but its cache looks at it
        fits = isinstance(of_each, list) and len(of_each) == layers
        fits = fits and all(kind in ("full_attention", "sliding_attention") for kind in of_each)
        listed = [layer for layer, kind in enumerate(of_each) if kind == "full_attention"] if fits else []
        fits = fits and (window is not None or len(listed) == layers)
        if not fits or (model_type == "qwen3_moe" and listed != list(full)):
            names = ", ".join(
                f"{name} = {reprlib.repr(field[name])}" for name in field if "window" in name or "layer_t" in name
            )
            raise ValueError(f"config.json has {names}, which do not fit; choose a model without layer_types")
        full = listed
    if window is not None and model_type in NOPE_WHERE_FULL:
        nope_layers = tuple(full)
    if len(full) == layers:
        return {"sliding_window": None, "nope_layers": nope_layers}
    if len(full) > 0:
        layer_count(field)
    return {"sliding_window": window, "full_layers": tuple(full), "nope_layers": nope_layers}


def gpt_neo_windows_of(field: dict) -> dict:
    """GPTConfig's sliding_window and full_layers, from [[["global", "local"], how many times], ...]."""
    given, layers, kinds = field["attention_types"], layer_count(field), []
    for part in given if isinstance(given, list) else [None]:
        fits = isinstance(part, list) and len(part) == 2 and isinstance(part[0], list)
        if not fits or not all(kind in ("global", "local") for kind in part[0]):
            entry = f"attention_types = {reprlib.repr(given)}"
            raise ValueError(f"config.json has {entry}; it must be [[[global and local ones], how many times], ...]")
        kinds += part[0] * min(positive("attention_types", part[1], int), layers // max(len(part[0]), 1) + 1)
    if len(kinds) != layers:
        entry = f"attention_types = {reprlib.repr(given)}"
        raise ValueError(f"config.json has {entry}; they must be those of {layers} layers")
    full = tuple(layer for layer, kind in enumerate(kinds) if kind == "global")
    window = positive("window_size", field["window_size"], int)
    return {"sliding_window": window, "full_layers": full} if len(full) < layers else {}


def falcon_norms(config: dict) -> int:
    """How many norms a layer of Falcon has: one in the 7B, one each for attention and feed-forward in the 40B."""
    new, given = switch("new_decoder_architecture", config.get("new_decoder_architecture")), "num_ln_in_parallel_attn"
    norms = (1 + new) if config.get(given) is None else config[given]
    if norms not in ((1, 2) if new else (1,)):
        entry = f"{given} = {reprlib.repr(norms)}"
        raise ValueError(f"config.json has {entry}; it must be 1, or 2 with new_decoder_architecture")
    return norms


def sizes_of(field: dict, model_type: str) -> dict:
    """GPTConfig's sizes."""
    if "new_decoder_architecture" in field and falcon_norms(field) and not field["new_decoder_architecture"]:
        field = field | {"num_kv_heads": 1}
    derived = {*DERIVED, *(name for name, value in DEFAULTS[model_type].items() if value is None)}
    stated = [name for name in SIZES if name in field and (field[name] is not None or name not in derived)]
    sizes = {SIZES[name]: positive(name, field[name], int) for name in stated}
    dim, n_head = sizes["dim"], sizes["n_head"]
    if field.get("word_embed_proj_dim") not in (None, dim):  # opt-350m, which projects to and from its embedding
        entry = f"word_embed_proj_dim = {reprlib.repr(field['word_embed_proj_dim'])}"
        raise ValueError(f"config.json has {entry}, and only hidden_size is implemented; choose a model without it")
    return {"n_kv_head": n_head, "head_dim": dim // n_head, "hidden_dim": 4 * dim} | sizes


def activation_of(field: dict, model_type: str) -> str:
    name = next(name for name in ACTIVATION_NAMES if name in field)
    given = field[name]
    if model_type == "gemma" and given == "gelu":  # its first files meant the other one by it
        given = "gelu_pytorch_tanh"
    if given not in list(ACTIVATIONS):  # whatever its type
        entry = f"{name} = {reprlib.repr(given)}"
        raise ValueError(f"config.json has {entry}; implemented are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[given]


def positions_of(field: dict, model_type: str, head_dim: int) -> dict:
    """What GPTConfig says of rotation and windows."""
    if "rotary_dim" in field:  # GPT-J
        rotary = positive("rotary_dim", field["rotary_dim"], int)
        return {"rotary_dim": None if rotary == head_dim else rotary}
    if "attention_types" in field:
        return gpt_neo_windows_of(field)
    if "rope_parameters" not in field:
        return {}
    field = dict(field)
    if model_type == "olmo3":
        field["rope_theta"] = OWN_FIXED["olmo3"]["rope_theta"]
    if model_type == "gpt_oss" and not (field["rope_scaling"] or field["rope_parameters"]):
        field["rope_scaling"] = GPT_OSS_ROPE
    if "rotary_pct" in field:  # GPT-NeoX
        named = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        field |= {name: positive(theirs, field[theirs], float) for name, theirs in named.items()}
    of_windows = local_rope_of(field, model_type)
    values = rope_of(field, head_dim) | windows_of(field, model_type, nope_layers_of(field))
    return values | (of_windows if values["sliding_window"] else {})


def config_from_hf(config: dict) -> GPTConfig:
    """GPTConfig from the content of a config.json. Raises ValueError, by name, for what is not implemented."""
    config = text_half(config)
    model_type = model_type_of(config)
    defaults = DEFAULTS[model_type]
    known = defaults.keys() | HARMLESS | IGNORED.get(model_type, set())
    refuse_unknown(config, known, OWN_FIXED.get(model_type, {}))
    field = defaults | {name: value for name, value in config.items() if name in defaults}

    sizes = sizes_of(field, model_type)
    values = {"activation": activation_of(field, model_type)}
    for name in EPSILONS:
        if name in field:
            values["norm_eps"] = positive(name, field[name], float)
    for name, ours in SWITCHES.items():
        if name in field:
            values |= dict.fromkeys(ours, switch(name, field[name]))
    for name in SCALES.keys() & field.keys():
        of_heads = max(sizes["head_dim"], 1) ** -0.5
        given = of_heads if field[name] is defaults[name] is None else field[name]  # of HyperCLOVA X
        values[SCALES[name]] = float(positive(name, given, float))
    if "logits_scaling" in field:
        scale = positive("logits_scaling", field["logits_scaling"], float)
        values["logit_scale"] = float(scale if model_type == "hyperclovax" else 1 / scale)
    if "swiglu_limit" in field:
        values["gate_clamp"] = float(positive("swiglu_limit", field["swiglu_limit"], float))
        stored = config.get("quantization_config") or {"quant_method": "mxfp4"}
        if not isinstance(stored, dict) or stored.get("quant_method") != "mxfp4":
            entry = f"quantization_config = {reprlib.repr(stored)}"
            raise ValueError(f"config.json has {entry}; only a quant_method of mxfp4 is implemented")
    if model_type in GEMMAS:
        values["embed_scale"] = float(sizes["dim"] ** 0.5)
    if "query_pre_attn_scalar" in field:
        values["attention_scale"] = positive("query_pre_attn_scalar", field["query_pre_attn_scalar"], float) ** -0.5
    values |= positions_of(field, model_type, sizes["head_dim"])
    implied = dict(ARCHITECTURES.values())[model_type]
    return GPTConfig(**sizes | values | implied)


def read_json(path: Path) -> dict:
    if not path.is_file():
        if path.with_name("adapter_config.json").is_file():
            alone = f"{path.parent} has an adapter alone"
            raise FileNotFoundError(f"{alone}; merge it with its model by peft's merge_and_unload")
        raise FileNotFoundError(f"{path} does not exist; give the folder of a downloaded model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; download it again")
    return content


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights, the best source first. Raises FileNotFoundError if one is missing."""
    sources = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    source = next((directory / name for name in sources if (directory / name).is_file()), None)
    if source is None:
        raise FileNotFoundError(f"{directory} has none of {', '.join(sources)}; download the weights")
    if source.suffix != ".json":
        return [source]
    shards = read_json(source).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{source} has no weight_map from tensors to files; download it again")
    files = [directory / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, but {source.name} names it; download it")
    return files


def open_weights(file: Path):
    """({name: how many numbers}, the function that maps a tensor by its name), of one file. Nothing is read yet."""

    def read(name):
        try:
            return opened.get_tensor(name) if file.suffix == ".safetensors" else opened[name]
        except SafetensorError as error:  # a dtype that torch does not have
            raise ValueError(f"{name} in {file} cannot be read ({error}); choose other weights") from error

    open(file, "rb").close()  # safetensors says of a file that may not be read that there is none
    try:
        if file.suffix == ".safetensors":
            opened = safe_open(file, framework="pt")
            return {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}, read
        # Before torch 1.6 .bin files were no zip archives; those cannot be mapped.
        opened = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except (SafetensorError, *DAMAGE) as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))  # torch's word for a class that is not loaded
        if foreign:
            what = f"holds {foreign[1]}, and only tensors are read"
            raise ValueError(f"{file} {what}; save the weights as tensors, best as model.safetensors") from error
        raise ValueError(f"{file} is not a whole file of weights; download it again") from error
    if not is_state_dict(opened):
        raise ValueError(f"{file} holds something else than named tensors; give a model's state dict")
    return {name: tensor.numel() for name, tensor in opened.items()}, read


def find_tensors(files: list[Path], prefix: str, multimodal: bool) -> tuple[dict, int, Counter]:
    """({name in the weight map: (file, name in the file)}, how many numbers they are, how many tensors each other tower
    of a multimodal folder has).

    Files of a base model lack the prefix, and get it here.
    """
    found, numbers, towers = {}, 0, Counter()
    for file in files:
        sizes, _ = open_weights(file)
        for short, name in strip_prefixes({name: name for name in sizes}).items():
            if multimodal:  # language_model.model. on the Hub, model.language_model. in transformers 5
                short = short.removeprefix("model.").removeprefix("language_model.")
                if short.startswith(TOWERS):
                    towers[short.partition(".")[0]] += 1
                    continue
            numbers += sizes[name] * (2 if name.endswith("_blocks") else 1)  # of MXFP4
            full = short if short.startswith((prefix, *HEADS)) else prefix + short
            if full in found:
                raise ValueError(f"{found[full][0]} has {found[full][1]} and {file} has {name}, the same tensor twice")
            found[full] = file, name
    return found, numbers, towers


def weight_rows(kind: str) -> tuple:
    """The weight map of a model type, or of what differs within it: its own rows, and Llama's for what these do not
    make."""
    own = OWN_WEIGHTS.get(kind, ())
    made = {target for _, targets, _ in own for target in targets}
    return tuple(row for row in LLAMA_WEIGHTS if made.isdisjoint(row[1])) + own


def weight_plan(rows, config: GPTConfig, expected: dict) -> dict:
    """{tensor in the files: (parameters it becomes, how it is stored)}, the map written out for one model."""
    plan, written_out = {}, []
    for source, targets, stored in rows:
        of_experts = [[target.replace("*", str(expert)) for target in targets] for expert in range(config.n_expert)]
        if stored in (STACKED, BY_TURNS):
            written_out.append((source, sum(of_experts, []), stored))
        elif "*" in source:
            written_out += [(source.replace("*", str(i)), made, stored) for i, made in enumerate(of_experts)]
        else:
            written_out.append((source, targets, stored))
    packed = any(name.endswith(".scales") for name in expected)
    for source, targets, stored in written_out:
        for layer in range(config.n_layer if "{}" in source else 1):
            if stored == ALONE:
                plan[source.format(layer)] = [targets[0].format(layer)], stored
                continue
            for kind in ("weight", "scales", "bias"):
                made = [f"{target.format(layer)}.{kind}" for target in targets]
                if not any(name in expected for name in made):
                    continue
                if stored == COPIED_WEIGHT and kind == "bias":
                    plan |= {name: ([name], NOWHERE) for name in made}
                    continue
                end = (MXFP4_ENDS if packed else BY_TURNS_ENDS)[kind] if stored == BY_TURNS else f".{kind}"
                plan[source.format(layer) + ("" if stored == STACKED else end)] = made, stored
    return plan


def head_order(config: GPTConfig, model_type: str) -> list[int]:
    """The numbers of a head in the files, in the order of GPTConfig's, whose partners are half a head apart."""
    C, R = config.head_dim, config.rotary_dim or config.head_dim
    first, second = (range(0, R, 2), range(1, R, 2)) if model_type in PAIRED else (range(R // 2), range(R // 2, R))
    middle = (R + C) // 2
    return [*first, *range(R, middle), *second, *range(middle, C)]


def reordered(tensor, name: str, order: list[int]):
    """Rows of a parameter, those of each head in another order if they are of queries or keys."""
    if order == sorted(order) or not name.rpartition(".")[0].endswith((".q_proj", ".k_proj", ".q_norm", ".k_norm")):
        return tensor
    return tensor.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)


def listing(names: list[str]) -> str:
    return f"({len(names)}): {', '.join(names[:6])}{' ...' * (len(names) > 6)}"


def packed_in_mxfp4(expected: dict, found: dict) -> dict:
    """The parameters of a model whose experts' weights are in MXFP4, if those that are found are."""
    if not any(name.endswith("_blocks") for name in found):
        return expected
    packed = {}
    for name, tensor in expected.items():
        packed[name] = tensor
        if ".experts." in name and name.endswith(".weight"):
            (N, K), module = tensor.shape, name.removesuffix("weight")
            packed[name] = torch.empty(N, K // 2, dtype=torch.uint8, device="meta")
            packed[f"{module}scales"] = torch.empty(N, K // 32, dtype=torch.uint8, device="meta")
    return packed


def check_balance(plan: dict, expected: dict, found: dict, dropped: set, directory: Path) -> None:
    made = Counter(name for targets, _ in plan.values() for name in targets)
    problems = {
        "missing": [name for name, (_, stored) in plan.items() if name not in found and stored != NOWHERE],
        "left over": [name for full, (_, name) in found.items() if full not in plan and full not in dropped],
        "not made exactly once": [name for name in expected | made if made[name] != 1 or name not in expected],
    }
    messages = [f"{what} {listing(names)}" for what, names in problems.items() if names]
    if messages:
        raise ValueError(
            f"the weights in {directory} do not fit config.json, {'; '.join(messages)}; download both again"
        )


def split_rows(tensor, targets: list[str], stored: str, expected: dict, order: list[int], where: str) -> dict:
    """{parameter: its part of `tensor`}, each a copy that holds on to no file; `order` is of `head_order`."""
    check_dtype(tensor, where, FLOATS if expected[targets[0]].is_floating_point() else [expected[targets[0]].dtype])
    rows = [expected[name].shape[0] for name in (targets[:1] if stored in COPIES else targets)]
    shape = [sum(rows), *expected[targets[0]].shape[1:]]
    turned = ""
    if stored == TRANSPOSED and tensor.ndim == 2:
        tensor, turned = tensor.T, " after its transpose"
    elif stored == STACKED and tensor.ndim == 3:
        tensor, turned = tensor.flatten(0, 1), " with its experts one under the other"
    elif stored == BY_TURNS and tensor.ndim in (2, 3, 4):
        if tensor.ndim == 3 and tensor.is_floating_point():
            tensor = tensor.transpose(1, 2)
        if targets[0].rpartition(".")[0].endswith(".gate_proj") and tensor.shape[1] % 2 == 0:
            tensor = tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        tensor, turned = tensor.flatten(0, 1), " with its experts one under the other"
        tensor = tensor.flatten(1) if tensor.ndim > 2 else tensor
    elif stored == FROM_ROW_2 and tensor.ndim == 2:
        tensor, turned = tensor[2:], " without its first two rows"
    if list(tensor.shape) != shape:
        raise ValueError(f"{where} has the shape {list(tensor.shape)}{turned}, where config.json asks for {shape}")
    parts = tensor.split(rows) * (len(targets) if stored in COPIES else 1)
    if stored == GROUPED:
        groups = tensor.unflatten(0, (rows[1] // len(order), -1, len(order)))  # [kv heads, heads of each, C, ...]
        parts = [part.flatten(0, 2) for part in groups.tensor_split((-2, -1), dim=1)]
    parts = [reordered(part, name, order) for name, part in zip(targets, parts, strict=True)]
    return {name: part.clone(memory_format=torch.contiguous_format) for name, part in zip(targets, parts, strict=True)}


def convert(checkpoint_dir) -> Path:
    """Write model.pth into the folder and return its path. Raises FileNotFoundError or ValueError, and writes nothing,
    if the folder is not whole or the model not one that is implemented."""
    directory = Path(checkpoint_dir)
    hf_config = read_json(directory / "config.json")
    text_config = text_half(hf_config)
    config, model_type = config_from_hf(text_config), model_type_of(text_config)
    path = directory / "model.pth"
    check_target(path)
    prefix = PREFIXES.get(model_type, "model.")
    files = weight_files(directory)
    found, numbers, towers = find_tensors(files, prefix, multimodal=text_config is not hf_config)
    check_size(config, numbers, directory)
    kind = model_type
    if model_type == "falcon" and falcon_norms(text_config) == 1:
        kind = "falcon of one norm"
    elif model_type != "gpt_oss" and any(name.endswith(".mlp.experts.gate_up_proj") for name in found):
        kind = "stacked experts"
    with torch.device("meta"):
        expected = packed_in_mxfp4(GPT(config).state_dict(), found)  # names and shapes
    plan = weight_plan(weight_rows(kind), config, expected)
    dropped = {name.format(layer) for name in DROPPED[prefix] for layer in range(config.n_layer)}
    check_balance(plan, expected, found, dropped, directory)

    state_dict, order = {}, head_order(config, model_type)
    mapped = [source for source in plan if source in found]
    with tqdm(total=len(mapped), unit=" tensors", disable=None) as bar:  # None: no bar where there is no terminal
        for file in files:
            _, read = open_weights(file)
            for source in (source for source in mapped if found[source][0] == file):
                targets, stored = plan[source]
                name = found[source][1]
                state_dict |= split_rows(read(name), targets, stored, expected, order, f"{name} in {file}")
                bar.update()
    for head in [f"{name}weight" for name in HEADS if config.tie_embeddings and f"{name}weight" in found]:
        file, name = found[head]
        head = open_weights(file)[1](name)
        check_dtype(head, f"{name} in {file}")
        if not torch.equal(head, state_dict["transformer.wte.weight"]):
            raise ValueError(
                f"{name} in {file} is not the embedding, though config.json ties them; set tie_word_embeddings to false"
            )
    for name in [name for name in expected if name not in state_dict]:  # stored nowhere
        shape, dtype = expected[name].shape, state_dict["transformer.wte.weight"].dtype
        state_dict[name] = torch.full(shape, float(name.endswith(".weight")), dtype=dtype)
    write_checkpoint(path, config, state_dict)
    numbers = sum(tensor.numel() for tensor in state_dict.values())
    dropped = f"{len(found) - len(mapped) + towers.total()} dropped"
    if towers:
        dropped += f" ({', '.join(f'{count} of {tower}' for tower, count in towers.items())})"
    counts = f"{len(mapped)} tensors mapped, {dropped}, {len(state_dict)} made"
    print(f"{counts} ({numbers:,} parameters)")
    if config.block_size < text_config.get("max_position_embeddings", 0):
        given = text_config["max_position_embeddings"]
        print(f"the context is {config.block_size:,} tokens, not {given:,}: longer ones need longrope's other factors")
    return path


def main(args) -> None:
    print(f"wrote {convert(args.checkpoint_dir)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert a Hugging Face model folder to model.pth in that folder.")
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="the folder with config.json and weights")
    run_command(main, parser.parse_args())
