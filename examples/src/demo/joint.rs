//! Text encoder and UNet learning together.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use cxr::kernels::DiffusionBackend;
use cxr::ldm::text::ClipTextModel;
use cxr::ldm::unet::{Context, UNet2dCondition};
use cxr::trainer::Denoise;

/// What training from scratch trains.
#[derive(Module, Debug)]
pub struct TextToLatent<B: Backend> {
    /// Prompt to context.
    pub text_encoder: ClipTextModel<B>,
    /// Noised latents and context to noise.
    pub unet: UNet2dCondition<B>,
}

impl<B: DiffusionBackend> Denoise<B> for TextToLatent<B> {
    /// Token ids of the prompt.
    type Condition = Arc<Vec<i64>>;

    fn denoise(
        &self,
        latents: Tensor<B, 4>,
        timesteps: Tensor<B, 1>,
        conditions: &[&Self::Condition],
    ) -> Tensor<B, 4> {
        let length = conditions.first().map_or(0, |ids| ids.len());
        let ids: Vec<i64> = conditions.iter().flat_map(|ids| ids.iter().copied()).collect();
        let ids = TensorData::new(ids, [conditions.len(), length]);
        let ids = Tensor::<B, 2, Int>::from_data(ids, &latents.device());
        let hidden = self.text_encoder.forward(ids);
        self.unet.forward(latents, timesteps, &Context::new(hidden))
    }
}
