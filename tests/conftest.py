"""One small checkpoint, and how generate.py is run on it, inside this process."""

import io
import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cpu_kernels
import generate
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


@pytest.fixture
def plain_twins(monkeypatch):
    """As on a machine without a C++ compiler."""
    monkeypatch.setattr(cpu_kernels, "available", lambda: False)
    torch.compiler.reset()


SCRIPT = Path(generate.__file__)


def command(folder, *arguments):
    """The arguments; of an option that is given twice the last one counts."""
    options = ["--checkpoint_path", folder / "model.pth", "--device", "cpu", "--max_new_tokens", 12, *arguments]
    return [str(SCRIPT), *map(str, options)]


@pytest.fixture
def run(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """A run that ends well: its output, and what it wrote with --json."""
    monkeypatch.setattr(generate, "read_bandwidth", lambda device: 1e9)  # measuring takes a second

    def run(*arguments, folder=tiny_checkpoint, stdin=""):
        file = tmp_path / "run.json"
        monkeypatch.setattr(sys, "argv", command(folder, "--json", file, *arguments))
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        generate.main(generate.parse_arguments())
        output, data = capsys.readouterr(), json.loads(file.read_text())
        return SimpleNamespace(
            stdout=output.out, stderr=output.err, data=data, samples=data["samples"], runs=data["runs"]
        )

    return run


@pytest.fixture
def refused(tiny_checkpoint, monkeypatch, capsys):
    """A run that ends with exit code 2: what it wrote to stderr."""

    def refused(*arguments, folder=tiny_checkpoint, stdin=""):
        monkeypatch.setattr(sys, "argv", command(folder, *arguments))
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert end.value.code == 2
        return capsys.readouterr().err

    return refused


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy of the checkpoint's folder, to be changed."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def experts_in_mxfp4(weights: dict) -> dict:
    """A state dict with random bytes as its experts' weights, and scales that keep these near the others' size."""
    random, packed = torch.Generator().manual_seed(0), dict(weights)
    for name in [name for name in weights if ".experts." in name and name.endswith(".weight")]:
        N, K = weights[name].shape
        packed[name] = torch.randint(256, (N, K // 2), generator=random, dtype=torch.uint8)
        scales = torch.randint(122, 125, (N, K // 32), generator=random, dtype=torch.uint8)
        packed[f"{name.removesuffix('weight')}scales"] = scales
    return packed
