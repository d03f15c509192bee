"""Images a second of the bench `loader` beside a Python loader: a torch Dataset with PIL, served by a DataLoader.

usage: python loader.py [--run] [--threads N] [--target-dir DIR] [--runs N] [--data DIR]
Needs torch, numpy and pillow from PyPI; no network.

Prints one markdown table. With --run, ours is measured here and now (cargo bench), then Python's, round by round, so that
both see the machine in the same state; ratios are taken within a round. Nothing else should run meanwhile.
"""
import argparse, csv, json, os, pathlib, platform, re, statistics, subprocess, sys, time
import numpy as np
import PIL
import torch
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--run", action="store_true", help="measure ours too, in turns with Python's")
ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)),
                help="rayon's threads on our side, worker processes on Python's")
ap.add_argument("--target-dir", type=pathlib.Path,
                default=pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent / "target")))
ap.add_argument("--runs", type=int, default=3, help="rounds")
ap.add_argument("--data", type=pathlib.Path, help="folder in the Indiana layout [default: the one that the bench makes]")
args = ap.parse_args()
SIDE, BATCH = 128, 32  # those of benches/loader.rs
OURS = ["decode-and-resize", "prepare-to-disk", "epoch", "epoch-burn-loader", "epoch-memory-cache", "epoch-disk-cache"]


class Radiographs(torch.utils.data.Dataset):
    """What a training script in Python does: open, short side to SIDE by Lanczos, middle, three channels, [-1, 1]."""

    def __init__(self, folder):
        with open(folder / "indiana_reports.csv", newline="") as file:
            texts = {row["uid"]: row["impression"] for row in csv.DictReader(file)}
        with open(folder / "indiana_projections.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        self.pairs = [(folder / "images/images_normalized" / row["filename"], texts[row["uid"]]) for row in rows]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        path, text = self.pairs[index]
        with Image.open(path) as image:
            image = image.convert("L")
            scale = SIDE / min(image.size)
            width, height = (max(SIDE, int(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
            left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
            image = image.crop((left, top, left + SIDE, top + SIDE))
            pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1.0)
        return pixels.expand(3, SIDE, SIDE), text


def epoch(data, workers):
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=workers)
    start, seen = time.perf_counter(), 0
    for pixels, texts in loader:
        assert pixels.shape[1:] == (3, SIDE, SIDE) and len(texts) == len(pixels)
        seen += len(pixels)
    assert seen == len(data)
    return seen / (time.perf_counter() - start)


def ours(unit):
    """Images a second as criterion has it; None if it was not measured."""
    for path in (args.target_dir / "criterion").glob("loader/*/new/benchmark.json"):
        found = json.loads(path.read_text())
        if found["full_id"] == f"loader/{unit}":
            median = json.loads((path.parent / "estimates.json").read_text())["median"]["point_estimate"]
            return found["throughput"]["Elements"] / (median / 1e9)
    return None


def bench():
    command = ["cargo", "bench", "--quiet", "--workspace", "--bench", "loader"]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(args.threads),
                   "CARGO_TARGET_DIR": str(args.target_dir.resolve())}
    if args.data:
        environment["CXR_BENCH_DATA"] = str(args.data.resolve())
    subprocess.run(command, cwd=HERE.parent, env=environment, check=True, stdout=subprocess.DEVNULL)


def processor():
    try:
        return re.findall(r"model name\s*:\s*(.*)", pathlib.Path("/proc/cpuinfo").read_text())[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def main():
    torch.set_num_threads(args.threads)
    rates = {}
    for number in range(args.runs if args.run else 1):
        if args.run:
            print(f"round {number + 1} of {args.runs}", file=sys.stderr)
            bench()
        found = {unit: ours(unit) for unit in OURS}
        if None in found.values():
            sys.exit("not measured; cargo bench -p cxr-benches --bench loader, or --run")
        data = Radiographs(args.data or args.target_dir / "bench-data/indiana")
        epoch(data, 0)  # brings the files into the system's memory
        for workers in (0, args.threads):
            found[f"PyTorch, {workers} workers"] = epoch(data, workers)
        best = max(rate for name, rate in found.items() if name.startswith("PyTorch"))
        for name, rate in found.items():
            rates.setdefault(name, []).append((rate, rate / found["decode-and-resize"], rate / best))
    rust = subprocess.run(["rustc", "--version"], capture_output=True, text=True).stdout.split()[1]
    print(f"{processor()}, {args.threads} threads; load {os.getloadavg()[0]:.1f} at the end. Rust {rust}; PyTorch "
          f"{torch.__version__}, Pillow {PIL.__version__}, Python {platform.python_version()}. {len(data)} images, "
          f"{SIDE} px, batches of {BATCH}; medians of {len(rates['epoch'])} round(s), ratios within a round.\n")
    print("| | Images a second | Of decoding and resizing alone | Of PyTorch's best |\n|---|---|---|---|")
    for name, all_rounds in rates.items():
        rate, alone, python = (statistics.median(column) for column in zip(*all_rounds))
        print(f"| {name if name.startswith('PyTorch') else f'`loader/{name}`'} | {rate:.0f} | {alone:.2f} | {python:.2f} |")


main()
