"""tokenizer.py against transformers, sentencepiece and its own promises; offline, on tokenizers trained on the spot.

transformers reads a tokenizer.model only with protobuf installed. The real ones here come with mistral-common.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

from sentencepiece import SentencePieceProcessor  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from tokenizer import load_tokenizer  # noqa: E402

TEXTS = [
    "",
    "Hello, world! It's 2024; we'll pay 1234567.89 €.",
    " one leading space",
    "   three,  two inside and two at the end  ",
    "\n\n\tdef f(x):\n\t\treturn x ** 2  # tab\r\n",
    "Crème brûlée, naïve façade, Straße, Ångström",
    "cafe\u0301 against caf\u00e9",
    "今天天气很好，我们去公园吧。",
    "مرحبا بالعالم، كيف حالك؟",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "Съешь же ещё этих мягких французских булок",
    "👋🏽 family: 👩‍👩‍👧‍👦, flag: 🇩🇪, ❤️‍🔥",
]
MESSAGES = [{"role": "user", "content": " Wie heißt du? 👋 <b>"}, {"role": "assistant", "content": "Ada"}]
MESSAGES += [{"role": "user", "content": "And you?\n"}]
CHATML = (
    "{{ bos_token }}{% for message in messages %}\n    {% if message.role == 'skip' %}{% continue %}{% endif %}\n"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{{ messages | tojson }}{{ strftime_now('%Y') }}{% if tools is none %} no tools{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STYLES = ["gpt2", "llama3", "qwen2", "smollm2"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MISTRAL = Path(find_spec("mistral_common").origin).parent / "data"
MISTRAL_MODELS = ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]


def byte_level_bpe(style):
    """A tokenizer of 500 tokens or so with the pipeline of a well-known one."""
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style in ("gpt2", "smollm2"))
    if style in ("llama3", "qwen2"):
        split = LLAMA3_SPLIT.replace("{1,3}", "") if style == "qwen2" else LLAMA3_SPLIT
        byte_level = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), byte_level])
    if style == "smollm2":
        byte_level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if style == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_tokens(["<tool_call>", "<｜tool｜>"])
    if style == "llama3":
        backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    return backend


def write_json(file, value):
    file.write_text(json.dumps(value), encoding="utf-8")


def json_folder(folder, style="llama3", **config):
    folder.mkdir(parents=True, exist_ok=True)
    byte_level_bpe(style).save(str(folder / "tokenizer.json"))
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML}
    write_json(folder / "tokenizer_config.json", defaults | config)
    return folder


def model_folder(folder, model=MISTRAL_MODELS[1], **config):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(MISTRAL / model, folder / "tokenizer.model")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True} | config)
    return folder


def random_ids(tokenizer, count=400):
    """Ids that mean nothing: special tokens, halves of characters, and a few beyond the vocabulary."""
    return random.Random(0).choices(range(tokenizer.vocab_size + 5), k=count)


@pytest.mark.parametrize("style", STYLES)
def test_tokenizer_json_gives_the_ids_and_text_of_transformers(tmp_path, style):
    folder = json_folder(tmp_path, style, bos_token="<|endoftext|>")
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    special = ["<|im_start|>user\nHi<|im_end|>\n", "<|endoftext|> a<tool_call>{}<｜tool｜> b", "<|im_end|>"]
    for text in TEXTS + special + ["".join(TEXTS)]:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.encode(text, bos=False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for start in range(0, 400, 10):
        ids = random_ids(ours)[start : start + 10]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.render_chat(MESSAGES) == theirs.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("style", ["gpt2", "llama3"])
@pytest.mark.parametrize("add_bos_token", [True, False])
def test_the_post_processor_decides_about_bos_not_the_config(tmp_path, style, add_bos_token):
    folder = json_folder(tmp_path, style, bos_token="<|endoftext|>", add_bos_token=add_bos_token)
    ids = load_tokenizer(folder).encode("Hello")
    assert (ids[0] == 0) == (style == "llama3")
    assert ids == AutoTokenizer.from_pretrained(folder)("Hello").input_ids


def test_tokenizer_json_alone_is_enough(tmp_path):
    folder = json_folder(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]
    assert tokenizer.bos_id is None and tokenizer.eos_ids == frozenset()


def test_limits_written_in_tokenizer_json_do_not_cut_or_pad(tmp_path):
    folder = json_folder(tmp_path)
    expected = load_tokenizer(folder).encode(TEXTS[1])
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=100)
    backend.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode(TEXTS[1]) == expected


def test_a_token_that_only_the_config_calls_special_is_special(tmp_path):
    folder = json_folder(tmp_path, eos_token="<tool_call>", pad_token="[no id]")
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode("a<tool_call>b")
    assert ids == theirs("a<tool_call>b").input_ids and ours.decode(ids) == "ab"
    assert ours.vocab_size == Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()  # "[no id]" has none


@pytest.mark.parametrize("strip", [True, False])
def test_a_tokenizer_json_in_the_style_of_llama_2_agrees_with_sentencepiece(tmp_path, strip):
    """The same model in both formats; `strip` is the step that Gemma lacks."""
    reference = SentencePieceProcessor(model_file=str(MISTRAL / MISTRAL_MODELS[0]))
    vocab = {reference.id_to_piece(id): id for id in range(len(reference))}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps if strip else steps[:3])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer.decode([1, *reference.encode(text), 2]) == (text if strip or not text else " " + text)


@pytest.mark.parametrize("model", MISTRAL_MODELS)
def test_tokenizer_model_gives_plain_text_the_ids_of_sentencepiece(tmp_path, model):
    tokenizer = load_tokenizer(model_folder(tmp_path, model))
    reference = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in TEXTS + ["".join(TEXTS)]:
        assert tokenizer.encode(text) == [1, *reference.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(reference.encode(text)) == text


@pytest.mark.parametrize("model", MISTRAL_MODELS)
@pytest.mark.parametrize("legacy", [False, True, None])
@pytest.mark.parametrize("added", [False, True])
def test_special_tokens_in_text_have_the_ids_of_transformers(tmp_path, model, legacy, added):
    config = {} if legacy is None else {"legacy": legacy}
    size = len(SentencePieceProcessor(model_file=str(MISTRAL / model)))
    if added:
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
        tokens = {size: ("<|im_start|>", True), size + 1: ("<tool>", False), 1: ("<s>", True), 2: ("</s>", True)}
        tokens[size + 2] = ("<tool>+", False)  # longer than one that it begins with
        config["added_tokens_decoder"] = {id: {"content": t, "special": s} | flags for id, (t, s) in tokens.items()}
    folder = model_folder(tmp_path, model, **config)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["<s>[INST] Hi [/INST] Hello</s>", "</s>a</s> b</s>\nc", "x<unk>y <s> z", "[INST]नमस्ते[/INST]👋\n</s>\n"]
    texts += ["<|im_start|>user\n<tool>a<tool> b<tool>+c", "<|im_start|><|im_start|>"]
    # transformers 5.23 drops the first space of a text, and orders merges by id where these models score a run of
    # spaces last (-1e9). sentencepiece, and so the test above, knows better; here such texts are left out.
    for text in texts + [text for text in TEXTS if not text.startswith(" ") and "  " not in text]:
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.encode(text, bos=False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)
    assert ours.vocab_size == size + 3 * added


def test_added_tokens_json_works_like_the_newer_table(tmp_path):
    folder = model_folder(tmp_path)
    write_json(folder / "added_tokens.json", {"<|im_end|>": 32768, "<tool>": 32769})
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}})
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode("a<tool> b<|im_end|>")
    assert ids == theirs("a<tool> b<|im_end|>").input_ids and 32768 in ids and 32769 in ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "a<tool> b"
    assert ours.eos_ids == {32768} and ours.vocab_size == 32770


def test_tokenizer_model_alone_adds_bos_and_config_can_say_otherwise(tmp_path):
    folder = model_folder(tmp_path, add_bos_token=False, add_eos_token=True, add_prefix_space=False)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert load_tokenizer(folder).encode("Hello </s> you") == theirs("Hello </s> you").input_ids
    assert load_tokenizer(folder).decode(theirs(" Hello").input_ids) == " Hello"
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("Hello")[0] == tokenizer.bos_id == 1
    assert tokenizer.eos_ids == {2} and tokenizer.encode("Hello", bos=False) == tokenizer.encode("Hello")[1:]


def test_tokenizer_json_wins_where_both_are(tmp_path):
    folder = json_folder(tmp_path)
    expected = load_tokenizer(folder).encode(TEXTS[5])
    shutil.copy(MISTRAL / MISTRAL_MODELS[0], folder / "tokenizer.model")
    assert (
        load_tokenizer(folder).encode(TEXTS[5]) == expected == AutoTokenizer.from_pretrained(folder)(TEXTS[5]).input_ids
    )


@pytest.mark.parametrize("folder", [json_folder, model_folder])
def test_a_stream_is_decode_and_never_shows_half_a_character(tmp_path, folder):
    tokenizer = load_tokenizer(folder(tmp_path))
    for text in TEXTS + ["a</s> b<|im_end|> c", "".join(TEXTS)]:
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        pieces = [stream.push(id) for id in ids]
        assert stream.finish() == "" and "".join(pieces) == tokenizer.decode(ids)
        assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 50 and max(map(len, pieces[:50])) < 30  # it does stream
    ids = random_ids(tokenizer)
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


def test_a_stream_cut_inside_a_character_ends_in_a_mark(tmp_path):
    tokenizer = load_tokenizer(model_folder(tmp_path))
    ids = tokenizer.encode("ok 👋")  # 👋 is four byte tokens in this model
    stream = tokenizer.stream()
    assert [stream.push(id) for id in ids[-4:-1]] == ["", "", ""] and stream.finish() == "\ufffd"
    assert tokenizer.decode(ids[:-1]) == "ok \ufffd"


def test_a_stream_that_saw_the_prompt_keeps_the_space_after_it(tmp_path):
    tokenizer = load_tokenizer(model_folder(tmp_path))
    prompt, answer = tokenizer.encode("Hello"), tokenizer.encode("world", bos=False)
    stream = tokenizer.stream()
    shown = [stream.push(id) for id in prompt + answer]
    assert shown == ["", "Hello", " world"] and tokenizer.decode(answer) == "world"


def test_a_push_looks_at_one_token_only(tmp_path):
    tokenizer = load_tokenizer(json_folder(tmp_path))
    seen = []
    token_bytes = tokenizer.token_bytes
    tokenizer.token_bytes = lambda id: seen.append(id) or token_bytes(id)
    ids = random_ids(tokenizer, 2000)
    tokenizer.decode(ids)
    assert seen == ids


def test_eos_ids_unite_all_files(tmp_path):
    folder = json_folder(tmp_path, bos_token={"content": "<|endoftext|>", "lstrip": False})
    write_json(folder / "generation_config.json", {"eos_token_id": [7, 8]})
    write_json(folder / "config.json", {"eos_token_id": 9})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids is tokenizer.eos_ids  # asked once per token, so the files are read once
    assert tokenizer.eos_ids == {7, 8, 9, SPECIAL.index("<|im_end|>")} and tokenizer.bos_id == 0


def test_vocab_size_is_the_largest_id_plus_one(tmp_path):
    folder = json_folder(tmp_path)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == tokenizer.encode("<｜tool｜>")[-1] + 1 == len(AutoTokenizer.from_pretrained(folder))


def rendered_by_transformers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


def test_chat_templates_are_found_where_models_keep_them(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "list {{ eos_token }}"}]
    folder = json_folder(tmp_path, chat_template=named)
    assert load_tokenizer(folder).render_chat(MESSAGES) == rendered_by_transformers(folder) == "list <|im_end|>"
    (folder / "chat_template.jinja").write_text("{{ messages[0].role }} 文", encoding="utf-8")
    assert load_tokenizer(folder).render_chat(MESSAGES) == rendered_by_transformers(folder) == "user 文"


def test_generation_marks_in_a_chat_template_are_passed_over(tmp_path):
    template = "{%- for m in messages %}\n  {%- generation -%}\n {{ m.content }}\n  {% endgeneration %}\nx{% endfor %}"
    folder = json_folder(tmp_path, chat_template=template)
    assert load_tokenizer(folder).render_chat(MESSAGES) == rendered_by_transformers(folder)


def test_a_chat_that_cannot_be_rendered_is_refused(tmp_path):
    for number, template in enumerate(["{{ raise_exception('roles must alternate') }}", "{% if", "{{ x.y.z }}"]):
        folder = json_folder(tmp_path / str(number), chat_template=template)
        with pytest.raises(ValueError, match="roles must alternate" if number == 0 else "chat template"):
            load_tokenizer(folder).render_chat(MESSAGES)
    folder = json_folder(tmp_path / "none", chat_template=None)
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer(folder).render_chat(MESSAGES)


def test_a_chat_template_cannot_reach_out_of_the_sandbox(tmp_path):
    for number, escape in enumerate(["{{ ''.__class__.__mro__ }}x", "{{ messages.append(1) }}x"]):
        folder = json_folder(tmp_path / str(number), chat_template=escape)
        try:
            assert load_tokenizer(folder).render_chat([]) == "x"
        except ValueError as error:
            assert "chat template" in str(error)


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder = json_folder(tmp_path / name)
        text = (folder / name).read_text(encoding="utf-8")
        for damaged in (text[: len(text) // 2], "", "[]"):
            (folder / name).write_text(damaged, encoding="utf-8")
            with pytest.raises(ValueError, match=name):
                load_tokenizer(folder)
        (folder / name).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match=name):
            load_tokenizer(folder)
    (folder := tmp_path / "unknown").mkdir()
    write_json(folder / "tokenizer.json", {"decoder": {"type": "ByteLevel"}, "model": {"type": "from the future"}})
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        load_tokenizer(folder)
    other_space = {"type": "Replace", "pattern": {"String": "_"}, "content": " "}
    for decoder in ({"type": "WordPiece"}, {"type": "Sequence", "decoders": [other_space]}, None):
        write_json(folder / "tokenizer.json", {"decoder": decoder})
        with pytest.raises(ValueError, match="asks for a decoder .*(WordPiece|Replace|None)"):
            load_tokenizer(folder)
    for number, damaged in enumerate([(MISTRAL / MISTRAL_MODELS[0]).read_bytes()[:10_000], b"IQ== 0\nIg== 1\n", b""]):
        folder = model_folder(tmp_path / f"model{number}")
        (folder / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(ValueError, match="tokenizer.model is not a sentencepiece model"):
            load_tokenizer(folder)


@pytest.mark.parametrize("folder, unneeded", [(json_folder, "sentencepiece"), (model_folder, "tokenizers")])
def test_the_file_works_alone_and_imports_only_what_the_folder_needs(tmp_path, folder, unneeded):
    shutil.copy(Path(__file__).parent.parent / "tokenizer.py", tmp_path)
    expected = load_tokenizer(folder(tmp_path / "model")).encode("Hello 👋")
    script = f"""
import sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "jinja2", "{unneeded}"]))  # None: cannot be imported
from tokenizer import load_tokenizer
tokenizer = load_tokenizer("model")
assert tokenizer.encode("Hello 👋") == {expected}
assert tokenizer.decode({expected}) == "Hello 👋"
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-X", "utf8", "-c", script], cwd=tmp_path, env=environment, check=True)
