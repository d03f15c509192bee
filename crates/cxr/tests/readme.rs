//! The README's Rust snippet is the one that the crate's documentation runs.

use std::path::Path;

#[test]
fn the_readme_shows_what_is_tested() {
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(crate_folder.join("../../README.md")).unwrap();
    let source = std::fs::read_to_string(crate_folder.join("src/lib.rs")).unwrap();
    // what a reader of the documentation sees: hidden lines begin with a #
    let shown: Vec<&str> = source
        .lines()
        .filter_map(|line| line.strip_prefix("//!"))
        .map(|line| line.strip_prefix(' ').unwrap_or(line))
        .filter(|line| !line.starts_with("# "))
        .collect();
    let snippet = readme.split("```rust\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    assert!(snippet.lines().count() > 5, "{snippet}");
    assert!(shown.join("\n").contains(snippet.trim_end()), "not in src/lib.rs:\n{snippet}");
}
