//! What to generate.

use std::sync::Arc;

use cxr_core::hash::sha256_hex;

use crate::Error;
use crate::scheduler::Sampler;

/// Prompts and how to make pictures of them.
///
/// | Setting | Default | Range |
/// |---|---|---|
/// | negative prompt | empty | any text |
/// | images per prompt | 1 | 1 or more |
/// | seed | 0 | picture `i` has `seed + i`, unless `seeds` names one for each |
/// | steps | 30 | 1 to the training timesteps |
/// | guidance | 7.5 | any finite number; 1 leaves the unconditional half out |
/// | guidance interval | all noise levels | two noise levels, the lower first |
/// | sampler | the model's own | |
/// | size | the initial image's, else the model's own | multiples of [`StableDiffusion::size_unit`] |
/// | initial image | none | strength above 0 to 1 |
/// | batch | 1 | 1 or more: memory and speed, never the picture |
/// | VAE slicing | off | memory and speed, never the picture |
/// | VAE tiling | off | memory; changes large pictures a little |
///
/// [`StableDiffusion::size_unit`]: super::StableDiffusion::size_unit
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Request {
    /// What the pictures show. Never empty.
    pub prompts: Vec<String>,
    /// What they do not show: takes the place of the empty prompt in guidance.
    pub negative_prompt: String,
    /// Pictures of each prompt; they follow each other, as in diffusers.
    pub images_per_prompt: usize,
    /// The first picture's seed; the next have the next seeds.
    pub seed: u64,
    /// A seed for every picture, in the place of `seed`.
    pub seeds: Option<Vec<u64>>,
    /// Denoising steps: quality saturates at 20 to 30 with DPM-Solver++, at about 50 with DDIM and PNDM.
    pub steps: usize,
    /// Classifier-free guidance `g`: `unconditional + g (conditional - unconditional)`.
    pub guidance: f64,
    /// Noise levels `sigma = sqrt((1 - alpha_bar) / alpha_bar)` between which guidance applies (Kynkäänniemi et al.
    /// 2024); outside of them the conditional half stands alone, at half the cost.
    ///
    /// Stable Diffusion's levels run from 0.03 to 14.6. Guidance at high levels costs variety, at low ones it does
    /// nothing: 0.3 to 5 is a good start.
    pub guidance_interval: Option<(f64, f64)>,
    /// The sampler; `None` for the one that the model's `scheduler_config.json` names.
    pub sampler: Option<Sampler>,
    /// Width and height in pixels; `None` for the initial image's, or else the size that the model was made for.
    pub size: Option<(usize, usize)>,
    /// A picture to start from instead of noise alone.
    pub initial: Option<InitialImage>,
    /// How many pictures go through the networks at once.
    pub batch: usize,
    /// Whether the autoencoder takes one picture at a time, whatever the batch.
    pub vae_slicing: bool,
    /// Whether the autoencoder goes over large pictures in overlapping tiles of the size that it was made for.
    pub vae_tiling: bool,
    /// Whether a prompt that is too long is an error instead of being cut with a warning.
    pub strict_prompt: bool,
}

/// The picture that image-to-image starts from (Meng et al. 2022, SDEdit).
#[derive(Debug, Clone, PartialEq)]
pub struct InitialImage {
    width: usize,
    height: usize,
    rgb: Arc<[u8]>,
    strength: f64,
}

impl InitialImage {
    /// `rgb` has `height * width * 3` values, rows from the top. `strength`, above 0 to 1, is the part of the steps
    /// that are made: 1 keeps next to nothing of the picture.
    ///
    /// # Errors
    /// [`Error::Request`] if the values are not as many, or the strength is out of range.
    pub fn new(width: usize, height: usize, rgb: Vec<u8>, strength: f64) -> Result<Self, Error> {
        let wrong = |setting: &str, found: String, expected: String| {
            Err(Error::Request { setting: setting.into(), found, expected })
        };
        if width * height * 3 != rgb.len() {
            let expected = format!("{width} x {height} x 3");
            return wrong("initial image", format!("{} values", rgb.len()), expected);
        }
        if !(strength > 0.0 && strength <= 1.0) {
            return wrong("strength", strength.to_string(), "above 0, to 1".into());
        }
        Ok(Self { width, height, rgb: rgb.into(), strength })
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The part of the steps that are made.
    pub fn strength(&self) -> f64 {
        self.strength
    }

    /// SHA-256 of size and pixels, in hex.
    pub fn sha256(&self) -> String {
        let mut bytes = format!("{}x{}:", self.width, self.height).into_bytes();
        bytes.extend_from_slice(&self.rgb);
        sha256_hex(&bytes)
    }

    /// Pixels in [-1, 1] as `[3, height, width]`.
    pub(crate) fn planes(&self) -> Vec<f32> {
        let value = |c: usize| self.rgb.iter().skip(c).step_by(3).map(|&byte| f32::from(byte) / 127.5 - 1.0);
        [0, 1, 2].into_iter().flat_map(value).collect()
    }
}

impl Request {
    /// One picture of `prompt` with the default settings.
    pub fn new(prompt: impl Into<String>) -> Self {
        Self {
            prompts: vec![prompt.into()],
            negative_prompt: String::new(),
            images_per_prompt: 1,
            seed: 0,
            seeds: None,
            steps: 30,
            guidance: 7.5,
            guidance_interval: None,
            sampler: None,
            size: None,
            initial: None,
            batch: 1,
            vae_slicing: false,
            vae_tiling: false,
            strict_prompt: false,
        }
    }

    /// One picture of each prompt with the default settings.
    pub fn each<P: Into<String>>(prompts: impl IntoIterator<Item = P>) -> Self {
        Self { prompts: prompts.into_iter().map(Into::into).collect(), ..Self::new("") }
    }

    /// The number of pictures.
    pub fn count(&self) -> usize {
        self.prompts.len() * self.images_per_prompt
    }

    /// The prompt of picture `index`.
    pub(crate) fn prompt(&self, index: usize) -> &str {
        &self.prompts[index / self.images_per_prompt]
    }

    /// The seed of picture `index`.
    pub(crate) fn seed_of(&self, index: usize) -> u64 {
        match &self.seeds {
            Some(seeds) => seeds[index],
            None => self.seed.wrapping_add(index as u64),
        }
    }

    /// Sets the negative prompt.
    pub fn negative(self, prompt: impl Into<String>) -> Self {
        Self { negative_prompt: prompt.into(), ..self }
    }

    /// Sets how many pictures are made of each prompt.
    pub fn images_per_prompt(self, images_per_prompt: usize) -> Self {
        Self { images_per_prompt, ..self }
    }

    /// Sets the first picture's seed.
    pub fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Sets the seed of every picture.
    pub fn seeds(self, seeds: impl IntoIterator<Item = u64>) -> Self {
        Self { seeds: Some(seeds.into_iter().collect()), ..self }
    }

    /// Sets the number of denoising steps.
    pub fn steps(self, steps: usize) -> Self {
        Self { steps, ..self }
    }

    /// Sets the guidance.
    pub fn guidance(self, guidance: f64) -> Self {
        Self { guidance, ..self }
    }

    /// Sets the noise levels, the lower first, between which guidance applies.
    pub fn guidance_interval(self, low: f64, high: f64) -> Self {
        Self { guidance_interval: Some((low, high)), ..self }
    }

    /// Sets the sampler.
    pub fn sampler(self, sampler: Sampler) -> Self {
        Self { sampler: Some(sampler), ..self }
    }

    /// Sets width and height in pixels.
    pub fn size(self, width: usize, height: usize) -> Self {
        Self { size: Some((width, height)), ..self }
    }

    /// Starts from a picture.
    pub fn initial(self, image: InitialImage) -> Self {
        Self { initial: Some(image), ..self }
    }

    /// Sets how many pictures go through the networks at once.
    pub fn batch(self, batch: usize) -> Self {
        Self { batch, ..self }
    }

    /// Makes the autoencoder take one picture at a time.
    pub fn vae_slicing(self, vae_slicing: bool) -> Self {
        Self { vae_slicing, ..self }
    }

    /// Makes the autoencoder go over large pictures in tiles.
    pub fn vae_tiling(self, vae_tiling: bool) -> Self {
        Self { vae_tiling, ..self }
    }

    /// Makes a prompt that is too long an error.
    pub fn strict_prompt(self, strict_prompt: bool) -> Self {
        Self { strict_prompt, ..self }
    }

    /// Checks what can be checked without a model.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        let wrong = |setting: &str, found: String, expected: &str| {
            Err(Error::Request { setting: setting.into(), found, expected: expected.into() })
        };
        let numbers = [
            ("prompts", self.prompts.len()),
            ("images per prompt", self.images_per_prompt),
            ("batch", self.batch),
        ];
        for (setting, value) in numbers {
            if value == 0 {
                return wrong(setting, "0".into(), "1 or more");
            }
        }
        if !self.guidance.is_finite() {
            return wrong("guidance", self.guidance.to_string(), "a finite number");
        }
        if let Some((low, high)) = self.guidance_interval
            && !(low >= 0.0 && low <= high)
        {
            return wrong(
                "guidance interval",
                format!("{low} to {high}"),
                "two noise levels, the lower first",
            );
        }
        if let Some(Sampler::Ddim { eta }) = self.sampler
            && !(0.0..=1.0).contains(&eta)
        {
            return wrong("eta", eta.to_string(), "0 to 1");
        }
        if let Some(seeds) = &self.seeds
            && seeds.len() != self.count()
        {
            let expected = format!("one for each of {} pictures", self.count());
            return wrong("seeds", seeds.len().to_string(), &expected);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_of_one_prompt_follow_each_other() {
        let request = Request::each(["a", "b"]).images_per_prompt(2).seed(u64::MAX);
        assert_eq!(request.count(), 4);
        assert_eq!([0, 1, 2, 3].map(|i| request.prompt(i)), ["a", "a", "b", "b"]);
        assert_eq!([0, 1].map(|i| request.seed_of(i)), [u64::MAX, 0]);
        assert_eq!(request.seeds([5, 5, 7, 9]).seed_of(2), 7);
    }

    #[test]
    fn what_cannot_be_is_named() {
        let request = || Request::new("x");
        for (request, setting) in [
            (Request::each(Vec::<String>::new()), "prompts"),
            (request().images_per_prompt(0), "images per prompt"),
            (request().batch(0), "batch"),
            (request().guidance(f64::NAN), "guidance"),
            (request().guidance_interval(2.0, 1.0), "guidance interval"),
            (request().guidance_interval(f64::NAN, 1.0), "guidance interval"),
            (request().sampler(Sampler::Ddim { eta: 1.5 }), "eta"),
            (request().seeds([1, 2]), "seeds"),
        ] {
            let error = request.validate().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{setting} ")), "{setting}: {error}");
        }
        for (values, strength, word) in [(11, 0.5, "values"), (12, 0.0, "strength"), (12, 1.1, "strength")] {
            let error = InitialImage::new(2, 2, vec![0; values], strength).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn pixels_of_an_initial_image() {
        let image = InitialImage::new(2, 1, vec![0, 255, 51, 255, 0, 102], 0.5).unwrap();
        let expected = [-1.0, 1.0, 1.0, -1.0, -0.6, -0.2];
        assert!(image.planes().iter().zip(expected).all(|(found, value)| (found - value).abs() < 1e-6));
    }
}
