"""`model.pth` back to a Hugging Face model folder, for transformers and whatever else reads one.

    python -m scripts.export_hf_checkpoint --checkpoint_path checkpoints/NAME/model.pth --out_dir NAME-hf

Writes config.json, safetensors in files of at most 5 GB, and copies of the tokenizer's files. Decisions to know:

- The tables are those of convert_hf_checkpoint.py, read backwards; converting the folder gives the same model.pth.
- A checkpoint does not name its architecture. The first one that computes its config is written: a Mistral without a
  sliding window comes out as the Llama that it is. What no architecture computes is refused.
- One that stores a single norm for attention and feed-forward, or a norm without a bias, needs weights that agree.
- transformers 4 and 5 read it: experts are written one by one, rotary fields in the older form, no field is left out.
- dtypes are kept. Memory holds one file's tensors at a time.
- The folder is written beside its name and renamed into place, so that its presence means that it is complete.

Copy me: needs torch, huggingface_hub, numpy, safetensors and tqdm, and in the folder above `model.py`, `fast_model.py`,
`quantized_linear.py`, `cpu_kernels.py`, `tp.py`, `runtime.py`, `checkpoint.py`, `convert_hf_checkpoint.py` and
`tokenizer.py`.
"""

import argparse
import json
import os
import reprlib
import shutil
from dataclasses import asdict
from functools import reduce
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

import convert_hf_checkpoint as convert
from checkpoint import describe_quantization, read_checkpoint
from model import GPTConfig
from runtime import check_target, run_command, sigterm_ends
from tokenizer import FILES

MAX_FILE_SIZE = "5GB"
TOKENIZER_FILES = {*FILES, "vocab.json", "merges.txt"} - {"config.json"}
# The architectures for a model with rotary embeddings, in the order in which they are tried.
DENSE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DENSE += ("ArceeForCausalLM", "SeedOssForCausalLM", "Starcoder2ForCausalLM")
DENSE += ("GraniteForCausalLM", "HyperCLOVAXForCausalLM", "GemmaForCausalLM", "Gemma3ForCausalLM", "Glm4ForCausalLM")
DENSE += ("MinistralForCausalLM", "SmolLM3ForCausalLM", "Phi3ForCausalLM", "GlmForCausalLM")
DENSE += ("OlmoForCausalLM", "StableLmForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "Exaone4ForCausalLM")
DENSE += ("GPTNeoXForCausalLM", "PhiForCausalLM", "GPTJForCausalLM", "FalconForCausalLM")
DENSE += ("CohereForCausalLM", "Cohere2ForCausalLM")
# With relu the last first, because OPT is known by it.
LEARNED_POSITIONS = ("GPT2LMHeadModel", "GPTBigCodeForCausalLM", "GPTNeoForCausalLM", "OPTForCausalLM")
SPARSE = ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "GptOssForCausalLM")
# Fields with one implemented value.
GPT2_OFF = dict.fromkeys(("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"), False)
FIXED = {
    "gpt2": {"scale_attn_weights": True} | GPT2_OFF,
    "gpt_bigcode": {"scale_attn_weights": True, "multi_query": True, "add_cross_attention": False},
    "opt": {"do_layer_norm_before": True, "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "olmo": {"clip_qkv": None},
    "olmo3": {"rope_theta": 500000.0},
    "olmoe": {"clip_qkv": None},
    "phi": {"tie_word_embeddings": False, "qk_layernorm": False},
    "gptj": {"tie_word_embeddings": False},
    "falcon": {"alibi": False, "parallel_attn": True, "multi_query": True},
    "cohere": {"use_qk_norm": False},
    "gpt_oss": {"swiglu_alpha": 1.702},
}
# Families that refuse a dim that the heads do not divide.
DIVIDED = ("llama", "arcee", "gpt2", "gpt_bigcode", "opt", "stablelm", "gemma3_text", "gpt_neox", "gptj", "falcon")
DIVIDED += ("cohere2", "gpt_neo", "hyperclovax")


def values_of(config: GPTConfig) -> dict:
    """Every field of a config.json that some architecture has."""
    activation = {ours: theirs for theirs, ours in convert.ACTIVATIONS.items()}[config.activation]
    window, layers = config.sliding_window, config.n_layer
    scaling = config.rope_scaling
    if scaling and scaling["rope_type"] == "longrope":  # the context is the original one, so the long factors are none
        context = {"original_max_position_embeddings": config.block_size}
        scaling = scaling | context | {"long_factor": scaling["short_factor"]}
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    rotary = config.rotary_dim or config.head_dim
    values = {theirs: getattr(config, ours) for theirs, ours in convert.SIZES.items()}
    values |= dict.fromkeys(convert.ACTIVATION_NAMES, activation) | dict.fromkeys(convert.EPSILONS, config.norm_eps)
    # Of a switch that stands for several biases the last counts, but for attention_bias, which has one beside it.
    values |= {theirs: getattr(config, ours[-1]) for theirs, ours in convert.SWITCHES.items()}
    return values | {
        "attention_bias": config.qkv_bias,
        "word_embed_proj_dim": config.dim,
        # As transformers 4 wrote it, which 5 reads as well.
        "rope_theta": config.rope_base,
        "rope_scaling": scaling,
        "original_max_position_embeddings": config.block_size,
        "partial_rotary_factor": rotary / config.head_dim,
        "rotary_dim": rotary,
        "rotary_pct": rotary / config.head_dim,
        "rotary_emb_base": config.rope_base,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": layers if window is None else len(config.full_layers),
        "layer_types": [
            "full_attention" if config.window_of(i) is None else "sliding_attention" for i in range(layers)
        ],
        "embedding_multiplier": config.embed_scale,
        "attention_multiplier": scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": 1 / config.logit_scale,
        "attention_types": [[["global" if config.window_of(i) is None else "local"], 1] for i in range(layers)],
        "window_size": window or config.block_size,
        "logit_scale": config.logit_scale,
        "swiglu_limit": config.gate_clamp,
        "query_pre_attn_scalar": max(1, round(scale**-2)),
        "rope_local_base_freq": config.rope_base_window or config.rope_base,
        "sliding_window_pattern": layers + 1,
        "no_rope_layers": [int(i not in config.nope_layers) for i in range(layers)],
        "no_rope_layer_interval": layers,
        # Falcon's form of two norms, whatever its layers have, and of any number of kv heads.
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 2,
    }


def not_stored(model_type: str, config: GPTConfig, state_dict: dict) -> list[str]:
    """What an architecture's files have no place for: a second norm unlike the first, a norm's bias that is not 0."""
    differs = []
    for parameters, stored in convert.weight_plan(convert.weight_rows(model_type), config, state_dict).values():
        tensors = [state_dict[name] for name in parameters]
        if stored in convert.COPIES and not all(torch.equal(tensors[0], tensor) for tensor in tensors):
            differs.append(f"{parameters[-1]} unlike {parameters[0]}")
        neutral = float(parameters[0].endswith(".weight"))
        if stored == convert.NOWHERE and not (tensors[0] == neutral).all():
            differs.append(f"{parameters[0]} other than {neutral:g}")
    return differs[:1]


def config_to_hf(config: GPTConfig, state_dict: dict) -> dict:
    """The content of a config.json, the inverse of config_from_hf. Raises ValueError if no architecture fits."""
    values = values_of(config)
    architectures = SPARSE if config.n_expert else DENSE
    if config.rope_base is None:
        architectures = LEARNED_POSITIONS[:: -1 if config.activation == "relu" else 1]
    differs = {}
    for architecture in architectures:
        model_type = convert.ARCHITECTURES[architecture][0]
        fields = {"architectures": [architecture], "model_type": model_type} | FIXED.get(model_type, {})
        fields |= {name: values[name] for name in convert.DEFAULTS[model_type] if name in values}
        if model_type == "hyperclovax":  # which multiplies where Granite divides
            fields["logits_scaling"] = config.logit_scale
        if model_type == "gpt_oss":  # whose name of its activation says nothing
            fields["hidden_act"] = "silu"
        try:
            made = asdict(convert.config_from_hf(fields))
        except ValueError:  # a field that the family must have
            continue
        names = [name for name, value in asdict(config).items() if value != made[name]]
        if config.dim % config.n_head and model_type in DIVIDED:
            names.append("dim")
        differs[architecture] = [f"{name} = {getattr(config, name)!r}" for name in names]
        if not names:
            differs[architecture] = not_stored(model_type, config, state_dict)
        if not differs[architecture]:
            return fields
    nearest = min(differs, key=lambda architecture: sum(" = " in text for text in differs[architecture]))  # fields
    fields = ", ".join(differs[nearest])
    raise ValueError(
        f"no architecture of transformers computes this model; the nearest is {nearest}, but not with {fields}"
    )


def stored_tensor(state_dict: dict, order: list[int], parameters: list[str], stored: str) -> torch.Tensor:
    """A tensor of the files, a copy: the rows of its parameters, [in, out] if a weight is stored transposed.

    The rows of heads stand in `order`, the one of the files.
    """
    parts = [convert.reordered(state_dict[name], name, order) for name in parameters]
    if stored in convert.COPIES:
        return parts[0].clone()
    if stored == convert.GROUPED:
        heads = [part.unflatten(0, (-1, len(order))) for part in parts]  # [heads, C, ...]
        groups = [part.unflatten(0, (len(heads[1]), -1)) for part in heads]  # [kv heads, heads of each, C, ...]
        return torch.cat(groups, dim=1).flatten(0, 2)
    tensor = torch.cat(parts)
    if stored == convert.BY_TURNS:
        return by_turns(tensor, parameters)
    if stored == convert.FROM_ROW_2:
        return torch.cat([torch.zeros_like(tensor[:1]).expand(2, -1), tensor])
    return tensor.T.contiguous() if stored == convert.TRANSPOSED and tensor.ndim == 2 else tensor


def by_turns(tensor, parameters: list[str]) -> torch.Tensor:
    """The tensor of the files in which gate and up of all experts take turns, or down alone."""
    gated = parameters[0].rpartition(".")[0].endswith(".gate_proj")
    tensor = tensor.unflatten(0, (len(parameters) // (2 if gated else 1), -1))  # [experts, rows, ...]
    if gated:
        tensor = tensor.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    if parameters[0].endswith(".weight"):
        packed = tensor.dtype == torch.uint8
        tensor = tensor.unflatten(2, (-1, 16)) if packed else tensor.transpose(1, 2)
    return tensor.contiguous()


def write_weights(folder: Path, plan: dict, state_dict: dict, order: list[int]) -> int:
    """Write the tensors of a weight_plan, and an index if they need more than one file; the number of files."""
    meta = {name: tensor.to("meta") for name, tensor in state_dict.items()}
    sizes = {name: stored_tensor(meta, order, *made) for name, made in plan.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=MAX_FILE_SIZE)
    os.umask(umask := os.umask(0))  # there is no other way to read it
    for file, names in split.filename_to_tensors.items():
        # No name for the tensors: it would keep them while the next file's are made.
        save_file(
            {name: stored_tensor(state_dict, order, *plan[name]) for name in names}, folder / file, {"format": "pt"}
        )
        (folder / file).chmod(0o666 & ~umask)  # safetensors lets nobody else read it
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return len(split.filename_to_tensors)


def special_ids(folder: Path) -> dict:
    """BOS, EOS and padding of the original's JSON files, where these are still there. Raises ValueError if they are no
    ids.

    They are written even if null: transformers' default would end an answer at Llama's or GPT-2's token.
    """
    found, ids = {}, {}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            found |= convert.read_json(folder / name)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids[name], several = found.get(name), name == "eos_token_id"
        value = ids[name]
        listed = value if several and isinstance(value, list) else [] if value is None else [value]
        if not all(type(id) is int for id in listed):
            what = "an id or a list of ids" if several else "an id"
            raise ValueError(f"the JSON files in {folder} have {name} = {reprlib.repr(value)}; it must be {what}")
    return ids


def export(checkpoint_path, out_dir) -> str:
    """Write the folder, and return what is in it in words. Raises ValueError or OSError, and leaves nothing there."""
    path, out = Path(checkpoint_path), Path(out_dir).resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out_dir} exists and is not an empty folder; give a new one")
    config, state_dict = read_checkpoint(path)
    quantized = describe_quantization(state_dict)
    if quantized and (quantized["mode"] != "mxfp4" or "int8" in quantized):
        raise ValueError(f"{path} is quantized; export the checkpoint that it was made from")
    fields = config_to_hf(config, state_dict)
    model_type = fields["model_type"]
    dtypes = {tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()}
    dtype = str(reduce(torch.promote_types, dtypes)).removeprefix("torch.")
    fields |= special_ids(path.parent) | {"torch_dtype": dtype}
    if quantized:
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        fields["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    plan = convert.weight_plan(convert.weight_rows(model_type), config, state_dict)
    plan = {name: made for name, made in plan.items() if made[1] != convert.NOWHERE}

    order = convert.head_order(config, model_type)
    order = [order.index(number) for number in range(config.head_dim)]  # and back
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    check_target(temporary)
    temporary.mkdir(parents=True)
    try:
        with sigterm_ends():
            count = write_weights(temporary, plan, state_dict, order)
            (temporary / "config.json").write_text(json.dumps(fields, indent=2))
            copied = [name for name in sorted(TOKENIZER_FILES) if (path.parent / name).is_file()]
            for name in copied:
                shutil.copyfile(path.parent / name, temporary / name)
            os.replace(temporary, out)
    except ImportError as error:
        raise ValueError("writing safetensors needs numpy: pip install -r scripts/requirements.txt") from error
    except SafetensorError as error:
        raise OSError(f"{out_dir} could not be written whole; is the disk full?") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    weights = f"{len(plan)} tensors in {count} file{'s' * (count > 1)}"
    return f"{fields['architectures'][0]} in {dtype}, {weights}, {', '.join(copied) or 'no tokenizer files'}"


def main(args) -> None:
    print(f"wrote {args.out_dir}: {export(args.checkpoint_path, args.out_dir)}")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Export model.pth to a Hugging Face model folder.")
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="a model.pth that is not quantized")
    parser.add_argument("--out_dir", type=Path, required=True, help="the folder to make; it may exist if it is empty")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main, parse_arguments())
