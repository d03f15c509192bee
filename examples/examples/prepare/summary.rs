//! What a person reads at the end.

use std::collections::BTreeMap;
use std::fmt::Write;

use cxr::dataset::{ImageCache, PreparationReport};

/// Labels that are printed; report.json has all of them.
const LABELS: usize = 20;

pub(crate) fn text(report: &PreparationReport, left_out: usize, cache: Option<&ImageCache>) -> String {
    let mut text = String::new();
    let mut line = |name: &str, count: usize, note: &str| {
        let _ = writeln!(text, "{name:<36}{count:>7}{}{note}", if note.is_empty() { "" } else { "  " });
    };
    line("read", report.rows_read, &format!("rows, layout {}", report.source));
    for (kind, count) in &report.skipped {
        line(&format!("  skipped, {kind}"), *count, "");
    }
    if report.dropped_deidentified > 0 {
        line("  dropped, XXXX", report.dropped_deidentified, "");
    }
    if left_out > 0 {
        line("  other view or label", left_out, "");
    }
    if let Some(filter) = &report.token_filter {
        line("  empty", filter.empty, "");
        let longest = filter.longest();
        line(
            "  too long",
            filter.too_long,
            &format!("more than {} tokens; the longest has {longest}", filter.max_length),
        );
    }
    let groups =
        format!("pairs in {} group(s), {} distinct impressions", report.groups, report.distinct_impressions);
    line("kept", report.kept, &groups);
    for (view, count) in &report.per_view {
        line(&format!("  view {view}"), *count, "");
    }
    for (label, count) in most(&report.per_label) {
        line(&format!("  label {label}"), count, "");
    }
    if report.per_label.len() > LABELS {
        let _ = writeln!(text, "  and {} more labels, see report.json", report.per_label.len() - LABELS);
    }
    if let Some(cache) = cache {
        let counts = cache.counts();
        let _ = writeln!(
            text,
            "cache: {} made ({} of them damaged before), {} there",
            counts.made, counts.rebuilt, counts.kept
        );
    }
    if let Some(split) = &report.split {
        let _ = writeln!(
            text,
            "split {}, seed {}: train {} pairs of {} group(s), test {} of {}",
            serde_json::to_string(&split.config.rule).unwrap_or_default().trim_matches('"'),
            split.config.seed,
            split.train,
            split.train_groups,
            split.test,
            split.test_groups
        );
    }
    for note in report.leakage.iter().flat_map(|leakage| &leakage.notes) {
        let _ = writeln!(text, "  {note}");
    }
    text
}

/// The most common ones first.
fn most(counts: &BTreeMap<String, usize>) -> impl Iterator<Item = (&str, usize)> {
    let mut all: Vec<_> = counts.iter().map(|(name, count)| (name.as_str(), *count)).collect();
    all.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    all.into_iter().take(LABELS)
}
