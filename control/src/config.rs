//! The command line of `steadfast-control`, checked as a whole.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use steadfast_platform::access::{Platform, PlatformArgs};
use steadfast_process::flags::{ConfigErrors, Flags};
use steadfast_process::log;

/// Tells the sidecars of a mesh where the endpoints of each service are and who must answer there.
///
/// It follows Services, EndpointSlices, Pods and ServiceAccounts in the store and serves Linkerd's destination API
/// to whoever shows an SVID of the trust domain. Its own SVID comes from the identity service by a
/// token, as any workload's. Without the store it goes on serving what it last knew.
#[derive(Clone, Debug, Parser)]
#[command(name = "steadfast-control", version, about, long_about)]
pub struct Args {
    #[command(flatten)]
    platform: PlatformArgs,

    /// Where sidecars connect, by mutual TLS.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8086")]
    listen: String,

    /// Where Linkerd's own proxy connects in plaintext, as it does to a loopback address. Off
    /// unless given; loopback only.
    #[arg(long, value_name = "ADDRESS")]
    plaintext_listen: Option<String>,

    /// Where /metrics, /live and /ready are.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9992")]
    admin: String,

    /// The namespace of the control plane: a part of every DNS identity.
    #[arg(long, value_name = "NAMESPACE", default_value = "steadfast")]
    control_namespace: String,

    /// What names of services end in, behind `.svc`.
    #[arg(long, value_name = "DOMAIN", default_value = "cluster.local")]
    cluster_domain: String,

    /// The identity service, as host:port.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    identity_addr: String,

    /// The projected token of control's own pod [default: `token` in DIR/pods/NAMESPACE/POD,
    /// where NAMESPACE is the control plane's and POD is steadfast-control-0; on Kubernetes, in
    /// /var/run/steadfast].
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// The mounted trust bundle of control's own pod [default: bundle.json beside the token; on
    /// Kubernetes it is written by itself, to /var/lib/steadfast/bundle.json].
    #[arg(long, value_name = "FILE")]
    bundle_file: Option<PathBuf>,

    /// On Kubernetes, what every meshed pod has in common, as JSON: the chart's ConfigMap
    /// steadfast-injection, mounted. With it pods are meshed as they are created.
    #[arg(long, value_name = "FILE", requires = "kubernetes")]
    injection: Option<PathBuf>,

    /// Where the API server asks about pods.
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8443")]
    webhook_listen: String,

    /// The MutatingWebhookConfiguration that leads there.
    #[arg(long, value_name = "NAME", default_value = "steadfast-injector")]
    webhook_configuration: String,

    /// How long open streams may take to end once asked to stop: 10s, 2m.
    #[arg(long, value_name = "TIME", default_value = "10s")]
    shutdown_grace_period: String,

    /// What is logged: a level, or levels by module (`info,steadfast_control=debug`).
    #[arg(long, value_name = "FILTER", env = "STEADFAST_LOG", default_value = "info")]
    log: String,

    /// The form of a log line: plain or json.
    #[arg(long, value_name = "FORM", default_value = "plain")]
    log_format: String,
}

/// What the process runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where it runs.
    pub platform: Platform,
    /// Where sidecars connect.
    pub listen: SocketAddr,
    /// Where plaintext is served.
    pub plaintext_listen: Option<SocketAddr>,
    /// Where the admin port is.
    pub admin: SocketAddr,
    /// The namespace of the control plane.
    pub control_namespace: String,
    /// What names of services end in.
    pub cluster_domain: String,
    /// The identity service.
    pub identity_addr: String,
    /// The token of control's own pod.
    pub token_file: PathBuf,
    /// Its mounted bundle.
    pub bundle_file: PathBuf,
    /// How pods are meshed, if they are.
    pub webhook: Option<Webhook>,
    /// How long a drain may take.
    pub grace_period: Duration,
    /// The filter of the log.
    pub log_filter: String,
    /// The form of the log.
    pub log_format: log::Format,
}

/// The webhook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Webhook {
    /// Where the API server asks.
    pub listen: SocketAddr,
    /// What leads there.
    pub configuration: String,
    /// What every meshed pod has in common.
    pub injection: PathBuf,
}

impl Args {
    /// Checks all of it.
    ///
    /// # Errors
    /// Every flag that cannot be used.
    pub fn check(self) -> Result<Config, ConfigErrors> {
        let mut flags = Flags::default();
        let plaintext_listen =
            self.plaintext_listen.as_deref().map(|text| flags.loopback("--plaintext-listen", text));
        let namespace = flags.namespace("--control-namespace", self.control_namespace);
        let platform = self.platform.check(&mut flags);
        let pod = platform.pod_directory(&namespace, "steadfast-control");
        let webhook_listen = flags.address("--webhook-listen", &self.webhook_listen);
        let configuration = flags.filled("--webhook-configuration", self.webhook_configuration);
        let config = Config {
            webhook: self.injection.map(|injection| Webhook {
                listen: webhook_listen,
                configuration,
                injection,
            }),
            listen: flags.address("--listen", &self.listen),
            plaintext_listen: plaintext_listen.flatten(),
            admin: flags.address("--admin", &self.admin),
            control_namespace: namespace,
            cluster_domain: flags.domain("--cluster-domain", self.cluster_domain),
            identity_addr: flags.host_and_port("--identity-addr", self.identity_addr),
            token_file: self.token_file.unwrap_or_else(|| pod.join("token")),
            bundle_file: self.bundle_file.unwrap_or_else(|| platform.bundle_file(&pod)),
            grace_period: flags.duration(
                "--shutdown-grace-period",
                &self.shutdown_grace_period,
                Duration::ZERO..=GRACE_PERIOD_MAX,
            ),
            log_filter: self.log,
            log_format: flags.log_format("--log-format", &self.log_format),
            platform,
        };
        flags.check(config)
    }
}

/// Whoever waits longer has forgotten.
const GRACE_PERIOD_MAX: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;

    fn check(more: &[&str]) -> Result<Config, ConfigErrors> {
        Args::parse_from(["steadfast-control", "--dir", "/"].iter().chain(more)).check()
    }

    #[test]
    fn every_wrong_flag_is_told_at_once() {
        let flags = [
            "--listen=here",
            "--plaintext-listen=0.0.0.0:8087",
            "--admin=9992",
            "--webhook-listen=8443",
            "--webhook-configuration=",
            "--control-namespace=a.b",
            "--cluster-domain=-",
            "--identity-addr=identity",
            "--shutdown-grace-period=10",
            "--log-format=xml",
        ];
        let error = check(&flags).unwrap_err().to_string();
        for flag in flags {
            let name = flag.split('=').next().unwrap();
            assert!(error.contains(name), "{name} is not in {error}");
        }
        assert!(error.starts_with("SFT-CFG-001"), "{error}");
    }

    #[test]
    fn files_are_those_of_controls_own_pod() {
        let usual = check(&["--control-namespace", "mesh", "--plaintext-listen", "[::1]:8087"]);
        let usual = usual.unwrap();
        let pod = PathBuf::from("/pods/mesh/steadfast-control-0");
        assert_eq!(
            (usual.token_file, usual.bundle_file),
            (pod.join("token"), pod.join("bundle.json"))
        );
        assert_eq!(usual.grace_period, Duration::from_secs(10));
    }
}
