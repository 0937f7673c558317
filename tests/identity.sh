#!/bin/sh
# One short generation, one SHA-256: in every build and at every number of threads that this machine can do.
#
#     tests/identity.sh RUYI      the hash of one program at 1, 2, 3 and 7 threads against tests/identity.sha256
#     tests/identity.sh           builds compilers x -O0 -O2 -O3 x native, AVX2, plain x with and without OpenMP, and
#                                 aarch64 and s390x where a cross compiler and qemu are installed
#
# The hash is of the clip and of every step's latents, so that a bit which truncation would hide counts, too.
root=$(cd "$(dirname "$0")/.." && pwd)
want=$(cut -d' ' -f1 "$root/tests/identity.sha256")
tmp=$(mktemp -d) || exit 3
trap 'rm -rf "$tmp"' EXIT
passed=0
failed=0
skipped=0

sha() { { sha256sum 2>/dev/null || shasum -a 256; } | cut -d' ' -f1; }

# hash COMMAND...: the program, possibly behind an emulator.
hash() {
    rm -rf "$tmp/dump"
    "$@" -q -m "$root/weights/ruyi-tiny" -i "$root/weights/start/village.ppm" -e "$root/weights/start/winter.ppm" --size 16x16 \
        --frames 16 --steps 2 --dump "$tmp/dump" --dump-filter '*latents' -o "$tmp/clip.y4m" || return 1
    cat "$tmp/clip.y4m" "$tmp"/dump/*.safetensors | sha
}

# check NAME COMMAND...: one build, at four numbers of threads; at one where the name says that it has no threads.
check() {
    name=$1
    shift
    counts="1 2 3 7"
    case $name in *"no threads"*) counts=1 ;; esac
    for threads in $counts; do
        got=$(OMP_NUM_THREADS=$threads hash "$@")
        if [ "$got" = "$want" ]; then
            passed=$((passed + 1))
        else
            failed=$((failed + 1))
            echo "FAILED $name, $threads threads: got $got, expected $want"
        fi
    done
}

skip() {
    skipped=$((skipped + 1))
    echo "skipped $1: $2"
}

# build NAME FLAGS...: compiles the program, or says why not.
build() {
    name=$1
    shift
    if "$@" -std=c11 -ffp-contract=off "$root"/ruyi.c "$root"/vae.c "$root"/dit.c "$root"/tensor.c "$root"/io.c -lm -o "$tmp/ruyi" 2>"$tmp/errors"; then
        check "$name" "$tmp/ruyi"
    else
        skip "$name" "$(grep -m 1 -i error "$tmp/errors")"
    fi
}

foreign() {     # foreign MACHINE: cross compiler and emulator
    if command -v "$1-linux-gnu-gcc" >/dev/null && command -v "qemu-$1" >/dev/null; then
        "$1-linux-gnu-gcc" -O2 -std=c11 -ffp-contract=off -fexcess-precision=fast "$root"/ruyi.c "$root"/vae.c "$root"/dit.c "$root"/tensor.c "$root"/io.c \
            -static -lm -o "$tmp/ruyi" && check "$1, no threads" "qemu-$1" "$tmp/ruyi"
    else
        skip "$1" "no cross compiler or no qemu-$1"
    fi
}

if [ $# -gt 0 ]; then
    check "$1" "$1"
else
    for compiler in gcc clang; do
        command -v $compiler >/dev/null || { skip $compiler "not installed"; continue; }
        for level in -O0 -O2 -O3; do
            for machine in -march=native "-mavx2 -mfma" ""; do
                for threads in -fopenmp ""; do
                    build "$compiler $level ${machine:-plain} ${threads:-no threads}" $compiler $level $machine $threads
                done
            done
        done
    done
    foreign aarch64
    foreign s390x               # big-endian
fi
[ "$failed" -eq 0 ] && echo "$want"
echo "$passed passed, $failed failed$([ "$skipped" -gt 0 ] && echo ", $skipped skipped")"
[ "$failed" -eq 0 ]
