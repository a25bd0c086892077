#!/usr/bin/env bash
# Everything that needs a GPU, with one command: ./scripts/bench/gpu.sh [RESULTS.jsonl]
#
# Random weights in the shapes of Qwen2.5; each benchmark's JSON line is appended to RESULTS.jsonl (gpu.jsonl).
#   PYTHON     interpreter with rftjax and an accelerator's JAX (.venv/bin/python)
#   BANDWIDTH  bytes a second that the memory reaches (4.3e12, an H200; H100 SXM: 3.0e12; 0: measured by a copy)
#   PEAK       dense bfloat16 operations a second (790e12, H100 and H200; 0: measured by a product)
#   FORMS      of attention beside the blocked one: in the update, and in the sampler, where all but cudnn and triton are one (plain cudnn triton)
#   MODELS, SLOTS, TRAINED, LENGTH  what is sampled, rows at once, what is trained, tokens of prompt and completion
#   PEER, PEER_MODEL  a peer's command for a whole step, run in turn with ours on the Hugging Face directory PEER_MODEL:
#     PEER="peer/bin/python trl_grpo.py MODEL_DIR 4 8 8 64 64 bfloat16" PEER_MODEL=MODEL_DIR
# Proof on any machine that it runs:
#   MODELS=--model=tests/data/tiny TRAINED=--model=tests/data/tiny SLOTS=8 LENGTH=16 BANDWIDTH=0 PEAK=0 FORMS=plain ./scripts/bench/gpu.sh
set -euo pipefail

results="${1:-gpu.jsonl}"
touch "$results"
results="$(cd "$(dirname "$results")" && pwd)/$(basename "$results")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-.venv/bin/python}"
# The 7B model trains in float32 masters with Adam's two moments and gradients: 122 GB before activations, so it is sampled only.
models="${MODELS:---shape=qwen2.5-0.5b --shape=qwen2.5-1.5b --shape=qwen2.5-7b}"
trained="${TRAINED:---shape=qwen2.5-0.5b --shape=qwen2.5-1.5b}"
length="${LENGTH:-256}"
sizes=(--dtype=bfloat16 "--prompt_tokens=$length" "--new_tokens=$length")
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}"

bench() {
  echo "== $*"
  "$python" "scripts/bench/$1.py" "${@:2}" "${sizes[@]}" | tee /dev/stderr | tail -n 1 >>"$results"
}

for model in $models; do
  for slots in ${SLOTS:-64 256}; do
    for form in blocked ${FORMS:-cudnn}; do
      bench sample "$model" "--slots=$slots" --forms=fixed --repeats=2 "--attention=$form" "--bandwidth=${BANDWIDTH:-4.3e12}" ||
        echo "attention $form: failed" >&2
    done
  done
done
for model in $trained; do
  bench update "$model" "--peak=${PEAK:-790e12}" "--peak_size=${PEAK_SIZE:-8192}"
  # Kernels for NVIDIA GPUs beside ours: the same loss and gradient norm, and which one is faster. They run nowhere else.
  for form in ${FORMS:-plain cudnn triton}; do
    bench update "$model" "--attention=$form" --forms=packed "--peak=${PEAK:-790e12}" "--peak_size=${PEAK_SIZE:-8192}" ||
      echo "attention $form: failed" >&2
  done
  bench step "$model"
done
# Mixed lengths: what the device gains where a short dispatch runs while the host refills slots.
for bridge in 0 4; do
  bench sample "${models%% *}" --forms=mixed --repeats=2 "--bridge_steps=$bridge"
done
if [[ -n "${PEER:-}" ]]; then
  ours="$python scripts/bench/step.py --model=${PEER_MODEL:?a Hugging Face directory} --dtype=bfloat16"
  "$python" scripts/bench/compare.py --rounds=2 "--peer=$PEER" "--ours=$ours" | tee /dev/stderr | tail -n 1 >>"$results"
fi
echo "results: $results"
