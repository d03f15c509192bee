"""Reference values for the DenseNet: run `python generate.py` in this folder; it writes reference.json, whole.pt and state.pt.

torchxrayvision 1.5.7, scikit-image 0.26.0, torch 2.15.0 (CPU, f32). Weights and pictures are procedural (`unit` below,
the same few lines in main.rs), so that a network of full size is compared and only results are stored. Factors are
such that activations neither vanish nor grow, and that every part is felt. Tolerances are in main.rs.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torchxrayvision as xrv


def unit(name: str, n: int) -> np.ndarray:
    """n numbers in [-1, 1): SplitMix64 from the FNV-1a of the name, upper 24 bits."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) % 2**64
    with np.errstate(over="ignore"):
        z = np.uint64(h) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(40)).astype(np.float64) / 2**23 - 1.0).astype(np.float32)


def tensor(name: str, shape) -> torch.Tensor:
    u = unit(name, int(np.prod(shape)))
    if name.endswith("running_var"):
        # the pictures' variance is of the order of 4e5
        u = (1 + np.float32(0.5) * u) * np.float32(400000.0 if "norm0" in name else 1.0)
    elif name == "classifier.weight":
        u = u * np.float32(0.2)
    elif len(shape) == 4:
        u = u * np.float32(np.sqrt(6.0 / np.prod(shape[1:])))
    elif name.endswith("norm1.weight") or name.endswith("norm.weight"):
        # the blocks' channels grow along the way
        u = np.float32(0.7) + np.float32(0.25) * u
    elif name.endswith("weight"):
        u = 1 + np.float32(0.25) * u
    else:
        u = np.float32(0.2) * u
    return torch.tensor(u.reshape(shape))


def picture(name: str, height: int, width: int, channels: int) -> np.ndarray:
    """A smooth picture with some noise, u8."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    wave = np.sin(x * (7.0 / width)) * np.cos(y * (9.0 / height))
    noise = unit(name, height * width * channels).astype(np.float64).reshape(height, width, channels)
    return np.floor(128.0 + 90.0 * wave[..., None] + 30.0 * noise).clip(0, 255).astype(np.uint8)


def prepared(image: np.ndarray) -> np.ndarray:
    """As torchxrayvision's own scripts do it."""
    grey = xrv.datasets.normalize(image, 255).mean(2)[None, ...]
    return xrv.datasets.XRayResizer(224)(xrv.datasets.XRayCenterCrop()(grey))


def main():
    here = Path(__file__).parent
    model = xrv.models.DenseNet().eval()
    state = {
        k: v if k.endswith("num_batches_tracked") else tensor(k, tuple(v.shape)) for k, v in model.state_dict().items()
    }
    model.load_state_dict(state)
    points = torch.tensor(0.5 + 0.3 * unit("op_threshs", 18))
    points[4] = float("nan")
    out = []
    for name, size in [("large", (300, 261, 3)), ("small", (64, 64, 1)), ("wide", (224, 280, 1))]:
        x = prepared(picture(name, *size))
        with torch.no_grad():
            batch = torch.tensor(x)[None]
            features, logits = model.features2(batch)[0], model(batch)[0]
            calibrated = xrv.models.op_norm(torch.sigmoid(logits[None]), points)[0]
        rounded = lambda t, digits: [float(f"{v:.{digits}g}") for v in np.asarray(t).ravel()]
        out.append({
            "name": name,
            "size": size,
            "prepared": rounded(x.ravel()[::499], 8),
            "features": rounded(features, 8),
            "logits": rounded(logits, 8),
            "calibrated": rounded(calibrated, 7),
        })
        print(name, "features", features.min(), features.mean(), features.max(), "logits", logits.std())
    (here / "reference.json").write_text(json.dumps(out, indent=None, separators=(",", ":")).replace("},{", "},\n{") + "\n")
    # What torchxrayvision's own downloads are: a pickled model, here a tiny one.
    tiny = xrv.models.DenseNet(growth_rate=1, block_config=(1,), num_init_features=1, bn_size=1, num_classes=1)
    torch.save(tiny, here / "whole.pt")
    tiny.op_threshs = torch.tensor([0.25])
    torch.save(tiny.state_dict(), here / "state.pt")


if __name__ == "__main__":
    main()
