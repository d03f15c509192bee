"""Reference values for figures that need no network: run `python generate.py` in this folder.

torch-fidelity 0.4.0 (Inception Score, KID), prdc 0.2, pytorch-msssim 1.0.0, pytorch-fid 0.3.0, numpy 2.4.6. Inputs are
procedural (`unit`, the same lines in main.rs). statistics.npz is what `pytorch_fid --save-stats` writes, of features
of width 8. Tolerances are in main.rs.
"""

import json
from pathlib import Path

import numpy as np
import prdc
import torch
from pytorch_fid.fid_score import calculate_frechet_distance
from pytorch_msssim import ms_ssim
from pytorch_msssim.ssim import _ssim
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

HERE = Path(__file__).parent


def hashes(name: str, n: int) -> np.ndarray:
    """n 64-bit numbers: FNV-1a of the name as the seed of splitmix64."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x100000001B3) % 2**64
    with np.errstate(over="ignore"):
        h = np.uint64(seed) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return h ^ (h >> np.uint64(31))


def unit(name: str, n: int, d: int) -> np.ndarray:
    """[n, d] in [-1, 1)."""
    values = (hashes(name, n * d) >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)
    return values.astype(np.float32).reshape(n, d)


def picture(name: str, width: int, height: int, noise: int) -> np.ndarray:
    """A pattern with `noise` of 256 grey values of noise."""
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    pattern = (x * x // 9 + y * 3) % 160
    random = (hashes(name, height * width) >> np.uint64(40)).astype(np.int64).reshape(height, width) % noise
    return (pattern + random).astype(np.uint8)


def main():
    out = {}
    logits = 4 * unit("logits", 43, 60)
    order = np.random.RandomState(2020).permutation(43)
    out["isc"] = {
        "in order": isc_features_to_metric(torch.tensor(logits), splits=10, shuffle=False),
        "shuffled": isc_features_to_metric(torch.tensor(logits), splits=10, shuffle=True, rng_seed=2020),
        "order": order.tolist(),
    }
    x, y = unit("x", 60, 8), unit("y", 45, 8) * np.float32(1.2) + np.float32(0.1)
    rng = np.random.RandomState(2020)
    out["kid"] = kid_features_to_metric(torch.tensor(x), torch.tensor(y), kid_subsets=12, kid_subset_size=20,
                                        rng_seed=2020, verbose=False)
    out["kid"]["indices"] = [[rng.choice(n, 20, replace=False).tolist() for n in (60, 45)] for _ in range(12)]
    for k in (1, 3, 5):
        figures = prdc.compute_prdc(x, y, k)
        out.setdefault("prdc", {})[str(k)] = {name: float(value) for name, value in figures.items()}
    out["ms_ssim"] = {}
    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    for width, height, scales in [(176, 165, 5), (161, 161, 5), (100, 90, 4), (64, 64, 3), (35, 45, 2), (12, 30, 1)]:
        a, b = picture("a", width, height, 40), picture("bb", width, height, 90)
        part = np.array(weights[:scales]) / sum(weights[:scales])
        tensors = [torch.tensor(p, dtype=torch.float64)[None, None] for p in (a, b)]
        # Its own check asks for five scales whatever the weights.
        value = small_ms_ssim(*tensors, part.tolist())
        if scales == 5:
            value = ms_ssim(*tensors, data_range=255, win=window()).item()
        out["ms_ssim"][f"{width}x{height}"] = {"scales": scales, "value": float(value)}
    moments = [x.astype(np.float64).mean(0), np.cov(x.astype(np.float64), rowvar=False)]
    others = [y.astype(np.float64).mean(0), np.cov(y.astype(np.float64), rowvar=False)]
    np.savez_compressed(HERE / "statistics.npz", mu=moments[0], sigma=moments[1])
    out["fid"] = float(calculate_frechet_distance(*moments, *others))
    (HERE / "reference.json").write_text(json.dumps(out, indent=1) + "\n")


def window():
    """Its window of 11, in f64: it makes its own in f32."""
    g = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    return (g / g.sum())[None, None, None]


def small_ms_ssim(a, b, weights):
    """pytorch-msssim's ms_ssim without its check that four halvings fit, which it makes whatever the weights."""
    values = []
    for level in range(len(weights)):
        whole, structure = _ssim(a, b, win=window(), data_range=255, size_average=False)
        if level < len(weights) - 1:
            values.append(torch.relu(structure))
            padding = [s % 2 for s in a.shape[2:]]
            a = torch.nn.functional.avg_pool2d(a, kernel_size=2, padding=padding)
            b = torch.nn.functional.avg_pool2d(b, kernel_size=2, padding=padding)
    values = torch.stack(values + [torch.relu(whole)])
    return torch.prod(values ** torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1), dim=0).mean().item()


if __name__ == "__main__":
    main()
