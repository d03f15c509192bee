"""Hold every component against diffusers and transformers, at the size of any model folder.

usage: python parity.py --model DIR [--dtype f32|f16|bf16] [--device flex] [--program PATH]
Needs torch, diffusers, peft, transformers, safetensors from PyPI, and the example program `parity`:
    cargo build --release -p cxr-examples --example parity
Inputs are drawn with a seed. The reference always computes in f32. Prints one line for each comparison, the norm of
the difference over the norm of the reference, and fails if one is above its bar.
"""
import argparse, json, pathlib, subprocess, sys, tempfile
import peft, torch
from diffusers import (AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler,
                       PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel)
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

HERE = pathlib.Path(__file__).resolve().parent
ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--model", type=pathlib.Path, required=True)
ap.add_argument("--dtype", default="f32", choices=["f32", "f16", "bf16"])
ap.add_argument("--device", default="flex")
ap.add_argument("--program", default=str(HERE.parent / "target/release/examples/parity"))
ap.add_argument("--only", nargs="*", help="components, e.g. text unet train-step")
args = ap.parse_args()
# f32 by what is asked of the CPU, TF32 on a GPU; f16 and bf16 by their 11 and 8 bits
BAR = {"f32": 1e-4 if args.device == "flex" else 2e-3, "f16": 1e-2, "bf16": 2e-2}[args.dtype]
# gradients in bf16 pass through twice as many roundings: PyTorch's own worst is 8.5e-2 off
GRADIENT_BAR = {"bf16": 1e-1}.get(args.dtype, BAR)
torch.set_grad_enabled(False)
failed = []


def ours(component, inputs, *more):
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/in.safetensors", f"{folder}/out.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, source)
        subprocess.run([args.program, "--model", str(args.model), "--component", component, "--input", source,
                        "--output", target, "--device", args.device, "--dtype", args.dtype, "--quiet", *more],
                       check=True, stdout=subprocess.DEVNULL)
        return load_file(target)


def compare(what, found, expected, bar=BAR):
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    print(f"{what:34} {error:.1e}  bar {bar:.0e}{'' if error <= bar else '  FAILED'}", flush=True)
    if not error <= bar:
        failed.append(what)


def wanted(component):
    return not args.only or component in args.only


load = dict(torch_dtype=torch.float32)
draw = torch.Generator().manual_seed(0)
if wanted("text"):
    model = CLIPTextModel.from_pretrained(args.model / "text_encoder", **load)
    ids = torch.full((2, 77), 49407)
    ids[:, 0] = 49406
    ids[0, 1:12] = torch.randint(0, 49405, (11,), generator=draw)
    ids[1, 1:60] = torch.randint(0, 49405, (59,), generator=draw)
    context = model(ids).last_hidden_state
    compare("text, 2 prompts", ours("text", {"input_ids": ids})["last_hidden_state"], context)
    del model
if wanted("unet"):
    model = UNet2DConditionModel.from_pretrained(args.model / "unet", **load)
    context = torch.randn(2, 77, model.config.cross_attention_dim, generator=draw)
    for height, width in [(16, 16), (11, 14), (64, 64)]:
        sample = torch.randn(2, 4, height, width, generator=draw)
        timestep = torch.tensor([981.0, 20.5])
        expected = model(sample, timestep, context).sample
        found = ours("unet", {"sample": sample, "timestep": timestep, "context": context})["sample"]
        compare(f"unet, 2 x {8 * height} x {8 * width} pixels", found, expected)
    del model
if wanted("vae"):
    model = AutoencoderKL.from_pretrained(args.model / "vae", **load)
    for side in (128, 512):
        pixels = torch.rand(1, 3, side, side, generator=draw) * 2 - 1
        moments = model.encode(pixels).latent_dist
        found = ours("vae-encode", {"pixels": pixels})
        compare(f"vae-encode mean, {side} pixels", found["mean"], moments.mean)
        compare(f"vae-encode std, {side} pixels", found["std"], moments.std)
        latents = torch.randn(1, 4, side // 8, side // 8, generator=draw)
        expected = model.decode(latents).sample
        compare(f"vae-decode, {side} pixels", ours("vae-decode", {"latents": latents})["pixels"], expected)
    del model
if wanted("scheduler"):
    config = json.loads((args.model / "scheduler" / "scheduler_config.json").read_text())
    for name, cls in {"ddim": DDIMScheduler, "pndm": PNDMScheduler, "euler": EulerDiscreteScheduler,
                      "dpmpp-2m": DPMSolverMultistepScheduler}.items():
        scheduler = cls.from_config(config)
        scheduler.set_timesteps(30)
        start = torch.randn(1, 4, 16, 16, generator=draw)
        outputs = torch.randn(len(scheduler.timesteps), 1, 4, 16, 16, generator=draw)
        x, samples = start * scheduler.init_noise_sigma, []
        for t, output in zip(scheduler.timesteps, outputs):
            scheduler.scale_model_input(x, t)
            x = scheduler.step(output, t, x).prev_sample
            samples.append(x)
        found = ours("scheduler", {"sample": start, "model_outputs": outputs}, "--scheduler", name, "--steps", "30")
        compare(f"scheduler {name}, timesteps", found["timesteps"], scheduler.timesteps.float(), 1e-6)
        compare(f"scheduler {name}, 30 steps", found["samples"], torch.stack(samples), 1e-4)
if wanted("train-step"):
    unet = UNet2DConditionModel.from_pretrained(args.model / "unet", **load)
    width = unet.config.cross_attention_dim
    model = peft.get_peft_model(unet, peft.LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian",
                                                      target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at zero, A would have no gradient
            parameter.normal_(std=0.02, generator=draw)
    latents, noise = (torch.randn(2, 4, 16, 16, generator=draw) for _ in range(2))
    context, timestep = torch.randn(2, 77, width, generator=draw), torch.tensor([800, 37])
    config = json.loads((args.model / "scheduler" / "scheduler_config.json").read_text())
    noised = DDPMScheduler.from_config(config).add_noise(latents, noise, timestep)
    with torch.enable_grad():
        loss = torch.nn.functional.mse_loss(model(noised, timestep, context).sample, noise)
        loss.backward()
    with tempfile.TemporaryDirectory() as folder:
        state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
        found = ours("train-step", {"latents": latents, "noise": noise, "timestep": timestep, "context": context},
                     "--lora", f"{folder}/pytorch_lora_weights.safetensors")
    compare("train-step, loss", found.pop("loss").flatten(), loss.detach().flatten())
    expected = {"unet." + name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
                for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:4]
    worst = max(expected, key=lambda name: float((found[name] - expected[name]).norm() / expected[name].norm()))
    compare(f"train-step, worst of {len(expected)} gradients", found[worst], expected[worst], GRADIENT_BAR)
if wanted("train-run"):
    STEPS, RATE = 20, 5e-5
    unet = UNet2DConditionModel.from_pretrained(args.model / "unet", **load)
    width = unet.config.cross_attention_dim
    torch.manual_seed(0)  # of the adapter's first values
    model = peft.get_peft_model(unet, peft.LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian",
                                                      target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    config = json.loads((args.model / "scheduler" / "scheduler_config.json").read_text())
    scheduler = DDPMScheduler.from_config(config)
    latents, noise = (torch.randn(STEPS, 4, 4, 16, 16, generator=draw) for _ in range(2))
    context = torch.randn(STEPS, 4, 77, width, generator=draw)
    timestep = torch.randint(0, 1000, (STEPS, 4), generator=draw)

    def factors():
        return {"unet." + name.removeprefix("base_model.model.").replace(".default", ""): parameter
                for name, parameter in model.named_parameters() if parameter.requires_grad}

    start = {name: parameter.detach().clone() for name, parameter in factors().items()}
    with tempfile.TemporaryDirectory() as folder:
        state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
        found = ours("train-run", {"latents": latents, "noise": noise, "timestep": timestep, "context": context},
                     "--lora", f"{folder}/pytorch_lora_weights.safetensors", "--learning-rate", str(RATE))
    optimizer, losses = torch.optim.Adam(factors().values(), lr=RATE), []
    for step in range(STEPS):
        noised = scheduler.add_noise(latents[step], noise[step], timestep[step])
        with torch.enable_grad():
            loss = torch.nn.functional.mse_loss(model(noised, timestep[step], context[step]).sample, noise[step])
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    compare(f"train-run, losses of {STEPS} steps", found.pop("loss"), torch.stack(losses), 1e-3)
    expected = factors()
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:4]

    def change(values):
        return torch.cat([(values[name].detach() - start[name]).flatten() for name in sorted(start)])

    compare(f"train-run, change of the adapter in {STEPS} steps", change(found), change(expected), 1e-3)
sys.exit(f"above the bar: {', '.join(failed)}" if failed else 0)
