//! Arguments that several programs take.

use std::path::{Path, PathBuf};

/// `--lora`: an adapter and how much of it is added.
#[derive(Debug, Clone)]
pub struct Lora {
    /// The file.
    pub file: PathBuf,
    /// 1 unless given.
    pub scale: f64,
}

impl std::str::FromStr for Lora {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let scaled = text.rsplit_once(':').and_then(|(file, scale)| Some((file, scale.parse::<f64>().ok()?)));
        // a file may have a colon and a number in its name
        let (file, scale) = scaled.filter(|_| !Path::new(text).exists()).unwrap_or((text, 1.0));
        if file.is_empty() || !scale.is_finite() {
            return Err(
                "expected a file, or a file, a colon and a number, e.g. cxr.safetensors:0.8".to_string()
            );
        }
        Ok(Self { file: file.into(), scale })
    }
}
