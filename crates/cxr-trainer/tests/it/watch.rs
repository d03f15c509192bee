//! Lines about a run, and their picture.

use std::fs;
use std::path::Path;

use cxr_trainer::TimestepLoss;
use cxr_trainer::watch::{Journal, Record, Validation, plot_loss, read};

/// Its numbers have few digits: JSON's are read to within their last bit.
fn record(step: u64) -> Record {
    let loss = 0.125 * (1 + step % 7) as f64;
    Record {
        step,
        epoch: step / 7,
        loss,
        smoothed: 0.5 + 0.0625 * (step % 5) as f64,
        learning_rate: 1e-4,
        gradient_norm: 3.0,
        samples_per_second: 2.5,
        peak_memory: Some(1 << 30),
    }
}

fn write(path: &Path, steps: impl IntoIterator<Item = u64>) {
    let mut metrics = Journal::open(path, 0).unwrap();
    steps.into_iter().for_each(|step| metrics.append(record(step)).unwrap());
}

#[test]
fn a_last_line_that_was_cut_off_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.jsonl");
    write(&path, [10, 20, 30]);
    let whole = fs::read_to_string(&path).unwrap();
    let expected = [record(10), record(20), record(30)];
    assert_eq!(read::<Record>(&path).unwrap(), expected);
    let last = whole.lines().last().unwrap();
    for length in 1..last.len() {
        fs::write(&path, format!("{whole}{}", &last[..length])).unwrap();
        assert_eq!(read::<Record>(&path).unwrap(), expected, "{length} bytes of the last line");
    }
    // a run that goes on from step 20 drops what came later, and appends whole lines
    let mut metrics = Journal::open(&path, 20).unwrap();
    metrics.append(record(40)).unwrap();
    assert_eq!(metrics.lines(), [record(10), record(20), record(40)]);
    assert_eq!(read::<Record>(&path).unwrap(), metrics.lines());
    let error = read::<Record>(&folder.path().join("nothing.jsonl")).unwrap_err().to_string();
    assert!(error.contains("nothing.jsonl"), "{error}");

    // a line in the middle is no trace of a kill
    let lines: Vec<&str> = whole.lines().collect();
    fs::write(&path, format!("{}\nhello\n{}\n", lines[0], lines[1])).unwrap();
    let error = read::<Record>(&path).unwrap_err().to_string();
    assert!(error.contains("metrics.jsonl, line 2"), "{error}");
    // lines of before the memory was noted
    let old = lines[0].replace(",\"peak_memory\":1073741824", "");
    assert_ne!(old, lines[0]);
    fs::write(&path, old + "\n").unwrap();
    assert_eq!(read::<Record>(&path).unwrap(), [Record { peak_memory: None, ..record(10) }]);
}

#[test]
fn the_loss_curve_is_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("loss.png");
    let records: Vec<Record> = (1..200)
        .map(|i| Record {
            loss: 1.0 / i as f64 + 0.2 * (0.3 * i as f64).sin().abs(),
            smoothed: 1.0 / i as f64 + 0.1,
            ..record(10 * i)
        })
        .collect();
    let validations: Vec<Validation> = (1..20)
        .map(|i| {
            let loss = 0.4 + 1.0 / i as f64;
            Validation { step: 100 * i, loss, bins: vec![TimestepLoss { from: 0, to: 1000, loss }] }
        })
        .collect();
    plot_loss(&records, &validations, "Loss of a test", &path).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    let decoder = png::Decoder::new(std::io::BufReader::new(fs::File::open(&path).unwrap()));
    let mut reader = decoder.read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((info.width, info.height, info.color_type), (900, 480, png::ColorType::Rgb));
    let count =
        |is: fn(u8, u8) -> bool| pixels.chunks_exact(3).filter(|pixel| is(pixel[0], pixel[2])).count();
    assert!(count(|red, blue| blue > red.saturating_add(10) && red > 160) > 500, "the loss, light blue");
    assert!(count(|red, blue| red < 100 && blue > red + 60) > 500, "the smoothed loss, dark blue");
    assert!(
        count(|red, blue| red > 180 && blue < 90) > 300,
        "the validation loss, orange: {}",
        count(|red, blue| red > 180 && blue < 90)
    );
    // letters: dark pixels above the plot, where the title is
    let title = pixels.chunks_exact(3).take(900 * 36).filter(|pixel| pixel.iter().all(|v| *v < 100)).count();
    assert!(title > 100, "{title} dark pixels in the title");
}

#[test]
fn pictures_that_cannot_be_drawn_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let error = plot_loss(&[], &[], "x", &folder.path().join("loss.png")).unwrap_err().to_string();
    assert!(error.contains("no steps") && error.contains("loss.png"), "{error}");
    let nowhere = folder.path().join("nowhere/loss.png");
    assert!(plot_loss(&[record(10)], &[], "x", &nowhere).unwrap_err().to_string().contains("nowhere"));
    // one point, and a loss of nothing but zeros, are no curve but no reason to fail either
    plot_loss(&[record(10)], &[], "x", &folder.path().join("one.png")).unwrap();
    let flat = [
        Record { loss: 0.0, smoothed: 0.0, ..record(10) },
        Record { loss: 0.0, smoothed: 0.0, ..record(20) },
    ];
    plot_loss(&flat, &[], "x", &folder.path().join("flat.png")).unwrap();
}
