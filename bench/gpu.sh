#!/usr/bin/env bash
# A whole GPU check in one command: bench/gpu.sh DIR [--quick] (see bench/README.md, or --help).
# PYTHON names an interpreter that has torch; packages it lacks may come by PYTHONPATH.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname -- "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
