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

#[test]
fn images_may_lie_elsewhere_than_their_table() {
    let folder = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    write_image(other.path(), "far/a.png", 1);
    write_image(folder.path(), "b.png", 2);
    let far = other.path().join("far/a.png");
    let csv = format!("file_name,image_path,text\na.png,{},x\nb.png,,y\n", far.display());
    write(folder.path(), "pairs.csv", &csv);
    let path = folder.path().join("pairs.csv");
    let all = open(&path).unwrap();
    let found: Vec<_> = all.pairs.iter().map(|pair| (pair.name.as_str(), pair.image.clone())).collect();
    assert_eq!(found, [("a.png", far.clone()), ("b.png", folder.path().join("b.png"))]);
    assert!(all.pairs[0].extra.is_empty(), "it is no extra");

    // Whoever names that column as the image has the path as the name.
    let columns = Columns { image: Some("image_path".into()), ..Columns::default() };
    write(folder.path(), "pairs.csv", &csv.replace("b.png,,", "b.png,b.png,"));
    let all = Collection::open(&path, &ReadOptions { columns, ..ReadOptions::default() }).unwrap();
    assert_eq!((all.pairs[0].image.clone(), all.pairs[1].name.as_str()), (far, "b.png"));
}

#[test]
fn a_table_without_groups_has_a_report_that_says_so() {
    use cxr_dataset::{LeakageReport, Split, SplitConfig};
    let folder = tempfile::tempdir().unwrap();
    let (mut csv, mut grouped) = ("file_name,text\n".to_string(), "file_name,text,group\n".to_string());
    for i in 0..10_u8 {
        write_image(folder.path(), &format!("{i}.png"), i);
        csv += &format!("{i}.png,Text {i}.\n");
        grouped += &format!("{i}.png,Text {i}.,{}\n", i / 2);
    }
    let notes = |csv: &str| {
        write(folder.path(), "metadata.csv", csv);
        let all = open(folder.path()).unwrap();
        let split = Split::new(&all, &SplitConfig::default()).unwrap();
        LeakageReport::measure(&all, &split, true).unwrap().notes.join("\n")
    };
    assert!(notes(&csv).contains("nothing protects"), "{}", notes(&csv));
    assert!(!notes(&grouped).contains("nothing protects"), "{}", notes(&grouped));
}
