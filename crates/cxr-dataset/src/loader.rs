//! A collection as burn's `DataLoader` takes it.

use std::path::PathBuf;
use std::sync::Arc;

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataset::Dataset;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

use crate::batch::Source;
use crate::image::check_exists;
use crate::{Collection, DatasetError, ImageLoader, epoch_order};

/// One pair on its way to a batch. Its image is decoded by the batcher, on all cores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The pair's position in the collection.
    pub index: usize,
    /// The prompt.
    pub text: String,
    /// Where the image lies.
    pub image: PathBuf,
    /// The table that names the image, for errors.
    pub table: PathBuf,
    /// The line of that table.
    pub row: u64,
}

/// A pair, or why it cannot be used: an image that is missing or empty.
pub type SampleResult = Result<Sample, Arc<DatasetError>>;

/// What burn's `DataLoader` hands out: a batch, or why there is none.
pub type BatchResult<B> = Result<TensorBatch<B>, Arc<DatasetError>>;

/// Pictures and prompts as a model takes them.
#[derive(Debug, Clone)]
pub struct TensorBatch<B: Backend> {
    /// `[n, 3, size, size]`, values in [-1, 1], in the device's default float.
    pub pixels: Tensor<B, 4>,
    /// The prompts, one per picture.
    pub texts: Vec<String>,
    /// The pairs' positions in the collection.
    pub indices: Vec<usize>,
}

/// What is left of one epoch, as a burn `Dataset`.
///
/// The order is that of [`epoch_order`], so it depends on (seed, epoch) alone, and a run that stopped in the middle
/// goes on with a view that starts there. burn's loader delivers in race order with more than one worker, shuffles by
/// how often it was asked, and has no channel for errors: so give it one worker (or none) and no shuffle, make a view
/// for each epoch, and read errors from the items. The batcher decodes on all cores by itself.
///
/// ```no_run
/// use std::sync::Arc;
/// use burn::data::dataloader::DataLoaderBuilder;
/// use burn::tensor::backend::Backend;
/// use cxr_dataset::{Collection, DatasetError, EpochView, ImageBatcher, ImageOptions, Split};
///
/// fn epoch<B: Backend>(
///     collection: Arc<Collection>, split: &Split, epoch: u64, start: usize, device: B::Device,
/// ) -> Result<(), Arc<DatasetError>> {
///     let (batch_size, seed) = (4, 7);
///     let view = EpochView::new(collection, &split.train, seed, epoch, start * batch_size);
///     let loader = DataLoaderBuilder::<B, _, _>::new(ImageBatcher::new(ImageOptions::new(128)))
///         .batch_size(batch_size)
///         .num_workers(1)
///         .set_device(device)
///         .build(view);
///     for batch in loader.iter() {
///         let batch = batch?;
///         assert_eq!(batch.pixels.dims()[1..], [3, 128, 128]);
///     }
///     Ok(())
/// }
/// ```
#[derive(Debug, Clone)]
pub struct EpochView {
    collection: Arc<Collection>,
    /// Positions in the collection, in the order in which they are visited.
    order: Vec<usize>,
}

impl EpochView {
    /// The pairs at `positions` of the collection in the order of an epoch, without the first `start` of them; a start
    /// past the end gives an empty view.
    ///
    /// # Panics
    /// When a position is not below the collection's length.
    pub fn new(
        collection: Arc<Collection>,
        positions: &[usize],
        seed: u64,
        epoch: u64,
        start: usize,
    ) -> Self {
        let length = collection.len();
        let at = |place: usize| {
            let position = positions[place];
            assert!(position < length, "position {position} in a collection of {length} pairs");
            position
        };
        let order = epoch_order(positions.len(), seed, epoch).into_iter().map(at).skip(start).collect();
        Self { collection, order }
    }
}

impl Dataset<SampleResult> for EpochView {
    fn get(&self, index: usize) -> Option<SampleResult> {
        let &index = self.order.get(index)?;
        let pair = &self.collection.pairs[index];
        let sample = || Sample {
            index,
            text: pair.text.clone(),
            image: pair.image.clone(),
            table: self.collection.table.clone(),
            row: pair.row,
        };
        let failed = |error| Arc::new(Source::of(&self.collection, pair).error(error));
        // An item is never `None`: burn takes that for the end of the epoch.
        Some(check_exists(&pair.image).map(|()| sample()).map_err(failed))
    }

    fn len(&self) -> usize {
        self.order.len()
    }
}

/// Decodes the pictures of a batch on all cores and puts them on the device.
#[derive(Debug, Clone)]
pub struct ImageBatcher {
    images: ImageLoader,
}

impl ImageBatcher {
    /// Batches of pictures that are loaded like this. A size out of range is an error of every batch.
    pub fn new(images: impl Into<ImageLoader>) -> Self {
        Self { images: images.into() }
    }
}

impl<B: Backend> Batcher<B, SampleResult, BatchResult<B>> for ImageBatcher {
    /// The batch, or the first error in the order of the items.
    fn batch(&self, items: Vec<SampleResult>, device: &B::Device) -> BatchResult<B> {
        let samples = items.into_iter().collect::<Result<Vec<Sample>, _>>()?;
        let sources: Vec<Source<'_>> = samples
            .iter()
            .map(|Sample { table, row, image, .. }| Source { table, row: *row, image })
            .collect();
        let (pixels, shape) = self.images.load_all(&sources)?;
        let pixels = Tensor::from_data(TensorData::new(pixels, shape), device);
        let (texts, indices) = samples.into_iter().map(|sample| (sample.text, sample.index)).unzip();
        Ok(TensorBatch { pixels, texts, indices })
    }
}
