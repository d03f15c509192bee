//! Several processes that train together, here as threads.

use std::path::Path;
use std::sync::{Barrier, Mutex};

use cxr_core::progress::Silent;
use cxr_trainer::distributed::Ranks;
use cxr_trainer::{LearningRate, TrainConfig, TrainError, Training, checkpoint, train, watch};

use crate::common::{B, Steps, adapted_unet, diffusion, relative, trainable_values};

/// What the threads share.
struct Shared {
    sums: Mutex<Vec<Vec<f32>>>,
    barrier: Barrier,
}

struct Thread<'a> {
    rank: usize,
    size: usize,
    shared: &'a Shared,
}

impl Ranks for Thread<'_> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn sum(&self, values: &mut [f32]) -> Result<(), TrainError> {
        self.shared.sums.lock().unwrap()[self.rank] = values.to_vec();
        self.shared.barrier.wait();
        let parts = self.shared.sums.lock().unwrap().clone();
        for (i, value) in values.iter_mut().enumerate() {
            *value = parts.iter().map(|part| part[i]).sum();
        }
        self.shared.barrier.wait();
        Ok(())
    }

    fn wait(&self) {
        self.shared.barrier.wait();
    }
}

/// What each of `size` threads says.
fn each<T: Send>(size: usize, work: impl Fn(&Thread<'_>) -> T + Sync) -> Vec<T> {
    let shared = Shared { sums: Mutex::new(vec![Vec::new(); size]), barrier: Barrier::new(size) };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..size)
            .map(|rank| {
                let (shared, work) = (&shared, &work);
                scope.spawn(move || work(&Thread { rank, size, shared }))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// 13 pictures: with 8 of them for each step an epoch has two steps, the second of 5.
const PICTURES: usize = 13;

fn config(batch_size: usize) -> TrainConfig {
    TrainConfig {
        steps: 20,
        batch_size,
        learning_rate: LearningRate::constant(1e-3),
        checkpoint_every: 6,
        clip_norm: Some(0.5),
        ..TrainConfig::default()
    }
}

/// The adapter's values after a run, and how many steps this process was told of.
fn run(thread: &Thread<'_>, batch_size: usize, folder: &Path, progress: &Steps) -> (Vec<f64>, u64) {
    let (objective, config) = (diffusion(PICTURES), config(batch_size));
    let trained = Training::<B, _>::new(&objective, &config, folder)
        .ranks(thread)
        .run(adapted_unet(), progress)
        .unwrap();
    (trainable_values::<B, _>(&trained.model), trained.step)
}

#[test]
fn two_ranks_make_what_one_makes_with_batches_twice_as_large() {
    let start = trainable_values::<B, _>(&adapted_unet());
    let change = |values: &[f64]| values.iter().zip(&start).map(|(a, b)| a - b).collect::<Vec<_>>();
    let folder = tempfile::tempdir().unwrap();
    let one = train(adapted_unet(), &diffusion(PICTURES), &config(8), folder.path(), &Silent).unwrap();
    let expected = change(&trainable_values::<B, _>(&one.model));
    assert!(expected.iter().map(|value| value * value).sum::<f64>() > 0.0);
    // With three, the last step of an epoch has a sample for the first rank alone.
    for (size, batch_size) in [(2, 4), (4, 2), (3, 4)] {
        let folder = tempfile::tempdir().unwrap();
        let found = each(size, |thread| run(thread, batch_size, folder.path(), &Steps::default()).0);
        assert!(found.iter().all(|values| values == &found[0]), "all ranks have the same adapter");
        if size * batch_size == 8 {
            let error = relative(&change(&found[0]), &expected);
            println!("{size} ranks against one, after 20 steps: {error:.1e}");
            assert!(error < 1e-3, "{size} ranks: {error}");
        }
        let lines: Vec<watch::Record> = watch::read(&folder.path().join("metrics.jsonl")).unwrap();
        assert_eq!(lines.iter().map(|line| line.step).collect::<Vec<_>>(), [10, 20], "rank 0 writes");
    }
}

#[test]
fn ranks_stop_together_and_go_on() {
    let [whole, parts] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let expected = each(2, |thread| run(thread, 4, whole.path(), &Steps::default()));
    // the second rank alone is asked to stop: the step after, both know
    let stopped = each(2, |thread| {
        let stop_after = (thread.rank == 1).then_some(7);
        run(thread, 4, parts.path(), &Steps { stop_after, ..Steps::default() }).1
    });
    assert_eq!(stopped, [8, 8]);
    assert_eq!(checkpoint::list(parts.path()).unwrap().last().unwrap().0, 8);
    assert_eq!(each(2, |thread| run(thread, 4, parts.path(), &Steps::default())), expected);
    // as one process, or three, it would be another run
    let error = train(adapted_unet(), &diffusion(PICTURES), &config(4), parts.path(), &Silent).err().unwrap();
    assert!(matches!(error, TrainError::OtherRun { .. }), "{error}");
}

#[test]
fn ranks_that_differ_are_an_error_on_all() {
    let folder = tempfile::tempdir().unwrap();
    let errors = each(2, |thread| {
        let (objective, config) =
            (diffusion(PICTURES), TrainConfig { seed: thread.rank as u64, ..config(4) });
        let training = Training::<B, _>::new(&objective, &config, folder.path()).ranks(thread);
        training.run(adapted_unet(), &Silent).err().map(|error| error.to_string())
    });
    assert!(
        errors.iter().all(|error| error.as_ref().is_some_and(|e| e.contains("same command"))),
        "{errors:?}"
    );
}
