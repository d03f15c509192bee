use burn::tensor::{TensorPrimitive, Tensor, TensorData};
use cxr_kernels::{DiffusionBackend, Flex, plain};
use std::time::Instant;

type P = burn::tensor::ops::FloatTensor<Flex>;

fn best(mut f: impl FnMut()) -> f64 {
    (0..15).map(|_| { let t = Instant::now(); f(); t.elapsed().as_secs_f64() * 1e3 }).fold(f64::INFINITY, f64::min)
}
fn input(shape: &[usize]) -> P {
    let n: usize = shape.iter().product();
    let v: Vec<f32> = (0..n).map(|i| ((i * 7919 % 10007) as f32 / 10007.0 - 0.5) * 6.0).collect();
    let d = TensorData::new(v, shape.to_vec());
    <Flex as burn::tensor::ops::FloatTensorOps<Flex>>::float_from_data(d, &Default::default())
}

#[test]
#[ignore = "timing"]
fn timing() {
    for shape in [[2usize, 320, 64, 64], [8, 16, 64, 64]] {
        let groups = if shape[1] == 320 { 32 } else { 8 };
        let x = input(&shape);
        let g = input(&shape);
        let gamma = input(&[shape[1]]);
        let beta = input(&[shape[1]]);
        println!("{shape:?}");
        println!("silu plain {:.3} kernel {:.3} ", best(|| {plain::silu::<Flex>(x.clone());}), best(|| {Flex::kernel_silu(x.clone());}));
        println!("silu bwd plain {:.3} kernel {:.3} ", best(|| {plain::silu_backward::<Flex>(x.clone(), g.clone());}), best(|| {Flex::kernel_silu_backward(x.clone(), g.clone());}));
        for silu in [false, true] {
            println!("gn silu={silu} plain {:.3} kernel {:.3}", best(|| {plain::group_norm::<Flex>(x.clone(), gamma.clone(), beta.clone(), groups, 1e-5, silu);}), best(|| {Flex::kernel_group_norm(x.clone(), gamma.clone(), beta.clone(), groups, 1e-5, silu);}));
            println!("gn bwd silu={silu} plain {:.3} kernel {:.3}", best(|| {plain::group_norm_backward::<Flex>(x.clone(), gamma.clone(), beta.clone(), g.clone(), groups, 1e-5, silu);}), best(|| {Flex::kernel_group_norm_backward(x.clone(), gamma.clone(), beta.clone(), g.clone(), groups, 1e-5, silu);}));
            let a: Tensor<Flex, 4> = Tensor::from_primitive(TensorPrimitive::Float(Flex::kernel_group_norm(x.clone(), gamma.clone(), beta.clone(), groups, 1e-5, silu)));
            let b: Tensor<Flex, 4> = Tensor::from_primitive(TensorPrimitive::Float(plain::group_norm::<Flex>(x.clone(), gamma.clone(), beta.clone(), groups, 1e-5, silu)));
            println!("diff {}", (a - b).abs().max().into_scalar());
            let a = Flex::kernel_group_norm_backward(x.clone(), gamma.clone(), beta.clone(), g.clone(), groups, 1e-5, silu);
            let b = plain::group_norm_backward::<Flex>(x.clone(), gamma.clone(), beta.clone(), g.clone(), groups, 1e-5, silu);
            for (i, (a, b)) in a.into_iter().zip(b).enumerate() {
                let (a, b) = if i == 0 {
                    (Tensor::<Flex, 4>::from_primitive(TensorPrimitive::Float(a)).flatten::<1>(0, 3), Tensor::<Flex, 4>::from_primitive(TensorPrimitive::Float(b)).flatten::<1>(0, 3))
                } else { (Tensor::from_primitive(TensorPrimitive::Float(a)), Tensor::from_primitive(TensorPrimitive::Float(b))) };
                println!("diff {} of {}", (a - b.clone()).abs().max().into_scalar(), b.abs().max().into_scalar());
            }
        }
    }
}
