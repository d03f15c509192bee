use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use cxr_core::tensor_file::{Dtype, TensorFile, TensorFileError};
use proptest::prelude::*;
use serde_json::Value;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use crate::fixture;

/// Every tensor of `plain.json` must be in the file under its name, and nothing else.
fn assert_plain(file: &TensorFile) {
    let reference = crate::json("plain.json");
    let expected = reference["tensors"].as_object().unwrap();
    let mut names: Vec<&str> = expected.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(file.names().collect::<Vec<_>>(), names);
    for (name, expected) in expected {
        let info = file.info(name).unwrap();
        assert_eq!(info.dtype.name(), expected["dtype"], "{name}");
        assert_eq!(serde_json::to_value(&info.shape).unwrap(), expected["shape"], "{name}");
        let tensor = file.read(name).unwrap();
        assert_eq!((tensor.dtype, &tensor.shape), (info.dtype, &info.shape));
        let values = expected["values"].as_array().unwrap();
        if tensor.dtype.is_float() {
            let values: Vec<f32> = values.iter().map(|value| value.as_f64().unwrap() as f32).collect();
            assert_eq!(tensor.to_f32().unwrap(), values, "{name}");
        } else {
            let values: Vec<i64> = values.iter().map(|value| value.as_i64().unwrap()).collect();
            assert_eq!(tensor.to_i64().unwrap(), values, "{name}");
        }
    }
}

#[test]
fn what_torch_saves_is_read() {
    for name in ["plain.pt", "protocol4.pt", "legacy.pt", "lightning.ckpt"] {
        let file = TensorFile::open(fixture(name)).unwrap();
        assert_plain(&file);
        assert!(file.metadata().is_empty());
    }
}

#[test]
fn dictionaries_within_dictionaries_get_names_with_dots() {
    let file = TensorFile::open(fixture("nested.bin")).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["unet.3.b", "unet.a"]);
    assert_eq!(file.info("unet.a").unwrap().shape, [4, 6]);
}

#[test]
fn tensors_of_other_classes_are_tensors() {
    let file = TensorFile::open(fixture("subclasses.pt")).unwrap();
    let names = [
        "attributes",
        "module.bias",
        "module.num_batches_tracked",
        "module.running_mean",
        "module.running_var",
        "module.weight",
        "parameter",
        "transposed",
    ];
    assert_eq!(file.names().collect::<Vec<_>>(), names);
    let read = |name: &str| file.read(name).unwrap().to_f32().unwrap();
    let expected = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0];
    assert_eq!((read("attributes"), read("parameter")), (expected.to_vec(), expected.to_vec()));
    assert_eq!(read("transposed"), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    assert_eq!(
        (file.info("transposed").unwrap().dtype, read("module.weight")),
        (Dtype::BF16, vec![0.0, 1.0, 2.0])
    );
}

/// `OrderedDict([("w", tensor)])`, as Python 2 has it, and a tensor within a tensor's class within another's.
#[test]
fn older_and_stranger_spellings() {
    let plain = one_tensor(storage("FloatStorage", "0", 4), 0, &[4], &[1]);
    // `{"w": tensor}` without its first bytes and its end
    let pair = &plain[3..plain.len() - 2];
    let pickle = |pairs: &[u8]| [&b"\x80\x02ccollections\nOrderedDict\n(]("[..], pairs, b"etR."].concat();
    assert_eq!(try_pickle(&pickle(&[b"(", pair, b"t"].concat())).unwrap(), ["w"]);
    assert!(refusal(&pickle(&[b"(", pair, b"Nt"].concat())).contains("expected a list of keys and values"));
    let function = b"ctorch._tensor\n_rebuild_from_type_v2\n";
    let class = b"ctorch\nTensor\n";
    let inner = tuple(&[storage("FloatStorage", "0", 4), int(0), sizes(&[4]), sizes(&[1])]);
    let outer = |rebuild: &[u8], inner: &[u8]| {
        [&b"\x80\x02}"[..], &text("w"), function, b"(", rebuild, class, inner, b"}tRs."].concat()
    };
    assert_eq!(try_pickle(&outer(b"ctorch._utils\n_rebuild_tensor_v2\n", &inner)).unwrap(), ["w"]);
    for rebuild in [&function[..], b"cos\nsystem\n", b"N"] {
        let error = refusal(&outer(rebuild, &inner));
        assert!(error.contains("tensor w: torch._tensor._rebuild_from_type_v2 is not supported"), "{error}");
    }
    assert!(refusal(&outer(b"N", b"N")).contains("expected a tuple of arguments"));
    // one list in very many dictionaries
    let many = [
        &b"ccollections\nOrderedDict\nq\x000](X\x01\x00\x00\x00aN\x86q\x030"[..],
        &b"h\x03".repeat(1000),
        b"e\x85q\x010",
        &b"h\x00h\x01R0".repeat(10_000),
        b"}.",
    ];
    assert!(refusal(&many.concat()).contains("expected at most 4000000"));
}

#[test]
fn what_is_not_read_says_what_to_do() {
    for (name, expected) in [
        (
            "module.pt",
            "found an object of torch.nn.modules.linear.Linear; in Python, save `model.state_dict()`",
        ),
        ("complex.pt", "tensor complex: dtype ComplexFloatStorage is not supported"),
        (
            "expanded.pt",
            "tensor expanded: shape [1000] with strides [0] from element 0 is more than its storage",
        ),
        ("sparse.pt", "tensor sparse: torch._utils._rebuild_sparse_tensor is not supported"),
        ("compressed.pt", "is compressed; expected it stored"),
    ] {
        let error = TensorFile::open(fixture(name)).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(expected), "expected {expected:?} in {error:?}");
    }
}

/// An archive as `torch.save` lays it out.
fn archive(path: &Path, files: &[(&str, &[u8])]) {
    let mut zip = ZipWriter::new(std::fs::File::create(path).unwrap());
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in files {
        zip.start_file(format!("a/{name}"), options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
}

fn try_pickle(pickle: &[u8]) -> Result<Vec<String>, TensorFileError> {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("hostile.pt");
    archive(&path, &[("data.pkl", pickle), ("data/0", &[0; 16]), ("byteorder", b"little")]);
    let file = TensorFile::open(&path)?;
    // whatever is taken can be read
    file.names().map(|name| file.read(name).map(|_| name.to_string())).collect()
}

fn refusal(pickle: &[u8]) -> String {
    let error = try_pickle(pickle).expect_err("this pickle is broken").to_string();
    assert!(error.contains("hostile.pt"), "{error}");
    error
}

fn text(text: &str) -> Vec<u8> {
    [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

fn int(value: i64) -> Vec<u8> {
    [&b"\x8a\x08"[..], &value.to_le_bytes()].concat()
}

fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(", &items.concat()[..], b"t"].concat()
}

fn sizes(sizes: &[i64]) -> Vec<u8> {
    tuple(&sizes.iter().map(|size| int(*size)).collect::<Vec<_>>())
}

fn storage(class: &str, key: &str, elements: i64) -> Vec<u8> {
    let class = format!("ctorch\n{class}\n").into_bytes();
    [tuple(&[text("storage"), class, text(key), text("cpu"), int(elements)]), b"Q".to_vec()].concat()
}

/// `{"w": tensor}` over the storage of 16 bytes that the archive has.
fn one_tensor(storage: Vec<u8>, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let arguments =
        tuple(&[storage, int(offset), sizes(shape), sizes(strides), b"\x89".to_vec(), b"N".to_vec()]);
    [&b"\x80\x02}"[..], &text("w"), b"ctorch._utils\n_rebuild_tensor_v2\n", &arguments, b"Rs."].concat()
}

#[test]
fn a_tensor_must_lie_in_its_storage() {
    let float = || storage("FloatStorage", "0", 4);
    assert_eq!(try_pickle(&one_tensor(float(), 0, &[2, 2], &[2, 1])).unwrap(), ["w"]);
    assert_eq!(try_pickle(&one_tensor(float(), 1, &[3], &[1])).unwrap(), ["w"]);
    assert_eq!(try_pickle(&one_tensor(float(), 4, &[0], &[1])).unwrap(), ["w"]);
    // no elements, whatever the other dimensions are
    assert_eq!(try_pickle(&one_tensor(float(), 0, &[0, i64::MAX, i64::MAX], &[5, 4, 3])).unwrap(), ["w"]);
    // the stride of a dimension of 1 is never taken
    assert_eq!(try_pickle(&one_tensor(float(), 0, &[1, 2, 1], &[i64::MAX, 2, i64::MAX])).unwrap(), ["w"]);
    for (offset, shape, strides) in [
        (2, vec![3], vec![1]),
        (0, vec![5], vec![1]),
        (0, vec![2, 2], vec![3, 1]),
        (5, vec![0], vec![1]),
        (0, vec![i64::MAX], vec![0]),
        (0, vec![2], vec![i64::MAX]),
        (i64::MAX, vec![1], vec![1]),
        (0, vec![i64::MAX, i64::MAX, 0], vec![1, 1, 1]),
        (0, vec![2, 4], vec![0, 1]),
    ] {
        let error = refusal(&one_tensor(float(), offset, &shape, &strides));
        assert!(error.contains("tensor w:") && error.contains("more than its storage"), "{error}");
    }
    for (shape, strides, expected) in [
        (vec![-1], vec![1], "expected a size, found -1"),
        (vec![1], vec![-1], "expected a size, found -1"),
        (vec![1, 1], vec![1], "differ in dimensions"),
        (vec![1; 65], vec![1; 65], "expected at most 64 dimensions"),
    ] {
        let error = refusal(&one_tensor(float(), 0, &shape, &strides));
        assert!(error.contains(expected), "expected {expected:?} in {error:?}");
    }
}

#[test]
fn a_storage_must_be_as_long_as_it_says() {
    for (storage, expected) in [
        (storage("FloatStorage", "0", 5), "storage \"0\" is to have 5 elements of F32, but has 16 bytes"),
        (storage("FloatStorage", "0", i64::MAX), "but has 16 bytes"),
        (storage("HalfStorage", "0", 4), "4 elements of F16, but has 16 bytes"),
        (storage("FloatStorage", "1", 4), "storage \"1\" is not in the file"),
        (storage("FloatStorage", "../data/0", 4), "is not in the file"),
        (storage("QUInt8Storage", "0", 16), "dtype QUInt8Storage is not supported"),
        (storage("FloatStorage", "0", -4), "expected a size, found -4"),
    ] {
        let error = refusal(&one_tensor(storage, 0, &[1], &[1]));
        assert!(error.contains(expected), "expected {expected:?} in {error:?}");
    }
}

/// The classic attack, and variations of it: nothing is looked up, so nothing can be called.
#[test]
fn functions_are_never_run() {
    let system = [&b"\x80\x02cos\nsystem\n"[..], &tuple(&[text("touch /tmp/hacked")]), b"R."].concat();
    assert!(refusal(&system).contains("found an object of os.system"), "{}", refusal(&system));
    // beside a tensor it is left out
    let tensor = one_tensor(storage("FloatStorage", "0", 4), 0, &[4], &[1]);
    let beside =
        [&tensor[..tensor.len() - 1], &text("x"), b"cbuiltins\neval\n", &tuple(&[text("1")]), b"R}b", b"s."]
            .concat();
    assert_eq!(try_pickle(&beside).unwrap(), ["w"]);
}

#[test]
fn misuse_of_stack_and_memo_is_named() {
    for (pickle, expected) in [
        (&b""[..], "byte 0: expected 1 bytes more, found 0"),
        (b"\x80\x02", "byte 2: expected 1 bytes more"),
        (b"\x80\x09.", "expected a protocol up to 5, found 9"),
        (b".", "the stack is empty"),
        (b"0.", "the stack is empty"),
        (b"2.", "the stack is empty"),
        (b"q\x00.", "the stack is empty"),
        (b"h\x07.", "memo 7 was never set"),
        (b"j\xff\xff\xff\xff.", "memo 4294967295 was never set"),
        (b"t.", "expected a mark"),
        (b"K\x01(0\x85.", "found a tuple"),
        (b"K\x01(\x85.", "the stack is empty"),
        (b"}(K\x01u.", "expected keys and values in turn"),
        (b")K\x01K\x01s.", "expected a dictionary to add to"),
        (b"K\x01K\x01a.", "expected an object"),
        (b")K\x01a.", "expected a list to add to"),
        (b"ctorch\nSize\nK\x01R.", "expected a tuple of arguments"),
        (b")Q.", "expected a storage"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x00K\x00))tR.", "expected the storage of a tensor"),
        (b"X\xff\xff\xff\xffabc", "expected 4294967295 bytes more, found 3"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff", "bytes more, found 0"),
        (b"\x8b\xff\xff\xff\x7f", "expected 2147483647 bytes more"),
        (b"X\x01\x00\x00\x00\xff.", "expected a text in UTF-8"),
        (b"cos\nsystem", "expected a line"),
        (b"Ix\n.", "expected an integer"),
        (b"\x82\x01.", "opcode 0x82 is not supported"),
        (b"K\x01.", "found a plain value"),
        (b"].", "found a list"),
        (b"N.", "found a plain value"),
    ] {
        let error = refusal(pickle);
        assert!(error.contains(expected), "expected {expected:?} in {error:?}");
    }
}

#[test]
fn what_grows_without_end_is_stopped() {
    // a dictionary in itself
    let own = [&b"}q\x00"[..], &text("a"), b"h\x00s."].concat();
    assert!(refusal(&own).contains("nested deeper than 16"), "{}", refusal(&own));
    // dictionaries of which each has the one before ten times: 10^15 entries
    let mut laughs = b"}q\x00".to_vec();
    for level in 1..=15_u8 {
        laughs.push(b'}');
        for key in 0..10 {
            laughs.extend([&text(&key.to_string())[..], b"h", &[level - 1], b"s"].concat());
        }
        laughs.extend([b'q', level]);
    }
    laughs.push(b'.');
    assert!(refusal(&laughs).contains("more than 1000000 entries"), "{}", refusal(&laughs));
    // tuples in tuples: a recursive drop would end the process
    let deep = [&b")"[..], &vec![0x85; 3_000_000], b"."].concat();
    assert!(refusal(&deep).contains("found a tuple"));
    let endless = vec![b'N'; 5_000_000];
    assert!(refusal(&endless).contains("expected at most 4000000 opcodes"));
    // one shape of 64 dimensions for very many tensors
    let shape = sizes(&[1; 64]);
    let arguments = tuple(&[storage("FloatStorage", "0", 4), int(0), shape.clone(), shape]);
    let many = [
        &b"ctorch._utils\n_rebuild_tensor\nq\x000"[..],
        &arguments,
        b"q\x010",
        &b"h\x00h\x01R0".repeat(100_000),
        b"}.",
    ];
    assert!(refusal(&many.concat()).contains("expected at most 4000000 sizes"));
    let large = vec![b'N'; (16 << 20) + 1];
    assert!(refusal(&large).contains("data.pkl of at most 16777216 bytes"));
}

#[test]
fn archives_that_are_no_models_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pt");
    let pickle = one_tensor(storage("FloatStorage", "0", 4), 0, &[4], &[1]);
    let model = [("data.pkl", &pickle[..]), ("data/0", &[0; 16])];
    let refusal = |extra: &[(&str, &[u8])]| {
        archive(&path, &[&model[..], extra].concat());
        TensorFile::open(&path).map(|file| file.names().len()).map_err(|error| error.to_string())
    };
    assert_eq!(refusal(&[]).unwrap(), 1);
    assert!(refusal(&[("byteorder", b"big")]).unwrap_err().contains("byte order"));
    assert!(refusal(&[("b/data.pkl", b"N.")]).unwrap_err().contains("expected one data.pkl"));
    assert!(refusal(&[("constants.pkl", b"N.")]).unwrap_err().contains("TorchScript"));
    archive(&path, &[("weights.txt", b"1 2 3")]);
    assert!(TensorFile::open(&path).unwrap_err().to_string().contains("found 0 of 1 files"));
}

#[test]
fn old_files_are_checked_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old.pt");
    let bytes = std::fs::read(fixture("legacy.pt")).unwrap();
    for length in 0..bytes.len() {
        std::fs::write(&path, &bytes[..length]).unwrap();
        assert!(TensorFile::open(&path).is_err(), "cut to {length}");
    }
    std::fs::write(&path, b"\x80\x02}.").unwrap();
    assert!(TensorFile::open(&path).unwrap_err().to_string().contains("found another pickle"));
}

fn pickle_of(name: &str) -> Vec<u8> {
    let mut zip = ZipArchive::new(std::fs::File::open(fixture(name)).unwrap()).unwrap();
    let index =
        (0..zip.len()).find(|index| zip.by_index(*index).unwrap().name().unwrap().ends_with("data.pkl"));
    let mut bytes = Vec::new();
    zip.by_index(index.unwrap()).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

/// Opens whatever it is and reads all of it; errors are as good as tensors.
fn survive(path: &Path) {
    if let Ok(file) = TensorFile::open(path) {
        for name in file.names() {
            let tensor = file.read(name).unwrap();
            let expected: usize = tensor.shape.iter().product();
            assert_eq!(tensor.bytes.len(), expected * tensor.dtype.size());
        }
    }
}

proptest! {
    #[test]
    fn any_damage_to_a_file_is_survived(
        name in prop::sample::select(vec!["plain.pt", "legacy.pt", "lightning.ckpt", "subclasses.pt"]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.pt");
        let mut bytes = std::fs::read(fixture(name)).unwrap();
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        std::fs::write(&path, bytes).unwrap();
        survive(&path);
    }

    #[test]
    fn any_damage_to_a_pickle_is_survived(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut pickle = pickle_of("plain.pt");
        for (place, byte) in changes {
            let place = place.index(pickle.len());
            pickle[place] = byte;
        }
        let _ = try_pickle(&pickle);
    }

    #[test]
    fn any_opcodes_are_survived(
        pickle in prop::collection::vec(prop::sample::select(
            b"N\x88K\x01(}])t\x85\x86\x87aeslu\x8f\x90\x91qh\x000123\x94R\x81obQcos\nx\n\x93G\x8a\x01.".to_vec()), 0..60),
    ) {
        let _ = try_pickle(&pickle);
    }
}

/// Whole elements, not those of a neighbour: a view reads what PyTorch reads.
#[test]
fn tied_tensors_share_their_storage() {
    let file = TensorFile::open(fixture("plain.pt")).unwrap();
    assert_eq!(
        file.read("tied.one").unwrap().to_f32().unwrap(),
        (0..12).map(|x| x as f32).collect::<Vec<_>>()
    );
    assert_eq!(file.read("tied.two").unwrap().to_f32().unwrap(), [4.0, 5.0, 6.0, 7.0]);
    let value: Value = crate::json("plain.json");
    assert!(value["reference"].as_str().unwrap().starts_with("torch"));
}
