//! A machine for the pickle opcodes that tensors and what is saved beside them need.
//!
//! It makes data alone: a class or function that is not one of PyTorch's few for rebuilding tensors becomes an inert
//! [`Node::Object`]. Each opcode takes constant memory beside the bytes it has, and their number is limited, so a
//! hostile pickle ends in an error. Opcodes: <https://github.com/python/cpython/blob/3.11/Lib/pickletools.py>.

use std::collections::HashMap;

use super::value::{Global, Loaded, Node, Storage, Tensor, Value};

/// A model of a hundred thousand tensors has two million.
const MAX_OPCODES: usize = 4_000_000;
/// PyTorch's own limit.
const MAX_DIMENSIONS: usize = 64;
/// Of all shapes, strides and pairs together that calls copy out of their arguments.
const MAX_COPIED: usize = 4_000_000;

/// What is wrong at a position.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) position: usize,
    pub(super) problem: String,
}

type Result<T> = std::result::Result<T, String>;

/// Reads the pickle that begins at `start`.
pub(super) fn load(bytes: &[u8], start: usize) -> std::result::Result<Loaded<'_>, Problem> {
    let mut machine = Machine {
        bytes,
        position: start,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        nodes: Vec::new(),
        copied: 0,
    };
    for _ in 0..MAX_OPCODES {
        let position = machine.position;
        match machine.step() {
            Ok(None) => {}
            Ok(Some(root)) => return Ok(Loaded { root, nodes: machine.nodes, end: machine.position }),
            Err(problem) => return Err(Problem { position, problem }),
        }
    }
    Err(Problem { position: machine.position, problem: format!("expected at most {MAX_OPCODES} opcodes") })
}

struct Machine<'a> {
    bytes: &'a [u8],
    position: usize,
    stack: Vec<Value>,
    /// Heights of the stack: what is below the last one is out of reach.
    marks: Vec<usize>,
    memo: HashMap<u64, Value>,
    nodes: Vec<Node<'a>>,
    /// How many values calls have copied so far.
    copied: usize,
}

impl<'a> Machine<'a> {
    /// Runs one opcode; the value of a pickle that is at its end.
    fn step(&mut self) -> Result<Option<Value>> {
        let [opcode] = self.array()?;
        match opcode {
            b'.' => return self.pop().map(Some),
            0x80 => self.protocol()?,
            // FRAME: how much the writer wrote at a time
            0x95 => self.array::<8>().map(drop)?,
            b'N' => self.stack.push(Value::None),
            0x88 => self.stack.push(Value::Bool(true)),
            0x89 => self.stack.push(Value::Bool(false)),
            b'J' | b'K' | b'M' | 0x8a | 0x8b | b'I' | b'L' | b'G' | b'F' => self.number(opcode)?,
            b'X' | 0x8c | 0x8d | b'T' | b'U' | b'B' | b'C' | 0x8e | 0x96 => self.string(opcode)?,
            b'(' => self.marks.push(self.stack.len()),
            b')' | b't' | 0x85..=0x87 => self.tuple(opcode)?,
            b']' | b'l' | 0x8f | 0x91 | b'a' | b'e' | 0x90 => self.list(opcode)?,
            b'}' | b'd' | b's' | b'u' => self.dict(opcode)?,
            b'q' | b'r' | 0x94 | b'p' | b'h' | b'j' | b'g' => self.memo(opcode)?,
            b'0' | b'1' | b'2' => self.stack_only(opcode)?,
            b'c' | 0x93 | b'R' | 0x81 | 0x92 | b'o' | b'b' => self.object(opcode)?,
            b'Q' => self.persistent()?,
            _ => return Err(format!("opcode {opcode:#04x} is not supported")),
        }
        Ok(None)
    }

    fn protocol(&mut self) -> Result<()> {
        match self.array()? {
            [0..=5] => Ok(()),
            [version] => Err(format!("expected a protocol up to 5, found {version}")),
        }
    }

    fn number(&mut self, opcode: u8) -> Result<()> {
        let value = match opcode {
            b'J' => Value::Int(i32::from_le_bytes(self.array()?).into()),
            b'K' => Value::Int(u8::from_le_bytes(self.array()?).into()),
            b'M' => Value::Int(u16::from_le_bytes(self.array()?).into()),
            b'G' => self.array::<8>().map(|_| Value::Number)?,
            b'F' => self.line().map(|_| Value::Number)?,
            b'I' => match self.line()? {
                "00" => Value::Bool(false),
                "01" => Value::Bool(true),
                digits => integer(digits)?,
            },
            b'L' => {
                let digits = self.line()?;
                integer(digits.strip_suffix('L').unwrap_or(digits))?
            }
            _ => {
                let length = match opcode {
                    0x8a => u8::from_le_bytes(self.array()?).into(),
                    _ => u32::from_le_bytes(self.array()?).into(),
                };
                little_endian(self.take(length)?)
            }
        };
        self.stack.push(value);
        Ok(())
    }

    fn string(&mut self, opcode: u8) -> Result<()> {
        let length = match opcode {
            0x8c | b'U' | b'C' => u8::from_le_bytes(self.array()?).into(),
            b'X' | b'T' | b'B' => u32::from_le_bytes(self.array()?).into(),
            _ => u64::from_le_bytes(self.array()?),
        };
        let bytes = self.take(length)?;
        let node = match (opcode, std::str::from_utf8(bytes)) {
            (b'B' | b'C' | 0x8e | 0x96, _) => Node::Bytes,
            (_, Ok(text)) => Node::Text(text),
            // Python 2's strings are bytes, names among them
            (b'T' | b'U', Err(_)) => Node::Bytes,
            (_, Err(_)) => return Err("expected a text in UTF-8".to_string()),
        };
        self.push_node(node);
        Ok(())
    }

    fn tuple(&mut self, opcode: u8) -> Result<()> {
        let items = match opcode {
            b')' => Vec::new(),
            b't' => self.pop_to_mark()?,
            _ => {
                let count = usize::from(opcode - 0x84);
                let mut items = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
                items.reverse();
                items
            }
        };
        self.push_node(Node::Tuple(items));
        Ok(())
    }

    fn list(&mut self, opcode: u8) -> Result<()> {
        let added = match opcode {
            b']' | 0x8f => {
                self.push_node(Node::List(Vec::new()));
                return Ok(());
            }
            b'l' | 0x91 => {
                let items = self.pop_to_mark()?;
                self.push_node(Node::List(items));
                return Ok(());
            }
            b'a' => vec![self.pop()?],
            _ => self.pop_to_mark()?,
        };
        match self.top()? {
            Node::List(items) => items.extend(added),
            Node::Object(_) => {}
            _ => return Err("expected a list to add to".to_string()),
        }
        Ok(())
    }

    fn dict(&mut self, opcode: u8) -> Result<()> {
        let added = match opcode {
            b'}' => Vec::new(),
            b's' => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => self.pop_to_mark()?,
        };
        let (pairs, rest) = added.as_chunks::<2>();
        if !rest.is_empty() {
            return Err("expected keys and values in turn".to_string());
        }
        let pairs = pairs.iter().map(|[key, value]| (*key, *value));
        if matches!(opcode, b'}' | b'd') {
            let pairs = pairs.collect();
            self.push_node(Node::Dict(pairs));
            return Ok(());
        }
        match self.top()? {
            Node::Dict(items) => items.extend(pairs),
            Node::Object(_) => {}
            _ => return Err("expected a dictionary to add to".to_string()),
        }
        Ok(())
    }

    fn memo(&mut self, opcode: u8) -> Result<()> {
        let index = match opcode {
            b'q' | b'h' => u8::from_le_bytes(self.array()?).into(),
            b'r' | b'j' => u32::from_le_bytes(self.array()?).into(),
            0x94 => self.memo.len() as u64,
            _ => {
                let line = self.line()?;
                line.parse().map_err(|_| format!("expected a number, found {line:?}"))?
            }
        };
        if matches!(opcode, b'h' | b'j' | b'g') {
            let value = self.memo.get(&index).ok_or_else(|| format!("memo {index} was never set"))?;
            self.stack.push(*value);
        } else {
            let value = *self.reachable().last().ok_or("the stack is empty")?;
            self.memo.insert(index, value);
        }
        Ok(())
    }

    fn stack_only(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            b'1' => self.pop_to_mark().map(drop),
            b'2' => {
                let value = *self.reachable().last().ok_or("the stack is empty")?;
                self.stack.push(value);
                Ok(())
            }
            // POP takes a mark away where there is nothing above it
            _ if self.marks.last() == Some(&self.stack.len()) => {
                self.marks.pop();
                Ok(())
            }
            _ => self.pop().map(drop),
        }
    }

    fn object(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push_node(Node::Global(Global { module, name }));
            }
            0x93 => {
                let (name, module) = (self.pop_text()?, self.pop_text()?);
                self.push_node(Node::Global(Global { module, name }));
            }
            b'R' => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                let value = self.call(function, arguments)?;
                self.stack.push(value);
            }
            // NEWOBJ, NEWOBJ_EX, OBJ: instances of classes
            0x81 | 0x92 => {
                let arguments = if opcode == 0x92 { 2 } else { 1 };
                (0..arguments).try_for_each(|_| self.pop().map(drop))?;
                let class = self.pop()?;
                self.push_node(Node::Object(self.global(class)));
            }
            b'o' => {
                let class = *self.pop_to_mark()?.first().ok_or("expected a class, found nothing")?;
                self.push_node(Node::Object(self.global(class)));
            }
            // BUILD: attributes, which neither an inert object nor a dictionary of tensors needs
            _ => {
                self.pop()?;
                self.top()?;
            }
        }
        Ok(())
    }

    /// What PyTorch's functions for rebuilding tensors make; any other makes an inert object.
    fn call(&mut self, function: Value, arguments: Value) -> Result<Value> {
        let (global, arguments) = (self.global(function), self.arguments(arguments)?);
        let node = match (global.map(|global| (global.module, global.name)), arguments) {
            (Some(("collections", "OrderedDict")), []) => Node::Dict(Vec::new()),
            // as Python 2 wrote it
            (Some(("collections", "OrderedDict")), [pairs]) => Node::Dict(self.pairs(*pairs)?),
            (Some(("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state")), [data, ..]) => {
                return Ok(*data);
            }
            (Some(("torch", "Size")), [sizes]) => return Ok(*sizes),
            // a tensor with attributes, or of a class derived from it: function, class, arguments, attributes
            (Some(("torch._tensor", "_rebuild_from_type_v2")), [function, _, inner, _]) => {
                let (function, inner) = (self.global(*function), self.arguments(*inner)?);
                // what is no plain tensor inside stays what it is outside
                self.rebuild(function, inner)?.map_or(Node::Object(global), Node::Tensor)
            }
            (_, arguments) => self.rebuild(global, arguments)?.map_or(Node::Object(global), Node::Tensor),
        };
        // one tuple can be the shape of many tensors, one list the pairs of many dictionaries
        self.copied += match &node {
            Node::Tensor(tensor) => tensor.shape.len() + tensor.strides.len(),
            Node::Dict(items) => items.len(),
            _ => 0,
        };
        if self.copied > MAX_COPIED {
            return Err(format!("expected at most {MAX_COPIED} sizes of all tensors together"));
        }
        self.nodes.push(node);
        Ok(Value::Node(self.nodes.len() - 1))
    }

    /// The tensor that a function makes of its arguments, if it is one for plain tensors.
    fn rebuild(&self, function: Option<Global<'a>>, arguments: &[Value]) -> Result<Option<Tensor>> {
        match (function.map(|function| (function.module, function.name)), arguments) {
            (
                Some(("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2")),
                [storage, offset, shape, strides, ..],
            ) => self.tensor(*storage, *offset, *shape, *strides).map(Some),
            _ => Ok(None),
        }
    }

    fn arguments(&self, value: Value) -> Result<&[Value]> {
        match self.node(value) {
            Some(Node::Tuple(items)) => Ok(items),
            _ => Err("expected a tuple of arguments".to_string()),
        }
    }

    /// A list of pairs.
    fn pairs(&self, value: Value) -> Result<Vec<(Value, Value)>> {
        let expected = || "expected a list of keys and values".to_string();
        let Some(Node::List(items)) = self.node(value) else { return Err(expected()) };
        let pair = |item: &Value| match self.node(*item) {
            Some(Node::Tuple(pair) | Node::List(pair)) => match pair[..] {
                [key, value] => Ok((key, value)),
                _ => Err(expected()),
            },
            _ => Err(expected()),
        };
        items.iter().map(pair).collect()
    }

    fn tensor(&self, storage: Value, offset: Value, shape: Value, strides: Value) -> Result<Tensor> {
        let storage = match (storage, self.node(storage)) {
            (Value::Node(index), Some(Node::Storage(_))) => index,
            _ => return Err("expected the storage of a tensor".to_string()),
        };
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        if shape.len() != strides.len() {
            return Err(format!("shape {shape:?} and strides {strides:?} differ in dimensions"));
        }
        Ok(Tensor { storage, offset: size(offset)?, shape, strides })
    }

    fn sizes(&self, value: Value) -> Result<Vec<usize>> {
        match self.node(value) {
            Some(Node::Tuple(items)) if items.len() <= MAX_DIMENSIONS => {
                items.iter().map(|item| size(*item)).collect()
            }
            Some(Node::Tuple(items)) => {
                Err(format!("expected at most {MAX_DIMENSIONS} dimensions, found {}", items.len()))
            }
            _ => Err("expected a tuple of sizes".to_string()),
        }
    }

    /// BINPERSID: a storage, by `("storage", class, key, device, elements)` and, in old files, a view of it.
    fn persistent(&mut self) -> Result<()> {
        const EXPECTED: &str = "expected a storage as ('storage', class, key, device, elements)";
        let id = self.pop()?;
        let Some(Node::Tuple(items)) = self.node(id) else { return Err(EXPECTED.to_string()) };
        let (kind, class, key, elements) = match items[..] {
            [kind, class, key, _, elements] | [kind, class, key, _, elements, Value::None] => {
                (kind, class, key, elements)
            }
            _ => return Err(EXPECTED.to_string()),
        };
        let storage = match (self.text(kind), self.global(class), self.text(key)) {
            (Some("storage"), Some(class), Some(key)) => {
                Storage { class: class.name, key, elements: size(elements)? }
            }
            _ => return Err(EXPECTED.to_string()),
        };
        self.push_node(Node::Storage(storage));
        Ok(())
    }

    fn node(&self, value: Value) -> Option<&Node<'a>> {
        match value {
            Value::Node(index) => self.nodes.get(index),
            _ => None,
        }
    }

    fn global(&self, value: Value) -> Option<Global<'a>> {
        match self.node(value) {
            Some(Node::Global(global)) => Some(*global),
            _ => None,
        }
    }

    fn text(&self, value: Value) -> Option<&'a str> {
        match self.node(value) {
            Some(Node::Text(text)) => Some(text),
            _ => None,
        }
    }

    fn push_node(&mut self, node: Node<'a>) {
        self.nodes.push(node);
        self.stack.push(Value::Node(self.nodes.len() - 1));
    }

    /// The part of the stack above the last mark.
    fn reachable(&self) -> &[Value] {
        &self.stack[self.marks.last().copied().unwrap_or(0)..]
    }

    /// The node at the top of the stack.
    fn top(&mut self) -> Result<&mut Node<'a>> {
        match self.reachable().last().copied() {
            Some(Value::Node(index)) => Ok(&mut self.nodes[index]),
            Some(_) => Err("expected an object, found a plain value".to_string()),
            None => Err("the stack is empty".to_string()),
        }
    }

    fn pop(&mut self) -> Result<Value> {
        if self.reachable().is_empty() {
            return Err("the stack is empty".to_string());
        }
        self.stack.pop().ok_or_else(|| "the stack is empty".to_string())
    }

    fn pop_text(&mut self) -> Result<&'a str> {
        let value = self.pop()?;
        self.text(value).ok_or_else(|| "expected a text".to_string())
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value>> {
        let mark = self.marks.pop().ok_or("expected a mark, found none")?;
        Ok(self.stack.split_off(mark))
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.position..];
        let taken = usize::try_from(length).ok().and_then(|length| rest.get(..length));
        let taken = taken.ok_or_else(|| format!("expected {length} bytes more, found {}", rest.len()))?;
        self.position += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.position..];
        let end = rest.iter().position(|byte| *byte == b'\n').ok_or("expected a line, found no end of it")?;
        self.position += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|_| "expected a line in UTF-8".to_string())
    }
}

fn size(value: Value) -> Result<usize> {
    match value {
        Value::Int(size) => usize::try_from(size).map_err(|_| format!("expected a size, found {size}")),
        _ => Err("expected a size".to_string()),
    }
}

fn integer(digits: &str) -> Result<Value> {
    match digits.parse() {
        Ok(value) => Ok(Value::Int(value)),
        Err(_) if digits.strip_prefix('-').unwrap_or(digits).bytes().all(|byte| byte.is_ascii_digit()) => {
            Ok(Value::Number)
        }
        Err(_) => Err("expected an integer".to_string()),
    }
}

/// Two's complement of any length.
fn little_endian(bytes: &[u8]) -> Value {
    if bytes.len() > 8 {
        return Value::Number;
    }
    let negative = bytes.last().is_some_and(|byte| *byte >= 0x80);
    let mut all = [if negative { 0xff } else { 0 }; 8];
    all[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(all))
}
