"""Reference values for the linear head: run `python generate.py` in this folder; it writes reference.json.

scikit-learn 1.9.1, numpy 2.4.6, in f64. Features are procedural (`unit` below, the same few lines in main.rs), so that
only results are stored. Tolerances are in main.rs.
"""

import json
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler


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


def data(name, n, d):
    """Each feature adds half of its left neighbour, and has a size of its own; the label is a noisy sum."""
    x = unit(name, n * d).reshape(n, d)
    y = x.copy()
    y[:, 1:] += np.float32(0.5) * x[:, :-1]
    y *= (np.float32(1.0) + np.arange(d, dtype=np.float32) % np.float32(4.0))
    noise = unit(name + " noise", n)
    label = x[:, 0] - x[:, 1] + x[:, 2] + np.float32(1.5) * noise > np.float32(0.25)
    return y.astype(np.float64), label


def main():
    out = []
    for name, n, d, c, standardize in [
        ("tall", 220, 12, 1.0, False),
        ("weak", 220, 12, 0.01, True),
        ("wide", 40, 60, 0.5, True),
        ("strong", 150, 8, 50.0, False),
    ]:
        x, y = data(name, n, d)
        scaler = StandardScaler().fit(x) if standardize else None
        z = scaler.transform(x) if scaler else x
        model = LogisticRegression(C=c, tol=1e-12, max_iter=100000, solver="newton-cg").fit(z, y)
        w, b = model.coef_[0], model.intercept_[0]
        if scaler:
            w = w / scaler.scale_
            b = b - w @ scaler.mean_
        out.append({
            "name": name, "n": n, "d": d, "c": c, "standardize": standardize, "positives": int(y.sum()),
            "coefficients": [float(f"{v:.9g}") for v in w], "intercept": float(f"{b:.9g}"),
        })
        p = 1 / (1 + np.exp(-(z @ model.coef_[0] + model.intercept_[0])))
        print(name, "gradient", np.abs(model.coef_[0] + c * z.T @ (p - y)).max(), c * (p - y).sum(), w[:3], b)
    Path(__file__).parent.joinpath("reference.json").write_text(json.dumps(out).replace("}, {", "},\n{") + "\n")


if __name__ == "__main__":
    main()
