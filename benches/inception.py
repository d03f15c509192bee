"""Images a second of the bench `inception` beside torch-fidelity's feature extractor: same files, same weights, as many
threads, in turns.

usage: python inception.py [--threads N] [--target-dir DIR] [--rounds N] [--images DIR] [--batch N]
Needs torch, torch-fidelity, numpy, pillow and safetensors from PyPI; no weights, no network.

Prints one markdown table. Each round measures ours (cargo bench), then torch-fidelity's; ratios are taken within a
round. Both decode PNG files, resize to 299 pixels as TensorFlow did, and run the whole network up to its 2048 features;
torch-fidelity's workers decode beside its network, ours is one process. Nothing else should run meanwhile.
"""
import argparse, json, os, pathlib, platform, statistics, subprocess, sys, tempfile, time
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity.datasets import ImagesPathDataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import get_featuresdict_from_dataset

HERE = pathlib.Path(__file__).resolve().parent
ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of both")
ap.add_argument("--target-dir", type=pathlib.Path,
                default=pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent / "target")))
ap.add_argument("--rounds", type=int, default=3)
ap.add_argument("--images", type=pathlib.Path, help="folder of PNG files [default: 64 of 128 pixels are made]")
ap.add_argument("--batch", type=int, default=16, help="of torch-fidelity; ours is 16")
args = ap.parse_args()
torch.set_num_threads(args.threads)
torch.set_grad_enabled(False)
torch.manual_seed(0)


def weights(folder):
    """Random weights that keep the size of a signal, for both: times do not depend on them."""
    load = torch.load
    torch.load = lambda *_, **__: {}
    into = FeatureExtractorInceptionV3.load_state_dict
    FeatureExtractorInceptionV3.load_state_dict = lambda *_: None
    module = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="none")
    FeatureExtractorInceptionV3.load_state_dict, torch.load = into, load
    state = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    for name, value in state.items():
        if name.endswith("conv.weight"):
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
    torch.save(state, folder / "inception.pth")
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "inception.safetensors")


def pictures(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:128, :128]
    for number in range(64):
        Image.fromarray(((x + y) // 2 + rng.integers(0, 100, (128, 128))).astype(np.uint8)).save(folder / f"{number:04}.png")
    return folder


def ours(folder, images, n):
    environment = os.environ | {
        "RAYON_NUM_THREADS": str(args.threads), "CARGO_TARGET_DIR": str(args.target_dir),
        "CXR_INCEPTION_WEIGHTS": str(folder / "inception.safetensors"), "CXR_BENCH_IMAGES": str(images),
        "CXR_BENCH_DEVICE": "flex"}
    command = ["cargo", "bench", "-q", "--workspace", "--bench", "inception", "--", "inception/files"]
    subprocess.run(command, check=True, env=environment, cwd=HERE.parent, stdout=subprocess.DEVNULL)
    estimates = args.target_dir / f"criterion/inception/files/{n}/new/estimates.json"
    return json.loads(estimates.read_text())["median"]["point_estimate"] / 1e9


def theirs(extractor, files):
    dataset = ImagesPathDataset(files)
    start = time.perf_counter()
    features = get_featuresdict_from_dataset(
        dataset, extractor, args.batch, cuda=False, save_cpu_ram=False, verbose=False)["2048"]
    took = time.perf_counter() - start
    assert torch.isfinite(features).all() and len(features) == len(files)
    return took


with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    weights(folder)
    images = args.images or pictures(folder / "images")
    files = sorted(str(file) for file in images.glob("*.png"))
    if not files:
        sys.exit(f"--images {images}: no PNG files in it")
    extractor = FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(folder / "inception.pth"))
    theirs(extractor, files[:args.batch])  # warms up
    rounds = [(ours(folder, images, len(files)), theirs(extractor, files)) for _ in range(args.rounds)]

per_second = [[len(files) / seconds for seconds in side] for side in zip(*rounds)]
print(f"\n{platform.machine()}, {args.threads} threads, torch {torch.__version__}, {len(files)} files, {args.rounds} rounds\n")
print("| | images/s, median | all rounds |\n|---|---|---|")
for name, values in zip(["ours", "torch-fidelity"], per_second):
    print(f"| {name} | {statistics.median(values):.2f} | {', '.join(f'{v:.2f}' for v in values)} |")
ratios = [theirs / ours for ours, theirs in rounds]
print(f"\nours is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")
