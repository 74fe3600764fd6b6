//! Promise: the lines of the README do what it says, pasted as they stand.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use steadfast_test_rig::process::binary_path;

/// The ten lines run in a namespace of their own: their ports are fixed, and what they start in the
/// background ends with the shell.
#[test]
fn ten_lines_put_two_programs_into_a_mesh() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let readme = fs::read_to_string(repository.join("README.md")).unwrap();
    let lines = block_after(&readme, "## Your own two programs in a mesh");
    let checkout = checkout(&repository);
    let home = tempfile::tempdir().unwrap();

    let told = "steadfast identity mine/web --dir ~/mesh";
    assert!(readme.contains(told), "the README no longer says: {told}");
    let output = paste(&format!("{lines}\n{told}\n"), checkout.path(), home.path());
    let text = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    let text = text.concat();
    assert!(output.status.success(), "{text}");
    assert!(text.contains("Directory listing for /"), "no answer of the first program:\n{text}");
    assert!(text.contains("spiffe://cluster.local/ns/mine/sa/web"), "{text}");
    assert!(home.path().join("mesh/keys/anchors").is_dir(), "{text}");
    let left = files(checkout.path());
    assert!(
        left.iter().all(|path| path.starts_with("manifests")),
        "left in the checkout: {left:?}"
    );
}

/// The first block of shell lines after a heading.
fn block_after(readme: &str, heading: &str) -> String {
    let (_, rest) = readme.split_once(heading).expect("the README has this heading");
    let (_, rest) = rest.split_once("```sh\n").expect("there are lines to paste after it");
    rest.split_once("```").expect("they end").0.to_owned()
}

/// What the lines need of a checkout whose programs are built.
fn checkout(repository: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let samples = dir.path().join("manifests/samples");
    fs::create_dir_all(&samples).unwrap();
    for entry in fs::read_dir(repository.join("manifests/samples")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), samples.join(entry.file_name())).unwrap();
    }
    fs::create_dir(dir.path().join("target")).unwrap();
    let programs = binary_path("steadfast").parent().unwrap().to_owned();
    symlink(programs, dir.path().join("target/release")).unwrap();
    dir
}

fn paste(lines: &str, directory: &Path, home: &Path) -> Output {
    let script = format!("ip link set lo up || exit 1\nset -e\n{lines}");
    Command::new("unshare")
        .args(["--net", "--pid", "--fork", "--kill-child", "timeout", "120", "bash", "-c", &script])
        .current_dir(directory)
        .env("HOME", home)
        .env_remove("STEADFAST_DIR")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Every file below a directory, relative to it; what a link leads to is not in it.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(at) = open.pop() {
        for entry in fs::read_dir(at).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => open.push(entry.path()),
                kind if kind.is_symlink() => {}
                _ => found.push(entry.path().strip_prefix(directory).unwrap().to_owned()),
            }
        }
    }
    found
}
