use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use ::safetensors::SafeTensors;
use cxr_core::tensor_file::{Dtype, RawTensor, TensorFile, TensorFileError, write_safetensors};
use proptest::prelude::*;

type Tensors = BTreeMap<String, RawTensor>;

fn a_tensor() -> impl Strategy<Value = RawTensor> {
    (prop::sample::select(Dtype::ALL.to_vec()), prop::collection::vec(0_usize..4, 0..4)).prop_flat_map(
        |(dtype, shape)| {
            let length = shape.iter().product::<usize>() * dtype.size();
            prop::collection::vec(any::<u8>(), length).prop_map(move |bytes| RawTensor {
                dtype,
                shape: shape.clone(),
                bytes,
            })
        },
    )
}

fn some_tensors() -> impl Strategy<Value = Tensors> {
    let name = prop_oneof![Just(String::new()), "[a-z.0-9_]{1,20}", "\\PC{1,6}", "[\"\\\\\n\t{}]{1,4}"];
    prop::collection::btree_map(name, a_tensor(), 0..6)
}

fn some_texts() -> impl Strategy<Value = BTreeMap<String, String>> {
    prop::collection::btree_map("\\PC{0,8}", "\\PC{0,20}", 0..4)
}

fn written(path: &Path, tensors: &Tensors, metadata: &BTreeMap<String, String>) -> Vec<u8> {
    let tensors: Vec<_> = tensors.clone().into_iter().collect();
    write_safetensors(path, &tensors, metadata).unwrap();
    std::fs::read(path).unwrap()
}

fn read_all(path: &Path) -> Result<Tensors, TensorFileError> {
    let file = TensorFile::open(path)?;
    file.names().map(|name| Ok((name.to_string(), file.read(name)?))).collect()
}

/// A file of this header and as many bytes of data.
fn refusal(header: &str, data: usize) -> String {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.resize(bytes.len() + data, 0);
    refusal_of(&bytes)
}

fn refusal_of(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile.safetensors");
    std::fs::write(&path, bytes).unwrap();
    let error = read_all(&path).expect_err("this file is broken").to_string();
    assert!(error.contains("hostile.safetensors"), "{error}");
    error
}

proptest! {
    #[test]
    fn what_is_written_comes_back(tensors in some_tensors(), metadata in some_texts()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let bytes = written(&path, &tensors, &metadata);
        let file = TensorFile::open(&path).unwrap();
        prop_assert_eq!(file.metadata(), &metadata);
        prop_assert_eq!(file.names().collect::<Vec<_>>(), tensors.keys().collect::<Vec<_>>());
        prop_assert_eq!(&read_all(&path).unwrap(), &tensors);
        // whatever the order they come in
        let reversed: Vec<_> = tensors.clone().into_iter().rev().collect();
        write_safetensors(&path, &reversed, &metadata).unwrap();
        prop_assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn the_formats_own_library_agrees(tensors in some_tensors(), metadata in some_texts()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let bytes = written(&path, &tensors, &metadata);
        let theirs = SafeTensors::deserialize(&bytes).unwrap();
        prop_assert_eq!(theirs.len(), tensors.len());
        for (name, tensor) in &tensors {
            let view = theirs.tensor(name).unwrap();
            prop_assert_eq!(view.dtype().to_string(), tensor.dtype.name());
            prop_assert_eq!(view.shape(), &tensor.shape);
            prop_assert_eq!(view.data(), &tensor.bytes);
        }
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let found: BTreeMap<_, _> = header.metadata().clone().unwrap_or_default().into_iter().collect();
        prop_assert_eq!(&found, &metadata);
        // and the other way
        let views = tensors.keys().map(|name| (name.clone(), theirs.tensor(name).unwrap()));
        // safetensors 0.8.0 writes broken JSON for an empty map of metadata and no tensors
        let metadata = (!metadata.is_empty()).then(|| metadata.into_iter().collect::<HashMap<_, _>>());
        std::fs::write(&path, ::safetensors::serialize(views, metadata).unwrap()).unwrap();
        prop_assert_eq!(&read_all(&path).unwrap(), &tensors);
    }

    /// A changed byte is an error or changes what is read; a shorter or longer file is an error.
    #[test]
    fn damage_is_no_panic_and_is_not_silent(
        tensors in some_tensors(),
        place in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let bytes = written(&path, &tensors, &BTreeMap::new());
        let place = place.index(bytes.len());
        let mut changed = bytes.clone();
        changed[place] = byte;
        std::fs::write(&path, &changed).unwrap();
        let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        match read_all(&path) {
            // white space may become other white space
            Ok(found) if found == tensors => {
                prop_assert!(byte == bytes[place] || place < data && byte.is_ascii_whitespace());
            }
            Ok(found) => prop_assert_eq!(found.len(), tensors.len()),
            Err(_) => prop_assert!(place < data),
        }
        std::fs::write(&path, &bytes[..cut.index(bytes.len())]).unwrap();
        prop_assert!(TensorFile::open(&path).is_err());
        std::fs::write(&path, [&bytes[..], &[0]].concat()).unwrap();
        prop_assert!(TensorFile::open(&path).is_err());
    }

    /// Headers that are JSON of about the right kind, with any numbers.
    #[test]
    fn hostile_numbers_are_refused_or_read(
        fields in prop::collection::vec(
            (prop::sample::select(vec!["F32", "U8", "F64", "BOOL", "F4", "x"]),
             prop::collection::vec(prop_oneof![0_u64..5, any::<u64>()], 0..4),
             prop_oneof![0_u64..20, any::<u64>()], prop_oneof![0_u64..20, any::<u64>()]),
            0..4),
        data in 0_usize..40,
    ) {
        let fields: Vec<String> = fields.iter().enumerate().map(|(i, (dtype, shape, start, end))| {
            format!("\"t{i}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}")
        }).collect();
        let header = format!("{{{}}}", fields.join(","));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![7; data]].concat();
        std::fs::write(&path, &bytes).unwrap();
        let ours = read_all(&path);
        // whatever we take, the format's own library takes as well
        if let Ok(tensors) = ours {
            let theirs = SafeTensors::deserialize(&bytes).unwrap();
            prop_assert_eq!(tensors.len(), theirs.len());
            prop_assert!(tensors.iter().all(|(name, tensor)| theirs.tensor(name).unwrap().data() == tensor.bytes));
        }
    }
}

#[test]
fn lies_of_a_header_are_named() {
    let one = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let two = |first: &str, second: &str| {
        format!(
            r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{first}}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{second}}}}}"#
        )
    };
    for (header, data, expected) in [
        (one("F32", "[2]", "[0,4]"), 4, "tensor w: expected 8 bytes by its shape [2] and dtype F32, found 4"),
        (one("F32", "[4611686018427387904,4]", "[0,4]"), 4, "tensor w: expected too many bytes"),
        (one("F32", "[1]", "[0,4]"), 3, "tensor w: expected to end within the file's 3 bytes of data, found 4"),
        (one("F32", "[1]", "[0,4]"), 5, "its tensors take 4 bytes, but 5 follow it"),
        (one("F32", "[1]", "[4,0]"), 4, "tensor w: its end 0 is before its start 4"),
        (one("F32", "[1]", "[4,8]"), 8, "tensor w: leaves a gap: expected to start at 0, found 4"),
        (one("F32", "[-1]", "[0,4]"), 4, "tensor w: "),
        (one("F32", "[1.5]", "[0,4]"), 4, "tensor w: "),
        (one("F8_E4M3", "[1]", "[0,1]"), 1, "tensor w: dtype F8_E4M3 is not supported"),
        (two("[0,4]", "[2,6]"), 6, "tensor b: overlaps the tensor before it: expected to start at 4, found 2"),
        (two("[0,4]", "[0,4]"), 4, "tensor b: overlaps"),
        (r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#.into(), 0, "a is there twice"),
        (r#"{"__metadata__":{"a":1}}"#.into(), 0, "header"),
        (r#"{"__metadata__":{"a":"1","a":"2"}}"#.into(), 0, "a is there twice"),
        (r#"{"__metadata__":{},"__metadata__":{}}"#.into(), 0, "__metadata__ is there twice"),
        (r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":1}}"#.into(), 1, "tensor w: unknown field `more`"),
        (r#"{"w":"#.into(), 0, "header"),
        ("{}x".into(), 0, "header"),
        ("[]".into(), 0, "header"),
        (format!("{{\"w\":{}", "[".repeat(100_000)), 0, "header"),
    ] {
        let error = refusal(&header, data);
        assert!(error.contains(expected), "expected {expected:?} in {error:?}");
    }
}

#[test]
fn lies_of_a_length_are_named() {
    assert!(refusal_of(b"").contains("found a file of 0"));
    assert!(refusal_of(b"1234567").contains("found a file of 7"));
    assert!(
        refusal_of(&[200, 0, 0, 0, 0, 0, 0, 0, b'{', b'}']).contains("its length is 200, but the file has 2")
    );
    assert!(refusal_of(&[0xff; 16]).contains("expected at most 100000000 bytes"));
    assert!(refusal_of(&[2, 0, 0, 0, 0, 0, 0, 0, b'{', 0xff]).contains("header"));
}

#[test]
fn what_is_no_tensor_file_is_not_guessed_at() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.bin");
    for content in ["", "version https://git-lfs.github.com/spec/v1\n", "<html>404</html>"] {
        std::fs::write(&path, content).unwrap();
        let error = TensorFile::open(&path).unwrap_err();
        assert!(
            matches!(&error, TensorFileError::Unrecognized { path } if path.ends_with("model.bin")),
            "{error}"
        );
    }
    let missing = TensorFile::open(folder.path().join("none.safetensors")).unwrap_err();
    assert!(missing.to_string().contains("none.safetensors"), "{missing}");
}

#[test]
fn a_file_that_shrinks_after_opening_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    write_safetensors(&path, &[("w".into(), RawTensor::from_f32(vec![4], vec![1.0; 4]))], &BTreeMap::new())
        .unwrap();
    let file = TensorFile::open(&path).unwrap();
    assert!(matches!(file.read("v"), Err(TensorFileError::Missing { tensor, .. }) if tensor == "v"));
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(20).unwrap();
    assert!(matches!(file.read("w"), Err(TensorFileError::Read { tensor, .. }) if tensor == "w"));
}

#[test]
fn what_cannot_be_read_back_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let tensor = RawTensor::from_f32(vec![1], vec![1.0]);
    let wrong = RawTensor { shape: vec![2], ..tensor.clone() };
    for tensors in [
        vec![("__metadata__".to_string(), tensor.clone())],
        vec![("w".to_string(), tensor.clone()), ("w".to_string(), tensor)],
        vec![("w".to_string(), wrong)],
    ] {
        let error = write_safetensors(&path, &tensors, &BTreeMap::new()).unwrap_err();
        assert!(matches!(error, TensorFileError::Write { .. }), "{error}");
        assert!(!path.exists());
    }
}

/// Real files, where they are.
#[test]
fn published_adapters_are_read() {
    let data = std::env::var_os("CXR_TEST_DATA").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data"),
        std::path::PathBuf::from,
    );
    let path = data.join("lora/diffusers_attn_processor_rank4.safetensors");
    if !path.exists() {
        println!("skipped: {} not found", path.display());
        return;
    }
    let ours = read_all(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(ours.len(), theirs.len());
    assert!(ours.iter().all(|(name, tensor)| theirs.tensor(name).unwrap().data() == tensor.bytes));
}
