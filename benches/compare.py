"""Times of the benches' units beside the same units in diffusers and PEFT on PyTorch: CPU, as many threads.

usage: python compare.py [--run] [--dtype f32|bf16] [--threads N] [--filter REGEX] [--target-dir DIR] [--runs N]
Needs torch, diffusers, peft and transformers from PyPI; no weights, no network.

Prints one markdown table. Ours are the medians of criterion's latest results. With --run, each unit is measured here and
now: first ours (cargo bench), then PyTorch's, unit by unit, so that both see the machine in the same state. Without it,
ours are whatever lies under target/criterion, measured earlier. Nothing else should run meanwhile.
"""
import argparse, copy, gc, json, os, pathlib, platform, re, statistics, subprocess, sys, tempfile, time
import diffusers
import peft
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel

HERE = pathlib.Path(__file__).resolve().parent
ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--run", action="store_true", help="measure ours too, in turns with PyTorch's")
ap.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="of weights and activations on both sides")
ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)),
                help="of both; ours must have run with as many (RAYON_NUM_THREADS, which --run sets)")
ap.add_argument("--filter", default="", help="units whose id has this regular expression in it")
ap.add_argument("--target-dir", type=pathlib.Path,
                default=pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent / "target")))
ap.add_argument("--runs", type=int, help="of PyTorch; 3 for units of more than two seconds and 10 for others")
args = ap.parse_args()
torch.set_num_threads(args.threads)
torch.set_grad_enabled(False)
torch.manual_seed(0)
torch.set_default_dtype({"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype])

ROWS, TEXT, HEADS = 2, (77, 768), 8
LEVELS = [("level-0", 320, 64), ("level-1", 640, 32), ("level-2", 1280, 16), ("middle", 1280, 8)]
JOINED = [("level-0", 960, 320, 64), ("level-1", 1920, 640, 32), ("level-2", 2560, 1280, 16), ("middle", 2560, 1280, 8)]
EMBEDDED = HERE.parent / "examples/model/cxr-demo-64"
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
                steps_offset=1)
models = {}  # kept for the units of one bench, dropped after


def model(name, make):
    if name not in models:
        models[name] = make().eval().to(torch.get_default_dtype())
    return models[name]


def unet():
    return model("unet", lambda: UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3))


def vae():
    return model("vae", lambda: AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4))


def guided_step(make, width, channels, side):
    network, latents, hidden = make(), torch.randn(2, channels, side, side), torch.randn(2, 77, width)
    return lambda: network(latents, torch.tensor([981.0, 981.0], dtype=torch.float32), hidden).sample


def encode(make, pixels):
    network, picture = make(), torch.randn(1, 3, pixels, pixels)
    return lambda: network.encode(picture).latent_dist.mean


def decode(make, channels, side):
    network, latents = make(), torch.randn(1, channels, side, side)
    return lambda: network.decode(latents).sample


def text():
    config = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, hidden_act="quick_gelu")
    network, ids = transformers.CLIPTextModel(config).eval(), torch.arange(2 * 77).reshape(2, 77)
    return lambda: network(ids).last_hidden_state


SCHEDULERS = {
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **SCHEDULE),
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **SCHEDULE),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**SCHEDULE),
    "euler-a": lambda: diffusers.EulerAncestralDiscreteScheduler(**SCHEDULE),
    "dpmpp-2m": lambda: diffusers.DPMSolverMultistepScheduler(**SCHEDULE),
    "lcm": lambda: diffusers.LCMScheduler(**SCHEDULE),
}


def loop(scheduler, steps, latents, denoiser):
    scheduler.set_timesteps(steps)
    latents = latents * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        latents = scheduler.step(denoiser(scheduler.scale_model_input(latents, timestep), timestep), timestep,
                                 latents).prev_sample
    return latents


def scheduler_alone(name):
    latents = torch.randn(1, 4, 64, 64)
    return lambda: loop(SCHEDULERS[name](), 20, latents, lambda x, _: x)


def whole_loop(side):
    network, hidden, start = unet(), torch.randn(2, *TEXT), torch.randn(1, 4, side, side)

    def denoiser(latents, timestep):
        without, with_text = network(torch.cat([latents] * 2), timestep, hidden).sample.chunk(2)
        return without + 7.5 * (with_text - without)
    return lambda: loop(SCHEDULERS["dpmpp-2m"](), 4, start, denoiser)


def conv(into, out, side):
    layer, x = torch.nn.Conv2d(into, out, 3, padding=1), torch.randn(ROWS, into, side, side)
    return lambda: layer(x)


def group_norm_silu(channels, side):
    layer, x = torch.nn.GroupNorm(32, channels), torch.randn(ROWS, channels, side, side)
    return lambda: F.silu(layer(x))


def attention(channels, side, own):
    """As diffusers' processor on PyTorch 2; the text's keys and values are computed before, as in ours."""
    width = channels if own else TEXT[1]
    q, k, v = (torch.nn.Linear(i, channels, bias=False) for i in (channels, width, width))
    out, x = torch.nn.Linear(channels, channels), torch.randn(ROWS, side * side, channels)

    def split(x):
        return x.view(ROWS, -1, HEADS, channels // HEADS).transpose(1, 2)

    def mix(keys, values):
        mixed = F.scaled_dot_product_attention(split(q(x)), keys, values)
        return out(mixed.transpose(1, 2).reshape(ROWS, -1, channels))
    if own:
        return lambda: mix(split(k(x)), split(v(x)))
    hidden = torch.randn(ROWS, *TEXT)
    keys, values = split(k(hidden)), split(v(hidden))
    return lambda: mix(keys, values)


def feed_forward(channels, side):
    into, out = torch.nn.Linear(channels, 8 * channels), torch.nn.Linear(4 * channels, channels)
    x = torch.randn(ROWS, side * side, channels)

    def forward():
        hidden, gate = into(x).chunk(2, -1)
        return out(hidden * F.gelu(gate))
    return forward


def training_step():
    """The mean squared error of the noise, its gradients by the factors, and AdamW; base and inputs are frozen."""
    torch.set_grad_enabled(True)
    network = unet().requires_grad_(False)
    network = peft.get_peft_model(network, peft.LoraConfig(
        r=8, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    factors = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=5e-5)
    scheduler = diffusers.DDPMScheduler(**SCHEDULE)
    latents, hidden = torch.randn(4, 4, 16, 16), torch.randn(4, *TEXT)

    def step():
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (4,))
        predicted = network(scheduler.add_noise(latents, noise, timesteps), timesteps, hidden).sample
        loss = F.mse_loss(predicted, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()
    return step


def load_vae(dtype):
    folder = tempfile.TemporaryDirectory()
    copy.deepcopy(vae()).to(dtype).save_pretrained(folder.name)

    def load():
        return AutoencoderKL.from_pretrained(folder.name, torch_dtype=torch.float32).encoder.conv_in.weight
    return load


def units():
    """Pairs of the id and the bench it is in, with what makes PyTorch's counterpart."""
    yield "text/encode/2x77", "text", text
    for pixels in (128, 512):
        yield f"unet/guided-step/{pixels}px", "unet", lambda p=pixels: guided_step(unet, TEXT[1], 4, p // 8)
    yield "loop/dpmpp-2m/4-steps/128px", "denoise", lambda: whole_loop(16)
    yield "loop/dpmpp-2m/4-steps/512px", "denoise", lambda: whole_loop(64)
    yield "train/step/128px/batch-4/rank-8", "train", training_step
    small_unet = lambda: model("small unet", lambda: UNet2DConditionModel.from_pretrained(EMBEDDED, subfolder="unet"))
    small_vae = lambda: model("small vae", lambda: AutoencoderKL.from_pretrained(EMBEDDED, subfolder="vae"))

    def embedded(what):
        config = small_unet().config
        width, channels, side = config.cross_attention_dim, config.in_channels, config.sample_size
        return {"unet/guided-step": lambda: guided_step(small_unet, width, channels, side),
                "vae/decode": lambda: decode(small_vae, channels, side),
                "vae/encode": lambda: encode(small_vae, 64)}[what]()
    for what in ("unet/guided-step", "vae/decode", "vae/encode"):
        yield f"embedded/{what}/64px", "denoise", lambda w=what: embedded(w)
    for pixels in (128, 512):
        yield f"vae/encode/{pixels}px", "vae", lambda p=pixels: encode(vae, p)
        yield f"vae/decode/{pixels}px", "vae", lambda p=pixels: decode(vae, 4, p // 8)
    if args.dtype == "f32":
        for dtype in (torch.float32, torch.float16):
            name = {torch.float32: "f32", torch.float16: "f16"}[dtype]
            yield f"weights/load/vae/from-{name}", "weights", lambda d=dtype: load_vae(d)
    for level, c, s in LEVELS:
        image, tokens = f"{level}/{c}x{s}x{s}", f"{level}/{s * s}x{c}"
        yield f"conv3x3/{image}", "operations", lambda c=c, s=s: conv(c, c, s)
        yield f"group-norm-silu/{image}", "operations", lambda c=c, s=s: group_norm_silu(c, s)
        yield f"self-attention/{tokens}", "operations", lambda c=c, s=s: attention(c, s, True)
        yield f"cross-attention/{tokens}", "operations", lambda c=c, s=s: attention(c, s, False)
        yield f"feed-forward/{tokens}", "operations", lambda c=c, s=s: feed_forward(c, s)
    for level, i, o, s in JOINED:
        yield f"conv3x3-joined/{level}/{i}to{o}x{s}x{s}", "operations", lambda i=i, o=o, s=s: conv(i, o, s)
    for name in SCHEDULERS:
        yield f"scheduler/{name}/20-steps/64x64", "schedulers", lambda n=name: scheduler_alone(n)


def theirs(make):
    """The median in milliseconds, after one run to warm up."""
    torch.set_grad_enabled(False)  # a unit that trains turns it on for itself
    work = make()
    start = time.perf_counter()
    assert torch.isfinite(work()).all(), "PyTorch's result is not finite"
    runs = args.runs or (3 if time.perf_counter() - start > 2 else 10)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def ours(unit):
    """The median in milliseconds as criterion has it; None if it was not measured."""
    prefix = "" if args.dtype == "f32" else f"{args.dtype}/"
    for path in (args.target_dir / "criterion").glob("**/new/benchmark.json"):
        if json.loads(path.read_text())["full_id"] == prefix + unit:
            return json.loads((path.parent / "estimates.json").read_text())["median"]["point_estimate"] / 1e6
    return None


def bench(unit, target):
    unit = f"^({args.dtype}/)?{re.escape(unit)}$"
    command = ["cargo", "bench", "--quiet", "--workspace", "--bench", target, "--", unit]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(args.threads), "CXR_BENCH_DEVICE": "flex", "CXR_BENCH_DTYPE": args.dtype,
                   "CARGO_TARGET_DIR": str(args.target_dir.resolve())}
    subprocess.run(command, cwd=HERE.parent, env=environment, check=True, stdout=subprocess.DEVNULL)


def short(milliseconds):
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def processor():
    try:
        names = re.findall(r"model name\s*:\s*(.*)", pathlib.Path("/proc/cpuinfo").read_text())
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def main():
    chosen = [unit for unit in units() if re.search(args.filter, unit[0])]
    rows, last = [], None
    for unit, target, make in chosen:
        if target != last:
            models.clear()
            gc.collect()
            last = target
        if args.run:
            print(unit, file=sys.stderr)
            bench(unit, target)
        found = ours(unit)
        if found is None:
            print(f"{unit}: not measured; cargo bench -p cxr-benches --bench {target}", file=sys.stderr)
            continue
        expected = theirs(make)
        rows.append(f"| `{unit}` | {short(found)} | {short(expected)} | {found / expected:.2f} |")
    rust = subprocess.run(["rustc", "--version"], capture_output=True, text=True).stdout.split()[1]
    how = "unit by unit, ours and PyTorch's in turns" if args.run else "ours earlier, PyTorch's in one go after"
    print(f"{processor()}, {args.threads} threads; load {os.getloadavg()[0]:.1f} at the end. Rust {rust}, `flex`, {args.dtype}; "
          f"PyTorch {torch.__version__}, diffusers {diffusers.__version__}, PEFT {peft.__version__}, "
          f"transformers {transformers.__version__}, Python {platform.python_version()}, {args.dtype}. Medians, {how}.\n")
    print("| Unit | Ours, ms | PyTorch, ms | Ours / PyTorch |\n|---|---|---|---|")
    print("\n".join(rows))


main()
