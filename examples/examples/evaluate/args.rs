//! The command line.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;
use cxr::metrics::Evaluation;
use cxr::metrics::inception::ResizeMode;
use cxr_examples::backend::RunArgs;
use cxr_examples::evaluation::InceptionArgs;
use cxr_examples::evaluation::labels::Resampling;
use cxr_examples::exit::EXIT_CODES;

/// Measures synthetic radiographs against real ones: FID, Inception Score, KID, precision and its kin, diversity, and
/// a search for copies of training images. Every figure carries N, interval, and what real images score at that N.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
pub(crate) struct Args {
    /// Real images that the model has not seen: a folder (with a metadata.jsonl or metadata.csv, or without), a .csv
    /// or .jsonl table, or statistics as pytorch-fid keeps them (.npz).
    #[arg(long, value_name = "DIR|TABLE|STATS")]
    pub(crate) real: PathBuf,
    /// Synthetic images of the adapted model: a folder or table, as `synthesize` writes it.
    #[arg(long, value_name = "DIR|TABLE")]
    pub(crate) fake: PathBuf,
    /// What the model was trained on: copies are looked for in it.
    #[arg(long, value_name = "DIR|TABLE")]
    pub(crate) train: Option<PathBuf>,
    /// Synthetic images of the base model, for comparison.
    #[arg(long, value_name = "DIR|TABLE")]
    pub(crate) base: Option<PathBuf>,
    /// Folder for metrics.json, metrics.md, copies.csv and copies.png.
    #[arg(long, value_name = "DIR", default_value = "out/evaluate")]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) inception: InceptionArgs,
    /// Weights of torchxrayvision's DenseNet-121 (its state_dict, or safetensors), for copies, findings and usefulness;
    /// without, Inception's features, and findings by linear heads that --train teaches.
    #[arg(long, value_name = "FILE")]
    pub(crate) densenet: Option<PathBuf>,
    /// Which of the published weights these are: they say what the outputs mean.
    #[arg(long, value_name = "NAME", default_value = "densenet121-res224-all", requires = "densenet")]
    pub(crate) densenet_weights: String,
    /// How images are brought to Inception's 299 pixels: pytorch-fid, torch-fidelity or clean. Figures of different
    /// modes do not compare.
    #[arg(long, value_name = "MODE", default_value_t = ResizeMode::default())]
    pub(crate) resize: ResizeMode,
    /// Bring all images to this side in pixels first (short side, centre cut out), where a set has several sizes.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8192))]
    pub(crate) size: Option<u32>,
    /// Splits of the Inception Score; 0 leaves it out.
    #[arg(long, value_name = "N", default_value_t = cxr::metrics::INCEPTION_SCORE_SPLITS)]
    pub(crate) splits: usize,
    /// Resamples of each interval; 0 leaves intervals out [default: 200, and 0 above 2048 images, where each takes
    /// many seconds].
    #[arg(long, value_name = "N")]
    pub(crate) replicates: Option<usize>,
    /// Random halves of the real set for what real images score; 0 leaves that out [default: 10, and 2 above 2048
    /// images].
    #[arg(long, value_name = "N")]
    pub(crate) floor_splits: Option<usize>,
    /// Pairs of images of one prompt that are compared for diversity, at most.
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub(crate) pairs: usize,
    /// Seed of every random choice.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Keep the statistics of the real images in this file, which --real and pytorch-fid read.
    #[arg(long, value_name = "FILE.npz")]
    pub(crate) save_statistics: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// Images above which the defaults of intervals and floors are lower.
const LARGE: usize = 2048;

impl Args {
    /// What can be said of the flags before anything is read.
    pub(crate) fn check(&self) -> Result<()> {
        ensure!(self.pairs > 0, "--pairs is 0, expected at least one pair for each prompt");
        if let Some(path) = &self.save_statistics {
            ensure!(
                path.extension().is_some_and(|extension| extension == "npz"),
                "--save-statistics {}: expected a name that ends in .npz, by which it is known again",
                path.display()
            );
            ensure!(
                !self.real_is_statistics(),
                "--save-statistics: --real {} is statistics already; give the folder of images",
                self.real.display()
            );
        }
        Ok(())
    }

    pub(crate) fn real_is_statistics(&self) -> bool {
        self.real.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("npz"))
    }

    /// How findings and usefulness are given intervals.
    pub(crate) fn resampling(&self) -> Resampling {
        Resampling { replicates: self.replicates.unwrap_or(1000), seed: self.seed }
    }

    /// How sets of these sizes are compared.
    pub(crate) fn evaluation(&self, images: usize) -> Evaluation {
        let large = images > LARGE;
        Evaluation {
            replicates: self.replicates.unwrap_or(if large { 0 } else { 200 }),
            floor_splits: self.floor_splits.unwrap_or(if large { 2 } else { 10 }),
            seed: self.seed,
            ..Evaluation::default()
        }
    }
}
