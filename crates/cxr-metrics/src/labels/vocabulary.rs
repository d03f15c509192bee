//! The words by which reports and label files call a finding.

/// One finding and its words, in small letters.
struct Entry {
    name: &'static str,
    /// Any of them mentions it.
    terms: &'static [&'static str],
    /// Any of them denies it without a negation before a term.
    denials: &'static [&'static str],
}

const fn entry(name: &'static str, terms: &'static [&'static str]) -> Entry {
    Entry { name, terms, denials: &[] }
}

const ENTRIES: [Entry; 18] = [
    entry("atelectasis", &["atelectasis", "atelectases", "atelectatic"]),
    entry("consolidation", &["consolidation", "consolidations", "consolidative"]),
    entry("infiltration", &["infiltration", "infiltrate", "infiltrates", "infiltrations"]),
    entry("pneumothorax", &["pneumothorax", "pneumothoraces"]),
    entry("edema", &["edema", "oedema"]),
    entry("emphysema", &["emphysema", "emphysematous"]),
    entry("fibrosis", &["fibrosis", "fibrotic"]),
    entry("effusion", &["pleural effusion", "pleural effusions", "effusion", "effusions"]),
    entry("pneumonia", &["pneumonia", "pneumonias"]),
    entry("pleural thickening", &["pleural thickening", "thickened pleura"]),
    Entry {
        name: "cardiomegaly",
        terms: &[
            "cardiomegaly",
            "enlarged heart",
            "heart is enlarged",
            "heart size is enlarged",
            "heart is mildly enlarged",
            "cardiac enlargement",
            "enlarged cardiac silhouette",
            "cardiac silhouette is enlarged",
        ],
        denials: &[
            "heart size is normal",
            "normal heart size",
            "heart size normal",
            "heart is normal in size",
        ],
    },
    entry("nodule", &["nodule", "nodules", "nodular"]),
    entry("mass", &["mass", "masses"]),
    entry("hernia", &["hernia", "hernias"]),
    entry("lung lesion", &["lung lesion", "lung lesions", "pulmonary lesion", "pulmonary lesions"]),
    entry("fracture", &["fracture", "fractures", "fractured"]),
    entry("lung opacity", &["opacity", "opacities", "lung opacity", "lung opacities"]),
    entry(
        "enlarged cardiomediastinum",
        &["enlarged cardiomediastinum", "widened mediastinum", "mediastinal widening"],
    ),
];

/// A name in small letters, with single blanks for blanks, `_` and `-`.
pub(super) fn plain(name: &str) -> String {
    let words =
        name.split(|c: char| c.is_whitespace() || c == '_' || c == '-').filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ").to_lowercase()
}

fn known(plain_name: &str) -> Option<&'static Entry> {
    ENTRIES.iter().find(|entry| entry.name == plain_name || entry.terms.contains(&plain_name))
}

/// Whether two names are of one finding: `Pleural_Effusion` and `effusion` are.
pub fn same_finding(a: &str, b: &str) -> bool {
    let (a, b) = (plain(a), plain(b));
    a == b || known(&a).is_some_and(|entry| known(&b).is_some_and(|other| other.name == entry.name))
}

/// The terms of a finding, and what denies it; a finding that is not known has its own name alone.
pub(super) fn words(finding: &str) -> (Vec<String>, &'static [&'static str]) {
    let name = plain(finding);
    match known(&name) {
        Some(entry) => (entry.terms.iter().map(|term| term.to_string()).collect(), entry.denials),
        None => (vec![name], &[]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_one_finding_are_the_same() {
        assert!(same_finding("Pleural Effusion", "Effusion"));
        assert!(same_finding("Pleural_Thickening", "pleural-thickening"));
        assert!(same_finding("Calcinosis", "calcinosis"));
        assert!(!same_finding("Mass", "Nodule"));
        assert!(!same_finding("Calcinosis", "Effusion"));
    }

    #[test]
    fn no_term_belongs_to_two_findings() {
        let mut all: Vec<&str> =
            ENTRIES.iter().flat_map(|e| e.terms.iter().chain(e.denials)).copied().collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
        assert!(ENTRIES.iter().all(|e| e.terms.iter().all(|term| plain(term) == *term)));
    }
}
