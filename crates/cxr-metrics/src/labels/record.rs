//! One picture and what is known of it.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::mention::{Mention, mention, says_normal};
use super::vocabulary::{plain, same_finding};

/// A picture and what is known of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Name in the table.
    pub name: String,
    /// Where the picture is.
    pub path: PathBuf,
    /// Prompt of a synthetic picture, report of a real one.
    pub prompt: Option<String>,
    /// Patient or study.
    pub group: Option<String>,
    /// Projection as the table has it, e.g. `PA`.
    pub view: Option<String>,
    /// Side of the split (`train`, `test`), as `prepare` writes it.
    pub side: Option<String>,
    /// The findings that the picture has; none where that is not known.
    pub labels: Option<BTreeSet<String>>,
}

/// From where the picture was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ViewGroup {
    /// From the front or the back.
    Frontal,
    /// From the side.
    Lateral,
}

impl ImageRecord {
    /// Whether the picture is meant to show a finding.
    ///
    /// With labels: whether it is among them; labels are taken to be complete. Without, by the prompt: what it
    /// affirms is there, what it denies is not, and nothing is where it calls the picture normal. None where
    /// neither says anything, and where the prompt is in doubt.
    pub fn has(&self, finding: &str) -> Option<bool> {
        if let Some(labels) = &self.labels {
            return Some(labels.iter().any(|label| same_finding(label, finding)));
        }
        let prompt = self.prompt.as_deref()?;
        match mention(prompt, finding) {
            Mention::Affirmed => Some(true),
            Mention::Negated => Some(false),
            Mention::Uncertain => None,
            Mention::Absent => says_normal(prompt).then_some(false),
        }
    }

    /// Whether the prompt says in words that the finding is not there.
    pub fn denies(&self, finding: &str) -> bool {
        self.prompt.as_deref().is_some_and(|prompt| mention(prompt, finding) == Mention::Negated)
    }

    /// Frontal or lateral; none where the view is not known or another.
    pub fn view_group(&self) -> Option<ViewGroup> {
        let view = plain(self.view.as_deref()?);
        let first = view.split(' ').next().unwrap_or_default();
        match first {
            "pa" | "ap" | "frontal" | "posteroanterior" | "anteroposterior" | "front" => {
                Some(ViewGroup::Frontal)
            }
            "lateral" | "ll" | "rl" | "lat" | "l" | "side" => Some(ViewGroup::Lateral),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(prompt: Option<&str>, labels: Option<&[&str]>) -> ImageRecord {
        ImageRecord {
            prompt: prompt.map(str::to_owned),
            labels: labels.map(|labels| labels.iter().map(|l| l.to_string()).collect()),
            ..ImageRecord::default()
        }
    }

    #[test]
    fn labels_come_before_the_prompt_and_the_prompt_before_nothing() {
        let labelled = record(Some("Cardiomegaly."), Some(&["Pleural Effusion"]));
        assert_eq!((labelled.has("Effusion"), labelled.has("Cardiomegaly")), (Some(true), Some(false)));
        let prompted = record(Some("Cardiomegaly without effusion, possible mass."), None);
        let has = ["Cardiomegaly", "Effusion", "Mass", "Nodule"].map(|f| prompted.has(f));
        assert_eq!(has, [Some(true), Some(false), None, None]);
        assert!(prompted.denies("Effusion") && !prompted.denies("Nodule"));
        assert_eq!(record(Some("Normal chest."), None).has("Nodule"), Some(false));
        assert_eq!(record(None, None).has("Nodule"), None);
        assert_eq!(record(None, Some(&[])).has("Nodule"), Some(false));
    }

    #[test]
    fn views_fall_into_two_groups() {
        let group = |view: &str| ImageRecord { view: Some(view.into()), ..Default::default() }.view_group();
        for view in ["PA", "AP", "AP Supine", "Frontal", "ap_erect"] {
            assert_eq!(group(view), Some(ViewGroup::Frontal), "{view}");
        }
        assert_eq!((group("Lateral"), group("LL")), (Some(ViewGroup::Lateral), Some(ViewGroup::Lateral)));
        assert_eq!((group("oblique"), group("")), (None, None));
        assert_eq!(ImageRecord::default().view_group(), None);
    }
}
