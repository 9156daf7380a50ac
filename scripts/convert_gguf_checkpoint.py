"""GGUF, llama.cpp's one-file format, to DIR/model.pth with the tokenizer's files beside it.

    python -m scripts.convert_gguf_checkpoint --gguf model.gguf --out_dir checkpoints/model

Config, weights and tokenizer are all rebuilt from the file; nothing else is read. Decisions to know:

- Weights become float32, exactly the values that the quantized blocks stand for; all of them are in memory at once.
- llama.cpp rotates neighbouring pairs of a head, this project its two halves: the rows of q and k are put back.
- Metadata and tensors must balance: what is not understood is refused by its name, nothing is skipped in silence.
- Only byte-level BPE of the `smollm` kind is rebuilt. Other tokenizers split text otherwise, with other ids.
- An older model.pth goes first and the new one comes last, so that its presence means that the folder is complete.

Copy me: needs torch, gguf and tokenizers, and in the folder above `model.py`, `fast_model.py`, `quantized_linear.py`,
`cpu_kernels.py`, `tp.py`, `runtime.py`, `checkpoint.py` and `tokenizer.py`.
"""

import argparse
import json
import math
import reprlib
from pathlib import Path

import torch

from checkpoint import check_size, write_checkpoint
from model import GPT, GPTConfig
from runtime import check_target, run_command
from tokenizer import FILES

# GGUF's tensors and ours. Which of them a model has follows from its config.
TENSORS = {
    "token_embd.weight": "transformer.wte.weight",
    "blk.{}.attn_norm.weight": "transformer.h.{}.ln_1.weight",
    "blk.{}.attn_q.weight": "transformer.h.{}.attn.q_proj.weight",
    "blk.{}.attn_q.bias": "transformer.h.{}.attn.q_proj.bias",
    "blk.{}.attn_k.weight": "transformer.h.{}.attn.k_proj.weight",
    "blk.{}.attn_k.bias": "transformer.h.{}.attn.k_proj.bias",
    "blk.{}.attn_v.weight": "transformer.h.{}.attn.v_proj.weight",
    "blk.{}.attn_v.bias": "transformer.h.{}.attn.v_proj.bias",
    "blk.{}.attn_output.weight": "transformer.h.{}.attn.o_proj.weight",
    "blk.{}.attn_output.bias": "transformer.h.{}.attn.o_proj.bias",
    "blk.{}.ffn_norm.weight": "transformer.h.{}.ln_2.weight",
    "blk.{}.ffn_gate.weight": "transformer.h.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_gate.bias": "transformer.h.{}.mlp.gate_proj.bias",
    "blk.{}.ffn_up.weight": "transformer.h.{}.mlp.up_proj.weight",
    "blk.{}.ffn_up.bias": "transformer.h.{}.mlp.up_proj.bias",
    "blk.{}.ffn_down.weight": "transformer.h.{}.mlp.down_proj.weight",
    "blk.{}.ffn_down.bias": "transformer.h.{}.mlp.down_proj.bias",
    "output_norm.weight": "transformer.ln_f.weight",
    "output.weight": "lm_head.weight",
}

REQUIRED = object()
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class Metadata:
    """The file's keys. Each is taken once, and `finish` refuses those that nobody took."""

    def __init__(self, fields: dict, path):
        # These describe the file, not what the model computes.
        about = ("GGUF.", "general.", "quantize.", "split.")
        self.left = {key: value for key, value in fields.items() if not key.startswith(about)}
        self.path = path

    def take(self, key: str, kind, default=REQUIRED):
        """The value, if it is of the type `kind`, or a list of items of the type in [kind]; floats are above 0."""
        if key not in self.left:
            if default is REQUIRED:
                raise ValueError(f"{self.path} lacks {key}")
            return default
        value = self.left.pop(key)
        items, item_kind = (value, kind[0]) if isinstance(kind, list) else ([value], kind)
        right = isinstance(items, list) and all(type(item) is item_kind for item in items)
        if not right or (item_kind is float and not all(0 < item < math.inf for item in items)):
            what = {float: "a number above 0", int: "a whole number", str: "a text", bool: "true or false"}[item_kind]
            what = f"a list, each {what}" if isinstance(kind, list) else what
            raise ValueError(f"{self.path} has {key} = {reprlib.repr(value)}; it must be {what}")
        return value

    def expect(self, key: str, supported, default):
        value = self.left.pop(key, default)
        if value != supported:
            raise ValueError(f"{self.path} has {key} = {reprlib.repr(value)}, only {supported!r} is supported")

    def finish(self):
        if self.left:
            raise ValueError(f"{self.path} has {', '.join(map(repr, self.left))}, which this converter does not know")


def read_gguf(path) -> tuple[dict, dict]:
    """({key: value}, {name: gguf.ReaderTensor, mapped from the file}). Raises ValueError if the file is damaged."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError("reading GGUF needs the gguf package: pip install -r scripts/requirements.txt") from error
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    with open(path, "rb") as file:
        magic, version = file.read(4), int.from_bytes(file.read(4), "little")
    if magic == b"GGUF" and version and not version & 0xFFFF:  # the package reads it, but swaps no block of weights
        raise ValueError(f"{path} is big-endian; turn it with gguf-convert-endian, of the gguf package")
    if magic == b"GGUF" and version == 1:
        raise ValueError(f"{path} is of GGUF's version 1; take a newer file, or make one with llama.cpp")
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole GGUF file, download it again ({error})") from error
    if fields.get("split.count", 1) != 1:
        parts = reprlib.repr(fields["split.count"])
        raise ValueError(f"{path} is one of {parts} parts; put them together with llama.cpp's llama-gguf-split --merge")
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def read_config(metadata: Metadata, tensors: dict) -> GPTConfig:
    take, expect = metadata.take, metadata.expect
    n_head, dim = take("llama.attention.head_count", int), take("llama.embedding_length", int)
    head_dim = take("llama.attention.key_length", int, dim // max(n_head, 1))  # GPTConfig refuses 0
    expect("llama.attention.value_length", head_dim, head_dim)
    expect("llama.rope.dimension_count", head_dim, head_dim)
    expect("llama.rope.scaling.type", "none", "none")
    expect("llama.expert_count", 0, 0)
    expect("llama.expert_used_count", 0, 0)
    tokens = metadata.left.get("tokenizer.ggml.tokens")
    return GPTConfig(
        block_size=take("llama.context_length", int),
        vocab_size=take("llama.vocab_size", int, len(tokens) if isinstance(tokens, list) else 0),
        n_layer=take("llama.block_count", int),
        n_head=n_head,
        n_kv_head=take("llama.attention.head_count_kv", int, n_head),
        head_dim=head_dim,
        dim=dim,
        hidden_dim=take("llama.feed_forward_length", int),
        norm_eps=take("llama.attention.layer_norm_rms_epsilon", float),
        rope_base=take("llama.rope.freq_base", float, 10000.0),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
    )


def unpermute(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k, weight or bias, from pairs side by side (0, C/2, 1, C/2 + 1, ..) back to two halves."""
    pairs = rows.unflatten(0, (-1, head_dim // 2, 2))  # [heads, C/2, 2, ...]
    return pairs.transpose(1, 2).flatten(0, 2)


def convert_weights(tensors: dict, config: GPTConfig, path) -> dict:
    """GGUF tensors to a float32 state dict for GPT. Raises ValueError if they are not exactly the model's."""
    import gguf

    check_size(config, sum(tensor.n_elements for tensor in tensors.values()), path)
    with torch.device("meta"):
        expected = GPT(config).state_dict()
    names = {ours.format(i): theirs.format(i) for theirs, ours in TENSORS.items() for i in range(config.n_layer)}
    left, state_dict = dict(tensors), {}
    for name, place in expected.items():
        if names[name] not in left:
            raise ValueError(f"{path} lacks the tensor {names[name]}")
        tensor = left.pop(names[name])
        shape = tensor.shape.tolist()[::-1]  # GGUF counts dimensions from the innermost
        if shape != list(place.shape):
            raise ValueError(f"{path} has {tensor.name} in the shape {shape}, its metadata ask for {list(place.shape)}")
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{path} has {tensor.name} in a format that gguf cannot read: {error}") from error
        weight = torch.tensor(values)  # a copy: some values are a view of the file
        is_rotated = ".q_proj." in name or ".k_proj." in name
        state_dict[name] = unpermute(weight, config.head_dim) if is_rotated else weight
    if left:
        raise ValueError(f"{path} has {', '.join(map(repr, left))}, for which the model has no place")
    return state_dict


def convert_tokenizer(metadata: Metadata) -> dict[str, str]:
    """{file name: text} of tokenizer.json, tokenizer_config.json and generation_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    take, expect = metadata.take, metadata.expect
    expect("tokenizer.ggml.model", "gpt2", None)  # llama.cpp's name for any byte-level BPE
    expect("tokenizer.ggml.pre", "smollm", None)
    expect("tokenizer.ggml.add_eos_token", False, False)
    expect("tokenizer.ggml.add_space_prefix", False, False)
    tokens, merges = take("tokenizer.ggml.tokens", [str]), take("tokenizer.ggml.merges", [str])
    types = take("tokenizer.ggml.token_type", [int], [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ValueError(f"{metadata.path} has {len(tokens)} tokens and {len(types)} token types")

    ids = {token: id for id, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[tuple(merge.split(" ")) for merge in merges]))
    except Exception as error:  # the library raises nothing narrower
        message = str(error).splitlines()[0]
        raise ValueError(f"{metadata.path} has tokens and merges that do not fit: {message}") from error
    # Each digit is a token. The second step is GPT-2's own pattern, which would keep numbers together.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])

    named = {name: take(f"tokenizer.ggml.{key}_token_id", int, None) for name, key in SPECIAL_TOKENS.items()}
    for name, id in named.items():
        if id is not None and not 0 <= id < len(tokens):
            raise ValueError(f"{metadata.path} names {id} as {name} and has only {len(tokens)} tokens")
    if take("tokenizer.ggml.add_bos_token", bool, False):
        if named["bos_token"] is None:
            raise ValueError(f"{metadata.path} asks for a BOS token and lacks tokenizer.ggml.bos_token_id")
        bos = tokens[named["bos_token"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, ids[bos])]
        )
    config = {name: tokens[id] for name, id in named.items() if id is not None}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    template = take("tokenizer.chat_template", str, None)
    if template is not None:
        config["chat_template"] = template
    generation = {f"{name}_id": named[name] for name in ("bos_token", "eos_token") if named[name] is not None}
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
        "generation_config.json": json.dumps(generation, indent=2),
    }


def convert(gguf_file, out_dir) -> Path:
    """Write the folder and return the path of its model.pth."""
    fields, tensors = read_gguf(gguf_file)
    metadata = Metadata(fields, gguf_file)
    if fields.get("general.architecture") != "llama":
        architecture = reprlib.repr(fields.get("general.architecture"))
        raise ValueError(f"{gguf_file} has general.architecture = {architecture}, only 'llama' is supported")
    out = Path(out_dir) / "model.pth"
    check_target(out, gguf_file)
    config = read_config(metadata, tensors)
    files = convert_tokenizer(metadata)
    metadata.finish()
    for name in (*FILES, "additional_chat_templates"):
        if name not in (*files, "config.json") and (out.parent / name).exists():
            raise ValueError(f"{out.parent} has the {name} of another model; give another --out_dir, or remove it")
    state_dict = convert_weights(tensors, config, gguf_file)

    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    for name, text in files.items():
        (out.parent / name).write_text(text, encoding="utf-8")
    write_checkpoint(out, config, state_dict)
    return out


def main(args) -> None:
    out = convert(args.gguf, args.out_dir)
    print(f"Wrote {out} ({out.stat().st_size / 1e6:.0f} MB, float32) with its tokenizer.")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Convert a GGUF file of the llama architecture.")
    parser.add_argument("--gguf", required=True, help="the .gguf file")
    parser.add_argument("--out_dir", required=True, help="folder for model.pth and the tokenizer's files")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main, parse_arguments())
