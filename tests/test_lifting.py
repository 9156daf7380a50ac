"""A file can be lifted out as its `Copy me:` line says, imports what a table allows, and changes nothing by that."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
SCRIPTS = {f"scripts.{path.stem}": path for path in sorted(ROOT.glob("scripts/*.py"))}
NEEDS_TRITON = {"gpu_kernels", "gpu_matvec", "gpu_products"}  # which is only where there are GPUs; others do without

# Each file imports only from the floors below its own; scripts/ is above all of them.
FLOORS = (
    {"model", "cpu_kernels", "gpu_kernels", "runtime", "tokenizer"},
    {"gpu_matvec", "tp"},
    {"gpu_products"},
    {"quantized_linear", "fast_model", "decode"},
    {"speculate", "checkpoint"},
    {"generate", "quantize", "convert_hf_checkpoint", "check_equivalence"},
)
# The libraries that a file imports at once besides torch, and those that it imports in a function that uses them.
AT_ONCE = {"quantize": {"tqdm"}, "convert_hf_checkpoint": {"safetensors", "tqdm"}}
AT_ONCE |= dict.fromkeys(NEEDS_TRITON, {"triton"})
WHERE_USED = {"tokenizer": {"tokenizers", "sentencepiece", "jinja2"}, "check_equivalence": {"transformers"}}
WITHOUT_TORCH = {"tokenizer"}
LIBRARIES = {"torch", "safetensors", "tqdm", "tokenizers", "sentencepiece", "jinja2", "transformers", "gguf"}
LIBRARIES |= {"triton", "matplotlib", "huggingface_hub", "mistral_common"}

each_file = pytest.mark.parametrize("name", FILES)


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def modules_in(nodes):
    """Names of the modules that are imported, up to their first dot, without the standard library's."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.partition(".")[0])
    return names - sys.stdlib_module_names


def imports(path):
    """(names imported when the file is, names imported inside its functions)."""
    nodes = list(ast.walk(tree(path)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)}
    return modules_in(node for node in nodes if node not in inside), modules_in(inside)


def python(code, folder, without=()):
    """Run code in a fresh interpreter that finds modules in `folder` and no library of `without`; what it prints."""
    script = folder / "use_it.py"  # a file: its folder comes first on the path
    # An older .venv has the project on its path; here it must not be found.
    others = f"entry == {str(folder)!r} or not os.path.exists(entry + '/check_equivalence.py')"
    path = f"sys.path = [entry for entry in sys.path if {others}]"
    script.write_text(f"import os, sys\n{path}\nsys.modules |= dict.fromkeys({sorted(without)})\n{code}")
    outside = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONSTARTUP")
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    finished = subprocess.run([sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return finished.stdout


# Who imports whom.


@each_file
def test_a_file_imports_only_from_the_floors_below(name):
    floors = [number for number, files in enumerate(FLOORS) if name in files]
    assert floors, f"{name}.py is new: does it need a file of its own? Then give it a floor"
    below = set().union(*FLOORS[: floors[0]])
    at_once, inside = imports(FILES[name])
    libraries = AT_ONCE.get(name, set()) | ({"torch"} - ({"torch"} if name in WITHOUT_TORCH else set()))
    assert at_once <= below | libraries
    assert inside <= below | libraries | WHERE_USED.get(name, set())


def test_no_floor_names_a_file_that_is_not_there():
    assert set().union(*FLOORS) == FILES.keys()


# What no file does.


def is_sys_path(node):
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"


HABITS = {
    "global": lambda node: isinstance(node, ast.Global),
    "bare except": lambda node: isinstance(node, ast.ExceptHandler) and node.type is None,
    "sys.path": is_sys_path,
    "weights_only=False": lambda node: isinstance(node, ast.keyword) and ast.unparse(node) == "weights_only=False",
    "torch.load of anything": lambda node: (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "torch.load"
        and "weights_only" not in {keyword.arg for keyword in node.keywords}
    ),
    "builtins.print": lambda node: isinstance(node, ast.Attribute) and ast.unparse(node) == "builtins.print",
}
OFFENDERS = """
global x
try: pass
except: sys.path.insert(0, "..")
torch.load(file, weights_only=False)
torch.load(file)
builtins.print = None
"""


@pytest.mark.parametrize("habit", HABITS)
def test_no_file_has_a_bad_habit(habit):
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (FILES | SCRIPTS).values()
        for node in ast.walk(tree(path))
        if HABITS[habit](node)
    ]
    assert found == []
    assert any(HABITS[habit](node) for node in ast.walk(ast.parse(OFFENDERS)))


# What importing does not do.

IMPORT_EACH = """
import os, random, threading, warnings
import torch, torch.distributed, torch._dynamo.config, torch._functorch.config, torch._inductor.config

def state():
    configs = {name: getattr(torch, name).config.get_config_copy() for name in ("_dynamo", "_functorch", "_inductor")}
    values = {f"{name}.{key}": value for name, config in configs.items() for key, value in config.items()}
    return values | {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "random": (torch.get_rng_state().tolist(), random.getstate()),
        "CUDA": torch.cuda.is_initialized(),
        "process group": torch.distributed.is_initialized(),
        "environment": dict(os.environ),
        "sys.path": list(sys.path),
        "warnings": list(warnings.filters),
    }

for name in NAMES:
    if os.fork() == 0:  # torch takes seconds to import: each file has its own process with torch alone in it
        before = state()
        __import__(name)
        after = state()
        changed = [key for key in before if before[key] != after[key]]
        print(name, *changed, sep=",", flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def changed_by_import(tmp_path_factory):
    """{file: what importing it changed}, with no library installed that is not imported at once by some file."""
    folder = tmp_path_factory.mktemp("all")
    for name, path in FILES.items():
        if name not in NEEDS_TRITON:
            shutil.copy(path, folder)
    (folder / "meddler.py").write_text(
        "import torch\n"
        "torch._inductor.config.coordinate_descent_tuning = True\n"
        "torch.set_float32_matmul_precision('high')\n"
        "torch.randn(1)\n"
    )
    optional = LIBRARIES - {"torch"} - set().union(*(AT_ONCE.get(name, set()) for name in FILES.keys() - NEEDS_TRITON))
    code = f"NAMES = {['meddler', *FILES.keys() - NEEDS_TRITON]}\n{IMPORT_EACH}"
    lines = [line.split(",") for line in python(code, folder, without=optional).splitlines()]
    return {name: changed for name, *changed in lines}


def test_importing_something_that_meddles_is_noticed(changed_by_import):
    expected = {"_inductor.coordinate_descent_tuning", "matmul precision", "random"}
    assert expected <= set(changed_by_import["meddler"])


@pytest.mark.parametrize("name", sorted(FILES.keys() - NEEDS_TRITON))
def test_importing_a_file_changes_nothing_and_needs_no_optional_library(changed_by_import, name):
    assert changed_by_import[name] == []


# Lifting.


def copy_line(name):
    """The paragraph after `Copy me:` in a file's docstring."""
    docstring = ast.get_docstring(tree((FILES | SCRIPTS)[name]))
    found = re.search(r"^Copy me: (.+?)(?=\n\n|\Z)", docstring, re.DOTALL | re.MULTILINE)
    assert found, f"{name} does not say how to copy it"
    return found[1]


def lift(name, folder):
    """Copy what the line says; the libraries that it does not name."""
    line = copy_line(name)
    for file in {f"{name.replace('.', '/')}.py", *re.findall(r"`([\w/]+\.py)`", line)}:
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    return LIBRARIES - set(re.findall(r"\w+", line))


@pytest.mark.parametrize("name", sorted(FILES.keys() - NEEDS_TRITON))
def test_the_copy_line_names_all_that_a_file_needs(name, tmp_path):
    without = lift(name, tmp_path) | {"triton"}
    code = f"import {name}\nprint({{sys.modules[name].__file__ for name in {list(FILES)} if name in sys.modules}})"
    out = python(code, tmp_path, without)
    lifted = {str(file) for file in tmp_path.glob("*.py") if file.stem in FILES.keys() - NEEDS_TRITON}
    assert ast.literal_eval(out) == lifted  # each of them was needed


HELP = """
import json, runpy
sys.argv = ["NAME", "--help"]
try:
    runpy.run_module("NAME", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
print(json.dumps([sys.modules[name].__file__ for name in FILES if name in sys.modules]))
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_copy_line_of_a_script_names_all_that_it_needs(name, tmp_path):
    without = lift(name, tmp_path) | {"triton"}
    lifted = {str(file) for file in tmp_path.rglob("*.py")}
    others = [*(FILES.keys() - NEEDS_TRITON), *(SCRIPTS.keys() - {name})]
    out = python(HELP.replace("NAME", name).replace("FILES", repr(others)), tmp_path, without)
    assert out.startswith("usage: ")
    own = {str(tmp_path / f"{name.replace('.', '/')}.py"), *(str(tmp_path / f"{file}.py") for file in NEEDS_TRITON)}
    assert set(json.loads(out.splitlines()[-1])) == lifted - own  # each of them was needed


TINY = "GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=4, n_kv_head=2, head_dim=6, dim=8, hidden_dim=12)"
TRAIN = f"""
import torch
from model import GPT, GPTConfig

torch.manual_seed(0)
model = GPT({TINY})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2, 3]])
losses = []
for _ in range(30):
    logits, loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 4, losses
print(model(ids).argmax(-1)[0, 2:].tolist())
"""
DECODE = f"""
import torch
from fast_model import FastGPT, to_reference
from model import GPT, GPTConfig

torch.manual_seed(0)
fast, model = FastGPT({TINY}), GPT({TINY})
model.load_state_dict(to_reference(fast.state_dict(), fast.config))
fast.setup_caches(1, 16)
ids = torch.tensor([[1, 2, 3]])
with torch.no_grad():
    for position in range(3):
        logits = fast(ids[:, position : position + 1], torch.tensor([[position]]))
    print((logits - model(ids)[:, -1:]).abs().max().item() < 1e-5)
"""
ROUND_TRIP = """
from tokenizer import load_tokenizer

tokenizer = load_tokenizer(".")
print(tokenizer.decode(tokenizer.encode("a tall tale")))
"""
CHAT = ROUND_TRIP + 'print(tokenizer.render_chat([{"role": "user", "content": "hi"}]))\n'


def make_tokenizer_json(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: id for id, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "<{{ messages[0].content }}>"}')


def make_tokenizer_model(folder):
    from sentencepiece import SentencePieceTrainer

    texts = iter(["a tall tale", "tell a tale", "all late"])
    with open(folder / "tokenizer.model", "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=texts, model_writer=file, vocab_size=20, hard_vocab_limit=False, minloglevel=2
        )


@pytest.mark.parametrize(
    "name, prepare, code, spared, printed",
    [
        ("model", None, TRAIN, set(), "[1, 2, 3, 1, 2, 3, 1]\n"),
        ("fast_model", None, DECODE, set(), "True\n"),
        ("tokenizer", make_tokenizer_json, ROUND_TRIP, {"sentencepiece", "jinja2"}, "a tall tale\n"),
        ("tokenizer", make_tokenizer_json, CHAT, {"sentencepiece"}, "a tall tale\n<hi>\n"),
        ("tokenizer", make_tokenizer_model, ROUND_TRIP, {"tokenizers", "jinja2"}, "a tall tale\n"),
    ],
    ids=["model", "fast_model", "tokenizer.json", "chat", "tokenizer.model"],
)
def test_a_lifted_file_works_in_an_empty_folder(tmp_path, name, prepare, code, spared, printed):
    without = lift(name, tmp_path)
    if prepare:
        prepare(tmp_path)
    assert python(code, tmp_path, without | spared) == printed
    assert python("import importlib.util as i\nprint(i.find_spec('check_equivalence'))", tmp_path) == "None\n"
