#!/usr/bin/env bash
# nano on one accelerator, each stage for a fixed time: prior, adapter, generator on pairs of latents, LPIPS with ICM.
#
#   train/accelerated_nano.sh PHOTOS LPIPS_VGG OUT
#
# PHOTOS is a folder of photographs (train/pack_photographs.py makes one that can travel), LPIPS_VGG the file
# lpips_vgg.safetensors (docs/measures.md). With the defaults it takes about ten minutes, start-up included. The results
# are OUT/base, OUT/adapter and OUT/generator.safetensors. A stage is stopped by SIGTERM and keeps its averaged weights,
# at a constant learning rate, so nobody has to know how fast the machine is. Environment:
#   PRIOR_SECONDS=210 ADAPTER_SECONDS=45 LATENTS_SECONDS=90 LPIPS_SECONDS=150
#   PAIRS=8000 WORKERS=12 BATCH=128 PRECISION=bf16 PYTHON=python
# A rehearsal on a CPU: PRIOR_SECONDS=60 ADAPTER_SECONDS=60 LATENTS_SECONDS=60 LPIPS_SECONDS=60 PAIRS=32 WORKERS=0
# BATCH=4 PRECISION=fp32, with a folder of some hundred small photographs.
set -euo pipefail
if [ $# -ne 3 ]; then
    sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
photos=$(realpath "$1") lpips=$(realpath "$2") out=$(realpath -m "$3")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -e "$out" ]; then
    echo "error: $out is there already: name another folder" >&2
    exit 1
fi
mkdir -p "$out"
batch=${BATCH:-128} workers=${WORKERS:-12}
endless=1000000000

# run SECONDS LOOP SCRIPT FLAGS...: LOOP is the name of the loop's settings in that script.
run() {
    local seconds=$1 loop=$2 script=$3 status=0
    shift 3
    echo "== $script for $seconds s"
    timeout --signal=TERM --kill-after=60 "$seconds" "${PYTHON:-python}" "train/$script" "$@" \
        "--data.folders=['$photos']" "--$loop.images=$endless" "--$loop.schedule=constant" \
        "--$loop.precision=${PRECISION:-bf16}" "--$loop.workers=$workers" "--$loop.save_every=$endless" || status=$?
    if [ "$status" -ne 124 ]; then # timeout says 124 where it had to stop the run, as it should
        echo "error: train/$script ended with $status" >&2
        exit 1
    fi
}

# kept FOLDER NAME TO: what the newest checkpoint of a run exported.
kept() {
    local newest
    newest=$(find "$1/checkpoints" -mindepth 1 -maxdepth 1 -type d -name '[0-9]*' 2>/dev/null | sort | tail -n 1 || true)
    if [ -z "$newest" ]; then
        echo "error: $1 has no checkpoint: give that stage more seconds" >&2
        exit 1
    fi
    cp -r "$newest/$2" "$3"
    echo "   $2 of $(basename "$newest") images"
}

run "${PRIOR_SECONDS:-210}" prior prior.py --config train/configs/nano_long_prior.yaml "--run=$out/runs/prior" \
    "--latents.scales=[1.0,0.5]" --latents.made_up=64 "--prior.batch=$batch" "--prior.warmup_images=$((batch * 100))" \
    "--prior.average_images=$((batch * 300))"
kept "$out/runs/prior/prior" base "$out/base"

run "${ADAPTER_SECONDS:-45}" loop adapter.py --config train/configs/nano_adapter.yaml "--run=$out/runs/adapter" \
    "--base=$out/base" "--loop.batch=$batch" "--loop.warmup_images=$((batch * 20))" \
    "--loop.average_images=$((batch * 40))"
kept "$out/runs/adapter" adapter "$out/adapter"

run "${LATENTS_SECONDS:-90}" loop distill.py --config train/configs/nano_latents.yaml "--run=$out/runs/latents" \
    "--base=$out/base" "--latents.pairs=${PAIRS:-8000}" "--loop.batch=$batch" "--loop.warmup_images=$((batch * 50))" \
    "--loop.average_images=$((batch * 100))"
kept "$out/runs/latents" generator.safetensors "$out/latents.safetensors"

run "${LPIPS_SECONDS:-150}" loop distill.py --config train/configs/nano_lpips.yaml "--run=$out/runs/lpips" \
    "--base=$out/base" "--generator.networks.start=$out/latents.safetensors" "--generator.networks.weights=lora" \
    "--generator.networks.rank=32" "--generator.losses.icm=0.3" \
    "--condition.kind=icm" "--condition.cells=2" "--condition.adapters=['$out/adapter']" \
    "--generator.perceptual.kind=lpips" "--generator.perceptual.weights=$lpips" "--loop.batch=$((batch / 2))" \
    "--loop.warmup_images=$((batch * 10))" "--loop.average_images=$((batch * 50))"
kept "$out/runs/lpips" generator.safetensors "$out/generator.safetensors"
ls -l "$out"
