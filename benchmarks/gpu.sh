#!/bin/bash
# What this machine's GPU makes of FFSSL, in one Markdown report: the training step and the speed-up in wall-clock of ResNet-50 and ResNet-18 with
# SimSiam and BYOL; then ResNet-18 trained on Imagenette at 128 px, by the standard recipe and by the efficient one.
#
#   benchmarks/gpu.sh OUTPUT                                       # the benchmarks
#   benchmarks/gpu.sh OUTPUT --imagenette FOLDER --minutes 10      # on FOLDER/train and FOLDER/val, or its tars *train*.tar and *val*.tar, and the
#                                             # training; minutes: of the standard recipe; the efficient one has 60 % of its epochs
#   benchmarks/gpu.sh OUTPUT ... --only 'Step: byol*'              # the sections with such titles, added to the report, on what is there already
#   benchmarks/gpu.sh OUTPUT ... --toy                             # everything, tiny: a smoke test that a CPU can run
#
# PYTHON names the interpreter (python). A benchmark that fails is noted in the report, and the others go on. Without --only it starts anew.
set -uo pipefail

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0"; }
fail() { echo "error: $1" >&2; exit 2; }

output='' imagenette='' minutes=10 only='*' toy='' ran=0
while (($#)); do
    case $1 in
        -h | --help) usage; exit ;;
        --imagenette) imagenette=${2:?} && shift ;;
        --minutes) minutes=${2:?} && shift ;;
        --only) only=${2:?} && shift ;;
        --toy) toy=1 ;;
        -*) fail "$1: unknown option; known are --imagenette FOLDER, --minutes M, --only PATTERN and --toy" ;;
        *) output=$1 ;;
    esac
    shift
done
[[ $output ]] || { usage; exit 2; }
for split in ${imagenette:+train val}; do
    [[ -d $imagenette/$split ]] || compgen -G "$imagenette/*$split*.tar" > /dev/null ||
        fail "--imagenette: neither a folder $split nor *$split*.tar in $imagenette"
done
if [[ $only == '*' && ! -f $output/report.md ]] && compgen -G "$output/*" > /dev/null; then
    fail "$output: holds other things than this script's; name a new folder"
fi
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
mkdir -p "$output" || exit
output=$(cd "$output" && pwd)
imagenette=${imagenette:+$(cd "$imagenette" && pwd)}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
cd "$root" || exit
report=$output/report.md
status=0

resnet50=() resnet18=(--model.backbone=resnet18) measured=() images_an_epoch=imagenet
train=(--model.backbone=resnet18 --resolution.max=128 --resolution.min=64 --hard_augment.resolution=48 --training.batch_size=256)
if [[ $toy ]]; then
    resnet50=(--model.backbone=resnet-small --training.batch_size=8 --resolution.max=64 --resolution.min=32 --hard_augment.resolution=32
        --method.hidden=32 --method.projection=16 --method.predictor=16 --training.epochs=4 --training.warmup_epochs=1)
    resnet18=("${resnet50[@]}") measured=(--rounds=1) images_an_epoch=64
    train=("${resnet50[@]}" --resolution.max=32 --resolution.min=16 --resolution.step=16 --hard_augment.resolution=16)
fi

# section TITLE COMMAND...: what the command prints goes into the report
section() {
    # shellcheck disable=SC2053  # a pattern
    [[ $1 == $only ]] || return 0
    ((++ran))
    echo "== $1" >&2
    local public="s#$output#OUTPUT#g; s#$root/##g; s#^    \$ $python#    \$ python#"
    { echo; echo "## $1"; echo; echo '    $' "${*:2}" | sed "$public"; echo; echo '```'; } >> "$report"
    # By lines: a time limit kills them all at once, and what is in a buffer then is lost.
    "${@:2}" 2> "$output/errors-$ran.txt" | stdbuf -oL tr '\r' '\n' | sed -u "$public" | tee -a "$report"
    local failed=${PIPESTATUS[0]}
    echo '```' >> "$report"
    if ((failed)); then
        status=1
        { echo; echo "**Failed with status $failed:**"; echo; tail -n 40 "$output/errors-$ran.txt" | sed 's/^/    /'; } | tee -a "$report"
    fi
}

if [[ $only == '*' ]]; then
    rm -rf "$output"/{images,train.beton,val.beton,speedup-imagenette,standard,efficient}
fi
if [[ $only == '*' || ! -f $report ]]; then
    {
        echo '# FFSSL on a GPU'
        echo
        date -u '+%Y-%m-%d %H:%M UTC'
        git -C "$root" rev-parse --short HEAD 2> /dev/null | sed 's/^/, revision /'
    } > "$report"
fi

if [[ $imagenette && ! (-f $output/train.beton && -f $output/val.beton) ]]; then
    declare -A found
    for split in train val; do
        if [[ -d $imagenette/$split ]]; then
            found[$split]=$imagenette/$split
            continue
        fi
        images=$output/images/$split
        rm -rf "$images" && mkdir -p "$images"
        for tar in "$imagenette"/*$split*.tar; do tar -xf "$tar" -C "$images" || fail "--imagenette: $tar can't be unpacked"; done
        mapfile -t folders < <(find "$images" -mindepth 1 -type d -name $split | sort)
        ((${#folders[@]} == 1)) ||
            fail "--imagenette: *$split*.tar must hold one folder called $split, not ${#folders[@]}${folders[*]:+: ${folders[*]#"$images/"}}"
        found[$split]=${folders[0]}
    done
    for split in train val; do
        rm -f "$output/$split.beton"  # of a call that was ended before it had both
        only='*' section "Conversion: $split" "$python" write_datasets.py folder --input "${found[$split]}" --output "$output/$split.beton"
        ((status == 0)) || exit $status
    done
    [[ $only == '*' ]] || ran=0  # they were not asked for
fi

for method in simsiam byol; do
    prefix=${method#simsiam} && prefix=${prefix:+${prefix}_}
    for network in resnet50 resnet18; do
        declare -n options=$network
        configs=(rn50_configs/${prefix}baseline.yaml rn50_configs/${prefix}efficient.yaml)
        for compile in off default reduce-overhead; do
            [[ $toy && $compile != off ]] && continue
            sides=()  # of the schedule's five, each of which takes minutes to compile
            [[ $compile != off ]] && sides=(--resolutions 96 224)
            section "Step: $method, $network, torch.compile $compile" "$python" -m ffssl.benchmark step --config "${configs[1]}" \
                "${options[@]}" "--training.compile=$compile" "${measured[@]}" "${sides[@]}" --json "$output/step-$method-$network-$compile.json"
        done
        section "Speed-up: $method, $network" "$python" -m ffssl.benchmark speedup --configs "${configs[@]}" "${options[@]}" "${measured[@]}" \
            ${toy:+--seconds=0.1} "--images=$images_an_epoch" ${imagenette:+"--data=$output/train.beton"} --output "$output/speedup-$method-$network"
    done
done

if [[ $imagenette ]]; then
    configs=(rn50_configs/imagenette_baseline.yaml rn50_configs/imagenette_efficient.yaml)
    section 'Speed-up: Imagenette, ResNet-18' "$python" -m ffssl.benchmark speedup --configs "${configs[@]}" "${train[@]}" "${measured[@]}" \
        ${toy:+--seconds=0.1} --data "$output/train.beton" --output "$output/speedup-imagenette"
    if [[ -f $output/speedup-imagenette/speedup.json ]]; then
        # The paper's proportions: 800 epochs become 480, with 80 of warm-up.
        epochs=$("$python" - "$output/speedup-imagenette/speedup.json" "$minutes" << 'PY'
import json, sys
standard = json.load(open(sys.argv[1]))["configs"][0]
print(max(round(60 * float(sys.argv[2]) / (standard["seconds"] / standard["epochs"])), 5))
PY
        ) || exit
        evaluate=("--data.train=$output/train.beton" "--data.validation=$output/val.beton" --evaluate.every=0 ${toy:+--evaluate.k=5})
        # The configs' learning rates are for batches of 128.
        section 'Imagenette, ResNet-18, standard' "$python" ffssl/train.py --config "${configs[0]}" "${train[@]}" "${evaluate[@]}" \
            "--training.epochs=$epochs" --training.warmup_epochs=0 --training.learning_rate=0.1 "--run.folder=$output/standard"
        section 'Imagenette, ResNet-18, efficient' "$python" ffssl/train.py --config "${configs[1]}" "${train[@]}" "${evaluate[@]}" \
            "--training.epochs=$((epochs * 3 / 5))" "--training.warmup_epochs=$((epochs / 10))" \
            --training.learning_rate=0.2 "--run.folder=$output/efficient"
        section 'Imagenette, ResNet-18, what they took' "$python" - "$output/standard" "$output/efficient" << 'PY'
import os, sys
from ffssl.run_folder.log import read_log
print(f"{'run':<12}{'epochs':>8}{'minutes':>10}{'PFLOP':>10}{'kWh':>8}{'kNN':>8}")
for folder in sys.argv[1:]:
    row = read_log(folder)[-1]
    kwh = f"{row['kwh']:.3f}" if "kwh" in row else "-"
    print(f"{os.path.basename(folder):<12}{row['epoch']:>8}{row['seconds'] / 60:>10.2f}{row['flops'] / 1e15:>10.4g}{kwh:>8}{row['knn']:>8.1%}")
PY
        section 'Report' "$python" -m ffssl.report "$output/standard" "$output/efficient" --output "$output/report.html"
    fi
fi
((ran)) || fail "--only: no section $only; those that train come after 'Speed-up: Imagenette, ResNet-18', with --imagenette"
echo "report: $report"
exit $status
