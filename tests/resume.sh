#!/bin/sh
# Runs that are killed, stopped, refused and continued: --checkpoint, signals, --dry-run, --progress.
#
#     tests/resume.sh RUYI                killed after every step and slice, for each scheduler and plug-in; seconds
#     tests/resume.sh RUYI --kills N      kill -9 at N random moments of a 12-step run as well; minutes
#
# A run is watched through its --progress, a named pipe here: what a line tells is saved already, so that killing at the
# first new line leaves every state that a run can leave. Continued runs must give the bytes of an unbroken one.
[ $# -ge 1 ] && [ -x "$1" ] || { echo "usage: tests/resume.sh PATH_TO_RUYI [--kills N]" >&2; exit 2; }
LC_ALL=C OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
export LC_ALL OMP_NUM_THREADS OMP_WAIT_POLICY
ruyi=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
models=$root/tests/golden/models
start=$root/weights/start/meadow.ppm
tmp=$(mktemp -d) || exit 3
trap 'rm -rf "$tmp"' EXIT
trap 'exit 3' HUP INT TERM
cd "$tmp" && mkfifo pipe || exit 3
passed=0
failed=0

check() {               # NAME COMMAND...: passes where the command succeeds
    what=$1
    shift
    if "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED $what: $*"; fi
}
equal() { check "$1" [ "$2" = "$3" ]; }

# until_line SIGNAL STAGE ARGUMENT...: runs until the first progress line of the stage (a pattern), then sends the signal.
# Sets status; 0: the run was over before.
until_line() {
    signal=$1 wanted=$2
    shift 2
    "$ruyi" "$@" -q --progress /dev/fd/3 2>errors 3>pipe &
    pid=$!
    while read -r line; do
        case $line in
            '{"stage":"plan"'*|'{"stage":"clip"'*|'{"stage":"done"'*) ;;
            '{"stage":"'$wanted'"'*) kill -"$signal" "$pid" 2>/dev/null; break ;;
        esac
    done <pipe
    wait "$pid" 2>/dev/null
    status=$?
}

# killed NAME ARGUMENT...: killed at every piece of work until it is done, against the same run unbroken. A decoder with a
# cache has no pieces: it begins anew, and is killed three times.
killed() {
    name=$1 times=0 status=1 pieces='*'
    shift
    "$ruyi" "$@" -q -o whole.y4m
    while { [ "$status" -ne 0 ] || [ "$times" -eq 1 ]; } && [ "$times" -lt 100 ]; do   # at least one kill in time
        case $name,$times in *cache,[0-4]) pieces=denoise ;; *cache,[5-7]) pieces=decode ;; *cache,*) pieces=none ;; esac
        until_line KILL "$pieces" "$@" --checkpoint ck -o part.y4m
        times=$((times + 1))
    done
    check "$name: same bytes after $times runs" cmp -s whole.y4m part.y4m
    check "$name: no checkpoint is left" [ ! -e ck ]
    rm -f ck ./*.tmp.* ./*.y4m      # SIGKILL leaves temporary names
}

a="-m $models/tiny-a -i $start --size 16x16 --frames 16"
for scheduler in ddim euler euler_a dpm++; do
    killed "$scheduler" $a --scheduler $scheduler --steps 5
done
killed pndm $a --scheduler pndm --steps 5                       # 14 calls
killed "a GPU's noise" $a --scheduler euler_a --steps 4 --rng cuda:108x2048
killed "TeaCache and Enhance-A-Video" $a --steps 8 --teacache 0.3,2,1 --enhance-a-video 1,1,1
killed "TeaCache over PNDM" $a --steps 6 --scheduler pndm --teacache 0.3
killed "a VAE with a cache" -m "$models/tiny-b" -i "$start" --size 16x16 --frames 16 --steps 3
killed "no picture, no guidance" -m "$models/tiny-a" --size 16x16 --frames 16 --steps 3 --cfg 1 --scheduler euler_a
cp -R "$root/weights/ruyi-tiny" tiles
sed 's/"use_tiling": false/"use_tiling": true/; s/"tile_sample_min_size": [0-9]*/"tile_sample_min_size": 32/' \
    "$root/weights/ruyi-tiny/vae/config.json" >tiles/vae/config.json
killed tiles -m tiles -i "$start" --size 48x48 --frames 8 --steps 2

# ---------------------------------------------------------------- signals
"$ruyi" $a --steps 6 -q -o whole.y4m
for stage in encode denoise decode; do
    until_line TERM $stage $a --steps 6 --checkpoint ck -o part.y4m
    equal "stopped in $stage: exit code" 3 "$status"
    equal "stopped in $stage: one line" 1 "$(grep -c '^ruyi: stopped by signal 15: ck; the same command goes on' errors)"
    equal "stopped in $stage: nothing else is left" ck "$(ls | grep -v -e whole -e errors -e pipe -e tiles)"
    "$ruyi" $a --steps 6 -q --checkpoint ck -o part.y4m
    check "stopped in $stage: same bytes" cmp -s whole.y4m part.y4m
    rm -f part.y4m
done
until_line TERM denoise $a --steps 6 -o part.y4m
equal "without a checkpoint: exit code" 3 "$status"
equal "without a checkpoint nothing is left" "" "$(ls | grep -v -e whole -e errors -e pipe -e tiles)"

# ---------------------------------------------------------------- refused
until_line TERM denoise $a --steps 6 --checkpoint ck -o part.y4m
cp ck kept
refused() {             # NAME PATTERN ARGUMENT...: exit 2, one line, the file as it was
    name=$1 pattern=$2
    shift 2
    "$ruyi" "$@" -q --checkpoint ck -o part.y4m 2>errors
    equal "$name: exit code" 2 $?
    equal "$name: one line" 1 "$(grep -c "^ruyi: ck: .*$pattern" errors)"
    check "$name: left alone" cmp -s ck now
    check "$name: no output" [ ! -e part.y4m ]
}
cp kept now
refused "another seed" "another options" $a --steps 6 --seed 1
refused "other steps" "another options" $a --steps 7
refused "another picture" "another pictures" -m "$models/tiny-a" -i "$root/weights/start/night.ppm" --size 16x16 --frames 16 --steps 6
cp -R "$models/tiny-a" other
printf '\1' | dd of=other/vae/diffusion_pytorch_model.safetensors bs=1 seek=$(($(wc -c <other/vae/diffusion_pytorch_model.safetensors) - 1)) conv=notrunc 2>/dev/null
refused "another model" "another model" -m other -i "$start" --size 16x16 --frames 16 --steps 6
size=$(wc -c <kept)
for at in 1 9 40 300 $((size / 3)) $((size / 2)) $((size - 40)) $((size - 1)); do       # one byte changed
    old=$(od -An -tu1 -j "$at" -N 1 kept | tr -d ' ')
    cp kept ck
    printf "\\$(printf %o $(((old + 1) % 256)))" | dd of=ck bs=1 seek="$at" conv=notrunc 2>/dev/null
    cp ck now
    refused "damaged at byte $at" "" $a --steps 6
done
for length in 0 7 100 $((size - 1)); do
    dd if=kept of=ck bs=1 count="$length" 2>/dev/null
    cp ck now
    refused "cut after $length bytes" "" $a --steps 6
done
cp "$models/tiny-a/vae/diffusion_pytorch_model.safetensors" ck
cp ck now
refused "another kind of file" "another kind of file" $a --steps 6
cp kept ck
"$ruyi" $a --steps 6 -v --checkpoint ck -o part.y4m >/dev/null 2>&1      # what changes no byte is no other run
check "the right one" cmp -s whole.y4m part.y4m
rm -f ck part.y4m
"$ruyi" $a --steps 6 -q --checkpoint none/ck -o part.y4m 2>errors
equal "no folder for it" 3 $?

# ---------------------------------------------------------------- plan and progress
"$ruyi" $a --steps 6 --dry-run -o part.y4m 2>errors
equal "dry run: exit code" 0 $?
equal "dry run: one line" 1 "$(grep -c '^plan: .* MB of activations .* MB to write.*; about .* on 1 thread$' errors)"
check "dry run: no output" [ ! -e part.y4m ]
if (ulimit -v 2000000) 2>/dev/null && [ -r /proc/self/statm ]; then
    (ulimit -v 2000000; "$ruyi" -m "$models/tiny-a" -i "$start" --size 1024x1024 --frames 120 -q -o part.y4m) 2>errors
    equal "too large for the memory: exit code" 3 $?
    equal "too large for the memory: one line" 1 "$(grep -c '^ruyi: memory: the plan needs .* MB' errors)"
else
    echo "skipped too large for the memory: no limit of the address space here"
fi
"$ruyi" $a --steps 3 -q --progress lines -o part.y4m
equal "progress: steps" 3 "$(grep -c '^{"stage":"denoise".*"seconds_a_step":.*"percent":\|^{"stage":"denoise".*"percent":.*"seconds_a_step":' lines)"
"$ruyi" $a --steps 3 -q --preview seen.ppm -o other.y4m
check "a preview changes nothing" cmp -s part.y4m other.y4m
equal "preview: a picture of the clip's size" "P6 16 16 255" "$(head -n 3 seen.ppm | tr '\n' ' ' | sed 's/ $//')"
"$ruyi" $a --steps 3 -q --checkpoint ck --dump dump 2>errors
equal "a checkpoint beside a dump" 2 $?
equal "progress: its end" 1 "$(tail -n 1 lines | grep -c '"stage":"done".*"percent":100.00')"
rm -f ./*.y4m

# ---------------------------------------------------------------- random kills
if [ "$2" = --kills ]; then
    run="-m $root/weights/ruyi-tiny -i $start --size 64x64 --frames 24 --steps 12 --scheduler euler_a --teacache 0.1"
    "$ruyi" $run -q -o whole.y4m
    kills=0 ends=0
    while [ "$kills" -lt "$3" ]; do
        "$ruyi" $run -q --checkpoint ck -o part.y4m & pid=$!
        sleep "$(awk -v seed="$kills$pid" 'BEGIN { srand(seed); printf "%.3f", 0.05 + rand() * 1.2 }')"
        if kill -9 $pid 2>/dev/null; then kills=$((kills + 1)); fi
        if wait $pid 2>/dev/null; then
            ends=$((ends + 1))
            check "complete after $kills kills" cmp -s whole.y4m part.y4m
            rm -f part.y4m
        fi
    done
    "$ruyi" $run -q --checkpoint ck -o part.y4m
    check "complete after $kills kills" cmp -s whole.y4m part.y4m
    echo "kill -9: $kills, $((ends + 1)) runs completed"
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
