/* vae.c - the Casual VAE: AutoencoderKLMagvit of the public code, video to latents and back.
 *
 *     encoder   [T][H][W][3]   conv_in
 *               [T][H][W][c0]  down_blocks.0: layers_per_block residual blocks, then a downsampler (not in the last)
 *                  ...         each downsampler halves H and W; a SpatialTemporal one halves T, too
 *               [F][h][w][cL]  mid_block: residual block, then attention + residual block, layers_per_block - 1 times
 *               [F][h][w][2Z]  conv_norm_out, SiLU, conv_out; quant_conv: mean and log variance
 *     decoder   [F][h][w][Z]   post_quant_conv, conv_in, mid_block
 *               [F][h][w][cL]  up_blocks.0: layers_per_block + 1 residual blocks, then an upsampler (not in the last)
 *                  ...
 *               [T][H][W][3]   conv_norm_out, SiLU, conv_out
 *
 * A video is coded in slices along time (slice_next), a large picture in tiles (vae_tiles). What lies in front of a
 * slice is the business of the convolutions' padding mode (conv in tensor.c).
 *
 * Invariants: a slice's activations live above `floor` in the arena; every step returns one tensor there and frees
 * the one before. At most three tensors are alive at a time beside the weights: the stream, and a residual block's two.
 *
 * Mirrors: ruyi/models/autoencoder_magvit.py, ruyi/vae/ldm/models/omnigen_enc_dec.py, .../vaemodules/ of the public code.
 */
#include "ruyi.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct { layer norm1, conv1, norm2, conv2, shortcut; } resblock;    /* ResidualBlock3D */
typedef struct { layer group_norm, to_q, to_k, to_v, to_out; } attention_weights;
typedef struct { resblock *convs; layer sampler; } level;                   /* one of down_blocks or up_blocks */

/* Encoder or decoder. */
typedef struct {
    layer conv_in, conv_norm_out, conv_out;
    layer quant;                /* quant_conv or post_quant_conv, 1 x 1 x 1 */
    level levels[MAX_LEVELS];
    resblock *mid_convs;        /* [layers_per_block] */
    attention_weights *mid_attentions;    /* [layers_per_block - 1][2]: one, or spatial then temporal */
} coder;

struct vae {
    vae_config config;
    weights *weights;
    coder encoder, decoder;
};

const vae_config *vae_settings(const vae *v) { return &v->config; }
const weights *vae_weights(const vae *v) { return v->weights; }
int64_t vae_scale(const vae_config *c) { return (int64_t)1 << (c->levels - 1); }

/* ---------------------------------------------------------------- configuration */

/* down_block_types or up_block_types: which levels change the length in time, too. */
static void read_block_types(config file, const char *field, const char *direction, int64_t levels, bool *time)
{
    char *words[MAX_LEVELS], *spatial = text_of("Spatial%sBlock3D", direction), *both = text_of("SpatialTemporal%sBlock3D", direction);
    int n = config_words(file, field, words, MAX_LEVELS);
    if (n != levels)
        config_refuse(file, field, "expected as many block types as ch_mult has numbers, %lld", (long long)levels);
    for (int i = 0; i < n; i++) {
        time[i] = !strcmp(words[i], both);
        if (!time[i] && strcmp(words[i], spatial))
            config_refuse(file, field, "expected %s or %s; other block types are not supported", spatial, both);
        free(words[i]);
    }
    free(spatial);
    free(both);
}

static mid_attention read_attention_type(config file)
{
    static const char *const names[] = { "3d", "spatial", "temporal", "spatial_temporal" };
    char *word = config_word(file, "mid_block_attention_type", "3d");
    for (int i = 0; i < 4; i++)
        if (!strcmp(word, names[i])) {
            free(word);
            return (mid_attention)i;
        }
    config_refuse(file, "mid_block_attention_type", "expected 3d, spatial, temporal or spatial_temporal");
}

/* Fields that have one supported value, by one or two names. */
static void expect_word(config file, const char *field, const char *expected, const char *alias)
{
    char *word = config_word(file, field, expected);
    if (strcmp(word, expected) && strcmp(word, alias))
        config_refuse(file, field, "expected %s; nothing else is supported", expected);
    free(word);
}

static void refuse_gc_blocks(config file)
{
    json list = config_member(file, "use_gc_blocks"), cursor = { 0 }, value;
    while (json_kind(list) == '[' && json_next(list, &cursor, NULL, &value))
        if (json_kind(value) == 't')
            config_refuse(file, "use_gc_blocks", "expected null or false; global context blocks are not supported");
}

/* What must hold between fields. */
static void check_config(config file, const vae_config *c)
{
    for (int64_t i = 0; i < c->levels; i++)
        if (c->channels[i] % c->norm_num_groups)
            config_refuse(file, "norm_num_groups", "expected a divisor of the %lld channels of level %lld",
                          (long long)c->channels[i], (long long)i);
    if (c->channels[c->levels - 1] % c->mid_block_num_attention_heads)
        config_refuse(file, "mid_block_num_attention_heads", "expected a divisor of the %lld channels of the last level",
                      (long long)c->channels[c->levels - 1]);
    for (int64_t i = 0; i + 1 < c->levels; i++) {       /* up_blocks.i goes from the channels of level L-i to those of L-1-i */
        int64_t out = c->channels[c->levels - 1 - i], in = i ? c->channels[c->levels - i] : out;
        if (!c->up_time[i] && in != out)
            config_refuse(file, "up_block_types", "expected another type at %lld: SpatialUpBlock3D upsamples only where its "
                          "channels stay the same; they go from %lld to %lld", (long long)i, (long long)in, (long long)out);
    }
    if (c->block_out_channels && c->block_out_channels != c->levels)
        config_refuse(file, "block_out_channels", "expected as many numbers as ch_mult has, %lld: both give the scale of the "
                      "latents", (long long)c->levels);
    if (!(c->tile_overlap_factor >= 0 && c->tile_overlap_factor < 1))
        config_refuse(file, "tile_overlap_factor", "expected 0 <= factor < 1");
    if ((c->tile_encoder || c->tile_decoder) && (double)c->tile_latent_min_size * (1 - c->tile_overlap_factor) < 1)
        config_refuse(file, "tile_sample_min_size", "expected more, enough for tiles of the latents");
    if (!(c->scaling_factor != 0 && isfinite(c->scaling_factor)))
        config_refuse(file, "scaling_factor", "expected a number that is not 0");
}

static void read_channels(config file, vae_config *c)
{
    int64_t ch = config_int(file, "ch", 128, 1, 65536), mult[MAX_LEVELS] = { 1, 2, 4, 4 };
    int n = config_ints(file, "ch_mult", mult, MAX_LEVELS);
    c->levels = n < 0 ? 4 : n;
    if (n == 0)
        config_refuse(file, "ch_mult", "expected at least one number");
    for (int64_t i = 0; i < c->levels; i++) {
        c->channels[i] = ch * mult[i];
        if (mult[i] < 1 || mult[i] > 65536)
            config_refuse(file, "ch_mult", "expected numbers from 1 to 65536");
    }
    int64_t unused[MAX_LEVELS];
    n = config_ints(file, "block_out_channels", unused, MAX_LEVELS);
    c->block_out_channels = n < 0 ? 0 : n;
}

static vae_config read_config(const char *folder)
{
    config f = config_open(folder, "config.json");
    vae_config c = {
        .file = f, .in_channels = config_int(f, "in_channels", 3, 3, 3), .out_channels = config_int(f, "out_channels", 3, 3, 3),
        .latent_channels = config_int(f, "latent_channels", 4, 1, 4096),
        .layers_per_block = config_int(f, "layers_per_block", 2, 1, 1000),
        .norm_num_groups = config_int(f, "norm_num_groups", 32, 1, 65536),
        .scaling_factor = config_real(f, "scaling_factor", 0.1825),
        .mini_batch_encoder = config_int(f, "mini_batch_encoder", 9, 1, 100000),
        .mini_batch_decoder = config_int(f, "mini_batch_decoder", 3, 1, 100000),
        .mid_block_use_attention = config_bool(f, "mid_block_use_attention", true),
        .mid_block_attention_type = read_attention_type(f),
        .mid_block_num_attention_heads = config_int(f, "mid_block_num_attention_heads", 1, 1, 65536),
        .spatial_group_norm = config_bool(f, "spatial_group_norm", false),
        .tile_sample_min_size = config_int(f, "tile_sample_min_size", 384, 1, 1 << 20),
        .tile_overlap_factor = config_real(f, "tile_overlap_factor", 0.25),
    };
    bool mag = config_bool(f, "slice_mag_vae", true), tiling = config_bool(f, "use_tiling", false);
    c.mode = config_bool(f, "cache_compression_vae", false) ? SLICE_CACHE
           : config_bool(f, "slice_compression_vae", false) ? SLICE_COMPRESSION : mag ? SLICE_MAG : SLICE_NONE;
    c.tile_encoder = config_bool(f, "use_tiling_encoder", false) || tiling;
    c.tile_decoder = config_bool(f, "use_tiling_decoder", false) || tiling;
    read_channels(f, &c);
    c.tile_latent_min_size = c.tile_sample_min_size / vae_scale(&c);
    read_block_types(f, "down_block_types", "Down", c.levels, c.down_time);
    read_block_types(f, "up_block_types", "Up", c.levels, c.up_time);
    expect_word(f, "mid_block_type", "MidBlock3D", "MidBlock3D");
    expect_word(f, "act_fn", "silu", "swish");
    refuse_gc_blocks(f);
    check_config(f, &c);
    return c;
}

/* ---------------------------------------------------------------- weights */

static layer bind_conv3(weights *w, int64_t out, int64_t in, const char *name)
{
    return bind_convolution(w, SHAPE(out, in, 3, 3, 3), "%s", name);
}

static resblock bind_resblock(weights *w, const char *name, int64_t in, int64_t out)
{
    char *conv1 = text_of("%s.conv1", name), *conv2 = text_of("%s.conv2", name);
    resblock b = { .norm1 = bind_norm(w, in, "%s.norm1", name), .conv1 = bind_conv3(w, out, in, conv1),
                   .norm2 = bind_norm(w, out, "%s.norm2", name), .conv2 = bind_conv3(w, out, out, conv2) };
    if (in != out)
        b.shortcut = bind_convolution(w, SHAPE(out, in, 1, 1, 1), "%s.shortcut", name);
    free(conv1);
    free(conv2);
    return b;
}

static attention_weights bind_mid_attention(weights *w, const char *name, int64_t c)
{
    return (attention_weights){
        .group_norm = bind_norm(w, c, "%s.group_norm", name),
        .to_q = bind_linear(w, c, c, "%s.to_q", name), .to_k = bind_linear(w, c, c, "%s.to_k", name),
        .to_v = bind_linear(w, c, c, "%s.to_v", name), .to_out = bind_linear(w, c, c, "%s.to_out", name),
    };
}

/* NAME.N, bound as a residual block of the list. */
static void bind_resblocks(weights *w, resblock *list, int64_t count, const char *name, int64_t in, int64_t out)
{
    for (int64_t i = 0; i < count; i++) {
        char *one = text_of("%s.%lld", name, (long long)i);
        list[i] = bind_resblock(w, one, i ? out : in, out);
        free(one);
    }
}

static void bind_mid(weights *w, const vae_config *c, coder *k, const char *half)
{
    int64_t channels = c->channels[c->levels - 1], attentions = c->mid_block_use_attention ? c->layers_per_block - 1 : 0;
    bool pair = c->mid_block_attention_type == ATTEND_SPATIAL_TEMPORAL;
    char *convs = text_of("%s.mid_block.convs", half);
    k->mid_convs = allocate((size_t)c->layers_per_block, sizeof *k->mid_convs);
    bind_resblocks(w, k->mid_convs, c->layers_per_block, convs, channels, channels);
    k->mid_attentions = allocate((size_t)(2 * c->layers_per_block), sizeof *k->mid_attentions);
    for (int64_t i = 0; i < attentions * (pair ? 2 : 1); i++) {
        char *name = pair ? text_of("%s.mid_block.attentions.%lld.%lld", half, (long long)i / 2, (long long)i % 2)
                          : text_of("%s.mid_block.attentions.%lld", half, (long long)i);
        k->mid_attentions[pair ? i : 2 * i] = bind_mid_attention(w, name, channels);
        free(name);
    }
    free(convs);
}

/* up: decoder. in, out: channels of the coder's two ends. */
static void bind_coder(weights *w, const vae_config *c, coder *k, bool up)
{
    const char *half = up ? "decoder" : "encoder", *blocks = up ? "up" : "down";
    int64_t z = c->latent_channels, layers = c->layers_per_block + up, last = c->levels - 1;
    int64_t first_channels = c->channels[up ? last : 0], end_channels = c->channels[up ? 0 : last];
    k->conv_in = bind_convolution(w, SHAPE(first_channels, up ? z : c->in_channels, 3, 3, 3), "%s.conv_in", half);
    bind_mid(w, c, k, half);
    for (int64_t i = 0, in = first_channels; i <= last; i++) {
        int64_t out = c->channels[up ? last - i : i];
        char *name = text_of("%s.%s_blocks.%lld.convs", half, blocks, (long long)i);
        k->levels[i].convs = allocate((size_t)layers, sizeof *k->levels[i].convs);
        bind_resblocks(w, k->levels[i].convs, layers, name, in, out);
        if (i < last)
            k->levels[i].sampler = bind_convolution(w, SHAPE(out, out, 3, 3, 3), "%s.%s_blocks.%lld.%ssampler.conv", half, blocks,
                                                    (long long)i, blocks);
        free(name);
        in = out;
    }
    k->conv_norm_out = bind_norm(w, end_channels, "%s.conv_norm_out", half);
    k->conv_out = bind_convolution(w, SHAPE(up ? c->out_channels : 2 * z, end_channels, 3, 3, 3), "%s.conv_out", half);
    k->quant = up ? bind_convolution(w, SHAPE(z, z, 1, 1, 1), "post_quant_conv")
                  : bind_convolution(w, SHAPE(2 * z, 2 * z, 1, 1, 1), "quant_conv");
}

/* Reads folder (a model's vae/): config.json and the weights of the halves that are wanted. Decoding smooths, which
 * encodes, too, except with a cache. The other half is known and left alone; whatever else the file holds is an error
 * unless it is allowed. */
vae *vae_open(const char *folder, bool encoder, bool decoder, bool allow_unknown)
{
    vae *v = allocate(1, sizeof *v);
    v->config = read_config(folder);
    v->weights = weights_open(folder, "diffusion_pytorch_model");
    encoder = encoder || v->config.mode != SLICE_CACHE;
    if (encoder)
        bind_coder(v->weights, &v->config, &v->encoder, false);
    if (decoder)
        bind_coder(v->weights, &v->config, &v->decoder, true);
    static const char *const halves[2][2] = { { "encoder.*", "quant_conv.*" }, { "decoder.*", "post_quant_conv.*" } };
    for (int i = 0; i < 2; i++) {
        if (!encoder)
            weights_ignore(v->weights, halves[0][i]);
        if (!decoder)
            weights_ignore(v->weights, halves[1][i]);
    }
    weights_done(v->weights, allow_unknown);
    return v;
}

/* ---------------------------------------------------------------- slices */

/* A piece of the video's time axis: frames [first, first + count) of the input, and of how many neighbours on either
 * side conv_in and mid_block of the decoder see, too. */
typedef struct { int64_t first, count, before, after; pad_mode time; } slice;

/* Steps to the next slice of `total` frames; false after the last. Starts from {0}. Encoder.forward, Decoder.forward. */
static bool slice_next(const vae_config *c, bool decode, int64_t total, slice *s)
{
    int64_t start = s->first + s->count, batch = decode ? c->mini_batch_decoder : c->mini_batch_encoder, rest = total - start;
    bool alone = start == 0 && (c->mode == SLICE_CACHE && decode ? total == 1 : total % 2 == 1);
    bool had_batch = s->count > 0 && s->time == PAD_SLICE;
    if (rest <= 0)
        return false;
    int64_t count = rest < batch ? rest : batch, after = rest - count < batch ? rest - count : batch;
    switch (c->mode) {
    case SLICE_NONE:
        *s = (slice){ start, total, 0, 0, PAD_REPLICATE };
        break;
    case SLICE_MAG:
        *s = (slice){ start, count, 0, 0, PAD_REPLICATE };
        break;
    case SLICE_CACHE:
    case SLICE_COMPRESSION:
        if (alone)
            *s = (slice){ start, 1, 0, 0, PAD_SINGLE };
        else if (decode && c->mode == SLICE_CACHE)
            *s = (slice){ start, count, 0, 0, start ? PAD_CACHE_NEXT : PAD_CACHE_FIRST };
        else
            *s = (slice){ start, count, decode && had_batch ? s->count : 0, decode ? after : 0, PAD_SLICE };
        break;
    }
    return true;
}

/* Frames after a temporal downsampler (kernel 3, stride 2, two frames of padding) and upsampler. */
static int64_t frames_down(int64_t t) { return (t - 1) / 2 + 1; }
static int64_t frames_up(int64_t t, pad_mode time) { return time == PAD_SINGLE ? t : time == PAD_REPLICATE ? 2 * t - 1 : 2 * t; }

/* Frames that the coder makes of one slice. */
static int64_t slice_output(const vae_config *c, bool decode, const slice *s)
{
    int64_t t = s->count;
    for (int64_t i = 0; i + 1 < c->levels; i++)
        if (decode ? c->up_time[i] : c->down_time[i])
            t = decode ? frames_up(t, s->time) : frames_down(t);
    return t;
}

static int64_t output_frames(const vae_config *c, bool decode, int64_t total)
{
    int64_t frames = 0;
    for (slice s = { 0 }; slice_next(c, decode, total, &s);)
        frames += slice_output(c, decode, &s);
    return frames;
}
int64_t vae_latent_frames(const vae_config *c, int64_t frames) { return output_frames(c, false, frames); }
int64_t vae_video_frames(const vae_config *c, int64_t frames) { return output_frames(c, true, frames); }

/* ---------------------------------------------------------------- blocks */

/* One pass of a coder over the slices of one tile. */
typedef struct {
    const run *r;
    arena *a;
    const vae_config *c;
    const coder *k;
    bool decode;
    pad_mode time;              /* of the slice under way */
    size_t floor;               /* the slice's activations live above this mark */
    tensor *caches;             /* cached decoding: one per causal convolution, in the order of their calls */
    int next_cache;
    int *slice;                 /* slices done in the whole pass, for dump names */
} pass;

/* y = a causal 3 x 3 x 3 convolution of x. */
static void causal_conv_to(pass *p, tensor y, tensor x, layer l, conv_spec s)
{
    s.kernel[0] = s.kernel[1] = s.kernel[2] = 3;
    s.time = p->time;
    if (p->time == PAD_CACHE_FIRST || p->time == PAD_CACHE_NEXT) {
        s.cache = &p->caches[p->next_cache++];
        if (p->time == PAD_CACHE_FIRST)
            *s.cache = tensor_new_high(p->a, SHAPE(2, x.dim[1], x.dim[2], x.dim[3]));
    }
    conv(p->a, y, x, s, l);
}

static const conv_spec same = { .stride = { 1, 1, 1 }, .pad = 1, .up = 1 };

static tensor causal_conv(pass *p, tensor x, layer l)
{
    tensor y = tensor_new(p->a, SHAPE(x.dim[0], x.dim[1], x.dim[2], l.weight.dim[0]));
    causal_conv_to(p, y, x, l, same);
    return y;
}

/* GroupNorm over the slice, or over each frame where spatial_group_norm; then SiLU. */
static void norm_silu(pass *p, tensor y, tensor x, layer l)
{
    group_norm(p->a, y, x, p->c->norm_num_groups, p->c->spatial_group_norm ? 1 : x.dim[0], l, true);
}

/* x + conv2(silu(norm2(conv1(silu(norm1(x)))))). Where the channels change, x goes through a 1 x 1 x 1 shortcut first,
 * and its memory is free for the norm and then for the result: at full resolution it is the largest tensor of all. */
static tensor residual(pass *p, tensor x, const resblock *b)
{
    bool project = b->shortcut.weight.data != NULL;
    tensor shortcut = project ? linear(p->a, x, b->shortcut) : x;
    tensor n = project ? x : tensor_new(p->a, SHAPE(x.dim[0], x.dim[1], x.dim[2], x.dim[3]));
    norm_silu(p, n, x, b->norm1);
    tensor y = causal_conv(p, n, b->conv1);
    norm_silu(p, y, y, b->norm2);
    tensor z = n;
    if (y.dim[3] > n.dim[3])
        z = tensor_new(p->a, SHAPE(y.dim[0], y.dim[1], y.dim[2], y.dim[3]));
    z.dim[3] = y.dim[3];
    causal_conv_to(p, z, y, b->conv2, same);
    add(z, shortcut);
    return arena_return(p->a, p->floor, z);
}

/* [A][B][C] -> [B][A][C]. */
static void swap_axes(tensor y, tensor x, int64_t a, int64_t b)
{
    int64_t c = x.data ? tensor_count(x) / (a * b) : 0;
    for (int64_t i = 0; i < a && x.data; i++)
        for (int64_t j = 0; j < b; j++)
            memcpy(y.data + (j * a + i) * c, x.data + (i * b + j) * c, (size_t)c * sizeof(real));
}

/* h + to_out(attention(group_norm(h))) where h is [sequences * length][1][1][C], or any [T][H][W][C] of which `span`
 * frames make one sequence. */
static void mid_attend(pass *p, tensor h, const attention_weights *b, int64_t span)
{
    size_t mark = arena_mark(p->a);
    int64_t channels = h.dim[3], tokens = tensor_count(h) / channels;
    tensor n = tensor_new(p->a, SHAPE(h.dim[0], h.dim[1], h.dim[2], channels));
    group_norm(p->a, n, h, p->c->norm_num_groups, span, b->group_norm, false);
    tensor x = tensor_view(n, SHAPE(tokens, channels));
    tensor q = linear(p->a, x, b->to_q), k = linear(p->a, x, b->to_k), v = linear(p->a, x, b->to_v);
    attention(p->a, x, q, k, v, h.dim[0] / span, p->c->mid_block_num_attention_heads);
    linear_to(p->a, q, x, b->to_out);
    add(h, q);
    arena_reset(p->a, mark);
}

/* Attention between the frames of every pixel: the same on [H * W][T]. */
static void mid_attend_temporal(pass *p, tensor x, const attention_weights *b)
{
    size_t mark = arena_mark(p->a);
    int64_t frames = x.dim[0], pixels = x.dim[1] * x.dim[2];
    tensor h = tensor_new(p->a, SHAPE(pixels * frames, 1, 1, x.dim[3]));
    swap_axes(h, x, frames, pixels);
    mid_attend(p, h, b, frames);
    swap_axes(x, h, pixels, frames);
    arena_reset(p->a, mark);
}

/* MidBlock3D: attentions stand between residual blocks, so one layer has none. */
static tensor mid_block(pass *p, tensor x)
{
    x = residual(p, x, &p->k->mid_convs[0]);
    for (int64_t i = 1; i < p->c->layers_per_block; i++) {
        const attention_weights *b = &p->k->mid_attentions[2 * (i - 1)];
        mid_attention type = p->c->mid_block_attention_type;
        if (p->c->mid_block_use_attention) {
            if (type == ATTEND_3D)
                mid_attend(p, x, b, x.dim[0]);
            if (type == ATTEND_SPATIAL || type == ATTEND_SPATIAL_TEMPORAL)
                mid_attend(p, x, b, 1);
            if (type == ATTEND_TEMPORAL || type == ATTEND_SPATIAL_TEMPORAL)
                mid_attend_temporal(p, x, b + (type == ATTEND_SPATIAL_TEMPORAL));
        }
        x = residual(p, x, &p->k->mid_convs[i]);
    }
    return x;
}

/* Zeros right and below, stride 2 in space, and in time if asked. Spatial(Temporal)Downsampler3D. */
static tensor downsample(pass *p, tensor x, layer l, bool time)
{
    tensor y = tensor_new(p->a, SHAPE(time ? frames_down(x.dim[0]) : x.dim[0], x.dim[1] / 2, x.dim[2] / 2, x.dim[3]));
    causal_conv_to(p, y, x, l, (conv_spec){ .stride = { time ? 2 : 1, 2, 2 }, .up = 1 });
    return arena_return(p->a, p->floor, y);
}

/* Doubles the frames of x into y: the nearest, or linear between frame centres, which lie at a quarter and three
 * quarters of each old frame. F.interpolate(scale_factor=(2, 1, 1)). */
static void double_frames(tensor y, tensor x, bool nearest)
{
    int64_t frames = x.dim[0], size = frames ? tensor_count(x) / frames : 0;
    for (int64_t t = 0; t < 2 * frames && x.data; t++) {
        int64_t near = t / 2, far = t % 2 ? near + 1 : near - 1;
        bool edge = far < 0 || far >= frames;
        const real *a = x.data + near * size, *b = x.data + (edge ? near : far) * size;
        real *out = y.data + t * size;
        if (nearest || edge)
            memcpy(out, a, (size_t)size * sizeof(real));
        else
            for (int64_t i = 0; i < size; i++)
                out[i] = (real)0.75 * a[i] + (real)0.25 * b[i];
    }
}

/* Nearest x 2 in space (inside the convolution), then in time x 2 if asked: a plain slice keeps its first frame single,
 * a single frame stays one. Spatial(Temporal)Upsampler3D. */
static tensor upsample(pass *p, tensor x, layer l, bool time)
{
    tensor y = tensor_new(p->a, SHAPE(x.dim[0], 2 * x.dim[1], 2 * x.dim[2], x.dim[3]));
    causal_conv_to(p, y, x, l, (conv_spec){ .stride = { 1, 1, 1 }, .pad = 1, .up = 2 });
    y = arena_return(p->a, p->floor, y);
    int64_t frames = y.dim[0], kept = p->time == PAD_REPLICATE;
    if (!time || p->time == PAD_SINGLE)
        return y;
    tensor z = tensor_new(p->a, SHAPE(frames_up(frames, p->time), y.dim[1], y.dim[2], y.dim[3]));
    tensor_copy(tensor_part(z, 0, kept), tensor_part(y, 0, kept));
    double_frames(tensor_part(z, kept, z.dim[0] - kept), tensor_part(y, kept, frames - kept), p->c->spatial_group_norm);
    return arena_return(p->a, p->floor, z);
}

/* Residual blocks of one level, then its sampler. */
static tensor run_level(pass *p, tensor x, int64_t i)
{
    const level *l = &p->k->levels[i];
    for (int64_t j = 0; j < p->c->layers_per_block + p->decode; j++)
        x = residual(p, x, &l->convs[j]);
    if (i + 1 < p->c->levels)
        x = p->decode ? upsample(p, x, l->sampler, p->c->up_time[i]) : downsample(p, x, l->sampler, p->c->down_time[i]);
    return x;
}

/* conv_norm_out, SiLU, conv_out. */
static tensor head(pass *p, tensor x)
{
    norm_silu(p, x, x, p->k->conv_norm_out);
    return causal_conv(p, x, p->k->conv_out);
}

/* Encoder.single_forward: pixels [T][H][W][3] -> [F][h][w][2 Z] before quant_conv. */
static tensor encode_slice(pass *p, tensor pixels)
{
    int s = (*p->slice)++;
    tensor x = causal_conv(p, pixels, p->k->conv_in);
    dump(p->r, x, CHANNELS_FIRST, "vae.enc.conv_in.s%02d", s);
    for (int64_t i = 0; i < p->c->levels; i++) {
        x = run_level(p, x, i);
        dump(p->r, x, CHANNELS_FIRST, "vae.enc.down.%d.s%02d", (int)i, s);
    }
    x = mid_block(p, x);
    dump(p->r, x, CHANNELS_FIRST, "vae.enc.mid.s%02d", s);
    x = head(p, x);
    dump(p->r, x, CHANNELS_FIRST, "vae.enc.out.s%02d", s);
    return x;
}

/* Decoder.single_forward: z [before + count + after][h][w][Z] -> [T][H][W][3]; conv_in and mid_block see the
 * neighbours, the up blocks only the slice itself. */
static tensor decode_slice(pass *p, tensor z, int64_t before, int64_t count)
{
    int s = (*p->slice)++;
    tensor x = causal_conv(p, z, p->k->conv_in);
    dump(p->r, x, CHANNELS_FIRST, "vae.dec.conv_in.s%02d", s);
    x = mid_block(p, x);
    dump(p->r, x, CHANNELS_FIRST, "vae.dec.mid.s%02d", s);
    x = arena_return(p->a, p->floor, tensor_part(x, before, count));
    for (int64_t i = 0; i < p->c->levels; i++) {
        x = run_level(p, x, i);
        dump(p->r, x, CHANNELS_FIRST, "vae.dec.up.%d.s%02d", (int)i, s);
    }
    x = head(p, x);
    dump(p->r, x, CHANNELS_FIRST, "vae.dec.out.s%02d", s);
    return x;
}

/* ---------------------------------------------------------------- a whole video of one tile */

/* Causal convolutions of the decoder, which each remember two frames. */
static int count_convs(const vae_config *c)
{
    return (int)(2 + 2 * c->layers_per_block + c->levels * (2 * (c->layers_per_block + 1) + 1));
}

/* in: pixels or latents [T][H][W][C] of one tile -> moments or pixels, a new tensor. Slice by slice along time. */
static tensor code(const run *r, const vae *v, bool decode, tensor in, int *slices)
{
    arena *a = r->arena;
    const vae_config *c = &v->config;
    int64_t total = in.dim[0], scale = vae_scale(c), done = 0;
    int64_t h = decode ? in.dim[1] * scale : in.dim[1] / scale, w = decode ? in.dim[2] * scale : in.dim[2] / scale;
    tensor out = tensor_new(a, SHAPE(output_frames(c, decode, total), h, w, decode ? c->out_channels : 2 * c->latent_channels));
    size_t mark = arena_mark(a), high = arena_mark_high(a);
    pass p = { .r = r, .a = a, .c = c, .k = decode ? &v->decoder : &v->encoder, .decode = decode, .slice = slices };
    p.caches = allocate((size_t)count_convs(c), sizeof *p.caches);
    tensor z = decode ? linear(a, in, p.k->quant) : in;
    p.floor = arena_mark(a);
    for (slice s = { 0 }; slice_next(c, decode, total, &s);) {
        tensor part = tensor_part(z, s.first - s.before, s.before + s.count + s.after);
        p.time = s.time;
        p.next_cache = 0;
        tensor x = decode ? decode_slice(&p, part, s.before, s.count) : encode_slice(&p, part);
        tensor_copy(tensor_part(out, done, x.dim[0]), decode ? x : linear(a, x, p.k->quant));
        done += x.dim[0];
        arena_reset(a, p.floor);
        progress(r, decode ? "decode" : "encode", s.first + s.count, total);
    }
    free(p.caches);
    arena_reset_high(a, high);
    arena_reset(a, mark);
    return out;
}

/* ---------------------------------------------------------------- tiles */

/* A rectangle of x [T][H][W][C], as a new tensor. */
static tensor crop(arena *a, tensor x, int64_t y0, int64_t x0, int64_t height, int64_t width)
{
    tensor y = tensor_new(a, SHAPE(x.dim[0], height, width, x.dim[3]));
    for (int64_t i = 0; i < x.dim[0] * height && x.data; i++)
        memcpy(y.data + i * width * x.dim[3], x.data + ((i / height * x.dim[1] + y0 + i % height) * x.dim[2] + x0) * x.dim[3],
               (size_t)(width * x.dim[3]) * sizeof(real));
    return y;
}

static real *pixel(tensor x, int64_t t, int64_t y, int64_t column) { return x.data + ((t * x.dim[1] + y) * x.dim[2] + column) * x.dim[3]; }

/* The first min(extent, both) rows (down) or columns of `own` become a ramp from the last ones of `other`. blend_v, blend_h. */
static void blend(tensor own, tensor other, int64_t extent, bool down)
{
    int64_t axis = down ? 1 : 2, e = extent;
    e = own.dim[axis] < e ? own.dim[axis] : e;
    e = other.dim[axis] < e ? other.dim[axis] : e;
    int64_t rows = down ? e : own.dim[1], columns = down ? own.dim[2] : e;
    for (int64_t i = 0; i < own.dim[0] * rows * columns && own.data; i++) {
        int64_t x = i % columns, y = i / columns % rows, t = i / columns / rows;
        real share = (real)((double)(down ? y : x) / (double)e);
        real *to = pixel(own, t, y, x);
        const real *from = pixel(other, t, down ? other.dim[1] - e + y : y, down ? x : other.dim[2] - e + x);
        for (int64_t c = 0; c < own.dim[3]; c++)
            to[c] = from[c] * (1 - share) + to[c] * share;
    }
}

/* The part of a tile that the whole gets: its first `limit` rows and columns, laid down at (y0, x0). */
static void paste(tensor whole, tensor tile, int64_t limit, int64_t y0, int64_t x0)
{
    int64_t height = tile.dim[1] < limit ? tile.dim[1] : limit, width = tile.dim[2] < limit ? tile.dim[2] : limit;
    for (int64_t i = 0; i < tile.dim[0] * height && whole.data; i++)
        memcpy(pixel(whole, i / height, y0 + i % height, x0), pixel(tile, i / height, i % height, 0),
               (size_t)(width * tile.dim[3]) * sizeof(real));
}

/* torch.linspace(0, 1, n)[i] in double: counted from the nearer end. */
static double ramp(int64_t i, int64_t n)
{
    double step = n > 1 ? 1.0 / (double)(n - 1) : 0;
    return i < n / 2 ? step * (double)i : n > 1 ? 1 - step * (double)(n - 1 - i) : 0;
}

/* Decoding only: the lower right corner, decoded once more, is laid over the result with weights that fall to 0 at its
 * upper and left edges. */
static void overlay_corner(tensor whole, tensor corner)
{
    int64_t h = corner.dim[1], w = corner.dim[2];
    for (int64_t i = 0; i < corner.dim[0] * h * w && whole.data; i++) {
        int64_t x = i % w, y = i / w % h, t = i / w / h;
        double fx = ramp(x, w), fy = ramp(y, h);
        real share = (real)(fx < fy ? fx : fy);
        real *to = pixel(whole, t, whole.dim[1] - h + y, whole.dim[2] - w + x);
        const real *from = pixel(corner, t, y, x);
        for (int64_t c = 0; c < corner.dim[3]; c++)
            to[c] = share * from[c] + (1 - share) * to[c];
    }
}

/* tiled_encode, tiled_decode: tiles of `size` start every `step`, each is coded alone, and blended with the one above
 * and the one to the left, both as they are after their own blending. */
static tensor code_tiles(const run *r, const vae *v, bool decode, tensor in)
{
    arena *a = r->arena;
    const vae_config *c = &v->config;
    int64_t scale = vae_scale(c), size = decode ? c->tile_latent_min_size : c->tile_sample_min_size;
    int64_t out_size = decode ? c->tile_sample_min_size : c->tile_latent_min_size;
    int64_t step = (int64_t)((double)size * (1 - c->tile_overlap_factor)), extent = (int64_t)((double)out_size * c->tile_overlap_factor);
    int64_t rows = (in.dim[1] + step - 1) / step, columns = (in.dim[2] + step - 1) / step, limit = out_size - extent;
    tensor whole = tensor_new(a, SHAPE(output_frames(c, decode, in.dim[0]), decode ? in.dim[1] * scale : in.dim[1] / scale,
                                       decode ? in.dim[2] * scale : in.dim[2] / scale, decode ? c->out_channels : 2 * c->latent_channels));
    size_t mark = arena_mark(a);
    tensor *tiles = allocate((size_t)(rows * columns), sizeof *tiles);
    int slices = 0;
    for (int64_t i = 0, y0 = 0; i < rows; i++) {
        for (int64_t j = 0, x0 = 0; j < columns; j++) {
            tensor *tile = &tiles[i * columns + j];
            int64_t height = in.dim[1] - i * step < size ? in.dim[1] - i * step : size;
            int64_t width = in.dim[2] - j * step < size ? in.dim[2] - j * step : size;
            if (!decode && (height < scale || width < scale))
                die(BAD_INPUT, "vae: the last tile of %lld x %lld pixels would be %lld x %lld, at least %lld x %lld expected; "
                    "choose a --size that is a multiple of 16", (long long)in.dim[2], (long long)in.dim[1], (long long)width,
                    (long long)height, (long long)scale, (long long)scale);
            size_t start = arena_mark(a);
            *tile = arena_return(a, start, code(r, v, decode, crop(a, in, i * step, j * step, height, width), &slices));
            if (i > 0)
                blend(*tile, tiles[(i - 1) * columns + j], extent, true);
            if (j > 0)
                blend(*tile, tiles[i * columns + j - 1], extent, false);
            int64_t h = tile->dim[1] < limit ? tile->dim[1] : limit, w = tile->dim[2] < limit ? tile->dim[2] : limit;
            if (y0 + h > whole.dim[1] || x0 + w > whole.dim[2])
                die(BAD_INPUT, "vae: tile_sample_min_size %lld with tile_overlap_factor %g does not tile %lld x %lld; use another "
                    "--size", (long long)c->tile_sample_min_size, c->tile_overlap_factor, (long long)in.dim[2], (long long)in.dim[1]);
            paste(whole, *tile, limit, y0, x0);
            x0 += w;
        }
        y0 += tiles[i * columns].dim[1] < limit ? tiles[i * columns].dim[1] : limit;
    }
    if (decode) {
        int64_t height = in.dim[1] < size ? in.dim[1] : size, width = in.dim[2] < size ? in.dim[2] : size;
        overlay_corner(whole, code(r, v, true, crop(a, in, in.dim[1] - height, in.dim[2] - width, height, width), &slices));
    }
    free(tiles);
    arena_reset(a, mark);
    return whole;
}

/* ---------------------------------------------------------------- the two directions */

/* pixels [T][H][W][3] in -1..1 -> moments [F][h][w][2 Z]: mean, then log variance, not clamped. AutoencoderKLMagvit.encode. */
tensor vae_encode(const run *r, const vae *v, tensor pixels)
{
    int64_t size = v->config.tile_sample_min_size;
    bool tiled = v->config.tile_encoder && (pixels.dim[1] > size || pixels.dim[2] > size);
    return tiled ? code_tiles(r, v, false, pixels) : code(r, v, false, pixels, &(int){ 0 });
}

/* latents [F][h][w][Z], already divided by scaling_factor -> [T][H][W][3], not clamped. AutoencoderKLMagvit.decode. */
tensor vae_decode(const run *r, const vae *v, tensor latents)
{
    int64_t size = v->config.tile_latent_min_size;
    bool tiled = v->config.tile_decoder && (latents.dim[1] > size || latents.dim[2] > size);
    return tiled ? code_tiles(r, v, true, latents) : code(r, v, true, latents, &(int){ 0 });
}

/* ---------------------------------------------------------------- measurement */

typedef struct { run r; vae_config c; resblock b; pass p; tensor x; } resblock_bench;

void *bench_resblock_new(arena *a, int64_t c, int64_t t, int64_t h, int64_t w)
{
    resblock_bench *s = allocate(1, sizeof *s);
    s->r = (run){ .arena = a };
    s->c = (vae_config){ .norm_num_groups = 32 };
    s->b = bind_resblock(weights_random(F32), "block", c, c);
    s->p = (pass){ .r = &s->r, .a = a, .c = &s->c, .floor = arena_mark(a) };
    s->x = tensor_new(a, SHAPE(t, h, w, c));
    tensor_fill(s->x, (real)0.5);
    return s;
}

void bench_resblock(void *state)
{
    resblock_bench *s = state;
    residual(&s->p, s->x, &s->b);
}
