"""Sampling, the `generate()` loop and the text of an answer, on small random models."""

import subprocess
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from check_equivalence import FAMILIES, random_weights
from checkpoint import build_model
from decode import Recorded, Sampling, Steps, compiled_step, copied, decode_step, generate, sample, to_probabilities
from generate import Answer
from tokenizer import Stream

CONFIG = replace(FAMILIES["llama-3.1"], block_size=48)
GREEDY = Sampling(temperature=0)
RANDOM = Sampling(temperature=1.2, top_k=50, top_p=0.95)
LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.0, -2.5, 0.9, 1.9, -0.4, 0.7, -4.0, 1.5, -0.1, 0.5, -1.7, 1.0])


def new_model(kind):
    return build_model(CONFIG, random_weights(CONFIG), "cpu", torch.float32, reference=kind == "reference")


@pytest.fixture(scope="module")
def fast():
    return new_model("fast")


@pytest.fixture(scope="module", params=["reference", "fast"])
def model(request):
    return new_model(request.param)


def random_prompt(rows, length, seed=0):
    return torch.randint(CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def ids_of(model, prompt, new, sampling=GREEDY, **options):
    return list(generate(model, prompt, new, sampling, **options))


# --- Sampling ---------------------------------------------------------------------------------------------------------


def kept(**ranges):
    probabilities = to_probabilities(LOGITS[None], Sampling(temperature=1.0, **ranges))[0]
    return set(probabilities.nonzero().flatten().tolist())


def likeliest(count):
    return set(LOGITS.topk(count).indices.tolist())


def test_temperature_0_is_the_argmax_whatever_the_noise():
    noise = torch.full((1, 16), 1e9)
    noise[0, 5] = 1e-9
    assert sample(LOGITS[None], noise, GREEDY).tolist() == [[1]]


def test_temperature_divides_the_logits():
    expected = (LOGITS / 0.7).softmax(-1)
    torch.testing.assert_close(to_probabilities(LOGITS[None], Sampling(0.7, 0, 1.0))[0], expected)


@pytest.mark.parametrize("top_k", [1, 5, 15, 16, 200])
def test_top_k_keeps_k(top_k):
    assert kept(top_k=top_k) == likeliest(min(top_k, 16))


def test_top_k_0_keeps_all():
    assert kept(top_k=0) == set(range(16))


@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p):
    descending = LOGITS.softmax(-1).sort(descending=True).values
    needed = next(n for n in range(1, 17) if descending[:n].sum() >= top_p)
    assert kept(top_k=0, top_p=top_p) == likeliest(needed)


def test_top_p_keeps_at_least_one_token():
    assert kept(top_k=0, top_p=1e-9) == likeliest(1)


def test_top_p_counts_the_mass_that_top_k_has_left():
    left = LOGITS.topk(4).values.softmax(-1)
    assert left[:2].sum() < 0.7 < left[:3].sum() and LOGITS.softmax(-1).topk(4).values.sum() < 0.7
    assert kept(top_k=4, top_p=0.7) == likeliest(3)


def test_each_row_has_its_own_top():
    both = to_probabilities(torch.stack([LOGITS, LOGITS.flip(0)]), Sampling(1.0, 3, 0.9))
    assert torch.equal(both[0], both[1].flip(0)) and both.count_nonzero() < 8


@pytest.mark.parametrize(
    "ranges",
    [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": -1.0}, {"top_p": 1.1}, {"top_p": float("nan")}],
)
def test_sampling_refuses_what_is_out_of_range(ranges):
    with pytest.raises(ValueError, match="must be 0 or more"):
        Sampling(**ranges)


class Constant:
    """A model of 16 tokens that always predicts LOGITS."""

    config = SimpleNamespace(block_size=64, vocab_size=16)

    def parameters(self):
        yield LOGITS

    def __call__(self, ids):
        return LOGITS.expand(*ids.shape, 16)


@pytest.mark.parametrize("sampling", [Sampling(1.0, 0, 1.0), Sampling(0.6, 0, 1.0), Sampling(1.3, 9, 0.9)])
def test_generated_tokens_have_the_promised_distribution(sampling):
    draws = torch.tensor(ids_of(Constant(), torch.zeros(4000, 1, dtype=torch.long), 10, sampling, seed=1)).flatten()
    expected = to_probabilities(LOGITS[None], sampling)[0]
    expected = expected / expected.sum() * len(draws)
    counts = draws.bincount(minlength=16)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected) ** 2 / expected)[possible].sum().item()
    assert chi_square < 37.7  # of 15 degrees of freedom: exceeded once in 1,000 seeds


# --- generate() -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM])
def test_either_model_gives_the_same_ids(sampling):
    prompt = random_prompt(3, 9)
    expected = ids_of(new_model("reference"), prompt, 30, sampling, seed=5)
    assert ids_of(new_model("fast"), prompt, 30, sampling, seed=5) == expected
    assert len(expected) == 30 and len({tuple(row) for row in zip(*expected, strict=True)}) == 3


def test_a_greedy_id_is_the_argmax_of_the_reference():
    reference, prompt = new_model("reference"), random_prompt(2, 9)
    ids = torch.tensor(ids_of(reference, prompt, 20)).T
    logits = reference(torch.cat([prompt, ids], dim=1))
    assert torch.equal(logits[:, 8:-1].argmax(-1), ids)


def test_a_seed_gives_the_same_ids_and_another_seed_others(model):
    prompt = random_prompt(2, 9)
    first = ids_of(model, prompt, 20, RANDOM, seed=5)
    torch.manual_seed(99)  # of no effect
    state = torch.get_rng_state()
    assert ids_of(model, prompt, 20, RANDOM, seed=5) == first
    assert ids_of(model, prompt, 20, RANDOM, seed=6) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_one_prompt_get_their_own_noise(model):
    first, second = zip(*ids_of(model, random_prompt(1, 9).expand(2, -1), 20, RANDOM), strict=True)
    assert first != second


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM])
def test_compiled_steps_give_the_eager_ids_and_never_recompile(sampling):
    torch.compiler.reset()
    model, prompt = new_model("fast"), random_prompt(2, 9)
    model.setup_caches(2, CONFIG.block_size)
    step = compiled_step(decode_step, "cpu")
    expected = ids_of(model, prompt, 40, sampling, seed=5)
    ids_of(model, prompt, 3, sampling, steps=Steps(decode_step=step))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert ids_of(model, prompt, 40, sampling, seed=5, steps=Steps(decode_step=step)) == expected
        other = random_prompt(2, 20, seed=1)
        again = ids_of(model, other, 20, sampling, seed=6, steps=Steps(decode_step=step))
    assert again == ids_of(model, other, 20, sampling, seed=6)


class RecordedOnCpu(Recorded):
    """What stands for a CUDA graph takes the step again, on the tensors that the model had when it was recorded."""

    def _record(self, model, inputs, settings):
        own = [copied(x) if isinstance(x, torch.Tensor) else x for x in inputs]
        then = deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        results = self.function(then, *own, **settings)

        def replay():
            for result, new in zip(results, self.function(then, *own, **settings), strict=True):
                result.copy_(new)

        self.count += 1
        return SimpleNamespace(replay=replay), own, results


def test_a_recorded_step_is_recorded_again_where_memory_has_moved(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    models, step, prompt = [new_model("fast"), new_model("fast")], RecordedOnCpu(decode_step), random_prompt(1, 9)
    models[1].lm_head.weight.neg_()

    def agrees(model, new=12, sampling=GREEDY):
        expected = ids_of(model, prompt, new, sampling)
        return ids_of(model, prompt, new, sampling, steps=Steps(decode_step=step)) == expected

    assert all(agrees(model) for model in models * 2) and step.count == 2
    models[0].setup_caches(2, CONFIG.block_size)
    assert agrees(models[0]) and agrees(models[1]) and step.count == 3
    models[0].load_state_dict({name: -t for name, t in models[0].state_dict().items()}, assign=True)
    assert agrees(models[0]) and step.count == 4
    models[0].to(torch.bfloat16)
    assert agrees(models[0]) and step.count == 5
    assert agrees(models[0], sampling=RANDOM) and agrees(models[0]) and step.count == 6
    assert all(agrees(models[0], 2, Sampling(1 + i / 100)) for i in range(40)) and step.count == 46
    assert len(step.of_models[models[0]][1]) == 32


def test_each_row_ends_with_its_own_eos(model):
    prompt = random_prompt(2, 9)
    plain = list(zip(*ids_of(model, prompt, 38), strict=True))
    ends = [plain[0][11], plain[1][23]]
    length = [next(i for i, id in enumerate(row) if id in ends) + 1 for row in plain]
    assert length[0] != length[1]
    stopped = list(zip(*ids_of(model, prompt, 38, eos_ids=ends), strict=True))
    assert [len(row) for row in stopped] == [max(length)] * 2  # all have ended: so has the iteration
    for row, expected, until in zip(stopped, plain, length, strict=True):
        assert row == expected[:until] + (None,) * (max(length) - until)


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM])
@pytest.mark.parametrize("kind", ["reference", "fast"])
@pytest.mark.parametrize("family", ["llama-3.1", "mistral", "gpt-2"])
def test_a_row_is_what_its_prompt_gives_alone(family, kind, sampling):
    config = replace(FAMILIES[family], block_size=48)
    model = build_model(config, random_weights(config), "cpu", torch.float32, reference=kind == "reference")
    prompt, lengths = random_prompt(3, 30), [1, 7, 30]

    def alone(row, **options):
        return [id for (id,) in ids_of(model, prompt[row : row + 1, : lengths[row]], 1000, sampling, **options)]

    rows = [alone(row, seed=5 + row) for row in range(3)]
    assert [len(row) for row in rows] == [48, 42, 19]  # until the context is full
    ends = {rows[0][20], rows[2][9]}
    for eos_ids in ((), ends):
        rows_of_all = [prompt[row, : lengths[row]].tolist() for row in range(3)]
        together = zip(*ids_of(model, rows_of_all, 1000, sampling, seed=5, eos_ids=eos_ids), strict=True)
        expected = [alone(row, seed=5 + row, eos_ids=eos_ids) for row in range(3)]
        longest = max(map(len, expected))
        assert list(together) == [tuple(row + [None] * (longest - len(row))) for row in expected]
    assert len({len(row) for row in expected}) == 3


def test_rows_of_different_lengths_have_a_cached_prefix_in_common():
    model, prompt = new_model("fast"), random_prompt(2, 20)
    rows = [prompt[0, :8].tolist(), prompt[1].tolist()]
    expected = ids_of(model, rows, 25)
    elsewhere = [[0] * 7 + row[7:] for row in rows]
    assert ids_of(model, elsewhere, 25, cached=7) == expected


def test_max_new_tokens_1_yields_one(model):
    prompt = random_prompt(2, 9)
    assert ids_of(model, prompt, 1) == ids_of(model, prompt, 5)[:1]


def test_a_prompt_of_one_token_is_enough(model):
    prompt = random_prompt(2, 1)
    ids = torch.tensor(ids_of(model, prompt, 12)).T
    logits = new_model("reference")(torch.cat([prompt, ids], dim=1))
    assert torch.equal(logits[:, :-1].argmax(-1), ids)


def test_a_prompt_that_fills_the_context_yields_exactly_one_token(model):
    prompt = random_prompt(2, CONFIG.block_size)
    expected = new_model("reference")(prompt)[:, -1].argmax(-1).tolist()
    assert ids_of(model, prompt, 10) == [expected]


def test_the_end_of_the_context_ends_the_iteration(model):
    assert len(ids_of(model, random_prompt(2, 40), 1000)) == CONFIG.block_size - 40 + 1


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "the prompt is empty; give at least one token"),
        (torch.zeros(1, 49, dtype=torch.long), "the prompt has 49 tokens, more than the context of 48; shorten it"),
        (torch.tensor([[3, 331]]), "the prompt has ids outside the vocabulary of 331; use its own tokenizer"),
        (torch.tensor([[3], [-1]]), "the prompt has ids outside the vocabulary of 331; use its own tokenizer"),
    ],
)
def test_a_bad_prompt_is_refused_with_a_sentence(model, prompt, sentence):
    with pytest.raises(ValueError) as refusal:
        next(generate(model, prompt, 5))
    assert str(refusal.value) == sentence


@pytest.mark.parametrize("fresh", [1, 2, 7])
def test_a_cached_prefix_gives_the_ids_of_the_whole_prompt(monkeypatch, fresh):
    model, prompt = new_model("fast"), random_prompt(1, 9)
    model.setup_caches(1, CONFIG.block_size)
    answer = torch.tensor(ids_of(model, prompt, 10)).T
    known = torch.cat([prompt, answer[:, :-1]], dim=1)  # the last id was never fed
    longer = torch.cat([known, random_prompt(1, fresh, seed=1)], dim=1)
    expected = ids_of(new_model("fast"), longer, 15)
    monkeypatch.setattr(model, "setup_caches", None)  # a new cache would be empty
    length = known.shape[1]
    elsewhere = torch.cat([torch.zeros_like(known), longer[:, length:]], dim=1)  # a cached prefix is not read again
    assert ids_of(model, elsewhere, 15, cached=length) == expected


def test_a_cache_that_is_large_enough_is_kept(fast):
    fast.setup_caches(3, 40)
    before = fast.layers[0].attn.k_cache
    ids_of(fast, random_prompt(2, 9), 32)  # the last of the 41 tokens needs no slot
    assert fast.layers[0].attn.k_cache is before
    ids_of(fast, random_prompt(2, 9), 33)
    assert fast.layers[0].attn.k_cache is not before


def test_importing_generate_changes_no_setting_and_starts_nothing():
    script = """
import sys, threading, torch, torch._dynamo, torch._inductor.config
def state():
    settings = [torch._dynamo.config.get_config_copy(), torch._inductor.config.get_config_copy()]
    settings += [torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.get_default_dtype()]
    settings += [torch.is_grad_enabled(), torch.get_rng_state().tolist(), torch.distributed.is_initialized()]
    settings += [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    return settings + [torch.cuda.is_initialized(), threading.active_count(), sys.excepthook, print]
before = state()
import generate
assert state() == before
optional = {"tokenizers", "sentencepiece", "jinja2.sandbox", "transformers"} & sys.modules.keys()
assert not optional, optional
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# --- Answer -----------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of a few tokens that, like sentencepiece's, drops the space at the start of a text."""

    pieces = (b"", b" Once", b" upon", b" a", b" time", b"\xc3", b"\xa9", b"ly")
    drops_first_space = True
    special_ids = {0}

    def token_id(self, piece):
        return 0 if piece == "<end>" else None

    def token_bytes(self, id):
        return self.pieces[id]

    def stream(self):
        return Stream(self)

    def answer_stream(self, prompt_ids):
        return Stream(self)


END, ONCE, UPON, A, TIME, HALF, OTHER_HALF, LY = range(8)


def answer_to(ids, stop=(), continues=False, prompt=(A,)):
    """The answer after these ids, and the pieces of text that it showed on the way."""
    answer, pieces = Answer(list(prompt), Words(), {END}, stop, continues), []
    for id in ids:
        if answer.stop_reason is None:
            pieces.append(answer.push(id))
    pieces.append(answer.finish())
    return answer, pieces


def test_an_answer_shows_its_text_as_it_comes():
    answer, pieces = answer_to([ONCE, UPON, A, TIME])
    assert pieces == ["Once", " upon", " a", " time", ""]
    assert (answer.text, answer.stop_reason, answer.token_ids) == ("Once upon a time", "length", [ONCE, UPON, A, TIME])


@pytest.mark.parametrize("stop", ["on a t", "upon", " a time", "e"])
def test_a_stop_string_is_cut_and_never_shown_in_part(stop):
    answer, pieces = answer_to([ONCE, UPON, A, TIME, LY], stop=[stop])
    assert (answer.text, answer.stop_reason) == ("Once upon a timely".partition(stop)[0], "stop")
    assert "".join(pieces) == answer.text


def test_an_answer_takes_no_ids_after_its_stop_string():
    answer, _ = answer_to([ONCE, UPON, A, TIME, LY], stop=["on a"])
    assert answer.token_ids == [ONCE, UPON, A]


def test_the_first_of_several_stop_strings_counts():
    answer, pieces = answer_to([ONCE, UPON, A, TIME], stop=["a time", "on", "up"])
    assert "".join(pieces) == answer.text == "Once "


def test_text_held_back_is_shown_once_it_is_no_stop_string():
    _, pieces = answer_to([ONCE, UPON, A, TIME, LY], stop=["upon a mat"])
    assert pieces == ["Once", " ", "", "upon a time", "ly", ""]


@pytest.mark.parametrize("last", [[], [END]])
def test_text_held_back_is_shown_in_the_end(last):
    answer, pieces = answer_to([ONCE, UPON, *last], stop=["upon a time"])
    assert pieces[:2] == ["Once", " "] and "".join(pieces) == answer.text == "Once upon"


def test_an_eos_ends_the_answer_and_is_not_in_its_text():
    answer, pieces = answer_to([ONCE, END, TIME])
    assert (answer.text, answer.stop_reason, answer.token_ids) == ("Once", "eos", [ONCE, END])
    assert "".join(pieces) == "Once"


def test_an_answer_that_continues_keeps_the_first_space():
    assert answer_to([UPON], continues=True, prompt=[ONCE])[0].text == " upon"
    assert answer_to([UPON], continues=False, prompt=[ONCE])[0].text == "upon"


def test_a_character_is_shown_when_it_is_whole():
    assert answer_to([A, HALF, OTHER_HALF])[1] == ["a", "", "é", ""]
    assert answer_to([A, HALF])[1] == ["a", "", "\ufffd"]


def test_an_answer_without_tokenizer_has_ids_and_no_text():
    answer = Answer([1], None, frozenset(), ["a"], continues=True)
    assert [answer.push(3), answer.push(4), answer.finish()] == ["", "", ""]
    assert (answer.text, answer.token_ids, answer.stop_reason) == (None, [3, 4], "length")
