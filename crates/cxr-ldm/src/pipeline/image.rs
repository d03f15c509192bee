//! A picture with what it was made from, and its file.

use std::fmt::Write as _;
use std::io;
use std::path::Path;

use cxr_core::hash::sha256_hex;
use cxr_core::metadata::MetadataRow;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::scheduler::NoiseScheduleConfig;

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
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// Classifier-free guidance.
    pub guidance: f64,
    /// Noise levels between which guidance applies; `None`: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_interval: Option<(f64, f64)>,
    /// The sampler's name.
    pub sampler: String,
    /// Fresh noise of DDIM, 0 to 1.
    pub eta: f64,
    /// The picture that it was made from; `None`: from noise alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial: Option<InitialUse>,
    /// Whether the autoencoder went over it in tiles.
    pub vae_tiling: bool,
    /// The dtype of weights and activations, e.g. `f32`.
    pub dtype: String,
    /// SHA-256 over the model's weights, in hex.
    pub model_hash: String,
    /// The model's noise schedule.
    pub schedule: NoiseScheduleConfig,
    /// Adapters: a hash of the file's content and the weight, in the order of loading.
    pub lora: Vec<LoraUse>,
    /// The program that made it.
    pub software: String,
}

/// The picture that image-to-image started from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InitialUse {
    /// SHA-256 of its size and pixels, in hex.
    pub sha256: String,
    /// The part of the steps that were made.
    pub strength: f64,
}

impl ImageSettings {
    /// SHA-256 of everything that the picture depends on, in hex: equal for pictures that are equal but for
    /// rounding. The program and the device do not take part.
    pub fn hash(&self) -> String {
        let settings = Self { software: String::new(), ..self.clone() };
        let text = serde_json::to_string(&settings).expect("numbers, strings and lists are JSON");
        sha256_hex(text.as_bytes())
    }
}

/// The channels of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PngColor {
    /// Three.
    #[default]
    Rgb,
    /// One: the luma of ITU-R BT.601, as PIL's mode `L`.
    Gray,
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

/// The keyword of the text that [`read_settings_hash`] reads.
const HASH_KEYWORD: &str = "settings_hash";

/// [`ImageSettings::hash`] of the picture in a PNG file, and its channels; `None` if it is none of this crate's.
///
/// # Errors
/// [`Error::Io`] naming the file if it cannot be read or is no PNG file.
pub fn read_settings_hash(path: impl AsRef<Path>) -> Result<Option<(String, PngColor)>, Error> {
    let path = path.as_ref();
    let failed = |source| Error::Io { path: path.to_path_buf(), source };
    let file = std::fs::File::open(path).map_err(failed)?;
    let reader = png::Decoder::new(io::BufReader::new(file)).read_info();
    let reader = reader.map_err(|error| failed(io::Error::other(error)))?;
    let info = reader.info();
    let color = match info.color_type {
        png::ColorType::Rgb => PngColor::Rgb,
        png::ColorType::Grayscale => PngColor::Gray,
        _ => return Ok(None),
    };
    let hash = info.uncompressed_latin1_text.iter().find(|text| text.keyword == HASH_KEYWORD);
    Ok(hash.map(|text| (text.text.clone(), color)))
}

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
        self.save_png_as(path, PngColor::Rgb)
    }

    /// [`save_png`](Self::save_png) with the channels that are asked for.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn save_png_as(&self, path: impl AsRef<Path>, color: PngColor) -> Result<(), Error> {
        let path = path.as_ref();
        let io = |source| Error::Io { path: path.to_path_buf(), source };
        let bytes = self.to_png(color).map_err(|e| io(io::Error::other(e)))?;
        cxr_core::atomic::write_bytes(path, &bytes).map_err(io)
    }

    /// The PNG file's bytes.
    ///
    /// # Errors
    /// If the picture has no pixels, or not `width * height * 3` values.
    pub fn to_png(&self, color: PngColor) -> Result<Vec<u8>, png::EncodingError> {
        let mut bytes = Vec::new();
        let side = |value: usize| u32::try_from(value).unwrap_or(0); // 0 is refused by the encoder
        let mut encoder = png::Encoder::new(&mut bytes, side(self.width), side(self.height));
        encoder.set_color(match color {
            PngColor::Rgb => png::ColorType::Rgb,
            PngColor::Gray => png::ColorType::Grayscale,
        });
        encoder.set_depth(png::BitDepth::Eight);
        let parameters = self.parameters();
        // tEXt holds Latin-1 alone
        match parameters.chars().all(|c| (c as u32) < 256) {
            true => encoder.add_text_chunk("parameters".into(), parameters)?,
            false => encoder.add_itxt_chunk("parameters".into(), parameters)?,
        }
        encoder.add_text_chunk(HASH_KEYWORD.into(), self.settings.hash())?;
        encoder.add_itxt_chunk(XMP_KEYWORD.into(), xmp())?;
        let mut writer = encoder.write_header()?;
        match color {
            PngColor::Rgb => writer.write_image_data(&self.rgb)?,
            PngColor::Gray => writer.write_image_data(&self.luma())?,
        }
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
            "pndm" => "PLMS",
            "euler" => "Euler",
            "euler-a" => "Euler a",
            "dpmpp-2m" => "DPM++ 2M",
            "lcm" => "LCM",
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
        if let Some(initial) = &s.initial {
            let _ = write!(text, ", Denoising strength: {}", initial.strength);
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
        // all settings under their own names, and what they come to
        let settings = serde_json::to_value(s).expect("numbers, strings and lists are JSON");
        if let serde_json::Value::Object(settings) = settings {
            let known = ["prompt", "seed"];
            row.extra.extend(settings.into_iter().filter(|(key, _)| !known.contains(&key.as_str())));
        }
        row.extra.insert("settings_hash".into(), s.hash().into());
        row.extra.insert("digital_source_type".into(), "trainedAlgorithmicMedia".into());
        row
    }
}

impl Image {
    /// The luma of every pixel.
    fn luma(&self) -> Vec<u8> {
        // PIL's fixed-point weights, so that the file is the one that `convert("L")` makes
        let luma = |p: &[u8]| {
            (u32::from(p[0]) * 19595 + u32::from(p[1]) * 38470 + u32::from(p[2]) * 7471 + 0x8000) >> 16
        };
        self.rgb.chunks_exact(3).map(|pixel| luma(pixel) as u8).collect()
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
            width: 2,
            height: 1,
            guidance: 7.5,
            guidance_interval: None,
            sampler: "dpmpp-2m".into(),
            eta: 0.0,
            initial: None,
            vae_tiling: false,
            dtype: "f32".into(),
            model_hash: "0123456789abcdef".into(),
            schedule: NoiseScheduleConfig::sd15(),
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
            let hash = settings(prompt).hash();
            assert_eq!(read_settings_hash(&path).unwrap(), Some((hash, PngColor::Rgb)));
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
        assert_eq!(row.extra["schedule"]["beta_schedule"], "scaled_linear");
        assert!(!row.extra.contains_key("prompt"));
    }

    #[test]
    fn the_hash_tells_settings_apart_and_programs_not() {
        let hash = settings("a").hash();
        assert_eq!(ImageSettings { software: "another".into(), ..settings("a") }.hash(), hash);
        for other in [
            settings("b"),
            ImageSettings { seed: 8, ..settings("a") },
            ImageSettings { width: 4, ..settings("a") },
            ImageSettings { dtype: "f16".into(), ..settings("a") },
            ImageSettings { lora: Vec::new(), ..settings("a") },
        ] {
            assert_ne!(other.hash(), hash, "{other:?}");
        }
    }

    #[test]
    fn one_channel_is_the_luma() {
        let mut picture = image("x");
        picture.rgb = vec![255, 0, 0, 10, 10, 10];
        assert_eq!(picture.luma(), [76, 10]); // PIL: Image.new("RGB", (1, 1), (255, 0, 0)).convert("L")
        let decoder = png::Decoder::new(io::Cursor::new(picture.to_png(PngColor::Gray).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        assert_eq!((pixels, reader.info().color_type), (vec![76, 10], png::ColorType::Grayscale));
    }
}
