//! Prompts from a file, with what travels along.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

/// Columns that may hold the prompt, the first that is there.
const TEXT: [&str; 3] = ["text", "prompt", "impression"];

/// A prompt and what the file says of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Item {
    pub(crate) text: String,
    /// Seed of its first picture.
    pub(crate) seed: Option<u64>,
    /// How many pictures.
    pub(crate) count: Option<usize>,
    pub(crate) labels: Vec<String>,
    pub(crate) view: Option<String>,
    /// The report that it is from: the pictures' group, which a split keeps whole.
    pub(crate) uid: Option<String>,
}

/// The prompts of a file, and how many rows had none.
pub(crate) struct Prompts {
    pub(crate) items: Vec<Item>,
    pub(crate) empty: usize,
}

/// Reads `.txt` (one prompt on each line), `.csv` or `.jsonl` (a prompt in `column`, or one of [`TEXT`]; maybe
/// `seed`, `count`, `labels`, `view`, `uid`).
pub(crate) fn read(file: &Path, column: Option<&str>) -> Result<Prompts> {
    let content = std::fs::read_to_string(file)?;
    let content = content.trim_start_matches('\u{feff}');
    let rows: Vec<(usize, Map<String, Value>)> =
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("txt") => {
                let row = |line: &str| Map::from_iter([("text".to_string(), Value::from(line))]);
                numbered(content).map(|(number, line)| (number, row(line))).collect()
            }
            Some("jsonl") => numbered(content)
                .map(|(number, line)| {
                    let row = serde_json::from_str(line)
                        .with_context(|| format!("line {number}: no JSON object"))?;
                    Ok((number, row))
                })
                .collect::<Result<_>>()?,
            Some("csv") => csv_rows(content)?,
            _ => bail!("expected a name that ends in .txt, .csv or .jsonl"),
        };
    ensure!(!rows.is_empty(), "there is no prompt in it");
    let known = |row: &Map<String, Value>, name: &str| row.contains_key(name);
    let column = match column {
        Some(name) => name,
        None => TEXT
            .into_iter()
            .find(|name| rows.iter().any(|(_, row)| known(row, name)))
            .with_context(|| format!("no column {}; name it with --text-col", TEXT.join(", ")))?,
    };
    ensure!(rows.iter().any(|(_, row)| known(row, column)), "there is no column {column}");
    let mut prompts = Prompts { items: Vec::new(), empty: 0 };
    for (number, row) in &rows {
        let item = item(row, column).with_context(|| format!("line {number}"))?;
        match item.text.is_empty() {
            true => prompts.empty += 1,
            false => prompts.items.push(item),
        }
    }
    ensure!(!prompts.items.is_empty(), "column {column} is empty in all {} rows", rows.len());
    Ok(prompts)
}

/// Lines that are not blank, numbered from 1.
fn numbered(content: &str) -> impl Iterator<Item = (usize, &str)> {
    content.lines().enumerate().map(|(i, line)| (i + 1, line.trim())).filter(|(_, line)| !line.is_empty())
}

fn csv_rows(content: &str) -> Result<Vec<(usize, Map<String, Value>)>> {
    let mut reader = csv::Reader::from_reader(content.as_bytes());
    let names: Vec<String> = reader.headers()?.iter().map(|name| name.trim().to_string()).collect();
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record?;
        let number = record.position().map_or(0, |position| position.line() as usize);
        let row = names.iter().cloned().zip(record.iter().map(Value::from)).collect();
        rows.push((number, row));
    }
    Ok(rows)
}

fn item(row: &Map<String, Value>, column: &str) -> Result<Item> {
    let text = |name: &str| -> Result<Option<String>> {
        let text = match row.get(name) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(text)) => text.trim().to_string(),
            Some(Value::Number(number)) => number.to_string(),
            Some(other) => bail!("{name} is {other}, expected text"),
        };
        Ok((!text.is_empty()).then_some(text))
    };
    let number = |name: &str| -> Result<Option<u64>> {
        let parse = |text: String| {
            text.parse().with_context(|| format!("{name} is {text:?}, expected a whole number, 0 or more"))
        };
        text(name)?.map(parse).transpose()
    };
    let labels = match row.get("labels") {
        Some(Value::Array(labels)) => labels
            .iter()
            .map(|label| {
                label.as_str().map(String::from).with_context(|| format!("labels has {label}, expected text"))
            })
            .collect::<Result<_>>()?,
        _ => {
            let names = text("labels")?.unwrap_or_default();
            names.split(['|', ';']).map(str::trim).filter(|name| !name.is_empty()).map(String::from).collect()
        }
    };
    Ok(Item {
        text: text(column)?.unwrap_or_default(),
        seed: number("seed")?,
        count: number("count")?.map(|count| count as usize),
        labels,
        view: text("view")?,
        uid: text("uid")?,
    })
}
