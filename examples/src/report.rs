//! The report page: one HTML file that carries its pictures, and the same in Markdown.

use std::path::{Path, PathBuf};

use anyhow::Context;
use base64::Engine;
use serde::Serialize;

/// What a report shows.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Heading.
    pub title: String,
    /// A few sentences on what was done, and what the numbers can and cannot show.
    pub summary: Vec<String>,
    /// The paper's table: base, adapted, difference.
    pub comparison: Vec<Comparison>,
    /// Pictures with captions.
    pub figures: Vec<Figure>,
    /// Further tables: data, leakage, settings.
    pub tables: Vec<Table>,
}

/// One measure of the base's and the adapted model's pictures.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// Name of the measure, with its extractor.
    pub name: String,
    /// Of the base model's pictures, with its interval.
    pub base: String,
    /// Of the adapted model's pictures, with its interval.
    pub adapted: String,
    /// Change from base to adapted.
    pub difference: String,
    /// Of real training pictures against the same held-out ones: what a perfect model would reach.
    pub floor: String,
}

/// A picture with a caption.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// What it shows.
    pub caption: String,
    /// The PNG file; carried inside the page.
    pub path: PathBuf,
    /// Takes the page's width; others stand side by side.
    pub wide: bool,
}

/// A table with a heading.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Table {
    /// Heading.
    pub title: String,
    /// Names of the columns; empty for rows of a name and a value.
    pub head: Vec<String>,
    /// Cells of each row, the first of which names it.
    pub rows: Vec<Vec<String>>,
    /// What a reader has to know, below the table.
    pub notes: Vec<String>,
}

impl Table {
    /// Rows of a name and a value.
    pub fn of_values(title: &str, rows: Vec<(String, String)>) -> Self {
        let rows = rows.into_iter().map(|(name, value)| vec![name, value]).collect();
        Self { title: title.into(), rows, ..Self::default() }
    }
}

const HTML: &str = include_str!("report.html.jinja");
const MARKDOWN: &str = include_str!("report.md.jinja");

/// Writes `report.html` and `report.md` into `folder`.
///
/// # Errors
/// If a picture cannot be read or a file not written.
pub fn write(report: &Report, folder: &Path) -> anyhow::Result<()> {
    #[derive(Serialize)]
    struct Page<'a> {
        report: &'a Report,
        pictures: Vec<Embedded>,
    }
    #[derive(Serialize)]
    struct Embedded {
        caption: String,
        wide: bool,
        file: String,
        data: String,
    }
    let pictures = report
        .figures
        .iter()
        .map(|figure| {
            let bytes = std::fs::read(&figure.path)
                .with_context(|| format!("cannot read {}", figure.path.display()))?;
            let file = figure.path.strip_prefix(folder).unwrap_or(&figure.path).display().to_string();
            let data = base64::engine::general_purpose::STANDARD.encode(bytes);
            Ok(Embedded { caption: figure.caption.clone(), wide: figure.wide, file, data })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let page = Page { report, pictures };
    let mut environment = minijinja::Environment::new();
    environment.add_template("report.html", HTML)?;
    environment.add_template("report.md", MARKDOWN)?;
    for name in ["report.html", "report.md"] {
        let text = environment.get_template(name)?.render(minijinja::value::Serde(&page))?;
        let path = folder.join(name);
        cxr::core::atomic::write_bytes(&path, text.as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_carries_its_pictures_and_escapes_text() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dot.png");
        image::RgbImage::new(2, 2).save(&path).unwrap();
        let report = Report {
            title: "A <b>title</b>".into(),
            summary: vec!["One line.".into()],
            comparison: vec![Comparison {
                name: "distance".into(),
                base: "2".into(),
                adapted: "1".into(),
                difference: "-1".into(),
                floor: "0.5".into(),
            }],
            figures: vec![Figure { caption: "a dot".into(), path: path.clone(), wide: true }],
            tables: vec![
                Table::of_values("Settings", vec![("seed".into(), "7 | 8".into())]),
                Table {
                    title: "Findings".into(),
                    head: vec!["Finding".into(), "A".into(), "B".into()],
                    rows: vec![vec!["Mass".into(), "0.5".into(), "0.6".into()]],
                    notes: vec!["Few pictures.".into()],
                },
            ],
        };
        write(&report, folder.path()).unwrap();
        let html = std::fs::read_to_string(folder.path().join("report.html")).unwrap();
        let picture = base64::engine::general_purpose::STANDARD.encode(std::fs::read(&path).unwrap());
        assert!(html.contains(&picture), "the picture is not in the page");
        assert!(html.contains("A &lt;b&gt;title") && !html.contains("A <b>title"), "text is not escaped");
        let markdown = std::fs::read_to_string(folder.path().join("report.md")).unwrap();
        assert!(markdown.contains("| distance | 2 | 1 | -1 | 0.5 |"), "{markdown}");
        assert!(markdown.contains("![a dot](dot.png)"), "{markdown}");
        assert!(markdown.contains("| seed | 7 \\| 8 |"), "{markdown}");
        assert!(
            markdown.contains("| Finding | A | B |\n|---|---|---|\n| Mass | 0.5 | 0.6 |\n"),
            "{markdown}"
        );
        for text in ["<th>B</th>", "<td>0.6</td>", "Few pictures."] {
            assert!(html.contains(text), "no {text}");
        }

        std::fs::remove_file(&path).unwrap();
        let error = write(&report, folder.path()).unwrap_err().to_string();
        assert!(error.contains("dot.png"), "{error}");
    }
}
