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
    for program in PROGRAMS {
        let image = of_program(&parts, program);
        for node in nodes {
            import(&entrance(*node, Kind::Machine), &parts, &image);
        }
    }
}

/// What a mesh is made of.
pub(super) const PROGRAMS: [&str; 4] =
    ["steadfast-identity", "steadfast-rotation", "steadfast-control", "steadfast-proxy"];

/// The image `localhost/<program>:1`, made anew where the program is newer.
pub(super) fn of_program(parts: &Parts, program: &str) -> PathBuf {
    // Tests in other threads ask for the same.
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let (binary, image) = (binary_path(program), parts.image(program));
    let changed = |path: &PathBuf| path.metadata().and_then(|metadata| metadata.modified()).ok();
    if changed(&image).is_some_and(|made| Some(made) > changed(&binary)) {
        return image;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../kubernetes/image");
    let made = Command::new(script)
        .args([&format!("localhost/{program}:1"), &image.display().to_string()])
        .args(["--program", &format!("/{program}={}", binary.display())])
        .args(["--", &format!("/{program}")])
        .status();
    assert!(made.is_ok_and(|status| status.success()), "no image of {program}");
    image
}
