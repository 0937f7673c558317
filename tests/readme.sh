#!/bin/sh
# Does README.md tell the truth? Runs every command in it, in order, as one session in a copy of the tree, and compares what each prints, standard
# error too, with what is pasted below it. Called by tests/run.sh; needs the built programs (make), a compiler, and standard Unix tools.
#
#     tests/readme.sh [FOLDER]        FOLDER: keeps the session there, tree/, and what its commands printed, out/NNN
#
# A command is a line `$ ...` of a ```console block, with the lines that a `\` at its end continues to. Its comment may say
#     # needs THING               run only where that is there, else skipped, by name; the things are those of `things` below
#     # takes TIME                too long for a test: only looked at; the make target, or the file that it runs, must exist
#     # exit N                    ends with code N rather than 0
# Below it is what it prints: exactly, but that a line `...` stands for any lines, and that what a machine's speed and size decide may be any number:
# seconds, times left, `run N %`, `peak N MB`, `N MB free`, `N threads`; `N MB of activations` may be 2 % off, as vector registers differ in size.
# An indented or other fenced line that looks like a command is an error. So is inline code that names a make target, a file of tests/, build/ or weights/,
# or a --option that is not there; a name in a table's column `where` that does not occur in the file named after it; and a number of lines in a
# column `lines` that is off by more than a tenth.
root=$(cd "$(dirname "$0")/.." && pwd)
tmp=$(mktemp -d) || exit 3
trap 'rm -rf "$tmp"' EXIT
trap 'exit 3' INT TERM
tree=${1:-$tmp}/tree
out=${1:-$tmp}/out
passed=0 failed=0 skipped=0
export LC_ALL=C OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive
case $MAKEFLAGS in *" -- "*) MAKEFLAGS="-- ${MAKEFLAGS#* -- }" ;; *) MAKEFLAGS= ;; esac      # CC=... stays, -j and -w do not
unset MAKELEVEL MFLAGS RUYI

pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAILED README.md:$*"; }

# What a fresh machine may lack.
python_has() { "${PYTHON:-python3}" -c "import $1" >/dev/null 2>&1; }
things=
for thing in ffmpeg parallel; do command -v $thing >/dev/null && things="$things $thing"; done
command -v sbatch >/dev/null && things="$things Slurm"
python_has numpy && python_has safetensors && things="$things NumPy"
python_has torch && things="$things PyTorch"
[ -n "$FOLDER" ] && [ -d "$FOLDER" ] && things="$things FOLDER"

mkdir -p "$tree" "$out" || exit 3
(cd "$root" && cp -Rp Makefile README.md LICENSE ./*.[ch] tests weights build ruyi ruyi64 "$tree") || exit 3
cd "$tree" || exit 3

# Blocks: the session as a script, NNN.want for each command, and a list NNN LINE KIND ARGUMENT of what is to be done.
awk -v things="$things " -v out="$out" '
    function finish() {
        if (!number) return
        kind = "run"; argument = 0
        if (match(command, /# exit [0-9]+/)) argument = substr(command, RSTART + 7, RLENGTH - 7)
        if (match(command, /# needs [^\n:]*/)) {
            n = split(substr(command, RSTART + 8, RLENGTH - 8), need, /[ ,]+/)
            for (i = 1; i <= n; i++) {
                if (index(" ffmpeg parallel Slurm NumPy PyTorch FOLDER ", " " need[i] " ") == 0) print line ": no such need: " need[i] >(out "/faults")
                if (index(things, " " need[i] " ") == 0) { kind = "needs"; argument = need[i] }
            }
        }
        if (match(command, /# takes [^\n]*/)) { kind = "takes"; argument = command; gsub(/\n/, " ", argument) }
        if (kind == "run") printf "{ %s\n} >%s/%03d 2>&1\necho $? >%s/%03d.code\n", command, out, number, out, number >(out "/script")
        printf "%03d %d %s %s\n", number, line, kind, argument >(out "/list")
        printf "" >wanted
        printf "%s", want >wanted
        close(wanted)
    }
    /^```/ {
        if (fence) { if (fence == "console") finish(); fence = ""; number = 0; next }
        fence = $0 == "```console" ? "console" : "other"; next
    }
    fence == "console" {
        if (/^\$ /) {
            finish(); number = ++count; line = FNR; command = substr($0, 3); want = ""; wanted = sprintf("%s/%03d.want", out, number)
            open = /\\$/; if (open) command = command "\n"
        } else if (!number) print FNR ": a console block begins with a command" >(out "/faults")
        else if (open) { command = command $0; open = /\\$/; if (open) command = command "\n" }
        else want = want $0 "\n"
        next
    }
    (fence == "other" || /^    /) &&
    /^ *(\$ |[A-Z]+=[^ ]+ |[.]*\/|(ruyi|make|cc|gcc|clang|ffmpeg|ffplay|mpv|convert|magick|python3?|pip|git|sh|bash|cd|cp|mkdir|cat|sed|awk|for|export|sbatch|parallel|ls|tests\/[a-z]+\.sh|build\/[a-z]+) )/ {
        print FNR ": looks like a command, and no test runs it: " $0 >(out "/faults")
    }
    END { if (fence) print FNR ": a block that does not end" >(out "/faults") }' README.md

sh "$out/script" </dev/null

# same WANT GOT: exit code 0 where they agree; else prints the first line that does not.
same() {
    awk -v wanted="$1" '
        function mask(s) {
            gsub(/about [0-9.:]+( s)? on [0-9]+ threads?/, "about N", s); gsub(/[0-9][0-9.:]* s([^a-z]|$)/, "N s ", s)
            gsub(/"seconds[a-z_]*":[0-9.]+/, "seconds", s); gsub(/"peak_memory":[0-9]+/, "peak", s)
            gsub(/"percent":[0-9.]+/, "percent", s); gsub(/run +[0-9]+ %/, "run N %", s); gsub(/peak +[0-9.]+ [MG]B/, "peak", s)
            gsub(/[0-9.]+ [MG]B free/, "N free", s)
            gsub(/[0-9][0-9]*:[0-9][0-9]:[0-9][0-9]/, "N s", s); gsub(/[0-9.]+ MB of activations/, "N MB", s); gsub(/ +/, " ", s); sub(/ $/, "", s)
            return s
        }
        function memory(s) { return match(s, /[0-9.]+ MB of activations/) ? substr(s, RSTART) + 0 : 0 }
        function alike(w, g,   m) { m = memory(w) - memory(g); return w == g || mask(w) == mask(g) && (m < 0 ? -m : m) <= 0.02 * memory(w) }
        { got[++n] = $0 }
        END {
            i = 1
            while ((getline w <wanted) > 0) {
                if (w == "...") { any = 1; continue }
                first = i
                while (any && i <= n && !alike(w, got[i])) i++
                if (i > n || !alike(w, got[i])) { print "expected: " w "\n    got: " (first > n ? "nothing more" : got[first]); exit 1 }
                i++; any = 0
            }
            if (!any && i <= n) { print "expected nothing more\n    got: " got[i]; exit 1 }
        }' "$2"
}

touch "$out/faults" "$out/list"
while IFS= read -r fault; do fail "$fault"; done <"$out/faults"
while read -r number line kind argument; do
    case $kind in
    needs)
        skipped=$((skipped + 1))
        echo "skipped README.md:$line: needs $argument"
        ;;
    takes)
        target=$(printf '%s\n' "$argument" | awk '{ for (i = 1; i <= NF; i++) if ($i == "make") { print $(i + 1); exit } else if ($i ~ /^([.]|tests|build)\//) { print $i; exit } }')
        if [ -e "$target" ] || grep -q "^$target:" Makefile; then
            pass
            echo "only looked at README.md:$line: $argument"
        else
            fail "$line: no such target or file: $argument"
        fi
        ;;
    run)
        code=$(cat "$out/$number.code" 2>/dev/null)
        touch "$out/$number"
        if [ "$code" != "$argument" ]; then
            fail "$line: exit code ${code:-missing}, expected $argument: $(tail -n 2 "$out/$number")"
        elif difference=$(same "$out/$number.want" "$out/$number"); then
            pass
        else
            fail "$line: $difference"
        fi
        ;;
    esac
done <"$out/list"

# Names in the text: what stands in `...` outside of blocks, and in the columns `where` and `lines` of tables.
./ruyi --help >"$out/help"
awk '
    /^```/ { fence = !fence; next }
    fence || /^    / { next }
    /^\|/ {
        n = split($0, cell, "|")
        if (!table) for (i = 1; i <= n; i++) { title = cell[i]; gsub(/ /, "", title); column[i] = title }
        for (i = 1; i <= n && table > 1; i++) {
            if (column[i] == "where") {
                names = ""; text = cell[i]
                while (match(text, /`[^`]+`|[a-z0-9_]+\.[ch]/)) {
                    found = substr(text, RSTART, RLENGTH); text = substr(text, RSTART + RLENGTH)
                    if (found ~ /^`/) { gsub(/[`()]/, "", found); names = names " " found }
                    else { m = split(names, name, " "); for (k = 1; k <= m; k++) print FNR, "name", name[k], found; names = "" }
                }
                if (names != "") print FNR, "unplaced", names, "-"
            }
            if (column[i] == "lines" && cell[i] + 0) { file = cell[2]; gsub(/[` ]/, "", file); print FNR, "lines", cell[i] + 0, file }
            if (column[i] == "pinnedby") {
                text = cell[i]
                while (match(text, /`[^`]+`/)) { print FNR, "case", substr(text, RSTART + 1, RLENGTH - 2), "-"; text = substr(text, RSTART + RLENGTH) }
            }
        }
        table++
    }
    !/^\|/ { table = 0; split("", column) }
    {
        text = $0
        while (match(text, /`[^`]+`/)) {
            code = substr(text, RSTART + 1, RLENGTH - 2); text = substr(text, RSTART + RLENGTH)
            n = split(code, word, /[ =\[\],]+/)
            if (word[1] == "make" && n > 1) print FNR, "target", word[2], "-"
            for (i = 1; i <= n; i++) {
                if (word[i] ~ /^--[a-z]/ && word[1] !~ /^tests/) print FNR, "option", word[i], "-"
                if (word[i] ~ /^(tests|build|weights)\/[^*{]*$/ && word[i] ~ /[a-z0-9]$/) print FNR, "file", word[i], "-"
            }
        }
    }' README.md >"$out/names"
while read -r line kind name file; do
    case $kind in
    name) grep -qw -- "$name" "$file" 2>/dev/null || { fail "$line: no $name in $file"; continue; } ;;
    unplaced) fail "$line: a cell \`where\` has no name in front of a file:$name"; continue ;;
    lines) awk -v stated="$name" 'END { exit !(NR <= 1.1 * stated && NR >= 0.9 * stated) }' "$file" ||
        { fail "$line: $file has $(awk 'END { print NR }' "$file") lines, not $name"; continue; } ;;
    target) grep -qE "^($name|.* $name)( .*)?:" Makefile || { fail "$line: no target $name in the Makefile"; continue; } ;;
    case) [ -e "tests/golden/cases/$name" ] || [ -e "tests/golden/extra/cases/$name" ] || [ -e "tests/golden/$name.safetensors" ] ||
        { fail "$line: no golden case $name"; continue; } ;;
    option) grep -q -- "$name" "$out/help" || { fail "$line: no option $name in ruyi --help"; continue; } ;;
    file) [ -e "$name" ] || [ -e "tests/golden/$name" ] || grep -q "$name" Makefile || { fail "$line: no $name"; continue; } ;;
    esac
    pass
done <"$out/names"

echo "$passed passed, $failed failed$([ "$skipped" -gt 0 ] && echo ", $skipped skipped")"
[ "$failed" -eq 0 ]
