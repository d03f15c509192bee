//! The tensors of a pickle by name, each checked against its storage.

use std::collections::BTreeMap;
use std::path::Path;

use super::super::{Dtype, Entry, Result, TensorFileError, TensorInfo, byte_length};
use super::value::{Global, Loaded, Node, Storage, Tensor, Value};

/// Dictionaries within dictionaries; one that contains itself would go on for ever.
const MAX_DEPTH: usize = 16;
/// Entries that are looked at: shared dictionaries can make many of few.
const MAX_VISITS: usize = 1_000_000;
/// The bytes of all names together.
const MAX_NAMES: usize = 64 << 20;

/// Where a storage is in the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    pub(super) start: u64,
    /// In bytes.
    pub(super) length: u64,
}

/// The dtype of a storage class; `None` for one that is not read here.
pub(super) fn dtype_of(class: &str) -> Option<Dtype> {
    Some(match class {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::Bool,
        _ => return None,
    })
}

/// Names and checks the tensors of a pickle; `locate` finds a storage in the file by its key.
pub(super) fn collect(
    path: &Path,
    loaded: &Loaded<'_>,
    locate: &mut dyn FnMut(&str) -> Result<Option<Span>>,
) -> Result<BTreeMap<String, Entry>> {
    let not_tensors = |found| TensorFileError::NotTensors { path: path.to_path_buf(), found };
    // Lightning, and many who train, put the weights beside the optimizer's state.
    let root = match loaded.get(loaded.root, "state_dict") {
        Some(inner) if loaded.dict(inner).is_some() => inner,
        _ => loaded.root,
    };
    if loaded.dict(root).is_none() {
        return Err(not_tensors(loaded.describe(root)));
    }
    let mut collector =
        Collector { path, loaded, locate, entries: BTreeMap::new(), visits: 0, names: 0, object: None };
    collector.dict(root, "", 0)?;
    match (collector.entries.is_empty(), collector.object) {
        (true, Some(object)) => Err(not_tensors(object)),
        _ => Ok(collector.entries),
    }
}

struct Collector<'c, 'a> {
    path: &'c Path,
    loaded: &'c Loaded<'a>,
    locate: &'c mut dyn FnMut(&str) -> Result<Option<Span>>,
    entries: BTreeMap<String, Entry>,
    visits: usize,
    names: usize,
    /// The first object that was left out, for the message if nothing else was found.
    object: Option<String>,
}

impl Collector<'_, '_> {
    fn dict(&mut self, dict: Value, prefix: &str, depth: usize) -> Result<()> {
        let loaded = self.loaded;
        let nesting =
            |problem: String| TensorFileError::NotTensors { path: self.path.to_path_buf(), found: problem };
        if depth > MAX_DEPTH {
            return Err(nesting(format!("dictionaries nested deeper than {MAX_DEPTH}")));
        }
        for (key, value) in loaded.dict(dict).unwrap_or_default() {
            self.visits += 1;
            if self.visits > MAX_VISITS {
                return Err(nesting(format!("more than {MAX_VISITS} entries")));
            }
            let node = loaded.node(*value);
            if !matches!(node, Some(Node::Tensor(_) | Node::Dict(_) | Node::Object(_))) {
                continue;
            }
            let name = match (key, loaded.text(*key)) {
                (_, Some(text)) => format!("{prefix}{text}"),
                (Value::Int(number), _) => format!("{prefix}{number}"),
                _ => return Err(nesting(format!("under {prefix:?} a key that is no text"))),
            };
            self.names += name.len();
            if self.names > MAX_NAMES {
                return Err(nesting(format!("more than {MAX_NAMES} bytes of names")));
            }
            match node {
                Some(Node::Tensor(tensor)) => self.tensor(name, tensor)?,
                Some(Node::Dict(_)) => self.dict(*value, &format!("{name}."), depth + 1)?,
                Some(Node::Object(Some(Global { module, name: function })))
                    if is_rebuild(module, function) =>
                {
                    let problem = format!("{module}.{function} is not supported; save a plain, dense tensor");
                    return Err(self.invalid(name, problem));
                }
                _ => {
                    self.object.get_or_insert_with(|| format!("{} as {name:?}", loaded.describe(*value)));
                }
            }
        }
        Ok(())
    }

    fn tensor(&mut self, name: String, tensor: &Tensor) -> Result<()> {
        let Some(Node::Storage(storage)) = self.loaded.nodes.get(tensor.storage) else {
            return Err(self.invalid(name, "it has no storage".to_string()));
        };
        let Some(dtype) = dtype_of(storage.class) else {
            let found = storage.class.to_string();
            return Err(TensorFileError::UnknownDtype { path: self.path.to_path_buf(), tensor: name, found });
        };
        let span = self.span(&name, storage, dtype)?;
        self.check(&name, tensor, storage, dtype)?;
        let info = TensorInfo { name: name.clone(), dtype, shape: tensor.shape.clone() };
        let start = span.start + (tensor.offset * dtype.size()) as u64;
        let strides = (!is_contiguous(tensor)).then(|| tensor.strides.clone());
        match self.entries.insert(name, Entry { info, start, strides }) {
            None => Ok(()),
            Some(entry) => Err(self.invalid(entry.info.name, "the name is there twice".to_string())),
        }
    }

    /// The storage in the file, which must be as long as the pickle says.
    fn span(&mut self, name: &str, storage: &Storage<'_>, dtype: Dtype) -> Result<Span> {
        let Storage { key, elements, .. } = storage;
        let Some(span) = (self.locate)(key)? else {
            return Err(self.invalid(name.to_string(), format!("its storage {key:?} is not in the file")));
        };
        let bytes = byte_length(&[*elements], dtype);
        if bytes.is_none_or(|bytes| bytes as u64 != span.length) {
            let problem = format!(
                "its storage {key:?} is to have {elements} elements of {dtype}, but has {} bytes",
                span.length
            );
            return Err(self.invalid(name.to_string(), problem));
        }
        Ok(span)
    }

    /// Every element must lie in the storage, and there may be no more of them than it has.
    fn check(&self, name: &str, tensor: &Tensor, storage: &Storage<'_>, dtype: Dtype) -> Result<()> {
        let Tensor { offset, shape, strides, .. } = tensor;
        let available = storage.elements;
        let wrong = || {
            let problem = format!(
                "shape {shape:?} with strides {strides:?} from element {offset} is more than its storage of \
                 {available} elements; in Python, save `tensor.contiguous()`"
            );
            self.invalid(name.to_string(), problem)
        };
        let elements = byte_length(shape, dtype).ok_or_else(wrong)? / dtype.size();
        let end = if elements == 0 {
            Some(*offset)
        } else {
            let last = shape.iter().zip(strides).try_fold(*offset, |last, (dim, stride)| {
                (dim - 1).checked_mul(*stride).and_then(|step| last.checked_add(step))
            });
            last.and_then(|last| last.checked_add(1))
        };
        match end {
            Some(end) if end <= available && elements <= available => Ok(()),
            _ => Err(wrong()),
        }
    }

    fn invalid(&self, tensor: String, problem: String) -> TensorFileError {
        TensorFileError::Invalid { path: self.path.to_path_buf(), tensor, problem }
    }
}

fn is_rebuild(module: &str, function: &str) -> bool {
    module.starts_with("torch.") && function.starts_with("_rebuild")
}

/// Whether elements follow each other; the stride of a dimension of 1 does not matter.
///
/// The tensor must have been checked, so that the number of its elements can be counted from either end.
fn is_contiguous(tensor: &Tensor) -> bool {
    if tensor.shape.contains(&0) {
        return true;
    }
    let mut expected = 1;
    tensor.shape.iter().zip(&tensor.strides).rev().all(|(dim, stride)| {
        let fits = *dim == 1 || *stride == expected;
        expected *= dim;
        fits
    })
}
