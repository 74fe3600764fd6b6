//! A node: namespaces with a containerd, a kubelet and a kube-proxy of their own.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;

use super::{DEADLINE, DNS_IP, FEATURE_GATES, GATEWAY_IP, Parts, Place};
use crate::namespaces::{Kind, Namespaces};
use crate::process::{Process, Spec};
use crate::wait::until;

/// A running node.
#[derive(Debug)]
pub struct Node {
    name: String,
    /// What it runs in.
    pub namespaces: Namespaces,
    /// Runs the containers.
    pub containerd: Process,
    /// Runs the pods.
    pub kubelet: Process,
    /// Leads to Services.
    pub kube_proxy: Process,
}

impl Node {
    /// Starts the node with this number, of so many.
    pub(super) async fn start(
        place: &Place<'_>,
        fabric: &Namespaces,
        group: &str,
        index: u8,
        nodes: u8,
    ) -> Self {
        let name = name(index);
        make_control_group(group, &name);
        let namespaces = Namespaces::new(place.logs, &name, Kind::Machine, &machine(&name)).await;
        namespaces.plug_into(fabric, &name);
        let mut routes = format!(
            "ip addr add {}/24 dev eth0; ip route add default via {GATEWAY_IP};",
            ip(index)
        );
        for other in (1..=nodes).filter(|other| *other != index) {
            routes += &format!("ip route add {} via {};", pod_subnet(other), ip(other));
        }
        namespaces.run(&routes);
        let node = format!("{name}.kubeconfig");
        place.kubeconfig(&node, &format!("https://{}:6443", super::CONTROL_IP), &name);
        let write = |file: &str, text: String| {
            let path = place.dir.join(format!("{name}-{file}"));
            std::fs::write(&path, text).expect("the folder is ours");
            path.display().to_string()
        };
        let start = |part: &str, args: Vec<String>| {
            let mut command = vec![place.parts.path(part).display().to_string()];
            command.extend(args);
            let mut env = vec![("PATH".to_owned(), place.parts.search_path())];
            env.push(("HOME".to_owned(), "/root".to_owned()));
            let spec = Spec {
                name: format!("{name}-{part}"),
                command,
                env,
                entrance: namespaces.entrance(),
                ..Spec::default()
            };
            Process::start(place.logs, spec)
        };
        // Read by containerd in its place: the machine's own folders are not there.
        namespaces.run(&format!("echo '{}' >/run/cni/10-pods.conflist", cni(index)));
        let containerd = write("containerd.toml", CONTAINERD.to_owned());
        let containerd = start("containerd", vec![format!("--config={containerd}")]);
        until(&format!("containerd of {name} answers"), DEADLINE, || async {
            ctr(&namespaces.entrance(), place.parts, &["version"])
        })
        .await;
        for image in ["pause", "coredns", "busybox"] {
            import(&namespaces.entrance(), place.parts, &place.parts.image(image));
        }
        let kubelet = write("kubelet.yaml", kubelet(place.dir, group, &name));
        let kubelet = start(
            "kubelet",
            vec![
                format!("--config={kubelet}"),
                format!("--kubeconfig={}", place.file(&node)),
                format!("--hostname-override={name}"),
                format!("--node-ip={}", ip(index)),
            ],
        );
        let kube_proxy = start(
            "kube-proxy",
            vec![
                format!("--kubeconfig={}", place.file("admin.kubeconfig")),
                format!("--hostname-override={name}"),
                "--proxy-mode=nftables".to_owned(),
                "--conntrack-max-per-core=0".to_owned(),
                "--conntrack-tcp-timeout-established=0".to_owned(),
                "--conntrack-tcp-timeout-close-wait=0".to_owned(),
            ],
        );
        Self { name, namespaces, containerd, kubelet, kube_proxy }
    }

    /// Its name, as the API server knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Brings in an image in the form of `docker save`.
    pub(super) fn import(&self, parts: &Parts, image: &Path) {
        import(&self.namespaces.entrance(), parts, image);
    }

    pub(super) fn end(&mut self) {
        for process in [&mut self.kube_proxy, &mut self.kubelet, &mut self.containerd] {
            process.kill();
        }
        self.namespaces.end();
    }
}

/// The name of the node with this number, from 1.
pub(super) fn name(index: u8) -> String {
    format!("node-{index}")
}

/// Its address.
pub(super) fn ip(index: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 250, 0, 10 + index)
}

/// The addresses of its pods.
pub(super) fn pod_subnet(index: u8) -> String {
    format!("10.244.{index}.0/24")
}

/// Brings an image into a node that is entered so.
pub(super) fn import(entrance: &[String], parts: &Parts, image: &Path) {
    let image = image.display().to_string();
    ctr(entrance, parts, &["--namespace=k8s.io", "images", "import", "--local", &image])
        .unwrap_or_else(|error| panic!("{image} cannot be imported: {error}"));
}

fn ctr(entrance: &[String], parts: &Parts, args: &[&str]) -> Result<String, String> {
    let output = Command::new(&entrance[0])
        .args(&entrance[1..])
        .arg(parts.path("ctr"))
        .args(args)
        .output()
        .expect("nsenter runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// What a machine has before anything runs: folders of its own where a node keeps its things, and
/// kernel settings that the kubelet would change for everybody.
fn machine(name: &str) -> String {
    let mut script = format!(
        "mount --make-rshared /; \
         for folder in /run /var/lib /var/log; do mount -t tmpfs tmpfs $folder; done; \
         mkdir -p /run/cni /run/lock /run/settings /var/lib/kubelet; \
         hostname {name}; \
         echo 1 >/proc/sys/net/ipv4/ip_forward; "
    );
    for (setting, value) in KERNEL_SETTINGS {
        let file = setting.replace('/', ".");
        script += &format!(
            "echo {value} >/run/settings/{file}; \
             mount --bind /run/settings/{file} /proc/sys/{setting}; "
        );
    }
    script
}

/// Makes a node's group in each hierarchy, with the processors and memory of its parent's.
fn make_control_group(group: &str, node: &str) {
    let script = format!(
        "for hierarchy in /sys/fs/cgroup/*/; do \
           [ ! -e $hierarchy/cgroup.controllers ] || continue; \
           for path in {group} {group}/{node}; do \
             mkdir -p $hierarchy$path; \
             for file in cpuset.cpus cpuset.mems; do \
               [ ! -e $hierarchy$path/$file ] || cat $hierarchy$path/../$file >$hierarchy$path/$file; \
             done; \
           done; \
         done"
    );
    let made = Command::new("sh").args(["-ec", &script]).status();
    assert!(made.is_ok_and(|status| status.success()), "no control group {group}/{node}");
}

/// Each pod has a link of its own to the node, so that everything between pods is routed and passes
/// the rules of the Services.
fn cni(index: u8) -> String {
    serde_json::json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": false,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{ "subnet": pod_subnet(index) }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                },
            },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    })
    .to_string()
}

fn kubelet(dir: &Path, group: &str, node: &str) -> String {
    let gates: serde_json::Map<_, _> = FEATURE_GATES
        .split(',')
        .filter_map(|gate| gate.split_once('='))
        .map(|(name, on)| (name.to_owned(), (on == "true").into()))
        .collect();
    serde_json::json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": { "enabled": false },
            "webhook": { "enabled": true },
            "x509": { "clientCAFile": dir.join("ca.crt") },
        },
        "authorization": { "mode": "Webhook" },
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{group}/{node}"),
        "clusterDNS": [DNS_IP],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "enforceNodeAllocatable": ["none"],
        "evictionHard": { "memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%" },
        "failCgroupV1": false,
        "failSwapOn": false,
        // How soon pods see a changed ConfigMap: a minute and more, where nobody says so.
        "syncFrequency": "5s",
        "featureGates": gates,
        "imageGCHighThresholdPercent": 100,
        "localStorageCapacityIsolation": false,
    })
    .to_string()
}

const CONTAINERD: &str = r#"
version = 3

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "localhost/pause:1"

[plugins."io.containerd.cri.v1.runtime"]
disable_apparmor = true
restrict_oom_score_adj = true

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/usr/lib/cni"]
conf_dir = "/run/cni"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
SystemdCgroup = false
"#;

/// What a kubelet wants of the kernel.
const KERNEL_SETTINGS: [(&str, &str); 6] = [
    ("kernel/keys/root_maxbytes", "25000000"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
];
