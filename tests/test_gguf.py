"""scripts/convert_gguf_checkpoint.py against transformers, on a tiny file with q and k in llama.cpp's order of rows.

Two layers, two kv heads for four query heads, head_dim != dim / n_head, three tensor formats.
"""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from checkpoint import build_model, read_checkpoint
from scripts import convert_gguf_checkpoint as gguf_script
from scripts.convert_gguf_checkpoint import convert
from tokenizer import load_tokenizer

HEADS, KV_HEADS, HEAD_DIM, DIM, HIDDEN, VOCAB = 4, 2, 32, 64, 96, 320  # rows of a multiple of 32, Q8_0's block
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEXTS = [
    "In 2024, 1000 and 12,345",
    "naïve café, 東京 ½",
    "a  b\n\n c\t",
    "",
    "<|im_start|>user 42<|im_end|>",
    "x<tool>12",
]


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE that knows numbers as one token, and then is told to split them: so the splitting is seen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 1, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["In 2024, 1000 and 2024 and 12 in the café and user"] * 9, trainer)
    assert len(tokenizer.encode("1000").ids) < 4
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    split = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def make_metadata(tokenizer: Tokenizer) -> dict:
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.get)
    tokens += [f"<unused{i}>" for i in range(VOCAB - len(tokens))]
    merges = [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": DIM,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": HEAD_DIM,
        "llama.attention.value_length": HEAD_DIM,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 5000.0,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.vocab_size": VOCAB,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in CONTROL else 4 if t == "<tool>" else 1 for t in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def make_model(bias: bool, tie: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": DIM, "intermediate_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": 2}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    options = {"attention_bias": bias, "mlp_bias": bias, "tie_word_embeddings": tie, "rms_norm_eps": 1e-5}
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    config = LlamaConfig(**sizes, **heads, **options, rope_parameters=rope, max_position_embeddings=64)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=0.2).add_(1.0 if weight.ndim == 1 and not bias else 0.0)
    return model


NAMES = {"embed_tokens": "token_embd", "norm": "output_norm"}
NAMES |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
NAMES |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {"self_attn.o_proj": "attn_output"}
NAMES |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}


def gguf_name(name: str) -> str:
    module, _, kind = name.removeprefix("model.").rpartition(".")
    if module == "lm_head":
        return f"output.{kind}"
    if module.startswith("layers."):
        _, layer, module = module.split(".", 2)
        return f"blk.{layer}.{NAMES[module]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def interleave(array: np.ndarray) -> np.ndarray:
    """The rows of each head from 0 1 2 .. to 0 16 1 17 2 .., one by one: llama.cpp's order."""
    order = [i // 2 + (i % 2) * HEAD_DIM // 2 for i in range(HEAD_DIM)]
    return np.concatenate([array[head : head + HEAD_DIM][order] for head in range(0, len(array), HEAD_DIM)])


def make_tensors(model: LlamaForCausalLM) -> dict:
    """{GGUF name: (array as stored, format)}. The model's own weights become what the rounded ones stand for."""
    formats = gguf.GGMLQuantizationType
    tensors = {}
    for name, weight in model.named_parameters():
        format = formats.F32 if weight.ndim == 1 else formats.F16 if "embed" in name else formats.Q8_0
        rotated = "q_proj" in name or "k_proj" in name
        rounded = gguf.dequantize(gguf.quantize(weight.numpy(), format), format)
        weight.copy_(torch.tensor(rounded))
        tensors[gguf_name(name)] = gguf.quantize(interleave(rounded) if rotated else rounded, format), format
    return tensors


def write_gguf(path: Path, metadata: dict, tensors: dict, endianess=gguf.GGUFEndian.LITTLE) -> Path:
    writer = gguf.GGUFWriter(path, metadata["general.architecture"], endianess=endianess)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[list] = writer.add_array
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer's own
            add[type(value)](key, value)
    for name, (array, format) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=format)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture
def parts(tokenizer):
    """(metadata, tensors) of a file that converts."""
    return make_metadata(tokenizer), make_tensors(make_model(bias=False, tie=True))


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("bias, tie", [(False, True), (True, False)])
def test_logits_are_those_of_transformers(tokenizer, tmp_path, bias, tie, reference):
    theirs = make_model(bias, tie)
    path = write_gguf(tmp_path / "tiny.gguf", make_metadata(tokenizer), make_tensors(theirs))
    config, state_dict = read_checkpoint(convert(path, tmp_path / "out"))
    assert config.tie_embeddings == tie and config.qkv_bias == config.o_bias == config.mlp_bias == bias
    assert torch.equal(state_dict["transformer.h.1.attn.k_proj.weight"], theirs.model.layers[1].self_attn.k_proj.weight)
    ours = build_model(config, state_dict, "cpu", torch.float32, reference)
    idx = torch.randint(VOCAB, (2, 40))
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=1e-4)


def test_the_tokenizer_splits_digits_and_is_the_same_to_transformers(tokenizer, parts, tmp_path):
    convert(write_gguf(tmp_path / "tiny.gguf", *parts), tmp_path / "out")
    ours, theirs = load_tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert ours.encode(text) == tokenizer.encode(text).ids == theirs(text)["input_ids"]
    assert ours.decode(ours.encode("12 café x<tool>")) == "12 café x<tool>"
    assert ours.decode(ours.encode("<|im_start|>12")) == "12"
    messages = [{"role": "user", "content": "Hi"}]
    assert ours.render_chat(messages) == "<|im_start|>Hi<|im_end|>\n"
    assert ours.render_chat(messages) == theirs.apply_chat_template(messages, tokenize=False)
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, {theirs.eos_token_id}) == (1, {2})


def test_a_bos_token_is_added_where_the_file_says_so(tokenizer, parts, tmp_path):
    metadata, tensors = parts
    convert(write_gguf(tmp_path / "a.gguf", metadata | {"tokenizer.ggml.add_bos_token": True}, tensors), tmp_path)
    plain = tokenizer.encode("In 12").ids
    ours = load_tokenizer(tmp_path)
    assert (ours.encode("In 12"), ours.encode("In 12", bos=False)) == ([1, *plain], plain)
    assert AutoTokenizer.from_pretrained(tmp_path)("In 12")["input_ids"] == [1, *plain]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"general.architecture": "gemma"}, "general.architecture = 'gemma'"),
        ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type = 'linear'"),
        ({"llama.rope.dimension_count": 16}, "llama.rope.dimension_count = 16"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale"),
        ({"llama.block_count": None}, "lacks llama.block_count"),
        ({"llama.feed_forward_length": [HIDDEN, HIDDEN]}, "llama.feed_forward_length = [96, 96]"),
        ({"llama.attention.head_count": 0}, "n_head"),
        ({"llama.attention.head_count": "4"}, "llama.attention.head_count = '4'; it must be a whole number"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon = nan"),
        ({"llama.block_count": 2**32 - 1}, "numbers, where its config asks for at least"),
        ({"llama.vocab_size": 2**32 - 1, "llama.embedding_length": 2**32 - 4}, "where its config asks for far more"),
        ({"split.count": 3, "split.no": 0}, "one of 3 parts; put them together with llama.cpp's llama-gguf-split"),
        ({"split.count": 2, "split.no": 1, "general.architecture": ""}, "one of 2 parts"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model = 'llama'"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "tokenizer.ggml.pre = 'llama-bpe'"),
        ({"tokenizer.ggml.add_eos_token": True}, "tokenizer.ggml.add_eos_token = True"),
        ({"tokenizer.ggml.merges": None}, "lacks tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["a nowhere"]}, "merges"),
        ({"tokenizer.ggml.merges": [1, 2]}, "tokenizer.ggml.merges = [1, 2]; it must be a list, each a text"),
        ({"tokenizer.ggml.token_type": "1"}, "tokenizer.ggml.token_type = '1'"),
        ({"tokenizer.chat_template": 1}, "tokenizer.chat_template = 1; it must be a text"),
        ({"tokenizer.ggml.eos_token_id": VOCAB}, f"names {VOCAB} as eos_token"),
        ({"rope_freqs.weight": "token_embd.weight"}, "rope_freqs.weight"),
        ({"blk.1.ffn_up.weight": None}, "lacks the tensor blk.1.ffn_up.weight"),
        ({"blk.1.attn_q.weight": "blk.1.attn_k.weight"}, "blk.1.attn_q.weight in the shape"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(parts, tmp_path, change, said):
    """`change` sets a key, or makes a tensor another's copy; None takes it away."""
    metadata, tensors = parts
    for name, value in change.items():
        place = tensors if name.endswith(".weight") else metadata
        place[name] = tensors.get(value) if place is tensors else value
        if value is None:
            del place[name]
    path = write_gguf(tmp_path / "tiny.gguf", metadata, tensors)
    with pytest.raises(ValueError) as caught:
        convert(path, tmp_path / "out")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


ODD = ["", "x", 0, 1, 2**32 - 1, True, False, 1.5, -1.0, float("nan"), float("inf"), [1, 2], ["a"], [1.5]]


def test_odd_metadata_give_a_config_or_one_sentence(parts, tmp_path):
    metadata, tensors = parts
    path = write_gguf(tmp_path / "tiny.gguf", metadata, tensors)
    fields, read = gguf_script.read_gguf(path)
    for key in metadata.keys() - {"general.architecture"}:
        for value in [*ODD, []]:
            odd = gguf_script.Metadata(fields | {key: value}, path)
            try:
                config = gguf_script.read_config(odd, read)
                gguf_script.convert_tokenizer(odd)
                odd.finish()
                assert gguf_script.convert_weights(read, config, path).keys()
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 400, (key, value)


def test_one_part_of_one_is_a_whole_file(parts, tmp_path):
    metadata, tensors = parts
    split = {"split.count": 1, "split.no": 0, "split.tensors.count": len(tensors)}
    assert convert(write_gguf(tmp_path / "tiny.gguf", metadata | split, tensors), tmp_path / "out").is_file()


def test_a_big_endian_file_is_refused(parts, tmp_path):
    """The package reads its metadata right, and of its weights swapped bytes."""
    path = write_gguf(tmp_path / "tiny.gguf", *parts, gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match="is big-endian; turn it with gguf-convert-endian"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("version", "said"), [(1, "of GGUF's version 1"), (4, "version 4 which"), (0, "not a whole")])
def test_other_versions_are_refused_by_number(parts, tmp_path, version, said):
    path = write_gguf(tmp_path / "tiny.gguf", *parts)
    content = path.read_bytes()
    path.write_bytes(content[:4] + version.to_bytes(4, "little") + content[8:])
    with pytest.raises(ValueError, match=said):
        convert(path, tmp_path / "out")


def test_version_2_is_the_same(parts, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", *parts)
    expected = read_checkpoint(convert(path, tmp_path / "3"))
    content = path.read_bytes()
    path.write_bytes(content[:4] + (2).to_bytes(4, "little") + content[8:])
    config, state_dict = read_checkpoint(convert(path, tmp_path / "2"))
    assert config == expected[0] and all(torch.equal(t, expected[1][name]) for name, t in state_dict.items())


def test_a_place_that_cannot_be_written_is_refused_first(parts, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", *parts)
    (tmp_path / "out" / "model.pth").mkdir(parents=True)
    monkeypatch.setattr(gguf_script, "convert_weights", None)
    with pytest.raises(IsADirectoryError, match="model.pth is a folder"):
        convert(path, tmp_path / "out")


def test_a_folder_with_another_models_tokenizer_is_refused(parts, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", *parts)
    convert(convert(path, tmp_path).with_name("tiny.gguf"), tmp_path)  # its own files may be there
    (tmp_path / "chat_template.jinja").touch()
    monkeypatch.setattr(gguf_script, "convert_weights", None)
    with pytest.raises(ValueError, match="has the chat_template.jinja of another model; give another --out_dir"):
        convert(path, tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 20, 100, 3000, -40000, -1])
def test_a_cut_off_file_is_one_sentence(parts, tmp_path, kept):
    path = write_gguf(tmp_path / "tiny.gguf", *parts)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is not a whole GGUF file, download it again"):
        convert(path, tmp_path / "out")


def test_the_command_says_errors_on_one_line(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not GGUF")
    command = [sys.executable, "-m", "scripts.convert_gguf_checkpoint", "--gguf", tmp_path / "x.gguf"]
    root = Path(__file__).parents[1]
    run = subprocess.run([*command, "--out_dir", tmp_path / "out"], capture_output=True, text=True, cwd=root)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


def test_a_missing_file_or_package_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere.gguf"):
        convert(tmp_path / "nowhere.gguf", tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)  # makes the import fail
    with pytest.raises(ValueError, match="pip install -r scripts/requirements.txt"):
        convert(tmp_path / "nowhere.gguf", tmp_path)


def test_an_interrupted_run_leaves_no_model(parts, tmp_path, monkeypatch):
    path, out = write_gguf(tmp_path / "tiny.gguf", *parts), tmp_path / "out"
    convert(path, out)

    def interrupted(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(path, out)
    assert {file.name for file in out.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }
