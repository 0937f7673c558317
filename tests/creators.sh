#!/bin/sh
# What creators ask of the program, asked of the embedded model: does the camera go where it was told, does motion grow
# with its level, is an end picture reached, can one see where a clip was extended. `ruyi measure` answers.
#
#     tests/creators.sh RUYI [FOLDER]     FOLDER keeps the clips; those that are there are measured, not made again
#
# About 120 clips of a second each: a quarter of an hour on two cores. Ten start pictures, all that are in
# weights/start and are no end pictures; each at its own size, 24 frames, 10 steps (the model card: as good as 25 for
# motion), seed 42. Prints its tables, a line for every promise that is not kept, and `N passed, N failed`.
[ $# -ge 1 ] && [ -x "$1" ] || { echo "usage: tests/creators.sh PATH_TO_RUYI [FOLDER]" >&2; exit 2; }
LC_ALL=C
export LC_ALL
ruyi=$1
root=$(cd "$(dirname "$0")/.." && pwd)
start=$root/weights/start
if [ -n "$2" ]; then folder=$2; mkdir -p "$folder" || exit 3; else folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT || exit 3; fi
passed=0
failed=0

# make CLIP ARGUMENT...: if it is not there.
make() {
    target=$folder/$1.y4m
    shift
    [ -s "$target" ] || "$ruyi" "$@" -q -m "$root/weights/ruyi-tiny" --frames 24 --steps 10 -o "$target" || exit 3
}
generate() {            # CLIP PICTURE OPTION...
    name=$1 picture=$2
    shift 2
    case $picture in wide | drive-start) size=160x96 ;; tall) size=96x160 ;; *) size=128x128 ;; esac
    make "$name" -i "$start/$picture.ppm" --size $size "$@"
}
# value KEY CLIP[:FRAMES] OPTION...
value() {
    key=$1 of=$2
    shift 2
    "$ruyi" measure "$folder/${of%%:*}.y4m$(expr "$of" : '[^:]*\(:.*\)')" --json "$@" | sed -n "s/^  \"$key\": \"\{0,1\}\([^\",]*\).*/\1/p"
}
# promise NAME CONDITION: CONDITION as awk has it.
promise() {
    if awk "BEGIN { exit !($2) }" </dev/null; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED $1: expected $2"
    fi
}

pictures="meadow village candy desert night winter pan-start drive-start wide tall"

echo "camera: asked for, found in how many of 10 clips, pixels a frame in each"
for camera in left right up down static; do
    found=0 speeds=
    for p in $pictures; do
        generate $p-$camera $p --camera $camera
        [ "$(value camera $p-$camera)" = $camera ] && found=$((found + 1))
        speeds="$speeds $(value camera_speed $p-$camera)"
    done
    printf '%-8s %2d %s\n' $camera $found "$speeds"
    promise "camera $camera" "$found >= 8"
done

echo "motion level, camera static: pixels a frame beside the camera's, mean and each"
before=0
for level in 1 2 3 4; do
    list=
    for p in $pictures; do
        generate $p-m$level $p --camera static --motion $level
        list="$list $(value motion $p-m$level)"
    done
    mean=$(echo $list | awk '{ for (i = 1; i <= NF; i++) sum += $i; printf "%.3f", sum / NF }')
    printf '%-8s %s %s\n' $level $mean "$list"
    promise "motion $level" "$mean > $before"
    before=$mean
done

echo "end pictures: PSNR and SSIM of the last frame and the end picture, beside those of a clip that was not given it"
for pair in pan:right drive:static; do
    p=${pair%:*} camera=${pair#*:}
    generate $p-end $p-start --camera $camera --motion 3 -e "$start/$p-end.ppm"
    generate $p-free $p-start --camera $camera --motion 3
    with=$(value end_psnr $p-end --end "$start/$p-end.ppm") without=$(value end_psnr $p-free --end "$start/$p-end.ppm")
    printf '%-8s %s %s   without %s\n' $p $with "$(value end_ssim $p-end --end "$start/$p-end.ppm")" $without
    promise "the end picture of $p" "$with > $without && $with > 20"
done

# The extended clip, 24 frames with the seam in their middle, against the clip alone: what drifts and flickers more?
echo "extended: last key frame; colour drift and flicker of the clip, then of 24 frames about the seam; largest jump of"
echo "luma in the clip, then in 5 frames about the seam"
for pair in meadow:left village:left candy:static desert:left night:right winter:down pan-start:right; do
    clip=${pair%:*}-${pair#*:}
    [ -s "$folder/$clip-longer.log" ] || "$ruyi" extend "$folder/$clip.y4m" -m "$root/weights/ruyi-tiny" --frames 24 --steps 10 \
        --camera ${pair#*:} -o "$folder/$clip-longer.y4m" 2>"$folder/$clip-longer.log" || exit 3
    last=$(sed -n 's/.*goes on from frames .*\.\.\([0-9]*\).*/\1/p' "$folder/$clip-longer.log")
    first=$((last > 11 ? last - 11 : 0))
    seam=$clip-longer:$first..$((first + 23)) near=$clip-longer:$((last - 1))..$((last + 3))
    drift="$(value colour_drift $clip) $(value colour_drift $seam)"
    flicker="$(value flicker $clip) $(value flicker $seam)"
    worst="$(value flicker_worst $clip) $(value flicker_worst $near)"
    printf '%-16s %2d   %s   %s   %s\n' $clip $last "$drift" "$flicker" "$worst"
    promise "the colours of $clip at its seam" "${drift#* } <= 1.5 * ${drift% *}"
    promise "the flicker of $clip at its seam" "${flicker#* } <= 1.5 * ${flicker% *}"
    promise "the jump of $clip at its seam" "${worst#* } <= 1.5 * ${worst% *}"
done

echo "--keep-colour: colour drift and flicker without, and with it"
for pair in winter:static night:left meadow:down; do
    clip=${pair%:*}-${pair#*:}
    generate $clip-kept ${pair%:*} --camera ${pair#*:} --keep-colour
    drift="$(value colour_drift $clip) $(value colour_drift $clip-kept)"
    flicker="$(value flicker $clip) $(value flicker $clip-kept)"
    printf '%-16s %s   %s\n' $clip "$drift" "$flicker"
    promise "the colours of $clip" "${drift#* } < ${drift% *}"
    promise "the flicker of $clip" "${flicker#* } <= 1.5 * ${flicker% *}"
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
