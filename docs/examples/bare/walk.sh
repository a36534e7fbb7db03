#!/bin/bash
# A random walk to a minimum: bash walk.sh STEP SEED EPOCHS FOLDER. It keeps its place in FOLDER/state.
step=$1 seed=$2 epochs=$3 folder=$4
x=1000 epoch=0
[ -f "$folder/state" ] && read -r epoch x < "$folder/state"
while [ "$epoch" -lt "$epochs" ]; do
    epoch=$((epoch + 1))
    RANDOM=$((seed * 1000 + epoch))
    for _ in 1 2 3 4; do
        next=$((x + RANDOM % (2 * step + 1) - step))
        [ "${next#-}" -lt "${x#-}" ] && x=$next
    done
    echo "epoch $epoch: distance ${x#-}"
    echo "$epoch $x" > "$folder/new" && mv "$folder/new" "$folder/state"
done
