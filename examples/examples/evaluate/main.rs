//! From folders of real and synthetic radiographs to figures that can be believed, a table in the paper's form, the
//! nearest training image of every synthetic one, and, where labels are known, whether images show their findings and
//! what they teach.

mod args;
mod distances;
mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use cxr::core::atomic;
use cxr::kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr::metrics::densenet::{DenseNetConfig, DenseNetExtractor};
use cxr::metrics::findings::ThresholdRule;
use cxr::metrics::inception::InceptionExtractor;
use cxr::metrics::memorization::AuditReport;
use cxr::metrics::{Extraction, ExtractorId, FeatureExtractor, FeatureStatistics, Moments};
use cxr_examples::backend::{Job, exit, run};
use cxr_examples::evaluation::labels::{self, Network, OfLabels, Seen};
use cxr_examples::evaluation::{Set, copies};
use cxr_examples::exit::{Code, OrExit};
use cxr_examples::progress::{Terminal, show_log, stop_on_interrupt};
use serde::Serialize;

use self::args::Args;
use self::distances::{Measured, Real, measure};

fn main() -> ExitCode {
    let args = cxr_examples::arguments::parse::<Args>();
    stop_on_interrupt();
    show_log(args.run.verbose);
    exit(evaluate(args))
}

fn evaluate(args: Args) -> Result<()> {
    args.check().or_exit(Code::Arguments)?;
    let terminal = Terminal::new(args.run.quiet);
    // What can be wrong with a path is said before a network is loaded.
    let sets = Sets::open(&args)?;
    let weights = args.inception.weights(&terminal)?;
    let options = args.run.clone();
    run(&options, Evaluate { args, sets, weights, terminal })
}

/// What was given, opened.
struct Sets {
    /// None where statistics were given.
    real: Option<Set>,
    statistics: Option<Moments>,
    fake: Set,
    base: Option<Set>,
    train: Option<Set>,
}

impl Sets {
    fn open(args: &Args) -> Result<Self> {
        let open = |flag, path: &Path| Set::open(flag, path, args.size);
        let statistics = args.real_is_statistics().then(|| Moments::load(&args.real).context("--real"));
        Ok(Self {
            real: if statistics.is_none() { Some(open("--real", &args.real)?) } else { None },
            statistics: statistics.transpose()?,
            fake: open("--fake", &args.fake)?,
            base: args.base.as_deref().map(|path| open("--base", path)).transpose()?,
            train: args.train.as_deref().map(|path| open("--train", path)).transpose()?,
        })
    }
}

struct Evaluate {
    args: Args,
    sets: Sets,
    weights: PathBuf,
    terminal: Terminal,
}

/// metrics.json.
#[derive(Serialize)]
struct Report<'a> {
    real: &'a Path,
    fake: &'a Path,
    base: Option<&'a Path>,
    train: Option<&'a Path>,
    weights: &'a Path,
    extractor: ExtractorId,
    size: Option<u32>,
    seed: u64,
    /// Figures of the adapted model's images.
    lora: &'a Measured,
    /// Figures of the base model's images.
    base_model: Option<&'a Measured>,
    /// Copies of training images.
    copies: Option<&'a AuditReport>,
    #[serde(flatten)]
    labels: &'a OfLabels,
}

impl Job for Evaluate {
    fn run<B: DiffusionAutodiff>(self, device: B::Device) -> Result<()> {
        self.evaluate::<B::InnerBackend>(&device)
    }
}

impl Evaluate {
    fn evaluate<B: DiffusionBackend>(&self, device: &B::Device) -> Result<()> {
        let Self { args, sets, weights, terminal } = self;
        let extractor = InceptionExtractor::<B>::load(weights, args.resize, device).context("--inception")?;
        let extract = |set: &Set| -> Result<Extraction> {
            extractor.extract(set, terminal).map_err(|error| set.explain(error))
        };
        let real = match (&sets.real, &sets.statistics) {
            (Some(set), _) => Real::Images(set, extract(set)?),
            (None, Some(moments)) => {
                moments.expect_of(&args.real, &extractor.id()).context("--real")?;
                Real::Statistics(moments.clone())
            }
            (None, None) => unreachable!("--real is required"),
        };
        if let (Real::Images(_, extraction), Some(path)) = (&real, &args.save_statistics) {
            let statistics = FeatureStatistics::of(&extraction.features);
            let moments = Moments::of(&statistics, Some(&extractor.id())).context("--save-statistics")?;
            moments.save(path).context("--save-statistics")?;
        }
        let fake = extract(&sets.fake)?;
        let adapted = measure(args, &extractor, &real, &sets.fake, &fake, terminal)?;
        let base = match &sets.base {
            Some(set) => Some(measure(args, &extractor, &real, set, &extract(set)?, terminal)?),
            None => None,
        };
        std::fs::create_dir_all(&args.out).with_context(|| format!("--out {}", args.out.display()))?;
        let (copies, labels) = self.beside_distances(device, &extractor, &real, &fake)?;
        self.warn(&adapted);
        let text = table::markdown(base.as_ref(), &adapted, copies.as_ref(), &labels);
        write(&args.out.join("metrics.md"), text.as_bytes())?;
        let report = Report {
            real: &args.real,
            fake: &args.fake,
            base: args.base.as_deref(),
            train: args.train.as_deref(),
            weights,
            extractor: extractor.id(),
            size: args.size,
            seed: args.seed,
            lora: &adapted,
            base_model: base.as_ref(),
            copies: copies.as_ref(),
            labels: &labels,
        };
        // The last one: where it is, the others are too.
        write(&args.out.join("metrics.json"), (serde_json::to_string_pretty(&report)? + "\n").as_bytes())?;
        print!("{text}");
        println!("\n{}", args.out.display());
        Ok(())
    }

    /// Copies, findings and usefulness, with the domain's network where there is one.
    fn beside_distances<B: DiffusionBackend>(
        &self,
        device: &B::Device,
        inception: &InceptionExtractor<B>,
        real: &Real<'_>,
        fake: &Extraction,
    ) -> Result<(Option<AuditReport>, OfLabels)> {
        let Self { args, sets, terminal, .. } = self;
        let images = match real {
            Real::Images(set, extraction) => Some(Seen::new(set, extraction)),
            Real::Statistics(..) => None,
        };
        let Some(weights) = &args.densenet else {
            let network = Network {
                extractor: inception,
                findings: Vec::new(),
                threshold: ThresholdRule::BalancedOnReal,
            };
            return self.with_network(&network, Seen::new(&sets.fake, fake), images);
        };
        let config = DenseNetConfig::torchxrayvision(&args.densenet_weights).context("--densenet-weights")?;
        let densenet = DenseNetExtractor::<B>::load(weights, config, device).context("--densenet")?;
        let findings = densenet.logit_names().to_vec();
        let threshold = ThresholdRule::Given(densenet.operating_logits());
        let network = Network { extractor: &densenet, findings, threshold };
        let extract = |set: &Set| densenet.extract(set, terminal).map_err(|error| set.explain(error));
        let fake = extract(&sets.fake)?;
        let real = images.map(|seen| Ok::<_, anyhow::Error>((seen.set, extract(seen.set)?))).transpose()?;
        let images = real.as_ref().map(|(set, extraction)| Seen::new(set, extraction));
        self.with_network(&network, Seen::new(&sets.fake, &fake), images)
    }

    fn with_network(
        &self,
        network: &Network<'_>,
        fake: Seen<'_>,
        real: Option<Seen<'_>>,
    ) -> Result<(Option<AuditReport>, OfLabels)> {
        let Self { args, sets, terminal, .. } = self;
        let train = match &sets.train {
            Some(set) => {
                let extraction = network.extractor.extract(set, terminal);
                Some((set, extraction.map_err(|error| set.explain(error))?))
            }
            None => None,
        };
        let train = train.as_ref().map(|(set, extraction)| Seen::new(set, extraction));
        let mut labels = match real {
            Some(real) => labels::measure(args.resampling(), network, fake, real, train, terminal)?,
            None => OfLabels::without("--real has statistics, and it needs images"),
        };
        let copies = match train {
            Some(train) => {
                let found = copies::search(network.extractor, fake, train, real, &args.out, terminal);
                labels.available("copies", found)?
            }
            None => None,
        };
        Ok((copies, labels))
    }

    /// What a reader has to know, where it is not overlooked.
    fn warn(&self, measured: &Measured) {
        let notes = measured.card.figures.iter().flat_map(|figure| &figure.notes);
        let mut said: Vec<&str> =
            notes.map(String::as_str).filter(|note| note.starts_with("warning: ")).collect();
        said.dedup();
        said.iter().for_each(|note| eprintln!("{note}"));
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    atomic::write_bytes(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}
