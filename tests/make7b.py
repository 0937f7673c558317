#!/usr/bin/env python3
"""A model folder of the published sizes with random BF16 weights, about 16 GB, to see that such a model loads, is
planned and runs. Needs numpy.

    tests/make7b.py FOLDER        writes FOLDER; takes the other settings from weights/ruyi-tiny

The sizes are those of the documentation: transformer D 2816, 40 blocks; VAE of 128 to 512 channels; an image tower of
ViT-H/14's size, which is a guess. Matrices have normal-like numbers of variance 1 / fan-in, so that nothing overflows;
norms are 1, biases 0. What comes out is noise."""
import json
import os
import shutil
import struct
import sys

import numpy as np

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "weights", "ruyi-tiny")
D, LAYERS, HEADS, CROSS, T5, POOLED, QUERIES, CLIP = 2816, 40, 32, 1024, 2048, 1024, 64, 1280
INNER = int(D * 4.3637)
POOL = np.random.default_rng(7).standard_normal((1 << 24) + 9973, dtype=np.float32).view(np.uint32) >> 16
POOL = POOL.astype(np.uint16)       # BF16 by truncation


def scaled(down, made={}):
    """The pool divided by 2^down: BF16's exponents moved."""
    if down not in made:
        made[down] = np.where((POOL & 0x7F80) < (down + 1) << 7, 0, POOL - (down << 7)).astype(np.uint16)
    return made[down]


def put(f, name, shape, start):
    """The tensor's bytes: the pool from `start` on, again and again, at the size of 1 / sqrt(fan-in)."""
    count = int(np.prod(shape))
    if len(shape) < 2:
        np.full(count, 0 if name.endswith("bias") else 0x3F80, np.uint16).tofile(f)
        return
    pool = scaled(round(np.log2(max(count // shape[0], 1)) / 2))
    while count > 0:
        piece = pool[start % len(pool):][:count]
        piece.tofile(f)
        count, start = count - len(piece), 0


def write(path, tensors):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for i, (name, shape) in enumerate(tensors.items()):
            put(f, name, shape, i * 7919)
    print("%s: %.1f GB" % (path, at / 1e9), flush=True)


def settings(folder, part, **changes):
    with open(os.path.join(SOURCE, part)) as f:
        values = json.load(f)
    values.update(changes)
    os.makedirs(os.path.dirname(os.path.join(folder, part)), exist_ok=True)
    with open(os.path.join(folder, part), "w") as f:
        json.dump(values, f)


def linear(t, name, n, k):
    t[name + ".weight"], t[name + ".bias"] = [n, k], [n]


def norm(t, name, n):
    t[name + ".weight"], t[name + ".bias"] = [n], [n]


def convolution(t, name, n, k, side=3):
    t[name + ".weight"], t[name + ".bias"] = [n, k, side, side, side], [n]


def transformer(folder):
    t, time = {}, "time_extra_emb."
    linear(t, time + "timestep_embedder.linear_1", D, 256)
    linear(t, time + "timestep_embedder.linear_2", D, D)
    t[time + "pooler.positional_embedding"] = [257, T5]
    for part in "qkv":
        linear(t, time + "pooler.%s_proj" % part, T5, T5)
    linear(t, time + "pooler.c_proj", POOLED, T5)
    t[time + "style_embedder.weight"] = [1, D]
    linear(t, time + "extra_embedder.linear_1", 4 * D, 1536 + D + POOLED)
    linear(t, time + "extra_embedder.linear_2", D, 4 * D)
    linear(t, "text_embedder.linear_1", 4 * T5, T5)
    linear(t, "text_embedder.linear_2", CROSS, 4 * T5)
    t["text_embedding_padding"] = [77 + 256, CROSS]
    t["pos_embed.proj.weight"], t["pos_embed.proj.bias"] = [D, 48, 2, 2], [D]
    t["clip_padding"] = t["clip_projection.query"] = t["clip_projection.pos_embed"] = [QUERIES, CROSS]
    t["clip_projection.kv_proj.weight"] = [CROSS, CLIP]
    norm(t, "clip_projection.ln_q", CROSS)
    norm(t, "clip_projection.ln_kv", CROSS)
    t["clip_projection.attn.in_proj_weight"], t["clip_projection.attn.in_proj_bias"] = [3 * CROSS, CROSS], [3 * CROSS]
    linear(t, "clip_projection.attn.out_proj", CROSS, CROSS)
    for i in range(LAYERS):
        b = "blocks.%d." % i
        if i > LAYERS // 2:
            norm(t, b + "skip_norm", 2 * D)
            linear(t, b + "skip_linear", D, 2 * D)
        norm(t, b + "norm1.norm", D)
        linear(t, b + "norm1.linear", D, D)
        for name, width in (("attn1", D), ("attn2", CROSS), ("attn_clip", CROSS)):
            linear(t, b + name + ".to_q", D, D)
            linear(t, b + name + ".to_k", D, width)
            linear(t, b + name + ".to_v", D, width)
            linear(t, b + name + ".to_out.0", D, D)
            norm(t, b + name + ".norm_q", D // HEADS)
            norm(t, b + name + ".norm_k", D // HEADS)
        for name in ("norm2", "norm_clip", "norm_clip_out", "norm3", "gate_clip.norm"):
            norm(t, b + name, D)
        linear(t, b + "gate_clip.proj", 2 * D, D)
        linear(t, b + "ff.net.0.proj", INNER, D)
        linear(t, b + "ff.net.2", D, INNER)
    linear(t, "norm_out.linear", 2 * D, D)
    linear(t, "proj_out", 128, D)
    write(folder + "/transformer/diffusion_pytorch_model.safetensors", t)
    settings(folder, "transformer/config.json", num_attention_heads=HEADS, attention_head_dim=D // HEADS, hidden_size=D,
             num_layers=LAYERS, mlp_ratio=4.3637, n_query=QUERIES, projection_dim=CLIP, cross_attention_dim=CROSS,
             cross_attention_dim_t5=T5, pooled_projection_dim=POOLED, text_len=77, text_len_t5=256)


def block(t, name, k, n):
    norm(t, name + ".norm1", k)
    convolution(t, name + ".conv1", n, k)
    norm(t, name + ".norm2", n)
    convolution(t, name + ".conv2", n, n)
    if k != n:
        convolution(t, name + ".shortcut", n, k, 1)


def middle(t, half):
    for i in range(2):
        block(t, half + ".mid_block.convs.%d" % i, 512, 512)
    norm(t, half + ".mid_block.attentions.0.group_norm", 512)
    for part in ("to_q", "to_k", "to_v", "to_out"):
        linear(t, half + ".mid_block.attentions.0." + part, 512, 512)


def vae(folder):
    t, channels = {}, [128, 256, 512, 512]
    for half, way, order, count in (("encoder", "down", channels, 2), ("decoder", "up", channels[::-1], 3)):
        convolution(t, half + ".conv_in", order[0], 3 if way == "down" else 16)
        before = order[0]
        for i, n in enumerate(order):
            for k in range(count):
                block(t, "%s.%s_blocks.%d.convs.%d" % (half, way, i, k), before if k == 0 else n, n)
            if i < 3:
                convolution(t, "%s.%s_blocks.%d.%ssampler.conv" % (half, way, i, way), n, n)
            before = n
        middle(t, half)
        norm(t, half + ".conv_norm_out", order[-1])
        convolution(t, half + ".conv_out", 32 if way == "down" else 3, order[-1])
    convolution(t, "quant_conv", 32, 32, 1)
    convolution(t, "post_quant_conv", 16, 16, 1)
    write(folder + "/vae/diffusion_pytorch_model.safetensors", t)
    settings(folder, "vae/config.json", ch=128, ch_mult=[1, 2, 4, 4], block_out_channels=channels, layers_per_block=2,
             norm_num_groups=32, scaling_factor=0.7125)


def image_encoder(folder):
    t = {"vision_model.embeddings.class_embedding": [CLIP], "vision_model.embeddings.patch_embedding.weight": [CLIP, 3, 14, 14],
         "vision_model.embeddings.position_embedding.weight": [257, CLIP]}
    norm(t, "vision_model.pre_layrnorm", CLIP)
    for i in range(32):
        b = "vision_model.encoder.layers.%d." % i
        norm(t, b + "layer_norm1", CLIP)
        norm(t, b + "layer_norm2", CLIP)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(t, b + "self_attn." + part, CLIP, CLIP)
        linear(t, b + "mlp.fc1", 4 * CLIP, CLIP)
        linear(t, b + "mlp.fc2", CLIP, 4 * CLIP)
    write(folder + "/image_encoder/model.safetensors", t)
    settings(folder, "image_encoder/config.json", hidden_size=CLIP, intermediate_size=4 * CLIP, num_hidden_layers=32,
             num_attention_heads=16, image_size=224, patch_size=14, hidden_act="gelu")
    settings(folder, "image_encoder/preprocessor_config.json", size={"shortest_edge": 224},
             crop_size={"height": 224, "width": 224})


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = sys.argv[1]
    vae(folder)
    image_encoder(folder)
    t = {}
    for row in ("p.16x9movie0auto", "p.default", "n.default"):
        t.update({row + ".emb1": [1, 77, CROSS], row + ".emb2": [1, 256, T5], row + ".mask1": [1, 77], row + ".mask2": [1, 256]})
    write(folder + "/embeddings.safetensors", t)
    for part in ("scheduler/scheduler_config.json", "model_index.json"):
        os.makedirs(os.path.dirname(os.path.join(folder, part)), exist_ok=True)
        shutil.copy(os.path.join(SOURCE, part), os.path.join(folder, part))
    transformer(folder)


main()
