#!/usr/bin/env bash
# Runs a bundle (bundle.sh) on a machine with a GPU, and ends with the table of what it measured:
#
#     ./run.sh [PART...]        tests, benches, peers, counters, inspector, sanitizer, record; all if none is named
#     ./run.sh variants         times variants of the kernels, for whoever tunes them
#
# Output goes to GRADPROBE_LOGS, or `logs` beside this file: a file for each run, and records/<gpu>/<date>.json, to be
# copied to benches/records/. Parts can be named in several calls; `record` uses what the logs then hold, and needs no
# GPU. No setting of the GPU is changed. Needs Python. The exit status is 0 if nothing failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1

# The seconds each part may take: less than 600 in all, and the most valuable first.
parts=(tests benches peers counters inspector sanitizer record)
declare -A limits=([tests]=120 [benches]=150 [peers]=145 [counters]=30 [inspector]=20 [sanitizer]=110 [record]=10)
limits[variants]=200

logs=${GRADPROBE_LOGS:-logs}
mkdir -p "$logs"
failed=() unmeasured=()

# Where NVRTC is: in the toolkit, or beside the PyTorch that Python has. For our programs only, since what else lies
# there would take the place of PyTorch's own libraries.
libraries() {
    local packages folder found=${LD_LIBRARY_PATH:-}
    packages=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))' 2>/dev/null)
    for folder in "${CUDA_HOME:-/usr/local/cuda}/lib64" "$packages"/nvidia/*/lib; do
        if compgen -G "$folder/libnvrtc.so*" >/dev/null; then
            found+=${found:+:}$folder
        fi
    done
    echo "$found"
}
with_nvrtc=(env "LD_LIBRARY_PATH=$(libraries)")

# NCCL under the name that cudarc looks for, in a folder of its own; PyTorch's packages have it under another.
nccl() {
    local packages library
    packages=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))' 2>/dev/null)
    for library in /usr/lib/*/libnccl.so.2 "$packages"/nvidia/nccl/lib/libnccl.so.2; do
        if [ -e "$library" ]; then
            mkdir -p "$logs/nccl"
            ln -sf "$(realpath "$library")" "$logs/nccl/libnccl.so"
        fi
    done
    realpath "$logs/nccl" 2>/dev/null
}

# Writes down how a run ended, for the record.
note() {
    local name=$1 result=$2 seconds=$3 why=${4:-}
    case $result in
    failed) failed+=("$name") ;;
    'not measured') unmeasured+=("$name") ;;
    esac
    printf -- '---- %s: %s, %d s%s\n' "$name" "$result" "$seconds" "${why:+: $why}"
    [ "$name" = record ] ||
        python3 benches/record.py part "$logs/parts.json" "$name" "$result" "$seconds" ${why:+"$why"}
}

# Runs a command with its output in a file of that name, in the time that is left to the part, and shows how it ended.
# One that fails counts as `otherwise`; one that runs out of time has failed. Of one that passes the last lines are
# shown.
otherwise=failed lines=2
run() {
    local name=$1 start=$SECONDS left=$((deadline - SECONDS))
    shift
    printf '==== %s\n' "$name"
    if [ "$left" -le 0 ]; then
        note "$name" failed 0 "no time left of ${limits[$part]} s"
    elif timeout --kill-after=2 "$left" "$@" >"$logs/$name.log" 2>&1; then
        tail -n "$lines" "$logs/$name.log"
        note "$name" passed $((SECONDS - start))
        return
    elif tail -n 40 "$logs/$name.log" && [ "$SECONDS" -ge "$deadline" ]; then
        note "$name" failed $((SECONDS - start)) "out of time, ${limits[$part]} s"
    else
        note "$name" "$otherwise" $((SECONDS - start)) "$(grep . "$logs/$name.log" | tail -n 1)"
    fi
    return 1
}

# The tests that need a GPU, one at a time; a command before them runs them.
gpu_tests=(./tests/cuda --test-threads=1)

tests() {
    run tests "${with_nvrtc[@]}" GRADPROBE_REQUIRE_GPU=1 "${gpu_tests[@]}"
    run nvrtc "${with_nvrtc[@]}" ./tests/no_gpu
    run nccl env "LD_LIBRARY_PATH=$(nccl):$(libraries)" GRADPROBE_REQUIRE_GPU=1 ./tests/nccl --test-threads=1
    run adamw "${with_nvrtc[@]}" GRADPROBE_REQUIRE_GPU=1 GRADPROBE_REQUIRE_NVCC=1 ./tests/adamw_run --test-threads=1
}

benches() {
    rm -rf "$logs/criterion"
    run benches "${with_nvrtc[@]}" GRADPROBE_REQUIRE_GPU=1 CRITERION_HOME="$logs/criterion" ./benches/gpu --bench
}

# They end by themselves before their time, so that what they have is written down.
peers() {
    rm -f "$logs/peers.json"
    run peers python3 benches/peers.py "$logs/peers.json" --limit $((limits[peers] - 20))
}

# Bytes read and written by the kernels of one step, whose gradients fit in the cache. The program is started anew for
# each group of counters: a kernel run again would need its data restored, which goes through the cache.
counted() {
    ncu --clock-control none --cache-control none --replay-mode application --print-units base --csv \
        --metrics dram__bytes_read.sum,dram__bytes_write.sum,lts__t_sectors_op_read.sum \
        --kernel-name 'regex:^gradprobe_' ./benches/gpu --counters >"$1/ncu.csv" || {
        grep -h '==ERROR==' "$1/ncu.csv"
        return 1
    }
    python3 benches/record.py counters "$1/ncu.csv" "$1/counters.json"
}
export -f counted

counters() {
    local otherwise='not measured'
    rm -f "$logs/counters.json"
    if command -v ncu >/dev/null; then
        # shellcheck disable=SC2016 # The shell that is started replaces it.
        run counters "${with_nvrtc[@]}" bash -c 'counted "$1"' - "$logs"
    else
        note counters "$otherwise" 0 'ncu is not on PATH'
    fi
}

# The inspector's reports and clipped copies from the GPU: the same bytes as from the CPU, but for the device's name.
same_inspection() {
    local file name device out
    out=$(mktemp -d) || return 1
    for file in data/*.safetensors; do
        name=$(basename "$file" .safetensors)
        for device in cpu cuda; do
            mkdir -p "$out/$device" || return 1
            ./inspect --device "$device" --json --clip-norm 0.5 --out "$out/$device" "$file" >"$out/$device/$name.json" ||
                return 1
            sed -i "s/\"device\": *\"$device\"/\"device\": \"\"/" "$out/$device/$name.json"
        done
    done
    grep -c '"l2_norm"' "$out"/cpu/*.json || return 1
    diff -r "$out/cpu" "$out/cuda" && echo 'cpu and cuda agree' && rm -r "$out"
}
export -f same_inspection

inspector() {
    run inspector "${with_nvrtc[@]}" bash -c same_inspection
}

# The GPU tests in short form, under each tool of compute-sanitizer.
sanitizer() {
    local tool
    for tool in memcheck racecheck initcheck synccheck; do
        if command -v compute-sanitizer >/dev/null; then
            run "$tool" "${with_nvrtc[@]}" GRADPROBE_REQUIRE_GPU=1 GRADPROBE_SHORT=1 \
                compute-sanitizer --tool "$tool" --error-exitcode 9 "${gpu_tests[@]}"
        else
            note "$tool" 'not measured' 0 'compute-sanitizer is not on PATH'
        fi
    done
}

variants() {
    local lines=+1
    run variants "${with_nvrtc[@]}" GRADPROBE_REQUIRE_GPU=1 ./benches/gpu --variants variants
}

record() {
    local lines=+1
    run record python3 benches/record.py make "$logs/gpu.json" "$logs/criterion" "$logs/peers.json" build.json \
        "$logs/parts.json" "$logs/counters.json" "$logs/records"
}

[ $# -gt 0 ] || set -- "${parts[@]}"
for part in "$@"; do
    if [ -z "${limits[$part]:-}" ]; then
        echo "no such part: $part" >&2
        exit 2
    fi
done
# One record is of one build on one GPU.
[ -e "$logs/build.json" ] || cp build.json "$logs/"
if ! cmp build.json "$logs/build.json"; then
    echo "$logs is of another build" >&2
    exit 2
fi
if command -v nvidia-smi >/dev/null; then
    nvidia-smi | tee "$logs/nvidia-smi.log"
    python3 benches/record.py gpu "$logs/gpu.json" || exit 2
fi
for part in "$@"; do
    deadline=$((SECONDS + limits[$part]))
    "$part"
done
[ ${#unmeasured[@]} -eq 0 ] || echo "not measured: ${unmeasured[*]}"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo 'none failed'
