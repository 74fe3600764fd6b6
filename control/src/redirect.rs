//! Redirection in a pod: the rules by which its TCP connections pass through the sidecar. Pure: the
//! settings in, a script for `nft` or `iptables-restore` out.
//!
//! What arrives goes to the inbound port, what the application sends to the outbound port. Left
//! alone are what the sidecar itself sends (by its user), what stays within the pod (by loopback),
//! what an annotation skips, and everything that is not TCP.

use std::net::IpAddr;

pub use crate::index::PortSet;

/// What is redirected where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirection {
    /// Where the sidecar takes what arrives.
    pub inbound_port: u16,
    /// Where it takes what the application sends.
    pub outbound_port: u16,
    /// Whose connections are left alone.
    pub proxy_uid: u32,
    /// Ports of the pod that its peers reach directly.
    pub skip_inbound: PortSet,
    /// Ports of peers that the application reaches directly.
    pub skip_outbound: PortSet,
    /// Peers that it reaches, and that reach it, directly.
    pub skip_subnets: Vec<Subnet>,
}

/// A range of IPv4 addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subnet(String);

impl Subnet {
    /// Parses a list of subnets; `None` where one is none. Those of IPv6 are left out: nothing of
    /// it is redirected.
    pub fn parse_all(text: &str) -> Option<Vec<Self>> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let parsed = parts.map(|part| {
            let (ip, bits) = part.split_once('/')?;
            let (ip, bits) = (ip.parse::<IpAddr>().ok()?, bits.parse::<u8>().ok()?);
            let most = if ip.is_ipv4() { 32 } else { 128 };
            (bits <= most).then(|| ip.is_ipv4().then(|| Self(format!("{ip}/{bits}"))))
        });
        parsed.collect::<Option<Vec<_>>>().map(|all| all.into_iter().flatten().collect())
    }
}

/// The script for `nft --file`: one transaction, which puts a table of ours in the place of the one
/// that may be there.
pub fn nftables(redirection: &Redirection) -> String {
    let Redirection { inbound_port, outbound_port, proxy_uid, .. } = redirection;
    let skip_ports = |ports: &PortSet| match ports.to_string() {
        none if none.is_empty() => String::new(),
        ports => format!("    tcp dport {{ {ports} }} return\n"),
    };
    // Each by itself: a set takes none that overlap.
    let skip_subnets = |side: &str| -> String {
        let subnets = redirection.skip_subnets.iter();
        subnets.map(|Subnet(subnet)| format!("    ip {side} {subnet} return\n")).collect()
    };
    format!(
        "{remove}\
         table ip {NAME} {{\n  \
           chain inbound {{\n    \
             type nat hook prerouting priority dstnat; policy accept;\n    \
             iifname \"lo\" return\n\
         {skip_sources}{skip_inbound}    \
             meta l4proto tcp redirect to :{inbound_port}\n  \
           }}\n  \
           chain outbound {{\n    \
             type nat hook output priority -100; policy accept;\n    \
             meta skuid {proxy_uid} return\n    \
             oifname \"lo\" return\n\
         {skip_destinations}{skip_outbound}    \
             meta l4proto tcp redirect to :{outbound_port}\n  \
           }}\n\
         }}\n",
        remove = nftables_undo(),
        skip_sources = skip_subnets("saddr"),
        skip_inbound = skip_ports(&redirection.skip_inbound),
        skip_destinations = skip_subnets("daddr"),
        skip_outbound = skip_ports(&redirection.skip_outbound),
    )
}

/// The script for `nft --file` that takes it back. Deleting what is not there would fail.
pub fn nftables_undo() -> String {
    format!("add table ip {NAME}\ndelete table ip {NAME}\n")
}

/// The script for `iptables-restore --noflush`: chains of ours, emptied and filled. `hooked` says
/// whether the kernel's chains lead to them already.
pub fn iptables(redirection: &Redirection, hooked: bool) -> String {
    let Redirection { inbound_port, outbound_port, proxy_uid, .. } = redirection;
    let mut rules = vec![
        "*nat".to_owned(),
        format!(":{INBOUND} - [0:0]"),
        format!(":{OUTBOUND} - [0:0]"),
        format!("-A {INBOUND} -i lo -j RETURN"),
        format!("-A {OUTBOUND} -m owner --uid-owner {proxy_uid} -j RETURN"),
        format!("-A {OUTBOUND} -o lo -j RETURN"),
    ];
    for (chain, side, ports) in
        [(INBOUND, "-s", &redirection.skip_inbound), (OUTBOUND, "-d", &redirection.skip_outbound)]
    {
        let subnets = redirection.skip_subnets.iter();
        rules.extend(subnets.map(|Subnet(subnet)| format!("-A {chain} {side} {subnet} -j RETURN")));
        let ranges = ports.ranges();
        rules
            .extend(ranges.map(|(first, last)| {
                format!("-A {chain} -p tcp --dport {first}:{last} -j RETURN")
            }));
    }
    rules.push(format!("-A {INBOUND} -p tcp -j REDIRECT --to-ports {inbound_port}"));
    rules.push(format!("-A {OUTBOUND} -p tcp -j REDIRECT --to-ports {outbound_port}"));
    if !hooked {
        rules.extend(HOOKS.map(|(hook, chain)| format!("-A {hook} -j {chain}")));
    }
    rules.push("COMMIT\n".to_owned());
    rules.join("\n")
}

/// The script for `iptables-restore --noflush` that takes it back, where it is there.
pub fn iptables_undo() -> String {
    let unhook = HOOKS.map(|(hook, chain)| format!("-D {hook} -j {chain}\n")).concat();
    let empty = HOOKS.map(|(_, chain)| format!("-F {chain}\n-X {chain}\n")).concat();
    format!("*nat\n{unhook}{empty}COMMIT\n")
}

/// The table of ours in nftables.
pub const NAME: &str = "steadfast";
const INBOUND: &str = "STEADFAST_INBOUND";
const OUTBOUND: &str = "STEADFAST_OUTBOUND";
/// The kernel's chains of iptables, and where each leads.
pub const HOOKS: [(&str, &str); 2] = [("PREROUTING", INBOUND), ("OUTPUT", OUTBOUND)];

#[cfg(test)]
mod tests {
    use super::*;

    fn redirection() -> Redirection {
        let ports = |text| PortSet::parse(text, |_| None).0;
        Redirection {
            inbound_port: 4143,
            outbound_port: 4140,
            proxy_uid: 2102,
            skip_inbound: ports("22,4190-4191"),
            skip_outbound: ports("3306"),
            skip_subnets: Subnet::parse_all("10.1.0.0/16, fd00::/8,10.1.2.0/24").unwrap(),
        }
    }

    #[test]
    fn both_kinds_of_rules_say_the_same() {
        let nft = nftables(&redirection());
        for rule in [
            "iifname \"lo\" return",
            "ip saddr 10.1.2.0/24 return",
            "tcp dport { 22,4190-4191 } return",
            "redirect to :4143",
            "meta skuid 2102 return",
            "oifname \"lo\" return",
            "ip daddr 10.1.0.0/16 return",
            "tcp dport { 3306 } return",
            "redirect to :4140",
        ] {
            assert!(nft.contains(rule), "{rule} is not in\n{nft}");
        }
        assert!(!nft.contains("fd00"), "{nft}");
        let rules = iptables(&redirection(), false);
        for rule in [
            "STEADFAST_INBOUND -i lo -j RETURN",
            "STEADFAST_INBOUND -s 10.1.2.0/24 -j RETURN",
            "STEADFAST_INBOUND -p tcp --dport 4190:4191 -j RETURN",
            "STEADFAST_INBOUND -p tcp -j REDIRECT --to-ports 4143",
            "STEADFAST_OUTBOUND -m owner --uid-owner 2102 -j RETURN",
            "STEADFAST_OUTBOUND -o lo -j RETURN",
            "STEADFAST_OUTBOUND -d 10.1.0.0/16 -j RETURN",
            "STEADFAST_OUTBOUND -p tcp --dport 3306:3306 -j RETURN",
            "STEADFAST_OUTBOUND -p tcp -j REDIRECT --to-ports 4140",
            "-A PREROUTING -j STEADFAST_INBOUND",
        ] {
            assert!(rules.contains(rule), "{rule} is not in\n{rules}");
        }
        assert!(!iptables(&redirection(), true).contains("PREROUTING"));
    }

    #[test]
    fn what_is_skipped_comes_before_what_is_redirected() {
        for rules in [nftables(&redirection()), iptables(&redirection(), false)] {
            let [skipped, redirected] =
                [rules.rfind("3306").unwrap(), rules.rfind("4140").unwrap()];
            assert!(skipped < redirected, "{rules}");
        }
    }

    #[test]
    fn a_subnet_that_is_none_is_refused() {
        for bad in ["10.0.0.0", "10.0.0.0/33", "web/8", "10.0.0.0/-1"] {
            assert_eq!(Subnet::parse_all(bad), None, "{bad}");
        }
        assert_eq!(Subnet::parse_all(""), Some(Vec::new()));
    }
}
