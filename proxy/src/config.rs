//! The configuration of a sidecar: read once, from the environment, all errors at once.
//!
//! Linkerd's variables by their names, so that its injector and its guides apply; what Linkerd
//! lacks begins with `STEADFAST_PROXY_`. Nothing else in the crate reads the environment, and
//! nothing here does I/O: a file is named, not opened.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use steadfast_api::{Code, DnsIdentity};
use steadfast_policy::{DefaultPolicy, Networks};
use steadfast_process::duration;
use steadfast_process::log::Format;

use crate::target::Target;

/// Where the variables come from: the environment, or a map in a test.
pub trait Vars {
    /// The value of a variable; `None` if it is not set, or not UTF-8.
    fn var(&self, name: &str) -> Option<String>;
}

/// The environment of the process.
#[derive(Clone, Copy, Debug)]
pub struct Environment;

/// Everything a sidecar is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// How connections reach the proxy.
    pub mode: Mode,
    /// Who the workload is, and who certifies it.
    pub identity: Identity,
    /// The control plane's discovery; without it, names are not resolved.
    pub destination: Option<Destination>,
    /// The side that serves the workload's peers.
    pub inbound: Inbound,
    /// The side that the workload's own connections take.
    pub outbound: Outbound,
    /// Where `/metrics`, `/live` and `/ready` answer.
    pub admin_listen: SocketAddr,
    /// How many worker threads are asked for.
    pub cores: usize,
    /// The log's filter, in the syntax of `tracing`.
    pub log_filter: String,
    /// The form of a log line.
    pub log_format: Format,
    /// How long open connections may go on once the process is asked to stop.
    pub grace: Duration,
    /// How long opaque and upgraded connections by mutual TLS may go on, where they may not forever.
    pub connection_age_max: Option<Duration>,
    /// How long those may go on whose anchor was withdrawn.
    pub withdrawn_deadline: Duration,
    /// The variables that were set, for `/env.json`.
    pub seen: BTreeMap<&'static str, String>,
}

/// How connections reach the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Applications name the destination: by authority, or by a port of the listen map.
    Explicit,
    /// Redirected by the kernel, which remembers the destination (SO_ORIGINAL_DST).
    Transparent,
}

/// Who the workload is, and who certifies it.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The workload's own name.
    pub local_name: DnsIdentity,
    /// The token that proves it; read again for each request.
    pub token_file: PathBuf,
    /// The identity service.
    pub service: Service,
    /// What is believed before the first bundle arrives.
    pub anchors: Anchors,
}

/// The anchors that the identity service is authenticated with.
#[derive(Clone, Debug)]
pub enum Anchors {
    /// A mounted bundle, read again on change.
    File(PathBuf),
    /// PEM, fixed for the life of the process.
    Pem(String),
}

/// A service of the control plane: where it is, and who must answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// `host:port`.
    pub addr: String,
    /// The identity that its certificate must show.
    pub name: DnsIdentity,
}

/// The control plane's discovery.
#[derive(Clone, Debug)]
pub struct Destination {
    /// The service.
    pub service: Service,
    /// An opaque text that tells discovery who asks.
    pub context: String,
}

/// The side that serves the workload's peers.
#[derive(Clone, Debug)]
pub struct Inbound {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The ports that the workload declares.
    pub ports: BTreeSet<u16>,
    /// Ports that are never looked into for HTTP.
    pub opaque_ports: BTreeSet<u16>,
    /// Who may connect, until a policy says otherwise.
    pub default_policy: DefaultPolicy,
    /// What the `cluster-*` policies call the cluster.
    pub cluster_networks: Networks,
    /// Where the application listens, in explicit mode.
    pub application: IpAddr,
}

/// The side that the workload's own connections take.
#[derive(Clone, Debug)]
pub struct Outbound {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Listeners for one TCP destination each (explicit mode).
    pub listen_map: Vec<(SocketAddr, Target)>,
}

/// One thing that is wrong with the configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {name}: {problem}", Code::CONFIG_INVALID)]
pub struct ConfigError {
    name: &'static str,
    problem: String,
}

impl Vars for Environment {
    #[allow(clippy::disallowed_methods)] // The one place that reads it.
    fn var(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }
}

impl Vars for BTreeMap<&str, &str> {
    fn var(&self, name: &str) -> Option<String> {
        self.get(name).map(|value| (*value).to_owned())
    }
}

impl Config {
    /// Reads the whole configuration.
    ///
    /// # Errors
    /// Every variable that is missing or has a value that cannot be used.
    pub fn parse(vars: &dyn Vars) -> Result<Self, Vec<ConfigError>> {
        let mut reader = Reader { vars, errors: Vec::new() };
        let read = &mut reader;
        let mode = read.or(MODE, Mode::Transparent);
        let identity = identity(read);
        let destination = destination(read);
        let inbound = inbound(read);
        let outbound = outbound(read, mode);
        let admin_listen = read.or(ADMIN_LISTEN_ADDR, any_address(4191));
        let cores = read.with(CORES, 1, parse_cores);
        let log_filter = read.or(LOG, "info".to_owned());
        let log_format = read.or(LOG_FORMAT, Format::Plain);
        let grace = read.with(SHUTDOWN_GRACE_PERIOD, GRACE_DEFAULT, parse_duration);
        let connection_age_max =
            read.with(CONNECTION_AGE_MAX, None, |text| parse_age(text).map(Some));
        let withdrawn_deadline =
            read.with(WITHDRAWN_TCP_DEADLINE, WITHDRAWN_DEADLINE_DEFAULT, parse_duration);
        let seen = VARIABLES.iter().filter_map(|v| Some((v.name, vars.var(v.name)?))).collect();
        match (identity, reader.errors.is_empty()) {
            (Some(identity), true) => Ok(Self {
                mode,
                identity,
                destination,
                inbound,
                outbound,
                admin_listen,
                cores,
                log_filter,
                log_format,
                grace,
                connection_age_max,
                withdrawn_deadline,
                seen,
            }),
            _ => Err(reader.errors),
        }
    }

    /// The addresses that the proxy itself listens on: a connection to one of them would lead
    /// back into the proxy, or to its admin port in the name of the workload itself.
    pub fn own_listeners(&self) -> Vec<SocketAddr> {
        let mapped = self.outbound.listen_map.iter().map(|(listen, _)| *listen);
        [self.inbound.listen, self.outbound.listen, self.admin_listen]
            .into_iter()
            .chain(mapped)
            .collect()
    }
}

/// What `--help` prints.
pub fn help() -> String {
    let mut text = format!(
        "steadfast-proxy {}: the sidecar of the Steadfast mesh\n\n\
         It takes no arguments but --help, --version and --await, which waits until the sidecar with\n\
         the same environment is ready. Its environment says everything.\n\
         Linkerd's names where Linkerd has the setting. (required) has no default.\n\n",
        env!("CARGO_PKG_VERSION")
    );
    for variable in VARIABLES {
        text +=
            &format!("  {} ({})\n      {}\n", variable.name, variable.default, variable.meaning);
    }
    text +=
        "\nIt logs to standard error, and drains on SIGTERM. Wrong configuration: exit code 64.\n";
    text
}

/// What is printed when the log cannot start with the filter it was given.
pub fn log_filter_error(problem: &str) -> ConfigError {
    ConfigError { name: LOG, problem: problem.to_owned() }
}

fn identity(read: &mut Reader<'_>) -> Option<Identity> {
    let local_name = read.required(IDENTITY_LOCAL_NAME, FromStr::from_str);
    let token_file = read.required(IDENTITY_TOKEN_FILE, PathBuf::from_str);
    let addr = read.required(IDENTITY_SVC_ADDR, parse_host_port);
    let name = read.required(IDENTITY_SVC_NAME, FromStr::from_str);
    let anchors = match (read.text(IDENTITY_TRUST_ANCHORS), read.text(BUNDLE_FILE)) {
        (Some(pem), None) if pem.contains("-----BEGIN CERTIFICATE-----") => Some(Anchors::Pem(pem)),
        (Some(_), None) => {
            read.refuse(IDENTITY_TRUST_ANCHORS, "holds no PEM certificate (it is no path)");
            None
        }
        (None, Some(file)) => Some(Anchors::File(file.into())),
        (None, None) => {
            read.refuse(BUNDLE_FILE, "is not set, and neither is LINKERD2_PROXY_IDENTITY_TRUST_ANCHORS: one of both says which identity service is believed");
            None
        }
        (Some(_), Some(_)) => {
            read.refuse(BUNDLE_FILE, "is set beside LINKERD2_PROXY_IDENTITY_TRUST_ANCHORS: unset one of both, since it is not clear which is meant");
            None
        }
    };
    let service = Service { addr: addr?, name: name? };
    Some(Identity { local_name: local_name?, token_file: token_file?, service, anchors: anchors? })
}

fn destination(read: &mut Reader<'_>) -> Option<Destination> {
    if read.text(DESTINATION_SVC_ADDR).is_none() && read.text(DESTINATION_SVC_NAME).is_none() {
        return None;
    }
    let addr = read.required(DESTINATION_SVC_ADDR, parse_host_port);
    let name = read.required(DESTINATION_SVC_NAME, FromStr::from_str);
    let context = read.text(DESTINATION_CONTEXT).or_else(|| read.text(POLICY_WORKLOAD));
    let service = Service { addr: addr?, name: name? };
    Some(Destination { service, context: context.unwrap_or_default() })
}

fn inbound(read: &mut Reader<'_>) -> Inbound {
    Inbound {
        listen: read.or(INBOUND_LISTEN_ADDR, any_address(4143)),
        ports: read.with(INBOUND_PORTS, BTreeSet::new(), parse_ports),
        opaque_ports: read.with(INBOUND_OPAQUE_PORTS, default_opaque_ports(), parse_ports),
        default_policy: read.or(INBOUND_DEFAULT_POLICY, DefaultPolicy::AllUnauthenticated),
        cluster_networks: cluster_networks(read),
        application: read.or(INBOUND_APPLICATION_IP, IpAddr::V4(Ipv4Addr::LOCALHOST)),
    }
}

fn outbound(read: &mut Reader<'_>, mode: Mode) -> Outbound {
    let listen = read.or(OUTBOUND_LISTEN_ADDR, SocketAddr::from((Ipv4Addr::LOCALHOST, 4140)));
    let listen_map = read.with(OUTBOUND_LISTEN_MAP, Vec::new(), parse_listen_map);
    if mode == Mode::Transparent && !listen_map.is_empty() {
        read.refuse(OUTBOUND_LISTEN_MAP, "is for STEADFAST_PROXY_MODE=explicit; in transparent mode the kernel says where a connection goes");
    }
    Outbound { listen, listen_map }
}

/// A `cluster-*` policy with an empty list would let nobody in, so there is no empty default.
fn cluster_networks(read: &mut Reader<'_>) -> Networks {
    let text = read.text(POLICY_CLUSTER_NETWORKS);
    text.as_deref().unwrap_or(CLUSTER_NETWORKS_DEFAULT).parse().unwrap_or_else(|error| {
        read.refuse(POLICY_CLUSTER_NETWORKS, error);
        Networks::any()
    })
}

/// Collects values and errors.
struct Reader<'a> {
    vars: &'a dyn Vars,
    errors: Vec<ConfigError>,
}

impl Reader<'_> {
    /// A variable that is set to something.
    fn text(&self, name: &str) -> Option<String> {
        self.vars.var(name).filter(|value| !value.is_empty())
    }

    fn refuse(&mut self, name: &'static str, problem: impl fmt::Display) {
        self.errors.push(ConfigError { name, problem: problem.to_string() });
    }

    fn required<T, E: fmt::Display>(
        &mut self,
        name: &'static str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let Some(text) = self.text(name) else {
            self.refuse(name, "is not set, and has no default");
            return None;
        };
        parse(&text).map_err(|error| self.refuse(name, error)).ok()
    }

    fn with<T, E: fmt::Display>(
        &mut self,
        name: &'static str,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> T {
        match self.text(name).map(|text| parse(&text)) {
            Some(Ok(value)) => value,
            Some(Err(error)) => {
                self.refuse(name, error);
                default
            }
            None => default,
        }
    }

    fn or<T: FromStr<Err: fmt::Display>>(&mut self, name: &'static str, default: T) -> T {
        self.with(name, default, |text| {
            text.parse::<T>().map_err(|error| format!("{text:?}: {error}"))
        })
    }
}

impl FromStr for Mode {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "explicit" => Ok(Self::Explicit),
            "transparent" => Ok(Self::Transparent),
            _ => Err("expected \"explicit\" or \"transparent\"".to_owned()),
        }
    }
}

fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty())
}

fn parse_host_port(text: &str) -> Result<String, String> {
    text.parse::<Target>().map(|target| target.to_string())
}

/// `8080,9000-9010`.
fn parse_ports(text: &str) -> Result<BTreeSet<u16>, String> {
    let mut ports = BTreeSet::new();
    for part in list(text) {
        let problem = || format!("{part:?} is no port or range of ports (as 8080 or 9000-9010)");
        let port = |text: &str| text.trim().parse::<u16>().map_err(|_| problem());
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(part)?, port(part)?),
        };
        if first == 0 || first > last {
            return Err(problem());
        }
        ports.extend(first..=last);
    }
    Ok(ports)
}

/// `127.0.0.1:15432=db.prod:5432,…`.
fn parse_listen_map(text: &str) -> Result<Vec<(SocketAddr, Target)>, String> {
    list(text)
        .map(|part| {
            let (listen, target) = part.split_once('=').ok_or_else(|| {
                format!("{part:?} lacks a \"=\": expected listener=destination, as 127.0.0.1:15432=db.prod:5432")
            })?;
            let listen = listen.parse().map_err(|_| {
                format!("{listen:?} is no address to listen on: expected ip:port, as 127.0.0.1:15432")
            })?;
            Ok((listen, target.parse()?))
        })
        .collect()
}

fn parse_cores(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(cores @ 1..=CORES_MAX) => Ok(cores),
        _ => Err(format!("{text:?} is no number of worker threads from 1 to {CORES_MAX}")),
    }
}

/// Linkerd's durations (`500ms`, `10s`, `5m`, `1h`), which are ours too.
fn parse_duration(text: &str) -> Result<Duration, String> {
    duration::parse(text).map_err(|error| format!("{text:?} {error}"))
}

/// One that has passed.
fn parse_age(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("must be longer than nothing; unset it for no maximum".to_owned()),
        age => Ok(age),
    }
}

fn any_address(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))
}

/// Ports whose protocols are known to speak first or to be no HTTP: Linkerd's defaults.
fn default_opaque_ports() -> BTreeSet<u16> {
    BTreeSet::from([25, 587, 3306, 4444, 5432, 6379, 9300, 11211])
}

/// One variable, for `--help` and `/env.json`.
struct Variable {
    name: &'static str,
    default: &'static str,
    meaning: &'static str,
}

macro_rules! variables {
    ($($constant:ident $name:literal $default:literal $meaning:literal;)*) => {
        $(const $constant: &str = $name;)*
        const VARIABLES: &[Variable] =
            &[$(Variable { name: $name, default: $default, meaning: $meaning }),*];
    };
}

variables! {
    MODE "STEADFAST_PROXY_MODE" "transparent"
        "transparent: connections are redirected by the kernel; explicit: applications name the destination";
    IDENTITY_LOCAL_NAME "LINKERD2_PROXY_IDENTITY_LOCAL_NAME" "required"
        "the workload: <sa>.<ns>.serviceaccount.identity.<control namespace>.<trust domain>";
    IDENTITY_TOKEN_FILE "LINKERD2_PROXY_IDENTITY_TOKEN_FILE" "required"
        "the token that proves it; read again for each request";
    IDENTITY_SVC_ADDR "LINKERD2_PROXY_IDENTITY_SVC_ADDR" "required"
        "host:port of the identity service";
    IDENTITY_SVC_NAME "LINKERD2_PROXY_IDENTITY_SVC_NAME" "required"
        "the identity that must answer there";
    IDENTITY_TRUST_ANCHORS "LINKERD2_PROXY_IDENTITY_TRUST_ANCHORS" "this or STEADFAST_PROXY_BUNDLE_FILE"
        "trust anchors in PEM, fixed for the life of the process";
    BUNDLE_FILE "STEADFAST_PROXY_BUNDLE_FILE" "this or LINKERD2_PROXY_IDENTITY_TRUST_ANCHORS"
        "the mounted trust bundle (SPIFFE JWKS or PEM), read again on change";
    DESTINATION_SVC_ADDR "LINKERD2_PROXY_DESTINATION_SVC_ADDR" "none: no discovery"
        "host:port of the control plane's discovery";
    DESTINATION_SVC_NAME "LINKERD2_PROXY_DESTINATION_SVC_NAME" "required with an address"
        "the identity that must answer there";
    DESTINATION_CONTEXT "LINKERD2_PROXY_DESTINATION_CONTEXT" "LINKERD2_PROXY_POLICY_WORKLOAD"
        "what discovery is told of who asks, as {\"ns\":\"demo\",\"pod\":\"web-1\"}";
    POLICY_WORKLOAD "LINKERD2_PROXY_POLICY_WORKLOAD" "none"
        "the workload, as {\"ns\":\"demo\",\"pod\":\"web-1\"}";
    INBOUND_LISTEN_ADDR "LINKERD2_PROXY_INBOUND_LISTEN_ADDR" "0.0.0.0:4143"
        "where peers connect";
    OUTBOUND_LISTEN_ADDR "LINKERD2_PROXY_OUTBOUND_LISTEN_ADDR" "127.0.0.1:4140"
        "where the workload's own connections arrive; in explicit mode an HTTP proxy";
    OUTBOUND_LISTEN_MAP "STEADFAST_PROXY_OUTBOUND_LISTEN_MAP" "none"
        "explicit mode, TCP: listener=destination, as 127.0.0.1:15432=db.prod:5432,…";
    ADMIN_LISTEN_ADDR "LINKERD2_PROXY_ADMIN_LISTEN_ADDR" "0.0.0.0:4191"
        "where /metrics, /live and /ready answer";
    INBOUND_PORTS "LINKERD2_PROXY_INBOUND_PORTS" "none"
        "the ports that the workload declares, as 8080,9000-9010";
    INBOUND_APPLICATION_IP "STEADFAST_PROXY_INBOUND_APPLICATION_IP" "127.0.0.1"
        "explicit mode: the address that the application listens on";
    INBOUND_DEFAULT_POLICY "LINKERD2_PROXY_INBOUND_DEFAULT_POLICY" "all-unauthenticated"
        "all-unauthenticated, all-authenticated, cluster-unauthenticated, cluster-authenticated, deny or audit";
    POLICY_CLUSTER_NETWORKS "LINKERD2_PROXY_POLICY_CLUSTER_NETWORKS" "the private networks"
        "what the cluster-* policies call the cluster, as 10.0.0.0/8,fd00::/8";
    INBOUND_OPAQUE_PORTS "LINKERD2_PROXY_INBOUND_PORTS_DISABLE_PROTOCOL_DETECTION" "25,587,3306,4444,5432,6379,9300,11211"
        "ports that are never looked into for HTTP";
    CORES "LINKERD2_PROXY_CORES" "1"
        "worker threads; never more than the CPUs that the process may use";
    LOG "LINKERD2_PROXY_LOG" "info"
        "the log's filter, as info or warn,steadfast_proxy=debug";
    LOG_FORMAT "LINKERD2_PROXY_LOG_FORMAT" "plain"
        "plain or json";
    CONNECTION_AGE_MAX "STEADFAST_PROXY_CONNECTION_AGE_MAX" "none"
        "how long opaque TCP, WebSocket and CONNECT by mutual TLS may go on, as 12h; requests have their own ends";
    WITHDRAWN_TCP_DEADLINE "STEADFAST_PROXY_WITHDRAWN_TCP_DEADLINE" "24h"
        "how long those may go on whose trust anchor, or their peer's, was withdrawn";
    SHUTDOWN_GRACE_PERIOD "LINKERD2_PROXY_SHUTDOWN_GRACE_PERIOD" "120s"
        "how long open connections may go on after SIGTERM";
}

const CORES_MAX: usize = 1024;
/// Linkerd's.
const CLUSTER_NETWORKS_DEFAULT: &str =
    "10.0.0.0/8,100.64.0.0/10,172.16.0.0/12,192.168.0.0/16,fd00::/8";
/// Long enough for most to end by themselves in between.
const WITHDRAWN_DEADLINE_DEFAULT: Duration = Duration::from_secs(24 * 3600);
const GRACE_DEFAULT: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::*;

    fn minimal() -> BTreeMap<&'static str, &'static str> {
        BTreeMap::from([
            (IDENTITY_LOCAL_NAME, "web.demo.serviceaccount.identity.steadfast.cluster.local"),
            (IDENTITY_TOKEN_FILE, "/run/token"),
            (IDENTITY_SVC_ADDR, "127.0.0.1:8080"),
            (
                IDENTITY_SVC_NAME,
                "steadfast-identity.steadfast.serviceaccount.identity.steadfast.cluster.local",
            ),
            (BUNDLE_FILE, "/run/bundle.json"),
        ])
    }

    fn errors(vars: &BTreeMap<&'static str, &'static str>) -> Vec<String> {
        Config::parse(vars).err().unwrap_or_default().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_required_variables_alone_are_enough() {
        let config = Config::parse(&minimal()).unwrap();
        assert_eq!(config.inbound.listen, any_address(4143));
        assert_eq!(config.mode, Mode::Transparent);
        assert!(config.destination.is_none());
        assert!(config.inbound.opaque_ports.contains(&5432));
    }

    #[test]
    fn every_error_is_told_at_once_with_its_variable_and_code() {
        let mut vars = minimal();
        vars.remove(IDENTITY_TOKEN_FILE);
        vars.insert(IDENTITY_LOCAL_NAME, "web");
        vars.insert(INBOUND_PORTS, "80,eighty");
        vars.insert(CORES, "0");
        vars.insert(SHUTDOWN_GRACE_PERIOD, "10");
        let errors = errors(&vars);
        assert_eq!(errors.len(), 5, "{errors:#?}");
        assert!(errors.iter().all(|error| error.starts_with("SFT-CFG-001: LINKERD2_PROXY_")));
    }

    #[test]
    fn anchors_come_from_exactly_one_place() {
        let mut vars = minimal();
        vars.insert(IDENTITY_TRUST_ANCHORS, "-----BEGIN CERTIFICATE-----");
        assert!(errors(&vars)[0].contains("unset one of both"));
        vars.remove(BUNDLE_FILE);
        assert!(errors(&vars).is_empty());
        vars.remove(IDENTITY_TRUST_ANCHORS);
        assert!(errors(&vars)[0].contains("is not set"));
    }

    #[test]
    fn a_listen_map_needs_explicit_mode() {
        let mut vars = minimal();
        vars.insert(OUTBOUND_LISTEN_MAP, "127.0.0.1:15432=DB.prod:5432");
        assert!(errors(&vars)[0].contains("explicit"));
        vars.insert(MODE, "explicit");
        let config = Config::parse(&vars).unwrap();
        assert_eq!(config.outbound.listen_map[0].1.to_string(), "db.prod:5432");
        vars.insert(OUTBOUND_LISTEN_MAP, "15432:db");
        assert!(errors(&vars)[0].contains("lacks a \"=\""));
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for wrong in ["", "10", "s", "-1s", "1w", "99999999999999999999s", "18446744073709551615d"]
        {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_maximum_age_is_optional_and_no_zero() {
        let mut vars = minimal();
        assert_eq!(Config::parse(&vars).unwrap().connection_age_max, None);
        vars.insert(CONNECTION_AGE_MAX, "12h");
        let age = Config::parse(&vars).unwrap().connection_age_max;
        assert_eq!(age, Some(Duration::from_secs(12 * 3600)));
        vars.insert(CONNECTION_AGE_MAX, "0s");
        assert!(errors(&vars)[0].contains("longer than nothing"));
    }

    #[test]
    fn a_destination_without_a_name_is_refused() {
        let mut vars = minimal();
        vars.insert(DESTINATION_SVC_ADDR, "127.0.0.1:8086");
        assert!(errors(&vars)[0].contains(DESTINATION_SVC_NAME));
    }

    #[test]
    fn help_names_every_variable() {
        let help = help();
        assert!(VARIABLES.iter().all(|variable| help.contains(variable.name)));
    }
}
