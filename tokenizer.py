"""Text to token ids and back, and chat messages to text, from the files that a model is published with.

`load_tokenizer(folder)` reads tokenizer.json (Llama 3, Qwen, GPT-2, SmolLM2) or, only where there is none,
tokenizer.model (Llama 2, Mistral). Notable decisions:

- tokenizer.json is used as it is written: its own post-processor says whether a BOS is added, not `add_bos_token`.
- Plain text under tokenizer.model gets exactly sentencepiece's ids. transformers 5 differs where a text begins with
  a space or holds two in a row.
- Special tokens written in a text become their ids. A rendered chat has its own, so encode it with `bos=False`.
- Decoding joins the bytes of the tokens and reads them as UTF-8. `decode` is a `Stream` run to its end, so what is
  printed token by token is the same text.

Copy me: this file alone, with `tokenizers` (tokenizer.json) or `sentencepiece` (tokenizer.model) installed, and
`jinja2` for chats; each is imported only where it is used.
"""

import codecs
import json
import re
from datetime import datetime
from functools import cached_property
from pathlib import Path

# The files that are read.
FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "config.json", "chat_template.jinja"),
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


def load_tokenizer(directory):
    """The tokenizer in a model's folder (str or Path).

    Beside it, tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json, config.json
    and chat_template.jinja are read where they exist. Raises FileNotFoundError when there is no tokenizer, ValueError
    when a file is damaged or of a kind that is not known here.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        return JsonTokenizer(directory)
    if (directory / "tokenizer.model").is_file():
        return SentencePieceTokenizer(directory)
    raise FileNotFoundError(f"{directory} has neither tokenizer.json nor tokenizer.model: copy the model's one there.")


class Tokenizer:
    """What both kinds share: decoding, chats and the tokens with a name.

    A kind sets vocab_size (largest id + 1, added tokens included), special_ids, drops_first_space, and the functions
    token_id (str -> int or None), piece (int -> str or None) and piece_bytes (str -> bytes).
    """

    def __init__(self, directory):
        self.directory = directory
        self.config = read_json(directory / "tokenizer_config.json")
        named = self.config
        if "added_tokens_decoder" not in named:  # else the older file may be stale: transformers skips it too
            named = named | read_json(directory / "special_tokens_map.json")
        self.named_tokens = {
            name: content(token)
            for name, token in named.items()
            if name.endswith("_token") and isinstance(token, (str, dict))  # unlike "add_bos_token": true
        }
        extra = named.get("additional_special_tokens") or named.get("extra_special_tokens") or []
        self.special_tokens = {*self.named_tokens.values(), *map(content, extra)}

    @property
    def bos_id(self):
        """int, or None when the files name no BOS token."""
        return self.token_id(self.named_tokens.get("bos_token", ""))

    @cached_property
    def eos_ids(self):
        """frozenset of every id that ends an answer: Llama 3's are spread over three files."""
        ids = {self.token_id(self.named_tokens.get("eos_token", ""))}
        for name in ("generation_config.json", "config.json"):
            value = read_json(self.directory / name).get("eos_token_id")
            ids.update(value if isinstance(value, list) else [value])
        return frozenset(ids - {None})

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

    def render_chat(self, messages, answer_next=True):
        """messages: list of {"role": str, "content": str} -> str, the prompt up to where the answer begins.

        Without `answer_next` it ends with the last message, as for training on an answer that is among them.

        Raises ValueError when the model has no chat template, or when the template refuses the messages.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        def tojson(value, indent=None, separators=None, sort_keys=False):  # jinja2's own escapes HTML
            return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)

        # A template comes with the weights, from a stranger: hence the sandbox.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        # {% generation %}, which jinja2 lacks, marks the answers for training; what it encloses is rendered as it is.
        template = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", self.chat_template())
        template = re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", template)
        values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": answer_next}
        try:
            return environment.from_string(template).render(self.named_tokens | values)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"The chat template in {self.directory} refuses these messages: {error}") from error

    def chat_template(self):
        """The model's own template as str. Raises ValueError when it has none."""
        template = self.config.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        file = self.directory / "chat_template.jinja"
        if file.is_file():
            template = file.read_text(encoding="utf-8")
        if template is None:
            raise ValueError(f"{self.directory} has no chat template: use a plain prompt, or the model's chat version.")
        return template


class JsonTokenizer(Tokenizer):
    """tokenizer.json, through the tokenizers library."""

    def __init__(self, directory):
        import tokenizers

        super().__init__(directory)
        file = directory / "tokenizer.json"
        decoder = read_json(file).get("decoder") or {}
        steps = decoder.get("decoders", [decoder])
        byte_level = [step.get("type") for step in steps] == ["ByteLevel"]
        if not byte_level and not all(step in SENTENCEPIECE_STEPS for step in steps):
            raise ValueError(f"{file} asks for a decoder that tokenizer.py does not have: {decoder or None}.")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{file} cannot be read ({error}): download it again or upgrade tokenizers.") from error
        # Some files carry the limits of a training run, and a prompt must be neither cut nor padded.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.token_id = self.backend.token_to_id
        # Some tokens are called special in tokenizer_config.json alone. One without an id must not get a new one here.
        self.backend.add_special_tokens([t for t in sorted(self.special_tokens) if self.token_id(t) is not None])
        self.special_ids = {id for id, token in self.backend.get_added_tokens_decoder().items() if token.special}
        self.piece = self.backend.id_to_token
        self.piece_bytes = byte_level_bytes if byte_level else sentencepiece_bytes
        self.drops_first_space = FIRST_SPACE in steps
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text, bos=True):
        """text -> list of int. bos: add the special tokens that the file says to add, most often a BOS or none."""
        return self.backend.encode(text, add_special_tokens=bos).ids


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model, through the sentencepiece library."""

    def __init__(self, directory):
        from sentencepiece import SentencePieceProcessor

        super().__init__(directory)
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
        added = {int(id): token for id, token in self.config.get("added_tokens_decoder", {}).items()}
        added = added or {id: {"content": token} for token, id in read_json(directory / "added_tokens.json").items()}
        pieces |= {id: token["content"] for id, token in added.items()}
        self.special_ids = control | {id for id, token in added.items() if token.get("special")}
        self.special_ids |= {id for id, piece in pieces.items() if piece in self.special_tokens}
        # sentencepiece takes "</s>" or "[INST]" in a text for letters, so `encode` cuts the text at these first.
        self.cuts = {pieces[id]: id for id in self.special_ids | added.keys()}
        longest_first = sorted(self.cuts, key=len, reverse=True)
        self.cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.token_id = self.cuts.get
        self.piece = pieces.get
        self.piece_bytes = sentencepiece_bytes
        self.vocab_size = max(pieces) + 1

    def encode(self, text, bos=True):
        """text -> list of int. bos: add a BOS (and EOS) as tokenizer_config.json says, a BOS if it does not say."""
        # transformers 5 adds none if it does not say, though Llama 2 and Mistral were trained with one.
        ids = [self.bos_id] if bos and self.bos_id is not None and self.config.get("add_bos_token", True) else []
        for i, part in enumerate(self.cut.split(text)):  # plain, special, plain, ..., plain
            if i % 2:
                ids.append(self.cuts[part])
            elif part:
                # A text starts with a space that is not written; text after a special token only in "legacy" models.
                spaced = i == 0 or (self.config.get("legacy") and not part.startswith(" "))
                ids += (self.start if spaced else self.inner).encode(part)
        if bos and self.config.get("add_eos_token"):
            ids.append(self.token_id(self.named_tokens["eos_token"]))
        return ids


class Stream:
    """Decodes one id at a time; the pieces joined are exactly `decode` of all the ids.

    At most 3 bytes are held back, so a push costs the same after any length. To print what follows a prompt, push the
    prompt's ids first and drop what they return: a stream that begins after them loses the space in between.
    """

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


def read_json(file):
    """A file's JSON object as dict, {} without a file. Raises ValueError when the file is damaged."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{file} is not JSON ({error}): it may be cut off, so download it again.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds a JSON {type(data).__name__} where an object belongs: download it again.")
    return data


def content(token):
    """Tokens are named as "</s>" or as {"content": "</s>", ...}."""
    return token["content"] if isinstance(token, dict) else token


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
