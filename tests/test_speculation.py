"""Speculation: scripted models whose every draft is known, the distribution of sampled text, and the command line."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from check_equivalence import FAMILIES, random_weights
from checkpoint import build_model, read_checkpoint, write_checkpoint
from decode import Sampling, Steps, Text, compiled_step, decode_step, generate, sample, to_probabilities
from speculate import (
    Auto,
    DraftModel,
    Fixed,
    PromptLookup,
    Speculation,
    accept,
    compiled_drafts,
    draft_tokens,
    round_costs,
    verify,
)
from tokenizer import check_vocabulary

GREEDY = Sampling(temperature=0)


class Scripted:
    """A model of `vocab_size` tokens: `following(token, position)` gives the logits of what comes next.

    It writes each token into a cache and takes what it answers from there, so that a cache that is wrong shows.
    """

    def __init__(self, following, vocab_size=16, block_size=64):
        self.config = SimpleNamespace(vocab_size=vocab_size, block_size=block_size)
        self.following, self.max_seq_length, self.max_batch_size = following, 0, 0
        self.passes = []  # the number of tokens of each

    def parameters(self):
        yield torch.empty(0)

    def from_rank_0(self, x):
        return x

    def setup_caches(self, rows, slots):
        self.cache = torch.full((rows, slots), -1)
        self.max_batch_size, self.max_seq_length = rows, slots

    def __call__(self, ids, input_pos=None, last=None):
        B, T = ids.shape
        self.passes.append(T)
        if input_pos is None:
            input_pos = torch.arange(T).expand(B, -1)
        assert 0 <= input_pos.min() and input_pos.max() < self.max_seq_length
        self.cache[:B].scatter_(1, input_pos, ids)
        for row, end in enumerate(input_pos[:, -1].tolist()):
            assert (self.cache[row, : end + 1] >= 0).all(), "a slot before this token was never written"
        logits = self.following(self.cache[:B].gather(1, input_pos), input_pos)
        return logits if last is None else logits[torch.arange(B), last][:, None]


def counting(step, period=16):
    """A model that goes on with token + step."""
    return lambda token, position: 10.0 * torch.nn.functional.one_hot((token + step) % period, 16).float()


def sometimes(step):
    """A draft that is right but at every third position."""
    return lambda token, position: counting(0)(token + step + (position % 3 == 2), position)


def text(model, prompt, count, drafts=None, number=3, sampling=GREEDY, history=None, **options):
    """The ids of a text with `number` drafts a round, or a count that adapts; `history` gets that of its rounds."""
    steps = {name: options.pop(name) for name in ("decode_step",) if name in options}
    verify = {name: options.pop(name) for name in ("verify",) if name in options}
    if drafts is not None:
        count_of = Fixed(number) if isinstance(number, int) else number
        steps["speculation"] = Speculation(model, sampling, drafts, count_of, **verify)
    ids = list(generate(model, prompt, count, sampling, steps=Steps(**steps), **options))
    if history is not None:
        history[:] = steps["speculation"].history
    return ids


@pytest.mark.parametrize("prompt", [[[1, 2, 3]], [[1, 2, 3], [7, 9, 4]]])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_drafts_that_are_all_right_take_all_and_one_more(prompt, k):
    model, drafts, history = Scripted(counting(1)), DraftModel(Scripted(counting(1))), []
    assert text(model, prompt, 1 + 4 * (k + 1), drafts, k, history=history) == text(
        Scripted(counting(1)), prompt, 1 + 4 * (k + 1)
    )
    assert history == [(k, [k] * len(prompt))] * 4
    assert model.passes == [3] + [k + 1] * 4  # the prompt, then a pass a round


def test_drafts_that_are_all_wrong_cost_a_round_a_token():
    model, drafts, history = Scripted(counting(1)), DraftModel(Scripted(counting(2))), []
    assert text(model, [[5]], 9, drafts, 4, history=history) == text(Scripted(counting(1)), [[5]], 9)
    assert history == [(4, [0])] * 8


def test_drafts_that_are_sometimes_right_are_kept_up_to_the_first_wrong_one():
    drafts, history = DraftModel(Scripted(sometimes(1))), []
    prompt = [[5, 6], [2, 9]]
    assert text(Scripted(counting(1)), prompt, 40, drafts, 4, history=history) == text(
        Scripted(counting(1)), prompt, 40
    )
    accepted = {n for _, of_rows in history for n in of_rows}
    assert accepted == {0, 2}  # wrong at every third position, and right between


@pytest.mark.parametrize("drafts", [DraftModel(Scripted(counting(1))), PromptLookup()])
def test_an_eos_inside_what_was_accepted_ends_the_text_there(drafts):
    model, prompt = Scripted(counting(1, 7)), [[1, 2, 3, 4, 5, 6, 0, 1, 2]]
    expected = text(model, prompt, 30, eos_ids={0})
    assert text(model, prompt, 30, drafts, 5, eos_ids={0}) == expected == [[3], [4], [5], [6], [0]]


def test_each_row_ends_at_its_own_eos():
    model, drafts = Scripted(counting(1)), DraftModel(Scripted(sometimes(1)))
    prompt = [[1, 2], [8, 11]]
    expected = text(model, prompt, 30, eos_ids={13})
    assert text(model, prompt, 30, drafts, 4, eos_ids={13}) == expected
    assert [row[1] for row in expected] == [12, 13] + [None] * 9 and len(expected) == 11


@pytest.mark.parametrize("lengths", [[3, 3], [1, 3]])
@pytest.mark.parametrize("draft_context", [64, 30])
def test_the_text_goes_on_to_the_contexts_last_slot(lengths, draft_context):
    model = Scripted(counting(1))
    draft = Scripted(sometimes(1), block_size=draft_context)
    prompt = [ids[:length] for ids, length in zip([[1, 2, 3], [7, 8, 9]], lengths, strict=True)]
    for drafts in (DraftModel(draft), PromptLookup()):
        history = []
        found = text(model, prompt, 1000, drafts, 5, history=history)
        assert found == text(model, prompt, 1000)
        assert len(found) == 64 - min(lengths) + 1
        assert {k for k, _ in history} == {0, 5}  # the last slots are filled one by one


def test_a_draft_may_have_another_number_of_padded_tokens():
    for size in (12, 20):
        draft = Scripted(lambda token, position, size=size: torch.eye(size)[(token + 1) % 16 % size], vocab_size=size)
        assert text(Scripted(counting(1)), [[3]], 30, DraftModel(draft)) == text(Scripted(counting(1)), [[3]], 30)


def test_a_prompt_longer_than_the_drafts_context_is_refused():
    drafts = DraftModel(Scripted(counting(1), block_size=8))
    with pytest.raises(ValueError, match="for the draft model the prompt has 9 tokens, more than the context of 8"):
        text(Scripted(counting(1)), [[1] * 9], 5, drafts)


def test_the_reference_cannot_speculate():
    config = FAMILIES["llama-2"]
    reference = build_model(config, random_weights(config), "cpu", torch.float32, reference=True)
    with pytest.raises(ValueError, match="speculation needs a model with a cache"):
        text(reference, [[1]], 5, PromptLookup())


# --- Prompt lookup ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "longest", "expected"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 3, [9, 1, 2, 3, 9]),  # the continuation, over and over
        ([1, 2, 3, 4, 5, 2, 3, 6, 7, 2, 3], 2, [6, 7, 2, 3, 6]),  # the most recent one
        ([1, 2, 3, 4, 5, 9, 2, 3, 6, 1, 2, 3], 3, [4, 5, 9, 2, 3]),  # the longest match before the most recent
        ([1, 2, 3, 4, 5, 9, 2, 3, 6, 1, 2, 3], 2, [6, 1, 2, 3, 6]),
        ([1, 2, 3], 3, []),
        ([7, 7], 3, [7, 7, 7, 7, 7]),
        ([4], 3, []),
    ],
)
def test_the_continuation_of_the_last_tokens_is_found(ids, longest, expected):
    lookup = PromptLookup(longest=longest)
    lookup.start(None, 99, [ids])
    assert lookup.continuation(0, 5) == expected


def test_without_a_match_a_plain_step_is_taken():
    model, history = Scripted(counting(1)), []
    assert text(model, [[0]], 30, PromptLookup(), 4, history=history) == text(model, [[0]], 30)
    assert [k for k, _ in history[:15]] == [0] * 15 and history[15][0] == 4  # the first repetition


# --- Distribution -----------------------------------------------------------------------------------------------------

TABLES = 2 * torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(3))  # logits after each token


def markov(table):
    return Scripted(lambda token, position: table[token], block_size=10**6)


def wrong_verify(model, tokens, input_pos, proposed, uniform, noise, sampling):
    """What a rejected draft is replaced by comes from p itself, not from what is left of it."""
    k = tokens.shape[1] - 1
    logits = model(tokens, input_pos + torch.arange(k + 1))
    q = None if proposed is None else to_probabilities(proposed, sampling)
    count, _ = accept(logits, tokens[:, 1:], q, uniform, noise, sampling)
    following = sample(logits.gather(1, count[..., None].expand(-1, -1, logits.shape[-1]))[:, 0], noise, sampling)
    ids = torch.cat([tokens[:, 1:], following], dim=1).scatter(1, count, following)
    return following, input_pos + count + 1, tokens.gather(1, count), torch.cat([ids, count], dim=1)


def chi_square(drafts, sampling, rows, seeds=40, count=100, **options):
    """(chi-square, degrees of freedom) of the tokens after each token, against the exact distribution."""
    seen = torch.zeros(16, 16)
    for seed in range(seeds):
        seed *= 1000
        ids = text(markov(TABLES[0]), [[3, 5, 3]] * rows, count, drafts, 3, sampling, seed=seed, **options)
        for row in torch.tensor(ids).T:
            seen.index_put_((row[:-1], row[1:]), torch.ones(count - 1), accumulate=True)
    expected = to_probabilities(TABLES[0], sampling) * seen.sum(1, keepdim=True)
    assert seen[expected == 0].sum() == 0
    common = expected > 5
    return ((seen - expected) ** 2 / expected)[common].sum().item(), common.sum().item() - common.any(1).sum().item()


SAMPLINGS = [Sampling(1.0, 0, 1.0), Sampling(0.7, 0, 1.0), Sampling(1.0, 5, 1.0), Sampling(1.2, 0, 0.8)]


def limit(freedom):
    return freedom + 3.5 * (2 * freedom) ** 0.5  # exceeded about once in 2,000 seeds


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("kind", ["draft", "lookup"])
def test_sampled_text_has_the_models_distribution(kind, sampling, rows):
    drafts, history = DraftModel(markov(TABLES[1])) if kind == "draft" else PromptLookup(), []
    found, freedom = chi_square(drafts, sampling, rows, seeds=40 // rows, history=history)
    assert freedom > 10 and found < limit(freedom)
    assert any(0 < n < 3 for _, accepted in history for n in accepted)


@pytest.mark.parametrize("kind", ["draft", "lookup"])
def test_a_wrong_rule_of_acceptance_has_another_distribution(kind):
    drafts = DraftModel(markov(TABLES[1])) if kind == "draft" else PromptLookup()
    found, freedom = chi_square(drafts, SAMPLINGS[0], 1, verify=wrong_verify)
    assert found > 1.5 * limit(freedom)


def test_a_seed_gives_the_same_text_again():
    def text_of(seed):
        return text(markov(TABLES[0]), [[3]], 50, DraftModel(markov(TABLES[1])), sampling=SAMPLINGS[0], seed=seed)

    assert text_of(5) == text_of(5) != text_of(6)


# --- k that adapts ----------------------------------------------------------------------------------------------------

COSTS = {0: 1.0, 2: 1.3, 5: 1.7, 10: 2.5}


class InEights(Auto):
    """As on a GPU, where the host looks after eight plain steps."""

    def choose(self, most):
        return super().choose(8)


either = pytest.mark.parametrize("adapting", [Auto, InEights])


def test_an_adapting_k_grows_where_all_is_kept():
    drafts, history = DraftModel(Scripted(counting(1))), []
    assert text(Scripted(counting(1)), [[3]], 60, drafts, Auto(COSTS), history=history) == text(
        Scripted(counting(1)), [[3]], 60
    )
    assert [k for k, _ in history][2] == 10


@either
def test_an_adapting_k_gives_up_where_nothing_is_kept_and_tries_again(adapting):
    model = Scripted(counting(1), block_size=2000)
    drafts, history = DraftModel(Scripted(counting(2), block_size=2000)), []
    assert text(model, [[3]], 1000, drafts, adapting(COSTS), history=history) == text(
        Scripted(counting(1), block_size=2000), [[3]], 1000
    )
    choices = [k for k, _ in history]
    plain = choices.count(0) / len(choices)
    assert 0.95 < plain < 1 and 2 in choices[200:]


@pytest.mark.parametrize("catch_up", [0.0, 5.0, 200.0])
@pytest.mark.parametrize("dear", [1.0, 2.5])
def test_drafts_that_do_not_pay_cost_little(catch_up, dear):
    costs = {k: 1 + dear * (cost - 1) for k, cost in COSTS.items()}
    models, history = [Scripted(counting(step), block_size=2000) for step in (1, 2)], []
    text(models[0], [[3]], 1000, DraftModel(models[1]), Auto(costs, catch_up), history=history)
    choices = [k for k, _ in history]
    tries = sum(k > 0 and before == 0 for before, k in zip(choices, choices[1:], strict=False))
    assert 0 < sum(choices) and sum(costs[k] for k in choices) + tries * catch_up < 1.06 * 1000
    assert tries > 0 or catch_up == 200


@either
def test_an_adapting_k_comes_back_when_drafts_are_right_again(adapting):
    def late(token, position):  # wrong, then right
        return counting(0)(token + 1 + (position < 100), position)

    model = Scripted(counting(1), block_size=2000)
    drafts, history = DraftModel(Scripted(late, block_size=2000)), []
    assert text(model, [[3]], 600, drafts, adapting(COSTS), history=history) == text(
        Scripted(counting(1), block_size=2000), [[3]], 600
    )
    choices = [k for k, _ in history]
    assert 0 in choices[:30] and choices[-1] == 10
    assert not any(n < k for k, accepted in history[-20:] for n in accepted)  # its cache has the plain steps' tokens


def test_a_lookup_that_finds_nothing_is_no_try():
    model, history = Scripted(counting(1)), []
    text(model, [[0]], 30, PromptLookup(), Auto({0: 1.0, 2: 2.5, 5: 4.5}), history=history)
    assert [k for k, _ in history[:16]] == [0] * 15 + [2]  # the first repetition


@either
def test_an_adapting_k_begins_each_text_anew(adapting):
    model, draft = Scripted(counting(1), block_size=2000), Scripted(counting(2), block_size=2000)
    count, first, second = adapting(COSTS), [], []
    text(model, [[3]], 300, DraftModel(draft), count, history=first)
    text(model, [[3]], 300, DraftModel(draft), count, history=second)
    assert first == second and 0 in {k for k, _ in first}


def test_an_answer_asks_for_no_other_graphs_than_its_first_rounds_did():
    kinds = []

    def recorded(model, *inputs):
        kinds.append(tuple(x.shape if isinstance(x, torch.Tensor) else x for x in inputs))
        return draft_tokens(model, *inputs)

    model, draft, sampling = markov(TABLES[0]), markov(TABLES[0]), SAMPLINGS[0]
    model.config.block_size = draft.config.block_size = 512
    model.setup_caches(1, 256)
    list(generate(model, [[3, 5]], 1, sampling))  # the prompt is in its cache then
    speculation = Speculation(model, sampling, DraftModel(draft, recorded), Auto(COSTS))
    round_costs(speculation, Text(model, [[3, 5]], 100, sampling, (), 0), decode_step)
    first, kinds[:] = set(kinds), []
    list(generate(model, [[3, 5]], 100, sampling, seed=1, steps=Steps(speculation=speculation)))
    assert kinds and set(kinds) <= first


def test_a_speculation_of_another_model_or_sampling_is_refused():
    model = Scripted(counting(1))
    speculation = Speculation(model, Sampling(temperature=1.0), PromptLookup(), Fixed(3))
    for other, sampling in ((model, GREEDY), (Scripted(counting(1)), speculation.sampling)):
        with pytest.raises(ValueError, match="of another model or sampling"):
            next(generate(other, [[3]], 5, sampling, steps=Steps(speculation=speculation)))


@either
def test_an_adapting_k_never_tries_what_cannot_pay(adapting):
    drafts, count, history = DraftModel(Scripted(counting(1))), adapting({0: 2.0, 2: 6.0, 5: 15.0}), []
    assert text(Scripted(counting(1)), [[3]], 60, drafts, count, history=history) == text(
        Scripted(counting(1)), [[3]], 60
    )
    assert {k for k, _ in history} == {0}


@either
@pytest.mark.parametrize("drafts", [DraftModel(markov(TABLES[1])), PromptLookup()])
def test_plain_steps_draw_what_they_draw_without_drafts(drafts, adapting):
    model, count = markov(TABLES[0]), adapting({0: 1.0, 2: 3.0})  # so no round has drafts
    options = {"sampling": SAMPLINGS[1], "eos_ids": (5,), "seed": 3}
    expected = text(model, [[3, 1], [2, 8]], 60, **options)
    assert text(model, [[3, 1], [2, 8]], 60, drafts, count, **options) == expected
    assert len(expected) < 60 and None in expected[-1]  # one row ends before the other, and both before 60


# --- Real models ------------------------------------------------------------------------------------------------------


def noisy(state_dict, share):
    generator = torch.Generator().manual_seed(1)
    return {n: t + share * t.std() * torch.randn(t.shape, generator=generator) for n, t in state_dict.items()}


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 20, 0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["draft", "lookup"])
def test_compiled_rounds_give_the_eager_text_and_never_recompile(kind, sampling):
    torch.compiler.reset()
    config = replace(FAMILIES["llama-3.1"], block_size=64)
    weights = random_weights(config)
    model = build_model(config, weights, "cpu", torch.float32)
    draft = build_model(config, noisy(weights, 0.03), "cpu", torch.float32)
    model.setup_caches(2, 64)
    check, step = (compiled_step(f, "cpu") for f in (verify, decode_step))
    prompt = torch.randint(config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))

    def drafts(drafting):
        return PromptLookup() if kind == "lookup" else DraftModel(draft, drafting)

    compiled, history, of_steps = drafts(compiled_drafts("cpu")), [], {"seed": 3, "decode_step": step, "verify": check}
    expected = text(model, prompt, 100, drafts(draft_tokens), 4, sampling, seed=3)
    text(model, prompt, 100, compiled, 4, sampling, **of_steps)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert text(model, prompt, 100, compiled, 4, sampling, history, **of_steps) == expected
    if sampling is GREEDY:
        assert expected == text(model, prompt, 100)
    accepted = [n for k, of_rows in history if k for n in of_rows]
    assert 0 < sum(accepted) < 4 * len(accepted)


# --- The command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def draft_checkpoint(tiny_checkpoint, tmp_path_factory):
    """A model that mostly agrees with the tiny one, and its tokenizer."""
    folder = tmp_path_factory.mktemp("draft")
    for file in tiny_checkpoint.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    config, weights = read_checkpoint(tiny_checkpoint / "model.pth")
    write_checkpoint(folder / "model.pth", config, noisy(weights, 0.02))
    return folder / "model.pth"


@pytest.fixture(params=["draft", "lookup"])
def drafts(request, draft_checkpoint):
    return ("--prompt_lookup",) if request.param == "lookup" else ("--draft_checkpoint_path", draft_checkpoint)


LONG = ("--temperature", "0", "--ignore_eos", "--max_new_tokens", 90, "--prompt", "abcabcabc")


@pytest.mark.parametrize("more", [[], ["--speculate_k", 3], ["--speculate_k", "auto"], ["--batch_size", 2]])
def test_the_text_is_the_plain_one(run, drafts, more):
    plain = run(*LONG, *(more if "--batch_size" in more else []))
    result = run(*LONG, *drafts, *more)
    assert result.samples == plain.samples and result.stdout == plain.stdout


def test_stop_strings_chats_and_prompt_files_work_with_drafts(run, drafts, tmp_path):
    stop = run(*LONG).samples[0]["text"][30:33]
    file = tmp_path / "prompts.txt"
    file.write_text("Hello\nA longer line\nx\n")
    for more in (["--stop", stop], ["--chat"], ["--prompt_file", file], ["--kv_cache", "int8"]):
        base = [argument for argument in LONG if argument not in ("--prompt", "abcabcabc")]
        plain, result = run(*base, *more), run(*base, *more, *drafts)
        assert result.samples == plain.samples, more


def test_a_session_keeps_its_caches(run, drafts):
    lines = "Hello\nHello, you\nHello, you too\n"
    options = ("--temperature", "0", "--ignore_eos", "--interactive", "--max_new_tokens", 20)
    plain, result = run(*options, stdin=lines), run(*options, *drafts, stdin=lines)
    assert result.samples == plain.samples and [r["cached_tokens"] for r in result.runs][1:] == [5, 10]


def test_the_figures_say_what_came_of_the_drafts(run, drafts):
    result = run(*LONG, *drafts, "--speculate_k", 4, "--compare", "--num_samples", 2)
    for figures in result.runs:
        rows = sum(figures["histogram"])
        kept = sum(n * count for n, count in enumerate(figures["histogram"]))
        assert rows == figures["rounds"] and figures["kept_per_round"] == pytest.approx(kept / rows)
        whole = figures["histogram"][4] if len(figures["histogram"]) > 4 else 0
        assert figures["acceptance"] == pytest.approx(kept / (kept + rows - whole))
        assert figures["decode_steps"] == figures["rounds"] + figures["plain_steps"]
        assert figures["verify_seconds_per_round"] > 0
        assert (
            (figures["draft_seconds_per_round"] > 0)
            == (figures["draft_steps"] > 0)
            == ("--prompt_lookup" not in drafts)
        )
        assert figures["plain_text_is_the_same"] is True and figures["plain_tokens_per_second"] > 0
    assert set(result.data["round_seconds"]) == {"0", "4"}
    for words in ("drafts:", "of the checked drafts accepted", "a round took", "times as fast, the same text"):
        assert result.stderr.count(words) == 2
    auto = run(*LONG, *drafts, "--speculate_k", "auto").data
    assert (auto["catch_up_seconds"] > 0) == ("--prompt_lookup" not in drafts)


def test_compiled_drafts_write_the_plain_text(run, drafts):
    torch.compiler.reset()
    plain = run(*LONG)
    result = run(*LONG, *drafts, "--speculate_k", 3, "--compile")
    assert result.samples == plain.samples and "compiled in" in result.stderr


def test_a_quantized_draft_of_a_quantized_model(run, draft_checkpoint):
    options = (*LONG, "--quantize", "int8")
    assert run(*options, "--draft_checkpoint_path", draft_checkpoint).samples == run(*options).samples


def test_a_draft_without_tokenizer_is_compared_by_its_size(run, refused, folder, draft_checkpoint):
    for file in folder.glob("*.json"):
        file.unlink()
    options = ("--prompt", "9", "--temperature", "0")
    drafts = ("--draft_checkpoint_path", draft_checkpoint)
    assert run(*options, *drafts, folder=folder).samples == run(*options, folder=folder).samples
    config = replace(read_checkpoint(draft_checkpoint)[0], vocab_size=300)
    write_checkpoint(folder / "other.pth", config, random_weights(config))
    (line,) = refused(*options, "--draft_checkpoint_path", folder / "other.pth", folder=folder).splitlines()
    assert "the draft model has 300 tokens, the model 260" in line


def test_another_vocabulary_is_refused_and_another_size_is_not(run, refused, folder, draft_checkpoint):
    config = replace(read_checkpoint(draft_checkpoint)[0], vocab_size=272)  # padded
    write_checkpoint(folder / "padded.pth", config, random_weights(config))
    padded = ("--draft_checkpoint_path", folder / "padded.pth")
    assert run(*LONG, *padded).samples == run(*LONG).samples
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"][1]["content"] = "<|human|>"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (line,) = refused(*LONG, *padded).splitlines()
    assert line.startswith("error: the draft model has another vocabulary: its token 257 is '<|human|>', the model's")


def test_a_token_that_only_one_has_is_a_difference():
    def tokenizer(*pieces):
        return SimpleNamespace(vocab_size=len(pieces), piece=pieces.__getitem__)

    check_vocabulary(tokenizer("a", "b"), tokenizer("a", "b"))
    for ours, theirs in ((("a",), ("a", "b")), (("a", "b"), ("a",)), (("a", "b"), ("b", "a"))):
        with pytest.raises(ValueError, match="another vocabulary"):
            check_vocabulary(tokenizer(*ours), tokenizer(*theirs))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--speculate_k", "3"], "add --prompt_lookup or --draft_checkpoint_path"),
        (["--compare"], "add --prompt_lookup or --draft_checkpoint_path"),
        (["--prompt_lookup", "--reference"], "has no cache for drafts"),
        (["--prompt_lookup", "--compare", "--interactive"], "leave out --interactive"),
        (["--prompt_lookup", "--draft_checkpoint_path", "x"], "drafts come from one place"),
        (["--draft_checkpoint_path", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(refused, options, sentence):
    (line,) = refused(*options).splitlines()
    assert line.startswith("error: ") and sentence in line


@pytest.mark.parametrize("k", ["0", "-1", "some"])
def test_a_k_that_is_no_number_is_refused(refused, k):
    assert "is not a whole number above 0" in refused("--prompt_lookup", "--speculate_k", k)
