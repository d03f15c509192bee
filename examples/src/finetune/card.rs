//! The card beside an adapter: what it is, what it was made from, and what it is for.

use cxr::lora::Provenance;
use cxr::trainer::checkpoint::Best;

pub(super) struct Card<'a> {
    /// The base model as it was asked for.
    pub(super) model: &'a str,
    pub(super) provenance: &'a Provenance,
    /// All settings, as TOML.
    pub(super) settings: &'a str,
    /// Pairs that were trained on.
    pub(super) pairs: usize,
    pub(super) layers: usize,
    pub(super) trainable: usize,
    /// Smoothed loss at the end.
    pub(super) loss: f64,
    /// The step with the lowest validation loss.
    pub(super) best: Option<Best>,
    /// Pairs of the validation.
    pub(super) held_out: usize,
    /// The last grid of pictures, beside the card, and its prompts.
    pub(super) samples: Option<(String, &'a [String])>,
}

impl Card<'_> {
    pub(super) fn text(&self) -> String {
        let Self { model, provenance, settings, pairs, layers, trainable, loss, held_out, .. } = self;
        let of = |value: &Option<String>| value.clone().unwrap_or_else(|| "unknown".to_owned());
        let steps = provenance.steps.map_or_else(|| "unknown".to_owned(), |steps| steps.to_string());
        let best = self.best.map_or_else(String::new, |Best { step, loss }| {
            format!(
                "\n| Lowest validation loss | {loss:.4} at step {step}, on {held_out} pairs that are not trained on; \
                 `adapter_best.safetensors` is the adapter of that step |"
            )
        });
        let samples = self.samples.as_ref().map_or_else(String::new, |(file, prompts)| {
            let list: Vec<String> = prompts.iter().map(|prompt| format!("1. {prompt}")).collect();
            format!(
                "\n## Samples\n\n![samples]({file})\n\nFrom left to right, top to bottom:\n\n{}\n",
                list.join("\n")
            )
        });
        format!(
            "# A LoRA adapter for synthetic chest radiographs

For research. Not for diagnosis, nor for anything that is used on patients: a picture that is made with it shows what a
model makes of a sentence, and is no evidence of what a disease looks like.

`adapter.safetensors` is in diffusers' format; `pipe.load_lora_weights` and this project's `synthesize --lora` load it.

| | |
|---|---|
| Base model | {model}; its licence holds for what is made with it (Stable Diffusion 1.x: CreativeML OpenRAIL-M) |
| SHA-256 of the base's weights | {} |
| Trained on | {pairs} pairs |
| SHA-256 of the list of data | {} |
| SHA-256 of the split | {} |
| Optimizer steps | {steps} |
| Layers with an adapter | {layers}, {trainable} parameters |
| Smoothed loss at the end | {loss:.4} |{best}

![loss](loss.png)
{samples}
## Settings

```toml
{}
```
",
            of(&provenance.base_model),
            of(&provenance.dataset),
            of(&provenance.split),
            settings.trim()
        )
    }
}
