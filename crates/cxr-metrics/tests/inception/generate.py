"""Reference values for the Inception network: run `python generate.py` in this folder.

torch 2.15.0 (CPU, f32), pytorch-fid 0.3.0, torch-fidelity 0.4.0, clean-fid 0.1.35, pillow 13.0.0, numpy 2.4.6.

reference.safetensors: features in the three resize modes and logits of procedural pictures, by a whole network with
procedural weights (`weights` below, the same lines in main.rs), which are not stored. Weights are calibrated so that a
signal neither dies nor explodes, and every part of a normalization is far from its neutral value.

files.json, zip.pkl, legacy.head: what torch.save writes for those weights in its newer and its older format, without
the numbers, and in which order they follow. The test puts its own there.

published.json, published.safetensors: the same of real thumbnails with the published weights (84 MB, not stored), given
with --weights and --images; without them these two files are left alone. The tolerance everywhere is 1e-5 of the norm,
1e-3 for FID. The files are the first of each folder by name.
"""

import argparse
import io
import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytorch_fid.fid_score
import pytorch_fid.inception
import torch
import torch_fidelity
from cleanfid.resize import build_resizer
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

HERE = Path(__file__).parent
torch.set_grad_enabled(False)


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


def unit(name: str, n: int) -> np.ndarray:
    """n numbers in [-1, 1)."""
    return ((hashes(name, n) >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)).astype(np.float32)


def weights(shapes: dict) -> dict:
    out = {}
    for name, shape in shapes.items():
        n, fan_in = int(np.prod(shape)), int(np.prod(shape[1:]))
        if name.endswith("conv.weight"):
            gain, offset = (6 / fan_in) ** 0.5, 0
        elif name == "fc.weight":
            gain, offset = 0.5, 0
        elif name.endswith("bn.weight"):
            gain, offset = 0.3, 1
        elif name.endswith("running_var"):
            gain, offset = 0.5, 1
        else:  # biases and means
            gain, offset = 0.3, 0
        values = unit(name, n) * np.float32(gain) + np.float32(offset)
        out[name] = torch.tensor(values.reshape(shape))
    return out


def picture(name: str, width: int, height: int, channels: int) -> np.ndarray:
    """Stripes and noise, u8 [height, width, channels]."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(channels), indexing="ij")
    seed = len(name)
    stripes = (x * (3 + seed) + y * (5 + 2 * seed) + c * 40) % 256 * 3 // 4
    noise = (hashes(name, height * width * channels) >> np.uint64(58)).astype(np.int64).reshape(stripes.shape)
    return (stripes + noise).astype(np.uint8)


def network(state: dict, **options):
    """pytorch-fid's network with these weights."""
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: state
    return pytorch_fid.inception.InceptionV3(**options).eval()


def clean_input(image: np.ndarray) -> torch.Tensor:
    resized = build_resizer("clean")(image)
    return torch.tensor((resized - 128) / 128).permute(2, 0, 1)[None]


def shapes_of_network() -> dict:
    """All tensors of the published file, from torch-fidelity's own definition."""
    original = torch.load
    torch.load = lambda *_, **__: {}
    load = FeatureExtractorInceptionV3.load_state_dict
    FeatureExtractorInceptionV3.load_state_dict = lambda *_: None
    module = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="none")
    FeatureExtractorInceptionV3.load_state_dict, torch.load = load, original
    return {k: tuple(v.shape) for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}


def procedural():
    state = weights(shapes_of_network())
    ours = network(state)
    plain = network(state, resize_input=False, normalize_input=False)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(state, file.name)
        theirs = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=file.name)
    out = {mode: [] for mode in ["pytorch-fid", "torch-fidelity", "clean", "logits"]}
    for name, width, height, channels in [("up", 40, 56, 3), ("down", 350, 320, 3), ("grey1", 64, 64, 1)]:
        image = np.repeat(picture(name, width, height, channels), 3 // channels, axis=2)
        pixels = torch.tensor(image).permute(2, 0, 1)[None]
        out["pytorch-fid"].append(ours(pixels / 255)[0].flatten())
        features, logits = theirs(pixels)
        out["torch-fidelity"].append(features.flatten())
        out["logits"].append(logits.flatten())
        out["clean"].append(plain(clean_input(image))[0].flatten())
    out = {name: torch.stack(rows).numpy() for name, rows in out.items()}
    for name, rows in out.items():
        spread = [np.linalg.norm(rows[i] - rows[j]) / np.linalg.norm(rows[i]) for i, j in [(0, 1), (0, 2), (1, 2)]]
        print(name, "mean", rows.mean(), "std", rows.std(), "pictures differ by", spread)
    save_file(out, HERE / "reference.safetensors")


def files():
    state = {name: torch.zeros(shape) for name, shape in shapes_of_network().items()}
    with io.BytesIO() as buffer:
        torch.save(state, buffer)
        with zipfile.ZipFile(buffer) as archive:
            (pickle,) = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    (HERE / "zip.pkl").write_bytes(pickle)
    with io.BytesIO() as buffer:
        torch.save(state, buffer, _use_new_zipfile_serialization=False)
        written = buffer.getvalue()
    (HERE / "legacy.head").write_bytes(written[: len(written) - sum(8 + 4 * t.numel() for t in state.values())])
    # Storages are numbered by their first use there, and sorted by their address here.
    addresses = {str(t.untyped_storage()._cdata): name for name, t in state.items()}
    orders = {"zip": list(state), "legacy": [addresses[key] for key in sorted(addresses)]}
    (HERE / "files.json").write_text(json.dumps(orders, indent=0) + "\n")


def published(weight_file: Path, folder: Path):
    state = load_file(weight_file)
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}  # not in the file, and not used
    n = 40
    sides = {}
    for side in ["train", "test"]:
        sides[side] = sorted((folder / side).rglob("*.png"))[:n]
    out, tensors = {"images": n, "files": {s: [str(f.relative_to(folder)) for f in fs] for s, fs in sides.items()}}, {}
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: state
    model = pytorch_fid.inception.InceptionV3()
    moments = []
    for side, files in sides.items():
        features = pytorch_fid.fid_score.get_activations(files, model, batch_size=10, num_workers=0)
        moments += [features.mean(0), np.cov(features, rowvar=False)]
        tensors[f"pytorch-fid/{side}"] = features[:4].astype(np.float32)
    out["pytorch-fid"] = float(pytorch_fid.fid_score.calculate_frechet_distance(*moments))
    with tempfile.NamedTemporaryFile(suffix=".pth") as file, tempfile.TemporaryDirectory() as sets:
        torch.save(state, file.name)
        for side, files in sides.items():
            (Path(sets) / side).mkdir()
            for f in files:
                (Path(sets) / side / f.name).symlink_to(f)
        figures = torch_fidelity.calculate_metrics(
            input1=f"{sets}/train", input2=f"{sets}/test", cuda=False, fid=True, kid=True, kid_subset_size=20,
            kid_subsets=10, feature_extractor_weights_path=file.name, cache=False, verbose=False, batch_size=10,
            samples_find_deep=False)
    out["torch-fidelity"] = figures["frechet_inception_distance"]
    rng = np.random.RandomState(2020)
    out["kid"] = {
        "mean": figures["kernel_inception_distance_mean"], "std": figures["kernel_inception_distance_std"],
        "indices": [[rng.choice(n, 20, replace=False).tolist() for _ in range(2)] for _ in range(10)]}
    plain = pytorch_fid.inception.InceptionV3(resize_input=False, normalize_input=False).eval()
    images = [np.asarray(Image.open(f).convert("RGB")) for f in sides["test"][:2]]
    tensors["clean/test"] = torch.cat([plain(clean_input(i))[0].flatten(1) for i in images]).numpy()
    save_file(tensors, HERE / "published.safetensors")
    (HERE / "published.json").write_text(json.dumps(out, indent=1) + "\n")
    print({k: v for k, v in out.items() if k != "files"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="safetensors of the published weights, without fc")
    parser.add_argument("--images", type=Path, help="folder with train and test")
    args = parser.parse_args()
    procedural()
    files()
    if args.weights and args.images:
        published(args.weights, args.images)
