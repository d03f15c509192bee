//! An adapter's numbers, apart from any model and any file.

/// The two factors of one adapted layer, in PyTorch's layout.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraWeights {
    /// Rows of `a`, columns of `b`.
    pub rank: usize,
    /// Width of the layer's input.
    pub in_features: usize,
    /// Width of the layer's output.
    pub out_features: usize,
    /// The layer adds `alpha / rank * B (A x)`.
    pub alpha: f64,
    /// `A`, `[rank, in_features]`, row by row.
    pub a: Vec<f32>,
    /// `B`, `[out_features, rank]`, row by row.
    pub b: Vec<f32>,
}
