"""Run the Python of docs/python.md as it stands, on files that the programs here have just made.

usage: python exchange.py --lora FILE --inception FILE [--programs DIR]
Needs torch, diffusers, peft, transformers, datasets, pytorch-fid, pillow from PyPI, and the example programs:
    cargo build --release -p cxr-examples --example synthesize --example evaluate
`--lora` is an adapter of the embedded model (`reproduce` makes one), `--inception` Inception's weights (docs/metrics.md).

The embedded model gets CLIP's vocabulary beside it, which diffusers wants to find there. Then the page's blocks run, one
after the other, and what they made is held against what the programs made: the picture to a level of 255, the data set's
rows, and the distance of two sets to one part in a thousand. Fails if one is not so.
"""
import argparse, json, os, pathlib, shutil, subprocess, sys, tempfile
import numpy
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--lora", type=pathlib.Path, required=True)
ap.add_argument("--inception", type=pathlib.Path, required=True)
ap.add_argument("--programs", type=pathlib.Path, default=ROOT / "target/release/examples")
args = ap.parse_args()
lora, inception, programs = args.lora.resolve(), args.inception.resolve(), args.programs.resolve()
os.environ["HF_HUB_OFFLINE"] = "1"
work = pathlib.Path(tempfile.mkdtemp())
os.chdir(work)
failed = []


def check(what, value, bar):
    print(f"{what}: {value:.3g}, at most {bar:.3g}{'' if value <= bar else '  FAILED'}", flush=True)
    if not value <= bar:
        failed.append(what)


def run(program, *arguments):
    subprocess.run([programs / program, *map(str, arguments), "--device", "flex", "--quiet"], check=True,
                   stdout=subprocess.DEVNULL)


# what the page takes to be there
MODEL = work / "model"
shutil.copytree(ROOT / "examples/model/cxr-demo-64", MODEL)
shutil.copytree(ROOT / "crates/cxr-tokenizer/vocabulary", MODEL / "tokenizer")
(MODEL / "tokenizer/tokenizer_config.json").write_text(json.dumps(
    {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}))
index = json.loads((MODEL / "model_index.json").read_text())
index["tokenizer"] = ["transformers", "CLIPTokenizer"]
(MODEL / "model_index.json").write_text(json.dumps(index))
shutil.copy(lora, "adapter.safetensors")
run("synthesize", "--model", MODEL, "--prompt", "Cardiomegaly.", "--seed", 7, "--steps", 20, "--lora", "adapter.safetensors",
    "--images-per-prompt", 8, "--out", "out/synthesize")
thumbnails = sorted((ROOT / "examples/data/nih-chest-64/images").iterdir())
sets = {"real": thumbnails[:40], "fake": thumbnails[40:80]}
for name, files in sets.items():
    pathlib.Path(name).mkdir()
    for file in files:
        shutil.copy(file, name)
for name, other in [("real", "fake"), ("fake", "real")]:
    run("evaluate", "--real", name, "--fake", other, "--inception", inception, "--save-statistics", f"{name}.npz", "--out",
        f"evaluate-{name}")

# the page
blocks = [part.split("```")[0] for part in (ROOT / "docs/python.md").read_text().split("```python\n")[1:]]
assert len(blocks) == 3, len(blocks)
page = {"MODEL": MODEL}
for block in blocks:
    exec(block, page)

ours = numpy.asarray(Image.open("out/synthesize/00000.png").convert("RGB"), dtype=int)
off = numpy.abs(numpy.asarray(page["picture"].convert("RGB"), dtype=int) - ours)
check("picture with an adapter in diffusers, most levels of 255", off.max(), 1)
pipe, torch = page["pipe"], page["torch"]
pipe.unload_lora_weights()
base = pipe("Cardiomegaly.", num_inference_steps=20, generator=torch.Generator().manual_seed(7)).images[0]
shown = numpy.abs(numpy.asarray(base.convert("RGB"), dtype=int) - ours).mean()
print(f"without the adapter it is {shown:.1f} levels off on average")
assert shown > 10 * max(off.mean(), 0.05), "the adapter shows nothing: try one that was trained for longer"

rows = [json.loads(line) for line in open("out/synthesize/metadata.jsonl")]
data = page["pictures"]
assert len(data) == 8 and data["text"] == ["Cardiomegaly."] * 8, data
assert data["seed"] == [row["seed"] for row in rows] == list(range(7, 15))
for picture, row in zip(data, rows):
    file = numpy.asarray(Image.open(f"out/synthesize/{row['file_name']}").convert("RGB"))
    assert (numpy.asarray(picture["image"].convert("RGB")) == file).all(), row["file_name"]
print("columns:", ", ".join(data.column_names))

from pytorch_fid.fid_score import calculate_frechet_distance, compute_statistics_of_path
both = [compute_statistics_of_path(f"{name}.npz", None, 1, 2048, "cpu") for name in sets]
theirs = calculate_frechet_distance(*both[0], *both[1])
text = pathlib.Path("evaluate-real/metrics.json").read_text()
found = []


def look(value):
    """Every figure whose name begins with FID or Fréchet."""
    if isinstance(value, dict):
        name = str(value.get("name", value.get("metric", "")))
        if name.lower().startswith(("fid", "fr")) and "value" in value:
            found.append(value["value"])
        for part in value.values():
            look(part)
    elif isinstance(value, list):
        for part in value:
            look(part)


look(json.loads(text))
assert found, text[:2000]
check(f"Fréchet distance, {found[0]:.4f}, against pytorch-fid's, {theirs:.4f}", abs(found[0] - theirs) / theirs, 1e-3)

if failed:
    sys.exit(f"{len(failed)} failed: {', '.join(failed)}")
