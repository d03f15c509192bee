//! A picture with what it was made from, and its file.

use std::fmt::Write as _;
use std::io;
use std::path::Path;

use cxr_core::metadata::MetadataRow;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Everything that makes a picture again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ImageSettings {
    /// The prompt.
    pub prompt: String,
    /// The negative prompt.
    pub negative_prompt: String,
    /// This picture's own seed.
    pub seed: u64,
    /// Denoising steps.
    pub steps: usize,
    /// Classifier-free guidance.
    pub guidance: f64,
    /// The sampler's name.
    pub sampler: String,
    /// Fresh noise of DDIM, 0 to 1.
    pub eta: f64,
    /// SHA-256 over the model's weights, in hex.
    pub model_hash: String,
    /// Adapters: a hash of the file's content and the weight, in the order of loading.
    pub lora: Vec<LoraUse>,
    /// The program that made it.
    pub software: String,
}

/// An adapter that took part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraUse {
    /// The stem of its file's name.
    pub name: String,
    /// SHA-256 of the file, in hex.
    pub sha256: String,
    /// How much of it was added.
    pub weight: f64,
}

/// A picture: 8 bits, RGB, rows from the top.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// `height * width * 3` values.
    pub rgb: Vec<u8>,
    /// What it was made from.
    pub settings: ImageSettings,
}

/// IPTC's term for the output of a trained model, which keeps a synthetic radiograph from passing for a real one.
const DIGITAL_SOURCE_TYPE: &str = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia";

/// The keyword under which Adobe's XMP specification puts a packet into a PNG.
const XMP_KEYWORD: &str = "XML:com.adobe.xmp";

impl Image {
    /// From pixels in [-1, 1] as `[3, height, width]`, channel by channel: clamped, and rounded to 8 bits.
    pub(crate) fn from_planes(planes: &[f32], width: usize, height: usize, settings: ImageSettings) -> Self {
        let area = width * height;
        let rgb = (0..area).flat_map(|i| [0, 1, 2].map(|c| to_byte(planes[c * area + i]))).collect();
        Self { width, height, rgb, settings }
    }

    /// Writes a PNG with the settings as text (`parameters`, as web interfaces for Stable Diffusion write it) and
    /// an XMP packet that says that it is the work of a model. The file appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn save_png(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        let io = |source| Error::Io { path: path.to_path_buf(), source };
        let bytes = self.to_png().map_err(|e| io(io::Error::other(e)))?;
        cxr_core::atomic::write_bytes(path, &bytes).map_err(io)
    }

    /// The PNG file's bytes.
    ///
    /// # Errors
    /// If the picture has no pixels, or not `width * height * 3` values.
    pub fn to_png(&self) -> Result<Vec<u8>, png::EncodingError> {
        let mut bytes = Vec::new();
        let side = |value: usize| u32::try_from(value).unwrap_or(0); // 0 is refused by the encoder
        let mut encoder = png::Encoder::new(&mut bytes, side(self.width), side(self.height));
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let parameters = self.parameters();
        // tEXt holds Latin-1 alone
        match parameters.chars().all(|c| (c as u32) < 256) {
            true => encoder.add_text_chunk("parameters".into(), parameters)?,
            false => encoder.add_itxt_chunk("parameters".into(), parameters)?,
        }
        encoder.add_itxt_chunk(XMP_KEYWORD.into(), xmp())?;
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.rgb)?;
        writer.finish()?;
        Ok(bytes)
    }

    /// The settings in the form that AUTOMATIC1111's web interface writes and many programs read.
    pub fn parameters(&self) -> String {
        let s = &self.settings;
        let mut text = s.prompt.clone();
        if !s.negative_prompt.is_empty() {
            let _ = write!(text, "\nNegative prompt: {}", s.negative_prompt);
        }
        let sampler = match s.sampler.as_str() {
            "ddim" => "DDIM",
            "dpmpp-2m" => "DPM++ 2M",
            other => other,
        };
        let _ = write!(
            text,
            "\nSteps: {}, Sampler: {sampler}, CFG scale: {}, Seed: {}, Size: {}x{}",
            s.steps, s.guidance, s.seed, self.width, self.height
        );
        if s.eta != 0.0 {
            let _ = write!(text, ", Eta: {}", s.eta);
        }
        if !s.model_hash.is_empty() {
            let _ = write!(text, ", Model hash: {}", short(&s.model_hash));
        }
        if !s.lora.is_empty() {
            let list = |of: &dyn Fn(&LoraUse) -> String| s.lora.iter().map(of).collect::<Vec<_>>().join(", ");
            let hashes = list(&|l| format!("{}: {}", l.name, short(&l.sha256)));
            let weights = list(&|l| format!("{}: {}", l.name, l.weight));
            let _ = write!(text, ", Lora hashes: \"{hashes}\", Lora weights: \"{weights}\"");
        }
        let _ = write!(text, ", Version: {}", s.software);
        text
    }

    /// The picture's row in a `metadata.jsonl`, under the name of its file.
    pub fn metadata_row(&self, file_name: impl Into<String>) -> MetadataRow {
        let s = &self.settings;
        let mut row = MetadataRow {
            file_name: file_name.into(),
            text: s.prompt.clone(),
            seed: Some(s.seed),
            ..MetadataRow::default()
        };
        let mut extra = |key: &str, value: serde_json::Value| row.extra.insert(key.into(), value);
        extra("negative_prompt", s.negative_prompt.clone().into());
        extra("steps", s.steps.into());
        extra("guidance", s.guidance.into());
        extra("sampler", s.sampler.clone().into());
        extra("eta", s.eta.into());
        extra("width", self.width.into());
        extra("height", self.height.into());
        extra("model_hash", s.model_hash.clone().into());
        extra("lora", serde_json::json!(s.lora));
        extra("software", s.software.clone().into());
        extra("digital_source_type", "trainedAlgorithmicMedia".into());
        row
    }
}

/// The first ten digits, as web interfaces show a hash.
fn short(hash: &str) -> &str {
    hash.get(..10).unwrap_or(hash)
}

/// [-1, 1] to 0..=255, rounded as diffusers does (truncation would darken every picture by half a level).
fn to_byte(value: f32) -> u8 {
    ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8
}

fn xmp() -> String {
    format!(
        "<?xpacket begin=\"\u{feff}\" id=\"W5M0MpCehiHzreSzNTczkc9d\"?>\n\
         <x:xmpmeta xmlns:x=\"adobe:ns:meta/\">\n\
         <rdf:RDF xmlns:rdf=\"http://www.w3.org/1999/02/22-rdf-syntax-ns#\">\n\
         <rdf:Description rdf:about=\"\" xmlns:Iptc4xmpExt=\"http://iptc.org/std/Iptc4xmpExt/2008-02-29/\">\n\
         <Iptc4xmpExt:DigitalSourceType>{DIGITAL_SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>\n\
         </rdf:Description>\n</rdf:RDF>\n</x:xmpmeta>\n<?xpacket end=\"r\"?>"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(prompt: &str) -> ImageSettings {
        ImageSettings {
            prompt: prompt.into(),
            negative_prompt: "colour".into(),
            seed: 7,
            steps: 30,
            guidance: 7.5,
            sampler: "dpmpp-2m".into(),
            eta: 0.0,
            model_hash: "0123456789abcdef".into(),
            lora: vec![LoraUse { name: "cxr".into(), sha256: "fedcba98765432".into(), weight: 0.5 }],
            software: "cxr 1".into(),
        }
    }

    fn image(prompt: &str) -> Image {
        Image::from_planes(&[-1.0, 1.0, 0.0, 0.5, 2.0, -3.0], 2, 1, settings(prompt))
    }

    #[test]
    fn pixels_are_clamped_rounded_and_interleaved() {
        // 0.0 is 127.5, which rounds to the even 128; 0.5 is 191.25
        assert_eq!(image("x").rgb, [0, 128, 255, 255, 191, 0]);
        assert_eq!(to_byte(0.498), 191); // 190.995: truncation gives 190
    }

    #[test]
    fn parameters_as_web_interfaces_read_them() {
        assert_eq!(
            image("Cardiomegaly.").parameters(),
            "Cardiomegaly.\nNegative prompt: colour\nSteps: 30, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 7, \
             Size: 2x1, Model hash: 0123456789, Lora hashes: \"cxr: fedcba9876\", Lora weights: \"cxr: 0.5\", \
             Version: cxr 1"
        );
    }

    #[test]
    fn the_file_carries_settings_and_origin() {
        for (prompt, latin) in [("Épanchement.", true), ("胸水", false)] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.png");
            image(prompt).save_png(&path).unwrap();
            let decoder = png::Decoder::new(io::Cursor::new(std::fs::read(&path).unwrap()));
            let mut reader = decoder.read_info().unwrap();
            let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
            reader.next_frame(&mut pixels).unwrap();
            assert_eq!(pixels, image(prompt).rgb);
            let info = reader.info();
            let parameters = if latin {
                info.uncompressed_latin1_text.iter().find(|c| c.keyword == "parameters").unwrap().text.clone()
            } else {
                info.utf8_text.iter().find(|c| c.keyword == "parameters").unwrap().get_text().unwrap()
            };
            assert_eq!(parameters, image(prompt).parameters());
            let xmp = info.utf8_text.iter().find(|c| c.keyword == XMP_KEYWORD).unwrap().get_text().unwrap();
            assert!(
                xmp.contains("DigitalSourceType>http://cv.iptc.org/")
                    && xmp.contains("trainedAlgorithmicMedia")
            );
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = image("x").save_png("/nowhere/a.png").unwrap_err().to_string();
        assert!(error.contains("/nowhere/a.png"), "{error}");
    }

    #[test]
    fn the_row_makes_the_picture_again() {
        let row = image("Cardiomegaly.").metadata_row("a.png");
        assert_eq!(
            (row.file_name.as_str(), row.text.as_str(), row.seed),
            ("a.png", "Cardiomegaly.", Some(7))
        );
        assert_eq!(row.extra["steps"], 30);
        assert_eq!(row.extra["lora"][0]["weight"], 0.5);
        assert_eq!(row.extra["model_hash"], "0123456789abcdef");
    }
}
