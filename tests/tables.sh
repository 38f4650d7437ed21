#!/usr/bin/env bash
# The runs behind the tables of README and RESULTS, in runs/tables: a day or two on one core.
#
#     bash tests/tables.sh                  without the course's data
#     GLYPHS=path/GLYPHS bash tests/tables.sh
#
# Each run leaves log.csv, evaluate.csv, ood.csv and report.txt. What is finished is not made again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

train() {  # NAME FLAGS...: a new run, or the rest of an interrupted one
    local out=runs/tables/$1 old=()
    shift
    [ -f "$out/last.pt" ] && old=(--resume)
    python train.py --out "$out" "$@" "${old[@]}"
}

report() {  # NAME FLAGS...: ood.csv and what ood.py prints, such as the test accuracy
    local out=runs/tables/$1
    python ood.py --ckpt "$out/best.pt" --out "$out" "${@:2}" | tee "$out/report.part"
    mv "$out/report.part" "$out/report.txt"  # only a whole report counts as finished
}

classifier() {  # NAME DATA SEED EPOCHS WIDTH: cross-entropy alone
    [ -f "runs/tables/$1/report.txt" ] && return
    train "$1" --data "$2" --seed "$3" --epochs "$4" --px-weight 0 --width "$5"
    report "$1" --ood noise
}

run() {  # NAME DATA SEED JUDGE FLAGS...: train, judge the samples, score OOD sets
    local out=runs/tables/$1 data=$2 seed=$3 judge=runs/tables/$4 steps=()
    [ -f "$out/report.txt" ] && return
    [ "$data" = mnist ] && steps=(--steps 256)
    train "$1" --data "$data" --seed "$seed" "${@:5}"
    python generate.py --ckpt "$out/best.pt" --mode evaluate --judge "$judge/best.pt" \
        --out "$out" "${steps[@]}"
    report "$1" --trust 1
}

for seed in 0 1 2; do
    judge=judge-letterpress-$seed
    classifier $judge letterpress $seed 3 48
    classifier plain-letterpress-$seed letterpress $seed 3 32
    run letterpress-$seed letterpress $seed $judge --epochs 3
    run letterpress-two-$seed letterpress $seed $judge --epochs 3 --anneal-every 2
    run letterpress-stored-$seed letterpress $seed $judge --epochs 3 --anneal-every 0
    run letterpress-full-$seed letterpress $seed $judge --epochs 3 --chains-after 0 --anneal-every 0
    run letterpress-matching-$seed letterpress $seed $judge --epochs 3 --contrast 0
    run letterpress-time-$seed letterpress $seed $judge --epochs 6 --contrast 0
    run letterpress-chains-$seed letterpress $seed $judge --epochs 3 --matching 0
done
run letterpress-tutorial letterpress 1 judge-letterpress-1 --epochs 1 --matching 0 \
    --step-size 10 --noise .005 --data-noise .005 --grad-clip .03 --prior uniform \
    --no-conditional --no-guard --sgld-steps 60 --lr 1e-4 --pyx-weight 1 --reservoir 8192
for epochs in 10 30 60; do
    run letterpress-$epochs letterpress 0 judge-letterpress-0 --epochs $epochs \
        --chains-after 0 --anneal-every 0
done
for seed in 0 1; do
    run letterpress-late-60-$seed letterpress $seed judge-letterpress-$seed --epochs 60
done
for seed in 0 1 2; do
    judge=judge-digits-$seed
    classifier $judge digits $seed 60 48
    classifier plain-digits-$seed digits $seed 60 32
    run digits-$seed digits $seed $judge --epochs 60
    run digits-stored-$seed digits $seed $judge --epochs 60 --anneal-every 0
    run digits-full-$seed digits $seed $judge --epochs 60 --chains-after 0 --anneal-every 0
    run digits-start-$seed digits $seed $judge --epochs 20 --anneal-every 0
    run digits-matching-$seed digits $seed $judge --epochs 60 --contrast 0
    run digits-time-$seed digits $seed $judge --epochs 120 --contrast 0
    run digits-chains-$seed digits $seed $judge --epochs 60 --matching 0
done
for seed in 0 1 2; do
    classifier judge-mnist-$seed mnist $seed 2 48
    classifier plain-mnist-$seed mnist $seed 2 32
    run mnist-$seed mnist $seed judge-mnist-$seed --epochs 2
    run mnist-stored-$seed mnist $seed judge-mnist-$seed --epochs 2 --anneal-every 0
    run mnist-full-$seed mnist $seed judge-mnist-$seed --epochs 2 --chains-after 0 --anneal-every 0
done
for digit in 1 4 5 7 9; do
    data=runs/tables/data-without-$digit
    [ -d $data ] || python tests/leave_out.py --leave $digit --out $data
    for flags in '--anneal-every 0' '--contrast 0'; do
        name=without-$digit${flags// /}
        [ -f "runs/tables/$name/report.txt" ] && continue
        train $name --data $data --image-size 28 --epochs 2 $flags
        report $name --ood ood_left
    done
done
if [ -n "${GLYPHS:-}" ]; then
    for seed in 0 1 2; do
        judge=judge-glyphs-$seed
        classifier $judge "$GLYPHS" $seed 3 48
        classifier plain-glyphs-$seed "$GLYPHS" $seed 3 32
        run glyphs-$seed "$GLYPHS" $seed $judge --epochs 3
        run glyphs-stored-$seed "$GLYPHS" $seed $judge --epochs 3 --anneal-every 0
        run glyphs-full-$seed "$GLYPHS" $seed $judge --epochs 3 --chains-after 0 --anneal-every 0
        run glyphs-matching-$seed "$GLYPHS" $seed $judge --epochs 3 --contrast 0
        run glyphs-time-$seed "$GLYPHS" $seed $judge --epochs 6 --contrast 0
        run glyphs-chains-$seed "$GLYPHS" $seed $judge --epochs 3 --matching 0
    done
    run glyphs-late-10 "$GLYPHS" 0 judge-glyphs-0 --epochs 10
    run glyphs-late-60-0 "$GLYPHS" 0 judge-glyphs-0 --epochs 60
    run glyphs-late-60-1 "$GLYPHS" 1 judge-glyphs-1 --epochs 60
    for epochs in 10 30 60; do
        run glyphs-$epochs "$GLYPHS" 0 judge-glyphs-0 --epochs $epochs \
            --chains-after 0 --anneal-every 0
    done
fi
