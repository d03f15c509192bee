//! The autoencoder over large pictures: tile by tile, each blended into its neighbours, as diffusers'
//! `enable_vae_tiling` does it. Memory then grows with a tile instead of the picture; the result differs a little
//! from that of the whole, since a tile's norms and attention see that tile alone.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use cxr_kernels::DiffusionBackend;

use super::{AutoencoderKl, AutoencoderKlConfig, Moments};

/// The part of a tile that overlaps the next; diffusers' `tile_overlap_factor`.
const OVERLAP: f64 = 0.25;

/// The sizes of tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// Side of a tile in pixels.
    pixels: usize,
    /// Side of a tile in latents.
    latents: usize,
}

/// One direction: what goes in, in tiles, and what comes out of them.
struct Sides {
    input: usize,
    output: usize,
}

impl Tiling {
    /// Tiles of the size that the autoencoder was made for: 512 pixels for Stable Diffusion.
    pub fn new(config: &AutoencoderKlConfig) -> Self {
        Self { pixels: config.sample_size, latents: (config.sample_size / config.factor()).max(1) }
    }

    /// As [`AutoencoderKl::decode`]; a picture that is no larger than a tile is decoded whole.
    ///
    /// # Panics
    /// As [`AutoencoderKl::decode`].
    pub fn decode<B: DiffusionBackend>(&self, vae: &AutoencoderKl<B>, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        let sides = Sides { input: self.latents, output: self.pixels };
        sides.run(latents, |tile| vae.decode(tile))
    }

    /// As [`AutoencoderKl::encode`]; a picture that is no larger than a tile is encoded whole.
    ///
    /// # Panics
    /// As [`AutoencoderKl::encode`].
    pub fn encode<B: DiffusionBackend>(&self, vae: &AutoencoderKl<B>, pixels: Tensor<B, 4>) -> Moments<B> {
        let sides = Sides { input: self.pixels, output: self.latents };
        Moments::of(sides.run(pixels, |tile| vae.moments(tile)))
    }
}

impl Sides {
    /// Shares of the side of an output tile: what blends, and what is kept.
    fn extents(&self) -> (usize, usize) {
        let blend = (self.output as f64 * OVERLAP) as usize;
        (blend, self.output - blend)
    }

    fn run<B: Backend>(
        &self,
        x: Tensor<B, 4>,
        network: impl Fn(Tensor<B, 4>) -> Tensor<B, 4>,
    ) -> Tensor<B, 4> {
        let [n, c, height, width] = x.dims();
        if height <= self.input && width <= self.input {
            return network(x);
        }
        let stride = ((self.input as f64 * (1.0 - OVERLAP)) as usize).max(1);
        let (blend, keep) = self.extents();
        let mut above: Vec<Tensor<B, 4>> = Vec::new();
        let mut bands = Vec::new();
        for top in (0..height).step_by(stride) {
            let mut row: Vec<Tensor<B, 4>> = Vec::new();
            for (column, left) in (0..width).step_by(stride).enumerate() {
                let (bottom, right) = ((top + self.input).min(height), (left + self.input).min(width));
                let mut tile = network(x.clone().slice([0..n, 0..c, top..bottom, left..right]));
                if let Some(upper) = above.get(column) {
                    tile = blended(upper, tile, blend, 2);
                }
                if let Some(before) = row.last() {
                    tile = blended(before, tile, blend, 3);
                }
                row.push(tile);
            }
            let kept = row.iter().map(|tile| {
                let [n, c, h, w] = tile.dims();
                tile.clone().slice([0..n, 0..c, 0..keep.min(h), 0..keep.min(w)])
            });
            bands.push(Tensor::cat(kept.collect(), 3));
            above = row;
        }
        Tensor::cat(bands, 2)
    }
}

/// `tile` with its first `extent` lines along `axis` faded in over the last of `before`.
fn blended<B: Backend>(
    before: &Tensor<B, 4>,
    tile: Tensor<B, 4>,
    extent: usize,
    axis: usize,
) -> Tensor<B, 4> {
    let (last, size) = (before.dims()[axis], tile.dims()[axis]);
    let extent = extent.min(last).min(size);
    if extent == 0 {
        return tile;
    }
    let mut shape = [1; 4];
    shape[axis] = extent;
    let ramp: Vec<f32> = (0..extent).map(|i| i as f32 / extent as f32).collect();
    let ramp = Tensor::<B, 4>::from_data(TensorData::new(ramp, shape), (&tile.device(), tile.dtype()));
    let old = before.clone().narrow(axis, last - extent, extent);
    let new = tile.clone().narrow(axis, 0, extent);
    // the other axis may be shorter at the picture's edge, never longer
    let faded = old.clone() + (new - old) * ramp;
    if extent == size {
        return faded;
    }
    Tensor::cat(vec![faded, tile.narrow(axis, extent, size - extent)], axis)
}
