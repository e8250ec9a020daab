#!/usr/bin/env bash
# Packs what a machine with a GPU but without Rust needs to run the tests and benches: their programs, stripped, the
# inspector, the example with AdamW, data, the peers, what was built from what (build.json), and run.sh.
#
#     tests/gpu/bundle.sh [FOLDER]
#
# FOLDER is made anew; `dist` if none is given. With nvcc (CUDA_HOME) the kernels are in the programs; without it they
# need NVRTC where they run. Left out are the tests of the inspector, the build script and the records, which look for
# this checkout, and of PTX, which need no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder=${1:-dist}
if [ -e "$folder" ] && [ ! -e "$folder/run.sh" ]; then
    echo "$folder is there and is no bundle" >&2
    exit 1
fi
rm -rf "$folder"
mkdir -p "$folder"/{tests,examples,benches,data}

# Copies the programs that a cargo command says it made, without symbols and without the hash in their names.
pack() {
    local to=$1 program name
    shift
    "$@" 2>&1 | tee >(cat >&2) | sed -n 's/^ *Executable .*(\(.*\))$/\1/p' | while read -r program; do
        name=$(basename "$program" | sed 's/-[0-9a-f]\{16\}$//')
        case $name in
        inspect | build_script | records | variants | ptx) ;;
        *) strip -o "$folder/$to/$name" "$program" ;;
        esac
    done
}

# The nvcc that build.rs takes, or none.
nvcc=null
for candidate in "${NVCC:-}" {"${CUDA_HOME:-}","${CUDA_PATH:-}"}/bin/nvcc nvcc /usr/local/cuda/bin/nvcc; do
    if version=$("$candidate" --version 2>/dev/null); then
        nvcc="\"$(grep release <<<"$version")\""
        break
    fi
done
dirty=false
[ -z "$(git status --porcelain)" ] || dirty=true
printf '{"commit": "%s", "dirty": %s, "kernels": "%s", "nvcc": %s}\n' \
    "$(git rev-parse HEAD)" "$dirty" "$(python3 benches/record.py hash)" "$nvcc" >"$folder/build.json"

pack tests cargo test -p gradprobe --no-run --features nccl
pack benches cargo bench -p gradprobe --no-run --bench gpu
cargo build -p gradprobe --release --example inspect --example adamw
strip -o "$folder/inspect" "${CARGO_TARGET_DIR:-target}/release/examples/inspect"
# Where its test looks for it.
strip -o "$folder/examples/adamw" "${CARGO_TARGET_DIR:-target}/release/examples/adamw"
[ "$nvcc" = null ] || python3 benches/gpu/variants.py build "$folder/variants"
cp tests/data/*.safetensors "$folder/data/"
cp benches/{peers,record}.py "$folder/benches/"
cp tests/gpu/run.sh "$folder/"
du -sh "$folder"
