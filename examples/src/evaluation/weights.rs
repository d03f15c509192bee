//! The weights of the network that defines FID and KID.

use std::path::PathBuf;

use anyhow::{Context, Result};
use cxr::core::progress::Progress;
use cxr::metrics::inception::find_weights;

/// `--inception`, and `--fetch` in a binary that can.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct InceptionArgs {
    /// Weights of InceptionV3: pytorch-fid's or torch-fidelity's .pth, or safetensors [default: what
    /// CXR_INCEPTION_WEIGHTS names, or what --fetch has fetched].
    #[arg(long, value_name = "FILE")]
    pub inception: Option<PathBuf>,
    /// Fetch the weights (96 MB) from their public address, if there are none yet.
    #[cfg(feature = "hub")]
    #[arg(long)]
    pub fetch: bool,
}

impl InceptionArgs {
    /// The file.
    ///
    /// # Errors
    /// If there is none, saying where it is to be had; if it cannot be fetched.
    pub fn weights(&self, _progress: &dyn Progress) -> Result<PathBuf> {
        let found = find_weights(self.inception.as_deref());
        #[cfg(feature = "hub")]
        if found.is_err() && self.fetch {
            return cxr::metrics::inception::fetch_weights(_progress).context("--fetch");
        }
        found.context("--inception")
    }

    /// The file, or none where there is none and none was asked for.
    ///
    /// # Errors
    /// If one was named and is not there; if it cannot be fetched.
    pub fn weights_if_any(&self, progress: &dyn Progress) -> Result<Option<PathBuf>> {
        match self.weights(progress) {
            Ok(file) if !file.is_file() => {
                anyhow::bail!("--inception: there is no file {}", file.display())
            }
            Ok(file) => Ok(Some(file)),
            #[cfg(feature = "hub")]
            Err(error) if self.fetch => Err(error),
            Err(_) => Ok(None),
        }
    }
}
