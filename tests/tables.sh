#!/usr/bin/env bash
# The runs behind the tables of README, in runs/tables: some hours on one core.
#
#     bash tests/tables.sh                  without the course's data
#     GLYPHS=path/GLYPHS bash tests/tables.sh
#
# Each run leaves log.csv, evaluate.csv and ood.csv. What is finished is not made again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

train() {  # NAME FLAGS...: a new run, or the rest of an interrupted one
    local out=runs/tables/$1 old=()
    shift
    [ -f "$out/last.pt" ] && old=(--resume)
    python train.py --out "$out" "$@" "${old[@]}"
}

classifier() {  # NAME DATA SEED EPOCHS WIDTH: cross-entropy alone
    train "$1" --data "$2" --seed "$3" --epochs "$4" --px-weight 0 --width "$5"
}

run() {  # NAME DATA SEED JUDGE STEPS FLAGS...: train, judge the samples, score OOD sets
    local out=runs/tables/$1 data=$2 seed=$3 judge=runs/tables/$4 steps=$5
    [ -f "$out/ood.csv" ] && return
    train "$1" --data "$data" --seed "$seed" "${@:6}"
    python generate.py --ckpt "$out/best.pt" --mode evaluate --judge "$judge/best.pt" \
        --steps "$steps" --out "$out"
    python ood.py --ckpt "$out/best.pt" --out "$out"
}

for seed in 0 1 2; do
    classifier judge-letterpress-$seed letterpress $seed 3 48
    classifier plain-letterpress-$seed letterpress $seed 3 32
    run letterpress-$seed letterpress $seed judge-letterpress-$seed 128 --epochs 3 --chains-after 2
done
run letterpress-full letterpress 1 judge-letterpress-1 128 --epochs 3
run letterpress-matching letterpress 1 judge-letterpress-1 128 --epochs 3 --contrast 0
run letterpress-chains letterpress 1 judge-letterpress-1 128 --epochs 3 --matching 0
run letterpress-long letterpress 0 judge-letterpress-0 128 --epochs 10
for seed in 0 1 2; do
    classifier judge-digits-$seed digits $seed 60 48
    run digits-$seed digits $seed judge-digits-$seed 128 --epochs 60
    run digits-matching-$seed digits $seed judge-digits-$seed 128 --epochs 60 --contrast 0
    run digits-chains-$seed digits $seed judge-digits-$seed 128 --epochs 60 --matching 0
done
classifier judge-mnist mnist 0 2 48
run mnist mnist 0 judge-mnist 256 --epochs 2
if [ -n "${GLYPHS:-}" ]; then
    classifier judge-glyphs "$GLYPHS" 0 3 48
    run glyphs "$GLYPHS" 0 judge-glyphs 128 --epochs 3
    run glyphs-matching "$GLYPHS" 0 judge-glyphs 128 --epochs 3 --contrast 0
    run glyphs-chains "$GLYPHS" 0 judge-glyphs 128 --epochs 3 --matching 0
    run glyphs-time "$GLYPHS" 0 judge-glyphs 128 --epochs 8 --contrast 0
    run glyphs-late "$GLYPHS" 0 judge-glyphs 128 --epochs 7 --chains-after 6
    for epochs in 10 30 60; do
        run glyphs-$epochs "$GLYPHS" 0 judge-glyphs 128 --epochs $epochs
    done
fi
