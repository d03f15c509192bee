//! Scores of one finding against its labels: area under the ROC curve, sensitivity, thresholds; and intervals from
//! resampled patients.

use std::collections::HashMap;

use cxr_core::progress::Silent;
use cxr_core::random::Stream;

use crate::error::Result;
use crate::interval::{BootstrapConfig, Interval, repeat};
use crate::resample::with_replacement;

/// Scores with their labels, sorted once so that a resampled figure costs one pass.
pub(crate) struct Ranked {
    /// Score, label and position of each picture, by rising score.
    rows: Vec<(f32, bool, usize)>,
    pub(crate) positives: usize,
    pub(crate) negatives: usize,
    clusters: Clusters,
}

impl Ranked {
    /// `groups` says which pictures are drawn together; a picture without one stands for itself.
    pub(crate) fn new(scores: &[f32], labels: &[bool], groups: &[Option<&str>]) -> Self {
        let mut rows: Vec<(f32, bool, usize)> =
            scores.iter().zip(labels).enumerate().map(|(i, (s, l))| (*s, *l, i)).collect();
        rows.sort_by(|a, b| a.0.total_cmp(&b.0));
        let positives = labels.iter().filter(|label| **label).count();
        Self { rows, positives, negatives: labels.len() - positives, clusters: Clusters::of(groups) }
    }

    /// Chance that a positive scores above a negative, ties counted half; none without both.
    pub(crate) fn area(&self, weights: Option<&[f64]>) -> Option<f64> {
        let weight = |i: usize| weights.map_or(1.0, |w| w[i]);
        let (mut wins, mut below, mut above) = (0.0, 0.0, 0.0);
        // `==` rather than the total order: 0.0 and -0.0 tie.
        for tied in self.rows.chunk_by(|a, b| a.0 == b.0) {
            let sum = |label| tied.iter().filter(|row| row.1 == label).map(|row| weight(row.2)).sum::<f64>();
            let (p, n) = (sum(true), sum(false));
            wins += p * (below + 0.5 * n);
            below += n;
            above += p;
        }
        (below > 0.0 && above > 0.0).then(|| wins / (below * above))
    }

    /// Share of pictures of one label that score `threshold` or more; none without such pictures.
    pub(crate) fn share_above(&self, label: bool, threshold: f32, weights: Option<&[f64]>) -> Option<f64> {
        let weight = |i: usize| weights.map_or(1.0, |w| w[i]);
        let (mut above, mut all) = (0.0, 0.0);
        for (score, _, i) in self.rows.iter().filter(|row| row.1 == label) {
            all += weight(*i);
            above += if *score >= threshold { weight(*i) } else { 0.0 };
        }
        (all > 0.0).then(|| above / all)
    }

    /// The threshold with the largest sum of sensitivity and specificity (Youden 1950), halfway between two
    /// scores; the lower one of equals. None without both labels.
    pub(crate) fn youden(&self) -> Option<f32> {
        if self.positives == 0 || self.negatives == 0 {
            return None;
        }
        let (mut below_p, mut below_n, mut last) = (0.0, 0.0, f32::NEG_INFINITY);
        let mut best: Option<(f64, f32)> = None;
        for tied in self.rows.chunk_by(|a, b| a.0 == b.0) {
            let score = tied[0].0;
            let sum = (1.0 - below_p / self.positives as f64) + below_n / self.negatives as f64;
            let threshold = if last.is_finite() { 0.5 * last + 0.5 * score } else { score };
            if best.is_none_or(|(most, _)| sum > most) {
                best = Some((sum, threshold));
            }
            let p = tied.iter().filter(|row| row.1).count() as f64;
            below_p += p;
            below_n += tied.len() as f64 - p;
            last = score;
        }
        best.map(|(_, threshold)| threshold)
    }

    /// The lowest score as threshold with at least this share of negatives below it; none without negatives, or
    /// where the negatives' highest score would have to be passed.
    pub(crate) fn at_specificity(&self, specificity: f64) -> Option<f32> {
        let mut below = 0.0;
        for tied in self.rows.chunk_by(|a, b| a.0 == b.0) {
            if self.negatives > 0 && below >= specificity * self.negatives as f64 - 1e-9 {
                return Some(tied[0].0);
            }
            below += tied.iter().filter(|row| !row.1).count() as f64;
        }
        None
    }

    /// Bootstrap interval of a figure over groups of pictures. A draw for which there is no figure (no positive in
    /// it, say) is drawn again.
    pub(crate) fn interval(
        &self,
        purpose: &str,
        estimate: f64,
        config: &BootstrapConfig,
        figure: impl Fn(&[f64]) -> Option<f64> + Sync,
    ) -> Result<Interval> {
        config.check()?;
        let values = repeat(purpose, config.replicates, &Silent, |b| {
            let mut stream = Stream::new(config.seed, &format!("bootstrap/{purpose}"), b as u64);
            loop {
                if let Some(value) = figure(&self.clusters.draw(&mut stream, self.rows.len())) {
                    return Ok(value);
                }
            }
        })?;
        Ok(config.interval(estimate, values))
    }
}

/// Pictures that are drawn together.
struct Clusters(Vec<Vec<usize>>);

impl Clusters {
    fn of(groups: &[Option<&str>]) -> Self {
        let mut known: HashMap<&str, usize> = HashMap::new();
        let mut clusters: Vec<Vec<usize>> = Vec::new();
        for (i, group) in groups.iter().enumerate() {
            let next = clusters.len();
            let at = group.map_or(next, |group| *known.entry(group).or_insert(next));
            if at == next {
                clusters.push(Vec::new());
            }
            clusters[at].push(i);
        }
        Self(clusters)
    }

    /// How often each picture is in one draw of as many clusters as there are.
    fn draw(&self, stream: &mut Stream, pictures: usize) -> Vec<f64> {
        let mut weights = vec![0.0; pictures];
        for cluster in with_replacement(stream, self.0.len()) {
            self.0[cluster].iter().for_each(|i| weights[*i] += 1.0);
        }
        weights
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auroc::auroc;

    fn scores(seed: u64, n: usize) -> (Vec<f32>, Vec<bool>) {
        let mut stream = Stream::new(seed, "scores", 0);
        (0..n).map(|i| ((2.0 * stream.normal()).round() + f32::from(i % 3 == 0), i % 3 == 0)).unzip()
    }

    #[test]
    fn areas_are_those_of_auroc_and_weights_are_repetitions() {
        let (s, l) = scores(0, 60);
        let ranked = Ranked::new(&s, &l, &[None; 60]);
        assert!((ranked.area(None).unwrap() - auroc(&s, &l).unwrap().value).abs() < 1e-12);
        let weights: Vec<f64> = (0..60).map(|i| f64::from(i % 4)).collect();
        let repeated: Vec<usize> = (0..60).flat_map(|i| vec![i; i % 4]).collect();
        let (rs, rl): (Vec<f32>, Vec<bool>) = repeated.iter().map(|i| (s[*i], l[*i])).unzip();
        assert!((ranked.area(Some(&weights)).unwrap() - auroc(&rs, &rl).unwrap().value).abs() < 1e-12);
        let above = repeated.iter().filter(|i| l[**i] && s[**i] >= 1.0).count() as f64;
        let all = repeated.iter().filter(|i| l[**i]).count() as f64;
        assert_eq!(ranked.share_above(true, 1.0, Some(&weights)), Some(above / all));
        assert_eq!(Ranked::new(&s, &[false; 60], &[None; 60]).area(None), None);
    }

    #[test]
    fn thresholds_are_the_best_of_all() {
        let (s, l) = scores(1, 90);
        let ranked = Ranked::new(&s, &l, &[None; 90]);
        let sum = |t: f32| {
            ranked.share_above(true, t, None).unwrap() + 1.0 - ranked.share_above(false, t, None).unwrap()
        };
        let best = (-40..40).map(|t| sum(t as f32 / 4.0 + 0.1)).fold(0.0, f64::max);
        assert!((sum(ranked.youden().unwrap()) - best).abs() < 1e-12);
        let threshold = ranked.at_specificity(0.9).unwrap();
        assert!(ranked.share_above(false, threshold, None).unwrap() <= 0.1);
        assert!(ranked.share_above(false, threshold - 1.0, None).unwrap() > 0.1, "and no lower one would do");
        assert_eq!(Ranked::new(&s, &[true; 90], &[None; 90]).youden(), None);
        assert_eq!(Ranked::new(&[1.0, 2.0], &[true, false], &[None; 2]).at_specificity(1.0), None);
    }

    #[test]
    fn intervals_are_wider_where_pictures_come_in_groups() {
        let (s, l) = scores(2, 120);
        let names: Vec<String> = (0..120).map(|i| format!("{}", i / 12 * 3 + i % 3)).collect();
        let groups: Vec<Option<&str>> = names.iter().map(|n| Some(n.as_str())).collect();
        // Every picture of a group is the same picture.
        let same: Vec<f32> = (0..120).map(|i| s[i / 12 * 12 + i % 3]).collect();
        let config = BootstrapConfig { replicates: 400, ..BootstrapConfig::default() };
        let width = |groups: &[Option<&str>]| {
            let ranked = Ranked::new(&same, &l, groups);
            let estimate = ranked.area(None).unwrap();
            let interval = ranked.interval("test", estimate, &config, |w| ranked.area(Some(w))).unwrap();
            assert!(interval.low < estimate && estimate < interval.high, "{interval:?}");
            interval.high - interval.low
        };
        let (alone, together) = (width(&[None; 120]), width(&groups));
        assert!(together > 1.5 * alone, "{together} against {alone}");
    }
}
