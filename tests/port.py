#!/usr/bin/env python3
"""A DiT block and a VAE residual block in NumPy, written from README.md's section 6 alone.

Made from what the golden cases store, and written in F64 under the stages' names, to be judged by `ruyi compare`:

    b-deep      step.000.block.05*, step.003.block.05*      from block.04, block.00, temb, text, image
    enc-c-18    vae.enc.down.3.s00, .s01                    from vae.enc.down.2.s00, .s01

R guidance rows, N tokens, D width, d of it a head; [C,T,H,W] a VAE slice. Needs numpy and safetensors.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).resolve().parent / "golden"
BUGS = {    # name: (stage, what is wrong there)
    "skip-order": ("step.000.block.05.skip", "first in, first out: block.01 comes back"),
    "skip-concat": ("step.000.block.05.skip", "[s, h] for [h, s]"),
    "time-once": ("step.000.block.05.time", "no time table but in the first block"),
    "norm1-scale": ("step.000.block.05.norm1", "a scale for a shift"),
    "rope-halves": ("step.000.block.05.attn1", "halves swapped: pairs j and j + d/2 for 2j and 2j + 1"),
    "rope-axes": ("step.000.block.05.attn1", "y in the first half of a head, x in the second"),
    "attention-scale": ("step.000.block.05.attn1", "1/sqrt(D) for 1/sqrt(d)"),
    "norm-eps": ("step.000.block.05.attn1", "eps 1e-5 for 1e-6 in the norms of q and k"),
    "query-turn": ("step.000.block.05.attn2", "queries of text and image not turned"),
    "gate-eps": ("step.000.block.05.clip", "eps 1e-6 for D in the gate's norm"),
    "gelu-gate": ("step.000.block.05.clip", "the tanh form of GELU in the gate"),
    "gelu-ff": ("step.000.block.05.ff", "the exact GELU in the feed-forward"),
    "padding-mode": ("vae.enc.down.3.s00", "zero frames for the repeated first one"),
    "group-eps": ("vae.enc.down.3.s00", "eps 1e-5 for 1e-6 in the group norms"),
}
seeded = None


def pick(bug, right, wrong):
    """The right thing, unless this bug is seeded."""
    return wrong if seeded == bug else right


def load(path, prefix=""):
    """The tensors whose names begin with the prefix, without it, in float64."""
    return {name.removeprefix(prefix): x.astype(np.float64) for name, x in load_file(path).items() if name.startswith(prefix)}


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_exact(x):
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def standardise(x, eps):
    """Mean 0 and variance 1 over the last dimension."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


class Block:
    """blocks.N of a transformer: one of the second half, which has a skip, on latents [16,F,h,w] of more than one frame."""

    def __init__(self, folder, number, latents):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load(folder / "diffusion_pytorch_model.safetensors", f"blocks.{number}.")
        _, self.frames, h, w = latents
        patch = self.config["patch_size"]
        self.angles = np.tile(self.rotary(h // patch, w // patch, 512 / 8 / patch), (self.frames, 1))     # [N, d/2]

    def linear(self, x, name):
        return x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]

    def norm(self, x, name, eps=1e-6):
        return standardise(x, eps) * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def rotary(self, gh, gw, base):
        """Angles of the tokens of one frame."""
        quarter = self.config["attention_head_dim"] // 4
        high, wide = (base, round(base / gh * gw)) if gh > gw else (round(base / gw * gh), base)
        y = round((base - high) / 2) + np.arange(gh) * high / gh
        x = round((base - wide) / 2) + np.arange(gw) * wide / gw
        y, x = np.meshgrid(y, x, indexing="ij")
        axes = np.stack(pick("rope-axes", [x, y], [y, x]), axis=-1)[..., None]
        return (axes * 10000.0 ** (-np.arange(quarter) / quarter)).reshape(gh * gw, -1)

    def turn(self, x):
        """x [R, heads, N, d], each pair of numbers by its token's angle."""
        cos, sin = np.cos(self.angles), np.sin(self.angles)
        pairs = pick("rope-halves", x.reshape(*x.shape[:-1], -1, 2), x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2))
        a, b = pairs[..., 0], pairs[..., 1]
        turned = np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return pick("rope-halves", turned, turned.swapaxes(-1, -2)).reshape(x.shape)

    def attention(self, name, x, y):
        """x [R, N, D] looks at y [R, M, width]; only where it looks at itself, its keys are turned."""
        def cut(z, layer):
            return self.linear(z, f"{name}.{layer}").reshape(*z.shape[:2], heads, -1).swapaxes(1, 2)

        heads = self.config["num_attention_heads"]
        eps = pick("norm-eps", 1e-6, 1e-5)
        q = self.norm(cut(x, "to_q"), f"{name}.norm_q", eps)
        k = self.norm(cut(y, "to_k"), f"{name}.norm_k", eps)
        if x is y:
            q, k = self.turn(q), self.turn(k)
        else:
            q = pick("query-turn", self.turn(q), q)
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(pick("attention-scale", q.shape[-1], x.shape[-1]))
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = p / p.sum(-1, keepdims=True) @ cut(y, "to_v")
        return self.linear(out.swapaxes(1, 2).reshape(x.shape), f"{name}.to_out.0")

    def gate(self, g):
        g = self.norm(g, "gate_clip.norm", pick("gate-eps", g.shape[-1], 1e-6))
        u, v = np.split(self.linear(g, "gate_clip.proj"), 2, axis=-1)
        return u * pick("gelu-gate", gelu_exact, gelu_tanh)(v)

    def forward(self, h, skip, temb, text, image):
        """All stages of the block by their suffixes; the block's own is empty."""
        out = {}
        pair = np.concatenate(pick("skip-concat", [h, skip], [skip, h]), axis=-1)
        h = out[".skip"] = self.linear(self.norm(pair, "skip_norm"), "skip_linear")
        table = np.repeat(self.weights["t_embed.pe"][0, :self.frames], h.shape[1] // self.frames, axis=0)
        h = out[".time"] = h + pick("time-once", table, 0)
        n, shift = self.norm(h, "norm1.norm"), self.linear(silu(temb), "norm1.linear")[:, None]
        n = out[".norm1"] = pick("norm1-scale", n + shift, n * (1 + shift))
        out[".attn1"] = self.attention("attn1", n, n)
        h = h + out[".attn1"]
        out[".attn2"] = self.attention("attn2", self.norm(h, "norm2"), text)
        h = h + out[".attn2"]
        out[".clip"] = self.norm(self.gate(self.attention("attn_clip", self.norm(h, "norm_clip"), image)), "norm_clip_out")
        h = h + out[".clip"]
        inner = pick("gelu-ff", gelu_tanh, gelu_exact)(self.linear(self.norm(h, "norm3"), "ff.net.0.proj"))
        out[".ff"] = self.linear(inner, "ff.net.2")
        out[""] = h + out[".ff"]
        return out


def residual(x, weights, groups):
    """A residual block of the VAE that changes the channels, on one slice [C,T,H,W] with its first frame twice in front."""
    def affine(x, name):
        return x * weights[name + ".weight"].reshape(-1, 1, 1, 1) + weights[name + ".bias"].reshape(-1, 1, 1, 1)

    def norm(x, name):
        return silu(affine(standardise(x.reshape(groups, -1), pick("group-eps", 1e-6, 1e-5)).reshape(x.shape), name))

    def conv(x, name):
        weight, bias = weights[name + ".weight"], weights[name + ".bias"].reshape(-1, 1, 1, 1)
        (_, T, H, W), edge = x.shape, weight.shape[-1] // 2
        x = np.pad(x, ((0, 0), (2 * edge, 0), (0, 0), (0, 0)), mode=pick("padding-mode", "edge", "constant"))
        x = np.pad(x, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
        return bias + sum(np.einsum("oc,cthw->othw", weight[:, :, t, i, j], x[:, t:t + T, i:i + H, j:j + W])
                          for t, i, j in np.ndindex(weight.shape[2:]))

    z = conv(norm(conv(norm(x, "norm1"), "conv1"), "norm2"), "conv2")
    return z + conv(x, "shortcut")


def stages():
    """What both cases ask for, by name."""
    out = {}
    case, folder = load(GOLDEN / "cases/b-deep/expected.safetensors"), GOLDEN / "models/tiny-b/transformer"
    block = Block(folder, 5, case["noise"].shape)
    for step in "step.000.", "step.003.":
        skip = case[step + pick("skip-order", "block.00", "block.01")]
        made = block.forward(case[step + "block.04"], skip, case[step + "temb"], case["step.000.text"], case[step + "image"])
        out.update({f"{step}block.05{suffix}": x for suffix, x in made.items()})
    case, folder = load(GOLDEN / "cases/enc-c-18/expected.safetensors"), GOLDEN / "models/tiny-c/vae"
    groups = json.loads((folder / "config.json").read_text())["norm_num_groups"]
    weights = load(folder / "diffusion_pytorch_model.safetensors", "encoder.down_blocks.3.convs.0.")
    for part in "s00", "s01":
        out[f"vae.enc.down.3.{part}"] = residual(case[f"vae.enc.down.2.{part}"], weights, groups)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", metavar="OUT.safetensors")
    parser.add_argument("--bug", choices=BUGS, metavar="NAME", help="put one bug in")
    parser.add_argument("--bugs", action="store_true", help="list them, each with the first stage that it changes")
    options = parser.parse_args()
    seeded = options.bug
    if options.bugs:
        print("\n".join(f"{name:16} {stage:24} {what}" for name, (stage, what) in BUGS.items()))
    elif options.out:
        save_file({name: np.ascontiguousarray(x) for name, x in stages().items()}, options.out)
    else:
        parser.error("OUT.safetensors is missing")
