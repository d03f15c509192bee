"""How time and memory of a picture grow with its size, the batch, the threads and the steps; CPU, f32.

usage: python cost.py --model DIR [--bin FILE] [--cells REGEX] [--no-reference] [--runs N]
DIR is a model of Stable Diffusion 1.x's sizes in diffusers' layout. Needs the built program `synthesize`
(cargo build --release --workspace --example synthesize) and, for the reference, torch, diffusers and transformers.

Each cell runs the whole program twice, with few steps and with more: the difference over the steps between is the time of a
guided step, the rest is what every run pays (reading weights, text encoder, autoencoder, PNG). The peak is the largest
resident memory of the process. The reference is diffusers' pipeline in a process of its own, measured the same way.
Nothing else should run meanwhile.
"""
import argparse, os, pathlib, re, subprocess, sys, tempfile, time

HERE = pathlib.Path(__file__).resolve().parent
ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--model", type=pathlib.Path, required=True)
ap.add_argument("--bin", type=pathlib.Path, default=HERE.parent / "target/release/examples/synthesize")
ap.add_argument("--cells", default="", help="cells whose name has this regular expression in it")
ap.add_argument("--no-reference", action="store_true")
ap.add_argument("--runs", type=int, default=1, help="of each cell; the fastest counts")
ap.add_argument("--reference", help=argparse.SUPPRESS)
args = ap.parse_args()

# pixels, pictures at once, threads, few and more steps, whether the reference runs too
CELLS = [(128, 1, 2, (2, 8), True), (256, 1, 2, (2, 6), True), (512, 1, 2, (1, 3), True),
         (128, 2, 2, (2, 6), False), (128, 4, 2, (2, 6), True), (128, 8, 2, (2, 5), False),
         (128, 1, 1, (2, 6), True), (256, 1, 1, (1, 3), False), (512, 1, 1, (1, 2), False),
         (128, 1, 2, (8, 20), False)]


def measured(command, environment):
    """Seconds and the largest resident memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    text = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{text.decode()[-2000:]}")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def ours(pixels, batch, threads, steps):
    with tempfile.TemporaryDirectory() as out:
        return measured(
            [args.bin, "--device", "flex", "--model", args.model, "--prompt", "Cardiomegaly.", "--images-per-prompt",
             str(batch), "--batch", str(batch), "--size", str(pixels), "--steps", str(steps), "--scheduler", "ddim",
             "--quiet", "--out", out],
            {"RAYON_NUM_THREADS": str(threads), "MIMALLOC_PURGE_DELAY": "-1", "MIMALLOC_ALLOW_THP": "0"})


def theirs(pixels, batch, threads, steps):
    return measured([sys.executable, __file__, "--model", args.model, "--reference", f"{pixels} {batch} {threads} {steps}"],
                    {"OMP_NUM_THREADS": str(threads)})


def reference():
    pixels, batch, threads, steps = map(int, args.reference.split())
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    torch.set_num_threads(threads)
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None, feature_extractor=None,
                                                       requires_safety_checker=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipeline(["Cardiomegaly."] * batch, height=pixels, width=pixels, num_inference_steps=steps)


def cell(run, pixels, batch, threads, steps):
    """Seconds a step, seconds besides, GB."""
    few, more = steps
    short, long = ([run(pixels, batch, threads, n) for _ in range(args.runs)] for n in steps)
    least = lambda runs: min(seconds for seconds, _ in runs)
    step = (least(long) - least(short)) / (more - few)
    return step, least(short) - few * step, max(peak for _, peak in short + long)


def main():
    print("| Pixels | Pictures at once | Threads | Steps | Guided step, s | Besides, s | Peak, GB | diffusers: step, s | Besides, s | Peak, GB | Step, ours / diffusers |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for pixels, batch, threads, steps, compared in CELLS:
        if not re.search(args.cells, f"{pixels}px x{batch} t{threads} s{steps[1]}"):
            continue
        mine = cell(ours, pixels, batch, threads, steps)
        row = f"| {pixels} | {batch} | {threads} | {steps[0]} and {steps[1]} | {mine[0]:.3f} | {mine[1]:.1f} | {mine[2]:.2f} |"
        if compared and not args.no_reference:
            other = cell(theirs, pixels, batch, threads, steps)
            row += f" {other[0]:.3f} | {other[1]:.1f} | {other[2]:.2f} | {mine[0] / other[0]:.2f} |"
        else:
            row += " | | | |"
        print(row, flush=True)


reference() if args.reference else main()
