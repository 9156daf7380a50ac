# Sourced by the scripts, from the project's root: a .venv that is made once and filled once.
#
# .venv/complete goes before every change and comes back after it. A .venv without it was cut off half-way and is made
# anew, because pip takes a half-unpacked package for an installed one.

fail() {
    echo "error: $*" >&2
    exit 2
}

# The first Python on the PATH that is new enough and can make environments. A name may be there and not run (pyenv).
find_python() {
    local name old=""
    for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        "$name" -c 'import venv, ensurepip' 2>/dev/null && echo "$name" && return
        old=$name
    done
    [ -z "$old" ] || fail "$old cannot make environments; install its venv module (Debian: apt install python3-venv)"
    fail "there is no Python 3.11 or newer on the PATH; install one and run this again"
}

make_venv() {
    if [ -e .venv/complete ] && .venv/bin/python -c '' 2>/dev/null; then return; fi
    if [ -e .venv/pyvenv.cfg ] && ! grep -q "^prompt = 'gpt-twin'" .venv/pyvenv.cfg; then
        fail ".venv was not made by this script; move it away and run this again"
    fi
    local python
    python=$(find_python)
    echo "Making .venv with $("$python" --version) ..."
    rm -f .venv/pyvenv.cfg # first: it says whose .venv this is
    rm -rf .venv
    "$python" -m venv --prompt gpt-twin .venv || fail "$python could not make .venv; see above"
    touch .venv/complete
}

# install FILE ...: the requirements of each, unless the same file was installed before. A copy is kept to tell.
install() {
    local file
    make_venv
    for file; do
        if cmp -s "$file" ".venv/installed/$file"; then continue; fi
        echo "Installing $file ..."
        rm -f .venv/complete
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file" ||
            fail "pip could not install $file; see above"
        mkdir -p ".venv/installed/$(dirname "$file")"
        cp "$file" ".venv/installed/$file"
        touch .venv/complete
    done
}
