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
from itertools import product
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

from sentencepiece import SentencePieceProcessor  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from tokenizer import check_vocabulary, compile_template, find_tokenizer, load_tokenizer

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
# A template of gpt-oss's kind: messages in channels, macros that call themselves, what callers may leave out.
HARMONY = """{#- Types of tools -#}
{%- macro type_of(spec, depth=0) -%}
    {%- if spec.type == "array" -%}{{- type_of(spec["items"], depth + 1) + "[]" -}}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string -%}
        {{- spec.type | join(" | ") }}
    {%- else -%}{{- spec.type | tojson }}
    {%- endif -%}
{%- endmacro -%}
{%- macro about() -%}
    {%- if effort is not defined %}{%- set effort = "medium" %}{%- endif %}
    {{- "Year: " + strftime_now("%Y") + "\n\nReasoning: " + effort + "\n" }}
    {%- set found = namespace(tools=false) %}
    {%- for tool in built_in %}{%- set found.tools = true %}{%- endfor %}
    {%- if tools or found.tools -%}{{- type_of({"type": "array", "items": {"type": ["a", "b"]}}) }}{%- endif -%}
    {{- type_of({"type": "array", "items": {"type": ["a", "b"]}}) }}
{%- endmacro -%}
{{- "<|start|>system<|message|>" }}
{{- about() }}
{{- "<|end|>" }}
{%- set rest = messages[1:] if messages[0].role == "system" else messages %}
{%- set last = namespace(name=none) %}
{%- for message in rest -%}
    {%- if message.role == "assistant" -%}
        {%- if "content" in message and "<|channel|>" in message.content %}
            {{- raise_exception("channels do not belong into " + message.content | tojson) }}
        {%- endif %}
        {%- set later = namespace(found=false) %}
        {%- for other in rest[loop.index:] %}{%- if other.role == "assistant" %}{%- set later.found = true %}
        {%- endif %}{%- endfor %}
        {%- if "thinking" in message and not later.found %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content }}
        {{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" }}
        {%- set last.name = none %}
    {%- elif message.role == "user" -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}

{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}
"""
HARMONY_TOKENS = ["<|endoftext|>", "<|return|>", "<|call|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>"]
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


def edit_json(folder, change):
    """Let `change` alter what is in the folder's tokenizer.json."""
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    write_json(folder / "tokenizer.json", data)


FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
NAMES = [f"<T{number}>" for number in range(2 ** len(FLAGS))]


def flagged(shift=0):
    """A token for each combination of flags; another `shift` gives the same tokens other flags."""
    values = list(product([False, True], repeat=len(FLAGS)))
    return [
        {"content": name, **dict(zip(FLAGS, values[(i + shift) % len(values)], strict=True))}
        for i, name in enumerate(NAMES)
    ]


def flagged_texts(double_spaces):
    texts = [f"{name} a{name}b {name} \n{name}\t c \n{name}{name} {name.lower()} É{name}" for name in NAMES]
    texts += [f"x {one} {two}\n {one}+ a" for one, two in zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)]
    return texts + [text.replace(" ", "  ") for text in texts if double_spaces]


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


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("where", ["tokenizer.json", "table", "both", "older table"])
def test_flags_of_added_tokens_give_the_ids_of_transformers(tmp_path, lowercase, where):
    """Where both files have a token, tokenizer_config.json's flags count; naming a token changes none."""
    folder = json_folder(tmp_path)
    first = byte_level_bpe("llama3").get_vocab_size()
    table = {first + i: token for i, token in enumerate(flagged(5 if where == "both" else 0))}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": NAMES[9], "pad_token": NAMES[31]}
    config["extra_special_tokens"] = NAMES[20:24]
    if where in ("table", "both"):
        config["added_tokens_decoder"] = table
    write_json(folder / "tokenizer_config.json", config)
    if where == "older table":
        write_json(folder / "added_tokens.json", {token["content"]: id for id, token in table.items()})

    def change(data):
        data["normalizer"] = {"type": "Lowercase"} if lowercase else None
        if where in ("tokenizer.json", "both"):
            data["added_tokens"] += [{"id": first + i} | token for i, token in enumerate(flagged())]

    edit_json(folder, change)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in flagged_texts(double_spaces=True):
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert ids == file.encode(text).ids or where != "tokenizer.json"
    assert len({id for text in flagged_texts(False) for id in ours.encode(text) if id >= first}) == len(NAMES)


def test_flags_of_a_token_that_is_only_named_count(tmp_path):
    named = {"__type": "AddedToken", "content": "b", "lstrip": True, "rstrip": True}
    for number, config in enumerate([{"eos_token": named}, {"extra_special_tokens": {"image_token": named}}]):
        folder = json_folder(tmp_path / str(number), **config)
        ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        ids = theirs("a  b \n c").input_ids
        assert ours.encode("a  b \n c") == ids and len(ids) == 4
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "ac"
    folder = json_folder(tmp_path / "map")
    edit_json(folder, lambda data: data["added_tokens"][2].update(rstrip=True))
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>", "lstrip": True}})
    expected = AutoTokenizer.from_pretrained(folder)("a <|im_end|> b").input_ids
    assert load_tokenizer(folder).encode("a <|im_end|> b") == expected and len(expected) == 5


def test_special_tokens_of_the_config_may_have_names_of_their_own(tmp_path):
    template = "{{ image_token }}{{ eos_token }}"
    folder = json_folder(tmp_path, extra_special_tokens={"image_token": "Q"}, chat_template=template)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode("aQb")
    assert ids == theirs("aQb").input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "ab"
    assert ours.render_chat(MESSAGES) == rendered_by_transformers(folder) == "Q<|im_end|>"


def test_dropout_left_in_the_file_is_off(tmp_path):
    folder = json_folder(tmp_path)
    expected = load_tokenizer(folder).encode(TEXTS[1])
    edit_json(folder, lambda data: data["model"].update(dropout=0.5))
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXTS[1]).ids != expected
    assert [load_tokenizer(folder).encode(TEXTS[1]) for _ in range(3)] == [expected] * 3


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


@pytest.mark.parametrize("legacy", [False, True])
def test_tokenizer_model_with_flags_of_added_tokens_has_the_ids_of_transformers(tmp_path, legacy):
    table = {32768 + i: token for i, token in enumerate(flagged())}
    table[32768 + len(NAMES)] = {"content": f"{NAMES[0]}+", "normalized": True}  # looked for after NAMES[0]
    table[32769 + len(NAMES)] = {"content": f"{NAMES[2]}+", "normalized": False}  # before NAMES[2]
    table[2] = {"content": "</s>", "lstrip": True, "rstrip": True, "special": True}
    folder = model_folder(tmp_path, legacy=legacy, added_tokens_decoder=table)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in [*flagged_texts(double_spaces=False), "a </s>\n b </s>c"]:
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)


def test_flags_in_the_older_map_do_not_reach_the_models_own_special_tokens(tmp_path):
    strip = {"lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
    folder = model_folder(tmp_path)
    tokens = {"eos_token": {"content": "</s>", **strip}, "pad_token": {"content": "hello", **strip}}
    write_json(folder / "special_tokens_map.json", tokens)
    text = "a </s> b hello c"
    assert load_tokenizer(folder).encode(text) == AutoTokenizer.from_pretrained(folder)(text).input_ids


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


def test_eos_ids_are_the_tokenizers_and_those_of_generation_config(tmp_path):
    folder = json_folder(tmp_path, bos_token={"content": "<|endoftext|>", "lstrip": False})
    write_json(folder / "config.json", {"eos_token_id": 9})
    end = SPECIAL.index("<|im_end|>")
    assert load_tokenizer(folder).eos_ids == {9, end}
    write_json(folder / "generation_config.json", {"eos_token_id": [7, 8, 900]})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids is tokenizer.eos_ids  # asked once per token, so the files are read once
    assert tokenizer.eos_ids == {7, 8, 900, end} and tokenizer.bos_id == 0  # config.json is stale, as in transformers
    assert find_tokenizer(folder, 600, needed=True).eos_ids == {7, 8, end}
    for silent in ({}, {"eos_token_id": None}, {"eos_token_id": []}, {"eos_token_id": -1}):
        write_json(folder / "generation_config.json", silent)
        assert load_tokenizer(folder).eos_ids == {end}


@pytest.mark.parametrize("value", ["2", 2.0, True, [[2]], [2, None], {"id": 2}])
def test_an_end_token_that_is_no_id_is_refused(tmp_path, value):
    folder = json_folder(tmp_path)
    write_json(folder / "generation_config.json", {"eos_token_id": value})
    with pytest.raises(ValueError, match="generation_config.json has the eos_token_id"):
        _ = load_tokenizer(folder).eos_ids


@pytest.mark.parametrize("folder", [json_folder, model_folder])
def test_added_tokens_may_be_past_the_model_and_others_may_not(tmp_path, folder):
    size = load_tokenizer(folder(tmp_path / "plain")).learned_size
    table = {size + 5 if folder is json_folder else size: {"content": "[PAD]", "special": True}}
    other = folder(tmp_path / "padded", added_tokens_decoder=table)
    size = load_tokenizer(other).vocab_size - 1  # of the model: [PAD] is the one token that it does not have
    tokenizer = find_tokenizer(other, size, needed=True)
    assert tokenizer.vocab_size == size and tokenizer.decode(tokenizer.encode("abc")) == "abc"
    with pytest.raises(ValueError, match=rf"has '\[PAD\]', token {size}, but the model has {size} tokens; remove it"):
        tokenizer.encode("abc[PAD]")
    check_vocabulary(find_tokenizer(tmp_path / "plain", size, needed=True), tokenizer)
    with pytest.raises(ValueError, match=rf"another vocabulary: its token {size} is '\[PAD\]', the model's None"):
        check_vocabulary(load_tokenizer(tmp_path / "plain"), load_tokenizer(other))
    with pytest.raises(ValueError, match="put the model's own tokenizer there"):
        find_tokenizer(other, tokenizer.learned_size - 1, needed=True)
    assert find_tokenizer(tmp_path, size, needed=False) is None
    with pytest.raises(FileNotFoundError):
        find_tokenizer(tmp_path, size, needed=True)


@pytest.mark.parametrize("folder", [json_folder, model_folder])
def test_half_a_surrogate_pair_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"the text is not UTF-8: its character 3 is '\\ud83d'"):
        load_tokenizer(folder(tmp_path)).encode("ab\ud83d")


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
    write_json(folder / "tokenizer_config.json", {"chat_template": {"rag": "no", "default": "object"}})
    assert load_tokenizer(folder).render_chat(MESSAGES) == rendered_by_transformers(folder) == "object"
    write_json(folder / "chat_template.json", {"chat_template": "of a processor"})
    assert load_tokenizer(folder).render_chat(MESSAGES) == rendered_by_transformers(folder) == "object"
    write_json(folder / "tokenizer_config.json", {})
    assert load_tokenizer(folder).render_chat(MESSAGES) == "of a processor"
    (folder / "chat_template.jinja").write_text("{{ messages[0].role }} 文", encoding="utf-8")
    assert load_tokenizer(folder).render_chat(MESSAGES) == rendered_by_transformers(folder) == "user 文"
    (more := folder / "additional_chat_templates").mkdir()
    (more / "rag.jinja").write_text("no")
    assert load_tokenizer(folder).render_chat(MESSAGES) == rendered_by_transformers(folder) == "user 文"
    (more / "default.jinja").write_text("folder")
    assert load_tokenizer(folder).render_chat(MESSAGES) == rendered_by_transformers(folder) == "folder"


def test_named_templates_without_a_default_are_listed(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "y"}]
    for number, templates in enumerate([named, {"tool_use": "x", "rag": "y"}]):
        folder = json_folder(tmp_path / str(number), chat_template=templates)
        with pytest.raises(ValueError, match="rag, tool_use and none called default: save the one to use as chat_temp"):
            load_tokenizer(folder).render_chat(MESSAGES)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (5, "is a JSON int where a text belongs"),
        ({"default": ["x"]}, "is a JSON list where a text belongs"),
        ([{"template": "x"}], "has no name or no text"),
        (["x"], "has no name or no text"),
        ([], "has no chat template"),
        ({}, "has no chat template"),
    ],
)
def test_a_chat_template_of_an_odd_form_is_refused(tmp_path, template, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_tokenizer(json_folder(tmp_path, chat_template=template)).render_chat(MESSAGES)


def test_a_chat_template_is_compiled_once_until_it_changes(tmp_path):
    tokenizer = load_tokenizer(json_folder(tmp_path))
    for word in ("first", "second"):
        (tmp_path / "chat_template.jinja").write_text(f"{word} {{{{ tools | tojson }}}} {{{{ messages | length }}}}")
        before = compile_template.cache_info().misses
        assert [tokenizer.render_chat([{}] * n, tools=[n]) for n in (1, 2)] == [f"{word} [1] 1", f"{word} [2] 2"]
        assert compile_template.cache_info().misses == before + 1


def test_a_chat_template_that_is_not_utf_8_is_named(tmp_path):
    (json_folder(tmp_path) / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="chat_template.jinja is not UTF-8"):
        load_tokenizer(tmp_path).render_chat(MESSAGES)


TOJSON = ["ensure_ascii=False", "ensure_ascii=True", "True", "indent=2, sort_keys=True", "separators=(',', ':')"]


@pytest.mark.parametrize("options", TOJSON)
def test_tojson_takes_the_options_of_transformers(tmp_path, options):
    folder = json_folder(tmp_path, chat_template=f"{{{{ messages | tojson({options}) }}}}")
    assert load_tokenizer(folder).render_chat(MESSAGES) == rendered_by_transformers(folder)


def harmony_folder(folder):
    """A tokenizer that has gpt-oss's special tokens and a template of its kind."""
    json_folder(folder, eos_token="<|return|>", chat_template=None)
    backend = byte_level_bpe("gpt2")
    backend.add_special_tokens(HARMONY_TOKENS)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(HARMONY, encoding="utf-8")
    ends = [backend.token_to_id(token) for token in HARMONY_TOKENS[:3]]
    write_json(folder / "generation_config.json", {"eos_token_id": ends})
    return folder


@pytest.mark.parametrize("answer_next", [True, False])
def test_a_template_of_gpt_oss_kind_is_rendered_as_by_transformers(tmp_path, answer_next):
    folder = harmony_folder(tmp_path)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    thought = {"role": "assistant", "content": "Ada", "thinking": "Who am I? <b>"}
    system = {"role": "system", "content": "Be brief."}
    for chat in (MESSAGES, [system, *MESSAGES[:1], thought], [*MESSAGES[:1], thought, *MESSAGES], [system]):
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer_next)
        assert ours.render_chat(chat, answer_next) == expected
        assert ours.encode(expected, bos=False) == theirs(expected, add_special_tokens=False).input_ids
    with pytest.raises(ValueError, match="channels do not belong"):
        ours.render_chat([{"role": "assistant", "content": "<|channel|>"}])


def test_the_special_tokens_of_gpt_oss_and_its_three_ends(tmp_path):
    tokenizer = load_tokenizer(harmony_folder(tmp_path))
    ids = {token: tokenizer.token_id(token) for token in HARMONY_TOKENS}
    assert set(ids.values()) <= tokenizer.special_ids and None not in ids.values()
    assert tokenizer.eos_ids == {ids["<|endoftext|>"], ids["<|return|>"], ids["<|call|>"]}


def heard(tokenizer, prompt, text):
    """(what an answer says, what its model thinks beside) of a text with special tokens."""
    stream = tokenizer.answer_stream(tokenizer.encode(prompt, bos=False))
    said, aside = "", ""
    for id in tokenizer.encode(text, bos=False):
        said, aside = said + stream.push(id), aside + stream.aside
    return said + stream.finish(), aside


@pytest.mark.parametrize(
    ("text", "said", "aside"),
    [
        (
            "<|channel|>analysis<|message|>Hm é?<|end|><|start|>assistant<|channel|>final<|message|>Yés",
            "Yés",
            "Hm é?\n\n",
        ),
        ("<|channel|>analysis<|message|>Hm<|end|>", "", "Hm\n\n"),
        ("<|channel|>analysis", "", ""),
        ("<|channel|>commentary json<|message|>{}<|end|><|start|>assistant<|message|>A", "A", "{}\n\n"),
        ("<|channel|>final <|channel|>final json<|message|>[1]", "[1]", ""),
        ("<|channel|>finally<|message|>x", "", "x"),
        ("<|message|>A", "A", ""),
    ],
)
def test_an_answer_in_channels_says_the_final_one(tmp_path, text, said, aside):
    tokenizer = load_tokenizer(harmony_folder(tmp_path))
    assert heard(tokenizer, "<|start|>user<|message|>Q<|end|><|start|>assistant", text) == (said, aside)


def test_half_a_character_of_the_reasoning_is_not_in_the_answer(tmp_path):
    tokenizer = load_tokenizer(harmony_folder(tmp_path))
    stream = tokenizer.answer_stream(tokenizer.encode("<|channel|>analysis<|message|>", bos=False))
    half = next(id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id) == b"\xc3")
    assert [stream.push(half), stream.finish(), stream.final] == ["", "", False]
    ids = tokenizer.encode("<|channel|>final<|message|>A", bos=False)
    assert "".join(map(stream.push, [half, *ids])) + stream.finish() == "A" and stream.final


def test_a_prompt_may_open_the_channel_and_a_chat_without_channels_is_plain(tmp_path):
    tokenizer = load_tokenizer(harmony_folder(tmp_path / "channels"))
    assert heard(tokenizer, "<|start|>assistant<|channel|>final<|message|>", "Yes") == ("Yes", "")
    assert heard(tokenizer, "Q", "Yes") == ("Yes", "")
    plain = load_tokenizer(json_folder(tmp_path / "plain"))
    assert heard(plain, "<|im_start|>assistant\n", "<|channel|>analysis<|message|>") == (
        "<|channel|>analysis<|message|>",
        "",
    )


def test_generation_marks_in_a_chat_template_are_passed_over(tmp_path):
    template = "{%- for m in messages %}\n  {%- generation -%}\n {{ m.content }}\n  {% endgeneration %}\nx{% endfor %}"
    template += "{% generation %}{% set y = 1 %}{{ y }}{% endgeneration %}[{{ y }}]"  # a scope of its own
    folder = json_folder(tmp_path, chat_template=template)
    assert load_tokenizer(folder).render_chat(MESSAGES) == rendered_by_transformers(folder)


def test_a_chat_that_cannot_be_rendered_is_refused(tmp_path):
    folder = json_folder(tmp_path, chat_template=None)
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer(folder).render_chat(MESSAGES)
    sentences = {
        "{{ raise_exception('roles\\nmust alternate') }}": "refuses these messages: roles must alternate$",
        "{% if": "is damaged in line 1",
        "\n{{ 1 | nofilter }}": "is damaged in line 2",
        "{{ x.y.z }}": "refuses these messages: 'x' is undefined",
        "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
        "{{ range(1000000) | list }}": "OverflowError: Range too big",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
        "{{ " + "(" * 500 + "1" + ")" * 500 + " }}": "RecursionError",
        "{% for i in [1] %}" * 25 + "{% endfor %}" * 25: "SyntaxError: too many statically nested blocks",
        "{{ 'a' * 10**18 }}": "refuses these messages: MemoryError$",
        "{{ messages[0].content * 10**18 }}": "OverflowError|MemoryError",
        "{{ '{x}'.format(1) }}": "KeyError: 'x'",
        "{{ 'a'.index('b') }}": "ValueError: substring not found",
        "{{ 'a' + 1 }}": "TypeError",
        "{% include 'x' %}": "TypeError",
        "{{ 'abc' | truncate(-5) }}": "AssertionError",
    }
    for template, sentence in sentences.items():
        write_json(folder / "tokenizer_config.json", {"chat_template": template})
        with pytest.raises(ValueError, match=sentence) as error:
            load_tokenizer(folder).render_chat(MESSAGES)
        assert "The chat template in" in str(error.value) and "\n" not in str(error.value)


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
    (tmp_path / "vocab.json").touch()
    (tmp_path / "merges.txt").touch()
    with pytest.raises(
        FileNotFoundError, match="make one with python -c .*AutoTokenizer.from_pretrained.*save_pretrain"
    ):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder = json_folder(tmp_path / name)
        text = (folder / name).read_text(encoding="utf-8")
        for damaged in (text[: len(text) // 2], "", "[]", "[" * 100_000):
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
    steps = ([other_space], [], None, ["x"])
    for decoder in ({"type": "WordPiece"}, None, "x", *({"type": "Sequence", "decoders": step} for step in steps)):
        write_json(folder / "tokenizer.json", {"decoder": decoder})
        with pytest.raises(ValueError, match="asks for a decoder that"):
            load_tokenizer(folder)
    folder = json_folder(tmp_path / "null")
    edit_json(folder, lambda data: data.update(model=None))
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        load_tokenizer(folder)
    edit_json(folder, lambda data: data.update(model={"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}))
    with pytest.raises(ValueError, match="has no tokens for this text"):
        load_tokenizer(folder).encode("b")
    for number, damaged in enumerate([(MISTRAL / MISTRAL_MODELS[0]).read_bytes()[:10_000], b"IQ== 0\nIg== 1\n", b""]):
        folder = model_folder(tmp_path / f"model{number}")
        (folder / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(ValueError, match="tokenizer.model is not a sentencepiece model"):
            load_tokenizer(folder)


@pytest.mark.parametrize("folder", [json_folder, model_folder])
def test_tokens_of_an_odd_form_are_refused(tmp_path, folder):
    """What a token may not be, where it is named and where it is listed by its id."""
    tokens = [5, ["</s>"], {"lstrip": True}, {"content": 5}, {"content": "</s>", "rstrip": "x"}, "\ud800"]
    settings = [{"eos_token": token} for token in tokens] + [{"additional_special_tokens": [t]} for t in tokens]
    settings += [{"extra_special_tokens": {"image_token": t}} for t in tokens]
    settings += [{"added_tokens_decoder": {"7": t}} for t in tokens]
    tables = [{"added_tokens_decoder": t} for t in ({"x": "a"}, {"-1": "a"}, {"1.5": "a"}, ["a"], "a")]
    lists = [{"additional_special_tokens": value} for value in ("a", 5)]
    files = folder(tmp_path)
    for config in settings + tables + lists:
        write_json(files / "tokenizer_config.json", config)
        with pytest.raises(ValueError, match="as a token: it has to be|are no table of tokens|where a list or an obj"):
            load_tokenizer(files)
    for config in ({"num_image_token": 256, "eos_token": None}, {"additional_special_tokens": None}):
        write_json(files / "tokenizer_config.json", config | {"added_tokens_decoder": None})
        assert load_tokenizer(files).encode("a", bos=False)


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
