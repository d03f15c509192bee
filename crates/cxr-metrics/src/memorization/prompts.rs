//! Prompts that are training reports: a model that repeats a picture may have been asked for it.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

/// What a synthetic picture's prompt has to do with the training reports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptMatch {
    /// Training pictures whose report is the same text ([`normalized_prompt`]).
    pub training_reports: usize,
    /// Whether the report of the nearest training picture is.
    pub of_nearest: bool,
}

/// How flagged pictures and prompts from the training set go together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PromptSummary {
    /// Synthetic pictures whose prompt is a training report.
    pub training_prompts: usize,
    /// Of these, flagged.
    pub training_prompts_flagged: usize,
    /// Of the flagged ones, those whose nearest training picture has that report.
    pub training_prompts_flagged_with_their_picture: usize,
    /// Synthetic pictures with a prompt that no training picture has.
    pub new_prompts: usize,
    /// Of these, flagged.
    pub new_prompts_flagged: usize,
}

/// A prompt without what does not tell reports apart: case, blanks, and full stops at the end.
pub fn normalized_prompt(text: &str) -> String {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    words.trim_end_matches(['.', ' ']).to_lowercase()
}

/// Training reports by their normalized text.
pub(super) struct Reports {
    normalized: Vec<String>,
    counts: HashMap<String, usize>,
}

impl Reports {
    pub(super) fn new(reports: &[String]) -> Self {
        let normalized: Vec<String> = reports.iter().map(|text| normalized_prompt(text)).collect();
        let mut counts = HashMap::new();
        for text in &normalized {
            *counts.entry(text.clone()).or_default() += 1;
        }
        Self { normalized, counts }
    }

    pub(super) fn find(&self, prompt: &str, nearest: usize) -> PromptMatch {
        let prompt = normalized_prompt(prompt);
        // An empty prompt asks for no picture in particular, however many reports are empty.
        let found = if prompt.is_empty() { 0 } else { self.counts.get(&prompt).copied().unwrap_or(0) };
        PromptMatch { training_reports: found, of_nearest: found > 0 && self.normalized[nearest] == prompt }
    }
}

impl PromptSummary {
    pub(super) fn add(&mut self, found: &PromptMatch, flagged: bool) {
        let flagged = usize::from(flagged);
        if found.training_reports > 0 {
            self.training_prompts += 1;
            self.training_prompts_flagged += flagged;
            self.training_prompts_flagged_with_their_picture += flagged * usize::from(found.of_nearest);
        } else {
            self.new_prompts += 1;
            self.new_prompts_flagged += flagged;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_report_is_found_whatever_its_case_and_blanks() {
        let reports = ["No  acute disease.", "Cardiomegaly", "no acute disease", " "].map(String::from);
        let reports = Reports::new(&reports);
        let at = |prompt: &str, nearest| {
            let found = reports.find(prompt, nearest);
            (found.training_reports, found.of_nearest)
        };
        assert_eq!(at(" NO ACUTE\ndisease . ", 2), (2, true));
        assert_eq!(at("No acute disease", 1), (2, false));
        assert_eq!(at("No acute diseases", 0), (0, false));
        assert_eq!(at("", 3), (0, false));
    }
}
