"""How near few steps of one sampler and many of another come to the picture that all of them go towards.

usage: python steps.py [--model DIR] [--lora FILE] [--size N] [--pictures 8] [--reference euler:400] [--run NAME:STEPS ...]
Needs numpy and pillow from PyPI, and the example program `synthesize`:
    cargo build --release -p cxr-examples --example synthesize

The deterministic samplers solve one differential equation: with more steps they come to the same picture of a prompt and
a seed. The reference is Euler's method, the plainest, with very many steps. Prints a table: for each sampler and number of
steps, the calls of the UNet, and how far its pictures are from the reference's, over all pictures: mean and root of the
mean square of the difference of their grey values, in levels of 255; and the same between pictures of different seeds,
which is what no relation at all looks like.
"""
import argparse, json, pathlib, subprocess, tempfile
import numpy
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--model", help="default: the embedded model")
ap.add_argument("--lora")
ap.add_argument("--size")
ap.add_argument("--pictures", type=int, default=8)
ap.add_argument("--guidance", default="2")
ap.add_argument("--reference", default="euler:400")
ap.add_argument("--run", nargs="*", default=["pndm:50", "pndm:25", "pndm:15", "ddim:50", "dpmpp-2m:25",
                                             "dpmpp-2m:15", "dpmpp-2m:12", "dpmpp-2m:8"])
ap.add_argument("--program", default=str(HERE.parent / "target/release/examples/synthesize"))
args = ap.parse_args()
PROMPTS = ["Cardiomegaly.", "No acute disease.", "Small left pleural effusion.", "Pneumothorax."]


def pictures(run):
    sampler, steps = run.split(":")
    with tempfile.TemporaryDirectory() as folder:
        command = [args.program, "--images-per-prompt", str(args.pictures // len(PROMPTS)), "--batch", str(args.pictures), "--steps", steps,
                   "--scheduler", sampler, "--guidance", args.guidance, "--out", folder, "--device", "flex", "--quiet"]
        for prompt in PROMPTS:
            command += ["--prompt", prompt]
        for flag in ("model", "lora", "size"):
            if getattr(args, flag):
                command += [f"--{flag}", getattr(args, flag)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [json.loads(line) for line in open(f"{folder}/metadata.jsonl")]
        found = [numpy.asarray(Image.open(f"{folder}/{row['file_name']}").convert("L"), dtype=float) for row in rows]
        assert len(found) == args.pictures, len(found)
        return numpy.stack(found)


def distance(a, b):
    return numpy.abs(a - b).mean(), numpy.sqrt(((a - b) ** 2).mean())


reference = pictures(args.reference)
mean, root = distance(reference, numpy.roll(reference, 1, axis=0))
print(f"{args.pictures} pictures, guidance {args.guidance}; reference {args.reference}\n")
print("| Sampler | Steps | Calls of the UNet | Mean difference | Root of the mean square |")
print("|---|---|---|---|---|")
for run in args.run:
    sampler, steps = run.split(":")
    calls = int(steps) + (sampler == "pndm")  # which visits one timestep twice
    print("| `{}` | {} | {} | {:.2f} | {:.2f} |".format(sampler, steps, calls, *distance(pictures(run), reference)),
          flush=True)
print(f"| the reference's, of another seed | | | {mean:.2f} | {root:.2f} |")
