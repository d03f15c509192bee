//! The UNet against diffusers.

use std::ops::ControlFlow;

use burn::tensor::Tensor;
use cxr_kernels::Flex;
use cxr_ldm::scheduler::{NoiseSchedule, NoiseScheduleConfig, Sampler, Steps, sample};
use cxr_ldm::unet::{Context, UNet2dCondition};

use crate::fixture::{
    Reference, assert_every_parameter_counts, assert_meets, assert_misses, path, unet, values,
};

/// Rows of the text encoder's output: 0 is the empty prompt, 1 and 2 are prompts.
fn hidden(reference: &Reference, rows: std::ops::Range<usize>) -> Tensor<Flex, 3> {
    reference.float::<Flex, 3>("text.hidden").slice(rows)
}

fn timesteps(reference: &Reference) -> Tensor<Flex, 1> {
    reference.timesteps("unet.timesteps")
}

#[test]
fn predicted_noise() {
    let reference = Reference::open();
    let model = unet::<Flex>();
    let expected = reference.values("unet.eps");
    let predict = |hidden: Tensor<Flex, 3>, timesteps| {
        values(model.forward(reference.float("unet.latents"), timesteps, &Context::new(hidden)))
    };
    let context = hidden(&reference, 1..3);
    assert_meets("UNet", &predict(context.clone(), timesteps(&reference)), &expected);
    let none = context.clone() * 0.0;
    assert_misses("UNet without context", &predict(none, timesteps(&reference)), &expected);
    assert_misses(
        "UNet, contexts swapped",
        &predict(context.clone().flip([0]), timesteps(&reference)),
        &expected,
    );
    assert_misses("UNet, timesteps swapped", &predict(context, timesteps(&reference).flip([0])), &expected);
}

#[test]
fn latents_of_odd_size() {
    let reference = Reference::open();
    let latents = reference.float("unet.odd_latents");
    let context = Context::new(hidden(&reference, 1..3));
    let found = values(unet::<Flex>().forward(latents, timesteps(&reference), &context));
    assert_meets("UNet, 7 x 5 latents", &found, &reference.values("unet.odd_eps"));
}

#[test]
fn every_parameter_counts() {
    let reference = Reference::open();
    let context = Context::new(hidden(&reference, 1..3));
    let forward = |model: &UNet2dCondition<Flex>| {
        values(model.forward(reference.float("unet.latents"), timesteps(&reference), &context))
    };
    assert_every_parameter_counts::<Flex, _>(&unet(), &reference.values("unet.eps"), forward);
}

#[test]
fn a_prepared_context_gives_the_same() {
    let reference = Reference::open();
    let model = unet::<Flex>();
    let predict = |context: &Context<Flex>| {
        values(model.forward(reference.float("unet.latents"), timesteps(&reference), context))
    };
    let hidden = hidden(&reference, 1..3);
    let prepared = model.prepare(hidden.clone());
    let in_graph = predict(&Context::new(hidden));
    assert_eq!(predict(&prepared), in_graph);
    assert_eq!(predict(&prepared), in_graph, "a context serves any number of steps");
}

#[test]
#[should_panic(expected = "rows of latents against context")]
fn one_context_for_two_latents_is_refused() {
    let reference = Reference::open();
    let context = Context::new(hidden(&reference, 1..2));
    unet::<Flex>().forward(reference.float("unet.latents"), timesteps(&reference), &context);
}

#[test]
fn ten_guided_ddim_steps() {
    let reference = Reference::open();
    let model = unet::<Flex>();
    let config = std::fs::read_to_string(path("model/scheduler/scheduler_config.json")).unwrap();
    let schedule = NoiseSchedule::new(NoiseScheduleConfig::from_json(&config).unwrap()).unwrap();
    let timesteps = Sampler::ddim().timesteps(&schedule, 10).unwrap();
    assert_eq!(timesteps, reference.data("ddim.timesteps").iter::<f64>().collect::<Vec<_>>());
    let context = model.prepare(hidden(&reference, 0..2));
    let run = |guidance: f64, context: &Context<Flex>| {
        let denoiser = |latents: Tensor<Flex, 4>, timestep: f64| {
            let timesteps =
                Tensor::<Flex, 1>::from_data([timestep as f32, timestep as f32], &Default::default());
            let both = model.forward(Tensor::cat(vec![latents.clone(), latents], 0), timesteps, context);
            let (without, with) = (both.clone().slice(0..1), both.slice(1..2));
            without.clone() + (with - without) * guidance
        };
        let start = reference.float("ddim.latents");
        let no_noise = |_, shape| Tensor::zeros(shape, &Default::default());
        let go_on = |_: cxr_ldm::scheduler::StepInfo<'_, Flex>| ControlFlow::Continue(());
        let steps = Steps::new(10);
        values(sample(&Sampler::ddim(), &schedule, steps, start, denoiser, no_noise, go_on).unwrap().latents)
    };
    let expected = reference.values("ddim.result");
    assert_meets("10 DDIM steps", &run(7.5, &context), &expected);
    assert_misses("10 DDIM steps without guidance", &run(1.0, &context), &expected);
    let no_context = model.prepare(hidden(&reference, 0..2) * 0.0);
    assert_misses("10 DDIM steps without context", &run(7.5, &no_context), &expected);
}
