#!/usr/bin/env bash
# Every training step and generation that the README's figures come from, one process each, into a folder of records:
# bench/record_steps.sh bench/results/h200
set -uo pipefail
folder=${1:?give the folder to write to}
mkdir -p "$folder"
step() { python3 -m bench.step "$@" --out "$folder/step.json"; }
step --batch 8 --seq 2048 --policy none --trace
step --batch 8 --seq 2048 --policy full --trace
step --batch 8 --seq 2048 --policy offload --trace
step --batch 2 --seq 2048 --policy none
step --batch 2 --seq 2048 --policy offload
step --batch 1 --seq 8192 --policy none
step --batch 1 --seq 65536 --policy offload --steps 2
step --batch 1 --seq 262144 --policy auto --steps 0
step --batch 2 --seq 8192 --packed --policy auto --trace
for policy in none full; do step --shape llama3.1-70b --batch 1 --seq 2048 --policy "$policy" --steps 3; done
for batch in 1 8 64; do python3 -m bench.decode --batch "$batch" --out "$folder/decode.json"; done
