//! The Rust snippets of the README and of the guide are those that the crate's documentation runs.

use std::path::Path;

/// What a reader of the crate's documentation sees: hidden lines begin with a #.
fn shown() -> String {
    let source = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let lines = source.lines().filter_map(|line| line.strip_prefix("//!"));
    let lines = lines.map(|line| line.strip_prefix(' ').unwrap_or(line));
    let mut in_code = false;
    let seen = lines.filter(|line| {
        in_code ^= line.starts_with("```");
        !in_code || !line.starts_with("# ")
    });
    seen.collect::<Vec<_>>().join("\n")
}

fn snippets(document: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(document);
    let text = std::fs::read_to_string(path).unwrap();
    let blocks = text.split("```rust\n").skip(1).filter_map(|rest| rest.split("```").next());
    blocks.map(|block| block.trim_end().to_owned()).collect()
}

#[test]
fn the_documents_show_what_is_tested() {
    let shown = shown();
    for (document, count) in [("README.md", 1), ("docs/embedding.md", 5)] {
        let found = snippets(document);
        assert_eq!(found.len(), count, "{document}");
        for snippet in found {
            assert!(snippet.lines().count() > 3, "{document}: {snippet}");
            assert!(shown.contains(&snippet), "{document}: not in src/lib.rs:\n{snippet}");
        }
    }
    // and the other way round: no block of the crate's documentation is missing in the guide
    let blocks = shown.split("```").skip(1).step_by(2).count();
    assert_eq!(blocks, 5, "blocks of code in src/lib.rs");
}
