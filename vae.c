/* vae.c - the Casual VAE: AutoencoderKLMagvit of the public code, video to latents and back.
 *
 * Shapes (letters: ruyi.h), and the published model's numbers for a slice of 8 frames of 384 x 672 pixels; c0 .. cL are
 * ch * ch_mult, 128 256 512 512:
 *
 *     code_slice     [T][H][W][3]      8 384 672 3       pixels in -1..1
 *                    [T][H][W][c0]     8 384 672 128     conv_in
 *       run_level 0  ...               8 192 336 128     down_blocks.0: residual blocks, then a downsampler
 *       run_level 1  ...               4 96 168 256      down_blocks.1; a SpatialTemporal downsampler halves T, too
 *       run_level 2  ...               2 48 84 512       down_blocks.2
 *       run_level 3  [F][h][w][cL]     2 48 84 512       down_blocks.3, the last: no downsampler
 *                    [F][h][w][cL]     2 48 84 512       mid_block: residual, { attention, residual }
 *                    [F][h][w][2 Z]    2 48 84 32        conv_norm_out, SiLU, conv_out; quant_conv: mean, log variance
 *     code_slice     [F][h][w][Z]      2 48 84 16        post_quant_conv
 *                    [F][h][w][cL]     2 48 84 512       conv_in, mid_block
 *       run_level 0  ...               2 96 168 512      up_blocks.0: one residual block more, then an upsampler
 *       run_level 1  ...               4 192 336 512     up_blocks.1; a SpatialTemporal upsampler doubles T, too
 *       run_level 2  ...               8 384 672 256     up_blocks.2
 *       run_level 3  [T][H][W][c0]     8 384 672 128     up_blocks.3, the last: no upsampler
 *                    [T][H][W][3]      8 384 672 3       conv_norm_out, SiLU, conv_out
 *
 * So a latent is 8 x 8 pixels of 4 frames: 768 numbers become 16. What is encoded for frames that are not given: black
 * pictures (-1), and in a second video, the mask, 1 (raw 0 and 1, not -1..1; apply_mask, inpaint_latents in ruyi.c).
 *
 * A video is coded in slices along time (slice_next), a large picture in tiles (code_tiles). Both bound the memory, and
 * both change the numbers: GroupNorm and attention see only what is in the slice and the tile. So they are part of the
 * model, not knobs. What lies in front of a slice is the business of the convolutions' padding mode.
 *
 * Invariants: a slice's activations live above `floor` in the arena; every step returns one tensor there and frees
 * the one before. Beside the weights at most four are alive at a time (of a residual block that widens: x, shortcut, y
 * and z), and five small ones in the mid block's attention.
 *
 * Interface (ruyi.h): vae_open, vae_encode, vae_decode; the lengths and tiles that they imply. Reading order:
 * vae_encode, code, code_slice, run_level, residual, causal_conv; then slice_next with its table; then code_tiles.
 *
 * Mirrors, in the public code: ruyi/models/autoencoder_magvit.py (AutoencoderKLMagvit: quant_conv, tiles) and
 * ruyi/vae/ldm/models/omnigen_enc_dec.py (Encoder, Decoder: slices). The layers are in ruyi/vae/ldm/modules/vaemodules:
 * common.py, down_blocks.py, up_blocks.py, mid_blocks.py, attention.py, downsamplers.py, upsamplers.py.
 *
 * Papers (arXiv): VAE 1312.6114, latent diffusion 2112.10752, causal 3D convolutions as in MAGVIT-v2 2310.05737, slices
 * as in EasyAnimate 2405.18991, GroupNorm 1803.08494.
 */
#include "ruyi.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* ResidualBlock3D: norm1 [Cin], conv1 [Cout][27][Cin], norm2 [Cout], conv2 [Cout][27][Cout], and where Cin and Cout
 * differ shortcut [Cout][1][Cin]. */
typedef struct { layer norm1, conv1, norm2, conv2, shortcut; } resblock;

/* Attention3D, SpatialAttention or TemporalAttention: all [C][C] but group_norm [C]. */
typedef struct { layer group_norm, to_q, to_k, to_v, to_out; } attention_weights;

/* One of down_blocks or up_blocks: its residual blocks, and the convolution of its sampler (absent in the last). */
typedef struct { resblock *convs; layer sampler; } level;

/* Encoder or decoder. */
typedef struct {
    layer conv_in, conv_norm_out, conv_out;
    layer quant;                /* quant_conv or post_quant_conv, 1 x 1 x 1 */
    level levels[MAX_LEVELS];
    resblock *mid_convs;        /* [layers_per_block] */
    attention_weights (*mid_attentions)[2];     /* [layers_per_block - 1]: one, or spatial then temporal */
} coder;

struct vae {
    vae_config config;
    weights *weights;
    coder coders[2];            /* encoder, decoder: the index is `decode` everywhere */
};

const vae_config *vae_settings(const vae *v) { return &v->config; }
const weights *vae_weights(const vae *v) { return v->weights; }

/* Every level but the last has a sampler, and every sampler halves or doubles the sides. */
int64_t vae_scale(const vae_config *c) { return (int64_t)1 << (c->levels - 1); }

/* A new tensor as long, high and wide as x [T][H][W][C], with that many channels. */
static tensor same_size(arena *a, tensor x, int64_t channels)
{
    return tensor_new(a, SHAPE(x.dim[0], x.dim[1], x.dim[2], channels));
}

/* ---------------------------------------------------------------- configuration
 *
 * vae/config.json. A field that is absent has the default of AutoencoderKLMagvit.__init__. Whatever this program cannot
 * compute is refused here, with file and field, before a weight is read.
 *
 * What the fields decide, and where it is used:
 *
 *     ch, ch_mult                               channels and number of levels, hence the scale: 2 ^ (levels - 1)
 *     down_block_types, up_block_types          at which levels the length changes, too: how many frames a latent is
 *     *_vae, mini_batch_encoder, _decoder       slices: slice_next
 *     spatial_group_norm                        statistics of a frame or of a slice (norm_silu), and how frames are
 *                                               doubled (upsample)
 *     mid_block_*                               attention of the deepest level: mid_block
 *     *tiling*, tile_*                          tiles: tiling_of
 *     scaling_factor                            nothing here: the pipeline's, see "the two directions" */

/* down_block_types or up_block_types -> time[levels]: which levels change the length in time, too. The other block
 * types of the public code (with attention, temporal only) are in no published model. */
static void read_block_types(config file, bool decode, int64_t levels, bool *time)
{
    static const char *const known[2][2] = { { "SpatialDownBlock3D", "SpatialTemporalDownBlock3D" },
                                             { "SpatialUpBlock3D", "SpatialTemporalUpBlock3D" } };
    const char *field = decode ? "up_block_types" : "down_block_types", *const *types = known[decode];
    char *words[MAX_LEVELS];
    CONFIG_NEED(config_words(file, field, words, MAX_LEVELS) == levels, file, field,
                "expected as many block types as ch_mult has numbers, %lld", ll(levels));
    for (int64_t i = 0; i < levels; i++) {
        int place = place_of(words[i], types, 2);
        CONFIG_NEED(place >= 0, file, field, "expected %s or %s; other block types are not supported", types[0],
                    types[1]);
        time[i] = place == 1;
        free(words[i]);
    }
}

/* use_gc_blocks is null, or a list of booleans, one a level. */
static void refuse_gc_blocks(config file)
{
    json list = config_member(file, "use_gc_blocks"), cursor = { 0 }, value;
    while (json_kind(list) == '[' && json_next(list, &cursor, NULL, &value))
        CONFIG_NEED(json_kind(value) != 't', file, "use_gc_blocks",
                    "expected null or false; global context blocks are not supported");
}

/* Channels that leave level i: the encoder goes through ch_mult from the front, the decoder from the back. */
static int64_t level_channels(const vae_config *c, bool decode, int64_t i)
{
    return c->channels[decode ? c->levels - 1 - i : i];
}

/* What must hold between fields.
 *
 * A GroupNorm has as many channels in every group, and the mid block's heads share its channels evenly. A trap in
 * up_blocks.py: SpatialUpBlock3D builds its upsampler for the channels that enter the level, SpatialTemporalUpBlock3D
 * for those that leave it. After residual blocks that change the channels the former cannot run, in PyTorch neither.
 * block_out_channels is read by nothing but the pipeline, which takes the scale of the latents from its length. */
static void check_config(config file, const vae_config *c, bool given)
{
    int64_t deepest = c->channels[c->levels - 1];
    for (int64_t i = 0; i < c->levels; i++) {
        int64_t out = level_channels(c, true, i), in = i ? level_channels(c, true, i - 1) : out;
        CONFIG_NEED(c->channels[i] % c->norm_num_groups == 0, file, "norm_num_groups",
                    "expected a divisor of the %lld channels of level %lld", ll(c->channels[i]), ll(i));
        CONFIG_NEED(i + 1 == c->levels || c->time[1][i] || in == out, file, "up_block_types", "expected another type "
                    "at %lld: SpatialUpBlock3D upsamples only where its channels stay the same; they go from %lld to "
                    "%lld", ll(i), ll(in), ll(out));
    }
    CONFIG_NEED(deepest % c->mid_block_num_attention_heads == 0, file, "mid_block_num_attention_heads",
                "expected a divisor of the %lld channels of the last level", ll(deepest));
    CONFIG_NEED(!c->block_out_channels || c->block_out_channels == c->levels, file, "block_out_channels",
                "expected as many numbers as ch_mult has, %lld: both give the scale of the latents", ll(c->levels));
    CONFIG_NEED(c->tile_overlap_factor >= 0 && c->tile_overlap_factor < 1, file, "tile_overlap_factor",
                "expected 0 <= factor < 1");
    /* tiles start every int(size * (1 - overlap)), which must not be 0 */
    if ((c->tile_encoder || c->tile_decoder) && (double)c->tile_latent_min_size * (1 - c->tile_overlap_factor) < 1) {
        NEED(!given, "--vae-tiling: got tiles of %lld pixels overlapping by %g, expected larger tiles: this is less "
             "than a latent", ll(c->tile_sample_min_size), c->tile_overlap_factor);
        config_refuse(file, "tile_sample_min_size", "expected more, enough for tiles of the latents");
    }
    CONFIG_NEED(c->scaling_factor != 0 && isfinite(c->scaling_factor), file, "scaling_factor",
                "expected a number that is not 0");
}

/* Channels of level i are ch * ch_mult[i]. Of block_out_channels only the length counts. */
static void read_channels(config file, vae_config *c)
{
    int64_t ch = config_int(file, "ch", 128, 1, 65536), mult[MAX_LEVELS] = { 1, 2, 4, 4 }, unused[MAX_LEVELS];
    int n = config_ints(file, "ch_mult", mult, MAX_LEVELS);
    int stated = config_ints(file, "block_out_channels", unused, MAX_LEVELS);
    c->levels = n < 0 ? 4 : n;
    c->block_out_channels = greater(stated, 0);
    CONFIG_NEED(n != 0, file, "ch_mult", "expected at least one number");
    for (int64_t i = 0; i < c->levels; i++) {
        CONFIG_NEED(mult[i] >= 1 && mult[i] <= 65536, file, "ch_mult", "expected numbers from 1 to 65536");
        c->channels[i] = ch * mult[i];
    }
}

/* Three switches choose the slices, of which the first that is on wins. slice_mag_vae is on by default. */
static slice_mode read_slice_mode(config f)
{
    bool cache = config_bool(f, "cache_compression_vae", false);
    bool compression = config_bool(f, "slice_compression_vae", false);
    bool mag = config_bool(f, "slice_mag_vae", true);
    return cache ? SLICE_CACHE : compression ? SLICE_COMPRESSION : mag ? SLICE_MAG : SLICE_NONE;
}

const char *const attention_words[] = { "3d", "spatial", "temporal", "spatial_temporal" };

/* The whole file. mini_batch_encoder and mini_batch_decoder are the lengths of slices in frames and in latent frames;
 * the pipeline also takes its ratio of frames to latent frames from them. tile_latent_min_size is int(sample size /
 * scale). What --vae-tiling says replaces the file's tiles. */
static vae_config read_config(const char *folder, vae_tiling tiles)
{
    config f = config_open(folder, "config.json");
    vae_config c = {
        .file = f,
        .in_channels = config_int(f, "in_channels", 3, 3, 3), .out_channels = config_int(f, "out_channels", 3, 3, 3),
        .latent_channels = config_int(f, "latent_channels", 4, 1, 4096),
        .layers_per_block = config_int(f, "layers_per_block", 2, 1, 1000),
        .norm_num_groups = config_int(f, "norm_num_groups", 32, 1, 65536),
        .scaling_factor = config_real(f, "scaling_factor", 0.1825),
        .mode = read_slice_mode(f),
        .mini_batch_encoder = config_int(f, "mini_batch_encoder", 9, 1, 100000),
        .mini_batch_decoder = config_int(f, "mini_batch_decoder", 3, 1, 100000),
        .mid_block_use_attention = config_bool(f, "mid_block_use_attention", true),
        .mid_block_attention_type = (mid_attention)config_choice(f, "mid_block_attention_type", "3d",
                                                                 attention_words, 4),
        .mid_block_num_attention_heads = config_int(f, "mid_block_num_attention_heads", 1, 1, 65536),
        .spatial_group_norm = config_bool(f, "spatial_group_norm", false),
        .tile_sample_min_size = config_int(f, "tile_sample_min_size", 384, 1, 1 << 20),
        .tile_overlap_factor = config_real(f, "tile_overlap_factor", 0.25),
    };
    bool tiling = config_bool(f, "use_tiling", false);      /* both directions */
    c.tile_encoder = config_bool(f, "use_tiling_encoder", false) || tiling;
    c.tile_decoder = config_bool(f, "use_tiling_decoder", false) || tiling;
    if (tiles.given) {
        c.tile_encoder = tiles.encoder;
        c.tile_decoder = tiles.decoder;
        c.tile_sample_min_size = tiles.size ? tiles.size : c.tile_sample_min_size;
        c.tile_overlap_factor = tiles.overlap >= 0 ? tiles.overlap : c.tile_overlap_factor;
    }
    read_channels(f, &c);
    c.tile_latent_min_size = c.tile_sample_min_size / vae_scale(&c);
    for (int decode = 0; decode < 2; decode++)
        read_block_types(f, decode, c.levels, c.time[decode]);
    config_choice(f, "mid_block_type", "MidBlock3D", (const char *const[]){ "MidBlock3D" }, 1);
    config_choice(f, "act_fn", "silu", (const char *const[]){ "silu", "swish" }, 2);    /* two names of one function */
    refuse_gc_blocks(f);
    check_config(f, &c, tiles.given);
    return c;
}

/* ---------------------------------------------------------------- weights
 *
 * Bound by the names that PyTorch's modules give them, with the shapes that the configuration implies; bind dies with
 * the name of a tensor that is missing or has another shape. Convolutions come as [Cout][Cin][3][3][3] and are kept as
 * [Cout][27][Cin], so that a kernel's innermost sum runs over consecutive channels.
 *
 *     encoder.conv_in
 *     encoder.down_blocks.I.convs.J       norm1 conv1 norm2 conv2 shortcut         J < layers_per_block
 *     encoder.down_blocks.I.downsampler   conv                                     not in the last
 *     encoder.mid_block.convs.J           as above
 *     encoder.mid_block.attentions.J      group_norm to_q to_k to_v to_out         J < layers_per_block - 1
 *     encoder.conv_norm_out, encoder.conv_out, quant_conv
 *
 * The decoder has up_blocks with one more of convs, upsampler, and post_quant_conv. */

/* PARENT.convs.0 .. count-1, a new list: ResidualBlock3D.__init__. Only the first changes the channels, and only where
 * they change is there a shortcut. */
static resblock *bind_resblocks(weights *w, const char *parent, int64_t count, int64_t in, int64_t out)
{
    resblock *list = allocate((size_t)count, sizeof *list);
    for (int64_t i = 0; i < count; i++, in = out) {
        list[i] = (resblock){
            .norm1 = bind_norm(w, in, "%s.convs.%lld.norm1", parent, ll(i)),
            .conv1 = bind_convolution(w, SHAPE(out, in, 3, 3, 3), "%s.convs.%lld.conv1", parent, ll(i)),
            .norm2 = bind_norm(w, out, "%s.convs.%lld.norm2", parent, ll(i)),
            .conv2 = bind_convolution(w, SHAPE(out, out, 3, 3, 3), "%s.convs.%lld.conv2", parent, ll(i)),
        };
        if (in != out)
            list[i].shortcut = bind_convolution(w, SHAPE(out, in, 1, 1, 1), "%s.convs.%lld.shortcut", parent, ll(i));
    }
    return list;
}

/* MidBlock3D: one residual block more than attentions. The spatial_temporal type has a list of two attentions at every
 * place (attentions.I.0, .1), the others have one (attentions.I); their four projections have biases (attention.py). */
static void bind_mid(weights *w, const vae_config *c, coder *k, const char *half)
{
    int64_t n = c->channels[c->levels - 1], layers = c->layers_per_block;
    bool pair = c->mid_block_attention_type == ATTEND_SPATIAL_TEMPORAL;
    char *name = text_of("%s.mid_block", half);
    k->mid_convs = bind_resblocks(w, name, layers, n, n);
    k->mid_attentions = allocate((size_t)layers, sizeof *k->mid_attentions);
    for (int64_t i = 0; i + 1 < layers && c->mid_block_use_attention; i++)
        for (int j = 0; j <= pair; j++) {
            char *at = text_of("%s.attentions.%lld%s", name, ll(i), !pair ? "" : j ? ".1" : ".0");
            k->mid_attentions[i][j] = (attention_weights){
                .group_norm = bind_norm(w, n, "%s.group_norm", at),
                .to_q = bind_linear(w, n, n, "%s.to_q", at), .to_k = bind_linear(w, n, n, "%s.to_k", at),
                .to_v = bind_linear(w, n, n, "%s.to_v", at), .to_out = bind_linear(w, n, n, "%s.to_out", at),
            };
            free(at);
        }
    free(name);
}

/* Encoder.__init__, Decoder.__init__: they differ in the direction, in one more residual block a level of the decoder,
 * and in what enters and leaves: pixels to moments [2Z] (mean and log variance), or latents [Z] to pixels. */
static void bind_coder(weights *w, const vae_config *c, coder *k, bool decode)
{
    const char *half = decode ? "decoder" : "encoder", *way = decode ? "up" : "down";
    int64_t z = c->latent_channels, layers = c->layers_per_block + decode, last = c->levels - 1;
    int64_t first = level_channels(c, decode, 0), end = level_channels(c, decode, last);
    int64_t enters = decode ? z : c->in_channels, leaves = decode ? c->out_channels : 2 * z, quant = decode ? z : 2 * z;
    k->conv_in = bind_convolution(w, SHAPE(first, enters, 3, 3, 3), "%s.conv_in", half);
    bind_mid(w, c, k, half);
    for (int64_t i = 0, in = first, out; i <= last; i++, in = out) {
        char *name = text_of("%s.%s_blocks.%lld", half, way, ll(i));
        out = level_channels(c, decode, i);
        k->levels[i].convs = bind_resblocks(w, name, layers, in, out);
        if (i < last)
            k->levels[i].sampler = bind_convolution(w, SHAPE(out, out, 3, 3, 3), "%s.%ssampler.conv", name, way);
        free(name);
    }
    k->conv_norm_out = bind_norm(w, end, "%s.conv_norm_out", half);
    k->conv_out = bind_convolution(w, SHAPE(leaves, end, 3, 3, 3), "%s.conv_out", half);
    k->quant = bind_convolution(w, SHAPE(quant, quant, 1, 1, 1), decode ? "post_quant_conv" : "quant_conv");
}

/* Reads folder (a model's vae/): config.json and the weights of the halves that are wanted. Decoding smooths, which
 * encodes, too, except with a cache. The other half is known and left alone; whatever else the file holds is an error
 * unless it is allowed. */
vae *vae_open(const char *folder, bool encoder, bool decoder, vae_tiling tiles, bool allow_unknown)
{
    vae *v = allocate(1, sizeof *v);
    v->config = read_config(folder, tiles);
    v->weights = weights_open(folder, "diffusion_pytorch_model");
    bool wanted[2] = { encoder || v->config.mode != SLICE_CACHE, decoder };
    for (int decode = 0; decode < 2; decode++) {
        if (wanted[decode]) {
            bind_coder(v->weights, &v->config, &v->coders[decode], decode);
            continue;
        }
        weights_ignore(v->weights, decode ? "decoder.*" : "encoder.*");
        weights_ignore(v->weights, decode ? "post_quant_conv.*" : "quant_conv.*");
    }
    weights_done(v->weights, allow_unknown);
    return v;
}

/* ---------------------------------------------------------------- slices
 *
 * Convolutions have a kernel of 3 in time, too, so each needs two frames more than it gives. The plain CausalConv3d
 * (common.py) sees the frame itself and two of the past, and repeats the first frame twice where there is no past:
 *
 *     0 0 [0 1 2 3 4 5]     frame t of the output sees t-2, t-1, t
 *
 * A whole clip at once would need its activations at full resolution, so it is cut into slices, in one of four ways.
 * Seven latents, mini_batch_decoder 2; [] what comes out of a slice, - a frame of zeros; first the public padding_flag:
 *
 *     SLICE_NONE          0 PAD_REPLICATE     0 0 [0   1   2   3   4   5   6]     everything at once
 *
 *     SLICE_MAG           0 PAD_REPLICATE     0 0 [0   1]                         slices know nothing of each other
 *                         0                           2 2 [2   3]
 *                         0                                   4 4 [4   5]
 *                         0                                           6 6 [6]
 *
 *     SLICE_COMPRESSION   1 PAD_SINGLE          - [0] -                           an odd count: the first frame alone
 *                         2 PAD_SLICE               - [1   2]  3   4 -            conv_in and mid_block see the slices
 *                         2                         -  1   2  [3   4]  5   6 -    on either side between zeros,
 *                         2                                 -  3   4  [5   6] -   up_blocks only the slice
 *
 *     SLICE_CACHE         5 PAD_CACHE_FIRST   0 0 [0   1]                         as plain, but every convolution keeps
 *                         6 PAD_CACHE_NEXT        r   r  [2   3]                  the last two frames of its padded
 *                         6                               r   r  [4   5]          input (r) for the slice that follows
 *                         6                                       r   r  [6]
 *
 * So flag 6 puts in front what the convolution kept from the slice before, and keeps two frames anew: to convolutions
 * there never was a cut. The neighbours of flag 2 only soften the seams that its zeros make. GroupNorm, attention and
 * the doubling of frames always end at the borders of what is seen. The encoder knows neither neighbours nor a cache:
 * in the last two modes it has a single first frame where the count is odd, then slices of mini_batch_encoder between
 * zeros. Encoder.forward, Decoder.forward. */

/* Frames [first, first + count) of the input, and how many neighbours on either side are seen, too. */
typedef struct { int64_t first, count, before, after; pad_mode time; } slice;

/* Steps *s to the next slice of `total` frames; false after the last. Starts from { 0 }. */
static bool slice_next(const vae_config *c, bool decode, int64_t total, slice *s)
{
    slice last = *s;
    int64_t start = last.first + last.count, rest = total - start;
    int64_t batch = decode ? c->mini_batch_decoder : c->mini_batch_encoder;
    bool cached = c->mode == SLICE_CACHE && decode, independent = c->mode == SLICE_NONE || c->mode == SLICE_MAG;
    if (rest <= 0)
        return false;
    *s = (slice){ .first = start, .count = c->mode == SLICE_NONE ? total : lesser(batch, rest), .time = PAD_REPLICATE };
    if (independent)
        return true;
    if (start == 0 && (cached ? total == 1 : total % 2 == 1)) {
        s->count = 1;
        s->time = PAD_SINGLE;
    } else if (cached) {
        s->time = start == 0 ? PAD_CACHE_FIRST : PAD_CACHE_NEXT;
    } else {
        s->time = PAD_SLICE;
        s->before = decode && last.time == PAD_SLICE ? last.count : 0;      /* a single first frame is nobody's */
        s->after = decode ? lesser(batch, rest - s->count) : 0;
    }
    return true;
}

/* Frames after a temporal downsampler: kernel 3, stride 2, and two frames of padding in every mode. 1 becomes 1, 8
 * become 4, 9 become 5. */
static int64_t frames_down(int64_t t) { return (t - 1) / 2 + 1; }

/* Frames after a temporal upsampler: a single frame stays one; plain, the first frame is not doubled (a clip of 4n + 1
 * frames was n + 1 latents); elsewhere every frame is. */
static int64_t frames_up(int64_t t, pad_mode time)
{
    return time == PAD_SINGLE ? t : time == PAD_REPLICATE ? 2 * t - 1 : 2 * t;
}

/* Frames that the coder makes of one slice: its own count, neighbours not included, through every temporal sampler. */
static int64_t slice_output(const vae_config *c, bool decode, const slice *s)
{
    int64_t t = s->count;
    for (int64_t i = 0; i + 1 < c->levels; i++)
        if (c->time[decode][i])
            t = decode ? frames_up(t, s->time) : frames_down(t);
    return t;
}

/* Frames that it makes of `total`, the sum over all slices. With two temporal samplers 4 latents give 16
 * with the cache, 13 at once. */
static int64_t output_frames(const vae_config *c, bool decode, int64_t total)
{
    int64_t frames = 0;
    for (slice s = { 0 }; slice_next(c, decode, total, &s);)
        frames += slice_output(c, decode, &s);
    return frames;
}
int64_t vae_latent_frames(const vae_config *c, int64_t frames) { return output_frames(c, false, frames); }
int64_t vae_video_frames(const vae_config *c, int64_t frames) { return output_frames(c, true, frames); }

/* H to h or h to H: each downsampler rounds down. */
static int64_t output_side(const vae_config *c, bool decode, int64_t side)
{
    return decode ? side * vae_scale(c) : side / vae_scale(c);
}

/* What the coder makes of in [T][H][W][3] or [F][h][w][Z]: [F][h][w][2Z] or [T][H][W][3]. */
static shape output_shape(const vae_config *c, bool decode, tensor in)
{
    return SHAPE(output_frames(c, decode, in.dim[0]), output_side(c, decode, in.dim[1]),
                 output_side(c, decode, in.dim[2]), decode ? c->out_channels : 2 * c->latent_channels);
}

/* ---------------------------------------------------------------- blocks */

/* One pass of a coder over the slices of one tile. Where its tensors lie in the arena while a residual block runs:
 *
 *     low                     floor                                                 high
 *     | out | quant's latents | stream x | shortcut, n | y, z | ->            <- caches |
 *
 * arena_return brings the block's result down to the floor, where it is the stream of the next. */
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
    int *slice;                 /* slices done in the whole pass, tiles and all, for dump names */
    int64_t stage, first;       /* stages of the slice done; the first that is wanted: before it, `skipping` */
    bool skipping;
    char name[64];              /* of a stage, see stage_name */
} pass;

/* y [T'][H'][W'][Cout] = a causal 3 x 3 x 3 convolution of x [T][H][W][Cin]; s has its stride and padding in space, the
 * slice has the padding in time. With flags 5 and 6 the public CausalConv3d (common.py) keeps prev_features in itself;
 * here convolutions are told apart by their order, which is the same in every slice. Caches lie at the arena's high
 * end, out of the way of the stack. */
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

/* Most convolutions keep the size: zeros all around the picture, stride 1. [T][H][W][Cin] -> [T][H][W][Cout]. */
static const conv_spec same = { .stride = { 1, 1, 1 }, .pad = 1, .up = 1 };

static tensor causal_conv(pass *p, tensor x, layer l)
{
    tensor y = same_size(p->a, x, l.weight.dim[0]);
    causal_conv_to(p, y, x, l, same);
    return y;
}

/* y = SiLU(GroupNorm(x)), eps 1e-6. A trap: a group's mean and variance are taken over its channels and all pixels of
 * all frames of the slice, so a frame's numbers depend on the frames that it is sliced with. They are taken frame by
 * frame only with spatial_group_norm (the public set_3dgroupnorm, whose name says the opposite). */
static void norm_silu(pass *p, tensor y, tensor x, layer l)
{
    group_norm(p->a, y, x, p->c->norm_num_groups, p->c->spatial_group_norm ? 1 : x.dim[0], l, true);
}

/* ResidualBlock3D, [T][H][W][Cin] -> [T][H][W][Cout]:
 *
 *     x --+-- norm1, SiLU -- conv1 -- norm2, SiLU -- conv2 --+--
 *         +-- shortcut, where Cin and Cout differ -----------+
 *
 * Where the channels change, x goes through a 1 x 1 x 1 shortcut first, and its memory is free for the norm and then
 * for the result (if that is no larger): at full resolution it is the largest tensor of all. A 1 x 1 x 1 convolution is
 * a linear layer of every pixel. */
static tensor residual(pass *p, tensor x, const resblock *b)
{
    bool project = b->shortcut.weight.data != NULL;
    tensor shortcut = project ? linear(p->a, x, b->shortcut) : x;
    tensor n = project ? x : same_size(p->a, x, x.dim[3]);
    norm_silu(p, n, x, b->norm1);
    tensor y = causal_conv(p, n, b->conv1);
    norm_silu(p, y, y, b->norm2);
    tensor z = y.dim[3] > n.dim[3] ? same_size(p->a, y, y.dim[3]) : n;      /* n has done its work */
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

/* h += to_out(attention(group_norm(h))), h [T][H][W][C]; `span` frames make one sequence of span * H * W tokens, and
 * sequences do not see each other: span T is Attention3D, span 1 SpatialAttention. A trap: this norm's statistics are
 * those of the sequence, spatial_group_norm or not, because the public code reshapes before it normalises
 * (attention.py); and no SiLU follows it. */
static void mid_attend(pass *p, tensor h, const attention_weights *b, int64_t span)
{
    size_t mark = arena_mark(p->a);
    int64_t channels = h.dim[3], tokens = tensor_count(h) / channels;
    tensor n = same_size(p->a, h, channels);
    group_norm(p->a, n, h, p->c->norm_num_groups, span, b->group_norm, false);
    tensor x = tensor_view(n, SHAPE(tokens, channels));
    tensor q = linear(p->a, x, b->to_q), k = linear(p->a, x, b->to_k), v = linear(p->a, x, b->to_v);
    attention(p->a, x, q, k, v, h.dim[0] / span, p->c->mid_block_num_attention_heads);
    linear_to(p->a, q, x, b->to_out);
    add(h, q);
    arena_reset(p->a, mark);
}

/* TemporalAttention: a sequence is one pixel in all frames. Pixels are brought in front, [H * W][T][C], and every token
 * is then a "frame" of one pixel, T of which make a sequence. */
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

/* One of MidBlock3D's attentions, or its pair. */
static void mid_attentions(pass *p, tensor x, const attention_weights b[2])
{
    mid_attention type = p->c->mid_block_attention_type;
    if (type == ATTEND_TEMPORAL)
        mid_attend_temporal(p, x, &b[0]);
    else
        mid_attend(p, x, &b[0], type == ATTEND_3D ? x.dim[0] : 1);
    if (type == ATTEND_SPATIAL_TEMPORAL)
        mid_attend_temporal(p, x, &b[1]);
}

/* MidBlock3D: attentions stand between residual blocks, so one layer a block means no attention. [F][h][w][cL], same
 * size. */
static tensor mid_block(pass *p, tensor x)
{
    x = residual(p, x, &p->k->mid_convs[0]);
    for (int64_t i = 1; i < p->c->layers_per_block; i++) {
        if (p->c->mid_block_use_attention)
            mid_attentions(p, x, p->k->mid_attentions[i - 1]);
        x = residual(p, x, &p->k->mid_convs[i]);
    }
    return x;
}

/* [T][H][W][C] -> [T or (T+1)/2][H/2][W/2][C]. Spatial(Temporal)Downsampler3D (downsamplers.py): stride 2 in space, and
 * in time if asked. A trap: the picture gets a row of zeros below and a column to the right, none above and left (F.pad
 * of (0, 1, 0, 1)), so output y sees rows 2y, 2y+1, 2y+2. */
static tensor downsample(pass *p, tensor x, layer l, bool time)
{
    int64_t frames = time ? frames_down(x.dim[0]) : x.dim[0];
    tensor y = tensor_new(p->a, SHAPE(frames, x.dim[1] / 2, x.dim[2] / 2, x.dim[3]));
    causal_conv_to(p, y, x, l, (conv_spec){ .stride = { time ? 2 : 1, 2, 2 }, .up = 1 });
    return arena_return(p->a, p->floor, y);
}

/* Doubles the frames of x [T][H][W][C] into y [2T][H][W][C]: nearest, or linear between the centres of frames.
 *
 * Formula:  y[2t] = 3/4 x[t] + 1/4 x[t-1],  y[2t+1] = 3/4 x[t] + 1/4 x[t+1]; at the ends, where there is no
 *           neighbour, x[t] itself.
 * Method:   frame t covers t to t+1, its centre lies at t + 1/2; the new frames' centres lie at t + 1/4 and t + 3/4,
 *           a quarter away from it on either side
 * Source:   F.interpolate(scale_factor=(2, 1, 1)), "trilinear" without align_corners, or "nearest". */
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

/* [T][H][W][C] -> [T or frames_up(T)][2H][2W][C]. Spatial(Temporal)Upsampler3D (upsamplers.py): nearest x 2 in space,
 * which the convolution does while it reads, so the enlarged picture is never stored; then in time x 2 if asked. A
 * trap: frames are interpolated linearly, but "nearest" where spatial_group_norm is set, although this is no norm; and
 * a plain slice (flag 0) keeps its first frame single, as a single frame (flag 1) stays one. */
static tensor upsample(pass *p, tensor x, layer l, bool time)
{
    tensor y = tensor_new(p->a, SHAPE(x.dim[0], 2 * x.dim[1], 2 * x.dim[2], x.dim[3]));
    causal_conv_to(p, y, x, l, (conv_spec){ .stride = { 1, 1, 1 }, .pad = 1, .up = 2 });
    y = arena_return(p->a, p->floor, y);
    if (!time || p->time == PAD_SINGLE)
        return y;
    int64_t frames = y.dim[0], kept = p->time == PAD_REPLICATE, all = frames_up(frames, p->time);
    tensor z = tensor_new(p->a, SHAPE(all, y.dim[1], y.dim[2], y.dim[3]));
    tensor_copy(tensor_part(z, 0, kept), tensor_part(y, 0, kept));
    double_frames(tensor_part(z, kept, all - kept), tensor_part(y, kept, frames - kept), p->c->spatial_group_norm);
    return arena_return(p->a, p->floor, z);
}

/* One of down_blocks or up_blocks: residual blocks, then the sampler, which the last level does not have. */
static tensor run_level(pass *p, tensor x, int64_t i)
{
    const level *l = &p->k->levels[i];
    for (int64_t j = 0; j < p->c->layers_per_block + p->decode; j++)
        x = residual(p, x, &l->convs[j]);
    if (i + 1 == p->c->levels)
        return x;
    return (p->decode ? upsample : downsample)(p, x, l->sampler, p->c->time[p->decode][i]);
}

/* The name of the slice's stage k, vae.enc.down.1.s03 say: 0 conv_in, then the levels and mid, or mid and the levels,
 * then out. Slices are counted through all tiles of a pass. */
static const char *stage_name(pass *p, int64_t k)
{
    int64_t i = k - 1 - p->decode, levels = p->c->levels;
    const char *half = p->decode ? "dec" : "enc", *word = k == 0 ? "conv_in" : k == levels + 2 ? "out" : "mid";
    if (k > 0 && i >= 0 && i < levels)
        snprintf(p->name, sizeof p->name, "vae.%s.%s.%d.s%02d", half, p->decode ? "up" : "down", (int)i, *p->slice);
    else
        snprintf(p->name, sizeof p->name, "vae.%s.%s.s%02d", half, word, *p->slice);
    return p->name;
}

/* Begins a slice. Decides what of it need not be computed: what comes before the last stage that is given, or all,
 * where the run is to end in a later slice; but nothing with caches, which the next slice needs. What is skipped is
 * planned: its stages have their shapes and no data. */
static void begin_slice(pass *p)
{
    int64_t stages = p->c->levels + 3;
    int end = 0;
    stop_numbers(p->r, p->decode ? "vae.dec.%*[^s]s%d" : "vae.enc.%*[^s]s%d", &end);
    p->first = end > *p->slice ? stages : 0;
    for (int64_t k = stages; k > 0 && !p->first; k--)
        p->first = is_given(p->r, "%s", stage_name(p, k - 1)) ? k - 1 : 0;
    if (p->a->planning || p->time == PAD_CACHE_FIRST || p->time == PAD_CACHE_NEXT)
        p->first = 0;
    p->stage = 0;
    p->skipping = p->first > 0;
    p->a->planning |= p->skipping;
}

/* Ends the slice's next stage, which made x. Where the stage is given, x becomes it. */
static tensor slice_stage(pass *p, tensor x)
{
    if (p->skipping && p->first == p->stage) {
        p->skipping = p->a->planning = false;
        arena_reset(p->a, p->floor);
        x = tensor_new(p->a, tensor_shape(x));
    }
    given(p->r, x, CHANNELS_FIRST, "%s", stage_name(p, p->stage));
    dump(p->r, x, CHANNELS_FIRST, "%s", p->name);
    p->stage++;
    return x;
}

/* Encoder.single_forward with quant_conv, or Decoder.single_forward: the deepest level is where the encoder ends and
 * the decoder begins, so the mid block is behind the levels in one and before them in the other.
 *
 *     encoder    pixels [T][H][W][3]                      decoder    latents [before + count + after][h][w][Z]
 *     conv_in    [T][H][W][c0]                            conv_in    [before + count + after][h][w][cL]
 *                                                         mid        the same, then cut to [count][h][w][cL]
 *     levels     in the end [F][h][w][cL]                 levels     in the end [T][H][W][c0]
 *     mid        [F][h][w][cL]
 *     out        [F][h][w][2 Z]                           out        [T][H][W][3]
 *
 * So conv_in and mid_block see the slice's neighbours, and the up blocks, where frames become large, the slice alone.
 * The encoder has no neighbours. */
static tensor code_slice(pass *p, tensor in, const slice *s)
{
    begin_slice(p);
    tensor x = slice_stage(p, causal_conv(p, in, p->k->conv_in));
    if (p->decode) {
        x = slice_stage(p, mid_block(p, x));
        x = arena_return(p->a, p->floor, tensor_part(x, s->before, s->count));
    }
    for (int64_t i = 0; i < p->c->levels; i++)
        x = slice_stage(p, run_level(p, x, i));
    if (!p->decode)
        x = slice_stage(p, mid_block(p, x));
    norm_silu(p, x, x, p->k->conv_norm_out);
    x = slice_stage(p, causal_conv(p, x, p->k->conv_out));
    return p->decode || p->skipping ? x : linear(p->a, x, p->k->quant);
}

/* ---------------------------------------------------------------- a whole video of one tile */

/* Causal convolutions of the decoder, each of which has a cache: conv_in and conv_out, two in every residual block, one
 * in every upsampler (counted once too often: the last level has none). */
static int count_convs(const vae_config *c)
{
    return (int)(2 + 2 * c->layers_per_block + c->levels * (2 * (c->layers_per_block + 1) + 1));
}

/* What an earlier slice of in [T][H][W][3], of the same kind and with the same pixels, has become: a part of out.
 * Without data: there is none. Encoded slices know nothing of each other, and most of a mask and of a masked video is
 * one colour, so that of a long clip two or three slices are all there is to compute. */
static tensor same_slice(const vae_config *c, tensor in, tensor out, slice s)
{
    tensor pixels = tensor_part(in, s.first, s.count);
    int64_t done = 0, n;
    for (slice e = { 0 }; in.data && slice_next(c, false, in.dim[0], &e) && e.first < s.first; done += n) {
        n = slice_output(c, false, &e);
        if (e.count == s.count && e.time == s.time &&
            !memcmp(tensor_part(in, e.first, e.count).data, pixels.data, (size_t)tensor_count(pixels) * sizeof(real)))
            return tensor_part(out, done, n);
    }
    return (tensor){ 0 };
}

/* in: pixels [T][H][W][3] or latents [F][h][w][Z] of one tile -> moments [F][h][w][2 Z] or pixels [T][H][W][3], a new
 * tensor. Slice by slice along time, Encoder.forward with quant_conv, or post_quant_conv with Decoder.forward. The
 * quant layers are 1 x 1 x 1 and see no neighbours, so they may run on everything or slice by slice. *slices counts
 * on. */
static tensor code(const run *r, const vae *v, bool decode, tensor in, int *slices)
{
    arena *a = r->arena;
    const vae_config *c = &v->config;
    int64_t total = in.dim[0], done = 0;
    tensor out = tensor_new(a, output_shape(c, decode, in));
    size_t mark = arena_mark(a), high = arena_mark_high(a);
    pass p = { .r = r, .a = a, .c = c, .k = &v->coders[decode], .decode = decode, .slice = slices };
    p.caches = allocate((size_t)count_convs(c), sizeof *p.caches);
    tensor z = decode ? linear(a, in, p.k->quant) : in;
    p.floor = arena_mark(a);
    for (slice s = { 0 }; slice_next(c, decode, total, &s);) {
        tensor part = tensor_part(z, s.first - s.before, s.before + s.count + s.after);
        tensor result = tensor_part(out, done, slice_output(c, decode, &s));
        bool cached = decode && c->mode == SLICE_CACHE;     /* not kept: its caches are needed, too */
        done += result.dim[0];
        p.time = s.time;
        p.next_cache = 0;
        if (cached || !slice_restored(r, result)) {
            tensor twin = decode || r->hooks ? (tensor){ 0 } : same_slice(c, in, out, s);
            a->planning |= twin.data != NULL;               /* its work is counted, not done */
            tensor x = code_slice(&p, part, &s);
            if (!p.skipping)
                tensor_copy(result, twin.data ? twin : x);
            a->planning = a->planning && !p.skipping && !twin.data;
            arena_reset(a, p.floor);
            if (!cached)
                slice_save(r, result);
            progress(r, decode ? "decode" : "encode", s.first + s.count, total);
        }
        ++*slices;
    }
    free(p.caches);
    arena_reset_high(a, high);
    arena_reset(a, mark);
    return out;
}

/* ---------------------------------------------------------------- tiles
 *
 * A picture larger than tile_sample_min_size is cut into overlapping squares, each coded alone, slices and all, and put
 * together again. AutoencoderKLMagvit.tiled_encode, tiled_decode. Along one axis, and alike along the other:
 *
 *     input     |-------- size --------|                  tiles start every `step`; the last are cut off by the border
 *               |----- step -----|-------- size --------|
 *
 *     output    |----- limit ----|extent|                 a tile gives its first limit = its size - extent rows; in the
 *                                |ramp>>|-- limit ...     rows that it shares with the tile before, it fades in
 *
 * where `size` and the output's tile are tile_sample_min_size and tile_latent_min_size (encoding) or the reverse. In
 * the plane, in the order of coding, with what each tile fades in over:
 *
 *     +-----+-----+---+
 *     |  0  |  1  | 2 |     1 over the right end of 0; 3 over the lower end of 0
 *     +-----+-----+---+
 *     |  3  |  4  | 5 |     4 first over the lower end of 1, then over the right end of 3, as that is by now
 *     +-----+-----+---+
 */
typedef struct {
    int64_t size, step;         /* of the input: side of a tile, distance between their starts */
    int64_t extent, limit;      /* of the output: length of the ramp, and rows or columns that the whole gets */
    int64_t rows, columns;      /* tiles */
} tiling;

/* in: [T][H][W][C]. Everything is rounded down, step and extent each on its own side, as the public int() does. */
static tiling tiling_of(const vae_config *c, bool decode, tensor in)
{
    int64_t size = decode ? c->tile_latent_min_size : c->tile_sample_min_size;
    int64_t out_size = decode ? c->tile_sample_min_size : c->tile_latent_min_size;
    tiling g = { .size = size, .step = (int64_t)((double)size * (1 - c->tile_overlap_factor)) };
    g.extent = (int64_t)((double)out_size * c->tile_overlap_factor);
    g.limit = out_size - g.extent;
    g.rows = divide_up(in.dim[1], g.step);
    g.columns = divide_up(in.dim[2], g.step);
    return g;
}

/* Dies where the tiles' parts do not fill the whole exactly. step * scale and limit agree only where both roundings do,
 * and a border can leave a last tile too small to encode; the public code then gives another size, or fails. */
static void check_tiling(const vae_config *c, bool decode, tensor in, const tiling *g)
{
    for (int axis = 1; axis <= 2; axis++) {
        int64_t side = in.dim[axis], sum = 0;
        for (int64_t at = 0; at < side; at += g->step) {
            int64_t rest = lesser(g->size, side - at), out = output_side(c, decode, rest);
            NEED(out, "vae: the last tile of %lld x %lld pixels would have a side of %lld, at least %lld expected; "
                 "choose a --size that is a multiple of 16", ll(in.dim[2]), ll(in.dim[1]), ll(rest), ll(vae_scale(c)));
            sum += lesser(g->limit, out);
        }
        NEED(sum == output_side(c, decode, side), "vae: tile_sample_min_size %lld with tile_overlap_factor %g does not "
             "tile %lld x %lld; use another --size or --vae-tiling", ll(c->tile_sample_min_size),
             c->tile_overlap_factor, ll(in.dim[2]), ll(in.dim[1]));
    }
}

/* The number of x [T][H][W][C] where a pixel's channels begin. */
static real *pixel(tensor x, int64_t t, int64_t row, int64_t column)
{
    return x.data + ((t * x.dim[1] + row) * x.dim[2] + column) * x.dim[3];
}

/* Copies height x width pixels of every frame, from (y, x) of one tensor to (to_y, to_x) of another. */
static void copy_rectangle(tensor to, int64_t to_y, int64_t to_x, tensor from, int64_t y, int64_t x, int64_t height,
                           int64_t width)
{
    size_t bytes = (size_t)(width * from.dim[3]) * sizeof(real);
    for (int64_t t = 0; t < from.dim[0] && from.data; t++)
        for (int64_t i = 0; i < height; i++)
            memcpy(pixel(to, t, to_y + i, to_x), pixel(from, t, y + i, x), bytes);
}

/* The tile of in [T][H][W][C] that starts at (y, x), at most size x size, coded: a new tensor. */
static tensor code_tile(const run *r, const vae *v, bool decode, tensor in, int64_t y, int64_t x, int64_t size,
                        int *slices)
{
    int64_t height = lesser(size, in.dim[1] - y), width = lesser(size, in.dim[2] - x);
    size_t mark = arena_mark(r->arena);
    tensor tile = tensor_new(r->arena, SHAPE(in.dim[0], height, width, in.dim[3]));
    copy_rectangle(tile, 0, 0, in, y, x, height, width);
    return arena_return(r->arena, mark, code(r, v, decode, tile, slices));
}

/* The first rows (down) or columns of `own` fade in over the last ones of `other`, the tile above or to the left.
 *
 * Formula:  own[i] = other[n - e + i] (1 - i/e) + own[i] i/e,  0 <= i < e = min(extent, both sides), n other's side
 * Source:   AutoencoderKLMagvit.blend_v, blend_h. */
static void blend(tensor own, tensor other, int64_t extent, bool down)
{
    int64_t axis = down ? 1 : 2, e = lesser(extent, lesser(own.dim[axis], other.dim[axis]));
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

/* torch.linspace(0, 1, n)[i] in double: counted from the nearer end, which makes both ends exact. */
static double ramp(int64_t i, int64_t n)
{
    double step = n > 1 ? 1.0 / (double)(n - 1) : 0;
    return i < n / 2 ? step * (double)i : n > 1 ? 1 - step * (double)(n - 1 - i) : 0;
}

/* Decoding only: the lower right corner, decoded once more as a full tile, is laid over the result.
 *
 * Formula:  whole = w corner + (1 - w) whole,  w = min(x ramp, y ramp), each from 0 (left, top) to 1 (right, bottom)
 * Source:   the end of AutoencoderKLMagvit.tiled_decode: the last tiles may be slivers that saw little around them. */
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

/* in: pixels or latents of a large picture -> moments or pixels, as code() does for a small one. A tile is blended with
 * the one above and the one to the left as these are after their own blending (the public code blends in place), so all
 * tiles are kept until the end. */
static tensor code_tiles(const run *r, const vae *v, bool decode, tensor in)
{
    arena *a = r->arena;
    const tiling g = tiling_of(&v->config, decode, in);
    check_tiling(&v->config, decode, in, &g);
    tensor whole = tensor_new(a, output_shape(&v->config, decode, in));
    size_t mark = arena_mark(a);
    tensor *tiles = allocate((size_t)(g.rows * g.columns), sizeof *tiles);
    int slices = 0;
    for (int64_t i = 0, y = 0; i < g.rows; i++) {
        tensor *row = tiles + i * g.columns;
        for (int64_t j = 0, x = 0; j < g.columns; j++) {
            tensor tile = row[j] = code_tile(r, v, decode, in, i * g.step, j * g.step, g.size, &slices);
            if (i > 0)
                blend(tile, tiles[(i - 1) * g.columns + j], g.extent, true);
            if (j > 0)
                blend(tile, row[j - 1], g.extent, false);
            int64_t height = lesser(g.limit, tile.dim[1]), width = lesser(g.limit, tile.dim[2]);
            copy_rectangle(whole, y, x, tile, 0, 0, height, width);
            x += width;
        }
        y += lesser(g.limit, row[0].dim[1]);
    }
    if (decode) {
        int64_t y = in.dim[1] - lesser(g.size, in.dim[1]), x = in.dim[2] - lesser(g.size, in.dim[2]);
        overlay_corner(whole, code_tile(r, v, true, in, y, x, g.size, &slices));
    }
    free(tiles);
    arena_reset(a, mark);
    return whole;
}

/* ---------------------------------------------------------------- the two directions
 *
 * The encoder gives no latents but a normal distribution of them for every place: 2Z channels, first the means m, then
 * the logarithms s of the variances (DiagonalGaussianDistribution of diffusers). Whoever asks takes
 *
 *     the mode      m                                            for smoothing the decoded video
 *     a sample      m + exp(clamp(s, -30, 20) / 2) noise         for mask and masked video, which the DiT looks at
 *
 * The sample is multiplied by scaling_factor, which makes its size about that of the noise that the DiT begins with;
 * the decoder wants that factor divided out of the DiT's latents. Smoothing hands the mode straight back to the
 * decoder. All of this is done in ruyi.c. */

/* How many tiles code a picture of h x w pixels, or of h x w latents to decode; 1: it is coded whole. */
int64_t vae_tiles(const vae_config *c, bool decode, int64_t h, int64_t w)
{
    int64_t size = decode ? c->tile_latent_min_size : c->tile_sample_min_size;
    if (!(decode ? c->tile_decoder : c->tile_encoder) || (h <= size && w <= size))
        return 1;
    tiling g = tiling_of(c, decode, tensor_of(NULL, SHAPE(1, h, w, 1)));
    return g.rows * g.columns;
}

/* All of a video, in tiles where either side is larger than a tile. */
static tensor code_all(const run *r, const vae *v, bool decode, tensor in)
{
    bool tiled = vae_tiles(&v->config, decode, in.dim[1], in.dim[2]) > 1;
    return tiled ? code_tiles(r, v, decode, in) : code(r, v, decode, in, &(int){ 0 });
}

/* pixels [T][H][W][3] in -1..1 -> moments [F][h][w][2 Z]: mean, then log variance, not clamped.
 * AutoencoderKLMagvit.encode. */
tensor vae_encode(const run *r, const vae *v, tensor pixels)
{
    if (!is_given(r, "vae.moments"))
        return code_all(r, v, false, pixels);
    tensor moments = tensor_new(r->arena, output_shape(&v->config, false, pixels));
    given(r, moments, CHANNELS_FIRST, "vae.moments");
    return moments;
}

/* latents [F][h][w][Z], already divided by scaling_factor -> [T][H][W][3], not clamped. AutoencoderKLMagvit.decode. */
tensor vae_decode(const run *r, const vae *v, tensor latents) { return code_all(r, v, true, latents); }

/* ---------------------------------------------------------------- measurement */

typedef struct { resblock *b; pass p; tensor x; } resblock_bench;

/* One residual block of c channels on [t][h][w][c], with random weights: what most of the VAE's time goes into. */
void *bench_resblock_new(arena *a, int64_t c, int64_t t, int64_t h, int64_t w)
{
    static const vae_config groups = { .norm_num_groups = 32 };
    resblock_bench *s = allocate(1, sizeof *s);
    s->b = bind_resblocks(&(weights){ .random = true }, "block", 1, c, c);
    s->p = (pass){ .a = a, .c = &groups, .floor = arena_mark(a) };
    s->x = tensor_new(a, SHAPE(t, h, w, c));
    tensor_fill(s->x, (real)0.5);
    return s;
}

void bench_resblock(void *state)
{
    resblock_bench *s = state;
    residual(&s->p, s->x, s->b);
}
