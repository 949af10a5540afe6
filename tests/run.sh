#!/usr/bin/env bash
# Makes .venv with the test extras and runs the whole suite; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup_venv.sh --dev
exec .venv/bin/python -m pytest "$@"
