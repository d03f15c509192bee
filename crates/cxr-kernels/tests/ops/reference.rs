//! The operations in f64, straight from their definitions.

/// Distribution function of the standard normal, to a relative error of 1e-13 in both tails.
pub(crate) fn normal_cdf(x: f64) -> f64 {
    let z = x.abs() * std::f64::consts::FRAC_1_SQRT_2;
    let bell = std::f64::consts::FRAC_2_SQRT_PI * (-z * z).exp();
    if z < 2.0 {
        // Kummer's series of erf
        let (mut term, mut sum) = (z, z);
        for n in 1..60 {
            term *= 2.0 * z * z / (2 * n + 1) as f64;
            sum += term;
        }
        return 0.5 * (1.0 + (bell * sum).copysign(x));
    }
    // the continued fraction of erfc, from its end: beyond 2 it converges fast, and nothing cancels
    let fraction = (1..120).rev().fold(z, |f, n| z + 0.5 * n as f64 / f);
    let tail = 0.25 * bell / fraction;
    if x > 0.0 { 1.0 - tail } else { tail }
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub(crate) fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

pub(crate) fn quick_gelu(x: f64) -> f64 {
    x * sigmoid(1.702 * x)
}

pub(crate) fn gelu(x: f64) -> f64 {
    x * normal_cdf(x)
}

pub(crate) fn each(x: &[f64], f: fn(f64) -> f64) -> Vec<f64> {
    x.iter().map(|x| f(*x)).collect()
}

/// Rows of `2 * half`.
pub(crate) fn geglu(x: &[f64], half: usize) -> Vec<f64> {
    x.chunks(2 * half).flat_map(|row| (0..half).map(|i| row[i] * gelu(row[half + i]))).collect()
}

fn normalized(x: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
    x.iter().map(|x| (x - mean) / (variance + eps).sqrt()).collect()
}

/// `x` `[n, c, plane]`.
pub(crate) fn group_norm(
    x: &[f64],
    gamma: &[f64],
    beta: &[f64],
    plane: usize,
    groups: usize,
    eps: f64,
    after: fn(f64) -> f64,
) -> Vec<f64> {
    let channels = gamma.len();
    let normal = x.chunks(channels / groups * plane).flat_map(|group| normalized(group, eps));
    let channel = |i: usize| i / plane % channels;
    normal.enumerate().map(|(i, x)| after(x * gamma[channel(i)] + beta[channel(i)])).collect()
}

pub(crate) fn layer_norm(x: &[f64], gamma: &[f64], beta: &[f64], eps: f64) -> Vec<f64> {
    let d = gamma.len();
    let normal = x.chunks(d).flat_map(|row| normalized(row, eps));
    normal.enumerate().map(|(i, x)| x * gamma[i % d] + beta[i % d]).collect()
}

/// `x` `[rows, input]`, `weight` `[out, input]`, `bias` `[out]` or empty.
pub(crate) fn linear(x: &[f64], weight: &[f64], bias: &[f64], input: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    x.chunks(input)
        .flat_map(|x| {
            let outputs = weight.chunks(input).enumerate();
            outputs.map(move |(o, w)| dot(x, w) + bias.get(o).copied().unwrap_or(0.0))
        })
        .collect()
}

/// Sizes of a convolution.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conv {
    pub(crate) x: [usize; 4],
    pub(crate) out: usize,
    pub(crate) kernel: usize,
    pub(crate) stride: usize,
    pub(crate) padding: usize,
}

impl Conv {
    pub(crate) fn out_size(&self) -> [usize; 2] {
        [self.x[2], self.x[3]].map(|size| (size + 2 * self.padding - self.kernel) / self.stride + 1)
    }

    pub(crate) fn weight_shape(&self) -> [usize; 4] {
        [self.out, self.x[1], self.kernel, self.kernel]
    }
}

pub(crate) fn conv2d(sizes: &Conv, x: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
    let [n, c, h, w] = sizes.x;
    let [out_h, out_w] = sizes.out_size();
    let k = sizes.kernel;
    let mut y = Vec::new();
    for sample in 0..n {
        for o in 0..sizes.out {
            for row in 0..out_h {
                for column in 0..out_w {
                    let mut sum = bias.get(o).copied().unwrap_or(0.0);
                    for i in 0..c * k * k {
                        let (channel, dy, dx) = (i / (k * k), i / k % k, i % k);
                        let from_y = (row * sizes.stride + dy).wrapping_sub(sizes.padding);
                        let from_x = (column * sizes.stride + dx).wrapping_sub(sizes.padding);
                        if from_y < h && from_x < w {
                            sum += x[((sample * c + channel) * h + from_y) * w + from_x]
                                * weight[o * c * k * k + i];
                        }
                    }
                    y.push(sum);
                }
            }
        }
    }
    y
}

/// `q` `[heads, n, d]`, `k` and `v` `[heads, m, d]`.
pub(crate) fn attention(q: &[f64], k: &[f64], v: &[f64], [n, m, d]: [usize; 3], causal: bool) -> Vec<f64> {
    let mut y = Vec::new();
    for ((q, k), v) in q.chunks(n * d).zip(k.chunks(m * d)).zip(v.chunks(m * d)) {
        for (i, q) in q.chunks(d).enumerate() {
            let seen = if causal { (i + 1).min(m) } else { m };
            let score = |k: &[f64]| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt();
            let weights: Vec<f64> = k.chunks(d).take(seen).map(|k| score(k).exp()).collect();
            let total: f64 = weights.iter().sum();
            for column in 0..d {
                let sum: f64 = weights.iter().enumerate().map(|(j, w)| w * v[j * d + column]).sum();
                y.push(sum / total);
            }
        }
    }
    y
}

/// Images of `[h, w]` at another size, each pixel that of PyTorch's nearest neighbour.
pub(crate) fn nearest(x: &[f64], [h, w]: [usize; 2], [height, width]: [usize; 2]) -> Vec<f64> {
    let from = |i: usize, old: usize, new: usize| (i as f64 * old as f64 / new as f64) as usize;
    x.chunks(h * w)
        .flat_map(|x| {
            (0..height * width).map(move |i| x[from(i / width, h, height) * w + from(i % width, w, width)])
        })
        .collect()
}

/// `[n, rows, columns]` with the last two exchanged.
pub(crate) fn transpose(x: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    x.chunks(rows * columns)
        .flat_map(|x| (0..rows * columns).map(move |i| x[i % rows * columns + i / rows]))
        .collect()
}
