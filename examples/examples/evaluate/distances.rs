//! Figures of one synthetic set: distances to the real one, Inception Score, precision and its kin, diversity.

use anyhow::{Context, Result};
use cxr::core::progress::Progress;
use cxr::kernels::DiffusionBackend;
use cxr::metrics::inception::InceptionExtractor;
use cxr::metrics::{Card, Evaluation, Extraction, FeatureExtractor, ImageSource, Moments, NEAREST_K};
use cxr_examples::evaluation::Set;
use cxr_examples::evaluation::labels::NotAvailable;
use serde::Serialize;

use crate::args::Args;

/// The real side.
pub(crate) enum Real<'a> {
    Images(&'a Set, Extraction),
    Statistics(Moments),
}

impl Real<'_> {
    pub(crate) fn count(&self) -> usize {
        match self {
            Self::Images(set, _) => set.len(),
            Self::Statistics(moments) => moments.count.unwrap_or(0),
        }
    }
}

/// Figures of one set, and those that cannot be had, with the reason.
#[derive(Debug, Serialize)]
pub(crate) struct Measured {
    #[serde(flatten)]
    pub(crate) card: Card,
    pub(crate) not_available: Vec<NotAvailable>,
}

pub(crate) fn measure<B: DiffusionBackend>(
    args: &Args,
    extractor: &InceptionExtractor<B>,
    real: &Real<'_>,
    set: &Set,
    fake: &Extraction,
    progress: &dyn Progress,
) -> Result<Measured> {
    let evaluation = args.evaluation(real.count().max(set.len()));
    let mut measured = Measured { card: Card::default(), not_available: Vec::new() };
    let mut lacks = |figure: &str, why: &str| {
        measured.not_available.push(NotAvailable { figure: figure.into(), why: why.into() });
    };
    let figures = &mut measured.card.figures;
    let against = || format!("{} against --real {}", set.shown(), args.real.display());
    match real {
        Real::Images(_, real) => {
            let card = evaluation.compare(real, fake, &extractor.id(), progress);
            figures.extend(card.with_context(against)?.figures);
            if real.features.len().min(fake.features.len()) > NEAREST_K {
                let more = evaluation.prdc(real, fake, NEAREST_K, &extractor.id(), progress);
                figures.extend(more.with_context(against)?);
            } else {
                lacks("precision, recall, density, coverage", "they need more than 5 images in each set");
            }
        }
        Real::Statistics(moments) => {
            let figure = evaluation.compare_with_statistics(moments, fake, &extractor.id());
            figures.push(figure.with_context(against)?);
            lacks(
                "kid, precision, recall, density, coverage",
                "they need real images, and --real has statistics",
            );
        }
    }
    match (extractor.logits_id(), args.splits) {
        (_, 0) => lacks("inception_score", "left out by --splits 0"),
        (None, _) => {
            lacks("inception_score", "the weights have no last layer (fc.weight), so there are no logits")
        }
        (Some(id), splits) => {
            let real = match real {
                Real::Images(_, real) => Some(real),
                Real::Statistics(_) => None,
            };
            let figure = evaluation.inception_score(real, fake, splits, &id, progress);
            figures.push(figure.map_err(|error| {
                set.explain(error)
                    .context("--splits: take fewer splits, or 0 to leave the Inception Score out")
            })?);
        }
    }
    diversity(args, &evaluation, set, &mut measured, progress)?;
    Ok(measured)
}

/// MS-SSIM within prompts, where the set has prompts with several images.
fn diversity(
    args: &Args,
    evaluation: &Evaluation,
    set: &Set,
    measured: &mut Measured,
    progress: &dyn Progress,
) -> Result<()> {
    let mut lacks = |why: &str| {
        measured.not_available.push(NotAvailable { figure: "ms_ssim_within_prompt".into(), why: why.into() });
    };
    let Some(prompts) = set.prompts() else {
        lacks("the folder has no metadata.jsonl with prompts");
        return Ok(());
    };
    let mut sorted: Vec<&String> = prompts.iter().collect();
    sorted.sort();
    if !sorted.windows(2).any(|pair| pair[0] == pair[1]) {
        lacks("no prompt has two images");
        return Ok(());
    }
    let figure =
        evaluation.ms_ssim(set, &prompts, args.pairs, progress).map_err(|error| set.explain(error))?;
    measured.card.figures.push(figure);
    Ok(())
}
