//! The flags, checked as a whole: every error is told at once, and nothing starts before.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use steadfast_platform::access::{Platform, PlatformArgs};
use steadfast_platform::kubernetes::Namespaces;
use steadfast_platform::standalone::Directory;
use steadfast_platform::token::IDENTITY_AUDIENCE;
use steadfast_process::flags::{ConfigErrors, Flags};
use steadfast_process::log::Format;

use crate::confine::RESTARTED_FLAG;
use crate::limits::Rates;

/// Issues the SVIDs of a mesh: to every workload its own, for a token that proves it.
///
/// Standalone it needs the state directory that steadfast-store serves and `steadfast trust init`
/// has filled: it keeps the keys of issuers in DIR/keys/issuers, appends to DIR/log, talks to
/// DIR/store.sock, and shuts itself out of everything else (above all the keys of anchors) where the
/// kernel has Landlock. On Kubernetes it keeps the keys of issuers as Secrets of its namespace.
///
/// GET /ready on the admin port says what it waits for, GET /metrics what it counts. To loopback
/// only, GET /identity.json tells its own SVID and GET /members who has a trust stream here; POST
/// /query?nonce=N asks all of them for an ack (N ascends and is the time in microseconds at most),
/// and POST /renew?window_s=S has all of them renew within S seconds (at most an SVID's life).
/// `steadfast explain SFT-ID-003` explains a code.
#[derive(Clone, Debug, Parser)]
#[command(name = "steadfast-identity", version, max_term_width = 100)]
pub struct Args {
    #[command(flatten)]
    platform: PlatformArgs,
    /// Where to serve TLS: gRPC, GET /bundle and GET /jwks
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    listen: String,
    /// Where to serve plaintext HTTP/2 to Linkerd's proxy; loopback only, off unless given
    #[arg(long, value_name = "ADDR")]
    plaintext_listen: Option<String>,
    /// Where to serve /metrics, /live, /ready, and to loopback the rest of the admin port
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9990")]
    admin: String,
    /// How long an SVID lives: 24h, 90m, 20s (at least 2s, at most 7 days)
    #[arg(long, value_name = "TIME", default_value = "24h")]
    svid_ttl: String,
    /// The namespace of the control plane, a part of every DNS identity
    #[arg(long, value_name = "NAME", default_value = "steadfast")]
    control_namespace: String,
    /// On Kubernetes, the namespace of the controller and of the anchors' keys, of which nothing else is read than what a
    /// new trust domain is founded on
    #[arg(long, value_name = "NAME", default_value = "steadfast-anchors")]
    anchors_namespace: String,
    /// On Kubernetes, a Secret of the control plane's namespace, of the type kubernetes.io/tls, in
    /// which another tool such as cert-manager keeps the issuer: what is there is proposed to the
    /// controller of rotations [default: none]
    #[arg(long, value_name = "NAME")]
    issuer_secret: Option<String>,
    /// Whom tokens must be for
    #[arg(long, value_name = "NAME", default_value = IDENTITY_AUDIENCE)]
    audience: String,
    /// How many SVIDs a second all workloads together get
    #[arg(long, value_name = "N", default_value = "4000")]
    svids_per_second: String,
    /// How many renewals a second are let through beside them: new work is shed first
    #[arg(long, value_name = "N", default_value = "4000")]
    renewals_per_second: String,
    /// How many SVIDs a minute one workload gets
    #[arg(long, value_name = "N", default_value = "120")]
    svids_per_workload_per_minute: String,
    /// Where the issuance log is kept [default: DIR/log; on Kubernetes, /var/log/steadfast]
    #[arg(long, value_name = "DIR")]
    log_dir: Option<PathBuf>,
    /// The size at which a file of the issuance log is rotated, in MiB
    #[arg(long, value_name = "N", default_value = "64")]
    log_file_mib: String,
    /// How many rotated files of the issuance log are kept
    #[arg(long, value_name = "N", default_value = "20")]
    log_files_kept: String,
    /// What is logged, in the syntax of RUST_LOG
    #[arg(long, value_name = "FILTER", env = "STEADFAST_LOG", default_value = "info")]
    log: String,
    /// plain or json
    #[arg(long, value_name = "FORMAT", default_value = "plain")]
    log_format: String,
    /// Set by the process itself: see `confine::alone`
    #[arg(long = RESTARTED_FLAG.trim_start_matches('-'), hide = true)]
    restarted: bool,
}

/// What the process runs with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it runs.
    pub platform: Platform,
    /// Where TLS is served.
    pub listen: SocketAddr,
    /// Where plaintext is served.
    pub plaintext_listen: Option<SocketAddr>,
    /// Where the admin port is.
    pub admin: SocketAddr,
    /// How long an SVID lives.
    pub svid_ttl: Duration,
    /// Where the processes of the control plane and their keys are.
    pub namespaces: Namespaces,
    /// The Secret in which another tool keeps the issuer.
    pub issuer_secret: Option<String>,
    /// Whom tokens must be for.
    pub audience: String,
    /// How much is let through.
    pub rates: Rates,
    /// Where the issuance log is kept.
    pub log_dir: PathBuf,
    /// The size at which the issuance log is rotated.
    pub log_file_bytes_max: u64,
    /// How many rotated files are kept.
    pub log_files_kept: usize,
    /// The filter of the log.
    pub log_filter: String,
    /// The form of the log.
    pub log_format: Format,
    /// Whether the process has started itself anew, to have one thread.
    pub restarted: bool,
}

impl Args {
    /// Checks all of it.
    ///
    /// # Errors
    /// Every flag that cannot be used.
    pub fn check(self) -> Result<Config, ConfigErrors> {
        let mut flags = Flags::default();
        let platform = self.platform.check(&mut flags);
        let log_dir = self.log_dir.unwrap_or_else(|| match &platform {
            Platform::Kubernetes => LOG_DIRECTORY.into(),
            Platform::Standalone(dir) => Directory::new(dir).log(),
        });
        let plaintext_listen =
            self.plaintext_listen.as_deref().map(|text| flags.loopback("--plaintext-listen", text));
        let namespaces = platform.namespaces(
            flags.namespace("--control-namespace", self.control_namespace),
            flags.namespace("--anchors-namespace", self.anchors_namespace),
        );
        if let (Platform::Standalone(_), Some(name)) = (&platform, &self.issuer_secret) {
            flags.wrong("--issuer-secret", name, "it is for --kubernetes alone");
        }
        let config = Config {
            issuer_secret: self.issuer_secret,
            listen: flags.address("--listen", &self.listen),
            plaintext_listen: plaintext_listen.flatten(),
            admin: flags.address("--admin", &self.admin),
            svid_ttl: flags.duration("--svid-ttl", &self.svid_ttl, SVID_TTL_MIN..=SVID_TTL_MAX),
            rates: Rates {
                common_per_second: flags.count("--svids-per-second", &self.svids_per_second),
                renewals_per_second: flags
                    .count("--renewals-per-second", &self.renewals_per_second),
                workload_per_minute: flags
                    .count("--svids-per-workload-per-minute", &self.svids_per_workload_per_minute),
            },
            log_file_bytes_max: u64::from(flags.count("--log-file-mib", &self.log_file_mib).get())
                * (1 << 20),
            log_files_kept: flags.count("--log-files-kept", &self.log_files_kept).get() as usize,
            log_format: flags.log_format("--log-format", &self.log_format),
            namespaces,
            audience: flags.filled("--audience", self.audience),
            log_filter: self.log,
            restarted: self.restarted,
            log_dir,
            platform,
        };
        flags.check(config)
    }
}

const LOG_DIRECTORY: &str = "/var/log/steadfast";
/// Below, a renewal has no time for a second try.
const SVID_TTL_MIN: Duration = Duration::from_secs(2);
/// An issuer has 30 days and is rotated when 10 are left.
const SVID_TTL_MAX: Duration = Duration::from_secs(7 * 86_400);

#[cfg(test)]
mod tests {
    use super::*;

    fn check(flags: &[&str]) -> Result<Config, ConfigErrors> {
        let args = ["steadfast-identity", "--dir", "/"].iter().chain(flags);
        Args::try_parse_from(args).unwrap().check()
    }

    #[test]
    fn the_defaults_are_those_of_the_design() {
        let config = check(&[]).unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:8080");
        assert_eq!(config.svid_ttl, Duration::from_secs(86_400));
        assert_eq!(config.plaintext_listen, None);
        assert_eq!(config.audience, "identity.l5d.io");
    }

    #[test]
    fn every_wrong_flag_is_told_at_once() {
        let flags = [
            "--listen=here",
            "--plaintext-listen=0.0.0.0:8081",
            "--svid-ttl=1s",
            "--svids-per-second=0",
            "--control-namespace=A",
            "--audience=",
            "--log-format=xml",
        ];
        let error = check(&flags).unwrap_err().to_string();
        for flag in flags {
            let name = flag.split('=').next().unwrap();
            assert!(error.contains(name), "{name} in {error}");
        }
        assert!(error.starts_with("SFT-CFG-001"));
    }

    #[test]
    fn plaintext_is_for_loopback_only() {
        for good in ["127.0.0.1:1", "[::1]:1", "127.8.8.8:1"] {
            assert!(check(&[&format!("--plaintext-listen={good}")]).is_ok(), "{good}");
        }
        for bad in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1"] {
            assert!(check(&[&format!("--plaintext-listen={bad}")]).is_err(), "{bad}");
        }
    }
}
