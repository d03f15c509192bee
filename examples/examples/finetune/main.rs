//! The paper's fine-tuning: an adapter learns from radiographs and their impressions.

mod args;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use cxr::dataset::{Collection, ImageLoader, Split};
use cxr::kernels::DiffusionAutodiff;
use cxr::ldm::pipeline::{LoadOptions, ModelSource};
use cxr::ldm::weights::ModelFiles;
use cxr::trainer::FinetuneConfig;
use cxr::trainer::checkpoint;
use cxr::trainer::distributed::Ranks;
use cxr_examples::backend::{self, exit, run};
use cxr_examples::exit::{Code, OrExit};
use cxr_examples::finetune::{Finetune, check_memory, check_model, check_sizes, float};
use cxr_examples::progress::{Terminal, show_log, stop_on_interrupt};
use cxr_examples::ranks::Processes;

use self::args::{Args, Resume};

fn main() -> ExitCode {
    let args = cxr_examples::arguments::parse::<Args>();
    stop_on_interrupt();
    show_log(args.run.verbose);
    let processes = match Processes::start() {
        Ok(processes) => processes,
        Err(error) => return exit(Err(error)),
    };
    let result = start(args, &processes);
    let failed = result.is_err();
    let code = exit(result);
    if failed {
        // The others would wait for this one for ever.
        processes.end_all();
    }
    code
}

/// Everything that can be found out in seconds is, before hours of work.
fn start(mut args: Args, processes: &Processes) -> Result<()> {
    let config = args.settings().or_exit(Code::Arguments)?;
    let (collection, split) = args.data()?;
    if !args.enlarge {
        check_sizes(&config, &collection, &split)?;
    }
    let options = LoadOptions::default().with_dtype(float(config.base_dtype));
    let files = ModelFiles::locate(&ModelSource::from(args.model()), &options).context("--model")?;
    check_model(&config, &files)?;
    let quiet = args.run.quiet || processes.ranks().rank() > 0;
    check_memory(&config, &files, args.run.device, args.memory, quiet)?;
    let ranks = processes.ranks();
    if ranks.rank() == 0 {
        std::fs::create_dir_all(&args.out).with_context(|| format!("--out {}", args.out.display()))?;
        if args.resume == Resume::No && !checkpoint::list(&args.out)?.is_empty() {
            bail!(
                "--resume no: {} holds checkpoints; choose another folder, or remove it",
                args.out.display()
            );
        }
    } else {
        // One process talks.
        args.run.quiet = true;
    }
    if ranks.size() > 1 {
        args.run.device = args.run.device.for_rank(processes.local_rank());
        eprintln!("rank {} of {}: device {}", ranks.rank(), ranks.size(), args.run.device);
    }
    let run_args = args.run.clone();
    run(&run_args, Job { args, config, collection, split, options, files, ranks })
}

struct Job<'a> {
    args: Args,
    config: FinetuneConfig,
    collection: Collection,
    split: Split,
    options: LoadOptions,
    files: ModelFiles,
    ranks: &'a dyn Ranks,
}

impl backend::Job for Job<'_> {
    fn run<B: DiffusionAutodiff>(self, device: B::Device) -> Result<()> {
        let Self { args, config, collection, split, options, files, ranks } = self;
        let loading = options.clone().with_progress(Terminal::new(args.run.quiet));
        let hash = files.hash::<B>(&loading, &device).context("--model")?;
        let cache = args.cache.clone().unwrap_or_else(|| args.out.join("cache"));
        let run = Finetune {
            config: &config,
            collection: &collection,
            split: &split,
            files: &files,
            options: &options,
            model: args.model.as_deref().unwrap_or("the embedded model of this project"),
            hash: &hash,
            images: &ImageLoader::new(Args::images(&config)),
            out: &args.out,
            cache: &cache,
            kohya: args.kohya,
            ranks,
            quiet: args.run.quiet,
        };
        if let Some(made) = run.run::<B>(&device, &Terminal::new(args.run.quiet))? {
            println!("{}", made.adapter.display());
        }
        Ok(())
    }
}
