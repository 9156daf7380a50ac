"""What the three pages promise: files, flags and links that exist, Python that runs, figures that were measured."""

import ast
import contextlib
import functools
import io
import json
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest

import generate
from convert_hf_checkpoint import ARCHITECTURES, MULTIMODAL

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "benchmarks/README.md")}
PAGES["scripts/README.md"] = (ROOT / "scripts/README.md").read_text(encoding="utf-8")
README, FIGURES = PAGES["README.md"], PAGES["benchmarks/README.md"]
COMMANDS = [path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
COMMANDS += [f"-m scripts.{path.stem}" for path in ROOT.glob("scripts/*.py")]
TORCHRUN = {"--standalone", "--nproc_per_node"}
each_page = pytest.mark.parametrize("page", PAGES)


@functools.cache
def flags_of(command):
    """The flags that `python COMMAND --help` shows."""
    program, shown = command.removeprefix("-m "), io.StringIO()
    run, name = (runpy.run_path, str(ROOT / program)) if program.endswith(".py") else (runpy.run_module, program)
    with mock.patch.object(sys, "argv", [program, "--help"]), contextlib.redirect_stdout(shown):
        with pytest.raises(SystemExit):
            run(name, run_name="__main__")
    return set(re.findall(r"--\w+", shown.getvalue()))


def commands_of(page):
    """(command, its arguments) of each that a page shows, lines that end in a backslash joined."""
    text = re.sub(r"\\\n\s*", "", PAGES[page])
    return re.findall(r"(?:python|torchrun(?: --\w+(?:=\d+)?)+) (-m scripts\.[a-z_]+|\w+\.py)([^\n`]*)", text)


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text):
    """The cells of each row of the tables in a text, but for headings and rules."""
    lines = text.splitlines()
    table = [line for line, below in zip(lines, [*lines[1:], ""], strict=True) if not below.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table if re.match(r"\|(?!---)", line)]


def files_in(text):
    return re.findall(r"`([\w/]+\.(?:py|sh))`", text)


# Commands and flags.


@each_page
def test_commands_exist_and_take_the_flags_that_are_shown(page):
    shown = commands_of(page)
    assert len(shown) >= 10
    for command, arguments in shown:
        assert command in COMMANDS
        assert set(re.findall(r"(?<!\S)--\w+", arguments)) <= flags_of(command), command


@each_page
def test_every_flag_belongs_to_some_command(page):
    known = set.union(*map(flags_of, COMMANDS)) | TORCHRUN | {"--help"}
    assert set(re.findall(r"(?<![\w-])--\w+", PAGES[page])) <= known


def test_the_flags_of_generating_and_their_defaults(monkeypatch):
    shown = {flag for flag, _ in rows(section("Generate")) for flag in re.findall(r"--\w+", flag)}
    assert len(shown) == 10
    assert shown <= flags_of("generate.py")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint_path", "model.pth"])
    defaults = generate.parse_arguments()
    assert f"| `--temperature` | {defaults.temperature};" in README
    assert f"| `--max_new_tokens` | stops after so many tokens: {defaults.max_new_tokens} |" in README


# Files and links.


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@each_page
def test_links_resolve(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", PAGES[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE))


@each_page
def test_files_that_are_named_exist(page):
    for name in files_in(PAGES[page]) + re.findall(r"\./(scripts/\w+\.sh)", PAGES[page]):
        assert (ROOT / name).exists() or ((ROOT / page).parent / name).exists(), name


def floors():
    """{file: floor} of the map."""
    return {name.strip("`"): int(floor) for floor, name, _ in rows(section("How it fits together"))}


def test_every_file_is_on_the_map():
    assert floors().keys() - {"scripts/"} == {path.name for path in ROOT.glob("*.py")}


def test_files_import_only_from_floors_below():
    above = []
    for name, floor in floors().items() - {("scripts/", 7)}:
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            above += [f"{name}: {module}" for module in modules if floors().get(f"{module}.py", 0) >= floor]
    assert above == []


def test_the_files_to_copy_are_those_of_the_copy_lines():
    for _, copied, needed in rows(section("Which file to copy")):
        names = re.findall(r"`(\w+\.py)`", copied + needed)
        docstring = ast.get_docstring(ast.parse((ROOT / names[0]).read_text(encoding="utf-8")))
        line = re.search(r"^Copy me: (.+?)(?=\n\n|\Z)", docstring, re.DOTALL | re.MULTILINE)[1]
        assert set(names[1:]) == set(re.findall(r"\w+\.py", line)), names[0]


def test_kernels_that_are_named_exist():
    for file in ("gpu_kernels", "gpu_products"):
        names = set(re.findall(rf"`{file}\.(\w+)`", README)) - {"py"}
        assert names
        for name in names:
            assert f"\ndef {name}(" in (ROOT / f"{file}.py").read_text(encoding="utf-8")


def test_the_architectures_are_those_that_convert():
    known = [*ARCHITECTURES, *MULTIMODAL]
    names = [name for row in rows(section("Models that run")) for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(name if name in known else f"{name}ForCausalLM" for name in names) == sorted(known)


# Python and figures.


def test_the_python_example_runs_and_speculates(tiny_checkpoint):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = code.replace("checkpoints/SmolLM2-135M-Instruct", str(tiny_checkpoint))
    (steps,) = re.findall(r"`steps=(Steps\(.*\))`", README)
    speculative = f"sampling, drafts = Sampling(temperature=0), PromptLookup()\n{code}".replace(
        "eos_ids=tokenizer.eos_ids", f"eos_ids=tokenizer.eos_ids, steps={steps}"
    )
    texts = []
    for example in (code, speculative):
        names = {
            name: getattr(generate, name) for name in ("Fixed", "PromptLookup", "Sampling", "Speculation", "Steps")
        }
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(example, names)
        texts.append(printed.getvalue())
    assert texts[0] and texts[0] == texts[1]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.json")), ids=lambda path: path.stem)
def test_figures_are_those_of_the_files(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    for row in content["rows"]:
        if content["suite"] in ("prefill", "forward", "train"):
            figure = f"{row['seconds'] * 1e3:.1f} ms"
        else:
            figure = f"| {row['tokens'] / row['seconds']:.1f} "
        assert figure in FIGURES, row["name"]


def test_a_figure_on_the_first_page_has_its_command_on_the_second():
    prose = re.sub(r"(?m)^    .*$", "", README)
    figures = re.findall(r"(\d[\d,]*\.?\d*)(?: tokens/s| ms| GB/s| times|%)", prose)
    assert len(figures) >= 8
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}", FIGURES), figure


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= 240
    assert len(README.encode()) <= 14_000
    assert "\n## Which file to copy\n" in "\n".join(README.splitlines()[:60])
