//! From what a table says to the sentence that a model reads: cleaning, de-identification marks, wording of
//! findings, and the prompt template.

use cxr_core::hash::stable_hash;
use cxr_core::random::Stream;
use serde::{Deserialize, Serialize};

use crate::DatasetError;

/// What to do with impressions that hold the de-identification mark `XXXX` of the Indiana collection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Deidentified {
    /// Keep the text as written, as the paper did.
    #[default]
    Keep,
    /// Remove the words that hold the mark; the sentence's final punctuation stays.
    Strip,
    /// Leave the pair out, and count it.
    Drop,
}

/// How the findings of a label table become an impression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wording {
    /// The first phrase of every finding, always.
    Single,
    /// One of several phrases, drawn by a stream of (seed, image name): the same image has the same impression
    /// wherever it stands in a table.
    Varied {
        /// The seed of the draw.
        seed: u64,
    },
}

impl Default for Wording {
    fn default() -> Self {
        Self::Varied { seed: 0 }
    }
}

/// The shape of a prompt: text with the placeholders `{impression}` (must occur) and `{view}` (a sentence naming the
/// projection, or nothing where it is unknown). White space is cleaned after filling in.
///
/// | Constructor | Template | Result |
/// |---|---|---|
/// | [`PromptTemplate::impression`] (default) | `{impression}` | `Cardiomegaly.` |
/// | [`PromptTemplate::with_view`] | `{view} {impression}` | `Frontal chest radiograph, PA view. Cardiomegaly.` |
///
/// ```
/// use cxr_dataset::PromptTemplate;
/// let template: PromptTemplate = "Chest X-ray. {view} {impression}".parse()?;
/// assert_eq!(template.render("Hernia.", Some("AP")), "Chest X-ray. Frontal chest radiograph, AP view. Hernia.");
/// assert_eq!(template.render("Hernia.", None), "Chest X-ray. Hernia.");
/// # Ok::<(), cxr_dataset::DatasetError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PromptTemplate(String);

impl Default for PromptTemplate {
    fn default() -> Self {
        Self::impression()
    }
}

impl PromptTemplate {
    /// The impression and nothing else, as the paper has it.
    pub fn impression() -> Self {
        Self("{impression}".into())
    }

    /// The view first, then the impression.
    pub fn with_view() -> Self {
        Self("{view} {impression}".into())
    }

    /// Fills in the placeholders; white space is cleaned.
    pub fn render(&self, impression: &str, view: Option<&str>) -> String {
        // One pass over the template, so that a brace inside an impression is text and no placeholder.
        let mut out = String::new();
        let mut rest = self.0.as_str();
        while let Some(at) = rest.find('{') {
            out.push_str(&rest[..at]);
            let end = rest[at..].find('}').map_or(rest.len(), |end| at + end + 1);
            match &rest[at..end] {
                "{impression}" => out.push_str(impression),
                _ => out.push_str(&view.map(view_sentence).unwrap_or_default()),
            }
            rest = &rest[end..];
        }
        out.push_str(rest);
        clean(&out)
    }
}

impl std::str::FromStr for PromptTemplate {
    type Err = DatasetError;

    fn from_str(text: &str) -> Result<Self, DatasetError> {
        let error = |reason: String| DatasetError::Template { template: text.into(), reason };
        let mut rest = text;
        let mut impressions = 0;
        while let Some(at) = rest.find(['{', '}']) {
            let placeholder = rest[at..].find('}').map_or(&rest[at..], |end| &rest[at..=at + end]);
            match placeholder {
                "{impression}" => impressions += 1,
                "{view}" => {}
                other => return Err(error(format!("unknown placeholder {other:?}"))),
            }
            rest = &rest[at + placeholder.len()..];
        }
        match impressions {
            1 => Ok(Self(text.into())),
            n => Err(error(format!("{{impression}} occurs {n} times, expected once"))),
        }
    }
}

impl TryFrom<String> for PromptTemplate {
    type Error = DatasetError;

    fn try_from(text: String) -> Result<Self, DatasetError> {
        text.parse()
    }
}

impl From<PromptTemplate> for String {
    fn from(template: PromptTemplate) -> Self {
        template.0
    }
}

/// The sentence that names a projection: `PA` -> `Frontal chest radiograph, PA view.`; a view that is not known by
/// name is quoted as it is.
pub fn view_sentence(view: &str) -> String {
    match view.trim().to_ascii_lowercase().as_str() {
        "" => String::new(),
        "pa" => "Frontal chest radiograph, PA view.".into(),
        "ap" => "Frontal chest radiograph, AP view.".into(),
        "frontal" => "Frontal chest radiograph.".into(),
        "lateral" | "ll" => "Lateral chest radiograph.".into(),
        _ => format!("Chest radiograph, {} view.", view.trim()),
    }
}

/// Joins words by single spaces; line breaks and other control characters count as white space.
pub fn clean(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control());
    words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Cleans white space and applies the policy; `None` means that the pair is to be dropped.
///
/// ```
/// use cxr_dataset::{Deidentified, impression::apply};
/// let text = "No comparison chest x-XXXX. Well-expanded  and clear lungs.";
/// assert_eq!(apply(text, Deidentified::Strip).unwrap(), "No comparison chest. Well-expanded and clear lungs.");
/// assert_eq!(apply(text, Deidentified::Drop), None);
/// ```
pub fn apply(impression: &str, policy: Deidentified) -> Option<String> {
    let text = clean(impression);
    match policy {
        Deidentified::Drop if text.contains(MARK) => None,
        Deidentified::Strip if text.contains(MARK) => Some(strip_marks(&text)),
        _ => Some(text),
    }
}

const MARK: &str = "XXXX";

fn strip_marks(text: &str) -> String {
    let mut out = String::new();
    for word in text.split(' ') {
        if !word.contains(MARK) {
            if !out.is_empty() {
                out.push(' ');
            }
            out.push_str(word);
        } else if let Some(end) = word.chars().last().filter(|c| ".;:?!".contains(*c))
            && out.ends_with(|c: char| c.is_alphanumeric() || c == ')')
        {
            // The mark goes, the end of the sentence stays, so that two sentences do not run together.
            out.push(end);
        }
    }
    if out.contains(char::is_alphanumeric) { out } else { String::new() }
}

/// A finding of NIH ChestX-ray14 and the ways an impression states it. The labels say neither side nor size, so no
/// phrase does; the first one is [`Wording::Single`]'s.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FindingPhrases {
    /// The label as the table writes it.
    pub label: &'static str,
    /// Whole sentences.
    pub phrases: &'static [&'static str],
}

/// The label of an image without any of the fourteen findings.
pub const NO_FINDING: &str = "No Finding";

/// All labels of NIH ChestX-ray14, in the order in which an impression states them.
pub const NIH_FINDINGS: [FindingPhrases; 15] = [
    FindingPhrases {
        label: NO_FINDING,
        phrases: &[
            "No acute cardiopulmonary abnormality.",
            "No acute cardiopulmonary findings.",
            "No acute cardiopulmonary disease.",
            "No acute cardiopulmonary process.",
            "No active disease.",
            "No evidence of active disease.",
        ],
    },
    FindingPhrases {
        label: "Pneumothorax",
        phrases: &["Pneumothorax.", "Pneumothorax is present.", "Findings consistent with pneumothorax."],
    },
    FindingPhrases {
        label: "Cardiomegaly",
        phrases: &["Cardiomegaly.", "Enlarged cardiac silhouette.", "The heart is enlarged."],
    },
    FindingPhrases {
        label: "Edema",
        phrases: &[
            "Pulmonary edema.",
            "Findings consistent with pulmonary edema.",
            "Interstitial edema pattern.",
        ],
    },
    FindingPhrases {
        label: "Effusion",
        phrases: &[
            "Pleural effusion.",
            "Pleural effusion is present.",
            "Findings consistent with pleural effusion.",
        ],
    },
    FindingPhrases {
        label: "Consolidation",
        phrases: &["Consolidation.", "Airspace consolidation.", "Pulmonary consolidation is present."],
    },
    FindingPhrases {
        label: "Pneumonia",
        phrases: &[
            "Pneumonia.",
            "Findings consistent with pneumonia.",
            "Airspace disease, compatible with pneumonia.",
        ],
    },
    FindingPhrases {
        label: "Infiltration",
        phrases: &[
            "Pulmonary infiltrate.",
            "Infiltrate is present.",
            "Airspace opacity, compatible with infiltrate.",
        ],
    },
    FindingPhrases {
        label: "Atelectasis",
        phrases: &["Atelectasis.", "Atelectasis is present.", "Findings consistent with atelectasis."],
    },
    FindingPhrases { label: "Mass", phrases: &["Lung mass.", "Pulmonary mass.", "Mass lesion is present."] },
    FindingPhrases {
        label: "Nodule",
        phrases: &["Pulmonary nodule.", "Lung nodule.", "Nodular opacity is present."],
    },
    FindingPhrases {
        label: "Emphysema",
        phrases: &["Emphysema.", "Emphysematous changes.", "Findings consistent with emphysema."],
    },
    FindingPhrases {
        label: "Fibrosis",
        phrases: &["Pulmonary fibrosis.", "Fibrotic changes.", "Findings consistent with fibrosis."],
    },
    FindingPhrases {
        label: "Pleural_Thickening",
        phrases: &["Pleural thickening.", "Pleural thickening is present.", "Thickened pleura."],
    },
    FindingPhrases {
        label: "Hernia",
        phrases: &["Hiatal hernia.", "Hernia.", "Findings consistent with hiatal hernia."],
    },
];

/// An impression that states exactly these findings, one sentence each, in the order of [`NIH_FINDINGS`] and not in
/// the table's, so that equal findings read alike.
///
/// # Errors
/// A message that names the label when a label is unknown, when there is none, or when `No Finding` stands beside a
/// finding.
pub fn from_nih_findings<'a>(
    labels: impl IntoIterator<Item = &'a str>,
    wording: Wording,
    image_name: &str,
) -> Result<String, String> {
    let labels: Vec<&str> = labels.into_iter().collect();
    let known = |label: &&&str| !NIH_FINDINGS.iter().any(|finding| finding.label == **label);
    if let Some(unknown) = labels.iter().find(known) {
        let all: Vec<_> = NIH_FINDINGS.iter().map(|finding| finding.label).collect();
        return Err(format!(
            "unknown finding {unknown:?}; expected some of {}, separated by |",
            all.join(", ")
        ));
    }
    if labels.is_empty() {
        return Err(format!("no finding given; write {NO_FINDING:?} for an image without one"));
    }
    if labels.contains(&NO_FINDING) && labels.iter().any(|label| *label != NO_FINDING) {
        return Err(format!("{NO_FINDING:?} stands beside other findings; remove one or the other"));
    }
    let mut stream = match wording {
        Wording::Single => None,
        Wording::Varied { seed } => Some(Stream::new(seed, "impression", stable_hash(image_name.as_bytes()))),
    };
    let mut sentences = Vec::new();
    // Every finding draws, stated or not, so that a change of one label leaves the wording of the others.
    for finding in NIH_FINDINGS {
        let choice = stream.as_mut().map_or(0, |stream| stream.below(finding.phrases.len() as u64) as usize);
        if labels.contains(&finding.label) {
            sentences.push(finding.phrases[choice]);
        }
    }
    Ok(sentences.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_is_cleaned_and_text_kept() {
        assert_eq!(clean("  Left\tlower \r\n lobe\u{a0}nodule.\u{0} "), "Left lower lobe nodule.");
        assert_eq!(
            apply("1.  Normal  chest x-XXXX.", Deidentified::Keep).unwrap(),
            "1. Normal chest x-XXXX."
        );
        assert_eq!(apply(" \n ", Deidentified::Keep).unwrap(), "");
    }

    #[test]
    fn marks_are_stripped_without_joining_sentences() {
        let strip = |text| apply(text, Deidentified::Strip).unwrap();
        assert_eq!(strip("Normal chest x-XXXX. Clear lungs."), "Normal chest. Clear lungs.");
        assert_eq!(strip("Clear lungs. XXXX XXXX."), "Clear lungs.");
        assert_eq!(strip("XXXX. XXXX"), "");
        assert_eq!(strip("Clear lungs."), "Clear lungs.");
        assert_eq!(apply("Clear lungs.", Deidentified::Drop).as_deref(), Some("Clear lungs."));
    }

    #[test]
    fn templates_are_checked() {
        for bad in
            ["", "x", "{impression} {impression}", "{impression} {age}", "{impression", "{impression} }"]
        {
            assert!(matches!(bad.parse::<PromptTemplate>(), Err(DatasetError::Template { .. })), "{bad:?}");
        }
        let json = serde_json::to_string(&PromptTemplate::with_view()).unwrap();
        assert_eq!(json, "\"{view} {impression}\"");
        assert_eq!(serde_json::from_str::<PromptTemplate>(&json).unwrap(), PromptTemplate::with_view());
        assert!(serde_json::from_str::<PromptTemplate>("\"{sex}\"").is_err());
    }

    #[test]
    fn braces_of_an_impression_are_text() {
        let template = PromptTemplate::with_view();
        assert_eq!(template.render("a {view} b", Some("lateral")), "Lateral chest radiograph. a {view} b");
        assert_eq!(template.render("Mass.", Some("oblique")), "Chest radiograph, oblique view. Mass.");
        assert_eq!(template.render("Mass.", None), "Mass.");
    }

    #[test]
    fn findings_are_stated_once_each_and_nothing_else() {
        let single = |labels: &[&str]| from_nih_findings(labels.iter().copied(), Wording::Single, "a.png");
        assert_eq!(single(&["Effusion", "Cardiomegaly"]).unwrap(), "Cardiomegaly. Pleural effusion.");
        assert_eq!(single(&[NO_FINDING]).unwrap(), "No acute cardiopulmonary abnormality.");
        for (labels, word) in [
            (&["Cardiomegalie"][..], "Cardiomegalie"),
            (&[], "no finding given"),
            (&["Mass", NO_FINDING], "beside other findings"),
        ] {
            assert!(single(labels).unwrap_err().contains(word), "{labels:?}");
        }
    }

    #[test]
    fn no_phrase_invents_side_or_size() {
        let invented =
            ["left", "right", "bilateral", "upper", "lower", "small", "large", "mild", "severe", "stable"];
        for finding in NIH_FINDINGS {
            assert!(finding.phrases.len() > 1);
            for phrase in finding.phrases {
                assert!(phrase.ends_with('.'), "{phrase}");
                let words: Vec<_> = phrase.to_lowercase().split_whitespace().map(str::to_owned).collect();
                assert!(!words.iter().any(|word| invented.contains(&word.trim_matches('.'))), "{phrase}");
            }
        }
    }

    #[test]
    fn wording_depends_on_seed_and_image_alone() {
        let of = |seed, name: &str| {
            from_nih_findings(["Effusion", "Mass"], Wording::Varied { seed }, name).unwrap()
        };
        assert_eq!(of(1, "a.png"), of(1, "a.png"));
        let texts: std::collections::BTreeSet<_> = (0..200).map(|i| of(1, &format!("{i}.png"))).collect();
        assert_eq!(texts.len(), 9, "every combination of three and three phrases occurs in 200 draws");
        assert!((0..20).any(|seed| of(seed, "a.png") != of(1, "a.png")));
        // The wording of one finding does not depend on which others stand beside it.
        let alone = from_nih_findings(["Mass"], Wording::Varied { seed: 1 }, "a.png").unwrap();
        assert!(of(1, "a.png").ends_with(&alone));
    }
}
