#!/bin/sh
# Runs golden cases through the program and compares every stored tensor, stage by stage.
#
#     tests/golden.sh RUYI CASE...        RUYI: the program; CASE: folders with args, inputs, expected.safetensors
#
# A case's args are a command line, run in the case's folder; what the case stores is dumped and compared under the
# limits of the program's own precision. Prints a line for every case that fails, and `N passed, N failed` at the end.
ruyi=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
tmp=$(mktemp -d) || exit 3
export OMP_WAIT_POLICY=passive     # tests share the machine; spinning threads would fight for it
trap 'rm -rf "$tmp"' EXIT
passed=0
failed=0
for case in "$@"; do
    name=$(basename "$case")
    filters=$("$ruyi" info "$case/expected.safetensors" | awk '$1 ~ /^[A-Z]+[0-9]+/ { print "--dump-filter", $NF }')
    rm -rf "$tmp/dump"
    if (cd "$case" && "$ruyi" $(cat args) -q --dump "$tmp/dump" $filters) >"$tmp/log" 2>&1 &&
        "$ruyi" compare "$case/expected.safetensors" "$tmp/dump" >>"$tmp/log" 2>&1; then
        passed=$((passed + 1))
        [ -n "$VERBOSE" ] && echo "ok     $name: $(tail -n 1 "$tmp/log")"
    else
        failed=$((failed + 1))
        echo "FAILED $name"
        sed 's/^/       /' "$tmp/log" | tail -n 12
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
