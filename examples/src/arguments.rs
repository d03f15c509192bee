//! Arguments that several programs take.

use std::path::{Path, PathBuf};

/// What the command line says. With `CXR_PARSE_ONLY=1` in the environment the program ends here, with success: that is
/// how the commands in the documents are checked.
pub fn parse<A: clap::Parser>() -> A {
    let arguments = A::parse();
    if std::env::var_os("CXR_PARSE_ONLY").is_some_and(|value| value == "1") {
        std::process::exit(0);
    }
    arguments
}

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
