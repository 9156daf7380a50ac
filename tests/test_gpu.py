"""What only a GPU shows: CUDA graphs, and the host that runs ahead. Skipped without one."""

import pytest
import torch

from check_equivalence import FAMILIES, check_model, random_weights
from checkpoint import build_model
from generate import Sampling, compile_options, decode_step, generate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_agrees(family):
    config = FAMILIES[family]
    rows = list(check_model(config, random_weights(config), "cuda"))
    assert [row for row in rows if not row.passed] == []


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=1.0, top_k=20, top_p=0.9)])
def test_compiled_text_is_the_eager_text(sampling):
    torch.compiler.reset()
    config = FAMILIES["llama-3.1"]
    model = build_model(config, random_weights(config), "cuda", torch.float32)
    step = torch.compile(decode_step, fullgraph=True, dynamic=False, options=compile_options("cuda"))
    prompt = torch.randint(config.vocab_size, (2, 9), device="cuda")
    expected = list(generate(model, prompt, 50, sampling, seed=3))
    assert list(generate(model, prompt, 50, sampling, seed=3, decode_step=step)) == expected


def test_running_ahead_stops_at_each_rows_end():
    config = FAMILIES["llama-2"]
    model = build_model(config, random_weights(config), "cuda", torch.float32)
    prompt = torch.randint(config.vocab_size, (2, 9), device="cuda")
    plain = list(generate(model, prompt, 40, Sampling(temperature=0)))
    ends = {plain[12][0], plain[23][1]}
    stopped = list(generate(model, prompt, 40, Sampling(temperature=0), eos_ids=ends))
    for row in range(2):
        ids = [ids[row] for ids in plain]
        until = next(i for i, id in enumerate(ids) if id in ends) + 1
        assert [ids[row] for ids in stopped] == ids[:until] + [None] * (len(stopped) - until)
