//! The command line, and what it means for the library.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use cxr::dataset::{
    Collection, Columns, Deidentified, Filter, Fit, ImageCheck, ImageOptions, OnProblem, PromptTemplate,
    ReadOptions, SplitConfig, SplitRule,
};
use cxr_examples::backend::Talk;
use cxr_examples::exit::EXIT_CODES;

/// Prepares a collection of chest radiographs with reports for training: counts, filters, a split with its leakage
/// report, and pictures to look at.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
pub(crate) struct Args {
    /// Folder as Kaggle unpacks the Indiana collection, folder in NIH's layout, folder with a metadata.csv or
    /// metadata.jsonl, or a .csv or .jsonl file.
    #[arg(long, value_name = "DIR|FILE")]
    pub(crate) data: PathBuf,
    /// Folder for pairs.csv, split.json, report.json, tokens.png and sheet.png.
    #[arg(long, value_name = "DIR", default_value = "out/prepare")]
    pub(crate) out: PathBuf,
    /// Column with the image's file name, relative to the table's folder [default: file_name].
    #[arg(long, value_name = "NAME")]
    pub(crate) image_col: Option<String>,
    /// Column with the impression [default: text].
    #[arg(long, value_name = "NAME")]
    pub(crate) text_col: Option<String>,
    /// Column with the patient or study, which the split keeps whole [default: group, if it is there].
    #[arg(long, value_name = "NAME")]
    pub(crate) group_col: Option<String>,
    /// Columns with labels: names separated by `;` or `|`, or a number or truth value for the column's own name
    /// [default: labels, if it is there].
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub(crate) label_cols: Vec<String>,
    /// Column with the projection [default: view, if it is there].
    #[arg(long, value_name = "NAME")]
    pub(crate) view_col: Option<String>,
    /// What the split keeps on one side: a patient or study, nothing (as the paper; it leaks), or an impression.
    #[arg(long, value_name = "RULE", default_value = "by-group")]
    pub(crate) split: RuleArg,
    /// Share of the pairs to train on, between 0 and 1.
    #[arg(long, value_name = "F", default_value_t = 0.8)]
    pub(crate) train_fraction: f64,
    /// Seed of the split.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Impressions with the de-identification mark XXXX: kept as written, without the words that hold it, or left out.
    #[arg(long, value_name = "POLICY", default_value = "keep")]
    pub(crate) deidentified: DeidentifiedArg,
    /// Begin every prompt with its view, as in "Frontal chest radiograph. ...".
    #[arg(long, conflicts_with = "template")]
    pub(crate) view_token: bool,
    /// Shape of a prompt, with the placeholders {impression} and {view} [default: {impression}].
    #[arg(long, value_name = "TEXT")]
    pub(crate) template: Option<String>,
    /// Longest prompt in CLIP's tokens, the two marks counted.
    #[arg(long, value_name = "N", default_value_t = 77)]
    pub(crate) max_tokens: usize,
    /// Keep pairs of this view only; may be given several times.
    #[arg(long, value_name = "NAME")]
    pub(crate) view: Vec<String>,
    /// Keep pairs with this label only; may be given several times: one of them is enough.
    #[arg(long, value_name = "NAME")]
    pub(crate) label: Vec<String>,
    /// Side in pixels that images are brought to; the models need a multiple of 8.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) size: u32,
    /// Filter that resizes: the paper used bilinear.
    #[arg(long, value_name = "NAME", default_value = "lanczos3")]
    pub(crate) filter: FilterArg,
    /// Images that are not square: cut out the middle, or fill up with black.
    #[arg(long, value_name = "HOW", default_value = "centre-crop")]
    pub(crate) fit: FitArg,
    /// Leave out and count rows and images that cannot be used, instead of stopping at the first.
    #[arg(long)]
    pub(crate) skip: bool,
    /// Keep the resized images in this folder; a second run, and training, need not decode them again.
    #[arg(long, value_name = "DIR", conflicts_with = "texts_only")]
    pub(crate) cache: Option<PathBuf>,
    /// Look at the tables alone: images need not be there, and there is no contact sheet.
    #[arg(long)]
    pub(crate) texts_only: bool,
    #[command(flatten)]
    pub(crate) talk: Talk,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RuleArg {
    ByGroup,
    PairLevel,
    ByPrompt,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeidentifiedArg {
    Keep,
    Strip,
    Drop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FilterArg {
    Lanczos3,
    CatmullRom,
    Bilinear,
    Box,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FitArg {
    CentreCrop,
    PadToSquare,
}

impl Args {
    pub(crate) fn read_options(&self) -> Result<ReadOptions> {
        let prompt = match &self.template {
            Some(template) => template.parse().context("--template")?,
            None if self.view_token => PromptTemplate::with_view(),
            None => PromptTemplate::impression(),
        };
        Ok(ReadOptions {
            prompt,
            deidentified: match self.deidentified {
                DeidentifiedArg::Keep => Deidentified::Keep,
                DeidentifiedArg::Strip => Deidentified::Strip,
                DeidentifiedArg::Drop => Deidentified::Drop,
            },
            columns: Columns {
                image: self.image_col.clone(),
                text: self.text_col.clone(),
                group: self.group_col.clone(),
                view: self.view_col.clone(),
                labels: self.label_cols.clone(),
            },
            images: if self.texts_only { ImageCheck::None } else { ImageCheck::Exists },
            on_problem: self.on_problem(),
            ..ReadOptions::default()
        })
    }

    pub(crate) fn on_problem(&self) -> OnProblem {
        if self.skip { OnProblem::Skip } else { OnProblem::Stop }
    }

    pub(crate) fn split_config(&self) -> SplitConfig {
        let rule = match self.split {
            RuleArg::ByGroup => SplitRule::ByGroup,
            RuleArg::PairLevel => SplitRule::PairLevel,
            RuleArg::ByPrompt => SplitRule::ByPrompt,
        };
        SplitConfig { rule, train_fraction: self.train_fraction, seed: self.seed }
    }

    pub(crate) fn image_options(&self) -> ImageOptions {
        ImageOptions {
            size: self.size,
            filter: match self.filter {
                FilterArg::Lanczos3 => Filter::Lanczos3,
                FilterArg::CatmullRom => Filter::CatmullRom,
                FilterArg::Bilinear => Filter::Bilinear,
                FilterArg::Box => Filter::Box,
            },
            fit: match self.fit {
                FitArg::CentreCrop => Fit::CentreCrop,
                FitArg::PadToSquare => Fit::PadToSquare,
            },
        }
    }

    /// What can be said of the flags before anything is read, so that errors name them.
    pub(crate) fn check(&self) -> Result<()> {
        self.image_options().validate().context("--size")?;
        ensure!(
            self.train_fraction > 0.0 && self.train_fraction < 1.0,
            "--train-fraction is {}, expected a number between 0 and 1, both excluded",
            self.train_fraction
        );
        ensure!(
            self.max_tokens >= 3,
            "--max-tokens is {}, expected 3 or more: the two marks take 2",
            self.max_tokens
        );
        Ok(())
    }

    /// Columns are named for tables; in the known layouts they have their names.
    pub(crate) fn check_columns(&self, collection: &Collection) -> Result<()> {
        let given = [
            ("--image-col", self.image_col.is_some()),
            ("--text-col", self.text_col.is_some()),
            ("--group-col", self.group_col.is_some()),
            ("--label-cols", !self.label_cols.is_empty()),
            ("--view-col", self.view_col.is_some()),
        ];
        let given: Vec<&str> = given.iter().filter(|(_, given)| *given).map(|(flag, _)| *flag).collect();
        ensure!(
            given.is_empty() || collection.source == "table",
            "{}: {} is in the layout {}, which has its own columns; leave the flag out, or give the path of a table",
            given.join(", "),
            self.data.display(),
            collection.source
        );
        Ok(())
    }

    /// Leaves out the pairs of other views and labels; how many.
    pub(crate) fn keep_chosen(&self, collection: &mut Collection) -> Result<usize> {
        let before = collection.len();
        let all = collection.preparation_report(None, None);
        let known = [("--view", &self.view, &all.per_view), ("--label", &self.label, &all.per_label)];
        for (flag, chosen, there) in known {
            for name in chosen {
                if !there.keys().any(|own| own.eq_ignore_ascii_case(name)) {
                    let mut names: Vec<(&String, &usize)> = there.iter().collect();
                    names.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
                    let names: Vec<&str> = names.iter().take(12).map(|(name, _)| name.as_str()).collect();
                    bail!("{flag} {name}: no pair has it; there are {}", names.join(", "));
                }
            }
        }
        collection.retain(|pair| {
            (self.view.is_empty() || self.view.iter().any(|view| pair.has_view(view)))
                && (self.label.is_empty() || self.label.iter().any(|label| pair.has_label(label)))
        });
        ensure!(!collection.is_empty(), "--view and --label: no pair has both; leave one out");
        Ok(before - collection.len())
    }

    /// How many pictures the contact sheet has.
    pub(crate) fn sheet(&self) -> Option<NonZeroUsize> {
        NonZeroUsize::new(16).filter(|_| !self.texts_only)
    }
}
