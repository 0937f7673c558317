#!/bin/sh
# What this program's results are worth: the tables of README.md, in Markdown. `make report` calls it with both builds and takes two minutes;
# with FULL=1 it also makes builds and mutants anew (make identity, make mutants), which takes an hour.
#
#     tests/report.sh RUYI RUYI64
root=$(cd "$(dirname "$0")/.." && pwd)
tmp=$(mktemp -d) || exit 3
trap 'rm -rf "$tmp"' EXIT
export OMP_WAIT_POLICY=passive LC_ALL=C
absolute() { echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"; }
set -- "$(absolute "$1")" "$(absolute "$2")"
cd "$root" || exit 3

# distances CLASS PROGRAM CASE: a line for each float tensor: class, name, rel-L2, its limit, and PyTorch's own rel-L2 in float32 (metadata floor).
distances() {
    rm -rf "$tmp/dump"
    (cd "$3" && "$2" $(cat args) -q --dump "$tmp/dump") || return 1
    head -c 300000 "$3/expected.safetensors" | tr -cd '[:print:]' | sed 's/.*"floor":"{\([^}]*\)}".*/\1/' | tr -d '\\" ' | tr ',' '\n' >"$tmp/floors"
    "$2" compare -v --class "$1" "$3/expected.safetensors" "$tmp/dump" >"$tmp/compared" || return 1
    awk -v class="$1" '
        NR == FNR { at = match($0, /:[^:]*$/); floor[substr($0, 1, at - 1)] = substr($0, at + 1); next }
        $3 == "rel-L2" { sub(/:$/, "", $2); sub(/[,;]$/, "", $4); sub(/[,;]$/, "", $6); print class, $2, $4, $6, $2 in floor ? floor[$2] : 0 }' "$tmp/floors" "$tmp/compared"
}

for case in tests/golden/cases/* tests/golden/extra/cases/*; do
    distances fp64 "$2" "$root/$case" && distances fp32 "$1" "$root/$case" || { echo "report: $case does not run" >&2; exit 1; }
done >"$tmp/distances"

# Worst of all cases by stage. Truths that are stored in F32 say nothing of float64 below 1e-7.
echo '| Stage | tensors | float64 from PyTorch'\''s float64 | float32 from it | PyTorch'\''s float32 from it |'
echo '|---|---|---|---|---|'
awk '{ n = $2; sub(/^step\.[0-9]+\./, "", n); sub(/^teacache/, "norm_out", n) }
    n ~ /pixels$/ { f = "1 pixels" }
    n ~ /^clip\.[eh]|^clip\.l/ { f = "2 CLIP" }
    n ~ /^vae\.enc|^vae\.moments|^mask/ { f = "3 VAE encoder, posterior" }
    n ~ /^temb|^text|^image|^patch/ { f = "4 conditions, patch embedding" }
    n ~ /^block/ { f = "5 DiT blocks" }
    n ~ /^norm_out|^out|^pred/ { f = "6 DiT output, guidance, TeaCache" }
    n ~ /^latents/ { f = "7 schedulers" }
    n ~ /^vae\.dec|^decoded|^video/ { f = "8 VAE decoder, smoothing" }
    $1 == "fp64" { count[f]++; if ($4 < 1e-8 && $3 > double[f]) double[f] = $3 }
    $1 == "fp32" { if ($3 > single[f]) single[f] = $3; if ($5 > floor[f]) floor[f] = $5 }
    END { for (f in count) printf "| %s | %d | %.1e | %.1e | %.1e |\n", f, count[f], double[f], single[f], floor[f] }' "$tmp/distances" |
    sort -k 2,2n | sed 's/^| [0-9] /| /'

# row WHAT FIGURE
row() { echo "| $1 | $2 |"; }
echo
echo '| | |'
echo '|---|---|'
passes() { awk '/^[0-9]+ passed/ { print $1 ($3 > 0 ? ", and " $3 " FAILED" : "") }'; }
row "golden cases: operators (ours, in float64)" "$(tests/ops.sh build/ops64 "$2" | passes)"
row "golden cases: single stages; the whole pipeline (of the public code)" \
    "$(cat tests/golden/cases/*/args tests/golden/extra/cases/*/args | awk '{ n[$1 == "generate"]++ } END { print n[0] "; " n[1] }')"
row "controls of compare" "$(build/controls "$1" | passes)"
if [ -n "$FULL" ]; then
    tests/identity.sh >"$tmp/identity"
    row "the same bytes: compilers, levels, instruction sets, machines, threads" "$(passes <"$tmp/identity") runs"
    make -s mutants >"$tmp/mutants" 2>/dev/null || cat "$tmp/mutants" >&2
else
    row "the same bytes: numbers of threads" "$(tests/identity.sh "$1" | passes); other builds: make identity"
fi
row "mutants of the numeric code" "$(tests/mutants.sh '^$' | sed -n 's/ mutants:/:/p')"
