#!/bin/sh
# Runs every operator on its golden inputs in one build, and judges its outputs as a port's: ruyi compare.
#
#     tests/ops.sh OPS RUYI        OPS: build/ops or build/ops64; RUYI: the program of the same precision
#
# Inputs are to be the stored bytes in either build; in float64 (build/ops64) outputs, too. Ends with `N passed, N failed`.
tmp=$(mktemp -d) || exit 3
trap 'rm -rf "$tmp"' EXIT
golden=tests/golden/ops
passed=0
failed=0
"$1" "$tmp" tests/ops_floors.tsv || exit 1
for inputs in "$golden"/*.inputs.safetensors; do
    op=$(basename "$inputs" .inputs.safetensors)
    cases=$(awk -F '\t' -v file="ops/$op.safetensors" '$2 == file' tests/golden/MANIFEST | wc -l)
    if ! cmp "$inputs" "$tmp/$op.inputs.safetensors" >"$tmp/log" 2>&1 ||
        ! "$2" compare "$golden/$op.safetensors" "$tmp/$op.safetensors" >"$tmp/log" 2>&1 ||
        { [ "${1%64}" != "$1" ] && ! cmp "$golden/$op.safetensors" "$tmp/$op.safetensors" >"$tmp/log" 2>&1; }; then
        failed=$((failed + 1))
        echo "FAILED $op"
        sed 's/^/       /' "$tmp/log" | tail -n 12
    else
        passed=$((passed + cases))
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -ge 150 ]
