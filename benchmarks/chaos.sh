#!/usr/bin/env bash
# Kill pre-training, evaluation and ingestion at random moments, N times in all, start them again, and compare what they
# end with to uninterrupted runs (benchmarks/chaos.py):
#
#   bash benchmarks/chaos.sh 100          about a quarter of an hour on 2 CPU cores; status 1 if a trial failed
#   bash benchmarks/chaos.sh 100 OUT      OUT (runs/chaos) holds trials.jsonl and the folders of trials that failed
set -euo pipefail
if (($# < 1 || $# > 2)); then
    echo "usage: bash benchmarks/chaos.sh N [OUT]" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")/.." && pwd)
exec "${PYTHON:-python3}" "$here/benchmarks/chaos.py" "${2:-$here/runs/chaos}" --kills "$1"
