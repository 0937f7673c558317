/* dit.c - the two transformers: CLIP's image tower, which looks at the first picture once, and the DiT, which at every
 * step says what of the latents is noise.
 *
 * Shapes (letters: ruyi.h), and their numbers for 120 frames of 384 x 672 pixels in the published 7B model, or in
 * tests/make7b.py where its documentation is silent (CLIP's tower, Q):
 *
 *     once a run, clip_encode and dit_conditions
 *         [S][S][3]               224 224 3        the first picture, its middle square
 *         [1 + patches][width]    257 1280         clip_embed: patches, a class token in front, positions, a LayerNorm
 *         [1 + patches][width]    257 1280         32 times clip_block: x += attention(norm(x)); x += mlp(norm(x))
 *         [patches][width]        256 1280         without the class token: what the picture shows
 *         [B][Q][X]               2 64 1024        resample: the same in Q tokens; or the learned clip_padding
 *         [B][77 + 256][X]        2 333 1024       text_tokens: the control embeddings (camera, motion)
 *         [B][D]                  2 2816           extra_embedding: pooled text, the picture's size, a style
 *     every call, dit_forward
 *         [F][h][w][3 Z]          30 48 84 48      latents, mask latents, masked latents, side by side
 *         [N][D]                  30240 2816       patch_tokens: every p x p = 2 x 2 latents are a token
 *         [B][D]                  2 2816           time_embedding: temb, of the timestep t, plus extra
 *         [N][D] for each row     30240 2816       run_blocks: 40 times block, with long skips
 *         [N][D] for each row     30240 2816       norm_out: LayerNorm, scaled and shifted by temb
 *         [B][F][h][w][2 Z]       2 30 48 84 32    project_out; the first Z channels are the prediction
 *
 * A block, h [N][D] (32 heads of 88 numbers; every norm is a LayerNorm):
 *
 *     h = skip_linear(skip_norm([h, skip]))                       only i > L/2
 *     h += time table[frame]                                      only F > 1, and it stays
 *     h += attn1(norm1(h) + shift(temb))                          all N tokens see each other; rotary positions
 *     h += attn2(norm2(h), text)                                  keys and values from the control embeddings
 *     h += norm_clip_out(gate(attn_clip(norm_clip(h), image)))    keys and values from the picture
 *     h += ff(norm3(h))                                           D -> inner (12288) -> D
 *
 * Where time enters. The timestep t, how noisy the latents are: in norm1's shift, in every block (shifted_norm), and in
 * norm_out's scale and shift; both take silu(temb). The frame, when something happens: in the time table, in every
 * block (add_time); rotary positions know x and y only, attn1 lets all frames see each other, the VAE has its causal
 * convolutions. The index of the call: it decides whether the positive row sees the picture (sees_image in ruyi.c), and
 * what the plug-ins TeaCache and Enhance-A-Video do. And the schedulers take t, or its sigma (ruyi.c).
 *
 * Invariants. A guidance row never looks at another, so rows run one after the other or together; the numbers are the
 * same. Nothing of size N x N exists. Layers that widen the stream run in pieces of TOKENS tokens. The order of sums is
 * fixed (linear_plain in tensor.c: bias first, then chunks of 256), so no piece, tile or thread moves a bit.
 *
 * Interface (ruyi.h): clip_open, clip_preprocess, clip_encode; dit_open, dit_conditions, dit_forward. Reading order:
 * dit_forward, forward_rows, run_blocks, block, attend; then dit_conditions; then clip_encode; the rest when asked for.
 *
 * Mirrors CLIPVisionModelWithProjection of transformers, and of the public code ruyi/models/transformer3d.py
 * (HunyuanTransformer3DModel), attention.py (HunyuanDiTBlock, GEGLU), attention_processor.py, embeddings.py, norm.py,
 * resampler.py and motion_module.py (PositionalEncoding), with the classes of diffusers that they use.
 *
 * Papers (arXiv): transformer 1706.03762, ViT 2010.11929, CLIP 2103.00020, DiT 2212.09748, Hunyuan-DiT 2405.08748, long
 * skips as in U-ViT 2209.12152, rotary positions 2104.09864, normed queries and keys 2302.05442, gated GELU 2002.05202.
 */
#include "ruyi.h"

#include <math.h>
#include <stdlib.h>

enum { TOKENS = 1024 };         /* tokens in a piece of a widening layer: bounds its memory, changes no bit */

/* A new tensor of the size of x. */
static tensor like(arena *a, tensor x) { return tensor_new(a, tensor_shape(x)); }

/* A parameter as a tensor of that shape. Without data, in the planning pass, it has the shape alone. */
static tensor widened(arena *a, weight w, shape s)
{
    return tensor_of(weight_vector(a, w), s);
}

/* to[first ...] = from, along the first dimension. */
static void copy_rows(tensor to, int64_t first, tensor from)
{
    tensor_copy(tensor_part(to, first, from.dim[0]), from);
}

/* x [M][K] so many times, one below the other: [times * M][K]. */
static tensor repeated(arena *a, tensor x, int64_t times)
{
    tensor y = tensor_new(a, SHAPE(times * x.dim[0], x.dim[1]));
    for (int64_t i = 0; i < times; i++)
        copy_rows(y, i * x.dim[0], x);
    return y;
}

/* The rows of x [M][K] and y [M][L] side by side: [M][K + L]. torch.cat(dim=-1). */
static tensor side_by_side(arena *a, tensor x, tensor y)
{
    int64_t k = x.dim[1], l = y.dim[1];
    tensor both = tensor_new(a, SHAPE(x.dim[0], k + l));
    for (int64_t i = 0; i < x.dim[0] && both.data; i++) {
        memcpy(both.data + i * (k + l), x.data + i * k, (size_t)k * sizeof(real));
        memcpy(both.data + i * (k + l) + k, y.data + i * l, (size_t)l * sizeof(real));
    }
    return both;
}

/* second(f(first(x))), x [M][K] -> [M][second's rows]: CLIP's MLP with its own activation, and with SiLU, x / (1 +
 * exp(-x)), TimestepEmbedding and both PixArtAlphaTextProjections of embeddings.py: four modules, one formula. */
static tensor two_layers(arena *a, tensor x, layer first, activation f, layer second)
{
    tensor inner = linear(a, x, first);
    activate(inner, f);
    return linear(a, inner, second);
}

/* Row i of x [M][D] += row i / each of table [R][D], which begins anew after R * each rows. */
static void add_rows(tensor x, tensor table, int64_t each)
{
    int64_t size = x.dim[1];
    for (int64_t i = 0; i < x.dim[0] && x.data; i++)
        for (int64_t k = 0; k < size; k++)
            x.data[i * size + k] += table.data[i / each % table.dim[0] * size + k];
}

/* ---------------------------------------------------------------- CLIP image tower
 *
 * A vision transformer (ViT) trained to agree with captions. Its tokens tell the DiT what is in the picture, while the
 * masked latents tell it where. Names are those of transformers' modeling_clip.py, spelling mistakes and all.
 *
 *     picture --resize--> shorter side = shortest_edge --crop--> the middle, S x S --(v / 255 - mean) / std--> pixels
 *     pixels --a convolution of stride p--> S/p x S/p patches --layers--> tokens         224 x 224, 16 x 16 patches
 *
 * So the sides of a wide picture are never seen: of 672 x 384 pixels the tower sees the middle 384 x 384, 57 %. What is
 * outside reaches the DiT through the masked latents alone. */

typedef struct { layer layer_norm1, q_proj, k_proj, v_proj, out_proj, layer_norm2, fc1, fc2; } clip_layer;

struct clip {
    clip_config config;
    weights *weights;
    weight class_embedding;                 /* [width] */
    weight position_embedding;              /* [1 + patches][width] */
    layer patch_embedding;                  /* [width][p * p][3], no bias */
    layer pre_layrnorm;                     /* that spelling is the checkpoint's */
    clip_layer *layers;                     /* [num_hidden_layers] */
};

const clip_config *clip_settings(const clip *c) { return &c->config; }
const weights *clip_weights(const clip *c) { return c->weights; }

/* size and crop_size: {"shortest_edge": n}, {"height": n, "width": n}, or n, which older files have. The crop is square
 * because the tower has a position embedding for every patch of a square, and CLIP never resizes them. */
static int64_t read_side(config f, const char *field, const char *member, int64_t otherwise)
{
    json value = config_member(f, field);
    if (json_kind(value) != '{')
        return config_int(f, field, otherwise, 1, 65536);
    config inner = { f.path, NULL, value, f.read };
    int64_t side = config_int(inner, member, REQUIRED, 1, 65536);
    CONFIG_NEED(strcmp(member, "height") || config_int(inner, "width", REQUIRED, 1, 65536) == side, f, field,
                "expected the same height and width");
    return side;
}

/* A list of three numbers, one a colour -> out; the default where the field is absent. */
static void read_colours(config f, const char *field, const double otherwise[3], double out[3])
{
    double *list = config_reals(f, field, 3, "one for each colour");
    memcpy(out, list ? list : otherwise, 3 * sizeof *out);
    free(list);
}

/* preprocessor_config.json: what CLIPImageProcessor does to a picture. Its defaults are CLIP's own means and
 * deviations, which the tower was trained with: another model's (often 0.5 of each) would run as well, and be wrong.
 * Switching a step off is refused for the same reason. resample 3 is Pillow's number for bicubic. */
static void read_preprocessor(const char *folder, clip_config *c)
{
    static const double mean[3] = { 0.48145466, 0.4578275, 0.40821073 };
    static const double std[3] = { 0.26862954, 0.26130258, 0.27577711 };
    static const char *const steps[] = { "do_resize", "do_center_crop", "do_rescale", "do_normalize" };
    config f = c->preprocessor = config_open(folder, "preprocessor_config.json");
    for (int i = 0; i < 4; i++)
        CONFIG_NEED(config_bool(f, steps[i], true), f, steps[i],
                    "expected true: a picture is always resized, cropped, rescaled and normalised");
    CONFIG_NEED(config_int(f, "resample", 3, 0, 5) == 3, f, "resample",
                "expected 3, bicubic; nothing else is supported");
    c->shortest_edge = read_side(f, "size", "shortest_edge", 224);
    c->crop_size = read_side(f, "crop_size", "height", 224);
    c->rescale_factor = config_real(f, "rescale_factor", 1.0 / 255);
    read_colours(f, "image_mean", mean, c->image_mean);
    read_colours(f, "image_std", std, c->image_std);
    CONFIG_NEED(c->image_std[0] > 0 && c->image_std[1] > 0 && c->image_std[2] > 0, f, "image_std",
                "expected positive numbers");
    CONFIG_NEED(c->crop_size == c->image_size, f, "crop_size", "expected the tower's image_size %lld",
                ll(c->image_size));
    CONFIG_NEED(c->shortest_edge >= c->crop_size, f, "size", "expected a shortest edge of at least crop_size %lld",
                ll(c->crop_size));
}

/* config.json of the tower, or of a whole CLIP model, where the tower's is the member vision_config. Absent fields have
 * the defaults of CLIPVisionConfig. hidden_act: quick_gelu is x / (1 + exp(-1.702 x)), which the first CLIP models were
 * trained with; gelu, in later ones, is x/2 (1 + erf(x / sqrt(2))). */
static clip_config read_clip_config(const char *folder)
{
    static const char *const acts[] = { "quick_gelu", "gelu" };
    config f = config_open(folder, "config.json");
    if (json_kind(json_member(f.root, "vision_config")) == '{')
        f.root = json_member(f.root, "vision_config");
    clip_config c = {
        .file = f, .hidden_size = config_int(f, "hidden_size", 768, 1, 1 << 20),
        .intermediate_size = config_int(f, "intermediate_size", 3072, 1, 1 << 22),
        .num_hidden_layers = config_int(f, "num_hidden_layers", 12, 1, 10000),
        .num_attention_heads = config_int(f, "num_attention_heads", 12, 1, 65536),
        .image_size = config_int(f, "image_size", 224, 1, 65536),
        .patch_size = config_int(f, "patch_size", 32, 1, 65536),
        .layer_norm_eps = config_real(f, "layer_norm_eps", 1e-5),
    };
    config_int(f, "num_channels", 3, 3, 3);
    c.hidden_act = config_choice(f, "hidden_act", "quick_gelu", acts, 2) ? GELU_ERF : QUICK_GELU;
    CONFIG_NEED(c.hidden_size % c.num_attention_heads == 0, f, "num_attention_heads",
                "expected a divisor of hidden_size %lld", ll(c.hidden_size));
    CONFIG_NEED(c.patch_size <= c.image_size, f, "patch_size", "expected at most image_size %lld", ll(c.image_size));
    read_preprocessor(folder, &c);
    return c;
}

/* Patches along one side; pixels beyond the last whole patch are not seen. */
static int64_t clip_side(const clip_config *c) { return c->image_size / c->patch_size; }

/* CLIPEncoderLayer I: an attention and an MLP (width -> intermediate_size -> width), all with bias. */
static clip_layer bind_clip_layer(weights *w, const clip_config *c, int64_t i)
{
    int64_t d = c->hidden_size, inner = c->intermediate_size;
    char *at = text_of("vision_model.encoder.layers.%lld", ll(i));
    clip_layer l = {
        .layer_norm1 = bind_norm(w, d, "%s.layer_norm1", at), .layer_norm2 = bind_norm(w, d, "%s.layer_norm2", at),
        .q_proj = bind_linear(w, d, d, "%s.self_attn.q_proj", at),
        .k_proj = bind_linear(w, d, d, "%s.self_attn.k_proj", at),
        .v_proj = bind_linear(w, d, d, "%s.self_attn.v_proj", at),
        .out_proj = bind_linear(w, d, d, "%s.self_attn.out_proj", at),
        .fc1 = bind_linear(w, inner, d, "%s.mlp.fc1", at), .fc2 = bind_linear(w, d, inner, "%s.mlp.fc2", at),
    };
    free(at);
    return l;
}

/* Reads folder (a model's image_encoder/): two configurations and the weights. What comes after the last layer is known
 * and not used, see clip_encode. */
clip *clip_open(const char *folder, bool allow_unknown)
{
    clip *c = allocate(1, sizeof *c);
    c->config = read_clip_config(folder);
    weights *w = c->weights = weights_open(folder, "model");
    int64_t side = clip_side(&c->config), d = c->config.hidden_size, p = c->config.patch_size, patches = side * side;
    c->class_embedding = bind(w, SHAPE(d), "vision_model.embeddings.class_embedding");
    c->position_embedding = bind(w, SHAPE(patches + 1, d), "vision_model.embeddings.position_embedding.weight");
    c->patch_embedding.weight = bind_conv(w, SHAPE(d, 3, p, p), "vision_model.embeddings.patch_embedding.weight");
    c->pre_layrnorm = bind_norm(w, d, "vision_model.pre_layrnorm");
    c->layers = allocate((size_t)c->config.num_hidden_layers, sizeof *c->layers);
    for (int64_t i = 0; i < c->config.num_hidden_layers; i++)
        c->layers[i] = bind_clip_layer(w, &c->config, i);
    weights_ignore(w, "vision_model.post_layernorm.*");
    weights_ignore(w, "visual_projection.weight");
    weights_ignore(w, "vision_model.embeddings.position_ids");
    weights_done(w, allow_unknown);
    return c;
}

/* CLIPImageProcessor: the shorter side to shortest_edge, the longer to int(edge * long / short), then the middle
 * crop_size x crop_size. Still 8 bits, as Pillow leaves it. Its caller frees rgb. */
image clip_preprocess(const clip_config *c, image picture)
{
    int64_t edge = c->shortest_edge, crop = c->crop_size;
    bool wide = picture.w >= picture.h;
    int64_t w = wide ? edge * picture.w / picture.h : edge, h = wide ? edge : edge * picture.h / picture.w;
    image resized = image_resize(picture, w, h), out = { crop, crop, allocate((size_t)(3 * crop * crop), 1) };
    int64_t left = (resized.w - crop) / 2, top = (resized.h - crop) / 2;
    for (int64_t y = 0; y < crop; y++)
        memcpy(out.rgb + 3 * y * crop, resized.rgb + 3 * ((top + y) * resized.w + left), (size_t)(3 * crop));
    free(resized.rgb);
    return out;
}

/* 8 bits -> [1][S][S][3]: v becomes (v * rescale_factor - mean) / std, in double before it is rounded once. */
static tensor clip_pixels(arena *a, const clip_config *s, image crop)
{
    tensor pixels = tensor_new(a, SHAPE(1, s->image_size, s->image_size, 3));
    for (int64_t i = 0; i < tensor_count(pixels) && pixels.data; i++)
        pixels.data[i] = (real)((crop.rgb[i] * s->rescale_factor - s->image_mean[i % 3]) / s->image_std[i % 3]);
    return pixels;
}

/* pixels [1][S][S][3] -> [1 + patches][width]: class token, then patches row by row, with their positions;
 * pre_layrnorm. CLIPVisionEmbeddings: the patch embedding is a convolution whose stride is its kernel, so patches do
 * not overlap. */
static tensor clip_embed(const run *r, const clip *c, tensor pixels)
{
    arena *a = r->arena;
    int64_t side = clip_side(&c->config), p = c->config.patch_size, d = c->config.hidden_size, patches = side * side;
    tensor x = tensor_new(a, SHAPE(1 + patches, d));
    size_t mark = arena_mark(a);
    tensor grid = tensor_view(tensor_part(x, 1, patches), SHAPE(1, side, side, d));
    conv(a, grid, pixels, (conv_spec){ .kernel = { 1, p, p }, .stride = { 1, p, p }, .up = 1 }, c->patch_embedding);
    copy_rows(x, 0, widened(a, c->class_embedding, SHAPE(1, d)));
    add(x, widened(a, c->position_embedding, SHAPE(1 + patches, d)));
    arena_reset(a, mark);
    layer_norm(a, x, x, c->pre_layrnorm, c->config.layer_norm_eps);
    given(r, x, AS_IS, "clip.embed");
    dump(r, x, AS_IS, "clip.embed");
    return x;
}

/* CLIPEncoderLayer, x [1 + patches][width] in place. n holds what is normed, then what was attended. CLIP's norms have
 * the eps of its config.json, often 1e-5, the DiT's 1e-6. */
static void clip_block(const run *r, const clip *c, tensor x, const clip_layer *l)
{
    arena *a = r->arena;
    size_t mark = arena_mark(a);
    tensor n = like(a, x);                      /* x += out_proj(attention(layer_norm1(x))) */
    layer_norm(a, n, x, l->layer_norm1, c->config.layer_norm_eps);
    tensor q = linear(a, n, l->q_proj), k = linear(a, n, l->k_proj), v = linear(a, n, l->v_proj);
    attention(a, n, q, k, v, 1, c->config.num_attention_heads);
    linear_to(a, q, n, l->out_proj);
    add(x, q);                                  /* x += fc2(act(fc1(layer_norm2(x)))) */
    layer_norm(a, n, x, l->layer_norm2, c->config.layer_norm_eps);
    add(x, two_layers(a, n, l->fc1, c->config.hidden_act, l->fc2));
    arena_reset(a, mark);
}

/* The picture as clip_preprocess leaves it -> [patches][hidden_size]: last_hidden_state[:, 1:], the last layer's tokens
 * without the class token. A trap: post_layernorm and the projection, although in every checkpoint, are not used, for
 * they belong to the pooled output; these tokens come as the residual stream leaves them, not normalised. */
tensor clip_encode(const run *r, const clip *c, image crop)
{
    arena *a = r->arena;
    const clip_config *s = &c->config;
    size_t mark = arena_mark(a);
    tensor hidden = tensor_new(a, SHAPE(clip_side(s) * clip_side(s), s->hidden_size));
    if (given(r, hidden, AS_IS, "clip.hidden"))
        return hidden;
    arena_reset(a, mark);
    tensor pixels = clip_pixels(a, s, crop), shown = tensor_view(pixels, SHAPE(s->image_size, s->image_size, 3));
    given(r, shown, CHANNELS_FIRST, "clip.pixels");
    dump(r, shown, CHANNELS_FIRST, "clip.pixels");
    tensor x = clip_embed(r, c, pixels);
    int64_t first = s->num_hidden_layers - 1;   /* a given layer is where it begins */
    while (first > 0 && !is_given(r, "clip.layer.%02d", (int)first))
        first--;
    for (int64_t i = first; i < s->num_hidden_layers; i++) {
        if (!given(r, x, AS_IS, "clip.layer.%02d", (int)i))
            clip_block(r, c, x, &c->layers[i]);
        dump(r, x, AS_IS, "clip.layer.%02d", (int)i);
        progress(r, "clip", i + 1, s->num_hidden_layers);
    }
    x = arena_return(a, mark, tensor_part(x, 1, x.dim[0] - 1));
    dump(r, x, AS_IS, "clip.hidden");
    return x;
}

/* ---------------------------------------------------------------- DiT: configuration and weights
 *
 * Where the seven billion numbers of the published model are: D 2816, X 1024, inner 12288, in each of 40 blocks
 *
 *     attn1                  4 D D               31.7 million     queries, keys, values, output
 *     attn2 and attn_clip    4 D D + 4 X D       43.3             keys and values come from X numbers
 *     norm1.linear             D D                7.9             what the timestep shifts
 *     gate_clip.proj         2 D D               15.9             values and their gates
 *     ff                     2 D inner           69.2             41 % of a block
 *     skip_linear            2 D D               15.9             in 19 of them, 21 .. 39
 *
 * which is 40 * 168.0 + 19 * 15.9 million = 7.02 billion; conditions, Resampler and both ends have 0.16 billion. Biases
 * and norms do not show in these digits. A call reads all of it once for every group of rows that are run together. */

/* Sizes that no configuration has, because the public classes have them in their text. */
enum {
    SINUSOIDS = 256,            /* Timesteps(num_channels=256) in embeddings.py */
    META = 6 * SINUSOIDS,       /* six numbers of the size condition */
    POOL_HEADS = 8,             /* HunyuanDiTAttentionPool(num_heads=8) in embeddings.py */
};

/* An Attention of diffusers: to_q, to_out [D][D]; to_k, to_v [D][D], or [D][X] where text or picture are looked at;
 * norm_q, norm_k [head], shared by all heads. */
typedef struct { layer to_q, to_k, to_v, to_out, norm_q, norm_k; } attention_layer;

typedef struct {                /* blocks.N: HunyuanDiTBlock */
    layer skip_norm, skip_linear;           /* [2D], [D][2D]: absent up to the middle */
    weight t_embed;                         /* [1][512][D], absent: computed */
    layer norm1_norm, norm1_linear;         /* [D], [D][D] from silu(temb) */
    layer norm2, norm_clip, norm3;          /* [D] */
    attention_layer attn1, attn2, attn_clip;
    layer gate_norm, gate_proj, norm_clip_out;      /* [D], [2D][D], [D] */
    layer ff_proj, ff_out;                  /* [inner][D], [D][inner] */
} block_weights;

struct dit {
    dit_config config;
    weights *weights;
    layer patch;                            /* pos_embed.proj [D][p * p][3Z] */
    layer timestep_1, timestep_2;           /* timestep_embedder [D][256], [D][D] */
    layer pool_q, pool_k, pool_v, pool_c;   /* pooler [T5][T5], pool_c [pooled][T5] */
    weight pool_positions;                  /* [1 + text_len_t5][T5] */
    weight style;                           /* [1][D] */
    layer extra_1, extra_2;                 /* extra_embedder [4D][pooled + 6 * 256 + D], [D][4D] */
    layer text_1, text_2;                   /* text_embedder [4 T5][T5], [X][4 T5] */
    weight text_padding;                    /* [text_len + text_len_t5][X] */
    weight clip_padding;                    /* [Q][X] */
    weight query, positions;                /* the Resampler, clip_projection: [Q][X] */
    weight kv_proj;                         /* [X][CLIP's width], absent where that is X */
    layer ln_q, ln_kv;                      /* [X] */
    weight in_proj_weight, in_proj_bias;    /* q, k, v packed: [3X][X], [3X] */
    layer out_proj;                         /* [X][X] */
    block_weights *blocks;                  /* [num_layers] */
    layer norm_out, proj_out;               /* [2D][D] from silu(temb), [p * p * 2Z][D] */
};

const dit_config *dit_settings(const dit *d) { return &d->config; }
const weights *dit_weights(const dit *d) { return d->weights; }

/* The root of a square, -1 of anything else. */
static int64_t square_root(int64_t n)
{
    int64_t s = (int64_t)(sqrt((double)n) + 0.5);
    return s * s == n ? s : -1;
}

/* What must hold between fields. The public classes do not check: they fail later, on shapes (hidden_size, heads, an
 * odd number of blocks, which pops a skip more than was kept) or on the Resampler's grid (n_query). */
static void check_dit_config(config f, const dit_config *c, int64_t stated_size)
{
    CONFIG_NEED(c->hidden_size == stated_size, f, "hidden_size", "expected num_attention_heads * attention_head_dim = "
                "%lld * %lld", ll(c->num_attention_heads), ll(c->attention_head_dim));
    CONFIG_NEED(c->attention_head_dim % 4 == 0, f, "attention_head_dim",
                "expected a multiple of 4: rotary pairs for x and for y");
    CONFIG_NEED(c->num_layers % 2 == 0, f, "num_layers",
                "expected an even number: every skip has one block to come from");
    CONFIG_NEED(square_root(c->n_query) >= 0, f, "n_query", "expected a square");
    CONFIG_NEED(c->cross_attention_dim % c->num_attention_heads == 0, f, "cross_attention_dim",
                "expected a multiple of num_attention_heads %lld, the Resampler's heads", ll(c->num_attention_heads));
    CONFIG_NEED(c->cross_attention_dim_t5 % POOL_HEADS == 0, f, "cross_attention_dim_t5",
                "expected a multiple of %d, the pooler's heads", POOL_HEADS);
}

/* transformer/config.json. Absent fields have the defaults of HunyuanTransformer3DModel.__init__. The block's type and
 * its time table are not read: the public loader overrides them (basic, after_norm false, time_position_encoding
 * true). */
static dit_config read_dit_config(const char *folder)
{
    config f = config_open(folder, "config.json");
    dit_config c = {
        .file = f, .num_attention_heads = config_int(f, "num_attention_heads", 16, 1, 65536),
        .attention_head_dim = config_int(f, "attention_head_dim", 88, 1, 65536),
        .num_layers = config_int(f, "num_layers", 28, 2, 10000),
        .patch_size = config_int(f, "patch_size", REQUIRED, 1, 64),
        .in_channels = config_int(f, "in_channels", REQUIRED, 48, 48),      /* the pipeline insists: 16 + 16 + 16 */
        .out_channels = config_int(f, "out_channels", REQUIRED, 32, 32),    /* the first half is the prediction */
        .cross_attention_dim = config_int(f, "cross_attention_dim", 1024, 1, 1 << 20),
        .cross_attention_dim_t5 = config_int(f, "cross_attention_dim_t5", 2048, 1, 1 << 20),
        .pooled_projection_dim = config_int(f, "pooled_projection_dim", 1024, 1, 1 << 20),
        .text_len = config_int(f, "text_len", 77, 1, 1 << 20),
        .text_len_t5 = config_int(f, "text_len_t5", 256, 1, 1 << 20),
        .n_query = config_int(f, "n_query", 16, 1, 1 << 20),
        .projection_dim = config_int(f, "projection_dim", 768, 1, 1 << 20),
    };
    double ratio = config_real(f, "mlp_ratio", 4.0);
    c.hidden_size = c.num_attention_heads * c.attention_head_dim;
    CONFIG_NEED(ratio > 0 && ratio < 1000 && (double)c.hidden_size * ratio >= 1, f, "mlp_ratio",
                "expected a positive ratio");
    c.inner = (int64_t)((double)c.hidden_size * ratio);     /* Python's int(): 2816 * 4.3637 is 12288 */
    config_choice(f, "activation_fn", "gelu-approximate", (const char *const[]){ "gelu-approximate" }, 1);
    check_dit_config(f, &c, config_int(f, "hidden_size", 1152, 1, 1 << 20));
    return c;
}

/* AT.NAME: queries from the stream [D], keys and values from tokens of `source` numbers. */
static attention_layer bind_attention(weights *w, const dit_config *c, const char *at, const char *name, int64_t source)
{
    int64_t d = c->hidden_size, head = c->attention_head_dim;
    return (attention_layer){
        .to_q = bind_linear(w, d, d, "%s.%s.to_q", at, name), .norm_q = bind_norm(w, head, "%s.%s.norm_q", at, name),
        .to_k = bind_linear(w, d, source, "%s.%s.to_k", at, name),
        .norm_k = bind_norm(w, head, "%s.%s.norm_k", at, name),
        .to_v = bind_linear(w, d, source, "%s.%s.to_v", at, name),
        .to_out = bind_linear(w, d, d, "%s.%s.to_out.0", at, name),             /* .1 is a dropout */
    };
}

/* blocks.I, in the order of its sublayers. Up to the middle a block has no skip_norm and skip_linear (public:
 * skip=layer > num_layers // 2). The time table is a buffer of the public class, so checkpoints usually have it,
 * rounded to their own type; PyTorch loads it over the one that it computed, and so does time_row: the formula would be
 * more exact, but not the model's. */
static void bind_block(weights *w, const dit_config *c, block_weights *b, int64_t i)
{
    int64_t d = c->hidden_size, x = c->cross_attention_dim;
    char *at = text_of("blocks.%lld", ll(i)), *table = text_of("%s.t_embed.pe", at);
    if (i > c->num_layers / 2) {
        b->skip_norm = bind_norm(w, 2 * d, "%s.skip_norm", at);
        b->skip_linear = bind_linear(w, d, 2 * d, "%s.skip_linear", at);
    }
    if (weights_has(w, table))
        b->t_embed = bind(w, SHAPE(1, TIME_ROWS, d), "%s", table);
    b->norm1_norm = bind_norm(w, d, "%s.norm1.norm", at);
    b->norm1_linear = bind_linear(w, d, d, "%s.norm1.linear", at);
    b->attn1 = bind_attention(w, c, at, "attn1", d);
    b->norm2 = bind_norm(w, d, "%s.norm2", at);
    b->attn2 = bind_attention(w, c, at, "attn2", x);
    b->norm_clip = bind_norm(w, d, "%s.norm_clip", at);
    b->attn_clip = bind_attention(w, c, at, "attn_clip", x);
    b->gate_norm = bind_norm(w, d, "%s.gate_clip.norm", at);
    b->gate_proj = bind_linear(w, 2 * d, d, "%s.gate_clip.proj", at);
    b->norm_clip_out = bind_norm(w, d, "%s.norm_clip_out", at);
    b->norm3 = bind_norm(w, d, "%s.norm3", at);
    b->ff_proj = bind_linear(w, c->inner, d, "%s.ff.net.0.proj", at);
    b->ff_out = bind_linear(w, d, c->inner, "%s.ff.net.2", at);
    free(table);
    free(at);
}

/* time_extra_emb (HunyuanCombinedTimestepTextSizeStyleEmbedding), text_embedder (PixArtAlphaTextProjection),
 * padding. */
static void bind_conditions(weights *w, const dit_config *c, dit *d)
{
    int64_t size = c->hidden_size, t5 = c->cross_attention_dim_t5, x = c->cross_attention_dim;
    int64_t pooled = c->pooled_projection_dim;
    d->timestep_1 = bind_linear(w, size, SINUSOIDS, "time_extra_emb.timestep_embedder.linear_1");
    d->timestep_2 = bind_linear(w, size, size, "time_extra_emb.timestep_embedder.linear_2");
    d->pool_positions = bind(w, SHAPE(c->text_len_t5 + 1, t5), "time_extra_emb.pooler.positional_embedding");
    d->pool_q = bind_linear(w, t5, t5, "time_extra_emb.pooler.q_proj");
    d->pool_k = bind_linear(w, t5, t5, "time_extra_emb.pooler.k_proj");
    d->pool_v = bind_linear(w, t5, t5, "time_extra_emb.pooler.v_proj");
    d->pool_c = bind_linear(w, pooled, t5, "time_extra_emb.pooler.c_proj");
    d->style = bind(w, SHAPE(1, size), "time_extra_emb.style_embedder.weight");
    d->extra_1 = bind_linear(w, 4 * size, META + size + pooled, "time_extra_emb.extra_embedder.linear_1");
    d->extra_2 = bind_linear(w, size, 4 * size, "time_extra_emb.extra_embedder.linear_2");
    d->text_1 = bind_linear(w, 4 * t5, t5, "text_embedder.linear_1");
    d->text_2 = bind_linear(w, x, 4 * t5, "text_embedder.linear_2");
    d->text_padding = bind(w, SHAPE(c->text_len + c->text_len_t5, x), "text_embedding_padding");
}

/* clip_projection (Resampler) and clip_padding. Where the widths agree kv_proj is an nn.Identity, which has no
 * weight. */
static void bind_resampler(weights *w, const dit_config *c, dit *d)
{
    int64_t x = c->cross_attention_dim;
    d->clip_padding = bind(w, SHAPE(c->n_query, x), "clip_padding");
    d->query = bind(w, SHAPE(c->n_query, x), "clip_projection.query");
    d->positions = bind(w, SHAPE(c->n_query, x), "clip_projection.pos_embed");
    if (c->projection_dim != x)
        d->kv_proj = bind(w, SHAPE(x, c->projection_dim), "clip_projection.kv_proj.weight");
    d->ln_q = bind_norm(w, x, "clip_projection.ln_q");
    d->ln_kv = bind_norm(w, x, "clip_projection.ln_kv");
    d->in_proj_weight = bind(w, SHAPE(3 * x, x), "clip_projection.attn.in_proj_weight");
    d->in_proj_bias = bind(w, SHAPE(3 * x), "clip_projection.attn.in_proj_bias");
    d->out_proj = bind_linear(w, x, x, "clip_projection.attn.out_proj");
}

/* FP8 as a storage type, by the rules of predict_i2v.py: "lite" takes linear layers of more than 2816^2 elements,
 * "strong" those of as many, too, "extreme" every layer but the embedding, the norms that are a plain nn.LayerNorm
 * (those of queries and keys, and the Resampler's), and the Resampler's attention. Biases go with their weights.
 * Activations and sums stay `real`, as the public code's autocast widens the weights again. */
static void choose_fp8(weights *w, fp8_mode mode, dtype t)
{
    static const uint64_t least[] = { [FP8_LITE] = 2816ul * 2816 + 1, [FP8_STRONG] = 2816ul * 2816, [FP8_EXTREME] = 1 };
    static const char *const kept[] = { "*.style_embedder", "*.norm_[qk]", "clip_projection.ln_*",
                                        "clip_projection.attn.out_proj", NULL };
    if (mode == FP8_OFF)
        return;
    w->fp8 = t;
    w->fp8_least = least[mode];
    w->fp8_kept = kept;
}

/* Reads folder (a model's transformer/). Low-rank updates, W += scale * up @ down, must be there before anything is
 * bound: bind attaches to each matrix those that name it, and its rows are updated whenever they are read. The public
 * merge_lora (utils/lora_utils.py) changes the matrices once instead. Dies on a tensor that has no place, unless
 * allowed. */
dit *dit_open(const char *folder, dit_changes changes, bool allow_unknown)
{
    dit *d = allocate(1, sizeof *d);
    const dit_config *c = &d->config;
    d->config = read_dit_config(folder);
    weights *w = d->weights = weights_open(folder, "diffusion_pytorch_model");
    w->loras = changes.loras;
    w->lora_scales = changes.scales;
    w->nloras = changes.nloras;
    choose_fp8(w, changes.fp8, changes.fp8_type);
    int64_t p = c->patch_size, size = c->hidden_size;
    d->patch = bind_convolution(w, SHAPE(size, c->in_channels, p, p), "pos_embed.proj");
    bind_conditions(w, c, d);
    bind_resampler(w, c, d);
    d->blocks = allocate((size_t)c->num_layers, sizeof *d->blocks);
    for (int64_t i = 0; i < c->num_layers; i++)
        bind_block(w, c, &d->blocks[i], i);
    d->norm_out = bind_linear(w, 2 * size, size, "norm_out.linear");
    d->proj_out = bind_linear(w, p * p * c->out_channels, size, "proj_out");
    weights_done(w, allow_unknown);
    return d;
}

/* ---------------------------------------------------------------- DiT: conditions, the same at every step
 *
 *     emb2 [tokens][T5] --pooler--> pooled -----------+
 *     sizes 1024 1024 H W 0 0 --sinusoids--> 6 * 256 -+--extra_embedder--> extra [1][D], added to the timestep's vector
 *     style [D] --------------------------------------+
 *     emb1 [text_len][X], text_embedder(emb2) [text_len_t5][X], masked --> text [text_len + text_len_t5][X]
 *     CLIP tokens [patches][width] --Resampler--> image [Q][X]
 *
 * A condition is used in one of two ways: as a vector that is added (extra), or as tokens that blocks look at (text,
 * image). emb1 and emb2 are what a CLIP text encoder and T5 made of a caption. Users do not write captions: the model
 * has these ready-made, one pair for every camera and motion (embeddings.safetensors).
 *
 * Everything has B rows. With classifier-free guidance there are two, and the model runs for each.
 * Which rows see CLIP tokens, and when, of n calls:
 *
 *                      words                 call i < 0.6 n    the last 40 %
 *     row 0 negative   n.default             clip_padding      clip_padding
 *     row 1 positive   camera and motion     clip_padding      the picture's CLIP tokens, if there is a picture
 *
 * So early calls, which lay out the clip, know the picture from the masked latents alone, and late ones, which work out
 * detail, are pushed towards what CLIP saw. Latents, mask and masked video are the same in both rows. The rows meet
 * only outside (guide in ruyi.c), in negative + cfg * (positive - negative), which exaggerates what words and picture
 * changed. Where cfg is at most 1 there is one row, the positive one. */

/* The position v as 256 numbers between -1 and 1.
 *
 * Formula:  out[i] = cos(v f_i), out[128 + i] = sin(v f_i), f_i = 10000^(-i/128), 0 <= i < 128
 * Trap:     cosines come first (flip_sin_to_cos), where the time table begins with a sine; and i/128, not i/127, as
 *           downscale_freq_shift is 0 here
 * Method:   in double: v reaches 1000, and rounding v f_i to float alone would cost 3e-5
 * Source:   get_timestep_embedding(flip_sin_to_cos=True, downscale_freq_shift=0) of embeddings.py. */
static void sinusoids(double v, real *out)
{
    enum { HALF = SINUSOIDS / 2 };
    for (int i = 0; i < HALF; i++) {
        double sine, cosine;
        sincos_own(v * exp_own(-log_own(10000) * i / HALF), &sine, &cosine);
        out[i] = (real)cosine;
        out[HALF + i] = (real)sine;
    }
}

/* HunyuanDiTAttentionPool: tokens [L][T5] -> [1][pooled]. The mean token is put in front, and it alone asks; all
 * answer, itself included. There is no mask: padding takes part, in the mean, too. */
static tensor pool(arena *a, const dit *d, tensor tokens)
{
    int64_t length = tokens.dim[0], width = tokens.dim[1];
    tensor x = tensor_new(a, SHAPE(1 + length, width));
    copy_rows(x, 1, tokens);
    for (int64_t k = 0; k < width && x.data; k++) {
        double sum = 0;
        for (int64_t i = 0; i < length; i++)
            sum += (double)tokens.data[i * width + k];
        x.data[k] = (real)(sum / (double)length);
    }
    add(x, widened(a, d->pool_positions, SHAPE(1 + length, width)));
    tensor q = linear(a, tensor_part(x, 0, 1), d->pool_q), k = linear(a, x, d->pool_k), v = linear(a, x, d->pool_v);
    tensor o = like(a, q);
    attention(a, o, q, k, v, 1, POOL_HEADS);
    return linear(a, o, d->pool_c);
}

/* extra_embedder([pooled, meta, style]) -> [1][D]. meta is a size condition as in SDXL (arXiv 2307.01952): the original
 * size, the target size, height first, and the crop's corner. The pipeline fixes the first at 1024 x 1024, whatever the
 * picture, and the last at 0, 0. There is one style, row 0 of its embedding. */
static tensor extra_embedding(arena *a, const dit *d, tensor emb2, int64_t height, int64_t width)
{
    const double meta[6] = { 1024, 1024, (double)height, (double)width, 0, 0 };
    tensor sizes = tensor_new(a, SHAPE(1, META));
    tensor style = widened(a, d->style, SHAPE(1, d->config.hidden_size));
    for (int64_t i = 0; i < 6 && sizes.data; i++)
        sinusoids(meta[i], sizes.data + i * SINUSOIDS);
    tensor x = side_by_side(a, side_by_side(a, pool(a, d, emb2), sizes), style);
    return two_layers(a, x, d->extra_1, SILU, d->extra_2);
}

/* Rows of x [L][X] whose mask is 0 become rows of the learned padding, from padding_row on. A trap: masked tokens are
 * replaced, not hidden. No attention has a mask; it sees padding where there is no text, and has learned what that
 * means. */
static void mask_rows(arena *a, tensor x, weight mask, weight padding, int64_t padding_row)
{
    const real *m = weight_vector(a, mask);
    for (int64_t i = 0; i < x.dim[0] && x.data; i++)
        if (m[i] == 0)
            weight_row(padding, padding_row + i, 0, x.dim[1], x.data + i * x.dim[1]);
}

/* out [text_len + text_len_t5][X]: emb1, then text_embedder(emb2), masked tokens replaced. emb2 [text_len_t5][T5]. */
static void text_tokens(arena *a, const dit *d, tensor out, const control *row, tensor emb2)
{
    int64_t first = d->config.text_len, second = d->config.text_len_t5;
    copy_rows(out, 0, widened(a, row->emb1, SHAPE(first, d->config.cross_attention_dim)));
    copy_rows(out, first, two_layers(a, emb2, d->text_1, SILU, d->text_2));
    mask_rows(a, tensor_part(out, 0, first), row->mask1, d->text_padding, 0);
    mask_rows(a, tensor_part(out, first, second), row->mask2, d->text_padding, first);
}

/* The four taps and weights of output i when an axis of n is resized to m by torch's bicubic.
 *
 * Formula:  x = (i + 1/2) n/m - 1/2, b = floor(x), t = x - b; taps b-1 .. b+2, clamped to the axis; with u their
 *           distances from x and a = -0.75
 *               u <= 1:  (a+2) u^3 - (a+3) u^2 + 1
 *               u <= 2:  a u^3 - 5a u^2 + 8a u - 4a
 * Source:   F.interpolate(mode="bicubic", align_corners=False); Pillow's a is -0.5, and it widens taps to shrink. */
static void bicubic_taps(int64_t i, int64_t n, int64_t m, int64_t tap[4], double share[4])
{
    const double a = -0.75;
    double x = ((double)i + 0.5) * ((double)n / (double)m) - 0.5, b = floor(x), t = x - b;
    for (int j = 0; j < 4; j++) {
        double u = fabs(t - (j - 1));
        share[j] = u <= 1 ? ((a + 2) * u - (a + 3)) * u * u + 1 : ((a * u - 5 * a) * u + 8 * a) * u - 4 * a;
        tap[j] = within((int64_t)b - 1 + j, n);
    }
}

/* Positions of an n x n grid [n * n][X] resized to [m * m][X], 16 taps a number: get_abs_pos of resampler.py. */
static void resize_positions(tensor out, tensor in, int64_t n, int64_t m)
{
    int64_t x = in.dim[1];
    for (int64_t i = 0; i < m * m && out.data; i++) {
        int64_t ty[4], tx[4];
        double wy[4], wx[4];
        bicubic_taps(i / m, n, m, ty, wy);
        bicubic_taps(i % m, n, m, tx, wx);
        for (int64_t c = 0; c < x; c++) {
            double sum = 0;
            for (int j = 0; j < 16; j++)
                sum += wy[j / 4] * wx[j % 4] * (double)in.data[(ty[j / 4] * n + tx[j % 4]) * x + c];
            out.data[i * x + c] = (real)sum;
        }
    }
}

/* The Resampler of resampler.py (as in Qwen-VL, arXiv 2308.12966): CLIP tokens [patches][width] -> out [Q][X]. Whatever
 * the size of the tower, the blocks see Q tokens: learned queries on a grid of sqrt(Q) x sqrt(Q) look at the patches.
 *
 *     kv = ln_kv(kv_proj(tokens));   q = ln_q(query) + positions;   k = kv + positions, resized;   v = kv
 *
 * Traps: positions go to queries and keys, so that a query finds its place, not to values. The checkpoint has them for
 * the queries' grid; the keys' are the same, resized (to an equal grid: themselves, exactly). eps is 1e-5, the default
 * of nn.LayerNorm, elsewhere in the DiT 1e-6. nn.MultiheadAttention packs its three projections into one matrix. */
static void resample(arena *a, const dit *d, tensor out, tensor tokens)
{
    const dit_config *c = &d->config;
    int64_t x = c->cross_attention_dim, queries = c->n_query, patches = tokens.dim[0];
    tensor positions = widened(a, d->positions, SHAPE(queries, x)), q = widened(a, d->query, SHAPE(queries, x));
    tensor value = d->kv_proj.data ? linear(a, tokens, (layer){ .weight = d->kv_proj }) : tokens;   /* [patches][X] */
    tensor v = like(a, value), key_positions = like(a, value);
    layer_norm(a, v, value, d->ln_kv, 1e-5);
    layer_norm(a, q, q, d->ln_q, 1e-5);
    add(q, positions);
    resize_positions(key_positions, positions, square_root(queries), square_root(patches));
    tensor k = repeated(a, v, 1);
    add(k, key_positions);
    tensor in[3] = { q, k, v };
    for (int i = 0; i < 3; i++) {
        layer part = { weight_rows(d->in_proj_weight, i * x, x), weight_rows(d->in_proj_bias, i * x, x) };
        in[i] = linear(a, in[i], part);
    }
    attention(a, q, in[0], in[1], in[2], 1, c->num_attention_heads);
    linear_to(a, out, q, d->out_proj);
}

/* Everything that a run's calls share; a row's temporaries are freed at its end. rows: [negative, positive], or
 * [positive] where guidance is off. tokens: CLIP's of the first picture, ndim 0 without one: the positive row then sees
 * clip_padding, as the negative row always does. The public code masks all Q tokens of a row or none: a row's are
 * clip_padding or the picture's, never a mixture. */
dit_condition dit_conditions(const run *r, const dit *d, const control *rows, int64_t count, tensor tokens,
                             int64_t height, int64_t width)
{
    arena *a = r->arena;
    const dit_config *c = &d->config;
    int64_t x = c->cross_attention_dim, length = c->text_len + c->text_len_t5;
    dit_condition out = {
        .rows = count,
        .extra = tensor_new(a, SHAPE(count, c->hidden_size)),
        .text = tensor_new(a, SHAPE(count, length, x)),
        .image = tensor_new(a, SHAPE(count, c->n_query, x)),
        .padding = tensor_new(a, SHAPE(count, c->n_query, x)),
    };
    for (int64_t i = 0; i < count; i++) {
        size_t mark = arena_mark(a);
        bool positive = i == count - 1;
        tensor emb2 = widened(a, rows[i].emb2, SHAPE(c->text_len_t5, c->cross_attention_dim_t5));
        tensor padding = widened(a, d->clip_padding, SHAPE(1, c->n_query, x));
        copy_rows(out.extra, i, extra_embedding(a, d, emb2, height, width));
        text_tokens(a, d, tensor_view(tensor_part(out.text, i, 1), SHAPE(length, x)), &rows[i], emb2);
        copy_rows(out.padding, i, padding);
        copy_rows(out.image, i, padding);
        if (positive && tokens.ndim)
            resample(a, d, tensor_view(tensor_part(out.image, i, 1), SHAPE(c->n_query, x)), tokens);
        arena_reset(a, mark);
    }
    return out;
}

/* ---------------------------------------------------------------- DiT: positions
 *
 * A token's place in its frame turns its queries and keys (rotary positions), its frame is added to the stream (time
 * table). So the same place has the same angles in all frames; only the time table tells frames apart. */

/* Angles of the rotary positions of a grid of gh x gw tokens: table [gh * gw][head / 2][cos, sin].
 *
 * Formula:  the pair (a, b) of numbers 2k, 2k+1 of a head becomes (a cos - b sin, b cos + a sin) of the angle
 *               position * 10000^(-2k / (head/2)),  0 <= k < head/4
 *           for x in the first half of the head and, with k counted anew, for y in the second. The product of a query
 *           and a key then depends on the distance between their places only.
 * Method:   positions are those of a picture of 512 pixels, base = 512/8/p tokens (32 for p = 2). The longer side of
 *           the grid spans base, the other its share of it, rounded and centred, and tokens divide their spans evenly:
 *
 *                         0              base         24 x 44 tokens (384 x 704 pixels), gh < gw: wide = 32, left = 0,
 *                       0 +------------------+        high = rint(32/44 * 24) = 17, top = rint(15/2) = 8
 *                     top |------------------|
 *                         |   the tokens     |        token (i, j) is at y = 8 + i 17/24, x = j 32/44
 *              top + high |------------------|
 *                    base +------------------+
 *
 *           So positions do not grow with the picture: at every size the model sees those that it was trained with.
 * Traps:    a pair is two neighbours, 2k and 2k+1, not k and k + head/2 as in much other code. The head's halves are
 *           the axes, x first: the public code calls the first one emb_h, but its meshgrid puts w first, so that it
 *           turns with x. rint is Python's round(), half to even.
 * Source:   get_resize_crop_region_for_grid of the pipeline, get_2d_rotary_pos_embed of diffusers. */
static double *rotary_table(arena *a, const dit_config *c, int64_t gh, int64_t gw)
{
    int64_t head = c->attention_head_dim, pairs = head / 4;
    double *table = arena_alloc(a, (size_t)(gh * gw * head), sizeof(double));
    int64_t side = 512 / 8 / c->patch_size;
    double base = (double)side, high = base, wide = base;
    if (gh > gw)
        wide = rint(base / (double)gh * (double)gw);
    else
        high = rint(base / (double)gw * (double)gh);
    double top = rint((base - high) / 2), left = rint((base - wide) / 2);
    for (int64_t i = 0; i < gh * gw && table; i++) {
        double y = top + (double)(i / gw) * (high / (double)gh), x = left + (double)(i % gw) * (wide / (double)gw);
        for (int64_t k = 0; k < 2 * pairs; k++) {
            double turn = exp_own(-log_own(10000) * 2 * (double)(k % pairs) / ((double)head / 2));
            double *angle = table + i * head + 2 * k;
            sincos_own((k < pairs ? x : y) * turn, &angle[1], &angle[0]);
        }
    }
    return table;
}

/* Row f of the time table, out [size]: from the checkpoint where it has one, otherwise computed.
 *
 * Formula:  out[2i] = sin(f 10000^(-2i/D)), out[2i+1] = cos of the same; size D is even
 * Trap:     sine and cosine take turns here, sine first; the timestep's 256 numbers are 128 cosines, then 128 sines
 * Source:   PositionalEncoding of motion_module.py. */
static void time_row(const block_weights *b, int64_t f, int64_t size, real *out)
{
    if (b->t_embed.data) {
        weight_row(b->t_embed, 0, f * size, size, out);
        return;
    }
    for (int64_t i = 0; i < size; i += 2) {
        double sine, cosine;
        sincos_own((double)f * exp_own(-log_own(10000) * (double)i / (double)size), &sine, &cosine);
        out[i] = (real)sine;
        out[i + 1] = (real)cosine;
    }
}

/* h [rows * N][D] += the time table's row of each token's frame. A trap: it is added to the stream itself, before the
 * norm, and in every block once more, so that it piles up; PositionalEncoding returns its input plus the table. */
static void add_time(arena *a, tensor h, const block_weights *b, int64_t frames, int64_t rows)
{
    size_t mark = arena_mark(a);
    tensor table = tensor_new(a, SHAPE(frames, h.dim[1]));
    for (int64_t f = 0; f < frames && table.data; f++)
        time_row(b, f, h.dim[1], table.data + f * h.dim[1]);
    add_rows(h, table, h.dim[0] / frames / rows);
    arena_reset(a, mark);
}

/* ---------------------------------------------------------------- DiT: a block
 *
 * A block's three attentions differ only in what is looked at. With H heads of head = D/H numbers,
 *
 *     q = to_q(n), k = to_k(seen), v = to_v(seen);  per head: q = norm_q(q), k = norm_k(k); their places turn q,
 *     and k in attn1;  out = to_out(softmax(q k / sqrt(head)) v)
 *
 *     attn1       seen = n itself           N x N products a head
 *     attn2       seen = text               N x (text_len + text_len_t5)
 *     attn_clip   seen = image              N x Q
 *
 * Nothing is masked or causal: every frame sees every other, and the work of a clip grows with the square of its
 * tokens.
 *
 * LayerNorms, y = (x - mean) / sqrt(variance + eps) * weight + bias, have these eps (a wrong one changes only the last
 * digits, but in the gate all of them):
 *
 *     skip_norm, norm1, norm2, norm3, norm_clip, norm_clip_out    1e-6      norm_eps of HunyuanDiTBlock
 *     norm_q, norm_k                                              1e-6      over a head, not over D
 *     norm_out                                                    1e-6      no weight, no bias
 *     gate_clip.norm                                              D         the width, by a slip: see gate
 *     ln_q, ln_kv of the Resampler                                1e-5      nn.LayerNorm's own default
 *     CLIP's                                                      layer_norm_eps of its config.json */

/* What the parts of one call share. dit_forward fills it for all guidance rows, forward_rows narrows a copy of it. */
typedef struct {
    const run *r;
    const dit *d;
    arena *a;
    int64_t call;               /* its index, for dump names */
    int64_t rows;               /* guidance rows that are run together: 1 or B */
    int64_t frames, area;       /* F, and tokens of a frame: N = frames * area */
    tensor patch;               /* [N][D], the same for every row */
    tensor silu_temb;           /* [B][D], then [rows][D] */
    tensor text, image;         /* [B][tokens][X], then [rows * tokens][X] */
    const double *rotary;       /* [area][head / 2][cos, sin] */
    int64_t block;              /* the block under way, and its weights */
    const block_weights *b;
    const enhance *eav;         /* Enhance-A-Video; NULL: not in this call */
} call_state;

/* x [rows * N][D] as the guidance rows' [rows][N][D]. */
static tensor by_row(const call_state *c, tensor x)
{
    return tensor_view(x, SHAPE(c->rows, x.dim[0] / c->rows, x.dim[1]));
}

/* The stage step.CALL.block.BLOCK + part: x [rows * N][D] when it is computed, or instead of computing it. */
static void dump_stage(const call_state *c, tensor x, const char *part)
{
    dump(c->r, by_row(c, x), AS_IS, "step.%03d.block.%02d%s", (int)c->call, (int)c->block, part);
}
static bool given_stage(const call_state *c, tensor x, const char *part)
{
    return given(c->r, by_row(c, x), AS_IS, "step.%03d.block.%02d%s", (int)c->call, (int)c->block, part);
}

/* The next TOKENS rows of x [M][K], or what is left. Layers that widen the stream (to 2D in merge_skip and gate, to
 * inner, about 4.4 D, in feed_forward) work token by token, so N tokens at once would only cost memory. */
static tensor piece(tensor x, int64_t first)
{
    return tensor_part(x, first, lesser(x.dim[0] - first, TOKENS));
}

/* n = norm1.norm(h) + norm1.linear(silu(temb)): a LayerNorm, shifted by the timestep; h, n [rows * N][D], silu_temb
 * [rows][D]. AdaLayerNormShift of norm.py. A trap: adaLN here is a shift alone, no scale and no gate as in other DiTs;
 * only norm_out has a scale. */
static void shifted_norm(arena *a, tensor n, tensor h, const block_weights *b, tensor silu_temb)
{
    size_t mark = arena_mark(a);
    layer_norm(a, n, h, b->norm1_norm, 1e-6);
    add_rows(n, linear(a, silu_temb, b->norm1_linear), n.dim[0] / silu_temb.dim[0]);
    arena_reset(a, mark);
}

/* The sum over i != j of softmax_j(q_i k_j / sqrt(head)) for the F frames of one place and head. q, k: the first
 * frame's, `step` numbers from one frame to the next. In double; exp has nothing to say below -700. */
static double temporal_attention(const real *q, const real *k, int64_t frames, int64_t step, int64_t head)
{
    double off = 0;
    for (int64_t i = 0; i < frames; i++) {
        double score[TIME_ROWS], highest = -INFINITY, sum = 0;
        for (int64_t j = 0; j < frames; j++) {
            score[j] = 0;
            for (int64_t d = 0; d < head; d++)
                score[j] += (double)q[i * step + d] * (double)k[j * step + d];
            score[j] /= sqrt((double)head);
            highest = score[j] > highest ? score[j] : highest;
        }
        for (int64_t j = 0; j < frames; j++) {
            score[j] = exp_own(score[j] - highest < -700 ? -700 : score[j] - highest);
            sum += score[j];
        }
        for (int64_t j = 0; j < frames; j++)
            off += j == i ? 0 : score[j] / sum;
    }
    return off;
}

/* Enhance-A-Video: how much attn1's output is to be magnified. q, k [rows * N][D]: its queries and keys as they come.
 *
 * Formula:  max(1, m (F + weight)), m the mean over rows, places, heads and frames i != j of softmax_j(q_i k_j /
 *           sqrt(head)), where j runs over the F frames of one place only
 * Method:   q and k are normed as for attn1 but not turned, on copies, because attn1 wants them turned
 *
 *               place (y, x):    frame   0   1   2        softmax along a row; the diagonal is left out of the mean, as
 *                                  0     .   a   b        a frame always attends to itself; without weight, frames that
 *                                  1     c   .   d        attend to all alike (each 1/F) give just 1
 *                                  2     e   f   .
 *
 * Special:  with one frame the mean is 0 / 0, which the command line refuses
 * Source:   enhance_score of attention_processor.py, the plug-in EnhanceAVideoParameters of transformer3d.py. */
static real enhance_score(const call_state *c, const attention_layer *l, tensor q, tensor k)
{
    int64_t heads = c->d->config.num_attention_heads, head = c->d->config.attention_head_dim, width = heads * head;
    size_t mark = arena_mark(c->a);
    tensor plain_q = repeated(c->a, q, 1), plain_k = repeated(c->a, k, 1);
    head_norm_rotary(c->a, plain_q, heads, l->norm_q, 1e-6, NULL, 1);
    head_norm_rotary(c->a, plain_k, heads, l->norm_k, 1e-6, NULL, 1);
    double sum = 0;
    for (int64_t row = 0; row < c->rows && q.data; row++)
        for (int64_t i = 0; i < c->area * heads; i++) {
            int64_t place = i / heads, at = (row * c->frames * c->area + place) * width + i % heads * head;
            sum += temporal_attention(plain_q.data + at, plain_k.data + at, c->frames, c->area * width, head);
        }
    arena_reset(c->a, mark);
    double mean = sum / (double)(c->frames * c->frames - c->frames) / (double)(c->rows * c->area * heads);
    double score = mean * ((double)c->frames + c->eav->weight);
    return (real)(score < 1 ? 1 : score);
}

/* n = to_out(attention of n [rows * N][D] to *source [rows * tokens][X]); source NULL, as encoder_hidden_states=None in
 * the public code: the tokens look at themselves (attn1). Queries and keys are normed head by head, which keeps their
 * products small (arXiv 2302.05442). A trap: places turn the queries always, the keys only in attn1, for text and
 * picture tokens have no place. Values are never normed or turned. HunyuanAttnProcessor2_0 of diffusers, in attn1
 * HunyuanAttnProcessor2_0_EnhanceAVideo. */
static void attend(const call_state *c, tensor n, const tensor *source, const attention_layer *l)
{
    arena *a = c->a;
    tensor seen = source ? *source : n;
    int64_t heads = c->d->config.num_attention_heads;
    size_t mark = arena_mark(a);
    tensor q = linear(a, n, l->to_q), k = linear(a, seen, l->to_k), v = linear(a, seen, l->to_v);
    real score = !source && c->eav ? enhance_score(c, l, q, k) : 1;
    head_norm_rotary(a, q, heads, l->norm_q, 1e-6, c->rotary, c->area);
    head_norm_rotary(a, k, heads, l->norm_k, 1e-6, source ? NULL : c->rotary, c->area);
    if (!source) {
        show(c->r, q.data, REAL_TYPE, tensor_shape(by_row(c, q)), "attn1.q");
        show(c->r, k.data, REAL_TYPE, tensor_shape(by_row(c, k)), "attn1.k");
    }
    attention(a, q, q, k, v, c->rows, heads);
    linear_to(a, n, q, l->to_out);
    for (int64_t i = 0; score > 1 && i < tensor_count(n); i++)
        n.data[i] *= score;
    arena_reset(a, mark);
}

/* h = skip_linear(skip_norm([h, skip])), all [rows * N][D] but for the pair, [TOKENS][2D]. The order is the weights':
 * the stream first, then what was kept. */
static void merge_skip(arena *a, tensor h, tensor skip, const block_weights *b)
{
    size_t mark = arena_mark(a);
    for (int64_t first = 0; first < h.dim[0]; first += TOKENS) {
        tensor both = side_by_side(a, piece(h, first), piece(skip, first));
        layer_norm(a, both, both, b->skip_norm, 1e-6);
        linear_to(a, piece(h, first), both, b->skip_linear);
        arena_reset(a, mark);
    }
}

/* n = norm_clip_out(a * gelu(b)), [a, b] = proj(norm(n)); n [rows * N][D], [a, b] [TOKENS][2D]. One linear layer makes
 * the values a and their gates b; this gelu is the exact one (erf).
 *
 * A trap: this LayerNorm's eps is the width, 2816 in the published model, because GEGLU in attention.py calls
 * FP32LayerNorm(dim_in, dim_in, ...), whose second argument is eps. That norm divides by sqrt(variance + 2816), so with
 * variances about 1 it hardly normalises but shrinks everything fifty-fold. The weights were trained so, and must be
 * run so; norm_clip_out brings the result back to size. */
static void gate(arena *a, tensor n, const block_weights *b)
{
    size_t mark = arena_mark(a);
    layer_norm(a, n, n, b->gate_norm, (double)n.dim[1]);
    for (int64_t first = 0; first < n.dim[0]; first += TOKENS) {
        tensor part = piece(n, first);
        gate_gelu(part, linear(a, part, b->gate_proj));
        arena_reset(a, mark);
    }
    layer_norm(a, n, n, b->norm_clip_out, 1e-6);
}

/* n = net.2(gelu(net.0.proj(n))), n [rows * N][D], inside [TOKENS][inner]. FeedForward of diffusers with
 * gelu-approximate, the tanh form, unlike the gate's: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). */
static void feed_forward(arena *a, tensor n, const block_weights *b)
{
    size_t mark = arena_mark(a);
    for (int64_t first = 0; first < n.dim[0]; first += TOKENS) {
        tensor part = piece(n, first), inner = linear(a, part, b->ff_proj);
        activate(inner, GELU_TANH);
        linear_to(a, part, inner, b->ff_out);
        arena_reset(a, mark);
    }
}

/* The four sublayers that add to the stream: n = f(h), both [rows * N][D]. Only the first sees the timestep. */
typedef void sublayer(const call_state *c, tensor n, tensor h);

static void self_attention(const call_state *c, tensor n, tensor h)
{
    if (!given_stage(c, n, ".norm1"))
        shifted_norm(c->a, n, h, c->b, c->silu_temb);
    dump_stage(c, n, ".norm1");
    attend(c, n, NULL, &c->b->attn1);
}

static void text_attention(const call_state *c, tensor n, tensor h)
{
    layer_norm(c->a, n, h, c->b->norm2, 1e-6);
    attend(c, n, &c->text, &c->b->attn2);
}

static void image_attention(const call_state *c, tensor n, tensor h)
{
    layer_norm(c->a, n, h, c->b->norm_clip, 1e-6);
    attend(c, n, &c->image, &c->b->attn_clip);
    gate(c->a, n, c->b);
}

static void token_mlp(const call_state *c, tensor n, tensor h)
{
    layer_norm(c->a, n, h, c->b->norm3, 1e-6);
    feed_forward(c->a, n, c->b);
}

/* h += f(h), or what is given for f(h): the stage `part` of the block. */
static void add_sublayer(const call_state *c, tensor h, sublayer *f, const char *part)
{
    size_t mark = arena_mark(c->a);
    tensor n = like(c->a, h);
    if (!given_stage(c, n, part))
        f(c, n, h);
    dump_stage(c, n, part);
    add(h, n);
    arena_reset(c->a, mark);
}

/* HunyuanDiTBlock.forward: the stream h [rows * N][D], in place; skip the same size where the block has one. The order
 * is the weights': skip, time table, attentions, MLP. A skip is left out where the time stage behind it is given. */
static void block(const call_state *c, tensor h, tensor skip)
{
    bool merges = c->b->skip_linear.weight.data, timed = c->frames > 1;
    if (merges && !(timed && is_given(c->r, "step.%03d.block.%02d.time", (int)c->call, (int)c->block))) {
        if (!given_stage(c, h, ".skip"))
            merge_skip(c->a, h, skip, c->b);            /* h = skip_linear(skip_norm([h, skip])) */
        dump_stage(c, h, ".skip");
    }
    if (timed) {
        if (!given_stage(c, h, ".time"))
            add_time(c->a, h, c->b, c->frames, c->rows);        /* h += time table[frame] */
        dump_stage(c, h, ".time");
    }
    add_sublayer(c, h, self_attention, ".attn1");       /* h += attn1(norm1(h) + shift(temb)) */
    add_sublayer(c, h, text_attention, ".attn2");       /* h += attn2(norm2(h), text) */
    add_sublayer(c, h, image_attention, ".clip");       /* h += norm_clip_out(gate(attn_clip(norm_clip(h), image))) */
    add_sublayer(c, h, token_mlp, ".ff");               /* h += ff(norm3(h)) */
    dump_stage(c, h, "");
}

/* ---------------------------------------------------------------- DiT: a call
 *
 * What surrounds the blocks: the timestep's vector, latents to tokens in front, tokens to latents behind. Patches of
 * 2 x 2 latents make N a quarter of their number and attn1, whose work grows with N N, a sixteenth.
 *
 * A run that begins with given stages or ends early (--inject, --stop-after) computes only what is asked for: the last
 * block that is wanted (last_block), and backwards from there what each block needs (needed_blocks). */

/* temb = timestep_embedder(sinusoids(t)) + extra -> [B][D]: what is known about the whole clip, in one vector. */
static tensor time_embedding(const run *r, const dit *d, const dit_condition *c, double t)
{
    arena *a = r->arena;
    size_t mark = arena_mark(a);
    tensor v = tensor_new(a, SHAPE(1, SINUSOIDS));
    if (v.data)
        sinusoids(t, v.data);
    show(r, v.data, REAL_TYPE, tensor_shape(v), "sinusoids");
    tensor temb = repeated(a, two_layers(a, v, d->timestep_1, SILU, d->timestep_2), c->rows);
    add(temb, c->extra);
    return arena_return(a, mark, temb);
}

/* pos_embed: [latents, inpaint], [F][h][w][3Z], in patches of p x p -> [N][D], tokens in the order frame, y, x.
 * PatchEmbed of diffusers with pos_embed_type None: a convolution whose stride is its kernel, frame by frame.
 *
 * What the model knows of the given frames comes in here, beside the noise. Frames that are not given were encoded as
 * black pictures, with 1 in the mask (inpaint_latents in ruyi.c).
 *
 *     p = 2:   0 0 1 1     every 2 x 2 latents become one token of D numbers; F, h, w are then seen by nothing but the
 *              0 0 1 1     positions, for the blocks know no neighbourhood
 *              2 2 3 3
 *              2 2 3 3 */
static tensor patch_tokens(arena *a, const dit *d, tensor latents, tensor inpaint)
{
    int64_t frames = latents.dim[0], h = latents.dim[1], w = latents.dim[2], z = latents.dim[3], rest = inpaint.dim[3];
    int64_t p = d->config.patch_size, size = d->config.hidden_size, places = frames * h * w;
    tensor tokens = tensor_new(a, SHAPE(frames * (h / p) * (w / p), size));
    size_t mark = arena_mark(a);
    tensor x = side_by_side(a, tensor_view(latents, SHAPE(places, z)), tensor_view(inpaint, SHAPE(places, rest)));
    conv(a, tensor_view(tokens, SHAPE(frames, h / p, w / p, size)), tensor_view(x, SHAPE(frames, h, w, z + rest)),
         (conv_spec){ .kernel = { 1, p, p }, .stride = { 1, p, p }, .up = 1 }, d->patch);
    arena_reset(a, mark);
    return tokens;
}

/* h = LayerNorm(h) * (1 + scale) + shift, [scale, shift] = linear(silu(temb)); h [rows * N][D], scale and shift [D] a
 * row. AdaLayerNormContinuous of diffusers: this norm has no weight and bias of its own. A trap: the linear layer gives
 * the scale first, then the shift; in DiT's own code it is the other way round. */
static void norm_out(const call_state *c, tensor h)
{
    size_t mark = arena_mark(c->a);
    int64_t size = h.dim[1], n = h.dim[0] / c->rows;
    tensor v = linear(c->a, c->silu_temb, c->d->norm_out);      /* [rows][2D] */
    layer_norm(c->a, h, h, (layer){ 0 }, 1e-6);
    for (int64_t i = 0; i < h.dim[0] && h.data; i++) {
        const real *scale = v.data + i / n * 2 * size, *shift = scale + size;
        real *x = h.data + i * size;
        for (int64_t k = 0; k < size; k++)
            x[k] = x[k] * (1 + scale[k]) + shift[k];
    }
    arena_reset(c->a, mark);
}

/* proj_out and unpatchify: h [rows * N][D] -> out [rows][F][h][w][2Z]. A token's numbers are in the order py, px,
 * channel, so a row of its patch is one run of memory: the einsum "nfhwpqc->ncfhpwq" at the end of the public
 * forward. */
static void project_out(const call_state *c, tensor out, tensor h)
{
    size_t mark = arena_mark(c->a);
    int64_t p = c->d->config.patch_size, line = p * c->d->config.out_channels;
    int64_t gw = out.dim[3] / p;
    tensor y = linear(c->a, h, c->d->proj_out);                 /* [rows * N][p][line] */
    for (int64_t i = 0; i < h.dim[0] && h.data; i++) {
        int64_t row = i / gw, column = i % gw;                  /* rows of tokens, through all frames */
        for (int64_t py = 0; py < p; py++)
            memcpy(out.data + ((row * p + py) * gw + column) * line, y.data + (i * p + py) * line,
                   (size_t)line * sizeof(real));
    }
    arena_reset(c->a, mark);
}

/* The last block of a call: the model's, or where the run is to end. -1: it ends before the blocks. */
static int64_t last_block(const run *r, int64_t call, int64_t layers)
{
    int at, i, parts = stop_numbers(r, "step.%d.block.%d", &at, &i);
    if (parts < 1 || at != call)
        return layers - 1;
    if (parts == 2)
        return i < layers ? i : layers - 1;
    return stops_at(r, "step.*.temb") || stops_at(r, "step.*.text") || stops_at(r, "step.*.image") ||
           stops_at(r, "step.*.patch") ? -1 : layers - 1;
}

/* needed[i]: something asks for the stream after block i. Backwards from the end: who asks for a block that is not
 * given asks for the one before it, and, from the middle on, for the one whose output it merges (see run_blocks).
 * Returns whether the patch tokens are asked for. Without given stages everything is. */
static bool needed_blocks(const run *r, const dit_config *c, int64_t call, bool *needed)
{
    int64_t layers = c->num_layers, last = last_block(r, call, layers);
    bool tokens = false;
    if (last >= 0)
        needed[last] = !is_given(r, "step.%03d.norm_out", (int)call);
    for (int64_t i = last; i >= 0; i--) {
        const char *name = "step.%03d.block.%02d%s";
        if (!needed[i] || is_given(r, name, (int)call, (int)i, "") || is_given(r, name, (int)call, (int)i, ".time") ||
            is_given(r, name, (int)call, (int)i, ".skip"))
            continue;
        if (i > 0)
            needed[i - 1] = true;
        else
            tokens = true;
        if (i > layers / 2)
            needed[layers - 1 - i] = true;
    }
    return tokens || stops_at(r, "step.*.patch");
}

/* Whether a call looks at the latents and at what is given beside them: no given stage comes between. */
bool dit_sees_latents(const run *r, const dit *d, int64_t call)
{
    bool *needed = allocate((size_t)d->config.num_layers, sizeof *needed), tokens;
    tokens = needed_blocks(r, &d->config, call, needed) && !is_given(r, "step.%03d.patch", (int)call);
    free(needed);
    return tokens && !is_given(r, "step.%03d.out", (int)call);
}

/* The blocks on h [rows * N][D], as far as they are asked for. Long skips as in U-ViT: the first half's outputs return
 * in the second, last in first out; the two blocks in the middle neither keep nor merge.
 *
 *     L = 8     block   0   1   2   3   4   5   6   7
 *               keeps   a   b   c
 *               merges                      c   b   a
 *
 * done, total: blocks of all rows, for the progress. */
static void run_blocks(call_state c, tensor h, int64_t done, int64_t total)
{
    int64_t layers = c.d->config.num_layers, kept = layers / 2 - 1;
    size_t mark = arena_mark(c.a);
    tensor skips = tensor_new(c.a, SHAPE(kept, h.dim[0], h.dim[1]));
    bool *needed = allocate((size_t)layers, sizeof *needed);
    needed_blocks(c.r, &c.d->config, c.call, needed);
    for (int64_t i = 0; i < layers; i++) {
        tensor skip = { 0 };
        if (i > layers / 2)
            skip = tensor_view(tensor_part(skips, layers - 1 - i, 1), SHAPE(h.dim[0], h.dim[1]));
        c.block = i;
        c.b = &c.d->blocks[i];
        if (needed[i] && !given_stage(&c, h, ""))
            block(&c, h, skip);
        if (i < kept && needed[i])
            tensor_copy(tensor_part(skips, i, 1), h);
        progress(c.r, "block", done + i + 1, total);
    }
    free(needed);
    arena_reset(c.a, mark);
}

/* ---------------------------------------------------------------- TeaCache (arXiv 2411.19108)
 *
 * Neighbouring steps often change the stream by nearly the same amount. So a call may take the change of an earlier one
 * instead of running the blocks:
 *
 *     residual = norm_out(blocks(patch tokens)) - patch tokens     at a call that computes
 *     norm_out ~ patch tokens + residual                           at a call that does not
 *
 * It is decided by what block 0 would see, x = norm1(patch tokens + time table) + shift(t), which costs nearly nothing,
 * against `last`, the x of the last call that stored, and a polynomial that was fitted to how the output follows it:
 *
 *     d = mean |x - last| / mean |last|, over all rows;   sum += P(d);   sum < threshold: use the residual
 *     P(d) = -7511.8562 d^4 + 2329.31511 d^3 - 225.610663 d^2 + 9.39902237 d - 0.0743067848
 *
 * P is positive only for 0.0101 < d < 0.180, so the sum may also fall. Calls i of n steps, START and END at least 1:
 *
 *     0 ..             START - 2      compute, touch nothing
 *     START - 1                       computes, stores x and residual, sum = 0
 *     START ..         n - END - 1    decided by the sum; a call that computes stores anew, sum = 0
 *     n - END ..       n - 1          compute, touch nothing
 *
 * (public: skip_start_steps, skip_end_steps, rel_l1_threshold, should_calculate, accumulated_rel_l1_distance.)
 *
 * After n calls the count begins anew, which only a scheduler with more calls than steps notices. All rows of a call do
 * the same. HunyuanTransformer3DModel.TeaCacheParameters. */

/* P(d) by Horner's rule. Both means are over the same count, so sums will do. */
static double tea_change(tensor now, tensor last)
{
    static const double c[] = { -7.51185620e+03, 2.32931511e+03, -2.25610663e+02, 9.39902237e+00, -7.43067848e-02 };
    double difference = 0, size = 0, y = 0;
    for (int64_t i = 0; i < tensor_count(now) && now.data; i++) {
        difference += fabs((double)(now.data[i] - last.data[i]));
        size += fabs((double)last.data[i]);
    }
    for (int i = 0; i < 5; i++)
        y = y * (difference / size) + c[i];
    return y;
}

/* Decides whether this call computes (t->computed) and whether its residual is stored (t->stored), and counts it. x is
 * block 0's shifted norm of the patch tokens [N][D], as the block itself makes it, for all rows. While planning there
 * are no numbers to decide by, and the larger work is foreseen. TeaCacheParameters.update. */
static void tea_update(arena *a, tea_cache *t, const block_weights *b, tensor patch, tensor silu_temb, int64_t frames)
{
    int64_t call = t->count, rows = silu_temb.dim[0];
    bool begins = call == t->skip_start - 1, between = call >= t->skip_start && call < t->steps - t->skip_end;
    t->count = call + 1 == t->steps ? 0 : call + 1;
    t->delta = 0;
    t->computed = true;
    t->stored = false;
    if (!begins && !between)
        return;
    size_t mark = arena_mark(a);
    tensor x = repeated(a, patch, rows);
    if (frames > 1)
        add_time(a, x, b, frames, rows);
    shifted_norm(a, x, x, b, silu_temb);
    if (between) {
        t->delta = tea_change(x, t->last);
        t->sum += t->delta;
        t->computed = patch.data == NULL || !(t->sum < t->threshold);
    }
    if (t->computed) {
        t->sum = 0;
        tensor_copy(t->last, x);
    }
    t->stored = t->computed;
    t->cached += !t->computed;
    arena_reset(a, mark);
}

/* y = x + sign * patch, patch [N][D] for every row: stream = residual + patch, residual = stream - patch. */
static void add_patch(tensor y, tensor x, tensor patch, real sign)
{
    for (int64_t i = 0; i < tensor_count(y) && y.data; i++)
        y.data[i] = x.data[i] + sign * patch.data[i % tensor_count(patch)];
}

/* ---------------------------------------------------------------- DiT: forward */

/* [rows][tokens][X] -> [rows * tokens][X]. */
static tensor flattened(tensor x) { return tensor_view(x, SHAPE(x.dim[0] * x.dim[1], x.dim[2])); }

/* Guidance rows [first, first + c.rows): patch tokens through the blocks and norm_out, or the cached result; proj_out
 * into these rows of out [B][F][h][w][2Z]. c comes with all rows and is narrowed here. tea NULL: off. */
static void forward_rows(call_state c, tensor out, int64_t first, const tea_cache *tea)
{
    arena *a = c.a;
    int64_t n = c.patch.dim[0], layers = c.d->config.num_layers, total = c.silu_temb.dim[0] * layers;
    size_t mark = arena_mark(a);
    c.silu_temb = tensor_part(c.silu_temb, first, c.rows);
    c.text = flattened(tensor_part(c.text, first, c.rows));
    c.image = flattened(tensor_part(c.image, first, c.rows));
    tensor h = repeated(a, c.patch, c.rows), all = tensor_view(h, SHAPE(c.rows, n, h.dim[1]));
    tensor residual = tea ? tensor_part(tea->residual, first, c.rows) : (tensor){ 0 };
    if (given(c.r, all, AS_IS, "step.%03d.patch", (int)c.call) || dit_sees_latents(c.r, c.d, c.call))
        dump(c.r, all, AS_IS, "step.%03d.patch", (int)c.call);
    if (tea && !tea->computed) {
        add_patch(h, residual, c.patch, 1);
    } else if (!given(c.r, all, AS_IS, "step.%03d.norm_out", (int)c.call)) {
        run_blocks(c, h, first * layers, total);
        norm_out(&c, h);
    }
    if (tea && tea->stored)
        add_patch(residual, h, c.patch, -1);
    dump(c.r, all, AS_IS, "step.%03d.norm_out", (int)c.call);
    project_out(&c, tensor_part(out, first, c.rows), h);
    arena_reset(a, mark);
}

/* Ends the stage step.CALL.NAME that is x, or what was given for it, which then is a tensor of its own: x may belong to
 * all calls. */
static tensor given_or(const run *r, tensor x, int64_t call, const char *name)
{
    tensor y = is_given(r, "step.%03d.%s", (int)call, name) ? tensor_new(r->arena, tensor_shape(x)) : x;
    given(r, y, AS_IS, "step.%03d.%s", (int)call, name);
    dump(r, y, AS_IS, "step.%03d.%s", (int)call, name);
    return y;
}

/* One call of the model, HunyuanTransformer3DModel.forward: [F][h][w][Z] and [F][h][w][2 Z] -> [B][F][h][w][2 Z], whose
 * first half of the channels is the prediction (v, in Ruyi); the other half, a learned variance, is used by none of the
 * schedulers.
 *
 * In the arena lie out, then what all rows share (temb, patch tokens [N][D], the rotary table), then for each group of
 * rows the stream h, L/2 - 1 skips of its size, and a block's temporaries. The skips are most of the memory, which is
 * why rows are run one after the other where nothing wants them together. */
tensor dit_forward(const run *r, const dit *d, const dit_condition *k, tensor latents, tensor inpaint, double t,
                   bool see_image, int64_t call, tea_cache *tea, const enhance *eav)
{
    arena *a = r->arena;
    int64_t frames = latents.dim[0], h = latents.dim[1], w = latents.dim[2], p = d->config.patch_size;
    tensor out = tensor_new(a, SHAPE(k->rows, frames, h, w, d->config.out_channels));
    size_t mark = arena_mark(a);
    call_state c = {
        .r = r, .d = d, .a = a, .call = call, .rows = r->hooks || eav->enabled ? k->rows : 1,
        .frames = frames, .area = (h / p) * (w / p),
        .eav = eav->enabled && call >= eav->skip_start && call < eav->steps - eav->skip_end ? eav : NULL,
    };
    if (given(r, out, ROWS_CHANNELS_FIRST, "step.%03d.out", (int)call))
        return out;
    show(r, latents.data, REAL_TYPE, tensor_shape(latents), "input");
    tensor temb = given_or(r, time_embedding(r, d, k, t), call, "temb");    /* [B][D] */
    c.text = given_or(r, k->text, call, "text");
    c.image = given_or(r, see_image ? k->image : k->padding, call, "image");
    activate(temb, SILU);                                       /* norm1 and norm_out begin with it */
    c.silu_temb = temb;
    c.patch = dit_sees_latents(r, d, call) ? patch_tokens(a, d, latents, inpaint)
                                           : tensor_new(a, SHAPE(frames * c.area, d->config.hidden_size));
    c.rotary = rotary_table(a, &d->config, h / p, w / p);
    show(r, c.rotary, F64, SHAPE(h / p, w / p, d->config.attention_head_dim), "rotary");
    tea_cache *cache = tea->threshold != 0 ? tea : NULL;
    if (cache)
        tea_update(a, cache, &d->blocks[0], c.patch, c.silu_temb, frames);
    for (int64_t first = 0; first < k->rows; first += c.rows)
        forward_rows(c, out, first, cache);
    dump(r, out, ROWS_CHANNELS_FIRST, "step.%03d.out", (int)call);
    arena_reset(a, mark);
    return out;
}

/* ---------------------------------------------------------------- measurement */

typedef struct { run r; dit d; block_weights b; call_state c; tensor h, skip; } block_bench;

/* One of the second half's blocks of the published size, with random weights, on n random tokens of one frame. */
void *bench_block_new(arena *a, int64_t n)
{
    enum { SIZE = 2816, CROSS = 1024 };
    block_bench *s = allocate(1, sizeof *s);
    weights *w = &(weights){ .random = true };
    s->d.config = (dit_config){ .num_attention_heads = 32, .attention_head_dim = 88, .hidden_size = SIZE,
                                .num_layers = 2, .inner = 12288, .cross_attention_dim = CROSS, .patch_size = 2 };
    bind_block(w, &s->d.config, &s->b, 2);
    s->r = (run){ .arena = a };
    s->h = widened(a, bind(w, SHAPE(n, SIZE), "h"), SHAPE(n, SIZE));
    s->skip = widened(a, bind(w, SHAPE(n, SIZE), "skip"), SHAPE(n, SIZE));
    s->c = (call_state){
        .r = &s->r, .d = &s->d, .a = a, .b = &s->b, .rows = 1, .frames = 1, .area = n,
        .silu_temb = widened(a, bind(w, SHAPE(1, SIZE), "temb"), SHAPE(1, SIZE)),
        .text = widened(a, bind(w, SHAPE(77 + 256, CROSS), "text"), SHAPE(77 + 256, CROSS)),
        .image = widened(a, bind(w, SHAPE(64, CROSS), "image"), SHAPE(64, CROSS)),
        .rotary = rotary_table(a, &s->d.config, 1, n),
    };
    return s;
}

void bench_block(void *state)
{
    block_bench *s = state;
    block(&s->c, s->h, s->skip);
}
