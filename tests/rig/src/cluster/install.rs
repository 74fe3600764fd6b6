//! The mesh in a cluster, as its charts install it.

use std::path::Path;
use std::process::Command;

use super::Cluster;
use super::images::PROGRAMS;
use crate::process::binary_path;

impl Cluster {
    /// Installs the charts with these values, and waits until the control plane is ready.
    pub async fn install(&self, values: &[&str]) {
        for program in PROGRAMS {
            self.import(program);
        }
        self.helm(&["install", "steadfast-crds", &chart("steadfast-crds")]);
        let chart = chart("steadfast");
        let mut args = vec!["install", "steadfast", &chart, "--create-namespace"];
        args.extend(["--namespace", CONTROL_NAMESPACE]);
        for value in IMAGES.iter().chain(values) {
            args.extend(["--set", value]);
        }
        self.helm(&args);
        self.control_plane_ready().await;
    }

    /// Waits until every process of the control plane is ready.
    pub async fn control_plane_ready(&self) {
        for (component, namespace) in [
            ("identity", CONTROL_NAMESPACE),
            ("rotation", ANCHORS_NAMESPACE),
            ("control", CONTROL_NAMESPACE),
        ] {
            let deployment = format!("deployment/steadfast-{component}");
            let namespace = format!("--namespace={namespace}");
            self.wait_for(&["--for=condition=Available", &deployment, &namespace]).await;
        }
    }

    /// What our own command prints, as the cluster's administrator; or all that it said, when it ends
    /// with another exit code than 0.
    ///
    /// # Errors
    /// What it printed.
    pub fn steadfast(&self, args: &[&str]) -> Result<String, String> {
        let output = Command::new(binary_path("steadfast"))
            .env("KUBECONFIG", self.kubeconfig())
            .env_remove("STEADFAST_DIR")
            .args(args)
            .output()
            .expect("steadfast starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let printed = text(&output.stdout);
        if output.status.success() { Ok(printed) } else { Err(printed + &text(&output.stderr)) }
    }

    /// What `helm` prints; panics with its error when it fails.
    pub fn helm(&self, args: &[&str]) -> String {
        let output = Command::new(self.parts.path("helm"))
            .env("HOME", self.dir.path())
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .args(args)
            .output()
            .expect("helm starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "helm {args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }
}

/// One of our charts.
pub fn chart(name: &str) -> String {
    let charts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../manifests/charts");
    charts.join(name).display().to_string()
}

/// Where the control plane is.
pub const CONTROL_NAMESPACE: &str = "steadfast";
/// Where the controller of rotations and the keys of anchors are.
pub const ANCHORS_NAMESPACE: &str = "steadfast-anchors";
const IMAGES: [&str; 3] = ["image.registry=localhost", "image.tag=1", "image.pullPolicy=Never"];
