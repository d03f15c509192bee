use cxr_core::metadata::{MetadataRow, read_jsonl, write_jsonl};
use cxr_dataset::{Collection, Columns, DatasetError, ReadOptions};
use serde_json::json;

use super::{open, write, write_image};

#[test]
fn metadata_rows_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let rows: Vec<MetadataRow> = (0..3_u8)
        .map(|i| MetadataRow {
            file_name: format!("images/{i}.png"),
            text: format!("Text {i}."),
            labels: if i == 0 { Vec::new() } else { vec!["Mass".into()] },
            view: (i == 1).then(|| "PA".into()),
            group: Some(format!("p{i}")),
            ..MetadataRow::default()
        })
        .collect();
    for (i, row) in rows.iter().enumerate() {
        write_image(folder.path(), &row.file_name, i as u8);
    }
    write_jsonl(folder.path().join("metadata.jsonl"), &rows).unwrap();
    let all = open(folder.path()).unwrap();
    assert_eq!(all.source, "table");
    assert_eq!(all.metadata_rows(), rows);
    assert_eq!(all.pairs.iter().map(|pair| pair.row).collect::<Vec<_>>(), [1, 2, 3]);

    // What a program adds of its own is kept aside.
    let mut extra = rows[0].clone();
    extra.seed = Some(7);
    extra.extra.insert("steps".into(), json!(30));
    write_jsonl(folder.path().join("metadata.jsonl"), &[extra]).unwrap();
    let own = &open(folder.path()).unwrap().pairs[0].extra;
    assert_eq!((own["seed"].as_str(), own["steps"].as_str()), ("7", "30"));
}

/// What pictures were made from goes through a collection and back into a file, however often.
#[test]
fn rows_of_a_collection_can_be_written_and_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metadata.jsonl");
    write_image(folder.path(), "a.png", 1);
    write(
        folder.path(),
        "mine.csv",
        "file_name,report,text,seed,note\na.png,Mass.,unused,18446744073709551615,x\n",
    );
    let columns = Columns { text: Some("report".into()), ..Columns::default() };
    let options = ReadOptions { columns, ..ReadOptions::default() };
    let rows = Collection::open(&folder.path().join("mine.csv"), &options).unwrap().metadata_rows();
    assert_eq!((rows[0].text.as_str(), rows[0].seed), ("Mass.", Some(u64::MAX)));
    assert_eq!(rows[0].extra.keys().collect::<Vec<_>>(), ["note"]);
    for _ in 0..2 {
        write_jsonl(&path, &rows).unwrap();
        assert_eq!(read_jsonl(&path).unwrap(), rows);
        assert_eq!(open(&path).unwrap().metadata_rows(), rows);
    }
}

#[test]
fn any_csv_with_named_columns() {
    let folder = tempfile::tempdir().unwrap();
    let csv = "path,report,patient,Mass,Edema,tags,pose\na.png,\"Mass,  seen.\",7,1.0,0.0,x;y,PA\nb.png,None.,,,-1,,\n";
    write(folder.path(), "mine.csv", csv);
    write_image(folder.path(), "a.png", 1);
    write_image(folder.path(), "b.png", 2);
    let options = ReadOptions {
        columns: Columns {
            image: Some("path".into()),
            text: Some("report".into()),
            group: Some("patient".into()),
            view: Some("pose".into()),
            labels: vec!["Mass".into(), "Edema".into(), "tags".into()],
        },
        ..ReadOptions::default()
    };
    let all = Collection::open(&folder.path().join("mine.csv"), &options).unwrap();
    let [a, b] = all.pairs.as_slice() else { panic!("{} pairs", all.len()) };
    assert_eq!(
        (a.text.as_str(), a.group.as_deref(), a.view.as_deref()),
        ("Mass, seen.", Some("7"), Some("PA"))
    );
    assert_eq!(a.labels.iter().collect::<Vec<_>>(), ["Mass", "x", "y"]);
    assert_eq!((b.group.as_deref(), b.view.as_deref(), b.labels.len()), (None, None, 0));

    let defaults = Collection::open(&folder.path().join("mine.csv"), &ReadOptions::default()).unwrap_err();
    let DatasetError::MissingColumns { missing, .. } = &defaults else { panic!("{defaults}") };
    assert_eq!(missing, "file_name, text");
}

#[test]
fn a_column_named_by_hand_must_exist() {
    let folder = tempfile::tempdir().unwrap();
    write_image(folder.path(), "a.png", 1);
    let options = ReadOptions {
        columns: Columns { group: Some("patient".into()), ..Columns::default() },
        ..ReadOptions::default()
    };
    for (name, text) in
        [("m.csv", "file_name,text\na.png,x\n"), ("m.jsonl", "{\"file_name\": \"a.png\", \"text\": \"x\"}\n")]
    {
        write(folder.path(), name, text);
        let path = folder.path().join(name);
        let error = Collection::open(&path, &options).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("patient"), "{error}");
        assert_eq!(Collection::open(&path, &ReadOptions::default()).unwrap().len(), 1);
    }
}

#[test]
fn broken_lines_of_jsonl_are_named() {
    let folder = tempfile::tempdir().unwrap();
    write_image(folder.path(), "a.png", 1);
    let good = "{\"file_name\": \"a.png\", \"text\": \"x\"}\n";
    for (bad, word) in [
        ("{\"file_name\": \"b.png\"}", "it has no \"text\""),
        ("{\"file_name\": \"b.png\", \"text\": [1]}", "expected text"),
        ("{\"file_name\": \"b.png\", \"text\": \"x\", \"labels\": {}}", "expected names"),
        ("{\"file_name\": \" \", \"text\": \"x\"}", "the cell is empty"),
        ("[1, 2]", "is broken"),
        ("{\"file_name\"", "is broken"),
    ] {
        write(folder.path(), "metadata.jsonl", &format!("{good}\n{bad}\n"));
        let error = open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("row 3 of") && error.contains(word), "{bad}: {error}");
    }
}
