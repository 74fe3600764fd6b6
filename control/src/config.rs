//! The command line of `steadfast-control`, checked as a whole.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use steadfast_api::Code;
use steadfast_process::log;

/// Tells the sidecars of a mesh where the endpoints of each service are and who must answer there.
///
/// It follows Services, EndpointSlices and Pods in the store and serves Linkerd's destination API
/// to whoever shows an SVID of the trust domain. Its own SVID comes from the identity service by a
/// token, as any workload's. Without the store it goes on serving what it last knew.
#[derive(Clone, Debug, Parser)]
#[command(name = "steadfast-control", version, about, long_about)]
pub struct Args {
    /// The state directory of the mesh, where `steadfast-store` listens.
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,

    /// Where sidecars connect, by mutual TLS.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8086")]
    pub listen: SocketAddr,

    /// Where Linkerd's own proxy connects in plaintext, as it does to a loopback address. Off
    /// unless given; loopback only.
    #[arg(long, value_name = "ADDRESS")]
    pub plaintext_listen: Option<SocketAddr>,

    /// Where /metrics, /live and /ready are.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9992")]
    pub admin: SocketAddr,

    /// The namespace of the control plane: a part of every DNS identity.
    #[arg(long, value_name = "NAMESPACE", default_value = "steadfast")]
    pub control_namespace: String,

    /// What names of services end in, behind `.svc`.
    #[arg(long, value_name = "DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,

    /// The identity service, as host:port.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    pub identity_addr: String,

    /// The projected token of control's own pod [default: `token` in DIR/pods/NAMESPACE/POD,
    /// where NAMESPACE is the control plane's and POD is steadfast-control-0].
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// The mounted trust bundle of control's own pod [default: bundle.json beside the token].
    #[arg(long, value_name = "FILE")]
    pub bundle_file: Option<PathBuf>,

    /// How long open streams may take to end once asked to stop, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "10")]
    pub shutdown_grace_period: u64,

    /// What is logged: a level, or levels by module (`info,steadfast_control=debug`).
    #[arg(long, value_name = "FILTER", env = "STEADFAST_LOG", default_value = "info")]
    pub log: String,

    /// The form of a log line: plain or json.
    #[arg(long, value_name = "FORM", default_value = "plain")]
    pub log_format: log::Format,
}

/// Every error of a command line at once.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} {}:\n  - {}", Code::CONFIG_INVALID, Code::CONFIG_INVALID.title(), .0.join("\n  - "))]
pub struct ConfigErrors(pub Vec<String>);

impl Args {
    /// Checks what the types do not say.
    ///
    /// # Errors
    /// All that is wrong.
    pub fn check(&self) -> Result<(), ConfigErrors> {
        let mut errors = Vec::new();
        if let Some(addr) = self.plaintext_listen.filter(|addr| !addr.ip().is_loopback()) {
            errors.push(format!(
                "--plaintext-listen {addr}: only a loopback address may be served in plaintext; use --listen for others"
            ));
        }
        if !is_dns_name(&self.control_namespace) || self.control_namespace.contains('.') {
            let name = &self.control_namespace;
            errors.push(format!("--control-namespace {name:?}: is no name of a namespace"));
        }
        if !is_dns_name(&self.cluster_domain) {
            let name = &self.cluster_domain;
            errors.push(format!(
                "--cluster-domain {name:?}: is no DNS name; the usual one is \"cluster.local\""
            ));
        }
        let port = self.identity_addr.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
        if !matches!(port, Some(Ok(1..))) {
            let addr = &self.identity_addr;
            errors.push(format!("--identity-addr {addr:?}: expected host:port"));
        }
        if errors.is_empty() { Ok(()) } else { Err(ConfigErrors(errors)) }
    }

    /// The token file, given or usual.
    pub fn token_file(&self) -> PathBuf {
        self.token_file.clone().unwrap_or_else(|| self.pod_dir().join("token"))
    }

    /// The mounted bundle, given or usual.
    pub fn bundle_file(&self) -> PathBuf {
        self.bundle_file.clone().unwrap_or_else(|| self.pod_dir().join("bundle.json"))
    }

    /// How long a drain may take.
    pub fn grace_period(&self) -> Duration {
        Duration::from_secs(self.shutdown_grace_period)
    }

    fn pod_dir(&self) -> PathBuf {
        self.dir.join("pods").join(&self.control_namespace).join("steadfast-control-0")
    }
}

fn is_dns_name(name: &str) -> bool {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    name.split('.').all(|label| {
        (1..=63).contains(&label.len())
            && label.bytes().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(more: &[&str]) -> Args {
        Args::parse_from(["steadfast-control", "--dir", "/state"].iter().chain(more))
    }

    #[test]
    fn every_error_is_told_at_once() {
        let wrong = args(&[
            "--plaintext-listen",
            "0.0.0.0:8087",
            "--control-namespace",
            "a.b",
            "--cluster-domain",
            "-",
            "--identity-addr",
            "identity",
        ]);
        let error = wrong.check().unwrap_err();
        assert_eq!(error.0.len(), 4, "{error}");
        assert!(error.to_string().starts_with("SFT-CFG-001 "));
    }

    #[test]
    fn files_are_those_of_controls_own_pod() {
        let usual = args(&["--control-namespace", "mesh", "--plaintext-listen", "[::1]:8087"]);
        assert_eq!(usual.check(), Ok(()));
        let pod = PathBuf::from("/state/pods/mesh/steadfast-control-0");
        assert_eq!(
            (usual.token_file(), usual.bundle_file()),
            (pod.join("token"), pod.join("bundle.json"))
        );
    }
}
