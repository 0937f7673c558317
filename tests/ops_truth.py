#!/usr/bin/env python3
"""Recomputes tests/golden/ops with PyTorch, NumPy and Pillow alone, in float64.

    tests/ops_truth.py                 prints each operator's worst distance to the stored outputs; 1 if any is above 1e-12
    tests/ops_truth.py --floors FILE MINE
                                       also writes how far honest runs in float64, float32, F16 and BF16 come to them;
                                       MINE: outputs of another float32 program, build/ops MINE

Optional: needs a Python with torch, numpy, safetensors and Pillow (pip install torch numpy safetensors pillow).

Floors: the same formulas in torch's float32, or MINE where that is farther (its attention takes exp2 of scores times
log2(e), which costs 2e-6 at logits of -80); for F16 and BF16 with inputs, the result of every layer, and outputs
rounded to the type, sums in float32. What a run in half precision keeps in float32 stays so: timesteps, position tables.
"""
import glob, json, math, os, sys
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

torch.set_num_threads(1)
OPS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden", "ops")
DT, HALF = torch.float64, None                  # type of the arithmetic; type that results are rounded to


def R(x):
    """The result of a layer."""
    return x.to(HALF).to(DT) if HALF else x


def lin(x, i, name=""):
    return R(F.linear(x, i[name + "weight"], i.get(name + "bias")))


def ln(x, i, name="", eps=1e-6):
    return R(F.layer_norm(x, x.shape[-1:], i.get(name + "weight"), i.get(name + "bias"), eps))


def sdpa(q, k, v, heads, sequences=1):
    split = lambda x: x.reshape(sequences, x.shape[0] // sequences, heads, -1).transpose(1, 2)
    s = split(q) @ split(k).transpose(-1, -2) / math.sqrt(q.shape[1] // heads)
    y = torch.softmax(s, -1) @ split(v)
    return R(y.transpose(1, 2).reshape(q.shape))


def group_norm(x, groups, w, b, per_frame, eps=1e-6):
    if per_frame:
        return R(F.group_norm(x.transpose(0, 1), groups, w, b, eps).transpose(0, 1))
    return R(F.group_norm(x[None], groups, w, b, eps)[0])


def pad_time(x, mode, cache=None):
    z = torch.zeros_like(x[:, :1])
    if mode in ("single", "slice"):
        return torch.cat([z, x, z], 1)
    front = cache if mode == "cache_next" else torch.cat([x[:, :1]] * 2, 1)
    return torch.cat([front, x], 1)


def conv(x, w, b, mode, stride=(1, 1, 1), up=1, cache=None):
    if up == 2:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        cache = None if cache is None else cache.repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = pad_time(x, mode, cache)
    x = F.pad(x, (0, 1, 0, 1)) if stride[1] == 2 else F.pad(x, (1, 1, 1, 1))
    return R(F.conv3d(x[None], w, b, stride)[0])


def op_conv3d(i, p):
    st, ss = int(p["stride_t"]), int(p["stride"])
    out = {"y": conv(i["x"], i["weight"], i["bias"], p["mode"], (st, ss, ss), int(p["up"]), i.get("cache"))}
    if p["mode"].startswith("cache"):
        out["cache"] = pad_time(i["x"], p["mode"], i.get("cache"))[:, -2:]
    return out


def op_lora(i, p):
    w = i["weight"] + p["scale"] * i["up"] @ i["down"]
    if "scale2" in p:
        w = w + p["scale2"] * i["up2"] @ i["down2"]
    return F.linear(i["x"], R(w))


def op_patch(i, p):
    x = torch.cat([i["latents"], i["inpaint"]]).transpose(0, 1)
    return F.conv2d(x, i["weight"], i["bias"], stride=int(p["patch"])).flatten(2).transpose(1, 2).flatten(0, 1)


def op_unpatchify(i, p):
    f, h, w, q = (int(p[k]) for k in ("frames", "height", "width", "patch"))
    y = lin(i["x"], i).reshape(f, h // q, w // q, q, q, -1)
    return torch.einsum("fhwpqc->cfhpwq", y).reshape(-1, f, h, w)


def op_group_norm(i, p):
    y = group_norm(i["x"], int(p["groups"]), i["weight"], i["bias"], p["per_frame"], p["eps"])
    return F.silu(y) if p["silu"] else y


def op_head_norm_rotary(i, p):
    x, heads = i["x"], int(p["heads"])
    y = ln(x.reshape(len(x), heads, -1), i, eps=p["eps"])
    if "table" in i:
        t = i["table"].repeat(len(x) // len(i["table"]), 1, 1)[:, None]
        a, b = y[..., 0::2], y[..., 1::2]
        y = torch.stack([a * t[..., 0] - b * t[..., 1], b * t[..., 0] + a * t[..., 1]], -1).flatten(-2)
    return y.reshape(x.shape)


def op_temporal(i, p):
    s = torch.softmax(i["q"] @ i["k"].T / math.sqrt(i["q"].shape[1]), -1)
    return (s.sum() - s.diagonal().sum()).reshape(1)


def op_timestep(i, p):
    f = torch.exp(-math.log(10000) * torch.arange(128, dtype=DT) / 128)
    v = i["t"] * f
    return torch.cat([v.cos(), v.sin()])


def op_time_table(i, p):
    d = int(p["width"])
    f = (torch.arange(int(p["frames"]), dtype=DT) + p["first"])[:, None]
    a = f * torch.exp(torch.arange(0, d, 2, dtype=DT) * (-math.log(10000.0) / d))
    return torch.stack([a.sin(), a.cos()], -1).flatten(1)[:, :d]


def op_rotary_table(i, p):
    h, w, base, head = int(p["height"]), int(p["width"]), 64 // int(p["patch"]), int(p["head"])
    if h > w:
        high, wide = base, int(round(base / h * w))
    else:
        wide, high = base, int(round(base / w * h))
    top, left = int(round((base - high) / 2.0)), int(round((base - wide) / 2.0))
    npdt = np.float64 if DT == torch.float64 else np.float32
    y, x = (np.linspace(a, a + s, n, endpoint=False, dtype=npdt) for a, s, n in ((top, high, h), (left, wide, w)))
    gx, gy = np.meshgrid(x, y)                                      # [h][w]
    fr = 1.0 / 10000.0 ** (torch.arange(0, head // 2, 2, dtype=DT) / (head // 2))
    a = torch.cat([torch.outer(torch.from_numpy(g.reshape(-1)), fr) for g in (gx, gy)], 1)
    return torch.stack([a.cos(), a.sin()], -1)


def resize_positions(x, n, m):
    return F.interpolate(x.reshape(1, n, n, -1).permute(0, 3, 1, 2), (m, m), mode="bicubic").permute(0, 2, 3, 1).flatten(0, 2)


def op_position_resize(i, p):
    n, m = p["from"], p["to"]
    return i["x"] if n == m else resize_positions(i["x"], n, m)


def op_modulate(i, p):
    n = i["x"].shape[1]
    v = lin(i["s"], i).repeat_interleave(len(i["x"]) // len(i["s"]), 0)
    return ln(i["x"], {}) * (1 + v[:, :n]) + v[:, n:]


def op_shifted_norm(i, p):
    return ln(i["x"], i, "norm.") + lin(i["s"], i, "linear.").repeat_interleave(len(i["x"]) // len(i["s"]), 0)


def op_gate(i, p):
    a, b = lin(ln(i["x"], i, "norm.", i["x"].shape[1]), i, "proj.").chunk(2, 1)
    return ln(R(a * F.gelu(b)), i, "norm_out.")


def op_pool(i, p):
    x = R(torch.cat([i["x"].mean(0, keepdim=True), i["x"]]) + i["positions"])
    return lin(sdpa(lin(x[:1], i, "q."), lin(x, i, "k."), lin(x, i, "v."), int(p["heads"])), i, "c.")


def op_resampler(i, p):
    x = R(i["x"] @ i["kv_proj.weight"].T) if "kv_proj.weight" in i else i["x"]
    v, q, pos = ln(x, i, "ln_kv.", p["eps"]), ln(i["query"], i, "ln_q.", p["eps"]), i["positions"]
    n, m = math.isqrt(len(q)), math.isqrt(len(x))
    k = R(v + (pos if n == m else resize_positions(pos, n, m)))
    w, b = i["in_proj.weight"].chunk(3), i["in_proj.bias"].chunk(3)
    q, k, v = (R(F.linear(t, w[j], b[j])) for j, t in enumerate((R(q + pos), k, v)))
    return lin(sdpa(q, k, v, int(p["heads"])), i, "out_proj.")


def op_tea(i, p):
    d = (i["now"] - i["last"]).abs().mean() / i["last"].abs().mean()
    c = (-7.51185620e+03, 2.32931511e+03, -2.25610663e+02, 9.39902237e+00, -7.43067848e-02)
    return sum(a * d ** (4 - j) for j, a in enumerate(c)).reshape(1)


def op_resblock(i, p):
    x, y = i["x"], i["x"]
    for j in ("1", "2"):
        y = group_norm(y, int(p["groups"]), i["norm%s.weight" % j], i["norm%s.bias" % j], p["per_frame"], p["eps"])
        y = conv(R(F.silu(y)), i["conv%s.weight" % j], i["conv%s.bias" % j], p["mode"])
    if "shortcut.weight" in i:
        x = lin(x.movedim(0, -1), i, "shortcut.").movedim(-1, 0)
    return x + y


def op_mid_attention(i, p):
    c, t, h, w = i["x"].shape
    x = {"3d": i["x"].reshape(1, c, -1), "spatial": i["x"].transpose(0, 1).reshape(t, c, -1),
         "temporal": i["x"].permute(2, 3, 0, 1).reshape(h * w, c, t)}[p["case"]]
    n = R(F.group_norm(x, int(p["groups"]), i["group_norm.weight"], i["group_norm.bias"], p["eps"])).transpose(1, 2)
    flat = n.reshape(-1, c)
    y = sdpa(*(lin(flat, i, k) for k in ("to_q.", "to_k.", "to_v.")), int(p["heads"]), len(n))
    y = x + lin(y, i, "to_out.").reshape(n.shape).transpose(1, 2)
    return {"3d": lambda: y.reshape(c, t, h, w), "spatial": lambda: y.reshape(t, c, h, w).transpose(0, 1),
            "temporal": lambda: y.reshape(h, w, c, t).permute(2, 3, 0, 1)}[p["case"]]()


def op_upsample(i, p):
    y = conv(i["x"], i["weight"], i["bias"], p["mode"], up=2)
    if not p["time"] or p["mode"] == "single":
        return y
    keep = 1 if p["mode"] == "replicate" else 0
    kind = {"mode": "nearest"} if p["nearest"] else {"mode": "trilinear", "align_corners": False}
    return torch.cat([y[:, :keep], F.interpolate(y[None, :, keep:], scale_factor=(2.0, 1.0, 1.0), **kind)[0]], 1)


def op_tiles(i, p):
    x = i["x"].clone()
    if "corner" in i:
        h, w = i["corner"].shape[2:]
        s = torch.minimum(torch.linspace(0, 1, w, dtype=DT)[None, :], torch.linspace(0, 1, h, dtype=DT)[:, None])
        x[:, :, -h:, -w:] = s * i["corner"] + (1 - s) * x[:, :, -h:, -w:]
        return x
    rows = p["axis"] == "rows"
    a, b = (i["above"], x) if rows else (i["left"].transpose(2, 3), x.transpose(2, 3))
    e = min(int(p["extent"]), a.shape[2], b.shape[2])
    for k in range(e):
        b[:, :, k] = a[:, :, k - e] * (1 - k / e) + b[:, :, k] * (k / e)
    return x


def op_posterior(i, p):
    mean, logvar = i["x"].chunk(2)
    return (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * i["noise"]) * p["scaling_factor"]


def op_guidance(i, p):
    z = int(p["channels"])
    pos = i["positive"][:z]
    return pos if "negative" not in i else i["negative"][:z] + p["cfg"] * (pos - i["negative"][:z])


# ---------------------------------------------------------------- schedulers: diffusers' formulas

def tables(p):
    n, f32 = int(p["num_train_timesteps"]), np.float32
    a, z = f32(math.sqrt(p["beta_start"])), f32(math.sqrt(p["beta_end"]))
    d = np.float64(f32((z - a) / f32(n - 1)))
    k = np.arange(n, dtype=np.float64)
    l = np.where(k < n // 2, np.float64(a) + d * k, np.float64(z) - d * (n - 1 - k)).astype(f32)    # fused
    beta = (l * l).astype(f32)
    return np.cumprod((f32(1) - beta).astype(np.float64)).astype(f32)


def timesteps(p, kind):
    n, s, where = int(p["num_train_timesteps"]), int(p["steps"]), p["timestep_spacing"]
    points = s + 1 if kind == "dpm++" else s
    if where == "leading":
        t = (np.arange(points) * (n // points)).round()[::-1] + p["steps_offset"]
    elif where == "trailing":
        t = np.round(np.arange(n, 0, -n / s)) - 1
    else:
        t = np.linspace(0, n - 1, points)[::-1]
        t = t.astype(np.float32) if kind.startswith("euler") else t.round()
    return np.asarray(t[:s], dtype=np.float64)


def schedule(i, p):
    kind, typ, A = p["scheduler"], p["prediction_type"], tables(p)
    N, s = int(p["num_train_timesteps"]), int(p["steps"])
    t, gap, x, outs, ins, state = timesteps(p, kind), N // s, i["x"].clone(), [], [], {}
    num = lambda v: torch.tensor(float(v), dtype=DT)
    at = lambda u: num(A[int(u)] if u >= 0 else 1.0 if p["set_alpha_to_one"] else A[0])
    table = np.sqrt(((np.float32(1) - A) / A).astype(np.float32))
    sig = np.append(np.interp(t, np.arange(N), table).astype(np.float32), 0) if kind not in ("ddim", "pndm") else None
    init = 1.0
    if kind.startswith("euler"):
        init = float((num(sig[0]) ** 2 + 1).sqrt()) if p["timestep_spacing"] == "leading" else float(sig[0])

    def clean(x, v, al, be):            # clean sample and noise
        if typ == "v_prediction":
            return al * x - be * v, al * v + be * x
        if typ == "epsilon":
            return (x - be * v) / al, v
        return v, (x - al * v) / be
    if kind == "pndm":
        half = gap // 2
        first = [u for j in range(3) for u in (t[j], t[j + 1] + half, t[j + 1] + half, t[j + 1])]
        t = np.array(first + list(t[3:]))
    for k in range(len(t)):
        v = i["v"][k:k + 1]
        given = x
        if kind.startswith("euler"):
            now, nxt = num(sig[k]), num(sig[k + 1])
            given = x / (now ** 2 + 1).sqrt()
            al, be = 1 / (now ** 2 + 1).sqrt(), now / (now ** 2 + 1).sqrt()
            x0 = {"v_prediction": lambda: v * (-now / (now ** 2 + 1).sqrt()) + x / (now ** 2 + 1),
                  "epsilon": lambda: x - now * v, "sample": lambda: v}[typ]()
            up, down = num(0), nxt
            if kind == "euler_a":
                up = (nxt ** 2 * (now ** 2 - nxt ** 2) / now ** 2).sqrt()
                down = (nxt ** 2 - up ** 2).sqrt()
            x = x + (x - x0) / now * (down - now)
            if kind == "euler_a":
                x = x + up * i["noise"][k:k + 1]
        elif kind == "ddim":
            a, b = at(t[k]), at(t[k] - gap)
            x0, e = clean(x, v, a.sqrt(), (1 - a).sqrt())
            if p["clip_sample"]:
                x0 = x0.clamp(-p["clip_sample_range"], p["clip_sample_range"])
            x = b.sqrt() * x0 + (1 - b).sqrt() * e
        elif kind == "dpm++":
            lam = lambda u: (u == 0 and num(math.inf)) or -torch.log(u)     # ln(alpha / beta) = -ln(sigma)
            now, nxt = num(sig[k]), num(sig[k + 1])
            al, al2 = 1 / (now ** 2 + 1).sqrt(), 1 / (nxt ** 2 + 1).sqrt()
            m, _ = clean(x, v, al, now * al)
            if k == len(t) - 1:
                x = m
            else:
                h, d = lam(nxt) - lam(now), m
                if k > 0:
                    d = m + (m - state["m"]) * h / (2 * (lam(now) - lam(num(sig[k - 1]))))
                x = (nxt * al2) / (now * al) * x - al2 * (torch.exp(-h) - 1) * d
            state["m"] = m
        else:
            def transfer(x, u, w, e):
                a, b = at(u), at(w)
                if typ == "v_prediction":
                    e = a.sqrt() * e + (1 - a).sqrt() * x
                return (b / a).sqrt() * x - (b - a) * e / (a * (1 - b).sqrt() + (a * (1 - a) * b).sqrt())
            if k < 12:
                j, r = k // 4, k % 4
                base, low = t[4 * j], t[4 * j + 3]
                if r == 0:
                    state.update(x=x, sum=v / 6, outs=[v] + state.get("outs", []))
                    x = transfer(x, base, base - half, v)
                elif r < 3:
                    state["sum"] = state["sum"] + v / 3
                    x = transfer(state["x"], base, low + half if r == 1 else low, v)
                else:
                    x = transfer(state["x"], base, low, state["sum"] + v / 6)
            else:
                o = state["outs"]
                x = transfer(x, t[k], t[k] - gap, (55 * v - 59 * o[0] + 37 * o[1] - 9 * o[2]) / 24)
                state["outs"] = [v] + o
        x = R(x)
        ins.append(given), outs.append(x)
    keep = lambda v: torch.tensor(v, dtype=torch.float64)
    return {"y": torch.cat(outs), "input": torch.cat(ins), "timesteps": keep(t), "init_noise_sigma": keep([init])}


# ---------------------------------------------------------------- noise, pictures

def op_noise(i, p):
    g = torch.Generator().manual_seed(p["seed"])
    y = torch.cat([torch.randn(n, generator=g, dtype=torch.float32) for n in (p["draw1"], p["draw2"], p["draw3"]) if n])
    return {"y": y, "bits": torch.from_numpy(y.numpy().view(np.uint32).astype(np.int64))}


def pil(x, w, h):
    return torch.from_numpy(np.asarray(Image.fromarray(x.numpy()).resize((w, h), Image.BICUBIC)).copy())


def op_clip_crop(i, p):
    h, w, e = i["x"].shape[0], i["x"].shape[1], int(p["shortest_edge"])
    w, h = (int(e * w / h), e) if w >= h else (e, int(e * h / w))
    y, c = pil(i["x"], w, h), int(p["crop_size"])
    return y[(h - c) // 2:(h - c) // 2 + c, (w - c) // 2:(w - c) // 2 + c]


def op_clip_pixels(i, p):
    mean, std = (torch.tensor([p[k + str(c)] for c in range(3)], dtype=DT) for k in ("mean", "std"))
    return ((i["x"].to(DT) * p["rescale_factor"] - mean) / std).permute(2, 0, 1)


ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu_erf": F.gelu,
               "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}
SIMPLE = {
    "linear": lambda i, p: lin(i["x"], i), "layer_norm": lambda i, p: ln(i["x"], i, eps=p["eps"]),
    "attention": lambda i, p: sdpa(i["q"], i["k"], i["v"], int(p["heads"]), int(p["sequences"])),
    "softmax": lambda i, p: torch.softmax(i["x"], -1),
    "gate_gelu": lambda i, p: (lambda a, b: a * R(F.gelu(b)))(*i["x"].chunk(2, 1)),
    "skip": lambda i, p: lin(ln(torch.cat([i["x"], i["skip"]], 1), i, "norm."), i, "linear."),
    "feed_forward": lambda i, p: lin(R(F.gelu(lin(i["x"], i, "proj."), approximate="tanh")), i, "out."),
    "embedder": lambda i, p: lin(R(F.silu(lin(i["x"], i, "linear_1."))), i, "linear_2."),
    "picture_resize": lambda i, p: pil(i["x"], int(p["width"]), int(p["height"])),
    "pixels": lambda i, p: (i["x"].to(DT) / 255 * 2 - 1).permute(2, 0, 1)[:, None],
    "bytes": lambda i, p: (255 * (i["x"] / 2 + 0.5).clamp(0, 1)).to(torch.uint8),
}
EXACT_INPUTS = {"t", "table"}                    # kept in float32 by runs in half precision


def run(op, i, p):
    f = SIMPLE.get(op) or globals().get("op_" + op) or (schedule if "scheduler" in p else None)
    y = ACTIVATIONS[op](i["x"]) if op in ACTIVATIONS else f(i, p)
    return y if isinstance(y, dict) else {"y": y}


def compute(op, case, tensors, p, dtype, half):
    global DT, HALF
    DT, HALF = dtype, half
    i = {}
    for name, x in tensors.items():
        if x.dtype is not torch.uint8:
            x = x.to(torch.float32).to(dtype)
            x = R(x) if name not in EXACT_INPUTS else x
        i[name] = x
    return {k: v.to(half) if half and v.is_floating_point() and k not in ("timesteps", "init_noise_sigma") else v
            for k, v in run(op, i, dict(p, case=case)).items()}


def distance(y, want):
    y, want = y.double(), want.double()
    assert y.shape == want.shape, (y.shape, want.shape)
    d, size = (y - want).norm().item(), want.norm().item()
    return d / size if size else d


def main():
    classes = [(torch.float64, None), (torch.float32, None), (torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
    lines, bad, count = [], 0, 0
    for path in sorted(glob.glob(os.path.join(OPS, "*.inputs.safetensors"))):
        tensors, want = load_file(path), load_file(path.replace(".inputs", ""))
        meta = safe_open(path, "pt").metadata()
        op, worst, where = meta.pop("operator"), 0.0, ""
        other = load_file(os.path.join(sys.argv[3], op + ".safetensors")) if len(sys.argv) == 4 else {}
        for case, text in sorted(meta.items()):
            mine = {k[len(case) + 1:]: v for k, v in tensors.items() if k.startswith(case + ".")}
            golden = {k[len(case) + 1:]: v for k, v in want.items() if k.startswith(case + ".")}
            runs = [compute(op, case, mine, json.loads(text), *c) for c in classes]
            assert set(runs[0]) == set(golden), (op, case, set(runs[0]), set(golden))
            count += 1
            for key, truth in sorted(golden.items()):
                far = [distance(r[key], truth) for r in runs]
                if case + "." + key in other:
                    far[1] = max(far[1], distance(other[case + "." + key], truth))
                if truth.is_floating_point():
                    lines.append("\t".join([op, case + "." + key] + ["%.3g" % x for x in far]))
                bad += not far[0] <= 1e-12
                if not far[0] <= worst:
                    worst, where = far[0], case + "." + key
        print("%-18s %3d cases, worst %.2g%s" % (op, len(meta), worst, " at " + where if worst else ""))
    print("%d cases of %d operators; %d outputs beyond 1e-12" % (count, len(glob.glob(os.path.join(OPS, "*.inputs.safetensors"))), bad))
    if len(sys.argv) == 4 and sys.argv[1] == "--floors":
        with open(sys.argv[2], "w") as f:
            f.write("operator\ttensor\tfp64\tfp32\tfp16\tbf16\n" + "".join(line + "\n" for line in lines))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
