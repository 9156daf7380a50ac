"""Text to token ids and back, and chat messages to text, from the files that a model is published with.

`load_tokenizer(folder)` reads tokenizer.json (Llama 3, Qwen, GPT-2, SmolLM2) or, only where there is none,
tokenizer.model (Llama 2, Mistral). Notable decisions:

- tokenizer.json is used as it is written: its own post-processor says whether a BOS is added, not `add_bos_token`.
- Plain text under tokenizer.model gets exactly sentencepiece's ids. transformers 5 differs where a text begins with
  a space or holds two in a row.
- Special tokens written in a text become their ids. A rendered chat has its own, so encode it with `bos=False`.
- Flags of an added token (`lstrip` and the others) are those of tokenizer_config.json's `added_tokens_decoder`, then
  those of tokenizer.json, then those where the token is named, as in transformers 5.
- Decoding joins the bytes of the tokens and reads them as UTF-8. `decode` is a `Stream` run to its end, so what is
  printed token by token is the same text.

Copy me: this file alone, with `tokenizers` (tokenizer.json) or `sentencepiece` (tokenizer.model) installed, and
`jinja2` for chats; each is imported only where it is used.
"""

import codecs
import json
import math
import re
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import zip_longest
from pathlib import Path

# The files that are read.
FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "config.json", "chat_template.jinja", "chat_template.json"),
)

# In a byte-level tokenizer.json each byte is one character: "Ġ" is a space. Printable bytes are themselves, the other
# 68 are numbered from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(HIDDEN)}
# What a tokenizer.json made from a sentencepiece model does to its pieces; Gemma's has no Strip.
FIRST_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
SPACES = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
SENTENCEPIECE_STEPS = [SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}, FIRST_SPACE]
# Special tokens of gpt-oss's chats, which are messages in channels.
CHANNEL_MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
# Whether an added token is left out of decoded text, takes the spaces on its left or right with it, is found in the
# middle of a word, and is looked for in the text as the normalizer leaves it.
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


def load_tokenizer(directory, model_size=math.inf):
    """The tokenizer in a model's folder (str or Path). model_size: the tokens that the model has an embedding for.

    Beside it, tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json, config.json,
    chat_template.jinja, chat_template.json and additional_chat_templates/ are read where they exist. Raises
    FileNotFoundError when there is no tokenizer, ValueError when a file is damaged or of a kind that is not known here.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        return JsonTokenizer(directory, model_size)
    if (directory / "tokenizer.model").is_file():
        return SentencePieceTokenizer(directory, model_size)
    lacks = f"{directory} has neither tokenizer.json nor tokenizer.model"
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():  # OPT
        make = f"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained({str(directory)!r})"
        raise FileNotFoundError(f'{lacks}: make one with python -c "{make}.save_pretrained({str(directory)!r})".')
    raise FileNotFoundError(f"{lacks}: copy the model's one there.")


def find_tokenizer(folder, vocab_size, needed):
    """The tokenizer in the folder of a model of `vocab_size` tokens, or None if there is none and none is `needed`.

    Raises ValueError if it is another model's. Added tokens alone may have ids past the model's: somebody added a
    "[PAD]" for a training, which never comes up in a prompt. `encode` refuses a text in which it does.
    """
    try:
        tokenizer = load_tokenizer(folder, vocab_size)
    except FileNotFoundError:
        if needed:
            raise
        return None
    if tokenizer.learned_size > vocab_size:
        sizes = f"{tokenizer.learned_size} tokens, the model {vocab_size}"
        raise ValueError(f"the tokenizer in {folder} has {sizes}; put the model's own tokenizer there")
    return tokenizer


def check_vocabulary(tokenizer, other, name="the draft model"):
    """Raises ValueError if an id is another token in `other`, the tokenizer of the model that `name` stands for."""
    ours, theirs = ([t.piece(id) for id in range(t.vocab_size)] for t in (tokenizer, other))
    for id, (mine, piece) in enumerate(zip_longest(ours, theirs)):
        if mine != piece:
            difference = f"its token {id} is {piece!r}, the model's {mine!r}"
            raise ValueError(f"{name} has another vocabulary: {difference}; take one with the same tokenizer")


class Tokenizer:
    """What both kinds share: checks, decoding, chats and the tokens with a name.

    A kind sets vocab_size (largest id + 1, added tokens included, at most model_size), learned_size (the same without
    added tokens and without that limit), special_ids, drops_first_space, and the functions to_ids (what `encode` does
    without its checks), token_id (str -> int or None), piece (int -> str or None) and piece_bytes (str -> bytes).
    """

    def __init__(self, directory, model_size):
        self.directory, self.model_size = directory, model_size
        self.config = read_json(directory / "tokenizer_config.json")
        named = self.config
        if "added_tokens_decoder" not in named:  # else the older file may be stale: transformers skips it too
            named = named | read_json(directory / "special_tokens_map.json")
        tokens = {
            name: token
            for name, token in named.items()
            if name in ("bos_token", "eos_token") or (name.endswith("_token") and isinstance(token, (str, dict)))
            if token is not None  # nor is "add_bos_token": true a token
        }
        extra = named.get("extra_special_tokens") or named.get("additional_special_tokens") or []
        if isinstance(extra, dict):  # {"image_token": "<image>"}
            tokens, extra = tokens | extra, []
        if not isinstance(extra, list):
            raise ValueError(f"{directory} has the special tokens {extra!r} where a list or an object of them belongs.")
        tokens = {name: self.read_token(token) for name, token in tokens.items()}
        self.named_tokens = {name: token["content"] for name, token in tokens.items()}
        special = [*map(self.read_token, extra), *tokens.values()]
        self.special_tokens = {token["content"]: token | {"special": True} for token in special if token["content"]}
        self.added_tokens = self.read_added_tokens()

    def read_token(self, token):
        """A token, named as "</s>" or as {"content": "</s>", "rstrip": true, ...} -> {"content": str, flag: bool}."""
        token = {"content": token} if isinstance(token, str) else token
        text = token.get("content") if isinstance(token, dict) else None
        if isinstance(text, str) and not re.search("[\ud800-\udfff]", text):  # halves of a pair are not UTF-8
            flags = {name: token[name] for name in FLAGS if name in token}
            if all(isinstance(flag, bool) for flag in flags.values()):
                return {"content": text, **flags}
        raise ValueError(
            f"The tokenizer's files in {self.directory} name {token!r} as a token: it has to be a text, "
            'or an object with the text as "content" and true or false for each flag.'
        )

    def read_added_tokens(self):
        """{id: token} in the order of ids, from tokenizer_config.json, or where that has no table the older file."""
        if "added_tokens_decoder" in self.config:
            table = self.config["added_tokens_decoder"] or {}
        else:
            older = read_json(self.directory / "added_tokens.json")
            table = {str(id): self.special_tokens.get(token, token) for token, id in older.items()}
        if not isinstance(table, dict) or not all(map(str.isdecimal, table)):
            raise ValueError(f"The added tokens in {self.directory} are no table of tokens by id: download it again.")
        return {int(id): self.read_token(table[id]) for id in sorted(table, key=int)}

    @property
    def bos_id(self):
        """int, or None when the files name no BOS token."""
        return self.token_id(self.named_tokens.get("bos_token", ""))

    @cached_property
    def eos_ids(self):
        """frozenset of every id that ends an answer: the tokenizer's EOS and those of generation_config.json.

        Where there is no generation_config.json, config.json stands in for it; else it may be stale. Ids that the model
        does not have are left out. Raises ValueError when what stands there is no id.
        """
        file = self.directory / "generation_config.json"
        if not file.is_file():
            file = self.directory / "config.json"
        value = read_json(file).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(id) is int for id in ids):  # True is an int, too
            raise ValueError(f"{file} has the eos_token_id {value!r}: it has to be a whole number or a list of them.")
        named = self.token_id(self.named_tokens.get("eos_token", ""))
        return frozenset(id for id in [named, *ids] if id is not None and 0 <= id < self.model_size)

    def encode(self, text, bos=True):
        """text -> list of int. bos: add the special tokens that the tokenizer's files say to add, if any.

        Raises ValueError when the text is not UTF-8, or has a token that the model has no embedding for.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place = f"its character {error.start + 1} is {text[error.start]!r}, half of a pair"
            raise ValueError(f"the text is not UTF-8: {place}; remove it") from error
        ids = self.to_ids(text, bos)
        if max(ids, default=0) >= self.model_size:
            token = f"{self.piece(max(ids))!r}, token {max(ids)}"
            raise ValueError(f"the text has {token}, but the model has {self.model_size} tokens; remove it")
        return ids

    def token_bytes(self, id):
        """The bytes of one token: none for a special token, or for an id that only pads the model's vocabulary."""
        piece = None if id in self.special_ids else self.piece(id)
        return b"" if piece is None else self.piece_bytes(piece)

    def decode(self, ids):
        """ids (iterable of int) -> str, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join([stream.push(id) for id in ids]) + stream.finish()

    def stream(self):
        """A new `Stream`, which decodes ids one at a time."""
        return Stream(self)

    def answer_stream(self, prompt_ids):
        """A new `Stream` of a chat's answer to a rendered prompt; of an answer in channels the last one's text."""
        if not {self.token_id(mark) for mark in CHANNEL_MARKS} <= self.special_ids:
            return Stream(self)
        stream = ChannelStream(self)
        for id in prompt_ids:
            stream.push(id)
        return stream

    def render_chat(self, messages, answer_next=True, tools=None):
        """messages: list of {"role": str, "content": str} -> str, the prompt up to where the answer begins.

        Without `answer_next` it ends with the last message, as for training on an answer that is among them. `tools`, a
        list of JSON schemas, goes to the template, as in transformers.

        Raises ValueError when the model has no chat template, or when the template refuses the messages.
        """
        import jinja2

        template = self.chat_template()
        values = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": answer_next}
        try:
            return compile_template(template).render(self.named_tokens | values)
        except jinja2.TemplateSyntaxError as error:
            place = f"The chat template in {self.directory} is damaged in line {error.lineno}"
            raise ValueError(f"{place} ({error.message}): download it again.") from error
        except Exception as error:  # the sandbox lets through whatever a template raises: 1/0, endless recursion, ...
            reason = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            reason = " ".join(reason.split()).removesuffix(":")  # MemoryError has no words of its own
            raise ValueError(f"The chat template in {self.directory} refuses these messages: {reason}") from error

    def chat_template(self):
        """The model's own template as str. Raises ValueError when it has none, or no default one, or is damaged.

        Files come before tokenizer_config.json, which has one template, or several by name: {"default": "...", ...}.
        Last comes chat_template.json, which models of text and images had.
        """
        config = self.directory / "tokenizer_config.json"
        files = {"default": self.directory / "chat_template.jinja"}
        files |= {file.stem: file for file in (self.directory / "additional_chat_templates").glob("*.jinja")}
        template = {name: file for name, file in files.items() if file.is_file()} or self.config.get("chat_template")
        if template is None:
            config = self.directory / "chat_template.json"
            template = read_json(config).get("chat_template")
        if isinstance(template, list):
            try:
                template = {entry["name"]: entry["template"] for entry in template}
            except (TypeError, KeyError) as error:
                raise ValueError(f"A chat template in {config} has no name or no text: download it again.") from error
        if isinstance(template, dict):
            if template and "default" not in template:
                names = ", ".join(sorted(map(str, template)))
                raise ValueError(
                    f"{self.directory} has chat templates called {names} and none called default: "
                    "save the one to use as chat_template.jinja there."
                )
            template = template.get("default")
        if template is None:
            raise ValueError(f"{self.directory} has no chat template: use a plain prompt, or the model's chat version.")
        if isinstance(template, Path):
            try:
                return template.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{template} is not UTF-8 ({error}): download it again.") from error
        if not isinstance(template, str):
            kind = type(template).__name__
            raise ValueError(f"The chat template in {config} is a JSON {kind} where a text belongs: download it again.")
        return template


class JsonTokenizer(Tokenizer):
    """tokenizer.json, through the tokenizers library."""

    def __init__(self, directory, model_size):
        import tokenizers

        super().__init__(directory, model_size)
        file = directory / "tokenizer.json"
        decoder = read_json(file).get("decoder")
        steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else None
        steps = steps if isinstance(steps, list) else []
        byte_level = [isinstance(step, dict) and step.get("type") for step in steps] == ["ByteLevel"]
        if not steps or not (byte_level or all(step in SENTENCEPIECE_STEPS for step in steps)):
            raise ValueError(f"{file} asks for a decoder that tokenizer.py does not have: {decoder}.")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{file} cannot be read ({error}): download it again or upgrade tokenizers.") from error
        # Some files carry the limits of a training run, and a prompt must be neither cut nor padded.
        self.backend.no_truncation()
        self.backend.no_padding()
        if getattr(self.backend.model, "dropout", None):  # of BPE, for training: other ids each time
            self.backend.model.dropout = None
        self.token_id = self.backend.token_to_id
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = {id for id, token in added.items() if token.special}
        # Adding a token again changes its flags: added_tokens_decoder may do that, the older files may not.
        known = {token.content for token in added.values()}
        again = "added_tokens_decoder" in self.config
        tokens = {t["content"]: t for t in self.added_tokens.values() if again or t["content"] not in known}
        for name, token in self.special_tokens.items():  # one without an id must not get a new one here
            if name not in known | tokens.keys() and self.token_id(name) is not None:
                tokens[name] = token
        self.backend.add_tokens([tokenizers.AddedToken(**token) for token in tokens.values()])
        added = self.backend.get_added_tokens_decoder()
        self.special_ids |= {id for id, token in added.items() if token.special or token.content in self.special_tokens}
        self.piece = self.backend.id_to_token
        self.piece_bytes = byte_level_bytes if byte_level else sentencepiece_bytes
        self.drops_first_space = FIRST_SPACE in steps
        learned = set(self.backend.get_vocab(with_added_tokens=False).values()) - added.keys()
        self.learned_size = max(learned, default=-1) + 1
        self.vocab_size = min(max(learned | added.keys(), default=-1) + 1, model_size)

    def to_ids(self, text, bos):
        try:
            return self.backend.encode(text, add_special_tokens=bos).ids
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"The tokenizer in {self.directory} has no tokens for this text ({error}).") from error


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model, through the sentencepiece library."""

    def __init__(self, directory, model_size):
        from sentencepiece import SentencePieceProcessor

        super().__init__(directory, model_size)
        file = directory / "tokenizer.model"
        model = file.read_bytes()
        try:
            self.start = SentencePieceProcessor(model_proto=model)
            # The same model without the space that it puts before a text. Protobuf messages merge when they are joined:
            # this is field 3 (normalizer_spec, 2 bytes), in it field 3 (add_dummy_prefix) = 0.
            self.inner = SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
        except RuntimeError as error:
            raise ValueError(
                f"{file} is not a sentencepiece model: download it again, or take the model's tokenizer.json "
                "(Llama 3's tokenizer.model is a tiktoken file)."
            ) from error
        if self.config.get("add_prefix_space") is False:
            self.start = self.inner
        self.drops_first_space = self.start.encode("a", out_type=str)[0].startswith("▁")
        for name, id in (("bos_token", self.start.bos_id()), ("eos_token", self.start.eos_id())):
            if id >= 0:  # -1: the model has none
                self.named_tokens.setdefault(name, self.start.id_to_piece(id))

        pieces = dict(enumerate(self.start.id_to_piece(list(range(len(self.start))))))
        control = {id for id in pieces if self.start.is_control(id) or self.start.is_unknown(id)}
        pieces |= {id: token["content"] for id, token in self.added_tokens.items()}
        self.special_ids = control | {id for id, token in self.added_tokens.items() if token.get("special")}
        self.special_ids |= {id for id, piece in pieces.items() if piece in self.special_tokens}
        # sentencepiece takes "</s>" or "[INST]" in a text for letters, so `encode` cuts the text at these first.
        self.cuts = {pieces[id]: id for id in self.special_ids | self.added_tokens.keys() if pieces[id]}
        plain = {pieces[id]: {"special": True} for id in control if self.start.is_control(id)}
        self.flags = self.special_tokens | plain | {token["content"]: token for token in self.added_tokens.values()}
        self.patterns = []  # the tokens that are not normalized come first, as in the tokenizers library
        for normalized in (False, True):
            flags = {piece: self.flags.setdefault(piece, {"special": True}) for piece in self.cuts}
            longest_first = sorted(flags, key=len, reverse=True)
            chosen = [p for p in longest_first if flags[p].get("normalized", not flags[p].get("special")) == normalized]
            if chosen:
                self.patterns.append(re.compile("|".join(map(re.escape, chosen))))
        self.token_id = self.cuts.get
        self.piece = pieces.get
        self.piece_bytes = sentencepiece_bytes
        self.learned_size = len(self.start)
        self.vocab_size = min(max(pieces) + 1, model_size)

    def cut(self, text, pattern):
        """text -> [plain text, id, plain text, id, ..., plain text], by the pattern's tokens and their flags."""
        parts, done = [], 0
        for match in pattern.finditer(text):
            (begin, end), flags = match.span(), self.flags[match[0]]
            if flags.get("single_word") and re.search(r"\w", text[max(begin - 1, 0) : begin] + text[end : end + 1]):
                continue
            plain = text[done:begin]
            parts += [plain.rstrip() if flags.get("lstrip") else plain, self.cuts[match[0]]]
            done = re.compile(r"\s*").match(text, end).end() if flags.get("rstrip") else end
        return [*parts, text[done:]]

    def to_ids(self, text, bos):
        # Where nothing is said, transformers 5 adds no BOS, though Llama 2 and Mistral were trained with one.
        ids = [self.bos_id] if bos and self.bos_id is not None and self.config.get("add_bos_token", True) else []
        parts = [text]
        for pattern in self.patterns:
            parts = [p for part in parts for p in (self.cut(part, pattern) if isinstance(part, str) else [part])]
        for i, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            elif part:
                # A text starts with a space that is not written; text after a special token only in "legacy" models.
                spaced = i == 0 or (self.config.get("legacy") and not part.startswith(" "))
                ids += (self.start if spaced else self.inner).encode(part)
        eos = self.token_id(self.named_tokens.get("eos_token", ""))
        if bos and eos is not None and self.config.get("add_eos_token"):
            ids.append(eos)
        return ids


class Stream:
    """Decodes one id at a time; the pieces joined are exactly `decode` of all the ids.

    At most 3 bytes are held back, so a push costs the same after any length. To print what follows a prompt, push the
    prompt's ids first and drop what they return: a stream that begins after them loses the space in between.
    `aside` is what the id pushed last has added to the model's reasoning, of which `push` returns nothing; `final` is
    False from where a model reasons to where its answer begins.
    """

    aside, final = "", True

    def __init__(self, tokenizer):
        self.token_bytes = tokenizer.token_bytes
        self.drop_space = tokenizer.drops_first_space
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id):
        """id: int -> str, the characters that are complete by now, often none."""
        data = self.token_bytes(id)
        if data and self.drop_space:
            data, self.drop_space = data.removeprefix(b" "), False
        return self.utf8.decode(data)

    def finish(self):
        """The end of the text: U+FFFD where it stops inside a character, else an empty str."""
        return self.utf8.decode(b"", final=True)


class ChannelStream(Stream):
    """A `Stream` of messages as gpt-oss writes them: `<|start|>ROLE<|channel|>NAME<|message|>TEXT<|end|>`.

    It returns the text of channel "final", and of a message that names no channel; that of others is `aside`.
    """

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.marks = {tokenizer.token_id(mark): mark for mark in CHANNEL_MARKS}
        self.channel, self.in_text = None, True  # the name that was read, of a message that has one

    @property
    def final(self):
        """bool, whether the next id belongs to the text of an answer."""
        return self.in_text and (self.channel is None or self.channel.split()[:1] == ["final"])

    def push(self, id):
        mark, text, self.aside = self.marks.get(id), super().push(id), ""
        if mark:
            if mark == "<|end|>" and self.in_text and not self.final:
                self.aside = "\n\n"
            self.channel = {"<|start|>": None, "<|channel|>": ""}.get(mark, self.channel)
            self.in_text = mark == "<|message|>"
            self.utf8.reset()
        elif self.final:
            return text
        elif self.in_text:
            self.aside = text
        elif self.channel is not None:
            self.channel += text
        return ""

    def finish(self):
        rest = super().finish()
        return rest if self.final else ""


@lru_cache(maxsize=4)  # of a long template this takes fifty times as long as to render it
def compile_template(text):
    """A chat template of jinja2, as transformers sets it up. Raises what jinja2 raises if it is damaged."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    # jinja2's own escapes HTML. The parameters, and their order, are those of transformers.
    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    # A template comes with the weights, from a stranger: hence the sandbox.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    # {% generation %}, which jinja2 lacks, marks the answers for training; what it encloses is rendered as it is.
    text = re.sub(r"({%[-+]?\s*)generation\b", r"\1with", text)
    return environment.from_string(re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endwith", text))


def read_json(file):
    """A file's JSON object as dict, {} without a file. Raises ValueError when the file is damaged."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or objects in objects without end
        raise ValueError(f"{file} is not JSON ({error}): it may be cut off, so download it again.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds a JSON {type(data).__name__} where an object belongs: download it again.")
    return data


def byte_level_bytes(piece):
    """ "Ġthe" -> b" the"; an added token such as "<｜User｜>" is written plainly."""
    if all(character in BYTE_OF for character in piece):
        return bytes(BYTE_OF[character] for character in piece)
    return piece.encode()


def sentencepiece_bytes(piece):
    """ "▁the" -> b" the"; "<0xE4>", one byte of a character that no piece has -> b"\\xe4"."""
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()
