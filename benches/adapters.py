"""Hold adapter files against PEFT and diffusers, both ways, at the size of any model folder.

usage: python adapters.py --model DIR [--old FILE] [--programs DIR]
Needs torch, diffusers, peft, transformers, safetensors from PyPI, and the example programs `parity` and `lora`:
    cargo build --release -p cxr-examples --example parity --example lora

PEFT makes adapters with random factors on the model's UNet and text encoder. What diffusers, PEFT and diffusers'
converter to kohya's format write of them is read here; what is written here of that, and the model with an adapter
merged in, is read there; the UNet's prediction has to be the same. `--old` is a file of diffusers' attention
processors. Prints one line for each comparison, the norm of the difference over the norm of the reference, and fails
if one is above its bar.
"""
import argparse, pathlib, subprocess, sys, tempfile
import peft, torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya, logging
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent
ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--model", type=pathlib.Path, required=True)
ap.add_argument("--old", type=pathlib.Path)
ap.add_argument("--programs", type=pathlib.Path, default=HERE.parent / "target/release/examples")
args = ap.parse_args()
BAR = 1e-4
torch.set_grad_enabled(False)
logging.disable_progress_bar()
work = pathlib.Path(tempfile.mkdtemp())
failed = []

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TRANSFORMER = ATTENTION + ["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
EVERYTHING = TRANSFORMER + ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv",
                            "upsamplers.0.conv", "conv_in", "conv_out", "linear_1", "linear_2"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def compare(what, found, expected, bar=BAR):
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    print(f"{what:62} {error:.1e}  bar {bar:.0e}{'' if error <= bar else '  FAILED'}", flush=True)
    if not error <= bar:
        failed.append(what)


def ours(component, inputs, lora):
    source, target = work / "in.safetensors", work / "out.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, source)
    subprocess.run([args.programs / "parity", "--model", args.model, "--component", component, "--input", source,
                    "--output", target, "--lora", lora, "--device", "flex", "--quiet"],
                   check=True, stdout=subprocess.DEVNULL)
    return load_file(target)["sample" if component == "unet" else "last_hidden_state"]


def lora(*arguments):
    subprocess.run([args.programs / "lora", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


draw = torch.Generator().manual_seed(0)
inputs = {"sample": torch.randn(2, 4, 16, 16, generator=draw), "timestep": torch.tensor([981, 21]),
          "context": torch.randn(2, 77, 768, generator=draw)}
ids = torch.randint(0, 49405, (2, 77), generator=draw)


def predict(unet):
    return unet(inputs["sample"], inputs["timestep"], inputs["context"]).sample


def pipeline():
    return StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32, safety_checker=None)


def adapt(model, targets, rank, alpha, seed):
    """A PEFT model with random factors, its adapter, and its settings."""
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # A is uniform with deviation about 1 / sqrt(in), so this changes each layer by some percents
            torch.nn.init.normal_(parameter, std=0.02)
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    return model, state, {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}


def loaded(file):
    """The UNet's prediction and the text's embedding with an adapter that diffusers loads."""
    pipe = pipeline()
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    return predict(pipe.unet), pipe.text_encoder(ids).last_hidden_state


base = predict(pipeline().unet)
for name, targets, rank, alpha in [("attention", ATTENTION, 8, 16), ("transformer", TRANSFORMER, 4, 4),
                                   ("everything", EVERYTHING, 4, 4)]:
    folder = work / name
    folder.mkdir()
    pipe = pipeline()
    unet, unet_state, unet_settings = adapt(pipe.unet, targets, rank, alpha, 1)
    text, text_state, text_settings = adapt(pipe.text_encoder, TEXT, rank, alpha, 2)
    expected, embedding = predict(unet), text(ids).last_hidden_state
    print(f"{name}: {len(unet_state) // 2} + {len(text_state) // 2} modules, which change the prediction by "
          f"{float((expected - base).norm() / base.norm()):.2f}", flush=True)
    unet.save_pretrained(folder / "peft")
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=unet_state, text_encoder_lora_layers=text_state, weight_name="theirs.safetensors",
        unet_lora_adapter_metadata=unet_settings, text_encoder_lora_adapter_metadata=text_settings)

    # theirs, read here
    compare(f"{name}: diffusers' file, UNet", ours("unet", inputs, folder / "theirs.safetensors"), expected)
    compare(f"{name}: diffusers' file, text", ours("text", {"input_ids": ids}, folder / "theirs.safetensors"), embedding)
    compare(f"{name}: PEFT's folder, UNet", ours("unet", inputs, folder / "peft"), expected)
    if rank == alpha:  # their converter writes the rank as alpha
        kohya = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in unet_state.items()})
        kohya = {k if k.startswith("lora_") else f"lora_{k}": v.contiguous() for k, v in kohya.items()}
        save_file(kohya, folder / "kohya.safetensors")
        compare(f"{name}: diffusers' kohya file, UNet", ours("unet", inputs, folder / "kohya.safetensors"), expected)

    # ours, read there: through every format and back to the first
    lora("convert", folder / "theirs.safetensors", folder / "ours_kohya.safetensors", "--to", "kohya")
    lora("convert", folder / "ours_kohya.safetensors", folder / "ours.safetensors", "--to", "diffusers")
    lora("convert", folder / "peft", folder / "ours_peft", "--to", "peft")
    for file in ["ours.safetensors", "ours_kohya.safetensors"]:
        try:
            of_unet, of_text = loaded(folder / file)
        except Exception as error:
            # diffusers itself may not read a kind of layer back, not even from its own file
            print(f"{name}: {file} in diffusers: {type(error).__name__}: {str(error)[:100]}")
            failed.append(f"{name}: {file}")
            continue
        compare(f"{name}: {file} in diffusers, UNet", of_unet, expected)
        compare(f"{name}: {file} in diffusers, text", of_text, embedding)
    again = peft.PeftModel.from_pretrained(pipeline().unet, folder / "ours_peft")
    compare(f"{name}: ours_peft in PEFT, UNet", predict(again), expected)

    # merged
    lora("merge", "--model", args.model, "--lora", folder / "theirs.safetensors", "--out", work / "merged", "--quiet",
         "--device", "flex")
    merged = StableDiffusionPipeline.from_pretrained(work / "merged", torch_dtype=torch.float32)
    compare(f"{name}: merged, in diffusers, UNet", predict(merged.unet), expected)
    compare(f"{name}: merged, in diffusers, text", merged.text_encoder(ids).last_hidden_state, embedding)
    assert merged.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]

if args.old:
    lora("convert", args.old, work / "old.safetensors", "--to", "diffusers")
    found, _ = loaded(work / "old.safetensors")
    compare("attention processors", ours("unet", inputs, args.old), found)
    print(f"which change the prediction by {float((found - base).norm() / base.norm()):.2f}")

if failed:
    sys.exit(f"{len(failed)} failed: {', '.join(failed)}")
