#!/usr/bin/env bash
# Runs a bundle (bundle.sh) on a machine with a GPU:
#
#     ./run.sh [PART...]        tests, inspector, sanitizer, benches; all of them if none is named
#
# Output goes to GRADPROBE_LOGS, or `logs` beside this file, one file for each run. The exit status is 0 if all passed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1

logs=${GRADPROBE_LOGS:-logs}
mkdir -p "$logs"
failed=()

# Runs a command with its output in a file of that name, and shows how it ended.
run() {
    local name=$1 start=$SECONDS
    shift
    printf '==== %s\n' "$name"
    if "$@" >"$logs/$name.log" 2>&1; then
        tail -n 2 "$logs/$name.log"
    else
        failed+=("$name")
        tail -n 40 "$logs/$name.log"
    fi
    printf -- '---- %s, %d s\n' "$name" "$((SECONDS - start))"
}

# The tests that need a GPU, one at a time.
gpu_tests() {
    GRADPROBE_REQUIRE_GPU=1 "$@" ./tests/cuda --test-threads=1
}

tests() {
    run tests gpu_tests env
    run nvrtc ./tests/no_gpu
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

inspector() {
    run inspector same_inspection
}

# The GPU tests in short form, under each tool of compute-sanitizer.
sanitizer() {
    local tool
    if ! command -v compute-sanitizer >/dev/null; then
        echo '==== compute-sanitizer is not on PATH: left out'
        return
    fi
    for tool in memcheck racecheck initcheck synccheck; do
        run "$tool" gpu_tests env GRADPROBE_SHORT=1 compute-sanitizer --tool "$tool" --error-exitcode 9
    done
}

benches() {
    local bench
    for bench in benches/*; do
        run "bench-$(basename "$bench")" env CRITERION_HOME="$logs/criterion" "$bench" --bench
    done
}

nvidia-smi 2>/dev/null | tee "$logs/nvidia-smi.log"
[ $# -gt 0 ] || set -- tests inspector sanitizer benches
for part in "$@"; do
    case $part in
    tests | inspector | sanitizer | benches) "$part" ;;
    *)
        echo "no such part: $part" >&2
        exit 2
        ;;
    esac
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo 'all passed'
