#!/bin/bash
# What this machine's GPU makes of FFSSL, in ten minutes and one Markdown report, the most telling first: whether it computes what the CPU does,
# how much faster the efficient recipe is in wall-clock, and in joules, and which mode of torch.compile pays. It needs no network.
#
#   benchmarks/gpu.sh OUTPUT                            # leaves OUTPUT/report.md, and all results so far in OUTPUT/results.tgz
#   benchmarks/gpu.sh OUTPUT --minutes 30               # what has not begun by then is left out, what runs is cut; the report says so
#   benchmarks/gpu.sh OUTPUT --imagenette FOLDER        # and trains ResNet-18 on FOLDER/train.beton, SimSiam and SimCLR, while time is left
#   benchmarks/gpu.sh OUTPUT --wheels wheelhouse        # on a machine that has torch alone, see `make wheelhouse`
#   benchmarks/gpu.sh OUTPUT --only 'Step: *'           # the sections with such titles, added to the report
#   benchmarks/gpu.sh OUTPUT --toy                      # everything, tiny: a smoke test that a CPU can run
#   benchmarks/gpu.sh --prepare IMAGENETTE FOLDER       # makes FOLDER/train.beton and val.beton, of 5000 and 1500 images at 128 px (44 MB), from
#                                                       # IMAGENETTE/train and /val, or its tars *train*.tar and *val*.tar
#
# PYTHON names the interpreter (python). A section that fails is noted in the report, and the others go on. Without --only it starts anew.
set -uo pipefail

began=$SECONDS
usage() { sed -n '2,17s/^# \{0,1\}//p' "$0"; }
fail() { echo "error: $1" >&2; exit 2; }

output='' imagenette='' wheels='' source='' minutes=10 only='*' toy='' ran=0
while (($#)); do
    case $1 in
        -h | --help) usage; exit ;;
        --imagenette) imagenette=${2:?} && shift ;;
        --wheels) wheels=${2:?} && shift ;;
        --prepare) source=${2:?} && shift ;;
        --minutes) minutes=${2:?} && shift ;;
        --only) only=${2:?} && shift ;;
        --toy) toy=1 ;;
        -*) fail "$1: unknown option; known are --minutes M, --imagenette FOLDER, --wheels FOLDER, --only PATTERN, --toy and --prepare FOLDER" ;;
        *) output=$1 ;;
    esac
    shift
done
[[ $output ]] || { usage; exit 2; }
[[ $minutes =~ ^[0-9]+$ ]] || fail "--minutes: $minutes is not a whole number"
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}

prepare() {  # SOURCE FOLDER
    local split found images size
    for split in train val; do
        [[ -d $1/$split ]] || compgen -G "$1/*$split*.tar" > /dev/null || fail "--prepare: neither a folder $split nor *$split*.tar in $1"
    done
    mkdir -p "$2" || exit
    for split in train val; do
        found=$1/$split size=5000
        [[ $split == val ]] && size=1500
        [[ $toy ]] && size=$((size / 100))
        if [[ ! -d $found ]]; then
            images=$2/images/$split
            rm -rf "$images" && mkdir -p "$images"
            for tar in "$1"/*$split*.tar; do tar -xf "$tar" -C "$images" || fail "--prepare: $tar can't be unpacked"; done
            mapfile -t folders < <(find "$images" -mindepth 1 -type d -name $split | sort)
            ((${#folders[@]} == 1)) ||
                fail "--prepare: *$split*.tar must hold one folder called $split, not ${#folders[@]}${folders[*]:+: ${folders[*]#"$images/"}}"
            found=${folders[0]}
        fi
        "$python" "$root/write_datasets.py" folder --input "$found" --output "$2/$split.beton" --overwrite --subset $size --max-side 128 || exit
    done
    rm -rf "$2/images"
    du -ch "$2"/*.beton | tail -n 1
}
if [[ $source ]]; then
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    prepare "$source" "$output"
    exit
fi

for split in ${imagenette:+train val}; do
    [[ -f $imagenette/$split.beton ]] || fail "--imagenette: no $split.beton in $imagenette; make it with $0 --prepare IMAGENETTE $imagenette"
done
if [[ $wheels ]]; then
    compgen -G "$wheels/*.whl" > /dev/null || fail "--wheels: no wheels in $wheels; make them with make wheelhouse"
    wheels=$(cd "$wheels" && pwd)
fi
if [[ $only == '*' && ! -f $output/report.md ]] && compgen -G "$output/*" > /dev/null; then
    fail "$output: holds other things than this script's; name a new folder"
fi
mkdir -p "$output" || exit
output=$(cd "$output" && pwd)
imagenette=${imagenette:+$(cd "$imagenette" && pwd)}
export PYTHONPATH=$root:$output/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
cd "$root" || exit
report=$output/report.md status=0 cut=()

# section SECONDS TITLE COMMAND...: what the command prints goes into the report, and what it leaves into the archive
section() {
    # shellcheck disable=SC2053  # a pattern
    [[ $2 == $only ]] || return 0
    local limit=$1 title=$2 left=$((60 * minutes - SECONDS + began)) started=$SECONDS
    shift 2
    ((++ran))
    if ((left < 5)); then
        cut+=("$title: not begun")
        return 0
    fi
    # Of a toy only the whole is limited: other work may slow a CPU down.
    if [[ $toy ]] || ((limit > left)); then limit=$left; fi
    echo "== $title, at most $limit s" >&2
    local public="s#$output#OUTPUT#g${imagenette:+; s#$imagenette#IMAGENETTE#g}; s#$root/##g; s#^    \$ $python#    \$ python#"
    { echo; echo "## $title"; echo; echo '    $' "$*" | sed "$public"; echo; echo '```'; } >> "$report"
    # By lines: a time limit kills them all at once, and what is in a buffer then is lost.
    timeout -k 5 "$limit" "$@" 2> "$output/errors-$ran.txt" | stdbuf -oL tr '\r' '\n' | sed -u "$public" | tee -a "$report"
    local failed=${PIPESTATUS[0]}
    echo '```' >> "$report"
    if ((failed == 124 || failed == 137)); then
        cut+=("$title: cut after $((SECONDS - started)) s")
    elif ((failed)); then
        status=1
        { echo; echo "**Failed with status $failed:**"; echo; tail -n 40 "$output/errors-$ran.txt" | sed 's/^/    /'; } | tee -a "$report"
    fi
    { echo; echo "($((SECONDS - started)) s)"; } >> "$report"
    save
}
save() { tar -C "$output" --exclude=site --exclude='*.beton' --exclude='checkpoint*.pt' --exclude=results.tgz -czf "$output/.results" . && mv "$output/.results" "$output/results.tgz"; }

if [[ $only == '*' ]]; then
    rm -rf "$output"/*
fi
if [[ ! -f $report ]]; then
    {
        echo '# FFSSL on a GPU'
        echo
        date -u '+%Y-%m-%d %H:%M UTC'
        git -C "$root" rev-parse --short HEAD 2> /dev/null | sed 's/^/, revision /'
    } > "$report"
fi

resnet50=() resnet18=(--model.backbone=resnet18) measured=() steps=(--steps 3 --rounds 3) images=(--images=imagenet) epochs=60
efficient=rn50_configs/efficient.yaml small=rn50_configs/imagenette_efficient.yaml
train=(--resolution.max=128 --resolution.min=64 --hard_augment.resolution=48)
if [[ $toy ]]; then
    resnet50=(--model.backbone=resnet-small --training.batch_size=8 --resolution.max=64 --resolution.min=32 --hard_augment.resolution=32
        --method.hidden=32 --method.projection=16 --training.epochs=4 --training.warmup_epochs=1)
    resnet18=("${resnet50[@]}") measured=(--seconds=0.1 --rounds=1) steps=(--steps 1 --rounds 1) images=(--images=64) epochs=5
    train=(--resolution.max=32 --resolution.min=16 --resolution.step=16 --hard_augment.resolution=16)
fi
side() { if [[ $toy ]]; then echo 32; else echo "$1"; fi; }

if [[ $wheels ]]; then
    section 60 Wheels "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$output/site" "$wheels"/*.whl
fi
section 45 Machine "$python" -m ffssl.benchmark agreement --describe
section 100 'Tests' "$python" -m pytest -p no:cacheprovider -m gpu --durations=3 tests/gpu tests/test_step.py tests/run_folder/test_background_writer.py tests/test_distributed.py
section 75 'GPU against CPU' "$python" -m ffssl.benchmark agreement ${toy:+--methods simsiam simclr}
section 140 'Speed-up: ResNet-50' "$python" -m ffssl.benchmark speedup --configs rn50_configs/baseline.yaml $efficient "${resnet50[@]}" \
    --training.compile=off --seconds=1 --rounds=2 "${measured[@]}" "${images[@]}" --output "$output/speedup-resnet50"
# The schedule's other resolutions take a minute to compile, each.
modes=(off) && [[ $toy ]] || modes=(off default reduce-overhead)
for mode in "${modes[@]}"; do
    section 100 "Step: ResNet-50, torch.compile $mode" "$python" -m ffssl.benchmark step --config $efficient "${resnet50[@]}" \
        "--training.compile=$mode" --resolutions "$(side 96)" "${steps[@]}" --json "$output/step-resnet50-$mode.json"
    section 70 "Step: ResNet-18, torch.compile $mode" "$python" -m ffssl.benchmark step --config $small "${resnet18[@]}" \
        "--training.compile=$mode" --resolutions "$(side 96)" "${steps[@]}" --json "$output/step-resnet18-$mode.json"
done
section 40 'Step: ResNet-50 at full resolution' "$python" -m ffssl.benchmark step --config $efficient "${resnet50[@]}" \
    --training.compile=off --resolutions "$(side 224)" "${steps[@]}" --json "$output/step-resnet50-full.json"
for method in ${imagenette:+simsiam simclr}; do
    prefix=imagenette_${method#simsiam}
    for recipe in efficient baseline; do
        number=$epochs warmup=0  # the paper's proportions: 800 epochs become 480, with 80 of warm-up
        [[ $recipe == efficient ]] && number=$((epochs * 3 / 5)) warmup=$((epochs / 10))
        config=rn50_configs/${prefix%_}_$recipe.yaml
        section 900 "Imagenette: $method, $recipe" "$python" ffssl/train.py --config "$config" "${resnet18[@]}" "${train[@]}" \
            "--data.train=$imagenette/train.beton" "--data.validation=$imagenette/val.beton" --evaluate.every=0 ${toy:+--evaluate.k=5} \
            "--training.epochs=$number" "--training.warmup_epochs=$warmup" "--run.folder=$output/$method-$recipe"
    done
done
((ran)) || fail "--only: no section $only"
if ((${#cut[@]})); then
    { echo; echo "## What was cut"; echo; echo "After $minutes minutes:"; echo; printf -- '- %s\n' "${cut[@]}"; } | tee -a "$report"
fi
save
echo "report: $report; all results: $output/results.tgz"
exit $status
