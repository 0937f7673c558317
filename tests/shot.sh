#!/bin/sh
# Renders one shot of a list, or goes on with it where another process was stopped.
#
#     RUYI="./ruyi -m MODEL ..." tests/shot.sh LIST N [FOLDER]
#
# LIST has a line a shot: pictures, options, and the output, -o NAME, at its end, which goes to FOLDER. N counts lines
# from 1. RUYI is the program and what all shots share. A finished shot is left as it is; a stopped one has
# FOLDER/NAME.checkpoint. Exit codes are ruyi's: after 2 another try is no use, after 3 or a kill it is.
line=$(sed -n "$2p" "$1")
out=${3:-.}/${line##* }
[ -n "$line" ] || { echo "shot.sh: $1: no line $2" >&2; exit 2; }
[ -e "$out" ] && exit 0
exec ${RUYI:-./ruyi} ${line% *} "$out" --checkpoint "$out.checkpoint"
