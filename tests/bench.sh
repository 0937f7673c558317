#!/bin/sh
# The kernels' time beside PyTorch's and OpenBLAS's, in turns, so that a machine whose speed drifts is fair to all.
#
#     PYTHON=/path/to/python tests/bench.sh RUYI [CASE ...]
#
# PYTHON: one that has torch. OpenBLAS: found by the C compiler (cblas.h, -lopenblas). What is missing is said. Ratios
# are medians over ROUNDS (3) of the peer's time divided by ours in the same round: above 1 we are faster.
ruyi=$1
shift
here=$(dirname "$0")
rounds=${ROUNDS:-3}
tmp=$(mktemp -d) || exit 3
trap 'rm -rf "$tmp"' EXIT
export OMP_PROC_BIND=true
threads=${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}
export OMP_NUM_THREADS="$threads" OPENBLAS_NUM_THREADS="$threads"

if [ $# -eq 0 ]; then
    set -- linear.1536x2816x2816 linear.1536x12288x2816 linear.1536x2816x12288 linear.333x2816x1024 attention.32x1536x1536x88 \
        attention.8x3456x3456x88 conv3d.128.4x96x96 conv3d.256.4x48x48 conv3d.512.2x24x24 resblock.128.8x128x128 dit_block.1536
fi
torch=no
if "${PYTHON:-python3}" -c 'import torch' 2>/dev/null; then
    torch=yes
else
    echo "PyTorch: no Python with torch; give one as PYTHON=..."
fi
blas=no
if ${CC:-cc} -O2 "$here/blas_peer.c" -lopenblas -o "$tmp/blas" 2>"$tmp/errors" || ${CC:-cc} -O2 -I/usr/include/x86_64-linux-gnu/openblas-pthread "$here/blas_peer.c" -lopenblas -o "$tmp/blas" 2>"$tmp/errors"; then
    blas=yes
else
    echo "OpenBLAS: not found by the C compiler ($(head -n 1 "$tmp/errors"))"
fi

for round in $(seq "$rounds"); do
    "$ruyi" bench peak "$@" | sed "s/^/$round\tours\t/"
    [ $torch = yes ] && "${PYTHON:-python3}" "$here/torch_peer.py" --threads "$threads" "$@" | sed "s/^/$round\ttorch\t/"
    [ $blas = yes ] && "$tmp/blas" "$@" | sed "s/^/$round\tblas\t/"
done >"$tmp/times"

grep -m 1 'model name' /proc/cpuinfo 2>/dev/null
echo "$threads threads, $rounds rounds${OPENBLAS_CORETYPE:+, OPENBLAS_CORETYPE=$OPENBLAS_CORETYPE}"
awk -F'\t' '
    function median(list, n, parts, i, j, t) {
        n = split(list, parts, " ")
        for (i = 1; i <= n; i++) for (j = i + 1; j <= n; j++) if (parts[j] + 0 < parts[i] + 0) { t = parts[i]; parts[i] = parts[j]; parts[j] = t }
        return n ? parts[int((n + 1) / 2)] : ""
    }
    { time[$1, $2, $3] = $4; flop[$3] = $7; if (!($3 in seen)) { seen[$3] = 1; order[++cases] = $3 } if ($1 > rounds) rounds = $1 }
    END {
        printf "%-28s %10s %8s %10s %11s\n", "case", "GFLOP/s", "of peak", "x PyTorch", "x OpenBLAS"
        for (c = 1; c <= cases; c++) {
            name = order[c]; speeds = shares = t = b = ""
            for (r = 1; r <= rounds; r++) {
                ours = time[r, "ours", name]
                if (!ours) continue
                speeds = speeds " " flop[name] / ours
                shares = shares " " flop[name] / ours / (flop["peak"] / time[r, "ours", "peak"])
                if (time[r, "torch", name]) t = t " " time[r, "torch", name] / ours
                if (time[r, "blas", name]) b = b " " time[r, "blas", name] / ours
            }
            printf "%-28s %10.1f %7.0f%% %10s %11s\n", name, median(speeds), 100 * median(shares), t ? sprintf("%.2f", median(t)) : "-", b ? sprintf("%.2f", median(b)) : "-"
        }
    }' "$tmp/times"
