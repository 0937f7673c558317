#!/bin/sh
# The page of `ruyi tour`: is it HTML, is what it shows the run's, is it the same everywhere, whole or not at all?
#
#     tests/tour.sh RUYI          RUYI: the program
#
# Pictures are read back from the page: base64, PNG, stored blocks. Needs nothing but standard Unix tools; measured times,
# which <time> elements hold, are taken out before pages are compared. Prints a line for every check that fails, and
# `N passed, N failed` at the end.

[ $# -eq 1 ] && [ -x "$1" ] || { echo "usage: tests/tour.sh PATH_TO_RUYI" >&2; exit 2; }
LC_ALL=C
export LC_ALL
ruyi=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
model=$root/weights/ruyi-tiny
start=$root/weights/start
tmp=$(mktemp -d) || exit 3
trap 'rm -rf "$tmp"' EXIT
trap 'exit 3' HUP INT TERM
cd "$tmp" || exit 3
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
passed=0
failed=0

# check NAME COMMAND...: the command succeeds; its output shows where it does not.
check() {
    name=$1
    shift
    if "$@" >log 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf "%s\n" "FAILED $name: $(tail -n 3 log)" | tr "\n" " " | cut -c 1-400
        echo
    fi
}
quick="-m $model --size 32x48 --steps 2 --frames 8 -q"
untimed() { sed 's/<time [^>]*>[^<]*//g' "$1"; }

# Every tag is closed by its own, in order; every attribute is quoted; every picture has its words; no name of the page's
# texts, script or address is left in it.
well_formed() {
    sed 's/data:image\/png;base64,[A-Za-z0-9+\/=]*"/data:"/g' "$1" >plain
    ! grep -nE '`|<script|https?:|src="[^d]' plain || return 1
    ! grep -nw nan plain || return 1
    ! grep -nE '<img [^>]*alt=""|<img src="[^"]*" width="[0-9]*" height="[0-9]*">' plain || return 1
    awk '
        { text = text $0 "\n" }
        END {
            while (match(text, /<[^>]*>/)) {
                tag = substr(text, RSTART + 1, RLENGTH - 2)
                text = substr(text, RSTART + RLENGTH)
                name = tag
                sub(/[ \n\/].*/, "", name)
                rest = substr(tag, length(name) + 1)
                gsub(/ [-a-zA-Z]+="[^"]*"/, "", rest)
                if (tag ~ /^\//) {
                    if (substr(tag, 2) != open[depth--]) { print tag " closes " open[depth + 1]; exit 1 }
                    continue
                }
                if (name !~ /^(!DOCTYPE|meta|img|input|br)$/ && tag !~ /\/$/) {
                    open[++depth] = name
                }
                if (rest !~ /^( html| checked|\/)?$/) { print "attribute: " tag; exit 1 }
            }
            if (depth) { print open[depth] " is open"; exit 1 }
        }' plain
}

# The bytes of a picture of the page, one a line: the N-th whose alt text begins with WORDS. PNG of stored blocks.
pixels() {
    grep -o 'src="data:image/png;base64,[^"]*" width="[0-9]*" height="[0-9]*" alt="'"$2" "$1" | sed -n "${3}p" |
        sed 's/.*base64,//; s/".*//' | awk '
        BEGIN { for (i = 0; i < 64; i++)
            digit[substr("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", i + 1, 1)] = i }
        {
            for (i = 1; i <= length($0); i += 4) {
                three = 0
                for (k = 0; k < 4; k++) three = three * 64 + digit[substr($0, i + k, 1)]
                byte[n++] = int(three / 65536); byte[n++] = int(three / 256) % 256; byte[n++] = three % 256
            }
            row = 3 * (byte[18] * 256 + byte[19]) + 1
            for (at = 43; !last; ) {            # after signature, IHDR, and the head of IDAT and zlib
                last = byte[at]
                size = byte[at + 1] + 256 * byte[at + 2]
                for (at += 5; size-- > 0; at++)
                    if (seen++ % row) print byte[at]
            }
        }'
}
# PPM FILE: the same of a picture of 24 bits.
ppm_pixels() { od -An -v -tu1 "$1" | tr -s ' ' '\n' | sed '/^$/d' | tail -n "+$(($(head -n 3 "$1" | wc -c) + 1))"; }
same_picture() {                # PAGE WORDS N PPM
    pixels "$1" "$2" "$3" >mine
    ppm_pixels "$4" >theirs
    cmp mine theirs
}

# ---------------------------------------------------------------- what it shows is the run's

check "a page" "$ruyi" tour $quick -i "$start/meadow.ppm" --camera left -o a.html
check "the same run, its frames" "$ruyi" $quick -i "$start/meadow.ppm" --camera left -o 'f%d.ppm'
for i in 0 3 7; do
    check "frame $i is generate's" same_picture a.html "frame $i\"" 1 f$i.ppm
done
check "well formed" well_formed a.html
big="-m $model -i $start/village.ppm --size 192x160 --frames 1 --steps 1 --cfg 1 -q"
check "a frame of several blocks: its page" "$ruyi" tour $big -o b.html
check "and its frame" "$ruyi" $big -o 'b%d.ppm'
check "which are the same" same_picture b.html 'frame 0"' 1 b0.ppm
check "the page of one frame is well formed" well_formed b.html
check "a tour's stages" "$ruyi" tour $quick -i "$start/meadow.ppm" --dump tour -o c.html
check "generate's stages" "$ruyi" $quick -i "$start/meadow.ppm" --dump generate
check "are the same files" diff -r tour generate
check "and a dump does not change the page" sh -c "sed 's/<pre>.*//; s/<time [^>]*>[^<]*//g' c.html >c.txt
    $ruyi tour $quick -i $start/meadow.ppm -o d.html && sed 's/<pre>.*//; s/<time [^>]*>[^<]*//g' d.html | cmp - c.txt"
check "the camera is measure's" sh -c "$ruyi $quick -i $start/meadow.ppm --camera left -o a.y4m &&
    word=\$($ruyi measure a.y4m | awk '\$1 == \"camera\" { print \$2 }') && grep -q \"camera: <strong>\$word<\" a.html"

# ---------------------------------------------------------------- the same everywhere

untimed a.html >one.txt
mkdir threads
check "a page by three threads" sh -c "cd threads && OMP_NUM_THREADS=3 $ruyi tour $quick -i $start/meadow.ppm --camera left -o a.html"
untimed threads/a.html >three.txt
check "is the same but for times" cmp one.txt three.txt
check "on standard output, too" sh -c "$ruyi tour $quick -i $start/meadow.ppm -o - >e.html && tail -n 1 e.html | grep -q '^</html>'"

# ---------------------------------------------------------------- every kind of run

n=0
while read -r options; do
    n=$((n + 1))
    eval "check 'a page with $options' \"\$ruyi\" tour $quick $options -o v$n.html"
    check "and it is well formed: $options" well_formed v$n.html
done <<END

--frames 1
-i $start/tall.ppm --frames 1 --cfg 0
-i $start/pan-start.ppm -i $start/pan-start.ppm -e $start/pan-end.ppm --frames 16 --camera auto
-i $start/wide.ppm --scheduler euler_a --steps 3
-i $start/wide.ppm --scheduler dpm++ --steps 3
-i $start/wide.ppm --scheduler pndm --steps 4
-i $start/wide.ppm --teacache 10,1,1 --steps 5 --keep-colour
-i $start/wide.ppm --size 64x48 --frames 16 --vae-tiling both,32 --enhance-a-video 1
-m $root/tests/golden/models/tiny-b -i $start/wide.ppm --frames 9
-m $root/tests/golden/models/tiny-c -i $start/wide.ppm --frames 9
-m $root/tests/golden/extra/models/s9 -i $start/wide.ppm --frames 9
END
cp "$start/candy.ppm" "a '<&\".ppm" 2>/dev/null
check "strange names" "$ruyi" tour $quick -i "a '<&\".ppm" -o s.html
check "are written as what they look like" grep -q "'a '\\\\''&lt;&amp;&quot;.ppm'" s.html
check "and leave a page that is well formed" well_formed s.html

# ---------------------------------------------------------------- refused, whole or not at all

# ends CODE WORDS ARGUMENT...: with that code and one line that has the words; nothing is left behind but what was there.
ends() {
    code=$1 words=$2
    shift 2
    rm -rf out && mkdir out
    (cd out && exec "$ruyi" tour "$@") >stdout 2>stderr
    status=$?
    [ "$status" -eq "$code" ] && [ "$(wc -l <stderr)" -eq 1 ] && [ ! -s stdout ] && [ -z "$(ls -A out)" ] &&
        grep -q -e "$words" stderr || { echo "exit $status: $(cat stderr) left: $(ls -A out)"; return 1; }
}
check "no output" ends 2 '--output: got nothing' $quick
check "another ending" ends 2 'expected NAME.html' $quick -o x.y4m
check "an ending alone" ends 2 'expected NAME.html' $quick -o .html
check "no such folder" ends 3 'missing/x.html: writing' $quick -o missing/x.html
check "an option that it does not take" ends 2 'not an option of tour' $quick -o x.html --checkpoint k
check "a word too many" ends 2 'one word too many for tour' $quick -o x.html clip
check "colours of no picture" ends 2 '--keep-colour' $quick -o x.html --keep-colour
check "no model" ends 2 'missing' -m missing -o x.html -q
check "a size that is none" ends 2 '--size' $quick --size 30x30 -o x.html
(ulimit -f 8; ends 3 'x.html: writing' $quick -o x.html) >log 2>&1
check "a file beyond the limit" [ $? -eq 0 ]
check "nothing is said with -q" sh -c "[ -z \"\$($ruyi tour $quick -o q.html 2>&1)\" ]"
check "a dry run writes nothing" sh -c "$ruyi tour $quick -o dry.html --dry-run 2>/dev/null && [ ! -e dry.html ]"
if [ -c /dev/full ]; then
    check "a full disk" sh -c "$ruyi tour $quick -o - >/dev/full 2>stderr; [ \$? -eq 3 ] && grep -q 'standard output: writing' stderr"
fi
{ "$ruyi" tour $quick -i "$start/meadow.ppm" -o - 2>stderr; echo $? >code; } | true
check "a closed pipe" sh -c "[ \"\$(cat code)\" = 3 ] && grep -q 'standard output: writing' stderr"

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
