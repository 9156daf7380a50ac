"""scripts/evaluate.py against sums written down another way: one token at a time, by the reference model.

The tokenizer is one of bytes. The adapter is tested on a stand-in for its base class, once on lm_eval where that is.
"""

import json
import math
import runpy
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import scripts.evaluate as evaluate
from check_equivalence import random_weights
from checkpoint import build_model, read_checkpoint, write_checkpoint
from tokenizer import load_tokenizer

TEXT = "Der Zug nach Köln fährt um 8:15.\r\nTwo things are infinite: ½ and 東京. " * 3


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """So that the small windows here are cut into several parts too, the last of them smaller."""
    monkeypatch.setattr(evaluate, "ROWS", 7)


@pytest.fixture(scope="module")
def other_checkpoint(tiny_checkpoint, tmp_path_factory):
    """The same tokenizer; weights near enough that some of the likeliest tokens are the same, and surer of them."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_checkpoint, folder)
    config, weights = read_checkpoint(tiny_checkpoint / "model.pth")
    noise = random_weights(config, seed=1)
    weights = {name: tensor + 0.1 * noise[name] for name, tensor in weights.items()}
    write_checkpoint(folder / "model.pth", config, weights | {"lm_head.weight": 2 * weights["lm_head.weight"]})
    return folder


def load(folder, reference=True):
    config, weights = read_checkpoint(folder / "model.pth")
    return build_model(config, weights, "cpu", torch.float32, reference), load_tokenizer(folder)


def next_token(model, context):
    """Log-probabilities [V] of the token after these."""
    return model(torch.tensor([context]))[0, -1].double().log_softmax(-1)


def contexts(ids, window, stride):
    """For each token but the first: what it is predicted from, by the rule and not by going through the windows."""
    for at in range(1, len(ids)):
        number = max(0, math.ceil((at - window) / stride))  # of the first window that reaches the token before it
        yield ids[number * stride : at]


def figures_of(tmp_path, *arguments, text=TEXT):
    (tmp_path / "text.txt").write_bytes(text.encode())
    options = ["--text", str(tmp_path / "text.txt"), "--json", str(tmp_path / "figures.json"), "--device", "cpu"]
    sys.argv = ["evaluate.py", *map(str, arguments), *options]
    evaluate.main(evaluate.parse_arguments())
    return json.loads((tmp_path / "figures.json").read_text())


@pytest.fixture(autouse=True)
def own_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", [])


# --- Perplexity and KL ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "stride", "tokens"),
    [
        (32, 16, 90),  # the last window is cut off
        (32, 16, 81),  # it is full
        (32, 20, 90),  # the stride does not divide the window
        (32, 32, 90),  # no overlap
        (32, 1, 50),
        (24, 24, 25),  # one window, full to the last
        (128, 64, 40),  # a text shorter than the window
        (128, 64, 2),
    ],
)
def test_perplexity_is_that_of_every_token_once(tiny_checkpoint, tmp_path, capsys, window, stride, tokens):
    model, tokenizer = load(tiny_checkpoint)
    ids = tokenizer.encode(TEXT)[:tokens]
    rows = [next_token(model, context) for context in contexts(ids, window, stride)]
    nats = -sum(row[id].item() for row, id in zip(rows, ids[1:], strict=True))
    options = ["--window", window, "--stride", stride, "--max_tokens", tokens]
    figures = figures_of(tmp_path, "--checkpoint_path", tiny_checkpoint / "model.pth", *options)
    assert figures["tokens"] == tokens - 1
    assert figures["perplexity"] == pytest.approx(math.exp(nats / (tokens - 1)), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / (tokens - 1), rel=1e-5)  # a token is a byte
    out = capsys.readouterr().out
    assert f"{tokens - 1} predicted, in windows of {window} with stride {stride}" in out
    assert f"{figures['perplexity']:.4f}" in out and f"{figures['bits_per_byte']:.4f} bits per byte" in out


def test_windows():
    ids = list(range(11))
    chunks = [([0, 1, 2, 3], [1, 2, 3, 4]), ([4, 5, 6, 7], [5, 6, 7, 8])]
    assert list(evaluate.windows(ids, 4, 4)) == [*chunks, ([8, 9], [9, 10])]
    assert list(evaluate.windows(ids, 4, 4, full=True)) == [*chunks, ([6, 7, 8, 9], [9, 10])]
    assert list(evaluate.windows(ids[:7], 4, 2)) == [([0, 1, 2, 3], [1, 2, 3, 4]), ([2, 3, 4, 5], [5, 6])]
    assert list(evaluate.windows(ids[:3], 4, 2, full=True)) == [([0, 1], [1, 2])]


def test_the_default_window_fits_the_context(tiny_checkpoint, tmp_path):
    figures = figures_of(tmp_path, "--checkpoint_path", tiny_checkpoint / "model.pth")
    assert (figures["window"], figures["stride"]) == (128, 64)
    assert figures["tokens"] == len(TEXT.encode()) - 1  # \r\n is two of them


def test_a_bos_is_there_if_the_tokenizer_adds_one(tiny_checkpoint, tmp_path):
    folder = tmp_path / "bos"
    shutil.copytree(tiny_checkpoint, folder)
    settings = json.loads((folder / "tokenizer.json").read_text())
    bos, special = {"SpecialToken": {"id": "<|user|>", "type_id": 0}}, {"id": "<|user|>", "ids": [257]}
    single = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single}
    settings["post_processor"] = template | {"special_tokens": {"<|user|>": special | {"tokens": ["<|user|>"]}}}
    (folder / "tokenizer.json").write_text(json.dumps(settings))

    model, tokenizer = load(folder)
    ids = tokenizer.encode("abc")
    assert ids[0] == 257 and len(ids) == 4
    nats = -sum(next_token(model, ids[:at])[ids[at]].item() for at in (1, 2, 3))
    figures = figures_of(tmp_path, "--checkpoint_path", folder / "model.pth", text="abc")
    assert figures["tokens"] == 3 and figures["nats_per_token"] == pytest.approx(nats / 3, rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(nats / 3 / math.log(2), rel=1e-5)
    adapter = adapter_of(folder)
    last, both = next_token(model, ids[:3])[ids[3]].item(), sum(next_token(model, ids[:n])[ids[n]] for n in (1, 2))
    assert adapter.loglikelihood([request("ab", "c")])[0][0] == pytest.approx(last, rel=1e-5)
    assert adapter.loglikelihood([request("", "ab")])[0][0] == pytest.approx(both.item(), rel=1e-5)
    assert adapter.loglikelihood_rolling([request("abc")]) == [pytest.approx(-nats, rel=1e-5)]  # and no second BOS


def test_an_int8_cache_loses_little_but_something(tiny_checkpoint, tmp_path):
    figures = figures_of(
        tmp_path, "--checkpoint_path", tiny_checkpoint / "model.pth", "--against", tiny_checkpoint / "model.pth",
        "--kv_cache", "int8",
    )  # fmt: skip
    assert 1e-9 < figures["kl_mean"] < 1e-3 and figures["top_1_agreement"] > 0.9


def test_a_model_is_at_no_distance_from_itself(tiny_checkpoint, tmp_path):
    path = tiny_checkpoint / "model.pth"
    figures = figures_of(tmp_path, "--checkpoint_path", path, "--against", path, "--window", 40, "--stride", 30)
    assert figures["kl_mean"] == pytest.approx(0, abs=1e-9) == figures["kl_99_percent"]
    assert figures["top_1_agreement"] == 1


def test_kl_against_another_model(tiny_checkpoint, other_checkpoint, tmp_path, capsys):
    (model, tokenizer), (other, _) = load(tiny_checkpoint), load(other_checkpoint)
    ids = tokenizer.encode(TEXT)[:120]
    kl, reverse, same = [], [], 0
    for context in contexts(ids, 40, 25):
        q, p = next_token(model, context), next_token(other, context)
        kl.append((p.exp() * (p - q)).sum().item())
        reverse.append((q.exp() * (q - p)).sum().item())
        same += q.argmax() == p.argmax()
    kl.sort()
    options = ["--against", other_checkpoint / "model.pth", "--window", 40, "--stride", 25, "--max_tokens", 120]
    figures = figures_of(tmp_path, "--checkpoint_path", tiny_checkpoint / "model.pth", *options)
    assert sum(kl) / 119 != pytest.approx(sum(reverse) / 119, rel=0.05)  # or the direction would not be seen
    assert figures["kl_mean"] == pytest.approx(sum(kl) / 119, rel=1e-4)
    assert kl[-3] < figures["kl_99_percent"] < kl[-1] and kl[-3] < kl[-2]  # 99% of 119 is 117.8
    assert figures["top_1_agreement"] == pytest.approx(same.item() / 119) and 0.1 < figures["top_1_agreement"] < 0.9
    alone = figures_of(tmp_path, "--checkpoint_path", tiny_checkpoint / "model.pth", *options[2:])
    assert alone["perplexity"] == pytest.approx(figures["perplexity"], rel=1e-6) and "kl_mean" not in alone
    assert f"{figures['kl_mean']:.3e} nats" in capsys.readouterr().out


@pytest.mark.parametrize("size", [1, 2, 119, 1000, 2**24 + 1])
def test_a_quantile_of_any_number_of_values(size):
    """torch.quantile refuses the last, so there the values are 0, 1, ... in another order."""
    values = torch.randperm(size, generator=torch.Generator().manual_seed(0)).double()
    assert evaluate.quantile(values, 0.99) == pytest.approx(0.99 * (size - 1), rel=1e-12)
    if size <= 2**24:
        assert evaluate.quantile(values, 1) == size - 1
        noise = torch.randn(size, generator=torch.Generator().manual_seed(1)).double()
        assert evaluate.quantile(noise, 0.99) == pytest.approx(torch.quantile(noise, 0.99).item(), rel=1e-12)


def test_more_tokens_than_torch_takes_a_quantile_of(tiny_checkpoint, tmp_path, monkeypatch):
    def too_large(*arguments):
        raise RuntimeError("quantile() input tensor is too large")

    monkeypatch.setattr(torch, "quantile", too_large)
    path = tiny_checkpoint / "model.pth"
    assert figures_of(tmp_path, "--checkpoint_path", path, "--against", path)["kl_99_percent"] == 0


def test_a_byte_order_mark_is_no_text(tiny_checkpoint, tmp_path):
    plain, marked = (
        figures_of(tmp_path, "--checkpoint_path", tiny_checkpoint / "model.pth", text=text)
        for text in (TEXT, "\ufeff" + TEXT)
    )
    assert marked["tokens"] == plain["tokens"] and marked["perplexity"] == plain["perplexity"]


# --- Numbers that are not finite --------------------------------------------------------------------------------------


@pytest.fixture
def large(tiny_checkpoint, tmp_path):
    """A folder of the same model, whose hidden units are too large for float16."""
    folder = tmp_path / "large"
    shutil.copytree(tiny_checkpoint, folder)
    config, weights = read_checkpoint(folder / "model.pth")
    for name, factor in (("up", 3e4), ("gate", 3e4), ("down", 1 / 9e8)):
        weights[f"transformer.h.0.mlp.{name}_proj.weight"] = weights[f"transformer.h.0.mlp.{name}_proj.weight"] * factor
    write_checkpoint(folder / "model.pth", config, weights)
    return folder


@pytest.fixture
def damaged(tiny_checkpoint, tmp_path):
    """A folder of the same model with one weight that is no number."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, folder)
    config, weights = read_checkpoint(folder / "model.pth")
    weights["transformer.h.1.mlp.down_proj.weight"] = weights["transformer.h.1.mlp.down_proj.weight"].clone()
    weights["transformer.h.1.mlp.down_proj.weight"][3, 4] = float("nan")
    write_checkpoint(folder / "model.pth", config, weights)
    return folder


def not_finite(tmp_path, *arguments, match, text=TEXT):
    with pytest.raises(FloatingPointError, match=match) as error:
        figures_of(tmp_path, *arguments, text=text)
    assert "\n" not in str(error.value) and not (tmp_path / "figures.json").exists()


def test_a_model_too_large_for_float16_is_named_so(large, tmp_path):
    path = large / "model.pth"
    not_finite(tmp_path, "--checkpoint_path", path, "--precision", "float16", match="too large for float16; give")
    assert math.isfinite(figures_of(tmp_path, "--checkpoint_path", path, "--precision", "float32")["perplexity"])


def test_damaged_weights_are_named(damaged, tiny_checkpoint, tmp_path):
    match = "the weights hold numbers that are not finite, first in .*1.*down.*; convert the model again"
    good, bad = tiny_checkpoint / "model.pth", damaged / "model.pth"
    not_finite(tmp_path, "--checkpoint_path", bad, match=match)
    not_finite(tmp_path, "--checkpoint_path", good, "--against", bad, match=match)
    not_finite(tmp_path, "--checkpoint_path", bad, "--against", good, match=match)


@pytest.mark.parametrize("last", [2, 12])  # of 6 windows, each of two models
def test_logits_are_looked_at_in_the_first_window_and_in_the_last(tiny_checkpoint, tmp_path, monkeypatch, last):
    """With --against too, where the target's logit is finite and another is not."""
    made, windows = evaluate.log_probabilities, []

    def broken(model, inputs, count):
        windows.append(inputs)
        for rows in made(model, inputs, count):
            rows[:, 5] = -math.inf if len(windows) >= last else rows[:, 5]
            yield rows

    monkeypatch.setattr(evaluate, "log_probabilities", broken)
    path = tiny_checkpoint / "model.pth"
    options = ["--checkpoint_path", path, "--against", path, "--window", 16, "--stride", 16]
    not_finite(tmp_path, *options, match="although the weights are; convert the model again", text="abc " * 24)
    assert len(windows) == last


def test_a_perplexity_past_the_largest_number_is_null(tiny_checkpoint, tmp_path, capsys):
    folder = tmp_path / "sure"
    shutil.copytree(tiny_checkpoint, folder)
    config, weights = read_checkpoint(folder / "model.pth")
    write_checkpoint(folder / "model.pth", config, weights | {"lm_head.weight": 1e5 * weights["lm_head.weight"]})
    figures = figures_of(tmp_path, "--checkpoint_path", folder / "model.pth")
    assert figures["perplexity"] is None and 1e3 < figures["nats_per_token"] < math.inf
    assert "perplexity:  inf, " in capsys.readouterr().out


def test_tasks_end_at_numbers_that_are_not_finite(damaged):
    adapter = adapter_of(damaged)
    for ask in (
        lambda: adapter.loglikelihood([request("a", "b")]),
        lambda: adapter.loglikelihood_rolling([request("a")]),
    ):
        with pytest.raises(FloatingPointError, match="convert the model again"):
            ask()


# --- The harness ------------------------------------------------------------------------------------------------------


class StandIn:
    """In the place of lm_eval.api.model.LM, of which the adapter uses nothing."""


def adapter_of(folder):
    return evaluate.make_adapter(StandIn, *load(folder, reference=False))


def request(*args):
    return SimpleNamespace(args=args)


def summed(model, context, continuation):
    ids = context + continuation
    return sum(next_token(model, ids[:at])[ids[at]].item() for at in range(len(context), len(ids)))


def test_loglikelihood_is_the_sum_over_the_continuation(tiny_checkpoint):
    model, tokenizer = load(tiny_checkpoint)
    long = "0123456789" * 20  # 200 tokens, in a context of 128
    pairs = {
        ("The capital of France", " is Paris"): tokenizer.encode("The capital of France"),
        ("The capital of France ", "is Paris"): tokenizer.encode("The capital of France"),  # the space is predicted too
        ("", "Paris"): [256],  # EOS, as there is no BOS
        (" ", "Paris"): [256],
        (long, "xyz"): tokenizer.encode(long)[-126:],  # 126 + 3 - the last, after which nothing is predicted
    }
    found = adapter_of(tiny_checkpoint).loglikelihood([request(*pair) for pair in pairs])
    for (pair, context), (total, greedy) in zip(pairs.items(), found, strict=True):
        continuation = tokenizer.encode(pair[0][len(pair[0].rstrip()) :] + pair[1])
        assert total == pytest.approx(summed(model, context, continuation), rel=1e-5)
        assert greedy is False


def test_a_continuation_that_merges_with_its_context_is_scored_with_it(tiny_checkpoint, tmp_path):
    folder = tmp_path / "merges"
    shutil.copytree(tiny_checkpoint, folder)
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["model"]["vocab"]["ab"] = 259
    settings["model"]["merges"] = [["a", "b"]]
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    model, tokenizer = load(folder)
    assert tokenizer.encode("ab") == [259]
    end = tokenizer.token_id("<|end|>")  # not 256: with one more token in the vocabulary, tokenizers renumbers it
    pairs = [("a", "b"), ("xa", "b"), ("xa", "bc")]
    first, second, third = adapter_of(folder).loglikelihood([request(*pair) for pair in pairs])
    assert first[0] == pytest.approx(summed(model, [end], [259]), rel=1e-5)
    assert second[0] == pytest.approx(summed(model, tokenizer.encode("x"), [259]), rel=1e-5)
    assert third[0] == pytest.approx(summed(model, tokenizer.encode("xa"), tokenizer.encode("c")), rel=1e-5)  # no "b"


def test_a_continuation_longer_than_the_context_counts_what_fits(tiny_checkpoint):
    model, tokenizer = load(tiny_checkpoint)
    ids = tokenizer.encode("0123456789" * 20)[-129:]
    ((total, _),) = adapter_of(tiny_checkpoint).loglikelihood([request("a", "0123456789" * 20)])
    assert total == pytest.approx(summed(model, ids[:1], ids[1:]), rel=1e-5)


def test_greedy_is_true_if_every_token_is_the_most_likely(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(evaluate, "ROWS", 1)  # a part per token, the last of which does not decide alone
    model, tokenizer = load(tiny_checkpoint)
    found = []
    for number in range(40):
        ids = tokenizer.encode(f"n{number}~")
        best = tokenizer.decode([next_token(model, ids).argmax().item()])
        if best.isascii() and best.isprintable() and len(best) == 1:
            found.append((f"n{number}", "~", best))
    assert found
    adapter = adapter_of(tiny_checkpoint)
    results = adapter.loglikelihood([request(context + tilde, best) for context, tilde, best in found])
    assert all(greedy for _, greedy in results)
    results = adapter.loglikelihood([request(context, tilde + best) for context, tilde, best in found])
    results += adapter.loglikelihood([request(context + tilde, best + "~~") for context, tilde, best in found])
    assert not any(greedy for _, greedy in results)


@pytest.mark.parametrize("text", ["a text", "0123456789" * 29 + "abc"])
def test_rolling_loglikelihood_is_of_every_token_once(tiny_checkpoint, text):
    model, tokenizer = load(tiny_checkpoint)
    ids = [256, *tokenizer.encode(text)]
    expected, last_window = 0.0, len(ids) - 1 - (len(ids) - 2) % 128  # its first target
    for at in range(1, len(ids)):
        begin = (at - 1) // 128 * 128 if at < last_window else max(0, len(ids) - 1 - 128)
        expected += next_token(model, ids[begin:at])[ids[at]].item()
    assert adapter_of(tiny_checkpoint).loglikelihood_rolling([request(text)]) == [pytest.approx(expected, rel=1e-5)]


def greedy_ids(model, tokenizer, prompt, length):
    ids = tokenizer.encode(prompt) or [256]
    for _ in range(length):
        ids.append(next_token(model, ids).argmax().item())
    return ids[-length:]


def test_generation_ends_before_the_stop_string(tiny_checkpoint):
    model, tokenizer = load(tiny_checkpoint)
    whole = tokenizer.decode(greedy_ids(model, tokenizer, "Hello", 24))
    stop = whole[9:11]
    assert len(whole) > 12 and whole.index(stop) > 0
    options = [{"until": [], "max_gen_toks": 24}, {"until": [stop], "max_gen_toks": 24}, {"until": stop}]
    options += [{"until": ["never there", stop, ""], "do_sample": False, "temperature": 1.0, "num_beams": 1}]
    found = adapter_of(tiny_checkpoint).generate_until([request("Hello", option) for option in options])
    assert found == [whole] + 3 * [whole[: whole.index(stop)]]


def test_generation_ends_at_eos_and_takes_what_fits_of_a_prompt(tiny_checkpoint, tmp_path):
    folder = tmp_path / "eos"
    shutil.copytree(tiny_checkpoint, folder)
    model, tokenizer = load(tiny_checkpoint)
    ids = greedy_ids(model, tokenizer, "Hello", 24)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[7]]}))
    (text,) = adapter_of(folder).generate_until([request("Hello", {"max_gen_toks": 24})])
    assert text == tokenizer.decode(ids[: ids.index(ids[7])])
    (text,) = adapter_of(tiny_checkpoint).generate_until([request("", {"max_gen_toks": 5})])
    assert text == tokenizer.decode(greedy_ids(model, tokenizer, "", 5))
    long = "0123456789" * 30
    requests = [request(long, {"max_gen_toks": 20}), request(long, {"max_gen_toks": 500})]
    fitting, half = adapter_of(tiny_checkpoint).generate_until(requests)
    assert fitting == tokenizer.decode(greedy_ids(model, tokenizer, long[-108:], 20))
    assert half == tokenizer.decode(greedy_ids(model, tokenizer, long[-64:], 65))  # 64 slots, and one that needs none


def test_sampled_repeats_differ_and_unknown_options_are_refused(tiny_checkpoint):
    adapter = adapter_of(tiny_checkpoint)
    texts = adapter.generate_until(3 * [request("Hello", {"do_sample": True, "max_gen_toks": 20})])
    assert len(set(texts)) == 3
    with pytest.raises(ValueError, match="typical_p"):
        adapter.generate_until([request("Hello", {"typical_p": 0.9})])
    with pytest.raises(ValueError, match="num_beams"):
        adapter.generate_until([request("Hello", {"num_beams": 4})])


def test_a_text_can_be_scored_after_a_shorter_one_was_generated(tiny_checkpoint, tmp_path):
    folder = tmp_path / "long"
    shutil.copytree(tiny_checkpoint, folder)
    config = replace(read_checkpoint(folder / "model.pth")[0], block_size=600)
    write_checkpoint(folder / "model.pth", config, random_weights(config))
    text, adapter = "0123456789" * 30, adapter_of(folder)  # 300 tokens, and generation makes a cache of 256
    before = adapter.loglikelihood([request(text, " end")])
    adapter.generate_until([request("Hello", {"max_gen_toks": 4})])
    assert adapter.loglikelihood([request(text, " end")]) == [(pytest.approx(before[0][0], rel=1e-6), before[0][1])]


TOY_TASK = """
task: toy
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


def test_the_real_harness_runs_a_task(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="needs lm_eval")
    model, tokenizer = load(tiny_checkpoint)
    docs = [{"question": f"{n} and", "choices": ["up", "on", "by"], "answer": n % 3} for n in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (tmp_path / "toy.yaml").write_text(TOY_TASK.replace("DATA", str(tmp_path / "data.jsonl")))
    right = 0
    for doc in docs[:5]:
        question, choices = tokenizer.encode(doc["question"]), [tokenizer.encode(f" {c}") for c in doc["choices"]]
        totals = [summed(model, question, choice) for choice in choices]
        right += totals.index(max(totals)) == doc["answer"]
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    options = ["--tasks", str(tmp_path / "toy.yaml"), "--limit", "5", "--json", str(tmp_path / "figures.json")]
    sys.argv = ["evaluate.py", "--checkpoint_path", str(tiny_checkpoint / "model.pth"), "--device", "cpu", *options]
    evaluate.main(evaluate.parse_arguments())
    assert json.loads((tmp_path / "figures.json").read_text())["results"]["toy"]["acc,none"] == right / 5
    assert "|toy" in capsys.readouterr().out


# --- What it refuses --------------------------------------------------------------------------------------------------


def refused(*arguments, code=2):
    """The script's message, from its last lines as a user runs them."""
    sys.argv = ["evaluate.py", "--device", "cpu", *map(str, arguments)]
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(evaluate.__file__, run_name="__main__")
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (b"", [], "has 0 tokens"),
        (b"\xef\xbb\xbf", [], "has 0 tokens"),
        (b"a", [], "has 1 tokens"),
        (b"abc", ["--max_tokens", 1], "has 1 tokens"),
        (b"a<|end|><|user|>", [], "has 3 tokens and no text after the first"),
        (b"\xff\xfe", [], "is not UTF-8"),
        (b"some text", ["--window", 129], "--window 129 is more than the context of 128 tokens"),
        (b"some text", ["--window", 8, "--stride", 9], "--stride 9 is more than the window of 8 tokens"),
        (b"some text", ["--against", "nowhere/model.pth"], "nowhere/model.pth does not exist"),
        (b"some text", ["--device", "cuda:77"], "there is no device 'cuda:77'"),
        (None, [], "No such file"),
    ],
)
def test_a_wrong_input_is_one_sentence_and_exit_code_2(tiny_checkpoint, tmp_path, capsys, content, options, said):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    figures = ["--json", tmp_path / "figures.json"]
    refused("--checkpoint_path", tiny_checkpoint / "model.pth", "--text", tmp_path / "text", *figures, *options)
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and said in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "figures.json").exists()


@pytest.mark.parametrize("what", ["vocabulary", "tokens", "no tokenizer", "context"])
def test_two_models_of_other_tokens_are_refused(tiny_checkpoint, tmp_path, capsys, what):
    folder, text = tmp_path / "other", tmp_path / "text"
    shutil.copytree(tiny_checkpoint, folder)
    text.write_text("some text")
    config = read_checkpoint(folder / "model.pth")[0]
    if what == "vocabulary":
        config, said = replace(config, vocab_size=264), ["the vocabularies differ", "260 tokens", " 264"]
    elif what == "tokens":
        file = folder / "tokenizer.json"
        file.write_text(file.read_text().replace("<|user|>", "<|human|>"))
        said = ["has another vocabulary: its token 257 is", "<|user|>", "<|human|>"]
    elif what == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        said = [f"{folder} has neither tokenizer.json nor tokenizer.model"]
    else:
        config, said = replace(config, block_size=64), ["--window 100 is more than the context of 64"]
    write_checkpoint(folder / "model.pth", config, random_weights(config))
    options = ["--against", folder / "model.pth", "--window", 100]
    refused("--checkpoint_path", tiny_checkpoint / "model.pth", "--text", text, *options)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and all(part in err for part in said), err


def test_where_figures_go_is_looked_at_first(tiny_checkpoint, tmp_path, capsys):
    refused("--checkpoint_path", tmp_path / "none.pth", "--text", tmp_path / "text", "--json", tmp_path)
    assert "is a folder; give the name of a file" in capsys.readouterr().err
    for kind in ("--checkpoint_path", "--text", "--against"):
        files = {name: tmp_path / name for name in ("--checkpoint_path", "--text", "--against")}
        refused(*(word for pair in files.items() for word in pair), "--json", files[kind])
        assert f"{files[kind]} would be written over" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_one_sentence_and_exit_code_1(damaged, tmp_path, capsys):
    (tmp_path / "text").write_text("some text")
    refused("--checkpoint_path", damaged / "model.pth", "--text", tmp_path / "text", code=1)
    out, err = capsys.readouterr()
    assert err.startswith("error: the weights hold") and err.count("\n") == 1 and out == ""


def test_without_the_harness_it_says_how_to_install_it(tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused("--checkpoint_path", tiny_checkpoint / "model.pth", "--tasks", "hellaswag")
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "pip install lm_eval" in err and err.count("\n") == 1


def test_flags_of_the_other_kind_are_refused(tiny_checkpoint, capsys):
    path = tiny_checkpoint / "model.pth"
    refused("--checkpoint_path", path, "--tasks", "hellaswag", "--against", path)
    assert "--against compares on a text" in capsys.readouterr().err
    for flags in (
        ("--text", path, "--limit"),
        *(("--tasks", "x", f"--{f}") for f in ("window", "stride", "max_tokens")),
    ):
        refused("--checkpoint_path", path, *flags, 3)
        other = "--tasks" if "--text" in flags else "--text"
        assert capsys.readouterr().err == f"error: {flags[-1]} is for {other}; leave it out\n"


@pytest.mark.parametrize(("words", "sizes"), [("the quick fox", [800]), ("<|assistant|>a", [800, 3200])])
def test_the_first_tokens_do_not_need_the_whole_text(tiny_checkpoint, tmp_path, monkeypatch, words, sizes):
    tokenizer, lengths = load_tokenizer(tiny_checkpoint), []
    encode, expected = tokenizer.encode, tokenizer.encode(words * 1000)[:50]
    (tmp_path / "text").write_text(words * 1000)
    monkeypatch.setattr(tokenizer, "encode", lambda text: lengths.append(len(text)) or encode(text))
    assert evaluate.read_ids(tmp_path / "text", tokenizer, 50)[0] == expected and lengths == sizes


def test_an_end_that_only_generation_config_names_starts_a_text(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "gpt-2")
    (folder / "tokenizer_config.json").write_text("{}")
    requests = evaluate.Requests(SimpleNamespace(config=SimpleNamespace(block_size=8)), load_tokenizer(folder))
    assert requests.start == [256]
