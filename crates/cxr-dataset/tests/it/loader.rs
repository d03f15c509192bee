use std::path::Path;
use std::sync::Arc;

use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn_flex::Flex;
use cxr_dataset::{BatchResult, DatasetError};
use cxr_dataset::{
    Batches, Collection, EpochView, ImageBatcher, ImageCache, ImageLoader, ImageOptions, SampleResult,
    TensorBatch,
};

use super::{open, write, write_image};

const SEED: u64 = 11;

/// A folder of 23 pictures.
fn sample(folder: &Path) -> Arc<Collection> {
    let mut table = "file_name,text\n".to_string();
    for i in 0..23_u8 {
        write_image(folder, &format!("{i}.png"), i * 11);
        table += &format!("{i}.png,Text {i}.\n");
    }
    write(folder, "metadata.csv", &table);
    Arc::new(open(folder).unwrap())
}

/// burn's own loader over an epoch.
fn loader(
    all: &Arc<Collection>,
    images: impl Into<ImageLoader>,
    (epoch, start, batch_size, workers): (u64, usize, usize, usize),
) -> Arc<dyn DataLoader<Flex, BatchResult<Flex>>> {
    let positions: Vec<usize> = (0..all.len()).collect();
    let view = EpochView::new(all.clone(), &positions, SEED, epoch, start);
    DataLoaderBuilder::<Flex, SampleResult, BatchResult<Flex>>::new(ImageBatcher::new(images))
        .batch_size(batch_size)
        .num_workers(workers)
        .build(view)
}

fn plain(batch: TensorBatch<Flex>) -> (Vec<usize>, Vec<String>, [usize; 4], Vec<f32>) {
    let shape = batch.pixels.dims();
    (batch.indices, batch.texts, shape, batch.pixels.into_data().to_vec().unwrap())
}

#[test]
fn burns_loader_serves_what_our_own_batches_are() {
    let folder = tempfile::tempdir().unwrap();
    let all = sample(folder.path());
    let positions: Vec<usize> = (0..all.len()).collect();
    let ours = Batches::new(&all, &positions, ImageOptions::new(16), 5, SEED).unwrap();
    let cached = ImageLoader::new(ImageOptions::new(16)).with_cache(ImageCache::in_memory(u64::MAX).into());
    for epoch in 0..2 {
        for workers in [0, 1] {
            let served: Vec<_> = loader(&all, &cached, (epoch, 0, 5, workers))
                .iter()
                .map(|batch| plain(batch.unwrap()))
                .collect();
            let expected: Vec<_> = ours.epoch(epoch, 0).collect::<Result<_, _>>().unwrap();
            assert_eq!(served.len(), 5);
            for (served, expected) in served.into_iter().zip(expected) {
                assert_eq!(served, (expected.indices, expected.texts, expected.shape, expected.pixels));
            }
        }
    }
}

#[test]
fn a_restart_in_the_middle_of_an_epoch_gives_the_same_batches() {
    let folder = tempfile::tempdir().unwrap();
    let all = sample(folder.path());
    let images = ImageOptions::new(8);
    let run = |epoch, start| -> Vec<_> {
        let loader = loader(&all, &images, (epoch, start, 4, 1));
        assert_eq!(loader.num_items(), 23_usize.saturating_sub(start));
        let batches = loader.iter().map(|batch| plain(batch.unwrap()));
        batches.collect()
    };
    let whole = run(3, 0);
    assert_eq!(whole.len(), 6);
    for done in 0..=6 {
        assert_eq!(run(3, done * 4), whole[done..], "after {done} batches");
    }
    assert_ne!(run(4, 0)[0].0, whole[0].0, "another epoch, another order");
}

#[test]
fn an_error_in_the_middle_reaches_the_caller_and_ends_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let all = sample(folder.path());
    let order = cxr_dataset::epoch_order(23, SEED, 0);
    // One image is gone: the item says so. Another one is damaged: the batcher finds out.
    let (gone, damaged) = (&all.pairs[order[6]], &all.pairs[order[13]]);
    std::fs::remove_file(&gone.image).unwrap();
    std::fs::write(&damaged.image, "no picture").unwrap();
    for workers in [0, 1] {
        let outcomes: Vec<BatchResult<Flex>> =
            loader(&all, ImageOptions::new(8), (0, 0, 5, workers)).iter().collect();
        let served: Vec<bool> = outcomes.iter().map(Result::is_ok).collect();
        assert_eq!(served, [true, false, false, true, true]);
        let errors: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
        for (error, pair, kind) in
            [(&errors[0], gone, "missing image"), (&errors[1], damaged, "undecodable image")]
        {
            let text = error.to_string();
            assert!(matches!(**error, DatasetError::Image { .. }) && error.kind() == kind, "{text}");
            assert!(text.contains(&pair.name) && text.contains(&format!("row {} of", pair.row)), "{text}");
            assert!(text.contains("metadata.csv"), "{text}");
        }
    }
    let sizeless = loader(&all, ImageOptions::new(0), (0, 0, 5, 0)).iter().next().unwrap();
    assert!(sizeless.unwrap_err().to_string().contains("image size"));
}

#[test]
#[should_panic(expected = "position 23 in a collection of 23 pairs")]
fn a_position_past_the_end_is_a_mistake() {
    let folder = tempfile::tempdir().unwrap();
    EpochView::new(sample(folder.path()), &[0, 23], SEED, 0, 0);
}
