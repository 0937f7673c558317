#!/bin/sh
# What compilers and analysers say of the sources: gcc and clang with more warnings than the Makefile's, cppcheck,
# clang-tidy. Each finding fails, unless tests/lint.txt has a line for it: CHECK, a tab, a part of the source line that
# it points at (empty: any), a tab, and why it stands. A line there that nothing needs any more fails, too.
# A tool that is not installed is skipped by name. Ends with `N passed, N failed[, N skipped]`.
cd "$(dirname "$0")/.." || exit 3
sources="ruyi.c vae.c dit.c tensor.c io.c"
warnings="-std=c11 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wstrict-prototypes -Wvla -Wundef -Wwrite-strings -Wno-unknown-pragmas"
log=$(mktemp -d) && trap 'rm -rf "$log"' EXIT
passed=0 failed=0 skipped=0

# tell NAME: counts and prints those of FILE:LINE CHECK MESSAGE in $log/said that have no exception.
tell() {
    sort -u "$log/said" | while read -r place check message; do
        printf '%s\t%s\t%s\t%s\n' "$check" "$(sed -n "${place#*:}p" "${place%%:*}")" "$place" "$message"
    done | awk -F '\t' -v used="$log/used" '
        BEGIN { n = 0 }
        NR == FNR { if (/^[^#]/) { check[n] = $1; text[n] = $2; n++ } next }
        { for (i = 0; i < n; i++) if (check[i] == $1 && (text[i] == "" || index($2, text[i]))) { print check[i] "\t" text[i] >>used; next }
          print $3 ": " $1 ": " $4 }' tests/lint.txt - >"$log/found"
    sed "s/^/FAILED $1: /" "$log/found"
    if [ -s "$log/found" ]; then failed=$((failed + 1)); else passed=$((passed + 1)); fi
}

# is TOOL: or says that it is skipped.
is() {
    command -v "$1" >/dev/null && return 0
    echo "skipped $1: not installed"
    skipped=$((skipped + 1))
    return 1
}

for compiler in gcc clang; do
    is $compiler || continue
    for real in float double; do
        printf '%s\n' $sources | xargs -P 2 -I FILE $compiler $warnings -O2 -DREAL=$real -c FILE -o /dev/null 2>&1 | sed -n 's/^\([a-z]*\.[ch]:[0-9]*\):[0-9]*: warning: \(.*\) \[\(-W[^]]*\)\]$/\1 \3 \2/p' >"$log/said"
        tell "$compiler $real"
    done
done
if is cppcheck; then
    cppcheck -q --std=c11 --enable=warning,performance,portability --template='{file}:{line} {id} {message}' $sources 2>&1 |
        grep '^[a-z]*\.[ch]:' >"$log/said"
    tell cppcheck
fi
if is clang-tidy; then
    printf '%s\n' $sources | xargs -P 2 -I FILE clang-tidy -quiet -checks='-*,bugprone-*,clang-analyzer-*,performance-*' FILE -- -std=c11 2>/dev/null | sed -n 's/^.*\/\([a-z]*\.[ch]:[0-9]*\):[0-9]*: warning: \(.*\) \[\([^],]*\)[^]]*\]$/\1 \3 \2/p' >"$log/said"
    tell clang-tidy
fi
if [ "$skipped" -eq 0 ]; then
    grep -v '^#' tests/lint.txt | cut -f 1,2 | sort >"$log/known"
    sort -u "$log/used" 2>/dev/null | comm -23 "$log/known" - | sed 's/^/FAILED exception that nothing needs: /' >"$log/idle"
    cat "$log/idle"
    if [ -s "$log/idle" ]; then failed=$((failed + 1)); else passed=$((passed + 1)); fi
fi
echo "$passed passed, $failed failed$([ "$skipped" -gt 0 ] && echo ", $skipped skipped")"
[ "$failed" -eq 0 ]
