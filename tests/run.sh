#!/bin/sh
# All tests. Needs the built programs (make test builds them) and standard Unix tools; nothing is downloaded.
# Every part ends with `N passed, N failed[, N skipped]`; so does the whole.
cd "$(dirname "$0")/.." || exit 3
export OMP_WAIT_POLICY=passive     # tests share the machine; spinning threads would fight for it
passed=0
failed=0
skipped=0

# part NAME COMMAND...: runs one part, shows its failures, adds up its last line.
part() {
    name=$1
    shift
    output=$("$@" 2>&1)
    code=$?
    summary=$(printf '%s\n' "$output" | awk '/^[0-9]+ passed, [0-9]+ failed/ { line = $0 } END { print line }')
    printf '%s\n' "$output" | awk '!/^[0-9]+ passed, [0-9]+ failed/'
    if [ -z "$summary" ]; then
        summary="0 passed, 1 failed (ended with code $code and no summary)"
    fi
    echo "$name: $summary"
    passed=$((passed + $(printf '%s' "$summary" | awk '{ print $1 + 0 }')))
    failed=$((failed + $(printf '%s' "$summary" | awk '{ print $3 + 0 }')))
    skipped=$((skipped + $(printf '%s' "$summary" | awk '{ print $5 + 0 }')))
}

part "units, float32" build/unit
part "units, float64" build/unit64
part "damaged files" build/damage
part "faults" build/faults
part "operators, float32" tests/ops.sh build/ops ./ruyi
part "operators, float64" tests/ops.sh build/ops64 ./ruyi64
part "golden pack" build/pack check
part "golden cases, float32" tests/golden.sh ./ruyi tests/golden/cases/* tests/golden/extra/cases/*
part "golden cases, float64" tests/golden.sh ./ruyi64 tests/golden/cases/* tests/golden/extra/cases/*
for program in ./ruyi ./ruyi64; do
    part "stage by stage, $program" sh -c "$program check tests/golden/cases/* tests/golden/extra/cases/* | grep -v ': same: '"
done
part "command line" tests/cli.sh ./ruyi
part "killed and continued" tests/resume.sh ./ruyi
part "many at once" tests/many.sh ./ruyi
part "the tour's page" tests/tour.sh ./ruyi
part "controls of compare" build/controls ./ruyi
part "port in NumPy" tests/port.sh ./ruyi
part "README" tests/readme.sh
part "identity" tests/identity.sh ./ruyi
echo "$passed passed, $failed failed$([ "$skipped" -gt 0 ] && echo ", $skipped skipped")"
[ "$failed" -eq 0 ]
