//! Classifier-free guidance, and where it is left out.

use burn::tensor::{Tensor, backend::Backend};

use super::Request;

/// What a call of the UNet is conditioned on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Rows {
    /// The prompts alone, one row a picture.
    Prompts,
    /// The negative prompts, then the prompts: two rows a picture.
    Both,
}

/// Classifier-free guidance (Ho & Salimans 2022), both halves in one call of `predict`; without guidance, and at noise
/// levels outside of its interval, one call with the prompts alone, which is half the rows.
pub(super) fn guide<B: Backend>(
    request: &Request,
    sigma: f64,
    latents: Tensor<B, 4>,
    predict: impl FnOnce(Tensor<B, 4>, Rows) -> Tensor<B, 4>,
) -> Tensor<B, 4> {
    let is_inside = request.guidance_interval.is_none_or(|(low, high)| (low..=high).contains(&sigma));
    if !is_guided(request) || !is_inside {
        return predict(latents, Rows::Prompts);
    }
    let n = latents.dims()[0];
    let both = predict(Tensor::cat(vec![latents.clone(), latents], 0), Rows::Both);
    let unconditional = both.clone().slice(0..n);
    let conditional = both.slice(n..2 * n);
    unconditional.clone() + (conditional - unconditional) * request.guidance
}

/// At guidance 1 the unconditional half cancels out.
pub(super) fn is_guided(request: &Request) -> bool {
    request.guidance != 1.0
}

#[cfg(test)]
mod tests {
    use cxr_kernels::Flex;

    use super::*;

    /// How many rows the UNet was given for three pictures, and what came out; it answers 1 to the negative prompts
    /// and 2 to the prompts.
    fn rows(request: &Request, sigma: f64) -> (usize, Vec<f32>) {
        let device = Default::default();
        let mut rows = Vec::new();
        let out = guide(request, sigma, Tensor::<Flex, 4>::ones([3, 1, 1, 1], &device), |latents, of| {
            rows.push(latents.dims()[0]);
            match of {
                Rows::Prompts => latents * 2.0,
                Rows::Both => Tensor::cat(vec![latents.clone().slice(0..3), latents.slice(3..6) * 2.0], 0),
            }
        });
        assert_eq!(rows.len(), 1, "one call");
        (rows[0], out.into_data().to_vec().unwrap())
    }

    #[test]
    fn half_of_the_rows_outside_of_the_interval() {
        let whole = Request::new("Edema.").guidance(3.0);
        assert_eq!(rows(&whole, 14.0), (6, vec![4.0; 3]), "1 + 3 (2 - 1)");
        let part = whole.clone().guidance_interval(0.3, 5.0);
        for (sigma, expected) in [(14.0, 3), (5.01, 3), (5.0, 6), (1.0, 6), (0.3, 6), (0.29, 3)] {
            let value = if expected == 6 { 4.0 } else { 2.0 };
            assert_eq!(rows(&part, sigma), (expected, vec![value; 3]), "at {sigma}");
        }
        for request in [whole.guidance(1.0), part.guidance(1.0)] {
            assert_eq!(rows(&request, 1.0), (3, vec![2.0; 3]), "no guidance at all");
        }
    }
}
