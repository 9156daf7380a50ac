"""finetune.py: both twins learn the same, interrupted or not, alone or on several ranks; answers alone count."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from threading import Thread
from unittest.mock import Mock

import pytest
import torch

import scripts.finetune as finetune
from check_equivalence import FAMILIES, random_weights
from checkpoint import build_model, quantize_model, read_checkpoint, write_checkpoint
from decode import Sampling, generate
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
TEXT = "the quick brown fox jumps over the lazy dog. " * 60
STEPS = ["--steps", 6, "--every", 2, "--length", 24, "--batch_size", 4, "--learning_rate", 3e-3, "--device", "cpu"]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def command(folder, data, out_dir, *more):
    files = ["--checkpoint_path", folder / "model.pth", "--data", data, "--out_dir", out_dir]
    return ["-m", "scripts.finetune", *map(str, [*files, *STEPS, "--precision", "float32", *more])]


@pytest.fixture
def train(tiny_checkpoint, text, tmp_path, monkeypatch, capsys):
    """train(name, *arguments): a run into a folder of that name; its weights, and what it printed."""

    def train(name, *more, folder=tiny_checkpoint, data=text):
        monkeypatch.setattr(sys, "argv", command(folder, data, tmp_path / name, *more)[1:])
        finetune.main(finetune.parse_arguments())
        return read_checkpoint(tmp_path / name / "model.pth")[1], capsys.readouterr().out

    return train


@pytest.fixture
def refused(train):
    def refused(*more, match, **options):
        with pytest.raises((ValueError, OSError), match=match) as error:
            train("refused", *more, **options)
        assert "\n" not in str(error.value)

    return refused


def close(weights, expected, tolerance=1e-5):
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=tolerance, atol=tolerance)


def same(weights, expected):
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def losses(output):
    lines = [line.split(": validation loss ") for line in output.splitlines() if line.startswith("step ")]
    return [float(loss) for _, loss in lines]


# What is learned.


def test_both_twins_learn_the_same_and_the_loss_falls(train, tiny_checkpoint):
    reference, output = train("reference", "--model", "reference")
    fast, output_fast = train("fast", "--model", "fast")
    close(fast, reference)
    assert losses(output) == pytest.approx(losses(output_fast), abs=1e-3)
    assert len(losses(output)) == 4 and losses(output)[-1] < losses(output)[0] - 0.5
    before = read_checkpoint(tiny_checkpoint / "model.pth")[1]
    assert all(not torch.equal(tensor, before[name]) for name, tensor in fast.items())


def test_compiled_it_learns_the_same(train, monkeypatch):
    # The graphs of both passes, run by PyTorch's own operators: the compiler's kernels take 25 s.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    eager, output = train("eager")
    for name, *more in (["compiled"], ["recomputed", "--recompute"]):
        weights, output_compiled = train(name, "--compile", *more)
        close(weights, eager)
        assert losses(output_compiled) == pytest.approx(losses(output), abs=1e-3)


def test_the_compilers_kernels_have_the_same_gradients_for_any_number_of_layers():
    """Of three on, torch 2.13 makes other ones if they are nested regions of one graph."""
    config = replace(FAMILIES["llama-2"], n_layer=3)
    ids = torch.randint(config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    gradients = []
    for compiled in (False, True):
        model = build_model(config, random_weights(config), "cpu", torch.float32).requires_grad_(True)
        finetune.make_loss(model, compiled, recompute=False)(ids[:, :-1], ids[:, 1:]).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    close(*gradients, tolerance=1e-4)


def test_a_compiled_mixture_of_experts_has_the_same_gradients(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = replace(FAMILIES["mixtral"], n_layer=1)
    weights = random_weights(config)
    ids = torch.randint(config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    gradients = []
    for compiled in (False, True):
        model = build_model(config, weights, "cpu", torch.float32).requires_grad_(True)
        loss = finetune.make_loss(model, compiled, recompute=False)
        loss(ids[:, :-1], ids[:, 1:]).backward()
        gradients.append({name: parameter.grad for name, parameter in loss.named_parameters()})
    close(*gradients)


def close_gradients(folder, expected):
    """By Adam's means of them: the weights do not show it if all gradients are too large by a factor."""
    means = [
        {f"{number}": state["exp_avg"] for number, state in training["optimizer"]["state"].items()}
        for training in (torch.load(path / "training.pth", weights_only=True) for path in (folder, expected))
    ]
    close(*means)


def test_accumulated_batches_are_one(train, tmp_path):
    unclipped = ["--clip", 1e6]
    weights, _ = train("accumulated", "--batch_size", 1, "--accumulate", 4, *unclipped)
    close(weights, train("at once", *unclipped)[0])
    close_gradients(tmp_path / "accumulated", tmp_path / "at once")


def test_bfloat16_keeps_the_weights_in_float32(train):
    weights, output = train("bf16", "--precision", "bfloat16")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert losses(output)[-1] < losses(output)[0] - 0.5


def test_a_mixture_of_experts_learns_in_bfloat16(train, tiny_checkpoint, tmp_path):
    folder = tmp_path / "family"
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tiny_checkpoint / file).read_bytes())
    write_checkpoint(folder / "model.pth", FAMILIES["mixtral"], random_weights(FAMILIES["mixtral"]))
    both = [
        losses(train(name, "--model", name, "--precision", "bfloat16", folder=folder)[1])
        for name in ("fast", "reference")
    ]
    assert both[0] == pytest.approx(both[1], rel=0.02)
    assert both[0][-1] < both[0][0] - 0.5


@pytest.mark.parametrize("family", ["gpt-2", "qwen3-moe"])
def test_other_families_learn_the_same_on_both_twins(train, tiny_checkpoint, tmp_path, family):
    folder = tmp_path / "family"
    config = FAMILIES[family]
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tiny_checkpoint / file).read_bytes())
    write_checkpoint(folder / "model.pth", config, random_weights(config))
    # Adam divides by the size of a gradient, also of one that is noise around 0 (GPT-2's key bias): 1e-4
    fast, reference = (train(name, "--model", name, folder=folder)[0] for name in ("fast", "reference"))
    for name, tensor in reference.items():
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(fast[name], tensor, rtol=1e-4, atol=1e-4)


def test_from_scratch(train, tiny_checkpoint, tmp_path, text, monkeypatch, capsys):
    folder = tmp_path / "scratch"
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tiny_checkpoint / file).read_bytes())
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 260}
    (folder / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]} | sizes))
    arguments = command(tiny_checkpoint, text, tmp_path / "made", "--steps", 60, "--sample", "the quick")
    arguments[2:4] = ["--config", str(folder / "config.json")]
    monkeypatch.setattr(sys, "argv", arguments[1:])
    finetune.main(finetune.parse_arguments())
    output = capsys.readouterr().out
    assert losses(output)[0] == pytest.approx(math.log(260), abs=0.1)  # it knows nothing
    assert losses(output)[-1] < 2.5
    assert output.count("'the quick' -> ") == 31
    config, weights = read_checkpoint(tmp_path / "made" / "model.pth")
    model = build_model(config, weights, "cpu", torch.float32)
    tokenizer = load_tokenizer(tmp_path / "made")
    prompt = torch.tensor([tokenizer.encode("the ")])
    assert len(list(generate(model, prompt, 8, Sampling(temperature=0)))) == 8
    arguments[3] = str(folder)
    monkeypatch.setattr(sys, "argv", arguments[1:])
    with pytest.raises(FileNotFoundError, match="^--config .*scratch is no file; give a Hugging Face config.json"):
        finetune.main(finetune.parse_arguments())


# Interrupted.


def test_a_killed_run_continues_as_if_it_had_not_been(train, tiny_checkpoint, text, tmp_path):
    whole, _ = train("whole", "--steps", 40)
    arguments = command(tiny_checkpoint, text, tmp_path / "cut", "--steps", 40)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, **streams)
    training = tmp_path / "cut" / "training.pth"
    while not training.exists():
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = torch.load(training, weights_only=True)["step"]
    assert done < 40
    weights, output = train("cut", "--steps", 40, "--resume")
    assert len(losses(output)) == (40 - done) / 2
    close(weights, whole, tolerance=1e-6)


@pytest.mark.parametrize("more", [[], ["--lora_rank", 2]])
def test_a_run_stopped_in_the_middle_of_saving_continues(train, monkeypatch, more):
    whole, _ = train("whole", *more)

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "save_training", stop)
        train("cut", *more)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "write_checkpoint", stop)
        train("cut", *more, "--resume")  # nothing was saved, so it starts anew; now training.pth is there alone
    same(train("cut", *more, "--resume")[0], whole)
    weights, output = train("cut", *more, "--resume")  # there is nothing left to do
    same(weights, whole)
    assert losses(output) == []


def test_another_run_is_not_continued(train, refused, tmp_path, monkeypatch):
    train("refused")
    refused(match="training.pth is there; give --resume")
    refused("--resume", "--learning_rate", 1e-3, match="of a run with learning_rate = 0.003, not 0.001")
    folder = tmp_path / "refused"
    refused("--resume", match="of a run with other weights to start from", folder=folder)
    (folder / "training.pth").write_bytes((folder / "training.pth").read_bytes()[:-100])
    refused("--resume", match="training.pth is damaged")
    with monkeypatch.context() as patch:
        patch.setattr(finetune.torch, "load", Mock(side_effect=AttributeError("185")))  # as one damaged byte can
        with pytest.raises(ValueError, match="training.pth is damaged"):
            finetune.load_training(folder / "training.pth", None, None, {})
    (folder / "training.pth").unlink()
    refused("--resume", match="model.pth is there, and of no run that could continue")


def test_a_run_with_other_data_or_another_tokenizer_is_not_continued(train, refused, text, tiny_checkpoint, tmp_path):
    """Where name, size and number of rows are the same."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(TEXT)
    options = ["--val_data", held_out]
    whole, _ = train("refused", *options, folder=folder)

    def changed(file, old, new, match, *more):
        before = file.read_text()
        assert old in before
        file.write_text(before.replace(old, new, 1))
        refused(
            "--resume", *options, *more, match=f"training.pth is of a run with {match}; give the same", folder=folder
        )
        file.write_text(before)

    changed(text, "brown", "green", "other contents of --data")
    changed(held_out, "brown", "green", "other contents of --val_data")
    changed(folder / "tokenizer_config.json", "<|{{ message.role }}|>", "<|user|>", "other files of the tokenizer")
    changed(folder / "tokenizer.json", '"!"', '"ǃ"', "other files of the tokenizer")
    refused("--resume", match="of a run with other contents of --val_data", folder=folder)
    same(train("refused", "--resume", *options, folder=folder)[0], whole)
    moved = tmp_path / "moved.txt"
    text.rename(moved)
    same(train("refused", "--resume", *options, folder=folder, data=moved)[0], whole)
    training = tmp_path / "refused" / "training.pth"
    content = torch.load(training, weights_only=True)
    del content["settings"]["data_digest"]
    torch.save(content, training)
    refused("--resume", *options, match="earlier version, without data_digest", folder=folder, data=moved)


# Numbers that are not finite.


def diverges(monkeypatch, step, value=float("nan"), of_rank=0):
    """From the step of this number on, counted from 1, the loss is this value; the validation loss is not."""
    forward = finetune.Loss.forward

    def broken(self, ids, targets):
        broken.steps += torch.is_grad_enabled()
        found = forward(self, ids, targets)
        return found * value if torch.is_grad_enabled() and broken.steps >= step else found

    broken.steps = 0
    monkeypatch.setattr(finetune.Loss, "forward", broken)


def ended(train, name, *more, match):
    with pytest.raises(FloatingPointError, match=match) as error:
        train(name, *more)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_diverges_keeps_the_last_finite_checkpoint(train, tmp_path, monkeypatch, value):
    saved = {}
    written = finetune.write_checkpoint

    def write(path, *rest):
        written(path, *rest)
        saved["files"] = [(tmp_path / "made" / name).read_bytes() for name in ("model.pth", "training.pth")]

    monkeypatch.setattr(finetune, "write_checkpoint", write)
    diverges(monkeypatch, 4, value)
    match = "^the loss or the gradient norm of step 4 is not finite.*--learning_rate below 0.003.*made keeps the last"
    ended(train, "made", "--steps", 30, match=match)
    assert [(tmp_path / "made" / name).read_bytes() for name in ("model.pth", "training.pth")] == saved["files"]
    assert torch.load(tmp_path / "made" / "training.pth", weights_only=True)["step"] == 2
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(tmp_path / "made" / "model.pth")[1].values())


def test_the_first_bad_step_is_named_ten_steps_later_at_most(train, tmp_path, monkeypatch):
    diverges(monkeypatch, 3)
    ended(train, "made", "--steps", 30, "--every", 30, match="norm of step 3 is not finite.*in another --out_dir$")
    assert finetune.Loss.forward.steps == 10
    assert not list((tmp_path / "made").glob("*.pth"))


def test_a_gradient_that_is_not_finite_ends_a_run(train, monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: clip(*a) * float("inf"))
    ended(train, "made", match="norm of step 1 is not finite")


@pytest.mark.parametrize("name", ["transformer.wte.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_not_saved(train, tmp_path, monkeypatch, name):
    """Where neither the loss nor a gradient shows it: token 259 is in no text."""
    weights_of, seen = finetune.weights_of, []

    def broken(model):
        weights = weights_of(model)
        seen.append(0)
        if len(seen) > 3:  # before the first step, at the first save twice, then at the second
            weights[name] = weights[name].clone()
            weights[name][259] = float("inf")
        return weights

    monkeypatch.setattr(finetune, "weights_of", broken)
    ended(train, "made", match=f"{name} after step 4 is not finite.*keeps the last")
    assert torch.load(tmp_path / "made" / "training.pth", weights_only=True)["step"] == 2


@pytest.mark.parametrize(
    ("step", "match"), [(1, "before the first step is not finite; convert"), (3, "after step 4 is")]
)
def test_a_validation_loss_that_is_not_finite_ends_a_run(train, tmp_path, monkeypatch, step, match):
    mean_loss, calls = finetune.mean_loss, []
    monkeypatch.setattr(
        finetune, "mean_loss", lambda *a: mean_loss(*a) * (float("nan") if calls.append(0) or len(calls) >= step else 1)
    )
    ended(train, "made", match=f"the validation loss {match}")
    assert (tmp_path / "made" / "training.pth").exists() == (step > 1)


def test_without_a_clip_gradients_stay(train):
    same(train("inf", "--clip", "inf")[0], train("large", "--clip", 1e30)[0])


def test_what_a_killed_run_left_is_taken_away(train, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / ".training.pth.123.tmp").write_text("half")
    train("made")
    assert sorted(path.name for path in (tmp_path / "made").glob(".*")) == []


def test_a_full_disk_is_reported_in_a_sentence(monkeypatch, refused):
    def fail(*arguments):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 303296 vs 303188")

    monkeypatch.setattr(torch, "save", fail)
    refused(match="training.pth could not be written whole; is the disk full")


# LoRA.


def test_lora_changes_its_targets_alone_and_alike_in_both_twins(train, tiny_checkpoint):
    before = read_checkpoint(tiny_checkpoint / "model.pth")[1]
    targets = ["--lora_rank", 2, "--lora_targets", "q_proj", "v_proj", "up_proj", "down_proj"]
    fast, output = train("fast", *targets)
    close(train("reference", "--model", "reference", *targets)[0], fast)
    changed = {name.split(".")[-2] for name, tensor in fast.items() if not torch.equal(tensor, before[name])}
    assert changed == set(targets[3:])
    for name in changed:
        difference = fast[f"transformer.h.0.{'attn' if name in 'q_proj v_proj' else 'mlp'}.{name}.weight"]
        difference = (
            difference - before[f"transformer.h.0.{'attn' if name in 'q_proj v_proj' else 'mlp'}.{name}.weight"]
        )
        assert torch.linalg.matrix_rank(difference, atol=1e-5) == 2
    assert losses(output)[-1] < losses(output)[0]


def test_a_merged_layer_does_what_the_two_do():
    base = torch.nn.Linear(6, 9)
    layer = finetune.LoRALinear(base, [(4, True), (2, False), (3, True)], rank=2, alpha=8)
    for up in layer.up:
        torch.nn.init.normal_(up)
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.merged(), base.bias))
    assert torch.equal(layer.merged()[4:6], base.weight[4:6])


# Data.


def test_each_row_comes_once_an_epoch():
    for count in (1, 3, 10):
        rows = torch.cat([finetune.rows_of_step(step, count, 10, seed=1) for step in range(30 // count)])
        assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in rows.split(10))
        assert rows[:10].tolist() != rows[10:20].tolist()


def test_the_learning_rate():
    rates = [finetune.learning_rate_at(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0 == max(rates)
    assert rates[55] == pytest.approx(1.1, abs=0.02) and rates[99] == pytest.approx(0.2, abs=0.01)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


def test_a_text_becomes_windows_of_next_tokens(tiny_checkpoint, tmp_path):
    tokenizer = load_tokenizer(tiny_checkpoint)
    (tmp_path / "a.jsonl").write_text('{"text": "abcdef"}\n\n{"text": "ghij"}\n')
    (ids, targets), _ = finetune.read_data(tmp_path / "a.jsonl", tokenizer, 3)
    expected = tokenizer.encode("abcdef") + [256] + tokenizer.encode("ghij") + [256]
    assert ids.flatten().tolist() == expected[:9]
    assert targets.flatten().tolist() == expected[1:10]


def test_a_long_text_is_read_in_parts(tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint)
    text = "many words\n" * 100_000 + "x" * 2_500_000
    ids = finetune.encode_long(text, tokenizer)
    assert ids.dtype == torch.int32
    assert len(ids) == len(text) and ids[:22].tolist() == tokenizer.encode("many words\n" * 2)
    assert ids[-1] == tokenizer.encode("x")[0]


def test_an_answer_is_read_as_the_whole_text_is(tiny_checkpoint, tmp_path):
    """A tokenizer that puts a space before a text would put one before each part of it."""
    from tokenizers import Tokenizer, normalizers

    folder = tmp_path / "prepends"
    shutil.copytree(tiny_checkpoint, folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.normalizer = normalizers.Prepend(" ")
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    ((ids, given),) = finetune.answers(messages, None, tokenizer)
    assert ids == tokenizer.encode("<|user|>one<|end|><|assistant|>two<|end|>", bos=False)
    assert ids[:given] == tokenizer.encode("<|user|>one<|end|><|assistant|>", bos=False)


def test_only_answers_count(tiny_checkpoint, tmp_path, train):
    tokenizer = load_tokenizer(tiny_checkpoint)
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (ids, targets), _ = finetune.read_data(tmp_path / "chat.jsonl", tokenizer, 40)
    first = "<|user|>one<|end|><|assistant|>two<|end|>"
    texts = [first, f"{first}<|user|>three<|end|><|assistant|>four<|end|>"]
    for row, aims, text, answer in zip(ids.tolist(), targets.tolist(), texts, ("two", "four"), strict=True):
        expected, said = (tokenizer.encode(part, bos=False) for part in (text, f"{answer}<|end|>"))
        assert row == expected[:-1] + [0] * (41 - len(expected))
        given = len(expected) - 1 - len(said)
        ignored = [finetune.IGNORED] * given, [finetune.IGNORED] * (41 - len(expected))
        assert aims == ignored[0] + said + ignored[1]
    with pytest.raises(ValueError, match="has 2 answers that begin after --length 3 .first in line 1."):
        finetune.read_data(tmp_path / "chat.jsonl", tokenizer, 3)

    questions = [[{"role": "user", "content": c}, {"role": "assistant", "content": c * 3}] for c in "abcdefgh"]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in questions))
    chat = tmp_path / "chat.jsonl"
    output = train("chat", "--sample", "a", "--steps", 80, "--val_data", chat, data=chat)[1]
    assert losses(output)[-1] < losses(output)[0] - 2
    assert "'a' -> 'aaa'" in output


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"text": "a"', "line 2 of .*chat.jsonl is not JSON"),
        ("9" * 5000, "line 2 of .*chat.jsonl is not JSON"),
        ("[" * 100_000, "line 2 of .*chat.jsonl is not JSON"),
        ("3", 'line 2 of .*chat.jsonl has no "text", nor "messages".* but a JSON int'),
        (r'{"text": "a\ud800b"}', "line 2 of .*chat.jsonl has half of a surrogate pair"),
        ('["a"]', 'line 2 of .*chat.jsonl has no "text", nor "messages"'),
        ('{"text": 3}', 'line 2 of .*chat.jsonl has no "text", nor "messages"'),
        ('{"messages": [{"role": "user"}]}', 'line 2 of .*chat.jsonl has no "text", nor "messages"'),
        ('{"messages": [{"role": "user", "content": null}]}', 'line 2 of .*chat.jsonl has no "text", nor "messages"'),
        ('{"messages": []}', "line 1 of .*chat.jsonl is text among messages"),
    ],
)
def test_damaged_lines_are_named(tmp_path, refused, line, match):
    (tmp_path / "chat.jsonl").write_text('{"text": "a"}\n' + line)
    refused(match=match, data=tmp_path / "chat.jsonl")


QUESTION = {"role": "user", "content": "hi"}
CHAT = [[QUESTION, {"role": "assistant", "content": f"yo {n}"}] for n in range(9)]
FORMS = {
    "jsonl": "\n".join(json.dumps({"messages": m}) for m in CHAT),
    "array": json.dumps([{"messages": m} for m in CHAT]),
    "indented array": json.dumps([{"messages": m} for m in CHAT], indent=1),
    "indented objects": "\n".join(json.dumps({"messages": m}, indent=1) for m in CHAT),
    "byte order mark": "\n".join("\ufeff" + json.dumps({"messages": m}) for m in CHAT),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_rows_by_any_name(tiny_checkpoint, tmp_path, form):
    tokenizer = load_tokenizer(tiny_checkpoint)
    for name in ("chat.jsonl", "chat.json", "chat.ndjson", "chat.JSONL", "chat.txt", "chat"):
        (tmp_path / name).write_text(FORMS[form])
        (_, targets), _ = finetune.read_data(tmp_path / name, tokenizer, 40)
        said = [tokenizer.decode(row[row != finetune.IGNORED].tolist()) for row in targets]
        assert said == [messages[1]["content"] for messages in CHAT]


@pytest.mark.parametrize("text", ["{ int a; }", "[Chorus] la la la", "[1]\nA note.", "{x: 1}", "[link](there)"])
def test_a_text_may_begin_with_a_bracket(tiny_checkpoint, tmp_path, refused, text):
    tokenizer = load_tokenizer(tiny_checkpoint)
    (tmp_path / "a.txt").write_text("\ufeff" + text, encoding="utf-8")
    (ids, targets), _ = finetune.read_data(tmp_path / "a.txt", tokenizer, 3)
    expected = tokenizer.encode(text) + [256]
    assert ids.flatten().tolist() + targets[-1, -1:].tolist() == expected[: ids.numel() + 1]
    (tmp_path / "a.Json").write_text(text)
    refused(match="a.Json does not begin as rows of JSON do", data=tmp_path / "a.Json")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            '{"conversations": [{"from": "human", "value": "hi"}]}',
            r"the names conversations, .*\[0\].from, .*\[0\].value",
        ),
        ('{"prompt": "hi", "completion": "yo"}', "line 1 of .* the names prompt, completion; write"),
        ('{\n "data": [{"text": "a"}]\n}', "line 1 of .* the names data, .*text; write"),
        ('[{"text": "a"}, {"id": 1}]', "row 2 of the array in line 1 of .* but the names id"),
        ('[{"text": "a"},\n {"tex', "line 1 of .* is not JSON.* line 2 column"),
        ('{"name": "package", "version": 1}', "but the names name, version; write"),
        ("", "is empty"),
        ("\ufeff \n", "is empty"),
        ("a\0b\0", "holds zero bytes"),
        ("PAR1\x15\x04\xff", "is not UTF-8"),
        ("\ufeffa".encode("utf-16").decode("latin-1"), "is not UTF-8"),
    ],
)
def test_what_is_neither_rows_nor_a_text_is_refused(tmp_path, refused, content, match):
    encoding = "latin-1" if "\xff" in content else "utf-8"
    (tmp_path / "data").write_text(content, encoding=encoding)
    refused(match=match, data=tmp_path / "data")
    (tmp_path / "good.txt").write_text(TEXT)
    refused("--val_data", tmp_path / "data", match=match, data=tmp_path / "good.txt")


def with_template(tiny_checkpoint, folder, template):
    shutil.copytree(tiny_checkpoint, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_answers_without_a_token_are_left_out_and_counted(train, refused, tiny_checkpoint, tmp_path):
    bare = with_template(tiny_checkpoint, tmp_path / "bare", "{% for m in messages %}{{ m.content }}{% endfor %}")
    silent = [QUESTION, {"role": "assistant", "content": ""}]
    late = [{"role": "user", "content": "a" * 25}, {"role": "assistant", "content": "b"}]
    first = [{"role": "assistant", "content": "hello"}]  # nothing predicts its first token
    chat = tmp_path / "chat.jsonl"
    chat.write_text(
        "\n".join(json.dumps({"messages": m}) for m in (silent, late, [QUESTION], [], *CHAT, first, silent))
    )
    (ids, targets), _ = finetune.read_data(chat, load_tokenizer(bare), 24)
    assert len(ids) == 10 and (targets != finetune.IGNORED).sum().item() == 9 * 4 + 4
    output = train("made", folder=bare, data=chat)[1]
    assert (
        f"left out of {chat}: 2 answers without a token (first in line 1), 1 answers that begin after --length 24 "
        '(first in line 2), 2 conversations without the role "assistant" (first in line 3)\n'
    ) in output
    chat.write_text("\n".join([json.dumps({"messages": silent})] * 9))
    refused(match="no answer to train on; it has 9 answers without a token .first in line 1", folder=bare, data=chat)
    chat.write_text("\n".join([json.dumps({"messages": [QUESTION]})] * 9))
    refused(match='no answer to train on; it has 9 conversations without the role "assistant" .first', data=chat)


def test_answers_that_end_nothing_are_told(train, tiny_checkpoint, tmp_path):
    chat, (folder, bare) = tmp_path / "chat.jsonl", (tmp_path / name for name in ("marked", "unmarked"))
    chat.write_text("\n".join(json.dumps({"messages": m}) for m in CHAT))
    says = "so the model will not learn to stop; "
    assert says not in train("ended", data=chat)[1]
    with_template(tiny_checkpoint, folder, "{% for m in messages %}{{ m.content }}<|user|>\n{% endfor %}")
    with_template(tiny_checkpoint, bare, "{% for m in messages %}{{ m.content }}{% endfor %}")
    name = f"{says}name '<|user|>' as eos_token in {folder / 'tokenizer_config.json'}\n"
    assert name in train("endless", folder=folder, data=chat)[1]
    assert f"{says}let the chat template end them with eos_token\n" in train("bare", folder=bare, data=chat)[1]


def test_tools_of_a_row_are_given_to_the_template(tiny_checkpoint, tmp_path):
    template = "{% if tools %}{{ tools[0].name }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = load_tokenizer(with_template(tiny_checkpoint, tmp_path / "tools", template))
    rows = [
        {"messages": CHAT[0]},
        {"messages": CHAT[0], "tools": None},
        {"messages": CHAT[0], "tools": [{"name": "f"}]},
    ]
    (tmp_path / "chat").write_text("\n".join(map(json.dumps, rows)))
    (ids, _), _ = finetune.read_data(tmp_path / "chat", tokenizer, 5)
    assert [tokenizer.decode(row) for row in ids.tolist()] == ["hiyo ", "hiyo ", "fhiyo"]


def test_what_a_template_adds_of_a_damaged_message_is_named(refused, tiny_checkpoint, tmp_path):
    template = "{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}"
    folder = with_template(tiny_checkpoint, tmp_path / "names", template)
    messages = [QUESTION | {"name": "\ud800"}, {"role": "assistant", "content": "yo"}]
    (tmp_path / "chat").write_text(json.dumps({"messages": messages}))
    refused(match="line 1 of .*: the conversation has half of a surrogate", folder=folder, data=tmp_path / "chat")
    refused("--sample", "caf\udce9", match="--sample has half of a surrogate pair")


def test_null_messages_beside_a_text_are_a_text(tiny_checkpoint, tmp_path):
    (tmp_path / "a").write_text('{"messages": null, "text": "abcdef"}')
    tokenizer = load_tokenizer(tiny_checkpoint)
    (ids, _), _ = finetune.read_data(tmp_path / "a", tokenizer, 3)
    assert ids.flatten().tolist() == tokenizer.encode("abcdef")


def test_what_cannot_be_trained_is_refused(tiny_checkpoint, tmp_path, refused, text):
    refused("--length", 100000, "--config", "config.json", match="either --checkpoint_path or")
    refused("--lora_rank", 2, "--lora_targets", "q_proj", "--device", "nothing", match="nothing")
    wrong = {"--clip": (0, -1, "nan"), "--warmup": (100, "nan", "inf"), "--learning_rate": (-1, 0, "nan", "inf", 1e18)}
    wrong |= {
        "--weight_decay": (-0.1, "nan", "inf", 1e18),
        "--lora_alpha": (0, "nan", "inf", 1e18),
        "--lora_rank": (-1,),
    }
    for flag, value in ((flag, value) for flag, values in (wrong | {"--seed": (2**64,)}).items() for value in values):
        refused(
            flag,
            value,
            match=rf"^{flag} {re.escape(str(value))}(\.0)? is not a (whole )?(number|share) (above|from|of 64)",
        )
    for flags in (("--lora_alpha", 32), ("--lora_targets", "q_proj")):
        refused(*flags, match="are for LoRA; add --lora_rank")
    refused("--shard", match="--shard divides the model among ranks; start them")
    refused("--sample", "", match="--sample is empty")
    refused("--length", 129, match="--length 129 is more than the context of 128; give less")
    refused("--sample", "a" * 600, match="--sample has 600 tokens, more than the context of 128")
    (tmp_path / "refused").write_text("a file where a folder must be")
    refused(match="training.pth cannot be written", folder=tmp_path / "nothing")  # before a model is read
    (tmp_path / "refused").unlink()
    (tmp_path / "short.txt").write_text("a few words, which fill a row alone")
    refused(match="the validation needs another", data=tmp_path / "short.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 100)
    refused(match="is not UTF-8", data=tmp_path / "latin.txt")
    folder = tmp_path / "other"
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tiny_checkpoint / file).read_bytes())
    config, weights = read_checkpoint(tiny_checkpoint / "model.pth")
    write_checkpoint(folder / "model.pth", *quantize_model(config, weights, "int8", 32))
    refused(match="is quantized", folder=folder)
    write_checkpoint(folder / "model.pth", FAMILIES["gpt-2"], random_weights(FAMILIES["gpt-2"]))
    refused("--lora_rank", 2, "--lora_targets", "gate_proj", match="no gate_proj for LoRA", folder=folder)
    assert not (tmp_path / "refused").exists()


# Several ranks, and the command.


def test_two_ranks_learn_what_one_does_with_their_rows(train, tiny_checkpoint, text, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more, pipe = ["--batch_size", 1, "--accumulate", 2, "--clip", 1e6], tmp_path / "pipe"
    os.mkfifo(pipe)
    Thread(target=pipe.write_text, args=[text.read_text()], daemon=True).start()
    arguments = command(tiny_checkpoint, pipe, tmp_path / "ranks", *more)
    done = subprocess.run(
        [*launcher, *arguments], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    expected, output = train("one", "--clip", 1e6)
    close(read_checkpoint(tmp_path / "ranks" / "model.pth")[1], expected)
    close_gradients(tmp_path / "ranks", tmp_path / "one")
    assert losses(done.stdout) == pytest.approx(losses(output), abs=1e-3)


def test_two_ranks_end_when_one_has_a_loss_that_is_not_finite(tiny_checkpoint, text, tmp_path):
    """The loss of rank 1 alone is infinite, and no gradient: rank 0 must not save."""
    code = """
import os, torch, scripts.finetune as finetune
from runtime import run_command
forward = finetune.Loss.forward
more = float("inf") if os.environ["RANK"] == "1" else 0
finetune.Loss.forward = lambda self, *rows: forward(self, *rows) + (more if torch.is_grad_enabled() else 0)
run_command(finetune.main, finetune.parse_arguments(), splits=True)
"""
    (tmp_path / "broken.py").write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(tmp_path / "broken.py"), *command(tiny_checkpoint, text, tmp_path / "ranks")[2:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1
    assert "error: the loss or the gradient norm of step 1 is not finite" in done.stderr
    assert not list((tmp_path / "ranks").glob("*.pth"))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("other.settings['start'] = rank", "rank 1 has start 1, where rank 0 has 0"),
        ("", "rank 1 has number of steps done 1"),
    ],
)
def test_ranks_that_would_train_something_else_are_refused(tiny_checkpoint, text, tmp_path, made, message):
    """As on two machines, of which one has other files."""
    code = f"""
import os, scripts.finetune as finetune
from runtime import run_command
rank, make_run = int(os.environ["RANK"]), finetune.make_run
def make_other(args):
    other = make_run(args)
    {made}
    return other
finetune.make_run = make_other
finetune.load_training = lambda *more: rank
run_command(finetune.main, finetune.parse_arguments(), splits=True)
"""
    (tmp_path / "broken.py").write_text(code)
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "training.pth").touch()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(tmp_path / "broken.py"), *command(tiny_checkpoint, text, tmp_path / "ranks", "--resume")[2:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, env=environment, timeout=120)
    assert message in done.stderr


def test_a_run_that_diverges_ends_with_a_sentence_and_exit_code_1(tiny_checkpoint, text, tmp_path):
    arguments = command(tiny_checkpoint, text, tmp_path / "out", "--learning_rate", 1e17, "--warmup", 0)
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"TQDM_DISABLE": "1"}
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "--learning_rate below 1e+17" in done.stderr
    assert done.stderr.count("\n") == 1 and not list((tmp_path / "out").glob("*.pth"))


def test_the_command_tells_an_error_in_a_sentence(tiny_checkpoint, tmp_path):
    arguments = command(tiny_checkpoint, tmp_path / "missing.txt", tmp_path / "out")
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "missing.txt" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_saved_config_is_the_one_that_was_trained(train, tiny_checkpoint, tmp_path):
    train("made")
    before, after = (read_checkpoint(f / "model.pth")[0] for f in (tiny_checkpoint, tmp_path / "made"))
    assert asdict(after) == asdict(before)
    assert (tmp_path / "made" / "tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()
