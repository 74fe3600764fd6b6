//! Images of our own programs, as `tests/kubernetes/image` puts them together.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use super::Parts;
use super::node::import;
use crate::namespaces::{Kind, entrance};
use crate::process::binary_path;

/// Brings the images of all programs of a mesh into nodes of a cluster that another process holds, by
/// the first process of each.
pub fn load(nodes: &[u32]) {
    let parts = Parts::find();
    for program in PROGRAMS.into_iter().chain(["steadfast-test-app"]) {
        let image = of_program(&parts, program, Version::This);
        for node in nodes {
            import(&entrance(*node, Kind::Machine), &parts, &image);
        }
    }
}

/// The tag of what the commit before this one has built.
pub const PREVIOUS_TAG: &str = "previous";

/// What a mesh is made of.
pub(super) const PROGRAMS: [&str; 5] = [
    "steadfast-identity",
    "steadfast-rotation",
    "steadfast-control",
    "steadfast-proxy",
    "steadfast-init",
];

/// Whose programs are in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    /// This commit's, as they were built for this test.
    This,
    /// The commit's before it.
    Previous,
}

/// The image `localhost/<program>:<tag>`, made anew where the program is newer.
pub(super) fn of_program(parts: &Parts, program: &str, version: Version) -> PathBuf {
    // Tests in other threads ask for the same.
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let (binary, image, tag) = match version {
        Version::This => (binary_path(program), parts.image(program), "1"),
        Version::Previous => {
            let image = parts.image(&format!("{program}-{PREVIOUS_TAG}"));
            (parts.previous().join("programs").join(program), image, PREVIOUS_TAG)
        }
    };
    let changed = |path: &PathBuf| path.metadata().and_then(|metadata| metadata.modified()).ok();
    if changed(&image).is_some_and(|made| Some(made) > changed(&binary)) {
        return image;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../kubernetes/image");
    let made = Command::new(script)
        .args([&format!("localhost/{program}:{tag}"), &image.display().to_string()])
        .args(["--program", &format!("/{program}={}", binary.display())])
        .args(if program == "steadfast-init" { rules() } else { Vec::new() })
        .args(["--", &format!("/{program}")])
        .status();
    assert!(made.is_ok_and(|status| status.success()), "no image of {program}");
    image
}

/// What the init step writes rules with: Debian's nft and iptables, and the extensions that it names.
fn rules() -> Vec<String> {
    let mut args = Vec::new();
    for (path, file) in [("nft", "nft"), ("iptables-legacy", "xtables-legacy-multi")] {
        args.extend(["--program".to_owned(), format!("/bin/{path}=/usr/sbin/{file}")]);
    }
    let restore = "/bin/iptables-legacy-restore=iptables-legacy";
    args.extend(["--link".to_owned(), restore.to_owned()]);
    let folder = format!("/usr/lib/{}-linux-gnu/xtables", std::env::consts::ARCH);
    for extension in ["libxt_NAT", "libxt_REDIRECT", "libxt_owner", "libxt_standard", "libxt_tcp"] {
        let file = format!("{folder}/{extension}.so");
        args.extend(["--file".to_owned(), format!("{file}={file}")]);
    }
    args
}
