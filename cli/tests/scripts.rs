//! The command line as a person types it: each file of `scripts/` is a session.
//!
//! `$ ` begins a command, `? N` names its exit code (0 unless said), and the lines up to the next
//! command are what it prints, both outputs together. `[..]` stands for any text within a line,
//! a line of `...` for any lines. A session that begins with the line `a store serves mesh` has a
//! steadfast-store of the directory `mesh`, and nothing else of a mesh.

#![allow(clippy::unwrap_used, reason = "a test may stop where something is not as it should be")]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// One command of a session.
struct Step {
    line: usize,
    command: String,
    exit: i32,
    expected: Vec<String>,
}

#[test]
fn every_session_goes_as_written() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts");
    let mut failures = Vec::new();
    for entry in fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        let scratch = tempfile::tempdir().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let _store = text.starts_with(WITH_STORE).then(|| Store::start(scratch.path()));
        for step in parse(&text) {
            if let Err(why) = run(&step, scratch.path()) {
                failures.push(format!("{}:{}: {why}", path.display(), step.line));
            }
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n\n"));
}

/// A store, until the session is over.
struct Store(Child);

impl Store {
    #[allow(clippy::disallowed_methods)] // A state is waited for, with a deadline.
    fn start(scratch: &Path) -> Self {
        let program = Path::new(env!("CARGO_BIN_EXE_steadfast")).with_file_name("steadfast-store");
        assert!(program.exists(), "{program:?} is missing: run `cargo build --workspace`");
        let log = fs::File::create(scratch.join("store.log")).unwrap();
        let mut command = Command::new(program);
        command.args(["--dir", "mesh", "--admin", "127.0.0.1:0"]).current_dir(scratch);
        let store = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        let store = Self(store.unwrap());
        let serves = (0..STORE_LOOKS).any(|_| {
            std::thread::sleep(LOOK_EVERY);
            scratch.join("mesh/store.sock").exists()
        });
        assert!(serves, "{}", fs::read_to_string(scratch.join("store.log")).unwrap());
        store
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn parse(text: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if let Some(command) = line.strip_prefix("$ ") {
            let (line, command) = (index + 1, command.to_owned());
            steps.push(Step { line, command, exit: 0, expected: Vec::new() });
        } else if let Some(step) = steps.last_mut() {
            match line.strip_prefix("? ") {
                Some(exit) if step.expected.is_empty() => step.exit = exit.parse().unwrap(),
                _ => step.expected.push(line.to_owned()),
            }
        }
    }
    for step in &mut steps {
        while step.expected.last().is_some_and(String::is_empty) {
            step.expected.pop();
        }
    }
    steps
}

fn run(step: &Step, scratch: &Path) -> Result<(), String> {
    let output = Command::new("sh")
        .arg("-c")
        .arg(format!("steadfast() {{ \"$STEADFAST\" \"$@\"; }}\n{{ {}; }} 2>&1", step.command))
        .current_dir(scratch)
        .env("STEADFAST", env!("CARGO_BIN_EXE_steadfast"))
        .env_remove("STEADFAST_DIR")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let printed: Vec<_> = text.trim_end().lines().map(str::trim_end).collect();
    let expected: Vec<_> = step.expected.iter().map(|line| line.trim_end()).collect();
    if output.status.code() != Some(step.exit) {
        return Err(format!("{}: exits with {}\n{text}", step.command, output.status));
    }
    if !lines_match(&expected, &printed) {
        return Err(format!("{}: prints\n{text}\nnot\n{}", step.command, expected.join("\n")));
    }
    Ok(())
}

fn lines_match(expected: &[&str], printed: &[&str]) -> bool {
    match (expected, printed) {
        ([], []) => true,
        (["...", rest @ ..], _) => {
            (0..=printed.len()).any(|skipped| lines_match(rest, &printed[skipped..]))
        }
        ([first, rest @ ..], [line, lines @ ..]) => {
            line_matches(first, line) && lines_match(rest, lines)
        }
        _ => false,
    }
}

fn line_matches(expected: &str, line: &str) -> bool {
    let mut parts = expected.split("[..]");
    let Some(mut rest) = parts.next().and_then(|first| line.strip_prefix(first)) else {
        return false;
    };
    let mut exact = true;
    for part in parts {
        exact = part.is_empty();
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.is_empty() || (exact && expected.ends_with("[..]"))
}

const WITH_STORE: &str = "a store serves mesh\n";
/// So often it is looked whether the store has started: for half a minute.
const STORE_LOOKS: u32 = 1500;
const LOOK_EVERY: Duration = Duration::from_millis(20);
