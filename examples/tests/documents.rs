//! Every command line of an example program in the documents is one that the program takes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A command in a document.
#[derive(Debug)]
struct Documented {
    /// File and line.
    place: String,
    program: String,
    arguments: Vec<String>,
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// The program with the arguments, which it only parses.
fn parse(program: &str, arguments: &[String]) -> Output {
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(Path::parent).unwrap().join("examples");
    let mut command = Command::new(folder.join(program));
    // an empty folder, so that a program that runs all the same finds nothing and leaves nothing
    let empty = tempfile::tempdir().unwrap();
    command.env("CXR_PARSE_ONLY", "1").args(arguments).current_dir(&empty);
    command.output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// A shell's words: blanks part them, quotes hold them together, `#` begins a comment.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (Some(open), _) if c == open => quote = None,
            (Some(_), _) => word.get_or_insert_default().push(c),
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, _) if c.is_whitespace() => words.extend(word.take()),
            (None, _) => word.get_or_insert_default().push(c),
        }
    }
    assert!(quote.is_none(), "an open quote: {line}");
    words.extend(word);
    words
}

/// A rank or a task's number in the place of `$NAME`.
fn without_variables(line: &str) -> String {
    let mut parts = line.split('$');
    let first = parts.next().unwrap_or_default().to_owned();
    let is_name = |c: char| c.is_ascii_uppercase() || c == '_';
    parts.fold(first, |line, part| format!("{line}0{}", part.trim_start_matches(is_name)))
}

/// The program of a command and its arguments, if it is one of the examples: through cargo, from the target folder,
/// behind `mpirun` and the like, or in the string that `sbatch --wrap` or `sh -c` takes.
fn example(words: &[String]) -> Option<(String, Vec<String>)> {
    let position = |wanted: &str| words.iter().position(|word| word == wanted);
    if let (Some(_), Some(at)) =
        (position("run").filter(|_| position("cargo").is_some()), position("--example"))
    {
        let end = position("--").unwrap_or(words.len());
        let of_other_package =
            words[..end].windows(2).any(|pair| pair[0] == "-p" && pair[1] != "cxr-examples");
        let program = words.get(at + 1)?.clone();
        return (!of_other_package).then(|| (program, words.get(end + 1..).unwrap_or_default().to_vec()));
    }
    if let Some(at) = position("--wrap").or_else(|| position("-c")) {
        return example(&self::words(words.get(at + 1)?));
    }
    let at = words.iter().position(|word| {
        let (folder, name) = word.rsplit_once('/').unwrap_or(("", word));
        (folder.is_empty() || folder.ends_with("release/examples")) && programs().contains(name)
    })?;
    let program = words[at].rsplit('/').next()?.to_owned();
    // `cargo build --example finetune` runs nothing
    let is_run = words[at].contains('/') || at == 0;
    is_run.then(|| (program, words[at + 1..].to_vec()))
}

/// The programs that there are.
fn programs() -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let entries = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
    entries.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect()
}

/// The commands of all documents, out of the blocks of shell.
fn documented() -> Vec<Documented> {
    let root = repository();
    let mut files =
        ["README.md", "CONTRIBUTING.md", "docs/full-run/README.md"].map(|file| root.join(file)).to_vec();
    files.extend(root.join("docs").read_dir().unwrap().map(|entry| entry.unwrap().path()));
    files.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    files.sort();
    let mut found = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let name = file.strip_prefix(&root).unwrap().display().to_string();
        let (mut in_shell, mut command) = (false, String::new());
        for (index, line) in text.lines().enumerate() {
            if line.starts_with("```") {
                in_shell = line == "```sh";
                continue;
            }
            if !in_shell {
                continue;
            }
            if let Some(part) = line.strip_suffix('\\') {
                command.push_str(part);
                continue;
            }
            command.push_str(line);
            let words = words(&without_variables(&std::mem::take(&mut command)));
            if let Some((program, arguments)) = example(&words) {
                found.push(Documented { place: format!("{name}:{}", index + 1), program, arguments });
            }
        }
    }
    found
}

#[test]
fn every_command_is_parsed_by_its_program() {
    let commands = documented();
    let mut wrong = Vec::new();
    for Documented { place, program, arguments } in &commands {
        let found = parse(program, arguments);
        if !found.status.success() {
            let message = String::from_utf8_lossy(&found.stderr).into_owned();
            wrong.push(format!("{place}: {program} {arguments:?}: {message}"));
        }
    }
    println!("{} commands of {} programs", commands.len(), programs().len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let shown: BTreeSet<String> = commands.into_iter().map(|command| command.program).collect();
    assert_eq!(shown, programs(), "programs in the documents, and those that there are");
}

#[test]
fn a_wrong_command_would_be_seen() {
    for program in programs() {
        let found = parse(&program, &["--no-such-flag".into()]);
        assert_eq!(found.status.code(), Some(2), "{program}");
        // parsing is all: nothing is loaded, and nothing is left
        let help = parse(&program, &["--help".into()]);
        assert!(help.status.success() && !help.stdout.is_empty(), "{program}");
    }
    let commands = documented();
    let of = |program: &str| commands.iter().filter(|command| command.program == program).count();
    assert!(of("synthesize") >= 3 && of("finetune") >= 3, "{commands:?}");
}

#[test]
fn shell_words() {
    let line = r#"mpirun -n 8 target/release/examples/finetune --data "a b.csv" --set x=1 # a comment"#;
    let found = example(&words(line)).unwrap();
    assert_eq!(found, ("finetune".into(), ["--data", "a b.csv", "--set", "x=1"].map(String::from).to_vec()));
    let line = r#"mpirun -n 8 sh -c 'target/release/examples/synthesize --device cuda:$LOCAL_RANK --seed 1'"#;
    let found = example(&words(&without_variables(line))).unwrap();
    assert_eq!(found.1, ["--device", "cuda:0", "--seed", "1"]);
    let line = r#"sbatch --array 0-3 --wrap "synthesize --prompts 'p q.csv'""#;
    assert_eq!(
        example(&words(line)).unwrap(),
        ("synthesize".into(), vec!["--prompts".into(), "p q.csv".into()])
    );
    assert_eq!(
        example(&words("cargo build --release -p cxr-examples --example finetune --features mpi")),
        None
    );
    assert_eq!(example(&words("cargo run --release -p cxr-dataset --example generate_indiana -- DIR")), None);
    let found = example(&words("cargo run --release -p cxr-examples --example reproduce")).unwrap();
    assert_eq!(found, ("reproduce".into(), Vec::new()));
}
