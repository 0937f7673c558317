#!/bin/sh
# Does the golden pack bite? Applies each mutant of tests/mutants.txt to a copy of its file, builds both precisions with it, and runs operators, then
# cases until one of each differs. `make mutants` calls it, after building the program; half an hour on two cores.
#
#     CC=... FLAGS=... tests/mutants.sh [PATTERN]     PATTERN (awk): only mutants whose line has it; PARTS="ops cases": one of them only
#
# tests/mutants.tsv gets a line for each mutant, class and part: mutant, class, verdict, case, first tensor that differs, its error, its limit, margin =
# error / limit; what is not run keeps its line. Verdicts: caught (by numbers), refused (ended with an error), survived (then `case` is the part).
# Fails where a mutant survives everything, where one that is listed as equivalent does not, and where a text does not occur exactly once.
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 3
list=tests/mutants.txt
result=tests/mutants.tsv
parts=${PARTS:-ops cases}
tmp=$(mktemp -d) || exit 3
trap 'rm -rf "$tmp"' EXIT
trap 'exit 3' INT TERM
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

# The list is kept up to date: every text once in its file.
awk -F ' ## ' '/^#/ || !NF { next }
    NF < 4 { print "tests/mutants.txt:" NR ": expected FILE ## TEXT ## REPLACEMENT ## WHAT"; bad = 1; next }
    seen[$1 $4]++ { print "tests/mutants.txt:" NR ": two mutants of the name " $4; bad = 1 }
    { n = 0; while ((getline line < $1) > 0) while ((i = index(line, $2))) { n++; line = substr(line, i + length($2)) } close($1) }
    n != 1 { print "tests/mutants.txt:" NR ": the text occurs " n " times in " $1 ", expected once: " $2; bad = 1 }
    END { exit bad }' "$list" || exit 2

# The cases in the order of use: for the VAE its own first, else deep ones and CLIP; not tiny-*, which take a minute each.
cases() {
    (cd tests/golden && case $1 in vae.c) ls -d cases/dec-* cases/enc-* ;; *) ls -d cases/*-deep cases/clip-* ;; esac &&
        ls -d extra/cases/* cases/[!t]*) | awk '!seen[$0]++'
}

# verdict CLASS PART: of the log's `differs first: TENSOR: MEASURE ERROR, limit LIMIT`; a tensor of an operator is CASE.NAME.
verdict() {
    awk -v class="$1" -v part="$2" -v OFS='\t' '
        sub(/.*differs first: /, "") { tensor = $1; sub(/:$/, "", tensor)
            if (match($0, /: [-A-Za-z0-9]+ [^ ]+, limit [^;,]+/)) { split(substr($0, RSTART, RLENGTH), word, /,? /); error = word[3]; limit = word[5] } }
        END { if (part ~ /^ops\// && match(tensor, /\.[^.]*$/)) { part = part "/" substr(tensor, 1, RSTART - 1); tensor = substr(tensor, RSTART + 1) }
              sub(/^ops\//, "", part); sub(/.*cases\//, "", part)
              if (error == "") print class, "refused", part, (tensor == "" ? "-" : tensor), "-", "-", "-"
              else print class, "caught", part, tensor, error, limit, (limit > 0 ? sprintf("%.3g", error / limit) : "exact") }' "$dir/log"
}

survived() { printf '%s\tsurvived\t%s\t-\t-\t-\t-\n' "$1" "$2"; }

# try_ops CLASS: all operators with the mutant, in one program.
try_ops() {
    $CC $FLAGS -O0 -DREAL=$type "$dir/tree/tests/ops.c" -lm -o "$dir/ops" 2>"$dir/log" || { broken; return; }
    rm -rf "$dir/out" && mkdir "$dir/out"
    (ulimit -t 100; "$dir/ops" "$dir/out" tests/ops_floors.tsv) >"$dir/log" 2>&1 || { verdict "$1" ops/ops; return; }
    for golden in tests/golden/ops/*.inputs.safetensors; do
        op=$(basename "$golden" .inputs.safetensors)
        ./ruyi compare --class "$1" "tests/golden/ops/$op.safetensors" "$dir/out/$op.safetensors" >"$dir/log" 2>&1 || { verdict "$1" "ops/$op"; return; }
    done
    survived "$1" ops
}

# try_cases CLASS FILE CASE...: the program with the mutant.
try_cases() {
    class=$1
    objects=$(for part in ruyi vae dit tensor io; do [ $part.c = "$2" ] || echo build/$type/$part.o; done)
    $CC $FLAGS -O1 -DREAL=$type "$dir/tree/$2" $objects -lm -o "$dir/ruyi" 2>"$dir/log" || { broken; return; }
    shift 2
    for case in "$@"; do
        (ulimit -t 100; tests/golden.sh "$dir/ruyi" "tests/golden/$case") >"$dir/log" 2>&1 || { verdict "$class" "$case"; return; }
    done
    survived "$class" cases
}

broken() { sed "s/^/mutants: $number: /" "$dir/log" >&2; }

# worker K OF PATTERN: every OFth mutant. Float32 sees less than float64: of the cases it gets the first ten, and the one that float64 was caught by.
worker() {
    dir=$tmp/$1
    mkdir -p "$dir/tree/tests"
    cp ./*.[ch] "$dir/tree"
    cp tests/*.[ch] "$dir/tree/tests"
    for number in $(awk -v k="$1" -v of="$2" -v pattern="$3" '/^#/ || !NF || !($0 ~ pattern) { next } n++ % of == k { print NR }' "$list"); do
        file=$(awk -F ' ## ' -v n="$number" 'NR == n { print $1 }' "$list")
        awk -F ' ## ' -v n="$number" 'NR == FNR { if (FNR == n) { old = $2; new = $3 } next }
            (i = index($0, old)) { $0 = substr($0, 1, i - 1) new substr($0, i + length(old)) } { print }' "$list" "$file" >"$dir/tree/$file"
        for part in $parts; do
            set -- $(cases "$file")
            for class in fp64 fp32; do
                type=$([ $class = fp64 ] && echo double || echo float)
                row=$([ "$part" = ops ] && try_ops $class || try_cases $class "$file" "$@")
                printf '%s\t%s\t%s\n' "$number" "$part" "$row" | tee -a "$rows" >&2
                set -- $(for case in $(cases "$file"); do [ "${case##*/}" = "$(echo "$row" | cut -f 3)" ] && echo "$case"; done) $(cases "$file" | head -n 10)
            done
        done
        cp "$file" "$dir/tree"
    done
}

rows=$tmp/rows.0
worker 0 2 "$1" &
rows=$tmp/rows.1
worker 1 2 "$1" &
wait
touch "$result" "$tmp/rows.0" "$tmp/rows.1"
cp "$result" "$tmp/before"
awk -F '\t' -v OFS='\t' '
    FILENAME == ARGV[1] { if ($0 !~ /^#/ && split($0, f, / ## /) > 3) name[FNR] = f[1] ": " f[4]; last = FNR; next }
    FILENAME == ARGV[2] { if (FNR > 1) row[$1, $2, $4 == "ops" || $4 ~ /\// ? "ops" : "cases"] = $0; next }
    { n = $1; part = $2; sub(/^[^\t]*\t[^\t]*\t/, ""); row[name[n], $1, part] = name[n] OFS $0 }
    END { print "mutant", "class", "verdict", "case", "tensor", "error", "limit", "margin"
          for (n = 1; n <= last; n++) if (n in name) for (c = 0; c < 2; c++) for (p = 0; p < 2; p++) {
              key = name[n] SUBSEP (c ? "fp32" : "fp64") SUBSEP (p ? "cases" : "ops"); if (key in row) print row[key] } }' \
    "$list" "$tmp/before" "$tmp/rows.0" "$tmp/rows.1" >"$result"
awk -F '\t' 'FILENAME == ARGV[1] { if ($0 !~ /^#/ && (n = split($0, f, / ## /)) > 3) { order[++count] = f[1] ": " f[4]; if (n > 4) why[f[1] ": " f[4]] = f[5] } next }
    $3 == "caught" || $3 == "refused" { hit[$1] = 1; if (!(($1, $2) in seen)) { seen[$1, $2]; class[$2]++ } }
    { ran[$1] = 1 }
    END { for (i = 1; i <= count; i++) { m = order[i]
              if (!(m in ran)) missing++
              else if (m in hit && m in why) { failed++; print "FAILED " m ": caught, and listed as equivalent" }
              else if (m in hit) caught++
              else if (m in why) { equivalent++; print "equivalent " m ": " why[m] }
              else { failed++; print "FAILED " m ": survived" } }
          if (missing) print "FAILED " missing " mutants were not run"
          printf "%d mutants: %d caught (float64 %d, float32 %d), %d equivalent\n", count, caught, class["fp64"], class["fp32"], equivalent
          failed += missing
          printf "%d passed, %d failed\n", caught + equivalent, failed
          exit failed > 0 }' "$list" "$result"
