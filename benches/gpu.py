"""Parity and times on a GPU machine, in one call of under ten minutes, beside diffusers on PyTorch on the same card.

usage: python gpu.py --bin DIR [--out FILE] [--device cuda:0] [--seconds 570] [--units REGEX] [--no-compile] [--ours]

DIR holds binaries built elsewhere (docs/performance.md has the commands): `gpu`, and `backends` for the parity test.
The machine needs its driver, NVRTC with CUDA's headers (CUDA_PATH), Python with torch and diffusers; no registry, no
weights. What torch lacks (peft, transformers) is not needed. Where diffusers is not installed and there is no registry, carry its
wheels (`pip download diffusers`, there `pip install --no-index --find-links DIR diffusers`), or leave PyTorch out by --ours.

Prints the parity test's errors and one markdown table, ours and PyTorch's unit by unit in turns, with the peak of the
card's memory of each process. Kernels are compiled at their first run, and kept. Built with the feature autotune, burn first
tunes them, for minutes: what is not done in time is named, and a second call goes on with what was kept. PyTorch has SDPA
and channels-first layout as diffusers sets them; f32 with TF32 allowed, as burn runs it.
"""
import argparse, gc, importlib.util, os, pathlib, re, statistics, subprocess, sys, tempfile, threading, time
import torch

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--bin", type=pathlib.Path, required=True)
ap.add_argument("--out", type=pathlib.Path)
ap.add_argument("--device", default="cuda:0")
ap.add_argument("--seconds", type=float, default=570, help="units that would begin later are left out, and named")
ap.add_argument("--units", default="", help="units whose name has this regular expression in it")
ap.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
ap.add_argument("--no-parity", action="store_true")
ap.add_argument("--ours", action="store_true", help="leave PyTorch's side out")
ap.add_argument("--warm", type=float, default=90, help="seconds for compiling the kernels of all units, at once; 0: each compiles in its own turn")
ap.add_argument("--theirs", help=argparse.SUPPRESS)
args = ap.parse_args()
missing = [name for name in ("gpu", "backends") if not (args.bin / name).exists() and not (name == "backends" and args.no_parity)]
if missing:
    ap.error(f"--bin {args.bin}: no {' and no '.join(missing)} there; docs/performance.md says how to build them")
if not args.ours and importlib.util.find_spec("diffusers") is None:
    ap.error("diffusers is not installed here, which PyTorch's side needs: install it, or leave that side out by --ours")
BEGUN = time.time()
os.environ.setdefault("CUBECL_AUTOTUNE_LEVEL", "minimal")  # fewer sizes are told apart: minutes less to tune
STEPS, GUIDED_TFLOP = 20, 1.36
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


# ---- PyTorch's side: a process for each unit, as ours has ----

def unet(dtype):
    from diffusers import UNet2DConditionModel
    with torch.device("cuda"):
        return UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768,
            attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3).to(dtype)


def vae(dtype):
    from diffusers import AutoencoderKL
    with torch.device("cuda"):
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4).to(dtype)


def timed(work, runs):
    def once():
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    first = once()
    once(), once()
    return statistics.median(once() for _ in range(runs)), first


def step(dtype, batch, compiled):
    network = unet(dtype).eval()
    rows = 2 * batch
    x, hidden = torch.randn(rows, 4, 64, 64, device="cuda", dtype=dtype), torch.randn(rows, 77, 768, device="cuda", dtype=dtype)
    at = torch.full((rows,), 981.0, device="cuda")
    call = torch.compile(network) if compiled else network
    with torch.no_grad():
        seconds, first = timed(lambda: call(x, at, hidden, return_dict=False)[0], 20)
    return 1e3 * seconds, first


def pictures(dtype, batch):
    """The pipeline's loop of diffusers without the text encoder (two rows of 77 tokens: below a thousandth)."""
    from diffusers import DPMSolverMultistepScheduler
    network, decoder = unet(dtype).eval(), vae(dtype).eval()
    hidden = torch.randn(2 * batch, 77, 768, device="cuda", dtype=dtype)

    def work():
        scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
        scheduler.set_timesteps(STEPS, device="cuda")
        x = torch.randn(batch, 4, 64, 64, device="cuda", dtype=dtype)
        for t in scheduler.timesteps:
            without, with_text = network(torch.cat([x] * 2), t, hidden, return_dict=False)[0].chunk(2)
            x = scheduler.step(without + 7.5 * (with_text - without), t, x, return_dict=False)[0]
        image = decoder.decode(x / 0.18215, return_dict=False)[0]
        return ((image.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    with torch.no_grad():
        seconds, first = timed(work, 3)
    return 60 * batch / seconds, first


class Adapted(torch.nn.Module):
    """A frozen projection with a LoRA adapter in f32 of rank 8, as PEFT computes it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 8, bias=False, device="cuda", dtype=torch.float32)
        self.up = torch.nn.Linear(8, base.out_features, bias=False, device="cuda", dtype=torch.float32)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, x, *rest, **named):
        return self.base(x) + self.up(self.down(x.float())).to(x.dtype)


def training(preset):
    pixels, batch, passes, dtype = {"paper_128": (128, 4, 1, torch.float32), "clinical_512": (512, 2, 8, torch.bfloat16)}[preset]
    network = unet(dtype).requires_grad_(False)
    for module in list(network.modules()):
        for name in ("to_q", "to_k", "to_v"):
            if isinstance(getattr(module, name, None), torch.nn.Linear):
                setattr(module, name, Adapted(getattr(module, name)))
        if isinstance(getattr(module, "to_out", None), torch.nn.ModuleList):
            module.to_out[0] = Adapted(module.to_out[0])
    learns = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=5e-5)
    x = torch.randn(batch, 4, pixels // 8, pixels // 8, device="cuda")
    hidden = torch.randn(batch, 77, 768, device="cuda", dtype=dtype)

    def work():
        for _ in range(passes):
            at = torch.randint(0, 1000, (batch,), device="cuda")
            noise = torch.randn_like(x)
            predicted = network((x + noise).to(dtype), at, hidden, return_dict=False)[0].float()
            (torch.nn.functional.mse_loss(predicted, noise) / passes).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds, first = timed(work, 7)
    return 1e3 * seconds, first


def theirs(name):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    kind, dtype, batch, compiled = name.split()
    if kind == "step":
        value, first = step(DTYPES[dtype], int(batch), compiled == "1")
    elif kind == "pictures":
        value, first = pictures(DTYPES[dtype], int(batch))
    else:
        value, first = training(kind.removeprefix("train-"))
    print(f"{value:.4f}\t-\t-\t{first:.2f}")


# ---- the table ----

class Memory(threading.Thread):
    """The largest memory in use on the card while a unit runs, less what was in use before."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before, self.peak, self.over = used(), 0, threading.Event()

    def run(self):
        while not self.over.wait(0.05):
            self.peak = max(self.peak, used())

    def close(self):
        self.over.set()
        self.join()
        return max(0, self.peak - self.before) / 1e9


def used():
    import pynvml
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used


def kept_kernels(name):
    """A cache of a unit's own: units may compile at once without waiting for each other."""
    return {**os.environ, "XDG_CACHE_HOME": str(pathlib.Path(tempfile.gettempdir()) / "cxr-kernels" / name.replace(" ", "-"))}


def ours(name):
    return [args.bin / "gpu", args.device, *name.split()]


def measure(command, timeout, env=None):
    """The last line's fields, and the peak of memory; None and the reason if it failed."""
    memory = Memory()
    memory.start()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(10, timeout), env=env)
    except subprocess.TimeoutExpired:
        return None, f"not done after {timeout:.0f} s", memory.close()
    peak = memory.close()
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        print(done.stderr[-1500:], file=sys.stderr)
        return None, "failed: " + (done.stderr.strip().splitlines() or ["?"])[-1][:100], peak
    value, _, _, first = lines[-1].split("\t")
    return (float(value), float(first)), "", peak


def rate():
    """What the card multiplies, in TFLOP/s, bf16: the floor of a step is its work over this."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds, _ = timed(lambda: a @ b, 20)
    return 2 * 8192 ** 3 / seconds / 1e12


def parity():
    """The parity test, every test of it in a process of its own at once: their time is that of compiling kernels."""
    tests = subprocess.run([args.bin / "backends", "--list"], capture_output=True, text=True).stdout
    names = [line.removesuffix(": test") for line in tests.splitlines() if line.endswith(": test")]
    began = time.time()
    running = {name: subprocess.Popen([args.bin / "backends", "--nocapture", "--exact", name], stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, text=True) for name in names}
    found = []
    for name, process in running.items():
        try:
            text = process.communicate(timeout=max(1, 150 - (time.time() - began)))[0]
            found.append(f"{text.strip()}\nexit code {process.returncode}: {name}")
        except subprocess.TimeoutExpired:
            process.kill()
            found.append(f"not done after 150 s: {name}")
    return "\n".join(found) + f"\n{time.time() - began:.0f} s"


def main():
    left = lambda: args.seconds - (time.time() - BEGUN)
    lines = [f"{torch.cuda.get_device_name()}, driver {subprocess.run(['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'], capture_output=True, text=True).stdout.strip()}, PyTorch {torch.__version__}"]
    matrix = rate()
    gc.collect()
    torch.cuda.empty_cache()
    lines.append(f"bf16 matrix products: {matrix:.0f} TFLOP/s; a guided step of 512 px cannot be below {1e3 * GUIDED_TFLOP / matrix:.2f} ms")
    print("\n".join(lines), flush=True)
    units = [("step", "bf16", 1, False), ("step", "f32", 1, False), ("train-paper_128", "f32", 1, False),
             ("pictures", "bf16", 1, False), ("pictures", "bf16", 4, False), ("train-clinical_512", "bf16", 1, False)]
    units += [] if args.no_compile or args.ours else [("step", "bf16", 1, True)]
    units += [("step", "f16", 1, False), ("step", "bf16", 4, False), ("pictures", "bf16", 16, False),
              ("step", "bf16", 16, False)]
    names = dict.fromkeys(f"{kind} {dtype} {batch}" for kind, dtype, batch, _ in units)
    names = [name for name in names if re.search(args.units, name)]
    # Compiling takes most of a first run and one core: all units do it at once, those alone that have room beside each other.
    began = time.time()
    warming = [subprocess.Popen(ours(name), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=kept_kernels(name))
               for name in names if args.warm and int(name.split()[2]) <= 4]
    if not args.no_parity:
        text = parity()
        print(text, flush=True)
        lines.append(f"parity:\n\n```\n{text}\n```")
    for process in warming:
        try:
            process.wait(max(1, args.warm - (time.time() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
    lines.append("| Unit | dtype | Pictures | Ours | PyTorch | Ours / PyTorch | Peak, GB | PyTorch's | First run, s |\n|---|---|---|---|---|---|---|---|---|")
    kept = {}
    for unit in units:
        kind, dtype, batch, compiled = unit
        name = f"{kind} {dtype} {batch}"
        if not re.search(args.units, name):
            continue
        if left() < 25:
            lines.append(f"| {kind} | {dtype} | {batch} | no time left | | | | | |")
            continue
        if name not in kept:
            kept[name] = measure(ours(name), min(left(), 90), kept_kernels(name))
        mine, why, peak = kept[name]
        other, why_not, their_peak = (None, "", 0.0) if args.ours else measure([sys.executable, __file__, "--bin", args.bin, "--theirs", f"{name} {int(compiled)}"], min(left(), 90))
        rate_of = lambda pair, why: why if pair is None else f"{pair[0]:.1f}"
        ratio = "" if None in (mine, other) else f"{(other[0] / mine[0] if kind == 'pictures' else mine[0] / other[0]):.2f}"
        unit_name = {"step": "guided step, ms", "pictures": "pictures a minute"}.get(kind, kind + ", ms")
        row = (f"| {unit_name}{' (PyTorch compiled)' if compiled else ''} | {dtype} | {batch} | {rate_of(mine, why)} | "
               f"{rate_of(other, why_not)} | {ratio} | {peak:.1f} | {their_peak:.1f} | {mine[1] if mine else ''} |")
        lines.append(row)
        print(row, f"({time.time() - BEGUN:.0f} s)", flush=True)
        if args.out:
            args.out.write_text("\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:]) + "\n")


theirs(args.theirs) if args.theirs else main()
