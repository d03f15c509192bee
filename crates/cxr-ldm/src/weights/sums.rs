//! The published weight files of Stable Diffusion 1.4 and 1.5: size and SHA-256.

use std::path::Path;

use cxr_core::hash::sha256_file;
use cxr_core::progress::{Progress, Stage};

use super::names::Component;
use crate::Error;

/// A file as it was published.
#[derive(Debug)]
struct Published {
    /// The release of Stable Diffusion.
    #[cfg_attr(not(any(test, feature = "hub")), expect(dead_code, reason = "for downloads alone"))]
    release: &'static str,
    /// Its path in the repository.
    name: &'static str,
    /// In bytes.
    size: u64,
    /// In hexadecimal.
    sha256: &'static str,
}

/// Sizes and sums as they stand in the Git LFS pointers of the repositories `CompVis/stable-diffusion-v1-4` and
/// `runwayml/stable-diffusion-v1-5` (today `stable-diffusion-v1-5/stable-diffusion-v1-5`), without the safety checker.
#[rustfmt::skip]
const PUBLISHED: [Published; 32] = [
    Published { release: "1.4", name: "text_encoder/model.fp16.safetensors", size: 246144864, sha256: "77795e2023adcf39bc29a884661950380bd093cf0750a966d473d1718dc9ef4e" },
    Published { release: "1.4", name: "text_encoder/model.safetensors", size: 492265879, sha256: "7b3a12df205cb3c74dd4eae4354d93f606ae6b3bc29d5d06fd97921cb9ad8a81" },
    Published { release: "1.4", name: "text_encoder/pytorch_model.bin", size: 492305335, sha256: "770a47a9ffdcfda0b05506a7888ed714d06131d60267e6cf52765d61cf59fd67" },
    Published { release: "1.4", name: "text_encoder/pytorch_model.fp16.bin", size: 246187076, sha256: "05eee911f195625deeab86f0b22b115d7d8bc3adbfc1404f03557f7e4e6a8fd7" },
    Published { release: "1.4", name: "unet/diffusion_pytorch_model.bin", size: 3438366373, sha256: "f5f12f7078f361f137f91edc270cb523208dc2322a597e07773eb3b1e5703850" },
    Published { release: "1.4", name: "unet/diffusion_pytorch_model.fp16.bin", size: 1719327893, sha256: "3ac986370f51d806d2119577d5a66fbf6d3746e2356f45dc474e7561ce94bdbf" },
    Published { release: "1.4", name: "unet/diffusion_pytorch_model.fp16.safetensors", size: 1719125304, sha256: "a35404d03ec8f977715a4d2a080ddf72e2144f2ee49bb1ee213258bc64f9cc87" },
    Published { release: "1.4", name: "unet/diffusion_pytorch_model.non_ema.bin", size: 3438366373, sha256: "f5f12f7078f361f137f91edc270cb523208dc2322a597e07773eb3b1e5703850" },
    Published { release: "1.4", name: "unet/diffusion_pytorch_model.non_ema.safetensors", size: 3438167536, sha256: "ac3d1bff03f9e9a6f8671b5a7a3fd984f90185c84e407bc569f97c1cce7445fd" },
    Published { release: "1.4", name: "unet/diffusion_pytorch_model.safetensors", size: 3438167534, sha256: "145a07e0f05ec5bbe6e2e9faf608bdb311caf708895cac8c8ed713c59864e1e8" },
    Published { release: "1.4", name: "vae/diffusion_pytorch_model.bin", size: 334707217, sha256: "1b134cded8eb78b184aefb8805b6b572f36fa77b255c483665dda931fa0130c5" },
    Published { release: "1.4", name: "vae/diffusion_pytorch_model.fp16.bin", size: 167405651, sha256: "b7643b3e40b9f128eda5fe174fea73c3ef3903562651fb344a79439709c2e503" },
    Published { release: "1.4", name: "vae/diffusion_pytorch_model.fp16.safetensors", size: 167335342, sha256: "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c" },
    Published { release: "1.4", name: "vae/diffusion_pytorch_model.safetensors", size: 334643276, sha256: "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c" },
    Published { release: "1.5", name: "text_encoder/model.fp16.safetensors", size: 246144864, sha256: "77795e2023adcf39bc29a884661950380bd093cf0750a966d473d1718dc9ef4e" },
    Published { release: "1.5", name: "text_encoder/model.safetensors", size: 492265874, sha256: "d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334" },
    Published { release: "1.5", name: "text_encoder/pytorch_model.bin", size: 492305335, sha256: "770a47a9ffdcfda0b05506a7888ed714d06131d60267e6cf52765d61cf59fd67" },
    Published { release: "1.5", name: "text_encoder/pytorch_model.fp16.bin", size: 246187076, sha256: "05eee911f195625deeab86f0b22b115d7d8bc3adbfc1404f03557f7e4e6a8fd7" },
    Published { release: "1.5", name: "unet/diffusion_pytorch_model.bin", size: 3438354725, sha256: "c7da0e21ba7ea50637bee26e81c220844defdf01aafca02b2c42ecdadb813de4" },
    Published { release: "1.5", name: "unet/diffusion_pytorch_model.fp16.bin", size: 1719327893, sha256: "30eb3dc47c90e4a55476332b284b2331774c530edbbb83b70cacdd9e7b91af92" },
    Published { release: "1.5", name: "unet/diffusion_pytorch_model.fp16.safetensors", size: 1719125304, sha256: "c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21" },
    Published { release: "1.5", name: "unet/diffusion_pytorch_model.non_ema.bin", size: 3438366373, sha256: "42bc8b8f3af32866db3c7bb5bcf591ab04438296c2712246d7a640bde5a5ddc1" },
    Published { release: "1.5", name: "unet/diffusion_pytorch_model.non_ema.safetensors", size: 3438167536, sha256: "cd1b6db09a81cb1d39fbd245a89c1e3db9da9fe8eba5e8f9098ea6c4994221d3" },
    Published { release: "1.5", name: "unet/diffusion_pytorch_model.safetensors", size: 3438167540, sha256: "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1" },
    Published { release: "1.5", name: "v1-5-pruned-emaonly.ckpt", size: 4265380512, sha256: "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516" },
    Published { release: "1.5", name: "v1-5-pruned-emaonly.safetensors", size: 4265146304, sha256: "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa" },
    Published { release: "1.5", name: "v1-5-pruned.ckpt", size: 7703807346, sha256: "e1441589a6f3c5a53f5f54d0975a18a7feb7cdf0b0dee276dfc3331ae376a053" },
    Published { release: "1.5", name: "v1-5-pruned.safetensors", size: 7703324286, sha256: "1a189f0be69d6106a48548e7626207dddd7042a418dbf372cefd05e0cdba61b6" },
    Published { release: "1.5", name: "vae/diffusion_pytorch_model.bin", size: 334707217, sha256: "1b134cded8eb78b184aefb8805b6b572f36fa77b255c483665dda931fa0130c5" },
    Published { release: "1.5", name: "vae/diffusion_pytorch_model.fp16.bin", size: 167405651, sha256: "b7643b3e40b9f128eda5fe174fea73c3ef3903562651fb344a79439709c2e503" },
    Published { release: "1.5", name: "vae/diffusion_pytorch_model.fp16.safetensors", size: 167335342, sha256: "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c" },
    Published { release: "1.5", name: "vae/diffusion_pytorch_model.safetensors", size: 334643276, sha256: "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c" },
];

/// The name of a component's weight file in the table.
pub(super) fn name_in_folder(component: Component, path: &Path) -> String {
    format!("{component}/{}", path.file_name().unwrap_or_default().to_string_lossy())
}

/// Checks files, by their names in the table.
///
/// # Errors
/// [`Error::NoChecksum`] for a file of which no sum was published, before any is read; [`Error::Checksum`] for one
/// that is another; [`Error::Stopped`] if progress says so.
pub(super) fn verify<'a>(
    files: impl IntoIterator<Item = (String, &'a Path)>,
    progress: &dyn Progress,
) -> Result<(), Error> {
    let mut wanted = Vec::new();
    for (name, path) in files {
        let published: Vec<&Published> = PUBLISHED.iter().filter(|file| file.name == name).collect();
        if published.is_empty() {
            return Err(Error::NoChecksum { path: path.to_path_buf(), name });
        }
        wanted.push((path, published));
    }
    let mut stage = Stage::begin(progress, "verifying files", Some(wanted.len() as u64));
    for (path, published) in wanted {
        check(path, &published)?;
        if stage.advance(&path.display().to_string()).is_break() {
            return Err(Error::Stopped);
        }
    }
    Ok(())
}

/// The file must be one of those published.
fn check(path: &Path, published: &[&Published]) -> Result<(), Error> {
    let io = |source| Error::Io { path: path.to_path_buf(), source };
    let size = std::fs::metadata(path).map_err(io)?.len();
    let sized: Vec<&&Published> = published.iter().filter(|file| file.size == size).collect();
    let list = |of: &dyn Fn(&Published) -> String| {
        published.iter().map(|file| of(file)).collect::<Vec<_>>().join(" or ")
    };
    let wrong =
        |expected: String, found: String| Err(Error::Checksum { path: path.to_path_buf(), expected, found });
    if sized.is_empty() {
        // a file that is shorter or longer need not be read
        return wrong(list(&|file| format!("{} bytes", file.size)), format!("{size} bytes"));
    }
    let found = sha256_file(path).map_err(io)?;
    match sized.iter().any(|file| file.sha256 == found) {
        true => Ok(()),
        false => wrong(list(&|file| format!("SHA-256 {}", file.sha256)), found),
    }
}

/// Checks a file that was just fetched from a repository that has the published files; of others, nothing is known.
#[cfg(feature = "hub")]
pub(super) fn check_download(repository: &str, name: &str, path: &Path) -> Result<(), Error> {
    let release = match repository {
        "CompVis/stable-diffusion-v1-4" => "1.4",
        "runwayml/stable-diffusion-v1-5" | super::DEFAULT_REPO => "1.5",
        _ => return Ok(()),
    };
    match PUBLISHED.iter().find(|file| file.release == release && file.name == name) {
        Some(file) => check(path, &[file]),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use cxr_core::progress::Silent;

    use super::*;

    #[test]
    fn the_table_is_whole() {
        for file in &PUBLISHED {
            assert!(file.sha256.len() == 64 && file.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()));
            assert!(file.size > 100 << 20);
        }
        let names = |release| {
            let mut names: Vec<_> =
                PUBLISHED.iter().filter(|file| file.release == release).map(|file| file.name).collect();
            names.dedup();
            names.len()
        };
        assert_eq!((names("1.4"), names("1.5")), (14, 18));
        for component in Component::ALL {
            for name in component.file_names(None) {
                let name = name_in_folder(component, Path::new(&name));
                assert_eq!(PUBLISHED.iter().filter(|file| file.name == name).count(), 2, "{name}");
            }
        }
    }

    #[test]
    fn another_file_of_the_same_name_is_found_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        std::fs::write(&path, "short").unwrap();
        let verify =
            |name: &str| verify([(name.to_string(), path.as_path())], &Silent).unwrap_err().to_string();
        let error = verify("text_encoder/model.safetensors");
        assert!(error.contains("5 bytes") && error.contains("492265874 bytes"), "{error}");
        let error = verify("text_encoder/my.safetensors");
        assert!(error.contains("no SHA-256") && error.contains("text_encoder/my.safetensors"), "{error}");
        // the right length with other contents: sparse, so that it takes no room
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(167_335_342).unwrap();
        let error = verify("vae/diffusion_pytorch_model.fp16.safetensors");
        assert!(
            error.contains("4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c"),
            "{error}"
        );
        assert!(!error.contains('\n') && error.contains(path.to_str().unwrap()), "{error}");
    }

    #[test]
    fn a_file_with_the_published_sum_passes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "abc").unwrap();
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let published = Published { release: "1.5", name: "file", size: 3, sha256 };
        check(&path, &[&published]).unwrap();
        let other = Published { sha256: PUBLISHED[0].sha256, ..published };
        check(&path, &[&other]).unwrap_err();
    }
}
