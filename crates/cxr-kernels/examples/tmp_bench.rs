use burn::backend::Autodiff;
use burn::tensor::Tensor;
use cxr_kernels::{Flex, WeightCache, ops, plain};
use std::time::Instant;
type Ad = Autodiff<Flex>;
fn t<const D: usize>(s: [usize; D]) -> Tensor<Flex, D> {
    Tensor::random(s, burn::tensor::Distribution::Normal(0.0, 1.0), &Default::default())
}
fn time(name: &str, flops: f64, mut f: impl FnMut()) {
    f();
    let mut v: Vec<f64> = (0..9).map(|_| { let a = Instant::now(); f(); a.elapsed().as_secs_f64() * 1e3 }).collect();
    v.sort_by(f64::total_cmp);
    println!("{name:44} min {:8.2} med {:8.2} ms  {:6.1} GFLOP/s", v[0], v[4], flops / v[0] / 1e6);
}
fn raw<const D: usize>(x: Tensor<Flex, D>) -> burn::tensor::ops::FloatTensor<Flex> { x.into_primitive().tensor() }
fn main() {
    use cxr_kernels::DiffusionBackend as K;
    for [n, c, o, s] in [[8, 1, 16, 64], [8, 16, 16, 64], [8, 32, 32, 32], [8, 64, 64, 16], [16, 64, 64, 16], [16, 64, 128, 8], [16, 128, 128, 8], [16, 128, 128, 4], [8, 32, 32, 64]] {
        let fl = 2.0 * (n * c * o * s * s * 9) as f64;
        let (x, w, b, g) = (t([n, c, s, s]), t([o, c, 3, 3]), t([o]), t([n, o, s, s]));
        let nm = format!("{n}x{c}->{o}x{s}");
        let cache = WeightCache::new();
        time(&format!("conv fwd {nm}"), fl, || { Flex::kernel_conv2d(raw(x.clone()), raw(w.clone()), Some(raw(b.clone())), 1, 1, &cache); });
        time(&format!("  plain"), fl, || { plain::conv2d::<Flex>(raw(x.clone()), raw(w.clone()), Some(raw(b.clone())), 1, 1); });
        time(&format!("  x_backward"), fl, || { Flex::kernel_conv2d_x_backward([n, c, s, s].into(), raw(w.clone()), raw(g.clone()), 1, 1, &WeightCache::new()); });
        time(&format!("  weight_backward"), fl, || { Flex::kernel_conv2d_weight_backward(raw(x.clone()), raw(w.clone()), raw(g.clone()), 1, 1); });
        time("  bias_backward", (n * o * s * s) as f64, || { let _ = g.clone().sum_dim(3).sum_dim(2).sum_dim(0); });
        time("  gn_silu fwd", 0.0, || { Flex::kernel_group_norm(raw(g.clone()), raw(b.clone()), raw(b.clone()), o.min(8), 1e-5, true); });
        time("  gn_silu bwd", 0.0, || { Flex::kernel_group_norm_backward(raw(g.clone()), raw(b.clone()), raw(b.clone()), raw(g.clone()), o.min(8), 1e-5, true); });
        time("  add", 0.0, || { let _ = g.clone() + g.clone(); });
        let d = |x: Tensor<Flex, 4>| Tensor::<Ad, 4>::from_inner(x).require_grad();
        time(&format!("  autodiff conv all {nm}"), 3.0 * fl, || {
            let bias = Tensor::<Ad, 1>::from_inner(b.clone()).require_grad();
            let y = ops::conv2d(d(x.clone()), d(w.clone()), Some(bias), 1, 1, &WeightCache::new());
            let _ = y.sum().backward();
        });
    }
    let (n, c, o, s) = (8, 32, 64, 32);
    let (x, w) = (t([n, c, s, s]), t([o, c, 3, 3]));
    let g = t([n, o, s / 2, s / 2]);
    let fl = 2.0 * (n * c * o * s * s / 4 * 9) as f64;
    time("conv s2 fwd", fl, || { Flex::kernel_conv2d(raw(x.clone()), raw(w.clone()), None, 2, 1, &WeightCache::new()); });
    time("conv s2 x_backward", fl, || { Flex::kernel_conv2d_x_backward([n, c, s, s].into(), raw(w.clone()), raw(g.clone()), 2, 1, &WeightCache::new()); });
    time("conv s2 w_backward", fl, || { Flex::kernel_conv2d_weight_backward(raw(x.clone()), raw(w.clone()), raw(g.clone()), 2, 1); });
    for [rows, i, o] in [[8 * 256, 64, 512], [8 * 64, 128, 1024], [8, 256, 256], [16 * 77, 128, 128]] {
        let (x, w, g) = (t([rows, i]), t([o, i]), t([rows, o]));
        let fl = 2.0 * (rows * i * o) as f64;
        time(&format!("linear {rows} {i} {o}"), fl, || { Flex::kernel_linear(raw(x.clone()), raw(w.clone()), Some(raw(t([o]))), &WeightCache::new()); });
        time("  x bwd", fl, || { Flex::kernel_linear_x_backward(raw(w.clone()), raw(g.clone()), &WeightCache::new()); });
        time("  w bwd", fl, || { Flex::kernel_linear_weight_backward(raw(x.clone()), raw(g.clone())); });
        time("  bias bwd", 0.0, || { let _ = g.clone().sum_dim(0); });
    }
    for [b, h, n, m, d] in [[8, 4, 256, 256, 16], [8, 4, 64, 77, 32], [2, 8, 4096, 4096, 40], [2, 8, 1024, 1024, 80]] {
        let (q, k, v) = (t([b, h, n, d]), t([b, h, m, d]), t([b, h, m, d]));
        let fl = 4.0 * (b * h * n * m * d) as f64;
        time(&format!("attention {b} {h} {n} {m} {d}"), fl, || { Flex::kernel_attention(raw(q.clone()), raw(k.clone()), raw(v.clone()), false); });
        if n < 4096 { time("  bwd", 2.5 * fl, || { Flex::kernel_attention_backward(raw(q.clone()), raw(k.clone()), raw(v.clone()), raw(q.clone()), false); }); }
    }
}
