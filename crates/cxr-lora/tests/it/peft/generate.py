"""Makes the fixture of `parity.rs` with PEFT and diffusers.

    python generate.py        # writes beside this file

Two models. A toy model of the test's shape gets a LoRA adapter of PEFT's with random factors (B too, so that the adapter
matters), rank and alpha of one layer different from the rest. The files hold the base weights, the inputs, the
output with and without the adapter, the gradients of a fixed projection of the output, the factors after ten steps
of AdamW, and the adapter as PEFT and diffusers write it (also pickled). The other has convolutions, of one pixel and
of three with stride and padding. Small, so in f32.
"""

import pathlib
import shutil

import diffusers
import peft
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

HERE = pathlib.Path(__file__).parent
WIDTH, CONTEXT, TOKENS, BATCH = 8, 6, 5, 2


class Attention(nn.Module):
    def __init__(self, context):
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k = nn.Linear(context, WIDTH, bias=False)
        self.to_v = nn.Linear(context, WIDTH, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x, context):
        k = self.to_k(context).mean(1, keepdim=True)
        v = self.to_v(context).mean(1, keepdim=True)
        return x + self.to_out[0](nn.functional.silu(self.to_q(x) * k + v))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1 = Attention(WIDTH)
        self.attn2 = Attention(CONTEXT)

    def forward(self, x, context):
        return self.attn2(self.attn1(x, x), context)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, context):
        for block in self.blocks:
            x = block(x, context)
        return self.head(x)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in = nn.Conv2d(3, 4, 1)
        self.conv1 = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.proj_out = nn.Conv2d(5, 4, 1, bias=False)

    def forward(self, x):
        return self.proj_out(nn.functional.silu(self.conv1(nn.functional.silu(self.proj_in(x)))))


def plain(name):
    return name.removeprefix("base_model.model.").replace(".default.", ".")


def record(base, inputs, config, tensors):
    """Adapts `base` and adds to `tensors` what the tests compare; returns the adapted model and its adapter."""
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.5)
    tensors |= {f"base.{k}": v.clone() for k, v in base.state_dict().items()}
    tensors |= inputs
    output = base(*inputs.values())
    projection = torch.randn(output.shape)
    tensors |= {"projection": projection, "output.base": output}

    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    output = model(*inputs.values())
    tensors["output.adapted"] = output
    (output * projection).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            tensors[f"gradient.{plain(name)}"] = parameter.grad.clone()
    model.zero_grad()
    adapter = {plain(k): v.clone() for k, v in get_peft_model_state_dict(model).items()}
    return model, adapter


def train(model, inputs, tensors):
    """Ten steps towards the projection, with PyTorch's own AdamW."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=1e-2
    )
    for _ in range(10):
        optimizer.zero_grad()
        (model(*inputs.values()) - tensors["projection"]).square().mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            tensors[f"trained.{plain(name)}"] = parameter


def save(name, tensors):
    versions = {"torch": torch.__version__, "peft": peft.__version__, "diffusers": diffusers.__version__}
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, HERE / name, metadata=versions)


def write_adapters(layers, config, stem):
    settings = {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    StableDiffusionPipeline.save_lora_weights(
        HERE, unet_lora_layers=layers, unet_lora_adapter_metadata=settings, weight_name=f"{stem}.safetensors"
    )
    prefixed = {f"unet.{k}": v for k, v in layers.items()}
    kohya = {f"lora_{k}" if k.startswith("unet") else k: v for k, v in convert_state_dict_to_kohya(prefixed).items()}
    kohya = {k: v.contiguous() for k, v in kohya.items()}
    return kohya


def projections():
    torch.manual_seed(11)
    base, tensors = Toy(), {}
    inputs = {"x": torch.randn(BATCH, TOKENS, WIDTH), "context": torch.randn(BATCH, TOKENS - 1, CONTEXT)}
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        rank_pattern={"blocks.1.attn2.to_k": 2},
        alpha_pattern={"blocks.1.attn2.to_k": 1},
        init_lora_weights="gaussian",
    )
    model, layers = record(base, inputs, config, tensors)
    shutil.rmtree(HERE / "adapter", ignore_errors=True)
    model.save_pretrained(HERE / "adapter")
    (HERE / "adapter" / "README.md").unlink()
    kohya = write_adapters(layers, config, "diffusers")
    save_file(kohya, HERE / "kohya.safetensors")
    torch.save(kohya, HERE / "kohya.pt")
    StableDiffusionPipeline.save_lora_weights(
        HERE, unet_lora_layers=layers, weight_name="diffusers.bin", safe_serialization=False
    )
    train(model, inputs, tensors)
    save("fixture.safetensors", tensors)


def convolutions():
    torch.manual_seed(12)
    base, tensors = Convolutions(), {}
    inputs = {"x": torch.randn(BATCH, 3, 7, 6)}
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["proj_in", "conv1", "proj_out"], init_lora_weights="gaussian"
    )
    model, layers = record(base, inputs, config, tensors)
    kohya = write_adapters(layers, config, "convolutions")
    save_file(kohya, HERE / "convolutions_kohya.safetensors")
    train(model, inputs, tensors)
    save("convolutions_fixture.safetensors", tensors)


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    projections()
    convolutions()
