//! Weight files: PyTorch's two formats, and what is refused.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use cxr_core::progress::Silent;
use cxr_core::tensor_file::{Dtype, RawTensor};
use cxr_metrics::inception::ResizeMode;
use cxr_metrics::{FeatureExtractor, MetricsError};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::{open, picture, procedural, write};

/// What torch.save wrote, with these numbers.
fn zip_file(path: &Path, tensors: &BTreeMap<String, RawTensor>, order: &[String]) {
    let mut archive = ZipWriter::new(File::create(path).unwrap());
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut add = |name: String, bytes: &[u8]| {
        archive.start_file(name, stored).unwrap();
        archive.write_all(bytes).unwrap();
    };
    add("archive/data.pkl".into(), include_bytes!("zip.pkl"));
    for (key, name) in order.iter().enumerate() {
        add(format!("archive/data/{key}"), &tensors[name].bytes);
    }
    add("archive/version".into(), b"3\n");
    archive.finish().unwrap();
}

fn legacy_file(path: &Path, tensors: &BTreeMap<String, RawTensor>, order: &[String]) {
    let mut bytes = include_bytes!("legacy.head").to_vec();
    for name in order {
        bytes.extend((tensors[name].bytes.len() as u64 / 4).to_le_bytes());
        bytes.extend(&tensors[name].bytes);
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn pytorchs_files_are_read_old_and_new() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = procedural();
    let expected = open(&write(folder.path(), &tensors), ResizeMode::default()).unwrap();
    let tensors = tensors.into_iter().collect();
    let orders: BTreeMap<String, Vec<String>> = serde_json::from_str(include_str!("files.json")).unwrap();
    let pictures = vec![picture("up", 40, 56, 3)];
    for (name, make) in [("zip", zip_file as fn(&Path, &_, &[String])), ("legacy", legacy_file)] {
        let path = folder.path().join(format!("{name}.pth"));
        make(&path, &tensors, &orders[name]);
        let found = open(&path, ResizeMode::default()).unwrap();
        assert_eq!(found.id(), expected.id(), "{name}");
        assert_eq!(found.logits_id(), expected.logits_id(), "{name}");
        let [found, expected] = [&found, &expected].map(|e| e.extract(&pictures, &Silent).unwrap());
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn loading_is_strict_and_names_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let whole = procedural();
    let place = |name: &str| whole.iter().position(|(n, _)| n == name).unwrap();
    type Tensors = Vec<(String, RawTensor)>;
    let refused = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = whole.clone();
        change(&mut tensors);
        open(&write(folder.path(), &tensors), ResizeMode::default()).unwrap_err()
    };
    let missing = refused(&|t| {
        t.remove(place("Mixed_6e.branch7x7dbl_3.bn.running_var"));
    });
    assert!(
        matches!(&missing, MetricsError::WeightNames { missing, unexpected, .. }
            if missing == &["Mixed_6e.branch7x7dbl_3.bn.running_var"] && unexpected.is_empty()),
        "{missing}"
    );
    let text = missing.to_string();
    assert!(text.contains("Mixed_6e.branch7x7dbl_3.bn.running_var") && text.contains("https://"), "{text}");
    // torchvision's network has these.
    let unexpected =
        refused(&|t| t.push(("AuxLogits.fc.bias".into(), RawTensor::from_f32(vec![1], vec![0.0]))));
    assert!(unexpected.to_string().contains("unexpected AuxLogits.fc.bias"), "{unexpected}");
    let shape = refused(&|t| {
        t[place("fc.weight")].1 = RawTensor::from_f32(vec![1000, 2048], vec![0.0; 1000 * 2048]);
    });
    assert!(
        matches!(&shape, MetricsError::TensorShape { tensor, expected, .. }
            if tensor == "fc.weight" && expected == &[1008, 2048]),
        "{shape}"
    );
    let half = refused(&|t| {
        t.remove(place("fc.bias"));
    });
    assert!(matches!(&half, MetricsError::WeightNames { missing, .. } if missing == &["fc.bias"]), "{half}");
    let integers = refused(&|t| {
        t[place("Conv2d_1a_3x3.bn.bias")].1 =
            RawTensor { dtype: Dtype::I32, shape: vec![32], bytes: vec![0; 128] };
    });
    assert!(matches!(integers, MetricsError::TensorFile { .. }), "{integers}");
    let path = folder.path().join("text.pth");
    std::fs::write(&path, "no weights").unwrap();
    assert!(matches!(open(&path, ResizeMode::default()), Err(MetricsError::TensorFile { .. })));
}

#[test]
fn counters_are_no_weights_and_without_the_last_layer_there_are_no_logits() {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = procedural();
    let whole = open(&write(folder.path(), &tensors), ResizeMode::default()).unwrap();
    tensors.retain(|(name, _)| !name.starts_with("fc."));
    tensors
        .push(("Mixed_7a.branch3x3_1.bn.num_batches_tracked".into(), RawTensor::from_i64(vec![], vec![0])));
    let features = open(&write(folder.path(), &tensors), ResizeMode::default()).unwrap();
    assert_eq!((features.logit_names().len(), whole.logit_names().len()), (0, 1008));
    assert_eq!(features.logits_id(), None);
    assert_eq!(features.hash(), whole.hash());
    let picture = vec![picture("grey1", 20, 20, 1)];
    let out = features.extract(&picture, &Silent).unwrap();
    assert_eq!(out.logits, None);
    assert_eq!(out.features, whole.extract(&picture, &Silent).unwrap().features);
    // One other value, another hash.
    let place = tensors.iter().position(|(name, _)| name == "Conv2d_1a_3x3.bn.bias").unwrap();
    tensors[place].1.bytes[0] ^= 1;
    let other = open(&write(folder.path(), &tensors), ResizeMode::default()).unwrap();
    assert_ne!(other.hash(), whole.hash());
}
