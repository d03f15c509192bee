//! Where the rows of a CSV file begin and which of them are whole.
//!
//! polars parses the cells, but it names no row: with one short row the whole file fails. So this pass goes over the
//! bytes first. It notes on which line each row starts (a quoted cell may hold line breaks, so rows are not lines),
//! sets broken rows aside with the reason, and hands the rest on with plain line ends.

/// The rows of a file, the header among them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Rows {
    /// The whole rows, ready to be parsed: each ends in a line feed, and a cell with a quote in its middle is quoted.
    pub(super) whole: Vec<u8>,
    /// The line on which each whole row starts; the first line is 1.
    pub(super) lines: Vec<u64>,
    /// Broken rows: the line on which each starts, and what is wrong.
    pub(super) broken: Vec<(u64, String)>,
    /// How many cells the header has.
    pub(super) width: usize,
}

impl Rows {
    /// Goes over a file. The first row that is not blank is the header and says how many cells a row has; blank lines
    /// are no rows.
    pub(super) fn find(bytes: &[u8]) -> Self {
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        // The line ends of old Macintosh programs, which some still write.
        if bytes.contains(&b'\r') && !bytes.contains(&b'\n') {
            let lines: Vec<u8> = bytes.iter().map(|&byte| if byte == b'\r' { b'\n' } else { byte }).collect();
            return Self::find(&lines);
        }
        let mut rows = Self::default();
        let (mut at, mut line) = (0, 1);
        while at < bytes.len() {
            if let Some(end) = line_end(bytes, at) {
                at = end;
                line += 1;
                continue;
            }
            let start = rows.whole.len();
            let (next, outcome) = match copy_row(bytes, at, &mut rows.whole) {
                Ok((next, cells)) => (next, rows.check(&bytes[at..next], cells)),
                // A quote that is not closed swallows what follows: go on with the next line instead.
                Err(reason) => (
                    bytes[at..].iter().position(|&b| b == b'\n').map_or(bytes.len(), |n| at + n + 1),
                    Err(reason),
                ),
            };
            match outcome {
                Ok(()) => rows.lines.push(line),
                Err(reason) => {
                    rows.whole.truncate(start);
                    rows.broken.push((line, reason));
                }
            }
            line += bytes[at..next].iter().filter(|&&byte| byte == b'\n').count() as u64;
            at = next;
        }
        rows
    }

    fn check(&mut self, row: &[u8], cells: usize) -> Result<(), String> {
        std::str::from_utf8(row).map_err(|error| format!("it is not UTF-8: {error}"))?;
        if self.width == 0 {
            self.width = cells;
        }
        if cells != self.width {
            return Err(format!("it has {cells} cells, the header {} (is a quote missing?)", self.width));
        }
        Ok(())
    }
}

/// The position behind the end of line that stands at `at`, if one does.
fn line_end(bytes: &[u8], at: usize) -> Option<usize> {
    match bytes[at..] {
        [b'\n', ..] => Some(at + 1),
        [b'\r', b'\n', ..] => Some(at + 2),
        [b'\r'] => Some(at + 1),
        _ => None,
    }
}

/// Appends the row that starts at `at` to `out`; the position behind it and how many cells it has, or what is wrong
/// with its quotes.
fn copy_row(bytes: &[u8], mut at: usize, out: &mut Vec<u8>) -> Result<(usize, usize), String> {
    for cells in 1.. {
        let from = at;
        if bytes.get(at) == Some(&b'"') {
            at = closing_quote(bytes, at + 1).ok_or("a quote is opened and never closed")? + 1;
            out.extend(&bytes[from..at]);
        } else {
            at +=
                bytes[at..].iter().position(|byte| matches!(byte, b',' | b'\n')).unwrap_or(bytes.len() - at);
            let ends_line = bytes.get(at) != Some(&b',');
            if ends_line && at > from && bytes[at - 1] == b'\r' {
                at -= 1;
            }
            copy_plain(&bytes[from..at], out);
        }
        if bytes.get(at) == Some(&b',') {
            out.push(b',');
            at += 1;
        } else if at == bytes.len() {
            out.push(b'\n');
            return Ok((at, cells));
        } else {
            out.push(b'\n');
            let end = line_end(bytes, at).ok_or("text stands behind a closing quote")?;
            return Ok((end, cells));
        }
    }
    unreachable!("a row ends before the numbers do")
}

/// Where the quote is that closes a cell; two quotes in a row are one of its letters.
fn closing_quote(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        at += bytes.get(at..)?.iter().position(|&byte| byte == b'"')?;
        if bytes.get(at + 1) != Some(&b'"') {
            return Some(at);
        }
        at += 2;
    }
}

/// Appends a cell that is not quoted. A quote in its middle (`a 14" plate`) is a letter, but polars counts quotes to
/// find the ends of rows, and takes a carriage return for one: such a cell is quoted.
fn copy_plain(cell: &[u8], out: &mut Vec<u8>) {
    if !cell.contains(&b'"') && !cell.contains(&b'\r') {
        out.extend(cell);
        return;
    }
    out.push(b'"');
    for &byte in cell {
        out.extend(std::iter::repeat_n(byte, if byte == b'"' { 2 } else { 1 }));
    }
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str) -> (String, Vec<u64>, Vec<(u64, String)>) {
        let rows = Rows::find(text.as_bytes());
        (String::from_utf8(rows.whole).unwrap(), rows.lines, rows.broken)
    }

    #[test]
    fn line_ends_blank_lines_and_quotes() {
        let expected = "a,b\n1,\"x\ny\"\n2,\n\"3\",\"\"\"q\"\"\"\n";
        let (whole, lines, broken) = find("a,b\n\n1,\"x\ny\"\n2,\n\"3\",\"\"\"q\"\"\"");
        assert_eq!((whole.as_str(), lines, broken.len()), (expected, vec![1, 3, 5, 6], 0));
        let (whole, lines, broken) =
            find("\u{feff}a,b\r\n\r\n1,\"x\ny\"\r\n2,\r\n\"3\",\"\"\"q\"\"\"\r\n\r\n\r");
        assert_eq!((whole.as_str(), lines, broken.len()), (expected, vec![1, 3, 5, 6], 0));
        assert_eq!(find("a,b\r1,2\r\r3,4\r"), ("a,b\n1,2\n3,4\n".into(), vec![1, 2, 4], vec![]));
        assert_eq!(find("a,b\n14\" plate,x\n").0, "a,b\n\"14\"\" plate\",x\n");
        for empty in ["", "\n", "\r\n\n", "\u{feff}"] {
            assert_eq!(Rows::find(empty.as_bytes()), Rows::default(), "{empty:?}");
        }
    }

    #[test]
    fn broken_rows_are_set_aside_and_the_next_one_is_found() {
        let (whole, lines, broken) = find("a,b\n1\n2,\"open\n3,x\n4,\"y\"z\n5,6,7\n8,9\n");
        assert_eq!((whole.as_str(), lines), ("a,b\n3,x\n8,9\n", vec![1, 4, 7]));
        let found: Vec<(u64, &str)> = broken.iter().map(|(line, why)| (*line, &why[..8])).collect();
        // The quote of line 3 meets the one of line 5; both rows are broken, the row between them is not lost.
        assert_eq!(found, [(2, "it has 1"), (3, "text sta"), (5, "text sta"), (6, "it has 3")]);
        let (_, lines, broken) = find("a,b\n1,\"open\n2,x\n");
        assert_eq!((lines, broken[0].1.as_str()), (vec![1, 3], "a quote is opened and never closed"));
    }

    #[test]
    fn any_bytes_give_rows_or_reasons() {
        // Every text of five letters out of six, with and without a header before it.
        for number in 0..6_usize.pow(5) {
            let letters = [b',', b'"', b'\n', b'\r', b'x', 0xff];
            let bytes: Vec<u8> = (0..5).map(|place| letters[number / 6_usize.pow(place) % 6]).collect();
            for header in [&b""[..], b"a,b\n"] {
                let rows = Rows::find(&[header, &bytes].concat());
                let again = Rows::find(&rows.whole);
                assert_eq!((&again.whole, again.broken.len()), (&rows.whole, 0), "{bytes:?}");
                assert_eq!(again.lines.len(), rows.lines.len(), "{bytes:?}");
            }
        }
    }
}
