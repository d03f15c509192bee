//! What a pickle is made of, without any of Python's behaviour.

/// A value; what does not fit here is a [`Node`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    /// A float, or an integer beyond 64 bits: nothing here depends on it.
    Number,
    Node(usize),
}

/// A value that others refer to. All nodes lie in one vector: values that contain each other, or themselves, however
/// deep, take no recursion to make or to drop.
#[derive(Debug)]
pub(super) enum Node<'a> {
    Text(&'a str),
    Bytes,
    Tuple(Vec<Value>),
    /// A list, or a set.
    List(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    /// A class or function by name. It is never looked up.
    Global(Global<'a>),
    /// What a class or function that is not known here would have made.
    Object(Option<Global<'a>>),
    Storage(Storage<'a>),
    Tensor(Tensor),
}

/// The module and the name of a class or function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Global<'a> {
    pub(super) module: &'a str,
    pub(super) name: &'a str,
}

/// The memory of tensors, elsewhere in the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage<'a> {
    /// The class, e.g. `FloatStorage`.
    pub(super) class: &'a str,
    pub(super) key: &'a str,
    /// The number of elements.
    pub(super) elements: usize,
}

/// A view of a storage; offset and strides count elements.
#[derive(Debug)]
pub(super) struct Tensor {
    /// The node of the storage.
    pub(super) storage: usize,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// A pickle that was read.
#[derive(Debug)]
pub(super) struct Loaded<'a> {
    pub(super) root: Value,
    pub(super) nodes: Vec<Node<'a>>,
    /// The position after it.
    pub(super) end: usize,
}

impl<'a> Loaded<'a> {
    pub(super) fn node(&self, value: Value) -> Option<&Node<'a>> {
        match value {
            Value::Node(index) => self.nodes.get(index),
            _ => None,
        }
    }

    pub(super) fn text(&self, value: Value) -> Option<&'a str> {
        match self.node(value) {
            Some(Node::Text(text)) => Some(text),
            _ => None,
        }
    }

    pub(super) fn dict(&self, value: Value) -> Option<&[(Value, Value)]> {
        match self.node(value) {
            Some(Node::Dict(items)) => Some(items),
            _ => None,
        }
    }

    /// The value of a text key in a dictionary.
    pub(super) fn get(&self, dict: Value, key: &str) -> Option<Value> {
        self.dict(dict)?.iter().rev().find(|(name, _)| self.text(*name) == Some(key)).map(|(_, value)| *value)
    }

    /// What a value is, for messages.
    pub(super) fn describe(&self, value: Value) -> String {
        match self.node(value) {
            Some(Node::Text(_)) => "a text".to_string(),
            Some(Node::Bytes) => "bytes".to_string(),
            Some(Node::Tuple(_)) => "a tuple".to_string(),
            Some(Node::List(_)) => "a list".to_string(),
            Some(Node::Dict(_)) => "a dictionary".to_string(),
            Some(Node::Global(Global { module, name })) => format!("the class {module}.{name}"),
            Some(Node::Object(Some(Global { module, name }))) => format!("an object of {module}.{name}"),
            Some(Node::Object(None)) => "an object".to_string(),
            Some(Node::Storage(_)) => "a storage".to_string(),
            Some(Node::Tensor(_)) => "a single tensor".to_string(),
            None => "a plain value".to_string(),
        }
    }
}
