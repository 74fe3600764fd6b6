//! The mesh in a cluster, as its charts install it.

use std::path::Path;
use std::process::Command;

use super::Cluster;
use super::images::{PROGRAMS, Version};
use crate::process::binary_path;

impl Cluster {
    /// Installs the charts with these values, and waits until the control plane is ready.
    pub async fn install(&self, values: &[&str]) {
        PROGRAMS.iter().for_each(|program| self.import(program));
        self.helm(&["install", "steadfast-crds", &chart("steadfast-crds")]);
        self.helm(&release("install", &chart("steadfast"), &[&IMAGES, values].concat()));
        self.control_plane_ready().await;
    }

    /// Installs the charts of the commit before this one, with its programs.
    pub async fn install_previous(&self, values: &[&str]) {
        PROGRAMS.iter().for_each(|program| self.import_of(program, Version::Previous));
        self.helm(&["install", "steadfast-crds", &self.previous_chart("steadfast-crds")]);
        let chart = self.previous_chart("steadfast");
        self.helm(&release("install", &chart, &[&PREVIOUS_IMAGES, values].concat()));
        self.control_plane_ready().await;
    }

    /// Upgrades to this commit's charts and programs, and waits until all of the old is gone.
    pub fn upgrade(&self, values: &[&str]) {
        PROGRAMS.iter().for_each(|program| self.import(program));
        self.helm(&["upgrade", "steadfast-crds", &chart("steadfast-crds")]);
        self.helm(&release("upgrade", &chart("steadfast"), &[&IMAGES, values].concat()));
        self.rolled_out();
    }

    /// Goes back to the commit before this one, but for the definitions of resources.
    pub fn downgrade(&self, values: &[&str]) {
        let chart = self.previous_chart("steadfast");
        self.helm(&release("upgrade", &chart, &[&PREVIOUS_IMAGES, values].concat()));
        self.rolled_out();
    }

    fn rolled_out(&self) {
        for (component, namespace) in COMPONENTS {
            let deployment = format!("deployment/steadfast-{component}");
            let namespace = format!("--namespace={namespace}");
            self.kubectl(&["rollout", "status", "--timeout=110s", &deployment, &namespace]);
        }
    }

    fn previous_chart(&self, name: &str) -> String {
        self.parts.previous().join("charts").join(name).display().to_string()
    }

    /// Waits until every process of the control plane is ready.
    pub async fn control_plane_ready(&self) {
        for (component, namespace) in COMPONENTS {
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
        steadfast_by(self.kubeconfig(), args)
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

/// What our own command prints to whom this kubeconfig is of; or all that it said, when it ends with
/// another exit code than 0.
///
/// # Errors
/// What it printed.
pub fn steadfast_by(kubeconfig: &Path, args: &[&str]) -> Result<String, String> {
    let output = Command::new(binary_path("steadfast"))
        .env("KUBECONFIG", kubeconfig)
        .env_remove("STEADFAST_DIR")
        .args(args)
        .output()
        .expect("steadfast starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let printed = text(&output.stdout);
    if output.status.success() { Ok(printed) } else { Err(printed + &text(&output.stderr)) }
}

/// What helm is told about the mesh itself.
fn release<'a>(command: &'a str, chart: &'a str, values: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec![command, "steadfast", chart, "--namespace", CONTROL_NAMESPACE];
    if command == "install" {
        args.push("--create-namespace");
    }
    args.extend(values.iter().flat_map(|value| ["--set", value]));
    args
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
const COMPONENTS: [(&str, &str); 3] = [
    ("identity", CONTROL_NAMESPACE),
    ("rotation", ANCHORS_NAMESPACE),
    ("control", CONTROL_NAMESPACE),
];
const IMAGES: [&str; 3] = ["image.registry=localhost", "image.tag=1", "image.pullPolicy=Never"];
const PREVIOUS_IMAGES: [&str; 3] =
    ["image.registry=localhost", "image.tag=previous", "image.pullPolicy=Never"];
