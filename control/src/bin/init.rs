//! `steadfast-init`: the init step of a meshed pod. It needs CAP_NET_ADMIN, and nothing runs on
//! after it.

use std::io::Write as _;
use std::process::{Command, ExitCode, Stdio};

use clap::{Parser, ValueEnum};
use steadfast_control::redirect::{self, HOOKS, PortSet, Redirection, Subnet};
use steadfast_process::flags::{ConfigErrors, Flags};

/// Redirects the TCP connections of a pod through its sidecar.
///
/// It writes rules of nftables, or of iptables where the kernel has no nftables. Run again, it puts
/// the rules that it is told in the place of those that are there. Connections over IPv6 and all that
/// is not TCP are left alone.
#[derive(Clone, Debug, Parser)]
#[command(name = "steadfast-init", version, about, long_about)]
struct Args {
    /// Where the sidecar takes connections that arrive
    #[arg(long, value_name = "PORT", default_value = "4143")]
    inbound_port: String,
    /// Where the sidecar takes connections that the application opens
    #[arg(long, value_name = "PORT", default_value = "4140")]
    outbound_port: String,
    /// The user of the sidecar, whose own connections are left alone
    #[arg(long, value_name = "UID", default_value = "2102")]
    proxy_uid: String,
    /// Ports of the pod that its peers reach directly, such as 22,8000-8100
    #[arg(long, value_name = "PORTS", default_value = "")]
    skip_inbound_ports: String,
    /// Ports of peers that the application reaches directly
    #[arg(long, value_name = "PORTS", default_value = "")]
    skip_outbound_ports: String,
    /// Peers that are reached, and that reach the pod, directly, such as 10.1.0.0/16
    #[arg(long, value_name = "SUBNETS", default_value = "")]
    skip_subnets: String,
    /// What the rules are written with
    #[arg(long, value_enum, value_name = "BACKEND", default_value = "auto")]
    backend: Backend,
    /// Take the rules back
    #[arg(long, conflicts_with = "dry_run")]
    undo: bool,
    /// Only print the rules
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// nftables where the kernel has it, else iptables
    Auto,
    /// nftables
    Nftables,
    /// iptables, the kernel's older tables
    Iptables,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let redirection = match check(&args) {
        Ok(redirection) => redirection,
        Err(errors) => {
            eprintln!("{errors}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    match run(&args, &redirection) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("steadfast-init: {error}");
            ExitCode::FAILURE
        }
    }
}

fn check(args: &Args) -> Result<Redirection, ConfigErrors> {
    let mut flags = Flags::default();
    let redirection = Redirection {
        inbound_port: port(&mut flags, "--inbound-port", &args.inbound_port),
        outbound_port: port(&mut flags, "--outbound-port", &args.outbound_port),
        proxy_uid: uid(&mut flags, "--proxy-uid", &args.proxy_uid),
        skip_inbound: ports(&mut flags, "--skip-inbound-ports", &args.skip_inbound_ports),
        skip_outbound: ports(&mut flags, "--skip-outbound-ports", &args.skip_outbound_ports),
        skip_subnets: Subnet::parse_all(&args.skip_subnets).unwrap_or_else(|| {
            let why = "expected subnets, such as 10.1.0.0/16,192.168.0.0/24";
            flags.wrong("--skip-subnets", &args.skip_subnets, why);
            Vec::new()
        }),
    };
    flags.check(redirection)
}

fn port(flags: &mut Flags, flag: &str, value: &str) -> u16 {
    value.parse().ok().filter(|port| *port != 0).unwrap_or_else(|| {
        flags.wrong(flag, value, "expected a port from 1 to 65535");
        1
    })
}

fn uid(flags: &mut Flags, flag: &str, value: &str) -> u32 {
    value.parse().unwrap_or_else(|_| {
        flags.wrong(flag, value, "expected the number of a user");
        0
    })
}

fn ports(flags: &mut Flags, flag: &str, value: &str) -> PortSet {
    let (ports, bad) = PortSet::parse(value, |_| None);
    for part in bad {
        flags.wrong(flag, value, &part.to_string());
    }
    ports
}

fn run(args: &Args, redirection: &Redirection) -> Result<(), String> {
    match args.backend {
        // By whichever they were written.
        Backend::Auto if args.undo => match (nftables(args, redirection), is_hooked()) {
            (_, true) => iptables(args, redirection),
            (undone, false) => undone,
        },
        Backend::Nftables => nftables(args, redirection),
        Backend::Iptables => iptables(args, redirection),
        Backend::Auto => nftables(args, redirection).or_else(|first| {
            eprintln!("{first}; trying iptables");
            iptables(args, redirection).map_err(|second| {
                format!(
                    "the connections of this pod cannot be redirected: {first}; {second}. The step \
                     needs the capabilities NET_ADMIN and NET_RAW, and a kernel with nf_tables or \
                     iptable_nat"
                )
            })
        }),
    }
}

fn nftables(args: &Args, redirection: &Redirection) -> Result<(), String> {
    let script =
        if args.undo { redirect::nftables_undo() } else { redirect::nftables(redirection) };
    apply(args, "nft", &["--file", "-"], &script)
}

fn iptables(args: &Args, redirection: &Redirection) -> Result<(), String> {
    let hooked = !args.dry_run && is_hooked();
    let script = match args.undo {
        true if !hooked => return Ok(()),
        true => redirect::iptables_undo(),
        false => redirect::iptables(redirection, hooked),
    };
    apply(args, "iptables-legacy-restore", &["--noflush", "--wait"], &script)
}

/// Whether the kernel's chains of iptables lead to ours.
fn is_hooked() -> bool {
    HOOKS.iter().all(|(hook, chain)| {
        let check = ["--table", "nat", "--wait", "--check", hook, "--jump", chain];
        let mut command = Command::new("iptables-legacy");
        command.env("XTABLES_LOCKFILE", "/dev/null");
        command.args(check).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    })
}

/// Gives the script to a program, or to the terminal.
fn apply(args: &Args, program: &str, flags: &[&str], script: &str) -> Result<(), String> {
    println!("{}", script.trim_end());
    if args.dry_run {
        return Ok(());
    }
    let cannot = |error: std::io::Error| format!("{program} cannot be run: {error}");
    let mut command = Command::new(program);
    // Nobody else writes rules here, and the root of the container cannot be written to.
    command.env("XTABLES_LOCKFILE", "/dev/null");
    command.args(flags).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(cannot)?;
    if let Some(mut input) = child.stdin.take() {
        // One that ends before it has read all says why.
        let _ = input.write_all(script.as_bytes());
    }
    let output = child.wait_with_output().map_err(cannot)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} has failed ({}): {}", output.status, said.trim()))
}

const EXIT_USAGE: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_flag_is_told_at_once() {
        let flags = [
            "--inbound-port=0",
            "--outbound-port=web",
            "--proxy-uid=proxy",
            "--skip-inbound-ports=9-8",
            "--skip-outbound-ports=http",
            "--skip-subnets=10.0.0.0",
        ];
        let args = Args::parse_from(["steadfast-init"].iter().chain(&flags));
        let error = check(&args).unwrap_err().to_string();
        for flag in flags {
            let name = flag.split('=').next().unwrap();
            assert!(error.contains(name), "{name} is not in {error}");
        }
    }
}
