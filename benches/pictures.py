"""Hold whole pictures against diffusers: the same folder, prompts and seeds through both.

usage: python pictures.py --model DIR --prompts FILE.csv [--limit 4] [--size 128] [--steps 10] [--scheduler NAME ...]
Needs torch, diffusers, transformers, pillow from PyPI, and the example program `synthesize`:
    cargo build --release -p cxr-examples --example synthesize
Prints, for each scheduler, by how much the 8-bit pixels differ on average and at most; and the same against what
diffusers makes with guidance left out and with cross-attention left out, which has to be ten times as far at least.
Fails if a picture is more than 1 of 255 off on average or 3 at most.
"""
import argparse, csv, json, pathlib, subprocess, sys, tempfile
import numpy, torch
from diffusers import (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler,
                       StableDiffusionPipeline)
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
SCHEDULERS = {"pndm": PNDMScheduler, "ddim": DDIMScheduler, "euler": EulerDiscreteScheduler,
              "dpmpp-2m": DPMSolverMultistepScheduler, "lcm": LCMScheduler}
ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--model", type=pathlib.Path, required=True)
ap.add_argument("--prompts", type=pathlib.Path, required=True, help="CSV file with a column impression")
ap.add_argument("--limit", type=int, default=4)
ap.add_argument("--size", type=int, default=128)
ap.add_argument("--steps", type=int, default=10)
ap.add_argument("--scheduler", nargs="*", default=["pndm"], choices=list(SCHEDULERS))
ap.add_argument("--seed", type=int, default=7)
ap.add_argument("--controls", action=argparse.BooleanOptionalAction, default=True)
ap.add_argument("--program", default=str(HERE.parent / "target/release/examples/synthesize"))
args = ap.parse_args()
torch.set_grad_enabled(False)

pipe = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32, safety_checker=None)
pipe.set_progress_bar_config(disable=True)
config = json.loads((args.model / "scheduler" / "scheduler_config.json").read_text())
rows = [row["impression"].strip() for row in csv.DictReader(args.prompts.open(encoding="utf-8-sig"))]
prompts = [row for row in rows if row][: args.limit]


def theirs(guidance=7.5):
    pictures = []
    for index, prompt in enumerate(prompts):
        picture = pipe(prompt, num_inference_steps=args.steps, height=args.size, width=args.size,
                       guidance_scale=guidance, generator=torch.Generator().manual_seed(args.seed + index)).images[0]
        pictures.append(numpy.asarray(picture))
    return numpy.stack(pictures).astype(int)


def ours(scheduler):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([args.program, "--model", str(args.model), "--prompts", str(args.prompts), "--limit",
                        str(args.limit), "--size", str(args.size), "--steps", str(args.steps), "--seed",
                        str(args.seed), "--scheduler", scheduler, "--out", folder, "--device", "flex"], check=True,
                       stdout=subprocess.DEVNULL)
        with open(f"{folder}/metadata.jsonl") as file:
            made = [json.loads(line) for line in file]
        assert [row["text"] for row in made] == prompts
        return numpy.stack([numpy.asarray(Image.open(f"{folder}/{row['file_name']}")) for row in made]).astype(int)


failed = False
for name in args.scheduler:
    pipe.scheduler = SCHEDULERS[name].from_config(config)
    found, expected = ours(name), theirs()
    off = numpy.abs(found - expected).reshape(len(prompts), -1)
    mean, most = off.mean(1).max(), off.max()
    good = mean <= 1 and most <= 3
    failed |= not good
    print(f"{name}: {len(prompts)} x {args.size} pixels, {args.steps} steps: mean {mean:.3f}, at most {most} of 255; "
          f"deviation of the pictures {expected.std():.0f}{'' if good else '  FAILED'}", flush=True)
if args.controls:
    unguided = numpy.abs(found - theirs(guidance=1.0)).mean()
    for block_name, module in pipe.unet.named_modules():
        if block_name.endswith("attn2.to_out.0"):
            module.weight.zero_()
    blind = numpy.abs(found - theirs()).mean()
    print(f"against guidance left out: mean {unguided:.1f}; against cross-attention left out: mean {blind:.1f}")
    failed |= min(unguided, blind) < 10 * max(mean, 0.1)
sys.exit(1 if failed else 0)
