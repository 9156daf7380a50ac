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
import pickle
import re
import reprlib
import struct
import zipfile
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from checkpoint import check_dtype, check_size, is_state_dict, strip_prefixes, write_checkpoint
from model import GPT, GPTConfig
from runtime import check_target, run_command

# Architecture: model type, and what it says of GPTConfig without a field of config.json.
LEARNED_POSITIONS = {"norm": "layer", "gated": False, "rope_base": None}
GPT2_BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("mistral", {}),
    "Qwen2ForCausalLM": ("qwen2", {"qkv_bias": True}),
    "Qwen3ForCausalLM": ("qwen3", {"qk_norm": True}),
    "MixtralForCausalLM": ("mixtral", {}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {"qk_norm": True}),
    "GemmaForCausalLM": ("gemma", {"norm_plus_one": True}),
    "Gemma3ForCausalLM": ("gemma3_text", {"norm_plus_one": True, "qk_norm": True, "post_norm": True}),
    "GraniteForCausalLM": ("granite", {}),
    "MinistralForCausalLM": ("ministral", {}),
    "SmolLM3ForCausalLM": ("smollm3", {}),
    "GlmForCausalLM": ("glm", {"o_bias": False}),
    "Glm4ForCausalLM": ("glm4", {"o_bias": False, "post_norm": True}),
    "StableLmForCausalLM": ("stablelm", {"norm": "layer"}),
    "Phi3ForCausalLM": ("phi3", {}),
    "Ernie4_5ForCausalLM": ("ernie4_5", {}),
    "SeedOssForCausalLM": ("seed_oss", {}),
    "OlmoForCausalLM": ("olmo", {"norm": "layer", "norm_eps": 1e-5}),
    "ArceeForCausalLM": ("arcee", {"gated": False}),
    "HeliumForCausalLM": ("helium", {"o_bias": False}),
    "Starcoder2ForCausalLM": ("starcoder2", {"norm": "layer", "gated": False}),
    "GPT2LMHeadModel": ("gpt2", LEARNED_POSITIONS | GPT2_BIASES),
    "GPTBigCodeForCausalLM": ("gpt_bigcode", LEARNED_POSITIONS | GPT2_BIASES | {"n_kv_head": 1}),
    "OPTForCausalLM": ("opt", LEARNED_POSITIONS),
}

# Folders of several towers, of which the text model is converted: the architecture, what its text model may be.
MULTIMODAL = {"Mistral3ForConditionalGeneration": ("mistral",)}
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
    "ministral": LLAMA_DEFAULTS | MISTRAL_SIZES | {"sliding_window": 4096, "layer_types": None},
    "smollm3": LLAMA_DEFAULTS
    | {"vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16}
    | {"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True, "rope_theta": 2e6}
    | {"attention_bias": False, "mlp_bias": False, "no_rope_layers": None, "no_rope_layer_interval": 4}
    | QWEN_WINDOW
    | {"sliding_window": None},
    "glm": GLM_DEFAULTS,
    "glm4": GLM_DEFAULTS,
    "stablelm": {name: value for name, value in LLAMA_DEFAULTS.items() if name not in ("rms_norm_eps", "head_dim")}
    | {"vocab_size": 50304, "intermediate_size": 6912, "hidden_size": 2560, "num_key_value_heads": 32}
    | {"max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "use_qkv_bias": False, "partial_rotary_factor": 0.25},
    "phi3": LLAMA_DEFAULTS
    | {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096}
    | {"rms_norm_eps": 1e-5, "sliding_window": None},
    "ernie4_5": LLAMA_DEFAULTS
    | {"vocab_size": 103424, "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 131072}
    | {"num_hidden_layers": 18, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128}
    | {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, "use_bias": False},
    "seed_oss": LLAMA_DEFAULTS
    | {"vocab_size": 155136, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 80}
    | {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288}
    | {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    "olmo": LAYER_NORM_DEFAULTS | {"vocab_size": 50304, "attention_bias": False},
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
    "n_layer": "n_layer",
    "num_attention_heads": "n_head",
    "n_head": "n_head",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "head_dim",
    "hidden_size": "dim",
    "n_embd": "dim",
    "intermediate_size": "hidden_dim",
    "moe_intermediate_size": "hidden_dim",  # of one expert
    "n_inner": "hidden_dim",
    "ffn_dim": "hidden_dim",
    "num_local_experts": "n_expert",
    "num_experts": "n_expert",  # its older name
    "num_experts_per_tok": "n_expert_used",
}
DERIVED = ("num_key_value_heads", "head_dim", "n_inner", "num_experts")  # null: worked out from the others
ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
# GPTConfig's biases, under their names in config.json; where two make one, the later counts.
BIASES = {
    "attention_bias": ("qkv_bias", "o_bias"),
    "attention_out_bias": ("o_bias",),
    "use_qkv_bias": ("qkv_bias",),
    "mlp_bias": ("mlp_bias",),
    "use_bias": ("qkv_bias", "o_bias", "mlp_bias"),
    "enable_bias": ("qkv_bias", "o_bias", "mlp_bias"),
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
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor"),
}

# The models that rotate neighbouring numbers of a head; all others rotate two halves.
PAIRED = ("glm", "glm4", "ernie4_5", "helium")

# GPTConfig's factors, under their names in config.json.
SCALES = {
    "embedding_multiplier": "embed_scale",
    "attention_multiplier": "attention_scale",
    "residual_multiplier": "residual_scale",
}
GEMMAS = ("gemma", "gemma3_text")  # whose embedding is multiplied by the root of its size
MOST_LAYERS = 10_000

# Fields that have one implemented value, and whose being off would change the model. A family may have more.
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
    "truncate": True,  # of YaRN
    "hidden_activation": "gelu_pytorch_tanh",  # of Gemma's first files
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
    "phi3": {"original_max_position_embeddings", "auto_map"},  # longrope's, and code older than transformers' class
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
AS_IS, TRANSPOSED, STACKED, FROM_ROW_2 = "as is", "transposed", "stacked", "from row 2"
NOWHERE = "nowhere"
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
OWN_WEIGHTS = {
    "mixtral": MIXTRAL_MLP,
    "qwen3_moe": QWEN3_MOE_MLP,
    "phi3": PHI3_WEIGHTS,
    "olmo": OLMO_WEIGHTS,
    "starcoder2": STARCODER2_WEIGHTS,
    "gpt2": GPT2_WEIGHTS,
    "gpt_bigcode": GPT_BIGCODE_WEIGHTS,
    "opt": OPT_WEIGHTS,
    "glm": GLM_WEIGHTS,
    "glm4": GLM4_WEIGHTS,
    "gemma3_text": GEMMA3_WEIGHTS,
}
# Tensors dropped where the map has no use for them: rotary angles, causal masks, a head that is tied.
DROPPED = {
    "model.": ("model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "lm_head.weight"),
    "transformer.": ("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias", "lm_head.weight"),
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


def refuse_unknown(fields: dict, known) -> None:
    """Raises ValueError for a field that would change what the model computes, as far as this file knows."""
    advice = "choose a model without it, or delete the field if the model computes the same without it"
    for name, value in fields.items():
        if name in FIXED and name not in known:
            if value is not None and value != FIXED[name]:
                entry = f"{name} = {reprlib.repr(value)}"
                raise ValueError(f"config.json has {entry}, and only {FIXED[name]} is implemented; {advice}")
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
    options = {name: positive(name, rope[name], float) for name in ROPE_OPTIONS["yarn"] if rope.get(name)}
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


def local_rope_of(field: dict) -> dict:
    """GPTConfig's rope_base_window, of Gemma 3. Those of both kinds of layers may stand in rope_parameters: then the
    ones of full layers alone stay in `field`."""
    if "rope_local_base_freq" not in field:
        return {}
    of_each = field["rope_parameters"]
    local = {"rope_theta": field["rope_local_base_freq"]}
    if isinstance(of_each, dict) and of_each.keys() <= {"full_attention", "sliding_attention"}:
        field["rope_parameters"] = of_each.get("full_attention")
        given = of_each.get("sliding_attention") or {}
        if not isinstance(given, dict) or given.get("rope_type", "default") != "default":
            raise ValueError(f"config.json has sliding_attention = {reprlib.repr(given)}; it must be of type default")
        refuse_unknown(given, ("rope_theta", "rope_type"))
        local |= given
    return {"rope_base_window": float(positive("rope_theta", local["rope_theta"], float))}


def rope_of(field: dict, head_dim: int) -> dict:
    """GPTConfig's rope_base, rope_scaling, rotary_dim and block_size, from the fields of either transformers 4 or 5."""
    if field["rope_scaling"] and field["rope_parameters"]:
        raise ValueError("config.json has rope_scaling and rope_parameters; delete the one that does not hold")
    rope = field["rope_scaling"] or field["rope_parameters"] or {}
    if not isinstance(rope, dict):
        entry = reprlib.repr(rope)
        raise ValueError(f"config.json has {entry} as its rope_scaling or rope_parameters; it must be an object")
    context = field["max_position_embeddings"]
    kinds = [rope[name] for name in ("rope_type", "type") if rope.get(name)] or ["default"]  # "type" is the older name
    kind = kinds[0]
    if kind != kinds[-1] or kind not in list(ROPE_NUMBERS):
        entry = ", ".join(f"{name} = {reprlib.repr(rope[name])}" for name in ("rope_type", "type") if name in rope)
        raise ValueError(f"config.json has the rotary embedding {entry}; implemented are {', '.join(ROPE_NUMBERS)}")
    partial = {name: field[name] for name in ("partial_rotary_factor",) if name in field}
    known = ("rope_theta", "rope_type", "type", *partial, *ROPE_NUMBERS[kind], *ROPE_OPTIONS.get(kind, ()))
    refuse_unknown(rope, known)
    original = rope.get("original_max_position_embeddings", context)
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
    if field["num_hidden_layers"] > MOST_LAYERS:
        entry = f"num_hidden_layers = {field['num_hidden_layers']}"
        raise ValueError(f"config.json has {entry}; layers that differ must be {MOST_LAYERS} at most")
    return field["num_hidden_layers"]


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
    """GPTConfig's sliding_window and full_layers."""
    layers, of_each = field["num_hidden_layers"], field.get("layer_types") or None
    used = switch("use_sliding_window", field.get("use_sliding_window", True))
    window = field.get("sliding_window") if used else None
    full = range(layers if window is None else 0)
    if window is not None:
        window = positive("sliding_window", window, int)
    if window is not None and model_type in ("qwen2", "qwen3"):  # transformers' Qwen3-MoE has no such field
        first = field["max_window_layers"]
        full = range(min(first if first == 0 else positive("max_window_layers", first, int), layers))
    elif window is not None and "sliding_window_pattern" in field:
        every = positive("sliding_window_pattern", field["sliding_window_pattern"], int)
        full = range(every - 1, layer_count(field), every)
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
    if len(full) == layers:
        return {"sliding_window": None}
    if len(full) > 0:
        layer_count(field)
    return {"sliding_window": window, "full_layers": tuple(full)}


def config_from_hf(config: dict) -> GPTConfig:
    """GPTConfig from the content of a config.json. Raises ValueError, by name, for what is not implemented."""
    config = text_half(config)
    model_type = model_type_of(config)
    defaults = DEFAULTS[model_type]
    refuse_unknown(config, defaults.keys() | HARMLESS | IGNORED.get(model_type, set()))
    field = defaults | {name: value for name, value in config.items() if name in defaults}

    stated = [name for name in SIZES if name in field and (field[name] is not None or name not in DERIVED)]
    sizes = {SIZES[name]: positive(name, field[name], int) for name in stated}
    dim, n_head = sizes["dim"], sizes["n_head"]
    sizes = {"n_kv_head": n_head, "head_dim": dim // n_head, "hidden_dim": 4 * dim} | sizes

    if field.get("word_embed_proj_dim") not in (None, dim):  # opt-350m, which projects to and from its embedding
        entry = f"word_embed_proj_dim = {reprlib.repr(field['word_embed_proj_dim'])}"
        raise ValueError(f"config.json has {entry}, and only hidden_size is implemented; choose a model without it")
    activation = next(n for n in ("activation_function", "hidden_activation", "hidden_act") if n in field)
    if model_type == "gemma" and field[activation] == "gelu":  # its first files meant the other one by it
        field[activation] = "gelu_pytorch_tanh"
    if field[activation] not in list(ACTIVATIONS):  # whatever its type
        entry = f"{activation} = {reprlib.repr(field[activation])}"
        raise ValueError(f"config.json has {entry}; implemented are {', '.join(ACTIVATIONS)}")
    values = {
        "activation": ACTIVATIONS[field[activation]],
        "tie_embeddings": switch("tie_word_embeddings", field["tie_word_embeddings"]),
    }
    for name in EPSILONS:
        if name in field:
            values["norm_eps"] = positive(name, field[name], float)
    for name, ours in BIASES.items():
        if name in field:
            values |= dict.fromkeys(ours, switch(name, field[name]))
    for name in SCALES.keys() & field.keys():
        values[SCALES[name]] = float(positive(name, field[name], float))
    if "logits_scaling" in field:
        values["logit_scale"] = 1 / positive("logits_scaling", field["logits_scaling"], float)
    if model_type in GEMMAS:
        values["embed_scale"] = float(dim**0.5)
    if "query_pre_attn_scalar" in field:
        values["attention_scale"] = positive("query_pre_attn_scalar", field["query_pre_attn_scalar"], float) ** -0.5
    if "norm_topk_prob" in field:
        values["norm_topk_prob"] = switch("norm_topk_prob", field["norm_topk_prob"])
    if "rope_theta" in field:
        of_windows = local_rope_of(field)
        values |= rope_of(field, sizes["head_dim"])
        values["nope_layers"] = nope_layers_of(field)
        values |= windows_of(field, model_type, values["nope_layers"])
        values |= of_windows if values["sliding_window"] else {}
    implied = dict(ARCHITECTURES.values())[model_type]
    return GPTConfig(**sizes | values | implied)


def read_json(path: Path) -> dict:
    if not path.is_file():
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


# What safetensors and torch's two unpicklers raise for a damaged file.
DAMAGE = (SafetensorError, RuntimeError, ValueError, EOFError, LookupError, struct.error, pickle.PickleError)


def open_weights(file: Path):
    """({name: how many numbers}, the function that maps a tensor by its name), of one file. Nothing is read yet."""

    def read(name):
        try:
            return opened.get_tensor(name) if file.suffix == ".safetensors" else opened[name]
        except SafetensorError as error:  # a dtype that torch does not have
            raise ValueError(f"{name} in {file} cannot be read ({error}); choose other weights") from error

    try:
        if file.suffix == ".safetensors":
            opened = safe_open(file, framework="pt")
            return {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}, read
        # Before torch 1.6 .bin files were no zip archives; those cannot be mapped.
        opened = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except DAMAGE as error:
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
            numbers += sizes[name]
            full = short if short.startswith((prefix, "lm_head.")) else prefix + short
            if full in found:
                raise ValueError(f"{found[full][0]} has {found[full][1]} and {file} has {name}, the same tensor twice")
            found[full] = file, name
    return found, numbers, towers


def weight_rows(model_type: str, stacked: bool = False) -> tuple:
    """The weight map of a model type: its own rows, and Llama's for what these do not make."""
    own = STACKED_MLP if stacked else OWN_WEIGHTS.get(model_type, ())
    made = {target for _, targets, _ in own for target in targets}
    return tuple(row for row in LLAMA_WEIGHTS if made.isdisjoint(row[1])) + own


def weight_plan(rows, config: GPTConfig, expected: dict) -> dict:
    """{tensor in the files: (parameters it becomes, how it is stored)}, the map written out for one model."""
    plan, written_out = {}, []
    for source, targets, stored in rows:
        of_experts = [[target.replace("*", str(expert)) for target in targets] for expert in range(config.n_expert)]
        if stored == STACKED:
            written_out.append((source, sum(of_experts, []), stored))
        elif "*" in source:
            written_out += [(source.replace("*", str(i)), made, stored) for i, made in enumerate(of_experts)]
        else:
            written_out.append((source, targets, stored))
    for source, targets, stored in written_out:
        for layer in range(config.n_layer if "{}" in source else 1):
            for kind in ("weight", "bias"):
                made = [f"{target.format(layer)}.{kind}" for target in targets]
                if any(name in expected for name in made):
                    name = source.format(layer)
                    plan[name if stored == STACKED else f"{name}.{kind}"] = made, stored
    return plan


def head_order(config: GPTConfig, model_type: str) -> list[int] | None:
    """The numbers of a head in the files, in the order of GPTConfig's, whose partners are half a head apart; None if
    that is their own."""
    C, R = config.head_dim, config.rotary_dim or config.head_dim
    first, second = (range(0, R, 2), range(1, R, 2)) if model_type in PAIRED else (range(R // 2), range(R // 2, R))
    middle = (R + C) // 2
    order = [*first, *range(R, middle), *second, *range(middle, C)]
    return None if order == sorted(order) else order


def reordered(tensor, name: str, order: list[int] | None):
    """Rows of a parameter, those of each head in another order if they are of queries or keys."""
    if order is None or not name.rpartition(".")[0].endswith((".q_proj", ".k_proj", ".q_norm", ".k_norm")):
        return tensor
    return tensor.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)


def listing(names: list[str]) -> str:
    return f"({len(names)}): {', '.join(names[:6])}{' ...' * (len(names) > 6)}"


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


def split_rows(tensor, targets: list[str], stored: str, expected: dict, order: list[int] | None, where: str) -> dict:
    """{parameter: its part of `tensor`}, each a copy that holds on to no file; `order` is of `head_order`."""
    check_dtype(tensor, where)
    rows = [expected[name].shape[0] for name in targets]
    shape = [sum(rows), *expected[targets[0]].shape[1:]]
    turned = ""
    if stored == TRANSPOSED and tensor.ndim == 2:
        tensor, turned = tensor.T, " after its transpose"
    elif stored == STACKED and tensor.ndim == 3:
        tensor, turned = tensor.flatten(0, 1), " with its experts one under the other"
    elif stored == FROM_ROW_2 and tensor.ndim == 2:
        tensor, turned = tensor[2:], " without its first two rows"
    if list(tensor.shape) != shape:
        raise ValueError(f"{where} has the shape {list(tensor.shape)}{turned}, where config.json asks for {shape}")
    parts = [reordered(part, name, order) for name, part in zip(targets, tensor.split(rows), strict=True)]
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
    prefix = "transformer." if model_type in ("gpt2", "gpt_bigcode") else "model."
    files = weight_files(directory)
    found, numbers, towers = find_tensors(files, prefix, multimodal=text_config is not hf_config)
    check_size(config, numbers, directory)
    stacked = config.n_expert > 0 and any(name.endswith(".mlp.experts.gate_up_proj") for name in found)
    with torch.device("meta"):
        expected = GPT(config).state_dict()  # names and shapes
    plan = weight_plan(weight_rows(model_type, stacked), config, expected)
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
    if config.tie_embeddings and "lm_head.weight" in found:
        file, name = found["lm_head.weight"]
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
