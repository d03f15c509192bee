//! numpy's array format (NEP 1), as far as statistics need it.
//!
//! The crate that reads all of it brings a parser generator and C with it, for a header of three entries.

/// An array as its file has it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Array {
    /// numpy's name of the element type, e.g. `<f8`.
    pub(crate) kind: String,
    pub(crate) shape: Vec<usize>,
    bytes: Vec<u8>,
}

const MAGIC: &[u8] = b"\x93NUMPY";

/// Reads an array; one that runs by columns is turned round.
pub(crate) fn read(bytes: &[u8]) -> Result<Array, String> {
    let cut = || "it is cut short".to_string();
    let rest = bytes.strip_prefix(MAGIC).ok_or("it is no numpy array")?;
    let (&[version, _], rest) = rest.split_first_chunk::<2>().ok_or_else(cut)?;
    let (length, rest) = match version {
        1 => rest.split_first_chunk().map(|(n, rest)| (usize::from(u16::from_le_bytes(*n)), rest)),
        2 | 3 => rest.split_first_chunk().map(|(n, rest)| (u32::from_le_bytes(*n) as usize, rest)),
        _ => return Err(format!("version {version} of the format is not known")),
    }
    .ok_or_else(cut)?;
    let (header, data) = rest.split_at_checked(length).ok_or_else(cut)?;
    let header = std::str::from_utf8(header).map_err(|_| "its header is no text")?;
    let kind = quoted(entry(header, "descr")?).ok_or("its element type is not a plain one")?.to_string();
    let by_columns = entry(header, "fortran_order")?.starts_with("True");
    let shape = shape(entry(header, "shape")?)?;
    let size: usize = match kind.as_str() {
        "<f8" | "<i8" => 8,
        "<f4" | "<i4" => 4,
        text if text.starts_with("|S") => text[2..].parse().map_err(|_| "its text has no length")?,
        other => return Err(format!("elements of type {other}, expected <f8")),
    };
    let count = shape.iter().try_fold(size, |n, dim| n.checked_mul(*dim)).ok_or("its shape is too large")?;
    let data = data.get(..count).ok_or_else(cut)?;
    let bytes = match (by_columns, &shape[..]) {
        (true, &[rows, columns]) => {
            let element = |i: usize| {
                let at = (i % columns * rows + i / columns) * size;
                &data[at..at + size]
            };
            (0..rows * columns).flat_map(element).copied().collect()
        }
        _ => data.to_vec(),
    };
    Ok(Array { kind, shape, bytes })
}

/// What follows `'name':` in a header.
fn entry<'a>(header: &'a str, name: &str) -> Result<&'a str, String> {
    let missing = || format!("its header has no `{name}`");
    let (_, rest) = header.split_once(&format!("'{name}'")).ok_or_else(missing)?;
    Ok(rest.trim_start().strip_prefix(':').ok_or_else(missing)?.trim_start())
}

fn quoted(text: &str) -> Option<&str> {
    text.strip_prefix('\'')?.split_once('\'').map(|(inner, _)| inner)
}

fn shape(text: &str) -> Result<Vec<usize>, String> {
    let wrong = || "its shape is not one".to_string();
    let (inner, _) = text.strip_prefix('(').and_then(|t| t.split_once(')')).ok_or_else(wrong)?;
    let parts = inner.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts.map(|part| part.parse().map_err(|_| wrong())).collect()
}

impl Array {
    /// All values of an array of numbers.
    pub(crate) fn numbers(&self) -> Result<Vec<f64>, String> {
        let (eights, fours) = (self.bytes.as_chunks::<8>().0, self.bytes.as_chunks::<4>().0);
        match self.kind.as_str() {
            "<f8" => Ok(eights.iter().map(|b| f64::from_le_bytes(*b)).collect()),
            "<i8" => Ok(eights.iter().map(|b| i64::from_le_bytes(*b) as f64).collect()),
            "<f4" => Ok(fours.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()),
            "<i4" => Ok(fours.iter().map(|b| f64::from(i32::from_le_bytes(*b))).collect()),
            other => Err(format!("elements of type {other} are no numbers")),
        }
    }

    /// A text; none if it is something else.
    pub(crate) fn text(&self) -> Option<String> {
        self.kind.starts_with("|S").then(|| {
            let end = self.bytes.iter().position(|b| *b == 0).unwrap_or(self.bytes.len());
            String::from_utf8_lossy(&self.bytes[..end]).into_owned()
        })
    }
}

/// An array of f64 by rows.
pub(crate) fn write_f64(shape: &[usize], values: &[f64]) -> Vec<u8> {
    write("<f8", shape, values.iter().flat_map(|v| v.to_le_bytes()))
}

/// A single number.
pub(crate) fn write_i64(value: i64) -> Vec<u8> {
    write("<i8", &[], value.to_le_bytes().into_iter())
}

/// A single text, as bytes.
pub(crate) fn write_text(text: &str) -> Vec<u8> {
    write(&format!("|S{}", text.len().max(1)), &[], text.bytes().chain(text.is_empty().then_some(0)))
}

fn write(kind: &str, shape: &[usize], data: impl Iterator<Item = u8>) -> Vec<u8> {
    let dims: String = shape.iter().map(|dim| format!("{dim}, ")).collect();
    let dims = if shape.len() > 1 { dims.trim_end_matches(", ") } else { dims.trim_end() };
    let mut header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': ({dims}), }}");
    // Magic, version, length and header end at a multiple of 64, with a new line.
    while !(MAGIC.len() + 4 + header.len() + 1).is_multiple_of(64) {
        header.push(' ');
    }
    header.push('\n');
    let mut out = MAGIC.to_vec();
    out.extend([1, 0]);
    out.extend((header.len() as u16).to_le_bytes());
    out.extend(header.into_bytes());
    out.extend(data);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_are_read_back() {
        let array = read(&write_f64(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.5])).unwrap();
        assert_eq!(
            (array.shape.clone(), array.numbers().unwrap()),
            (vec![2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.5])
        );
        let one = read(&write_f64(&[1], &[7.0])).unwrap();
        assert_eq!((one.shape.clone(), one.numbers().unwrap()), (vec![1], vec![7.0]));
        assert_eq!(read(&write_i64(-3)).unwrap().numbers().unwrap(), [-3.0]);
        assert_eq!(read(&write_text("pytorch-fid")).unwrap().text().unwrap(), "pytorch-fid");
        assert_eq!(read(&write_text("")).unwrap().text().unwrap(), "");
    }

    #[test]
    fn arrays_by_columns_are_turned_round() {
        let by_rows = write_f64(&[3, 2], &[1.0, 3.0, 5.0, 2.0, 4.0, 6.0]);
        let text = String::from_utf8_lossy(&by_rows[10..128]).replace("False", "True ");
        let by_columns = [&by_rows[..10], text.as_bytes(), &by_rows[128..]].concat();
        assert_eq!(read(&by_columns).unwrap().numbers().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn other_types_and_broken_headers_are_refused() {
        let good = write_f64(&[2], &[1.0, 2.0]);
        for cut in 0..good.len() {
            assert!(read(&good[..cut]).is_err(), "cut at {cut}");
        }
        let with = |from: &str, to: &str| {
            let header = String::from_utf8_lossy(&good[10..128]).replace(from, to);
            read(&[&good[..10], &header.as_bytes()[..118], &good[128..]].concat())
        };
        assert!(with("<f8", ">f8").unwrap_err().contains(">f8"));
        assert!(with("(2,)", "(9,)").unwrap_err().contains("short"));
        assert!(with("(2,)", "(x,)").is_err());
        assert!(with("shape", "shade").unwrap_err().contains("shape"));
    }
}
