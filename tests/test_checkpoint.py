"""checkpoint.py: what is written comes back, whatever wrote it; what is damaged or foreign is refused in a sentence."""

import pickle
import shutil
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from check_equivalence import FAMILIES, random_weights
from checkpoint import (
    build_model,
    default_dtype,
    load,
    quantize_model,
    read_checkpoint,
    reference_state,
    save,
    write_checkpoint,
)
from fast_model import to_reference

CONFIG = replace(FAMILIES["qwen2"], block_size=32, vocab_size=50)
WEIGHTS = random_weights(CONFIG)
UNTIED = random_weights(replace(CONFIG, tie_embeddings=False))
Q_PROJ = "transformer.h.0.attn.q_proj.weight"


@pytest.fixture
def path(tmp_path):
    """A checkpoint."""
    write_checkpoint(tmp_path / "model.pth", CONFIG, WEIGHTS)
    return tmp_path / "model.pth"


def content_of(path):
    return torch.load(path, weights_only=True)


def rewrite(path, **entries):
    """The checkpoint with other entries, past write_checkpoint's own checks."""
    torch.save(content_of(path) | entries, path)


def same(left, right):
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def refused(path, *texts, error=ValueError):
    with pytest.raises(error) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    for text in (str(path), *texts):
        assert text in message
    assert "\n" not in message and len(message) < 300


# There and back.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_weights_come_back_bit_for_bit(tmp_path, family, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(FAMILIES[family]).items()}
    write_checkpoint(tmp_path / "deep" / "er" / "any.name", FAMILIES[family], weights)
    config, state_dict = read_checkpoint(tmp_path / "deep" / "er" / "any.name")
    assert config == FAMILIES[family]
    same(state_dict, weights)
    reference, fast = (build_model(config, state_dict, "cpu", dtype, twin) for twin in (True, False))
    same(dict(sorted(reference.state_dict().items())), dict(sorted(weights.items())))
    same(dict(sorted(to_reference(fast.state_dict(), config).items())), dict(sorted(weights.items())))
    assert not any(t.is_meta for model in (reference, fast) for t in [*model.parameters(), *model.buffers()])


def test_a_built_model_is_in_eval_mode_and_of_the_asked_dtype(path):
    for twin in (True, False):
        model = build_model(*read_checkpoint(path), "cpu", torch.bfloat16, twin)
        assert not model.training
        assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, False)}


@pytest.mark.parametrize(
    ("stored", "natively", "computed"),
    [
        (torch.float32, True, torch.bfloat16),
        (torch.float32, False, torch.float32),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float16),
        (torch.float16, True, torch.float16),
    ],
)
def test_a_gpu_without_bfloat16_computes_in_float16(stored, natively, computed, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: natively)
    state_dict = {"transformer.wte.weight": torch.zeros(1, dtype=stored)}
    assert default_dtype("cuda", state_dict) == computed


def test_the_names_of_file_and_folder_mean_nothing(path, tmp_path):
    other = tmp_path / "Llama-2-70b-int4" / "model.gguf"
    other.parent.mkdir()
    before = read_checkpoint(path)
    path.rename(other)
    after = read_checkpoint(other)
    assert after[0] == before[0]
    same(after[1], before[1])


def test_reading_maps_the_file_and_does_not_load_it(path):
    name = "transformer.wte.weight"
    embedding = read_checkpoint(path)[1][name]
    with open(path, "r+b") as file:
        file.seek(path.read_bytes().index(WEIGHTS[name].numpy().tobytes()))
        file.write(bytes(WEIGHTS[name].nbytes))
    assert not embedding.any()  # it shows what is in the file now


# What wrappers and training leave in the names and storages.


class Wrapper(nn.Module):
    """As DataParallel and DistributedDataParallel do it, which need devices or a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def wrap_blocks(model):
    for i, block in enumerate(model.transformer.h):
        model.transformer.h[i] = torch.compile(Wrapper(block))
    return model


WRAPPERS = {
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
    "distributed, then compiled": lambda model: torch.compile(Wrapper(model)),
    "compiled, then distributed": lambda model: Wrapper(torch.compile(model)),
    "its blocks alone": wrap_blocks,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_saved_as_the_same_file(tmp_path, wrapper):
    model = build_model(CONFIG, WEIGHTS, "cpu", torch.float32, reference=True)
    write_checkpoint(tmp_path / "bare" / "model.pth", CONFIG, model.state_dict())
    wrapped = WRAPPERS[wrapper](model).state_dict()
    assert not wrapped.keys() <= WEIGHTS.keys()
    write_checkpoint(tmp_path / "wrapped" / "model.pth", CONFIG, wrapped)
    files = [(tmp_path / folder / "model.pth").read_bytes() for folder in ("bare", "wrapped")]
    assert files[0] == files[1]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_prefixes_in_somebody_elses_file_are_taken_off(path, wrapper):
    model = build_model(CONFIG, WEIGHTS, "cpu", torch.float32, reference=True)
    rewrite(path, state_dict=WRAPPERS[wrapper](model).state_dict())
    same(dict(sorted(read_checkpoint(path)[1].items())), dict(sorted(WEIGHTS.items())))


# A live model, saved and loaded.


@pytest.fixture(scope="module")
def group():
    """A process group of this process alone, which DistributedDataParallel needs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_blocks(model):
    blocks = model.transformer.h if hasattr(model, "transformer") else model.layers
    for i, block in enumerate(blocks):
        blocks[i] = torch.compile(block, backend="eager")
    return model


LIVE = {
    "bare": lambda model: model,
    "torch.compile": partial(torch.compile, backend="eager"),
    "model.compile": compiled_in_place,
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
    "DDP of a compiled one": lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
    "its blocks compiled": compiled_blocks,
}


def live(kind, reference, weights=WEIGHTS):
    copies = {name: tensor.clone() for name, tensor in weights.items()}  # a model holds the tensors that it is given
    model = build_model(CONFIG, copies, "cpu", torch.float32, reference=reference).requires_grad_(True)
    return LIVE[kind](model)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("kind", LIVE)
def test_every_live_model_saves_the_same_file_and_loads_it(tmp_path, group, kind, reference):
    save(live("bare", True), tmp_path / "plain.pth")
    model = live(kind, reference)
    save(model, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == (tmp_path / "plain.pth").read_bytes()
    same(read_checkpoint(tmp_path / "model.pth")[1], dict(sorted(WEIGHTS.items())))

    other = random_weights(CONFIG, seed=1)
    write_checkpoint(tmp_path / "other.pth", CONFIG, other)
    ids = torch.arange(12).view(2, 6)
    before = model(ids)
    load(model, tmp_path / "other.pth")
    after = model(ids)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, live("bare", True, other)(ids))
    same(dict(sorted(reference_state(model).items())), dict(sorted(other.items())))


def test_compiling_after_loading_changes_nothing(tmp_path, path):
    model = live("bare", False, random_weights(CONFIG, seed=1))
    load(model, path)
    save(torch.compile(model, backend="eager"), tmp_path / "again.pth")
    same(dict(sorted(read_checkpoint(tmp_path / "again.pth")[1].items())), dict(sorted(WEIGHTS.items())))


def test_what_does_not_fit_is_not_loaded(path):
    model = live("bare", False)
    model.config = replace(CONFIG, norm_eps=1e-3)
    with pytest.raises(ValueError, match="differs in norm_eps"):
        load(model, path)
    write_checkpoint(path, *quantize_model(CONFIG, WEIGHTS, "int8", 32))
    model.config = read_checkpoint(path)[0]
    with pytest.raises(ValueError, match="is quantized"):
        load(model, path)
    config, state_dict = quantize_model(replace(CONFIG, tie_embeddings=False), UNTIED, "int8", 32)
    model = build_model(config, state_dict, "cpu", torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_checkpoint(path, config, UNTIED)
    with pytest.raises(ValueError, match="this model is quantized"):
        load(model, path)
    same(model.state_dict(), before)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_model_is_saved_as_it_was_or_refused(plain_twins, tmp_path, mode):
    config, state_dict = quantize_model(CONFIG, WEIGHTS, mode, 32)
    model = build_model(config, state_dict, "cpu", torch.float32)
    save(model, tmp_path / "model.pth")
    saved = read_checkpoint(tmp_path / "model.pth")[1]
    for name, tensor in state_dict.items():  # scales are in the dtype that the model computes in
        assert torch.equal(saved[name], tensor.to(saved[name].dtype)), name
    if mode == "int4":
        prepared = build_model(config, state_dict, "cpu", torch.bfloat16)
        with pytest.raises(ValueError, match="layout of this device's kernel"):
            save(prepared, tmp_path / "prepared.pth")
        assert not (tmp_path / "prepared.pth").exists()


def test_two_tensors_that_become_one_are_refused(path):
    twice = WEIGHTS | {f"_orig_mod.{Q_PROJ}": WEIGHTS[Q_PROJ]}
    with pytest.raises(ValueError, match=f"{Q_PROJ} is there twice"):
        write_checkpoint(path, CONFIG, twice)
    rewrite(path, state_dict=twice)
    with pytest.raises(ValueError, match=f"{Q_PROJ} is there twice"):
        read_checkpoint(path)


def test_a_view_does_not_drag_its_storage_into_the_file(path, tmp_path):
    views = {name: torch.cat([tensor] * 4)[: len(tensor)] for name, tensor in WEIGHTS.items()}
    write_checkpoint(tmp_path / "views.pth", CONFIG, views)
    same(read_checkpoint(tmp_path / "views.pth")[1], WEIGHTS)
    assert (tmp_path / "views.pth").stat().st_size == pytest.approx(path.stat().st_size, rel=0.01)


def test_parameters_of_a_model_in_training_are_saved_as_plain_tensors(tmp_path):
    weights = {name: nn.Parameter(tensor.clone()) for name, tensor in WEIGHTS.items()}
    write_checkpoint(tmp_path / "model.pth", CONFIG, weights)
    same(read_checkpoint(tmp_path / "model.pth")[1], WEIGHTS)


# Writing.


# torch's zip writer has this to say of a full disk
FULL = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598")


@pytest.mark.parametrize("raised, seen", [(FULL, OSError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_broken_write_leaves_the_old_file_and_nothing_beside_it(path, monkeypatch, raised, seen):
    before = path.read_bytes()

    def broken(content, file, save=torch.save):
        save({"half": 1}, file)
        raise raised

    monkeypatch.setattr(checkpoint.torch, "save", broken)
    with pytest.raises(seen):
        write_checkpoint(path, CONFIG, WEIGHTS)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_ctrl_c_in_a_write_is_not_taken_for_a_full_disk(path, monkeypatch):
    def broken(content, file):
        try:
            raise KeyboardInterrupt
        finally:
            raise FULL  # as torch's zip writer does when it is left

    monkeypatch.setattr(checkpoint.torch, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(path, CONFIG, WEIGHTS)


@pytest.mark.parametrize("error", [KeyError, TypeError, AttributeError, AssertionError])
def test_whatever_a_damaged_byte_raises_is_said_in_a_sentence(path, monkeypatch, error):
    monkeypatch.setattr(checkpoint.torch, "load", Mock(side_effect=error("185")))
    refused(path, "not a whole torch checkpoint")


def test_a_written_checkpoint_has_nothing_beside_it(path):
    assert list(path.parent.iterdir()) == [path]


def test_the_bytes_of_a_checkpoint_do_not_depend_on_its_name(path):
    write_checkpoint(path.with_name("other.pth"), CONFIG, WEIGHTS)
    assert path.with_name("other.pth").read_bytes() == path.read_bytes()


def test_a_checkpoint_can_be_written_over_the_file_that_it_was_read_from(path):
    config, state_dict = read_checkpoint(path)
    write_checkpoint(path, config, state_dict)
    same(read_checkpoint(path)[1], WEIGHTS)


# Strictness.


def without(name):
    return {other: tensor for other, tensor in WEIGHTS.items() if other != name}


MISFITS = {
    "missing": (without("transformer.ln_f.weight"), ["transformer.ln_f.weight", "lacks"]),
    "left over": (WEIGHTS | {"lm_head.weight": torch.zeros(50, 64)}, ["lm_head.weight", "no place"]),
    "misshapen": (WEIGHTS | {Q_PROJ: torch.zeros(64, 96)}, [Q_PROJ, "[64, 96]", "[96, 64]"]),
    "a dimension short": (WEIGHTS | {Q_PROJ: torch.zeros(96 * 64)}, [Q_PROJ, "[6144]", "[96, 64]"]),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_tensor_that_does_not_fit_is_named_with_its_file(path, misfit):
    state_dict, texts = MISFITS[misfit]
    rewrite(path, state_dict=state_dict)
    refused(path, *texts)


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_would_not_be_read_is_not_written(tmp_path, misfit):
    state_dict, texts = MISFITS[misfit]
    with pytest.raises(ValueError) as caught:
        write_checkpoint(tmp_path / "model.pth", CONFIG, state_dict)
    assert all(text in str(caught.value) for text in [str(tmp_path), *texts])
    assert list(tmp_path.iterdir()) == []


# Files that are something else.


def test_a_file_of_another_version_is_refused(path):
    rewrite(path, format_version=2)
    refused(path, "version 2", "reads 1")


def test_an_unknown_field_of_the_config_is_refused_by_name(path):
    rewrite(path, config=content_of(path)["config"] | {"n_expert": 8})
    refused(path, "n_expert")


def test_a_missing_field_of_the_config_is_refused_by_name(path):
    config = content_of(path)["config"]
    del config["n_head"]
    rewrite(path, config=config)
    refused(path, "n_head")


@pytest.mark.parametrize(
    "content", [WEIGHTS, {}, [1, 2], torch.zeros(3), "text"], ids=lambda value: type(value).__name__
)
def test_a_torch_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", "no checkpoint of this project")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path, "not a whole")


def test_a_file_that_torch_did_not_write_is_refused(path):
    path.write_text("GGUF or so, a text of more than a few bytes")
    refused(path, "not a whole")


def test_a_directory_is_refused(tmp_path):
    refused(tmp_path, "is a directory")


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "model.pth", "does not exist", error=FileNotFoundError)


CONFIG_FIELDS = vars(CONFIG)
FOREIGN = {
    "config of impossible sizes": ({"config": CONFIG_FIELDS | {"n_layer": 0}}, "n_layer"),
    "half a rope_scaling": ({"config": CONFIG_FIELDS | {"rope_scaling": {"factor": 8.0}}}, ""),
    "list of tensors": ({"state_dict": list(WEIGHTS.values())}, ""),
    "number for a tensor": ({"state_dict": WEIGHTS | {Q_PROJ: 3}}, ""),
    "unknown quantization": ({"quantization": {"mode": "int3"}}, "int3"),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_content_is_refused(path, foreign):
    entries, text = FOREIGN[foreign]
    rewrite(path, **entries)
    refused(path, text)


@pytest.mark.parametrize("shape", [(256, 4), (256, 0), (256,), (256, 128)])
def test_int4_in_other_groups_is_refused(path, shape):
    config = FAMILIES["llama-2"]
    write_checkpoint(path, *quantize_model(config, random_weights(config), "int4", 32))
    content = content_of(path)
    for kind in ("scales", "zeros"):
        content["state_dict"][f"transformer.h.0.mlp.up_proj.{kind}"] = torch.ones(shape, dtype=torch.bfloat16)
    torch.save(content, path)
    refused(path, "has scales of other groups than this code reads")


class Malicious:
    def __init__(self, victim):
        self.victim = str(victim)

    def __reduce__(self):
        return shutil.rmtree, (self.victim,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(path, tmp_path, zipped):
    victim = tmp_path / "victim"
    victim.mkdir()
    content = content_of(path) | {"extra": Malicious(victim)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(path, "not a whole torch checkpoint")
    assert victim.exists()
    pickle.loads(pickle.dumps(Malicious(victim)))
    assert not victim.exists()  # it would have worked
