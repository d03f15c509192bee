//! What the memorization audit catches: copies planted among pictures of patients with few and with many images.
//!
//! `cargo test --release -p cxr-metrics --test copies -- --nocapture` prints the counts.

mod pictures;
mod plant;

use std::collections::HashSet;
use std::time::Instant;

use cxr_core::progress::Silent;
use cxr_core::random::Stream;
use cxr_kernels::Flex;
use cxr_metrics::memorization::{AuditConfig, AuditReport, AuditSide, COLUMNS, MemorizationAudit, write_png};
use cxr_metrics::small::SmallExtractor;
use cxr_metrics::{FeatureExtractor, ImageSize, MetricsError, Picture};

use pictures::{Radiograph, generated, split, thumbnails, trained_extractor};
use plant::Change;

/// Copies of each kind.
const COPIES: usize = 100;
/// Of these, of patients with this many training images or more.
const OF_MANY: usize = 40;
const MANY: usize = 10;

struct Setting<'a> {
    train: &'a [Radiograph],
    calibration: &'a [Radiograph],
    fresh: &'a [Radiograph],
    extractor: Option<&'a dyn FeatureExtractor>,
    config: AuditConfig,
}

fn pictures(of: &[Radiograph]) -> Vec<Picture> {
    of.iter().map(|r| r.picture.clone()).collect()
}

fn groups(of: &[Radiograph]) -> Vec<String> {
    of.iter().map(|r| r.patient.clone()).collect()
}

impl Setting<'_> {
    fn query(&self, pictures: &[Picture]) -> AuditSide {
        AuditSide::query(&pictures.to_vec(), self.extractor, &self.config, &Silent).unwrap()
    }

    fn train(&self) -> AuditSide {
        let side = AuditSide::reference(&pictures(self.train), self.extractor, &self.config, &Silent);
        side.unwrap().with_groups(groups(self.train)).unwrap()
    }

    fn audit(&self, queries: &[Picture]) -> AuditReport {
        let held_out = self.query(&pictures(self.calibration)).with_groups(groups(self.calibration)).unwrap();
        let audit = MemorizationAudit::new(self.config.clone()).unwrap();
        audit.run(&self.query(queries), &self.train(), &held_out, &Silent).unwrap()
    }

    /// Positions in the training set: first of patients with many images, then of others.
    fn sources(&self) -> Vec<usize> {
        let count = |i: &usize| self.train.iter().filter(|r| r.patient == self.train[*i].patient).count();
        let (many, few): (Vec<usize>, Vec<usize>) = (0..self.train.len()).partition(|i| count(i) >= MANY);
        let even =
            |from: &[usize], n: usize| -> Vec<usize> { (0..n).map(|i| from[i * from.len() / n]).collect() };
        [even(&many, OF_MANY), even(&few, COPIES - OF_MANY)].concat()
    }

    /// How many copies are flagged, of patients with many images and in all, and how many with the right source.
    fn planted(&self, change: Change) -> (usize, usize, usize) {
        let sources = self.sources();
        let copies = sources.iter().enumerate().map(|(i, &s)| change.of(&self.train[s].picture, i as u64));
        let report = self.audit(&copies.collect::<Vec<_>>());
        let flagged: Vec<usize> = report.flagged().map(|e| e.image).collect();
        let right = report.flagged().filter(|e| e.nearest() == sources[e.image]).count();
        (flagged.iter().filter(|i| **i < OF_MANY).count(), flagged.len(), right)
    }

    fn holds(&self, what: &str) {
        let fresh = self.audit(&pictures(self.fresh));
        let calibration = fresh.calibration.as_ref().unwrap();
        let false_alarms = fresh.flagged().count();
        println!(
            "{what}: {} training images, calibrated on {}: {} of them flagged, of {} others {false_alarms}",
            self.train.len(),
            self.calibration.len(),
            calibration.flagged,
            self.fresh.len()
        );
        for scale in &calibration.scales {
            println!("  {} below {:.3}, median {:.3}", scale.evidence.name(), scale.threshold, scale.median);
        }
        assert!(calibration.flagged * 100 <= self.calibration.len());
        assert!(false_alarms * 100 <= self.fresh.len(), "{false_alarms} of {}", self.fresh.len());
        for change in Change::ALL {
            let (of_many, all, right) = self.planted(change);
            println!(
                "  {change:?}: {all} of {COPIES} flagged, {of_many} of the {OF_MANY} of patients with many"
            );
            assert!(all >= 95, "{what}, {change:?}: {all}");
            assert!(
                of_many * 100 >= 95 * OF_MANY,
                "{what}, {change:?}: {of_many} of patients with many images"
            );
            println!("    {right} of {all} beside the very picture that they were made from");
            // Half a cell away, another image of the same patient may be the nearer one.
            let least = if matches!(change, Change::OnePixel) { 90 } else { 99 };
            assert!(right * 100 >= least * all, "{what}, {change:?}: {right} of {all} with their source");
        }
    }
}

/// No patient on two sides.
fn expect_apart(sides: [&[Radiograph]; 3]) {
    let patients = sides.map(|side| side.iter().map(|r| r.patient.as_str()).collect::<HashSet<_>>());
    assert!(patients[0].is_disjoint(&patients[1]) && patients[0].is_disjoint(&patients[2]));
    assert!(patients[1].is_disjoint(&patients[2]));
}

#[test]
fn planted_copies_of_generated_radiographs_are_flagged() {
    let all = generated(1300);
    let [train, calibration, fresh] = split(all, 750, MANY);
    expect_apart([&train, &calibration, &fresh]);
    let setting = Setting {
        train: &train,
        calibration: &calibration,
        fresh: &fresh,
        extractor: None,
        config: AuditConfig::default(),
    };
    setting.holds("generated");
    // What the views are for: a search without them sees other pictures.
    let blind =
        Setting { config: AuditConfig { shift: 0, mirror: false, ..AuditConfig::default() }, ..setting };
    for change in [Change::Flip, Change::Shift] {
        let (_, all, _) = blind.planted(change);
        assert!(all < 80, "{change:?} without views: {all}");
    }
}

#[test]
fn planted_copies_of_real_thumbnails_are_flagged() {
    let Some(all) = thumbnails() else { return };
    let [train, calibration, fresh] = split(all, 500, MANY);
    expect_apart([&train, &calibration, &fresh]);
    let setting = Setting {
        train: &train,
        calibration: &calibration,
        fresh: &fresh,
        extractor: None,
        config: AuditConfig::default(),
    };
    setting.holds("thumbnails, pixels");
    let Some(folder) = trained_extractor() else { return };
    let extractor = SmallExtractor::<Flex>::load(&folder, &Default::default()).unwrap();
    Setting { extractor: Some(&extractor), ..setting }.holds("thumbnails, pixels and features");
}

#[test]
fn table_and_sheet_show_the_flagged_pairs() {
    let [train, calibration, fresh] = split(generated(1000), 600, MANY);
    let setting = Setting {
        train: &train,
        calibration: &calibration,
        fresh: &fresh,
        extractor: None,
        config: AuditConfig::default(),
    };
    let mut made = pictures(&fresh[..5]);
    made[3] = Change::Flip.of(&train[8].picture, 0);
    let report = setting.audit(&made);
    let names = |prefix: &str, n: usize| (0..n).map(|i| format!("{prefix}{i}.png")).collect::<Vec<_>>();
    let synthetic = setting.query(&made).with_names(names("made/", 5)).unwrap();
    let reference = setting.train().with_names(names("t", train.len())).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.csv");
    report.write_csv(&path, false, &synthetic, &reference).unwrap();
    let mut reader = csv::Reader::from_path(&path).unwrap();
    assert_eq!(reader.headers().unwrap().iter().collect::<Vec<_>>(), COLUMNS);
    let rows: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    assert_eq!(rows.len(), report.flagged().count());
    let cell = |name: &str| &rows[0][COLUMNS.iter().position(|c| *c == name).unwrap()];
    assert_eq!((cell("picture"), cell("nearest"), cell("mirrored")), ("made/3.png", "t8.png", "true"));
    assert_eq!(cell("nearest_group"), train[8].patient);
    assert!(cell("flagged_for").contains("pixel_distance"), "{}", cell("flagged_for"));
    report.write_csv(&path, true, &synthetic, &reference).unwrap();
    assert_eq!(csv::Reader::from_path(&path).unwrap().records().count(), 5);

    let trained = pictures(&train);
    let sheet = report.sheet(8, (&synthetic, &made), (&reference, &trained)).unwrap().unwrap();
    // The pictures stand beside each other: the left one is the right one mirrored.
    let (width, at) =
        (sheet.size().width, |x: usize, y: usize| i32::from(sheet.pixels()[y * sheet.size().width + x]));
    assert!(width >= 2 * 128);
    for (x, y) in [(5, 9), (40, 64), (100, 120)] {
        assert!((at(2 + x, 2 + y) - at(2 + 255 - x, 2 + y)).abs() <= 2, "{x} {y}");
    }
    let ink = (2 + 128..sheet.size().height).any(|y| (0..width).any(|x| at(x, y) == 230));
    assert!(ink, "a caption stands below the pictures");
    write_png(&sheet, &folder.path().join("sheet.png")).unwrap();
    if let Some(out) = std::env::var_os("CXR_SHEET_OUT") {
        write_png(&sheet, out.as_ref()).unwrap();
    }
    // Nothing flagged, no sheet; sides that were not audited are refused.
    let clean = setting.audit(&made[..1]);
    if clean.flagged().count() == 0 {
        let one = setting.query(&made[..1]);
        assert!(clean.sheet(8, (&one, &made[..1].to_vec()), (&reference, &trained)).unwrap().is_none());
    }
    assert!(matches!(
        report.write_csv(&path, false, &reference, &synthetic),
        Err(MetricsError::SizeMismatch { .. })
    ));
}

/// Pixels alone: 2,000 pictures in 18 views each against 20,000, 1.3e12 multiplications and additions.
#[test]
#[ignore = "cargo test --release -p cxr-metrics --test copies -- --ignored --nocapture"]
fn tens_of_thousands_take_minutes() {
    let noise = |name: &str, n: usize| -> Vec<Picture> {
        let picture = |i| {
            let mut stream = Stream::new(0, name, i as u64);
            let pixels = (0..1024).map(|_| stream.below(256) as u8).collect();
            Picture::new(ImageSize::square(32), 1, pixels).unwrap()
        };
        (0..n).map(picture).collect()
    };
    let config = AuditConfig::default();
    let query = |pictures| AuditSide::query(&pictures, None, &config, &Silent).unwrap();
    let (made, held_out) = (query(noise("made", 2000)), query(noise("held out", 100)));
    let train = AuditSide::reference(&noise("train", 20_000), None, &config, &Silent).unwrap();
    let started = Instant::now();
    let report =
        MemorizationAudit::new(config.clone()).unwrap().run(&made, &train, &held_out, &Silent).unwrap();
    let seconds = started.elapsed().as_secs_f64();
    println!("2,100 pictures against 20,000: {seconds:.1} s");
    assert_eq!(report.entries.len(), 2000);
    assert!(seconds < 600.0, "{seconds} s, meant to be a minute");
}
