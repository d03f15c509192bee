"""Reference values for cxr-metrics: run `python generate.py` in this folder; it writes reference.json.

numpy 2.4.6, scipy 1.17.1, torch 2.15.0 (CPU, f32), pillow 13.0.0. Inputs are procedural (`unit` below, the
same few lines in main.rs), rounded to f32, so that only results are stored. Tolerances are in main.rs.
"""

import json
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image


def unit(name: str, n: int) -> np.ndarray:
    """n numbers in [-1, 1): FNV-1a of "name:i", its upper 24 bits after one multiplication."""
    out = np.empty(n)
    for i in range(n):
        h = 0xCBF29CE484222325
        for byte in f"{name}:{i}".encode():
            h = ((h ^ byte) * 0x100000001B3) % 2**64
        h = (h ^ (h >> 29)) * 0xBF58476D1CE4E5B9 % 2**64
        out[i] = (h >> 40) / 2**23 - 1.0
    return out.astype(np.float32)


def features(name, n, d, mix, shift):
    """Correlated features: each adds `mix` times its left neighbour."""
    x = unit(name, n * d).reshape(n, d)
    y = x.copy()
    y[:, 1:] += np.float32(mix) * x[:, :-1]
    return (y + np.float32(shift)).astype(np.float32)


def frechet(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    diff = x.mean(0) - y.mean(0)
    root = scipy.linalg.sqrtm(s1 @ s2)
    return float(diff @ diff + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real)


def kernel(x, y):
    """torch-fidelity's polynomial_mmd with degree 3, gamma 1/d, coef0 1, in f64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    k = lambda a, b: (a @ b.T / a.shape[1] + 1.0) ** 3
    xx, yy, xy = k(x, x), k(y, y), k(x, y)
    m, n = len(x), len(y)
    within = lambda kk, m: (kk.sum() - np.trace(kk)) / (m * (m - 1))
    return float(within(xx, m) + within(yy, n) - 2 * xy.mean())


def small_network(pixels, channels, groups, findings):
    """The forward pass of SmallNetwork with procedural weights; parameters under the module's own paths."""
    def weight(path, shape, gain):
        return torch.tensor(unit(path, int(np.prod(shape)))).reshape(shape) * gain

    x, before = pixels, 1
    for s, c in enumerate(channels):
        for i in range(2):
            base = f"stages.{s}"
            fan_in = before * 9
            x = F.conv2d(x, weight(f"{base}.convs.{i}.weight", (c, before, 3, 3), (3 / fan_in) ** 0.5),
                         weight(f"{base}.convs.{i}.bias", (c,), 0.5), stride=2 if i == 0 else 1, padding=1)
            x = F.group_norm(x, groups, 1 + weight(f"{base}.norms.{i}.weight", (c,), 0.5),
                             weight(f"{base}.norms.{i}.bias", (c,), 0.5), eps=1e-5)
            x, before = F.silu(x), c
    pooled = x.mean((2, 3))
    logits = F.linear(pooled, weight("heads.weight", (findings, before), 1.0), weight("heads.bias", (findings,), 0.5))
    return pooled, logits


def main():
    out = {"frechet": {}, "kernel": {}}
    for key, (n, m, d) in {"tall": (60, 45, 8), "short": (12, 9, 16)}.items():
        x, y = features(f"{key} x", n, d, 0.5, 0.0), features(f"{key} y", m, d, -0.8, 0.25)
        if key == "tall":
            out["frechet"][key] = frechet(x, y)
        else:  # sqrtm of singular products loses digits: the Gram form's singular values are exact
            cx, cy = x - x.mean(0, dtype=np.float64), y - y.mean(0, dtype=np.float64)
            cx, cy = cx / np.sqrt(n - 1), cy / np.sqrt(m - 1)
            nuclear = np.linalg.svd(cx @ cy.T, compute_uv=False).sum()
            diff = x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)
            out["frechet"][key] = float(diff @ diff + (cx**2).sum() + (cy**2).sum() - 2 * nuclear)
            assert abs(out["frechet"][key] - frechet(x, y)) < 1e-4
        out["kernel"][key] = kernel(x, y)
    x, y = features("tall x", 60, 8, 0.5, 0.0), features("tall y", 45, 8, -0.8, 0.25)
    rng = np.random.RandomState(2020)
    subsets = [(rng.choice(60, 20, replace=False), rng.choice(45, 20, replace=False)) for _ in range(7)]
    values = [kernel(x[a], y[b]) for a, b in subsets]
    out["subsets"] = {
        "indices": [[a.tolist(), b.tolist()] for a, b in subsets],
        "mean": float(np.mean(values)),
        "std": float(np.std(values)),
    }
    scores = np.round(unit("scores", 40) * 5) / 5  # with ties
    labels = unit("labels", 40) + scores > 0.3
    u = scipy.stats.mannwhitneyu(scores[labels], scores[~labels]).statistic
    out["auroc"] = float(u / (labels.sum() * (~labels).sum()))
    image = unit("picture", 13 * 11).reshape(11, 13)
    out["resize"] = {}
    for w, h in [(5, 4), (20, 17)]:
        resized = Image.fromarray(image).resize((w, h), Image.BILINEAR)
        out["resize"][f"{w}x{h}"] = np.asarray(resized).ravel().tolist()
    pixels = torch.tensor(unit("pixels", 3 * 16 * 16)).reshape(3, 1, 16, 16)
    pooled, logits = small_network(pixels, [8, 12], 4, 3)
    targets = (torch.tensor(unit("targets", 9)).reshape(3, 3) > 0).float()
    loss = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=torch.tensor([2.0, 0.5, 3.0]))
    out["small"] = {"features": pooled.ravel().tolist(), "logits": logits.ravel().tolist(), "loss": loss.item()}
    Path(__file__).with_name("reference.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
