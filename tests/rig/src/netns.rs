//! Network namespaces on one bridge, with the redirection rules of a pod.

use std::net::Ipv4Addr;
use std::process::Command;

use crate::process::binary_path;

/// A network: a namespace with a bridge, to which the others are tied. All of it is gone when it
/// is dropped.
#[derive(Debug)]
pub struct Network {
    name: String,
    members: Vec<String>,
}

impl Network {
    /// A namespace that is the bridge, with this address on it.
    pub fn new(tag: &str, ip: Ipv4Addr) -> Self {
        let name = format!("sft-{tag}-{}", std::process::id());
        let network = Self { name: name.clone(), members: Vec::new() };
        run(&format!("ip netns add {name}"));
        network.inside(&format!("ip link set lo up; ip link add br0 type bridge; ip addr add {ip}/24 dev br0; ip link set br0 up"));
        network
    }

    /// The bridge's own namespace.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds a namespace with this address and a default route to the bridge.
    pub fn join(&mut self, tag: &str, ip: Ipv4Addr, gateway: Ipv4Addr) -> String {
        let index = self.members.len();
        let name = format!("sft-{tag}-{}", std::process::id());
        run(&format!("ip netns add {name}"));
        self.members.push(name.clone());
        self.inside(&format!(
            "ip link add v{index} type veth peer name eth0 netns {name}; ip link set v{index} master br0 up"
        ));
        inside(
            &name,
            &format!(
                "ip link set lo up; ip addr add {ip}/24 dev eth0; ip link set eth0 up; ip route add default via {gateway}"
            ),
        );
        name
    }

    fn inside(&self, script: &str) {
        inside(&self.name, script);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in self.members.iter().chain([&self.name]) {
            // What is not there need not go; the veth pairs end with their namespaces.
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

/// Redirects what arrives to 4143 and what leaves to 4140, but for the sidecar's own user: the
/// rules that a pod of the mesh has, by the program that makes them there.
pub fn redirect(netns: &str, proxy_uid: u32) {
    let init = binary_path("steadfast-init");
    let skipped = "--skip-inbound-ports=4190,4191";
    inside(netns, &format!("{} --proxy-uid={proxy_uid} {skipped}", init.display()));
}

/// Runs a script in a namespace; panics with what it printed when it fails.
pub fn inside(netns: &str, script: &str) -> String {
    run(&format!("nsenter --net=/run/netns/{netns} sh -ec '{script}'"))
}

fn run(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().expect("sh runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{script}\n{}", text(&output.stderr));
    text(&output.stdout)
}
