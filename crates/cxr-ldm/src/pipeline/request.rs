//! What to generate.

use crate::Error;
use crate::scheduler::Sampler;

/// Prompts and how to make pictures of them.
///
/// | Setting | Default | Range |
/// |---|---|---|
/// | negative prompt | empty | any text |
/// | steps | 30 | 1 to the training timesteps |
/// | guidance | 7.5 | any finite number; 1 leaves the unconditional half out |
/// | seed | 0 | picture `i` has `seed + i` |
/// | size | the model's own | multiples of [`StableDiffusion::size_unit`](super::StableDiffusion::size_unit) |
/// | sampler | DPM-Solver++ 2M | |
/// | count | 1 | 1 or more |
/// | batch | 1 | 1 or more: memory and speed, never the picture |
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Request {
    /// What the pictures show: picture `i` has prompt `i`, and the first again after the last. Never empty.
    pub prompts: Vec<String>,
    /// What it does not show: takes the place of the empty prompt in guidance.
    pub negative_prompt: String,
    /// Denoising steps: quality saturates at 20 to 30 with DPM-Solver++, at about 50 with DDIM.
    pub steps: usize,
    /// Classifier-free guidance `g`: `unconditional + g (conditional - unconditional)`.
    pub guidance: f64,
    /// The first picture's seed; the next have the next seeds.
    pub seed: u64,
    /// Width and height in pixels; `None` for the size that the model's configuration names.
    pub size: Option<(usize, usize)>,
    /// The sampler.
    pub sampler: Sampler,
    /// How many pictures.
    pub count: usize,
    /// How many pictures go through the networks at once.
    pub batch: usize,
    /// Whether a prompt that is too long is an error instead of being cut with a warning.
    pub strict_prompt: bool,
}

impl Request {
    /// One picture of `prompt` with the default settings.
    pub fn new(prompt: impl Into<String>) -> Self {
        Self {
            prompts: vec![prompt.into()],
            negative_prompt: String::new(),
            steps: 30,
            guidance: 7.5,
            seed: 0,
            size: None,
            sampler: Sampler::DpmPp2m,
            count: 1,
            batch: 1,
            strict_prompt: false,
        }
    }

    /// One picture of each prompt with the default settings.
    pub fn each<P: Into<String>>(prompts: impl IntoIterator<Item = P>) -> Self {
        let prompts: Vec<String> = prompts.into_iter().map(Into::into).collect();
        Self { count: prompts.len(), prompts, ..Self::new("") }
    }

    /// The prompt of picture `index`.
    pub(crate) fn prompt(&self, index: usize) -> &str {
        &self.prompts[index % self.prompts.len()]
    }

    /// Sets the negative prompt.
    pub fn negative(self, prompt: impl Into<String>) -> Self {
        Self { negative_prompt: prompt.into(), ..self }
    }

    /// Sets the number of denoising steps.
    pub fn steps(self, steps: usize) -> Self {
        Self { steps, ..self }
    }

    /// Sets the guidance.
    pub fn guidance(self, guidance: f64) -> Self {
        Self { guidance, ..self }
    }

    /// Sets the first picture's seed.
    pub fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Sets width and height in pixels.
    pub fn size(self, width: usize, height: usize) -> Self {
        Self { size: Some((width, height)), ..self }
    }

    /// Sets the sampler.
    pub fn sampler(self, sampler: Sampler) -> Self {
        Self { sampler, ..self }
    }

    /// Sets how many pictures are made.
    pub fn count(self, count: usize) -> Self {
        Self { count, ..self }
    }

    /// Sets how many pictures go through the networks at once.
    pub fn batch(self, batch: usize) -> Self {
        Self { batch, ..self }
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
        if !self.guidance.is_finite() {
            return wrong("guidance", self.guidance.to_string(), "a finite number");
        }
        if let Sampler::Ddim { eta } = self.sampler
            && !(0.0..=1.0).contains(&eta)
        {
            return wrong("eta", eta.to_string(), "0 to 1");
        }
        let numbers = [("prompts", self.prompts.len()), ("count", self.count), ("batch", self.batch)];
        for (setting, value) in numbers {
            if value == 0 {
                return wrong(setting, "0".into(), "1 or more");
            }
        }
        Ok(())
    }
}
