#!/usr/bin/env bash
# Lint, format check and tests, in .venv: ./scripts/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

install requirements.txt scripts/requirements.txt tests/requirements.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest -n 2 "$@"
