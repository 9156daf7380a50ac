"""generate.py as it is run: what it prints, what it writes, and what it says to bad input.

Most runs are inside this process, where torch is imported once; a few are processes of their own.
"""

import inspect
import json
import os
import pickle
import pty
import runpy
import shutil
import signal
import string
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from conftest import command

import generate
import quantize
from check_equivalence import random_weights
from checkpoint import read_checkpoint, write_checkpoint
from runtime import explain
from tokenizer import SENTENCEPIECE_STEPS, load_tokenizer

GREEDY = ("--temperature", "0")


def process(folder, *arguments):
    end = subprocess.run([sys.executable, *command(folder, *arguments)], capture_output=True)
    return SimpleNamespace(code=end.returncode, stdout=end.stdout.decode(), stderr=end.stderr.decode())


# --- What a run gives -------------------------------------------------------------------------------------------------


def test_text_goes_to_stdout_and_figures_to_stderr(tiny_checkpoint, tmp_path):
    end = process(tiny_checkpoint, "--prompt", "Hello", "--json", tmp_path / "run.json")
    assert end.code == 0
    sample = json.loads((tmp_path / "run.json").read_text())["samples"][0]
    assert end.stdout == f"Hello{sample['text']}\n"
    lines = end.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["prefill", "decode", "memory"]
    assert "5 tokens" in lines[0] and "11 steps" in lines[1] and "GB at most" in lines[2]


def test_json_has_the_samples_and_every_figure(run, tiny_checkpoint):
    result = run("--prompt", "Hello")
    tokenizer = load_tokenizer(tiny_checkpoint)
    (sample,), (figures,) = result.samples, result.runs
    assert sample.keys() == {"prompt_ids", "token_ids", "text", "stop_reason"}
    assert sample["prompt_ids"] == tokenizer.encode("Hello")
    assert len(sample["token_ids"]) == 12 and sample["text"] == tokenizer.decode(sample["token_ids"])
    assert sample["stop_reason"] == "length"
    assert (figures["prompt_tokens"], figures["cached_tokens"], figures["decode_steps"]) == (5, 0, 11)
    assert figures["prefill_tokens_per_second"] == pytest.approx(5 / figures["time_to_first_token_seconds"])
    assert figures["decode_tokens_per_second"] == figures["decode_steps_per_second"] > 0
    for name in ("load_seconds", "peak_memory_bytes", "bytes_per_step", "read_bandwidth_bytes_per_second"):
        assert result.data[name] > 0
    assert (result.data["device"], result.data["precision"]) == ("cpu", "float32")
    assert result.data["torch"] == torch.__version__
    assert "compile_seconds" not in result.data


def test_bytes_per_step_are_the_weights_without_the_embedding_and_the_cache(run, tiny_checkpoint):
    _, state_dict = read_checkpoint(tiny_checkpoint / "model.pth")
    numbers = sum(tensor.numel() for name, tensor in state_dict.items() if name != "transformer.wte.weight")
    cache = 2 * 2 * 128 * 2 * 12  # keys and values, layers, slots, kv heads, head dim
    assert run("--prompt", "5").data["bytes_per_step"] == 4 * (numbers + cache)


def test_a_row_that_has_ended_adds_nothing_to_the_decode_figure(run, folder):
    first, second = (sample["token_ids"] for sample in run("--batch_size", 2).samples)
    assert second[4] not in first + second[:4]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": second[4]}))
    (figures,) = run("--batch_size", 2, folder=folder).runs
    tokens = figures["decode_tokens_per_second"] / figures["decode_steps_per_second"] * figures["decode_steps"]
    assert tokens == pytest.approx(len(first) - 1 + 4)


def test_samples_and_rows_are_entries_of_their_own(run):
    result = run("--prompt", "Hello", "--num_samples", 2, "--batch_size", 2)
    assert len(result.samples) == 4 and len(result.runs) == 2
    assert len({tuple(sample["token_ids"]) for sample in result.samples}) == 4
    assert [line.partition(":")[0] for line in result.stderr.splitlines()][-2:] == ["memory", "median"]
    assert result.stdout.count("[row 1] ") == 2


def test_a_seed_can_be_repeated(run):
    first = run("--seed", 7, "--num_samples", 2).samples
    assert run("--seed", 7, "--num_samples", 2).samples == first
    assert run("--seed", 8).samples == first[1:]  # each sample takes the next seed


def test_a_number_as_prompt_needs_no_tokenizer(run, folder):
    for file in folder.glob("*.json"):
        file.unlink()
    result = run("--prompt", "9", folder=folder)
    assert len(result.samples[0]["prompt_ids"]) == 9 and len(result.samples[0]["token_ids"]) == 12
    assert result.samples[0]["text"] is None


def test_max_new_tokens_1_gives_one_token_and_no_decode_figure(run):
    result = run("--max_new_tokens", 1)
    assert len(result.samples[0]["token_ids"]) == 1
    assert result.runs[0]["decode_tokens_per_second"] is None and "decode" not in result.stderr


def test_a_prompt_that_fills_the_context_gets_one_token(run):
    assert len(run("--prompt", "128").samples[0]["token_ids"]) == 1


def test_top_k_0_samples_from_the_whole_vocabulary(run):
    hot = ("--prompt", "5", "--temperature", 1000, "--max_new_tokens", 100, "--batch_size", 20, "--ignore_eos")
    ids = {id for sample in run(*hot, "--top_k", 0).samples for id in sample["token_ids"]}
    assert len(ids) > 250  # of 260, in 2,000 draws that are nearly uniform
    few = {id for sample in run(*hot, "--top_k", 1).samples for id in sample["token_ids"][:1]}
    assert len(few) == 1


@pytest.mark.parametrize("temperature", [1e-30, 1e-45])
def test_a_temperature_next_to_0_is_greedy(run, temperature):
    assert run("--temperature", temperature).samples == run(*GREEDY).samples


def test_a_special_token_as_stop_string_ends_the_answer(run, refused, folder):
    ids = run(*GREEDY).samples[0]["token_ids"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": ids[5], "content": "<|stop|>"})
    tokenizer["model"]["vocab"] = {
        "<|stop|>" if id == ids[5] else piece: id for piece, id in tokenizer["model"]["vocab"].items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (sample,) = run(*GREEDY, "--ignore_eos", "--stop", "<|stop|>", folder=folder).samples
    assert (sample["token_ids"], sample["stop_reason"]) == (ids[:6], "stop") and ids[5] not in ids[:5]
    assert "holds '<|stop|>', a special token" in refused("--stop", "<|stop|>\n", folder=folder)


def test_a_stop_string_ends_the_answer_before_it(run):
    text = run(*GREEDY).samples[0]["text"]
    stop = text[4:7]
    result = run(*GREEDY, "--stop", "never this", stop)
    assert result.samples[0]["text"] == text.partition(stop)[0]
    assert result.samples[0]["stop_reason"] == "stop"


def test_an_eos_ends_the_answer_unless_it_is_ignored(run, folder):
    ids = run(*GREEDY).samples[0]["token_ids"]
    end = ids[5]
    assert end not in ids[:5]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, end]}))
    sample = run(*GREEDY, folder=folder).samples[0]
    assert (sample["token_ids"], sample["stop_reason"]) == (ids[:6], "eos")
    sample = run(*GREEDY, "--ignore_eos", folder=folder).samples[0]
    assert (sample["token_ids"], sample["stop_reason"]) == (ids, "length")


def test_end_tokens_that_cannot_be_read_are_refused_before_anything_is_shown(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2')
    end = process(folder, "--prompt", "Hello")
    assert (end.code, end.stdout) == (2, "")
    assert "generation_config.json is not JSON" in end.stderr


def test_the_reference_writes_the_same_greedy_text(run, monkeypatch):
    expected = run(*GREEDY, "--prompt", "Hello", "--batch_size", 2)
    monkeypatch.setattr("checkpoint.FastGPT", None)
    result = run(*GREEDY, "--prompt", "Hello", "--batch_size", 2, "--reference")
    assert result.samples == expected.samples and result.stdout == expected.stdout


# --- Prompts from a file ----------------------------------------------------------------------------------------------

PROMPTS = ["Hello", " A longer one, é", "3"]


@pytest.fixture
def prompt_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("Hello\r\n\n A longer one, é\n  \n3".encode())
    return file


@pytest.mark.parametrize("options", [[], ["--chat"], ["--reference"], ["--compile", "--compile_prefill"]])
def test_the_rows_of_a_prompt_file_are_what_the_prompts_give_alone(run, prompt_file, options):
    torch.compiler.reset()
    long = ("--max_new_tokens", 200, "--ignore_eos")  # until each row's context is full
    result = run(*options, *long, "--prompt_file", prompt_file, "--num_samples", 2)
    eager = [] if "--compile" in options else options
    for row, prompt in enumerate(PROMPTS[:2]):  # --prompt 3 would be three random tokens
        for at in (row, row + 3):  # no two rows have a seed in common
            (alone,) = run(*eager, *long, "--prompt", prompt, "--seed", 1234 + at).samples
            assert result.samples[at] == alone
    assert len({len(sample["token_ids"]) for sample in result.samples}) == 3


def test_the_rows_of_a_prompt_file_are_printed_in_the_end(run, prompt_file, tiny_checkpoint):
    result = run("--prompt_file", prompt_file)
    assert result.samples[2]["prompt_ids"] == load_tokenizer(tiny_checkpoint).encode("3")
    texts = [sample["text"] for sample in result.samples]
    lines = [f"[row {row}] {prompt}{text}\n" for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True))]
    assert result.stdout == "".join(lines)
    chat = run("--prompt_file", prompt_file, "--chat")
    assert chat.stdout == "".join(f"[row {row}] {sample['text']}\n" for row, sample in enumerate(chat.samples))


def test_the_figures_of_a_prompt_file_count_the_tokens_of_all_rows(run, prompt_file, folder):
    ids = [sample["token_ids"] for sample in run("--prompt_file", prompt_file).samples]
    assert ids[1][4] not in ids[0] + ids[1][:4] + ids[2]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[1][4]}))
    (figures,) = run("--prompt_file", prompt_file, folder=folder).runs
    seconds = figures["time_to_first_token_seconds"]
    assert figures["prompt_tokens"] == 5 + 17 + 1  # bytes
    assert figures["prefill_tokens_per_second"] == pytest.approx((5 + 17 + 1) / seconds)
    tokens = figures["decode_tokens_per_second"] / figures["decode_steps_per_second"] * figures["decode_steps"]
    assert tokens == pytest.approx(11 + 4 + 11)


def test_a_stop_string_ends_its_row_alone_and_all_ended_rows_the_run(run, prompt_file):
    texts = [sample["text"] for sample in run("--prompt_file", prompt_file).samples]
    stop = texts[0][4:7]
    result = run("--prompt_file", prompt_file, "--stop", stop)
    assert [sample["text"] for sample in result.samples] == [text.partition(stop)[0] for text in texts]
    assert [sample["stop_reason"] for sample in result.samples] == ["stop", "length", "length"]


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        (b"", [], "has no prompt; write one a line"),
        (b"\n \r\n", [], "has no prompt; write one a line"),
        (b"a\xff", [], "is not UTF-8"),
        (b"a\n\n" + b"x" * 129, [], "has 129 tokens, more than the context of 128; shorten it"),
        (b"a", ["--prompt", "b"], "leave out --prompt, --interactive and --batch_size"),
        (b"a", ["--interactive"], "leave out --prompt, --interactive and --batch_size"),
        (b"a", ["--batch_size", "2"], "leave out --prompt, --interactive and --batch_size"),
    ],
)
def test_a_prompt_file_that_cannot_be_is_refused_in_one_line(refused, tmp_path, content, options, sentence):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    (line,) = refused("--prompt_file", file, *options).splitlines()
    assert line.startswith("error: ") and sentence in line
    assert options or str(file) in line
    assert "129" not in line or line.startswith(f"error: line 3 of {file} has")


def test_a_missing_prompt_file_is_refused_in_one_line(refused, tmp_path):
    (line,) = refused("--prompt_file", tmp_path / "nowhere.txt").splitlines()
    assert line.startswith("error: ") and "nowhere.txt" in line


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_precision_is_the_one_asked_for(run):
    exact, rounded = run("--prompt", "5"), run("--prompt", "5", "--precision", "bfloat16")
    assert rounded.data["precision"] == "bfloat16"
    assert rounded.data["bytes_per_step"] * 2 == exact.data["bytes_per_step"]


def test_an_int8_cache_is_a_quarter_of_a_float32_one_and_keeps_the_text(run):
    plain, int8 = run(*GREEDY, "--prompt", "5"), run(*GREEDY, "--prompt", "5", "--kv_cache", "int8")
    values = 2 * 2 * 2 * 128 * 12  # keys and values, layers, kv heads, slots, head_dim; a bf16 scale for each 12
    assert plain.data["bytes_per_step"] - int8.data["bytes_per_step"] == values * (4 - 1) - values // 12 * 2
    same = [a == b for a, b in zip(plain.samples[0]["token_ids"], int8.samples[0]["token_ids"], strict=True)]
    assert all(same[:4])  # rounding shows later


def test_only_a_text_that_goes_on_begins_with_a_space(run, folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["decoder"] = {"type": "Sequence", "decoders": SENTENCEPIECE_STEPS}
    tokenizer["model"]["vocab"] = {f"▁{id}": id for id in range(256)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = "".join(f" {id}" for id in run("--prompt", "5").samples[0]["token_ids"] if id < 256)
    assert run("--prompt", "5", folder=folder).samples[0]["text"] == words
    assert run("--prompt", "5", "--chat", folder=folder).samples[0]["text"] == words[1:]


def test_profile_writes_a_chrome_trace(run, tmp_path):
    run("--profile", tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_chat_renders_the_models_template(run, tiny_checkpoint):
    result = run("--chat", "--prompt", "Hi")
    tokenizer = load_tokenizer(tiny_checkpoint)
    user, answer, end = (tokenizer.token_id(f"<|{name}|>") for name in ("user", "assistant", "end"))
    assert result.samples[0]["prompt_ids"] == [user, *tokenizer.encode("Hi"), end, answer]
    assert not result.stdout.startswith("Hi")


@pytest.fixture
def in_channels(folder, monkeypatch):
    """The folder with gpt-oss's special tokens, and a function that says what the model will write."""
    names = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(names)
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|return|>", "chat_template": template}))
    (folder / "generation_config.json").unlink()  # where "<|end|>" ends an answer
    config = replace(read_checkpoint(folder / "model.pth")[0], vocab_size=264)
    write_checkpoint(folder / "model.pth", config, random_weights(config))
    tokenizer = load_tokenizer(folder)

    def write(*texts):
        texts = iter([[[id] for id in tokenizer.encode(text)] for text in texts])
        monkeypatch.setattr(generate, "generate", lambda *_, **more: iter(next(texts)))
        monkeypatch.setattr(generate, "warm_up", lambda *_: None)

    return write


THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|>"
SAID = "<|start|>assistant<|channel|>final<|message|>Yes.<|return|>"


@pytest.mark.parametrize("aloud", [(), ("--show_reasoning",)])
def test_a_person_sees_the_answer_and_the_next_prompt_has_it(run, in_channels, folder, aloud):
    in_channels(THOUGHT + SAID, SAID.removeprefix("<|start|>assistant"))
    result = run("--interactive", "--chat", *aloud, folder=folder, stdin="A\nB\n")
    assert result.stdout == ("> Hm.\n\nYes.\n> Yes.\n> " if aloud else "> Yes.\n> Yes.\n> ")
    first, second = result.samples
    assert first["text"] == "Yes." and first["stop_reason"] == "eos" and "reasoning" not in result.stderr
    told = "<|start|>user<|message|>A<|end|><|start|>assistant<|message|>Yes.<|end|><|start|>user<|message|>B<|end|>"
    assert second["prompt_ids"] == load_tokenizer(folder).encode(told + "<|start|>assistant", bos=False)
    assert result.runs[1]["cached_tokens"] > 0


def test_an_answer_that_ends_in_its_reasoning_says_so(run, in_channels, folder):
    in_channels(THOUGHT.removesuffix("<|end|>"))
    result = run("--chat", "--prompt", "A", folder=folder)
    assert result.stdout == "\n" and result.samples[0]["text"] == ""
    assert "ended while the model was reasoning; give a larger --max_new_tokens" in result.stderr


def test_compiling_is_announced_and_in_no_figure(run):
    torch.compiler.reset()
    expected = run(*GREEDY, "--prompt", "5")
    with torch._inductor.config.patch(force_disable_caches=True):
        result = run(*GREEDY, "--prompt", "5", "--compile", "--num_samples", 2)
    assert result.samples == 2 * expected.samples
    first, second, *_ = result.stderr.splitlines()
    assert first.startswith("compiling") and second.startswith("compiled in ")
    assert result.data["compile_kind"] == "cold"
    for figures in result.runs:
        seconds = figures["time_to_first_token_seconds"] + 11 / figures["decode_steps_per_second"]
        assert seconds < result.data["compile_seconds"] / 2


def test_the_compiler_is_not_loaded_where_nothing_is_compiled(tiny_checkpoint):
    code = "import sys, generate; generate.main(generate.parse_arguments()); assert 'torch._dynamo' not in sys.modules"
    arguments = ["--checkpoint_path", str(tiny_checkpoint / "model.pth"), "--device", "cpu", "--prompt", "5"]
    folder = Path(generate.__file__).parent
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_new_token_leaves_nothing_to_compile(run):
    result = run(*GREEDY, "--prompt", "5", "--max_new_tokens", 1, "--compile")
    assert result.samples == run(*GREEDY, "--prompt", "5", "--max_new_tokens", 1).samples
    assert result.stderr.startswith("--compile compiles nothing") and "compiled in" not in result.stderr
    assert "compile_seconds" not in result.data
    result = run(*GREEDY, "--prompt", "5", "--max_new_tokens", 1, "--compile", "--prompt_lookup")
    assert "compiled in" in result.stderr


def test_a_compiled_prefill_takes_prompts_of_any_length_and_what_is_cached(run):
    torch.compiler.reset()
    session = (*GREEDY, "--interactive")
    lines = "Hello, you\nHello, my friend\nHello, me\n"
    expected = run(*session, stdin=lines)
    assert [figures["cached_tokens"] for figures in expected.runs] == [0, 7, 8]
    result = run(*session, "--compile_prefill", stdin=lines)
    assert result.samples == expected.samples
    assert [figures["compilations"] for figures in result.runs] == [0, 0, 0], result.stderr


# --- Nothing is compiled once a run has begun -------------------------------------------------------------------------

SESSION = "a\nHello, my friend\nb\nIs this a longer line, one that goes on for 60 characters? It is.\nHello, my\nab\n"
COPY = ("--prompt", "one two one two one two", "--ignore_eos", "--max_new_tokens", 90, "--seed", 3)


@pytest.fixture
def never_again(run, monkeypatch):
    """Compiled runs, without kernels, in whose answers it is an error to compile."""
    torch.compiler.reset()
    compile, answer, costs = torch.compile, generate.answer_once, generate.round_costs

    def strictly(*arguments, **more):
        with torch.compiler.set_stance("fail_on_recompile"):
            return answer(*arguments, **more)

    def rounds_that_pay(*arguments):
        return {k: 1 + k / 100 for k in costs(*arguments)}

    monkeypatch.setattr(torch, "compile", lambda f, options=None, **more: compile(f, backend="eager", **more))
    monkeypatch.setattr(generate, "answer_once", strictly)
    monkeypatch.setattr(generate, "round_costs", rounds_that_pay)
    return run


@pytest.mark.parametrize(
    "session",
    [
        [*GREEDY, *COPY, "--num_samples", 2],
        ["--temperature", 1, "--top_p", 0.9, "--interactive", "--compile_prefill"],
        [*GREEDY, "--interactive", "--chat"],
    ],
)
@pytest.mark.parametrize(
    "way",
    [
        ["--kv_cache", "int8"],
        ["--prompt_lookup", "--speculate_k", 3],
        ["--prompt_lookup", "--speculate_k", "auto"],
        ["--draft_checkpoint_path", "itself"],
        ["--draft_checkpoint_path", "itself", "--speculate_k", "auto"],
    ],
)
def test_nothing_is_compiled_in_an_answer(never_again, tiny_checkpoint, way, session):
    way = [tiny_checkpoint / "model.pth" if option == "itself" else option for option in way]
    result = never_again("--compile", *way, *session, stdin=SESSION)
    assert len(result.runs) == (2 if "--prompt" in session else 4 if "--chat" in session else 6)
    assert [figures["compilations"] for figures in result.runs] == [0] * len(result.runs)


def test_nothing_is_compiled_for_the_rows_of_a_file_or_the_plain_run_beside_drafts(never_again, prompt_file):
    never_again("--compile", "--compile_prefill", *GREEDY, "--prompt_file", prompt_file, "--num_samples", 2)
    lookup = ("--prompt_lookup", "--speculate_k", "auto", "--compare")
    result = never_again("--compile", *GREEDY, *lookup, "--prompt_file", prompt_file, "--max_new_tokens", 90)
    assert result.runs[0]["rounds"] and result.runs[0]["plain_steps"]  # so both kinds were there
    assert result.runs[0]["compilations"] == 0 and result.runs[0]["plain_tokens_per_second"] > 0


def test_a_run_in_which_something_was_compiled_says_so_and_gives_no_speed(run, monkeypatch):
    counts = iter(range(10))
    monkeypatch.setattr(generate, "compilations", lambda session: next(counts))
    result = run("--prompt", "5")
    assert "1 graphs or kernels were built inside this answer" in result.stderr and "tokens/s" not in result.stderr
    assert result.runs[0]["compilations"] == 1 and result.runs[0]["decode_tokens_per_second"] is None


# --- A session --------------------------------------------------------------------------------------------------------


def test_a_chat_goes_on_from_what_is_in_the_cache(run, tiny_checkpoint):
    result = run(*GREEDY, "--interactive", "--chat", stdin="Hello\nAnd then?\n")
    first, second = result.samples
    tokenizer = load_tokenizer(tiny_checkpoint)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first["text"]}]
    messages += [{"role": "user", "content": "And then?"}]
    assert second["prompt_ids"] == tokenizer.encode(tokenizer.render_chat(messages), bos=False)
    in_cache = first["prompt_ids"] + first["token_ids"][:-1]
    cached = [figures["cached_tokens"] for figures in result.runs]
    assert cached[0] == 0 and cached[1] >= len(first["prompt_ids"])
    assert second["prompt_ids"][: cached[1]] == in_cache[: cached[1]]


def test_the_cache_changes_no_answer(run):
    session = run(*GREEDY, "--interactive", stdin="Hello, you\nHello, me\nHello, you\n")
    assert [figures["cached_tokens"] for figures in session.runs] == [0, 7, 7]
    alone = [run(*GREEDY, "--prompt", f"Hello, {who}").samples[0] for who in ("you", "me")]
    assert session.samples == [*alone, alone[0]]


def test_of_an_answer_all_but_the_last_token_is_in_the_cache(run):
    short = (*GREEDY, "--interactive", "--max_new_tokens", 2)
    prompts = string.ascii_letters
    texts = [sample["text"] for sample in run(*short, stdin="\n".join(prompts)).samples]
    line = next(prompt + text for prompt, text in zip(prompts, texts, strict=True) if text.isascii() and text.isalnum())
    session = run(*short, stdin=f"{line[0]}\n{line}!\n")
    assert [figures["cached_tokens"] for figures in session.runs] == [0, 2]
    assert session.samples[1] == run(*GREEDY, "--max_new_tokens", 2, "--prompt", line + "!").samples[0]


def test_the_reference_has_no_cache(run):
    session = run(*GREEDY, "--interactive", "--reference", stdin="Hello, you\nHello, me\n")
    assert [figures["cached_tokens"] for figures in session.runs] == [0, 0]


def test_a_refused_message_is_not_in_the_chat(run):
    chat = (*GREEDY, "--interactive", "--chat")
    result = run(*chat, stdin=f"Hello\n{'x' * 200}\nAnd then?\n")
    assert result.samples == run(*chat, stdin="Hello\nAnd then?\n").samples
    assert result.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("x" * 200, "error: the prompt has 200 tokens"),
        ("", "error: the prompt is empty"),
        ("\udcff", "error: the text is not UTF-8"),
    ],
)
def test_a_bad_prompt_is_answered_and_the_session_goes_on(run, line, sentence):
    result = run(*GREEDY, "--interactive", stdin=f"Hello\n{line}\nHello\n")
    assert len(result.samples) == 2 and result.samples[0] == result.samples[1]
    assert result.stderr.count("error: ") == 1 and sentence in result.stderr


def test_a_full_conversation_says_how_to_begin_anew_and_does(run):
    chat = (*GREEDY, "--interactive", "--chat", "--ignore_eos", "--max_new_tokens", 40)
    result = run(*chat, stdin=f"Hello\n{'x' * 90}\n\n/reset\nHello\n")
    assert len(result.samples) == 3 and result.samples[0] == result.samples[2] != result.samples[1]
    assert "the conversation has" in result.stderr and "/reset begins anew" in result.stderr


def test_bytes_that_are_no_text_are_refused_and_the_session_goes_on(tiny_checkpoint, tmp_path):
    arguments = command(tiny_checkpoint, "--interactive", "--json", tmp_path / "run.json")
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    lines = b"abc\ncaf\xe9\nabc\n"
    end = subprocess.run([sys.executable, *arguments], input=lines, capture_output=True, env=environment)
    first, second = json.loads((tmp_path / "run.json").read_text())["samples"]
    assert end.returncode == 0 and first["prompt_ids"] == second["prompt_ids"]
    assert end.stderr.count(b"error: ") == 1 and b"error: the text is not UTF-8" in end.stderr


def test_a_text_that_stdout_cannot_show_is_printed_with_replacements(tiny_checkpoint):
    arguments = command(tiny_checkpoint, "--prompt", "中é")
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    end = subprocess.run([sys.executable, *arguments], capture_output=True, env=environment)
    assert end.returncode == 0 and end.stdout.startswith(b"?\xe9")


def typed(arguments, keys: bytes) -> None:
    """Run a command in a terminal in which somebody types."""
    terminal, inside = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), inside)
    with subprocess.Popen([sys.executable, *arguments], **streams, env=environment) as end:
        os.close(inside)
        shown = b""
        with suppress(OSError):  # how a terminal ends
            while piece := os.read(terminal, 4096):
                shown += piece
                if shown.endswith(b"> "):
                    os.write(terminal, keys + b"\r" if keys else b"\x04")
                    shown, keys = b"", b""
    os.close(terminal)
    assert end.returncode == 0, shown


def test_a_terminal_gives_lines_of_any_length_edited_with_the_cursor_keys(tiny_checkpoint, tmp_path):
    config, state_dict = read_checkpoint(tiny_checkpoint / "model.pth")
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "long"))
    write_checkpoint(folder / "model.pth", replace(config, block_size=8192), state_dict)
    file = tmp_path / "run.json"
    for keys, prompt in ((b"x" * 5003, b"x" * 5003), (b"ac\x1b[Db", b"abc")):
        options = ("--interactive", "--max_seq_length", 8192, "--max_new_tokens", 1, "--json", file)
        typed(command(folder, *options), keys)
        ids = json.loads(file.read_text())["samples"][0]["prompt_ids"]
        assert ids == load_tokenizer(folder).encode(prompt.decode())


def test_ctrl_c_leaves_what_there_is(tiny_checkpoint, tmp_path):
    arguments = command(tiny_checkpoint, "--prompt", "abc", "--num_samples", 10**6, "--json", tmp_path / "run.json")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background would ignore it
    with subprocess.Popen([sys.executable, *arguments], **streams, preexec_fn=heeds) as running:
        running.stdout.readline()
        running.stdout.readline()  # the first answer is complete
        running.send_signal(signal.SIGINT)
        try:
            running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 130 and [file.name for file in tmp_path.iterdir()] == ["run.json"]
    data = json.loads((tmp_path / "run.json").read_text())
    assert data["samples"][0]["stop_reason"] == "length" and len(data["samples"]) - len(data["runs"]) in (0, 1)


def test_a_chat_that_the_draft_has_no_room_for_continues_after_reset(run, tiny_checkpoint, tmp_path):
    config, state_dict = read_checkpoint(tiny_checkpoint / "model.pth")
    small = Path(shutil.copytree(tiny_checkpoint, tmp_path / "small"))
    write_checkpoint(small / "model.pth", replace(config, block_size=64), state_dict)
    chat = ("--interactive", "--chat", "--ignore_eos", "--draft_checkpoint_path", small / "model.pth")
    result = run(*GREEDY, *chat, "--max_new_tokens", 30, stdin=f"Hello\n{'x' * 40}\n/reset\nHello\n")
    assert len(result.samples) == 2 and result.samples[0] == result.samples[1]
    assert "/reset begins anew" in result.stderr


# --- Bad input --------------------------------------------------------------------------------------------------------


def text_file(path):
    path.write_text("Once upon a time")


def pickled_list(path):
    path.write_bytes(pickle.dumps([1, 2, 3]))


def saved_list(path):
    torch.save([1, 2, 3], path)


def empty_file(path):
    path.write_bytes(b"")


def half_a_file(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def test_weights_quantized_while_loading_are_those_of_the_file(run, refused, folder, tiny_checkpoint):
    options = ["--checkpoint_path", folder / "model.pth", "--mode", "int8", "--out_path", folder / "other.pth"]
    subprocess.run([sys.executable, quantize.__file__, *map(str, options)], check=True)
    (folder / "other.pth").rename(folder / "model.pth")  # what a file is called means nothing
    quantized = run("--quantize", "int8", *GREEDY)
    assert run(folder=folder).data["bytes_per_step"] == quantized.data["bytes_per_step"] < run().data["bytes_per_step"]
    assert run(*GREEDY, folder=folder).samples == quantized.samples
    assert "is quantized already" in refused("--quantize", "int8", folder=folder)


def directory(path):
    path.unlink()
    path.mkdir()


def other_version(path):
    torch.save(torch.load(path) | {"format_version": 99}, path)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (Path.unlink, "does not exist"),
        (directory, "is a directory"),
        (half_a_file, "is not a whole torch checkpoint"),
        (empty_file, "is not a whole torch checkpoint"),
        (text_file, "is not a whole torch checkpoint"),
        (pickled_list, "is not a whole torch checkpoint"),
        (saved_list, "is no checkpoint of this project"),
        (other_version, "has format version 99"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(refused, folder, damage, sentence):
    damage(folder / "model.pth")
    (line,) = refused(folder=folder).splitlines()
    assert line.startswith(f"error: {folder / 'model.pth'} {sentence}")


def failed(capsys, folder, *arguments) -> tuple[int, str]:
    """The exit code of a run, and what it wrote to stderr."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", command(folder, *arguments))
        runpy.run_path(generate.__file__, run_name="__main__")
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--reference"], ["--prompt_lookup"], GREEDY, ["--top_p", "0.5"]])
@pytest.mark.parametrize(
    ("scale", "precision", "cause"),
    [
        (3e3, "float16", "too large for float16; give --precision"),
        (float("nan"), "float32", "not finite, first in layers.0"),
    ],
)
def test_logits_that_are_not_finite_end_the_run(capsys, folder, tmp_path, options, scale, precision, cause):
    config, state_dict = read_checkpoint(folder / "model.pth")
    state_dict = {name: tensor.clone() for name, tensor in state_dict.items()}
    for name, factor in (("gate", scale), ("up", scale), ("down", scale**-2)):
        state_dict[f"transformer.h.0.mlp.{name}_proj.weight"] *= factor
    write_checkpoint(folder / "model.pth", config, state_dict)
    if "--reference" in options:
        cause = cause.replace("layers.0", "transformer.h.0")
    options = ["--prompt", "abc", *options, "--precision", precision, "--json", tmp_path / "run.json"]
    code, told = failed(capsys, folder, *options)
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 1 and cause in line
    assert not (tmp_path / "run.json").exists()  # not even the warm-up went well


def test_a_draft_whose_logits_are_not_finite_ends_the_run(capsys, folder, tiny_checkpoint):
    config, state_dict = read_checkpoint(folder / "model.pth")
    nan = {name: tensor * float("nan") for name, tensor in state_dict.items()}
    write_checkpoint(folder / "draft.pth", config, nan)
    code, told = failed(capsys, folder, "--prompt", "abc", "--draft_checkpoint_path", folder / "draft.pth")
    assert code == 1 and "the weights hold numbers that are not finite" in told


def test_too_large_a_batch_is_refused_in_one_line(refused):
    (line,) = refused("--prompt", "abc", "--batch_size", 10**7).splitlines()
    assert line.startswith("error: there is not enough memory on this device for 1") and "--batch_size" in line


def test_a_missing_compiler_is_an_error_in_one_line(tiny_checkpoint, tmp_path):
    (tmp_path / "bin").mkdir()
    environment = os.environ | {"PATH": str(tmp_path / "bin"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("CXX", None)
    arguments = command(tiny_checkpoint, "--prompt", "abc", "--compile")
    end = subprocess.run([sys.executable, *arguments], capture_output=True, env=environment)
    assert end.returncode == 2 and end.stderr.splitlines()[-1].startswith(b"error: --compile needs a C++ compiler")


def test_a_gpu_without_bfloat16_is_named_where_the_compiler_refuses_it():
    from torch._inductor.compile_fx import _check_triton_bf16_support

    message = "BF16 is not supported"
    assert message in inspect.getsource(_check_triton_bf16_support)
    code, sentence = explain(RuntimeError(f"SkipFrame: {message}"))
    assert code == 2 and sentence.startswith("--compile takes no bfloat16 on this GPU")


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def half_a_tokenizer(folder):
    half_a_file(folder / "tokenizer.json")


def large_tokenizer(folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"] |= {f"word{id}": id for id in range(256, 261)}  # added tokens alone would be let pass
    (folder / "tokenizer.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (no_tokenizer, "has neither tokenizer.json nor tokenizer.model"),
        (half_a_tokenizer, "is not JSON"),
        (large_tokenizer, "has 261 tokens, the model 260"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused_in_one_line(refused, folder, damage, sentence):
    damage(folder)
    (line,) = refused(folder=folder).splitlines()
    assert line.startswith("error: ") and str(folder) in line and sentence in line


def test_a_chat_without_template_is_refused_in_one_line(refused, folder):
    (folder / "tokenizer_config.json").unlink()
    for options in (["--chat"], ["--chat", "--interactive"]):
        (line,) = refused(*options, folder=folder).splitlines()
        assert line.startswith("error: ") and "has no chat template" in line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", "129"], "the prompt has 129 tokens, more than the context of 128"),
        (["--prompt", "x" * 129], "the prompt has 129 tokens, more than the context of 128"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "0"], "the prompt is empty"),
        (["--prompt", str(10**13)], "more than the context of 128"),
        (["--prompt", "a\udcff"], "the text is not UTF-8"),
        (["--stop", ""], "at least one character"),
        (["--device", "cuda:99"], "there is no device 'cuda:99'"),
        (["--device", "nonsense"], "there is no device 'nonsense'"),
        (["--device", ""], "there is no device ''"),
        (["--device", "meta"], "there is no device 'meta'"),
        (["--top_p", "0"], "top_p above 0"),
        (["--top_p", "nan"], "top_p above 0"),
        (["--top_k", "-1"], "top_k must be 0 or more"),
        (["--temperature", "-1"], "temperature and top_k must be 0 or more"),
        (["--temperature", "nan"], "temperature and top_k must be 0 or more"),
        (["--quantize", "int4"], "transformer.h.0.attn.o_proj.weight has 48 columns, which groups of 32 do not divide"),
        (["--quantize", "mxfp4"], "of the group sizes these do: none, so use int8"),
        (["--show_reasoning"], "--show_reasoning is for a chat; add --chat"),
        (["--reference", "--compile"], "leave out --compile"),
        (["--reference", "--compile_prefill"], "leave out --compile"),
        (["--reference", "--kv_cache", "int8"], "leave out --kv_cache"),
        (["--interactive", "--batch_size", "2"], "leave out --batch_size"),
        (["--interactive", "--num_samples", "2"], "leave out --num_samples"),
        (["--interactive", "--prompt", "ab"], "leave out --prompt"),
        (["--ngram", "2"], "--ngram is for --prompt_lookup"),
        (["--quantize", "int8", "--group_size", "64"], "--group_size is for --quantize int4"),
        (["--json", "same", "--profile", "./same"], "same would be written over"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_line(refused, arguments, sentence):
    (line,) = refused(*arguments).splitlines()
    assert line.startswith("error: ") and sentence in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max_new_tokens", "0"],
        ["--num_samples", "-1"],
        ["--batch_size", "two"],
        ["--max_seq_length", "0"],
        ["--precision", "int3"],
        ["--temperature", "warm"],
        ["--seed", str(2**64)],
        ["--batch_size", str(10**30)],
        ["--stop"],
        ["--no_such_option"],
    ],
)
def test_a_word_that_is_no_value_is_refused_with_the_usage(refused, arguments):
    *usage, line = refused(*arguments).splitlines()
    assert usage[0].startswith("usage: ") and "error: " in line and arguments[0] in line


def test_a_refusal_is_one_line_of_the_process_too(tiny_checkpoint, tmp_path):
    end = process(tiny_checkpoint, "--prompt", "129", "--json", tmp_path / "run.json")
    assert (end.code, end.stdout) == (2, "")
    assert end.stderr == "error: the prompt has 129 tokens, more than the context of 128; shorten it\n"
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_cannot_be_written_is_an_error(refused, tmp_path):
    assert refused("--profile", tmp_path).splitlines()[-1].startswith("error: ")


def test_json_that_cannot_be_written_is_an_error_in_one_line(refused, tmp_path):
    (tmp_path / "file").write_text("")
    *_, line = refused("--json", tmp_path / "file" / "run.json").splitlines()
    assert line.startswith("error: ") and str(tmp_path / "file") in line


def test_a_run_that_breaks_while_it_writes_leaves_the_json_of_before(refused, tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    file.write_text("of before")

    def write_half(path, text):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_text", write_half)
    assert refused("--json", file).splitlines()[-1] == "error: the disk is full"
    assert file.read_bytes() == b"of before" and list(tmp_path.iterdir()) == [file]


def test_a_killed_run_leaves_no_json(tiny_checkpoint, tmp_path):
    arguments = command(tiny_checkpoint, "--prompt", "5", "--num_samples", 10**6, "--json", tmp_path / "run.json")
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        running.stdout.readline()  # it is in the middle
        running.terminate()
        running.communicate()
    assert list(tmp_path.iterdir()) == []
