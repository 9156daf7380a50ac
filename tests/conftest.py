"""One small checkpoint for the tests that run the scripts."""

import json

import pytest
import torch

from check_equivalence import random_weights
from checkpoint import write_checkpoint
from model import GPTConfig

torch.set_num_threads(1)  # for matrices this small threads cost more than they bring: half of all seconds

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A folder as a user has it: a random model with a context of 128 tokens, and a tokenizer of one token per byte.

    Copy the folder before changing anything in it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: id for id, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)  # 256, 257, 258
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": special[0], "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256]}))

    config = GPTConfig(
        block_size=128, vocab_size=260, n_layer=2, n_head=4, n_kv_head=2, head_dim=12, dim=32, hidden_dim=56
    )
    write_checkpoint(folder / "model.pth", config, random_weights(config))
    return folder
