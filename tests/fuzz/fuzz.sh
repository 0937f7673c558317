#!/bin/sh
# Every reader of foreign bytes under libFuzzer and the sanitizers of clang, one after the other.
#
#     tests/fuzz/fuzz.sh FUZZ LIMIT [TARGET...]
#
# FUZZ: what `make fuzz` builds; LIMIT: -max_total_time=SECONDS or -runs=N, for each target; TARGET: all by default. What libFuzzer finds out about the input stays in build/corpus, so that
# the next call goes on there; an input that breaks a reader is kept as build/finding-TARGET-*.
fuzz=$1 limit=$2
shift 2
cd "$(dirname "$0")/../.." || exit 3
log=$(mktemp) || exit 3
trap 'rm -f "$log"' EXIT
failed=0
for target in ${*:-$(ls tests/fuzz/corpus)}; do
    mkdir -p "build/corpus/$target"
    if FUZZ=$target "$fuzz" "$limit" -max_len=512 -timeout=10 -detect_leaks=0 -artifact_prefix="build/finding-$target-" \
        "build/corpus/$target" "tests/fuzz/corpus/$target" >"$log" 2>&1; then
        echo "$target: $(awk '/^Done/ { print $2, "runs in", $5, "s, no finding" }' "$log")"
    else
        failed=1
        echo "$target: FINDING"
        tail -n 40 "$log"
    fi
done
exit $failed
