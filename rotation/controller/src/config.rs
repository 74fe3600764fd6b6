//! The command line of `steadfast-rotation`, checked as a whole.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use steadfast_api::TrustDomain;
use steadfast_identity::authority::SKEW;
use steadfast_identity::replica::LEASE;
use steadfast_platform::access::{Platform, PlatformArgs};
use steadfast_platform::kubernetes::Namespaces;
use steadfast_process::flags::{ConfigErrors, Flags};
use steadfast_process::{duration, log};
use steadfast_rotation_protocol::controller::Timings;
use steadfast_rotation_protocol::schedule::{Schedule, Window};
use steadfast_rotation_protocol::trust_domain::{READ_LEASE, READ_LEASE_MIN};

use crate::founding::Founds;
use crate::token::TokenConfig;

/// Rotates the issuers and trust anchors of a mesh, by schedule and when a person asks for it.
///
/// It alone reads the keys of anchors, DIR/keys/anchors or on Kubernetes the Secrets of a namespace
/// of their own. It follows the stored state, asks the
/// replicas of the identity service who holds what, and takes no step that somebody would notice.
/// Several may run: the store decides between them. While none runs, nothing expires for days.
///
/// GET /rotation.json on the admin port tells, to loopback only, what it waits for and whom it
/// misses; GET /round.json, what everybody answered last.
#[derive(Clone, Debug, Parser)]
#[command(name = "steadfast-rotation", version, about, long_about, max_term_width = 100)]
pub struct Args {
    #[command(flatten)]
    platform: PlatformArgs,
    /// Where /metrics, /live and /ready are
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9991")]
    admin: String,
    /// The namespace of the control plane, a part of every DNS identity
    #[arg(long, value_name = "NAME", default_value = "steadfast")]
    control_namespace: String,
    /// On Kubernetes, the namespace of this controller and of the anchors' keys, which nobody else may
    /// read
    #[arg(long, value_name = "NAME", default_value = "steadfast-anchors")]
    anchors_namespace: String,
    /// On Kubernetes, the trust domain that is founded when there is none yet. It never changes
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    trust_domain: String,
    /// On Kubernetes, the read lease of a trust domain that is founded: 3s to 15s. It never changes
    #[arg(long, value_name = "TIME", default_value = "15s")]
    read_lease: String,
    /// The identity service, as host:port; every address of the host is a replica
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    identity_addr: String,
    /// The projected token of the controller's own pod [default: `token` in
    /// DIR/pods/NAMESPACE/steadfast-rotation-0, on Kubernetes in /var/run/steadfast]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The mounted trust bundle of the controller's own pod [default: bundle.json beside the token; on
    /// Kubernetes it is written by itself, to /var/lib/steadfast/bundle.json]
    #[arg(long, value_name = "FILE")]
    bundle_file: Option<PathBuf>,
    /// Over how long the renewals of a drain are spread
    #[arg(long, value_name = "TIME", default_value = "10m")]
    renew_window: String,
    /// The same when a key is in other hands
    #[arg(long, value_name = "TIME", default_value = "1m")]
    emergency_renew_window: String,
    /// How long an issuer lives
    #[arg(long, value_name = "TIME", default_value = "30d")]
    issuer_lifetime: String,
    /// An issuer with less than this left is replaced
    #[arg(long, value_name = "TIME", default_value = "10d")]
    issuer_left: String,
    /// How long a new anchor lives: at least two periods
    #[arg(long, value_name = "TIME", default_value = "761d")]
    anchor_lifetime: String,
    /// An anchor that has been active for so long is replaced
    #[arg(long, value_name = "TIME", default_value = "365d")]
    anchor_period: String,
    /// The hours of the day, UTC, in which anchors are replaced by schedule: 22:00+4h [default: any]
    #[arg(long, value_name = "HH:MM+TIME")]
    maintenance_window: Option<String>,
    /// Where the keys of new anchors are made: file (DIR/keys/anchors) or pkcs11. Keys that are in
    /// files already stay there until their anchors are withdrawn
    #[arg(long, value_name = "PLACE", default_value = "file")]
    anchor_keys: String,
    /// The PKCS#11 module of the token, a shared library such as libsofthsm2.so
    #[arg(long, value_name = "FILE")]
    pkcs11_module: Option<PathBuf>,
    /// The label of the token, which has the keys of this trust domain and of no other
    #[arg(long, value_name = "LABEL")]
    pkcs11_token: Option<String>,
    /// The file that holds the PIN of the token's user and nothing else, mode 0600
    #[arg(long, value_name = "FILE")]
    pkcs11_pin_file: Option<PathBuf>,
    /// On Kubernetes, a ConfigMap of the anchors' namespace in which another tool such as
    /// trust-manager keeps trust anchors in PEM: what it lists is proposed for rotations, and what
    /// it lists no more is withdrawn once nobody needs it [default: none]
    #[arg(long, value_name = "NAME")]
    bundle_configmap: Option<String>,
    /// The entry of that ConfigMap
    #[arg(long, value_name = "NAME", default_value = "ca-bundle.crt")]
    bundle_entry: String,
    /// Whether another tool makes the issuers under those anchors, as identity's --issuer-secret
    /// says: then an anchor is rotated to once its issuer is there
    #[arg(long, requires = "bundle_configmap")]
    external_issuers: bool,
    /// A file to which each change that is decided on is added as a line of JSON, with everything
    /// that it was made of: `steadfast trust replay FILE` decides it again. A line has what every
    /// workload answered, some 500 bytes each [default: none]
    #[arg(long, value_name = "FILE")]
    event_log: Option<PathBuf>,
    /// What is logged, in the syntax of RUST_LOG
    #[arg(long, value_name = "FILTER", env = "STEADFAST_LOG", default_value = "info")]
    log: String,
    /// plain or json
    #[arg(long, value_name = "FORMAT", default_value = "plain")]
    log_format: String,
}

/// What the process runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where it runs.
    pub platform: Platform,
    /// Where the admin port is.
    pub admin: SocketAddr,
    /// Where the processes of the control plane and their keys are.
    pub namespaces: Namespaces,
    /// What is founded where there is no trust domain yet.
    pub founds: Option<Founds>,
    /// The identity service.
    pub identity_addr: String,
    /// The token of its own pod.
    pub token_file: PathBuf,
    /// Its mounted bundle.
    pub bundle_file: PathBuf,
    /// How long things take.
    pub timings: Timings,
    /// How long a new anchor lives.
    pub anchor_lifetime: Duration,
    /// The token in which the keys of new anchors are made; `None`: in files.
    pub token: Option<TokenConfig>,
    /// Where another tool keeps trust anchors; `None`: nowhere.
    pub bundle: Option<BundleSource>,
    /// Where decisions are told with what they were made of; `None`: nowhere.
    pub event_log: Option<PathBuf>,
    /// The filter of the log.
    pub log_filter: String,
    /// The form of the log.
    pub log_format: log::Format,
}

/// Where another tool keeps trust anchors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleSource {
    /// The ConfigMap, in the anchors' namespace.
    pub config_map: String,
    /// Its entry.
    pub entry: String,
    /// Whether the issuers come from another tool too.
    pub makes_issuers: bool,
}

impl Args {
    /// Checks all of it.
    ///
    /// # Errors
    /// Every flag that cannot be used.
    pub fn check(self) -> Result<Config, ConfigErrors> {
        let mut flags = Flags::default();
        let platform = self.platform.check(&mut flags);
        let namespaces = platform.namespaces(
            flags.namespace("--control-namespace", self.control_namespace),
            flags.namespace("--anchors-namespace", self.anchors_namespace),
        );
        let pod = platform.pod_directory(&namespaces.control, "steadfast-rotation");
        let (least, most) = (Duration::from_secs(1), DAY * 3660);
        let mut time = |flag: &str, value: &str| flags.duration(flag, value, least..=most);
        let timings = Timings {
            lease: LEASE,
            skew: SKEW,
            renew_window: time("--renew-window", &self.renew_window),
            renew_window_urgent: time("--emergency-renew-window", &self.emergency_renew_window),
            issuer_life: time("--issuer-lifetime", &self.issuer_lifetime),
            issuer_left_min: time("--issuer-left", &self.issuer_left),
            schedule: Schedule {
                anchor_period: time("--anchor-period", &self.anchor_period),
                window: None,
            },
        };
        let anchor_lifetime = time("--anchor-lifetime", &self.anchor_lifetime);
        if anchor_lifetime < timings.schedule.anchor_period * 2 {
            let why = "an anchor waits for a period and is active for one: it must live for two";
            flags.wrong("--anchor-lifetime", &self.anchor_lifetime, why);
        }
        if timings.issuer_left_min >= timings.issuer_life {
            let why = "expected less than --issuer-lifetime, else every issuer is due at once";
            flags.wrong("--issuer-left", &self.issuer_left, why);
        }
        let window = self.maintenance_window.as_deref().and_then(|text| {
            let window = window(text);
            if window.is_none() {
                let why = "expected a time of day and how long, such as 22:00+4h";
                flags.wrong("--maintenance-window", text, why);
            }
            window
        });
        let token = token(
            &mut flags,
            &self.anchor_keys,
            [
                ("--pkcs11-module", self.pkcs11_module.map(PathBuf::into_os_string)),
                ("--pkcs11-token", self.pkcs11_token.map(OsString::from)),
                ("--pkcs11-pin-file", self.pkcs11_pin_file.map(PathBuf::into_os_string)),
            ],
        );
        let schedule = Schedule { window, ..timings.schedule };
        if let (Platform::Standalone(_), Some(name)) = (&platform, &self.bundle_configmap) {
            flags.wrong("--bundle-configmap", name, "it is for --kubernetes alone");
        }
        let config = Config {
            admin: flags.address("--admin", &self.admin),
            identity_addr: flags.host_and_port("--identity-addr", self.identity_addr),
            token_file: self.token_file.unwrap_or_else(|| pod.join("token")),
            bundle_file: self.bundle_file.unwrap_or_else(|| platform.bundle_file(&pod)),
            timings: Timings { schedule, ..timings },
            anchor_lifetime,
            token,
            event_log: self.event_log,
            bundle: self.bundle_configmap.map(|config_map| BundleSource {
                config_map,
                entry: self.bundle_entry,
                makes_issuers: self.external_issuers,
            }),
            log_filter: self.log,
            log_format: flags.log_format("--log-format", &self.log_format),
            namespaces,
            founds: founds(&mut flags, &self.trust_domain, &self.read_lease),
            platform,
        };
        flags.check(config)
    }
}

fn founds(flags: &mut Flags, trust_domain: &str, read_lease: &str) -> Option<Founds> {
    let read_lease = flags.duration("--read-lease", read_lease, READ_LEASE_MIN..=READ_LEASE);
    match trust_domain.parse::<TrustDomain>() {
        Ok(trust_domain) => Some(Founds { trust_domain, read_lease }),
        Err(error) => {
            flags.wrong("--trust-domain", trust_domain, &error.to_string());
            None
        }
    }
}

/// The three flags of a token belong together, and to `--anchor-keys pkcs11`.
fn token(
    flags: &mut Flags,
    place: &str,
    given: [(&str, Option<OsString>); 3],
) -> Option<TokenConfig> {
    let wanted = match place {
        "file" => false,
        "pkcs11" => true,
        _ => {
            flags.wrong("--anchor-keys", place, "expected file or pkcs11");
            return None;
        }
    };
    for (flag, value) in &given {
        match value {
            None if wanted => {
                flags.wrong(flag, "", "it is needed by --anchor-keys pkcs11");
            }
            Some(value) if !wanted => {
                let why = "it is for --anchor-keys pkcs11 alone: give that too";
                flags.wrong(flag, &value.to_string_lossy(), why);
            }
            _ => {}
        }
    }
    let [(_, Some(module)), (_, Some(label)), (_, Some(pin_file))] = given else { return None };
    let label = label.to_string_lossy().into_owned();
    wanted.then(|| TokenConfig { module: module.into(), label, pin_file: pin_file.into() })
}

fn window(text: &str) -> Option<Window> {
    let (from, length) = text.split_once('+')?;
    let (hours, minutes) = from.split_once(':')?;
    let two_digits = |text: &str| text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
    if !two_digits(hours) || !two_digits(minutes) {
        return None;
    }
    let (hours, minutes): (u64, u64) = (hours.parse().ok()?, minutes.parse().ok()?);
    let length = duration::parse(length).ok()?;
    let whole = hours < 24 && minutes < 60 && !length.is_zero() && length <= DAY;
    whole.then(|| Window { from: Duration::from_secs(hours * 3600 + minutes * 60), length })
}

const DAY: Duration = Duration::from_secs(86_400);

#[cfg(test)]
mod tests {
    use super::*;

    fn check(more: &[&str]) -> Result<Config, ConfigErrors> {
        Args::parse_from(["steadfast-rotation", "--dir", "/"].iter().chain(more)).check()
    }

    #[test]
    fn every_wrong_flag_is_told_at_once() {
        let flags = [
            "--dir=/nowhere/at/all",
            "--admin=9991",
            "--anchor-lifetime=1d",
            "--issuer-left=30d",
            "--maintenance-window=25:00+4h",
            "--renew-window=soon",
            "--trust-domain=Example",
            "--read-lease=1m",
        ];
        let args = Args::parse_from(["steadfast-rotation"].iter().chain(&flags));
        let error = args.check().unwrap_err().to_string();
        for flag in flags {
            let (name, _) = flag.split_once('=').unwrap();
            assert!(error.contains(name), "{name} is not in {error}");
        }
    }

    #[test]
    fn the_flags_of_a_token_belong_together() {
        assert_eq!(check(&[]).unwrap().token, None);
        let all = ["--pkcs11-module=/m.so", "--pkcs11-token=t", "--pkcs11-pin-file=/p"];
        let with = |place: &str| check(&[&[place], &all[..]].concat());
        let token = with("--anchor-keys=pkcs11").unwrap().token.unwrap();
        assert_eq!((token.module, token.label), ("/m.so".into(), "t".to_owned()));
        let error = with("--anchor-keys=file").unwrap_err().to_string();
        let lacking = check(&["--anchor-keys=pkcs11"]).unwrap_err().to_string();
        for flag in all {
            let (flag, _) = flag.split_once('=').unwrap();
            assert!(error.contains(flag) && lacking.contains(flag), "{error}\n{lacking}");
        }
        let error = with("--anchor-keys=vault").unwrap_err().to_string();
        assert!(error.contains("file or pkcs11"), "{error}");
    }

    #[test]
    fn a_window_is_a_time_of_day_and_a_length() {
        let hour = Duration::from_secs(3600);
        let window = |text: &str| {
            let config = check(&["--maintenance-window", text]).ok()?;
            config.timings.schedule.window
        };
        assert_eq!(window("22:30+4h"), Some(Window { from: hour * 45 / 2, length: hour * 4 }));
        for wrong in ["22:30", "22+4h", "+1:00+4h", "22:60+4h", "22:00+25h", "22:00+0s", ""] {
            assert_eq!(window(wrong), None, "{wrong}");
        }
    }
}
