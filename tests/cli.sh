#!/bin/sh
# The command line as its user meets it: what is refused, with which words and exit code, and what is left behind.
#
#     tests/cli.sh RUYI           RUYI: the program
#
# The golden cases say whether the numbers are right; these checks say whether mistakes are named, outputs appear whole
# or not at all, and options mean what --help says. A refusal is right when the exit code is, when standard error has
# exactly one line with the telling words, when standard output has nothing, and when the output folder is as before.
# Prints a line for every check that fails (name, expected, got), and `N passed, N failed` at the end.
#
# Models are the golden pack's, altered in copies: JSON by sed, the header of a safetensors file likewise (its length is
# corrected), numbers by dd. All is at 16 x 16 pixels, one step, so that a run takes a hundredth of a second.

[ $# -eq 1 ] && [ -x "$1" ] || { echo "usage: tests/cli.sh PATH_TO_RUYI" >&2; exit 2; }
LC_ALL=C
export LC_ALL
ruyi=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
models=$root/tests/golden/models
base=$models/tiny-b             # all F16; slices of 8 frames; latents / 8
tmp=$(mktemp -d) || exit 3
running=
trap 'rm -rf "$tmp"; [ -z "$running" ] || kill "$running" 2>/dev/null' EXIT
trap 'exit 3' HUP INT TERM
out=$tmp/out                    # the current folder of every run
model=$tmp/model                # an altered copy of $base
in=$tmp/in                      # pictures and tensors to be read
mkdir "$out" "$in"
exec </dev/null
# Threads gain nothing here, and wait for each other on a busy machine; they have a section of their own.
OMP_NUM_THREADS=1
export OMP_NUM_THREADS

passed=0
failed=0
skipped=0

# ---------------------------------------------------------------- checks

good() { passed=$((passed + 1)); }
bad() {                 # NAME EXPECTED GOT: one line, cut where it is long
    failed=$((failed + 1))
    printf "%s\n" "FAILED $1: expected $2, got $3" | tr "\n" " " | cut -c 1-400
}
skip() {                # NAME REASON
    skipped=$((skipped + 1))
    echo "skipped $1: $2"
}
equal() {               # NAME EXPECTED GOT
    if [ "$2" = "$3" ]; then good; else bad "$1" "'$2'" "'$3'"; fi
}
matches() {             # NAME PATTERN TEXT: PATTERN, as in case, is somewhere in TEXT
    case $3 in *$2*) good ;; *) bad "$1" "*$2*" "'$3'" ;; esac
}
same() {                # NAME FILE FILE
    if cmp -s "$2" "$3"; then good; else bad "$1" "the same bytes" "$(cmp "$2" "$3" 2>&1)"; fi
}
differ() {              # NAME FILE FILE
    if [ -s "$2" ] && [ -s "$3" ] && ! cmp -s "$2" "$3"; then good; else bad "$1" "other bytes" "the same, or none"; fi
}

# Runs the program in $out; sets status, and fills stdout and stderr in $tmp.
call() {
    (cd "$out" && exec "$ruyi" "$@") >"$tmp/stdout" 2>"$tmp/stderr"
    status=$?
}
bytes() { wc -c <"$1" | tr -d " "; }
clean() { rm -rf "$out" && mkdir "$out"; }
listing() { (cd "$out" && ls -A | tr '\n' ' '); }
snapshot() { (cd "$out" && ls -AR && find . -type f -exec cksum {} +); }

# fails NAME CODE PATTERN ARGUMENT...: the run is refused, in the empty $out. fails_here: in $out as it is.
fails() { clean && fails_here "$@"; }
fails_here() {
    name=$1 code=$2 pattern=$3
    shift 3
    snapshot >"$tmp/before"
    call "$@"
    snapshot >"$tmp/after"
    line=$(cat "$tmp/stderr")
    lines=$(wc -l <"$tmp/stderr" | tr -d " ")
    strange=$(tr -d '[:print:]\n' <"$tmp/stderr" | wc -c | tr -d " ")
    if [ "$status" -ne "$code" ]; then
        bad "$name" "exit code $code" "$status: $line"
    elif [ "$lines" -ne 1 ] || [ "$strange" -ne 0 ]; then
        bad "$name" "one line of printable characters" "$lines lines, $strange others: $line"
    elif [ -s "$tmp/stdout" ]; then
        bad "$name" "nothing on standard output" "$(head -n 1 "$tmp/stdout")"
    elif ! cmp -s "$tmp/before" "$tmp/after"; then
        bad "$name" "nothing left behind" "$(listing)"
    else
        case $line in "ruyi: "*$pattern*) good ;; *) bad "$name" "'ruyi: *$pattern*'" "'$line'" ;; esac
    fi
}

# works NAME FILES ARGUMENT...: ends with 0, and the empty $out holds FILES (separated by spaces) afterwards, alone.
works() { clean && works_here "$@"; }
works_here() {
    name=$1 files=$2
    shift 2
    call "$@"
    found=$(listing)
    if [ "$status" -ne 0 ]; then
        bad "$name" "exit code 0" "$status: $(tail -n 1 "$tmp/stderr")"
    elif [ "$found" != "$files${files:+ }" ]; then
        bad "$name" "the files '$files'" "'$found'"
    else
        good
    fi
}

# A shortest run of $base, without progress. Further options come after it, and win.
small="--size 16x16 --frames 1 --steps 1 -q"
# refused NAME PATTERN OPTION...: such a run of $base with these options fails with 2. takes: it works.
refused() { name=$1 pattern=$2; shift 2; fails "$name" 2 "$pattern" -m "$base" $small -o x.y4m "$@"; }
takes() { name=$1; shift; works "$name" x.y4m -m "$base" $small -o x.y4m "$@"; }

# ---------------------------------------------------------------- things to read

# picture KIND W H SEED: on standard output. P6, P3, P5; deep: P6 of 16 bits; grey: the P6 that a P5 stands for. The three
# samples of P6, P3 and deep are the same. All are characters that every awk can print.
picture() {
    awk -v kind="$1" -v w="$2" -v h="$3" -v seed="$4" 'BEGIN {
        grey = kind == "P5" || kind == "grey"
        printf "%s\n# a comment\n%d %d\n%d\n", kind == "P3" || kind == "P5" ? kind : "P6", w, h, kind == "deep" ? 65535 : 255
        for (i = 0; i < w * h * (grey ? 1 : 3); i++) {
            v = 33 + (seed * 37 + i * i % 1009 * 7 + i) % 94
            if (kind == "P3") printf "%d\n", v
            else for (copies = kind == "deep" ? 2 : kind == "grey" ? 3 : 1; copies > 0; copies--) printf "%c", v
        }
    }'
}

# The eight little-endian bytes of a number.
length8() { printf "$(awk -v n="$1" 'BEGIN { for (i = 0; i < 8; i++) { printf "\\%03o", n % 256; n = int(n / 256) } }')"; }
header_length() { od -A n -t u1 -N 4 "$1" | awk '{ print $1 + 256 * ($2 + 256 * ($3 + 256 * $4)) }'; }
header() { dd if="$1" bs=1 skip=8 count="$(header_length "$1")" 2>/dev/null; }

# tensors HEADER DATA: a safetensors file on standard output; DATA is a format of printf.
tensors() {
    length8 "${#1}"
    printf '%s' "$1"
    printf "$2"
}
# One F32 tensor of two numbers.
pair() { tensors "{\"$1\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}" "$2"; }

# Frames of 16 x 16 in a Y4M file: after the line of the header, each has "FRAME", a newline, and 256 + 64 + 64 samples.
frames_of() { [ -f "$1" ] && echo $((($(bytes "$1") - $(head -n 1 "$1" | wc -c)) / 390)); }

# The first byte of a tensor in its file.
offset() {              # FILE KEY
    header "$1" | awk -v key="\"$2\":{" -v start="$((8 + $(header_length "$1")))" '{
        rest = substr($0, index($0, key))
        rest = substr(rest, index(rest, "\"data_offsets\":[") + 16)
        print start + rest
    }'
}

fresh_model() { rm -rf "$model" && cp -R "$base" "$model"; }

# alter FILE SCRIPT: in a fresh copy of $base, FILE as sed's SCRIPT changes it: a JSON file, or a safetensors' header.
alter() {
    fresh_model
    case $1 in
    *.safetensors)
        header "$base/$1" | sed "$2" | tr -d '\n' >"$tmp/header"
        { length8 "$(bytes "$tmp/header")"; cat "$tmp/header"; tail -c +$((9 + $(header_length "$base/$1"))) "$base/$1"; } \
            >"$model/$1" ;;
    *) sed "$2" "$base/$1" >"$model/$1" ;;
    esac
    if cmp -s "$base/$1" "$model/$1"; then bad "sed '$2' $1" "a change" "none"; fi
}

# broken NAME FILE SCRIPT PATTERN OPTION...: $base with FILE altered is refused. harmless: it makes no difference.
broken() {
    name=$1 pattern=$4
    alter "$2" "$3"
    shift 4
    fails "$name" 2 "$pattern" -m "$model" $small -o x.y4m "$@"
}
harmless() {
    name=$1
    alter "$2" "$3"
    shift 3
    takes "$name (as it was)" "$@"
    cp "$out/x.y4m" "$tmp/unaltered.y4m"
    works "$name" x.y4m -m "$model" $small -o x.y4m "$@"
    same "$name, same bytes" "$tmp/unaltered.y4m" "$out/x.y4m"
}

for i in 1 2 3 4 5 6; do picture P6 16 16 $i >"$in/$i.ppm"; done
i1="-i $in/1.ppm"       # needs word splitting: see that the folder has no space
case $in in *" "*) echo "the temporary folder has a space in its name: $tmp" >&2; exit 3 ;; esac
dit=transformer/diffusion_pytorch_model.safetensors
vae=vae/diffusion_pytorch_model.safetensors
clip=image_encoder/model.safetensors

# ---------------------------------------------------------------- the model folder

fails "no such model" 2 'nowhere/model_index.json*No such file' -m nowhere $small -o x.y4m
fails "no model at all" 2 '--model' $small -o x.y4m
fails "an empty name of a model" 2 '--model' -m '' $small -o x.y4m
fails "a model that is a file" 2 'Not a directory' -m "$in/1.ppm" $small -o x.y4m
for part in model_index.json transformer/config.json vae/config.json image_encoder/config.json \
    image_encoder/preprocessor_config.json scheduler/scheduler_config.json embeddings.safetensors $dit $vae $clip; do
    fresh_model
    rm "$model/$part"
    fails "no $part" 2 "$part" -m "$model" $small -o x.y4m
done
fresh_model
rm "$model/vae/config.json" && mkdir "$model/vae/config.json"
fails "a folder for vae/config.json" 2 'vae/config.json*directory' -m "$model" $small -o x.y4m

json=transformer/config.json
broken "JSON cut off" $json '$d' "$json: JSON*byte"
broken "JSON with a comma too many" $json 's/"time_position_encoding": true/&,/' "$json: JSON"
broken "JSON with a comment" $json '1s/$/ \/\/ no/' "$json: JSON"
broken "JSON after the object" $json '$s/$/ x/' "$json: JSON"
broken "JSON with NaN" $json 's/"mlp_ratio": .*,/"mlp_ratio": NaN,/' "$json: JSON"
broken "JSON with Infinity" $json 's/"mlp_ratio": .*,/"mlp_ratio": Infinity,/' "$json: JSON"
broken "JSON with a byte-order mark" $json "1s/^/$(printf '\357\273\277')/" "$json: JSON"
fresh_model; : >"$model/$json"
fails "empty JSON" 2 "$json: JSON" -m "$model" $small -o x.y4m
fresh_model; printf '[1]' >"$model/$json"
fails "a list for JSON's object" 2 "$json*object" -m "$model" $small -o x.y4m
fresh_model; awk 'BEGIN { for (i = 0; i < 1000; i++) printf "[" }' >"$model/$json"
fails "JSON too deep" 2 "$json*128" -m "$model" $small -o x.y4m
broken "another pipeline" model_index.json 's/RuyiInpaintPipeline/FluxPipeline/' '_class_name*FluxPipeline*RuyiInpaintPipeline'

for field in in_channels out_channels patch_size; do
    broken "$field missing" $json "/\"$field\"/d" "$json: $field*nothing"
    broken "$field null" $json "s/\"$field\": [0-9]*/\"$field\": null/" "$json: $field"
done
broken "a string for a number" $json 's/"in_channels": 48/"in_channels": "48"/' 'in_channels*"48"*integer'
broken "a fraction for an integer" $json 's/"num_layers": 6/"num_layers": 6.0/' 'num_layers*6.0*integer'
broken "a huge integer" $json 's/"num_layers": 6/"num_layers": 99999999999999999999/' 'num_layers*99999*integer'
broken "a negative number" $json 's/"num_layers": 6/"num_layers": -6/' 'num_layers*-6'
broken "a list for a number" $json 's/"mlp_ratio": .*,/"mlp_ratio": [1,/
    s/"motion_module_kwargs": null,/2], "x": 0,/' "$json*mlp_ratio"
broken "a number for a switch" vae/config.json 's/"use_tiling": false/"use_tiling": 0/' 'use_tiling*0*true or false'
broken "a number for a word" vae/config.json 's/"act_fn": "silu"/"act_fn": 5/' 'act_fn*5*string'
broken "a number for a list" vae/config.json 's/"up_block_types": \[/"up_block_types": 3, "x": [/' 'up_block_types*3*list'

broken "hidden_size is not heads * width" $json 's/"attention_head_dim": 28/"attention_head_dim": 32/' 'hidden_size*56*2 ? 32'
broken "odd num_layers" $json 's/"num_layers": 6/"num_layers": 5/' 'num_layers*5*even'
broken "n_query is no square" $json 's/"n_query": 16/"n_query": 15/' 'n_query*15*square'
broken "text heads that do not divide" $json 's/"cross_attention_dim_t5": 24/"cross_attention_dim_t5": 23/' 'cross_attention_dim_t5*23'
broken "projection_dim is not the tower's" $json 's/"projection_dim": 24/"projection_dim": 25/' '24*25*configuration'
broken "more layers than tensors" $json 's/"num_layers": 6/"num_layers": 8/' 'tensor blocks.*got none'
broken "fewer layers than tensors" $json 's/"num_layers": 6/"num_layers": 4/' 'tensor *'
broken "other activation" $json 's/gelu-approximate/geglu/' 'activation_fn*geglu*gelu-approximate'
broken "block_out_channels of another length" vae/config.json '/"block_out_channels"/{
    n
    d
}' 'block_out_channels*4'
broken "ch_mult of another length" vae/config.json '/"ch_mult"/{
    n
    d
}' 'vae/config.json'
broken "groups that do not divide" vae/config.json 's/"norm_num_groups": 2/"norm_num_groups": 3/' 'norm_num_groups*3*divisor'
broken "mid heads that do not divide" vae/config.json 's/"mid_block_num_attention_heads": 2/"mid_block_num_attention_heads": 3/' \
    'mid_block_num_attention_heads*3*divisor'
broken "image heads that do not divide" image_encoder/config.json 's/"num_attention_heads": 2/"num_attention_heads": 5/' \
    'num_attention_heads*5*divisor'
broken "latent_channels is no third" vae/config.json 's/"latent_channels": 16/"latent_channels": 8/' 'vae/*16*configuration'
broken "scaling_factor of 0" vae/config.json 's/"scaling_factor": [0-9.]*/"scaling_factor": 0/' 'scaling_factor*0'

broken "unknown block type" vae/config.json 's/"SpatialUpBlock3D"/"SpatialUpBlock4D"/' 'up_block_types*SpatialUpBlock4D'
broken "unknown mid block" vae/config.json 's/"MidBlock3D"/"MidBlock2D"/' 'mid_block_type*MidBlock2D*MidBlock3D'
broken "unknown mid attention" vae/config.json 's/"mid_block_attention_type": "spatial"/"mid_block_attention_type": "4d"/' \
    'mid_block_attention_type*4d'
broken "unknown act_fn" vae/config.json 's/"silu"/"relu"/' 'act_fn*relu*silu'
broken "unknown hidden_act" image_encoder/config.json 's/"hidden_act": "gelu"/"hidden_act": "relu"/' 'hidden_act*relu'
broken "another picture filter" image_encoder/preprocessor_config.json 's/"resample": 3/"resample": 2/' 'resample*2*3'
json=scheduler/scheduler_config.json
broken "unknown prediction_type" $json 's/"v_prediction"/"flow"/' "$json: prediction_type*flow"
broken "unknown beta_schedule" $json 's/"scaled_linear"/"sigmoid"/' 'beta_schedule*sigmoid*not supported'
broken "unknown timestep_spacing" $json 's/"leading"/"trail"/' 'timestep_spacing*trail*trailing'
broken "trained_betas of another length" $json 's/"trained_betas": null/"trained_betas": [0.1, 0.2]/' 'trained_betas*1000'
broken "Karras sigmas" $json '1s/$/ "use_karras_sigmas": true,/' 'use_karras_sigmas*true*false' --scheduler euler
harmless "Karras sigmas, which ddim does not have" $json '1s/$/ "use_karras_sigmas": true,/'
harmless "unknown fields" $json '1s/$/ "novelty": {"in": [1, null, "x"]}, "": -1e-3,/'
harmless "null for a field with a default" $json 's/"clip_sample_range": 1.0/"clip_sample_range": null/'
harmless "a default left out" $json '/"clip_sample_range"/d'
harmless "a field twice: the last holds" $json '1s/$/ "prediction_type": "flow",/'
harmless "a word written with escapes" $json 's/"v_prediction"/"\\u0076_prediction"/'
harmless "-Infinity, as diffusers writes it" $json '1s/$/ "lambda_min_clipped": -Infinity,/' --scheduler dpm++
harmless "null for n_query, which is 16 then" transformer/config.json 's/"n_query": 16/"n_query": null/'

# ---------------------------------------------------------------- tensors

key=blocks.3.attn2.to_k.weight
broken "a tensor missing" $dit "s/\"$key\"/\"blocks.3.attn2.to_x.weight\"/" "tensor $key: got none*56, 40"
broken "a tensor missing, unknown ones waived" $dit "s/\"$key\"/\"blocks.3.attn2.to_x.weight\"/" "tensor $key: got none" --allow-unknown
broken "a misshapen tensor" $dit "s/\(\"$key\":{\"dtype\":\"F16\",\"shape\":\[\)56,40/\140,56/" "tensor $key*40, 56*56, 40"
broken "a tensor of another rank" $dit "s/\(\"$key\":{\"dtype\":\"F16\",\"shape\":\[\)56,40/\11,56,40/" "tensor $key*1, 56, 40*56, 40"
broken "a tensor of integers" $dit "s/\(\"$key\":{\"dtype\":\"\)F16/\1I16/" "tensor $key*I16*F16"
broken "a tensor of an unknown type" $dit "s/\(\"$key\":{\"dtype\":\"\)F16/\1G16/" "$dit*rule 8*G16*$key"
broken "a VAE's tensor missing" $vae 's/"decoder.conv_in.bias"/"decoder.conv_in.bios"/' 'vae/*tensor decoder.conv_in.bias: got none'
broken "a tower's tensor missing" $clip 's/pre_layrnorm.weight/pre_layernorm.weight/' 'image_encoder/*tensor vision_model.pre_layrnorm.weight'
broken "an embedding misshapen" embeddings.safetensors 's/\("p.default.emb1":{"dtype":"F16","shape":\[1,\)11,40/\140,11/' \
    'tensor p.default.emb1*1, 40, 11*1, 11, 40' --camera left
extra='1s/{/{"extra.weight":{"dtype":"F16","shape":[0],"data_offsets":[0,0]},/'
for file in $dit $vae $clip; do
    broken "an unknown tensor in $file" $file "$extra" 'extra.weight*--allow-unknown'
    works "an unknown tensor in $file waived" x.y4m -m "$model" $small --allow-unknown -o x.y4m
done
harmless "an unknown tensor among the embeddings" embeddings.safetensors "$extra"

# nan NAME FILE KEY ARGUMENT...: a run of a model whose tensor KEY begins with a NaN names it. All bits set are one in
# F16 and BF16.
nan() {
    name=$1 file=$2 key=$3
    shift 3
    fresh_model
    at=$(offset "$model/$file" "$key")
    printf '\377\377' | dd of="$model/$file" bs=1 seek="$at" conv=notrunc 2>/dev/null
    fails "$name" 2 "$key" "$@"
}
run="-m $model $small -o x.y4m"
nan "NaN in a block" $dit blocks.3.attn1.to_q.weight $run
nan "NaN in a bias" $dit blocks.5.ff.net.2.bias $run
nan "NaN in the time embedding" $dit time_extra_emb.timestep_embedder.linear_1.weight $run
nan "NaN in the last layer" $dit proj_out.weight $run
nan "NaN in a decoder" $vae decoder.conv_out.weight $run
nan "NaN in an encoder" $vae encoder.conv_in.weight $run $i1
nan "NaN in a tower" $clip vision_model.encoder.layers.1.mlp.fc1.weight $run $i1
nan "NaN in an embedding" embeddings.safetensors p.default.emb1 $run --camera left
nan "NaN seen by encode" $vae encoder.conv_in.weight encode -m "$model" $i1 -q -o x.safetensors
nan "NaN seen by clip" $clip vision_model.encoder.layers.1.mlp.fc1.weight clip -m "$model" $i1 -q -o x.safetensors
# Without a picture the encoder works in smoothing only, where slices are coded once more.
base=$models/tiny-a
nan "NaN in an encoder that only smooths" $vae encoder.conv_in.weight $run --frames 16
fresh_model
works "latents of two slices" x.safetensors encode -m "$base" -q $(for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do printf "%s" "$i1 "; done) -o x.safetensors
mv "$out/x.safetensors" "$in/slices.safetensors"
nan "NaN in an encoder that only smooths, decode" $vae encoder.conv_in.weight decode -m "$model" -q -l "$in/slices.safetensors" -o x.y4m
base=$models/tiny-b

for file in $dit $vae $clip embeddings.safetensors; do
    size=$(bytes "$base/$file")
    fresh_model
    dd if="$base/$file" of="$model/$file" bs=$((size - 1)) count=1 2>/dev/null
    fails "$file a byte short" 2 "$file*rule 14" $run
done
fresh_model; dd if="$base/$dit" of="$model/$dit" bs=1000 count=1 2>/dev/null
fails "a header cut off" 2 "$dit*rule 3" $run
fresh_model; printf 'x' >>"$model/$dit"
fails "a byte too many" 2 "$dit*rule 14" $run
fresh_model; : >"$model/$dit"
fails "a safetensors file of no bytes" 2 "$dit*rule 1" $run
fresh_model; printf '\377\377\377\377\377\377\377\377{}' >"$model/$dit"
fails "a header of 2^64 - 1 bytes" 2 "$dit*rule 2" $run
fresh_model; cp "$in/1.ppm" "$model/$dit"
fails "a picture for a safetensors file" 2 "$dit*rule" $run
fresh_model; rm "$model/$dit" && mkdir "$model/$dit"
fails "a folder for a safetensors file" 2 "$dit*directory" $run

base=$models/tiny-c             # its transformer comes in two shards
index=$dit.index.json
first=diffusion_pytorch_model-00001-of-00002.safetensors
second=diffusion_pytorch_model-00002-of-00002.safetensors
works "shards" x.y4m -m "$base" $small -o x.y4m
broken "a shard outside" $index "s/\"blocks.0.attn1.to_q.bias\": *\"/&..\/transformer\//" 'blocks.0.attn1.to_q.bias*../transformer'
broken "a shard from the root" $index "s/\"blocks.0.attn1.to_q.bias\": *\"/&\/tmp\//" 'blocks.0.attn1.to_q.bias*/tmp/'
broken "a number for a shard" $index "s/\(\"blocks.0.attn1.to_q.bias\": *\)\"$first\"/\17/" 'blocks.0.attn1.to_q.bias'
broken "a shard that is not there" $index "s/$second/other.safetensors/" 'other.safetensors*No such file'
broken "a tensor in another shard" $index "s/\(\"blocks.0.attn1.to_q.bias\": *\"\)$first/\1$second/" 'blocks.0.attn1.to_q.bias'
broken "a tensor that the index leaves out" $index "s/\"blocks.0.attn1.to_q.bias\": *\"$first\",//" 'tensor blocks.0.attn1.to_q.bias'
broken "a tensor twice in an index" $index "s/\"blocks.0.attn1.to_q.bias\": *\"$first\",/&&/" 'blocks.0.attn1.to_q.bias*twice'
broken "no name for a shard" $index "s/\(\"blocks.0.attn1.to_q.bias\": *\"\)$first/\1/" 'blocks.0.attn1.to_q.bias'
broken "an index without a map" $index 's/"weight_map"/"weights"/' 'weight_map'
broken "a broken index" $index '$s/}$//' "$index: JSON"
base=$models/tiny-b

# Types that the format knows and no kernel: listed, and refused where they are needed.
tensors '{"a":{"dtype":"C64","shape":[1],"data_offsets":[0,8]},"b":{"dtype":"F4","shape":[2],"data_offsets":[8,9]}}' 123456789 >"$in/odd.safetensors"
works "info on odd types" '' info "$in/odd.safetensors"
matches "info lists odd types" 'C64 *a*F4 *b*' "$(cat "$tmp/stdout")"
fails "compare on odd types" 2 'tensor a*C64' compare "$in/odd.safetensors" "$in/odd.safetensors"

# What is refused costs less than 16 MB and a second of computing, however large the file is.
costs() {               # NAME PATTERN ARGUMENT...
    name=$1 pattern=$2
    shift 2
    (cd "$out" && ulimit -d 16384 && ulimit -t 1 && exec "$ruyi" "$@") >"$tmp/stdout" 2>"$tmp/stderr"
    equal "$name: code and lines" '2 1' "$? $(wc -l <"$tmp/stderr" | tr -d ' ')"
    matches "$name" "$pattern" "$(cat "$tmp/stderr")"
}
# sparse FILE BYTES: as long as 100 GB, with BYTES (a format of printf) at its beginning.
sparse() { printf "$2" >"$1" && dd if=/dev/null of="$1" bs=1000000 seek=100000 2>/dev/null; }
if [ "$(uname)" = Linux ] && (ulimit -d 16384) 2>/dev/null && sparse "$in/huge.safetensors" '' 2>/dev/null; then
    costs "100 GB of zeros" 'rule 5' info "$in/huge.safetensors"
    sparse "$in/huge.safetensors" '\000\341\365\005\000\000\000\000{}'
    costs "a header of 100 MB" 'rule 5' info "$in/huge.safetensors"
    sparse "$in/huge.safetensors" '\002\000\000\000\000\000\000\000{}'
    costs "100 GB that no tensor has" 'rule 14' info "$in/huge.safetensors"
    costs "100 GB to compare" 'rule 14' compare "$in/huge.safetensors" "$in/huge.safetensors"
    fresh_model
    sparse "$model/model_index.json" '{"a":1}'
    costs "100 GB of JSON" 'model_index.json*more than' info "$model"
    sparse "$in/huge.ppm" ''
    costs "100 GB for a picture" 'picture 1*P6' clip -m "$base" -i "$in/huge.ppm" -o x.safetensors
    sparse "$in/huge.ppm" 'P6 1 1 255 abcd'
    costs "100 GB after a picture" 'picture 2*P6' clip -m "$base" -i "$in/huge.ppm" -o x.safetensors
    rm -f "$in/huge.ppm" "$in/huge.safetensors"
else
    skip "files of 100 GB" "no limits on memory here, or no sparse files"
fi

# ---------------------------------------------------------------- pictures

dd if="$in/1.ppm" of="$in/short.ppm" bs=700 count=1 2>/dev/null
dd if="$in/1.ppm" of="$in/head.ppm" bs=4 count=1 2>/dev/null
: >"$in/empty.ppm"
echo 'not a picture' >"$in/text.ppm"
printf 'P6 99999999999999999999 1 255 ' >"$in/huge.ppm"
printf 'P6 2147483647 2147483647 255 ' >"$in/large.ppm"
printf 'P6 0 16 255 ' >"$in/zero.ppm"
printf 'P3 1 1 255 1 2 256' >"$in/above.ppm"
printf 'P6 1 1 65536 abcdef' >"$in/maxval.ppm"
{ cat "$in/1.ppm"; printf 'P6 16 16 255 abc'; } >"$in/second.ppm"
refused "a picture cut off" 'short.ppm*picture 1*bytes*16 x 16' -i "$in/short.ppm"
refused "a picture cut in its header" 'head.ppm*picture 1' -i "$in/head.ppm"
refused "an empty picture" 'empty.ppm*P6' -i "$in/empty.ppm"
refused "text for a picture" 'text.ppm*P6' -i "$in/text.ppm"
refused "a picture with a huge number" 'huge.ppm*width' -i "$in/huge.ppm"
refused "a picture larger than memory" 'large.ppm*2147483647' -i "$in/large.ppm"
refused "a picture without pixels" 'zero.ppm*width 0' -i "$in/zero.ppm"
refused "a sample above maxval" 'above.ppm*256' -i "$in/above.ppm"
refused "maxval above 65535" 'maxval.ppm*65536' -i "$in/maxval.ppm"
refused "the second of two pictures cut off" 'second.ppm*picture 2' -i "$in/second.ppm"
refused "no such picture" 'missing.ppm*No such file' -i "$in/missing.ppm"
refused "a folder for a picture" 'directory' -i "$in"
refused "nothing on standard input" 'standard input*picture 1*P6' -i -
refused "an end picture cut off" 'short.ppm*picture 1' $i1 -e "$in/short.ppm"
refused "a newline in a name" 'a b.ppm*No such file' -i "$(printf 'a\nb.ppm')"

eight="-m $base $small --frames 8 -o x.y4m"
works "two pictures" x.y4m $eight $i1 -i "$in/2.ppm"
mv "$out/x.y4m" "$in/two.y4m"
cat "$in/1.ppm" "$in/2.ppm" >"$in/stream.ppm"
works "two pictures in one file" x.y4m $eight -i "$in/stream.ppm"
same "two pictures in one file, same bytes" "$in/two.y4m" "$out/x.y4m"
works "two pictures from standard input" x.y4m $eight -i - <"$in/stream.ppm"
same "two pictures from standard input, same bytes" "$in/two.y4m" "$out/x.y4m"
cat "$in/stream.ppm" | works "two pictures from a pipe" x.y4m $eight -i -
works "two pictures, the order turned" x.y4m $eight -i "$in/2.ppm" $i1
differ "two pictures, the order turned, other bytes" "$in/two.y4m" "$out/x.y4m"

encode="encode -m $base -q -o x.safetensors"
for kind in P3 deep; do
    picture P6 16 16 1 >"$in/a.ppm"; picture $kind 16 16 1 >"$in/b.ppm"
    works "P6" x.safetensors $encode -i "$in/a.ppm"; mv "$out/x.safetensors" "$in/a.safetensors"
    works "$kind" x.safetensors $encode -i "$in/b.ppm"
    same "$kind is read as P6 is" "$in/a.safetensors" "$out/x.safetensors"
done
picture grey 16 16 1 >"$in/a.ppm"; picture P5 16 16 1 >"$in/b.ppm"
works "grey P6" x.safetensors $encode -i "$in/a.ppm"; mv "$out/x.safetensors" "$in/a.safetensors"
works "P5" x.safetensors $encode -i "$in/b.ppm"
same "P5 is read as grey" "$in/a.safetensors" "$out/x.safetensors"

picture P6 17 13 1 >"$in/odd.ppm"
picture P6 1 1 1 >"$in/dot.ppm"
picture P6 300 2 1 >"$in/line.ppm"
picture P6 24 16 1 >"$in/wide.ppm"
for odd in odd dot line; do
    takes "a picture of an odd size ($odd)" -i "$in/$odd.ppm"
    works "a picture of an odd size ($odd) for clip" x.safetensors clip -m "$base" -q -i "$in/$odd.ppm" -o x.safetensors
done
fails "encode: sides not multiples of 8" 2 '--image*picture 1*17 x 13*multiples of 8' $encode -i "$in/odd.ppm"
fails "encode: pictures of two sizes" 2 '--image*picture 2*24 x 16*one size' $encode $i1 -i "$in/wide.ppm"
works "encode: sides multiples of 8 only" x.safetensors $encode -i "$in/wide.ppm"

# ---------------------------------------------------------------- options

refused "unknown option" '--framse*--frames' --framse 8
refused "unknown option with a value" '--sed*--seed' --sed=8
refused "unknown letter" '-x*no such option' -x
refused "a misspelled command" 'encdoe*encode' encdoe
refused "an empty command" 'command' ''
refused "a picture without -i" '-i' "$in/1.ppm"
refused "a word too many" '-i' generate more
fails "an option of another command" 2 '--steps*encode' encode -m "$base" $i1 --steps 3 -o x.safetensors
refused "decode's option for generate" '--latents*generate' -l "$in/1.ppm"
fails "an option that info has not" 2 '--output*info' info "$base" -o x.y4m
fails "an option that compare has not" 2 '--seed*compare' compare "$in" "$in" --seed 1
for option in -m -i --image --size --seed -o --dump; do
    fails "$option at the end" 2 "$option*after it" $small $option
done
refused "a value for a switch" '--quiet=yes*no value' --quiet=yes

takes "plain"
cp "$out/x.y4m" "$in/plain.y4m"
works "--name=value" x.y4m --model="$base" --size=16x16 --frames=1 --steps=1 --quiet --output=x.y4m
same "--name=value, same bytes" "$in/plain.y4m" "$out/x.y4m"
works "another order" x.y4m -o x.y4m --steps 1 -q --frames 1 generate --size 16x16 -m "$base"
same "another order, same bytes" "$in/plain.y4m" "$out/x.y4m"
works "an option before the command" x.safetensors -m "$base" encode -q $i1 -o x.safetensors
takes "the last of an option holds" --seed 1 --seed 42
same "the last of an option holds, same bytes" "$in/plain.y4m" "$out/x.y4m"

for n in 0 -1 1.5 x '' 1001; do refused "--steps '$n'" "--steps*$n*1*1000" --steps "$n"; done
refused "--steps of dpm++, one point more than steps" '--steps*1000*999' --scheduler dpm++ --steps 1000
refused "--steps 3 of pndm" '--steps*3*4*pndm' --scheduler pndm --steps 3
takes "--steps 4 of pndm" --scheduler pndm --steps 4
for n in 0 -8 8.5 eight ''; do refused "--frames '$n'" "--frames*$n*1" --frames "$n"; done
refused "--frames 121" '--frames*121*120*--long' --frames 121
refused "--frames less than a slice" '--frames*7*8' --frames 7
takes "--frames 120" --frames 120
takes "--long" --long --frames 128
equal "--long: frames" 128 "$(frames_of "$out/x.y4m")"
works "--long up to the time table's end" '' info "$base" --size 16x16 --frames 2048 --long
refused "--long beyond the time table's end" '--frames*2056*512' --frames 2056 --long
refused "--long beyond all numbers" '--frames*99999999999999999999' --frames 99999999999999999999 --long
works "--frames 21" x.y4m -m "$base" --size 16x16 --frames 21 --steps 1 -o x.y4m
matches "--frames 21 says that it is rounded" '21*16' "$(cat "$tmp/stderr")"
equal "--frames 21: frames" 16 "$(frames_of "$out/x.y4m")"
for size in 17x16 16x17 8x8 0x16 abc 16 16x 16x16x16 -16x16 99999999999999999999x16 16X16 '' ; do
    refused "--size '$size'" '--size' --size "$size"
done
for n in 0 1 15 x '' 99999; do refused "--resolution '$n'" "--resolution*$n" --resolution "$n"; done
# --size wins over --resolution, so the size is left out here.
fails "--resolution too small for a flat picture" 2 '--resolution*16*sides' -m "$base" --frames 1 --resolution 16 -i "$in/line.ppm" -o x.y4m
works "--resolution" x.y4m -m "$base" --frames 1 --steps 1 --resolution 50 $i1 -q -o x.y4m
matches "--resolution rounds down to 16" 'W48 H48' "$(head -n 1 "$out/x.y4m")"
for cfg in x '' nan inf 1e999 7,0; do refused "--cfg '$cfg'" "--cfg*$cfg" --cfg "$cfg"; done
takes "--cfg 1" --cfg 1
cp "$out/x.y4m" "$in/off.y4m"
differ "--cfg 1 is not 7" "$in/plain.y4m" "$in/off.y4m"
for cfg in 0.5 0 -3; do
    takes "--cfg $cfg" --cfg $cfg
    same "--cfg $cfg is off, as 1 is" "$in/off.y4m" "$out/x.y4m"
done
for seed in -1 18446744073709551616 x 1.5 '' ; do refused "--seed '$seed'" "--seed*$seed" --seed "$seed"; done
takes "--seed 18446744073709551615" --seed 18446744073709551615
differ "another seed, other bytes" "$in/plain.y4m" "$out/x.y4m"
refused "--camera lfet" '--camera*lfet*left' --camera lfet
refused "--motion 5" '--motion*5' --motion 5
refused "--scheduler dmp++" '--scheduler*dmp++*dpm++' --scheduler dmp++
refused "--teacache x" '--teacache*x' --teacache x
refused "--teacache 0.1,3" '--teacache*0.1,3*three' --teacache 0.1,3
refused "--enhance-a-video for one frame" '--enhance-a-video' --enhance-a-video 1
refused "--lora without a file" 'missing.safetensors*No such file' --lora missing.safetensors:0.5
refused "--lora weighs a file more than a million" 'lora: got 1e7, expected a number from -1e6' --lora "$in/lora.safetensors:1e7"
refused "--lora with a weight that is hexadecimal" 'lora.safetensors:0x1*No such file' --lora "$in/lora.safetensors:0x1"
refused "--class without a verdict" 'class: got no --check*give --check' --class fp64
refused "--json without a verdict" 'json: got no --check*give --check' --json
pair other '12345678' >"$in/lora.safetensors"
refused "--lora for no layer" 'lora.safetensors*tensor other' --lora "$in/lora.safetensors"
many() { for i in 1 2 3 4 5 6; do printf ' %s %s' "$1" "$in/$i.ppm"; done; }
refused "six start pictures" '5' --frames 8 $(many -i)
refused "six end pictures" '5' --frames 8 $i1 $(many -e)
refused "more start pictures than frames" '--image*2 pictures*1 frame' $i1 -i "$in/2.ppm"
refused "more end pictures than frames" '--end*2 pictures*1 frame' $i1 -e "$in/1.ppm" -e "$in/2.ppm"
refused "an end picture alone" '--end*start' -e "$in/1.ppm"
fails "clip without a picture" 2 '--image*no picture*one' clip -m "$base" -o x.safetensors
fails "clip with two pictures" 2 '--image*at most 1' clip -m "$base" $i1 $i1 -o x.safetensors
fails "encode without a picture" 2 '--image' encode -m "$base" -o x.safetensors
fails "decode without latents" 2 '--latents' decode -m "$base" -o x.y4m
fails "no output" 2 '--output' -m "$base" $small
# Where start and end overlap, the end picture wins; the image tower still sees the start picture.
works "start and end on the one frame" d -m "$base" $small $i1 -e "$in/2.ppm" --dump d --dump-filter pixels
mv "$out/d/pixels.safetensors" "$in/pixels.safetensors"
works "the end picture alone on it" d -m "$base" $small -i "$in/2.ppm" --dump d --dump-filter pixels
same "the end picture wins" "$in/pixels.safetensors" "$out/d/pixels.safetensors"

# ---------------------------------------------------------------- scheduler fields

# Every field that one of the five classes has beside the common ones: refused by name where the class has it and it is
# not here, and no difference elsewhere.
set_field='1s/$/ "%s": %s,/'
field() { printf "$set_field" "$1" "$2"; }
unsupported() {         # SCHEDULERS THAT HAVE IT, FIELD VALUE
    for s in ddim euler euler_a dpm++ pndm; do
        case " $1 " in
        *" $s "*) broken "$s: $2 $3" $json "$(field "$2" "$3")" "$json: $2" --scheduler $s --steps 4 ;;
        *) harmless "$s: $2 $3" $json "$(field "$2" "$3")" --scheduler $s --steps 4 ;;
        esac
    done
}
for name in karras exponential beta; do unsupported "euler dpm++" use_${name}_sigmas true; done
unsupported "dpm++" use_lu_lambdas true
unsupported "dpm++" use_flow_sigmas true
unsupported "euler dpm++" final_sigmas_type '"sigma_min"'
unsupported "euler" interpolation_type '"log_linear"'
unsupported "euler" timestep_type '"continuous"'
unsupported "dpm++" algorithm_type '"sde-dpmsolver++"'
unsupported "dpm++" solver_type '"heun"'
unsupported "dpm++" solver_order 3
unsupported "dpm++" lambda_min_clipped -5.1
unsupported "dpm++" variance_type '"learned_range"'
for pair in 'sigma_min 0.1' 'sigma_max 5' 'solver_type "bh2"' 'euler_at_final true' 'lower_order_final false' 'variance_type "fixed_small"' \
    'flow_shift 3' 'eta 0.5'; do
    unsupported "" "${pair% *}" "${pair#* }"
done
for s in ddim dpm++; do
    clean; call -m "$base" $small --scheduler $s --steps 4 --dump d --dump-filter 'step.003.latents'
    cp "$out/d/step.003.latents.safetensors" "$in/s.safetensors"
    alter $json 's/"thresholding": false/"thresholding": true/'
    works "$s: thresholding" d -m "$model" $small --scheduler $s --steps 4 --dump d --dump-filter 'step.003.latents'
    differ "$s: thresholding, other numbers" "$in/s.safetensors" "$out/d/step.003.latents.safetensors"
done
alter $json 's/"thresholding": false/"thresholding": true/'
cp "$model/$json" "$in/json"
for pair in 'dynamic_thresholding_ratio 1.5' 'sample_max_value 0' 'sample_max_value "x"'; do
    sed -e '/dynamic_thresholding_ratio/d' -e '/sample_max_value/d' -e "$(field "${pair% *}" "${pair#* }")" "$in/json" >"$model/$json"
    fails "$pair" 2 "$json: ${pair% *}" -m "$model" $small -o x.y4m
done
alter $json "$(field skip_prk_steps true)"
works "skip_prk_steps: one step" x.y4m -m "$model" $small --scheduler pndm --steps 1 -o x.y4m
alter $json 's/"leading"/"trailing"/'
fails "trailing steps that numpy counts twice" 2 '--steps*61*62' -m "$model" $small --steps 61 -o x.y4m
works "trailing steps" x.y4m -m "$model" $small --steps 8 -o x.y4m

# ---------------------------------------------------------------- what a run changes: --lora --fp8 --vae-tiling --rng

loud="-m $base --size 16x16 --frames 1 --steps 1 -o x.y4m"
# One update of zeros: NAME, shapes of up and down. The result must not change, but the file must fit.
nothing_of() {          # BYTES
    awk -v n="$1" 'BEGIN { for (i = 0; i < n; i++) printf "\\000" }'
}
update() {              # NAME UP DOWN BYTES OF UP, OF BOTH
    tensors "{\"$1.lora_up.weight\":{\"dtype\":\"F32\",\"shape\":[$2],\"data_offsets\":[0,$4]},\"$1.lora_down.weight\":{\"dtype\":\"F32\",\"shape\":[$3],\"data_offsets\":[$4,$5]}}" \
        "$(nothing_of "$5")" >"$in/lora.safetensors"
}
takes "a run"
cp "$out/x.y4m" "$in/plain.y4m"
for name in lora_unet__blocks_0_attn1_to_q lora_unet_blocks_0_attn1_to_q blocks_0_attn1_to_q; do
    update $name 56,1 1,56 224 448
    takes "--lora, $name" --lora "$in/lora.safetensors"
    same "--lora, $name of zeros changes nothing" "$in/plain.y4m" "$out/x.y4m"
done
works "--lora says what it did" x.y4m $loud --lora "$in/lora.safetensors:-0.5"
matches "--lora says what it did" 'lora: *lora.safetensors: 1 layer updated, weight -0.5' "$(cat "$tmp/stderr")"
update lora_unet__pos_embed_proj 56,1,1,1 1,48,1,1 224 416
takes "--lora of the patch convolution" --lora "$in/lora.safetensors"
update lora_unet__pos_embed_proj 56,1,1,1 1,48,2,2 224 992
refused "--lora of a convolution with a kernel" 'pos_embed_proj.lora_down.weight*1, 48, 2, 2*1, 48, 1, 1' --lora "$in/lora.safetensors"
update lora_unet__pos_embed_proj 56,1 1,48 224 416
refused "--lora of a convolution by matrices" 'pos_embed_proj.lora_up.weight*56, 1' --lora "$in/lora.safetensors"
update lora_te1_text_model 56,1 1,56 224 448
refused "--lora of a text encoder" 'tensor lora_te1_text_model.lora_up.weight*only updates' --lora "$in/lora.safetensors"
refused "--lora of a text encoder, unknown ones waived" 'lora_te1_text_model' --lora "$in/lora.safetensors" --allow-unknown
update lora_unet__blocks_0_norm2 56,1 1,1 224 228
refused "--lora of a norm" 'blocks_0_norm2.lora_up.weight' --lora "$in/lora.safetensors"
tensors '{"blocks_0_attn1_to_q.lora_up.weight":{"dtype":"F32","shape":[56,1],"data_offsets":[0,224]}}' "$(nothing_of 224)" >"$in/lora.safetensors"
refused "half an update" 'blocks_0_attn1_to_q.lora_up.weight*alone' --lora "$in/lora.safetensors"

for value in '' weak extreme: extreme:e3m4 e4m3 lite:e4m3:x; do refused "--fp8 '$value'" '--fp8' --fp8 "$value"; done
fails "--fp8 of encode" 2 '--fp8*encode' encode -m "$base" $i1 --fp8 lite -o x.safetensors
for mode in lite strong:e5m2; do
    takes "--fp8 $mode" --fp8 $mode
    same "--fp8 $mode leaves small layers alone" "$in/plain.y4m" "$out/x.y4m"
done
noise="-m $base $small --dump d --dump-filter step.000.pred"
works "--fp8 extreme" d $noise --fp8 extreme; cp "$out/d/step.000.pred.safetensors" "$in/e4m3"
works "--fp8 extreme:e4m3" d $noise --fp8 extreme:e4m3
same "--fp8 is e4m3 if not said" "$in/e4m3" "$out/d/step.000.pred.safetensors"
works "--fp8 extreme:e5m2" d $noise --fp8 extreme:e5m2
differ "--fp8 e5m2 is not e4m3" "$in/e4m3" "$out/d/step.000.pred.safetensors"
works "no --fp8" d $noise
differ "--fp8 rounds" "$in/e4m3" "$out/d/step.000.pred.safetensors"
works "--fp8 says what it did" x.y4m $loud --fp8 extreme
matches "--fp8 says what it did" 'fp8: extreme: 149 layers*F8_E4M3' "$(cat "$tmp/stderr")"
fresh_model             # 2^15, the largest F16 but one bit, is finite there and beyond E4M3
printf '\000\170' | dd of="$model/$dit" bs=1 seek="$(offset "$model/$dit" blocks.3.attn1.to_q.bias)" conv=notrunc 2>/dev/null
fails "a weight beyond e4m3" 2 'blocks.3.attn1.to_q.bias*--fp8' -m "$model" $small --fp8 extreme -o x.y4m
works "and not beyond e5m2" x.y4m -m "$model" $small --fp8 extreme:e5m2 -o x.y4m

for value in '' some both, both,0 both,x both,16,1 both,16,-0.1 both,16,x both,16,0.5,1; do
    refused "--vae-tiling '$value'" '--vae-tiling' --vae-tiling "$value"
done
refused "--vae-tiling of less than a latent" '--vae-tiling*4 pixels' --vae-tiling both,4
fails "--vae-tiling of clip" 2 '--vae-tiling*clip' clip -m "$base" $i1 --vae-tiling both -o x.safetensors
tiled() {               # NAME OPTION SCRIPT: the option does what the altered configuration does, on larger pictures
    alter vae/config.json "$3"
    works "$1 by the configuration" x.y4m -m "$model" $small --size 48x32 $i1 -o x.y4m
    cp "$out/x.y4m" "$in/tiled.y4m"
    works "$1" x.y4m -m "$base" $small --size 48x32 $i1 -o x.y4m --vae-tiling $2
    same "$1, same bytes" "$in/tiled.y4m" "$out/x.y4m"
}
tiled "--vae-tiling both" both,32,0.5 's/"use_tiling": false/"use_tiling": true/
    s/"tile_sample_min_size": [0-9]*/"tile_sample_min_size": 32/
    s/"tile_overlap_factor": [0-9.]*/"tile_overlap_factor": 0.5/'
tiled "--vae-tiling decoder" decoder,32 's/"use_tiling_decoder": false/"use_tiling_decoder": true/
    s/"tile_sample_min_size": [0-9]*/"tile_sample_min_size": 32/'
tiled "--vae-tiling encoder" encoder,16,0 's/"use_tiling_encoder": false/"use_tiling_encoder": true/
    s/"tile_sample_min_size": [0-9]*/"tile_sample_min_size": 16/
    s/"tile_overlap_factor": [0-9.]*/"tile_overlap_factor": 0.0/'
works "--vae-tiling none" x.y4m -m "$model" $small --size 48x32 $i1 -o x.y4m --vae-tiling none
differ "--vae-tiling none undoes the configuration's" "$in/tiled.y4m" "$out/x.y4m"
works "--vae-tiling says what it did" x.y4m $loud --size 48x32 --vae-tiling both,32,0.5
matches "--vae-tiling says what it did" 'vae tiling: tiles of 32 pixels overlapping by 0.5, 6 to encode, 6 to decode' "$(cat "$tmp/stderr")"
works "--vae-tiling of encode" x.safetensors encode -m "$base" $i1 --vae-tiling encoder,8,0 -o x.safetensors
matches "--vae-tiling of encode says what it did" 'vae tiling: *4 to encode' "$(cat "$tmp/stderr")"
works "--vae-tiling of decode" x.y4m decode -m "$base" -l "$in/slices.safetensors" --vae-tiling decoder,8,0 -o x.y4m

for value in '' gpu cuda cuda: cuda:132 cuda:x2048 cuda:132x cuda:0x2048 cuda:132x255 cuda:132x2048x1 cuda:132x2048:f16 cuda:-1x256 cpu:f32; do
    refused "--rng '$value'" '--rng' --rng "$value"
done
noise="-m $base $small --dump d --dump-filter noise"
works "no --rng" d $noise; cp "$out/d/noise.safetensors" "$in/cpu"
works "--rng cpu" d $noise --rng cuda:1x256 --rng cpu
same "--rng cpu is the default" "$in/cpu" "$out/d/noise.safetensors"
works "--rng cuda" d $noise --rng cuda:132x2048; cp "$out/d/noise.safetensors" "$in/bf16"
differ "--rng cuda has other numbers" "$in/cpu" "$in/bf16"
works "--rng cuda:132x2048:bf16" d $noise --rng cuda:132x2048:bf16
same "--rng cuda is bf16 if not said" "$in/bf16" "$out/d/noise.safetensors"
works "--rng cuda:132x2048:f32" d $noise --rng cuda:132x2048:f32
differ "--rng f32 is not bf16" "$in/bf16" "$out/d/noise.safetensors"
works "--rng with another upper half of the seed" d $noise --rng cuda:132x2048 --seed 4294967338
differ "--rng cuda takes all 64 bits of the seed" "$in/bf16" "$out/d/noise.safetensors"
works "--rng says what it did" x.y4m $loud --rng cuda:128x1536
matches "--rng says what it did" 'rng: *128 multiprocessors*1536 threads*bf16' "$(cat "$tmp/stderr")"
works "the plug-ins say what they did" x.y4m -m "$base" --size 16x16 --frames 16 --steps 5 --teacache 0.1 --enhance-a-video 2,1,1 -o x.y4m
matches "TeaCache says what it did" 'teacache: * of 5 calls used the cache' "$(cat "$tmp/stderr")"
matches "Enhance-A-Video says what it did" 'enhance-a-video: weight 2 in 3 calls' "$(cat "$tmp/stderr")"
works "-q is quiet" x.y4m $loud -q --fp8 extreme --rng cuda:1x256 --vae-tiling both,16
equal "-q is quiet" '' "$(cat "$tmp/stderr")"
for word in 'RTX 4090 cuda:128x1536' '--fp8 MODE' '--vae-tiling'; do
    call --help
    matches "--help says: $word" "$word" "$(cat "$tmp/stdout")"
done

# ---------------------------------------------------------------- outputs

frames="-m $base $small --frames 8"
fails "no such folder" 3 'none/x.y4m*No such file' $frames -o none/x.y4m
fails "no such folder for frames" 3 'none/*No such file' $frames -o none/f-%d.ppm
fails "no such folder for latents" 3 'none/x.safetensors*No such file' encode -m "$base" -q $i1 -o none/x.safetensors
fails "a file for a folder" 3 '1.ppm/x.y4m*Not a directory' $frames -o "$in/1.ppm/x.y4m"
clean; mkdir "$out/closed" && chmod 555 "$out/closed"
if [ -w "$out/closed" ]; then
    skip "a folder without rights" "this user may write everywhere"
else
    fails_here "a folder without rights" 3 'closed/x.y4m*ermission' $frames -o closed/x.y4m
    fails_here "a folder without rights for frames" 3 'closed/*ermission' $frames -o closed/f-%d.ppm
fi
if [ -d /proc/self ]; then
    fails "a folder that takes no files" 3 '/proc/x.y4m' $frames -o /proc/x.y4m
    fails "a folder that takes no frames" 3 '/proc/f-0.ppm' $frames -o /proc/f-%d.ppm
    fails "a folder that takes no latents" 3 '/proc/x.safetensors' encode -m "$base" -q $i1 -o /proc/x.safetensors
    fails "a folder that takes no dumps" 3 '/proc/' $frames --dump /proc
else
    skip "a folder that takes no files" "there is no /proc"
fi
clean; mkdir "$out/x.y4m" "$out/f-3.ppm" "$out/x.safetensors"
fails_here "a folder for the clip" 3 'x.y4m*folder' $frames -o x.y4m
fails_here "a folder for a frame" 3 'f-3.ppm*folder' $frames -o f-%d.ppm
fails_here "a folder for latents" 3 'x.safetensors*folder' encode -m "$base" -q $i1 -o x.safetensors
for name in x x.mp4 x.Y4M y4m frame.ppm frame-%s.ppm frame-%d-%d.ppm frame-%5d.ppm frame-%.ppm frame-%%.ppm '' .; do
    fails "-o '$name'" 2 'output' $frames -o "$name"
done
fails "encode -o x.y4m" 2 'x.y4m*.safetensors' encode -m "$base" -q $i1 -o x.y4m
fails "encode -o -" 2 '.safetensors' encode -m "$base" -q $i1 -o -
fails "clip -o x.y4m" 2 'x.y4m*.safetensors' clip -m "$base" -q $i1 -o x.y4m

works "frames" 'f-0000.ppm f-0001.ppm f-0002.ppm f-0003.ppm f-0004.ppm f-0005.ppm f-0006.ppm f-0007.ppm' $frames -o f-%04d.ppm
works "frames without zeros" '0.ppm 1.ppm 2.ppm 3.ppm 4.ppm 5.ppm 6.ppm 7.ppm' $frames -o %d.ppm
matches "frames are P6" 'P6 16 16 255' "$(head -n 3 "$out/0.ppm" | tr '\n' ' ')"
equal "frames have all bytes" 781 "$(bytes "$out/7.ppm")"
works "a clip" x.y4m $frames -o x.y4m
equal "the clip has as many frames" 8 "$(frames_of "$out/x.y4m")"
matches "the clip's header" 'YUV4MPEG2 W16 H16 F24:1' "$(head -n 1 "$out/x.y4m")"
cp "$out/x.y4m" "$in/clip.y4m"
works "-o -" '' $frames -o -
same "-o - gives the same bytes" "$in/clip.y4m" "$tmp/stdout"
works "progress beside -o -" '' -m "$base" --size 16x16 --frames 8 --steps 1 -o -
same "progress is on standard error" "$in/clip.y4m" "$tmp/stdout"
works "progress" x.y4m -m "$base" --size 16x16 --frames 8 --steps 3 -o x.y4m
equal "a step's end is told once" 1 "$(grep -c '^denoise step 1/3  33 %' "$tmp/stderr")"
matches "the last line says what was made" 'x.y4m: 8 frames of 16 x 16' "$(tail -n 1 "$tmp/stderr")"
works "-q" x.y4m $frames -o x.y4m
equal "-q says nothing" '' "$(cat "$tmp/stderr" "$tmp/stdout")"

clean; cat "$in/clip.y4m" "$in/clip.y4m" >"$out/x.y4m"
works_here "an older file" x.y4m $frames -o x.y4m
same "an older file is replaced whole" "$in/clip.y4m" "$out/x.y4m"
clean; echo keep >"$out/x.y4m"; echo keep >"$out/f-0.ppm"
alter $dit "s/\(\"blocks.3.attn2.to_k.weight\":{\"dtype\":\"\)F16/\1I16/"
fails_here "a refusal keeps the older file" 2 'to_k' -m "$model" $small -o x.y4m
fresh_model
printf '\377\377' | dd of="$model/$vae" bs=1 seek="$(offset "$model/$vae" decoder.conv_out.weight)" conv=notrunc 2>/dev/null
fails_here "a failure keeps the older file" 2 'decoder.conv_out.weight' -m "$model" $small -o x.y4m
fails_here "a failure keeps the older frame" 2 'decoder.conv_out.weight' -m "$model" $small -o f-%d.ppm
clean; mkdir "$out/100%s"
works_here "a folder with % in its name" '100%s' $frames -o '100%s/x.y4m'

if [ -c /dev/full ]; then
    for arguments in "$frames -o -" "--help" "--version" "info $base" "info $base/$dit" "compare $in/pixels.safetensors $in/pixels.safetensors"; do
        clean
        (cd "$out" && exec "$ruyi" $arguments) >/dev/full 2>"$tmp/stderr"
        equal "a full standard output: ${arguments%% *}" 3 $?
        matches "a full standard output: ${arguments%% *}, says so" 'standard output' "$(cat "$tmp/stderr")"
    done
    clean; ln -s /dev/full "$out/x.y4m"
    fails_here "a device for the clip" 3 'x.y4m*device' $frames -o x.y4m
else
    skip "a full standard output" "there is no /dev/full"
fi
# A limit on the size of files stands for a full disk. The shell's own files stay below it.
for target in x.y4m f-%d.ppm; do
    clean
    ((ulimit -f 1; cd "$out" && exec "$ruyi" -m "$base" --size 48x48 --frames 8 --steps 1 -q -o $target) >/dev/null 2>"$tmp/stderr"; echo $? >"$tmp/code") 2>/dev/null
    equal "a full disk: $target" "3 " "$(cat "$tmp/code") $(listing)"
    matches "a full disk: $target, says so" 'writing' "$(cat "$tmp/stderr")"
done
clean
((ulimit -f 1; cd "$out" && exec "$ruyi" -m "$base" --size 48x48 --frames 8 --steps 1 -q --dump d) >/dev/null 2>"$tmp/stderr"; echo $? >"$tmp/code") 2>/dev/null
equal "a full disk: dumps, the whole ones stay" "3 0" "$(cat "$tmp/code") $(ls "$out/d" | grep -c tmp)"
clean
picture P6 160 160 1 >"$in/large.ppm"
((ulimit -f 1; cd "$out" && exec "$ruyi" encode -m "$base" -q -i "$in/large.ppm" -o x.safetensors) >/dev/null 2>"$tmp/stderr"; echo $? >"$tmp/code") 2>/dev/null
equal "a full disk: latents" "3 " "$(cat "$tmp/code") $(listing)"
# A real one, where this user may mount it.
clean; mkdir "$out/small"
if mount -t tmpfs -o size=16k none "$out/small" 2>/dev/null; then
    for target in x.y4m f-%d.ppm; do
        fails_here "a small disk: $target" 3 "small/${target%%-*}*MB of disk*free" -m "$base" --size 48x48 --frames 8 --steps 1 -q -o small/$target
    done
    umount "$out/small"
else
    skip "a small disk" "this user may not mount one"
fi
# A closed descriptor is not given to a file.
clean
(cd "$out" && exec "$ruyi" $frames -o x.y4m 2>&-) >/dev/null
equal "standard error closed" "0 x.y4m " "$? $(listing)"
same "standard error closed, same bytes" "$in/clip.y4m" "$out/x.y4m"
(cd "$out" && exec "$ruyi" $frames --cfg nan -o y.y4m 2>&-) >/dev/null
equal "standard error closed, a refusal" "2 x.y4m " "$? $(listing)"
(cd "$out" && exec "$ruyi" $frames -o - >&-) 2>"$tmp/stderr"
equal "standard output closed" 3 $?
matches "standard output closed, says so" 'standard output' "$(cat "$tmp/stderr")"
(cd "$out" && exec "$ruyi" $frames -o x.y4m >&-) 2>"$tmp/stderr"
equal "standard output closed and not needed" 0 $?
(cd "$out" && exec "$ruyi" $frames -i - -o x.y4m <&-) >/dev/null 2>"$tmp/stderr"
equal "standard input closed" 3 $?
clean
{ (cd "$out" && "$ruyi" -m "$base" --size 64x64 --frames 120 --steps 1 -q -o -; echo $? >"$tmp/code") | dd bs=10 count=1; } >/dev/null 2>&1
equal "a closed pipe" 3 "$(cat "$tmp/code")"

works "encode" x.safetensors encode -m "$base" -q -i "$in/1.ppm" -i "$in/2.ppm" -i "$in/3.ppm" -i "$in/4.ppm" -i "$in/5.ppm" \
    -i "$in/6.ppm" -i "$in/stream.ppm" -o x.safetensors
cp "$out/x.safetensors" "$in/latents.safetensors"
works "info on encode's file" '' info "$in/latents.safetensors"
matches "info lists the latents" 'F32*16, 2, 2, 2*latents' "$(cat "$tmp/stdout")"
works "decode of encode's file" x.y4m decode -m "$base" -q -l "$in/latents.safetensors" -o x.y4m
equal "decode gives the frames back" 8 "$(frames_of "$out/x.y4m")"
works "clip" x.safetensors clip -m "$base" -q $i1 -o x.safetensors
cp "$out/x.safetensors" "$in/tokens.safetensors"
works "info on clip's file" '' info "$in/tokens.safetensors"
matches "info lists the tokens" 'F32*24*clip.hidden' "$(cat "$tmp/stdout")"

decode="decode -m $base -q -o x.y4m -l"
zeros=$(awk 'BEGIN { for (i = 0; i < 64; i++) printf "\\000" }')
single() { tensors "{\"$1\":{\"dtype\":\"$2\",\"shape\":$3,\"data_offsets\":[0,$4]}}" "$5" >"$in/l.safetensors"; }
single latents F32 '[16,1,1,1]' 64 "$zeros"
works "decode of the smallest latents" x.y4m $decode "$in/l.safetensors"
single letants F32 '[16,1,1,1]' 64 "$zeros"
fails "decode: no latents in the file" 2 'l.safetensors*latents' $decode "$in/l.safetensors"
single latents F32 '[4,2,2,1]' 64 "$zeros"
fails "decode: another number of channels" 2 'latents*16' $decode "$in/l.safetensors"
single latents F32 '[16,1,1]' 64 "$zeros"
fails "decode: another rank" 2 'latents*16' $decode "$in/l.safetensors"
single latents F32 '[16,0,1,1]' 0 ''
fails "decode: no latent frames" 2 'latents' $decode "$in/l.safetensors"
single latents I32 '[16,1,1,1]' 64 "$zeros"
fails "decode: latents of integers" 2 'latents*I32*F32' $decode "$in/l.safetensors"
for type in F64,128 F16,32 BF16,32; do
    single latents ${type%,*} '[16,1,1,1]' ${type#*,} "$(printf '%s' "$zeros$zeros" | cut -c 1-$((4 * ${type#*,})))"
    works "decode of latents of ${type%,*}" x.y4m $decode "$in/l.safetensors"
done
single latents F32 '[16,1,1,1]' 64 "\\377\\377\\377\\377${zeros#????????????????}"
fails "decode: NaN in the latents" 2 'latents' $decode "$in/l.safetensors"
fails "decode: no such file" 2 'missing.safetensors*No such file' $decode missing.safetensors
fails "decode: a picture for latents" 2 '1.ppm*rule' $decode "$in/1.ppm"

# ---------------------------------------------------------------- compare

one='\000\000\200\077'; two='\000\000\000\100'; nan='\000\000\300\177'; nothing='\000\000\000\000'
pair a "$one$two" >"$in/a"; pair a "$one$one" >"$in/differs"; pair a "$one$nan" >"$in/nan"; pair b "$one$two" >"$in/b"
pair a "$nothing$nothing" >"$in/zero"
tensors '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}' \
    "$one$two$one$two" >"$in/both"
tensors '{"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}' "$one$two" >"$in/shape"
tensors '{"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}' "$one$two" >"$in/integers"
printf '\002\000\000\000\000\000\000\000{}' >"$in/none"
mkdir "$in/folder" "$in/hollow" && cp "$in/a" "$in/folder/a.safetensors" && cp "$in/b" "$in/folder/b.safetensors"
compares() {            # NAME CODE PATTERN GOLDEN MINE: the verdict is the last line; only what differs has more
    clean
    call compare "$4" "$5"
    equal "$1" "$2" "$status"
    [ "$2" -ne 0 ] || equal "$1, in one line" 1 "$(wc -l <"$tmp/stdout" | tr -d ' ')"
    matches "$1, says so" "$3" "$(tail -n 1 "$tmp/stdout")"
}
compares "compare: same" 0 'same: 1 tensor' "$in/a" "$in/a"
compares "compare: file and folder" 0 'same: 2 tensors' "$in/both" "$in/folder"
compares "compare: more in the second" 0 'same: 1 tensor*1 only in' "$in/a" "$in/both"
compares "compare: other numbers" 1 'differs first: a*1 of 1 tensor' "$in/a" "$in/differs"
compares "compare: one missing" 1 'differs first: b*nothing' "$in/both" "$in/a"
compares "compare: NaN in the second" 1 'a: rel-L2 nan*expected 2, got nan' "$in/a" "$in/nan"
compares "compare: NaN in the first" 1 'a' "$in/nan" "$in/a"
compares "compare: NaN in both" 1 'a' "$in/nan" "$in/nan"
compares "compare: another shape" 1 'a*1, 2*2' "$in/a" "$in/shape"
compares "compare: integers for floats" 1 'I32*F32' "$in/a" "$in/integers"
compares "compare: zero is equal to zero" 0 'same' "$in/zero" "$in/zero"
compares "compare: zero is not one" 1 'differs' "$in/zero" "$in/a"
fails "compare: nothing in common" 2 'no tensor' compare "$in/a" "$in/b"
fails "compare: no tensors at all" 2 'no tensor' compare "$in/none" "$in/none"
fails "compare: an empty folder" 2 'no tensor' compare "$in/hollow" "$in/folder"
fails "compare: no such file" 2 'missing*No such file' compare "$in/a" missing
fails "compare: no such golden file" 2 'missing*No such file' compare missing "$in/a"
fails "compare: a file that is none" 2 '1.ppm*rule' compare "$in/a" "$in/1.ppm"
fails "compare: one name" 2 'compare: got too few words*GOLDEN*MINE' compare "$in/a"
fails "compare: three names" 2 'word too many' compare "$in/a" "$in/a" "$in/a"
fails "compare: unknown class" 2 'class*fp8*fp32' compare --class fp8 "$in/a" "$in/a"
clean; call compare -v "$in/both" "$in/folder"
equal "compare -v: a line a tensor, and the sum" 3 "$(wc -l <"$tmp/stdout" | tr -d ' ')"
clean; call compare "$in/a" "$in/differs"
matches "compare: the measures of what differs" 'rel-L2*slice*element*bias*ulps of fp32*cosine' "$(cat "$tmp/stdout")"
clean; call compare --json --class bf16 "$in/a" "$in/differs"
matches "compare --json" '{"same":false,"class":"bf16",*"first":"a"*"measures":*}' "$(cat "$tmp/stdout")"

# ---------------------------------------------------------------- info, help, version

works "info on a model" '' info "$base"
text=$(cat "$tmp/stdout")
for word in transformer: vae: image_encoder: scheduler: embeddings: parameters 'a run of*frames*MB of activations' 'not read: *_class_name'; do
    matches "info says: $word" "$word" "$text"
done
equal "info has nothing on standard error" '' "$(cat "$tmp/stderr")"
works "info with a size" '' info "$base" --size 32x16 --frames 8
matches "info with a size says the run" 'a run of 32 x 16, 8 frames' "$(cat "$tmp/stdout")"
works "info -m" '' info -m "$base"
works "info -v" '' info "$base" -v
matches "info -v lists tensors" 'F16*56, 40*blocks.0.attn2.to_k.weight' "$(cat "$tmp/stdout")"
works "info on a VAE alone" '' info "$models/vae-none"
matches "info on a VAE alone says so" 'vae:*channels' "$(cat "$tmp/stdout")"
works "info on a file" '' info "$base/$dit"
matches "info on a file lists tensors" 'F16*56, 40*blocks.0.attn2.to_k.weight' "$(cat "$tmp/stdout")"
fails "info on nothing" 2 'info' info
fails "info on a folder that is none" 2 'nowhere' info nowhere
fails "info on another folder" 2 'model_index.json' info "$in"
fails "info on a picture" 2 '1.ppm' info "$in/1.ppm"
fails "info on a missing file" 2 'missing.safetensors*No such file' info missing.safetensors
cp "$in/1.ppm" "$in/bad.safetensors"
fails "info on a broken file" 2 'bad.safetensors*rule' info "$in/bad.safetensors"
alter transformer/config.json 's/"num_layers": 6/"num_layers": 5/'
fails "info on a broken model" 2 'num_layers*even' info "$model"
works "info --check" '' info --check "$base"
matches "info --check says that all is well" 'every number is finite' "$(cat "$tmp/stdout")"
works "info --check on a VAE alone" '' info --check "$models/vae-none"
works "info --check on a file" '' info --check "$base/$dit"
checked() {             # NAME LINES PATTERN ARGUMENT...: --check finds as many
    name=$1 lines=$2 pattern=$3
    shift 3
    clean
    call info --check "$@"
    equal "$name: code and lines" "2 $lines" "$status $(wc -l <"$tmp/stderr" | tr -d ' ')"
    matches "$name" "$pattern" "$(cat "$tmp/stderr")"
}
fresh_model
set_number() { printf "$3" | dd of="$model/$1" bs=1 seek="$(offset "$model/$1" "$2")" conv=notrunc 2>/dev/null; }
set_number $dit blocks.3.attn1.to_q.weight '\377\377'
checked "info --check with NaN" 1 "$dit: tensor blocks.3.attn1.to_q.weight: got nan at element 0" "$model"
checked "info --check on a file with NaN" 1 "blocks.3.attn1.to_q.weight" "$model/$dit"
set_number $vae decoder.conv_out.weight '\000\374'
set_number $clip vision_model.post_layernorm.weight '\000\174'
set_number embeddings.safetensors p.default.emb2 '\000\176'
checked "info --check in four files, also what no run reads" 4 '*conv_out.weight: got inf*post_layernorm.weight: got inf*to_q*emb2: got nan' "$model"
alter embeddings.safetensors 's/\("p.16x9movie4up.emb1":{"dtype":"F16","shape":\[1,\)11,40/\140,11/'
checked "info --check of a row that only another camera asks for" 1 'tensor p.16x9movie4up.emb1*1, 40, 11*1, 11, 40' "$model"
alter $dit 's/"blocks.3.attn2.to_k.weight"/"blocks.3.attn2.to_x.weight"/'
checked "info --check of a name" 1 'tensor blocks.3.attn2.to_k.weight: got none' "$model"
for option in --help -h --version; do
    works "$option" '' $option
    equal "$option has nothing on standard error" '' "$(cat "$tmp/stderr")"
done
matches "--version" 'ruyi ' "$(cat "$tmp/stdout")"
works "--help beside anything" '' encode --help
works "no arguments" ''
for word in --frames --camera --dump 'Examples' ' encode ' ' compare '; do
    matches "--help says: $word" "$word" "$(cat "$tmp/stdout")"
done

# ---------------------------------------------------------------- the plan and the process

# What the process takes at most, beside the plan: weights, the picture, the program itself.
{ printf 'P6 1280 1280 255\n' && head -c 4915200 /dev/zero; } >"$in/black.ppm"
works "a run of 180 MB" 'p x.safetensors' encode -m "$base" -i "$in/black.ppm" -o x.safetensors -v --progress p
planned=$(sed -n 's/^memory: \([0-9.]*\) MB planned.*/\1/p' "$tmp/stderr")
taken=$(sed -n 's/.*"peak_memory":\([0-9]*\).*/\1/p' "$out/p" | tail -n 1)
equal "the process takes what is planned, within a tenth" 1 \
    "$(awk -v p="$planned" -v t="$taken" 'BEGIN { t /= 1e6; print (p > 150 && t > 0.9 * p && t < 1.1 * p) ? 1 : p " MB planned, " t " MB taken" }')"

# ---------------------------------------------------------------- dumps

full="-m $base $small --frames 8 $i1"
works "no dump" x.y4m $full -o x.y4m
cp "$out/x.y4m" "$in/nodump.y4m"
works "dump" 'd x.y4m' $full -o x.y4m --dump d
same "a dump changes nothing" "$in/nodump.y4m" "$out/x.y4m"
for name in pixels mask mask_latents masked_latents clip.hidden noise timesteps step.000.pred step.000.latents decoded video frames; do
    [ -s "$out/d/$name.safetensors" ] && good || bad "dump of $name" "a file" "none"
done
equal "a dump's file holds its tensor" 1 "$("$ruyi" info "$out/d/step.000.pred.safetensors" | grep -c ' step.000.pred$')"
cp -R "$out/d" "$in/d"
compares "a dump is what it is" 0 'same' "$in/d" "$in/d"
works "dump without an output" d $full --dump d --dump-filter frames --dump-filter 'step.*.pred'
equal "--dump-filter" 'frames.safetensors step.000.pred.safetensors ' "$(ls "$out/d" | tr '\n' ' ')"
works "--dump-filter that matches nothing" d $full --dump d --dump-filter 'no such stage'
fails "--dump below a file" 3 'Not a directory' $full -o x.y4m --dump "$in/1.ppm/d"
fails "--dump into a file" 3 '1.ppm' $full -o x.y4m --dump "$in/1.ppm"
fails "--dump below nothing" 3 'none/d*No such file' $full -o x.y4m --dump none/d

# ---------------------------------------------------------------- inject, stop-after, check

again() {               # NAME STAGE OPTION...: the stage, made again with these options, is the same tensor
    name=$1 stage=$2
    shift 2
    works "$name" d $full --dump d --dump-filter "$stage" --stop-after "$stage" "$@"
    same "$name: the same tensor" "$in/d/$stage.safetensors" "$out/d/$stage.safetensors"
}
works "inject latents" x.y4m $full -o x.y4m --inject "$in/d:step.000.latents"
same "inject latents: the same frames" "$in/nodump.y4m" "$out/x.y4m"
works "inject frames" x.y4m $full -o x.y4m --inject "$in/d/frames.safetensors"
same "inject frames: the same frames" "$in/nodump.y4m" "$out/x.y4m"
for stage in mask_latents clip.hidden step.000.text step.000.patch step.000.block.00 step.000.block.03.attn1 step.000.block.04.skip \
    step.000.block.05 step.000.norm_out step.000.out step.000.pred step.000.latents decoded video; do
    again "make $stage from all before it" $stage --inject "$in/d"
    again "make $stage from nothing" $stage
done
again "one block from its own inputs" step.000.block.01 --inject "$in/d:step.000.block.00" --inject "$in/d:step.000.t*" --inject "$in/d:step.000.image"
(cd "$out" && "$ruyi" -m "$base" --size 16x16 --frames 8 --steps 1 $i1 --dump d --stop-after step.000.block.01 --inject "$in/d") >"$tmp/stdout" 2>"$tmp/stderr"
matches "inject says how many stages are given" 'inject: * stages are given' "$(cat "$tmp/stderr")"
case $(cat "$tmp/stderr") in *encode*|*clip*) bad "inject skips what nobody asks for" "no encoding" "$(cat "$tmp/stderr")" ;; *) good ;; esac
fails "inject: no such file" 2 'missing*No such file' $full -o x.y4m --inject missing
fails "inject: no stage of that name" 2 '--inject*name of a stage' $full -o x.y4m --inject "$in/a"
fails "inject: nothing matches" 2 '--inject*name of a stage' $full -o x.y4m --inject "$in/d:none"
fails "inject: another size" 2 'noise: got*expected F64, F32, F16 or BF16 \[16, 2, 2, 4\]' -m "$base" --size 32x16 --frames 8 --steps 1 $i1 -q -o x.y4m --inject "$in/d/noise.safetensors"
fails "inject: not with TeaCache" 2 '--inject*teacache' $full -o x.y4m --inject "$in/d" --teacache 0.1
fails "stop-after: no such stage" 2 '--stop-after*step.000.blok.00' $full --dump d --stop-after step.000.blok.00
fails "stop-after with an output" 2 '--stop-after*-o' $full -o x.y4m --stop-after noise
fails "stop-after without a dump" 2 '--stop-after*--dump' $full --stop-after noise
judged() {              # NAME CODE PATTERN OPTION...
    clean; name=$1 code=$2 pattern=$3; shift 3
    call "$@"
    equal "$name" "$code" "$status"
    matches "$name, says so" "$pattern" "$(cat "$tmp/stdout")"
}
judged "check a run against its own dump" 0 'same: * tensors' $full --check "$in/d"
judged "check up to a stage" 0 'same: * tensors' $full --check "$in/d" --stop-after step.000.block.02
cp -R "$in/d" "$in/wrong"
at=$(bytes "$in/d/step.000.block.02.ff.safetensors")
dd if=/dev/zero of="$in/wrong/step.000.block.02.ff.safetensors" bs=1 seek=$((at - 400)) count=400 conv=notrunc 2>/dev/null
judged "check names the stage that differs" 1 'differs first: step.000.block.02.ff:' $full --check "$in/wrong"
cp "$in/a" "$in/wrong/nobody.safetensors" && rm "$in/wrong/step.000.block.02.ff.safetensors"
judged "check: a stage that the run does not make" 1 'a: got nothing*1 of * tensors differ' $full --check "$in/wrong"
cases=$root/tests/golden/cases
judged "check a case" 0 'dec-a-01: same' check "$cases/dec-a-01"
judged "check two cases" 0 '2 passed, 0 failed' check "$cases/dec-a-01" "$cases/clip-a-wide"
judged "check as JSON" 0 '"same":true' check --json "$cases/dec-a-01"
fails "check nothing" 2 'check: got too few words*CASE' check
judged "check what is no case" 2 '' check "$in"
matches "check what is no case, says so" 'args and expected.safetensors' "$(cat "$tmp/stderr")"

# ---------------------------------------------------------------- threads, signals

for threads in 1 2 3 7; do
    OMP_NUM_THREADS=$threads
    works "$threads threads" x.y4m -m "$models/tiny-a" --size 48x32 --frames 16 --steps 2 -q $i1 -o x.y4m
    [ $threads = 1 ] && cp "$out/x.y4m" "$in/threads.y4m"
    same "$threads threads, same bytes" "$in/threads.y4m" "$out/x.y4m"
done
OMP_NUM_THREADS=1

pause() { sleep 0.1 2>/dev/null || sleep 1; }
# start ARGUMENT...: in the background, until its temporary file is there.
start() {
    clean
    (cd "$out" && exec "$ruyi" -m "$models/tiny-a" --size 128x128 --frames 24 -q -o x.y4m "$@") >/dev/null 2>"$tmp/stderr" &
    running=$!
    tries=0
    while [ -z "$(ls -A "$out")" ] && [ $tries -lt 50 ]; do
        pause
        tries=$((tries + 1))
    done
}
finish() {
    wait $running 2>/dev/null
    status=$?
    running=
}
# What becomes of a model's file while it is in use. Each time the run is in its first steps.
use() {                 # NAME CODE PATTERN STEPS THREADS COMMAND...: COMMAND is done to $model
    name=$1 code=$2 pattern=$3 steps=$4 OMP_NUM_THREADS=$5
    shift 5
    rm -rf "$model" && cp -R "$models/tiny-a" "$model"
    start --steps $steps -m "$model"
    "$@"
    finish
    OMP_NUM_THREADS=1
    lines=$(grep -c '^ruyi: ' "$tmp/stderr")
    if [ "$code" -eq 0 ]; then
        equal "$name" '0 x.y4m 0' "$status $(listing)$lines"
    else
        equal "$name" "$code  1" "$status $(listing) $lines"
        matches "$name, says so" "$pattern" "$(cat "$tmp/stderr")"
    fi
}
cut_short() { : >"$1"; }
use "a file of the model removed" 0 '' 2 1 rm -r "$model"
cp "$out/x.y4m" "$in/used.y4m" 2>/dev/null
use "a file of the model replaced" 0 '' 2 1 mv "$model/$vae" "$model/$dit"
same "a file of the model replaced, same bytes" "$in/used.y4m" "$out/x.y4m"
for threads in 1 3; do
    use "a file of the model cut short, $threads threads" 3 "$dit: reading: got a missing page" 1000 $threads cut_short "$model/$dit"
done
use "a file of the model cut short, the VAE's" 3 "$vae: reading: got a missing page" 2 1 cut_short "$model/$vae"
use "a file of the model written to" 3 "$dit: got a file that was written to" 2 1 touch -t 200001010000 "$model/$dit"
# INT is left out: what a script starts in the background ignores it.
for signal in TERM HUP; do
    if [ -n "$({ sh -c "kill -$signal \$\$; echo ignored"; } 2>/dev/null)" ]; then
        skip "$signal ends a run" "whoever started the tests ignores it, as nohup does"
        continue
    fi
    start --steps 1000
    matches "$signal: a temporary file is there" 'x.y4m' "$(listing)"
    kill -$signal $running
    finish
    [ $status -ne 0 ] && good || bad "$signal: exit code" "not 0" 0
    equal "$signal leaves nothing" '' "$(listing)"
done
# Whoever starts the program with a signal ignored (nohup; a script's background commands) means it.
for signal in HUP INT; do
    trap '' $signal
    start --steps 2
    trap 'exit 3' $signal
    kill -$signal $running
    finish
    equal "$signal ignored from the start: the run goes on" '0 x.y4m ' "$status $(listing)"
done

# ---------------------------------------------------------------- clips: chosen frames, measure, extend, colours

eight="-m $base $small --frames 8"
works "the second of a file's pictures" x.y4m $eight -i "$in/2.ppm" -o x.y4m
cp "$out/x.y4m" "$in/chosen.y4m"
for choice in "$in/stream.ppm:1" "$in/stream.ppm:-1" "$in/stream.ppm:-1.." "$in/%d.ppm:1" "$in/%d.ppm:-5..-5"; do
    works "-i ${choice##*/}" x.y4m $eight -i "$choice" -o x.y4m
    same "-i ${choice##*/}, same bytes" "$in/chosen.y4m" "$out/x.y4m"
done
works "a choice of standard input" x.y4m $eight -i -:1 -o x.y4m <"$in/stream.ppm"
same "a choice of standard input, same bytes" "$in/chosen.y4m" "$out/x.y4m"
cp "$in/2.ppm" "$in/a:0"
works "a name that looks like a choice" x.y4m $eight -i "$in/a:0" -o x.y4m
same "a name that looks like a choice, same bytes" "$in/chosen.y4m" "$out/x.y4m"
works "the last frames of a clip" x.y4m $eight -i "$in/clip.y4m:-5.." -e "$in/clip.y4m:0" -o x.y4m
works "encode a clip" x.safetensors encode -m "$base" -q -i "$in/clip.y4m" -o x.safetensors
dd if="$in/clip.y4m" of="$in/cut.y4m" bs=600 count=1 2>/dev/null
sed '1s/C420jpeg/C420p10/' "$in/clip.y4m" >"$in/deep.y4m"
sed '1s/Ip/It/' "$in/clip.y4m" >"$in/interlaced.y4m"
head -n 1 "$in/clip.y4m" >"$in/none.y4m"
refused "a clip of more frames than pictures are taken" 'clip.y4m*got 8*at most 5*clip.y4m:-5..' --frames 8 -i "$in/clip.y4m"
refused "a frame that a clip does not have" 'frames*8..8*0..7' --frames 8 -i "$in/clip.y4m:8"
refused "frames that a clip does not have" 'frames*-9..-1*-8..-1' --frames 8 -i "$in/clip.y4m:-9.."
refused "frames turned round" 'frames*4..2' --frames 8 -i "$in/clip.y4m:4..2"
refused "a choice that is none" 'clip.y4m:x*No such file' --frames 8 -i "$in/clip.y4m:x"
refused "a series that is not there" 'none-0001.ppm*No such file' --frames 8 -i "$in/none-%04d.ppm"
refused "a clip cut off" 'cut.y4m*picture 2*384' --frames 8 -i "$in/cut.y4m:0"
refused "a clip of 10 bits" 'deep.y4m*420p10*8 bits' --frames 8 -i "$in/deep.y4m:0"
refused "an interlaced clip" 'interlaced.y4m*deinterlace' --frames 8 -i "$in/interlaced.y4m:0"
refused "a clip without frames" 'none.y4m*picture 1*FRAME' --frames 8 -i "$in/none.y4m"
refused "standard input twice, chosen" '--end*twice' --frames 8 -i -:0 -e - <"$in/stream.ppm"

# scene DX DY FRAMES: pictures of 48 x 48 of a smooth pattern that moves by (DX, DY) pixels a frame.
scene() {
    awk -v dx="$1" -v dy="$2" -v frames="$3" 'BEGIN {
        for (t = 0; t < frames; t++) {
            printf "P3 48 48 255\n"
            for (i = 0; i < 48 * 48; i++) {
                x = i % 48 - dx * t; y = int(i / 48) - dy * t
                v = int(128 + 50 * sin(x * .31 + 1) * cos(y * .23) + 40 * sin(y * .47 + x * .11))
                print v, v, 255 - v
            }
        }
    }'
}
number() { awk -v key="$1" '$1 == key { print $2 }' "$tmp/stdout"; }
for move in "static 0 0" "left 2 0" "right -3 0" "up 0 2" "down 0 -1"; do
    set -- $move
    scene $2 $3 6 >"$in/$1.ppm"
    works "measure: camera $1" '' measure "$in/$1.ppm"
    equal "measure: camera $1, says so" "$1 $2.000 $3.000" "$(number camera) $(number content_right ) $(number content_down )"
done
works "measure with pictures" '' measure "$in/left.ppm" --start "$in/left.ppm:0" --end "$in/left.ppm:5"
equal "measure: the same picture" '100.00 1.0000 100.00 1.0000' \
    "$(number start_psnr) $(number start_ssim) $(number end_psnr) $(number end_ssim)"
cp "$tmp/stdout" "$in/table"
works "measure a stream" '' measure - --start "$in/left.ppm:0" --end "$in/left.ppm:5" <"$in/left.ppm"
same "measure a stream, same numbers" "$in/table" "$tmp/stdout"
works "measure --json" '' measure "$in/left.ppm" --json
equal "measure --json has the table's keys" "$(awk '{ print $1 } END { print "seconds_a_frame" }' "$in/table" | sort)" \
    "$(sed -n 's/^  "\([a-z_]*\)": .*/\1/p' "$tmp/stdout" | sort)"
matches "measure --json, no picture" '"start_psnr": null' "$(cat "$tmp/stdout")"
printf 'denoise step 3/3\nx.y4m: 8 frames of 16 x 16, 4.0 s\n' >"$in/log"
works "measure --log" '' measure "$in/left.ppm" --log "$in/log"
equal "measure --log: the cost" 0.500 "$(number seconds_a_frame)"
works "measure pictures one by one" '' measure "$in/1.ppm" "$in/2.ppm" "$in/3.ppm"
equal "measure pictures one by one, all" 3 "$(number frames)"
fails "measure nothing" 2 'measure: got too few words*CLIP' measure
fails "measure one frame" 2 'got 1 frame' measure "$in/1.ppm"
fails "measure frames of two sizes" 2 'frame 1*24 x 16*16 x 16' measure "$in/1.ppm" "$in/wide.ppm"
fails "measure: two start pictures" 2 'got 2, expected at most 1' measure "$in/left.ppm" --start "$in/stream.ppm"
fails "measure: a log of nothing" 2 '--log*1.ppm*expected the standard error' measure "$in/left.ppm" --log "$in/1.ppm"
fails "measure: no such log" 2 '--log*missing' measure "$in/left.ppm" --log missing
fails "measure: a model" 2 '--model*measure' measure "$in/left.ppm" -m "$base"

extend="extend -m $base --frames 16 --steps 1"
works "extend" x.y4m $extend "$in/clip.y4m" -o x.y4m
equal "extend: a line for each run of key frames" 4 "$(grep -c '\.\..* .*\.' "$tmp/stderr")"
matches "extend says where it goes on" 'goes on from frames' "$(cat "$tmp/stderr")"
extend="$extend -q"
works "extend from given frames" x.y4m $extend "$in/clip.y4m" --key 1..5 -o x.y4m
equal "extend: cut, key frames dropped" $((6 + 16 - 5)) "$(frames_of "$out/x.y4m")"
works "extend three times" x.y4m $extend "$in/clip.y4m" --key -3.. --times 3 --camera left -o x.y4m
equal "extend three times: frames" $((8 + 3 * 13)) "$(frames_of "$out/x.y4m")"
works "extend one picture" x.y4m $extend "$in/1.ppm" --key 0 -e "$in/2.ppm" -o x.y4m
equal "extend one picture: frames" 16 "$(frames_of "$out/x.y4m")"
names=$(awk 'BEGIN { for (i = 0; i < 16; i++) printf "f-%02d.ppm%s", i, i < 15 ? " " : "" }')
works "extend pictures to pictures" "$names" $extend "$in/1.ppm" "$in/2.ppm" "$in/3.ppm" --key 0..2 -o f-%02d.ppm
equal "extend keeps what was there" "$(tail -c 768 "$in/3.ppm" | cksum)" "$(tail -c 768 "$out/f-02.ppm" | cksum)"
works "extend frames, chosen" x.y4m $extend "$in/%d.ppm:0..2" -o x.y4m
fails "extend nothing" 2 'extend: got too few words*CLIP' $extend -o x.y4m
fails "extend to nowhere" 2 '--output' $extend "$in/clip.y4m"
fails "extend from more than five frames" 2 '6 key frames*at most 5' $extend "$in/clip.y4m" --key 0..5 -o x.y4m
fails "extend by nothing" 2 '--frames*8*5 key frames and 3 end pictures' $extend --frames 8 "$in/clip.y4m" -e "$in/clip.y4m:0..2" -o x.y4m
fails "extend from frames that are not there" 2 '--key*8..8*0..7' $extend "$in/clip.y4m" --key 8 -o x.y4m
fails "extend again and again from one place" 2 '--key*-5..' $extend "$in/clip.y4m" --key 3 --times 2 -o x.y4m
fails "extend --key of letters" 2 '--key*x*-5..' $extend "$in/clip.y4m" --key x -o x.y4m
fails "extend no times" 2 '--times*0*1 to 1000' $extend "$in/clip.y4m" --times 0 -o x.y4m
fails "extend a clip of another size" 2 'wide.ppm*24 x 16*multiples of 16' $extend "$in/wide.ppm" -o x.y4m
fails "extend with a size" 2 '--size*extend' $extend "$in/clip.y4m" --size 32x32 -o x.y4m
fails "extend with a start picture" 2 '--image*extend' $extend "$in/clip.y4m" $i1 -o x.y4m

# The same clip as FFmpeg writes it, in limited range, and as FFmpeg reads it; extend gives a clip's own frames back.
if command -v ffmpeg >/dev/null; then
    for format in yuv420p yuv422p yuv444p; do
        ffmpeg -v error -y -i "$in/clip.y4m" -vf scale=out_range=limited -pix_fmt $format "$in/ff.y4m"
        ffmpeg -v error -y -i "$in/ff.y4m" -frames:v 1 -vf scale=flags=accurate_rnd+full_chroma_int+neighbor "$in/ff.ppm"
        clean; call $extend "$in/ff.y4m" --key 0 -o f-%d.ppm
        most=$(cmp -l "$in/ff.ppm" "$out/f-0.ppm" | awk '
            function octal(n) { return int(n / 100) * 64 + int(n / 10) % 10 * 8 + n % 10 }
            { d = octal($2) - octal($3); d = d < 0 ? -d : d; if (d > most) most = d } END { print most + 0 }')
        [ $status = 0 ] && [ -s "$in/ff.ppm" ] && [ "$most" -le 1 ] && good || bad "$format as FFmpeg reads it" "1 level at most" "$most"
    done
else
    skip "clips that FFmpeg wrote" "it is not installed"
fi

colours="-m $root/weights/ruyi-tiny -i $root/weights/start/meadow.ppm --size 64x64 --frames 8 --steps 4 -q -o x.y4m"
works "colours as they come" x.y4m $colours
cp "$out/x.y4m" "$in/free.y4m"
works "colours that stay" x.y4m $colours --keep-colour
differ "colours that stay are others" "$in/free.y4m" "$out/x.y4m"
refused "colours of no picture" '--keep-colour*no start picture' --keep-colour

# ---------------------------------------------------------------- sum

if [ $skipped -gt 0 ]; then rest=", $skipped skipped"; else rest=; fi
echo "$passed passed, $failed failed$rest"
[ $failed -eq 0 ]
