#!/usr/bin/env bash
# The paper's ablations at small size: three seeds, procedural clips, the embedded base tiny/, existing commands only.
#
#     bash ablations.sh [FOLDER]          # default runs/ablations; a run that is finished is not made again
#     JOBS=2 SEEDS="0 1 2" DEVICE=cpu     # runs at a time (one thread each), seeds, where they compute
#
# Prints the tables that the README shows; there it says, too, how long it took and what it means.
set -euo pipefail
OUT=$(realpath -m "${1:-$(dirname "$0")/runs/ablations}")
cd "$(dirname "$0")"
export OUT OMP_NUM_THREADS=1 DEVICE=${DEVICE:-cpu}
SEEDS=${SEEDS:-0 1 2} JOBS=${JOBS:-2}
DATA=$OUT/data
LOOP="--muon --bf16 --warmup 50 --device $DEVICE --workers 1 --save-every 10000"
export VAE="train_vae.py $DATA $LOOP --perceptual 0 --rank 16 --lr 1e-3 --lora-plus 16 --size 64 --schedule 250:1:48:16,150:5:48:6"
export DIT="train_dit.py $DATA $LOOP --cache $OUT/cache --rank 24 --lr 2e-3 --lora-plus 4 --unweighted --steps 600 --batch 16"

run() {                     # NAME, the training's command, the evaluation's command
    [ ! -f "$OUT/$1/eval.json" ] || return 0
    rm -rf "$OUT/$1" && mkdir -p "$OUT/$1"
    { python $2 --out "$OUT/$1" && python $3 --out "$OUT/$1"; } > "$OUT/$1/log.txt" 2>&1 ||
        { echo "$1 failed, see $OUT/$1/log.txt" >&2; exit 255; }
}
vae() {                     # NAME, SEED, flags of both commands, flags of the training
    run "vae-$1/$2" "$VAE --seed $2 $3 $4" \
        "train_vae.py --eval --clips 24 $3 --device $DEVICE --vae-adapter $OUT/vae-$1/$2/Wan-Alpha-v2-VAE.safetensors"
}
dit() {                     # NAME, SEED, flags of both commands, flags of the training, flags of the evaluation
    run "dit-$1/$2" "$DIT --seed $2 $3 $4" \
        "train_dit.py --eval --brief --prompts 60 --device $DEVICE --dora $OUT/dit-$1/$2/t2v.safetensors $3 --eval-steps $5"
}
export -f run vae dit
parallel() { tr '\n' '\0' | xargs -0 -P "$JOBS" -I{} bash -c '{}'; }

[ -f "$DATA/metadata.jsonl" ] || python data.py "$DATA" --clips 1000
for s in $SEEDS; do cat <<RUNS
vae naive $s '--naive' '--tabd 0'
vae render $s '' '--tabd 0'
vae tabd $s '' '--tabd 0.1'
vae tabd-official $s '' '--tabd 0.1 --tabd-clamp 0 1'
RUNS
done | parallel
for s in $SEEDS; do cat <<RUNS
dit dora $s '' '' '1 2 8 20'
dit lora $s '' '--lora' ''
dit mean-0 $s '--mean 0' '' ''
dit mean-0.03 $s '--mean 0.03' '' ''
dit mean-0.1 $s '--mean 0.1' '' ''
dit latent-render $s '--vae-adapter $OUT/vae-render/$s/Wan-Alpha-v2-VAE.safetensors' '' ''
dit latent-tabd $s '--vae-adapter $OUT/vae-tabd/$s/Wan-Alpha-v2-VAE.safetensors' '' ''
RUNS
done | parallel
python - "$OUT" <<'TABLE'
import json, sys
from pathlib import Path
from statistics import mean, stdev

def runs(name):
    return [json.loads(file.read_text()) for file in sorted(Path(sys.argv[1]).glob(f"{name}/*/eval.json"))]

def held_out(name):
    files = sorted(Path(sys.argv[1]).glob(f"{name}/*/dit-rgba/summary.json"))
    return cell([json.loads(file.read_text())["held_out_mse"] for file in files], "{:.3f}")

def cell(values, form="{:.1f}"):
    values = [value for value in values if value is not None]
    spread = form.format(stdev(values)) if len(values) > 1 else "-"
    return f"{form.format(mean(values))} ± {spread}" if values else "-"

def shares(name, score, steps="4"):
    return cell([100 * run["scores"][steps][score] for run in runs(name) if run["scores"][steps][score] is not None])

print("| autoencoder | colour, palette: PSNR, SSIM | colour, alpha > 0 | alpha | base loss, opaque cells | transparent cells |")
print("|---|---|---|---|---|---|")
for name in ("naive", "render", "tabd", "tabd-official"):
    means = [run["unseen clips"]["mean"] for run in runs("vae-" + name)]
    scores = [", ".join(cell([m[score][kind] for m in means], form) for kind, form in (("psnr", "{:.2f}"), ("ssim", "{:.3f}")))
              for score in ("soft render", "colour, alpha > 0", "alpha")]
    cells = [cell([run["cells"][kind] for run in runs("vae-" + name)], "{:.2f}") for kind in ("opaque", "transparent")]
    print(f"| {name} |", " | ".join(scores + cells), "|")
names = ("corners", "no_holes", "color", "motion", "shape", "material")
print("\n| transformer | error on held-out clips |", " | ".join(names), "|\n|" + "---|" * 8)
for name in ("dora", "lora", "mean-0", "mean-0.03", "mean-0.1", "latent-render", "latent-tabd"):
    print(f"| {name} | {held_out('dit-' + name)} |", " | ".join(shares("dit-" + name, score) for score in names), "|")
for steps in ("1", "2", "8", "20"):
    print(f"| dora, {steps} steps | |", " | ".join(shares("dit-dora", score, steps) for score in names), "|")
TABLE
