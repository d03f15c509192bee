//! The search for copies of training images: a table, and a sheet of the pairs that look like copies.

use std::path::Path;

use anyhow::{Context, Result};
use cxr::core::progress::Progress;
use cxr::metrics::memorization::{
    AuditConfig, AuditReport, AuditSide, Evidence, MemorizationAudit, Mirrored, write_png,
};
use cxr::metrics::{FeatureExtractor, FeatureSet};

use super::labels::Seen;
use super::set::Set;

/// Pairs on the sheet.
const SHOWN: usize = 24;

/// Looks for copies, and writes copies.csv and, where there are some, copies.png. `held_out` are real images of other
/// patients, by which it is calibrated, if they are enough.
///
/// # Errors
/// If an image cannot be read or a file not written, sets are too small, or `progress` asks to stop.
pub fn search(
    extractor: &dyn FeatureExtractor,
    fake: Seen<'_>,
    train: Seen<'_>,
    held_out: Option<Seen<'_>>,
    out: &Path,
    progress: &dyn Progress,
) -> Result<AuditReport> {
    let config = AuditConfig::default();
    let query = |Seen { set, extraction }: Seen<'_>| -> cxr::metrics::Result<AuditSide> {
        let mirrored: FeatureSet = extractor.features(&Mirrored(set), progress)?;
        let side = AuditSide::query(set, None, &config, progress)?;
        described(side, set)?.with_features(extractor.id(), extraction.features.clone(), Some(mirrored))
    };
    let of = |set: &Set, side: cxr::metrics::Result<AuditSide>| side.map_err(|error| set.explain(error));
    let made = of(fake.set, query(fake))?;
    let trained = AuditSide::reference(train.set, None, &config, progress)
        .and_then(|side| described(side, train.set))
        .and_then(|side| side.with_features(extractor.id(), train.extraction.features.clone(), None));
    let trained = of(train.set, trained)?;
    let needed = config.held_out_needed();
    let audit = MemorizationAudit::new(config.clone())?;
    let report = match held_out.filter(|seen| seen.set.files.len() >= needed) {
        Some(seen) => audit.run(&made, &trained, &of(seen.set, query(seen))?, progress)?,
        None => audit.run_uncalibrated(&made, &trained, progress)?,
    };
    report.write_csv(&out.join("copies.csv"), true, &made, &trained)?;
    let sheet = out.join("copies.png");
    match report.sheet(SHOWN, (&made, fake.set), (&trained, train.set))? {
        Some(picture) => write_png(&picture, &sheet)?,
        // Of an earlier run.
        None if sheet.exists() => {
            std::fs::remove_file(&sheet).with_context(|| format!("cannot remove {}", sheet.display()))?;
        }
        None => {}
    }
    Ok(report)
}

/// With patients and prompts, where the table has them.
fn described(side: AuditSide, set: &Set) -> cxr::metrics::Result<AuditSide> {
    let side = match set.groups() {
        Some(groups) => side.with_groups(groups)?,
        None => side,
    };
    match set.prompts() {
        Some(prompts) => side.with_prompts(prompts),
        None => Ok(side),
    }
}

/// What was found, in words.
pub fn words(report: &AuditReport) -> String {
    let with = |kinds: [Evidence; 2]| {
        report.flagged().filter(|entry| entry.evidence.iter().any(|kind| kinds.contains(kind))).count()
    };
    let mut out = format!(
        "{} synthetic images against {} training images; copies.csv has every image, copies.png the pairs.\n",
        report.n_synthetic, report.n_train
    );
    if let Some(calibration) = &report.calibration {
        out.push_str(&format!(
            "\n{} look like copies: {} in pixels, {} in features. By the same thresholds {} of {} held-out real images \
             do: with {:.0} % confidence no more than {} % of real images would.\n",
            report.flagged().count(),
            with([Evidence::PixelDistance, Evidence::PixelRatio]),
            with([Evidence::FeatureDistance, Evidence::FeatureRatio]),
            calibration.flagged,
            calibration.held_out,
            100.0 * calibration.confidence,
            100.0 * calibration.rate,
        ));
    }
    if let Some(prompts) = &report.prompts {
        out.push_str(&format!(
            "\nFlagged: of {} images whose prompt is a training report {}, {} of these beside an image with that report; of \
             {} images with other prompts {}.\n",
            prompts.training_prompts,
            prompts.training_prompts_flagged,
            prompts.training_prompts_flagged_with_their_picture,
            prompts.new_prompts,
            prompts.new_prompts_flagged,
        ));
    }
    for note in &report.notes {
        out.push_str(&format!("\n- {note}"));
    }
    out
}
