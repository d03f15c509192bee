//! Whether a sentence says that a finding is there, or that it is not.
//!
//! A few rules in the manner of NegEx (Chapman et al. 2001): a term of the finding is negated by a trigger before it
//! in the same sentence, or by one right behind it. It is meant for impressions and prompts of a few sentences, for
//! slicing a table; it is no report labeller.

use super::vocabulary::words;

/// What a text says of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mention {
    /// Nothing.
    Absent,
    /// That it is not there.
    Negated,
    /// That it may be there.
    Uncertain,
    /// That it is there.
    Affirmed,
}

/// Before a term: what follows is denied, to the end of the sentence or the next [`BREAKS`].
const NEGATIONS: [&str; 9] =
    ["no", "not", "without", "negative for", "free of", "clear of", "absence of", "denies", "neither"];
/// Begin like a negation and are none.
const FALSE_NEGATIONS: [&str; 9] = [
    "no change",
    "no interval change",
    "no significant change",
    "no significant interval change",
    "no increase",
    "no decrease",
    "not only",
    "not change",
    "not changed",
];
/// Behind a term.
const DENIALS: [&str; 11] = [
    "is absent",
    "absent",
    "is not seen",
    "not seen",
    "are not seen",
    "is not identified",
    "not identified",
    "has resolved",
    "have resolved",
    "resolved",
    "ruled out",
];
const DOUBTS: [&str; 11] = [
    "possible",
    "possibly",
    "questionable",
    "cannot exclude",
    "not excluded",
    "may",
    "might",
    "could",
    "suspected",
    "suspicious for",
    "versus",
];
const BREAKS: [&str; 6] = ["but", "however", "although", "though", "except", "otherwise"];
/// Said of the whole picture.
const NORMAL: [&str; 14] = [
    "normal chest",
    "normal radiograph",
    "chest is normal",
    "no finding",
    "no findings",
    "no acute disease",
    "no active disease",
    "no acute cardiopulmonary",
    "no active cardiopulmonary",
    "no acute pulmonary",
    "no acute abnormality",
    "no acute abnormalities",
    "no acute findings",
    "within normal limits",
];

/// What `text` says of `finding`; where it says several things, the strongest: affirmed, uncertain, negated.
///
/// ```
/// use cxr_metrics::labels::{Mention, mention};
///
/// let text = "No pneumothorax or pleural effusion. The heart is enlarged.";
/// assert_eq!(mention(text, "Effusion"), Mention::Negated);
/// assert_eq!(mention(text, "Cardiomegaly"), Mention::Affirmed);
/// assert_eq!(mention(text, "Nodule"), Mention::Absent);
/// ```
pub fn mention(text: &str, finding: &str) -> Mention {
    let (terms, denials) = words(finding);
    let mut strongest = Mention::Absent;
    for sentence in sentences(text) {
        if denials.iter().any(|phrase| find(&sentence, phrase, 0).is_some()) {
            strongest = strongest.max(Mention::Negated);
        }
        for term in &terms {
            let mut from = 0;
            while let Some((start, end)) = find(&sentence, term, from) {
                from = end;
                // Fluid around the heart is another finding.
                if start > 0 && sentence[start - 1] == "pericardial" {
                    continue;
                }
                strongest = strongest.max(said_of(&sentence, start, end));
            }
        }
    }
    strongest
}

/// Whether a text says of the picture as a whole that nothing is to be seen.
pub(super) fn says_normal(text: &str) -> bool {
    let sentences = sentences(text);
    let whole = |sentence: &Vec<String>| matches!(sentence.as_slice(), [one] if one == "normal");
    sentences.iter().any(|s| whole(s) || NORMAL.iter().any(|phrase| find(s, phrase, 0).is_some()))
}

fn said_of(sentence: &[String], start: usize, end: usize) -> Mention {
    let scope = (0..start).rev().find(|i| BREAKS.contains(&sentence[*i].as_str())).map_or(0, |i| i + 1);
    let before = &sentence[scope..start];
    let after = &sentence[end..];
    let has = |phrases: &[&str]| phrases.iter().any(|phrase| find(before, phrase, 0).is_some());
    if has(&DOUBTS) || starts(after, "not excluded") || starts(after, "cannot be excluded") {
        return Mention::Uncertain;
    }
    let negated = NEGATIONS.iter().any(|phrase| {
        let mut from = 0;
        while let Some((at, end)) = find(before, phrase, from) {
            if !FALSE_NEGATIONS.iter().any(|other| starts(&before[at..], other)) {
                return true;
            }
            from = end;
        }
        false
    });
    let denied = DENIALS.iter().any(|phrase| starts(after, phrase));
    if negated || denied { Mention::Negated } else { Mention::Affirmed }
}

/// Words in small letters, sentence by sentence.
fn sentences(text: &str) -> Vec<Vec<String>> {
    let split = |sentence: &str| -> Vec<String> {
        let letters = |c: char| !(c.is_alphanumeric() || c == '\'');
        sentence.split(letters).filter(|word| !word.is_empty()).map(str::to_lowercase).collect()
    };
    text.split(['.', ';', '\n', '!', '?', ':']).map(split).filter(|s| !s.is_empty()).collect()
}

/// Where a phrase begins and ends, from a word on.
fn find(sentence: &[String], phrase: &str, from: usize) -> Option<(usize, usize)> {
    let length = phrase.split(' ').count();
    (from..(sentence.len() + 1).saturating_sub(length))
        .find(|start| starts(&sentence[*start..], phrase))
        .map(|start| (start, start + length))
}

fn starts(sentence: &[String], phrase: &str) -> bool {
    let mut words = sentence.iter();
    phrase.split(' ').all(|word| words.next().is_some_and(|w| w == word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_are_read_as_they_are_meant() {
        use Mention::{Absent, Affirmed, Negated, Uncertain};
        for (text, finding, expected) in [
            ("Small left pleural effusion.", "Effusion", Affirmed),
            ("No pneumothorax, pleural effusion, or focal consolidation.", "Consolidation", Negated),
            ("No pneumothorax, pleural effusion, or focal consolidation.", "Pleural_Effusion", Negated),
            ("Without effusion but with cardiomegaly.", "Cardiomegaly", Affirmed),
            ("No effusion. Small nodule.", "Nodule", Affirmed),
            ("No right effusion. Small left effusion.", "Effusion", Affirmed),
            ("Effusion has resolved.", "Effusion", Negated),
            ("No change in small effusion.", "Effusion", Affirmed),
            ("No interval change in the effusion, and no pneumothorax.", "Pneumothorax", Negated),
            ("Possible pneumonia.", "Pneumonia", Uncertain),
            ("Pneumonia cannot be excluded.", "Pneumonia", Uncertain),
            ("Heart size is normal.", "Cardiomegaly", Negated),
            ("The heart is enlarged.", "Cardiomegaly", Affirmed),
            ("Pericardial effusion.", "Effusion", Absent),
            ("Massive effusion.", "Mass", Absent),
            ("Calcinosis of the aorta.", "Calcinosis", Affirmed),
            ("", "Effusion", Absent),
        ] {
            assert_eq!(mention(text, finding), expected, "{finding} in {text:?}");
        }
    }

    #[test]
    fn a_normal_picture_is_told() {
        for text in ["Normal chest.", "normal", "No acute cardiopulmonary abnormality.", "NO FINDING"] {
            assert!(says_normal(text), "{text}");
        }
        for text in ["Heart size is normal.", "Cardiomegaly.", ""] {
            assert!(!says_normal(text), "{text}");
        }
    }
}
